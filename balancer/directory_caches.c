/*
 * Caches by name and by id, and where each has a region. A region on a live worker is a spot;
 * spots are kept in the order of worker ids, for that order numbers the workers of a spread
 * sequence.
 */
#include "balancer/directory_int.h"
#include "balancer/geometry.h"
#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>

dir_cache_entry_t *
dir_cache_find(const directory_t *directory, uint64_t id)
{
    dir_cache_entry_t *cache = NULL;

    HASH_FIND(hh_id, directory->by_id, &id, sizeof(id), cache);
    return cache;
}

attn_status_t
dir_cache_get(const directory_t *directory, uint64_t id, dir_cache_entry_t **cache_p)
{
    dir_cache_entry_t *cache = dir_cache_find(directory, id);

    if (!cache) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "cache %" PRIu64 " is not open", id);
    }
    *cache_p = cache;
    return ATTN_OK;
}

static attn_status_t
check_name(const char *name)
{
    const char *allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./";
    size_t room         = sizeof(((dir_cache_t *)NULL)->name);
    size_t length       = name ? strnlen(name, room) : 0;

    if (length == 0 || length == room) {
        return attn_fail(ATTN_ERR_INVALID, "a cache's name is %s: it must have 1 to %zu bytes",
                         length == 0 ? "empty" : "too long", room - 1);
    }
    size_t good = strspn(name, allowed);
    if (good != length) {
        return attn_fail(ATTN_ERR_INVALID,
                         "a cache's name has byte 0x%02x at %zu: letters, digits, "
                         "'-', '_', '.' and '/' are allowed",
                         (unsigned char)name[good], good);
    }
    return ATTN_OK;
}

static void
entry_free(dir_cache_entry_t *cache)
{
    free(cache->spots);
    free(cache->table);
    free(cache);
}

/* A new cache in both tables, open by nobody yet. */
static attn_status_t
cache_insert(directory_t *directory, const char *name, const attn_geometry_t *geometry, void *table,
             dir_cache_entry_t **cache_p)
{
    if (directory->n_caches == DIR_CACHES_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "cache \"%s\": %u caches are open already, the limit",
                         name, DIR_CACHES_MAX);
    }
    dir_cache_entry_t *cache = calloc(1, sizeof(*cache));
    if (!cache) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for cache \"%s\"", name);
    }
    cache->cache.id       = directory->next_cache;
    cache->cache.geometry = *geometry;
    cache->chunk_pages    = (uint32_t)attn_div_up(geometry->chunk_size, geometry->page_size);
    snprintf(cache->cache.name, sizeof(cache->cache.name), "%s", name);

    HASH_ADD(hh_id, directory->by_id, cache.id, sizeof(cache->cache.id), cache);
    if (cache->hh_id.tbl) {
        HASH_ADD(hh_name, directory->by_name, cache.name, (unsigned)strlen(name), cache);
        if (!cache->hh_name.tbl) {
            HASH_DELETE(hh_id, directory->by_id, cache);
        }
    }
    if (!cache->hh_id.tbl || !cache->hh_name.tbl) {
        free(cache);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for cache \"%s\"", name);
    }
    cache->table = table; /* last: until here it was the caller's to free */
    directory->n_caches++;
    directory->next_cache++;
    *cache_p = cache;
    return ATTN_OK;
}

static void
cache_remove(directory_t *directory, dir_cache_entry_t *cache)
{
    HASH_DELETE(hh_id, directory->by_id, cache);
    HASH_DELETE(hh_name, directory->by_name, cache);
    directory->n_caches--;
    entry_free(cache);
}

/* The cache of that name, or a new one; without a geometry only the former. */
static attn_status_t
join_or_insert(directory_t *directory, const char *name, const attn_geometry_t *geometry,
               dir_cache_entry_t **cache_p, bool *created_p)
{
    attn_geometry_t complete;
    void *table;
    dir_cache_entry_t *cache = NULL;
    attn_status_t status;

    HASH_FIND(hh_name, directory->by_name, name, strlen(name), cache);
    *cache_p   = cache;
    *created_p = false;
    if (!geometry) {
        return cache ? ATTN_OK : attn_fail(ATTN_ERR_NOT_FOUND, "no cache \"%s\" is open", name);
    }
    status = geometry_copy(geometry, &complete, &table);
    if (status) {
        return attn_fail_in(status, "cache \"%s\": ", name);
    }
    if (!cache) {
        status = cache_insert(directory, name, &complete, table, cache_p);
        if (status) {
            free(table);
        }
        *created_p = status == ATTN_OK;
        return status;
    }
    status = geometry_compare(&cache->cache.geometry, &complete);
    free(table);
    return status ? attn_fail_in(status, "cache \"%s\" is open with another geometry: ", name)
                  : ATTN_OK;
}

attn_status_t
directory_cache_open(directory_t *directory, uint32_t client_id, const char *name,
                     const attn_geometry_t *geometry, uint64_t *cache_p, bool *created_p)
{
    dir_client_t *client;
    dir_cache_entry_t *cache = NULL;
    bool created;
    attn_status_t status = dir_client_get(directory, client_id, &client);

    status = status ? status : check_name(name);
    status = status ? status : join_or_insert(directory, name, geometry, &cache, &created);
    if (status) {
        return status;
    }
    status = dir_client_note_open(client, cache->cache.id);
    if (status) {
        if (created) {
            cache_remove(directory, cache);
        }
        return status;
    }
    cache->cache.opens++;
    *cache_p   = cache->cache.id;
    *created_p = created;
    return ATTN_OK;
}

