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

#define PAGES_AT_ONCE 64u
#define NO_PAGE UINT64_MAX

/* ---- finding ---- */

static bool
may_share(const builder_t *b, uint32_t e)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];

    /* With a window, what the entries see of a prefix differs, and is short. */
    return entry->n_q > 0 && entry->n_runs > 0 && entry->n_lists == 0 && !entry->lists_change &&
           b->problem->window == 0 && (uint64_t)entry->n_q * b->plan.group * 2 <= ATTN_WORK_ROWS;
}

/* A leaf of a run, up to which entries are the same, and where they may part. */
typedef struct front {
    uint32_t run, leaf, shift;
    uint32_t page; /* of the run, with the leaf's first token */
} front_t;

/* Pages that so many tokens of a run lie in. */
static uint32_t
pages_of(const builder_t *b, uint64_t tokens)
{
    return (uint32_t)((tokens + b->problem->page_size - 1) / b->problem->page_size);
}

/* Chunk and page at the front for an entry, or NO_PAGE if it has no whole leaf there. */
static uint64_t
page_at(const builder_t *b, const front_t *front, uint32_t e)
{
    const attn_problem_entry_t *entry = &b->problem->entries[e];
    const attn_kv_run_t *run          = &entry->runs[front->run];

    if (front->run >= entry->n_runs || run->length >> front->shift <= front->leaf) {
        return NO_PAGE;
    }
    return (uint64_t)run->chunk << 32 | run->pages[front->page];
}

/* The first page from `page` on that differs, or `end`. */
static uint32_t
first_difference(const uint32_t *x, const uint32_t *y, uint32_t page, uint32_t end)
{
    for (uint32_t n; page < end; page += n) {
        n = end - page < PAGES_AT_ONCE ? end - page : PAGES_AT_ONCE;
        if (memcmp(x + page, y + page, n * sizeof(*x)) != 0) {
            break;
        }
    }
    while (page < end && x[page] == y[page]) {
        page++;
    }
    return page;
}

/* Whole leaves with equal tokens from the front on, where the pages of both are the same. */
static uint32_t
common_leaves(const builder_t *b, const front_t *front, uint32_t e, uint32_t f)
{
    const attn_kv_run_t *x = &b->problem->entries[e].runs[front->run];
    const attn_kv_run_t *y = &b->problem->entries[f].runs[front->run];
    uint32_t end           = (x->length < y->length ? x->length : y->length) >> front->shift;

    if (x->pages == y->pages) {
        return end - front->leaf;
    }
    uint32_t pages = pages_of(b, (uint64_t)end << front->shift);
    uint32_t page  = first_difference(x->pages, y->pages, front->page, pages);
    if (page == pages) {
        return end - front->leaf;
    }
    uint64_t equal = (uint64_t)page * b->problem->page_size >> front->shift; /* before that page */
    return equal > front->leaf ? (uint32_t)equal - front->leaf : 0;
}

static uint32_t
new_set(builder_t *b, uint32_t first, uint32_t end)
{
    share_set_t set = {.first = first, .n = end - first};
    for (uint32_t i = first; i < end; i++) {
        set.rows += b->problem->entries[b->ids[i]].n_q * b->plan.group;
    }
    PUSH(b, b->sets, set);
    return b->sets.n - 1;
}

static void
add_segment(builder_t *b, uint32_t set, const front_t *front, uint32_t n)
{
    share_set_t *s = &b->sets.at[set];

    s->leaves += n;
    if (!RESERVE(b, b->segments, s->n)) {
        return;
    }
    for (uint32_t i = s->first; i < s->first + s->n; i++) {
        uint32_t e = b->ids[i], at = b->segments.n++;
        b->segments.at[at] = (segment_t){
            .run = front->run, .leaf_first = front->leaf, .leaf_end = front->leaf + n, .set = set};
        if (b->segment_last[e] != 0) {
            b->segments.at[b->segment_last[e] - 1].next = at + 1;
        } else {
            b->segment_first[e] = at + 1;
        }
        b->segment_last[e] = at + 1;
    }
}

