/*
 * engine_export_test.c: committed k, v read back while others go on: nobody waits for a reader, and
 * a reader sees what it asked for or is told that it is gone.
 */
#include "engine/test_engine.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define N 200u /* tokens of a chunk: 12 pages of 16, and a half */
#define SEQ 7u
#define CHUNK_ROOM 256u
#define ROUNDS 300u

/* ---- chunks of one number ---- */

/* Rows that hold this number, and nothing else. */
static float *
rows_of(const world_t *w, float number)
{
    uint64_t n  = CHUNK_ROOM * k_row(&w->g) / sizeof(float);
    float *rows = malloc(n * sizeof(*rows));

    for (uint64_t i = 0; i < n; i++) {
        rows[i] = number;
    }
    return rows;
}

static attn_status_t
store(world_t *w, uint64_t chunk, uint32_t generation, uint32_t length, uint32_t n_new,
      float number)
{
    float *rows          = rows_of(w, number);
    attn_status_t status = grow_by(w, chunk, generation, length, n_new, rows);

    free(rows);
    return status;
}

/* Tokens [first, N) of a chunk of one number. @return ATTN_ERR_INTERNAL for any other number */
static attn_status_t
read_back(world_t *w, uint64_t chunk, uint32_t generation, uint32_t first, float number)
{
    engine_export_t what = {.cache      = w->cache,
                            .chunk      = chunk,
                            .generation = generation,
                            .layer      = first % w->g.layers,
                            .first      = first,
                            .n          = N - first};
    uint64_t k_bytes = what.n * k_row(&w->g), v_bytes = what.n * v_row(&w->g);
    float *k = malloc(k_bytes), *v = malloc(v_bytes);
    attn_status_t status = engine_chunk_export(w->engine, &what, k, v, k_bytes, v_bytes);

    for (uint64_t i = 0; status == ATTN_OK && i < k_bytes / sizeof(float); i++) {
        status = k[i] == number && v[i] == number ? ATTN_OK : ATTN_ERR_INTERNAL;
    }
    free(k);
    free(v);
    return status;
}

static void
open_small(world_t *w)
{
    attn_geometry_t g = plain_geometry;

    g.head_dim_v   = g.head_dim_k; /* rows of k and v alike */
    g.page_size    = 16;
    g.region_bytes = 8 * CHUNK_ROOM * (k_row(&g) + v_row(&g)) * g.layers;
    world_open(w, &g, 1);
}

/* ---- nobody waits ---- */

static engine_t *watched;
static attn_status_t (*read_plainly)(attn_backend_t *backend, const attn_kv_t *kv,
                                     const uint32_t *pages, const uint32_t *offsets, uint64_t n,
                                     void *k, void *v);
static uint64_t rows_free, rows_locked; /* read without the engine's lock, and under it */

static attn_status_t
read_watched(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
             const uint32_t *offsets, uint64_t n, void *k, void *v)
{
    bool is_free = pthread_mutex_trylock(&watched->lock) == 0;

    if (is_free) {
        pthread_mutex_unlock(&watched->lock);
    }
    *(is_free ? &rows_free : &rows_locked) += n;
    return read_plainly(backend, kv, pages, offsets, n, k, v);
}

static void
test_nobody_waits_for_a_reader(void **state)
{
    world_t w;

    (void)state;
    open_small(&w);
    const attn_backend_ops_t *before = w.engine->backend->ops;
    attn_backend_ops_t ops           = *before;
    watched                          = w.engine;
    read_plainly                     = before->read;
    ops.read                         = read_watched;
    w.engine->backend->ops           = &ops;
    OK(store(&w, 1, 0, 0, N, 4));
    OK(read_back(&w, 1, 1, 0, 4));
    assert_int_equal(rows_free, N - N % 16);
    assert_int_equal(rows_locked, N % 16); /* of the page that grows */
    OK(read_back(&w, 1, 1, N - 3, 4));
    assert_int_equal(rows_locked, N % 16 + 3);
    w.engine->backend->ops = before;
    world_close(&w);
}

/* ---- what others do meanwhile ---- */

typedef struct reader {
    pthread_t thread;
    world_t *w;
    atomic_uint_fast64_t chunk; /* holds its own id as a number, in generation 1 */
    atomic_bool stop;
    atomic_uint_fast64_t read;
    uint64_t gone, wrong;
} reader_t;

