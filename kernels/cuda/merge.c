/* The merge of the device by itself, for the test that holds it against the host's. */
#include "base/checked.h"
#include "kernels/cuda/cuda_int.h"

#include <assert.h>

#define THREADS 128u

/* Where things lie in the block: A, l and e of both sides. */
typedef struct sides {
    uint64_t a[2], l[2], e[2], end;
} sides_t;

static sides_t
lay_out(uint64_t n, uint32_t d)
{
    sides_t s = {.end = 0};

    for (int side = 0; side < 2; side++) {
        s.a[side] = s.end;
        s.l[side] = s.a[side] + n * d * sizeof(float);
        s.e[side] = s.l[side] + n * sizeof(float);
        s.end     = attn_div_up(s.e[side] + n * sizeof(int32_t), 16) * 16;
    }
    return s;
}

static attn_status_t
upload(CUdeviceptr base, const sides_t *s, int side, uint64_t n, uint32_t d, const float *a,
       const float *l, const int32_t *e)
{
    attn_status_t status = CUDA_CALL(cuMemcpyHtoD(base + s->a[side], a, n * d * sizeof(float)));

    if (status == ATTN_OK) {
        status = CUDA_CALL(cuMemcpyHtoD(base + s->l[side], l, n * sizeof(float)));
    }
    return status == ATTN_OK ? CUDA_CALL(cuMemcpyHtoD(base + s->e[side], e, n * sizeof(int32_t)))
                             : status;
}

static attn_status_t
merge_in_block(cuda_backend_t *backend, const cuda_block_t *block, uint64_t n, uint32_t d,
               float *a_into, float *l_into, int32_t *e_into, const float *a_from,
               const float *l_from, const int32_t *e_from)
{
    sides_t s        = lay_out(n, d);
    CUdeviceptr base = block->device, at[6] = {base + s.a[0], base + s.l[0], base + s.e[0],
                                               base + s.a[1], base + s.l[1], base + s.e[1]};
    void *args[] = {&at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &d};
    attn_status_t status;

    if ((status = upload(base, &s, 0, n, d, a_into, l_into, e_into)) != ATTN_OK ||
        (status = upload(base, &s, 1, n, d, a_from, l_from, e_from)) != ATTN_OK ||
        (status = cuda_launch(backend->merge_rows, (uint32_t)n, 1, THREADS, 0, false, block->stream,
                              args)) != ATTN_OK ||
        (status = CUDA_CALL(cuStreamSynchronize(block->stream))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyDtoH(a_into, at[0], n * d * sizeof(float)))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyDtoH(l_into, at[1], n * sizeof(float)))) != ATTN_OK) {
        return status;
    }
    return CUDA_CALL(cuMemcpyDtoH(e_into, at[2], n * sizeof(int32_t)));
}

attn_status_t
attn_cuda_merge_rows(attn_backend_t *base, uint32_t n, uint32_t d, float *a_into, float *l_into,
                     int32_t *e_into, const float *a_from, const float *l_from,
                     const int32_t *e_from)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    cuda_block_t *block;
    attn_status_t status;
    CUDA_VISIT(backend);

    assert(n > 0 && d > 0);
    if ((status = visit.status) != ATTN_OK ||
        (status = cuda_block_take(backend, lay_out(n, d).end, &block)) != ATTN_OK) {
        return status;
    }
    status = merge_in_block(backend, block, n, d, a_into, l_into, e_into, a_from, l_from, e_from);
    cuda_block_give(backend, block);
    return status;
}
