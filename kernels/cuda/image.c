/*
 * A plan becomes tables: leaves with their pages, the queries of each work, pieces (image_cut.c)
 * or tiles (image_tiles.c), and items. The tables of the next plan are made in the memory of these.
 */
#include "kernels/cuda/image_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

static const cuda_class_t classes[CUDA_CLASSES] = {
    {.rows = 8},
    {.rows = 16},
    {.rows = 32},
    {.rows = 64},
};

static uint32_t
class_of(const attn_plan_t *plan, const attn_work_t *work)
{
    uint32_t rows = work->rows;

    if (plan->many != plan->few && !plan->entries[plan->members[work->member_first].entry].few) {
        return CUDA_MANY;
    }
    return rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : 3;
}

void *
image_room(builder_t *b, void *at, uint64_t *room, uint64_t wanted, size_t size)
{
    uint64_t more = attn_max(attn_max(*room * 2, wanted), 64);
    void *grown   = realloc(at, more * size);

    if (grown == NULL) {
        b->no_memory = true;
        return at;
    }
    *room = more;
    return grown;
}

/* ---- leaves ---- */

/* The tokens of 64 of a leaf that a list has or that are dense, as a set of bits. */
static uint64_t
tokens_of_list(const attn_problem_t *problem, const attn_problem_entry_t *entry, uint32_t list,
               const attn_leaf_t *leaf)
{
    uint32_t size = problem->page_size, low = entry->sparse_indptr[list];
    uint32_t stop = entry->sparse_indptr[list + 1], high = stop;
    uint64_t pages = attn_div_up(problem->chunk_size, size);
    uint64_t base = leaf->run->chunk * pages, from = base + leaf->first / size;
    uint64_t bits = 0, all = ~UINT64_C(0) >> (CUDA_LEAF - leaf->tokens);

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (entry->sparse_pages[middle] < from) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < stop; low++) {
        uint64_t first = (entry->sparse_pages[low] - base) * size; /* in the chunk */
        if (entry->sparse_pages[low] >= base + pages || first >= leaf->first + leaf->tokens) {
            break;
        }
        uint64_t begin = attn_max(first, leaf->first) - leaf->first;
        uint64_t end   = attn_min(first + size - leaf->first, leaf->tokens);
        bits |= ~UINT64_C(0) >> (64 - (end - begin)) << begin;
    }
    if ((int64_t)entry->dense_from < leaf->position + leaf->tokens) {
        int64_t dense = (int64_t)entry->dense_from - leaf->position;
        bits |= dense <= 0 ? all : all >> dense << dense;
    }
    return bits & all;
}

uint32_t
image_place_pages(builder_t *b, uint32_t span, const attn_kv_run_t *run)
{
    uint64_t n = attn_div_up(run->length, b->plan->problem.page_size);

    if (b->page_at.at[span] == CUDA_NONE) { /* tiles of an entry have their spans in common */
        b->page_at.at[span] = (uint32_t)b->n_pages;
        PUSH(b, b->lists, (page_list_t){run->pages, n});
        b->n_pages += n;
    }
    return b->page_at.at[span];
}

/* The leaves of a span, which are known to have room. */
static void
add_span_leaves(builder_t *b, const span_t *span, uint32_t tokens, const attn_kv_run_t *run,
                uint32_t table)
{
    const attn_problem_t *problem = &b->plan->problem;
    const uint32_t size = problem->page_size, shift = (uint32_t)__builtin_ctz(size);
    const bool shifts = (size & (size - 1)) == 0;
    cuda_leaf_t *leaf = b->leaves.at + b->leaves.n;
    int64_t start     = (int64_t)run->chunk * problem->chunk_size;

    for (uint32_t i = span->leaf_first; i < span->leaf_end; i++) {
        uint32_t first = i * tokens, page = shifts ? first >> shift : first / size;
        uint32_t rest = run->length - first;
        *leaf++       = (cuda_leaf_t){.page     = table + page,
                                      .position = (int32_t)(start + first),
                                      .tokens   = (uint16_t)(rest < tokens ? rest : tokens),
                                      .offset   = (uint16_t)(first - page * size),
                                      .level    = 1 + (uint32_t)__builtin_ctz(i | 1u << 31)};
    }
    b->leaves.at[b->leaves.n].level = span->level;
    b->leaves.n += span->leaf_end - span->leaf_first;
}

