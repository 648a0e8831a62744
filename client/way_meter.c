/*
 * way_meter.c: medians of the last samples. A small run's time is all hop but for its bytes, as far
 * as large ones have told what bytes take; a large one's is all bytes but for the hop.
 */
#include "client/way_meter.h"

#include "base/checked.h"

#include <stdlib.h>

#define SMALL_BYTES (UINT64_C(64) << 10)
#define LARGE_BYTES (UINT64_C(512) << 10)

void
way_meter_run(way_meter_t *meter, uint64_t bytes, uint64_t ns, uint64_t now_ns)
{
    uint64_t sample = attn_min(bytes, UINT32_MAX) << 32 | attn_min(ns, UINT32_MAX);

    atomic_store_explicit(&meter->fed_ns, now_ns, memory_order_relaxed);
    if (bytes <= SMALL_BYTES) {
        uint32_t i = atomic_fetch_add_explicit(&meter->n_small, 1, memory_order_relaxed);
        atomic_store_explicit(&meter->small[i % WAY_METER_SAMPLES], sample, memory_order_relaxed);
    } else if (bytes >= LARGE_BYTES) {
        uint32_t i = atomic_fetch_add_explicit(&meter->n_large, 1, memory_order_relaxed);
        atomic_store_explicit(&meter->large[i % WAY_METER_SAMPLES], sample, memory_order_relaxed);
    }
}

void
way_meter_sent(way_meter_t *meter, uint64_t bytes, uint64_t ns)
{
    if (bytes > SMALL_BYTES) {
        return;
    }
    uint32_t i = atomic_fetch_add_explicit(&meter->n_sends, 1, memory_order_relaxed);

    atomic_store_explicit(&meter->sends[i % WAY_METER_SAMPLES], (unsigned)attn_min(ns, UINT32_MAX),
                          memory_order_relaxed);
}

static int
by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double
median(double *values, uint32_t n)
{
    qsort(values, n, sizeof(*values), by_value);
    return values[n / 2];
}

static double
bytes_of(uint64_t sample)
{
    return (double)(sample >> 32);
}

static double
seconds_of(uint64_t sample)
{
    return (double)(sample & UINT32_MAX) * 1e-9;
}

/* Of samples that took less than what is known besides, a fourth is taken to be left. */
static double
what_is_left(double seconds, double known)
{
    return seconds - known > seconds / 4 ? seconds - known : seconds / 4;
}

bool
way_meter_is_fresh(const way_meter_t *meter, uint64_t now_ns)
{
    return atomic_load(&meter->fed_ns) + WAY_METER_STALE_NS > now_ns;
}

bool
way_meter_read(const way_meter_t *meter, cost_link_t *link)
{
    uint32_t n_small = (uint32_t)attn_min(atomic_load(&meter->n_small), WAY_METER_SAMPLES);
    uint32_t n_large = (uint32_t)attn_min(atomic_load(&meter->n_large), WAY_METER_SAMPLES);
    uint32_t n_sends = (uint32_t)attn_min(atomic_load(&meter->n_sends), WAY_METER_SAMPLES);
    double values[WAY_METER_SAMPLES];

    *link = (cost_link_t){0};
    if (n_small < WAY_METER_LEAST) {
        return false;
    }
    /* Once with the bytes taken for nothing, for the bandwidth, and once without them. */
    for (int turn = 0; turn < 2; turn++) {
        for (uint32_t i = 0; i < n_small; i++) {
            uint64_t sample = atomic_load(&meter->small[i]);
            double bytes    = link->bandwidth > 0 ? bytes_of(sample) / link->bandwidth : 0;
            values[i]       = what_is_left(seconds_of(sample), bytes);
        }
        link->hop_seconds = median(values, n_small);
        for (uint32_t i = 0; i < n_large; i++) {
            uint64_t sample = atomic_load(&meter->large[i]);
            double rest     = what_is_left(seconds_of(sample), link->hop_seconds);
            values[i]       = rest > 0 ? bytes_of(sample) / rest : 0;
        }
        link->bandwidth = n_large >= WAY_METER_LEAST ? median(values, n_large) : 0;
    }
    for (uint32_t i = 0; i < n_sends; i++) {
        values[i] = (double)atomic_load(&meter->sends[i]) * 1e-9;
    }
    link->send_seconds = n_sends > 0 ? median(values, n_sends) : 0;
    return link->hop_seconds > 0;
}
