/*
 * begin.c: what the begin of a step costs without networks, for 1 to 1,024 decode entries of 1k,
 * 4k and 32k tokens, with and without a common prefix (half of the tokens, at most 8,192).
 *
 *     worker_plan     the planner alone, 8 KV heads of 4 query heads, 16 threads, on page lists;
 *                     chunks of 2,048 tokens, as all others here, and (_8k) of 8,192
 *     gpu_plan        the same for a GPU's tables: leaves of 64, chunks of 8,192, no cuts
 *     gpu_tables      a GPU's tables of it, for 132 multiprocessors, written to where one copy
 * takes them to the device; without the lists of pages, which follow as gpu_pages       the whole,
 * page lists too: their bytes grow with the context worker_unpack   a worker's request from
 * protobuf bytes to the engine's structs worker_store    kv_step_begin() alone worker_begin    the
 * engine's begin: checks, copies, kv_step_begin(), one plan coordinator     libattn's part with
 * layouts at hand, over engines inside the process: checks, layouts, split, spans, the workers'
 * words; without what the engines do client_layout   the same sequences' layouts fetched anew
 *     client_begin    the whole begin over gRPC: a cluster of two workers on this machine, or the
 *                     one of --target
 *
 *     bench_begin [--target HOST:PORT] [--cold] [--json FILE] [--quick]
 *
 * Medians of many begins, each aborted. --cold reads 16 MiB in between, so that a begin finds its
 * tables in no cache of a core's own. The engine's sequences share full chunks among each other, in
 * orders that no two have in common: tables and page lists are as large as of tokens of their own.
 */
#include "bench/begin.h"

#include "base/clock.h"
#include "bench/processes.h"
#include "client/wire.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 2048u
#define PAGE BEGIN_PAGE
#define PREFIX_MAX 8192u
#define CLUSTER_WORKERS 2u
#define COLD_BYTES (UINT64_C(16) << 20)

/* ---- samples ---- */

void
samples_start(samples_t *samples, const begin_options_t *options)
{
    static uint8_t *cold;

    if (cold == NULL) {
        cold = malloc(COLD_BYTES);
        memset(cold, 1, COLD_BYTES);
    }
    uint64_t sum = 0;
    for (uint64_t i = 0; options->cold && i < COLD_BYTES; i += 64) {
        sum += cold[i];
    }
    *(volatile uint64_t *)&samples->unused = sum;
    samples->start                         = attn_now_ns();
}

void
samples_stop(samples_t *samples, uint64_t less_ns)
{
    if (samples->n < SAMPLES_MAX) {
        samples->us[samples->n++] = (double)(attn_now_ns() - samples->start - less_ns) / 1e3;
    }
}

void
samples_report(samples_t *samples, const begin_options_t *options, const begin_case_t *c,
               const char *side, double target)
{
    double p50     = result_quantile(samples->us, samples->n, 0.5);
    double p99     = result_quantile(samples->us, samples->n, 0.99);
    bool judged    = target > 0 && c->sequences == 256;
    char more[128] = "", of[64] = "";

    if (judged) {
        snprintf(more, sizeof(more), ",\"target\":%g,\"bound\":%g", target, target);
    }
    if (c->context == 32768 && c->shared == 0) { /* drawn, a line for each */
        snprintf(of, sizeof(of), ",\"of\":\"%s\"", side);
    }
    result_json(&options->result, "begin",
                "\"case\":\"%s, %u of %uk%s\",\"side\":\"%s\",\"sequences\":%u,\"context\":%u,"
                "\"shared\":%u,\"cold\":%s,\"value\":%.2f,\"p99\":%.2f,\"unit\":\"us\"%s%s",
                side, c->sequences, c->context / 1024, c->shared > 0 ? " shared" : "", side,
                c->sequences, c->context, c->shared, options->cold ? "true" : "false", p50, p99,
                more, of);
    printf(" %9.1f", p50);
    fflush(stdout);
    samples->n = 0;
}

/* ---- the engine ---- */

#define BASES 1024u /* full chunks that sequences are made of */
#define CACHE 1u
#define HEADS 2u
#define DIM 32u

typedef struct world {
    engine_t *engine;
    uint64_t next_chunk, next_step;
    kv_step_chunk_t *chunks; /* [sequences][runs] */
    engine_entry_t *entries;
    engine_batch_t batch;
} world_t;

static void
world_open(world_t *w)
{
    engine_options_t options = {
        .device = "cpu", .threads = 2, .slab_bytes = UINT64_C(2) << 30, .name = "bench"};
    attn_layer_t layer       = {.scale = 1, .causal = true};
    attn_geometry_t geometry = {.size         = sizeof(geometry),
                                .layers       = 1,
                                .q_heads      = 4 * HEADS,
                                .kv_heads     = HEADS,
                                .head_dim_k   = DIM,
                                .head_dim_v   = DIM,
                                .kv_dtype     = ATTN_F16,
                                .page_size    = PAGE,
                                .chunk_size   = CHUNK,
                                .layer_table  = &layer,
                                .region_bytes = UINT64_C(1) << 30};

    kv_region_info_t info;

    *w = (world_t){.next_chunk = 1, .next_step = 1};
    result_must(engine_create(&options, &w->engine));
    result_must(engine_cache_open(w->engine, CACHE, &geometry, &info));
}

