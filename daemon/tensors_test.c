#include "daemon/tensors.h"

#include "base/clock.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define OUT_MAX (UINT64_C(4) << 30)

static int
setup(void **state)
{
    tensors_t *tensors;

    assert_int_equal(tensors_create(OUT_MAX, &tensors), ATTN_OK);
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
    tensor_t *half = take(*state, OUT_MAX / 2), *other;

    assert_int_equal(tensor_take(*state, OUT_MAX + 1, &other), ATTN_ERR_TOO_LARGE);
    assert_int_equal(tensor_take(*state, OUT_MAX / 2 + 1, &other), ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(attn_last_error(), "in flight"));
    other = take(*state, OUT_MAX / 2);
    tensor_unref(half);
    tensor_unref(other);
    tensor_unref(take(*state, OUT_MAX)); /* all of it, once nothing else is out */
}

static void
test_what_is_kept_goes_when_nothing_is_asked_for(void **state)
{
    tensors_t *tensors = *state;
    uint64_t now = attn_now_ns(), later = TENSORS_KEPT_MS * ATTN_NS_PER_MS;

    tensor_t *tensor = take(tensors, 1 << 20);
    tensors_sweep(tensors, now);
    tensors_sweep(tensors, now + 2 * later); /* one is out: not idle */
    tensor_unref(tensor);
    tensors_sweep(tensors, now + 2 * later + later - 1);
    assert_int_equal(tensors_kept(tensors), 1 << 20);
    tensors_sweep(tensors, now + 4 * later);
    assert_int_equal(tensors_kept(tensors), 0);
    tensor_unref(take(tensors, 5000));
    tensors_sweep(tensors, now + 9 * later); /* used since: from now on */
    assert_int_equal(tensors_kept(tensors), 8192);
    tensors_sweep(tensors, now + 10 * later);
    assert_int_equal(tensors_kept(tensors), 0);
}

static void
test_buffers_outlive_the_pool(void **state)
{
    tensors_t *tensors;

    (void)state;
    assert_int_equal(tensors_create(OUT_MAX, &tensors), ATTN_OK);
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
        cmocka_unit_test_setup_teardown(test_what_is_kept_goes_when_nothing_is_asked_for, setup,
                                        teardown),
        cmocka_unit_test(test_buffers_outlive_the_pool),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
