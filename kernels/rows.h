/* rows.h: what every backend checks of rows of k and v, and of the places they go to. */
#ifndef ATTN_KERNELS_ROWS_H
#define ATTN_KERNELS_ROWS_H

#include "kernels/kernels.h"

/** @return ATTN_ERR_NUMERIC  NaN or infinity: names the tensor and the new token */
attn_status_t attn_rows_check_finite(const attn_kv_t *kv, const void *k, const void *v, uint64_t n);

/** @return ATTN_ERR_INVALID  a page or offset that the cache does not have: names the new token */
attn_status_t attn_rows_check_places(const attn_kv_t *kv, const uint32_t *pages,
                                     const uint32_t *offsets, uint64_t n);

/** The same of both ends of moves. */
attn_status_t attn_rows_check_moves(const attn_kv_t *kv, const attn_move_t *moves, uint64_t n);

/** The same of `tokens` tokens from page to page. */
attn_status_t attn_rows_check_page(const attn_kv_t *kv, uint32_t from, uint32_t to,
                                   uint32_t tokens);

#endif
