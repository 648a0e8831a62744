/*
 * stream.c: the Steps stream. Its operations are answered in order, one reply each (a run's
 * answer may take several messages). A failed one is a reply with a status, and the stream
 * goes on; a message that is no StepRequest ends it.
 *
 * The call may be over while a thread works on its last message. So everything that touches
 * the call asks `over` first, under the stream's lock, and the stream lives as long as its
 * call and that thread do. The last to leave aborts the steps begun here.
 */
#include "daemon/stream_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "daemon/meter.h"
#include "daemon/ticket.h"

#include <stdlib.h>
#include <string.h>

/* ---- life ---- */

static void
stream_unref(stream_t *stream)
{
    steps_t *steps = stream->steps;

    pthread_mutex_lock(&stream->lock);
    bool last = --stream->references == 0;
    pthread_mutex_unlock(&stream->lock);
    if (!last) {
        return;
    }
    pthread_mutex_lock(&steps->lock);
    *stream->link = stream->next;
    if (stream->next != NULL) {
        stream->next->link = stream->link;
    }
    pthread_mutex_unlock(&steps->lock);

    for (uint32_t i = 0; i < stream->n_open; i++) {
        stream_step_close(&stream->open_steps[i]);
        steps->ops->abort(steps->service, stream->open_steps[i].id, ENGINE_BY_STREAM);
    }
    steps_run_close(&stream->run);
    pthread_mutex_destroy(&stream->lock);
    atomic_fetch_sub(&meter.streams, 1);
    free(stream->open_steps);
    free(stream->ticket);
    free(stream);
}

static void
stream_end_job(job_t *job)
{
    stream_unref(JOB_OF(stream_t, end_job, job));
}

/* The call is over: runs that wait for others end. Under the stream's lock. */
static void
interrupt_steps(const stream_t *stream)
{
    const steps_t *steps = stream->steps;

    for (uint32_t i = 0; steps->ops->interrupt != NULL && i < stream->n_open; i++) {
        steps->ops->interrupt(steps->service, stream->open_steps[i].id);
    }
}

void
stream_closed(void *service, rpc_call_t *call)
{
    steps_t *steps   = service;
    stream_t *stream = rpc_call_context(call);

    if (stream == NULL) {
        return;
    }
    pthread_mutex_lock(&stream->lock);
    stream->over = true;
    interrupt_steps(stream);
    pthread_mutex_unlock(&stream->lock);
    jobs_add(steps->jobs, &stream->end_job); /* aborting steps may block */
}

static void stream_message_job(job_t *job);

static attn_status_t
stream_new(steps_t *steps, rpc_call_t *call, stream_t **stream_p)
{
    const char *ticket   = rpc_call_metadata(call, TICKET_HEADER);
    attn_status_t status = steps_admit(steps, ticket);

    if (status != ATTN_OK) {
        return status;
    }
    stream_t *stream = calloc(1, sizeof(*stream));
    if (stream == NULL || (ticket != NULL && (stream->ticket = strdup(ticket)) == NULL)) {
        free(stream);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a stream");
    }
    meter_add(&meter.streams, 1);
    stream->message_job.run = stream_message_job;
    stream->end_job.run     = stream_end_job;
    stream->steps           = steps;
    stream->call            = call;
    stream->references      = 1; /* the call's */
    pthread_mutex_init(&stream->lock, NULL);
    rpc_call_set_context(call, stream);

    pthread_mutex_lock(&steps->lock);
    stream->next = steps->streams;
    stream->link = &steps->streams;
    if (stream->next != NULL) {
        stream->next->link = &stream->next;
    }
    steps->streams = stream;
    pthread_mutex_unlock(&steps->lock);
    *stream_p = stream;
    return ATTN_OK;
}

/* ---- the call, as long as it is there ---- */

void
stream_end(stream_t *stream, attn_status_t status, const char *sentence)
{
    pthread_mutex_lock(&stream->lock);
    if (!stream->over) {
        rpc_call_end(stream->call, status, sentence);
    }
    pthread_mutex_unlock(&stream->lock);
}

/* For the next message to come; 0: as long as it takes. The rest of a run holds its buffer, so each
 * part has its time, and all of them as much for every 2 MiB, however many they are. */
