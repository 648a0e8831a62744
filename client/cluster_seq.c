/* cluster_seq.c: sequences: the directory's lists, and what the owners say of their chunks. */
#include "client/cluster_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define LAYOUT_ATTEMPTS 16u /* of which another is made where a chunk moved meanwhile */

/* ---- holding a sequence while an operation changes it ---- */

/* Forks leave the sequence as it is, and any number of them go at once: many requests begin with
 * the same prefix. Whatever changes it is alone. */
static attn_status_t
hold(cluster_t *cluster, uint64_t cache, attn_seq_t seq, bool fork)
{
    held_seq_t *held;
    attn_status_t status;

    pthread_mutex_lock(&cluster->lock);
    cluster_await_calm(cluster, &seq, 1);
    status = directory_seq_check(cluster->directory, cache, seq);
    HASH_FIND(hh, cluster->held, &seq.id, sizeof(seq.id), held);
    if (status == ATTN_OK && held != NULL && fork && held->forks > 0) {
        held->forks++;
    } else if (status == ATTN_OK && held != NULL) {
        status = attn_fail(ATTN_ERR_BUSY, "sequence %llx is being %s by another call",
                           (unsigned long long)seq.id, held->forks > 0 ? "forked" : "changed");
    } else if (status == ATTN_OK && (held = calloc(1, sizeof(*held))) != NULL) {
        held->id    = seq.id;
        held->forks = fork;
        HASH_ADD(hh, cluster->held, id, sizeof(held->id), held);
        if (!table_has(hh, held)) {
            free(held);
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory to change a sequence");
        }
    } else if (status == ATTN_OK) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory to change a sequence");
    }
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

static void
let_go(cluster_t *cluster, attn_seq_t seq)
{
    held_seq_t *held;

    pthread_mutex_lock(&cluster->lock);
    HASH_FIND(hh, cluster->held, &seq.id, sizeof(seq.id), held);
    if (held != NULL && held->forks > 1) {
        held->forks--;
    } else if (held != NULL) {
        HASH_DEL(cluster->held, held);
        free(held);
        pthread_cond_broadcast(&cluster->calmer);
    }
    pthread_mutex_unlock(&cluster->lock);
}

/* ---- what the owners say ---- */

static int
by_worker(const void *a, const void *b)
{
    const attn_chunk_info_t *x = *(attn_chunk_info_t *const *)a,
                            *y = *(attn_chunk_info_t *const *)b;

    return (x->worker > y->worker) - (x->worker < y->worker);
}

/* Did the worker go while it was asked? Then what it answered says nothing: stopped for a while
 * and back again, it has joined as another, with nothing in it. */
static bool
is_lost_now(cluster_t *cluster, uint32_t worker)
{
    char address[64];
    bool alive;

    return cluster_worker_address(cluster, worker, address, &alive) == ATTN_OK && !alive;
}

/* The failure of a worker that was asked about its tokens, or the loss of both. */
static attn_status_t
said_of_tokens(cluster_t *cluster, uint32_t worker, attn_status_t status)
{
    if (status == ATTN_OK || !is_lost_now(cluster, worker)) {
        return status;
    }
    return attn_fail(ATTN_ERR_LOST, "the tokens were on worker %u, which was lost just now",
                     worker);
}

/* Ask one worker about the chunks list[0..n), all its own. */
static attn_status_t
ask_owner(cluster_t *cluster, uint64_t cache, attn_chunk_info_t **list, uint32_t n,
          const attn_seq_t *seq, bool *in_step_p)
{
    uint64_t *ids          = malloc(n * sizeof(*ids));
    kv_chunk_info_t *infos = malloc(n * sizeof(*infos));
    bool in_step           = false;
    link_t *link;
    attn_status_t status =
        ids != NULL && infos != NULL
            ? cluster_link(cluster, list[0]->worker, &link)
            : attn_fail(ATTN_ERR_NO_MEMORY, "no memory to describe %u chunks", n);

    for (uint32_t i = 0; status == ATTN_OK && i < n; i++) {
        ids[i] = list[i]->chunk;
    }
    if (status == ATTN_OK) {
        status =
            link->ops->chunks_describe(link, cache, ids, n, infos, seq != NULL ? &seq->id : NULL,
                                       seq != NULL ? 1 : 0, &in_step, cluster_worker_deadline());
    }
    for (uint32_t i = 0; status == ATTN_OK && i < n; i++) {
        list[i]->length     = infos[i].length;
        list[i]->generation = infos[i].generation;
    }
    if (status != ATTN_OK && status != ATTN_ERR_NO_MEMORY &&
        is_lost_now(cluster, list[0]->worker)) {
        for (uint32_t i = 0; i < n; i++) {
            list[i]->lost = true;
        }
        status = ATTN_OK;
    }
    if (in_step_p != NULL) {
        *in_step_p = *in_step_p || in_step;
    }
    free(ids);
    free(infos);
    return status;
}

