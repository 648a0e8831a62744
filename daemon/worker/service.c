/*
 * service.c: attn.v1.Worker, the engine's functions as calls. What a message may hold is checked
 * by client/wire.h and here; what it means, by the engine.
 */
#include "daemon/worker/worker_int.h"

#include "balancer/directory.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <stdlib.h>

_Static_assert(WORKER_UCX_SLAB_LEAST == UCX_SLAB_MIN && WORKER_UCX_SLAB_MOST == UCX_SLAB_MAX,
               "--ucx-slab allows what a session does");

/* ---- who may ---- */

static attn_status_t
admit_coordinator(void *service, const rpc_call_t *call)
{
    worker_t *worker = service;

    return gate_admit(&worker->gate, rpc_call_metadata(call, TICKET_HEADER), true);
}

static attn_status_t
admit_steps(void *service, const char *ticket)
{
    worker_t *worker = service;

    return gate_admit(&worker->gate, ticket, false);
}

attn_status_t
worker_admit_introduced(void *service, const rpc_call_t *call)
{
    return admit_steps(service, rpc_call_metadata(call, TICKET_HEADER));
}

/* ---- steps ---- */

static attn_status_t
step_begin(void *service, const ProtobufCMessage *request, steps_begun_t *begun)
{
    worker_t *worker   = service;
    wire_block_t block = {0};
    engine_batch_t batch;
    engine_sizes_t sizes;

    attn_status_t status = wire_worker_begin_decode(
        &block, (const Attn__V1__WorkerBeginRequest *)request, attn_now_ns(), &batch);
    if (status == ATTN_OK) {
        status = engine_step_begin(worker->engine, &batch, &sizes);
    }
    if (status == ATTN_OK) {
        attn__v1__worker_begin_reply__init(&begun->reply.worker);
        begun->step_id                = batch.step_id;
        begun->reply.worker.o_bytes   = sizes.o;
        begun->reply.worker.lse_bytes = sizes.lse;
        begun->reply.worker.states    = sizes.states;
    }
    wire_free(&block);
    return status;
}

static attn_status_t
step_sizes(void *service, uint64_t step_id, steps_sizes_t *sizes)
{
    worker_t *worker = service;
    engine_sizes_t all;
    attn_status_t status = engine_step_sizes(worker->engine, step_id, &all);

    if (status == ATTN_OK) {
        *sizes = (steps_sizes_t){
            .q = all.q, .k = all.k, .v = all.v, .answer = all.answer, .grouped = all.grouped};
    }
    return status;
}

static attn_status_t
step_run(void *service, const steps_layer_t *l)
{
    worker_t *worker = service;

    engine_sizes_t made_for = {
        .q = l->sizes->q, .k = l->sizes->k, .v = l->sizes->v, .answer = l->sizes->answer};

    uint64_t start = attn_now_ns();
    attn_status_t status =
        l->on_gpu ? engine_step_run_lent(worker->engine, l->step_id, l->layer, (void *)l->q,
                                         (void *)l->k, (void *)l->v, l->answer, &made_for)
                  : engine_step_run_lists(worker->engine, l->step_id, l->layer, l->q, l->k, l->v,
                                          l->answer, &made_for, l->lists, l->n_lists);
    *l->compute_ns = attn_now_ns() - start;
    return status;
}

static attn_status_t
step_lend(void *service, uint64_t step_id)
{
    worker_t *worker = service;

    return engine_step_lend(worker->engine, step_id);
}

static attn_status_t
step_drive(void *service, uint64_t step_id, const engine_lane_t *lane)
{
    worker_t *worker = service;

    return engine_step_drive(worker->engine, step_id, lane);
}

static attn_status_t
step_commit(void *service, uint64_t step_id, const engine_commit_t *commit)
{
    worker_t *worker = service;

    return engine_step_commit_paths(worker->engine, step_id, commit);
}

static attn_status_t
step_abort(void *service, uint64_t step_id, const char *reason)
{
    worker_t *worker = service;

    return engine_step_abort(worker->engine, step_id, reason);
}

static void
step_interrupt(void *service, uint64_t step_id)
{
    worker_t *worker = service;

    engine_step_interrupt(worker->engine, step_id);
}

static const steps_ops_t step_ops = {
    .worker    = true,
    .admit     = admit_steps,
    .begin     = step_begin,
    .sizes     = step_sizes,
    .run       = step_run,
    .lend      = step_lend,
    .drive     = step_drive,
    .commit    = step_commit,
    .abort     = step_abort,
    .interrupt = step_interrupt,
};

