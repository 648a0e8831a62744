/* checked.h: arithmetic on sizes from outside. Each returns false on overflow. */
#ifndef ATTN_BASE_CHECKED_H
#define ATTN_BASE_CHECKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline bool
attn_mul(uint64_t a, uint64_t b, uint64_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

static inline bool
attn_add(uint64_t a, uint64_t b, uint64_t *sum)
{
    return !__builtin_add_overflow(a, b, sum);
}

/** a * b * c * d; pass 1 for what is not needed. */
static inline bool
attn_mul4(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t *product)
{
    uint64_t ab, cd;
    return attn_mul(a, b, &ab) && attn_mul(c, d, &cd) && attn_mul(ab, cd, product);
}

static inline uint64_t
attn_div_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

static inline uint64_t
attn_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t
attn_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

#endif
