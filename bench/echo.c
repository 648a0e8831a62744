/*
 * echo.c: see echo.h. A message's first four bytes are the size of the answer.
 *
 * A round trip on a stream is one batch on either side: the server's sends the answer and asks
 * for the next message, the client's sends a message and asks for its answer. That is the least
 * that C core lets one do.
 */
#include "bench/echo.h"

#include <dlfcn.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define COPY_MAX 2048u /* up to here one slice that is copied is cheaper than two */
#define REQUESTS 16    /* calls that C core may have ready for the server */

#define STREAM_METHOD "/echo/Stream"
#define UNARY_METHOD "/echo/Unary"

static uint8_t payload[ECHO_BYTES_MAX], landing[ECHO_BYTES_MAX];

static void
check(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "echo: %s failed\n", what);
        exit(1);
    }
}

/* As rpc/core.c does: the floor is to be C core at its best. */
static void
init_core(void)
{
    void *set = dlsym(RTLD_DEFAULT,
                      "_ZN4absl7debian329SetMutexDeadlockDetectionModeENS0_15OnDeadlockCycleE");

    if (set != NULL) {
        ((void (*)(int))(uintptr_t)set)(0);
    }
    grpc_init();
}

static uint64_t
now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The same waiting as that of attnd's servers and clients. */
static grpc_event
next_event(grpc_completion_queue *queue, uint64_t spin_ns)
{
    if (spin_ns > 0) {
        uint64_t until = now_ns() + spin_ns;
        do {
            grpc_event event =
                grpc_completion_queue_next(queue, gpr_time_0(GPR_CLOCK_MONOTONIC), NULL);
            if (event.type != GRPC_QUEUE_TIMEOUT) {
                return event;
            }
            sched_yield();
        } while (now_ns() < until);
    }
    return grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

/* ---- messages ---- */

/* A message of `bytes` that asks for an answer of `answer`. */
static grpc_byte_buffer *
message_make(uint32_t bytes, uint32_t answer)
{
    grpc_slice slices[2];
    uint32_t head = bytes <= COPY_MAX ? bytes : sizeof(answer);

    slices[0] = grpc_slice_malloc(head);
    memcpy(GRPC_SLICE_START_PTR(slices[0]), payload, head);
    memcpy(GRPC_SLICE_START_PTR(slices[0]), &answer, head < sizeof(answer) ? head : sizeof(answer));
    slices[1]                = grpc_slice_from_static_buffer(payload, bytes - head);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, bytes > head ? 2 : 1);
    grpc_slice_unref(slices[0]);
    return buffer;
}

