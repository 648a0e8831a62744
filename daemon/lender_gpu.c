#include "daemon/lender_gpu.h"

#include "base/status.h"
#include "client/slab_card.h"
#include "kernels/memory.h"

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

struct lender_gpu {
    atomic_uint references; /* its owner's, and one of each slab */
    int gpu;
    uint64_t memory_max;
    atomic_uint_fast64_t runs;
    pthread_mutex_t lock; /* guards what follows */
    uint64_t bytes;
    uint32_t n;
};

struct gpu_slab {
    lender_gpu_t *gpu;
    attn_shared_t *memory;
    attn_errand_t errand;  /* when it is nobody's */
    uint64_t slots, bytes; /* of slots, and all that is lent */
    uint8_t uuid[ATTN_UUID];
    atomic_uint references;
};

attn_status_t
lender_gpu_create(int gpu, uint64_t memory, lender_gpu_t **gpu_p)
{
    lender_gpu_t *made = calloc(1, sizeof(*made));

    if (made == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to lend some of a GPU");
    }
    atomic_init(&made->references, 1);
    made->gpu        = gpu;
    made->memory_max = memory;
    pthread_mutex_init(&made->lock, NULL);
    *gpu_p = made;
    return ATTN_OK;
}

void
lender_gpu_destroy(lender_gpu_t *gpu)
{
    if (gpu != NULL && atomic_fetch_sub(&gpu->references, 1) == 1) {
        pthread_mutex_destroy(&gpu->lock);
        free(gpu);
    }
}

bool
lender_gpu_lends(const lender_gpu_t *gpu)
{
    return gpu->gpu >= 0 && gpu->memory_max > 0;
}

int
lender_gpu_ordinal(const lender_gpu_t *gpu)
{
    return gpu->gpu;
}

void
lender_gpu_describe(lender_gpu_t *gpu, lender_gpu_figures_t *figures)
{
    pthread_mutex_lock(&gpu->lock);
    *figures = (lender_gpu_figures_t){
        .bytes = gpu->bytes, .slabs = gpu->n, .runs = atomic_load(&gpu->runs)};
    pthread_mutex_unlock(&gpu->lock);
}

/* ---- slabs ---- */

static attn_status_t
reserve(lender_gpu_t *gpu, uint64_t bytes)
{
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&gpu->lock);
    if (bytes > gpu->memory_max || gpu->bytes > gpu->memory_max - bytes) {
        status = attn_fail(ATTN_ERR_EXHAUSTED,
                           "%llu bytes of GPU %d are lent to clients, and %llu more would be above "
                           "gpu-lend, %llu",
                           (unsigned long long)gpu->bytes, gpu->gpu, (unsigned long long)bytes,
                           (unsigned long long)gpu->memory_max);
    } else {
        gpu->bytes += bytes;
        gpu->n++;
    }
    pthread_mutex_unlock(&gpu->lock);
    return status;
}

static void
unreserve(lender_gpu_t *gpu, uint64_t bytes)
{
    pthread_mutex_lock(&gpu->lock);
    gpu->bytes -= bytes;
    gpu->n--;
    pthread_mutex_unlock(&gpu->lock);
}

attn_status_t
gpu_slab_open(lender_gpu_t *gpu, const ucx_offer_t *offer, gpu_slab_t **slab_p)
{
    gpu_slab_t *slab = calloc(1, sizeof(*slab));

    if (slab == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to lend some of a GPU");
    }
    slab_card_t card = {.magic   = SLAB_CARD_MAGIC,
                        .session = offer->session,
                        .secret  = offer->secret,
                        .bytes   = offer->bytes};
    slab->gpu        = gpu;
    slab->slots      = offer->bytes;
    slab->bytes      = attn_shared_takes(slab_lane_at(offer->bytes, SLAB_LANES));
    atomic_init(&slab->references, 1);
    attn_status_t status = reserve(gpu, slab->bytes);
    if (status != ATTN_OK) {
        free(slab);
        return status;
    }
    atomic_fetch_add(&gpu->references, 1);
    status = attn_shared_create(gpu->gpu, slab_lane_at(offer->bytes, SLAB_LANES), &card,
                                sizeof(card), &slab->memory);
    if (status == ATTN_OK) {
        status = attn_memory_uuid(gpu->gpu, slab->uuid);
    }
    if (status != ATTN_OK) {
        gpu_slab_unref(slab);
        return status;
    }
    *slab_p = slab;
    return ATTN_OK;
}

const uint8_t *
gpu_slab_key(const gpu_slab_t *slab)
{
    return attn_shared_key(slab->memory);
}

const uint8_t *
gpu_slab_uuid(const gpu_slab_t *slab)
{
    return slab->uuid;
}

void
gpu_slab_ref(gpu_slab_t *slab)
{
    atomic_fetch_add(&slab->references, 1);
}

static void
gone(attn_errand_t *errand)
{
    gpu_slab_t *slab = (gpu_slab_t *)(void *)((char *)errand - offsetof(gpu_slab_t, errand));

    unreserve(slab->gpu, slab->bytes);
    lender_gpu_destroy(slab->gpu);
    free(slab);
}

void
gpu_slab_unref(gpu_slab_t *slab)
{
    if (slab != NULL && atomic_fetch_sub(&slab->references, 1) == 1) {
        attn_shared_unref(slab->memory);
        slab->errand.run = gone; /* after the memory */
        attn_errand_add(slab->gpu->gpu, &slab->errand);
    }
}

uint8_t *
gpu_slab_in(const gpu_slab_t *slab, const ucx_place_t *place)
{
    return attn_shared_at(slab->memory) + ucx_place_in(place);
}

uint8_t *
gpu_slab_out(const gpu_slab_t *slab, const ucx_place_t *place)
{
    return attn_shared_at(slab->memory) + ucx_place_out(place);
}

uint8_t *
gpu_slab_lane(const gpu_slab_t *slab, uint32_t i)
{
    return attn_shared_at(slab->memory) + slab_lane_at(slab->slots, i);
}

void
gpu_slab_count(gpu_slab_t *slab)
{
    atomic_fetch_add_explicit(&slab->gpu->runs, 1, memory_order_relaxed);
}
