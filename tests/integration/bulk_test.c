/*
 * Much at once: prompts whose k, v are larger than any message or queue, ingested without a query,
 * read back, and ingested again elsewhere. What counts is that every bit arrives.
 */
#include "tests/integration/cluster.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS 2u
#define Q_HEADS 8u
#define HEADS 8u
#define DIM 64u
#define ROW (HEADS * DIM)
#define CHUNK 2048u

static void
geometry_of(attn_geometry_t *g, uint32_t page_size, attn_placement_t placement)
{
    attn_geometry_init(g);
    g->layers       = LAYERS;
    g->q_heads      = Q_HEADS;
    g->kv_heads     = HEADS;
    g->head_dim_k   = DIM;
    g->head_dim_v   = DIM;
    g->kv_dtype     = ATTN_F16;
    g->page_size    = page_size;
    g->chunk_size   = CHUNK;
    g->placement    = placement;
    g->region_bytes = UINT64_C(240) << 20;
}

/* Any bits but those of infinities and NaNs, the same for the same seed. */
static uint16_t *
rows_of(uint64_t seed, uint64_t n)
{
    uint16_t *x = malloc(n * ROW * sizeof(*x));

    assert_non_null(x);
    for (uint64_t i = 0; i < n * ROW; i++) {
        seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        x[i] = (uint16_t)((seed >> 40 & 0x83ff) | 0x3000); /* 0.125 to 0.25, either sign */
    }
    return x;
}

/* Append n tokens to an empty sequence without asking anything. */
static void
ingest(attn_cache_t *cache, attn_seq_t seq, uint16_t *const *k, uint16_t *const *v, uint32_t n)
{
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 0, .n_new = n};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F16};
    attn_step_t *step;

    OK(attn_step_begin(cache, &batch, &step));
    for (uint32_t l = 0; l < attn_cache_geometry(cache)->layers; l++) {
        attn_tensor_t tk = {.data = k[l], .dtype = ATTN_F16};
        attn_tensor_t tv = {.data = v[l], .dtype = ATTN_F16};
        OK(attn_step_run(step, l, NULL, &tk, &tv, NULL, NULL));
    }
    OK(attn_step_commit(step, NULL));
}

/* What the last three tokens see: o and lse of every layer. */
static void
ask(attn_cache_t *cache, attn_seq_t seq, uint64_t length, float *answer)
{
    enum { N = 3 };
    attn_entry_t entry = {.seq = seq, .base = length, .n_q = N, .n_new = 0};
    attn_batch_t batch = {.size     = sizeof(batch),
                          .n        = 1,
                          .entries  = &entry,
                          .q_dtype  = ATTN_F16,
                          .o_dtype  = ATTN_F32,
                          .want_lse = true};
    uint16_t *q        = rows_of(99, N);
    attn_step_t *step;

    OK(attn_step_begin(cache, &batch, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        attn_tensor_t tq = {.data = q, .dtype = ATTN_F16};
        attn_tensor_t to = {.data = answer, .dtype = ATTN_F32};
        OK(attn_step_run(step, l, &tq, NULL, NULL, &to, answer + N * ROW));
        answer += N * (ROW + Q_HEADS);
    }
    OK(attn_step_commit(step, NULL));
    free(q);
}

#define ANSWER_FLOATS (LAYERS * 3 * (ROW + Q_HEADS))

typedef struct prompt {
    uint32_t n;
    uint16_t *k[LAYERS], *v[LAYERS];
} prompt_t;

static void
prompt_make(prompt_t *prompt, uint32_t n)
{
    prompt->n = n;
    for (uint32_t l = 0; l < LAYERS; l++) {
        prompt->k[l] = rows_of(l + 1, n);
        prompt->v[l] = rows_of(l + 11, n);
    }
}

static void
prompt_free(prompt_t *prompt)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        free(prompt->k[l]);
        free(prompt->v[l]);
    }
}

