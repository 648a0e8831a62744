#include "kernels/kernels.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define D 8u

static uint64_t chance_state = 20261122;

static uint32_t
chance(void)
{
    chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(chance_state >> 32);
}

static float
float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static uint32_t
bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static float
chance_float(void)
{
    return (float)(int32_t)chance() * 0x1p-31f;
}

typedef struct one {
    float a[D];
    float l;
    int32_t e;
} one_t;

static one_t
random_state(int32_t e)
{
    one_t s = {.l = 0.5f + fabsf(chance_float()) * 3, .e = e};
    for (uint32_t i = 0; i < D; i++) {
        s.a[i] = chance_float();
    }
    return s;
}

static one_t
merged(one_t x, one_t y)
{
    attn_state_merge_row(x.a, &x.l, &x.e, y.a, y.l, y.e, D);
    return x;
}

static void
assert_same(one_t x, one_t y)
{
    assert_int_equal(x.e, y.e);
    assert_int_equal(bits_of(x.l), bits_of(y.l));
    assert_memory_equal(x.a, y.a, sizeof(x.a));
}

static void
test_exp2i(void **state)
{
    (void)state;
    for (int k = 0; k >= -126; k--) {
        assert_true(attn_exp2i(k) == ldexpf(1, k));
    }
    assert_true(attn_exp2i(-127) == 0.0f);
    assert_true(attn_exp2i(INT32_MIN) == 0.0f);
}

/* The formula of docs/numerics.md, one rounding of the sum (and of a subnormal product). */
static void
test_merge_is_one_rounding(void **state)
{
    (void)state;
    for (int round = 0; round < 20000; round++) {
        one_t x = random_state((int32_t)(chance() % 300) - 150),
              y = random_state(x.e + (int32_t)(chance() % 260) - 130);
        x.a[0] = y.a[1] = 0; /* so that the smaller state shows to its end */
        one_t m         = merged(x, y);
        int32_t e       = x.e > y.e ? x.e : y.e;
        float sx        = x.e - e < -126 ? 0 : ldexpf(1, x.e - e),
              sy        = y.e - e < -126 ? 0 : ldexpf(1, y.e - e);
        assert_int_equal(m.e, e);
        for (uint32_t i = 0; i < D; i++) {
            volatile float px = x.a[i] * sx, py = y.a[i] * sy;
            assert_true(m.a[i] == px + py);
        }
        volatile float lx = x.l * sx, ly = y.l * sy;
        assert_true(m.l == lx + ly);
        assert_same(merged(y, x), m); /* commutative to the bit */
    }
}

static void
test_merge_keeps_subnormals(void **state)
{
    one_t big = random_state(0), small = random_state(-100);
    (void)state;

    for (uint32_t i = 0; i < D; i++) {
        big.a[i]   = 0;
        small.a[i] = 0x1.4p-48f; /* times 2^-100: 2.5 places of 2^-149, rounds to even: 2 */
    }
    one_t m = merged(big, small);
    assert_true(m.a[3] == 0x1p-148f);
}

static void
test_empty_is_the_identity(void **state)
{
    one_t s = random_state(7), empty = {.l = 0, .e = INT32_MIN};
    (void)state;

    for (uint32_t i = 0; i < D; i++) {
        empty.a[i] = NAN; /* ignored */
    }
    s.a[0] = -0.0f; /* copied, not added */
    assert_same(merged(s, empty), s);
    assert_same(merged(empty, s), s);
    one_t none = merged(empty, empty);
    assert_true(none.l == 0.0f && none.e == INT32_MIN);
}

static void
test_far_exponents_drop_the_smaller(void **state)
{
    one_t x = random_state(0), y = random_state(127), z = random_state(126);
    (void)state;

    assert_same(merged(x, y), y);
    assert_same(merged(y, x), y);
    x.a[0] = z.a[0] = 0x1p-10f;
    assert_true(merged(x, z).l == z.l + x.l * 0x1p-126f);
    x.e = INT32_MAX - 1; /* the difference itself does not overflow */
    y.e = -INT32_MAX;
    assert_same(merged(y, x), x);
}