/* Index of the first spot whose worker is not below `worker`. */
static uint32_t
spot_index(const dir_cache_entry_t *cache, uint32_t worker)
{
    uint32_t low = 0, high = cache->n_spots;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (cache->spots[middle].worker < worker) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

dir_spot_t *
dir_spot_find(const dir_cache_entry_t *cache, uint32_t worker)
{
    uint32_t i = spot_index(cache, worker);
    return i < cache->n_spots && cache->spots[i].worker == worker ? &cache->spots[i] : NULL;
}

void
dir_spot_remove(dir_cache_entry_t *cache, uint32_t worker)
{
    dir_spot_t *spot = dir_spot_find(cache, worker);

    if (spot) {
        cache->n_spots--;
        memmove(spot, spot + 1, (size_t)(cache->spots + cache->n_spots - spot) * sizeof(*spot));
    }
}

static attn_status_t
spot_insert(dir_cache_entry_t *cache, uint32_t worker, uint32_t n_pages)
{
    if (cache->n_spots == cache->room_spots) {
        uint32_t room    = cache->room_spots ? 2 * cache->room_spots : 8;
        dir_spot_t *more = realloc(cache->spots, room * sizeof(*more));
        if (!more) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a region of cache \"%s\"",
                             cache->cache.name);
        }
        cache->spots      = more;
        cache->room_spots = room;
    }
    uint32_t i = spot_index(cache, worker);
    memmove(&cache->spots[i + 1], &cache->spots[i], (cache->n_spots - i) * sizeof(cache->spots[0]));
    cache->spots[i] = (dir_spot_t){.worker = worker, .n_pages = n_pages};
    cache->n_spots++;
    return ATTN_OK;
}

attn_status_t
directory_cache_on_worker(directory_t *directory, uint64_t id, uint32_t worker_id, uint32_t n_pages)
{
    dir_cache_entry_t *cache = NULL;
    dir_worker_t *worker     = dir_worker_find(directory, worker_id);
    attn_status_t status     = dir_cache_get(directory, id, &cache);

    if (status) {
        return status;
    }
    if (!worker || !worker->alive) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "worker %u is %s", worker_id,
                         worker ? "lost" : "not known");
    }
    if (cache->cache.kind[0] != 0 && strcmp(cache->cache.kind, worker->kind) != 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "worker %u computes as %s, cache \"%s\" as %s: a cache lives on one kind",
                         worker_id, worker->kind, cache->cache.name, cache->cache.kind);
    }
    dir_spot_t *spot = dir_spot_find(cache, worker_id);
    if (spot) {
        spot->n_pages = n_pages;
        return ATTN_OK;
    }
    status = spot_insert(cache, worker_id, n_pages);
    if (status == ATTN_OK) {
        dir_spot_find(cache, worker_id)->leaving = worker->leaving;
    }
    if (status == ATTN_OK) {
        memcpy(cache->cache.kind, worker->kind, sizeof(worker->kind));
    }
    return status;
}

void
dir_cache_leave(dir_cache_entry_t *cache, uint32_t times)
{
    assert(cache && cache->cache.opens >= times);
    cache->cache.opens -= times;
    cache->leaving = cache->cache.opens == 0;
}

attn_status_t
directory_cache_close(directory_t *directory, uint32_t client_id, uint64_t id)
{
    dir_cache_entry_t *cache = NULL;
    dir_client_t *client;
    attn_status_t status = dir_client_get(directory, client_id, &client);

    status = status ? status : dir_cache_get(directory, id, &cache);
    status = status ? status : dir_client_note_close(client, id);
    if (status) {
        return status;
    }
    dir_cache_leave(cache, 1);
    if (cache->leaving) {
        dir_sweep(directory);
    }
    return ATTN_OK;
}

void
dir_cache_drop(directory_t *directory, dir_cache_entry_t *cache)
{
    assert(cache->n_sequences == 0);
    for (uint32_t i = 0; i < cache->n_spots; i++) {
        assert(cache->spots[i].placed == 0 && cache->spots[i].fill == 0);
        dir_emit(directory, DIR_CLOSE_CACHE, cache->spots[i].worker, cache->cache.id, 0);
    }
    cache_remove(directory, cache);
}

const dir_cache_t *
directory_cache(const directory_t *directory, uint64_t id)
{
    const dir_cache_entry_t *cache = dir_cache_find(directory, id);
    return cache ? &cache->cache : NULL;
}

uint32_t
directory_caches(const directory_t *directory, uint64_t *ids, uint32_t room)
{
    uint32_t n = 0;

    for (const dir_cache_entry_t *cache = directory->by_id; cache; cache = cache->hh_id.next) {
        if (n < room) {
            ids[n] = cache->cache.id;
        }
        n++;
    }
    return n;
}

bool
directory_cache_is_on(const directory_t *directory, uint64_t id, uint32_t worker)
{
    const dir_cache_entry_t *cache = dir_cache_find(directory, id);
    return cache && dir_spot_find(cache, worker) != NULL;
}
