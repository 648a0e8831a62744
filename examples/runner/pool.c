#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "failure.h"

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t wake; /* there is a job, or the end has come */
    pthread_cond_t idle; /* no helper is inside of the job */
    bool stop;
    uint64_t job;    /* grows with each; whoever saw this number needs no second look */
    bool open;       /* helpers may still enter the job */
    uint32_t inside; /* helpers in the job */
    pool_fn fn;
    const void *arg;
    uint32_t tasks;
    atomic_uint next; /* task to take; may run past tasks, once per thread */
    uint32_t n_helpers;
    pthread_t helpers[POOL_THREADS_MAX];
};

static void
take_tasks(pool_t *pool)
{
    uint32_t task;

    while ((task = atomic_fetch_add(&pool->next, 1)) < pool->tasks) {
        pool->fn(pool->arg, task);
    }
}

static void *
help(void *arg)
{
    pool_t *pool  = arg;
    uint64_t seen = 0;

    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        if (!pool->open || pool->job == seen) {
            pthread_cond_wait(&pool->wake, &pool->lock);
            continue;
        }
        seen = pool->job;
        pool->inside++;
        pthread_mutex_unlock(&pool->lock);
        take_tasks(pool);
        pthread_mutex_lock(&pool->lock);
        if (--pool->inside == 0) {
            pthread_cond_signal(&pool->idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

pool_t *
pool_create(uint32_t threads)
{
    pool_t *pool = calloc(1, sizeof(*pool));
    long cores   = sysconf(_SC_NPROCESSORS_ONLN);

    if (!pool) {
        failure("out of memory");
        return NULL;
    }
    if (threads == 0) {
        threads = cores > 0 ? (uint32_t)cores : 1;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    while (pool->n_helpers + 1 < threads && pool->n_helpers + 1 < POOL_THREADS_MAX) {
        if (pthread_create(&pool->helpers[pool->n_helpers], NULL, help, pool) != 0) {
            break; /* fewer threads do the same, later */
        }
        pool->n_helpers++;
    }
    return pool;
}

void
pool_destroy(pool_t *pool)
{
    if (!pool) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_helpers; i++) {
        pthread_join(pool->helpers[i], NULL);
    }
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void
pool_run(pool_t *pool, pool_fn fn, const void *arg, uint32_t tasks)
{
    pthread_mutex_lock(&pool->lock);
    pool->fn    = fn;
    pool->arg   = arg;
    pool->tasks = tasks;
    pool->open  = true;
    pool->job++;
    atomic_store(&pool->next, 0);
    if (tasks > 1) {
        pthread_cond_broadcast(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);

    take_tasks(pool);

    /* All tasks are taken: who is not inside yet is not needed, who is inside ends its task. */
    pthread_mutex_lock(&pool->lock);
    pool->open = false;
    while (pool->inside > 0) {
        pthread_cond_wait(&pool->idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}
