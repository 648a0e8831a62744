/*
 * Works of many rows to tiles, where the device has a kernel for them: whole as far as there are
 * enough of them, for leaves are as long as chunks there, and seldom worth a cut.
 *
 * A head's K and V are read by a tile for every 128 rows of its requests. They are to come from
 * memory once: where all of them are more than the L2 keeps, they are taken in parts that it keeps,
 * and tiles go by parts, first those of the longest requests. Within a part tiles are dealt to CTAs
 * longest first, each to the one with the least to do.
 */
#include "kernels/cuda/image_int.h"

#include "base/checked.h"

#include <stdlib.h>

/* What a tile costs besides its tokens, in tokens: Q, the answer, the first products. */
#define TILE_COST 288u

/* Bytes of a part: an L2 of 50 MB keeps twice what SMs of both its halves read. */
#define PART_BYTES (UINT64_C(20) << 20)
#define LAST_ROUNDS UINT64_C(3)

/* Tokens of leaf i of a work that some row sees, in whole tiles of K and V: that is what they cost.
 */
static uint64_t
tokens_seen(const builder_t *b, uint32_t w, uint32_t i)
{
    const uint32_t n           = CUDA_MANY_TOKENS(b->plan->problem.head_dim_v);
    const attn_work_t *planned = &b->plan->works[w];
    const extent_t *extent     = image_extent(b, &b->works.at[w], 0);
    const cuda_leaf_t *leaf    = &b->leaves.at[extent->leaf_first + i];
    int64_t from = leaf->position > planned->see_first ? leaf->position : planned->see_first;
    int64_t to   = (int64_t)leaf->position + leaf->tokens;

    to = to < planned->see_end ? to : planned->see_end;
    return to > from ? attn_div_up((uint64_t)(to - leaf->position), n) * n -
                           (uint64_t)(from - leaf->position) / n * n
                     : 0;
}

/* The part that a head of a work reads. */
static uint32_t
part_of(const builder_t *b, uint32_t w, uint32_t head)
{
    return b->parts.at[(uint64_t)b->works.at[w].sequence * b->plan->problem.kv_heads + head];
}

/* Leaves [from, end) of a head of a work. */
static void
add_tile(builder_t *b, uint32_t w, uint32_t head, const place_t *from, uint32_t end)
{
    const attn_work_t *planned = &b->plan->works[w];
    const work_t *work         = &b->works.at[w];
    cuda_piece_t p             = image_make_piece(b, &b->cuts[CUDA_MANY], w, head, from, end);
    many_t many                = {.cost = TILE_COST, .part = part_of(b, w, head)};

    many.tile = (cuda_tile_t){.next        = CUDA_NONE,
                              .kv_head     = p.kv_head,
                              .leaf_first  = p.leaf_first,
                              .n_leaves    = p.n_leaves,
                              .levels      = p.levels,
                              .slot        = p.slot,
                              .states      = p.states,
                              .query_first = p.query_first,
                              .rows        = p.rows,
                              .head_first  = p.head_first,
                              .n_heads     = p.n_heads,
                              .present_at  = work->present_at,
                              .n_lists     = work->n_lists,
                              .see_first   = (int32_t)planned->see_first,
                              .see_end     = (int32_t)planned->see_end,
                              .position    = b->queries.at[p.query_first].position};
    if (work->present_at != CUDA_NONE) {
        many.tile.present_at += from->at * work->sets * work->n_lists;
    }
    for (uint32_t i = from->at; i < end; i++) {
        many.cost += tokens_seen(b, w, i);
    }
    if (from->at < end) {
        many.tile.leaf = b->leaves.at[p.leaf_first];
    }
    PUSH(b, b->many, many);
}

/* A head of a work: whole, or, if it alone is more than a CTA's share, in runs of leaves. */
static void
cut_head(builder_t *b, uint32_t w, uint32_t head, uint64_t share)
{
    const work_t *work = &b->works.at[w];
    const uint32_t n   = image_extent(b, work, head)->n_leaves;
    place_t place      = image_begin(b, work);
    uint64_t cost      = 0;

    b->units.at[work->unit_first + head] = (unit_t){.left_first = (uint32_t)b->left.n};
    for (uint32_t i = 0; i < n && !b->no_memory; i++) {
        uint64_t more = tokens_seen(b, w, i);
        if (cost > 0 && cost + more > share) {
            add_tile(b, w, head, &place, i);
            image_move(&place, i, n);
            cost = 0;
        }
        cost += more;
    }
    add_tile(b, w, head, &place, n);
}

static int
by_part_and_cost(const void *a, const void *b)
{
    const many_t *x = a, *y = b;

    if (x->part != y->part) {
        return x->part < y->part ? -1 : 1;
    }
    if (x->cost != y->cost) {
        return x->cost < y->cost ? 1 : -1;
    }
    if (x->tile.query_first != y->tile.query_first) {
        return x->tile.query_first < y->tile.query_first ? -1 : 1;
    }
    return x->tile.kv_head < y->tile.kv_head ? -1 : x->tile.kv_head > y->tile.kv_head;
}

