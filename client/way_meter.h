/*
 * way_meter.h: what runs take on their way to a worker and back, beside what it computes: the cost
 * model's constants of a link, found out by runs themselves over the transport that they take. Any
 * number of threads add; nothing waits.
 */
#ifndef ATTN_CLIENT_WAY_METER_H
#define ATTN_CLIENT_WAY_METER_H

#include "balancer/cost.h"

#include <stdatomic.h>

#define WAY_METER_SAMPLES 64u
#define WAY_METER_LEAST 9u /* less samples say nothing */

/** Zeroed at first. */
typedef struct way_meter {
    atomic_uint n_small, n_large, n_sends;
    _Atomic uint64_t fed_ns; /* the last run's time */
    _Atomic uint64_t
        small[WAY_METER_SAMPLES]; /* bytes << 32 | ns; a meter that wraps forgets ... */
    _Atomic uint64_t large[WAY_METER_SAMPLES]; /* ... what is oldest */
    atomic_uint sends[WAY_METER_SAMPLES];      /* ns */
} way_meter_t;

/** A run of so many bytes, there and back, was answered at now_ns, after `ns`, what the worker
 * computed not counted. */
void way_meter_run(way_meter_t *meter, uint64_t bytes, uint64_t ns, uint64_t now_ns);

/** Sending it took its thread so long: of large ones that is copying, and does not count. */
void way_meter_sent(way_meter_t *meter, uint64_t bytes, uint64_t ns);

/** No run for so long: what a link was like says nothing of the others any more. */
#define WAY_METER_STALE_NS (60 * UINT64_C(1000000000))

/** Its last run is younger than that. */
bool way_meter_is_fresh(const way_meter_t *meter, uint64_t now_ns);

/** @return false, and zeros, before WAY_METER_LEAST small runs; bandwidth is 0 before as many large
 * ones */
bool way_meter_read(const way_meter_t *meter, cost_link_t *link);

#endif
