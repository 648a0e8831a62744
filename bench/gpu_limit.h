/* gpu_limit.h: how fast a GPU reads its memory, measured: what decode is held against. */
#ifndef ATTN_BENCH_GPU_LIMIT_H
#define ATTN_BENCH_GPU_LIMIT_H

#include "base/attn_types.h"

/** Bytes per second; the median of several readings of 4 GiB, or of what is free. */
typedef struct gpu_limit {
    double loads;   /**< by plain loads */
    double bulk;    /**< by bulk copies, the best ring; 0 on GPUs that have none */
    uint32_t tile;  /**< bytes of a copy of that ring */
    uint32_t slots; /**< copies on their way in it */
    double read;    /**< the better of both */
} gpu_limit_t;

/**
 * The current context's device, all of it: nothing else should run there.
 * @return ATTN_ERR_NO_MEMORY, ATTN_ERR_INTERNAL  of the device
 */
attn_status_t gpu_limit_measure(int device, gpu_limit_t *limit);

#endif
