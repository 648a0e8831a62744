#!/usr/bin/env python3
"""Write the seeds of tests/fuzz/corpus: well-formed inputs from which the fuzzers start.

    tests/fuzz/seeds.py PYTHONPATH_OF_attn_pb2

Needs attn_pb2 (protoc --python_out), and no more.
"""
import pathlib
import struct
import sys

sys.path.insert(0, sys.argv[1])
import attn_pb2 as pb  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent / "corpus"
F32 = pb.DTYPE_F32
SEQ = 1 << 32  # the first of a coordinator without a seed
GEOMETRY = dict(layers=1, q_heads=2, kv_heads=1, head_dim_k=32, head_dim_v=32, kv_dtype=F32,
                page_size=16, chunk_size=256, region_bytes=1 << 20)


def methods(*services):
    """Paths of the services' methods and the bytes that name them: path_byte() of fake_rpc.c."""
    numbers = {}
    for service in services:
        for method in pb.DESCRIPTOR.services_by_name[service].methods:
            path = f"/attn.v1.{service}/{method.name}"
            h = 2166136261
            for byte in path.encode():
                h = ((h ^ byte) * 16777619) & 0xffffffff
            numbers[path] = (h ^ h >> 8 ^ h >> 16 ^ h >> 24) & 0xff
    assert len(set(numbers.values())) == len(numbers), "two paths have one byte"
    return numbers


def bytes_of(message):
    return message.SerializeToString()


def sized(data):
    return struct.pack("<H", len(data)) + data


def write(target, name, data):
    folder = HERE / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


class Records:
    """Calls of a server, as serve.h reads them."""

    def __init__(self, paths):
        self.paths, self.data = paths, b""

    def call(self, path, message):
        self.data += bytes([0, self.paths[path]]) + sized(bytes_of(message))
        return self

    def end(self, path, broken=False):
        self.data += bytes([0x83 if broken else 3, self.paths[path]])
        return self


def tensors(rows):
    """q, k and v of `rows` tokens."""
    return struct.pack("<%df" % (rows * 128), *[((i * 37) % 101 - 50) / 50 for i in range(rows * 128)])


def worker_begin(step, base, n, **more):
    chunks = [pb.ChunkRef(chunk=5, number=0, generation=1 if base else 0, length=base, n_new=n)]
    entry = pb.WorkerEntry(seq=3, base_position=base, n_q=n, n_new=n, chunks=chunks, **more)
    return pb.WorkerBeginRequest(cache_id=77, step_id=step, entries=[entry], q_dtype=F32,
                                 o_dtype=F32, want_lse=True, timeout_ms=1000)


