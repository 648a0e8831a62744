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
#include <time.h>

#define PARTS 8u /* asked for at a time: 16 MiB, so that the way there and back costs nothing */
#define PEERS_MAX 64u /* kept; the one that was unused longest makes room */
#define ADDRESS_ROOM 64u
#define ROOM_LOOK_US 2000u /* how often we look whether parts have left */
#define DRAINING "draining: this daemon is going down"

/* A worker that we copy from: its connection stays. */
typedef struct peer {
    char address[ADDRESS_ROOM]; /* key */
    rpc_channel_t *channel;
    uint32_t users;   /* copies from there, now */
    uint64_t used_ns; /* when the last one ended */
    UT_hash_handle hh;
} peer_t;

/* A stream over which somebody asks us for parts. */
typedef struct reader {
    struct reader *next, **link;
    rpc_call_t *call;
    engine_export_t what; /* it asked for last */
    bool asked;
    bool waits, served, closed; /* for room, with a turn; by serve_waiting(), now; or is over */
    uint64_t turn;
} reader_t;

struct copier {
    copier_options_t options;
    rpc_client_t *rpc;
    tensors_t *out, *in; /* parts on their way from here, and one of each copy to here */
    job_t waiter;
    atomic_bool draining;
    pthread_mutex_t lock;    /* of all that follows, and so long no reader's call is gone */
    pthread_cond_t let_go;   /* a reader is no longer served */
    char ticket[TICKET_MAX]; /* as set */
    peer_t *peers;
    uint32_t n_copies;
    reader_t *readers;
    bool waiting; /* serve_waiting() runs, or is about to */
    uint64_t turns;
    atomic_uint_fast64_t chunks_in, bytes_in, failed, corrupt, parts_out, bytes_out;
};

/* ---- where chunks come from ---- */

engine_export_t
copier_part(const Attn__V1__ExportChunkRequest *request)
{
    return (engine_export_t){.cache      = request->cache_id,
                             .chunk      = request->chunk,
                             .generation = request->generation,
                             .layer      = request->layer,
                             .first      = request->first,
                             .n          = request->n};
}

/*
 * Read a part into a buffer, and send it from there. *full_p: nothing was wrong but that too many
 * parts are on their way.
 */
static attn_status_t
send_part(copier_t *c, rpc_call_t *call, const engine_export_t *what, bool *full_p)
{
    Attn__V1__ExportChunkReply reply = ATTN__V1__EXPORT_CHUNK_REPLY__INIT;
    uint64_t k = 0, v = 0;
    tensor_t *tensor = NULL;

    attn_status_t status = engine_export_bytes(c->options.engine, what, &k, &v);
    *full_p              = false;
    if (status == ATTN_OK) {
        status  = tensor_take(c->out, k + v, &tensor);
        *full_p = status == ATTN_ERR_EXHAUSTED;
    }
    if (status == ATTN_OK) {
        status = engine_chunk_export(c->options.engine, what, tensor->data, tensor->data + k, k, v);
    }
    if (status != ATTN_OK) {
        tensor_unref(tensor);
        return status;
    }
    struct iovec data = {.iov_base = tensor->data, .iov_len = k + v};
    reply.checksum    = engine_checksum(what, tensor->data, k + v);
    status            = rpc_call_send(
                   call,
                   &(rpc_outgoing_t){
                       .head = &reply.base, .data = &data, .n_data = 1, .sent = tensor_unref, .arg = tensor});
    atomic_fetch_add(&c->parts_out, status == ATTN_OK);
    atomic_fetch_add(&c->bytes_out, status == ATTN_OK ? k + v : 0);
    return status;
}

/* The one that has waited longest. Under the lock. */
static reader_t *
first_waiting(const copier_t *c)
{
    reader_t *first = NULL;

    for (reader_t *r = c->readers; r != NULL; r = r->next) {
        if (r->waits && !r->closed && (first == NULL || r->turn < first->turn)) {
            first = r;
        }
    }
    return first;
}

/* On a thread of its own for as long as anybody waits. */
static void
serve_waiting(job_t *job)
{
    copier_t *c = JOB_OF(copier_t, waiter, job);

    pthread_mutex_lock(&c->lock);
    for (reader_t *r; (r = first_waiting(c)) != NULL;) {
        bool full;
        r->served = true;
        pthread_mutex_unlock(&c->lock);
        attn_status_t status = send_part(c, r->call, &r->what, &full);
        if (full) {
            nanosleep(&(struct timespec){.tv_nsec = ROOM_LOOK_US * 1000}, NULL);
        }
        pthread_mutex_lock(&c->lock);
        r->waits  = full;
        r->served = false;
        pthread_cond_broadcast(&c->let_go);
        if (status == ATTN_OK) { /* under the lock the call is not gone yet */
            rpc_call_next(r->call, 0);
        } else if (!full) {
            unary_fail(r->call, status);
        }
    }
    c->waiting = false;
    pthread_mutex_unlock(&c->lock);
}

