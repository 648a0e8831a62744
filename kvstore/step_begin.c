/*
 * The checks of kv_step_begin(). They change nothing that anybody can see: they find the
 * chunks, compare them with what the caller believes, and count the pages.
 *
 * A chunk that is here is marked with the number of the begin that looks at it, and so the
 * second mention in one step is seen without a table. Ids that are not here, and sequences,
 * are sorted and neighbours compared; both are few.
 */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

typedef struct mention {
    uint64_t id;
    uint32_t entry, n_new;
} mention_t;

static int
mention_compare(const void *a, const void *b)
{
    const mention_t *x = a, *y = b;

    if (x->id != y->id) {
        return x->id < y->id ? -1 : 1;
    }
    return (x->entry > y->entry) - (x->entry < y->entry);
}

/* Sorts. Returns the first of two mentions that exclude each other, or NULL. */
static const mention_t *
mentions_clash(mention_t *mentions, uint32_t n)
{
    qsort(mentions, n, sizeof(*mentions), mention_compare);
    for (uint32_t i = 1; i < n; i++) {
        const mention_t *a = &mentions[i - 1], *b = &mentions[i];
        if (a->id == b->id && (a->entry == b->entry || a->n_new > 0 || b->n_new > 0)) {
            return a;
        }
    }
    return NULL;
}

static attn_status_t
named_twice(const kv_begin_t *begin, uint64_t chunk, uint32_t entry)
{
    return attn_fail(ATTN_ERR_INVALID,
                     "step %" PRIu64 ": chunk %" PRIu64
                     " is named twice (entry %u), in one entry or to be appended to",
                     begin->step->id, chunk, entry);
}

/* ---- sequences ---- */

static attn_status_t
check_sequences_differ(const kv_begin_t *begin)
{
    uint32_t n           = begin->step->n_entries;
    attn_status_t status = ATTN_OK;
    mention_t *mentions  = malloc(n * sizeof(*mentions));

    if (mentions == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "step %" PRIu64 ": no memory", begin->step->id);
    }
    for (uint32_t i = 0; i < n; i++) {
        mentions[i] = (mention_t){.id = begin->entries[i].seq, .entry = i, .n_new = 1};
    }
    const mention_t *twice = mentions_clash(mentions, n);
    if (twice != NULL) {
        status =
            attn_fail(ATTN_ERR_INVALID, "step %" PRIu64 ": sequence %" PRIu64 " is named twice",
                      begin->step->id, twice->id);
    }
    free(mentions);
    return status;
}

static attn_status_t
check_sequences(const kv_begin_t *begin)
{
    bool ascending = true;

    for (uint32_t i = 0; i < begin->step->n_entries; i++) {
        uint64_t seq = begin->entries[i].seq;
        kv_hold_t *hold;
        HASH_FIND(hh, begin->region->holds, &seq, sizeof(seq), hold);
        if (hold != NULL) {
            return attn_fail(ATTN_ERR_BUSY,
                             "sequence %" PRIu64 " of cache %" PRIu64 " is in another open step",
                             seq, begin->region->cache);
        }
        ascending = ascending && (i == 0 || seq > begin->entries[i - 1].seq);
    }
    return ascending ? ATTN_OK : check_sequences_differ(begin);
}

/* ---- chunks that are not here ---- */

static attn_status_t
check_missing_differ(const kv_begin_t *begin)
{
    const kv_step_t *step = begin->step;
    attn_status_t status  = ATTN_OK;
    uint32_t n            = 0;
    mention_t *mentions   = malloc(begin->n_missing * sizeof(*mentions));

    if (mentions == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "step %" PRIu64 ": no memory", step->id);
    }
    for (uint32_t i = 0; i < step->n_entries; i++) {
        for (uint32_t c = 0; c < begin->entries[i].n_chunks; c++) {
            const kv_step_chunk_t *want = &begin->entries[i].chunks[c];
            if (step->chunks[step->entries[i].first_chunk + c].chunk == NULL) {
                mentions[n++] = (mention_t){want->chunk, i, want->n_new};
            }
        }
    }
    assert(n == begin->n_missing);
    const mention_t *twice = mentions_clash(mentions, n);
    if (twice != NULL) {
        status = named_twice(begin, twice->id, twice->entry);
    }
    free(mentions);
    return status;
}

static attn_status_t
check_missing(kv_begin_t *begin, const kv_step_chunk_t *want)
{
    if (want->generation > 0) {
        return attn_fail(ATTN_ERR_NOT_FOUND,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " is not here, the caller believes generation %u, length %u",
                         want->chunk, begin->region->cache, want->generation, want->length);
    }
    if (want->length > 0) {
        return attn_fail(ATTN_ERR_STALE,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " is not here (generation 0, length 0), the caller believes generation 0,"
                         " length %u",
                         want->chunk, begin->region->cache, want->length);
    }
    begin->n_missing++;
    begin->n_made += want->n_new > 0;
    return ATTN_OK;
}

/* ---- chunks that are here ---- */

static attn_status_t
check_found(kv_begin_t *begin, uint32_t entry, const kv_step_chunk_t *want, kv_chunk_t *chunk)
{
    if (chunk->stamp == begin->store->stamp &&
        (chunk->stamp_entry == entry || chunk->stamp_new || want->n_new > 0)) {
        return named_twice(begin, want->chunk, entry);
    }
    if (chunk->appended || (chunk->named > 0 && want->n_new > 0)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "chunk %" PRIu64 " of cache %" PRIu64 " is %s another open step",
                         want->chunk, begin->region->cache,
                         chunk->appended ? "appended to by" : "to be appended to, and named by");
    }
    if (chunk->generation != want->generation || chunk->length != want->length) {
        return attn_fail(ATTN_ERR_STALE,
                         "chunk %" PRIu64 " of cache %" PRIu64
                         " has generation %u, length %u, the caller believes generation %u,"
                         " length %u",
                         want->chunk, begin->region->cache, chunk->generation, chunk->length,
                         want->generation, want->length);
    }
    chunk->stamp       = begin->store->stamp;
    chunk->stamp_entry = entry;
    chunk->stamp_new   = want->n_new > 0;
    if (want->n_new > 0 && kv_chunk_tail_is_shared(begin->region, chunk)) {
        begin->step->n_copies++;
        begin->n_pages++;
    }
    return ATTN_OK;
}