def worker_seeds():
    paths = methods("Worker")
    W = "/attn.v1.Worker/"

    def opened():
        return Records(paths).call(W + "OpenCache", pb.WorkerOpenCacheRequest(
            cache_id=77, name="c", geometry=pb.Geometry(**GEOMETRY)))

    unary = (opened().call(W + "Begin", worker_begin(9, 0, 2))
             .call(W + "Run", pb.RunRequest(step_id=9, layer=0, data=tensors(2)))
             .call(W + "Commit", pb.CommitRequest(step_id=9))
             .call(W + "Begin", worker_begin(10, 2, 1))
             .call(W + "Run", pb.RunRequest(step_id=10, layer=0, data=tensors(1)))
             .call(W + "Abort", pb.AbortRequest(step_id=10))
             .call(W + "ForkChunk", pb.ForkChunkRequest(cache_id=77, **{"from": 5}, length=1, to=6))
             .call(W + "TruncateChunk", pb.TruncateChunkRequest(cache_id=77, chunk=5, generation=1, length=1))
             .call(W + "DescribeChunks", pb.DescribeChunksRequest(cache_id=77, chunks=[5, 6], seqs=[3]))
             .call(W + "ReleaseChunks", pb.ReleaseChunksRequest(cache_id=77, chunks=[5, 6]))
             .call(W + "Status", pb.Empty())
             .call(W + "CloseCache", pb.WorkerCloseCacheRequest(cache_id=77)))
    write("worker_fuzz", "unary", b"\0" + unary.data)

    S = W + "Steps"
    data = tensors(3)
    stream = (opened().call(S, pb.StepRequest(worker_begin=worker_begin(11, 0, 3)))
              .call(S, pb.StepRequest(run=pb.RunRequest(step_id=11, total=len(data)), data=data[:100]))
              .call(S, pb.StepRequest(run=pb.RunRequest(step_id=11, total=len(data), offset=100), data=data[100:]))
              .call(S, pb.StepRequest(run=pb.RunRequest(step_id=11, no_kv=True), data=data[:768]))
              .call(S, pb.StepRequest(commit=pb.CommitRequest(step_id=11, accepted=[2])))
              .end(S))
    write("worker_fuzz", "stream", b"\0" + stream.data)
    partials = (opened().call(S, pb.StepRequest(worker_begin=worker_begin(
        12, 0, 2, nodes=[pb.Node(level=0, index=0)], sparse=[pb.PageList(pages=[0])])))
        .call(S, pb.StepRequest(run=pb.RunRequest(step_id=12), data=tensors(2)))
        .end(S, broken=True))
    write("worker_fuzz", "partials", b"\0" + partials.data)
    # A chunk that comes in two parts, of zeros, and then leaves.
    parts = [pb.ExportChunkReply(checksum=checksum, data=b"\0" * 512)
             for checksum in (0x8707d5cb961e102d, 0xe2201de3538f6f81)]
    copy = dict(cache_id=77, chunk=5, generation=1, source="127.0.0.1:9", copy=8)
    leave = dict(cache_id=77, chunk=8, move=9)
    moved = (opened().call(W + "CopyChunk", pb.CopyChunkRequest(length=2, **copy))
             .call(W + "LeaveChunk", pb.LeaveChunkRequest(what=0, hold_ms=1000, **leave))
             .call(W + "CopyChunk", pb.CopyChunkRequest(first=2, length=4, timeout_ms=50, **copy))
             .call(W + "LeaveChunk", pb.LeaveChunkRequest(what=1, generation=1, length=4, **leave))
             .call(W + "Begin", worker_begin(9, 0, 2))
             .call(W + "LeaveChunk", pb.LeaveChunkRequest(what=2, **leave))
             .call(W + "ExportChunks", pb.ExportChunkRequest(cache_id=77, chunk=8, generation=1, first=1, n=3))
             .call(W + "ExportChunks", pb.ExportChunkRequest(cache_id=77, chunk=8, generation=2, n=1))
             .call(W + "ReleaseChunks", pb.ReleaseChunksRequest(cache_id=77, chunks=[8])))
    answers = b"".join(b"\0" + sized(bytes_of(part)) for part in parts)
    write("worker_fuzz", "copy", b"\2" + sized(answers) + moved.data)
    ticket = b"1.c.17.1." + b"0f" * 32
    write("worker_fuzz", "ticket", b"\1" + sized(ticket) + unary.data[:200])


