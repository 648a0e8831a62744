#include "daemon/steps_int.h"

#include "base/status.h"
#include "daemon/meter.h"
#include "daemon/ticket.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATH_ROOM 64
#define HEAD_ROOM 256 /* bytes of a reply beside its data, at most */

/* ---- runs, of either kind of call ---- */

attn_status_t
steps_admit(steps_t *steps, const char *ticket)
{
    return steps->ops->admit == NULL ? ATTN_OK : steps->ops->admit(steps->service, ticket);
}

attn_status_t
steps_begin(steps_t *steps, const ProtobufCMessage *request, steps_begun_t *begun)
{
    if (atomic_load(&steps->draining)) {
        return attn_fail(ATTN_ERR_CANCELLED,
                         "draining: this daemon is going down; begin the step elsewhere");
    }
    uint64_t start       = attn_now_ns();
    attn_status_t status = steps->ops->begin(steps->service, request, begun);
    if (status == ATTN_OK) {
        meter_took(&meter.begin, start);
    }
    return status;
}

attn_status_t
steps_run_open(steps_t *steps, const Attn__V1__RunRequest *head, uint64_t total, steps_run_t *run)
{
    attn_status_t status;

    memset(run, 0, sizeof(*run));
    if (head->no_q && head->no_kv) {
        return attn_fail(ATTN_ERR_INVALID, "no_q and no_kv are both set: such a run has no data");
    }
    if ((status = steps->ops->sizes(steps->service, head->step_id, &run->sizes)) != ATTN_OK) {
        return status;
    }
    run->start_ns = attn_now_ns();
    run->step_id  = head->step_id;
    run->layer    = head->layer;
    run->no_kv    = head->no_kv;
    run->no_q     = head->no_q;
    run->total    = total;
    uint64_t q    = run->no_q ? 0 : run->sizes.q;
    uint64_t kv   = run->no_kv ? 0 : run->sizes.k + run->sizes.v;
    if (total != q + kv) {
        return attn_fail(ATTN_ERR_INVALID,
                         "data has %llu bytes in total: this run of step %016llx takes %llu (q "
                         "%llu, k and v %llu)",
                         (unsigned long long)total, (unsigned long long)head->step_id,
                         (unsigned long long)(q + kv), (unsigned long long)q,
                         (unsigned long long)kv);
    }
    meter_add(&meter.bytes_in, total);
    run->n_lists = (uint32_t)head->n_lists;
    status       = wire_lists_decode(&run->block, head->lists, head->n_lists, &run->lists);
    if (status == ATTN_OK) {
        status = tensor_take(steps->tensors, total, &run->data);
    }
    if (status != ATTN_OK) {
        steps_run_close(run);
    }
    return status;
}

attn_status_t
steps_run_do(steps_t *steps, steps_run_t *run, tensor_t **answer_p)
{
    const steps_sizes_t *s = &run->sizes;
    bool q                 = !run->no_q && s->q > 0;
    bool kv                = !run->no_kv && s->k > 0;
    const uint8_t *k       = run->data->data + (q ? s->q : 0);
    tensor_t *answer       = NULL;
    attn_status_t status   = ATTN_OK;

    if (q && s->answer > 0) {
        status = tensor_take(steps->tensors, s->answer, &answer);
    }
    if (status == ATTN_OK) {
        status = steps->ops->run(steps->service, &(steps_layer_t){
                                                     .step_id = run->step_id,
                                                     .layer   = run->layer,
                                                     .q       = q ? run->data->data : NULL,
                                                     .k       = kv ? k : NULL,
                                                     .v       = kv ? k + s->k : NULL,
                                                     .answer = answer != NULL ? answer->data : NULL,
                                                     .lists  = run->lists,
                                                     .n_lists    = run->n_lists,
                                                     .sizes      = s,
                                                     .compute_ns = &run->compute_ns,
                                                 });
    }
    if (status != ATTN_OK) {
        tensor_unref(answer);
        return status;
    }
    meter_took(&meter.run, run->start_ns);
    meter_add(&meter.bytes_out, answer != NULL ? answer->size : 0);
    *answer_p = answer;
    return ATTN_OK;
}

attn_status_t
steps_commit(steps_t *steps, const Attn__V1__CommitRequest *request)
{
    engine_commit_t commit = {.accepted = request->n_accepted > 0 ? request->accepted : NULL,
                              .n        = (uint32_t)request->n_accepted,
                              .path     = request->path,
                              .n_path   = request->n_path};

    uint64_t start       = attn_now_ns();
    attn_status_t status = steps->ops->commit(steps->service, request->step_id, &commit);
    if (status == ATTN_OK) {
        meter_took(&meter.commit, start);
    }
    return status;
}

