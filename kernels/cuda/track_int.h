/* track_int.h: between track.c, which gives tracks to steps, and track_queue.c, which queues on
 * them.
 */
#ifndef ATTN_KERNELS_CUDA_TRACK_INT_H
#define ATTN_KERNELS_CUDA_TRACK_INT_H

#include "kernels/cuda/cuda_int.h"
#include "kernels/cuda/order.h"
#include "kernels/cuda/store.h"

/** What steps of a track have in common: graphs hold it. */
typedef struct track_shape {
    uint64_t cache, n_queries, n_rows;
    attn_dtype_t q_dtype, o_dtype;
    uint32_t n_plans, ctas;
} track_shape_t;

/*
 * In the device's memory:
 *
 *     head  marks[layers]  pages[n_rows]  offsets[n_rows]  tables[n_plans]  | sent by begin
 *     slopes and sinks of all layers                                        | as the cache is
 * opened parts of queries  states between kernels  stacks                      | while a layer runs
 */
struct attn_track {
    cuda_backend_t *backend;
    struct attn_track *next;
    uint64_t id, serial;
    track_shape_t shape;
    uint32_t layers, kv_heads;
    bool busy;     /* a step is on it; under the backend's lock */
    bool captured; /* graphs may hold its addresses: it stays while its cache is open */

    CUdeviceptr device;
    uint8_t *host; /* pinned: [sent], and marks come back to their place */
    uint64_t sent, bytes;
    uint64_t marks, pages, offsets, params, parts, q_scale, slot_a, slot_l, slot_e, deep;
    attn_workspace_t *views; /* [n_plans]: a plan's tables, and the memory that all share */
    cuda_block_t *blocks;    /* [n_plans]: of a view; where its tables begin */

    cuda_order_t order;
    struct track_driven *driven; /* NULL: no step on it was driven by two devices yet */
    bool clearing;               /* what clears the tables was queued */
    bool marks_come;             /* behind what was queued last the marks come back, too */
};

/** Bytes of ours to their place, on our own stream: what waits on the legacy one would break off
 * captures. Returns when they are there. During a visit. */
attn_status_t track_send(attn_track_t *t, uint64_t to, const void *from, uint64_t bytes);

bool track_wait(attn_track_t *t, uint64_t until_ns);
attn_status_t track_enqueue(attn_track_t *t, const attn_track_call_t *call);
attn_status_t track_before(attn_track_t *t, void *stream);
attn_status_t track_after(attn_track_t *t, void *stream);

/** What bring_rows gets, but for where k and v are. */
cuda_bring_t track_bring(const attn_track_t *t, const attn_track_call_t *call);

attn_status_t track_attend(const attn_track_t *t, const attn_track_call_t *call, CUstream stream);
attn_status_t track_results(attn_track_t *t, uint8_t *stored);

/* ---- track_drive.c ---- */

attn_status_t track_drive(attn_track_t *t, const attn_track_lane_t *lane,
                          const attn_track_call_t *calls, uint32_t n);
void track_interrupt(attn_track_t *t);
void track_driven_give(attn_track_t *t); /* the step is over; of one that was not driven: nothing */
void track_driven_free(attn_track_t *t); /* during a visit */

#endif
