/*
 * call.c: one call as the server sees it.
 *
 *      accepted --> reading <--> handling --> ended (status is sent)
 *                      \             \          |
 *                       `-------------`--> over (C core: RECV_CLOSE) --> closed --> freed
 *
 * Its events may be dispatched while a handler of the call runs on another thread, so an
 * event only changes the state under the call's lock; whether there is work for a handler
 * is decided there too, and `handling` sees to it that one thread at a time does it.
 *
 * RECV_CLOSE_ON_SERVER is started first and is the only word of a cancellation or of a
 * peer that is gone. Sends and the status follow one another: C core allows one of each
 * kind in flight, and wants batches of one kind started one after the other.
 *
 * A peer that is slow holds no thread. Its answers wait in the call's queue, most of their bytes
 * being lent by whoever made them; while more than a few wait, nothing more is read; and one
 * that takes nothing for long, or does not go on with a message it began, is cut off (watch.c).
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define SHORT_NS 50000      /* of a handler: not worth waking a thread beside it */
#define UNDECIDED_NS 200000 /* up to here it may be short on a quieter machine */
#define BEARABLE_NS 300000  /* for a call of somebody else to wait; above, a wake-up is little */

struct rpc_call {
    rpc_server_t *server;
    rpc_entry_t *entry; /* NULL: refused */
    grpc_call *grpc;
    char *peer;
    uint64_t deadline_ns;
    void *context;
    atomic_bool cancelled;
    rpc_call_t *ready_next;
    rpc_watched_t watched;
    pthread_mutex_t lock;

    /* Under the lock from here. */
    grpc_metadata_array metadata;
    char **values; /* of the metadata, as strings, made when asked for */

    unsigned ops;     /* batches in flight */
    bool handling;    /* queued for a handler thread, or in it */
    bool seen;        /* a handler has had it */
    bool closed;      /* `closed` has returned, or is not to be called */
    bool over;        /* RECV_CLOSE is in */
    bool counted;     /* the server counts it as open */
    bool reading;     /* RECV_MESSAGE is in flight */
    bool read_wanted; /* the handler asked for the next message */
    bool half_closed; /* no message follows */
    bool inbox_full;  /* inbox is for the handler; NULL: half-close */
    bool sending;     /* SEND_MESSAGE or the status is in flight */
    bool started;     /* SEND_INITIAL_METADATA was */
    bool ended;       /* the user ended it */
    bool status_sent;
    attn_status_t cut_as;    /* ATTN_OK unless rpc_call_cut() has it or had it */
    uint64_t send_since_ns;  /* of what is being sent */
    uint32_t read_within_ms; /* for the next message; 0: as long as it takes */
    uint64_t read_until_ns;  /* of the message that is being read; 0: as long as it takes */
    rpc_message_t *inbox;
    rpc_queue_t queue;

    rpc_op_t op_close, op_read, op_send;
    int close_cancelled;
    grpc_byte_buffer *read_buffer;
    rpc_packet_t *send_packet;
    attn_status_t status;
    grpc_slice sentence, status_value;
    grpc_metadata trailing;
};

/* ---- life ---- */

static const char *
value_at(rpc_call_t *call, size_t i)
{
    if (call->values == NULL) {
        call->values = gpr_zalloc(call->metadata.count * sizeof(*call->values));
    }
    if (call->values[i] == NULL) {
        call->values[i] = grpc_slice_to_c_string(call->metadata.metadata[i].value);
    }
    return call->values[i];
}

static void
call_free(rpc_call_t *call)
{
    rpc_server_t *server = call->server;

    for (size_t i = 0; call->values != NULL && i < call->metadata.count; i++) {
        gpr_free(call->values[i]);
    }
    gpr_free(call->values);
    gpr_free(call->peer);
    grpc_call_unref(call->grpc);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_slice_unref(call->sentence);
    grpc_slice_unref(call->status_value);
    pthread_mutex_destroy(&call->lock);
    gpr_free(call);
    rpc_server_unref(server);
}

