/* figures.c: what the coordinator shows on its metrics' port. */
#include "daemon/coordinator/coordinator_int.h"

#include "base/clock.h"
#include "daemon/monitor/figures.h"

#include <stdio.h>
#include <stdlib.h>

static void
gather(coordinator_t *c, figures_t *figures)
{
    uint32_t open;

    *figures = (figures_t){.role = "coordinator", .epoch = cluster_epoch(c->cluster)};
    thin_describe(c->thin, &figures->steps, &open);
    figures->open_steps = open;
    rpc_server_describe(c->server, &figures->rpc);
}

static double
age_s(const cluster_figures_t *cluster, const dir_worker_t *worker)
{
    return worker->seen_ns < cluster->now_ns ? (double)(cluster->now_ns - worker->seen_ns) / 1e9
                                             : 0;
}

/* ---- for Prometheus ---- */

/* A figure of every worker, as its heartbeats tell it. Of lost ones only that they are. */
typedef struct column {
    const char *name, *type, *help;
    size_t at; /* of a uint64_t in dir_worker_t */
} column_t;

#define COLUMN(field) offsetof(dir_worker_t, field)

static const column_t columns[] = {
    {"attnd_worker_slab_bytes", "gauge", "Memory for KV.", COLUMN(slab_bytes)},
    {"attnd_worker_region_bytes", "gauge", "Of the slab, taken by caches.", COLUMN(region_bytes)},
    {"attnd_worker_used_bytes", "gauge", "Of the regions, in pages that hold tokens.",
     COLUMN(used_bytes)},
    {"attnd_worker_chunks", "gauge", "Chunks of KV there.", COLUMN(chunks)},
    {"attnd_worker_open_steps", "gauge", "Steps open there.", COLUMN(open_steps)},
    {"attnd_worker_runs_total", "counter", "Layers answered by it.", COLUMN(runs)},
    {"attnd_worker_kv_read_bytes_total", "counter", "KV that attention read there.",
     COLUMN(kv_bytes)},
    {"attnd_worker_device_bytes", "gauge", "Memory of its device.", COLUMN(device_bytes)},
    {"attnd_worker_device_free_bytes", "gauge", "Of that, free.", COLUMN(device_free)},
};

static uint64_t
figure_of(const dir_worker_t *worker, const column_t *column)
{
    return *(const uint64_t *)(const void *)((const char *)worker + column->at);
}

static void
worker_sample(expose_t *e, const char *name, const dir_worker_t *w, double value)
{
    char id[16];

    snprintf(id, sizeof(id), "%u", w->id);
    expose_sample(e, name, value, "worker", id, "address", w->address, NULL);
}

static void
expose_workers(expose_t *e, const cluster_figures_t *c)
{
    uint32_t alive = 0;

    for (uint32_t i = 0; i < c->n_workers; i++) {
        alive += c->workers[i].alive;
    }
    expose_family(e, "attnd_workers", "gauge", "Workers known, by state.");
    expose_sample(e, "attnd_workers", alive, "state", "alive", NULL);
    expose_sample(e, "attnd_workers", c->n_workers - alive, "state", "lost", NULL);
    expose_family(e, "attnd_worker_alive", "gauge", "1, or 0 when it was lost.");
    for (uint32_t i = 0; i < c->n_workers; i++) {
        worker_sample(e, "attnd_worker_alive", &c->workers[i], c->workers[i].alive);
    }
    expose_family(e, "attnd_worker_heartbeat_age_seconds", "gauge",
                  "Since its last heartbeat, of live ones.");
    for (uint32_t i = 0; i < c->n_workers; i++) {
        if (c->workers[i].alive) {
            worker_sample(e, "attnd_worker_heartbeat_age_seconds", &c->workers[i],
                          age_s(c, &c->workers[i]));
        }
    }
    for (size_t k = 0; k < sizeof(columns) / sizeof(columns[0]); k++) {
        expose_family(e, columns[k].name, columns[k].type, columns[k].help);
        for (uint32_t i = 0; i < c->n_workers; i++) {
            if (c->workers[i].alive) {
                worker_sample(e, columns[k].name, &c->workers[i],
                              (double)figure_of(&c->workers[i], &columns[k]));
            }
        }
    }
}

