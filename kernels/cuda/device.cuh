/*
 * device.cuh: what the attention kernels share: barriers, copies, matrix instructions, and the
 * arithmetic of states (docs/numerics.md), operation by operation as the host has it.
 */
#ifndef ATTN_KERNELS_CUDA_DEVICE_CUH
#define ATTN_KERNELS_CUDA_DEVICE_CUH

#include "kernels/cuda/image.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define EMPTY_E ((int)0x80000000)
#define DIFFERENCE_MAX 126
#define LOG2_E 1.44269504088896340736f
#define Y_MAX 1073741824.0f /* 2^30: a logit beyond is an error */

/* ---- shared memory and barriers ---- */

__device__ __forceinline__ uint32_t
shared_of(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* What the compiler is not to compute anew wherever it is used. */
__device__ __forceinline__ uint32_t
kept(uint32_t x)
{
    asm volatile("" : "+r"(x));
    return x;
}

template <class V>
__device__ __forceinline__ V
load_near(uint32_t at)
{
    V v;
    if constexpr (sizeof(V) == 16) {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(*(uint32_t *)&v.x), "=r"(*(uint32_t *)&v.y), "=r"(*(uint32_t *)&v.z),
                       "=r"(*(uint32_t *)&v.w)
                     : "r"(at));
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(*(uint32_t *)&v.x), "=r"(*(uint32_t *)&v.y)
                     : "r"(at));
    } else {
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(*(uint32_t *)&v) : "r"(at));
    }
    return v;
}

template <class V>
__device__ __forceinline__ void
store_near(uint32_t at, const V &v)
{
    if constexpr (sizeof(V) == 16) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at),
                     "r"(*(const uint32_t *)&v.x), "r"(*(const uint32_t *)&v.y),
                     "r"(*(const uint32_t *)&v.z), "r"(*(const uint32_t *)&v.w)
                     : "memory");
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(*(const uint32_t *)&v.x),
                     "r"(*(const uint32_t *)&v.y)
                     : "memory");
    } else {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*(const uint32_t *)&v) : "memory");
    }
}

__device__ __forceinline__ void
barrier_init(uint32_t bar, uint32_t count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void
barrier_arrive(uint32_t bar)
{
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void
barrier_wait(uint32_t bar, uint32_t phase)
{
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(bar), "r"(phase)
                     : "memory");
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(bar), "r"(phase)
                     : "memory");
#endif
    } while (done == 0);
}

/* Barriers that this thread initialized are there for the copy engine. */
__device__ __forceinline__ void
barriers_for_copies()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

/* Writes of this thread to shared memory come before later ones of the copy engine. */
__device__ __forceinline__ void
order_before_copies()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void
barrier_expect(uint32_t bar, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void
copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t bar)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
#endif
}

__device__ __forceinline__ void
copy_16(uint32_t to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* The barrier counts this thread as arrived when its copies so far are done. */
__device__ __forceinline__ void
copies_arrive(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

/* What is read here soon comes near. */
__device__ __forceinline__ void
fetch_ahead(const void *at)
{
    asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
}

/* ---- kernels that follow each other ---- */

/* The next kernel of the stream may come up while this one ends. */
__device__ __forceinline__ void
let_next_kernel_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* All that the kernel before wrote is there. */
__device__ __forceinline__ void
wait_for_kernel_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ---- matrices ---- */

__device__ __forceinline__ void
load_matrix(uint32_t *r, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void
load_matrix_turned(uint32_t *r, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ uint32_t
turn(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

template <class T> struct type_of;

template <> struct type_of<__nv_bfloat16> {
    static constexpr int shift = 0; /* p enters the matrix unit times 2^shift */

    static __device__ __forceinline__ void
    multiply(float *c, const uint32_t *a, uint32_t b0, uint32_t b1)
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    static __device__ __forceinline__ uint32_t
    pack(float low, float high)
    {
        __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *(uint32_t *)&v;
    }
};

template <> struct type_of<__half> {
    static constexpr int shift = 15; /* or the tail of small weights is lost */

    static __device__ __forceinline__ void
    multiply(float *c, const uint32_t *a, uint32_t b0, uint32_t b1)
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }

    static __device__ __forceinline__ uint32_t
    pack(float low, float high)
    {
        __half2 v = __floats2half2_rn(low, high);
        return *(uint32_t *)&v;
    }
};

/* ---- states ---- */

/* Weights below 2^-126 of the largest are nothing. */
__device__ __forceinline__ float
exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

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

/* What attn_state_finish_row() does to a row's A: A * scale / l, or nothing is left of it. */
struct finish_scales {
    float scale, l, lse;
    bool zero;
};

__device__ __forceinline__ finish_scales
finish_le(const cuda_args_t &x, uint32_t head, float l, int e)
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

__device__ __forceinline__ void
store_o(const cuda_args_t &x, uint64_t at, float o)
{
    if (x.o_type == 1) { /* ATTN_F32 */
        ((float *)x.o)[at] = o;
    } else if (x.o_type == 2) { /* ATTN_F16 */
        ((__half *)x.o)[at] = __float2half_rn(o);
    } else {
        ((__nv_bfloat16 *)x.o)[at] = __float2bfloat16_rn(o);
    }
}

__device__ __forceinline__ void
report(const cuda_args_t &x, uint32_t entry, uint32_t query, uint32_t head)
{
    atomicMin(x.error, (unsigned long long)entry << 40 | (unsigned long long)query << 12 | head);
}

__device__ __forceinline__ bool
is_finite(float x)
{
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

#endif
