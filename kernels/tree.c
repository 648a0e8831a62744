/*
 * The merge tree above leaves, as a binary trie over keys (kernels.h). Chunk numbers are
 * bit-reversed in their lane, so that consecutive chunks fall into far subtrees: with
 * chunk c on worker c mod 2^k every worker owns one whole subtree.
 */
#include "kernels/kernels.h"

#include <assert.h>
#include <stdlib.h>

#define LANE_BITS 6u
#define LANE_SHIFT (32u - LANE_BITS)
#define ROOT_LEVEL 32u

static uint32_t
bit_reverse_6(uint32_t lane)
{
    uint32_t swapped =
        (lane & 0x15u) << 1 | (lane >> 1 & 0x15u); /* bits in pairs, then the pairs */
    return (swapped & 0x03u) << 4 | (swapped & 0x0cu) | swapped >> 4;
}

uint32_t
attn_tree_chunk(uint32_t key)
{
    return (key & ((1u << LANE_SHIFT) - 1)) * 64u + bit_reverse_6(key >> LANE_SHIFT);
}

uint32_t
attn_tree_lca(uint32_t key_a, uint32_t key_b)
{
    assert(key_a != key_b);
    return 32u - (uint32_t)__builtin_clz(key_a ^ key_b);
}

static int
by_index(const void *a, const void *b)
{
    uint32_t x = ((const attn_node_t *)a)->index, y = ((const attn_node_t *)b)->index;
    return x < y ? -1 : x > y;
}

/* First i with nodes[i].index >= key. */
static uint32_t
lower_bound(const attn_node_t *nodes, uint32_t n, uint32_t key)
{
    uint32_t low = 0, high = n;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (nodes[middle].index < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/*
 * While the frontier is looked for, `index` holds a key, and `level` two numbers: the
 * level of the lowest node that has both this key and a foreign one to its left, and
 * likewise to its right; 33 if there is none.
 */
#define NO_LEVEL 33u

static uint32_t
left_of(attn_node_t node)
{
    return node.level & 0xffu;
}
static uint32_t
right_of(attn_node_t node)
{
    return node.level >> 8;
}

static void
mark_foreign_neighbours(attn_node_t *nodes, uint32_t n, uint32_t foreign)
{
    uint32_t at = lower_bound(nodes, n, foreign);
    if (at < n) {
        uint32_t level = attn_tree_lca(foreign, nodes[at].index);
        if (level < left_of(nodes[at])) {
            nodes[at].level = right_of(nodes[at]) << 8 | level;
        }
    }
    if (at > 0) {
        uint32_t level = attn_tree_lca(foreign, nodes[at - 1].index);
        if (level < right_of(nodes[at - 1])) {
            nodes[at - 1].level = level << 8 | left_of(nodes[at - 1]);
        }
    }
}

/* A key with no foreign one between it and its neighbour meets the neighbour's foreign key. */
static void
spread_levels(attn_node_t *nodes, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        uint32_t beyond = left_of(nodes[i - 1]),
                 to     = attn_tree_lca(nodes[i - 1].index, nodes[i].index);
        uint32_t level  = beyond > to ? beyond : to;
        if (left_of(nodes[i]) == NO_LEVEL && beyond != NO_LEVEL) {
            nodes[i].level = right_of(nodes[i]) << 8 | level;
        }
    }
    for (uint32_t i = n - 1; i-- > 0;) {
        uint32_t beyond = right_of(nodes[i + 1]),
                 to     = attn_tree_lca(nodes[i].index, nodes[i + 1].index);
        uint32_t level  = beyond > to ? beyond : to;
        if (right_of(nodes[i]) == NO_LEVEL && beyond != NO_LEVEL) {
            nodes[i].level = level << 8 | left_of(nodes[i]);
        }
    }
}

uint32_t
attn_tree_frontier(const uint32_t *mine, uint32_t n_mine, const uint32_t *others, uint32_t n_others,
                   attn_node_t *nodes)
{
    if (n_mine == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < n_mine; i++) {
        nodes[i] =
            (attn_node_t){.level = NO_LEVEL << 8 | NO_LEVEL, .index = attn_tree_key(mine[i])};
    }
    qsort(nodes, n_mine, sizeof(*nodes), by_index);
    for (uint32_t i = 0; i < n_others; i++) {
        mark_foreign_neighbours(nodes, n_mine, attn_tree_key(others[i]));
    }
    spread_levels(nodes, n_mine);

    uint32_t n = 0;
    for (uint32_t i = 0; i < n_mine; i++) {
        uint32_t left = left_of(nodes[i]), right = right_of(nodes[i]);
        uint32_t level = (left < right ? left : right) - 1;
        assert(level <= ROOT_LEVEL);
        uint32_t index = (uint32_t)((uint64_t)nodes[i].index >> level);
        if (n > 0 && nodes[n - 1].level == level && nodes[n - 1].index == index) {
            continue; /* the node of the key before is this key's, too */
        }
        nodes[n++] = (attn_node_t){.level = level, .index = index};
    }
    return n;
}
