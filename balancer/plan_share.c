/*
 * Shared prefixes. Forks list the same pages; whole leaves of equal pages are read once
 * for the rows of all of them. Found from the page lists, not declared.
 *
 * Entries whose first pages are equal are compared, run by run. What a set of entries has
 * in common becomes a segment; where some of them part, the set falls into smaller ones.
 * In key order, an entry's own leaves may lie between shared ones, and elsewhere in each
 * entry; a range of a set is a stretch where that is so for none of them.
 */
#include "balancer/plan_int.h"

#include <string.h>

/* Saving fewer reads of a leaf than that does not pay for the states in between. */
#define SAVED_LEAVES_MIN 2u

/* ---- finding ---- */

static bool
may_share(const builder_t *b, uint32_t e)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];

    /* With a window, what the entries see of a prefix differs, and is short. */
    return entry->n_q > 0 && entry->n_runs > 0 && entry->n_lists == 0 && !entry->lists_change &&
           b->problem->window == 0 && (uint64_t)entry->n_q * b->plan->group * 2 <= ATTN_WORK_ROWS;
}

/* Whole leaves from `leaf` on with equal tokens in run `run` of both entries. */
static uint32_t
common_leaves(const builder_t *b, uint32_t e, uint32_t f, uint32_t run, uint32_t leaf)
{
    const attn_problem_entry_t *x = &b->problem->entries[e], *y = &b->problem->entries[f];
    uint32_t tokens = b->plan->entries[e].leaf_tokens, page_size = b->problem->page_size;

    if (run >= x->n_runs || run >= y->n_runs || x->runs[run].chunk != y->runs[run].chunk) {
        return 0;
    }
    const uint32_t *xp = x->runs[run].pages, *yp = y->runs[run].pages;
    uint32_t length =
        x->runs[run].length < y->runs[run].length ? x->runs[run].length : y->runs[run].length;
    uint32_t end   = length / tokens;
    uint32_t page  = leaf * tokens / page_size;
    uint32_t pages = (uint32_t)(((uint64_t)end * tokens + page_size - 1) / page_size);

    if (leaf >= end) {
        return 0;
    }
    if (xp == yp || memcmp(xp + page, yp + page, (pages - page) * sizeof(*xp)) == 0) {
        return end - leaf;
    }
    while (xp[page] == yp[page]) {
        page++;
    }
    uint64_t equal = (uint64_t)page * page_size / tokens; /* whole leaves before that page */
    return equal > leaf ? (uint32_t)equal - leaf : 0;
}

static void
swap_ids(builder_t *b, uint32_t i, uint32_t j)
{
    uint32_t id = b->ids[i];
    b->ids[i]   = b->ids[j];
    b->ids[j]   = id;
}

static uint32_t
new_set(builder_t *b, uint32_t first, uint32_t end)
{
    share_set_t set = {.first = first, .n = end - first};
    for (uint32_t i = first; i < end; i++) {
        set.rows += b->problem->entries[b->ids[i]].n_q * b->plan->group;
    }
    PUSH(b, b->sets, set);
    return b->sets.n - 1;
}

static void
add_segment(builder_t *b, uint32_t set, uint32_t run, uint32_t leaf, uint32_t n)
{
    share_set_t *s = &b->sets.at[set];

    s->leaves += n;
    for (uint32_t i = s->first; i < s->first + s->n; i++) {
        uint32_t e = b->ids[i];
        PUSH(b, b->segments,
             (segment_t){.run = run, .leaf_first = leaf, .leaf_end = leaf + n, .set = set});
        if (b->no_memory) {
            return;
        }
        if (b->segment_last[e] != 0) {
            b->segments.at[b->segment_last[e] - 1].next = b->segments.n;
        } else {
            b->segment_first[e] = b->segments.n;
        }
        b->segment_last[e] = b->segments.n;
    }
}