/* The token sets of a span's leaves: of each 64 tokens of a leaf, one of each list. */
static void
add_present(builder_t *b, const attn_problem_entry_t *entry, const span_t *span, uint32_t tokens,
            uint32_t sets, const attn_kv_run_t *run)
{
    const attn_problem_t *problem = &b->plan->problem;

    for (uint64_t i = 0; i < (uint64_t)(span->leaf_end - span->leaf_first) * sets; i++) {
        uint32_t first   = (span->leaf_first + (uint32_t)(i / sets)) * tokens;
        attn_leaf_t part = {.run = run, .first = first + (uint32_t)(i % sets) * CUDA_LEAF};
        uint32_t end     = (uint32_t)attn_min(run->length, first + tokens);
        part.position    = (int64_t)run->chunk * problem->chunk_size + part.first;
        part.tokens      = part.first < end ? (uint32_t)attn_min(end - part.first, CUDA_LEAF) : 0;
        for (uint32_t list = 0; list < entry->n_lists; list++) {
            PUSH(b, b->present, part.tokens == 0 ? 0 : tokens_of_list(problem, entry, list, &part));
        }
    }
}

/* All leaves that a work sees. */
static void
add_leaves(builder_t *b, const attn_work_t *work, work_t *to, extent_t *extent)
{
    const attn_member_t *member       = &b->plan->members[work->member_first];
    const attn_problem_entry_t *entry = &b->plan->problem.entries[member->entry];
    const uint32_t tokens             = b->plan->entries[member->entry].leaf_tokens;
    attn_walk_t walk;

    extent->leaf_first = (uint32_t)b->leaves.n;
    attn_walk_init(&walk, b->plan, work);
    for (; walk.span < work->n_spans; walk.span++) {
        attn_walk_span(&walk);
        uint32_t index           = work->span_first + walk.span;
        const attn_kv_run_t *run = &entry->runs[b->plan->spans[index].run];
        if (walk.leaf >= walk.leaf_end || !RESERVE(b, b->leaves, walk.leaf_end - walk.leaf)) {
            continue;
        }
        uint64_t key   = attn_leaf_key(walk.entry, run->chunk, 0);
        uint32_t level = extent->n_leaves == 0 ? ATTN_LEVEL_NONE
                                               : attn_key_lca(extent->last_key, key | walk.leaf);
        span_t span    = {.key        = key,
                          .leaf_first = walk.leaf,
                          .leaf_end   = walk.leaf_end,
                          .at         = extent->n_leaves,
                          .level      = level};
        add_span_leaves(b, &span, tokens, run, image_place_pages(b, index, run));
        if (entry->n_lists > 0) {
            add_present(b, entry, &span, tokens, to->sets, run);
        }
        PUSH(b, b->spans, span);
        extent->first_key = extent->n_leaves == 0 ? key | walk.leaf : extent->first_key;
        extent->n_leaves += walk.leaf_end - walk.leaf;
        extent->last_key = key | (walk.leaf_end - 1);
    }
}

/* What a work reads: its leaves, with token sets beside them where it has lists and many rows; or
 * of each list what it leaves of them. */
static void
add_extents(builder_t *b, const attn_work_t *work, work_t *to)
{
    const attn_member_t *member = &b->plan->members[work->member_first];
    const uint32_t lists        = b->plan->problem.entries[member->entry].n_lists;

    to->n_lists      = lists;
    to->listed       = lists > 0 && to->class != CUDA_MANY;
    to->n_extents    = to->listed ? lists : 1;
    to->extent_first = (uint32_t)b->extents.n;
    to->span_first   = (uint32_t)b->spans.n;
    to->present_at   = lists > 0 && !to->listed ? (uint32_t)b->present.n : CUDA_NONE;
    to->sets         = b->image->leaf_sets;
    for (uint32_t i = 0; i < to->n_extents; i++) {
        extent_t extent = {0};
        if (to->listed) {
            image_add_blocks(b, work, i, &extent);
        } else {
            add_leaves(b, work, to, &extent);
        }
        PUSH(b, b->extents, extent);
    }
}

/* ---- queries ---- */

