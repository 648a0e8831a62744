"""A client of attnd in Python, made from proto/attn/v1/attn.proto and docs/wire.md alone.

It shares no code with libattn: that is its point. Thin here: sequences and steps, on the
coordinator. direct.py goes to the workers itself. Both take their steps over a transport of
this file: Unary (a call an operation) or Stream (all operations on one stream, tensors cut
into parts).
"""

import atexit
import os
import queue
import shutil
import sys
import tempfile

import grpc
import numpy as np
from grpc_tools import protoc

HERE = os.path.dirname(os.path.abspath(__file__))
PROTO = os.path.join(HERE, "..", "..", "proto")
PART = 2 << 20          # bytes of tensor that travel in one message
MESSAGE_MAX = 16 << 20  # bytes of a message

HEALTH = """
syntax = "proto3";
package grpc.health.v1;
message HealthCheckRequest { string service = 1; }
message HealthCheckResponse {
  enum ServingStatus { UNKNOWN = 0; SERVING = 1; NOT_SERVING = 2; SERVICE_UNKNOWN = 3; }
  ServingStatus status = 1;
}
service Health {
  rpc Check(HealthCheckRequest) returns (HealthCheckResponse);
  rpc Watch(HealthCheckRequest) returns (stream HealthCheckResponse);
}
"""


def generate():
    """Make the stubs in a temporary folder, as any user of grpcio would, and import them."""
    out = tempfile.mkdtemp(prefix="attn-wire-")
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    with open(os.path.join(out, "health.proto"), "w") as f:
        f.write(HEALTH)
    for folder, name in ((PROTO, "attn/v1/attn.proto"), (out, "health.proto")):
        outputs = [f"--python_out={out}", f"--grpc_python_out={out}"]
        if protoc.main(["", f"-I{folder}", *outputs, name]):
            raise RuntimeError(f"protoc refused {name}")
    sys.path.insert(0, out)
    from attn.v1 import attn_pb2, attn_pb2_grpc
    import health_pb2
    import health_pb2_grpc
    return attn_pb2, attn_pb2_grpc, health_pb2, health_pb2_grpc


pb, stubs, health_pb, health_stubs = generate()


class AttnError(Exception):
    """A refusal: attn_status_t, its sentence, and the gRPC code (None for a reply on a stream)."""

    def __init__(self, status, sentence, code=None):
        super().__init__(f"attn-status {status}, {code}: {sentence}")
        self.status, self.sentence, self.code = status, sentence, code


def from_rpc(error):
    """The AttnError of a failed call; its status is None if the daemon sent none."""
    trailing = dict(error.trailing_metadata() or ())
    status = trailing.get("attn-status")
    return AttnError(None if status is None else int(status), error.details() or "", error.code())


def unary(method, request, timeout=20):
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        raise from_rpc(error) from None


def connect(address, credentials=None):
    """A channel without limits of its own, so that the daemon's limits are what is tested.
    credentials: of grpc.ssl_channel_credentials(); None: plaintext."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


class Details(grpc.ClientCallDetails):
    def __init__(self, details, metadata):
        self.method, self.timeout, self.metadata = details.method, details.timeout, metadata
        self.credentials, self.wait_for_ready = details.credentials, details.wait_for_ready
        self.compression = details.compression


class Ticket(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Puts the ticket that OpenClient and KeepAlive gave into the metadata of every call."""

    def __init__(self, text=None):
        self.text = text

    def show(self, proceed, details, request):
        if self.text is not None:
            details = Details(details, [*(details.metadata or ()), ("attn-ticket", self.text)])
        return proceed(details, request)

    intercept_unary_unary = intercept_stream_stream = show


class Unary:
    """Operations of a step as unary calls. stub: of Attention or of Worker."""

    METHOD = {"begin": "Begin", "worker_begin": "Begin", "run": "Run", "commit": "Commit",
              "abort": "Abort"}

    def __init__(self, stub, timeout=20):
        self.stub, self.timeout = stub, timeout

    def call(self, op, message, data=b""):
        """Start an operation; returns what waits for its reply (and, of a run, its data)."""
        if op == "run":
            message.data = data
        future = getattr(self.stub, self.METHOD[op]).future(message, timeout=self.timeout)

        def wait():
            try:
                reply = future.result()
            except grpc.RpcError as error:
                raise from_rpc(error) from None
            return (reply, reply.data) if op == "run" else reply
        return wait

    def close(self):
        pass


