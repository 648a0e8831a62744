/*
 * The guard of bench_gpu against timing nonsense: right answers pass it, and each of those that it
 * looks at, made wrong, does not. On the CPU's backend, which is on every machine. And the points
 * are what their names say.
 */
#include "balancer/plan.h"
#include "bench/gpu_check.h"
#include "bench/result.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define CHUNK 64u
#define PAGE 16u
#define HEADS 4u
#define KV_HEADS 2u
#define DIM 64u
#define PAGES 64u
#define TOKENS_MAX 200u

static uint64_t seed = 7;

static void
fill(uint16_t *to, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        seed    = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
        float x = (float)(int32_t)(seed >> 32) / 2147483648.0f * 2;
        attn_convert(&to[i], ATTN_BF16, &x, ATTN_F32, 1);
    }
}

/* Two requests of 200 and 90 tokens. */
typedef struct fixture {
    attn_backend_t *backend;
    void *slab;
    uint64_t slab_bytes;
    attn_kv_t kv;
    attn_kv_run_t runs[2][4];
    uint32_t pages[2][4][CHUNK / PAGE], indptr[2], list[3];
    attn_problem_entry_t entries[2];
    attn_problem_t problem;
    gpu_point_t point;
    uint32_t lengths[2], queries[2];
    uint16_t q[2 * TOKENS_MAX * HEADS * DIM], o[2 * TOKENS_MAX * HEADS * DIM];
} fixture_t;

static void
store(fixture_t *f)
{
    uint64_t per_page = (uint64_t)KV_HEADS * PAGE * DIM;

    f->slab_bytes = PAGES * 2 * per_page * 2;
    result_must(f->backend->ops->slab_alloc(f->backend, f->slab_bytes, &f->slab));
    f->kv = (attn_kv_t){.k             = f->slab,
                        .v             = (uint16_t *)f->slab + per_page,
                        .k_page_stride = 2 * per_page,
                        .v_page_stride = 2 * per_page,
                        .n_pages       = PAGES,
                        .dtype         = ATTN_BF16,
                        .kv_heads      = KV_HEADS,
                        .head_dim_k    = DIM,
                        .head_dim_v    = DIM,
                        .page_size     = PAGE,
                        .chunk_size    = CHUNK};
    uint16_t rows[2][KV_HEADS * DIM];
    for (uint32_t i = 0; i < PAGES * PAGE; i++) {
        uint32_t page = i / PAGE, offset = i % PAGE;
        fill(rows[0], 2 * KV_HEADS * DIM);
        result_must(
            f->backend->ops->append(f->backend, &f->kv, &page, &offset, 1, rows[0], rows[1]));
    }
}

/* Attend with so many queries at the end of each request; sparse: over three pages and the query's
 * own token, which the list leaves out in the first request. */
static void
attend(fixture_t *f, uint32_t n_q, bool sparse)
{
    attn_layer_t layer   = {.causal = true};
    attn_answer_t answer = {.o = f->o, .o_dtype = ATTN_BF16};
    uint32_t few, many, page = 0;
    attn_workspace_t *space;
    attn_plan_t *plan;

    for (uint32_t i = 0; i < 2; i++) {
        f->lengths[i] = i == 0 ? TOKENS_MAX : 90;
        f->queries[i] = n_q;
        f->entries[i] = (attn_problem_entry_t){.kv_length  = f->lengths[i],
                                               .n_q        = n_q,
                                               .runs       = f->runs[i],
                                               .dense_from = f->lengths[i] - n_q};
        for (uint32_t c = 0; c * CHUNK < f->lengths[i]; c++) {
            uint32_t left = f->lengths[i] - c * CHUNK;
            for (uint32_t k = 0; k < CHUNK / PAGE; k++) {
                f->pages[i][c][k] = (++page * 37) % PAGES;
            }
            f->runs[i][f->entries[i].n_runs++] = (attn_kv_run_t){
                .chunk = c, .length = left < CHUNK ? left : CHUNK, .pages = f->pages[i][c]};
        }
        if (sparse) {
            memcpy(f->list, (uint32_t[]){0, 3, 5}, sizeof(f->list));
            f->indptr[1]                = 3;
            f->entries[i].n_lists       = 1;
            f->entries[i].sparse_indptr = f->indptr;
            f->entries[i].sparse_pages  = f->list;
        }
    }
    f->problem = (attn_problem_t){.n          = 2,
                                  .entries    = f->entries,
                                  .q_heads    = HEADS,
                                  .kv_heads   = KV_HEADS,
                                  .head_dim_k = DIM,
                                  .head_dim_v = DIM,
                                  .page_size  = PAGE,
                                  .chunk_size = CHUNK,
                                  .causal     = true};
    f->point   = (gpu_point_t){.q_heads  = HEADS,
                               .kv_heads = KV_HEADS,
                               .d        = DIM,
                               .page     = PAGE,
                               .n        = 2,
                               .lengths  = f->lengths,
                               .queries  = f->queries};
    fill(f->q, 2 * n_q * HEADS * DIM);
    f->backend->ops->leaf_sizes(f->backend, &few, &many);
    result_must(attn_plan_build(&f->problem, 1, few, many, &plan));
    result_must(f->backend->ops->workspace_create(f->backend, plan, ATTN_BF16, ATTN_BF16, &space));
    result_must(
        f->backend->ops->attend(f->backend, plan, &f->kv, &layer, f->q, ATTN_BF16, space, &answer));
    f->backend->ops->workspace_destroy(f->backend, space);
    attn_plan_free(plan);
}

