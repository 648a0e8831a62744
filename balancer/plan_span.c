/*
 * What an entry sees, as spans of leaves in ascending key: clipped to its window, to what is
 * causal and to its sparse lists, and cut where leaves begin or cease to be shared.
 */
#include "balancer/plan_int.h"

#include "base/checked.h"

#include <string.h>

#define LANES 64u

/* Up to so many runs are put in order by insertion. */
#define SMALL_RUNS 8u

void
plan_see(const attn_problem_t *p, const attn_problem_entry_t *entry, uint32_t first, uint32_t n,
         int64_t *see_first, int64_t *see_end)
{
    int64_t position = (int64_t)entry->kv_length - entry->n_q + first;
    int64_t window   = (int64_t)attn_min(p->window, INT32_MAX);

    if (entry->mask != NULL) {
        /* Any of the tokens may be named, and a query that names one stands lowest. */
        position   = (int64_t)entry->kv_length - entry->mask_tokens;
        *see_first = p->window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
        *see_end   = (int64_t)entry->kv_length;
        return;
    }
    *see_first = p->window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
    *see_end   = p->causal ? position + n : (int64_t)entry->kv_length;
}

/* Does a list have a page of the chunk, or is part of it dense? Narrows [first, end), in tokens of
 * the chunk. */
static void
narrow_to_lists(const builder_t *b, const attn_problem_entry_t *entry, const attn_kv_run_t *run,
                uint32_t *first, uint32_t *end)
{
    uint32_t size  = b->problem->page_size;
    uint64_t pages = attn_div_up(b->problem->chunk_size, size), base = run->chunk * pages;
    uint64_t start = (uint64_t)run->chunk * b->problem->chunk_size;
    uint64_t from = *end, to = *first;

    if (entry->dense_from < start + *end) {
        from = entry->dense_from > start ? entry->dense_from - start : 0;
        to   = *end;
    }
    for (uint32_t list = 0; list < entry->n_lists; list++) {
        uint32_t low = entry->sparse_indptr[list], stop = entry->sparse_indptr[list + 1],
                 high = stop;
        while (low < high) {
            uint32_t middle = low + (high - low) / 2;
            if (entry->sparse_pages[middle] < base) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if (low == stop || entry->sparse_pages[low] >= base + pages) {
            continue;
        }
        from = attn_min(from, (entry->sparse_pages[low] - base) * size);
        while (low + 1 < stop && entry->sparse_pages[low + 1] < base + pages) {
            low++;
        }
        to = attn_max(to, (entry->sparse_pages[low] - base + 1) * size);
    }
    *first = (uint32_t)attn_max(*first, from);
    *end   = (uint32_t)attn_min(*end, to);
}

/* A run's visible leaves, cut where it becomes shared or ceases to be. */
static void
add_spans_of_run(builder_t *b, uint32_t e, uint32_t r, uint32_t segment, int64_t see_first,
                 int64_t see_end)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];
    const attn_kv_run_t *run          = &entry->runs[r];
    uint32_t leaf_shift               = (uint32_t)__builtin_ctz(b->plan->entries[e].leaf_tokens);
    int64_t start                     = (int64_t)run->chunk * b->problem->chunk_size;

    if (see_first >= start + run->length || see_end <= start) {
        return;
    }
    uint32_t first = see_first > start ? (uint32_t)(see_first - start) : 0;
    uint32_t end   = see_end < start + run->length ? (uint32_t)(see_end - start) : run->length;
    if (entry->n_lists > 0 && !entry->lists_change) {
        narrow_to_lists(b, entry, run, &first, &end);
    }
    if (first >= end) {
        return;
    }
    attn_span_t span = {
        .run = r, .leaf_first = first >> leaf_shift, .leaf_end = ((end - 1) >> leaf_shift) + 1};
    for (; segment != 0 && b->segments.at[segment - 1].run == r;
         segment = b->segments.at[segment - 1].next) {
        const segment_t *shared = &b->segments.at[segment - 1];
        if (shared->set == SET_NONE) {
            continue;
        }
        if (span.leaf_first < shared->leaf_first) {
            PUSH(b, b->spans, (attn_span_t){r, span.leaf_first, shared->leaf_first, SET_NONE});
        }
        PUSH(b, b->spans, (attn_span_t){r, shared->leaf_first, shared->leaf_end, shared->set});
        span.leaf_first = shared->leaf_end;
    }
    if (span.leaf_first < span.leaf_end) {
        PUSH(b, b->spans, (attn_span_t){r, span.leaf_first, span.leaf_end, SET_NONE});
    }
}

