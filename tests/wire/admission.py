"""Who may call what on a worker. Tickets are made here from what docs/security.md says of them,
with the secret that whoever joins as a worker is told: a cluster without a join secret, as those
of these tests, takes anybody who can connect for one.
"""

import hmac
import random
import time

import grpc

import client
import direct
from client import Entry, pb, stubs, unary
from refusals import DENIED, INVALID, NOT_FOUND, Clustered


def mint(secret, role, client_id, period, version=1):
    text = f"{version}.{role}.{client_id}.{period}"
    return f"{text}.{hmac.digest(secret, text.encode(), 'sha256').hex()}"


def coordinator_ticket(thin):
    """A ticket such as the coordinator shows. The worker that joins for it is none, so this waits
    until it is lost: nothing is placed there then."""
    kind = thin.status().workers[0].kind
    reply = unary(stubs.CoordinatorStub(thin.channel).Join, pb.JoinRequest(
        worker=pb.WorkerInfo(address="127.0.0.1:1", kind=kind, slab_bytes=1 << 20,
                             incarnation=random.getrandbits(64) | 1), read_bandwidth=1e9))
    end = time.monotonic() + 10
    while next(w for w in thin.status().workers if w.id == reply.worker_id).alive:
        if time.monotonic() > end:
            raise RuntimeError("a worker that says nothing is not lost")
        time.sleep(0.05)
    return mint(reply.ticket_secret, "o", 0, reply.ticket_period), reply


class Admission(Clustered):
    CONTROL = ("OpenCache", "CloseCache", "ForkChunk", "TruncateChunk", "ReleaseChunks",
               "DescribeChunks")
    STEPS = ("Begin", "Run", "Commit", "Abort")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.own, cls.joined = coordinator_ticket(cls.thin)
        cls.worker = cls.thin.status().workers[0].address

    def call(self, method, text):
        """An empty request with this ticket (None: without any)."""
        with grpc.intercept_channel(client.connect(self.worker), client.Ticket(text)) as channel:
            request = channel.unary_unary(f"/attn.v1.Worker/{method}")
            return unary(lambda r, timeout: request(r, timeout=timeout), b"")

    def test_what_is_no_ticket_opens_nothing(self):
        mine, secret, period = self.thin.ticket.text, self.joined.ticket_secret, \
            self.joined.ticket_period
        forged = mint(bytes(32), "o", 0, period)
        table = [(None, "no attn-ticket"), ("", "malformed"), ("1.o.0.1", "malformed"),
                 ("." + "a" * 64, "not of the coordinator"), ("x" * 5000, "malformed"),
                 (mine.replace(".c.", ".o.", 1), "not of the coordinator"),
                 (mine[:-64] + mine[-64:].upper(), "not of the coordinator"),
                 (forged, "not of the coordinator"),
                 (mint(secret, "o", 0, period, version=2), "version")]
        for text, words in table:
            for method in (*self.CONTROL, *self.STEPS, "Status", "Ping"):
                with self.subTest(text=text and text[:40], method=method):
                    self.refused(DENIED, words, lambda: self.call(method, text))

    def test_streams_are_asked_too(self):
        for text in (None, mint(bytes(32), "c", 1, 1)):
            with grpc.intercept_channel(client.connect(self.worker),
                                        client.Ticket(text)) as channel:
                stream = client.Stream(stubs.WorkerStub(channel))
                self.refused(DENIED, "attn-ticket", lambda: stream.call(
                    "abort", pb.AbortRequest(step_id=1))())
                stream.close()

    def test_clients_take_steps_and_nothing_else(self):
        mine = self.thin.ticket.text
        for method in self.CONTROL:
            self.refused(DENIED, "only coordinator", lambda: self.call(method, mine))
        self.refused(NOT_FOUND, "cache", lambda: self.call("Begin", mine))
        self.refused(NOT_FOUND, "step", lambda: self.call("Run", mine))
        self.call("Status", mine)

    def test_the_coordinator_may_do_all(self):
        self.refused(INVALID, "cache_id", lambda: self.call("OpenCache", self.own))
        self.refused(NOT_FOUND, "cache", lambda: self.call("Begin", self.own))
        self.call("Status", self.own)

    def test_a_client_is_introduced_by_opening(self):
        """Layouts alone do not help whoever comes without OpenClient."""
        stranger = client.Client(self.cluster.address)
        stranger.ticket.text = None
        road = direct.Direct(stranger)
        begin = lambda: road.begin(self.cache, [Entry(self.seq, self.N, 1, 0)], q_dtype=1)
        self.refused(DENIED, "attn-ticket OpenClient", begin)
        reply = unary(stranger.attention.OpenClient, pb.OpenClientRequest(name="introduced"))
        stranger.ticket.text = reply.ticket
        begin().abort()
        road.close()
        stranger.channel.close()
