/*
 * channel.c: connections to one address, and unary calls over them.
 *
 * A unary call is one batch of six operations, and its end is one event. A call that
 * cannot even start ends by an event too, so that `reply` always comes from a thread that
 * makes progress, never from within rpc_call_unary().
 */
#include "rpc/rpc_int.h"

#include "base/status.h"

#include <assert.h>
#include <grpc/grpc_security.h>
#include <grpc/support/string_util.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define KEEPALIVE_MS 10000
#define KEEPALIVE_TIMEOUT_MS 5000
#define BACKOFF_FIRST_MS 50
#define BACKOFF_MAX_MS 2000
#define CONNECT_MAX_MS 2000

struct rpc_channel {
    rpc_client_t *client;
    char *address;
    atomic_uint refs;  /* the user's, and one for each call */
    atomic_bool heard; /* somebody there has answered a call */
    pthread_mutex_t lock;
    grpc_channel *grpc; /* under the lock, like all below */
    rpc_tls_use_t tls;
    rpc_pending_t *calls; /* that have not ended */
};

/* ---- channels ---- */

/* A channel of C core, with the certificates of now. */
static grpc_channel *
make_core_channel(rpc_channel_t *channel)
{
    const char *name = rpc_client_server_name(channel->client);
    grpc_arg args[]  = {
         rpc_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RPC_MESSAGE_MAX),
         rpc_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, RPC_MESSAGE_MAX),
         rpc_arg(GRPC_ARG_MAX_METADATA_SIZE, RPC_METADATA_MAX),
         rpc_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
         rpc_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
         rpc_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
         rpc_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
         rpc_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, BACKOFF_FIRST_MS),
         rpc_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS),
         rpc_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MAX_MS), /* of one attempt, in fact */
         rpc_arg(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, BACKOFF_MAX_MS),
         rpc_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1), /* a connection of its own */
         rpc_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0), /* workers are not behind the web's proxy */
         rpc_arg(GRPC_ARG_ENABLE_RETRIES, 0),    /* repeating is our business */
         rpc_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
         {.type         = GRPC_ARG_STRING, /* the last: left out if there is none */
          .key          = (char *)GRPC_SSL_TARGET_NAME_OVERRIDE_ARG,
          .value.string = (char *)name},
    };
    grpc_channel_args all = {.num_args = sizeof(args) / sizeof(args[0]) - (name == NULL),
                             .args     = args};

    grpc_channel_credentials *credentials = rpc_channel_credentials(&channel->tls);
    grpc_channel *grpc = grpc_channel_create(channel->address, credentials, &all);
    grpc_channel_credentials_release(credentials);
    return grpc;
}

attn_status_t
rpc_channel_open(rpc_client_t *client, const char *address, rpc_channel_t **channel_p)
{
    if (address == NULL || address[0] == 0) {
        return attn_fail(ATTN_ERR_INVALID, "a channel needs an address");
    }
    rpc_channel_t *channel = gpr_zalloc(sizeof(*channel));
    channel->client        = client;
    channel->address       = gpr_strdup(address);
    channel->tls.tls       = rpc_tls_ref(rpc_client_tls(client));
    channel->grpc          = make_core_channel(channel);
    atomic_init(&channel->refs, 1);
    pthread_mutex_init(&channel->lock, NULL);
    rpc_client_ref(client);
    *channel_p = channel;
    return ATTN_OK;
}

static void
channel_unref(rpc_channel_t *channel)
{
    if (atomic_fetch_sub(&channel->refs, 1) != 1) {
        return;
    }
    rpc_tls_close(channel->tls.tls);
    rpc_client_unref(channel->client);
    pthread_mutex_destroy(&channel->lock);
    gpr_free(channel->address);
    gpr_free(channel);
}

static void
unlist(rpc_pending_t *pending)
{
    rpc_channel_t *channel = pending->channel;

    if (!pending->listed) {
        return;
    }
    if (pending->previous == NULL) {
        channel->calls = pending->next;
    } else {
        pending->previous->next = pending->next;
    }
    if (pending->next != NULL) {
        pending->next->previous = pending->previous;
    }
    pending->listed = false;
}

void
rpc_channel_close(rpc_channel_t *channel)
{
    if (channel == NULL) {
        return;
    }
    pthread_mutex_lock(&channel->lock);
    while (channel->calls != NULL) {
        grpc_call *grpc = channel->calls->grpc;
        grpc_call_ref(grpc); /* the call may end while it is being cancelled */
        unlist(channel->calls);
        pthread_mutex_unlock(&channel->lock);
        grpc_call_cancel_with_status(grpc, GRPC_STATUS_CANCELLED, "the channel was closed", NULL);
        grpc_call_unref(grpc);
        pthread_mutex_lock(&channel->lock);
    }
    pthread_mutex_unlock(&channel->lock);
    grpc_channel_destroy(channel->grpc); /* calls in flight keep what they need of it */
    channel_unref(channel);
}

void
rpc_channel_heard(rpc_channel_t *channel)
{
    atomic_store_explicit(&channel->heard, true, memory_order_relaxed);
}

