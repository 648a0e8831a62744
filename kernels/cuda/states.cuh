/*
 * states.cuh: the arithmetic of states (docs/numerics.md), operation by operation as the host has
 * it, for kernels whose arguments have sink_l, sink_e, o, o_type and error in common: X is the type
 * of one of them. What it needs of the language, a test on the host brings along.
 */
#ifndef ATTN_KERNELS_CUDA_STATES_CUH
#define ATTN_KERNELS_CUDA_STATES_CUH

#include <stdint.h>

#ifndef ATTN_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define EMPTY_E ((int)0x80000000)
#define DIFFERENCE_MAX 126
#define NO_LEVEL 64u /* above every node */

/* 2^k for -126 <= k <= 0. */
__device__ __forceinline__ float
power_of(int k)
{
    return __int_as_float((k + 127) << 23);
}

/* How two states merge: the scales of both, or that one of them is dropped. */
struct merge_scales {
    float into, from;
    bool drop_into, drop_from;
};

/* Merges l and e, and says what is to be done with A. */
__device__ __forceinline__ merge_scales
merge_le(float &l_into, int &e_into, float l_from, int e_from)
{
    merge_scales s     = {1.0f, 1.0f, false, false};
    long long distance = (long long)e_from - e_into;

    if (l_from == 0.0f) {
        s.drop_from = true;
    } else if (l_into == 0.0f || distance > DIFFERENCE_MAX) {
        s.drop_into = true;
        l_into      = l_from;
        e_into      = e_from;
    } else if (distance >= 0) {
        s.into = power_of((int)-distance);
        l_into = __fadd_rn(__fmul_rn(l_into, s.into), l_from);
        e_into = e_from;
    } else if (distance >= -DIFFERENCE_MAX) {
        s.from = power_of((int)distance);
        l_into = __fadd_rn(l_into, __fmul_rn(l_from, s.from));
    } else {
        s.drop_from = true;
    }
    return s;
}

/*
 * Exponents no further apart than DIFFERENCE_MAX, or both of nothing: then a merge is
 * into * 2^.. + from * 2^.., one of the two factors 1. Nothing has the exponent -2^31, others are
 * no larger than 2^30 + 1: a difference that wraps is far.
 */
__device__ __forceinline__ bool
exponents_near(int e_into, int e_from)
{
    return (uint32_t)e_from - (uint32_t)e_into + DIFFERENCE_MAX <= 2u * DIFFERENCE_MAX;
}

__device__ __forceinline__ void
near_scales(int e_into, int e_from, float &into, float &from)
{
    int distance = e_from - e_into;

    into = power_of(min(-distance, 0));
    from = power_of(min(distance, 0));
}

__device__ __forceinline__ float
merge_a(const merge_scales &s, float into, float from)
{
    float sum = __fadd_rn(__fmul_rn(into, s.into), __fmul_rn(from, s.from));
    return s.drop_into ? from : s.drop_from ? into : sum;
}

/* attn_log2() of kernels/state.c. */
__device__ __forceinline__ float
log2_of(float x)
{
    int k = 0;

    if (x < 1.17549435e-38f) {
        x = __fmul_rn(x, 16777216.0f);
        k = -24;
    }
    uint32_t bits  = __float_as_uint(x);
    uint32_t above = bits - 0x3f3504f3u;
    k += (int)above >> 23;
    float m = __uint_as_float((above & 0x007fffffu) + 0x3f3504f3u);
    float s = __fdiv_rn(__fsub_rn(m, 1.0f), __fadd_rn(m, 1.0f));
    float z = __fmul_rn(s, s);
    float p = 0.43173612f;
    p       = __fadd_rn(__fmul_rn(p, z), 0.57671437f);
    p       = __fadd_rn(__fmul_rn(p, z), 0.96179885f);
    p       = __fadd_rn(__fmul_rn(p, z), 2.88539008f);
    return __fadd_rn((float)k, __fmul_rn(p, s));
}

