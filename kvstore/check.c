/*
 * kv_store_check(): every number that the store keeps is counted again from what it stands
 * for: owners from the page lists of the chunks, mentions from the open steps, extents from
 * the regions. It shares no counting with the rest.
 */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

#define WRONG(...) attn_fail(ATTN_ERR_INTERNAL, __VA_ARGS__)

/* ---- regions ---- */

static attn_status_t
check_extents(const kv_store_t *store)
{
    uint64_t end = 0;

    for (uint32_t i = 0; i < store->n_regions; i++) {
        const kv_region_t *region = store->by_offset[i];
        if (region->offset % KV_EXTENT_BYTES != 0 || region->bytes % KV_EXTENT_BYTES != 0) {
            return WRONG("cache %" PRIu64 ": extent at %" PRIu64 ", %" PRIu64
                         " bytes, is not aligned",
                         region->cache, region->offset, region->bytes);
        }
        if (region->offset < end || region->bytes > store->slab_bytes - region->offset) {
            return WRONG("cache %" PRIu64 ": extent at %" PRIu64
                         " overlaps another or leaves the slab",
                         region->cache, region->offset);
        }
        if (region->page_bytes * region->n_pages > region->bytes) {
            return WRONG("cache %" PRIu64 ": %u pages do not fit its extent", region->cache,
                         region->n_pages);
        }
        if (kv_region_find(store, region->cache) != region) {
            return WRONG("cache %" PRIu64 " is not in the table", region->cache);
        }
        end = region->offset + region->bytes;
    }
    if (HASH_COUNT(store->by_cache) != store->n_regions) {
        return WRONG("%u regions, but %u in the table", store->n_regions,
                     HASH_COUNT(store->by_cache));
    }
    return ATTN_OK;
}

/* ---- steps ---- */

static attn_status_t
check_named(const kv_step_t *step, const kv_named_t *named)
{
    const kv_region_t *region = step->region;
    kv_chunk_t *chunk         = named->chunk;

    if (chunk == NULL) {
        return named->n_new == 0
                   ? ATTN_OK
                   : WRONG("step %" PRIu64 " appends to a chunk without a record", step->id);
    }
    if (kv_chunk_find(region, chunk->id) != chunk) {
        return WRONG("step %" PRIu64 " names a chunk that is not here", step->id);
    }
    chunk->counted++;
    if (named->n_new == 0) {
        return ATTN_OK;
    }
    chunk->counted_new++;
    uint64_t length = (uint64_t)chunk->length + named->n_new;
    uint64_t held   = (uint64_t)chunk->n_pages + chunk->n_reserved;
    if (length > region->chunk_size || held != attn_div_up(length, region->page_size)) {
        return WRONG("step %" PRIu64 ": chunk %" PRIu64 " holds %" PRIu64 " pages for %" PRIu64
                     " tokens",
                     step->id, chunk->id, held, length);
    }
    return ATTN_OK;
}

/* The copies of a step are those that stand in for its chunks' tails, in that order. */
static attn_status_t
check_copies(const kv_step_t *step)
{
    uint32_t n = 0;

    for (uint32_t c = 0; c < step->n_chunks; c++) {
        const kv_chunk_t *chunk = step->chunks[c].chunk;
        if (step->chunks[c].n_new == 0 || chunk->replaced == KV_NO_PAGE) {
            continue;
        }
        const kv_copy_t *copy = &step->copies[n++];
        if (n > step->n_copies || copy->from != chunk->replaced ||
            copy->to != chunk->pages[chunk->n_pages - 1] ||
            copy->tokens != chunk->length % step->region->page_size) {
            return WRONG("step %" PRIu64 ": the copy for chunk %" PRIu64 " is not its tail's",
                         step->id, chunk->id);
        }
    }
    return n == step->n_copies ? ATTN_OK
                               : WRONG("step %" PRIu64 " has %u copies, its chunks want %u",
                                       step->id, step->n_copies, n);
}

