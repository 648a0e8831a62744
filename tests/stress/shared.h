/*
 * shared.h: what the supervisor and the client processes share: memory mapped before the
 * processes are forked. A killed client process leaves its figures behind.
 */
#ifndef ATTN_TESTS_STRESS_SHARED_H
#define ATTN_TESTS_STRESS_SHARED_H

#include "tests/stress/proc.h"
#include "tests/stress/target.h"

#include <stdatomic.h>

#define ACTORS_MAX 512u
#define DISTURBED_MAX 256u
#define STATUSES 64u /* -status is below */
#define FAILURE_MAX 16384u

/** What the first actor does wrong on purpose, once: the test must see it. */
typedef enum sabotage {
    SABOTAGE_NONE,
    SABOTAGE_ANSWER,     /* one element of an answer is another */
    SABOTAGE_LSE,        /* or an LSE, in its last bits but for rounding */
    SABOTAGE_TOKENS,     /* a sequence is cut behind its shadow's back */
    SABOTAGE_UNENDED,    /* a call does not end */
    SABOTAGE_DESCRIPTOR, /* a client leaves a descriptor */
    SABOTAGE_THREAD,     /* or a thread */
    SABOTAGE_MEMORY,     /* or memory */
    SABOTAGES
} sabotage_t;
#define SABOTAGE_STEPS 30u /* of all, before it */

typedef struct stress_options {
    uint64_t seed, steps, seconds; /* ends with whichever comes first */
    uint32_t clients;              /* threads in all */
    uint32_t workers;
    uint32_t late_ms; /* a call ends by its deadline and so much more */
    uint32_t timeout_ms, step_timeout_ms;
    uint32_t lost_ms, lease_ms;
    uint32_t unended_ms; /* behind its deadline a call will not end any more */
    uint32_t settle_ms;  /* for what was closed to be gone, beside leases */
    sabotage_t sabotage;
    bool chaos_kill, chaos_stop, chaos_long_stop, chaos_coordinator, chaos_client;
    bool twins; /* compare bits with a second engine */
    bool check_store;
    bool tls;                      /* mTLS between all of them */
    uint32_t shares[TARGET_KINDS]; /* of the clients, by kind */
    const char *json, *attnd, *attnctl;
} stress_options_t;

/** Figures of one actor; written by it alone. */
typedef struct actor_figures {
    atomic_uint_fast64_t steps; /* verified: all answers right, ended as meant */
    atomic_uint_fast64_t calls, answers, rows, twins, tokens;
    atomic_uint_fast64_t forks, truncates, frees, creates, aborts, partial_commits, recovered, lost;
    atomic_uint_fast64_t paths, exports, refilled, run_lists;
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
    atomic_bool sabotaged;
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

    atomic_uint_fast64_t steps;               /* verified, of all */
    atomic_uint_fast64_t runs_ucx, runs_grpc; /* of direct connections that were closed */
    atomic_uint_fast64_t most_growth;         /* of any process, in bytes, slabs aside */
    actor_figures_t actors[ACTORS_MAX];
} stress_t;

/** A deliberate end: the first failure is kept, with its words; the rest stop. */
void stress_fail(stress_t *stress, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** From when it is warm until all is closed again, no process grows by more. */
#define STRESS_GROWTH_BYTES (UINT64_C(32) << 20)

/** A sanitizer keeps freed memory in quarantine, and tells of leaks itself: growth says nothing. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STRESS_GROWTH_COUNTS false
#else
#define STRESS_GROWTH_COUNTS true
#endif

/** Fails if a process, named by what and number, grew by more than that. */
void stress_check_memory(stress_t *stress, const char *what, uint32_t number,
                         const proc_counts_t *before, const proc_counts_t *now);

/** Is it time for this actor to do this wrong? True once in a run. */
bool stress_sabotage(stress_t *stress, uint32_t actor, sabotage_t kind);

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
