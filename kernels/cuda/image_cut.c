/*
 * Works to pieces. All leaves of all works of a class and all KV heads are laid in one line, and
 * each team gets an equal stretch of it, so that all teams finish together whatever the lengths
 * are. What a stretch holds of a work is a piece. Cuts are rounded to small aligned subtrees, which
 * keeps the number of states between the kernels low.
 *
 * But where they wait for memory, teams are not equally fast, by a sixth and more. So where it pays
 * the line is cut into subtrees that become smaller towards its end: each team has one of them from
 * the beginning, and takes others from a queue.
 *
 * The line has one head after the other, and where the number of teams allows it each head gets as
 * many teams as the next: then all are cut in the same places, and one is cut in place of all. In
 * general heads and teams fall into as many blocks as divide both.
 */
#include "kernels/cuda/image_int.h"

#include "base/checked.h"

#include <assert.h>

/* What a leaf costs a team, and a state of a reduction the merge, as seen on an H200. */
#define LEAF_COST 4u
#define STATE_COST 1u

/* Leaves of a team from which on a queue pays, where works are of different lengths and where they
 * are not; and leaves of a queued piece at least, below and above so many of a team. */
#define QUEUE_UNEVEN 6u
#define QUEUE_EVEN 96u
#define QUEUE_LONG 48u
#define QUEUE_LEAST_SHORT 2u
#define QUEUE_LEAST_LONG 8u

/* The line of a block on its way to its teams. */
typedef struct line {
    cut_t *cut;
    uint64_t team;        /* that is being filled */
    uint64_t total, done; /* leaves */
    uint64_t end;         /* of the team's stretch */
    uint64_t grain;       /* of cuts */
    uint64_t least;       /* leaves of a queued piece */
    uint32_t last;        /* the team's last piece, or CUDA_NONE */
} line_t;

static void
set_end(line_t *line)
{
    uint64_t grains = attn_div_up(line->total, line->grain);
    line->end       = attn_div_up(grains * (line->team + 1), line->cut->teams) * line->grain;
}

/* Level of the node with the leaf behind a place and the one before it in its work. */
static uint32_t
level_at(const builder_t *b, const extent_t *extent, const place_t *place)
{
    if (place->span == NULL) {
        return b->blocks.at[(uint64_t)(extent->leaf_first + place->at) * CUDA_WARPS].level;
    }
    uint32_t leaf = place->at - place->span->at + place->span->leaf_first;
    return leaf == place->span->leaf_first ? place->span->level : 1 + (uint32_t)__builtin_ctz(leaf);
}

/* The states that leaves from one place to another leave, a subtree at a time (plan_cut.c), and how
 * deep a stack becomes meanwhile. */
static uint32_t
fold_leaves(const place_t *from, uint32_t end, uint32_t left, uint32_t right, left_states_t *states)
{
    uint32_t depth = 0;
    attn_fold_t fold;

    attn_fold_init(&fold, left);
    for (const span_t *span = from->span; from->at < end && span->at < end; span++) {
        uint32_t leaf = span->leaf_first + (span == from->span ? from->at - span->at : 0);
        uint32_t stop = (uint32_t)attn_min(span->leaf_end, span->leaf_first + (end - span->at));
        while (leaf < stop) {
            uint64_t key  = span->key | leaf;
            uint32_t room = 31u - (uint32_t)__builtin_clz(stop - leaf);
            uint32_t bits = leaf == 0 ? room : (uint32_t)__builtin_ctz(leaf);
            bits          = bits < room ? bits : room;
            while (attn_fold_pops(&fold, attn_fold_level(&fold, key))) {
            }
            depth = fold.n + 1 + bits > depth ? fold.n + 1 + bits : depth;
            attn_fold_push(&fold, key);
            leaf += 1u << bits;
        }
        if (span->at + (span->leaf_end - span->leaf_first) >= end) {
            break;
        }
    }
    while (attn_fold_pops(&fold, right)) {
    }
    states->n = fold.n;
    for (uint32_t i = 1; i < fold.n; i++) {
        states->levels[i] = attn_key_lca(fold.keys[i - 1], fold.keys[i]);
    }
    return depth;
}

/* Room in memory for what a piece leaves there. */
static void
leave_states(builder_t *b, cut_t *cut, unit_t *unit, const left_states_t *states,
             cuda_piece_t *piece)
{
    if (!RESERVE(b, b->left, states->n)) {
        return;
    }
    piece->slot = (uint32_t)(b->image->slots + cut->slots);
    for (uint32_t i = 0; i < states->n; i++) {
        b->left.at[b->left.n++] =
            (left_t){.slot = piece->slot + i * piece->rows, .level = states->levels[i]};
    }
    unit->n_left += states->n;
    cut->slots += (uint64_t)states->n * piece->rows;
}

