/*
 * engine_threads_test.c: an engine used by several threads: steps side by side, and races on
 * one step, on one id and on a cache. Threads only note what they saw; main judges. Made for
 * ThreadSanitizer as much as for its own asserts.
 */
#include "engine/test_engine.h"

#include <pthread.h>
#include <sched.h>

#define THREADS 4u

/* ---- steps side by side ---- */

typedef struct walker {
    pthread_t thread;
    world_t *w;
    uint64_t chunks[3], base_chunk, seq; /* forks of one chunk of 200 tokens */
    const float *q, *k, *v;              /* of 20 new tokens */
    uint64_t first_step;
    uint32_t rounds;
    const uint8_t *want; /* the answer that one thread alone gets */
    uint64_t wrong;      /* calls that did not do as they should */
} walker_t;

static uint64_t
walk_once(walker_t *x, uint64_t id, bool keep)
{
    kv_step_chunk_t chunk = {.chunk = x->chunks[0], .generation = 1, .length = 200, .n_new = 20};
    engine_entry_t entry  = {
         .seq = x->seq, .base = 200, .n_q = 20, .n_new = 20, .n_chunks = 1, .chunks = &chunk};
    engine_batch_t batch = {.cache       = x->w->cache,
                            .step_id     = id,
                            .n           = 1,
                            .entries     = &entry,
                            .q_dtype     = ATTN_F32,
                            .o_dtype     = ATTN_F32,
                            .want_lse    = true,
                            .deadline_ns = UINT64_MAX};
    engine_t *e          = x->w->engine;
    engine_sizes_t sizes;
    uint64_t wrong = 0;

    if (engine_chunk_fork(e, x->w->cache, x->base_chunk, 200, x->chunks[0]) != ATTN_OK ||
        engine_step_begin(e, &batch, &sizes) != ATTN_OK) {
        return 1;
    }
    uint8_t *answer = aligned_alloc(64, attn_div_up(sizes.answer, 64) * 64);
    for (uint32_t l = 0; l < 2; l++) {
        wrong += engine_step_run(e, id, l, x->q, x->k, x->v, answer, NULL) != ATTN_OK;
        wrong += l == 0 && x->want != NULL && memcmp(answer, x->want, sizes.answer) != 0;
    }
    wrong += keep ? engine_step_commit(e, id, NULL, 0) != ATTN_OK
                  : engine_step_abort(e, id, "no") != ATTN_OK;
    wrong += engine_chunks_release(e, x->w->cache, x->chunks, 1) != ATTN_OK;
    free(answer);
    return wrong;
}

static void *
walk(void *arg)
{
    walker_t *x = arg;

    for (uint32_t i = 0; i < x->rounds; i++) {
        x->wrong += walk_once(x, x->first_step + i, i % 2 == 0);
    }
    return NULL;
}

/* What the coordinator and the daemon's timers do meanwhile. */
static void *
disturb(void *arg)
{
    walker_t *x = arg;
    kv_region_info_t region;
    engine_info_t info;
    kv_chunk_info_t chunk;
    attn_geometry_t g = x->w->g;

    g.region_bytes = 1u << 20;
    for (uint32_t i = 0; i < x->rounds; i++) {
        engine_describe(x->w->engine, &info);
        engine_tick(x->w->engine, 1);
        engine_set_epoch(x->w->engine, i);
        x->wrong += engine_chunks_describe(x->w->engine, x->w->cache, &x->base_chunk, 1, &chunk,
                                           NULL, 0, NULL) != ATTN_OK;
        x->wrong += chunk.length != 200;
        x->wrong += engine_cache_open(x->w->engine, 5, &g, &region) != ATTN_OK;
        x->wrong += engine_check(x->w->engine) != ATTN_OK;
        x->wrong += engine_cache_close(x->w->engine, 5) != ATTN_OK;
    }
    return NULL;
}

