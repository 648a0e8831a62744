#include "client/slab_gpu.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

#define PAUSE_NS (1000 * ATTN_NS_PER_MS)
#define PAUSE_NS_MAX (60 * PAUSE_NS)

static void
pause_begin(slab_pause_t *pause)
{
    pause->ns       = pause->ns == 0 ? PAUSE_NS : attn_min(2 * pause->ns, PAUSE_NS_MAX);
    pause->until_ns = attn_now_ns() + pause->ns;
}

void
slab_gpu_init(slab_gpu_t *gpu)
{
    memset(gpu, 0, sizeof(*gpu));
    pthread_mutex_init(&gpu->lock, NULL);
    gpu->state = SLAB_GPU_REFUSED;
    gpu->final = true;
    snprintf(gpu->reason, sizeof(gpu->reason), "there is no slab of the worker's yet");
}

void
slab_gpu_fini(slab_gpu_t *gpu)
{
    slab_gpu_unmap(gpu);
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
    bool again =
        gpu->state == SLAB_GPU_REFUSED && !gpu->final && attn_now_ns() >= gpu->pause.until_ns;
    bool asks  = gpu->state == SLAB_GPU_NONE || again;
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
        gpu->bytes =
            words->lanes == 0 ? gpu->card.bytes : slab_lane_at(gpu->card.bytes, SLAB_LANES);
    } else if (gpu->state == SLAB_GPU_ASKED) {
        gpu->state = SLAB_GPU_REFUSED;
        gpu->final = !words->again;
        pause_begin(&gpu->pause);
        snprintf(gpu->reason, sizeof(gpu->reason), "the worker lends no memory of its GPU: %s",
                 words->refused[0] != '\0' ? words->refused : "its key is none");
    }
    pthread_mutex_unlock(&gpu->lock);
}

bool
slab_gpu_is_same(slab_gpu_t *gpu, int ordinal)
{
    uint8_t uuid[ATTN_UUID];

    if (attn_memory_uuid(ordinal, uuid) != ATTN_OK) {
        return false;
    }
    pthread_mutex_lock(&gpu->lock);
    bool same = memcmp(uuid, gpu->uuid, sizeof(uuid)) == 0;
    pthread_mutex_unlock(&gpu->lock);
    return same;
}

/* ---- mapping ---- */

/* What is mapped, or being so, with a reference. Under the lock. */
static attn_status_t
take(slab_gpu_t *gpu, int ordinal, attn_shared_t **memory_p)
{
    struct slab_map *map = &gpu->maps[ordinal];
    attn_status_t status = ATTN_OK;

    if (map->failed && !map->final && attn_now_ns() >= map->pause.until_ns) {
        attn_shared_unref(map->memory);
        map->memory = NULL;
        map->failed = false;
    }
    if (map->memory == NULL) {
        status = attn_shared_map(ordinal, gpu->key, gpu->bytes, &gpu->card, sizeof(gpu->card),
                                 &map->memory);
    }
    if (status == ATTN_OK) {
        *memory_p = map->memory;
        attn_shared_ref(*memory_p);
    }
    return status;
}

/* That it cannot be mapped: said once. */
static void
note_failure(slab_gpu_t *gpu, int ordinal, const attn_shared_t *memory, attn_status_t status)
{
    struct slab_map *map = &gpu->maps[ordinal];

    pthread_mutex_lock(&gpu->lock);
    bool news = map->memory == memory && !map->failed;
    if (news) {
        map->failed = true;
        map->final  = status == ATTN_ERR_UNSUPPORTED;
        pause_begin(&map->pause);
    }
    pthread_mutex_unlock(&gpu->lock);
    if (news) {
        attn_log(ATTN_LOG_WARN, "client.no_gpu_slab", "gpu=%d reason=\"%s\"", ordinal,
                 attn_last_error());
    }
}

attn_status_t
slab_gpu_map(slab_gpu_t *gpu, int ordinal, uint64_t until_ns, attn_shared_t **memory_p)
{
    attn_shared_t *memory = NULL;
    attn_status_t status;

    if (ordinal < 0 || ordinal >= (int)SLAB_GPUS) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "tensors are on GPU %d of this process: at most %u",
                         ordinal, SLAB_GPUS - 1);
    }
    pthread_mutex_lock(&gpu->lock);
    status = gpu->state == SLAB_GPU_LENT
                 ? take(gpu, ordinal, &memory)
                 : attn_fail(ATTN_ERR_UNSUPPORTED, "the worker gave up the slab of the step");
    pthread_mutex_unlock(&gpu->lock);
    if (status == ATTN_OK && (status = attn_shared_check(memory, until_ns)) == ATTN_OK) {
        *memory_p = memory;
        return ATTN_OK;
    }
    if (memory != NULL && status != ATTN_ERR_DEADLINE) {
        note_failure(gpu, ordinal, memory, status);
    }
    attn_shared_unref(memory);
    return status;
}

void
slab_gpu_unmap(slab_gpu_t *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    gpu->state = SLAB_GPU_REFUSED;
    gpu->final = true;
    for (uint32_t i = 0; i < SLAB_GPUS; i++) {
        attn_shared_unref(gpu->maps[i].memory);
        gpu->maps[i].memory = NULL;
    }
    pthread_mutex_unlock(&gpu->lock);
}

void
slab_gpu_reason(slab_gpu_t *gpu, char *reason, size_t room)
{
    static const char *const of[] = {
        [SLAB_GPU_NONE]    = "memory of the worker's GPU was not asked for when the step began",
        [SLAB_GPU_ASKED]   = "the worker did not say yet whether it lends memory of its GPU",
        [SLAB_GPU_LENT]    = "the worker lent memory of its GPU when the step had begun",
        [SLAB_GPU_REFUSED] = "the worker gave up the slab of the step",
    };

    pthread_mutex_lock(&gpu->lock);
    bool refused = gpu->reason[0] != '\0' && gpu->state != SLAB_GPU_LENT; /* also: asked again */
    snprintf(reason, room, "%s", refused ? gpu->reason : of[gpu->state]);
    pthread_mutex_unlock(&gpu->lock);
}
