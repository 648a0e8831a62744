"""One story told to every client: batches of all shapes on a few sequences, with forks, truncates
and partial commits between them. The same seed gives the same tensors, so that what two clients
are answered can be compared byte by byte, and with the oracle.
"""

import numpy as np

import oracle
from client import Entry, pb

CHUNK, PAGE = 256, 24  # pages that do not divide a chunk: the last one of each is partly used
Q_HEADS, KV_HEADS, D_K, D_V = 6, 3, 64, 40

# Layers that differ in everything that a row of the table can say.
LAYERS = [
    dict(),
    dict(softcap=4.0, window=300, sinks=[0.5, -2.0, 3.0, 0.0, -80.0, 1.25]),
    dict(scale=0.2, slopes=[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625]),
    dict(non_causal=True, window=450, sinks=[1.0] * 6),
]


def geometry(kv_dtype):
    return dict(layers=len(LAYERS), q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim_k=D_K,
                head_dim_v=D_V, kv_dtype=kv_dtype, page_size=PAGE, chunk_size=CHUNK,
                placement=pb.PLACEMENT_SPREAD, layer_table=[pb.Layer(**row) for row in LAYERS],
                region_bytes=24 << 20)


def tree(*parents):
    """The mask of a tree: each token's parent, -1 for a root; parents come before children."""
    mask = np.zeros((len(parents), len(parents)), bool)
    for token, parent in enumerate(parents):
        mask[token] = mask[parent] if parent >= 0 else False
        mask[token, token] = True
    return mask


