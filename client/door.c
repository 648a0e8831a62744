/* door.c: the thin client without its steps: the connection and its lease, caches, sequences. */
#include "client/door_int.h"

#include "balancer/geometry.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/client.h"
#include "client/rpc_call.h"
#include "client/wire.h"

#include <stdlib.h>
#include <time.h>

#define CLOSE_TIMEOUT_MS 1000u

static attn_status_t
call(door_t *door, const char *path, const void *request, const ProtobufCMessageDescriptor *type,
     void *reply_p, rpc_message_t **message_p)
{
    return rpc_call_typed(door->channel, path, request,
                          attn_now_ns() + door->timeout_ms * ATTN_NS_PER_MS, type, reply_p,
                          message_p);
}

/* ---- the connection ---- */

/* Renews the lease every third of it, and looks whether certificates are new. */
static void *
keeper(void *arg)
{
    door_t *door                    = arg;
    Attn__V1__ClientRequest request = ATTN__V1__CLIENT_REQUEST__INIT;
    struct timespec until;

    request.client_id = door->client;
    pthread_mutex_lock(&door->lock);
    while (!door->stopping) {
        uint64_t at   = attn_now_ns() + attn_max(door->lease_ms / 3, 1) * ATTN_NS_PER_MS;
        until.tv_sec  = (time_t)(at / 1000000000u);
        until.tv_nsec = (long)(at % 1000000000u);
        while (!door->stopping && attn_now_ns() < at) {
            pthread_cond_timedwait(&door->wake, &door->lock, &until);
        }
        if (door->stopping) {
            break;
        }
        pthread_mutex_unlock(&door->lock);
        if (door->tls != NULL) {
            rpc_tls_refresh(door->tls, false);
        }
        call(door, "/attn.v1.Attention/KeepAlive", &request, NULL, NULL, NULL);
        pthread_mutex_lock(&door->lock);
    }
    pthread_mutex_unlock(&door->lock);
    return NULL;
}

static attn_status_t
introduce(door_t *door, const char *name)
{
    Attn__V1__OpenClientRequest request = ATTN__V1__OPEN_CLIENT_REQUEST__INIT;
    Attn__V1__OpenClientReply *reply;
    rpc_message_t *message;

    request.name         = (char *)name;
    attn_status_t status = call(door, "/attn.v1.Attention/OpenClient", &request,
                                &attn__v1__open_client_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        door->client   = reply->client_id;
        door->lease_ms = reply->lease_ms;
        status         = wire_ticket_check(reply->ticket);
        if (status == ATTN_OK) {
            rpc_client_set_header(door->rpc, "attn-ticket", reply->ticket); /* here for life */
        }
        rpc_message_free(message);
    }
    return status;
}

static void
door_free(door_t *door)
{
    lines_close(door);
    rpc_channel_close(door->channel);
    rpc_client_destroy(door->rpc);
    rpc_shutdown();
    rpc_tls_close(door->tls);
    pthread_cond_destroy(&door->wake);
    pthread_mutex_destroy(&door->lock);
    free(door);
}

attn_status_t
door_open(const char *address, const attn_client_options_t *options, door_t **door_p)
{
    pthread_condattr_t clock;
    door_t *door = calloc(1, sizeof(*door));

    if (door == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a client");
    }
    rpc_init();
    door->timeout_ms = options->timeout_ms;
    pthread_mutex_init(&door->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&door->wake, &clock);
    pthread_condattr_destroy(&clock);
    attn_status_t status = rpc_client_create(options->spin_us, &door->rpc);
    if (status == ATTN_OK) {
        status = client_tls_open(door->rpc, options, &door->tls);
    }
    if (status == ATTN_OK) {
        status = rpc_channel_open(door->rpc, address, &door->channel);
    }
    if (status == ATTN_OK) {
        status = introduce(door, options->name);
    }
    if (status == ATTN_OK && pthread_create(&door->keeper, NULL, keeper, door) != 0) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no thread for the client's lease");
    }
    if (status != ATTN_OK) {
        door_free(door);
        return status;
    }
    *door_p = door;
    return ATTN_OK;
}

