/*
 * engine_step_test.c: a step is a transaction. Wherever it ends without a commit, pages, chunks,
 * lengths and content are as before; begin, run, commit and abort may be repeated.
 */
#include "engine/test_engine.h"

/* Two sequences that share pages: b forked from a inside a page. */
typedef struct pair {
    world_t w;
    sequence_t a, b;
    ask_t asks[2]; /* a grows inside its page, b over the end of its chunk */
    figures_t before;
} pair_t;

static void
pair_open(pair_t *p)
{
    world_open(&p->w, &plain_geometry, 1);
    sequence_init(&p->w, &p->a);
    append(&p->w, &p->a, 300);
    sequence_fork(&p->w, &p->a, 290, &p->b);
    p->asks[0] = (ask_t){.seq = &p->a, .base = 300, .n_q = 5, .n_new = 5};
    p->asks[1] = (ask_t){.seq = &p->b, .base = 290, .n_q = 7, .n_new = 300};
    p->before  = figures_of(&p->w, &p->a, &p->b);
}

static void
pair_begin(pair_t *p, built_t *b)
{
    build(b, &p->w, p->asks, 2, ALL_CHUNKS);
    dream(&p->w, p->asks, 2);
    begin(b);
    OK(engine_check(p->w.engine));
}

/* The same figures as before the step, and the same content. */
static void
pair_check(pair_t *p)
{
    figures_t after = figures_of(&p->w, &p->a, &p->b);

    OK(engine_check(p->w.engine));
    assert_memory_equal(&after, &p->before, sizeof(after));
    check_content(&p->w, &p->a);
    check_content(&p->w, &p->b);
}

static void
pair_close(pair_t *p)
{
    sequence_free(&p->a);
    sequence_free(&p->b);
    world_close(&p->w);
}

/* ---- abort at every point ---- */

static void
store_wrong(built_t *b, uint32_t layer, float wrong, attn_status_t status, const char *text)
{
    float *k = gather(b, layer, true), *v = gather(b, layer, false);

    v[b->sizes.v / sizeof(*v) - 1] = wrong;
    FAILS(engine_step_run(b->w->engine, b->batch.step_id, layer, NULL, k, v, NULL, NULL), status,
          text);
    free(k);
    free(v);
}

static void
test_abort_after_each_number_of_runs(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    for (uint32_t runs = 0; runs <= 2; runs++) {
        pair_begin(&p, &b);
        for (uint32_t l = 0; l < runs; l++) {
            run_and_judge(&b, l);
            OK(engine_check(p.w.engine));
        }
        OK(engine_step_abort(p.w.engine, b.batch.step_id, "enough"));
        pair_check(&p);
    }
    pair_close(&p);
}

static uint64_t
runs_timed(pair_t *p, uint64_t *total_ns)
{
    engine_info_t info; /* each run is in one of the histogram's counts */
    uint64_t n = 0;

    engine_describe(p->w.engine, &info);
    for (uint32_t i = 0; i < ENGINE_TIMES; i++) {
        n += info.times.counts[i];
    }
    *total_ns = info.times.total_ns;
    assert_int_equal(n, info.runs);
    return n;
}

static void
test_runs_are_timed(void **state)
{
    uint64_t before_ns, after_ns, start;
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    uint64_t before = runs_timed(&p, &before_ns);
    start           = attn_now_ns();
    run_and_judge(&b, 0);
    uint64_t took  = attn_now_ns() - start;
    uint64_t after = runs_timed(&p, &after_ns);
    assert_true(after > before);
    assert_true(after_ns > before_ns && after_ns - before_ns <= took);
    FAILS(engine_step_run(p.w.engine, b.batch.step_id + 1, 0, NULL, NULL, NULL, NULL, NULL),
          ATTN_ERR_NOT_FOUND, "");
    assert_int_equal(runs_timed(&p, &after_ns), after); /* nothing ran */
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "enough"));
    pair_close(&p);
}