static void
metrics(void *service, expose_t *e)
{
    coordinator_t *c = service;
    cluster_figures_t cluster;
    figures_t figures;

    gather(c, &figures);
    figures_metrics(&figures, e);
    if (cluster_figures(c->cluster, &cluster) != ATTN_OK) {
        return;
    }
    expose_gauge(e, "attnd_sequences", "Sequences in all caches.", (double)cluster.sequences);
    expose_gauge(e, "attnd_clients", "Clients with a lease.", cluster.clients);
    expose_gauge(e, "attnd_caches", "Caches open.", cluster.caches);
    expose_counter(e, "attnd_leases_expired_total", "Clients that went without a word.",
                   cluster.counts.leases_expired);
    expose_counter(e, "attnd_workers_lost_total", "Workers that were lost.",
                   cluster.counts.workers_lost);
    expose_counter(e, "attnd_chunks_moved_total", "Chunks that were moved to another worker.",
                   cluster.counts.chunks_moved);
    expose_counter(e, "attnd_moves_failed_total", "Moves that came to nothing.",
                   cluster.counts.moves_failed);
    expose_workers(e, &cluster);
    free(cluster.workers);
}

/* ---- for people ---- */

static cJSON *
worker_status(const cluster_figures_t *c, const dir_worker_t *w)
{
    cJSON *object = cJSON_CreateObject();

    cJSON_AddNumberToObject(object, "id", w->id);
    cJSON_AddBoolToObject(object, "alive", w->alive);
    cJSON_AddStringToObject(object, "address", w->address);
    cJSON_AddStringToObject(object, "kind", w->kind);
    cJSON_AddNumberToObject(object, "heartbeat_age_s", age_s(c, w));
    cJSON_AddNumberToObject(object, "read_bandwidth", w->speed.read_bandwidth);
    cJSON_AddNumberToObject(object, "slab_bytes", (double)w->slab_bytes);
    cJSON_AddNumberToObject(object, "region_bytes", (double)w->region_bytes);
    cJSON_AddNumberToObject(object, "used_bytes", (double)w->used_bytes);
    cJSON_AddNumberToObject(object, "chunks", (double)w->chunks);
    cJSON_AddNumberToObject(object, "open_steps", (double)w->open_steps);
    cJSON_AddNumberToObject(object, "runs", (double)w->runs);
    cJSON_AddNumberToObject(object, "kv_bytes", (double)w->kv_bytes);
    cJSON_AddNumberToObject(object, "kv_bytes_per_s", w->kv_rate);
    cJSON_AddStringToObject(object, "device", w->device);
    cJSON_AddNumberToObject(object, "device_bytes", (double)w->device_bytes);
    cJSON_AddNumberToObject(object, "device_free_bytes", (double)w->device_free);
    return object;
}

static cJSON *
status(void *service)
{
    coordinator_t *c = service;
    cluster_figures_t cluster;
    figures_t figures;

    gather(c, &figures);
    if (cluster_figures(c->cluster, &cluster) != ATTN_OK) {
        return NULL;
    }
    cJSON *object  = figures_status(&figures);
    cJSON *workers = cJSON_AddArrayToObject(object, "workers");
    cJSON_AddStringToObject(object, "address", c->address);
    cJSON_AddNumberToObject(object, "sequences", (double)cluster.sequences);
    cJSON_AddNumberToObject(object, "clients", cluster.clients);
    cJSON_AddNumberToObject(object, "caches", cluster.caches);
    cJSON_AddNumberToObject(object, "leases_expired", (double)cluster.counts.leases_expired);
    cJSON_AddNumberToObject(object, "workers_lost", (double)cluster.counts.workers_lost);
    for (uint32_t i = 0; i < cluster.n_workers; i++) {
        cJSON_AddItemToArray(workers, worker_status(&cluster, &cluster.workers[i]));
    }
    free(cluster.workers);
    return object;
}

static const char *
ailment(void *service)
{
    const coordinator_t *c = service;

    return atomic_load(&c->draining) ? "draining\n" : NULL;
}

attn_status_t
coordinator_monitor(coordinator_t *c)
{
    const coordinator_options_t *o = &c->options;

    return monitor_start(
        &(monitor_options_t){.listen           = o->metrics_listen,
                             .tls              = c->certs.tls,
                             .clients_need_not = !o->tls.client_certs},
        &(monitor_source_t){.service = c, .metrics = metrics, .status = status, .ailment = ailment},
        &c->monitor);
}