void
steps_run_close(steps_run_t *run)
{
    tensor_unref(run->data);
    wire_free(&run->block);
    run->data    = NULL;
    run->lists   = NULL;
    run->n_lists = 0;
}

/* ---- unary calls ---- */

static attn_status_t
admit_unary(void *service, const rpc_call_t *call)
{
    return steps_admit(service, rpc_call_metadata(call, TICKET_HEADER));
}

static attn_status_t
serve_begin(const unary_call_t *u)
{
    const ProtobufCMessage *reply                = u->reply;
    const steps_t *steps                         = u->service;
    const Attn__V1__WorkerBeginRequest *grouping = u->request;
    steps_begun_t begun;

    if (steps->ops->worker && grouping->group != 0) { /* nobody would hear of the client's end */
        return attn_fail(ATTN_ERR_INVALID, "a step with a group is begun on a stream");
    }
    attn_status_t status = steps_begin(u->service, u->request, &begun);
    if (status == ATTN_OK) {
        memcpy(u->reply, &begun.reply, reply->descriptor->sizeof_message);
    }
    return status;
}

static attn_status_t
serve_commit(const unary_call_t *u)
{
    return steps_commit(u->service, u->request);
}

static attn_status_t
serve_abort(const unary_call_t *u)
{
    const Attn__V1__AbortRequest *r = u->request;
    const steps_t *steps            = u->service;

    return steps->ops->abort(steps->service, r->step_id, ENGINE_BY_CLIENT);
}

static attn_status_t
unary_run(steps_t *steps, const Attn__V1__RunRequest *head, rpc_message_t *message,
          Attn__V1__RunReply *reply, tensor_t **answer_p)
{
    uint64_t size = rpc_message_data_size(message);
    steps_run_t run;

    if (head->offset != 0 || (head->total != 0 && head->total != size)) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "offset is %llu and total %llu: a unary run carries its %llu bytes of data whole; "
            "send parts on a stream",
            (unsigned long long)head->offset, (unsigned long long)head->total,
            (unsigned long long)size);
    }
    attn_status_t status = steps_run_open(steps, head, size, &run);
    if (status != ATTN_OK) {
        return status;
    }
    if (run.sizes.grouped) {
        status = attn_fail(ATTN_ERR_INVALID, "step %016llx has a group: it runs on its stream",
                           (unsigned long long)head->step_id);
    } else if (!run.no_q && run.sizes.answer > RPC_MESSAGE_MAX - HEAD_ROOM) {
        status =
            attn_fail(ATTN_ERR_TOO_LARGE,
                      "the answer has %llu bytes, more than a message of %u: run it on a stream",
                      (unsigned long long)run.sizes.answer, RPC_MESSAGE_MAX);
    } else {
        rpc_message_data_copy(message, 0, run.data->data, size);
        status = steps_run_do(steps, &run, answer_p);
    }
    reply->step_id    = head->step_id;
    reply->layer      = head->layer;
    reply->compute_ns = run.compute_ns;
    steps_run_close(&run);
    return status;
}

/* @return ATTN_OK: replied */
static attn_status_t
serve_admitted_run(steps_t *steps, rpc_call_t *call, rpc_message_t *message)
{
    ProtobufCMessage *request;
    tensor_t *answer         = NULL;
    Attn__V1__RunReply reply = ATTN__V1__RUN_REPLY__INIT;
    attn_status_t status =
        rpc_message_unpack(message, &attn__v1__run_request__descriptor, &request);
    const Attn__V1__RunRequest *head = (const Attn__V1__RunRequest *)request;

    if (status != ATTN_OK ||
        (status = unary_run(steps, head, message, &reply, &answer)) != ATTN_OK) {
        return status;
    }
    struct iovec data = {.iov_base = answer != NULL ? answer->data : NULL,
                         .iov_len  = answer != NULL ? answer->size : 0};
    reply.total       = data.iov_len;
    rpc_call_reply(call, &(rpc_outgoing_t){.head   = &reply.base,
                                           .data   = &data,
                                           .n_data = answer != NULL,
                                           .sent   = answer != NULL ? tensor_unref : NULL,
                                           .arg    = answer});
    return ATTN_OK;
}