static uint32_t
next_ms(const stream_t *stream)
{
    const steps_run_t *run = &stream->run;
    uint64_t most          = stream->steps->part_ms;

    if (run->data == NULL) {
        return 0;
    }
    uint64_t all  = most * (1 + run->total / RPC_DATA_PART_MAX);
    uint64_t went = (attn_now_ns() - run->start_ns) / ATTN_NS_PER_MS;
    return (uint32_t)attn_max(attn_min(most, went < all ? all - went : 0), 1);
}

static void
stream_next(stream_t *stream)
{
    uint32_t within_ms = next_ms(stream); /* ours until the next message */

    pthread_mutex_lock(&stream->lock);
    if (!stream->over) {
        rpc_call_next(stream->call, within_ms);
    }
    pthread_mutex_unlock(&stream->lock);
}

attn_status_t
stream_send(stream_t *stream, const Attn__V1__StepReply *reply, const struct iovec *data,
            tensor_t *tensor)
{
    rpc_outgoing_t message = {.head   = &reply->base,
                              .data   = data,
                              .n_data = tensor != NULL,
                              .sent   = tensor != NULL ? tensor_unref : NULL,
                              .arg    = tensor};
    attn_status_t status   = ATTN_ERR_CANCELLED;

    if (tensor != NULL) {
        tensor_ref(tensor);
    }
    pthread_mutex_lock(&stream->lock);
    if (!stream->over) {
        status = rpc_call_send(stream->call, &message);
        if (status != ATTN_OK) {
            rpc_call_end(stream->call, status, attn_last_error());
        }
    } else {
        tensor_unref(tensor);
    }
    pthread_mutex_unlock(&stream->lock);
    return status;
}

void
stream_refuse(stream_t *stream, attn_status_t code)
{
    Attn__V1__Status status   = ATTN__V1__STATUS__INIT;
    Attn__V1__StepReply reply = ATTN__V1__STEP_REPLY__INIT;

    meter_refused(code);
    status.code    = (int32_t)code;
    status.message = (char *)attn_last_error();
    reply.status   = &status;
    stream_send(stream, &reply, NULL, NULL);
}

/* ---- messages ---- */

static void
stream_message_job(job_t *job)
{
    stream_t *stream = JOB_OF(stream_t, message_job, job);
    ProtobufCMessage *head;
    attn_status_t status =
        rpc_message_unpack(stream->message, &attn__v1__step_request__descriptor, &head);

    if (status == ATTN_OK) {
        stream_operate(stream, (const Attn__V1__StepRequest *)head);
    } else {
        stream_end(stream, status, attn_last_error());
    }
    rpc_message_free(stream->message);
    stream->message = NULL;
    if (status == ATTN_OK) {
        stream_next(stream);
    }
    stream_unref(stream);
}

void
stream_handle(void *service, rpc_call_t *call, rpc_message_t *message)
{
    steps_t *steps   = service;
    stream_t *stream = rpc_call_context(call);

    if (message == NULL) { /* every operation was answered, for messages come one at a time */
        rpc_call_end(call, ATTN_OK, "");
        return;
    }
    if (stream == NULL && atomic_load(&steps->draining)) {
        rpc_message_free(message);
        rpc_call_end(call, ATTN_ERR_CANCELLED, "draining: this daemon is going down");
        return;
    }
    attn_status_t status = stream == NULL ? stream_new(steps, call, &stream) : ATTN_OK;
    if (status != ATTN_OK) {
        rpc_message_free(message);
        unary_fail(call, status);
        return;
    }
    stream->message = message;
    pthread_mutex_lock(&stream->lock);
    stream->references++;
    pthread_mutex_unlock(&stream->lock);
    jobs_add(steps->jobs, &stream->message_job);
}

/* A run that waits for others is in the call's one handler: nobody hears of its end before that. */
void
streams_tick(steps_t *steps)
{
    pthread_mutex_lock(&steps->lock);
    for (stream_t *stream = steps->streams; stream != NULL; stream = stream->next) {
        pthread_mutex_lock(&stream->lock);
        if (!stream->over && rpc_call_cancelled(stream->call)) {
            interrupt_steps(stream);
        }
        pthread_mutex_unlock(&stream->lock);
    }
    pthread_mutex_unlock(&steps->lock);
}

void
steps_end_streams(steps_t *steps)
{
    pthread_mutex_lock(&steps->lock);
    for (stream_t *stream = steps->streams; stream != NULL; stream = stream->next) {
        stream_end(stream, ATTN_ERR_CANCELLED, "draining: this daemon is going down");
    }
    pthread_mutex_unlock(&steps->lock);
}
