/*
 * plan_types.h: what a plan holds. Made by balancer/plan.c, read by backends.
 *
 * The partials of a query row go up one fixed binary trie. A leaf's place in it is a
 * 64-bit key: the key of its chunk (attn_tree_key), then the leaf's number in the chunk.
 *
 *     entry      spans: ranges of leaves of its runs, ascending in key
 *     reduction  one (entry, node, tile of queries): all its leaves become one state
 *     work       a range of leaves and the rows that read them: one member with a tile of
 *                queries, or several entries with the same pages
 *     part       what a work has to say to a reduction: states of maximal subtrees
 *
 * Each work stands for kv_heads tasks, one a head. A work that covers a whole reduction
 * writes through; the parts of the others meet in the workspace, where whoever brings
 * the last part folds them. Which work computes a leaf has no influence on any bit.
 */
#ifndef ATTN_KERNELS_PLAN_TYPES_H
#define ATTN_KERNELS_PLAN_TYPES_H

#include "kernels/kernels.h"

/** Levels of the trie: 32 above chunks, at most 20 inside one. */
#define ATTN_LEVEL_NONE 64u /* above every node: nothing stands in the way */

/** Deepest stack of a fold: a level may hold a state on either side of a range. */
#define ATTN_FOLD_DEPTH 108u

/** Requests of up to so many packed rows (queries x heads of a group) take the few-row leaf, and
 * may take arithmetic of their own. All members of a work are of one sort. */
#define ATTN_FEW_ROWS 64u

/** No work has more packed rows ... */
#define ATTN_WORK_ROWS 64u

/** ... of entries that share a prefix so many, where larger requests have kernels of their own:
 * those for few rows are fastest with no more. */
#define ATTN_SHARED_ROWS 32u

/** ... but those of larger requests, where these have a leaf size of their own: a backend with one
 * has kernels for so many rows. */
#ifndef ATTN_MANY_ROWS
#define ATTN_MANY_ROWS 128u
#endif

/** Leaves leaf_first to leaf_end - 1 of run `run` of an entry. */
typedef struct attn_span {
    uint32_t run;
    uint32_t leaf_first, leaf_end;
    uint32_t set; /**< the planner's: who shares it */
} attn_span_t;

/** What the plan knows of an entry besides the problem. */
typedef struct attn_plan_entry {
    bool few; /**< at most ATTN_FEW_ROWS packed rows, by the request's own shape */
    uint32_t leaf_tokens;
    uint32_t leaf_bits; /**< log2 of leaves in a chunk */
    uint64_t q_row;     /**< of its first query among all queries of the problem */
    uint64_t o_row;     /**< among the queries that are answered with O, if n_nodes is 0 */
    uint64_t state;     /**< its first state in the answer's partials, if not */
} attn_plan_entry_t;

/** An entry that takes part in a work. */
typedef struct attn_member {
    uint32_t entry;
    uint32_t row_first; /**< its first packed row in the work */
    uint32_t reduction;
} attn_member_t;

typedef struct attn_work {
    uint32_t member_first, n_members;
    uint32_t rows;                /**< packed: of all members, queries x n_heads */
    uint32_t q_first, n_q;        /**< queries of the member; all of each if n_members > 1 */
    uint32_t head_first, n_heads; /**< heads of the group */
    uint32_t span_first, n_spans; /**< of the first member ... */
    uint32_t leaf_first;          /**< ... from this leaf of the first span */
    uint32_t leaf_end;            /**< ... up to, not with, this leaf of the last */
    uint32_t left_level;          /**< nodes of this level and above hold leaves before the range */
    uint32_t right_level;         /**< likewise after the range */
    uint32_t key_first, n_out;    /**< states for the workspace and their keys; 0: writes through */
    uint64_t slot; /**< its first state row in the workspace: [kv_heads][n_out][rows] */
    int64_t see_first, see_end; /**< positions that its rows can see: other leaves are skipped */
    uint64_t cost;              /**< of one head, in the planner's units */
} attn_work_t;

typedef struct attn_part {
    uint32_t work;
    uint32_t row_first; /**< of the reduction's rows in the work */
} attn_part_t;

typedef struct attn_reduction {
    uint32_t entry;
    uint32_t node; /**< index into the entry's nodes */
    uint32_t q_first, n_q;
    uint32_t head_first, n_heads;
    uint32_t part_first, n_parts; /**< ascending in key */
    uint32_t counter;             /**< index of its counters in the workspace; of split ones only */
} attn_reduction_t;

struct attn_plan {
    attn_problem_t problem; /**< points to the caller's entries, runs and page lists */
    uint32_t group;         /**< query heads of a KV head */
    uint32_t few, many;
    attn_plan_entry_t *entries; /**< [problem.n] */
    attn_span_t *spans;
    attn_member_t *members;
    attn_work_t *works;           /**< [n_works] */
    uint32_t *order;              /**< [n_works] longest first */
    attn_reduction_t *reductions; /**< [n_reductions] */
    attn_part_t *parts;
    uint64_t *keys; /**< of the states in the workspace */
    uint32_t n_works, n_reductions, n_counters;
    uint32_t max_rows;  /**< packed rows of the largest work */
    uint32_t max_depth; /**< states that a fold holds at most */
    uint32_t max_leaf;  /**< tokens of the largest leaf */
    uint64_t slots;     /**< state rows in the workspace */
    uint64_t cost;      /**< of all works, one head */
    uint64_t n_queries, o_rows, states;
    uint64_t shared_leaves;
    bool masked; /**< an entry has a mask */
};

