/* stream_int.h: what stream.c (the call) and stream_ops.c (its operations) share. */
#ifndef ATTN_DAEMON_STREAM_INT_H
#define ATTN_DAEMON_STREAM_INT_H

#include "daemon/lender.h"
#include "daemon/steps_int.h"

/* A step begun on a stream and not ended. */
typedef struct stream_step {
    uint64_t id;
    ucx_slot_t *slot; /* NULL: none */
} stream_step_t;

struct stream {
    job_t message_job, end_job;
    steps_t *steps;
    rpc_call_t *call;
    pthread_mutex_t lock;
    char *ticket;           /* that it was opened with; NULL: none */
    bool over;              /* under the lock: the call is not to be used */
    uint32_t references;    /* under the lock */
    stream_t *next, **link; /* in the list of open ones, under its lock */

    /* Of the thread that works on the message. */
    rpc_message_t *message;
    steps_run_t run; /* whose parts are coming in, if run.data */
    bool skipping;   /* the rest of the parts of a run that failed */
    stream_step_t *open_steps; /* changed under the lock: other threads read ids */
    uint32_t n_open, room;
};

/* ---- stream.c: the call, as long as it is there ---- */

void stream_end(stream_t *stream, attn_status_t status, const char *sentence);

/** tensor: the one that data lies in, or NULL. A reply that cannot be sent ends the stream. */
attn_status_t stream_send(stream_t *stream, const Attn__V1__StepReply *reply,
                          const struct iovec *data, tensor_t *tensor);

/** Reply to an operation that failed, with this thread's sentence. */
void stream_refuse(stream_t *stream, attn_status_t code);

/* ---- stream_ops.c ---- */

/** No run of it comes through shared memory any more. */
void stream_step_close(stream_step_t *step);

/** Do the operation of stream->message, and reply. */
void stream_operate(stream_t *stream, const Attn__V1__StepRequest *request);

#endif
