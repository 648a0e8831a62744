/*
 * Element types in plain integer arithmetic, without branches, so that compilers
 * vectorise the loops. Everything rounds to nearest even.
 */
#include "kernels/kernels.h"

#include <assert.h>
#include <string.h>

#define BLOCK 256u /* elements that go by way of f32 at a time */

static inline uint32_t
bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float
float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint16_t
bf16_of(float x)
{
    uint32_t bits    = bits_of(x);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    uint32_t nan     = bits >> 16 | 0x40u; /* quiet, and no NaN turns into infinity */
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/*
 * A binary16 has 13 bits of significand less. Adding half of its last place rounds; for
 * results below 2^-14 the place is 2^-24, and adding 0.5f rounds to it in hardware.
 */
static inline uint16_t
f16_of(float x)
{
    uint32_t bits  = bits_of(x);
    uint32_t sign  = bits >> 16 & 0x8000u;
    uint32_t size  = bits & 0x7fffffffu;
    uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    uint32_t usual = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
    uint32_t half  = size < 0x38800000u ? small : usual;
    half           = size >= 0x477ff000u ? 0x7c00u : half; /* 65,520 and above round to infinity */
    half           = size > 0x7f800000u ? 0x7e00u | (size >> 13 & 0x1ffu) : half;
    return (uint16_t)(sign | half);
}

static inline float
f16_to(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t size = (uint32_t)(half & 0x7fffu) << 13;
    float normal  = float_of(size) * 0x1p112f; /* also right for subnormals: exact */
    uint32_t bits = size >= 0x7c00u << 13 ? size | 0x7f800000u : bits_of(normal);
    return float_of(sign | bits);
}

static void
to_f32(float *restrict to, const void *restrict from, attn_dtype_t type, uint64_t n)
{
    const uint16_t *halves = from;

    if (type == ATTN_F16) {
        for (uint64_t i = 0; i < n; i++) {
            to[i] = f16_to(halves[i]);
        }
    } else if (type == ATTN_BF16) {
        for (uint64_t i = 0; i < n; i++) {
            to[i] = float_of((uint32_t)halves[i] << 16);
        }
    } else {
        memcpy(to, from, n * sizeof(*to));
    }
}

static void
from_f32(void *restrict to, attn_dtype_t type, const float *restrict from, uint64_t n)
{
    uint16_t *halves = to;

    if (type == ATTN_F16) {
        for (uint64_t i = 0; i < n; i++) {
            halves[i] = f16_of(from[i]);
        }
    } else if (type == ATTN_BF16) {
        for (uint64_t i = 0; i < n; i++) {
            halves[i] = bf16_of(from[i]);
        }
    } else {
        memcpy(to, from, n * sizeof(*from));
    }
}

void
attn_convert(void *to, attn_dtype_t to_type, const void *from, attn_dtype_t from_type, uint64_t n)
{
    size_t to_size = attn_dtype_size(to_type), from_size = attn_dtype_size(from_type);

    assert(to_size != 0 && from_size != 0);
    if (to_type == from_type) {
        memcpy(to, from, n * to_size);
    } else if (to_type == ATTN_F32) {
        to_f32(to, from, from_type, n);
    } else if (from_type == ATTN_F32) {
        from_f32(to, to_type, from, n);
    } else {
        float block[BLOCK];
        for (uint64_t i = 0; i < n; i += BLOCK) {
            uint64_t m = n - i < BLOCK ? n - i : BLOCK;
            to_f32(block, (const char *)from + i * from_size, from_type, m);
            from_f32((char *)to + i * to_size, to_type, block, m);
        }
    }
}
