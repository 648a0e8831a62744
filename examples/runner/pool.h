/*
 * pool.h: the runner's threads. They take tasks one by one, so that a thread that
 * the system holds back delays little, and they sleep when there are none:
 * while a pass waits for attention, all cores are free for it.
 */
#ifndef RUNNER_POOL_H
#define RUNNER_POOL_H

#include <stdint.h>

#define POOL_THREADS_MAX 64

typedef struct pool pool_t;

/** Does task number `task`; what tasks write must not overlap. */
typedef void (*pool_fn)(const void *arg, uint32_t task);

/** @param threads  Those that work, the caller's included; 0: one per core. NULL on failure. */
pool_t *pool_create(uint32_t threads);

/** NULL is allowed. */
void pool_destroy(pool_t *pool);

/** Call fn(arg, 0) to fn(arg, tasks - 1), on any threads in any order; returns when all returned.
 * One thread at a time calls this. */
void pool_run(pool_t *pool, pool_fn fn, const void *arg, uint32_t tasks);

#endif
