/*
 * ucx_session.c: sessions and slots of a server. A session lives as long as its user has it open or
 * a slot of it is open or busy; a slot that is closed while its request is handled goes when that
 * is answered, and its place is taken until then.
 */
#include "rpc/ucx_crew_int.h"

#include "base/checked.h"
#include "base/status.h"
#include "rpc/rpc_int.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

/* ---- what both sides know ---- */

void
ucx_host(char host[96])
{
    char boot[40] = "", ipc[40] = "";

    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file != NULL) {
        if (fscanf(file, "%39s", boot) != 1) {
            boot[0] = '\0';
        }
        fclose(file);
    }
    ssize_t n          = readlink("/proc/self/ns/ipc", ipc, sizeof(ipc) - 1);
    ipc[n > 0 ? n : 0] = '\0';
    if (boot[0] != '\0' && ipc[0] != '\0') {
        snprintf(host, 96, "%s %s", boot, ipc);
    } else {
        host[0] = '\0';
    }
}

uint64_t
ucx_place_bytes(const ucx_place_t *place)
{
    if (place->in > UCX_SLAB_MAX || place->out > UCX_SLAB_MAX) {
        return UINT64_MAX;
    }
    return 2 * UCX_LINE + UCX_SENTENCE_ROOM + ucx_lines(place->in) + ucx_lines(place->out);
}

void
ucx_copy(void *to, const void *from, uint64_t bytes)
{
    rpc_copy(to, from, bytes);
}

static uint64_t
random_number(void)
{
    uint64_t number = 0;

    while (number == 0) {
        if (getrandom(&number, sizeof(number), 0) != sizeof(number)) {
            number = 0;
        }
    }
    return number;
}

/* ---- sessions ---- */

void
ucx_session_free(ucx_session_t *session)
{
    if (session->memory != NULL) {
        ucx_memory_free(session->memory);
    } else {
        munmap(session->at, session->bytes);
    }
    pthread_mutex_destroy(&session->ring_lock);
    free(session);
}

bool
ucx_session_unref(ucx_session_t *session)
{
    bool last = --session->references == 0;

    if (last) {
        session->crew->memory -= session->bytes;
    }
    return last;
}

/* Account for a slab of so many bytes. */
static attn_status_t
reserve(ucx_crew_t *crew, uint64_t bytes)
{
    attn_status_t status = ATTN_OK;

    ucx_crew_lock(crew);
    if (crew->n_sessions >= UCX_SESSIONS_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "%u clients have sessions of UCX's here: at most %u",
                           crew->n_sessions, UCX_SESSIONS_MAX);
    } else if (bytes > crew->memory_max || crew->memory > crew->memory_max - bytes) {
        status = attn_fail(ATTN_ERR_EXHAUSTED,
                           "%llu bytes are slabs of clients, and %llu more would be "
                           "above the limit of %llu",
                           (unsigned long long)crew->memory, (unsigned long long)bytes,
                           (unsigned long long)crew->memory_max);
    } else {
        crew->memory += bytes;
        crew->n_sessions++;
    }
    pthread_mutex_unlock(&crew->lock);
    return status;
}

static void
unreserve(ucx_crew_t *crew, uint64_t bytes)
{
    ucx_crew_lock(crew);
    crew->memory -= bytes;
    crew->n_sessions--;
    pthread_mutex_unlock(&crew->lock);
}

static void
session_list(ucx_session_t *session)
{
    ucx_crew_t *crew = session->crew;

    ucx_crew_lock(crew);
    session->next = crew->sessions;
    session->link = &crew->sessions;
    if (session->next != NULL) {
        session->next->link = &session->next;
    }
    crew->sessions = session;
    pthread_mutex_unlock(&crew->lock);
    ucx_crew_kick(crew); /* who sleeps is to wait for this bell, too */
}

/* The slab: to be lent, or this process's alone; zeros. */
static attn_status_t
session_memory(ucx_crew_t *crew, uint64_t bytes, ucx_session_t *session)
{
    if (crew->port != NULL) {
        session->at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return session->at != MAP_FAILED
                   ? ATTN_OK
                   : attn_fail(ATTN_ERR_NO_MEMORY, "no %llu bytes for a client's slots",
                               (unsigned long long)bytes);
    }
    attn_status_t status = ucx_memory_create(crew->node, bytes, &session->memory);
    if (status == ATTN_OK) {
        session->at = ucx_memory_at(session->memory);
    }
    return status;
}

