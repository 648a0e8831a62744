/*
 * The slab, its regions and their pages. Regions are kept in order of their offset, and
 * the free extents are the gaps between them: they cannot disagree with the regions, and
 * closing a region joins its neighbours' gaps by itself. With at most
 * ATTN_KV_REGIONS_MAX regions, opened rarely, a walk over them is cheap.
 */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

attn_status_t
kv_store_create(uint64_t slab_bytes, kv_store_t **store_p)
{
    if (slab_bytes < KV_EXTENT_BYTES) {
        return attn_fail(ATTN_ERR_INVALID, "slab_bytes %" PRIu64 " is less than %" PRIu64,
                         slab_bytes, KV_EXTENT_BYTES);
    }
    kv_store_t *store = calloc(1, sizeof(*store));
    if (store == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a store of %zu bytes", sizeof(*store));
    }
    store->slab_bytes = slab_bytes - slab_bytes % KV_EXTENT_BYTES;
    *store_p          = store;
    return ATTN_OK;
}

static void
region_destroy(kv_region_t *region)
{
    kv_chunk_t *chunk, *next;

    assert(region->reads == NULL);
    kv_arrivals_detach(region);
    HASH_CLEAR(hh, region->holds); /* the records are the steps' */
    HASH_ITER(hh, region->chunks, chunk, next)
    {
        HASH_DEL(region->chunks, chunk);
        free(chunk->pages);
        free(chunk);
    }
    free(region->owners);
    free(region->free_stack);
    free(region);
}

void
kv_store_destroy(kv_store_t *store)
{
    kv_step_t *step, *next;

    if (store == NULL) {
        return;
    }
    HASH_CLEAR(hh, store->by_cache);
    for (uint32_t i = 0; i < store->n_regions; i++) {
        region_destroy(store->by_offset[i]);
    }
    HASH_ITER(hh, store->steps, step, next)
    {
        HASH_DEL(store->steps, step);
        kv_step_free(step);
    }
    free(store);
}

/* ---- extents ---- */

/* The gap before region i, or before the slab's end for i = n_regions. */
static uint64_t
gap_before(const kv_store_t *store, uint32_t i, uint64_t *start)
{
    const kv_region_t *before = i > 0 ? store->by_offset[i - 1] : NULL;

    *start = before != NULL ? before->offset + before->bytes : 0;
    return (i < store->n_regions ? store->by_offset[i]->offset : store->slab_bytes) - *start;
}

void
kv_store_free_bytes(const kv_store_t *store, uint64_t *total, uint64_t *largest)
{
    uint64_t start;

    *total   = 0;
    *largest = 0;
    for (uint32_t i = 0; i <= store->n_regions; i++) {
        uint64_t gap = gap_before(store, i, &start);
        *total += gap;
        *largest = attn_max(*largest, gap);
    }
}

/* First fit. Returns the place in by_offset[], or n_regions + 1 where nothing fits. */
static uint32_t
extent_find(const kv_store_t *store, uint64_t bytes, uint64_t *offset)
{
    uint32_t i = 0;

    while (i <= store->n_regions && gap_before(store, i, offset) < bytes) {
        i++;
    }
    return i;
}

static uint64_t
extent_round_up(uint64_t bytes)
{
    return attn_div_up(bytes, KV_EXTENT_BYTES) * KV_EXTENT_BYTES;
}

/* ---- regions ---- */

kv_region_t *
kv_region_find(const kv_store_t *store, uint64_t cache)
{
    kv_region_t *region;
    HASH_FIND(hh, store->by_cache, &cache, sizeof(cache), region);
    return region;
}

attn_status_t
kv_region_need(const kv_store_t *store, uint64_t cache, kv_region_t **region_p)
{
    *region_p = kv_region_find(store, cache);
    if (*region_p == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "cache %" PRIu64 " has no region here", cache);
    }
    return ATTN_OK;
}

static attn_status_t
check_shape(uint64_t cache, uint64_t page_bytes, uint32_t page_size, uint32_t chunk_size)
{
    if (cache == 0) {
        return attn_fail(ATTN_ERR_INVALID, "cache 0 is no cache");
    }
    if (page_bytes == 0 || page_size == 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "cache %" PRIu64 ": page_bytes %" PRIu64
                         " and page_size %u must be at least 1",
                         cache, page_bytes, page_size);
    }
    if (chunk_size == 0 || chunk_size > ATTN_KV_CHUNK_TOKENS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "cache %" PRIu64 ": chunk_size %u is not 1 to %u", cache,
                         chunk_size, ATTN_KV_CHUNK_TOKENS_MAX);
    }
    return ATTN_OK;
}

/* How large the region becomes: whole pages in an extent that is no larger than `bytes`. */
static attn_status_t
region_size(const kv_store_t *store, kv_region_t *region, uint64_t bytes)
{
    uint64_t total, largest;

    kv_store_free_bytes(store, &total, &largest);
    if (bytes == 0) {
        bytes = attn_min(total / 4, largest);
    }
    bytes -= bytes % KV_EXTENT_BYTES;

    uint64_t n_pages = bytes / region->page_bytes;
    uint64_t n_least = attn_div_up(region->chunk_size, region->page_size);
    if (n_pages < n_least) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "cache %" PRIu64 ": %" PRIu64 " bytes hold %" PRIu64 " pages of %" PRIu64
                         " bytes, one chunk needs %" PRIu64,
                         region->cache, bytes, n_pages, region->page_bytes, n_least);
    }
    region->bytes = extent_round_up(n_pages * region->page_bytes);
    if (region->bytes > largest) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "cache %" PRIu64 ": wants %" PRIu64
                         " bytes, the largest free extent has %" PRIu64,
                         region->cache, region->bytes, largest);
    }
    if (n_pages > ATTN_KV_PAGES_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "cache %" PRIu64 ": %" PRIu64 " pages, a region has at most %u",
                         region->cache, n_pages, ATTN_KV_PAGES_MAX);
    }
    region->n_pages = (uint32_t)n_pages;
    return ATTN_OK;
}

