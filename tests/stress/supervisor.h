/*
 * supervisor.h: the process that starts and ends all others: daemons and clients. It never
 * speaks gRPC itself, so that it may fork at any time; attnctl tells it how the cluster is.
 */
#ifndef ATTN_TESTS_STRESS_SUPERVISOR_H
#define ATTN_TESTS_STRESS_SUPERVISOR_H

#include "tests/integration/cluster.h"
#include "tests/stress/proc.h"
#include "tests/stress/shared.h"
#include "tests/stress/truth.h"

#define PROCESSES_MAX 64u

typedef struct chaos_counts {
    uint32_t kills, stops, long_stops, coordinators, clients, certs;
} chaos_counts_t;

typedef struct supervisor {
    stress_t *stress;
    test_cluster_t cluster;
    char certs[128]; /* folder of certificates, if there is TLS */
    chance_t chance;
    client_plan_t plans[PROCESSES_MAX];
    pid_t pids[PROCESSES_MAX]; /* 0: ended */
    uint32_t n_processes;
    chaos_counts_t chaos;
    proc_counts_t worker_before, coordinator_before; /* the most of any */
    uint32_t clients_before;                         /* attnctl, and the coordinator's own */
    uint64_t began_ns;
    double seconds; /* from the first client's start to the last one's end */
} supervisor_t;

/** The cluster as attnctl tells it. */
typedef struct cluster_view {
    uint32_t alive, clients, caches;
    uint64_t sequences, used_bytes, chunks, open_steps;
} cluster_view_t;

bool supervisor_view(const supervisor_t *s, cluster_view_t *view);

void supervisor_start_client(supervisor_t *s, uint32_t process);

/** One disturbance of a random kind, from its begin until the cluster is whole again. */
void supervisor_disturb(supervisor_t *s);

/** Look after everybody for a while: ended processes, calls that do not end. @return all is well */
bool supervisor_watch(supervisor_t *s, uint32_t ms);

/** Make, or renew, the certificates. @return whether that went well */
bool supervisor_renew_certs(const supervisor_t *s);

/** All clients have left: nothing of theirs may be left in the daemons. */
void supervisor_check_leaks(supervisor_t *s);

/** No daemon that runs may have logged an error, nor a sanitizer for it. */
void supervisor_check_logs(supervisor_t *s);

/** The figures, as a table and, if asked for, JSON. */
void supervisor_report(const supervisor_t *s);

#endif
