#include "client/slab_gpu.h"

#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

void
slab_gpu_init(slab_gpu_t *gpu)
{
    memset(gpu, 0, sizeof(*gpu));
    pthread_mutex_init(&gpu->lock, NULL);
    pthread_mutex_init(&gpu->map_lock, NULL);
    gpu->state = SLAB_GPU_REFUSED;
    snprintf(gpu->reason, sizeof(gpu->reason), "there is no slab of the worker's yet");
}

void
slab_gpu_fini(slab_gpu_t *gpu)
{
    slab_gpu_unmap(gpu);
    pthread_mutex_destroy(&gpu->map_lock);
    pthread_mutex_destroy(&gpu->lock);
}

void
slab_gpu_offered(slab_gpu_t *gpu, const Attn__V1__SlabReply *offer)
{
    pthread_mutex_lock(&gpu->lock);
    gpu->card  = (slab_card_t){.magic   = SLAB_CARD_MAGIC,
                               .session = offer->session,
                               .secret  = offer->secret,
                               .bytes   = offer->bytes};
    gpu->state = offer->gpu ? SLAB_GPU_NONE : SLAB_GPU_REFUSED;
    snprintf(gpu->reason, sizeof(gpu->reason), "%s",
             offer->gpu        ? ""
             : offer->messages ? "the worker is reached by messages, not through shared memory"
                               : "the worker lends no memory of a GPU");
    pthread_mutex_unlock(&gpu->lock);
}

/* ---- asking ---- */

bool
slab_gpu_is_to_ask(slab_gpu_t *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    bool asks  = gpu->state == SLAB_GPU_NONE;
    gpu->state = asks ? SLAB_GPU_ASKED : gpu->state;
    pthread_mutex_unlock(&gpu->lock);
    return asks;
}

bool
slab_gpu_is_asked(slab_gpu_t *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    bool asked = gpu->state == SLAB_GPU_ASKED;
    pthread_mutex_unlock(&gpu->lock);
    return asked;
}

bool
slab_gpu_is_lent(slab_gpu_t *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    bool lent = gpu->state == SLAB_GPU_LENT;
    pthread_mutex_unlock(&gpu->lock);
    return lent;
}

void
slab_gpu_answered(slab_gpu_t *gpu, const Attn__V1__GpuSlab *words)
{
    pthread_mutex_lock(&gpu->lock);
    if (gpu->state == SLAB_GPU_ASKED && words->key.len == sizeof(gpu->key)) {
        memcpy(gpu->key, words->key.data, sizeof(gpu->key));
        memcpy(gpu->uuid, words->gpu.data,
               words->gpu.len == sizeof(gpu->uuid) ? sizeof(gpu->uuid) : 0);
        gpu->state = SLAB_GPU_LENT;
    } else if (gpu->state == SLAB_GPU_ASKED) {
        gpu->state = SLAB_GPU_REFUSED;
        snprintf(gpu->reason, sizeof(gpu->reason), "the worker lends no memory of its GPU: %s",
                 words->refused[0] != '\0' ? words->refused : "its key is none");
    }
    pthread_mutex_unlock(&gpu->lock);
}

bool
slab_gpu_is_same(slab_gpu_t *gpu, int ordinal, const char *reason)
{
    uint8_t uuid[ATTN_UUID];

    if (attn_memory_uuid(ordinal, uuid) != ATTN_OK) {
        return false;
    }
    pthread_mutex_lock(&gpu->lock);
    bool same = memcmp(uuid, gpu->uuid, sizeof(uuid)) == 0;
    if (same) {
        snprintf(gpu->reason, sizeof(gpu->reason), "%s", reason);
    }
    pthread_mutex_unlock(&gpu->lock);
    return same;
}

/* ---- mapping ---- */

/* For the first time, or where the GPU did not answer then. Under the map's lock. */
static attn_status_t
map(slab_gpu_t *gpu, int ordinal, uint64_t until_ns)
{
    attn_status_t status = gpu->maps[ordinal] != NULL
                               ? ATTN_OK
                               : attn_shared_map(ordinal, gpu->key, gpu->card.bytes, &gpu->card,
                                                 sizeof(gpu->card), &gpu->maps[ordinal]);

    if (status == ATTN_OK) {
        status                = attn_shared_check(gpu->maps[ordinal], until_ns);
        gpu->checked[ordinal] = status == ATTN_OK;
    }
    if (status != ATTN_OK && status != ATTN_ERR_DEADLINE) {
        attn_shared_unref(gpu->maps[ordinal]);
        gpu->maps[ordinal]   = NULL;
        gpu->failed[ordinal] = status;
        pthread_mutex_lock(&gpu->lock);
        snprintf(gpu->reason, sizeof(gpu->reason), "%s", attn_last_error());
        pthread_mutex_unlock(&gpu->lock);
        attn_log(ATTN_LOG_WARN, "client.no_gpu_slab", "gpu=%d reason=\"%s\"", ordinal,
                 attn_last_error());
    }
    return status;
}

/* What was found out before. */
static attn_status_t
fail_again(slab_gpu_t *gpu, attn_status_t status)
{
    char reason[sizeof(gpu->reason)];

    slab_gpu_reason(gpu, reason, sizeof(reason));
    return attn_fail(status, "%s", reason);
}

attn_status_t
slab_gpu_map(slab_gpu_t *gpu, int ordinal, uint64_t until_ns, attn_shared_t **memory_p)
{
    attn_status_t status = ATTN_OK;

    if (ordinal < 0 || ordinal >= (int)SLAB_GPUS) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "tensors are on GPU %d of this process: at most %u",
                         ordinal, SLAB_GPUS - 1);
    }
    if (!slab_gpu_is_lent(gpu)) {
        return fail_again(gpu, ATTN_ERR_UNSUPPORTED);
    }
    pthread_mutex_lock(&gpu->map_lock);
    if (gpu->failed[ordinal] != ATTN_OK) {
        status = fail_again(gpu, gpu->failed[ordinal]);
    } else if (!gpu->checked[ordinal]) {
        status = map(gpu, ordinal, until_ns);
    }
    if (status == ATTN_OK) {
        *memory_p = gpu->maps[ordinal];
        attn_shared_ref(*memory_p);
    }
    pthread_mutex_unlock(&gpu->map_lock);
    return status;
}

void
slab_gpu_unmap(slab_gpu_t *gpu)
{
    pthread_mutex_lock(&gpu->map_lock);
    for (uint32_t i = 0; i < SLAB_GPUS; i++) {
        attn_shared_unref(gpu->maps[i]);
        gpu->maps[i]    = NULL;
        gpu->checked[i] = false;
    }
    pthread_mutex_unlock(&gpu->map_lock);
    pthread_mutex_lock(&gpu->lock);
    gpu->state = SLAB_GPU_REFUSED;
    pthread_mutex_unlock(&gpu->lock);
}

void
slab_gpu_reason(slab_gpu_t *gpu, char *reason, size_t room)
{
    pthread_mutex_lock(&gpu->lock);
    snprintf(reason, room, "%s",
             gpu->state == SLAB_GPU_ASKED ? "the worker did not say yet whether it lends memory of "
                                            "its GPU"
                                          : gpu->reason);
    pthread_mutex_unlock(&gpu->lock);
}
