/*
 * A plan becomes tables: leaves with their pages, the queries of each work, and pieces.
 *
 * Pieces: all leaves of all works of a class and all KV heads are laid in one line, and each team
 * gets an equal stretch of it, so that all teams finish together whatever the lengths are. What a
 * stretch holds of a work is a piece. Cuts are rounded to small aligned subtrees, which keeps the
 * number of states between the kernels low.
 */
#include "kernels/cuda/image_host.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* A cut may miss its place by so small a part of a team's stretch. */
#define CUT_FRACTION 64u

#define VECTOR(type)                                                                               \
    struct {                                                                                       \
        type *at;                                                                                  \
        uint64_t n, room;                                                                          \
    }

/* A work on its way into pieces. */
typedef struct work {
    uint32_t query_first, leaf_first, n_leaves, present_at, n_lists;
} work_t;

/* A state that a piece leaves in memory. */
typedef struct left {
    uint32_t slot;  /* of row 0 of the work */
    uint32_t level; /* as in cuda_ref_t, within the unit */
} left_t;

/* What one head of a work comes to. */
typedef struct unit {
    uint32_t left_first, n_left; /* none: it answers itself */
} unit_t;

typedef struct builder {
    const attn_plan_t *plan;
    cuda_image_t *image;
    bool no_memory;
    VECTOR(cuda_leaf_t) leaves;
    VECTOR(uint64_t) keys;    /* of leaves */
    VECTOR(uint32_t) run_end; /* the leaf behind the last one that follows without a gap */
    VECTOR(cuda_query_t) queries;
    VECTOR(work_t) works;
    VECTOR(left_t) left;
    VECTOR(cuda_piece_t) pieces[CUDA_CLASSES];
    VECTOR(cuda_item_t) items;
    VECTOR(cuda_ref_t) refs;
    VECTOR(uint32_t) pages;
    VECTOR(uint64_t) present;
    VECTOR(uint8_t) masks;
    unit_t *units;     /* [works][kv_heads] */
    uint32_t *mask_at; /* [entries] */
} builder_t;

static void *
grow(builder_t *b, void *at, uint64_t *room, uint64_t wanted, size_t size)
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

/* Room for m more at the end of a vector; false without memory. */
#define RESERVE(b, v, m)                                                                           \
    ((v).n + (m) <= (v).room ||                                                                    \
     ((v).at = grow((b), (v).at, &(v).room, (v).n + (m), sizeof(*(v).at)),                         \
      (v).n + (m) <= (v).room))

#define PUSH(b, v, ...)                                                                            \
    do {                                                                                           \
        if (RESERVE(b, v, 1)) {                                                                    \
            (v).at[(v).n++] = (__VA_ARGS__);                                                       \
        }                                                                                          \
    } while (0)

static uint32_t
class_of(uint32_t rows)
{
    return rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : 3;
}

static const cuda_class_t classes[CUDA_CLASSES] = {
    {.columns = 8, .row_blocks = 1},
    {.columns = 16, .row_blocks = 1},
    {.columns = 16, .row_blocks = 2},
    {.columns = 16, .row_blocks = 4},
};

/* ---- leaves ---- */

/* The tokens of a leaf that a list has, or that are dense, as a set of bits. */
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

/* The place of a run's pages in the page table. */
static uint32_t
place_pages(builder_t *b, const attn_kv_run_t *run)
{
    uint32_t at = (uint32_t)b->pages.n;
    uint64_t n  = attn_div_up(run->length, b->plan->problem.page_size);

    if (RESERVE(b, b->pages, n)) {
        memcpy(b->pages.at + at, run->pages, n * sizeof(uint32_t));
        b->pages.n += n;
    }
    return at;
}

