/*
 * pipe.c: one operation after the other on a stream.
 *
 * An operation is over when its answer came, or the stream ended. Tensors are copied on their
 * way out: C core reads what it was given until the socket took it, and a peer that stopped
 * reading would keep the caller's memory on loan for seconds after the deadline, for neither
 * cancelling nor dropping the channel takes bytes back that a write has begun with.
 *
 * A run of any size is sent with a few parts waiting for the socket at once: whenever it took one,
 * the thread that makes progress copies and queues the next. Done waits for a thread that copies.
 */
#include "client/pipe.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PART_PIECES 64u  /* pieces of one message */
#define PARTS_WAITING 4u /* parts of a run that wait for the socket at once */

/* Walks over the pieces of q, k and v as one string of bytes. */
typedef struct walk {
    const struct iovec *lists[3];
    uint32_t counts[3];
    uint32_t list, piece;
    uint64_t offset; /* in the piece */
} walk_t;

struct pipe {
    pipes_t *pipes;
    rpc_stream_t *stream;
    uint64_t ticket; /* rpc_client_header_version() when it was opened */
    pthread_mutex_t lock;
    uint32_t references; /* the stream's until its end came, and the owner's */
    bool ended;          /* the stream's end came */
    bool closed;         /* no more is sent; the stream is closed when nobody is sending */
    bool cancelled;
    bool over;        /* the worker said that its step ended, or never began */
    bool astray;      /* an answer came that nobody asked for: not for another step */
    uint32_t sending; /* threads inside rpc_stream_send() */
    uint32_t waiting; /* messages that the socket has not taken */

    pipe_op_t op;
    link_done_fn done;
    void *arg;
    bool replied;
    attn_status_t status;
    char sentence[512];
    link_run_t run;               /* PIPE_RUN */
    Attn__V1__EntryLists **lists; /* and its lists */
    uint32_t n_lists;
    uint64_t received; /* bytes of the answer so far ... */
    uint64_t expected; /* ... of these */
    uint64_t step_id;
    walk_t walk;                 /* over the tensors: what is sent next ... */
    uint64_t offset, total;      /* ... of all their bytes */
    bool more;                   /* parts are to be sent still */
    bool copying;                /* a thread is at it: the caller's memory is in use */
    bool aside;                  /* the run goes another way ... */
    uint64_t number;             /* ... and is this one */
    bool slot, slot_gpu, driven; /* what was told of begin */
    char slot_refused[256], driven_refused[256];

    pipe_t *next; /* in the idle list */
};

void
pipe_ref(pipe_t *pipe)
{
    pthread_mutex_lock(&pipe->lock);
    pipe->references++;
    pthread_mutex_unlock(&pipe->lock);
}

void
pipe_unref(pipe_t *pipe)
{
    pthread_mutex_lock(&pipe->lock);
    bool last = --pipe->references == 0;
    pthread_mutex_unlock(&pipe->lock);
    if (last) {
        pthread_mutex_destroy(&pipe->lock);
        free(pipe);
    }
}

/* If the operation is over, take its completion out: call *done after unlocking. */
static bool
take_done(pipe_t *pipe, link_done_fn *done, void **arg)
{
    if (pipe->op == PIPE_NONE || !pipe->replied || pipe->copying) {
        return false;
    }
    pipe->more = false;
    pipe->op   = PIPE_NONE;
    *done      = pipe->done;
    *arg       = pipe->arg;
    return true;
}

/* Unlock, and complete the operation if it is over. */
static void
unlock_and_complete(pipe_t *pipe)
{
    link_done_fn done;
    void *arg;
    char sentence[512];
    bool over            = take_done(pipe, &done, &arg);
    attn_status_t status = pipe->status;

    memcpy(sentence, pipe->sentence, sizeof(sentence));
    pthread_mutex_unlock(&pipe->lock);
    if (over) {
        done(arg, status, sentence);
    }
}

