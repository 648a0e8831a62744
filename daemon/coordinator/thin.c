#include "daemon/coordinator/thin_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/process.h"

#include <stdio.h>
#include <stdlib.h>

#define DEFAULT_TIMEOUT_MS 60000u
#define CACHE_IDLE_NS (UINT64_C(10000) * ATTN_NS_PER_MS)

/* ---- finding steps and remembering ended ones ---- */

/* Under the lock. */
static void
ended_add(thin_t *thin, uint64_t id, bool committed, const char *reason)
{
    thin_ended_t *ended = &thin->ended[thin->n_ended % THIN_ENDED];

    if (thin->n_ended++ >= THIN_ENDED && table_has(hh, ended)) {
        HASH_DELETE(hh, thin->ended_by_id, ended);
    }
    ended->id        = id;
    ended->committed = committed;
    snprintf(ended->reason, sizeof(ended->reason), "%s", reason);
    HASH_ADD(hh, thin->ended_by_id, id, sizeof(ended->id), ended);
}

/* Why there is no such step. Under the lock. */
static attn_status_t
step_gone(const thin_t *thin, uint64_t id, bool *committed_p)
{
    const thin_ended_t *ended;

    HASH_FIND(hh, thin->ended_by_id, &id, sizeof(id), ended);
    *committed_p = ended != NULL && ended->committed;
    if (ended == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "no step %016llx here", (unsigned long long)id);
    }
    if (ended->committed) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "step %016llx was committed", (unsigned long long)id);
    }
    return attn_fail(ATTN_ERR_ABORTED, "step %016llx was aborted: %s", (unsigned long long)id,
                     ended->reason);
}

/* Under the lock, which is let go. */
static void
step_unref(thin_t *thin, thin_step_t *step)
{
    bool last = --step->references == 0;

    pthread_mutex_unlock(&thin->lock);
    if (last) {
        free(step);
    }
}

/* Have the step to oneself: give it back with step_leave() or step_end(). */
static attn_status_t
step_enter(thin_t *thin, uint64_t id, thin_step_t **step_p, bool *committed_p)
{
    thin_step_t *step;
    attn_status_t status;

    pthread_mutex_lock(&thin->lock);
    HASH_FIND(hh, thin->steps, &id, sizeof(id), step);
    if (step == NULL) {
        status = step_gone(thin, id, committed_p);
        pthread_mutex_unlock(&thin->lock);
        return status;
    }
    step->references++;
    while (step->busy) {
        pthread_cond_wait(&thin->idle, &thin->lock);
    }
    if (step->ended) {
        status = step_gone(thin, id, committed_p);
        step_unref(thin, step);
        return status;
    }
    step->busy = true;
    pthread_mutex_unlock(&thin->lock);
    *step_p = step;
    return ATTN_OK;
}

static void
step_leave(thin_t *thin, thin_step_t *step)
{
    pthread_mutex_lock(&thin->lock);
    step->busy = false;
    pthread_cond_broadcast(&thin->idle);
    step_unref(thin, step);
}

/* The step of libattn has ended. */
static void
step_end(thin_t *thin, thin_step_t *step, bool committed, const char *reason)
{
    thin_cache_leave(thin, step->cache);
    pthread_mutex_lock(&thin->lock);
    HASH_DEL(thin->steps, step);
    ended_add(thin, step->id, committed, reason);
    if (committed) {
        thin->counts.committed++;
    } else {
        thin->counts.aborted[engine_abort_of(reason)]++;
    }
    step->ended = true;
    step->busy  = false;
    step->references--; /* the table's */
    pthread_cond_broadcast(&thin->idle);
    step_unref(thin, step);
}

/* An operation found the step aborted: by its deadline, or with a lost worker. */
static attn_status_t
step_lost(thin_t *thin, thin_step_t *step)
{
    char reason[THIN_REASON_MAX];

    snprintf(reason, sizeof(reason), "%s", attn_last_error());
    attn_step_abort(step->step);
    step_end(thin, step, false, reason);
    return attn_fail(ATTN_ERR_ABORTED, "%s", reason);
}

/* ---- operations ---- */

static void
step_fill(thin_step_t *step, const attn_batch_t *batch, uint32_t timeout_ms)
{
    uint64_t q, k, v, o, lse;

    client_step_sizes(step->step, &q, &k, &v, &o, &lse);
    step->id       = process_random();
    step->n        = batch->n;
    step->q_dtype  = batch->q_dtype;
    step->o_dtype  = batch->o_dtype != ATTN_DTYPE_NONE ? batch->o_dtype : batch->q_dtype;
    step->kv_dtype = attn_cache_geometry(step->cache->cache)->kv_dtype;
    step->o_bytes  = o;
    step->want_lse = lse > 0;
    step->sizes    = (steps_sizes_t){.q = q, .k = k, .v = v, .answer = o + lse};
    step->deadline_ns =
        attn_now_ns() + (timeout_ms > 0 ? timeout_ms : DEFAULT_TIMEOUT_MS) * ATTN_NS_PER_MS;
    step->references = 1;
}

