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
plan_room(builder_t *b, void *at, uint32_t *room, size_t size)
{
    uint32_t wanted = *room == 0 ? b->problem->n + 16 : *room * 2;
    void *grown     = realloc(at, wanted * size);
    if (grown == NULL) {
        b->no_memory = true;
        return at;
    }
    *room = wanted;
    return grown;
}

/* ---- entries ---- */

static void
number_entries(builder_t *b)
{
    attn_plan_t *plan       = b->plan;
    const attn_problem_t *p = b->problem;

    for (uint32_t i = 0; i < p->n; i++) {
        const attn_problem_entry_t *entry = &p->entries[i];
        bool few                          = (uint64_t)entry->n_q * plan->group <= ATTN_FEW_ROWS;
        uint32_t leaf                     = few ? plan->few : plan->many;
        leaf                              = leaf < p->chunk_size ? leaf : p->chunk_size;

        plan->entries[i] =
            (attn_plan_entry_t){.few         = few,
                                .leaf_tokens = leaf,
                                .leaf_bits   = (uint32_t)__builtin_ctz(p->chunk_size / leaf),
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

/* Tokens that the tile sees in spans [first, end). */
static uint64_t
tokens_seen(const builder_t *b, const tile_t *tile, uint32_t first, uint32_t end, int64_t see_first,
            int64_t see_end)
{
    const attn_problem_entry_t *entry = &b->problem->entries[tile->entry];
    int64_t leaf                      = b->plan->entries[tile->entry].leaf_tokens;
    uint64_t tokens                   = 0;

    for (uint32_t i = first; i < end; i++) {
        const attn_span_t *span = &b->spans.at[i];
        int64_t start           = (int64_t)entry->runs[span->run].chunk * b->problem->chunk_size;
        int64_t from = start + span->leaf_first * leaf, to = start + span->leaf_end * leaf;
        from = from > see_first ? from : see_first;
        to   = to < see_end ? to : see_end;
        tokens += to > from ? (uint64_t)(to - from) : 0;
    }
    return tokens;
}

/* A stretch of own spans of a tile: one range, and its part in the reduction. */
static void
add_own_range(builder_t *b, const tile_t *tile, uint32_t first, uint32_t end, uint32_t left,
              uint32_t right)
{
    attn_work_t work = {.member_first = b->members.n,
                        .n_members    = 1,
                        .rows         = tile->n_q * tile->n_heads,
                        .q_first      = tile->q_first,
                        .n_q          = tile->n_q,
                        .head_first   = tile->head_first,
                        .n_heads      = tile->n_heads,
                        .span_first   = first,
                        .n_spans      = end - first,
                        .leaf_first   = first < end ? b->spans.at[first].leaf_first : 0,
                        .leaf_end     = first < end ? b->spans.at[end - 1].leaf_end : 0,
                        .left_level   = left,
                        .right_level  = right};

    plan_see(b->problem, &b->problem->entries[tile->entry], tile->q_first, tile->n_q,
             &work.see_first, &work.see_end);
    work.cost =
        tokens_seen(b, tile, first, end, work.see_first, work.see_end) * plan_token_cost(work.rows);
    PUSH(b, b->members, (attn_member_t){.entry = tile->entry, .reduction = b->reductions.n - 1});
    PUSH(b, b->refs, (range_ref_t){.range = b->ranges.n});
    PUSH(b, b->ranges, (range_t){.work = work});
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
    const attn_work_t *work = &b->ranges.at[link->range].work;
    for (uint32_t m = work->member_first; m < work->member_first + work->n_members; m++) {
        if (b->members.at[m].entry == entry) {
            b->members.at[m].reduction = b->reductions.n - 1;
            PUSH(b, b->refs,
                 (range_ref_t){.range = link->range, .row_first = b->members.at[m].row_first});
            return;
        }
    }
    assert(false);
}

/* One (entry, node, tile): its parts, over spans [first, end), ascending in key. */
static void
add_reduction(builder_t *b, const tile_t *tile, uint32_t node, uint32_t first, uint32_t end,
              uint32_t *at_set)
{
    uint32_t refs = b->refs.n;

    PUSH(b, b->reductions,
         (attn_reduction_t){.entry      = tile->entry,
                            .node       = node,
                            .q_first    = tile->q_first,
                            .n_q        = tile->n_q,
                            .head_first = tile->head_first,
                            .n_heads    = tile->n_heads,
                            .part_first = refs});
    if (first == end) {
        add_own_range(b, tile, first, end, ATTN_LEVEL_NONE, ATTN_LEVEL_NONE);
    }
    for (uint32_t i = first; i < end && !b->no_memory;) {
        uint32_t set = b->spans.at[i].set, from = i++;
        if (set != SET_NONE) {
            add_shared_ref(b, tile->entry, set, at_set[set]++);
            continue;
        }
        while (i < end && b->spans.at[i].set == SET_NONE) {
            i++;
        }
        const attn_span_t *span = &b->spans.at[from], *last = &b->spans.at[i - 1];
        uint32_t left  = from > first ? attn_key_lca(plan_last_key(b, tile->entry, span - 1),
                                                     plan_first_key(b, tile->entry, span))
                                      : ATTN_LEVEL_NONE;
        uint32_t right = i < end ? attn_key_lca(plan_last_key(b, tile->entry, last),
                                                plan_first_key(b, tile->entry, last + 1))
                                 : ATTN_LEVEL_NONE;
        add_own_range(b, tile, from, i, left, right);
    }
    if (!b->no_memory) {
        b->reductions.at[b->reductions.n - 1].n_parts = b->refs.n - refs;
    }
}

/* All nodes of an entry for one tile: spans ascend in key, as nodes do. */
static void
add_tile(builder_t *b, const tile_t *tile, uint32_t *at_set)
{
    const attn_problem_entry_t *entry = &b->problem->entries[tile->entry];
    uint32_t nodes                    = entry->n_nodes == 0 ? 1 : entry->n_nodes;
    uint32_t first = b->span_first[tile->entry], end = b->span_first[tile->entry + 1];

    for (uint32_t node = 0; node < nodes && !b->no_memory; node++) {
        uint32_t stop = end;
        if (nodes > 1) {
            for (stop = first; stop < end; stop++) {
                uint32_t chunk = entry->runs[b->spans.at[stop].run].chunk;
                if (plan_node_of(entry, attn_tree_key(chunk)) != node) {
                    break;
                }
            }
        }
        add_reduction(b, tile, node, first, stop, at_set);
        first = stop;
    }
    for (uint32_t i = b->span_first[tile->entry]; i < end; i++) {
        if (b->spans.at[i].set != SET_NONE) {
            at_set[b->spans.at[i].set] = 0;
        }
    }
}

/* Tiles of about equal size, none above a work's rows. */
static void
add_reductions(builder_t *b)
{
    uint32_t group   = b->plan->group;
    uint32_t heads   = group < ATTN_WORK_ROWS ? group : ATTN_WORK_ROWS;
    uint32_t most    = ATTN_WORK_ROWS / heads; /* queries */
    uint32_t *at_set = calloc(b->sets.n + 1, sizeof(*at_set));

    if (at_set == NULL) {
        b->no_memory = true;
        return;
    }
    for (uint32_t e = 0; e < b->problem->n; e++) {
        uint32_t n_q = b->problem->entries[e].n_q;
        uint32_t n = n_q == 0 ? 0 : (n_q + most - 1) / most, q = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t next = (uint32_t)((uint64_t)n_q * (i + 1) / n);
            for (uint32_t h = 0; h < group && !b->no_memory; h += heads) {
                tile_t tile = {.entry      = e,
                               .q_first    = q,
                               .n_q        = next - q,
                               .head_first = h,
                               .n_heads    = group - h < heads ? group - h : heads};
                add_tile(b, &tile, at_set);
            }
            q = next;
        }
    }
    free(at_set);
}

/* ---- the whole ---- */

static bool
scratch_alloc(builder_t *b, uint32_t **order, uint32_t **segments)
{
    uint32_t n = b->problem->n, runs = 0;
    for (uint32_t i = 0; i < n; i++) {
        runs = b->problem->entries[i].n_runs > runs ? b->problem->entries[i].n_runs : runs;
    }
    b->span_first    = malloc((4 * (size_t)n + 1 + 2 * (size_t)runs) * sizeof(uint32_t));
    b->plan->entries = malloc((n + 1) * sizeof(*b->plan->entries));
    if (b->span_first == NULL || b->plan->entries == NULL) {
        return false;
    }
    b->ids           = b->span_first + n + 1;
    b->segment_first = b->ids + n;
    b->segment_last  = b->segment_first + n;
    *order           = b->segment_last + n;
    *segments        = *order + runs;
    memset(b->segment_first, 0, 2 * (size_t)n * sizeof(uint32_t));
    b->span_first[0] = 0;
    return true;
}

static void
build(builder_t *b)
{
    uint32_t *order, *segments;

    if (!scratch_alloc(b, &order, &segments)) {
        b->no_memory = true;
        return;
    }
    number_entries(b);
    plan_find_shared(b);
    plan_add_spans(b, order, segments);
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

attn_status_t
attn_plan_build(const attn_problem_t *problem, uint32_t parallelism, uint32_t few, uint32_t many,
                attn_plan_t **plan_p)
{
    attn_status_t status = plan_check(problem, parallelism, few, many);
    if (status != ATTN_OK) {
        return status;
    }
    attn_plan_t *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a plan of %u entries", problem->n);
    }
    plan->problem  = *problem;
    plan->group    = problem->q_heads / problem->kv_heads;
    plan->few      = few;
    plan->many     = many;
    plan->max_leaf = 1;

    builder_t b = {.problem = problem, .plan = plan, .parallelism = parallelism};
    build(&b);
    plan->spans        = b.spans.at;
    plan->members      = b.members.at;
    plan->works        = b.works.at;
    plan->n_works      = b.works.n;
    plan->reductions   = b.reductions.at;
    plan->n_reductions = b.reductions.n;
    plan->parts        = b.parts.at;
    plan->keys         = b.keys.at;
    free(b.ranges.at);
    free(b.refs.at);
    free(b.segments.at);
    free(b.sets.at);
    free(b.links.at);
    free(b.span_first);
    if (b.no_memory) {
        attn_plan_free(plan);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a plan of %u entries", problem->n);
    }
    *plan_p = plan;
    return ATTN_OK;
}

void
attn_plan_free(attn_plan_t *plan)
{
    if (plan == NULL) {
        return;
    }
    free(plan->entries);
    free(plan->spans);
    free(plan->members);
    free(plan->works);
    free(plan->order);
    free(plan->reductions);
    free(plan->parts);
    free(plan->keys);
    free(plan);
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
