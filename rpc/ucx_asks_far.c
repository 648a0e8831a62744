/*
 * ucx_asks_far.c: the client's side of messages. Peers that are reached over the same devices share
 * a port, which whoever waits for the rpc client makes progress with, under the lock of the asks;
 * what comes is put into the slot of the ask that waits for it, number last, and found there as an
 * answer in shared memory is.
 *
 * Who sleeps, sleeps in gRPC's queue, where a message of UCX's is not seen. So the port has a
 * thread of its own, the watchman, that sleeps on the port's descriptor and puts an event into the
 * queue. It is told to watch when somebody goes to sleep, or asked without waiting, and then once:
 * whoever looks in time has not to share the core with it.
 */
#include "rpc/ucx_asks_int.h"

#include "base/clock.h"
#include "base/status.h"
#include "rpc/rpc_int.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define CLOSING_ROUNDS 200u /* of progress for a peer that is closed; then others make it */
#define ARMING_ROUNDS 100u  /* of progress before a port that always has something is looked at */

struct ucx_asks_far {
    ucx_asks_t *asks;
    ucx_asks_far_t *next;
    char devices[512];
    ucx_port_t *port;
    bool stale;       /* no new peer uses it */
    bool uneven;      /* a way was closed that its server may never have heard of */
    bool working;     /* on_woken() is at it */
    bool news;        /* a hello was answered, or a peer broke */
    uint32_t n_peers; /* that are not closed: there is a watchman for them */

    pthread_t watchman;
    int epoll_fd, stop_fd;
    rpc_op_t op_woken;
    atomic_bool waking; /* op_woken is on the queue */
};

/* ---- what comes ---- */

static ucx_peer_t *
peer_of(ucx_asks_t *asks, uint64_t secret)
{
    ucx_peer_t *peer = asks->peers;

    while (peer != NULL && (peer->card != NULL || peer->secret != secret)) {
        peer = peer->next;
    }
    return peer;
}

/* The ask that an answer is for, if it waits. */
static ucx_ask_t *
ask_for(ucx_asks_t *asks, const ucx_peer_t *peer, const ucx_head_t *head)
{
    uint64_t sequence = atomic_load(&head->sequence);
    ucx_ask_t *ask    = asks->first;

    while (ask != NULL && (ask->peer != peer || ask->sequence != sequence)) {
        ask = ask->next;
    }
    return ask != NULL && ask->place.offset == head->offset ? ask : NULL;
}

static ucx_arrival_t *
arrival_take(ucx_peer_t *peer, ucx_head_t *answer)
{
    ucx_arrival_t *found = NULL;

    for (unsigned i = 0; i < UCX_SESSION_SLOTS_MAX; i++) {
        if (peer->arrivals[i].answer == answer) {
            return NULL; /* it is coming already */
        }
        if (peer->arrivals[i].answer == NULL) {
            found = &peer->arrivals[i];
        }
    }
    return found;
}

/* Where an answer goes, with its head written there; NULL: it is not one that is waited for. */
static ucx_arrival_t *
take_answer(ucx_peer_t *peer, const ucx_ask_t *ask, const ucx_head_t *head, uint64_t bytes)
{
    ucx_head_t *answer = ucx_answer_at(peer->at, &ask->place);
    uint64_t room      = head->status == ATTN_OK ? ask->place.out : UCX_SENTENCE_ROOM;

    if (head->bytes != bytes || bytes > room || atomic_load(&answer->sequence) == ask->sequence) {
        return NULL;
    }
    ucx_arrival_t *arrival = arrival_take(peer, answer);
    if (arrival != NULL) {
        *arrival = (ucx_arrival_t){.peer = peer, .answer = answer, .sequence = ask->sequence};
        memcpy(answer, head, offsetof(ucx_head_t, sequence));
        if (head->status != ATTN_OK) {
            answer->bytes = 0;
        }
    }
    return arrival;
}

/* The server's hello. If it came by another way, one was made here that the server did not make,
 * and none of this port's leads there as it should: the next peer gets a port of its own. */
static void
take_hello(ucx_asks_far_t *far, ucx_peer_t *peer, const void *from)
{
    far->news = true;
    if (ucx_way_is(peer->way, from)) {
        ucx_way_settle(peer->way);
        atomic_store(&peer->greeted, true);
        return;
    }
    far->stale = true;
    if (!peer->broken) {
        snprintf(peer->why, sizeof(peer->why), "an earlier connection was made on one side alone");
        peer->broken = true;
    }
}

