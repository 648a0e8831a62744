/*
 * primitives.h: kernels/cuda/primitives.cuh and wgmma.cuh for the host: a CTA's threads are fibers
 * of one thread (emulator.cc), and what the device does asynchronously happens as late as it may: a
 * copy when it is waited for or at a random time, a product at the wait for it. So a kernel that
 * reads or gives away too early shows it. Descriptors are read as the manual has them, with the
 * swizzle applied to addresses.
 */
#ifndef ATTN_TESTS_EMULATOR_PRIMITIVES_H
#define ATTN_TESTS_EMULATOR_PRIMITIVES_H

#include "kernels/cuda/image.h"
#include "tests/emulator/language.h"

/* ---- emulator.cc ---- */

extern emu_index threadIdx, blockIdx;
extern uint8_t *const emu_memory; /* shared memory: an address is an offset */

void emu_barrier_init(uint32_t bar, uint32_t count);
void emu_barrier_arrive(uint32_t bar, int64_t bytes);
void emu_barrier_wait(uint32_t bar, uint32_t phase);
void emu_copy_box(uint32_t to, const cuda_map_t *map, uint32_t c3, uint32_t c4, uint32_t bar);
void emu_copy_16(uint32_t to, const void *from);
void emu_copies_arrive(uint32_t bar);
void emu_copies_commit();
void emu_copies_wait(int n);
void emu_named(uint32_t id, uint32_t threads, bool wait);
void emu_sync(uint32_t threads);                    /* of the warp, the warpgroup, or all */
uint64_t emu_all(uint32_t value, uint32_t *values); /* of the warp's lanes, exchanged */
void emu_wgmma(bool bf16, int n, float *d, const uint32_t *a, uint64_t a_at, uint64_t b_at, int add,
               bool sum);
void emu_wgmma_commit();
void emu_wgmma_wait(int n);
uint32_t emu_address(const void *p);

/* ---- the language's, among threads ---- */

static inline void
__syncthreads()
{
    emu_sync(CUDA_MANY_THREADS);
}
static inline void
__syncwarp()
{
    emu_sync(32);
}
static inline uint32_t
__ballot_sync(uint32_t, bool p)
{
    uint32_t v[32], all = 0;
    emu_all(p, v);
    for (int i = 0; i < 32; i++) {
        all |= v[i] << i;
    }
    return all;
}
static inline bool
__any_sync(uint32_t m, bool p)
{
    return __ballot_sync(m, p) != 0;
}
static inline bool
__all_sync(uint32_t m, bool p)
{
    return __ballot_sync(m, p) == ~0u;
}
template <class V>
static inline V
__shfl_xor_sync(uint32_t, V x, int by)
{
    uint32_t v[32], mine;
    memcpy(&mine, &x, 4);
    emu_all(mine, v);
    memcpy(&x, &v[(threadIdx.x % 32) ^ by], 4);
    return x;
}

static inline uint64_t
__shfl_sync(uint32_t, uint64_t x, int from)
{
    uint32_t low[32], high[32];
    emu_all((uint32_t)x, low);
    emu_all((uint32_t)(x >> 32), high);
    return (uint64_t)high[from] << 32 | low[from];
}

/* ---- primitives.cuh ---- */

#define SHARED_MEMORY(name) uint8_t *name = emu_memory + 272 /* static variables lie before it */

static inline uint32_t
shared_of(const void *p)
{
    return emu_address(p);
}
static inline void
barrier_init(uint32_t bar, uint32_t n)
{
    emu_barrier_init(bar, n);
}
static inline void
barrier_arrive(uint32_t bar)
{
    emu_barrier_arrive(bar, 0);
}
static inline void
barrier_wait(uint32_t bar, uint32_t phase)
{
    emu_barrier_wait(bar, phase);
}
static inline void
barrier_expect(uint32_t bar, uint32_t n)
{
    emu_barrier_arrive(bar, n);
}
static inline void
barriers_for_copies()
{
}
static inline void
order_before_copies()
{
}
static inline void
fetch_ahead(const void *)
{
}
static inline void
let_next_kernel_begin()
{
}
static inline void
copy_box(uint32_t to, const cuda_map_t *map, uint32_t c3, uint32_t c4, uint32_t bar)
{
    emu_copy_box(to, map, c3, c4, bar);
}
static inline void
copy_16(uint32_t to, const void *from)
{
    emu_copy_16(to, from);
}
static inline void
copy_16_or_zero(uint32_t to, const void *from, bool there)
{
    static const uint8_t zeros[16] = {0};
    emu_copy_16(to, there ? from : zeros);
}
static inline void
copies_arrive(uint32_t bar)
{
    emu_copies_arrive(bar);
}
static inline void
copies_commit()
{
    emu_copies_commit();
}
template <int N>
static inline void
copies_wait()
{
    emu_copies_wait(N);
}
static inline void
store_near(uint32_t to, uint4 v)
{
    memcpy(emu_memory + to, &v, 16);
}
static inline void
named_wait(uint32_t id, uint32_t n)
{
    emu_named(id, n, true);
}
static inline void
named_arrive(uint32_t id, uint32_t n)
{
    emu_named(id, n, false);
}
template <int N>
static inline void
registers_give()
{
}
template <int N>
static inline void
registers_take()
{
}
static inline float
larger(float a, float b)
{
    return a != a || b != b ? NAN : fmaxf(a, b);
}
static inline float
exp2_of(float x)
{
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

template <class T> struct type_of;
template <> struct type_of<__nv_bfloat16> {
    static constexpr int shift = 0;
    static uint32_t
    pack(float low, float high)
    {
        return __float2bfloat16_rn(low).bits | (uint32_t)__float2bfloat16_rn(high).bits << 16;
    }
};
template <> struct type_of<__half> {
    static constexpr int shift = 15;
    static uint32_t
    pack(float low, float high)
    {
        uint16_t a[2];
        _Float16 v[2] = {(_Float16)low, (_Float16)high};
        memcpy(a, v, 4);
        return a[0] | (uint32_t)a[1] << 16;
    }
};

/* ---- wgmma.cuh ---- */

static inline void
wgmma_begin()
{
}
static inline void
wgmma_commit()
{
    emu_wgmma_commit();
}
template <int N>
static inline void
wgmma_wait()
{
    emu_wgmma_wait(N);
}
template <class V>
static inline void
wgmma_hold(V &)
{
}

template <class T, int N> struct wgmma {
    static void
    rows(float (&d)[N / 2], uint64_t a, uint64_t b, int add)
    {
        emu_wgmma(type_of<T>::shift == 0, N, d, nullptr, a, b, add, false);
    }
    template <int SUM>
    static void
    mixed(float (&d)[N / 2], const uint32_t *a, uint64_t b, int add)
    {
        emu_wgmma(type_of<T>::shift == 0, N, d, a, 0, b, add, SUM != 0);
    }
};

#endif
