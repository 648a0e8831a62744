#!/usr/bin/env python3
"""Check the runner's logits against an independent implementation in float64.

    check_logits.py RUNNER MODEL.gguf [runner option ...]

Runs `RUNNER --model MODEL.gguf --prompt ... --logits ...` on a short prompt,
computes the same with numpy alone (its own GGUF parser, its own dequantisation,
plain attention without a cache), and compares the logits of every position.

The bound is measured, not guessed. The weights are the same numbers on both
sides, so all that may differ is float32 arithmetic. This script runs its model
twice, in float64 and in float32; how far the two lie apart, at the worst logit
of the prompt, is what float32 costs with this prompt. The runner adds up in
another order, so it may lie FACTOR times as far, and no further. A norm without
its epsilon moves the logits a hundred times that far, a token at the wrong
position ten thousand times.

The k and v of the cache are rounded too unless the cache is f32, so it is.
"""

import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

PROMPT = "The keeper wound the clockwork every 40 minutes, and at dawn he put out the light."
FACTOR = 4

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """Metadata in .meta, float64 matrices through tensor()."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        self.at = 0
        magic, version, n_tensors, n_keys = self.take("4sIQQ")
        assert magic == b"GGUF" and version in (2, 3)
        self.meta = {}
        for _ in range(n_keys):
            key = self.text().decode()
            self.meta[key] = self.value(*self.take("I"))
        self.heads = {}
        for _ in range(n_tensors):
            name = self.text().decode()
            dims = self.take("%dQ" % self.take("I")[0])
            self.heads[name] = (dims, *self.take("IQ"))
        alignment = self.meta.get("general.alignment", 32)
        self.start = -(-self.at // alignment) * alignment

    def take(self, layout):
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def text(self):
        return self.take("%ds" % self.take("Q")[0])[0]

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, n = self.take("IQ")
            return [self.text() for _ in range(n)] if kind == 8 else list(self.take("%d%s" % (n, SCALARS[kind])))
        return self.take(SCALARS[kind])[0]

    def tensor(self, name):
        dims, kind, offset = self.heads[name]
        count = int(np.prod(dims))
        at = self.start + offset
        if kind in (0, 1):
            values = np.frombuffer(self.data, ("<f4", "<f2")[kind], count, at).astype(np.float64)
        elif kind == 3:
            block = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
            blocks = np.frombuffer(self.data, block, count // 32, at)
            q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
            values = blocks["d"].astype(np.float64)[:, None] * q + blocks["m"].astype(np.float64)[:, None]
        elif kind == 8:
            blocks = np.frombuffer(self.data, np.dtype([("d", "<f2"), ("q", "i1", 32)]), count // 32, at)
            values = blocks["d"].astype(np.float64)[:, None] * blocks["q"]
        else:
            sys.exit("tensor %s has type %d, which this script does not know" % (name, kind))
        return values.reshape(dims[::-1])


def forward(gguf, ids, dtype):
    """Logits [len(ids)][vocab], all arithmetic in dtype."""
    meta = gguf.meta
    layers = meta["llama.block_count"]
    heads = meta["llama.attention.head_count"]
    kv_heads = meta["llama.attention.head_count_kv"]
    epsilon = meta["llama.attention.layer_norm_rms_epsilon"]
    n = len(ids)

    def weight(name):
        return gguf.tensor(name + ".weight").astype(dtype)

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + dtype(epsilon)) * weight(name)

    embedding = weight("token_embd")
    head_dim = embedding.shape[1] // heads
    pairs = np.arange(head_dim // 2)
    angle = np.arange(n)[:, None] * float(meta["llama.rope.freq_base"]) ** (-2.0 * pairs / head_dim)
    turn_cos, turn_sin = np.cos(angle).astype(dtype)[:, None], np.sin(angle).astype(dtype)[:, None]

    def rotate(x):
        x = x.reshape(n, -1, head_dim // 2, 2)
        a, b = x[..., 0], x[..., 1]
        turned = np.stack([a * turn_cos - b * turn_sin, a * turn_sin + b * turn_cos], axis=-1)
        return turned.reshape(n, -1, head_dim)

    unseen = np.triu(np.ones((n, n), bool), 1)
    x = embedding[ids]
    for layer in range(layers):
        block = "blk.%d." % layer
        h = norm(x, block + "attn_norm")
        q = rotate(h @ weight(block + "attn_q").T)
        k = rotate(h @ weight(block + "attn_k").T)
        v = (h @ weight(block + "attn_v").T).reshape(n, kv_heads, head_dim)
        o = np.empty_like(q)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / dtype(np.sqrt(head_dim))
            scores[unseen] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            o[:, head] = p @ v[:, kv] / p.sum(axis=1, keepdims=True)
        x = x + o.reshape(n, -1) @ weight(block + "attn_output").T
        h = norm(x, block + "ffn_norm")
        gate = h @ weight(block + "ffn_gate").T
        up = h @ weight(block + "ffn_up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(block + "ffn_down").T
    output = weight("output") if "output.weight" in gguf.heads else embedding
    return norm(x, "output_norm") @ output.T


def token_bytes(text):
    """The bytes of a token: GPT-2's alphabet moves unprintable bytes to U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(moved)})
    return bytes(alphabet[char] for char in text.decode())


def run(runner, model, options):
    """The runner's tokens of PROMPT, and its logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "logits")
        command = [runner, "--model", model, "--prompt", PROMPT, "--no-template", "--quiet", "--kv-dtype",
                   "f32", "--max-tokens", "0", "--logits", path, *options]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        logits = np.fromfile(path, "<f4").astype(np.float64)
    line = next(line for line in text.splitlines() if line.startswith("prompt tokens:"))
    ids = [int(word) for word in line.split(":")[1].split()]
    return ids, logits.reshape(len(ids), -1)


def main():
    runner, model, *options = sys.argv[1:]
    gguf = Gguf(model)
    ids, logits = run(runner, model, options)

    text = b"".join(token_bytes(gguf.meta["tokenizer.ggml.tokens"][i]) for i in ids).decode()
    assert text == PROMPT, "the tokens say %r" % text

    exact = forward(gguf, ids, np.float64)
    bound = FACTOR * np.abs(forward(gguf, ids, np.float32) - exact).max()
    error = np.abs(logits - exact).max()
    argmax = np.argmax(logits, axis=1) == np.argmax(exact, axis=1)
    print("%d positions x %d logits of up to %.1f: largest error %.2e, bound %.2e, same argmax at %d"
          % (*logits.shape, np.abs(exact).max(), error, bound, argmax.sum()))
    if not error <= bound or not argmax.all():
        sys.exit("check_logits: the runner's logits are wrong")


if __name__ == "__main__":
    main()
