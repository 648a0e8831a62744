/*
 * Plan a batch: entries to spans of leaves, spans to ranges with the rows that read them,
 * ranges to works that threads take, longest first.
 *
 *     plan_check.c   is the problem well formed
 *     plan_span.c    what an entry sees, as ranges of leaves in the order of the tree
 *     plan.c         tiles of queries, reductions
 *     plan_share.c   ranges that several entries read at once
 *     plan_cut.c     ranges to works; states in between
 *
 * A leaf is what it is before any of this: the plan only says who computes it.
 */
#include "balancer/plan.h"

#include "balancer/plan_int.h"
#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <string.h>

void *
plan_room(builder_t *b, void *at, uint32_t *room, uint64_t wanted, size_t size)
{
    uint64_t more = attn_max(attn_max(wanted, (uint64_t)*room * 2), b->problem->n + 16);
    void *grown   = more <= UINT32_MAX ? realloc(at, more * size) : NULL;

    if (grown == NULL) {
        b->no_memory = true;
        return at;
    }
    *room = (uint32_t)more;
    return grown;
}

/* Every vector of a builder, for what is done to all of them. */
#define EACH_VECTOR(DO)                                                                            \
    DO(entries)                                                                                    \
    DO(spans) DO(members) DO(ranges) DO(works) DO(refs) DO(parts) DO(reductions) DO(keys)          \
        DO(order) DO(piece_first) DO(stretches) DO(stretch_first) DO(table) DO(scratch)            \
            DO(segments) DO(sets) DO(links) DO(at_set)

/* ---- entries ---- */

static void
number_entries(builder_t *b)
{
    attn_plan_t *plan       = &b->plan;
    const attn_problem_t *p = b->problem;

    for (uint32_t i = 0; i < p->n; i++) {
        const attn_problem_entry_t *entry = &p->entries[i];
        bool few                          = (uint64_t)entry->n_q * plan->group <= ATTN_FEW_ROWS;
        uint32_t leaf                     = few ? plan->few : plan->many;
        leaf                              = leaf < p->chunk_size ? leaf : p->chunk_size;
        uint32_t bits = (uint32_t)__builtin_ctz(p->chunk_size) - (uint32_t)__builtin_ctz(leaf);

        b->entries.at[i] = (attn_plan_entry_t){.few         = few,
                                               .leaf_tokens = leaf,
                                               .leaf_bits   = bits,
                                               .q_row       = plan->n_queries,
                                               .o_row       = plan->o_rows,
                                               .state       = plan->states};
        plan->n_queries += entry->n_q;
        plan->o_rows += entry->n_nodes == 0 ? entry->n_q : 0;
        plan->states += (uint64_t)entry->n_nodes * entry->n_q * p->q_heads;
        plan->max_leaf = leaf > plan->max_leaf ? leaf : plan->max_leaf;
        plan->masked   = plan->masked || entry->mask != NULL;
    }
}

/* ---- reductions ---- */

/* Some queries and heads of the group: the rows of one work. */
typedef struct tile {
    uint32_t entry, q_first, n_q, head_first, n_heads;
} tile_t;

/* Tokens of a stretch that the tile sees. */
static uint64_t
tokens_seen(const builder_t *b, const tile_t *tile, const stretch_t *stretch, int64_t see_first,
            int64_t see_end)
{
    const attn_problem_entry_t *entry = &b->problem->entries[tile->entry];
    int64_t leaf                      = b->entries.at[tile->entry].leaf_tokens;
    uint64_t tokens                   = 0;

    if (tile->n_q == entry->n_q) {
        return stretch->tokens;
    }
    for (uint32_t i = stretch->span_first; i < stretch->span_end; i++) {
        const attn_span_t *span = &b->spans.at[i];
        int64_t start           = (int64_t)entry->runs[span->run].chunk * b->problem->chunk_size;
        int64_t from = start + span->leaf_first * leaf, to = start + span->leaf_end * leaf;
        from = from > see_first ? from : see_first;
        to   = to < see_end ? to : see_end;
        tokens += to > from ? (uint64_t)(to - from) : 0;
    }
    return tokens;
}

/* An own stretch of a tile's entry: one range, and its part in the reduction. */
static void
add_own_range(builder_t *b, const tile_t *tile, const stretch_t *stretch, uint32_t left,
              uint32_t right)
{
    const attn_span_t *spans = b->spans.at;
    uint32_t first = stretch->span_first, end = stretch->span_end;
    uint32_t rows = tile->n_q * tile->n_heads;
    int64_t see_first, see_end;

    if (!RESERVE(b, b->ranges, 1)) {
        return;
    }
    plan_see(b->problem, &b->problem->entries[tile->entry], tile->q_first, tile->n_q, &see_first,
             &see_end);
    uint64_t tokens = tokens_seen(b, tile, stretch, see_first, see_end);
    b->ranges.at[b->ranges.n] =
        (attn_work_t){.member_first = b->members.n,
                      .n_members    = 1,
                      .rows         = rows,
                      .q_first      = tile->q_first,
                      .n_q          = tile->n_q,
                      .head_first   = tile->head_first,
                      .n_heads      = tile->n_heads,
                      .span_first   = first,
                      .n_spans      = end - first,
                      .leaf_first   = first < end ? spans[first].leaf_first : 0,
                      .leaf_end     = first < end ? spans[end - 1].leaf_end : 0,
                      .left_level   = left,
                      .right_level  = right,
                      .see_first    = see_first,
                      .see_end      = see_end,
                      .cost         = tokens * plan_token_cost(rows)};
    PUSH(b, b->members, (attn_member_t){.entry = tile->entry, .reduction = b->reductions.n - 1});
    PUSH(b, b->refs, (attn_part_t){.work = b->ranges.n});
    b->ranges.n++;
}

