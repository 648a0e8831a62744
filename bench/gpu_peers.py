"""Others' attention kernels on the points of bench/gpu: FlashInfer's, cuDNN's and PyTorch's.

    gpu_peers.py        requests from standard input, results to standard output, JSON a line each

A request is {"limit": true}, or {"point": a line of bench_gpu --list, "peers": [name ...]}. Before
a peer is tried it is named ({"case", "peer", "began": true}), so that whoever asks knows which one
broke the device; {"case", "done": true} ends an answer.

All of it as bench_gpu does it: bf16, pages in random order, rotating sets of pages that exceed the
L2, medians of replays of a CUDA graph, the answer held against sums in float64 before it is timed.
FlashInfer's pages are [page][K, V][token][head][column]; cuDNN and PyTorch get contiguous K and V.
Plans are timed apart: they are made once a step, not once a layer.
"""

import gc
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import flashinfer
    WITHOUT_FLASHINFER = None
except Exception as reason:  # a broken installation raises all kinds of things
    flashinfer = None
    WITHOUT_FLASHINFER = f"{type(reason).__name__}: {reason}".split("\n")[0][:200]

BF16 = torch.bfloat16
REPLAYS, WARM = 9, 2
GRAPH_BYTES, REPS_MAX = 4e9, 8
WORKSPACE = 512 << 20


class Refused(Exception):
    """The peer cannot serve the point; says why."""


# ---- a point's tensors ----

