/*
 * step.c: begin, run, commit and abort of one worker's part of a step.
 *
 *     begin  check, reserve pages, copy shared unfilled pages, plan
 *     run    store k, v of the layer (or compare with what is stored), then attend
 *     commit publish the accepted tokens      abort  give everything back
 *
 * An ended step is remembered for a while, so that commit and abort are idempotent and a
 * late run is told why its step is gone.
 */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How long an abort waits for what is queued on the device. */
#define ABORT_WAIT_NS (UINT64_C(1000) * ATTN_NS_PER_MS)

/* ---- finding and ending steps ---- */

/* Under the engine's lock. */
static const ended_step_t *
ended_find(const engine_t *engine, uint64_t id)
{
    ended_step_t *ended;

    HASH_FIND(hh, engine->ended_by_id, &id, sizeof(id), ended);
    return ended;
}

/* Under the engine's lock. */
static void
ended_add(engine_t *engine, uint64_t id, step_state_t state, const char *reason)
{
    ended_step_t *ended = &engine->ended[engine->n_ended % ENDED_STEPS];

    if (engine->n_ended++ >= ENDED_STEPS && table_has(hh, ended)) {
        HASH_DEL(engine->ended_by_id, ended);
    }
    ended->id    = id;
    ended->state = state;
    snprintf(ended->reason, sizeof(ended->reason), "%s", reason);
    HASH_ADD(hh, engine->ended_by_id, id, sizeof(ended->id), ended);
}

/* Free a step that is in no table and that nobody refers to. Its plans went when it ended. */
static void
step_destroy(engine_step_t *step)
{
    free(step->copies);
    pthread_mutex_destroy(&step->lock);
    free(step);
}

static void
step_unref(engine_t *engine, engine_step_t *step)
{
    pthread_mutex_lock(&engine->lock);
    bool last = --step->references == 0;
    pthread_mutex_unlock(&engine->lock);
    if (last) {
        step_destroy(step);
    }
}

const char *const engine_abort_names[ENGINE_ABORTS] = {"client", "stream", "deadline", "cache",
                                                       "other"};

engine_abort_t
engine_abort_of(const char *reason)
{
    static const char *const reasons[ENGINE_ABORT_OTHER] = {ENGINE_BY_CLIENT, ENGINE_BY_STREAM,
                                                            ENGINE_BY_DEADLINE, ENGINE_BY_CACHE};
    uint32_t i                                           = 0;

    while (i < ENGINE_ABORT_OTHER && strcmp(reason, reasons[i]) != 0) {
        i++;
    }
    return (engine_abort_t)i;
}

/* Take the step out of the table and remember how it ended. Under the step's lock. */
static void
step_end(engine_t *engine, engine_step_t *step, step_state_t state, const char *reason)
{
    pthread_mutex_lock(&engine->lock);
    ended_add(engine, step->id, state, reason);
    if (state == STEP_COMMITTED) {
        engine->counts.committed++;
    } else {
        engine->counts.aborted[engine_abort_of(reason)]++;
    }
    HASH_DEL(engine->steps, step);
    step->references--; /* the table's; the caller holds one more */
    step->state = state;
    pthread_mutex_unlock(&engine->lock);
}

/* Abort, unless the device works for the step still at until_ns: then it is refused to everybody
 * from now on, and the next tick tries again. */
static bool
step_abort_locked(engine_t *engine, engine_step_t *step, const char *reason, uint64_t until_ns)
{
    if (step->ending[0] == 0) {
        snprintf(step->ending, sizeof(step->ending), "%s", reason);
    }
    if (!engine_track_settle(engine, step, until_ns)) {
        pthread_mutex_lock(&engine->lock);
        step->deadline_ns = 0;
        step->adrift      = true;
        pthread_mutex_unlock(&engine->lock);
        return false;
    }
    engine_plans_free(engine, step);
    pthread_mutex_lock(&engine->lock);
    kv_step_abort(engine->store, step->kv);
    pthread_mutex_unlock(&engine->lock);
    step_end(engine, step, STEP_ABORTED, step->ending);
    return true;
}