/* The answer is here, or there will be none. Under the lock; the first word counts. */
static void
set_reply(pipe_t *pipe, attn_status_t status, const char *sentence)
{
    if (pipe->op != PIPE_NONE && !pipe->replied) {
        pipe->replied = true;
        pipe->status  = status;
        snprintf(pipe->sentence, sizeof(pipe->sentence), "%s", sentence);
    }
}

static void
copy_to_pieces(const rpc_message_t *message, uint64_t n, const struct iovec *pieces,
               uint32_t n_pieces, uint64_t at)
{
    uint64_t from = 0;

    for (uint32_t i = 0; i < n_pieces && from < n; i++) {
        if (at >= pieces[i].iov_len) {
            at -= pieces[i].iov_len;
            continue;
        }
        uint64_t bytes = attn_min(pieces[i].iov_len - at, n - from);
        rpc_message_data_copy(message, from, (uint8_t *)pieces[i].iov_base + at, bytes);
        from += bytes;
        at = 0;
    }
}

/* The worker does not keep to the protocol. Under the lock. */
static void
set_astray(pipe_t *pipe, const char *sentence)
{
    pipe->astray = true;
    set_reply(pipe, ATTN_ERR_INTERNAL, sentence);
}

/* A part of a run's answer. Under the lock. */
static void
receive_run(pipe_t *pipe, const Attn__V1__RunReply *reply, const rpc_message_t *message)
{
    uint64_t n     = rpc_message_data_size(message);
    uint64_t total = reply->total != 0 ? reply->total : n;

    if (reply->layer != pipe->run.layer || reply->offset != pipe->received ||
        total != pipe->expected || n > pipe->expected - pipe->received ||
        (n == 0 && pipe->expected > 0)) {
        set_astray(pipe, "the worker's answer is not that of the run asked");
        return;
    }
    copy_to_pieces(message, n, pipe->run.answer, pipe->run.n_answer, pipe->received);
    pipe->received += n;
    if (pipe->received == pipe->expected) {
        *pipe->run.compute_ns = reply->compute_ns;
        set_reply(pipe, ATTN_OK, "");
    }
}

/* Of begin: the slot. Under the lock. */
static void
receive_begin(pipe_t *pipe, const Attn__V1__StepReply *reply)
{
    if (pipe->op == PIPE_BEGIN) {
        pipe->slot     = reply->worker_begin->slot;
        pipe->slot_gpu = reply->worker_begin->slot_gpu;
        snprintf(pipe->slot_refused, sizeof(pipe->slot_refused), "%s",
                 reply->worker_begin->slot_refused);
        pipe->driven = reply->worker_begin->driven;
        snprintf(pipe->driven_refused, sizeof(pipe->driven_refused), "%s",
                 reply->worker_begin->driven_refused);
    }
}

bool
pipe_has_slot(pipe_t *pipe, bool *gpu_p, char *reason, size_t room)
{
    pthread_mutex_lock(&pipe->lock);
    bool slot = pipe->slot;
    *gpu_p    = slot && pipe->slot_gpu;
    snprintf(reason, room, "%s", pipe->slot_refused);
    pthread_mutex_unlock(&pipe->lock);
    return slot;
}

bool
pipe_is_driven(pipe_t *pipe, char *reason, size_t room)
{
    pthread_mutex_lock(&pipe->lock);
    bool driven = pipe->driven;
    snprintf(reason, room, "%s", pipe->driven_refused);
    pthread_mutex_unlock(&pipe->lock);
    return driven;
}

