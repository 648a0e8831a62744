/*
 * thin_caches.c: the caches that the front door has joined: by the first step, and kept between
 * steps for the layouts that come with it; left a while after the last, for there is no other
 * word of sequences that went with their client.
 */
#include "daemon/coordinator/thin_int.h"

#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>

static void
cache_free(thin_cache_t *cache)
{
    attn_cache_close(cache->cache);
    free(cache);
}

/* A user more of the cache in the table, if it is there. */
static thin_cache_t *
cache_find(thin_t *thin, uint64_t id)
{
    thin_cache_t *cache;

    pthread_mutex_lock(&thin->lock);
    HASH_FIND(hh, thin->caches, &id, sizeof(id), cache);
    if (cache != NULL) {
        cache->users++;
    }
    pthread_mutex_unlock(&thin->lock);
    return cache;
}

attn_status_t
thin_cache_enter(thin_t *thin, uint64_t id, thin_cache_t **cache_p)
{
    thin_cache_t *other;

    if ((*cache_p = cache_find(thin, id)) != NULL) {
        return ATTN_OK;
    }
    thin_cache_t *cache = calloc(1, sizeof(*cache));
    if (cache == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to join cache %llu",
                         (unsigned long long)id);
    }
    attn_status_t status = client_cache_by_id(thin->client, id, &cache->cache);
    if (status != ATTN_OK) {
        free(cache);
        return status;
    }
    cache->id     = id;
    cache->users  = 1;
    cache->listed = true;

    pthread_mutex_lock(&thin->lock);
    HASH_FIND(hh, thin->caches, &id, sizeof(id), other);
    if (other != NULL) { /* joined by another step meanwhile */
        other->users++;
    } else {
        HASH_ADD(hh, thin->caches, id, sizeof(cache->id), cache);
        cache->listed = table_has(hh, cache); /* if not, it is this step's alone */
    }
    pthread_mutex_unlock(&thin->lock);
    if (other != NULL) {
        cache_free(cache);
    }
    *cache_p = other != NULL ? other : cache;
    return ATTN_OK;
}

void
thin_cache_leave(thin_t *thin, thin_cache_t *cache)
{
    pthread_mutex_lock(&thin->lock);
    cache->idle_since_ns = attn_now_ns();
    bool gone            = --cache->users == 0 && !cache->listed;
    pthread_mutex_unlock(&thin->lock);
    if (gone) {
        cache_free(cache);
    }
}

void
thin_forget_cache(thin_t *thin, uint64_t id)
{
    thin_cache_t *cache;
    bool gone = false;

    pthread_mutex_lock(&thin->lock);
    HASH_FIND(hh, thin->caches, &id, sizeof(id), cache);
    if (cache != NULL) {
        HASH_DEL(thin->caches, cache);
        cache->listed = false;
        gone          = cache->users == 0;
    }
    pthread_mutex_unlock(&thin->lock);
    if (gone) {
        cache_free(cache);
    }
}

void
thin_caches_sweep(thin_t *thin, uint64_t unused_since_ns)
{
    thin_cache_t *unused = NULL, *cache, *next;

    pthread_mutex_lock(&thin->lock);
    for (cache = thin->caches; cache != NULL; cache = next) {
        next = cache->hh.next;
        if (cache->users == 0 && (unused_since_ns == 0 || cache->idle_since_ns < unused_since_ns)) {
            HASH_DEL(thin->caches, cache);
            cache->hh.next = unused;
            unused         = cache;
        }
    }
    pthread_mutex_unlock(&thin->lock);
    for (cache = unused; cache != NULL; cache = next) {
        next = cache->hh.next;
        cache_free(cache);
    }
}

attn_status_t
thin_seq_truncate(thin_t *thin, uint64_t cache, attn_seq_t seq, uint64_t length)
{
    thin_cache_t *joined;
    attn_status_t status = thin_cache_enter(thin, cache, &joined);

    if (status == ATTN_OK) {
        status = attn_seq_truncate(joined->cache, seq, length);
        thin_cache_leave(thin, joined);
    }
    return status;
}

attn_status_t
thin_seq_free(thin_t *thin, uint64_t cache, attn_seq_t seq)
{
    thin_cache_t *joined;
    attn_status_t status = thin_cache_enter(thin, cache, &joined);

    if (status == ATTN_OK) {
        status = attn_seq_free(joined->cache, seq);
        thin_cache_leave(thin, joined);
    }
    return status;
}
