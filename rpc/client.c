/*
 * client.c: the progress of clients. One completion queue holds the ends of all that a
 * client's channels do, and one thread at a time polls it and dispatches:
 *
 *  - a waiter, if there is one (the leader). Between two events it looks whether what it
 *    waits for is true, and whether what another waiter (a follower, asleep on its own
 *    condition variable) waits for is; that one is then woken. A leader that leaves makes
 *    another waiter the leader.
 *  - else the background thread, so that callbacks run while nobody waits. It gives way
 *    to a waiter at once, but that costs the waiter a change of threads, so it steps in
 *    only when nobody has waited for a while: a caller that waits, computes and waits
 *    again keeps the queue to itself.
 *
 * No wake-up is lost: a waiter looks at its condition after it is on the list, and whoever
 * dispatches looks at the list after it dispatched. Conditions that become true otherwise
 * (`sent` runs on threads of C core) come with rpc_client_wake(), which puts an event on
 * the queue: an empty batch ends at once, and needs only some call to belong to.
 *
 * With a poller (shared memory) the leader looks there for most of the time that it spins, since
 * that costs nanoseconds and the queue a system call; when it is to sleep it says so, looks a last
 * time, and sleeps in the queue as ever: whoever answers it then puts a message there.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <grpc/support/string_util.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#define STEP_IN_NS (1 * ATTN_NS_PER_MS)  /* without a waiter, before the background polls */
#define LOOK_MAX_NS (8 * ATTN_NS_PER_MS) /* between its looks while there are always waiters */
#define LOOKS_MAX 20                    /* with nothing to do, before it sleeps until it is woken */
#define POLLER_NS (10 * ATTN_NS_PER_US) /* looked at the poller, before the queue has its turn */
#define QUEUE_NS (100 * ATTN_NS_PER_US) /* after which it has one whatever the poller brings */
#define POLLER_LOOKS 16                 /* before others may have the core */

typedef struct waiter {
    struct waiter *next, *previous;
    bool (*done)(void *arg);
    void *arg;
    pthread_cond_t cond;
    bool leader;    /* it polls, or is to */
    bool satisfied; /* done() was seen true */
    bool looked_at; /* another thread is in its done() */
} waiter_t;

struct rpc_client {
    grpc_completion_queue *queue;
    grpc_channel *nowhere;
    grpc_call *poster; /* a call that is never made: empty batches belong to it */
    uint64_t spin_ns;
    atomic_uint refs;
    atomic_uint n_waiters; /* changed under the lock */
    rpc_op_t op_wake;
    atomic_bool waking;  /* op_wake is on the queue */
    rpc_poller_t poller; /* set before the first waiter */
    pthread_t background;

    pthread_mutex_t lock;
    pthread_cond_t background_cond, looked_cond;
    waiter_t *waiters; /* a ring, or NULL */
    uint64_t open;     /* calls and streams that have not ended */
    uint64_t left_ns;  /* when the last waiter left */
    bool polling;      /* some thread has the queue */
    bool background_polls, background_sleeps, closing;

    /* Of channels and calls that begin. */
    rpc_tls_t *tls; /* set before the first channel */
    char *server_name;
    const char *header_key;  /* under the lock */
    grpc_slice header_value; /* under the lock */
    atomic_ullong header_version;
};

static _Thread_local const rpc_client_t *dispatching; /* for rpc_client_wake() */

/* ---- events ---- */

void
rpc_client_post(rpc_client_t *client, rpc_op_t *op)
{
    rpc_start(client->poster, NULL, 0, op);
}

static void
on_wake(rpc_op_t *op, bool ok)
{
    (void)ok;
    /* An exchange, so that what was true before a wake that found it set is seen after this. */
    atomic_exchange(&RPC_OF(rpc_client_t, op_wake, op)->waking, false);
}

/* With the lock held: an empty batch runs nobody's code. */
static void
post_wake(rpc_client_t *client)
{
    if (!atomic_exchange(&client->waking, true)) {
        rpc_client_post(client, &client->op_wake);
    }
}

void
rpc_client_wake(rpc_client_t *client)
{
    if (dispatching == client) {
        return; /* this thread looks at all waiters when it is back */
    }
    pthread_mutex_lock(&client->lock);
    if (client->polling && client->waiters != NULL && !client->closing) {
        post_wake(client);
    }
    pthread_mutex_unlock(&client->lock);
}

/* ---- waiters ---- */

