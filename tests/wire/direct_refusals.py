"""What a direct client may send wrong: to Coordinator and to Worker. See refusals.py."""

import client
import direct
from client import Entry, pb, unary
from refusals import (ABORTED, BUSY, CONFLICT, EXHAUSTED, HUGE, INCOMPLETE, INVALID, NOT_FOUND,
                      STALE, TOO_LARGE, Clustered)


class DirectRefusals(Clustered):
    def setUp(self):
        self.road = direct.Direct(self.thin)
        self.own = self.thin.create(self.cache)
        self.step = self.road.begin(self.cache, [Entry(self.own, 0, 1, 1)], q_dtype=1)
        self.share = next(s for s in self.step.shares.values() if s.kv_rows)
        self.step.abort()

    def tearDown(self):
        self.road.close()
        self.thin.free(self.cache, self.own)

    def begin(self, **fields):
        """A WorkerBegin that would do, but for these fields, or (entry_, chunk_) of its parts."""
        request = pb.WorkerBeginRequest()
        request.CopyFrom(self.share.request)
        request.step_id += 1
        for name, value in fields.items():
            where = request
            if name.startswith("entry_"):
                where, name = request.entries[0], name[6:]
            elif name.startswith("chunk_"):
                where, name = request.entries[0].chunks[0], name[6:]
            if isinstance(value, list):
                del getattr(where, name)[:]
                getattr(where, name).extend(value)
            else:
                setattr(where, name, value)
        return lambda: self.share.steps.call("worker_begin", request)()

    def test_begin(self):
        node = lambda level, index: pb.Node(level=level, index=index)
        table = [
            ("stale epoch", STALE, "epoch", dict(epoch=self.step.epoch - 1)),
            ("stale generation", (STALE, NOT_FOUND), "generation", dict(chunk_generation=7)),
            ("wrong length", STALE, "length", dict(chunk_length=1, entry_base_position=1)),
            ("no step id", INVALID, "step_id", dict(step_id=0)),
            ("no cache", NOT_FOUND, "cache", dict(cache_id=0)),
            ("unknown cache", NOT_FOUND, "cache", dict(cache_id=99)),
            ("no entries", INVALID, "entries", dict(entries=[])),
            ("unknown dtype", INVALID, "q_dtype", dict(q_dtype=12)),
            ("huge n_new", (INVALID, TOO_LARGE), "n_new|new", dict(chunk_n_new=HUGE)),
            ("n_new of no entry", INVALID, "new", dict(chunk_n_new=2)),
            ("huge n_q", (INVALID, TOO_LARGE), "n_q", dict(entry_n_q=HUGE)),
            ("no chunks", INVALID, "chunk", dict(entry_chunks=[])),
            ("huge number", INVALID, "chunk|number", dict(chunk_number=HUGE)),
            ("node level", INVALID, "node", dict(entry_nodes=[node(33, 0)])),
            ("node index", INVALID, "node", dict(entry_nodes=[node(32, 1)])),
            ("nodes overlap", INVALID, "node", dict(entry_nodes=[node(31, 0), node(5, 3)])),
            ("chunk below no node", INVALID, "node", dict(entry_nodes=[node(31, 1)])),
            ("timeout", INVALID, "timeout_ms", dict(timeout_ms=600_001)),
            ("group of a unary call", INVALID, "group", dict(group=7)),
        ]
        for name, status, words, fields in table:
            with self.subTest(name):
                self.refused(status, words, self.begin(**fields))

    def test_a_stale_length_after_another_commit(self):
        """Two clients with the same layout: the second one's is stale after the first's commit."""
        layout = self.road.layout(self.cache, [Entry(self.own, 0, 1, 1)])
        again = lambda: direct.DirectStep(self.road, self.cache, [Entry(self.own, 0, 1, 1)], layout,
                                          q_dtype=1)
        first = again()
        self.refused(BUSY, "sequence|chunk", again)
        tensors = self.tensors(1, 1)
        for layer in range(2):
            first.run(layer, *tensors)
        first.commit()
        first.commit()
        self.refused(STALE, "generation|length", again)

    def test_run_and_commit(self):
        step = self.road.begin(self.cache, [Entry(self.own, 0, 2, 2)], q_dtype=1)
        q, k, v = self.tensors(2, 2)
        self.refused(INVALID, "layer", lambda: step.run(2, q, k, v))
        worker = self.share.steps
        short = lambda: worker.call("run", pb.RunRequest(step_id=step.id), q + k + v[4:])()
        self.refused(INVALID, "data|bytes", short)
        step.run(0, q, k, v)
        self.refused(CONFLICT, "layer", lambda: step.run(0, q, v[:len(k)], v))
        self.refused(INCOMPLETE, "layer 1", step.commit)
        self.refused(INVALID, "accepted", lambda: step.commit([3]))
        step.abort()
        step.abort()
        self.refused((NOT_FOUND, ABORTED), "step", lambda: step.run(0, q, k, v))

    def test_layout(self):
        layout = lambda **fields: lambda: unary(self.road.coordinator.Layout,
                                                pb.LayoutRequest(**fields))
        cache = self.cache.id
        self.refused(NOT_FOUND, "cache", layout(cache_id=999, seqs=[self.own]))
        self.refused(NOT_FOUND, "sequence", layout(cache_id=cache, seqs=[12345 << 40]))
        self.refused(INVALID, "seqs", layout(cache_id=cache))
        self.refused(INVALID, "tokens", layout(cache_id=cache, seqs=[self.own], tokens=[1, 2]))
        self.refused((TOO_LARGE, EXHAUSTED, INVALID), "tokens|room|chunks", layout(
            cache_id=cache, seqs=[self.own], tokens=[2 ** 63]))

    def test_members(self):
        coordinator = self.road.coordinator
        self.refused(NOT_FOUND, "worker", lambda: unary(
            coordinator.Heartbeat, pb.HeartbeatRequest(worker=pb.WorkerInfo(id=77))))
        self.refused(INVALID, "address", lambda: unary(
            coordinator.Join, pb.JoinRequest(worker=pb.WorkerInfo(kind="cpu"))))
        self.assertEqual(len(self.thin.status().workers), 2)

    def test_what_workers_and_clients_measured(self):
        """Figures are checked before they decide where a sequence goes, and told to who asks."""
        nan, infinity = float("nan"), float("inf")
        for name, fields in (("few_flops", dict(few_flops=[1, nan])),
                             ("many_flops", dict(many_flops=[-1])),
                             ("attend_seconds", dict(attend_seconds=infinity))):
            worker = pb.WorkerInfo(address="nobody:1", kind="none", incarnation=7, **fields)
            self.refused(INVALID, name, lambda: unary(self.road.coordinator.Join,
                                                      pb.JoinRequest(worker=worker)))
        told = lambda **fields: lambda: unary(self.thin.attention.KeepAlive, pb.ClientRequest(
            client_id=self.thin.id, **fields))
        for fields in (dict(hop_seconds=nan), dict(hop_seconds=-1.0), dict(send_seconds=infinity),
                       dict(link_bandwidth=-1.0)):
            self.refused(INVALID, "link_bandwidth", told(**fields))
        self.assertEqual(self.thin.status().clients_hop_seconds, 0)
        self.thin.ticket.text = told(hop_seconds=3e-6, link_bandwidth=5e9)().ticket
        self.thin.keep_alive()  # says nothing, which changes nothing
        status = self.thin.status()
        self.assertEqual((status.clients_hop_seconds, status.clients_link_bandwidth), (3e-6, 5e9))
        for worker in status.workers:
            self.assertGreater(min(*worker.few_flops, *worker.many_flops, worker.attend_seconds), 0)
            self.assertEqual((len(worker.few_flops), len(worker.many_flops)), (3, 3))

    def test_pings(self):
        worker = self.road.worker(self.thin.status().workers[0].address).stub
        for there, back in ((0, 0), (1, 1 << 20), (1 << 20, 0), (5, 7)):
            reply = unary(worker.Ping, pb.PingRequest(answer_bytes=back, data=bytes(there)))
            self.assertEqual(reply.data, bytes(back))
        self.refused(TOO_LARGE, "answer_bytes", lambda: unary(
            worker.Ping, pb.PingRequest(answer_bytes=(1 << 20) + 1)))
