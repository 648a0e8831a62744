/* The edges of the merge and of attention, one by one, and what is refused. */
#include "tests/conformance/harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const attn_layer_t plain = {.causal = true};

static shape_t
small_shape(attn_dtype_t dtype)
{
    return (shape_t){.q_heads    = 4,
                     .kv_heads   = 2,
                     .d_k        = 64,
                     .d_v        = 48,
                     .page_size  = 16,
                     .chunk_size = 256,
                     .kv_dtype   = dtype,
                     .q_dtype    = dtype,
                     .o_dtype    = dtype};
}

static void
set_q(const world_t *world, void *q, uint64_t at, float value)
{
    attn_convert((uint8_t *)q + at * attn_dtype_size(world->shape.q_dtype), world->shape.q_dtype,
                 &value, ATTN_F32, 1);
}

/* ---- results ---- */

static void
test_one_token_returns_v_exactly(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F16, ATTN_BF16};
    (void)state;

    for (int round = 0; round < 40; round++) {
        shape_t shape = small_shape(types[round % 2]);
        seq_t seq     = {.k_scale = 3, .v_scale = 10};
        world_t world;
        result_t result;

        world_open(&world, shape, 64, 1);
        seq_grow(&world, &seq, 1);
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        void *q                    = random_q(&world, 1, 2);
        run(&world, &problem, &plain, q, 1, &result);
        for (uint32_t h = 0; h < shape.q_heads; h++) {
            for (uint32_t i = 0; i < shape.d_v; i++) {
                uint64_t at = ((uint64_t)seq.pages[0][0] * world.kv.v_page_stride +
                               h / 2 * shape.page_size * shape.d_v + i) *
                              2;
                float v;
                attn_convert(&v, ATTN_F32, (uint8_t *)world.kv.v + at, shape.kv_dtype, 1);
                assert_true(result.o[h * shape.d_v + i] == v);
            }
        }
        result_free(&result);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

/* A leaf leaves the scale of its maximum m for that of e = ceil m: then l is in (1/2, 1] for one
 * token. */
static void
test_exponents_are_those_of_the_maximum(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++) {
        seq_t seq = {.k_scale = (float)round};
        world_t world;
        result_t result;

        world_open(&world, small_shape(ATTN_F32), 64, 1);
        seq_grow(&world, &seq, 1);
        attn_node_t root           = {32, 0};
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        entry.nodes                = &root;
        entry.n_nodes              = 1;
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        void *q                    = random_q(&world, 1, 1);
        run(&world, &problem, &plain, q, 1, &result);
        for (uint32_t h = 0; h < 4; h++) {
            assert_true(result.l[h] > 0.5f && result.l[h] <= 1);
        }
        result_free(&result);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

static void
test_nothing_seen_is_empty(void **state)
{
    float sinks[4]          = {0, 5, -INFINITY, -3};
    attn_layer_t with_sinks = {.causal = true, .sinks = sinks};
    seq_t seq               = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    seq_grow(&world, &seq, 300);
    attn_problem_entry_t entries[3] = {seq_entry(&seq, 1), seq_entry(&seq, 2), seq_entry(&seq, 1)};
    attn_node_t nodes[2]            = {{26, 0}, {26, 32}}; /* chunks 0 and 1 */
    uint32_t indptr[2]              = {0, 0};
    entries[0].n_runs               = 0; /* holds nothing of it */
    entries[1].n_runs               = 1;
    entries[1].n_nodes              = 2;
    entries[1].nodes                = nodes;
    entries[2].n_lists              = 1; /* no page listed, nothing dense */
    entries[2].sparse_indptr        = indptr;
    entries[2].sparse_pages         = indptr;
    entries[2].dense_from           = 300;
    attn_problem_t problem          = world_problem(&world, entries, 3);
    void *q                         = random_q(&world, 4, 1);
    for (int round = 0; round < 2; round++) {
        run(&world, &problem, round ? &with_sinks : &plain, q, 2, &result);
        assert_int_equal(result.o_rows, 2);
        assert_int_equal(result.states, 2 * 2 * 4);
        for (uint32_t i = 0; i < 2 * 4 * 48; i++) {
            assert_true(result.o[i] == 0 && !signbit(result.o[i]));
        }
        for (uint32_t i = 0; i < 8; i++) {
            assert_true(result.lse[i] == -INFINITY);
            assert_true(result.l[i] > 0); /* node of chunk 0 */
            assert_true(result.l[8 + i] == 0 &&
                        result.e[8 + i] == INT32_MIN); /* of chunk 1, held elsewhere */
        }
        result_free(&result);
    }
    free(q);
    seq_free(&seq);
    world_close(&world);
}

/* Logits far apart and far out: one key outweighs all others to the last bit. */
static void
test_extreme_logits(void **state)
{
    static const float sizes[] = {64, 1000, 3e4f};
    (void)state;

    for (size_t s = 0; s < 3; s++) {
        for (int sign = -1; sign <= 1; sign += 2) {
            seq_t seq = {0};
            float k[64], v[48];
            world_t world;
            result_t result;

            world_open(&world, small_shape(ATTN_F32), 600, 1);
            for (uint32_t t = 0; t < 400; t++) {
                for (uint32_t i = 0; i < 64; i++) {
                    k[i] = (float)sign * sizes[s] * (t == 137 && sign < 0 ? 0.5f : 1.0f);
                }
                for (uint32_t i = 0; i < 48; i++) {
                    v[i] = t == 137 && sign < 0 ? 3 : 1;
                }
                seq_put(&world, &seq, k, v);
            }
            attn_problem_entry_t entry = seq_entry(&seq, 1);
            attn_problem_t problem     = world_problem(&world, &entry, 1);
            float *q                   = random_q(&world, 1, 0);
            for (uint32_t i = 0; i < 4 * 64; i++) {
                q[i] = 64;
            }
            run(&world, &problem, &plain, q, 3, &result);
            for (uint32_t i = 0; i < 4 * 48; i++) {
                assert_true(result.o[i] == (sign < 0 ? 3 : 1));
            }
            check_result(&world, &problem, &plain, q, &result);
            result_free(&result);
            free(q);
            seq_free(&seq);
            world_close(&world);
        }
    }
}

/* Sinks are merged last: far above, far below, and equal to the rest. */
static void
test_sinks_of_any_size(void **state)
{
    float sinks[4];
    (void)state;

    for (float size = -200; size <= 200; size += 12.5f) {
        attn_layer_t layer = {.causal = true, .sinks = sinks};
        seq_t seq          = {0};
        world_t world;
        for (int h = 0; h < 4; h++) {
            sinks[h] = size + (float)h;
        }
        world_open(&world, small_shape(ATTN_F32), 600, 1);
        seq_grow(&world, &seq, 300);
        attn_problem_entry_t entry = seq_entry(&seq, 2);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        check(&world, &problem, &layer);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Values of V that overflow an f16 and that lose all their digits against 1. */
static void
test_values_of_any_size(void **state)
{
    (void)state;
    for (float size = 1e-38f; size < 1e37f; size *= 1000) {
        seq_t seq = {.v_scale = size};
        world_t world;
        world_open(&world, small_shape(ATTN_F32), 800, 1);
        seq_grow(&world, &seq, 600);
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        check(&world, &problem, &plain);
        seq_free(&seq);
        world_close(&world);
    }
}

/* More queries than tokens: the first ones stand before the sequence and see nothing. */
static void
test_more_queries_than_tokens(void **state)
{
    seq_t seq = {0};
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 100, 1);
    seq_grow(&world, &seq, 5);
    attn_problem_entry_t entry = seq_entry(&seq, 9);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    check(&world, &problem, &plain);
    seq_free(&seq);
    world_close(&world);
}

/* ---- errors ---- */

static void
expect_numeric(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
               const void *q, const char *where)
{
    result_t result;
    assert_int_equal(try_run(world, problem, layer, q, 4, &result), ATTN_ERR_NUMERIC);
    assert_non_null(strstr(attn_last_error(), where));
    result_free(&result);
}

static void
test_bad_logits_are_errors(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 1e37f};
    (void)state;

    for (size_t i = 0; i < 4; i++) {
        seq_t seqs[2] = {{0}, {0}};
        world_t world;
        result_t result;

        world_open(&world, small_shape(ATTN_F32), 4000, 2);
        seq_grow(&world, &seqs[0], 50);
        seq_grow(&world, &seqs[1], 3000);
        attn_problem_entry_t entries[2] = {seq_entry(&seqs[0], 3), seq_entry(&seqs[1], 2)};
        attn_problem_t problem          = world_problem(&world, entries, 2);
        void *q                         = random_q(&world, 5, 1);
        run(&world, &problem, &plain, q, 4, &result);
        result_free(&result);
        set_q(&world, q, (4 * 4 + 2) * 64 + 5, bad[i]);
        expect_numeric(&world, &problem, &plain, q, "entry 1, query 1, head 2");
        set_q(&world, q, (1 * 4 + 3) * 64 + 63, bad[i]);
        expect_numeric(&world, &problem, &plain, q, "entry 0, query 1, head 3");
        if (i == 0) { /* a cap makes a number of an infinity, but not of a NaN */
            attn_layer_t capped = plain;
            capped.softcap      = 30.0f;
            expect_numeric(&world, &problem, &capped, q, "entry 0, query 1, head 3");
        }
        free(q);
        seq_free(&seqs[0]);
        seq_free(&seqs[1]);
        world_close(&world);
    }
}

/* A bad logit counts only where it is seen. */
static void
test_masked_logits_do_not_count(void **state)
{
    seq_t seq = {0};
    float k[64], v[48] = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    seq_grow(&world, &seq, 299);
    for (uint32_t i = 0; i < 64; i++) {
        k[i] = 3e38f;
    }
    seq_put(&world, &seq, k, v);
    attn_problem_entry_t entry = seq_entry(&seq, 2);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    void *q                    = random_q(&world, 2, 1);
    for (uint32_t i = 0; i < 4 * 64; i++) {
        set_q(&world, q, 4 * 64 + i, 0); /* the query that sees it makes nothing of it */
    }
    run(&world, &problem, &plain, q, 1, &result);
    check_result(&world, &problem, &plain, q, &result);
    result_free(&result);
    for (uint32_t i = 0; i < 4 * 64; i++) {
        set_q(&world, q, 4 * 64 + i, 1);
    }
    expect_numeric(&world, &problem, &plain, q, "query 1, head 0");
    free(q);
    seq_free(&seq);
    world_close(&world);
}

static void
test_sums_beyond_f32_are_errors(void **state)
{
    seq_t seq   = {0};
    float k[64] = {0}, v[48];
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    for (uint32_t i = 0; i < 48; i++) {
        v[i] = 3e38f;
    }
    for (int t = 0; t < 300; t++) {
        seq_put(&world, &seq, k, v);
    }
    attn_problem_entry_t entry = seq_entry(&seq, 1);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    void *q                    = random_q(&world, 1, 1);
    expect_numeric(&world, &problem, &plain, q, "entry 0, query 0, head 0");
    free(q);
    seq_free(&seq);
    world_close(&world);
}

static void
test_bad_layers_are_refused(void **state)
{
    float bad[4] = {0, 0, NAN, 0};
    seq_t seq    = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 100, 1);
    seq_grow(&world, &seq, 10);
    attn_problem_entry_t entry = seq_entry(&seq, 1);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    attn_layer_t layers[]      = {{.causal = true, .slopes = bad},
                                  {.causal = true, .sinks = bad},
                                  {.causal = true, .softcap = -1},
                                  {.causal = true, .scale = INFINITY}};
    void *q                    = random_q(&world, 1, 1);
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(try_run(&world, &problem, &layers[i], q, 1, &result), ATTN_ERR_INVALID);
        result_free(&result);
    }
    free(q);
    seq_free(&seq);
    world_close(&world);
}

