/*
 * Three passes over the chunks that the batch touches, none of them worse than linear:
 * check the entries; number the workers in ascending order and count each one's parts; fill.
 * Everything that is handed out lies in one block.
 *
 * Nodes: the trie's keys in ascending order are the chunks in bit-reversed order of their
 * lanes, so no sorting is needed. A worker's chunks between two neighbours of others in that
 * order are covered by the largest nodes that reach neither neighbour. That is
 * attn_tree_frontier() for all workers of an entry at once (the test compares them).
 */
#include "balancer/split.h"
#include "balancer/holes.h"
#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define NOBODY UINT32_MAX

/* What entry i touches: chunks 0 to n_seen - 1 hold its tokens, those from first_new on new
 * ones; holder is the chunk where the next token goes. */
typedef struct scope {
    uint32_t n_seen, first_new, holder;
    size_t offset; /* of its chunks' workers in split_work_t.worker_of; the holder's comes last */
} scope_t;

/* While an entry is worked on, a worker's part in it. */
typedef struct slot {
    uint32_t entry; /* whose part it is; another number: no part yet */
    uint32_t n_parts;
    split_part_t *part;
} slot_t;

typedef struct split_work {
    const split_entry_t *entries;
    const split_layout_t *layouts;
    uint32_t n, chunk_size;
    scope_t *scopes;     /* [n] */
    uint32_t *worker_of; /* [n_touched] index of the worker, of each chunk touched */
    size_t n_touched;
    uint32_t *workers; /* [n_workers] ids, ascending */
    slot_t *slots;     /* [n_workers] */
    uint32_t n_workers;
    /* Where the next of each goes in the block. */
    split_ref_t *refs;
    struct split_rows *rows;
    attn_node_t *nodes;
} split_work_t;

static attn_status_t
no_memory(uint32_t n)
{
    return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to split a batch of %u entries", n);
}

/* ---- pass 1: do the entries fit their layouts? ---- */

/* Committed tokens of chunk c in a sequence of `length`. */
static uint32_t
committed_in(uint64_t length, uint32_t c, uint32_t chunk_size)
{
    uint64_t first = (uint64_t)c * chunk_size;
    return length > first ? (uint32_t)attn_min(length - first, chunk_size) : 0;
}

static attn_status_t
fail_lost(const split_layout_t *layout, uint32_t chunk_size)
{
    char ranges[256];

    holes_text(layout->chunks, layout->n_chunks, chunk_size, UINT64_MAX, ranges, sizeof(ranges));
    return attn_fail(ATTN_ERR_LOST, "sequence %" PRIx64 " lost %s", layout->seq, ranges);
}

static attn_status_t
fail_length(const split_entry_t *entry, const split_layout_t *layout, uint32_t i, uint32_t c,
            uint32_t chunk_size)
{
    uint32_t length = layout->chunks[c].length;

    if (entry->n_new == 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "entry %u: base is %" PRIu64 ", the committed length of "
                         "sequence %" PRIu64 " is %" PRIu64,
                         i, entry->base, layout->seq, (uint64_t)c * chunk_size + length);
    }
    return attn_fail(ATTN_ERR_STALE,
                     "entry %u: sequence %" PRIu64 " with base %" PRIu64
                     " has %u committed tokens in chunk %u where the layout says %u",
                     i, layout->seq, entry->base, committed_in(entry->base, c, chunk_size), c,
                     length);
}

/* Chunks below the base's that the entry needs whole. */
static attn_status_t
check_before(const split_entry_t *entry, const split_layout_t *layout, uint32_t i, uint32_t n,
             uint32_t chunk_size)
{
    for (uint32_t c = 0; c < n; c++) {
        const split_chunk_t *chunk = &layout->chunks[c];
        uint32_t wanted            = committed_in(entry->base, c, chunk_size);
        if (chunk->lost || (chunk->sealed && chunk->length < wanted)) {
            return fail_lost(layout, chunk_size);
        }
        if (chunk->length < wanted) {
            return fail_length(entry, layout, i, c, chunk_size);
        }
    }
    return ATTN_OK;
}

/* Chunks from first to end - 1, which new tokens go into. In a hole all but the last are sealed,
 * for a hole that goes on to the end of the sequence may be left there. */
