/* The cuda row of a build without the CUDA toolkit: it is there, and says why it cannot be opened.
 */
#include "kernels/cuda/cuda.h"

#include "base/status.h"
#include "kernels/lane.h"

#include <assert.h>

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

uint64_t
attn_lane_takes(const attn_lane_sizes_t *sizes)
{
    (void)sizes;
    return 0;
}

attn_status_t
attn_lane_open(int gpu, attn_lane_t **lane_p)
{
    (void)gpu;
    (void)lane_p;
    return none_open(0, 0, NULL);
}

/* There is never a lane to call these with. */

void
attn_lane_close(attn_lane_t *lane)
{
    assert(lane == NULL);
}

uint64_t
attn_lane_id(const attn_lane_t *lane)
{
    assert(lane == NULL);
    return 0;
}

int
attn_lane_gpu(const attn_lane_t *lane)
{
    assert(lane == NULL);
    return -1;
}

attn_status_t
attn_lane_begin(attn_lane_t *lane, const attn_lane_step_t *step)
{
    (void)step;
    assert(lane == NULL);
    return none_open(0, 0, NULL);
}

attn_status_t
attn_lane_enqueue(attn_lane_t *lane, const attn_lane_call_t *call)
{
    (void)call;
    assert(lane == NULL);
    return none_open(0, 0, NULL);
}

attn_status_t
attn_lane_before(attn_lane_t *lane, void *stream)
{
    (void)stream;
    assert(lane == NULL);
    return none_open(0, 0, NULL);
}

attn_status_t
attn_lane_after(attn_lane_t *lane, void *stream)
{
    return attn_lane_before(lane, stream);
}

void
attn_lane_abort(attn_lane_t *lane, uint32_t first)
{
    (void)first;
    assert(lane == NULL);
}

bool
attn_lane_wait(attn_lane_t *lane, uint64_t until_ns)
{
    (void)until_ns;
    assert(lane == NULL);
    return true;
}

attn_status_t
attn_lane_fate(const attn_lane_t *lane)
{
    assert(lane == NULL);
    return ATTN_OK;
}

bool
attn_lane_end(attn_lane_t *lane, uint64_t until_ns)
{
    return attn_lane_wait(lane, until_ns);
}

const attn_backend_ops_t attn_cuda_backend_ops = {.name = "cuda", .open = none_open};
