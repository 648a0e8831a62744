"""Below the level of fields: messages that a generated stub would never send. Encoded by hand and
sent through grpc's bytes API: fields in another order, unknown fields, garbage, cut and huge ones.
"""

import os
import random
import time

import grpc

import admission
import client
import refusals
from client import Entry, pb
from refusals import CODES, INVALID, SECONDS, TOO_LARGE


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def field(number, value):
    """One field: an int as varint, bytes as length-delimited."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


class RawMessages(refusals.Clustered):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.own, _ = admission.coordinator_ticket(cls.thin)

    def send(self, method, message, channel=None, timeout=SECONDS):
        call = (channel or self.thin.channel).unary_unary(
            f"/attn.v1.{method}", request_serializer=None, response_deserializer=None)
        try:
            return call(message, timeout=timeout)
        except grpc.RpcError as error:
            raise client.from_rpc(error) from None

    def stream(self, *messages):
        """The replies, as bytes, to messages on a Steps stream."""
        call = self.thin.channel.stream_stream("/attn.v1.Attention/Steps", None, None)
        return call(iter(messages), timeout=SECONDS)

    def query(self):
        """The fields of a run that asks layer 1 of a fork of the good sequence, in an open step."""
        fork = self.thin.fork(self.cache, self.seq, self.N)
        self.addCleanup(self.thin.free, self.cache, fork)
        step = self.thin.begin(self.steps, self.cache, [Entry(fork, self.N, 1, 0)], q_dtype=1)
        self.addCleanup(step.abort)
        return [field(1, step.id), field(2, 1), field(5, 1), field(15, self.q.tobytes())]

    def ask(self, message):
        return pb.RunReply.FromString(self.send("Attention/Run", message)).data

    def test_fields_in_any_order(self):
        fields = self.query()
        want = self.ask(b"".join(fields))
        self.assertEqual(len(want), 4 * 40 * 4)
        rng = random.Random(1)
        self.assertEqual(self.ask(b"".join(reversed(fields))), want, "data first")
        for _ in range(8):
            rng.shuffle(fields)
            self.assertEqual(self.ask(b"".join(fields)), want)
        self.good()

    def test_repeated_fields_last_wins(self):
        fields = self.query()
        want = self.ask(b"".join(fields))
        wrong = [field(1, 12345), field(2, 77), field(15, b"\xff" * 99)]
        self.assertEqual(self.ask(b"".join(wrong + fields)), want)
        self.assertEqual(self.ask(b"".join(fields[:1] + wrong + fields)), want)
        self.good()

    def test_unknown_fields_are_skipped(self):
        fields = self.query()
        want = self.ask(b"".join(fields))
        unknown = [field(100, 7), field(536870911, b"future"), varint(101 << 3 | 1) + b"\1" * 8,
                   varint(102 << 3 | 5) + b"\2" * 4, field(14, 2 ** 64 - 1)]
        for extra in unknown:
            self.assertEqual(self.ask(extra + b"".join(fields)), want, extra)
            self.assertEqual(self.ask(b"".join(fields) + extra), want, extra)
            self.assertEqual(self.ask(extra.join(fields)), want, extra)
        self.good()

    def test_long_varints_and_explicit_zeros(self):
        fields = self.query()
        want = self.ask(b"".join(fields))
        padded = b"\x10" + b"\x81\x80\x80\x80\x00"  # layer 1 in five bytes
        self.assertEqual(self.ask(b"".join([fields[0], padded, *fields[2:]])), want)
        self.assertEqual(self.ask(b"".join(fields + [field(3, 0), field(4, 0), field(6, 0)])), want)
        self.good()

    def test_stream_with_data_first(self):
        fields = self.query()
        want = self.ask(b"".join(fields))
        begin = pb.BeginStepRequest(cache_id=self.cache.id, q_dtype=1)
        begin.entries.add(seq=self.seq, base_position=self.N, n_q=1)
        requests = [field(1, begin.SerializeToString())]
        # A step id is known only from the reply, so the stream is fed by hand.
        feed = client.queue.SimpleQueue()
        call = self.thin.channel.stream_stream("/attn.v1.Attention/Steps", None, None)
        replies = call(iter(feed.get, None), timeout=SECONDS)
        feed.put(requests[0])
        step_id = pb.StepReply.FromString(next(replies)).begin.step_id
        run = field(1, step_id) + field(2, 1) + field(5, 1)
        feed.put(field(15, self.q.tobytes()) + field(3, run))
        self.assertEqual(pb.StepReply.FromString(next(replies)).data, want)
        feed.put(None)
        replies.cancel()

    METHODS = ["Attention/" + m for m in (
        "OpenClient", "KeepAlive", "CloseClient", "OpenCache", "CloseCache", "CreateSequence",
        "ForkSequence", "TruncateSequence", "FreeSequence", "DescribeSequence", "Begin", "Run",
        "Commit", "Abort", "ClusterStatus")] + ["Coordinator/Layout", "Coordinator/Join",
                                                "Coordinator/Heartbeat"]
    WORKER_METHODS = ["Worker/" + m for m in (
        "Begin", "Run", "Commit", "Abort", "OpenCache", "CloseCache", "ForkChunk", "TruncateChunk",
        "ReleaseChunks", "DescribeChunks", "Status", "Ping")]

    def each_method(self):
        worker = self.thin.status().workers[0].address
        with grpc.intercept_channel(client.connect(worker), client.Ticket(self.own)) as channel:
            yield from ((method, self.thin.channel) for method in self.METHODS)
            yield from ((method, channel) for method in self.WORKER_METHODS)

    def test_garbage(self):
        garbage = [b"\xff" * 40,                      # a varint without an end
                   b"\x0a\xff\xff\xff\xff\x0f",       # a length far beyond the message
                   b"\x0a\x05ab",                     # a length beyond the message
                   b"\x00\x01",                       # field number 0
                   b"\x0f\x01",                       # wire type 7
                   b"\x7a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"]  # data of 2^63 bytes
        for method, channel in self.each_method():
            for message in garbage:
                with self.subTest(method=method, message=message[:8].hex()):
                    with self.assertRaises(client.AttnError) as caught:
                        self.send(method, message, channel)
                    error = caught.exception
                    self.assertEqual((error.status, error.code), (INVALID, CODES[INVALID]), error)
                    self.assertTrue(error.sentence)
        self.good()

    def test_random_bytes(self):
        """Whatever they mean by chance, the answer comes in time and the cluster stays right."""
        rng = random.Random(4)
        for method, channel in self.each_method():
            for _ in range(6):
                message = rng.randbytes(rng.randrange(1, 200))
                start = time.monotonic()
                try:
                    self.send(method, message, channel)
                except client.AttnError as error:
                    self.assertNotIn(error.code, (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN,
                                                  grpc.StatusCode.DEADLINE_EXCEEDED,
                                                  grpc.StatusCode.UNAVAILABLE), (method, message))
                self.assertLess(time.monotonic() - start, SECONDS)
        self.good()

    def test_cut_messages(self):
        begin = pb.BeginStepRequest(cache_id=self.cache.id, q_dtype=1, want_lse=True)
        begin.entries.add(seq=self.seq, base_position=self.N, n_q=1,
                          sparse=[pb.PageList(pages=[1, 3])])
        whole = begin.SerializeToString()
        for n in range(len(whole)):
            try:
                pb.BeginStepRequest.FromString(whole[:n])
                continue  # cut between fields: another message, not a broken one
            except Exception:
                pass
            with self.subTest(n=n):
                self.refused(INVALID, "", lambda: self.send("Attention/Begin", whole[:n]))

    def test_nested_groups(self):
        for message in (b"\x4b" * 100_000, b"\x4b" * 50_000 + b"\x4c" * 50_000):
            self.refused((INVALID, TOO_LARGE), "", lambda: self.send("Attention/Begin", message))

    def test_many_small_submessages(self):
        """A few bytes each on the wire, far more in memory: refused by the arena's budget."""
        begin = field(1, self.cache.id) + field(3, 1) + b"\x12\x00" * 4_000_000
        self.refused((INVALID, TOO_LARGE), "", lambda: self.send("Attention/Begin", begin))

    def test_above_16_mib(self):
        fields = self.query()
        fields[-1] = field(15, bytes(17 << 20))
        with self.assertRaises(client.AttnError) as caught:
            self.send("Attention/Run", b"".join(fields))
        self.assertIn(caught.exception.code, (grpc.StatusCode.RESOURCE_EXHAUSTED,
                                              grpc.StatusCode.OUT_OF_RANGE))
        # Just below it is this layer's own business again: data of the wrong size.
        fields[-1] = field(15, bytes((16 << 20) - 100))
        self.refused(INVALID, "data|bytes", lambda: self.send("Attention/Run", b"".join(fields)))

    def test_garbage_on_a_stream_ends_it(self):
        for message in (b"\xff" * 40, b"\x1a\x05ab", os.urandom(3) + b"\xff" * 30):
            replies = self.stream(message)
            with self.assertRaises(grpc.RpcError) as caught:
                for reply in replies:
                    status = pb.StepReply.FromString(reply).status
                    self.assertEqual(status.code, INVALID)
            error = client.from_rpc(caught.exception)
            self.assertEqual((error.status, error.code), (INVALID, CODES[INVALID]))
            self.good()

    def test_unknown_methods(self):
        for method in ("Attention/NoSuch", "Worker/Begin", "NoSuch/Run", "Attention/begin"):
            with self.assertRaises(client.AttnError) as caught:
                self.send(method, b"")
            self.assertEqual(caught.exception.code, grpc.StatusCode.UNIMPLEMENTED, method)
        self.good()