static void
waiter_add(rpc_client_t *client, waiter_t *w)
{
    if (client->waiters == NULL) {
        w->next = w->previous = w;
        client->waiters       = w;
    } else {
        w->next           = client->waiters;
        w->previous       = client->waiters->previous;
        w->next->previous = w->previous->next = w;
    }
    atomic_fetch_add(&client->n_waiters, 1);
}

static void
waiter_remove(rpc_client_t *client, waiter_t *w)
{
    w->next->previous = w->previous;
    w->previous->next = w->next;
    if (client->waiters == w) {
        client->waiters = w->next == w ? NULL : w->next;
    }
    atomic_fetch_sub(&client->n_waiters, 1);
}

/* Look whether others have what they wait for. A waiter that is looked at stays on the
 * list, so that its successor is known when the lock is taken again. */
static void
look_at_waiters(rpc_client_t *client, const waiter_t *self)
{
    pthread_mutex_lock(&client->lock);
    waiter_t *first = client->waiters;
    for (waiter_t *w = first; w != NULL;) {
        if (w != self && !w->satisfied && !w->looked_at) {
            w->looked_at = true;
            pthread_mutex_unlock(&client->lock);
            bool done = w->done(w->arg);
            pthread_mutex_lock(&client->lock);
            w->looked_at = false;
            if (done) {
                w->satisfied = true;
                pthread_cond_signal(&w->cond);
            }
            pthread_cond_broadcast(&client->looked_cond);
        }
        w = w->next == client->waiters ? NULL : w->next;
    }
    pthread_mutex_unlock(&client->lock);
}

/* The queue is free: give it to a waiter, or to nobody. */
static void
pass_queue_on(rpc_client_t *client)
{
    waiter_t *w = client->waiters;

    client->background_polls = false;
    while (w != NULL && w->satisfied) {
        w = w->next == client->waiters ? NULL : w->next;
    }
    client->polling = w != NULL;
    if (w != NULL) {
        w->leader = true;
        pthread_cond_signal(&w->cond);
        return;
    }
    client->left_ns = attn_now_ns();
    if (client->open > 0 && client->background_sleeps) {
        client->background_sleeps = false;
        pthread_cond_signal(&client->background_cond);
    }
}

/* ---- polling ---- */

static bool
dispatch(const rpc_client_t *client, grpc_event event)
{
    const rpc_client_t *outer = dispatching;

    dispatching = client;
    bool was_op = rpc_dispatch(event);
    dispatching = outer;
    return was_op;
}

/* Look at the poller for as long as it has the turn, or until something was answered. */
static bool
look_elsewhere(const rpc_client_t *client, uint64_t now)
{
    const rpc_poller_t *poller = &client->poller;
    uint64_t until             = now + attn_min(POLLER_NS, client->spin_ns);

    while (poller->awaits(poller->arg)) {
        for (int i = 0; i < POLLER_LOOKS; i++) {
            if (poller->look(poller->arg)) {
                return true;
            }
            rpc_relax();
        }
        if (attn_now_ns() >= until) {
            break;
        }
        sched_yield(); /* the peer may have no core but this one */
    }
    return false;
}

/* Sleep in the queue until there is an event, or the poller has something. */
static bool
sleep_in_queue(const rpc_client_t *client, uint64_t deadline_ns)
{
    const rpc_poller_t *poller = &client->poller;

    if (poller->look == NULL) {
        return dispatch(client,
                        grpc_completion_queue_next(client->queue, rpc_timespec(deadline_ns), NULL));
    }
    poller->doze(poller->arg);
    bool event = poller->look(poller->arg);
    if (!event) {
        event = dispatch(
            client, grpc_completion_queue_next(client->queue, rpc_timespec(deadline_ns), NULL));
        event = poller->look(poller->arg) || event;
    }
    poller->rouse(poller->arg);
    return event;
}

/* Poll until the leader's condition is true or its time is up. */
static bool
lead(rpc_client_t *client, const waiter_t *self, uint64_t deadline_ns)
{
    uint64_t now        = attn_now_ns();
    uint64_t spin_until = now + client->spin_ns, queue_ns = now + QUEUE_NS;

    for (;;) {
        bool spin  = now < spin_until;
        bool event = spin && client->poller.look != NULL && look_elsewhere(client, now);
        if (spin && (!event || now >= queue_ns)) {
            gpr_timespec at_once = gpr_time_0(GPR_CLOCK_MONOTONIC);
            event =
                dispatch(client, grpc_completion_queue_next(client->queue, at_once, NULL)) || event;
            queue_ns = now + QUEUE_NS;
        } else if (!event) {
            event = sleep_in_queue(client, deadline_ns);
        }
        if (event && atomic_load(&client->n_waiters) > 1) {
            look_at_waiters(client, self);
        }
        if (self->done(self->arg)) {
            return true;
        }
        now = attn_now_ns();
        if (now >= deadline_ns) {
            return false;
        }
        if (event) {
            spin_until = now + client->spin_ns;
        } else if (spin) {
            sched_yield(); /* the peer may have no core but this one */
        }
    }
}