/*
 * Of n entries and their pages at the front, those that go on with the first one change places with
 * others, so that they follow it. Returns how many there are with it, and the fewest leaves that
 * one of them has in common with it.
 */
static uint32_t
gather_equal(const builder_t *b, const front_t *front, uint32_t n, uint32_t *ids, uint64_t *pages,
             uint32_t *least)
{
    uint32_t with = 1;

    *least = UINT32_MAX;
    for (uint32_t i = 1; i < n && pages[0] != NO_PAGE; i++) {
        uint32_t common = pages[i] == pages[0] ? common_leaves(b, front, ids[0], ids[i]) : 0;
        if (common > 0) {
            uint32_t id   = ids[i];
            *least        = common < *least ? common : *least;
            ids[i]        = ids[with];
            pages[i]      = pages[with];
            ids[with]     = id;
            pages[with++] = pages[0];
        }
    }
    return with;
}

/* What the entries ids[first .. end), at most a work's rows, have in common from a leaf on. */
static void
share_from(builder_t *b, uint32_t first, uint32_t end, front_t front)
{
    uint64_t pages[ATTN_WORK_ROWS];
    uint32_t set = SET_NONE, looked = UINT32_MAX, least;

    while (end - first >= 2 && !b->no_memory) {
        if (looked == UINT32_MAX) {
            looked     = first;
            front.page = (uint32_t)(((uint64_t)front.leaf << front.shift) / b->problem->page_size);
            for (uint32_t i = first; i < end; i++) {
                pages[i - first] = page_at(b, &front, b->ids[i]);
            }
        }
        uint32_t with = first + gather_equal(b, &front, end - first, b->ids + first,
                                             pages + (first - looked), &least);
        if (with - first < 2) { /* the first one is on its own from here */
            first++;
            set = SET_NONE;
            continue;
        }
        if (with < end) {
            share_from(b, with, end, front);
            end = with;
            set = SET_NONE;
        }
        if (set == SET_NONE) {
            set = new_set(b, first, end);
        }
        if (b->no_memory) {
            return;
        }
        add_segment(b, set, &front, least);
        front.leaf += least;
        if ((uint64_t)front.leaf << front.shift == b->problem->chunk_size) {
            front.run++;
            front.leaf = 0;
        }
        looked = UINT32_MAX;
    }
}

/* Lists of entries with the same chunk and page at the very first: `table` has the heads, index +
 * 1, and `next` leads on. False if each is on its own. */
static bool
list_by_first_page(builder_t *b, uint32_t bits, uint32_t *next)
{
    uint32_t *table = b->table.at, mask = (1u << bits) - 1;
    bool any = false;

    memset(table, 0, (mask + (size_t)1) * sizeof(*table));
    for (uint32_t e = b->problem->n; e-- > 0;) {
        if (!may_share(b, e)) {
            continue;
        }
        const attn_kv_run_t *run = &b->problem->entries[e].runs[0];
        uint64_t mixed           = (uint64_t)run->chunk << 32 | run->pages[0];
        uint32_t at              = (uint32_t)(mixed * UINT64_C(0x9e3779b97f4a7c15) >> (64 - bits));
        for (; table[at] != 0; at = (at + 1) & mask) {
            const attn_kv_run_t *other = &b->problem->entries[table[at] - 1].runs[0];
            if (other->chunk == run->chunk && other->pages[0] == run->pages[0]) {
                break;
            }
        }
        any       = any || table[at] != 0;
        next[e]   = table[at];
        table[at] = e + 1;
    }
    return any;
}

