/* engine_int.h: what the files of engine/ share. Lock order: a step's lock, then the engine's. */
#ifndef ATTN_ENGINE_INT_H
#define ATTN_ENGINE_INT_H

#include "balancer/plan.h"
#include "base/table.h"
#include "engine/engine.h"
#include "engine/rate.h"

#include <pthread.h>
#include <stdatomic.h>

#define ENDED_STEPS 4096u                      /* how many ended steps are remembered */
#define ENGINE_BY_CACHE "its cache was closed" /* why steps end, as those of engine.h */
#define RELEASED_CHUNKS 4096u                  /* and released chunks of a cache */
#define ENGINE_ANSWER_MAX (UINT64_C(1) << 30)  /* bytes of an answer, and of its partials */
#define SPARE_PLANS 8u                         /* of ended steps, kept for their memory ... */
#define SPARE_BYTES (UINT64_C(4) << 20)        /* ... if it is no more than this */

/** The layers that share a plan: equal window and causality. */
typedef struct engine_variant {
    uint64_t window;
    bool causal;
} engine_variant_t;

typedef struct engine_cache {
    uint64_t id; /* key */
    attn_geometry_t geometry;
    void *table;          /* the memory behind geometry.layer_table */
    uint32_t *variant_of; /* [geometry.layers] */
    engine_variant_t *variants;
    uint32_t n_variants;
    uint64_t layer_bytes; /* from one layer's pages to the next layer's */
    kv_region_info_t region;
    uint64_t n_released;
    uint64_t released[RELEASED_CHUNKS]; /* ring of ids */
    bool closing;                       /* for everybody but its steps it is gone: close.c */
    bool left;                          /* to the ticks, which free it */
    UT_hash_handle hh;
} engine_cache_t;

typedef enum step_state {
    STEP_OPEN,
    STEP_COMMITTED,
    STEP_ABORTED,
} step_state_t;

typedef struct engine_group engine_group_t; /* groups.c */

/* A step. `lock` is held through run, commit and abort. What begin made does not change. */
typedef struct engine_step {
    uint64_t id; /* key */
    engine_cache_t *cache;
    kv_step_t *kv;
    pthread_mutex_t lock;
    step_state_t state;  /* under lock */
    uint32_t references; /* under the engine's lock */
    uint64_t deadline_ns;
    uint64_t fingerprint; /* of the batch, to know a repeated begin */

    uint32_t n;
    engine_entry_t *entries;       /* copies, with what they point to */
    void *copies;                  /* the memory of those */
    attn_problem_entry_t *problem; /* [n] */
    attn_kv_run_t *runs;
    attn_plan_t **plans;           /* [cache->n_variants] */
    attn_workspace_t **workspaces; /* [cache->n_variants]; none with on_device */

    bool on_device;
    attn_track_t *track; /* tensors are in the device's memory; under lock */
    bool queued;         /* something was, that asks; under lock */
    bool on_host;        /* runs came with tensors of the host; under lock */
    bool off_host;       /* and not begun on_device, with tensors of the device */
    bool driven;         /* a runner's device brings its layers; under lock and the engine's */
    engine_lane_t lane;  /* by this */
    char ending[128];    /* it is to abort when the device is through: why; else empty */
    bool adrift;         /* so it is, and the ticks look; under the engine's lock */
    uint32_t ticked;     /* the last tick that looked at it; under the engine's lock */

    attn_dtype_t q_dtype, o_dtype;
    engine_sizes_t sizes;
    engine_group_t *group;               /* that merges its partials; under the groups' lock */
    uint64_t own_o, own_lse;             /* bytes of the answer that are not the group's */
    uint64_t n_new_rows;                 /* k, v rows stored here */
    uint32_t *slot_pages, *slot_offsets; /* [n_new_rows] */
    uint64_t *slot_first;                /* [n] of each entry */
    uint8_t *stored;                     /* [layers] */
    uint64_t kv_bytes;                   /* that one run reads */
    UT_hash_handle hh;
} engine_step_t;

typedef struct ended_step {
    uint64_t id;
    step_state_t state;
    char reason[128];
    UT_hash_handle hh;
} ended_step_t;

struct engine {
    attn_backend_t *backend;
    uint32_t ordinal; /* of the device among those of its backend */
    char name[64];
    uint8_t *slab;
    uint64_t slab_bytes;
    uint32_t leaf_few, leaf_many;
    cost_worker_t speed;

    pthread_mutex_t lock; /* guards all below but the counters */
    kv_store_t *store;
    engine_cache_t *caches;
    engine_step_t *steps;
    ended_step_t ended[ENDED_STEPS]; /* ring ... */
    ended_step_t *ended_by_id;       /* ... and its index */
    uint64_t n_ended;
    uint64_t epoch;
    engine_steps_t counts;
    uint32_t ticks;

    engine_rate_t rate; /* of kv_bytes */

    pthread_mutex_t groups_lock; /* innermost; guards groups */
    engine_group_t *groups;

    pthread_mutex_t spare_lock; /* innermost; guards the plans whose memory waits for new ones */
    attn_plan_t *spares[SPARE_PLANS];
    uint32_t n_spares;

    atomic_uint_fast64_t runs, kv_bytes, run_ns;
    atomic_uint_fast64_t run_times[ENGINE_TIMES];
};

engine_cache_t *engine_cache_find(engine_t *engine,
                                  uint64_t cache); /* under the lock; sets the sentence */

