/*
 * oracle.h: attention by its definition, one row at a time, in double precision over K and
 * V gathered through the page lists. The judge of every backend: it knows no leaves, no
 * tree and no states, and shares no code with them.
 */
#ifndef ATTN_KERNELS_ORACLE_H
#define ATTN_KERNELS_ORACLE_H

#include "kernels/kernels.h"

/** Rows are all queries of the problem in order, [queries][q_heads]. NULL: not wanted. */
typedef struct attn_oracle {
    double *o;     /**< [rows][q_heads][head_dim_v]: sinks included; 0 where nothing is seen */
    double *lse;   /**< [rows][q_heads]: sinks excluded; -inf where nothing is seen */
    double *kappa; /**< [rows][q_heads]: the largest scale * sum |q_i k_i| over the keys seen, and
                    * the largest |ALiBi bias| of those with a weight above 1e-12: errors of logits
                    * in fp32 are in proportion to them */
    double *v_max; /**< [rows][q_heads]: the largest |v| over the keys seen */
} attn_oracle_t;

/**
 * Attend over the KV that the problem's runs hold; what lies elsewhere is not seen.
 * n_nodes of entries are ignored.
 * @return ATTN_ERR_NO_MEMORY
 */
attn_status_t attn_oracle_attend(const attn_problem_t *problem, const attn_kv_t *kv,
                                 const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype,
                                 const attn_oracle_t *out);

#endif