/* The part is sent when there is room for it, and the stream is read no further before. */
static void
await_room(copier_t *c, reader_t *r)
{
    pthread_mutex_lock(&c->lock);
    bool start = !c->waiting;
    c->waiting = true;
    r->waits   = true;
    r->turn    = c->turns++;
    pthread_mutex_unlock(&c->lock);
    if (start) {
        jobs_add(c->options.jobs, &c->waiter);
    }
}

/* The first message of a stream. */
static attn_status_t
reader_open(copier_t *c, rpc_call_t *call, reader_t **reader_p)
{
    attn_status_t status =
        gate_admit(c->options.gate, rpc_call_metadata(call, TICKET_HEADER), false);
    if (status != ATTN_OK) {
        return status;
    }
    reader_t *r = calloc(1, sizeof(*r));
    if (r == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to read a chunk");
    }
    r->call = call;
    pthread_mutex_lock(&c->lock);
    if (atomic_load(&c->draining)) {
        status = attn_fail(ATTN_ERR_CANCELLED, DRAINING);
    } else {
        r->link = &c->readers;
        r->next = c->readers;
        if (r->next != NULL) {
            r->next->link = &r->next;
        }
        c->readers = r;
    }
    pthread_mutex_unlock(&c->lock);
    if (status != ATTN_OK) {
        free(r);
        return status;
    }
    rpc_call_set_context(call, r);
    *reader_p = r;
    return ATTN_OK;
}

/*
 * What the stream asks for. The ticket was looked at when it was opened, and is for every other
 * chunk: one that takes long to read may outlive it.
 */
static attn_status_t
read_request(copier_t *c, reader_t *r, rpc_message_t *message)
{
    ProtobufCMessage *head;
    attn_status_t status =
        rpc_message_unpack(message, &attn__v1__export_chunk_request__descriptor, &head);

    if (status != ATTN_OK) {
        return status;
    }
    const Attn__V1__ExportChunkRequest *q = (const Attn__V1__ExportChunkRequest *)head;
    if (r->asked && (q->cache_id != r->what.cache || q->chunk != r->what.chunk)) {
        status = gate_admit(c->options.gate, rpc_call_metadata(r->call, TICKET_HEADER), false);
    }
    r->asked = true;
    r->what  = copier_part(q);
    return status;
}

/* A message asks for a part. */
static void
on_message(void *service, rpc_call_t *call, rpc_message_t *message)
{
    copier_t *c          = service;
    reader_t *r          = rpc_call_context(call);
    attn_status_t status = ATTN_OK;
    bool full            = false;

    if (message == NULL) {
        rpc_call_end(call, ATTN_OK, "");
        return;
    }
    if (r == NULL) {
        status = reader_open(c, call, &r);
    }
    if (status == ATTN_OK) {
        status = read_request(c, r, message);
    }
    rpc_message_free(message);
    if (status == ATTN_OK) {
        status = send_part(c, call, &r->what, &full);
    }
    if (status == ATTN_OK) {
        rpc_call_next(call, 0);
    } else if (full) {
        await_room(c, r);
    } else {
        unary_fail(call, status);
    }
}

static void
on_closed(void *service, rpc_call_t *call)
{
    copier_t *c = service;
    reader_t *r = rpc_call_context(call);

    if (r == NULL) {
        return;
    }
    pthread_mutex_lock(&c->lock);
    r->closed = true;
    while (r->served) {
        pthread_cond_wait(&c->let_go, &c->lock);
    }
    *r->link = r->next;
    if (r->next != NULL) {
        r->next->link = r->link;
    }
    pthread_mutex_unlock(&c->lock);
    free(r);
}

/* ---- where they go ---- */

/* What came on one stream, and is not stored yet. */
typedef struct pull {
    copier_t *copier;
    const copier_asker_t *asker;
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
    } /* else nobody asked for it */
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
    return there || atomic_load(&p->copier->draining);
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

/* Is there still a use for the copy? */
static attn_status_t
check_wanted(const copier_t *c, const copier_asker_t *asker)
{
    if (atomic_load(&c->draining)) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, DRAINING ", and takes no chunks");
    }
    return asker->gone != NULL && asker->gone(asker->arg)
               ? attn_fail(ATTN_ERR_CANCELLED, "whoever asked for the copy has given it up")
               : ATTN_OK;
}