/* The entry's part in a range of a set that begins with this link, if one does. */
static void
add_shared_ref(builder_t *b, uint32_t entry, uint32_t set_id, uint32_t k)
{
    const share_set_t *set = &b->sets.at[set_id];
    const link_t *link     = &b->links.at[set->link_first + k];

    if (!link->cut) {
        return;
    }
    uint32_t m = b->ranges.at[link->range].member_first + b->place[entry] - set->first;
    assert(b->members.at[m].entry == entry);
    b->members.at[m].reduction = b->reductions.n - 1;
    PUSH(b, b->refs, (attn_part_t){.work = link->range, .row_first = b->members.at[m].row_first});
}

/* One (entry, node, tile): its parts, over stretches [first, end), ascending in key. */
static void
add_reduction(builder_t *b, const tile_t *tile, uint32_t node, uint32_t first, uint32_t end)
{
    const stretch_t *stretches = b->stretches.at;
    uint32_t refs              = b->refs.n;

    PUSH(b, b->reductions,
         (attn_reduction_t){.entry      = tile->entry,
                            .node       = node,
                            .q_first    = tile->q_first,
                            .n_q        = tile->n_q,
                            .head_first = tile->head_first,
                            .n_heads    = tile->n_heads,
                            .part_first = refs});
    if (first == end) {
        const stretch_t none = {0};
        add_own_range(b, tile, &none, ATTN_LEVEL_NONE, ATTN_LEVEL_NONE);
    }
    for (uint32_t i = first; i < end && !b->no_memory; i++) {
        const stretch_t *stretch = &stretches[i];
        if (stretch->set != SET_NONE) {
            for (uint32_t span = stretch->span_first; span < stretch->span_end; span++) {
                add_shared_ref(b, tile->entry, stretch->set, b->at_set.at[stretch->set]++);
            }
            continue;
        }
        uint32_t left =
            i > first ? attn_key_lca(stretch[-1].last_key, stretch->key) : ATTN_LEVEL_NONE;
        uint32_t right =
            i + 1 < end ? attn_key_lca(stretch->last_key, stretch[1].key) : ATTN_LEVEL_NONE;
        add_own_range(b, tile, stretch, left, right);
    }
    if (!b->no_memory) {
        b->reductions.at[b->reductions.n - 1].n_parts = b->refs.n - refs;
    }
}

/* All nodes of an entry for one tile: stretches ascend in key, as nodes do. */
static void
add_tile(builder_t *b, const tile_t *tile)
{
    uint32_t nodes = b->problem->entries[tile->entry].n_nodes;
    uint32_t first = b->stretch_first.at[tile->entry], end = b->stretch_first.at[tile->entry + 1];
    uint32_t at = first;

    if (nodes <= 1) {
        add_reduction(b, tile, 0, first, end);
    }
    for (uint32_t node = 0; nodes > 1 && node < nodes && !b->no_memory; node++) {
        uint32_t stop = at;
        while (stop < end && b->stretches.at[stop].node == node) {
            stop++;
        }
        add_reduction(b, tile, node, at, stop);
        at = stop;
    }
    if (b->segment_first[tile->entry] != 0) {
        plan_forget_counts(b, tile->entry);
    }
}

/* Tiles of about equal size, none above a work's rows. */
static void
add_reductions(builder_t *b)
{
    uint32_t group = b->plan.group;
    bool wide      = b->plan.many != b->plan.few;

    for (uint32_t e = 0; e < b->problem->n; e++) {
        uint32_t rows  = wide && !b->entries.at[e].few ? ATTN_MANY_ROWS : ATTN_WORK_ROWS;
        uint32_t heads = group < rows ? group : rows, most = rows / heads; /* queries */
        uint32_t n_q = b->problem->entries[e].n_q;
        uint32_t n = n_q <= most ? n_q > 0 : (n_q + most - 1) / most, q = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t next = i + 1 == n ? n_q : (uint32_t)((uint64_t)n_q * (i + 1) / n);
            for (uint32_t h = 0; h < group && !b->no_memory; h += heads) {
                tile_t tile = {.entry      = e,
                               .q_first    = q,
                               .n_q        = next - q,
                               .head_first = h,
                               .n_heads    = group - h < heads ? group - h : heads};
                add_tile(b, &tile);
            }
            q = next;
        }
    }
}

