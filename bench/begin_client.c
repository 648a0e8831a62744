/*
 * begin_client.c: the client's side of begin: libattn over engines inside the process, whose own
 * time is taken off, and over gRPC. The sequences are forks of one, which is quick to make, and as
 * good as others here: to layouts and splitting a shared chunk is a chunk.
 */
#include "bench/begin.h"

#include "base/clock.h"
#include "client/client_int.h"
#include "engine/engine.h"

#include <stdlib.h>

#define CHUNK 2048u
#define WORKERS 8u
#define SEQS_MAX 1024u

uint64_t begin_engine_ns, begin_store_ns;

/* ---- the linker puts these before the functions ---- */

attn_status_t __real_engine_step_begin(engine_t *engine, const engine_batch_t *batch,
                                       engine_sizes_t *sizes);
attn_status_t __wrap_engine_step_begin(engine_t *engine, const engine_batch_t *batch,
                                       engine_sizes_t *sizes);
attn_status_t __real_kv_step_begin(kv_store_t *store, uint64_t cache, uint64_t step_id,
                                   const kv_step_entry_t *entries, uint32_t n_entries,
                                   kv_step_t **step_p);
attn_status_t __wrap_kv_step_begin(kv_store_t *store, uint64_t cache, uint64_t step_id,
                                   const kv_step_entry_t *entries, uint32_t n_entries,
                                   kv_step_t **step_p);

attn_status_t
__wrap_engine_step_begin(engine_t *engine, const engine_batch_t *batch, engine_sizes_t *sizes)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = __real_engine_step_begin(engine, batch, sizes);

    begin_engine_ns += attn_now_ns() - start;
    return status;
}

attn_status_t
__wrap_kv_step_begin(kv_store_t *store, uint64_t cache, uint64_t step_id,
                     const kv_step_entry_t *entries, uint32_t n_entries, kv_step_t **step_p)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = __real_kv_step_begin(store, cache, step_id, entries, n_entries, step_p);

    begin_store_ns = attn_now_ns() - start;
    return status;
}

/* ---- a way to a cluster ---- */

typedef struct way {
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t parent, seqs[SEQS_MAX];
    uint32_t n;
} way_t;

struct begin_client {
    const begin_options_t *options;
    uint32_t context;
    way_t inproc, remote;
};

static void
run_step(way_t *way, const attn_entry_t *entry)
{
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = entry, .q_dtype = ATTN_F16};
    attn_tensor_t none = {0};
    attn_step_t *step;

    const attn_geometry_t *g = attn_cache_geometry(way->cache);
    void *zeros              = calloc(entry->n_new, (size_t)g->kv_heads * g->head_dim_k * 2);
    attn_tensor_t kv         = {.data = zeros, .dtype = g->kv_dtype};
    result_must(attn_step_begin(way->cache, &batch, &step));
    result_must(attn_step_run(step, 0, &none, &kv, &kv, &none, NULL));
    result_must(attn_step_commit(step, NULL));
    free(zeros);
}

static void
way_open(way_t *way, const char *target, uint32_t context)
{
    attn_geometry_t geometry;
    char name[64];

    attn_geometry_init(&geometry);
    geometry.q_heads    = 4;
    geometry.kv_heads   = 1;
    geometry.head_dim_k = geometry.head_dim_v = 32;
    geometry.page_size                        = 16;
    geometry.chunk_size                       = CHUNK;
    geometry.placement                        = ATTN_PLACE_SPREAD;
    geometry.region_bytes                     = UINT64_C(256) << 20;
    snprintf(name, sizeof(name), "bench-%llu", (unsigned long long)attn_now_ns());
    result_must(attn_client_open(target, NULL, &way->client));
    result_must(attn_cache_open(way->client, name, &geometry, &way->cache));
    result_must(attn_seq_create(way->cache, NULL, &way->parent));
    attn_entry_t entry = {.seq = way->parent, .n_new = context};
    run_step(way, &entry);
}

static void
way_close(way_t *way)
{
    if (way->client != NULL) {
        attn_cache_close(way->cache);
        attn_client_close(way->client);
    }
}

/* So many forks that miss the last tokens, each with a tail of its own. */
static void
way_grow(way_t *way, uint32_t n, uint32_t context)
{
    for (; way->n < n; way->n++) {
        attn_entry_t entry = {.base = context - 64, .n_new = 5};
        result_must(attn_seq_fork(way->cache, way->parent, entry.base, &way->seqs[way->n]));
        entry.seq = way->seqs[way->n];
        run_step(way, &entry);
    }
}

begin_client_t *
begin_client_open(const begin_options_t *options, uint32_t context)
{
    begin_client_t *client = calloc(1, sizeof(*client));

    client->options = options;
    client->context = context;
    way_open(&client->inproc, "inproc://cpu?workers=8&threads=1&slab=300MiB", context);
    if (options->target != NULL) {
        way_open(&client->remote, options->target, context);
    }
    return client;
}

void
begin_client_close(begin_client_t *client)
{
    way_close(&client->inproc);
    way_close(&client->remote);
    free(client);
}

/* ---- times ---- */

static void
time_begin(const begin_client_t *client, way_t *way, const begin_case_t *c, bool less_engines,
           samples_t *samples)
{
    attn_entry_t *entries = calloc(c->sequences, sizeof(*entries));
    attn_batch_t batch    = {
           .size = sizeof(batch), .n = c->sequences, .entries = entries, .q_dtype = ATTN_F16};

    for (uint32_t s = 0; s < c->sequences; s++) {
        entries[s] =
            (attn_entry_t){.seq = way->seqs[s], .base = client->context - 59, .n_q = 1, .n_new = 1};
    }
    for (uint32_t i = 0; i <= client->options->rounds / 2; i++) {
        attn_step_t *step;
        begin_engine_ns = 0;
        samples_start(samples, client->options);
        result_must(attn_step_begin(way->cache, &batch, &step));
        samples_stop(samples, less_engines ? begin_engine_ns : 0);
        attn_step_abort(step);
        samples->n = i == 0 ? 0 : samples->n; /* the first one fetched layouts */
    }
    free(entries);
}

static void
time_layouts(const begin_client_t *client, way_t *way, const begin_case_t *c, samples_t *samples)
{
    uint64_t *tokens = malloc(c->sequences * sizeof(*tokens));

    for (uint32_t s = 0; s < c->sequences; s++) {
        tokens[s] = client->context - 58;
    }
    for (uint32_t i = 0; i < client->options->rounds / 10; i++) {
        samples_start(samples, client->options);
        result_must(layouts_fetch(way->cache, way->seqs, NULL, tokens, c->sequences,
                                  client_deadline(way->client)));
        samples_stop(samples, 0);
    }
    free(tokens);
}

void
begin_client_time(begin_client_t *client, const begin_case_t *c)
{
    static samples_t samples;
    way_t *whole = client->remote.client != NULL ? &client->remote : &client->inproc;

    way_grow(&client->inproc, c->sequences, client->context);
    if (whole != &client->inproc) {
        way_grow(whole, c->sequences, client->context);
    }
    time_begin(client, &client->inproc, c, true, &samples);
    samples_report(&samples, client->options, c, "coordinator", 200);
    time_layouts(client, whole, c, &samples);
    samples_report(&samples, client->options, c, "client_layout", 0);
    time_begin(client, whole, c, false, &samples);
    samples_report(&samples, client->options, c, "client_begin", 0);
}
