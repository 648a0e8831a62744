/* client.c: a client process: its connections and threads, and what it must leave behind. */
#include "tests/stress/actor.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "tests/stress/proc.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define THREADS_PER_CONNECTION 2u
#define LAG_LOOK_MS 10u
#define LAG_KEPT 200u /* looks */

atomic_uint_fast64_t client_lag_us;

/* Sleeps a little, and sees how much longer it took: the most of the last seconds. */
static void *
lag_thread(void *arg)
{
    static uint64_t lags[LAG_KEPT];
    const stress_t *stress = arg;

    for (uint32_t i = 0; !atomic_load(&stress->stop); i = (i + 1) % LAG_KEPT) {
        uint64_t before = attn_now_ns(), most = 0;
        nanosleep(&(struct timespec){.tv_nsec = LAG_LOOK_MS * 1000000}, NULL);
        uint64_t took = attn_now_ns() - before;
        lags[i]       = took > LAG_LOOK_MS * ATTN_NS_PER_MS
                            ? (took - LAG_LOOK_MS * ATTN_NS_PER_MS) / ATTN_NS_PER_US
                            : 0;
        for (uint32_t j = 0; j < LAG_KEPT; j++) {
            most = attn_max(most, lags[j]);
        }
        atomic_store(&client_lag_us, most);
    }
    return NULL;
}

/* gRPC keeps some threads and descriptors once it was up: open and close once before counting. */
static proc_counts_t
warm_up(const client_plan_t *plan)
{
    target_t target;
    proc_counts_t counts = {0};

    for (uint32_t i = 0; i < 50 && !atomic_load(&plan->stress->stop); i++) {
        if (target_open(&target, plan->kind,
                        plan->kind == TARGET_INPROC ? "inproc://cpu?workers=1&threads=1&slab=64MiB"
                                                    : plan->stress->address,
                        "warm-up", plan->stress->options.timeout_ms, ATTN_TRANSPORT_DEFAULT,
                        "warm-up", truth_geometry(2)) == ATTN_OK) {
            target_close(&target);
            nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
            proc_count(getpid(), &counts);
            return counts;
        }
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    return counts;
}

static void *
sleep_thread(void *arg)
{
    for (;;) {
        pause();
    }
    return arg;
}

/* What --break asks for: something is left on purpose. */
static void
leave_behind(const client_plan_t *plan)
{
    pthread_t thread;

    if (stress_sabotage(plan->stress, plan->first, SABOTAGE_DESCRIPTOR) && dup(0) < 0) {
        abort();
    }
    if (stress_sabotage(plan->stress, plan->first, SABOTAGE_THREAD) &&
        pthread_create(&thread, NULL, sleep_thread, NULL) != 0) {
        abort();
    }
    if (stress_sabotage(plan->stress, plan->first, SABOTAGE_MEMORY)) {
        static uint8_t *volatile left;
        left = malloc(STRESS_GROWTH_BYTES + (8 << 20));
        for (uint64_t i = 0; i < STRESS_GROWTH_BYTES + (8 << 20); i += 4096) {
            left[i] = 1;
        }
    }
}

static void
check_left_behind(const client_plan_t *plan, const proc_counts_t *before)
{
    uint64_t end = attn_now_ns() + plan->stress->options.settle_ms * ATTN_NS_PER_MS;
    proc_counts_t now;

    if (before->threads == 0) {
        return;
    }
    do {
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        proc_count(getpid(), &now);
    } while (proc_grew(before, &now) && attn_now_ns() < end);
    if (proc_grew(before, &now)) {
        char names[1024];
        proc_thread_names(getpid(), names, sizeof(names));
        stress_fail(plan->stress,
                    "LEAK: %s client process %u (life %u) has %u threads and %u descriptors after "
                    "it closed all; it had %u and %u; threads: %s\n",
                    target_names[plan->kind], plan->process, plan->life,
                    now.threads + now.core_threads, now.descriptors,
                    before->threads + before->core_threads, before->descriptors, names);
        return;
    }
    stress_check_memory(plan->stress, target_names[plan->kind], plan->process, before, &now);
}

static void
connection_init(connection_t *c)
{
    pthread_rwlockattr_t attr;

    /* Whoever opens it anew must not wait for ever behind those who use it. */
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&c->lock, &attr);
    pthread_rwlockattr_destroy(&attr);
}

static void
run_threads(const client_plan_t *plan, actor_t *actors, connection_t *connections, uint32_t n_c)
{
    pthread_t *threads = calloc(plan->n + 1, sizeof(*threads));

    for (uint32_t c = 0; c < n_c; c++) {
        connection_init(&connections[c]);
        connections[c].index = c;
    }
    for (uint32_t i = 0; i < plan->n; i++) {
        if (threads == NULL ||
            !actor_init(&actors[i], plan, plan->first + i, &connections[i % n_c]) ||
            pthread_create(&threads[i], NULL, actor_thread, &actors[i]) != 0) {
            abort();
        }
    }
    for (uint32_t i = 0; i < plan->n; i++) {
        pthread_join(threads[i], NULL);
        actor_fini(&actors[i]);
    }
    for (uint32_t c = 0; c < n_c; c++) {
        connection_close(&connections[c], plan->stress);
        shadow_clear(&connections[c].common);
        pthread_rwlock_destroy(&connections[c].lock);
    }
    free(threads);
}

int
client_main(const client_plan_t *plan)
{
    uint32_t n_c              = (plan->n + THREADS_PER_CONNECTION - 1) / THREADS_PER_CONNECTION;
    actor_t *actors           = calloc(plan->n, sizeof(*actors));
    connection_t *connections = calloc(n_c, sizeof(*connections));
    pthread_t lag;

    attn_log_set_level(ATTN_LOG_ERROR); /* lost leases are part of the game */
    truth_init();
    if (actors == NULL || connections == NULL) {
        abort();
    }
    proc_counts_t before = warm_up(plan);
    if (pthread_create(&lag, NULL, lag_thread, plan->stress) != 0) {
        abort();
    }
    run_threads(plan, actors, connections, n_c);
    pthread_join(lag, NULL);
    free(actors);
    free(connections);
    leave_behind(plan);
    if (!atomic_load(&plan->stress->failed)) {
        check_left_behind(plan, &before);
    }
    return atomic_load(&plan->stress->failed) ? 1 : 0;
}