/* ---- the whole ---- */

/* Memory for what has one row an entry. */
static bool
reserve_entries(builder_t *b)
{
    uint32_t n = b->problem->n, runs = 0;
    for (uint32_t i = 0; i < n; i++) {
        runs = b->problem->entries[i].n_runs > runs ? b->problem->entries[i].n_runs : runs;
    }
    if (!RESERVE(b, b->entries, n) || !RESERVE(b, b->stretch_first, n + 1) ||
        !RESERVE(b, b->scratch, 4 * (uint64_t)n + 3 * (uint64_t)runs)) {
        return false;
    }
    b->ids           = b->scratch.at;
    b->place         = b->ids + n;
    b->segment_first = b->place + n;
    b->segment_last  = b->segment_first + n;
    b->run_segment   = b->segment_last + n;
    b->run_order     = b->run_segment + runs;
    b->whole_order   = b->run_order + runs;
    b->whole         = 0;
    return true;
}

static void
build(builder_t *b)
{
    if (!reserve_entries(b)) {
        return;
    }
    number_entries(b);
    plan_find_shared(b);
    plan_add_spans(b);
    if (!b->no_memory && b->sets.n > 0) {
        plan_link_shared(b);
    }
    if (!b->no_memory) {
        add_reductions(b);
    }
    if (!b->no_memory) {
        plan_cut(b);
    }
}

/* As new, but for the memory. */
static void
begin_anew(builder_t *b, const attn_problem_t *problem, uint32_t parallelism, uint32_t few,
           uint32_t many)
{
    b->plan        = (attn_plan_t){.problem  = *problem,
                                   .group    = problem->q_heads / problem->kv_heads,
                                   .few      = few,
                                   .many     = many,
                                   .max_leaf = 1};
    b->problem     = &b->plan.problem;
    b->parallelism = parallelism;
    b->no_memory   = false;
#define EMPTY(vector) b->vector.n = 0;
    EACH_VECTOR(EMPTY)
#undef EMPTY
}

attn_status_t
attn_plan_renew(const attn_problem_t *problem, uint32_t parallelism, uint32_t few, uint32_t many,
                attn_plan_t **plan_p)
{
    attn_status_t status = plan_check(problem, parallelism, few, many);
    if (status != ATTN_OK) {
        return status;
    }
    builder_t *b = *plan_p != NULL ? (builder_t *)*plan_p : calloc(1, sizeof(*b));
    if (b == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a plan of %u entries", problem->n);
    }
    begin_anew(b, problem, parallelism, few, many);
    build(b);
    if (b->no_memory) {
        if (*plan_p == NULL) {
            attn_plan_free(&b->plan);
        }
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a plan of %u entries", problem->n);
    }
    b->plan.entries      = b->entries.at;
    b->plan.spans        = b->spans.at;
    b->plan.members      = b->members.at;
    b->plan.works        = b->works.at;
    b->plan.n_works      = b->works.n;
    b->plan.order        = b->order.at;
    b->plan.reductions   = b->reductions.at;
    b->plan.n_reductions = b->reductions.n;
    b->plan.parts        = b->parts.at;
    b->plan.keys         = b->keys.at;
    *plan_p              = &b->plan;
    return ATTN_OK;
}

attn_status_t
attn_plan_build(const attn_problem_t *problem, uint32_t parallelism, uint32_t few, uint32_t many,
                attn_plan_t **plan_p)
{
    attn_plan_t *plan    = NULL;
    attn_status_t status = attn_plan_renew(problem, parallelism, few, many, &plan);

    if (status == ATTN_OK) {
        *plan_p = plan;
    }
    return status;
}

uint64_t
attn_plan_bytes(const attn_plan_t *plan)
{
    const builder_t *b = (const builder_t *)plan;
    uint64_t bytes     = sizeof(*b);

#define ADD(vector) bytes += b->vector.room * sizeof(*b->vector.at);
    EACH_VECTOR(ADD)
#undef ADD
    return bytes;
}

void
attn_plan_free(attn_plan_t *plan)
{
    builder_t *b = (builder_t *)plan;

    if (b == NULL) {
        return;
    }
#define FREE(vector) free(b->vector.at);
    EACH_VECTOR(FREE)
#undef FREE
    free(b);
}

void
attn_plan_describe(const attn_plan_t *plan, attn_plan_info_t *info)
{
    *info = (attn_plan_info_t){.queries       = plan->n_queries,
                               .o_rows        = plan->o_rows,
                               .states        = plan->states,
                               .works         = plan->n_works,
                               .split         = plan->n_counters,
                               .shared_leaves = plan->shared_leaves,
                               .cost          = plan->cost};
    for (uint32_t i = 0; i < plan->n_works; i++) {
        info->largest_cost = attn_max(info->largest_cost, plan->works[i].cost);
    }
}