/* The first segment of each run of an entry, index + 1. */
static void
segments_by_run(const builder_t *b, uint32_t e, uint32_t *first)
{
    memset(first, 0, b->problem->entries[e].n_runs * sizeof(*first));
    for (uint32_t s = b->segment_first[e]; s != 0; s = b->segments.at[s - 1].next) {
        if (first[b->segments.at[s - 1].run] == 0) {
            first[b->segments.at[s - 1].run] = s;
        }
    }
}

/* Runs ascend in chunk, so that within a lane they do in key: counting over the lanes is enough. */
static void
count_over_lanes(const attn_problem_entry_t *entry, uint32_t *order)
{
    uint32_t at[LANES + 1] = {0};

    for (uint32_t i = 0; i < entry->n_runs; i++) {
        at[(attn_tree_key(entry->runs[i].chunk) >> 26) + 1]++;
    }
    for (uint32_t lane = 0; lane < LANES; lane++) {
        at[lane + 1] += at[lane];
    }
    for (uint32_t i = 0; i < entry->n_runs; i++) {
        order[at[attn_tree_key(entry->runs[i].chunk) >> 26]++] = i;
    }
}

static void
insert_by_key(const attn_problem_entry_t *entry, uint32_t *order)
{
    for (uint32_t i = 0; i < entry->n_runs; i++) {
        uint32_t key = attn_tree_key(entry->runs[i].chunk), at = i;
        for (; at > 0 && attn_tree_key(entry->runs[order[at - 1]].chunk) > key; at--) {
            order[at] = order[at - 1];
        }
        order[at] = i;
    }
}

/* Numbers of an entry's runs in ascending key. Whole sequences with equal numbers of chunks
 * have equal orders: *whole is the number for which `order` holds, or 0. */
static void
order_runs(const attn_problem_entry_t *entry, uint32_t *order, uint32_t *whole)
{
    uint32_t n = entry->n_runs;

    if (entry->runs[n - 1].chunk == n - 1 && *whole == n) {
        return;
    }
    if (n <= SMALL_RUNS) {
        insert_by_key(entry, order);
    } else {
        count_over_lanes(entry, order);
    }
    *whole = entry->runs[n - 1].chunk == n - 1 ? n : 0;
}

/* The stack of a fold holds at most a state per level at which keys part, and one more. */
static void
note_depth(builder_t *b, uint32_t e)
{
    uint32_t first = b->span_first[e], parting = 0, leaves = 0;
    const attn_kv_run_t *runs = b->problem->entries[e].runs;

    for (uint32_t i = first; i < b->span_first[e + 1]; i++) {
        const attn_span_t *span = &b->spans.at[i];
        /* Keys part where chunk numbers do, in another order of bits. */
        parting |= runs[span->run].chunk ^ runs[b->spans.at[first].run].chunk;
        leaves = leaves < span->leaf_end ? span->leaf_end : leaves;
    }
    uint32_t depth = 2 + (uint32_t)__builtin_popcount(parting);
    for (; leaves > 1; leaves = (leaves + 1) / 2) {
        depth++;
    }
    b->plan->max_depth = depth > b->plan->max_depth ? depth : b->plan->max_depth;
}

void
plan_add_spans(builder_t *b, uint32_t *order, uint32_t *segments)
{
    uint32_t whole = 0;

    for (uint32_t e = 0; e < b->problem->n && !b->no_memory; e++) {
        const attn_problem_entry_t *entry = &b->problem->entries[e];
        int64_t see_first, see_end;

        b->span_first[e] = b->spans.n;
        if (entry->n_q > 0 && entry->n_runs > 0) {
            plan_see(b->problem, entry, 0, 1, &see_first, &see_end);
            int64_t unused;
            plan_see(b->problem, entry, entry->n_q - 1, 1, &unused, &see_end);
            order_runs(entry, order, &whole);
            if (b->segment_first[e] != 0) {
                segments_by_run(b, e, segments);
            }
            for (uint32_t i = 0; i < entry->n_runs; i++) {
                add_spans_of_run(b, e, order[i], b->segment_first[e] != 0 ? segments[order[i]] : 0,
                                 see_first, see_end);
            }
        }
        b->span_first[e + 1] = b->spans.n;
        note_depth(b, e);
    }
}
