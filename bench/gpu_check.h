/* gpu_check.h: is an answer right? Held against sums in double over the K and V that are stored. */
#ifndef ATTN_BENCH_GPU_CHECK_H
#define ATTN_BENCH_GPU_CHECK_H

#include "bench/gpu_grid.h"
#include "kernels/kernels.h"

/**
 * The largest |got - want| / |want|, norms of a row, of the last query of the last request, in its
 * first and last head, and, where that is soon read, of the first query of the first request. A
 * guard against timing nonsense; the conformance suite is the judge.
 *
 * @param problem  as planned; entry i is request i of the point
 * @param q, o     [queries of all requests][q_heads][d] bf16, host memory
 * @return a NaN counts as the largest; exits where K and V cannot be read
 */
double gpu_check(attn_backend_t *backend, const gpu_point_t *point, const attn_problem_t *problem,
                 const attn_kv_t *kv, const uint16_t *q, const uint16_t *o);

#endif
