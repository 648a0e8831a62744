#include "daemon/tensors.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static int
setup(void **state)
{
    tensors_t *tensors;

    assert_int_equal(tensors_create(&tensors), ATTN_OK);
    *state = tensors;
    return 0;
}

static int
teardown(void **state)
{
    tensors_destroy(*state);
    return 0;
}

static tensor_t *
take(tensors_t *tensors, uint64_t size)
{
    tensor_t *tensor;

    assert_int_equal(tensor_take(tensors, size, &tensor), ATTN_OK);
    assert_int_equal(tensor->size, size);
    assert_int_equal((uintptr_t)tensor->data % 64, 0);
    return tensor;
}

static void
test_a_buffer_comes_back_when_nobody_refers_to_it(void **state)
{
    tensor_t *first = take(*state, 100000);
    uint8_t *data   = first->data;

    memset(first->data, 1, 100000);
    tensor_ref(first);
    tensor_unref(first);
    tensor_t *second = take(*state, 100000);
    assert_ptr_not_equal(second->data, data); /* the first is still out */
    tensor_unref(first);
    tensor_t *third = take(*state, 70000); /* of the same power of two */
    assert_ptr_equal(third->data, data);
    tensor_unref(second);
    tensor_unref(third);
    tensor_unref(take(*state, 0));
    tensor_unref(NULL);
}

static void
test_what_is_out_is_capped(void **state)
{
    tensor_t *half = take(*state, TENSORS_OUT_MAX / 2), *other;

    assert_int_equal(tensor_take(*state, TENSORS_OUT_MAX + 1, &other), ATTN_ERR_TOO_LARGE);
    assert_int_equal(tensor_take(*state, TENSORS_OUT_MAX / 2 + 1, &other), ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(attn_last_error(), "in flight"));
    other = take(*state, TENSORS_OUT_MAX / 2);
    tensor_unref(half);
    tensor_unref(other);
    tensor_unref(take(*state, TENSORS_OUT_MAX)); /* all of it, once nothing else is out */
}

static void *
unref_later(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    tensor_unref(arg);
    return NULL;
}

static void
test_wait_for_references(void **state)
{
    tensor_t *tensor = take(*state, 10);
    pthread_t thread;

    tensor_ref(tensor);
    assert_true(tensor_wait(tensor, 2, attn_now_ns()));
    assert_false(tensor_wait(tensor, 1, attn_now_ns() + 10 * ATTN_NS_PER_MS));
    assert_int_equal(pthread_create(&thread, NULL, unref_later, tensor), 0);
    assert_true(tensor_wait(tensor, 1, attn_now_ns() + 5000 * ATTN_NS_PER_MS));
    pthread_join(thread, NULL);
    tensor_unref(tensor);
}

static void
test_buffers_outlive_the_pool(void **state)
{
    tensors_t *tensors;

    (void)state;
    assert_int_equal(tensors_create(&tensors), ATTN_OK);
    tensor_t *out = take(tensors, 5000), *kept = take(tensors, 5000);
    tensor_unref(kept);
    tensors_destroy(tensors);
    memset(out->data, 7, 5000);
    tensor_unref(out);
    tensors_destroy(NULL);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_buffer_comes_back_when_nobody_refers_to_it, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_what_is_out_is_capped, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wait_for_references, setup, teardown),
        cmocka_unit_test(test_buffers_outlive_the_pool),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
