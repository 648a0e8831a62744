#include "daemon/monitor/figures.h"

#include "base/status.h"
#include "client/attn.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* ---- the process ---- */

static double start_s;    /* of the epoch */
static uint64_t start_ns; /* as attn_now_ns() */

void
figures_start(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    start_s  = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    start_ns = attn_now_ns();
}

typedef struct process_figures {
    double cpu_s;
    uint64_t resident_bytes;
    uint32_t fds, fds_max;
} process_figures_t;

static void
read_process(process_figures_t *p)
{
    unsigned long pages = 0, resident = 0;
    struct rusage usage;
    struct rlimit limit;

    memset(p, 0, sizeof(*p));
    if (getrusage(RUSAGE_SELF, &usage) == 0) {
        p->cpu_s = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                   (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    }
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        p->fds_max = (uint32_t)limit.rlim_cur;
    }
    FILE *file = fopen("/proc/self/statm", "re");
    if (file != NULL) {
        if (fscanf(file, "%lu %lu", &pages, &resident) == 2) {
            p->resident_bytes = resident * (uint64_t)sysconf(_SC_PAGESIZE);
        }
        fclose(file);
    }
    DIR *folder = opendir("/proc/self/fd");
    while (folder != NULL && readdir(folder) != NULL) {
        p->fds++;
    }
    if (folder != NULL) {
        closedir(folder);
        p->fds -= 3; /* ".", "..", and the folder itself */
    }
}

/* ---- words ---- */

/* "not_found" of ATTN_ERR_NOT_FOUND. */
static const char *
status_word(unsigned status, char word[32])
{
    const char *name = attn_strerror((attn_status_t) - (int)status);
    size_t n         = 0;

    for (name += strlen("ATTN_ERR_"); name[n] != '\0' && n < 31; n++) {
        word[n] = (char)tolower((unsigned char)name[n]);
    }
    word[n] = '\0';
    return word;
}

static void
read_times(const meter_times_t *times, uint64_t *total_ns, uint64_t counts[METER_TIMES])
{
    *total_ns = meter_read(&times->total_ns);
    for (uint32_t i = 0; i < METER_TIMES; i++) {
        counts[i] = meter_read(&times->counts[i]);
    }
}

/* ---- for Prometheus ---- */

static void
expose_meter_times(expose_t *e, const char *name, const char *help, const meter_times_t *times)
{
    uint64_t total_ns, counts[METER_TIMES];

    read_times(times, &total_ns, counts);
    expose_times(e, name, help, total_ns, counts, METER_TIMES, METER_TIME_LEAST_NS);
}

static void
expose_process(expose_t *e)
{
    process_figures_t p;

    read_process(&p);
    expose_family(e, "process_cpu_seconds_total", "counter", "CPU time of this process.");
    expose_sample(e, "process_cpu_seconds_total", p.cpu_s, NULL);
    expose_gauge(e, "process_resident_memory_bytes", "Memory of this process, the slab included.",
                 (double)p.resident_bytes);
    expose_gauge(e, "process_open_fds", "Descriptors open.", p.fds);
    expose_gauge(e, "process_max_fds", "Descriptors allowed.", p.fds_max);
    expose_gauge(e, "process_start_time_seconds", "When this process started, since 1970.",
                 start_s);
}

static void
expose_rpc(expose_t *e, const rpc_server_figures_t *rpc)
{
    expose_counter(e, "attnd_rpc_calls_total", "Calls that came in, streams among them.",
                   rpc->calls);
    expose_gauge(e, "attnd_rpc_calls_open", "Calls open now, streams among them.", rpc->calls_open);
    expose_gauge(e, "attnd_rpc_connections", "Connections with an open call.", rpc->connections);
    expose_family(e, "attnd_rpc_calls_refused_total", "counter",
                  "Calls refused before they were looked at.");
    expose_sample(e, "attnd_rpc_calls_refused_total", (double)rpc->refused_full, "reason", "full",
                  NULL);
    expose_sample(e, "attnd_rpc_calls_refused_total", (double)rpc->refused_peer, "reason",
                  "connection_full", NULL);
    expose_sample(e, "attnd_rpc_calls_refused_total", (double)rpc->refused_unknown, "reason",
                  "unknown_method", NULL);
    expose_gauge(e, "attnd_step_streams", "Streams of steps open now.",
                 (double)meter_read(&meter.streams));
    expose_family(e, "attnd_refused_total", "counter",
                  "Calls and operations of steps that were answered with a failure.");
    for (unsigned i = 1; i < METER_STATUSES; i++) {
        char word[32];
        if (attn_status_is_known(-(int)i)) {
            expose_sample(e, "attnd_refused_total", (double)meter_read(&meter.refused[i]), "status",
                          status_word(i, word), NULL);
        }
    }
}

