/*
 * wgmma.cuh: the matrix instructions of a warpgroup (sm_90a), m64 nN k16 with f32 sums.
 *
 * Of a sum of 64 x N a thread holds N / 2: d[4 j + 2 h + i] is row 16 warp + lane / 4 + 8 h,
 * column 8 j + 2 (lane % 4) + i. Sums, and operands in registers, must not be touched between the
 * issue and the wait for it.
 */
#ifndef ATTN_KERNELS_CUDA_WGMMA_CUH
#define ATTN_KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/primitives.cuh"

/* What registers hold now is seen by the instructions issued after it. */
__device__ __forceinline__ void
wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void
wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most N groups are under way. */
template <int N>
__device__ __forceinline__ void
wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Uses of these registers stay on their side of this line. */
template <int N>
__device__ __forceinline__ void
wgmma_hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

template <int N>
__device__ __forceinline__ void
wgmma_hold(uint32_t (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+r"(d[i])::"memory");
    }
}

template <class T, int N> struct wgmma;

#define WGMMA_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_F16(i) WGMMA_F4(i), WGMMA_F4(i + 4), WGMMA_F4(i + 8), WGMMA_F4(i + 12)
#define WGMMA_F32(i) WGMMA_F16(i), WGMMA_F16(i + 16)
#define WGMMA_F64(i) WGMMA_F32(i), WGMMA_F32(i + 32)
#define WGMMA_F128(i) WGMMA_F64(i), WGMMA_F64(i + 64)

#define WGMMA_D32                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D64                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D128                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
    "%127"

/*
 * rows: both operands in shared memory, rows along rows; add: sums are added to (or replaced).
 * mixed: the first operand in registers, of the second the rows are the matrix's, or (SUM) they run
 * along the sum; sums are added to.
 * R, A, B, C, D, E: registers of the sums, and the numbers of the operands after them.
 */
#define WGMMA(T, NAME, N, R, A, B, C, D, E)                                                        \
    template <> struct wgmma<T, N> {                                                               \
        static __device__ __forceinline__ void                                                     \
        rows(float (&d)[N / 2], uint64_t a, uint64_t b, int add)                                   \
        {                                                                                          \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" C ", 0;"                               \
                         " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME          \
                         " {" WGMMA_D##R "}, %" A ", %" B ", p, 1, 1, 0, 0; }"                     \
                         : WGMMA_F##R(0)                                                           \
                         : "l"(a), "l"(b), "r"(add));                                              \
        }                                                                                          \
        template <int SUM>                                                                         \
        static __device__ __forceinline__ void                                                     \
        mixed(float (&d)[N / 2], const uint32_t *a, uint64_t b, int add)                           \
        {                                                                                          \
            asm volatile(                                                                          \
                "{ .reg .pred p; setp.ne.b32 p, %" F_##R ", 0;"                                    \
                                                         " wgmma.mma_async.sync.aligned.m64n" #N   \
                                                         "k16.f32." NAME "." NAME " {" WGMMA_D##R  \
                "}, {%" A ", %" B ", %" C ", %" D "}, %" E ", p, 1, 1, %" G_##R "; }"              \
                : WGMMA_F##R(0)                                                                    \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(SUM));         \
        }                                                                                          \
    };

#define F_32 "37"
#define F_64 "69"
#define F_128 "133"
#define G_32 "38"
#define G_64 "70"
#define G_128 "134"

#define WGMMA_TYPE(T, NAME)                                                                        \
    WGMMA(T, NAME, 64, 32, "32", "33", "34", "35", "36")                                           \
    WGMMA(T, NAME, 128, 64, "64", "65", "66", "67", "68")                                          \
    WGMMA(T, NAME, 256, 128, "128", "129", "130", "131", "132")

WGMMA_TYPE(__nv_bfloat16, "bf16")
WGMMA_TYPE(__half, "f16")

#endif
