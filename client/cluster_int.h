/* cluster_int.h: what the files of the cluster share. */
#ifndef ATTN_CLUSTER_INT_H
#define ATTN_CLUSTER_INT_H

#include "client/cluster.h"
#include "base/table.h"

#include <pthread.h>

#define WORKER_TIMEOUT_MS 2000u /* of a control call to a worker */

typedef struct held_seq {
    uint64_t id;    /* key */
    uint32_t forks; /* calls that are forking it, any number at once; 0: one that changes it */
    UT_hash_handle hh;
} held_seq_t;

typedef struct effect_node {
    dir_effect_t effect;
    struct effect_node *next;
} effect_node_t;

/* A chunk that is being moved. */
typedef struct moving {
    dir_move_t move;
    bool switching; /* its owner may change at any time: nobody is to be told of it */
    struct moving *next;
} moving_t;

struct cluster {
    links_t *links;
    uint64_t start_ns;
    uint64_t lease_ns;
    pthread_mutex_t open_lock; /* one cache is opened or closed at a time; taken before lock */
    pthread_mutex_t lock;      /* guards all below; never held while a worker is asked */
    directory_t *directory;
    uint32_t pinged;        /* workers up to this id were measured */
    uint64_t open_again_ns; /* no region is opened on late workers before: one failed */
    held_seq_t *held;       /* sequences that an operation is changing */
    effect_node_t *effects, **effects_end;
    moving_t *moving;
    uint64_t n_moved;      /* chunks that have changed their owner */
    pthread_cond_t calmer; /* a move has ended, or a sequence was let go */
};

/** The link to a live worker. @return ATTN_ERR_UNAVAILABLE when it is lost */
attn_status_t cluster_link(cluster_t *cluster, uint32_t worker, link_t **link_p);

/** Do what the directory asked for; what fails is kept for the next time. */
void cluster_flush(cluster_t *cluster);

/** Ask the owners about the chunks of n sequences: fills length and generation of those that
 * are not lost. seq != NULL: *in_step_p tells whether a step is open on it anywhere. */
attn_status_t cluster_ask_owners(cluster_t *cluster, uint64_t cache, attn_seq_info_t *infos,
                                 uint32_t n, const attn_seq_t *seq, bool *in_step_p);

uint64_t cluster_worker_deadline(void);

/** Wait until no chunk of these sequences is about to change its owner, for as long as a worker may
 * take to answer. Under the lock, which is given up meanwhile. */
void cluster_await_calm(cluster_t *cluster, const attn_seq_t *seqs, uint32_t n);

/** Does the sequence list the chunk that is being moved? Under the lock. */
bool cluster_lists(const cluster_t *cluster, attn_seq_t seq, const dir_move_t *move);

#endif
