/*
 * A step's life. begin runs in three parts, so that it happens whole or not at all:
 *
 *     check    step_begin.c: everything that can be wrong with the request
 *     prepare  everything that allocates: records of new chunks, room in page lists, the
 *              holds on sequences; undone if memory runs out
 *     reserve  takes the pages, which are known to be there; cannot fail
 *
 * commit and abort only give back, so they cannot fail either, but for a wrong argument.
 */
#include "kvstore/kvstore_int.h"

#include <stdlib.h>

/* ---- begin ---- */

static attn_status_t
step_no_memory(uint64_t step_id)
{
    return attn_fail(ATTN_ERR_NO_MEMORY, "step %" PRIu64 ": no memory", step_id);
}

static attn_status_t
check_limits(kv_store_t *store, uint64_t step_id, const kv_step_entry_t *entries,
             uint32_t n_entries, uint64_t *n_chunks)
{
    if (step_id == 0) {
        return attn_fail(ATTN_ERR_INVALID, "step 0 is no step");
    }
    if (n_entries > ATTN_KV_ENTRIES_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "step %" PRIu64 " has %u entries, at most %u", step_id,
                         n_entries, ATTN_KV_ENTRIES_MAX);
    }
    for (uint32_t i = 0; i < n_entries; i++) {
        *n_chunks += entries[i].n_chunks;
    }
    if (*n_chunks > ATTN_KV_STEP_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "step %" PRIu64 " names %" PRIu64 " chunks, at most %u",
                         step_id, *n_chunks, ATTN_KV_STEP_CHUNKS_MAX);
    }
    if (kv_step_find(store, step_id) != NULL) {
        return attn_fail(ATTN_ERR_EXISTS, "step %" PRIu64 " is open", step_id);
    }
    if (HASH_COUNT(store->steps) >= ATTN_KV_STEPS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "step %" PRIu64 ": %u steps are open, the most",
                         step_id, ATTN_KV_STEPS_MAX);
    }
    return ATTN_OK;
}

/* One block: the step, its entries, its chunks. */
static kv_step_t *
step_alloc(kv_region_t *region, uint64_t id, const kv_step_entry_t *entries, uint32_t n_entries,
           uint32_t n_chunks)
{
    kv_step_t *step =
        calloc(1, sizeof(*step) + n_entries * sizeof(kv_hold_t) + n_chunks * sizeof(kv_named_t));
    uint32_t first = 0;

    if (step == NULL) {
        return NULL;
    }
    step->id        = id;
    step->region    = region;
    step->n_entries = n_entries;
    step->n_chunks  = n_chunks;
    step->entries   = (kv_hold_t *)(step + 1);
    step->chunks    = (kv_named_t *)(step->entries + n_entries);
    for (uint32_t i = 0; i < n_entries; i++) {
        step->entries[i].seq         = entries[i].seq;
        step->entries[i].first_chunk = first;
        step->entries[i].n_chunks    = entries[i].n_chunks;
        first += entries[i].n_chunks;
    }
    return step;
}

void
kv_step_free(kv_step_t *step)
{
    free(step->copies);
    free(step->spares);
    free(step);
}

/* Records of the chunks that begin makes, and room for the pages of those it appends to. */
static bool
prepare_entry(kv_step_t *step, uint32_t i, const kv_step_entry_t *entry)
{
    kv_region_t *region = step->region;

    for (uint32_t c = 0; c < entry->n_chunks; c++) {
        const kv_step_chunk_t *want = &entry->chunks[c];
        kv_named_t *named           = &step->chunks[step->entries[i].first_chunk + c];
        if (want->n_new == 0) {
            continue;
        }
        if (named->chunk == NULL) {
            named->chunk = kv_chunk_make(region, want->chunk);
        }
        if (named->chunk == NULL ||
            !kv_chunk_grow(region, named->chunk,
                           kv_pages_for(region, want->length + want->n_new))) {
            return false;
        }
    }
    HASH_ADD(hh, region->holds, seq, sizeof(step->entries[i].seq), &step->entries[i]);
    return step->entries[i].hh.tbl != NULL;
}

static void
prepare_undo(kv_step_t *step)
{
    for (uint32_t i = 0; i < step->n_entries; i++) {
        if (step->entries[i].hh.tbl != NULL) {
            HASH_DELETE(hh, step->region->holds, &step->entries[i]);
        }
    }
    for (uint32_t c = 0; c < step->n_chunks; c++) {
        kv_chunk_t *chunk = step->chunks[c].chunk;
        /* Nobody else names a chunk of generation 0, so it is one of this step's. */
        if (chunk != NULL && chunk->generation == 0) {
            kv_chunk_drop(step->region, chunk);
        }
    }
}

