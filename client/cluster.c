/* cluster.c: workers, clients, caches, and the effects of the directory. */
#include "client/cluster_int.h"

#include "balancer/geometry.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "client/measure.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define RELEASES_MAX 1024u  /* chunks of one call */
#define OPEN_AGAIN_MS 5000u /* after a region could not be opened on a worker that joined late */

static void
note_effect(void *arg, const dir_effect_t *effect)
{
    cluster_t *cluster  = arg;
    effect_node_t *node = malloc(sizeof(*node));

    if (node == NULL) {
        attn_log(ATTN_LOG_ERROR, "cluster.effect.dropped",
                 "worker=%u cache=%llu reason=\"out of memory\"", effect->worker,
                 (unsigned long long)effect->cache);
        return;
    }
    *node                 = (effect_node_t){.effect = *effect};
    *cluster->effects_end = node;
    cluster->effects_end  = &node->next;
}

attn_status_t
cluster_create(const directory_options_t *options, links_t *links, cluster_t **cluster_p)
{
    cluster_t *cluster = calloc(1, sizeof(*cluster));
    pthread_condattr_t monotonic;

    if (cluster == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a cluster");
    }
    attn_status_t status = directory_create(options, note_effect, cluster, &cluster->directory);
    if (status != ATTN_OK) {
        free(cluster);
        return status;
    }
    cluster->links       = links;
    cluster->start_ns    = attn_now_ns();
    cluster->lease_ns    = options->lease_ns;
    cluster->effects_end = &cluster->effects;
    directory_set_merge(cluster->directory, measure_merge());
    pthread_mutex_init(&cluster->lock, NULL);
    pthread_mutex_init(&cluster->open_lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&cluster->calmer, &monotonic);
    pthread_condattr_destroy(&monotonic);
    *cluster_p = cluster;
    return ATTN_OK;
}

void
cluster_destroy(cluster_t *cluster)
{
    if (cluster == NULL) {
        return;
    }
    directory_destroy(cluster->directory);
    while (cluster->effects != NULL) {
        effect_node_t *next = cluster->effects->next;
        free(cluster->effects);
        cluster->effects = next;
    }
    assert(cluster->held == NULL && cluster->moving == NULL);
    pthread_cond_destroy(&cluster->calmer);
    pthread_mutex_destroy(&cluster->lock);
    pthread_mutex_destroy(&cluster->open_lock);
    free(cluster);
}

uint64_t
cluster_worker_deadline(void)
{
    return attn_now_ns() + WORKER_TIMEOUT_MS * ATTN_NS_PER_MS;
}

uint32_t
cluster_lease_ms(const cluster_t *cluster)
{
    return (uint32_t)attn_min(cluster->lease_ns / ATTN_NS_PER_MS, UINT32_MAX);
}

uint64_t
cluster_epoch(cluster_t *cluster)
{
    pthread_mutex_lock(&cluster->lock);
    uint64_t epoch = directory_epoch(cluster->directory);
    pthread_mutex_unlock(&cluster->lock);
    return epoch;
}

/* ---- workers ---- */

attn_status_t
cluster_worker_address(cluster_t *cluster, uint32_t worker, char address[64], bool *alive_p)
{
    pthread_mutex_lock(&cluster->lock);
    const dir_worker_t *w = directory_worker(cluster->directory, worker);
    if (w != NULL) {
        memcpy(address, w->address, 64);
        *alive_p = w->alive;
    }
    pthread_mutex_unlock(&cluster->lock);
    return w != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NOT_FOUND, "no worker %u", worker);
}

attn_status_t
cluster_worker_place(cluster_t *cluster, uint32_t worker, dir_place_t *place)
{
    pthread_mutex_lock(&cluster->lock);
    const dir_worker_t *w = directory_worker(cluster->directory, worker);
    if (w != NULL) {
        *place = w->place;
    }
    pthread_mutex_unlock(&cluster->lock);
    return w != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NOT_FOUND, "no worker %u", worker);
}

attn_status_t
cluster_link(cluster_t *cluster, uint32_t worker, link_t **link_p)
{
    char address[64];
    bool alive           = false;
    attn_status_t status = cluster_worker_address(cluster, worker, address, &alive);

    if (status == ATTN_OK && !alive) {
        status = attn_fail(ATTN_ERR_UNAVAILABLE, "worker %u (%s) is lost", worker, address);
    }
    return status == ATTN_OK ? links_get(cluster->links, address, link_p) : status;
}

