/* batches.h: random batches whose chunks lie on several ranks, for the tests of the exchange. */
#ifndef ATTN_TESTS_EXCHANGE_BATCHES_H
#define ATTN_TESTS_EXCHANGE_BATCHES_H

#include "kernels/cuda/exchange_plan.h"

#define ENTRIES_MAX 6u
#define CHUNKS_MAX 40u

typedef struct batch {
    uint32_t ranks, q_heads, d, n;
    attn_group_entry_t entries[ENTRIES_MAX]; /**< but for `state` */
    attn_node_t nodes[ENTRIES_MAX][CUDA_RANKS][CHUNKS_MAX];
    uint64_t state[CUDA_RANKS][ENTRIES_MAX]; /**< the first of an entry on a rank */
    uint64_t states[CUDA_RANKS];             /**< of a rank */
    uint64_t rows;
} batch_t;

/** A state of a row in the tree. */
typedef struct leaf {
    uint64_t key;
    uint32_t rank;
    uint64_t state;
} leaf_t;

uint32_t chance_in(uint32_t low, uint32_t high);
void chance_seed(uint64_t seed);

/** Chunks are placed by turns, at random, or all on one rank. */
void make_batch(batch_t *b, uint32_t ranks, uint32_t q_heads, uint32_t d);

/** The entries as a rank gives them to cuda_exchange_plan(). */
void batch_of(const batch_t *b, uint32_t me, uint64_t half, attn_group_entry_t *entries,
              cuda_exchange_batch_t *batch);

/** All states of a row of all, ascending in key. Returns how many. */
uint32_t leaves_of(const batch_t *b, uint64_t row, leaf_t *leaves);

#endif
