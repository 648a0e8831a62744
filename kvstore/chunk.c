/* Chunk records, and what is done to a chunk outside a step: fork, truncate, release, read. */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

kv_chunk_t *
kv_chunk_find(const kv_region_t *region, uint64_t id)
{
    kv_chunk_t *chunk;
    HASH_FIND(hh, region->chunks, &id, sizeof(id), chunk);
    return chunk;
}

static const UT_hash_bucket *
bucket_of(const UT_hash_table *table, uint64_t id)
{
    uint32_t bucket;

    HASH_TO_BKT(kv_hash_id(&id), table->num_buckets, bucket);
    return &table->buckets[bucket];
}

void
kv_chunk_prefetch_table(const kv_region_t *region, uint64_t id)
{
    if (region->chunks != NULL) {
        __builtin_prefetch(bucket_of(region->chunks->hh.tbl, id));
    }
}

void
kv_chunk_prefetch(const kv_region_t *region, uint64_t id)
{
    if (region->chunks != NULL) {
        /* The handle is the chunk's first member. */
        const char *first = (const char *)bucket_of(region->chunks->hh.tbl, id)->hh_head;
        if (first != NULL) {
            __builtin_prefetch(first);
            __builtin_prefetch(first + 64);
        }
    }
}

kv_chunk_t *
kv_chunk_make(kv_region_t *region, uint64_t id)
{
    kv_chunk_t *chunk = calloc(1, sizeof(*chunk));
    if (chunk == NULL) {
        return NULL;
    }
    chunk->id       = id;
    chunk->replaced = KV_NO_PAGE;
    HASH_ADD(hh, region->chunks, id, sizeof(chunk->id), chunk);
    if (chunk->hh.tbl == NULL) {
        free(chunk);
        return NULL;
    }
    return chunk;
}

bool
kv_chunk_grow(const kv_region_t *region, kv_chunk_t *chunk, uint32_t n_pages)
{
    if (n_pages <= chunk->capacity) {
        return true;
    }
    /* By doubling, for decode appends a token at a time; no chunk needs more than a full one. */
    uint64_t most     = kv_pages_for(region, region->chunk_size);
    uint64_t capacity = attn_min(most, attn_max(n_pages, 2 * (uint64_t)chunk->capacity));
    uint32_t *pages   = realloc(chunk->pages, capacity * sizeof(*pages));
    if (pages == NULL) {
        return false;
    }
    chunk->pages    = pages;
    chunk->capacity = (uint32_t)capacity;
    return true;
}

void
kv_chunk_drop(kv_region_t *region, kv_chunk_t *chunk)
{
    assert(chunk->replaced == KV_NO_PAGE && chunk->n_reserved == 0);
    for (uint32_t i = 0; i < chunk->n_pages; i++) {
        kv_page_drop(region, chunk->pages[i]);
    }
    HASH_DEL(region->chunks, chunk);
    free(chunk->pages);
    free(chunk);
}

static attn_status_t
chunk_not_found(const kv_region_t *region, uint64_t id)
{
    return attn_fail(ATTN_ERR_NOT_FOUND, "chunk %" PRIu64 " of cache %" PRIu64 " is not here", id,
                     region->cache);
}

/* A chunk that may be changed outside a step. */
static attn_status_t
need_idle_chunk(const kv_store_t *store, uint64_t cache, uint64_t id, kv_region_t **region_p,
                kv_chunk_t **chunk_p)
{
    attn_status_t status = kv_region_need(store, cache, region_p);
    if (status != ATTN_OK) {
        return status;
    }
    *chunk_p = kv_chunk_find(*region_p, id);
    if (*chunk_p == NULL) {
        return chunk_not_found(*region_p, id);
    }
    if ((*chunk_p)->named > 0) {
        return attn_fail(ATTN_ERR_BUSY,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is named %u times by open steps",
                         id, cache, (*chunk_p)->named);
    }
    return ATTN_OK;
}

