#include "daemon/worker/gate.h"

#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define PATIENCE_S 1 /* for the answer to Join to be read */

void
gate_init(gate_t *gate)
{
    pthread_condattr_t monotonic;

    *gate = (gate_t){0};
    pthread_mutex_init(&gate->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&gate->joined, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

void
gate_destroy(gate_t *gate)
{
    pthread_cond_destroy(&gate->joined);
    pthread_mutex_destroy(&gate->lock);
    explicit_bzero(gate->secret, sizeof(gate->secret));
    explicit_bzero(gate->known, sizeof(gate->known));
}

void
gate_joining(gate_t *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->joining = true;
    pthread_mutex_unlock(&gate->lock);
}

void
gate_joined(gate_t *gate, const uint8_t secret[TICKET_SECRET], uint64_t period)
{
    pthread_mutex_lock(&gate->lock);
    gate->joining = false;
    if (secret != NULL) {
        gate->open = true;
        memcpy(gate->secret, secret, TICKET_SECRET);
        memset(gate->known, 0, sizeof(gate->known));
        gate->period = period;
    }
    pthread_cond_broadcast(&gate->joined);
    pthread_mutex_unlock(&gate->lock);
}

void
gate_period(gate_t *gate, uint64_t period)
{
    pthread_mutex_lock(&gate->lock);
    gate->period = period;
    pthread_mutex_unlock(&gate->lock);
}

attn_status_t
gate_ticket(gate_t *gate, uint32_t worker, char text[TICKET_MAX])
{
    uint8_t secret[TICKET_SECRET];

    pthread_mutex_lock(&gate->lock);
    bool open       = gate->open;
    ticket_t ticket = {.role = TICKET_WORKER, .client = worker, .period = gate->period};
    memcpy(secret, gate->secret, sizeof(secret));
    pthread_mutex_unlock(&gate->lock);
    if (open) {
        ticket_write(&ticket, secret, text);
    }
    explicit_bzero(secret, sizeof(secret));
    return open ? ATTN_OK
                : attn_fail(ATTN_ERR_UNAVAILABLE, "this worker has not joined a coordinator yet");
}

attn_status_t
gate_sign(gate_t *gate, const uint8_t *bytes, size_t n, uint8_t mac[TICKET_MAC])
{
    uint8_t secret[TICKET_SECRET];

    pthread_mutex_lock(&gate->lock);
    bool open = gate->open;
    memcpy(secret, gate->secret, sizeof(secret));
    pthread_mutex_unlock(&gate->lock);
    bool made = open && ticket_sign(bytes, n, secret, mac);
    explicit_bzero(secret, sizeof(secret));
    if (!open) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "this worker has not joined a coordinator yet");
    }
    return made ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a MAC");
}

/* Where this text is if it is known: its MAC ends like random digits. NULL: it is no ticket. */
static gate_known_t *
place_of(gate_t *gate, const char *text)
{
    size_t size   = text != NULL ? strlen(text) : 0;
    uint32_t hash = 0;

    if (size < sizeof(uint64_t) || size >= TICKET_MAX) {
        return NULL;
    }
    for (size_t i = size - sizeof(uint64_t); i < size; i++) {
        hash = 31 * hash + (uint8_t)text[i];
    }
    return &gate->known[hash % GATE_KNOWN];
}

/* With what holds now. The MAC is made outside the lock, from a copy of the secret. */
static attn_status_t
read_ticket(gate_t *gate, const char *text, ticket_t *ticket)
{
    gate_known_t *place = place_of(gate, text);
    uint8_t secret[TICKET_SECRET];

    pthread_mutex_lock(&gate->lock);
    bool open       = gate->open;
    uint64_t period = gate->period;
    bool known      = open && place != NULL && ticket_texts_equal(place->text, text) &&
                 place->ticket.period + 1 >= period;
    if (known) {
        *ticket = place->ticket;
    }
    memcpy(secret, gate->secret, sizeof(secret));
    pthread_mutex_unlock(&gate->lock);
    if (!open) {
        return attn_fail(ATTN_ERR_DENIED, "this worker has not joined a coordinator yet");
    }
    attn_status_t status = known ? ATTN_OK : ticket_read(text, secret, period, ticket);
    if (status == ATTN_OK && !known && place != NULL) {
        pthread_mutex_lock(&gate->lock);
        if (memcmp(secret, gate->secret, sizeof(secret)) == 0) {
            snprintf(place->text, sizeof(place->text), "%s", text);
            place->ticket = *ticket;
        }
        pthread_mutex_unlock(&gate->lock);
    }
    explicit_bzero(secret, sizeof(secret));
    return status;
}

static attn_status_t
admit_now(gate_t *gate, const char *text, bool coordinator_only)
{
    ticket_t ticket;
    attn_status_t status = read_ticket(gate, text, &ticket);

    if (status == ATTN_OK && coordinator_only && ticket.role != TICKET_COORDINATOR) {
        return attn_fail(ATTN_ERR_DENIED, "only the coordinator may call this");
    }
    return status;
}

/* @return ATTN_OK  there was an end of joining to wait for, and it came or was waited for */
static attn_status_t
await_joined(gate_t *gate, attn_status_t refusal)
{
    attn_status_t status = refusal;
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PATIENCE_S;
    pthread_mutex_lock(&gate->lock);
    if (gate->joining && gate->waiting >= GATE_WAITING_MAX) {
        status = attn_fail(ATTN_ERR_UNAVAILABLE,
                           "this worker is joining its coordinator, and %u calls wait for that: "
                           "retry later",
                           gate->waiting);
    } else if (gate->joining) {
        gate->waiting++;
        while (gate->joining && pthread_cond_timedwait(&gate->joined, &gate->lock, &until) == 0) {
        }
        gate->waiting--;
        status = ATTN_OK;
    }
    pthread_mutex_unlock(&gate->lock);
    return status;
}

attn_status_t
gate_admit(gate_t *gate, const char *text, bool coordinator_only)
{
    attn_status_t status = admit_now(gate, text, coordinator_only);

    if (status == ATTN_OK || !ticket_may_be(text)) {
        return status;
    }
    status = await_joined(gate, status);
    return status == ATTN_OK ? admit_now(gate, text, coordinator_only) : status;
}
