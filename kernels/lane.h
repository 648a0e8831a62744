/*
 * lane.h: the runner's half of steps whose layers two devices drive between them (the worker's is
 * attn_track_ops_t.drive). A lane is what a runner's device needs for one such step at a time:
 * kernels on the runner's streams find the step by it, so that graphs which were captured with a
 * lane serve every later step that has it. Each layer is one kernel, which writes q, k and v into
 * memory of the worker's device that both have (attn_shared_map()), and waits there for the answer.
 *
 * Layers of a step come from 0 on, each once, with all its tensors. Calls for one lane are made one
 * at a time, but for attn_lane_abort().
 */
#ifndef ATTN_KERNELS_LANE_H
#define ATTN_KERNELS_LANE_H

#include "kernels/kernels.h"

typedef struct attn_lane attn_lane_t;

/** What a layer of a step takes there and back. Bytes, multiples of 4. */
typedef struct attn_lane_sizes {
    uint64_t q, k, v, o, lse;
} attn_lane_sizes_t;

/** Bytes of shared memory that a step of such layers needs. */
uint64_t attn_lane_takes(const attn_lane_sizes_t *sizes);

/** For a GPU of this process, whose kernels are loaded with the first. No step has it.
 * @return ATTN_ERR_UNSUPPORTED  no GPU, or no kernels for it in this build; ATTN_ERR_NO_MEMORY */
attn_status_t attn_lane_open(int gpu, attn_lane_t **lane_p);
/** After attn_lane_end(), and when no graph that was captured with it is launched any more. NULL is
 * allowed. */
void attn_lane_close(attn_lane_t *lane);

/** Different for any two lanes of the process; not 0. */
uint64_t attn_lane_id(const attn_lane_t *lane);
int attn_lane_gpu(const attn_lane_t *lane);

typedef struct attn_lane_step {
    uint8_t *at;    /**< memory that the GPU has mapped: attn_lane_takes() bytes */
    uint32_t first; /**< the number of layer 0, as the worker has it; not 0 */
    attn_lane_sizes_t sizes;
    uint64_t limit_ns; /**< for waits, from the first on */
} attn_lane_step_t;

/** A step has it. What it is about is on its way when the call returns. */
attn_status_t attn_lane_begin(attn_lane_t *lane, const attn_lane_step_t *step);

typedef struct attn_lane_call {
    uint32_t layer;
    const attn_rows_t *q, *k, *v; /**< NULL: of a step without */
    uint32_t q_heads, kv_heads;
    uint32_t q_head_bytes, k_head_bytes, v_head_bytes, q_size, kv_size; /**< size: of an element */
    void *o;                                                            /**< packed */
    float *lse;                                                         /**< NULL: not wanted */
    void *stream;
} attn_lane_call_t;

/** Queue a layer; as attn_track_ops_t.enqueue, also what it returns, and these two likewise. */
attn_status_t attn_lane_enqueue(attn_lane_t *lane, const attn_lane_call_t *call);
attn_status_t attn_lane_before(attn_lane_t *lane, void *stream);
attn_status_t attn_lane_after(attn_lane_t *lane, void *stream);

/** Have the waits of the step with this first number end, if it is the lane's. Any thread; never
 * blocks. */
void attn_lane_abort(attn_lane_t *lane, uint32_t first);

/** Wait until nothing of the step runs any more. False: until_ns came first; 0 looks. */
bool attn_lane_wait(attn_lane_t *lane, uint64_t until_ns);

/** What came of the step, after wait(): of all that was queued ATTN_OK.
 * @return ATTN_ERR_ABORTED   here or by the worker, ATTN_ERR_DEADLINE */
attn_status_t attn_lane_fate(const attn_lane_t *lane);

/** After wait(), the step is over: graphs that are launched all the same do nothing. False: not yet
 * so at until_ns, or a millisecond from now; call again. */
bool attn_lane_end(attn_lane_t *lane, uint64_t until_ns);

#endif
