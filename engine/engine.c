/*
 * engine.c: the device, its slab, the caches on it, and the chunk operations.
 *
 * A cache's region holds its layers one after the other; a layer holds every page, and a
 * page holds its K and then its V:
 *
 *     region  [ layer 0: page 0 (K V) page 1 (K V) ... | layer 1: page 0 (K V) ... | ... ]
 *
 * so that a page index means the same page in every layer, at a fixed stride.
 */
#include "engine/engine_int.h"
#include "engine/speed.h"

#include "balancer/geometry.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SLAB_UNIT UINT64_C(4096)
#define SLAB_LEAST (UINT64_C(1) << 20) /* of one that takes what there is; and its unit */

/* ---- open and close ---- */

/* How large the slab is to be: as asked, or as the device has it. */
static attn_status_t
settle_slab(engine_t *engine, const engine_options_t *options)
{
    attn_device_t device = {0};
    uint64_t bytes       = options->slab_bytes;

    if (bytes == 0) {
        attn_status_t status = engine->backend->ops->device(engine->backend, &device);
        if (status != ATTN_OK) {
            return status;
        }
        bytes = ENGINE_SLAB_BYTES;
    }
    if (options->slab_bytes == 0 && device.dedicated) {
        if (device.free_bytes < options->reserve_bytes ||
            device.free_bytes - options->reserve_bytes < SLAB_LEAST) {
            return attn_fail(ATTN_ERR_NO_MEMORY,
                             "%s has %llu of %llu bytes free, and %llu are reserved: no room for a "
                             "slab",
                             device.name, (unsigned long long)device.free_bytes,
                             (unsigned long long)device.total_bytes,
                             (unsigned long long)options->reserve_bytes);
        }
        bytes = (device.free_bytes - options->reserve_bytes) / SLAB_LEAST * SLAB_LEAST;
    }
    engine->slab_bytes = bytes / SLAB_UNIT * SLAB_UNIT;
    return ATTN_OK;
}

attn_status_t
engine_create(const engine_options_t *options, engine_t **engine_p)
{
    const attn_backend_ops_t *ops;
    uint32_t ordinal;
    attn_status_t status = attn_backend_parse(options->device, &ops, &ordinal);

    if (status != ATTN_OK) {
        return status;
    }
    if (options->slab_bytes > 0 && options->slab_bytes < SLAB_UNIT) {
        return attn_fail(ATTN_ERR_INVALID, "slab_bytes is %llu: at least 4096",
                         (unsigned long long)options->slab_bytes);
    }
    engine_t *engine = calloc(1, sizeof(*engine));
    if (engine == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for an engine");
    }
    strncpy(engine->name, options->name != NULL ? options->name : "local",
            sizeof(engine->name) - 1);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->groups_lock, NULL);
    pthread_mutex_init(&engine->spare_lock, NULL);
    engine->ordinal = ordinal;

    status = ops->open(options->threads, ordinal, &engine->backend);
    if (status != ATTN_OK) {
        goto err_free;
    }
    ops->leaf_sizes(engine->backend, &engine->leaf_few, &engine->leaf_many);
    engine_speed_measure(engine->backend, &engine->speed); /* before the slab takes the memory */
    void *slab = NULL;
    status     = settle_slab(engine, options);
    if (status != ATTN_OK) {
        goto err_close;
    }
    status = ops->slab_alloc(engine->backend, engine->slab_bytes, &slab);
    if (status != ATTN_OK) {
        goto err_close;
    }
    engine->slab = slab;
    status       = kv_store_create(engine->slab_bytes, &engine->store);
    if (status != ATTN_OK) {
        goto err_slab;
    }
    *engine_p = engine;
    return ATTN_OK;

err_slab:
    ops->slab_free(engine->backend, engine->slab, engine->slab_bytes);
err_close:
    ops->close(engine->backend);
err_free:
    pthread_mutex_destroy(&engine->spare_lock);
    pthread_mutex_destroy(&engine->groups_lock);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
    return status;
}