def coordinator_seeds():
    paths = methods("Attention", "Coordinator")
    A, C = "/attn.v1.Attention/", "/attn.v1.Coordinator/"
    # Ids that the coordinator of coordinator_fuzz.c gives: see start() there.
    opened = (Records(paths).call(A + "OpenClient", pb.OpenClientRequest(name="f"))
              .call(A + "OpenCache", pb.OpenCacheRequest(client_id=1, name="c", geometry=pb.Geometry(**GEOMETRY)))
              .call(A + "CreateSequence", pb.CreateSequenceRequest(cache_id=1, client_id=1))
              .call(A + "Begin", pb.BeginStepRequest(cache_id=1, q_dtype=F32, timeout_ms=500, entries=[
                  pb.BatchEntry(seq=SEQ, n_q=2, n_new=2)]))
              .call(A + "DescribeSequence", pb.SequenceRequest(cache_id=1, seq=SEQ))
              .call(A + "ForkSequence", pb.ForkSequenceRequest(cache_id=1, client_id=1, seq=SEQ, length=1))
              .call(A + "TruncateSequence", pb.TruncateSequenceRequest(cache_id=1, seq=SEQ, length=1))
              .call(C + "Layout", pb.LayoutRequest(cache_id=1, seqs=[SEQ], tokens=[300]))
              .call(A + "KeepAlive", pb.ClientRequest(client_id=1))
              .call(A + "ClusterStatus", pb.Empty())
              .call(A + "FreeSequence", pb.SequenceRequest(cache_id=1, seq=SEQ))
              .call(A + "CloseCache", pb.CloseCacheRequest(cache_id=1, client_id=1))
              .call(A + "CloseClient", pb.ClientRequest(client_id=1)))
    write("coordinator_fuzz", "life", opened.data)
    S = A + "Steps"
    data = tensors(2)
    step = pb.BeginStepRequest(cache_id=1, q_dtype=F32, entries=[pb.BatchEntry(seq=SEQ, n_q=2, n_new=2)])
    move = (Records(paths).call(A + "OpenClient", pb.OpenClientRequest(name="f"))
            .call(A + "OpenCache", pb.OpenCacheRequest(client_id=1, name="c", geometry=pb.Geometry(**GEOMETRY)))
            .call(A + "CreateSequence", pb.CreateSequenceRequest(cache_id=1, client_id=1))
            .call(S, pb.StepRequest(begin=step))
            .call(S, pb.StepRequest(run=pb.RunRequest(step_id=1), data=data))
            .call(S, pb.StepRequest(commit=pb.CommitRequest(step_id=1))).end(S)
            .call(A + "MoveSequence", pb.MoveSequenceRequest(cache_id=1, seq=SEQ, to=1))
            .call(A + "MoveSequence", pb.MoveSequenceRequest(cache_id=1, seq=SEQ, to=2))
            .call(A + "DrainWorker", pb.DrainWorkerRequest(worker=2))
            .call(A + "DrainWorker", pb.DrainWorkerRequest(worker=2, stay=True))
            .call(A + "DescribeSequence", pb.SequenceRequest(cache_id=1, seq=SEQ)))
    write("coordinator_fuzz", "move", move.data)
    stream = (Records(paths).call(A + "OpenClient", pb.OpenClientRequest(name="f"))
              .call(A + "OpenCache", pb.OpenCacheRequest(client_id=1, name="c", geometry=pb.Geometry(**GEOMETRY)))
              .call(A + "CreateSequence", pb.CreateSequenceRequest(cache_id=1, client_id=1))
              .call(S, pb.StepRequest(begin=pb.BeginStepRequest(
                  cache_id=1, q_dtype=F32, want_lse=True, entries=[pb.BatchEntry(seq=SEQ, n_q=2, n_new=2)])))
              .call(S, pb.StepRequest(run=pb.RunRequest(step_id=1), data=data))
              .call(S, pb.StepRequest(commit=pb.CommitRequest(step_id=1)))
              .call(S, pb.StepRequest(begin=pb.BeginStepRequest(
                  cache_id=1, q_dtype=F32, entries=[pb.BatchEntry(seq=SEQ, base_position=2, n_q=1, n_new=1)])))
              .call(S, pb.StepRequest(abort=pb.AbortRequest(step_id=2))).end(S)
              .call(A + "Begin", pb.BeginStepRequest(cache_id=1, q_dtype=F32, timeout_ms=500, entries=[
                  pb.BatchEntry(seq=SEQ, base_position=2, n_q=2, n_new=2)]))
              .call(A + "Run", pb.RunRequest(step_id=3, data=data))
              .call(A + "Commit", pb.CommitRequest(step_id=3, accepted=[1])))
    write("coordinator_fuzz", "stream", stream.data)
    info = pb.WorkerInfo(address="127.0.0.1:9", kind="cpu-avx2/1/128-128", slab_bytes=1 << 20, incarnation=4)
    members = (Records(paths).call(C + "Join", pb.JoinRequest(worker=info, read_bandwidth=1e9))
               .call(C + "Heartbeat", pb.HeartbeatRequest(worker=pb.WorkerInfo(id=3, incarnation=4))))
    write("coordinator_fuzz", "members", members.data)


def client_seeds():
    def answer(message):
        return bytes([0]) + sized(bytes_of(message))

    geometry = pb.Geometry(**GEOMETRY)
    geometry.layer_table.add()
    o = b"\0" * (2 * 32 * 4 + 2 * 4)
    chunk = pb.ChunkInfo(chunk=5, worker=1)
    worker = pb.WorkerInfo(id=1, alive=True, address="127.0.0.1:9")
    layout = pb.LayoutReply(epoch=1, workers=[worker], layouts=[pb.SequenceLayout(seq=3, chunks=[chunk])])
    answers = [
        pb.OpenClientReply(client_id=1, lease_ms=30000),
        pb.OpenCacheReply(cache_id=1, geometry=geometry, epoch=1, kind="cpu-avx2/1/128-128"),
        pb.SequenceReply(seq=3),
        layout,
        pb.StepReply(worker_begin=pb.WorkerBeginReply(o_bytes=256, lse_bytes=8)),
        pb.StepReply(run=pb.RunReply(total=len(o)), data=o),
        pb.StepReply(commit=pb.Empty()),
        pb.DescribeSequenceReply(length=1, chunks=[pb.ChunkInfo(chunk=5, length=1, generation=1, worker=1)]),
        pb.SequenceReply(seq=4),
    ]
    write("client_fuzz", "life", b"\0" + b"".join(map(answer, answers)))
    status = pb.ClusterStatusReply(epoch=1, workers=[worker])
    write("client_fuzz", "status", b"\4" + b"".join(map(answer, [answers[0], status] + answers[1:])))
    write("client_fuzz", "join", b"\1" + b"".join(map(answer, answers)))