static void
receive_reply(pipe_t *pipe, const Attn__V1__StepReply *reply, const rpc_message_t *message)
{
    static const Attn__V1__StepReply__OpCase wanted[] = {
        [PIPE_BEGIN]  = ATTN__V1__STEP_REPLY__OP_WORKER_BEGIN,
        [PIPE_RUN]    = ATTN__V1__STEP_REPLY__OP_RUN,
        [PIPE_COMMIT] = ATTN__V1__STEP_REPLY__OP_COMMIT,
        [PIPE_ABORT]  = ATTN__V1__STEP_REPLY__OP_ABORT,
    };

    if (pipe->op == PIPE_NONE || pipe->replied || (pipe->op == PIPE_RUN && pipe->aside)) {
        set_astray(pipe, "the worker answered without being asked");
    } else if (reply->status != NULL && reply->status->code != 0) {
        bool known = attn_status_is_known(reply->status->code);
        pipe->over = pipe->op == PIPE_BEGIN;
        set_reply(pipe, known ? (attn_status_t)reply->status->code : ATTN_ERR_INTERNAL,
                  reply->status->message);
    } else if (reply->op_case != wanted[pipe->op]) {
        set_astray(pipe, "the worker answered another operation than the one asked");
    } else if (pipe->op == PIPE_RUN) {
        receive_run(pipe, reply->run, message);
    } else {
        receive_begin(pipe, reply);
        pipe->over = pipe->op != PIPE_BEGIN;
        set_reply(pipe, ATTN_OK, "");
    }
}

/* A message on the stream, or its end. */
static void
on_received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    pipe_t *pipe               = arg;
    Attn__V1__StepReply *reply = NULL;

    if (message != NULL && rpc_message_unpack(message, &attn__v1__step_reply__descriptor,
                                              (ProtobufCMessage **)&reply) != ATTN_OK) {
        pthread_mutex_lock(&pipe->lock);
        set_astray(pipe, attn_last_error());
        pipe->references++; /* done may give the pipe up */
        unlock_and_complete(pipe);
        rpc_message_free(message);
        pipe_unref(pipe);
        return;
    }
    pthread_mutex_lock(&pipe->lock);
    if (message != NULL) {
        receive_reply(pipe, reply, message);
        if (pipe->replied && !pipe->closed && !pipe->more) {
            rpc_stream_rest(pipe->stream); /* the next answer is that to the next operation */
        }
    } else {
        pipe->ended = true;
        if (pipe->cancelled) {
            set_reply(pipe, ATTN_ERR_DEADLINE, "the deadline passed before the worker answered");
        } else if (status == ATTN_OK) {
            set_reply(pipe, ATTN_ERR_UNAVAILABLE, "the worker ended the stream");
        } else {
            set_reply(pipe, status, sentence);
        }
    }
    pipe->references++;
    unlock_and_complete(pipe);
    rpc_message_free(message);
    pipe_unref(pipe);
    if (message == NULL) {
        pipe_unref(pipe); /* the stream's */
    }
}

/* Close the stream, once, and not under the feet of a thread that is sending: that one closes. */
static void
pipe_close(pipe_t *pipe)
{
    pthread_mutex_lock(&pipe->lock);
    bool now     = !pipe->closed && pipe->sending == 0;
    pipe->closed = true;
    pthread_mutex_unlock(&pipe->lock);
    if (now) {
        rpc_stream_close(pipe->stream);
    }
}

static void
send_request(pipe_t *pipe, const Attn__V1__StepRequest *request, const struct iovec *data,
             uint32_t n_data)
{
    rpc_outgoing_t message = {.head = &request->base, .data = data, .n_data = n_data};

    pthread_mutex_lock(&pipe->lock);
    if (pipe->closed) {
        set_reply(pipe, pipe->cancelled ? ATTN_ERR_DEADLINE : ATTN_ERR_UNAVAILABLE,
                  "the stream to the worker was given up");
        pthread_mutex_unlock(&pipe->lock);
        return;
    }
    pipe->sending++;
    pipe->waiting++;
    pthread_mutex_unlock(&pipe->lock);

    rpc_stream_send(pipe->stream, &message);

    pthread_mutex_lock(&pipe->lock);
    bool close = --pipe->sending == 0 && pipe->closed;
    pthread_mutex_unlock(&pipe->lock);
    if (close) {
        rpc_stream_close(pipe->stream);
    }
}

