/*
 * pool.h: threads that run the tasks of a job beside the thread that brings it. Several
 * jobs may run at once, brought by different threads.
 */
#ifndef ATTN_KERNELS_CPU_POOL_H
#define ATTN_KERNELS_CPU_POOL_H

#include "base/attn_types.h"

typedef struct cpu_pool cpu_pool_t;

/** @param threads  to run a job with, the one that brings it included: 1 makes none */
attn_status_t cpu_pool_create(uint32_t threads, cpu_pool_t **pool_p);

/** No job may be running. NULL is allowed. */
void cpu_pool_destroy(cpu_pool_t *pool);

uint32_t cpu_pool_threads(const cpu_pool_t *pool);

/** One task. `participant` is below the pool's threads and unique among those of the job. */
typedef void (*cpu_task_fn)(void *arg, uint32_t task, uint32_t participant);

/** Run tasks 0 to n_tasks - 1, started in this order; returns when all are done. */
void cpu_pool_run(cpu_pool_t *pool, uint32_t n_tasks, cpu_task_fn run, void *arg);

/** The same with this thread alone: for jobs that are over before another thread wakes. */
void cpu_pool_run_inline(uint32_t n_tasks, cpu_task_fn run, void *arg);

#endif