static void
add_leaves(builder_t *b, const attn_work_t *work, work_t *to)
{
    const attn_problem_t *problem     = &b->plan->problem;
    const attn_member_t *member       = &b->plan->members[work->member_first];
    const attn_problem_entry_t *entry = &problem->entries[member->entry];
    const attn_kv_run_t *run          = NULL;
    uint64_t last                     = 0;
    uint32_t table                    = 0;
    attn_walk_t walk;
    attn_leaf_t leaf;

    to->leaf_first = (uint32_t)b->leaves.n;
    to->present_at = CUDA_NONE;
    to->n_lists    = entry->n_lists;
    if (entry->n_lists > 0) {
        to->present_at    = (uint32_t)b->present.n;
        b->image->general = true;
    }
    attn_walk_init(&walk, b->plan, work);
    while (attn_walk_next(&walk, &leaf) && !b->no_memory) {
        if (leaf.run != run) {
            run   = leaf.run;
            table = place_pages(b, run);
        }
        PUSH(b, b->leaves,
             (cuda_leaf_t){.page     = table + leaf.first / problem->page_size,
                           .position = (int32_t)leaf.position,
                           .tokens   = (uint16_t)leaf.tokens,
                           .offset   = (uint16_t)(leaf.first % problem->page_size),
                           .level    = to->n_leaves == 0 ? 64 : attn_key_lca(last, leaf.key)});
        PUSH(b, b->keys, leaf.key);
        PUSH(b, b->run_end, 0);
        for (uint32_t list = 0; list < entry->n_lists; list++) {
            PUSH(b, b->present, tokens_of_list(problem, entry, list, &leaf));
        }
        last = leaf.key;
        to->n_leaves++;
    }
    /* Where each stretch without a gap ends: for counting states a subtree at a time. */
    for (uint32_t i = to->n_leaves; i-- > 0 && !b->no_memory;) {
        uint32_t at       = to->leaf_first + i;
        bool gap          = i + 1 == to->n_leaves || b->keys.at[at + 1] != b->keys.at[at] + 1;
        b->run_end.at[at] = gap ? i + 1 : b->run_end.at[at + 1];
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
                q.mask             = b->mask_at[member->entry] +
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
        b->mask_at[i]                     = (uint32_t)b->masks.n;
        if (entry->mask == NULL) {
            continue;
        }
        uint64_t bytes    = entry->n_q * attn_mask_row_bytes(entry->mask_tokens);
        b->image->general = true;
        if (RESERVE(b, b->masks, bytes)) {
            memcpy(b->masks.at + b->masks.n, entry->mask, bytes);
            b->masks.n += bytes;
        }
    }
}

/* ---- pieces ---- */

/* The states that a piece leaves: its fold, a subtree at a time (plan_cut.c, fold_span()). */
static void
fold_piece(const builder_t *b, const work_t *work, uint32_t first, uint32_t end,
           const cuda_piece_t *piece, attn_fold_t *fold)
{
    attn_fold_init(fold, piece->levels & 255);
    for (uint32_t i = first; i < end;) {
        const uint64_t key = b->keys.at[work->leaf_first + i];
        uint32_t stop      = (uint32_t)attn_min(b->run_end.at[work->leaf_first + i], end);
        uint32_t bits      = key == 0 ? 31 : (uint32_t)__builtin_ctzll(key);
        uint32_t room      = 31u - (uint32_t)__builtin_clz(stop - i);
        bits               = bits < room ? bits : room;
        while (attn_fold_pops(fold, attn_fold_level(fold, key))) {
        }
        b->image->depth = (uint32_t)attn_max(b->image->depth, fold->n + 1 + bits);
        attn_fold_push(fold, key);
        i += 1u << bits;
    }
    while (attn_fold_pops(fold, piece->levels >> 8)) {
    }
}

/* Room in memory for what a piece leaves there. */
static void
leave_states(builder_t *b, uint32_t w, uint32_t head, uint32_t first, uint32_t end,
             cuda_piece_t *piece)
{
    const work_t *work = &b->works.at[w];
    unit_t *unit       = &b->units[(uint64_t)w * b->plan->problem.kv_heads + head];
    attn_fold_t fold;

    fold_piece(b, work, first, end, piece, &fold);
    piece->slot = (uint32_t)b->image->slots;
    for (uint32_t i = 0; i < fold.n; i++) {
        uint32_t level = i > 0 ? attn_key_lca(fold.keys[i - 1], fold.keys[i])
                               : b->leaves.at[work->leaf_first + first].level;
        PUSH(b, b->left,
             (left_t){.slot  = (uint32_t)(b->image->slots + (uint64_t)i * piece->rows),
                      .level = level});
    }
    unit->n_left += fold.n;
    b->image->slots += (uint64_t)fold.n * piece->rows;
}