static bool
arrive(void *arg, const ucx_head_t *head, uint64_t bytes, ucx_coming_t *coming)
{
    ucx_asks_far_t *far    = arg;
    ucx_asks_t *asks       = far->asks;
    ucx_arrival_t *arrival = NULL;
    ucx_ask_t *ask         = NULL;
    ucx_peer_t *peer       = peer_of(asks, head->secret);

    if (peer != NULL && (head->flags & UCX_HELLO) != 0 && bytes == 0) {
        take_hello(far, peer, coming->from);
        return false;
    }
    if (peer != NULL && (!coming->fetched || ucx_way_is(peer->way, coming->from)) &&
        (ask = ask_for(asks, peer, head)) != NULL) {
        arrival = take_answer(peer, ask, head, bytes);
    }
    if (arrival == NULL) {
        asks->dropped++;
        return false;
    }
    coming->way  = peer->way;
    coming->what = arrival;
    coming->to   = head->status == ATTN_OK ? ucx_answer_data_at(peer->at, &ask->place)
                                           : (uint8_t *)ucx_sentence_at(peer->at, &ask->place);
    return true;
}

static void
arrived(void *arg, void *what, bool whole)
{
    ucx_arrival_t *arrival = what;

    (void)arg;
    if (whole) {
        atomic_store_explicit(&arrival->answer->sequence, arrival->sequence, memory_order_release);
    }
    arrival->answer = NULL;
}

static void
broken(void *arg, void *whose, const char *why)
{
    ucx_asks_far_t *far = arg;
    ucx_peer_t *peer    = whose;

    snprintf(peer->why, sizeof(peer->why), "%s", why);
    peer->broken = true;
    far->news    = true;
    /* The other side closed what was paired with it, or it is not there. */
    far->stale = far->stale || (far->uneven && !atomic_load(&peer->greeted));
}

static void
peer_free(ucx_peer_t *peer)
{
    munmap(peer->at, peer->bytes);
    free(peer);
}

static void
closed(void *arg, void *whose)
{
    (void)arg;
    peer_free(whose);
}

bool
ucx_asks_far_progress(ucx_asks_t *asks)
{
    bool news = false;

    for (ucx_asks_far_t *far = asks->fars; far != NULL; far = far->next) {
        ucx_port_progress(far->port);
        news      = news || far->news;
        far->news = false;
    }
    return news;
}

/* ---- the watchman ---- */

/* Put an event into the queue: whoever takes it off looks. */
static void
wake(ucx_asks_far_t *far)
{
    if (!atomic_exchange(&far->waking, true)) {
        rpc_client_post(far->asks->rpc, &far->op_woken);
    }
}

static void
watch(ucx_asks_far_t *far, bool watches)
{
    struct epoll_event event = {.events = EPOLLONESHOT | (watches ? (uint32_t)EPOLLIN : 0),
                                .data   = {.fd = ucx_port_fd(far->port)}};

    epoll_ctl(far->epoll_fd, EPOLL_CTL_MOD, event.data.fd, &event);
}

/* Make progress where no look follows. What it takes off the port the watchman will not find there,
 * and it may be what another thread sleeps for. Under the lock. */
static void
progress_aside(ucx_asks_far_t *far)
{
    if (ucx_port_progress(far->port) || far->news) {
        wake(far);
    }
}

/* Have the watchman watch. Under the lock. */
static void
arm(ucx_asks_far_t *far)
{
    for (unsigned i = 0; i < ARMING_ROUNDS; i++) {
        if (ucx_port_arm(far->port)) {
            watch(far, true);
            return;
        }
        progress_aside(far);
    }
    wake(far);
}

static void
on_woken(rpc_op_t *op, bool ok)
{
    ucx_asks_far_t *far = RPC_OF(ucx_asks_far_t, op_woken, op);

    (void)ok;
    pthread_mutex_lock(&far->asks->lock);
    far->working = true;
    atomic_exchange(&far->waking, false);
    /* Also if no ask waits: what is not taken off the port wakes again and again. */
    ucx_asks_far_progress(far->asks);
    pthread_mutex_unlock(&far->asks->lock);
    ucx_asks_look(far->asks);
    pthread_mutex_lock(&far->asks->lock);
    if (far->asks->unattended > 0 && far->n_peers > 0) {
        arm(far);
    }
    far->working = false;
    pthread_mutex_unlock(&far->asks->lock); /* which the asks have, not the port */
}

static void *
watchman(void *arg)
{
    ucx_asks_far_t *far = arg;
    struct epoll_event event;

    for (;;) {
        if (epoll_wait(far->epoll_fd, &event, 1, -1) == 1) {
            if (event.data.fd == far->stop_fd) {
                return NULL;
            }
            wake(far);
        }
    }
}