/* One list: cut so that its entries have no more rows than a work. */
static void
share_list(builder_t *b, uint32_t head, const uint32_t *next, uint32_t *filled)
{
    const front_t start = {.shift = (uint32_t)__builtin_ctz(b->entries.at[head - 1].leaf_tokens)};
    const uint32_t most = b->plan.many != b->plan.few ? ATTN_SHARED_ROWS : ATTN_WORK_ROWS;
    uint32_t first = *filled, end = first, rows = 0;

    for (uint32_t e = head; e != 0; e = next[e - 1]) {
        uint32_t more = b->problem->entries[e - 1].n_q * b->plan.group;
        if (rows + more > most) {
            share_from(b, first, end, start);
            first = end;
            rows  = 0;
        }
        b->ids[end++] = e - 1;
        rows += more;
    }
    share_from(b, first, end, start);
    *filled = end;
}

void
plan_find_shared(builder_t *b)
{
    uint32_t n = b->problem->n, bits = 4, filled = 0;
    while (bits < 31 && 1u << bits < 2 * n) {
        bits++;
    }
    if (n == 0) { /* and so no memory for any */
        return;
    }
    memset(b->segment_first, 0, 2 * (size_t)n * sizeof(uint32_t)); /* and segment_last */
    if (!RESERVE(b, b->table, 1u << bits)) {
        return;
    }
    uint32_t *next = b->place; /* not needed before */
    if (!list_by_first_page(b, bits, next)) {
        return;
    }
    for (uint32_t h = 0; h < 1u << bits && !b->no_memory; h++) {
        uint32_t head = b->table.at[h];
        if (head != 0 && next[head - 1] != 0) {
            share_list(b, head, next, &filled);
        }
    }
    for (uint32_t i = 0; i < filled; i++) {
        b->place[b->ids[i]] = i;
    }
    for (uint32_t i = 0; i < b->segments.n; i++) {
        segment_t *segment     = &b->segments.at[i];
        const share_set_t *set = &b->sets.at[segment->set];
        if ((uint64_t)set->leaves * (set->n - 1) < SAVED_LEAVES_MIN) {
            segment->set = SET_NONE;
        }
    }
}

/* ---- linking ---- */

void
plan_forget_counts(builder_t *b, uint32_t e)
{
    for (uint32_t i = b->stretch_first.at[e]; i < b->stretch_first.at[e + 1]; i++) {
        if (b->stretches.at[i].set != SET_NONE) {
            b->at_set.at[b->stretches.at[i].set] = 0;
        }
    }
}

/* What the spans of a shared stretch say of their links. left, right: levels at which the stretch
 * parts from what the entry has before and after it. */
static void
link_stretch(builder_t *b, uint32_t e, const stretch_t *stretch, uint32_t left, uint32_t right)
{
    const attn_plan_entry_t *planned = &b->entries.at[e];
    const attn_kv_run_t *runs        = b->problem->entries[e].runs;
    link_t *link  = &b->links.at[b->sets.at[stretch->set].link_first + b->at_set.at[stretch->set]];
    uint64_t last = 0;

    b->at_set.at[stretch->set] += stretch->span_end - stretch->span_first;
    for (uint32_t i = stretch->span_first; i < stretch->span_end; i++, link++) {
        const attn_span_t *span = &b->spans.at[i];
        uint64_t key            = attn_leaf_key(planned, runs[span->run].chunk, span->leaf_first);
        uint32_t from           = left;
        if (i == stretch->span_first) {
            link->cut = true;
        } else {
            from           = attn_key_lca(last, key);
            link[-1].right = from < link[-1].right ? from : link[-1].right;
        }
        link->left = from < link->left ? from : link->left;
        last       = key + (span->leaf_end - span->leaf_first - 1);
    }
    link[-1].right = right < link[-1].right ? right : link[-1].right;
}