/* ---- caches ---- */

static attn_status_t
serve_open_cache(const unary_call_t *u)
{
    const Attn__V1__WorkerOpenCacheRequest *r = u->request;
    worker_t *worker                          = u->service;
    Attn__V1__WorkerOpenCacheReply *reply     = u->reply;
    attn_geometry_t geometry;
    kv_region_info_t region;

    if (r->cache_id == 0 || r->geometry == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "%s is missing",
                         r->cache_id == 0 ? "cache_id" : "geometry");
    }
    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    if (status == ATTN_OK) {
        status = wire_geometry_decode(u->block, r->geometry, &geometry);
    }
    if (status == ATTN_OK) {
        status = directory_geometry_check(&geometry);
    }
    if (status == ATTN_OK) {
        status = engine_cache_open(worker->engine, r->cache_id, &geometry, &region);
    }
    if (status == ATTN_OK) {
        reply->n_pages      = region.n_pages;
        reply->region_bytes = region.bytes;
    }
    return status;
}

static attn_status_t
serve_close_cache(const unary_call_t *u)
{
    const Attn__V1__WorkerCloseCacheRequest *r = u->request;
    worker_t *worker                           = u->service;

    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    return status == ATTN_OK ? engine_cache_close(worker->engine, r->cache_id) : status;
}

/* ---- chunks ---- */

/* A chunk as it is now. */
static attn_status_t
reply_chunk(worker_t *worker, uint64_t cache, uint64_t chunk, Attn__V1__WorkerChunk *reply)
{
    kv_chunk_info_t info;
    attn_status_t status =
        engine_chunks_describe(worker->engine, cache, &chunk, 1, &info, NULL, 0, NULL);

    if (status == ATTN_OK) {
        reply->chunk      = chunk;
        reply->generation = info.generation;
        reply->length     = info.length;
        reply->in_step    = info.in_step;
    }
    return status;
}

static attn_status_t
serve_fork_chunk(const unary_call_t *u)
{
    const Attn__V1__ForkChunkRequest *r = u->request;
    worker_t *worker                    = u->service;
    Attn__V1__WorkerChunk *reply        = u->reply;

    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    if (status == ATTN_OK) {
        status = engine_chunk_fork(worker->engine, r->cache_id, r->from, r->length, r->to);
    }
    return status == ATTN_OK ? reply_chunk(worker, r->cache_id, r->to, reply) : status;
}

static attn_status_t
serve_truncate_chunk(const unary_call_t *u)
{
    const Attn__V1__TruncateChunkRequest *r = u->request;
    worker_t *worker                        = u->service;
    Attn__V1__WorkerChunk *reply            = u->reply;
    uint32_t generation;

    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    if (status == ATTN_OK) {
        status = engine_chunk_truncate(worker->engine, r->cache_id, r->chunk, r->generation,
                                       r->length, &generation);
    }
    if (status == ATTN_OK) {
        reply->chunk      = r->chunk;
        reply->generation = generation;
        reply->length     = r->length;
    }
    return status;
}

static attn_status_t
check_count(const char *field, size_t n, uint32_t most)
{
    return n <= most
               ? ATTN_OK
               : attn_fail(ATTN_ERR_TOO_LARGE, "%s has %zu elements: at most %u", field, n, most);
}

static attn_status_t
serve_release_chunks(const unary_call_t *u)
{
    const Attn__V1__ReleaseChunksRequest *r = u->request;
    worker_t *worker                        = u->service;

    attn_status_t status = check_count("chunks", r->n_chunks, WIRE_CHUNKS_MAX);
    if (status == ATTN_OK) {
        status = engine_check_epoch(worker->engine, r->epoch);
    }
    if (status == ATTN_OK) {
        status =
            engine_chunks_release(worker->engine, r->cache_id, r->chunks, (uint32_t)r->n_chunks);
    }
    return status;
}

