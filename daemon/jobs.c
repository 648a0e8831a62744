#include "daemon/jobs.h"

#include "base/status.h"

#include <pthread.h>
#include <stdlib.h>

struct jobs {
    pthread_mutex_t lock;
    pthread_cond_t work; /* a job came, or stopping */
    job_t *head, **tail;
    bool stopping;
    uint32_t n;
    pthread_t ids[];
};

static void *
jobs_thread(void *arg)
{
    jobs_t *jobs = arg;

    pthread_mutex_lock(&jobs->lock);
    for (;;) {
        while (jobs->head == NULL && !jobs->stopping) {
            pthread_cond_wait(&jobs->work, &jobs->lock);
        }
        job_t *job = jobs->head;
        if (job == NULL) {
            break;
        }
        jobs->head = job->next;
        if (jobs->head == NULL) {
            jobs->tail = &jobs->head;
        }
        pthread_mutex_unlock(&jobs->lock);
        job->run(job);
        pthread_mutex_lock(&jobs->lock);
    }
    pthread_mutex_unlock(&jobs->lock);
    return NULL;
}

attn_status_t
jobs_create(uint32_t threads, jobs_t **jobs_p)
{
    jobs_t *jobs = calloc(1, sizeof(*jobs) + threads * sizeof(jobs->ids[0]));

    if (jobs == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u handler threads", threads);
    }
    jobs->tail = &jobs->head;
    pthread_mutex_init(&jobs->lock, NULL);
    pthread_cond_init(&jobs->work, NULL);

    pthread_mutex_lock(&jobs->lock);
    while (jobs->n < threads && pthread_create(&jobs->ids[jobs->n], NULL, jobs_thread, jobs) == 0) {
        jobs->n++;
    }
    pthread_mutex_unlock(&jobs->lock);
    if (jobs->n < threads) {
        attn_status_t status = attn_fail(
            ATTN_ERR_EXHAUSTED, "only %u of %u handler threads could be started", jobs->n, threads);
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
    pthread_cond_signal(&jobs->work);
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
    pthread_mutex_unlock(&jobs->lock);
    for (uint32_t i = 0; i < jobs->n; i++) {
        pthread_join(jobs->ids[i], NULL);
    }
    pthread_cond_destroy(&jobs->work);
    pthread_mutex_destroy(&jobs->lock);
    free(jobs);
}
