/*
 * Cut ranges so that all threads finish together. Tasks are taken from one queue, longest
 * first, so the last to finish is late by less than the largest task: ranges above an
 * eighth of a thread's share are cut. Cutting costs states in memory and their merges,
 * which a piece of some hundred tokens does not notice.
 */
#include "balancer/plan_int.h"

#include "base/checked.h"

#include <assert.h>

#define PIECES_PER_THREAD 8u
#define PIECE_TOKENS_MIN 512u

/* Classes of cost for the order: longest first need not be exact. */
#define COST_CLASSES 256u

/* Cost above which a range is cut. */
static uint64_t
cost_limit(const builder_t *b)
{
    uint64_t total = 0, most = 0, least = UINT64_MAX;
    uint64_t heads = b->problem->kv_heads;

    for (uint32_t i = 0; i < b->ranges.n; i++) {
        uint64_t cost = b->ranges.at[i].work.cost;
        total += cost;
        most  = attn_max(most, cost);
        least = attn_min(least, cost);
    }
    if (b->parallelism == 1 || (most == least && b->ranges.n * heads % b->parallelism == 0)) {
        return UINT64_MAX; /* they come out even as they are */
    }
    return attn_max(1, total * heads / ((uint64_t)b->parallelism * PIECES_PER_THREAD));
}

/*
 * Push the leaves [leaf, end) of a span, a whole subtree at a time: what lies inside one merges
 * before anything after it is pushed, and nothing before it reaches in, so a fold that sees only
 * its first key ends with the same states.
 */
static void
fold_span(attn_fold_t *fold, const attn_walk_t *walk, uint32_t *depth)
{
    const attn_plan_t *plan = walk->plan;
    uint32_t chunk = walk->runs[plan->spans[walk->work->span_first + walk->span].run].chunk;
    uint64_t first = attn_leaf_key(walk->entry, chunk, 0);

    for (uint32_t leaf = walk->leaf, bits; leaf < walk->leaf_end; leaf += 1u << bits) {
        uint32_t room  = 31 - (uint32_t)__builtin_clz(walk->leaf_end - leaf);
        uint64_t key   = first | leaf;
        uint32_t level = attn_fold_level(fold, key);

        bits = leaf == 0 ? room : (uint32_t)attn_min(room, (uint32_t)__builtin_ctz(leaf));
        while (attn_fold_pops(fold, level)) {
        }
        attn_fold_push(fold, key);
        /* Leaf by leaf, the subtree takes a state a level. */
        *depth = fold->n + bits > *depth ? fold->n + bits : *depth;
    }
}

/* Give a work its states: their keys are what a fold leaves. */
static void
number_states(builder_t *b, attn_work_t *work)
{
    attn_fold_t fold;
    attn_walk_t walk;
    uint32_t depth = 1;

    b->plan->spans   = b->spans.at; /* for the walk */
    b->plan->members = b->members.at;
    attn_fold_init(&fold, work->left_level);
    attn_walk_init(&walk, b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        fold_span(&fold, &walk, &depth);
    }
    while (attn_fold_pops(&fold, work->right_level)) {
    }
    assert(fold.n > 0);
    work->key_first = b->keys.n;
    work->n_out     = fold.n;
    work->slot      = b->plan->slots;
    b->plan->slots += (uint64_t)b->problem->kv_heads * fold.n * work->rows;
    for (uint32_t i = 0; i < fold.n; i++) {
        PUSH(b, b->keys, fold.keys[i]);
    }
    b->plan->max_depth = depth > b->plan->max_depth ? depth : b->plan->max_depth;
}

/* Leaves that a range's rows see. */
static uint64_t
count_leaves(builder_t *b, const attn_work_t *work)
{
    attn_walk_t walk;
    uint64_t n = 0;

    attn_walk_init(&walk, b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        n += walk.leaf < walk.leaf_end ? walk.leaf_end - walk.leaf : 0;
    }
    return n;
}

/* A leaf of a work's span, and its key. */
typedef struct place {
    uint32_t span, leaf;
    uint64_t key;
} place_t;

/* One piece: the leaves from one place of a range to another. */
static void
add_piece(builder_t *b, const attn_work_t *whole, const place_t *from, const place_t *to,
          uint32_t left, uint32_t right, uint64_t n, uint64_t of)
{
    attn_work_t piece = *whole;

    piece.span_first  = whole->span_first + from->span;
    piece.n_spans     = to->span - from->span + 1;
    piece.leaf_first  = from->leaf;
    piece.leaf_end    = to->leaf + 1;
    piece.left_level  = left;
    piece.right_level = right;
    piece.cost        = whole->cost * n / of;
    PUSH(b, b->works, piece);
}

