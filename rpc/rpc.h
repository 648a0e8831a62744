/*
 * rpc.h: gRPC over C core behind one small interface: servers, calls, streams,
 * deadlines, cancellation, metadata, health. Knows nothing of attention, and no gRPC
 * type leaves this folder.
 *
 * Messages are protobuf whose large field, if there is one, is `bytes data = 15`, the
 * last on the wire: head (all other fields) is packed and unpacked by protobuf-c in an
 * arena. Data is copied once on the way in; on the way out not at all, if the sender waits for
 * `sent`, or else once.
 */
#ifndef ATTN_RPC_H
#define ATTN_RPC_H

#include "base/attn_types.h"
#include "rpc/tls.h"

#include <protobuf-c/protobuf-c.h>
#include <sys/uio.h>

#define RPC_MESSAGE_MAX (16u << 20)  /* bytes of one message, both ways; checked by both ends */
#define RPC_DATA_PART_MAX (2u << 20) /* bytes of data that a sender puts in one message */

/** Take gRPC up and down; counted. Servers and clients do it themselves: a process that
 * makes and drops many of them keeps gRPC up this way. */
void rpc_init(void);
void rpc_shutdown(void);

/* ---- messages ---- */

/** A message received: valid until rpc_message_free(). */
typedef struct rpc_message rpc_message_t;

/**
 * Unpack the head: every field but `data`, into an arena of at most 32x the head's bytes
 * + 64 KiB (and 64 MiB). A foreign client may put `data` elsewhere than last or repeat it;
 * the last one wins, as in protobuf. A type without a `bytes` field 15 has no data. Unpacked
 * again (as another type), the head before is gone.
 *
 * @return ATTN_ERR_INVALID    not this message: truncated, or of wrong wire types
 * @return ATTN_ERR_TOO_LARGE  over the arena's budget
 */
attn_status_t rpc_message_unpack(rpc_message_t *message, const ProtobufCMessageDescriptor *type,
                                 ProtobufCMessage **head_p); /* owned by the message */

/** Bytes of `data`; 0 if absent. Valid after rpc_message_unpack(). */
uint64_t rpc_message_data_size(const rpc_message_t *message);

/** Copy bytes [offset, offset + size) of `data`; they must lie within it. */
void rpc_message_data_copy(const rpc_message_t *message, uint64_t offset, void *to, uint64_t size);

void rpc_message_free(rpc_message_t *message); /* NULL is allowed */

/** A message to send: head, and data as n_data pieces, which stay untouched by the owner
 * until `sent` was called. */
typedef struct rpc_outgoing {
    const ProtobufCMessage *head; /**< packed before the call returns */
    const struct iovec *data;     /**< the array is copied; what it points to is not */
    uint32_t n_data;
    /** Called exactly once, also on failure, when the bytes are no longer read; NULL: data is
     * copied instead. On any thread, perhaps within the call that takes the message or within
     * another one of rpc.h: it sets a flag or the like, takes no lock that is held round such
     * calls, and calls none of them. On a client, waiters look again after it. */
    void (*sent)(void *arg);
    void *arg;
} rpc_outgoing_t;

/* ---- server ---- */

typedef struct rpc_server rpc_server_t;
typedef struct rpc_call rpc_call_t; /* one call as the server sees it */

/**
 * A method. A unary handler gets the one message, and ends the call. A streaming handler
 * gets every message in order, one at a time: the next is read when the handler returned
 * and rpc_call_next() was called (so a slow handler pushes back). Handlers run on the
 * server's threads and may block; each call has at most one handler running.
 */
typedef struct rpc_method {
    const char *path; /**< "/attn.v1.Worker/Run" */
    bool streaming;
    /** message is owned by the handler. Streaming: NULL when the client half-closed (or is
     * gone: then `closed` follows). */
    void (*handle)(void *service, rpc_call_t *call, rpc_message_t *message);
    /** The call is over (ended, cancelled, or the peer is gone); called exactly once for each
     * call that handle saw, after which the call must not be used. Never concurrent with handle.
     * Streaming methods have it. Unary ones may: one that does not uses the call until it has
     * ended it and handle has returned, whatever became of the peer. */
    void (*closed)(void *service, rpc_call_t *call);
} rpc_method_t;

typedef struct rpc_server_options {
    const char *address;   /**< "127.0.0.1:0": port 0 takes a free one; "unix:/path" */
    uint32_t threads;      /**< handlers at once; 0: 16 */
    uint32_t side_by_side; /**< short handlers (up to 0.3 ms) that have cores: beside as many no
                              thread is woken for one more, unless they take long; 0: all cores */
    uint32_t spin_us;      /**< busy-poll so long before sleeping */
    rpc_tls_t *tls;        /**< with cert and key; NULL: plaintext. Kept as long as it is needed */
    uint32_t calls_max;    /**< open calls, of which streams may be seven in eight; more are refused
                              with RESOURCE_EXHAUSTED; 0: 4,096 */
    uint32_t peer_calls_max; /**< of them, of one connection: over TCP more are refused, over a unix
                                socket they wait at the client; 0: half */
    uint32_t stall_ms;   /**< a peer that takes none of the 2 MiB before it for so long, or thrice
                            as long to send a message that is due, is cut off; 0: 10,000 */
    uint64_t memory_max; /**< bytes for connections and for messages on their way in and out, as
                            far as they are not lent: beyond it C core closes idle connections,
                            then breaks streams with RESOURCE_EXHAUSTED; 0: 1 GiB */
} rpc_server_options_t;