/* ---- append, compare, copy ---- */

static void
test_append_refuses_what_is_not_finite(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    static const float bad[]          = {NAN, INFINITY, -INFINITY};
    (void)state;

    for (int round = 0; round < 18; round++) {
        shape_t shape     = small_shape(types[round % 3]);
        uint32_t pages[4] = {0, 0, 1, 2}, offsets[4] = {3, 4, 0, 15};
        uint32_t d = round / 9 ? shape.d_v : shape.d_k, kv_heads = shape.kv_heads;
        uint64_t size = attn_dtype_size(shape.kv_dtype);
        world_t world;

        world_open(&world, shape, 64, 1);
        void *rows[2] = {calloc(4 * kv_heads * shape.d_k, size),
                         calloc(4 * kv_heads * shape.d_v, size)};
        uint32_t at   = chance_below(4 * kv_heads * d);
        attn_convert((uint8_t *)rows[round / 9] + at * size, shape.kv_dtype, &bad[round / 3 % 3],
                     ATTN_F32, 1);
        assert_int_equal(world.backend->ops->append(world.backend, &world.kv, pages, offsets, 4,
                                                    rows[0], rows[1]),
                         ATTN_ERR_NUMERIC);
        for (uint64_t i = 0; i < world.k_bytes; i++) { /* nothing was stored */
            assert_int_equal(((uint8_t *)world.kv.k)[i], 0xff);
        }
        offsets[2] = shape.page_size;
        assert_int_equal(world.backend->ops->append(world.backend, &world.kv, pages, offsets, 4,
                                                    rows[0], rows[1]),
                         ATTN_ERR_INVALID);
        free(rows[0]);
        free(rows[1]);
        world_close(&world);
    }
}