static void
test_log2(void **state)
{
    (void)state;
    for (int k = -149; k <= 127; k++) {
        assert_true(attn_log2(ldexpf(1, k)) == (float)k);
    }
    for (int i = 0; i < 2000000; i++) {
        float x = float_of(chance() % 0x7f800000u);
        if (x == 0.0f) {
            continue;
        }
        double want = log2((double)x);
        assert_true(fabs(attn_log2(x) - want) <= 2.3e-7 * fmax(fabs(want), 0.5));
    }
    for (int i = -1000; i <= 1000; i++) { /* relative near 1 */
        float x     = 1.0f + (float)i * 0x1p-20f;
        double want = log2((double)x);
        assert_true(fabs(attn_log2(x) - want) <= 4e-7 * fabs(want));
    }
}

static void
test_sinks(void **state)
{
    float l;
    int32_t e;
    (void)state;

    for (int i = 0; i < 200000; i++) {
        float sink = chance_float() * 600;
        attn_state_of_sink(sink, &l, &e);
        assert_true(l >= 1 && l < 2);
        assert_true(fabs(ldexp(l, e) / exp(sink) - 1) <= 6.1e-8);
    }
    attn_state_of_sink(0, &l, &e);
    assert_true(l == 1 && e == 0);
    attn_state_of_sink(-INFINITY, &l, &e);
    assert_true(l == 0 && e == INT32_MIN);
    attn_state_of_sink(1e8f, &l, &e);
    assert_true(l >= 1 && l < 2 && abs(e - 144269504) <= 8);
}

static void
test_finish(void **state)
{
    one_t s = random_state(3);
    float o[D], lse, sink = 1.5f;
    (void)state;

    attn_state_finish_row(s.a, s.l, s.e, D, NULL, o, &lse);
    for (uint32_t i = 0; i < D; i++) {
        assert_true(o[i] == s.a[i] / s.l);
    }
    assert_true(fabs(lse - (3 + log2((double)s.l)) * log(2)) < 1e-6);

    attn_state_finish_row(s.a, s.l, s.e, D, &sink, o, &lse);
    for (uint32_t i = 0; i < D; i++) {
        double want = ldexp(s.a[i], 3) / (ldexp(s.l, 3) + exp(1.5));
        assert_true(fabs(o[i] - want) <= 2e-7 * fabs(want));
    }
    assert_true(fabs(lse - (3 + log2((double)s.l)) * log(2)) < 1e-6); /* without the sink */

    for (sink = -400; sink <= 400; sink += 7) {
        attn_state_finish_row(s.a, s.l, s.e, D, &sink, o, NULL);
        double want = ldexp(s.a[1], 3) / (ldexp(s.l, 3) + exp((double)sink));
        assert_true(fabs(o[1] - want) <= 2e-7 * fabs(want) + 0x1p-126);
    }
    attn_state_finish_row(s.a, 0, INT32_MIN, D, &sink, o, &lse);
    assert_true(o[0] == 0 && o[D - 1] == 0 && lse == -INFINITY);
}

static void
test_from_o_and_lse_and_back(void **state)
{
    one_t s;
    float o[D], back[D], lse;
    (void)state;

    for (int round = 0; round < 20000; round++) {
        float given = chance_float() * 300;
        for (uint32_t i = 0; i < D; i++) {
            o[i] = chance_float();
        }
        attn_state_from_row(o, given, D, s.a, &s.l, &s.e);
        assert_true(s.l >= 1 && s.l < 2);
        attn_state_finish_row(s.a, s.l, s.e, D, NULL, back, &lse);
        assert_true(fabsf(lse - given) <= 4e-7f * fmaxf(1, fabsf(given)));
        for (uint32_t i = 0; i < D; i++) {
            assert_true(fabsf(back[i] - o[i]) <= 2e-7f * fabsf(o[i]));
        }
    }
    attn_state_from_row(o, -INFINITY, D, s.a, &s.l, &s.e);
    assert_true(s.l == 0 && s.e == INT32_MIN);
    attn_state_from_row(o, NAN, D, s.a, &s.l, &s.e);
    assert_true(isnan(s.l)); /* shows in whatever it is merged into */
}

/* ---- element types ---- */

static float
widened(uint16_t half, attn_dtype_t type)
{
    float x;
    attn_convert(&x, ATTN_F32, &half, type, 1);
    return x;
}