static attn_status_t
fork_check(const kv_region_t *region, uint64_t from, uint32_t length, uint64_t to,
           kv_chunk_t **source_p)
{
    kv_chunk_t *source = kv_chunk_find(region, from);

    if (source == NULL || source->generation == 0) {
        return chunk_not_found(region, from);
    }
    if (kv_chunk_find(region, to) != NULL) {
        return attn_fail(ATTN_ERR_EXISTS, "chunk %" PRIu64 " of cache %" PRIu64 " exists", to,
                         region->cache);
    }
    if (length > source->length) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         ": fork of length %u, %u tokens are committed",
                         from, region->cache, length, source->length);
    }
    if (HASH_COUNT(region->chunks) >= ATTN_KV_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "cache %" PRIu64 " has %u chunks here, the most",
                         region->cache, ATTN_KV_CHUNKS_MAX);
    }
    *source_p = source;
    return ATTN_OK;
}

attn_status_t
kv_chunk_fork(kv_store_t *store, uint64_t cache, uint64_t from, uint32_t length, uint64_t to)
{
    kv_region_t *region;
    kv_chunk_t *source = NULL;

    attn_status_t status = kv_region_need(store, cache, &region);
    if (status != ATTN_OK) {
        return status;
    }
    status = fork_check(region, from, length, to, &source);
    if (status != ATTN_OK) {
        return status;
    }

    uint32_t n_pages  = kv_pages_for(region, length);
    kv_chunk_t *chunk = kv_chunk_make(region, to);
    if (chunk == NULL || !kv_chunk_grow(region, chunk, n_pages)) {
        if (chunk != NULL) {
            kv_chunk_drop(region, chunk);
        }
        return attn_fail(ATTN_ERR_NO_MEMORY, "chunk %" PRIu64 " of cache %" PRIu64 ": no memory",
                         to, cache);
    }
    for (uint32_t i = 0; i < n_pages; i++) {
        chunk->pages[i] = kv_chunk_page(source, i);
        kv_page_share(region, chunk->pages[i]);
    }
    chunk->n_pages    = n_pages;
    chunk->length     = length;
    chunk->generation = 1;
    return ATTN_OK;
}

static attn_status_t
wrong_generation(const kv_region_t *region, const kv_chunk_t *chunk, uint32_t generation)
{
    return attn_fail(ATTN_ERR_STALE,
                     "chunk %" PRIu64 " of cache %" PRIu64
                     " has generation %u, the caller believes %u",
                     chunk->id, region->cache, chunk->generation, generation);
}

static attn_status_t
truncate_check(const kv_region_t *region, const kv_chunk_t *chunk, uint32_t generation,
               uint32_t length)
{
    if (chunk->generation != generation) {
        return wrong_generation(region, chunk, generation);
    }
    if (kv_left_check(region, chunk->id) != ATTN_OK) {
        return ATTN_ERR_BUSY;
    }
    if (length > chunk->length) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         ": truncate to %u, %u tokens are committed",
                         chunk->id, region->cache, length, chunk->length);
    }
    if (generation == UINT32_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " was truncated too often: fork it and release it",
                         chunk->id, region->cache);
    }
    return ATTN_OK;
}

attn_status_t
kv_chunk_truncate(kv_store_t *store, uint64_t cache, uint64_t id, uint32_t generation,
                  uint32_t length, uint32_t *generation_p)
{
    kv_region_t *region;
    kv_chunk_t *chunk;

    attn_status_t status = need_idle_chunk(store, cache, id, &region, &chunk);
    if (status != ATTN_OK) {
        return status;
    }
    status = truncate_check(region, chunk, generation, length);
    if (status != ATTN_OK) {
        return status;
    }
    uint32_t keep = kv_pages_for(region, length);
    while (chunk->n_pages > keep) {
        kv_page_drop(region, chunk->pages[--chunk->n_pages]);
    }
    chunk->length = length;
    chunk->generation++;
    if (generation_p != NULL) {
        *generation_p = chunk->generation;
    }
    return ATTN_OK;
}