/* What the entries ids[first .. end) have in common from a leaf on. */
static void
share_from(builder_t *b, uint32_t first, uint32_t end, uint32_t run, uint32_t leaf)
{
    uint32_t set = SET_NONE;

    while (end - first >= 2 && !b->no_memory) {
        uint32_t least = UINT32_MAX,
                 with  = first + 1; /* ids[first .. with) go on with the first one */
        for (uint32_t i = first + 1; i < end; i++) {
            uint32_t common = common_leaves(b, b->ids[first], b->ids[i], run, leaf);
            if (common > 0) {
                least = common < least ? common : least;
                swap_ids(b, i, with++);
            }
        }
        if (with - first < 2) { /* the first one is on its own from here */
            first++;
            set = SET_NONE;
            continue;
        }
        if (with < end) {
            share_from(b, with, end, run, leaf);
            end = with;
            set = SET_NONE;
        }
        if (set == SET_NONE) {
            set = new_set(b, first, end);
            if (b->no_memory) {
                return;
            }
        }
        add_segment(b, set, run, leaf, least);
        leaf += least;
        if ((uint64_t)leaf * b->plan->entries[b->ids[first]].leaf_tokens ==
            b->problem->chunk_size) {
            run++;
            leaf = 0;
        }
    }
}

/* Entries by their first page: lists of those with the same one. */
static bool
group_by_first_page(builder_t *b, uint32_t *heads, uint32_t n_heads, uint32_t *next)
{
    bool any = false;

    memset(heads, 0, n_heads * sizeof(*heads));
    for (uint32_t e = b->problem->n; e-- > 0;) {
        if (!may_share(b, e)) {
            continue;
        }
        const attn_kv_run_t *run = &b->problem->entries[e].runs[0];
        uint32_t *head = &heads[(run->pages[0] * 0x9e3779b1u ^ run->chunk) & (n_heads - 1)];
        any            = any || *head != 0;
        next[e]        = *head;
        *head          = e + 1;
    }
    return any;
}

void
plan_find_shared(builder_t *b)
{
    uint32_t n = b->problem->n, n_heads = 16;
    while (n_heads < 2 * n) {
        n_heads *= 2;
    }
    uint32_t *heads = malloc((n_heads + (size_t)n) * sizeof(*heads));
    if (heads == NULL) {
        b->no_memory = true;
        return;
    }
    if (group_by_first_page(b, heads, n_heads, heads + n_heads)) {
        uint32_t filled = 0;
        for (uint32_t h = 0; h < n_heads; h++) {
            /* A bucket may mix first pages; share_from() tells them apart. At most a work's rows at
             * a time. */
            uint32_t first = filled, rows = 0;
            for (uint32_t e = heads[h]; e != 0; e = heads[n_heads + e - 1]) {
                uint32_t more = b->problem->entries[e - 1].n_q * b->plan->group;
                if (rows + more > ATTN_WORK_ROWS) {
                    share_from(b, first, filled, 0, 0);
                    first = filled;
                    rows  = 0;
                }
                b->ids[filled++] = e - 1;
                rows += more;
            }
            share_from(b, first, filled, 0, 0);
        }
    }
    free(heads);
    for (uint32_t i = 0; i < b->segments.n; i++) {
        segment_t *segment     = &b->segments.at[i];
        const share_set_t *set = &b->sets.at[segment->set];
        if ((uint64_t)set->leaves * (set->n - 1) < SAVED_LEAVES_MIN) {
            segment->set = SET_NONE;
        }
    }
}

/* ---- linking ---- */

/* What an entry's spans say of the links of the sets in them. `at` counts the spans of each set. */
static void
link_entry(builder_t *b, uint32_t e, uint32_t *at)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];
    uint32_t first = b->span_first[e], end = b->span_first[e + 1];

    for (uint32_t i = first; i < end; i++) {
        const attn_span_t *span = &b->spans.at[i];
        if (span->set == SET_NONE) {
            continue;
        }
        link_t *link = &b->links.at[b->sets.at[span->set].link_first + at[span->set]++];
        uint64_t key = plan_first_key(b, e, span), last = plan_last_key(b, e, span);
        uint32_t bits   = b->plan->entries[e].leaf_bits;
        uint32_t node   = plan_node_of(entry, (uint32_t)(key >> bits));
        uint64_t before = i > first ? plan_last_key(b, e, span - 1) : 0;
        uint64_t after  = i + 1 < end ? plan_first_key(b, e, span + 1) : 0;
        bool has_before = i > first && plan_node_of(entry, (uint32_t)(before >> bits)) == node;
        bool has_after  = i + 1 < end && plan_node_of(entry, (uint32_t)(after >> bits)) == node;
        uint32_t left   = has_before ? attn_key_lca(before, key) : ATTN_LEVEL_NONE;
        uint32_t right  = has_after ? attn_key_lca(last, after) : ATTN_LEVEL_NONE;

        link->cut   = link->cut || !has_before || span[-1].set != span->set;
        link->left  = left < link->left ? left : link->left;
        link->right = right < link->right ? right : link->right;
    }
    for (uint32_t i = first; i < end; i++) { /* the counts start anew with the next entry */
        if (b->spans.at[i].set != SET_NONE) {
            at[b->spans.at[i].set] = 0;
        }
    }
}

