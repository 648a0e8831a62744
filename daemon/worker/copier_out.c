/*
 * copier_out.c: parts of chunks for whoever asks: over the stream on which it asks, or through UCX,
 * in slots that it had opened over the stream. Such a slot is for one chunk; a part is read out of
 * its pages into the memory of the slot, by a thread of UCX's crew, and nothing of it goes over the
 * stream, which is there to begin and end by: with it all its slots are closed.
 */
#include "daemon/worker/copier_int.h"

#include "base/status.h"
#include "daemon/lender.h"
#include "daemon/unary.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROOM_LOOK_US 2000u /* how often we look whether parts have left */
#define SLOTS_MAX 16u      /* of a stream */

/* A stream over which somebody asks us for parts. */
struct copier_reader {
    struct copier_reader *next, **link;
    rpc_call_t *call;
    engine_export_t what; /* it asked for last */
    bool asked;
    bool waits;  /* for room, with a turn */
    bool served; /* by copier_serve_waiting(), now */
    bool closed; /* is over */
    uint64_t turn;
    ucx_slot_t *slots[SLOTS_MAX];
    uint32_t n_slots;
};

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

static void
count_part(copier_t *c, uint64_t bytes)
{
    atomic_fetch_add(&c->parts_out, 1);
    atomic_fetch_add(&c->bytes_out, bytes);
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
    if (status == ATTN_OK) {
        count_part(c, k + v);
    }
    return status;
}

/* The one that has waited longest. Under the lock. */
static copier_reader_t *
first_waiting(const copier_t *c)
{
    copier_reader_t *first = NULL;

    for (copier_reader_t *r = c->readers; r != NULL; r = r->next) {
        if (r->waits && !r->closed && (first == NULL || r->turn < first->turn)) {
            first = r;
        }
    }
    return first;
}

/* On a thread of its own for as long as anybody waits. */
void
copier_serve_waiting(job_t *job)
{
    copier_t *c = JOB_OF(copier_t, waiter, job);

    pthread_mutex_lock(&c->lock);
    for (copier_reader_t *r; (r = first_waiting(c)) != NULL;) {
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
await_room(copier_t *c, copier_reader_t *r)
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

/* ---- slots ---- */

/* What is read in a slot; gone with it. */
typedef struct part_slot {
    copier_t *copier;
    uint64_t cache, chunk;
    uint32_t generation;
    uint64_t room; /* bytes of an answer */
} part_slot_t;

/* On a thread of the crew. */
static attn_status_t
read_part(void *arg, const ucx_head_t *head, const uint8_t *data, uint8_t *answer,
          ucx_head_t *reply)
{
    const part_slot_t *slot = arg;
    copier_t *c             = slot->copier;
    uint64_t k, v;
    copier_wish_t wish;

    if (head->bytes != sizeof(wish)) {
        return attn_fail(ATTN_ERR_INVALID, "a part is asked for in %llu bytes: %zu",
                         (unsigned long long)head->bytes, sizeof(wish));
    }
    memcpy(&wish, data, sizeof(wish));
    engine_export_t what = {.cache      = slot->cache,
                            .chunk      = slot->chunk,
                            .generation = slot->generation,
                            .layer      = wish.layer,
                            .first      = wish.first,
                            .n          = wish.n};
    attn_status_t status = engine_export_bytes(c->options.engine, &what, &k, &v);
    if (status == ATTN_OK && k + v > slot->room - UCX_LINE) {
        status = attn_fail(ATTN_ERR_INVALID, "the part has %llu bytes, and its slot room for %llu",
                           (unsigned long long)(k + v), (unsigned long long)slot->room - UCX_LINE);
    }
    uint8_t *part = answer + UCX_LINE;
    if (status == ATTN_OK) {
        status = engine_chunk_export(c->options.engine, &what, part, part + k, k, v);
    }
    if (status != ATTN_OK) {
        return status;
    }
    uint64_t checksum = engine_checksum(&what, part, k + v);
    memset(answer, 0, UCX_LINE);
    memcpy(answer, &checksum, sizeof(checksum));
    reply->bytes  = UCX_LINE + k + v;
    reply->number = head->number;
    count_part(c, k + v);
    return ATTN_OK;
}

static attn_status_t
slot_open(copier_t *c, const Attn__V1__ExportChunkRequest *q, const Attn__V1__Slot *asked,
          ucx_slot_t **slot_p)
{
    if (asked->in != sizeof(copier_wish_t) || asked->out <= UCX_LINE) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the slot has room for %llu and %llu bytes: a part is asked for in %zu, "
                         "and takes more than %u",
                         (unsigned long long)asked->in, (unsigned long long)asked->out,
                         sizeof(copier_wish_t), UCX_LINE);
    }
    part_slot_t *slot = calloc(1, sizeof(*slot));
    if (slot == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slot");
    }
    *slot = (part_slot_t){.copier     = c,
                          .cache      = q->cache_id,
                          .chunk      = q->chunk,
                          .generation = q->generation,
                          .room       = asked->out};
    attn_status_t status =
        lender_part_slot_open(c->options.lender, asked, q->chunk, read_part, free, slot, slot_p);
    if (status != ATTN_OK) {
        free(slot);
    }
    return status;
}

