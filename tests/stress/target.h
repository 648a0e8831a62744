/*
 * target.h: one way to the service: libattn over a cluster (direct), libattn with the engine
 * inside (inproc), or a thin client through the coordinator's front door.
 */
#ifndef ATTN_TESTS_STRESS_TARGET_H
#define ATTN_TESTS_STRESS_TARGET_H

#include "client/door.h"

typedef enum target_kind { TARGET_DIRECT, TARGET_THIN, TARGET_INPROC, TARGET_KINDS } target_kind_t;

extern const char *const target_names[TARGET_KINDS];

typedef struct target {
    target_kind_t kind;
    uint32_t timeout_ms;
    attn_client_t *client;
    attn_cache_t *cache;
    door_t *door;
    door_cache_t *door_cache;
} target_t;

typedef struct target_step {
    attn_step_t *step;
    door_step_t *door;
} target_step_t;

/** Tensors of one layer, packed; NULL as in attn_step_run(). */
typedef struct target_run {
    uint32_t layer;
    const void *q, *k, *v;
    void *o;
    float *lse;
    const attn_lists_t *lists; /* of this run */
    bool submit;               /* direct: attn_step_submit() and wait for its completion */
} target_run_t;

/** Connect and open the cache. Whatever fails, nothing is left open. transport is of direct ones.
 */
attn_status_t target_open(target_t *target, target_kind_t kind, const char *address,
                          const char *name, uint32_t timeout_ms, attn_transport_t transport,
                          const char *cache, const attn_geometry_t *geometry);
void target_close(target_t *target);

/** Layers that a direct one asked for since it was opened, by transport; zeros of other kinds. */
void target_runs(target_t *target, uint64_t *ucx, uint64_t *grpc);

attn_status_t target_create(target_t *target, attn_seq_t *seq);
attn_status_t target_fork(target_t *target, attn_seq_t seq, uint64_t length, attn_seq_t *fork);
attn_status_t target_truncate(target_t *target, attn_seq_t seq, uint64_t length);
attn_status_t target_free(target_t *target, attn_seq_t seq);
attn_status_t target_describe(target_t *target, attn_seq_t seq, attn_seq_info_t *info);
attn_status_t target_export(target_t *target, attn_seq_t seq, const attn_export_t *what, void *k,
                            void *v);

attn_status_t target_begin(target_t *target, const attn_batch_t *batch, bool stream,
                           target_step_t *step);
attn_status_t target_run(target_t *target, target_step_t *step, const attn_batch_t *batch,
                         const target_run_t *run);
/** NULL accepts all. OK: the step is gone. */
attn_status_t target_commit(target_step_t *step, const attn_commit_t *what);
void target_abort(target_step_t *step);

#endif