static void
add_queries(builder_t *b, const attn_work_t *work, work_t *to)
{
    const attn_plan_t *plan = b->plan;

    to->query_first = (uint32_t)b->queries.n;
    for (uint32_t m = 0; m < work->n_members; m++) {
        const attn_member_t *member       = &plan->members[work->member_first + m];
        const attn_problem_entry_t *entry = &plan->problem.entries[member->entry];
        const attn_plan_entry_t *planned  = &plan->entries[member->entry];
        uint32_t n_q                      = work->n_members == 1 ? work->n_q : entry->n_q;
        uint32_t node                     = plan->reductions[member->reduction].node;
        for (uint32_t i = 0; i < n_q; i++) {
            uint32_t at    = work->q_first + i;
            cuda_query_t q = {.q_row    = (uint32_t)(planned->q_row + at),
                              .answer   = (uint32_t)(planned->o_row + at),
                              .position = (int32_t)((int64_t)entry->kv_length - entry->n_q + at),
                              .mask     = CUDA_NONE,
                              .entry    = member->entry,
                              .query    = at};
            if (entry->n_nodes > 0) {
                q.answer = (uint32_t)(planned->state / plan->problem.q_heads +
                                      (uint64_t)node * entry->n_q + at);
            }
            if (entry->mask != NULL) {
                const uint8_t *row = entry->mask + at * attn_mask_row_bytes(entry->mask_tokens);
                q.mask             = b->mask_at.at[member->entry] +
                         (uint32_t)(at * attn_mask_row_bytes(entry->mask_tokens));
                q.mask_base   = (int32_t)((int64_t)entry->kv_length - entry->mask_tokens);
                q.mask_tokens = entry->mask_tokens;
                q.position    = q.mask_base - 1 + (int32_t)attn_mask_count(row, entry->mask_tokens);
            }
            PUSH(b, b->queries, q);
        }
    }
}

static void
add_masks(builder_t *b)
{
    for (uint32_t i = 0; i < b->plan->problem.n; i++) {
        const attn_problem_entry_t *entry = &b->plan->problem.entries[i];
        b->mask_at.at[i]                  = (uint32_t)b->masks.n;
        if (entry->mask == NULL) {
            continue;
        }
        uint64_t bytes   = entry->n_q * attn_mask_row_bytes(entry->mask_tokens);
        b->image->masked = true;
        if (RESERVE(b, b->masks, bytes)) {
            memcpy(b->masks.at + b->masks.n, entry->mask, bytes);
            b->masks.n += bytes;
        }
    }
}

/* ---- items ---- */

/* The states of all parts of a reduction for one head, in the order of the tree. */
static void
add_refs(builder_t *b, const attn_reduction_t *reduction, uint32_t head, cuda_item_t *item)
{
    uint64_t last = 0;

    for (uint32_t p = 0; p < reduction->n_parts; p++) {
        const attn_part_t *part = &b->plan->parts[reduction->part_first + p];
        const work_t *work      = &b->works.at[part->work];
        const cut_t *cut        = &b->cuts[work->class];
        const extent_t *extent  = image_extent(b, work, head);
        const unit_t *unit      = &b->units.at[work->unit_first + head % cut->heads];
        const left_t *left      = &b->left.at[unit->left_first];
        uint32_t slot           = part->row_first + (uint32_t)(head / cut->heads * cut->slots);
        if (!RESERVE(b, b->refs, unit->n_left)) {
            return;
        }
        cuda_ref_t *refs = b->refs.at + b->refs.n;
        for (uint32_t i = 0; i < unit->n_left; i++) {
            refs[i] = (cuda_ref_t){.slot = left[i].slot + slot, .level = left[i].level};
        }
        if (unit->n_left > 0) {
            refs[0].level =
                item->n_refs == 0 ? ATTN_LEVEL_NONE : attn_key_lca(last, extent->first_key);
        }
        b->refs.n += unit->n_left;
        item->n_refs += unit->n_left;
        last = extent->n_leaves > 0 ? extent->last_key : last;
    }
}

