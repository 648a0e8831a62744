/* engine_test.c: answers against the oracle over shapes, masks, lists and forks; caches and chunks.
 */
#include "engine/test_engine.h"

/* ---- shapes ---- */

static const struct {
    attn_geometry_t geometry;
    attn_dtype_t q_dtype, o_dtype;
} shapes[] = {
    {{.size         = sizeof(attn_geometry_t),
      .layers       = 2,
      .q_heads      = 4,
      .kv_heads     = 2,
      .head_dim_k   = 64,
      .head_dim_v   = 64,
      .kv_dtype     = ATTN_F32,
      .page_size    = 16,
      .chunk_size   = 256,
      .region_bytes = 8u << 20},
     ATTN_F32,
     ATTN_F32},
    {{.size         = sizeof(attn_geometry_t),
      .layers       = 4,
      .q_heads      = 4,
      .kv_heads     = 1,
      .head_dim_k   = 128,
      .head_dim_v   = 64,
      .kv_dtype     = ATTN_BF16,
      .page_size    = 13,
      .chunk_size   = 256,
      .region_bytes = 8u << 20,
      .layer_table  = test_rows},
     ATTN_BF16,
     ATTN_F32},
    {{.size         = sizeof(attn_geometry_t),
      .layers       = 1,
      .q_heads      = 3,
      .kv_heads     = 3,
      .head_dim_k   = 32,
      .head_dim_v   = 96,
      .kv_dtype     = ATTN_F16,
      .page_size    = 256,
      .chunk_size   = 256,
      .region_bytes = 8u << 20},
     ATTN_F32,
     ATTN_F16},
    {{.size         = sizeof(attn_geometry_t),
      .layers       = 1,
      .q_heads      = 2,
      .kv_heads     = 2,
      .head_dim_k   = 40,
      .head_dim_v   = 32,
      .kv_dtype     = ATTN_F32,
      .page_size    = 1,
      .chunk_size   = 512,
      .region_bytes = 8u << 20},
     ATTN_F16,
     ATTN_BF16},
};

static void
try_shape(const attn_geometry_t *geometry, attn_dtype_t q_dtype, attn_dtype_t o_dtype,
          uint32_t threads)
{
    world_t w;
    sequence_t a, b, c;

    world_open(&w, geometry, threads);
    sequence_init(&w, &a);
    sequence_init(&w, &b);
    ask_t prefill = {.seq = &a, .n_q = 130, .n_new = 130};
    do_step(&w, &prefill, 1, q_dtype, o_dtype);
    append(&w, &a, 400);
    ask_t both[] = {{.seq = &a, .base = 530, .n_q = 1, .n_new = 1},
                    {.seq = &b, .n_q = 40, .n_new = 70}};
    do_step(&w, both, 2, q_dtype, o_dtype);
    sequence_fork(&w, &a, 520, &c);
    ask_t three[] = {{.seq = &a, .base = 531, .n_q = 1, .n_new = 1},
                     {.seq = &b, .base = 50, .n_q = 2},
                     {.seq = &c, .base = 520, .n_q = 3, .n_new = 9}};
    do_step(&w, three, 3, q_dtype, o_dtype);
    check_content(&w, &a);
    check_content(&w, &b);
    check_content(&w, &c);
    sequence_free(&a);
    sequence_free(&b);
    sequence_free(&c);
    world_close(&w);
}

static void
test_answers_of_several_shapes_are_right(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        try_shape(&shapes[i].geometry, shapes[i].q_dtype, shapes[i].o_dtype, 1 + i % 2);
    }
}

