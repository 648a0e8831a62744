/*
 * stream.c: a bidirectional stream, on the client.
 *
 * Batches in flight, each at most once: the initial metadata both ways with RECV_STATUS,
 * whose event is the stream's end; RECV_MESSAGE; and SEND_MESSAGE, perhaps with the
 * half-close. Reading goes on until it gives nothing, and only then, with the status in
 * as well, is the end told: so it comes after the last message in whatever order C core
 * reports the two. A user who has all of an answer may let it rest until the next message is
 * sent: as a read starts, C core tells the peer that it may send as much again, which alone is
 * a write, and a peer woken for nothing, but goes along with a message. Callbacks come from the one
 * thread that dispatches the client's events, hence one after the other.
 *
 * Two hold the memory: the user until rpc_stream_close(), and the wire until the end was
 * told and the last batch is back.
 */
#include "rpc/rpc_int.h"

#include "base/status.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdio.h>

struct rpc_stream {
    rpc_client_t *client; /* outlives the channel here: sends may come after the end */
    rpc_pending_t pending;
    rpc_reply_fn received;
    void (*taken)(void *arg); /* NULL: nobody counts */
    void *arg;
    grpc_metadata_array initial;
    rpc_end_t end;
    rpc_op_t op_read, op_send, op_end;
    grpc_byte_buffer *read_buffer;
    atomic_uint refs;

    pthread_mutex_t lock;
    unsigned ops;         /* batches in flight */
    bool sending;         /* SEND_MESSAGE or the half-close is in flight */
    bool broken;          /* nothing can be sent any more */
    bool finish;          /* half-close after what is queued */
    bool finished;        /* half-closed */
    bool read_all;        /* RECV_MESSAGE gave nothing */
    bool ended;           /* RECV_STATUS is in */
    bool telling;         /* `received` is being told the end */
    bool told;            /* it was */
    bool off_wire;        /* the wire's hold is given up */
    bool closed;          /* by the user */
    bool resting;         /* nothing is to be read before something is sent */
    bool read_due;        /* and so nothing is being read */
    attn_status_t failed; /* why we cancelled it ourselves; ATTN_OK: we did not */
    char sentence[RPC_SENTENCE_MAX + 1];
    rpc_queue_t queue;
    rpc_packet_t *send_packet;
};

static void
stream_unref(rpc_stream_t *stream)
{
    if (atomic_fetch_sub(&stream->refs, 1) != 1) {
        return;
    }
    rpc_client_unref(stream->client);
    rpc_end_destroy(&stream->end);
    grpc_metadata_array_destroy(&stream->initial);
    pthread_mutex_destroy(&stream->lock);
    gpr_free(stream);
}

/* Let go of the lock, of packets that will not be sent, and of the wire's hold; every
 * function that takes the lock gives it back here. */
static void
stream_release(rpc_stream_t *stream)
{
    bool off             = stream->told && stream->ops == 0 && !stream->off_wire;
    rpc_packet_t *unsent = stream->broken ? rpc_queue_take(&stream->queue) : NULL;

    stream->off_wire = stream->off_wire || off;
    pthread_mutex_unlock(&stream->lock);
    rpc_packet_free(unsent);
    if (off) {
        rpc_pending_end(&stream->pending);
        stream_unref(stream);
    }
}

/* ---- sending ---- */

/* Fill ops with what may be sent next. @return how many; 0: nothing, or not now */
static size_t
next_send(rpc_stream_t *stream, grpc_op ops[2])
{
    size_t n = 0;

    if (stream->sending || stream->broken || stream->finished) {
        return 0;
    }
    rpc_packet_t *packet = rpc_queue_pop(&stream->queue);
    bool finish          = stream->finish && stream->queue.head == NULL;
    memset(ops, 0, 2 * sizeof(*ops));
    stream->send_packet = packet;
    if (packet != NULL) {
        ops[n].op                               = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = packet->buffer;
    }
    if (finish) {
        ops[n++].op      = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
        stream->finished = true;
    }
    if (n > 0) {
        stream->sending = true;
        stream->ops++;
    }
    return n;
}

