/*
 * echo_server.c: what a message asks for by its text:
 *
 *   (none)    the message back, with its data
 *   fail      end with status `signed` and the sentence "as asked: NUMBER"
 *   sleep     the message back after `number` ms, or the end when the call is cancelled
 *   later     the same from another thread, the handler returning at once
 *   big       `number` bytes of data back
 *   deadline  the ms that are left, as number
 *   who       the peer as text and the user agent as blob
 *   header    the value of the header echo-header, or none
 *   flood     (stream) `number` messages of 1 MiB, until one is refused
 *   deaf      (stream) read no more
 */
#include "echo_server.h"

#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct request {
    echo_server_t *echo;
    rpc_call_t *call;
    rpc_message_t *message;
    Echo__Echo *head;
    bool streaming;
} request_t;

static void
answer(const request_t *r, const Echo__Echo *head, const void *data, uint64_t size,
       void (*sent)(void *), void *arg)
{
    struct iovec piece      = {.iov_base = (void *)data, .iov_len = size};
    rpc_outgoing_t outgoing = {
        .head = &head->base, .data = &piece, .n_data = size > 0, .sent = sent, .arg = arg};

    if (r->streaming) {
        rpc_call_send(r->call, &outgoing);
    } else {
        rpc_call_reply(r->call, &outgoing);
    }
}

static void
echo_back(const request_t *r)
{
    uint64_t size = rpc_message_data_size(r->message);
    uint8_t *data = malloc(size + 1);

    rpc_message_data_copy(r->message, 0, data, size);
    answer(r, r->head, data, size, free, data);
}

/* Sleep for the asked time, unless the call is cancelled. */
static void
sleep_and_echo(const request_t *r)
{
    uint64_t until = attn_now_ns() + r->head->number * ATTN_NS_PER_MS;

    while (attn_now_ns() < until && !rpc_call_cancelled(r->call)) {
        usleep(500);
    }
    if (rpc_call_cancelled(r->call)) {
        atomic_fetch_add(&r->echo->cancelled, 1);
        rpc_call_end(r->call, ATTN_ERR_CANCELLED, "cancelled while asleep");
    } else {
        echo_back(r);
    }
}

static void *
answer_later(void *arg)
{
    request_t *r = arg;

    sleep_and_echo(r);
    rpc_message_free(r->message);
    free(r);
    return NULL;
}

static void
start_later(const request_t *r)
{
    request_t *copy = malloc(sizeof(*copy));
    pthread_t thread;

    *copy = *r;
    if (pthread_create(&thread, NULL, answer_later, copy) != 0) {
        abort();
    }
    pthread_detach(thread);
}

static void
flood(const request_t *r)
{
    static const uint8_t zeros[1 << 20];
    struct iovec piece      = {.iov_base = (void *)zeros, .iov_len = sizeof(zeros)};
    Echo__Echo head         = ECHO__ECHO__INIT;
    rpc_outgoing_t outgoing = {.head = &head.base, .data = &piece, .n_data = 1};
    attn_status_t status    = ATTN_OK;

    for (uint64_t i = 0; i < r->head->number && status == ATTN_OK; i++) {
        head.number = i;
        status      = rpc_call_send(r->call, &outgoing);
        if (status == ATTN_OK) {
            atomic_fetch_add(&r->echo->flooded, 1);
        }
    }
    atomic_store(&r->echo->flood_status, status);
    atomic_store(&r->echo->floods, 0);
}

static void
big(const request_t *r)
{
    uint8_t *data = calloc(1, r->head->number + 1);

    answer(r, r->head, data, r->head->number, free, data);
}

static void
who(const request_t *r)
{
    const char *agent = rpc_call_metadata(r->call, "user-agent");

    r->head->text = (char *)rpc_call_peer(r->call);
    if (agent != NULL && rpc_call_metadata(r->call, "no-such-key") == NULL) {
        r->head->blob.data = (uint8_t *)agent;
        r->head->blob.len  = strlen(agent);
    }
    answer(r, r->head, NULL, 0, NULL, NULL);
}

