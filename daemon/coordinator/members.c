/* members.c: attn.v1.Coordinator: layouts for direct clients, membership of workers. */
#include "daemon/coordinator/coordinator_int.h"

#include "base/log.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

attn_status_t
coordinator_take_text(const char *field, const char *text, char *into, size_t room)
{
    size_t size = strlen(text);

    if (size >= room) {
        return attn_fail(ATTN_ERR_INVALID, "%s has %zu bytes: at most %zu", field, size, room - 1);
    }
    memcpy(into, text, size + 1);
    return ATTN_OK;
}

/* ---- layouts ---- */

static int
compare_ids(const void *a, const void *b)
{
    const uint32_t *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

/* Every worker that a chunk names, once. */
static attn_status_t
encode_owners(coordinator_t *c, wire_block_t *block, const attn_seq_info_t *infos, uint32_t n,
              Attn__V1__LayoutReply *reply)
{
    uint64_t total = 0;
    uint32_t ids   = 0;

    for (uint32_t i = 0; i < n; i++) {
        total += infos[i].n_chunks;
    }
    uint32_t *owners = wire_alloc(block, total + 1, sizeof(*owners));
    if (owners == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < infos[i].n_chunks; k++) {
            owners[ids++] = infos[i].chunks[k].worker;
        }
    }
    qsort(owners, ids, sizeof(*owners), compare_ids);
    uint32_t unique = 0;
    for (uint32_t i = 0; i < ids; i++) {
        if (i == 0 || owners[i] != owners[i - 1]) {
            owners[unique++] = owners[i];
        }
    }
    reply->workers = wire_alloc(block, unique + 1, sizeof(*reply->workers));
    for (uint32_t i = 0; reply->workers != NULL && i < unique; i++) {
        Attn__V1__WorkerInfo *info = wire_alloc(block, 1, sizeof(*info));
        char *address              = wire_alloc(block, PROCESS_ADDRESS_MAX, 1);
        bool alive                 = false;
        if (info == NULL || address == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
        attn_status_t status = cluster_worker_address(c->cluster, owners[i], address, &alive);
        if (status != ATTN_OK) {
            return status;
        }
        attn__v1__worker_info__init(info);
        info->id           = owners[i];
        info->alive        = alive;
        info->address      = address;
        reply->workers[i]  = info;
        dir_place_t *place = wire_alloc(block, 1, sizeof(*place));
        if (place == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
        if (cluster_worker_place(c->cluster, owners[i], place) == ATTN_OK) {
            info->group_host   = place->host;
            info->group_device = place->device;
        }
    }
    reply->n_workers = unique;
    return reply->workers != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
}

static attn_status_t
encode_layouts(wire_block_t *block, const Attn__V1__LayoutRequest *r, const attn_seq_info_t *infos,
               Attn__V1__LayoutReply *reply)
{
    Attn__V1__SequenceLayout *layouts = wire_alloc(block, r->n_seqs, sizeof(*layouts));
    reply->layouts                    = wire_alloc(block, r->n_seqs, sizeof(*reply->layouts));
    attn_status_t status = layouts != NULL && reply->layouts != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;

    for (size_t i = 0; status == ATTN_OK && i < r->n_seqs; i++) {
        attn__v1__sequence_layout__init(&layouts[i]);
        layouts[i].seq      = r->seqs[i];
        layouts[i].n_chunks = infos[i].n_chunks;
        status              = wire_chunks_encode(block, &infos[i], &layouts[i].chunks);
        reply->layouts[i]   = &layouts[i];
    }
    reply->n_layouts = r->n_seqs;
    return status;
}

static attn_status_t
serve_layout(const unary_call_t *u)
{
    const Attn__V1__LayoutRequest *r = u->request;
    coordinator_t *c                 = u->service;
    Attn__V1__LayoutReply *reply     = u->reply;

    if (r->n_seqs < 1 || r->n_seqs > WIRE_SEQS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "seqs has %zu elements: 1 to %u", r->n_seqs,
                         WIRE_SEQS_MAX);
    }
    if (r->n_tokens != 0 && r->n_tokens != r->n_seqs) {
        return attn_fail(ATTN_ERR_INVALID, "tokens has %zu elements: none, or one per seq (%zu)",
                         r->n_tokens, r->n_seqs);
    }
    if (r->n_bases != 0 && r->n_bases != r->n_tokens) {
        return attn_fail(ATTN_ERR_INVALID,
                         "bases has %zu elements: none, or one per token count (%zu)", r->n_bases,
                         r->n_tokens);
    }
    uint32_t n             = (uint32_t)r->n_seqs;
    attn_seq_t *seqs       = wire_alloc(u->block, n, sizeof(*seqs));
    attn_seq_info_t *infos = wire_alloc(u->block, n, sizeof(*infos));
    if (seqs == NULL || infos == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        seqs[i].id = r->seqs[i];
    }
    attn_status_t status =
        cluster_layout(c->cluster, r->cache_id, seqs, r->n_bases > 0 ? r->bases : NULL,
                       r->n_tokens > 0 ? r->tokens : NULL, n, infos, &reply->epoch);
    if (status != ATTN_OK) {
        return status;
    }
    status = encode_layouts(u->block, r, infos, reply);
    if (status == ATTN_OK) {
        status = encode_owners(c, u->block, infos, n, reply);
    }
    for (uint32_t i = 0; i < n; i++) {
        attn_seq_info_free(&infos[i]);
    }
    return status;
}

/* ---- workers ---- */

static attn_status_t
take_worker(const Attn__V1__WorkerInfo *info, dir_worker_t *worker)
{
    if (info == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "worker is missing");
    }
    *worker = (dir_worker_t){.id           = info->id,
                             .incarnation  = info->incarnation,
                             .slab_bytes   = info->slab_bytes,
                             .region_bytes = info->region_bytes,
                             .used_bytes   = info->used_bytes,
                             .chunks       = info->chunks,
                             .open_steps   = info->open_steps,
                             .runs         = info->runs,
                             .kv_bytes     = info->kv_bytes,
                             .device_bytes = info->device_bytes,
                             .device_free  = info->device_free_bytes,
                             .kv_rate      = info->kv_bytes_per_s,
                             .ucx          = info->ucx,
                             .ucx_clients  = info->ucx_clients,
                             .ucx_runs     = info->ucx_runs,
                             .gpu_clients  = info->gpu_clients,
                             .groups       = info->groups,
                             .gpu_runs     = info->gpu_runs};
    attn_status_t status =
        coordinator_take_text("address", info->address, worker->address, sizeof(worker->address));
    if (status == ATTN_OK) {
        status = coordinator_take_text("kind", info->kind, worker->kind, sizeof(worker->kind));
    }
    if (status == ATTN_OK) {
        status =
            coordinator_take_text("device", info->device, worker->device, sizeof(worker->device));
    }
    if (status == ATTN_OK) {
        status = coordinator_take_text("ucx_ways", info->ucx_ways, worker->ucx_ways,
                                       sizeof(worker->ucx_ways));
    }
    if (status == ATTN_OK) {
        status = coordinator_take_text("group_host", info->group_host, worker->place.host,
                                       sizeof(worker->place.host));
    }
    if (status == ATTN_OK) {
        status = coordinator_take_text("group_device", info->group_device, worker->place.device,
                                       sizeof(worker->place.device));
    }
    return status == ATTN_OK && !(isfinite(worker->kv_rate) && worker->kv_rate >= 0)
               ? attn_fail(ATTN_ERR_INVALID, "kv_bytes_per_s is %g: finite, at least 0",
                           worker->kv_rate)
               : status;
}