static void
test_append_stores_rows_and_nothing_else(void **state)
{
    shape_t shape = small_shape(ATTN_F32);
    uint32_t n    = 1500, pages[1500], offsets[1500];
    world_t world;
    (void)state;

    shape.kv_heads = 2;
    world_open(&world, shape, 4096, 3);
    float *k = malloc(n * 2 * 64 * sizeof(float)), *v = malloc(n * 2 * 48 * sizeof(float));
    for (uint32_t i = 0; i < n; i++) { /* every other token of the slab */
        pages[i]   = world.free_pages[i * 2 / 16];
        offsets[i] = i * 2 % 16;
        for (uint32_t j = 0; j < 2 * 64; j++) {
            k[i * 128 + j] = chance_normal();
        }
        for (uint32_t j = 0; j < 2 * 48; j++) {
            v[i * 96 + j] = chance_normal();
        }
    }
    const attn_backend_ops_t *ops = world.backend->ops;
    assert_int_equal(ops->append(world.backend, &world.kv, pages, offsets, n, k, v), ATTN_OK);
    uint64_t written = 0;
    for (uint64_t i = 0; i < world.k_bytes / 4; i++) {
        written += !isnan(((float *)world.kv.k)[i]);
    }
    assert_int_equal(written, n * 2 * 64);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t h = 0; h < 2; h++) {
            assert_memory_equal((float *)world.kv.k + pages[i] * world.kv.k_page_stride +
                                    (h * 16 + offsets[i]) * 64,
                                k + i * 128 + h * 64, 64 * sizeof(float));
            assert_memory_equal((float *)world.kv.v + pages[i] * world.kv.v_page_stride +
                                    (h * 16 + offsets[i]) * 48,
                                v + i * 96 + h * 48, 48 * sizeof(float));
        }
    }

    bool equal = false;
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, n, k, v, &equal),
                     ATTN_OK);
    assert_true(equal);
    float kept        = v[1234 * 96 + 95];
    v[1234 * 96 + 95] = nextafterf(kept, 9);
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, n, k, v, &equal),
                     ATTN_OK);
    assert_false(equal);
    v[1234 * 96 + 95] = kept;
    k[0]              = -k[0];
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, 1, k, v, &equal),
                     ATTN_OK);
    assert_false(equal);
    free(k);
    free(v);
    world_close(&world);
}