void
door_close(door_t *door)
{
    Attn__V1__ClientRequest request = ATTN__V1__CLIENT_REQUEST__INIT;

    if (door == NULL) {
        return;
    }
    pthread_mutex_lock(&door->lock);
    door->stopping = true;
    pthread_cond_broadcast(&door->wake);
    pthread_mutex_unlock(&door->lock);
    pthread_join(door->keeper, NULL);
    request.client_id = door->client;
    door->timeout_ms  = (uint32_t)attn_min(door->timeout_ms, CLOSE_TIMEOUT_MS);
    call(door, "/attn.v1.Attention/CloseClient", &request, NULL, NULL, NULL);
    door_free(door);
}

/* ---- caches ---- */

attn_status_t
door_cache_open(door_t *door, const char *name, const attn_geometry_t *geometry,
                door_cache_t **cache_p)
{
    wire_block_t block                 = {0};
    Attn__V1__OpenCacheRequest request = ATTN__V1__OPEN_CACHE_REQUEST__INIT;
    Attn__V1__OpenCacheReply *reply;
    rpc_message_t *message = NULL;
    attn_geometry_t there;
    door_cache_t *cache = calloc(1, sizeof(*cache));

    if (cache == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a cache");
    }
    cache->door       = door;
    request.client_id = door->client;
    request.name      = (char *)name;
    attn_status_t status =
        geometry != NULL ? wire_geometry_encode(&block, geometry, &request.geometry) : ATTN_OK;
    if (status == ATTN_OK) {
        status = call(door, "/attn.v1.Attention/OpenCache", &request,
                      &attn__v1__open_cache_reply__descriptor, &reply, &message);
    }
    if (status == ATTN_OK) {
        cache->id = reply->cache_id;
        status    = wire_geometry_decode(&block, reply->geometry, &there);
    }
    if (status == ATTN_OK) {
        status = geometry_copy(&there, &cache->geometry, &cache->table);
    }
    rpc_message_free(message);
    wire_free(&block);
    if (status != ATTN_OK) {
        free(cache);
        return status;
    }
    *cache_p = cache;
    return ATTN_OK;
}

void
door_cache_close(door_cache_t *cache)
{
    Attn__V1__CloseCacheRequest request = ATTN__V1__CLOSE_CACHE_REQUEST__INIT;

    if (cache == NULL) {
        return;
    }
    request.client_id = cache->door->client;
    request.cache_id  = cache->id;
    call(cache->door, "/attn.v1.Attention/CloseCache", &request, NULL, NULL, NULL);
    free(cache->table);
    free(cache);
}

const attn_geometry_t *
door_cache_geometry(const door_cache_t *cache)
{
    return &cache->geometry;
}

/* ---- sequences ---- */

static attn_status_t
call_for_seq(door_t *door, const char *path, const void *request, attn_seq_t *seq_p)
{
    Attn__V1__SequenceReply *reply;
    rpc_message_t *message;
    attn_status_t status =
        call(door, path, request, &attn__v1__sequence_reply__descriptor, &reply, &message);

    if (status == ATTN_OK) {
        seq_p->id = reply->seq;
        rpc_message_free(message);
    }
    return status;
}

attn_status_t
door_seq_create(door_cache_t *cache, attn_seq_t *seq_p)
{
    Attn__V1__CreateSequenceRequest request = ATTN__V1__CREATE_SEQUENCE_REQUEST__INIT;

    request.cache_id  = cache->id;
    request.client_id = cache->door->client;
    return call_for_seq(cache->door, "/attn.v1.Attention/CreateSequence", &request, seq_p);
}

attn_status_t
door_seq_fork(door_cache_t *cache, attn_seq_t seq, uint64_t length, attn_seq_t *fork_p)
{
    Attn__V1__ForkSequenceRequest request = ATTN__V1__FORK_SEQUENCE_REQUEST__INIT;

    request.cache_id  = cache->id;
    request.client_id = cache->door->client;
    request.seq       = seq.id;
    request.length    = length;
    return call_for_seq(cache->door, "/attn.v1.Attention/ForkSequence", &request, fork_p);
}

attn_status_t
door_seq_truncate(door_cache_t *cache, attn_seq_t seq, uint64_t length)
{
    Attn__V1__TruncateSequenceRequest request = ATTN__V1__TRUNCATE_SEQUENCE_REQUEST__INIT;

    request.cache_id = cache->id;
    request.seq      = seq.id;
    request.length   = length;
    return call(cache->door, "/attn.v1.Attention/TruncateSequence", &request, NULL, NULL, NULL);
}

