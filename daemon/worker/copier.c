#include "daemon/worker/copier.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "base/table.h"
#include "daemon/tensors.h"
#include "daemon/unary.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PARTS 8u /* asked for at a time: 16 MiB, so that the way there and back costs nothing */
#define PEERS_MAX 1024u
#define ADDRESS_ROOM 64u

/* A worker that we copy from: its connection stays. */
typedef struct peer {
    char address[ADDRESS_ROOM]; /* key */
    rpc_channel_t *channel;
    UT_hash_handle hh;
} peer_t;

struct copier {
    copier_options_t options;
    rpc_client_t *rpc;
    tensors_t *tensors; /* parts on their way out, and one of each copy on its way in */
    pthread_mutex_t lock;
    char ticket[TICKET_MAX]; /* as set; under the lock, as the next two */
    peer_t *peers;
    uint32_t n_copies;
    atomic_uint_fast64_t chunks_in, bytes_in, failed, corrupt, parts_out, bytes_out;
};

/* ---- where chunks come from ---- */

/* Read a part into a buffer, and send it from there. */
static attn_status_t
send_part(copier_t *c, rpc_call_t *call, const Attn__V1__ExportChunkRequest *r)
{
    Attn__V1__ExportChunkReply reply = ATTN__V1__EXPORT_CHUNK_REPLY__INIT;
    engine_export_t what             = {.cache      = r->cache_id,
                                        .chunk      = r->chunk,
                                        .generation = r->generation,
                                        .layer      = r->layer,
                                        .first      = r->first,
                                        .n          = r->n};
    uint64_t k = 0, v = 0;
    tensor_t *tensor = NULL;

    attn_status_t status = engine_export_bytes(c->options.engine, &what, &k, &v);
    if (status == ATTN_OK) {
        status = tensor_take(c->tensors, k + v, &tensor);
    }
    if (status == ATTN_OK) {
        status =
            engine_chunk_export(c->options.engine, &what, tensor->data, tensor->data + k, k, v);
    }
    if (status != ATTN_OK) {
        tensor_unref(tensor);
        return status;
    }
    struct iovec data = {.iov_base = tensor->data, .iov_len = k + v};
    reply.checksum    = engine_checksum(&what, tensor->data, k + v);
    atomic_fetch_add(&c->parts_out, 1);
    atomic_fetch_add(&c->bytes_out, k + v);
    return rpc_call_send(
        call,
        &(rpc_outgoing_t){
            .head = &reply.base, .data = &data, .n_data = 1, .sent = tensor_unref, .arg = tensor});
}

/* A message asks for a part. The ticket is looked at for each: a stream may stay open. */
static void
on_message(void *service, rpc_call_t *call, rpc_message_t *message)
{
    copier_t *c = service;
    ProtobufCMessage *head;

    if (message == NULL) {
        rpc_call_end(call, ATTN_OK, "");
        return;
    }
    attn_status_t status =
        gate_admit(c->options.gate, rpc_call_metadata(call, TICKET_HEADER), false);
    if (status == ATTN_OK) {
        status = rpc_message_unpack(message, &attn__v1__export_chunk_request__descriptor, &head);
    }
    if (status == ATTN_OK) {
        status = send_part(c, call, (const Attn__V1__ExportChunkRequest *)head);
    }
    rpc_message_free(message);
    if (status == ATTN_OK) {
        rpc_call_next(call, 0);
    } else {
        unary_fail(call, status);
    }
}

static void
on_closed(void *service, rpc_call_t *call)
{
    (void)service, (void)call; /* nothing is kept for a stream */
}

/* ---- where they go ---- */

/* What came on one stream, and is not stored yet. */
typedef struct pull {
    rpc_stream_t *stream;
    pthread_mutex_t lock; /* innermost */
    rpc_message_t *came[PARTS];
    uint32_t first, n; /* a ring */
    bool ended;
    attn_status_t status; /* with which it ended */
    char sentence[512];
} pull_t;

/* On a progress thread. */
static void
received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    pull_t *p = arg;

    pthread_mutex_lock(&p->lock);
    if (message == NULL) {
        p->ended  = true;
        p->status = status;
        snprintf(p->sentence, sizeof(p->sentence), "%s", sentence != NULL ? sentence : "");
    } else if (p->n < PARTS) {
        p->came[(p->first + p->n++) % PARTS] = message;
        message                              = NULL;
    } /* else nobody asked for it: the parts after it will not fit */
    pthread_mutex_unlock(&p->lock);
    rpc_message_free(message);
}

static bool
is_there(void *arg)
{
    pull_t *p = arg;

    pthread_mutex_lock(&p->lock);
    bool there = p->n > 0 || p->ended;
    pthread_mutex_unlock(&p->lock);
    return there;
}

static bool
has_ended(void *arg)
{
    pull_t *p = arg;

    pthread_mutex_lock(&p->lock);
    bool ended = p->ended;
    pthread_mutex_unlock(&p->lock);
    return ended;
}

