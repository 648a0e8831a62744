/*
 * test_engine.h: what the engine's tests share: a world (an engine with one cache), sequences
 * whose tokens the test knows, steps over them, and the oracle's judgement of every answer.
 *
 * A step is first built from asks, as a client would cut them for one worker that owns the
 * chunks in a mask; then its new tokens are dreamt up and written behind the sequences' ends
 * in the test's own memory, from where the tensors of every run are gathered.
 */
#ifndef ATTN_TEST_ENGINE_H
#define ATTN_TEST_ENGINE_H

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "engine/engine_int.h"
#include "kernels/oracle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS_MAX 4u
#define CHUNKS_MAX 8u
#define ASKS_MAX 4u
#define ALL_CHUNKS UINT32_MAX
#define SECONDS UINT64_C(1000000000)

#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != ATTN_OK) {                                                                   \
            fail_msg("%s: %s", #call, attn_last_error());                                          \
        }                                                                                          \
    } while (0)

/* The call fails so, and its sentence has `text` in it. */
#define FAILS(call, status, text)                                                                  \
    do {                                                                                           \
        attn_status_t got_ = (call);                                                               \
        if (got_ != (status) || strstr(attn_last_error(), (text)) == NULL) {                       \
            fail_msg("%s: %s \"%s\", not %s with \"%s\"", #call, attn_strerror(got_),              \
                     got_ == ATTN_OK ? "" : attn_last_error(), attn_strerror(status), (text));     \
        }                                                                                          \
    } while (0)

static uint64_t random_state = 1;

static inline uint32_t
random_bits(void)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 32);
}

static inline uint32_t
pick(uint32_t n)
{
    return (uint32_t)((uint64_t)random_bits() * n >> 32);
}

/* ---- world and sequences ---- */

typedef struct world {
    engine_t *engine;
    attn_geometry_t g;
    uint64_t cache;
    uint64_t next_id; /* of chunks, sequences and steps */
} world_t;

typedef struct sequence {
    uint64_t id, length; /* committed tokens */
    uint64_t chunk[CHUNKS_MAX];
    uint32_t generation[CHUNKS_MAX];        /* 0: not made yet */
    uint8_t *k[LAYERS_MAX], *v[LAYERS_MAX]; /* [CHUNKS_MAX * chunk_size][kv_heads][head_dim] */
} sequence_t;

static inline void
world_open(world_t *w, const attn_geometry_t *geometry, uint32_t threads)
{
    engine_options_t options = {
        .device = "cpu", .threads = threads, .slab_bytes = 64u << 20, .name = "worker 9"};
    kv_region_info_t info;

    *w = (world_t){.g = *geometry, .cache = 77, .next_id = 1000};
    OK(engine_create(&options, &w->engine));
    OK(engine_cache_open(w->engine, w->cache, geometry, &info));
}

static inline void
world_close(world_t *w)
{
    OK(engine_check(w->engine));
    engine_destroy(w->engine);
}

static inline uint64_t
k_row(const attn_geometry_t *g)
{
    return (uint64_t)g->kv_heads * g->head_dim_k * attn_dtype_size(g->kv_dtype);
}

static inline uint64_t
v_row(const attn_geometry_t *g)
{
    return (uint64_t)g->kv_heads * g->head_dim_v * attn_dtype_size(g->kv_dtype);
}

static inline void
sequence_init(world_t *w, sequence_t *s)
{
    *s = (sequence_t){.id = w->next_id++};
    for (uint32_t c = 0; c < CHUNKS_MAX; c++) {
        s->chunk[c] = w->next_id++;
    }
    for (uint32_t l = 0; l < w->g.layers; l++) {
        s->k[l] = calloc((size_t)CHUNKS_MAX * w->g.chunk_size, k_row(&w->g));
        s->v[l] = calloc((size_t)CHUNKS_MAX * w->g.chunk_size, v_row(&w->g));
    }
}

static inline void
sequence_free(sequence_t *s)
{
    for (uint32_t l = 0; l < LAYERS_MAX; l++) {
        free(s->k[l]);
        free(s->v[l]);
    }
}

static inline uint32_t
chunk_length(const world_t *w, const sequence_t *s, uint32_t c)
{
    uint64_t first = (uint64_t)c * w->g.chunk_size;

    return s->length <= first ? 0 : (uint32_t)attn_min(s->length - first, w->g.chunk_size);
}

