/*
 * Placement, and the operations on sequences with what they release.
 *
 * Pages are counted when a chunk is placed, a full chunk's worth, and given back when no
 * sequence lists it any more. That is a plan, not the worker's own count: a growing chunk
 * takes its pages there as it grows, and a fork shares them. So reserving stops where the
 * plan is full, while a fork's tail and a chunk's own copy, which share pages, are let
 * through, and may bring a worker's count above its region until something is freed.
 */
#include "balancer/directory_int.h"
#include "base/checked.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>

static attn_status_t
seq_get(const directory_t *directory, attn_seq_t seq, seq_info_t *info, dir_cache_entry_t **cache_p)
{
    attn_status_t status = seq_describe(directory->sequences, seq, info);

    if (status == ATTN_OK) {
        *cache_p = dir_cache_find(directory, info->cache);
        assert(*cache_p); /* a cache is dropped after its sequences */
    }
    return status;
}

attn_status_t
directory_seq_check(const directory_t *directory, uint64_t cache, attn_seq_t seq)
{
    seq_info_t info;
    attn_status_t status = seq_describe(directory->sequences, seq, &info);

    if (status == ATTN_OK && info.cache != cache) {
        return attn_fail(ATTN_ERR_NOT_FOUND,
                         "sequence %" PRIu64 " is of cache %" PRIu64 ", not %" PRIu64, seq.id,
                         info.cache, cache);
    }
    return status;
}

attn_status_t
directory_seq_create(directory_t *directory, uint64_t cache_id, uint32_t client_id,
                     uint64_t expected_tokens, attn_seq_t *seq_p)
{
    dir_cache_entry_t *cache;
    dir_client_t *client;
    attn_status_t status = dir_cache_get(directory, cache_id, &cache);

    status = status ? status : dir_client_get(directory, client_id, &client);
    status = status ? status
                    : seq_create(directory->sequences, cache_id, client_id, expected_tokens, seq_p);
    if (status == ATTN_OK) {
        cache->n_sequences++;
        client->n_sequences++;
    }
    return status;
}

/* ---- placement ---- */

static uint64_t
free_pages(const dir_spot_t *spot)
{
    return spot->n_pages > spot->placed ? spot->n_pages - spot->placed : 0;
}

static dir_spot_t *
most_free(const dir_cache_entry_t *cache)
{
    dir_spot_t *best = NULL;

    for (uint32_t i = 0; i < cache->n_spots; i++) {
        if (!best || free_pages(&cache->spots[i]) > free_pages(best)) {
            best = &cache->spots[i];
        }
    }
    return best;
}

static dir_spot_t *
spot_of_chunk(const directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq,
              uint32_t i)
{
    const seq_chunk_t *chunk = seq_chunk_at(directory->sequences, seq, i);
    return chunk ? dir_spot_find(cache, chunk->worker) : NULL;
}

static bool
is_spread(const directory_t *directory, const dir_cache_entry_t *cache, const seq_info_t *info,
          uint64_t tokens, uint32_t c)
{
    const attn_geometry_t *geometry = &cache->cache.geometry;
    uint64_t break_even             = directory->options.break_even_tokens;

    if (geometry->placement != ATTN_PLACE_AUTO) {
        return geometry->placement == ATTN_PLACE_SPREAD;
    }
    if (break_even == 0) {
        break_even = cost_break_even_tokens(&directory->cost, geometry, cache->n_spots);
    }
    /* A sequence known to be long is spread from its first chunk, one that turns out to be
     * long from the chunk where it does. */
    return info->expected_tokens > break_even || (info->n_chunks == 0 && tokens > break_even) ||
           (uint64_t)c * geometry->chunk_size >= break_even;
}

/* Where chunk c of a spread sequence belongs, with room or without; there is a spot. */
static dir_spot_t *
spread_spot(const directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq,
            uint32_t c)
{
    uint64_t lane_order     = attn_tree_key(c) >> 26; /* the lane's six bits, reversed */
    uint32_t slot           = (uint32_t)seq.id;
    const dir_spot_t *first = c > 0 ? spot_of_chunk(directory, cache, seq, 0) : NULL;
    uint64_t turn           = first ? (uint64_t)(first - cache->spots) : slot;

    return &cache->spots[(lane_order * cache->n_spots / 64 + turn) % cache->n_spots];
}