/* 96 MiB of k, v a layer to one worker: what is sent waits for the socket, a few parts at once. */
static void
test_a_layer_larger_than_any_queue(void **state)
{
    test_cluster_t cluster;
    prompt_t prompt;
    attn_geometry_t g;
    attn_cache_t *cache[2];
    attn_seq_t seq[2];
    float answer[2][ANSWER_FLOATS];
    attn_client_t *client[2];

    (void)state;
    prompt_make(&prompt, 49151); /* an odd one: 24 chunks but a token */
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .slab = "256MiB", .lost_ms = "10000"});
    client[0] = open_client(cluster.coordinator.address, 10000);
    client[1] = open_client("inproc://cpu?slab=256MiB", 10000);
    for (int i = 0; i < 2; i++) {
        geometry_of(&g, 16, ATTN_PLACE_SPREAD);
        OK(attn_cache_open(client[i], "bulk", &g, &cache[i]));
        OK(attn_seq_create(cache[i], NULL, &seq[i]));
        ingest(cache[i], seq[i], prompt.k, prompt.v, prompt.n);
        ask(cache[i], seq[i], prompt.n, answer[i]);
        attn_cache_close(cache[i]);
        attn_client_close(client[i]);
    }
    assert_memory_equal(answer[0], answer[1], sizeof(answer[0]));
    cluster_down(&cluster);
    prompt_free(&prompt);
}

/* Read all back, and compare with what was put in. */
static void
expect_export(attn_cache_t *cache, attn_seq_t seq, const prompt_t *prompt, uint64_t first,
              uint64_t n, uint32_t layer)
{
    attn_export_t what = {.size = sizeof(what), .first = first, .n = n, .first_layer = layer};
    uint64_t layers = LAYERS - layer, bytes = n * ROW * sizeof(uint16_t);
    uint8_t *k = malloc(layers * bytes + 1), *v = malloc(layers * bytes + 1);

    assert_true(k != NULL && v != NULL);
    OK(attn_seq_export(cache, seq, &what, k, v));
    for (uint32_t l = 0; l < layers; l++) {
        assert_memory_equal(k + l * bytes, prompt->k[layer + l] + first * ROW, bytes);
        assert_memory_equal(v + l * bytes, prompt->v[layer + l] + first * ROW, bytes);
    }
    free(k);
    free(v);
}

#define REFUSED(call, wanted, words)                                                               \
    do {                                                                                           \
        assert_int_equal(call, wanted);                                                            \
        if (strstr(attn_last_error(), words) == NULL) {                                            \
            fail_msg("no \"%s\" in: %s", words, attn_last_error());                                \
        }                                                                                          \
    } while (0)

static void
expect_export_refusals(attn_cache_t *cache, attn_seq_t seq, uint64_t length)
{
    attn_export_t what = {.size = sizeof(what), .n = 1};
    uint16_t k[LAYERS * ROW], v[LAYERS * ROW];
    attn_seq_t fork;

    what.first = length;
    REFUSED(attn_seq_export(cache, seq, &what, k, v), ATTN_ERR_INVALID, "committed tokens");
    what.first = UINT64_MAX;
    REFUSED(attn_seq_export(cache, seq, &what, k, v), ATTN_ERR_INVALID, "64 bits");
    what = (attn_export_t){.size = sizeof(what), .n = 1, .first_layer = LAYERS};
    REFUSED(attn_seq_export(cache, seq, &what, k, v), ATTN_ERR_INVALID, "the cache has 2");
    what = (attn_export_t){.size = sizeof(what), .n = 1, .first_layer = 1, .n_layers = 2};
    REFUSED(attn_seq_export(cache, seq, &what, k, v), ATTN_ERR_INVALID, "layers 1 to 3");
    what = (attn_export_t){.size = 4};
    REFUSED(attn_seq_export(cache, seq, &what, k, v), ATTN_ERR_INVALID, "what.size");
    what = (attn_export_t){.size = sizeof(what), .n = 1};
    OK(attn_seq_fork(cache, seq, 10, &fork));
    OK(attn_seq_export(cache, fork, &what, k, v));
    OK(attn_seq_free(cache, fork));
    REFUSED(attn_seq_export(cache, fork, &what, k, v), ATTN_ERR_NOT_FOUND, "freed");
}

