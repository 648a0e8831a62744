#include "gguf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "failure.h"
#include "test_gguf.h"

/* Eight keys of all kinds, and three tensors: 64 f32, 2 x 32 of Q4_1, 64 of Q8_0. */
static void
build(builder_t *b)
{
    const int32_t ints[]    = {3, -1, 1 << 30};
    const uint8_t small     = 200;
    const int64_t negative  = -5;
    const uint16_t halves[] = {7, 8};

    put_start(b, 3, 8);
    put_key_text(b, "name", "lamp");
    put_key_u32(b, "count", 30);
    put_key_float(b, "base", 0.5f);
    put_key(b, "small", 0);
    put(b, &small, 1);
    put_key(b, "negative", 11);
    put(b, &negative, 8);
    put_key_list(b, "ints", 5, 3);
    put(b, ints, sizeof(ints));
    put_key_list(b, "texts", 8, 3);
    put_text(b, "one");
    put_text(b, "");
    put_text(b, "three");
    put_key_list(b, "halves", 2, 2);
    put(b, halves, sizeof(halves));
    put_tensor(b, "a", 64, 0, QUANT_F32, 0);
    put_tensor(b, "b", 32, 2, QUANT_Q4_1, 256);
    put_tensor(b, "c", 64, 0, QUANT_Q8_0, 320);
    put_padding(b);
    for (int i = 0; i < 320 + 68; i++) {
        put(b, &(uint8_t){(uint8_t)(i * 37)}, 1);
    }
}

/** Parse a copy that ends where malloc's memory ends, so that a sanitizer sees a byte too far. */
static gguf_t *
parse_copy(const uint8_t *bytes, size_t n, void **copy)
{
    *copy = malloc(n ? n : 1);
    assert_non_null(*copy);
    memcpy(*copy, bytes, n);
    return gguf_parse(*copy, n);
}

/** Ask for everything that can be asked for, and read every byte that is answered. */
static uint64_t
read_everything(const gguf_t *gguf)
{
    static const char *const keys[] = {"name",     "count", "base",  "small",
                                       "negative", "ints",  "texts", "halves"};
    uint64_t sum                    = 0;

    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        uint32_t integer, n;
        float real;
        gguf_text_t text, *texts;
        int32_t *ints;
        sum += gguf_get_uint(gguf, keys[i], 0, UINT32_MAX, &integer) ? integer : 0;
        sum += gguf_get_float(gguf, keys[i], &real) ? real > 0 : 0;
        for (uint64_t j = 0; gguf_get_text(gguf, keys[i], &text) && j < text.length; j++) {
            sum += (uint8_t)text.data[j];
        }
        if (gguf_get_texts(gguf, keys[i], &texts, &n)) {
            for (uint32_t t = 0; t < n; t++) {
                for (uint64_t j = 0; j < texts[t].length; j++) {
                    sum += (uint8_t)texts[t].data[j];
                }
            }
            free(texts);
        }
        if (gguf_get_ints(gguf, keys[i], &ints, &n)) {
            sum += n ? (uint32_t)ints[n - 1] : 0;
            free(ints);
        }
    }
    for (const char *name = "abc"; *name; name++) {
        const gguf_tensor_t *tensor = gguf_tensor(gguf, (char[]){*name, 0});
        if (tensor) {
            float *values = malloc(tensor->values * sizeof(*values));
            assert_non_null(values);
            quant_to_float(tensor->type, tensor->data, tensor->values, values);
            sum += values[tensor->values - 1] > 0;
            free(values);
        }
    }
    return sum;
}

static void
test_reads_keys_and_tensors(void **state)
{
    builder_t b;
    gguf_text_t text, *texts;
    uint32_t integer, n;
    int32_t *ints;
    float real;
    void *copy;
    (void)state;

    build(&b);
    gguf_t *gguf = parse_copy(b.bytes, b.n, &copy);
    assert_non_null(gguf);
    assert_true(gguf_get_text(gguf, "name", &text) && gguf_text_is(text, "lamp"));
    assert_true(gguf_get_uint(gguf, "count", 30, 30, &integer) && integer == 30);
    assert_true(gguf_get_uint(gguf, "small", 0, 255, &integer) && integer == 200);
    assert_true(gguf_get_float(gguf, "base", &real) && real == 0.5f);
    assert_true(gguf_get_ints(gguf, "ints", &ints, &n) && n == 3 && ints[1] == -1);
    assert_true(gguf_get_texts(gguf, "texts", &texts, &n) && n == 3);
    assert_true(gguf_text_is(texts[1], "") && gguf_text_is(texts[2], "three"));
    const gguf_tensor_t *tensor = gguf_tensor(gguf, "b");
    assert_non_null(tensor);
    assert_int_equal(tensor->values, 64);
    assert_int_equal(tensor->dims[1], 2);
    assert_int_equal(tensor->data[0], (uint8_t)(256 * 37));
    assert_null(gguf_tensor(gguf, "d"));
    free(ints);
    free(texts);
    gguf_close(gguf);
    free(copy);
}

static void
test_refusals_name_the_key(void **state)
{
    builder_t b;
    gguf_text_t text;
    uint32_t integer;
    void *copy;
    (void)state;

    build(&b);
    gguf_t *gguf = parse_copy(b.bytes, b.n, &copy);
    assert_false(gguf_get_uint(gguf, "missing", 0, 9, &integer));
    assert_string_equal(failure_text(), "the file has no key 'missing'");
    assert_false(gguf_get_uint(gguf, "count", 0, 29, &integer));
    assert_string_equal(failure_text(), "key 'count' is 30; 0 to 29 is allowed");
    assert_false(gguf_get_uint(gguf, "negative", 0, UINT32_MAX, &integer));
    assert_false(gguf_get_uint(gguf, "base", 0, 9, &integer));
    assert_string_equal(failure_text(), "key 'base' is no integer");
    assert_false(gguf_get_uint(gguf, "ints", 0, 9, &integer));
    assert_string_equal(failure_text(), "key 'ints' is a list, not an integer");
    assert_false(gguf_get_text(gguf, "count", &text));
    gguf_close(gguf);
    free(copy);
}

