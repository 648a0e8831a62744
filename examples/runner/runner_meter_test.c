#include "meter.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

static void
test_percentiles(void **state)
{
    meter_t meter = {0};
    (void)state;

    assert_true(meter_percentile(&meter, 50) == 0 && meter_mean(&meter) == 0);
    for (uint64_t i = 0; i < 3000; i++) {
        assert_true(meter_add(&meter, (i * 7 % 3000 + 1) * 1000)); /* 1 to 3,000 us, mixed */
    }
    assert_true(meter_mean(&meter) == 1500.5);
    assert_true(meter_percentile(&meter, 0) == 1);
    assert_true(meter_percentile(&meter, 50) == 1501);
    assert_true(meter_percentile(&meter, 99) == 2971);
    assert_true(meter_percentile(&meter, 100) == 3000);
    free(meter.ns);
}

static void
test_every_bit_changes_the_digest(void **state)
{
    float values[8]   = {1, -2, 0, 3e9f, 0.5f, 7, -0.0f, 1};
    uint64_t expected = digest_add(DIGEST_START, values, 8);
    (void)state;

    for (size_t bit = 0; bit < 8 * sizeof(values); bit++) {
        float changed[8];
        memcpy(changed, values, sizeof(values));
        ((uint8_t *)changed)[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_true(digest_add(DIGEST_START, changed, 8) != expected);
    }
    assert_true(digest_add(digest_add(DIGEST_START, values, 4), values + 4, 4) == expected);
    assert_true(digest_add(digest_add(DIGEST_START, values + 4, 4), values, 4) != expected);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_percentiles),
        cmocka_unit_test(test_every_bit_changes_the_digest),
    };
    return cmocka_run_group_tests_name("examples.runner.meter", tests, NULL, NULL);
}