static attn_status_t
step_gone(const engine_t *engine, uint64_t id)
{
    const ended_step_t *ended = ended_find(engine, id);

    if (ended == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "no step %016llx on %s", (unsigned long long)id,
                         engine->name);
    }
    if (ended->state == STEP_COMMITTED) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "step %016llx was committed", (unsigned long long)id);
    }
    return attn_fail(ATTN_ERR_ABORTED, "step %016llx was aborted on %s: %s", (unsigned long long)id,
                     engine->name, ended->reason);
}

/* Find the step, and take a reference and its lock. It may have ended while we waited for that. */
static attn_status_t
step_find(engine_t *engine, uint64_t id, engine_step_t **step_p)
{
    engine_step_t *step;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->lock);
    HASH_FIND(hh, engine->steps, &id, sizeof(id), step);
    if (step == NULL) {
        status = step_gone(engine, id);
    } else {
        step->references++;
    }
    pthread_mutex_unlock(&engine->lock);
    if (status == ATTN_OK) {
        pthread_mutex_lock(&step->lock);
        *step_p = step;
    }
    return status;
}

void
engine_step_leave(engine_t *engine, engine_step_t *step)
{
    pthread_mutex_unlock(&step->lock);
    step_unref(engine, step);
}

attn_status_t
engine_step_enter(engine_t *engine, uint64_t id, engine_step_t **step_p)
{
    engine_step_t *step;
    attn_status_t status = step_find(engine, id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if (step->state == STEP_OPEN && attn_now_ns() >= step->deadline_ns) {
        step_abort_locked(engine, step, ENGINE_BY_DEADLINE, 0);
    }
    if (step->state == STEP_OPEN && step->ending[0] == 0) {
        *step_p = step;
        return ATTN_OK;
    }
    if (step->state == STEP_OPEN) {
        status = attn_fail(ATTN_ERR_ABORTED,
                           "step %016llx was aborted on %s: %s; what was queued for it runs still",
                           (unsigned long long)id, engine->name, step->ending);
    } else { /* it ended while we waited */
        pthread_mutex_lock(&engine->lock);
        status = step_gone(engine, id);
        pthread_mutex_unlock(&engine->lock);
    }
    engine_step_leave(engine, step);
    return status;
}

/* ---- begin ---- */

/* New tokens that come here though their chunks are others'. */
static uint32_t
spare_tokens(const engine_step_t *step, const engine_entry_t *e)
{
    uint32_t first, owned = 0;

    for (uint32_t c = 0; c < e->n_chunks; c++) {
        owned += e->chunks[c].n_new;
    }
    return engine_entry_rows(&step->cache->geometry, e, &first) - owned;
}

/* Reserve pages and lay out the problem. Under the engine's lock. */
static attn_status_t
begin_reserve(engine_t *engine, engine_step_t *step, const engine_batch_t *batch)
{
    kv_step_entry_t *entries = calloc(batch->n, sizeof(*entries));

    if (entries == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step of %u entries", batch->n);
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        entries[i] = (kv_step_entry_t){.seq      = batch->entries[i].seq,
                                       .n_chunks = batch->entries[i].n_chunks,
                                       .chunks   = batch->entries[i].chunks,
                                       .n_spare  = spare_tokens(step, &batch->entries[i])};
    }
    attn_status_t status =
        kv_step_begin(engine->store, batch->cache, batch->step_id, entries, batch->n, &step->kv);
    free(entries);
    if (status == ATTN_OK) {
        step->sizes.lse = batch->want_lse; /* engine_step_layout() makes bytes of it */
        engine_step_layout(step);
    }
    return status;
}

/* Everything that needs the engine's lock. The new step is in the table, and locked, on ATTN_OK. */
static attn_status_t
begin_locked(engine_t *engine, engine_step_t *step, const engine_batch_t *batch)
{
    attn_status_t status;

    step->cache = engine_cache_find(engine, batch->cache);
    if (step->cache == NULL) {
        return ATTN_ERR_NOT_FOUND;
    }
    if ((status = engine_step_check(step->cache, batch)) != ATTN_OK) {
        return status;
    }
    if (ended_find(engine, batch->step_id) != NULL) {
        return attn_fail(ATTN_ERR_EXISTS, "step %016llx was used and has ended: choose another id",
                         (unsigned long long)batch->step_id);
    }
    if ((status = engine_step_copy(step, batch)) != ATTN_OK ||
        (status = begin_reserve(engine, step, batch)) != ATTN_OK) {
        return status;
    }
    step->id          = batch->step_id;
    step->fingerprint = engine_batch_fingerprint(batch);
    step->references  = 2; /* the table's and the caller's */
    HASH_ADD(hh, engine->steps, id, sizeof(step->id), step);
    if (!table_has(hh, step)) {
        kv_step_abort(engine->store, step->kv);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    return ATTN_OK;
}

static attn_status_t
copy_pages(engine_t *engine, engine_step_t *step)
{
    uint32_t n;
    const kv_copy_t *copies = kv_step_copies(step->kv, &n);

    for (uint32_t l = 0; l < step->cache->geometry.layers && n > 0; l++) {
        attn_kv_t kv;
        engine_kv_view(engine, step->cache, l, &kv);
        for (uint32_t i = 0; i < n; i++) {
            attn_status_t status = engine->backend->ops->copy_page(
                engine->backend, &kv, copies[i].from, copies[i].to, copies[i].tokens);
            if (status != ATTN_OK) {
                return status;
            }
        }
    }
    return ATTN_OK;
}

/* Is the step of that id open already? The same batch again is fine. Under the engine's lock. */
static attn_status_t
begin_again(engine_t *engine, const engine_batch_t *batch, engine_sizes_t *sizes, bool *again_p)
{
    engine_step_t *step;

    HASH_FIND(hh, engine->steps, &batch->step_id, sizeof(batch->step_id), step);
    *again_p = step != NULL;
    if (step == NULL) {
        return ATTN_OK;
    }
    if (step->cache->id != batch->cache || engine_step_check(step->cache, batch) != ATTN_OK ||
        step->fingerprint != engine_batch_fingerprint(batch)) {
        return attn_fail(ATTN_ERR_EXISTS, "step %016llx is open with another batch",
                         (unsigned long long)batch->step_id);
    }
    *sizes = step->sizes;
    return ATTN_OK;
}

/* As if begin had never been: the id may be used again. */
static void
begin_undo(engine_t *engine, engine_step_t *step)
{
    engine_plans_free(engine, step);
    pthread_mutex_lock(&engine->lock);
    kv_step_abort(engine->store, step->kv);
    HASH_DEL(engine->steps, step);
    step->references--;
    step->state = STEP_ABORTED;
    pthread_mutex_unlock(&engine->lock);
}

attn_status_t
engine_step_begin(engine_t *engine, const engine_batch_t *batch, engine_sizes_t *sizes)
{
    bool again;
    attn_status_t status = engine_check_epoch(engine, batch->epoch);

    if (status != ATTN_OK) {
        return status;
    }
    engine_step_t *step = calloc(1, sizeof(*step));
    if (step == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    pthread_mutex_init(&step->lock, NULL);
    pthread_mutex_lock(&step->lock); /* nobody runs it before it is planned */

    pthread_mutex_lock(&engine->lock);
    status = begin_again(engine, batch, sizes, &again);
    if (status == ATTN_OK && !again) {
        status = begin_locked(engine, step, batch);
    }
    pthread_mutex_unlock(&engine->lock);
    if (status != ATTN_OK || again) {
        pthread_mutex_unlock(&step->lock);
        step_destroy(step);
        return status;
    }
    if ((status = copy_pages(engine, step)) != ATTN_OK ||
        (status = engine_plans_make(engine, step)) != ATTN_OK ||
        (batch->group != 0 && (status = engine_group_take(engine, step, batch)) != ATTN_OK)) {
        begin_undo(engine, step);
    } else {
        *sizes = step->sizes;
        pthread_mutex_lock(&engine->lock);
        engine->counts.begun++;
        pthread_mutex_unlock(&engine->lock);
    }
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_sizes(engine_t *engine, uint64_t step_id, engine_sizes_t *sizes)
{
    engine_step_t *step;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->lock);
    HASH_FIND(hh, engine->steps, &step_id, sizeof(step_id), step);
    if (step != NULL) {
        *sizes = step->sizes;
    } else {
        status = step_gone(engine, step_id);
    }
    pthread_mutex_unlock(&engine->lock);
    return status;
}

/* ---- run ---- */

static attn_status_t
run_store(engine_t *engine, engine_step_t *step, uint32_t layer, const attn_kv_t *kv, const void *k,
          const void *v)
{
    const attn_backend_ops_t *ops = engine->backend->ops;
    bool equal                    = false;

    if (!step->stored[layer]) {
        attn_status_t status = ops->append(engine->backend, kv, step->slot_pages,
                                           step->slot_offsets, step->n_new_rows, k, v);
        step->stored[layer]  = status == ATTN_OK;
        return status == ATTN_OK ? status
                                 : attn_fail_in(status, "step %016llx, layer %u on %s: ",
                                                (unsigned long long)step->id, layer, engine->name);
    }
    attn_status_t status = ops->compare(engine->backend, kv, step->slot_pages, step->slot_offsets,
                                        step->n_new_rows, k, v, &equal);
    if (status == ATTN_OK && !equal) {
        return attn_fail(
            ATTN_ERR_CONFLICT,
            "step %016llx, layer %u: k, v differ from those stored: abort the step to change them",
            (unsigned long long)step->id, layer);
    }
    return status;
}

/* A layer of a step in a group. Whatever deadline the step has, other ranks are due soon after this
 * one has its states: their parts are like its own. */
static attn_status_t
run_grouped(engine_t *engine, engine_step_t *step, uint32_t layer, const attn_kv_t *kv,
            const void *q, void *answer)
{
    uint32_t variant  = step->cache->variant_of[layer];
    uint64_t until_ns = attn_now_ns() + ENGINE_EXCHANGE_MS * ATTN_NS_PER_MS;
    uint8_t *o = answer, *lse = o + step->sizes.o;
    attn_answer_t to     = {.o_dtype = step->o_dtype,
                            .o       = step->own_o > 0 ? o : NULL,
                            .lse     = step->own_lse > 0 ? (float *)(void *)lse : NULL};
    attn_group_run_t run = {.plan      = step->plans[variant],
                            .kv        = kv,
                            .layer     = &step->cache->geometry.layer_table[layer],
                            .workspace = step->workspaces[variant],
                            .q_dtype   = step->q_dtype,
                            .o_dtype   = step->o_dtype,
                            .q         = q,
                            .answer    = &to,
                            .o         = o + step->own_o,
                            .lse =
                                step->sizes.lse > 0 ? (float *)(void *)(lse + step->own_lse) : NULL,
                            .until_ns = attn_min(step->deadline_ns, until_ns)};

    return engine_group_run(engine, step, &run);
}

static attn_status_t
run_attend(engine_t *engine, engine_step_t *step, uint32_t layer, const attn_kv_t *kv,
           const void *q, void *answer)
{
    const engine_sizes_t *s = &step->sizes;
    uint8_t *at             = answer;
    attn_answer_t to        = {.o_dtype = step->o_dtype};
    attn_status_t status;

    to.o = s->o > 0 ? at : NULL;
    at += s->o;
    to.lse = s->lse > 0 ? (float *)(void *)at : NULL;
    at += s->lse;
    to.e = (int32_t *)(void *)at;
    at += s->states * sizeof(int32_t);
    to.l = (float *)(void *)at;
    at += s->states * sizeof(float);
    to.a = (float *)(void *)at;

    uint32_t variant = step->cache->variant_of[layer];
    if (step->group != NULL) {
        status = run_grouped(engine, step, layer, kv, q, answer);
    } else {
        status = engine->backend->ops->attend(engine->backend, step->plans[variant], kv,
                                              &step->cache->geometry.layer_table[layer], q,
                                              step->q_dtype, step->workspaces[variant], &to);
    }
    if (status != ATTN_OK) {
        return attn_fail_in(status, "step %016llx, layer %u on %s: ", (unsigned long long)step->id,
                            layer, engine->name);
    }
    return ATTN_OK;
}

void
engine_count_run(engine_t *engine, const engine_step_t *step, uint64_t ns)
{
    uint32_t i = 0;

    while (i + 1 < ENGINE_TIMES && ns > ENGINE_TIME_LEAST_NS << i) {
        i++;
    }
    atomic_fetch_add(&engine->runs, 1);
    atomic_fetch_add(&engine->kv_bytes, step->kv_bytes);
    atomic_fetch_add(&engine->run_ns, ns);
    atomic_fetch_add(&engine->run_times[i], 1);
}

static attn_status_t
run_locked(engine_t *engine, engine_step_t *step, uint32_t layer, const void *q, const void *k,
           const void *v, void *answer)
{
    attn_status_t status = ATTN_OK;
    uint64_t start       = attn_now_ns();
    attn_kv_t kv;

    if (layer >= step->cache->geometry.layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", layer,
                         step->cache->geometry.layers);
    }
    if (step->on_device || step->off_host) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the tensors of step %016llx are in the device's memory: all, or none",
                         (unsigned long long)step->id);
    }
    if (step->n_new_rows > 0 && (k == NULL) != (v == NULL)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "layer %u: %s is missing: send k and v together, or none", layer,
                         k == NULL ? "k" : "v");
    }
    step->on_host = true;
    engine_kv_view(engine, step->cache, layer, &kv);
    if (step->n_new_rows > 0 && k != NULL) {
        status = run_store(engine, step, layer, &kv, k, v);
    } else if (step->n_new_rows > 0 && !step->stored[layer]) {
        status = attn_fail(ATTN_ERR_INCOMPLETE, "layer %u has no k, v yet: send them with this run",
                           layer);
    }
    if (status != ATTN_OK || q == NULL || step->sizes.q == 0) {
        return status;
    }
    status = run_attend(engine, step, layer, &kv, q, answer);
    if (status == ATTN_OK) {
        engine_count_run(engine, step, attn_now_ns() - start);
    }
    return status;
}