/* The next part; the caller's. */
static attn_status_t
await_part(copier_t *c, pull_t *p, uint64_t deadline_ns, rpc_message_t **message_p)
{
    uint64_t stalled     = attn_now_ns() + COPIER_STALL_MS * ATTN_NS_PER_MS;
    attn_status_t status = ATTN_OK;

    if (!rpc_client_wait(c->rpc, is_there, p, attn_min(deadline_ns, stalled))) {
        return attn_fail(ATTN_ERR_DEADLINE, "no part of the chunk came in time");
    }
    pthread_mutex_lock(&p->lock);
    if (p->n > 0) {
        *message_p = p->came[p->first];
        p->first   = (p->first + 1) % PARTS;
        p->n--;
    } else {
        status = p->status != ATTN_OK
                     ? attn_fail(p->status, "%s", p->sentence)
                     : attn_fail(ATTN_ERR_INTERNAL, "the stream ended before all parts had come");
    }
    pthread_mutex_unlock(&p->lock);
    return status;
}

static void
ask(pull_t *p, const engine_export_t *part)
{
    Attn__V1__ExportChunkRequest r = ATTN__V1__EXPORT_CHUNK_REQUEST__INIT;

    r.cache_id   = part->cache;
    r.chunk      = part->chunk;
    r.generation = part->generation;
    r.layer      = part->layer;
    r.first      = part->first;
    r.n          = part->n;
    rpc_stream_send(p->stream, &(rpc_outgoing_t){.head = &r.base});
}

static attn_status_t
store(copier_t *c, engine_arrival_t *arrival, rpc_message_t *message, uint64_t *bytes_p)
{
    ProtobufCMessage *head;
    tensor_t *tensor = NULL;
    attn_status_t status =
        rpc_message_unpack(message, &attn__v1__export_chunk_reply__descriptor, &head);
    uint64_t bytes = status == ATTN_OK ? rpc_message_data_size(message) : 0;

    if (status == ATTN_OK) {
        status = tensor_take(c->tensors, attn_max(bytes, 1), &tensor);
    }
    if (status == ATTN_OK) {
        rpc_message_data_copy(message, 0, tensor->data, bytes);
        status = engine_arrival_store(arrival, tensor->data, bytes,
                                      ((const Attn__V1__ExportChunkReply *)head)->checksum);
    }
    tensor_unref(tensor);
    *bytes_p += status == ATTN_OK ? bytes : 0;
    return status;
}

/* All parts, several of them under way at a time. */
static attn_status_t
pull_parts(copier_t *c, pull_t *p, engine_arrival_t *arrival, uint64_t deadline_ns,
           uint64_t *bytes_p)
{
    attn_status_t status = ATTN_OK;
    uint32_t under_way   = 0;
    engine_export_t part;

    while (under_way < PARTS && engine_arrival_ask(arrival, &part)) {
        ask(p, &part);
        under_way++;
    }
    for (; status == ATTN_OK && under_way > 0; under_way--) {
        rpc_message_t *message = NULL;
        status                 = await_part(c, p, deadline_ns, &message);
        if (status == ATTN_OK && engine_arrival_ask(arrival, &part)) {
            ask(p, &part);
            under_way++;
        }
        if (status == ATTN_OK) {
            status = store(c, arrival, message, bytes_p);
        }
        rpc_message_free(message);
    }
    return status;
}

static attn_status_t
pull(copier_t *c, rpc_channel_t *channel, engine_arrival_t *arrival, uint64_t deadline_ns,
     uint64_t *bytes_p)
{
    pull_t p             = {.lock = PTHREAD_MUTEX_INITIALIZER};
    attn_status_t status = rpc_stream_open(channel, "/attn.v1.Worker/ExportChunks", deadline_ns,
                                           received, &p, &p.stream);

    if (status != ATTN_OK) {
        return status;
    }
    status = pull_parts(c, &p, arrival, deadline_ns, bytes_p);
    rpc_stream_finish(p.stream);
    rpc_stream_close(p.stream); /* all is there, or nothing more is wanted */
    rpc_client_wait(c->rpc, has_ended, &p, UINT64_MAX);
    while (p.n > 0) {
        rpc_message_free(p.came[p.first]);
        p.first = (p.first + 1) % PARTS;
        p.n--;
    }
    pthread_mutex_destroy(&p.lock);
    return status;
}

