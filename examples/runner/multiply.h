/*
 * multiply.h: matrix products, by OpenBLAS, on the threads of a pool. A weight is
 * cut into fixed blocks of rows, and a block is always computed by one thread:
 * so the bits of a product depend neither on the number of threads nor on luck.
 */
#ifndef RUNNER_MULTIPLY_H
#define RUNNER_MULTIPLY_H

#include <stdbool.h>

#include "pool.h"

/** y[n][rows] = x[n][columns] * w[rows][columns]^T, added to what y holds if `add`. */
void multiply(pool_t *pool, const float *w, uint32_t rows, uint32_t columns, const float *x,
              uint32_t n, bool add, float *y);

#endif
