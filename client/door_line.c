/* door_line.c: a stream of steps. What comes in is queued by the progress thread and unpacked by
 * the thread that waits, so no other thread ever touches a caller's buffers. */
#include "client/door_int.h"

#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>

#define QUEUE_MAX 64u /* messages that wait: an answer of 2 MiB each */

struct line {
    door_t *door;
    rpc_stream_t *stream;
    pthread_mutex_t lock;
    uint32_t references; /* the stream's until its end came, and the owner's */
    rpc_message_t *queue[QUEUE_MAX];
    uint32_t n_queue;
    bool ended;
    attn_status_t status; /* of the end */
    char sentence[512];
    line_t *next; /* in the door's idle list */
};

static void
line_unref(line_t *line)
{
    pthread_mutex_lock(&line->lock);
    bool last = --line->references == 0;
    pthread_mutex_unlock(&line->lock);
    if (!last) {
        return;
    }
    for (uint32_t i = 0; i < line->n_queue; i++) {
        rpc_message_free(line->queue[i]);
    }
    pthread_mutex_destroy(&line->lock);
    free(line);
}

static void
on_received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    line_t *line = arg;

    pthread_mutex_lock(&line->lock);
    if (message != NULL && line->n_queue < QUEUE_MAX) {
        line->queue[line->n_queue++] = message;
    } else if (!line->ended) {
        line->ended  = true;
        line->status = message != NULL     ? ATTN_ERR_INTERNAL
                       : status != ATTN_OK ? status
                                           : ATTN_ERR_UNAVAILABLE;
        snprintf(line->sentence, sizeof(line->sentence), "%s",
                 message != NULL     ? "the coordinator sends more than was asked"
                 : status != ATTN_OK ? sentence
                                     : "the coordinator ended the stream");
        rpc_message_free(message);
    }
    pthread_mutex_unlock(&line->lock);
    if (message == NULL) {
        line_unref(line);
    }
}

static attn_status_t
line_open(door_t *door, line_t **line_p)
{
    line_t *line = calloc(1, sizeof(*line));

    if (line == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a stream");
    }
    line->door       = door;
    line->references = 2;
    pthread_mutex_init(&line->lock, NULL);
    attn_status_t status = rpc_stream_open(door->channel, "/attn.v1.Attention/Steps", UINT64_MAX,
                                           on_received, line, &line->stream);
    if (status != ATTN_OK) {
        pthread_mutex_destroy(&line->lock);
        free(line);
        return status;
    }
    *line_p = line;
    return ATTN_OK;
}

static void
line_close(line_t *line)
{
    rpc_stream_close(line->stream);
    line_unref(line);
}

static bool
line_stands(line_t *line)
{
    pthread_mutex_lock(&line->lock);
    bool stands = !line->ended && line->n_queue == 0;
    pthread_mutex_unlock(&line->lock);
    return stands;
}

attn_status_t
line_take(door_t *door, line_t **line_p)
{
    for (;;) {
        pthread_mutex_lock(&door->lock);
        line_t *line = door->idle;
        if (line != NULL) {
            door->idle = line->next;
        }
        pthread_mutex_unlock(&door->lock);
        if (line == NULL) {
            return line_open(door, line_p);
        }
        if (line_stands(line)) {
            *line_p = line;
            return ATTN_OK;
        }
        line_close(line);
    }
}

void
line_give(line_t *line, bool clean)
{
    door_t *door = line->door;

    if (!clean || !line_stands(line)) {
        line_close(line);
        return;
    }
    pthread_mutex_lock(&door->lock);
    line->next = door->idle;
    door->idle = line;
    pthread_mutex_unlock(&door->lock);
}

void
lines_close(door_t *door)
{
    while (door->idle != NULL) {
        line_t *line = door->idle;
        door->idle   = line->next;
        line_close(line);
    }
}

void
line_send(line_t *line, const Attn__V1__StepRequest *request, const struct iovec *data,
          uint32_t n_data)
{
    rpc_stream_send(line->stream,
                    &(rpc_outgoing_t){.head = &request->base, .data = data, .n_data = n_data});
}

static bool
has_news(void *arg)
{
    line_t *line = arg;

    pthread_mutex_lock(&line->lock);
    bool news = line->ended || line->n_queue > 0;
    pthread_mutex_unlock(&line->lock);
    return news;
}

attn_status_t
line_next(line_t *line, uint64_t deadline_ns, Attn__V1__StepReply **reply_p,
          rpc_message_t **message_p)
{
    rpc_message_t *message = NULL;
    attn_status_t status   = ATTN_OK;

    if (!rpc_client_wait(line->door->rpc, has_news, line, deadline_ns)) {
        return attn_fail(ATTN_ERR_DEADLINE, "the deadline passed before the coordinator answered");
    }
    pthread_mutex_lock(&line->lock);
    if (line->n_queue > 0) {
        message = line->queue[0];
        for (uint32_t i = 1; i < line->n_queue; i++) {
            line->queue[i - 1] = line->queue[i];
        }
        line->n_queue--;
    } else {
        status = attn_fail(line->status, "%s", line->sentence);
    }
    pthread_mutex_unlock(&line->lock);
    if (status == ATTN_OK) {
        status = rpc_message_unpack(message, &attn__v1__step_reply__descriptor,
                                    (ProtobufCMessage **)reply_p);
    }
    if (status == ATTN_OK && (*reply_p)->status != NULL && (*reply_p)->status->code != 0) {
        int code = (*reply_p)->status->code;
        status   = attn_fail(attn_status_is_known(code) ? (attn_status_t)code : ATTN_ERR_INTERNAL,
                           "%s", (*reply_p)->status->message);
    }
    if (status != ATTN_OK) {
        rpc_message_free(message);
        return status;
    }
    *message_p = message;
    return ATTN_OK;
}