attn_status_t
cluster_worker_join(cluster_t *cluster, const dir_worker_t *hello, uint32_t *id_p)
{
    const dir_worker_t *workers;
    char other[64] = "";

    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_worker_join(cluster->directory, hello, attn_now_ns(), id_p);
    uint32_t n           = directory_workers(cluster->directory, &workers);
    for (uint32_t i = 0; i < n; i++) {
        if (workers[i].alive && strcmp(workers[i].kind, hello->kind) != 0) {
            memcpy(other, workers[i].kind, sizeof(other));
        }
    }
    pthread_mutex_unlock(&cluster->lock);
    if (status == ATTN_OK && other[0] != 0) {
        attn_log(ATTN_LOG_WARN, "worker.other_kind",
                 "worker=%u kind=%s others=%s note=\"a cache lives on workers of one kind\"", *id_p,
                 hello->kind, other);
    }
    return status;
}

attn_status_t
cluster_worker_heartbeat(cluster_t *cluster, const dir_worker_t *figures)
{
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_worker_heartbeat(cluster->directory, figures->id,
                                                      figures->incarnation, figures, attn_now_ns());
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

/* ---- clients ---- */

attn_status_t
cluster_client_open(cluster_t *cluster, const char *name, uint32_t *client_p)
{
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_client_open(cluster->directory, name, attn_now_ns(), client_p);
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

attn_status_t
cluster_client_renew(cluster_t *cluster, uint32_t client, const cost_link_t *told)
{
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_client_renew(cluster->directory, client, attn_now_ns());
    if (status == ATTN_OK) {
        directory_client_link(cluster->directory, client, told);
    }
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

void
cluster_client_close(cluster_t *cluster, uint32_t client)
{
    pthread_mutex_lock(&cluster->lock);
    directory_client_close(cluster->directory, client);
    pthread_mutex_unlock(&cluster->lock);
    cluster_flush(cluster);
}

/* ---- caches ---- */

/* A region of the cache on one worker. */
static attn_status_t
cache_open_on(cluster_t *cluster, uint64_t cache, const char *name, const attn_geometry_t *geometry,
              uint32_t worker)
{
    link_t *link;
    kv_region_info_t region;
    attn_status_t status = cluster_link(cluster, worker, &link);

    if (status == ATTN_OK) {
        status = link->ops->cache_open(link, cluster_epoch(cluster), cache, name, geometry,
                                       cluster_worker_deadline(), &region);
    }
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&cluster->lock);
    status = directory_cache_on_worker(cluster->directory, cache, worker, region.n_pages);
    pthread_mutex_unlock(&cluster->lock);
    if (status !=
        ATTN_OK) { /* of another kind, or closed meanwhile: nobody would return the region */
        link->ops->cache_close(link, cluster_epoch(cluster), cache, cluster_worker_deadline());
    }
    return status;
}

static bool
cannot_reach(attn_status_t status)
{
    return status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_DEADLINE ||
           status == ATTN_ERR_CANCELLED;
}

/* Regions on every live worker. One that cannot be reached gets its own from cluster_tick(). */
static attn_status_t
cache_open_everywhere(cluster_t *cluster, uint64_t cache, const char *name,
                      const attn_geometry_t *geometry)
{
    uint32_t ids[DIR_WORKERS_MAX], opened = 0;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&cluster->lock);
    uint32_t n = directory_workers_alive(cluster->directory, ids, DIR_WORKERS_MAX);
    pthread_mutex_unlock(&cluster->lock);
    for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
        status = cache_open_on(cluster, cache, name, geometry, ids[i]);
        opened += status == ATTN_OK;
        status = cannot_reach(status) ? ATTN_OK : status;
    }
    if (status == ATTN_OK && opened == 0) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "cache %s: none of %u workers can be reached", name,
                         n);
    }
    return status;
}

attn_status_t
cluster_cache_geometry(cluster_t *cluster, uint64_t cache, attn_geometry_t *geometry,
                       void **table_p)
{
    pthread_mutex_lock(&cluster->lock);
    const dir_cache_t *known = directory_cache(cluster->directory, cache);
    attn_status_t status     = known != NULL ? geometry_copy(&known->geometry, geometry, table_p)
                                             : attn_fail(ATTN_ERR_NOT_FOUND, "no cache %llu is open",
                                                         (unsigned long long)cache);
    pthread_mutex_unlock(&cluster->lock);
    return status;
}