/* A fork at `length` as the coordinator makes it: full chunks shared, the tail forked. */
static inline void
sequence_fork(world_t *w, sequence_t *from, uint64_t length, sequence_t *to)
{
    uint32_t full = (uint32_t)(length / w->g.chunk_size),
             rest = (uint32_t)(length % w->g.chunk_size);

    sequence_init(w, to);
    for (uint32_t c = 0; c < full; c++) {
        to->chunk[c]      = from->chunk[c];
        to->generation[c] = from->generation[c];
    }
    if (rest > 0) {
        OK(engine_chunk_fork(w->engine, w->cache, from->chunk[full], rest, to->chunk[full]));
        to->generation[full] = 1;
    }
    for (uint32_t l = 0; l < w->g.layers; l++) {
        memcpy(to->k[l], from->k[l], length * k_row(&w->g));
        memcpy(to->v[l], from->v[l], length * v_row(&w->g));
    }
    to->length = length;
}

/* What the caller may see of sequences and engine, to compare before and after. */
typedef struct figures {
    engine_info_t info;
    kv_chunk_info_t chunks[2][CHUNKS_MAX];
    bool in_step[2];
} figures_t;

static inline figures_t
figures_of(world_t *w, const sequence_t *a, const sequence_t *b)
{
    const sequence_t *both[] = {a, b};
    figures_t f;

    memset(&f, 0, sizeof(f)); /* padding, too: figures are compared as bytes */
    engine_describe(w->engine, &f.info);
    f.info.runs = f.info.kv_bytes = 0; /* these and the times only grow */
    memset(&f.info.times, 0, sizeof(f.info.times));
    memset(&f.info.device, 0, sizeof(f.info.device)); /* others use it, too */
    f.info.kv_rate = 0;
    uint64_t ended = f.info.steps.committed;
    for (uint32_t i = 0; i < ENGINE_ABORTS; i++) {
        ended += f.info.steps.aborted[i];
    }
    assert_int_equal(f.info.steps.begun, ended + f.info.open_steps);
    memset(&f.info.steps, 0, sizeof(f.info.steps));
    for (int i = 0; i < 2 && both[i] != NULL; i++) {
        OK(engine_chunks_describe(w->engine, w->cache, both[i]->chunk, CHUNKS_MAX, f.chunks[i],
                                  &both[i]->id, 1, &f.in_step[i]));
    }
    return f;
}

/* ---- building a step ---- */

typedef struct ask {
    sequence_t *seq;
    uint64_t base;
    uint32_t n_q, n_new;
    uint32_t n_lists;
    const uint32_t *indptr, *pages;
} ask_t;

typedef struct built {
    world_t *w;
    const ask_t *asks;
    uint32_t mine; /* mask of chunk numbers */
    engine_batch_t batch;
    engine_entry_t entries[ASKS_MAX];
    kv_step_chunk_t chunks[ASKS_MAX][CHUNKS_MAX];
    attn_node_t nodes[ASKS_MAX][CHUNKS_MAX];
    engine_sizes_t sizes; /* after begin */
} built_t;

static inline void
build_entry(built_t *b, uint32_t i)
{
    const ask_t *ask = &b->asks[i];
    uint32_t cs = b->w->g.chunk_size, n = 0, others[CHUNKS_MAX], numbers[CHUNKS_MAX], n_others = 0;
    uint64_t end      = ask->base + ask->n_new;
    engine_entry_t *e = &b->entries[i];

    *e = (engine_entry_t){.seq           = ask->seq->id,
                          .base          = ask->base,
                          .n_new         = ask->n_new,
                          .chunks        = b->chunks[i],
                          .nodes         = b->nodes[i],
                          .n_lists       = ask->n_lists,
                          .sparse_indptr = ask->indptr,
                          .sparse_pages  = ask->pages};
    for (uint32_t c = 0; c < CHUNKS_MAX && (uint64_t)c * cs < end; c++) {
        uint64_t first = attn_max(ask->base, (uint64_t)c * cs),
                 last  = attn_min(end, ((uint64_t)c + 1) * cs);
        if (!(b->mine >> c & 1)) {
            others[n_others++] = c;
            continue;
        }
        numbers[n]        = c;
        b->chunks[i][n++] = (kv_step_chunk_t){.chunk      = ask->seq->chunk[c],
                                              .generation = ask->seq->generation[c],
                                              .length     = chunk_length(b->w, ask->seq, c),
                                              .n_new  = first < last ? (uint32_t)(last - first) : 0,
                                              .number = c};
    }
    e->n_chunks = n;
    e->n_q      = n > 0 ? ask->n_q : 0;
    e->n_nodes  = n_others > 0 && e->n_q > 0
                      ? attn_tree_frontier(numbers, n, others, n_others, b->nodes[i])
                      : 0;
}