/* Leaves [first, end) of a head of a work, as a piece. */
static cuda_piece_t
make_piece(builder_t *b, uint32_t w, uint32_t head, uint32_t first, uint32_t end)
{
    const attn_work_t *planned = &b->plan->works[w];
    const work_t *work         = &b->works.at[w];
    const cuda_leaf_t *leaves  = b->leaves.at + work->leaf_first;
    uint32_t left              = first == 0 ? planned->left_level : leaves[first].level;
    uint32_t right             = end == work->n_leaves ? planned->right_level : leaves[end].level;
    uint32_t entry             = b->plan->members[planned->member_first].entry;

    assert(left <= ATTN_LEVEL_NONE && right <= ATTN_LEVEL_NONE);
    cuda_piece_t piece = {.next        = CUDA_NONE,
                          .kv_head     = head,
                          .leaf_first  = work->leaf_first + first,
                          .n_leaves    = end - first,
                          .levels      = left | right << 8,
                          .slot        = CUDA_NONE,
                          .states      = b->plan->problem.entries[entry].n_nodes > 0,
                          .query_first = work->query_first,
                          .rows        = planned->rows,
                          .head_first  = planned->head_first,
                          .n_heads     = planned->n_heads,
                          .present_at  = CUDA_NONE,
                          .n_lists     = work->n_lists};
    if (first < end) {
        piece.page   = leaves[first].page;
        piece.tokens = leaves[first].tokens;
        piece.offset = leaves[first].offset;
    }
    if (work->present_at != CUDA_NONE) {
        piece.present_at = work->present_at + first * work->n_lists;
    }
    if (first > 0 || end < work->n_leaves || planned->n_out > 0) {
        leave_states(b, w, head, first, end, &piece);
    } else if (first < end) {
        attn_fold_t fold; /* for its depth */
        fold_piece(b, work, first, end, &piece, &fold);
    }
    return piece;
}

/* The line of all leaves of a class on its way to the teams. */
typedef struct line {
    uint32_t class;
    uint64_t teams, team; /* of the grid, and the one that is being filled */
    uint64_t total, done; /* leaves */
    uint64_t grain;       /* of cuts */
    uint32_t last;        /* the team's last piece, or CUDA_NONE */
} line_t;

static uint64_t
stretch_end(const line_t *line)
{
    return (line->total * (line->team + 1) + line->teams - 1) / line->teams;
}

static void
give_piece(builder_t *b, line_t *line, cuda_piece_t piece, uint64_t leaves)
{
    uint32_t at = (uint32_t)line->team;

    if (line->last == CUDA_NONE) {
        b->pieces[line->class].at[at] = piece;
    } else {
        at                                         = (uint32_t)b->pieces[line->class].n;
        b->pieces[line->class].at[line->last].next = at;
        PUSH(b, b->pieces[line->class], piece);
    }
    line->last = at;
    line->done += leaves;
    while (line->team + 1 < line->teams && line->done + line->grain / 2 >= stretch_end(line)) {
        line->team++;
        line->last = CUDA_NONE;
    }
}

static void
cut_unit(builder_t *b, line_t *line, uint32_t w, uint32_t head)
{
    uint32_t n   = b->works.at[w].n_leaves;
    unit_t *unit = &b->units[(uint64_t)w * b->plan->problem.kv_heads + head];

    unit->left_first = (uint32_t)b->left.n;
    if (n == 0) {
        give_piece(b, line, make_piece(b, w, head, 0, 0), 1);
    }
    for (uint32_t at = 0, cut; at < n && !b->no_memory; at = cut) {
        uint64_t room = stretch_end(line) - line->done;
        cut           = n;
        if (room < n - at) {
            cut = (uint32_t)((at + room + line->grain / 2) / line->grain * line->grain);
            cut = cut <= at ? (uint32_t)attn_min(at + line->grain, n) : cut < n ? cut : n;
        }
        give_piece(b, line, make_piece(b, w, head, at, cut), cut - at);
    }
}