attn_status_t
cluster_ask_owners(cluster_t *cluster, uint64_t cache, attn_seq_info_t *infos, uint32_t n,
                   const attn_seq_t *seq, bool *in_step_p)
{
    uint64_t total       = 0;
    uint32_t live        = 0;
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i < n; i++) {
        total += infos[i].n_chunks;
    }
    attn_chunk_info_t **list = malloc((total + 1) * sizeof(attn_chunk_info_t *));
    if (list == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to describe %llu chunks",
                         (unsigned long long)total);
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < infos[i].n_chunks; c++) {
            if (!infos[i].chunks[c].lost) {
                list[live++] = &infos[i].chunks[c];
            }
        }
    }
    qsort(list, live, sizeof(attn_chunk_info_t *), by_worker);
    for (uint32_t first = 0, next; first < live && status == ATTN_OK; first = next) {
        for (next = first + 1; next < live && list[next]->worker == list[first]->worker; next++) {
        }
        status = ask_owner(cluster, cache, list + first, next - first, seq, in_step_p);
    }
    free(list);
    return status;
}

/* The chunks as the directory has them, lengths unknown. Under the lock. */
static attn_status_t
snapshot(cluster_t *cluster, attn_seq_t seq, uint32_t chunk_size, attn_seq_info_t *info)
{
    seq_info_t known;
    attn_status_t status = seq_describe(directory_sequences(cluster->directory), seq, &known);

    if (status != ATTN_OK) {
        return status;
    }
    *info = (attn_seq_info_t){.n_chunks = known.n_chunks,
                              .chunks   = calloc(known.n_chunks + 1, sizeof(attn_chunk_info_t))};
    if (info->chunks == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layout of %u chunks", known.n_chunks);
    }
    for (uint32_t c = 0; c < known.n_chunks; c++) {
        const seq_chunk_t *chunk  = seq_chunk_at(directory_sequences(cluster->directory), seq, c);
        const dir_worker_t *owner = directory_worker(cluster->directory, chunk->worker);
        info->chunks[c]           = (attn_chunk_info_t){.chunk  = chunk->id,
                                                        .first  = (uint64_t)c * chunk_size,
                                                        .worker = chunk->worker,
                                                        .lost   = owner == NULL || !owner->alive,
                                                        .sealed = chunk->sealed};
    }
    return ATTN_OK;
}

static attn_status_t
chunk_size_of(cluster_t *cluster, uint64_t cache, uint32_t *chunk_size_p)
{
    const dir_cache_t *known = directory_cache(cluster->directory, cache);

    if (known == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "no cache %llu is open", (unsigned long long)cache);
    }
    *chunk_size_p = known->geometry.chunk_size;
    return ATTN_OK;
}

static attn_status_t
layout_one(cluster_t *cluster, uint64_t cache, attn_seq_t seq, attn_seq_info_t *info,
           uint32_t *chunk_size_p, bool *in_step_p)
{
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = chunk_size_of(cluster, cache, chunk_size_p);
    if (status == ATTN_OK) {
        status = snapshot(cluster, seq, *chunk_size_p, info);
    }
    pthread_mutex_unlock(&cluster->lock);
    if (status != ATTN_OK) {
        return status;
    }
    status = cluster_ask_owners(cluster, cache, info, 1, &seq, in_step_p);
    if (status != ATTN_OK) {
        attn_seq_info_free(info);
        return status;
    }
    status = cluster_holes(info, *chunk_size_p);
    if (status != ATTN_OK) {
        attn_seq_info_free(info);
    }
    return status;
}

