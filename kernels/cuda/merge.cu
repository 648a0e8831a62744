/*
 * merge.cu: fold the states of a row's pieces along the tree, and answer.
 *
 * A CTA takes one row of one item. Its states, in ascending key, are cut into segments, a warp
 * each, which folds what of its own is complete and leaves a list; a warp each folds FAN lists into
 * one, until there is one state. A lane has VEC columns.
 */
#include "kernels/cuda/device.cuh"

#define BATCH 8
#define FAN 4

template <int VEC> struct one {
    float a[VEC], l;
    int e;
};

/* c = merge(older, c). */
template <int VEC>
__device__ __forceinline__ void
merge_into(const one<VEC> &older, one<VEC> &c)
{
    if (exponents_near(older.e, c.e)) { /* the same in all lanes */
        float into, from;
        near_scales(older.e, c.e, into, from);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            c.a[i] = __fadd_rn(__fmul_rn(older.a[i], into), __fmul_rn(c.a[i], from));
        }
        c.l = __fadd_rn(__fmul_rn(older.l, into), __fmul_rn(c.l, from));
        c.e = max(older.e, c.e);
    } else {
        float l        = older.l;
        int e          = older.e;
        merge_scales s = merge_le(l, e, c.l, c.e);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            c.a[i] = merge_a(s, older.a[i], c.a[i]);
        }
        c.l = l;
        c.e = e;
    }
}

/* States in shared memory: [depth] of [VEC][32] and l, e, level, each lane's columns its own. */
template <int VEC> struct shelf {
    static constexpr uint32_t BYTES = (32 * VEC + 3) * 4;

    uint32_t at; /* shared address */
    int lane;

    __device__ __forceinline__ void
    put(uint32_t i, const one<VEC> &c, uint32_t level) const
    {
        const uint32_t to = at + i * BYTES;

        __syncwarp(); /* all have read what is written over now */
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            store_near(to + (k * 32 + lane) * 4, c.a[k]);
        }
        if (lane == 0) {
            store_near(to + 32 * VEC * 4, c.l);
            store_near(to + 32 * VEC * 4 + 4, c.e);
            store_near(to + 32 * VEC * 4 + 8, level);
        }
        __syncwarp();
    }

    __device__ __forceinline__ uint32_t
    get(uint32_t i, one<VEC> &c) const
    {
        const uint32_t from = at + i * BYTES;
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            c.a[k] = load_near<float>(from + (k * 32 + lane) * 4);
        }
        c.l = load_near<float>(from + 32 * VEC * 4);
        c.e = load_near<int>(from + 32 * VEC * 4 + 4);
        return load_near<uint32_t>(from + 32 * VEC * 4 + 8);
    }
};

/*
 * Folds states that come in order. Complete ones, which no node of these states has together with
 * what follows, go to the shelf from its begin on, with the level of the node with what is before
 * them; those that wait lie there behind them.
 */
template <int VEC> struct fold_t {
    shelf<VEC> on;
    uint32_t done; /* complete states on the shelf */
    waiting waits;
    uint32_t left; /* level of the node with the first state from here on and the one before it */
    bool all;      /* there is nothing before the first */
    bool begun;
    one<VEC> top;

    __device__ __forceinline__
    fold_t(uint32_t at, int lane, bool whole)
        : on{at, lane}, done(0), waits{0}, left(NO_LEVEL + 1), all(whole), begun(false)
    {
    }

    __device__ __forceinline__ void
    until(uint32_t level)
    {
        while (waits.newest_below(level)) {
            one<VEC> older;
            waits.take();
            on.get(done + waits.count(), older);
            merge_into(older, top);
        }
    }

    __device__ __forceinline__ void
    push(const one<VEC> &next, uint32_t level)
    {
        if (!begun) {
            left = all ? left : level;
        } else {
            until(level);
            if (waits.none() && level >= left) {
                on.put(done++, top, left);
                left = level;
            } else {
                on.put(done + waits.count(), top, level);
                waits.add(level);
            }
        }
        begun = true;
        top   = next;
    }

    /* No more come: all that is there to the shelf. Returns how many. The level of one that waited
     * is of the node with what is behind it, which is that of the next with what is before. */
    __device__ __forceinline__ uint32_t
    end(uint32_t right)
    {
        if (!begun) {
            return 0;
        }
        until(right);
        uint32_t n = done + waits.count(), level = left;
        for (uint32_t i = done; i < n; i++) {
            one<VEC> older;
            uint32_t behind = on.get(i, older);
            on.put(i, older, level);
            level = behind;
        }
        on.put(n, top, level);
        return n + 1;
    }
};

