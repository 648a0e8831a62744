/*
 * link.cuh: words and packets between GPUs, for exchange.cu. The test's emulator has the same
 * functions for the host (tests/exchange/primitives.h).
 *
 * A packet of 128 bits is one relaxed access of the whole system's scope: it comes whole or not at
 * all, and packets are in no order among each other.
 */
#ifndef ATTN_KERNELS_CUDA_LINK_CUH
#define ATTN_KERNELS_CUDA_LINK_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ void
store_packet(void *to, uint4 v)
{
    asm volatile("{ .reg .b64 lo, hi; .reg .b128 p; mov.b64 lo, {%1, %2}; mov.b64 hi, {%3, %4};"
                 " mov.b128 p, {lo, hi}; st.relaxed.sys.global.b128 [%0], p; }" ::"l"(to),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4
load_packet(const void *from)
{
    uint4 v;
    asm volatile("{ .reg .b64 lo, hi; .reg .b128 p; ld.relaxed.sys.global.b128 p, [%4];"
                 " mov.b128 {lo, hi}, p; mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi; }"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void
store_word(uint32_t *to, uint32_t v)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ uint32_t
load_word(const uint32_t *from)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ uint64_t
now_ns()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

/* All that the kernel before wrote is there. */
__device__ __forceinline__ void
wait_for_states()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define STACKS(name) extern __shared__ __align__(16) float name[]

#endif