/* What puts a reduction together, for each head that did not come out of one piece. */
static void
add_items(builder_t *b, const attn_reduction_t *reduction)
{
    const attn_plan_t *plan           = b->plan;
    const attn_problem_entry_t *entry = &plan->problem.entries[reduction->entry];
    const attn_plan_entry_t *planned  = &plan->entries[reduction->entry];
    uint64_t answer                   = planned->o_row + reduction->q_first;

    if (entry->n_nodes > 0) {
        answer = planned->state / plan->problem.q_heads + (uint64_t)reduction->node * entry->n_q +
                 reduction->q_first;
    }
    for (uint32_t head = 0; head < plan->problem.kv_heads && !b->no_memory; head++) {
        cuda_item_t item = {.ref_first = (uint32_t)b->refs.n,
                            .rows      = reduction->n_q * reduction->n_heads,
                            .n_heads   = reduction->n_heads,
                            .head      = head * plan->group + reduction->head_first,
                            .answer    = (uint32_t)answer,
                            .states    = entry->n_nodes > 0,
                            .entry     = reduction->entry,
                            .query     = reduction->q_first};
        add_refs(b, reduction, head, &item);
        if (item.n_refs > 0) { /* otherwise one piece was all, and answered itself */
            b->image->item_rows = (uint32_t)attn_max(b->image->item_rows, item.rows);
            b->image->item_refs = (uint32_t)attn_max(b->image->item_refs, item.n_refs);
            PUSH(b, b->items, item);
        }
    }
}

/* ---- the whole ---- */

static uint64_t
take(cuda_image_t *image, uint64_t n, uint64_t size)
{
    uint64_t at  = image->bytes;
    image->bytes = attn_div_up(at + n * size, 16) * 16;
    return at;
}

#define TAKE(v) take(image, image->room.v, sizeof(*b->v.at))

/* All tables one after the other. */
static void
lay_out(const builder_t *b, cuda_image_t *image)
{
    image->bytes   = 0;
    image->leaves  = TAKE(leaves);
    image->blocks  = TAKE(blocks);
    image->queries = TAKE(queries);
    image->items   = TAKE(items);
    image->refs    = TAKE(refs);
    image->present = TAKE(present);
    image->masks   = TAKE(masks);
    image->queues  = take(image, CUDA_CLASSES, sizeof(cuda_queue_t));
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        image->classes[c].pieces = take(image, image->room.pieces[c], sizeof(cuda_piece_t));
    }
    image->many_tiles = TAKE(tiles);
    image->pages      = take(image, image->room.pages, sizeof(uint32_t));
}

/* Room for what there is. */
static cuda_room_t
room_of(const builder_t *b, const cuda_image_t *image)
{
    cuda_room_t room = {.leaves     = b->leaves.n,
                        .queries    = b->queries.n,
                        .items      = b->items.n,
                        .refs       = b->refs.n,
                        .blocks     = b->blocks.n,
                        .present    = b->present.n,
                        .masks      = b->masks.n,
                        .pages      = b->n_pages,
                        .tiles      = b->tiles.n,
                        .slots      = image->slots,
                        .item_rows  = image->item_rows,
                        .item_refs  = image->item_refs,
                        .depth      = image->depth,
                        .many_depth = image->many_depth,
                        .masked     = image->masked};

    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        room.pieces[c] = image_pieces(&b->cuts[c]);
        room.pairs[c]  = image->classes[c].pairs;
    }
    return room;
}

bool
cuda_room_holds(const cuda_room_t *room, const cuda_room_t *needed)
{
    bool holds = room->leaves >= needed->leaves && room->queries >= needed->queries &&
                 room->items >= needed->items && room->refs >= needed->refs &&
                 room->blocks >= needed->blocks && room->present >= needed->present &&
                 (room->blocks > 0) == (needed->blocks > 0) && /* kernels follow from that */
                 (room->present > 0) == (needed->present > 0) && room->masks >= needed->masks &&
                 room->pages >= needed->pages && room->slots >= needed->slots &&
                 room->item_rows >= needed->item_rows && room->item_refs >= needed->item_refs &&
                 room->depth >= needed->depth && room->tiles >= needed->tiles &&
                 (room->tiles > 0) == (needed->tiles > 0) && /* as q and o are to lie */
                 room->many_depth >= needed->many_depth && room->masked == needed->masked;

    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        holds = holds && room->pieces[c] >= needed->pieces[c] && room->pairs[c] >= needed->pairs[c];
    }
    return holds;
}

/* A power of two, at least `least` if it is any. */
static uint64_t
above(uint64_t n, uint64_t least)
{
    uint64_t room = least;

    while (room < n) {
        room *= 2;
    }
    return n > 0 ? room : 0;
}