static void
test_layers_share_plans_by_window_and_causality(void **state)
{
    world_t w;
    sequence_t s;
    attn_layer_t rows[4] = {{.causal = true, .softcap = 3.0f},
                            {.causal = true, .window = 40},
                            {.causal = true, .sinks = test_sinks},
                            {.causal = false, .window = 40}};
    attn_geometry_t g    = plain_geometry;

    (void)state;
    g.layers      = 4;
    g.layer_table = rows;
    world_open(&w, &g, 2);
    const engine_cache_t *cache = w.engine->caches;
    assert_int_equal(cache->n_variants, 3);
    assert_int_equal(cache->variant_of[0], cache->variant_of[2]);
    assert_int_not_equal(cache->variant_of[1], cache->variant_of[3]);
    sequence_init(&w, &s);
    append(&w, &s, 300);
    ask_t ask = {.seq = &s, .base = 300, .n_q = 20, .n_new = 20};
    do_step(&w, &ask, 1, ATTN_F32, ATTN_F32);
    sequence_free(&s);
    world_close(&w);
}

static void
test_an_answer_without_lse_has_only_o(void **state)
{
    world_t w;
    sequence_t s;
    built_t b;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    ask_t ask = {.seq = &s, .n_q = 5, .n_new = 5};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    b.batch.want_lse = false;
    dream(&w, &ask, 1);
    begin(&b);
    assert_int_equal(b.sizes.lse, 0);
    assert_int_equal(b.sizes.o, 5 * 4 * 32 * sizeof(float));
    assert_int_equal(b.sizes.answer, b.sizes.o);
    run_and_judge(&b, 0);
    sequence_free(&s);
    world_close(&w); /* with the step open: destroying the engine ends it */
}

/* ---- block-sparse ---- */

static void
test_sparse_lists(void **state)
{
    /* Chunks of 256 tokens are 20 pages of 13, the last of them 9. */
    static const uint32_t one_indptr[] = {0, 4}, one_pages[] = {0, 7, 19, 21};
    static const uint32_t head_indptr[] = {0, 3, 5}, head_pages[] = {1, 19, 20, 3, 39};
    static const uint32_t none_indptr[] = {0, 0};
    world_t w;
    sequence_t s;
    attn_geometry_t g = plain_geometry;

    (void)state;
    g.page_size = 13;
    world_open(&w, &g, 2);
    sequence_init(&w, &s);
    append(&w, &s, 512);
    ask_t one = {
        .seq = &s, .base = 512, .n_q = 4, .n_lists = 1, .indptr = one_indptr, .pages = one_pages};
    do_step(&w, &one, 1, ATTN_F32, ATTN_F32);
    /* The step's own tokens are always attended to, here across a page that is not listed. */
    ask_t heads = {.seq     = &s,
                   .base    = 512,
                   .n_q     = 9,
                   .n_new   = 20,
                   .n_lists = 2,
                   .indptr  = head_indptr,
                   .pages   = head_pages};
    do_step(&w, &heads, 1, ATTN_F32, ATTN_F32);
    ask_t none = {.seq     = &s,
                  .base    = 532,
                  .n_q     = 1,
                  .n_new   = 1,
                  .n_lists = 1,
                  .indptr  = none_indptr,
                  .pages   = one_pages};
    do_step(&w, &none, 1, ATTN_F32, ATTN_F32);
    ask_t nothing = {
        .seq = &s, .base = 533, .n_q = 2, .n_lists = 1, .indptr = none_indptr, .pages = one_pages};
    do_step(&w, &nothing, 1, ATTN_F32, ATTN_F32); /* O = 0, LSE = -inf */
    sequence_free(&s);
    world_close(&w);
}

/* ---- forks ---- */