/* To the team whose turn it is; others follow when it has its stretch. */
static void
give_piece(builder_t *b, line_t *line, const cuda_piece_t *piece, uint64_t leaves)
{
    cut_t *cut  = line->cut;
    uint32_t at = (uint32_t)line->team;

    if (line->last == CUDA_NONE) {
        b->pieces.at[cut->first + at] = *piece;
    } else {
        at                                         = (uint32_t)(cut->teams + cut->n_more++);
        b->pieces.at[cut->first + line->last].next = at;
        PUSH(b, b->pieces, *piece);
    }
    line->last = at;
    line->done += leaves;
    while (line->team + 1 < cut->teams && line->done + line->grain / 2 >= line->end) {
        line->team++;
        line->last = CUDA_NONE;
        set_end(line);
    }
}

/* What a piece leaves in memory, and how deep its stack becomes. The plan knows that of a whole
 * work; but the prefill kernel's stacks are large, and seldom as deep. */
static void
leave_piece(builder_t *b, cut_t *cut, uint32_t w, uint32_t head, const place_t *from, uint32_t end,
            cuda_piece_t *piece)
{
    const work_t *work     = &b->works.at[w];
    const extent_t *extent = image_extent(b, work, head);
    bool many = work->class == CUDA_MANY, whole = from->at == 0 && end == extent->n_leaves;
    uint32_t *depth = many ? &b->image->many_depth : &b->image->depth, deep;
    uint32_t left = piece->levels & 255, right = piece->levels >> 8;
    left_states_t states;

    whole = whole && b->plan->works[w].n_out == 0;
    if (whole && !many) {
        return;
    }
    if (work->listed) {
        deep = image_fold_blocks(b, extent, from->at, end, left, right, &states);
    } else {
        deep = fold_leaves(from, end, left, right, &states);
        if (states.n > 0) {
            states.levels[0] = level_at(b, extent, from);
        }
    }
    *depth = deep > *depth ? deep : *depth;
    if (!whole) {
        leave_states(b, cut, &b->units.at[work->unit_first + head], &states, piece);
    }
}

cuda_piece_t
image_make_piece(builder_t *b, cut_t *cut, uint32_t w, uint32_t head, const place_t *from,
                 uint32_t end)
{
    const attn_work_t *planned = &b->plan->works[w];
    const work_t *work         = &b->works.at[w];
    const extent_t *extent     = image_extent(b, work, head);
    uint32_t entry = b->plan->members[planned->member_first].entry, first = from->at;
    cuda_piece_t piece = {.next        = CUDA_NONE,
                          .kv_head     = head,
                          .leaf_first  = extent->leaf_first + first,
                          .n_leaves    = end - first,
                          .slot        = CUDA_NONE,
                          .states      = b->plan->problem.entries[entry].n_nodes > 0,
                          .query_first = work->query_first,
                          .rows        = planned->rows,
                          .head_first  = planned->head_first,
                          .n_heads     = planned->n_heads,
                          .listed      = work->listed};
    uint32_t left = planned->left_level, right = planned->right_level;

    if (first > 0) {
        left = level_at(b, extent, from);
    }
    if (end < extent->n_leaves) {
        place_t to = *from;
        image_move(&to, end, extent->n_leaves);
        right = level_at(b, extent, &to);
    }
    piece.levels = left | right << 8;
    if (first < end && !work->listed) {
        const cuda_leaf_t *leaf = &b->leaves.at[piece.leaf_first];
        piece.page              = leaf->page;
        piece.tokens            = leaf->tokens;
        piece.offset            = leaf->offset;
    }
    leave_piece(b, cut, w, head, from, end, &piece);
    return piece;
}

/* Leaves of a head of a work, from a place on, to a team. */
static void
add_piece(builder_t *b, line_t *line, uint32_t w, uint32_t head, const place_t *from, uint32_t end)
{
    cuda_piece_t piece = image_make_piece(b, line->cut, w, head, from, end);
    give_piece(b, line, &piece, attn_max(end - from->at, 1));
}

