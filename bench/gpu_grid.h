/* gpu_grid.h: the points that bench_gpu times: shapes, lengths and page lists of a batch. */
#ifndef ATTN_BENCH_GPU_GRID_H
#define ATTN_BENCH_GPU_GRID_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef enum gpu_kind {
    GPU_DECODE, /**< one query a request, all of one length */
    GPU_SKEWED, /**< one query a request, lengths that differ */
    GPU_SHARED, /**< one query a request, a prefix in common */
    GPU_SPARSE, /**< one query a request over some of its pages */
    GPU_PREFILL /**< many queries a request, causal, the last at its end */
} gpu_kind_t;

/** One batch. All have bf16 for everything, and K and V of the same head dim. */
typedef struct gpu_point {
    char name[64]; /**< "decode b64 8k page 1"; what is not said is 32/8, hd 128, page 16 */
    gpu_kind_t kind;
    bool quick; /**< of the short grid, too */
    uint32_t q_heads, kv_heads, d, page;
    uint32_t n;        /**< requests */
    uint32_t *lengths; /**< [n] tokens, the queries' own included */
    uint32_t *queries; /**< [n] */
    uint32_t shared;   /**< tokens at the front of every request that are the same pages */
    uint32_t kept;     /**< pages that a request's list names, its last among them; 0: no lists */
} gpu_point_t;

/** All points, those of the short grid first. @return the array, for gpu_grid_free() */
gpu_point_t *gpu_grid_make(uint32_t *n_p);
void gpu_grid_free(gpu_point_t *points, uint32_t n);

const char *gpu_kind_name(gpu_kind_t kind);

/** Bytes of K and V that an attend has to read: what is shared counts once. */
double gpu_point_bytes(const gpu_point_t *point);

/** Operations of both products for what a causal mask leaves: 4 a query, head, token and column. */
double gpu_point_flops(const gpu_point_t *point);

/** Pages of all requests, what is shared counted once: those of one rotation. */
uint64_t gpu_point_pages(const gpu_point_t *point);

/** Rotations whose K, V, queries and answers are together larger than the L2: 1 to 24. */
uint32_t gpu_point_turns(const gpu_point_t *point);

/** A line of JSON: everything of the above. */
void gpu_point_write(FILE *file, const gpu_point_t *point);

#endif
