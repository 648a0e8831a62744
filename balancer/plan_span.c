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

/* A shorter entry's order is taken from that of one with at most so many times its runs. */
#define WHOLE_FACTOR 4u

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

/* The spans of one entry as they come to be, in memory that suffices for all. */
typedef struct view {
    const builder_t *b;
    const attn_problem_entry_t *entry;
    const attn_plan_entry_t *planned;
    int64_t see_first, see_end;
    attn_span_t *spans;
    uint32_t first, n; /* spans before it, and with it */
    stretch_t *stretches, *open;
    uint32_t n_stretches;
    uint32_t parting, first_chunk, leaves; /* for its depth */
} view_t;

/* The last stretch is as it is. */
static void
close_stretch(view_t *v)
{
    if (v->open != NULL) {
        const attn_span_t *last = &v->spans[v->n - 1];
        v->open->span_end       = v->n;
        v->open->last_key =
            attn_leaf_key(v->planned, v->entry->runs[last->run].chunk, last->leaf_end - 1);
    }
}

/* The stretch that a span goes on or begins, which is to be the next one. */
static stretch_t *
open_stretch(view_t *v, const attn_span_t *span)
{
    uint32_t chunk = v->entry->runs[span->run].chunk, node = 0;

    if (v->entry->n_nodes > 1) {
        node = plan_node_of(v->entry, attn_tree_key(chunk));
    }
    if (v->open == NULL || v->open->set != span->set || v->open->node != node) {
        close_stretch(v);
        v->open  = &v->stretches[v->n_stretches++];
        *v->open = (stretch_t){.span_first = v->n,
                               .set        = span->set,
                               .node       = node,
                               .key        = attn_leaf_key(v->planned, chunk, span->leaf_first)};
    }
    return v->open;
}

static void
add_span(view_t *v, attn_span_t span, uint64_t tokens)
{
    open_stretch(v, &span)->tokens += tokens;
    v->spans[v->n++] = span;
}

/*
 * Runs order[0] to order[n - 1], of which none is shared, has lists or may be below another node:
 * most runs of most entries.
 */
static void
add_own_runs(view_t *v, const uint32_t *order, uint32_t n)
{
    const attn_kv_run_t *runs = v->entry->runs;
    const uint32_t shift      = (uint32_t)__builtin_ctz(v->planned->leaf_tokens);
    const int64_t size = v->b->problem->chunk_size, see_first = v->see_first, see_end = v->see_end;
    attn_span_t *spans = v->spans + v->n;
    uint32_t chunks = 0, leaves = v->leaves, made = 0;
    uint32_t origin = v->n > v->first ? v->first_chunk : UINT32_MAX;
    uint64_t tokens = 0;

    for (uint32_t i = 0; i < n; i++) {
        const attn_kv_run_t *run = &runs[order[i]];
        int64_t start = (int64_t)run->chunk * size, from = see_first - start, to = see_end - start;
        from = from > 0 ? from : 0;
        to   = to < run->length ? to : run->length;
        if (from >= to) {
            continue;
        }
        uint32_t first = (uint32_t)from >> shift, end = ((uint32_t)(to - 1) >> shift) + 1;
        to = (int64_t)end << shift;
        tokens += (uint64_t)((to < see_end - start ? to : see_end - start) - from);
        origin = origin == UINT32_MAX ? run->chunk : origin;
        chunks |= run->chunk ^ origin;
        leaves        = end > leaves ? end : leaves;
        spans[made++] = (attn_span_t){order[i], first, end, SET_NONE};
    }
    if (made > 0) {
        open_stretch(v, &spans[0])->tokens += tokens;
        v->n += made;
        v->first_chunk = origin;
        v->parting |= chunks;
        v->leaves = leaves;
    }
}

/* Leaves [leaf, end) of a run, some of which may be shared: by segments from this one on. */
static void
cut_at_segments(view_t *v, uint32_t r, uint32_t leaf, uint32_t end, uint32_t segment, uint64_t all)
{
    uint32_t shift = (uint32_t)__builtin_ctz(v->planned->leaf_tokens);

    while (leaf < end) {
        const segment_t *shared = segment != 0 ? &v->b->segments.at[segment - 1] : NULL;
        attn_span_t span        = {r, leaf, end, SET_NONE};
        if (shared != NULL && shared->run == r) {
            bool now = leaf == shared->leaf_first;
            segment  = now ? shared->next : segment;
            if (shared->set == SET_NONE) {
                segment = shared->next;
                continue;
            }
            span.leaf_end = now ? shared->leaf_end : shared->leaf_first;
            span.set      = now ? shared->set : SET_NONE;
        }
        uint64_t tokens = span.leaf_end == end ? all : (uint64_t)(span.leaf_end - leaf) << shift;
        add_span(v, span, tokens);
        all -= tokens;
        leaf = span.leaf_end;
    }
}

