#include "daemon/jobs.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define KEPT 4u                                    /* threads that stay when there is no work */
#define IDLE_NS (UINT64_C(10000) * ATTN_NS_PER_MS) /* after which the others end */

struct jobs {
    pthread_mutex_t lock;
    pthread_cond_t work; /* a job came, or stopping; on the monotonic clock */
    pthread_cond_t gone; /* the last thread ended */
    job_t *head, **tail;
    bool stopping;
    uint32_t most, n;      /* threads */
    uint32_t idle, queued; /* threads that wait for work, jobs that wait for a thread */
};

/* Wait for a job, with the lock held. @return NULL: the thread is to end */
static job_t *
wait_for_job(jobs_t *jobs)
{
    uint64_t end          = attn_now_ns() + IDLE_NS;
    struct timespec until = {.tv_sec  = (time_t)(end / 1000000000u),
                             .tv_nsec = (long)(end % 1000000000u)};

    jobs->idle++;
    while (jobs->head == NULL && !jobs->stopping) {
        int error = pthread_cond_timedwait(&jobs->work, &jobs->lock, &until);
        if (error != 0 && jobs->head == NULL) {
            if (jobs->n > KEPT) {
                break;
            }
            until.tv_sec += (time_t)(IDLE_NS / 1000000000u);
        }
    }
    jobs->idle--;
    job_t *job = jobs->head;
    if (job != NULL) {
        jobs->queued--;
        jobs->head = job->next;
        jobs->tail = jobs->head == NULL ? &jobs->head : jobs->tail;
    }
    return job;
}

static void *
jobs_thread(void *arg)
{
    jobs_t *jobs = arg;
    job_t *job;

    pthread_mutex_lock(&jobs->lock);
    while ((job = wait_for_job(jobs)) != NULL) {
        pthread_mutex_unlock(&jobs->lock);
        job->run(job);
        pthread_mutex_lock(&jobs->lock);
    }
    jobs->n--;
    if (jobs->n == 0) {
        pthread_cond_broadcast(&jobs->gone);
    }
    pthread_mutex_unlock(&jobs->lock);
    return NULL;
}

/* Start a thread, with the lock held. @return 0, or an error of pthread_create() */
static int
start_thread(jobs_t *jobs)
{
    pthread_attr_t detached;
    pthread_t thread;

    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &detached, jobs_thread, jobs);
    pthread_attr_destroy(&detached);
    jobs->n += error == 0;
    return error;
}

attn_status_t
jobs_create(uint32_t threads, jobs_t **jobs_p)
{
    jobs_t *jobs = calloc(1, sizeof(*jobs));
    pthread_condattr_t monotonic;
    int error = 0;

    if (jobs == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for handler threads");
    }
    jobs->tail = &jobs->head;
    jobs->most = threads;
    pthread_mutex_init(&jobs->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&jobs->work, &monotonic);
    pthread_cond_init(&jobs->gone, &monotonic);
    pthread_condattr_destroy(&monotonic);

    pthread_mutex_lock(&jobs->lock);
    while (jobs->n < threads && jobs->n < KEPT && error == 0) {
        error = start_thread(jobs);
    }
    uint32_t n = jobs->n;
    pthread_mutex_unlock(&jobs->lock);
    if (error != 0) {
        attn_status_t status = attn_fail(ATTN_ERR_EXHAUSTED, "handler thread %u cannot start: %s",
                                         n + 1, strerror(error));
        jobs_destroy(jobs);
        return status;
    }
    *jobs_p = jobs;
    return ATTN_OK;
}

void
jobs_add(jobs_t *jobs, job_t *job)
{
    if (jobs == NULL) {
        job->run(job);
        return;
    }
    job->next = NULL;
    pthread_mutex_lock(&jobs->lock);
    *jobs->tail = job;
    jobs->tail  = &job->next;
    jobs->queued++;
    if (jobs->queued > jobs->idle && jobs->n < jobs->most) {
        start_thread(jobs); /* if it cannot, the job waits for one of those that are there */
    } else {
        pthread_cond_signal(&jobs->work);
    }
    pthread_mutex_unlock(&jobs->lock);
}

void
jobs_destroy(jobs_t *jobs)
{
    if (jobs == NULL) {
        return;
    }
    pthread_mutex_lock(&jobs->lock);
    jobs->stopping = true;
    pthread_cond_broadcast(&jobs->work);
    while (jobs->n > 0) {
        pthread_cond_wait(&jobs->gone, &jobs->lock);
    }
    pthread_mutex_unlock(&jobs->lock);
    pthread_cond_destroy(&jobs->gone);
    pthread_cond_destroy(&jobs->work);
    pthread_mutex_destroy(&jobs->lock);
    free(jobs);
}