/* The read that rested, if it did, is to be started: by the caller, without the lock. */
static bool
take_read(rpc_stream_t *stream)
{
    bool due = stream->read_due;

    stream->resting = stream->read_due = false;
    return due;
}

static void
start_read(rpc_stream_t *stream)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};

    op.data.recv_message.recv_message = &stream->read_buffer;
    rpc_start(stream->pending.grpc, &op, 1, &stream->op_read);
}

/* Send what there is; takes the lock's place like stream_release(). */
static void
stream_pump(rpc_stream_t *stream)
{
    grpc_op ops[2];
    grpc_call *grpc = stream->pending.grpc;
    size_t n        = next_send(stream, ops);
    bool read       = n > 0 && take_read(stream);

    stream_release(stream);
    if (n > 0) {
        rpc_start(grpc, ops, n, &stream->op_send); /* the batch keeps the stream alive */
    }
    if (read) {
        start_read(stream); /* and so does the read, which counts since it rests */
    }
}

static void
on_sent(rpc_op_t *op, bool ok)
{
    rpc_stream_t *stream = RPC_OF(rpc_stream_t, op_send, op);

    pthread_mutex_lock(&stream->lock);
    rpc_packet_t *packet = stream->send_packet;
    stream->send_packet  = NULL;
    stream->sending      = false;
    stream->ops--;
    stream->broken = stream->broken || !ok; /* the status tells why */
    bool tell      = ok && packet != NULL && stream->taken != NULL && !stream->telling;
    if (tell) {
        stream->ops++; /* the memory's, while we are away */
    }
    stream_pump(stream);
    rpc_packet_free(packet);
    if (tell) {
        stream->taken(stream->arg);
        pthread_mutex_lock(&stream->lock);
        stream->ops--;
        stream_release(stream);
    }
}

/* Cancel, with the lock held and given back. A stream off the wire has nothing to cancel. */
static void
stream_cancel(rpc_stream_t *stream)
{
    grpc_call *grpc = stream->off_wire || stream->ended ? NULL : stream->pending.grpc;

    stream->broken = true;
    if (grpc != NULL) {
        grpc_call_ref(grpc); /* the stream may end while it is being cancelled */
    }
    stream_release(stream);
    if (grpc != NULL) {
        grpc_call_cancel_with_status(grpc, GRPC_STATUS_CANCELLED, "the stream was closed", NULL);
        grpc_call_unref(grpc);
    }
}

/* A message cannot be sent, and those after it must not be without it. */
static void
stream_fail(rpc_stream_t *stream, attn_status_t status)
{
    pthread_mutex_lock(&stream->lock);
    if (stream->failed == ATTN_OK && !stream->telling) {
        stream->failed = status;
        snprintf(stream->sentence, sizeof(stream->sentence), "%s", attn_last_error());
    }
    stream_cancel(stream);
}

void
rpc_stream_send(rpc_stream_t *stream, const rpc_outgoing_t *message)
{
    rpc_packet_t *packet = NULL;
    attn_status_t status = rpc_packet_make(message, stream->client, &packet);

    if (status != ATTN_OK) {
        stream_fail(stream, status);
        return;
    }
    pthread_mutex_lock(&stream->lock);
    bool full = stream->queue.head != NULL && stream->queue.bytes + packet->bytes > RPC_QUEUE_MAX;
    if (stream->broken || stream->finish || full) {
        uint64_t waiting = stream->queue.bytes;
        bool fail        = full && !stream->broken && !stream->finish;
        stream_release(stream);
        rpc_packet_free(packet);
        if (fail) {
            stream_fail(stream, attn_fail(ATTN_ERR_EXHAUSTED,
                                          "%llu bytes wait for a peer that does not read",
                                          (unsigned long long)waiting));
        }
        return;
    }
    rpc_queue_push(&stream->queue, packet);
    stream_pump(stream);
}

void
rpc_stream_on_taken(rpc_stream_t *stream, void (*taken)(void *arg))
{
    pthread_mutex_lock(&stream->lock);
    stream->taken = taken;
    stream_release(stream);
}

void
rpc_stream_finish(rpc_stream_t *stream)
{
    pthread_mutex_lock(&stream->lock);
    stream->finish = true;
    stream_pump(stream);
}

