/* lanes_avx512.h: what leaf.inc wants of AVX-512, for the files that are compiled for it. */
#ifndef ATTN_KERNELS_CPU_LANES_AVX512_H
#define ATTN_KERNELS_CPU_LANES_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define VL 16
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) vf
v_fma(vf a, vf b, vf c)
{
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

static inline __attribute__((always_inline)) vf
v_f16(const uint16_t *p)
{
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline __attribute__((always_inline)) vf
v_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf)_mm512_slli_epi32(wide, 16);
}

static inline __attribute__((always_inline)) vf
v_max(vf a, vf b)
{
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
}

static inline __attribute__((always_inline)) vi
v_imax(vi a, vi b)
{
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

static inline __attribute__((always_inline)) float
v_top(vf x)
{
    return _mm512_reduce_max_ps((__m512)x);
}

static inline __attribute__((always_inline)) int
v_any(vi mask)
{
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}

/* Pairs of rows, pairs of pairs, then quarters of the vectors, twice. */
static inline __attribute__((always_inline)) void
v_transpose(vf *r)
{
    __m512 a[16], b[16];

#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i]     = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* b[i + j]: element j of each quarter of rows i to i + 3 */
        b[i]     = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 even_low  = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
        __m512 odd_low   = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
        __m512 even_high = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
        __m512 odd_high  = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
        r[j]             = (vf)_mm512_shuffle_f32x4(even_low, even_high, 0x88);
        r[j + 8]         = (vf)_mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        r[j + 4]         = (vf)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        r[j + 12]        = (vf)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}

static inline __attribute__((always_inline)) float
v_halves(const vf *x)
{
    __m512 whole = (__m512)x[0];
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    __m128 four  = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two   = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return two[0] + two[1];
}

#define TILE_ROWS 6
#define DOT_VECS 4
#define SUM_VECS 4
#define EIGHT_VECS 2

#endif
