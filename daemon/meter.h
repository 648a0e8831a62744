/*
 * meter.h: what a daemon counts of its own work, for whoever watches it (monitor/). One of it a
 * process, for a process is one daemon. Counters only grow, are added to without order among them
 * and without a lock, and are read while they grow: a sum may lack what its counts have already.
 */
#ifndef ATTN_DAEMON_METER_H
#define ATTN_DAEMON_METER_H

#include "base/attn_types.h"
#include "base/clock.h"

#include <stdatomic.h>

#define METER_TIMES 24u
#define METER_TIME_LEAST_NS UINT64_C(2000)
#define METER_STATUSES 64u

/** How long something took: counts[i] of them at most METER_TIME_LEAST_NS << i, and longer than
 * what counts[i - 1] has; the last has no end. */
typedef struct meter_times {
    atomic_uint_fast64_t total_ns, counts[METER_TIMES];
} meter_times_t;

typedef struct meter {
    meter_times_t begin, run, commit;             /* of steps, as far as they succeeded */
    atomic_uint_fast64_t bytes_in;                /* q, k, v of runs */
    atomic_uint_fast64_t bytes_out;               /* their answers */
    atomic_uint_fast64_t streams;                 /* of steps, open now */
    atomic_uint_fast64_t refused[METER_STATUSES]; /* calls and operations answered with -status */
    atomic_uint_fast64_t heartbeats, heartbeats_failed;
} meter_t;

extern meter_t meter;

static inline void
meter_add(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline uint64_t
meter_read(const atomic_uint_fast64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

/** Something that began at start_ns is done. */
void meter_took(meter_times_t *times, uint64_t start_ns);

/** Something was answered with a failure. */
void meter_refused(attn_status_t status);

#endif