static void
test_abort_after_failed_runs(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    run_and_judge(&b, 0);
    store_wrong(&b, 0, 0.5f, ATTN_ERR_CONFLICT, "layer 0");
    store_wrong(&b, 1, NAN, ATTN_ERR_NUMERIC, "worker 9");
    OK(engine_check(p.w.engine));
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "enough"));
    pair_check(&p);
    pair_close(&p);
}

static void
test_the_deadline_aborts(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    run_and_judge(&b, 1);
    engine_tick(p.w.engine, b.batch.deadline_ns - 1);
    run_and_judge(&b, 0);
    engine_tick(p.w.engine, b.batch.deadline_ns);
    FAILS(run_layer(&b, 0, NULL, NULL), ATTN_ERR_ABORTED, "its deadline passed");
    pair_check(&p);

    /* Without a tick, the next call notices. */
    build(&b, &p.w, p.asks, 2, ALL_CHUNKS);
    b.batch.deadline_ns = attn_now_ns() + 1;
    dream(&p.w, p.asks, 2);
    begin(&b);
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0), ATTN_ERR_ABORTED,
          "its deadline passed");
    pair_check(&p);
    pair_close(&p);
}

static void
test_a_begin_that_fails_leaves_nothing(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    ask_t large          = {.seq = &p.b, .base = 290, .n_new = 2048 - 290};
    attn_status_t status = ATTN_OK;
    for (uint32_t i = 0; i < 64 && status == ATTN_OK; i++) { /* fill the region up */
        sequence_t filler;
        sequence_init(&p.w, &filler);
        ask_t fill = {.seq = &filler, .n_new = 2048};
        build(&b, &p.w, &fill, 1, ALL_CHUNKS);
        status = engine_step_begin(p.w.engine, &b.batch, &b.sizes);
        sequence_free(&filler);
    }
    assert_int_equal(status, ATTN_ERR_EXHAUSTED);
    figures_t full = figures_of(&p.w, &p.a, &p.b);
    build(&b, &p.w, &large, 1, ALL_CHUNKS);
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_EXHAUSTED, "free");
    figures_t after = figures_of(&p.w, &p.a, &p.b);
    assert_memory_equal(&after, &full, sizeof(full));
    FAILS(engine_step_sizes(p.w.engine, b.batch.step_id, &b.sizes), ATTN_ERR_NOT_FOUND, "no step");
    engine_tick(p.w.engine, UINT64_MAX); /* the fillers' deadline */
    pair_check(&p);
    pair_begin(&p, &b);
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "enough"));
    pair_close(&p);
}

/* ---- again ---- */

static void
test_begin_and_run_may_be_repeated(void **state)
{
    pair_t p;
    built_t b;
    engine_sizes_t sizes = {0};

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    OK(engine_step_begin(p.w.engine, &b.batch, &sizes));
    assert_memory_equal(&sizes, &b.sizes, sizeof(sizes));
    run_and_judge(&b, 1);
    OK(engine_step_begin(p.w.engine, &b.batch, &sizes));
    OK(engine_step_sizes(p.w.engine, b.batch.step_id, &sizes));
    assert_memory_equal(&sizes, &b.sizes, sizeof(sizes));
    run_and_judge(&b, 1); /* the same k and v, another q */
    run_and_judge(&b, 0);

    built_t other;
    build(&other, &p.w, p.asks, 1, ALL_CHUNKS);
    other.batch.step_id = b.batch.step_id;
    FAILS(engine_step_begin(p.w.engine, &other.batch, &sizes), ATTN_ERR_EXISTS, "another batch");
    b.entries[1].n_q--;
    FAILS(engine_step_begin(p.w.engine, &b.batch, &sizes), ATTN_ERR_EXISTS, "another batch");
    b.entries[1].n_q++;
    b.batch.want_lse = false;
    FAILS(engine_step_begin(p.w.engine, &b.batch, &sizes), ATTN_ERR_EXISTS, "another batch");
    b.batch.want_lse = true;
    b.chunks[0][0].generation++;
    FAILS(engine_step_begin(p.w.engine, &b.batch, &sizes), ATTN_ERR_EXISTS, "another batch");
    b.chunks[0][0].generation--;
    commit(&b, NULL);
    check_content(&p.w, &p.a);
    check_content(&p.w, &p.b);
    pair_close(&p);
}