static void
test_copy_page_copies_its_first_tokens(void **state)
{
    seq_t seq = {0};
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_BF16), 64, 1);
    seq_grow(&world, &seq, 16);
    uint32_t from = seq.pages[0][0], to = world.free_pages[0];
    assert_int_equal(world.backend->ops->copy_page(world.backend, &world.kv, from, to, 11),
                     ATTN_OK);
    for (uint32_t h = 0; h < 2; h++) {
        for (uint32_t t = 0; t < 16; t++) {
            uint64_t k = (h * 16 + t) * 64 * 2, v = (h * 16 + t) * 48 * 2;
            uint8_t *k_to = (uint8_t *)world.kv.k + to * world.kv.k_page_stride * 2 + k;
            uint8_t *v_to = (uint8_t *)world.kv.v + to * world.kv.v_page_stride * 2 + v;
            if (t < 11) {
                assert_memory_equal(
                    k_to, (uint8_t *)world.kv.k + from * world.kv.k_page_stride * 2 + k, 128);
                assert_memory_equal(
                    v_to, (uint8_t *)world.kv.v + from * world.kv.v_page_stride * 2 + v, 96);
            } else {
                assert_true(k_to[0] == 0xff && k_to[127] == 0xff && v_to[0] == 0xff &&
                            v_to[95] == 0xff);
            }
        }
    }
    assert_int_equal(world.backend->ops->copy_page(world.backend, &world.kv, from, 1000000, 11),
                     ATTN_ERR_INVALID);
    assert_int_equal(world.backend->ops->copy_page(world.backend, &world.kv, from, to, 17),
                     ATTN_ERR_INVALID);
    seq_free(&seq);
    world_close(&world);
}

