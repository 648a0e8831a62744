/*
 * image_test.c: the tables that a GPU reads of a plan, without one. The kernels are played with
 * symbols in place of numbers: a leaf's state is a number drawn from what it was computed from, and
 * merging two makes a third one. What arrives as the answer of a row must be what the tree says,
 * worked out here from the problem alone, whatever was cut and shared.
 */
#include "balancer/plan.h"
#include "base/status.h"
#include "kernels/cuda/image_host.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define ENTRIES_MAX 24u
#define NODES_MAX 4u
#define STACK_MAX 256u
#define HEADS_MAX 5u
#define LISTED_MAX 64u /* pages of a list */

static uint64_t chance_state = 20261123;

static uint32_t
chance_in(uint32_t low, uint32_t high)
{
    chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
    return low + (uint32_t)((chance_state >> 33) % (high - low + 1));
}

/* ---- symbols ---- */

static uint64_t
mix(uint64_t a, uint64_t b)
{
    uint64_t x = (a ^ 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u + b;
    x          = (x ^ x >> 29) * 0x94d049bb133111ebu;
    return x ^ x >> 32;
}

/* 0 is the empty state. */
static uint64_t
merge(uint64_t a, uint64_t b)
{
    return a == 0 ? b : b == 0 ? a : mix(mix(1, a), b);
}

/* Which tokens of a leaf there are: sets of 64, one after the other. */
typedef struct tokens {
    uint64_t any, symbol;
} tokens_t;

static void
add_set(tokens_t *tokens, uint64_t set)
{
    tokens->any |= set;
    tokens->symbol = mix(tokens->symbol, set);
}

/* The state of a leaf: which row, which tokens, and in which page each of these lies. */
static uint64_t
leaf_symbol(uint64_t row, int64_t position, const tokens_t *tokens, uint64_t pages)
{
    return tokens->any == 0 ? 0 : mix(mix(mix(row, (uint64_t)position), tokens->symbol), pages);
}

/* ---- problems ---- */

typedef struct batch {
    attn_problem_t problem;
    attn_problem_entry_t entries[ENTRIES_MAX];
    attn_node_t nodes[NODES_MAX];
    attn_kv_run_t *runs[ENTRIES_MAX];
    uint32_t *pages[ENTRIES_MAX];
    uint32_t indptr[ENTRIES_MAX][HEADS_MAX + 1], listed[ENTRIES_MAX][HEADS_MAX * LISTED_MAX];
    uint32_t next_page;
} batch_t;

static uint32_t
pages_of_chunk(const batch_t *b)
{
    return (b->problem.chunk_size + b->problem.page_size - 1) / b->problem.page_size;
}

/* A sequence with pages of its own, but for a prefix of `common` pages of chunks of another. */
static void
add(batch_t *b, uint32_t length, uint32_t n_q, uint32_t from, uint32_t common)
{
    uint32_t e = b->problem.n++, size = b->problem.chunk_size, per = pages_of_chunk(b);
    uint32_t chunks = (length + size - 1) / size;

    b->runs[e]  = calloc(chunks, sizeof(**b->runs));
    b->pages[e] = calloc((size_t)chunks * per, sizeof(**b->pages));
    for (uint32_t i = 0; i < chunks * per; i++) {
        b->pages[e][i] = b->next_page++ * 7919u % 1000003u;
    }
    for (uint32_t c = 0; c < chunks; c++) {
        uint32_t tokens = length - c * size < size ? length - c * size : size;
        b->runs[e][c]   = (attn_kv_run_t){c, tokens, b->pages[e] + (size_t)c * per};
    }
    for (uint32_t c = 0; c < chunks && from < e && c < b->entries[from].n_runs; c++) {
        uint32_t n = common > c * per ? common - c * per : 0;
        memcpy(b->pages[e] + (size_t)c * per, b->pages[from] + (size_t)c * per,
               (n < per ? n : per) * sizeof(uint32_t));
    }
    b->entries[e] = (attn_problem_entry_t){
        .kv_length = length, .n_q = n_q, .n_runs = chunks, .runs = b->runs[e]};
}

/* Lists of pages for an entry: one, or one a head. */
static void
add_lists(batch_t *b, uint32_t e)
{
    attn_problem_entry_t *entry = &b->entries[e];
    uint32_t n = 0, pages = entry->n_runs * pages_of_chunk(b);

    entry->n_lists       = chance_in(0, 1) ? 1 : b->problem.kv_heads;
    entry->sparse_indptr = b->indptr[e];
    entry->sparse_pages  = b->listed[e];
    entry->dense_from    = entry->kv_length;
    if (chance_in(0, 1)) { /* in the midst of a listed page, now and then */
        entry->dense_from -=
            chance_in(1, entry->kv_length < 200 ? (uint32_t)entry->kv_length : 200);
    }
    for (uint32_t list = 0; list < entry->n_lists; list++) {
        b->indptr[e][list] = n;
        for (uint32_t page = chance_in(0, 30); page < pages && n < (list + 1) * LISTED_MAX;) {
            b->listed[e][n++] = page;
            page += chance_in(1, chance_in(1, 60));
        }
    }
    b->indptr[e][entry->n_lists] = n;
}

static void
make_batch(batch_t *b)
{
    static const uint32_t page_sizes[] = {1, 7, 16, 48, 64, 128, 100};

    *b                 = (batch_t){.problem = {.kv_heads   = chance_in(1, HEADS_MAX),
                                               .head_dim_k = 128,
                                               .head_dim_v = 128,
                                               .page_size  = page_sizes[chance_in(0, 6)],
                                               .chunk_size = 256u << chance_in(0, 4),
                                               .window     = chance_in(0, 4) ? 0 : chance_in(1, 2000),
                                               .causal     = chance_in(0, 4) > 0}};
    b->problem.q_heads = b->problem.kv_heads * chance_in(1, chance_in(1, 80));
    b->problem.entries = b->entries;
    for (uint32_t level = 0; level < NODES_MAX; level++) {
        b->nodes[level] = (attn_node_t){30, level};
    }
    for (uint32_t n = chance_in(1, chance_in(1, ENTRIES_MAX)), i = 0; i < n; i++) {
        uint32_t length = chance_in(1, chance_in(1, 8 * b->problem.chunk_size));
        uint32_t n_q    = chance_in(0, 4) > 0 ? 1 : chance_in(0, length < 150 ? length : 150);
        add(b, length, n_q, chance_in(0, 2) > 0 ? 0 : n, chance_in(1, 8 * pages_of_chunk(b)));
        if (chance_in(0, 5) == 0) {
            b->entries[i].nodes   = b->nodes;
            b->entries[i].n_nodes = NODES_MAX;
        }
        if (chance_in(0, 5) == 0) {
            add_lists(b, i);
        }
    }
}

static void
free_batch(batch_t *b)
{
    for (uint32_t i = 0; i < b->problem.n; i++) {
        free(b->runs[i]);
        free(b->pages[i]);
    }
}

/* ---- what the tree says ---- */

typedef struct node {
    uint64_t key, symbol;
} node_t;

/* Merge the states of one binary trie: ascending keys. */
static uint64_t
merge_trie(const node_t *nodes, uint32_t n)
{
    uint32_t cut = 1;

    if (n == 1) {
        return nodes[0].symbol;
    }
    uint32_t bit = 63u - (uint32_t)__builtin_clzll(nodes[0].key ^ nodes[n - 1].key);
    while (!(nodes[cut].key >> bit & 1)) {
        cut++;
    }
    return merge(merge_trie(nodes, cut), merge_trie(nodes + cut, n - cut));
}

static int
by_key(const void *a, const void *b)
{
    uint64_t x = ((const node_t *)a)->key, y = ((const node_t *)b)->key;
    return x < y ? -1 : x > y;
}

/* Is a token of a chunk attended to, as far as lists say? */
static bool
is_listed(const batch_t *b, uint32_t e, uint32_t kv_head, uint32_t chunk, uint32_t token)
{
    const attn_problem_entry_t *entry = &b->entries[e];
    uint32_t list                     = entry->n_lists > 1 ? kv_head : 0;
    uint32_t page                     = chunk * pages_of_chunk(b) + token / b->problem.page_size;

    if (entry->n_lists == 0 ||
        (uint64_t)chunk * b->problem.chunk_size + token >= entry->dense_from) {
        return true;
    }
    for (uint32_t i = entry->sparse_indptr[list]; i < entry->sparse_indptr[list + 1]; i++) {
        if (entry->sparse_pages[i] == page) {
            return true;
        }
    }
    return false;
}

/*
 * The leaves that works of an entry compute for a query. A tile's leaves are those that any of its
 * queries sees; for a single query that leaves the order of the tree as it is, for states of leaves
 * that it does not see are empty. So here they are known to be those of the whole tile.
 */
static uint32_t
leaves_of(const batch_t *b, uint32_t e, uint32_t leaf, uint32_t kv_head, uint64_t row,
          int64_t see_first, int64_t see_end, const attn_node_t *node, node_t *nodes)
{
    const attn_problem_entry_t *entry = &b->entries[e];
    uint32_t n = 0, leaves = b->problem.chunk_size / leaf;

    for (uint32_t r = 0; r < entry->n_runs; r++) {
        const attn_kv_run_t *run = &entry->runs[r];
        uint32_t chunk_key       = attn_tree_key(run->chunk);
        if (node != NULL && chunk_key >> node->level != node->index) {
            continue;
        }
        for (uint32_t first = 0; first < run->length; first += leaf) {
            int64_t position = (int64_t)run->chunk * b->problem.chunk_size + first;
            uint32_t end     = run->length - first < leaf ? run->length : first + leaf;
            uint64_t pages   = 0;
            tokens_t tokens  = {0};
            if (position + leaf <= see_first || position >= see_end) {
                continue;
            }
            for (uint32_t at = first; at < end; at += CUDA_LEAF) {
                uint64_t set = 0;
                for (uint32_t t = at; t < end && t < at + CUDA_LEAF; t++) {
                    if (is_listed(b, e, kv_head, run->chunk, t)) {
                        pages = mix(pages, (uint64_t)run->pages[t / b->problem.page_size] << 32 |
                                               t % b->problem.page_size);
                        set |= UINT64_C(1) << (t - at);
                    }
                }
                add_set(&tokens, set);
            }
            nodes[n++] = (node_t){(uint64_t)chunk_key * leaves + first / leaf,
                                  leaf_symbol(row, position, &tokens, pages)};
        }
    }
    qsort(nodes, n, sizeof(*nodes), by_key);
    return n;
}

/* ---- what the tables say ---- */

typedef struct stage {
    const batch_t *batch;
    const attn_plan_t *plan;
    cuda_image_t image;
    uint8_t *block;
    uint64_t *slots, *states; /* [image.slots]: what came there */
    uint64_t *answers;        /* [rows of o, then of states][q_heads] */
    uint8_t *given;
    uint64_t o_rows, rows;
} stage_t;

#define TABLE(stage, type, at) ((const type *)(const void *)((stage)->block + (at)))

/* A state on a stack; the level of the node with it and the one below, and the highest of those of
 * the states above the lowest, up to here. */
typedef struct held {
    uint64_t symbol;
    uint32_t level, highest;
} held_t;

typedef struct stack {
    uint32_t n, left;
    held_t held[STACK_MAX];
} stack_t;

/* attn_fold_pops() by levels, as kernels do it. */
static void
fold(stack_t *s, uint32_t next)
{
    while (s->n >= 2) {
        held_t *below = &s->held[s->n - 2], *top = &s->held[s->n - 1];
        uint32_t most = below->highest > s->left ? below->highest : s->left;
        if (top->level >= next || top->level >= most) {
            return;
        }
        below->symbol = merge(below->symbol, top->symbol);
        s->n--;
    }
}

static void
push(stack_t *s, uint64_t symbol, uint32_t level)
{
    fold(s, level);
    assert_in_range(s->n, 0, STACK_MAX - 1);
    uint32_t highest = 0;
    if (s->n > 0) {
        uint32_t below = s->held[s->n - 1].highest;
        highest        = below > level ? below : level;
    }
    s->held[s->n++] = (held_t){symbol, level, highest};
}

static void
answer(const stage_t *s, bool states, uint32_t at, uint32_t head, uint64_t symbol)
{
    uint64_t row = ((states ? s->o_rows : 0) + at) * s->plan->problem.q_heads + head;

    assert_in_range(row, 0, s->rows * s->plan->problem.q_heads - 1);
    assert_int_equal(s->given[row], 0);
    s->given[row]   = 1;
    s->answers[row] = symbol;
}

/* One row of a piece on its way. */
typedef struct row {
    const stage_t *stage;
    const cuda_piece_t *piece;
    uint64_t of; /* among the rows of q */
    uint32_t page_size;
    stack_t stack;
    uint32_t depth; /* that the stack may have */
} row_t;

/* Pages of the tokens of a set, from one on that lies in a place. */
static uint64_t
mix_pages(const row_t *row, uint64_t ids, uint32_t page, uint32_t offset, uint64_t set)
{
    const uint32_t *pages = TABLE(row->stage, uint32_t, row->stage->image.pages);

    for (; set != 0; set &= set - 1) {
        uint32_t t = offset + (uint32_t)__builtin_ctzll(set);
        ids = mix(ids, (uint64_t)pages[page + t / row->page_size] << 32 | t % row->page_size);
    }
    return ids;
}

/* Leaves of a piece; their token sets, of a tile. */
static void
play_leaves(row_t *row, const cuda_tile_t *tile)
{
    const stage_t *s          = row->stage;
    const cuda_piece_t *piece = row->piece;
    const bool sets           = tile != NULL && tile->present_at != CUDA_NONE;

    for (uint32_t i = 0; i < piece->n_leaves; i++) {
        cuda_leaf_t leaf = TABLE(s, cuda_leaf_t, s->image.leaves)[piece->leaf_first + i];
        uint64_t ids     = 0;
        if (i == 0) {
            assert_int_equal(piece->page, leaf.page);
            assert_int_equal(piece->tokens, leaf.tokens);
            assert_int_equal(piece->offset, leaf.offset);
        }
        tokens_t tokens = {0};
        for (uint32_t t = 0; t < leaf.tokens; t += CUDA_LEAF) {
            uint32_t n   = leaf.tokens - t < CUDA_LEAF ? leaf.tokens - t : CUDA_LEAF;
            uint64_t set = ~UINT64_C(0) >> (CUDA_LEAF - n);
            if (sets) {
                uint64_t at =
                    tile->present_at + (i * s->image.leaf_sets + t / CUDA_LEAF) * tile->n_lists;
                set = TABLE(s, uint64_t,
                            s->image.present)[at + (tile->n_lists > 1 ? tile->kv_head : 0)];
            }
            ids = mix_pages(row, ids, leaf.page, leaf.offset + t, set);
            add_set(&tokens, set);
        }
        push(&row->stack, leaf_symbol(row->of, leaf.position, &tokens, ids), leaf.level);
        assert_in_range(row->stack.n, 1, row->depth);
    }
}

/* Bundles of a piece: each begins with a leaf, has no gap, and no leaf that goes on in the next. */
static void
play_bundles(row_t *row)
{
    const stage_t *s = row->stage;
    const cuda_listed_t *block =
        TABLE(s, cuda_listed_t, s->image.blocks) + (uint64_t)row->piece->leaf_first * CUDA_WARPS;

    assert_in_range((row->piece->leaf_first + row->piece->n_leaves) * CUDA_WARPS, 0,
                    s->image.room.blocks);
    for (uint32_t i = 0; i < row->piece->n_leaves * CUDA_WARPS;) {
        const cuda_listed_t *first = &block[i];
        uint64_t ids = 0, set = 0;
        if (first->present == 0) { /* the rest of a bundle */
            assert_true(i % CUDA_WARPS > 0);
            assert_int_equal(first->level, 0);
            i++;
            continue;
        }
        assert_true(first->level > 0 && (i % CUDA_WARPS == 0 || block[i - 1].present != 0));
        do {
            uint32_t on = (uint32_t)block[i].position % CUDA_LEAF;
            assert_int_equal(on % CUDA_BLOCK, 0);
            assert_int_equal(block[i].position / (int32_t)CUDA_LEAF,
                             first->position / (int32_t)CUDA_LEAF);
            assert_true(&block[i] == first || block[i].position > block[i - 1].position);
            assert_true(block[i].offset < row->page_size);
            ids = mix_pages(row, ids, block[i].page, block[i].offset, block[i].present);
            set |= (uint64_t)block[i].present << on;
            i++;
        } while (i % CUDA_WARPS != 0 && block[i].level == 0 && block[i].present != 0);
        tokens_t tokens = {0};
        add_set(&tokens, set);
        push(&row->stack,
             leaf_symbol(row->of, first->position / (int32_t)CUDA_LEAF * (int32_t)CUDA_LEAF,
                         &tokens, ids),
             first->level);
        assert_in_range(row->stack.n, 1, row->depth);
    }
}

/* One row of a piece: a symbol a leaf, folded. tile: that the piece stands for, or NULL; depth: of
 * a stack. */
static void
play_row(const stage_t *s, const cuda_piece_t *piece, uint32_t row, const cuda_tile_t *tile,
         uint32_t depth)
{
    const cuda_query_t *query =
        TABLE(s, cuda_query_t, s->image.queries) + piece->query_first + row / piece->n_heads;
    uint32_t head  = piece->kv_head * s->plan->group + piece->head_first + row % piece->n_heads;
    row_t r        = {.stage     = s,
                      .piece     = piece,
                      .of        = (uint64_t)query->q_row * s->plan->problem.q_heads + head,
                      .page_size = s->plan->problem.page_size,
                      .stack     = {.left = piece->levels & 255},
                      .depth     = depth};
    stack_t *stack = &r.stack;

    if (piece->listed) {
        play_bundles(&r);
    } else {
        play_leaves(&r, tile);
    }
    fold(stack, piece->levels >> 8);
    if (piece->slot == CUDA_NONE) {
        assert_in_range(stack->n, 0, 1);
        answer(s, piece->states, query->answer, head, stack->n > 0 ? stack->held[0].symbol : 0);
    }
    for (uint32_t i = 0; piece->slot != CUDA_NONE && i < stack->n; i++) {
        uint64_t slot = piece->slot + (uint64_t)i * piece->rows + row;
        assert_in_range(slot, 0, s->image.slots - 1);
        assert_int_equal(s->slots[slot], 0);
        s->slots[slot]  = mix(2, stack->held[i].symbol); /* not 0, which is: nothing came */
        s->states[slot] = stack->held[i].symbol;
    }
}

/* A piece and those that follow it. Returns their leaves. */
static uint64_t
play_pieces(const stage_t *s, const cuda_class_t *c, uint32_t first)
{
    const cuda_piece_t *pieces = TABLE(s, cuda_piece_t, c->pieces);
    uint64_t leaves            = 0;

    for (uint32_t at = first; at != CUDA_NONE; at = pieces[at].next) {
        if (pieces[at].kv_head == CUDA_NONE) {
            break;
        }
        assert_in_range(pieces[at].rows, 1, c->rows);
        for (uint32_t row = 0; row < pieces[at].rows; row++) {
            play_row(s, &pieces[at], row, NULL, s->image.depth);
        }
        leaves += pieces[at].n_leaves > 0 ? pieces[at].n_leaves : 1;
    }
    return leaves;
}

/* The team that is done first takes what is next in the queue. */
static void
play_next(const stage_t *s, const cuda_class_t *c, uint32_t piece, uint64_t *done)
{
    uint32_t first = 0;

    for (uint32_t team = 1; team < c->grid * c->teams; team++) {
        first = done[team] < done[first] ? team : first;
    }
    done[first] += play_pieces(s, c, piece);
}

/* All pieces of a class, team by team. Returns the leaves of the busiest one. */
static uint64_t
play_class(const stage_t *s, uint32_t class, uint64_t *total)
{
    const cuda_class_t *c     = &s->image.classes[class];
    const cuda_queue_t *queue = TABLE(s, cuda_queue_t, s->image.queues) + class;
    const uint32_t teams      = c->grid * c->teams;
    uint64_t most             = 0, *done;

    done = calloc(teams + 1, sizeof(*done));
    assert_non_null(done);
    for (uint32_t team = 0; team < teams; team++) {
        done[team] = play_pieces(s, c, team);
        assert_true(queue->n == 0 || done[team] > 0); /* all teams draw */
    }
    assert_int_equal(queue->drawn, 0);
    assert_true(queue->n == 0 || (queue->first == teams && queue->teams == teams));
    for (uint32_t i = 0; i < queue->n; i++) {
        play_next(s, c, queue->first + i, done);
    }
    for (uint32_t team = 0; team < teams; team++) {
        most = done[team] > most ? done[team] : most;
        *total += done[team];
    }
    free(done);
    return most;
}

/* A tile is a piece, its first leaf besides; and its rows stand and see as it says. */
static void
play_tile(const stage_t *s, const cuda_tile_t *tile)
{
    const cuda_query_t *queries = TABLE(s, cuda_query_t, s->image.queries) + tile->query_first;
    const cuda_leaf_t *leaves   = TABLE(s, cuda_leaf_t, s->image.leaves) + tile->leaf_first;
    cuda_piece_t piece          = {.kv_head     = tile->kv_head,
                                   .leaf_first  = tile->leaf_first,
                                   .n_leaves    = tile->n_leaves,
                                   .page        = tile->leaf.page,
                                   .tokens      = tile->leaf.tokens,
                                   .offset      = tile->leaf.offset,
                                   .levels      = tile->levels,
                                   .slot        = tile->slot,
                                   .states      = tile->states,
                                   .query_first = tile->query_first,
                                   .rows        = tile->rows,
                                   .head_first  = tile->head_first,
                                   .n_heads     = tile->n_heads};
    const attn_problem_t *p     = &s->plan->problem;
    int32_t last                = tile->position + (int32_t)((tile->rows - 1) / tile->n_heads);

    assert_in_range(tile->rows, 1, CUDA_MANY_ROWS);
    if (tile->n_leaves > 0) {
        assert_memory_equal(&tile->leaf, leaves, sizeof(*leaves));
    }
    for (uint32_t row = 0; row < tile->rows; row++) {
        assert_int_equal(queries[row / tile->n_heads].position,
                         tile->position + (int32_t)(row / tile->n_heads));
        play_row(s, &piece, row, tile, s->image.many_depth);
    }
    assert_true(!p->causal || tile->see_end > last); /* the last row sees itself */
    assert_true(tile->see_first <= 0 ||
                (p->window > 0 && tile->see_first <= tile->position - (int64_t)p->window + 1));
}

/* All tiles, CTA by CTA: each comes once, and no CTA has much more to do than others. Of a steady
 * image CTAs may have nothing to do. */
static void
play_tiles(const stage_t *s, bool steady)
{
    const cuda_tile_t *tiles = TABLE(s, cuda_tile_t, s->image.many_tiles);

    for (uint32_t cta = 0; cta < s->image.many_grid; cta++) {
        bool idle = steady && tiles[cta].kv_head == CUDA_NONE;
        for (uint32_t at = cta; at != CUDA_NONE && !idle; at = tiles[at].next) {
            assert_true(tiles[at].next > at);
            play_tile(s, &tiles[at]);
        }
    }
}

static void
play_item(const stage_t *s, const cuda_item_t *item)
{
    const cuda_ref_t *refs = TABLE(s, cuda_ref_t, s->image.refs) + item->ref_first;

    assert_in_range(item->n_refs, 1, s->image.item_refs);
    assert_in_range(item->rows, 1, s->image.item_rows);
    for (uint32_t row = 0; row < item->rows; row++) {
        stack_t stack = {.left = 64};
        for (uint32_t i = 0; i < item->n_refs; i++) {
            assert_true(s->slots[refs[i].slot + row] != 0);
            push(&stack, s->states[refs[i].slot + row], refs[i].level);
        }
        fold(&stack, 65);
        assert_int_equal(stack.n, 1);
        answer(s, item->states, item->answer + row / item->n_heads,
               item->head + row % item->n_heads, stack.held[0].symbol);
    }
}

/* ---- both ---- */

/* Where the tile of a query begins and ends, as the planner makes tiles. */
static void
tile_of(const attn_plan_t *plan, uint32_t e, uint32_t q, uint32_t *first, uint32_t *n)
{
    for (uint32_t r = 0; r < plan->n_reductions; r++) {
        const attn_reduction_t *reduction = &plan->reductions[r];
        if (reduction->entry == e && q >= reduction->q_first &&
            q < reduction->q_first + reduction->n_q) {
            *first = reduction->q_first;
            *n     = reduction->n_q;
            return;
        }
    }
    fail();
}

static void
check_entry(const stage_t *s, uint32_t e, node_t *nodes)
{
    const attn_problem_t *p           = &s->plan->problem;
    const attn_problem_entry_t *entry = &p->entries[e];
    uint32_t parts                    = entry->n_nodes == 0 ? 1 : entry->n_nodes;

    for (uint32_t i = 0; i < entry->n_q * parts; i++) {
        uint32_t q = i % entry->n_q, part = i / entry->n_q, first = 0, n_q = 0;
        tile_of(s->plan, e, q, &first, &n_q);
        int64_t position = (int64_t)entry->kv_length - entry->n_q + first;
        int64_t from     = p->window > 0 ? position - (int64_t)p->window + 1 : 0;
        int64_t to       = p->causal ? position + n_q : (int64_t)entry->kv_length;
        uint64_t row     = s->plan->entries[e].o_row + q;
        if (entry->n_nodes > 0) {
            row = s->o_rows + s->plan->entries[e].state / p->q_heads + i;
        }
        for (uint32_t head = 0; head < p->q_heads; head++) {
            uint64_t of = (s->plan->entries[e].q_row + q) * p->q_heads + head;
            uint32_t n =
                leaves_of(s->batch, e, s->plan->entries[e].leaf_tokens, head / s->plan->group, of,
                          from, to, entry->n_nodes > 0 ? &entry->nodes[part] : NULL, nodes);
            assert_int_equal(s->given[row * p->q_heads + head], 1);
            assert_int_equal(s->answers[row * p->q_heads + head], n > 0 ? merge_trie(nodes, n) : 0);
        }
    }
}

/* Pieces of a class of a batch are as even as cuts at subtrees let them be. */
static void
check_even(const stage_t *s, uint32_t class, uint64_t most, uint64_t total)
{
    const cuda_class_t *c = &s->image.classes[class];
    uint64_t teams        = (uint64_t)c->grid * c->teams;

    if (c->grid > 0) {
        assert_in_range(most, 0, total / teams + 2 + total / teams / 4); /* a grain more */
    }
}

/* A room that holds the image and, now and then, much more of everything. */
static cuda_room_t
some_room(const cuda_image_t *image)
{
    cuda_room_t more = image->room;

    if (chance_in(0, 1)) {
        more.leaves *= chance_in(1, 3), more.queries *= chance_in(1, 3), more.refs += 1000;
        more.blocks *= chance_in(1, 3), more.items += chance_in(0, 1) * 70, more.pages *= 2,
            more.slots += 5000;
        more.item_refs += chance_in(0, 1) * 40, more.depth += 3;
        more.tiles *= chance_in(1, 3), more.many_depth += chance_in(0, 3);
        for (uint32_t c = 0; c < CUDA_CLASSES; c++) {
            more.pieces[c] += chance_in(0, 1) * 600;
        }
    }
    cuda_room_t room = cuda_room_above(&more);
    assert_true(cuda_room_holds(&room, &image->room) && cuda_room_holds(&room, &more));
    room.leaves = image->room.leaves - 1;
    assert_false(cuda_room_holds(&room, &image->room) && image->room.leaves > 0);
    return cuda_room_above(&more);
}

/* What of an image in a room is not looked at by play_item(): nothing to be done. */
static void
check_idle_items(const stage_t *s, uint32_t n)
{
    for (uint32_t i = n; i < s->image.n_items; i++) {
        assert_int_equal(TABLE(s, cuda_item_t, s->image.items)[i].rows, 0);
    }
}

/* many: the leaf size of requests of many rows; steady: as for a graph, in memory that held other
 * tables before. */
static void
check_image(const batch_t *b, uint32_t ctas, uint32_t many, bool steady, cuda_image_t *image)
{
    stage_t s = {.batch = b};
    attn_plan_t *plan;
    uint64_t leaves = 16;

    assert_int_equal(attn_plan_build(&b->problem, 1, CUDA_LEAF, many, &plan), ATTN_OK);
    assert_int_equal((steady ? cuda_image_build_steady : cuda_image_build)(plan, ctas, image),
                     ATTN_OK);
    uint32_t n_items = image->n_items;
    if (steady) {
        cuda_room_t room = some_room(image);
        assert_true(room.tiles == 0 || image->room.tiles >= ctas); /* one for each of them */
        cuda_image_place(image, &room, ctas);
    }
    s.plan  = plan;
    s.image = *image;
    s.block = malloc(image->bytes + 1);
    memset(s.block, 0x5a, image->bytes + 1);
    cuda_image_write(image, s.block);
    check_idle_items(&s, n_items);
    s.o_rows = plan->o_rows;
    s.rows   = plan->o_rows + plan->states / b->problem.q_heads;
    s.slots  = calloc(image->slots + 1, sizeof(*s.slots));
    s.states = calloc(image->slots + 1, sizeof(*s.states));
    for (uint32_t e = 0; e < b->problem.n; e++) {
        uint64_t n = b->entries[e].kv_length / CUDA_LEAF + 1;
        leaves     = n > leaves ? n : leaves;
    }
    s.answers     = calloc(s.rows * b->problem.q_heads + 1, sizeof(*s.answers));
    s.given       = calloc(s.rows * b->problem.q_heads + 1, 1);
    node_t *nodes = calloc(leaves, sizeof(*nodes));
    for (uint32_t class = 0; class < CUDA_CLASSES; class ++) {
        uint64_t total = 0, most = play_class(&s, class, &total);
        if (!steady || total > 0) {
            check_even(&s, class, most, total);
        }
        assert_true(!steady || s.image.classes[class].grid == ctas ||
                    s.image.classes[class].grid == 0);
    }
    assert_true(!steady || s.image.many_grid == ctas || s.image.many_grid == 0);
    play_tiles(&s, steady);
    for (uint32_t i = 0; i < n_items; i++) {
        play_item(&s, TABLE(&s, cuda_item_t, image->items) + i);
    }
    for (uint32_t e = 0; e < b->problem.n; e++) {
        check_entry(&s, e, nodes);
    }
    free(nodes);
    free(s.block);
    free(s.slots);
    free(s.states);
    free(s.answers);
    free(s.given);
    attn_plan_free(plan);
}

static void
test_rows_are_what_the_tree_says(void **state)
{
    cuda_image_t image = {0}; /* each is made in the memory of the one before */
    (void)state;

    for (int round = 0; round < 25; round++) {
        batch_t b;
        make_batch(&b);
        check_image(&b, chance_in(0, 2) ? chance_in(1, 40) : 132, CUDA_LEAF, false, &image);
        check_image(&b, chance_in(0, 2) ? chance_in(1, 40) : 132, CUDA_LEAF, true, &image);
        free_batch(&b);
    }
    cuda_image_free(&image);
}

/* The same, with a leaf size of their own for requests of many rows: these become tiles. */
static void
test_rows_of_tiles_are_what_the_tree_says(void **state)
{
    cuda_image_t image = {0};
    uint32_t grids     = 0;
    (void)state;

    for (int round = 0; round < 25; round++) {
        batch_t b;
        make_batch(&b);
        uint32_t many = 128u << chance_in(0, 6);
        check_image(&b, chance_in(0, 2) ? chance_in(1, 40) : 132, many, false, &image);
        grids += image.many_grid;
        check_image(&b, chance_in(0, 2) ? chance_in(1, 40) : 132, many, true, &image);
        free_batch(&b);
    }
    assert_true(grids > 100);
    cuda_image_free(&image);
}

/* Of two long sequences, which tile is dealt when, and what it reads: tiles that read the same K
 * and V follow each other, so that what is read at once is no more than an L2 keeps; and CTAs have
 * as much to do. */
static void
test_tiles_that_read_the_same_follow_each_other(void **state)
{
    enum { HEADS = 4, CTAS = 132, PART = 20 << 20 };
    batch_t b          = {.problem = {.entries    = b.entries,
                                      .q_heads    = 4 * HEADS,
                                      .kv_heads   = HEADS,
                                      .head_dim_k = 128,
                                      .head_dim_v = 128,
                                      .page_size  = 16,
                                      .chunk_size = 8192,
                                      .causal     = true}};
    cuda_image_t image = {0};
    attn_plan_t *plan;
    uint32_t last[2 * HEADS] = {0}, first[2 * HEADS], pages[2] = {0, CUDA_NONE};
    uint64_t work[CTAS] = {0}, most = 0, total = 0, bytes[2 * HEADS] = {0};
    (void)state;

    add(&b, 9000, 9000, 0, 0);
    add(&b, 30000, 30000, 1, 0);
    assert_int_equal(attn_plan_build(&b.problem, 1, CUDA_LEAF, 8192, &plan), ATTN_OK);
    assert_int_equal(cuda_image_build(plan, CTAS, &image), ATTN_OK);
    uint8_t *block = malloc(image.bytes);
    cuda_image_write(&image, block);
    const cuda_tile_t *tiles = (const void *)(block + image.many_tiles);
    uint32_t n               = 0;
    memset(first, 0xff, sizeof(first));
    for (uint32_t cta = 0; cta < CTAS; cta++) {
        for (uint32_t at = cta; at != CUDA_NONE; at = tiles[at].next, n++) {
            uint32_t e      = tiles[at].leaf.page != pages[0];
            uint32_t head   = e * HEADS + tiles[at].kv_head;
            uint64_t tokens = (uint64_t)tiles[at].see_end;
            assert_true(e == 0 || pages[1] == CUDA_NONE || tiles[at].leaf.page == pages[1]);
            pages[1]    = e == 0 ? pages[1] : tiles[at].leaf.page;
            first[head] = at < first[head] ? at : first[head];
            last[head]  = at > last[head] ? at : last[head];
            bytes[head] = tokens * 512 > bytes[head] ? tokens * 512 : bytes[head];
            work[cta] += tokens + 192;
        }
        total += work[cta];
        most = work[cta] > most ? work[cta] : most;
    }
    assert_in_range(most, total / CTAS, total / CTAS + total / CTAS / 50);
    for (uint32_t at = 0; at < n; at++) {
        uint64_t open = 0, heads = 0;
        for (uint32_t head = 0; head < 2 * HEADS; head++) {
            bool is_open = first[head] <= at && at <= last[head];
            open += is_open ? bytes[head] : 0;
            heads += is_open;
        }
        assert_true(heads == 1 || open <= PART);
        assert_true(heads > 0);
    }
    assert_true(first[HEADS] == 0); /* the longer one begins */
    free(block);
    cuda_image_free(&image);
    attn_plan_free(plan);
    free_batch(&b);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_what_the_tree_says),
        cmocka_unit_test(test_rows_of_tiles_are_what_the_tree_says),
        cmocka_unit_test(test_tiles_that_read_the_same_follow_each_other),
    };
    return cmocka_run_group_tests_name("conformance.image", tests, NULL, NULL);
}
