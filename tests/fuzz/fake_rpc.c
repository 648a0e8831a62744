#include "tests/fuzz/fake_rpc.h"

#include "base/clock.h"
#include "base/status.h"
#include "rpc/rpc_int.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define METHODS_MAX 64u

static pthread_mutex_t lock   = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* Wait for what another thread does, under the lock. */
static void
wait_for(const bool *flag, const bool *or_flag, const char *what)
{
    struct timespec end;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += FAKE_PATIENCE_MS / 1000;
    while (!*flag && !*or_flag) {
        if (pthread_cond_timedwait(&changed, &lock, &end) != 0) {
            fprintf(stderr, "fake_rpc: no end after %u ms: %s\n", FAKE_PATIENCE_MS, what);
            abort();
        }
    }
}

static void
set(bool *flag)
{
    pthread_mutex_lock(&lock);
    *flag = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

bool fake_short_of_memory;

/* volatile: a compiler knows that malloc() does not look at it, and would drop the changes. */
static _Thread_local volatile unsigned spared;

void
fake_spared_begin(void)
{
    spared++;
}

void
fake_spared_end(void)
{
    spared--;
}

bool
fake_spared(void)
{
    return spared > 0;
}

/* Zeroed memory of the fake's own. */
static void *
take(size_t n)
{
    fake_spared_begin();
    void *p = calloc(1, n);
    fake_spared_end();
    assert(p != NULL);
    return p;
}

void
rpc_init(void)
{
}

void
rpc_shutdown(void)
{
}

/* ---- messages ---- */

rpc_message_t *
fake_message(const uint8_t *bytes, size_t n)
{
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(NULL, 0);
    size_t first             = n > 64 ? n / 2 : n; /* long ones in two slices */

    for (size_t at = 0; at < n; at += first, first = n - at) {
        uint8_t *piece = take(first);
        memcpy(piece, bytes + at, first);
        grpc_slice_buffer_add_indexed(&buffer->data.raw.slice_buffer,
                                      grpc_slice_new_with_user_data(piece, first, free, piece));
    }
    fake_spared_begin();
    rpc_message_t *message = rpc_message_new(buffer);
    fake_spared_end();
    return message;
}

/* What a sender's message costs: it is packed, its data is read once. */
static void
swallow(const rpc_outgoing_t *message)
{
    volatile uint8_t sum = 0;
    uint8_t *head        = take(protobuf_c_message_get_packed_size(message->head) + 1);

    protobuf_c_message_pack(message->head, head);
    free(head);
    for (uint32_t i = 0; i < message->n_data; i++) {
        const uint8_t *data = message->data[i].iov_base;
        for (size_t b = 0; b < message->data[i].iov_len; b++) {
            sum = (uint8_t)(sum ^ data[b]);
        }
    }
    if (message->sent != NULL) {
        message->sent(message->arg);
    }
}

/* ---- server ---- */

typedef struct method {
    rpc_method_t method;
    void *service;
} method_t;

struct rpc_server {
    method_t methods[METHODS_MAX];
    uint32_t n;
};

struct rpc_call {
    const method_t *method;
    void *context;
    bool next, ended; /* under the lock */
};

static const char *header_key, *header_value;

void
fake_header(const char *key, const char *value)
{
    header_key   = key;
    header_value = value;
}

attn_status_t
rpc_server_create(const rpc_server_options_t *options, rpc_server_t **server_p)
{
    (void)options;
    *server_p = take(sizeof(**server_p));
    return ATTN_OK;
}

attn_status_t
rpc_server_add(rpc_server_t *server, const rpc_method_t *methods, uint32_t n, void *service)
{
    for (uint32_t i = 0; i < n; i++) {
        assert(server->n < METHODS_MAX);
        server->methods[server->n++] = (method_t){methods[i], service};
    }
    return ATTN_OK;
}

attn_status_t
rpc_server_start(rpc_server_t *server)
{
    (void)server;
    return ATTN_OK;
}

uint16_t
rpc_server_port(const rpc_server_t *server)
{
    (void)server;
    return 1;
}

void
rpc_server_set_serving(rpc_server_t *server, bool serving)
{
    (void)server;
    (void)serving;
}

void
rpc_server_describe(rpc_server_t *server, rpc_server_figures_t *figures)
{
    (void)server;
    *figures = (rpc_server_figures_t){0};
}

void
rpc_server_stop(rpc_server_t *server, uint32_t grace_ms)
{
    (void)server;
    (void)grace_ms;
}

void
rpc_server_destroy(rpc_server_t *server)
{
    free(server);
}

uint32_t
fake_methods(const rpc_server_t *server)
{
    return server->n;
}

/* FNV-1a, folded to a byte; seeds.py has the same. */
static uint8_t
path_byte(const char *path)
{
    uint32_t hash = 2166136261u;

    for (; *path != 0; path++) {
        hash = (hash ^ (uint8_t)*path) * 16777619u;
    }
    return (uint8_t)(hash ^ hash >> 8 ^ hash >> 16 ^ hash >> 24);
}

uint32_t
fake_method_of(const rpc_server_t *server, uint8_t byte)
{
    for (uint32_t i = 0; i < server->n; i++) {
        if (path_byte(server->methods[i].method.path) == byte) {
            return i;
        }
    }
    return byte % server->n;
}

bool
fake_method_streams(const rpc_server_t *server, uint32_t i)
{
    return server->methods[i].method.streaming;
}

void
rpc_call_reply(rpc_call_t *call, const rpc_outgoing_t *message)
{
    if (getenv("FAKE_TRACE") != NULL) {
        fprintf(stderr, "%s: answered\n", call->method->method.path);
    }
    swallow(message);
    set(&call->ended);
}

void
rpc_call_end(rpc_call_t *call, attn_status_t status, const char *sentence)
{
    assert(attn_status_is_known((int)status));
    if (getenv("FAKE_TRACE") != NULL) {
        fprintf(stderr, "%s: %s %s\n", call->method->method.path, attn_strerror(status), sentence);
    }
    assert(status == ATTN_OK || (sentence != NULL && *sentence != 0)); /* every failure says why */
    set(&call->ended);
}

attn_status_t
rpc_call_send(rpc_call_t *call, const rpc_outgoing_t *message)
{
    if (getenv("FAKE_TRACE") != NULL) {
        fprintf(stderr, "%s: a message\n", call->method->method.path);
    }
    swallow(message);
    pthread_mutex_lock(&lock);
    bool over = call->ended;
    pthread_mutex_unlock(&lock);
    return over ? attn_fail(ATTN_ERR_CANCELLED, "the call is over") : ATTN_OK;
}

void
rpc_call_next(rpc_call_t *call, uint32_t within_ms)
{
    (void)within_ms;
    set(&call->next);
}

uint64_t
rpc_call_deadline_ns(const rpc_call_t *call)
{
    (void)call;
    return attn_now_ns() + UINT64_C(1000) * ATTN_NS_PER_MS;
}

bool
rpc_call_cancelled(const rpc_call_t *call)
{
    (void)call;
    return false;
}

const char *
rpc_call_peer(const rpc_call_t *call)
{
    (void)call;
    return "the fuzzer";
}

const char *
rpc_call_metadata(const rpc_call_t *call, const char *key)
{
    (void)call;
    return header_key != NULL && strcmp(key, header_key) == 0 ? header_value : NULL;
}

void
rpc_call_set_context(rpc_call_t *call, void *context)
{
    call->context = context;
}

void *
rpc_call_context(const rpc_call_t *call)
{
    return call->context;
}

static rpc_call_t *
call_new(rpc_server_t *server, uint32_t method)
{
    rpc_call_t *call = take(sizeof(*call));
    call->method     = &server->methods[method];
    call->next       = true;
    return call;
}

static void
call_free(rpc_call_t *call)
{
    if (call->method->method.closed != NULL) {
        call->method->method.closed(call->method->service, call);
    }
    free(call);
}

void
fake_call(rpc_server_t *server, uint32_t method, const uint8_t *bytes, size_t n)
{
    rpc_call_t *call = call_new(server, method);

    call->method->method.handle(call->method->service, call, fake_message(bytes, n));
    pthread_mutex_lock(&lock);
    wait_for(&call->ended, &call->ended, call->method->method.path);
    pthread_mutex_unlock(&lock);
    call_free(call);
}

fake_stream_t *
fake_stream_open(rpc_server_t *server, uint32_t method)
{
    return call_new(server, method);
}

/* Until the handler wants a message. */
static bool
stream_wait(fake_stream_t *stream)
{
    pthread_mutex_lock(&lock);
    wait_for(&stream->next, &stream->ended, stream->method->method.path);
    bool open    = !stream->ended;
    stream->next = false;
    pthread_mutex_unlock(&lock);
    return open;
}

bool
fake_stream_message(fake_stream_t *stream, const uint8_t *bytes, size_t n)
{
    if (!stream_wait(stream)) {
        return false;
    }
    stream->method->method.handle(stream->method->service, stream, fake_message(bytes, n));
    return true;
}

void
fake_stream_close(fake_stream_t *stream, bool broken)
{
    if (!broken && stream_wait(stream)) {
        stream->method->method.handle(stream->method->service, stream, NULL);
        pthread_mutex_lock(&lock);
        wait_for(&stream->ended, &stream->ended, stream->method->method.path);
        pthread_mutex_unlock(&lock);
    }
    call_free(stream);
}

/* ---- client ---- */

/* Something to tell on a progress thread. */
typedef struct event {
    struct event *next;
    rpc_reply_fn reply; /* or ... */
    void (*taken)(void *arg);
    void *arg;
    attn_status_t status;
    rpc_message_t *message;
    rpc_stream_t *stream; /* NULL: of a unary call */
} event_t;

struct rpc_client {
    event_t *first, **last;
    bool telling; /* one at a time */
};

struct rpc_channel {
    rpc_client_t *client;
};

struct rpc_stream {
    rpc_client_t *client;
    rpc_reply_fn received;
    void (*taken)(void *arg);
    void *arg;
    bool ended;        /* the end is queued */
    bool told, closed; /* the end was told; the handle is gone */
};

static input_t *answers;

void
fake_answers(input_t *in)
{
    pthread_mutex_lock(&lock);
    answers = in;
    pthread_mutex_unlock(&lock);
}

/* How a request is answered: a byte 0 to 199 and a message; 200 to 239 a failure; 240 and above,
 * or nothing left, silence. */
#define HOW_FAILS 200u
#define HOW_SILENT 240u

/* Under the lock. */
static unsigned
take_answer(rpc_message_t **message_p, attn_status_t *status_p)
{
    static const attn_status_t failures[] = {ATTN_ERR_UNAVAILABLE, ATTN_ERR_STALE, ATTN_ERR_BUSY,
                                             ATTN_ERR_NOT_FOUND, ATTN_ERR_LOST};
    size_t n;

    if (answers == NULL || answers->at == answers->end) {
        return HOW_SILENT;
    }
    unsigned how = input_byte(answers);
    *message_p   = NULL;
    *status_p    = failures[how % (sizeof(failures) / sizeof(failures[0]))];
    if (how < HOW_FAILS) {
        const uint8_t *bytes = input_bytes(answers, &n);
        *message_p           = fake_message(bytes, n);
        *status_p            = ATTN_OK;
    }
    return how;
}

static void
queue_event(rpc_client_t *client, event_t event)
{
    event_t *e = take(sizeof(*e));

    *e            = event;
    e->next       = NULL;
    *client->last = e;
    client->last  = &e->next;
    pthread_cond_broadcast(&changed);
}

attn_status_t
rpc_client_create(uint32_t spin_us, rpc_client_t **client_p)
{
    rpc_client_t *client = take(sizeof(*client));

    (void)spin_us;
    client->last = &client->first;
    *client_p    = client;
    return ATTN_OK;
}

/* Tell one event. Under the lock, which is let go meanwhile. @return false: there is none */
static bool
tell(rpc_client_t *client)
{
    event_t *e = client->first;

    if (e == NULL || client->telling) {
        return false;
    }
    client->first = e->next;
    if (client->first == NULL) {
        client->last = &client->first;
    }
    client->telling      = true;
    rpc_stream_t *stream = e->stream;
    bool end             = stream != NULL && e->taken == NULL && e->message == NULL;
    bool silent          = stream != NULL && (stream->told || (stream->closed && !end));
    pthread_mutex_unlock(&lock);
    if (silent) {
        rpc_message_free(e->message);
    } else if (e->taken != NULL) {
        e->taken(e->arg);
    } else {
        if (e->status != ATTN_OK) {
            attn_fail(e->status, "the fuzzer says so");
        }
        e->reply(e->arg, e->status, e->status != ATTN_OK ? attn_last_error() : "", e->message);
    }
    pthread_mutex_lock(&lock);
    client->telling = false;
    if (end) {
        stream->told = true;
        if (stream->closed) {
            free(stream);
        }
    }
    free(e);
    pthread_cond_broadcast(&changed);
    return true;
}

void
rpc_client_destroy(rpc_client_t *client)
{
    if (client == NULL) {
        return;
    }
    pthread_mutex_lock(&lock);
    while (tell(client)) {
    }
    pthread_mutex_unlock(&lock);
    free(client);
}

void
rpc_client_set_tls(rpc_client_t *client, rpc_tls_t *tls, const char *server_name)
{
    (void)client;
    (void)tls;
    (void)server_name;
}

void
rpc_client_set_header(rpc_client_t *client, const char *key, const char *value)
{
    (void)client;
    (void)key;
    (void)value;
}

uint64_t
rpc_client_header_version(const rpc_client_t *client)
{
    (void)client;
    return 1;
}

/* Nobody will answer any more when nothing is queued: what waits until a deadline has it at
 * once. What waits for ever waits for another thread of the library. */
bool
rpc_client_wait(rpc_client_t *client, bool (*done)(void *arg), void *arg, uint64_t deadline_ns)
{
    uint64_t patience = attn_now_ns() + FAKE_PATIENCE_MS * ATTN_NS_PER_MS;

    while (!done(arg)) {
        pthread_mutex_lock(&lock);
        bool told = tell(client), busy = client->telling;
        pthread_mutex_unlock(&lock);
        if (!told && !busy && deadline_ns != UINT64_MAX) {
            return done(arg);
        }
        if (!told) {
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        }
        if (attn_now_ns() > patience) {
            fprintf(stderr, "fake_rpc: a wait of libattn has no end\n");
            abort();
        }
    }
    return true;
}

void
rpc_client_wake(rpc_client_t *client)
{
    (void)client;
}

attn_status_t
rpc_channel_open(rpc_client_t *client, const char *address, rpc_channel_t **channel_p)
{
    (void)address;
    *channel_p           = take(sizeof(**channel_p));
    (*channel_p)->client = client;
    return ATTN_OK;
}

void
rpc_channel_close(rpc_channel_t *channel)
{
    free(channel);
}

void
rpc_call_unary(rpc_channel_t *channel, const char *path, const rpc_outgoing_t *request,
               uint64_t deadline_ns, rpc_reply_fn reply, void *arg)
{
    event_t event = {.reply = reply, .arg = arg, .status = ATTN_ERR_DEADLINE};

    (void)path;
    (void)deadline_ns;
    swallow(request);
    pthread_mutex_lock(&lock);
    take_answer(&event.message, &event.status);
    queue_event(channel->client, event);
    pthread_mutex_unlock(&lock);
}

attn_status_t
rpc_call_unary_wait(rpc_channel_t *channel, const char *path, const rpc_outgoing_t *request,
                    uint64_t deadline_ns, rpc_message_t **message_p)
{
    attn_status_t status = ATTN_ERR_DEADLINE;

    (void)channel;
    (void)deadline_ns;
    swallow(request);
    *message_p = NULL;
    if (strstr(path, "KeepAlive") != NULL) { /* of a thread of its own, whenever it likes */
        return attn_fail(ATTN_ERR_UNAVAILABLE, "the fuzzer keeps nobody alive");
    }
    pthread_mutex_lock(&lock);
    take_answer(message_p, &status);
    pthread_mutex_unlock(&lock);
    return status == ATTN_OK ? ATTN_OK : attn_fail(status, "the fuzzer says so");
}

attn_status_t
rpc_channel_health(rpc_channel_t *channel, uint64_t deadline_ns, bool *serving_p)
{
    (void)channel;
    (void)deadline_ns;
    (void)serving_p;
    return attn_fail(ATTN_ERR_UNAVAILABLE, "the fuzzer's peers have no health");
}

attn_status_t
rpc_stream_open(rpc_channel_t *channel, const char *path, uint64_t deadline_ns,
                rpc_reply_fn received, void *arg, rpc_stream_t **stream_p)
{
    rpc_stream_t *stream = take(sizeof(*stream));

    (void)path;
    (void)deadline_ns;
    *stream   = (rpc_stream_t){.client = channel->client, .received = received, .arg = arg};
    *stream_p = stream;
    return ATTN_OK;
}

/* Under the lock. */
static void
stream_end(rpc_stream_t *stream, attn_status_t status)
{
    if (!stream->ended) {
        stream->ended = true;
        queue_event(stream->client, (event_t){.reply  = stream->received,
                                              .arg    = stream->arg,
                                              .status = status,
                                              .stream = stream});
    }
}

void
rpc_stream_send(rpc_stream_t *stream, const rpc_outgoing_t *message)
{
    event_t event = {.reply = stream->received, .arg = stream->arg, .stream = stream};

    swallow(message);
    pthread_mutex_lock(&lock);
    if (!stream->ended && stream->taken != NULL) {
        queue_event(stream->client,
                    (event_t){.taken = stream->taken, .arg = stream->arg, .stream = stream});
    }
    unsigned how = stream->ended ? HOW_SILENT : take_answer(&event.message, &event.status);
    if (how < HOW_FAILS) {
        queue_event(stream->client, event);
    } else if (how < HOW_SILENT) {
        stream_end(stream, event.status);
    }
    pthread_mutex_unlock(&lock);
}

void
rpc_stream_on_taken(rpc_stream_t *stream, void (*taken)(void *arg))
{
    stream->taken = taken;
}

void
rpc_stream_rest(rpc_stream_t *stream)
{
    (void)stream; /* what was not asked for comes at the worst time */
}

void
rpc_stream_finish(rpc_stream_t *stream)
{
    pthread_mutex_lock(&lock);
    stream_end(stream, ATTN_OK);
    pthread_mutex_unlock(&lock);
}

void
rpc_stream_close(rpc_stream_t *stream)
{
    if (stream == NULL) {
        return;
    }
    pthread_mutex_lock(&lock);
    stream_end(stream, ATTN_ERR_CANCELLED);
    stream->closed = true;
    bool told      = stream->told;
    pthread_mutex_unlock(&lock);
    if (told) {
        free(stream);
    }
}

/* ---- certificates: there are none ---- */

attn_status_t
rpc_tls_open(const rpc_tls_options_t *options, rpc_tls_t **tls_p)
{
    (void)options;
    (void)tls_p;
    return attn_fail(ATTN_ERR_UNSUPPORTED, "the fake rpc has no TLS");
}

void
rpc_tls_close(rpc_tls_t *tls)
{
    (void)tls;
}

void
rpc_tls_refresh(rpc_tls_t *tls, bool always)
{
    (void)tls;
    (void)always;
}

void
rpc_tls_pem(rpc_tls_t *tls, rpc_tls_pem_t *pem)
{
    (void)tls;
    *pem = (rpc_tls_pem_t){0};
}

void
rpc_tls_pem_free(rpc_tls_pem_t *pem)
{
    (void)pem;
}

uint64_t
rpc_tls_version(const rpc_tls_t *tls)
{
    (void)tls;
    return 0;
}
