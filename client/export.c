/*
 * export.c: committed k, v of a sequence, read back from the owners of its chunks.
 *
 * Parts of at most EXPORT_PART_BYTES, each within one chunk and one layer, one after the other.
 * Committed tokens of a chunk never change while its id and generation stand, and the owner checks
 * both for every part: so what is read is the sequence as it was when its layout was asked for, or
 * an error says that it was changed.
 */
#include "client/export.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/cluster_int.h"

#include <stdlib.h>

attn_status_t
export_check(const attn_seq_info_t *info, const attn_geometry_t *g, attn_seq_t seq, uint32_t layer,
             uint64_t first, uint64_t end)
{
    if (layer >= g->layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", layer, g->layers);
    }
    if (first > end) {
        return attn_fail(ATTN_ERR_INVALID, "tokens from %llu to %llu: the end is before the start",
                         (unsigned long long)first, (unsigned long long)end);
    }
    for (uint32_t i = 0; i < info->n_holes; i++) {
        if (info->holes[i].first < end && first < info->holes[i].end) {
            return cluster_check_whole(info, g->chunk_size, seq, UINT64_MAX);
        }
    }
    if (end > info->length) {
        return attn_fail(
            ATTN_ERR_INVALID, "tokens to %llu: sequence %llx has %llu committed tokens",
            (unsigned long long)end, (unsigned long long)seq.id, (unsigned long long)info->length);
    }
    return ATTN_OK;
}

/* Which part of [first, end) comes next: it is in one chunk. */
static uint32_t
part_rows(const attn_geometry_t *g, uint64_t first, uint64_t end)
{
    uint64_t in_chunk = g->chunk_size - first % g->chunk_size;

    return (uint32_t)attn_min(attn_min(end - first, in_chunk), engine_part_rows(g));
}

/* A chunk that is not there any more was released: the sequence was freed or cut meanwhile. */
static attn_status_t
part_status(attn_status_t status, attn_seq_t seq)
{
    if (status == ATTN_ERR_NOT_FOUND || status == ATTN_ERR_STALE) {
        attn_fail_in(status,
                     "sequence %llx was changed while it was read: ", (unsigned long long)seq.id);
        return ATTN_ERR_STALE;
    }
    return status;
}

/* ---- libattn ---- */

static attn_status_t
export_layer(attn_cache_t *cache, attn_seq_t seq, const attn_seq_info_t *info, uint32_t layer,
             uint64_t first, uint64_t end, uint8_t *k, uint8_t *v, uint64_t deadline_ns)
{
    const attn_geometry_t *g = &cache->geometry;
    attn_client_t *client    = cache->client;
    uint64_t size            = attn_dtype_size(g->kv_dtype);
    char address[64];
    bool alive;
    link_t *link;

    while (first < end) {
        const attn_chunk_info_t *chunk = &info->chunks[first / g->chunk_size];
        uint32_t n                     = part_rows(g, first, end);
        attn_status_t status =
            client->control->ops->worker(client->control, chunk->worker, address, &alive);
        if (status == ATTN_OK) {
            status = links_get(client->links, address, &link);
        }
        if (status == ATTN_OK) {
            status = link->ops->chunk_export(
                link,
                &(engine_export_t){.cache      = cache->id,
                                   .chunk      = chunk->chunk,
                                   .generation = chunk->generation,
                                   .layer      = layer,
                                   .first      = (uint32_t)(first % g->chunk_size),
                                   .n          = n},
                k, v, n * g->kv_heads * g->head_dim_k * size,
                n * g->kv_heads * g->head_dim_v * size, deadline_ns);
        }
        if (status != ATTN_OK) {
            return part_status(status, seq);
        }
        k += n * g->kv_heads * g->head_dim_k * size;
        v += n * g->kv_heads * g->head_dim_v * size;
        first += n;
    }
    return ATTN_OK;
}