static void
test_two_forks_are_appended_at_once(void **state)
{
    world_t w;
    sequence_t s, f[2];
    built_t b[2];
    uint32_t few[] = {3};

    (void)state;
    world_open(&w, &plain_geometry, 2);
    sequence_init(&w, &s);
    append(&w, &s, 300);
    sequence_fork(&w, &s, 297, &f[0]);
    sequence_fork(&w, &s, 291, &f[1]);
    ask_t asks[2] = {{.seq = &f[0], .base = 297, .n_q = 9, .n_new = 9},
                     {.seq = &f[1], .base = 291, .n_q = 25, .n_new = 25}};
    for (int i = 0; i < 2; i++) { /* both open, their layers interleaved */
        build(&b[i], &w, &asks[i], 1, ALL_CHUNKS);
        dream(&w, &asks[i], 1);
        begin(&b[i]);
        OK(engine_check(w.engine));
    }
    for (uint32_t l = 0; l < 2; l++) {
        run_and_judge(&b[0], l);
        run_and_judge(&b[1], l);
    }
    check_content(&w, &s);
    commit(&b[1], NULL);
    run_and_judge(&b[0], 1); /* what the other one wrote is not seen */
    commit(&b[0], few);
    for (int i = 0; i < 2; i++) {
        check_content(&w, &f[i]);
        append(&w, &f[i], 5);
        check_content(&w, &f[i]);
        sequence_free(&f[i]);
    }
    append(&w, &s, 30);
    check_content(&w, &s);
    sequence_free(&s);
    world_close(&w);
}

static void
test_a_fork_while_a_step_is_open_has_what_is_committed(void **state)
{
    world_t w;
    sequence_t s, f;
    built_t b;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 40);
    ask_t ask = {.seq = &s, .base = 40, .n_q = 4, .n_new = 4};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    dream(&w, &ask, 1);
    begin(&b);
    run_and_judge(&b, 0);
    FAILS(engine_chunk_fork(w.engine, w.cache, s.chunk[0], 41, 1), ATTN_ERR_INVALID, "");
    sequence_fork(&w, &s, 40, &f);
    append(&w, &f, 3); /* into a page of its own */
    run_and_judge(&b, 1);
    run_and_judge(&b, 0);
    commit(&b, NULL);
    check_content(&w, &s);
    check_content(&w, &f);
    sequence_free(&s);
    sequence_free(&f);
    world_close(&w);
}

/* ---- chunks and caches ---- */

static void
test_chunks_are_cut_released_and_described(void **state)
{
    world_t w;
    sequence_t s;
    kv_chunk_info_t infos[3];
    bool in_step[2];
    uint32_t generation;
    built_t b;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 300);
    uint64_t chunks[] = {s.chunk[1], 12345, s.chunk[0]}, seqs[] = {s.id, 999};
    OK(engine_chunks_describe(w.engine, w.cache, chunks, 3, infos, seqs, 2, in_step));
    assert_true(infos[0].generation == 1 && infos[0].length == 44 && infos[2].length == 256);
    assert_int_equal(infos[1].generation, 0);
    assert_false(in_step[0] || in_step[1]);
    FAILS(engine_chunks_describe(w.engine, 1, chunks, 3, infos, seqs, 2, in_step),
          ATTN_ERR_NOT_FOUND, "worker 9");

    FAILS(engine_chunk_truncate(w.engine, w.cache, s.chunk[1], 2, 10, &generation), ATTN_ERR_STALE,
          "");
    OK(engine_chunk_truncate(w.engine, w.cache, s.chunk[1], 1, 10, &generation));
    assert_int_equal(generation, 2);
    s.length    = 266;
    ask_t stale = {.seq = &s, .base = 266, .n_q = 1, .n_new = 1};
    build(&b, &w, &stale, 1, ALL_CHUNKS);
    FAILS(engine_step_begin(w.engine, &b.batch, &b.sizes), ATTN_ERR_STALE, "generation");
    s.generation[1] = 2;
    do_step(&w, &stale, 1, ATTN_F32, ATTN_F32);

    ask_t ask = {.seq = &s, .base = 267, .n_q = 1};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    begin(&b);
    OK(engine_chunks_describe(w.engine, w.cache, chunks, 3, infos, seqs, 2, in_step));
    assert_true(in_step[0] && !in_step[1] && infos[0].in_step);
    OK(engine_chunk_fork(w.engine, w.cache, s.chunk[0], 9, 12345));
    uint64_t busy_first[] = {s.chunk[0], 777, 778}; /* the others are not here */
    FAILS(engine_chunks_release(w.engine, w.cache, busy_first, 3), ATTN_ERR_BUSY,
          "is named 1 times");
    FAILS(engine_chunks_release(w.engine, w.cache, chunks, 3), ATTN_ERR_BUSY, "is named 1 times");
    OK(engine_chunks_describe(w.engine, w.cache, chunks, 3, infos, NULL, 0, NULL));
    assert_true(infos[0].generation == 2 && infos[1].generation == 0); /* the others are released */
    OK(engine_step_abort(w.engine, b.batch.step_id, "enough"));
    OK(engine_chunks_release(w.engine, w.cache, chunks, 3));
    OK(engine_chunks_release(w.engine, w.cache, chunks, 3)); /* missing ones count as released */
    figures_t after = figures_of(&w, &s, NULL);
    assert_true(after.info.used_bytes == 0 && after.info.chunks == 0);
    sequence_free(&s);
    world_close(&w);
}