rpc_client_t *
rpc_channel_client(const rpc_channel_t *channel)
{
    return channel->client;
}

void
rpc_pending_begin(rpc_pending_t *pending, rpc_channel_t *channel, const char *path,
                  uint64_t deadline_ns)
{
    rpc_client_began(channel->client);
    atomic_fetch_add(&channel->refs, 1);
    grpc_slice method   = grpc_slice_from_copied_string(path);
    grpc_channel *stale = NULL;
    pending->channel    = channel;
    pending->header     = rpc_client_header(channel->client);

    pthread_mutex_lock(&channel->lock);
    if (channel->tls.tls != NULL && rpc_tls_version(channel->tls.tls) != channel->tls.version) {
        stale         = channel->grpc;
        channel->grpc = make_core_channel(channel);
    }
    pending->grpc =
        grpc_channel_create_call(channel->grpc, NULL, 0, rpc_client_queue(channel->client), method,
                                 NULL, rpc_timespec(deadline_ns), NULL);
    pending->previous = NULL;
    pending->next     = channel->calls;
    if (channel->calls != NULL) {
        channel->calls->previous = pending;
    }
    channel->calls  = pending;
    pending->listed = true;
    pthread_mutex_unlock(&channel->lock);
    grpc_slice_unref(method);
    if (stale != NULL) {
        grpc_channel_destroy(stale); /* its calls go on */
    }
}

grpc_op
rpc_pending_first(const rpc_pending_t *pending)
{
    grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};

    if (GRPC_SLICE_LENGTH(pending->header.key) > 0) {
        op.data.send_initial_metadata.count    = 1;
        op.data.send_initial_metadata.metadata = (grpc_metadata *)&pending->header;
    }
    return op;
}

void
rpc_pending_end(rpc_pending_t *pending)
{
    rpc_channel_t *channel = pending->channel;

    pthread_mutex_lock(&channel->lock);
    unlist(pending);
    pthread_mutex_unlock(&channel->lock);
    grpc_call_unref(pending->grpc);
    grpc_slice_unref(pending->header.value);
    rpc_client_ended(channel->client);
    channel_unref(channel);
}

/* ---- how calls end ---- */

void
rpc_end_init(rpc_end_t *end)
{
    grpc_metadata_array_init(&end->trailing);
    end->code    = GRPC_STATUS_UNKNOWN;
    end->details = grpc_empty_slice();
}

grpc_op
rpc_end_op(rpc_end_t *end)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};

    op.data.recv_status_on_client.trailing_metadata = &end->trailing;
    op.data.recv_status_on_client.status            = &end->code;
    op.data.recv_status_on_client.status_details    = &end->details;
    return op;
}

void
rpc_end_destroy(rpc_end_t *end)
{
    grpc_metadata_array_destroy(&end->trailing);
    grpc_slice_unref(end->details);
}

/* The status in the trailing metadata; ATTN_OK if there is none that we know. */
static attn_status_t
exact_status(const rpc_end_t *end)
{
    for (size_t i = 0; i < end->trailing.count; i++) {
        const grpc_metadata *m = &end->trailing.metadata[i];
        char text[16];
        if (grpc_slice_str_cmp(m->key, RPC_STATUS_KEY) != 0 ||
            GRPC_SLICE_LENGTH(m->value) >= sizeof(text)) {
            continue;
        }
        memcpy(text, GRPC_SLICE_START_PTR(m->value), GRPC_SLICE_LENGTH(m->value));
        text[GRPC_SLICE_LENGTH(m->value)] = 0;
        char *rest;
        long value = strtol(text, &rest, 10);
        if (rest != text && *rest == 0 && value > INT32_MIN && value < 0 &&
            attn_status_is_known((int)value)) {
            return (attn_status_t)value;
        }
    }
    return ATTN_OK;
}

/*
 * When one side speaks TLS and the other does not, or the server does not accept the client's
 * certificate, somebody hangs up, and C core can say no more than that. Say what it may have been,
 * unless the two have understood each other before. The words are those of its sentence.
 */
static const char *
suspicion(const char *text, const rpc_channel_t *channel)
{
    bool hung_up =
        strstr(text, "Socket closed") != NULL || strstr(text, "Connection reset") != NULL;

    if (atomic_load(&channel->heard)) {
        return "";
    }
    if (channel->tls.tls == NULL) {
        return hung_up ? " (does it speak TLS? we spoke in plaintext, for no CA was named)" : "";
    }
    return hung_up ? " (it may not have got a certificate from us that it accepts)"
           : strstr(text, "wrong version number") != NULL ? " (does it speak plaintext?)"
                                                          : "";
}

