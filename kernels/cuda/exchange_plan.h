/*
 * exchange_plan.h: from a batch whose states lie on several ranks to what each rank does with them.
 * Host code; no driver calls.
 *
 * Rows are the pairs (query, head) of all entries, one after the other: row r of an entry is query
 * r / heads, head r % heads. Which of them a rank finishes: groups.h. Every rank works its own
 * tables out of the same batch; lines are numbered alike by who writes and who reads them.
 */
#ifndef ATTN_KERNELS_CUDA_EXCHANGE_PLAN_H
#define ATTN_KERNELS_CUDA_EXCHANGE_PLAN_H

#include "kernels/cuda/exchange.h"
#include "kernels/kernels.h"

_Static_assert(CUDA_RANKS == ATTN_RANKS_MAX, "a group's ranks are the exchange's");

typedef struct cuda_exchange_batch {
    uint32_t ranks, me;
    uint32_t q_heads, head_dim_v;
    uint32_t n;
    const attn_group_entry_t *entries;
    uint64_t half; /**< bytes of a half of each rank's inbox, the same on all */
} cuda_exchange_batch_t;

/** Zeros before the first plan. The tables' memory is kept from plan to plan. */
typedef struct cuda_exchange_plan {
    cuda_send_t *sends;
    cuda_exchange_row_t *rows;
    cuda_exchange_part_t *parts;
    uint64_t n_sends, n_rows, n_parts;
    uint64_t row_first; /**< of the share, among all rows */
    uint64_t rows_all;
    uint32_t depth; /**< states that a row's stack holds */
    uint64_t room[3];
} cuda_exchange_plan_t;

/**
 * The tables of rank batch->me.
 *
 * @return ATTN_ERR_INVALID    ranks, head dim or heads out of range, or two ranks have a node in
 *                             common
 * @return ATTN_ERR_TOO_LARGE  some rank's lines do not fit in half of its inbox (all ranks say so
 *                             of the same batch, before they make any tables), or more rows or
 *                             states than 32 bits number
 * @return ATTN_ERR_NO_MEMORY
 */
attn_status_t cuda_exchange_plan(const cuda_exchange_batch_t *batch, cuda_exchange_plan_t *plan);

/** Zeros, and a plan that was freed, are allowed. */
void cuda_exchange_plan_free(cuda_exchange_plan_t *plan);

#endif