void
ucx_asks_far_sleeps(ucx_asks_t *asks, bool sleeps)
{
    for (ucx_asks_far_t *far = asks->fars; far != NULL; far = far->next) {
        if (far->n_peers > 0 && sleeps) {
            arm(far);
        } else if (far->n_peers > 0 && asks->unattended == 0) {
            watch(far, false);
        }
    }
}

void
ucx_asks_far_send(ucx_peer_t *peer, const ucx_head_t *request, const uint8_t *data, bool unattended)
{
    ucx_asks_far_t *far = peer->far;

    ucx_way_send(peer->way, request, data, request->bytes);
    if (unattended && (peer->broken || ucx_port_closes(far->port))) {
        wake(far); /* it may be over already, and nothing come that tells */
    } else if (unattended) {
        arm(far);
    }
}

/* ---- peers ---- */

static attn_status_t
watchman_start(ucx_asks_far_t *far)
{
    eventfd_t stops;

    eventfd_read(far->stop_fd, &stops); /* of the one before */
    int error = pthread_create(&far->watchman, NULL, watchman, far);
    return error == 0 ? ATTN_OK
                      : attn_fail(ATTN_ERR_EXHAUSTED, "a thread for UCX cannot start: %s",
                                  strerror(error));
}

static attn_status_t
descriptors_open(ucx_asks_far_t *far)
{
    struct epoll_event event = {.events = EPOLLIN};

    far->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    far->stop_fd  = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    event.data.fd = far->stop_fd;
    bool good     = far->epoll_fd >= 0 && far->stop_fd >= 0 &&
                epoll_ctl(far->epoll_fd, EPOLL_CTL_ADD, far->stop_fd, &event) == 0;
    event = (struct epoll_event){.events = EPOLLONESHOT, .data = {.fd = ucx_port_fd(far->port)}};
    return good && epoll_ctl(far->epoll_fd, EPOLL_CTL_ADD, event.data.fd, &event) == 0
               ? ATTN_OK
               : attn_fail(ATTN_ERR_EXHAUSTED, "no descriptor for UCX: %s", strerror(errno));
}

static void
far_destroy(ucx_asks_far_t *far)
{
    if (far->epoll_fd >= 0) {
        close(far->epoll_fd);
    }
    if (far->stop_fd >= 0) {
        close(far->stop_fd);
    }
    ucx_port_destroy(far->port);
    free(far);
}

void
ucx_asks_far_destroy(ucx_asks_t *asks)
{
    while (asks->fars != NULL) {
        ucx_asks_far_t *far = asks->fars;
        asks->fars          = far->next;
        far_destroy(far);
    }
}

/* Make a port over such devices. Under the lock. */
static attn_status_t
far_create(ucx_asks_t *asks, const char *devices, ucx_asks_far_t **far_p)
{
    ucx_asks_far_t *far = calloc(1, sizeof(*far));

    if (far == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for UCX");
    }
    far->asks            = asks;
    far->op_woken        = (rpc_op_t){on_woken};
    far->epoll_fd        = -1;
    far->stop_fd         = -1;
    ucx_port_user_t user = {
        .arrive = arrive, .arrived = arrived, .broken = broken, .closed = closed, .arg = far};
    snprintf(far->devices, sizeof(far->devices), "%s", devices);
    attn_status_t status = ucx_port_create(far->devices, &user, &far->port);
    if (status == ATTN_OK) {
        status = descriptors_open(far);
    }
    if (status != ATTN_OK) {
        far_destroy(far);
        return status;
    }
    far->next  = asks->fars;
    asks->fars = far;
    *far_p     = far;
    return ATTN_OK;
}

/* The port for such devices, made if there is none; stale ones that nobody uses go. Under the lock.
 */
static attn_status_t
far_need(ucx_asks_t *asks, const char *devices, ucx_asks_far_t **far_p)
{
    ucx_asks_far_t **link = &asks->fars, *found = NULL;

    while (*link != NULL) {
        ucx_asks_far_t *far = *link;
        if (far->stale && far->n_peers == 0 && !far->working && !atomic_load(&far->waking)) {
            *link = far->next;
            far_destroy(far);
            continue;
        }
        if (!far->stale && strcmp(far->devices, devices) == 0) {
            found = far;
        }
        link = &far->next;
    }
    *far_p = found;
    return found != NULL ? ATTN_OK : far_create(asks, devices, far_p);
}

/* One peer less needs the watchman, who takes no lock but for an event of rpc's. Under the lock. */
static void
leave(ucx_asks_far_t *far)
{
    if (--far->n_peers == 0) {
        eventfd_write(far->stop_fd, 1);
        pthread_join(far->watchman, NULL);
    }
}