class Stream:
    """Operations of steps on one bidirectional stream, answered in order."""

    def __init__(self, stub, part=PART, timeout=60):
        self.part = part
        self.requests = queue.SimpleQueue()
        self.replies = stub.Steps(iter(self.requests.get, None), timeout=timeout)

    def call(self, op, message, data=b""):
        if op != "run":
            self.requests.put(pb.StepRequest(**{op: message}))
            return lambda: getattr(self.reply(), op)
        for offset in range(0, max(len(data), 1), self.part):
            part = pb.RunRequest()
            part.CopyFrom(message)
            part.offset, part.total = offset, len(data)
            if offset:
                del part.lists[:]
            self.requests.put(pb.StepRequest(run=part, data=data[offset:offset + self.part]))
        return self.answer

    def reply(self):
        try:
            reply = next(self.replies)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except StopIteration:
            raise AttnError(None, "the stream ended without a reply") from None
        if reply.HasField("status") and reply.status.code != 0:
            raise AttnError(reply.status.code, reply.status.message)
        return reply

    def answer(self):
        """The parts of one run's answer, put together."""
        first = self.reply()
        parts, size = [first.data], len(first.data)
        while size < first.run.total:
            reply = self.reply()
            if reply.run.offset != size or reply.run.total != first.run.total:
                raise AttnError(None, f"part at {reply.run.offset} of {reply.run.total} "
                                      f"where {size} of {first.run.total} was due")
            parts.append(reply.data)
            size += len(reply.data)
        return first.run, b"".join(parts)

    def close(self):
        self.requests.put(None)
        self.replies.cancel()


class Cache:
    """An open cache, with the sizes of its rows on the wire."""

    def __init__(self, reply):
        self.id, self.geometry, self.kind = reply.cache_id, reply.geometry, reply.kind
        g, size = self.geometry, {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2}
        self.k_row = g.kv_heads * g.head_dim_k * size[g.kv_dtype]
        self.v_row = g.kv_heads * g.head_dim_v * size[g.kv_dtype]
        # 0 for what is no dtype, which the daemon refuses.
        self.q_row = lambda dtype: g.q_heads * g.head_dim_k * size.get(dtype, 0)
        self.o_row = lambda dtype: g.q_heads * g.head_dim_v * size.get(dtype, 0)


class Entry:
    """One sequence of a batch; sparse: page lists, none, one, or one per KV head; mask: rows of
    booleans, [n_q][n_new], or None; list_room: pages of lists that come with a run."""

    def __init__(self, seq, base, n_q, n_new, sparse=(), mask=None, list_room=0):
        self.seq, self.base, self.n_q, self.n_new, self.sparse = seq, base, n_q, n_new, sparse
        self.mask, self.list_room = mask, list_room

    def pages(self):
        return page_lists(self.sparse)

    def mask_bytes(self):
        return b"" if self.mask is None else \
            np.packbits(self.mask, axis=1, bitorder="little").tobytes()


def page_lists(lists):
    return [pb.PageList(pages=pages) for pages in lists]


def entry_lists(lists):
    """Lists of a run, by number of their entry in the batch, as messages."""
    return [pb.EntryLists(entry=i, sparse=page_lists(lists[i])) for i in sorted(lists)]


