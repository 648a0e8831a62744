/* attention.c: attn.v1.Attention without its steps (thin.c): clients, caches, sequences, status. */
#include "daemon/coordinator/coordinator_int.h"

#include "base/status.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- clients ---- */

/* Who names a client, to act for it, is to show its ticket; of any age, for here the lease tells
 * whether there is such a client. */
static attn_status_t
admit_client(void *service, const rpc_call_t *call, const ProtobufCMessage *request)
{
    coordinator_t *c = service;
    const char *text = rpc_call_metadata(call, TICKET_HEADER);
    uint32_t client;
    ticket_t ticket;

    const ProtobufCFieldDescriptor *field =
        protobuf_c_message_descriptor_get_field_by_name(request->descriptor, "client_id");
    assert(field != NULL && field->type == PROTOBUF_C_TYPE_UINT32);
    memcpy(&client, (const char *)request + field->offset, sizeof(client));
    if (client == 0) {
        return ATTN_OK; /* nobody's lease */
    }
    attn_status_t status = ticket_read(text, c->ticket_secret, 0, &ticket);
    if (status == ATTN_OK && (ticket.role != TICKET_CLIENT || ticket.client != client)) {
        status = attn_fail(ATTN_ERR_DENIED,
                           "the call is for client %u, and its " TICKET_HEADER " is of client %u",
                           client, ticket.client);
    }
    return status;
}