static void
test_every_truncation_is_refused(void **state)
{
    builder_t b;
    (void)state;

    build(&b);
    for (size_t n = 0; n < b.n; n++) {
        void *copy;
        failure("nothing");
        assert_null(parse_copy(b.bytes, n, &copy));
        assert_string_not_equal(failure_text(), "nothing");
        free(copy);
    }
}

static uint64_t
next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void
test_flipped_bytes_never_crash(void **state)
{
    builder_t b;
    uint64_t seed = 1, read = 0, refused = 0;
    (void)state;

    build(&b);
    for (int round = 0; round < 40000; round++) {
        uint8_t changed[sizeof(b.bytes)];
        void *copy;
        memcpy(changed, b.bytes, b.n);
        for (uint64_t flips = 1 + next_random(&seed) % 4; flips > 0; flips--) {
            changed[next_random(&seed) % b.n] = (uint8_t)next_random(&seed);
        }
        gguf_t *gguf = parse_copy(changed, b.n, &copy);
        refused += gguf == NULL;
        read += gguf ? read_everything(gguf) > 0 : 0;
        gguf_close(gguf);
        free(copy);
    }
    assert_true(read > 1000 && refused > 1000);
}

/** Every 8-byte field set to a huge number: a length or a count may not be believed. */
static void
test_huge_lengths_are_refused(void **state)
{
    static const uint64_t huge[] = {UINT64_MAX, UINT64_C(1) << 63, UINT64_C(1) << 61, UINT32_MAX};
    builder_t b;
    (void)state;

    build(&b);
    for (size_t at = 0; at + 8 <= b.n; at++) {
        for (size_t i = 0; i < sizeof(huge) / sizeof(huge[0]); i++) {
            uint8_t changed[sizeof(b.bytes)];
            void *copy;
            memcpy(changed, b.bytes, b.n);
            memcpy(changed + at, &huge[i], 8);
            gguf_t *gguf = parse_copy(changed, b.n, &copy);
            if (gguf) {
                read_everything(gguf);
            }
            gguf_close(gguf);
            free(copy);
        }
    }
}

static void
expect_refusal(const builder_t *b, const char *sentence)
{
    void *copy;

    assert_null(parse_copy(b->bytes, b->n, &copy));
    assert_string_equal(failure_text(), sentence);
    free(copy);
}

static void
test_a_list_longer_than_any_file_is_refused(void **state)
{
    builder_t b;
    (void)state;

    put_start(&b, 0, 1);
    put_key_list(&b, "ints", 5, UINT64_C(1) << 62); /* 2^64 bytes: not 0 */
    expect_refusal(&b, "a list of 4611686018427387904 items is longer than any file");
}

static void
test_bad_tensors_are_named(void **state)
{
    builder_t b;
    (void)state;

    put_start(&b, 1, 0);
    put_tensor(&b, "w", 32, 2, 14, 0);
    expect_refusal(&b, "tensor 'w' has type 14; this reader knows F32, F16, Q4_1 and Q8_0");
    put_start(&b, 1, 0);
    put_tensor(&b, "w", 16, 2, QUANT_Q4_1, 0); /* 32 values, but rows are not whole blocks */
    expect_refusal(&b, "a row of tensor 'w' has 16 values, not whole blocks of Q4_1");
    put_start(&b, 1, 0);
    put_tensor(&b, "w", UINT64_C(1) << 40, UINT64_C(1) << 40, QUANT_F32, 0);
    expect_refusal(&b, "dimension 1 of tensor 'w' is 1099511627776, which no tensor can have");
    put_start(&b, 1, 0);
    put_tensor(&b, "w", 8, 0, QUANT_F32, 4);
    put_padding(&b);
    put(&b, (uint8_t[64]){0}, 64);
    expect_refusal(&b, "tensor 'w' lies at offset 4, which is not a multiple of 32 or ends behind "
                       "the file's 128 bytes");
}

static void
test_opens_files(void **state)
{
    char path[] = "/tmp/gguf_test.XXXXXX";
    builder_t b;
    int fd = mkstemp(path);
    (void)state;

    assert_true(fd >= 0);
    assert_null(gguf_open(path));
    build(&b);
    assert_int_equal(write(fd, b.bytes, b.n), (ssize_t)b.n);
    gguf_t *gguf = gguf_open(path);
    assert_non_null(gguf);
    assert_true(read_everything(gguf) > 0);
    gguf_close(gguf);
    close(fd);
    unlink(path);
    assert_null(gguf_open(path));
    assert_null(gguf_open("/tmp"));
    gguf_close(NULL);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_keys_and_tensors),
        cmocka_unit_test(test_refusals_name_the_key),
        cmocka_unit_test(test_every_truncation_is_refused),
        cmocka_unit_test(test_flipped_bytes_never_crash),
        cmocka_unit_test(test_huge_lengths_are_refused),
        cmocka_unit_test(test_a_list_longer_than_any_file_is_refused),
        cmocka_unit_test(test_bad_tensors_are_named),
        cmocka_unit_test(test_opens_files),
    };
    return cmocka_run_group_tests_name("examples.runner.gguf", tests, NULL, NULL);
}
