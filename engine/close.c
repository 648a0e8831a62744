/*
 * close.c: caches go. Whoever closes one waits for what is soon over: its steps abort, parts of it
 * that are being read are copied. But the device may work on for a step, as long as a stream of the
 * runner's is held up, by the very thread perhaps that closes. So after a second the cache is left
 * to the ticks: it is gone for everybody, but its pages and the tracks of its graphs are nobody
 * else's before the device is through with the last step.
 */
#include "engine/engine_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#define CLOSE_WAIT_NS (1000 * ATTN_NS_PER_MS)
#define READ_WAIT_NS 50000
#define LAST_PAUSE_NS 1000000

/* The id of one open step of the cache, or 0; *adrift: there are others, which are waited for.
 * Under the lock. */
static uint64_t
a_step_of(const engine_t *engine, uint64_t cache, bool *adrift)
{
    uint64_t id = 0;

    *adrift = false;
    for (const engine_step_t *s = engine->steps; s != NULL; s = s->hh.next) {
        if (s->cache->id == cache) {
            *adrift = *adrift || s->adrift;
            id      = s->adrift ? id : s->id;
        }
    }
    return id;
}

/* Out of the tables, unless it is in use. Under the lock. */
static bool
take_out(engine_t *engine, engine_cache_t *cache)
{
    if (kv_region_close(engine->store, cache->id) != ATTN_OK) {
        return false;
    }
    HASH_DEL(engine->caches, cache);
    return true;
}

static void
cache_end(engine_t *engine, engine_cache_t *cache)
{
    if (engine->backend->ops->tracks != NULL) {
        engine->backend->ops->tracks->forget(engine->backend, cache->id);
    }
    engine_cache_free(cache);
}

/* One look at a cache that is being closed: true when nothing is left to do. Under the lock. */
static bool
close_look(engine_t *engine, engine_cache_t *cache, uint64_t until_ns, uint64_t *step_p,
           bool *out_p)
{
    bool adrift;

    *step_p = a_step_of(engine, cache->id, &adrift);
    *out_p  = *step_p == 0 && !adrift && take_out(engine, cache);
    if (*step_p == 0 && !*out_p) {
        cache->left = adrift || attn_now_ns() >= until_ns;
    }
    return *out_p || cache->left;
}

attn_status_t
engine_cache_close(engine_t *engine, uint64_t id)
{
    uint64_t until = attn_now_ns() + CLOSE_WAIT_NS, step;
    bool out;

    pthread_mutex_lock(&engine->lock);
    engine_cache_t *cache = engine_cache_find(engine, id);
    if (cache == NULL) {
        pthread_mutex_unlock(&engine->lock);
        return ATTN_ERR_NOT_FOUND;
    }
    cache->closing = true;
    while (!close_look(engine, cache, until, &step, &out)) {
        pthread_mutex_unlock(&engine->lock);
        if (step != 0) {
            engine_step_abort_until(engine, step, ENGINE_BY_CACHE, until);
        } else { /* it is being read: a part is soon copied */
            nanosleep(&(struct timespec){.tv_nsec = READ_WAIT_NS}, NULL);
        }
        pthread_mutex_lock(&engine->lock);
    }
    pthread_mutex_unlock(&engine->lock);
    if (out) {
        cache_end(engine, cache);
    }
    return ATTN_OK;
}

void
engine_caches_close(engine_t *engine)
{
    uint64_t id;

    do {
        id = 0;
        pthread_mutex_lock(&engine->lock);
        for (engine_cache_t *c = engine->caches; c != NULL && id == 0; c = c->hh.next) {
            id = c->closing ? 0 : c->id;
        }
        pthread_mutex_unlock(&engine->lock);
        if (id != 0) {
            engine_cache_close(engine, id);
        }
    } while (id != 0);
}

void
engine_caches_tick(engine_t *engine)
{
    engine_cache_t *cache;
    bool adrift;

    do {
        pthread_mutex_lock(&engine->lock);
        for (cache = engine->caches; cache != NULL; cache = cache->hh.next) {
            if (cache->left && a_step_of(engine, cache->id, &adrift) == 0 && !adrift &&
                take_out(engine, cache)) {
                break;
            }
        }
        pthread_mutex_unlock(&engine->lock);
        if (cache != NULL) {
            cache_end(engine, cache);
        }
    } while (cache != NULL);
}

void
engine_caches_wait(engine_t *engine)
{
    uint64_t tell_at = attn_now_ns() + CLOSE_WAIT_NS;

    while (engine->caches != NULL) {
        if (attn_now_ns() >= tell_at) {
            attn_log(ATTN_LOG_WARN, "engine.waits", "name=\"%s\" reason=\"%s\"", engine->name,
                     "closed while the device works for a step still: some stream is held up");
            tell_at = UINT64_MAX;
        }
        nanosleep(&(struct timespec){.tv_nsec = LAST_PAUSE_NS}, NULL);
        engine_tick(engine, attn_now_ns());
    }
}
