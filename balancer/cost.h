/*
 * cost.h: the cost model: what a layer's attention costs where, and so how long a
 * sequence stays whole. Pure functions of constants: read bandwidth and hop are
 * measured at start, the link's bandwidth is assumed (docs/architecture.md has the formulas).
 */
#ifndef ATTN_COST_H
#define ATTN_COST_H

#include "base/attn_types.h"

typedef struct cost_constants {
    double read_bandwidth; /**< bytes/s that attention reads KV with, on the slowest worker */
    double hop_seconds;    /**< round trip of a small message to a worker, median */
    double link_bandwidth; /**< bytes/s between client and worker */
} cost_constants_t;

/** What is assumed until something was measured: a CPU core and loopback gRPC. */
void cost_constants_init(cost_constants_t *constants);

/** Bytes of K and V of one token in one layer. */
uint64_t cost_kv_token_bytes(const attn_geometry_t *geometry);

/**
 * Seconds of one layer of one decode query over `tokens` tokens spread evenly over
 * `workers` workers: reading plus, if workers > 1, what the fan-out adds.
 */
double cost_layer_seconds(const cost_constants_t *constants, const attn_geometry_t *geometry,
                          uint64_t tokens, uint32_t workers);

/** A spread sequence is on so many workers at most: the merge tree's lanes. */
#define COST_SPREAD_MAX 64u

/**
 * Tokens above which a sequence is faster spread than whole, where there are `workers` workers; a
 * spread sequence is on no more of them than it has chunks, nor on more than COST_SPREAD_MAX.
 * UINT64_MAX if workers < 2. Whole chunks, at least one.
 */
uint64_t cost_break_even_tokens(const cost_constants_t *constants, const attn_geometry_t *geometry,
                                uint32_t workers);

#endif
