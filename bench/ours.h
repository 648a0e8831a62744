/*
 * ours.h: the side of attnd in a benchmark of the wire: a client with a cache of some layers and
 * one sequence, whose steps append as many tokens as they ask queries.
 */
#ifndef ATTN_BENCH_OURS_H
#define ATTN_BENCH_OURS_H

#include "bench/direct.h"
#include "client/attn.h"

typedef struct shape {
    const char *name;
    uint32_t q_heads, kv_heads, dim;
    attn_dtype_t dtype;
    uint32_t rows; /* queries and new tokens of a run */
} shape_t;

typedef struct ours {
    shape_t shape;
    uint32_t layers;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
    uint64_t length;
    attn_memory_t memory; /* of q, k, v and o */
    void *q, *k, *v, *o;
    uint64_t q_bytes, kv_bytes; /* o has q_bytes, k and v have kv_bytes each */
} ours_t;

/** A client of target with a new cache and sequence; ends the program if that fails. */
void ours_open(ours_t *ours, const char *target, const shape_t *shape, uint32_t layers,
               const attn_client_options_t *options, uint32_t chunk, attn_placement_t placement);
void ours_close(ours_t *ours);

/** From now on tensors are in the memory of GPU 0. */
void ours_on_gpu(ours_t *ours);

/** From now on steps have so many rows, at most as many as it was opened with. */
void ours_reshape(ours_t *ours, uint32_t rows);

/** A step that only stores the shape's rows, in all layers. */
void ours_append(ours_t *ours);

/** A step of one run of the shape's rows for each layer. */
attn_step_t *ours_begin(ours_t *ours);

/** A step of one run, that is not kept. @return false: it failed, and why */
bool ours_try(ours_t *ours, char why[256]);
void ours_commit(ours_t *ours, attn_step_t *step);

/** One layer; with `direct` as a unary call. @return nanoseconds of it that were computing */
uint64_t ours_run(ours_t *ours, attn_step_t *step, uint32_t layer, direct_t *direct);

#endif
