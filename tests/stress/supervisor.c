#include "tests/stress/supervisor.h"

#include "base/checked.h"
#include "base/clock.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define LOOK_MS 20u

void
stress_fail(stress_t *stress, const char *format, ...)
{
    va_list list;
    bool first = false;

    if (atomic_compare_exchange_strong(&stress->failing, &first, true)) {
        va_start(list, format);
        vsnprintf(stress->failure, sizeof(stress->failure), format, list);
        va_end(list);
        atomic_store(&stress->failed, true);
    }
    atomic_store(&stress->stop, true);
}

bool
stress_sabotage(stress_t *stress, uint32_t actor, sabotage_t kind)
{
    bool first = false;

    return stress->options.sabotage == kind && actor == 0 &&
           atomic_load(&stress->steps) >= SABOTAGE_STEPS &&
           atomic_compare_exchange_strong(&stress->sabotaged, &first, true);
}

/* ---- clients ---- */

void
supervisor_start_client(supervisor_t *s, uint32_t process)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        exit(client_main(&s->plans[process]));
    }
    s->pids[process] = pid;
    if (pid < 0) {
        stress_fail(s->stress, "fork: %s\n", strerror(errno));
    }
}

/* A client process that ended: well only when all are to end. */
static void
client_ended(supervisor_t *s, uint32_t process, int status)
{
    s->pids[process] = 0;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        stress_fail(s->stress, "CRASH: %s client process %u ended with %s %d\n",
                    target_names[s->plans[process].kind], process,
                    WIFEXITED(status) ? "code" : "signal",
                    WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
    } else if (!atomic_load(&s->stress->stop)) {
        stress_fail(s->stress, "client process %u ended before it was told to\n", process);
    }
}

static void
look_at_daemon(supervisor_t *s, process_t *process, const char *what)
{
    int status;

    if (process->pid > 0 && waitpid(process->pid, &status, WNOHANG) == process->pid) {
        stress_fail(s->stress, "CRASH: the %s at %s ended with %s %d; its log is %s\n", what,
                    process->address, WIFEXITED(status) ? "code" : "signal",
                    WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status), process->log);
        process->pid = 0;
    }
}

static void
look_at_calls(supervisor_t *s)
{
    uint64_t now = attn_now_ns();

    for (uint32_t i = 0; i < ACTORS_MAX; i++) {
        const actor_figures_t *f = &s->stress->actors[i];
        uint64_t began = atomic_load(&f->call_began_ns), ends = atomic_load(&f->call_ends_ns);
        if (began != 0 && now > ends + s->stress->options.unended_ms * ATTN_NS_PER_MS &&
            began == atomic_load(&f->call_began_ns)) {
            stress_fail(s->stress,
                        "UNENDED: actor %u is in %s since %.1f s, %.1f s behind its "
                        "deadline\n",
                        i, atomic_load(&f->call_name), (double)(now - began) / 1e9,
                        (double)(now - ends) / 1e9);
        }
    }
}

bool
supervisor_watch(supervisor_t *s, uint32_t ms)
{
    uint64_t end = now_ms() + ms;
    int status;

    do {
        for (uint32_t i = 0; i < s->n_processes; i++) {
            if (s->pids[i] > 0 && waitpid(s->pids[i], &status, WNOHANG) == s->pids[i]) {
                client_ended(s, i, status);
            }
        }
        look_at_daemon(s, &s->cluster.coordinator, "coordinator");
        for (uint32_t w = 0; w < s->cluster.options.workers; w++) {
            look_at_daemon(s, &s->cluster.workers[w], "worker");
        }
        look_at_calls(s);
        if (now_ms() < end) {
            sleep_ms((uint32_t)attn_min(LOOK_MS, end - now_ms()));
        }
    } while (now_ms() < end && !atomic_load(&s->stress->failed));
    return !atomic_load(&s->stress->failed);
}

/* ---- the cluster ---- */

static uint64_t
number(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);

    return cJSON_IsNumber(item) ? (uint64_t)item->valuedouble : 0;
}