/**
 * Make a server with these methods (copied; services passed through). It always serves
 * grpc.health.v1.Health (Check, Watch) as well: service "" and each service named in a path.
 * @return ATTN_ERR_UNAVAILABLE  the address cannot be bound; names it
 * @return ATTN_ERR_INVALID      an option is out of bounds, or tls has no certificate
 */
attn_status_t rpc_server_create(const rpc_server_options_t *options, rpc_server_t **server_p);
attn_status_t rpc_server_add(rpc_server_t *server, const rpc_method_t *methods, uint32_t n,
                             void *service); /* before the start */
attn_status_t rpc_server_start(rpc_server_t *server);
uint16_t rpc_server_port(const rpc_server_t *server);            /* 0 for unix */
void rpc_server_set_serving(rpc_server_t *server, bool serving); /* for health; at first true */

/** What came to a server: calls since its start, of which refused ones are of no method, one too
 * many in total, or one too many of a connection. */
typedef struct rpc_server_figures {
    uint64_t calls, refused_unknown, refused_full, refused_peer;
    uint32_t calls_open, connections; /**< now; connections with an open call */
} rpc_server_figures_t;

void rpc_server_describe(rpc_server_t *server, rpc_server_figures_t *figures);

/**
 * Stop: refuse new calls, let running ones end until grace_ms passed, then cancel them.
 * Streams are told by their `closed`. Returns when no handler runs any more; so not to be
 * called from one.
 */
void rpc_server_stop(rpc_server_t *server, uint32_t grace_ms);
void rpc_server_destroy(rpc_server_t *server); /* stops first; NULL is allowed */

/** End a unary call with a message and status OK; or a call of either kind with a status
 * (ATTN_OK too, for streams) and its sentence. Exactly one end counts; later ones are ignored. */
void rpc_call_reply(rpc_call_t *call, const rpc_outgoing_t *message);
void rpc_call_end(rpc_call_t *call, attn_status_t status, const char *sentence);

/** Streaming: queue a message; any thread; never waits. @return ATTN_ERR_EXHAUSTED when more than
 * 64 MiB wait for a peer that does not read (data that is lent until `sent` does not count, and
 * each message counts as 512 bytes more than it has), ATTN_ERR_CANCELLED when the call is over,
 * ATTN_ERR_TOO_LARGE over RPC_MESSAGE_MAX; in all three nothing is queued, and sent was called. */
attn_status_t rpc_call_send(rpc_call_t *call, const rpc_outgoing_t *message);

/** Streaming: read the next message, once at most 8 MiB of answers wait to be read by the peer. If
 * it does not come whole within_ms after that, the call is cut off with ATTN_ERR_DEADLINE; 0: it
 * may take as long as it likes. */
void rpc_call_next(rpc_call_t *call, uint32_t within_ms);

uint64_t rpc_call_deadline_ns(const rpc_call_t *call); /* as attn_now_ns(); UINT64_MAX: none */
bool rpc_call_cancelled(const rpc_call_t *call);
const char *rpc_call_peer(const rpc_call_t *call);
const char *rpc_call_metadata(const rpc_call_t *call, const char *key); /* NULL: absent */
void rpc_call_set_context(rpc_call_t *call, void *context); /* of streams: the handler's own */
void *rpc_call_context(const rpc_call_t *call);

/* ---- client ---- */

/** Completion queue and progress, shared by channels. Callbacks run in the thread that waits;
 * while none does, in a thread of the client's own, the first up to 10 ms late. All of a
 * client's callbacks come one after the other, with no lock held. */
typedef struct rpc_client rpc_client_t;
typedef struct rpc_channel rpc_channel_t; /* to one address; reconnects by itself with backoff */
typedef struct rpc_stream rpc_stream_t;

attn_status_t rpc_client_create(uint32_t spin_us, rpc_client_t **client_p);
void rpc_client_destroy(rpc_client_t *client); /* after its channels; NULL is allowed */

/**
 * Have all channels that are opened from now on use TLS, and take new certificates for the calls
 * that begin after a change (over a new connection; calls that run stay where they are). Before
 * the first channel. server_name, if not NULL or empty, is looked for in the servers' certificates
 * in place of the address's host; copied.
 */
void rpc_client_set_tls(rpc_client_t *client, rpc_tls_t *tls, const char *server_name);

/** Send this header with every call that begins from now on; one a client. key: lower case, lives
 * for ever; value: printable ASCII, copied. Any thread. */
void rpc_client_set_header(rpc_client_t *client, const char *key, const char *value);

