/*
 * ucx.h: runs beside gRPC, through UCX: over shared memory of one host, or as messages between
 * hosts.
 *
 * Over shared memory a server lends each of its clients a slab that UCX allocated (a System V
 * segment, which nobody can shorten under its users' feet); the client maps it through UCX, writes
 * what it asks into a slot, and then a sequence number. Nothing else happens on either side while
 * both look: no message, no system call, no allocation.
 *
 *     slab   | card | server's line | client's bell | client's line | slot | slot | ...
 *     slot   | request head | data ... | answer head, sentence | answer data ... |
 *
 * A head is one cache line whose last word is the sequence number: 0, then whatever the client
 * counts. It is written last, with release order, so data and completion are one ordered thing.
 * Whatever a peer can write is copied before it is believed: a server looks at a head once, in its
 * own copy, and of the slab it uses no word for an index or a size.
 *
 * Who has looked for a while in vain sleeps, having said so in a line that its peer reads after
 * each sequence number: servers by futex on the bells of all their slabs, clients on their gRPC
 * queue, where the server's `ring` brings a message. Both sides write, then fence, then read, so
 * one of them sees the other.
 *
 * Memory does not notice that a peer is gone: life and death of a session are those of a gRPC
 * stream of its user's, which closes it. A slab that one side has given up stays mapped at the
 * other's, and the kernel frees it with the last of them, killed or not.
 *
 * With messages each side has a slab of its own, and its slots are filled by what comes: the same
 * heads and data, checked before they are put there, number last. Sessions, slots, asks and their
 * handlers are the same; ucx_far.c (servers) and ucx_asks_far.c (clients) are what differs. UCX
 * notices connections that break; who stopped is not noticed here either. Of a head's flags the
 * two highest are not the user's. Both sides then open ports of UCX's, and who reaches one of TCP
 * can write into the process, secret or not (docs/security.md): it is for trusted networks alone.
 *
 * libucp is opened at run time, when the first node or port is made, so that a process which does
 * not use it gets none of the signal handlers and patched functions that come with it. ucx_lib.c
 * has that; with ucx_map.c and ucx_port.c it is all that knows a type of UCX's.
 */
#ifndef ATTN_RPC_UCX_H
#define ATTN_RPC_UCX_H

#include "rpc/rpc.h"

#include <stdatomic.h>

#define UCX_LINE 64u              /* bytes: a cache line, and what everything is aligned to */
#define UCX_SLOTS_FROM 256u       /* bytes of a slab before its slots */
#define UCX_SENTENCE_ROOM 448u    /* bytes of an answer's sentence, its end included */
#define UCX_SESSION_SLOTS_MAX 64u /* open in a session */
#define UCX_SESSIONS_MAX 120u     /* of a server: a thread can wait for so many bells */
#define UCX_SLAB_MIN (UINT64_C(64) << 10)
#define UCX_SLAB_MAX (UINT64_C(1) << 30)

/** What a request or an answer says beside its data. Written by one side, copied by the other. */
typedef struct ucx_head {
    uint64_t secret;  /**< of the session */
    uint64_t tag;     /**< the user's, whom the slot belongs to */
    uint64_t bytes;   /**< of data */
    uint64_t took_ns; /**< of an answer */
    uint32_t number;  /**< the user's */
    uint32_t flags;   /**< the user's, and UCX_RING */
    int32_t status;   /**< of an answer: attn_status_t */
    uint32_t spare;
    uint64_t offset; /**< of a message: the slot's */
    _Atomic uint64_t sequence;
} ucx_head_t;

_Static_assert(sizeof(ucx_head_t) == UCX_LINE, "a head is a cache line");

#define UCX_RING                                                                                   \
    (UINT32_C(1) << 31) /* of a request: nobody will look, ring when it is answered                \
                         */

/** Where a slot lies: as its client chose, within the slab. */
typedef struct ucx_place {
    uint64_t offset;  /**< of the request's head */
    uint64_t in, out; /**< room for data of requests, and of answers; bytes */
} ucx_place_t;

/** What a client needs to map a slab. Untrusted: as a peer told it. */
typedef struct ucx_offer {
    char host[96]; /**< which memory it is: the kernel's boot and its IPC namespace */
    const uint8_t *address, *key;
    uint64_t address_size, key_size;
    uint64_t base, bytes; /**< where it lies in the server, and its size */
    bool messages;        /**< no memory to map, but an address that messages are sent to */
    char version[16];     /**< of UCX, of which messages have to be */
    const char *reach;    /**< the server's address, as gRPC has it: which way messages go to it */
    const char *devices;  /**< by which they go; NULL: as `reach` and UCX_NET_DEVICES say */
    uint64_t session;     /**< its number, and the proof of who was told it */
    uint64_t secret;
} ucx_offer_t;

/** Bytes that a slot takes. UINT64_MAX: more than there are. */
uint64_t ucx_place_bytes(const ucx_place_t *place);