/* From one cluster to another with other workers, pages and placement: the same bits answer. */
static void
test_a_sequence_moves_between_clusters(void **state)
{
    static const uint32_t workers[] = {3, 2}, pages[] = {24, 128};
    attn_export_t what = {.size = sizeof(what)};
    float answer[2][ANSWER_FLOATS];
    test_cluster_t cluster[2];
    prompt_t prompt, moved;
    attn_client_t *client[2];
    attn_cache_t *cache[2];
    attn_seq_t seq[2];

    (void)state;
    prompt_make(&prompt, 12345);
    prompt_make(&moved, 12345);
    for (int i = 0; i < 2; i++) {
        attn_geometry_t g;
        cluster_up(&cluster[i], &(cluster_options_t){
                                    .workers = workers[i], .slab = "128MiB", .lost_ms = "10000"});
        client[i] = open_client(cluster[i].coordinator.address, 10000);
        geometry_of(&g, pages[i], i == 0 ? ATTN_PLACE_SPREAD : ATTN_PLACE_WHOLE);
        g.region_bytes = 96u << 20;
        OK(attn_cache_open(client[i], "bulk", &g, &cache[i]));
        OK(attn_seq_create(cache[i], NULL, &seq[i]));
    }
    ingest(cache[0], seq[0], prompt.k, prompt.v, prompt.n);
    expect_export(cache[0], seq[0], &prompt, 0, prompt.n, 0);
    expect_export(cache[0], seq[0], &prompt, 2047, 2, 1);
    expect_export(cache[0], seq[0], &prompt, 777, 0, 0);
    expect_export_refusals(cache[0], seq[0], prompt.n);

    for (uint32_t l = 0; l < LAYERS; l++) {
        memset(moved.k[l], 0, (uint64_t)moved.n * ROW * 2);
        what = (attn_export_t){.size = sizeof(what), .n = moved.n, .first_layer = l, .n_layers = 1};
        OK(attn_seq_export(cache[0], seq[0], &what, moved.k[l], moved.v[l]));
    }
    ingest(cache[1], seq[1], moved.k, moved.v, moved.n);
    for (int i = 0; i < 2; i++) {
        ask(cache[i], seq[i], prompt.n, answer[i]);
        attn_cache_close(cache[i]);
        attn_client_close(client[i]);
        cluster_down(&cluster[i]);
    }
    assert_memory_equal(answer[0], answer[1], sizeof(answer[0]));
    prompt_free(&prompt);
    prompt_free(&moved);
}

/* ---- read while it is changed ---- */

#define TURNS 40
#define TURN_TOKENS 5000u

typedef struct reader {
    attn_cache_t *cache;
    attn_seq_t seq;
    atomic_bool over;
    uint32_t whole, refused;
} reader_t;

/* All of what comes is of one turn, or nothing comes. */
static void *
read_on(void *arg)
{
    reader_t *r        = arg;
    uint64_t n         = LAYERS * (uint64_t)TURN_TOKENS * ROW;
    attn_export_t what = {.size = sizeof(what), .n = TURN_TOKENS};
    uint16_t *k = malloc(n * sizeof(*k)), *v = malloc(n * sizeof(*v));

    while (!atomic_load(&r->over)) {
        attn_status_t status = attn_seq_export(r->cache, r->seq, &what, k, v);
        if (status != ATTN_OK) {
            assert_true(status == ATTN_ERR_STALE || status == ATTN_ERR_INVALID);
            r->refused++;
            continue;
        }
        for (uint64_t i = 0; i < n; i++) {
            assert_true(k[i] == k[0] && v[i] == k[0]);
        }
        r->whole++;
    }
    free(k);
    free(v);
    return NULL;
}