attn_status_t
kv_chunk_release(kv_store_t *store, uint64_t cache, uint64_t id)
{
    kv_region_t *region;
    kv_chunk_t *chunk;

    attn_status_t status = need_idle_chunk(store, cache, id, &region, &chunk);
    if (status == ATTN_OK) {
        kv_chunk_drop(region, chunk);
    }
    if (status == ATTN_OK || (status == ATTN_ERR_NOT_FOUND && region != NULL)) {
        kv_left_forget(region, id);
    }
    return status;
}

attn_status_t
kv_chunk_describe(const kv_store_t *store, uint64_t cache, uint64_t id, kv_chunk_info_t *info)
{
    kv_region_t *region;

    attn_status_t status = kv_region_need(store, cache, &region);
    if (status != ATTN_OK) {
        return status;
    }
    const kv_chunk_t *chunk = kv_chunk_find(region, id);
    if (chunk == NULL) {
        return chunk_not_found(region, id);
    }
    *info = (kv_chunk_info_t){
        .generation = chunk->generation,
        .length     = chunk->length,
        .n_pages    = chunk->n_pages,
        .in_step    = chunk->named > 0,
    };
    return ATTN_OK;
}

/* ---- reading ---- */

static attn_status_t
read_check(const kv_region_t *region, uint64_t id, uint32_t generation, uint32_t first, uint32_t n,
           const kv_chunk_t **chunk_p)
{
    const kv_chunk_t *chunk = kv_chunk_find(region, id);

    if (chunk == NULL || chunk->generation == 0) {
        return chunk_not_found(region, id);
    }
    if (chunk->generation != generation) {
        return wrong_generation(region, chunk, generation);
    }
    if (first > chunk->length || n > chunk->length - first) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         ": %u tokens from %u on, %u are committed",
                         id, region->cache, n, first, chunk->length);
    }
    *chunk_p = chunk;
    return ATTN_OK;
}

attn_status_t
kv_read_begin(kv_store_t *store, uint64_t cache, uint64_t id, uint32_t generation, uint32_t first,
              uint32_t n, uint32_t *pages, uint32_t *offsets, uint32_t *n_held, kv_read_t **read_p)
{
    kv_region_t *region;
    const kv_chunk_t *chunk = NULL;

    attn_status_t status = kv_region_need(store, cache, &region);
    if (status != ATTN_OK || (status = read_check(region, id, generation, first, n, &chunk))) {
        return status;
    }
    uint32_t size = region->page_size, whole = chunk->length / size; /* pages that are full */
    uint32_t from   = first / size;
    uint32_t end    = (uint32_t)attn_min(attn_div_up((uint64_t)first + n, size), whole);
    kv_read_t *read = calloc(1, sizeof(*read) + (end > from ? end - from : 0) * sizeof(uint32_t));
    if (read == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to read %u tokens", n);
    }
    for (uint32_t i = 0; i < n; i++) {
        pages[i]   = kv_chunk_page(chunk, (first + i) / size);
        offsets[i] = (first + i) % size;
    }
    for (uint32_t page = from; page < end; page++) {
        read->pages[read->n++] = kv_chunk_page(chunk, page);
        kv_page_share(region, kv_chunk_page(chunk, page));
    }
    *n_held =
        (uint32_t)attn_min(n, whole * (uint64_t)size > first ? whole * (uint64_t)size - first : 0);
    read->region  = region;
    read->link    = &region->reads;
    read->next    = region->reads;
    region->reads = read;
    if (read->next != NULL) {
        read->next->link = &read->next;
    }
    *read_p = read;
    return ATTN_OK;
}

void
kv_read_end(kv_read_t *read)
{
    for (uint32_t i = 0; i < read->n; i++) {
        kv_page_drop(read->region, read->pages[i]);
    }
    *read->link = read->next;
    if (read->next != NULL) {
        read->next->link = read->link;
    }
    free(read);
}