/* ---- keys and folds ---- */

static inline uint64_t
attn_leaf_key(const attn_plan_entry_t *entry, uint32_t chunk, uint32_t leaf)
{
    return (uint64_t)attn_tree_key(chunk) << entry->leaf_bits | leaf;
}

/** Level of the lowest node with both leaves: 0 if they are the same. */
static inline uint32_t
attn_key_lca(uint64_t a, uint64_t b)
{
    return a == b ? 0 : 64u - (uint32_t)__builtin_clzll(a ^ b);
}

/**
 * Merge states that come in ascending key along the trie. The owner of the states keeps
 * a stack beside this one: before a state with key k is pushed, and at the end with the
 * range's right level, as long as attn_fold_pops() says so it merges its topmost state
 * into the one below. What is left at the end are the maximal subtrees of the range.
 */
typedef struct attn_fold {
    uint64_t keys[ATTN_FOLD_DEPTH];
    uint32_t n;
    uint32_t left; /**< level from which on nodes hold leaves before the range */
} attn_fold_t;

static inline void
attn_fold_init(attn_fold_t *fold, uint32_t left_level)
{
    fold->n    = 0;
    fold->left = left_level;
}

/** Do the two topmost merge before what comes at `next_level` above the topmost? If so they are one
 * now. */
static inline bool
attn_fold_pops(attn_fold_t *fold, uint32_t next_level)
{
    if (fold->n < 2) {
        return false;
    }
    uint64_t below = fold->keys[fold->n - 2];
    uint32_t level = attn_key_lca(below, fold->keys[fold->n - 1]);
    uint32_t first = attn_key_lca(fold->keys[0], below);
    if (level >= next_level || level >= (first > fold->left ? first : fold->left)) {
        return false;
    }
    fold->n--;
    return true;
}

static inline uint32_t
attn_fold_level(const attn_fold_t *fold, uint64_t key)
{
    return fold->n == 0 ? ATTN_LEVEL_NONE : attn_key_lca(fold->keys[fold->n - 1], key);
}

static inline void
attn_fold_push(attn_fold_t *fold, uint64_t key)
{
    fold->keys[fold->n++] = key;
}

/* ---- the leaves of a work ---- */

/** One leaf as a walk finds it. */
typedef struct attn_leaf {
    const attn_kv_run_t *run;
    uint64_t key;
    int64_t position; /**< of its first token in the sequence */
    uint32_t first;   /**< the same, in its chunk */
    uint32_t tokens;
} attn_leaf_t;

typedef struct attn_walk {
    const attn_plan_t *plan;
    const attn_work_t *work;
    const attn_plan_entry_t *entry;
    const attn_kv_run_t *runs;
    uint32_t span; /**< of the work: 0 to n_spans - 1 */
    uint32_t leaf, leaf_end;
} attn_walk_t;

static inline void
attn_walk_span(attn_walk_t *walk)
{
    const attn_work_t *work = walk->work;
    const attn_span_t *span = &walk->plan->spans[work->span_first + walk->span];
    int64_t start           = (int64_t)walk->runs[span->run].chunk * walk->plan->problem.chunk_size;
    int64_t tokens          = walk->entry->leaf_tokens;
    uint32_t first          = walk->span == 0 ? work->leaf_first : span->leaf_first;
    uint32_t end            = walk->span == work->n_spans - 1 ? work->leaf_end : span->leaf_end;

    /* Only leaves with a position in see_first to see_end - 1. */
    if (work->see_first > start + first * tokens) {
        first =
            (uint32_t)((work->see_first - start) / tokens < end ? (work->see_first - start) / tokens
                                                                : end);
    }
    if (work->see_end < start + end * tokens) {
        end =
            work->see_end <= start ? 0 : (uint32_t)((work->see_end - start + tokens - 1) / tokens);
    }
    walk->leaf     = first;
    walk->leaf_end = end;
}

static inline void
attn_walk_init(attn_walk_t *walk, const attn_plan_t *plan, const attn_work_t *work)
{
    uint32_t entry = plan->members[work->member_first].entry;

    *walk = (attn_walk_t){.plan  = plan,
                          .work  = work,
                          .entry = &plan->entries[entry],
                          .runs  = plan->problem.entries[entry].runs};
    if (work->n_spans > 0) {
        attn_walk_span(walk);
    }
}

/** The next leaf, ascending in key; false at the end. */
static inline bool
attn_walk_next(attn_walk_t *walk, attn_leaf_t *leaf)
{
    if (walk->work->n_spans == 0) {
        return false;
    }
    while (walk->leaf >= walk->leaf_end) {
        if (++walk->span >= walk->work->n_spans) {
            walk->span = walk->work->n_spans - 1;
            return false;
        }
        attn_walk_span(walk);
    }
    const attn_span_t *span = &walk->plan->spans[walk->work->span_first + walk->span];
    leaf->run               = &walk->runs[span->run];
    leaf->first             = walk->leaf * walk->entry->leaf_tokens;
    leaf->tokens            = leaf->run->length - leaf->first;
    leaf->tokens =
        leaf->tokens < walk->entry->leaf_tokens ? leaf->tokens : walk->entry->leaf_tokens;
    leaf->position = (int64_t)leaf->run->chunk * walk->plan->problem.chunk_size + leaf->first;
    leaf->key      = attn_leaf_key(walk->entry, leaf->run->chunk, walk->leaf);
    walk->leaf++;
    return true;
}

#endif
