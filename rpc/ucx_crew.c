/*
 * ucx_crew.c: the server's side of ucx.h: sessions, their slots, and the threads of the crew.
 *
 * One thread at a time is the leader and looks at the sequence numbers of all open slots. Who finds
 * one has the request, gives the lead up and handles it where it stands, so that a request meets
 * its handler without a change of threads. Whether another thread is woken to lead meanwhile
 * depends on what the slot's requests have been taking: a thread woken for nothing takes the core
 * of the handler, or of the client that looks for the answer. If they are short nobody is woken;
 * but a deputy, one of the idle threads, looks every millisecond while there is something to do,
 * and takes the lead from a handler that had it for longer, so that one slow request does not hold
 * up the others.
 *
 * The lock is the crew's, of sessions and slots alike. The leader has it while it looks, and lets
 * it go between bursts to whoever waits for it (`wanting`: a mutex alone would let it starve them).
 */
#include "rpc/ucx_crew_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "rpc/rpc_int.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define THREADS_MAX 64u
#define LOOKS_A_BURST 16u              /* at all slots, before others may have the lock */
#define FAR_LOOKS_A_BURST 2u           /* with messages, where a look is a system call */
#define LONG_NS (200 * ATTN_NS_PER_US) /* a handler that is worth waking a thread for */
#define DEPUTY_NS (1 * ATTN_NS_PER_MS) /* between its looks, and a handler's time */
#define DEPUTY_LOOKS 20u               /* without a request, before it sleeps until it is woken */
#define WAITV_NUMBER 449               /* futex_waitv, on every architecture */

/* ---- futexes ---- */

void
ucx_futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Sleep until a word is not what it was, or for another reason, or for none. */
static long
futex_wait_any(struct futex_waitv *words, unsigned n, const struct timespec *until)
{
    return syscall(WAITV_NUMBER, words, n, 0, until, CLOCK_MONOTONIC);
}

static struct futex_waitv
futex_word(_Atomic uint32_t *word)
{
    return (struct futex_waitv){
        .val = atomic_load(word), .uaddr = (uintptr_t)word, .flags = FUTEX_32};
}

static attn_status_t
futex_check(void)
{
    _Atomic uint32_t word    = 0;
    struct futex_waitv wait  = futex_word(&word);
    struct timespec long_ago = {0};

    return futex_wait_any(&wait, 1, &long_ago) >= 0 || errno == ETIMEDOUT
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "futex_waitv cannot be used (%s): Linux has it from 5.16 on, and a "
                           "sandbox may forbid it",
                           strerror(errno));
}

/* ---- looking ---- */

void
ucx_crew_lock(ucx_crew_t *crew)
{
    atomic_fetch_add(&crew->wanting, 1);
    pthread_mutex_lock(&crew->lock);
    atomic_fetch_sub(&crew->wanting, 1);
}

/* Let others have the lock, and the core. */
static void
give_way(ucx_crew_t *crew)
{
    pthread_mutex_unlock(&crew->lock);
    do {
        sched_yield();
    } while (atomic_load(&crew->wanting) > 0);
    pthread_mutex_lock(&crew->lock);
}

/* A request of this slot that is to be handled: its head is in slot->head. Under the lock. */
static bool
take_request(ucx_crew_t *crew, ucx_slot_t *slot)
{
    ucx_head_t *request = ucx_request_at(slot->session->at, &slot->place);
    uint64_t sequence   = atomic_load_explicit(&request->sequence, memory_order_acquire);

    if (sequence == slot->sequence || slot->running || slot->receiving) {
        return false;
    }
    memcpy(&slot->head, request, offsetof(ucx_head_t, sequence));
    bool late      = sequence < slot->sequence;
    slot->sequence = sequence; /* looked at once, whatever it is */
    if (late || slot->head.secret != slot->session->secret || slot->head.tag != slot->tag ||
        slot->head.bytes > slot->place.in) {
        crew->figures.dropped++;
        return false;
    }
    crew->figures.requests++;
    crew->figures.bytes_in += slot->head.bytes;
    slot->running = true;
    atomic_store(&slot->phase, UCX_SLOT_HANDLES);
    return true;
}

