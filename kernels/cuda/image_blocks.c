/*
 * What lists leave of a work's leaves: blocks of 16 tokens of which a list has something, ascending
 * in key, four to a bundle. Leaves without any are not there, for they are empty states, which
 * merge into nothing; so a team's time goes by what is listed. A leaf's blocks stay together: where
 * the rest of a bundle is too small for them it stays empty.
 */
#include "kernels/cuda/image_int.h"

#include "base/checked.h"

#include <assert.h>

/* A list on its way into blocks. */
typedef struct packer {
    builder_t *b;
    const attn_problem_entry_t *entry;
    uint32_t list;
    extent_t *to;
    /* Of the span at hand: */
    uint64_t key;        /* of leaf 0 of the run */
    int64_t start;       /* position of the chunk's first token */
    uint32_t table;      /* where the run's pages are in the page table */
    uint32_t dense, end; /* tokens of the chunk from which on all count, and which no longer */
    /* The leaf at hand, and its blocks so far. */
    uint32_t leaf, n;
    cuda_listed_t blocks[CUDA_WARPS];
} packer_t;

/* Blocks of nothing up to the end of a bundle. */
static void
fill_bundle(builder_t *b)
{
    while (b->blocks.n % CUDA_WARPS != 0) {
        b->blocks.at[b->blocks.n++] = (cuda_listed_t){0};
    }
}

/* The leaf at hand to the bundle, or the next one. */
static void
put_leaf(packer_t *p)
{
    builder_t *b = p->b;
    uint64_t key = p->key | p->leaf, first = p->to->leaf_first * (uint64_t)CUDA_WARPS;

    if (p->n == 0 || !RESERVE(b, b->blocks, 2 * CUDA_WARPS)) {
        p->n = 0;
        return;
    }
    if (b->blocks.n % CUDA_WARPS + p->n > CUDA_WARPS) {
        fill_bundle(b);
    }
    if (b->blocks.n == first) {
        p->blocks[0].level = ATTN_LEVEL_NONE;
        p->to->first_key   = key;
    } else {
        p->blocks[0].level = attn_key_lca(p->to->last_key, key);
    }
    for (uint32_t i = 0; i < p->n; i++) {
        b->blocks.at[b->blocks.n++] = p->blocks[i];
    }
    p->to->last_key = key;
    p->n            = 0;
}

/* Tokens of the chunk that are listed, behind all those before. */
static void
add_tokens(packer_t *p, uint32_t first, uint32_t end)
{
    const uint32_t size = p->b->plan->problem.page_size;

    for (uint32_t at = first / CUDA_BLOCK * CUDA_BLOCK; at < end; at += CUDA_BLOCK) {
        uint32_t from  = at < first ? first - at : 0;
        uint32_t to    = (uint32_t)attn_min(end - at, CUDA_BLOCK);
        uint16_t bits  = (uint16_t)((1u << to) - (1u << from));
        int32_t stands = (int32_t)(p->start + at);
        if (p->n > 0 && at / CUDA_LEAF != p->leaf) {
            put_leaf(p);
        }
        p->leaf = at / CUDA_LEAF;
        if (p->n > 0 && p->blocks[p->n - 1].position == stands) {
            p->blocks[p->n - 1].present |= bits;
        } else {
            assert(p->n < CUDA_WARPS);
            p->blocks[p->n++] = (cuda_listed_t){.page     = p->table + at / size,
                                                .position = stands,
                                                .present  = bits,
                                                .offset   = (uint16_t)(at % size)};
        }
    }
}

