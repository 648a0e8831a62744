#include "quant.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "half.h"

/** What the standard says: sign, 5 bits of exponent, 10 of fraction. */
static double
f16_value(uint16_t h)
{
    int exponent    = h >> 10 & 31;
    double fraction = h & 1023;
    double value    = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);

    return h & 0x8000 ? -value : value;
}

static void
test_every_f16_is_read_exactly(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = f16_to_float((uint16_t)h);
        if ((h & 0x7c00) == 0x7c00) {
            assert_true(h & 0x3ff ? isnan(f) : isinf(f) && (f < 0) == (h >> 15));
        } else {
            assert_true((double)f == f16_value((uint16_t)h));
            assert_int_equal(f16_from_float(f), h);
        }
    }
}

/** Between neighbours: the nearer one, and half way the even one. */
static void
test_f16_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float low = f16_to_float((uint16_t)h), high = f16_to_float((uint16_t)(h + 1));
        float half = low + (high - low) / 2; /* exact: a float has 13 bits more */
        assert_int_equal(f16_from_float(half), h + (h & 1));
        assert_int_equal(f16_from_float(nextafterf(half, 0)), h);
        assert_int_equal(f16_from_float(-nextafterf(half, 1e9f)), 0x8000 | (h + 1));
    }
    assert_int_equal(f16_from_float(65519.996f), 0x7bff);
    assert_int_equal(f16_from_float(65520), 0x7c00);
    assert_int_equal(f16_from_float(INFINITY), 0x7c00);
    assert_int_equal(f16_from_float(NAN) & 0x7fff, 0x7e00);
    assert_int_equal(f16_from_float(1e-30f), 0);
}

static void
test_bf16_rounds_to_nearest_even(void **state)
{
    (void)state;
    assert_int_equal(bf16_from_float(1.0f), 0x3f80);
    assert_int_equal(bf16_from_float(bits_float(0x3f808000)), 0x3f80); /* half way: even */
    assert_int_equal(bf16_from_float(bits_float(0x3f818000)), 0x3f82);
    assert_int_equal(bf16_from_float(bits_float(0x3f808001)), 0x3f81);
    assert_int_equal(bf16_from_float(-INFINITY), 0xff80);
    assert_true((bf16_from_float(bits_float(0x7f800001)) & 0x7f) != 0); /* still a NaN */
}

static void
test_block_formats(void **state)
{
    uint8_t q4[20] = {0x00, 0x38, 0x00, 0xc0}; /* d = 0.5, m = -2 */
    uint8_t q8[34] = {0x00, 0x34};             /* d = 0.25 */
    float values[32];
    (void)state;

    for (int j = 0; j < 16; j++) {
        q4[4 + j] = (uint8_t)((15 - j) << 4 | j);
    }
    quant_to_float(QUANT_Q4_1, q4, 32, values);
    for (int j = 0; j < 16; j++) {
        assert_true(values[j] == 0.5f * (float)j - 2);
        assert_true(values[16 + j] == 0.5f * (float)(15 - j) - 2);
    }
    for (int j = 0; j < 32; j++) {
        q8[2 + j] = (uint8_t)(int8_t)(8 * j - 128);
    }
    quant_to_float(QUANT_Q8_0, q8, 32, values);
    for (int j = 0; j < 32; j++) {
        assert_true(values[j] == 0.25f * (float)(8 * j - 128));
    }
    quant_to_float(QUANT_F16, q4, 2, values);
    assert_true(values[0] == 0.5f && values[1] == -2);
}

static void
test_sizes(void **state)
{
    uint64_t bytes;
    (void)state;
    assert_true(quant_bytes(QUANT_F32, 3, &bytes) && bytes == 12);
    assert_true(quant_bytes(QUANT_F16, 3, &bytes) && bytes == 6);
    assert_true(quant_bytes(QUANT_Q4_1, 64, &bytes) && bytes == 40);
    assert_true(quant_bytes(QUANT_Q8_0, 64, &bytes) && bytes == 68);
    assert_false(quant_bytes(QUANT_Q8_0, 33, &bytes));
    assert_false(quant_bytes(2, 32, &bytes));
    assert_false(quant_bytes(QUANT_F32, UINT64_MAX / 2, &bytes));
    assert_string_equal(quant_name(QUANT_Q4_1), "Q4_1");
    assert_null(quant_name(7));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_f16_is_read_exactly),
        cmocka_unit_test(test_f16_rounds_to_nearest_even),
        cmocka_unit_test(test_bf16_rounds_to_nearest_even),
        cmocka_unit_test(test_block_formats),
        cmocka_unit_test(test_sizes),
    };
    return cmocka_run_group_tests_name("examples.runner.quant", tests, NULL, NULL);
}
