/*
 * Workers come, tell that they live, and are lost. An id stands for one process (address and
 * incarnation) and is never given to another, so a chunk whose owner is lost names it for
 * good and cannot be taken for a chunk of the process that came after it.
 */
#include "balancer/directory_int.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>

dir_worker_t *
dir_worker_find(const directory_t *directory, uint32_t id)
{
    uint32_t low = 0, high = directory->n_workers;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (directory->workers[middle].id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < directory->n_workers && directory->workers[low].id == id ? &directory->workers[low]
                                                                          : NULL;
}

static attn_status_t
check_text(const char *what, const char *text, size_t room)
{
    if (text[0] == 0 || memchr(text, 0, room) == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "a worker's %s is %s: it must have 1 to %zu bytes", what,
                         text[0] == 0 ? "empty" : "too long", room - 1);
    }
    return ATTN_OK;
}

/* A slot at the end of the table. A full table forgets the lost worker with the lowest id:
 * who is not in the table is as lost as who is marked so. */
static dir_worker_t *
worker_slot(directory_t *directory)
{
    uint32_t i = 0;

    if (directory->n_workers == DIR_WORKERS_MAX) {
        while (i < directory->n_workers && directory->workers[i].alive) {
            i++;
        }
        if (i == directory->n_workers) {
            return NULL;
        }
        directory->n_workers--;
        memmove(&directory->workers[i], &directory->workers[i + 1],
                (directory->n_workers - i) * sizeof(directory->workers[0]));
    }
    return &directory->workers[directory->n_workers++];
}

static attn_status_t
worker_return(directory_t *directory, dir_worker_t *worker, const dir_worker_t *hello,
              uint64_t now_ns, uint32_t *id_p)
{
    if (!worker->alive) {
        return attn_fail(ATTN_ERR_STALE,
                         "worker %u at %s was lost: incarnation %" PRIu64
                         " is over, join with a new one",
                         worker->id, worker->address, worker->incarnation);
    }
    worker->slab_bytes = hello->slab_bytes;
    worker->speed      = hello->speed;
    worker->seen_ns    = now_ns;
    dir_cost_update(directory);
    *id_p = worker->id;
    return ATTN_OK;
}

attn_status_t
directory_worker_join(directory_t *directory, const dir_worker_t *hello, uint64_t now_ns,
                      uint32_t *id_p)
{
    attn_status_t status = check_text("address", hello->address, sizeof(hello->address));

    status = status ? status : check_text("kind", hello->kind, sizeof(hello->kind));
    if (status) {
        return status;
    }
    for (uint32_t i = 0; i < directory->n_workers; i++) {
        dir_worker_t *worker = &directory->workers[i];
        if (strcmp(worker->address, hello->address) != 0) {
            continue;
        }
        if (worker->incarnation == hello->incarnation) {
            return worker_return(directory, worker, hello, now_ns, id_p);
        }
        directory_worker_lose(directory, worker->id); /* one address, one process */
    }
    dir_worker_t *worker = worker_slot(directory);
    if (!worker) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "worker %s: %u workers are here already, the limit",
                         hello->address, DIR_WORKERS_MAX);
    }
    *worker         = *hello;
    worker->id      = directory->next_worker++;
    worker->alive   = true;
    worker->seen_ns = now_ns;
    directory->epoch++;
    dir_cost_update(directory);
    *id_p = worker->id;
    return ATTN_OK;
}

attn_status_t
directory_worker_heartbeat(directory_t *directory, uint32_t id, uint64_t incarnation,
                           const dir_worker_t *figures, uint64_t now_ns)
{
    dir_worker_t *worker = dir_worker_find(directory, id);

    if (!worker || !worker->alive) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "worker %u is %s: join anew, with a new incarnation",
                         id, worker ? "lost" : "not known");
    }
    if (worker->incarnation != incarnation) {
        return attn_fail(ATTN_ERR_NOT_FOUND,
                         "worker %u has incarnation %" PRIu64 ", not %" PRIu64 ": join anew", id,
                         worker->incarnation, incarnation);
    }
    worker->region_bytes = figures->region_bytes;
    worker->used_bytes   = figures->used_bytes;
    worker->chunks       = figures->chunks;
    worker->open_steps   = figures->open_steps;
    worker->runs         = figures->runs;
    worker->kv_bytes     = figures->kv_bytes;
    worker->device_free  = figures->device_free;
    worker->kv_rate      = figures->kv_rate;
    worker->ucx          = figures->ucx;
    worker->ucx_clients  = figures->ucx_clients;
    worker->ucx_runs     = figures->ucx_runs;
    worker->gpu_clients  = figures->gpu_clients;
    worker->gpu_runs     = figures->gpu_runs;
    worker->groups       = figures->groups;
    worker->seen_ns      = now_ns;
    memcpy(worker->ucx_ways, figures->ucx_ways, sizeof(worker->ucx_ways));
    return ATTN_OK;
}

void
directory_worker_lose(directory_t *directory, uint32_t id)
{
    dir_worker_t *worker = dir_worker_find(directory, id);
    dir_cache_entry_t *cache, *next;

    if (!worker || !worker->alive) {
        return;
    }
    worker->alive = false;
    directory->counts.workers_lost++;
    directory->epoch++;
    HASH_ITER(hh_id, directory->by_id, cache, next)
    {
        dir_spot_remove(cache, id);
    }
    dir_cost_update(directory);
}

const dir_worker_t *
directory_worker(const directory_t *directory, uint32_t id)
{
    return dir_worker_find(directory, id);
}

uint32_t
directory_workers_alive(const directory_t *directory, uint32_t *ids, uint32_t room)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < directory->n_workers; i++) {
        if (!directory->workers[i].alive) {
            continue;
        }
        if (n < room) {
            ids[n] = directory->workers[i].id;
        }
        n++;
    }
    return n;
}

uint32_t
directory_workers(const directory_t *directory, const dir_worker_t **workers_p)
{
    *workers_p = directory->workers;
    return directory->n_workers;
}