attn_status_t
cluster_cache_open(cluster_t *cluster, uint32_t client, const char *name,
                   const attn_geometry_t *geometry, uint64_t *cache_p, char kind[64])
{
    bool created = false;
    attn_geometry_t complete;
    void *table = NULL;

    pthread_mutex_lock(&cluster->open_lock);
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status =
        directory_cache_open(cluster->directory, client, name, geometry, cache_p, &created);
    pthread_mutex_unlock(&cluster->lock);
    if (status == ATTN_OK && created) {
        status = cluster_cache_geometry(cluster, *cache_p, &complete, &table);
        if (status == ATTN_OK) {
            status = cache_open_everywhere(cluster, *cache_p, name, &complete);
        }
        if (status != ATTN_OK) {
            char sentence[512];
            strncpy(sentence, attn_last_error(), sizeof(sentence) - 1);
            sentence[sizeof(sentence) - 1] = 0;
            pthread_mutex_lock(&cluster->lock);
            directory_cache_close(cluster->directory, client, *cache_p);
            pthread_mutex_unlock(&cluster->lock);
            cluster_flush(cluster);
            attn_fail(status, "%s", sentence);
        }
        free(table);
    }
    if (status == ATTN_OK) {
        pthread_mutex_lock(&cluster->lock);
        const dir_cache_t *cache = directory_cache(cluster->directory, *cache_p);
        if (cache != NULL) {
            memcpy(kind, cache->kind, 64);
        } else {
            status = attn_fail(ATTN_ERR_NOT_FOUND,
                               "cache %s was closed again: its client's lease ran out", name);
        }
        pthread_mutex_unlock(&cluster->lock);
    }
    pthread_mutex_unlock(&cluster->open_lock);
    return status;
}

attn_status_t
cluster_cache_close(cluster_t *cluster, uint32_t client, uint64_t cache)
{
    pthread_mutex_lock(&cluster->open_lock);
    pthread_mutex_lock(&cluster->lock);
    attn_status_t status = directory_cache_close(cluster->directory, client, cache);
    pthread_mutex_unlock(&cluster->lock);
    cluster_flush(cluster);
    pthread_mutex_unlock(&cluster->open_lock);
    return status;
}

/* ---- effects ---- */

static effect_node_t *
effects_take(cluster_t *cluster)
{
    pthread_mutex_lock(&cluster->lock);
    effect_node_t *list  = cluster->effects;
    cluster->effects     = NULL;
    cluster->effects_end = &cluster->effects;
    pthread_mutex_unlock(&cluster->lock);
    return list;
}

/* The first effect and those after it that one call can do with it: returns how many. */
static uint32_t
effects_group(const effect_node_t *first, uint64_t *chunks)
{
    uint32_t n = 0;

    for (const effect_node_t *e = first; e != NULL && n < RELEASES_MAX; e = e->next) {
        if (n > 0 &&
            (e->effect.type != DIR_RELEASE_CHUNK || first->effect.type != DIR_RELEASE_CHUNK ||
             e->effect.worker != first->effect.worker || e->effect.cache != first->effect.cache)) {
            break;
        }
        chunks[n++] = e->effect.chunk;
    }
    return n;
}

/* True if the effect is done with: it happened, or its worker is gone. *away is a set of workers
 * that did not answer, by id mod 64: one wait for each is enough, the others are put off. */
static bool
effect_do(cluster_t *cluster, const dir_effect_t *effect, const uint64_t *chunks, uint32_t n,
          uint64_t *away)
{
    uint64_t worker = UINT64_C(1) << effect->worker % 64;
    link_t *link;

    attn_status_t status = cluster_link(cluster, effect->worker, &link);
    if (status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_NOT_FOUND) {
        return true; /* it is lost, and everything with it */
    }
    if (status != ATTN_OK || *away & worker) {
        return false;
    }
    uint64_t epoch = cluster_epoch(cluster), deadline = cluster_worker_deadline();
    switch (effect->type) {
    case DIR_RELEASE_CHUNK:
        status = link->ops->chunks_release(link, epoch, effect->cache, chunks, n, deadline);
        break;
    case DIR_CLOSE_CACHE:
        status = link->ops->cache_close(link, epoch, effect->cache, deadline);
        break;
    case DIR_KEEP_CHUNK:
        status = link->ops->chunk_leave(
            link, epoch, effect->cache,
            &(kv_leaving_t){.what = KV_LEAVE_STAY, .chunk = effect->chunk, .move = effect->move},
            deadline, &(kv_chunk_info_t){0});
        break;
    }
    *away |= cannot_reach(status) ? worker : 0;
    return status == ATTN_OK || status == ATTN_ERR_NOT_FOUND;
}

