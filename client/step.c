/*
 * step.c: a step over all the workers that own its KV: one call to all of them, and the end.
 * step_begin.c begins it, step_run.c runs a layer, step_layout.c knows which bytes go where.
 *
 * Every call goes to the shares at once and is over when the last one answered. Whoever waits
 * drives the transport; without a waiter (attn_step_submit) a progress thread does. What a
 * worker answered lands in the caller's tensors, or, as partials, in the share's buffer, and
 * the last answer's thread merges.
 */
#include "client/step_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ABORT_TIMEOUT_MS 1000u

/* ---- completions ---- */

static _Thread_local bool in_completion; /* this thread is in an attn_done_fn */

void
step_complete(attn_step_t *step, attn_done_fn done, void *arg, attn_status_t status,
              const char *sentence)
{
    bool outer = in_completion;

    in_completion = true;
    done(arg, status, sentence);
    in_completion = outer;
    atomic_fetch_sub(&step->calling, 1);
}

attn_status_t
step_may_wait(const char *call)
{
    return !in_completion
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "%s waits, and is not to be called inside a completion: leave it to "
                           "another thread",
                           call);
}

/* ---- one call to all shares ---- */

void
step_call_start(attn_step_t *step)
{
    step->pending     = 1; /* the caller's own, let go by step_call_started() */
    step->status      = ATTN_OK;
    step->sentence[0] = 0;
    atomic_store(&step->idle, false);
}

/* Under the step's lock, which it lets go. */
static void
call_end_one(attn_step_t *step)
{
    bool last = --step->pending == 0;

    pthread_mutex_unlock(&step->lock);
    if (last) {
        if (step->done != NULL) {
            step_run_finish(step);
        } else {
            atomic_store(&step->idle, true);
        }
    }
}

bool
step_survives(attn_status_t status)
{
    return status == ATTN_ERR_INVALID || status == ATTN_ERR_CONFLICT ||
           status == ATTN_ERR_INCOMPLETE || status == ATTN_ERR_NUMERIC ||
           status == ATTN_ERR_TOO_LARGE || status == ATTN_ERR_EXHAUSTED;
}

/* Under the step's lock: the first one counts. */
static void
note_failure(const share_t *share, attn_status_t status, const char *sentence)
{
    attn_step_t *step = share->step;

    if (step->status == ATTN_OK) {
        step->status = status;
        snprintf(step->sentence, sizeof(step->sentence), "worker %u: %s", share->split->worker,
                 sentence);
    }
}

void
step_rank_failed(share_t *share, attn_status_t status, const char *sentence)
{
    attn_step_t *step = share->step;

    pthread_mutex_lock(&step->lock);
    note_failure(share, status, sentence);
    step->rank_failed  = true;
    share->outstanding = false; /* it has answered */
    pthread_mutex_unlock(&step->lock);
    step_cancel_ranks(step);
}

void
step_cancel_ranks(attn_step_t *step)
{
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        pthread_mutex_lock(&step->lock);
        bool waits = step->rank_failed && share->ranked && share->outstanding;
        pthread_mutex_unlock(&step->lock);
        if (waits) {
            share->link->ops->cancel(share->remote);
        }
    }
}

void
step_share_done(void *arg, attn_status_t status, const char *sentence)
{
    share_t *share    = arg;
    attn_step_t *step = share->step;

    pthread_mutex_lock(&step->lock);
    share->outstanding = false;
    if (status != ATTN_OK) {
        note_failure(share, status, sentence);
    }
    call_end_one(step);
}

void
step_share_start(share_t *share)
{
    pthread_mutex_lock(&share->step->lock);
    share->outstanding = true;
    share->step->pending++;
    pthread_mutex_unlock(&share->step->lock);
}

void
step_call_started(attn_step_t *step)
{
    pthread_mutex_lock(&step->lock);
    call_end_one(step);
}

static bool
is_idle(void *arg)
{
    return atomic_load(&((attn_step_t *)arg)->idle);
}

/* Wait for the end of the call. What is overdue gets cancelled, and then ends soon: the
 * caller's buffers are ours until then. */
