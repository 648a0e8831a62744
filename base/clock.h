/* clock.h: the monotonic clock. All deadlines are nanoseconds of it, never wall time. */
#ifndef ATTN_BASE_CLOCK_H
#define ATTN_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define ATTN_NS_PER_MS UINT64_C(1000000)
#define ATTN_NS_PER_US UINT64_C(1000)

static inline uint64_t
attn_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

#endif