attn_status_t
attn_seq_export(attn_cache_t *cache, attn_seq_t seq, const attn_export_t *what, void *k, void *v)
{
    const attn_geometry_t *g = &cache->geometry;
    attn_seq_info_t info;
    uint64_t end;

    if (what == NULL || what->size < sizeof(*what) || k == NULL || v == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "what.size must be sizeof(attn_export_t), and k and v "
                                           "memory");
    }
    uint32_t n_layers = what->n_layers != 0 ? what->n_layers : g->layers - what->first_layer;
    if (what->first_layer >= g->layers || n_layers > g->layers - what->first_layer) {
        return attn_fail(ATTN_ERR_INVALID, "layers %u to %u: the cache has %u", what->first_layer,
                         what->first_layer + n_layers, g->layers);
    }
    if (!attn_add(what->first, what->n, &end)) {
        return attn_fail(ATTN_ERR_INVALID, "first %llu + n exceeds 64 bits",
                         (unsigned long long)what->first);
    }
    uint32_t timeout =
        what->timeout_ms != 0 ? what->timeout_ms : cache->client->options.step_timeout_ms;
    uint64_t deadline_ns =
        attn_now_ns() + attn_min(timeout, ENGINE_TIMEOUT_MS_MAX) * ATTN_NS_PER_MS;
    uint64_t rows        = what->n * g->kv_heads * attn_dtype_size(g->kv_dtype);
    attn_status_t status = attn_seq_describe(cache, seq, &info);
    if (status != ATTN_OK) {
        return status;
    }
    status = export_check(&info, g, seq, what->first_layer, what->first, end);
    for (uint32_t l = 0; status == ATTN_OK && l < n_layers; l++) {
        status = export_layer(cache, seq, &info, what->first_layer + l, what->first, end,
                              (uint8_t *)k + l * rows * g->head_dim_k,
                              (uint8_t *)v + l * rows * g->head_dim_v, deadline_ns);
    }
    attn_seq_info_free(&info);
    return status;
}

/* ---- the front door ---- */

/* Of the chunks that hold tokens below `end`: changes whenever one of them is another one. */
static uint64_t
version_of(const attn_seq_info_t *info, uint64_t end, uint32_t chunk_size)
{
    uint64_t hash = UINT64_C(14695981039346656037); /* FNV-1a, by words */

    for (uint64_t c = 0; c * chunk_size < end; c++) {
        hash = (hash ^ info->chunks[c].chunk) * UINT64_C(1099511628211);
        hash = (hash ^ info->chunks[c].generation) * UINT64_C(1099511628211);
    }
    return hash | 1;
}

attn_status_t
cluster_export(cluster_t *cluster, uint64_t cache, attn_seq_t seq, cluster_export_t *part)
{
    attn_seq_info_t info;
    attn_geometry_t g;
    void *table;
    link_t *link;
    uint64_t epoch;
    attn_status_t status = cluster_cache_geometry(cluster, cache, &g, &table);

    if (status != ATTN_OK) {
        return status;
    }
    free(table); /* the rows are of no interest here */
    status = cluster_layout(cluster, cache, &seq, NULL, NULL, 1, &info, &epoch);
    if (status != ATTN_OK) {
        return status;
    }
    status           = export_check(&info, &g, seq, part->layer, part->first, part->end);
    uint64_t version = status == ATTN_OK ? version_of(&info, part->end, g.chunk_size) : 0;
    if (status == ATTN_OK && part->version != 0 && part->version != version) {
        status = attn_fail(ATTN_ERR_STALE, "sequence %llx was changed while it was read",
                           (unsigned long long)seq.id);
    }
    part->version = version;
    part->n =
        status == ATTN_OK && part->first < part->end ? part_rows(&g, part->first, part->end) : 0;
    if (part->n > 0) {
        const attn_chunk_info_t *chunk = &info.chunks[part->first / g.chunk_size];
        uint64_t head = (uint64_t)part->n * g.kv_heads * attn_dtype_size(g.kv_dtype);
        part->bytes   = head * (g.head_dim_k + g.head_dim_v);
        part->data    = malloc(part->bytes);
        status        = part->data != NULL
                            ? cluster_link(cluster, chunk->worker, &link)
                            : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %llu bytes of k and v",
                                        (unsigned long long)part->bytes);
        if (status == ATTN_OK) {
            status =
                part_status(link->ops->chunk_export(
                                link,
                                &(engine_export_t){.cache      = cache,
                                                   .chunk      = chunk->chunk,
                                                   .generation = chunk->generation,
                                                   .layer      = part->layer,
                                                   .first = (uint32_t)(part->first % g.chunk_size),
                                                   .n     = part->n},
                                part->data, part->data + head * g.head_dim_k, head * g.head_dim_k,
                                head * g.head_dim_v, cluster_worker_deadline()),
                            seq);
        }
    }
    attn_seq_info_free(&info);
    return status;
}