/* @return whether the message is still in use */
static bool
obey(const request_t *r)
{
    const char *text = r->head->text;

    if (strcmp(text, "fail") == 0) {
        char sentence[64];
        snprintf(sentence, sizeof(sentence), "as asked: %llu", (unsigned long long)r->head->number);
        rpc_call_end(r->call, (attn_status_t)r->head->signed_, sentence);
    } else if (strcmp(text, "sleep") == 0) {
        sleep_and_echo(r);
    } else if (strcmp(text, "later") == 0) {
        start_later(r);
        return true;
    } else if (strcmp(text, "big") == 0) {
        big(r);
    } else if (strcmp(text, "deadline") == 0) {
        uint64_t deadline = rpc_call_deadline_ns(r->call), now = attn_now_ns();
        r->head->number = deadline == UINT64_MAX ? UINT64_MAX : (deadline - now) / ATTN_NS_PER_MS;
        answer(r, r->head, NULL, 0, NULL, NULL);
    } else if (strcmp(text, "who") == 0) {
        who(r);
    } else if (strcmp(text, "header") == 0) {
        const char *value = rpc_call_metadata(r->call, "echo-header");
        r->head->text     = (char *)(value != NULL ? value : "none");
        answer(r, r->head, NULL, 0, NULL, NULL);
    } else if (strcmp(text, "flood") == 0) {
        flood(r);
    } else {
        echo_back(r);
    }
    return false;
}

static void
handle(echo_server_t *echo, rpc_call_t *call, rpc_message_t *message, bool streaming)
{
    request_t r = {.echo = echo, .call = call, .message = message, .streaming = streaming};
    ProtobufCMessage *head;

    atomic_fetch_add(&echo->handled, 1);
    attn_status_t status = rpc_message_unpack(message, &echo__echo__descriptor, &head);
    if (status != ATTN_OK) {
        rpc_call_end(call, status, attn_last_error());
        rpc_message_free(message);
        return;
    }
    r.head    = (Echo__Echo *)head;
    bool more = streaming && strcmp(r.head->text, "deaf") != 0;
    if (!obey(&r)) {
        rpc_message_free(message);
    }
    if (more) {
        rpc_call_next(call, 0);
    }
}

static void
unary(void *service, rpc_call_t *call, rpc_message_t *message)
{
    echo_server_t *echo = service;

    atomic_fetch_add(&echo->handling, 1);
    assert(message != NULL);
    handle(echo, call, message, false);
    atomic_fetch_sub(&echo->handling, 1);
}

/* The context of a stream: how many of its handlers run, which is to be one at most. */
static void
stream(void *service, rpc_call_t *call, rpc_message_t *message)
{
    echo_server_t *echo = service;
    atomic_int *inside  = rpc_call_context(call);

    if (inside == NULL) {
        inside = calloc(1, sizeof(*inside));
        rpc_call_set_context(call, inside);
    }
    int n = atomic_fetch_add(inside, 1) + 1;
    if (n > atomic_load(&echo->in_one_call_max)) {
        atomic_store(&echo->in_one_call_max, n);
    }
    atomic_fetch_add(&echo->handling, 1);
    if (message == NULL) {
        rpc_call_end(call, ATTN_OK, "");
    } else {
        handle(echo, call, message, true);
    }
    atomic_fetch_sub(inside, 1);
    atomic_fetch_sub(&echo->handling, 1);
}

static void
closed(void *service, rpc_call_t *call)
{
    echo_server_t *echo = service;
    atomic_int *inside  = rpc_call_context(call);

    assert(inside == NULL || atomic_load(inside) == 0);
    free(inside);
    atomic_fetch_add(&echo->closed, 1);
}

attn_status_t
echo_server_start(echo_server_t *echo, const rpc_server_options_t *options)
{
    static const rpc_method_t methods[] = {
        {.path = ECHO_UNARY, .handle = unary},
        {.path = ECHO_TRACKED, .handle = unary, .closed = closed},
        {.path = ECHO_STREAM, .streaming = true, .handle = stream, .closed = closed},
    };

    memset(echo, 0, sizeof(*echo));
    attn_status_t status = rpc_server_create(options, &echo->server);
    if (status != ATTN_OK) {
        return status;
    }
    status = rpc_server_add(echo->server, methods, 3, echo);
    if (status == ATTN_OK) {
        status = rpc_server_start(echo->server);
    }
    if (rpc_server_port(echo->server) != 0) {
        snprintf(echo->address, sizeof(echo->address), "127.0.0.1:%u",
                 rpc_server_port(echo->server));
    } else {
        snprintf(echo->address, sizeof(echo->address), "%s", options->address);
    }
    return status;
}

void
echo_server_stop(echo_server_t *echo, uint32_t grace_ms)
{
    if (echo->server != NULL) {
        rpc_server_stop(echo->server, grace_ms);
        rpc_server_destroy(echo->server);
        echo->server = NULL;
    }
}