/* Chunks in advance whose owner was lost hold nothing if the chunk before them is not full:
 * forget them, unless somebody changed the sequence since the owners were asked. Under the lock. */
static void
drop_lost_tail(cluster_t *cluster, attn_seq_t seq, const attn_seq_info_t *info, uint32_t chunk_size)
{
    uint32_t keep = info->n_chunks;
    seq_info_t now;

    while (keep > 0 && info->chunks[keep - 1].lost && !info->chunks[keep - 1].sealed) {
        keep--;
    }
    if (keep < info->n_chunks && keep > 0 && info->chunks[keep - 1].length < chunk_size &&
        !info->chunks[keep - 1].sealed &&
        seq_describe(directory_sequences(cluster->directory), seq, &now) == ATTN_OK &&
        now.n_chunks == info->n_chunks &&
        seq_chunk_at(directory_sequences(cluster->directory), seq, keep)->id ==
            info->chunks[keep].chunk) {
        directory_seq_cut(cluster->directory, seq, keep);
    }
}

/* Tokens behind the committed length: a step that some owners committed and others did not. */
static bool
has_remains(const attn_seq_info_t *info, uint32_t chunk_size)
{
    for (uint64_t c = info->length / chunk_size + 1; c < info->n_chunks; c++) {
        if (!info->chunks[c].lost && !info->chunks[c].sealed && info->chunks[c].length > 0) {
            return true;
        }
    }
    return false;
}

/* Cut them off, or nothing could be appended any more. Refused, and left, while a step is open:
 * its commit may be on its way. */
static bool
drop_remains(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs, const uint64_t *tokens,
             uint32_t n, const attn_seq_info_t *infos, uint32_t chunk_size)
{
    bool dropped = false;

    for (uint32_t i = 0; i < n; i++) {
        if (tokens[i] > 0 && has_remains(&infos[i], chunk_size) &&
            cluster_seq_truncate(cluster, cache, seqs[i], infos[i].length) == ATTN_OK) {
            dropped = true;
        }
    }
    return dropped;
}

/* ---- layout ---- */

static attn_status_t
layout_snapshots(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs, const uint64_t *tokens,
                 uint32_t n, uint32_t chunk_size, attn_seq_info_t *infos)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
        status = directory_seq_check(cluster->directory, cache, seqs[i]);
        if (status == ATTN_OK && tokens != NULL) {
            status = directory_seq_reserve(cluster->directory, seqs[i], tokens[i]);
        }
        if (status == ATTN_OK) {
            status = snapshot(cluster, seqs[i], chunk_size, &infos[i]);
        }
    }
    return status;
}

static bool
any_lost(const attn_seq_info_t *infos, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < infos[i].n_chunks; c++) {
            if (infos[i].chunks[c].lost) {
                return true;
            }
        }
    }
    return false;
}

/* Has none of these chunks changed its owner since? What the former one said of it, which may have
 * released it by then, is not to be believed. */
static bool
still_holds(cluster_t *cluster, const attn_seq_t *seqs, const attn_seq_info_t *infos, uint32_t n,
            uint64_t n_moved)
{
    const seq_table_t *table = directory_sequences(cluster->directory);
    bool holds               = true;

    pthread_mutex_lock(&cluster->lock);
    for (uint32_t i = 0; cluster->n_moved != n_moved && holds && i < n; i++) {
        for (uint32_t c = 0; holds && c < infos[i].n_chunks; c++) {
            const seq_chunk_t *chunk = seq_chunk_at(table, seqs[i], c);
            holds                    = chunk == NULL || chunk->id == infos[i].chunks[c].chunk;
        }
    }
    pthread_mutex_unlock(&cluster->lock);
    return holds;
}

