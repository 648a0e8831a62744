/* The cuda row of a build without the CUDA toolkit: it is there, and says why it cannot be opened.
 */
#include "kernels/cuda/cuda.h"

#include "base/status.h"

static attn_status_t
none_open(uint32_t threads, uint32_t ordinal, attn_backend_t **backend_p)
{
    (void)threads;
    (void)ordinal;
    (void)backend_p;
    return attn_fail(ATTN_ERR_UNSUPPORTED,
                     "this build has no GPU kernels: it was configured without the CUDA toolkit");
}

void
attn_cuda_cut_for(attn_backend_t *backend, uint32_t processors)
{
    (void)backend;
    (void)processors;
}

attn_status_t
attn_cuda_merge_rows(attn_backend_t *backend, uint32_t n, uint32_t d, float *a_into, float *l_into,
                     int32_t *e_into, const float *a_from, const float *l_from,
                     const int32_t *e_from)
{
    (void)n;
    (void)d;
    (void)a_into;
    (void)l_into;
    (void)e_into;
    (void)a_from;
    (void)l_from;
    (void)e_from;
    return none_open(0, 0, &backend);
}

const attn_backend_ops_t attn_cuda_backend_ops = {.name = "cuda", .open = none_open};