/* A head of a work: one piece, or as many as the ends of stretches make of it. */
static void
cut_unit(builder_t *b, line_t *line, uint32_t w, uint32_t head)
{
    const work_t *work = &b->works.at[w];
    const uint32_t n   = image_extent(b, work, head)->n_leaves;
    place_t place      = image_begin(b, work);

    b->units.at[work->unit_first + head] = (unit_t){.left_first = (uint32_t)b->left.n};
    if (n == 0) {
        add_piece(b, line, w, head, &place, 0);
    }
    while (place.at < n && !b->no_memory) {
        uint64_t room = line->end - line->done, grain = line->grain;
        uint32_t cut = n, at = place.at;
        if (room < n - at) {
            cut = (uint32_t)((at + room + (grain - 1) / 2) / grain * grain);
            cut = cut <= at ? (uint32_t)attn_min(at + grain, n) : cut < n ? cut : n;
        }
        add_piece(b, line, w, head, &place, cut);
        image_move(&place, cut, n);
    }
}

/*
 * It pays where there is much to read, and earlier where works differ. Not where producers have
 * their hands full with rows of small pages, nor for many rows: those are works of a shared prefix,
 * which read the same K and V from the L2 when all go the same way.
 */
static bool
is_queued(const builder_t *b, uint32_t class, const line_t *line)
{
    uint64_t leaves = 0, share = QUEUE_EVEN;

    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        if (b->works.at[w].class == class) {
            uint64_t n = image_extent(b, &b->works.at[w], 0)->n_leaves;
            share      = leaves != 0 && n != leaves ? QUEUE_UNEVEN : share;
            leaves     = n;
        }
    }
    return class == 0 && b->plan->problem.page_size % 8 == 0 &&
           line->total >= share * line->cut->teams;
}

/* Leaves of the next piece: a team's part of what is left, down to a power of two. */
static uint64_t
queued_leaves(const line_t *line)
{
    uint64_t share = (line->total - line->done) * 19 / (20 * line->cut->teams);

    return UINT64_C(1) << (63 - __builtin_clzll(attn_max(share, line->least)));
}

/* The same of a line whose pieces are taken by whoever comes, in their order: aligned subtrees, and
 * what is left of a head behind them. */
static void
queue_unit(builder_t *b, line_t *line, uint32_t w, uint32_t head)
{
    const work_t *work = &b->works.at[w];
    const uint32_t n   = image_extent(b, work, head)->n_leaves;
    cut_t *cut         = line->cut;
    place_t place      = image_begin(b, work);

    b->units.at[work->unit_first + head] = (unit_t){.left_first = (uint32_t)b->left.n};
    do {
        uint64_t size = queued_leaves(line), end = (place.at / size + 1) * size;
        end                = n < end + size / 2 ? n : end;
        cuda_piece_t piece = image_make_piece(b, cut, w, head, &place, (uint32_t)end);
        if (line->team < cut->teams) {
            b->pieces.at[cut->first + line->team++] = piece;
        } else {
            PUSH(b, b->pieces, piece);
            cut->n_more++;
        }
        line->done += attn_max(end - place.at, 1);
        image_move(&place, (uint32_t)end, n);
    } while (place.at < n && !b->no_memory);
}

static uint32_t
common_divisor(uint32_t a, uint32_t b)
{
    while (b != 0) {
        uint32_t rest = a % b;
        a             = b;
        b             = rest;
    }
    return a;
}

/* Leaves of the works of a class, all heads; works without any count as one. */
static uint64_t
leaves_of_class(const builder_t *b, uint32_t class)
{
    uint64_t total = 0;

    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        const work_t *work = &b->works.at[w];
        for (uint32_t i = 0; i < work->n_extents && work->class == class; i++) {
            uint64_t leaves = b->extents.at[work->extent_first + i].n_leaves;
            total += attn_max(leaves, 1) * (b->plan->problem.kv_heads / work->n_extents);
        }
    }
    return total;
}

/* Heads in a row that all works of a class are cut alike for, and whether any has lists. */
static uint32_t
heads_alike(const builder_t *b, uint32_t class, bool *listed)
{
    uint32_t alike = b->plan->problem.kv_heads;

    *listed = false;
    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        const work_t *work = &b->works.at[w];
        *listed            = *listed || (work->class == class && work->listed);
        alike              = work->class == class && work->n_extents > 1 ? 1 : alike;
    }
    return alike;
}

/*
 * Cuts on multiples of a larger power of two leave fewer states, and teams less even. Where all
 * works are such multiples a team has at most its share rounded up. Elsewhere it may have half of
 * one more at either end, and one is at most a quarter of a share.
 */