static double
error_of(const fixture_t *f)
{
    return gpu_check(f->backend, &f->point, &f->problem, &f->kv, f->q, f->o);
}

static int
setup(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    result_must(attn_backend_find("cpu")->open(1, 0, &f->backend));
    store(f);
    *state = f;
    return 0;
}

static int
teardown(void **state)
{
    fixture_t *f = *state;

    f->backend->ops->slab_free(f->backend, f->slab, f->slab_bytes);
    f->backend->ops->close(f->backend);
    free(f);
    return 0;
}

/* ---- the check ---- */

static void
test_right_answers(void **state)
{
    fixture_t *f = *state;

    for (uint32_t n_q = 1; n_q <= 80; n_q += 79) {
        attend(f, n_q, false);
        assert_true(error_of(f) < 0.01);
    }
    attend(f, 1, true);
    assert_true(error_of(f) < 0.01);
}

/* A column of the first row, the last row and another head of that, a little wrong each. */
static void
test_wrong_answers(void **state)
{
    fixture_t *f = *state;

    attend(f, 80, false);
    const uint64_t last = 2 * 80 * HEADS * DIM - 1;
    const uint64_t at[] = {0, last, last - (HEADS - 1) * DIM};
    for (int i = 0; i < 3; i++) {
        uint16_t was = f->o[at[i]];
        f->o[at[i]]  = was ^ 0x8000;
        double wrong = error_of(f);
        f->o[at[i]]  = was;
        assert_true(wrong > 2 * error_of(f));
    }
    f->o[last] = 0x7fc0; /* NaN */
    assert_true(error_of(f) > 1e300);
    f->o[last] = 0x7f80; /* infinity */
    assert_true(error_of(f) > 1e300);
}

/* An answer to another question: a list that was not there, one token more. */
static void
test_other_answers(void **state)
{
    fixture_t *f = *state;

    attend(f, 1, true);
    f->entries[0].n_lists = f->entries[1].n_lists = 0;
    assert_true(error_of(f) > 0.1);
    attend(f, 1, false);
    f->entries[1].kv_length--;
    assert_true(error_of(f) > 0.02);
}

/* ---- the points ---- */

static const gpu_point_t *
find(const gpu_point_t *points, uint32_t n, const char *name)
{
    const gpu_point_t *found = NULL;

    for (uint32_t i = 0; i < n; i++) {
        if (strcmp(points[i].name, name) == 0) {
            assert_null(found);
            found = &points[i];
        }
    }
    assert_non_null(found);
    return found;
}

static void
test_points(void **state)
{
    uint32_t n, quick = 0;
    gpu_point_t *points = gpu_grid_make(&n);

    (void)state;
    for (uint32_t i = 0; i < n; i++) {
        const gpu_point_t *p = find(points, n, points[i].name); /* once */
        quick += p->quick;
        assert_true(!p->quick || quick == i + 1); /* the short grid comes first */
        assert_int_equal(p->q_heads % p->kv_heads, 0);
        assert_in_range(gpu_point_turns(p), 1, 24);
        assert_true(gpu_point_bytes(p) <= 70e9);
        for (uint32_t r = 0; r < p->n; r++) {
            assert_in_range(p->queries[r], 1, p->lengths[r]);
            assert_true(p->kept == 0 || p->kept * p->page <= p->lengths[r]);
            assert_true(p->shared < p->lengths[r] && p->shared % p->page == 0);
        }
    }
    assert_true(quick >= 25 && n >= 150);
    gpu_grid_free(points, n);
}

static void
test_point_sizes(void **state)
{
    uint32_t n;
    gpu_point_t *points  = gpu_grid_make(&n);
    const gpu_point_t *p = find(points, n, "decode b64 8k");

    (void)state;
    assert_true(gpu_point_bytes(p) == 64.0 * 8192 * 2 * 8 * 128 * 2);
    assert_true(gpu_point_flops(p) == 64.0 * 8192 * 4 * 32 * 128);
    assert_int_equal(gpu_point_turns(p), 1);
    assert_int_equal(gpu_point_pages(p), 64 * 512);
    p = find(points, n, "decode b1 1k");
    assert_int_equal(gpu_point_turns(p), 24);
    p = find(points, n, "shared 16 x 8k"); /* the prefix once */
    assert_true(gpu_point_bytes(p) == (8192.0 + 16 * 128) * 4096);
    assert_int_equal(gpu_point_pages(p), 512 + 16 * 8);
    p = find(points, n, "sparse b16 32k 1/8");
    assert_true(gpu_point_bytes(p) == 16 * 4096.0 * 4096);
    p = find(points, n, "prefill 1 x 4k"); /* half of all pairs, and the diagonal */
    assert_true(gpu_point_flops(p) == 4.0 * 4096 * 4097 / 2 * 32 * 128);
    p          = find(points, n, "decode b64 zipf 4k");
    double sum = 0, most = 0;
    for (uint32_t i = 0; i < p->n; i++) {
        sum += p->lengths[i];
        most = p->lengths[i] > most ? p->lengths[i] : most;
    }
    assert_true(sum / 64 > 4090 && sum / 64 < 4102 && most > 10 * 4096);
    gpu_grid_free(points, n);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_right_answers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_answers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_answers, setup, teardown),
        cmocka_unit_test(test_points),
        cmocka_unit_test(test_point_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