static void
slots_close(copier_reader_t *r)
{
    while (r->n_slots > 0) {
        ucx_slot_close(r->slots[--r->n_slots]);
    }
}

/* All that were asked for, or none, and say which. */
static attn_status_t
slots_open(copier_t *c, copier_reader_t *r, const Attn__V1__ExportChunkRequest *q)
{
    Attn__V1__ExportChunkReply reply = ATTN__V1__EXPORT_CHUNK_REPLY__INIT;
    attn_status_t status             = ATTN_OK;

    slots_close(r); /* those of the chunk before */
    if (q->n_slots > SLOTS_MAX) {
        status = attn_fail(ATTN_ERR_INVALID, "%zu slots for parts of a chunk: at most %u",
                           q->n_slots, SLOTS_MAX);
    }
    for (size_t i = 0; i < q->n_slots && status == ATTN_OK; i++) {
        status = slot_open(c, q, q->slots[i], &r->slots[r->n_slots]);
        r->n_slots += status == ATTN_OK;
    }
    if (status != ATTN_OK) {
        slots_close(r);
        reply.no_slots = (char *)attn_last_error();
    }
    return rpc_call_send(r->call, &(rpc_outgoing_t){.head = &reply.base});
}

/* ---- the stream ---- */

/* The first message of a stream. */
static attn_status_t
reader_open(copier_t *c, rpc_call_t *call, copier_reader_t **reader_p)
{
    attn_status_t status =
        gate_admit(c->options.gate, rpc_call_metadata(call, TICKET_HEADER), false);
    if (status != ATTN_OK) {
        return status;
    }
    copier_reader_t *r = calloc(1, sizeof(*r));
    if (r == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to read a chunk");
    }
    r->call = call;
    pthread_mutex_lock(&c->lock);
    if (atomic_load(&c->draining)) {
        status = attn_fail(ATTN_ERR_CANCELLED, COPIER_DRAINING);
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
 * What the stream asks for: a part, or slots. The ticket was looked at when it was opened, and is
 * for every other chunk: one that takes long to read may outlive it. *full_p: as send_part()'s.
 */
static attn_status_t
serve(copier_t *c, copier_reader_t *r, rpc_message_t *message, bool *full_p)
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
    if (status != ATTN_OK) {
        return status;
    }
    return q->n_slots > 0 ? slots_open(c, r, q) : send_part(c, r->call, &r->what, full_p);
}

static void
on_message(void *service, rpc_call_t *call, rpc_message_t *message)
{
    copier_t *c          = service;
    copier_reader_t *r   = rpc_call_context(call);
    attn_status_t status = ATTN_OK;
    bool full            = false;

    if (message == NULL) {
        if (r != NULL) { /* before it hears of the end: it may have them opened anew at once */
            slots_close(r);
        }
        rpc_call_end(call, ATTN_OK, "");
        return;
    }
    if (r == NULL) {
        status = reader_open(c, call, &r);
    }
    if (status == ATTN_OK) {
        status = serve(c, r, message, &full);
    }
    rpc_message_free(message);
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
    copier_t *c        = service;
    copier_reader_t *r = rpc_call_context(call);

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
    slots_close(r);
    free(r);
}

const rpc_method_t copier_method = {.path      = "/attn.v1.Worker/ExportChunks",
                                    .streaming = true,
                                    .handle    = on_message,
                                    .closed    = on_closed};

void
copier_end_streams(copier_t *c)
{
    pthread_mutex_lock(&c->lock);
    for (copier_reader_t *r = c->readers; r != NULL; r = r->next) {
        rpc_call_end(r->call, ATTN_ERR_CANCELLED, COPIER_DRAINING);
    }
    pthread_mutex_unlock(&c->lock);
}