def message_seeds():
    samples = {0: pb.Geometry(**GEOMETRY), 13: pb.BeginStepRequest(cache_id=1, entries=[
        pb.BatchEntry(seq=SEQ, n_q=1, n_new=1, sparse=[pb.PageList(pages=[0, 1])])]),
        15: pb.RunRequest(step_id=1, layer=2, data=b"0123456789abcdef"),
        19: pb.StepRequest(run=pb.RunRequest(step_id=1), data=b"x" * 100),
        20: pb.StepReply(status=pb.Status(code=-1, message="no")),
        21: pb.ClusterStatusReply(epoch=1, workers=[pb.WorkerInfo(id=1, address="a")]),
        36: worker_begin(1, 0, 2)}
    for number, message in samples.items():
        write("message_fuzz", "type%d" % number, bytes([number]) + bytes_of(message))
    # A finding: data's length, 0, in six bytes, which protobuf-c refuses.
    write("message_fuzz", "long_length",
          b"\x0f\x08\x01z\x80\x80\x80\x80\x80\x00z\x00z\x00")


def gguf_seeds():
    def text(s):
        return struct.pack("<Q", len(s)) + s

    def key(name, kind, value):
        return text(name) + struct.pack("<I", kind) + value

    def texts(items):
        return struct.pack("<IQ", 8, len(items)) + b"".join(text(i) for i in items)

    u32, f32 = (lambda v: struct.pack("<I", v)), (lambda v: struct.pack("<f", v))
    keys = [
        key(b"general.architecture", 8, text(b"llama")),
        key(b"llama.block_count", 4, u32(1)), key(b"llama.embedding_length", 4, u32(32)),
        key(b"llama.attention.head_count", 4, u32(1)), key(b"llama.attention.head_count_kv", 4, u32(1)),
        key(b"llama.feed_forward_length", 4, u32(32)), key(b"llama.context_length", 4, u32(64)),
        key(b"llama.vocab_size", 4, u32(4)), key(b"llama.rope.dimension_count", 4, u32(32)),
        key(b"llama.rope.freq_base", 6, f32(10000)),
        key(b"llama.attention.layer_norm_rms_epsilon", 6, f32(1e-5)),
        key(b"tokenizer.ggml.model", 8, text(b"gpt2")), key(b"tokenizer.ggml.pre", 8, text(b"smollm")),
        key(b"tokenizer.ggml.tokens", 9, texts([b"a", b"b", b"ab", b"<|im_end|>"])),
        key(b"tokenizer.ggml.merges", 9, texts([b"a b"])),
        key(b"tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 1, 1, 1, 3)),
    ]
    names = [(b"token_embd.weight", 32, 4), (b"output_norm.weight", 32, 0)]
    for part in (b"attn_q", b"attn_k", b"attn_v", b"attn_output", b"ffn_gate", b"ffn_up", b"ffn_down"):
        names.append((b"blk.0." + part + b".weight", 32, 32))
    for part in (b"attn_norm", b"ffn_norm"):
        names.append((b"blk.0." + part + b".weight", 32, 0))
    infos, offset = b"", 0
    for name, columns, rows in names:
        dims = [columns, rows] if rows else [columns]
        infos += text(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, 0, offset)
        offset += columns * max(rows, 1) * 4
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(keys)) + b"".join(keys) + infos
    write("gguf_fuzz", "keys", b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))
    head += b"\0" * (-len(head) % 32)
    write("gguf_fuzz", "model", head + b"\0" * min(offset, 3000))
    small = [n for n in names[:2]]
    infos = b""
    for i, (name, columns, rows) in enumerate(small):
        dims = [columns, rows] if rows else [columns]
        infos += text(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, 0, i * 512)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(keys)) + b"".join(keys) + infos
    write("gguf_fuzz", "two", head + b"\0" * (-len(head) % 32) + b"\0" * 640)


def config_seeds():
    write("config_fuzz", "worker", b"\0# a worker\nlog-level = info\n[worker]\nslab = 64MiB\nthreads = 2\n"
                                   b"coordinator = 127.0.0.1:7070\nlisten = 127.0.0.1:0\n")
    write("config_fuzz", "coordinator", b"\1[coordinator]\nlisten = 127.0.0.1:7070\nlease-ms = 30s\n; end\n")
    write("config_fuzz", "dev", b"\2[dev]\nworkers = 4\n")
    write("config_fuzz", "target", b"\3inproc://cpu?workers=4&threads=2&slab=1GiB")
    write("config_fuzz", "address", b"\3[::1]:7070")


worker_seeds()
coordinator_seeds()
client_seeds()
message_seeds()
gguf_seeds()
config_seeds()
