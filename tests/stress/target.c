#include "tests/stress/target.h"

#include "base/status.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

const char *const target_names[TARGET_KINDS] = {"direct", "thin", "inproc"};

attn_status_t
target_open(target_t *target, target_kind_t kind, const char *address, const char *name,
            uint32_t timeout_ms, attn_transport_t transport, const char *cache,
            const attn_geometry_t *geometry)
{
    attn_client_options_t options;
    attn_status_t status;

    *target = (target_t){.kind = kind, .timeout_ms = timeout_ms};
    attn_client_options_init(&options);
    options.name       = name;
    options.timeout_ms = timeout_ms;
    options.transport  = transport;
    options.spin_us    = 0; /* many clients share the cores */
    if (kind == TARGET_THIN) {
        status = door_open(address, &options, &target->door);
        if (status == ATTN_OK) {
            status = door_cache_open(target->door, cache, geometry, &target->door_cache);
        }
    } else {
        status = attn_client_open(address, &options, &target->client);
        if (status == ATTN_OK) {
            status = attn_cache_open(target->client, cache, geometry, &target->cache);
        }
    }
    if (status != ATTN_OK) {
        char sentence[512];
        snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        target_close(target);
        return attn_fail(status, "%s", sentence);
    }
    return ATTN_OK;
}

void
target_close(target_t *target)
{
    door_cache_close(target->door_cache);
    door_close(target->door);
    attn_cache_close(target->cache);
    attn_client_close(target->client);
    memset(target, 0, sizeof(*target));
}

void
target_runs(target_t *target, uint64_t *ucx, uint64_t *grpc)
{
    attn_links_info_t links;

    *ucx = *grpc = 0;
    if (target->kind == TARGET_DIRECT && attn_client_links(target->client, &links) == ATTN_OK) {
        for (uint32_t i = 0; i < links.n_links; i++) {
            *ucx += links.links[i].runs_ucx;
            *grpc += links.links[i].runs_grpc;
        }
        attn_links_info_free(&links);
    }
}

/* ---- sequences ---- */

attn_status_t
target_create(target_t *target, attn_seq_t *seq)
{
    return target->kind == TARGET_THIN ? door_seq_create(target->door_cache, seq)
                                       : attn_seq_create(target->cache, NULL, seq);
}

attn_status_t
target_fork(target_t *target, attn_seq_t seq, uint64_t length, attn_seq_t *fork)
{
    return target->kind == TARGET_THIN ? door_seq_fork(target->door_cache, seq, length, fork)
                                       : attn_seq_fork(target->cache, seq, length, fork);
}

attn_status_t
target_truncate(target_t *target, attn_seq_t seq, uint64_t length)
{
    return target->kind == TARGET_THIN ? door_seq_truncate(target->door_cache, seq, length)
                                       : attn_seq_truncate(target->cache, seq, length);
}

attn_status_t
target_free(target_t *target, attn_seq_t seq)
{
    return target->kind == TARGET_THIN ? door_seq_free(target->door_cache, seq)
                                       : attn_seq_free(target->cache, seq);
}

attn_status_t
target_describe(target_t *target, attn_seq_t seq, attn_seq_info_t *info)
{
    return target->kind == TARGET_THIN ? door_seq_describe(target->door_cache, seq, info)
                                       : attn_seq_describe(target->cache, seq, info);
}

attn_status_t
target_export(target_t *target, attn_seq_t seq, const attn_export_t *what, void *k, void *v)
{
    return target->kind == TARGET_THIN ? door_seq_export(target->door_cache, seq, what, k, v)
                                       : attn_seq_export(target->cache, seq, what, k, v);
}

/* ---- steps ---- */

attn_status_t
target_begin(target_t *target, const attn_batch_t *batch, bool stream, target_step_t *step)
{
    *step = (target_step_t){0};
    return target->kind == TARGET_THIN
               ? door_step_begin(target->door_cache, batch, stream, &step->door)
               : attn_step_begin(target->cache, batch, &step->step);
}

/* A completion that is waited for. */
typedef struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint32_t completions;
    attn_status_t status;
    char sentence[512];
} waiter_t;

static void
on_done(void *arg, attn_status_t status, const char *error)
{
    waiter_t *w = arg;

    pthread_mutex_lock(&w->lock);
    w->completions++;
    w->status = status;
    snprintf(w->sentence, sizeof(w->sentence), "%s", error);
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

static attn_status_t
submit_and_wait(attn_step_t *step, const attn_run_t *run)
{
    waiter_t w           = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
    attn_status_t status = attn_step_submit_with(step, run, on_done, &w);

    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&w.lock);
    while (w.completions == 0) {
        pthread_cond_wait(&w.wake, &w.lock);
    }
    pthread_mutex_unlock(&w.lock);
    return w.status == ATTN_OK ? ATTN_OK : attn_fail(w.status, "%s", w.sentence);
}

attn_status_t
target_run(target_t *target, target_step_t *step, const attn_batch_t *batch,
           const target_run_t *run)
{
    if (target->kind == TARGET_THIN) {
        return door_step_run(step->door, run->layer, run->q, run->k, run->v, run->o, run->lse,
                             run->lists);
    }
    attn_dtype_t o_dtype    = batch->o_dtype != ATTN_DTYPE_NONE ? batch->o_dtype : batch->q_dtype;
    attn_dtype_t kv         = attn_cache_geometry(target->cache)->kv_dtype;
    attn_tensor_t q         = {.data = (void *)run->q, .dtype = batch->q_dtype};
    attn_tensor_t k         = {.data = (void *)run->k, .dtype = kv};
    attn_tensor_t v         = {.data = (void *)run->v, .dtype = kv};
    attn_tensor_t o         = {.data = run->o, .dtype = o_dtype};
    const attn_tensor_t *tq = run->q != NULL ? &q : NULL, *tk = run->k != NULL ? &k : NULL,
                        *tv = run->v != NULL ? &v : NULL, *to = run->q != NULL ? &o : NULL;
    attn_run_t what = {.size  = sizeof(what),
                       .layer = run->layer,
                       .q     = tq,
                       .k     = tk,
                       .v     = tv,
                       .o     = to,
                       .lse   = run->lse,
                       .lists = run->lists};
    return run->submit ? submit_and_wait(step->step, &what) : attn_step_run_with(step->step, &what);
}

attn_status_t
target_commit(target_step_t *step, const attn_commit_t *what)
{
    attn_status_t status = step->door != NULL ? door_step_commit(step->door, what)
                           : what != NULL     ? attn_step_commit_with(step->step, what)
                                              : attn_step_commit(step->step, NULL);

    if (status == ATTN_OK) {
        *step = (target_step_t){0};
    }
    return status;
}

void
target_abort(target_step_t *step)
{
    door_step_abort(step->door);
    attn_step_abort(step->step);
    *step = (target_step_t){0};
}