static attn_status_t
check_new(const split_entry_t *entry, const split_layout_t *layout, uint32_t i, uint32_t first,
          uint32_t end, uint32_t chunk_size)
{
    bool fills = layout->chunks[first].sealed;

    for (uint32_t c = first; c < end; c++) {
        const split_chunk_t *chunk = &layout->chunks[c];
        if (chunk->lost) {
            return fail_lost(layout, chunk_size);
        }
        if (chunk->length == committed_in(entry->base, c, chunk_size)) {
            continue;
        }
        if (fills && c > first) {
            return attn_fail(ATTN_ERR_INVALID,
                             "entry %u: tokens %" PRIu64 "-%" PRIu64 " of sequence %" PRIu64
                             " go beyond the hole that they begin in: it ends at %" PRIu64,
                             i, entry->base, entry->base + entry->n_new - 1, layout->seq,
                             (uint64_t)c * chunk_size + (chunk->sealed ? chunk->length : 0));
        }
        return fail_length(entry, layout, i, c, chunk_size);
    }
    return ATTN_OK;
}

/* Do the committed tokens of the layout fit the entry? */
static attn_status_t
check_lengths(const split_entry_t *entry, const split_layout_t *layout, uint32_t i,
              uint32_t chunk_size)
{
    uint32_t first = (uint32_t)(entry->base / chunk_size);
    uint32_t seen  = (uint32_t)attn_div_up(entry->base, chunk_size);
    uint32_t end   = (uint32_t)attn_div_up(entry->base + entry->n_new, chunk_size);

    if (entry->n_new == 0) {
        return check_before(entry, layout, i, seen, chunk_size);
    }
    bool fills = layout->chunks[first].sealed;
    attn_status_t status =
        fills && entry->n_q == 0 ? ATTN_OK : check_before(entry, layout, i, first, chunk_size);
    status = status ? status : check_new(entry, layout, i, first, end, chunk_size);
    for (uint32_t c = end; status == ATTN_OK && c < layout->n_chunks; c++) {
        const split_chunk_t *chunk = &layout->chunks[c];
        if (!layout->chunks[end - 1].sealed && !chunk->lost && chunk->length > 0) {
            status = fail_length(entry, layout, i, c, chunk_size);
        }
    }
    return status;
}

static attn_status_t
check_entry(split_work_t *work, uint32_t i)
{
    const split_entry_t *entry   = &work->entries[i];
    const split_layout_t *layout = &work->layouts[i];
    scope_t *scope               = &work->scopes[i];
    uint64_t room                = (uint64_t)layout->n_chunks * work->chunk_size;

    if (layout->n_chunks == 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "entry %u: the layout of sequence %" PRIu64 " has no chunks", i,
                         layout->seq);
    }
    if (entry->base > room || entry->n_new > room - entry->base) {
        return attn_fail(ATTN_ERR_INVALID,
                         "entry %u: base %" PRIu64 " and n_new %u of sequence %" PRIu64
                         " end above its %u chunks of %u tokens",
                         i, entry->base, entry->n_new, layout->seq, layout->n_chunks,
                         work->chunk_size);
    }
    uint64_t next = entry->base / work->chunk_size;
    scope->n_seen = (uint32_t)attn_div_up(entry->base + entry->n_new, work->chunk_size);
    scope->holder = (uint32_t)attn_min(next, layout->n_chunks - 1);
    while (scope->holder != NOBODY && layout->chunks[scope->holder].lost) {
        scope->holder--; /* below 0 is NOBODY */
    }
    scope->first_new = entry->n_new > 0 ? (uint32_t)next : scope->n_seen;
    scope->offset    = work->n_touched;
    work->n_touched += (size_t)scope->n_seen + 1;
    return check_lengths(entry, layout, i, work->chunk_size);
}

/* ---- pass 2: number the workers ---- */

