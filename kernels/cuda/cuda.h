/* cuda.h: the row of the table of backends for NVIDIA GPUs. */
#ifndef ATTN_KERNELS_CUDA_H
#define ATTN_KERNELS_CUDA_H

#include "kernels/kernels.h"

extern const attn_backend_ops_t attn_cuda_backend_ops;

/* ---- for tests of this backend ---- */

/**
 * Cut plans of workspaces made from now on for so many multiprocessors, at most those that there
 * are; 0: for all. Has no influence on any bit. Any thread.
 */
void attn_cuda_cut_for(attn_backend_t *backend, uint32_t processors);

/**
 * into = merge(into, from), row by row, by the device: as attn_state_merge_row().
 *
 * @param n, d  rows, and columns of A, at least 1 each
 * @param a_into, a_from  [n][d]; l and e [n]; host memory
 * @return ATTN_ERR_NO_MEMORY, ATTN_ERR_INTERNAL  of the device
 */
attn_status_t attn_cuda_merge_rows(attn_backend_t *backend, uint32_t n, uint32_t d, float *a_into,
                                   float *l_into, int32_t *e_into, const float *a_from,
                                   const float *l_from, const int32_t *e_from);

#endif
