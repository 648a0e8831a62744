/*
 * memory_errand.c: calls of the driver that may wait for a GPU, and nobody is to wait with them: a
 * thread of that GPU's makes them, one after the other. It starts with the first and ends with the
 * last that there is to do.
 */
#include "kernels/memory_int.h"

#include "base/clock.h"

#include <assert.h>
#include <pthread.h>
#include <time.h>

#define LOOK_NS 200000 /* how often who waits for all of them looks */

typedef struct porter {
    pthread_t thread;
    bool running, ended; /* ended: it is to be joined */
    attn_errand_t *first;
} porter_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static porter_t porters[MEMORY_GPUS]; /* under the lock */

static void *
carry(void *arg)
{
    porter_t *porter = arg;
    attn_errand_t *errand;

    pthread_mutex_lock(&lock);
    while ((errand = porter->first) != NULL) {
        porter->first = errand->next;
        pthread_mutex_unlock(&lock);
        errand->run(errand);
        pthread_mutex_lock(&lock);
    }
    porter->running = false;
    porter->ended   = true;
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Under the lock, which it needs no more. */
static void
join(porter_t *porter)
{
    if (porter->ended) {
        pthread_join(porter->thread, NULL);
        porter->ended = false;
    }
}

void
attn_errand_add(int gpu, attn_errand_t *errand)
{
    assert(gpu >= 0 && gpu < MEMORY_GPUS);
    porter_t *porter   = &porters[gpu];
    attn_errand_t **at = &porter->first;

    errand->next = NULL;
    pthread_mutex_lock(&lock);
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = errand;
    if (!porter->running) {
        join(porter);
        porter->running = pthread_create(&porter->thread, NULL, carry, porter) == 0;
    }
    bool alone    = !porter->running; /* then there was nothing else to do */
    porter->first = alone ? NULL : porter->first;
    pthread_mutex_unlock(&lock);
    if (alone) {
        errand->run(errand);
    }
}

bool
attn_errands_settle(uint64_t until_ns)
{
    bool running;

    for (;;) {
        running = false;
        pthread_mutex_lock(&lock);
        for (int i = 0; i < MEMORY_GPUS; i++) {
            join(&porters[i]);
            running = running || porters[i].running;
        }
        pthread_mutex_unlock(&lock);
        if (!running || attn_now_ns() >= until_ns) {
            return !running;
        }
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
    }
}