static int
by_id(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

/* Index of the worker in work->workers, in order of first sight; the table keeps index + 1. */
static uint32_t
worker_index(split_work_t *work, uint32_t *table, uint32_t mask, uint32_t worker)
{
    uint32_t at = (worker * UINT32_C(0x9E3779B1)) >> 7 & mask;

    while (table[at] != 0) {
        if (work->workers[table[at] - 1] == worker) {
            return table[at] - 1;
        }
        at = (at + 1) & mask;
    }
    work->workers[work->n_workers++] = worker;
    table[at]                        = work->n_workers;
    return work->n_workers - 1;
}

/* From order of first sight to ascending ids. */
static void
sort_workers(split_work_t *work, uint32_t *seen, uint32_t *rank)
{
    memcpy(seen, work->workers, work->n_workers * sizeof(*seen));
    qsort(work->workers, work->n_workers, sizeof(*work->workers), by_id);
    for (uint32_t i = 0; i < work->n_workers; i++) {
        const uint32_t *at = bsearch(&seen[i], work->workers, work->n_workers, sizeof(*at), by_id);
        rank[i]            = (uint32_t)(at - work->workers);
    }
    for (size_t i = 0; i < work->n_touched; i++) {
        if (work->worker_of[i] != NOBODY) {
            work->worker_of[i] = rank[work->worker_of[i]];
        }
    }
}

static attn_status_t
number_workers(split_work_t *work)
{
    uint32_t mask   = 63;
    uint32_t *table = NULL, *scratch = NULL;

    while (mask < 2 * work->n_touched) {
        mask = 2 * mask + 1;
    }
    table   = calloc((size_t)mask + 1, sizeof(*table));
    scratch = malloc(2 * work->n_touched * sizeof(*scratch));
    if (!table || !scratch) {
        free(table);
        free(scratch);
        return no_memory(work->n);
    }
    for (uint32_t i = 0; i < work->n; i++) {
        const scope_t *scope        = &work->scopes[i];
        const split_chunk_t *chunks = work->layouts[i].chunks;
        uint32_t *of                = work->worker_of + scope->offset;
        for (uint32_t c = 0; c < scope->n_seen; c++) {
            of[c] = worker_index(work, table, mask, chunks[c].worker);
        }
        of[scope->n_seen] = scope->holder != NOBODY
                                ? worker_index(work, table, mask, chunks[scope->holder].worker)
                                : NOBODY;
    }
    sort_workers(work, scratch, scratch + work->n_touched);
    free(table);
    free(scratch);
    return ATTN_OK;
}

static void
touch(split_work_t *work, uint32_t worker, uint32_t entry, size_t *n_parts)
{
    slot_t *slot = &work->slots[worker];

    if (slot->entry != entry) {
        slot->entry = entry;
        slot->n_parts++;
        (*n_parts)++;
    }
}

/* Count parts: a worker is in an entry if it stores, is seen, or holds. Returns their sum. */
static size_t
count_parts(split_work_t *work)
{
    size_t n_parts = 0;

    for (uint32_t w = 0; w < work->n_workers; w++) {
        work->slots[w] = (slot_t){.entry = NOBODY};
    }
    for (uint32_t i = 0; i < work->n; i++) {
        const scope_t *scope = &work->scopes[i];
        const uint32_t *of   = work->worker_of + scope->offset;
        for (uint32_t c = work->entries[i].n_q > 0 ? 0 : scope->first_new; c < scope->n_seen; c++) {
            touch(work, of[c], i, &n_parts);
        }
        if (scope->holder != NOBODY) {
            touch(work, of[scope->n_seen], i, &n_parts);
        }
    }
    return n_parts;
}

/* ---- pass 3: fill ---- */

/* The block: split, shares, parts, refs, nodes, rows; every part's arrays are cut from the last
 * three. An entry's refs, nodes and rows are each at most its chunks seen. */
static split_t *
make_block(split_work_t *work, size_t n_parts)
{
    size_t share_bytes = work->n_workers * sizeof(split_share_t);
    size_t part_bytes  = n_parts * sizeof(split_part_t);
    size_t ref_bytes   = work->n_touched * sizeof(split_ref_t);
    size_t node_bytes  = work->n_touched * sizeof(attn_node_t);
    size_t row_bytes   = work->n_touched * sizeof(struct split_rows);
    split_t *split =
        malloc(sizeof(*split) + share_bytes + part_bytes + ref_bytes + node_bytes + row_bytes);

    if (!split) {
        return NULL;
    }
    split->n_shares = work->n_workers;
    split->shares   = (split_share_t *)(split + 1);

    split_part_t *parts = (split_part_t *)(split->shares + work->n_workers);
    work->refs          = (split_ref_t *)(parts + n_parts);
    work->nodes         = (attn_node_t *)(work->refs + work->n_touched);
    work->rows          = (struct split_rows *)(work->nodes + work->n_touched);
    for (uint32_t w = 0; w < work->n_workers; w++) {
        split->shares[w] = (split_share_t){.worker = work->workers[w], .parts = parts};
        parts += work->slots[w].n_parts;
        work->slots[w].entry = NOBODY;
    }
    return split;
}

static split_part_t *
part_of(split_work_t *work, split_t *split, uint32_t worker, uint32_t entry)
{
    slot_t *slot = &work->slots[worker];

    if (slot->entry != entry) {
        split_share_t *share = &split->shares[worker];
        slot->entry          = entry;
        slot->part           = &share->parts[share->n_parts++];
        *slot->part          = (split_part_t){.entry = entry};
    }
    return slot->part;
}

/* One more chunk of a part: its ref and, if tokens are written to it, their rows. */
static void
add_chunk(const split_work_t *work, uint32_t i, uint32_t c, split_part_t *part)
{
    const split_entry_t *entry = &work->entries[i];
    const split_chunk_t *chunk = &work->layouts[i].chunks[c];
    uint64_t end               = entry->base + entry->n_new;
    uint64_t first             = attn_max((uint64_t)c * work->chunk_size, entry->base);
    uint64_t last              = attn_min((uint64_t)(c + 1) * work->chunk_size, end);
    uint32_t n_new             = last > first ? (uint32_t)(last - first) : 0;

    part->refs[part->n_refs++] = (split_ref_t){
        .number     = c,
        .n_new      = n_new,
        .id         = chunk->id,
        .generation = chunk->generation,
        .length     = chunk->length,
    };
    if (n_new == 0) {
        return;
    }
    uint32_t row = (uint32_t)(first - entry->base);
    if (entry->path) {
        if (part->n_rows == 0) {
            part->rows[part->n_rows++] = (struct split_rows){.first = row, .n = entry->n_new - row};
        }
        return;
    }
    struct split_rows *run = part->n_rows > 0 ? &part->rows[part->n_rows - 1] : NULL;
    if (run && run->first + run->n == row) {
        run->n += n_new;
    } else {
        part->rows[part->n_rows++] = (struct split_rows){.first = row, .n = n_new};
    }
}

/* The chunks c of [0, n) in ascending order of their keys; returns how many (n). */
static uint32_t
key_order(uint32_t n, uint32_t *order)
{
    uint32_t bits = 0, k = 0;

    while (bits < 6 && (1u << bits) < n) {
        bits++;
    }
    for (uint32_t i = 0; i < 1u << bits; i++) {
        uint32_t lane = 0;
        for (uint32_t b = 0; b < bits; b++) {
            lane |= (i >> b & 1) << (bits - 1 - b);
        }
        for (uint32_t c = lane; c < n; c += 64) {
            order[k++] = c;
        }
    }
    return k;
}

static void
add_node(split_part_t *part, uint32_t key, uint32_t level)
{
    /* A node's chunks are neighbours in the order of keys: only the last one can be the same. */
    attn_node_t node        = {.level = level, .index = level < 32 ? key >> level : 0};
    const attn_node_t *last = part->n_nodes > 0 ? &part->nodes[part->n_nodes - 1] : NULL;

    if (!last || last->level != node.level || last->index != node.index) {
        part->nodes[part->n_nodes++] = node;
    }
}

/* Nodes of all workers of an entry that more than one of them attends to. */
static void
add_nodes(split_work_t *work, const uint32_t *of, uint32_t n, const uint32_t *order)
{
    for (uint32_t first = 0, end = 0; first < n; first = end) {
        uint32_t worker = of[order[first]];
        while (end < n && of[order[end]] == worker) {
            end++;
        }
        uint32_t left  = first > 0 ? attn_tree_key(order[first - 1]) : 0;
        uint32_t right = end < n ? attn_tree_key(order[end]) : 0;
        for (uint32_t i = first; i < end; i++) {
            uint32_t key         = attn_tree_key(order[i]);
            uint32_t above_left  = first > 0 ? attn_tree_lca(left, key) : 33;
            uint32_t above_right = end < n ? attn_tree_lca(key, right) : 33;
            add_node(work->slots[worker].part, key,
                     (uint32_t)attn_min(above_left, above_right) - 1);
        }
    }
}

static bool
is_whole(const uint32_t *of, uint32_t n)
{
    for (uint32_t c = 1; c < n; c++) {
        if (of[c] != of[0]) {
            return false;
        }
    }
    return true;
}

static void
fill_entry(split_work_t *work, split_t *split, uint32_t i, uint32_t *order, uint32_t *n_ordered)
{
    const scope_t *scope = &work->scopes[i];
    const uint32_t *of   = work->worker_of + scope->offset;
    bool attends         = work->entries[i].n_q > 0 && scope->n_seen > 0;
    bool whole           = attends && is_whole(of, scope->n_seen);

    for (uint32_t c = attends ? 0 : scope->first_new; c < scope->n_seen; c++) {
        (void)part_of(work, split, of[c], i);
    }
    if (scope->holder != NOBODY) {
        part_of(work, split, of[scope->n_seen], i)->holds = true;
    }

    /* Room first, then contents: each part's arrays are contiguous. */
    for (uint32_t c = 0; c < scope->n_seen; c++) {
        if (work->slots[of[c]].entry == i) {
            work->slots[of[c]].part->n_refs++;
        }
    }
    for (uint32_t c = 0; c < scope->n_seen; c++) {
        split_part_t *part = work->slots[of[c]].entry == i ? work->slots[of[c]].part : NULL;
        if (part && !part->refs) {
            part->refs  = work->refs;
            part->rows  = work->rows;
            part->nodes = work->nodes;
            work->refs += part->n_refs;
            work->rows += part->n_refs;
            work->nodes += part->n_refs;
            part->n_refs  = 0;
            part->attends = attends;
            part->whole   = whole;
        }
        if (part) {
            add_chunk(work, i, c, part);
        }
    }
    if (attends && !whole) {
        if (*n_ordered != scope->n_seen) {
            *n_ordered = key_order(scope->n_seen, order);
        }
        add_nodes(work, of, scope->n_seen, order);
    }
}

/* A worker whose chunks nobody asks about (its entries only append elsewhere) has no share. */
static void
drop_empty_shares(split_t *split)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < split->n_shares; s++) {
        if (split->shares[s].n_parts > 0) {
            split->shares[n++] = split->shares[s];
        }
    }
    split->n_shares = n;
}