/* ---- receiving ---- */

void
rpc_stream_rest(rpc_stream_t *stream)
{
    pthread_mutex_lock(&stream->lock);
    stream->resting = true;
    stream_release(stream);
}

/* Tell the end once both its parts are in; takes the lock's place like stream_release(). */
static void
tell_end(rpc_stream_t *stream)
{
    if (!stream->read_all || !stream->ended || stream->telling) {
        stream_release(stream);
        return;
    }
    attn_status_t status = stream->failed;
    stream->telling      = true;
    if (status == ATTN_OK) {
        status = rpc_end_status(&stream->end, stream->pending.channel, stream->sentence);
    }
    pthread_mutex_unlock(&stream->lock);
    stream->received(stream->arg, status, stream->sentence, NULL);
    pthread_mutex_lock(&stream->lock);
    stream->told = true;
    stream_release(stream);
}

static void
on_read(rpc_op_t *op, bool ok)
{
    rpc_stream_t *stream     = RPC_OF(rpc_stream_t, op_read, op);
    grpc_byte_buffer *buffer = stream->read_buffer;

    stream->read_buffer = NULL;
    if (!ok || buffer == NULL) {
        pthread_mutex_lock(&stream->lock);
        stream->ops--;
        stream->read_all = true;
        tell_end(stream);
        return;
    }
    rpc_channel_heard(stream->pending.channel);
    pthread_mutex_lock(&stream->lock);
    bool wanted = !stream->closed;
    pthread_mutex_unlock(&stream->lock);
    if (wanted) {
        stream->received(stream->arg, ATTN_OK, "", rpc_message_new(buffer));
    } else {
        grpc_byte_buffer_destroy(buffer);
    }
    pthread_mutex_lock(&stream->lock);
    stream->read_due = stream->resting && !stream->broken && !stream->finished;
    bool read        = !stream->read_due;
    stream_release(stream);
    if (read) {
        start_read(stream); /* in the place of the one that ended, so ops stays */
    }
}

static void
on_end(rpc_op_t *op, bool ok)
{
    rpc_stream_t *stream = RPC_OF(rpc_stream_t, op_end, op);

    (void)ok;
    pthread_mutex_lock(&stream->lock);
    stream->ops--;
    stream->ended = stream->broken = true;
    bool read                      = take_read(stream);
    tell_end(stream);
    if (read) {
        start_read(stream); /* which finds what else came, and then nothing */
    }
}

/* ---- life ---- */

attn_status_t
rpc_stream_open(rpc_channel_t *channel, const char *path, uint64_t deadline_ns,
                rpc_reply_fn received, void *arg, rpc_stream_t **stream_p)
{
    rpc_stream_t *stream = gpr_zalloc(sizeof(*stream));

    stream->client   = rpc_channel_client(channel);
    stream->received = received;
    stream->arg      = arg;
    stream->op_read  = (rpc_op_t){on_read};
    stream->op_send  = (rpc_op_t){on_sent};
    stream->op_end   = (rpc_op_t){on_end};
    stream->ops      = 2; /* op_end and op_read */
    atomic_init(&stream->refs, 2);
    pthread_mutex_init(&stream->lock, NULL);
    grpc_metadata_array_init(&stream->initial);
    rpc_end_init(&stream->end);
    rpc_client_ref(stream->client);
    rpc_pending_begin(&stream->pending, channel, path, deadline_ns);
    *stream_p = stream; /* before anything can be received */

    grpc_op ops[3] = {
        rpc_pending_first(&stream->pending),
        {.op = GRPC_OP_RECV_INITIAL_METADATA},
        rpc_end_op(&stream->end),
    };
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &stream->initial;
    rpc_start(stream->pending.grpc, ops, 3, &stream->op_end);
    start_read(stream);
    return ATTN_OK;
}

void
rpc_stream_close(rpc_stream_t *stream)
{
    if (stream == NULL) {
        return;
    }
    pthread_mutex_lock(&stream->lock);
    assert(!stream->closed);
    stream->closed = true;
    stream_cancel(stream);
    stream_unref(stream);
}