/* Under the lock. */
static attn_status_t
way_open(ucx_peer_t *peer, const ucx_offer_t *offer, const char *devices)
{
    ucx_asks_far_t *far;
    attn_status_t status = far_need(peer->asks, devices, &far);
    ucx_offer_t ours;

    if (status != ATTN_OK) {
        return status;
    }
    ucx_port_offer(far->port, &ours);
    if (strncmp(ours.version, offer->version, sizeof(ours.version)) != 0) {
        return attn_fail(
            ATTN_ERR_UNSUPPORTED,
            "UCX is of version %s here, and of %.15s at the worker: their messages may "
            "differ",
            ours.version, offer->version);
    }
    if (far->n_peers == 0) {
        status = watchman_start(far);
    }
    if (status != ATTN_OK) {
        return status;
    }
    peer->far = far;
    far->n_peers++;
    status = ucx_way_open(far->port, offer->address, offer->address_size, peer, &peer->way);
    if (status != ATTN_OK) {
        leave(far);
    }
    return status;
}

attn_status_t
ucx_asks_far_open(ucx_peer_t *peer, const ucx_offer_t *offer)
{
    ucx_asks_t *asks = peer->asks;
    char devices[512];

    attn_status_t status = ATTN_OK;
    if (offer->devices != NULL) {
        snprintf(devices, sizeof(devices), "%s", offer->devices);
    } else {
        status = ucx_devices_to(offer->reach, devices, sizeof(devices));
    }
    if (status != ATTN_OK) {
        return status;
    }
    peer->at = mmap(NULL, peer->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (peer->at == MAP_FAILED) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no %llu bytes for slots",
                         (unsigned long long)peer->bytes);
    }
    pthread_mutex_lock(&asks->lock);
    status = way_open(peer, offer, devices);
    pthread_mutex_unlock(&asks->lock);
    if (status != ATTN_OK) {
        munmap(peer->at, peer->bytes);
    }
    return status;
}

void
ucx_asks_far_close(ucx_peer_t *peer)
{
    ucx_asks_t *asks    = peer->asks;
    ucx_asks_far_t *far = peer->far;

    pthread_mutex_lock(&asks->lock);
    far->uneven = far->uneven || !atomic_load(&peer->greeted);
    ucx_way_close(peer->way);
    for (unsigned i = 0; i < CLOSING_ROUNDS && ucx_port_closes(far->port); i++) {
        progress_aside(far); /* frees the peer, sooner or later */
    }
    leave(far);
    pthread_mutex_unlock(&asks->lock);
}

bool
ucx_peer_address(ucx_peer_t *peer, const uint8_t **address_p, uint64_t *size_p)
{
    ucx_offer_t ours = {.address = NULL};

    if (peer->card != NULL) {
        return false;
    }
    ucx_port_offer(peer->far->port, &ours);
    *address_p = ours.address;
    *size_p    = ours.address_size;
    return true;
}

static bool
is_greeted(void *arg)
{
    ucx_peer_t *peer = arg;

    return atomic_load(&peer->greeted) || ucx_peer_is_broken(peer);
}

attn_status_t
ucx_peer_greet(ucx_peer_t *peer, uint64_t deadline_ns)
{
    ucx_asks_t *asks = peer->asks;

    if (peer->card != NULL) {
        return ATTN_OK;
    }
    atomic_fetch_add(&asks->greeting, 1);
    pthread_mutex_lock(&asks->lock);
    peer->hello = (ucx_head_t){.secret = peer->secret, .flags = UCX_HELLO};
    ucx_way_send(peer->way, &peer->hello, NULL, 0);
    pthread_mutex_unlock(&asks->lock);
    rpc_client_wait(asks->rpc, is_greeted, peer, deadline_ns);
    atomic_fetch_sub(&asks->greeting, 1);
    if (atomic_load(&peer->greeted)) {
        return ATTN_OK;
    }
    pthread_mutex_lock(&asks->lock);
    peer->far->stale = peer->far->stale || peer->far->uneven; /* it may have gone another way */
    pthread_mutex_unlock(&asks->lock);
    return ucx_peer_is_broken(peer)
               ? attn_fail(ATTN_ERR_UNSUPPORTED,
                           "UCX reaches the worker by none of its networks: %s", peer->why)
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "no message of UCX's came back from the worker in time: see "
                           "UCX_NET_DEVICES, and firewalls");
}

const char *
ucx_peer_way(ucx_peer_t *peer)
{
    if (peer->card != NULL) {
        return "shm";
    }
    pthread_mutex_lock(&peer->asks->lock);
    const char *way = ucx_way_name(peer->way);
    pthread_mutex_unlock(&peer->asks->lock);
    return way;
}
