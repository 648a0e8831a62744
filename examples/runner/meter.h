/*
 * meter.h: what the runner notes about its attn_step_run() calls: how long each
 * took, and, if asked, a digest of every output bit, so that two runs, on one
 * worker and on eight, say, can be compared without keeping the outputs.
 */
#ifndef RUNNER_METER_H
#define RUNNER_METER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/** Begin with {0}; free() the ns. */
typedef struct meter {
    uint64_t *ns; /**< of each call */
    size_t n, room;
    uint64_t computed_ns; /**< of all calls, in the slowest worker of each */
    uint64_t edges_ns;    /**< of attn_step_begin() and attn_step_commit() */
} meter_t;

bool meter_add(meter_t *meter, uint64_t ns);

/** The p-th percentile in microseconds, nearest rank; 0 without a call. Sorts the calls. */
double meter_percentile(meter_t *meter, double p);

/** Of one call, in microseconds; 0 without a call. */
double meter_mean(const meter_t *meter);

#define DIGEST_START UINT64_C(0xcbf29ce484222325)

/** FNV-1a over 64-bit words; n is even, as rows of o are. */
uint64_t digest_add(uint64_t digest, const float *values, size_t n);

static inline uint64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

#endif