cuda_room_t
cuda_room_above(const cuda_room_t *needed)
{
    cuda_room_t room = {.leaves     = above(needed->leaves, 256),
                        .queries    = above(needed->queries, 16),
                        .items      = above(needed->items, 64),
                        .refs       = above(needed->refs, 1024),
                        .blocks     = above(needed->blocks, 1024),
                        .present    = above(needed->present, 256),
                        .masks      = above(needed->masks, 256),
                        .pages      = above(needed->pages, 1024),
                        .tiles      = above(needed->tiles, 256),
                        .slots      = above(needed->slots, 4096),
                        .item_rows  = (uint32_t)above(needed->item_rows, 1),
                        .item_refs  = (uint32_t)above(needed->item_refs, 32),
                        .depth      = (needed->depth + 4) / 4 * 4,
                        .many_depth = (uint32_t)above(needed->many_depth, 1), /* they are large */
                        .masked     = needed->masked};

    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        room.pieces[c] = above(needed->pieces[c], 256);
        room.pairs[c]  = needed->pairs[c];
    }
    return room;
}

void
cuda_image_place(cuda_image_t *image, const cuda_room_t *room, uint32_t ctas)
{
    image->room       = *room;
    image->slots      = room->slots;
    image->n_items    = (uint32_t)room->items;
    image->item_rows  = room->item_rows;
    image->item_refs  = room->item_refs;
    image->depth      = room->depth;
    image->many_depth = room->many_depth;
    image->many_grid  = room->tiles > 0 ? ctas : 0;
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        image->classes[c].grid  = room->pieces[c] > 0 ? ctas : 0;
        image->classes[c].pairs = room->pairs[c];
    }
    lay_out(image->memory, image);
}

/* What has a row for each of the plan's spans, works or entries. */
static bool
reserve(builder_t *b)
{
    const attn_plan_t *plan = b->plan;
    uint64_t spans          = 0;

    for (uint32_t w = 0; w < plan->n_works; w++) {
        spans = attn_max(spans, (uint64_t)plan->works[w].span_first + plan->works[w].n_spans);
    }
    if (!RESERVE(b, b->page_at, spans + 1) || !RESERVE(b, b->works, plan->n_works + 1) ||
        !RESERVE(b, b->mask_at, plan->problem.n + 1)) {
        return false;
    }
    memset(b->page_at.at, 0xff, spans * sizeof(*b->page_at.at)); /* CUDA_NONE */
    return true;
}

static void
build(builder_t *b, uint32_t ctas)
{
    const attn_plan_t *plan = b->plan;

    if (!reserve(b)) {
        return;
    }
    add_masks(b);
    for (uint32_t w = 0; w < plan->n_works && !b->no_memory; w++) {
        const attn_work_t *work = &plan->works[w];
        work_t to               = {.class = class_of(plan, work)};

        if (to.class != CUDA_MANY) {
            cuda_class_t *class = &b->image->classes[to.class];
            class->pairs        = attn_max(class->pairs, to.class > 0 ? 4 : (work->rows + 1) / 2);
        }
        add_extents(b, work, &to);
        add_queries(b, work, &to);
        PUSH(b, b->works, to);
    }
    for (uint32_t c = 0; c < CUDA_CLASSES && !b->no_memory; c++) {
        image_cut_class(b, c, ctas);
    }
    if (!b->no_memory) {
        image_deal_tiles(b, ctas);
    }
    for (uint32_t i = 0; i < plan->n_reductions && !b->no_memory; i++) {
        add_items(b, &plan->reductions[i]);
    }
    b->image->n_items = (uint32_t)b->items.n;
}

/* Every vector, for what is done to all of them. */
#define EACH_VECTOR(DO)                                                                            \
    DO(spans)                                                                                      \
    DO(leaves)                                                                                     \
    DO(blocks)                                                                                     \
    DO(extents)                                                                                    \
    DO(queries)                                                                                    \
    DO(works)                                                                                      \
    DO(many)                                                                                       \
    DO(sequences)                                                                                  \
    DO(parts)                                                                                      \
    DO(loads)                                                                                      \
    DO(tiles)                                                                                      \
    DO(units)                                                                                      \
    DO(left) DO(pieces) DO(items) DO(refs) DO(lists) DO(page_at) DO(present) DO(masks) DO(mask_at)

