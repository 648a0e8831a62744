/* rate.h: how fast a counter grew in the last seconds, from samples of it. */
#ifndef ATTN_ENGINE_RATE_H
#define ATTN_ENGINE_RATE_H

#include "base/attn_types.h"

#define ENGINE_RATE_SAMPLES 11u
#define ENGINE_RATE_STEP_NS UINT64_C(1000000000)

/** Samples of a counter, a second apart or more; zeroed at first. */
typedef struct engine_rate {
    uint64_t at_ns[ENGINE_RATE_SAMPLES], count[ENGINE_RATE_SAMPLES];
    uint64_t n; /**< taken; the last lies at (n - 1) % ENGINE_RATE_SAMPLES */
} engine_rate_t;

/** Take a sample, unless the last is younger than ENGINE_RATE_STEP_NS. */
void engine_rate_sample(engine_rate_t *rate, uint64_t now_ns, uint64_t count);

/** By how much the counter, which is at `count` now, grew in a second, since the sample that is
 * about ENGINE_RATE_SAMPLES - 1 steps old, or the first; 0 without one from before. */
double engine_rate_of(const engine_rate_t *rate, uint64_t now_ns, uint64_t count);

#endif