/* The first of a list's pages that is not before one of the sequence. */
static uint32_t
first_listed(const attn_problem_entry_t *entry, uint32_t list, uint64_t page)
{
    uint32_t low = entry->sparse_indptr[list], high = entry->sparse_indptr[list + 1];

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (entry->sparse_pages[middle] < page) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* What the list has of the span's leaves. */
static void
add_span(packer_t *p, uint32_t first)
{
    const attn_problem_t *problem = &p->b->plan->problem;
    const uint32_t size = problem->page_size, stop = p->entry->sparse_indptr[p->list + 1];
    const uint64_t base = (uint64_t)p->start / problem->chunk_size *
                          attn_div_up(problem->chunk_size, size); /* the chunk's first page */

    for (uint32_t i = first_listed(p->entry, p->list, base + first / size); i < stop; i++) {
        uint64_t from = (p->entry->sparse_pages[i] - base) * size;
        uint64_t to   = attn_min(from + size, p->dense);
        if (from >= p->dense) {
            break;
        }
        add_tokens(p, (uint32_t)attn_max(from, first), (uint32_t)to);
    }
    if (p->dense < p->end) {
        add_tokens(p, (uint32_t)attn_max(p->dense, first), p->end);
    }
    put_leaf(p);
}

void
image_add_blocks(builder_t *b, const attn_work_t *work, uint32_t list, extent_t *to)
{
    const attn_member_t *member = &b->plan->members[work->member_first];
    packer_t p                  = {
                         .b = b, .entry = &b->plan->problem.entries[member->entry], .list = list, .to = to};
    attn_walk_t walk;

    assert(work->n_members == 1 && work->n_out == 0); /* nothing of it is shared, nor cut */
    to->leaf_first = (uint32_t)(b->blocks.n / CUDA_WARPS);
    attn_walk_init(&walk, b->plan, work);
    for (; walk.span < work->n_spans && !b->no_memory; walk.span++) {
        attn_walk_span(&walk);
        if (walk.leaf >= walk.leaf_end) {
            continue;
        }
        uint32_t index           = work->span_first + walk.span;
        const attn_kv_run_t *run = &p.entry->runs[b->plan->spans[index].run];
        p.key                    = attn_leaf_key(walk.entry, run->chunk, 0);
        p.start                  = (int64_t)run->chunk * b->plan->problem.chunk_size;
        p.table                  = image_place_pages(b, index, run);
        p.end   = (uint32_t)attn_min((uint64_t)walk.leaf_end * CUDA_LEAF, run->length);
        p.dense = p.entry->dense_from <= (uint64_t)p.start
                      ? 0
                      : (uint32_t)attn_min(p.entry->dense_from - (uint64_t)p.start, p.end);
        add_span(&p, walk.leaf * CUDA_LEAF);
    }
    fill_bundle(b);
    to->n_leaves = (uint32_t)(b->blocks.n / CUDA_WARPS) - to->leaf_first;
}

uint32_t
image_fold_blocks(const builder_t *b, const extent_t *extent, uint32_t from, uint32_t end,
                  uint32_t left, uint32_t right, left_states_t *states)
{
    const cuda_listed_t *block = b->blocks.at + (uint64_t)(extent->leaf_first + from) * CUDA_WARPS;
    uint64_t waits             = 0; /* bit i: a state waits on level i + 1 */
    uint32_t depth             = 1;

    states->n         = 1;
    states->levels[0] = block->level;
    for (uint32_t i = 1; i < (end - from) * CUDA_WARPS; i++) {
        const uint32_t level = block[i].level;
        if (level == 0) { /* of the same leaf, or nothing */
            continue;
        }
        while (waits != 0 && (uint32_t)__builtin_ctzll(waits) + 1 < level) {
            waits &= waits - 1;
        }
        if (waits == 0 && level >= left) {
            states->levels[states->n++] = left = level;
        } else {
            waits |= UINT64_C(1) << (level - 1);
            depth = (uint32_t)attn_max(depth, 1 + (uint64_t)__builtin_popcountll(waits));
        }
    }
    while (waits != 0 && (uint32_t)__builtin_ctzll(waits) + 1 < right) {
        waits &= waits - 1;
    }
    for (; waits != 0; waits &= ~(UINT64_C(1) << (63 - __builtin_clzll(waits)))) {
        states->levels[states->n++] = 64u - (uint32_t)__builtin_clzll(waits);
    }
    return depth;
}