bool
rpc_client_wait(rpc_client_t *client, bool (*done)(void *arg), void *arg, uint64_t deadline_ns)
{
    waiter_t self = {.done = done, .arg = arg};

    if (done(arg)) {
        return true;
    }
    rpc_cond_init(&self.cond);
    pthread_mutex_lock(&client->lock);
    waiter_add(client, &self);
    if (!client->polling) {
        client->polling = self.leader = true;
    } else if (client->background_polls) {
        post_wake(client);
    }
    pthread_mutex_unlock(&client->lock);
    bool true_now = done(arg); /* again: an event may have come before we were on the list */

    pthread_mutex_lock(&client->lock);
    bool in_time = true;
    while (!true_now && !self.satisfied && in_time) {
        if (self.leader) {
            pthread_mutex_unlock(&client->lock);
            true_now = lead(client, &self, deadline_ns);
            pthread_mutex_lock(&client->lock);
            break;
        }
        in_time = rpc_cond_wait(&self.cond, &client->lock, deadline_ns);
    }
    while (self.looked_at) {
        rpc_cond_wait(&client->looked_cond, &client->lock, UINT64_MAX);
    }
    waiter_remove(client, &self);
    if (self.leader) {
        pass_queue_on(client);
    }
    pthread_mutex_unlock(&client->lock);
    pthread_cond_destroy(&self.cond);
    return true_now || self.satisfied || done(arg);
}

/* Whether the background thread should poll now. */
static bool
background_wanted(const rpc_client_t *client, uint64_t now)
{
    return client->open > 0 && !client->polling && client->waiters == NULL &&
           now >= client->left_ns + STEP_IN_NS;
}