static attn_status_t
reply_ticket(coordinator_t *c, wire_block_t *block, uint32_t client, char **text_p)
{
    char *text = wire_alloc(block, TICKET_MAX, 1);

    if (text == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    coordinator_ticket(c, TICKET_CLIENT, client, text);
    *text_p = text;
    return ATTN_OK;
}

static attn_status_t
serve_open_client(const unary_call_t *u)
{
    const Attn__V1__OpenClientRequest *r = u->request;
    coordinator_t *c                     = u->service;
    Attn__V1__OpenClientReply *reply     = u->reply;
    char name[64];

    attn_status_t status = coordinator_take_text("name", r->name, name, sizeof(name));
    if (status == ATTN_OK) {
        status = cluster_client_open(c->cluster, name, &reply->client_id);
    }
    reply->lease_ms = (uint32_t)c->options.lease_ms;
    return status == ATTN_OK ? reply_ticket(c, u->block, reply->client_id, &reply->ticket) : status;
}

static attn_status_t
take_link(const cost_link_t *told)
{
    const double figures[] = {told->hop_seconds, told->send_seconds, told->bandwidth};

    for (size_t i = 0; i < sizeof(figures) / sizeof(figures[0]); i++) {
        if (!(isfinite(figures[i]) && figures[i] >= 0)) {
            return attn_fail(ATTN_ERR_INVALID,
                             "hop_seconds is %g, send_seconds %g, link_bandwidth %g: finite, at "
                             "least 0",
                             figures[0], figures[1], figures[2]);
        }
    }
    return ATTN_OK;
}

static attn_status_t
serve_keep_alive(const unary_call_t *u)
{
    const Attn__V1__ClientRequest *r = u->request;
    coordinator_t *c                 = u->service;
    Attn__V1__KeepAliveReply *reply  = u->reply;

    cost_link_t told = {.hop_seconds  = r->hop_seconds,
                        .send_seconds = r->send_seconds,
                        .bandwidth    = r->link_bandwidth};

    attn_status_t status = take_link(&told);
    if (status == ATTN_OK) {
        status = cluster_client_renew(c->cluster, r->client_id, &told);
    }
    return status == ATTN_OK ? reply_ticket(c, u->block, r->client_id, &reply->ticket) : status;
}

static attn_status_t
serve_close_client(const unary_call_t *u)
{
    const Attn__V1__ClientRequest *r = u->request;
    coordinator_t *c                 = u->service;

    cluster_client_close(c->cluster, r->client_id);
    return ATTN_OK;
}

/* ---- caches ---- */

static void *
keep(wire_block_t *block, const void *from, uint64_t n, uint64_t size)
{
    void *copy = wire_alloc(block, n, size);

    if (copy != NULL) {
        memcpy(copy, from, n * size);
    }
    return copy;
}

/* Encode a geometry whose layer table will go before the message does. */
static attn_status_t
encode_geometry(wire_block_t *block, const attn_geometry_t *geometry,
                Attn__V1__Geometry **message_p)
{
    attn_geometry_t copy = *geometry;
    uint64_t heads       = geometry->q_heads;
    attn_layer_t *table  = keep(block, geometry->layer_table, geometry->layers, sizeof(*table));

    for (uint32_t l = 0; table != NULL && l < geometry->layers; l++) {
        if (table[l].slopes != NULL &&
            (table[l].slopes = keep(block, table[l].slopes, heads, sizeof(float))) == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
        if (table[l].sinks != NULL &&
            (table[l].sinks = keep(block, table[l].sinks, heads, sizeof(float))) == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
    }
    copy.layer_table = table;
    return table != NULL ? wire_geometry_encode(block, &copy, message_p) : ATTN_ERR_NO_MEMORY;
}

static attn_status_t
serve_open_cache(const unary_call_t *u)
{
    const Attn__V1__OpenCacheRequest *r = u->request;
    coordinator_t *c                    = u->service;
    Attn__V1__OpenCacheReply *reply     = u->reply;
    attn_geometry_t geometry, complete;
    void *table;
    uint64_t cache;
    char *kind = wire_alloc(u->block, 64, 1);

    if (kind == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    attn_status_t status = ATTN_OK;
    if (r->geometry != NULL) {
        status = wire_geometry_decode(u->block, r->geometry, &geometry);
    }
    if (status == ATTN_OK) {
        status = cluster_cache_open(c->cluster, r->client_id, r->name,
                                    r->geometry != NULL ? &geometry : NULL, &cache, kind);
    }
    if (status != ATTN_OK) {
        return status;
    }
    status = cluster_cache_geometry(c->cluster, cache, &complete, &table);
    if (status == ATTN_OK) {
        status = encode_geometry(u->block, &complete, &reply->geometry);
        free(table);
    }
    reply->cache_id = cache;
    reply->epoch    = cluster_epoch(c->cluster);
    reply->kind     = kind;
    return status;
}

static attn_status_t
serve_close_cache(const unary_call_t *u)
{
    const Attn__V1__CloseCacheRequest *r = u->request;
    coordinator_t *c                     = u->service;

    thin_forget_cache(c->thin, r->cache_id);
    return cluster_cache_close(c->cluster, r->client_id, r->cache_id);
}

/* ---- sequences ---- */

static attn_status_t
serve_create(const unary_call_t *u)
{
    const Attn__V1__CreateSequenceRequest *r = u->request;
    coordinator_t *c                         = u->service;
    Attn__V1__SequenceReply *reply           = u->reply;
    attn_seq_t seq;

    attn_status_t status =
        cluster_seq_create(c->cluster, r->cache_id, r->client_id, r->expected_tokens, &seq);
    reply->seq = status == ATTN_OK ? seq.id : 0;
    return status;
}

static attn_status_t
serve_fork(const unary_call_t *u)
{
    const Attn__V1__ForkSequenceRequest *r = u->request;
    coordinator_t *c                       = u->service;
    Attn__V1__SequenceReply *reply         = u->reply;
    attn_seq_t fork;

    attn_status_t status = cluster_seq_fork(c->cluster, r->cache_id, r->client_id,
                                            (attn_seq_t){r->seq}, r->length, &fork);
    reply->seq           = status == ATTN_OK ? fork.id : 0;
    return status;
}

static attn_status_t
serve_truncate(const unary_call_t *u)
{
    const Attn__V1__TruncateSequenceRequest *r = u->request;
    coordinator_t *c                           = u->service;

    return thin_seq_truncate(c->thin, r->cache_id, (attn_seq_t){r->seq}, r->length);
}

static attn_status_t
serve_free(const unary_call_t *u)
{
    const Attn__V1__SequenceRequest *r = u->request;
    coordinator_t *c                   = u->service;

    return thin_seq_free(c->thin, r->cache_id, (attn_seq_t){r->seq});
}

static attn_status_t
serve_describe(const unary_call_t *u)
{
    const Attn__V1__SequenceRequest *r     = u->request;
    coordinator_t *c                       = u->service;
    Attn__V1__DescribeSequenceReply *reply = u->reply;
    attn_seq_t seq                         = {r->seq};
    attn_seq_info_t info;
    uint64_t epoch;

    attn_status_t status =
        cluster_layout(c->cluster, r->cache_id, &seq, NULL, NULL, 1, &info, &epoch);
    if (status != ATTN_OK) {
        return status;
    }
    reply->length   = info.length;
    reply->n_chunks = info.n_chunks;
    reply->n_holes  = info.n_holes;
    status          = wire_chunks_encode(u->block, &info, &reply->chunks);
    if (status == ATTN_OK) {
        status = wire_holes_encode(u->block, &info, &reply->holes);
    }
    attn_seq_info_free(&info);
    return status;
}

static attn_status_t
serve_export(const unary_call_t *u)
{
    const Attn__V1__ExportRequest *r = u->request;
    coordinator_t *c                 = u->service;
    Attn__V1__ExportReply *reply     = u->reply;
    cluster_export_t part            = {
                   .layer = r->layer, .first = r->first, .end = r->end, .version = r->version};

    attn_status_t status = cluster_export(c->cluster, r->cache_id, (attn_seq_t){r->seq}, &part);
    if (status == ATTN_OK) {
        reply->version   = part.version;
        reply->n         = part.n;
        reply->data.len  = part.bytes;
        reply->data.data = part.bytes > 0 ? keep(u->block, part.data, part.bytes, 1) : NULL;
        status = part.bytes == 0 || reply->data.data != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
    }
    free(part.data);
    return status;
}

/* ---- moving chunks ---- */

static attn_status_t
reply_moved(wire_block_t *block, const cluster_moved_t *moved, Attn__V1__MoveReply *reply)
{
    reply->chunks = moved->chunks;
    reply->bytes  = moved->bytes;
    reply->left   = moved->left;
    reply->failed = moved->failed;
    if (moved->failed == 0) {
        return ATTN_OK;
    }
    reply->reason = wire_alloc(block, 1, sizeof(*reply->reason));
    char *reason  = keep(block, moved->reason, sizeof(moved->reason), 1);
    if (reply->reason == NULL || reason == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    attn__v1__status__init(reply->reason);
    reply->reason->code    = moved->why;
    reply->reason->message = reason;
    return ATTN_OK;
}

static attn_status_t
serve_move_sequence(const unary_call_t *u)
{
    const Attn__V1__MoveSequenceRequest *r = u->request;
    coordinator_t *c                       = u->service;
    cluster_moved_t moved;

    attn_status_t status =
        cluster_seq_move(c->cluster, r->cache_id, (attn_seq_t){r->seq}, r->from, r->to, &moved);
    return status == ATTN_OK ? reply_moved(u->block, &moved, u->reply) : status;
}

static attn_status_t
serve_drain_worker(const unary_call_t *u)
{
    const Attn__V1__DrainWorkerRequest *r = u->request;
    coordinator_t *c                      = u->service;
    cluster_moved_t moved;

    attn_status_t status = cluster_worker_drain(c->cluster, r->worker, r->to, r->stay, &moved);
    return status == ATTN_OK ? reply_moved(u->block, &moved, u->reply) : status;
}

/* ---- status ---- */

static attn_status_t
encode_workers(wire_block_t *block, const attn_cluster_info_t *info,
               Attn__V1__ClusterStatusReply *reply)
{
    attn_worker_info_t *from       = keep(block, info->workers, info->n_workers, sizeof(*from));
    Attn__V1__WorkerInfo *messages = wire_alloc(block, info->n_workers, sizeof(*messages));
    reply->workers                 = wire_alloc(block, info->n_workers, sizeof(*reply->workers));

    if (from == NULL || messages == NULL || reply->workers == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < info->n_workers; i++) {
        Attn__V1__WorkerInfo *m = &messages[i];
        attn__v1__worker_info__init(m);
        m->id                = from[i].id;
        m->alive             = from[i].alive;
        m->address           = from[i].address;
        m->kind              = from[i].kind;
        m->slab_bytes        = from[i].slab_bytes;
        m->region_bytes      = from[i].region_bytes;
        m->used_bytes        = from[i].used_bytes;
        m->chunks            = from[i].chunks;
        m->open_steps        = from[i].open_steps;
        m->runs              = from[i].runs;
        m->kv_bytes          = from[i].kv_bytes;
        m->device            = from[i].device;
        m->device_bytes      = from[i].device_bytes;
        m->device_free_bytes = from[i].device_free_bytes;
        m->kv_bytes_per_s    = from[i].kv_bytes_per_s;
        m->read_bandwidth    = from[i].read_bandwidth;
        m->ucx               = from[i].ucx;
        m->ucx_clients       = from[i].ucx_clients;
        m->ucx_runs          = from[i].ucx_runs;
        m->gpu_clients       = from[i].gpu_clients;
        m->groups            = from[i].groups;
        m->group_host        = from[i].group_host;
        m->group_device      = from[i].group_device;
        m->gpu_runs          = from[i].gpu_runs;
        m->ucx_ways          = from[i].ucx_ways;
        m->leaving           = from[i].leaving;
        m->attend_seconds    = from[i].attend_seconds;
        m->few_flops         = &from[i].few_flops[ATTN_F32];
        m->many_flops        = &from[i].many_flops[ATTN_F32];
        m->n_few_flops = m->n_many_flops = ATTN_BF16;
        m->hop_seconds                   = from[i].hop_seconds;
        m->link_bandwidth                = from[i].link_bandwidth;
        reply->workers[i]                = m;
    }
    reply->n_workers = info->n_workers;
    return ATTN_OK;
}

static attn_status_t
serve_status(const unary_call_t *u)
{
    coordinator_t *c                    = u->service;
    Attn__V1__ClusterStatusReply *reply = u->reply;
    attn_cluster_info_t info;

    attn_status_t status = cluster_describe(c->cluster, &info);
    if (status != ATTN_OK) {
        return status;
    }
    reply->epoch                  = info.epoch;
    reply->sequences              = info.sequences;
    reply->clients                = info.clients;
    reply->caches                 = info.caches;
    reply->uptime_ms              = info.uptime_ms;
    reply->clients_hop_seconds    = info.clients_hop_seconds;
    reply->clients_send_seconds   = info.clients_send_seconds;
    reply->clients_link_bandwidth = info.clients_link_bandwidth;
    status                        = encode_workers(u->block, &info, reply);
    attn_cluster_info_free(&info);
    return status;
}

/* ---- the service ---- */

/* Whatever may ask a worker blocks. */
static const unary_method_t methods[] = {
    {.path    = "/attn.v1.Attention/OpenClient",
     .serve   = serve_open_client,
     .reply   = &attn__v1__open_client_reply__descriptor,
     .request = &attn__v1__open_client_request__descriptor},
    {.path          = "/attn.v1.Attention/KeepAlive",
     .serve         = serve_keep_alive,
     .reply         = &attn__v1__keep_alive_reply__descriptor,
     .admit_request = admit_client,
     .request       = &attn__v1__client_request__descriptor},
    {.path          = "/attn.v1.Attention/CloseClient",
     .serve         = serve_close_client,
     .reply         = &attn__v1__empty__descriptor,
     .admit_request = admit_client,
     .blocks        = true,
     .request       = &attn__v1__client_request__descriptor},
    {.path          = "/attn.v1.Attention/OpenCache",
     .serve         = serve_open_cache,
     .reply         = &attn__v1__open_cache_reply__descriptor,
     .admit_request = admit_client,
     .blocks        = true,
     .request       = &attn__v1__open_cache_request__descriptor},
    {.path          = "/attn.v1.Attention/CloseCache",
     .serve         = serve_close_cache,
     .reply         = &attn__v1__empty__descriptor,
     .admit_request = admit_client,
     .blocks        = true,
     .request       = &attn__v1__close_cache_request__descriptor},
    {.path          = "/attn.v1.Attention/CreateSequence",
     .serve         = serve_create,
     .reply         = &attn__v1__sequence_reply__descriptor,
     .admit_request = admit_client,
     .request       = &attn__v1__create_sequence_request__descriptor},
    {.path          = "/attn.v1.Attention/ForkSequence",
     .serve         = serve_fork,
     .reply         = &attn__v1__sequence_reply__descriptor,
     .admit_request = admit_client,
     .blocks        = true,
     .request       = &attn__v1__fork_sequence_request__descriptor},
    {.path    = "/attn.v1.Attention/TruncateSequence",
     .serve   = serve_truncate,
     .reply   = &attn__v1__empty__descriptor,
     .blocks  = true,
     .request = &attn__v1__truncate_sequence_request__descriptor},
    {.path    = "/attn.v1.Attention/FreeSequence",
     .serve   = serve_free,
     .reply   = &attn__v1__empty__descriptor,
     .blocks  = true,
     .request = &attn__v1__sequence_request__descriptor},
    {.path    = "/attn.v1.Attention/DescribeSequence",
     .serve   = serve_describe,
     .reply   = &attn__v1__describe_sequence_reply__descriptor,
     .blocks  = true,
     .request = &attn__v1__sequence_request__descriptor},
    {.path    = "/attn.v1.Attention/Export",
     .serve   = serve_export,
     .reply   = &attn__v1__export_reply__descriptor,
     .blocks  = true,
     .request = &attn__v1__export_request__descriptor},
    {.path    = "/attn.v1.Attention/MoveSequence",
     .serve   = serve_move_sequence,
     .reply   = &attn__v1__move_reply__descriptor,
     .blocks  = true,
     .request = &attn__v1__move_sequence_request__descriptor},
    {.path    = "/attn.v1.Attention/DrainWorker",
     .serve   = serve_drain_worker,
     .reply   = &attn__v1__move_reply__descriptor,
     .blocks  = true,
     .request = &attn__v1__drain_worker_request__descriptor},
    {.path    = "/attn.v1.Attention/ClusterStatus",
     .serve   = serve_status,
     .reply   = &attn__v1__cluster_status_reply__descriptor,
     .request = &attn__v1__empty__descriptor},
};

attn_status_t
coordinator_serve_attention(coordinator_t *c)
{
    attn_status_t status = unary_add(c->server, c->jobs, methods,
                                     sizeof(methods) / sizeof(methods[0]), c, &c->attention);

    if (status == ATTN_OK) {
        steps_limits_t limits = {.part_ms      = 3 * (uint32_t)c->options.stall_ms,
                                 .buffer_bytes = c->options.run_memory};
        status = steps_create(c->server, "/attn.v1.Attention", &thin_ops, c->thin, c->jobs, &limits,
                              &c->steps);
    }
    return status;
}
