/*
 * ticket.h: what a client shows a worker that the coordinator sent it. A line of text:
 *
 *     1.c.17.42.5f0c...        version, role, client, period, and an HMAC-SHA256 in hex of all
 *                              before it, under a secret that the coordinator and its workers
 *                              share (256 random bits, new with every coordinator)
 *
 * Periods stand in for a clock: the coordinator counts them, one a lease, and workers hear of it
 * with their heartbeats. A ticket is good in its period and the next one, so for a lease at least
 * and two at most; and while the coordinator is away time stands still, so that clients with a
 * layout keep stepping.
 *
 * For whoever holds it a ticket is a word that opens: it goes over the same connections as the
 * tensors, so it is as safe as they are.
 */
#ifndef ATTN_DAEMON_TICKET_H
#define ATTN_DAEMON_TICKET_H

#include "base/attn_types.h"

#define TICKET_HEADER "attn-ticket" /* the metadata that it goes in */
#define TICKET_SECRET 32u           /* bytes */
#define TICKET_MAC 32u              /* bytes of an HMAC-SHA256 */
#define TICKET_MAX 128u             /* bytes of the text, its end included */

typedef enum ticket_role {
    TICKET_CLIENT      = 'c',
    TICKET_COORDINATOR = 'o',
    TICKET_WORKER      = 'w', /**< shown to another worker, whose chunks it copies */
} ticket_role_t;

typedef struct ticket {
    ticket_role_t role;
    uint32_t client; /**< its id, or the worker's; 0 of a coordinator */
    uint64_t period; /**< in which it was given */
} ticket_t;

void ticket_write(const ticket_t *ticket, const uint8_t secret[TICKET_SECRET],
                  char text[TICKET_MAX]);

/** Has this text, which may be NULL, the form of a ticket? */
bool ticket_may_be(const char *text);

/**
 * Read what somebody showed (NULL: nothing), in the period of now.
 * @return ATTN_ERR_DENIED  there is none, it was not made with this secret, or it is too old
 */
attn_status_t ticket_read(const char *text, const uint8_t secret[TICKET_SECRET], uint64_t period,
                          ticket_t *ticket);

/** The MAC of bytes that are no ticket, and look like none: those of a ticket begin with a digit.
 * False: OpenSSL is out of memory. */
bool ticket_sign(const uint8_t *bytes, size_t n, const uint8_t secret[TICKET_SECRET],
                 uint8_t mac[TICKET_MAC]);

/** Equal texts? Takes as long for any that differ. */
bool ticket_texts_equal(const char *a, const char *b);

#endif