static void
background_poll(rpc_client_t *client)
{
    client->polling = client->background_polls = true;
    while (client->open > 0 && client->waiters == NULL && !client->closing) {
        pthread_mutex_unlock(&client->lock);
        grpc_event event =
            grpc_completion_queue_next(client->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (dispatch(client, event) && atomic_load(&client->n_waiters) > 0) {
            look_at_waiters(client, NULL);
        }
        pthread_mutex_lock(&client->lock);
    }
    pass_queue_on(client);
}

static void *
background(void *arg)
{
    rpc_client_t *client = arg;
    unsigned looks       = 0;
    uint64_t pause       = STEP_IN_NS;

    pthread_mutex_lock(&client->lock);
    while (!client->closing) {
        if (background_wanted(client, attn_now_ns())) {
            background_poll(client);
            looks = 0;
            pause = STEP_IN_NS;
        } else if (looks < LOOKS_MAX) {
            rpc_cond_wait(&client->background_cond, &client->lock, attn_now_ns() + pause);
            looks++;
            pause = attn_min(2 * pause, LOOK_MAX_NS); /* each look is in somebody's way */
        } else {
            /* Whoever leaves work behind, a waiter or a new call, wakes it. */
            client->background_sleeps = true;
            while (client->background_sleeps && !client->closing) {
                rpc_cond_wait(&client->background_cond, &client->lock, UINT64_MAX);
            }
            looks = 0;
        }
    }
    pthread_mutex_unlock(&client->lock);
    return NULL;
}

/* ---- what goes with channels and calls ---- */

void
rpc_client_set_poller(rpc_client_t *client, const rpc_poller_t *poller)
{
    assert(client->poller.look == NULL);
    client->poller = *poller;
}

void
rpc_client_set_tls(rpc_client_t *client, rpc_tls_t *tls, const char *server_name)
{
    assert(client->tls == NULL);
    client->tls = rpc_tls_ref(tls);
    if (server_name != NULL && server_name[0] != 0) {
        client->server_name = gpr_strdup(server_name);
    }
}

rpc_tls_t *
rpc_client_tls(const rpc_client_t *client)
{
    return client->tls;
}

const char *
rpc_client_server_name(const rpc_client_t *client)
{
    return client->server_name;
}

void
rpc_client_set_header(rpc_client_t *client, const char *key, const char *value)
{
    grpc_slice slice = grpc_slice_from_copied_string(value);

    pthread_mutex_lock(&client->lock);
    grpc_slice before    = client->header_value;
    client->header_key   = key;
    client->header_value = slice;
    atomic_fetch_add(&client->header_version, 1);
    pthread_mutex_unlock(&client->lock);
    grpc_slice_unref(before);
}

uint64_t
rpc_client_header_version(const rpc_client_t *client)
{
    return atomic_load(&client->header_version);
}

grpc_metadata
rpc_client_header(rpc_client_t *client)
{
    grpc_metadata header = {.key = grpc_empty_slice(), .value = grpc_empty_slice()};

    pthread_mutex_lock(&client->lock);
    if (client->header_key != NULL) {
        header.key   = grpc_slice_from_static_string(client->header_key);
        header.value = grpc_slice_ref(client->header_value);
    }
    pthread_mutex_unlock(&client->lock);
    return header;
}

/* ---- life ---- */

grpc_completion_queue *
rpc_client_queue(const rpc_client_t *client)
{
    return client->queue;
}

void
rpc_client_began(rpc_client_t *client)
{
    pthread_mutex_lock(&client->lock);
    assert(!client->closing);
    client->open++;
    if (client->background_sleeps && !client->polling) {
        client->background_sleeps = false;
        pthread_cond_signal(&client->background_cond);
    }
    pthread_mutex_unlock(&client->lock);
}

void
rpc_client_ended(rpc_client_t *client)
{
    pthread_mutex_lock(&client->lock);
    assert(client->open > 0);
    client->open--;
    pthread_mutex_unlock(&client->lock);
}

attn_status_t
rpc_client_create(uint32_t spin_us, rpc_client_t **client_p)
{
    rpc_init();
    rpc_client_t *client = gpr_zalloc(sizeof(*client));

    client->spin_ns      = spin_us * ATTN_NS_PER_US;
    client->op_wake      = (rpc_op_t){on_wake};
    client->header_value = grpc_empty_slice();
    atomic_init(&client->refs, 1);
    pthread_mutex_init(&client->lock, NULL);
    rpc_cond_init(&client->background_cond);
    rpc_cond_init(&client->looked_cond);
    client->queue   = grpc_completion_queue_create_for_next(NULL);
    client->nowhere = grpc_lame_client_channel_create("nowhere", GRPC_STATUS_UNAVAILABLE, "");
    client->poster  = grpc_channel_create_call(client->nowhere, NULL, 0, client->queue,
                                               grpc_slice_from_static_string("/none/None"), NULL,
                                               gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);

    int error = pthread_create(&client->background, NULL, background, client);
    if (error != 0) {
        client->closing    = true;
        client->background = pthread_self();
        rpc_client_destroy(client);
        return attn_fail(ATTN_ERR_EXHAUSTED, "a client's thread cannot start: %s", strerror(error));
    }
    *client_p = client;
    return ATTN_OK;
}

void
rpc_client_ref(rpc_client_t *client)
{
    atomic_fetch_add(&client->refs, 1);
}

void
rpc_client_unref(rpc_client_t *client)
{
    if (atomic_fetch_sub(&client->refs, 1) != 1) {
        return;
    }
    pthread_cond_destroy(&client->background_cond);
    pthread_cond_destroy(&client->looked_cond);
    pthread_mutex_destroy(&client->lock);
    rpc_tls_close(client->tls);
    gpr_free(client->server_name);
    grpc_slice_unref(client->header_value);
    gpr_free(client);
}

void
rpc_client_destroy(rpc_client_t *client)
{
    if (client == NULL) {
        return;
    }
    pthread_mutex_lock(&client->lock);
    bool threaded   = !client->closing;
    client->closing = true;
    post_wake(client);
    pthread_cond_signal(&client->background_cond);
    pthread_mutex_unlock(&client->lock);
    if (threaded) {
        pthread_join(client->background, NULL);
    }

    /* What the channels' closing left to be told. Calls start batches until they have
     * ended, which a queue that is shut down would not stand. */
    gpr_timespec forever = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    assert(client->waiters == NULL);
    while (client->open > 0) {
        dispatch(client, grpc_completion_queue_next(client->queue, forever, NULL));
    }
    grpc_completion_queue_shutdown(client->queue);
    while (dispatch(client, grpc_completion_queue_next(client->queue, forever, NULL))) {
    }
    grpc_call_unref(client->poster);
    grpc_channel_destroy(client->nowhere);
    grpc_completion_queue_destroy(client->queue);
    rpc_client_unref(client);
    rpc_shutdown();
}