def wide_tree(n):
    return tree(*(-1 if t == 0 else (t - 1) // 3 if t % 4 else t - 1 for t in range(n)))


# (sequence, n_q, n_new[, options]); base is the sequence's length unless options say otherwise.
BATCHES = [
    [("a", 540, 540), ("b", 300, 300), ("c", 1, 1)],                    # prefill, ragged
    [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)],                            # decode
    [("c", 1, 1), ("d", 130, 130), ("a", 2, 2)],                        # mixed
    [("a", 3, 0, dict(base=500)), ("b", 0, 60), ("c", 1, 1)],           # query-only, append-only
    [("a", 1, 1, dict(sparse=[[0, 5, 11, 22, 23]])),                    # block-sparse: one list,
     ("b", 1, 1, dict(sparse=[[0], [1, 2, 12], []])), ("d", 5, 40)],    # one per head; few queries
    "fork a 530 e", "truncate b 256", "truncate d 100",
    [("e", 4, 4, dict(accept=2)), ("b", 1, 1), ("d", 3, 3, dict(accept=0)), ("a", 1, 1)],
    [("e", 1, 1), ("a", 300, 300), ("b", 70, 70)],
    [("c", 7, 7, dict(mask=tree(-1, 0, 0, 1, 3, 2, -1), path=[0, 1, 3, 4])),  # drafts: in a page,
     ("a", 1, 1), ("b", 90, 90, dict(mask=wide_tree(90), path=[0, 1, 4, 13, 40]))],  # and longer
    [("e", 60, 60, dict(mask=wide_tree(60), path=list(range(0, 60, 3)))), ("d", 2, 2)],
    [("e", 300, 300, dict(mask=wide_tree(300), path=list(range(1, 300, 2))))],  # over two chunks
    [("c", 2, 3, dict(mask=tree(-1, 0, 0)[1:], path=[])), ("e", 1, 1)],
    [("a", 2, 2, dict(sparse=[[0, 3]], room=20,                          # lists by layer
                      lists={0: [[1, 5, 12]], 2: [[0], [], [11, 23]], 3: [[]]})),
     ("b", 1, 1, dict(room=8, lists={1: [[0, 2, 4]]})), ("c", 1, 1)],
    "free d",
    [("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("e", 1, 1)],
]


class Step:
    """One batch with its tensors, and what the oracle says of it."""

    def __init__(self, rng, batch, sequences, dtypes):
        self.names = [row[0] for row in batch]
        self.entries, self.kept, self.lists = [], [], []  # kept: new tokens, by index
        for name, n_q, n_new, *options in batch:
            options = options[0] if options else {}
            base = options.get("base", len(sequences[name]))
            self.entries.append(Entry(name, base, n_q, n_new, options.get("sparse", ()),
                                      options.get("mask"), options.get("room", 0)))
            path = options.get("path")
            self.kept.append(list(range(options.get("accept", n_new))) if path is None else path)
            self.lists.append(options.get("lists", {}))
        self.accepted = [len(kept) for kept in self.kept]
        self.paths = [kept for kept, e in zip(self.kept, self.entries) if e.mask is not None]
        kv, self.q_dtype, self.o_dtype = dtypes
        self.tensors = [self.draw(rng, kv) for _ in LAYERS]
        self.expected = [self.attend(layer, sequences, kv) for layer in range(len(LAYERS))]
        self.append(sequences, kv)

    def draw(self, rng, kv):
        n_q = sum(e.n_q for e in self.entries)
        n_new = sum(e.n_new for e in self.entries)
        return (oracle.encode(rng.standard_normal((n_q, Q_HEADS, D_K)), self.q_dtype),
                oracle.encode(rng.standard_normal((n_new, KV_HEADS, D_K)), kv),
                oracle.encode(rng.standard_normal((n_new, KV_HEADS, D_V)), kv))

    def numbers(self, layer, kv):
        q, k, v = self.tensors[layer]
        return (oracle.decode(q, self.q_dtype, (-1, Q_HEADS, D_K)),
                oracle.decode(k, kv, (-1, KV_HEADS, D_K)),
                oracle.decode(v, kv, (-1, KV_HEADS, D_V)))

    def attend(self, layer, sequences, kv):
        q, k, v = self.numbers(layer, kv)
        row, q_at, new_at, parts, v_max = oracle.Layer(**LAYERS[layer]), 0, 0, [], 0.0
        for entry, given in zip(self.entries, self.lists):
            old, new = sequences[entry.seq], slice(new_at, new_at + entry.n_new)
            keys = np.concatenate([old.k[layer][:entry.base], k[new]])
            values = np.concatenate([old.v[layer][:entry.base], v[new]])
            what = (q[q_at:q_at + entry.n_q], keys, values, row, entry.base)
            pages = (given.get(layer, entry.sparse), PAGE, CHUNK)
            parts.append(oracle.attend(*what, *pages) if entry.mask is None
                         else oracle.attend_paths(*what, entry.mask, *pages))
            v_max = max(v_max, np.abs(values).max(initial=0))
            q_at, new_at = q_at + entry.n_q, new_at + entry.n_new
        return tuple(np.concatenate(x) for x in zip(*parts)) + (v_max,)

    def append(self, sequences, kv):
        numbers = [self.numbers(layer, kv) for layer in range(len(LAYERS))]
        at = 0
        for entry, kept in zip(self.entries, self.kept):
            if entry.n_new:
                rows = at + np.array(kept, int)
                sequences[entry.seq].append([k[rows] for _, k, _ in numbers],
                                            [v[rows] for _, _, v in numbers])
            at += entry.n_new

    def error(self, layer, answer, kv):
        """The error of an answer's bytes, in units of what is allowed."""
        o_dtype = self.o_dtype or self.q_dtype
        want_o, want_lse, kappa, v_max = self.expected[layer]
        o = oracle.decode(answer[0], o_dtype, (-1, Q_HEADS, D_V))
        lse = oracle.decode(answer[1], oracle.F32, (-1, Q_HEADS)) if answer[1] else None
        loosest = max((kv, self.q_dtype, o_dtype), key=lambda dtype: oracle.TOLERANCE[dtype])
        return oracle.error_of(o, lse, want_o, want_lse, kappa, v_max, loosest)


class Story:
    """The batches with their tensors, drawn once for a triple of dtypes (kv, q, o)."""

    def __init__(self, dtypes, seed=7):
        rng = np.random.default_rng(seed)
        new = lambda: oracle.Sequence(len(LAYERS), KV_HEADS, D_K, D_V)
        sequences = {name: new() for name in "abcd"}
        self.dtypes, self.acts = dtypes, []
        for act in BATCHES:
            if isinstance(act, str):
                verb, name, *rest = act.split()
                if verb == "fork":
                    sequences[rest[1]] = sequences[name].cut(int(rest[0]))
                elif verb == "truncate":
                    sequences[name] = sequences[name].cut(int(rest[0]))
                self.acts.append(act.split())
            else:
                self.acts.append(Step(rng, act, sequences, dtypes))
        self.lengths = {name: len(s) for name, s in sequences.items()}

    def play(self, thin, begin, cache):
        """Tell it through a client; returns every answer as bytes, by (act, layer)."""
        seqs = {name: thin.create(cache) for name in "abcd"}
        answers = {}
        for number, act in enumerate(self.acts):
            if isinstance(act, list):
                self.do(thin, cache, seqs, *act)
                continue
            entries = [Entry(seqs[e.seq], e.base, e.n_q, e.n_new, e.sparse, e.mask, e.list_room)
                       for e in act.entries]
            step = begin(cache, entries, q_dtype=act.q_dtype, o_dtype=act.o_dtype,
                         want_lse=number % 3 != 2)
            # Layers come in any order.
            for layer in (range(len(LAYERS)) if number % 2 else reversed(range(len(LAYERS)))):
                lists = {i: given[layer] for i, given in enumerate(act.lists) if layer in given}
                answers[number, layer] = step.run(layer, *act.tensors[layer], lists=lists)
            whole = act.accepted == [e.n_new for e in act.entries] and not act.paths
            step.commit(() if whole else act.accepted, act.paths)
        self.seqs = seqs
        return answers

    @staticmethod
    def do(thin, cache, seqs, verb, name, *rest):
        if verb == "fork":
            seqs[rest[1]] = thin.fork(cache, seqs[name], int(rest[0]))
        elif verb == "truncate":
            thin.truncate(cache, seqs[name], int(rest[0]))
        else:
            thin.free(cache, seqs.pop(name))
