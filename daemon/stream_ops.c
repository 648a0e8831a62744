/* stream_ops.c: what a message on a stream asks for: begin, a part of a run, commit, abort. */
#include "daemon/stream_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>

#define STREAM_STEPS_MAX 4096u

/* ---- the steps begun here ---- */

void
stream_step_close(stream_step_t *step)
{
    if (step->slot != NULL) {
        ucx_slot_close(step->slot);
        step->slot = NULL;
    }
}

static void
steps_drop(stream_t *stream, uint64_t id)
{
    for (uint32_t i = 0; i < stream->n_open; i++) {
        if (stream->open_steps[i].id == id) {
            stream_step_close(&stream->open_steps[i]);
            pthread_mutex_lock(&stream->lock);
            stream->open_steps[i] = stream->open_steps[--stream->n_open];
            pthread_mutex_unlock(&stream->lock);
            return;
        }
    }
}

/* Forget the steps that ended without a word on this stream: by their deadline, say. */
static void
steps_prune(stream_t *stream)
{
    steps_t *steps = stream->steps;
    steps_sizes_t sizes;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < stream->n_open; i++) {
        stream_step_t *step = &stream->open_steps[i];
        bool keep           = steps->ops->sizes(steps->service, step->id, &sizes) == ATTN_OK;
        if (!keep) {
            stream_step_close(step);
        }
        pthread_mutex_lock(&stream->lock);
        stream->open_steps[kept] = *step;
        kept += keep;
        pthread_mutex_unlock(&stream->lock);
    }
    pthread_mutex_lock(&stream->lock);
    stream->n_open = kept;
    pthread_mutex_unlock(&stream->lock);
}

/* Room for one step more. */
static attn_status_t
steps_reserve(stream_t *stream)
{
    if (stream->n_open < stream->room) {
        return ATTN_OK;
    }
    steps_prune(stream);
    if (stream->n_open >= STREAM_STEPS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "%u steps are open on this stream, and %u is the limit: end some",
                         stream->n_open, STREAM_STEPS_MAX);
    }
    if (stream->n_open < stream->room / 2) {
        return ATTN_OK;
    }
    uint32_t room = stream->room > 0 ? 2 * stream->room : 16;
    pthread_mutex_lock(&stream->lock);
    stream_step_t *steps = realloc(stream->open_steps, room * sizeof(*steps));
    if (steps != NULL) {
        stream->open_steps = steps;
        stream->room       = room;
    }
    pthread_mutex_unlock(&stream->lock);
    return steps != NULL ? ATTN_OK
                         : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u open steps", room);
}

static stream_step_t *
steps_add(stream_t *stream, uint64_t id)
{
    steps_drop(stream, id); /* begin may be repeated */
    pthread_mutex_lock(&stream->lock);
    stream_step_t *step = &stream->open_steps[stream->n_open++];
    *step               = (stream_step_t){.id = id};
    bool over           = stream->over;
    pthread_mutex_unlock(&stream->lock);
    if (over && stream->steps->ops->interrupt != NULL) { /* the stream's end did not see it */
        stream->steps->ops->interrupt(stream->steps->service, id);
    }
    return step;
}

/* ---- operations ---- */

/* The slot that begin asks for, if it does. A step without the one that it asked for is as good. */
static void
open_slot(steps_t *steps, stream_step_t *step, const Attn__V1__WorkerBeginRequest *request,
          Attn__V1__WorkerBeginReply *reply)
{
    if (request->slot == NULL) {
        return;
    }
    bool gpu = false;
    reply->slot =
        lender_slot_open(steps->lender, step->id, request->slot, &step->slot, &gpu) == ATTN_OK;
    reply->slot_gpu = gpu;
    if (!reply->slot) {
        step->slot = NULL;
    }
    if (!reply->slot || (request->slot->gpu && !gpu)) {
        reply->slot_refused = (char *)attn_last_error(); /* this thread's, until its next failure */
    }
    if (request->slot->lane > 0 && gpu) {
        reply->driven = lender_drive(steps->lender, step->id, request->slot) == ATTN_OK;
        if (!reply->driven) {
            reply->driven_refused = (char *)attn_last_error();
        }
    }
}

