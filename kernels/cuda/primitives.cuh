/*
 * primitives.cuh: instructions that C++ has no word for: barriers, copies, matrices. The emulator
 * of the tests has the same functions for the host (tests/emulator/primitives.h).
 */
#ifndef ATTN_KERNELS_CUDA_PRIMITIVES_CUH
#define ATTN_KERNELS_CUDA_PRIMITIVES_CUH

#include "kernels/cuda/image.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* ---- shared memory and barriers ---- */

/* The shared memory that the launch asked for. */
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) uint8_t name[]

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

/* The same, or zeros. */
__device__ __forceinline__ void
copy_16_or_zero(uint32_t to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

/* A box of a tensor of 5 dimensions, at the 4th and 5th coordinate. */
__device__ __forceinline__ void
copy_box(uint32_t to, const cuda_map_t *map, uint32_t c3, uint32_t c4, uint32_t bar)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %2, %2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(c3), "r"(c4), "r"(bar)
                 : "memory");
#endif
}

/* This thread's copies so far are a group. */
__device__ __forceinline__ void
copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until at most N groups of this thread are under way. */
template <int N>
__device__ __forceinline__ void
copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* A named barrier among so many threads: wait for it, or only be counted. */
__device__ __forceinline__ void
named_wait(uint32_t id, uint32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void
named_arrive(uint32_t id, uint32_t threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* The barrier counts this thread as arrived when its copies so far are done. */
__device__ __forceinline__ void
copies_arrive(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

/* ---- registers ---- */

/* The warpgroup has so many registers a thread from here on. */
template <int N>
__device__ __forceinline__ void
registers_give()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void
registers_take()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
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

/* ---- arithmetic ---- */

/* The larger one; neither, if one is not a number. */
__device__ __forceinline__ float
larger(float a, float b)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/* Weights below 2^-126 of the largest are nothing. */
__device__ __forceinline__ float
exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
