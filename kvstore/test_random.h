/* test_random.h: what the model tests share: random numbers from a seed, and a check that
 * tells seed and operation when it fails. ATTN_TEST_SEED=<n> runs that seed alone. */
#ifndef ATTN_KVSTORE_TEST_RANDOM_H
#define ATTN_KVSTORE_TEST_RANDOM_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "base/status.h"

static uint64_t test_seed, test_op, test_random_state;

static inline void
random_start(uint64_t seed)
{
    test_seed         = seed;
    test_op           = 0;
    test_random_state = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

/* 0 .. n-1. splitmix64: small, and good enough to pick operations. */
static inline uint32_t
pick(uint32_t n)
{
    uint64_t z = (test_random_state += UINT64_C(0x9e3779b97f4a7c15));
    z          = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z          = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) >> 32) % n;
}

static inline bool
chance(uint32_t percent)
{
    return pick(100) < percent;
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            print_error("seed %llu, operation %llu: %s does not hold; last error \"%s\"\n",        \
                        (unsigned long long)test_seed, (unsigned long long)test_op, #condition,    \
                        attn_last_error());                                                        \
            fail();                                                                                \
        }                                                                                          \
    } while (0)

/* Run each seed 1 .. n, or the one from the environment. */
static inline void
for_each_seed(uint64_t n, void (*run)(void))
{
    const char *only = getenv("ATTN_TEST_SEED");

    for (uint64_t seed = 1; seed <= n && only == NULL; seed++) {
        random_start(seed);
        run();
    }
    if (only != NULL) {
        random_start(strtoull(only, NULL, 10));
        run();
    }
}

#endif