/* The spot for chunk c, or NULL if no worker has room for it. `tokens`: being reserved. */
static dir_spot_t *
choose_spot(const directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq,
            const seq_info_t *info, uint64_t tokens, uint32_t c)
{
    dir_spot_t *spot = NULL;

    if (cache->n_spots == 0) {
        return NULL;
    }
    if (is_spread(directory, cache, info, tokens, c)) {
        spot = spread_spot(directory, cache, seq, c);
    } else if (c > 0) {
        /* With chunk 0; a sequence that outgrew that worker goes on where it went. */
        spot = spot_of_chunk(directory, cache, seq, 0);
        if (!spot || free_pages(spot) < cache->chunk_pages) {
            spot = spot_of_chunk(directory, cache, seq, c - 1);
        }
    }
    if (!spot || free_pages(spot) < cache->chunk_pages) {
        spot = most_free(cache);
    }
    return free_pages(spot) >= cache->chunk_pages ? spot : NULL;
}

static attn_status_t
fail_no_room(const dir_cache_entry_t *cache, attn_seq_t seq, uint32_t c)
{
    if (cache->n_spots == 0) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "cache \"%s\": no live worker has a region of it",
                         cache->cache.name);
    }
    return attn_fail(ATTN_ERR_EXHAUSTED,
                     "cache \"%s\": chunk %u of sequence %" PRIu64 " takes %u pages; "
                     "of %u workers the emptiest has %" PRIu64 " free",
                     cache->cache.name, c, seq.id, cache->chunk_pages, cache->n_spots,
                     free_pages(most_free(cache)));
}

static attn_status_t
place_chunk(directory_t *directory, dir_cache_entry_t *cache, attn_seq_t seq,
            const seq_info_t *info, uint64_t tokens, uint32_t c)
{
    dir_spot_t *spot = choose_spot(directory, cache, seq, info, tokens, c);
    uint64_t chunk;
    attn_status_t status;

    if (!spot) {
        return fail_no_room(cache, seq, c);
    }
    status = seq_chunk_append(directory->sequences, seq, spot->worker, &chunk);
    if (status == ATTN_OK) {
        spot->placed += cache->chunk_pages;
    }
    return status;
}

/* False: the owner is lost, and the chunk's pages with it. */
static bool
give_back_pages(const directory_t *directory, const seq_released_t *released)
{
    const dir_cache_entry_t *cache = dir_cache_find(directory, released->cache);
    dir_spot_t *spot               = dir_spot_find(cache, released->worker);

    if (!spot) {
        return false;
    }
    assert(spot->placed >= cache->chunk_pages);
    spot->placed -= cache->chunk_pages;
    return true;
}

/* What seq_cut and its like release. */
static void
on_release(void *arg, const seq_released_t *released)
{
    const directory_t *directory = arg;

    if (give_back_pages(directory, released)) {
        dir_emit(directory, DIR_RELEASE_CHUNK, released->worker, released->cache, released->chunk);
    }
}

/* A chunk whose id never left this file: there is nothing to release. */
static void
on_undo(void *arg, const seq_released_t *released)
{
    (void)give_back_pages(arg, released);
}

attn_status_t
directory_seq_reserve(directory_t *directory, attn_seq_t seq, uint64_t tokens)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    attn_status_t status = seq_get(directory, seq, &info, &cache);

    if (status) {
        return status;
    }
    uint64_t needed = attn_max(1, attn_div_up(tokens, cache->cache.geometry.chunk_size));
    if (needed > ATTN_SEQ_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "sequence %" PRIu64 ": %" PRIu64 " tokens are %" PRIu64
                         " chunks of %u; the limit is %u chunks",
                         seq.id, tokens, needed, cache->cache.geometry.chunk_size,
                         ATTN_SEQ_CHUNKS_MAX);
    }
    for (uint32_t c = info.n_chunks; c < needed; c++) {
        status = place_chunk(directory, cache, seq, &info, tokens, c);
        if (status) {
            attn_status_t undone =
                seq_cut(directory->sequences, seq, info.n_chunks, on_undo, directory);
            assert(undone == ATTN_OK);
            return status;
        }
    }
    /* The one in advance is a convenience: without room for it what was asked for stands. */
    if (info.n_chunks <= needed && needed < ATTN_SEQ_CHUNKS_MAX &&
        choose_spot(directory, cache, seq, &info, tokens, (uint32_t)needed)) {
        (void)place_chunk(directory, cache, seq, &info, tokens, (uint32_t)needed);
    }
    return ATTN_OK;
}

/* ---- fork, replace, cut, free ---- */

/* The spot of the owner of chunk i, where a chunk that shares its pages must be. */
static attn_status_t
spot_to_share(const directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq,
              const seq_info_t *info, uint32_t i, dir_spot_t **spot_p)
{
    const seq_chunk_t *chunk = seq_chunk_at(directory->sequences, seq, i);

    if (!chunk) {
        return attn_fail(ATTN_ERR_INVALID,
                         "sequence %" PRIu64 " has no chunk %u: its chunks are %u", seq.id, i,
                         info->n_chunks);
    }
    *spot_p = dir_spot_find(cache, chunk->worker);
    if (!*spot_p) {
        return attn_fail(ATTN_ERR_LOST, "sequence %" PRIu64 ": chunk %u was lost with worker %u",
                         seq.id, i, chunk->worker);
    }
    return ATTN_OK;
}