/* What its kernels do, as a worker measured it. Fewer rates than dtypes: the others are not known.
 */
static attn_status_t
take_speed(const Attn__V1__WorkerInfo *info, cost_worker_t *speed)
{
    const struct {
        const char *name;
        size_t n;
        const double *from;
        double *into;
    } rates[] = {
        {"attend_seconds", 1, &info->attend_seconds, &speed->attend_seconds},
        {"few_flops", info->n_few_flops, info->few_flops, &speed->few_flops[ATTN_F32]},
        {"many_flops", info->n_many_flops, info->many_flops, &speed->many_flops[ATTN_F32]}};

    for (size_t i = 0; i < sizeof(rates) / sizeof(rates[0]); i++) {
        for (size_t d = 0; d < rates[i].n && d < COST_DTYPES - ATTN_F32; d++) {
            rates[i].into[d] = rates[i].from[d];
            if (!(isfinite(rates[i].from[d]) && rates[i].from[d] >= 0)) {
                return attn_fail(ATTN_ERR_INVALID, "%s[%zu] is %g: finite, at least 0",
                                 rates[i].name, d, rates[i].from[d]);
            }
        }
    }
    return ATTN_OK;
}

/* Is this caller of those that may be workers? */
static attn_status_t
admit_worker(void *service, const rpc_call_t *call)
{
    coordinator_t *c  = service;
    const char *shown = rpc_call_metadata(call, JOIN_HEADER);

    if (c->join_secret[0] == '\0' || (shown != NULL && ticket_texts_equal(shown, c->join_secret))) {
        return ATTN_OK;
    }
    attn_log(ATTN_LOG_WARN, "member.refused", "peer=\"%s\" reason=\"%s join secret\"",
             rpc_call_peer(call), shown == NULL ? "no" : "wrong");
    return attn_fail(
        ATTN_ERR_DENIED,
        "workers are let in here if they show the join secret (--join-secret-file): %s",
        shown == NULL ? "none came" : "another one came");
}

