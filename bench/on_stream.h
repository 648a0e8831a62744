/* on_stream.h: what a layer costs that is enqueued on a stream, from a graph and one by one. */
#ifndef ATTN_BENCH_ON_STREAM_H
#define ATTN_BENCH_ON_STREAM_H

#include "base/attn_types.h"

/** Microseconds a layer, one sample a step. */
typedef struct on_stream {
    double *kernels;  /**< attention alone, from a graph: the step asks, and has nothing new */
    double *enqueued; /**< k, v stored and attention, from a graph */
    double *calls;    /**< of the host's thread in attn_step_enqueue(), without one */
    uint32_t n;
} on_stream_t;

/**
 * Decode steps of a sequence of `length` tokens, on inproc://cuda:0, `layers` a step.
 * @return ATTN_ERR_UNSUPPORTED  there is no GPU, or this build has no kernels for one
 */
attn_status_t on_stream_measure(uint32_t layers, uint32_t length, uint32_t q_heads,
                                uint32_t kv_heads, uint32_t dim, uint32_t steps,
                                on_stream_t *samples);

void on_stream_free(on_stream_t *samples);

#endif