/* Fill the reply with what the engine told. */
static attn_status_t
encode_chunks(wire_block_t *block, const Attn__V1__DescribeChunksRequest *r,
              const kv_chunk_info_t *infos, const bool *in_step,
              Attn__V1__DescribeChunksReply *reply)
{
    Attn__V1__WorkerChunk *chunks = wire_alloc(block, r->n_chunks + 1, sizeof(*chunks));
    reply->chunks                 = wire_alloc(block, r->n_chunks + 1, sizeof(*reply->chunks));
    reply->seq_in_step            = wire_alloc(block, r->n_seqs + 1, sizeof(*reply->seq_in_step));

    if (chunks == NULL || reply->chunks == NULL || reply->seq_in_step == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < r->n_chunks; i++) {
        attn__v1__worker_chunk__init(&chunks[i]);
        chunks[i].chunk      = r->chunks[i];
        chunks[i].generation = infos[i].generation;
        chunks[i].length     = infos[i].length;
        chunks[i].in_step    = infos[i].in_step;
        reply->chunks[i]     = &chunks[i];
    }
    for (size_t i = 0; i < r->n_seqs; i++) {
        reply->seq_in_step[i] = in_step[i];
    }
    reply->n_chunks      = r->n_chunks;
    reply->n_seq_in_step = r->n_seqs;
    return ATTN_OK;
}

static attn_status_t
serve_describe_chunks(const unary_call_t *u)
{
    const Attn__V1__DescribeChunksRequest *r = u->request;
    worker_t *worker                         = u->service;
    Attn__V1__DescribeChunksReply *reply     = u->reply;

    attn_status_t status = check_count("chunks", r->n_chunks, WIRE_CHUNKS_MAX);
    if (status == ATTN_OK) {
        status = check_count("seqs", r->n_seqs, WIRE_CHUNKS_MAX);
    }
    if (status != ATTN_OK) {
        return status;
    }
    kv_chunk_info_t *infos = wire_alloc(u->block, r->n_chunks + 1, sizeof(*infos));
    bool *in_step          = wire_alloc(u->block, r->n_seqs + 1, sizeof(*in_step));
    if (infos == NULL || in_step == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    status = engine_chunks_describe(worker->engine, r->cache_id, r->chunks, (uint32_t)r->n_chunks,
                                    infos, r->seqs, (uint32_t)r->n_seqs, in_step);
    return status == ATTN_OK ? encode_chunks(u->block, r, infos, in_step, reply) : status;
}

static attn_status_t
serve_export_chunk(const unary_call_t *u)
{
    const Attn__V1__ExportChunkRequest *r = u->request;
    worker_t *worker                      = u->service;
    Attn__V1__ExportChunkReply *reply     = u->reply;
    engine_export_t what                  = copier_part(r);
    uint64_t k, v;

    attn_status_t status = engine_export_bytes(worker->engine, &what, &k, &v);
    if (status != ATTN_OK) {
        return status;
    }
    reply->data.data = wire_alloc(u->block, k + v + 1, 1);
    reply->data.len  = k + v;
    status = reply->data.data != NULL ? engine_chunk_export(worker->engine, &what, reply->data.data,
                                                            reply->data.data + k, k, v)
                                      : ATTN_ERR_NO_MEMORY;
    if (status == ATTN_OK) {
        reply->checksum = engine_checksum(&what, reply->data.data, k + v);
    }
    return status;
}

/* ---- moving chunks ---- */

#define COPY_TIMEOUT_MS 60000u

static bool
is_given_up(const void *call)
{
    return rpc_call_cancelled(call);
}

static attn_status_t
serve_copy_chunk(const unary_call_t *u)
{
    const Attn__V1__CopyChunkRequest *r = u->request;
    worker_t *worker                    = u->service;
    Attn__V1__CopyChunkReply *reply     = u->reply;
    engine_copy_t copy                  = {.cache      = r->cache_id,
                                           .chunk      = r->chunk,
                                           .generation = r->generation,
                                           .copy       = r->copy,
                                           .first      = r->first,
                                           .length     = r->length};
    uint32_t timeout                    = r->timeout_ms != 0 ? r->timeout_ms : COPY_TIMEOUT_MS;

    if (timeout > ENGINE_TIMEOUT_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "timeout_ms is %u: at most %u", timeout,
                         ENGINE_TIMEOUT_MS_MAX);
    }
    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    if (status == ATTN_OK) {
        status = copier_copy(
            worker->copier, atomic_load(&worker->id), r->source, &copy,
            &(copier_asker_t){.deadline_ns = attn_min(attn_now_ns() + timeout * ATTN_NS_PER_MS,
                                                      rpc_call_deadline_ns(u->call)),
                              .gone        = is_given_up,
                              .arg         = u->call},
            &reply->bytes);
    }
    return status;
}