static uint16_t
narrowed(float x, attn_dtype_t type)
{
    uint16_t half;
    attn_convert(&half, type, &x, ATTN_F32, 1);
    return half;
}

static void
test_every_half_survives(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F16, ATTN_BF16};
    (void)state;

    for (int t = 0; t < 2; t++) {
        for (uint32_t half = 0; half < 65536; half++) {
            float x = widened((uint16_t)half, types[t]);
            if (isnan(x)) {
                assert_true(isnan(widened(narrowed(x, types[t]), types[t])));
            } else {
                assert_int_equal(narrowed(x, types[t]), half);
            }
        }
    }
    assert_true(widened(0x3c00, ATTN_F16) == 1.0f && widened(0x0001, ATTN_F16) == 0x1p-24f);
    assert_true(widened(0x7bff, ATTN_F16) == 65504.0f && isinf(widened(0xfc00, ATTN_F16)));
    assert_true(widened(0x3f80, ATTN_BF16) == 1.0f);
}

/* Nearest, and even where two are as near: against neighbours in the 16-bit type itself. */
static void
test_narrowing_rounds_to_nearest_even(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F16, ATTN_BF16};
    (void)state;

    for (int t = 0; t < 2; t++) {
        float top = types[t] == ATTN_F16 ? 65519.0f : 3.38e38f;
        for (int i = 0; i < 400000; i++) {
            float x = t == 0 && i % 2 ? chance_float() * ldexpf(1, (int)(chance() % 44) - 27)
                                      : float_of(chance());
            if (!(fabsf(x) <= top)) {
                continue;
            }
            uint16_t half = narrowed(x, types[t]);
            double got    = fabs((double)widened(half, types[t]) - x);
            double up     = fabs((double)widened((uint16_t)(half + 1), types[t]) - x);
            double down = half & 0x7fff ? fabs((double)widened((uint16_t)(half - 1), types[t]) - x)
                                        : INFINITY;
            assert_true(got <= up && got <= down);
            assert_true((got < up && got < down) || half % 2 == 0 || isnan(up));
        }
    }
    assert_int_equal(narrowed(65519.996f, ATTN_F16), 0x7bff);
    assert_int_equal(narrowed(65520.0f, ATTN_F16), 0x7c00);
    assert_int_equal(narrowed(-INFINITY, ATTN_F16), 0xfc00);
    assert_int_equal(narrowed(FLT_MAX, ATTN_BF16), 0x7f80);
    assert_int_equal(narrowed(0x1p-25f, ATTN_F16), 0);
    assert_int_equal(narrowed(0x1.000002p-25f, ATTN_F16), 1);
    assert_int_equal(narrowed(-0.0f, ATTN_F16), 0x8000);
    assert_true(isnan(widened(narrowed(float_of(0x7f800001), ATTN_BF16), ATTN_BF16)));
    assert_true(isnan(widened(narrowed(float_of(0x7f800001), ATTN_F16), ATTN_F16)));
}

static void
test_conversion_between_halves(void **state)
{
    uint16_t in[1000], out[1000];
    (void)state;

    for (int i = 0; i < 1000; i++) {
        in[i] = narrowed(chance_float() * 100, ATTN_F16);
    }
    attn_convert(out, ATTN_BF16, in, ATTN_F16, 1000);
    for (int i = 0; i < 1000; i++) {
        assert_int_equal(out[i], narrowed(widened(in[i], ATTN_F16), ATTN_BF16));
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp2i),
        cmocka_unit_test(test_merge_is_one_rounding),
        cmocka_unit_test(test_merge_keeps_subnormals),
        cmocka_unit_test(test_empty_is_the_identity),
        cmocka_unit_test(test_far_exponents_drop_the_smaller),
        cmocka_unit_test(test_log2),
        cmocka_unit_test(test_sinks),
        cmocka_unit_test(test_finish),
        cmocka_unit_test(test_from_o_and_lse_and_back),
        cmocka_unit_test(test_every_half_survives),
        cmocka_unit_test(test_narrowing_rounds_to_nearest_even),
        cmocka_unit_test(test_conversion_between_halves),
    };
    return cmocka_run_group_tests_name("kernels.state", tests, NULL, NULL);
}