static void
serve_run(steps_t *steps, rpc_call_t *call, rpc_message_t *message)
{
    attn_status_t status = admit_unary(steps, call);

    if (status == ATTN_OK) {
        status = serve_admitted_run(steps, call, message);
    }
    if (status != ATTN_OK) {
        unary_fail(call, status);
    }
    rpc_message_free(message);
}

/* A unary Run on its way to a thread. */
typedef struct run_errand {
    job_t job;
    steps_t *steps;
    rpc_call_t *call;
    rpc_message_t *message;
} run_errand_t;

static void
run_errand(job_t *job)
{
    run_errand_t *errand = JOB_OF(run_errand_t, job, job);

    serve_run(errand->steps, errand->call, errand->message);
    free(errand);
}

static void
handle_run(void *service, rpc_call_t *call, rpc_message_t *message)
{
    steps_t *steps       = service;
    run_errand_t *errand = malloc(sizeof(*errand));

    if (errand == NULL) {
        unary_fail(call, attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a call of Run"));
        rpc_message_free(message);
        return;
    }
    *errand = (run_errand_t){
        .job = {.run = run_errand}, .steps = steps, .call = call, .message = message};
    jobs_add(steps->jobs, &errand->job);
}

/* ---- life ---- */

static attn_status_t
add_methods(steps_t *steps, rpc_server_t *server, const char *prefix)
{
    static const char *const names[] = {"Begin", "Commit", "Abort", "Run", "Steps"};
    char(*paths)[PATH_ROOM]          = calloc(5, PATH_ROOM);

    if (paths == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the methods of %s", prefix);
    }
    steps->paths = paths[0];
    for (int i = 0; i < 5; i++) {
        snprintf(paths[i], PATH_ROOM, "%s/%s", prefix, names[i]);
    }
    unary_method_t unary[] = {
        {.path    = paths[0],
         .serve   = serve_begin,
         .admit   = admit_unary,
         .blocks  = true,
         .request = steps->ops->worker ? &attn__v1__worker_begin_request__descriptor
                                       : &attn__v1__begin_step_request__descriptor,
         .reply   = steps->ops->worker ? &attn__v1__worker_begin_reply__descriptor
                                       : &attn__v1__begin_step_reply__descriptor},
        {.path    = paths[1],
         .request = &attn__v1__commit_request__descriptor,
         .serve   = serve_commit,
         .reply   = &attn__v1__empty__descriptor,
         .admit   = admit_unary,
         .blocks  = true},
        {.path    = paths[2],
         .request = &attn__v1__abort_request__descriptor,
         .serve   = serve_abort,
         .reply   = &attn__v1__empty__descriptor,
         .admit   = admit_unary,
         .blocks  = true},
    };
    rpc_method_t raw[] = {
        {.path = paths[3], .handle = handle_run},
        {.path = paths[4], .streaming = true, .handle = stream_handle, .closed = stream_closed},
    };
    attn_status_t status = unary_add(server, steps->jobs, unary, 3, steps, &steps->unary);
    return status == ATTN_OK ? rpc_server_add(server, raw, 2, steps) : status;
}

attn_status_t
steps_create(rpc_server_t *server, const char *prefix, const steps_ops_t *ops, void *service,
             jobs_t *jobs, const steps_limits_t *limits, steps_t **steps_p)
{
    steps_t *steps = calloc(1, sizeof(*steps));

    if (steps == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the methods of %s", prefix);
    }
    steps->ops     = ops;
    steps->service = service;
    steps->jobs    = jobs;
    pthread_mutex_init(&steps->lock, NULL);
    *steps_p       = steps; /* also when it fails: the server may know of it, so destroy it after */
    steps->part_ms = limits->part_ms;
    attn_status_t status = tensors_create(limits->buffer_bytes, &steps->tensors);
    return status == ATTN_OK ? add_methods(steps, server, prefix) : status;
}

void
steps_set_lender(steps_t *steps, lender_t *lender)
{
    steps->lender = lender;
}

void
steps_drain(steps_t *steps)
{
    atomic_store(&steps->draining, true);
}

void
steps_tick(steps_t *steps, uint64_t now_ns)
{
    tensors_sweep(steps->tensors, now_ns);
    if (steps->ops->interrupt != NULL) {
        streams_tick(steps);
    }
}

void
steps_destroy(steps_t *steps)
{
    if (steps == NULL) {
        return;
    }
    unary_destroy(steps->unary);
    tensors_destroy(steps->tensors);
    pthread_mutex_destroy(&steps->lock);
    free(steps->paths);
    free(steps);
}