static uint64_t
best_grain(const builder_t *b, uint32_t class, const line_t *line)
{
    uint64_t share = attn_div_up(line->total, line->cut->teams), units = 0, any = 0;
    uint64_t best = 1, least = UINT64_MAX;

    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        if (b->works.at[w].class == class) {
            units += line->cut->heads;
            any |= attn_max(image_extent(b, &b->works.at[w], 0)->n_leaves, 1);
        }
    }
    for (uint64_t grain = 1; grain <= share; grain *= 2) {
        bool even = any % grain == 0;
        if (!even && grain > attn_max(share / 4, 1)) {
            break;
        }
        uint64_t most   = even ? attn_div_up(share, grain) * grain : share + grain / 2;
        uint64_t levels = 64 - (uint64_t)__builtin_clzll(most / grain);
        uint64_t states = (line->total / units / most + 2) * levels;
        uint64_t cost   = most * LEAF_COST + states * STATE_COST;
        if (cost < least) {
            least = cost;
            best  = grain;
        }
    }
    return best;
}

void
image_cut_class(builder_t *b, uint32_t class, uint32_t ctas)
{
    cuda_class_t *to = &b->image->classes[class];
    cut_t *cut       = &b->cuts[class];
    uint32_t heads   = b->plan->problem.kv_heads;
    line_t line      = {.cut = cut, .total = leaves_of_class(b, class)};
    bool listed;

    *cut = (cut_t){0};
    if (line.total == 0) {
        return;
    }
    /* Few leaves go to as many CTAs as there are, one to each of their teams after the other. */
    to->grid       = b->steady ? ctas : (uint32_t)attn_min(ctas, line.total);
    uint32_t teams = to->grid * to->teams;
    uint32_t alike = heads_alike(b, class, &listed);
    *cut           = (cut_t){.blocks = common_divisor(teams, alike), .first = b->pieces.n};
    cut->heads     = heads / cut->blocks;
    cut->teams     = teams / cut->blocks;
    line.total /= cut->blocks;
    line.last   = CUDA_NONE;
    line.least  = line.total < QUEUE_LONG * cut->teams ? QUEUE_LEAST_SHORT : QUEUE_LEAST_LONG;
    cut->queued = !listed && is_queued(b, class, &line);
    line.grain  = listed ? 1 : best_grain(b, class, &line); /* bundles are no subtrees */
    set_end(&line);
    if (!RESERVE(b, b->pieces, cut->teams) ||
        !RESERVE(b, b->units, (uint64_t)b->plan->n_works * cut->heads)) {
        return;
    }
    for (uint64_t t = 0; t < cut->teams; t++) {
        b->pieces.at[b->pieces.n++] = (cuda_piece_t){.next = CUDA_NONE, .kv_head = CUDA_NONE};
    }
    for (uint32_t w = 0; w < b->plan->n_works; w++) {
        if (b->works.at[w].class == class) {
            b->works.at[w].unit_first = (uint32_t)b->units.n;
            b->units.n += cut->heads;
        }
    }
    for (uint32_t head = 0; head < cut->heads; head++) {
        for (uint32_t w = 0; w < b->plan->n_works && !b->no_memory; w++) {
            if (b->works.at[w].class == class) {
                (cut->queued ? queue_unit : cut_unit)(b, &line, w, head);
            }
        }
    }
    b->image->slots += cut->slots * cut->blocks;
}

void
image_write_pieces(const builder_t *b, uint32_t class, cuda_piece_t *to)
{
    const cut_t *cut          = &b->cuts[class];
    const cuda_piece_t *first = b->pieces.at + cut->first;

    for (uint32_t block = 0; block < cut->blocks; block++) {
        const uint64_t step  = cut->queued ? cut->blocks : 1;
        cuda_piece_t *firsts = to + block * cut->teams;
        cuda_piece_t *others =
            to + cut->blocks * cut->teams + block * (cut->queued ? 1 : cut->n_more);
        /* A piece's number in the block becomes that among all. */
        uint32_t next = (uint32_t)((cut->blocks - 1) * cut->teams + block * cut->n_more);
        for (uint64_t i = 0; i < cut->teams + cut->n_more; i++) {
            cuda_piece_t piece = first[i];
            piece.kv_head += piece.kv_head != CUDA_NONE ? block * cut->heads : 0;
            piece.next += piece.next != CUDA_NONE ? next : 0;
            piece.slot += piece.slot != CUDA_NONE ? (uint32_t)(block * cut->slots) : 0;
            *(i < cut->teams ? firsts + i : others + (i - cut->teams) * step) = piece;
        }
    }
}
