/* chaos.c: what happens to the processes. A disturbance is announced before it begins, and over
 * when the cluster is whole again; from then on no call may fail for it. */
#include "tests/stress/supervisor.h"

#include "base/checked.h"
#include "base/clock.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHORT_STOP_MS 300u
#define SETTLE_MS 300u
#define WHOLE_MS 20000u

static void
begin(supervisor_t *s)
{
    atomic_fetch_add(&s->stress->disturbing, 1);
    atomic_fetch_add(&s->stress->disturbances, 1);
}

static void
over(supervisor_t *s)
{
    atomic_store(&s->stress->calm_since_ns, attn_now_ns());
    atomic_fetch_sub(&s->stress->disturbing, 1);
}

/* This worker's tokens may be lost from now on. */
static void
gone(supervisor_t *s, const process_t *worker)
{
    uint32_t n = atomic_load(&s->stress->n_gone);

    if (n < DISTURBED_MAX) {
        snprintf(s->stress->gone[n], sizeof(s->stress->gone[n]), "%s", worker->address);
        atomic_store(&s->stress->n_gone, n + 1);
    }
}

static void
wait_until_whole(supervisor_t *s)
{
    uint64_t end = now_ms() + WHOLE_MS;
    cluster_view_t view;

    while (!supervisor_view(s, &view) || view.alive < s->stress->options.workers) {
        if (now_ms() >= end) {
            stress_fail(s->stress, "NOT WHOLE AGAIN: %u of %u workers live, 20 s after a %s\n",
                        view.alive, s->stress->options.workers, "disturbance");
            return;
        }
        supervisor_watch(s, 50);
    }
}

static process_t *
some_worker(supervisor_t *s, uint32_t *i)
{
    *i = (uint32_t)chance_below(&s->chance, s->stress->options.workers);
    return &s->cluster.workers[*i];
}

static void
kill_worker(supervisor_t *s)
{
    uint32_t i;
    process_t *worker = some_worker(s, &i);

    begin(s);
    supervisor_check_logs(s);
    gone(s, worker);
    process_kill(worker);
    supervisor_watch(s, (uint32_t)chance_below(&s->chance, 2 * s->stress->options.lost_ms));
    cluster_start_worker(&s->cluster, i);
    wait_until_whole(s);
    supervisor_watch(s, s->stress->options.lost_ms + SETTLE_MS);
    over(s);
    s->chaos.kills++;
}

/* Nobody may notice more than a pause. */
static void
stop_worker(supervisor_t *s)
{
    uint32_t i;
    process_t *worker = some_worker(s, &i);

    process_signal(worker, SIGSTOP);
    supervisor_watch(s, (uint32_t)chance_in(&s->chance, 10, SHORT_STOP_MS));
    process_signal(worker, SIGCONT);
    s->chaos.stops++;
}

/* It counts as lost, and joins again as another. */
static void
stop_worker_long(supervisor_t *s)
{
    uint32_t i;
    process_t *worker = some_worker(s, &i);

    begin(s);
    gone(s, worker);
    process_signal(worker, SIGSTOP);
    supervisor_watch(s, s->stress->options.lost_ms +
                            (uint32_t)chance_below(&s->chance, 2 * s->stress->options.lost_ms));
    process_signal(worker, SIGCONT);
    supervisor_watch(s, SETTLE_MS);
    wait_until_whole(s);
    supervisor_watch(s, SETTLE_MS);
    over(s);
    s->chaos.long_stops++;
}

/* Everything is forgotten, and clients begin anew. */
static void
kill_coordinator(supervisor_t *s)
{
    begin(s);
    supervisor_check_logs(s);
    process_kill(&s->cluster.coordinator);
    supervisor_watch(s, (uint32_t)chance_below(&s->chance, 500));
    atomic_fetch_add(&s->stress->coordinators, 1);
    cluster_start_coordinator(&s->cluster, s->stress->address);
    supervisor_watch(s, SETTLE_MS);
    wait_until_whole(s);
    supervisor_watch(s, SETTLE_MS);
    over(s);
    s->chaos.coordinators++;
}

/* Its sequences live until its lease runs out; nobody else is touched. */
static void
kill_client(supervisor_t *s)
{
    uint32_t i = (uint32_t)chance_below(&s->chance, s->n_processes);

    if (s->pids[i] > 0) {
        process_t process = {.pid = s->pids[i]};
        s->pids[i]        = 0;
        process_kill(&process);
        for (uint32_t a = 0; a < s->plans[i].n; a++) { /* no call is in progress any more */
            atomic_store(&s->stress->actors[s->plans[i].first + a].call_began_ns, 0);
        }
        s->plans[i].life++;
        supervisor_start_client(s, i);
        s->chaos.clients++;
    }
}

bool
supervisor_renew_certs(const supervisor_t *s)
{
    char command[512];

    snprintf(command, sizeof(command), "%s '%s'", MAKE_TEST_CERTS, s->certs);
    return system(command) == 0;
}

/* Who is connected stays so, and nobody notices. */
static void
renew_certs(supervisor_t *s)
{
    if (!supervisor_renew_certs(s)) {
        stress_fail(s->stress, "the certificates in %s cannot be renewed\n", s->certs);
    }
    s->chaos.certs++;
}

void
supervisor_disturb(supervisor_t *s)
{
    const stress_options_t *o = &s->stress->options;
    void (*kinds[16])(supervisor_t *);
    uint32_t n = 0;

    for (uint32_t i = 0; i < 3; i++) { /* the coordinator only now and then */
        if (o->chaos_kill) {
            kinds[n++] = kill_worker;
        }
        if (o->chaos_stop) {
            kinds[n++] = stop_worker;
        }
        if (o->chaos_client) {
            kinds[n++] = kill_client;
        }
    }
    if (o->chaos_long_stop) {
        kinds[n++] = stop_worker_long;
    }
    if (o->chaos_coordinator) {
        kinds[n++] = kill_coordinator;
    }
    if (o->tls) {
        kinds[n++] = renew_certs;
    }
    if (n > 0) {
        kinds[chance_below(&s->chance, n)](s);
    }
}
