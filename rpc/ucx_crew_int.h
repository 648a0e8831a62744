/* ucx_crew_int.h: what ucx_crew.c (the threads) and ucx_session.c (sessions, slots) share. */
#ifndef ATTN_RPC_UCX_CREW_INT_H
#define ATTN_RPC_UCX_CREW_INT_H

#include "rpc/ucx_int.h"

#include <pthread.h>

#define UCX_SLOTS_MAX 4096u /* open at once in all sessions: they are all looked at */

struct ucx_session {
    ucx_crew_t *crew;
    ucx_memory_t *memory;
    ucx_card_t *card; /* where the slab begins */
    uint8_t *at;      /* likewise, as bytes */
    uint64_t bytes, number, secret;

    /* Under the crew's lock. */
    uint32_t references; /* its user's, its slots', whoever found it */
    uint32_t n_slots;
    bool closed;
    ucx_session_t *next, **link; /* of those that are not closed */

    pthread_mutex_t ring_lock;
    void (*ring)(void *arg); /* NULL: closed */
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
    atomic_uint phase; /* of a running one: UCX_SLOT_HANDLES ... */
    bool running;      /* its request is handled: what follows is that thread's */
    bool closed;
    ucx_head_t head;
    uint64_t typical_ns, answered;
    uint32_t index; /* among the crew's */
};

struct ucx_crew {
    ucx_node_t *node;
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

#endif
