/*
 * Much at once: prompts whose k, v are larger than any message or queue, ingested without a query,
 * read back, and ingested again elsewhere. What counts is that every bit arrives.
 */
#include "tests/integration/cluster.h"

#include <setjmp.h>
#include <stdarg.h>
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
    for (uint32_t l = 0; l < LAYERS; l++) {
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

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_layer_larger_than_any_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
