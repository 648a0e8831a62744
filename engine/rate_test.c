/* What engine/rate.h says of a counter whose growth is known. */
#include "engine/rate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define SECOND UINT64_C(1000000000)

static void
test_a_steady_counter(void **state)
{
    engine_rate_t rate = {0};

    (void)state;
    assert_true(engine_rate_of(&rate, 5 * SECOND, 5) == 0);
    for (uint64_t tick = 0; tick <= 400; tick++) { /* every 100 ms, 7 a tick */
        uint64_t now = 3 * SECOND + tick * SECOND / 10;
        engine_rate_sample(&rate, now, 7 * tick);
        assert_true(engine_rate_of(&rate, now, 7 * tick) == (tick == 0 ? 0 : 70));
    }
    assert_int_equal(rate.n, 41);
}

static void
test_what_is_old_does_not_count(void **state)
{
    engine_rate_t rate = {0};

    (void)state;
    for (uint64_t s = 0; s < 30; s++) { /* 1000 in each of the first 15 seconds, then none */
        uint64_t count = 1000 * (s < 15 ? s : 15);
        engine_rate_sample(&rate, s * SECOND, count);
    }
    assert_true(engine_rate_of(&rate, 29 * SECOND, 15000) == 0);
    assert_true(engine_rate_of(&rate, 29 * SECOND, 16000) == 100);
    assert_true(engine_rate_of(&rate, 39 * SECOND, 16000) == 50); /* nobody sampled since */
}

static void
test_a_clock_or_counter_that_went_back(void **state)
{
    engine_rate_t rate = {0};

    (void)state;
    engine_rate_sample(&rate, 5 * SECOND, 100);
    assert_true(engine_rate_of(&rate, 4 * SECOND, 200) == 0);
    assert_true(engine_rate_of(&rate, 6 * SECOND, 50) == 0);
    engine_rate_sample(&rate, 4 * SECOND, 200);
    assert_int_equal(rate.n, 1);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_steady_counter),
        cmocka_unit_test(test_what_is_old_does_not_count),
        cmocka_unit_test(test_a_clock_or_counter_that_went_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
