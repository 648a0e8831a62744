/* slab_card.h: what memory of a worker's GPU that goes with a slab begins with: a client that finds
 * it mapped what was lent to it. Slots begin behind it, as in the slab. */
#ifndef ATTN_SLAB_CARD_H
#define ATTN_SLAB_CARD_H

#include "rpc/ucx.h"

#define SLAB_CARD_MAGIC UINT64_C(0x3130757067747461) /* and the layout's version */

typedef struct slab_card {
    uint64_t magic, session, secret, bytes;
} slab_card_t;

_Static_assert(sizeof(slab_card_t) <= UCX_SLOTS_FROM, "slots begin where the card ends");

#endif
