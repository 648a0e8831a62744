"""What every test here stands on: a cluster with tight limits, a sequence whose answer is known, and
what has to hold after whatever was done to it."""

import sys
import time
import unittest

import numpy as np

import client
import oracle
from bent import Bent
from client import Entry, pb
from daemons import SANITIZED, Daemons, wait_until

INVALID, UNSUPPORTED, TOO_LARGE, EXHAUSTED, DEADLINE = -1, -2, -3, -4, -5
STALE, ABORTED, CONFLICT, INCOMPLETE, BUSY, NUMERIC = -20, -21, -22, -23, -24, -25
NOT_FOUND, EXISTS = -40, -41

LATE = 0.25 if not SANITIZED else 1.0   # seconds that an answer may take beyond its deadline
MEMORY = 48                             # MiB that a daemon may keep of what happened to it
DESCRIPTORS = 8                         # likewise
STALL = 0.4 if not SANITIZED else 1.6     # seconds: --stall-ms
RECEIVE = 3 * STALL                     # in which a message has to come whole
MESSAGE_MEMORY = 96                     # MiB: --message-memory
LIMITS = ["--stall-ms", str(int(STALL * 1000)), "--message-memory", f"{MESSAGE_MEMORY}MiB",
          "--run-memory", "256MiB"]
GEOMETRY = dict(layers=2, q_heads=4, kv_heads=2, head_dim_k=32, head_dim_v=40, kv_dtype=1,
                page_size=16, chunk_size=256, placement=1, region_bytes=8 << 20)
MAX64, MAX32 = 2 ** 64 - 1, 2 ** 32 - 1


class Hostile(unittest.TestCase):
    """Two workers, and a sequence over both that good() asks about."""

    N = 300
    WORKERS = 2
    COORDINATOR = ["--lost-ms", "8000", "--lease-ms", "600s", *LIMITS]

    @classmethod
    def setUpClass(cls):
        cls.daemons = Daemons(cls.WORKERS, cls.COORDINATOR, LIMITS)
        cls.address = cls.daemons.address
        cls.rng = np.random.default_rng(11)
        cls.thin = client.Client(cls.address)
        cls.cache = cls.thin.open_cache("hostile", **GEOMETRY)
        cls.steps = cls.thin.unary()
        cls.seq, cls.q, cls.want = cls.sequence(cls.N)
        for _ in range(20):
            cls.ask(cls.seq, cls.N, cls.q)
        cls.before = {d: (d.rss(), d.descriptors()) for d in cls.daemons.all}

    @classmethod
    def tearDownClass(cls):
        cls.thin.close()
        cls.daemons.stop()

    @classmethod
    def sequence(cls, n):
        """A sequence of n tokens, a query, and what the query is to be answered on layer 1."""
        seq = cls.thin.create(cls.cache)
        q, k, v = (cls.rng.standard_normal((n, h, d)).astype("f4")
                   for h, d in ((4, 32), (2, 32), (2, 40)))
        step = cls.thin.begin(cls.steps, cls.cache, [Entry(seq, 0, 0, n)], q_dtype=1)
        for layer in range(2):
            step.run(layer, b"", k.tobytes(), v.tobytes())
        step.commit()
        want = oracle.attend(q[:1].astype("f8"), k.astype("f8"), v.astype("f8"), oracle.Layer(), n)
        return seq, q[:1], want + (np.abs(v).max(),)

    @classmethod
    def ask(cls, seq, n, q, steps=None, timeout_ms=0):
        step = cls.thin.begin(steps or cls.steps, cls.cache, [Entry(seq, n, 1, 0)], q_dtype=1,
                              timeout_ms=timeout_ms)
        o, _ = step.run(1, q.tobytes(), no_kv=True)
        step.abort()
        return o

    def good(self, seq=None, timeout_ms=0):
        """An honest client's step is answered rightly; returns the seconds that it took."""
        start = time.monotonic()
        o = self.ask(seq or self.seq, self.N, self.q, timeout_ms=timeout_ms)
        took = time.monotonic() - start
        want_o, want_lse, kappa, v_max = self.want
        self.assertLessEqual(oracle.error_of(oracle.decode(o, 1, (1, 4, 40)), None, want_o, want_lse,
                                             kappa, v_max, oracle.F32), 1)
        return took

    def honest(self, n):
        """Seconds of the slowest of n honest steps."""
        return max(self.good() for _ in range(n))

    def setUp(self):
        self.start = time.monotonic()

    def tearDown(self):
        """Alive, right, the store's checker content, memory and descriptors as before."""
        self.doCleanups()
        self.good()
        for daemon in self.daemons.all:
            self.assertTrue(daemon.alive(), daemon.tail())
            rss, descriptors = self.before[daemon]
            wait_until(f"{daemon.role}: {daemon.descriptors()} descriptors, {descriptors} at first",
                       lambda: daemon.descriptors() <= descriptors + DESCRIPTORS, 8)
            if not SANITIZED:
                wait_until(f"{daemon.role}: {daemon.rss():.0f} MiB, {rss:.0f} at first",
                           lambda: daemon.rss() <= rss + MEMORY, 12)
            self.assertIsNone(daemon.find("level=error"), daemon.tail())
        if "-v" in sys.argv:
            print(f"  {time.monotonic() - self.start:.1f} s", flush=True)

    def refused(self, statuses, words, call, within=1.0):
        """The call fails in time, with one of these statuses, and a sentence with these words
        (alternatives after |)."""
        statuses = statuses if isinstance(statuses, tuple) else (statuses,)
        start = time.monotonic()
        with self.assertRaises(client.AttnError, msg=words) as caught:
            call()
        error = caught.exception
        self.assertLess(time.monotonic() - start, within + LATE, str(error))
        self.assertIn(error.status, statuses, str(error))
        for word in words.split():
            self.assertTrue(any(w in error.sentence for w in word.split("|")),
                            f"no {word!r} in: {error.sentence!r}")
        return error

    def bent(self, address=None, **options):
        connection = Bent(address or self.address, **options)
        self.addCleanup(connection.close)
        return connection

    def tensors(self, n_q, n_new):
        return [self.rng.standard_normal(shape).astype("f4").tobytes()
                for shape in ((n_q, 4, 32), (n_new, 2, 32), (n_new, 2, 40))]

    def worker_address(self):
        return self.daemons.workers[0].address


def begin_request(cache, seq, base, n_q, n_new, **options):
    request = pb.BeginStepRequest(cache_id=cache.id, q_dtype=1, **options)
    request.entries.add(seq=seq, base_position=base, n_q=n_q, n_new=n_new)
    return request
