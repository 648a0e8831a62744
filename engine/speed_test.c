/* What engine/speed.h measures, on the cpu backend and on ones that fail in parts. */
#include "engine/speed.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

/* A backend in front of the cpu's: what it is made to refuse, it refuses. */
typedef struct picky {
    attn_backend_t base;
    attn_backend_t *cpu;
    attn_dtype_t unsupported;
    uint32_t allocations, fail_from; /* that many slabs are given */
    uint32_t attends, attends_fail_from;
    uint64_t slab_bytes; /* given and not returned */
} picky_t;

static picky_t *
of(const attn_backend_t *backend)
{
    return (picky_t *)(uintptr_t)backend;
}

static double
read_bandwidth(const attn_backend_t *b)
{
    (void)b;
    return 7e9;
}

static uint32_t
parallelism(const attn_backend_t *b)
{
    return of(b)->cpu->ops->parallelism(of(b)->cpu);
}

static void
leaf_sizes(const attn_backend_t *b, uint32_t *few, uint32_t *many)
{
    of(b)->cpu->ops->leaf_sizes(of(b)->cpu, few, many);
}

static attn_status_t
supports(const attn_backend_t *b, const attn_geometry_t *g)
{
    return g->kv_dtype == of(b)->unsupported ? ATTN_ERR_UNSUPPORTED
                                             : of(b)->cpu->ops->supports(of(b)->cpu, g);
}

static attn_status_t
slab_alloc(attn_backend_t *b, uint64_t bytes, void **slab_p)
{
    if (of(b)->allocations++ >= of(b)->fail_from) {
        return ATTN_ERR_NO_MEMORY;
    }
    of(b)->slab_bytes += bytes;
    return of(b)->cpu->ops->slab_alloc(of(b)->cpu, bytes, slab_p);
}

static void
slab_free(attn_backend_t *b, void *slab, uint64_t bytes)
{
    of(b)->slab_bytes -= bytes;
    of(b)->cpu->ops->slab_free(of(b)->cpu, slab, bytes);
}

static attn_status_t
append(attn_backend_t *b, const attn_kv_t *kv, const uint32_t *pages, const uint32_t *offsets,
       uint64_t n, const void *k, const void *v)
{
    return of(b)->cpu->ops->append(of(b)->cpu, kv, pages, offsets, n, k, v);
}

static attn_status_t
workspace_create(attn_backend_t *b, const attn_plan_t *plan, attn_dtype_t q, attn_dtype_t o,
                 attn_workspace_t **space)
{
    return of(b)->cpu->ops->workspace_create(of(b)->cpu, plan, q, o, space);
}

static void
workspace_destroy(attn_backend_t *b, attn_workspace_t *space)
{
    of(b)->cpu->ops->workspace_destroy(of(b)->cpu, space);
}

static attn_status_t
attend(attn_backend_t *b, const attn_plan_t *plan, const attn_kv_t *kv, const attn_layer_t *layer,
       const void *q, attn_dtype_t q_dtype, attn_workspace_t *space, const attn_answer_t *answer)
{
    return of(b)->attends++ >= of(b)->attends_fail_from
               ? ATTN_ERR_INTERNAL
               : of(b)->cpu->ops->attend(of(b)->cpu, plan, kv, layer, q, q_dtype, space, answer);
}

static const attn_backend_ops_t picky_ops = {
    .read_bandwidth    = read_bandwidth,
    .parallelism       = parallelism,
    .leaf_sizes        = leaf_sizes,
    .supports          = supports,
    .slab_alloc        = slab_alloc,
    .slab_free         = slab_free,
    .append            = append,
    .workspace_create  = workspace_create,
    .workspace_destroy = workspace_destroy,
    .attend            = attend,
};

static cost_worker_t
measured(picky_t *picky)
{
    cost_worker_t speed;

    picky->base.ops = &picky_ops;
    assert_int_equal(attn_backend_find("cpu")->open(1, 0, &picky->cpu), ATTN_OK);
    engine_speed_measure(&picky->base, &speed);
    picky->cpu->ops->close(picky->cpu);
    assert_int_equal(picky->slab_bytes, 0);
    assert_true(speed.read_bandwidth == 7e9);
    return speed;
}

static bool
is_rate(double rate)
{
    return isfinite(rate) && rate > 1e6 && rate < 1e16;
}

static void
test_all_dtypes_of_a_cpu(void **state)
{
    picky_t picky = {.fail_from = UINT32_MAX, .attends_fail_from = UINT32_MAX};
    (void)state;
    cost_worker_t speed = measured(&picky);
    assert_true(speed.attend_seconds > 0 && speed.attend_seconds < 10);
    for (attn_dtype_t d = ATTN_F32; d < COST_DTYPES; d++) {
        assert_true(is_rate(speed.few_flops[d]) && is_rate(speed.many_flops[d]));
    }
    assert_true(speed.few_flops[ATTN_DTYPE_NONE] == 0);
}

static void
test_what_a_device_does_not_serve_is_not_known(void **state)
{
    picky_t picky = {
        .unsupported = ATTN_F16, .fail_from = UINT32_MAX, .attends_fail_from = UINT32_MAX};
    (void)state;
    cost_worker_t speed = measured(&picky);
    assert_true(speed.few_flops[ATTN_F16] == 0 && speed.many_flops[ATTN_F16] == 0);
    assert_true(is_rate(speed.few_flops[ATTN_F32]) && is_rate(speed.many_flops[ATTN_BF16]));
}

static void
test_without_memory_nothing_is_known(void **state)
{
    (void)state;
    for (uint32_t n = 0; n < 2; n++) { /* not even k, or no v */
        picky_t picky       = {.fail_from = n, .attends_fail_from = UINT32_MAX};
        cost_worker_t speed = measured(&picky);
        assert_true(speed.attend_seconds == 0);
        assert_true(speed.few_flops[ATTN_F32] == 0 && speed.many_flops[ATTN_BF16] == 0);
        assert_int_equal(picky.attends, 0);
    }
}

static void
test_a_device_that_fails_is_left_alone(void **state)
{
    (void)state;
    for (uint32_t n = 0; n < 4; n++) { /* amid the first figure: what came before does not count */
        picky_t picky       = {.fail_from = UINT32_MAX, .attends_fail_from = n};
        cost_worker_t speed = measured(&picky);
        assert_true(speed.attend_seconds == 0);
        for (attn_dtype_t d = ATTN_F32; d < COST_DTYPES; d++) {
            assert_true(speed.few_flops[d] == 0 && speed.many_flops[d] == 0);
        }
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_dtypes_of_a_cpu),
        cmocka_unit_test(test_what_a_device_does_not_serve_is_not_known),
        cmocka_unit_test(test_without_memory_nothing_is_known),
        cmocka_unit_test(test_a_device_that_fails_is_left_alone),
    };
    return cmocka_run_group_tests_name("engine.speed", tests, NULL, NULL);
}
