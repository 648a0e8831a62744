/* worker_int.h: what the files of this folder share. */
#ifndef ATTN_DAEMON_WORKER_INT_H
#define ATTN_DAEMON_WORKER_INT_H

#include "balancer/directory.h"
#include "daemon/certs.h"
#include "daemon/monitor/monitor.h"
#include "daemon/process.h"
#include "daemon/lender.h"
#include "daemon/steps.h"
#include "daemon/worker/copier.h"
#include "daemon/worker/gate.h"
#include "engine/engine.h"

#include <stdatomic.h>

typedef struct registrar registrar_t;

typedef struct worker {
    worker_options_t options;
    certs_t certs;
    char join_secret[JOIN_SECRET_MAX]; /* empty: none */
    char name[OPTIONS_TEXT_MAX];       /* in logs and error sentences */
    char address[PROCESS_ADDRESS_MAX]; /* that clients are told */
    char device[96];                   /* as its maker calls it; empty: it has no name */
    dir_place_t place;                 /* for groups; empty: it is in none */
    cost_worker_t speed;               /* the engine's: what is told points there */
    engine_t *engine;
    rpc_server_t *server;
    unary_t *unary, *group_unary;
    steps_t *steps;
    lender_t *lender;
    copier_t *copier;
    jobs_t *jobs; /* for what waits for other workers; NULL: it is done by the server's threads */
    jobs_t
        *group_jobs; /* for what makes and ends groups, which may wait for the device; NULL: none */
    job_t group_sweep;
    atomic_bool sweeping; /* that job is queued, or under way */
    registrar_t *registrar;
    gate_t gate;
    atomic_uint id; /* as the coordinator knows us; 0: not joined yet */
    _Atomic uint64_t incarnation;
    _Atomic uint64_t heard_ns; /* of the coordinator; at first, of our start */
    atomic_bool draining;
    monitor_t *monitor; /* NULL: without */
} worker_t;

/* ---- service.c ---- */

/** Add attn.v1.Worker to the server. */
attn_status_t worker_serve(worker_t *worker);

/** What the worker says of itself; strings are the worker's. */
#define WORKER_WAYS_ROOM 36u /* bytes of WorkerInfo.ucx_ways, which lie where the caller says */
void worker_describe(worker_t *worker, Attn__V1__WorkerInfo *info, char ways[WORKER_WAYS_ROOM]);

/** As unary_method_t.admit: whom the coordinator introduced. */
attn_status_t worker_admit_introduced(void *service, const rpc_call_t *call);

/* ---- groups.c ---- */

/** Add the calls that make groups to the server. */
attn_status_t worker_serve_groups(worker_t *worker);

/** Have groups go that are over, not in this thread. */
void worker_groups_tick(worker_t *worker);

/* ---- figures.c ---- */

/** Open the metrics' port. */
attn_status_t worker_monitor(worker_t *worker);

/* ---- registrar.c ---- */

/** Join the coordinator and send heartbeats, on a thread of its own. */
attn_status_t registrar_start(worker_t *worker, registrar_t **registrar_p);
void registrar_stop(registrar_t *registrar); /* NULL is allowed */

#endif