void engine_cache_free(engine_cache_t *cache);

/* Is the chunk one of the last that were released? Under the lock. */
bool engine_was_released(const engine_cache_t *cache, uint64_t chunk);

/** One layer's K and V of the cache's region. */
void engine_kv_view(const engine_t *engine, const engine_cache_t *cache, uint32_t layer,
                    attn_kv_t *kv);

/** Check the batch, copy it into the step, and, when kv_step_begin() has made step->kv, lay out the
 * kernels' problem, the slots and the sizes. Under the engine's lock. */
attn_status_t engine_step_check(const engine_cache_t *cache, const engine_batch_t *batch);
attn_status_t engine_step_copy(engine_step_t *step, const engine_batch_t *batch);
void engine_step_layout(engine_step_t *step);
uint64_t engine_batch_fingerprint(const engine_batch_t *batch);

/** A plan and a workspace for each variant of the step's cache: what is made is freed by
 * engine_plans_free() on failure, too. No lock is needed but the step's. */
attn_status_t engine_plans_make(engine_t *engine, engine_step_t *step);
void engine_plans_free(engine_t *engine, engine_step_t *step);

/** Plans kept for their memory go. */
void engine_spares_free(engine_t *engine);

/** Which of the entry's new tokens come here, with their rows: [*first_p, *first_p + returned).
 * With a mask some of them are spare: in no chunk named. Without one *first_p says nothing. */
uint32_t engine_entry_rows(const attn_geometry_t *geometry, const engine_entry_t *e,
                           uint32_t *first_p);

/** Does the new token of that index go to a chunk named here? */
bool engine_entry_owns(const attn_geometry_t *geometry, const engine_entry_t *e, uint32_t token);

/** Are these nodes of the tree, in ascending order, none of which has a part of another? */
attn_status_t engine_nodes_check(const attn_node_t *nodes, uint32_t n);

/** Check the lists that a run brings. */
attn_status_t engine_lists_check(const engine_step_t *step, const engine_lists_t *lists,
                                 uint32_t n);

/* ---- step.c ---- */

/** Find the step and take its lock and a reference: give back with engine_step_leave(). */
attn_status_t engine_step_enter(engine_t *engine, uint64_t id, engine_step_t **step_p);
void engine_step_leave(engine_t *engine, engine_step_t *step);

/** Are these the step's? NULL: the caller knows. @return ATTN_ERR_CONFLICT */
attn_status_t engine_sizes_check(const engine_step_t *step, uint32_t layer,
                                 const engine_sizes_t *sizes);

/** Abort, waiting for the device until until_ns: if it is not through then, the step is adrift
 * until a tick finds it so. */
void engine_step_abort_until(engine_t *engine, uint64_t id, const char *reason, uint64_t until_ns);

/** Count an answer that was `ns` in the making. */
void engine_count_run(engine_t *engine, const engine_step_t *step, uint64_t ns);

/* ---- device.c: under the step's lock ---- */

/** Its track, from its plans. */
attn_status_t engine_track_take(engine_t *engine, engine_step_t *step);

/** What waits for a runner's device ends. Under the step's lock or the engine's. */
void engine_track_interrupt(engine_t *engine, const engine_step_t *step);

/** It is over: wait for what is queued of it, if anything is, and until graphs of it do nothing.
 * False: until_ns came first (0: no wait to speak of). */
bool engine_track_settle(engine_t *engine, engine_step_t *step, uint64_t until_ns);

/** Wait, and see what became of it: which layers are stored. Of a step without a track ATTN_OK. */
attn_status_t engine_track_finish(engine_t *engine, engine_step_t *step);

/** Count what it asked for, now that it is committed. */
void engine_track_count(engine_t *engine, const engine_step_t *step);

/** The track goes to others; it waits for what is queued. */
void engine_track_give(engine_t *engine, engine_step_t *step);

/* ---- close.c ---- */

/** Caches that were closed, and whose last step is over by now, go. */
void engine_caches_tick(engine_t *engine);

/** Wait until all that were closed are gone. */
void engine_caches_wait(engine_t *engine);

/* ---- groups.c ---- */

/** The step has the group of its batch, and the sizes that come of it. Under the step's lock, when
 * it is planned; whatever comes of it, engine_group_give() follows. */
attn_status_t engine_group_take(engine_t *engine, engine_step_t *step, const engine_batch_t *batch);
void engine_group_give(engine_t *engine, engine_step_t *step); /* of one without: nothing */

/** A layer. If it fails the group is to end: the other ranks are where this one is not. Under the
 * step's lock. */
attn_status_t engine_group_run(engine_t *engine, engine_step_t *step, const attn_group_run_t *run);

/** The step is to end: so does its group, if it has one, and the exchange that it may be in. With
 * its lock or without; waits for nobody. */
void engine_group_interrupt(engine_t *engine, engine_step_t *step);

/** No step is open. */
void engine_groups_free(engine_t *engine);

/* ---- commit.c ---- */

/** Check what is to be kept, and count it: here[n]. */
attn_status_t engine_commit_check(const engine_step_t *step, const engine_commit_t *commit,
                                  uint32_t *here);

/** Move the tokens of the paths to their places, all layers. After engine_commit_check(). */
attn_status_t engine_commit_move(engine_t *engine, const engine_step_t *step,
                                 const engine_commit_t *commit);

#endif
