/*
 * States and their merge (docs/numerics.md). Each result is defined by IEEE operations in
 * a stated order: additions, multiplications by powers of two, one division. Anyone who
 * does the same, on any machine and in any language, gets the same bits. That is why exp2
 * and log2 are spelt out here instead of being taken from libm, and why this project is
 * compiled with -ffp-contract=off.
 */
#include "kernels/kernels.h"
#include "kernels/state_merge.h"

#include <math.h>
#include <string.h>

#define LOG2_E 1.4426950408889634
#define LN_2F 0.693147180559945309f

/* Beyond these a logit is an error, and a sink outweighs or adds nothing at all. */
#define EXPONENT_MAX (1 << 30)

float
attn_exp2i(int32_t k)
{
    return state_exp2i(k);
}

void
attn_state_merge_row(float *a_into, float *l_into, int32_t *e_into, const float *a_from,
                     float l_from, int32_t e_from, uint32_t d)
{
    state_merge(a_into, l_into, e_into, a_from, l_from, e_from, d);
}

/*
 * x = 2^k m with m in [sqrt(1/2), sqrt(2)); log2 m is an odd polynomial in (m-1) / (m+1),
 * fitted for relative error 7e-10. Exact for powers of two.
 */
float
attn_log2(float x)
{
    uint32_t bits;
    int32_t k = 0;

    if (x < 0x1p-126f) {
        x *= 0x1p24f;
        k = -24;
    }
    memcpy(&bits, &x, sizeof(bits));
    uint32_t above = bits - 0x3f3504f3u; /* bits of sqrt(1/2) */
    k += (int32_t)above >> 23;
    bits = (above & 0x007fffffu) + 0x3f3504f3u;
    float m;
    memcpy(&m, &bits, sizeof(m));

    float s = (m - 1.0f) / (m + 1.0f);
    float z = s * s;
    float p = 0.43173612f;
    p       = p * z + 0.57671437f;
    p       = p * z + 0.96179885f;
    p       = p * z + 2.88539008f;
    return (float)k + p * s;
}

/* 2^f for |f| <= 1/2 by its Taylor series: good to the last bits of a double. */
static double
exp2_fraction(double f)
{
    static const double over[] = {1.0,     1.0 / 2, 1.0 / 3,  1.0 / 4,  1.0 / 5,  1.0 / 6, 1.0 / 7,
                                  1.0 / 8, 1.0 / 9, 1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13};
    double t                   = f * 0.69314718055994530942;
    double r                   = 1.0;

    for (int i = 12; i >= 0; i--) {
        r = 1.0 + r * (t * over[i]);
    }
    return r;
}

/* e^x as l * 2^e with l in [1, 2). */
static void
exp_as_state(float x, float *l, int32_t *e)
{
    double y = x * LOG2_E;

    if (!(y <= EXPONENT_MAX)) {
        *l = y > EXPONENT_MAX ? 1.0f : NAN;
        *e = y > EXPONENT_MAX ? EXPONENT_MAX : 0;
        return;
    }
    if (y < -EXPONENT_MAX) {
        *l = 0.0f;
        *e = INT32_MIN;
        return;
    }
    int32_t whole = (int32_t)y;
    whole -= whole > y;
    double f = y - whole; /* in [0, 1) */
    *l       = (float)(f <= 0.5 ? exp2_fraction(f) : 2.0 * exp2_fraction(f - 1.0));
    *e       = whole;
    if (*l >= 2.0f) { /* rounded up */
        *l = 1.0f;
        *e += 1;
    }
}

void
attn_state_of_sink(float sink, float *l, int32_t *e)
{
    exp_as_state(sink, l, e);
}

static void
divide(float *restrict o, const float *restrict a, float scale, float l, uint32_t d)
{
    for (uint32_t i = 0; i < d; i++) {
        o[i] = a[i] * scale / l;
    }
}

void
attn_state_finish_row(const float *a, float l, int32_t e, uint32_t d, const float *sink_or_null,
                      float *o, float *lse_or_null)
{
    if (lse_or_null != NULL) {
        *lse_or_null = l == 0.0f ? -INFINITY : ((float)e + attn_log2(l)) * LN_2F;
    }
    if (l == 0.0f) {
        memset(o, 0, d * sizeof(*o));
        return;
    }

    /* The sink is a state with A = 0: merging it scales A and adds to l. */
    float scale = 1.0f;
    if (sink_or_null != NULL) {
        float sink_l;
        int32_t sink_e;
        attn_state_of_sink(*sink_or_null, &sink_l, &sink_e);
        if (sink_l != 0.0f) {
            int64_t difference = (int64_t)sink_e - e;
            if (difference > STATE_DIFFERENCE_MAX) {
                memset(o, 0, d * sizeof(*o));
                return;
            }
            scale = difference > 0 ? attn_exp2i((int32_t)-difference) : 1.0f;
        }
        attn_state_merge_row(o, &l, &e, o, sink_l, sink_e, 0);
    }
    divide(o, a, scale, l, d);
}

void
attn_state_from_row(const float *o, float lse, uint32_t d, float *a, float *l, int32_t *e)
{
    if (lse == -INFINITY) {
        *l = 0.0f;
        *e = INT32_MIN;
        return;
    }
    exp_as_state(lse, l, e);
    for (uint32_t i = 0; i < d; i++) {
        a[i] = o[i] * *l;
    }
}
