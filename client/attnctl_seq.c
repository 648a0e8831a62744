/* attnctl_seq.c: `attnctl seq`: a sequence's chunks and their owners. */
#include "client/attnctl.h"

#include <inttypes.h>
#include <stdio.h>

typedef struct view {
    attn_seq_info_t seq;
    attn_cluster_info_t cluster;
} view_t;

static const char *
address_of(const attn_cluster_info_t *cluster, uint32_t worker)
{
    for (uint32_t i = 0; i < cluster->n_workers; i++) {
        if (cluster->workers[i].id == worker) {
            return cluster->workers[i].address;
        }
    }
    return "";
}

/* Tokens that the sequence shows but that are gone with their worker. */
static uint64_t
lost_tokens(const attn_seq_info_t *seq)
{
    uint64_t tokens = 0;

    for (uint32_t i = 0; i < seq->n_chunks; i++) {
        tokens += seq->chunks[i].lost ? seq->chunks[i].length : 0;
    }
    return tokens;
}

static void
print_table(const attnctl_t *ctl, const view_t *view)
{
    printf("sequence %" PRIu64 " of cache %s: %" PRIu64 " tokens committed, %u chunks\n\n",
           ctl->seq, ctl->cache, view->seq.length, view->seq.n_chunks);
    printf("%12s  %-23s %10s  %6s  %s\n", "chunk", "tokens", "generation", "worker", "address");
    for (uint32_t i = 0; i < view->seq.n_chunks; i++) {
        const attn_chunk_info_t *chunk = &view->seq.chunks[i];
        char tokens[48];
        if (chunk->length == 0) {
            snprintf(tokens, sizeof(tokens), "none yet, from %" PRIu64, chunk->first);
        } else {
            snprintf(tokens, sizeof(tokens), "%" PRIu64 "-%" PRIu64, chunk->first,
                     chunk->first + chunk->length - 1);
        }
        printf("%12" PRIu64 "  %-23s %10u  %6u  %s%s\n", chunk->chunk, tokens, chunk->generation,
               chunk->worker, address_of(&view->cluster, chunk->worker),
               chunk->lost ? "  LOST with its worker" : "");
    }
}

static void
print_json(const attnctl_t *ctl, const view_t *view)
{
    cJSON *object = cJSON_CreateObject();

    attnctl_json_u64(object, "seq", ctl->seq);
    cJSON_AddStringToObject(object, "cache", ctl->cache);
    attnctl_json_u64(object, "length", view->seq.length);
    cJSON *chunks = cJSON_AddArrayToObject(object, "chunks");
    for (uint32_t i = 0; i < view->seq.n_chunks; i++) {
        const attn_chunk_info_t *chunk = &view->seq.chunks[i];
        cJSON *item                    = cJSON_CreateObject();
        attnctl_json_u64(item, "chunk", chunk->chunk);
        attnctl_json_u64(item, "first", chunk->first);
        attnctl_json_u64(item, "length", chunk->length);
        attnctl_json_u64(item, "generation", chunk->generation);
        attnctl_json_u64(item, "worker", chunk->worker);
        cJSON_AddStringToObject(item, "address", address_of(&view->cluster, chunk->worker));
        cJSON_AddBoolToObject(item, "lost", chunk->lost);
        cJSON_AddItemToArray(chunks, item);
    }
    attnctl_json_print(object);
}

int
attnctl_seq(const attnctl_t *ctl)
{
    attn_cache_t *cache;
    view_t view = {0};

    /* No geometry: join what is open under the name. */
    attn_status_t status = attn_cache_open(ctl->client, ctl->cache, NULL, &cache);
    if (status != ATTN_OK) {
        return attnctl_failed(ctl, status);
    }
    status = attn_seq_describe(cache, (attn_seq_t){ctl->seq}, &view.seq);
    if (status == ATTN_OK) {
        status = attn_cluster_describe(ctl->client, &view.cluster);
    }
    if (status == ATTN_OK && ctl->json) {
        print_json(ctl, &view);
    } else if (status == ATTN_OK) {
        print_table(ctl, &view);
    }
    int code = status != ATTN_OK            ? attnctl_failed(ctl, status)
               : lost_tokens(&view.seq) > 0 ? ATTNCTL_PROBLEM
                                            : ATTNCTL_OK;
    attn_seq_info_free(&view.seq);
    attn_cluster_info_free(&view.cluster);
    attn_cache_close(cache);
    return code;
}
