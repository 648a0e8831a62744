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

/* Cost above which a range is cut, or UINT64_MAX if none is. */
static uint64_t
cost_limit(const builder_t *b)
{
    uint64_t total = 0, most = 0, least = UINT64_MAX;
    uint64_t heads = b->problem->kv_heads;

    for (uint32_t i = 0; i < b->ranges.n; i++) {
        uint64_t cost = b->ranges.at[i].cost;
        total += cost;
        most  = attn_max(most, cost);
        least = attn_min(least, cost);
    }
    if (b->parallelism == 1 || (most == least && b->ranges.n * heads % b->parallelism == 0)) {
        return UINT64_MAX; /* they come out even as they are */
    }
    uint64_t limit = attn_max(1, total * heads / ((uint64_t)b->parallelism * PIECES_PER_THREAD));
    return most > limit ? limit : UINT64_MAX;
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

    attn_fold_init(&fold, work->left_level);
    attn_walk_init(&walk, &b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        fold_span(&fold, &walk, &depth);
    }
    while (attn_fold_pops(&fold, work->right_level)) {
    }
    assert(fold.n > 0);
    work->key_first = b->keys.n;
    work->n_out     = fold.n;
    work->slot      = b->plan.slots;
    b->plan.slots += (uint64_t)b->problem->kv_heads * fold.n * work->rows;
    for (uint32_t i = 0; i < fold.n; i++) {
        PUSH(b, b->keys, fold.keys[i]);
    }
    b->plan.max_depth = depth > b->plan.max_depth ? depth : b->plan.max_depth;
}

/* Leaves that a range's rows see. */
static uint64_t
count_leaves(builder_t *b, const attn_work_t *work)
{
    attn_walk_t walk;
    uint64_t n = 0;

    attn_walk_init(&walk, &b->plan, work);
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

    attn_walk_init(&walk, &b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        const attn_span_t *span = &b->plan.spans[work->span_first + walk.span];
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
cut_range(builder_t *b, const attn_work_t *work, uint64_t limit)
{
    uint64_t pieces = 1, leaves = 0;

    if (work->cost > limit) {
        uint64_t tokens = work->cost / plan_token_cost(work->rows);
        leaves          = count_leaves(b, work);
        pieces          = attn_min(attn_div_up(work->cost, limit), tokens / PIECE_TOKENS_MIN);
        pieces          = attn_min(pieces, leaves); /* which may have more tokens */
    }
    if (pieces <= 1) {
        PUSH(b, b->works, *work);
    } else {
        add_pieces(b, work, leaves, pieces);
    }
}

/* The parts of reductions in terms of works, in place of those in terms of ranges. */
static void
link_pieces(builder_t *b)
{
    for (uint32_t i = 0; i < b->reductions.n && !b->no_memory; i++) {
        attn_reduction_t *reduction = &b->reductions.at[i];
        uint32_t first              = b->parts.n;
        for (uint32_t r = 0; r < reduction->n_parts; r++) {
            attn_part_t ref = b->refs.at[reduction->part_first + r];
            uint32_t end    = b->piece_first.at[ref.work + 1];
            for (uint32_t work = b->piece_first.at[ref.work]; work < end; work++) {
                PUSH(b, b->parts, (attn_part_t){.work = work, .row_first = ref.row_first});
            }
        }
        reduction->part_first = first;
        reduction->n_parts    = b->parts.n - first;
    }
}

/* Ranges to works. */
static void
cut_ranges(builder_t *b, uint64_t limit)
{
    if (!RESERVE(b, b->piece_first, b->ranges.n + 1)) {
        return;
    }
    for (uint32_t i = 0; i < b->ranges.n && !b->no_memory; i++) {
        b->piece_first.at[i] = b->works.n;
        cut_range(b, &b->ranges.at[i], limit);
    }
    b->piece_first.at[b->ranges.n] = b->works.n;
    link_pieces(b);
}

/* All ranges are works as they are. */
static void
keep_ranges(builder_t *b)
{
    attn_work_t *works  = b->works.at;
    attn_part_t *parts  = b->parts.at;
    uint32_t works_room = b->works.room, parts_room = b->parts.room;

    b->works.at    = b->ranges.at;
    b->works.n     = b->ranges.n;
    b->works.room  = b->ranges.room;
    b->ranges.at   = works;
    b->ranges.n    = 0;
    b->ranges.room = works_room;
    b->parts.at    = b->refs.at;
    b->parts.n     = b->refs.n;
    b->parts.room  = b->refs.room;
    b->refs.at     = parts;
    b->refs.n      = 0;
    b->refs.room   = parts_room;
}

/* Reductions of one whole work have nothing to wait for; the works of others leave states. */
static void
count_parts(builder_t *b)
{
    for (uint32_t i = 0; i < b->reductions.n; i++) {
        attn_reduction_t *reduction = &b->reductions.at[i];
        const attn_part_t *parts    = &b->parts.at[reduction->part_first];
        if (reduction->n_parts == 1 && b->works.at[parts[0].work].n_members == 1) {
            continue;
        }
        reduction->counter = b->plan.n_counters++;
        for (uint32_t p = 0; p < reduction->n_parts; p++) {
            b->works.at[parts[p].work].n_out = 1; /* to be counted */
        }
    }
}

static uint32_t
class_of(const attn_work_t *work, uint32_t shift)
{
    return COST_CLASSES - 1 - (uint32_t)(work->cost >> shift);
}

/* Longest first, by class of cost; a cost of `most` is in the first or second half of them. */
static void
order_works(builder_t *b, uint64_t most)
{
    uint32_t at[COST_CLASSES + 1] = {0}, shift = 0;

    if (!RESERVE(b, b->order, b->works.n)) {
        return;
    }
    while (most >> shift >= COST_CLASSES) {
        shift++;
    }
    for (uint32_t i = 0; i < b->works.n; i++) {
        at[class_of(&b->works.at[i], shift) + 1]++;
    }
    for (uint32_t c = 0; c < COST_CLASSES; c++) {
        at[c + 1] += at[c];
    }
    for (uint32_t i = 0; i < b->works.n; i++) {
        b->order.at[at[class_of(&b->works.at[i], shift)]++] = i;
    }
}

void
plan_cut(builder_t *b)
{
    uint64_t limit = cost_limit(b), most = 0;

    b->plan.spans   = b->spans.at; /* for walks */
    b->plan.members = b->members.at;
    b->plan.entries = b->entries.at;
    if (limit == UINT64_MAX) {
        keep_ranges(b);
    } else {
        cut_ranges(b, limit);
    }
    if (b->no_memory) {
        return;
    }
    count_parts(b);
    for (uint32_t i = 0; i < b->works.n && !b->no_memory; i++) {
        attn_work_t *work = &b->works.at[i];
        b->plan.max_rows  = work->rows > b->plan.max_rows ? work->rows : b->plan.max_rows;
        b->plan.cost += work->cost;
        most = attn_max(most, work->cost);
        if (work->n_out > 0) {
            number_states(b, work);
        }
    }
    if (!b->no_memory) {
        order_works(b, most);
    }
}