/* Any run's visible leaves, cut where it becomes shared or ceases to be. */
static void
add_run(view_t *v, uint32_t r, uint32_t segment, bool lists)
{
    const attn_kv_run_t *run = &v->entry->runs[r];
    const uint32_t shift     = (uint32_t)__builtin_ctz(v->planned->leaf_tokens);
    const int64_t start      = (int64_t)run->chunk * v->b->problem->chunk_size;
    const int64_t see_end    = v->see_end - start;
    int64_t from = v->see_first - start, to = see_end < run->length ? see_end : run->length;

    from = from > 0 ? from : 0;
    if (from >= to) {
        return;
    }
    uint32_t first = (uint32_t)from, end = (uint32_t)to;
    if (lists) {
        narrow_to_lists(v->b, v->entry, run, &first, &end);
        if (first >= end) {
            return;
        }
    }
    first >>= shift;
    end            = ((end - 1) >> shift) + 1;
    from           = from > (int64_t)first << shift ? from : (int64_t)first << shift;
    to             = (int64_t)end << shift;
    v->first_chunk = v->n == v->first ? run->chunk : v->first_chunk;
    v->parting |= run->chunk ^ v->first_chunk;
    v->leaves = end > v->leaves ? end : v->leaves;

    uint64_t tokens = (uint64_t)((to < see_end ? to : see_end) - from);
    cut_at_segments(v, r, first, end, segment, tokens);
}

/* The first segment of each run of an entry, index + 1. Returns how many segments it has. */
static uint32_t
segments_by_run(const builder_t *b, uint32_t e)
{
    uint32_t n = 0;

    memset(b->run_segment, 0, b->problem->entries[e].n_runs * sizeof(*b->run_segment));
    for (uint32_t s = b->segment_first[e]; s != 0; s = b->segments.at[s - 1].next, n++) {
        if (b->run_segment[b->segments.at[s - 1].run] == 0) {
            b->run_segment[b->segments.at[s - 1].run] = s;
        }
    }
    return n;
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

static void
sort_runs(const attn_problem_entry_t *entry, uint32_t *order)
{
    if (entry->n_runs <= SMALL_RUNS) {
        insert_by_key(entry, order);
    } else {
        count_over_lanes(entry, order);
    }
}

/*
 * Numbers of an entry's runs in ascending key. Whole sequences have one order: that of a longer
 * one, without the runs that the shorter one has not.
 */
static const uint32_t *
order_runs(builder_t *b, const attn_problem_entry_t *entry)
{
    uint32_t n = entry->n_runs, at = 0;

    if (entry->runs[n - 1].chunk != n - 1) {
        sort_runs(entry, b->run_order);
        return b->run_order;
    }
    if (b->whole < n || b->whole / WHOLE_FACTOR > n) {
        sort_runs(entry, b->whole_order);
        b->whole = n;
    }
    if (b->whole == n) {
        return b->whole_order;
    }
    for (uint32_t i = 0; at < n; i++) {
        b->run_order[at] = b->whole_order[i];
        at += b->whole_order[i] < n;
    }
    return b->run_order;
}

/* The stack of a fold holds at most a state per level at which keys part, and one more. Keys part
 * where chunk numbers do, in another order of bits. */
static void
note_depth(builder_t *b, uint32_t parting, uint32_t leaves)
{
    uint32_t depth = 2 + (leaves > 1 ? 32 - (uint32_t)__builtin_clz(leaves - 1) : 0);

    for (; parting != 0; parting &= parting - 1) {
        depth++;
    }
    b->plan.max_depth = depth > b->plan.max_depth ? depth : b->plan.max_depth;
}

/* The spans of an entry that has queries and runs. */
static void
add_entry(builder_t *b, uint32_t e)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];
    const uint32_t *order             = order_runs(b, entry);
    bool lists = entry->n_lists > 0 && !entry->lists_change, shares = b->segment_first[e] != 0;
    uint64_t room = entry->n_runs;
    int64_t unused;

    if (shares) {
        room += 2 * (uint64_t)segments_by_run(b, e);
    }
    if (!RESERVE(b, b->spans, room) || !RESERVE(b, b->stretches, room)) {
        return;
    }
    view_t v = {.b         = b,
                .entry     = entry,
                .planned   = &b->entries.at[e],
                .spans     = b->spans.at,
                .first     = b->spans.n,
                .n         = b->spans.n,
                .stretches = b->stretches.at + b->stretches.n};
    plan_see(b->problem, entry, 0, 1, &v.see_first, &v.see_end);
    plan_see(b->problem, entry, entry->n_q - 1, 1, &unused, &v.see_end);
    bool plain = !lists && entry->n_nodes <= 1;
    for (uint32_t i = 0, own; i < entry->n_runs; i += own) {
        own = plain && !shares ? entry->n_runs : 0;
        while (plain && i + own < entry->n_runs && b->run_segment[order[i + own]] == 0) {
            own++;
        }
        add_own_runs(&v, order + i, own);
        if (own == 0) {
            add_run(&v, order[i], shares ? b->run_segment[order[i]] : 0, lists);
            own = 1;
        }
    }
    close_stretch(&v);
    b->spans.n = v.n;
    b->stretches.n += v.n_stretches;
    note_depth(b, v.parting, v.leaves);
}

void
plan_add_spans(builder_t *b)
{
    for (uint32_t e = 0; e < b->problem->n && !b->no_memory; e++) {
        const attn_problem_entry_t *entry = &b->problem->entries[e];

        b->stretch_first.at[e] = b->stretches.n;
        if (entry->n_q > 0 && entry->n_runs > 0) {
            add_entry(b, e);
        } else {
            note_depth(b, 0, 0);
        }
    }
    b->stretch_first.at[b->problem->n] = b->stretches.n;
}