void
cluster_flush(cluster_t *cluster)
{
    uint64_t chunks[RELEASES_MAX], away = 0;
    effect_node_t *list = effects_take(cluster);

    while (list != NULL) {
        uint32_t n = effects_group(list, chunks);
        bool done  = effect_do(cluster, &list->effect, chunks, n, &away);
        for (uint32_t i = 0; i < n; i++) {
            effect_node_t *node = list;
            list                = node->next;
            if (!done) {
                pthread_mutex_lock(&cluster->lock);
                note_effect(cluster, &node->effect);
                pthread_mutex_unlock(&cluster->lock);
            }
            free(node);
        }
    }
}

/* ---- time ---- */

/* New workers: what the way to them costs, for the cost model. */
static void
ping_new_workers(cluster_t *cluster)
{
    uint32_t ids[DIR_WORKERS_MAX];
    link_t *link;

    pthread_mutex_lock(&cluster->lock);
    uint32_t n     = directory_workers_alive(cluster->directory, ids, DIR_WORKERS_MAX);
    uint32_t known = cluster->pinged;
    pthread_mutex_unlock(&cluster->lock);
    for (uint32_t i = 0; i < n; i++) {
        if (ids[i] <= known || cluster_link(cluster, ids[i], &link) != ATTN_OK) {
            continue;
        }
        cost_link_t way; /* a worker that does not answer stays without */
        measure_link(link, cluster_worker_deadline(), &way);
        pthread_mutex_lock(&cluster->lock);
        cluster->pinged = ids[i] > cluster->pinged ? ids[i] : cluster->pinged;
        directory_worker_link(cluster->directory, ids[i], &way);
        pthread_mutex_unlock(&cluster->lock);
    }
}

/* Does the worker lack a region of the cache that it could have? Another kind of arithmetic could
 * not serve it. Under the lock. */
static bool
is_missing(const cluster_t *cluster, uint64_t cache, uint32_t worker)
{
    const char *kind = directory_cache(cluster->directory, cache)->kind;

    return !directory_cache_is_on(cluster->directory, cache, worker) &&
           (kind[0] == 0 || strcmp(kind, directory_worker(cluster->directory, worker)->kind) == 0);
}

/* A live worker that lacks a region of an open cache. */
static bool
find_missing(cluster_t *cluster, uint64_t *cache_p, uint32_t *worker_p, uint32_t skip)
{
    uint64_t caches[DIR_CACHES_MAX];
    uint32_t workers[DIR_WORKERS_MAX];
    bool found = false;

    pthread_mutex_lock(&cluster->lock);
    uint32_t n_caches  = directory_caches(cluster->directory, caches, DIR_CACHES_MAX);
    uint32_t n_workers = directory_workers_alive(cluster->directory, workers, DIR_WORKERS_MAX);
    for (uint32_t c = 0; c < n_caches && !found; c++) {
        for (uint32_t w = 0; w < n_workers && !found; w++) {
            if (is_missing(cluster, caches[c], workers[w]) && skip-- == 0) {
                *cache_p  = caches[c];
                *worker_p = workers[w];
                found     = true;
            }
        }
    }
    pthread_mutex_unlock(&cluster->lock);
    return found;
}

static void
open_missing(cluster_t *cluster)
{
    uint64_t cache;
    uint32_t worker, failed = 0;
    attn_geometry_t geometry;
    void *table;
    char name[129];

    if (attn_now_ns() < cluster->open_again_ns) {
        return;
    }
    while (find_missing(cluster, &cache, &worker, failed)) {
        pthread_mutex_lock(&cluster->lock);
        const dir_cache_t *known = directory_cache(cluster->directory, cache);
        bool open                = known != NULL;
        memcpy(name, open ? known->name : "", open ? sizeof(name) : 1);
        pthread_mutex_unlock(&cluster->lock);
        if (!open || cluster_cache_geometry(cluster, cache, &geometry, &table) != ATTN_OK) {
            continue;
        }
        attn_status_t status = cache_open_on(cluster, cache, name, &geometry, worker);
        if (status != ATTN_OK) {
            failed++;
            cluster->open_again_ns = attn_now_ns() + OPEN_AGAIN_MS * ATTN_NS_PER_MS;
            attn_log(ATTN_LOG_WARN, "cache.open.failed", "cache=%llu worker=%u reason=\"%s\"",
                     (unsigned long long)cache, worker, attn_last_error());
        }
        free(table);
    }
}