/* Look once at all slots, in turns. Under the lock. */
static ucx_slot_t *
look_at_slots(ucx_crew_t *crew)
{
    for (uint32_t i = 0; i < crew->n_slots; i++) {
        uint32_t at =
            crew->turn + i < crew->n_slots ? crew->turn + i : crew->turn + i - crew->n_slots;
        if (take_request(crew, crew->slots[at])) {
            crew->turn = at + 1 < crew->n_slots ? at + 1 : 0;
            return crew->slots[at];
        }
    }
    return NULL;
}

/* Under the lock. */
static ucx_slot_t *
look(ucx_crew_t *crew)
{
    if (crew->port != NULL) {
        ucx_far_progress(crew);
    }
    return look_at_slots(crew);
}

static void
say_sleeping(ucx_crew_t *crew, uint32_t sleeps)
{
    for (ucx_session_t *s = crew->sessions; s != NULL; s = s->next) {
        atomic_store_explicit(&s->card->server_sleeps, sleeps, memory_order_relaxed);
    }
}

/* Sleep until a client rings or something changed here. Under the lock, given up meanwhile.
 * @return a request that came before it slept */
static ucx_slot_t *
sleep_a_while(ucx_crew_t *crew)
{
    struct futex_waitv words[1 + UCX_SESSIONS_MAX];
    unsigned n = 0;

    if (crew->port != NULL) {
        ucx_far_sleep(crew);
        return look_at_slots(crew);
    }
    words[n++] = futex_word(&crew->kick);
    for (ucx_session_t *s = crew->sessions; s != NULL; s = s->next) {
        words[n++] = futex_word(&s->card->bell);
    }
    say_sleeping(crew, 1);
    ucx_fence(); /* a client asks, fences, and reads that */
    ucx_slot_t *slot = look(crew);
    if (slot == NULL && !crew->stopping) {
        crew->figures.sleeps++;
        pthread_mutex_unlock(&crew->lock);
        futex_wait_any(words, n, NULL);
        pthread_mutex_lock(&crew->lock);
    }
    say_sleeping(crew, 0);
    return slot;
}

/* Be the leader until there is a request. Under the lock. @return NULL: the crew stops */
static ucx_slot_t *
lead(ucx_crew_t *crew)
{
    uint64_t until = attn_now_ns() + crew->spin_ns;

    while (!crew->stopping) {
        /* Handlers, this thread and perhaps a client here: who spins must not be in their way. */
        bool spin        = crew->n_slots > 0 && crew->running + 2 <= crew->n_cpus;
        ucx_slot_t *slot = NULL;
        unsigned most    = crew->port != NULL ? FAR_LOOKS_A_BURST : LOOKS_A_BURST;
        for (unsigned i = 0; i < most && slot == NULL; i++) {
            slot = look(crew);
            rpc_relax();
        }
        if (crew->tidy) {
            ucx_far_tidy(crew);
        }
        if (slot == NULL && (!spin || attn_now_ns() >= until)) {
            slot  = sleep_a_while(crew);
            until = attn_now_ns() + crew->spin_ns;
        } else if (slot == NULL) {
            give_way(crew);
        }
        if (slot != NULL) {
            return slot;
        }
    }
    return NULL;
}

/* ---- handling ---- */

static void
ring(ucx_crew_t *crew, ucx_session_t *session)
{
    pthread_mutex_lock(&session->ring_lock);
    if (session->ring != NULL) {
        session->ring(session->ring_arg);
    }
    pthread_mutex_unlock(&session->ring_lock);
    atomic_fetch_add_explicit(&crew->rings, 1, memory_order_relaxed);
}