/*
 * Let go of the lock, and of what the state no longer needs: messages that nobody will
 * read or send, and the call itself. Every function that takes the lock gives it back
 * here. A call whose user has yet to end it, and has no `closed` to learn that it is
 * over, lives on as memory, but holds up nothing. That user may end it on another thread
 * as soon as the lock is free; so while the server forgets the call it counts as an
 * operation in flight, and whoever is last frees it.
 */
static void
call_release(rpc_call_t *call)
{
    bool dead     = call->over && !call->handling && call->ops == 0;
    bool left     = dead && call->counted;
    bool gone     = dead && (call->closed || (call->ended && call->entry->closed == NULL));
    call->counted = call->counted && !left;
    call->ops += left;

    rpc_packet_t *unsent  = NULL;
    rpc_message_t *unread = NULL;
    if (call->over) {
        unsent = rpc_queue_take(&call->queue);
    }
    if (call->over || call->ended) {
        unread           = call->inbox;
        call->inbox      = NULL;
        call->inbox_full = false;
    }
    rpc_server_t *server = call->server;
    pthread_mutex_unlock(&call->lock);

    rpc_packet_free(unsent);
    rpc_message_free(unread);
    if (left) {
        rpc_server_call_ended(server, call);
        pthread_mutex_lock(&call->lock);
        call->ops--;
        call_release(call); /* once: it is no longer counted */
    } else if (gone) {
        call_free(call);
    }
}

/* ---- sending ---- */

/* Fill ops with what may be sent next. @return how many; 0: nothing, or not now */
static size_t
next_send(rpc_call_t *call, grpc_op ops[3])
{
    size_t n = 0;

    if (call->sending || call->over || call->status_sent) {
        return 0;
    }
    rpc_packet_t *packet = rpc_queue_pop(&call->queue);
    bool status          = call->ended && call->queue.head == NULL;
    if (packet == NULL && !status) {
        return 0;
    }
    memset(ops, 0, 3 * sizeof(*ops));
    if (!call->started) {
        call->started = true;
        ops[n++].op   = GRPC_OP_SEND_INITIAL_METADATA;
    }
    call->send_packet = packet;
    if (packet != NULL) {
        ops[n].op                               = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = packet->buffer;
    }
    if (status) {
        call->status_sent = true;
        grpc_op *op       = &ops[n++];
        op->op            = GRPC_OP_SEND_STATUS_FROM_SERVER;
        op->data.send_status_from_server.status =
            (grpc_status_code)attn_status_to_grpc(call->status);
        op->data.send_status_from_server.status_details = &call->sentence;
        if (call->status != ATTN_OK) {
            call->trailing = (grpc_metadata){
                .key   = grpc_slice_from_static_string(RPC_STATUS_KEY),
                .value = call->status_value,
            };
            op->data.send_status_from_server.trailing_metadata_count = 1;
            op->data.send_status_from_server.trailing_metadata       = &call->trailing;
        }
    }
    call->sending       = true;
    call->send_since_ns = attn_now_ns();
    call->ops++;
    return n;
}

/* Whether the next message is to be read now: the handler wants it and is out of the way, and
 * the peer reads what it is answered. It is then taken as being read. */
static bool
next_read(rpc_call_t *call)
{
    uint64_t waiting =
        call->queue.bytes + (call->send_packet != NULL ? call->send_packet->bytes : 0);

    if (!call->read_wanted || call->reading || call->inbox_full || call->handling ||
        call->half_closed || call->over || call->ended || waiting > RPC_BACKLOG) {
        return false;
    }
    call->reading     = true;
    call->read_wanted = false;
    call->read_until_ns =
        call->read_within_ms == 0 ? 0 : attn_now_ns() + call->read_within_ms * ATTN_NS_PER_MS;
    call->ops++;
    return true;
}

/* Send and read what there is; takes the lock's place like call_release(). */
static void
call_go(rpc_call_t *call)
{
    grpc_op ops[3], read = {.op = GRPC_OP_RECV_MESSAGE};
    grpc_call *grpc = call->grpc;
    size_t n        = next_send(call, ops);
    bool reads      = next_read(call);

    call_release(call);
    if (n > 0) {
        rpc_start(grpc, ops, n, &call->op_send); /* the batch keeps the call alive */
    }
    if (reads) {
        read.data.recv_message.recv_message = &call->read_buffer;
        rpc_start(grpc, &read, 1, &call->op_read);
    }
}

