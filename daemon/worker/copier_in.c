/*
 * copier_in.c: the parts of a chunk that comes from another worker. Several are under way at a
 * time; they are stored in the order in which they were asked for.
 *
 * Over gRPC a part is asked for by a message of the stream ExportChunks, and is its answer. Where
 * both workers have UCX each copy has some slots in memory that the source lends, or that messages
 * of UCX's fill (client/slab.h): a part is then asked for in a slot and stored from there, and what
 * is left of the stream is that the source opens the slots when it begins, closes them when it
 * ends, and that its breaking off tells of the source's end, which memory does not.
 *
 * A copy that did not end well may leave a slot that is written to still: its slab is given up.
 */
#include "daemon/worker/copier_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

#define PARTS 8u /* asked for at a time: 16 MiB, so that the way there and back costs nothing */
#define SLOTS 4u /* likewise; what lies in them is in nobody's cache any more if they are many */

typedef struct pull pull_t;

/* Where one part at a time is asked for through UCX. */
typedef struct pull_slot {
    pull_t *pull;
    ucx_ask_t ask;
    atomic_bool answered; /* and what follows is the answer */
    attn_status_t status;
    char sentence[UCX_SENTENCE_ROOM];
    const uint8_t *data;
    uint64_t bytes;
} pull_slot_t;

/* What came, and is not stored yet. */
struct pull {
    copier_t *copier;
    const copier_asker_t *asker;
    rpc_stream_t *stream;
    pthread_mutex_t lock; /* innermost */
    rpc_message_t *came[PARTS];
    uint32_t first, n; /* a ring */
    bool ended;
    attn_status_t status; /* with which it ended */
    char sentence[512];

    slab_t *slab; /* NULL: parts come over the stream */
    uint32_t n_slots;
    uint32_t due; /* the slot whose part is stored next */
    pull_slot_t slots[SLOTS];
};

/* ---- the stream ---- */

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

attn_status_t
copier_check_wanted(const copier_t *c, const copier_asker_t *asker)
{
    if (atomic_load(&c->draining)) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, COPIER_DRAINING ", and takes no chunks");
    }
    return asker->gone != NULL && asker->gone(asker->arg)
               ? attn_fail(ATTN_ERR_CANCELLED, "whoever asked for the copy has given it up")
               : ATTN_OK;
}

static attn_status_t
await(pull_t *p, bool (*done)(void *arg))
{
    uint64_t stalled = attn_now_ns() + COPIER_STALL_MS * ATTN_NS_PER_MS;

    return rpc_client_wait(p->copier->rpc, done, p, attn_min(p->asker->deadline_ns, stalled))
               ? copier_check_wanted(p->copier, p->asker)
               : attn_fail(ATTN_ERR_DEADLINE, "no part of the chunk came in time");
}

/* With what the stream ended, which is no reason to be without a failure. Under the lock. */
static attn_status_t
fail_ended(const pull_t *p)
{
    return p->status != ATTN_OK
               ? attn_fail(p->status, "%s", p->sentence)
               : attn_fail(ATTN_ERR_INTERNAL, "the stream ended before all parts had come");
}

/* The next message of the stream; the caller's. */
static attn_status_t
await_message(pull_t *p, rpc_message_t **message_p)
{
    attn_status_t status = await(p, is_there);

    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&p->lock);
    if (p->n > 0) {
        *message_p = p->came[p->first];
        p->first   = (p->first + 1) % PARTS;
        p->n--;
    } else {
        status = fail_ended(p);
    }
    pthread_mutex_unlock(&p->lock);
    return status;
}

/* ---- parts over the stream ---- */

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
pull_messages(pull_t *p, engine_arrival_t *arrival, uint64_t *bytes_p)
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
        status                 = await_message(p, &message);
        if (status == ATTN_OK && engine_arrival_ask(arrival, &part)) {
            ask(p, &part);
            under_way++;
        }
        if (status == ATTN_OK) {
            status = store(p->copier, arrival, message, bytes_p);
        }
        rpc_message_free(message);
    }
    return status;
}

/* ---- parts in slots ---- */

