#include "tests/exchange/batches.h"

#include <stdlib.h>
#include <string.h>

static uint64_t chance_state = 20261123;

void
chance_seed(uint64_t seed)
{
    chance_state = seed;
}

uint32_t
chance_in(uint32_t low, uint32_t high)
{
    chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
    return low + (uint32_t)((chance_state >> 33) % (high - low + 1));
}

static void
place_chunks(batch_t *b, uint32_t e)
{
    uint32_t mine[CUDA_RANKS][CHUNKS_MAX], n[CUDA_RANKS] = {0};
    uint32_t chunks = chance_in(0, 4) ? chance_in(1, CHUNKS_MAX) : 0, how = chance_in(0, 3);
    uint32_t one = chance_in(0, b->ranks - 1);

    for (uint32_t c = 0; c < chunks; c++) {
        uint32_t rank         = how == 0   ? c % b->ranks
                                : how == 1 ? one
                                : how == 2 ? c * b->ranks / chunks
                                           : chance_in(0, b->ranks - 1);
        mine[rank][n[rank]++] = c * (how == 3 ? 7 : 1);
    }
    for (uint32_t r = 0; r < b->ranks; r++) {
        uint32_t others[CHUNKS_MAX], n_others = 0;
        for (uint32_t o = 0; o < b->ranks; o++) {
            for (uint32_t i = 0; o != r && i < n[o]; i++) {
                others[n_others++] = mine[o][i];
            }
        }
        b->entries[e].n_nodes[r] =
            attn_tree_frontier(mine[r], n[r], others, n_others, b->nodes[e][r]);
        b->entries[e].nodes[r] = b->nodes[e][r];
    }
}

void
make_batch(batch_t *b, uint32_t ranks, uint32_t q_heads, uint32_t d)
{
    *b = (batch_t){.ranks = ranks, .q_heads = q_heads, .d = d, .n = chance_in(1, ENTRIES_MAX)};
    for (uint32_t e = 0; e < b->n; e++) {
        b->entries[e].n_q = chance_in(0, 5) ? 1 : chance_in(1, 3);
        place_chunks(b, e);
        for (uint32_t r = 0; r < ranks; r++) {
            b->state[r][e] = b->states[r];
            b->states[r] += (uint64_t)b->entries[e].n_nodes[r] * b->entries[e].n_q * q_heads;
        }
        b->rows += (uint64_t)b->entries[e].n_q * q_heads;
    }
}

void
batch_of(const batch_t *b, uint32_t me, uint64_t half, attn_group_entry_t *entries,
         cuda_exchange_batch_t *batch)
{
    memcpy(entries, b->entries, b->n * sizeof(*entries));
    for (uint32_t e = 0; e < b->n; e++) {
        entries[e].state = b->state[me][e];
        for (uint32_t r = 0; r < b->ranks; r++) {
            entries[e].nodes[r] = b->nodes[e][r];
        }
    }
    *batch = (cuda_exchange_batch_t){.ranks      = b->ranks,
                                     .me         = me,
                                     .q_heads    = b->q_heads,
                                     .head_dim_v = b->d,
                                     .n          = b->n,
                                     .entries    = entries,
                                     .half       = half};
}

static int
by_key(const void *a, const void *b)
{
    uint64_t x = ((const leaf_t *)a)->key, y = ((const leaf_t *)b)->key;
    return x < y ? -1 : x > y;
}

uint32_t
leaves_of(const batch_t *b, uint64_t row, leaf_t *leaves)
{
    uint32_t e = 0, n = 0;

    while (row >= (uint64_t)b->entries[e].n_q * b->q_heads) {
        row -= (uint64_t)b->entries[e++].n_q * b->q_heads;
    }
    for (uint32_t r = 0; r < b->ranks; r++) {
        for (uint32_t i = 0; i < b->entries[e].n_nodes[r]; i++) {
            attn_node_t node = b->nodes[e][r][i];
            leaves[n++] =
                (leaf_t){(uint64_t)node.index << node.level, r,
                         b->state[r][e] + (uint64_t)i * b->entries[e].n_q * b->q_heads + row};
        }
    }
    qsort(leaves, n, sizeof(*leaves), by_key);
    return n;
}
