/* ucx_crew_int.h: what ucx_crew.c (the threads) and ucx_session.c (sessions, slots) share. */
#ifndef ATTN_RPC_UCX_CREW_INT_H
#define ATTN_RPC_UCX_CREW_INT_H

#include "rpc/ucx_int.h"

#include <pthread.h>

#define UCX_SLOTS_MAX 4096u /* open at once in all sessions: they are all looked at */

struct ucx_session {
    ucx_crew_t *crew;
    ucx_memory_t *memory; /* NULL: of messages, and the slab is this process's alone */
    ucx_card_t *card;     /* where the slab begins */
    uint8_t *at;          /* likewise, as bytes */
    uint64_t bytes, number, secret;

    /* Under the crew's lock. */
    uint32_t references; /* its user's, its slots', whoever found it */
    uint32_t n_slots;
    bool closed;
    ucx_session_t *next, **link; /* of those that are not closed */

    /* Of messages; under the crew's lock. */
    ucx_way_t *way;       /* to the client; NULL: not told, or gone */
    ucx_head_t hello;     /* that is sent there */
    bool greeted, broken; /* the client said hello; nothing goes there any more, ... */
    bool told;            /* ... and the session's user knows */
    char why[96];

    pthread_mutex_t ring_lock;
    void (*ring)(void *arg); /* NULL: closed */
    void (*on_broken)(void *arg, const char *why);
    void *ring_arg;
};

/* How far a running request is. When its client sees the answer, the slot's place is the client's
 * again, and may be another slot's before the thread that answered says that it did: so `answers`
 * is said first, and who wants the place waits for the few stores that follow. */
enum { UCX_SLOT_HANDLES, UCX_SLOT_ANSWERS, UCX_SLOT_ANSWERED };

struct ucx_slot {
    ucx_session_t *session;
    ucx_place_t place;
    uint64_t tag;
    ucx_handle_fn handle;
    void (*gone)(void *arg);
    void *arg;

    uint64_t sequence; /* that was looked at last */
    bool running;      /* its request is handled: what follows is that thread's */
    bool closed;
    bool receiving;  /* a message's data is on its way here */
    bool ended;      /* it came, or never will; and the slot was closed meanwhile */
    uint64_t coming; /* that message's sequence */
    ucx_head_t head;
    uint64_t typical_ns, answered;
    atomic_uint phase; /* of a running one: UCX_SLOT_HANDLES ...; with messages only that */
    uint32_t index;    /* among the crew's */
};

struct ucx_crew {
    ucx_node_t *node; /* NULL: of messages, which come to ... */
    ucx_port_t *port; /* under the lock */
    int kick_fd;      /* in place of kick */
    bool asleep;      /* the leader, on both */
    bool tidy;        /* sessions or slots wait for ucx_far_tidy() */
    uint64_t spin_ns, memory_max;
    uint32_t n_cpus, threads_max, n_threads;
    pthread_t threads[64];
    _Atomic uint32_t kick; /* a futex: something changed here */
    atomic_uint wanting;   /* threads that want the lock */
    atomic_uint_fast64_t rings;

    pthread_mutex_t lock;
    pthread_cond_t idle_cond, deputy_cond;
    bool stopping, leading, deputy, deputy_sleeps;
    uint32_t idle, running;
    uint64_t n_requests, last_ns; /* when the last of them was taken */
    ucx_figures_t figures;

    uint64_t memory; /* bytes of slabs */
    uint32_t n_sessions;
    ucx_session_t *sessions;
    uint32_t n_slots, turn;
    ucx_slot_t *slots[UCX_SLOTS_MAX];
};

/** Take the lock, before the leader takes it again. */
void ucx_crew_lock(ucx_crew_t *crew);

/** Have a leader that sleeps look at what there is. */
void ucx_crew_kick(ucx_crew_t *crew);

/** A slot's request was handled. Under the lock, which is given up for a while if the slot goes.
 * @return whether it is open still */
bool ucx_slot_ran(ucx_slot_t *slot);

/** A closed slot's message will not come any more. Under the lock, which is given up for a while.
 */
void ucx_slot_ended(ucx_slot_t *slot);

/** One reference less. Under the lock. @return whether it was the last: ucx_session_free() it */
bool ucx_session_unref(ucx_session_t *session);
void ucx_session_free(ucx_session_t *session);

/* ---- ucx_far.c: sessions of messages; all under the lock ---- */

/** Make the crew's port. */
attn_status_t ucx_far_create(ucx_crew_t *crew, const char *network);

/** Take what came. */
void ucx_far_progress(ucx_crew_t *crew);

/** Tell of sessions that broke, and let closed slots go: gives the lock up for a while. */
void ucx_far_tidy(ucx_crew_t *crew);

/** Say hello back, once the client did and it is known where to. */
void ucx_far_greet(ucx_session_t *session);

/** Send the answer that lies in the slot. */
void ucx_far_answer(ucx_slot_t *slot);

/** Sleep until a message comes or something changed here: gives the lock up meanwhile. */
void ucx_far_sleep(ucx_crew_t *crew);

#endif