attn_status_t
directory_seq_fork(directory_t *directory, attn_seq_t seq, uint32_t client_id, uint32_t n_shared,
                   bool with_tail, attn_seq_t *fork_p, uint64_t *tail_p)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    dir_client_t *client;
    dir_spot_t *spot     = NULL;
    uint64_t tail        = 0;
    attn_status_t status = seq_get(directory, seq, &info, &cache);

    status = status ? status : dir_client_get(directory, client_id, &client);
    if (status == ATTN_OK && with_tail) {
        status = spot_to_share(directory, cache, seq, &info, n_shared, &spot);
    }
    status = status ? status
                    : seq_fork(directory->sequences, seq, client_id, n_shared,
                               spot ? spot->worker : UINT32_MAX, fork_p, &tail);
    if (status) {
        return status;
    }
    cache->n_sequences++;
    client->n_sequences++;
    if (spot) {
        spot->placed += cache->chunk_pages;
        *tail_p = tail;
    }
    return ATTN_OK;
}

attn_status_t
directory_seq_replace(directory_t *directory, attn_seq_t seq, uint32_t i, uint64_t chunk)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    dir_spot_t *spot;
    attn_status_t status = seq_get(directory, seq, &info, &cache);

    status = status ? status : spot_to_share(directory, cache, seq, &info, i, &spot);
    if (status) {
        return status;
    }
    spot->placed += cache->chunk_pages; /* before the old one is released, perhaps from here */
    status = seq_chunk_replace(directory->sequences, seq, i, chunk, on_release, directory);
    if (status) {
        spot->placed -= cache->chunk_pages;
    }
    return status;
}

uint64_t
directory_chunk_id(directory_t *directory)
{
    return seq_chunk_id(directory->sequences);
}

attn_status_t
directory_seq_cut(directory_t *directory, attn_seq_t seq, uint32_t n_chunks)
{
    return seq_cut(directory->sequences, seq, n_chunks, on_release, directory);
}

attn_status_t
dir_seq_free(directory_t *directory, attn_seq_t seq, const seq_info_t *info)
{
    dir_cache_entry_t *cache = dir_cache_find(directory, info->cache);
    dir_client_t *client;
    attn_status_t status = dir_client_get(directory, info->client, &client);

    assert(cache && status == ATTN_OK);
    status = seq_free(directory->sequences, seq, on_release, directory);
    if (status == ATTN_OK) {
        assert(cache->n_sequences > 0 && client->n_sequences > 0);
        cache->n_sequences--;
        client->n_sequences--;
    }
    return status;
}

attn_status_t
directory_seq_free(directory_t *directory, attn_seq_t seq)
{
    seq_info_t info;
    attn_status_t status = seq_describe(directory->sequences, seq, &info);

    return status ? status : dir_seq_free(directory, seq, &info);
}

/* ---- what was lost ---- */

typedef struct lost_text {
    char *text;
    size_t room, used;
    uint32_t worker; /* of the range that is being collected; 0: none */
    uint64_t first, end;
} lost_text_t;

static void
write_range(lost_text_t *lost)
{
    if (lost->worker != 0 && lost->used < lost->room) {
        int n = snprintf(lost->text + lost->used, lost->room - lost->used,
                         "%stokens %" PRIu64 "-%" PRIu64 " (worker %u)", lost->used ? ", " : "",
                         lost->first, lost->end - 1, lost->worker);
        lost->used += (size_t)n; /* at or above room: cut there, and nothing follows */
    }
    lost->worker = 0;
}

uint32_t
directory_seq_lost(const directory_t *directory, attn_seq_t seq, uint64_t length, char *text,
                   size_t room)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    lost_text_t lost = {.text = text, .room = room};
    uint32_t n       = 0;

    if (room > 0) {
        text[0] = 0;
    }
    if (seq_get(directory, seq, &info, &cache) != ATTN_OK) {
        return 0;
    }
    uint64_t chunk_size = cache->cache.geometry.chunk_size;
    for (uint32_t i = 0; i < info.n_chunks && i * chunk_size < length; i++) {
        uint32_t worker = seq_chunk_at(directory->sequences, seq, i)->worker;
        if (dir_spot_find(cache, worker)) {
            write_range(&lost);
            continue;
        }
        n++;
        if (lost.worker != worker) {
            write_range(&lost);
            lost.worker = worker;
            lost.first  = i * chunk_size;
        }
        lost.end = attn_min((i + 1) * chunk_size, length);
    }
    write_range(&lost);
    return n;
}
