/* fake_cuda.h: between fake_cuda.c, devices and memory, and fake_stream.c, streams and graphs. */
#ifndef ATTN_FAKE_CUDA_H
#define ATTN_FAKE_CUDA_H

#include "tests/integration/fake_kernels.h"

#include <cuda.h>

#include <pthread.h>
#include <stdbool.h>

#define VISIBLE __attribute__((visibility("default")))

typedef enum op_kind { OP_KERNEL, OP_COPY, OP_FILL, OP_RECORD, OP_WAIT } op_kind_t;

/** Something that is queued on a stream, or is a part of a graph. */
typedef struct op {
    op_kind_t kind;
    const fake_kernel_t *kernel;
    uint32_t grid;
    uint64_t begun_ns; /**< of a kernel that waits; 0: it was not looked at yet */
    _Alignas(16) unsigned char args[2][FAKE_ARGS_MAX];
    void *to;
    const void *from;
    size_t bytes;
    int byte;
    struct CUevent_st *event;
    unsigned long long ticket;
    unsigned long long number; /**< of all that was ever queued */
    struct op *next;
} op_t;

extern pthread_mutex_t fake_lock; /**< guards everything */
extern int fake_alive;            /**< streams, events, memory that were made and are there */

/** Queue it, or make it part of what is captured on the stream. */
CUresult fake_queue(CUstream stream, const op_t *op);

/** What a call comes to before it does anything: it is counted, and fails if a test wants it so.
 * Under the lock. */
CUresult fake_call(const char *name);

/** As fake_call(), of a call that a capture with the mode "global" of any thread does not bear:
 * such a capture is over, unless the calling thread's mode is "relaxed". */
CUresult fake_unsafe(const char *name);

/** Does an environment variable name a file that is there? */
bool fake_is_file(const char *variable);

/** The context of this thread; NULL: it has none. */
CUcontext fake_context(void);

#endif