/* Columns lane * VEC and on of a state. */
template <int VEC>
__device__ __forceinline__ void
load_columns(const float *row, int lane, float *to)
{
    if constexpr (VEC == 2) {
        float2 v = __ldcg((const float2 *)row + lane);
        to[0]    = v.x;
        to[1]    = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < VEC / 4; i++) {
            float4 v      = __ldcg((const float4 *)row + lane * (VEC / 4) + i);
            to[4 * i]     = v.x;
            to[4 * i + 1] = v.y;
            to[4 * i + 2] = v.z;
            to[4 * i + 3] = v.w;
        }
    }
}

/* The states [first, end) of an item; `ref` is state first + lane's. */
template <int VEC>
__device__ __forceinline__ void
fold_segment(const cuda_args_t &x, const cuda_item_t &item, uint32_t first, uint32_t end,
             cuda_ref_t ref, uint32_t row, fold_t<VEC> &f)
{
    const int lane = f.on.lane;

    for (uint32_t base = first; base < end; base += 32) {
        uint32_t many = min(32u, end - base);
        if (base > first) {
            ref = x.refs[item.ref_first + min(base + lane, end - 1)];
        }
        float mine_l = __ldcg(x.slot_l + ref.slot + row);
        int mine_e   = __ldcg(x.slot_e + ref.slot + row);
        for (uint32_t at = 0; at < many; at += BATCH) {
            one<VEC> batch[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                uint64_t from = __shfl_sync(~0u, ref.slot, min(at + j, many - 1)) + row;
                load_columns<VEC>(x.slot_a + from * (32 * VEC), lane, batch[j].a);
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                if (at + j >= many) {
                    break;
                }
                batch[j].l = __shfl_sync(~0u, mine_l, at + j);
                batch[j].e = __shfl_sync(~0u, mine_e, at + j);
                f.push(batch[j], __shfl_sync(~0u, ref.level, at + j));
            }
        }
    }
}

template <int VEC>
__device__ __forceinline__ void
answer_row(const cuda_args_t &x, const cuda_item_t &item, uint32_t row, int lane, one<VEC> &c)
{
    uint32_t query = row / item.n_heads, head = item.head + row % item.n_heads;
    uint64_t at = (uint64_t)(item.answer + query) * x.q_heads + head;
    bool bad    = !is_finite(c.l);

#pragma unroll
    for (int i = 0; i < VEC; i++) {
        c.a[i] = c.l == 0.0f ? 0.0f : c.a[i];
        bad    = bad || !is_finite(c.a[i]);
    }
    if (bad) {
        report(x, item.entry, item.query + query, head);
    }
    finish_scales s = finish_le(x, head, c.l, c.e);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        uint64_t to = at * (32 * VEC) + lane * VEC + i;
        if (item.states) {
            x.a[to] = c.a[i];
        } else if (x.o != nullptr) {
            store_o(x, to, finish_a(s, c.a[i]));
        }
    }
    if (lane == 0 && item.states) {
        x.l[at] = c.l;
        x.e[at] = c.l == 0.0f ? EMPTY_E : c.e;
    } else if (lane == 0 && x.lse != nullptr) {
        x.lse[at] = s.lse;
    }
}

