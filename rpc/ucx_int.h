/* ucx_int.h: what the files of ucx.h share; included nowhere else. */
#ifndef ATTN_RPC_UCX_INT_H
#define ATTN_RPC_UCX_INT_H

#include "rpc/ucx.h"

#include <string.h>

#define UCX_MAGIC UINT64_C(0x31306c7378747461) /* and the layout's version, in its last digits */

/** The first lines of a slab, each of one side alone. */
typedef struct ucx_card {
    /* The server's, never changed: what a client finds when it mapped the right memory. */
    uint64_t magic, secret, bytes;
    uint8_t pad0[UCX_LINE - 24];

    _Atomic uint32_t server_sleeps; /* the client rings after it asked; either clears it */
    uint8_t pad1[UCX_LINE - 4];

    _Atomic uint32_t bell; /* counts the client's rings: a futex of the server's */
    uint8_t pad2[UCX_LINE - 4];

    _Atomic uint32_t client_sleeps; /* the server rings after it answered; either clears it */
    uint8_t pad3[UCX_LINE - 4];
} ucx_card_t;

_Static_assert(sizeof(ucx_card_t) == UCX_SLOTS_FROM, "slots begin where the card ends");

static inline uint64_t
ucx_lines(uint64_t bytes)
{
    return bytes / UCX_LINE * UCX_LINE + (bytes % UCX_LINE != 0) * UCX_LINE;
}

/* The parts of a slot, in bytes from its place's offset; sizes are known to be sane. */
static inline ucx_head_t *
ucx_request_at(uint8_t *slab, const ucx_place_t *place)
{
    return (ucx_head_t *)(void *)(slab + place->offset);
}

static inline uint8_t *
ucx_data_at(uint8_t *slab, const ucx_place_t *place)
{
    return slab + place->offset + UCX_LINE;
}

static inline ucx_head_t *
ucx_answer_at(uint8_t *slab, const ucx_place_t *place)
{
    return (ucx_head_t *)(void *)(ucx_data_at(slab, place) + ucx_lines(place->in));
}

static inline char *
ucx_sentence_at(uint8_t *slab, const ucx_place_t *place)
{
    return (char *)ucx_answer_at(slab, place) + UCX_LINE;
}

static inline uint8_t *
ucx_answer_data_at(uint8_t *slab, const ucx_place_t *place)
{
    return (uint8_t *)ucx_sentence_at(slab, place) + UCX_SENTENCE_ROOM;
}

/* What was written is seen by others before what is read next. ThreadSanitizer knows no fences; it
 * sees no race here, since each side writes its own lines. */
static inline void
ucx_fence(void)
{
#ifdef __SANITIZE_THREAD__
    __sync_synchronize();
#else
    atomic_thread_fence(memory_order_seq_cst);
#endif
}

/** Call the kernel's futex for memory that other processes have, too. */
void ucx_futex_wake(_Atomic uint32_t *word);

/* ---- ucx_map.c, or ucx_none.c ---- */

typedef struct ucx_memory ucx_memory_t; /* a slab: allocated here, or mapped */

/** Allocate zeroed memory that others can map. @return ATTN_ERR_EXHAUSTED */
attn_status_t ucx_memory_create(ucx_node_t *node, uint64_t bytes, ucx_memory_t **memory_p);

/** Say how it is mapped: address, key, base and bytes of an offer; pointers are the memory's. */
void ucx_memory_offer(const ucx_memory_t *memory, ucx_offer_t *offer);

/** Map what was offered. @return ATTN_ERR_UNSUPPORTED */
attn_status_t ucx_memory_map(ucx_node_t *node, const ucx_offer_t *offer, ucx_memory_t **memory_p);

uint8_t *ucx_memory_at(const ucx_memory_t *memory);
void ucx_memory_free(ucx_memory_t *memory); /* NULL is allowed */

#endif
