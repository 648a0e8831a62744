/* control_grpc.c: the control plane of a coordinator, over gRPC. */
#include "client/control.h"
#include "base/table.h"

#include "balancer/geometry.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/rpc_call.h"
#include "client/wire.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CLOSE_TIMEOUT_MS 1000u

/* A worker that some layout named. */
typedef struct known_worker {
    uint32_t id; /* key */
    char address[64];
    bool alive;
    dir_place_t place;
    UT_hash_handle hh;
} known_worker_t;

typedef struct grpc_control {
    control_t control;
    rpc_client_t *rpc;
    rpc_channel_t *channel;
    uint32_t client;
    pthread_mutex_t lock;
    char ticket[WIRE_TICKET_ROOM];
    known_worker_t *workers;
} grpc_control_t;

static grpc_control_t *
of(control_t *control)
{
    return (grpc_control_t *)(void *)control;
}

static attn_status_t
call(control_t *control, const char *path, const void *request, uint64_t deadline_ns,
     const ProtobufCMessageDescriptor *type, void *reply_p, rpc_message_t **message_p)
{
    return rpc_call_typed(of(control)->channel, path, request, deadline_ns, type, reply_p,
                          message_p);
}

/* From now on every call shows it, here and at workers. A ticket as it was leaves streams that were
 * opened with it as good as they were. */
static attn_status_t
take_ticket(grpc_control_t *control, const char *ticket)
{
    attn_status_t status = wire_ticket_check(ticket);

    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&control->lock);
    if (strcmp(ticket, control->ticket) != 0) {
        strcpy(control->ticket, ticket); /* checked: it has room */
        rpc_client_set_header(control->rpc, "attn-ticket", ticket);
    }
    pthread_mutex_unlock(&control->lock);
    return ATTN_OK;
}

static void
remote_close(control_t *control)
{
    Attn__V1__ClientRequest request = ATTN__V1__CLIENT_REQUEST__INIT;
    known_worker_t *worker, *next;

    request.client_id = of(control)->client;
    call(control, "/attn.v1.Attention/CloseClient", &request,
         attn_now_ns() + CLOSE_TIMEOUT_MS * ATTN_NS_PER_MS, NULL, NULL, NULL);
    rpc_channel_close(of(control)->channel);
    HASH_ITER(hh, of(control)->workers, worker, next)
    {
        HASH_DEL(of(control)->workers, worker);
        free(worker);
    }
    pthread_mutex_destroy(&of(control)->lock);
    free(control);
}

