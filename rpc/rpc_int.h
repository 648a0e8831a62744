/*
 * rpc_int.h: what the files of this folder share; included nowhere else.
 *
 * Everything that C core does for us ends as a tag on a completion queue, and a tag here
 * is always an rpc_op_t: whoever takes it off the queue calls done(). Batches are never
 * started, and nothing of C core is freed, with a lock of ours held, for both may run a
 * user's `sent` on the spot.
 *
 * Memory of a fixed size comes from gpr_zalloc(), which ends the process when there is
 * none, as C core itself does; what a peer can make large is allocated with a way to fail.
 */
#ifndef ATTN_RPC_INT_H
#define ATTN_RPC_INT_H

#include "rpc/rpc.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define RPC_QUEUE_MAX (UINT64_C(64) << 20) /* bytes of ours that wait for one slow peer */
#define RPC_BACKLOG (UINT64_C(8) << 20)    /* answers that wait before nothing more is read */
#define RPC_STALL_MS 10000u                /* for a peer to take, or send, 2 MiB */
#define RPC_SENTENCE_MAX 1024              /* bytes of a status' sentence on the wire */
#define RPC_METADATA_MAX (16 << 10)        /* bytes of all headers of a call */

#define RPC_STATUS_KEY "attn-status" /* trailing metadata: the exact attn_status_t */

#define RPC_OF(type, member, pointer) ((type *)((char *)(pointer)-offsetof(type, member)))

typedef struct rpc_op rpc_op_t;
struct rpc_op {
    void (*done)(rpc_op_t *op, bool ok);
};

/* ThreadSanitizer does not see into C core: it is told that what happened before a batch
 * was started happened before its end. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define RPC_OP_RELEASE(op) __tsan_release(op)
#define RPC_OP_ACQUIRE(op) __tsan_acquire(op)
#else
#define RPC_OP_RELEASE(op) ((void)(op))
#define RPC_OP_ACQUIRE(op) ((void)(op))
#endif

/* ---- core.c ---- */

gpr_timespec rpc_timespec(uint64_t deadline_ns);
uint64_t rpc_deadline_from(gpr_timespec deadline);

/** Start a batch whose end is op; ops are ours, so a refusal is a defect. */
void rpc_start(grpc_call *call, const grpc_op *ops, size_t n, rpc_op_t *op);

/** Dispatch an event. @return whether it was the end of an op */
bool rpc_dispatch(grpc_event event);

/** A slice of at most RPC_SENTENCE_MAX bytes that does not end inside a character. */
grpc_slice rpc_sentence_slice(const char *sentence);

/** A condition variable whose waits are on the monotonic clock. */
void rpc_cond_init(pthread_cond_t *cond);

/** Wait until deadline_ns (UINT64_MAX: for ever). @return false when it has passed */
bool rpc_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns);