static bool
prepare(kv_begin_t *begin)
{
    kv_step_t *step = begin->step;

    if (step->n_copies > 0) {
        step->copies = calloc(step->n_copies, sizeof(*step->copies));
        if (step->copies == NULL) {
            return false;
        }
    }
    if (step->n_spares > 0) {
        step->spares = calloc(step->n_spares, sizeof(*step->spares));
        if (step->spares == NULL) {
            return false;
        }
    }
    for (uint32_t i = 0; i < step->n_entries; i++) {
        if (!prepare_entry(step, i, &begin->entries[i])) {
            prepare_undo(step);
            return false;
        }
    }
    HASH_ADD(hh, begin->store->steps, id, sizeof(step->id), step);
    if (step->hh.tbl == NULL) {
        prepare_undo(step);
        return false;
    }
    return true;
}

/* Pages behind the chunk's own, and a stand-in for a shared tail. */
static void
reserve_chunk(kv_region_t *region, kv_chunk_t *chunk, uint32_t n_new, kv_copy_t **copy)
{
    uint32_t n_pages = kv_pages_for(region, chunk->length + n_new);

    assert(n_pages <= chunk->capacity);
    if (kv_chunk_tail_is_shared(region, chunk)) {
        uint32_t *tail  = &chunk->pages[chunk->n_pages - 1];
        chunk->replaced = *tail;
        *tail           = kv_page_take(region);
        *(*copy)++      = (kv_copy_t){chunk->replaced, *tail, chunk->length % region->page_size};
    }
    chunk->n_reserved = n_pages - chunk->n_pages;
    for (uint32_t i = chunk->n_pages; i < n_pages; i++) {
        chunk->pages[i] = kv_page_take(region);
    }
    chunk->appended = true;
}

static void
reserve(kv_step_t *step)
{
    kv_copy_t *copy = step->copies;

    for (uint32_t c = 0; c < step->n_chunks; c++) {
        kv_named_t *named = &step->chunks[c];
        if (named->chunk != NULL) {
            named->chunk->named++;
        }
        if (named->n_new > 0) {
            reserve_chunk(step->region, named->chunk, named->n_new, &copy);
        }
    }
    for (uint32_t i = 0; i < step->n_spares; i++) {
        step->spares[i] = kv_page_take(step->region);
    }
    assert(step->n_copies == 0 || copy == step->copies + step->n_copies);
    step->region->n_steps++;
}

attn_status_t
kv_step_begin(kv_store_t *store, uint64_t cache, uint64_t step_id, const kv_step_entry_t *entries,
              uint32_t n_entries, kv_step_t **step_p)
{
    kv_begin_t begin  = {.store = store, .entries = entries};
    uint64_t n_chunks = 0;

    attn_status_t status = check_limits(store, step_id, entries, n_entries, &n_chunks);
    if (status == ATTN_OK) {
        status = kv_region_need(store, cache, &begin.region);
    }
    if (status != ATTN_OK) {
        return status;
    }
    begin.step = step_alloc(begin.region, step_id, entries, n_entries, (uint32_t)n_chunks);
    if (begin.step == NULL) {
        return step_no_memory(step_id);
    }
    status = kv_begin_check(&begin);
    if (status == ATTN_OK && !prepare(&begin)) {
        status = step_no_memory(step_id);
    }
    if (status != ATTN_OK) {
        kv_step_free(begin.step);
        return status;
    }
    reserve(begin.step);
    *step_p = begin.step;
    return ATTN_OK;
}

/* ---- while it is open ---- */

kv_step_t *
kv_step_find(kv_store_t *store, uint64_t step_id)
{
    kv_step_t *step;
    HASH_FIND(hh, store->steps, &step_id, sizeof(step_id), step);
    return step;
}

const kv_copy_t *
kv_step_copies(const kv_step_t *step, uint32_t *n)
{
    *n = step->n_copies;
    return step->copies;
}

const uint32_t *
kv_step_pages(const kv_step_t *step, uint32_t entry, uint32_t chunk, uint32_t *n)
{
    assert(entry < step->n_entries && chunk < step->entries[entry].n_chunks);
    const kv_chunk_t *named = step->chunks[step->entries[entry].first_chunk + chunk].chunk;

    /* Nobody truncates, appends to or releases a chunk that a step names, so its list stands. */
    *n = named != NULL ? named->n_pages + named->n_reserved : 0;
    return *n > 0 ? named->pages : NULL;
}

