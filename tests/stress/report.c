/* report.c: what was done, and what came of it. */
#include "tests/stress/supervisor.h"

#include "base/checked.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct totals {
    uint64_t steps, calls, answers, rows, twins, tokens;
    uint64_t forks, truncates, frees, creates, aborts, partial_commits, recovered, lost;
    uint64_t paths, exports, refilled, run_lists;
    uint64_t statuses[STATUSES];
    uint64_t late_us, slow_us;
} totals_t;

static totals_t
sum(const stress_t *stress)
{
    totals_t t = {0};

    for (uint32_t i = 0; i < ACTORS_MAX; i++) {
        const actor_figures_t *f = &stress->actors[i];
        t.steps += f->steps;
        t.calls += f->calls;
        t.answers += f->answers;
        t.rows += f->rows;
        t.twins += f->twins;
        t.tokens += f->tokens;
        t.forks += f->forks;
        t.truncates += f->truncates;
        t.frees += f->frees;
        t.creates += f->creates;
        t.aborts += f->aborts;
        t.partial_commits += f->partial_commits;
        t.recovered += f->recovered;
        t.lost += f->lost;
        t.paths += f->paths;
        t.run_lists += f->run_lists;
        t.exports += f->exports;
        t.refilled += f->refilled;
        t.late_us = attn_max(t.late_us, f->late_us);
        t.slow_us = attn_max(t.slow_us, f->slow_us);
        for (uint32_t k = 0; k < STATUSES; k++) {
            t.statuses[k] += f->statuses[k];
        }
    }
    return t;
}

static uint64_t
worker_rss(const supervisor_t *s)
{
    uint64_t most = 0;
    proc_counts_t now;

    for (uint32_t w = 0; w < s->cluster.options.workers; w++) {
        if (s->cluster.workers[w].pid > 0 && proc_count(s->cluster.workers[w].pid, &now)) {
            most = attn_max(most, now.rss_bytes);
        }
    }
    return most;
}

#define ROW(name, format, ...) printf("  %-28s " format "\n", name, __VA_ARGS__)

static void
print_table(const supervisor_t *s, const totals_t *t, const proc_counts_t *coordinator)
{
    const stress_options_t *o = &s->stress->options;
    bool failed               = atomic_load(&s->stress->failed);

    printf("\nstress: seed %llu, %u clients, %u workers, %.1f s\n", (unsigned long long)o->seed,
           o->clients, o->workers, s->seconds);
    ROW("verified steps", "%llu (%.0f/s)", (unsigned long long)t->steps,
        (double)t->steps / s->seconds);
    ROW("wrong, unended or leaked", "%s", failed ? "SEE BELOW" : "0");
    ROW("calls", "%llu; the slowest took %.1f ms", (unsigned long long)t->calls,
        (double)t->slow_us / 1e3);
    ROW("latest end behind a deadline", "%.1f ms", (double)t->late_us / 1e3);
    ROW("layers of direct clients", "%llu through shared memory, %llu over gRPC, where counted",
        (unsigned long long)atomic_load(&s->stress->runs_ucx),
        (unsigned long long)atomic_load(&s->stress->runs_grpc));
    ROW("answers judged", "%llu, %llu query rows, all heads", (unsigned long long)t->answers,
        (unsigned long long)t->rows);
    ROW("answers asked again elsewhere", "%llu, bit by bit", (unsigned long long)t->twins);
    ROW("tokens committed", "%llu", (unsigned long long)t->tokens);
    ROW("sequences", "%llu created, %llu forked, %llu truncated, %llu freed",
        (unsigned long long)t->creates, (unsigned long long)t->forks,
        (unsigned long long)t->truncates, (unsigned long long)t->frees);
    ROW("steps", "%llu aborted, %llu entries accepted in part", (unsigned long long)t->aborts,
        (unsigned long long)t->partial_commits);
    ROW("chaos", "%u workers killed, %u stopped, %u for long; %u coordinators, %u clients killed",
        s->chaos.kills, s->chaos.stops, s->chaos.long_stops, s->chaos.coordinators,
        s->chaos.clients);
    if (o->tls) {
        ROW("mTLS", "certificates renewed %u times", s->chaos.certs);
    }
    ROW("sequences that lost tokens", "%llu, %llu were refilled, %llu went on with what was before",
        (unsigned long long)t->lost, (unsigned long long)t->refilled,
        (unsigned long long)t->recovered);
    ROW("paths of trees kept", "%llu", (unsigned long long)t->paths);
    ROW("runs with lists of their own", "%llu", (unsigned long long)t->run_lists);
    ROW("exports, row by row", "%llu", (unsigned long long)t->exports);
    ROW("resident memory", "worker %.1f MiB (slab included), coordinator %.1f MiB",
        (double)worker_rss(s) / (1 << 20), (double)coordinator->rss_bytes / (1 << 20));
    ROW("growth, slabs aside", "at most %.1f MiB of any process; %s",
        (double)atomic_load(&s->stress->most_growth) / (1 << 20),
        STRESS_GROWTH_COUNTS ? "32 MiB are allowed" : "not judged under a sanitizer");
    for (uint32_t k = 1; k < STATUSES; k++) {
        if (t->statuses[k] > 0) {
            ROW(attn_strerror((attn_status_t) - (int)k), "%llu calls",
                (unsigned long long)t->statuses[k]);
        }
    }
    if (failed) {
        printf("\n%s\nRepeat with --seed %llu.\n", s->stress->failure, (unsigned long long)o->seed);
    }
    fflush(stdout);
}