static void
link_entry(builder_t *b, uint32_t e)
{
    uint32_t first = b->stretch_first.at[e], end = b->stretch_first.at[e + 1];

    for (uint32_t i = first; i < end; i++) {
        const stretch_t *s = &b->stretches.at[i];
        if (s->set == SET_NONE) {
            continue;
        }
        bool before    = i > first && s[-1].node == s->node;
        bool after     = i + 1 < end && s[1].node == s->node;
        uint32_t left  = before ? attn_key_lca(s[-1].last_key, s->key) : ATTN_LEVEL_NONE;
        uint32_t right = after ? attn_key_lca(s->last_key, s[1].key) : ATTN_LEVEL_NONE;
        link_stretch(b, e, s, left, right);
    }
    plan_forget_counts(b, e);
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
                                .n_q          = set->rows / b->plan.group,
                                .n_heads      = b->plan.group,
                                .span_first   = from,
                                .n_spans      = to - from,
                                .leaf_first   = spans[from].leaf_first,
                                .leaf_end     = spans[to - 1].leaf_end,
                                .left_level   = b->links.at[k].left,
                                .right_level  = b->links.at[k_end - 1].right,
                                .see_end      = INT64_MAX};

    for (uint32_t i = set->first; i < set->first + set->n; i++) {
        PUSH(b, b->members, (attn_member_t){.entry = b->ids[i], .row_first = row});
        row += b->problem->entries[b->ids[i]].n_q * b->plan.group;
    }
    uint64_t leaves = 0;
    for (uint32_t i = from; i < to; i++) {
        leaves += spans[i].leaf_end - spans[i].leaf_first;
    }
    work.cost = leaves * b->entries.at[leader].leaf_tokens * plan_token_cost(set->rows);
    b->plan.shared_leaves += leaves * (set->n - 1);
    for (uint32_t i = k; i < k_end; i++) {
        b->links.at[i].range = b->ranges.n;
    }
    PUSH(b, b->ranges, work);
}

/* The ranges of a set, along the spans of its first entry. */
static void
add_ranges(builder_t *b, const share_set_t *set, uint32_t id)
{
    uint32_t leader = b->ids[set->first];
    uint32_t k = set->link_first, open = 0, open_k = k;

    for (uint32_t s = b->stretch_first.at[leader]; s < b->stretch_first.at[leader + 1]; s++) {
        const stretch_t *stretch = &b->stretches.at[s];
        for (uint32_t i = stretch->span_first; stretch->set == id && i < stretch->span_end; i++) {
            if (b->links.at[k].cut && k > open_k) {
                add_range(b, set, open, open + (k - open_k), open_k, k);
            }
            if (b->links.at[k].cut) {
                open   = i;
                open_k = k;
            }
            k++;
        }
    }
    if (k > open_k) {
        add_range(b, set, open, open + (k - open_k), open_k, k);
    }
}

/* A count of 0, and links that nothing is known of, for each set. */
static bool
make_links(builder_t *b)
{
    if (!RESERVE(b, b->at_set, b->sets.n)) {
        return false;
    }
    memset(b->at_set.at, 0, b->sets.n * sizeof(*b->at_set.at));
    for (uint32_t s = 0; s < b->sets.n; s++) {
        share_set_t *set = &b->sets.at[s];
        uint32_t leader  = b->ids[set->first];
        set->link_first  = b->links.n;
        for (uint32_t i = b->stretch_first.at[leader]; i < b->stretch_first.at[leader + 1]; i++) {
            const stretch_t *stretch = &b->stretches.at[i];
            set->n_spans += stretch->set == s ? stretch->span_end - stretch->span_first : 0;
        }
        for (uint32_t i = 0; i < set->n_spans; i++) {
            PUSH(b, b->links, (link_t){.left = ATTN_LEVEL_NONE, .right = ATTN_LEVEL_NONE});
        }
    }
    return !b->no_memory;
}

void
plan_link_shared(builder_t *b)
{
    if (!make_links(b)) {
        return;
    }
    for (uint32_t e = 0; e < b->problem->n; e++) {
        if (b->segment_first[e] != 0) {
            link_entry(b, e);
        }
    }
    for (uint32_t s = 0; s < b->sets.n && !b->no_memory; s++) {
        share_set_t set = b->sets.at[s];
        if (set.n_spans > 0) {
            add_ranges(b, &set, s);
        }
    }
}