static attn_status_t
peer_of(copier_t *c, const char *address, rpc_channel_t **channel_p)
{
    attn_status_t status = ATTN_OK;
    peer_t *peer;

    HASH_FIND_STR(c->peers, address, peer);
    if (peer == NULL && HASH_COUNT(c->peers) >= PEERS_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "chunks came from %u workers, the most", PEERS_MAX);
    } else if (peer == NULL && (peer = calloc(1, sizeof(*peer))) != NULL) {
        snprintf(peer->address, sizeof(peer->address), "%s", address);
        status = rpc_channel_open(c->rpc, address, &peer->channel);
        if (status == ATTN_OK) {
            HASH_ADD_STR(c->peers, address, peer);
            if (!table_has(hh, peer)) {
                rpc_channel_close(peer->channel);
                status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a worker's address");
            }
        }
        if (status != ATTN_OK) {
            free(peer);
        }
    } else if (peer == NULL) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a worker's address");
    }
    *channel_p = status == ATTN_OK ? peer->channel : NULL;
    return status;
}

/* Be one of those that copy now. */
static attn_status_t
copy_start(copier_t *c, uint32_t worker, const char *source, rpc_channel_t **channel_p)
{
    char ticket[TICKET_MAX];
    attn_status_t status = gate_ticket(c->options.gate, worker, ticket);

    if (status == ATTN_OK && (source[0] == '\0' || strlen(source) >= ADDRESS_ROOM)) {
        status = attn_fail(ATTN_ERR_INVALID, "source has %zu bytes: 1 to %u", strlen(source),
                           ADDRESS_ROOM - 1);
    }
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&c->lock);
    if (c->n_copies >= COPIER_COPIES_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "%u chunks are being copied to here: retry later",
                           c->n_copies);
    }
    if (status == ATTN_OK) {
        status = peer_of(c, source, channel_p);
    }
    if (status == ATTN_OK && strcmp(ticket, c->ticket) != 0) {
        strcpy(c->ticket, ticket);
        rpc_client_set_header(c->rpc, TICKET_HEADER, c->ticket);
    }
    c->n_copies += status == ATTN_OK;
    pthread_mutex_unlock(&c->lock);
    return status;
}

attn_status_t
copier_copy(copier_t *c, uint32_t worker, const char *source, const engine_copy_t *copy,
            uint64_t deadline_ns, uint64_t *bytes_p)
{
    engine_arrival_t *arrival = NULL;
    rpc_channel_t *channel;
    attn_status_t status = copy_start(c, worker, source, &channel);

    *bytes_p = 0;
    if (status != ATTN_OK) {
        return status;
    }
    status = engine_arrival_begin(c->options.engine, copy, &arrival);
    if (status == ATTN_OK) {
        status = pull(c, channel, arrival, deadline_ns, bytes_p);
        if (status != ATTN_OK) {
            attn_fail_in(status, "from worker %s: ", source);
            engine_arrival_drop(arrival);
        } else {
            status = engine_arrival_publish(arrival);
        }
    }
    pthread_mutex_lock(&c->lock);
    c->n_copies--;
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_add(status == ATTN_OK ? &c->chunks_in : &c->failed, 1);
    atomic_fetch_add(&c->bytes_in, status == ATTN_OK ? *bytes_p : 0);
    atomic_fetch_add(&c->corrupt, status == ATTN_ERR_CORRUPT);
    return status;
}

/* ---- life ---- */

attn_status_t
copier_create(rpc_server_t *server, const copier_options_t *options, copier_t **copier_p)
{
    static const rpc_method_t method = {.path      = "/attn.v1.Worker/ExportChunks",
                                        .streaming = true,
                                        .handle    = on_message,
                                        .closed    = on_closed};
    copier_t *c                      = calloc(1, sizeof(*c));

    if (c == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for copies of chunks");
    }
    c->options = *options;
    pthread_mutex_init(&c->lock, NULL);
    attn_status_t status = rpc_client_create(0, &c->rpc);
    if (status == ATTN_OK) {
        rpc_client_set_tls(c->rpc, options->tls, NULL);
        status = tensors_create(COPIER_OUT_MAX, &c->tensors);
    }
    if (status == ATTN_OK) {
        status = rpc_server_add(server, &method, 1, c);
    }
    if (status != ATTN_OK) {
        copier_destroy(c);
        return status;
    }
    *copier_p = c;
    return ATTN_OK;
}

void
copier_destroy(copier_t *c)
{
    peer_t *peer, *next;

    if (c == NULL) {
        return;
    }
    HASH_ITER(hh, c->peers, peer, next)
    {
        HASH_DEL(c->peers, peer);
        rpc_channel_close(peer->channel);
        free(peer);
    }
    rpc_client_destroy(c->rpc);
    tensors_destroy(c->tensors);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

void
copier_tick(copier_t *c, uint64_t now_ns)
{
    tensors_sweep(c->tensors, now_ns);
}

void
copier_describe(copier_t *c, copier_figures_t *figures)
{
    *figures = (copier_figures_t){
        .chunks_in = atomic_load(&c->chunks_in),
        .bytes_in  = atomic_load(&c->bytes_in),
        .failed    = atomic_load(&c->failed),
        .corrupt   = atomic_load(&c->corrupt),
        .parts_out = atomic_load(&c->parts_out),
        .bytes_out = atomic_load(&c->bytes_out),
    };
}