attn_status_t
door_seq_free(door_cache_t *cache, attn_seq_t seq)
{
    Attn__V1__SequenceRequest request = ATTN__V1__SEQUENCE_REQUEST__INIT;

    request.cache_id = cache->id;
    request.seq      = seq.id;
    return call(cache->door, "/attn.v1.Attention/FreeSequence", &request, NULL, NULL, NULL);
}

attn_status_t
door_seq_describe(door_cache_t *cache, attn_seq_t seq, attn_seq_info_t *info)
{
    Attn__V1__SequenceRequest request = ATTN__V1__SEQUENCE_REQUEST__INIT;
    Attn__V1__SequenceLayout layout   = ATTN__V1__SEQUENCE_LAYOUT__INIT;
    Attn__V1__DescribeSequenceReply *reply;
    rpc_message_t *message;

    request.cache_id     = cache->id;
    request.seq          = seq.id;
    attn_status_t status = call(cache->door, "/attn.v1.Attention/DescribeSequence", &request,
                                &attn__v1__describe_sequence_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        layout.n_chunks = reply->n_chunks; /* the two messages list chunks alike */
        layout.chunks   = reply->chunks;
        status          = wire_layout_decode(&layout, info);
        info->length    = status == ATTN_OK ? reply->length : 0;
        rpc_message_free(message);
    }
    return status;
}

/* One part of a layer, behind those of before. @return how many tokens came, by *n_p */
static attn_status_t
export_part(door_cache_t *cache, Attn__V1__ExportRequest *request, uint64_t deadline_ns, uint8_t *k,
            uint8_t *v, uint32_t *n_p)
{
    const attn_geometry_t *g = &cache->geometry;
    uint64_t head            = (uint64_t)g->kv_heads * attn_dtype_size(g->kv_dtype);
    Attn__V1__ExportReply *reply;
    rpc_message_t *message;
    attn_status_t status =
        rpc_call_typed(cache->door->channel, "/attn.v1.Attention/Export", request, deadline_ns,
                       &attn__v1__export_reply__descriptor, &reply, &message);

    if (status != ATTN_OK) {
        return status;
    }
    uint64_t k_bytes = reply->n * head * g->head_dim_k, v_bytes = reply->n * head * g->head_dim_v;
    if (reply->n == 0 || reply->n > request->end - request->first ||
        rpc_message_data_size(message) != k_bytes + v_bytes) {
        status = attn_fail(ATTN_ERR_INTERNAL, "the coordinator sent %u tokens in %llu bytes",
                           reply->n, (unsigned long long)rpc_message_data_size(message));
    } else {
        rpc_message_data_copy(message, 0, k, k_bytes);
        rpc_message_data_copy(message, k_bytes, v, v_bytes);
        request->version = reply->version;
        *n_p             = reply->n;
    }
    rpc_message_free(message);
    return status;
}

attn_status_t
door_seq_export(door_cache_t *cache, attn_seq_t seq, const attn_export_t *what, void *k, void *v)
{
    const attn_geometry_t *g        = &cache->geometry;
    uint64_t head                   = (uint64_t)g->kv_heads * attn_dtype_size(g->kv_dtype);
    Attn__V1__ExportRequest request = ATTN__V1__EXPORT_REQUEST__INIT;
    uint32_t timeout     = what->timeout_ms != 0 ? what->timeout_ms : cache->door->timeout_ms;
    uint64_t deadline_ns = attn_now_ns() + timeout * ATTN_NS_PER_MS;
    uint32_t layers      = what->n_layers != 0 ? what->n_layers : g->layers - what->first_layer;
    uint8_t *to_k = k, *to_v = v;

    request.cache_id = cache->id;
    request.seq      = seq.id;
    request.end      = what->first + what->n;
    for (uint32_t l = 0; l < layers; l++) {
        request.layer = what->first_layer + l;
        for (request.first = what->first; request.first < request.end;) {
            uint32_t n           = 0;
            attn_status_t status = export_part(cache, &request, deadline_ns, to_k, to_v, &n);
            if (status != ATTN_OK) {
                return status;
            }
            request.first += n;
            to_k += n * head * g->head_dim_k;
            to_v += n * head * g->head_dim_v;
        }
    }
    return ATTN_OK;
}
