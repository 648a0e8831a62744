/*
 * commit.c: what of a step is to be kept: checked against what is stored, and, of an entry with a
 * mask, brought to where it is to stand.
 *
 * A path's r-th token goes to the place of the r-th new token, which is its own or one before it.
 * So who stores a new token of such an entry was sent all that follow it, too, and every owner
 * compacts by itself:
 *
 *     new tokens         0 1 2 | 3 4 5          | between two owners' chunks
 *     the left one has   0 1 2   3 4 5 spare
 *     path 0 2 4 5       0 2 4 | 5              4 comes from the spare ones
 *
 * In the order of the path no row is overwritten before it was read.
 */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>

/* How many of the first `accepted` tokens of entry e are stored in its chunk c. */
static uint32_t
accepted_in(const engine_step_t *step, const engine_entry_t *e, const kv_step_chunk_t *c,
            uint32_t accepted)
{
    uint64_t first = (uint64_t)c->number * step->cache->geometry.chunk_size + c->length - e->base;

    return c->n_new == 0 || accepted <= first ? 0 : (uint32_t)attn_min(accepted - first, c->n_new);
}

static attn_status_t
check_layers(const engine_step_t *step, const engine_entry_t *e, uint32_t want)
{
    for (uint32_t l = 0; l < step->cache->geometry.layers; l++) {
        if (!step->stored[l]) {
            return attn_fail(ATTN_ERR_INCOMPLETE,
                             "layer %u has no k, v for tokens %llu-%llu of sequence %llx: run it "
                             "first",
                             l, (unsigned long long)e->base,
                             (unsigned long long)(e->base + want - 1), (unsigned long long)e->seq);
        }
    }
    return ATTN_OK;
}

attn_status_t
engine_path_check(const uint32_t *path, uint32_t n, uint32_t n_new)
{
    for (uint32_t r = 0; r < n; r++) {
        if (path[r] >= n_new || (r > 0 && path[r] <= path[r - 1])) {
            return attn_fail(ATTN_ERR_INVALID,
                             "path: number %u is %u: new tokens ascend, and are below %u", r,
                             path[r], n_new);
        }
    }
    return ATTN_OK;
}

/* Check entry i; its path begins at *path_at, which goes on to the next one's. */
static attn_status_t
check_entry(const engine_step_t *step, const engine_commit_t *commit, uint32_t i, uint64_t *path_at,
            uint32_t *here)
{
    const engine_entry_t *e = &step->entries[i];
    uint32_t want           = commit->accepted != NULL ? commit->accepted[i] : e->n_new;
    attn_status_t status    = ATTN_OK;

    if (want > e->n_new) {
        return attn_fail(ATTN_ERR_INVALID, "accepted[%u] is %u: the entry has %u new tokens", i,
                         want, e->n_new);
    }
    if (e->mask != NULL && commit->accepted == NULL) {
        return attn_fail(ATTN_ERR_INVALID,
                         "accepted is missing: entry %u has a mask, so what is kept is a path", i);
    }
    if (e->mask != NULL) {
        if (want > commit->n_path - *path_at) {
            return attn_fail(ATTN_ERR_INVALID,
                             "path has %llu numbers: accepted[%u] wants %u after the first %llu",
                             (unsigned long long)commit->n_path, i, want,
                             (unsigned long long)*path_at);
        }
        status = engine_path_check(commit->path + *path_at, want, e->n_new);
        *path_at += want;
    }
    *here = 0;
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        *here += accepted_in(step, e, &e->chunks[c], want);
    }
    if (status != ATTN_OK) {
        return attn_fail_in(status, "entry %u: ", i);
    }
    return *here > 0 ? check_layers(step, e, want) : ATTN_OK;
}

attn_status_t
engine_commit_check(const engine_step_t *step, const engine_commit_t *commit, uint32_t *here)
{
    uint64_t path_at = 0;

    if (commit->accepted != NULL && commit->n != step->n) {
        return attn_fail(ATTN_ERR_INVALID, "accepted has %u numbers: the batch has %u entries here",
                         commit->n, step->n);
    }
    for (uint32_t i = 0; i < step->n; i++) {
        attn_status_t status = check_entry(step, commit, i, &path_at, &here[i]);
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

/* The moves of entry i for its path of n tokens; returns how many. */
static uint64_t
moves_of(const engine_step_t *step, uint32_t i, const uint32_t *path, uint32_t n,
         attn_move_t *moves)
{
    const attn_geometry_t *g = &step->cache->geometry;
    const engine_entry_t *e  = &step->entries[i];
    uint64_t n_moves         = 0;
    uint32_t first;

    (void)engine_entry_rows(g, e, &first);
    for (uint32_t r = 0; r < n; r++) {
        if (path[r] == r || !engine_entry_owns(g, e, r)) {
            continue;
        }
        uint64_t from = step->slot_first[i] + path[r] - first, to = step->slot_first[i] + r - first;
        moves[n_moves++] = (attn_move_t){.from_page   = step->slot_pages[from],
                                         .from_offset = step->slot_offsets[from],
                                         .to_page     = step->slot_pages[to],
                                         .to_offset   = step->slot_offsets[to]};
    }
    return n_moves;
}

attn_status_t
engine_commit_move(engine_t *engine, const engine_step_t *step, const engine_commit_t *commit)
{
    const uint32_t *path = commit->path;
    attn_status_t status = ATTN_OK;
    uint64_t n           = 0;

    if (commit->n_path == 0) {
        return ATTN_OK;
    }
    attn_move_t *moves = malloc(commit->n_path * sizeof(*moves));
    if (moves == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to commit a path of %llu tokens",
                         (unsigned long long)commit->n_path);
    }
    for (uint32_t i = 0; i < step->n; i++) {
        if (step->entries[i].mask != NULL) {
            n += moves_of(step, i, path, commit->accepted[i], moves + n);
            path += commit->accepted[i];
        }
    }
    for (uint32_t l = 0; n > 0 && status == ATTN_OK && l < step->cache->geometry.layers; l++) {
        attn_kv_t kv;
        engine_kv_view(engine, step->cache, l, &kv);
        status = engine->backend->ops->move(engine->backend, &kv, moves, n);
    }
    free(moves);
    return status;
}