/* The next pieces, of at most RPC_DATA_PART_MAX bytes and PART_PIECES pieces together. */
static uint32_t
walk_part(walk_t *walk, struct iovec *part, uint64_t *bytes_p)
{
    uint64_t bytes = 0;
    uint32_t n     = 0;

    while (walk->list < 3 && n < PART_PIECES && bytes < RPC_DATA_PART_MAX) {
        if (walk->piece >= walk->counts[walk->list]) {
            walk->list++;
            walk->piece = 0;
            continue;
        }
        const struct iovec *piece = &walk->lists[walk->list][walk->piece];
        uint64_t take = attn_min(piece->iov_len - walk->offset, RPC_DATA_PART_MAX - bytes);
        if (take > 0) {
            part[n++] = (struct iovec){.iov_base = (uint8_t *)piece->iov_base + walk->offset,
                                       .iov_len  = take};
        }
        bytes += take;
        walk->offset += take;
        if (walk->offset == piece->iov_len) {
            walk->piece++;
            walk->offset = 0;
        }
    }
    *bytes_p = bytes;
    return n;
}

static uint64_t
pieces_bytes(const struct iovec *pieces, uint32_t n)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < n; i++) {
        bytes += pieces[i].iov_len;
    }
    return bytes;
}

static void
send_part(pipe_t *pipe, const struct iovec *part, uint32_t n, uint64_t offset)
{
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;
    Attn__V1__RunRequest head     = ATTN__V1__RUN_REQUEST__INIT;

    head.step_id    = pipe->step_id;
    head.layer      = pipe->run.layer;
    head.offset     = offset;
    head.total      = pipe->total;
    head.no_kv      = pipe->run.n_k == 0;
    head.no_q       = pipe->run.n_q == 0;
    head.lists      = offset == 0 ? pipe->lists : NULL;
    head.n_lists    = offset == 0 ? pipe->n_lists : 0;
    request.op_case = ATTN__V1__STEP_REQUEST__OP_RUN;
    request.run     = &head;
    send_request(pipe, &request, part, n);
}

/* Hand over parts of the run while few of them wait, if no other thread is at it. Under the lock,
 * which is given up meanwhile. */
static void
send_parts(pipe_t *pipe)
{
    struct iovec part[PART_PIECES];
    uint64_t bytes;

    while (pipe->more && !pipe->copying && !pipe->replied && pipe->waiting < PARTS_WAITING) {
        uint64_t offset = pipe->offset;
        uint32_t n      = walk_part(&pipe->walk, part, &bytes);
        pipe->offset += bytes;
        pipe->more    = pipe->offset < pipe->total;
        pipe->copying = true;
        pthread_mutex_unlock(&pipe->lock);
        send_part(pipe, part, n, offset);
        pthread_mutex_lock(&pipe->lock);
        pipe->copying = false;
    }
}

/* The socket took a message. */
static void
on_taken(void *arg)
{
    pipe_t *pipe = arg;

    pthread_mutex_lock(&pipe->lock);
    pipe->waiting--;
    pipe->references++; /* done may give the pipe up */
    send_parts(pipe);
    unlock_and_complete(pipe);
    pipe_unref(pipe);
}

static attn_status_t
pipe_open(pipes_t *pipes, pipe_t **pipe_p)
{
    pipe_t *pipe = calloc(1, sizeof(*pipe));

    if (pipe == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a stream");
    }
    pipe->pipes      = pipes;
    pipe->references = 2;
    pipe->ticket     = rpc_client_header_version(pipes->rpc);
    pthread_mutex_init(&pipe->lock, NULL);
    attn_status_t status = rpc_stream_open(pipes->channel, "/attn.v1.Worker/Steps", UINT64_MAX,
                                           on_received, pipe, &pipe->stream);
    if (status != ATTN_OK) {
        pthread_mutex_destroy(&pipe->lock);
        free(pipe);
        return status;
    }
    rpc_stream_on_taken(pipe->stream, on_taken);
    *pipe_p = pipe;
    return ATTN_OK;
}

