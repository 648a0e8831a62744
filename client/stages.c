/* stages.c: see stages.h. What is kept is bounded in bytes: a step with large tensors leaves none
 * of its memory pinned. */
#include "client/stages.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "client/client_int.h"

#include <stdlib.h>

#define KEPT 16u
#define KEPT_BYTES (UINT64_C(256) << 20)
#define LAST_WAIT_NS (1000 * ATTN_NS_PER_MS)

struct stages_pool {
    stages_t *kept, *adrift; /* the latter with copies that did not end yet */
    uint32_t n_kept;
    uint64_t kept_bytes;
};

static uint64_t
bytes_of(const stages_t *stages)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < STAGES_MAX; i++) {
        bytes += stages->pieces[i].bytes;
    }
    return bytes;
}

/* Its copies have ended. */
static void
unmap(stages_t *stages)
{
    attn_shared_unref(stages->mapped);
    stages->mapped = NULL;
}

static void
stages_free(stages_t *stages)
{
    unmap(stages);
    for (uint32_t i = 0; i < STAGES_MAX; i++) {
        attn_memory_unpin(stages->gpu, stages->pieces[i].at);
    }
    attn_copies_close(stages->copies);
    free(stages);
}

/* Keep it, if there is room: otherwise it is the caller's to free. Under the client's lock. */
static bool
keep(struct stages_pool *pool, stages_t *stages)
{
    uint64_t bytes = bytes_of(stages);

    unmap(stages);
    if (pool->n_kept == KEPT || pool->kept_bytes + bytes > KEPT_BYTES) {
        return false;
    }
    stages->next = pool->kept;
    pool->kept   = stages;
    pool->kept_bytes += bytes;
    pool->n_kept++;
    return true;
}

static stages_t *
take_kept(struct stages_pool *pool, int gpu)
{
    stages_t **at = &pool->kept;

    while (*at != NULL && (*at)->gpu != gpu) {
        at = &(*at)->next;
    }
    stages_t *stages = *at;
    if (stages != NULL) {
        *at = stages->next;
        pool->kept_bytes -= bytes_of(stages);
        pool->n_kept--;
    }
    return stages;
}

/* What clients left when they closed: freed when somebody copies anew, if it has ended. */
static pthread_mutex_t left_lock = PTHREAD_MUTEX_INITIALIZER;
static stages_t *left;

static void
free_left(void)
{
    pthread_mutex_lock(&left_lock);
    for (stages_t **at = &left; *at != NULL;) {
        stages_t *stages = *at;
        if (attn_copies_wait(stages->copies, 0) == ATTN_ERR_DEADLINE) {
            at = &stages->next;
        } else {
            *at = stages->next;
            stages_free(stages);
        }
    }
    pthread_mutex_unlock(&left_lock);
}

/* Those adrift that have come to an end. */
static void
gather_adrift(attn_client_t *client)
{
    stages_t *going = NULL;

    pthread_mutex_lock(&client->lock);
    stages_t **at = client->stages != NULL ? &client->stages->adrift : &going;
    while (*at != NULL) {
        stages_t *stages     = *at;
        attn_status_t status = attn_copies_wait(stages->copies, 0);
        if (status == ATTN_ERR_DEADLINE) {
            at = &stages->next;
            continue;
        }
        *at = stages->next;
        if (status != ATTN_OK || !keep(client->stages, stages)) {
            stages->next = going;
            going        = stages;
        }
    }
    pthread_mutex_unlock(&client->lock);
    while (going != NULL) {
        stages_t *stages = going;
        going            = stages->next;
        stages_free(stages);
    }
}

attn_status_t
stages_take(attn_client_t *client, int gpu, stages_t **stages_p)
{
    stages_t *stages = NULL;

    free_left();
    gather_adrift(client);
    pthread_mutex_lock(&client->lock);
    if (client->stages == NULL) {
        client->stages = calloc(1, sizeof(*client->stages));
    }
    bool pool = client->stages != NULL;
    if (pool) {
        stages = take_kept(client->stages, gpu);
    }
    pthread_mutex_unlock(&client->lock);
    if (stages == NULL) {
        stages = pool ? calloc(1, sizeof(*stages)) : NULL;
        if (stages == NULL) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to copy tensors of GPU %d", gpu);
        }
        stages->gpu          = gpu;
        attn_status_t status = attn_copies_open(gpu, &stages->copies);
        if (status != ATTN_OK) {
            free(stages);
            return status;
        }
    }
    *stages_p = stages;
    return ATTN_OK;
}

attn_status_t
stages_room(stages_t *stages, uint32_t piece, uint64_t bytes)
{
    if (stages->pieces[piece].bytes >= bytes) {
        return ATTN_OK;
    }
    attn_memory_unpin(stages->gpu, stages->pieces[piece].at);
    stages->pieces[piece].at    = attn_memory_pin(stages->gpu, bytes);
    stages->pieces[piece].bytes = stages->pieces[piece].at != NULL ? bytes : 0;
    return stages->pieces[piece].at != NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_NO_MEMORY,
                           "no %llu bytes of pinned memory for a tensor of GPU %d",
                           (unsigned long long)bytes, stages->gpu);
}

void
stages_give(attn_client_t *client, stages_t *stages)
{
    if (stages == NULL) {
        return;
    }
    attn_status_t status = attn_copies_wait(stages->copies, 0);
    bool kept            = status == ATTN_ERR_DEADLINE;
    if (!kept) {
        unmap(stages);
    }
    pthread_mutex_lock(&client->lock);
    if (kept) {
        stages->next           = client->stages->adrift;
        client->stages->adrift = stages;
    } else {
        kept = status == ATTN_OK && keep(client->stages, stages);
    }
    pthread_mutex_unlock(&client->lock);
    if (!kept) {
        stages_free(stages);
    }
}

void
client_stages_free(attn_client_t *client)
{
    struct stages_pool *pool = client->stages;
    uint64_t until           = attn_now_ns() + LAST_WAIT_NS;
    stages_t *stages;

    while (pool != NULL && (stages = pool->kept) != NULL) {
        pool->kept = stages->next;
        stages_free(stages);
    }
    while (pool != NULL && (stages = pool->adrift) != NULL) {
        pool->adrift = stages->next;
        if (attn_copies_wait(stages->copies, until) == ATTN_ERR_DEADLINE) {
            attn_log(ATTN_LOG_WARN, "client.copies", "name=\"%s\" gpu=%d bytes=%llu reason=\"%s\"",
                     client->name, stages->gpu, (unsigned long long)bytes_of(stages),
                     attn_last_error());
            pthread_mutex_lock(&left_lock);
            stages->next = left;
            left         = stages;
            pthread_mutex_unlock(&left_lock);
        } else {
            stages_free(stages);
        }
    }
    free(pool);
    client->stages = NULL;
}
