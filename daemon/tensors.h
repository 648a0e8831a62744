/*
 * tensors.h: memory for the tensors of runs, on their way in and out. A buffer is taken for a
 * run, given back when its last bytes have left, and kept for the next run of its size, since
 * a fresh mapping costs more than copying into it. What is out at once is capped: beyond it,
 * runs are refused.
 */
#ifndef ATTN_DAEMON_TENSORS_H
#define ATTN_DAEMON_TENSORS_H

#include "base/attn_types.h"

#define TENSORS_KEPT_MAX (UINT64_C(256) << 20) /* bytes of buffers kept for later ... */
#define TENSORS_KEPT_MS 5000u                  /* ... and for how long, when none is asked for */

typedef struct tensors tensors_t;

/** A buffer, counted by reference. */
typedef struct tensor {
    uint8_t *data; /**< 64-byte aligned */
    uint64_t size; /**< bytes asked for */
} tensor_t;

/** @param out_max  bytes of buffers that may be out at once */
attn_status_t tensors_create(uint64_t out_max, tensors_t **tensors_p);

/** Free what is kept if nothing was taken or given back for a while. */
void tensors_sweep(tensors_t *tensors, uint64_t now_ns);

/** Buffers that are still out stay valid, and go when they are given back. NULL is allowed. */
void tensors_destroy(tensors_t *tensors);

uint64_t tensors_kept(tensors_t *tensors); /* bytes */

/**
 * Take a buffer, with one reference.
 * @return ATTN_ERR_TOO_LARGE, ATTN_ERR_EXHAUSTED over out_max, ATTN_ERR_NO_MEMORY
 */
attn_status_t tensor_take(tensors_t *tensors, uint64_t size, tensor_t **tensor_p);

void tensor_ref(tensor_t *tensor);

/** Give a reference back. A rpc_outgoing_t's `sent`, hence void. NULL is allowed. */
void tensor_unref(void *tensor);

#endif
