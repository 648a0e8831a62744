"""The direct client: layouts from the coordinator, steps with the workers, merge at home."""

import random

import numpy as np

import client
import oracle
import states
from client import pb, stubs, unary


class Direct:
    """Goes to the workers itself. Sequences are made and freed by a thin client (client.Client),
    whose ticket the workers are shown."""

    def __init__(self, thin, streams=False):
        self.thin = thin
        self.coordinator_channel = thin.connect(thin.address)
        self.coordinator = stubs.CoordinatorStub(self.coordinator_channel)
        self.streams = streams
        self.channels, self.workers = {}, {}  # by address

    def close(self):
        for steps in self.workers.values():
            steps.close()
        for channel in (self.coordinator_channel, *self.channels.values()):
            channel.close()

    def worker(self, address):
        """The transport to the worker at an address: one connection, kept."""
        if address not in self.workers:
            self.channels[address] = self.thin.connect(address)
            stub = stubs.WorkerStub(self.channels[address])
            self.workers[address] = client.Stream(stub) if self.streams else client.Unary(stub)
        return self.workers[address]

    def layout(self, cache, entries):
        return unary(self.coordinator.Layout, pb.LayoutRequest(
            cache_id=cache.id, seqs=[entry.seq for entry in entries],
            bases=[entry.base for entry in entries],
            tokens=[entry.base + entry.n_new for entry in entries]))

    def begin(self, cache, entries, **options):
        return DirectStep(self, cache, entries, self.layout(cache, entries), **options)


class Share:
    """What one worker has of a step: its request, and which rows of the batch go there."""

    def __init__(self, steps, request):
        self.steps, self.request = steps, request
        self.batch = []    # of each of its entries the number in the batch
        self.q_rows = []   # (first row, rows) in the batch's q
        self.kv_rows = []  # (first row, rows) in the batch's k and v
        self.reply = None  # WorkerBeginReply

    def add(self, i, entry, refs, nodes, q_row, kv_row, chunk_size):
        """Entry i of the batch, as far as this worker owns it."""
        attends = entry.n_q > 0 and any(
            ref.number * chunk_size < entry.base + entry.n_new for ref in refs)
        self.batch.append(i)
        self.request.entries.add(
            seq=entry.seq, base_position=entry.base, n_q=entry.n_q if attends else 0,
            n_new=entry.n_new, chunks=refs, sparse=entry.pages() if attends else [],
            nodes=[pb.Node(level=l, index=x) for l, x in nodes] if attends else [],
            mask=entry.mask_bytes() if attends else b"", list_room=entry.list_room)
        if attends:
            self.q_rows.append((q_row, entry.n_q))
        for ref in refs:
            if ref.n_new:
                first = max(entry.base, ref.number * chunk_size) - entry.base
                if entry.mask is not None:  # and all that follow: they may be moved here
                    self.kv_rows.append((kv_row + first, entry.n_new - first))
                    break
                self.kv_rows.append((kv_row + first, ref.n_new))


def chunk_refs(layout, entry, chunk_size):
    """ChunkRefs of every chunk that the entry sees or writes, with their owners."""
    end = entry.base + entry.n_new
    for chunk in layout.chunks:
        number = chunk.first // chunk_size
        written = min(end, chunk.first + chunk_size) - max(entry.base, chunk.first)
        if chunk.first < end:
            yield chunk.worker, pb.ChunkRef(
                number=number, chunk=chunk.chunk, generation=chunk.generation,
                length=chunk.length, n_new=max(written, 0) if entry.n_new else 0)


