/* speed.h: what a device does, measured with its own kernels: constants of the cost model. */
#ifndef ATTN_ENGINE_SPEED_H
#define ATTN_ENGINE_SPEED_H

#include "balancer/cost.h"
#include "kernels/kernels.h"

/**
 * Measure. Takes some 10 ms on a CPU, and some MiB of the device meanwhile. Rates of dtypes that
 * the device does not serve, or that there was no memory to measure, are 0: not known.
 */
void engine_speed_measure(attn_backend_t *backend, cost_worker_t *speed);

#endif
