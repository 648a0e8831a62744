/* Messages from bytes and to bytes. protobuf-c, given the same bytes whole, is the oracle. */
#include "rpc/rpc_int.h"

#include "base/status.h"
#include "echo.pb-c.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>

#define N_RANDOM 100000

static uint32_t seed = 1;

static uint32_t
next_random(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* A message of these bytes in slices of `step` bytes (0: of random ones, some empty). Each
 * slice is a heap block of its own, so that a sanitizer sees a byte read beyond it. */
static rpc_message_t *
message_of(const uint8_t *bytes, size_t n, size_t step)
{
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(NULL, 0);

    for (size_t at = 0; at < n;) {
        size_t size    = step == 0 ? next_random() % 9 : step;
        size           = size < n - at ? size : n - at;
        uint8_t *piece = malloc(size + (size == 0));
        memcpy(piece, bytes + at, size);
        grpc_slice_buffer_add_indexed(&buffer->data.raw.slice_buffer,
                                      grpc_slice_new_with_user_data(piece, size, free, piece));
        at += size;
    }
    return rpc_message_new(buffer);
}

/* Whether ours and the oracle agree; what only ours refuses must be what rpc.h says. */
static void
compare(const uint8_t *bytes, size_t n, size_t step)
{
    rpc_message_t *message = message_of(bytes, n, step);
    ProtobufCMessage *head;
    Echo__Echo *oracle = echo__echo__unpack(NULL, n, bytes);

    attn_status_t status = rpc_message_unpack(message, &echo__echo__descriptor, &head);
    if (status == ATTN_OK) {
        assert_non_null(oracle);
        Echo__Echo *echo = (Echo__Echo *)head;
        assert_int_equal(echo->data.len, 0);
        assert_int_equal(rpc_message_data_size(message), oracle->data.len);
        uint8_t *data = malloc(oracle->data.len + 1);
        rpc_message_data_copy(message, 0, data, oracle->data.len);
        assert_memory_equal(data, oracle->data.data == NULL ? data : oracle->data.data,
                            oracle->data.len);

        echo->data.data = data;
        echo->data.len  = oracle->data.len;
        size_t size     = echo__echo__get_packed_size(echo);
        uint8_t *ours = malloc(size + 1), *theirs = malloc(size + 1);
        assert_int_equal(size, echo__echo__get_packed_size(oracle));
        echo__echo__pack(echo, ours);
        echo__echo__pack(oracle, theirs);
        assert_memory_equal(ours, theirs, size);
        free(ours);
        free(theirs);
        free(data);
    } else if (oracle != NULL) {
        const char *why = attn_last_error();
        assert_true(strstr(why, "field number 0") != NULL || strstr(why, "the tag at") != NULL);
    }
    if (oracle != NULL) {
        echo__echo__free_unpacked(oracle, NULL);
    }
    rpc_message_free(message);
}

/* All kinds of fields, and data. */
static size_t
sample(uint8_t *bytes, const void *data, size_t size)
{
    uint32_t packed[]   = {1, 300, 70000, UINT32_MAX};
    Echo__Part part[2]  = {ECHO__PART__INIT, ECHO__PART__INIT};
    Echo__Part *parts[] = {&part[0], &part[1]};
    Echo__Echo echo     = ECHO__ECHO__INIT;

    part[0].id    = 7;
    part[1].name  = "part";
    echo.number   = UINT64_MAX;
    echo.text     = "a text";
    echo.packed   = packed;
    echo.n_packed = 4;
    echo.parts    = parts;
    echo.n_parts  = 2;
    echo.real     = 1.5;
    echo.word     = 0xdeadbeef;
    echo.blob     = (ProtobufCBinaryData){.data = (uint8_t *)"\0\1\2", .len = 3};
    echo.signed_  = -5;
    echo.data     = (ProtobufCBinaryData){.data = (uint8_t *)data, .len = size};
    return echo__echo__pack(&echo, bytes);
}

static void
test_message_in_any_slices(void **state)
{
    uint8_t data[40], bytes[256];
    (void)state;
    memset(data, 0x5a, sizeof(data));
    size_t n = sample(bytes, data, sizeof(data));
    for (size_t step = 1; step <= n; step++) {
        compare(bytes, n, step);
    }
    for (int i = 0; i < 200; i++) {
        compare(bytes, n, 0);
    }
}

static void
test_every_truncation(void **state)
{
    uint8_t data[200], bytes[512];
    (void)state;
    memset(data, 0x33, sizeof(data)); /* a size of two bytes */
    size_t whole = sample(bytes, data, sizeof(data));
    int refused  = 0;
    for (size_t n = 0; n < whole; n++) {
        compare(bytes, n, 0);
        compare(bytes, n, n + 1);
        rpc_message_t *message = message_of(bytes, n, 16);
        ProtobufCMessage *head;
        refused += rpc_message_unpack(message, &echo__echo__descriptor, &head) == ATTN_ERR_INVALID;
        rpc_message_free(message);
    }
    assert_true(refused > 200); /* all but the cuts between fields */
}

static void
test_data_anywhere_and_repeated(void **state)
{
    static const uint8_t first[]  = {0x7a, 2, 'a', 'b', 0x08, 5};
    static const uint8_t middle[] = {0x08, 5, 0x7a, 2, 'a', 'b', 0x12, 1, 'x'};
    static const uint8_t twice[]  = {0x7a, 2,   'a', 'b', 0x08, 5, 0x7a,
                                     3,    'x', 'y', 'z', 0x12, 1, 'q'};
    static const uint8_t none[]   = {0x08, 5};
    static const uint8_t zero[]   = {0x7a, 1, 'a', 0x7a, 0};
    (void)state;
    for (size_t step = 0; step < 16; step++) {
        compare(first, sizeof(first), step);
        compare(middle, sizeof(middle), step);
        compare(twice, sizeof(twice), step);
        compare(none, sizeof(none), step);
        compare(zero, sizeof(zero), step);
        compare(zero, 0, step);
    }
    rpc_message_t *message = message_of(twice, sizeof(twice), 3);
    ProtobufCMessage *head;
    char data[4] = "";
    assert_int_equal(rpc_message_unpack(message, &echo__echo__descriptor, &head), ATTN_OK);
    assert_int_equal(rpc_message_data_size(message), 3);
    rpc_message_data_copy(message, 0, data, 3);
    assert_string_equal(data, "xyz");
    rpc_message_free(message);
}

static attn_status_t
status_of(const uint8_t *bytes, size_t n, size_t step)
{
    rpc_message_t *message = message_of(bytes, n, step);
    ProtobufCMessage *head = NULL;
    attn_status_t status   = rpc_message_unpack(message, &echo__echo__descriptor, &head);

    rpc_message_free(message);
    return status;
}

static void
test_malformed_is_refused(void **state)
{
    static const struct {
        uint8_t bytes[16];
        size_t n;
        const char *why;
    } cases[] = {
        {{0x7a, 0xff, 0xff, 0xff, 0xff, 0x0f}, 6, "4294967295 bytes"},
        {{0x7a, 0xff, 0xff, 0xff, 0xff, 0x7f}, 6, "34359738367 bytes"},
        {{0x7a, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, 7, "length of field 15 is cut off or too"},
        {{0x7a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00}, 7, "length"}, /* 0, in six bytes */
        {{0x7a, 0x05, 1, 2, 3, 4}, 6, "5 bytes, but 4"},
        {{0x7a}, 1, "length"},
        {{0x78, 0x01}, 2, "field data has wire type 0"},
        {{0x0b}, 1, "wire type 3"},
        {{0x0c}, 1, "wire type 4"},
        {{0x0e}, 1, "wire type 6"},
        {{0x0f}, 1, "wire type 7"},
        {{0x00, 0x00}, 2, "field number 0"},
        {{0x02, 0x00}, 2, "field number 0"},
        {{0xff, 0xff, 0xff, 0xff, 0x7f, 0x00}, 6, "tag at byte 0"},
        {{0x80, 0x80, 0x80, 0x80, 0x80, 0x01}, 6, "tag at byte 0"},
        {{0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, 12, "number"},
        {{0x08, 0x80}, 2, "number"},
        {{0x29, 1, 2, 3}, 4, "8 bytes, but 3"},
        {{0x35, 1, 2, 3}, 4, "4 bytes, but 3"},
        {{0x0a, 0x01, 'x'}, 3, "no echo.Echo"},  /* number, as a string */
        {{0x22, 0x01, 0x08}, 3, "no echo.Echo"}, /* a part that is cut off inside */
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (size_t step = 1; step <= cases[i].n; step++) {
            assert_int_equal(status_of(cases[i].bytes, cases[i].n, step), ATTN_ERR_INVALID);
            assert_non_null(strstr(attn_last_error(), cases[i].why));
        }
    }
}

static void
test_random_bytes(void **state)
{
    uint8_t bytes[64], mutated[256], data[20] = {0};
    (void)state;
    size_t whole = sample(mutated, data, sizeof(data));
    for (int i = 0; i < N_RANDOM; i++) {
        size_t n = next_random() % sizeof(bytes);
        for (size_t j = 0; j < n; j++) {
            bytes[j] = (uint8_t)next_random();
        }
        compare(bytes, n, i % 2 == 0 ? 0 : n + 1);

        uint8_t *at = &mutated[next_random() % whole], old = *at;
        *at = (uint8_t)next_random();
        compare(mutated, whole, 0);
        *at = old;
    }
}

/* Many small parts cost protobuf-c much more than they weigh on the wire. */
static void
test_arena_has_a_budget(void **state)
{
    size_t n       = 2 << 20;
    uint8_t *bytes = malloc(n);
    (void)state;
    for (size_t i = 0; i < n; i += 2) {
        bytes[i]     = 0x22;
        bytes[i + 1] = 0;
    }
    assert_int_equal(status_of(bytes, n, n), ATTN_ERR_TOO_LARGE);
    assert_non_null(strstr(attn_last_error(), "echo.Echo"));
    assert_int_equal(status_of(bytes, 500, 500), ATTN_OK);

    /* A list such as a layout is: parts of a few small numbers and a short name. */
    static const uint8_t part[] = {0x22, 9, 0x08, 0x85, 0x01, 0x12, 4, 'n', 'a', 'm', 'e'};
    size_t size                 = sizeof(part) * 50000;
    for (size_t i = 0; i < size; i += sizeof(part)) {
        memcpy(bytes + i, part, sizeof(part));
    }
    assert_int_equal(status_of(bytes, size, 8192), ATTN_OK);
    free(bytes);
}

static void
test_plain_message_has_no_data(void **state)
{
    static const uint8_t bytes[] = {0x08, 3, 0x78, 9};
    rpc_message_t *message       = message_of(bytes, sizeof(bytes), 1);
    ProtobufCMessage *head;
    (void)state;
    assert_int_equal(rpc_message_unpack(message, &echo__plain__descriptor, &head), ATTN_OK);
    assert_int_equal(((Echo__Plain *)head)->other, 9);
    assert_int_equal(rpc_message_data_size(message), 0);
    /* Again as another type: the first head goes. */
    assert_int_equal(rpc_message_unpack(message, &echo__echo__descriptor, &head), ATTN_ERR_INVALID);
    rpc_message_free(message);
}

/* ---- outgoing ---- */

static void
count(void *arg)
{
    ++*(int *)arg;
}

static grpc_byte_buffer *
take_buffer(rpc_packet_t *packet)
{
    grpc_byte_buffer *copy = grpc_byte_buffer_copy(packet->buffer);
    rpc_packet_free(packet);
    return copy;
}

static void
test_packed_as_protobuf_would(void **state)
{
    static const size_t sizes[] = {0, 1, 127, 128, 2048, 2049, 16384, 100000, 3 << 20};
    (void)state;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) * 2; i++) {
        size_t size   = sizes[i / 2];
        uint8_t *data = malloc(size + 1);
        for (size_t j = 0; j < size; j++) {
            data[j] = (uint8_t)next_random();
        }
        struct iovec pieces[]   = {{data, size / 3}, {data, 0}, {data + size / 3, size - size / 3}};
        Echo__Echo head         = ECHO__ECHO__INIT;
        int sent                = 0;
        head.text               = "head";
        rpc_outgoing_t outgoing = {.head   = &head.base,
                                   .data   = pieces,
                                   .n_data = 3,
                                   .sent   = i % 2 == 0 ? count : NULL,
                                   .arg    = &sent};
        rpc_packet_t *packet    = NULL;
        assert_int_equal(rpc_packet_make(&outgoing, NULL, &packet), ATTN_OK);
        assert_int_equal(sent, i % 2 == 0 && size <= 2048);

        grpc_byte_buffer *buffer = take_buffer(packet);
        assert_int_equal(sent, i % 2 == 0 && size <= 2048); /* the copy holds the slices */
        head.data       = (ProtobufCBinaryData){.data = data, .len = size};
        size_t n        = echo__echo__get_packed_size(&head);
        uint8_t *packed = malloc(n), *at = packed, *expected = malloc(n);
        echo__echo__pack(&head, expected);
        assert_int_equal(grpc_byte_buffer_length(buffer), n);
        for (size_t j = 0; j < buffer->data.raw.slice_buffer.count; j++) {
            grpc_slice slice = buffer->data.raw.slice_buffer.slices[j];
            memcpy(at, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
            at += GRPC_SLICE_LENGTH(slice);
        }
        assert_memory_equal(packed, expected, n);

        rpc_message_t *message = rpc_message_new(buffer);
        ProtobufCMessage *back;
        assert_int_equal(rpc_message_unpack(message, &echo__echo__descriptor, &back), ATTN_OK);
        assert_string_equal(((Echo__Echo *)back)->text, "head");
        for (int j = 0; j < 50 && size > 0; j++) {
            size_t from = next_random() % size, part = next_random() % (size - from) + 1;
            rpc_message_data_copy(message, from, packed, part);
            assert_memory_equal(packed, data + from, part);
        }
        rpc_message_free(message);
        assert_int_equal(sent, i % 2 == 0);
        free(packed);
        free(expected);
        free(data);
    }
}

static void
test_too_large_is_not_packed(void **state)
{
    static uint8_t byte;
    struct iovec pieces[] = {{&byte, RPC_MESSAGE_MAX - 2}, {&byte, SIZE_MAX - 5}};
    Echo__Echo head       = ECHO__ECHO__INIT;
    int sent              = 0;
    rpc_packet_t *packet  = NULL;
    (void)state;
    for (uint32_t n = 1; n <= 2; n++) {
        rpc_outgoing_t outgoing = {
            .head = &head.base, .data = pieces, .n_data = n, .sent = count, .arg = &sent};
        assert_int_equal(rpc_packet_make(&outgoing, NULL, &packet), ATTN_ERR_TOO_LARGE);
        assert_non_null(strstr(attn_last_error(), "16777216"));
        assert_null(packet);
        assert_int_equal(sent, n);
    }
}

static void
test_sentence_is_cut_between_characters(void **state)
{
    char text[RPC_SENTENCE_MAX + 8];
    (void)state;
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = 0;
    memcpy(text + RPC_SENTENCE_MAX - 1, "\xc3\xa4", 2); /* a two-byte character over the limit */
    grpc_slice slice = rpc_sentence_slice(text);
    assert_int_equal(GRPC_SLICE_LENGTH(slice), RPC_SENTENCE_MAX - 1);
    grpc_slice_unref(slice);
    slice = rpc_sentence_slice(NULL);
    assert_int_equal(GRPC_SLICE_LENGTH(slice), 0);
}

static int
setup(void **state)
{
    (void)state;
    rpc_init();
    return 0;
}

static int
teardown(void **state)
{
    (void)state;
    rpc_shutdown();
    return 0;
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_message_in_any_slices),
        cmocka_unit_test(test_every_truncation),
        cmocka_unit_test(test_data_anywhere_and_repeated),
        cmocka_unit_test(test_malformed_is_refused),
        cmocka_unit_test(test_random_bytes),
        cmocka_unit_test(test_arena_has_a_budget),
        cmocka_unit_test(test_plain_message_has_no_data),
        cmocka_unit_test(test_packed_as_protobuf_would),
        cmocka_unit_test(test_too_large_is_not_packed),
        cmocka_unit_test(test_sentence_is_cut_between_characters),
    };
    return cmocka_run_group_tests_name("rpc.message", tests, setup, teardown);
}
