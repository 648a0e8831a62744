/*
 * plan.h: from the lengths and page lists of a batch, who computes what: one plan for
 * all layers with the same window and causality. A pure function; any thread.
 */
#ifndef ATTN_BALANCER_PLAN_H
#define ATTN_BALANCER_PLAN_H

#include "kernels/kernels.h"

/** A query stands at a position below this, so that distances fit in 32 bits. */
#define ATTN_PLAN_LENGTH_MAX ((UINT64_C(1) << 31) - 1)

/** Queries of one problem, all entries together. */
#define ATTN_PLAN_QUERIES_MAX (UINT64_C(1) << 28)

/**
 * Plan a batch. Work is cut so that `parallelism` threads finish together, and no finer
 * than pays. Entries with the same pages share the reading of whole leaves.
 *
 * @param problem      the struct is copied; entries, runs, page lists, nodes and sparse
 *                     lists are pointed to: they stay as they are until attn_plan_free()
 * @param parallelism  threads or CTAs to cut for, at least 1: has no influence on any bit
 * @param few, many    the backend's leaf sizes
 *
 * @return ATTN_ERR_INVALID    names entry and field
 * @return ATTN_ERR_TOO_LARGE  a length above ATTN_PLAN_LENGTH_MAX, or too many queries
 * @return ATTN_ERR_NO_MEMORY
 */
attn_status_t attn_plan_build(const attn_problem_t *problem, uint32_t parallelism, uint32_t few,
                              uint32_t many, attn_plan_t **plan_p);

/**
 * The same, in the memory of a plan that is not needed any more: *plan_p, or NULL. From one step of
 * a batch to the next it allocates nothing. On failure *plan_p is to be freed as before, but it is
 * no plan any more.
 */
attn_status_t attn_plan_renew(const attn_problem_t *problem, uint32_t parallelism, uint32_t few,
                              uint32_t many, attn_plan_t **plan_p);

/** Bytes of memory that a plan, and what it was made with, takes up. */
uint64_t attn_plan_bytes(const attn_plan_t *plan);

/** NULL is allowed. */
void attn_plan_free(attn_plan_t *plan);

typedef struct attn_plan_info {
    uint64_t queries; /**< rows of q */
    uint64_t o_rows;  /**< rows of o and lse: queries of the entries that answer with O */
    uint64_t states;  /**< states of a, l, e: over entries with nodes, nodes x n_q x q_heads */
    uint32_t works;   /**< each is one task per KV head */
    uint32_t split;   /**< results that are put together from several works */
    uint64_t shared_leaves; /**< leaves, of one head, that are read once instead of once more per
                               entry */
    uint64_t cost;          /**< in packed rows x tokens, roughly, one head */
    uint64_t largest_cost;  /**< of a work, one head */
} attn_plan_info_t;

void attn_plan_describe(const attn_plan_t *plan, attn_plan_info_t *info);

#endif
