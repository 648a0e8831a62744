/* gpu_memory.h: memory and a stream of GPU 0, for the tensors of a runner. Failures end the
 * program; without the CUDA toolkit there are no GPUs, and nothing else is to be called. */
#ifndef ATTN_BENCH_GPU_MEMORY_H
#define ATTN_BENCH_GPU_MEMORY_H

#include <stdint.h>

/** GPUs that there are; 0: attn_last_error() says why. */
uint32_t gpu_count(void);

void *gpu_alloc(uint64_t bytes);
void gpu_free(void *at);

/** From the host's memory, and to it; done when they return. */
void gpu_put(void *to, const void *from, uint64_t bytes);
void gpu_get(void *to, const void *from, uint64_t bytes);

/** A stream, and to wait for it. */
void *gpu_stream(void);
void gpu_wait(void *stream);

#endif
