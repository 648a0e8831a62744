// How fast a GPU reads: a gibibyte or more, every byte once, by bulk copies into a ring in shared
// memory, which is how the attention kernels of compute capability 9.0 read, and by plain loads.
// Launched by gpu_limit.c.
#include <cstdint>

// Never true, so that nothing is written, and unknown to the compiler, so that all is read.
#define UNLIKELY_SUM 0x9e3779b9u

// The bounds leave registers for eight loads on their way: without them the compiler keeps four.
extern "C" __global__ void __launch_bounds__(256, 4)
read_loads(const uint4 *from, uint64_t n, uint32_t *sink)
{
    constexpr int AHEAD = 8;
    const uint64_t stride = (uint64_t)gridDim.x * blockDim.x;
    uint64_t i            = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum          = 0;

    for (; i + (AHEAD - 1) * stride < n; i += AHEAD * stride) {
        uint4 v[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            v[a] = __ldcs(from + i + a * stride);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            sum += v[a].x ^ v[a].y ^ v[a].z ^ v[a].w;
        }
    }
    for (; i < n; i += stride) {
        uint4 v = __ldcs(from + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == UNLIKELY_SUM) {
        *sink = sum;
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

#define SLOTS_MAX 16

__device__ static void
fetch(uint32_t slot, const char *from, uint32_t bytes, uint32_t barrier)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(slot),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ static void
wait(uint32_t barrier, uint32_t parity)
{
    uint32_t done;

    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

#endif

// One thread a CTA, tiles in turn among the CTAs; `slots` tiles are on their way at any time.
extern "C" __global__ void
read_bulk(const char *from, uint64_t n, uint32_t *sink, uint32_t tile, uint32_t slots)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) char ring[];
    __shared__ __align__(8) uint64_t barriers[SLOTS_MAX];
    const uint32_t base    = (uint32_t)__cvta_generic_to_shared(ring);
    const uint32_t barrier = (uint32_t)__cvta_generic_to_shared(barriers);
    const uint64_t tiles   = n / tile;
    uint64_t next          = blockIdx.x;
    uint32_t sum = 0, slot = 0, parity = 0;

    for (uint32_t s = 0; s < slots; s++) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * s) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (uint32_t s = 0; s < slots && next < tiles; s++, next += gridDim.x) {
        fetch(base + s * tile, from + next * tile, tile, barrier + 8 * s);
    }
    for (uint64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        wait(barrier + 8 * slot, parity);
        sum += *(volatile uint32_t *)(ring + slot * tile);
        if (next < tiles) {
            fetch(base + slot * tile, from + next * tile, tile, barrier + 8 * slot);
            next += gridDim.x;
        }
        if (++slot == slots) {
            slot = 0;
            parity ^= 1;
        }
    }
    if (sum == UNLIKELY_SUM) {
        *sink = sum;
    }
#endif
}
