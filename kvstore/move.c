/*
 * A chunk goes from one store to another. There it arrives: pages are reserved, filled without the
 * lock, and become a chunk when the last token is in. Here it leaves: while it is held no step may
 * name it, so that what was copied is all of it; and once it is gone none ever may, though its
 * pages stay until it is released. That is what keeps a chunk from being owned twice: whoever moves
 * it has the old owner's word before anybody is told of the new one.
 */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

/* ---- leaving ---- */

static kv_left_t *
left_find(const kv_region_t *region, uint64_t chunk)
{
    kv_left_t *left = NULL;

    if (region->left != NULL) {
        HASH_FIND(hh, region->left, &chunk, sizeof(chunk), left);
    }
    return left;
}

attn_status_t
kv_left_check(const kv_region_t *region, uint64_t chunk)
{
    if (left_find(region, chunk) == NULL) {
        return ATTN_OK;
    }
    return attn_fail(ATTN_ERR_STALE,
                     "chunk %" PRIu64 " of cache %" PRIu64
                     " is being moved to another worker: a fresh layout tells to which",
                     chunk, region->cache);
}

void
kv_left_forget(kv_region_t *region, uint64_t chunk)
{
    kv_left_t *left = left_find(region, chunk);

    if (left != NULL) {
        HASH_DEL(region->left, left);
        free(left);
    }
}

/* A word that comes late, after a newer attempt began or the last word was given, holds nothing. */
static attn_status_t
hold(kv_region_t *region, const kv_leaving_t *leaving)
{
    kv_left_t *left = left_find(region, leaving->chunk);

    if (left != NULL && (left->until_ns == UINT64_MAX || left->move > leaving->move)) {
        return attn_fail(ATTN_ERR_STALE, "chunk %" PRIu64 " of cache %" PRIu64 " %s",
                         leaving->chunk, region->cache,
                         left->until_ns == UINT64_MAX ? "is another worker's by now"
                                                      : "is held by a later move");
    }
    if (left == NULL) {
        left = calloc(1, sizeof(*left));
        if (left == NULL) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to hold a chunk");
        }
        left->chunk = leaving->chunk;
        HASH_ADD(hh, region->left, chunk, sizeof(left->chunk), left);
        if (left->hh.tbl == NULL) {
            free(left);
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to hold a chunk");
        }
    }
    left->move     = leaving->move;
    left->until_ns = leaving->until_ns;
    return ATTN_OK;
}

/* The last word before another worker owns it. */
static attn_status_t
go(const kv_region_t *region, const kv_leaving_t *leaving, const kv_chunk_t *chunk)
{
    kv_left_t *left     = left_find(region, leaving->chunk);
    uint32_t generation = chunk != NULL ? chunk->generation : 0;
    uint32_t length     = chunk != NULL ? chunk->length : 0;

    if (left == NULL || left->move != leaving->move) {
        return attn_fail(ATTN_ERR_STALE,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is not held by this move any more",
                         leaving->chunk, region->cache);
    }
    if (chunk != NULL && chunk->named > 0) {
        return attn_fail(ATTN_ERR_BUSY,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is named %u times by open steps",
                         leaving->chunk, region->cache, chunk->named);
    }
    if (generation != leaving->generation || length != leaving->length) {
        return attn_fail(ATTN_ERR_STALE,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " has generation %u, length %u, and was copied as generation %u, length "
                         "%u",
                         leaving->chunk, region->cache, generation, length, leaving->generation,
                         leaving->length);
    }
    left->until_ns = UINT64_MAX;
    return ATTN_OK;
}

attn_status_t
kv_chunk_leave(kv_store_t *store, uint64_t cache, const kv_leaving_t *leaving,
               kv_chunk_info_t *info)
{
    kv_region_t *region;
    attn_status_t status = kv_region_need(store, cache, &region);

    if (status != ATTN_OK) {
        return status;
    }
    const kv_chunk_t *chunk = kv_chunk_find(region, leaving->chunk);
    const kv_left_t *left   = left_find(region, leaving->chunk);
    switch (leaving->what) {
    case KV_LEAVE_HOLD:
        status = hold(region, leaving);
        break;
    case KV_LEAVE_GO:
        status = go(region, leaving, chunk);
        break;
    case KV_LEAVE_STAY:
        if (left != NULL && left->move == leaving->move) {
            kv_left_forget(region, leaving->chunk);
        }
        break;
    }
    if (status == ATTN_OK && info != NULL) {
        *info = (kv_chunk_info_t){0};
        if (chunk != NULL) {
            status = kv_chunk_describe(store, cache, leaving->chunk, info);
        }
    }
    return status;
}

