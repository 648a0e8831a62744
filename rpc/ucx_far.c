/*
 * ucx_far.c: a server's sessions of messages, for clients that can map none of its memory: of other
 * hosts, and of other IPC namespaces. A session has a slab all the same, which is this process's
 * alone. A request's data comes straight into its slot, and then its number, as if the client had
 * written them there; from then on it is handled like any other, and the answer is sent from the
 * slot. So the threads of the crew, and whoever handles requests, do not see a difference.
 *
 * Messages that anybody can send to the port are looked at here, once UCX has taken them: whose
 * secret is no open session's, whose slot is not open, busy, or another step's, whose number is not
 * above the last one, and whose size is not the one it says, is dropped and counted. That is all
 * the protection there is here, and none from who speaks to the port below messages: UCX's TCP
 * transport writes where it is told to, without a key (docs/security.md).
 */
#include "rpc/ucx_crew_int.h"

#include "base/status.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define CLOSING_MS 10 /* between looks at ways that are being closed */

/* ---- what comes ---- */

static ucx_session_t *
session_of(ucx_crew_t *crew, uint64_t secret)
{
    ucx_session_t *session = crew->sessions;

    while (session != NULL && session->secret != secret) {
        session = session->next;
    }
    return session;
}

/* The open slot that a request is for, if it may be taken. */
static ucx_slot_t *
slot_for(ucx_crew_t *crew, const ucx_session_t *session, const ucx_head_t *head)
{
    for (uint32_t i = 0; i < crew->n_slots; i++) {
        ucx_slot_t *slot = crew->slots[i];
        if (slot->session == session && slot->place.offset == head->offset && !slot->closed) {
            bool free = !slot->running && !slot->receiving &&
                        atomic_load(&ucx_request_at(slot->session->at, &slot->place)->sequence) ==
                            slot->sequence; /* none came that is still to be handled */
            bool wanted = slot->tag == head->tag && atomic_load(&head->sequence) > slot->sequence &&
                          head->bytes <= slot->place.in;
            return free && wanted ? slot : NULL;
        }
    }
    return NULL;
}

void
ucx_far_greet(ucx_session_t *session)
{
    if (session->way != NULL && session->greeted) {
        session->hello = (ucx_head_t){.secret = session->secret, .flags = UCX_HELLO};
        ucx_way_send(session->way, &session->hello, NULL, 0);
        snprintf(session->crew->figures.way, sizeof(session->crew->figures.way), "%s",
                 ucx_way_settle(session->way));
    }
}

static bool
arrive(void *arg, const ucx_head_t *head, uint64_t bytes, ucx_coming_t *coming)
{
    ucx_crew_t *crew       = arg;
    ucx_session_t *session = session_of(crew, head->secret);

    if (session != NULL && (head->flags & UCX_HELLO) != 0 && bytes == 0 && !session->greeted) {
        session->greeted = true; /* once: who says it again is not answered */
        ucx_far_greet(session);
        return false;
    }
    bool known = session != NULL && session->way != NULL && head->bytes == bytes &&
                 (!coming->fetched || ucx_way_is(session->way, coming->from));
    ucx_slot_t *slot = known ? slot_for(crew, session, head) : NULL;
    if (slot == NULL) {
        crew->figures.dropped++;
        return false;
    }
    ucx_head_t *request = ucx_request_at(session->at, &slot->place);
    memcpy(request, head, offsetof(ucx_head_t, sequence));
    slot->coming    = atomic_load(&head->sequence);
    slot->receiving = true;
    coming->way     = session->way;
    coming->to      = ucx_data_at(session->at, &slot->place);
    coming->what    = slot;
    return true;
}

static void
arrived(void *arg, void *what, bool whole)
{
    ucx_crew_t *crew = arg;
    ucx_slot_t *slot = what;

    slot->receiving = false;
    if (slot->closed) {
        slot->ended = crew->tidy = true;
    } else if (whole) {
        ucx_head_t *request = ucx_request_at(slot->session->at, &slot->place);
        atomic_store_explicit(&request->sequence, slot->coming, memory_order_release);
    }
}

static void
broken(void *arg, void *whose, const char *why)
{
    ucx_crew_t *crew       = arg;
    ucx_session_t *session = whose;

    snprintf(session->why, sizeof(session->why), "%s", why);
    session->broken = crew->tidy = true;
}