static void
on_sent(rpc_op_t *op, bool ok)
{
    rpc_call_t *call = RPC_OF(rpc_call_t, op_send, op);

    pthread_mutex_lock(&call->lock);
    rpc_packet_t *packet = call->send_packet;
    call->send_packet    = NULL;
    call->sending        = false;
    call->send_since_ns  = 0;
    call->ops--;
    rpc_packet_t *unsent = ok ? NULL : rpc_queue_take(&call->queue); /* RECV_CLOSE tells why */
    call_go(call);
    rpc_packet_free(packet);
    rpc_packet_free(unsent);
}

/* Set the call's end, once. @return false if it had one */
static bool
set_end(rpc_call_t *call, attn_status_t status, const char *sentence)
{
    char value[16];

    if (call->ended) {
        return false;
    }
    snprintf(value, sizeof(value), "%d", (int)status);
    call->ended        = true;
    call->status       = status;
    call->sentence     = rpc_sentence_slice(sentence);
    call->status_value = grpc_slice_from_copied_string(value);
    return true;
}

void
rpc_call_end(rpc_call_t *call, attn_status_t status, const char *sentence)
{
    pthread_mutex_lock(&call->lock);
    set_end(call, status, sentence);
    call_go(call);
}

void
rpc_call_reply(rpc_call_t *call, const rpc_outgoing_t *message)
{
    rpc_packet_t *packet = NULL;
    attn_status_t status = rpc_packet_make(message, NULL, &packet);
    rpc_packet_t *unsent = NULL;

    pthread_mutex_lock(&call->lock);
    bool first = set_end(call, status, status == ATTN_OK ? "" : attn_last_error());
    if (status == ATTN_OK && first && !call->over) {
        rpc_queue_push(&call->queue, packet);
    } else {
        unsent = packet;
    }
    call_go(call);
    rpc_packet_free(unsent);
}

attn_status_t
rpc_call_send(rpc_call_t *call, const rpc_outgoing_t *message)
{
    rpc_packet_t *packet = NULL;
    attn_status_t status = rpc_packet_make(message, NULL, &packet);

    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&call->lock);
    if (call->over || call->ended) {
        status = attn_fail(ATTN_ERR_CANCELLED, "%s: the call is over", call->entry->path);
    } else if (call->queue.head != NULL && call->queue.held + packet->held > RPC_QUEUE_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "%s: %llu bytes wait for a peer that does not read",
                           call->entry->path, (unsigned long long)call->queue.held);
    } else {
        rpc_queue_push(&call->queue, packet);
        packet = NULL;
    }
    call_go(call);
    rpc_packet_free(packet);
    return status;
}

/* ---- reading ---- */

void
rpc_call_next(rpc_call_t *call, uint32_t within_ms)
{
    pthread_mutex_lock(&call->lock);
    call->read_wanted    = true;
    call->read_within_ms = within_ms;
    call_go(call);
}

/* Whether a handler thread is to be called; it is then taken as called. */
static bool
take_work(rpc_call_t *call)
{
    if (call->handling || call->closed) {
        return false;
    }
    if (call->over && (!call->seen || call->entry->closed == NULL)) {
        call->closed = !call->seen; /* nobody knows of it, so nobody is told */
        return false;
    }
    call->handling = call->over || (call->inbox_full && !call->ended);
    return call->handling;
}

/* Hand over to a handler thread if there is work; takes the lock's place. */
static void
call_wake(rpc_call_t *call)
{
    bool ready = take_work(call);

    if (ready) { /* `handling` keeps the call alive until rpc_call_run() */
        rpc_server_t *server = call->server;
        call_release(call);
        rpc_server_ready(server, call);
    } else {
        call_release(call);
    }
}

