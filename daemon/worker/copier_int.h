/* copier_int.h: what copier.c (life, and who copies), copier_out.c (parts that go) and copier_in.c
 * (parts that come) share. */
#ifndef ATTN_DAEMON_COPIER_INT_H
#define ATTN_DAEMON_COPIER_INT_H

#include "base/table.h"
#include "client/slab.h"
#include "daemon/tensors.h"
#include "daemon/worker/copier.h"

#include <pthread.h>
#include <stdatomic.h>

#define COPIER_ADDRESS_ROOM 64u
#define COPIER_DRAINING "draining: this daemon is going down"

/* A worker that we copy from: its connection stays. */
typedef struct copier_peer {
    char address[COPIER_ADDRESS_ROOM]; /* key */
    rpc_channel_t *channel;
    slabs_t *slabs;   /* NULL: over gRPC alone */
    char said[256];   /* why there were no slots, as logged last; under the lock */
    uint32_t users;   /* copies from there, now */
    uint64_t used_ns; /* when the last one ended */
    UT_hash_handle hh;
} copier_peer_t;

typedef struct copier_reader copier_reader_t;

struct copier {
    copier_options_t options;
    rpc_client_t *rpc;
    ucx_asks_t *asks;    /* NULL: copies come over gRPC alone */
    tensors_t *out, *in; /* parts on their way from here, and one of each copy to here */
    job_t waiter;
    atomic_bool draining;
    pthread_mutex_t lock;    /* of all that follows, and so long no reader's call is gone */
    pthread_cond_t let_go;   /* a reader is no longer served */
    char ticket[TICKET_MAX]; /* as set */
    copier_peer_t *peers;
    uint32_t n_copies;
    copier_reader_t *readers;
    bool waiting; /* serve_waiting() runs, or is about to */
    uint64_t turns;
    atomic_uint_fast64_t chunks_in, bytes_in, bytes_in_ucx, failed, corrupt, parts_out, bytes_out;
};

/** What is asked for in a slot: a part of the chunk that the slot was opened for. In the host's
 * byte order, as heads are. The answer is the checksum, in a line of its own, then k, then v. */
typedef struct copier_wish {
    uint32_t layer, first, n, spare;
} copier_wish_t;

/* ---- copier_out.c ---- */

/** The method ExportChunks; its service is a copier_t. */
extern const rpc_method_t copier_method;

void copier_serve_waiting(job_t *job); /* run of the copier's waiter */

/* ---- copier_in.c ---- */

/** Is there still a use for the copy? @return ATTN_ERR_UNAVAILABLE, ATTN_ERR_CANCELLED */
attn_status_t copier_check_wanted(const copier_t *copier, const copier_asker_t *asker);

/** Have all parts of an arrival from a peer that is used. */
attn_status_t copier_pull(copier_t *copier, copier_peer_t *peer, const engine_copy_t *copy,
                          engine_arrival_t *arrival, const copier_asker_t *asker,
                          uint64_t *bytes_p);

#endif
