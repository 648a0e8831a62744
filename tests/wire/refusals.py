"""What a foreign client may send wrong, and what it must be told: the right gRPC code, the status
in the trailing metadata, a sentence that names the field; and then the next step is right as ever.

Run by test_wire.py. direct_refusals.py has the same of the services for direct clients, and
raw_messages.py what is wrong below the level of fields.
"""

import math
import time
import unittest

import grpc
import numpy as np

import client
import oracle
from client import Entry, pb, unary
from cluster import Cluster

ATTND = None  # set by test_wire.py

INVALID, UNSUPPORTED, TOO_LARGE, EXHAUSTED, DEADLINE = -1, -2, -3, -4, -5
STALE, ABORTED, CONFLICT, INCOMPLETE, BUSY, NUMERIC = -20, -21, -22, -23, -24, -25
NOT_FOUND, EXISTS, LOST, DENIED = -40, -41, -42, -61

# The gRPC code that goes with a status, on unary calls.
CODES = {INVALID: grpc.StatusCode.INVALID_ARGUMENT, UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
         TOO_LARGE: grpc.StatusCode.OUT_OF_RANGE, EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
         DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED, STALE: grpc.StatusCode.ABORTED,
         ABORTED: grpc.StatusCode.ABORTED,
         CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
         INCOMPLETE: grpc.StatusCode.FAILED_PRECONDITION,
         BUSY: grpc.StatusCode.FAILED_PRECONDITION, NUMERIC: grpc.StatusCode.INVALID_ARGUMENT,
         NOT_FOUND: grpc.StatusCode.NOT_FOUND, EXISTS: grpc.StatusCode.ALREADY_EXISTS,
         DENIED: grpc.StatusCode.PERMISSION_DENIED}

SECONDS = 5  # in which a refusal must come
GEOMETRY = dict(layers=2, q_heads=4, kv_heads=2, head_dim_k=32, head_dim_v=40, kv_dtype=1,
                page_size=16, chunk_size=256, placement=1, region_bytes=2 << 20)
HUGE = 2 ** 32 - 1


class Clustered(unittest.TestCase):
    """A cluster of two, a cache, and a sequence over both workers that good() asks about."""

    N = 300  # tokens of the good sequence

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(ATTND, 2)
        cls.thin = client.Client(cls.cluster.address)
        cls.cache = cls.thin.open_cache("refusals", **GEOMETRY)
        cls.steps = cls.thin.unary()
        cls.rng = np.random.default_rng(11)
        cls.seq = cls.thin.create(cls.cache)
        q, k, v = (cls.rng.standard_normal((cls.N, h, d)).astype("f4")
                   for h, d in ((4, 32), (2, 32), (2, 40)))
        step = cls.thin.begin(cls.steps, cls.cache, [Entry(cls.seq, 0, 0, cls.N)], q_dtype=1)
        for layer in range(2):
            step.run(layer, b"", k.tobytes(), v.tobytes())
        step.commit()
        cls.q = q[:1]
        cls.want = oracle.attend(cls.q.astype("f8"), k.astype("f8"), v.astype("f8"), oracle.Layer(),
                                 cls.N) + (np.abs(v).max(),)

    @classmethod
    def tearDownClass(cls):
        cls.thin.close()
        cls.cluster.stop()

    def good(self):
        """A good step is answered rightly, and changes nothing."""
        step = self.thin.begin(self.steps, self.cache, [Entry(self.seq, self.N, 1, 0)], q_dtype=1)
        o, _ = step.run(1, self.q.tobytes(), no_kv=True)
        step.abort()
        want_o, want_lse, kappa, v_max = self.want
        error = oracle.error_of(oracle.decode(o, 1, (1, 4, 40)), None, want_o, want_lse, kappa,
                                v_max, oracle.F32)
        self.assertLessEqual(error, 1)

    def refused(self, statuses, words, call, code=True):
        """The call fails as it should. words: what the sentence must name, alternatives after |."""
        statuses = statuses if isinstance(statuses, tuple) else (statuses,)
        start = time.monotonic()
        with self.assertRaises(client.AttnError, msg=words) as caught:
            call()
        error = caught.exception
        self.assertLess(time.monotonic() - start, SECONDS)
        self.assertIn(error.status, statuses, str(error))
        for word in words.split():
            self.assertTrue(any(w in error.sentence for w in word.split("|")),
                            f"no {word!r} in: {error.sentence!r}")
        if code:
            self.assertEqual(error.code, CODES[error.status], str(error))
        self.good()

    def tensors(self, n_q, n_new):
        rows = self.rng.standard_normal
        return [rows(shape).astype("f4").tobytes()
                for shape in ((n_q, 4, 32), (n_new, 2, 32), (n_new, 2, 40))]