/* The worker's part of a step over asks, as its owner of the chunks in `mine`. */
static inline void
build(built_t *b, world_t *w, const ask_t *asks, uint32_t n, uint32_t mine)
{
    memset(b, 0, sizeof(*b));
    b->w     = w;
    b->asks  = asks;
    b->mine  = mine;
    b->batch = (engine_batch_t){.cache       = w->cache,
                                .step_id     = w->next_id++,
                                .n           = n,
                                .entries     = b->entries,
                                .q_dtype     = ATTN_F32,
                                .o_dtype     = ATTN_F32,
                                .want_lse    = true,
                                .deadline_ns = attn_now_ns() + 600 * SECONDS};
    for (uint32_t i = 0; i < n; i++) {
        build_entry(b, i);
    }
}

/* ---- tensors ---- */

/* n random numbers in (-1, 1) of a dtype. */
static inline void
fill_random(void *to, attn_dtype_t dtype, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        float x = (float)((double)random_bits() / 2147483648.0 - 1.0);
        attn_convert((uint8_t *)to + i * attn_dtype_size(dtype), dtype, &x, ATTN_F32, 1);
    }
}

static inline void *
random_tensor(attn_dtype_t dtype, uint64_t n)
{
    void *data = malloc(n * attn_dtype_size(dtype) + 1);

    fill_random(data, dtype, n);
    return data;
}

/* New k, v of the asks for all layers, behind what is committed. */
static inline void
dream(world_t *w, const ask_t *asks, uint32_t n)
{
    const attn_geometry_t *g = &w->g;

    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t l = 0; l < g->layers; l++) {
            fill_random(asks[i].seq->k[l] + asks[i].base * k_row(g), g->kv_dtype,
                        (uint64_t)asks[i].n_new * g->kv_heads * g->head_dim_k);
            fill_random(asks[i].seq->v[l] + asks[i].base * v_row(g), g->kv_dtype,
                        (uint64_t)asks[i].n_new * g->kv_heads * g->head_dim_v);
        }
    }
}

/* The rows of k or v that this worker stores, in its order. */
static inline void *
gather(const built_t *b, uint32_t layer, bool is_k)
{
    const attn_geometry_t *g = &b->w->g;
    uint64_t row             = is_k ? k_row(g) : v_row(g);
    uint64_t n               = 0;

    for (uint32_t i = 0; i < b->batch.n; i++) {
        for (uint32_t c = 0; c < b->entries[i].n_chunks; c++) {
            n += b->chunks[i][c].n_new;
        }
    }
    uint8_t *all = malloc(n * row + 1), *at = all;
    for (uint32_t i = 0; i < b->batch.n; i++) {
        const uint8_t *from = is_k ? b->asks[i].seq->k[layer] : b->asks[i].seq->v[layer];
        for (uint32_t c = 0; c < b->entries[i].n_chunks; c++) {
            const kv_step_chunk_t *chunk = &b->chunks[i][c];
            memcpy(at, from + ((uint64_t)chunk->number * g->chunk_size + chunk->length) * row,
                   chunk->n_new * row);
            at += chunk->n_new * row;
        }
    }
    return all;
}

static inline void *
answer_room(const built_t *b)
{
    void *answer = aligned_alloc(64, attn_div_up(b->sizes.answer + 1, 64) * 64);

    memset(answer, 0xee, b->sizes.answer);
    return answer;
}

/* Run a layer with its k and v; q NULL stores only. */
static inline attn_status_t
run_layer(const built_t *b, uint32_t layer, const void *q, void *answer)
{
    void *k = gather(b, layer, true), *v = gather(b, layer, false);
    attn_status_t status =
        engine_step_run(b->w->engine, b->batch.step_id, layer, q, k, v, answer, NULL);

    free(k);
    free(v);
    return status;
}

/* ---- the judge ---- */

