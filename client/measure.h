/* measure.h: constants of the cost model that are measured before anything runs. */
#ifndef ATTN_CLIENT_MEASURE_H
#define ATTN_CLIENT_MEASURE_H

#include "balancer/cost.h"
#include "client/link.h"

/**
 * Ping a worker: small messages for the hop, then larger ones for the bandwidth; some 20 ms of them
 * at most. Over the link's control channel, which is gRPC.
 * @return what ping() returns, when the worker does not answer; then *way is zeros
 */
attn_status_t measure_link(link_t *link, uint64_t deadline_ns, cost_link_t *way);

/** Bytes of partials that a thread merges in a second. Measured once a process, in a millisecond.
 */
double measure_merge(void);

#endif