bool
supervisor_view(const supervisor_t *s, cluster_view_t *view)
{
    static char text[1 << 20];
    char command[512];
    const cJSON *worker;

    *view = (cluster_view_t){0};
    snprintf(command, sizeof(command),
             "%s --target %s --timeout 2000 status --json --interval 0 2>/dev/null",
             s->stress->options.attnctl, s->stress->address);
    FILE *pipe = popen(command, "r");
    size_t n   = pipe != NULL ? fread(text, 1, sizeof(text) - 1, pipe) : 0;
    if (pipe == NULL || pclose(pipe) != 0) {
        return false;
    }
    text[n]         = '\0';
    cJSON *root     = cJSON_Parse(text);
    view->alive     = (uint32_t)number(root, "workers_alive");
    view->clients   = (uint32_t)number(root, "clients");
    view->caches    = (uint32_t)number(root, "caches");
    view->sequences = number(root, "sequences");
    cJSON_ArrayForEach(worker, cJSON_GetObjectItemCaseSensitive(root, "workers"))
    {
        if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(worker, "alive"))) {
            view->used_bytes += number(worker, "used_bytes");
            view->chunks += number(worker, "chunks");
            view->open_steps += number(worker, "open_steps");
        }
    }
    bool parsed = root != NULL;
    cJSON_Delete(root);
    return parsed;
}

/* ---- leaks ---- */

void
stress_check_memory(stress_t *stress, const char *what, uint32_t number,
                    const proc_counts_t *before, const proc_counts_t *now)
{
    atomic_uint_fast64_t *most = &stress->most_growth;
    uint64_t grew              = now->heap_bytes - attn_min(now->heap_bytes, before->heap_bytes);
    uint64_t seen              = atomic_load(most);

    while (grew > seen && !atomic_compare_exchange_weak(most, &seen, grew)) {
    }
    if (STRESS_GROWTH_COUNTS && grew > STRESS_GROWTH_BYTES) {
        stress_fail(stress,
                    "LEAK: the memory of %s %u grew from %.1f to %.1f MiB, slabs aside, by more "
                    "than %.0f MiB\n",
                    what, number, (double)before->heap_bytes / (1 << 20),
                    (double)now->heap_bytes / (1 << 20), (double)STRESS_GROWTH_BYTES / (1 << 20));
    }
}

static void
check_counts(supervisor_t *s, const process_t *process, const char *what, uint32_t number,
             const proc_counts_t *before)
{
    uint64_t end = now_ms() + s->stress->options.settle_ms;
    proc_counts_t now;

    while (proc_count(process->pid, &now) && proc_grew(before, &now)) {
        if (now_ms() >= end) {
            char names[1024];
            proc_thread_names(process->pid, names, sizeof(names));
            stress_fail(s->stress,
                        "LEAK: the %s at %s has %u threads of its own, %u of C core and %u "
                        "descriptors; it had %u, %u and %u; threads: %s\n",
                        what, process->address, now.threads, now.core_threads, now.descriptors,
                        before->threads, before->core_threads, before->descriptors, names);
            return;
        }
        sleep_ms(50);
    }
    stress_check_memory(s->stress, what, number, before, &now);
}

void
supervisor_check_leaks(supervisor_t *s)
{
    uint64_t end = now_ms() + s->stress->options.lease_ms + s->stress->options.settle_ms;
    cluster_view_t v;

    while (!supervisor_view(s, &v) || v.sequences + v.caches + v.used_bytes + v.chunks > 0 ||
           v.open_steps > 0 || v.clients > s->clients_before) {
        if (now_ms() >= end) {
            stress_fail(s->stress,
                        "LEAK: all clients have left, and there are %llu sequences, %u caches, %u "
                        "clients, %llu bytes in use, %llu chunks, %llu open steps\n",
                        (unsigned long long)v.sequences, v.caches, v.clients,
                        (unsigned long long)v.used_bytes, (unsigned long long)v.chunks,
                        (unsigned long long)v.open_steps);
            return;
        }
        sleep_ms(100);
    }
    check_counts(s, &s->cluster.coordinator, "coordinator", 0, &s->coordinator_before);
    for (uint32_t w = 0; w < s->cluster.options.workers; w++) {
        check_counts(s, &s->cluster.workers[w], "worker", w, &s->worker_before);
    }
}

void
supervisor_check_logs(supervisor_t *s)
{
    for (uint32_t i = 0; i <= s->cluster.options.workers; i++) {
        const process_t *p = i == 0 ? &s->cluster.coordinator : &s->cluster.workers[i - 1];
        if (p->pid > 0 && (process_logged(p, "level=error") || process_logged(p, "Sanitizer") ||
                           process_logged(p, "runtime error: "))) {
            stress_fail(s->stress, "AN ERROR WAS LOGGED by the %s at %s: %s\n",
                        i == 0 ? "coordinator" : "worker", p->address, p->log);
        }
    }
}