/* The sparse pages of an ask as positions: the oracle is given pages of one token. */
static inline void
judge_lists(const attn_geometry_t *g, const ask_t *ask, uint32_t *indptr, uint32_t *positions)
{
    uint32_t per_chunk = (g->chunk_size + g->page_size - 1) / g->page_size, n = 0;

    indptr[0] = 0;
    for (uint32_t list = 0; list < ask->n_lists; list++) {
        for (uint32_t j = ask->indptr[list]; j < ask->indptr[list + 1]; j++) {
            uint32_t first = ask->pages[j] % per_chunk * g->page_size;
            for (uint32_t t = first; t < first + g->page_size && t < g->chunk_size; t++) {
                positions[n++] = ask->pages[j] / per_chunk * g->chunk_size + t;
            }
        }
        indptr[list + 1] = n;
    }
}

static inline double
tolerance_of(attn_dtype_t dtype)
{
    return dtype == ATTN_F32 ? 1e-5 : dtype == ATTN_F16 ? 1e-3 : 1e-2;
}

/* Rows of all heads against the oracle's; o is float32 here. t: relative to the largest |v|. */
static inline void
compare_rows(const attn_geometry_t *g, const attn_oracle_t *want, uint64_t rows, const float *o,
             const float *lse, double t)
{
    for (uint64_t r = 0; r < rows; r++) {
        double slack = ldexp(want->kappa[r], -20), lse_want = want->lse[r];
        if (lse != NULL && isinf(lse_want)) {
            assert_true(isinf(lse[r]) && lse[r] < 0);
        } else if (lse != NULL) {
            assert_true(fabs((double)lse[r] - lse_want) <= 1e-5 * fmax(1, fabs(lse_want)) + slack);
        }
        for (uint64_t i = r * g->head_dim_v; i < (r + 1) * g->head_dim_v; i++) {
            double off = fabs((double)o[i] - want->o[i]);
            if (!(off <= (t + slack) * want->v_max[r])) {
                fail_msg("row %llu of all heads is off by %g", (unsigned long long)r, off);
            }
        }
    }
}

/* The tokens of the ask's sequence as runs of pages of one token. Returns how many runs. */
static inline uint32_t
judge_runs(const attn_geometry_t *g, uint64_t n, uint32_t *pages, attn_kv_run_t *runs)
{
    uint32_t n_runs = 0;

    for (uint32_t p = 0; p < n; p++) {
        pages[p] = p;
    }
    for (uint64_t first = 0; first < n; first += g->chunk_size, n_runs++) {
        runs[n_runs] = (attn_kv_run_t){.chunk  = n_runs,
                                       .pages  = pages + first,
                                       .length = (uint32_t)attn_min(n - first, g->chunk_size)};
    }
    return n_runs;
}

/* Judge the rows of one entry. */
static inline void
judge_entry(world_t *w, const ask_t *ask, uint32_t layer, const void *q, attn_dtype_t q_dtype,
            const float *o, const float *lse, double t)
{
    const attn_geometry_t *g = &w->g;
    const attn_layer_t *row  = &w->engine->caches->geometry.layer_table[layer];
    uint64_t n = ask->base + ask->n_new, rows = (uint64_t)ask->n_q * g->q_heads, d = g->head_dim_v;
    uint32_t indptr[65], *pages = malloc((n + 1) * sizeof(*pages));
    uint32_t *sparse = malloc((ask->n_lists + 1) * (n + g->chunk_size) * sizeof(*sparse));
    double *want     = malloc(rows * (d + 3) * sizeof(*want));
    attn_kv_run_t runs[CHUNKS_MAX];
    attn_oracle_t out = {want, want + rows * d, want + rows * (d + 1), want + rows * (d + 2)};
    attn_problem_entry_t entry = {.kv_length     = n,
                                  .n_q           = ask->n_q,
                                  .runs          = runs,
                                  .n_lists       = ask->n_lists,
                                  .sparse_indptr = indptr,
                                  .sparse_pages  = sparse,
                                  .dense_from    = ask->base};
    attn_problem_t problem     = {.n          = 1,
                                  .entries    = &entry,
                                  .q_heads    = g->q_heads,
                                  .kv_heads   = g->kv_heads,
                                  .head_dim_k = g->head_dim_k,
                                  .head_dim_v = g->head_dim_v,
                                  .page_size  = 1,
                                  .chunk_size = g->chunk_size,
                                  .window     = row->window,
                                  .causal     = row->causal};
    attn_kv_t kv               = {.k             = ask->seq->k[layer],
                                  .v             = ask->seq->v[layer],
                                  .n_pages       = n,
                                  .dtype         = g->kv_dtype,
                                  .k_page_stride = (uint64_t)g->kv_heads * g->head_dim_k,
                                  .v_page_stride = (uint64_t)g->kv_heads * g->head_dim_v,
                                  .kv_heads      = g->kv_heads,
                                  .head_dim_k    = g->head_dim_k,
                                  .head_dim_v    = g->head_dim_v,
                                  .page_size     = 1,
                                  .chunk_size    = g->chunk_size};

    entry.n_runs = judge_runs(g, n, pages, runs);
    judge_lists(g, ask, indptr, sparse);
    OK(attn_oracle_attend(&problem, &kv, row, q, q_dtype, &out));
    compare_rows(g, &out, rows, o, lse, t);
    free(want);
    free(sparse);
    free(pages);
}