def holder(layout, entry, chunk_size):
    """The worker that must know of the step in any case, so that a second one is refused: the
    owner of the chunk where the next token goes, or, if it is lost, of the last before it that is
    not."""
    at = min(entry.base // chunk_size, len(layout.chunks) - 1)
    return next(chunk.worker for chunk in layout.chunks[at::-1] if not chunk.lost)


class DirectStep:
    """A step over the workers: the same calls and, bit for bit, the same answers as client.Step."""

    def __init__(self, direct, cache, entries, layout, q_dtype, o_dtype=0, want_lse=False,
                 timeout_ms=0):
        self.cache, self.entries = cache, entries
        self.q_dtype, self.o_dtype, self.want_lse = q_dtype, o_dtype or q_dtype, want_lse
        self.id = random.getrandbits(64) | 1
        self.epoch = layout.epoch
        self.addresses = {worker.id: worker.address for worker in layout.workers}
        self.shares = {}
        options = dict(cache_id=cache.id, step_id=self.id, epoch=layout.epoch, q_dtype=q_dtype,
                       o_dtype=o_dtype, want_lse=want_lse, timeout_ms=timeout_ms)
        q_row = kv_row = 0
        for i, entry in enumerate(entries):
            self.split(direct, i, layout.layouts[i], q_row, kv_row, options)
            q_row += entry.n_q
            kv_row += entry.n_new
        self.begin()

    def split(self, direct, i, layout, q_row, kv_row, options):
        """Give entry i to the workers that own a chunk of it."""
        entry, chunk_size = self.entries[i], self.cache.geometry.chunk_size
        refs = {holder(layout, entry, chunk_size): []}
        for worker, ref in chunk_refs(layout, entry, chunk_size):
            refs.setdefault(worker, []).append(ref)
        numbers = {worker: [ref.number for ref in own] for worker, own in refs.items() if own}
        for worker, own in sorted(refs.items()):
            others = sum((n for other, n in numbers.items() if other != worker), [])
            nodes = states.frontier(numbers.get(worker, []), others) if others else []
            if worker not in self.shares:
                self.shares[worker] = Share(direct.worker(self.addresses[worker]),
                                            pb.WorkerBeginRequest(**options))
            self.shares[worker].add(i, entry, own, nodes, q_row, kv_row, chunk_size)

    def fan_out(self, op, request_of, data_of=lambda share: b""):
        """The operation at all workers at once. Once all answered, the first failure is raised."""
        waits = [share.steps.call(op, request_of(share), data_of(share))
                 for share in self.shares.values()]
        replies, failure = [], None
        for wait in waits:
            try:
                replies.append(wait())
            except client.AttnError as error:
                failure = failure or error
        if failure:
            raise failure
        return replies

    def begin(self):
        try:
            replies = self.fan_out("worker_begin", lambda share: share.request)
        except client.AttnError:
            self.abort()
            raise
        for share, reply in zip(self.shares.values(), replies):
            share.reply = reply

    def run(self, layer, q=b"", k=b"", v=b"", no_kv=False, no_q=False, lists=None):
        g = self.cache.geometry
        q_row = self.cache.q_row(self.q_dtype)

        def request(share):
            own = {at: lists[i] for at, i in enumerate(share.batch) if i in (lists or {})}
            return pb.RunRequest(step_id=self.id, layer=layer, no_kv=no_kv, no_q=no_q,
                                 lists=client.entry_lists(own))

        def data(share):
            return (take(q, share.q_rows, q_row) + take(k, share.kv_rows, self.cache.k_row)
                    + take(v, share.kv_rows, self.cache.v_row))
        answers = self.fan_out("run", request, data)
        if no_q:
            return b"", b""
        parts = [EntryParts() for _ in self.entries]
        for share, (_, answer) in zip(self.shares.values(), answers):
            self.sort_out(share, answer, parts)
        sinks = g.layer_table[layer].sinks if g.layer_table else ()
        done = [part.finish(entry, self, sinks) for part, entry in zip(parts, self.entries)]
        return b"".join(o for o, _ in done), b"".join(lse for _, lse in done)

    def sort_out(self, share, answer, parts):
        """Cut a worker's answer: o, lse, then all e, all l, all A."""
        heads, d_v = self.cache.geometry.q_heads, self.cache.geometry.head_dim_v
        o_at, lse_at, n = 0, share.reply.o_bytes, share.reply.states
        at = share.reply.o_bytes + share.reply.lse_bytes
        assert len(answer) == at + n * (8 + 4 * d_v), (len(answer), share.reply)
        e = np.frombuffer(answer, "<i4", n, at)
        l = np.frombuffer(answer, "<f4", n, at + 4 * n)
        a = np.frombuffer(answer, "<f4", n * d_v, at + 8 * n).reshape(n, d_v)
        state_at = 0
        for i, entry in zip(share.batch, share.request.entries):
            for node in entry.nodes:
                rows = slice(state_at, state_at + entry.n_q * heads)
                parts[i].nodes[node.level, node.index] = e[rows], l[rows], a[rows]
                state_at += entry.n_q * heads
            if entry.n_q and not entry.nodes:
                o_size = entry.n_q * self.cache.o_row(self.o_dtype)
                lse_size = entry.n_q * heads * 4 if self.want_lse else 0
                parts[i].o = answer[o_at:o_at + o_size]
                parts[i].lse = answer[lse_at:lse_at + lse_size]
                o_at, lse_at = o_at + o_size, lse_at + lse_size

    def commit(self, accepted=(), paths=()):
        masked = [i for i, entry in enumerate(self.entries) if entry.mask is not None]
        of_entry = dict(zip(masked, paths))
        self.fan_out("commit", lambda share: pb.CommitRequest(
            step_id=self.id, accepted=[accepted[i] for i in share.batch] if accepted else [],
            path=[t for i in share.batch for t in of_entry.get(i, ())]))

    def abort(self):
        for share in self.shares.values():
            try:
                share.steps.call("abort", pb.AbortRequest(step_id=self.id))()
            except client.AttnError:
                pass  # a worker that does not answer aborts the step by its deadline


class EntryParts:
    """What came back for one entry: O of one worker, or partials of several."""

    def __init__(self):
        self.o, self.lse, self.nodes = None, None, {}

    def finish(self, entry, step, sinks):
        heads, d_v = step.cache.geometry.q_heads, step.cache.geometry.head_dim_v
        if entry.n_q == 0:
            return b"", b""
        if self.o is not None:
            return self.o, self.lse
        if self.nodes:
            o, lse = states.finish(states.root(self.nodes), sinks)
        else:  # nothing to see anywhere
            o = np.zeros((entry.n_q * heads, d_v), np.float32)
            lse = np.full(entry.n_q * heads, -np.inf, np.float32)
        return oracle.encode(o, step.o_dtype), lse.tobytes() if step.want_lse else b""


def take(data, rows, row_bytes):
    return b"".join(data[first * row_bytes:(first + n) * row_bytes] for first, n in rows) \
        if data else b""
