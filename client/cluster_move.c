/*
 * cluster_move.c: chunks of KV go from one worker to another while their sequences are in use.
 *
 *     copy    all that is committed; steps go on, and may add to it
 *     hold    the old owner refuses new steps that name the chunk; those that are open end
 *     copy    what was added meanwhile
 *     go      the old owner gives its word that this is all, and refuses such steps for ever
 *     switch  the directory names the new owner, and layouts are given out again
 *
 * From hold to switch is the time that others wait for: whoever asks for a layout, or changes a
 * sequence, is kept until it is over, so a step that the old owner refused begins at the new one.
 * Before the old owner's word all is as it was whatever fails; after it there is only a lock to
 * take, or, where the new owner is lost by then or the sequence freed, the word to be taken back.
 * A word of which nobody knows whether it was given is taken back, too, and that is repeated until
 * the worker answers or is lost.
 */
#include "client/cluster_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define COPY_ROUNDS 4u /* before the chunk is held: each copies what came during the one before */
#define COPY_LEAST_MS 5000u
#define COPY_BYTES_PER_MS 50000u /* beyond that, a copy may be so slow */
#define HOLD_MS 5000u            /* the old owner goes on by itself if we do not come back */
#define PATIENCE_MS 1000u        /* for open steps to end */
#define LOOK_US 1000u            /* how often we look whether they have */
#define PLACES 64u               /* of a walk over the directory */

/* ---- who waits for whom ---- */

bool
cluster_lists(const cluster_t *cluster, attn_seq_t seq, const dir_move_t *move)
{
    /* Sequences that share a chunk have it at the same place: forks share beginnings. */
    const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(cluster->directory), seq, move->i);

    return chunk != NULL && chunk->id == move->chunk;
}

static bool
is_calm(const cluster_t *cluster, const attn_seq_t *seqs, uint32_t n)
{
    for (const moving_t *m = cluster->moving; m != NULL; m = m->next) {
        for (uint32_t i = 0; m->switching && i < n; i++) {
            if (cluster_lists(cluster, seqs[i], &m->move)) {
                return false;
            }
        }
    }
    return true;
}

/* Sleep until something changed. @return false: the time is up. Under the lock. */
static bool
await_change(cluster_t *cluster, uint64_t until_ns)
{
    struct timespec until = {.tv_sec  = (time_t)(until_ns / 1000000000u),
                             .tv_nsec = (long)(until_ns % 1000000000u)};

    return pthread_cond_timedwait(&cluster->calmer, &cluster->lock, &until) == 0;
}

void
cluster_await_calm(cluster_t *cluster, const attn_seq_t *seqs, uint32_t n)
{
    uint64_t until = cluster_worker_deadline() + PATIENCE_MS * ATTN_NS_PER_MS;

    while (cluster->moving != NULL && !is_calm(cluster, seqs, n) && await_change(cluster, until)) {
    }
}

/* Is another call changing a sequence that lists the chunk? Under the lock. */
static bool
is_held(const cluster_t *cluster, const dir_move_t *move)
{
    for (const held_seq_t *held = cluster->held; held != NULL; held = held->hh.next) {
        if (cluster_lists(cluster, (attn_seq_t){held->id}, move)) {
            return true;
        }
    }
    return false;
}

/* ---- one chunk ---- */

/* A move as its thread sees it. */
typedef struct errand {
    moving_t moving;
    attn_geometry_t g; /* its sizes alone */
    link_t *from, *to;
    uint32_t generation, length; /* at the old owner, as it was when it was copied */
    bool held, copied;           /* what the workers may know of */
} errand_t;

/* Is it to be moved still, and by nobody else? Under the lock. */
static attn_status_t
may_move(const cluster_t *cluster, attn_seq_t seq, uint32_t i, uint32_t from)
{
    const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(cluster->directory), seq, i);

    if (chunk == NULL || (from != 0 && chunk->worker != from)) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "chunk %u of sequence %llx is gone", i,
                         (unsigned long long)seq.id);
    }
    for (const moving_t *other = cluster->moving; other != NULL; other = other->next) {
        if (other->move.chunk == chunk->id) {
            return attn_fail(ATTN_ERR_BUSY, "chunk %u of sequence %llx is being moved", i,
                             (unsigned long long)seq.id);
        }
    }
    return ATTN_OK;
}