void
kv_leaving_tick(kv_store_t *store, uint64_t now_ns)
{
    kv_left_t *left, *next;

    for (uint32_t i = 0; i < store->n_regions; i++) {
        kv_region_t *region = store->by_offset[i];
        HASH_ITER(hh, region->left, left, next)
        {
            if (left->until_ns <= now_ns) {
                HASH_DEL(region->left, left);
                free(left);
            }
        }
    }
}

/* ---- arriving ---- */

bool
kv_arrivals_busy(const kv_region_t *region)
{
    for (const kv_arrival_t *a = region->arrivals; a != NULL; a = a->next) {
        if (a->busy) {
            return true;
        }
    }
    return false;
}

void
kv_arrivals_detach(kv_region_t *region)
{
    kv_left_t *left, *next;

    while (region->arrivals != NULL) {
        kv_arrival_t *a  = region->arrivals;
        region->arrivals = a->next;
        a->region        = NULL;
    }
    HASH_ITER(hh, region->left, left, next)
    {
        HASH_DEL(region->left, left);
        free(left);
    }
}

/* May tokens be put behind the first ones of the chunk? *chunk_p is NULL where it is new. */
static attn_status_t
arrival_check(const kv_region_t *region, uint64_t id, uint32_t first, uint32_t length,
              kv_chunk_t **chunk_p)
{
    kv_chunk_t *chunk = kv_chunk_find(region, id);

    if (first >= length || length > region->chunk_size) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         ": tokens %u to %u: at least one, and at most chunk_size, %u",
                         id, region->cache, first, length, region->chunk_size);
    }
    if ((chunk == NULL) != (first == 0)) {
        return attn_fail(chunk == NULL ? ATTN_ERR_NOT_FOUND : ATTN_ERR_EXISTS,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is %s here", id, region->cache,
                         chunk == NULL ? "not" : "already");
    }
    if (chunk != NULL && chunk->length != first) {
        return attn_fail(ATTN_ERR_STALE,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " has %u tokens, the caller believes %u",
                         id, region->cache, chunk->length, first);
    }
    if (chunk != NULL && chunk->named > 0) {
        return attn_fail(ATTN_ERR_BUSY,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is named by an open step", id,
                         region->cache);
    }
    if (chunk == NULL && HASH_COUNT(region->chunks) >= ATTN_KV_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "cache %" PRIu64 " has %u chunks here, the most",
                         region->cache, ATTN_KV_CHUNKS_MAX);
    }
    *chunk_p = chunk;
    return ATTN_OK;
}

/* Is the chunk what it was when the arrival began: its generation, and the page to be filled up?
 * arrival_check() has found it here, or not, as it was then. */
static attn_status_t
arrival_same(const kv_arrival_t *a, const kv_chunk_t *chunk)
{
    if (chunk == NULL || (chunk->generation == a->generation &&
                          (a->old == 0 || chunk->pages[chunk->n_pages - 1] == a->pages[0]))) {
        return ATTN_OK;
    }
    return attn_fail(ATTN_ERR_STALE,
                     "chunk %" PRIu64 " of cache %" PRIu64 " was cut while tokens came for it",
                     a->chunk, a->region->cache);
}

static bool
is_arriving(const kv_region_t *region, uint64_t id)
{
    const kv_arrival_t *a = region->arrivals;

    while (a != NULL && a->chunk != id) {
        a = a->next;
    }
    return a != NULL;
}