static attn_status_t
serve_leave_chunk(const unary_call_t *u)
{
    static const kv_leave_t words[] = {
        [ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__HOLD] = KV_LEAVE_HOLD,
        [ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__GO]   = KV_LEAVE_GO,
        [ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__STAY] = KV_LEAVE_STAY,
    };
    const Attn__V1__LeaveChunkRequest *r = u->request;
    worker_t *worker                     = u->service;
    Attn__V1__WorkerChunk *reply         = u->reply;
    kv_chunk_info_t info                 = {0};

    if ((uint32_t)r->what >= sizeof(words) / sizeof(words[0]) || r->move == 0) {
        return attn_fail(ATTN_ERR_INVALID, "what is %d: 0 to 2; move is %llu: not 0", (int)r->what,
                         (unsigned long long)r->move);
    }
    if (r->hold_ms > ENGINE_HOLD_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "hold_ms is %u: at most %u", r->hold_ms,
                         ENGINE_HOLD_MS_MAX);
    }
    kv_leaving_t leaving = {.what       = words[r->what],
                            .chunk      = r->chunk,
                            .move       = r->move,
                            .generation = r->generation,
                            .length     = r->length,
                            .until_ns   = attn_now_ns() + r->hold_ms * ATTN_NS_PER_MS};
    attn_status_t status = engine_check_epoch(worker->engine, r->epoch);
    if (status == ATTN_OK) {
        status = engine_chunk_leave(worker->engine, r->cache_id, &leaving, &info);
    }
    reply->chunk      = r->chunk;
    reply->generation = info.generation;
    reply->length     = info.length;
    reply->in_step    = info.in_step;
    return status;
}

/* ---- status ---- */

void
worker_describe(worker_t *worker, Attn__V1__WorkerInfo *info, char ways[WORKER_WAYS_ROOM])
{
    ucx_figures_t near, far;
    lender_gpu_figures_t gpu;
    engine_info_t engine;

    engine_describe(worker->engine, &engine);
    lender_describe(worker->lender, &near, &far);
    lender_describe_gpu(worker->lender, &gpu);
    attn__v1__worker_info__init(info);
    info->id           = atomic_load(&worker->id);
    info->incarnation  = atomic_load(&worker->incarnation);
    info->alive        = true;
    info->address      = worker->address;
    info->kind         = (char *)engine.kind;
    info->slab_bytes   = engine.slab_bytes;
    info->region_bytes = engine.region_bytes;
    info->used_bytes   = engine.used_bytes;
    info->chunks       = engine.chunks;
    info->open_steps   = engine.open_steps;
    info->runs         = engine.runs;
    info->kv_bytes     = engine.kv_bytes;

    info->device            = worker->device;
    info->device_bytes      = engine.device.total_bytes;
    info->device_free_bytes = engine.device.free_bytes;
    info->kv_bytes_per_s    = engine.kv_rate;
    info->read_bandwidth    = engine.speed.read_bandwidth;

    info->ucx         = lender_lends(worker->lender);
    info->ucx_clients = near.sessions + far.sessions;
    info->ucx_runs    = near.requests + far.requests;
    info->gpu_clients = gpu.slabs;
    info->gpu_runs    = gpu.runs;
    snprintf(ways, WORKER_WAYS_ROOM, "%s%s%s", near.way,
             near.way[0] != '\0' && far.way[0] != '\0' ? " " : "", far.way);
    info->ucx_ways = ways;

    info->groups         = engine.groups;
    info->group_host     = worker->place.host;
    info->group_device   = worker->place.device;
    info->attend_seconds = engine.speed.attend_seconds;
    info->few_flops      = &worker->speed.few_flops[ATTN_F32]; /* as the engine's, and stays */
    info->many_flops     = &worker->speed.many_flops[ATTN_F32];
    info->n_few_flops = info->n_many_flops = COST_DTYPES - ATTN_F32;
}

static attn_status_t
serve_status(const unary_call_t *u)
{
    Attn__V1__WorkerInfo *reply = u->reply;

    char *ways = wire_alloc(u->block, WORKER_WAYS_ROOM, 1);
    if (ways == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    worker_describe(u->service, reply, ways);
    return ATTN_OK;
}

#define PING_ANSWER_MAX (1u << 20)

static attn_status_t
serve_ping(const unary_call_t *u)
{
    const Attn__V1__PingRequest *r = u->request;
    Attn__V1__PingReply *reply     = u->reply;

    if (r->answer_bytes > PING_ANSWER_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "answer_bytes is %u: at most %u", r->answer_bytes,
                         PING_ANSWER_MAX);
    }
    reply->data.data = wire_alloc(u->block, r->answer_bytes + (uint64_t)1, 1);
    reply->data.len  = r->answer_bytes;
    return reply->data.data != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
}