static void
cut_class(builder_t *b, uint32_t class, uint32_t ctas)
{
    cuda_class_t *to = &b->image->classes[class];
    uint32_t heads = b->plan->problem.kv_heads, teams = CUDA_WARPS / to->row_blocks;
    line_t line = {.class = class, .grain = 1, .last = CUDA_NONE};

    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        if (class_of(b->plan->works[w].rows) == class) {
            line.total += attn_max(b->works.at[w].n_leaves, 1) * heads;
        }
    }
    if (line.total == 0) {
        return;
    }
    /* Few leaves go to as many CTAs as there are, one to each of their teams after the other. */
    to->grid   = (uint32_t)attn_min(ctas, line.total);
    line.teams = (uint64_t)to->grid * teams;
    while (line.grain * 2 * CUT_FRACTION <= line.total / line.teams) {
        line.grain *= 2;
    }
    for (uint64_t t = 0; t < line.teams && !b->no_memory; t++) {
        PUSH(b, b->pieces[class], (cuda_piece_t){.next = CUDA_NONE, .kv_head = CUDA_NONE});
    }
    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        for (uint32_t head = 0; class_of(b->plan->works[w].rows) == class && head < heads; head++) {
            cut_unit(b, &line, w, head);
        }
    }
}

/* ---- items ---- */

static void
add_item(builder_t *b, const attn_reduction_t *reduction, uint32_t head)
{
    const attn_plan_t *plan           = b->plan;
    const attn_problem_entry_t *entry = &plan->problem.entries[reduction->entry];
    const attn_plan_entry_t *planned  = &plan->entries[reduction->entry];
    uint64_t last                     = 0;
    cuda_item_t item                  = {
                         .ref_first = (uint32_t)b->refs.n,
                         .rows      = reduction->n_q * reduction->n_heads,
                         .n_heads   = reduction->n_heads,
                         .head      = head * plan->group + reduction->head_first,
                         .answer    = (uint32_t)(planned->o_row + reduction->q_first),
                         .states    = entry->n_nodes > 0,
                         .entry     = reduction->entry,
                         .query     = reduction->q_first,
    };

    if (entry->n_nodes > 0) {
        item.answer = (uint32_t)(planned->state / plan->problem.q_heads +
                                 (uint64_t)reduction->node * entry->n_q + reduction->q_first);
    }
    for (uint32_t p = 0; p < reduction->n_parts; p++) {
        const attn_part_t *part = &plan->parts[reduction->part_first + p];
        const work_t *work      = &b->works.at[part->work];
        const unit_t *unit      = &b->units[(uint64_t)part->work * plan->problem.kv_heads + head];
        for (uint32_t i = 0; i < unit->n_left; i++) {
            const left_t *left = &b->left.at[unit->left_first + i];
            uint32_t level     = left->level;
            if (i == 0) {
                level = item.n_refs == 0 ? ATTN_LEVEL_NONE
                                         : attn_key_lca(last, b->keys.at[work->leaf_first]);
            }
            PUSH(b, b->refs, (cuda_ref_t){.slot = left->slot + part->row_first, .level = level});
            item.n_refs++;
        }
        last = work->n_leaves > 0 ? b->keys.at[work->leaf_first + work->n_leaves - 1] : last;
    }
    if (item.n_refs > 0) { /* otherwise one piece was all, and answered itself */
        b->image->item_rows = (uint32_t)attn_max(b->image->item_rows, item.rows);
        b->image->item_refs = (uint32_t)attn_max(b->image->item_refs, item.n_refs);
        PUSH(b, b->items, item);
    }
}

/* ---- the whole ---- */