/* Put the lists of a run in place of those of begin, or those back. Under the step's lock: its runs
 * are taken one at a time, and the plans were made for any lists. */
static void
put_lists(engine_step_t *step, const engine_lists_t *lists, uint32_t n, bool back)
{
    for (uint32_t i = 0; i < n; i++) {
        const engine_entry_t *e       = &step->entries[lists[i].entry];
        attn_problem_entry_t *problem = &step->problem[lists[i].entry];
        problem->n_lists              = back ? e->n_lists : lists[i].n_lists;
        problem->sparse_indptr        = back ? e->sparse_indptr : lists[i].indptr;
        problem->sparse_pages         = back ? e->sparse_pages : lists[i].pages;
    }
}

attn_status_t
engine_sizes_check(const engine_step_t *step, uint32_t layer, const engine_sizes_t *sizes)
{
    return sizes == NULL || (sizes->q == step->sizes.q && sizes->k == step->sizes.k &&
                             sizes->v == step->sizes.v && sizes->answer == step->sizes.answer)
               ? ATTN_OK
               : attn_fail(ATTN_ERR_CONFLICT,
                           "step %016llx became another step while data of layer %u came in",
                           (unsigned long long)step->id, layer);
}

attn_status_t
engine_step_run_lists(engine_t *engine, uint64_t step_id, uint32_t layer, const void *q,
                      const void *k, const void *v, void *answer, const engine_sizes_t *sizes,
                      const engine_lists_t *lists, uint32_t n)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = engine_sizes_check(step, layer, sizes)) == ATTN_OK &&
        (status = engine_lists_check(step, lists, n)) == ATTN_OK) {
        put_lists(step, lists, n, false);
        status = run_locked(engine, step, layer, q, k, v, answer);
        put_lists(step, lists, n, true);
    }
    if (status != ATTN_OK && q != NULL) { /* other ranks wait for this one */
        engine_group_interrupt(engine, step);
    }
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_run(engine_t *engine, uint64_t step_id, uint32_t layer, const void *q, const void *k,
                const void *v, void *answer, const engine_sizes_t *sizes)
{
    return engine_step_run_lists(engine, step_id, layer, q, k, v, answer, sizes, NULL, 0);
}