attn_status_t
kv_arrival_begin(kv_store_t *store, uint64_t cache, uint64_t id, uint32_t first, uint32_t length,
                 kv_arrival_t **arrival_p)
{
    kv_region_t *region;
    kv_chunk_t *chunk    = NULL;
    attn_status_t status = kv_region_need(store, cache, &region);

    if (status != ATTN_OK || (status = arrival_check(region, id, first, length, &chunk))) {
        return status;
    }
    if (is_arriving(region, id)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is being copied to here", id,
                         cache);
    }
    if (chunk != NULL && kv_chunk_tail_is_shared(region, chunk)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "the last page of chunk %" PRIu64 " of cache %" PRIu64
                         " is in use: by a fork",
                         id, cache);
    }
    uint32_t from = first / region->page_size, old = first % region->page_size != 0;
    uint32_t n = kv_pages_for(region, length) - from;
    if (n - old > region->n_free) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "chunk %" PRIu64 " of cache %" PRIu64 " needs %u pages, %u are free", id,
                         cache, n - old, region->n_free);
    }
    kv_arrival_t *a = calloc(1, sizeof(*a) + n * sizeof(a->pages[0]));
    if (a == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a chunk of %u pages", n);
    }
    if (old > 0) {
        a->pages[0] = chunk->pages[from];
        kv_page_share(region, a->pages[0]);
    }
    for (uint32_t i = old; i < n; i++) {
        a->pages[i] = kv_page_take(region);
    }
    a->region     = region;
    a->chunk      = id;
    a->generation = chunk != NULL ? chunk->generation : 0;
    a->first      = first;
    a->length     = length;
    a->n          = n;
    a->old        = old;
    a->link       = &region->arrivals;
    a->next       = region->arrivals;
    if (a->next != NULL) {
        a->next->link = &a->next;
    }
    region->arrivals = a;
    *arrival_p       = a;
    return ATTN_OK;
}

attn_status_t
kv_arrival_enter(kv_arrival_t *a, uint32_t first, uint32_t n, uint32_t *pages, uint32_t *offsets)
{
    if (a->region == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "the cache was closed while chunk %" PRIu64 " arrived",
                         a->chunk);
    }
    if (first < a->first || first > a->length || n > a->length - first) {
        return attn_fail(ATTN_ERR_INVALID,
                         "tokens %u to %" PRIu64 " of chunk %" PRIu64 ": %u to %u are to come",
                         first, (uint64_t)first + n, a->chunk, a->first, a->length);
    }
    uint32_t size = a->region->page_size, from = a->first / size;
    for (uint32_t i = 0; i < n; i++) {
        pages[i]   = a->pages[(first + i) / size - from];
        offsets[i] = (first + i) % size;
    }
    assert(!a->busy);
    a->busy = true;
    return ATTN_OK;
}

void
kv_arrival_leave(kv_arrival_t *a)
{
    assert(a->region != NULL && a->busy);
    a->busy = false;
}

void
kv_arrival_drop(kv_arrival_t *a)
{
    if (a->region != NULL) {
        for (uint32_t i = 0; i < a->n; i++) {
            kv_page_drop(a->region, a->pages[i]);
        }
        *a->link = a->next;
        if (a->next != NULL) {
            a->next->link = a->link;
        }
    }
    free(a);
}

attn_status_t
kv_arrival_publish(kv_arrival_t *a)
{
    kv_region_t *region = a->region;
    kv_chunk_t *chunk   = NULL;
    attn_status_t status =
        region != NULL
            ? arrival_check(region, a->chunk, a->first, a->length, &chunk)
            : attn_fail(ATTN_ERR_NOT_FOUND, "the cache was closed while chunk %" PRIu64 " arrived",
                        a->chunk);

    if (status == ATTN_OK) {
        status = arrival_same(a, chunk);
    }
    if (status == ATTN_OK) {
        bool made = chunk == NULL;
        chunk     = made ? kv_chunk_make(region, a->chunk) : chunk;
        if (chunk == NULL || !kv_chunk_grow(region, chunk, chunk->n_pages + a->n - a->old)) {
            if (made && chunk != NULL) {
                kv_chunk_drop(region, chunk);
            }
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for chunk %" PRIu64, a->chunk);
        }
    }
    if (status == ATTN_OK) {
        for (uint32_t i = a->old; i < a->n; i++) {
            chunk->pages[chunk->n_pages++] = a->pages[i];
            kv_page_share(region, a->pages[i]); /* until the arrival lets go of it */
        }
        chunk->length     = a->length;
        chunk->generation = chunk->generation > 0 ? chunk->generation : 1;
    }
    kv_arrival_drop(a);
    return status;
}
