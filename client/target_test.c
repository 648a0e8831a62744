/* target_test.c: what attn_client_open() takes as a target, and what it refuses. */
#include "client/target.h"

#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

static void
test_addresses(void **state)
{
    static const char *const good[] = {"127.0.0.1:7070", "h:1",     "host.example:65535",
                                       "[::1]:80",       "unix:/a", "unix:relative.sock"};
    static const char *const bad[]  = {"",          "host",    ":80",     "host:",      "host:0",
                                       "host:-1",   "host:+1", "host: 1", "host:65536", "host:1x",
                                       "host:1KiB", "unix:",   "cpu",     "inproc:cpu"};
    target_t target;

    (void)state;
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        assert_int_equal(target_parse(good[i], &target), ATTN_OK);
        assert_false(target.inproc);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        if (target_parse(bad[i], &target) != ATTN_ERR_INVALID) {
            fail_msg("target \"%s\" was taken", bad[i]);
        }
        assert_non_null(strstr(attn_last_error(), "HOST:PORT"));
    }
    assert_int_equal(target_parse(NULL, &target), ATTN_ERR_INVALID);
}

static void
test_a_long_address_is_refused(void **state)
{
    char text[300];
    target_t target;

    (void)state;
    memset(text, 'h', sizeof(text));
    memcpy(text + 124, ":80", 4);
    assert_int_equal(target_parse(text, &target), ATTN_OK); /* 127 bytes */
    memset(text, 'h', 126);
    memcpy(text + 125, ":80", 4);
    assert_int_equal(target_parse(text, &target), ATTN_ERR_INVALID);
    memset(text, 'h', 290);
    memcpy(text + 290, ":80", 4);
    assert_int_equal(target_parse(text, &target), ATTN_ERR_INVALID);
}

static void
test_inproc_and_its_defaults(void **state)
{
    target_t target;

    (void)state;
    assert_int_equal(target_parse("inproc://cpu", &target), ATTN_OK);
    assert_true(target.inproc);
    assert_string_equal(target.device, "cpu");
    assert_int_equal(target.workers, 1);
    assert_int_equal(target.threads, 0);
    assert_int_equal(target.slab_bytes, UINT64_C(1) << 30);

    /* Whether a backend exists is for the engine to say; its name has at most 15 bytes. */
    assert_int_equal(target_parse("inproc://abcdefghijklmno?", &target), ATTN_OK);
    assert_string_equal(target.device, "abcdefghijklmno");
}

static void
test_inproc_options(void **state)
{
    target_t target;

    (void)state;
    assert_int_equal(target_parse("inproc://cpu?workers=4&threads=2&slab=3GiB", &target), ATTN_OK);
    assert_int_equal(target.workers, 4);
    assert_int_equal(target.threads, 2);
    assert_int_equal(target.slab_bytes, UINT64_C(3) << 30);
    assert_int_equal(target_parse("inproc://cpu?slab=64KiB&workers=64&threads=1024", &target),
                     ATTN_OK);
    assert_int_equal(target.slab_bytes, 1u << 16);
    assert_int_equal(target.workers, 64);
    assert_int_equal(target.threads, 1024);
    assert_int_equal(target_parse("inproc://cpu?slab=65536", &target), ATTN_OK);
    assert_int_equal(target.slab_bytes, 65536);
    assert_int_equal(target_parse("inproc://cpu?slab=1MiB&slab=2MiB&", &target), ATTN_OK);
    assert_int_equal(target.slab_bytes, 2u << 20); /* the last one counts */
}

static void
test_bad_inproc_targets_are_refused(void **state)
{
    static const char *const bad[] = {
        "inproc://",
        "inproc://?workers=2",
        "inproc://abcdefghijklmnop",
        "inproc://cpu?workers",
        "inproc://cpu?&workers=1",
        "inproc://cpu?workers=",
        "inproc://cpu?workers=0",
        "inproc://cpu?workers=65",
        "inproc://cpu?workers=-1",
        "inproc://cpu?workers=+1",
        "inproc://cpu?workers= 1",
        "inproc://cpu?workers=1x",
        "inproc://cpu?workers=4294967297",
        "inproc://cpu?threads=1025",
        "inproc://cpu?threads=4294967296",
        "inproc://cpu?slab=65535",
        "inproc://cpu?slab=63KiB",
        "inproc://cpu?slab=1TiB",
        "inproc://cpu?slab=1gib",
        "inproc://cpu?slab=17179869184GiB",       /* 2^64 */
        "inproc://cpu?slab=18446744073709551616", /* 2^64 */
        "inproc://cpu?slab=999999999999999999999999",
        "inproc://cpu?device=1",
        "inproc://cpu?WORKERS=1",
    };
    target_t target;

    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        if (target_parse(bad[i], &target) != ATTN_ERR_INVALID) {
            fail_msg("target \"%s\" was taken", bad[i]);
        }
        assert_non_null(strstr(attn_last_error(), "target"));
    }
}

static void
test_long_options_are_refused(void **state)
{
    char text[600] = "inproc://cpu?workers=";
    target_t target;

    (void)state;
    memset(text + strlen(text), '1', 500);
    assert_int_equal(target_parse(text, &target), ATTN_ERR_INVALID);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_addresses),
        cmocka_unit_test(test_a_long_address_is_refused),
        cmocka_unit_test(test_inproc_and_its_defaults),
        cmocka_unit_test(test_inproc_options),
        cmocka_unit_test(test_bad_inproc_targets_are_refused),
        cmocka_unit_test(test_long_options_are_refused),
    };
    return cmocka_run_group_tests_name("target", tests, NULL, NULL);
}
