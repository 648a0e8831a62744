/* cache.c: caches, sequences, and the layouts that the client keeps of them. */
#include "client/client_int.h"

#include "balancer/geometry.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void
attn_geometry_init(attn_geometry_t *geometry)
{
    *geometry = (attn_geometry_t){.size = sizeof(*geometry), .layers = 1, .kv_dtype = ATTN_F16};
}

/* ---- layouts ---- */

cached_layout_t *
layout_find(attn_cache_t *cache, attn_seq_t seq)
{
    cached_layout_t *layout;

    HASH_FIND(hh, cache->layouts, &seq.id, sizeof(seq.id), layout);
    return layout;
}

void
layout_forget(attn_cache_t *cache, attn_seq_t seq)
{
    cached_layout_t *layout = layout_find(cache, seq);

    if (layout != NULL) {
        HASH_DEL(cache->layouts, layout);
        free(layout->chunks);
        free(layout);
    }
}

static attn_status_t
layout_store(attn_cache_t *cache, attn_seq_t seq, const attn_seq_info_t *info, uint64_t epoch)
{
    cached_layout_t *layout = calloc(1, sizeof(*layout));
    split_chunk_t *chunks   = calloc(info->n_chunks + 1, sizeof(*chunks));

    if (layout == NULL || chunks == NULL) {
        free(layout);
        free(chunks);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layout of %u chunks", info->n_chunks);
    }
    for (uint32_t c = 0; c < info->n_chunks; c++) {
        chunks[c] = cluster_split_chunk(&info->chunks[c]);
    }
    layout_forget(cache, seq);
    layout->seq      = seq.id;
    layout->epoch    = epoch;
    layout->n_chunks = info->n_chunks;
    layout->chunks   = chunks;
    HASH_ADD(hh, cache->layouts, seq, sizeof(layout->seq), layout);
    if (!table_has(hh, layout)) {
        free(layout);
        free(chunks);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layout of %u chunks", info->n_chunks);
    }
    return ATTN_OK;
}

attn_status_t
layouts_fetch(attn_cache_t *cache, const attn_seq_t *seqs, const uint64_t *bases,
              const uint64_t *tokens, uint32_t n, uint64_t deadline_ns)
{
    control_t *control     = cache->client->control;
    attn_seq_info_t *infos = calloc(n, sizeof(*infos));
    uint64_t epoch;

    if (infos == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u layouts", n);
    }
    attn_status_t status = control->ops->layout(control, cache->id, seqs, bases, tokens, n,
                                                deadline_ns, infos, &epoch);
    if (status == ATTN_OK) {
        pthread_mutex_lock(&cache->lock);
        for (uint32_t i = 0; i < n; i++) {
            if (status == ATTN_OK) {
                status = layout_store(cache, seqs[i], &infos[i], epoch);
            }
            attn_seq_info_free(&infos[i]);
        }
        pthread_mutex_unlock(&cache->lock);
    }
    free(infos);
    return status;
}

/* ---- caches ---- */

static attn_cache_t *
cache_new(attn_client_t *client)
{
    attn_cache_t *cache = calloc(1, sizeof(*cache));

    if (cache == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a cache");
        return NULL;
    }
    cache->client = client;
    pthread_mutex_init(&cache->lock, NULL);
    return cache;
}

static void
cache_free(attn_cache_t *cache)
{
    while (cache->layouts != NULL) {
        layout_forget(cache, (attn_seq_t){cache->layouts->seq});
    }
    free(cache->table);
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

attn_status_t
attn_cache_open(attn_client_t *client, const char *name, const attn_geometry_t *geometry,
                attn_cache_t **cache_p)
{
    attn_geometry_t asked;
    void *table          = NULL;
    attn_status_t status = ATTN_OK;

    if (name == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "name is NULL");
    }
    if (geometry != NULL) {
        /* Checked here, so that what is sent is complete whatever header the caller has. */
        status   = geometry_copy(geometry, &asked, &table);
        geometry = &asked;
    }
    attn_cache_t *cache = status == ATTN_OK ? cache_new(client) : NULL;
    if (cache == NULL) {
        free(table);
        return status != ATTN_OK ? status : ATTN_ERR_NO_MEMORY;
    }
    status =
        client->control->ops->cache_open(client->control, name, geometry, client_deadline(client),
                                         &cache->id, &cache->geometry, &cache->table);
    free(table);
    if (status != ATTN_OK) {
        cache_free(cache);
        return status;
    }
    *cache_p = cache;
    return ATTN_OK;
}