static inline grpc_arg
rpc_arg(const char *key, int value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

/* glibc copies runs above 4 KiB by `rep movsb`, which on some AMD cores is twenty times
 * slower when the two page offsets lie just so; pieces below that never take this way. */
#define RPC_COPY_PIECE 2048

static inline uint8_t *
rpc_copy(uint8_t *to, const void *from, size_t n)
{
    const uint8_t *p = from;

    for (; n > RPC_COPY_PIECE; n -= RPC_COPY_PIECE) {
        memcpy(to, p, RPC_COPY_PIECE);
        to += RPC_COPY_PIECE;
        p += RPC_COPY_PIECE;
    }
    if (n > 0) {
        memcpy(to, p, n);
    }
    return to + n;
}

/* Between two looks at memory that somebody else is to write. */
static inline void
rpc_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- tls.c ---- */

/** Whose certificates a server or channel uses, and which of them it has taken. */
typedef struct rpc_tls_use {
    rpc_tls_t *tls; /* NULL: plaintext */
    uint64_t version;
} rpc_tls_use_t;

rpc_tls_t *rpc_tls_ref(rpc_tls_t *tls);     /* NULL is allowed */
bool rpc_tls_has_own(const rpc_tls_t *tls); /* a certificate to serve with */

/* The only two places where it is decided how peers prove who they are. */
grpc_server_credentials *rpc_server_credentials(rpc_tls_use_t *use); /* use outlives the server */
grpc_channel_credentials *rpc_channel_credentials(rpc_tls_use_t *use);

/* ---- message.c ---- */

rpc_message_t *rpc_message_new(grpc_byte_buffer *buffer); /* takes the buffer */

/* ---- blocks.c ---- */

/** As grpc_slice_malloc(), with memory that is kept for the next one if it is large. */
grpc_slice rpc_slice_malloc(size_t size);

/* ---- outgoing.c ---- */

/** A message on its way out. */
typedef struct rpc_packet {
    struct rpc_packet *next;
    grpc_byte_buffer *buffer;
    uint64_t bytes; /* with what the packet itself costs */
    uint64_t held;  /* of memory that is ours: without data that its owner lends */
} rpc_packet_t;

/** Packets in order, and the bytes of all. */
typedef struct rpc_queue {
    rpc_packet_t *head, *tail;
    uint64_t bytes, held;
} rpc_queue_t;

/**
 * Pack a message. On failure `sent` was called. `client`, if given, has its waiters look
 * again after `sent` ran, since that happens on any thread.
 */
attn_status_t rpc_packet_make(const rpc_outgoing_t *message, rpc_client_t *client,
                              rpc_packet_t **packet_p);

void rpc_packet_free(rpc_packet_t *packet); /* with all that follow it; NULL is allowed */

void rpc_queue_push(rpc_queue_t *queue, rpc_packet_t *packet);
rpc_packet_t *rpc_queue_pop(rpc_queue_t *queue);  /* NULL: empty */
rpc_packet_t *rpc_queue_take(rpc_queue_t *queue); /* all, as a list */

/* ---- crew.c ---- */

/** The threads that poll a server's queue and run its handlers. */
typedef struct rpc_crew rpc_crew_t;

rpc_crew_t *rpc_crew_create(grpc_completion_queue *queue, uint32_t handlers_max,
                            uint32_t side_by_side, uint32_t spin_us);
attn_status_t rpc_crew_start(rpc_crew_t *crew);
bool rpc_crew_at_work(const rpc_crew_t *crew); /* some of its threads were started */

/** Poll in this thread, if the crew is not at work. @return false when the queue is drained */
bool rpc_crew_poll(rpc_crew_t *crew);

/** A call has work for a handler; called while an event is dispatched. */
void rpc_crew_ready(rpc_crew_t *crew, rpc_call_t *call);

/** Wait for the end of all threads, which is when the queue was shut down and is empty. */
void rpc_crew_join(rpc_crew_t *crew);
void rpc_crew_destroy(rpc_crew_t *crew);

/* ---- server.c ---- */

typedef struct rpc_entry {
    char *path;
    uint32_t path_size;
    bool streaming;
    void (*handle)(void *service, rpc_call_t *call, rpc_message_t *message);
    void (*closed)(void *service, rpc_call_t *call);
    void *service;
    atomic_uint typical_ns, runs; /* of handle: see rpc_call_is_short() */
} rpc_entry_t;

/** A call that the server accepted, as it comes from C core; the callee takes it all. */
typedef struct rpc_accepted {
    grpc_call *grpc;
    grpc_call_details details;
    grpc_metadata_array metadata;
    char *peer; /* made by server.c, once per call */
} rpc_accepted_t;

/** A call has work for a handler thread; called while an event is dispatched. */
void rpc_server_ready(rpc_server_t *server, rpc_call_t *call);

/** A call has begun: it is watched (watch.c) until rpc_server_call_ended(). */
void rpc_server_call_began(rpc_server_t *server, rpc_call_t *call);

/** A call is over on the wire and no handler has it: it no longer holds up a stop, and is not
 * touched by the server any more. */
void rpc_server_call_ended(rpc_server_t *server, rpc_call_t *call);

/** How long a message that is due may take to come. */
uint32_t rpc_server_receive_ms(const rpc_server_t *server);

/** The server's memory lives as long as it and its calls do. */
void rpc_server_unref(rpc_server_t *server);

/** The first service path that starts with this name and a slash exists. */
bool rpc_server_has_service(const rpc_server_t *server, const char *name, size_t size);

/* ---- call.c ---- */

/** Take an accepted call: give it to entry's handler, or end it with status at once. */
void rpc_call_begin(rpc_server_t *server, const rpc_accepted_t *accepted, rpc_entry_t *entry,
                    attn_status_t refused, const char *sentence);

/** Do the handler's work that rpc_server_ready() announced; as_short: nobody was woken for it. */
void rpc_call_run(rpc_call_t *call, bool as_short);

/** Whether the handler is expected to take less than it is worth to wake a thread. */
bool rpc_call_is_short(const rpc_call_t *call);

/** Whether it is expected to take no longer than a call of somebody else may wait. */
bool rpc_call_is_bearable(const rpc_call_t *call);

/** The link of a call in the server's list of ready calls. */
rpc_call_t **rpc_call_link(rpc_call_t *call);

/** Take a call whose peer keeps us waiting for longer than it may: it stays until
 * rpc_call_cut(). @return whether it was taken */
bool rpc_call_take_stalled(rpc_call_t *call, uint64_t now_ns, uint64_t stall_ns);

/** End a call that was taken, on both sides at once: what waits for its peer is dropped. */
void rpc_call_cut(rpc_call_t *call, uint64_t stall_ns);

/** A server's calls that are open, as watch.c lists them. */
typedef struct rpc_watched {
    rpc_call_t *next, **link;
} rpc_watched_t;

rpc_watched_t *rpc_call_watched(rpc_call_t *call);

/* ---- peers.c ---- */

/** How many calls each connection has open. Not thread-safe: under its owner's lock. */
typedef struct rpc_peers rpc_peers_t;

/** Count a call of the connection of this name. @return how many it has, this one included */
uint32_t rpc_peers_began(rpc_peers_t **peers, const char *name);
void rpc_peers_ended(rpc_peers_t **peers, const char *name);
uint32_t rpc_peers_count(const rpc_peers_t *peers);

/* ---- watch.c ---- */

/** The thread that cuts off peers which keep a server waiting. */
typedef struct rpc_watch rpc_watch_t;

rpc_watch_t *rpc_watch_create(uint32_t stall_ms);
attn_status_t rpc_watch_start(rpc_watch_t *watch);
void rpc_watch_add(rpc_watch_t *watch, rpc_call_t *call);
void rpc_watch_remove(rpc_watch_t *watch, rpc_call_t *call);
void rpc_watch_destroy(rpc_watch_t *watch); /* ends the thread; NULL is allowed */

/* ---- health.c ---- */

typedef struct rpc_health rpc_health_t;

attn_status_t rpc_health_create(rpc_server_t *server, rpc_health_t **health_p);
void rpc_health_set(rpc_health_t *health, bool serving); /* tells the watchers */
void rpc_health_stop(rpc_health_t *health);              /* ends the watches */
void rpc_health_destroy(rpc_health_t *health);           /* NULL is allowed */

/* ---- client.c ---- */

grpc_completion_queue *rpc_client_queue(const rpc_client_t *client);

/** What the client's channels are to use: tls may be NULL, and so may the name. */
rpc_tls_t *rpc_client_tls(const rpc_client_t *client);
const char *rpc_client_server_name(const rpc_client_t *client);

/** The header for a call that begins: key is empty if there is none. The value is the caller's to
 * unref. */
grpc_metadata rpc_client_header(rpc_client_t *client);

/** A call or stream begins or has ended: the client lives at least until all have. */
void rpc_client_began(rpc_client_t *client);
void rpc_client_ended(rpc_client_t *client);

/** Have op's done called on a progress thread. */
void rpc_client_post(rpc_client_t *client, rpc_op_t *op);

/** The client's memory, apart from its life: what may outlive rpc_client_destroy(). */
void rpc_client_ref(rpc_client_t *client);
void rpc_client_unref(rpc_client_t *client);

/* ---- channel.c ---- */

/** One call or stream of a channel, so that closing the channel finds it. */
typedef struct rpc_pending rpc_pending_t;
struct rpc_pending {
    rpc_channel_t *channel;
    grpc_call *grpc;
    grpc_metadata header; /* see rpc_pending_first() */
    rpc_pending_t *next, *previous;
    bool listed;
};

/** What the end of a call brings, on the client. */
typedef struct rpc_end {
    grpc_metadata_array trailing;
    grpc_status_code code;
    grpc_slice details;
} rpc_end_t;

void rpc_pending_begin(rpc_pending_t *pending, rpc_channel_t *channel, const char *path,
                       uint64_t deadline_ns);
grpc_op rpc_pending_first(const rpc_pending_t *pending); /* SEND_INITIAL_METADATA */
void rpc_pending_end(rpc_pending_t *pending); /* gives the grpc_call and the channel back */

/** A message came: whoever listens there speaks as we do. */
void rpc_channel_heard(rpc_channel_t *channel);

rpc_client_t *rpc_channel_client(const rpc_channel_t *channel);

void rpc_end_init(rpc_end_t *end);
grpc_op rpc_end_op(rpc_end_t *end);
void rpc_end_destroy(rpc_end_t *end);

/** The status that the end says, and its sentence in `sentence`. */
attn_status_t rpc_end_status(const rpc_end_t *end, const rpc_channel_t *channel,
                             char sentence[RPC_SENTENCE_MAX + 1]);

#endif