static attn_status_t
errand_begin(cluster_t *cluster, attn_seq_t seq, uint32_t i, uint32_t from, uint32_t to,
             errand_t *e)
{
    moving_t *m = &e->moving;

    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = may_move(cluster, seq, i, from);
    if (status == ATTN_OK) {
        status = directory_move_begin(cluster->directory, seq, i, to, &m->move);
    }
    if (status == ATTN_OK) {
        m->next         = cluster->moving;
        cluster->moving = m;
    }
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

/* Bring what is there up to what the old owner says it has. */
static attn_status_t
errand_copy(cluster_t *cluster, errand_t *e, const kv_chunk_info_t *info)
{
    const dir_move_t *m = &e->moving.move;

    if (e->length > 0 && (info->generation != e->generation || info->length < e->length)) {
        return attn_fail(ATTN_ERR_STALE, "sequence %llx was cut while it was moved: retry",
                         (unsigned long long)m->seq.id);
    }
    e->generation = info->generation;
    if (info->length == e->length) {
        return ATTN_OK;
    }
    uint64_t bytes     = (info->length - e->length) * engine_kv_row_bytes(&e->g) * e->g.layers;
    uint64_t ms        = e->moving.switching ? HOLD_MS : COPY_LEAST_MS + bytes / COPY_BYTES_PER_MS;
    engine_copy_t copy = {.cache      = m->cache,
                          .chunk      = m->chunk,
                          .generation = info->generation,
                          .copy       = m->copy,
                          .first      = e->length,
                          .length     = info->length};

    e->copied            = true;
    attn_status_t status = e->to->ops->chunk_copy(e->to, e->from, cluster_epoch(cluster), &copy,
                                                  attn_now_ns() + ms * ATTN_NS_PER_MS);
    if (status == ATTN_OK) {
        e->length = info->length;
    }
    return status;
}

static attn_status_t
errand_say(cluster_t *cluster, errand_t *e, kv_leave_t what, kv_chunk_info_t *info)
{
    const dir_move_t *m = &e->moving.move;

    e->held = true;
    return e->from->ops->chunk_leave(e->from, cluster_epoch(cluster), m->cache,
                                     &(kv_leaving_t){.what       = what,
                                                     .chunk      = m->chunk,
                                                     .move       = m->copy,
                                                     .generation = e->generation,
                                                     .length     = e->length,
                                                     .until_ns   = HOLD_MS * ATTN_NS_PER_MS},
                                     cluster_worker_deadline(), info);
}

/* Nobody else changes the chunk from here on, nor is told of its owner. */
static attn_status_t
errand_seclude(cluster_t *cluster, errand_t *e)
{
    uint64_t until = attn_now_ns() + PATIENCE_MS * ATTN_NS_PER_MS;

    pthread_mutex_lock(&cluster->lock);
    e->moving.switching = true;
    while (is_held(cluster, &e->moving.move) && await_change(cluster, until)) {
    }
    bool held = is_held(cluster, &e->moving.move);
    pthread_mutex_unlock(&cluster->lock);
    return held ? attn_fail(ATTN_ERR_BUSY, "sequence %llx is being changed by another call",
                            (unsigned long long)e->moving.move.seq.id)
                : ATTN_OK;
}

/* Until no step has the chunk open. */
static attn_status_t
errand_hold(cluster_t *cluster, errand_t *e, kv_chunk_info_t *info)
{
    uint64_t until = attn_now_ns() + PATIENCE_MS * ATTN_NS_PER_MS;
    attn_status_t status;

    while ((status = errand_say(cluster, e, KV_LEAVE_HOLD, info)) == ATTN_OK && info->in_step) {
        if (attn_now_ns() >= until) {
            return attn_fail(ATTN_ERR_BUSY,
                             "a step is open on chunk %u of sequence %llx, and did not end in time",
                             e->moving.move.i, (unsigned long long)e->moving.move.seq.id);
        }
        nanosleep(&(struct timespec){.tv_nsec = LOOK_US * 1000}, NULL);
    }
    return status;
}

/* All that is there, while steps go on. */
static attn_status_t
errand_copy_most(cluster_t *cluster, errand_t *e)
{
    const dir_move_t *m = &e->moving.move;

    for (uint32_t round = 0; round < COPY_ROUNDS; round++) {
        kv_chunk_info_t info;
        attn_status_t status = e->from->ops->chunks_describe(
            e->from, m->cache, &m->chunk, 1, &info, NULL, 0, NULL, cluster_worker_deadline());
        if (status != ATTN_OK || info.length == e->length) {
            return status;
        }
        status = errand_copy(cluster, e, &info);
        if (status != ATTN_OK) {
            return status;
        }
    }
    return ATTN_OK;
}

static attn_status_t
errand_run(cluster_t *cluster, errand_t *e)
{
    const dir_move_t *m  = &e->moving.move;
    kv_chunk_info_t info = {0};
    void *table;
    attn_status_t status = cluster_cache_geometry(cluster, m->cache, &e->g, &table);

    if (status == ATTN_OK) {
        free(table);
        status = cluster_link(cluster, m->from, &e->from);
    }
    if (status == ATTN_OK) {
        status = cluster_link(cluster, m->to, &e->to);
    }
    if (status == ATTN_OK) {
        status = errand_copy_most(cluster, e);
    }
    if (status == ATTN_OK) {
        status = errand_seclude(cluster, e);
    }
    if (status == ATTN_OK) {
        status = errand_hold(cluster, e, &info);
    }
    if (status == ATTN_OK) {
        status = errand_copy(cluster, e, &info);
    }
    if (status == ATTN_OK) {
        status = errand_say(cluster, e, KV_LEAVE_GO, &info);
    }
    return status;
}

/* One of its two ends. What is to be taken back is, before anybody is given a layout. */
static attn_status_t
errand_end(cluster_t *cluster, errand_t *e, attn_status_t status)
{
    moving_t **link = &cluster->moving;
    char sentence[512];

    pthread_mutex_lock(&cluster->lock);
    if (status == ATTN_OK) {
        status = directory_move_done(cluster->directory, &e->moving.move);
    }
    snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
    if (status == ATTN_OK) {
        cluster->n_moved++;
    } else {
        directory_move_failed(cluster->directory, &e->moving.move, e->held, e->copied);
        pthread_mutex_unlock(&cluster->lock);
        cluster_flush(cluster);
        pthread_mutex_lock(&cluster->lock);
    }
    while (*link != &e->moving) {
        link = &(*link)->next;
    }
    *link = e->moving.next;
    pthread_cond_broadcast(&cluster->calmer);
    pthread_mutex_unlock(&cluster->lock);
    if (status == ATTN_OK) {
        cluster_flush(cluster);
        return status;
    }
    return attn_fail(status, "%s", sentence);
}

static attn_status_t
move_chunk(cluster_t *cluster, attn_seq_t seq, uint32_t i, uint32_t from, uint32_t to,
           cluster_moved_t *moved)
{
    errand_t e           = {0};
    attn_status_t status = errand_begin(cluster, seq, i, from, to, &e);

    if (status == ATTN_ERR_NOT_FOUND) {
        return ATTN_OK; /* somebody freed, cut or moved it meanwhile */
    }
    if (status == ATTN_OK) {
        uint64_t start = attn_now_ns();
        status         = errand_end(cluster, &e, errand_run(cluster, &e));
        attn_log(status == ATTN_OK ? ATTN_LOG_DEBUG : ATTN_LOG_WARN,
                 status == ATTN_OK ? "chunk.moved" : "chunk.kept",
                 "sequence=%llx chunk=%u tokens=%u from=%u to=%u us=%llu reason=\"%s\"",
                 (unsigned long long)seq.id, i, e.length, e.moving.move.from, e.moving.move.to,
                 (unsigned long long)((attn_now_ns() - start) / ATTN_NS_PER_US),
                 status == ATTN_OK ? "" : attn_last_error());
    }
    if (status != ATTN_OK) {
        moved->failed++;
        moved->why = status;
        snprintf(moved->reason, sizeof(moved->reason), "%s", attn_last_error());
        return status;
    }
    moved->chunks++;
    moved->bytes += (uint64_t)e.length * engine_kv_row_bytes(&e.g) * e.g.layers;
    return ATTN_OK;
}

/* ---- many ---- */

/* Chunks of the sequence that are to be moved, from number *i_p on: the first of them, and how many
 * there are. */
static attn_status_t
find_chunk(cluster_t *cluster, uint64_t cache, attn_seq_t seq, uint32_t from, uint32_t to,
           uint32_t *i_p, uint64_t *n_p)
{
    seq_info_t info;
    uint32_t first = UINT32_MAX;

    *n_p = 0;
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_seq_check(cluster->directory, cache, seq);
    if (status == ATTN_OK) {
        status = seq_describe(directory_sequences(cluster->directory), seq, &info);
    }
    for (uint32_t i = *i_p; status == ATTN_OK && i < info.n_chunks; i++) {
        uint32_t owner = seq_chunk_at(directory_sequences(cluster->directory), seq, i)->worker;
        if (owner != to && (from == 0 || owner == from)) {
            first = first < i ? first : i;
            (*n_p)++;
        }
    }
    pthread_mutex_unlock(&cluster->lock);
    *i_p = first;
    return status;
}

/* That nothing more will come of this call. */
static bool
is_hopeless(attn_status_t status)
{
    return status == ATTN_ERR_EXHAUSTED || status == ATTN_ERR_UNAVAILABLE ||
           status == ATTN_ERR_NO_MEMORY || status == ATTN_ERR_UNSUPPORTED;
}

attn_status_t
cluster_seq_move(cluster_t *cluster, uint64_t cache, attn_seq_t seq, uint32_t from, uint32_t to,
                 cluster_moved_t *moved)
{
    uint64_t until = attn_now_ns() + CLUSTER_MOVE_MS * ATTN_NS_PER_MS;
    uint32_t i     = 0;

    *moved = (cluster_moved_t){0};
    if (from == 0 && to == 0) {
        return attn_fail(ATTN_ERR_INVALID, "say which worker the sequence is to leave, or where it "
                                           "is to go");
    }
    attn_status_t status = find_chunk(cluster, cache, seq, from, to, &i, &moved->left);
    while (status == ATTN_OK && i != UINT32_MAX && attn_now_ns() < until) {
        attn_status_t one = move_chunk(cluster, seq, i, from, to, moved);
        if (is_hopeless(one) && moved->chunks == 0) {
            return one;
        }
        i++; /* one that failed comes again with the next call */
        uint64_t rest;
        status = is_hopeless(one) ? ATTN_OK : find_chunk(cluster, cache, seq, from, to, &i, &rest);
        i      = is_hopeless(one) ? UINT32_MAX : i;
    }
    i = 0;
    return status == ATTN_OK ? find_chunk(cluster, cache, seq, from, to, &i, &moved->left) : status;
}

/* A part of a walk over what the worker owns. @return ATTN_OK, or why the rest need not be tried */
static attn_status_t
drain_some(cluster_t *cluster, uint32_t worker, uint32_t to, seq_walk_t *walk, uint64_t until_ns,
           cluster_moved_t *moved)
{
    seq_place_t places[PLACES];
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&cluster->lock);
    uint32_t n =
        seq_walk_owned(directory_sequences(cluster->directory), worker, walk, places, PLACES);
    pthread_mutex_unlock(&cluster->lock);
    for (uint32_t p = 0; p < n && !is_hopeless(status) && attn_now_ns() < until_ns; p++) {
        status = move_chunk(cluster, places[p].seq, places[p].i, worker, to, moved);
    }
    return is_hopeless(status) ? status : ATTN_OK;
}

attn_status_t
cluster_worker_drain(cluster_t *cluster, uint32_t worker, uint32_t to, bool stay,
                     cluster_moved_t *moved)
{
    uint64_t until  = attn_now_ns() + CLUSTER_MOVE_MS * ATTN_NS_PER_MS;
    seq_walk_t walk = {0};

    *moved = (cluster_moved_t){0};
    if (worker == to && !stay) {
        return attn_fail(ATTN_ERR_INVALID, "worker %u cannot be emptied into itself", worker);
    }
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_worker_leave(cluster->directory, worker, !stay);
    pthread_mutex_unlock(&cluster->lock);
    attn_status_t hopeless = ATTN_OK;
    while (status == ATTN_OK && !stay && hopeless == ATTN_OK && !walk.over &&
           attn_now_ns() < until) {
        hopeless = drain_some(cluster, worker, to, &walk, until, moved);
    }
    pthread_mutex_lock(&cluster->lock);
    moved->left = stay ? 0 : directory_worker_chunks(cluster->directory, worker);
    pthread_mutex_unlock(&cluster->lock);
    return hopeless != ATTN_OK && moved->chunks == 0 ? hopeless : status;
}