/* Handle the request of slot->head, and answer. Without the lock. */
static void
handle(ucx_crew_t *crew, ucx_slot_t *slot)
{
    ucx_session_t *session = slot->session;
    ucx_head_t *answer     = ucx_answer_at(session->at, &slot->place);
    ucx_head_t reply       = {.secret = session->secret, .tag = slot->tag};

    uint64_t start = attn_now_ns();
    reply.status =
        (int32_t)slot->handle(slot->arg, &slot->head, ucx_data_at(session->at, &slot->place),
                              ucx_answer_data_at(session->at, &slot->place), &reply);
    uint64_t took    = attn_now_ns() - start;
    slot->typical_ns = slot->typical_ns > 0 ? (3 * slot->typical_ns + took) / 4 : took;
    if (reply.status != ATTN_OK) {
        char *sentence = ucx_sentence_at(session->at, &slot->place);
        strncpy(sentence, attn_last_error(), UCX_SENTENCE_ROOM - 1);
        sentence[UCX_SENTENCE_ROOM - 1] = '\0';
    }
    slot->answered = reply.status == ATTN_OK ? reply.bytes : 0;
    reply.offset   = slot->place.offset;
    if (crew->port != NULL) { /* it is sent under the lock */
        memcpy(answer, &reply, offsetof(ucx_head_t, sequence));
        atomic_store(&answer->sequence, slot->sequence);
        return;
    }
    atomic_store(&slot->phase, UCX_SLOT_ANSWERS);
    memcpy(answer, &reply, offsetof(ucx_head_t, sequence));
    atomic_store_explicit(&answer->sequence, slot->sequence, memory_order_release);
    atomic_store(&slot->phase, UCX_SLOT_ANSWERED); /* its place is not touched from here on */

    ucx_fence(); /* the client says that it sleeps, fences, looks */
    if ((slot->head.flags & UCX_RING) != 0 ||
        (atomic_load_explicit(&session->card->client_sleeps, memory_order_relaxed) != 0 &&
         atomic_exchange(&session->card->client_sleeps, 0) != 0)) {
        ring(crew, session);
    }
}

/* Before a request is handled: who leads meanwhile? Under the lock. */
static void
care_for_lead(ucx_crew_t *crew, const ucx_slot_t *slot)
{
    crew->n_requests++;
    crew->last_ns = attn_now_ns();
    if (crew->idle > 0 && (slot->typical_ns == 0 || slot->typical_ns > LONG_NS)) {
        pthread_cond_signal(&crew->idle_cond);
    } else if (crew->deputy_sleeps) {
        crew->deputy_sleeps = false;
        pthread_cond_signal(&crew->deputy_cond);
    }
}

/* Look now and then whether nobody leads for too long. Under the lock. */
static void
be_deputy(ucx_crew_t *crew)
{
    uint64_t seen = crew->n_requests;

    crew->deputy = true;
    for (unsigned looks = 0; !crew->stopping; looks++) {
        crew->deputy_sleeps = looks >= DEPUTY_LOOKS;
        rpc_cond_wait(&crew->deputy_cond, &crew->lock,
                      crew->deputy_sleeps ? UINT64_MAX : attn_now_ns() + DEPUTY_NS);
        if (!crew->leading && attn_now_ns() >= crew->last_ns + DEPUTY_NS) {
            break;
        }
        if (seen != crew->n_requests) {
            seen  = crew->n_requests;
            looks = 0;
        }
    }
    crew->deputy = crew->deputy_sleeps = false;
    if (crew->idle > 0) { /* who leads now may get stuck, too: the next deputy */
        pthread_cond_signal(&crew->idle_cond);
    }
}

static void
be_idle(ucx_crew_t *crew)
{
    crew->idle++;
    pthread_cond_wait(&crew->idle_cond, &crew->lock);
    crew->idle--;
}

/* Handle a slot's request, and those that follow while another thread leads: that one passed over a
 * slot which was busy, and may sleep by now. Under the lock, given up meanwhile. */
static void
work(ucx_crew_t *crew, ucx_slot_t *slot)
{
    bool more;

    do {
        crew->running++;
        care_for_lead(crew, slot);
        pthread_mutex_unlock(&crew->lock);
        handle(crew, slot);
        ucx_crew_lock(crew);
        crew->running--;
        if (crew->port != NULL) {
            ucx_far_answer(slot);
        }
        more = ucx_slot_ran(slot) && crew->leading && take_request(crew, slot);
    } while (more);
}

