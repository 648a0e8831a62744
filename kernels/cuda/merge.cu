/*
 * merge.cu: fold the states of a row's pieces along the tree, and answer.
 *
 * A CTA takes one row of one item. Its states, in ascending key, are cut into segments, a warp
 * each, which folds its own as a piece folds its leaves; what the segments leave, the first warp
 * folds. A lane has VEC columns. States are fetched several at a time: all are on the way before
 * the first is merged.
 */
#include "kernels/cuda/device.cuh"

#define BATCH 8
#define NO_LEVEL 64u

/* A stack of states in shared memory, of one warp. The topmost is in registers. */
template <int VEC> struct fold_t {
    float *a;        /* [depth][VEC][32] */
    float *l;        /* [depth] */
    int *e;          /* [depth] */
    uint32_t *level; /* [depth]: with the state below; and the highest up to there << 8 */
    uint32_t n, left;
    int lane;
    float top_a[VEC], top_l;
    int top_e;
    uint32_t top_level;

    __device__ __forceinline__
    fold_t(const cuda_args_t &x, float *shared, uint32_t warp, int on)
    {
        a     = shared + (size_t)warp * x.depth * (32 * VEC + 3);
        l     = a + x.depth * 32 * VEC;
        e     = (int *)(l + x.depth);
        level = (uint32_t *)(e + x.depth);
        n     = 0;
        left  = NO_LEVEL;
        lane  = on;
    }

    /* Merge what folds before a state comes at `next` (attn_fold_pops()). */
    __device__ __forceinline__ void
    until(uint32_t next)
    {
        while (n >= 2) {
            uint32_t below = level[n - 2], at = top_level & 255;
            if (at >= next || at >= max(below >> 8, left)) {
                return;
            }
            float into_l   = l[n - 2];
            int into_e     = e[n - 2];
            merge_scales s = merge_le(into_l, into_e, top_l, top_e);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                top_a[i] = merge_a(s, a[((n - 2) * VEC + i) * 32 + lane], top_a[i]);
            }
            top_l     = into_l;
            top_e     = into_e;
            top_level = below;
            n--;
        }
    }

    __device__ __forceinline__ void
    keep()
    {
        __syncwarp(); /* all have read what is written over now */
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            a[((n - 1) * VEC + i) * 32 + lane] = top_a[i];
        }
        l[n - 1]     = top_l; /* every lane writes the same */
        e[n - 1]     = top_e;
        level[n - 1] = top_level;
        __syncwarp();
    }

    __device__ __forceinline__ void
    push(const float *from_a, float from_l, int from_e, uint32_t at)
    {
        uint32_t highest = 0;

        until(at);
        if (n > 0) {
            keep();
            highest = max(top_level >> 8, at);
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            top_a[i] = from_a[i];
        }
        top_l     = from_l;
        top_e     = from_e;
        top_level = at | highest << 8;
        n++;
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
    for (uint32_t base = first; base < end; base += 32) {
        uint32_t many = min(32u, end - base);
        if (base > first) {
            ref = x.refs[item.ref_first + min(base + f.lane, end - 1)];
        }
        float mine_l = __ldcg(x.slot_l + ref.slot + row);
        int mine_e   = __ldcg(x.slot_e + ref.slot + row);
        if (base == first) {
            f.left = __shfl_sync(~0u, ref.level, 0);
        }
        for (uint32_t at = 0; at < many; at += BATCH) {
            float columns[BATCH][VEC];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                uint64_t from = __shfl_sync(~0u, ref.slot, min(at + j, many - 1)) + row;
                load_columns<VEC>(x.slot_a + from * (32 * VEC), f.lane, columns[j]);
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                if (at + j >= many) {
                    break;
                }
                f.push(columns[j], __shfl_sync(~0u, mine_l, at + j),
                       __shfl_sync(~0u, mine_e, at + j), __shfl_sync(~0u, ref.level, at + j));
            }
        }
    }
    f.until(end < item.n_refs ? x.refs[item.ref_first + end].level : NO_LEVEL);
}

template <int VEC>
__device__ __forceinline__ void
answer_row(const cuda_args_t &x, const cuda_item_t &item, uint32_t row, fold_t<VEC> &f)
{
    uint32_t query = row / item.n_heads, head = item.head + row % item.n_heads;
    uint64_t at = (uint64_t)(item.answer + query) * x.q_heads + head;
    bool bad    = !is_finite(f.top_l);

#pragma unroll
    for (int i = 0; i < VEC; i++) {
        f.top_a[i] = f.top_l == 0.0f ? 0.0f : f.top_a[i];
        bad        = bad || !is_finite(f.top_a[i]);
    }
    if (bad) {
        report(x, item.entry, item.query + query, head);
    }
    finish_scales s = finish_le(x, head, f.top_l, f.top_e);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        uint64_t to = at * (32 * VEC) + f.lane * VEC + i;
        if (item.states) {
            x.a[to] = f.top_a[i];
        } else if (x.o != nullptr) {
            store_o(x, to, finish_a(s, f.top_a[i]));
        }
    }
    if (f.lane == 0 && item.states) {
        x.l[at] = f.top_l;
        x.e[at] = f.top_l == 0.0f ? EMPTY_E : f.top_e;
    } else if (f.lane == 0 && x.lse != nullptr) {
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

    if (row >= item.rows) {
        if (blockIdx.x == 0) { /* where all of them have nothing to do, it still ends after it */
            wait_for_kernel_before();
        }
        return;
    }
    const uint32_t per   = (item.n_refs + x.segments - 1) / x.segments;
    const uint32_t first = min(segment * per, item.n_refs);
    const uint32_t end   = min(first + per, item.n_refs);
    cuda_ref_t ref       = x.refs[item.ref_first + min(first + lane, item.n_refs - 1)];
    fold_t<VEC> f(x, shared, segment, lane);

    ref = first + lane < end ? ref : x.refs[item.ref_first + max(end, 1u) - 1];
    wait_for_kernel_before(); /* up to here there is nothing of its states */
    fold_segment(x, item, first, end, ref, row, f);
    if (x.segments > 1) {
        if (segment > 0 && f.n > 0) {
            f.keep();
        }
        if (lane == 0) {
            left_over[segment] = f.n;
        }
        __syncthreads();
        if (segment > 0) {
            return;
        }
        f.left = NO_LEVEL;
        for (uint32_t s = 1; s < x.segments; s++) {
            fold_t<VEC> other(x, shared, s, lane);
            for (uint32_t i = 0; i < left_over[s]; i++) {
                float columns[VEC];
#pragma unroll
                for (int k = 0; k < VEC; k++) {
                    columns[k] = other.a[(i * VEC + k) * 32 + lane];
                }
                f.push(columns, other.l[i], other.e[i], other.level[i] & 255);
            }
        }
        f.until(NO_LEVEL + 1);
    }
    answer_row(x, item, row, f);
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
