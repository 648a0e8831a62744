/* load.c: see load.h. */
#include "bench/load.h"

#include "base/clock.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define HELPERS_MAX 63u
#define SCRATCH (1u << 20) /* bytes that a thread goes through while it computes */

/* Threads that compute beside the client, each time the round number grows. */
struct load {
    pthread_mutex_t lock;
    pthread_cond_t more;
    unsigned round; /* under the lock */
    atomic_uint busy;
    uint64_t pause_ns;
    uint32_t helpers;
};

static void
compute(uint64_t until_ns)
{
    static _Thread_local volatile uint64_t scratch[SCRATCH / 8];
    uint64_t sum = 0;

    while (attn_now_ns() < until_ns) {
        for (uint32_t i = 0; i < SCRATCH / 8 / 16; i++) {
            sum += scratch[i * 16 + sum % 2];
        }
    }
}

static void *
helper(void *arg)
{
    load_t *load  = arg;
    unsigned seen = 0;

    for (;;) {
        pthread_mutex_lock(&load->lock);
        while (load->round == seen) {
            pthread_cond_wait(&load->more, &load->lock);
        }
        seen = load->round;
        pthread_mutex_unlock(&load->lock);
        compute(attn_now_ns() + load->pause_ns);
        atomic_fetch_sub(&load->busy, 1);
    }
    return NULL;
}

void
load_pause(load_t *load)
{
    if (load->pause_ns == 0) {
        return;
    }
    atomic_store(&load->busy, load->helpers);
    pthread_mutex_lock(&load->lock);
    load->round++;
    pthread_cond_broadcast(&load->more);
    pthread_mutex_unlock(&load->lock);
    compute(attn_now_ns() + load->pause_ns);
    while (atomic_load(&load->busy) > 0) {
    }
}

load_t *
load_start(uint64_t pause_us)
{
    static load_t one = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};
    load_t *load      = &one;
    long cores        = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t thread;

    load->pause_ns = pause_us * 1000;
    while (pause_us > 0 && load->helpers + 1 < cores && load->helpers < HELPERS_MAX &&
           pthread_create(&thread, NULL, helper, load) == 0) {
        load->helpers++;
    }
    return load;
}
