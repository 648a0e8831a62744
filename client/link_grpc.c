/*
 * link_grpc.c: the row over gRPC. Control calls are unary, on a connection of their own, so
 * that small ones do not wait behind tensors; a step lives on a pipe (pipe.h).
 */
#include "client/link_grpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/rpc_call.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A worker has all of a run in memory before it computes, and runs of all peers in 4 GiB. */
#define RUN_BYTES_MAX (UINT64_C(1) << 30)

/* ---- steps ---- */

static void
begin_done(void *arg, attn_status_t status, const char *sentence)
{
    link_step_t *step = arg;

    step->ended = status != ATTN_OK; /* refused: nothing is open there */
    step->begin_done(step->begin_arg, status, sentence);
}

attn_status_t
link_grpc_begin_with(link_t *link, const engine_batch_t *batch, Attn__V1__Slot *slot,
                     link_done_fn done, void *arg, link_step_t *step)
{
    wire_block_t block            = {0};
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;

    attn_status_t status =
        wire_worker_begin_encode(&block, batch, attn_now_ns(), &request.worker_begin);
    if (status == ATTN_OK) {
        status = pipe_take(&grpc_of(link)->pipes, &step->pipe);
    }
    if (status != ATTN_OK) {
        wire_free(&block);
        return status;
    }
    step->ops                  = link->ops;
    step->link                 = grpc_of(link);
    step->id                   = batch->step_id;
    step->begin_done           = done;
    step->begin_arg            = arg;
    request.worker_begin->slot = slot;
    request.op_case            = ATTN__V1__STEP_REQUEST__OP_WORKER_BEGIN;
    pipe_call(step->pipe, PIPE_BEGIN, &request, begin_done, step);
    wire_free(&block);
    return ATTN_OK;
}

static attn_status_t
grpc_link_begin(link_t *link, const engine_batch_t *batch, const link_room_t *room,
                link_done_fn done, void *arg, link_step_t **step_p)
{
    link_step_t *step = calloc(1, sizeof(*step));

    (void)room;
    if (step == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    *step_p              = step; /* before done: it may look at it */
    attn_status_t status = link_grpc_begin_with(link, batch, NULL, done, arg, step);
    if (status != ATTN_OK) {
        *step_p = NULL;
        free(step);
    }
    return status;
}

void
link_grpc_run(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg)
{
    Attn__V1__EntryLists **lists = NULL;

    atomic_fetch_add_explicit(&step->link->runs, 1, memory_order_relaxed);
    wire_free(&step->lists); /* of the run before */
    if (run->n_lists > 0) {
        attn_status_t status = wire_lists_encode(&step->lists, run->lists, run->n_lists, &lists);
        if (status != ATTN_OK) {
            done(arg, status, "no memory for the lists of a run");
            return;
        }
    }
    pipe_run(step->pipe, step->id, run, lists, done, arg);
}

static void
grpc_link_commit(link_step_t *step, const engine_commit_t *what, link_done_fn done, void *arg)
{
    Attn__V1__StepRequest request  = ATTN__V1__STEP_REQUEST__INIT;
    Attn__V1__CommitRequest commit = ATTN__V1__COMMIT_REQUEST__INIT;

    commit.step_id    = step->id;
    commit.accepted   = (uint32_t *)what->accepted;
    commit.n_accepted = what->accepted != NULL ? what->n : 0;
    commit.path       = (uint32_t *)what->path;
    commit.n_path     = what->n_path;
    request.op_case   = ATTN__V1__STEP_REQUEST__OP_COMMIT;
    request.commit    = &commit;
    step->ended       = true; /* whatever comes: a refused one is aborted next */
    pipe_call(step->pipe, PIPE_COMMIT, &request, done, arg);
}

static void
grpc_link_abort(link_step_t *step, link_done_fn done, void *arg)
{
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;
    Attn__V1__AbortRequest abort_ = ATTN__V1__ABORT_REQUEST__INIT;

    abort_.step_id  = step->id;
    request.op_case = ATTN__V1__STEP_REQUEST__OP_ABORT;
    request.abort   = &abort_;
    step->ended     = true;
    pipe_call(step->pipe, PIPE_ABORT, &request, done, arg);
}

static void
grpc_link_cancel(link_step_t *step)
{
    pipe_cancel(step->pipe);
}

static void
grpc_link_step_free(link_step_t *step)
{
    if (step != NULL) {
        pipe_give(step->pipe, step->ended);
        wire_free(&step->lists);
        free(step);
    }
}

/* ---- control ---- */

static rpc_channel_t *
channel_of(link_t *link)
{
    return grpc_of(link)->control;
}

static attn_status_t
grpc_link_ping(link_t *link, uint32_t bytes, uint64_t deadline_ns)
{
    Attn__V1__PingRequest request = ATTN__V1__PING_REQUEST__INIT;
    Attn__V1__PingReply *reply;
    rpc_message_t *message;

    request.answer_bytes = bytes;
    request.data         = (ProtobufCBinaryData){.len = bytes, .data = calloc(bytes + 1, 1)};
    if (request.data.data == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a ping of %u bytes", bytes);
    }
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/Ping", &request, deadline_ns,
                       &attn__v1__ping_reply__descriptor, &reply, &message);
    free(request.data.data);
    if (status != ATTN_OK) {
        return status;
    }
    if (rpc_message_data_size(message) != bytes) {
        status = attn_fail(ATTN_ERR_INTERNAL, "worker %s answered a ping with %llu bytes, not %u",
                           grpc_of(link)->pipes.address,
                           (unsigned long long)rpc_message_data_size(message), bytes);
    }
    rpc_message_free(message);
    return status;
}