/* The answer to x's queries in layer 0, and the first step ids are used up to first_step. */
static uint8_t *
answer_alone(walker_t *x)
{
    ask_t ask    = {.seq = NULL};
    sequence_t f = {.id = x->seq, .length = 200, .chunk = {x->chunks[0]}, .generation = {1}};
    built_t b;

    OK(engine_chunk_fork(x->w->engine, x->w->cache, x->base_chunk, 200, x->chunks[0]));
    ask = (ask_t){.seq = &f, .base = 200, .n_q = 20, .n_new = 20};
    build(&b, x->w, &ask, 1, ALL_CHUNKS);
    begin(&b);
    uint8_t *answer = answer_room(&b);
    OK(engine_step_run(x->w->engine, b.batch.step_id, 0, x->q, x->k, x->v, answer, NULL));
    OK(engine_step_abort(x->w->engine, b.batch.step_id, "no"));
    OK(engine_chunks_release(x->w->engine, x->w->cache, x->chunks, 1));
    return answer;
}

static void
test_steps_side_by_side(void **state)
{
    world_t w;
    sequence_t s;
    walker_t x[THREADS + 1];

    (void)state;
    world_open(&w, &plain_geometry, 2);
    sequence_init(&w, &s);
    append(&w, &s, 200);
    for (uint32_t i = 0; i <= THREADS; i++) {
        x[i]      = (walker_t){.w          = &w,
                               .chunks     = {90000 + i},
                               .base_chunk = s.chunk[0],
                               .seq        = 80000 + i,
                               .q          = random_tensor(ATTN_F32, 20 * 4 * 32),
                               .k          = random_tensor(ATTN_F32, 20 * 2 * 32),
                               .v          = random_tensor(ATTN_F32, 20 * 2 * 32),
                               .first_step = 1000000 * (i + 1),
                               .rounds     = 60};
        x[i].want = answer_alone(&x[i]);
    }
    for (uint32_t i = 0; i <= THREADS; i++) {
        pthread_create(&x[i].thread, NULL, i < THREADS ? walk : disturb, &x[i]);
    }
    for (uint32_t i = 0; i <= THREADS; i++) {
        pthread_join(x[i].thread, NULL);
        assert_int_equal(x[i].wrong, 0);
        free((void *)x[i].q), free((void *)x[i].k), free((void *)x[i].v), free((void *)x[i].want);
    }
    figures_t after = figures_of(&w, &s, NULL);
    assert_true(after.info.chunks == 1 && after.info.open_steps == 0 && after.info.caches == 1);
    check_content(&w, &s);
    sequence_free(&s);
    world_close(&w);
}

/* ---- races on one step ---- */

typedef enum act { ACT_RUN, ACT_COMMIT, ACT_ABORT, ACT_TICK, ACT_CLOSE, ACT_BEGIN } act_t;

typedef struct racer {
    pthread_t thread;
    act_t act;
    engine_t *engine;
    const built_t *b;
    const void *k, *v;
    pthread_barrier_t *start;
    attn_status_t status; /* of the call, or of the first run that failed */
} racer_t;

static void *
race(void *arg)
{
    racer_t *r  = arg;
    uint64_t id = r->b->batch.step_id;
    engine_sizes_t sizes;

    pthread_barrier_wait(r->start);
    switch (r->act) {
    case ACT_RUN:
        for (uint32_t i = 0; i < 8 && r->status == ATTN_OK; i++) {
            r->status = engine_step_run(r->engine, id, i % 2, NULL, r->k, r->v, NULL, NULL);
        }
        break;
    case ACT_COMMIT:
        r->status = engine_step_commit(r->engine, id, NULL, 0);
        break;
    case ACT_ABORT:
        r->status = engine_step_abort(r->engine, id, "raced");
        break;
    case ACT_TICK:
        engine_tick(r->engine, UINT64_MAX);
        break;
    case ACT_CLOSE:
        r->status = engine_cache_close(r->engine, r->b->batch.cache);
        break;
    case ACT_BEGIN:
        r->status = engine_step_begin(r->engine, &r->b->batch, &sizes);
        break;
    }
    return NULL;
}

