/*
 * carrier.c: the thread that looks after copies of submitted runs. Nobody waits for such a run, and
 * whoever has its last answer makes everybody's progress: neither may wait for a GPU. So while the
 * tensors of a run are on their way to pinned memory or to the worker's GPU, while that memory is
 * being mapped for them, and while its answer is on the way back, the run is in a list here; the
 * thread looks at all of them in turns and sends on those that are there. It starts with the first
 * such run, and sleeps while there are none.
 */
#include "client/step_int.h"

#include "base/clock.h"
#include "base/status.h"

#include <sched.h>
#include <stdlib.h>

/* How long the thread looks without a pause when nothing moves, and how long its pauses are. */
#define SPIN_NS (100 * ATTN_NS_PER_US)
#define PAUSE_NS 20000

struct carrier {
    attn_client_t *client;
    pthread_t thread;
    pthread_mutex_t lock; /* innermost; guards what follows */
    pthread_cond_t wake;
    attn_step_t *first;
    bool stopping;
};

static void
add(struct carrier *carrier, attn_step_t *step)
{
    pthread_mutex_lock(&carrier->lock);
    step->carried  = carrier->first;
    carrier->first = step;
    pthread_cond_signal(&carrier->wake);
    pthread_mutex_unlock(&carrier->lock);
}

/* All there are, or NULL when the thread is to end. */
static attn_step_t *
take_all(struct carrier *carrier)
{
    pthread_mutex_lock(&carrier->lock);
    while (carrier->first == NULL && !carrier->stopping) {
        pthread_cond_wait(&carrier->wake, &carrier->lock);
    }
    attn_step_t *all = carrier->first;
    carrier->first   = NULL;
    pthread_mutex_unlock(&carrier->lock);
    return all;
}

/* Look at a step: true if something moved. It may be gone then. */
static bool
look_at(struct carrier *carrier, attn_step_t *step)
{
    attn_status_t status = step_tensors_look(step);

    if (status == ATTN_ERR_DEADLINE && attn_now_ns() < step->deadline_ns) {
        add(carrier, step);
        return false;
    }
    step_run_carried(step, status);
    rpc_client_wake(carrier->client->rpc); /* attn_step_abort() may wait for it */
    return true;
}

static void *
carry(void *arg)
{
    struct carrier *carrier = arg;
    uint64_t moved          = attn_now_ns();
    attn_step_t *step;

    while ((step = take_all(carrier)) != NULL) {
        while (step != NULL) {
            attn_step_t *next = step->carried;
            moved             = look_at(carrier, step) ? attn_now_ns() : moved;
            step              = next;
        }
        if (attn_now_ns() - moved < SPIN_NS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
        }
    }
    return NULL;
}

static void
carrier_free(struct carrier *carrier)
{
    pthread_cond_destroy(&carrier->wake);
    pthread_mutex_destroy(&carrier->lock);
    free(carrier);
}

/* Under the client's lock. */
static struct carrier *
carrier_start(attn_client_t *client)
{
    struct carrier *carrier = calloc(1, sizeof(*carrier));

    if (carrier == NULL) {
        return NULL;
    }
    carrier->client = client;
    pthread_mutex_init(&carrier->lock, NULL);
    pthread_cond_init(&carrier->wake, NULL);
    if (pthread_create(&carrier->thread, NULL, carry, carrier) != 0) {
        carrier_free(carrier);
        return NULL;
    }
    return carrier;
}

attn_status_t
step_carry(attn_step_t *step)
{
    attn_client_t *client   = step->client;
    struct carrier *carrier = atomic_load(&client->carrier);

    if (carrier == NULL) {
        pthread_mutex_lock(&client->lock);
        carrier = atomic_load(&client->carrier);
        if (carrier == NULL) {
            carrier = carrier_start(client);
            atomic_store(&client->carrier, carrier);
        }
        pthread_mutex_unlock(&client->lock);
    }
    if (carrier == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no thread to copy tensors of a GPU");
    }
    add(carrier, step);
    return ATTN_OK;
}

void
client_carrier_stop(attn_client_t *client)
{
    struct carrier *carrier = atomic_load(&client->carrier);

    if (carrier != NULL) {
        pthread_mutex_lock(&carrier->lock);
        carrier->stopping = true;
        pthread_cond_signal(&carrier->wake);
        pthread_mutex_unlock(&carrier->lock);
        pthread_join(carrier->thread, NULL);
        carrier_free(carrier);
        atomic_store(&client->carrier, NULL);
    }
}
