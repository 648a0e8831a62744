/*
 * arrival.c: chunks that go from one worker to another. The worker that they come to asks for
 * them, in parts as a client's export has them: each of one layer, with a checksum that was made of
 * what the other had read, and that is made again of what came. So nothing that was changed on the
 * way is stored, and nothing is seen before all of it is. The checksum is of which part it is, too:
 * parts are known by their order alone.
 */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

struct engine_arrival {
    engine_t *engine;
    engine_copy_t copy;
    attn_geometry_t g; /* its sizes alone */
    kv_arrival_t *kv;
    uint32_t asked_layer, asked; /* the next part to ask for: a layer, and a token of the chunk */
    uint32_t layer, first;       /* the next one to store */
    uint32_t *pages, *offsets;   /* [rows of a part], in one block */
};

static void
put_le(uint8_t *to, uint64_t value, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++) {
        to[i] = (uint8_t)(value >> 8 * i);
    }
}

uint64_t
engine_checksum(const engine_export_t *part, const void *data, uint64_t bytes)
{
    uint8_t which[24];

    put_le(which, part->chunk, 8);
    put_le(which + 8, part->generation, 4);
    put_le(which + 12, part->layer, 4);
    put_le(which + 16, part->first, 4);
    put_le(which + 20, part->n, 4);
    return XXH3_64bits_withSeed(data, bytes, XXH3_64bits(which, sizeof(which)));
}

attn_status_t
engine_chunk_leave(engine_t *engine, uint64_t cache, const kv_leaving_t *leaving,
                   kv_chunk_info_t *info)
{
    pthread_mutex_lock(&engine->lock);
    attn_status_t status = kv_chunk_leave(engine->store, cache, leaving, info);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

/*
 * Whoever asked for the copy may have given it up, and its pages back, while it went on: nobody
 * would ever release it again.
 */
static attn_status_t
check_wanted(const engine_cache_t *cache, const engine_copy_t *copy)
{
    if (cache != NULL && engine_was_released(cache, copy->copy)) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "chunk %llu was released before its copy was there",
                         (unsigned long long)copy->copy);
    }
    return ATTN_OK;
}

attn_status_t
engine_arrival_begin(engine_t *engine, const engine_copy_t *copy, engine_arrival_t **arrival_p)
{
    engine_arrival_t *a = calloc(1, sizeof(*a));

    if (a == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a chunk's arrival");
    }
    pthread_mutex_lock(&engine->lock);
    const engine_cache_t *cache = engine_cache_find(engine, copy->cache);
    attn_status_t status        = cache != NULL ? ATTN_OK : ATTN_ERR_NOT_FOUND;
    if (status == ATTN_OK) {
        status = check_wanted(cache, copy);
    }
    if (status == ATTN_OK) {
        a->g     = cache->geometry;
        a->pages = malloc(2 * (uint64_t)engine_part_rows(&a->g) * sizeof(*a->pages));
        status   = a->pages != NULL
                       ? kv_arrival_begin(engine->store, copy->cache, copy->copy, copy->first,
                                          copy->length, &a->kv)
                       : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a chunk's arrival");
    }
    pthread_mutex_unlock(&engine->lock);
    if (status != ATTN_OK) {
        free(a->pages);
        free(a);
        return status;
    }
    a->g.layer_table = NULL; /* the cache's */
    a->engine        = engine;
    a->copy          = *copy;
    a->asked = a->first = copy->first;
    a->offsets          = a->pages + engine_part_rows(&a->g);
    *arrival_p          = a;
    return ATTN_OK;
}

/* From one part to the next. False: there is none. */
static bool
next_part(const engine_arrival_t *a, uint32_t *layer, uint32_t *first, engine_export_t *part)
{
    if (*layer == a->g.layers) {
        return false;
    }
    uint32_t n = (uint32_t)attn_min(engine_part_rows(&a->g), a->copy.length - *first);
    *part      = (engine_export_t){.cache      = a->copy.cache,
                                   .chunk      = a->copy.chunk,
                                   .generation = a->copy.generation,
                                   .layer      = *layer,
                                   .first      = *first,
                                   .n          = n};
    *first += n;
    if (*first == a->copy.length) {
        *first = a->copy.first;
        (*layer)++;
    }
    return true;
}

uint64_t
engine_arrival_part_bytes(const engine_arrival_t *a)
{
    uint64_t rows = attn_min(engine_part_rows(&a->g), a->copy.length - a->copy.first);

    return rows * engine_kv_row_bytes(&a->g);
}

bool
engine_arrival_ask(engine_arrival_t *a, engine_export_t *part)
{
    return next_part(a, &a->asked_layer, &a->asked, part);
}