static void
expose_steps(expose_t *e, const figures_t *f)
{
    expose_gauge(e, "attnd_open_steps", "Steps open now.", (double)f->open_steps);
    expose_counter(e, "attnd_steps_begun_total", "Steps begun.", f->steps.begun);
    expose_counter(e, "attnd_steps_committed_total", "Steps committed.", f->steps.committed);
    expose_family(e, "attnd_steps_aborted_total", "counter", "Steps aborted.");
    for (uint32_t i = 0; i < ENGINE_ABORTS; i++) {
        expose_sample(e, "attnd_steps_aborted_total", (double)f->steps.aborted[i], "reason",
                      engine_abort_names[i], NULL);
    }
    expose_meter_times(e, "attnd_begin_seconds", "Begins that succeeded.", &meter.begin);
    expose_meter_times(e, "attnd_run_seconds",
                       "Layers, from their first byte here to their answer.", &meter.run);
    expose_meter_times(e, "attnd_commit_seconds", "Commits that succeeded.", &meter.commit);
    expose_counter(e, "attnd_tensor_received_bytes_total", "q, k and v of layers.",
                   meter_read(&meter.bytes_in));
    expose_counter(e, "attnd_tensor_sent_bytes_total", "Answers of layers.",
                   meter_read(&meter.bytes_out));
}

void
figures_metrics(const figures_t *f, expose_t *e)
{
    expose_family(e, "attnd_build_info", "gauge", "Always 1.");
    if (f->kind != NULL) {
        expose_sample(e, "attnd_build_info", 1, "version", attn_version(), "role", f->role, "kind",
                      f->kind, NULL);
    } else {
        expose_sample(e, "attnd_build_info", 1, "version", attn_version(), "role", f->role, NULL);
    }
    expose_gauge(e, "attnd_epoch", "The epoch known here: it grows when ownership changes.",
                 (double)f->epoch);
    expose_steps(e, f);
    expose_rpc(e, &f->rpc);
    expose_process(e);
}

/* ---- for people ---- */

void
figures_add_times(cJSON *object, const char *name, uint64_t total_ns, const uint64_t *counts,
                  uint32_t n, uint64_t least_ns)
{
    cJSON *times = cJSON_AddObjectToObject(object, name);
    cJSON *array = cJSON_AddArrayToObject(times, "counts");

    cJSON_AddNumberToObject(times, "total_ns", (double)total_ns);
    cJSON_AddNumberToObject(times, "least_ns", (double)least_ns);
    for (uint32_t i = 0; i < n; i++) {
        cJSON_AddItemToArray(array, cJSON_CreateNumber((double)counts[i]));
    }
}

static void
add_meter_times(cJSON *object, const char *name, const meter_times_t *times)
{
    uint64_t total_ns, counts[METER_TIMES];

    read_times(times, &total_ns, counts);
    figures_add_times(object, name, total_ns, counts, METER_TIMES, METER_TIME_LEAST_NS);
}

static void
add_steps(cJSON *object, const figures_t *f)
{
    cJSON *steps   = cJSON_AddObjectToObject(object, "steps");
    cJSON *aborted = cJSON_AddObjectToObject(steps, "aborted");
    cJSON *refused = cJSON_AddObjectToObject(object, "refused");
    cJSON *times   = cJSON_AddObjectToObject(object, "times");

    cJSON_AddNumberToObject(steps, "open", (double)f->open_steps);
    cJSON_AddNumberToObject(steps, "begun", (double)f->steps.begun);
    cJSON_AddNumberToObject(steps, "committed", (double)f->steps.committed);
    for (uint32_t i = 0; i < ENGINE_ABORTS; i++) {
        cJSON_AddNumberToObject(aborted, engine_abort_names[i], (double)f->steps.aborted[i]);
    }
    for (unsigned i = 1; i < METER_STATUSES; i++) {
        uint64_t n = meter_read(&meter.refused[i]);
        char word[32];
        if (n > 0) {
            cJSON_AddNumberToObject(refused, status_word(i, word), (double)n);
        }
    }
    add_meter_times(times, "begin", &meter.begin);
    add_meter_times(times, "run", &meter.run);
    add_meter_times(times, "commit", &meter.commit);
}

cJSON *
figures_status(const figures_t *f)
{
    cJSON *object = cJSON_CreateObject();
    process_figures_t p;

    read_process(&p);
    cJSON_AddStringToObject(object, "role", f->role);
    cJSON_AddStringToObject(object, "version", attn_version());
    if (f->kind != NULL) {
        cJSON_AddStringToObject(object, "kind", f->kind);
    }
    cJSON_AddNumberToObject(object, "epoch", (double)f->epoch);
    cJSON_AddNumberToObject(object, "now_ns", (double)attn_now_ns());
    cJSON_AddNumberToObject(object, "uptime_ms",
                            (double)((attn_now_ns() - start_ns) / ATTN_NS_PER_MS));
    add_steps(object, f);
    cJSON_AddNumberToObject(object, "bytes_in", (double)meter_read(&meter.bytes_in));
    cJSON_AddNumberToObject(object, "bytes_out", (double)meter_read(&meter.bytes_out));
    cJSON_AddNumberToObject(object, "streams", (double)meter_read(&meter.streams));
    cJSON_AddNumberToObject(object, "calls_open", f->rpc.calls_open);
    cJSON_AddNumberToObject(object, "connections", f->rpc.connections);
    cJSON *process = cJSON_AddObjectToObject(object, "process");
    cJSON_AddNumberToObject(process, "cpu_s", p.cpu_s);
    cJSON_AddNumberToObject(process, "resident_bytes", (double)p.resident_bytes);
    cJSON_AddNumberToObject(process, "fds", p.fds);
    cJSON_AddNumberToObject(process, "fds_max", p.fds_max);
    return object;
}
