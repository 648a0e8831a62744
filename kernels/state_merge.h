/*
 * state_merge.h: the merge of two states (docs/numerics.md), for files that are compiled for
 * different instruction sets: IEEE additions and multiplications by powers of two in a
 * stated order, so all of them give the same bits.
 */
#ifndef ATTN_KERNELS_STATE_MERGE_H
#define ATTN_KERNELS_STATE_MERGE_H

#include <stdint.h>
#include <string.h>

/* Below this difference of exponents the smaller state would not change the larger one. */
#define STATE_DIFFERENCE_MAX 126

static inline float
state_exp2i(int32_t k)
{
    if (k < -STATE_DIFFERENCE_MAX) {
        return 0.0f;
    }
    uint32_t bits = (uint32_t)(k + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return power;
}

static inline void
state_add_scaled(float *restrict into, const float *restrict from, float scale, uint32_t d)
{
    for (uint32_t i = 0; i < d; i++) {
        float term = from[i] * scale;
        into[i] += term;
    }
}

static inline void
state_scale_and_add(float *restrict into, const float *restrict from, float scale, uint32_t d)
{
    for (uint32_t i = 0; i < d; i++) {
        float term = into[i] * scale;
        into[i]    = term + from[i];
    }
}

static inline void
state_add(float *restrict into, const float *restrict from, uint32_t d)
{
    for (uint32_t i = 0; i < d; i++) {
        into[i] += from[i];
    }
}

static inline void
state_merge(float *a_into, float *l_into, int32_t *e_into, const float *a_from, float l_from,
            int32_t e_from, uint32_t d)
{
    int64_t difference = (int64_t)e_from - *e_into;

    if (l_from == 0.0f) {
        return;
    }
    if (*l_into == 0.0f || difference > STATE_DIFFERENCE_MAX) {
        memcpy(a_into, a_from, d * sizeof(*a_into));
        *l_into = l_from;
        *e_into = e_from;
    } else if (difference == 0) {
        state_add(a_into, a_from, d);
        *l_into += l_from;
    } else if (difference > 0) {
        float scale = state_exp2i((int32_t)-difference);
        state_scale_and_add(a_into, a_from, scale, d);
        *l_into = *l_into * scale + l_from;
        *e_into = e_from;
    } else if (difference >= -STATE_DIFFERENCE_MAX) {
        float scale = state_exp2i((int32_t)difference);
        state_add_scaled(a_into, a_from, scale, d);
        *l_into += l_from * scale;
    }
}

#endif