/* On a progress thread. */
static void
answered(void *arg, const ucx_head_t *reply, const char *sentence, const uint8_t *data)
{
    pull_slot_t *slot = arg;

    slot->status = reply->status == ATTN_OK              ? ATTN_OK
                   : attn_status_is_known(reply->status) ? (attn_status_t)reply->status
                                                         : ATTN_ERR_INTERNAL;
    snprintf(slot->sentence, sizeof(slot->sentence), "%s", sentence);
    slot->data  = data;
    slot->bytes = reply->bytes;
    atomic_store(&slot->answered, true);
}

static bool
is_answered(void *arg)
{
    pull_t *p = arg;

    return atomic_load(&p->slots[p->due].answered) || has_ended(p) ||
           atomic_load(&p->copier->draining);
}

static void
ask_in_slot(pull_slot_t *slot, const engine_export_t *part)
{
    ucx_peer_t *peer   = slab_peer(slot->pull->slab);
    copier_wish_t wish = {.layer = part->layer, .first = part->first, .n = part->n};
    ucx_head_t head    = {.tag = part->chunk, .bytes = sizeof(wish), .number = part->layer};

    atomic_store(&slot->answered, false);
    memcpy(ucx_place_data(peer, &slot->ask.place), &wish, sizeof(wish));
    ucx_ask(&slot->ask, peer, &head);
}

/* What came in a slot is stored from there. */
static attn_status_t
store_slot(pull_t *p, engine_arrival_t *arrival, uint64_t *bytes_p)
{
    pull_slot_t *slot    = &p->slots[p->due];
    attn_status_t status = await(p, is_answered);
    uint64_t checksum;

    if (status != ATTN_OK) {
        return status;
    }
    if (!atomic_load(&slot->answered)) {
        pthread_mutex_lock(&p->lock);
        status = fail_ended(p);
        pthread_mutex_unlock(&p->lock);
        return status;
    }
    if (slot->status != ATTN_OK) {
        return attn_fail(slot->status, "%s", slot->sentence);
    }
    if (slot->bytes < UCX_LINE) {
        return attn_fail(ATTN_ERR_INTERNAL, "%llu bytes came that are no part",
                         (unsigned long long)slot->bytes);
    }
    memcpy(&checksum, slot->data, sizeof(checksum));
    status = engine_arrival_store(arrival, slot->data + UCX_LINE, slot->bytes - UCX_LINE, checksum);
    *bytes_p += status == ATTN_OK ? slot->bytes - UCX_LINE : 0;
    return status;
}

/* All parts, one under way in each slot. */
static attn_status_t
pull_slots(pull_t *p, engine_arrival_t *arrival, uint64_t *bytes_p)
{
    attn_status_t status = ATTN_OK;
    uint32_t under_way   = 0;
    engine_export_t part;

    while (under_way < p->n_slots && engine_arrival_ask(arrival, &part)) {
        ask_in_slot(&p->slots[under_way++], &part);
    }
    for (p->due = 0; under_way > 0; under_way--) {
        status = store_slot(p, arrival, bytes_p);
        if (status != ATTN_OK) {
            return status;
        }
        if (engine_arrival_ask(arrival, &part)) {
            ask_in_slot(&p->slots[p->due], &part);
            under_way++;
        }
        p->due = (p->due + 1) % p->n_slots;
    }
    return ATTN_OK;
}

/* ---- slots ---- */

/* Parts come over the stream, though there is UCX: a line for each other reason. */
static void
log_no_slots(copier_t *c, copier_peer_t *peer, const char *reason)
{
    pthread_mutex_lock(&c->lock);
    bool news = strcmp(reason, peer->said) != 0;
    snprintf(peer->said, sizeof(peer->said), "%s", reason);
    pthread_mutex_unlock(&c->lock);
    if (news) {
        attn_log(ATTN_LOG_WARN, "worker.copies", "source=%s transport=grpc reason=\"%s\"",
                 peer->address, reason);
    }
}

static void
places_give(pull_t *p)
{
    while (p->n_slots > 0) {
        ucx_place_give(slab_peer(p->slab), &p->slots[--p->n_slots].ask.place);
    }
}

