/*
 * memory.h: tensors of callers that lie in a GPU's memory, in any build and on any machine. The
 * driver is only looked for among what the process has opened already: without it no pointer can be
 * of a GPU, and no machine needs it. What is copied goes by the legacy default stream: behind what
 * streams that wait for that have queued.
 */
#ifndef ATTN_KERNELS_MEMORY_H
#define ATTN_KERNELS_MEMORY_H

#include "base/attn_types.h"

/** Has the process opened the driver, so that there may be pointers to GPU memory? Any thread. */
bool attn_memory_has_cuda(void);

/** The GPU in whose memory it lies; -1: none, or it is not known. Any thread. */
int attn_memory_gpu(const void *at);

/** Rows of a tensor; strides in bytes. */
typedef struct attn_strided {
    uint8_t *at;
    uint64_t rows, row_stride;
    uint64_t heads, head_stride, head_bytes;
} attn_strided_t;

/**
 * Rows of a tensor in a GPU's memory to the host's, packed, and back. Returns when they are there.
 * @return ATTN_ERR_INTERNAL  the driver failed; the sentence names the call
 */
attn_status_t attn_memory_fetch(int gpu, const attn_strided_t *from, void *to);
attn_status_t attn_memory_send(int gpu, const void *from, const attn_strided_t *to);

/** Pinned memory of the host, or NULL. */
void *attn_memory_pin(int gpu, uint64_t bytes);
void attn_memory_unpin(int gpu, void *pinned);

#endif