static attn_status_t
layout_attempt(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs, const uint64_t *tokens,
               uint32_t n, attn_seq_info_t *infos, uint64_t *epoch_p, uint32_t *chunk_size_p,
               bool *again_p)
{
    memset(infos, 0, n * sizeof(*infos));
    pthread_mutex_lock(&cluster->lock);
    cluster_await_calm(cluster, seqs, n);
    uint64_t n_moved     = cluster->n_moved;
    attn_status_t status = chunk_size_of(cluster, cache, chunk_size_p);
    if (status == ATTN_OK) {
        status = layout_snapshots(cluster, cache, seqs, tokens, n, *chunk_size_p, infos);
    }
    *epoch_p = directory_epoch(cluster->directory);
    pthread_mutex_unlock(&cluster->lock);
    if (status == ATTN_OK) {
        status = cluster_ask_owners(cluster, cache, infos, n, NULL, NULL);
    }
    *again_p = !still_holds(cluster, seqs, infos, n, n_moved);
    for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
        status = cluster_holes(&infos[i], *chunk_size_p);
    }
    for (uint32_t i = 0; i < n && status != ATTN_OK; i++) {
        attn_seq_info_free(&infos[i]);
    }
    return status;
}

static attn_status_t
layout_once(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs, const uint64_t *tokens,
            uint32_t n, attn_seq_info_t *infos, uint64_t *epoch_p, uint32_t *chunk_size_p)
{
    bool again = true;

    for (uint32_t attempt = 0; attempt < LAYOUT_ATTEMPTS; attempt++) {
        attn_status_t status =
            layout_attempt(cluster, cache, seqs, tokens, n, infos, epoch_p, chunk_size_p, &again);
        if (!again) {
            return status;
        }
        for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
            attn_seq_info_free(&infos[i]);
        }
    }
    return attn_fail(ATTN_ERR_BUSY, "chunks of these sequences are being moved: retry");
}

/* ---- placing lost chunks anew ---- */

/* Are there tokens behind chunk c, so that it was full? */
static bool
is_followed(const attn_seq_info_t *info, uint32_t c)
{
    while (++c < info->n_chunks) {
        if (info->chunks[c].sealed || (!info->chunks[c].lost && info->chunks[c].length > 0)) {
            return true;
        }
    }
    return false;
}

/*
 * Lost chunks that a step is to fill from their first token on, unless somebody changed the
 * sequence since the owners were asked. One that other sequences list was full when they came to
 * share it. One that is not known to have been full may hold what comes next only if all before the
 * base is there: else the step will be refused, and the hole is not to be forgotten for it. Under
 * the lock.
 */
static attn_status_t
renew_lost(cluster_t *cluster, attn_seq_t seq, uint64_t base, uint64_t tokens,
           const attn_seq_info_t *info, uint32_t chunk_size)
{
    uint64_t end         = attn_min(attn_div_up(tokens, chunk_size), info->n_chunks);
    bool whole           = info->n_holes == 0 || info->holes[0].first >= base;
    attn_status_t status = ATTN_OK;

    for (uint64_t i = attn_div_up(base, chunk_size); i < end && status == ATTN_OK; i++) {
        uint32_t c               = (uint32_t)i;
        const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(cluster->directory), seq, c);
        bool full =
            chunk != NULL && (chunk->sealed || chunk->references > 1 || is_followed(info, c));
        if (info->chunks[c].lost && chunk != NULL && chunk->id == info->chunks[c].chunk &&
            (full || whole)) {
            status = directory_seq_renew(cluster->directory, seq, c, full);
        }
    }
    return status;
}

attn_status_t
cluster_layout(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs, const uint64_t *bases,
               const uint64_t *tokens, uint32_t n, attn_seq_info_t *infos, uint64_t *epoch_p)
{
    uint32_t chunk_size;
    attn_status_t status =
        layout_once(cluster, cache, seqs, tokens, n, infos, epoch_p, &chunk_size);

    if (status != ATTN_OK || tokens == NULL) {
        return status;
    }
    bool lost = any_lost(infos, n);
    if (!drop_remains(cluster, cache, seqs, tokens, n, infos, chunk_size) && !lost) {
        return status;
    }
    pthread_mutex_lock(&cluster->lock);
    for (uint32_t i = 0; i < n; i++) {
        drop_lost_tail(cluster, seqs[i], &infos[i], chunk_size);
        if (bases != NULL && status == ATTN_OK) {
            status = renew_lost(cluster, seqs[i], bases[i], tokens[i], &infos[i], chunk_size);
        }
        attn_seq_info_free(&infos[i]);
    }
    pthread_mutex_unlock(&cluster->lock);
    return status == ATTN_OK
               ? layout_once(cluster, cache, seqs, tokens, n, infos, epoch_p, &chunk_size)
               : status;
}