static attn_status_t
store_part(engine_arrival_t *a, const engine_export_t *part, const uint8_t *data)
{
    engine_t *engine = a->engine;
    uint64_t k_bytes =
        (uint64_t)part->n * a->g.kv_heads * a->g.head_dim_k * attn_dtype_size(a->g.kv_dtype);
    attn_kv_t kv;

    pthread_mutex_lock(&engine->lock);
    attn_status_t status = kv_arrival_enter(a->kv, part->first, part->n, a->pages, a->offsets);
    if (status == ATTN_OK) { /* so the cache is there, and stays, if it is not being closed */
        const engine_cache_t *cache = engine_cache_find(engine, part->cache);
        if (cache != NULL) {
            engine_kv_view(engine, cache, part->layer, &kv);
        } else {
            kv_arrival_leave(a->kv);
            status = ATTN_ERR_NOT_FOUND;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    if (status != ATTN_OK) {
        return status;
    }
    status = engine->backend->ops->append(engine->backend, &kv, a->pages, a->offsets, part->n, data,
                                          data + k_bytes);
    pthread_mutex_lock(&engine->lock);
    kv_arrival_leave(a->kv);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

attn_status_t
engine_arrival_store(engine_arrival_t *a, const void *data, uint64_t bytes, uint64_t checksum)
{
    engine_export_t part;
    uint32_t layer = a->layer, first = a->first;

    if (!next_part(a, &layer, &first, &part) || bytes != part.n * engine_kv_row_bytes(&a->g)) {
        return attn_fail(ATTN_ERR_INVALID, "%llu bytes of chunk %llu came that are no part of it",
                         (unsigned long long)bytes, (unsigned long long)a->copy.chunk);
    }
    uint64_t found = engine_checksum(&part, data, bytes);
    if (found != checksum) {
        return attn_fail(ATTN_ERR_CORRUPT,
                         "chunk %llu, layer %u, tokens %u to %u changed on their way: checksum "
                         "%016llx where they were read, %016llx on %s",
                         (unsigned long long)part.chunk, part.layer, part.first,
                         part.first + part.n, (unsigned long long)checksum,
                         (unsigned long long)found, a->engine->name);
    }
    attn_status_t status = store_part(a, &part, data);
    if (status == ATTN_OK) {
        a->layer = layer;
        a->first = first;
    }
    return status;
}

static void
arrival_free(engine_arrival_t *a)
{
    free(a->pages);
    free(a);
}

attn_status_t
engine_arrival_publish(engine_arrival_t *a)
{
    engine_t *engine = a->engine;

    if (a->layer < a->g.layers) {
        attn_status_t status =
            attn_fail(ATTN_ERR_INCOMPLETE, "chunk %llu: layer %u lacks tokens from %u on",
                      (unsigned long long)a->copy.chunk, a->layer, a->first);
        engine_arrival_drop(a);
        return status;
    }
    pthread_mutex_lock(&engine->lock);
    attn_status_t status = check_wanted(engine_cache_find(engine, a->copy.cache), &a->copy);
    if (status == ATTN_OK) {
        status = kv_arrival_publish(a->kv);
    } else {
        kv_arrival_drop(a->kv);
    }
    pthread_mutex_unlock(&engine->lock);
    arrival_free(a);
    return status;
}

void
engine_arrival_drop(engine_arrival_t *a)
{
    if (a != NULL) {
        pthread_mutex_lock(&a->engine->lock);
        kv_arrival_drop(a->kv);
        pthread_mutex_unlock(&a->engine->lock);
        arrival_free(a);
    }
}

static attn_status_t
copy_part(engine_t *from, engine_arrival_t *a, const engine_export_t *part, uint8_t *data)
{
    uint64_t k, v;
    attn_status_t status = engine_export_bytes(from, part, &k, &v);

    if (status == ATTN_OK && k + v > part->n * engine_kv_row_bytes(&a->g)) {
        status = attn_fail(ATTN_ERR_INVALID, "%s and %s have cache %llu with other geometries",
                           from->name, a->engine->name, (unsigned long long)part->cache);
    }
    if (status == ATTN_OK) {
        status = engine_chunk_export(from, part, data, data + k, k, v);
    }
    return status == ATTN_OK
               ? engine_arrival_store(a, data, k + v, engine_checksum(part, data, k + v))
               : status;
}

attn_status_t
engine_copy_between(engine_t *from, engine_t *to, const engine_copy_t *copy, uint64_t deadline_ns)
{
    engine_arrival_t *a;
    engine_export_t part;
    attn_status_t status = engine_arrival_begin(to, copy, &a);

    if (status != ATTN_OK) {
        return status;
    }
    uint8_t *data = malloc(engine_part_rows(&a->g) * engine_kv_row_bytes(&a->g));
    status        = data != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory to copy");
    while (status == ATTN_OK && engine_arrival_ask(a, &part)) {
        status = attn_now_ns() < deadline_ns
                     ? copy_part(from, a, &part, data)
                     : attn_fail(ATTN_ERR_DEADLINE, "the deadline passed before all was copied");
    }
    free(data);
    if (status != ATTN_OK) {
        engine_arrival_drop(a);
        return status;
    }
    return engine_arrival_publish(a);
}