static attn_status_t
grpc_link_cache_open(link_t *link, uint64_t epoch, uint64_t cache, const char *name,
                     const attn_geometry_t *geometry, uint64_t deadline_ns, kv_region_info_t *info)
{
    wire_block_t block                       = {0};
    Attn__V1__WorkerOpenCacheRequest request = ATTN__V1__WORKER_OPEN_CACHE_REQUEST__INIT;
    Attn__V1__WorkerOpenCacheReply *reply;
    rpc_message_t *message;

    request.epoch        = epoch;
    request.cache_id     = cache;
    request.name         = (char *)name;
    attn_status_t status = wire_geometry_encode(&block, geometry, &request.geometry);
    if (status == ATTN_OK) {
        status =
            rpc_call_typed(channel_of(link), "/attn.v1.Worker/OpenCache", &request, deadline_ns,
                           &attn__v1__worker_open_cache_reply__descriptor, &reply, &message);
    }
    if (status == ATTN_OK) {
        *info = (kv_region_info_t){.n_pages = reply->n_pages, .bytes = reply->region_bytes};
        rpc_message_free(message);
    }
    wire_free(&block);
    return status;
}

static attn_status_t
grpc_link_cache_close(link_t *link, uint64_t epoch, uint64_t cache, uint64_t deadline_ns)
{
    Attn__V1__WorkerCloseCacheRequest request = ATTN__V1__WORKER_CLOSE_CACHE_REQUEST__INIT;

    request.epoch    = epoch;
    request.cache_id = cache;
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/CloseCache", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static attn_status_t
grpc_link_chunk_fork(link_t *link, uint64_t epoch, uint64_t cache, uint64_t from, uint32_t length,
                     uint64_t to, uint64_t deadline_ns)
{
    Attn__V1__ForkChunkRequest request = ATTN__V1__FORK_CHUNK_REQUEST__INIT;

    request.epoch    = epoch;
    request.cache_id = cache;
    request.from     = from;
    request.length   = length;
    request.to       = to;
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/ForkChunk", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static attn_status_t
grpc_link_chunk_truncate(link_t *link, uint64_t epoch, uint64_t cache, uint64_t chunk,
                         uint32_t generation, uint32_t length, uint32_t *generation_p,
                         uint64_t deadline_ns)
{
    Attn__V1__TruncateChunkRequest request = ATTN__V1__TRUNCATE_CHUNK_REQUEST__INIT;
    Attn__V1__WorkerChunk *reply;
    rpc_message_t *message;

    request.epoch      = epoch;
    request.cache_id   = cache;
    request.chunk      = chunk;
    request.generation = generation;
    request.length     = length;
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/TruncateChunk", &request, deadline_ns,
                       &attn__v1__worker_chunk__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        *generation_p = reply->generation;
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
grpc_link_chunks_release(link_t *link, uint64_t epoch, uint64_t cache, const uint64_t *chunks,
                         uint32_t n, uint64_t deadline_ns)
{
    Attn__V1__ReleaseChunksRequest request = ATTN__V1__RELEASE_CHUNKS_REQUEST__INIT;

    request.epoch    = epoch;
    request.cache_id = cache;
    request.chunks   = (uint64_t *)chunks;
    request.n_chunks = n;
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/ReleaseChunks", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static attn_status_t
grpc_link_chunks_describe(link_t *link, uint64_t cache, const uint64_t *chunks, uint32_t n,
                          kv_chunk_info_t *infos, const uint64_t *seqs, uint32_t n_seqs,
                          bool *in_step, uint64_t deadline_ns)
{
    Attn__V1__DescribeChunksRequest request = ATTN__V1__DESCRIBE_CHUNKS_REQUEST__INIT;
    Attn__V1__DescribeChunksReply *reply;
    rpc_message_t *message;

    request.cache_id = cache;
    request.chunks   = (uint64_t *)chunks;
    request.n_chunks = n;
    request.seqs     = (uint64_t *)seqs;
    request.n_seqs   = n_seqs;
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/DescribeChunks", &request, deadline_ns,
                       &attn__v1__describe_chunks_reply__descriptor, &reply, &message);
    if (status != ATTN_OK) {
        return status;
    }
    if (reply->n_chunks != n || reply->n_seq_in_step != n_seqs) {
        status = attn_fail(ATTN_ERR_INTERNAL, "worker %s described %zu chunks of %u",
                           grpc_of(link)->pipes.address, reply->n_chunks, n);
    }
    for (uint32_t i = 0; status == ATTN_OK && i < n; i++) {
        infos[i] = (kv_chunk_info_t){.generation = reply->chunks[i]->generation,
                                     .length     = reply->chunks[i]->length,
                                     .in_step    = reply->chunks[i]->in_step};
    }
    for (uint32_t i = 0; status == ATTN_OK && i < n_seqs; i++) {
        in_step[i] = reply->seq_in_step[i];
    }
    rpc_message_free(message);
    return status;
}

static attn_status_t
grpc_link_chunk_export(link_t *link, const engine_export_t *what, void *k, void *v,
                       uint64_t k_bytes, uint64_t v_bytes, uint64_t deadline_ns)
{
    Attn__V1__ExportChunkRequest request = ATTN__V1__EXPORT_CHUNK_REQUEST__INIT;
    Attn__V1__ExportChunkReply *reply;
    rpc_message_t *message;

    request.cache_id   = what->cache;
    request.chunk      = what->chunk;
    request.generation = what->generation;
    request.layer      = what->layer;
    request.first      = what->first;
    request.n          = what->n;
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/ExportChunk", &request, deadline_ns,
                       &attn__v1__export_chunk_reply__descriptor, &reply, &message);
    if (status != ATTN_OK) {
        return status;
    }
    if (rpc_message_data_size(message) != k_bytes + v_bytes) {
        status = attn_fail(ATTN_ERR_INTERNAL, "worker %s sent %llu bytes of k and v, not %llu",
                           grpc_of(link)->pipes.address,
                           (unsigned long long)rpc_message_data_size(message),
                           (unsigned long long)(k_bytes + v_bytes));
    } else {
        rpc_message_data_copy(message, 0, k, k_bytes);
        rpc_message_data_copy(message, k_bytes, v, v_bytes);
    }
    rpc_message_free(message);
    return status;
}

static attn_status_t
grpc_link_chunk_copy(link_t *link, link_t *source, uint64_t epoch, const engine_copy_t *copy,
                     uint64_t deadline_ns)
{
    Attn__V1__CopyChunkRequest request = ATTN__V1__COPY_CHUNK_REQUEST__INIT;
    uint64_t now                       = attn_now_ns();

    if (source->ops != link->ops) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "a chunk goes between workers of one network");
    }
    request.epoch      = epoch;
    request.cache_id   = copy->cache;
    request.chunk      = copy->chunk;
    request.generation = copy->generation;
    request.source     = (char *)grpc_of(source)->pipes.address;
    request.copy       = copy->copy;
    request.first      = copy->first;
    request.length     = copy->length;
    request.timeout_ms = (uint32_t)attn_min(
        attn_max(deadline_ns > now ? (deadline_ns - now) / ATTN_NS_PER_MS : 0, 1),
        ENGINE_TIMEOUT_MS_MAX);
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/CopyChunk", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static attn_status_t
grpc_link_chunk_leave(link_t *link, uint64_t epoch, uint64_t cache, const kv_leaving_t *leaving,
                      uint64_t deadline_ns, kv_chunk_info_t *info)
{
    Attn__V1__LeaveChunkRequest request = ATTN__V1__LEAVE_CHUNK_REQUEST__INIT;
    Attn__V1__WorkerChunk *reply;
    rpc_message_t *message;

    request.epoch      = epoch;
    request.cache_id   = cache;
    request.chunk      = leaving->chunk;
    request.what       = leaving->what == KV_LEAVE_HOLD ? ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__HOLD
                         : leaving->what == KV_LEAVE_GO ? ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__GO
                                                        : ATTN__V1__LEAVE_CHUNK_REQUEST__WHAT__STAY;
    request.move       = leaving->move;
    request.generation = leaving->generation;
    request.length     = leaving->length;
    request.hold_ms    = leaving->what == KV_LEAVE_HOLD
                             ? (uint32_t)attn_min(attn_max(leaving->until_ns / ATTN_NS_PER_MS, 1),
                                                  ENGINE_HOLD_MS_MAX)
                             : 0;
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/LeaveChunk", &request, deadline_ns,
                       &attn__v1__worker_chunk__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        if (info != NULL) {
            *info = (kv_chunk_info_t){.generation = reply->generation,
                                      .length     = reply->length,
                                      .in_step    = reply->in_step};
        }
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
inbox_decode(const grpc_link_t *link, const engine_group_options_t *options,
             const Attn__V1__Inbox *from, link_inbox_t *inbox)
{
    if (from == NULL || from->handle.len != sizeof(inbox->handle) ||
        from->mac.len != sizeof(inbox->mac) || strlen(from->host) >= sizeof(inbox->host) ||
        strlen(from->device) >= sizeof(inbox->device)) {
        return attn_fail(ATTN_ERR_INTERNAL, "worker %s offered what is no inbox",
                         link->pipes.address);
    }
    *inbox = (link_inbox_t){.of = *options};
    strcpy(inbox->host, from->host);
    strcpy(inbox->device, from->device);
    memcpy(inbox->handle, from->handle.data, sizeof(inbox->handle));
    memcpy(inbox->mac, from->mac.data, sizeof(inbox->mac));
    return ATTN_OK;
}

static attn_status_t
grpc_link_group_open(link_t *link, const engine_group_options_t *options, uint64_t deadline_ns,
                     link_inbox_t *inbox)
{
    Attn__V1__OpenGroupRequest request = ATTN__V1__OPEN_GROUP_REQUEST__INIT;
    Attn__V1__OpenGroupReply *reply;
    rpc_message_t *message;

    request.group      = options->id;
    request.ranks      = options->ranks;
    request.rank       = options->me;
    request.head_dim_v = options->head_dim_v;
    request.half_bytes = options->half_bytes;
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/OpenGroup", &request, deadline_ns,
                       &attn__v1__open_group_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        status = inbox_decode(grpc_of(link), options, reply->inbox, inbox);
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
grpc_link_group_connect(link_t *link, const link_inbox_t *inboxes, uint32_t ranks,
                        uint64_t deadline_ns)
{
    Attn__V1__ConnectGroupRequest request = ATTN__V1__CONNECT_GROUP_REQUEST__INIT;
    Attn__V1__Inbox of[ATTN_RANKS_MAX], *all[ATTN_RANKS_MAX];

    for (uint32_t r = 0; r < ranks; r++) {
        const link_inbox_t *from = &inboxes[r];
        attn__v1__inbox__init(&of[r]);
        of[r].group      = from->of.id;
        of[r].ranks      = from->of.ranks;
        of[r].rank       = from->of.me;
        of[r].half_bytes = from->of.half_bytes;
        of[r].host       = (char *)from->host;
        of[r].device     = (char *)from->device;
        of[r].handle =
            (ProtobufCBinaryData){.data = (uint8_t *)from->handle, .len = sizeof(from->handle)};
        of[r].mac = (ProtobufCBinaryData){.data = (uint8_t *)from->mac, .len = sizeof(from->mac)};
        all[r]    = &of[r];
    }
    request.group     = inboxes[0].of.id;
    request.n_inboxes = ranks;
    request.inboxes   = all;
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/ConnectGroup", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static attn_status_t
grpc_link_group_prove(link_t *link, uint64_t group, uint64_t deadline_ns, link_proof_t *proof)
{
    Attn__V1__ProveGroupRequest request = ATTN__V1__PROVE_GROUP_REQUEST__INIT;
    Attn__V1__ProveGroupReply *reply;
    uint64_t now = attn_now_ns();
    rpc_message_t *message;

    request.group      = group;
    request.timeout_ms = (uint32_t)attn_min(
        attn_max(deadline_ns > now ? (deadline_ns - now) / ATTN_NS_PER_MS : 0, 1), 10000);
    attn_status_t status =
        rpc_call_typed(channel_of(link), "/attn.v1.Worker/ProveGroup", &request, deadline_ns,
                       &attn__v1__prove_group_reply__descriptor, &reply, &message);
    if (status == ATTN_OK) {
        *proof = (link_proof_t){.few_seconds  = reply->few_seconds,
                                .many_seconds = reply->many_seconds,
                                .many         = reply->many};
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
grpc_link_group_close(link_t *link, uint64_t group, uint64_t deadline_ns)
{
    Attn__V1__CloseGroupRequest request = ATTN__V1__CLOSE_GROUP_REQUEST__INIT;

    request.group = group;
    return rpc_call_typed(channel_of(link), "/attn.v1.Worker/CloseGroup", &request, deadline_ns,
                          NULL, NULL, NULL);
}

static void
grpc_link_describe(link_t *link, attn_link_info_t *info)
{
    snprintf(info->address, sizeof(info->address), "%.63s", grpc_of(link)->pipes.address);
    snprintf(info->transport, sizeof(info->transport), "grpc");
    info->runs_grpc = atomic_load(&grpc_of(link)->runs);
    cost_link_t way;
    way_meter_read(&link->meter, &way);
    info->hop_seconds    = way.hop_seconds;
    info->send_seconds   = way.send_seconds;
    info->link_bandwidth = way.bandwidth;
}

void
link_grpc_fini(grpc_link_t *link)
{
    pipes_fini(&link->pipes);
    rpc_channel_close(link->control);
}

static void
grpc_link_close(link_t *link)
{
    link_grpc_fini(grpc_of(link));
    free(link);
}

const link_ops_t link_grpc_ops = {
    .name            = "grpc",
    .run_bytes_max   = RUN_BYTES_MAX,
    .close           = grpc_link_close,
    .ping            = grpc_link_ping,
    .cache_open      = grpc_link_cache_open,
    .cache_close     = grpc_link_cache_close,
    .chunk_fork      = grpc_link_chunk_fork,
    .chunk_truncate  = grpc_link_chunk_truncate,
    .chunks_release  = grpc_link_chunks_release,
    .chunks_describe = grpc_link_chunks_describe,
    .chunk_export    = grpc_link_chunk_export,
    .chunk_copy      = grpc_link_chunk_copy,
    .chunk_leave     = grpc_link_chunk_leave,
    .begin           = grpc_link_begin,
    .run             = link_grpc_run,
    .commit          = grpc_link_commit,
    .abort           = grpc_link_abort,
    .cancel          = grpc_link_cancel,
    .step_free       = grpc_link_step_free,
    .group_open      = grpc_link_group_open,
    .group_connect   = grpc_link_group_connect,
    .group_prove     = grpc_link_group_prove,
    .group_close     = grpc_link_group_close,
    .describe        = grpc_link_describe,
};

attn_status_t
link_grpc_init(grpc_link_t *link, rpc_client_t *rpc, const char *address)
{
    attn_status_t status = rpc_channel_open(rpc, address, &link->control);

    if (status == ATTN_OK && (status = pipes_init(&link->pipes, rpc, address)) != ATTN_OK) {
        rpc_channel_close(link->control);
    }
    return status;
}

attn_status_t
link_grpc_open(rpc_client_t *rpc, const char *address, link_t **link_p)
{
    grpc_link_t *link = calloc(1, sizeof(*link));

    if (link == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    link->link.ops       = &link_grpc_ops;
    attn_status_t status = link_grpc_init(link, rpc, address);
    if (status != ATTN_OK) {
        free(link);
        return status;
    }
    *link_p = &link->link;
    return ATTN_OK;
}
