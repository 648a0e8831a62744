/* thin_int.h: what thin.c (steps) and thin_caches.c share. */
#ifndef ATTN_DAEMON_THIN_INT_H
#define ATTN_DAEMON_THIN_INT_H

#include "daemon/coordinator/thin.h"
#include "base/table.h"

#include <pthread.h>

#define THIN_ENDED 4096u /* ended steps that are remembered */
#define THIN_REASON_MAX 200u

/** A cache that steps here are on, joined once for all of them. */
typedef struct thin_cache {
    uint64_t id;
    attn_cache_t *cache;
    uint32_t users; /* steps; under the lock */
    uint64_t idle_since_ns;
    bool listed; /* in the table; otherwise it goes with its last user */
    UT_hash_handle hh;
} thin_cache_t;

typedef struct thin_step {
    uint64_t id;
    attn_step_t *step;
    thin_cache_t *cache;
    uint32_t n; /* entries */
    attn_dtype_t q_dtype, o_dtype, kv_dtype;
    uint64_t o_bytes;
    bool want_lse;
    steps_sizes_t sizes;
    uint64_t deadline_ns;
    bool busy;           /* somebody works on it */
    bool ended;          /* and out of the table */
    uint32_t references; /* the table's, and of those who wait or work */
    UT_hash_handle hh;
} thin_step_t;

typedef struct thin_ended {
    uint64_t id;
    bool committed;
    char reason[THIN_REASON_MAX];
    UT_hash_handle hh;
} thin_ended_t;

struct thin {
    attn_client_t *client;
    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t idle;  /* a step is no longer busy */
    thin_step_t *steps;
    thin_cache_t *caches;
    thin_ended_t *ended_by_id;
    engine_steps_t counts;
    uint64_t n_ended;
    thin_ended_t ended[THIN_ENDED];
};

/* ---- thin_caches.c ---- */

/** Join, or find it joined; a user more. @return ATTN_ERR_NOT_FOUND */
attn_status_t thin_cache_enter(thin_t *thin, uint64_t id, thin_cache_t **cache_p);
void thin_cache_leave(thin_t *thin, thin_cache_t *cache);
/** Leave those that no step used since then (0: all that none uses). */
void thin_caches_sweep(thin_t *thin, uint64_t unused_since_ns);

#endif