static attn_status_t
check_chunk(kv_begin_t *begin, uint32_t entry, const kv_step_chunk_t *want, kv_named_t *named)
{
    const kv_region_t *region = begin->region;
    uint64_t length           = (uint64_t)want->length + want->n_new;

    if (length > region->chunk_size) {
        return attn_fail(ATTN_ERR_INVALID,
                         "step %" PRIu64 ": chunk %" PRIu64 ": length %u + n_new %u is above"
                         " chunk_size %u",
                         begin->step->id, want->chunk, want->length, want->n_new,
                         region->chunk_size);
    }
    kv_chunk_t *chunk    = kv_chunk_find(region, want->chunk);
    *named               = (kv_named_t){chunk, want->n_new};
    attn_status_t status = kv_left_check(region, want->chunk);
    if (status == ATTN_OK) {
        status =
            chunk != NULL ? check_found(begin, entry, want, chunk) : check_missing(begin, want);
    }
    begin->n_pages += kv_pages_for(region, (uint32_t)length) - kv_pages_for(region, want->length);
    return status;
}

/* ---- looking ahead ---- */

/* Chunks lie all over the heap: each is asked for some chunks before it is looked at. */
#define AHEAD_TABLE 32u
#define AHEAD_CHUNK 16u

static const kv_step_chunk_t *
cursor_next(const kv_begin_t *begin, kv_cursor_t *at)
{
    while (at->entry < begin->step->n_entries) {
        const kv_step_entry_t *entry = &begin->entries[at->entry];
        if (at->chunk < entry->n_chunks) {
            return &entry->chunks[at->chunk++];
        }
        at->entry++;
        at->chunk = 0;
    }
    return NULL;
}

static void
fetch_table(kv_begin_t *begin)
{
    const kv_step_chunk_t *want = cursor_next(begin, &begin->ahead_table);

    if (want != NULL) {
        kv_chunk_prefetch_table(begin->region, want->chunk);
    }
}

static void
fetch_chunk(kv_begin_t *begin)
{
    const kv_step_chunk_t *want = cursor_next(begin, &begin->ahead_chunk);

    if (want != NULL) {
        kv_chunk_prefetch(begin->region, want->chunk);
    }
}

static attn_status_t
check_entry(kv_begin_t *begin, uint32_t i)
{
    const kv_step_entry_t *entry = &begin->entries[i];
    kv_hold_t *hold              = &begin->step->entries[i];
    kv_named_t *named            = begin->step->chunks + hold->first_chunk;

    if (entry->n_spare > ATTN_KV_SPARE_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "step %" PRIu64 ": entry %u: %u spare tokens, at most %u", begin->step->id,
                         i, entry->n_spare, ATTN_KV_SPARE_MAX);
    }
    hold->first_spare = begin->step->n_spares;
    hold->n_spares    = kv_pages_for(begin->region, entry->n_spare);
    begin->step->n_spares += hold->n_spares;
    begin->n_pages += hold->n_spares;
    for (uint32_t c = 0; c < entry->n_chunks; c++) {
        if (c > 0 && entry->chunks[c].number <= entry->chunks[c - 1].number) {
            return attn_fail(
                ATTN_ERR_INVALID, "step %" PRIu64 ": entry %u: chunk number %u comes after %u",
                begin->step->id, i, entry->chunks[c].number, entry->chunks[c - 1].number);
        }
        fetch_table(begin);
        fetch_chunk(begin);
        attn_status_t status = check_chunk(begin, i, &entry->chunks[c], &named[c]);
        if (status != ATTN_OK) {
            return status;
        }
    }
    return ATTN_OK;
}

/* ---- all ---- */

static attn_status_t
check_room(const kv_begin_t *begin)
{
    const kv_region_t *region = begin->region;
    uint64_t chunks           = (uint64_t)HASH_COUNT(region->chunks) + begin->n_made;

    if (begin->n_pages > region->n_free) {
        return attn_fail(
            ATTN_ERR_EXHAUSTED,
            "step %" PRIu64 " needs %" PRIu64 " pages of cache %" PRIu64 ", %u of %u are free",
            begin->step->id, begin->n_pages, region->cache, region->n_free, region->n_pages);
    }
    if (chunks > ATTN_KV_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "step %" PRIu64 " would bring cache %" PRIu64 " to %" PRIu64
                         " chunks, at most %u are held",
                         begin->step->id, region->cache, chunks, ATTN_KV_CHUNKS_MAX);
    }
    return ATTN_OK;
}

attn_status_t
kv_begin_check(kv_begin_t *begin)
{
    begin->store->stamp++;
    attn_status_t status = check_sequences(begin);
    for (uint32_t i = 0; i < AHEAD_TABLE; i++) {
        fetch_table(begin);
    }
    for (uint32_t i = 0; i < AHEAD_CHUNK; i++) {
        fetch_chunk(begin);
    }
    for (uint32_t i = 0; status == ATTN_OK && i < begin->step->n_entries; i++) {
        status = check_entry(begin, i);
    }
    if (status == ATTN_OK && begin->n_missing > 1) {
        status = check_missing_differ(begin);
    }
    return status == ATTN_OK ? check_room(begin) : status;
}
