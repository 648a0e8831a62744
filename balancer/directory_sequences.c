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
#include "balancer/lanes.h"
#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>

/* A whole sequence looks at so many workers at most. */
#define DRAWS 16u

/* And a spread one at so many turns of its order. */
#define TURNS 4u

/* Primes above DIR_WORKERS_MAX: with any number of spots a draw's steps meet each once. */
static const uint32_t DRAW_STEPS[] = {1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069,
                                      1087, 1091, 1093, 1097, 1103, 1109, 1117, 1123};

attn_status_t
dir_seq_get(const directory_t *directory, attn_seq_t seq, seq_info_t *info,
            dir_cache_entry_t **cache_p)
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

uint64_t
dir_spot_room(const dir_spot_t *spot)
{
    uint64_t taken = spot->placed + spot->coming;

    return spot->n_pages > taken && !spot->leaving ? spot->n_pages - taken : 0;
}

/* Pages that will be free as far as is known, in DIR_FULLths. */
static int64_t
expected_room(const dir_cache_entry_t *cache, const dir_spot_t *spot)
{
    return (int64_t)spot->n_pages * DIR_FULL - (int64_t)(spot->fill * cache->chunk_pages);
}

/* Is a chunk better placed on a than on b? */
static bool
is_better(const dir_cache_entry_t *cache, const dir_spot_t *a, const dir_spot_t *b)
{
    bool fits_a = dir_spot_room(a) >= cache->chunk_pages,
         fits_b = dir_spot_room(b) >= cache->chunk_pages;

    if (!fits_a || !fits_b) {
        return fits_a != fits_b ? fits_a : dir_spot_room(a) > dir_spot_room(b);
    }
    return expected_room(cache, a) > expected_room(cache, b);
}

dir_spot_t *
dir_spot_best(const dir_cache_entry_t *cache, uint32_t except)
{
    dir_spot_t *best = NULL;

    for (uint32_t i = 0; i < cache->n_spots; i++) {
        dir_spot_t *spot = &cache->spots[i];
        if (spot->worker != except && (best == NULL || is_better(cache, spot, best))) {
            best = spot;
        }
    }
    return best;
}

/* The k-th of the spots that a sequence draws. */
static uint32_t
drawn(const dir_cache_entry_t *cache, attn_seq_t seq, uint32_t k)
{
    uint64_t hash = seq.id * UINT64_C(0x9e3779b97f4a7c15);
    uint64_t step = DRAW_STEPS[hash % (sizeof(DRAW_STEPS) / sizeof(DRAW_STEPS[0]))];

    return (uint32_t)(((hash >> 32) + k * step) % cache->n_spots);
}

/* The best of some that the sequence draws, or of all where they are few: so a worker that has just
 * joined, and is the emptiest of all, does not get everything that is new. */
