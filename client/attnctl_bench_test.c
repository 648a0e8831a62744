/* attnctl_bench_test.c: does the judge of attnctl bench tell right from wrong? */
#include "client/attnctl_bench.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

#define DIM 32u
#define HEADS 4u

static bench_options_t
shape(attn_dtype_t dtype)
{
    return (bench_options_t){.heads = HEADS, .kv_heads = 2, .head_dim = DIM, .dtype = dtype};
}

static void
test_one_token_is_answered_by_its_v(void **state)
{
    float v[2 * DIM], other[2 * DIM];

    (void)state;
    for (uint32_t dtype = ATTN_F32; dtype <= ATTN_BF16; dtype++) {
        bench_options_t b = shape((attn_dtype_t)dtype);
        bench_row('v', 7, 0, 3, 2 * DIM, ATTN_F32, v);
        bench_row('v', 8, 0, 3, 2 * DIM, ATTN_F32, other);
        for (uint32_t h = 0; h < HEADS; h++) {
            assert_true(bench_check(&b, 7, 1, 3, h, v + h / 2 * DIM));
            assert_false(bench_check(&b, 7, 1, 3, h, v + (1 - h / 2) * DIM)); /* another head */
            assert_false(bench_check(&b, 7, 1, 2, h, v + h / 2 * DIM));       /* layer */
            assert_false(bench_check(&b, 7, 1, 3, h, other + h / 2 * DIM));   /* sequence */
        }
        v[5] += 0.05f;
        assert_false(bench_check(&b, 7, 1, 3, 0, v));
        v[5] = NAN;
        assert_false(bench_check(&b, 7, 1, 3, 0, v));
    }
}

static void
test_two_tokens_are_weighed(void **state)
{
    bench_options_t b = shape(ATTN_F32);
    float q[HEADS * DIM], k[2][2 * DIM], v[2][2 * DIM], o[DIM];
    double x[2] = {0, 0};

    (void)state;
    bench_row('q', 7, 1, 0, HEADS * DIM, ATTN_F32, q);
    for (uint32_t t = 0; t < 2; t++) {
        bench_row('k', 7, t, 0, 2 * DIM, ATTN_F32, k[t]);
        bench_row('v', 7, t, 0, 2 * DIM, ATTN_F32, v[t]);
        for (uint32_t d = 0; d < DIM; d++) {
            x[t] += (double)q[d] * k[t][d] / sqrt(DIM);
        }
    }
    double weight = 1 / (1 + exp(x[1] - x[0])); /* of the first */
    for (uint32_t d = 0; d < DIM; d++) {
        o[d] = (float)(weight * v[0][d] + (1 - weight) * v[1][d]);
    }
    assert_true(bench_check(&b, 7, 2, 0, 0, o));
    assert_false(bench_check(&b, 7, 1, 0, 0, o));
    assert_false(bench_check(&b, 7, 3, 0, 0, o));
}

/* What is sent in 16 bits is what the judge computes with. */
static void
test_rows_are_the_same_in_all_dtypes(void **state)
{
    float wide[512];
    uint16_t half[512];

    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        bench_row("qkv"[kind], 1, 2, 3, 512, ATTN_F32, wide);
        bench_row("qkv"[kind], 1, 2, 3, 512, ATTN_BF16, half);
        for (uint32_t i = 0; i < 512; i++) {
            uint32_t bits = (uint32_t)half[i] << 16;
            float x;
            memcpy(&x, &bits, sizeof(x));
            assert_true(x == wide[i]);
        }
        bench_row("qkv"[kind], 1, 2, 3, 512, ATTN_F16, half);
        for (uint32_t i = 0; i < 512; i++) {
            int exponent = half[i] >> 10 & 31;
            double x     = exponent > 0 ? ldexp(1024 + (half[i] & 1023), exponent - 25) : 0;
            assert_true((half[i] & 0x8000 ? -x : x) == (double)wide[i]);
        }
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_token_is_answered_by_its_v),
        cmocka_unit_test(test_two_tokens_are_weighed),
        cmocka_unit_test(test_rows_are_the_same_in_all_dtypes),
    };

    bench_data_init();
    return cmocka_run_group_tests_name("attnctl bench", tests, NULL, NULL);
}