class Refusals(Clustered):
    """Fields that make no sense, by unary calls and on streams."""

    def test_geometry(self):
        table = [("layers", 0), ("layers", 1025), ("layers", HUGE), ("q_heads", 0), ("q_heads", 5),
                 ("q_heads", 2000), ("q_heads", HUGE), ("kv_heads", 0), ("kv_heads", HUGE),
                 ("head_dim_k", 0), ("head_dim_k", 33), ("head_dim_k", 264), ("head_dim_v", 24),
                 ("head_dim_v", HUGE), ("kv_dtype", 0), ("kv_dtype", 7), ("kv_dtype", -1),
                 ("page_size", 257), ("page_size", HUGE), ("chunk_size", 300), ("chunk_size", 128),
                 ("chunk_size", 1 << 21), ("placement", 9)]
        for field, value in table:
            with self.subTest(field=field, value=value):
                wrong = dict(GEOMETRY, **{field: value})
                self.refused((INVALID, UNSUPPORTED), field,
                             lambda: self.thin.open_cache("wrong", **wrong))

    def test_layer_table(self):
        row = lambda **fields: [pb.Layer(**fields), pb.Layer()]
        table = [("layer_table", [pb.Layer()]), ("layer_table", [pb.Layer()] * 3),
                 ("slopes", row(slopes=[1.0] * 3)), ("sinks", row(sinks=[1.0] * 5)),
                 ("sinks", row(sinks=[math.nan] * 4)), ("slopes", row(slopes=[math.inf] * 4)),
                 ("scale", row(scale=-1.0)), ("scale", row(scale=math.nan)),
                 ("softcap", row(softcap=-1.0)), ("softcap", row(softcap=math.inf))]
        for words, rows in table:
            with self.subTest(words=words, rows=len(rows)):
                self.refused(INVALID, words, lambda: self.thin.open_cache(
                    "wrong", **dict(GEOMETRY, layer_table=rows)))

    def test_cache(self):
        for name in ("", "a b", "x" * 129, "caf\u00e9", "a\nb"):
            with self.subTest(name=name):
                self.refused(INVALID, "name", lambda: self.thin.open_cache(name, **GEOMETRY))
        other = dict(GEOMETRY, head_dim_v=48)
        self.refused(EXISTS, "head_dim_v", lambda: self.thin.open_cache("refusals", **other))
        for size in (1, 1 << 50, 2 ** 64 - 1):
            with self.subTest(region_bytes=size):
                self.refused(EXHAUSTED, "bytes|region|room", lambda: self.thin.open_cache(
                    "big", **dict(GEOMETRY, region_bytes=size)))
        none = client.Cache(pb.OpenCacheReply(cache_id=999, geometry=self.cache.geometry))
        self.refused(NOT_FOUND, "cache", lambda: self.thin.close_cache(none))
        self.refused(NOT_FOUND, "cache", lambda: self.thin.create(none))
        self.refused(INVALID, "name", lambda: client.Client(self.cluster.address, "x" * 64))

    def test_clients(self):
        """Who names a client shows its ticket; and a ticket does not outlive its client."""
        other = client.Client(self.cluster.address)
        gone = client.Client(self.cluster.address)
        unary(gone.attention.CloseClient, pb.ClientRequest(client_id=gone.id))
        create = lambda thin: lambda: unary(thin.attention.CreateSequence, pb.CreateSequenceRequest(
            cache_id=self.cache.id, client_id=self.thin.id))
        self.refused(NOT_FOUND, "client", gone.keep_alive)
        self.refused(DENIED, f"{self.thin.id} {other.id}", create(other))
        for text, words in ((None, "no attn-ticket"), ("", "malformed"), ("x" * 3000, "malformed"),
                            (self.thin.ticket.text[:-1], "malformed"),
                            (self.thin.ticket.text[:-1] + "g", "not of the coordinator"),
                            (self.thin.ticket.text.replace(".c.", ".o."), "not of")):
            with self.subTest(ticket=text and text[:40]):
                other.ticket.text = text
                self.refused(DENIED, words, create(other))
                for method in ("KeepAlive", "CloseClient"):
                    self.refused(DENIED, words, lambda: unary(
                        getattr(other.attention, method), pb.ClientRequest(client_id=self.thin.id)))
        self.thin.keep_alive()
        for channel in (other.channel, gone.channel):
            channel.close()

    def test_sequences(self):
        thin, cache = self.thin, self.cache
        freed = thin.create(cache)
        thin.free(cache, freed)
        elsewhere = thin.open_cache("elsewhere", **dict(GEOMETRY, layers=1, region_bytes=1 << 20))
        foreign = thin.create(elsewhere)
        for seq in (freed, 0, 2 ** 64 - 1, foreign):
            with self.subTest(seq=seq):
                begin = lambda: thin.begin(self.steps, cache, [Entry(seq, 0, 1, 1)], q_dtype=1)
                for call in (lambda: thin.free(cache, seq), lambda: thin.describe(cache, seq),
                             lambda: thin.fork(cache, seq, 0), lambda: thin.truncate(cache, seq, 0),
                             begin):
                    self.refused(NOT_FOUND, "sequence", call)
        self.refused(INVALID, "length|tokens", lambda: thin.fork(cache, self.seq, self.N + 1))
        self.refused(INVALID, "length|tokens", lambda: thin.fork(cache, self.seq, 2 ** 63))
        self.refused(INVALID, "length|tokens", lambda: thin.truncate(cache, self.seq, self.N + 1))
        thin.close_cache(elsewhere)

    def test_begin(self):
        seq, n = self.seq, self.N
        one = [Entry(seq, n, 1, 1)]

        def begin(entries, steps=self.steps, cache=self.cache, **options):
            self.thin.begin(steps, cache, entries, **{"q_dtype": 1, **options})

        none = client.Cache(pb.OpenCacheReply(cache_id=999, geometry=self.cache.geometry))
        page_max = 2 * 16 - 1  # of two chunks
        sparse = lambda *lists: [Entry(seq, n, 1, 0, lists)]
        table = [
            ("no such cache", NOT_FOUND, "cache", lambda s: begin(one, s, none)),
            ("no entries", INVALID, "entries|entry", lambda s: begin([], s)),
            ("4,097 entries", (INVALID, TOO_LARGE), "entries",
             lambda s: begin([Entry(i, 0, 1, 1) for i in range(4097)], s)),
            ("a sequence twice", INVALID, "twice|sequence", lambda s: begin(one * 2, s)),
            ("no q_dtype", INVALID, "q_dtype", lambda s: begin(one, s, q_dtype=0)),
            ("unknown q_dtype", INVALID, "q_dtype", lambda s: begin(one, s, q_dtype=9)),
            ("unknown o_dtype", INVALID, "o_dtype", lambda s: begin(one, s, o_dtype=9)),
            ("huge n_q", (INVALID, TOO_LARGE), "n_q|query",
             lambda s: begin([Entry(seq, n, HUGE, 1)], s)),
            ("n_q above the length", INVALID, "n_q", lambda s: begin([Entry(seq, n, n + 2, 1)], s)),
            ("huge n_new", (INVALID, TOO_LARGE), "n_new|new",
             lambda s: begin([Entry(seq, n, 1, HUGE)], s)),
            ("more than the pool", EXHAUSTED, "pages|room|pool",
             lambda s: begin([Entry(seq, n, 1, 500_000)], s)),
            ("base above the length", (INVALID, STALE), "base", lambda s: begin(
                [Entry(seq, n + 1, 1, 1)], s)),
            ("base below the length", (INVALID, STALE), "base", lambda s: begin(
                [Entry(seq, n - 1, 1, 1)], s)),
            ("query above the length", (INVALID, STALE), "base", lambda s: begin(
                [Entry(seq, n + 1, 1, 0)], s)),
            ("huge base", (INVALID, STALE, TOO_LARGE), "base", lambda s: begin(
                [Entry(seq, 2 ** 64 - 1, 1, 1)], s)),
            ("timeout", INVALID, "timeout_ms", lambda s: begin(one, s, timeout_ms=600_001)),
            ("three lists for two heads", INVALID, "sparse|lists", lambda s: begin(
                sparse([0], [0], [0]), s)),
            ("pages descend", INVALID, "sparse|page", lambda s: begin(sparse([3, 2]), s)),
            ("a page twice", INVALID, "sparse|page", lambda s: begin(sparse([3, 3]), s)),
            ("page beyond the end", INVALID, "sparse|page", lambda s: begin(
                sparse([page_max + 1]), s)),
        ]
        stream = self.thin.stream()
        for name, status, words, call in table:
            with self.subTest(name):
                self.refused(status, words, lambda: call(self.steps))
                self.refused(status, words, lambda: call(stream), code=False)
        stream.close()

    def test_busy(self):
        begin = lambda: self.thin.begin(self.steps, self.cache, [Entry(other, 0, 1, 1)], q_dtype=1)
        other = self.thin.create(self.cache)
        step = begin()
        for call in (begin, lambda: self.thin.free(self.cache, other),
                     lambda: self.thin.truncate(self.cache, other, 0)):
            self.refused(BUSY, "step|sequence", call)
        step.abort()
        begin().abort()
        self.thin.free(self.cache, other)

    def test_run_and_commit(self):
        for transport in (self.thin.unary(), self.thin.stream()):
            code = isinstance(transport, client.Unary)
            seq = self.thin.create(self.cache)
            step = self.thin.begin(transport, self.cache, [Entry(seq, 0, 2, 2)], q_dtype=1)
            self.bad_runs(step, code)
            q, k, v = self.tensors(2, 2)
            refuse = lambda *a: self.refused(*a, code=code)
            refuse(INCOMPLETE, "layer", lambda: step.run(0, q, no_kv=True))
            answer = step.run(0, q, k, v)
            refuse(INCOMPLETE, "layer 1", step.commit)
            refuse(CONFLICT, "layer", lambda: step.run(0, q, v[:len(k)], v))
            self.assertEqual(step.run(0, q, k, v), answer)
            step.run(1, q, k, v)
            refuse(INVALID, "accepted", lambda: step.commit([3]))
            refuse(INVALID, "accepted", lambda: step.commit([HUGE]))
            refuse(INVALID, "accepted", lambda: step.commit([1, 1]))
            step.commit([1])
            self.assertEqual(self.thin.describe(self.cache, seq).length, 1)
            refuse((NOT_FOUND, ABORTED), "step", lambda: step.run(0, q, k, v))
            step.id = 2 ** 64 - 1
            refuse(NOT_FOUND, "step", lambda: step.run(0, q, k, v))
            refuse(NOT_FOUND, "step", step.commit)
            self.thin.free(self.cache, seq)
            transport.close()

    def bad_runs(self, step, code):
        """Wrong tensors of an open step with two queries and two new tokens."""
        q, k, v = self.tensors(2, 2)
        nan = np.float32("nan").tobytes()
        table = [
            ("layer 2", INVALID, "layer", lambda: step.run(2, q, k, v)),
            ("layer huge", INVALID, "layer", lambda: step.run(HUGE, q, k, v)),
            ("no data", INVALID, "data|bytes", lambda: step.run(0)),
            ("a byte short", INVALID, "data|bytes", lambda: step.run(0, q, k, v[:-1])),
            ("a byte long", INVALID, "data|bytes", lambda: step.run(0, q, k, v + b"\0")),
            ("q for three", INVALID, "data|bytes", lambda: step.run(0, q + q[:len(q) // 2], k, v)),
            ("k without v", INVALID, "data|bytes", lambda: step.run(0, q, k)),
            ("kv where no_kv", INVALID, "data|bytes", lambda: step.run(0, q, k, v, no_kv=True)),
            ("q where no_q", INVALID, "data|bytes", lambda: step.run(0, q, k, v, no_q=True)),
            ("neither", INVALID, "no_kv|no_q|data", lambda: step.run(0, no_kv=True, no_q=True)),
            ("NaN in k", NUMERIC, "k|NaN", lambda: step.run(0, q, nan + k[4:], v)),
            ("NaN in v", NUMERIC, "v|NaN", lambda: step.run(0, q, k, nan + v[4:])),
        ]
        for name, status, words, call in table:
            with self.subTest(name, unary=code):
                self.refused(status, words, call, code=code)

    def test_masks(self):
        """Masks of a wrong size or with wrong bits, as bytes."""
        def begin(s, n_q, n_new, mask):
            entry = Entry(self.seq, self.N, n_q, n_new)
            entry.mask_bytes = lambda: mask
            self.thin.begin(s, self.cache, [entry], q_dtype=1)

        stream = self.thin.stream()
        for name, status, words, *args in (
                ("a byte short", INVALID, "mask", 3, 9, bytes([1] * 5)),
                ("a byte long", INVALID, "mask", 3, 9, bytes([1] * 7)),
                ("without queries", INVALID, "mask", 0, 3, b"\1"),
                ("more queries than tokens", INVALID, "n_q", 3, 2, b"\1\1\1"),
                ("a bit beyond", INVALID, "bit", 3, 3, b"\1\3\x0f"),
                ("nothing named", INVALID, "row 1", 3, 3, b"\1\0\7"),
                ("too many tokens", TOO_LARGE, "n_new", 1, 1025, bytes([1] * 129)),
                ("huge", (INVALID, TOO_LARGE), "mask|n_q|n_new", HUGE, HUGE, b"\1")):
            with self.subTest(name):
                self.refused(status, words, lambda: begin(self.steps, *args))
                self.refused(status, words, lambda: begin(stream, *args), code=False)
        stream.close()

    def test_paths(self):
        mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
        for transport in (self.thin.unary(), self.thin.stream()):
            code = isinstance(transport, client.Unary)
            seq = self.thin.create(self.cache)
            step = self.thin.begin(transport, self.cache, [Entry(seq, 0, 3, 3, mask=mask)],
                                   q_dtype=1)
            q, k, v = self.tensors(3, 3)
            refuse = lambda *a: self.refused(*a, code=code)
            for layer in (0, 1):
                step.run(layer, q, k, v)
            refuse(INVALID, "mask|accepted", step.commit)
            refuse(INVALID, "mask|path", lambda: step.commit([2]))
            refuse(INVALID, "path", lambda: step.commit([2], [[0]]))
            refuse(INVALID, "path", lambda: step.commit([2], [[0, 1, 2]]))
            refuse(INVALID, "path", lambda: step.commit([2], [[1, 0]]))
            refuse(INVALID, "path", lambda: step.commit([2], [[1, 1]]))
            refuse(INVALID, "path", lambda: step.commit([2], [[0, 3]]))
            refuse(INVALID, "path", lambda: step.commit([2], [[0, HUGE]]))
            refuse(INVALID, "accepted", lambda: step.commit([4], [[0, 1, 2, 3]]))
            step.commit([2], [[0, 2]])
            step.commit([2], [[0, 2]])  # idempotent
            self.assertEqual(self.thin.describe(self.cache, seq).length, 2)
            step = self.thin.begin(transport, self.cache, [Entry(seq, 2, 1, 1)], q_dtype=1)
            for layer in (0, 1):
                step.run(layer, *self.tensors(1, 1))
            refuse(INVALID, "path", lambda: step.commit([1], [[0]]))  # it has no mask
            step.abort()
            self.thin.free(self.cache, seq)
            transport.close()

    def test_lists_of_a_run(self):
        page_max = 2 * 16 - 1
        for transport in (self.thin.unary(), self.thin.stream()):
            code = isinstance(transport, client.Unary)
            seq = self.thin.fork(self.cache, self.seq, self.N)
            entries = [Entry(seq, self.N, 1, 0, list_room=3)]
            step = self.thin.begin(transport, self.cache, entries, q_dtype=1)
            q = self.tensors(1, 0)[0]
            for name, status, words, lists in (
                    ("over the room", TOO_LARGE, "list_room", {0: [[0, 1, 2, 3]]}),
                    ("pages descend", INVALID, "page", {0: [[1, 0]]}),
                    ("a page twice", INVALID, "page", {0: [[1, 1]]}),
                    ("a page beyond", INVALID, "page", {0: [[0, page_max + 1]]}),
                    ("three lists", INVALID, "lists", {0: [[0], [1], [2]]}),
                    ("no lists", INVALID, "lists", {0: []}),
                    ("no such entry", INVALID, "lists", {1: [[0]]}),
                    ("entry huge", INVALID, "lists", {HUGE: [[0]]})):
                with self.subTest(name, unary=code):
                    self.refused(status, words, lambda: step.run(0, q, no_kv=True, lists=lists),
                                 code=code)
            self.assertNotEqual(step.run(0, q, no_kv=True, lists={0: [[0, 2]]}),
                                step.run(0, q, no_kv=True))
            step.abort()
            entries[0].list_room = 0
            step = self.thin.begin(transport, self.cache, entries, q_dtype=1)
            self.refused(INVALID, "list_room", lambda: step.run(0, q, no_kv=True,
                                                                lists={0: [[0]]}), code=code)
            step.abort()
            entries[0].list_room = HUGE
            self.refused(TOO_LARGE, "list_room", lambda: self.thin.begin(
                transport, self.cache, entries, q_dtype=1), code=code)
            self.thin.free(self.cache, seq)
            transport.close()

    def test_nan_in_q(self):
        step = self.thin.begin(self.steps, self.cache, [Entry(self.seq, self.N, 1, 0)], q_dtype=1)
        q = np.full((1, 4, 32), np.nan, "f4").tobytes()
        with self.assertRaises(client.AttnError) as caught:
            step.run(0, q, no_kv=True)
        self.assertEqual(caught.exception.status, NUMERIC)
        step.abort()
        self.good()

    def test_deadline_of_a_step(self):
        seq = self.thin.create(self.cache)
        step = self.thin.begin(self.steps, self.cache, [Entry(seq, 0, 1, 1)], q_dtype=1,
                               timeout_ms=100)
        time.sleep(0.6)
        self.refused((ABORTED, NOT_FOUND, DEADLINE), "step|deadline",
                     lambda: step.run(0, *self.tensors(1, 1)))
        self.assertEqual(self.thin.describe(self.cache, seq).length, 0)
        self.thin.begin(self.steps, self.cache, [Entry(seq, 0, 1, 1)], q_dtype=1).abort()
        self.thin.free(self.cache, seq)

    def test_parts(self):
        """Parts that do not fit together end the run, not the stream."""
        seq, stream = self.thin.create(self.cache), self.thin.stream()
        step = self.thin.begin(stream, self.cache, [Entry(seq, 0, 2, 2)], q_dtype=1)
        data = b"".join(self.tensors(2, 2))
        half, n = len(data) // 2, len(data)

        def send(*parts):
            for offset, total, piece in parts:
                stream.requests.put(pb.StepRequest(run=pb.RunRequest(
                    step_id=step.id, layer=0, offset=offset, total=total), data=piece))
            return lambda: stream.reply()

        for name, parts in [("a gap", [(0, n, data[:half]), (half + 4, n, data[half:])]),
                            ("from the middle", [(half, n, data[half:])]),
                            ("beyond the total", [(0, half, data)]),
                            ("total changes", [(0, n, data[:half]), (half, n + 1, data[half:])]),
                            ("huge total", [(0, 2 ** 63, data)])]:
            with self.subTest(name):
                self.refused((INVALID, TOO_LARGE), "offset|total|data|bytes", send(*parts),
                             code=False)
        stream.requests.put(pb.StepRequest(run=pb.RunRequest(
            step_id=step.id, layer=0, offset=0, total=n), data=data))
        self.assertEqual(stream.reply().run.layer, 0)
        stream.requests.put(pb.StepRequest())
        self.refused(INVALID, "op|operation", lambda: stream.reply(), code=False)
        stream.requests.put(pb.StepRequest(worker_begin=pb.WorkerBeginRequest(step_id=1)))
        self.refused((INVALID, UNSUPPORTED), "worker", lambda: stream.reply(), code=False)
        stream.requests.put(pb.StepRequest(run=pb.RunRequest(step_id=step.id, data=data)))
        self.refused(INVALID, "data", lambda: stream.reply(), code=False)
        step.abort()
        stream.close()
        self.thin.free(self.cache, seq)