/* ---- commit and abort ---- */

static bool
was_committed(engine_t *engine, uint64_t id)
{
    pthread_mutex_lock(&engine->lock);
    const ended_step_t *ended = ended_find(engine, id);
    bool was                  = ended != NULL && ended->state == STEP_COMMITTED;
    pthread_mutex_unlock(&engine->lock);
    return was;
}

attn_status_t
engine_step_commit_paths(engine_t *engine, uint64_t step_id, const engine_commit_t *commit)
{
    engine_step_t *step;

    attn_status_t status = engine_step_enter(engine, step_id, &step);
    if (status != ATTN_OK) {
        return was_committed(engine, step_id) ? ATTN_OK : status; /* before, or while we waited */
    }
    uint32_t *here = calloc(step->n, sizeof(*here));
    status         = here != NULL
                         ? engine_track_finish(engine, step)
                         : attn_fail(ATTN_ERR_NO_MEMORY, "no memory to commit %u entries", step->n);
    if (status == ATTN_OK) {
        status = engine_commit_check(step, commit, here);
    }
    if (status == ATTN_OK && (status = engine_commit_move(engine, step, commit)) != ATTN_OK) {
        /* Its new tokens may be torn: nobody may commit them any more. */
        step_abort_locked(engine, step, "its commit failed", 0);
    } else if (status == ATTN_OK) {
        engine_track_count(engine, step);
        engine_plans_free(engine, step);
        pthread_mutex_lock(&engine->lock);
        status = kv_step_commit(engine->store, step->kv, here);
        pthread_mutex_unlock(&engine->lock);
        assert(status == ATTN_OK); /* commit_check() refused all that the store would */
        step_end(engine, step, STEP_COMMITTED, "");
    }
    free(here);
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_commit(engine_t *engine, uint64_t step_id, const uint32_t *accepted,
                   uint32_t n_accepted)
{
    return engine_step_commit_paths(engine, step_id,
                                    &(engine_commit_t){.accepted = accepted, .n = n_accepted});
}

void
engine_step_interrupt(engine_t *engine, uint64_t id)
{
    engine_step_t *step;

    pthread_mutex_lock(&engine->lock);
    HASH_FIND(hh, engine->steps, &id, sizeof(id), step);
    if (step != NULL) {
        engine_group_interrupt(engine, step);
        engine_track_interrupt(engine, step);
    }
    pthread_mutex_unlock(&engine->lock);
}

void
engine_step_abort_until(engine_t *engine, uint64_t id, const char *reason, uint64_t until_ns)
{
    engine_step_t *step;

    engine_step_interrupt(engine, id);
    if (step_find(engine, id, &step) == ATTN_OK) {
        if (step->state == STEP_OPEN) {
            step_abort_locked(engine, step, reason, until_ns);
        }
        engine_step_leave(engine, step);
    }
}

attn_status_t
engine_step_abort(engine_t *engine, uint64_t step_id, const char *reason)
{
    bool waits = engine_abort_of(reason) != ENGINE_ABORT_DEADLINE; /* a tick does not */

    engine_step_abort_until(engine, step_id, reason, waits ? attn_now_ns() + ABORT_WAIT_NS : 0);
    return ATTN_OK;
}

/* The id of a step past its deadline that is not running just now, each once a tick; or 0. */
static uint64_t
an_overdue_step(engine_t *engine, uint64_t now_ns, uint32_t tick)
{
    uint64_t id = 0;

    pthread_mutex_lock(&engine->lock);
    for (engine_step_t *s = engine->steps; s != NULL && id == 0; s = s->hh.next) {
        if (now_ns >= s->deadline_ns && s->ticked != tick && pthread_mutex_trylock(&s->lock) == 0) {
            pthread_mutex_unlock(&s->lock);
            s->ticked = tick;
            id        = s->id;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return id;
}

void
engine_tick(engine_t *engine, uint64_t now_ns)
{
    uint64_t id;

    pthread_mutex_lock(&engine->lock);
    uint32_t tick = ++engine->ticks;
    pthread_mutex_unlock(&engine->lock);
    while ((id = an_overdue_step(engine, now_ns, tick)) != 0) {
        engine_step_abort(engine, id, ENGINE_BY_DEADLINE);
    }
    engine_caches_tick(engine);
    pthread_mutex_lock(&engine->lock);
    kv_leaving_tick(engine->store, now_ns);
    engine_rate_sample(&engine->rate, now_ns, atomic_load(&engine->kv_bytes));
    pthread_mutex_unlock(&engine->lock);
}
