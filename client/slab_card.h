/* slab_card.h: what memory of a worker's GPU that goes with a slab begins with: a client that finds
 * it mapped what was lent to it. Slots begin behind it, as in the slab, and lanes behind those. */
#ifndef ATTN_SLAB_CARD_H
#define ATTN_SLAB_CARD_H

#include "rpc/ucx.h"

#define SLAB_CARD_MAGIC UINT64_C(0x3130757067747461) /* and the layout's version */

typedef struct slab_card {
    uint64_t magic, session, secret, bytes;
} slab_card_t;

/* Behind the slots' part: lanes of steps that two GPUs drive, which steps have one at a time. */
#define SLAB_LANES 4u
#define SLAB_LANE_BYTES (UINT64_C(1) << 20)
#define SLAB_LANE_UNIT 256u /* that the first begins at a multiple of */

/** Where lane i of a slab of so many bytes begins. */
static inline uint64_t
slab_lane_at(uint64_t bytes, uint32_t i)
{
    return (bytes + SLAB_LANE_UNIT - 1) / SLAB_LANE_UNIT * SLAB_LANE_UNIT + i * SLAB_LANE_BYTES;
}

_Static_assert(sizeof(slab_card_t) <= UCX_SLOTS_FROM, "slots begin where the card ends");

#endif