/* Put a table into the block. */
static uint64_t
put(cuda_image_t *image, const void *from, uint64_t bytes)
{
    uint64_t at = image->bytes;
    if (image->block != NULL && bytes > 0) {
        memcpy(image->block + at, from, bytes);
    }
    image->bytes = (at + bytes + 15) / 16 * 16;
    return at;
}

#define PUT(v) put(image, (v).at, (v).n * sizeof(*(v).at))

/* All tables one after the other; without a block, for their size alone. */
static void
put_all(builder_t *b, cuda_image_t *image)
{
    image->bytes   = 0;
    image->leaves  = PUT(b->leaves);
    image->queries = PUT(b->queries);
    image->items   = PUT(b->items);
    image->refs    = PUT(b->refs);
    image->present = PUT(b->present);
    image->pages   = PUT(b->pages);
    image->masks   = PUT(b->masks);
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        image->classes[c].pieces = PUT(b->pieces[c]);
    }
}

static void
build(builder_t *b, uint32_t ctas)
{
    const attn_plan_t *plan = b->plan;
    uint32_t heads          = plan->problem.kv_heads;

    add_masks(b);
    for (uint32_t w = 0; w < plan->n_works && !b->no_memory; w++) {
        const attn_work_t *work = &plan->works[w];
        work_t to               = {0};
        add_leaves(b, work, &to);
        add_queries(b, work, &to);
        PUSH(b, b->works, to);
    }
    for (uint32_t c = 0; c < CUDA_CLASSES && !b->no_memory; c++) {
        cut_class(b, c, ctas);
    }
    for (uint32_t i = 0; i < plan->n_reductions && !b->no_memory; i++) {
        for (uint32_t head = 0; head < heads; head++) {
            add_item(b, &plan->reductions[i], head);
        }
    }
    b->image->n_items = (uint32_t)b->items.n;
}

attn_status_t
cuda_image_build(const attn_plan_t *plan, uint32_t ctas, cuda_image_t *image)
{
    uint64_t units = (uint64_t)plan->n_works * plan->problem.kv_heads;
    builder_t b    = {.plan = plan, .image = image};

    *image = (cuda_image_t){.depth = plan->max_depth + 1};
    memcpy(image->classes, classes, sizeof(classes));
    for (uint32_t i = 0; i < plan->problem.n; i++) {
        image->changes = image->changes || plan->problem.entries[i].lists_change;
    }
    b.units     = calloc(units + 1, sizeof(*b.units));
    b.mask_at   = malloc((plan->problem.n + 1) * sizeof(*b.mask_at));
    b.no_memory = b.units == NULL || b.mask_at == NULL;
    if (!b.no_memory) {
        build(&b, ctas);
    }
    if (!b.no_memory) {
        put_all(&b, image);
        image->block = malloc(image->bytes + 1);
        b.no_memory  = image->block == NULL;
    }
    if (!b.no_memory) {
        put_all(&b, image);
    }
    bool too_large = b.leaves.n >= CUDA_NONE || b.queries.n >= CUDA_NONE ||
                     b.pages.n >= CUDA_NONE || b.present.n >= CUDA_NONE ||
                     image->slots >= CUDA_NONE || plan->states / plan->problem.q_heads >= CUDA_NONE;
    free(b.leaves.at);
    free(b.keys.at);
    free(b.run_end.at);
    free(b.queries.at);
    free(b.works.at);
    free(b.left.at);
    for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
        free(b.pieces[c].at);
    }
    free(b.items.at);
    free(b.refs.at);
    free(b.pages.at);
    free(b.present.at);
    free(b.masks.at);
    free(b.units);
    free(b.mask_at);
    if (b.no_memory || too_large) {
        cuda_image_free(image);
        return too_large ? attn_fail(ATTN_ERR_TOO_LARGE, "the step has more leaves, queries or "
                                                         "states than 32 bits number")
                         : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tables of a step");
    }
    return ATTN_OK;
}

void
cuda_image_free(cuda_image_t *image)
{
    free(image->block);
    image->block = NULL;
}
