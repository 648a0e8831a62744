/*
 * exchange.cu: partials between the GPUs of one host, and their merge (exchange.h has the rules).
 *
 * A warp takes a send or a row at a time. All of a launch's sends go out before its warps wait for
 * anything but their peers' beats, so that ranks cannot wait for each other in a circle. A lane has
 * the same words of all states of a row: word w of a line, A and then l and e, is the (w /
 * PACKETS)-th of packet w % PACKETS, so that the lanes of a warp read and write neighbours.
 */
#ifndef ATTN_EMULATED
#include "kernels/cuda/link.cuh"
#endif
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/states.cuh"

#define BATCH 4 /* states of a row that are waited for together */
#ifndef LOOK_EVERY
#define LOOK_EVERY 32 /* polls between two looks at the clock and the abort word */
#endif

/* ---- states, spread over a warp ---- */

template <int D> struct line {
    static constexpr uint32_t PACKETS = CUDA_LINE_PACKETS(D), BYTES = CUDA_LINE_BYTES(D);
    static constexpr int PER = (PACKETS + 31) / 32; /* packets of a lane */

    float v[PER][3];
    uint32_t of[PER]; /* epochs that it came with */

    /* From three words a packet; e is among them as its bits. */
    __device__ __forceinline__ float
    word(uint32_t w) const
    {
        const uint32_t p = w % PACKETS;
        return __shfl_sync(~0u, v[p / 32][w / PACKETS], p % 32);
    }

    __device__ __forceinline__ void
    load_own(const cuda_exchange_t &x, uint64_t state, int lane)
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                const uint32_t p = lane + 32 * i, w = k * PACKETS + p;
                v[i][k] = 0.0f;
                if (p >= PACKETS) {
                } else if (w < D) {
                    v[i][k] = x.a[state * D + w];
                } else if (w == D) {
                    v[i][k] = x.l[state];
                } else if (w == D + 1) {
                    v[i][k] = __int_as_float(x.e[state]);
                }
            }
        }
    }

    __device__ __forceinline__ void
    send(uint8_t *to, uint32_t epoch, int lane) const
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            if (lane + 32 * i < PACKETS) {
                store_packet(to + (lane + 32 * i) * 16,
                             make_uint4(__float_as_uint(v[i][0]), __float_as_uint(v[i][1]),
                                        __float_as_uint(v[i][2]), epoch));
            }
        }
    }

    /* The lane's part of a line, as far as it has come. */
    __device__ __forceinline__ void
    look(const uint8_t *from, int lane)
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            uint4 packet = make_uint4(0, 0, 0, 0);
            if (lane + 32 * i < PACKETS) {
                packet = load_packet(from + (lane + 32 * i) * 16);
            }
            v[i][0] = __uint_as_float(packet.x);
            v[i][1] = __uint_as_float(packet.y);
            v[i][2] = __uint_as_float(packet.z);
            of[i]   = packet.w;
        }
    }

    __device__ __forceinline__ bool
    has_come(uint32_t epoch, int lane) const
    {
        bool there = true;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            there = there && (of[i] == epoch || lane + 32 * i >= PACKETS);
        }
        return there;
    }
};

/* A row's states as they fold: the newest in registers, those that wait in shared memory, where
 * every lane has its own words, l and e besides. */
template <int D> struct row_stack {
    static constexpr int PER = line<D>::PER, ENTRY = (PER * 3 + 2) * 32; /* floats */

    float *below; /* [depth][ENTRY] of this lane's warp, from this lane on */
    waiting waits;
    bool begun;
    line<D> top;
    float l;
    int e;

    __device__ __forceinline__ void
    begin()
    {
        waits = {0};
        begun = false;
        l     = 0.0f;
        e     = EMPTY_E;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            top.v[i][0] = top.v[i][1] = top.v[i][2] = 0.0f;
        }
    }

    __device__ __forceinline__ void
    merge_into_below()
    {
        const float *at = below + waits.count() * ENTRY;
        float into_l    = at[PER * 96];
        int into_e      = __float_as_int(at[PER * 96 + 32]);
        merge_scales s  = merge_le(into_l, into_e, l, e);

#pragma unroll
        for (int i = 0; i < PER; i++) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                top.v[i][k] = merge_a(s, at[(i * 3 + k) * 32], top.v[i][k]);
            }
        }
        l = into_l;
        e = into_e;
    }

    /* Merge what folds before a state comes at `level`. */
    __device__ __forceinline__ void
    until(uint32_t level)
    {
        while (waits.newest_below(level)) {
            waits.take();
            merge_into_below();
        }
    }

    __device__ __forceinline__ void
    push(const line<D> &state, uint32_t level)
    {
        if (begun) {
            until(level);
            float *at = below + waits.count() * ENTRY;
#pragma unroll
            for (int i = 0; i < PER; i++) {
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    at[(i * 3 + k) * 32] = top.v[i][k];
                }
            }
            at[PER * 96]      = l;
            at[PER * 96 + 32] = __int_as_float(e);
            waits.add(level);
        }
        begun = true;
        top   = state;
        l     = state.word(D);
        e     = __float_as_int(state.word(D + 1));
    }
};