static void
test_an_export_is_of_one_moment(void **state)
{
    reader_t r = {0};
    pthread_t thread;
    attn_client_t *client = open_client("inproc://cpu?workers=3&slab=64MiB", 10000);
    attn_geometry_t g;
    prompt_t prompt = {.n = TURN_TOKENS};

    (void)state;
    geometry_of(&g, 24, ATTN_PLACE_SPREAD);
    g.region_bytes = 60u << 20;
    OK(attn_cache_open(client, "turns", &g, &r.cache));
    OK(attn_seq_create(r.cache, NULL, &r.seq));
    uint16_t *rows = malloc(TURN_TOKENS * ROW * sizeof(*rows));
    assert_non_null(rows);
    for (uint32_t l = 0; l < LAYERS; l++) {
        prompt.k[l] = prompt.v[l] = rows;
    }
    assert_int_equal(pthread_create(&thread, NULL, read_on, &r), 0);
    for (uint32_t turn = 0; turn < TURNS; turn++) {
        for (uint64_t i = 0; i < TURN_TOKENS * ROW; i++) {
            rows[i] = (uint16_t)(0x3000 + turn);
        }
        OK(attn_seq_truncate(r.cache, r.seq, 0));
        ingest(r.cache, r.seq, prompt.k, prompt.v, prompt.n);
    }
    sleep_ms(50); /* the last turn stands: one more comes whole */
    atomic_store(&r.over, true);
    pthread_join(thread, NULL);
    assert_true(r.whole > 0 && r.refused > 0);
    free(rows);
    attn_cache_close(r.cache);
    attn_client_close(client);
}

/* ---- layouts that no message holds ---- */

#define MANY 1024u       /* sequences */
#define MANY_CHUNKS 800u /* of each: 18 MiB of layouts, where a message has 16 */

static void
test_layouts_larger_than_a_message_come_in_halves(void **state)
{
    static attn_entry_t entries[MANY];
    attn_batch_t batch = {
        .size = sizeof(batch), .n = MANY, .entries = entries, .q_dtype = ATTN_F16};
    test_cluster_t cluster;
    attn_geometry_t g;
    attn_cache_t *cache;
    attn_seq_t seq;
    attn_step_t *step;
    prompt_t prompt = {.n = MANY_CHUNKS * 256};

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 2});
    attn_client_t *client = open_client(cluster.coordinator.address, 60000);
    geometry_of(&g, 128, ATTN_PLACE_SPREAD);
    g.layers = g.q_heads = g.kv_heads = 1;
    g.head_dim_k = g.head_dim_v = 32;
    g.chunk_size                = 256;
    g.region_bytes              = 28u << 20;
    OK(attn_cache_open(client, "many", &g, &cache));
    OK(attn_seq_create(cache, NULL, &seq));
    prompt.k[0] = prompt.v[0] = rows_of(3, prompt.n); /* more than it needs */
    ingest(cache, seq, prompt.k, prompt.v, prompt.n);
    for (uint32_t i = 0; i < MANY; i++) {
        entries[i] = (attn_entry_t){.base = prompt.n, .n_q = 1};
        OK(attn_seq_fork(cache, seq, prompt.n, &entries[i].seq));
    }
    OK(attn_step_begin(cache, &batch, &step));
    attn_step_abort(step);
    free(prompt.k[0]);
    attn_cache_close(cache);
    attn_client_close(client);
    cluster_down(&cluster);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_layer_larger_than_any_queue),
        cmocka_unit_test(test_a_sequence_moves_between_clusters),
        cmocka_unit_test(test_an_export_is_of_one_moment),
        cmocka_unit_test(test_layouts_larger_than_a_message_come_in_halves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