/* One step that appends: rows of zeros will do. */
static void
append(world_t *w, const engine_entry_t *entries, uint32_t n)
{
    engine_sizes_t sizes;
    engine_batch_t batch = {.cache       = CACHE,
                            .step_id     = w->next_step++,
                            .n           = n,
                            .entries     = entries,
                            .q_dtype     = ATTN_F16,
                            .o_dtype     = ATTN_F16,
                            .deadline_ns = UINT64_MAX};

    result_must(engine_step_begin(w->engine, &batch, &sizes));
    void *zeros = calloc(1, sizes.k + sizes.v + 64);
    result_must(engine_step_run(w->engine, batch.step_id, 0, NULL, zeros, zeros, NULL, NULL));
    result_must(engine_step_commit(w->engine, batch.step_id, NULL, 0));
    free(zeros);
}

/* BASES full chunks, ids 1 to BASES. */
static void
make_bases(world_t *w)
{
    for (uint32_t i = 0; i < BASES; i++) {
        kv_step_chunk_t chunk = {.chunk = w->next_chunk++, .n_new = CHUNK};
        engine_entry_t entry  = {
             .seq = chunk.chunk, .n_new = CHUNK, .n_chunks = 1, .chunks = &chunk};
        append(w, &entry, 1);
    }
}

/* A chunk with the first tokens of another one. */
static kv_step_chunk_t
share(world_t *w, uint64_t from, uint32_t length, uint32_t number)
{
    kv_step_chunk_t chunk = {
        .chunk = w->next_chunk++, .generation = 1, .length = length, .number = number};

    result_must(engine_chunk_fork(w->engine, CACHE, from, length, chunk.chunk));
    return chunk;
}

/* The batch: one new token and one query for each sequence. */
static void
make_sequences(world_t *w, const begin_case_t *c)
{
    uint32_t runs = (c->context + CHUNK - 1) / CHUNK;

    w->chunks  = calloc((size_t)c->sequences * runs, sizeof(*w->chunks));
    w->entries = calloc(c->sequences, sizeof(*w->entries));
    for (uint32_t s = 0; s < c->sequences; s++) {
        kv_step_chunk_t *chunks = w->chunks + (size_t)s * runs;
        for (uint32_t r = 0; r < runs; r++) {
            bool common   = (r + 1) * CHUNK <= c->shared;
            uint64_t from = 1 + (common ? r : s + r * 37) % BASES;
            if (r + 1 == runs && c->shared > 0 && c->shared < CHUNK) {
                from = 1;
            }
            uint32_t length = r + 1 < runs ? CHUNK : c->context - r * CHUNK - 64;
            chunks[r]       = common && s > 0 ? w->chunks[r] : share(w, from, length, r);
        }
        /* A page of its own at the end. */
        kv_step_chunk_t last = chunks[runs - 1];
        last.n_new           = 5 + s % 8;
        engine_entry_t entry = {.seq      = BASES + 1 + s,
                                .base     = (uint64_t)(runs - 1) * CHUNK + last.length,
                                .n_new    = last.n_new,
                                .n_chunks = 1,
                                .chunks   = &last};
        append(w, &entry, 1);
        chunks[runs - 1].length += last.n_new;
        chunks[runs - 1].n_new = 1;
        w->entries[s]          = (engine_entry_t){.seq      = entry.seq,
                                                  .base     = entry.base + last.n_new,
                                                  .n_q      = 1,
                                                  .n_new    = 1,
                                                  .n_chunks = runs,
                                                  .chunks   = chunks};
    }
    w->batch = (engine_batch_t){.cache       = CACHE,
                                .n           = c->sequences,
                                .entries     = w->entries,
                                .q_dtype     = ATTN_F16,
                                .o_dtype     = ATTN_F16,
                                .deadline_ns = UINT64_MAX};
}

static void
free_sequences(world_t *w)
{
    uint32_t n   = (uint32_t)(w->next_chunk - BASES - 1);
    uint64_t *id = malloc(n * sizeof(*id));

    for (uint32_t i = 0; i < n; i++) {
        id[i] = BASES + 1 + i;
    }
    result_must(engine_chunks_release(w->engine, CACHE, id, n));
    w->next_chunk = BASES + 1 + UINT64_C(1000000); /* released ids are not used again */
    free(id);
    free(w->chunks);
    free(w->entries);
}

/* As the worker's server unpacks: into memory that is taken in one piece. */
typedef struct arena {
    uint8_t *at;
    size_t used, size;
} arena_t;

static void *
arena_alloc(void *arg, size_t size)
{
    arena_t *arena = arg;
    void *at       = arena->at + arena->used;

    arena->used += (size + 15) / 16 * 16;
    return arena->used <= arena->size ? at : NULL;
}

static void
arena_free(void *arg, void *at)
{
    (void)arg;
    (void)at;
}

