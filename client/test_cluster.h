/*
 * test_cluster.h: what the tests of the control plane share: a cluster over engines inside the
 * process, and sequences whose tokens the test knows. Each token's V holds a number of the
 * test's, and the one layer has a window of one token: asking a position gives exactly the
 * number that is stored there.
 */
#ifndef ATTN_TEST_CLUSTER_H
#define ATTN_TEST_CLUSTER_H

#include "client/cluster_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WORKERS_MAX 4u
#define CHUNK 256u
#define TOKENS_MAX 2048u
#define DIM 32u
#define NOT_LOST (UINT64_C(3600) * 1000 * ATTN_NS_PER_MS)

#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != ATTN_OK) {                                                                   \
            fail_msg("%s: %s", #call, attn_last_error());                                          \
        }                                                                                          \
    } while (0)

typedef struct fixture {
    links_t *links;
    cluster_t *cluster;
    uint32_t n;
    engine_t *engines[WORKERS_MAX]; /* owned by links */
    dir_worker_t hello[WORKERS_MAX];
    attn_geometry_t geometry;
    uint64_t cache;
    uint32_t client;
    uint64_t next_step;
} fixture_t;

/* What the test knows of a sequence. */
typedef struct model {
    attn_seq_t seq;
    uint64_t length;
    float value[TOKENS_MAX];
} model_t;

static uint64_t random_state = 1;

static inline uint32_t
pick(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % n);
}

/* ---- the cluster ---- */

/* One more worker: an engine, which the directory is told of. */
static inline void
add_worker(fixture_t *f, const char *kind)
{
    char name[16];
    engine_options_t options = {
        .device = "cpu", .threads = 1, .slab_bytes = 16u << 20, .name = name};
    engine_info_t info;
    uint32_t i = f->n++;

    snprintf(name, sizeof(name), "worker %u", i + 1);
    OK(engine_create(&options, &f->engines[i]));
    engine_describe(f->engines[i], &info);
    f->hello[i] = (dir_worker_t){
        .incarnation = 100 + i, .slab_bytes = info.slab_bytes, .speed.read_bandwidth = 1e10};
    snprintf(f->hello[i].address, sizeof(f->hello[i].address), "inproc:%u", i);
    snprintf(f->hello[i].kind, sizeof(f->hello[i].kind), "%s", kind != NULL ? kind : info.kind);
    strcpy(f->hello[i].place.host, "here");
    snprintf(f->hello[i].place.device, sizeof(f->hello[i].place.device), "%u", i);
    OK(cluster_worker_join(f->cluster, &f->hello[i], &f->hello[i].id));
    OK(links_add_engine(f->links, f->hello[i].address, f->engines[i]));
}

static inline void
fixture_open(fixture_t *f, uint32_t n, attn_placement_t placement, uint64_t lost_ns)
{
    static const attn_layer_t row = {.causal = true, .window = 1};
    directory_options_t options;
    char kind[64];

    *f = (fixture_t){.next_step = 1};
    directory_options_init(&options);
    options.lost_ns = lost_ns;
    OK(links_create(NULL, &f->links));
    OK(cluster_create(&options, f->links, &f->cluster));
    for (uint32_t i = 0; i < n; i++) {
        add_worker(f, NULL);
    }
    f->geometry = (attn_geometry_t){.size         = sizeof(f->geometry),
                                    .layers       = 1,
                                    .q_heads      = 1,
                                    .kv_heads     = 1,
                                    .head_dim_k   = DIM,
                                    .head_dim_v   = DIM,
                                    .kv_dtype     = ATTN_F32,
                                    .page_size    = 16,
                                    .chunk_size   = CHUNK,
                                    .placement    = placement,
                                    .layer_table  = &row,
                                    .region_bytes = 8u << 20};
    OK(cluster_client_open(f->cluster, "test", &f->client));
    OK(cluster_cache_open(f->cluster, f->client, "cache", &f->geometry, &f->cache, kind));
    f->geometry.layer_table = NULL; /* was for the call */
}

/* Close, after every engine was found sound. */
static inline void
fixture_close(fixture_t *f)
{
    for (uint32_t i = 0; i < f->n; i++) {
        OK(engine_check(f->engines[i]));
    }
    cluster_destroy(f->cluster);
    links_destroy(f->links);
}

static inline void
expect_empty(const fixture_t *f, uint32_t except_worker)
{
    engine_info_t info;

    for (uint32_t i = 0; i < f->n; i++) {
        engine_describe(f->engines[i], &info);
        if (f->hello[i].id != except_worker) {
            assert_int_equal(info.chunks, 0);
            assert_int_equal(info.used_bytes, 0);
        }
    }
}

/* ---- tokens ---- */