/* As new, but for the memory. */
static void
begin_anew(builder_t *b, const attn_plan_t *plan, bool steady, cuda_image_t *image)
{
    b->plan      = plan;
    b->image     = image;
    b->no_memory = false;
    b->steady    = steady;
    b->n_pages   = 0;
#define EMPTY(v) b->v.n = 0;
    EACH_VECTOR(EMPTY)
#undef EMPTY
    *image = (cuda_image_t){.memory     = b,
                            .depth      = plan->max_depth + 1,
                            .many_depth = 1,
                            .leaf_sets  = (uint32_t)attn_div_up(
                                 attn_min(plan->many, plan->problem.chunk_size), CUDA_LEAF)};
    memcpy(image->classes, classes, sizeof(classes));
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        image->classes[c].teams =
            CUDA_TEAMS(classes[c].rows, plan->problem.head_dim_k, plan->problem.head_dim_v);
    }
    for (uint32_t i = 0; i < plan->problem.n; i++) {
        image->changes = image->changes || plan->problem.entries[i].lists_change;
    }
}

static attn_status_t
build_image(const attn_plan_t *plan, uint32_t ctas, bool steady, cuda_image_t *image)
{
    builder_t *b = image->memory != NULL ? image->memory : calloc(1, sizeof(*b));

    if (b == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tables of a step");
    }
    begin_anew(b, plan, steady, image);
    build(b, ctas);
    if (b->no_memory) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tables of a step");
    }
    if (b->leaves.n >= CUDA_NONE || b->queries.n >= CUDA_NONE || b->n_pages >= CUDA_NONE ||
        b->blocks.n >= CUDA_NONE || b->present.n >= CUDA_NONE || image->slots >= CUDA_NONE ||
        plan->states / plan->problem.q_heads >= CUDA_NONE) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "the step has more leaves, queries or states than 32 bits number");
    }
    image->room = room_of(b, image);
    lay_out(b, image);
    return ATTN_OK;
}

attn_status_t
cuda_image_build(const attn_plan_t *plan, uint32_t ctas, cuda_image_t *image)
{
    return build_image(plan, ctas, false, image);
}

attn_status_t
cuda_image_build_steady(const attn_plan_t *plan, uint32_t ctas, cuda_image_t *image)
{
    return build_image(plan, ctas, true, image);
}

void
cuda_image_write_tables(const cuda_image_t *image, uint8_t *to)
{
    const builder_t *b = image->memory;

#define PUT(v, offset)                                                                             \
    if ((v).n > 0) {                                                                               \
        memcpy(to + (offset), (v).at, (v).n * sizeof(*(v).at));                                    \
    }
    PUT(b->leaves, image->leaves)
    PUT(b->blocks, image->blocks)
    PUT(b->queries, image->queries)
    PUT(b->items, image->items)
    PUT(b->refs, image->refs)
    PUT(b->present, image->present)
    PUT(b->masks, image->masks)
    PUT(b->tiles, image->many_tiles)
#undef PUT
    /* Where a room has more than there is, kernels find nothing to do: items without a row, teams
     * without a piece. */
    memset(to + image->items + b->items.n * sizeof(cuda_item_t), 0,
           (image->room.items - b->items.n) * sizeof(cuda_item_t));
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        if (b->cuts[c].teams == 0) {
            memset(to + image->classes[c].pieces, 0xff,
                   image->room.pieces[c] * sizeof(cuda_piece_t));
        }
        image_write_pieces(b, c, (cuda_piece_t *)(void *)(to + image->classes[c].pieces));
        ((cuda_queue_t *)(void *)(to + image->queues))[c] = image_queue(&b->cuts[c]);
    }
}

void
cuda_image_write_pages(const cuda_image_t *image, uint8_t *to)
{
    const builder_t *b = image->memory;
    uint32_t *pages    = (uint32_t *)(void *)(to + image->pages);

    for (uint64_t i = 0; i < b->lists.n; i++) {
        memcpy(pages, b->lists.at[i].from, b->lists.at[i].n * sizeof(*pages));
        pages += b->lists.at[i].n;
    }
}

void
cuda_image_free(cuda_image_t *image)
{
    builder_t *b = image->memory;

    if (b != NULL) {
#define FREE(v) free(b->v.at);
        EACH_VECTOR(FREE)
#undef FREE
        free(b);
    }
    image->memory = NULL;
}