void
engine_destroy(engine_t *engine)
{
    if (engine == NULL) {
        return;
    }
    engine_caches_close(engine);
    engine_caches_wait(engine);
    engine_groups_free(engine);
    HASH_CLEAR(hh, engine->ended_by_id);
    kv_store_destroy(engine->store);
    engine->backend->ops->slab_free(engine->backend, engine->slab, engine->slab_bytes);
    engine->backend->ops->close(engine->backend);
    engine_spares_free(engine);
    pthread_mutex_destroy(&engine->spare_lock);
    pthread_mutex_destroy(&engine->groups_lock);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

void
engine_describe(engine_t *engine, engine_info_t *info)
{
    uint64_t total, largest;

    memset(info, 0, sizeof(*info));
    info->kind           = engine->backend->ops->kind(engine->backend);
    info->speed          = engine->speed;
    info->slab_bytes     = engine->slab_bytes;
    info->runs           = atomic_load(&engine->runs);
    info->times.total_ns = atomic_load(&engine->run_ns);
    for (uint32_t b = 0; b < ENGINE_TIMES; b++) {
        info->times.counts[b] = atomic_load(&engine->run_times[b]);
    }
    info->kv_bytes = atomic_load(&engine->kv_bytes);
    if (engine->backend->ops->device(engine->backend, &info->device) != ATTN_OK) {
        info->device = (attn_device_t){0};
    }
    info->groups = engine_groups_count(engine);

    pthread_mutex_lock(&engine->lock);
    info->kv_rate = engine_rate_of(&engine->rate, attn_now_ns(), info->kv_bytes);
    kv_store_free_bytes(engine->store, &total, &largest);
    info->region_bytes = engine->slab_bytes - total;
    info->open_steps   = HASH_COUNT(engine->steps);
    info->caches       = HASH_COUNT(engine->caches);
    info->steps        = engine->counts;
    info->epoch        = engine->epoch;
    for (engine_cache_t *c = engine->caches; c != NULL; c = c->hh.next) {
        kv_region_info_t region;
        if (kv_region_describe(engine->store, c->id, &region) == ATTN_OK && region.n_pages > 0) {
            info->chunks += region.chunks;
            info->used_bytes += c->layer_bytes / region.n_pages * c->geometry.layers *
                                (region.n_pages - region.free_pages);
        }
    }
    pthread_mutex_unlock(&engine->lock);
}

const char *
engine_failed(const engine_t *engine)
{
    const attn_backend_ops_t *ops = engine->backend->ops;

    return ops->failed != NULL ? ops->failed(engine->backend) : NULL;
}

attn_status_t
engine_check_epoch(engine_t *engine, uint64_t epoch)
{
    pthread_mutex_lock(&engine->lock);
    uint64_t known = engine->epoch;
    pthread_mutex_unlock(&engine->lock);
    if (epoch != 0 && epoch < known) {
        return attn_fail(ATTN_ERR_STALE, "epoch %llu is stale: %s is at %llu; get a fresh layout",
                         (unsigned long long)epoch, engine->name, (unsigned long long)known);
    }
    return ATTN_OK;
}

void
engine_set_epoch(engine_t *engine, uint64_t epoch)
{
    pthread_mutex_lock(&engine->lock);
    engine->epoch = attn_max(engine->epoch, epoch);
    pthread_mutex_unlock(&engine->lock);
}

/* ---- caches ---- */

void
engine_cache_free(engine_cache_t *cache)
{
    free(cache->table);
    free(cache->variant_of);
    free(cache->variants);
    free(cache);
}

/* Find the layer table's distinct (window, causal) rows: each gets one plan a step. */
static bool
cache_find_variants(engine_cache_t *cache)
{
    uint32_t n        = cache->geometry.layers;
    cache->variant_of = calloc(n, sizeof(*cache->variant_of));
    cache->variants   = calloc(n, sizeof(*cache->variants));
    if (cache->variant_of == NULL || cache->variants == NULL) {
        return false;
    }
    for (uint32_t l = 0; l < n; l++) {
        const attn_layer_t *layer = &cache->geometry.layer_table[l];
        uint32_t v                = 0;
        while (v < cache->n_variants && (cache->variants[v].window != layer->window ||
                                         cache->variants[v].causal != layer->causal)) {
            v++;
        }
        cache->variants[v]   = (engine_variant_t){.window = layer->window, .causal = layer->causal};
        cache->n_variants    = v == cache->n_variants ? v + 1 : cache->n_variants;
        cache->variant_of[l] = v;
    }
    return true;
}

static uint64_t
page_layer_bytes(const attn_geometry_t *g)
{
    return (uint64_t)g->page_size * g->kv_heads * (g->head_dim_k + g->head_dim_v) *
           attn_dtype_size(g->kv_dtype);
}

/* The geometry comes from outside: geometry_copy() checks every field before anything is computed.
 */
static attn_status_t
cache_take_region(engine_t *engine, engine_cache_t *cache, const attn_geometry_t *geometry)
{
    attn_geometry_t *g = &cache->geometry;
    uint64_t page_bytes;

    attn_status_t status = geometry_copy(geometry, g, &cache->table);
    if (status == ATTN_OK) {
        status = engine->backend->ops->supports(engine->backend, g);
    }
    if (status != ATTN_OK) {
        return status;
    }
    if (g->chunk_size < engine->leaf_few) { /* a leaf of many rows ends where its chunk does */
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk_size is %u tokens: at least %u, a leaf of this backend",
                         g->chunk_size, engine->leaf_few);
    }
    if (!attn_mul(page_layer_bytes(g), g->layers, &page_bytes)) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "a page of this geometry exceeds 2^64 bytes");
    }
    if (!cache_find_variants(cache)) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the layer table of cache %llu",
                         (unsigned long long)cache->id);
    }
    status = kv_region_open(engine->store, cache->id, page_bytes, g->page_size, g->chunk_size,
                            g->region_bytes, &cache->region);
    cache->layer_bytes = page_layer_bytes(g) * cache->region.n_pages;
    return status;
}