/* ---- the service ---- */

static const unary_method_t methods[] = {
    {.path    = "/attn.v1.Worker/OpenCache",
     .serve   = serve_open_cache,
     .reply   = &attn__v1__worker_open_cache_reply__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__worker_open_cache_request__descriptor},
    {.path    = "/attn.v1.Worker/CloseCache",
     .serve   = serve_close_cache,
     .reply   = &attn__v1__empty__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__worker_close_cache_request__descriptor},
    {.path    = "/attn.v1.Worker/ForkChunk",
     .serve   = serve_fork_chunk,
     .reply   = &attn__v1__worker_chunk__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__fork_chunk_request__descriptor},
    {.path    = "/attn.v1.Worker/TruncateChunk",
     .serve   = serve_truncate_chunk,
     .reply   = &attn__v1__worker_chunk__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__truncate_chunk_request__descriptor},
    {.path    = "/attn.v1.Worker/ReleaseChunks",
     .serve   = serve_release_chunks,
     .reply   = &attn__v1__empty__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__release_chunks_request__descriptor},
    {.path    = "/attn.v1.Worker/DescribeChunks",
     .serve   = serve_describe_chunks,
     .reply   = &attn__v1__describe_chunks_reply__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__describe_chunks_request__descriptor},
    {.path    = "/attn.v1.Worker/ExportChunk",
     .serve   = serve_export_chunk,
     .reply   = &attn__v1__export_chunk_reply__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__export_chunk_request__descriptor},
    {.path    = "/attn.v1.Worker/CopyChunk",
     .serve   = serve_copy_chunk,
     .reply   = &attn__v1__copy_chunk_reply__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__copy_chunk_request__descriptor,
     .blocks  = true},
    {.path    = "/attn.v1.Worker/LeaveChunk",
     .serve   = serve_leave_chunk,
     .reply   = &attn__v1__worker_chunk__descriptor,
     .admit   = admit_coordinator,
     .request = &attn__v1__leave_chunk_request__descriptor},
    {.path    = "/attn.v1.Worker/Status",
     .serve   = serve_status,
     .reply   = &attn__v1__worker_info__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__empty__descriptor},
    {.path    = "/attn.v1.Worker/Ping",
     .serve   = serve_ping,
     .reply   = &attn__v1__ping_reply__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__ping_request__descriptor},
};

attn_status_t
worker_serve(worker_t *worker)
{
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        assert(methods[i].admit != NULL); /* whoever adds a method says who may call it */
    }
    attn_status_t status = unary_add(worker->server, worker->jobs, methods,
                                     sizeof(methods) / sizeof(methods[0]), worker, &worker->unary);

    if (status == ATTN_OK) {
        status = worker_serve_groups(worker);
    }
    if (status == ATTN_OK) {
        steps_limits_t limits = {.part_ms      = 3 * (uint32_t)worker->options.stall_ms,
                                 .buffer_bytes = worker->options.run_memory};
        status = steps_create(worker->server, "/attn.v1.Worker", &step_ops, worker, NULL, &limits,
                              &worker->steps);
    }
    if (status == ATTN_OK) {
        status = lender_create(
            worker->server, worker->steps,
            &(lender_options_t){.memory     = worker->options.ucx_memory,
                                .slab_bytes = worker->options.ucx_slab,
                                .spin_us    = (uint32_t)worker->options.spin_us,
                                .waiting    = worker->options.groups ? ATTN_GROUPS_MAX : 0,
                                .network    = worker->options.ucx_net,
                                .gpu        = engine_gpu(worker->engine),
                                .gpu_memory = worker->options.gpu_lend},
            &worker->lender);
    }
    if (status == ATTN_OK) {
        status = copier_create(worker->server,
                               &(copier_options_t){.engine  = worker->engine,
                                                   .gate    = &worker->gate,
                                                   .tls     = worker->certs.tls,
                                                   .jobs    = worker->jobs,
                                                   .lender  = worker->lender,
                                                   .ucx     = worker->options.ucx_memory > 0,
                                                   .network = worker->options.ucx_net},
                               &worker->copier);
    }
    return status;
}