static void
closed(void *arg, void *whose)
{
    ucx_session_t *session = whose;

    (void)arg;
    session->way = NULL;
    if (ucx_session_unref(session)) {
        ucx_session_free(session);
    }
}

void
ucx_far_progress(ucx_crew_t *crew)
{
    ucx_port_progress(crew->port);
}

/* ---- what goes ---- */

void
ucx_far_answer(ucx_slot_t *slot)
{
    ucx_session_t *session = slot->session;
    ucx_head_t *answer     = ucx_answer_at(session->at, &slot->place);
    bool failed            = answer->status != ATTN_OK;
    const char *sentence   = ucx_sentence_at(session->at, &slot->place);

    if (session->closed || session->way == NULL) {
        return;
    }
    if (failed) {
        answer->bytes = strlen(sentence) + 1;
    }
    ucx_way_send(session->way, answer,
                 failed ? (const uint8_t *)sentence : ucx_answer_data_at(session->at, &slot->place),
                 answer->bytes);
    if (session->crew->asleep) { /* what did not go at once needs somebody to see to it */
        ucx_crew_kick(session->crew);
    }
}

/* ---- tidying ---- */

/* Tell the user of a session that it broke. Gives the lock up for a while. */
static void
tell_broken(ucx_crew_t *crew, ucx_session_t *session)
{
    session->told = true;
    session->references++;
    pthread_mutex_unlock(&crew->lock);
    pthread_mutex_lock(&session->ring_lock);
    if (session->on_broken != NULL) {
        session->on_broken(session->ring_arg, session->why);
    }
    pthread_mutex_unlock(&session->ring_lock);
    ucx_crew_lock(crew);
    if (ucx_session_unref(session)) {
        ucx_session_free(session);
    }
}

static ucx_session_t *
find_broken(ucx_crew_t *crew)
{
    ucx_session_t *session = crew->sessions;

    while (session != NULL && (!session->broken || session->told)) {
        session = session->next;
    }
    return session;
}

static ucx_slot_t *
find_ended(ucx_crew_t *crew)
{
    for (uint32_t i = 0; i < crew->n_slots; i++) {
        if (crew->slots[i]->ended) {
            return crew->slots[i];
        }
    }
    return NULL;
}

void
ucx_far_tidy(ucx_crew_t *crew)
{
    ucx_session_t *session;
    ucx_slot_t *slot;

    crew->tidy = false;
    while ((slot = find_ended(crew)) != NULL) {
        ucx_slot_ended(slot);
    }
    while ((session = find_broken(crew)) != NULL) {
        tell_broken(crew, session);
    }
}

/* ---- sleeping, life ---- */

void
ucx_far_sleep(ucx_crew_t *crew)
{
    struct pollfd fds[] = {{.fd = ucx_port_fd(crew->port), .events = POLLIN},
                           {.fd = crew->kick_fd, .events = POLLIN}};
    eventfd_t kicks;

    if (crew->stopping || crew->tidy) {
        return;
    }
    if (!ucx_port_arm(crew->port)) { /* something came just now: others may have the lock first */
        pthread_mutex_unlock(&crew->lock);
        sched_yield();
        ucx_crew_lock(crew);
        return;
    }
    bool closes = ucx_port_closes(crew->port);
    crew->figures.sleeps++;
    crew->asleep = true;
    pthread_mutex_unlock(&crew->lock);
    poll(fds, 2, closes ? CLOSING_MS : -1);
    ucx_crew_lock(crew);
    crew->asleep = false;
    if ((fds[1].revents & POLLIN) != 0) {
        eventfd_read(crew->kick_fd, &kicks);
    }
}

attn_status_t
ucx_far_create(ucx_crew_t *crew, const char *network)
{
    ucx_port_user_t user = {
        .arrive = arrive, .arrived = arrived, .broken = broken, .closed = closed, .arg = crew};

    crew->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (crew->kick_fd < 0) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "no descriptor for the threads of UCX: %s",
                         strerror(errno));
    }
    snprintf(crew->figures.way, sizeof(crew->figures.way), "net");
    return ucx_port_create(network, &user, &crew->port);
}