static attn_status_t
split_fill(split_work_t *work, split_t **split_p)
{
    attn_status_t status = number_workers(work);
    if (status) {
        return status;
    }
    size_t n_parts     = 0;
    uint32_t n_ordered = 0;
    uint32_t *order    = malloc((work->n_touched + 1) * sizeof(*order));
    split_t *split     = NULL;

    work->slots = malloc((work->n_workers + (size_t)1) * sizeof(*work->slots));
    if (order && work->slots) {
        n_parts = count_parts(work);
        split   = make_block(work, n_parts);
    }
    for (uint32_t i = 0; split && i < work->n; i++) {
        fill_entry(work, split, i, order, &n_ordered);
    }
    free(order);
    free(work->slots);
    if (!split) {
        return no_memory(work->n);
    }
    drop_empty_shares(split);
    *split_p = split;
    return ATTN_OK;
}

attn_status_t
split_batch(const split_entry_t *entries, const split_layout_t *layouts, uint32_t n,
            uint32_t chunk_size, split_t **split_p)
{
    split_work_t work = {.entries = entries, .layouts = layouts, .n = n, .chunk_size = chunk_size};
    attn_status_t status = ATTN_OK;

    assert(chunk_size > 0);
    work.scopes = malloc((n + (size_t)1) * sizeof(*work.scopes));
    if (!work.scopes) {
        return no_memory(n);
    }
    for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
        status = check_entry(&work, i);
    }
    if (status == ATTN_OK) {
        work.worker_of = malloc((2 * work.n_touched + 1) * sizeof(uint32_t));
        work.workers   = work.worker_of ? work.worker_of + work.n_touched : NULL;
        status         = work.worker_of ? split_fill(&work, split_p) : no_memory(n);
    }
    free(work.worker_of);
    free(work.scopes);
    return status;
}

void
split_free(split_t *split)
{
    free(split);
}