/* A range of spans [from, to) of the set's first entry, links [k, k_end). */
static void
add_range(builder_t *b, const share_set_t *set, uint32_t from, uint32_t to, uint32_t k,
          uint32_t k_end)
{
    uint32_t leader = b->ids[set->first], row = 0;
    const attn_span_t *spans = b->spans.at;
    attn_work_t work         = {.member_first = b->members.n,
                                .n_members    = set->n,
                                .rows         = set->rows,
                                .n_q          = set->rows / b->plan->group,
                                .n_heads      = b->plan->group,
                                .span_first   = from,
                                .n_spans      = to - from,
                                .leaf_first   = spans[from].leaf_first,
                                .leaf_end     = spans[to - 1].leaf_end,
                                .left_level   = b->links.at[k].left,
                                .right_level  = b->links.at[k_end - 1].right,
                                .see_end      = INT64_MAX};

    for (uint32_t i = set->first; i < set->first + set->n; i++) {
        PUSH(b, b->members, (attn_member_t){.entry = b->ids[i], .row_first = row});
        row += b->problem->entries[b->ids[i]].n_q * b->plan->group;
    }
    uint64_t leaves = 0;
    for (uint32_t i = from; i < to; i++) {
        leaves += spans[i].leaf_end - spans[i].leaf_first;
    }
    work.cost = leaves * b->plan->entries[leader].leaf_tokens * plan_token_cost(set->rows);
    b->plan->shared_leaves += leaves * (set->n - 1);
    for (uint32_t i = k; i < k_end; i++) {
        b->links.at[i].range = b->ranges.n;
    }
    PUSH(b, b->ranges, (range_t){.work = work});
}

/* The ranges of a set, along the spans of its first entry. */
static void
add_ranges(builder_t *b, const share_set_t *set, uint32_t id)
{
    uint32_t leader = b->ids[set->first];
    uint32_t k = set->link_first, open = 0, open_k = k;

    for (uint32_t i = b->span_first[leader]; i < b->span_first[leader + 1]; i++) {
        if (b->spans.at[i].set != id) {
            continue;
        }
        if (b->links.at[k].cut && k > open_k) {
            add_range(b, set, open, open + (k - open_k), open_k, k);
        }
        if (b->links.at[k].cut) {
            open   = i;
            open_k = k;
        }
        k++;
    }
    if (k > open_k) {
        add_range(b, set, open, open + (k - open_k), open_k, k);
    }
}

void
plan_link_shared(builder_t *b)
{
    uint32_t *at = calloc(b->sets.n + 1, sizeof(*at));

    if (at == NULL) {
        b->no_memory = true;
        return;
    }
    for (uint32_t s = 0; s < b->sets.n; s++) {
        share_set_t *set = &b->sets.at[s];
        uint32_t leader  = b->ids[set->first];
        set->link_first  = b->links.n;
        for (uint32_t i = b->span_first[leader]; i < b->span_first[leader + 1]; i++) {
            set->n_spans += b->spans.at[i].set == s;
        }
        for (uint32_t i = 0; i < set->n_spans; i++) {
            PUSH(b, b->links, (link_t){.left = ATTN_LEVEL_NONE, .right = ATTN_LEVEL_NONE});
        }
    }
    for (uint32_t e = 0; e < b->problem->n && !b->no_memory; e++) {
        if (b->segment_first[e] != 0) {
            link_entry(b, e, at);
        }
    }
    free(at);
    for (uint32_t s = 0; s < b->sets.n && !b->no_memory; s++) {
        share_set_t set = b->sets.at[s];
        if (set.n_spans > 0) {
            add_ranges(b, &set, s);
        }
    }
}