static dir_spot_t *
best_drawn(const dir_cache_entry_t *cache, attn_seq_t seq)
{
    dir_spot_t *best = &cache->spots[drawn(cache, seq, 0)];

    if (cache->n_spots <= DRAWS) {
        return dir_spot_best(cache, 0);
    }
    for (uint32_t k = 1; k < DRAWS; k++) {
        dir_spot_t *spot = &cache->spots[drawn(cache, seq, k)];
        best             = is_better(cache, spot, best) ? spot : best;
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
is_spread(const directory_t *directory, dir_cache_entry_t *cache, const seq_info_t *info,
          uint64_t tokens, uint32_t c)
{
    const attn_geometry_t *geometry = &cache->cache.geometry;
    uint64_t break_even             = directory->options.break_even_tokens;

    if (geometry->placement != ATTN_PLACE_AUTO) {
        return geometry->placement == ATTN_PLACE_SPREAD;
    }
    if (break_even == 0) {
        break_even = dir_break_even(directory, cache, info->client);
    }
    /* A sequence known to be long is spread from its first chunk, one that turns out to be
     * long from the chunk where it does. */
    return info->expected_tokens > break_even || (info->n_chunks == 0 && tokens > break_even) ||
           (uint64_t)c * geometry->chunk_size >= break_even;
}

/* The spot of chunk c in an order that begins with spot `turn`. */
static dir_spot_t *
turned_spot(const dir_cache_entry_t *cache, uint32_t c, uint64_t turn)
{
    return &cache->spots[(lanes_spot(c, cache->n_spots) + turn) % cache->n_spots];
}

/* Where chunk 0 of a spread sequence of about so many chunks goes, and by that the others: of some
 * turns the one whose workers together have most room. */
static uint64_t
best_turn(const dir_cache_entry_t *cache, attn_seq_t seq, uint64_t n_chunks)
{
    uint32_t n    = (uint32_t)attn_min(n_chunks, COST_SPREAD_MAX);
    uint64_t best = (uint32_t)seq.id;
    int64_t most  = INT64_MIN;

    for (uint32_t k = 0; k < TURNS && cache->n_spots > DRAWS; k++) {
        uint64_t turn = drawn(cache, seq, k);
        int64_t room  = 0;
        for (uint32_t c = 0; c < n; c++) {
            room += expected_room(cache, turned_spot(cache, c, turn));
        }
        if (room > most) {
            most = room;
            best = turn;
        }
    }
    return best;
}

/* Where chunk c of a spread sequence belongs, with room or without; there is a spot. */
static dir_spot_t *
spread_spot(const directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq,
            const seq_info_t *info, uint64_t tokens, uint32_t c)
{
    const dir_spot_t *first = c > 0 ? spot_of_chunk(directory, cache, seq, 0) : NULL;
    uint64_t length         = attn_max(tokens, info->expected_tokens);

    if (first) {
        return turned_spot(cache, c, (uint64_t)(first - cache->spots));
    }
    return turned_spot(
        cache, c,
        c > 0 ? (uint32_t)seq.id
              : best_turn(cache, seq, attn_div_up(length, cache->cache.geometry.chunk_size)));
}

/* The spot for chunk c, or NULL if no worker has room for it. `tokens`: being reserved. */
static dir_spot_t *
choose_spot(const directory_t *directory, dir_cache_entry_t *cache, attn_seq_t seq,
            const seq_info_t *info, uint64_t tokens, uint32_t c)
{
    dir_spot_t *spot = NULL;

    if (cache->n_spots == 0) {
        return NULL;
    }
    if (is_spread(directory, cache, info, tokens, c)) {
        spot = spread_spot(directory, cache, seq, info, tokens, c);
    } else if (c > 0) {
        /* With chunk 0; a sequence that outgrew that worker goes on where it went. */
        spot = spot_of_chunk(directory, cache, seq, 0);
        if (!spot || dir_spot_room(spot) < cache->chunk_pages) {
            spot = spot_of_chunk(directory, cache, seq, c - 1);
        }
    }
    if (!spot && c == 0) {
        spot = best_drawn(cache, seq);
    }
    if (!spot || dir_spot_room(spot) < cache->chunk_pages) {
        spot = dir_spot_best(cache, 0);
    }
    return dir_spot_room(spot) >= cache->chunk_pages ? spot : NULL;
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
                     dir_spot_room(dir_spot_best(cache, 0)));
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
    assert(spot->placed >= cache->chunk_pages && spot->fill >= released->fill);
    spot->placed -= cache->chunk_pages;
    spot->fill -= released->fill;
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

/* The sequence will have so many tokens: its chunks are as full as that makes them. Those before
 * one that is full enough were noted earlier. */
static void
note_fill(directory_t *directory, const dir_cache_entry_t *cache, attn_seq_t seq, uint32_t n_chunks,
          uint64_t tokens)
{
    uint64_t chunk_size = cache->cache.geometry.chunk_size;

    for (uint32_t c = n_chunks; c-- > 0;) {
        uint64_t first = c * chunk_size;
        uint64_t held  = tokens > first ? attn_min(tokens - first, chunk_size) : 0;
        uint8_t wanted = (uint8_t)attn_div_up(held * DIR_FULL, chunk_size);
        uint8_t known  = seq_chunk_fill(directory->sequences, seq, c);
        if (known >= wanted) {
            return;
        }
        dir_spot_t *spot = spot_of_chunk(directory, cache, seq, c);
        if (spot) {
            spot->fill += wanted - known;
        }
        seq_chunk_set_fill(directory->sequences, seq, c, wanted);
    }
}

attn_status_t
directory_seq_reserve(directory_t *directory, attn_seq_t seq, uint64_t tokens)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    attn_status_t status = dir_seq_get(directory, seq, &info, &cache);

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
    note_fill(directory, cache, seq, (uint32_t)needed, tokens);
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
    attn_status_t status = dir_seq_get(directory, seq, &info, &cache);

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
    attn_status_t status = dir_seq_get(directory, seq, &info, &cache);

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

attn_status_t
directory_seq_renew(directory_t *directory, attn_seq_t seq, uint32_t i, bool sealed)
{
    seq_info_t info;
    dir_cache_entry_t *cache;
    attn_status_t status = dir_seq_get(directory, seq, &info, &cache);

    if (status) {
        return status;
    }
    if (i >= info.n_chunks || spot_of_chunk(directory, cache, seq, i)) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": chunk %u of %u was not lost",
                         seq.id, i, info.n_chunks);
    }
    dir_spot_t *spot = choose_spot(directory, cache, seq, &info, 0, i);
    if (!spot) {
        return fail_no_room(cache, seq, i);
    }
    status = seq_chunk_renew(directory->sequences, seq, i, spot->worker, sealed);
    if (status == ATTN_OK) {
        spot->placed += cache->chunk_pages;
        spot->fill += seq_chunk_fill(directory->sequences, seq, i);
    }
    return status;
}

attn_status_t
directory_seq_unseal(directory_t *directory, attn_seq_t seq, uint32_t i)
{
    return seq_chunk_unseal(directory->sequences, seq, i);
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