static void
test_commit_may_be_repeated(void **state)
{
    pair_t p;
    built_t b;
    uint32_t few[] = {1, 1};

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    run_and_judge(&b, 0);
    run_and_judge(&b, 1);
    commit(&b, NULL);
    p.before = figures_of(&p.w, &p.a, &p.b);
    OK(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0));
    OK(engine_step_commit(p.w.engine, b.batch.step_id, few, 2)); /* what was done is done */
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "too late"));
    pair_check(&p);
    FAILS(run_layer(&b, 0, NULL, NULL), ATTN_ERR_NOT_FOUND, "was committed");
    FAILS(engine_step_sizes(p.w.engine, b.batch.step_id, &b.sizes), ATTN_ERR_NOT_FOUND,
          "was committed");
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_EXISTS, "choose another id");
    pair_close(&p);
}

static void
test_abort_may_be_repeated_and_says_why(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    OK(engine_step_abort(p.w.engine, 4711, "never was"));
    FAILS(engine_step_commit(p.w.engine, 4711, NULL, 0), ATTN_ERR_NOT_FOUND, "worker 9");
    pair_begin(&p, &b);
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "a good reason"));
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "another one"));
    FAILS(run_layer(&b, 0, NULL, NULL), ATTN_ERR_ABORTED, "a good reason");
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0), ATTN_ERR_ABORTED,
          "a good reason");
    FAILS(engine_step_sizes(p.w.engine, b.batch.step_id, &b.sizes), ATTN_ERR_ABORTED, "worker 9");
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_EXISTS, "choose another id");
    pair_check(&p);
    pair_close(&p);
}

static void
test_ended_steps_are_forgotten_in_the_end(void **state)
{
    pair_t p;
    built_t b;
    uint64_t first;

    (void)state;
    pair_open(&p);
    ask_t nothing = {.seq = &p.a, .base = 300};
    build(&b, &p.w, &nothing, 1, ALL_CHUNKS);
    first = b.batch.step_id;
    for (uint32_t i = 0; i <= ENDED_STEPS; i++, b.batch.step_id++) {
        begin(&b);
        OK(i % 2 == 0 ? engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0)
                      : engine_step_abort(p.w.engine, b.batch.step_id, "odd"));
    }
    FAILS(engine_step_commit(p.w.engine, first, NULL, 0), ATTN_ERR_NOT_FOUND, "no step");
    OK(engine_step_commit(p.w.engine, first + 2, NULL, 0));
    FAILS(engine_step_commit(p.w.engine, first + 1, NULL, 0), ATTN_ERR_ABORTED, "odd");
    b.batch.step_id = first;
    begin(&b);
    OK(engine_step_abort(p.w.engine, first, "odd"));
    pair_check(&p);
    pair_close(&p);
}

/* ---- commit ---- */