attn_status_t
pipe_take(pipes_t *pipes, pipe_t **pipe_p)
{
    for (;;) {
        pthread_mutex_lock(&pipes->lock);
        pipe_t *pipe = pipes->idle;
        if (pipe != NULL) {
            pipes->idle = pipe->next;
        }
        pthread_mutex_unlock(&pipes->lock);
        if (pipe == NULL) {
            return pipe_open(pipes, pipe_p);
        }
        pthread_mutex_lock(&pipe->lock);
        bool stands =
            !pipe->ended && !pipe->astray && pipe->ticket == rpc_client_header_version(pipes->rpc);
        pthread_mutex_unlock(&pipe->lock);
        if (stands) {
            *pipe_p = pipe;
            return ATTN_OK;
        }
        pipe_close(pipe);
        pipe_unref(pipe);
    }
}

bool
pipe_give(pipe_t *pipe, bool clean)
{
    pipes_t *pipes = pipe->pipes;

    pthread_mutex_lock(&pipe->lock);
    bool over = pipe->over;
    clean     = clean && !pipe->ended && !pipe->closed && !pipe->astray;
    pthread_mutex_unlock(&pipe->lock);
    if (clean) {
        pthread_mutex_lock(&pipes->lock);
        pipe->next  = pipes->idle;
        pipes->idle = pipe;
        pthread_mutex_unlock(&pipes->lock);
    } else {
        pipe_close(pipe);
        pipe_unref(pipe);
    }
    return over;
}

/* Start an operation: from now on done is called exactly once. The caller sends, and ends with
 * pipe_started(). */
static void
pipe_start(pipe_t *pipe, pipe_op_t op, link_done_fn done, void *arg)
{
    pthread_mutex_lock(&pipe->lock);
    assert(pipe->op == PIPE_NONE);
    pipe->references++; /* done may give the pipe up while we still send */
    pipe->op      = op;
    pipe->done    = done;
    pipe->arg     = arg;
    pipe->replied = false;
    pipe->over    = false;
    if (pipe->ended) {
        set_reply(pipe, ATTN_ERR_UNAVAILABLE, "the stream to the worker broke");
    }
    pthread_mutex_unlock(&pipe->lock);
}

/* Everything was handed to the stream. Completes what ended before it started. */
static void
pipe_started(pipe_t *pipe)
{
    pthread_mutex_lock(&pipe->lock);
    unlock_and_complete(pipe);
    pipe_unref(pipe);
}

void
pipe_call(pipe_t *pipe, pipe_op_t op, const Attn__V1__StepRequest *request, link_done_fn done,
          void *arg)
{
    pipe_start(pipe, op, done, arg);
    send_request(pipe, request, NULL, 0);
    pipe_started(pipe);
}

void
pipe_run(pipe_t *pipe, uint64_t step_id, const link_run_t *run, Attn__V1__EntryLists **lists,
         link_done_fn done, void *arg)
{
    uint64_t total = pieces_bytes(run->q, run->n_q) + pieces_bytes(run->k, run->n_k) +
                     pieces_bytes(run->v, run->n_v);

    pthread_mutex_lock(&pipe->lock);
    pipe->lists   = lists;
    pipe->n_lists = run->n_lists;
    pipe->run     = *run; /* before the operation starts: from then on an answer may come */
    pipe->step_id = step_id;
    pipe->walk =
        (walk_t){.lists = {run->q, run->k, run->v}, .counts = {run->n_q, run->n_k, run->n_v}};
    pipe->aside    = false;
    pipe->offset   = 0;
    pipe->total    = total;
    pipe->received = 0;
    pipe->expected = run->n_q > 0 ? pieces_bytes(run->answer, run->n_answer) : 0;
    pthread_mutex_unlock(&pipe->lock);
    pipe_start(pipe, PIPE_RUN, done, arg);
    pthread_mutex_lock(&pipe->lock);
    pipe->more = true;
    send_parts(pipe);
    pthread_mutex_unlock(&pipe->lock);
    pipe_started(pipe);
}