attn_status_t
step_call_wait(attn_step_t *step, uint64_t deadline_ns)
{
    while (!is_idle(step) && !rpc_client_wait(step->client->rpc, is_idle, step, deadline_ns)) {
        step_cancel_overdue(step, UINT64_MAX);
        deadline_ns = attn_now_ns() + 50 * ATTN_NS_PER_MS;
    }
    return step->status == ATTN_OK ? ATTN_OK : attn_fail(step->status, "%s", step->sentence);
}

bool
step_is_overdue(const attn_step_t *step, uint64_t now_ns)
{
    return now_ns >= step->deadline_ns && !atomic_load(&step->idle);
}

void
step_cancel_overdue(attn_step_t *step, uint64_t now_ns)
{
    if (!step_is_overdue(step, now_ns)) {
        return;
    }
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        pthread_mutex_lock(&step->lock);
        link_step_t *remote = share->outstanding ? share->remote : NULL;
        pthread_mutex_unlock(&step->lock);
        if (remote != NULL) {
            share->link->ops->cancel(remote);
        }
    }
}

/* ---- making and freeing ---- */

void
step_free(attn_step_t *step)
{
    step_driven_free(step);
    step_stages_free(step);
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        if (share->remote != NULL) {
            share->link->ops->step_free(share->remote);
        }
        free(share->q);
        free(share->pieces);
        free(share->states);
        free(share->accepted);
        free(share->path);
        free(share->lists);
    }
    if (step->n_gathers > 0) {
        free(step->gathers[0].partials);
    }
    for (uint32_t t = 0; t < 4; t++) {
        free(step->packed[t]);
    }
    step_group_give(step);
    free(step->gathers);
    free(step->shares);
    split_free(step->split);
    free(step->lse_unwanted);
    free(step->stored);
    free(step->entries);
    pthread_mutex_destroy(&step->lock);
    free(step);
}

attn_step_t *
step_next(attn_step_t *step)
{
    return step->next;
}

bool
step_is_given_up(const attn_step_t *step, const attn_cache_t *cache)
{
    return step->given_up && (cache == NULL || step->cache == cache);
}

void
step_end_driven(attn_step_t *step, uint64_t now_ns)
{
    if (step->is_driven && now_ns >= step->deadline_ns) {
        step_driven_abort(step);
    }
}

bool
step_look_at(attn_step_t *step, uint32_t round)
{
    bool first      = step->looked_at != round;
    step->looked_at = round;
    return first;
}

void
step_reference(attn_step_t *step)
{
    step->references++;
}

void
step_unreference(attn_step_t *step)
{
    attn_client_t *client = step->client;

    pthread_mutex_lock(&client->lock);
    bool last = --step->references == 0;
    pthread_mutex_unlock(&client->lock);
    if (last) {
        step_free(step);
    }
}

void
step_publish(attn_step_t *step)
{
    attn_client_t *client = step->client;

    pthread_mutex_lock(&client->lock);
    step->references = 1;
    step->next       = client->steps;
    step->link       = &client->steps;
    if (step->next != NULL) {
        step->next->link = &step->next;
    }
    client->steps = step;
    pthread_mutex_unlock(&client->lock);
}

/* Out of the list; freed when the housekeeper does not look at it any more. Whoever ends a step
 * may free what its completions use: the last one has returned by then. */
void
step_retire(attn_step_t *step)
{
    attn_client_t *client = step->client;

    while (atomic_load(&step->calling) > 0) {
        sched_yield();
    }
    pthread_mutex_lock(&client->lock);
    *step->link = step->next;
    if (step->next != NULL) {
        step->next->link = step->link;
    }
    pthread_cond_broadcast(&client->wake); /* attn_cache_close() may wait */
    pthread_mutex_unlock(&client->lock);
    step_unreference(step);
}

/* Abort at every worker that began, and wait a while for it. */
void
step_abort_shares(attn_step_t *step)
{
    step_call_start(step);
    step->deadline_ns =
        attn_min(step->deadline_ns, attn_now_ns() + ABORT_TIMEOUT_MS * ATTN_NS_PER_MS);
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        if (share->remote != NULL) {
            step_share_start(share);
            share->link->ops->abort(share->remote, step_share_done, share);
        }
    }
    step_call_started(step);
    step_call_wait(step, step->deadline_ns);
}