class Client:
    """The thin client: everything through the coordinator."""

    def __init__(self, address, name="wire-test", credentials=None):
        self.address, self.credentials, self.ticket = address, credentials, Ticket()
        self.channel = self.connect(address)
        self.attention = stubs.AttentionStub(self.channel)
        reply = unary(self.attention.OpenClient, pb.OpenClientRequest(name=name))
        self.id, self.lease_ms, self.ticket.text = reply.client_id, reply.lease_ms, reply.ticket

    def connect(self, address):
        """A channel to a daemon of the cluster that shows this client's ticket."""
        return grpc.intercept_channel(connect(address, self.credentials), self.ticket)

    def close(self):
        unary(self.attention.CloseClient, pb.ClientRequest(client_id=self.id))
        self.channel.close()

    def keep_alive(self):
        reply = unary(self.attention.KeepAlive, pb.ClientRequest(client_id=self.id))
        self.ticket.text = reply.ticket

    def status(self):
        return unary(self.attention.ClusterStatus, pb.Empty())

    def open_cache(self, name, **geometry):
        return Cache(unary(self.attention.OpenCache, pb.OpenCacheRequest(
            client_id=self.id, name=name, geometry=pb.Geometry(**geometry))))

    def close_cache(self, cache):
        unary(self.attention.CloseCache, pb.CloseCacheRequest(client_id=self.id, cache_id=cache.id))

    def create(self, cache, expected_tokens=0):
        return unary(self.attention.CreateSequence, pb.CreateSequenceRequest(
            cache_id=cache.id, client_id=self.id, expected_tokens=expected_tokens)).seq

    def fork(self, cache, seq, length):
        return unary(self.attention.ForkSequence, pb.ForkSequenceRequest(
            cache_id=cache.id, client_id=self.id, seq=seq, length=length)).seq

    def truncate(self, cache, seq, length):
        unary(self.attention.TruncateSequence, pb.TruncateSequenceRequest(
            cache_id=cache.id, seq=seq, length=length))

    def free(self, cache, seq):
        unary(self.attention.FreeSequence, pb.SequenceRequest(cache_id=cache.id, seq=seq))

    def describe(self, cache, seq):
        return unary(self.attention.DescribeSequence,
                     pb.SequenceRequest(cache_id=cache.id, seq=seq))

    def export(self, cache, seq, layer, first, end):
        """k and v of tokens [first, end) of a layer, as bytes."""
        k, v, version, g = b"", b"", 0, cache.geometry
        while first < end:
            part = unary(self.attention.Export, pb.ExportRequest(
                cache_id=cache.id, seq=seq, layer=layer, first=first, end=end, version=version))
            cut = len(part.data) * g.head_dim_k // (g.head_dim_k + g.head_dim_v)
            k, v = k + part.data[:cut], v + part.data[cut:]
            first, version = first + part.n, part.version
        return k, v

    def unary(self):
        return Unary(self.attention)

    def stream(self, part=PART):
        return Stream(self.attention, part)

    def begin(self, steps, cache, entries, **options):
        return Step(steps, cache, entries, **options)


class Step:
    """A step of the thin client, over either transport."""

    def __init__(self, steps, cache, entries, q_dtype, o_dtype=0, want_lse=False, timeout_ms=0):
        self.steps = steps
        request = pb.BeginStepRequest(cache_id=cache.id, q_dtype=q_dtype, o_dtype=o_dtype,
                                      want_lse=want_lse, timeout_ms=timeout_ms)
        for entry in entries:
            request.entries.add(seq=entry.seq, base_position=entry.base, n_q=entry.n_q,
                                n_new=entry.n_new, sparse=entry.pages(),
                                mask=entry.mask_bytes(), list_room=entry.list_room)
        self.o_bytes = sum(entry.n_q for entry in entries) * cache.o_row(o_dtype or q_dtype)
        self.id = steps.call("begin", request)().step_id

    def run(self, layer, q=b"", k=b"", v=b"", no_kv=False, no_q=False, lists=None):
        """One layer. Returns the bytes of o and of the LSE. lists: by entry, for this run."""
        request = pb.RunRequest(step_id=self.id, layer=layer, no_kv=no_kv, no_q=no_q,
                                lists=entry_lists(lists or {}))
        _, data = self.steps.call("run", request, q + k + v)()
        return data[:self.o_bytes], data[self.o_bytes:]

    def commit(self, accepted=(), paths=()):
        """paths: of the entries with a mask, in the batch's order."""
        self.steps.call("commit", pb.CommitRequest(step_id=self.id, accepted=accepted,
                                                   path=[t for path in paths for t in path]))()

    def abort(self):
        self.steps.call("abort", pb.AbortRequest(step_id=self.id))()
