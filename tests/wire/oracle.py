"""Attention in float64, from its definition: what every answer of the wire tests is held against.

A sequence is plain arrays of keys and values, one pair a layer; nothing here knows pages,
chunks, leaves or merges. Tensors are rounded to their wire dtype first (encode, decode), so
that the oracle sees the numbers that the daemon sees.
"""

import numpy as np

F32, F16, BF16 = 1, 2, 3  # DType of attn.proto
SIZE = {F32: 4, F16: 2, BF16: 2}

# Error allowed in units of max |v| (docs/numerics.md), before the term for large logits.
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 1e-2}


def encode(array, dtype):
    """Bytes of an array on the wire: little-endian, packed, rounded to nearest even."""
    single = np.ascontiguousarray(array, dtype="<f4")
    if dtype == F32:
        return single.tobytes()
    if dtype == F16:
        return single.astype("<f2").tobytes()
    bits = single.view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) \
        .astype("<u2").tobytes()


def decode(data, dtype, shape):
    """The numbers of a tensor on the wire, in float64."""
    if dtype == F32:
        values = np.frombuffer(data, "<f4")
    elif dtype == F16:
        values = np.frombuffer(data, "<f2")
    else:
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return values.astype(np.float64).reshape(shape)


class Layer:
    """A row of the layer table, in the proto's words and defaults."""

    def __init__(self, scale=0.0, softcap=0.0, window=0, non_causal=False, slopes=(), sinks=()):
        self.scale, self.softcap, self.window = np.float32(scale), np.float32(softcap), window
        self.non_causal, self.slopes, self.sinks = non_causal, slopes, sinks


def page_positions(page, page_size, chunk_size):
    """Positions of a page of a block-sparse list: pages are counted from their chunk's start."""
    pages_per_chunk = -(-chunk_size // page_size)
    chunk, within = divmod(page, pages_per_chunk)
    first = chunk * chunk_size + within * page_size
    return first, min(first + page_size, (chunk + 1) * chunk_size)


def seen_mask(lists, head, length, base, page_size, chunk_size):
    """Which positions a KV head may see by the entry's block-sparse lists (none: all).

    The step's own tokens, from base on, are seen in any case."""
    if not lists:
        return np.ones(length, bool)
    mask = np.zeros(length, bool)
    for page in lists[0 if len(lists) == 1 else head]:
        first, end = page_positions(page, page_size, chunk_size)
        mask[first:end] = True
    mask[base:] = True
    return mask


def attend_paths(q, k, v, layer, base, mask, lists=(), page_size=16, chunk_size=2048):
    """One entry with a mask: each query as though the tokens that its row names were all that is
    new, one behind the other from base on."""
    rows = []
    for i, named in enumerate(mask):
        seen = np.concatenate([np.arange(base), base + np.flatnonzero(named)])
        rows.append(attend(q[i:i + 1], k[seen], v[seen], layer, base, lists, page_size, chunk_size))
    return tuple(np.concatenate(part) for part in zip(*rows))


def attend(q, k, v, layer, base, lists=(), page_size=16, chunk_size=2048):
    """One entry, one layer.

    q [n_q][q_heads][d_k]; k, v [base + n_new][kv_heads][d]; the last query stands at the last
    position. Returns o [n_q][q_heads][d_v], lse [n_q][q_heads], and kappa of the same shape:
    the size of the largest sum behind a logit, which scales the error of a float32 product."""
    n_q, q_heads, d_k = q.shape
    length, kv_heads, d_v = v.shape
    scale = float(layer.scale) if layer.scale > 0 else 1.0 / np.sqrt(d_k)
    q_pos = (length - n_q + np.arange(n_q))[:, None]
    kv_pos = np.arange(length)[None, :]
    o = np.zeros((n_q, q_heads, d_v))
    lse = np.full((n_q, q_heads), -np.inf)
    kappa = np.zeros((n_q, q_heads))
    position_mask = np.ones((n_q, length), bool)
    if not layer.non_causal:
        position_mask &= kv_pos <= q_pos
    if layer.window:
        position_mask &= kv_pos > q_pos - layer.window
    for h in range(q_heads):
        g = h // (q_heads // kv_heads)
        x = scale * (q[:, h] @ k[:, g].T)
        if layer.softcap > 0:
            x = float(layer.softcap) * np.tanh(x / float(layer.softcap))
        if len(layer.slopes):
            x = x + float(np.float32(layer.slopes[h])) * (kv_pos - q_pos)
        mask = position_mask & seen_mask(lists, g, length, base, page_size, chunk_size)
        if length == 0:
            continue
        size = np.where(mask, scale * (np.abs(q[:, h]) @ np.abs(k[:, g]).T), 0)
        kappa[:, h] = size.max(axis=1)
        x = np.where(mask, x, -np.inf)
        top = x.max(axis=1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        p = np.exp(x - top)
        total = p.sum(axis=1)
        with np.errstate(divide="ignore"):
            lse[:, h] = top[:, 0] + np.log(total)
        if len(layer.sinks):
            total = total + np.exp(float(np.float32(layer.sinks[h])) - top[:, 0])
        o[:, h] = np.where(total[:, None] > 0, p @ v[:, g] / np.maximum(total, 1e-300)[:, None], 0)
    return o, lse, kappa


class Sequence:
    """A sequence as the client knows it: all its keys and values of each layer."""

    def __init__(self, layers, kv_heads, d_k, d_v):
        self.k = [np.zeros((0, kv_heads, d_k)) for _ in range(layers)]
        self.v = [np.zeros((0, kv_heads, d_v)) for _ in range(layers)]

    def __len__(self):
        return len(self.k[0])

    def cut(self, length):
        """A copy of the first tokens: what a fork or a truncate leaves."""
        other = Sequence.__new__(Sequence)
        other.k = [k[:length] for k in self.k]
        other.v = [v[:length] for v in self.v]
        return other

    def append(self, k, v):
        """k, v: [layers][n][kv_heads][d]."""
        self.k = [np.concatenate([a, b]) for a, b in zip(self.k, k)]
        self.v = [np.concatenate([a, b]) for a, b in zip(self.v, v)]


def error_of(o, lse, want_o, want_lse, kappa, v_max, dtype):
    """The largest error of an answer in units of what is allowed: at most 1 passes."""
    room = (TOLERANCE[dtype] + 2.0 ** -20 * kappa[..., None]) * max(v_max, 1e-30)
    worst = float((np.abs(o - want_o) / room).max(initial=0.0))
    if not np.isfinite(o).all():
        return float("inf")
    if lse is not None:
        empty = np.isneginf(want_lse)
        if (np.isneginf(lse) != empty).any():
            return float("inf")
        gap = np.abs(np.where(empty, 0, lse) - np.where(empty, 0, want_lse))
        room = 1e-5 * np.maximum(1, np.abs(np.where(empty, 0, want_lse))) + 2.0 ** -20 * kappa
        worst = max(worst, float((gap / room).max(initial=0.0)))
    return worst