static attn_status_t
begin_on(thin_t *thin, thin_cache_t *cache, const Attn__V1__BeginStepRequest *request,
         uint64_t *id_p)
{
    wire_block_t block = {0};
    attn_batch_t batch;
    thin_step_t *step    = calloc(1, sizeof(*step));
    attn_status_t status = step != NULL ? wire_begin_decode(&block, request, &batch)
                                        : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");

    if (status == ATTN_OK) {
        step->cache = cache;
        status      = attn_step_begin(cache->cache, &batch, &step->step);
    }
    if (status != ATTN_OK) {
        free(step);
    } else {
        step_fill(step, &batch, request->timeout_ms);
        *id_p = step->id;
        pthread_mutex_lock(&thin->lock);
        HASH_ADD(hh, thin->steps, id, sizeof(step->id), step);
        bool added = table_has(hh, step);
        thin->counts.begun += added;
        pthread_mutex_unlock(&thin->lock);
        if (!added) {
            attn_step_abort(step->step);
            free(step);
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
        }
    }
    wire_free(&block);
    return status;
}

static attn_status_t
op_begin(void *service, const ProtobufCMessage *request, steps_begun_t *begun)
{
    const Attn__V1__BeginStepRequest *r = (const Attn__V1__BeginStepRequest *)request;
    thin_t *thin                        = service;
    thin_cache_t *cache;

    if (r->timeout_ms > ENGINE_TIMEOUT_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "timeout_ms is %u: at most %u", r->timeout_ms,
                         ENGINE_TIMEOUT_MS_MAX);
    }
    attn_status_t status = thin_cache_enter(thin, r->cache_id, &cache);
    if (status != ATTN_OK) {
        return status;
    }
    status = begin_on(thin, cache, r, &begun->step_id);
    if (status != ATTN_OK) {
        thin_cache_leave(thin, cache);
        return status;
    }
    attn__v1__begin_step_reply__init(&begun->reply.thin);
    begun->reply.thin.step_id = begun->step_id;
    return ATTN_OK;
}

static attn_status_t
op_sizes(void *service, uint64_t id, steps_sizes_t *sizes)
{
    thin_t *thin         = service;
    attn_status_t status = ATTN_OK;
    thin_step_t *step;
    bool committed;

    pthread_mutex_lock(&thin->lock);
    HASH_FIND(hh, thin->steps, &id, sizeof(id), step);
    if (step != NULL) {
        *sizes = step->sizes;
    } else {
        status = step_gone(thin, id, &committed);
    }
    pthread_mutex_unlock(&thin->lock);
    return status;
}

/* A run's lists by entry; *lists_p is NULL if it has none. */
static attn_status_t
run_lists(const thin_step_t *step, const steps_layer_t *l, attn_lists_t **lists_p)
{
    if (l->n_lists == 0) {
        return ATTN_OK;
    }
    attn_lists_t *lists = calloc(step->n, sizeof(*lists));
    *lists_p            = lists;
    if (lists == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the lists of a run");
    }
    for (uint32_t i = 0; i < l->n_lists; i++) {
        const engine_lists_t *from = &l->lists[i];
        if (from->entry >= step->n || (i > 0 && from->entry <= l->lists[i - 1].entry) ||
            from->n_lists == 0) {
            return attn_fail(
                ATTN_ERR_INVALID,
                "lists[%u] is of entry %u, with %u lists: entries ascend, are below %u, "
                "and have lists",
                i, from->entry, from->n_lists, step->n);
        }
        lists[from->entry] =
            (attn_lists_t){.n_lists = from->n_lists, .indptr = from->indptr, .pages = from->pages};
    }
    return ATTN_OK;
}

static attn_status_t
op_run(void *service, const steps_layer_t *l)
{
    thin_t *thin = service;
    thin_step_t *step;
    bool committed;

    attn_status_t status = step_enter(thin, l->step_id, &step, &committed);
    if (status != ATTN_OK) {
        return status;
    }
    attn_tensor_t q = {.data = (void *)l->q, .dtype = step->q_dtype};
    attn_tensor_t k = {.data = (void *)l->k, .dtype = step->kv_dtype};
    attn_tensor_t v = {.data = (void *)l->v, .dtype = step->kv_dtype};
    attn_tensor_t o = {.data = l->answer, .dtype = step->o_dtype};
    float *lse      = NULL;
    if (step->want_lse && l->answer != NULL) {
        lse = (float *)(void *)((uint8_t *)l->answer + step->o_bytes);
    }
    attn_lists_t *lists = NULL;
    status              = run_lists(step, l, &lists);
    if (status == ATTN_OK) {
        status = attn_step_run_with(step->step, &(attn_run_t){.size  = sizeof(attn_run_t),
                                                              .layer = l->layer,
                                                              .q     = l->q != NULL ? &q : NULL,
                                                              .k     = l->k != NULL ? &k : NULL,
                                                              .v     = l->v != NULL ? &v : NULL,
                                                              .o   = l->answer != NULL ? &o : NULL,
                                                              .lse = lse,
                                                              .lists = lists});
    }
    free(lists);
    if (status == ATTN_ERR_ABORTED) {
        return step_lost(thin, step);
    }
    *l->compute_ns = attn_step_compute_ns(step->step);
    step_leave(thin, step);
    return status;
}