attn_status_t
ucx_session_open(ucx_crew_t *crew, uint64_t bytes, void (*ring)(void *arg), void *arg,
                 ucx_session_t **session_p)
{
    if (bytes < UCX_SLAB_MIN || bytes > UCX_SLAB_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "a slab of %llu bytes: %llu to %llu",
                         (unsigned long long)bytes, (unsigned long long)UCX_SLAB_MIN,
                         (unsigned long long)UCX_SLAB_MAX);
    }
    attn_status_t status = reserve(crew, bytes);
    if (status != ATTN_OK) {
        return status;
    }
    ucx_session_t *session = calloc(1, sizeof(*session));
    status                 = session != NULL ? session_memory(crew, bytes, session)
                                             : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a session");
    if (status != ATTN_OK) {
        unreserve(crew, bytes);
        free(session);
        return status;
    }
    pthread_mutex_init(&session->ring_lock, NULL);
    session->crew       = crew;
    session->bytes      = bytes;
    session->card       = (ucx_card_t *)(void *)session->at;
    session->number     = random_number();
    session->secret     = random_number();
    session->references = 1;
    session->ring       = ring;
    session->ring_arg   = arg;

    session->card->magic  = UCX_MAGIC;
    session->card->secret = session->secret;
    session->card->bytes  = bytes;
    atomic_store(&session->card->server_sleeps, 1);
    atomic_store(&session->card->client_sleeps, 1);
    session_list(session);
    *session_p = session;
    return ATTN_OK;
}

void
ucx_session_offer(const ucx_session_t *session, ucx_offer_t *offer)
{
    *offer = (ucx_offer_t){.messages = session->memory == NULL};
    ucx_host(offer->host);
    if (session->memory != NULL) {
        ucx_memory_offer(session->memory, offer);
    } else {
        ucx_port_offer(session->crew->port, offer);
    }
    offer->bytes   = session->bytes; /* UCX may have allocated more */
    offer->session = session->number;
    offer->secret  = session->secret;
}

void
ucx_session_close(ucx_session_t *session)
{
    ucx_crew_t *crew = session->crew;

    pthread_mutex_lock(&session->ring_lock);
    session->ring      = NULL;
    session->on_broken = NULL;
    pthread_mutex_unlock(&session->ring_lock);

    ucx_crew_lock(crew);
    session->closed = true;
    *session->link  = session->next;
    if (session->next != NULL) {
        session->next->link = session->link;
    }
    crew->n_sessions--;
    if (session->way != NULL) {
        ucx_way_close(session->way); /* which has a reference until that is done */
    }
    bool last = ucx_session_unref(session);
    pthread_mutex_unlock(&crew->lock);
    ucx_crew_kick(crew); /* nobody is to wait for its bell any more */
    if (last) {
        ucx_session_free(session);
    }
}

attn_status_t
ucx_session_answer(ucx_session_t *session, const uint8_t *address, uint64_t size,
                   void (*broken)(void *arg, const char *why))
{
    ucx_crew_t *crew = session->crew;
    attn_status_t status;

    ucx_crew_lock(crew);
    if (crew->port == NULL || session->way != NULL || session->closed) {
        status = attn_fail(ATTN_ERR_INVALID, "this session of UCX takes no address");
    } else {
        status = ucx_way_open(crew->port, address, size, session, &session->way);
    }
    if (status == ATTN_OK) {
        pthread_mutex_lock(&session->ring_lock);
        session->on_broken = broken; /* nobody is told before the lock is let go */
        pthread_mutex_unlock(&session->ring_lock);
        session->references++;
        ucx_far_greet(session);
    }
    pthread_mutex_unlock(&crew->lock);
    ucx_crew_kick(crew); /* what is sent may wait for the socket */
    return status;
}

attn_status_t
ucx_session_find(ucx_crew_t *crew, uint64_t number, uint64_t secret, ucx_session_t **session_p)
{
    attn_status_t status = ATTN_ERR_NOT_FOUND;

    ucx_crew_lock(crew);
    for (ucx_session_t *s = crew->sessions; s != NULL; s = s->next) {
        if (s->number == number && s->secret == secret) {
            s->references++;
            *session_p = s;
            status     = ATTN_OK;
            break;
        }
    }
    pthread_mutex_unlock(&crew->lock);
    return status == ATTN_OK
               ? ATTN_OK
               : attn_fail(status, "no session of UCX's has number %016llx and its secret",
                           (unsigned long long)number);
}

void
ucx_session_release(ucx_session_t *session)
{
    ucx_crew_t *crew = session->crew;

    ucx_crew_lock(crew);
    bool last = ucx_session_unref(session);
    pthread_mutex_unlock(&crew->lock);
    if (last) {
        ucx_session_free(session);
    }
}

/* ---- slots ---- */

static attn_status_t
place_check(const ucx_session_t *session, const ucx_place_t *place)
{
    uint64_t bytes = ucx_place_bytes(place), end;

    if (place->offset % UCX_LINE != 0 || place->offset < UCX_SLOTS_FROM || bytes == UINT64_MAX ||
        !attn_add(place->offset, bytes, &end) || end > session->bytes) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "a slot at offset %llu with room for %llu and %llu bytes is not within the "
            "session's slab of %llu, or not at a multiple of %u from %u on",
            (unsigned long long)place->offset, (unsigned long long)place->in,
            (unsigned long long)place->out, (unsigned long long)session->bytes, UCX_LINE,
            UCX_SLOTS_FROM);
    }
    return ATTN_OK;
}