/* The next part; the caller's. */
static attn_status_t
await_part(copier_t *c, pull_t *p, rpc_message_t **message_p)
{
    uint64_t deadline_ns = p->asker->deadline_ns;
    uint64_t stalled     = attn_now_ns() + COPIER_STALL_MS * ATTN_NS_PER_MS;
    attn_status_t status = ATTN_OK;

    if (!rpc_client_wait(c->rpc, is_there, p, attn_min(deadline_ns, stalled))) {
        return attn_fail(ATTN_ERR_DEADLINE, "no part of the chunk came in time");
    }
    if ((status = check_wanted(c, p->asker)) != ATTN_OK) {
        return status;
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
        status = tensor_take(c->in, attn_max(bytes, 1), &tensor);
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
pull_parts(copier_t *c, pull_t *p, engine_arrival_t *arrival, uint64_t *bytes_p)
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
        status                 = await_part(c, p, &message);
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
pull(copier_t *c, rpc_channel_t *channel, engine_arrival_t *arrival, const copier_asker_t *asker,
     uint64_t *bytes_p)
{
    pull_t p             = {.copier = c, .asker = asker, .lock = PTHREAD_MUTEX_INITIALIZER};
    attn_status_t status = rpc_stream_open(channel, "/attn.v1.Worker/ExportChunks",
                                           asker->deadline_ns, received, &p, &p.stream);

    if (status != ATTN_OK) {
        return status;
    }
    status = pull_parts(c, &p, arrival, bytes_p);
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

static void
peer_close(copier_t *c, peer_t *peer)
{
    HASH_DEL(c->peers, peer);
    rpc_channel_close(peer->channel);
    free(peer);
}

/* Workers that come back with another address would add up. */
static void
make_room(copier_t *c)
{
    peer_t *oldest = NULL;

    for (peer_t *peer = c->peers; peer != NULL; peer = peer->hh.next) {
        if (peer->users == 0 && (oldest == NULL || peer->used_ns < oldest->used_ns)) {
            oldest = peer;
        }
    }
    if (oldest != NULL && HASH_COUNT(c->peers) >= PEERS_MAX) {
        peer_close(c, oldest);
    }
}

/* Where to copy from, with one user more. Under the lock. */
static attn_status_t
peer_use(copier_t *c, const char *address, peer_t **peer_p)
{
    attn_status_t status = ATTN_OK;
    peer_t *peer;

    HASH_FIND_STR(c->peers, address, peer);
    if (peer == NULL) {
        make_room(c);
    }
    if (peer == NULL && (peer = calloc(1, sizeof(*peer))) != NULL) {
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
    if (status == ATTN_OK) {
        peer->users++;
        *peer_p = peer;
    }
    return status;
}

/* Be one of those that copy now. */
static attn_status_t
copy_start(copier_t *c, uint32_t worker, const char *source, peer_t **peer_p)
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
        status = peer_use(c, source, peer_p);
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
            const copier_asker_t *asker, uint64_t *bytes_p)
{
    engine_arrival_t *arrival = NULL;
    peer_t *peer              = NULL;
    attn_status_t status      = check_wanted(c, asker);

    *bytes_p = 0;
    if (status == ATTN_OK) {
        status = copy_start(c, worker, source, &peer);
    }
    if (status != ATTN_OK) {
        atomic_fetch_add(&c->failed, 1);
        return status;
    }
    status = engine_arrival_begin(c->options.engine, copy, &arrival);
    if (status == ATTN_OK) {
        status = pull(c, peer->channel, arrival, asker, bytes_p);
        if (status != ATTN_OK) {
            attn_fail_in(status, "from worker %s: ", source);
            engine_arrival_drop(arrival);
        } else {
            status = engine_arrival_publish(arrival);
        }
    }
    pthread_mutex_lock(&c->lock);
    c->n_copies--;
    peer->users--;
    peer->used_ns = attn_now_ns();
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
    c->options    = *options;
    c->waiter.run = serve_waiting;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->let_go, NULL);
    attn_status_t status = rpc_client_create(0, &c->rpc);
    if (status == ATTN_OK) {
        rpc_client_set_tls(c->rpc, options->tls, NULL);
        status = tensors_create(options->out_max != 0 ? options->out_max : COPIER_OUT_MAX, &c->out);
    }
    if (status == ATTN_OK) {
        status = tensors_create(COPIER_IN_MAX, &c->in);
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
        peer_close(c, peer);
    }
    rpc_client_destroy(c->rpc);
    tensors_destroy(c->in);
    tensors_destroy(c->out);
    pthread_cond_destroy(&c->let_go);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

void
copier_tick(copier_t *c, uint64_t now_ns)
{
    tensors_sweep(c->in, now_ns);
    tensors_sweep(c->out, now_ns);
}

void
copier_drain(copier_t *c)
{
    atomic_store(&c->draining, true);
    rpc_client_wake(c->rpc);
}

void
copier_end_streams(copier_t *c)
{
    pthread_mutex_lock(&c->lock);
    for (reader_t *r = c->readers; r != NULL; r = r->next) {
        rpc_call_end(r->call, ATTN_ERR_CANCELLED, DRAINING);
    }
    pthread_mutex_unlock(&c->lock);
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
