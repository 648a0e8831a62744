/*
 * stack.cuh: the state of a consumer warp's rows, and where states of leaves wait for what they
 * merge with (struct waiting).
 */
#ifndef ATTN_KERNELS_CUDA_STACK_CUH
#define ATTN_KERNELS_CUDA_STACK_CUH

#include "kernels/cuda/device.cuh"

/* COLUMNS of A are this warp's. */
template <int COLUMNS, int NB> struct state {
    float a[COLUMNS / 16][NB][4]; /* rows 16 i + lane / 4 (+ 8) of A, columns 2 (lane % 4) (+ 1) */
    float l[NB][2];
    int e[NB][2];
};

template <int COLUMNS, int NB>
__device__ __forceinline__ void
set_empty(state<COLUMNS, NB> &c)
{
#pragma unroll
    for (int n = 0; n < NB; n++) {
        c.l[n][0] = c.l[n][1] = 0.0f;
        c.e[n][0] = c.e[n][1] = EMPTY_E;
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++) {
            c.a[i][n][0] = c.a[i][n][1] = c.a[i][n][2] = c.a[i][n][3] = 0.0f;
        }
    }
}

/*
 * A state lies as [COLUMNS / 16][NB] of [8][pairs] float4, a lane's rows of two columns, and
 * [NB][pairs] of their l and e, in shared memory or beyond it. There are pairs of rows, 4 but for
 * few rows: lanes of others have nothing here.
 */
template <int COLUMNS, int NB> struct stack {
    using state_t = state<COLUMNS, NB>;

    int lane;
    uint32_t pairs;
    uint32_t levels;  /* the lowest ones lie in shared memory: every second leaf needs the first */
    uint32_t near_at; /* shared address: [levels] */
    uint8_t *deep;    /* global: [deep_levels] */
    waiting waits;

    __device__ __forceinline__ uint32_t
    row_pairs() const
    {
        return NB > 1 ? 4 : pairs;
    }

    /* Bytes of a state. */
    __device__ __forceinline__ uint32_t
    size() const
    {
        return CUDA_STATE_BYTES(COLUMNS, NB, row_pairs());
    }

    /* States on levels beyond shared memory lie there from the highest one on. */
    __device__ __forceinline__ uint8_t *
    deep_end() const
    {
        return deep + __popcll(waits.levels >> levels) * size();
    }

    __device__ __forceinline__ void
    push(uint32_t level, const state_t &c)
    {
        if (level <= levels) {
            const uint32_t at = near_at + (level - 1) * size();
            put([&](uint32_t by, const float4 &v) { store_near(at + by, v); }, c);
        } else {
            uint8_t *at = deep_end();
            put([&](uint32_t by, const float4 &v) { *(float4 *)(at + by) = v; }, c);
        }
        waits.add(level);
        __syncwarp();
    }

    /* c = merge(the topmost, c): it leaves the stack. */
    __device__ __forceinline__ void
    merge_top(state_t &c)
    {
        const uint32_t level = waits.take();

        if (level <= levels) {
            const uint32_t at = near_at + (level - 1) * size();
            merge([&](uint32_t by) { return load_near<float4>(at + by); }, c);
        } else {
            const uint8_t *at = deep_end();
            merge([&](uint32_t by) { return *(const float4 *)(at + by); }, c);
        }
    }

    /* Nodes below `level` end here. */
    __device__ __forceinline__ void
    merge_below(uint32_t level, state_t &c)
    {
        while (waits.newest_below(level)) {
            merge_top(c);
        }
    }

    /* The topmost in place of c. */
    __device__ __forceinline__ void
    take_top(state_t &c)
    {
        set_empty(c);
        merge_top(c);
    }

  private:
    __device__ __forceinline__ bool
    has_lane() const
    {
        return NB > 1 || lane % 4 < (int)pairs;
    }

    __device__ __forceinline__ uint32_t
    a_of(int k, int n) const
    {
        return (((k * NB + n) * 8 + lane / 4) * row_pairs() + lane % 4) * 16;
    }

    __device__ __forceinline__ uint32_t
    le_of(int n) const
    {
        return (COLUMNS / 16 * NB * 8 * pairs + n * row_pairs() + lane % 4) * 16;
    }

    template <class F>
    __device__ __forceinline__ void
    put(F to, const state_t &c) const
    {
        if (!has_lane()) {
            return;
        }
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int k = 0; k < COLUMNS / 16; k++) {
                to(a_of(k, n), make_float4(c.a[k][n][0], c.a[k][n][1], c.a[k][n][2], c.a[k][n][3]));
            }
            if (lane < 4) {
                to(le_of(n), make_float4(c.l[n][0], c.l[n][1], __int_as_float(c.e[n][0]),
                                         __int_as_float(c.e[n][1])));
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void
    merge(F from, state_t &c) const
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            float l[2] = {c.l[n][0], c.l[n][1]};
            int e[2]   = {c.e[n][0], c.e[n][1]};
            float4 a[COLUMNS / 16];

            if (has_lane()) {
                float4 le = from(le_of(n));
                l[0] = le.x, l[1] = le.y;
                e[0] = __float_as_int(le.z), e[1] = __float_as_int(le.w);
#pragma unroll
                for (int k = 0; k < COLUMNS / 16; k++) {
                    a[k] = from(a_of(k, n));
                }
            }
            bool near = exponents_near(e[0], c.e[n][0]) && exponents_near(e[1], c.e[n][1]);
            if (__all_sync(~0u, near)) {
                merge_near(a, n, l, e, c);
            } else {
                merge_far(a, n, l, e, c);
            }
        }
    }

    __device__ __forceinline__ static void
    merge_near(const float4 (&a)[COLUMNS / 16], int n, const float (&l)[2], const int (&e)[2],
               state_t &c)
    {
        float into[2], by[2];

#pragma unroll
        for (int j = 0; j < 2; j++) {
            near_scales(e[j], c.e[n][j], into[j], by[j]);
            c.l[n][j] = __fadd_rn(__fmul_rn(l[j], into[j]), __fmul_rn(c.l[n][j], by[j]));
            c.e[n][j] = max(e[j], c.e[n][j]);
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++) {
            float of[4] = {a[k].x, a[k].y, a[k].z, a[k].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                c.a[k][n][j] =
                    __fadd_rn(__fmul_rn(of[j], into[j & 1]), __fmul_rn(c.a[k][n][j], by[j & 1]));
            }
        }
    }

    __device__ __forceinline__ static void
    merge_far(const float4 (&a)[COLUMNS / 16], int n, const float (&l)[2], const int (&e)[2],
              state_t &c)
    {
        merge_scales s[2];

#pragma unroll
        for (int j = 0; j < 2; j++) {
            float into_l = l[j];
            int into_e   = e[j];
            s[j]         = merge_le(into_l, into_e, c.l[n][j], c.e[n][j]);
            c.l[n][j]    = into_l;
            c.e[n][j]    = into_e;
        }
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++) {
            float of[4] = {a[k].x, a[k].y, a[k].z, a[k].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                c.a[k][n][j] = merge_a(s[j & 1], of[j], c.a[k][n][j]);
            }
        }
    }
};

#endif