/* ---- a launch ---- */

template <int D> struct exchange {
    using line_t = line<D>;

    const cuda_exchange_t &x;
    const int lane;
    uint32_t epoch;
    uint32_t fresh; /* ranks known to have begun the epoch before */
    uint64_t end;   /* of all waits, on the device's clock */
    row_stack<D> stack;

    __device__ __forceinline__
    exchange(const cuda_exchange_t &args, float *shared)
        : x(args), lane((int)(threadIdx.x % 32))
    {
        stack.below = shared + threadIdx.x / 32 * x.depth * row_stack<D>::ENTRY + lane;
    }

    __device__ __forceinline__ cuda_inbox_t *
    inbox(uint32_t rank) const
    {
        return (cuda_inbox_t *)x.inboxes[rank];
    }

    __device__ __forceinline__ uint8_t *
    place(uint32_t rank, uint32_t at) const
    {
        return x.inboxes[rank] + sizeof(cuda_inbox_t) + (epoch & 1) * x.half +
               (uint64_t)at * line_t::BYTES;
    }

    /* ---- giving up ---- */

    /* The launch has failed, of `kind`, waiting for a rank; all ranks are told. */
    __device__ __forceinline__ void
    fail(uint32_t kind, uint32_t rank) const
    {
        if (atomicCAS(&x.control->failed, 0u, kind | rank << 8) == 0) {
            for (uint32_t r = 0; r < x.ranks; r++) {
                store_word(&inbox(r)->abort, x.first);
            }
        }
    }

    /* Is it time to end a wait for a rank? */
    __device__ __forceinline__ bool
    give_up(uint32_t rank) const
    {
        bool over = false;

        if (lane == 0) {
            if (load_word(&inbox(x.me)->abort) == x.first || load_word(x.stop) != 0) {
                fail(CUDA_EXCHANGE_ABORTED, rank);
                over = true;
            } else if (now_ns() >= end) {
                fail(CUDA_EXCHANGE_LATE, rank);
                over = true;
            }
        }
        return __any_sync(~0u, over);
    }

    /* ---- sends ---- */

    /* The rank has begun the epoch before, so that this epoch's half of its inbox is free. What was
     * read there two epochs ago was used by a kernel that ended before the beat was written:
     * nothing that is written from here on can come before these reads. It may have begun this one,
     * and two more: it ended those that we have begun. Any other number is of another group. */
    __device__ __forceinline__ bool
    wait_for_beat(uint32_t rank)
    {
        for (uint32_t polls = 1; !(fresh >> rank & 1); polls++) {
            uint32_t beat = load_word(&inbox(x.me)->beats[rank].epoch);
            if (__all_sync(~0u, beat - (epoch - 1) <= 3)) {
                fresh |= 1u << rank;
            } else if (polls % LOOK_EVERY == 0 && give_up(rank)) {
                return false;
            }
        }
        return true;
    }

    __device__ __forceinline__ bool
    send_all(uint32_t warp, uint32_t warps, cuda_send_t next)
    {
        for (uint32_t i = warp; i < x.n_sends; i += warps) {
            cuda_send_t send = next;
            line_t state;
            if (i + warps < x.n_sends) {
                next = x.sends[i + warps];
            }
            state.load_own(x, send.state, lane); /* on its way while the beat is looked at */
            if (!wait_for_beat(send.rank)) {
                return false;
            }
            state.send(place(send.rank, send.line), epoch, lane);
        }
        return true;
    }

    /* ---- rows ---- */

    /* States of n parts: own ones, and others when they have come. All that is missing is on its
     * way before the first is looked at. */
    __device__ __forceinline__ bool
    fetch(const cuda_exchange_part_t *parts, uint32_t n, line_t (&states)[BATCH])
    {
        const uint32_t all = (1u << n) - 1;
        uint32_t there     = 0; /* parts */

#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            if (j < n && (parts[j].from & 255) == x.me) {
                states[j].load_own(x, parts[j].at, lane);
                there |= 1u << j;
            }
        }
        for (uint32_t polls = 1; there != all; polls++) {
            uint32_t mine = there, missing = 0; /* a rank, and 1 */
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                if (j < n && !(there >> j & 1)) {
                    states[j].look(place(x.me, parts[j].at), lane);
                }
            }
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                if (j < n && !(there >> j & 1)) {
                    bool come = states[j].has_come(epoch, lane);
                    mine |= (uint32_t)come << j;
                    missing = come ? missing : (parts[j].from & 255) + 1;
                }
            }
            there = __reduce_and_sync(~0u, mine);
            if (there != all && polls % LOOK_EVERY == 0 &&
                give_up(__reduce_max_sync(~0u, missing) - 1)) {
                return false;
            }
        }
        return true;
    }

    /* All states of a row, folded: nothing is left of no parts. */
    __device__ __forceinline__ bool
    fold_row(const cuda_exchange_row_t &row)
    {
        stack.begin();
        for (uint32_t base = 0; base < row.n_parts; base += BATCH) {
            uint32_t n = min((uint32_t)BATCH, row.n_parts - base);
            cuda_exchange_part_t parts[BATCH];
            line_t states[BATCH];
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                parts[j] = x.parts[row.part_first + base + min(j, n - 1)];
            }
            if (!fetch(parts, n, states)) {
                return false;
            }
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                if (j < n) {
                    stack.push(states[j], parts[j].from >> 8);
                }
            }
        }
        stack.until(NO_LEVEL + 1);
        return true;
    }

    __device__ __forceinline__ void
    answer(const cuda_exchange_row_t &row, uint32_t at)
    {
        finish_scales s = finish_le(x, row.head, stack.l, stack.e);
        bool bad        = !is_finite(stack.l);

#pragma unroll
        for (int i = 0; i < line_t::PER; i++) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                const uint32_t p = lane + 32 * i, w = k * line_t::PACKETS + p;
                if (p < line_t::PACKETS && w < D) {
                    float a = stack.l == 0.0f ? 0.0f : stack.top.v[i][k];
                    bad     = bad || !is_finite(a);
                    store_o(x, (uint64_t)at * D + w, finish_a(s, a));
                }
            }
        }
        if (bad) {
            report(x, row.entry, row.query, row.head);
        }
        if (lane == 0 && x.lse != nullptr) {
            x.lse[at] = s.lse;
        }
    }

    __device__ __forceinline__ void
    finish_all(uint32_t warp, uint32_t warps, cuda_exchange_row_t next)
    {
        for (uint32_t i = warp; i < x.n_rows; i += warps) {
            cuda_exchange_row_t row = next;
            if (i + warps < x.n_rows) {
                next = x.rows[i + warps];
            }
            if (!fold_row(row)) {
                return;
            }
            answer(row, i);
        }
    }

    /* ---- the whole ---- */

    __device__ __forceinline__ void
    run()
    {
        const uint32_t warps    = gridDim.x * CUDA_EXCHANGE_WARPS;
        const uint32_t warp     = blockIdx.x * CUDA_EXCHANGE_WARPS + threadIdx.x / 32;
        cuda_send_t send        = {};
        cuda_exchange_row_t row = {};

        /* Tables do not come from the kernel before. */
        if (warp < x.n_sends) {
            send = x.sends[warp];
        }
        if (warp < x.n_rows) {
            row = x.rows[warp];
        }
        wait_for_states();
        epoch = x.control->epoch + 1;
        fresh = 0;
        end   = now_ns() + x.limit_ns;
        if (x.control->failed != 0) {
            return;
        }
        if (warp == 0 && lane < (int)x.ranks && lane != (int)x.me) {
            store_word(&inbox(lane)->beats[x.me].epoch, epoch);
        }
        if (send_all(warp, warps, send)) {
            finish_all(warp, warps, row);
        }
        for (uint32_t r = 0; warp == 0 && r < x.ranks; r++) {
            if (r != x.me && !wait_for_beat(r)) { /* nobody is left behind */
                break;
            }
        }
    }
};

template <int D>
__device__ __forceinline__ void
exchange_and_merge(const cuda_exchange_t &x)
{
    STACKS(stacks);
    exchange<D> launch(x, stacks);

    launch.run();
    __syncthreads(); /* all of the CTA have read control, and written */
    if (threadIdx.x == 0 && atomicAdd(&x.control->done, 1u) + 1 == gridDim.x) {
        x.control->done = 0;
        x.control->epoch++;
    }
}

#define KERNEL(name, D)                                                                            \
    extern "C" __global__ void __launch_bounds__(32 * CUDA_EXCHANGE_WARPS, 1)                      \
        name(const __grid_constant__ cuda_exchange_t x)                                            \
    {                                                                                              \
        exchange_and_merge<D>(x);                                                                  \
    }

KERNEL(exchange_64, 64)
KERNEL(exchange_128, 128)
KERNEL(exchange_256, 256)
