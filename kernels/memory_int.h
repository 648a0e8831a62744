/* memory_int.h: between memory.c, which finds the driver and copies, memory_shared.c and
 * memory_errand.c. */
#ifndef ATTN_KERNELS_MEMORY_INT_H
#define ATTN_KERNELS_MEMORY_INT_H

#include "kernels/memory.h"

#include <stddef.h>

#define MEMORY_GPUS 64 /* of a process, at most */

/* CUDA_MEMCPY2D of the driver: rows of `width` bytes, `pitch` bytes apart on either side. */
typedef struct memory_copy {
    struct {
        size_t x, y;
        int type;
        const void *host;
        uint64_t device;
        void *array;
        size_t pitch;
    } from, to;
    size_t width, height;
} memory_copy_t;

/* CUipcMemHandle. */
typedef struct memory_key {
    uint8_t bytes[ATTN_SHARED_KEY];
} memory_key_t;

/* Devices are numbers, contexts and streams pointers, device memory an address of 64 bits. */
typedef struct memory_calls {
    int (*attributes)(unsigned n, const int *which, void **values, uint64_t at);
    int (*device)(int *device, int ordinal);
    int (*uuid)(uint8_t *uuid, int device);
    int (*retain)(void **context, int device);
    int (*push)(void *context);
    int (*pop)(void **context);
    int (*exchange_mode)(int *mode);
    int (*copy)(const memory_copy_t *copy, void *stream);
    int (*copy_there)(uint64_t to, uint64_t from, size_t bytes, void *stream);
    int (*fill)(uint64_t at, unsigned char byte, size_t bytes, void *stream);
    int (*stream)(void **stream, unsigned flags);
    int (*stream_end)(void *stream);
    int (*event)(void **event, unsigned flags);
    int (*event_end)(void *event);
    int (*record)(void *event, void *stream);
    int (*query)(void *event);
    int (*pin)(void **at, size_t bytes, unsigned flags);
    int (*unpin)(void *at);
    int (*take)(uint64_t *at, size_t bytes);
    int (*give)(uint64_t at);
    int (*range)(uint64_t *base, size_t *bytes, uint64_t at);
    int (*key)(memory_key_t *key, uint64_t at);
    int (*map)(uint64_t *at, memory_key_t key, unsigned flags);
    int (*unmap)(uint64_t at);
    bool shares; /* what sharing needs is there; copy_there(), fill(), take() and on, uuid() */
} memory_calls_t;

extern memory_calls_t memory_calls; /* after memory_enter() */

/** @return ATTN_ERR_UNSUPPORTED  the driver is too old to share memory between processes */
attn_status_t memory_can_share(void);

/** The context of a GPU, this thread's until memory_leave(); no call until then breaks off a
 * capture. @return ATTN_ERR_UNSUPPORTED, ATTN_ERR_INTERNAL */
attn_status_t memory_enter(int gpu, int *mode);
void memory_leave(int *mode);

attn_status_t memory_check(int result, const char *call);

struct attn_copies {
    int gpu;
    void *stream, *event;
    bool queued; /* since the event was last recorded */
    bool ended;  /* what it was recorded behind */
};

#endif