static attn_status_t
remote_renew(control_t *control, const cost_link_t *told, uint64_t deadline_ns)
{
    Attn__V1__ClientRequest request = ATTN__V1__CLIENT_REQUEST__INIT;
    Attn__V1__KeepAliveReply *reply;
    rpc_message_t *message;

    request.client_id      = of(control)->client;
    request.hop_seconds    = told->hop_seconds;
    request.send_seconds   = told->send_seconds;
    request.link_bandwidth = told->bandwidth;
    attn_status_t status   = call(control, "/attn.v1.Attention/KeepAlive", &request, deadline_ns,
                                  &attn__v1__keep_alive_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        status = take_ticket(of(control), reply->ticket);
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
remote_cache_open(control_t *control, const char *name, const attn_geometry_t *geometry,
                  uint64_t deadline_ns, uint64_t *cache_p, attn_geometry_t *complete,
                  void **table_p)
{
    wire_block_t block                 = {0};
    Attn__V1__OpenCacheRequest request = ATTN__V1__OPEN_CACHE_REQUEST__INIT;
    Attn__V1__OpenCacheReply *reply;
    rpc_message_t *message = NULL;
    attn_geometry_t there;

    request.client_id = of(control)->client;
    request.name      = (char *)name;
    attn_status_t status =
        geometry != NULL ? wire_geometry_encode(&block, geometry, &request.geometry) : ATTN_OK;
    if (status == ATTN_OK) {
        status = call(control, "/attn.v1.Attention/OpenCache", &request, deadline_ns,
                      &attn__v1__open_cache_reply__descriptor, &reply, &message);
    }
    if (status == ATTN_OK) {
        status = wire_geometry_decode(&block, reply->geometry, &there);
    }
    if (status == ATTN_OK) {
        *cache_p = reply->cache_id;
        status   = geometry_copy(&there, complete, table_p);
    }
    rpc_message_free(message);
    wire_free(&block);
    return status;
}

static attn_status_t
remote_cache_close(control_t *control, uint64_t cache, uint64_t deadline_ns)
{
    Attn__V1__CloseCacheRequest request = ATTN__V1__CLOSE_CACHE_REQUEST__INIT;

    request.client_id = of(control)->client;
    request.cache_id  = cache;
    return call(control, "/attn.v1.Attention/CloseCache", &request, deadline_ns, NULL, NULL, NULL);
}

static attn_status_t
call_for_seq(control_t *control, const char *path, const void *request, uint64_t deadline_ns,
             attn_seq_t *seq_p)
{
    Attn__V1__SequenceReply *reply;
    rpc_message_t *message;
    attn_status_t status = call(control, path, request, deadline_ns,
                                &attn__v1__sequence_reply__descriptor, &reply, &message);

    if (status == ATTN_OK) {
        seq_p->id = reply->seq;
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
remote_seq_create(control_t *control, uint64_t cache, uint64_t expected_tokens,
                  uint64_t deadline_ns, attn_seq_t *seq_p)
{
    Attn__V1__CreateSequenceRequest request = ATTN__V1__CREATE_SEQUENCE_REQUEST__INIT;

    request.cache_id        = cache;
    request.client_id       = of(control)->client;
    request.expected_tokens = expected_tokens;
    return call_for_seq(control, "/attn.v1.Attention/CreateSequence", &request, deadline_ns, seq_p);
}

static attn_status_t
remote_seq_fork(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t length,
                uint64_t deadline_ns, attn_seq_t *fork_p)
{
    Attn__V1__ForkSequenceRequest request = ATTN__V1__FORK_SEQUENCE_REQUEST__INIT;

    request.cache_id  = cache;
    request.client_id = of(control)->client;
    request.seq       = seq.id;
    request.length    = length;
    return call_for_seq(control, "/attn.v1.Attention/ForkSequence", &request, deadline_ns, fork_p);
}

static attn_status_t
remote_seq_truncate(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t length,
                    uint64_t deadline_ns)
{
    Attn__V1__TruncateSequenceRequest request = ATTN__V1__TRUNCATE_SEQUENCE_REQUEST__INIT;

    request.cache_id = cache;
    request.seq      = seq.id;
    request.length   = length;
    return call(control, "/attn.v1.Attention/TruncateSequence", &request, deadline_ns, NULL, NULL,
                NULL);
}

static attn_status_t
remote_seq_free(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t deadline_ns)
{
    Attn__V1__SequenceRequest request = ATTN__V1__SEQUENCE_REQUEST__INIT;

    request.cache_id = cache;
    request.seq      = seq.id;
    return call(control, "/attn.v1.Attention/FreeSequence", &request, deadline_ns, NULL, NULL,
                NULL);
}

/* ---- layouts ---- */

static attn_status_t
remember_worker(grpc_control_t *control, const Attn__V1__WorkerInfo *info)
{
    known_worker_t *worker;

    pthread_mutex_lock(&control->lock);
    HASH_FIND(hh, control->workers, &info->id, sizeof(info->id), worker);
    if (worker == NULL && (worker = calloc(1, sizeof(*worker))) != NULL) {
        worker->id = info->id;
        HASH_ADD(hh, control->workers, id, sizeof(worker->id), worker);
        if (!table_has(hh, worker)) {
            free(worker);
            worker = NULL;
        }
    }
    if (worker != NULL) {
        snprintf(worker->address, sizeof(worker->address), "%s", info->address);
        worker->alive = info->alive;
        snprintf(worker->place.host, sizeof(worker->place.host), "%s", info->group_host);
        snprintf(worker->place.device, sizeof(worker->place.device), "%s", info->group_device);
    }
    pthread_mutex_unlock(&control->lock);
    return worker != NULL ? ATTN_OK
                          : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a worker's address");
}

static attn_status_t
layout_take(control_t *control, const Attn__V1__LayoutReply *reply, const attn_seq_t *seqs,
            uint32_t n, attn_seq_info_t *infos)
{
    attn_status_t status = ATTN_OK;

    if (reply->n_layouts != n) {
        return attn_fail(ATTN_ERR_INTERNAL, "the coordinator answered %zu layouts of %u",
                         reply->n_layouts, n);
    }
    for (size_t w = 0; w < reply->n_workers && status == ATTN_OK; w++) {
        status = remember_worker(of(control), reply->workers[w]);
    }
    memset(infos, 0, n * sizeof(*infos));
    for (uint32_t i = 0; i < n && status == ATTN_OK; i++) {
        status =
            reply->layouts[i]->seq == seqs[i].id
                ? wire_layout_decode(reply->layouts[i], &infos[i])
                : attn_fail(ATTN_ERR_INTERNAL, "the coordinator answered layouts in another order");
    }
    for (uint32_t i = 0; i < n && status != ATTN_OK; i++) {
        attn_seq_info_free(&infos[i]);
    }
    return status;
}

static attn_status_t
layout_call(control_t *control, uint64_t cache, const attn_seq_t *seqs, const uint64_t *bases,
            const uint64_t *tokens, uint32_t n, uint64_t deadline_ns, attn_seq_info_t *infos,
            uint64_t *epoch_p)
{
    Attn__V1__LayoutRequest request = ATTN__V1__LAYOUT_REQUEST__INIT;
    Attn__V1__LayoutReply *reply;
    rpc_message_t *message;

    _Static_assert(sizeof(attn_seq_t) == sizeof(uint64_t), "ids go as they are");
    request.cache_id     = cache;
    request.n_seqs       = n;
    request.seqs         = (uint64_t *)(void *)seqs;
    request.n_tokens     = tokens != NULL ? n : 0;
    request.tokens       = (uint64_t *)tokens;
    request.n_bases      = bases != NULL ? n : 0;
    request.bases        = (uint64_t *)bases;
    attn_status_t status = call(control, "/attn.v1.Coordinator/Layout", &request, deadline_ns,
                                &attn__v1__layout_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        status   = layout_take(control, reply, seqs, n, infos);
        *epoch_p = reply->epoch;
        rpc_message_free(message);
    }
    return status;
}

/* In halves, where the chunks of all do not fit one message. */
static attn_status_t
remote_layout(control_t *control, uint64_t cache, const attn_seq_t *seqs, const uint64_t *bases,
              const uint64_t *tokens, uint32_t n, uint64_t deadline_ns, attn_seq_info_t *infos,
              uint64_t *epoch_p)
{
    attn_status_t status =
        layout_call(control, cache, seqs, bases, tokens, n, deadline_ns, infos, epoch_p);
    uint32_t half = n / 2;
    uint64_t epoch;

    if (status != ATTN_ERR_TOO_LARGE || n < 2) {
        return status;
    }
    status = remote_layout(control, cache, seqs, bases, tokens, half, deadline_ns, infos, epoch_p);
    if (status != ATTN_OK) {
        return status;
    }
    status = remote_layout(control, cache, seqs + half, bases != NULL ? bases + half : NULL,
                           tokens != NULL ? tokens + half : NULL, n - half, deadline_ns,
                           infos + half, &epoch);
    for (uint32_t i = 0; i < half && status != ATTN_OK; i++) {
        attn_seq_info_free(&infos[i]);
    }
    *epoch_p = status == ATTN_OK ? attn_min(*epoch_p, epoch) : *epoch_p;
    return status;
}

static attn_status_t
remote_worker(control_t *control, uint32_t id, char address[64], bool *alive_p)
{
    known_worker_t *worker;

    pthread_mutex_lock(&of(control)->lock);
    HASH_FIND(hh, of(control)->workers, &id, sizeof(id), worker);
    if (worker != NULL) {
        memcpy(address, worker->address, 64);
        *alive_p = worker->alive;
    }
    pthread_mutex_unlock(&of(control)->lock);
    return worker != NULL ? ATTN_OK
                          : attn_fail(ATTN_ERR_NOT_FOUND, "no layout named worker %u", id);
}

static attn_status_t
remote_place(control_t *control, uint32_t id, dir_place_t *place)
{
    known_worker_t *worker;

    pthread_mutex_lock(&of(control)->lock);
    HASH_FIND(hh, of(control)->workers, &id, sizeof(id), worker);
    if (worker != NULL) {
        *place = worker->place;
    }
    pthread_mutex_unlock(&of(control)->lock);
    return worker != NULL ? ATTN_OK
                          : attn_fail(ATTN_ERR_NOT_FOUND, "no layout named worker %u", id);
}

static attn_status_t
remote_describe(control_t *control, uint64_t deadline_ns, attn_cluster_info_t *info)
{
    Attn__V1__Empty request = ATTN__V1__EMPTY__INIT;
    Attn__V1__ClusterStatusReply *reply;
    rpc_message_t *message;
    attn_status_t status = call(control, "/attn.v1.Attention/ClusterStatus", &request, deadline_ns,
                                &attn__v1__cluster_status_reply__descriptor, &reply, &message);

    if (status != ATTN_OK) {
        return status;
    }
    *info =
        (attn_cluster_info_t){.epoch                  = reply->epoch,
                              .sequences              = reply->sequences,
                              .uptime_ms              = reply->uptime_ms,
                              .clients_hop_seconds    = reply->clients_hop_seconds,
                              .clients_send_seconds   = reply->clients_send_seconds,
                              .clients_link_bandwidth = reply->clients_link_bandwidth,
                              .clients                = reply->clients,
                              .caches                 = reply->caches,
                              .n_workers              = (uint32_t)reply->n_workers,
                              .workers = calloc(reply->n_workers + 1, sizeof(attn_worker_info_t))};
    for (size_t w = 0; info->workers != NULL && w < reply->n_workers; w++) {
        wire_worker_decode(reply->workers[w], &info->workers[w]);
    }
    rpc_message_free(message);
    return info->workers != NULL ? ATTN_OK
                                 : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the workers");
}

static attn_status_t
call_to_move(control_t *control, const char *path, const void *request, uint64_t deadline_ns,
             cluster_moved_t *moved)
{
    Attn__V1__MoveReply *reply;
    rpc_message_t *message;
    attn_status_t status = call(control, path, request, deadline_ns,
                                &attn__v1__move_reply__descriptor, &reply, &message);

    if (status != ATTN_OK) {
        return status;
    }
    *moved = (cluster_moved_t){.chunks = reply->chunks,
                               .bytes  = reply->bytes,
                               .left   = reply->left,
                               .failed = reply->failed};
    if (reply->reason != NULL) {
        moved->why = attn_status_is_known(reply->reason->code) ? (attn_status_t)reply->reason->code
                                                               : ATTN_ERR_INTERNAL;
        snprintf(moved->reason, sizeof(moved->reason), "%s", reply->reason->message);
    }
    rpc_message_free(message);
    return ATTN_OK;
}

static attn_status_t
remote_seq_move(control_t *control, uint64_t cache, attn_seq_t seq, uint32_t from, uint32_t to,
                uint64_t deadline_ns, cluster_moved_t *moved)
{
    Attn__V1__MoveSequenceRequest request = ATTN__V1__MOVE_SEQUENCE_REQUEST__INIT;

    request.cache_id = cache;
    request.seq      = seq.id;
    request.from     = from;
    request.to       = to;
    return call_to_move(control, "/attn.v1.Attention/MoveSequence", &request, deadline_ns, moved);
}

static attn_status_t
remote_worker_drain(control_t *control, uint32_t worker, uint32_t to, bool stay,
                    uint64_t deadline_ns, cluster_moved_t *moved)
{
    Attn__V1__DrainWorkerRequest request = ATTN__V1__DRAIN_WORKER_REQUEST__INIT;

    request.worker = worker;
    request.to     = to;
    request.stay   = stay;
    return call_to_move(control, "/attn.v1.Attention/DrainWorker", &request, deadline_ns, moved);
}

static const control_ops_t grpc_control_ops = {
    .close        = remote_close,
    .renew        = remote_renew,
    .cache_open   = remote_cache_open,
    .cache_close  = remote_cache_close,
    .seq_create   = remote_seq_create,
    .seq_fork     = remote_seq_fork,
    .seq_truncate = remote_seq_truncate,
    .seq_free     = remote_seq_free,
    .layout       = remote_layout,
    .worker       = remote_worker,
    .place        = remote_place,
    .describe     = remote_describe,
    .seq_move     = remote_seq_move,
    .worker_drain = remote_worker_drain,
};

static attn_status_t
open_client(grpc_control_t *control, const char *name, uint64_t deadline_ns)
{
    Attn__V1__OpenClientRequest request = ATTN__V1__OPEN_CLIENT_REQUEST__INIT;
    Attn__V1__OpenClientReply *reply;
    rpc_message_t *message;

    request.name = (char *)name;
    attn_status_t status =
        call(&control->control, "/attn.v1.Attention/OpenClient", &request, deadline_ns,
             &attn__v1__open_client_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        control->client           = reply->client_id;
        control->control.lease_ms = reply->lease_ms;
        status                    = take_ticket(control, reply->ticket);
        rpc_message_free(message);
    }
    return status;
}

attn_status_t
control_grpc_open(rpc_client_t *rpc, const char *address, const char *name, uint64_t deadline_ns,
                  control_t **control_p)
{
    grpc_control_t *control = calloc(1, sizeof(*control));

    if (control == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a client");
    }
    control->control.ops = &grpc_control_ops;
    control->rpc         = rpc;
    pthread_mutex_init(&control->lock, NULL);
    attn_status_t status = rpc_channel_open(rpc, address, &control->channel);
    if (status == ATTN_OK && (status = open_client(control, name, deadline_ns)) != ATTN_OK) {
        rpc_channel_close(control->channel);
    }
    if (status != ATTN_OK) {
        pthread_mutex_destroy(&control->lock);
        free(control);
        return status;
    }
    *control_p = &control->control;
    return ATTN_OK;
}