/* ---- create, fork, truncate, free ---- */

attn_status_t
cluster_seq_create(cluster_t *cluster, uint64_t cache, uint32_t client, uint64_t expected_tokens,
                   attn_seq_t *seq_p)
{
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status =
        directory_seq_create(cluster->directory, cache, client, expected_tokens, seq_p);
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

/* Are the first `length` tokens all here and committed? */
static attn_status_t
check_prefix(attn_seq_t seq, const attn_seq_info_t *info, uint32_t chunk_size, uint64_t length)
{
    attn_status_t status = cluster_check_whole(info, chunk_size, seq, length);

    if (status == ATTN_OK && length > info->length) {
        status =
            attn_fail(ATTN_ERR_INVALID, "length is %llu: sequence %llx has %llu committed tokens",
                      (unsigned long long)length, (unsigned long long)seq.id,
                      (unsigned long long)info->length);
    }
    return status;
}

/* The tail of a fork: a chunk that shares the pages of the source's. */
static attn_status_t
fork_tail(cluster_t *cluster, uint64_t cache, const attn_chunk_info_t *source, uint32_t length,
          uint64_t to)
{
    link_t *link;
    attn_status_t status = cluster_link(cluster, source->worker, &link);

    if (status == ATTN_OK) {
        status = link->ops->chunk_fork(link, cluster_epoch(cluster), cache, source->chunk, length,
                                       to, cluster_worker_deadline());
    }
    return said_of_tokens(cluster, source->worker, status);
}

static attn_status_t
fork_held(cluster_t *cluster, uint64_t cache, uint32_t client, attn_seq_t seq, uint64_t length,
          const attn_seq_info_t *info, uint32_t chunk_size, attn_seq_t *fork_p)
{
    uint32_t n_shared = (uint32_t)(length / chunk_size), rest = (uint32_t)(length % chunk_size);
    uint64_t tail = 0;

    pthread_mutex_lock(&cluster->lock);
    attn_status_t status =
        directory_seq_fork(cluster->directory, seq, client, n_shared, rest > 0, fork_p, &tail);
    pthread_mutex_unlock(&cluster->lock);
    if (status != ATTN_OK || rest == 0) {
        return status;
    }
    status = fork_tail(cluster, cache, &info->chunks[n_shared], rest, tail);
    if (status != ATTN_OK) {
        pthread_mutex_lock(&cluster->lock);
        directory_seq_free(cluster->directory, *fork_p);
        pthread_mutex_unlock(&cluster->lock);
    }
    return status;
}

attn_status_t
cluster_seq_fork(cluster_t *cluster, uint64_t cache, uint32_t client, attn_seq_t seq,
                 uint64_t length, attn_seq_t *fork_p)
{
    attn_seq_info_t info;
    attn_seq_t fork;
    uint32_t chunk_size;
    attn_status_t status = hold(cluster, cache, seq, true);

    if (status != ATTN_OK) {
        return status;
    }
    status = layout_one(cluster, cache, seq, &info, &chunk_size, NULL);
    if (status == ATTN_OK) {
        status = check_prefix(seq, &info, chunk_size, length);
        if (status == ATTN_OK) {
            status = fork_held(cluster, cache, client, seq, length, &info, chunk_size, &fork);
        }
        attn_seq_info_free(&info);
    }
    let_go(cluster, seq);
    if (status == ATTN_OK) {
        *fork_p = fork;
    }
    return status;
}

/* Cut chunk i at `rest` tokens: in place if only this sequence lists it, else as a copy. */
static attn_status_t
cut_chunk(cluster_t *cluster, uint64_t cache, attn_seq_t seq, const attn_chunk_info_t *chunk,
          uint32_t i, uint32_t rest)
{
    link_t *link;
    uint64_t copy;
    uint32_t generation;
    attn_status_t status = cluster_link(cluster, chunk->worker, &link);

    if (status != ATTN_OK || (chunk->length == rest && !chunk->sealed)) {
        return status;
    }
    pthread_mutex_lock(&cluster->lock);
    const seq_chunk_t *known = seq_chunk_at(directory_sequences(cluster->directory), seq, i);
    bool shared              = known == NULL || known->references > 1;
    copy                     = directory_chunk_id(cluster->directory);
    pthread_mutex_unlock(&cluster->lock);
    if (!shared) {
        status = link->ops->chunk_truncate(link, cluster_epoch(cluster), cache, chunk->chunk,
                                           chunk->generation, rest, &generation,
                                           cluster_worker_deadline());
        if (status != ATTN_OK) {
            return said_of_tokens(cluster, chunk->worker, status);
        }
        pthread_mutex_lock(&cluster->lock);
        directory_seq_unseal(cluster->directory, seq, i); /* until it is cut, a hole stays one */
        pthread_mutex_unlock(&cluster->lock);
        return ATTN_OK;
    }
    /* First the copy, then the list: a failure leaves the sequence as it was. */
    status = fork_tail(cluster, cache, chunk, rest, copy);
    if (status == ATTN_OK) {
        pthread_mutex_lock(&cluster->lock);
        status = directory_seq_replace(cluster->directory, seq, i, copy);
        pthread_mutex_unlock(&cluster->lock);
        if (status != ATTN_OK) {
            link->ops->chunks_release(link, cluster_epoch(cluster), cache, &copy, 1,
                                      cluster_worker_deadline());
        }
    }
    return status;
}

static attn_status_t
truncate_held(cluster_t *cluster, uint64_t cache, attn_seq_t seq, uint64_t length)
{
    attn_seq_info_t info;
    uint32_t chunk_size;
    bool in_step         = false;
    attn_status_t status = layout_one(cluster, cache, seq, &info, &chunk_size, &in_step);

    if (status != ATTN_OK) {
        return status;
    }
    uint32_t keep = (uint32_t)(length / chunk_size), rest = (uint32_t)(length % chunk_size);
    status = in_step ? attn_fail(ATTN_ERR_BUSY, "a step is open on sequence %llx: end it first",
                                 (unsigned long long)seq.id)
                     : check_prefix(seq, &info, chunk_size, length);
    if (status == ATTN_OK && rest > 0) {
        status = cut_chunk(cluster, cache, seq, &info.chunks[keep], keep, rest);
    }
    if (status == ATTN_OK) {
        pthread_mutex_lock(&cluster->lock);
        status = directory_seq_cut(cluster->directory, seq, keep + (rest > 0));
        pthread_mutex_unlock(&cluster->lock);
    }
    attn_seq_info_free(&info);
    return status;
}

attn_status_t
cluster_seq_truncate(cluster_t *cluster, uint64_t cache, attn_seq_t seq, uint64_t length)
{
    attn_status_t status = hold(cluster, cache, seq, false);

    if (status == ATTN_OK) {
        status = truncate_held(cluster, cache, seq, length);
        let_go(cluster, seq);
        cluster_flush(cluster);
    }
    return status;
}

attn_status_t
cluster_seq_free(cluster_t *cluster, uint64_t cache, attn_seq_t seq)
{
    attn_seq_info_t info;
    uint32_t chunk_size;
    bool in_step         = false;
    attn_status_t status = hold(cluster, cache, seq, false);

    if (status != ATTN_OK) {
        return status;
    }
    /* An owner that cannot be asked does not keep a sequence alive. */
    if (layout_one(cluster, cache, seq, &info, &chunk_size, &in_step) == ATTN_OK) {
        attn_seq_info_free(&info);
    }
    if (in_step) {
        status = attn_fail(ATTN_ERR_BUSY, "a step is open on sequence %llx: end it first",
                           (unsigned long long)seq.id);
    } else {
        pthread_mutex_lock(&cluster->lock);
        status = directory_seq_free(cluster->directory, seq);
        pthread_mutex_unlock(&cluster->lock);
    }
    let_go(cluster, seq);
    cluster_flush(cluster);
    return status;
}
