#include "echo_client.h"

#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void
echo_read(rpc_message_t *message, echo_answer_t *answer)
{
    ProtobufCMessage *head;

    answer->status = rpc_message_unpack(message, &echo__echo__descriptor, &head);
    if (answer->status == ATTN_OK) {
        const Echo__Echo *echo = (const Echo__Echo *)head;
        answer->number         = echo->number;
        answer->data_size      = rpc_message_data_size(message);
        snprintf(answer->text, sizeof(answer->text), "%s", echo->text);
        snprintf(answer->blob, sizeof(answer->blob), "%.*s", (int)echo->blob.len,
                 echo->blob.data == NULL ? "" : (const char *)echo->blob.data);

        uint8_t *data = malloc(answer->data_size + 1);
        rpc_message_data_copy(message, 0, data, answer->data_size);
        answer->data_sum = 0;
        for (uint64_t i = 0; i < answer->data_size; i++) {
            answer->data_sum = (uint8_t)(answer->data_sum + data[i]);
        }
        free(data);
    }
    rpc_message_free(message);
}

echo_answer_t
echo_call(rpc_channel_t *channel, const char *path, const char *text, uint64_t number, int signed_,
          const void *data, uint64_t size, uint64_t deadline_ns)
{
    echo_answer_t answer   = {0};
    Echo__Echo head        = ECHO__ECHO__INIT;
    uint8_t *zeros         = data == NULL ? calloc(1, size + 1) : NULL;
    struct iovec piece     = {.iov_base = data == NULL ? zeros : (void *)data, .iov_len = size};
    rpc_outgoing_t request = {.head = &head.base, .data = &piece, .n_data = size > 0};
    rpc_message_t *message = NULL;

    head.text     = (char *)text;
    head.number   = number;
    head.signed_  = signed_;
    answer.status = rpc_call_unary_wait(channel, path, &request, deadline_ns, &message);
    if (answer.status == ATTN_OK) {
        echo_read(message, &answer);
    } else {
        snprintf(answer.sentence, sizeof(answer.sentence), "%s", attn_last_error());
    }
    free(zeros);
    return answer;
}

void
echo_send(rpc_stream_t *stream, const char *text, uint64_t number, const void *data, uint64_t size,
          void (*sent)(void *), void *arg)
{
    Echo__Echo head        = ECHO__ECHO__INIT;
    struct iovec piece     = {.iov_base = (void *)data, .iov_len = size};
    rpc_outgoing_t message = {
        .head = &head.base, .data = &piece, .n_data = size > 0, .sent = sent, .arg = arg};

    head.text   = (char *)text;
    head.number = number;
    rpc_stream_send(stream, &message);
}

void
echo_received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    echo_log_t *log      = arg;
    echo_answer_t answer = {0};

    if (message == NULL) {
        log->status = status;
        snprintf(log->sentence, sizeof(log->sentence), "%s", sentence);
        atomic_fetch_add(&log->ends, 1);
        return;
    }
    while (log->holds != NULL && atomic_load(log->holds) > 0) {
        usleep(1000);
    }
    echo_read(message, &answer);
    if (answer.status != ATTN_OK || answer.number != (uint64_t)atomic_load(&log->messages) ||
        atomic_load(&log->ends) > 0) {
        atomic_store(&log->out_of_order, true);
    }
    atomic_fetch_add(&log->data_bytes, answer.data_size);
    atomic_fetch_add(&log->messages, 1);
}

typedef struct wanted {
    echo_log_t *log;
    int n;
} wanted_t;

static bool
has_messages(void *arg)
{
    wanted_t *wanted = arg;

    return atomic_load(&wanted->log->messages) >= wanted->n || atomic_load(&wanted->log->ends) > 0;
}

bool
echo_wait_messages(echo_log_t *log, int n)
{
    wanted_t wanted = {.log = log, .n = n};

    return rpc_client_wait(log->client, has_messages, &wanted, in_ms(ECHO_WAIT_MS)) &&
           atomic_load(&log->messages) >= n;
}

static bool
has_ended(void *arg)
{
    echo_log_t *log = arg;

    return atomic_load(&log->ends) > 0;
}

bool
echo_wait_end(echo_log_t *log)
{
    return rpc_client_wait(log->client, has_ended, log, in_ms(ECHO_WAIT_MS));
}

bool
echo_wait_count(const atomic_int *count, int n)
{
    uint64_t until = in_ms(ECHO_WAIT_MS);

    while (atomic_load(count) < n) {
        if (attn_now_ns() > until) {
            return false;
        }
        usleep(200);
    }
    return true;
}