static void
do_begin(stream_t *stream, const ProtobufCMessage *request, bool worker)
{
    steps_t *steps            = stream->steps;
    Attn__V1__StepReply reply = ATTN__V1__STEP_REPLY__INIT;
    steps_begun_t begun;
    attn_status_t status;

    if (worker != steps->ops->worker) {
        status =
            attn_fail(ATTN_ERR_INVALID, worker ? "op is worker_begin: the coordinator takes begin"
                                               : "op is begin: a worker takes worker_begin");
    } else if ((status = steps_admit(steps, stream->ticket)) == ATTN_OK &&
               (status = steps_reserve(stream)) == ATTN_OK) {
        status = steps_begin(steps, request, &begun);
    }
    if (status != ATTN_OK) {
        stream_refuse(stream, status);
        return;
    }
    stream_step_t *step = steps_add(stream, begun.step_id);
    if (worker) {
        open_slot(steps, step, (const Attn__V1__WorkerBeginRequest *)request, &begun.reply.worker);
        reply.op_case      = ATTN__V1__STEP_REPLY__OP_WORKER_BEGIN;
        reply.worker_begin = &begun.reply.worker;
    } else {
        reply.op_case = ATTN__V1__STEP_REPLY__OP_BEGIN;
        reply.begin   = &begun.reply.thin;
    }
    stream_send(stream, &reply, NULL, NULL);
}

/* Commit or abort ended, or the step was found to have ended before. */
static void
do_end(stream_t *stream, uint64_t id, attn_status_t status, Attn__V1__StepReply__OpCase op)
{
    Attn__V1__Empty empty     = ATTN__V1__EMPTY__INIT;
    Attn__V1__StepReply reply = ATTN__V1__STEP_REPLY__INIT;

    if (status == ATTN_OK || status == ATTN_ERR_ABORTED || status == ATTN_ERR_NOT_FOUND) {
        steps_drop(stream, id);
    }
    if (status != ATTN_OK) {
        stream_refuse(stream, status);
        return;
    }
    reply.op_case = op;
    reply.commit  = &empty; /* abort is the same member of the union */
    stream_send(stream, &reply, NULL, NULL);
}

/* Queue an answer in parts. The tensor is lent until the last of them has left, and no thread
 * waits for that. */
static void
send_answer(stream_t *stream, const steps_run_t *run, tensor_t *answer)
{
    Attn__V1__RunReply head   = ATTN__V1__RUN_REPLY__INIT;
    Attn__V1__StepReply reply = ATTN__V1__STEP_REPLY__INIT;
    attn_status_t status      = ATTN_OK;

    head.step_id    = run->step_id;
    head.layer      = run->layer;
    head.compute_ns = run->compute_ns;
    head.total      = answer != NULL ? answer->size : 0;
    reply.op_case   = ATTN__V1__STEP_REPLY__OP_RUN;
    reply.run       = &head;
    do {
        uint64_t size     = attn_min(head.total - head.offset, RPC_DATA_PART_MAX);
        struct iovec data = {.iov_base = answer != NULL ? answer->data + head.offset : NULL,
                             .iov_len  = size};
        status            = stream_send(stream, &reply, &data, answer);
        head.offset += size;
    } while (status == ATTN_OK && head.offset < head.total);
}

/* All data is there. */
static void
do_run(stream_t *stream)
{
    tensor_t *answer     = NULL;
    attn_status_t status = steps_run_do(stream->steps, &stream->run, &answer);

    steps_run_close(&stream->run);
    if (status == ATTN_OK) {
        send_answer(stream, &stream->run, answer);
        tensor_unref(answer);
    } else {
        stream_refuse(stream, status);
    }
}

/* Does this message's data follow what came? */
static attn_status_t
check_part(const steps_run_t *run, const Attn__V1__RunRequest *head, uint64_t size)
{
    if (head->step_id != run->step_id || head->layer != run->layer) {
        return attn_fail(ATTN_ERR_INVALID,
                         "part of step %016llx, layer %u, at offset %llu, between those of step "
                         "%016llx, layer %u",
                         (unsigned long long)head->step_id, head->layer,
                         (unsigned long long)head->offset, (unsigned long long)run->step_id,
                         run->layer);
    }
    if (head->offset != run->got ||
        (head->total != run->total && (head->total != 0 || size != run->total))) {
        return attn_fail(ATTN_ERR_INVALID,
                         "offset is %llu of total %llu: data at %llu of %llu is next",
                         (unsigned long long)head->offset, (unsigned long long)head->total,
                         (unsigned long long)run->got, (unsigned long long)run->total);
    }
    if (size > run->total - run->got) {
        return attn_fail(ATTN_ERR_INVALID,
                         "data of %llu bytes at offset %llu goes beyond total, %llu",
                         (unsigned long long)size, (unsigned long long)head->offset,
                         (unsigned long long)run->total);
    }
    return ATTN_OK;
}