static void
race_all(const built_t *b, racer_t *racers, const act_t *acts, uint32_t n)
{
    pthread_barrier_t start;
    void *k = gather(b, 0, true), *v = gather(b, 0, false);

    pthread_barrier_init(&start, NULL, n);
    for (uint32_t i = 0; i < n; i++) {
        racers[i] = (racer_t){
            .act = acts[i], .engine = b->w->engine, .b = b, .k = k, .v = v, .start = &start};
        pthread_create(&racers[i].thread, NULL, race, &racers[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(racers[i].thread, NULL);
    }
    pthread_barrier_destroy(&start);
    free(k);
    free(v);
    OK(engine_check(b->w->engine));
}

/* May a call end so, when others run, commit and abort the step? */
static bool
may_be(act_t act, attn_status_t status)
{
    bool gone = status == ATTN_ERR_ABORTED || status == ATTN_ERR_NOT_FOUND;

    return status == ATTN_OK || (act == ACT_RUN && gone) ||
           (act == ACT_COMMIT && (status == ATTN_ERR_ABORTED || status == ATTN_ERR_INCOMPLETE));
}

/* New tokens whose k and v are the same in both layers: racers run them with layer 0's. */
static void
dream_alike(world_t *w, const ask_t *ask)
{
    const attn_geometry_t *g = &w->g;

    dream(w, ask, 1);
    memcpy(ask->seq->k[1] + ask->base * k_row(g), ask->seq->k[0] + ask->base * k_row(g),
           ask->n_new * k_row(g));
    memcpy(ask->seq->v[1] + ask->base * v_row(g), ask->seq->v[0] + ask->base * v_row(g),
           ask->n_new * v_row(g));
}

static void
race_on_a_step(world_t *w, sequence_t *s, const act_t *acts, uint32_t n)
{
    racer_t racers[THREADS];
    built_t b;
    ask_t ask = {.seq = s, .base = s->length, .n_q = 1, .n_new = 30};
    bool done = false, in_step;
    kv_chunk_info_t infos[CHUNKS_MAX];

    build(&b, w, &ask, 1, ALL_CHUNKS);
    dream_alike(w, &ask);
    begin(&b);
    race_all(&b, racers, acts, n);
    for (uint32_t i = 0; i < n; i++) {
        assert_true(may_be(acts[i], racers[i].status));
        done = done || (acts[i] == ACT_COMMIT && racers[i].status == ATTN_OK);
    }
    OK(engine_step_abort(w->engine, b.batch.step_id, "the race is over"));
    if (done) {
        committed(&b, NULL);
    }
    OK(engine_chunks_describe(w->engine, w->cache, s->chunk, CHUNKS_MAX, infos, &s->id, 1,
                              &in_step));
    assert_false(in_step);
    for (uint32_t c = 0; c < CHUNKS_MAX; c++) {
        assert_int_equal(infos[c].length, chunk_length(w, s, c));
    }
    check_content(w, s);
}

static void
test_races_on_one_step(void **state)
{
    static const act_t acts[][3] = {{ACT_RUN, ACT_COMMIT, ACT_RUN},
                                    {ACT_RUN, ACT_ABORT, ACT_RUN},
                                    {ACT_RUN, ACT_COMMIT, ACT_ABORT},
                                    {ACT_RUN, ACT_TICK, ACT_COMMIT},
                                    {ACT_COMMIT, ACT_TICK, ACT_ABORT}};
    world_t w;
    sequence_t s;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 10);
    for (uint32_t round = 0; round < 100; round++) {
        race_on_a_step(&w, &s, acts[round % 5], 3);
        if (s.length > 1900) {
            OK(engine_chunks_release(w.engine, w.cache, s.chunk, CHUNKS_MAX));
            sequence_free(&s);
            sequence_init(&w, &s);
        }
    }
    sequence_free(&s);
    world_close(&w);
}

/* Commits that wait while the step runs find it committed by the first of them. */
static void
test_a_commit_sent_twice_at_once(void **state)
{
    static const act_t acts[] = {ACT_COMMIT, ACT_COMMIT, ACT_RUN, ACT_RUN};
    world_t w;
    sequence_t s;
    built_t b;
    racer_t racers[4];

    (void)state;
    world_open(&w, &plain_geometry, 1);
    for (uint32_t round = 0; round < 60; round++) {
        sequence_init(&w, &s);
        ask_t ask = {.seq = &s, .n_new = 1000};
        build(&b, &w, &ask, 1, ALL_CHUNKS);
        dream_alike(&w, &ask);
        begin(&b);
        OK(run_layer(&b, 0, NULL, NULL));
        OK(run_layer(&b, 1, NULL, NULL));
        race_all(&b, racers, acts, 4);
        assert_int_equal(racers[0].status, ATTN_OK);
        assert_int_equal(racers[1].status, ATTN_OK);
        OK(engine_chunks_release(w.engine, w.cache, s.chunk, CHUNKS_MAX));
        sequence_free(&s);
    }
    world_close(&w);
}

static void
test_a_begin_sent_twice_at_once(void **state)
{
    static const act_t acts[][3] = {{ACT_BEGIN, ACT_BEGIN, ACT_BEGIN},
                                    {ACT_RUN, ACT_BEGIN, ACT_RUN}};
    world_t w;
    sequence_t s;
    built_t b;
    racer_t racers[3];

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    append(&w, &s, 10);
    for (uint32_t round = 0; round < 200; round++) {
        ask_t ask = {.seq = &s, .base = 10, .n_q = 1, .n_new = 300};
        build(&b, &w, &ask, 1, ALL_CHUNKS);
        race_all(&b, racers, acts[round % 2], 3);
        for (uint32_t i = 0; i < 3; i++) { /* a run may come first */
            assert_true(racers[i].status == ATTN_OK ||
                        (racers[i].act == ACT_RUN && racers[i].status == ATTN_ERR_NOT_FOUND));
        }
        OK(engine_step_abort(w.engine, b.batch.step_id, "enough"));
    }
    check_content(&w, &s);
    sequence_free(&s);
    world_close(&w);
}

static void
test_a_cache_closed_under_a_running_step(void **state)
{
    static const act_t acts[] = {ACT_RUN, ACT_CLOSE, ACT_COMMIT, ACT_BEGIN};

    world_t w;
    sequence_t s;
    built_t b;
    racer_t racers[4];
    kv_region_info_t region;

    (void)state;
    world_open(&w, &plain_geometry, 1);
    sequence_init(&w, &s);
    for (uint32_t round = 0; round < 100; round++) {
        ask_t ask = {.seq = &s, .n_q = 1, .n_new = 300};
        build(&b, &w, &ask, 1, ALL_CHUNKS);
        begin(&b);
        race_all(&b, racers, acts, 4);
        assert_int_equal(racers[1].status, ATTN_OK);
        FAILS(engine_cache_close(w.engine, w.cache), ATTN_ERR_NOT_FOUND, "no cache");
        OK(engine_cache_open(w.engine, w.cache, &w.g, &region));
        assert_int_equal(region.free_pages, region.n_pages);
    }
    sequence_free(&s);
    world_close(&w);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steps_side_by_side),
        cmocka_unit_test(test_races_on_one_step),
        cmocka_unit_test(test_a_begin_sent_twice_at_once),
        cmocka_unit_test(test_a_commit_sent_twice_at_once),
        cmocka_unit_test(test_a_cache_closed_under_a_running_step),
    };
    return cmocka_run_group_tests_name("engine_threads", tests, NULL, NULL);
}