static attn_status_t
check_step(const kv_step_t *step)
{
    attn_status_t status = ATTN_OK;
    uint32_t first = 0, spare = 0;

    for (uint32_t i = 0; i < step->n_entries; i++) {
        uint64_t seq = step->entries[i].seq;
        kv_hold_t *hold;
        HASH_FIND(hh, step->region->holds, &seq, sizeof(seq), hold);
        if (hold != &step->entries[i]) {
            return WRONG("step %" PRIu64 " does not hold sequence %" PRIu64, step->id, seq);
        }
        if (hold->first_chunk != first) {
            return WRONG("step %" PRIu64 ": chunks of entry %u start at %u", step->id, i,
                         hold->first_chunk);
        }
        first += hold->n_chunks;
        spare = hold->first_spare == spare ? spare + hold->n_spares : UINT32_MAX;
    }
    if (first != step->n_chunks || spare != step->n_spares) {
        return WRONG("step %" PRIu64 " has %u chunks and %u spare pages, its entries %u and %u",
                     step->id, step->n_chunks, step->n_spares, first, spare);
    }
    for (uint32_t c = 0; status == ATTN_OK && c < step->n_chunks; c++) {
        status = check_named(step, &step->chunks[c]);
    }
    return status == ATTN_OK ? check_copies(step) : status;
}

static attn_status_t
check_steps(const kv_store_t *store, const kv_region_t *region)
{
    const kv_step_t *step, *next;
    attn_status_t status = ATTN_OK;
    uint32_t n_steps = 0, n_entries = 0;

    HASH_ITER(hh, store->steps, step, next)
    {
        if (status == ATTN_OK && step->region == region) {
            n_steps++;
            n_entries += step->n_entries;
            status = check_step(step);
        }
    }
    if (status == ATTN_OK &&
        (n_steps != region->n_steps || n_entries != HASH_COUNT(region->holds))) {
        return WRONG("cache %" PRIu64 ": %u open steps with %u sequences, counted %u with %u",
                     region->cache, n_steps, n_entries, region->n_steps, HASH_COUNT(region->holds));
    }
    return status;
}

/* ---- chunks and pages ---- */

static bool
count_page(const kv_region_t *region, uint32_t *owners, uint32_t page)
{
    if (page >= region->n_pages) {
        return false;
    }
    owners[page]++;
    return true;
}

/* After check_steps(), which counted the mentions. */
static attn_status_t
check_chunk(const kv_region_t *region, const kv_chunk_t *chunk, uint32_t *owners)
{
    bool pages_fit = true;

    if (chunk->length > region->chunk_size ||
        chunk->n_pages != attn_div_up(chunk->length, region->page_size)) {
        return WRONG("chunk %" PRIu64 ": length %u in %u pages", chunk->id, chunk->length,
                     chunk->n_pages);
    }
    if (chunk->named != chunk->counted || chunk->counted_new != chunk->appended ||
        (chunk->appended && chunk->named != 1)) {
        return WRONG("chunk %" PRIu64 ": named %u times, appended to %d; steps say %u and %u",
                     chunk->id, chunk->named, chunk->appended, chunk->counted, chunk->counted_new);
    }
    if (!chunk->appended &&
        (chunk->generation == 0 || chunk->n_reserved > 0 || chunk->replaced != KV_NO_PAGE)) {
        return WRONG("chunk %" PRIu64 ": generation %u, %u pages reserved, outside a step",
                     chunk->id, chunk->generation, chunk->n_reserved);
    }
    if (chunk->n_pages + chunk->n_reserved > chunk->capacity) {
        return WRONG("chunk %" PRIu64 ": %u pages in a list of %u", chunk->id,
                     chunk->n_pages + chunk->n_reserved, chunk->capacity);
    }
    for (uint32_t i = 0; i < chunk->n_pages + chunk->n_reserved; i++) {
        pages_fit = count_page(region, owners, chunk->pages[i]) && pages_fit;
    }
    if (chunk->replaced != KV_NO_PAGE) {
        pages_fit = count_page(region, owners, chunk->replaced) && pages_fit;
    }
    return pages_fit ? ATTN_OK : WRONG("chunk %" PRIu64 ": a page outside the region", chunk->id);
}