static void
test_caches_open_and_close(void **state)
{
    world_t w;
    attn_geometry_t g = plain_geometry;
    kv_region_info_t info;
    engine_info_t before, after;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    engine_describe(w.engine, &before);
    OK(engine_cache_open(w.engine, w.cache, &g, &info)); /* the same again */
    assert_true(info.n_pages > 0 && info.free_pages == info.n_pages);
    g.page_size = 32;
    FAILS(engine_cache_open(w.engine, w.cache, &g, &info), ATTN_ERR_EXISTS, "77");
    g             = plain_geometry;
    g.layer_table = test_rows; /* as many rows, other masks */
    FAILS(engine_cache_open(w.engine, w.cache, &g, &info), ATTN_ERR_EXISTS, "77");
    g              = plain_geometry;
    g.region_bytes = 65u << 20;
    FAILS(engine_cache_open(w.engine, 2, &g, &info), ATTN_ERR_EXHAUSTED, "");
    g.region_bytes = 1u << 20;
    g.kv_dtype     = (attn_dtype_t)9;
    FAILS(engine_cache_open(w.engine, 2, &g, &info), ATTN_ERR_INVALID, "kv_dtype");
    g = plain_geometry;
    assert_int_not_equal(engine_cache_open(w.engine, 0, &g, &info), ATTN_OK);
    FAILS(engine_cache_close(w.engine, 2), ATTN_ERR_NOT_FOUND, "worker 9");
    engine_describe(w.engine, &after);
    assert_memory_equal(&before, &after, sizeof(before));

    OK(engine_cache_open(w.engine, 2, &g, &info));
    engine_describe(w.engine, &after);
    assert_int_equal(after.caches, 2);
    engine_caches_close(w.engine);
    engine_describe(w.engine, &after);
    assert_true(after.caches == 0 && after.region_bytes == 0);
    OK(engine_cache_open(w.engine, w.cache, &g, &info));
    world_close(&w);
}

static void
test_closing_a_cache_aborts_its_steps(void **state)
{
    world_t w;
    sequence_t s;
    built_t b;
    kv_region_info_t info;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 20);
    ask_t ask = {.seq = &s, .base = 20, .n_q = 1, .n_new = 1};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    begin(&b);
    OK(engine_cache_close(w.engine, w.cache));
    FAILS(engine_step_run(w.engine, b.batch.step_id, 0, NULL, NULL, NULL, NULL, NULL),
          ATTN_ERR_ABORTED, "its cache was closed");
    FAILS(engine_step_commit(w.engine, b.batch.step_id, NULL, 0), ATTN_ERR_ABORTED,
          "its cache was closed");
    FAILS(engine_step_sizes(w.engine, b.batch.step_id, &b.sizes), ATTN_ERR_ABORTED,
          "its cache was closed");
    b.batch.step_id++;
    FAILS(engine_step_begin(w.engine, &b.batch, &b.sizes), ATTN_ERR_NOT_FOUND, "no cache 77");
    OK(engine_cache_open(w.engine, w.cache, &plain_geometry, &info));
    figures_t after = figures_of(&w, &s, NULL);
    assert_true(after.info.used_bytes == 0 && after.info.open_steps == 0 &&
                after.chunks[0][0].generation == 0);
    sequence_free(&s);
    world_close(&w);
}

