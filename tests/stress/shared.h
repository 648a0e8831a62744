/*
 * shared.h: what the supervisor and the client processes share: memory mapped before the
 * processes are forked. A killed client process leaves its figures behind.
 */
#ifndef ATTN_TESTS_STRESS_SHARED_H
#define ATTN_TESTS_STRESS_SHARED_H

#include "tests/stress/target.h"

#include <stdatomic.h>

#define ACTORS_MAX 512u
#define DISTURBED_MAX 256u
#define STATUSES 64u /* -status is below */
#define FAILURE_MAX 16384u

typedef struct stress_options {
    uint64_t seed, steps, seconds; /* ends with whichever comes first */
    uint32_t clients;              /* threads in all */
    uint32_t workers;
    uint32_t late_ms; /* a call ends by its deadline and so much more */
    uint32_t timeout_ms, step_timeout_ms;
    uint32_t lost_ms, lease_ms;
    bool chaos_kill, chaos_stop, chaos_long_stop, chaos_coordinator, chaos_client;
    bool twins; /* compare bits with a second engine */
    bool check_store;
    uint32_t shares[TARGET_KINDS]; /* of the clients, by kind */
    const char *json, *attnd, *attnctl;
} stress_options_t;

/** Figures of one actor; written by it alone. */
typedef struct actor_figures {
    atomic_uint_fast64_t steps; /* verified: all answers right, ended as meant */
    atomic_uint_fast64_t calls, answers, rows, twins, tokens;
    atomic_uint_fast64_t forks, truncates, frees, creates, aborts, partial_commits, recovered, lost;
    atomic_uint_fast64_t statuses[STATUSES];
    atomic_uint_fast64_t late_us; /* the latest end of a call behind its deadline */
    atomic_uint_fast64_t slow_us; /* the longest call */
    /* The call in progress: 0 if there is none. */
    atomic_uint_fast64_t call_began_ns, call_ends_ns;
    _Atomic(const char *) call_name;
} actor_figures_t;

typedef struct stress {
    stress_options_t options;
    char address[64]; /* of the coordinator: it keeps its port */
    atomic_bool stop, failed;
    char failure[FAILURE_MAX]; /* by who set failed first */
    atomic_bool failing;

    /* Disturbances: calls that meet one may fail as promised. A disturbance counts as over when
     * the cluster is whole again. */
    atomic_uint disturbances; /* begun so far */
    atomic_uint disturbing;   /* in progress */
    atomic_uint coordinators; /* started so far */
    atomic_uint_fast64_t calm_since_ns;
    atomic_uint n_gone;
    char gone[DISTURBED_MAX][64]; /* addresses of workers that were lost, or may be */

    atomic_uint_fast64_t steps; /* verified, of all */
    atomic_uint_fast64_t process_problems;
    actor_figures_t actors[ACTORS_MAX];
} stress_t;

/** A deliberate end: the first failure is kept, with its words; the rest stop. */
void stress_fail(stress_t *stress, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- a client process ---- */

typedef struct client_plan {
    stress_t *stress;
    target_kind_t kind;
    uint32_t process;  /* its number */
    uint32_t life;     /* how many processes had this number before */
    uint32_t first, n; /* actors */
    uint32_t geometry;
} client_plan_t;

/** The whole life of a client process; returns its exit code. */
int client_main(const client_plan_t *plan);

#endif
