/* attnctl_status.c: `attnctl status`. Rates are the difference of two samples over the time
 * between them; workers report by heartbeat, so samples much closer than a heartbeat show
 * nothing or too much. */
#include "client/attnctl_sample.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define BYTES(n) attnctl_bytes(n, (char[16]){0})

static void
print_time(uint64_t ms)
{
    uint64_t s = ms / 1000;

    if (s < 120) {
        printf("%" PRIu64 " s", s);
    } else if (s < 7200) {
        printf("%" PRIu64 " min", s / 60);
    } else {
        printf("%" PRIu64 " h", s / 3600);
    }
}

/* Which way layers were asked. */
static void
print_ucx(const attn_worker_info_t *w)
{
    if (!w->ucx) {
        printf("  none: gRPC");
    } else {
        printf("  %s: %u clients, %.0f %% of layers", w->ucx_ways, w->ucx_clients,
               w->runs > 0 ? fmin(100.0 * (double)w->ucx_runs / (double)w->runs, 100) : 0);
        if (w->gpu_clients > 0 || w->gpu_runs > 0) {
            printf("; GPU to GPU: %u, %.0f %%", w->gpu_clients,
                   w->runs > 0 ? fmin(100.0 * (double)w->gpu_runs / (double)w->runs, 100) : 0);
        }
    }
    if (w->groups > 0) {
        printf("; in %u groups", w->groups);
    }
    printf("\n");
}

/* What the workers run on, and how near attention is to what that reads. */
static void
print_devices(const attn_cluster_info_t *info)
{
    printf("\n%6s  %-32s %10s %10s %14s %12s %9s  %s\n", "worker", "device", "memory", "free",
           "KV read/s, 10s", "limit/s", "of limit", "UCX");
    for (uint32_t i = 0; i < info->n_workers; i++) {
        const attn_worker_info_t *w = &info->workers[i];
        if (!w->alive) {
            continue;
        }
        printf("%6u  %-32s %10s %10s %14s %12s ", w->id, w->device[0] != '\0' ? w->device : "-",
               BYTES(w->device_bytes), BYTES(w->device_free_bytes),
               BYTES((uint64_t)w->kv_bytes_per_s), BYTES((uint64_t)w->read_bandwidth));
        if (w->read_bandwidth > 0) {
            printf("%7.1f %%", 100 * w->kv_bytes_per_s / w->read_bandwidth);
        } else {
            printf("%9s", "-");
        }
        print_ucx(w);
    }
}

static void
print_table(const attnctl_t *ctl, const sample_t *first, const sample_t *last)
{
    const attn_cluster_info_t *info = &last->info;

    printf("cluster %s: epoch %" PRIu64 ", up ", ctl->target, info->epoch);
    print_time(info->uptime_ms);
    printf(", %u of %u workers alive, %u clients, %u caches, %" PRIu64 " sequences\n",
           sample_alive(info), info->n_workers, info->clients, info->caches, info->sequences);
    printf("rates: %s\n\n", first != NULL ? "measured now" : "means since the coordinator's start");
    printf("%6s  %-7s  %-21s  %-18s %10s %10s %10s %8s %6s %9s %12s\n", "worker", "state",
           "address", "kind", "slab", "in caches", "in use", "chunks", "steps", "layers/s",
           "KV read/s");
    for (uint32_t i = 0; i < info->n_workers; i++) {
        const attn_worker_info_t *w = &info->workers[i];
        if (!w->alive) {
            printf("%6u  %-7s  %-21s  %-18s\n", w->id, "LOST", w->address, w->kind);
            continue;
        }
        rates_t rates = sample_rates(w, first, last);
        printf("%6u  %-7s  %-21s  %-18s %10s %10s %10s %8" PRIu64 " %6" PRIu64 " %9.1f %12s\n",
               w->id, w->leaving ? "leaving" : "alive", w->address, w->kind, BYTES(w->slab_bytes),
               BYTES(w->region_bytes), BYTES(w->used_bytes), w->chunks, w->open_steps, rates.runs,
               BYTES((uint64_t)rates.kv_bytes));
    }
    print_devices(info);
    fflush(stdout);
}

