/*
 * scaling_world.c: a cluster for scaling.c, and the KV in it. Caches have one layer: what is asked
 * for again and again is that layer. k and v are noise, the same at a position of a sequence
 * whatever the workers are, so that answers can be held against each other bit by bit.
 */
#include "bench/result.h"
#include "bench/scaling.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define SPIN_US 50u
#define PERIOD 65521u /* tokens after which noise comes again; no multiple of a chunk */
#define APART 977u    /* tokens that sequences are apart in it */
#define ROOMY 16u     /* chunks that grow on a worker beside what is filled, at most */

/* ---- noise ---- */

static uint64_t
row_bytes(const setup_t *setup)
{
    return (uint64_t)setup->kv_heads * setup->dim * 2;
}

/* A step's tokens at most, when it fills. */
static uint64_t
fill_tokens(const setup_t *setup, uint32_t workers)
{
    return (uint64_t)setup->chunk * workers;
}

/* bf16 in [-1, 1); rows of PERIOD tokens and as many more as a tensor may have. */
static uint16_t *
noise(const setup_t *setup)
{
    static uint16_t *at;
    uint64_t longest = fill_tokens(setup, PROCESSES_WORKERS_MAX);
    uint64_t group   = setup->q_heads / setup->kv_heads;

    if (at == NULL) {
        uint64_t n = (PERIOD + attn_max(longest, setup->chunk * group)) * row_bytes(setup) / 2;
        uint64_t x = 0x9e3779b97f4a7c15u, head = PERIOD * row_bytes(setup) / 2;
        at = malloc(n * sizeof(*at));
        result_must(at != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for noise"));
        for (uint64_t i = 0; i < head; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            float f = (float)(int32_t)(x >> 32) / 2147483648.0f;
            uint32_t bits;
            memcpy(&bits, &f, sizeof(bits));
            at[i] = (uint16_t)(bits >> 16);
        }
        for (uint64_t i = head; i < n; i++) { /* what ends it begins it again */
            at[i] = at[i - head];
        }
    }
    return at;
}

static void *
noise_row(const setup_t *setup, uint64_t token)
{
    return noise(setup) + token % PERIOD * (row_bytes(setup) / 2);
}

void *
noise_k(const setup_t *setup, uint32_t s, uint64_t t)
{
    return noise_row(setup, t + (uint64_t)s * APART);
}

void *
noise_v(const setup_t *setup, uint32_t s, uint64_t t)
{
    return noise_row(setup, t + (uint64_t)s * APART + PERIOD / 2);
}

void *
noise_q(const setup_t *setup, uint64_t i)
{
    return noise_row(setup, i * APART + PERIOD / 3);
}

/* ---- clients ---- */

static attn_status_t
open_cache(world_t *w, side_t *side, attn_placement_t placement)
{
    const setup_t *setup = w->setup;
    attn_geometry_t geometry;

    if (side->caches[placement] != NULL) {
        return ATTN_OK;
    }
    attn_geometry_init(&geometry);
    geometry.layers     = 1;
    geometry.q_heads    = setup->q_heads;
    geometry.kv_heads   = setup->kv_heads;
    geometry.head_dim_k = geometry.head_dim_v = setup->dim;
    geometry.kv_dtype                         = ATTN_BF16;
    geometry.chunk_size                       = setup->chunk;
    geometry.placement                        = placement;
    geometry.region_bytes                     = w->region[placement];
    return attn_cache_open(side->client, placement == ATTN_PLACE_SPREAD ? "spread" : "whole",
                           &geometry, &side->caches[placement]);
}

attn_status_t
world_side(world_t *w, attn_merging_t merging, attn_placement_t placement, side_t **side_p)
{
    side_t *side         = &w->sides[merging];
    attn_status_t status = ATTN_OK;

    if (side->client == NULL) {
        attn_client_options_t options;
        attn_client_options_init(&options);
        options.spin_us    = SPIN_US;
        options.timeout_ms = 30000;
        options.merging    = merging;
        status             = attn_client_open(w->cluster.coordinator.line, &options, &side->client);
    }
    if (status == ATTN_OK) {
        status = open_cache(w, side, placement);
    }
    *side_p = side;
    return status;
}

/* ---- what is filled ---- */

const stock_t *
world_stock(const world_t *w, const point_t *point)
{
    for (uint32_t i = 0; i < w->n_stocks; i++) {
        if (w->stocks[i].placement == point->placement && w->stocks[i].n == point->sequences) {
            return &w->stocks[i];
        }
    }
    return NULL;
}

/* Points of as many sequences that are placed alike fork the same ones, of the longest's length. */
static void
list_stocks(world_t *w)
{
    const setup_t *setup = w->setup;

    for (uint32_t p = 0; p < setup->n_points; p++) {
        const point_t *point = &setup->points[p];
        if (!setup->wanted[p] || point->piece > 0) {
            continue;
        }
        stock_t *stock = (stock_t *)world_stock(w, point);
        if (stock == NULL) {
            stock  = &w->stocks[w->n_stocks++];
            *stock = (stock_t){.placement = point->placement, .n = point->sequences};
        }
        stock->tokens = attn_max(stock->tokens, point->tokens);
    }
}

/* Tokens of a cache on a worker, in whole chunks: what is filled, what prefill makes, what grows.
 */
static void
size_regions(world_t *w)
{
    const setup_t *setup = w->setup;
    uint64_t chunk_bytes = setup->chunk * 2 * row_bytes(setup);
    uint64_t chunks[3]   = {0};

    for (uint32_t i = 0; i < w->n_stocks;
         i++) { /* each has the next one placed, and its fork two */
        uint64_t of_one = (w->stocks[i].tokens + setup->chunk - 1) / setup->chunk + 3;
        chunks[w->stocks[i].placement] += of_one * w->stocks[i].n;
    }
    for (uint32_t p = 0; p < setup->n_points; p++) {
        if (setup->wanted[p] && setup->points[p].piece > 0) {
            chunks[setup->points[p].placement] += setup->points[p].tokens / setup->chunk + 1;
        }
    }
    for (int i = 0; i < 3; i++) {
        uint64_t mine = (chunks[i] + w->workers - 1) / w->workers + ROOMY;
        w->region[i]  = chunks[i] > 0 ? mine * chunk_bytes : 0;
    }
}

static attn_status_t
fill_step(side_t *side, const setup_t *setup, const stock_t *stock, uint32_t s, uint64_t at,
          uint32_t n)
{
    attn_cache_t *cache = side->caches[stock->placement];
    attn_entry_t entry  = {.seq = stock->seqs[s], .base = at, .n_new = n};
    attn_batch_t batch  = {.size    = sizeof(batch),
                           .n       = 1,
                           .entries = &entry,
                           .q_dtype = ATTN_BF16,
                           .memory  = ATTN_MEMORY_HOST};
    attn_tensor_t k     = {noise_k(setup, s, at), ATTN_BF16, ATTN_MEMORY_HOST, 0, 0};
    attn_tensor_t v     = {noise_v(setup, s, at), ATTN_BF16, ATTN_MEMORY_HOST, 0, 0};
    attn_step_t *step;
    attn_status_t status = attn_step_begin(cache, &batch, &step);

    if (status == ATTN_OK) {
        status = attn_step_run(step, 0, NULL, &k, &v, NULL, NULL);
        status = status == ATTN_OK ? attn_step_commit(step, NULL) : status;
        if (status != ATTN_OK) {
            attn_step_abort(step);
        }
    }
    return status;
}

static void
fill(world_t *w)
{
    const setup_t *setup = w->setup;
    uint64_t start       = attn_now_ns();
    side_t *side;

    noise(setup);
    for (uint32_t i = 0; i < w->n_stocks; i++) {
        stock_t *stock             = &w->stocks[i];
        uint64_t most              = fill_tokens(setup, w->workers);
        attn_seq_options_t options = {.size = sizeof(options), .expected_tokens = stock->tokens};
        result_must(world_side(w, ATTN_MERGING_CLIENT, stock->placement, &side));
        stock->seqs = calloc(stock->n, sizeof(*stock->seqs));
        for (uint32_t s = 0; s < stock->n; s++) {
            result_must(attn_seq_create(side->caches[stock->placement], &options, &stock->seqs[s]));
            for (uint64_t at = 0; at < stock->tokens; at += most) {
                uint64_t n = attn_min(most, stock->tokens - at);
                result_must(fill_step(side, setup, stock, s, at, (uint32_t)n));
            }
        }
        w->fill_bytes += stock->n * stock->tokens * 2 * row_bytes(setup);
    }
    w->fill_seconds = (double)(attn_now_ns() - start) / 1e9;
}

/* ---- the whole ---- */

bool
world_open(world_t *w, const setup_t *setup, uint32_t workers)
{
    *w = (world_t){.setup = setup, .workers = workers};
    list_stocks(w);
    size_regions(w);
    uint64_t slab = 0;
    for (int i = 0; i < 3; i++) {
        slab += w->region[i] + w->region[i] / 64; /* they begin at bounds of their own */
    }
    /* Two that wait on one core stay there while another is idle. */
    cluster_options_t options = {.own_cores = setup->gpus == 0,
                                 .threads   = setup->threads,
                                 .spin_us   = SPIN_US,
                                 .gpus      = setup->gpus,
                                 .slab      = slab + (UINT64_C(64) << 20),
                                 .ucx_slab  = setup->ucx_slab,
                                 .clients   = 3,
                                 .groups    = setup->gpus > 0};
    if (!cluster_start_with(&w->cluster, workers, &options)) {
        return false;
    }
    fill(w);
    return true;
}

void
world_close(world_t *w)
{
    for (int m = 2; m >= 0; m--) {
        for (int p = 0; p < 3; p++) {
            attn_cache_close(w->sides[m].caches[p]);
        }
        attn_client_close(w->sides[m].client);
    }
    for (uint32_t i = 0; i < w->n_stocks; i++) {
        free(w->stocks[i].seqs);
    }
    cluster_stop(&w->cluster);
}