static void
on_read(rpc_op_t *op, bool ok)
{
    rpc_call_t *call = RPC_OF(rpc_call_t, op_read, op);

    pthread_mutex_lock(&call->lock);
    call->ops--;
    call->reading       = false;
    call->read_until_ns = 0;
    if (ok && call->read_buffer != NULL) {
        call->inbox = rpc_message_new(call->read_buffer);
    } else {
        call->half_closed = true;
    }
    call->read_buffer = NULL;
    call->inbox_full  = true;
    if (call->inbox == NULL && !call->entry->streaming) {
        call->inbox_full = false;
        set_end(call, ATTN_ERR_INVALID, "the call ended before its request came");
        call->closed = true;
        call_go(call);
        return;
    }
    call_wake(call);
}

static void
on_close(rpc_op_t *op, bool ok)
{
    rpc_call_t *call = RPC_OF(rpc_call_t, op_close, op);

    (void)ok;
    pthread_mutex_lock(&call->lock);
    call->ops--;
    call->over = true;
    if (call->close_cancelled) {
        atomic_store(&call->cancelled, true);
    }
    call_wake(call);
}

/* ---- peers that keep us waiting ---- */

rpc_watched_t *
rpc_call_watched(rpc_call_t *call)
{
    return &call->watched;
}

/* A peer may take so long for a message: the more, the larger it is. */
static uint64_t
patience(uint64_t bytes, uint64_t stall_ns)
{
    return stall_ns * (1 + bytes / RPC_DATA_PART_MAX);
}

bool
rpc_call_take_stalled(rpc_call_t *call, uint64_t now_ns, uint64_t stall_ns)
{
    bool taken = false;

    pthread_mutex_lock(&call->lock);
    if (!call->over && call->cut_as == ATTN_OK) {
        uint64_t bytes = call->send_packet != NULL ? call->send_packet->bytes : 0;
        if (call->sending && now_ns >= call->send_since_ns + patience(bytes, stall_ns)) {
            call->cut_as = ATTN_ERR_EXHAUSTED;
        } else if (call->read_until_ns != 0 && now_ns >= call->read_until_ns) {
            call->cut_as = ATTN_ERR_DEADLINE; /* no handler has seen what is being read */
        }
        taken = call->cut_as != ATTN_OK;
        if (taken) {
            set_end(call, call->cut_as, ""); /* whoever sends from now on is told that it is over */
            call->status_sent = true;        /* by the cancellation, which overtakes what waits */
            call->ops++;                     /* keeps the call alive until rpc_call_cut() */
        }
    }
    pthread_mutex_unlock(&call->lock);
    return taken;
}

void
rpc_call_cut(rpc_call_t *call, uint64_t stall_ns)
{
    char sentence[RPC_SENTENCE_MAX];
    const char *path = call->entry != NULL ? call->entry->path : "a refused call";

    if (call->cut_as == ATTN_ERR_EXHAUSTED) {
        snprintf(sentence, sizeof(sentence),
                 "%s: its answers are not being read: cut off after %llu ms without progress", path,
                 (unsigned long long)(stall_ns / ATTN_NS_PER_MS));
    } else {
        snprintf(sentence, sizeof(sentence),
                 "%s: a message was begun, or due, and did not come whole within %u ms", path,
                 call->read_within_ms);
    }
    pthread_mutex_lock(&call->lock);
    rpc_packet_t *unsent = rpc_queue_take(&call->queue);
    pthread_mutex_unlock(&call->lock);

    rpc_packet_free(unsent);
    grpc_call_cancel_with_status(call->grpc, (grpc_status_code)attn_status_to_grpc(call->cut_as),
                                 sentence, NULL);
    pthread_mutex_lock(&call->lock);
    call->ops--;
    call_release(call);
}

/*
 * How long a handler takes, by experience: an average in which one run in eight counts, so
 * that a thread that the kernel put aside for once changes little. A run beside which
 * another thread was woken took longer for that very reason on a busy machine, so such
 * runs do not count while it is undecided whether the handler is short; instead every
 * eighth is run as if it were.
 */
bool
rpc_call_is_short(const rpc_call_t *call)
{
    rpc_entry_t *entry = call->entry;
    unsigned typical   = atomic_load_explicit(&entry->typical_ns, memory_order_relaxed);

    return typical < SHORT_NS ||
           (typical < UNDECIDED_NS &&
            atomic_fetch_add_explicit(&entry->runs, 1, memory_order_relaxed) % 8 == 0);
}

