"""What is wrong in a request, or around it: numbers too large, bytes that are no message, headers,
deadlines, configuration."""

import os
import random
import subprocess
import time

import grpc

import client
import daemons
from bent import Stream
from client import Entry, pb, unary
from hostile import (ABORTED, CONFLICT, DEADLINE, EXHAUSTED, GEOMETRY, INVALID, LATE, MAX32, MAX64,
                     MESSAGE_MEMORY, NOT_FOUND, RECEIVE, STALE, TOO_LARGE, UNSUPPORTED, Hostile, begin_request)

RUN, STEPS = "/attn.v1.Attention/Run", "/attn.v1.Attention/Steps"
OUT_OF_RANGE, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED = 11, 3, 8, 4


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


class Requests(Hostile):

    def send(self, path, message, timeout=1.0, address=None):
        """A unary call of bytes."""
        with client.connect(address or self.address) as channel:
            call = channel.unary_unary(path, None, None)
            try:
                return call(message, timeout=timeout)
            except grpc.RpcError as error:
                raise client.from_rpc(error) from None

    # ---- sizes

    def test_products_that_overflow_64_bits(self):
        """Every size that is computed from numbers of a request, each as large as it goes."""
        open_cache = lambda **wrong: lambda: self.thin.open_cache("big", **dict(GEOMETRY, **wrong))
        shape = (INVALID, UNSUPPORTED, TOO_LARGE, EXHAUSTED)
        largest = dict(layers=1024, q_heads=1024, kv_heads=1024, head_dim_k=256, head_dim_v=256,
                       page_size=256, chunk_size=1 << 20)
        self.refused(shape, "bytes|region|pages|room", open_cache(**largest, region_bytes=MAX64))
        self.refused(shape, "bytes|region|pages|room", open_cache(**largest, region_bytes=1 << 63))
        self.refused(shape, "bytes|region|pages|room", open_cache(**largest, region_bytes=1 << 20))
        for name in ("layers", "q_heads", "kv_heads", "head_dim_k", "head_dim_v", "page_size",
                     "chunk_size"):
            self.refused(shape, name, open_cache(**{name: MAX32}))
        for name in ("layers", "kv_heads", "head_dim_k"):
            self.refused(shape, name, open_cache(**{name: 1 << 31}))
        self.refused(shape, "region|bytes", open_cache(region_bytes=MAX64))

        seq, thin = self.seq, self.thin
        begin = lambda *entries: lambda: thin.begin(self.steps, self.cache,
                                                    [Entry(*e) for e in entries], q_dtype=1)
        wrong = (INVALID, STALE, TOO_LARGE, EXHAUSTED)
        for base, n_q, n_new in ((MAX64, 1, 1), (MAX64, MAX32, MAX32), (MAX64 - 1, 0, 2),
                                 (1 << 63, 1 << 20, 1 << 20), (self.N, MAX32, 0), (self.N, 0, MAX32)):
            self.refused(wrong, "base|n_q|n_new|new|queries|tokens", begin((seq, base, n_q, n_new)))
        many = [(seq + i, 0, 1 << 20, 1 << 20) for i in range(4096)]
        self.refused(wrong + (NOT_FOUND,), "queries|new|n_q|n_new|sequence", begin(*many))
        for length in (MAX64, 1 << 63):
            self.refused(INVALID, "length", lambda: thin.fork(self.cache, seq, length))
            self.refused(INVALID, "length", lambda: thin.truncate(self.cache, seq, length))
        thin.free(self.cache, thin.create(self.cache, expected_tokens=MAX64))

    def test_offsets_and_totals_that_overflow(self):
        """Of the parts of a run."""
        q, = self.tensors(1, 0)[:1]
        step = self.thin.begin(self.steps, self.cache, [Entry(self.seq, self.N, 1, 0)], q_dtype=1)
        for offset, total in ((0, MAX64), (MAX64, MAX64), (MAX64 - 3, 16), (1, 0), (512, 1 << 63),
                              (0, 1 << 62)):
            stream = self.thin.stream()
            stream.requests.put(pb.StepRequest(run=pb.RunRequest(
                step_id=step.id, offset=offset, total=total, no_kv=True), data=q))
            self.refused((INVALID, TOO_LARGE), "offset|total|bytes", stream.reply)
            stream.close()
        step.run(0, q, no_kv=True)
        step.abort()

    def test_a_layer_twice_with_other_tensors(self):
        """Refused, by every road; what was stored stays, and the step goes on."""
        for steps in (self.thin.unary(), self.thin.stream()):
            seq = self.thin.create(self.cache)
            step = self.thin.begin(steps, self.cache, [Entry(seq, 0, 2, 2)], q_dtype=1)
            q, k, v = self.tensors(2, 2)
            _, k2, v2 = self.tensors(2, 2)
            first = step.run(0, q, k, v)
            for other in ((k2, v), (k, v2), (k2, v2), (k[:-4] + b"\0\0\0\1", v)):
                self.refused(CONFLICT, "layer 0 differ", lambda: step.run(0, q, *other))
            self.assertEqual(step.run(0, q, k, v), first)
            step.run(1, q, k2, v2)
            step.commit()
            self.thin.free(self.cache, seq)
            steps.close()

    # ---- bytes

    def test_unknown_fields(self):
        """Skipped, a megabyte of them too; groups are refused."""
        begin = begin_request(self.cache, self.seq, self.N, 1, 0).SerializeToString()
        unknown = b"".join([field(99, MAX64), field(98, b"x" * 1000),
                            varint(97 << 3 | 1) + bytes(8), varint(96 << 3 | 5) + bytes(4)])
        for message in (unknown + begin, begin + unknown, begin + 1000 * unknown):
            step = pb.BeginStepReply.FromString(self.send("/attn.v1.Attention/Begin", message))
            unary(self.thin.attention.Abort, pb.AbortRequest(step_id=step.step_id))
        group = varint(95 << 3 | 3) + varint(95 << 3 | 4)
        self.refused(INVALID, "wire type", lambda: self.send("/attn.v1.Attention/Begin",
                                                             begin + group))

    def test_truncated_messages(self):
        """A begin and a run, cut at every byte: refused or, between fields, another message."""
        begin = begin_request(self.cache, self.seq, self.N, 1, 0)
        begin.entries[0].sparse.add(pages=[1, 2, 3])
        run = pb.RunRequest(step_id=MAX64, layer=1, total=512, data=bytes(512))
        for path, message in (("/attn.v1.Attention/Begin", begin.SerializeToString()),
                              (RUN, run.SerializeToString()[:40])):
            for n in range(len(message)):
                try:
                    type(begin if path != RUN else run).FromString(message[:n])
                    continue
                except Exception:  # noqa: BLE001  (whatever Python's parser says)
                    self.refused(INVALID, "", lambda: self.send(path, message[:n]))

    def test_deep_nesting(self):
        """A message has no place for a second level of itself: what looks like it is skipped by its
        length, or refused; nothing descends."""
        nested = b""
        for _ in range(20000):
            nested = field(2, nested)
            if len(nested) > 1 << 20:
                break
        begin = begin_request(self.cache, self.seq, self.N, 1, 0).SerializeToString()
        answer = self.send("/attn.v1.Attention/Begin", begin + field(77, nested), timeout=5)
        step = pb.BeginStepReply.FromString(answer).step_id
        unary(self.thin.attention.Abort, pb.AbortRequest(step_id=step))
        for message in (nested, b"\x13" * (1 << 20), field(1, nested), b"\x0b" * 65536):
            for path in ("/attn.v1.Attention/Begin", "/attn.v1.Attention/OpenCache", RUN):
                self.refused((INVALID, TOO_LARGE, NOT_FOUND), "", lambda: self.send(path, message, 5),
                             within=5)

    def test_many_in_little(self):
        """Two bytes each on the wire, sixty in memory: refused by the arena's budget, not by the
        system's."""
        for path, tag in (("/attn.v1.Attention/Begin", b"\x12\x00"),
                          ("/attn.v1.Attention/Commit", b"\x10\x01")):
            self.refused((INVALID, TOO_LARGE, NOT_FOUND), "", lambda: self.send(
                path, tag * (7 << 20), timeout=5), within=5)

    def test_messages_over_the_cap(self):
        """16 MiB is the cap: a message beyond it is refused, one of 4 GiB before it has come."""
        for address, path in ((self.address, RUN), (self.address, STEPS),
                              (self.worker_address(), "/attn.v1.Worker/Run")):
            other = self.bent(address)
            number = other.open(path)
            other.send(number, other.message(b"\x7a" + bytes(16 << 20)))
            self.assertTrue(other.wait(number, 1 + LATE))
            status, code, sentence = other.streams[number].status()
            self.assertEqual(code, RESOURCE_EXHAUSTED, sentence)
            self.assertIn("larger than max", sentence)
            self.assertIn(str(16 << 20), sentence)
            # C core compares the length when all has come: memory is bounded by its quota.
            daemon = next(d for d in self.daemons.all if d.address == address)
            before, other = daemon.rss(), self.bent(address)
            number = other.open(path)
            other.send(number, other.message(bytes(300 << 20), size=MAX32), seconds=RECEIVE + 1)
            if not daemons.SANITIZED:  # a sanitizer has memory of its own for each byte
                self.assertLess(daemon.rss() - before, 2 * MESSAGE_MEMORY)
            other.close()
        data = bytes((16 << 20) - 200)
        self.refused(NOT_FOUND, "step", lambda: self.send(
            RUN, pb.RunRequest(step_id=1, data=data).SerializeToString(), timeout=5), within=5)

    # ---- around the message

    def status_of(self, headers=(), timeout="1S", body=b"", path="/attn.v1.Attention/ClusterStatus",
                  address=None):
        other = self.bent(address)
        number = other.open(path, headers, timeout=timeout)
        other.send(number, other.message(body), end=True)
        self.assertTrue(other.wait(number, 1 + LATE), f"no end: {headers!r:.80} {timeout!r}")
        return other.streams[number], other

    def test_headers_of_a_megabyte(self):
        """In one field and in many: refused, without being kept."""
        for address in (self.address, self.worker_address()):
            for headers in ([("x-large", "a" * (1 << 20))],
                            [(f"x-{i}", "b" * 1000) for i in range(1000)],
                            [("x-bin-bin", "c" * (1 << 20))]):
                start = time.monotonic()
                stream, other = self.status_of(headers, address=address)
                self.assertLess(time.monotonic() - start, 1 + LATE)
                code = stream.status()[1]
                self.assertTrue(code not in (None, 0) or stream.reset is not None or other.gone,
                                (code, stream.ended, stream.headers, headers[0][0]))

    def test_a_deadline_of_0_or_past(self):
        """The call ends at once as DEADLINE_EXCEEDED; a step's time-out of 1 ms likewise."""
        for timeout in ("0n", "0u", "0m", "0S", "0H"):
            start = time.monotonic()
            stream, other = self.status_of(timeout=timeout)
            self.assertLess(time.monotonic() - start, LATE)
            code = stream.status()[1]
            self.assertTrue(code == DEADLINE_EXCEEDED or stream.reset is not None or other.gone,
                            (timeout, code))
        with self.assertRaises(grpc.RpcError) as caught:
            self.thin.attention.ClusterStatus(pb.Empty(), timeout=-1)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        seq = self.thin.create(self.cache)
        start = time.monotonic()
        try:
            step = self.thin.begin(self.steps, self.cache, [Entry(seq, 0, 1, 1)], q_dtype=1,
                                   timeout_ms=1)
            time.sleep(0.05)
            self.refused((DEADLINE, ABORTED, NOT_FOUND), "", lambda: step.run(0, *self.tensors(1, 1)))
        except client.AttnError as error:
            self.assertEqual(error.status, DEADLINE, str(error))
        self.assertLess(time.monotonic() - start, 0.05 + 2 * LATE)
        self.thin.begin(self.steps, self.cache, [Entry(seq, 0, 1, 1)], q_dtype=1).abort()
        self.thin.free(self.cache, seq)

    def test_deadlines_of_nonsense(self):
        """What is no time is no deadline, or refused; the longest there is is served."""
        for timeout in ("abc", "-1S", "", "1", "S", "99999999999999999999S", "1.5S", "\xff"):
            other = self.bent()
            number = other.open("/attn.v1.Attention/ClusterStatus", timeout=timeout)
            other.send(number, other.message(b""), end=True)
            self.assertTrue(other.wait(number, 1 + LATE), repr(timeout))
        self.assertEqual(self.status_of(timeout="99999999H")[0].status()[1], 0)
        self.assertEqual(self.status_of(timeout=None)[0].status()[1], 0)

    def test_other_content_and_methods(self):
        """GET, another content type, no path, a path of 8 KiB: refused, and nobody falls."""
        for wrong in ([("content-type", "text/html")], [(":method", "GET")], [(":path", "")],
                      [(":path", "/" + "x" * 8000)]):
            other = self.bent()
            number = other.h2.get_next_available_stream_id()
            other.streams[number] = Stream()
            head = dict([(":method", "POST"), (":scheme", "http"), (":path", RUN),
                         (":authority", "a"), ("content-type", "application/grpc"),
                         ("te", "trailers")])
            head.update(wrong)
            other.h2.send_headers(number, list(head.items()), end_stream=True)
            other.flush()
            other.wait(number, 1 + LATE)
            status = other.streams[number].status()[1]
            self.assertNotEqual(status, 0, wrong)

    # ---- configuration

    def test_a_config_file_of_garbage(self):
        """Exit code 2 and a sentence with the file and, where there is one, the line."""
        rng = random.Random(7)
        files = {"bytes": rng.randbytes(4096), "a word": b"garbage\n", "a line": b"x" * 1_000_000,
                 "unknown": b"[worker]\nno-such = 1\n", "section": b"[nobody]\nlisten = 1\n",
                 "a value": b"[worker]\nslab = a lot\n", "range": b"[worker]\nthreads = 99999999\n",
                 "overflow": b"[worker]\nslab = 99999999999999999999TiB\n",
                 "zeros": bytes(1000), "no end": b"[worker", "empty value": b"[worker]\nslab =\n",
                 "twice": b"[worker]\nslab = 1MiB\nslab = 2MiB\n"}
        path = os.path.join(self.daemons.folder, "attnd.conf")
        for name, content in files.items():
            with open(path, "wb") as f:
                f.write(content)
            for role in ("worker", "coordinator", "dev"):
                if role != "worker" and content.startswith(b"[worker]"):
                    continue
                with self.subTest(name=name, role=role):
                    ended = subprocess.run([daemons.ATTND, role, "--config", path, "--print-config"],
                                           capture_output=True, timeout=10)
                    if name == "twice" and ended.returncode == 0:
                        continue  # the last one counts
                    self.assertEqual(ended.returncode, 2, ended)
                    self.assertIn(b"attnd.conf", ended.stderr)
        for path in ("/nonexistent/file", "/", "/dev/null/x"):
            ended = subprocess.run([daemons.ATTND, "worker", "--config", path], capture_output=True,
                                   timeout=10)
            self.assertEqual(ended.returncode, 2, ended)
            self.assertIn(path.encode(), ended.stderr)
