/*
 * crew.c: the threads of a server.
 *
 * One thread at a time has the completion queue: it polls it and dispatches what it finds,
 * which is short work, for it changes the state of a call. When that gives a call work for
 * a handler, the same thread runs the handler, so that an event meets its handler without
 * a change of threads. What becomes of the queue meanwhile depends:
 *
 *  - usually it is given up, and another thread is woken to have it;
 *  - when the handler has been taking less time than it is worth to wake a thread, or the
 *    last handlers were all of the same stream and took no longer than a call may wait, and
 *    nothing else is waiting, the queue is kept: a thread woken for nothing takes the core
 *    of the handler, or of a client that spins for its answer, and then that of the handler
 *    again for each thing that the handler starts. So it is where as many handlers run as there
 *    are cores for, and where threads that were woken have been taking long to come, for then
 *    every core is busy.
 *
 * A deputy, one of the idle threads, looks every few milliseconds and takes the queue from a
 * handler that has had it for long, so that one that blocks for once does not hold up the others.
 *
 * There is one thread more than handlers may run at once: the queue is polled also when
 * all handlers are busy, and calls then wait in the list of ready ones.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <grpc/support/cpu.h>
#include <sched.h>

#define DRAIN_MAX 64  /* events dispatched before the first handler runs */
#define DRAIN_LOOKS 2 /* in vain, one after the other, before nothing more is taken to be there */
#define ALONE_RUNS 8  /* handlers in a row of one call, after which it is taken to be alone */

#define WAKE_SLOW_NS (100 * ATTN_NS_PER_US) /* for a thread to come: no core is free for it */
#define WAKE_TRY 16                         /* while that is so, one handler in so many wakes one */

#define DEPUTY_LOOK_NS (1 * ATTN_NS_PER_MS)     /* between its looks, and a handler's time */
#define DEPUTY_LOOK_MAX_NS (4 * ATTN_NS_PER_MS) /* while it finds nothing to do */
#define DEPUTY_LOOKS 20 /* without any keeper, before it sleeps until it is woken */

struct rpc_crew {
    grpc_completion_queue *queue;
    uint64_t spin_ns;
    uint32_t handlers_max, n_cpus, n_threads;
    uint32_t side_by_side; /* handlers for which there are cores */
    pthread_t *threads;

    pthread_mutex_t lock;
    pthread_cond_t idle_cond, deputy_cond;
    rpc_call_t *ready_head, *ready_tail;
    uint32_t idle, handlers;
    bool polling; /* a thread has the queue */
    bool drained; /* the queue is shut down and empty */
    bool deputy, deputy_sleeps;
    uint64_t keeper, kept_since_ns; /* which handler keeps the queue; 0: none */
    uint64_t n_keepers;
    const rpc_call_t *last; /* whose handler ran last; perhaps gone, so only compared */
    uint32_t n_last;        /* how often in a row before */
    uint64_t woken_ns;      /* when an idle thread was woken that has not come yet; 0: none */
    uint64_t wake_ns;       /* how long they take, on average */
    uint32_t n_slow;        /* handlers that kept the queue for that */
};

void
rpc_crew_ready(rpc_crew_t *crew, rpc_call_t *call)
{
    pthread_mutex_lock(&crew->lock);
    *rpc_call_link(call) = NULL;
    if (crew->ready_tail == NULL) {
        crew->ready_head = call;
    } else {
        *rpc_call_link(crew->ready_tail) = call;
    }
    crew->ready_tail = call;
    /* Whoever dispatches comes by here next, and a handler that returns does too. */
    pthread_mutex_unlock(&crew->lock);
}

static bool
has_work(const rpc_crew_t *crew)
{
    return crew->ready_head != NULL && crew->handlers < crew->handlers_max;
}

static rpc_call_t *
take_ready(rpc_crew_t *crew)
{
    rpc_call_t *call = crew->ready_head;

    if (!has_work(crew)) {
        return NULL;
    }
    crew->ready_head = *rpc_call_link(call);
    if (crew->ready_head == NULL) {
        crew->ready_tail = NULL;
    }
    return call;
}

