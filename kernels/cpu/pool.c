/*
 * A job is a struct on the stack of the thread that brings it, in a list while it has
 * tasks to give away. Helpers look for a job, spin for a while when there is none, since
 * the next layer usually follows at once, and then sleep. Tasks are handed out by one
 * atomic counter. The bringer takes its job off the list when no task is left and waits
 * for the helpers that are still in it.
 */
#include "kernels/cpu/pool.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define SPIN_NS (20 * ATTN_NS_PER_US)

typedef struct job {
    cpu_task_fn run;
    void *arg;
    uint32_t n_tasks;
    uint32_t participants; /* under the pool's lock; the bringer is 0 */
    uint32_t inside;       /* helpers in it now; under the pool's lock */
    atomic_uint next;
    struct job *link;
} job_t;

struct cpu_pool {
    uint32_t threads;
    pthread_t *helpers; /* [threads - 1] */
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    job_t *jobs; /* with tasks to give away */
    uint32_t sleeping;
    atomic_uint pending; /* jobs in the list, to spin on */
    atomic_bool stop;
};

/*
 * Merges promise subnormals rounded to nearest, whatever mode the calling program set for
 * itself: flush-to-zero comes with a linker flag of some.
 */
static uint32_t
float_mode_enter(void)
{
#if defined(__x86_64__)
    uint32_t mode = _mm_getcsr();
    _mm_setcsr(0x1f80); /* nearest, no flushing, exceptions masked */
    return mode;
#else
    return 0;
#endif
}

static void
float_mode_leave(uint32_t mode)
{
#if defined(__x86_64__)
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

static void
relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#endif
}

static void
take_tasks(job_t *job, uint32_t participant)
{
    for (;;) {
        uint32_t task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (task >= job->n_tasks) {
            return;
        }
        job->run(job->arg, task, participant);
    }
}

/* A job with a task and a free place, with this helper in it; under the lock. */
static job_t *
join_job(cpu_pool_t *pool, uint32_t *participant)
{
    for (job_t *job = pool->jobs; job != NULL; job = job->link) {
        if (job->participants < pool->threads &&
            atomic_load_explicit(&job->next, memory_order_relaxed) < job->n_tasks) {
            *participant = job->participants++;
            job->inside++;
            return job;
        }
    }
    return NULL;
}

static void
spin_for_jobs(cpu_pool_t *pool)
{
    uint64_t end = attn_now_ns() + SPIN_NS;
    while (atomic_load_explicit(&pool->pending, memory_order_relaxed) == 0 &&
           !atomic_load_explicit(&pool->stop, memory_order_relaxed) && attn_now_ns() < end) {
        for (int i = 0; i < 16; i++) {
            relax();
        }
    }
}

static void *
helper(void *arg)
{
    cpu_pool_t *pool = arg;

    float_mode_enter();
    pthread_mutex_lock(&pool->lock);
    while (!atomic_load_explicit(&pool->stop, memory_order_relaxed)) {
        uint32_t participant;
        job_t *job = join_job(pool, &participant);
        if (job == NULL) {
            pool->sleeping++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->sleeping--;
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        take_tasks(job, participant);
        pthread_mutex_lock(&pool->lock);
        if (--job->inside == 0) {
            pthread_cond_broadcast(&pool->done);
        }
        if (pool->jobs == NULL) {
            pthread_mutex_unlock(&pool->lock);
            spin_for_jobs(pool);
            pthread_mutex_lock(&pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

attn_status_t
cpu_pool_create(uint32_t threads, cpu_pool_t **pool_p)
{
    cpu_pool_t *pool = calloc(1, sizeof(*pool));

    if (pool == NULL || (pool->helpers = calloc(threads, sizeof(*pool->helpers))) == NULL) {
        free(pool);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a pool of %u threads", threads);
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->threads = 1;
    for (uint32_t i = 0; i + 1 < threads; i++) {
        if (pthread_create(&pool->helpers[i], NULL, helper, pool) != 0) {
            cpu_pool_destroy(pool);
            return attn_fail(ATTN_ERR_NO_MEMORY, "the system gives no thread number %u of %u",
                             i + 2, threads);
        }
        pthread_mutex_lock(&pool->lock); /* helpers that run already read it */
        pool->threads++;
        pthread_mutex_unlock(&pool->lock);
    }
    *pool_p = pool;
    return ATTN_OK;
}

void
cpu_pool_destroy(cpu_pool_t *pool)
{
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i + 1 < pool->threads; i++) {
        pthread_join(pool->helpers[i], NULL);
    }
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool->helpers);
    free(pool);
}

uint32_t
cpu_pool_threads(const cpu_pool_t *pool)
{
    return pool->threads;
}

void
cpu_pool_run_inline(uint32_t n_tasks, cpu_task_fn run, void *arg)
{
    uint32_t mode = float_mode_enter();
    for (uint32_t task = 0; task < n_tasks; task++) {
        run(arg, task, 0);
    }
    float_mode_leave(mode);
}

static void
publish(cpu_pool_t *pool, job_t *job)
{
    pthread_mutex_lock(&pool->lock);
    job->link  = pool->jobs;
    pool->jobs = job;
    atomic_fetch_add_explicit(&pool->pending, 1, memory_order_relaxed);
    uint32_t wanted = job->n_tasks - 1;
    if (wanted < pool->sleeping) {
        for (uint32_t i = 0; i < wanted; i++) {
            pthread_cond_signal(&pool->work);
        }
    } else if (pool->sleeping > 0) {
        pthread_cond_broadcast(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
}

static void
withdraw(cpu_pool_t *pool, job_t *job)
{
    pthread_mutex_lock(&pool->lock);
    job_t **at = &pool->jobs;
    while (*at != job) {
        at = &(*at)->link;
    }
    *at = job->link;
    atomic_fetch_sub_explicit(&pool->pending, 1, memory_order_relaxed);
    while (job->inside > 0) {
        pthread_cond_wait(&pool->done, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}

void
cpu_pool_run(cpu_pool_t *pool, uint32_t n_tasks, cpu_task_fn run, void *arg)
{
    if (n_tasks <= 1 || pool->threads <= 1) {
        cpu_pool_run_inline(n_tasks, run, arg);
        return;
    }
    job_t job     = {.run = run, .arg = arg, .n_tasks = n_tasks, .participants = 1};
    uint32_t mode = float_mode_enter();

    publish(pool, &job);
    take_tasks(&job, 0);
    withdraw(pool, &job);
    float_mode_leave(mode);
}