/* The CTA on top has got more to do: down in the heap. */
static void
sink_top(load_t *heap, uint32_t n)
{
    load_t top  = heap[0];
    uint32_t at = 0;

    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && heap[child + 1].cost < heap[child].cost;
        if (heap[child].cost >= top.cost) {
            break;
        }
        heap[at] = heap[child];
    }
    heap[at] = top;
}

/* Part by part, longest first, each to the CTA with the least to do; the first of CTA i is tile i,
 * one with nothing to do where a steady image has more CTAs than tiles. */
static void
deal(builder_t *b, uint32_t ctas)
{
    uint32_t n = (uint32_t)b->many.n, grid = b->steady ? ctas : (uint32_t)attn_min(ctas, n);

    if (n == 0 || !RESERVE(b, b->loads, grid) || !RESERVE(b, b->tiles, attn_max(n, grid))) {
        return;
    }
    load_t *heap = b->loads.at;
    qsort(b->many.at, n, sizeof(*b->many.at), by_part_and_cost);
    for (uint32_t i = 0; i < n; i++) {
        b->tiles.at[b->tiles.n++] = b->many.at[i].tile;
        if (i < grid) { /* from the end: the first of them has the most to do */
            heap[grid - 1 - i] = (load_t){b->many.at[i].cost, i};
        } else {
            b->tiles.at[heap[0].last].next = i;
            heap[0].last                   = i;
            heap[0].cost += b->many.at[i].cost;
            sink_top(heap, grid);
        }
    }
    while (b->tiles.n < grid) {
        b->tiles.at[b->tiles.n++] = (cuda_tile_t){.next = CUDA_NONE, .kv_head = CUDA_NONE};
    }
    b->image->many_grid = grid;
}

static int
by_tokens(const void *a, const void *b)
{
    const sequence_t *x = a, *y = b;

    if (x->tokens != y->tokens) {
        return x->tokens < y->tokens ? 1 : -1;
    }
    return x->number < y->number ? -1 : x->number > y->number;
}

/* Says of a work, that of so many tokens, which sequence it is of: that of the one before it, if
 * both begin with the same leaf. */
static void
note_sequence(builder_t *b, work_t *work, uint64_t tokens)
{
    const extent_t *extent = image_extent(b, work, 0);
    uint32_t page          = extent->n_leaves > 0 ? b->leaves.at[extent->leaf_first].page : 0;
    uint32_t n             = (uint32_t)b->sequences.n;

    if (n == 0 || b->sequences.at[n - 1].page != page) {
        PUSH(b, b->sequences, (sequence_t){.page = page, .number = n});
    }
    if (!b->no_memory) {
        sequence_t *of = &b->sequences.at[b->sequences.n - 1];
        of->tokens     = attn_max(of->tokens, tokens);
        of->all += tokens;
        work->sequence = of->number;
    }
}

/*
 * Heads of sequences to parts, those of the longest sequence first. The last part is so large that
 * its longest tiles, with which it begins, do not end after all others: with LAST_ROUNDS rounds of
 * them. total: tokens that all works read, of all heads.
 */
static void
make_parts(builder_t *b, uint32_t ctas, uint64_t total)
{
    const attn_problem_t *problem = &b->plan->problem;
    uint64_t n = b->sequences.n * problem->kv_heads, bytes = 0;
    uint32_t part = 0;

    if (n == 0 || b->no_memory || !RESERVE(b, b->parts, n)) {
        return;
    }
    b->parts.n = n;
    qsort(b->sequences.at, b->sequences.n, sizeof(*b->sequences.at), by_tokens);
    for (uint64_t i = 0; i < n; i++) {
        const sequence_t *of = &b->sequences.at[i / problem->kv_heads];
        uint64_t more        = of->tokens * (problem->head_dim_k + problem->head_dim_v) * 2;
        if (bytes > 0 && bytes + more > PART_BYTES && total >= LAST_ROUNDS * ctas * of->tokens) {
            part++;
            bytes = 0;
        }
        bytes += more;
        total -= of->all;
        b->parts.at[(uint64_t)of->number * problem->kv_heads + i % problem->kv_heads] = part;
    }
}

void
image_deal_tiles(builder_t *b, uint32_t ctas)
{
    uint32_t heads = b->plan->problem.kv_heads;
    uint64_t total = 0;
    cut_t *cut     = &b->cuts[CUDA_MANY];

    *cut = (cut_t){.blocks = 1, .heads = heads};
    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        work_t *work = &b->works.at[w];
        if (work->class != CUDA_MANY) {
            continue;
        }
        if (!RESERVE(b, b->units, heads)) {
            return;
        }
        work->unit_first = (uint32_t)b->units.n;
        b->units.n += heads;
        uint64_t tokens = 0;
        for (uint32_t i = 0; i < image_extent(b, work, 0)->n_leaves; i++) {
            tokens += tokens_seen(b, w, i);
        }
        total += tokens * heads;
        note_sequence(b, work, tokens);
    }
    make_parts(b, ctas, total);
    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        for (uint32_t h = 0; b->works.at[w].class == CUDA_MANY && h < heads && !b->no_memory; h++) {
            cut_head(b, w, h, attn_div_up(total, ctas));
        }
    }
    b->image->slots += cut->slots;
    deal(b, ctas);
}