/* ---- commit and abort ---- */

static attn_status_t
check_stored(const attn_step_t *step, const step_entry_t *e, uint32_t want)
{
    /* What was enqueued is known to the worker, once it ran. */
    for (uint32_t l = 0;
         want > 0 && !step->on_device && !step->is_driven && l < step->cache->geometry.layers;
         l++) {
        if (!step->stored[l]) {
            return attn_fail(ATTN_ERR_INCOMPLETE,
                             "layer %u has no k, v for tokens %llu-%llu of sequence %llx: run it "
                             "first",
                             l, (unsigned long long)e->base,
                             (unsigned long long)(e->base + want - 1),
                             (unsigned long long)e->seq.id);
        }
    }
    return ATTN_OK;
}

/* Entry i; its path begins at *path_at, which goes on to the next one's. */
static attn_status_t
check_accepted(const attn_step_t *step, const attn_commit_t *commit, uint32_t i, uint64_t *path_at)
{
    const step_entry_t *e = &step->entries[i];
    uint32_t want         = commit->accepted != NULL ? commit->accepted[i] : e->n_new;

    if (want > e->n_new) {
        return attn_fail(ATTN_ERR_INVALID, "accepted[%u] is %u: the entry has %u new tokens", i,
                         want, e->n_new);
    }
    if (e->masked && (commit->accepted == NULL || want > commit->n_path - *path_at)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "entry %u has a mask: %u of its new tokens are to be kept, but path names "
                         "%llu for it",
                         i, want, (unsigned long long)(commit->n_path - *path_at));
    }
    if (e->masked && want > 0) {
        attn_status_t status = engine_path_check(commit->path + *path_at, want, e->n_new);
        if (status != ATTN_OK) {
            return attn_fail_in(status, "entry %u: ", i);
        }
        *path_at += want;
    }
    return check_stored(step, e, want);
}

static attn_status_t
commit_check(const attn_step_t *step, const attn_commit_t *commit)
{
    uint64_t path_at = 0;

    if (commit == NULL || commit->size < sizeof(*commit)) {
        return attn_fail(ATTN_ERR_INVALID, "commit.size must be sizeof(attn_commit_t)");
    }
    if (commit->path == NULL && commit->n_path > 0) {
        return attn_fail(ATTN_ERR_INVALID, "path is NULL, but n_path is %llu",
                         (unsigned long long)commit->n_path);
    }
    if (!atomic_load(&step->idle)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "a run of the step is outstanding: wait for its completion");
    }
    if (step->dead) {
        return attn_fail(ATTN_ERR_ABORTED, "the step was aborted: %s", step->sentence);
    }
    for (uint32_t i = 0; i < step->n; i++) {
        attn_status_t status = check_accepted(step, commit, i, &path_at);
        if (status != ATTN_OK) {
            return status;
        }
    }
    if (path_at != commit->n_path) {
        return attn_fail(ATTN_ERR_INVALID,
                         "path has %llu numbers: the entries with a mask accept %llu tokens",
                         (unsigned long long)commit->n_path, (unsigned long long)path_at);
    }
    return ATTN_OK;
}

/* What to keep, in the words of a share's batch: parts ascend in entry, and so do paths. */
static void
share_commit(share_t *share, const attn_commit_t *commit, engine_commit_t *out)
{
    const attn_step_t *step = share->step;
    const uint32_t *path    = commit->path;
    uint64_t n_path         = 0;
    uint32_t entry          = 0;

    for (uint32_t p = 0; p < share->split->n_parts; p++) {
        uint32_t i = share->split->parts[p].entry;
        for (; entry < i; entry++) {
            path += step->entries[entry].masked ? commit->accepted[entry] : 0;
        }
        share->accepted[p] =
            commit->accepted != NULL ? commit->accepted[i] : step->entries[i].n_new;
        if (step->entries[i].masked && share->accepted[p] > 0) {
            memcpy(share->path + n_path, path, share->accepted[p] * sizeof(*path));
            n_path += share->accepted[p];
        }
    }
    *out = (engine_commit_t){.accepted = share->accepted,
                             .n        = share->split->n_parts,
                             .path     = share->path,
                             .n_path   = n_path};
}