/* Judge all rows of a whole answer: o of o_dtype, lse or NULL. */
static inline void
judge(world_t *w, const ask_t *asks, uint32_t n, uint32_t layer, const void *q,
      attn_dtype_t q_dtype, const void *o, attn_dtype_t o_dtype, const float *lse)
{
    const attn_geometry_t *g = &w->g;
    double t                 = fmax(tolerance_of(g->kv_dtype), tolerance_of(o_dtype));
    uint64_t row             = 0;

    for (uint32_t i = 0; i < n; i++) {
        uint64_t rows = (uint64_t)asks[i].n_q * g->q_heads, size = rows * g->head_dim_v;
        float *plain = malloc((size + 1) * sizeof(*plain));
        attn_convert(plain, ATTN_F32,
                     (const uint8_t *)o + row * g->head_dim_v * attn_dtype_size(o_dtype), o_dtype,
                     size);
        judge_entry(w, &asks[i], layer,
                    (const uint8_t *)q + row * g->head_dim_k * attn_dtype_size(q_dtype), q_dtype,
                    plain, lse != NULL ? lse + row : NULL, t);
        free(plain);
        row += rows;
    }
}

/* ---- whole steps ---- */

/* Run a layer of a step that answers with O and judge it, then ask again without k and v. */
static inline void
run_and_judge(const built_t *b, uint32_t layer)
{
    void *q      = random_tensor(b->batch.q_dtype, b->sizes.q / attn_dtype_size(b->batch.q_dtype));
    void *answer = answer_room(b), *again = answer_room(b);
    float *lse = b->sizes.lse > 0 ? (float *)(void *)((uint8_t *)answer + b->sizes.o) : NULL;

    OK(run_layer(b, layer, q, answer));
    judge(b->w, b->asks, b->batch.n, layer, q, b->batch.q_dtype, answer, b->batch.o_dtype, lse);
    OK(engine_step_run(b->w->engine, b->batch.step_id, layer, q, NULL, NULL, again, NULL));
    assert_memory_equal(answer, again, b->sizes.answer);
    free(q);
    free(answer);
    free(again);
}

static inline void
begin(built_t *b)
{
    OK(engine_step_begin(b->w->engine, &b->batch, &b->sizes));
}

/* What a commit makes of the test's own knowledge. */
static inline void
committed(const built_t *b, const uint32_t *accepted)
{
    for (uint32_t i = 0; i < b->batch.n; i++) {
        const ask_t *ask = &b->asks[i];
        uint32_t n       = accepted != NULL ? accepted[i] : ask->n_new;
        if (ask->n_new == 0) {
            continue;
        }
        ask->seq->length = ask->base + n;
        for (uint32_t c = 0; c < CHUNKS_MAX; c++) {
            if (ask->seq->generation[c] == 0 && chunk_length(b->w, ask->seq, c) > 0) {
                ask->seq->generation[c] = 1;
            }
        }
    }
}

static inline void
commit(const built_t *b, const uint32_t *accepted)
{
    OK(engine_step_commit(b->w->engine, b->batch.step_id, accepted,
                          accepted != NULL ? b->batch.n : 0));
    committed(b, accepted);
    OK(engine_check(b->w->engine));
}