static void *
read_on(void *arg)
{
    reader_t *x    = arg;
    uint32_t first = 0;

    while (!atomic_load(&x->stop)) {
        uint64_t chunk       = atomic_load(&x->chunk);
        attn_status_t status = read_back(x->w, chunk, 1, first, (float)chunk);
        bool gone            = status == ATTN_ERR_NOT_FOUND || status == ATTN_ERR_STALE;
        x->read += status == ATTN_OK;
        x->gone += gone;
        x->wrong += status != ATTN_OK && !gone;
        first = (first + 37) % N;
    }
    return NULL;
}

/* On a busy machine all else may be over before a thread has begun. */
static void
wait_for_a_read(reader_t *x)
{
    for (int ms = 0; ms < 10000 && atomic_load(&x->read) == 0; ms++) {
        usleep(1000);
    }
}

/* A chunk's life while it is read: it grows, is forked, cut and released, and its pages are used
 * again at once, for the region has few. */
static void
live(world_t *w, uint64_t chunk, bool fork_first)
{
    uint64_t fork = chunk + 100000;
    uint32_t generation;

    OK(store(w, chunk, 1, N, 20, (float)chunk));
    if (fork_first) { /* the tail is shared, and copied by the next to write */
        OK(engine_chunk_fork(w->engine, w->cache, chunk, N, fork));
        OK(store(w, chunk, 1, N + 20, 10, 1));
    }
    OK(engine_chunk_truncate(w->engine, w->cache, chunk, 1, 40, &generation));
    OK(store(w, chunk, 2, 40, 160, 2)); /* over what was cut off */
    OK(engine_chunks_release(w->engine, w->cache, &chunk, 1));
    if (fork_first) {
        OK(engine_chunks_release(w->engine, w->cache, &fork, 1));
    }
}

static void
test_reads_amid_all_else(void **state)
{
    world_t w;
    reader_t x[2];

    (void)state;
    open_small(&w);
    w.next_id = 1000000;
    OK(store(&w, 10, 0, 0, N, 10));
    for (uint32_t i = 0; i < 2; i++) {
        x[i] = (reader_t){.w = &w, .chunk = 10};
        assert_int_equal(pthread_create(&x[i].thread, NULL, read_on, &x[i]), 0);
    }
    wait_for_a_read(&x[0]);
    wait_for_a_read(&x[1]);
    for (uint64_t chunk = 10; chunk < 10 + ROUNDS; chunk++) {
        live(&w, chunk, chunk % 2 == 0);
        OK(store(&w, chunk + 1, 0, 0, N, (float)(chunk + 1)));
        atomic_store(&x[0].chunk, chunk + 1);
        atomic_store(&x[1].chunk, chunk + 1);
        OK(engine_check(w.engine));
    }
    for (uint32_t i = 0; i < 2; i++) {
        atomic_store(&x[i].stop, true);
        pthread_join(x[i].thread, NULL);
        assert_int_equal(x[i].wrong, 0);
        assert_true(x[i].read > 0);
    }
    world_close(&w);
}

static void
test_a_cache_is_closed_under_its_readers(void **state)
{
    world_t w;
    reader_t x;
    kv_region_info_t region;

    (void)state;
    open_small(&w);
    x = (reader_t){.w = &w, .chunk = 5};
    OK(store(&w, 5, 0, 0, N, 5));
    assert_int_equal(pthread_create(&x.thread, NULL, read_on, &x), 0);
    wait_for_a_read(&x);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        OK(engine_cache_close(w.engine, w.cache));
        OK(engine_cache_open(w.engine, w.cache, &w.g, &region));
        assert_int_equal(region.free_pages, region.n_pages);
        OK(store(&w, 6, 0, 0, N, 6)); /* where 5 was */
        OK(engine_cache_close(w.engine, w.cache));
        OK(engine_cache_open(w.engine, w.cache, &w.g, &region));
        OK(store(&w, 5, 0, 0, N, 5));
    }
    atomic_store(&x.stop, true);
    pthread_join(x.thread, NULL);
    assert_int_equal(x.wrong, 0);
    assert_true(x.read + x.gone > 0);
    world_close(&w);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_waits_for_a_reader),
        cmocka_unit_test(test_reads_amid_all_else),
        cmocka_unit_test(test_a_cache_is_closed_under_its_readers),
    };
    return cmocka_run_group_tests_name("engine_export", tests, NULL, NULL);
}