static cJSON *
worker_json(const attn_worker_info_t *w, rates_t rates)
{
    cJSON *object = cJSON_CreateObject();

    attnctl_json_u64(object, "id", w->id);
    cJSON_AddBoolToObject(object, "alive", w->alive);
    cJSON_AddStringToObject(object, "address", w->address);
    cJSON_AddStringToObject(object, "kind", w->kind);
    attnctl_json_u64(object, "slab_bytes", w->slab_bytes);
    attnctl_json_u64(object, "region_bytes", w->region_bytes);
    attnctl_json_u64(object, "used_bytes", w->used_bytes);
    attnctl_json_u64(object, "chunks", w->chunks);
    attnctl_json_u64(object, "open_steps", w->open_steps);
    attnctl_json_u64(object, "runs", w->runs);
    attnctl_json_u64(object, "kv_bytes", w->kv_bytes);
    cJSON_AddStringToObject(object, "device", w->device);
    attnctl_json_u64(object, "device_bytes", w->device_bytes);
    attnctl_json_u64(object, "device_free_bytes", w->device_free_bytes);
    cJSON_AddNumberToObject(object, "kv_bytes_per_s_10s", w->alive ? w->kv_bytes_per_s : 0);
    cJSON_AddNumberToObject(object, "read_bandwidth", w->read_bandwidth);
    cJSON_AddBoolToObject(object, "ucx", w->ucx);
    attnctl_json_u64(object, "ucx_clients", w->ucx_clients);
    attnctl_json_u64(object, "ucx_runs", w->ucx_runs);
    attnctl_json_u64(object, "gpu_clients", w->gpu_clients);
    attnctl_json_u64(object, "groups", w->groups);
    cJSON_AddStringToObject(object, "group_host", w->group_host);
    cJSON_AddStringToObject(object, "group_device", w->group_device);
    attnctl_json_u64(object, "gpu_runs", w->gpu_runs);
    cJSON_AddStringToObject(object, "ucx_ways", w->ucx_ways);
    cJSON_AddBoolToObject(object, "leaving", w->leaving);
    cJSON_AddNumberToObject(object, "runs_per_s", w->alive ? rates.runs : 0);
    cJSON_AddNumberToObject(object, "kv_bytes_per_s", w->alive ? rates.kv_bytes : 0);
    return object;
}

static void
print_json(const attnctl_t *ctl, const sample_t *first, const sample_t *last)
{
    const attn_cluster_info_t *info = &last->info;
    cJSON *object                   = cJSON_CreateObject();

    cJSON_AddStringToObject(object, "target", ctl->target);
    attnctl_json_u64(object, "epoch", info->epoch);
    attnctl_json_u64(object, "uptime_ms", info->uptime_ms);
    attnctl_json_u64(object, "clients", info->clients);
    attnctl_json_u64(object, "caches", info->caches);
    attnctl_json_u64(object, "sequences", info->sequences);
    attnctl_json_u64(object, "workers_alive", sample_alive(info));
    /* 0: rates are means since start. */
    attnctl_json_u64(object, "interval_ms",
                     first != NULL ? (last->at_ns - first->at_ns) / 1000000 : 0);
    cJSON *workers = cJSON_AddArrayToObject(object, "workers");
    for (uint32_t i = 0; i < info->n_workers; i++) {
        const attn_worker_info_t *w = &info->workers[i];
        cJSON_AddItemToArray(workers, worker_json(w, sample_rates(w, first, last)));
    }
    attnctl_json_print(object);
}

static void
print_sample(const attnctl_t *ctl, const sample_t *first, const sample_t *last)
{
    if (ctl->json) {
        print_json(ctl, first, last);
        return;
    }
    if (ctl->watch && isatty(STDOUT_FILENO)) {
        fputs("\033[H\033[2J", stdout); /* cursor home, clear */
    }
    print_table(ctl, first, last);
}

int
attnctl_status(const attnctl_t *ctl)
{
    sample_t first = {0}, last = {0};
    uint32_t interval    = ctl->watch && ctl->interval_ms == 0 ? 1000 : ctl->interval_ms;
    uint32_t alive       = 0;
    attn_status_t status = sample_take(ctl, &last);

    if (status == ATTN_OK && interval == 0) {
        print_sample(ctl, NULL, &last);
        alive = sample_alive(&last.info);
    }
    while (status == ATTN_OK && interval > 0) {
        attn_cluster_info_free(&first.info);
        first = last;
        memset(&last, 0, sizeof(last));
        sample_wait(interval);
        if (attnctl_stop) {
            break;
        }
        status = sample_take(ctl, &last);
        if (status != ATTN_OK) {
            break;
        }
        print_sample(ctl, &first, &last);
        alive = sample_alive(&last.info);
        if (!ctl->watch) {
            break;
        }
    }
    attn_cluster_info_free(&first.info);
    attn_cluster_info_free(&last.info);
    if (status != ATTN_OK) {
        return attnctl_failed(ctl, status);
    }
    return alive > 0 || attnctl_stop ? ATTNCTL_OK : ATTNCTL_PROBLEM;
}
