/*
 * rate.c: the window of engine_rate_of() reaches from the oldest sample kept to now. With
 * sampling once a second it is ten to eleven seconds long; where nobody sampled for longer, it
 * is from then.
 */
#include "engine/rate.h"

void
engine_rate_sample(engine_rate_t *rate, uint64_t now_ns, uint64_t count)
{
    uint64_t last = (rate->n + ENGINE_RATE_SAMPLES - 1) % ENGINE_RATE_SAMPLES;

    if (rate->n > 0 && now_ns < rate->at_ns[last] + ENGINE_RATE_STEP_NS) {
        return;
    }
    rate->at_ns[rate->n % ENGINE_RATE_SAMPLES] = now_ns;
    rate->count[rate->n % ENGINE_RATE_SAMPLES] = count;
    rate->n++;
}

double
engine_rate_of(const engine_rate_t *rate, uint64_t now_ns, uint64_t count)
{
    uint64_t oldest = rate->n < ENGINE_RATE_SAMPLES ? 0 : rate->n % ENGINE_RATE_SAMPLES;

    if (rate->n == 0 || now_ns <= rate->at_ns[oldest] || count < rate->count[oldest]) {
        return 0;
    }
    return (double)(count - rate->count[oldest]) * 1e9 / (double)(now_ns - rate->at_ns[oldest]);
}
