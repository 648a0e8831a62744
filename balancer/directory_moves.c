/*
 * Chunks that change their owner, one at a time. What the move takes, copying and the old owner's
 * word, happens elsewhere; here it is a beginning, for which room is kept, and one of two ends.
 */
#include "balancer/directory_int.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>

static attn_status_t
pick_target(const directory_t *directory, const dir_cache_entry_t *cache, const dir_move_t *move,
            uint32_t to, dir_spot_t **spot_p)
{
    dir_spot_t *spot = to != 0 ? dir_spot_find(cache, to) : dir_spot_best(cache, move->from);

    if (!spot && to != 0) {
        const dir_worker_t *worker = dir_worker_find(directory, to);
        return attn_fail(ATTN_ERR_UNAVAILABLE, "worker %u %s", to,
                         !worker || !worker->alive ? "is not alive" : "has no region of the cache");
    }
    if (!spot) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "cache \"%s\" is on no other live worker",
                         cache->cache.name);
    }
    if (spot->worker == move->from) {
        return attn_fail(ATTN_ERR_INVALID, "chunk %u of sequence %" PRIu64 " is on worker %u",
                         move->i, move->seq.id, to);
    }
    if (dir_spot_room(spot) < cache->chunk_pages) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "cache \"%s\": a chunk takes %u pages; worker %u has %" PRIu64 " free%s",
                         cache->cache.name, cache->chunk_pages, spot->worker, dir_spot_room(spot),
                         spot->leaving ? ", for it is leaving" : "");
    }
    *spot_p = spot;
    return ATTN_OK;
}

attn_status_t
directory_move_begin(directory_t *directory, attn_seq_t seq, uint32_t i, uint32_t to,
                     dir_move_t *move)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    dir_spot_t *spot     = NULL;
    attn_status_t status = dir_seq_get(directory, seq, &info, &cache);

    if (status) {
        return status;
    }
    const seq_chunk_t *chunk = seq_chunk_at(directory->sequences, seq, i);
    if (!chunk) {
        return attn_fail(ATTN_ERR_INVALID,
                         "sequence %" PRIu64 " has no chunk %u: its chunks are %u", seq.id, i,
                         info.n_chunks);
    }
    *move = (dir_move_t){
        .cache = info.cache, .seq = seq, .i = i, .from = chunk->worker, .chunk = chunk->id};
    if (!dir_spot_find(cache, move->from)) {
        return attn_fail(ATTN_ERR_LOST, "sequence %" PRIu64 ": chunk %u was lost with worker %u",
                         seq.id, i, move->from);
    }
    status = pick_target(directory, cache, move, to, &spot);
    if (status == ATTN_OK) {
        spot->coming += cache->chunk_pages;
        move->to   = spot->worker;
        move->copy = seq_chunk_id(directory->sequences);
    }
    return status;
}

/* The room that was kept, if the worker and the cache are still there. */
static dir_spot_t *
give_room_back(const dir_cache_entry_t *cache, const dir_move_t *move)
{
    dir_spot_t *spot = cache ? dir_spot_find(cache, move->to) : NULL;

    if (spot) {
        assert(spot->coming >= cache->chunk_pages);
        spot->coming -= cache->chunk_pages;
    }
    return spot;
}

attn_status_t
directory_move_done(directory_t *directory, const dir_move_t *move)
{
    dir_cache_entry_t *cache = dir_cache_find(directory, move->cache);
    const seq_chunk_t *chunk = seq_chunk_at(directory->sequences, move->seq, move->i);

    if (!cache || !chunk || chunk->id != move->chunk) {
        return attn_fail(ATTN_ERR_NOT_FOUND,
                         "sequence %" PRIu64 " was freed or cut while chunk %u was moved",
                         move->seq.id, move->i);
    }
    if (!dir_spot_find(cache, move->to)) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "worker %u was lost while a chunk was moved to it",
                         move->to);
    }
    uint8_t fill     = seq_chunk_fill(directory->sequences, move->seq, move->i);
    dir_spot_t *from = dir_spot_find(cache, move->from), *to = give_room_back(cache, move);
    if (from) { /* it may be lost by now: what it had was copied before */
        assert(from->placed >= cache->chunk_pages && from->fill >= fill);
        from->placed -= cache->chunk_pages;
        from->fill -= fill;
        dir_emit(directory, DIR_RELEASE_CHUNK, move->from, move->cache, move->chunk);
    }
    to->placed += cache->chunk_pages;
    to->fill += fill;
    attn_status_t status =
        seq_chunk_move(directory->sequences, move->seq, move->i, move->to, move->copy);
    assert(status == ATTN_OK);
    directory->epoch++;
    directory->counts.chunks_moved++;
    return status;
}

void
directory_move_failed(directory_t *directory, const dir_move_t *move, bool held, bool copied)
{
    give_room_back(dir_cache_find(directory, move->cache), move);
    if (held) {
        directory->effect(directory->effect_arg, &(dir_effect_t){.type   = DIR_KEEP_CHUNK,
                                                                 .worker = move->from,
                                                                 .cache  = move->cache,
                                                                 .chunk  = move->chunk,
                                                                 .move   = move->copy});
    }
    if (copied) {
        dir_emit(directory, DIR_RELEASE_CHUNK, move->to, move->cache, move->copy);
    }
    directory->counts.moves_failed++;
}

/* ---- a worker that is to be empty ---- */

attn_status_t
directory_worker_leave(directory_t *directory, uint32_t id, bool leave)
{
    dir_worker_t *worker = dir_worker_find(directory, id);
    dir_cache_entry_t *cache, *next;

    if (!worker || !worker->alive) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "worker %u is %s", id, worker ? "lost" : "not known");
    }
    worker->leaving = leave;
    HASH_ITER(hh_id, directory->by_id, cache, next)
    {
        dir_spot_t *spot = dir_spot_find(cache, id);
        if (spot) {
            spot->leaving = leave;
        }
    }
    return ATTN_OK;
}

uint64_t
directory_worker_chunks(const directory_t *directory, uint32_t id)
{
    dir_cache_entry_t *cache, *next;
    uint64_t n = 0;

    HASH_ITER(hh_id, directory->by_id, cache, next)
    {
        const dir_spot_t *spot = dir_spot_find(cache, id);
        n += spot ? spot->placed / cache->chunk_pages : 0;
    }
    return n;
}