static void
time_unpack(const begin_options_t *options, const begin_case_t *c, world_t *w)
{
    static samples_t samples;
    Attn__V1__WorkerBeginRequest *message;
    wire_block_t out = {0};
    uint64_t now     = attn_now_ns();

    result_must(wire_worker_begin_encode(&out, &w->batch, now, &message));
    size_t size    = attn__v1__worker_begin_request__get_packed_size(message);
    uint8_t *bytes = malloc(size);
    attn__v1__worker_begin_request__pack(message, bytes);
    wire_free(&out);
    arena_t arena                = {.at = malloc(32 * size), .size = 32 * size};
    ProtobufCAllocator allocator = {
        .alloc = arena_alloc, .free = arena_free, .allocator_data = &arena};
    for (uint32_t i = 0; i < options->rounds; i++) {
        wire_block_t in = {0};
        engine_batch_t batch;
        samples_start(&samples, options);
        arena.used = 0;
        message    = attn__v1__worker_begin_request__unpack(&allocator, size, bytes);
        result_must(wire_worker_begin_decode(&in, message, now, &batch));
        wire_free(&in);
        samples_stop(&samples, 0);
    }
    free(arena.at);
    free(bytes);
    samples_report(&samples, options, c, "worker_unpack", 0);
}

static void
time_engine(const begin_options_t *options, const begin_case_t *c, world_t *w)
{
    static samples_t whole, store;
    engine_sizes_t sizes;

    for (uint32_t i = 0; i < options->rounds; i++) {
        w->batch.step_id = w->next_step++;
        samples_start(&whole, options);
        result_must(engine_step_begin(w->engine, &w->batch, &sizes));
        samples_stop(&whole, 0);
        store.us[store.n++] = (double)begin_store_ns / 1e3;
        result_must(engine_step_abort(w->engine, w->batch.step_id, "measured"));
    }
    samples_report(&store, options, c, "worker_store", 0);
    samples_report(&whole, options, c, "worker_begin", 0);
}

static void
time_worker(const begin_options_t *options, const begin_case_t *c, world_t *w)
{
    make_sequences(w, c);
    time_unpack(options, c, w);
    time_engine(options, c, w);
    free_sequences(w);
}

/* ---- all ---- */

static void
run_cases(const begin_options_t *options, bool shared)
{
    static const uint32_t sequences[] = {1, 4, 16, 64, 256, 1024};
    static const uint32_t contexts[]  = {1024, 4096, 32768};

    for (uint32_t x = 0; x < 3; x++) {
        world_t w;
        begin_client_t *client = begin_client_open(options, contexts[x]);
        world_open(&w);
        make_bases(&w);
        for (uint32_t n = 0; n < 6; n++) {
            begin_case_t c = {.sequences = sequences[n], .context = contexts[x]};
            if (shared) {
                c.shared = c.context / 2 < PREFIX_MAX ? c.context / 2 : PREFIX_MAX;
            }
            if (options->result.quick && c.sequences != 16 && c.sequences != 256) {
                continue;
            }
            printf("%9u %8u %8u", c.sequences, c.context, c.shared);
            begin_plan_time(options, &c, 8192, "worker_plan_8k");
            begin_plan_time(options, &c, CHUNK, "worker_plan");
            begin_image_time(options, &c);
            time_worker(options, &c, &w);
            if (client != NULL && !shared) {
                begin_client_time(client, &c);
            }
            printf("\n");
        }
        engine_destroy(w.engine);
        begin_client_close(client);
    }
    if (!shared) {
        begin_case_t c = {.sequences = 1, .context = 1u << 20};
        printf("%9u %8u %8u %9s %9s", c.sequences, c.context, c.shared, "", "");
        begin_image_time(options, &c);
        printf("\n");
    }
}

int
main(int argc, char **argv)
{
    begin_options_t options = {.rounds = 300};

    argc = result_options(&options.result, argc, argv);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--target") == 0 && i + 1 < argc) {
            options.target = argv[++i];
        } else if (strcmp(argv[i], "--cold") == 0) {
            options.cold = true;
        } else {
            fprintf(stderr,
                    "usage: bench_begin [--target HOST:PORT] [--cold] [--json FILE] [--quick]\n");
            return 2;
        }
    }
    options.rounds = options.result.quick ? 60 : options.cold ? 200 : 400;
    /* A block this large, freed, teaches malloc to keep what steps allocate and free: a worker's
     * steps do that themselves. */
    free(malloc(COLD_BYTES));
    cluster_t cluster = {0};
    bool own          = options.target == NULL;
    if (own) { /* first of all: processes are made before gRPC is */
        cluster_start(&cluster, CLUSTER_WORKERS, 1, 50);
        options.target = cluster.coordinator.line;
    }
    printf("medians in us\nsequences  context   shared  plan(8k)      plan    unpack     store     "
           "begin"
           " coordntr    layout    client\n");
    run_cases(&options, false);
    run_cases(&options, true);
    if (own) {
        cluster_stop(&cluster);
    }
    return 0;
}