class Batch:
    """K, V, queries and page lists of all rotations of a point."""

    def __init__(self, point, device):
        self.point, self.device, self.scratch = point, device, {}
        self.heads, self.kv_heads = point["q_heads"], point["kv_heads"]
        self.d, self.page, self.turns = point["d"], point["page"], point["turns"]
        self.queries = point["queries"]
        full = [-(-length // self.page) for length in point["lengths"]]
        kept = point["kept"]
        self.counts = [kept] * len(full) if kept else full  # pages that are attended to
        self.lengths = [(n - 1) * self.page + (length - 1) % self.page + 1
                        for n, length in zip(self.counts, point["lengths"])]
        self.indptr = [0]
        for n in self.counts:
            self.indptr.append(self.indptr[-1] + n)
        self.prefix = point["shared"] // self.page
        own = sum(full) - self.prefix * (len(full) - 1) if self.prefix else sum(full)
        self.own, self.full = own, full
        self.pool = torch.empty(self.turns * own, 2, self.page, self.kv_heads, self.d,
                                device=device, dtype=BF16)
        # In parts: a generator of a tensor of more than 2^31 elements is slow.
        for part in self.pool.split(max(1, (1 << 28) // self.pool[0].numel())):
            part.uniform_(-2, 2)
        order = torch.randperm(self.turns * own, dtype=torch.int64).to(torch.int32)
        self.index = [self.lay(order[turn * own:(turn + 1) * own]) for turn in range(self.turns)]
        self.q = [torch.empty(sum(self.queries), self.heads, self.d, device=device,
                              dtype=BF16).uniform_(-2, 2) for _ in range(self.turns)]
        self.o = [torch.empty_like(q) for q in self.q]

    def lay(self, order):
        """Pages of all requests, one behind the other: the prefix is the same in all."""
        lists, at = [], self.prefix
        for n, kept in zip(self.full, self.counts):
            mine = torch.cat([order[:self.prefix], order[at:at + n - self.prefix]])
            at += n - self.prefix
            if kept < n:  # some pages, the last among them
                some = torch.randperm(n - 1)[:kept - 1].sort().values
                mine = torch.cat([mine[some], mine[-1:]])
            lists.append(mine)
        return torch.cat(lists)

    def ints(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def last(self):
        return self.ints([(length - 1) % self.page + 1 for length in self.lengths])

    def table(self, turn):
        """Page lists as rows of equal length, which some kernels want."""
        rows = torch.zeros(len(self.counts), max(self.counts), dtype=torch.int32)
        for i, n in enumerate(self.counts):
            rows[i, :n] = self.index[turn][self.indptr[i]:self.indptr[i + 1]]
        return rows.to(self.device)

    def contiguous(self, turn):
        """K and V of a rotation as [request][head][token][column], in the pool's memory."""
        n, length = len(self.lengths), self.lengths[0]
        size = n * length * self.kv_heads * self.d
        flat = self.pool[turn * self.own:(turn + 1) * self.own].view(-1)
        shape = (n, self.kv_heads, length, self.d)
        return flat[:size].view(shape), flat[size:2 * size].view(shape)

    def starts(self):
        total = [0]
        for n in self.queries:
            total.append(total[-1] + n)
        return total


# ---- right or wrong ----

def rows_of(batch, turn, request, contiguous):
    """K and V that a request attends to: functions of a KV head to [token][column]."""
    if contiguous:
        k, v = batch.contiguous(turn)
        return lambda head: k[request, head], lambda head: v[request, head]
    pages = batch.index[turn][batch.indptr[request]:batch.indptr[request + 1]]
    pages = pages.to(batch.device).long()
    shape = (-1, batch.d)
    return (lambda head: batch.pool[pages, 0, :, head].reshape(shape),
            lambda head: batch.pool[pages, 1, :, head].reshape(shape))


def error_of(batch, turn, answer, contiguous):
    """The largest |got - want| / |want| of a few rows; infinity for what is no number."""
    last, heads = len(batch.lengths) - 1, batch.heads
    rows = [(last, batch.queries[last] - 1, 0), (last, batch.queries[last] - 1, heads - 1),
            (0, 0, heads // 2)]
    starts, worst = batch.starts(), 0.0
    for request, query, head in rows:
        seen = batch.lengths[request] - batch.queries[request] + query + 1
        k_of, v_of = rows_of(batch, turn, request, contiguous)
        kv_head = head // (heads // batch.kv_heads)
        row = starts[request] + query
        q = batch.q[turn][row, head].double()
        weights = torch.softmax(k_of(kv_head)[:seen].double() @ q * batch.d ** -0.5, 0)
        want = weights @ v_of(kv_head)[:seen].double()
        got = answer.view(-1, heads, batch.d)[row, head].double()
        error = ((got - want).norm() / want.norm()).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


# ---- peers ----
#
# Each is a function of a batch and a rotation that returns (call, plan, keep): call() answers and
# returns the answer; plan() plans, or is None; keep is what must outlive the call.

def scratch(batch, name):
    """Memory that a peer works in: its rotations come one after the other, so they share it."""
    if name not in batch.scratch:
        batch.scratch[name] = torch.zeros(WORKSPACE, dtype=torch.uint8, device=batch.device)
    return batch.scratch[name]


def decode_wrapper(tensor_cores):
    def peer(batch, turn):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            scratch(batch, "decode"), "NHD", use_tensor_cores=tensor_cores, backend="fa2")
        where = (batch.ints(batch.indptr), batch.index[turn].to(batch.device), batch.last())
        q, o = batch.q[turn], batch.o[turn]
        plan = lambda: wrapper.plan(*where, batch.heads, batch.kv_heads, batch.d, batch.page,
                                    q_data_type=BF16, kv_data_type=BF16)
        return lambda: wrapper.run(q, batch.pool, out=o), plan, wrapper
    return peer


def xqa(batch, turn):
    if batch.page < 16:
        raise Refused("pages of at least 16")
    table, lengths = batch.table(turn), batch.ints(batch.lengths)
    space = torch.zeros(64 << 20, dtype=torch.uint8, device=batch.device)
    q, o, longest = batch.q[turn], batch.o[turn], max(batch.lengths)
    k, v = batch.pool[:, 0], batch.pool[:, 1]
    call = lambda: flashinfer.decode.xqa_batch_decode_with_kv_cache(
        q, (k, v), space, table, lengths, longest, bmm1_scale=batch.d ** -0.5, bmm2_scale=1.0,
        out=o, kv_layout="NHD")
    return call, None, (table, lengths, space)


def holistic(batch, turn):
    wrapper = flashinfer.BatchAttention("NHD", "cuda")
    where = (batch.ints(batch.starts()), batch.ints(batch.indptr),
             batch.index[turn].to(batch.device), batch.ints(batch.lengths))
    q, o = batch.q[turn], batch.o[turn]
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=batch.device)
    plan = lambda: wrapper.plan(*where, batch.heads, batch.kv_heads, batch.d, batch.d, batch.page,
                                causal=False, q_data_type=BF16, kv_data_type=BF16)

    def call():
        wrapper.run(q, batch.pool, out=o, lse=lse)
        return o
    return call, plan, (wrapper, lse)


def cascade(batch, turn):
    if not batch.prefix:
        raise Refused("a prefix in common")
    n, suffixes = len(batch.lengths), [count - batch.prefix for count in batch.counts]
    ends = [sum(suffixes[:i]) for i in range(n + 1)]
    index = batch.index[turn].to(batch.device)
    own = torch.cat([index[batch.indptr[i] + batch.prefix:batch.indptr[i + 1]] for i in range(n)])
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, scratch(batch, "cascade"),
                                                           "NHD")
    q = batch.q[turn]
    plan = lambda: wrapper.plan(
        [batch.ints([0, n]), batch.ints(batch.starts())],
        [batch.ints([0, batch.prefix]), batch.ints(ends)], [index[:batch.prefix].clone(), own],
        [batch.ints([batch.page]), batch.last()], batch.heads, batch.kv_heads, batch.d, batch.page,
        q_data_type=BF16)
    return lambda: wrapper.run(q, batch.pool), plan, wrapper


def prefill_wrapper(backend):
    def peer(batch, turn):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            scratch(batch, "prefill"), "NHD", backend=backend)
        where = (batch.ints(batch.starts()), batch.ints(batch.indptr),
                 batch.index[turn].to(batch.device), batch.last())
        q, o = batch.q[turn], batch.o[turn]
        plan = lambda: wrapper.plan(*where, batch.heads, batch.kv_heads, batch.d, batch.page,
                                    causal=True, q_data_type=BF16, kv_data_type=BF16)
        return lambda: wrapper.run(q, batch.pool, out=o), plan, wrapper
    return peer


def fmha_v2(batch, turn):
    if batch.page & (batch.page - 1) or batch.page < 8:
        raise Refused("pages of a power of two, at least 8")
    table, lengths = batch.table(turn), batch.ints(batch.lengths)
    tokens = [0]
    for length in batch.lengths:
        tokens.append(tokens[-1] + length)
    q_ends, kv_ends = batch.ints(batch.starts()), batch.ints(tokens)
    q, o = batch.q[turn], batch.o[turn]
    call = lambda: flashinfer.prefill.trtllm_fmha_v2_prefill(
        (q, batch.pool), "Q_PAGED_KV_NHD", scratch(batch, "fmha_v2"), lengths, max(batch.queries),
        max(batch.lengths), batch.d ** -0.5, 1.0, len(batch.lengths), q_ends, kv_ends,
        block_tables=table, out=o)

    def answer():
        call()
        return o
    return answer, None, (table, lengths, q_ends, kv_ends)


def contiguous(backend):
    def peer(batch, turn):
        n, q_n, length = len(batch.lengths), batch.queries[0], batch.lengths[0]
        if len(set(batch.lengths)) > 1 or len(set(batch.queries)) > 1:
            raise Refused("requests of one length")
        if batch.prefix or batch.point["kept"]:
            raise Refused("contiguous K and V")
        if q_n > 1 and q_n != length:
            raise Refused("as many queries as tokens, or one")
        k, v = batch.contiguous(turn)
        q = batch.q[turn].view(n, q_n, batch.heads, batch.d).transpose(1, 2).contiguous()

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=q_n > 1, enable_gqa=True)
        return call, None, (q, k, v)
    return peer


CONTIGUOUS = ("cudnn", "sdpa")
DECODE = {"fi_tc": decode_wrapper(True), "fi_cuda": decode_wrapper(False), "xqa": xqa,
          "holistic": holistic, "cudnn": contiguous(SDPBackend.CUDNN_ATTENTION),
          "sdpa": contiguous(SDPBackend.FLASH_ATTENTION)}
PREFILL = {"fa2": prefill_wrapper("fa2"), "fa3": prefill_wrapper("fa3"), "fmha_v2": fmha_v2,
           "cudnn": DECODE["cudnn"], "sdpa": DECODE["sdpa"]}
PEERS = {"decode": DECODE, "skewed": DECODE, "sparse": DECODE,
         "shared": {"cascade": cascade, **DECODE}, "prefill": PREFILL}


# ---- time ----

def planned(plan):
    torch.cuda.synchronize()
    start = time.perf_counter()
    plan()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def replay(calls, reps):
    """Microseconds of a call: median, least and most of the replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    times = []
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(reps):
                for call in calls:
                    call()
        for _ in range(WARM + REPLAYS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            stop.record(stream)
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / (reps * len(calls)))
    return statistics.median(times[WARM:]), min(times[WARM:]), max(times[WARM:])


def measure(batch, name):
    """One peer on one point: what is written of it."""
    peer = PEERS[batch.point["kind"]][name]
    calls, keep, plans = [], [], []
    for turn in range(batch.turns):
        call, plan, kept = peer(batch, turn)
        if plan is not None:
            plans.append(planned(plan))
        calls.append(call)
        keep.append(kept)
    batch.o[0].fill_(float("nan"))
    answer = calls[0]()
    answer = batch.o[0] if answer is None else answer
    if name in CONTIGUOUS:  # [request][head][query][column]
        answer = answer.transpose(1, 2).contiguous()
    error = error_of(batch, 0, answer, name in CONTIGUOUS)
    work = max(batch.point["bytes"], batch.point["flops"] / 100) * batch.turns
    reps = max(1, min(REPS_MAX, int(GRAPH_BYTES / work)))
    us, least, most = replay(calls, reps)
    row = {"us": us, "least_us": least, "most_us": most,
           "error": error if error < float("inf") else None}
    if plans:
        row["plan_us"] = statistics.median(plans[1:] or plans)
    return row


def refusal(error):
    text = str(error).strip().split("\n")
    return f"{type(error).__name__}: {text[0]}"[:200]


def answer_point(request, tell):
    point = request["point"]
    name = point["case"]
    try:
        batch = Batch(point, torch.device("cuda:0"))
    except torch.OutOfMemoryError as error:
        for peer in request["peers"]:
            tell({"case": name, "peer": peer, "refused": refusal(error)})
        return
    for peer in request["peers"]:
        tell({"case": name, "peer": peer, "began": True})
        if peer not in CONTIGUOUS and flashinfer is None:
            row = {"refused": "FlashInfer is not there"}
        else:
            try:
                row = measure(batch, peer)
            except Refused as error:
                row = {"refused": f"wants {error}"}
            except Exception as error:  # what others refuse, they refuse in many ways
                row = {"refused": refusal(error)}
        tell({"case": name, "peer": peer, **row})
        torch.cuda.synchronize()  # what broke the device ends the process here, under its name


# ---- limits ----

def matmul_rate(n=8192):
    """Operations per second of a product of n x n matrices."""
    a, b = (torch.empty(n, n, device="cuda:0", dtype=BF16).uniform_(-2, 2) for _ in range(2))
    out = torch.empty_like(a)
    us, _, _ = replay([lambda: torch.mm(a, b, out=out)], 8)
    return 2 * n ** 3 / us * 1e6


def read_rate():
    x = torch.empty(1 << 30, device="cuda:0").fill_(1)
    us, _, _ = replay([lambda: x.sum()], 1)
    return x.numel() * 4 / us * 1e6


def limits():
    versions = {"PyTorch": torch.__version__, "CUDA": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    absent = {}
    if flashinfer is not None:
        versions["FlashInfer"] = getattr(flashinfer, "__version__", "?")
    else:
        absent["FlashInfer"] = WITHOUT_FLASHINFER
    return {"case": "limit", "device": torch.cuda.get_device_name(0), "matmul": matmul_rate(),
            "read_sum": read_rate(), "versions": versions, "absent": absent}


def main():
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer

    def tell(row):
        out.write(json.dumps(row) + "\n")
        out.flush()
    torch.manual_seed(0)
    for line in sys.stdin:
        request = json.loads(line)
        if "limit" in request:
            tell(limits())
            continue
        answer_point(request, tell)
        gc.collect()
        torch.cuda.empty_cache()  # for the other process
        tell({"case": request["point"]["case"], "done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
