/* ucx_asks_int.h: what ucx_asks.c (what is asked, over memory) and ucx_asks_far.c (over messages)
 * share. */
#ifndef ATTN_RPC_UCX_ASKS_INT_H
#define ATTN_RPC_UCX_ASKS_INT_H

#include "rpc/ucx_int.h"

#include <pthread.h>

typedef struct ucx_asks_far ucx_asks_far_t; /* a client's port, and who wakes for it */

struct ucx_asks {
    rpc_client_t *rpc;
    pthread_mutex_t lock;
    ucx_node_t *node;     /* made with the first peer of shared memory */
    ucx_asks_far_t *fars; /* a port of messages for each choice of devices; under the lock */
    atomic_uint waiting;
    atomic_uint greeting; /* peers whose hello is not answered */
    uint32_t unattended;  /* of the waiting ones; under the lock */
    ucx_ask_t *first;     /* the waiting ones, the oldest first; under the lock */
    ucx_ask_t **end;      /* where the next one goes */
    ucx_ask_t *calling;   /* whose answered() runs */
    ucx_peer_t *peers;
    bool dozing;      /* a thread sleeps in the queue, or is about to */
    uint64_t dropped; /* messages that were no answers; under the lock */
};

/* An answer whose data is on its way. */
typedef struct ucx_arrival {
    ucx_peer_t *peer;
    ucx_head_t *answer; /* in the slab; NULL: none */
    uint64_t sequence;
} ucx_arrival_t;

struct ucx_peer {
    ucx_asks_t *asks;
    ucx_memory_t *memory;
    ucx_card_t *card; /* NULL: of messages */
    uint8_t *at;
    uint64_t bytes, secret;
    uint64_t sequence; /* of the last ask; under the lock, as what follows */
    uint32_t n_places;
    ucx_place_t places[UCX_SESSION_SLOTS_MAX]; /* taken, ascending */
    ucx_peer_t *next, **link;

    /* Of messages. */
    ucx_asks_far_t *far;
    ucx_way_t *way;
    ucx_head_t hello; /* as it is sent */
    atomic_bool greeted;
    bool broken; /* nothing comes any more, because ... */
    char why[96];
    ucx_arrival_t arrivals[UCX_SESSION_SLOTS_MAX];
};

/* ---- ucx_asks_far.c ---- */

/** The devices that messages to a worker may use, as UCX names them. Asks the system's resolver.
 * @param address  the worker's, as gRPC has it; NULL: not known
 * @return ATTN_ERR_UNSUPPORTED  none is known to lead there, and UCX_NET_DEVICES names none */
attn_status_t ucx_devices_to(const char *address, char *devices, size_t room);

/** Fill the rest of a peer. */
attn_status_t ucx_asks_far_open(ucx_peer_t *peer, const ucx_offer_t *offer);

/** Close it: its memory goes when UCX lets it go. */
void ucx_asks_far_close(ucx_peer_t *peer);

void ucx_asks_far_destroy(ucx_asks_t *asks); /* all ports */

/* Under the lock. */

/** Take what came. @return whether waiters should look, though no ask was answered */
bool ucx_asks_far_progress(ucx_asks_t *asks);

/** A thread is about to sleep in rpc's queue, or is awake again. */
void ucx_asks_far_sleeps(ucx_asks_t *asks, bool sleeps);

/** @param unattended  nobody looks for the answer, so somebody is to be woken */
void ucx_asks_far_send(ucx_peer_t *peer, const ucx_head_t *request, const uint8_t *data,
                       bool unattended);

#endif