/* The layouts as they are now that the step is committed. */
static void
layouts_advance(attn_step_t *step, const uint32_t *accepted)
{
    uint64_t chunk_size = step->cache->geometry.chunk_size;

    pthread_mutex_lock(&step->cache->lock);
    for (uint32_t i = 0; i < step->n; i++) {
        const step_entry_t *e   = &step->entries[i];
        cached_layout_t *layout = layout_find(step->cache, e->seq);
        uint64_t end            = e->base + (accepted != NULL ? accepted[i] : e->n_new);
        for (uint64_t at = e->base;
             layout != NULL && at < end && at / chunk_size < layout->n_chunks;) {
            split_chunk_t *chunk = &layout->chunks[at / chunk_size];
            uint64_t n           = attn_min(end - at, chunk_size - at % chunk_size);
            chunk->length        = (uint32_t)(at % chunk_size + n);
            chunk->generation    = chunk->generation != 0 ? chunk->generation : 1;
            at += n;
        }
    }
    pthread_mutex_unlock(&step->cache->lock);
}

static void
layouts_drop(attn_step_t *step)
{
    pthread_mutex_lock(&step->cache->lock);
    for (uint32_t i = 0; i < step->n; i++) {
        layout_forget(step->cache, step->entries[i].seq);
    }
    pthread_mutex_unlock(&step->cache->lock);
}

attn_status_t
attn_step_commit_with(attn_step_t *step, const attn_commit_t *commit)
{
    attn_status_t status = step_may_wait("attn_step_commit");

    if (status == ATTN_OK) {
        status = commit_check(step, commit);
    }
    if (status != ATTN_OK) {
        return status;
    }
    if (step->is_driven && (status = step_driven_finish(step)) != ATTN_OK) {
        step->dead = true;
        snprintf(step->sentence, sizeof(step->sentence), "%s", attn_last_error());
        layouts_drop(step);
        return status;
    }
    step_call_start(step);
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        engine_commit_t words;
        share_commit(share, commit, &words);
        step_share_start(share);
        share->link->ops->commit(share->remote, &words, step_share_done, share);
    }
    step_call_started(step);
    status = step_call_wait(step, step->deadline_ns);
    if (step->on_device && (status == ATTN_ERR_INCOMPLETE || status == ATTN_ERR_NUMERIC ||
                            status == ATTN_ERR_CONFLICT || status == ATTN_ERR_INVALID)) {
        return status; /* its one owner has it as it was */
    }
    if (status != ATTN_OK) {
        /* Some owners may have committed: the length is the longest prefix that all have. */
        step->dead = true;
        layouts_drop(step);
        return status;
    }
    layouts_advance(step, commit->accepted);
    step->group_whole = true;
    step_retire(step);
    return ATTN_OK;
}

attn_status_t
attn_step_commit(attn_step_t *step, const uint32_t *accepted)
{
    attn_commit_t commit = {.size = sizeof(commit), .accepted = accepted};

    return attn_step_commit_with(step, &commit);
}

/* Inside a completion nobody may wait: the keeper aborts it. */
static void
abort_later(attn_step_t *step)
{
    attn_client_t *client = step->client;

    pthread_mutex_lock(&client->lock);
    step->given_up = true;
    pthread_cond_broadcast(&client->wake);
    pthread_mutex_unlock(&client->lock);
}

void
attn_step_abort(attn_step_t *step)
{
    if (step == NULL) {
        return;
    }
    atomic_store(&step->aborting, true); /* completions start no more runs */
    if (in_completion) {
        abort_later(step);
        return;
    }
    if (step->is_driven) {
        step_driven_abort(step);
    }
    /* A submitted run may be under way: its buffers are lent to us until it ended. */
    step->deadline_ns =
        attn_min(step->deadline_ns, attn_now_ns() + ABORT_TIMEOUT_MS * ATTN_NS_PER_MS);
    while (!is_idle(step) || atomic_load(&step->calling) > 0) {
        step_call_wait(step, step->deadline_ns);
        sched_yield();
    }
    if (step->dead) {
        layouts_drop(step);
    }
    step_abort_shares(step);
    step_retire(step);
}