/* ---- runs that go another way ---- */

uint64_t
pipe_run_aside(pipe_t *pipe, const link_run_t *run, link_done_fn done, void *arg)
{
    pthread_mutex_lock(&pipe->lock);
    pipe->run       = *run;
    pipe->aside     = true;
    pipe->more      = false;
    pipe->expected  = run->n_q > 0 ? pieces_bytes(run->answer, run->n_answer) : 0;
    uint64_t number = ++pipe->number;
    pthread_mutex_unlock(&pipe->lock);
    pipe_start(pipe, PIPE_RUN, done, arg);
    return number;
}

void
pipe_run_asked(pipe_t *pipe)
{
    pipe_started(pipe);
}

/* Copy an answer into the caller's pieces, whose memory is in use meanwhile. Under the lock, given
 * up meanwhile. */
static void
take_answer(pipe_t *pipe, const uint8_t *data)
{
    pipe->copying = true;
    pthread_mutex_unlock(&pipe->lock);
    for (uint32_t i = 0; i < pipe->run.n_answer; i++) {
        ucx_copy(pipe->run.answer[i].iov_base, data, pipe->run.answer[i].iov_len);
        data += pipe->run.answer[i].iov_len;
    }
    pthread_mutex_lock(&pipe->lock);
    pipe->copying = false;
}

void
pipe_run_answered(pipe_t *pipe, uint64_t number, attn_status_t status, const char *sentence,
                  const uint8_t *data, uint64_t bytes, uint64_t compute_ns)
{
    pthread_mutex_lock(&pipe->lock);
    if (pipe->op != PIPE_RUN || !pipe->aside || pipe->number != number || pipe->replied) {
        pthread_mutex_unlock(&pipe->lock);
        return;
    }
    if (status == ATTN_OK && bytes != pipe->expected) {
        status   = ATTN_ERR_INTERNAL;
        sentence = "the worker's answer is not that of the run asked";
    }
    if (status == ATTN_OK && bytes > 0 && !pipe->run.mapped) {
        take_answer(pipe, data);
    }
    if (status == ATTN_OK && !pipe->replied) {
        *pipe->run.compute_ns = compute_ns;
    }
    set_reply(pipe, status, sentence);
    pipe->references++; /* done may give the pipe up */
    unlock_and_complete(pipe);
    pipe_unref(pipe);
}

void
pipe_cancel(pipe_t *pipe)
{
    pthread_mutex_lock(&pipe->lock);
    bool outstanding = pipe->op != PIPE_NONE;
    pipe->cancelled  = pipe->cancelled || outstanding;
    pipe->references++;
    pthread_mutex_unlock(&pipe->lock);
    if (outstanding) {
        pipe_close(pipe); /* its end completes the operation */
    }
    pipe_unref(pipe);
}

attn_status_t
pipes_init(pipes_t *pipes, rpc_client_t *rpc, const char *address)
{
    *pipes     = (pipes_t){0};
    pipes->rpc = rpc;
    snprintf(pipes->address, sizeof(pipes->address), "%s", address);
    attn_status_t status = rpc_channel_open(rpc, address, &pipes->channel);
    if (status == ATTN_OK) {
        pthread_mutex_init(&pipes->lock, NULL);
    }
    return status;
}

void
pipes_fini(pipes_t *pipes)
{
    while (pipes->idle != NULL) {
        pipe_t *pipe = pipes->idle;
        pipes->idle  = pipe->next;
        pipe_close(pipe);
        pipe_unref(pipe);
    }
    rpc_channel_close(pipes->channel);
    pthread_mutex_destroy(&pipes->lock);
}