static attn_status_t
take_part(stream_t *stream, const Attn__V1__RunRequest *head, uint64_t size)
{
    steps_run_t *run     = &stream->run;
    attn_status_t status = ATTN_OK;

    if (head->data.len > 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "run.data is set: on a stream, data goes into StepRequest.data");
    }
    if (head->n_lists > 0 && head->offset != 0) {
        return attn_fail(ATTN_ERR_INVALID, "lists come with the first part of a run alone");
    }
    if (run->data == NULL && head->offset != 0) {
        return attn_fail(ATTN_ERR_INVALID, "offset is %llu: no run of step %016llx is under way",
                         (unsigned long long)head->offset, (unsigned long long)head->step_id);
    }
    if (run->data == NULL) {
        status = steps_run_open(stream->steps, head, head->total != 0 ? head->total : size, run);
    }
    if (status == ATTN_OK) {
        status = check_part(run, head, size);
    }
    if (status == ATTN_OK) {
        rpc_message_data_copy(stream->message, 0, run->data->data + run->got, size);
        run->got += size;
    }
    return status;
}

static void
do_part(stream_t *stream, const Attn__V1__RunRequest *head)
{
    uint64_t size = rpc_message_data_size(stream->message), end;
    bool more     = attn_add(head->offset, size, &end) && end < head->total;

    if (stream->skipping && head->offset > 0) {
        stream->skipping = more;
        return;
    }
    stream->skipping     = false;
    attn_status_t status = take_part(stream, head, size);
    if (status != ATTN_OK) {
        steps_run_close(&stream->run);
        stream_refuse(stream, status);
        stream->skipping = more;
    } else if (stream->run.got == stream->run.total) {
        do_run(stream);
    }
}

/* Another operation came before a run had all its parts: that run is answered first. */
static void
do_cut_off_run(stream_t *stream)
{
    steps_run_close(&stream->run);
    stream_refuse(stream,
                  attn_fail(ATTN_ERR_INVALID,
                            "data of layer %u of step %016llx broke off after %llu of %llu bytes",
                            stream->run.layer, (unsigned long long)stream->run.step_id,
                            (unsigned long long)stream->run.got,
                            (unsigned long long)stream->run.total));
}

void
stream_operate(stream_t *stream, const Attn__V1__StepRequest *request)
{
    steps_t *steps = stream->steps;
    bool is_part   = request->op_case == ATTN__V1__STEP_REQUEST__OP_RUN;

    if (stream->run.data != NULL && (!is_part || request->run->offset == 0)) {
        do_cut_off_run(stream);
    }
    if (is_part) {
        do_part(stream, request->run);
        return;
    }
    stream->skipping = false;
    if (request->op_case == ATTN__V1__STEP_REQUEST__OP_BEGIN) {
        do_begin(stream, &request->begin->base, false);
    } else if (request->op_case == ATTN__V1__STEP_REQUEST__OP_WORKER_BEGIN) {
        do_begin(stream, &request->worker_begin->base, true);
    } else if (request->op_case == ATTN__V1__STEP_REQUEST__OP_COMMIT) {
        const Attn__V1__CommitRequest *r = request->commit;
        do_end(stream, r->step_id, steps_commit(steps, r), ATTN__V1__STEP_REPLY__OP_COMMIT);
    } else if (request->op_case == ATTN__V1__STEP_REQUEST__OP_ABORT) {
        do_end(stream, request->abort->step_id,
               steps->ops->abort(steps->service, request->abort->step_id, ENGINE_BY_CLIENT),
               ATTN__V1__STEP_REPLY__OP_ABORT);
    } else {
        stream_refuse(stream,
                      attn_fail(ATTN_ERR_INVALID, "op is not set, or none that is known here"));
    }
}