static void *
serve(void *arg)
{
    ucx_crew_t *crew = arg;

    ucx_crew_lock(crew);
    while (!crew->stopping) {
        if (crew->leading && !crew->deputy) {
            be_deputy(crew);
        } else if (crew->leading) {
            be_idle(crew);
        } else {
            crew->leading    = true;
            ucx_slot_t *slot = lead(crew);
            crew->leading    = false;
            if (slot != NULL) {
                work(crew, slot);
            }
        }
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

/* ---- life ---- */

void
ucx_crew_kick(ucx_crew_t *crew)
{
    if (crew->port != NULL) {
        eventfd_write(crew->kick_fd, 1);
        return;
    }
    atomic_fetch_add(&crew->kick, 1);
    ucx_futex_wake(&crew->kick);
}

static attn_status_t
threads_start(ucx_crew_t *crew)
{
    for (; crew->n_threads < crew->threads_max; crew->n_threads++) {
        int error = pthread_create(&crew->threads[crew->n_threads], NULL, serve, crew);
        if (error != 0) {
            return attn_fail(ATTN_ERR_EXHAUSTED, "a thread for UCX cannot start: %s",
                             strerror(error));
        }
    }
    return ATTN_OK;
}

static attn_status_t
near_create(ucx_crew_t *crew)
{
    attn_status_t status = futex_check();

    snprintf(crew->figures.way, sizeof(crew->figures.way), "shm");
    return status == ATTN_OK ? ucx_node_create(&crew->node) : status;
}

attn_status_t
ucx_crew_create(const ucx_crew_options_t *options, ucx_crew_t **crew_p)
{
    uint32_t threads = options->threads != 0 ? options->threads : UCX_CREW_THREADS;

    if (threads > THREADS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "%u threads for UCX: at most %u", threads, THREADS_MAX);
    }
    ucx_crew_t *crew = calloc(1, sizeof(*crew));
    if (crew == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the threads of UCX");
    }
    ucx_environment();
    crew->kick_fd     = -1;
    crew->spin_ns     = options->spin_us * ATTN_NS_PER_US;
    crew->memory_max  = options->memory_max;
    crew->threads_max = threads;
    crew->n_cpus      = (uint32_t)attn_max((uint64_t)sysconf(_SC_NPROCESSORS_ONLN), 1);
    pthread_mutex_init(&crew->lock, NULL);
    rpc_cond_init(&crew->idle_cond);
    rpc_cond_init(&crew->deputy_cond);
    attn_status_t status =
        options->network != NULL ? ucx_far_create(crew, options->network) : near_create(crew);
    if (status == ATTN_OK) {
        status = threads_start(crew);
    }
    if (status != ATTN_OK) {
        ucx_crew_destroy(crew);
        return status;
    }
    *crew_p = crew;
    return ATTN_OK;
}

void
ucx_crew_destroy(ucx_crew_t *crew)
{
    if (crew == NULL) {
        return;
    }
    ucx_crew_lock(crew);
    crew->stopping = true;
    pthread_cond_broadcast(&crew->idle_cond);
    pthread_cond_broadcast(&crew->deputy_cond);
    pthread_mutex_unlock(&crew->lock);
    ucx_crew_kick(crew);
    for (uint32_t i = 0; i < crew->n_threads; i++) {
        pthread_join(crew->threads[i], NULL);
    }
    ucx_port_destroy(crew->port);
    ucx_crew_lock(crew);
    ucx_far_tidy(crew); /* slots whose data was on its way until now */
    pthread_mutex_unlock(&crew->lock);
    if (crew->kick_fd >= 0) {
        close(crew->kick_fd);
    }
    ucx_node_destroy(crew->node);
    pthread_cond_destroy(&crew->idle_cond);
    pthread_cond_destroy(&crew->deputy_cond);
    pthread_mutex_destroy(&crew->lock);
    free(crew);
}

void
ucx_crew_describe(ucx_crew_t *crew, ucx_figures_t *figures)
{
    ucx_crew_lock(crew);
    *figures            = crew->figures;
    figures->rings      = atomic_load(&crew->rings);
    figures->slots      = crew->n_slots;
    figures->sessions   = crew->n_sessions;
    figures->slab_bytes = crew->memory;
    pthread_mutex_unlock(&crew->lock);
}