const uint32_t *
kv_step_spares(const kv_step_t *step, uint32_t entry, uint32_t *n)
{
    assert(entry < step->n_entries);
    *n = step->entries[entry].n_spares;
    return *n > 0 ? step->spares + step->entries[entry].first_spare : NULL;
}

bool
kv_seq_in_step(const kv_store_t *store, uint64_t cache, uint64_t seq)
{
    const kv_region_t *region = kv_region_find(store, cache);
    kv_hold_t *hold           = NULL;

    if (region != NULL) {
        HASH_FIND(hh, region->holds, &seq, sizeof(seq), hold);
    }
    return hold != NULL;
}

/* ---- end ---- */

/* Keep the first `accepted` of the new tokens; what holds none of them goes back. */
static void
settle_chunk(kv_region_t *region, kv_chunk_t *chunk, uint32_t accepted)
{
    uint32_t keep = chunk->n_pages, held = chunk->n_pages + chunk->n_reserved;

    if (accepted > 0) {
        keep = kv_pages_for(region, chunk->length + accepted);
    }
    while (held > keep) {
        kv_page_drop(region, chunk->pages[--held]);
    }
    if (chunk->replaced != KV_NO_PAGE) {
        /* Without a new token the committed tail is as good as its copy, and shared. */
        uint32_t *tail = &chunk->pages[chunk->n_pages - 1];
        kv_page_drop(region, accepted > 0 ? chunk->replaced : *tail);
        *tail           = accepted > 0 ? *tail : chunk->replaced;
        chunk->replaced = KV_NO_PAGE;
    }
    chunk->n_pages    = keep;
    chunk->n_reserved = 0;
    chunk->length += accepted;
    chunk->appended = false;
    if (accepted > 0 && chunk->generation == 0) {
        chunk->generation = 1;
    }
}

static void
settle_entry(kv_step_t *step, kv_hold_t *entry, uint64_t accepted)
{
    for (uint32_t c = 0; c < entry->n_chunks; c++) {
        kv_named_t *named = &step->chunks[entry->first_chunk + c];
        kv_chunk_t *chunk = named->chunk;
        if (chunk == NULL) {
            continue;
        }
        chunk->named--;
        if (named->n_new > 0) {
            uint32_t n = (uint32_t)attn_min(accepted, named->n_new);
            settle_chunk(step->region, chunk, n);
            accepted -= n;
            if (chunk->generation == 0) {
                kv_chunk_drop(step->region, chunk);
            }
        }
    }
    HASH_DELETE(hh, step->region->holds, entry);
}

static void
step_close(kv_store_t *store, kv_step_t *step)
{
    for (uint32_t i = 0; i < step->n_spares; i++) {
        kv_page_drop(step->region, step->spares[i]);
    }
    step->region->n_steps--;
    HASH_DEL(store->steps, step);
    kv_step_free(step);
}

static uint64_t
entry_new_tokens(const kv_step_t *step, const kv_hold_t *entry)
{
    uint64_t n = 0;

    for (uint32_t c = 0; c < entry->n_chunks; c++) {
        n += step->chunks[entry->first_chunk + c].n_new;
    }
    return n;
}

attn_status_t
kv_step_commit(kv_store_t *store, kv_step_t *step, const uint32_t *accepted)
{
    for (uint32_t i = 0; accepted != NULL && i < step->n_entries; i++) {
        uint64_t n_new = entry_new_tokens(step, &step->entries[i]);
        if (accepted[i] > n_new) {
            return attn_fail(ATTN_ERR_INVALID,
                             "step %" PRIu64 ": entry %u: accepted %u of %" PRIu64 " new tokens",
                             step->id, i, accepted[i], n_new);
        }
    }
    for (uint32_t i = 0; i < step->n_entries; i++) {
        settle_entry(step, &step->entries[i], accepted != NULL ? accepted[i] : UINT64_MAX);
    }
    step_close(store, step);
    return ATTN_OK;
}

void
kv_step_abort(kv_store_t *store, kv_step_t *step)
{
    for (uint32_t i = 0; i < step->n_entries; i++) {
        settle_entry(step, &step->entries[i], 0);
    }
    step_close(store, step);
}
