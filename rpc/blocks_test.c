/* Memory of large messages: whole, kept for the next one, and not too much of it. */
#include "rpc/rpc_int.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <malloc.h>
#include <stdlib.h>
#include <stdio.h>

#define KIB 1024u
#define MIB (1024u * 1024u)
#define KEPT (16u * MIB)

static void
test_every_size_is_whole(void **state)
{
    static const size_t sizes[] = {0,       1,       32 * KIB, 32 * KIB + 1, 64 * KIB, MIB - 1,
                                   MIB,     MIB + 1, 5 * MIB,  16 * MIB - 1, KEPT,     16 * MIB + 1,
                                   20 * MIB};
    enum { N = sizeof(sizes) / sizeof(sizes[0]) };
    grpc_slice slices[N];

    (void)state;
    for (int round = 0; round < 3; round++) { /* the second has what the first let go */
        for (int i = 0; i < N; i++) {
            slices[i] = rpc_slice_malloc(sizes[i]);
            assert_int_equal(GRPC_SLICE_LENGTH(slices[i]), sizes[i]);
            memset(GRPC_SLICE_START_PTR(slices[i]), i + round, sizes[i]);
            if (sizes[i] > 32 * KIB && sizes[i] <= KEPT) {
                assert_int_equal((uintptr_t)GRPC_SLICE_START_PTR(slices[i]) % 64, 0);
            }
        }
        for (int i = 0; i < N; i++) {
            const uint8_t *bytes = GRPC_SLICE_START_PTR(slices[i]);
            for (size_t j = 0; j < sizes[i]; j += 997) {
                assert_int_equal(bytes[j], i + round);
            }
            assert_true(sizes[i] == 0 || bytes[sizes[i] - 1] == i + round);
            grpc_slice_unref(slices[i]);
        }
    }
}

static void
test_the_next_has_what_the_last_let_go(void **state)
{
    grpc_slice first = rpc_slice_malloc(200 * KIB), part = grpc_slice_sub(first, 10, 5000);
    const uint8_t *at = GRPC_SLICE_START_PTR(first);

    (void)state;
    grpc_slice_unref(first);
    grpc_slice other = rpc_slice_malloc(200 * KIB); /* a part of the first is in use */
    assert_ptr_not_equal(GRPC_SLICE_START_PTR(other), at);
    grpc_slice_unref(part);
    grpc_slice larger = rpc_slice_malloc(256 * KIB + 1), same = rpc_slice_malloc(256 * KIB);
    assert_ptr_not_equal(GRPC_SLICE_START_PTR(larger), at); /* there is no room for it there */
    assert_ptr_equal(GRPC_SLICE_START_PTR(same), at);       /* up to the next power of two */
    grpc_slice_unref(other);
    grpc_slice_unref(larger);
    grpc_slice_unref(same);
}

static uint64_t before; /* in use before any */

static uint64_t
in_use(void)
{
    struct mallinfo2 info = mallinfo2();

    return (uint64_t)info.uordblks + (uint64_t)info.hblkhd;
}

static void
test_it_keeps_no_more_than_it_may(void **state)
{
    enum { N = 40 };
    grpc_slice slices[N];

    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* whose allocators do not say what is in use */
#endif
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++) {
            slices[i] = rpc_slice_malloc(i % 2 == 0 ? MIB : 300 * KIB);
        }
        assert_true(in_use() >= before + 15 * MIB);
        for (int i = 0; i < N; i++) {
            grpc_slice_unref(slices[i]);
        }
        assert_true(in_use() <= before + KEPT + MIB / 4);
        assert_true(in_use() >= before + KEPT - 2 * MIB); /* each time */
    }
}

static void *
take_and_give(void *arg)
{
    uint8_t own = *(uint8_t *)arg;

    for (uint32_t i = 0; i < 2000; i++) {
        size_t size      = (33u << (i % 4)) * KIB;
        grpc_slice slice = rpc_slice_malloc(size);
        uint8_t *bytes   = GRPC_SLICE_START_PTR(slice);
        bytes[0] = bytes[size / 2] = bytes[size - 1] = own;
        if (bytes[0] != own || bytes[size / 2] != own || bytes[size - 1] != own) {
            abort();
        }
        RPC_OP_RELEASE(bytes);
        grpc_slice_unref(slice);
    }
    return NULL;
}

static void
test_many_threads(void **state)
{
    enum { N = 4 };
    pthread_t threads[N];
    uint8_t own[N];

    (void)state;
    for (int i = 0; i < N; i++) {
        own[i] = (uint8_t)(i + 1);
        assert_int_equal(pthread_create(&threads[i], NULL, take_and_give, &own[i]), 0);
    }
    for (int i = 0; i < N; i++) {
        pthread_join(threads[i], NULL);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_next_has_what_the_last_let_go),
        cmocka_unit_test(test_every_size_is_whole),
        cmocka_unit_test(test_it_keeps_no_more_than_it_may),
        cmocka_unit_test(test_many_threads),
    };

    before = in_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