/* A step of one worker over one chunk; *sizes may be NULL. */
static inline attn_status_t
begin_on_chunk(fixture_t *f, const model_t *m, const attn_chunk_info_t *c, uint64_t base,
               uint32_t n_q, uint32_t n_new)
{
    uint32_t number       = (uint32_t)(c->first / CHUNK);
    attn_node_t root      = {32, 0};
    kv_step_chunk_t chunk = {.chunk      = c->chunk,
                             .generation = c->generation,
                             .length     = c->length,
                             .n_new      = n_new,
                             .number     = number};
    engine_entry_t entry  = {.seq      = m->seq.id,
                             .base     = base,
                             .n_q      = n_q,
                             .n_new    = n_new,
                             .n_chunks = 1,
                             .chunks   = &chunk,
                             .n_nodes  = n_q > 0,
                             .nodes    = &root};
    engine_batch_t batch  = {.cache       = f->cache,
                             .step_id     = ++f->next_step,
                             .n           = 1,
                             .entries     = &entry,
                             .q_dtype     = ATTN_F32,
                             .o_dtype     = ATTN_F32,
                             .deadline_ns = UINT64_MAX};
    engine_sizes_t sizes;

    return engine_step_begin(f->engines[c->worker - 1], &batch, &sizes);
}

/* Append n new tokens, chunk by chunk, as the layout says. */
static inline void
append(fixture_t *f, model_t *m, uint32_t n)
{
    attn_seq_info_t info;
    uint64_t tokens = m->length + n, epoch;

    OK(cluster_layout(f->cluster, f->cache, &m->seq, NULL, &tokens, 1, &info, &epoch));
    assert_int_equal(info.length, m->length);
    while (m->length < tokens) {
        attn_chunk_info_t *c = &info.chunks[m->length / CHUNK];
        uint32_t room        = CHUNK - (uint32_t)(m->length % CHUNK);
        uint32_t part        = tokens - m->length < room ? (uint32_t)(tokens - m->length) : room;
        float *k = calloc(part, DIM * sizeof(float)), *v = calloc(part, DIM * sizeof(float));
        engine_t *e = f->engines[c->worker - 1];

        for (uint32_t t = 0; t < part; t++) {
            m->value[m->length + t] = v[t * DIM] = (float)pick(1u << 20);
        }
        OK(begin_on_chunk(f, m, c, m->length, 0, part));
        OK(engine_step_run(e, f->next_step, 0, NULL, k, v, NULL, NULL));
        OK(engine_step_commit(e, f->next_step, NULL, 0));
        m->length += part;
        free(k);
        free(v);
    }
    attn_seq_info_free(&info);
}

/* Read the first n tokens of a chunk and compare. */
static inline void
check_chunk(fixture_t *f, const model_t *m, const attn_chunk_info_t *c, uint32_t n)
{
    float *q        = calloc(n, DIM * sizeof(float));
    uint8_t *answer = aligned_alloc(64, (n * (8 + 4 * DIM) + 63) / 64 * 64);
    engine_t *e     = f->engines[c->worker - 1];

    OK(begin_on_chunk(f, m, c, c->first + n, n, 0));
    OK(engine_step_run(e, f->next_step, 0, q, NULL, NULL, answer, NULL));
    const float *l = (const float *)(void *)answer + n, *a = l + n;
    for (uint32_t t = 0; t < n; t++) {
        assert_true(a[t * DIM] / l[t] == m->value[c->first + t]);
    }
    OK(engine_step_commit(e, f->next_step, NULL, 0));
    free(q);
    free(answer);
}

/* Length and content of the sequence are the model's. */
static inline void
check_model(fixture_t *f, const model_t *m)
{
    attn_seq_info_t info;
    uint64_t epoch;

    OK(cluster_layout(f->cluster, f->cache, &m->seq, NULL, NULL, 1, &info, &epoch));
    assert_int_equal(info.length, m->length);
    for (uint32_t c = 0; c < info.n_chunks; c++) {
        assert_int_equal(info.chunks[c].first, c * CHUNK);
        if (info.chunks[c].length > 0) {
            check_chunk(f, m, &info.chunks[c], info.chunks[c].length);
        }
    }
    attn_seq_info_free(&info);
}

static inline void
create(fixture_t *f, model_t *m, uint64_t expected)
{
    m->length = 0;
    OK(cluster_seq_create(f->cluster, f->cache, f->client, expected, &m->seq));
}

static inline attn_status_t
fork_model(fixture_t *f, const model_t *from, uint64_t length, model_t *to)
{
    attn_status_t status =
        cluster_seq_fork(f->cluster, f->cache, f->client, from->seq, length, &to->seq);

    if (status == ATTN_OK) {
        memcpy(to->value, from->value, sizeof(to->value));
        to->length = length;
    }
    return status;
}

#endif