/** Counts the values that were set. */
uint64_t rpc_client_header_version(const rpc_client_t *client);

/**
 * Make progress in the calling thread until done(arg) or the deadline: whoever waits
 * drives the queue, spinning spin_us first, so that an answer needs no thread switch; one
 * waiter polls at a time and hands over when it leaves. done is called with no lock held,
 * by this thread or by the one that polls, and must be cheap. Not to be called from a
 * callback. @return false on deadline
 */
bool rpc_client_wait(rpc_client_t *client, bool (*done)(void *arg), void *arg,
                     uint64_t deadline_ns);

/**
 * Another source of answers, which whoever waits looks at between two looks at the queue. Its
 * functions are called by one thread at a time, the one that polls, with no lock held.
 */
typedef struct rpc_poller {
    bool (*awaits)(void *arg); /**< is there anything to look for? Cheap */
    bool (*look)(void *arg);   /**< call what has been answered. @return whether anything was */
    void (*doze)(void *arg);   /**< the thread is about to sleep in the queue: from now on whoever
                                    answers has to put something into it. Followed by look() */
    void (*rouse)(void *arg);  /**< it is awake again */
    void *arg;
} rpc_poller_t;

/** Have waiters look there, too: once, before anybody waits. */
void rpc_client_set_poller(rpc_client_t *client, const rpc_poller_t *poller);

/** Have all waiters look at done again: what it reads was changed by other means than a
 * callback of this client. */
void rpc_client_wake(rpc_client_t *client);

/** Keepalive 10 s / 5 s; reconnect backoff 50 ms to 2 s. Makes no connection yet. */
attn_status_t rpc_channel_open(rpc_client_t *client, const char *address,
                               rpc_channel_t **channel_p);
/** Calls and streams end as cancelled, told as ever on a progress thread: at the latest in
 * rpc_client_destroy(). NULL is allowed. */
void rpc_channel_close(rpc_channel_t *channel);

/** Called exactly once; message is NULL unless status is ATTN_OK and then the callee's. The
 * sentence is valid during the call. On a progress thread: must not block. */
typedef void (*rpc_reply_fn)(void *arg, attn_status_t status, const char *sentence,
                             rpc_message_t *message);

/** Unary call. An unreachable peer fails at once, it is not waited for. */
void rpc_call_unary(rpc_channel_t *channel, const char *path, const rpc_outgoing_t *request,
                    uint64_t deadline_ns, rpc_reply_fn reply, void *arg);

/** As rpc_call_unary, and wait. @return the call's status, with its sentence set */
attn_status_t rpc_call_unary_wait(rpc_channel_t *channel, const char *path,
                                  const rpc_outgoing_t *request, uint64_t deadline_ns,
                                  rpc_message_t **message_p);

/**
 * Ask the server's grpc.health.v1.Health how it is, and wait.
 * @return the call's status: ATTN_ERR_UNAVAILABLE, ATTN_ERR_DEADLINE and such
 */
attn_status_t rpc_channel_health(rpc_channel_t *channel, uint64_t deadline_ns, bool *serving_p);

/**
 * Bidirectional stream. `received` gets every message, in order (message is the callee's),
 * and at the end exactly once message NULL with the status; then the stream must be closed.
 * On a progress thread: must not block.
 */
attn_status_t rpc_stream_open(rpc_channel_t *channel, const char *path, uint64_t deadline_ns,
                              rpc_reply_fn received, void *arg, rpc_stream_t **stream_p);

/** Queue a message; any thread. After the stream's end it is dropped (sent is called): `received`
 * told. So it is when the message is over RPC_MESSAGE_MAX or more than 64 MiB wait for a peer
 * that does not read; the stream then breaks, with ATTN_ERR_TOO_LARGE or _EXHAUSTED. */
void rpc_stream_send(rpc_stream_t *stream, const rpc_outgoing_t *message);

/**
 * Have `taken` called, with the stream's arg, each time the wire has taken one of its messages, in
 * order: so a sender of much keeps only a few of them waiting. As `received` it comes on a progress
 * thread, with no lock held, and never after the end was told; a message dropped with a broken
 * stream is not told. Said once, before the first message is sent.
 */
void rpc_stream_on_taken(rpc_stream_t *stream, void (*taken)(void *arg));

/** Within `received`: leave it at this message until the next one is sent, or the stream ends. So a
 * user who has the whole answer to what it asked saves a write, and waking the peer, for every
 * answer; what the peer sends unasked waits until then, and an end that follows it does too. */
void rpc_stream_rest(rpc_stream_t *stream);

/** Half-close: no message follows those already queued. The server then ends the stream. */
void rpc_stream_finish(rpc_stream_t *stream);

/** Cancel if it has not ended, dropping what is queued; no message is told from now on, but the
 * end is, if it was not yet: later, on a progress thread, and arg must live until then. The
 * handle is gone. Also from within `received`. NULL is allowed. */
void rpc_stream_close(rpc_stream_t *stream);

#endif
