/*
 * slab_gpu.h: memory of the worker's GPU that goes with a slab of shared memory. A step that may
 * have tensors in a GPU's memory asks for it, once a slab, and it is mapped for each GPU of this
 * process that has such tensors. Where one of the three cannot be, the reason is kept, and tensors
 * go through pinned memory of the host.
 */
#ifndef ATTN_SLAB_GPU_H
#define ATTN_SLAB_GPU_H

#include "attn/v1/attn.pb-c.h"
#include "client/slab_card.h"
#include "kernels/memory.h"

#include <pthread.h>

#define SLAB_GPUS 16u /* of this process */

typedef struct slab_gpu {
    pthread_mutex_t lock;
    enum { SLAB_GPU_NONE, SLAB_GPU_ASKED, SLAB_GPU_LENT, SLAB_GPU_REFUSED } state;
    slab_card_t card;
    uint8_t key[ATTN_SHARED_KEY];
    uint8_t uuid[ATTN_UUID]; /* of the worker's GPU; zeros: it did not say */
    char reason[256];        /* of the last that could not be */

    pthread_mutex_t map_lock; /* taken before the other; held while a GPU is waited for */
    attn_shared_t *maps[SLAB_GPUS];
    bool checked[SLAB_GPUS];         /* those that are what was lent */
    attn_status_t failed[SLAB_GPUS]; /* of those that could not be mapped */
} slab_gpu_t;

void slab_gpu_init(slab_gpu_t *gpu);
void slab_gpu_fini(slab_gpu_t *gpu);

/** What the worker's offer said. */
void slab_gpu_offered(slab_gpu_t *gpu, const Attn__V1__SlabReply *offer);

/** Is it to be asked for, now, by the caller? */
bool slab_gpu_is_to_ask(slab_gpu_t *gpu);
bool slab_gpu_is_asked(slab_gpu_t *gpu); /* and no answer came */
bool slab_gpu_is_lent(slab_gpu_t *gpu);

/** The worker's answer. */
void slab_gpu_answered(slab_gpu_t *gpu, const Attn__V1__GpuSlab *words);

/** Is the worker's GPU this one of ours? With `reason`, that is why tensors go through the host. */
bool slab_gpu_is_same(slab_gpu_t *gpu, int ordinal, const char *reason);

/** Mapped for a GPU of this process, with a reference. Blocks, the first time.
 * @return ATTN_ERR_UNSUPPORTED and such, with the reason; ATTN_ERR_DEADLINE  the GPU does not
 * answer
 */
attn_status_t slab_gpu_map(slab_gpu_t *gpu, int ordinal, uint64_t until_ns,
                           attn_shared_t **memory_p);

/** Nobody maps it any more, and who has it mapped has a reference: before the worker is told that
 * the slab is not needed. */
void slab_gpu_unmap(slab_gpu_t *gpu);

void slab_gpu_reason(slab_gpu_t *gpu, char *reason, size_t room);

#endif