static attn_status_t
cache_create(engine_t *engine, uint64_t id, const attn_geometry_t *geometry,
             engine_cache_t **cache_p)
{
    engine_cache_t *cache = calloc(1, sizeof(*cache));

    if (cache == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for cache %llu", (unsigned long long)id);
    }
    cache->id            = id;
    attn_status_t status = cache_take_region(engine, cache, geometry);
    if (status != ATTN_OK) {
        engine_cache_free(cache);
        return status;
    }
    *cache_p = cache;
    return ATTN_OK;
}

/* The cache is open: with this geometry? */
static attn_status_t
cache_join(const engine_t *engine, const engine_cache_t *cache, const attn_geometry_t *geometry)
{
    attn_geometry_t asked;
    void *table;
    attn_status_t status = geometry_copy(geometry, &asked, &table);

    if (status != ATTN_OK) {
        return status;
    }
    status = geometry_compare(&cache->geometry, &asked);
    free(table);
    return status == ATTN_OK
               ? status
               : attn_fail_in(status, "cache %llu is open on %s with another geometry: ",
                              (unsigned long long)cache->id, engine->name);
}

attn_status_t
engine_cache_open(engine_t *engine, uint64_t id, const attn_geometry_t *geometry,
                  kv_region_info_t *info)
{
    engine_cache_t *cache = NULL;
    attn_status_t status  = ATTN_OK;

    pthread_mutex_lock(&engine->lock);
    HASH_FIND(hh, engine->caches, &id, sizeof(id), cache);
    if (cache != NULL && cache->closing) {
        status = attn_fail(ATTN_ERR_BUSY, "cache %llu is being closed on %s",
                           (unsigned long long)id, engine->name);
    } else if (cache != NULL) {
        status = cache_join(engine, cache, geometry);
    } else {
        status = cache_create(engine, id, geometry, &cache);
        if (status == ATTN_OK) {
            HASH_ADD(hh, engine->caches, id, sizeof(cache->id), cache);
            if (!table_has(hh, cache)) {
                kv_region_close(engine->store, id);
                engine_cache_free(cache);
                status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a cache");
            }
        }
    }
    if (status == ATTN_OK) {
        status = kv_region_describe(engine->store, id, info);
    }
    pthread_mutex_unlock(&engine->lock);
    return status;
}

engine_cache_t *
engine_cache_find(engine_t *engine, uint64_t id)
{
    engine_cache_t *cache;

    HASH_FIND(hh, engine->caches, &id, sizeof(id), cache);
    if (cache == NULL || cache->closing) {
        attn_fail(ATTN_ERR_NOT_FOUND, "no cache %llu on %s%s", (unsigned long long)id, engine->name,
                  cache == NULL ? ""
                                : ": it was closed, and goes when the device is through with it");
        return NULL;
    }
    return cache;
}

