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

/* Each sum is ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) over its lanes. */
static inline __attribute__((always_inline)) void
v_sum8(const vf *acc, float *out)
{
    __m256 a    = _mm256_hadd_ps(_mm256_hadd_ps((__m256)acc[0], (__m256)acc[1]),
                                 _mm256_hadd_ps((__m256)acc[2], (__m256)acc[3]));
    __m256 b    = _mm256_hadd_ps(_mm256_hadd_ps((__m256)acc[4], (__m256)acc[5]),
                                 _mm256_hadd_ps((__m256)acc[6], (__m256)acc[7]));
    __m256 low  = _mm256_permute2f128_ps(a, b, 0x20);
    __m256 high = _mm256_permute2f128_ps(a, b, 0x31);
    _mm256_storeu_ps(out, _mm256_add_ps(low, high));
}

#include "kernels/cpu/leaf.inc"

const cpu_isa_t cpu_isa_avx2 = {.name = "avx2", .leaf = leaf, .widen = widen};