static void
write_json(const supervisor_t *s, const totals_t *t, const proc_counts_t *coordinator)
{
    const stress_options_t *o = &s->stress->options;
    cJSON *root               = cJSON_CreateObject();

    cJSON_AddStringToObject(root, "bench", "stress");
    cJSON_AddBoolToObject(root, "passed", !atomic_load(&s->stress->failed));
    cJSON_AddNumberToObject(root, "seed", (double)o->seed);
    cJSON_AddNumberToObject(root, "clients", o->clients);
    cJSON_AddNumberToObject(root, "workers", o->workers);
    cJSON_AddBoolToObject(root, "tls", o->tls);
    cJSON_AddNumberToObject(root, "seconds", s->seconds);
    cJSON_AddNumberToObject(root, "steps", (double)t->steps);
    cJSON_AddNumberToObject(root, "calls", (double)t->calls);
    cJSON_AddNumberToObject(root, "runs_ucx", (double)atomic_load(&s->stress->runs_ucx));
    cJSON_AddNumberToObject(root, "runs_grpc", (double)atomic_load(&s->stress->runs_grpc));
    cJSON_AddNumberToObject(root, "answers", (double)t->answers);
    cJSON_AddNumberToObject(root, "rows", (double)t->rows);
    cJSON_AddNumberToObject(root, "twins", (double)t->twins);
    cJSON_AddNumberToObject(root, "late_ms", (double)t->late_us / 1e3);
    cJSON_AddNumberToObject(root, "workers_killed", s->chaos.kills);
    cJSON_AddNumberToObject(root, "workers_stopped", s->chaos.stops + s->chaos.long_stops);
    cJSON_AddNumberToObject(root, "coordinators_killed", s->chaos.coordinators);
    cJSON_AddNumberToObject(root, "clients_killed", s->chaos.clients);
    cJSON_AddNumberToObject(root, "worker_rss", (double)worker_rss(s));
    cJSON_AddNumberToObject(root, "coordinator_rss", (double)coordinator->rss_bytes);
    cJSON_AddNumberToObject(root, "growth", (double)atomic_load(&s->stress->most_growth));
    cJSON_AddStringToObject(root, "failure", s->stress->failure);
    char *text = cJSON_PrintUnformatted(root);
    FILE *file = fopen(o->json, "a");
    if (file == NULL || text == NULL || fprintf(file, "%s\n", text) < 0 || fclose(file) != 0) {
        fprintf(stderr, "stress: --json %s cannot be written\n", o->json);
    }
    cJSON_free(text);
    cJSON_Delete(root);
}

void
supervisor_report(const supervisor_t *s)
{
    totals_t totals           = sum(s->stress);
    proc_counts_t coordinator = {0};

    if (s->cluster.coordinator.pid > 0) {
        proc_count(s->cluster.coordinator.pid, &coordinator);
    }
    print_table(s, &totals, &coordinator);
    if (s->stress->options.json != NULL) {
        write_json(s, &totals, &coordinator);
    }
}
