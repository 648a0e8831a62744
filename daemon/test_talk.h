/* test_talk.h: a Steps stream as a client sees it, for tests: every reply is kept. */
#ifndef ATTN_DAEMON_TEST_TALK_H
#define ATTN_DAEMON_TEST_TALK_H

#include "base/clock.h"
#include "daemon/steps.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#define TALK_WAIT_NS (UINT64_C(60000) * ATTN_NS_PER_MS) /* for what must come */
#define TALK_REPLIES 64u

typedef struct reply {
    attn_status_t status;
    char sentence[256];
    int op;
    uint64_t step_id, offset, total;
    uint8_t *data;
    uint64_t size;
} reply_t;

typedef struct talk {
    rpc_client_t *rpc;
    rpc_stream_t *stream;
    pthread_mutex_t lock;
    reply_t replies[TALK_REPLIES];
    uint32_t n, read;
    bool ended;
    attn_status_t end;
} talk_t;

static void
take_reply(talk_t *talk, rpc_message_t *message)
{
    ProtobufCMessage *head;
    reply_t *r = &talk->replies[talk->n];

    assert_true(talk->n < TALK_REPLIES);
    assert_int_equal(rpc_message_unpack(message, &attn__v1__step_reply__descriptor, &head),
                     ATTN_OK);
    const Attn__V1__StepReply *reply = (const Attn__V1__StepReply *)head;
    r->op                            = (int)reply->op_case;
    if (reply->status != NULL) {
        r->status = (attn_status_t)reply->status->code;
        snprintf(r->sentence, sizeof(r->sentence), "%s", reply->status->message);
    }
    if (reply->op_case == ATTN__V1__STEP_REPLY__OP_BEGIN) {
        r->step_id = reply->begin->step_id;
    } else if (reply->op_case == ATTN__V1__STEP_REPLY__OP_RUN) {
        r->offset = reply->run->offset;
        r->total  = reply->run->total;
        r->size   = rpc_message_data_size(message);
        r->data   = malloc(r->size + 1);
        rpc_message_data_copy(message, 0, r->data, r->size);
    }
    talk->n++;
}

static void
received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    talk_t *talk = arg;

    (void)sentence;
    pthread_mutex_lock(&talk->lock);
    if (message != NULL) {
        take_reply(talk, message);
        rpc_message_free(message);
    } else {
        talk->ended = true;
        talk->end   = status;
    }
    pthread_mutex_unlock(&talk->lock);
}

static talk_t *
talk_open(rpc_client_t *rpc, rpc_channel_t *channel)
{
    talk_t *talk = calloc(1, sizeof(*talk));

    assert_non_null(talk);
    talk->rpc = rpc;
    pthread_mutex_init(&talk->lock, NULL);
    assert_int_equal(rpc_stream_open(channel, "/attn.v1.Attention/Steps",
                                     attn_now_ns() + TALK_WAIT_NS, received, talk, &talk->stream),
                     ATTN_OK);
    return talk;
}

static bool
has_reply(void *arg)
{
    talk_t *talk = arg;

    pthread_mutex_lock(&talk->lock);
    bool has = talk->n > talk->read || talk->ended;
    pthread_mutex_unlock(&talk->lock);
    return has;
}

static bool
has_ended(void *arg)
{
    talk_t *talk = arg;

    pthread_mutex_lock(&talk->lock);
    bool ended = talk->ended;
    pthread_mutex_unlock(&talk->lock);
    return ended;
}

static reply_t *
talk_reply(talk_t *talk)
{
    assert_true(rpc_client_wait(talk->rpc, has_reply, talk, attn_now_ns() + TALK_WAIT_NS));
    pthread_mutex_lock(&talk->lock);
    bool any       = talk->n > talk->read;
    reply_t *reply = &talk->replies[talk->read++];
    pthread_mutex_unlock(&talk->lock);
    assert_true(any);
    return reply;
}

static attn_status_t
talk_end(talk_t *talk)
{
    assert_true(rpc_client_wait(talk->rpc, has_ended, talk, attn_now_ns() + TALK_WAIT_NS));
    pthread_mutex_lock(&talk->lock);
    attn_status_t end = talk->end;
    pthread_mutex_unlock(&talk->lock);
    return end;
}

static void
talk_close(talk_t *talk)
{
    rpc_stream_close(talk->stream);
    talk->stream = NULL;
    talk_end(talk);
    for (uint32_t i = 0; i < talk->n; i++) {
        free(talk->replies[i].data);
    }
    pthread_mutex_destroy(&talk->lock);
    free(talk);
}

static uint64_t
talk_begin(talk_t *talk)
{
    Attn__V1__BeginStepRequest begin = ATTN__V1__BEGIN_STEP_REQUEST__INIT;
    Attn__V1__StepRequest request    = ATTN__V1__STEP_REQUEST__INIT;

    request.op_case = ATTN__V1__STEP_REQUEST__OP_BEGIN;
    request.begin   = &begin;
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
    reply_t *reply = talk_reply(talk);
    assert_int_equal(reply->status, ATTN_OK);
    assert_int_equal(reply->op, ATTN__V1__STEP_REPLY__OP_BEGIN);
    return reply->step_id;
}

/* One part of a run. */
static void
talk_part(talk_t *talk, uint64_t id, uint32_t layer, uint64_t offset, uint64_t total,
          const uint8_t *data, uint64_t size)
{
    Attn__V1__RunRequest run      = ATTN__V1__RUN_REQUEST__INIT;
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;
    struct iovec piece            = {.iov_base = (void *)data, .iov_len = size};

    run.step_id     = id;
    run.layer       = layer;
    run.offset      = offset;
    run.total       = total;
    request.op_case = ATTN__V1__STEP_REQUEST__OP_RUN;
    request.run     = &run;
    rpc_stream_send(talk->stream,
                    &(rpc_outgoing_t){.head = &request.base, .data = &piece, .n_data = 1});
}

static void
talk_commit(talk_t *talk, uint64_t id)
{
    Attn__V1__CommitRequest commit = ATTN__V1__COMMIT_REQUEST__INIT;
    Attn__V1__StepRequest request  = ATTN__V1__STEP_REQUEST__INIT;

    commit.step_id  = id;
    request.op_case = ATTN__V1__STEP_REQUEST__OP_COMMIT;
    request.commit  = &commit;
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
}

#endif
