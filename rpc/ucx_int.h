/* ucx_int.h: what the files of ucx.h share; included nowhere else. */
#ifndef ATTN_RPC_UCX_INT_H
#define ATTN_RPC_UCX_INT_H

#include "rpc/ucx.h"

#include <string.h>

#define UCX_ADDRESS_MAX 4096u /* bytes of an address or a key, as a peer may tell it */
#define UCX_HELLO                                                                                  \
    (UINT32_C(1) << 30) /* of a message: it is no run, but says that messages come through */

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

/* The parts of a slot, in bytes from its place's offset; sizes are known to be sane. */
static inline ucx_head_t *
ucx_request_at(uint8_t *slab, const ucx_place_t *place)
{
    return (ucx_head_t *)(void *)(slab + place->offset);
}

static inline uint8_t *
ucx_data_at(uint8_t *slab, const ucx_place_t *place)
{
    return slab + ucx_place_in(place);
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
    return slab + ucx_place_out(place);
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

/* ---- messages: ucx_port.c, or ucx_none.c ---- */

typedef struct ucx_port ucx_port_t; /* where messages come in */
typedef struct ucx_way ucx_way_t;   /* out of it, to one other port */

/** A message that its port's user wants. */
typedef struct ucx_coming {
    ucx_way_t
        *way;    /**< to whom it came from: it is not gone before the data is there, or never is */
    uint8_t *to; /**< where the data goes */
    void *what;  /**< the user's, for arrived() */

    /* Filled already: */
    const void *from; /**< the endpoint that it came by; NULL: not told, of what is here whole */
    bool fetched;     /**< its data is to be fetched by that endpoint */
} ucx_coming_t;

/** All are called by ucx_port_progress() or ucx_port_destroy(), with whatever lock their caller
 * has. */
typedef struct ucx_port_user {
    /** A message of so many bytes beside its head. Fill `coming`. @return false: drop it */
    bool (*arrive)(void *arg, const ucx_head_t *head, uint64_t bytes, ucx_coming_t *coming);
    /** Its data is there. @param whole  if not, it broke off, and never will be */
    void (*arrived)(void *arg, void *what, bool whole);
    /** Nothing comes or goes there any more; close it. Not called of one that is being closed. */
    void (*broken)(void *arg, void *whose, const char *why);
    /** Nothing of its user's memory is read or written any more. */
    void (*closed)(void *arg, void *whose);
    void *arg;
} ucx_port_user_t;

/**
 * Make a port. One thread at a time may be in it and its ways.
 * @param devices  of the network, as UCX names them, with commas; "all": as UCX_NET_DEVICES says,
 * or all there are
 * @return ATTN_ERR_UNSUPPORTED
 */
attn_status_t ucx_port_create(const char *devices, const ucx_port_user_t *user,
                              ucx_port_t **port_p);
void ucx_port_destroy(ucx_port_t *port); /* closes its ways; NULL is allowed */

/** Its address, and what kind of messages it understands: address, address_size, version. */
void ucx_port_offer(const ucx_port_t *port, ucx_offer_t *offer);

/** @return whether anything happened */
bool ucx_port_progress(ucx_port_t *port);

/** Is a way being closed? Then make progress now and then, even if nothing comes. */
bool ucx_port_closes(const ucx_port_t *port);

/** Readable when there is something to do, once ucx_port_arm() said true. */
int ucx_port_fd(const ucx_port_t *port);
bool ucx_port_arm(ucx_port_t *port);

/** @return ATTN_ERR_UNSUPPORTED  the address is none, or no transport leads there */
attn_status_t ucx_way_open(ucx_port_t *port, const uint8_t *address, uint64_t size, void *whose,
                           ucx_way_t **way_p);
/** In a while user.closed() is called, whatever becomes of the other side: if what is fetched comes
 * by the way itself (ucx_way_is()). */
void ucx_way_close(ucx_way_t *way);

/** Is it the way that a message came by (ucx_coming_t.from)? UCX pairs the endpoints of two
 * processes in the order in which each made them, so if one was made on one side alone, later ways
 * bring each other's messages, and closing them ends each other's. Such ways are not to be used. */
bool ucx_way_is(const ucx_way_t *way, const void *from);

/** Both the head and the data stay until the other side answered, or closed() was called. */
void ucx_way_send(ucx_way_t *way, const ucx_head_t *head, const uint8_t *data, uint64_t bytes);

/** Messages came and went: by now UCX knows which transport it is. @return its name */
const char *ucx_way_settle(ucx_way_t *way);
const char *ucx_way_name(const ucx_way_t *way); /* "tcp", "rc_mlx5", ...; "" before */

#endif