void
cluster_tick(cluster_t *cluster)
{
    pthread_mutex_lock(&cluster->lock);
    directory_tick(cluster->directory, attn_now_ns());
    pthread_mutex_unlock(&cluster->lock);
    ping_new_workers(cluster);
    pthread_mutex_lock(&cluster->open_lock);
    open_missing(cluster);
    pthread_mutex_unlock(&cluster->open_lock);
    cluster_flush(cluster);
}

attn_status_t
cluster_describe(cluster_t *cluster, attn_cluster_info_t *info)
{
    const dir_worker_t *workers;

    pthread_mutex_lock(&cluster->lock);
    uint32_t n       = directory_workers(cluster->directory, &workers);
    cost_link_t told = directory_clients_link(cluster->directory);
    *info            = (attn_cluster_info_t){
                   .epoch                  = directory_epoch(cluster->directory),
                   .sequences              = seq_count(directory_sequences(cluster->directory)),
                   .uptime_ms              = (attn_now_ns() - cluster->start_ns) / ATTN_NS_PER_MS,
                   .clients                = directory_clients(cluster->directory),
                   .caches                 = directory_caches(cluster->directory, NULL, 0),
                   .clients_hop_seconds    = told.hop_seconds,
                   .clients_send_seconds   = told.send_seconds,
                   .clients_link_bandwidth = told.bandwidth,
                   .n_workers              = n,
                   .workers                = calloc(n + 1, sizeof(attn_worker_info_t)),
    };
    for (uint32_t i = 0; info->workers != NULL && i < n; i++) {
        const dir_worker_t *w    = &workers[i];
        attn_worker_info_t *into = &info->workers[i];

        *into = (attn_worker_info_t){.id                = w->id,
                                     .alive             = w->alive,
                                     .slab_bytes        = w->slab_bytes,
                                     .region_bytes      = w->region_bytes,
                                     .used_bytes        = w->used_bytes,
                                     .chunks            = w->chunks,
                                     .open_steps        = w->open_steps,
                                     .runs              = w->runs,
                                     .kv_bytes          = w->kv_bytes,
                                     .device_bytes      = w->device_bytes,
                                     .device_free_bytes = w->device_free,
                                     .kv_bytes_per_s    = w->kv_rate,
                                     .read_bandwidth    = w->speed.read_bandwidth,
                                     .ucx               = w->ucx,
                                     .ucx_clients       = w->ucx_clients,
                                     .ucx_runs          = w->ucx_runs,
                                     .gpu_clients       = w->gpu_clients,
                                     .groups            = w->groups,
                                     .gpu_runs          = w->gpu_runs,
                                     .leaving           = w->leaving,
                                     .attend_seconds    = w->speed.attend_seconds,
                                     .hop_seconds       = w->link.hop_seconds,
                                     .link_bandwidth    = w->link.bandwidth};
        memcpy(into->few_flops, w->speed.few_flops, sizeof(into->few_flops));
        memcpy(into->many_flops, w->speed.many_flops, sizeof(into->many_flops));
        memcpy(into->address, w->address, sizeof(into->address));
        memcpy(into->kind, w->kind, sizeof(into->kind));
        memcpy(into->device, w->device, sizeof(into->device));
        memcpy(into->ucx_ways, w->ucx_ways, sizeof(into->ucx_ways));
        memcpy(into->group_host, w->place.host, sizeof(into->group_host));
        memcpy(into->group_device, w->place.device, sizeof(into->group_device));
    }
    pthread_mutex_unlock(&cluster->lock);
    return info->workers != NULL ? ATTN_OK
                                 : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u workers", n);
}

attn_status_t
cluster_figures(cluster_t *cluster, cluster_figures_t *figures)
{
    const dir_worker_t *workers;

    pthread_mutex_lock(&cluster->lock);
    const directory_t *directory = cluster->directory;
    uint32_t n                   = directory_workers(directory, &workers);
    uint64_t now                 = attn_now_ns();
    *figures                     = (cluster_figures_t){
                            .epoch     = directory_epoch(directory),
                            .sequences = seq_count(directory_sequences(directory)),
                            .uptime_ms = (now - cluster->start_ns) / ATTN_NS_PER_MS,
                            .now_ns    = now,
                            .clients   = directory_clients(directory),
                            .caches    = directory_caches(directory, NULL, 0),
                            .n_workers = n,
                            .counts    = *directory_counts(directory),
                            .workers   = malloc((n + 1) * sizeof(*workers)),
    };
    if (figures->workers != NULL && n > 0) {
        memcpy(figures->workers, workers, n * sizeof(*workers));
    }
    pthread_mutex_unlock(&cluster->lock);
    return figures->workers != NULL ? ATTN_OK
                                    : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u workers", n);
}