/* Accept n of 12 tokens of which six end chunk 0 and six begin chunk 1. */
static void
accept(world_t *w, sequence_t *from, uint32_t n)
{
    sequence_t s;
    built_t b;

    sequence_fork(w, from, 250, &s);
    figures_t before = figures_of(w, &s, NULL);
    ask_t ask        = {.seq = &s, .base = 250, .n_q = 12, .n_new = 12};
    build(&b, w, &ask, 1, ALL_CHUNKS);
    dream(w, &ask, 1);
    begin(&b);
    run_and_judge(&b, 0);
    run_and_judge(&b, 1);
    commit(&b, &n);

    figures_t after = figures_of(w, &s, NULL);
    assert_int_equal(after.chunks[0][0].length, 250 + attn_min(n, 6));
    assert_int_equal(after.chunks[0][0].generation, 1);
    assert_int_equal(after.chunks[0][1].length, n > 6 ? n - 6 : 0);
    assert_int_equal(after.chunks[0][1].generation, n > 6);
    /* A copy of the page that was shared, and a new one. */
    uint64_t page = 16 * (k_row(&w->g) + v_row(&w->g)) * w->g.layers;
    assert_int_equal(after.info.used_bytes, before.info.used_bytes + ((n > 0) + (n > 6)) * page);
    check_content(w, &s);
    append(w, &s, 20);
    check_content(w, &s);
    OK(engine_chunks_release(w->engine, w->cache, s.chunk, 2));

    /* A client with an old layout cannot make a released chunk again: nobody would release it. */
    kv_step_chunk_t again = {.chunk = s.chunk[0], .n_new = 1};
    engine_entry_t entry  = {.seq = 4711, .n_new = 1, .n_chunks = 1, .chunks = &again};
    engine_batch_t batch  = {.cache       = w->cache,
                             .step_id     = 4711,
                             .n           = 1,
                             .entries     = &entry,
                             .q_dtype     = ATTN_F32,
                             .o_dtype     = ATTN_F32,
                             .deadline_ns = UINT64_MAX};
    engine_sizes_t sizes;
    FAILS(engine_step_begin(w->engine, &batch, &sizes), ATTN_ERR_NOT_FOUND, "was released");
    check_content(w, from);
    sequence_free(&s);
}

static void
test_commit_of_each_number_of_tokens(void **state)
{
    world_t w;
    sequence_t s;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 251);
    for (uint32_t n = 0; n <= 12; n++) {
        accept(&w, &s, n);
    }
    sequence_free(&s);
    world_close(&w);
}

static void
test_commit_of_what_is_not_there_is_refused(void **state)
{
    pair_t p;
    built_t b;
    uint32_t none[] = {0, 0}, some[] = {0, 9}, many[] = {0, 301};

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0), ATTN_ERR_INCOMPLETE, "layer 0");
    run_and_judge(&b, 0);
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0), ATTN_ERR_INCOMPLETE, "layer 1");
    assert_non_null(strstr(attn_last_error(), "tokens 300-304"));
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, some, 2), ATTN_ERR_INCOMPLETE,
          "tokens 290-298");
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, some, 1), ATTN_ERR_INVALID, "2 entries");
    FAILS(engine_step_commit(p.w.engine, b.batch.step_id, many, 2), ATTN_ERR_INVALID,
          "accepted[1] is 301");
    OK(engine_check(p.w.engine));
    run_and_judge(&b, 0); /* the step is still there */
    OK(engine_step_commit(p.w.engine, b.batch.step_id, none,
                          2)); /* of no token, no layer is needed */
    pair_check(&p);
    pair_close(&p);
}

/* ---- run ---- */