/* Cut into pieces of about equal numbers of leaves. */
static void
add_pieces(builder_t *b, const attn_work_t *work, uint64_t leaves, uint64_t pieces)
{
    attn_walk_t walk;
    place_t from = {0}, last = {0};
    uint64_t seen = 0, begun = 0, piece = 1;
    uint32_t left = work->left_level;

    attn_walk_init(&walk, b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        const attn_span_t *span = &b->plan->spans[work->span_first + walk.span];
        uint64_t first          = attn_leaf_key(walk.entry, walk.runs[span->run].chunk, 0);
        while (walk.leaf < walk.leaf_end) {
            uint64_t cut  = leaves * piece / pieces; /* leaves before the next piece */
            place_t place = {.span = walk.span, .leaf = walk.leaf, .key = first | walk.leaf};
            if (seen == cut) {
                uint32_t level = attn_key_lca(last.key, place.key);
                add_piece(b, work, &from, &last, left, level, seen - begun, leaves);
                left  = level;
                begun = seen;
                cut   = leaves * ++piece / pieces;
            }
            from       = seen == begun ? place : from;
            uint64_t n = attn_min(walk.leaf_end - walk.leaf, cut - seen);
            walk.leaf += (uint32_t)n;
            seen += n;
            last =
                (place_t){.span = walk.span, .leaf = walk.leaf - 1, .key = first | (walk.leaf - 1)};
        }
    }
    add_piece(b, work, &from, &last, left, work->right_level, seen - begun, leaves);
}

static void
cut_range(builder_t *b, range_t *range, uint64_t limit)
{
    const attn_work_t *work = &range->work;
    uint64_t pieces = 1, leaves = 0;

    range->piece_first = b->works.n;
    if (work->cost > limit) {
        uint64_t tokens = work->cost / plan_token_cost(work->rows);
        leaves          = count_leaves(b, work);
        pieces          = attn_min(attn_div_up(work->cost, limit), tokens / PIECE_TOKENS_MIN);
    }
    if (pieces <= 1) {
        PUSH(b, b->works, *work);
    } else {
        add_pieces(b, work, leaves, pieces);
    }
    range->n_pieces = b->works.n - range->piece_first;
}

/* The parts of reductions in terms of works; those of one whole work have none to wait for. */
static void
link_parts(builder_t *b)
{
    attn_plan_t *plan = b->plan;

    for (uint32_t i = 0; i < b->reductions.n && !b->no_memory; i++) {
        attn_reduction_t *reduction = &b->reductions.at[i];
        uint32_t first              = b->parts.n;
        for (uint32_t r = 0; r < reduction->n_parts; r++) {
            const range_ref_t *ref = &b->refs.at[reduction->part_first + r];
            const range_t *range   = &b->ranges.at[ref->range];
            for (uint32_t p = 0; p < range->n_pieces; p++) {
                PUSH(b, b->parts,
                     (attn_part_t){.work = range->piece_first + p, .row_first = ref->row_first});
            }
        }
        reduction->part_first = first;
        reduction->n_parts    = b->parts.n - first;
        if (b->no_memory) {
            return;
        }
        if (reduction->n_parts > 1 || b->works.at[b->parts.at[first].work].n_members > 1) {
            reduction->counter = plan->n_counters++;
            for (uint32_t p = first; p < b->parts.n; p++) {
                b->works.at[b->parts.at[p].work].n_out = 1; /* to be counted */
            }
        }
    }
}

/* Longest first, by class of cost. */
static void
order_works(builder_t *b)
{
    attn_plan_t *plan             = b->plan;
    uint64_t most                 = 1;
    uint32_t at[COST_CLASSES + 1] = {0};

    plan->order = malloc((b->works.n + 1) * sizeof(*plan->order));
    if (plan->order == NULL) {
        b->no_memory = true;
        return;
    }
    for (uint32_t i = 0; i < b->works.n; i++) {
        most = attn_max(most, b->works.at[i].cost);
    }
#define CLASS_OF(work) (COST_CLASSES - 1 - (uint32_t)((work)->cost * (COST_CLASSES - 1) / most))
    for (uint32_t i = 0; i < b->works.n; i++) {
        at[CLASS_OF(&b->works.at[i]) + 1]++;
    }
    for (uint32_t c = 0; c < COST_CLASSES; c++) {
        at[c + 1] += at[c];
    }
    for (uint32_t i = 0; i < b->works.n; i++) {
        plan->order[at[CLASS_OF(&b->works.at[i])]++] = i;
    }
#undef CLASS_OF
}

void
plan_cut(builder_t *b)
{
    attn_plan_t *plan = b->plan;
    uint64_t limit    = cost_limit(b);

    plan->spans   = b->spans.at;
    plan->members = b->members.at;
    for (uint32_t i = 0; i < b->ranges.n && !b->no_memory; i++) {
        cut_range(b, &b->ranges.at[i], limit);
    }
    if (!b->no_memory) {
        link_parts(b);
    }
    for (uint32_t i = 0; i < b->works.n && !b->no_memory; i++) {
        attn_work_t *work = &b->works.at[i];
        plan->max_rows    = work->rows > plan->max_rows ? work->rows : plan->max_rows;
        plan->cost += work->cost;
        if (work->n_out > 0) {
            number_states(b, work);
        }
    }
    if (!b->no_memory) {
        order_works(b);
    }
}
