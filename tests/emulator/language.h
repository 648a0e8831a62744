/*
 * language.h: what kernels/cuda says in the language of CUDA, for the host: the part that is the
 * same for all emulators, threads and memory not among it.
 */
#ifndef ATTN_TESTS_EMULATOR_LANGUAGE_H
#define ATTN_TESTS_EMULATOR_LANGUAGE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n)

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct emu_index {
    uint32_t x;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    _Float16 v;
};

template <class V>
static inline V
max(V a, V b)
{
    return a > b ? a : b;
}
template <class V>
static inline V
min(V a, V b)
{
    return a < b ? a : b;
}
static inline float2
make_float2(float x, float y)
{
    return {x, y};
}
static inline float4
make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
static inline uint4
make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}
static inline float
__int_as_float(int x)
{
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline int
__float_as_int(float x)
{
    int y;
    memcpy(&y, &x, 4);
    return y;
}
static inline float
__uint_as_float(uint32_t x)
{
    return __int_as_float((int)x);
}
static inline uint32_t
__float_as_uint(float x)
{
    return (uint32_t)__float_as_int(x);
}
static inline float
__fmul_rn(float a, float b)
{
    return a * b;
}
static inline float
__fadd_rn(float a, float b)
{
    return a + b;
}
static inline float
__fsub_rn(float a, float b)
{
    return a - b;
}
static inline float
__fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float
__fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
static inline int
__popc(uint32_t x)
{
    return __builtin_popcount(x);
}
static inline int
__popcll(uint64_t x)
{
    return __builtin_popcountll(x);
}
static inline int
__ffsll(long long x)
{
    return __builtin_ffsll(x);
}
static inline __half
__float2half_rn(float x)
{
    return {(_Float16)x};
}
static inline __nv_bfloat16
__float2bfloat16_rn(float x)
{
    uint32_t u = __float_as_uint(x);
    return {(uint16_t)(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline unsigned long long
atomicMin(unsigned long long *at, unsigned long long v)
{
    unsigned long long old = *at;
    *at                    = v < old ? v : old;
    return old;
}

#endif
