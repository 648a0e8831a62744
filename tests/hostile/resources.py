"""Peers that take: time, threads, memory, connections, descriptors. They are cut off or refused, and
an honest client hardly notices."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zlib

import grpc
import numpy as np

import client
import daemons
import direct
from bent import Bent
from client import Entry, pb
from daemons import SANITIZED, Daemon, wait_until
from hostile import (ABORTED, BUSY, DEADLINE, EXHAUSTED, GEOMETRY, LATE, MESSAGE_MEMORY, RECEIVE, STALL,
                     Hostile, begin_request)

RUN, STEPS = "/attn.v1.Attention/Run", "/attn.v1.Attention/Steps"
RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, UNIMPLEMENTED = 8, 4, 12
SLOW = 4 if SANITIZED else 1  # an honest step may take so many times as long as otherwise


class Quick(threading.Thread):
    """An honest client that asks all the while, and notes how long it takes."""

    def __init__(self, test):
        super().__init__(daemon=True)
        self.test, self.took, self.failures = test, [], []
        self.seq = test.thin.fork(test.cache, test.seq, test.N)
        self.over = threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set():
            try:
                self.took.append(self.test.good(self.seq, timeout_ms=3000))
            except Exception as error:  # noqa: BLE001  (told by stop())
                self.failures.append(error)
            time.sleep(0.005)

    def stop(self, tolerated=()):
        """Seconds of the slowest. No step may have failed, but with these statuses."""
        self.over.set()
        self.join(30)
        for error in self.failures:
            if getattr(error, "status", 0) not in tolerated:
                raise error
        wait_until("its last step aborts", self.free)
        return max(self.took)

    def free(self):
        try:
            self.test.thin.free(self.test.cache, self.seq)
            return True
        except client.AttnError as error:
            self.test.assertEqual(error.status, BUSY)
            return False


class Resources(Hostile):

    # ---- clients that do not read

    def deaf_runs(self, n, path):
        """n connections that never read, each with a run whose answer is of 1.3 MB. It costs little
        to compute: with a window of 1 a query sees one token."""
        rows = 2048
        cache = self.thin.open_cache("deaf", **dict(GEOMETRY, layers=1, region_bytes=4 << 20,
                                                    layer_table=[pb.Layer(window=1)]))
        self.addCleanup(self.thin.close_cache, cache)
        seq = self.thin.create(cache)
        step = self.thin.begin(self.steps, cache, [Entry(seq, 0, 0, rows)], q_dtype=1)
        step.run(0, b"", np.ones((rows, 2, 32), "f4").tobytes(),
                 np.ones((rows, 2, 40), "f4").tobytes())
        step.commit()
        begun = [self.deaf_begin(begin_request(cache, self.thin.fork(cache, seq, rows), rows, rows, 0),
                                 path) for _ in range(n)]
        q = np.zeros((rows, 4, 32), "f4").tobytes()
        for other, number, step in begun:
            run = pb.RunRequest(step_id=step, layer=0, no_kv=True)
            if path == RUN:
                run.data = q
            else:
                run = pb.StepRequest(run=run, data=q)
            other.send(number, other.message(run.SerializeToString()), end=path == RUN)
        return begun

    def deaf_begin(self, request, path):
        other = self.bent(reads=False)
        number = other.open(path)
        if path == RUN:
            return other, number, client.unary(self.thin.attention.Begin, request).step_id
        other.send(number, other.message(pb.StepRequest(begin=request).SerializeToString()))
        while not list(other.messages(number)):
            self.assertTrue(other.pump(5))
        reply = pb.StepReply.FromString(next(other.messages(number)))
        self.assertEqual(reply.status.code, 0, reply.status.message)
        return other, number, reply.begin.step_id

    def check_deaf(self, path, n):
        alone = self.honest(20)
        deaf = self.deaf_runs(n, path)
        slowest = self.honest(10)
        print(f"  slowest honest step {slowest * 1000:.1f} ms, alone {alone * 1000:.1f}")
        # Computing their runs takes its time; a thread that waits for them would take 10 s.
        self.assertLess(slowest, SLOW * (0.75 + 10 * alone))
        for other, number, _ in deaf:
            self.assertTrue(other.wait(number, 3 * STALL + 3 * LATE), "it is not cut off")
            status, code, sentence = other.streams[number].status()
            self.assertEqual(code, RESOURCE_EXHAUSTED, sentence)
            self.assertIn("not being read", sentence)
            other.close()

    def test_a_client_that_stops_reading_a_stream(self):
        self.check_deaf(STEPS, 1)

    def test_a_client_that_stops_reading_a_unary_answer(self):
        self.check_deaf(RUN, 1)

    def test_64_clients_that_do_not_read_slow_nobody(self):
        self.check_deaf(STEPS, 64)

    # ---- clients that do not go on

    def test_half_a_request(self):
        for address, path in ((self.address, RUN), (self.worker_address(), "/attn.v1.Worker/Run")):
            other = self.bent(address)
            number = other.open(path)
            other.send(number, other.message(b"\x7a" + bytes(5000), size=1 << 20))
            start = time.monotonic()
            self.assertTrue(other.wait(number, RECEIVE + STALL + LATE))
            self.assertGreater(time.monotonic() - start, RECEIVE * 0.9)
            status, code, sentence = other.streams[number].status()
            self.assertEqual(code, DEADLINE_EXCEEDED, sentence)
            self.assertIn("did not come whole", sentence)

    def test_half_a_run_on_a_stream(self):
        """Its buffer goes with the stream that is cut off, and its step with it."""
        seq = self.thin.create(self.cache)
        other = self.bent()
        number = other.open(STEPS)
        request = begin_request(self.cache, seq, 0, 0, 1000)
        other.send(number, other.message(pb.StepRequest(begin=request).SerializeToString()))
        wait_until("begin", lambda: other.pump(1) and list(other.messages(number)))
        step = pb.StepReply.FromString(next(other.messages(number))).begin.step_id
        part = pb.StepRequest(run=pb.RunRequest(step_id=step, total=1000 * 2 * 72 * 4),
                              data=bytes(1000))
        other.send(number, other.message(part.SerializeToString()))
        self.assertTrue(other.wait(number, RECEIVE + STALL + LATE))
        status, code, sentence = other.streams[number].status()
        self.assertEqual(code, DEADLINE_EXCEEDED, sentence)
        wait_until("the step aborts", lambda: self.begins(seq), 2)
        self.thin.free(self.cache, seq)

    def begins(self, seq):
        try:
            self.thin.begin(self.steps, self.cache, [Entry(seq, 0, 1, 1)], q_dtype=1).abort()
            return True
        except client.AttnError as error:
            self.assertEqual(error.status, BUSY)
            return False

    def test_parts_that_trickle(self):
        """Each in its time, but all together they have as much as one."""
        seq = self.thin.create(self.cache)
        other = self.bent()
        number = other.open(STEPS)
        request = begin_request(self.cache, seq, 0, 0, 1000)
        other.send(number, other.message(pb.StepRequest(begin=request).SerializeToString()))
        wait_until("begin", lambda: other.pump(1) and list(other.messages(number)))
        step = pb.StepReply.FromString(next(other.messages(number))).begin.step_id
        total, start = 1000 * 2 * 72 * 4, time.monotonic()
        for offset in range(100):
            part = pb.StepRequest(run=pb.RunRequest(step_id=step, total=total, offset=offset), data=b"1")
            other.send(number, other.message(part.SerializeToString()))
            if other.wait(number, RECEIVE / 10):
                break
        self.assertGreater(time.monotonic() - start, RECEIVE * 0.9)
        self.assertLess(time.monotonic() - start, RECEIVE + STALL + LATE)
        status, code, sentence = other.streams[number].status()
        self.assertEqual(code, DEADLINE_EXCEEDED, sentence)
        wait_until("the step aborts", lambda: self.begins(seq), 2)
        self.thin.free(self.cache, seq)

    def test_a_paused_daemon_cuts_nobody_off(self):
        """What came while it did not run it could not read: its peers get their time again."""
        request = begin_request(self.cache, self.seq, self.N, 1, 0).SerializeToString()
        for _ in range(5):
            other = self.bent()
            number = other.open("/attn.v1.Attention/Begin")
            message = other.message(request)
            other.send(number, message[:7])
            time.sleep(0.1)
            self.daemons.coordinator.signal(signal.SIGSTOP)
            time.sleep(RECEIVE + STALL)
            other.send(number, message[7:], end=True)
            self.daemons.coordinator.signal(signal.SIGCONT)
            self.assertTrue(other.wait(number, 2 + LATE))
            status, code, sentence = other.streams[number].status()
            self.assertEqual(code, 0, sentence)
            reply = pb.BeginStepReply.FromString(bytes(other.streams[number].data[5:]))
            client.unary(self.thin.attention.Abort, pb.AbortRequest(step_id=reply.step_id))
        self.assertTrue(self.daemons.coordinator.find("rpc.was_paused"))

    def test_an_idle_stream_may_stay(self):
        """Nothing is due on a stream between operations: only what was begun has to come."""
        stream = self.thin.stream()
        self.ask(self.seq, self.N, self.q, stream)
        time.sleep(RECEIVE + 2 * STALL)
        self.ask(self.seq, self.N, self.q, stream)
        stream.close()

    def test_half_sent_messages_are_bounded_in_total(self):
        """Far more than --message-memory on its way in, from many connections: bounded, refused
        with RESOURCE_EXHAUSTED, and an honest client's unary calls go through."""
        for daemon, path in ((self.daemons.coordinator, STEPS),
                             (self.daemons.workers[0], "/attn.v1.Worker/Steps")):
            start, most, ends = daemon.rss(), 0, []
            quick = Quick(self)
            others = [self.bent(daemon.address) for _ in range(10)]
            for other in others:
                for number in [other.open(path) for _ in range(4)]:
                    other.send(number, other.message(b"\x7a" + bytes(10 << 20), size=15 << 20),
                               seconds=1)
                    most = max(most, daemon.rss())
            for other in others:
                other.pump(0.05)
                ends += [s for s in other.streams.values() if s.over]
                other.close()
            quick.stop(tolerated=(None, EXHAUSTED, ABORTED, BUSY))
            broken = [e for e in quick.failures if e.status != BUSY]  # its own step is open yet
            print(f"  {daemon.role}: of {len(quick.took) + len(broken)} honest steps meanwhile "
                  f"{len(broken)} failed, the slowest took {max(quick.took) * 1000:.0f} ms; "
                  f"{len(ends)} streams were broken; {most - start:.0f} MiB at most")
            self.assertLessEqual(len(broken), 2, str(broken))
            self.assertLessEqual({s.reset for s in ends}, {11}, "not ENHANCE_YOUR_CALM, which is "
                                 "RESOURCE_EXHAUSTED in gRPC")
            if not SANITIZED:
                self.assertLess(most - start, 2 * MESSAGE_MEMORY + 64)

    # ---- a worker that does not answer

    def test_a_stopped_worker_starves_nobody_elsewhere(self):
        """Forty clients wait for a stopped worker; those of the other one are served meanwhile."""
        cache = self.thin.open_cache("whole", **dict(GEOMETRY, placement=2, region_bytes=32 << 20))
        self.addCleanup(self.thin.close_cache, cache)
        seqs, tensors = [self.thin.create(cache) for _ in range(82)], self.tensors(1, 1)
        owner = {}
        for seq in seqs:
            step = self.thin.begin(self.steps, cache, [Entry(seq, 0, 1, 1)], q_dtype=1)
            for layer in range(2):
                step.run(layer, *tensors)
            step.commit()
            owner[seq] = self.thin.describe(cache, seq).chunks[0].worker
        at = {w.id: w.address for w in self.thin.status().workers}
        stopped_id = owner[seqs[0]]
        theirs = [s for s in seqs if owner[s] == stopped_id][:40]
        ours = next(s for s in seqs if owner[s] != stopped_id)
        self.assertEqual(len(theirs), 40)

        def attempt(seq):
            return self.thin.attention.Begin.future(begin_request(cache, seq, 1, 1, 1, timeout_ms=2000), timeout=2)

        def step_elsewhere():
            start = time.monotonic()
            step = self.thin.begin(self.steps, cache, [Entry(ours, 1, 1, 0)], q_dtype=1)
            step.run(0, tensors[0], no_kv=True)
            step.abort()
            return time.monotonic() - start
        step_elsewhere()
        worker = self.daemons.worker_at(at[stopped_id])
        open_steps = [client.unary(self.thin.attention.Begin,
                                   begin_request(cache, seq, 1, 1, 1, timeout_ms=2000)).step_id
                      for seq in theirs[:20]]
        worker.signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            waiting = [attempt(seq) for seq in theirs[20:]]
            waiting += [self.thin.attention.Run.future(pb.RunRequest(
                step_id=step, layer=0, data=b"".join(tensors)), timeout=2) for step in open_steps]
            time.sleep(0.2)
            slowest = max(step_elsewhere() for _ in range(10))
            self.assertLess(slowest, SLOW * 0.25)
            for future in waiting:
                self.assertIsInstance(future.exception(timeout=5), grpc.RpcError)
            self.assertLess(time.monotonic() - start, 2 + 2 * LATE)
        finally:
            worker.signal(signal.SIGCONT)
        wait_until("the worker is back", lambda: self.is_back(cache, theirs[-1]), 10)
        for step in open_steps:
            try:
                client.unary(self.thin.attention.Abort, pb.AbortRequest(step_id=step))
            except client.AttnError:
                pass

    def is_back(self, cache, seq):
        try:
            self.thin.begin(self.steps, cache, [Entry(seq, 1, 1, 0)], q_dtype=1).abort()
            return True
        except client.AttnError:
            return False

