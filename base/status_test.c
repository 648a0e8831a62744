#include "base/checked.h"
#include "base/status.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

static void
test_fail_keeps_the_sentence(void **state)
{
    (void)state;
    assert_int_equal(attn_fail(ATTN_ERR_STALE, "chunk %d is at %d", 7, 3), ATTN_ERR_STALE);
    assert_string_equal(attn_last_error(), "chunk 7 is at 3");
    assert_int_equal(attn_fail_in(ATTN_ERR_STALE, "entry %d: ", 2), ATTN_ERR_STALE);
    assert_string_equal(attn_last_error(), "entry 2: chunk 7 is at 3");
    attn_fail(ATTN_ERR_INVALID, "again: %s", attn_last_error());
    assert_string_equal(attn_last_error(), "again: entry 2: chunk 7 is at 3");
}

static void
test_sentence_is_cut_at_the_limit(void **state)
{
    char long_text[2000];
    (void)state;
    memset(long_text, 'x', sizeof(long_text));
    long_text[sizeof(long_text) - 1] = 0;
    attn_fail(ATTN_ERR_INVALID, "%s", long_text);
    assert_int_equal(strlen(attn_last_error()), 511);
    attn_fail_in(ATTN_ERR_INVALID, "%s", long_text);
    assert_int_equal(strlen(attn_last_error()), 511);
}

static void
test_every_status_has_a_name_and_a_code(void **state)
{
    int known = 0;
    (void)state;
    for (int value = -100; value <= 0; value++) {
        if (!attn_status_is_known(value)) {
            continue;
        }
        known++;
        assert_true(strncmp(attn_strerror((attn_status_t)value), "ATTN_", 5) == 0);
        int code = attn_status_to_grpc((attn_status_t)value);
        assert_in_range(code, 0, 16);
        assert_int_equal(attn_status_to_grpc(attn_status_from_grpc(code)), code);
    }
    assert_int_equal(known, 21);
    assert_int_equal(attn_status_from_grpc(99), ATTN_ERR_INTERNAL);
}

static void
test_checked_products(void **state)
{
    uint64_t p = 1;
    (void)state;
    assert_true(attn_mul4(1u << 16, 1u << 16, 1u << 16, 1u << 15, &p));
    assert_int_equal(p, UINT64_C(1) << 63);
    assert_false(attn_mul4(1u << 16, 1u << 16, 1u << 16, 1u << 16, &p));
    assert_int_equal(attn_div_up(9, 4), 3);
    assert_int_equal(attn_div_up(UINT64_MAX, 2), UINT64_C(1) << 63);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fail_keeps_the_sentence),
        cmocka_unit_test(test_sentence_is_cut_at_the_limit),
        cmocka_unit_test(test_every_status_has_a_name_and_a_code),
        cmocka_unit_test(test_checked_products),
    };
    return cmocka_run_group_tests_name("base.status", tests, NULL, NULL);
}
