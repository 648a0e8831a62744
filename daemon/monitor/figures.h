/* figures.h: what both daemons show of themselves (monitor.h), besides what is their own. */
#ifndef ATTN_DAEMON_FIGURES_H
#define ATTN_DAEMON_FIGURES_H

#include "daemon/meter.h"
#include "daemon/monitor/monitor.h"
#include "engine/engine.h"
#include "rpc/rpc.h"

typedef struct figures {
    const char *role, *kind; /**< kind: NULL at the coordinator */
    uint64_t epoch;
    uint64_t open_steps;
    engine_steps_t steps;
    rpc_server_figures_t rpc;
} figures_t;

/** Once, at the start of the process. */
void figures_start(void);

void figures_metrics(const figures_t *figures, expose_t *expose);

/** @return NULL: no memory */
cJSON *figures_status(const figures_t *figures);

/** counts: as in expose_times(), of at most 32. */
void figures_add_times(cJSON *object, const char *name, uint64_t total_ns, const uint64_t *counts,
                       uint32_t n, uint64_t least_ns);

#endif