bool
rpc_call_is_bearable(const rpc_call_t *call)
{
    return atomic_load_explicit(&call->entry->typical_ns, memory_order_relaxed) < BEARABLE_NS;
}

static void
note_time(rpc_entry_t *entry, uint64_t ns, bool as_short)
{
    int typical = (int)atomic_load_explicit(&entry->typical_ns, memory_order_relaxed);

    if (as_short || typical >= UNDECIDED_NS || ns >= UNDECIDED_NS) {
        typical += ((int)attn_min(ns, 2 * UNDECIDED_NS) - typical) / 8;
        atomic_store_explicit(&entry->typical_ns, (unsigned)typical, memory_order_relaxed);
    }
}

void
rpc_call_run(rpc_call_t *call, bool as_short)
{
    rpc_entry_t *entry = call->entry;

    pthread_mutex_lock(&call->lock);
    if (call->over && call->seen && entry->closed != NULL) {
        call_release(call);
        entry->closed(entry->service, call);
        pthread_mutex_lock(&call->lock);
        call->closed = true;
    } else if (!call->over && call->inbox_full && !call->ended) {
        rpc_message_t *message = call->inbox;
        call->inbox            = NULL;
        call->inbox_full       = false;
        call->seen             = true;
        pthread_mutex_unlock(&call->lock);
        uint64_t start = attn_now_ns();
        entry->handle(entry->service, call, message);
        note_time(entry, attn_now_ns() - start, as_short);
        pthread_mutex_lock(&call->lock);
    }
    call->handling = false;
    if (call->over) {
        call_wake(call);
    } else {
        call_go(call);
    }
}

/* ---- the beginning ---- */

void
rpc_call_begin(rpc_server_t *server, const rpc_accepted_t *accepted, rpc_entry_t *entry,
               attn_status_t refused, const char *sentence)
{
    rpc_call_t *call = gpr_zalloc(sizeof(*call));

    call->server       = server;
    call->entry        = entry;
    call->grpc         = accepted->grpc;
    call->metadata     = accepted->metadata;
    call->peer         = accepted->peer;
    call->deadline_ns  = rpc_deadline_from(accepted->details.deadline);
    call->sentence     = grpc_empty_slice();
    call->status_value = grpc_empty_slice();
    call->op_close     = (rpc_op_t){on_close};
    call->op_read      = (rpc_op_t){on_read};
    call->op_send      = (rpc_op_t){on_sent};
    call->counted      = true;
    call->closed       = entry == NULL;
    pthread_mutex_init(&call->lock, NULL);

    grpc_op op                             = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op.data.recv_close_on_server.cancelled = &call->close_cancelled;
    call->ops                              = 2; /* the one more is this function's */
    rpc_server_call_began(server, call);
    rpc_start(call->grpc, &op, 1, &call->op_close);

    pthread_mutex_lock(&call->lock);
    call->ops--;
    if (entry == NULL) {
        set_end(call, refused, sentence);
    } else {
        call->read_wanted    = true;
        call->read_within_ms = entry->streaming ? 0 : rpc_server_receive_ms(server);
    }
    call_go(call);
}

rpc_call_t **
rpc_call_link(rpc_call_t *call)
{
    return &call->ready_next;
}

/* ---- what a handler may ask ---- */

uint64_t
rpc_call_deadline_ns(const rpc_call_t *call)
{
    return call->deadline_ns;
}

bool
rpc_call_cancelled(const rpc_call_t *call)
{
    return atomic_load(&call->cancelled);
}

const char *
rpc_call_peer(const rpc_call_t *call)
{
    return call->peer;
}

const char *
rpc_call_metadata(const rpc_call_t *call, const char *key)
{
    rpc_call_t *c     = (rpc_call_t *)call;
    const char *value = NULL;

    pthread_mutex_lock(&c->lock);
    for (size_t i = 0; i < c->metadata.count && value == NULL; i++) {
        if (grpc_slice_str_cmp(c->metadata.metadata[i].key, key) == 0) {
            value = value_at(c, i);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return value;
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