static inline uint64_t
ucx_lines(uint64_t bytes)
{
    return bytes / UCX_LINE * UCX_LINE + (bytes % UCX_LINE != 0) * UCX_LINE;
}

/** Where data of requests and of answers lie, in bytes from the slab's beginning. */
static inline uint64_t
ucx_place_in(const ucx_place_t *place)
{
    return place->offset + UCX_LINE;
}

static inline uint64_t
ucx_place_out(const ucx_place_t *place)
{
    return ucx_place_in(place) + ucx_lines(place->in) + UCX_LINE + UCX_SENTENCE_ROOM;
}

/** As memcpy(), which is slow for some offsets of some cores (rpc_copy()). */
void ucx_copy(void *to, const void *from, uint64_t bytes);

/** This host, as ucx_offer_t.host has it; "" where the kernel does not tell, which is none. */
void ucx_host(char host[96]);

/* ---- nodes: UCX, as one user of a process has it ---- */

typedef struct ucx_node ucx_node_t;

/**
 * Say in the environment what UCX must not do to this process, where nothing is said of it:
 * UCX_HANDLE_ERRORS=none, UCX_MEM_EVENTS=n, UCX_LOG_LEVEL=fatal. ucx_asks_create() and
 * ucx_crew_create() call it, which is before any node: no other thread uses the environment then.
 */
void ucx_environment(void);

/** Open UCX. Its environment (UCX_TLS, say) counts where it is set, and is not changed any more.
 * @return ATTN_ERR_UNSUPPORTED  built without UCX, no libucp here, or UCX_TLS leaves shared memory
 * out: the sentence says which
 */
attn_status_t ucx_node_create(ucx_node_t **node_p);
void ucx_node_destroy(ucx_node_t *node); /* after its sessions and peers; NULL is allowed */

/* ---- servers ---- */

typedef struct ucx_crew ucx_crew_t;       /* the threads that look for requests and handle them */
typedef struct ucx_session ucx_session_t; /* one client's slab */
typedef struct ucx_slot ucx_slot_t;

#define UCX_CREW_THREADS 8u /* as a rule */

typedef struct ucx_crew_options {
    /** NULL: lend shared memory. Else exchange messages, over these devices of the network, as UCX
     * names them ("eth0,mlx5_0:1"); "all": as UCX_NET_DEVICES says, or all there are. */
    const char *network;
    uint32_t threads;    /**< requests handled at once; 0: UCX_CREW_THREADS */
    uint32_t spin_us;    /**< look so long in vain before sleeping */
    uint64_t memory_max; /**< bytes of all slabs; with messages they are the server's alone */
} ucx_crew_options_t;

/** Figures since the start; open ones now. */
typedef struct ucx_figures {
    uint64_t requests, dropped, sleeps, rings;
    uint64_t bytes_in, bytes_out; /**< of data */
    uint64_t slab_bytes;
    uint32_t sessions, slots;
    char way[16]; /**< "shm"; of messages "net", or UCX's transport of the session that opened last
                   */
} ucx_figures_t;

/** @return ATTN_ERR_UNSUPPORTED as ucx_node_create(), or the kernel has no futex_waitv (5.16), or
 * UCX has no such devices */
attn_status_t ucx_crew_create(const ucx_crew_options_t *options, ucx_crew_t **crew_p);
/** After all sessions. Waits for requests that are handled. NULL is allowed. */
void ucx_crew_destroy(ucx_crew_t *crew);
void ucx_crew_describe(ucx_crew_t *crew, ucx_figures_t *figures);

/**
 * Lend a client a slab.
 * @param ring  wake this client: any thread, no lock held but one that ucx_session_close() takes;
 *              not called once that returned
 * @return ATTN_ERR_INVALID    bytes is not within UCX_SLAB_MIN to _MAX
 * @return ATTN_ERR_EXHAUSTED  UCX_SESSIONS_MAX are open, memory_max would be passed, or the system
 *                             has no shared memory left
 */
attn_status_t ucx_session_open(ucx_crew_t *crew, uint64_t bytes, void (*ring)(void *arg), void *arg,
                               ucx_session_t **session_p);
/** What its client is to be told; valid while the session is open. */
void ucx_session_offer(const ucx_session_t *session, ucx_offer_t *offer);
/**
 * With messages, before the first run: where answers go, as the client told (ucx_peer_address()).
 * @param broken  called at most once, like `ring`: no message comes or goes any more; close it
 * @return ATTN_ERR_INVALID      it is of shared memory, or has been told before
 * @return ATTN_ERR_UNSUPPORTED  no transport leads there
 */
attn_status_t ucx_session_answer(ucx_session_t *session, const uint8_t *address, uint64_t size,
                                 void (*broken)(void *arg, const char *why));
/** No slot is opened in it any more; the memory goes when the last one is closed. */
void ucx_session_close(ucx_session_t *session);

/** The open session of this number, if the secret is its own. Release it with
 * ucx_session_release().
 * @return ATTN_ERR_NOT_FOUND */