attn_status_t
rpc_end_status(const rpc_end_t *end, const rpc_channel_t *channel,
               char sentence[RPC_SENTENCE_MAX + 1])
{
    int size            = (int)GRPC_SLICE_LENGTH(end->details);
    const char *text    = (const char *)GRPC_SLICE_START_PTR(end->details);
    attn_status_t exact = exact_status(end);

    sentence[0] = 0;
    if (end->code == GRPC_STATUS_OK || exact != ATTN_OK) {
        rpc_channel_heard((rpc_channel_t *)channel);
    }
    if (end->code == GRPC_STATUS_OK) {
        return ATTN_OK;
    }
    if (exact != ATTN_OK) {
        snprintf(sentence, RPC_SENTENCE_MAX + 1, "%.*s", size, text);
        return exact;
    }
    /* C core or a foreign server wrote it: say at least who was meant. */
    int n = snprintf(sentence, RPC_SENTENCE_MAX + 1, "%s: %.*s", channel->address, size, text);
    if (n < RPC_SENTENCE_MAX && end->code == GRPC_STATUS_UNAVAILABLE) {
        snprintf(sentence + n, RPC_SENTENCE_MAX + 1 - (size_t)n, "%s",
                 suspicion(sentence, channel));
    }
    return attn_status_from_grpc((int)end->code);
}

/* ---- unary calls ---- */

typedef struct unary {
    rpc_op_t op;
    rpc_pending_t pending;
    rpc_end_t end;
    grpc_metadata_array initial;
    rpc_packet_t *request; /* NULL: it could not be packed, see refused */
    grpc_byte_buffer *response;
    attn_status_t refused;
    char sentence[RPC_SENTENCE_MAX + 1];
    rpc_reply_fn reply;
    void *arg;
} unary_t;

static void
on_unary(rpc_op_t *op, bool ok)
{
    unary_t *unary         = RPC_OF(unary_t, op, op);
    rpc_message_t *message = NULL;
    attn_status_t status   = unary->refused;

    (void)ok; /* a batch with RECV_STATUS always succeeds */
    rpc_packet_free(unary->request);
    if (status == ATTN_OK) {
        status = rpc_end_status(&unary->end, unary->pending.channel, unary->sentence);
    }
    if (status == ATTN_OK && unary->response == NULL) {
        status = ATTN_ERR_INTERNAL;
        snprintf(unary->sentence, sizeof(unary->sentence),
                 "the callee ended the call without a reply");
    }
    if (status == ATTN_OK) {
        message         = rpc_message_new(unary->response);
        unary->response = NULL;
    }
    unary->reply(unary->arg, status, unary->sentence, message);

    if (unary->response != NULL) {
        grpc_byte_buffer_destroy(unary->response);
    }
    rpc_end_destroy(&unary->end);
    grpc_metadata_array_destroy(&unary->initial);
    rpc_pending_end(&unary->pending);
    gpr_free(unary);
}

static void
unary_start(unary_t *unary)
{
    grpc_op ops[6] = {
        rpc_pending_first(&unary->pending),     {.op = GRPC_OP_SEND_MESSAGE},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_INITIAL_METADATA},
        {.op = GRPC_OP_RECV_MESSAGE},           rpc_end_op(&unary->end),
    };

    ops[1].data.send_message.send_message                   = unary->request->buffer;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &unary->initial;
    ops[4].data.recv_message.recv_message                   = &unary->response;
    rpc_start(unary->pending.grpc, ops, 6, &unary->op);
}

void
rpc_call_unary(rpc_channel_t *channel, const char *path, const rpc_outgoing_t *request,
               uint64_t deadline_ns, rpc_reply_fn reply, void *arg)
{
    unary_t *unary = gpr_zalloc(sizeof(*unary));

    unary->op    = (rpc_op_t){on_unary};
    unary->reply = reply;
    unary->arg   = arg;
    rpc_end_init(&unary->end);
    grpc_metadata_array_init(&unary->initial);
    unary->refused = rpc_packet_make(request, channel->client, &unary->request);
    rpc_pending_begin(&unary->pending, channel, path, deadline_ns);
    if (unary->refused == ATTN_OK) {
        unary_start(unary);
    } else {
        snprintf(unary->sentence, sizeof(unary->sentence), "%s", attn_last_error());
        rpc_client_post(channel->client, &unary->op);
    }
}

typedef struct answer {
    atomic_bool here;
    attn_status_t status;
    rpc_message_t *message;
    char sentence[RPC_SENTENCE_MAX + 1];
} answer_t;

static void
take_answer(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    answer_t *answer = arg;

    answer->status  = status;
    answer->message = message;
    snprintf(answer->sentence, sizeof(answer->sentence), "%s", sentence);
    atomic_store(&answer->here, true);
}

static bool
is_answered(void *arg)
{
    answer_t *answer = arg;

    return atomic_load(&answer->here);
}

attn_status_t
rpc_call_unary_wait(rpc_channel_t *channel, const char *path, const rpc_outgoing_t *request,
                    uint64_t deadline_ns, rpc_message_t **message_p)
{
    answer_t answer;

    atomic_init(&answer.here, false);
    rpc_call_unary(channel, path, request, deadline_ns, take_answer, &answer);
    /* The call itself ends by its deadline; until then it may write the answer. */
    while (!rpc_client_wait(channel->client, is_answered, &answer, UINT64_MAX)) {
    }
    if (answer.status != ATTN_OK) {
        return attn_fail(answer.status, "%s", answer.sentence);
    }
    *message_p = answer.message;
    return ATTN_OK;
}