static void
test_engines_that_cannot_be_made(void **state)
{
    engine_t *engine;
    engine_options_t options = {.device = "abacus", .threads = 1, .slab_bytes = 1u << 20};

    (void)state;
    FAILS(engine_create(&options, &engine), ATTN_ERR_UNSUPPORTED, "abacus");
    options.device     = "cpu";
    options.slab_bytes = 4095;
    FAILS(engine_create(&options, &engine), ATTN_ERR_INVALID, "");
    options.slab_bytes = UINT64_C(1) << 62;
    FAILS(engine_create(&options, &engine), ATTN_ERR_NO_MEMORY, "");
    options.slab_bytes = 1u << 20;
    options.device     = "cpu:9";
    FAILS(engine_create(&options, &engine), ATTN_ERR_UNSUPPORTED, "");
    options.device  = "cpu";
    options.threads = 100000;
    FAILS(engine_create(&options, &engine), ATTN_ERR_INVALID, "threads");
    engine_destroy(NULL);
}

static void
test_a_slab_as_the_device_has_it(void **state)
{
    engine_options_t options = {.device = "cpu", .threads = 1, .reserve_bytes = UINT64_MAX};
    engine_info_t info;
    engine_t *engine;

    (void)state;
    OK(engine_create(&options, &engine)); /* memory of a cpu is not its own: the default */
    engine_describe(engine, &info);
    assert_int_equal(info.slab_bytes, ENGINE_SLAB_BYTES);
    assert_true(info.device.total_bytes > info.device.free_bytes && !info.device.dedicated);
    assert_null(engine_failed(engine));
    engine_destroy(engine);
}

static void
test_a_stale_epoch_is_refused(void **state)
{
    world_t w;
    sequence_t s;
    built_t b;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    engine_set_epoch(w.engine, 8);
    engine_set_epoch(w.engine, 5); /* never shrinks */
    FAILS(engine_check_epoch(w.engine, 7), ATTN_ERR_STALE, "worker 9");
    OK(engine_check_epoch(w.engine, 8));
    OK(engine_check_epoch(w.engine, 9));
    OK(engine_check_epoch(w.engine, 0));
    ask_t ask = {.seq = &s, .n_q = 1, .n_new = 1};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    b.batch.epoch = 7;
    FAILS(engine_step_begin(w.engine, &b.batch, &b.sizes), ATTN_ERR_STALE, "epoch 7");
    b.batch.epoch = 9;
    begin(&b);
    sequence_free(&s);
    world_close(&w);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_of_several_shapes_are_right),
        cmocka_unit_test(test_layers_share_plans_by_window_and_causality),
        cmocka_unit_test(test_an_answer_without_lse_has_only_o),
        cmocka_unit_test(test_sparse_lists),
        cmocka_unit_test(test_two_forks_are_appended_at_once),
        cmocka_unit_test(test_a_fork_while_a_step_is_open_has_what_is_committed),
        cmocka_unit_test(test_chunks_are_cut_released_and_described),
        cmocka_unit_test(test_caches_open_and_close),
        cmocka_unit_test(test_closing_a_cache_aborts_its_steps),
        cmocka_unit_test(test_engines_that_cannot_be_made),
        cmocka_unit_test(test_a_slab_as_the_device_has_it),
        cmocka_unit_test(test_a_stale_epoch_is_refused),
    };
    return cmocka_run_group_tests_name("engine", tests, NULL, NULL);
}