/* ---- the table ---- */

static void
test_supports(void **state)
{
    attn_geometry_t good = {.layers     = 1,
                            .q_heads    = 8,
                            .kv_heads   = 2,
                            .head_dim_k = 128,
                            .head_dim_v = 128,
                            .kv_dtype   = ATTN_BF16,
                            .page_size  = 16,
                            .chunk_size = 2048};
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 64, 1);
    const attn_backend_ops_t *ops = world.backend->ops;
    assert_int_equal(ops->supports(world.backend, &good), ATTN_OK);
    attn_geometry_t bad[8];
    for (int i = 0; i < 8; i++) {
        bad[i] = good;
    }
    bad[0].head_dim_k = 24;
    bad[1].head_dim_v = 264;
    bad[2].head_dim_k = 100;
    bad[3].q_heads    = 7;
    bad[4].kv_dtype   = ATTN_DTYPE_NONE;
    bad[5].page_size  = 257;
    bad[6].chunk_size = 3000;
    bad[7].kv_heads   = 0;
    for (int i = 0; i < 8; i++) {
        assert_int_equal(ops->supports(world.backend, &bad[i]), ATTN_ERR_UNSUPPORTED);
        assert_non_null(strstr(attn_last_error(), "bf16"));
    }
    assert_true(ops->read_bandwidth(world.backend) > 1e8);
    assert_true(ops->parallelism(world.backend) >= 1);
    assert_non_null(strstr(ops->kind(world.backend), ops->name));
    assert_null(attn_backend_find("none"));
    assert_string_equal(attn_backend_name(0), "cpu");
    assert_null(attn_backend_name(99));
    world_close(&world);
}

static void
test_slabs_are_zeroed_and_aligned(void **state)
{
    world_t world;
    void *slab;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 64, 1);
    const attn_backend_ops_t *ops = world.backend->ops;
    assert_int_equal(ops->slab_alloc(world.backend, 5u << 20, &slab), ATTN_OK);
    assert_int_equal((uintptr_t)slab % 4096, 0);
    for (uint32_t i = 0; i < 5u << 20; i++) {
        assert_int_equal(((uint8_t *)slab)[i], 0);
    }
    ops->slab_free(world.backend, slab, 5u << 20);
    assert_int_equal(ops->slab_alloc(world.backend, UINT64_C(1) << 60, &slab), ATTN_ERR_NO_MEMORY);
    world_close(&world);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_token_returns_v_exactly),
        cmocka_unit_test(test_exponents_are_those_of_the_maximum),
        cmocka_unit_test(test_nothing_seen_is_empty),
        cmocka_unit_test(test_extreme_logits),
        cmocka_unit_test(test_sinks_of_any_size),
        cmocka_unit_test(test_values_of_any_size),
        cmocka_unit_test(test_more_queries_than_tokens),
        cmocka_unit_test(test_bad_logits_are_errors),
        cmocka_unit_test(test_masked_logits_do_not_count),
        cmocka_unit_test(test_sums_beyond_f32_are_errors),
        cmocka_unit_test(test_bad_layers_are_refused),
        cmocka_unit_test(test_append_refuses_what_is_not_finite),
        cmocka_unit_test(test_append_stores_rows_and_nothing_else),
        cmocka_unit_test(test_copy_page_copies_its_first_tokens),
        cmocka_unit_test(test_supports),
        cmocka_unit_test(test_slabs_are_zeroed_and_aligned),
    };
    int failed = 0;

    ATTN_BACKEND_TESTS(cpu, "edges", tests);
    return failed;
}