static void
test_runs_that_are_refused(void **state)
{
    pair_t p;
    built_t b;

    (void)state;
    pair_open(&p);
    pair_begin(&p, &b);
    float *q = random_tensor(ATTN_F32, b.sizes.q / 4), *k = gather(&b, 0, true),
          *v     = gather(&b, 0, false);
    void *answer = answer_room(&b);
    engine_t *e  = p.w.engine;
    uint64_t id  = b.batch.step_id;

    FAILS(engine_step_run(e, id, 2, q, k, v, answer, NULL), ATTN_ERR_INVALID, "layer is 2");
    FAILS(engine_step_run(e, id, UINT32_MAX, q, k, v, answer, NULL), ATTN_ERR_INVALID, "layer");
    FAILS(engine_step_run(e, id, 0, q, NULL, NULL, answer, NULL), ATTN_ERR_INCOMPLETE, "layer 0");
    FAILS(engine_step_run(e, id, 0, NULL, NULL, NULL, NULL, NULL), ATTN_ERR_INCOMPLETE, "layer 0");
    engine_sizes_t others = b.sizes; /* tensors made for another step of this id */
    others.q++;
    FAILS(engine_step_run(e, id, 0, q, k, v, answer, &others), ATTN_ERR_CONFLICT, "another step");
    FAILS(engine_step_run(e, id, 0, q, k, NULL, answer, NULL), ATTN_ERR_INVALID, "v is missing");
    FAILS(engine_step_run(e, id, 0, q, NULL, v, answer, NULL), ATTN_ERR_INVALID, "k is missing");
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) { /* whatever is wrong, the layer can be run again */
        float was = k[1500];
        k[1500]   = bad[i];
        FAILS(engine_step_run(e, id, 0, q, k, v, answer, NULL), ATTN_ERR_NUMERIC, "worker 9");
        k[1500] = was;
        was     = v[0];
        v[0]    = bad[i];
        FAILS(engine_step_run(e, id, 0, q, k, v, answer, NULL), ATTN_ERR_NUMERIC, "worker 9");
        v[0] = was;
        FAILS(engine_step_commit(e, id, NULL, 0), ATTN_ERR_INCOMPLETE, "layer 0");
    }
    float was = q[33];
    q[33]     = NAN;
    FAILS(engine_step_run(e, id, 0, q, k, v, answer, NULL), ATTN_ERR_NUMERIC, "worker 9");
    assert_non_null(strstr(attn_last_error(), "layer 0"));
    q[33] = was;
    run_and_judge(&b, 0);
    k[0] += 1;
    FAILS(engine_step_run(e, id, 0, q, k, v, answer, NULL), ATTN_ERR_CONFLICT, "layer 0");
    run_and_judge(&b, 0); /* and what was stored first is still stored */
    run_and_judge(&b, 1);
    commit(&b, NULL);
    check_content(&p.w, &p.a);
    check_content(&p.w, &p.b);
    free(q), free(k), free(v), free(answer);
    pair_close(&p);
}

static void
test_logits_out_of_range_are_an_error(void **state)
{
    world_t w;
    sequence_t s;
    built_t b;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    ask_t ask = {.seq = &s, .n_q = 3, .n_new = 3};
    build(&b, &w, &ask, 1, ALL_CHUNKS);
    begin(&b); /* k and v all zero but one */
    ((float *)(void *)s.k[0])[0] = 3e38f;
    float *q                     = random_tensor(ATTN_F32, b.sizes.q / 4);
    void *answer                 = answer_room(&b);
    q[0]                         = 3e38f;
    FAILS(run_layer(&b, 0, q, answer), ATTN_ERR_NUMERIC, "worker 9");
    q[0] = 0;
    for (uint64_t i = 0; i < b.sizes.q / 4; i += 32) {
        q[i] = 0; /* not one row looks at the large one */
    }
    OK(engine_step_run(w.engine, b.batch.step_id, 0, q, NULL, NULL, answer, NULL));
    free(q);
    free(answer);
    sequence_free(&s);
    world_close(&w);
}

/* ---- who may step on what ---- */

static void
test_stale_and_busy_chunks_are_refused(void **state)
{
    pair_t p;
    built_t b, c;

    (void)state;
    pair_open(&p);
    build(&b, &p.w, p.asks, 1, ALL_CHUNKS);
    b.chunks[0][1].generation = 2;
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_STALE,
          "generation 1, length 44");
    build(&b, &p.w, p.asks, 1, ALL_CHUNKS);
    b.chunks[0][1].chunk = 424242;
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_NOT_FOUND, "424242");
    p.a.length    = 299;
    ask_t shorter = {.seq = &p.a, .base = 299, .n_q = 1, .n_new = 1};
    build(&b, &p.w, &shorter, 1, ALL_CHUNKS);
    FAILS(engine_step_begin(p.w.engine, &b.batch, &b.sizes), ATTN_ERR_STALE, "length 44");
    p.a.length = 300;

    pair_begin(&p, &b);
    build(&c, &p.w, p.asks, 1, ALL_CHUNKS);
    FAILS(engine_step_begin(p.w.engine, &c.batch, &c.sizes), ATTN_ERR_BUSY, "open step");
    c.entries[0].seq = 31337; /* another sequence that lists the same chunk */
    FAILS(engine_step_begin(p.w.engine, &c.batch, &c.sizes), ATTN_ERR_BUSY, "open step");
    FAILS(engine_chunk_truncate(p.w.engine, p.w.cache, p.a.chunk[1], 1, 0, NULL), ATTN_ERR_BUSY,
          "");
    OK(engine_step_abort(p.w.engine, b.batch.step_id, "enough"));
    pair_check(&p);
    pair_close(&p);
}

