/*
 * gate.h: whom a worker lets in: its coordinator to everything, clients that the coordinator
 * introduced to steps, other workers of that coordinator to what clients may read, nobody else. What it goes by, the secret behind tickets, comes with joining;
 * until then it lets nobody in.
 *
 * A coordinator may call before its answer to Join has been read here; so a call that is refused
 * while joining waits for the end of that and is looked at again. Anybody may show a text that only
 * then turns out to be no ticket, so a few wait at once, and others are told to come again.
 *
 * Tickets that were let in are known by their whole text for as long as the secret and their period
 * hold: each begin of a step shows one, and to make its MAC anew took as long as a small message.
 */
#ifndef ATTN_DAEMON_GATE_H
#define ATTN_DAEMON_GATE_H

#include "daemon/ticket.h"

#include <pthread.h>

#define GATE_WAITING_MAX 4u /* calls: of a worker's 16 handlers */
#define GATE_KNOWN 64u /* tickets; two may want the same place, and then the later one has it */

typedef struct gate_known {
    char text[TICKET_MAX]; /* "": none */
    ticket_t ticket;
} gate_known_t;

typedef struct gate {
    pthread_mutex_t lock;
    pthread_cond_t joined; /* or failed to */
    bool joining, open;
    uint32_t waiting; /* calls, for the end of joining */
    uint8_t secret[TICKET_SECRET];
    uint64_t period;
    gate_known_t known[GATE_KNOWN]; /* with this secret */
} gate_t;

void gate_init(gate_t *gate);
void gate_destroy(gate_t *gate);

void gate_joining(gate_t *gate);

/** Joined: from now on tickets of this secret count. NULL: it failed, what was stays. */
void gate_joined(gate_t *gate, const uint8_t secret[TICKET_SECRET], uint64_t period);

/** The coordinator counts on. */
void gate_period(gate_t *gate, uint64_t period);

/** A ticket of our own, for other workers: whoever has joined is given what it is made with.
 * @return ATTN_ERR_UNAVAILABLE  this worker has not joined */
attn_status_t gate_ticket(gate_t *gate, uint32_t worker, char text[TICKET_MAX]);

/** As ticket_sign(), with the secret of the coordinator's workers.
 * @return ATTN_ERR_UNAVAILABLE  this worker has not joined */
attn_status_t gate_sign(gate_t *gate, const uint8_t *bytes, size_t n, uint8_t mac[TICKET_MAC]);

/**
 * May who shows this ticket (NULL: none) call here? Any thread; may block for a second at most, and
 * only while joining.
 * @return ATTN_ERR_DENIED       no
 * @return ATTN_ERR_UNAVAILABLE  while joining: too many wait to be told
 */
attn_status_t gate_admit(gate_t *gate, const char *text, bool coordinator_only);

#endif
