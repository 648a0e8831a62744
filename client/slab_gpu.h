/*
 * slab_gpu.h: memory of the worker's GPU that goes with a slab of shared memory. A step that may
 * have tensors in a GPU's memory asks for it, and it is mapped for each GPU of this process that
 * has such tensors. Neither is waited for, unless the caller wants to: tensors go through pinned
 * memory of the host meanwhile, and where one of the two cannot be. Then the reason is kept, and
 * unless it is one for good it is tried again: after a second, and later ever more seldom.
 */
#ifndef ATTN_SLAB_GPU_H
#define ATTN_SLAB_GPU_H

#include "attn/v1/attn.pb-c.h"
#include "client/slab_card.h"
#include "kernels/memory.h"

#include <pthread.h>

#define SLAB_GPUS 16u /* of this process */

/* Since a failure: when to try again. */
typedef struct slab_pause {
    uint64_t until_ns, ns;
} slab_pause_t;

typedef struct slab_gpu {
    pthread_mutex_t lock; /* nobody waits who has it */
    enum { SLAB_GPU_NONE, SLAB_GPU_ASKED, SLAB_GPU_LENT, SLAB_GPU_REFUSED } state;
    bool final; /* refused for good */
    slab_pause_t pause;
    slab_card_t card;
    uint64_t bytes; /* that were lent, lanes and all */
    uint8_t key[ATTN_SHARED_KEY];
    uint8_t uuid[ATTN_UUID]; /* of the worker's GPU; zeros: it did not say */
    char reason[256];        /* why it was refused, the last time */
    struct slab_map {
        attn_shared_t *memory; /* NULL: nobody wanted it yet */
        bool failed, final;    /* it cannot be mapped; and never */
        slab_pause_t pause;
    } maps[SLAB_GPUS];
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

/** Is the worker's GPU this one of ours? */
bool slab_gpu_is_same(slab_gpu_t *gpu, int ordinal);

/** Mapped for a GPU of this process, with a reference; it is being mapped from the first call on.
 * @return ATTN_ERR_DEADLINE  not yet, by until_ns; 0 looks
 * @return ATTN_ERR_UNSUPPORTED and such, with the reason */
attn_status_t slab_gpu_map(slab_gpu_t *gpu, int ordinal, uint64_t until_ns,
                           attn_shared_t **memory_p);

/** Nobody maps it any more, and who has it mapped has a reference: before the worker is told that
 * the slab is not needed. */
void slab_gpu_unmap(slab_gpu_t *gpu);

/** Why a step that began without it has none. */
void slab_gpu_reason(slab_gpu_t *gpu, char *reason, size_t room);

#endif
