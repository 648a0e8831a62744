/* order.h: the order of what is queued for a step on streams of its caller, kept by events. */
#ifndef ATTN_KERNELS_CUDA_ORDER_H
#define ATTN_KERNELS_CUDA_ORDER_H

#include "kernels/cuda/driver.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct cuda_order {
    CUstream stream;        /* our own */
    CUevent ready, done;    /* the tables are there, or cleared; what was queued last has run */
    CUstream last;          /* that something was queued on, if ... */
    bool queued, replaying; /* ... anything was; before() was, and after() not yet */
    bool lost;              /* something was queued that no event tells of */
} cuda_order_t;

/* All during a visit (cuda_int.h). */

/** Of a zeroed one; whatever comes of it, cuda_order_close() follows. */
attn_status_t cuda_order_open(cuda_order_t *order);
void cuda_order_close(cuda_order_t *order);

/** For another step: nothing is queued. */
void cuda_order_anew(cuda_order_t *order);

/** What the stream of our own has now is what follow() waits for. */
attn_status_t cuda_order_ready(cuda_order_t *order);

/** Is something lost, so that nothing may be queued any more? */
attn_status_t cuda_order_check(const cuda_order_t *order);

attn_status_t cuda_is_captured(CUstream stream, bool *captured_p);

/** Before something is queued on a stream that is not captured, and after it. */
attn_status_t cuda_order_follow(cuda_order_t *order, CUstream stream);
attn_status_t cuda_order_note(cuda_order_t *order, CUstream stream);

/** Around the launch of a graph: as attn_track_ops_t.before and .after. */
attn_status_t cuda_order_before(cuda_order_t *order, CUstream stream);
attn_status_t cuda_order_after(cuda_order_t *order, CUstream stream);

/** As attn_track_ops_t.wait. */
bool cuda_order_wait(cuda_order_t *order, uint64_t until_ns);

#endif