attn_status_t
client_cache_by_id(attn_client_t *client, uint64_t id, attn_cache_t **cache_p)
{
    attn_cache_t *cache = cache_new(client);

    if (cache == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    cache->id       = id;
    cache->borrowed = true;
    attn_status_t status =
        cluster_cache_geometry(client->cluster, id, &cache->geometry, &cache->table);
    if (status != ATTN_OK) {
        cache_free(cache);
        return status;
    }
    *cache_p = cache;
    return ATTN_OK;
}

void
attn_cache_close(attn_cache_t *cache)
{
    if (cache == NULL) {
        return;
    }
    control_t *control = cache->client->control;
    client_await_aborts(cache->client, cache);
    if (!cache->borrowed) {
        control->ops->cache_close(control, cache->id, client_deadline(cache->client));
    }
    cache_free(cache);
}

const attn_geometry_t *
attn_cache_geometry(const attn_cache_t *cache)
{
    return &cache->geometry;
}

/* ---- sequences ---- */

static void
forget(attn_cache_t *cache, attn_seq_t seq)
{
    pthread_mutex_lock(&cache->lock);
    layout_forget(cache, seq);
    pthread_mutex_unlock(&cache->lock);
}

attn_status_t
attn_seq_create(attn_cache_t *cache, const attn_seq_options_t *options, attn_seq_t *seq_p)
{
    control_t *control = cache->client->control;

    if (options != NULL && options->size < sizeof(*options)) {
        return attn_fail(ATTN_ERR_INVALID, "options.size is %zu: sizeof(attn_seq_options_t)",
                         options->size);
    }
    return control->ops->seq_create(control, cache->id,
                                    options != NULL ? options->expected_tokens : 0,
                                    client_deadline(cache->client), seq_p);
}

attn_status_t
attn_seq_fork(attn_cache_t *cache, attn_seq_t seq, uint64_t length, attn_seq_t *fork_p)
{
    control_t *control = cache->client->control;

    return control->ops->seq_fork(control, cache->id, seq, length, client_deadline(cache->client),
                                  fork_p);
}

attn_status_t
attn_seq_truncate(attn_cache_t *cache, attn_seq_t seq, uint64_t length)
{
    control_t *control = cache->client->control;

    forget(cache, seq);
    return control->ops->seq_truncate(control, cache->id, seq, length,
                                      client_deadline(cache->client));
}

attn_status_t
attn_seq_free(attn_cache_t *cache, attn_seq_t seq)
{
    control_t *control = cache->client->control;

    forget(cache, seq);
    return control->ops->seq_free(control, cache->id, seq, client_deadline(cache->client));
}

attn_status_t
attn_seq_move(attn_cache_t *cache, attn_seq_t seq, uint32_t from, uint32_t to, attn_moved_t *moved)
{
    control_t *control    = cache->client->control;
    uint64_t deadline     = attn_now_ns() + CLIENT_MOVE_MS * ATTN_NS_PER_MS;
    cluster_moved_t there = {0};

    forget(cache, seq);
    attn_status_t status =
        control->ops->seq_move(control, cache->id, seq, from, to, deadline, &there);
    client_moved(&there, moved);
    return status;
}

attn_status_t
attn_seq_describe(attn_cache_t *cache, attn_seq_t seq, attn_seq_info_t *info)
{
    control_t *control    = cache->client->control;
    attn_seq_info_t found = {0}; /* a failure leaves the caller's as it was */
    uint64_t epoch;

    attn_status_t status = control->ops->layout(control, cache->id, &seq, NULL, NULL, 1,
                                                client_deadline(cache->client), &found, &epoch);
    if (status != ATTN_OK) {
        return status;
    }
    free(found.holes); /* told by a control plane in this process, but not by a remote one */
    found.holes = NULL;
    status      = cluster_holes(&found, cache->geometry.chunk_size);
    if (status != ATTN_OK) {
        attn_seq_info_free(&found);
        return status;
    }
    *info = found;
    return ATTN_OK;
}

void
attn_seq_info_free(attn_seq_info_t *info)
{
    if (info != NULL) {
        free(info->chunks);
        free(info->holes);
        *info = (attn_seq_info_t){.length = info->length};
    }
}