/* Is a slot's place nobody's? Its request may be answered, and its thread not have come so far as
 * to let it go. Under the lock. */
static bool
is_left(const ucx_slot_t *slot)
{
    while (slot->closed && atomic_load(&slot->phase) == UCX_SLOT_ANSWERS) {
        sched_yield(); /* some stores, unless that thread has just lost its core */
    }
    return slot->closed && !slot->receiving && atomic_load(&slot->phase) == UCX_SLOT_ANSWERED;
}

/* Is there room for one more slot, and is its place nobody's? Under the lock. */
static attn_status_t
slot_check(const ucx_session_t *session, const ucx_place_t *place)
{
    const ucx_crew_t *crew = session->crew;
    uint64_t end           = place->offset + ucx_place_bytes(place);

    if (session->closed) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "the session of UCX's was closed");
    }
    if (session->n_slots >= UCX_SESSION_SLOTS_MAX || crew->n_slots >= UCX_SLOTS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "%u slots are open in the session and %u in all: at most %u and %u",
                         session->n_slots, crew->n_slots, UCX_SESSION_SLOTS_MAX, UCX_SLOTS_MAX);
    }
    for (uint32_t i = 0; i < crew->n_slots; i++) {
        const ucx_slot_t *other = crew->slots[i];
        if (other->session == session &&
            place->offset < other->place.offset + ucx_place_bytes(&other->place) &&
            other->place.offset < end && !is_left(other)) {
            return attn_fail(
                ATTN_ERR_INVALID, "a slot at offset %llu would lie in the one at offset %llu",
                (unsigned long long)place->offset, (unsigned long long)other->place.offset);
        }
    }
    return ATTN_OK;
}

attn_status_t
ucx_slot_open(ucx_session_t *session, const ucx_place_t *place, uint64_t tag, ucx_handle_fn handle,
              void (*gone)(void *arg), void *arg, ucx_slot_t **slot_p)
{
    ucx_crew_t *crew     = session->crew;
    attn_status_t status = place_check(session, place);

    if (status != ATTN_OK) {
        return status;
    }
    ucx_slot_t *slot = calloc(1, sizeof(*slot));
    if (slot == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slot");
    }
    *slot = (ucx_slot_t){.session = session,
                         .place   = *place,
                         .tag     = tag,
                         .handle  = handle,
                         .gone    = gone,
                         .arg     = arg};
    ucx_crew_lock(crew);
    status = slot_check(session, place);
    if (status == ATTN_OK) {
        if (crew->port != NULL) { /* nobody else clears what lay here */
            atomic_store(&ucx_request_at(session->at, place)->sequence, 0);
        }
        /* What its last user asked here is not asked again. */
        slot->sequence               = atomic_load(&ucx_request_at(session->at, place)->sequence);
        slot->index                  = crew->n_slots;
        crew->slots[crew->n_slots++] = slot;
        session->n_slots++;
        session->references++;
    }
    pthread_mutex_unlock(&crew->lock);
    if (status != ATTN_OK) {
        free(slot);
        return status;
    }
    *slot_p = slot;
    return ATTN_OK;
}

/* Nobody uses it any more. Under the lock, which is given up. */
static void
slot_gone(ucx_slot_t *slot)
{
    ucx_session_t *session = slot->session;
    ucx_crew_t *crew       = session->crew;

    assert(!slot->running && !slot->receiving);
    crew->slots[slot->index]        = crew->slots[--crew->n_slots];
    crew->slots[slot->index]->index = slot->index;
    crew->turn                      = crew->turn < crew->n_slots ? crew->turn : 0;
    session->n_slots--;
    bool last = ucx_session_unref(session);
    pthread_mutex_unlock(&crew->lock);
    if (slot->gone != NULL) {
        slot->gone(slot->arg);
    }
    if (last) {
        ucx_session_free(session);
    }
    free(slot);
}

bool
ucx_slot_ran(ucx_slot_t *slot)
{
    ucx_crew_t *crew = slot->session->crew;
    bool closed      = slot->closed;

    crew->figures.bytes_out += slot->answered;
    slot->answered = 0;
    slot->running  = false;
    if (closed) {
        slot_gone(slot);
        ucx_crew_lock(crew);
    }
    return !closed;
}

void
ucx_slot_ended(ucx_slot_t *slot)
{
    ucx_crew_t *crew = slot->session->crew;

    slot_gone(slot);
    ucx_crew_lock(crew);
}

void
ucx_slot_close(ucx_slot_t *slot)
{
    ucx_crew_t *crew = slot->session->crew;

    ucx_crew_lock(crew);
    slot->closed = true;
    if (slot->running || slot->receiving) {
        pthread_mutex_unlock(&crew->lock); /* who handles or receives it sees that */
    } else {
        slot_gone(slot);
    }
}