static attn_status_t
check_owners(const kv_region_t *region, const uint32_t *owners)
{
    uint32_t n_free = 0, n_shared = 0;

    for (uint32_t page = 0; page < region->n_pages; page++) {
        if (owners[page] != region->owners[page]) {
            return WRONG("cache %" PRIu64 ": page %u is counted %u times, held %u times",
                         region->cache, page, region->owners[page], owners[page]);
        }
        n_free += owners[page] == 0;
        n_shared += owners[page] > 1;
    }
    if (n_free != region->n_free || n_shared != region->n_shared) {
        return WRONG("cache %" PRIu64 ": %u pages free and %u shared, found %u and %u",
                     region->cache, region->n_free, region->n_shared, n_free, n_shared);
    }
    return ATTN_OK;
}

/* As many entries as there are free pages, each free, none twice. Uses up `owners`. */
static attn_status_t
check_free_stack(const kv_region_t *region, uint32_t *owners)
{
    for (uint32_t i = 0; i < region->n_free; i++) {
        uint32_t page = region->free_stack[i];
        if (page >= region->n_pages || owners[page] != 0) {
            return WRONG("cache %" PRIu64 ": page %u on the free stack is held or there twice",
                         region->cache, page);
        }
        owners[page] = 1;
    }
    return ATTN_OK;
}

/* Pages that no chunk accounts for: those of readers, of arrivals, and spare ones of steps. */
static attn_status_t
count_others(const kv_store_t *store, const kv_region_t *region, uint32_t *owners)
{
    const kv_step_t *step, *next;
    bool pages_fit = true;

    for (const kv_read_t *read = region->reads; read != NULL; read = read->next) {
        for (uint32_t i = 0; i < read->n; i++) {
            pages_fit = count_page(region, owners, read->pages[i]) && pages_fit;
        }
    }
    for (const kv_arrival_t *a = region->arrivals; a != NULL; a = a->next) {
        for (uint32_t i = 0; i < a->n; i++) {
            pages_fit = count_page(region, owners, a->pages[i]) && pages_fit;
        }
    }
    HASH_ITER(hh, store->steps, step, next)
    {
        for (uint32_t i = 0; step->region == region && i < step->n_spares; i++) {
            pages_fit = count_page(region, owners, step->spares[i]) && pages_fit;
        }
    }
    return pages_fit ? ATTN_OK
                     : WRONG("cache %" PRIu64 ": a reader's, arriving or spare page outside the region",
                             region->cache);
}

static attn_status_t
check_pages(const kv_store_t *store, const kv_region_t *region)
{
    attn_status_t status = ATTN_OK;
    kv_chunk_t *chunk, *next;
    uint32_t *owners = calloc(region->n_pages, sizeof(*owners));

    if (owners == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to count %u pages", region->n_pages);
    }
    HASH_ITER(hh, region->chunks, chunk, next)
    {
        if (status == ATTN_OK) {
            status = check_chunk(region, chunk, owners);
        }
    }
    if (status == ATTN_OK) {
        status = count_others(store, region, owners);
    }
    if (status == ATTN_OK) {
        status = check_owners(region, owners);
    }
    if (status == ATTN_OK) {
        status = check_free_stack(region, owners);
    }
    free(owners);
    return status;
}

static attn_status_t
check_region(const kv_store_t *store, const kv_region_t *region)
{
    kv_chunk_t *chunk, *next;

    HASH_ITER(hh, region->chunks, chunk, next)
    {
        chunk->counted     = 0;
        chunk->counted_new = 0;
    }
    attn_status_t status = check_steps(store, region);
    return status == ATTN_OK ? check_pages(store, region) : status;
}

attn_status_t
kv_store_check(const kv_store_t *store)
{
    const kv_step_t *step, *next;

    attn_status_t status = check_extents(store);
    HASH_ITER(hh, store->steps, step, next)
    {
        if (status == ATTN_OK && kv_region_find(store, step->region->cache) != step->region) {
            status = WRONG("step %" PRIu64 " is of a cache that is closed", step->id);
        }
    }
    for (uint32_t i = 0; status == ATTN_OK && i < store->n_regions; i++) {
        status = check_region(store, store->by_offset[i]);
    }
    return status;
}
