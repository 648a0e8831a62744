/* The constants of a link: by pings of a link that is made up, and by runs that are. */
#include "client/measure.h"

#include "base/clock.h"
#include "base/status.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <cmocka.h>

/* ---- pings ---- */

typedef struct slow_link {
    link_t link;
    uint32_t small, large, fails_from;
} slow_link_t;

#define SMALL_NS (200 * 1000)
#define LARGE_NS (2 * ATTN_NS_PER_MS)

static attn_status_t
slow_ping(link_t *base, uint32_t bytes, uint64_t deadline_ns)
{
    slow_link_t *link = (slow_link_t *)(void *)base;
    uint32_t *count   = bytes == 0 ? &link->small : &link->large;

    (void)deadline_ns;
    assert_true(bytes <= LINK_PING_MAX);
    if (link->small + link->large >= link->fails_from) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "gone");
    }
    ++*count;
    nanosleep(&(struct timespec){.tv_nsec = bytes == 0 ? SMALL_NS : LARGE_NS}, NULL);
    return ATTN_OK;
}

static const link_ops_t slow_ops = {.name = "slow", .ping = slow_ping};

static void
test_pings_tell_hop_and_bandwidth(void **state)
{
    slow_link_t link = {.link = {.ops = &slow_ops}, .fails_from = UINT32_MAX};
    cost_link_t way;
    (void)state;
    assert_int_equal(measure_link(&link.link, UINT64_MAX, &way), ATTN_OK);
    assert_true(way.hop_seconds >= SMALL_NS * 1e-9);
    /* No faster than the sleeps, a fourth of the time being the least that bytes are said to take;
     * slower on a machine that is busy. */
    assert_true(way.bandwidth > 0 && way.bandwidth <= 2.0 * LINK_PING_MAX / (LARGE_NS * 1e-9 / 4));
    assert_int_equal(link.small, 10);
    assert_true(link.large >= 1 && link.large <= 5);
}

static void
test_a_worker_that_does_not_answer_has_no_figures(void **state)
{
    (void)state;
    for (uint32_t n = 0; n < 11; n++) {
        slow_link_t link = {.link = {.ops = &slow_ops}, .fails_from = n};
        cost_link_t way  = {.hop_seconds = 1};
        assert_int_equal(measure_link(&link.link, UINT64_MAX, &way), ATTN_ERR_UNAVAILABLE);
        assert_true(way.hop_seconds == 0 && way.bandwidth == 0);
    }
}

static void
test_merging_has_a_rate(void **state)
{
    (void)state;
    double rate = measure_merge();
    assert_true(isfinite(rate) && rate > 1e6);
    assert_true(measure_merge() == rate);
}

/* ---- runs ---- */

static void
assert_about(double got, double wanted)
{
    if (!(fabs(got - wanted) <= 1e-3 * wanted)) {
        fail_msg("%g is not about %g", got, wanted);
    }
}

#define NOW UINT64_C(1000)

/* A link of 50 us a hop and 2 bytes a ns. */
static void
run(way_meter_t *meter, uint64_t bytes)
{
    way_meter_run(meter, bytes, 50000 + bytes / 2, NOW);
}

static void
test_runs_tell_hop_and_bandwidth(void **state)
{
    way_meter_t meter = {0};
    cost_link_t link  = {.hop_seconds = 1};
    (void)state;
    assert_false(way_meter_read(&meter, &link));
    assert_true(link.hop_seconds == 0);
    for (uint32_t i = 0; i < WAY_METER_LEAST; i++) {
        assert_false(way_meter_read(&meter, &link));
        run(&meter, 20000);
    }
    assert_true(way_meter_read(&meter, &link));
    assert_about(link.hop_seconds, 60e-6); /* what the bytes take is not known yet */
    assert_true(link.bandwidth == 0 && link.send_seconds == 0);
    for (uint32_t i = 0; i < WAY_METER_LEAST; i++) {
        run(&meter, 4 << 20);
        way_meter_sent(&meter, 1 << 10, 7000);
        way_meter_sent(&meter, 4 << 20, 900000); /* copying */
    }
    assert_true(way_meter_read(&meter, &link));
    assert_about(link.hop_seconds, 50e-6);
    assert_about(link.bandwidth, 2e9);
    assert_about(link.send_seconds, 7e-6);
    assert_true(way_meter_is_fresh(&meter, NOW + WAY_METER_STALE_NS - 1));
    assert_false(way_meter_is_fresh(&meter, NOW + WAY_METER_STALE_NS));
}

static void
test_old_runs_are_forgotten_and_odd_ones_pass(void **state)
{
    way_meter_t meter = {0};
    cost_link_t link;
    (void)state;
    for (uint32_t i = 0; i < 1000; i++) {
        way_meter_run(&meter, 100, 1000000, NOW);
    }
    for (uint32_t i = 0; i < WAY_METER_SAMPLES; i++) {
        way_meter_run(&meter, 100, i % 4 == 0 ? UINT64_MAX : 3000, NOW);
    }
    assert_true(way_meter_read(&meter, &link));
    assert_about(link.hop_seconds, 3e-6);
    for (uint32_t i = 0; i < WAY_METER_SAMPLES; i++) {
        way_meter_run(&meter, UINT64_MAX, 0, NOW); /* more than there are */
    }
    assert_true(way_meter_read(&meter, &link));
    assert_true(link.bandwidth >= 0 && isfinite(link.bandwidth));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pings_tell_hop_and_bandwidth),
        cmocka_unit_test(test_a_worker_that_does_not_answer_has_no_figures),
        cmocka_unit_test(test_merging_has_a_rate),
        cmocka_unit_test(test_runs_tell_hop_and_bandwidth),
        cmocka_unit_test(test_old_runs_are_forgotten_and_odd_ones_pass),
    };
    return cmocka_run_group_tests_name("client.measure", tests, NULL, NULL);
}