/*
 * States that wait for what they merge with, a bit for each level of the tree (docs/numerics.md,
 * "The tree"). A state waits for the rest of one node, on that node's level. Those that wait are
 * each inside the right half of the node before: their levels fall from the oldest to the newest,
 * no two are equal, and who has the states in that order needs to know no more. A state that no
 * node of these leaves has together with what follows never waits: nobody does then, and the next
 * leaf's `level` is at least `left`, that of the node with the first of the leaves and what is
 * before it.
 */
struct waiting {
    uint64_t levels; /* bit i: one waits on level i + 1 */

    __device__ __forceinline__ bool
    none() const
    {
        return levels == 0;
    }

    __device__ __forceinline__ uint32_t
    count() const
    {
        return __popcll(levels);
    }

    /* The node of the newest is over where a leaf comes at `level`. */
    __device__ __forceinline__ bool
    newest_below(uint32_t level) const
    {
        return levels != 0 && (uint32_t)__ffsll((long long)levels) < level;
    }

    __device__ __forceinline__ void
    add(uint32_t level)
    {
        levels |= 1ull << (level - 1);
    }

    /* The newest waits no more. Returns its level. */
    __device__ __forceinline__ uint32_t
    take()
    {
        uint32_t level = __ffsll((long long)levels);
        levels &= levels - 1;
        return level;
    }
};

/* What attn_state_finish_row() does to a row's A: A * scale / l, or nothing is left of it. */
struct finish_scales {
    float scale, l, lse;
    bool zero;
};

template <class X>
__device__ __forceinline__ finish_scales
finish_le(const X &x, uint32_t head, float l, int e)
{
    finish_scales f = {1.0f, l, -INFINITY, l == 0.0f};

    if (l == 0.0f) {
        return f;
    }
    f.lse = __fmul_rn(__fadd_rn((float)e, log2_of(l)), 0.693147180559945309f);
    if (x.sink_l != nullptr && x.sink_l[head] != 0.0f) {
        float sink_l       = x.sink_l[head];
        int sink_e         = x.sink_e[head];
        long long distance = (long long)sink_e - e;
        f.zero             = distance > DIFFERENCE_MAX;
        f.scale            = !f.zero && distance > 0 ? power_of((int)-distance) : 1.0f;
        merge_le(f.l, e, sink_l, sink_e);
    }
    return f;
}

__device__ __forceinline__ float
finish_a(const finish_scales &f, float a)
{
    return f.zero ? 0.0f : __fdiv_rn(__fmul_rn(a, f.scale), f.l);
}

/* a / l with r = 1 / l, for a of 0 or 2^-60 to 2^60, l of 2^-40 to 2^40: what division gives. The
 * sign is a's: corrections would make -0 into 0. */
__device__ __forceinline__ float
divide_near(float a, float l, float r)
{
    float q = __fmul_rn(a, r);
    q       = __fmaf_rn(__fmaf_rn(-q, l, a), r, q);
    q       = __fmaf_rn(__fmaf_rn(-q, l, a), r, q);
    return __uint_as_float(__float_as_uint(q) | (__float_as_uint(a) & 0x80000000u));
}

template <class X>
__device__ __forceinline__ void
store_o(const X &x, uint64_t at, float o)
{
    if (x.o_type == 1) { /* ATTN_F32 */
        ((float *)x.o)[at] = o;
    } else if (x.o_type == 2) { /* ATTN_F16 */
        ((__half *)x.o)[at] = __float2half_rn(o);
    } else {
        ((__nv_bfloat16 *)x.o)[at] = __float2bfloat16_rn(o);
    }
}

template <class X>
__device__ __forceinline__ void
report(const X &x, uint32_t entry, uint32_t query, uint32_t head)
{
    atomicMin(x.error, (unsigned long long)entry << 40 | (unsigned long long)query << 12 | head);
}

__device__ __forceinline__ bool
is_finite(float x)
{
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

#endif
