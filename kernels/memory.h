/*
 * memory.h: tensors of callers that lie in a GPU's memory, in any build and on any machine. The
 * driver is only looked for among what the process has opened already: without it no pointer can be
 * of a GPU, and no machine needs it. What is copied goes by streams that wait for no others, and no
 * call here breaks off a capture, whoever captures what.
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

/** Copies between a GPU's memory and pinned memory of the host, on a stream of their own. Calls for
 * one are made one at a time, by any thread. */
typedef struct attn_copies attn_copies_t;

/** @return ATTN_ERR_UNSUPPORTED  the process has opened no driver
 *  @return ATTN_ERR_INTERNAL     the driver failed; the sentence names the call; likewise below */
attn_status_t attn_copies_open(int gpu, attn_copies_t **copies_p);

/** After attn_copies_wait() with ATTN_OK. NULL is allowed. */
void attn_copies_close(attn_copies_t *copies);

/** Queue rows of a tensor in the GPU's memory to pinned memory, packed, and back. Nothing waits:
 * both sides are the copy's until attn_copies_wait() is ATTN_OK. */
attn_status_t attn_copies_fetch(attn_copies_t *copies, const attn_strided_t *from, void *to);
attn_status_t attn_copies_send(attn_copies_t *copies, const void *from, const attn_strided_t *to);

/** Have all that were queued ended? Waits until until_ns; 0 looks. @return ATTN_ERR_DEADLINE no */
attn_status_t attn_copies_wait(attn_copies_t *copies, uint64_t until_ns);

/** Pinned memory of the host, or NULL. */
void *attn_memory_pin(int gpu, uint64_t bytes);
void attn_memory_unpin(int gpu, void *pinned);

#endif