static attn_status_t
op_commit(void *service, uint64_t id, const engine_commit_t *commit)
{
    thin_t *thin = service;
    thin_step_t *step;
    bool committed = false;

    attn_status_t status = step_enter(thin, id, &step, &committed);
    if (status != ATTN_OK) {
        return committed ? ATTN_OK : status;
    }
    if (commit->accepted != NULL && commit->n != step->n) {
        status = attn_fail(ATTN_ERR_INVALID, "accepted has %u numbers: the batch has %u entries",
                           commit->n, step->n);
    } else {
        status = attn_step_commit_with(step->step, &(attn_commit_t){.size = sizeof(attn_commit_t),
                                                                    .accepted = commit->accepted,
                                                                    .path     = commit->path,
                                                                    .n_path   = commit->n_path});
    }
    if (status == ATTN_OK) {
        step_end(thin, step, true, "");
    } else if (status == ATTN_ERR_ABORTED) {
        return step_lost(thin, step);
    } else {
        step_leave(thin, step);
    }
    return status;
}

static attn_status_t
op_abort(void *service, uint64_t id, const char *reason)
{
    thin_t *thin = service;
    thin_step_t *step;
    bool committed;

    if (step_enter(thin, id, &step, &committed) == ATTN_OK) {
        attn_step_abort(step->step);
        step_end(thin, step, false, reason);
    }
    return ATTN_OK;
}

const steps_ops_t thin_ops = {
    .begin  = op_begin,
    .sizes  = op_sizes,
    .run    = op_run,
    .commit = op_commit,
    .abort  = op_abort,
};

/* ---- life ---- */

/* A step past its deadline that nobody works on, entered; or NULL. */
static thin_step_t *
an_overdue_step(thin_t *thin, uint64_t now_ns)
{
    thin_step_t *found = NULL;

    pthread_mutex_lock(&thin->lock);
    for (thin_step_t *step = thin->steps; step != NULL && found == NULL; step = step->hh.next) {
        if (now_ns >= step->deadline_ns && !step->busy) {
            found       = step;
            found->busy = true;
            found->references++;
        }
    }
    pthread_mutex_unlock(&thin->lock);
    return found;
}

void
thin_tick(thin_t *thin, uint64_t now_ns)
{
    thin_step_t *step;

    while ((step = an_overdue_step(thin, now_ns)) != NULL) {
        attn_log(ATTN_LOG_INFO, "thin.overdue", "step=%016llx cache=%llu",
                 (unsigned long long)step->id, (unsigned long long)step->cache->id);
        attn_step_abort(step->step);
        step_end(thin, step, false, ENGINE_BY_DEADLINE);
    }
    thin_caches_sweep(thin, now_ns - CACHE_IDLE_NS);
}

uint32_t
thin_open_steps(thin_t *thin)
{
    pthread_mutex_lock(&thin->lock);
    uint32_t n = HASH_COUNT(thin->steps);
    pthread_mutex_unlock(&thin->lock);
    return n;
}

void
thin_describe(thin_t *thin, engine_steps_t *steps, uint32_t *open_p)
{
    pthread_mutex_lock(&thin->lock);
    *steps  = thin->counts;
    *open_p = HASH_COUNT(thin->steps);
    pthread_mutex_unlock(&thin->lock);
}

attn_status_t
thin_create(attn_client_t *client, thin_t **thin_p)
{
    thin_t *thin = calloc(1, sizeof(*thin));

    if (thin == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the front door");
    }
    thin->client = client;
    pthread_mutex_init(&thin->lock, NULL);
    pthread_cond_init(&thin->idle, NULL);
    *thin_p = thin;
    return ATTN_OK;
}

void
thin_destroy(thin_t *thin)
{
    if (thin == NULL) {
        return;
    }
    while (thin->steps != NULL) {
        op_abort(thin, thin->steps->id, "the coordinator ended");
    }
    thin_caches_sweep(thin, 0);
    HASH_CLEAR(hh, thin->ended_by_id);
    pthread_cond_destroy(&thin->idle);
    pthread_mutex_destroy(&thin->lock);
    free(thin);
}
