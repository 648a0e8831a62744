/*
 * lanes.h: how the chunks of a spread sequence are dealt out, for whoever places them and whoever
 * says what that costs.
 */
#ifndef ATTN_BALANCER_LANES_H
#define ATTN_BALANCER_LANES_H

#include "kernels/kernels.h"

#define LANES 64u /* of the merge tree: chunk c is in lane c % LANES */

/** Of `spots` workers, the one that chunk c goes to, but for the sequence's own rotation: lanes in
 * the order of the tree, cut into runs. */
static inline uint32_t
lanes_spot(uint32_t chunk, uint32_t spots)
{
    return (uint32_t)((uint64_t)(attn_tree_key(chunk) >> 26) * spots / LANES);
}

#endif
