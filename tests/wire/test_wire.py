"""The wire as a foreign client sees it: answers against NumPy, thin against direct, and every
number of workers against the others. Refusals are in refusals.py and raw_messages.py, which
this file runs too.

Usage: test_wire.py PATH_OF_ATTND [unittest arguments]. Exits 77 where grpcio is missing.
"""

import os
import sys
import unittest
from concurrent import futures

# NumPy's threads would spin on the cores that the daemons under test need: ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import grpc
    import grpc_tools  # noqa: F401  (client.py makes its stubs with it)
    import numpy as np
except ImportError as missing:
    print(f"skipped: {missing} (deploy/python-env makes an interpreter with grpcio, grpcio-tools "
          "and numpy)")
    sys.exit(77)

import admission
import client
import direct
import direct_refusals
import document
import oracle
import raw_messages
import refill
import refusals
import scenario
import states
import transport
from client import Entry, pb, health_pb, health_stubs
from cluster import Cluster
from oracle import BF16, F16, F32

ATTND = None  # set by main


class Tree(unittest.TestCase):
    """The Python side of the merge alone: laws that the fixed tree stands on."""

    def partials(self, chunks, rows=3, d=8):
        rng = np.random.default_rng(3)
        return {c: (rng.integers(-40, 40, rows).astype(np.int32),
                    rng.uniform(1, 2, rows).astype(np.float32),
                    rng.standard_normal((rows, d)).astype(np.float32)) for c in chunks}

    def test_keys_put_lanes_in_bit_reversed_order(self):
        self.assertEqual([states.key(c) for c in (0, 1, 2, 32, 63, 64, 129)],
                         [0, 32 << 26, 16 << 26, 1 << 26, 63 << 26, 1, (32 << 26) + 2])

    def test_any_cut_gives_the_same_bits(self):
        chunks = list(range(0, 150, 1))
        leaves = self.partials(chunks)
        whole = states.root({(0, states.key(c)): s for c, s in leaves.items()})
        rng = np.random.default_rng(5)
        for owners in (1, 2, 3, 4, 5, 8):
            owner = rng.integers(0, owners, len(chunks)) if owners == 5 else np.arange(150) % owners
            nodes = {}
            for worker in range(owners):
                mine = [c for c in chunks if owner[c] == worker]
                for node in states.frontier(mine, [c for c in chunks if owner[c] != worker]):
                    nodes[node] = self.below(node, {c: leaves[c] for c in mine})
            if owners in (2, 4, 8):
                self.assertEqual(len(nodes), owners)
            for one, two in zip(states.root(nodes), whole):
                self.assertEqual(one.tobytes(), two.tobytes(), owners)

    @staticmethod
    def below(node, leaves):
        level, index = node
        nodes = {(0, states.key(c)): s for c, s in leaves.items()
                 if states.key(c) >> level == index}
        for at in range(level):
            for own in sorted(n for n in nodes if n[0] == at):
                state, parent = nodes.pop(own), (at + 1, own[1] >> 1)
                nodes[parent] = states.merge(nodes[parent], state) if parent in nodes else state
        return nodes[node]

    def test_empty_is_the_identity(self):
        e, l, a = self.partials([0])[0]
        a[:, 0] = -0.0
        empty = (np.full_like(e, states.EMPTY), np.zeros_like(l), np.full_like(a, np.nan))
        for merged in (states.merge(empty, (e, l, a)), states.merge((e, l, a), empty)):
            for one, two in zip(merged, (e, l, a)):
                self.assertEqual(one.tobytes(), two.tobytes())
        o, lse = states.finish(empty)
        self.assertTrue((o == 0).all() and np.isneginf(lse).all())

    def test_finish_against_float64(self):
        e, l, a = self.partials([0], rows=600)[0]
        sinks = np.linspace(-30, 30, 6).astype(np.float32)
        o, lse = states.finish((e, l, a), sinks)
        self.assertLess(np.abs(lse - (e + np.log2(l.astype("f8"))) * np.log(2)).max(), 1e-5)
        sink = np.tile(np.exp(sinks.astype("f8")), 100)
        want = a * 2.0 ** e[:, None] / (l * 2.0 ** e + sink)[:, None]
        self.assertLess(np.abs(o - want).max(), 1e-6)