attn_status_t ucx_session_find(ucx_crew_t *crew, uint64_t number, uint64_t secret,
                               ucx_session_t **session_p);
void ucx_session_release(ucx_session_t *session);

/**
 * Handle a request: on a thread of the crew; may take as long as it likes. A slot has one request
 * at a time.
 * @param head    a copy; bytes is at most place.in, tag is the slot's
 * @param data    place.in bytes that the client may change meanwhile
 * @param answer  place.out bytes, to be written
 * @param reply   to be filled: bytes, took_ns, number
 * @return the answer's status; with a failure this thread's sentence goes along
 */
typedef attn_status_t (*ucx_handle_fn)(void *arg, const ucx_head_t *head, const uint8_t *data,
                                       uint8_t *answer, ucx_head_t *reply);

/**
 * Open a slot where its client wants it.
 * @param tag   requests with another are dropped
 * @param gone  called once the slot is closed and no request of it is handled any more
 * @return ATTN_ERR_INVALID    the place is not in the slab, not aligned, or in another slot
 * @return ATTN_ERR_EXHAUSTED  UCX_SESSION_SLOTS_MAX are open
 */
attn_status_t ucx_slot_open(ucx_session_t *session, const ucx_place_t *place, uint64_t tag,
                            ucx_handle_fn handle, void (*gone)(void *arg), void *arg,
                            ucx_slot_t **slot_p);
/** Take no more requests of it. One that is handled goes on, and is answered. */
void ucx_slot_close(ucx_slot_t *slot);

/* ---- clients ---- */

typedef struct ucx_asks ucx_asks_t; /* what a client's peers are asked and have not answered */
typedef struct ucx_peer ucx_peer_t; /* one server's slab, mapped */

/** One question to a slot; its fields are ucx_asks.c's, its memory the user's. */
typedef struct ucx_ask ucx_ask_t;
struct ucx_ask {
    /** Called once, unless forgotten before, where the client's other callbacks are. */
    void (*answered)(void *arg, const ucx_head_t *reply, const char *sentence, const uint8_t *data);
    void *arg;
    ucx_peer_t *peer;
    ucx_place_t place;
    uint64_t sequence;
    bool unattended;         /* nobody looks */
    ucx_ask_t *next, **link; /* of the waiting ones */
};

/** Its answers are looked for by whoever waits for rpc (rpc_client_set_poller()). Make it before
 * anybody does, and destroy it after rpc. */
attn_status_t ucx_asks_create(rpc_client_t *rpc, ucx_asks_t **asks_p);
void ucx_asks_destroy(ucx_asks_t *asks); /* NULL is allowed */

/** Messages that answered nothing that was waited for. */
uint64_t ucx_asks_dropped(ucx_asks_t *asks);

/** Look for answers now: when the server rang. On a progress thread of rpc. */
void ucx_asks_look(ucx_asks_t *asks);

/**
 * Map a server's slab, or make one that messages to the server are written in.
 * @return ATTN_ERR_UNSUPPORTED  no UCX here, another host or namespace, or it cannot be mapped; or
 *                               no transport leads there: the sentence says why
 */
attn_status_t ucx_peer_open(ucx_asks_t *asks, const ucx_offer_t *offer, ucx_peer_t **peer_p);
/** Unmap. None of its asks waits. */
void ucx_peer_close(ucx_peer_t *peer);

/** With messages: what the server is to be told (ucx_session_answer()); valid while the peer is.
 * @return false: it is of shared memory, and needs nothing */
bool ucx_peer_address(ucx_peer_t *peer, const uint8_t **address_p, uint64_t *size_p);

/**
 * With messages: see that they come through, both ways.
 * @return ATTN_ERR_UNSUPPORTED  none did until the deadline, or UCX says that none will
 */
attn_status_t ucx_peer_greet(ucx_peer_t *peer, uint64_t deadline_ns);

/** Which way: "shm", or UCX's transport: "tcp", "rc_mlx5", ... */
const char *ucx_peer_way(ucx_peer_t *peer);

/** Does nothing come or go any more? What is asked then ends as ATTN_ERR_UNAVAILABLE. */
bool ucx_peer_is_broken(ucx_peer_t *peer);

/** Take room for a slot. @return false: there is none */
bool ucx_place_take(ucx_peer_t *peer, uint64_t in, uint64_t out, ucx_place_t *place);
/** Give it back, when the server has said that it closed the slot. */
void ucx_place_give(ucx_peer_t *peer, const ucx_place_t *place);

/** Where the request's data goes: place.in bytes. */
uint8_t *ucx_place_data(ucx_peer_t *peer, const ucx_place_t *place);

/** Ask: head's tag, bytes, number and flags are the user's. ask->place is set. What was asked by it
 * before and not answered is forgotten. */
void ucx_ask(ucx_ask_t *ask, ucx_peer_t *peer, const ucx_head_t *head);

/** Wait no more. Returns when `answered` does not run; not to be called from it. */
void ucx_forget(ucx_ask_t *ask);

#endif
