/* echo_client.h: calls of the echo service, in the form that tests like them. */
#ifndef ATTN_RPC_ECHO_CLIENT_H
#define ATTN_RPC_ECHO_CLIENT_H

#include "rpc/rpc.h"

#include "base/clock.h"
#include "echo.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>

/** What came back from a unary call: the status, and the message's main fields. */
typedef struct echo_answer {
    attn_status_t status;
    char sentence[512];
    uint64_t number;
    char text[128], blob[128];
    uint64_t data_size;
    uint8_t data_sum; /* of all bytes */
} echo_answer_t;

/** What came over a stream, and how it ended. */
typedef struct echo_log {
    rpc_client_t *client;
    atomic_int messages, ends;
    atomic_ullong data_bytes;
    atomic_bool out_of_order; /* numbers are to be 0, 1, 2 ... */
    attn_status_t status;     /* of the end */
    char sentence[512];
    atomic_int *holds; /* callbacks wait while it is above 0, to be a slow reader; or NULL */
} echo_log_t;

#define ECHO_WAIT_MS 60000u /* for what must come: a sanitizer on a busy machine takes its time */

static inline uint64_t
in_ms(uint64_t ms)
{
    return attn_now_ns() + ms * ATTN_NS_PER_MS;
}

/** Call and wait. data may be NULL: size zeros are sent then. */
echo_answer_t echo_call(rpc_channel_t *channel, const char *path, const char *text, uint64_t number,
                        int signed_, const void *data, uint64_t size, uint64_t deadline_ns);

/** Take a message apart (and free it). */
void echo_read(rpc_message_t *message, echo_answer_t *answer);

/** Send over a stream; sent may be NULL. */
void echo_send(rpc_stream_t *stream, const char *text, uint64_t number, const void *data,
               uint64_t size, void (*sent)(void *), void *arg);

/** rpc_reply_fn of a stream, with an echo_log_t. */
void echo_received(void *log, attn_status_t status, const char *sentence, rpc_message_t *message);

/** Wait until so many messages are in, or the end is. @return false after 10 s */
bool echo_wait_messages(echo_log_t *log, int n);
bool echo_wait_end(echo_log_t *log);

/** Wait until a counter that is not the client's reaches n. @return false after 10 s */
bool echo_wait_count(const atomic_int *count, int n);

#endif
