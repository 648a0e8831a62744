/* The arithmetic for AVX2, FMA and F16C: 8 lanes. Compiled with these switched on. */
#include "kernels/cpu/leaf.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define VL 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

static inline __attribute__((always_inline)) vf
v_fma(vf a, vf b, vf c)
{
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

static inline __attribute__((always_inline)) vf
v_f16(const uint16_t *p)
{
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline __attribute__((always_inline)) vf
v_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __attribute__((always_inline)) vf
v_max(vf a, vf b)
{
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
}

static inline __attribute__((always_inline)) vi
v_imax(vi a, vi b)
{
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
}

static inline __attribute__((always_inline)) float
v_top(vf x)
{
    __m128 four =
        _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
}

static inline __attribute__((always_inline)) int
v_any(vi mask)
{
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
}

/* Pairs of rows, pairs of pairs, and the halves of the vectors. */
static inline __attribute__((always_inline)) void
v_transpose(vf *r)
{
    __m256 a[8], b[8];

#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i]     = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i]     = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i]     = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

static inline __attribute__((always_inline)) float
v_halves(const vf *x)
{
    __m256 eight = _mm256_add_ps((__m256)x[0], (__m256)x[1]);
    __m128 four  = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two   = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return two[0] + two[1];
}

#define TILE_ROWS 6
#define DOT_VECS 2
#define SUM_VECS 2
#define EIGHT_VECS 1

#include "kernels/cpu/leaf.inc"

const cpu_isa_t cpu_isa_avx2 = {
    .name = "avx2", .lanes = 8, .kind = "fma", .leaf = leaf, .widen = widen, .merge = merge};
