/*
 * half.h: the two 16-bit floats. GGUF stores scales and some weights as f16, and
 * a cache may hold k and v as f16 or bf16. Every conversion rounds to nearest,
 * ties to even, and is plain integer work that a compiler can vectorise.
 */
#ifndef RUNNER_HALF_H
#define RUNNER_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t
float_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static inline float
bits_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

/** Times 2^112: the exponent's bias goes from f16's 15 to f32's 127, for subnormals too. */
static inline float
f16_to_float(uint16_t h)
{
    uint32_t magnitude = h & 0x7fffu;
    uint32_t bits      = magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13
                                              : float_bits(bits_float(magnitude << 13) * 0x1p112f);
    return bits_float(bits | (uint32_t)(h & 0x8000u) << 16);
}

static inline uint16_t
f16_from_float(float f)
{
    uint32_t bits = float_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t h;

    if (magnitude > 0x7f800000u) {
        h = 0x7e00u; /* NaN */
    } else if (magnitude >= 0x47800000u) {
        h = 0x7c00u; /* 65,536 and above, and infinity */
    } else if (magnitude < 0x38800000u) {
        /* Below 2^-14: next to 0.5 a float's last bit is 2^-24, f16's smallest number. */
        h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        h = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    return (uint16_t)(sign | h);
}

static inline uint16_t
bf16_from_float(float f)
{
    uint32_t bits = float_bits(f);

    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u); /* NaN stays NaN */
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif
