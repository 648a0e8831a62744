/*
 * stack.cuh: the state of a consumer warp's rows, and the stack on which states of leaves wait for
 * what they merge with (docs/numerics.md, "The tree").
 */
#ifndef ATTN_KERNELS_CUDA_STACK_CUH
#define ATTN_KERNELS_CUDA_STACK_CUH

#include "kernels/cuda/device.cuh"

#define NO_LEVEL 64u

template <int DV, int NB> struct state {
    float a[DV / 16][NB][4]; /* rows 16 i + lane / 4 (+ 8) of A, columns 2 (lane % 4) (+ 1) */
    float l[NB][2];
    int e[NB][2];
};

template <int DV, int NB>
__device__ __forceinline__ void
set_empty(state<DV, NB> &c)
{
#pragma unroll
    for (int n = 0; n < NB; n++) {
        c.l[n][0] = c.l[n][1] = 0.0f;
        c.e[n][0] = c.e[n][1] = EMPTY_E;
#pragma unroll
        for (int i = 0; i < DV / 16; i++) {
            c.a[i][n][0] = c.a[i][n][1] = c.a[i][n][2] = c.a[i][n][3] = 0.0f;
        }
    }
}

/* A state lies as [DV / 16 x NB + NB][32 lanes][4] floats, in shared memory or beyond it. */
template <int DV, int NB> struct stack {
    static constexpr int WORDS = (DV / 16 * NB * 4 + NB * 4) * 32; /* of a state */

    int lane;
    uint32_t levels;   /* states that shared memory has room for */
    uint32_t near_at;  /* shared address: [levels][WORDS] */
    float *deep;       /* global: [deep_levels][WORDS] */
    uint32_t busy;     /* levels in shared memory that hold a state */
    uint8_t *place_of; /* shared: [64]; where a state lies: a level, or NO_LEVEL */
    uint8_t *level_of; /* shared: [64]; of the node with the state and the one below it */
    uint8_t *highest;  /* shared: [64]; the highest of those up to here */

    __device__ __forceinline__ float4
    get(uint32_t near, uint32_t i, int word) const
    {
        float4 v;
        if (near != NO_LEVEL) {
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                         : "r"(near_at + near * (WORDS * 4) + lane * 16 + word * 512));
        } else {
            v = ((const float4 *)(deep + (uint64_t)i * WORDS))[lane + word * 32];
        }
        return v;
    }

    __device__ __forceinline__ void
    put(uint32_t near, uint32_t i, int word, float a, float b, float c, float d)
    {
        if (near != NO_LEVEL) {
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                             near_at + near * (WORDS * 4) + lane * 16 + word * 512),
                         "f"(a), "f"(b), "f"(c), "f"(d)
                         : "memory");
        } else {
            ((float4 *)(deep + (uint64_t)i * WORDS))[lane + word * 32] = make_float4(a, b, c, d);
        }
    }

    /*
     * State i goes to the stack, before a leaf that it shares a node of `level` with. The lowest
     * levels are merged most often, every second leaf the first: they lie in shared memory.
     */
    __device__ __forceinline__ void
    push(uint32_t i, uint32_t level, const state<DV, NB> &c)
    {
        uint32_t near = level - 1;

        if (near >= levels || (busy >> near & 1)) {
            near = NO_LEVEL;
        } else {
            busy |= 1u << near;
        }
        if (lane == 0) {
            place_of[i] = (uint8_t)near;
        }
        if (near != NO_LEVEL) {
            put_state(near, i, c);
        } else {
            put_state(NO_LEVEL, i, c);
        }
    }

    __device__ __forceinline__ void
    put_state(uint32_t near, uint32_t i, const state<DV, NB> &c)
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int k = 0; k < DV / 16; k++) {
                put(near, i, k * NB + n, c.a[k][n][0], c.a[k][n][1], c.a[k][n][2], c.a[k][n][3]);
            }
            put(near, i, DV / 16 * NB + n, c.l[n][0], c.l[n][1], __int_as_float(c.e[n][0]),
                __int_as_float(c.e[n][1]));
        }
    }

    /* c = merge(state i of the stack, c): state i leaves it. */
    __device__ __forceinline__ void
    merge_below(uint32_t i, state<DV, NB> &c)
    {
        uint32_t near = place_of[i];

        if (near != NO_LEVEL) {
            busy &= ~(1u << near);
            merge_from(near, i, c);
        } else {
            merge_from(NO_LEVEL, i, c);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void
    merge_from(uint32_t near, uint32_t i, state<DV, NB> &c)
    {
        merge_scales scales[NB][2];
        bool drop = false;

#pragma unroll
        for (int n = 0; n < NB; n++) {
            float4 le  = get(near, i, DV / 16 * NB + n);
            float l[2] = {le.x, le.y};
            int e[2]   = {__float_as_int(le.z), __float_as_int(le.w)};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                scales[n][j] = merge_le(l[j], e[j], c.l[n][j], c.e[n][j]);
                c.l[n][j]    = l[j];
                c.e[n][j]    = e[j];
                drop         = drop || scales[n][j].drop_into || scales[n][j].drop_from;
            }
        }
        if (__any_sync(~0u, drop)) {
            merge_columns<true>(near, i, scales, c);
        } else {
            merge_columns<false>(near, i, scales, c);
        }
    }

    template <bool DROP>
    __device__ __forceinline__ void
    merge_columns(uint32_t near, uint32_t i, const merge_scales (&scales)[NB][2], state<DV, NB> &c)
    {
#pragma unroll
        for (int k = 0; k < DV / 16; k++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
                float4 v      = get(near, i, k * NB + n);
                float into[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const merge_scales &s = scales[n][j & 1];
                    if (DROP) {
                        c.a[k][n][j] = merge_a(s, into[j], c.a[k][n][j]);
                    } else {
                        c.a[k][n][j] =
                            __fadd_rn(__fmul_rn(into[j], s.into), __fmul_rn(c.a[k][n][j], s.from));
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void
    load(uint32_t i, state<DV, NB> &c)
    {
        set_empty(c);
        merge_below(i, c);
    }

    /* Merge what folds before a leaf comes at `next` (attn_fold_pops()). c is the topmost of n. */
    __device__ __forceinline__ void
    fold(uint32_t &n, uint32_t left, uint32_t next, state<DV, NB> &c)
    {
        while (n >= 2) {
            uint32_t level = level_of[n - 1], bound = max((uint32_t)highest[n - 2], left);
            if (level >= next || level >= bound) {
                return;
            }
            merge_below(n - 2, c);
            n--;
        }
    }

    /* State n begins, with a leaf that shares a node of `level` with the one before. */
    __device__ __forceinline__ void
    begin(uint32_t n, uint32_t level)
    {
        if (lane == 0) {
            level_of[n] = (uint8_t)level;
            highest[n]  = n == 0 ? 0 : max((uint32_t)highest[n - 1], level);
        }
        __syncwarp();
    }
};

#endif