class Answers(unittest.TestCase):
    """The story of scenario.py by every road."""

    DTYPES = {"f32": (F32, F32, 0), "f16": (F16, F16, 0), "bf16": (BF16, BF16, F32),
              "mixed": (BF16, F32, F16)}

    @classmethod
    def setUpClass(cls):
        cls.stories = {name: scenario.Story(dtypes) for name, dtypes in cls.DTYPES.items()}

    def roads(self, thin):
        """(name, begin): thin and direct, by unary calls and by streams."""
        for name, steps in (("thin unary", thin.unary()), ("thin stream", thin.stream())):
            yield name, lambda *a, s=steps, **o: thin.begin(s, *a, **o)
            steps.close()
        for name, streams in (("direct unary", False), ("direct stream", True)):
            road = direct.Direct(thin, streams)
            yield name, road.begin
            road.close()

    def play(self, address, story, names=None):
        """Tell a story by all roads; returns the answers by the road's name."""
        thin, answers = client.Client(address), {}
        for road, begin in self.roads(thin):
            if names and road not in names:
                continue
            cache = thin.open_cache(f"story/{road.replace(' ', '-')}",
                                    **scenario.geometry(story.dtypes[0]))
            answers[road] = story.play(thin, begin, cache)
            for name, seq in story.seqs.items():
                self.assertEqual(thin.describe(cache, seq).length, story.lengths[name], name)
            thin.close_cache(cache)
        thin.close()
        return answers

    def check_oracle(self, story, answers, what):
        for (number, layer), answer in answers.items():
            error = story.acts[number].error(layer, answer, story.dtypes[0])
            self.assertLessEqual(error, 1, f"{what}: act {number}, layer {layer}")

    def check_same(self, one, two, what):
        self.assertEqual(one.keys(), two.keys())
        for where in one:
            self.assertEqual(one[where][0], two[where][0], f"o of {what}, (act, layer) {where}")
            self.assertEqual(one[where][1], two[where][1], f"lse of {what}, (act, layer) {where}")

    def test_all_roads_and_all_numbers_of_workers_give_the_same_right_bits(self):
        first = {}
        for workers in (3, 1, 2, 4):
            cluster = Cluster(ATTND, workers)
            try:
                # All roads on three workers, where the tree is cut most; two on the others.
                roads = None if workers == 3 else ("thin stream", "direct unary")
                for name, story in self.stories.items():
                    for road, answers in self.play(cluster.address, story, roads).items():
                        what = f"{name}, {workers} workers, {road}"
                        if name not in first:
                            self.check_oracle(story, answers, what)
                        self.check_same(first.setdefault(name, answers), answers, what)
            finally:
                cluster.stop()

    def test_clients_do_not_disturb_each_other(self):
        """Four clients at once, each by another road, get the bits that one alone gets."""
        story = self.stories["f32"]
        cluster = Cluster(ATTND, 2, slab="128MiB")
        try:
            alone = self.play(cluster.address, story, ("thin unary",))["thin unary"]
            roads = ("thin unary", "thin stream", "direct unary", "direct stream")
            with futures.ThreadPoolExecutor(len(roads)) as pool:
                plays = [pool.submit(self.play, cluster.address, story, (road,)) for road in roads]
                for road, play in zip(roads, plays):
                    self.check_same(alone, play.result()[road], f"{road} among others")
        finally:
            cluster.stop()