static grpc_event
next_event(const rpc_crew_t *crew, bool spin)
{
    if (spin) {
        uint64_t until = attn_now_ns() + crew->spin_ns;
        do {
            grpc_event event =
                grpc_completion_queue_next(crew->queue, gpr_time_0(GPR_CLOCK_MONOTONIC), NULL);
            if (event.type != GRPC_QUEUE_TIMEOUT) {
                return event;
            }
            sched_yield(); /* the peer may have no core but this one */
        } while (attn_now_ns() < until);
    }
    return grpc_completion_queue_next(crew->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

/* Wait for an event and dispatch it. @return false when there will be no more */
static bool
poll_once(const rpc_crew_t *crew, bool spin)
{
    grpc_event event = next_event(crew, spin);

    rpc_dispatch(event);
    return event.type != GRPC_QUEUE_SHUTDOWN;
}

/*
 * Dispatch what else is there, to know how much work there is. C core takes up one socket at a
 * look, and one that has but flow control for it looks like nothing, whatever waits behind it: to
 * stop there made handlers run one by one, with a thread woken for each, where eight peers wait.
 */
static void
poll_rest(const rpc_crew_t *crew)
{
    int vain = 0;

    for (int n = 0; n < DRAIN_MAX && vain < DRAIN_LOOKS; n++) {
        /* A shutdown is seen again by the next one who asks. */
        grpc_event event =
            grpc_completion_queue_next(crew->queue, gpr_time_0(GPR_CLOCK_MONOTONIC), NULL);
        vain = rpc_dispatch(event) ? 0 : vain + 1;
    }
}

/* Whether this call was the only one of late, and does not take long; with the lock held. */
static bool
is_alone(const rpc_crew_t *crew, const rpc_call_t *call)
{
    return crew->last == call && crew->n_last + 1 >= ALONE_RUNS && rpc_call_is_bearable(call);
}

/* Have the queue until there is work for a handler that may run; with the lock held. */
static void
have_queue(rpc_crew_t *crew)
{
    /* Handlers, this thread and perhaps a client here: who spins must not be in their way. */
    bool spin = crew->spin_ns > 0 && crew->handlers + 2 <= crew->n_cpus;
    bool more = true;

    crew->polling = true;
    while (more && !has_work(crew)) {
        pthread_mutex_unlock(&crew->lock);
        more = poll_once(crew, spin);
        pthread_mutex_lock(&crew->lock);
    }
    if (more && !is_alone(crew, crew->ready_head)) { /* its queue is kept whatever else is there */
        pthread_mutex_unlock(&crew->lock);
        poll_rest(crew);
        pthread_mutex_lock(&crew->lock);
    }
    crew->polling = false;
    if (!more) {
        crew->drained = true;
        pthread_cond_broadcast(&crew->idle_cond);
        pthread_cond_broadcast(&crew->deputy_cond);
    }
}

/* Keep the queue, which nobody has, while a short handler runs. @return the keeper's number */
static uint64_t
keep_queue(rpc_crew_t *crew)
{
    crew->polling       = true;
    crew->keeper        = ++crew->n_keepers;
    crew->kept_since_ns = attn_now_ns();
    if (!crew->deputy) {
        pthread_cond_signal(&crew->idle_cond); /* whoever wakes becomes the deputy */
    } else if (crew->deputy_sleeps) {
        crew->deputy_sleeps = false;
        pthread_cond_signal(&crew->deputy_cond);
    }
    return crew->keeper;
}

/* Whether to keep the queue while this call's handler runs; with the lock held. */
static bool
is_to_keep(rpc_crew_t *crew, const rpc_call_t *call)
{
    bool alone   = is_alone(crew, call);
    crew->n_last = crew->last == call ? crew->n_last + 1 : 0;
    crew->last   = call;
    if (crew->handlers + 1 >= crew->side_by_side && rpc_call_is_bearable(call)) {
        return true;
    }
    if (crew->wake_ns > WAKE_SLOW_NS && rpc_call_is_bearable(call)) {
        return ++crew->n_slow % WAKE_TRY != 0;
    }
    return crew->ready_head == NULL && (rpc_call_is_short(call) || alone);
}

static void
wake_another(rpc_crew_t *crew)
{
    if (crew->idle > 0 && crew->woken_ns == 0) {
        crew->woken_ns = attn_now_ns();
    }
    pthread_cond_signal(crew->idle > 0 ? &crew->idle_cond : &crew->deputy_cond);
    crew->deputy_sleeps = crew->deputy_sleeps && crew->idle > 0;
}

/* Run a handler, with the lock held before and after. */
static void
handle(rpc_crew_t *crew, rpc_call_t *call)
{
    uint64_t keeper = 0;

    bool keep = is_to_keep(crew, call);
    crew->handlers++;
    if (!crew->polling) {
        if (keep) {
            keeper = keep_queue(crew);
        } else {
            wake_another(crew);
        }
    }
    pthread_mutex_unlock(&crew->lock);
    rpc_call_run(call, keeper != 0);
    pthread_mutex_lock(&crew->lock);
    crew->handlers--;
    if (keeper != 0 && crew->keeper == keeper) {
        crew->keeper  = 0;
        crew->polling = false;
    }
}

/* Look now and then whether a handler keeps the queue for too long. */
static void
be_deputy(rpc_crew_t *crew)
{
    uint64_t seen = crew->n_keepers, pause = DEPUTY_LOOK_NS;

    crew->deputy = true;
    for (unsigned looks = 0; crew->polling && !crew->drained; looks++) {
        crew->deputy_sleeps = looks >= DEPUTY_LOOKS;
        rpc_cond_wait(&crew->deputy_cond, &crew->lock,
                      crew->deputy_sleeps ? UINT64_MAX : attn_now_ns() + pause);
        if (crew->keeper != 0 && attn_now_ns() >= crew->kept_since_ns + DEPUTY_LOOK_NS) {
            crew->keeper  = 0;
            crew->polling = false;
        }
        if (seen != crew->n_keepers) {
            seen  = crew->n_keepers;
            looks = 0;
        }
        pause = attn_min(2 * pause, DEPUTY_LOOK_MAX_NS); /* each look is in somebody's way */
    }
    crew->deputy = crew->deputy_sleeps = false;
}

/* Wait until there may be something to do. */
static void
be_idle(rpc_crew_t *crew)
{
    crew->idle++;
    pthread_cond_wait(&crew->idle_cond, &crew->lock);
    crew->idle--;
    if (crew->woken_ns != 0) {
        uint64_t took  = attn_min(attn_now_ns() - crew->woken_ns, 8 * WAKE_SLOW_NS);
        crew->wake_ns  = (7 * crew->wake_ns + took) / 8;
        crew->woken_ns = 0;
    }
}

static void *
serve(void *arg)
{
    rpc_crew_t *crew = arg;

    pthread_mutex_lock(&crew->lock);
    for (;;) {
        rpc_call_t *call = take_ready(crew);
        if (call != NULL) {
            handle(crew, call);
        } else if (crew->drained) {
            break;
        } else if (!crew->polling) {
            have_queue(crew);
        } else if (!crew->deputy) {
            be_deputy(crew);
        } else {
            be_idle(crew);
        }
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

/* ---- life ---- */

rpc_crew_t *
rpc_crew_create(grpc_completion_queue *queue, uint32_t handlers_max, uint32_t side_by_side,
                uint32_t spin_us)
{
    rpc_crew_t *crew = gpr_zalloc(sizeof(*crew));

    crew->queue        = queue;
    crew->spin_ns      = spin_us * ATTN_NS_PER_US;
    crew->handlers_max = handlers_max;
    crew->n_cpus       = gpr_cpu_num_cores();
    crew->side_by_side = side_by_side == 0 ? crew->n_cpus : attn_min(side_by_side, crew->n_cpus);
    crew->threads      = gpr_zalloc((handlers_max + 1) * sizeof(*crew->threads));
    pthread_mutex_init(&crew->lock, NULL);
    rpc_cond_init(&crew->idle_cond);
    rpc_cond_init(&crew->deputy_cond);
    return crew;
}

attn_status_t
rpc_crew_start(rpc_crew_t *crew)
{
    for (uint32_t i = 0; i <= crew->handlers_max; i++) {
        int error = pthread_create(&crew->threads[i], NULL, serve, crew);
        if (error != 0) {
            return attn_fail(ATTN_ERR_EXHAUSTED, "thread %u of %u cannot start: %s", i + 1,
                             crew->handlers_max + 1, strerror(error));
        }
        crew->n_threads++;
    }
    return ATTN_OK;
}

bool
rpc_crew_at_work(const rpc_crew_t *crew)
{
    return crew->n_threads > 0;
}

bool
rpc_crew_poll(rpc_crew_t *crew)
{
    return poll_once(crew, false);
}

void
rpc_crew_join(rpc_crew_t *crew)
{
    while (crew->n_threads == 0 && poll_once(crew, false)) {
    }
    for (uint32_t i = 0; i < crew->n_threads; i++) {
        pthread_join(crew->threads[i], NULL);
    }
}

void
rpc_crew_destroy(rpc_crew_t *crew)
{
    pthread_cond_destroy(&crew->idle_cond);
    pthread_cond_destroy(&crew->deputy_cond);
    pthread_mutex_destroy(&crew->lock);
    gpr_free(crew->threads);
    gpr_free(crew);
}