template <int VEC>
__device__ __forceinline__ void
merge_item(const cuda_args_t &x)
{
    extern __shared__ float shared[];
    __shared__ uint32_t left_over[32];
    const uint32_t segment = threadIdx.x / 32, row = blockIdx.y;
    const int lane         = threadIdx.x % 32;
    const cuda_item_t item = x.items[blockIdx.x];

    let_next_kernel_begin();
    if (row >= item.rows) {
        if (blockIdx.x == 0) { /* where all of them have nothing to do, it still ends after it */
            wait_for_kernel_before();
        }
        return;
    }
    const uint32_t per   = (item.n_refs + x.segments - 1) / x.segments;
    const uint32_t first = min(segment * per, item.n_refs);
    const uint32_t end   = min(first + per, item.n_refs);
    const uint32_t right = end < item.n_refs ? x.refs[item.ref_first + end].level : NO_LEVEL + 1;
    cuda_ref_t ref       = x.refs[item.ref_first + min(first + lane, max(end, 1u) - 1)];
    uint32_t lists = x.segments, each = x.segment_depth * shelf<VEC>::BYTES, at = shared_of(shared);
    fold_t<VEC> f(at + segment * each, lane, lists == 1);

    wait_for_kernel_before(); /* up to here there is nothing of its states */
    fold_segment(x, item, first, end, ref, row, f);
    uint32_t n = lists > 1 ? f.end(right) : 0;
    while (lists > 1) { /* FAN lists become one */
        const uint32_t from = at, of = each, lists_then = (lists + FAN - 1) / FAN;

        if (lane == 0 && segment < lists) {
            left_over[segment] = n;
        }
        __syncthreads();
        at += lists * each;
        each = x.depth * shelf<VEC>::BYTES;
        if (segment < lists_then) {
            const uint32_t last = min((segment + 1) * FAN, lists);
            f                   = fold_t<VEC>(at + segment * each, lane, lists_then == 1);
            for (uint32_t s = segment * FAN; s < last; s++) {
                shelf<VEC> list = {from + s * of, lane};
                for (uint32_t i = 0; i < left_over[s]; i++) {
                    one<VEC> next;
                    uint32_t level = list.get(i, next);
                    f.push(next, level);
                }
            }
            if (lists_then > 1) {
                bool ends       = last == lists || left_over[last] == 0;
                one<VEC> next   = {};
                shelf<VEC> list = {from + (ends ? 0 : last) * of, lane};
                n               = f.end(ends ? NO_LEVEL + 1 : list.get(0, next));
            }
        }
        lists = lists_then;
        __syncthreads(); /* all have read what is left over */
    }
    if (segment == 0) {
        f.until(NO_LEVEL + 1);
        answer_row(x, item, row, lane, f.top);
    }
}

#define KERNEL(name, VEC)                                                                          \
    extern "C" __global__ void __launch_bounds__(512) name(const __grid_constant__ cuda_args_t x)  \
    {                                                                                              \
        merge_item<VEC>(x);                                                                        \
    }

KERNEL(merge_64, 2)
KERNEL(merge_128, 4)
KERNEL(merge_256, 8)

/* n states of rows [n][d] into others, row by row: the merge operator alone. */
extern "C" __global__ void
merge_rows(float *a_into, float *l_into, int32_t *e_into, const float *a_from, const float *l_from,
           const int32_t *e_from, uint32_t d)
{
    uint64_t row   = blockIdx.x;
    float l        = l_into[row];
    int e          = e_into[row];
    merge_scales s = merge_le(l, e, l_from[row], e_from[row]);

    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) {
        a_into[row * d + i] = merge_a(s, a_into[row * d + i], a_from[row * d + i]);
    }
    __syncthreads(); /* all have read l and e */
    if (threadIdx.x == 0) {
        l_into[row] = l;
        e_into[row] = e;
    }
}
