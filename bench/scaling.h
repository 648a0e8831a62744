/*
 * scaling.h: what scaling.c and its parts share: a point of the grid, a cluster that its rows are
 * measured on, a row.
 */
#ifndef ATTN_BENCH_SCALING_H
#define ATTN_BENCH_SCALING_H

#include "bench/processes.h"
#include "client/attn.h"

/** Where a batch's KV lies, and what is asked about it. */
typedef struct point {
    const char *name;
    attn_placement_t placement;
    uint32_t sequences;
    uint64_t tokens; /**< of each */
    uint32_t piece;  /**< 0: decode, a token of each sequence; else prefill, so many at a time */
    bool quick;      /**< also of a quick run */
} point_t;

/** How a layer is asked for. */
typedef enum way {
    WAY_HOST,     /**< attn_step_run(), tensors in the host's memory */
    WAY_CUDA,     /**< tensors in the memory of GPU 0 */
    WAY_ENQUEUED, /**< attn_step_enqueue(), on a stream of GPU 0 */
    WAYS
} way_t;

/** What a machine is measured with. */
typedef struct setup {
    uint32_t gpus; /**< that workers are on, in turn; 0: they are on the CPU */
    uint32_t q_heads, kv_heads, dim, chunk;
    uint32_t threads;  /**< of a worker on the CPU */
    uint64_t ucx_slab; /**< of a client on a worker; 0: the worker's default */
    double seconds;    /**< of a row, about */
    uint32_t runs;     /**< of a decode step */
    const point_t *points;
    uint32_t n_points;
    bool wanted[16]; /**< of points */
} setup_t;

/** Sequences that are there before anything is measured, and that rows fork. */
typedef struct stock {
    attn_placement_t placement;
    uint32_t n;
    uint64_t tokens;
    attn_seq_t *seqs;
} stock_t;

#define STOCKS_MAX 4u

typedef struct side {
    attn_client_t *client;
    attn_cache_t *caches[3]; /**< by placement */
} side_t;

typedef struct world {
    const setup_t *setup;
    uint32_t workers;
    cluster_t cluster;
    side_t sides[3]; /**< by merging; opened when they are asked for */
    stock_t stocks[STOCKS_MAX];
    uint32_t n_stocks;
    uint64_t region[3]; /**< bytes of each cache on a worker */
    double fill_seconds;
    uint64_t fill_bytes;
} world_t;

/** A row: a point on so many workers. Microseconds of a layer, p50 if nothing else is said. */
typedef struct row {
    const point_t *point;
    uint32_t workers;
    attn_merging_t merging;
    way_t way;
    char absent[256]; /**< why there are no figures */
    uint32_t samples;
    double us, p90, p99;  /**< as the client sees it; prefill: of all pieces together */
    double computed;      /**< of it the slowest worker: storing, attending, merging in a group */
    double begin, commit; /**< of the step beside, all pieces together */
    double hop, send;     /**< of the links' runs beside what is computed: attn_link_info_t */
    double predicted;     /**< by the cost model, before it was measured; 0: it has no word on it */
    double predicted_attend, predicted_hop, predicted_link, predicted_merge; /**< its parts */
    uint64_t bits; /**< a hash of the answers */
    bool grouped;  /**< workers merged among themselves */
    char transport[32], gpu_reason[256];
} row_t;

/* ---- scaling_world.c ---- */

/** A cluster of so many workers, filled for the points that are wanted. @return false: it did not
 * come up */
bool world_open(world_t *world, const setup_t *setup, uint32_t workers);
void world_close(world_t *world);

/** @return the client that merges so, opened if need be; likewise its cache of a placement */
attn_status_t world_side(world_t *world, attn_merging_t merging, attn_placement_t placement,
                         side_t **side_p);

/** The sequences that a point forks. */
const stock_t *world_stock(const world_t *world, const point_t *point);

/** Rows of noise, at position t of sequence s: the same whatever the workers are. */
void *noise_k(const setup_t *setup, uint32_t s, uint64_t t);
void *noise_v(const setup_t *setup, uint32_t s, uint64_t t);
void *noise_q(const setup_t *setup, uint64_t i);

/* ---- scaling_row.c ---- */

/** Measure; what fails is told in row->absent. */
void measure_row(world_t *world, row_t *row);

#endif