/* Copy a message out and free it. @return its bytes; *answer is what it asks for */
static uint32_t
message_take(grpc_byte_buffer *buffer, uint32_t *answer)
{
    grpc_byte_buffer_reader reader;
    grpc_slice *slice;
    size_t n = 0;

    check(grpc_byte_buffer_reader_init(&reader, buffer), "reading a message");
    while (grpc_byte_buffer_reader_peek(&reader, &slice)) {
        check(n + GRPC_SLICE_LENGTH(*slice) <= sizeof(landing), "a message of that size");
        memcpy(landing + n, GRPC_SLICE_START_PTR(*slice), GRPC_SLICE_LENGTH(*slice));
        n += GRPC_SLICE_LENGTH(*slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
    memcpy(answer, landing, sizeof(*answer));
    return (uint32_t)n;
}

static void
start(grpc_call *call, const grpc_op *ops, size_t n, void *tag)
{
    check(grpc_call_start_batch(call, ops, n, tag, NULL) == GRPC_CALL_OK, "starting a batch");
}

/* ---- the server ---- */

typedef struct served served_t;

typedef struct tag {
    served_t *call;
    enum { CALLED, MESSAGE, CLOSED } kind;
} tag_t;

struct served {
    grpc_call *grpc;
    grpc_call_details details;
    grpc_metadata_array metadata;
    tag_t called, message, closed;
    bool streaming, greeted, ended;
    int cancelled;
    unsigned batches; /* in flight */
    grpc_byte_buffer *in, *out;
};

typedef struct server {
    grpc_server *grpc;
    grpc_completion_queue *queue;
} server_t;

static void
request_call(const server_t *server)
{
    served_t *c = calloc(1, sizeof(*c));

    check(c != NULL, "allocating");
    c->called  = (tag_t){c, CALLED};
    c->message = (tag_t){c, MESSAGE};
    c->closed  = (tag_t){c, CLOSED};
    grpc_call_details_init(&c->details);
    grpc_metadata_array_init(&c->metadata);
    check(grpc_server_request_call(server->grpc, &c->grpc, &c->details, &c->metadata, server->queue,
                                   server->queue, &c->called) == GRPC_CALL_OK,
          "asking for a call");
}

static void
serve_begin(const server_t *server, served_t *c)
{
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    grpc_op read  = {.op = GRPC_OP_RECV_MESSAGE};

    request_call(server);
    c->streaming = grpc_slice_str_cmp(c->details.method, STREAM_METHOD) == 0;
    c->batches   = 2;
    close.data.recv_close_on_server.cancelled = &c->cancelled;
    read.data.recv_message.recv_message       = &c->in;
    start(c->grpc, &close, 1, &c->closed);
    start(c->grpc, &read, 1, &c->message);
}

/* Answer the message that came in, and on a stream ask for the next; none came: end the call. */
static void
serve_message(served_t *c)
{
    grpc_op ops[4] = {{0}};
    size_t n       = 0;
    uint32_t answer;

    if (!c->greeted) {
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    c->greeted = true;
    c->ended   = c->in == NULL || !c->streaming;
    if (c->in != NULL) {
        message_take(c->in, &answer);
        c->in                                   = NULL;
        c->out                                  = message_make(answer, 0);
        ops[n].op                               = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = c->out;
    }
    if (c->ended) {
        ops[n].op                                    = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n++].data.send_status_from_server.status = GRPC_STATUS_OK;
    } else {
        ops[n].op                               = GRPC_OP_RECV_MESSAGE;
        ops[n++].data.recv_message.recv_message = &c->in;
    }
    c->batches++;
    start(c->grpc, ops, n, &c->message);
}

static void
serve_event(const server_t *server, grpc_event event)
{
    const tag_t *tag = event.tag;
    served_t *c      = tag->call;

    if (tag->kind == CALLED) {
        serve_begin(server, c);
        return;
    }
    c->batches--;
    if (tag->kind == MESSAGE && c->out != NULL) {
        grpc_byte_buffer_destroy(c->out);
        c->out = NULL;
    }
    if (tag->kind == MESSAGE && !c->ended && event.success) {
        serve_message(c);
    }
    if (c->batches == 0) {
        grpc_call_unref(c->grpc);
        grpc_call_details_destroy(&c->details);
        grpc_metadata_array_destroy(&c->metadata);
        free(c);
    }
}

void
echo_serve(int port_fd, uint32_t spin_us)
{
    server_t server;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    init_core();
    server.grpc  = grpc_server_create(NULL, NULL);
    server.queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server.grpc, server.queue, NULL);
    int port = grpc_server_add_http2_port(server.grpc, "127.0.0.1:0",
                                          grpc_insecure_server_credentials_create());
    check(port > 0, "binding 127.0.0.1");
    grpc_server_start(server.grpc);
    for (int i = 0; i < REQUESTS; i++) {
        request_call(&server);
    }
    dprintf(port_fd, "%d\n", port);
    close(port_fd);
    for (;;) {
        serve_event(&server, next_event(server.queue, spin_us * UINT64_C(1000)));
    }
}

/* ---- the client ---- */

/* The way to one server. */
typedef struct way {
    grpc_channel *channel;
    grpc_call *call;
    grpc_byte_buffer *out, *in;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_slice details;
} way_t;

struct echo {
    grpc_completion_queue *queue;
    uint64_t spin_ns;
    bool streaming;
    uint32_t n;
    way_t ways[ECHO_SERVERS_MAX];
};

static void
way_call(echo_t *echo, way_t *way)
{
    grpc_metadata_array_init(&way->initial);
    grpc_metadata_array_init(&way->trailing);
    way->details = grpc_empty_slice();
    way->call    = grpc_channel_create_call(
           way->channel, NULL, 0, echo->queue,
           grpc_slice_from_static_string(echo->streaming ? STREAM_METHOD : UNARY_METHOD), NULL,
           gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

static void
way_end(way_t *way)
{
    grpc_metadata_array_destroy(&way->initial);
    grpc_metadata_array_destroy(&way->trailing);
    grpc_slice_unref(way->details);
    grpc_call_unref(way->call);
}

/* Send and ask for the answer: alone on a stream, or as a whole unary call. */
static void
way_send(const echo_t *echo, way_t *way, uint32_t request, uint32_t reply)
{
    grpc_op ops[6] = {{.op = GRPC_OP_SEND_MESSAGE},          {.op = GRPC_OP_RECV_MESSAGE},
                      {.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA}, {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};

    way->out                                                = message_make(request, reply);
    ops[0].data.send_message.send_message                   = way->out;
    ops[1].data.recv_message.recv_message                   = &way->in;
    ops[4].data.recv_initial_metadata.recv_initial_metadata = &way->initial;
    ops[5].data.recv_status_on_client.trailing_metadata     = &way->trailing;
    ops[5].data.recv_status_on_client.status                = &way->status;
    ops[5].data.recv_status_on_client.status_details        = &way->details;
    start(way->call, ops, echo->streaming ? 2 : 6, way);
}

echo_t *
echo_open(const uint16_t *ports, uint32_t n, bool streaming, uint32_t spin_us)
{
    echo_t *echo = calloc(1, sizeof(*echo));

    check(echo != NULL && n <= ECHO_SERVERS_MAX, "allocating");
    init_core();
    echo->queue     = grpc_completion_queue_create_for_next(NULL);
    echo->spin_ns   = spin_us * UINT64_C(1000);
    echo->streaming = streaming;
    echo->n         = n;
    for (uint32_t i = 0; i < n; i++) {
        way_t *way   = &echo->ways[i];
        grpc_arg own = {.type          = GRPC_ARG_INTEGER,
                        .key           = (char *)GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL,
                        .value.integer = 1};
        char where[32];
        snprintf(where, sizeof(where), "127.0.0.1:%u", ports[i]);
        grpc_channel_credentials *insecure = grpc_insecure_credentials_create();
        way->channel = grpc_channel_create(where, insecure, &(grpc_channel_args){1, &own});
        grpc_channel_credentials_release(insecure);
        if (streaming) {
            grpc_op ops[2] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                              {.op = GRPC_OP_RECV_INITIAL_METADATA}};
            way_call(echo, way);
            ops[1].data.recv_initial_metadata.recv_initial_metadata = &way->initial;
            start(way->call, ops, 2, NULL); /* ends with the first answer */
        }
    }
    return echo;
}

void
echo_round(echo_t *echo, uint32_t request, uint32_t reply)
{
    for (uint32_t i = 0; i < echo->n; i++) {
        if (!echo->streaming) {
            way_call(echo, &echo->ways[i]);
        }
        way_send(echo, &echo->ways[i], request, reply);
    }
    for (uint32_t left = echo->n; left > 0;) {
        grpc_event event = next_event(echo->queue, echo->spin_ns);
        way_t *way       = event.tag;
        uint32_t ignored;
        if (way == NULL) {
            continue;
        }
        check(event.success && way->in != NULL, "a round trip");
        check(message_take(way->in, &ignored) == reply, "an answer of that size");
        grpc_byte_buffer_destroy(way->out);
        if (!echo->streaming) {
            way_end(way);
        }
        left--;
    }
}

void
echo_close(echo_t *echo)
{
    for (uint32_t i = 0; i < echo->n; i++) {
        if (echo->streaming) {
            grpc_call_cancel(echo->ways[i].call, NULL);
            way_end(&echo->ways[i]);
        }
        grpc_channel_destroy(echo->ways[i].channel);
    }
    grpc_completion_queue_shutdown(echo->queue);
    while (next_event(echo->queue, 0).type != GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(echo->queue);
    free(echo);
    grpc_shutdown();
}
