/* measure.c: pings of two sizes, and a merge of made-up partials. */
#include "client/measure.h"

#include "base/clock.h"

#include <pthread.h>
#include <stdlib.h>

#define PINGS 9u       /* of which the median counts */
#define SIZED_PINGS 5u /* of which the fastest counts: what disturbs only makes it slower */
#define SIZED_BYTES (256u << 10) /* there, and as many back */
#define BUDGET_NS (20 * ATTN_NS_PER_MS)

static int
by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static attn_status_t
ping(link_t *link, uint32_t bytes, uint64_t deadline_ns, double *seconds)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = link->ops->ping(link, bytes, deadline_ns);

    *seconds = (double)(attn_now_ns() - start) * 1e-9;
    return status;
}

attn_status_t
measure_link(link_t *link, uint64_t deadline_ns, cost_link_t *way)
{
    double seconds[PINGS], best = 0;
    attn_status_t status = ping(link, 0, deadline_ns, &seconds[0]); /* connects */

    *way = (cost_link_t){0};
    for (uint32_t i = 0; i < PINGS && status == ATTN_OK; i++) {
        status = ping(link, 0, deadline_ns, &seconds[i]);
    }
    if (status != ATTN_OK) {
        return status;
    }
    qsort(seconds, PINGS, sizeof(*seconds), by_value);
    double hop   = seconds[PINGS / 2];
    uint64_t end = attn_now_ns() + BUDGET_NS;
    for (uint32_t i = 0; i < SIZED_PINGS && (i == 0 || attn_now_ns() < end); i++) {
        double took;
        status = ping(link, SIZED_BYTES, deadline_ns, &took);
        if (status != ATTN_OK) {
            return status;
        }
        best = i == 0 || took < best ? took : best;
    }
    /* An engine in this process answers in no time that a clock would show. */
    double bytes = best - hop > best / 4 ? best - hop : best / 4;
    *way         = (cost_link_t){.hop_seconds = hop,
                                 .bandwidth   = 2.0 * SIZED_BYTES / (bytes > 1e-9 ? bytes : 1e-9)};
    return ATTN_OK;
}

/* ---- merging ---- */

#define ROWS 64u
#define DIM 128u
#define ROUNDS 9u

static pthread_once_t merge_once = PTHREAD_ONCE_INIT;
static double merge_bandwidth;

static void
measure_merge_once(void)
{
    float *a = calloc(2 * ROWS * DIM, sizeof(*a));
    float l[2 * ROWS];
    int32_t e[2 * ROWS];
    uint64_t best = UINT64_MAX;

    for (uint32_t r = 0; r < 2 * ROWS; r++) {
        l[r] = 1;
        e[r] = (int32_t)(r % 8);
    }
    for (uint32_t i = 0; a != NULL && i < ROUNDS; i++) {
        attn_state_t into = {.a = a, .l = l, .e = e};
        attn_state_t from = {.a = a + ROWS * DIM, .l = l + ROWS, .e = e + ROWS};
        uint64_t start    = attn_now_ns();
        attn_state_merge(into, from, ROWS, DIM);
        uint64_t took = attn_now_ns() - start;
        best          = took < best ? took : best;
    }
    free(a);
    cost_constants_t assumed;
    cost_constants_init(&assumed);
    merge_bandwidth = best > 0 && best != UINT64_MAX
                          ? ROWS * (DIM + 2.0) * sizeof(float) * 1e9 / (double)best
                          : assumed.merge_bandwidth;
}

double
measure_merge(void)
{
    pthread_once(&merge_once, measure_merge_once);
    return merge_bandwidth;
}
