/* client_int.h: what the files of libattn share. */
#ifndef ATTN_CLIENT_INT_H
#define ATTN_CLIENT_INT_H

#include "balancer/split.h"
#include "base/table.h"
#include "client/client.h"
#include "client/control.h"
#include "client/groups.h"

#include <pthread.h>
#include <stdatomic.h>

#define CLIENT_ENGINES_MAX 64u

struct attn_client {
    attn_client_options_t options;
    char name[64];

    rpc_client_t *rpc; /* NULL for inproc */
    rpc_tls_t *tls;    /* NULL: plaintext */
    links_t *links;
    groups_t *groups;   /* NULL for inproc */
    cluster_t *cluster; /* NULL: the coordinator's is elsewhere */
    control_t *control;
    bool owns; /* rpc, links and cluster are ours */

    uint32_t n_engines;                    /* inproc */
    engine_t *engines[CLIENT_ENGINES_MAX]; /* owned by links */
    uint32_t worker_of[CLIENT_ENGINES_MAX];

    pthread_mutex_t lock; /* guards steps and stopping */
    pthread_cond_t wake;
    attn_step_t *steps; /* open ones, a list */
    uint32_t round;     /* the housekeeper's, over the steps */
    bool stopping;
    pthread_t housekeeper, keeper;

    attn_gpu_way_t gpu_way; /* settled: not DEFAULT */
    /* With tensors of a GPU: there, copied through the host's memory, copied from GPU to GPU. */
    atomic_uint_fast64_t runs_cuda, runs_staged, runs_mapped;
    atomic_uint_fast64_t steps_grouped, steps_driven;
    enum { DRIVEN_AUTO, DRIVEN_SHARED, DRIVEN_OFF } driven; /* which steps two GPUs may drive */
    struct lanes *lanes;               /* what they are driven with; under lock */
    struct stages_pool *stages;        /* what those are copied with; under lock */
    _Atomic(struct carrier *) carrier; /* NULL: no submitted run needed one yet */
};

/* What the client knows of a sequence: the layout as last told, kept current by its own commits. */
typedef struct cached_layout {
    uint64_t seq; /* key */
    uint64_t epoch;
    uint32_t n_chunks;
    split_chunk_t *chunks;
    UT_hash_handle hh;
} cached_layout_t;

struct attn_cache {
    attn_client_t *client;
    uint64_t id;
    attn_geometry_t geometry;
    void *table;
    bool borrowed;        /* joined by id: not ours to close */
    pthread_mutex_t lock; /* guards layouts */
    cached_layout_t *layouts;
};

uint64_t client_deadline(const attn_client_t *client); /* of a control call */

/** Renew the lease, and tell what runs take. */
attn_status_t client_renew(attn_client_t *client, uint64_t deadline_ns);

/** There is something for the client's threads to do. */
void client_wake(attn_client_t *client);

/** For the caller of a call that moved chunks. */
void client_moved(const cluster_moved_t *from, attn_moved_t *to);

#define CLIENT_MOVE_MS 60000u /* of a call that moves chunks: a large one takes a while */

/* Layouts. Under the cache's lock. */
cached_layout_t *layout_find(attn_cache_t *cache, attn_seq_t seq);
void layout_forget(attn_cache_t *cache, attn_seq_t seq);

/** Fetch the layouts of n sequences anew; bases and tokens as control layout. Takes the lock
 * itself. */
attn_status_t layouts_fetch(attn_cache_t *cache, const attn_seq_t *seqs, const uint64_t *bases,
                            const uint64_t *tokens, uint32_t n, uint64_t deadline_ns);

/* The housekeeper's part of an open step: cancel what is overdue. The functions above
 * step_unreference() are called under client->lock. */
attn_step_t *step_next(attn_step_t *step);
bool step_is_given_up(const attn_step_t *step, const attn_cache_t *cache); /* cache NULL: any */
bool step_is_overdue(const attn_step_t *step, uint64_t now_ns);
void step_end_driven(attn_step_t *step, uint64_t now_ns); /* its waits, if it is overdue */
bool step_look_at(attn_step_t *step, uint32_t round);     /* false: it was in this round already */
void step_reference(attn_step_t *step);
void step_unreference(attn_step_t *step);
void step_cancel_overdue(attn_step_t *step, uint64_t now_ns);

/** The thread that carries copies ends: no step is open. */
void client_carrier_stop(attn_client_t *client);

/** Wait until the steps of the cache that completions aborted are gone. */
void client_await_aborts(attn_client_t *client, const attn_cache_t *cache);

#endif
