"""Reading chunks back from their workers, and a worker that is killed: what it had is named, refused,
and given to the service again, by a thin client and by a direct one."""

import time
import unittest

import numpy as np

import client
import direct
import oracle
from client import Entry, pb, stubs, unary
from cluster import Cluster
from oracle import F32
from refusals import INVALID, LOST, NOT_FOUND, STALE, TOO_LARGE

ATTND = None  # set by test_wire.py

N, CHUNK, HEADS, D = 900, 256, 2, 64
ROW = HEADS * D * 4
GEOMETRY = dict(layers=1, q_heads=4, kv_heads=HEADS, head_dim_k=D, head_dim_v=D, kv_dtype=F32,
                chunk_size=CHUNK, page_size=16, placement=1, region_bytes=8 << 20)


class Refill(unittest.TestCase):
    def setUp(self):
        rng = np.random.default_rng(11)
        self.k, self.v = (oracle.encode(rng.standard_normal((N, HEADS, D)), F32) for _ in range(2))
        self.q = oracle.encode(rng.standard_normal((3, 4, D)), F32)
        self.cluster = Cluster(ATTND, 3)
        self.thin = client.Client(self.cluster.address)
        self.road = direct.Direct(self.thin, streams=True)
        self.cache = self.thin.open_cache("refill", **GEOMETRY)
        self.seq = self.thin.create(self.cache, expected_tokens=N)
        self.steps = self.thin.stream()
        self.append(self.by_thin, 0, N)

    def tearDown(self):
        self.steps.close()
        self.road.close()
        self.thin.close_cache(self.cache)
        self.thin.close()
        self.cluster.stop()

    def by_thin(self, entry):
        return self.thin.begin(self.steps, self.cache, [entry], q_dtype=F32)

    def by_direct(self, entry):
        return self.road.begin(self.cache, [entry], q_dtype=F32)

    def rows(self, first, end):
        return self.k[first * ROW:end * ROW], self.v[first * ROW:end * ROW]

    def append(self, begin, first, end):
        """Tokens [first, end) of ours, to the end of the sequence or into a hole."""
        step = begin(Entry(self.seq, first, 0, end - first))
        step.run(0, b"", *self.rows(first, end))
        step.commit()

    def ask(self, begin, length=N):
        step = begin(Entry(self.seq, length, 3, 0))
        answer = step.run(0, self.q, no_kv=True)
        step.commit()
        return answer

    def refused(self, status, call, *args, **fields):
        with self.assertRaises(client.AttnError) as caught:
            call(*args, **fields)
        self.assertEqual(caught.exception.status, status, caught.exception)
        return str(caught.exception)

    def chunks(self):
        """(ChunkInfo, a call for a part of it at its owner) of the sequence's chunks."""
        layout = unary(self.road.coordinator.Layout, pb.LayoutRequest(
            cache_id=self.cache.id, seqs=[self.seq]))
        address = {worker.id: worker.address for worker in layout.workers}
        for chunk in layout.layouts[0].chunks:
            self.road.worker(address[chunk.worker])
            stub = stubs.WorkerStub(self.road.channels[address[chunk.worker]])
            what = dict(cache_id=self.cache.id, chunk=chunk.chunk, generation=chunk.generation)
            yield chunk, lambda stub=stub, what=what, **fields: unary(
                stub.ExportChunk, pb.ExportChunkRequest(**{**what, **fields}))

    def check_chunks(self):
        for chunk, export in self.chunks():
            for first, n in ((0, chunk.length), (7, chunk.length - 9), (chunk.length, 0)):
                if chunk.length > 9:
                    at = chunk.first + first
                    self.assertEqual(export(first=first, n=n).data,
                                     b"".join(self.rows(at, at + n)), (chunk, first, n))

    def test_chunks_are_read_at_their_workers(self):
        self.check_chunks()
        chunk, export = next(self.chunks())
        self.refused(STALE, export, generation=chunk.generation + 1, n=1)
        self.refused(INVALID, export, first=CHUNK - 1, n=2)
        self.refused(INVALID, export, first=2 ** 32 - 1, n=2)
        self.refused(INVALID, export, layer=1, n=1)
        self.refused(NOT_FOUND, export, chunk=chunk.chunk + 10 ** 6, n=1)
        self.refused(NOT_FOUND, export, cache_id=self.cache.id + 1, n=1)
        self.refused(TOO_LARGE, export, n=2 ** 32 - 1)  # more than a message has
        self.thin.truncate(self.cache, self.seq, CHUNK - 6)
        self.refused(STALE, export, n=1)
        chunk, export = next(self.chunks())
        self.refused(INVALID, export, n=CHUNK - 5)
        self.assertEqual(export(n=CHUNK - 6).data, b"".join(self.rows(0, CHUNK - 6)))

    def wait_until_lost(self, worker):
        end = time.monotonic() + 20
        while next(w for w in self.thin.status().workers if w.id == worker).alive:
            self.assertLess(time.monotonic(), end, "the worker does not count as lost")
            time.sleep(0.05)

    def test_what_a_killed_worker_had_is_given_again(self):
        answer = self.ask(self.by_thin)
        self.assertEqual(self.ask(self.by_direct), answer)
        chunk = self.thin.describe(self.cache, self.seq).chunks[1]
        address = next(w.address for w in self.thin.status().workers if w.id == chunk.worker)
        self.cluster.kill_worker(address)
        self.wait_until_lost(chunk.worker)
        holes = self.thin.describe(self.cache, self.seq).holes
        self.assertEqual((holes[0].first, holes[0].end, holes[0].worker),
                         (CHUNK, 2 * CHUNK, chunk.worker))
        said = self.refused(LOST, self.ask, self.by_thin)
        self.assertIn(f"tokens {CHUNK}-{2 * CHUNK - 1} (worker {chunk.worker})", said)
        self.refused(LOST, self.thin.export, self.cache, self.seq, 0, 0, N)
        below = self.ask(self.by_thin, CHUNK)
        self.assertEqual(self.ask(self.by_direct, CHUNK), below)

        # In pieces, by the one and the other.
        self.append(self.by_direct, CHUNK, CHUNK + 100)
        hole = self.thin.describe(self.cache, self.seq).holes[0]
        self.assertEqual((hole.first, hole.worker), (CHUNK + 100, 0))
        self.append(self.by_thin, CHUNK + 100, 2 * CHUNK)
        for hole in self.thin.describe(self.cache, self.seq).holes:
            self.append(self.by_direct, hole.first, min(hole.end, N))
        described = self.thin.describe(self.cache, self.seq)
        self.assertEqual((described.length, len(described.holes)), (N, 0))
        self.assertEqual(self.ask(self.by_thin), answer)
        self.assertEqual(self.ask(self.by_direct), answer)
        self.assertEqual(self.thin.export(self.cache, self.seq, 0, 0, N), (self.k, self.v))
        self.check_chunks()