static attn_status_t
serve_join(const unary_call_t *u)
{
    const Attn__V1__JoinRequest *r = u->request;
    coordinator_t *c               = u->service;
    Attn__V1__JoinReply *reply     = u->reply;
    dir_worker_t hello;

    attn_status_t status = take_worker(r->worker, &hello);
    if (status == ATTN_OK && !(isfinite(r->read_bandwidth) && r->read_bandwidth >= 0)) {
        status = attn_fail(ATTN_ERR_INVALID, "read_bandwidth is %g: finite, at least 0",
                           r->read_bandwidth);
    }
    status = status == ATTN_OK ? take_speed(r->worker, &hello.speed) : status;
    if (status == ATTN_OK) {
        hello.speed.read_bandwidth = r->read_bandwidth;
        status                     = cluster_worker_join(c->cluster, &hello, &reply->worker_id);
    }
    if (status != ATTN_OK) {
        attn_log(ATTN_LOG_WARN, "member.refused", "address=\"%s\" reason=\"%s\"",
                 r->worker != NULL ? r->worker->address : "", attn_last_error());
        return status;
    }
    reply->epoch         = cluster_epoch(c->cluster);
    reply->instance      = c->instance;
    reply->heartbeat_ms  = (uint32_t)c->options.heartbeat_ms;
    reply->ticket_period = atomic_load(&c->period);
    reply->ticket_secret = (ProtobufCBinaryData){.len = TICKET_SECRET, .data = c->ticket_secret};
    return ATTN_OK;
}

static attn_status_t
serve_heartbeat(const unary_call_t *u)
{
    const Attn__V1__HeartbeatRequest *r = u->request;
    coordinator_t *c                    = u->service;
    Attn__V1__HeartbeatReply *reply     = u->reply;
    dir_worker_t figures;

    attn_status_t status = take_worker(r->worker, &figures);
    if (status == ATTN_OK) {
        status = cluster_worker_heartbeat(c->cluster, &figures);
    }
    reply->epoch         = cluster_epoch(c->cluster);
    reply->ticket_period = atomic_load(&c->period);
    return status;
}

/* ---- the service ---- */

/* Membership never waits for anybody: the server's own threads serve it. */
static const unary_method_t methods[] = {
    {.path    = "/attn.v1.Coordinator/Layout",
     .serve   = serve_layout,
     .reply   = &attn__v1__layout_reply__descriptor,
     .blocks  = true,
     .request = &attn__v1__layout_request__descriptor},
    {.path    = "/attn.v1.Coordinator/Join",
     .serve   = serve_join,
     .reply   = &attn__v1__join_reply__descriptor,
     .admit   = admit_worker,
     .request = &attn__v1__join_request__descriptor},
    {.path    = "/attn.v1.Coordinator/Heartbeat",
     .serve   = serve_heartbeat,
     .reply   = &attn__v1__heartbeat_reply__descriptor,
     .admit   = admit_worker,
     .request = &attn__v1__heartbeat_request__descriptor},
};

attn_status_t
coordinator_serve_members(coordinator_t *c)
{
    return unary_add(c->server, c->jobs, methods, sizeof(methods) / sizeof(methods[0]), c,
                     &c->members);
}