/* A slab, and places in it for parts of so many bytes. If there is no slab, slab.h logs why. */
static void
places_take(pull_t *p, copier_peer_t *peer, uint64_t part_bytes)
{
    char reason[sizeof(peer->said)];

    if (peer->slabs == NULL ||
        slabs_take(peer->slabs, p->asker->deadline_ns, &p->slab) != ATTN_OK) {
        p->slab = NULL;
        return;
    }
    for (pull_slot_t *slot = p->slots; p->n_slots < SLOTS; slot++, p->n_slots++) {
        slot->pull         = p;
        slot->ask.answered = answered;
        slot->ask.arg      = slot;
        if (!ucx_place_take(slab_peer(p->slab), sizeof(copier_wish_t), UCX_LINE + part_bytes,
                            &slot->ask.place)) {
            break;
        }
    }
    if (p->n_slots == 0) {
        snprintf(reason, sizeof(reason),
                 "the memory that the source lends has no room for a part of %llu bytes",
                 (unsigned long long)part_bytes);
        log_no_slots(p->copier, peer, reason);
        slab_release(p->slab);
        p->slab = NULL;
    }
}

/* Have the source open slots in the places that were taken. If it does not, parts come over the
 * stream. */
static attn_status_t
slots_open(pull_t *p, copier_peer_t *peer, const engine_copy_t *copy)
{
    Attn__V1__ExportChunkRequest r = ATTN__V1__EXPORT_CHUNK_REQUEST__INIT;
    Attn__V1__Slot slots[SLOTS], *all[SLOTS];
    rpc_message_t *message = NULL;
    ProtobufCMessage *head;

    for (uint32_t i = 0; i < p->n_slots; i++) {
        slab_slot(p->slab, &p->slots[i].ask.place, &slots[i]);
        all[i] = &slots[i];
    }
    r.cache_id   = copy->cache;
    r.chunk      = copy->chunk;
    r.generation = copy->generation;
    r.slots      = all;
    r.n_slots    = p->n_slots;
    rpc_stream_send(p->stream, &(rpc_outgoing_t){.head = &r.base});

    attn_status_t status = await_message(p, &message);
    if (status == ATTN_OK) {
        status = rpc_message_unpack(message, &attn__v1__export_chunk_reply__descriptor, &head);
    }
    const char *refused =
        status == ATTN_OK ? ((const Attn__V1__ExportChunkReply *)head)->no_slots : "";
    if (refused[0] != '\0') {
        log_no_slots(p->copier, peer, refused);
        places_give(p);
        slab_release(p->slab);
        p->slab = NULL;
    }
    rpc_message_free(message);
    return status;
}

/* The places are ours again once the source has closed its slots. */
static void
slots_close(pull_t *p, attn_status_t status)
{
    uint64_t until = attn_now_ns() + COPIER_STALL_MS * ATTN_NS_PER_MS;

    for (uint32_t i = 0; i < p->n_slots; i++) {
        ucx_forget(&p->slots[i].ask);
    }
    if (status == ATTN_OK) {
        rpc_stream_finish(p->stream);
    }
    if (status == ATTN_OK && rpc_client_wait(p->copier->rpc, has_ended, p, until) &&
        p->status == ATTN_OK) {
        places_give(p);
    } else {
        slab_spoil(p->slab);
    }
    slab_release(p->slab);
}

/* ---- copies ---- */

static attn_status_t
pull(pull_t *p, copier_peer_t *peer, const engine_copy_t *copy, engine_arrival_t *arrival,
     uint64_t *bytes_p)
{
    attn_status_t status = p->slab != NULL ? slots_open(p, peer, copy) : ATTN_OK;

    if (p->slab == NULL) {
        return status == ATTN_OK ? pull_messages(p, arrival, bytes_p) : status;
    }
    if (status == ATTN_OK) {
        status = pull_slots(p, arrival, bytes_p);
    }
    if (status == ATTN_OK) {
        atomic_fetch_add(&p->copier->bytes_in_ucx, *bytes_p);
    }
    slots_close(p, status);
    return status;
}

attn_status_t
copier_pull(copier_t *c, copier_peer_t *peer, const engine_copy_t *copy, engine_arrival_t *arrival,
            const copier_asker_t *asker, uint64_t *bytes_p)
{
    pull_t p = {.copier = c, .asker = asker, .lock = PTHREAD_MUTEX_INITIALIZER};

    places_take(&p, peer, engine_arrival_part_bytes(arrival));
    attn_status_t status = rpc_stream_open(peer->channel, "/attn.v1.Worker/ExportChunks",
                                           asker->deadline_ns, received, &p, &p.stream);
    if (status != ATTN_OK) {
        if (p.slab != NULL) {
            places_give(&p);
            slab_release(p.slab);
        }
        return status;
    }
    status = pull(&p, peer, copy, arrival, bytes_p);
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