static void
test_steps_that_only_read_share_chunks(void **state)
{
    pair_t p;
    built_t b, c;

    (void)state;
    pair_open(&p);
    ask_t read_a = {.seq = &p.a, .base = 280, .n_q = 2},
          read_b = {.seq = &p.b, .base = 290, .n_q = 3};
    build(&b, &p.w, &read_a, 1, ALL_CHUNKS);
    build(&c, &p.w, &read_b, 1, ALL_CHUNKS);
    begin(&b);
    begin(&c);
    run_and_judge(&b, 0);
    run_and_judge(&c, 0); /* chunk 0 is both's */
    OK(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0));
    run_and_judge(&c, 1);
    OK(engine_step_commit(p.w.engine, c.batch.step_id, NULL, 0));
    pair_check(&p);
    pair_close(&p);
}

/* A device whose memory is the host's has none to lend tensors in; the step goes on as ever. */
static void
test_no_tensors_are_lent_on_the_host(void **state)
{
    pair_t p;
    built_t b;
    engine_sizes_t none = {0};

    (void)state;
    pair_open(&p);
    ask_t read = {.seq = &p.a, .base = 280, .n_q = 2};
    build(&b, &p.w, &read, 1, ALL_CHUNKS);
    begin(&b);
    FAILS(engine_step_lend(p.w.engine, b.batch.step_id), ATTN_ERR_UNSUPPORTED, "cpu");
    FAILS(engine_step_run_lent(p.w.engine, b.batch.step_id, 0, NULL, NULL, NULL, NULL, &none),
          ATTN_ERR_CONFLICT, "another step");
    FAILS(engine_step_run_lent(p.w.engine, b.batch.step_id, 0, &p, NULL, NULL, &p, &b.sizes),
          ATTN_ERR_UNSUPPORTED, "cpu");
    FAILS(engine_step_lend(p.w.engine, b.batch.step_id + 1), ATTN_ERR_NOT_FOUND, "");
    run_and_judge(&b, 0);
    run_and_judge(&b, 1);
    OK(engine_step_commit(p.w.engine, b.batch.step_id, NULL, 0));
    pair_check(&p);
    pair_close(&p);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_abort_after_each_number_of_runs),
        cmocka_unit_test(test_runs_are_timed),
        cmocka_unit_test(test_abort_after_failed_runs),
        cmocka_unit_test(test_no_tensors_are_lent_on_the_host),
        cmocka_unit_test(test_the_deadline_aborts),
        cmocka_unit_test(test_a_begin_that_fails_leaves_nothing),
        cmocka_unit_test(test_begin_and_run_may_be_repeated),
        cmocka_unit_test(test_commit_may_be_repeated),
        cmocka_unit_test(test_abort_may_be_repeated_and_says_why),
        cmocka_unit_test(test_ended_steps_are_forgotten_in_the_end),
        cmocka_unit_test(test_commit_of_each_number_of_tokens),
        cmocka_unit_test(test_commit_of_what_is_not_there_is_refused),
        cmocka_unit_test(test_runs_that_are_refused),
        cmocka_unit_test(test_logits_out_of_range_are_an_error),
        cmocka_unit_test(test_stale_and_busy_chunks_are_refused),
        cmocka_unit_test(test_steps_that_only_read_share_chunks),
    };
    return cmocka_run_group_tests_name("engine_step", tests, NULL, NULL);
}
