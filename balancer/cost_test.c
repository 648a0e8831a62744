#include "balancer/cost.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

static const attn_geometry_t geometry = {
    .size       = sizeof(attn_geometry_t),
    .layers     = 32,
    .q_heads    = 32,
    .kv_heads   = 8,
    .head_dim_k = 128,
    .head_dim_v = 64,
    .kv_dtype   = ATTN_BF16,
    .page_size  = 16,
    .chunk_size = 2048,
};

static void
test_token_bytes_are_those_of_one_layer(void **state)
{
    attn_geometry_t f32 = geometry;
    (void)state;
    assert_int_equal(cost_kv_token_bytes(&geometry), 8 * (128 + 64) * 2);
    f32.kv_dtype = ATTN_F32;
    assert_int_equal(cost_kv_token_bytes(&f32), 8 * (128 + 64) * 4);
}

static void
test_one_worker_costs_its_reading(void **state)
{
    cost_constants_t constants = {.read_bandwidth = 1e9, .hop_seconds = 1, .link_bandwidth = 1};
    (void)state;
    assert_true(cost_layer_seconds(&constants, &geometry, 0, 1) == 0);
    double seconds = cost_layer_seconds(&constants, &geometry, 1000000, 1);
    assert_true(seconds > 3.071 && seconds < 3.073); /* 3,072 bytes a token */
}

/* Two workers: half the reading, one hop, and q, partials less one o over the link. */
static void
test_two_workers_pay_hop_and_bytes(void **state)
{
    cost_constants_t constants = {.read_bandwidth = 1e9, .hop_seconds = 0.5, .link_bandwidth = 1e6};
    double q = 32 * 128 * 2, o = 32 * 64 * 2, partial = 32 * (64 + 2) * 4;
    double wanted = 3.072 / 2 + 0.5 + (2 * (q + partial) - q - o) / 1e6;
    (void)state;
    double seconds = cost_layer_seconds(&constants, &geometry, 1000000, 2);
    assert_true(seconds > wanted * (1 - 1e-12) && seconds < wanted * (1 + 1e-12));
}

static void
test_cost_is_monotone(void **state)
{
    cost_constants_t constants;
    (void)state;
    cost_constants_init(&constants);
    for (uint32_t workers = 1; workers <= 64; workers++) {
        double before = -1;
        for (uint64_t tokens = 0; tokens <= UINT64_C(1) << 40; tokens = tokens ? 2 * tokens : 1) {
            double seconds = cost_layer_seconds(&constants, &geometry, tokens, workers);
            assert_true(seconds > before);
            before = seconds;
        }
    }
    /* Slower parts make it dearer. */
    double usual          = cost_layer_seconds(&constants, &geometry, 100000, 8);
    cost_constants_t slow = constants;
    slow.hop_seconds *= 2;
    assert_true(cost_layer_seconds(&slow, &geometry, 100000, 8) > usual);
    slow = constants;
    slow.link_bandwidth /= 2;
    assert_true(cost_layer_seconds(&slow, &geometry, 100000, 8) > usual);
    slow = constants;
    slow.read_bandwidth /= 2;
    assert_true(cost_layer_seconds(&slow, &geometry, 100000, 8) > usual);
}

/* Seconds of so many chunks where each worker has as many as the one that has the most. */
static double
spread_seconds(const cost_constants_t *constants, uint64_t chunks, uint32_t workers)
{
    uint32_t n = workers < 64 ? workers : 64;
    n          = chunks < n ? (uint32_t)chunks : n;
    return cost_layer_seconds(constants, &geometry, (chunks + n - 1) / n * n * geometry.chunk_size,
                              n);
}

static void
test_break_even_is_where_the_costs_cross(void **state)
{
    static const double bandwidths[] = {2e9, 20e9, 400e9, 4e12};
    static const double hops[]       = {1e-6, 35e-6, 200e-6, 1e-2};
    static const uint32_t counts[]   = {2, 3, 8, 9, 16, 63, 64, 65, 1000};
    (void)state;
    for (int i = 0; i < 64; i++) {
        cost_constants_t constants = {
            .read_bandwidth = bandwidths[i % 4],
            .hop_seconds    = hops[i / 4 % 4],
            .link_bandwidth = bandwidths[i / 16],
        };
        for (int w = 0; w < 9; w++) {
            uint64_t tokens = cost_break_even_tokens(&constants, &geometry, counts[w]);
            uint64_t chunks = tokens / geometry.chunk_size;
            assert_int_equal(tokens % geometry.chunk_size, 0);
            assert_true(chunks >= 1);
            for (uint64_t c = chunks > 100 ? chunks - 99 : 1; c <= chunks + 200; c++) {
                double whole =
                    cost_layer_seconds(&constants, &geometry, c * geometry.chunk_size, 1);
                double spread = spread_seconds(&constants, c, counts[w]);
                assert_true(c > chunks ? spread < whole * (1 + 1e-12)
                                       : spread > whole * (1 - 1e-12));
            }
        }
    }
}

/* With many workers it is not all of them that a sequence goes to. */
static void
test_more_workers_do_not_spread_later(void **state)
{
    cost_constants_t constants;
    (void)state;
    cost_constants_init(&constants);
    assert_int_equal(cost_break_even_tokens(&constants, &geometry, 1000),
                     cost_break_even_tokens(&constants, &geometry, 64));
    assert_true(cost_break_even_tokens(&constants, &geometry, 1000) <=
                cost_break_even_tokens(&constants, &geometry, 8));
}

static void
test_one_worker_never_spreads(void **state)
{
    cost_constants_t constants;
    (void)state;
    cost_constants_init(&constants);
    assert_true(cost_break_even_tokens(&constants, &geometry, 0) == UINT64_MAX);
    assert_true(cost_break_even_tokens(&constants, &geometry, 1) == UINT64_MAX);
    constants.link_bandwidth = 1e-30;
    assert_true(cost_break_even_tokens(&constants, &geometry, 8) == UINT64_MAX);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_token_bytes_are_those_of_one_layer),
        cmocka_unit_test(test_one_worker_costs_its_reading),
        cmocka_unit_test(test_two_workers_pay_hop_and_bytes),
        cmocka_unit_test(test_cost_is_monotone),
        cmocka_unit_test(test_break_even_is_where_the_costs_cross),
        cmocka_unit_test(test_more_workers_do_not_spread_later),
        cmocka_unit_test(test_one_worker_never_spreads),
    };
    return cmocka_run_group_tests_name("balancer.cost", tests, NULL, NULL);
}