class Large(unittest.TestCase):
    """Tensors in several messages, status, health and the life of a client."""

    GEOMETRY = dict(layers=1, q_heads=8, kv_heads=2, head_dim_k=128, head_dim_v=128, kv_dtype=1,
                    chunk_size=256, placement=1, region_bytes=8 << 20)

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(ATTND, 2)
        cls.thin = client.Client(cls.cluster.address)

    @classmethod
    def tearDownClass(cls):
        cls.thin.close()
        cls.cluster.stop()

    def test_parts_of_any_size_give_the_answer_of_a_whole_message(self):
        n, rng = 1200, np.random.default_rng(1)
        q, k, v = (rng.standard_normal((n, heads, 128)) for heads in (8, 2, 2))
        tensors = [oracle.encode(x, F32) for x in (q, k, v)]  # 4.9 + 1.2 + 1.2 MB
        numbers = [oracle.decode(t, F32, x.shape) for t, x in zip(tensors, (q, k, v))]
        want_o, want_lse, kappa = oracle.attend(*numbers, oracle.Layer(), 0)
        cache = self.thin.open_cache("large", **self.GEOMETRY)
        answers = []
        for steps in (self.thin.unary(), self.thin.stream(), self.thin.stream(1 << 20),
                      self.thin.stream(777_777), self.thin.stream(8 << 20)):
            seq = self.thin.create(cache, expected_tokens=n)
            step = self.thin.begin(steps, cache, [Entry(seq, 0, n, n)], q_dtype=F32, want_lse=True)
            answers.append(step.run(0, *tensors))
            step.commit()
            self.thin.free(cache, seq)
            steps.close()
        road = direct.Direct(self.thin, streams=True)
        seq = self.thin.create(cache, expected_tokens=n)
        step = road.begin(cache, [Entry(seq, 0, n, n)], q_dtype=F32, want_lse=True)
        answers.append(step.run(0, *tensors))
        step.commit()
        road.close()
        error = oracle.error_of(oracle.decode(answers[0][0], F32, (n, 8, 128)),
                                oracle.decode(answers[0][1], F32, (n, 8)), want_o, want_lse, kappa,
                                np.abs(v).max(), F32)
        self.assertLessEqual(error, 1)
        for answer in answers[1:]:
            self.assertEqual(answer, answers[0])
        self.thin.close_cache(cache)

    def test_export_and_ingest(self):
        """k, v go in without a query, come back, and go into another sequence: the same answers."""
        n, rng = 2400, np.random.default_rng(5)
        k, v = (oracle.encode(rng.standard_normal((n, 2, 128)), F32) for _ in range(2))
        q = oracle.encode(rng.standard_normal((3, 8, 128)), F32)
        cache = self.thin.open_cache("export", **self.GEOMETRY)
        steps, answers = self.thin.stream(), []
        for _ in range(2):
            seq = self.thin.create(cache, expected_tokens=n)
            step = self.thin.begin(steps, cache, [Entry(seq, 0, 0, n)], q_dtype=F32)
            step.run(0, b"", k, v)
            step.commit()
            step = self.thin.begin(steps, cache, [Entry(seq, n, 3, 0)], q_dtype=F32)
            answers.append(step.run(0, q, b"", b""))
            step.commit()
            self.assertEqual(self.thin.export(cache, seq, 0, 0, n), (k, v))
            row = 2 * 128 * 4
            self.assertEqual(self.thin.export(cache, seq, 0, 255, 258),
                             (k[255 * row:258 * row], v[255 * row:258 * row]))
            k, v = self.thin.export(cache, seq, 0, 0, n)
        self.assertEqual(answers[0], answers[1])
        ask = lambda **f: client.unary(self.thin.attention.Export, pb.ExportRequest(
            cache_id=cache.id, seq=seq, **f))
        version = ask(end=n).version
        self.assertEqual(ask(first=n, end=n, version=version).n, 0)
        for code, fields in ((-1, dict(end=n + 1)), (-1, dict(first=2, end=1)),
                             (-1, dict(end=1, layer=1)), (-20, dict(end=n, version=version + 2)),
                             (-1, dict(first=2 ** 64 - 1, end=2 ** 64 - 1))):
            with self.assertRaises(client.AttnError) as caught:
                ask(**fields)
            self.assertEqual(caught.exception.status, code, fields)
        self.thin.truncate(cache, seq, n - 1)
        with self.assertRaises(client.AttnError) as caught:
            ask(end=n - 1, version=version)
        self.assertEqual(caught.exception.status, -20)
        self.thin.free(cache, seq)
        with self.assertRaises(client.AttnError) as caught:
            ask(end=1)
        self.assertEqual(caught.exception.status, -40)
        steps.close()
        self.thin.close_cache(cache)

    def test_tensors_may_come_apart(self):
        """k, v first and q later, q twice, k, v twice: the same answer as all at once."""
        rng, cache = np.random.default_rng(2), self.thin.open_cache("apart", **self.GEOMETRY)
        q, k, v = (oracle.encode(rng.standard_normal((5, heads, 128)), F32) for heads in (8, 2, 2))
        answers = []
        for steps in (self.thin.unary(), self.thin.stream()):
            seq = self.thin.create(cache)
            step = self.thin.begin(steps, cache, [Entry(seq, 0, 5, 5)], q_dtype=F32)
            self.assertEqual(step.run(0, b"", k, v, no_q=True), (b"", b""))
            answers += [step.run(0, q, no_kv=True), step.run(0, q, k, v),
                        step.run(0, q, no_kv=True)]
            step.commit()
            step.commit()  # idempotent
            steps.close()
        self.assertEqual(len(set(answers)), 1)
        self.thin.close_cache(cache)

    def test_operations_of_a_stream_need_not_wait(self):
        """Two layers' runs, sent before the first is answered, are answered in order."""
        cache = self.thin.open_cache("pipeline", **dict(self.GEOMETRY, layers=2))
        seq, steps, ones = self.thin.create(cache), self.thin.stream(), np.ones(8 * 128, "f4")
        step = self.thin.begin(steps, cache, [Entry(seq, 0, 1, 1)], q_dtype=F32)
        waits = []
        for layer in (1, 0):
            kv = np.full(2 * 128, layer + 1, "f4").tobytes()
            waits.append(steps.call("run", pb.RunRequest(step_id=step.id, layer=layer),
                                    ones.tobytes() + kv + kv))
        waits.append(steps.call("commit", pb.CommitRequest(step_id=step.id)))
        for layer, wait in zip((1, 0), waits):
            run, data = wait()
            self.assertEqual((run.layer, data), (layer, ((layer + 1) * ones).tobytes()))
        waits[-1]()
        self.assertEqual(self.thin.describe(cache, seq).length, 1)
        steps.close()
        self.thin.close_cache(cache)

    def test_steps_of_a_stream_abort_with_it(self):
        cache = self.thin.open_cache("streams", **self.GEOMETRY)
        seq = self.thin.create(cache)
        steps = self.thin.stream()
        self.thin.begin(steps, cache, [Entry(seq, 0, 1, 1)], q_dtype=F32)
        steps.close()
        again = self.thin.unary()
        for _ in range(100):
            try:
                self.thin.begin(again, cache, [Entry(seq, 0, 1, 1)], q_dtype=F32).abort()
                break
            except client.AttnError as error:
                self.assertEqual(error.status, -24)
        else:
            self.fail("the step outlived its stream")
        self.thin.close_cache(cache)

    def test_a_closed_client_takes_its_sequences_along(self):
        cache = self.thin.open_cache("lease", **self.GEOMETRY)
        other = client.Client(self.cluster.address, "short-lived")
        other.keep_alive()
        seq, mine = other.create(cache), self.thin.create(cache)
        other.close()
        with self.assertRaises(client.AttnError) as caught:
            self.thin.describe(cache, seq)
        self.assertEqual((caught.exception.status, caught.exception.code),
                         (-40, grpc.StatusCode.NOT_FOUND))
        self.assertEqual(self.thin.describe(cache, mine).length, 0)
        self.thin.close_cache(cache)

    def test_status_counts(self):
        cache = self.thin.open_cache("counted", **self.GEOMETRY)
        before = self.thin.status()
        seq = self.thin.create(cache)
        status = self.thin.status()
        self.assertEqual(status.sequences, before.sequences + 1)
        self.assertEqual([w.alive for w in status.workers], [True, True])
        self.assertEqual(len({w.kind for w in status.workers}), 1)
        self.assertEqual(status.workers[0].kind, cache.kind)
        self.thin.free(cache, seq)
        self.assertEqual(self.thin.status().sequences, before.sequences)
        self.thin.close_cache(cache)

    def test_health(self):
        addresses = [self.cluster.address] + [w.address for w in self.thin.status().workers]
        for address in addresses:
            with client.connect(address) as channel:
                health = health_stubs.HealthStub(channel)
                service = "attn.v1.Attention" if address == addresses[0] else "attn.v1.Worker"
                for name in ("", service):
                    reply = health.Check(health_pb.HealthCheckRequest(service=name), timeout=5)
                    self.assertEqual(reply.status, reply.SERVING, (address, name))
                    watch = health.Watch(health_pb.HealthCheckRequest(service=name), timeout=5)
                    self.assertEqual(next(watch).status, reply.SERVING)
                    watch.cancel()
                with self.assertRaises(grpc.RpcError) as caught:
                    health.Check(health_pb.HealthCheckRequest(service="no.such"), timeout=5)
                self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)


def main():
    global ATTND
    if len(sys.argv) < 2:
        sys.exit("usage: test_wire.py PATH_OF_ATTND [unittest arguments]")
    ATTND = os.path.abspath(sys.argv.pop(1))
    refusals.ATTND = refill.ATTND = ATTND
    globals().update(Admission=admission.Admission, Refusals=refusals.Refusals,
                     DirectRefusals=direct_refusals.DirectRefusals,
                     RawMessages=raw_messages.RawMessages, Refill=refill.Refill,
                     Transport=transport.Transport, Document=document.Document)
    unittest.main()


if __name__ == "__main__":
    main()
