#include "multiply.h"

#include <cblas.h>

/* Small enough to share 576 rows between cores evenly; larger blocks gain little in sgemm. */
#define BLOCK 96

typedef struct product {
    const float *w, *x;
    float *y;
    uint32_t rows, columns, n;
    float beta; /* 1 adds to y, 0 writes it */
} product_t;

static void
multiply_block(const void *arg, uint32_t block)
{
    const product_t *p = arg;
    uint32_t first     = block * BLOCK;
    int rows           = (int)(p->rows - first < BLOCK ? p->rows - first : BLOCK);
    int columns        = (int)p->columns;
    const float *w     = p->w + (uint64_t)first * p->columns;

    if (p->n == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, rows, columns, 1, w, columns, p->x, 1, p->beta,
                    p->y + first, 1);
    } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)p->n, rows, columns, 1, p->x,
                    columns, w, columns, p->beta, p->y + first, (int)p->rows);
    }
}

void
multiply(pool_t *pool, const float *w, uint32_t rows, uint32_t columns, const float *x, uint32_t n,
         bool add, float *y)
{
    const product_t product = {w, x, y, rows, columns, n, add ? 1 : 0};

    /* The threads are ours: those of OpenBLAS would spin while attention needs their cores. */
    openblas_set_num_threads(1);
    pool_run(pool, multiply_block, &product, (rows + BLOCK - 1) / BLOCK);
}