void
engine_kv_view(const engine_t *engine, const engine_cache_t *cache, uint32_t layer, attn_kv_t *kv)
{
    const attn_geometry_t *g = &cache->geometry;
    uint64_t element         = attn_dtype_size(g->kv_dtype);
    uint64_t k_bytes         = (uint64_t)g->page_size * g->kv_heads * g->head_dim_k * element;
    uint8_t *base            = engine->slab + cache->region.offset + layer * cache->layer_bytes;

    *kv = (attn_kv_t){
        .k             = base,
        .v             = base + k_bytes,
        .k_page_stride = page_layer_bytes(g) / element,
        .v_page_stride = page_layer_bytes(g) / element,
        .n_pages       = cache->region.n_pages,
        .dtype         = g->kv_dtype,
        .kv_heads      = g->kv_heads,
        .head_dim_k    = g->head_dim_k,
        .head_dim_v    = g->head_dim_v,
        .page_size     = g->page_size,
        .chunk_size    = g->chunk_size,
    };
}

/* ---- chunks ---- */

attn_status_t
engine_chunk_fork(engine_t *engine, uint64_t cache, uint64_t from, uint32_t length, uint64_t to)
{
    pthread_mutex_lock(&engine->lock);
    attn_status_t status = kv_chunk_fork(engine->store, cache, from, length, to);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

attn_status_t
engine_chunk_truncate(engine_t *engine, uint64_t cache, uint64_t chunk, uint32_t generation,
                      uint32_t length, uint32_t *generation_p)
{
    pthread_mutex_lock(&engine->lock);
    attn_status_t status =
        kv_chunk_truncate(engine->store, cache, chunk, generation, length, generation_p);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

attn_status_t
engine_chunks_release(engine_t *engine, uint64_t cache, const uint64_t *chunks, uint32_t n)
{
    attn_status_t result = ATTN_OK;
    char sentence[512]; /* of the first that is busy: of those after it some may not be here */

    pthread_mutex_lock(&engine->lock);
    engine_cache_t *known = engine_cache_find(engine, cache);
    for (uint32_t i = 0; i < n && known != NULL; i++) {
        attn_status_t status = kv_chunk_release(engine->store, cache, chunks[i]);
        if (status == ATTN_OK || status == ATTN_ERR_NOT_FOUND) {
            known->released[known->n_released++ % RELEASED_CHUNKS] = chunks[i];
        } else if (result == ATTN_OK) {
            result = status;
            snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return result == ATTN_OK ? ATTN_OK : attn_fail(result, "%s", sentence);
}

bool
engine_was_released(const engine_cache_t *cache, uint64_t chunk)
{
    uint64_t n = attn_min(cache->n_released, RELEASED_CHUNKS);

    for (uint64_t i = 0; i < n; i++) {
        if (cache->released[i] == chunk) {
            return true;
        }
    }
    return false;
}

attn_status_t
engine_chunks_describe(engine_t *engine, uint64_t cache, const uint64_t *chunks, uint32_t n,
                       kv_chunk_info_t *infos, const uint64_t *seqs, uint32_t n_seqs, bool *in_step)
{
    pthread_mutex_lock(&engine->lock);
    bool found = engine_cache_find(engine, cache) != NULL;
    for (uint32_t i = 0; found && i < n; i++) {
        if (kv_chunk_describe(engine->store, cache, chunks[i], &infos[i]) != ATTN_OK) {
            memset(&infos[i], 0, sizeof(infos[i]));
        }
    }
    for (uint32_t i = 0; found && i < n_seqs; i++) {
        in_step[i] = kv_seq_in_step(engine->store, cache, seqs[i]);
    }
    pthread_mutex_unlock(&engine->lock);
    return found ? ATTN_OK : ATTN_ERR_NOT_FOUND;
}

/* Under the lock. */
static attn_status_t
export_bytes(engine_t *engine, const engine_export_t *what, engine_cache_t **cache_p,
             uint64_t *k_bytes, uint64_t *v_bytes)
{
    engine_cache_t *cache = engine_cache_find(engine, what->cache);

    if (cache == NULL) {
        return ATTN_ERR_NOT_FOUND;
    }
    const attn_geometry_t *g = &cache->geometry;
    if (what->layer >= g->layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", what->layer, g->layers);
    }
    if (what->n > 1 && what->n > ENGINE_EXPORT_BYTES_MAX / engine_kv_row_bytes(g)) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "n is %u tokens of %llu bytes: at most %u bytes, or one", what->n,
                         (unsigned long long)engine_kv_row_bytes(g), ENGINE_EXPORT_BYTES_MAX);
    }
    *cache_p = cache;
    *k_bytes = (uint64_t)what->n * g->kv_heads * g->head_dim_k * attn_dtype_size(g->kv_dtype);
    *v_bytes = what->n * engine_kv_row_bytes(g) - *k_bytes;
    return ATTN_OK;
}

attn_status_t
engine_export_bytes(engine_t *engine, const engine_export_t *what, uint64_t *k_bytes,
                    uint64_t *v_bytes)
{
    engine_cache_t *cache;

    pthread_mutex_lock(&engine->lock);
    attn_status_t status = export_bytes(engine, what, &cache, k_bytes, v_bytes);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

/* A part of a chunk that is being read. */
typedef struct reading {
    attn_kv_t kv;
    uint32_t *pages, *offsets; /* [n], in one block */
    uint32_t n_held;           /* of the tokens: to be read without the lock */
    kv_read_t *held;
} reading_t;

/* Check, hold the pages, and read what cannot be held. Under the lock. */
static attn_status_t
export_begin(engine_t *engine, const engine_export_t *what, uint8_t *k, uint8_t *v,
             uint64_t k_bytes, uint64_t v_bytes, reading_t *r)
{
    uint64_t k_wanted = 0, v_wanted = 0;
    engine_cache_t *cache = NULL;
    attn_status_t status  = export_bytes(engine, what, &cache, &k_wanted, &v_wanted);

    if (status == ATTN_OK && (k_bytes != k_wanted || v_bytes != v_wanted)) {
        status = attn_fail(ATTN_ERR_INVALID, "k and v have %llu and %llu bytes: %llu and %llu",
                           (unsigned long long)k_bytes, (unsigned long long)v_bytes,
                           (unsigned long long)k_wanted, (unsigned long long)v_wanted);
    }
    if (status != ATTN_OK) {
        return status;
    }
    r->pages = malloc(2 * sizeof(*r->pages) * (what->n + (size_t)1));
    if (r->pages == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to read %u tokens", what->n);
    }
    r->offsets = r->pages + what->n;
    status = kv_read_begin(engine->store, what->cache, what->chunk, what->generation, what->first,
                           what->n, r->pages, r->offsets, &r->n_held, &r->held);
    if (status != ATTN_OK) {
        return status;
    }
    engine_kv_view(engine, cache, what->layer, &r->kv);
    uint32_t rest = what->n - r->n_held;
    return rest == 0 ? ATTN_OK
                     : engine->backend->ops->read(engine->backend, &r->kv, r->pages + r->n_held,
                                                  r->offsets + r->n_held, rest,
                                                  k + k_bytes / what->n * r->n_held,
                                                  v + v_bytes / what->n * r->n_held);
}

attn_status_t
engine_chunk_export(engine_t *engine, const engine_export_t *what, void *k, void *v,
                    uint64_t k_bytes, uint64_t v_bytes)
{
    reading_t r = {0};

    pthread_mutex_lock(&engine->lock);
    attn_status_t status = export_begin(engine, what, k, v, k_bytes, v_bytes, &r);
    pthread_mutex_unlock(&engine->lock);
    if (status == ATTN_OK) {
        status =
            engine->backend->ops->read(engine->backend, &r.kv, r.pages, r.offsets, r.n_held, k, v);
    }
    if (r.held != NULL) {
        pthread_mutex_lock(&engine->lock);
        kv_read_end(r.held);
        pthread_mutex_unlock(&engine->lock);
    }
    free(r.pages);
    return status;
}

attn_status_t
engine_check(engine_t *engine)
{
    pthread_mutex_lock(&engine->lock);
    attn_status_t status = kv_store_check(engine->store);
    pthread_mutex_unlock(&engine->lock);
    return status;
}