/* All pages free, the lowest on top. */
static bool
region_make_pages(kv_region_t *region)
{
    region->owners     = calloc(region->n_pages, sizeof(*region->owners));
    region->free_stack = calloc(region->n_pages, sizeof(*region->free_stack));
    if (region->owners == NULL || region->free_stack == NULL) {
        return false;
    }
    region->n_free = region->n_pages;
    for (uint32_t i = 0; i < region->n_pages; i++) {
        region->free_stack[i] = region->n_pages - 1 - i;
    }
    return true;
}

static attn_status_t
region_insert(kv_store_t *store, kv_region_t *region)
{
    if (!region_make_pages(region)) {
        return attn_fail(ATTN_ERR_NO_MEMORY,
                         "cache %" PRIu64 ": no memory for the table of %u pages", region->cache,
                         region->n_pages);
    }
    HASH_ADD(hh, store->by_cache, cache, sizeof(region->cache), region);
    if (region->hh.tbl == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "cache %" PRIu64 ": no memory for its region",
                         region->cache);
    }

    uint32_t at = extent_find(store, region->bytes, &region->offset);
    assert(at <= store->n_regions); /* region_size saw an extent that is large enough */
    memmove(store->by_offset + at + 1, store->by_offset + at,
            (store->n_regions - at) * sizeof(store->by_offset[0]));
    store->by_offset[at] = region;
    store->n_regions++;
    return ATTN_OK;
}

attn_status_t
kv_region_open(kv_store_t *store, uint64_t cache, uint64_t page_bytes, uint32_t page_size,
               uint32_t chunk_size, uint64_t bytes, kv_region_info_t *info)
{
    attn_status_t status = check_shape(cache, page_bytes, page_size, chunk_size);
    if (status != ATTN_OK) {
        return status;
    }
    if (kv_region_find(store, cache) != NULL) {
        return attn_fail(ATTN_ERR_EXISTS, "cache %" PRIu64 " has a region already", cache);
    }
    if (store->n_regions == ATTN_KV_REGIONS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "cache %" PRIu64 ": %u regions are open, the most",
                         cache, store->n_regions);
    }

    kv_region_t *region = calloc(1, sizeof(*region));
    if (region == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "cache %" PRIu64 ": no memory for its region", cache);
    }
    region->cache      = cache;
    region->page_bytes = page_bytes;
    region->page_size  = page_size;
    region->chunk_size = chunk_size;
    status             = region_size(store, region, bytes);
    if (status == ATTN_OK) {
        status = region_insert(store, region);
    }
    if (status != ATTN_OK) {
        region_destroy(region);
        return status;
    }
    return info != NULL ? kv_region_describe(store, cache, info) : ATTN_OK;
}

attn_status_t
kv_region_close(kv_store_t *store, uint64_t cache)
{
    kv_region_t *region;
    uint32_t at = 0;

    attn_status_t status = kv_region_need(store, cache, &region);
    if (status != ATTN_OK) {
        return status;
    }
    if (region->n_steps > 0) {
        return attn_fail(ATTN_ERR_BUSY, "cache %" PRIu64 " has %u open steps", cache,
                         region->n_steps);
    }
    if (region->reads != NULL || kv_arrivals_busy(region)) {
        return attn_fail(ATTN_ERR_BUSY, "cache %" PRIu64 " is being %s", cache,
                         region->reads != NULL ? "read" : "copied to");
    }
    while (store->by_offset[at] != region) {
        at++;
    }
    store->n_regions--;
    memmove(store->by_offset + at, store->by_offset + at + 1,
            (store->n_regions - at) * sizeof(store->by_offset[0]));
    HASH_DEL(store->by_cache, region);
    region_destroy(region);
    return ATTN_OK;
}

attn_status_t
kv_region_describe(const kv_store_t *store, uint64_t cache, kv_region_info_t *info)
{
    kv_region_t *region;

    attn_status_t status = kv_region_need(store, cache, &region);
    if (status != ATTN_OK) {
        return status;
    }
    *info = (kv_region_info_t){
        .offset       = region->offset,
        .bytes        = region->bytes,
        .n_pages      = region->n_pages,
        .free_pages   = region->n_free,
        .page_size    = region->page_size,
        .chunk_size   = region->chunk_size,
        .chunks       = HASH_COUNT(region->chunks),
        .shared_pages = region->n_shared,
    };
    return ATTN_OK;
}

/* ---- pages ---- */

uint32_t
kv_page_take(kv_region_t *region)
{
    assert(region->n_free > 0);
    uint32_t page = region->free_stack[--region->n_free];
    assert(region->owners[page] == 0);
    region->owners[page] = 1;
    return page;
}

void
kv_page_share(kv_region_t *region, uint32_t page)
{
    assert(page < region->n_pages && region->owners[page] > 0);
    region->n_shared += region->owners[page] == 1;
    region->owners[page]++;
}

void
kv_page_drop(kv_region_t *region, uint32_t page)
{
    assert(page < region->n_pages && region->owners[page] > 0);
    region->owners[page]--;
    region->n_shared -= region->owners[page] == 1;
    if (region->owners[page] == 0) {
        region->free_stack[region->n_free++] = page;
    }
}
