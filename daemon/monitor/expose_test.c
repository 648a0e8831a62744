#include "daemon/monitor/expose.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void
test_text(void **state)
{
    static const uint64_t counts[] = {1, 0, 2, 4};
    expose_t e;

    (void)state;
    assert_true(expose_open(&e));
    expose_counter(&e, "a_total", "Of a.", UINT64_C(9007199254740991));
    expose_gauge(&e, "b", "Of b.", 0.25);
    expose_family(&e, "c", "gauge", "Of c.");
    expose_sample(&e, "c", 3, "x", "a\"b\\c\nd", "y", "", NULL);
    expose_times(&e, "d_seconds", "Of d.", 1500, counts, 4, 1000);
    assert_true(expose_close(&e));
    assert_string_equal(e.text,
                        "# HELP a_total Of a.\n# TYPE a_total counter\na_total 9007199254740991\n"
                        "# HELP b Of b.\n# TYPE b gauge\nb 0.25\n"
                        "# HELP c Of c.\n# TYPE c gauge\nc{x=\"a\\\"b\\\\c\\nd\",y=\"\"} 3\n"
                        "# HELP d_seconds Of d.\n# TYPE d_seconds histogram\n"
                        "d_seconds_bucket{le=\"1e-06\"} 1\nd_seconds_bucket{le=\"2e-06\"} 1\n"
                        "d_seconds_bucket{le=\"4e-06\"} 3\nd_seconds_bucket{le=\"+Inf\"} 7\n"
                        "d_seconds_sum 1.5e-06\nd_seconds_count 7\n");
    assert_int_equal(e.size, strlen(e.text));
    free(e.text);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