/* Begin, run every layer (the last first), judge, commit. */
static inline void
do_step(world_t *w, const ask_t *asks, uint32_t n, attn_dtype_t q_dtype, attn_dtype_t o_dtype)
{
    built_t b;

    build(&b, w, asks, n, ALL_CHUNKS);
    b.batch.q_dtype = q_dtype;
    b.batch.o_dtype = o_dtype;
    dream(w, asks, n);
    begin(&b);
    for (uint32_t l = w->g.layers; l-- > 0;) {
        run_and_judge(&b, l);
    }
    commit(&b, NULL);
}

/* Append n tokens without asking. */
static inline void
append(world_t *w, sequence_t *s, uint32_t n)
{
    ask_t ask = {.seq = s, .base = s->length, .n_new = n};
    built_t b;

    build(&b, w, &ask, 1, ALL_CHUNKS);
    dream(w, &ask, 1);
    begin(&b);
    for (uint32_t l = 0; l < w->g.layers; l++) {
        OK(run_layer(&b, l, NULL, NULL));
    }
    commit(&b, NULL);
}

/*
 * Append n tokens to a chunk, which nobody keeps: as it is, if it is at this length. Their k and v
 * are `rows` for every layer, or random if that is NULL.
 */
static inline attn_status_t
grow_by(world_t *w, uint64_t chunk, uint32_t generation, uint32_t length, uint32_t n,
        const void *rows)
{
    const uint64_t seq    = 7; /* no matter which */
    kv_step_chunk_t named = {
        .chunk = chunk, .generation = generation, .length = length, .n_new = n};
    engine_entry_t entry = {
        .seq = seq, .base = length, .n_new = n, .n_chunks = 1, .chunks = &named};
    engine_batch_t batch = {.cache       = w->cache,
                            .step_id     = w->next_id++,
                            .n           = 1,
                            .entries     = &entry,
                            .q_dtype     = ATTN_F32,
                            .o_dtype     = ATTN_F32,
                            .deadline_ns = UINT64_MAX};
    engine_sizes_t sizes;
    attn_status_t status = engine_step_begin(w->engine, &batch, &sizes);
    uint64_t size        = attn_dtype_size(w->g.kv_dtype);

    for (uint32_t l = 0; l < w->g.layers && status == ATTN_OK; l++) {
        void *k = rows == NULL ? random_tensor(w->g.kv_dtype, sizes.k / size) : NULL;
        void *v = rows == NULL ? random_tensor(w->g.kv_dtype, sizes.v / size) : NULL;
        status  = engine_step_run(w->engine, batch.step_id, l, NULL, rows != NULL ? rows : k,
                                 rows != NULL ? rows : v, NULL, NULL);
        free(k);
        free(v);
    }
    return status == ATTN_OK ? engine_step_commit(w->engine, batch.step_id, NULL, 0) : status;
}

static inline attn_status_t
grow(world_t *w, uint64_t chunk, uint32_t generation, uint32_t length, uint32_t n)
{
    return grow_by(w, chunk, generation, length, n, NULL);
}

/* Is what the engine holds of the sequence what the test knows? */
static inline void
check_content(world_t *w, sequence_t *s)
{
    ask_t ask = {.seq = s, .base = s->length, .n_q = s->length < 3 ? (uint32_t)s->length : 3};
    built_t b;

    if (s->length == 0) {
        return;
    }
    build(&b, w, &ask, 1, ALL_CHUNKS);
    begin(&b);
    for (uint32_t l = 0; l < w->g.layers; l++) {
        run_and_judge(&b, l);
    }
    commit(&b, NULL);
}

/* ---- geometries ---- */

static const float test_slopes[] = {0.03125f, 0.0625f, 0.125f, 0.25f};
static const float test_sinks[]  = {-1.0f, 0.5f, 2.0f, 4.0f};

static const attn_layer_t test_rows[] = {
    {.causal = true},
    {.causal = true, .window = 100, .softcap = 5.0f},
    {.causal = false, .sinks = test_sinks},
    {.causal = true, .window = 300, .slopes = test_slopes, .scale = 0.5f},
};

/* Two layers of f32: what tests use that are not about shapes. */
static const attn_geometry_t plain_geometry = {
    .size         = sizeof(attn_geometry_t),
    .layers       = 2,
    .q_heads      = 4,
    .kv_heads     = 2,
    .head_dim_k   = 32,
    .head_dim_v   = 32,
    .kv_dtype     = ATTN_F32,
    .page_size    = 16,
    .chunk_size   = 256,
    .region_bytes = 8u << 20,
};

#endif
