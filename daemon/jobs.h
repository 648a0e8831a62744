/*
 * jobs.h: threads for handlers that may block, apart from the server's own. A coordinator that
 * waits for a stopped worker in every thread of its server would hear no heartbeat and lose
 * the whole cluster; so what may block is done here, and heartbeats never queue behind it.
 *
 * Nor may those that wait for a stopped worker hold up those that do not: a job that finds no
 * thread idle gets a new one, up to a number far above what is usual. A thread that waits costs a
 * few pages, and ends when there was nothing to do for 10 s.
 *
 * A job is a member of what it works on, so queueing needs no memory and cannot fail. The
 * queue is bounded by the calls that the server admits.
 */
#ifndef ATTN_DAEMON_JOBS_H
#define ATTN_DAEMON_JOBS_H

#include "base/attn_types.h"

typedef struct jobs jobs_t;

typedef struct job job_t;
struct job {
    void (*run)(job_t *job); /**< may free what the job is a member of */
    job_t *next;
};

#define JOB_OF(type, member, pointer) ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

/** @param threads  at most so many at once; a few are started here */
attn_status_t jobs_create(uint32_t threads, jobs_t **jobs_p);

/** Have job->run called by a thread. jobs NULL: called right here. */
void jobs_add(jobs_t *jobs, job_t *job);

/** Do the jobs that are queued, end the threads, and free. NULL is allowed. */
void jobs_destroy(jobs_t *jobs);

#endif