class Connections(Hostile):

    def test_a_thousand_idle_connections(self):
        alone = self.honest(30)
        for daemon in (self.daemons.coordinator, self.daemons.workers[0]):
            before = daemon.rss()
            silent = [socket.create_connection(daemon.address.split(":")) for _ in range(500)]
            idle = [Bent(daemon.address) for _ in range(500)]
            for other in idle:
                other.pump(0.05)
            slowest = self.honest(30)
            held = daemon.rss() - before
            print(f"  {daemon.role}: 1,000 connections hold {held:.1f} MiB; slowest honest step "
                  f"{slowest * 1000:.1f} ms, without them {alone * 1000:.1f}")
            for connection in silent + idle:
                connection.close()
            self.assertLess(slowest, SLOW * (0.1 + 10 * alone))
            if not SANITIZED:
                self.assertLess(held, 64)

    def test_more_connections_than_descriptors(self):
        """The listener survives it: who comes when others left is served."""
        few = daemons.Daemon(self.daemons.folder, "coordinator", descriptors=256)
        others = []
        for _ in range(400):
            try:
                others.append(socket.create_connection(few.address.split(":"), timeout=2))
            except OSError:
                pass
        time.sleep(0.3)
        self.assertLess(few.descriptors(), 256)
        self.assertTrue(few.find("process.connections_full"))
        for other in others:
            other.close()
        wait_until("descriptors", lambda: few.descriptors() < 100)
        newcomer = client.Client(few.address)
        newcomer.close()
        self.assertEqual(few.stop(), "")

    def test_calls_of_one_connection(self):
        """More streams than one connection may have: refused with a sentence; others go on."""
        other = self.bent()
        numbers = [other.open("/grpc.health.v1.Health/Watch", timeout=None) for _ in range(2048)]
        for number in numbers:
            other.send(number, other.message(b""))
        extra = other.open("/grpc.health.v1.Health/Watch", timeout=None)
        other.send(extra, other.message(b""))
        self.assertTrue(other.wait(extra, 5 * SLOW))
        status, code, sentence = other.streams[extra].status()
        self.assertEqual((status, code), (EXHAUSTED, RESOURCE_EXHAUSTED), sentence)
        self.assertIn("2048 calls of this connection", sentence)
        self.good()
        other.close()

    def test_resets_without_end(self):
        """Calls that are reset as soon as they are made leave nothing behind."""
        alone, quick, other = self.honest(10), Quick(self), self.bent()
        for i in range(5000):
            if other.gone:
                break
            other.h2.reset_stream(other.open(RUN), 8)
            if i % 50 == 0:
                other.flush()
                other.pump(0)
        slowest = quick.stop()
        self.assertLess(slowest, SLOW * (0.5 + 20 * alone))

    # ---- the end

    def test_a_drain_as_long_as_it_may_take(self):
        """Of a coordinator with a thin client's step open: the step may end, or is aborted."""
        for drain, commits in (("500ms", False), ("20s", True)):
            few = daemons.Daemons(1, ["--drain-ms", drain])
            thin = client.Client(few.address)
            cache = thin.open_cache("drained", **GEOMETRY)
            step = thin.begin(thin.unary(), cache, [Entry(thin.create(cache), 0, 0, 1)], q_dtype=1)
            start = time.monotonic()
            few.coordinator.signal(signal.SIGTERM)
            if commits:
                wait_until("draining", lambda: few.coordinator.find("coordinator.draining"))
                _, k, v = self.tensors(0, 1)
                for layer in range(2):
                    step.run(layer, b"", k, v)
                step.commit()
            few.coordinator.process.wait(5)
            took = time.monotonic() - start
            with open(few.coordinator.log) as log:
                self.assertEqual("coordinator.drain_over" in log.read(), not commits)
            self.assertTrue(commits or 0.45 < took < 3, took)
            thin.channel.close()  # there is nobody to tell
            few.stop()

    # ---- logs

    def check_with_log(self, stderr):
        daemon = Daemon(self.daemons.folder, "coordinator", "--log-level", "debug", stderr=stderr)
        port = wait_until("a port", daemon.listening_port)
        for _ in range(20):
            newcomer = client.Client(f"127.0.0.1:{port}")
            newcomer.close()
        self.assertTrue(daemon.alive())
        self.assertEqual(daemon.stop(), "")

    def test_a_full_disk_under_the_log(self):
        with open("/dev/full", "w") as full:
            self.check_with_log(full)

    def test_nobody_reads_the_log(self):
        read, write = os.pipe()
        os.close(read)
        self.check_with_log(write)
        os.close(write)

    # ---- messages larger than they look

    def test_compressed_messages_are_refused(self):
        """16 MiB of zeros in 16 KiB: nothing here decompresses."""
        bomb = zlib.compress(b"\x7a" + bytes(15 << 20), 9)
        start = self.daemons.coordinator.rss()
        for encoding in ("gzip", "deflate", "identity"):
            other = self.bent()
            number = other.open(RUN, [("grpc-encoding", encoding)])
            other.send(number, other.message(bomb, compressed=1), end=True)
            self.assertTrue(other.wait(number, 2))
            status, code, sentence = other.streams[number].status()
            self.assertNotIn(code, (0, None), encoding)
            self.assertTrue(sentence, encoding)
        if not SANITIZED:
            self.assertLess(self.daemons.coordinator.rss() - start, 16)
