/* figures.c: what a worker shows on its metrics' port. */
#include "daemon/worker/worker_int.h"

#include "base/clock.h"
#include "daemon/monitor/figures.h"

static void
gather(worker_t *worker, engine_info_t *engine, figures_t *figures)
{
    engine_describe(worker->engine, engine);
    *figures = (figures_t){.role       = "worker",
                           .kind       = engine->kind,
                           .epoch      = engine->epoch,
                           .open_steps = engine->open_steps,
                           .steps      = engine->steps};
    rpc_server_describe(worker->server, &figures->rpc);
}

/* Since the coordinator answered last; since the start, if it never did. */
static double
silence_s(const worker_t *worker)
{
    return (double)(attn_now_ns() - atomic_load(&worker->heard_ns)) / 1e9;
}

/* One figure of each way that there is. */
static void
expose_ways(expose_t *e, const char *name, const char *type, const char *help, double near,
            double far)
{
    expose_family(e, name, type, help);
    expose_sample(e, name, near, "way", "shm", NULL);
    expose_sample(e, name, far, "way", "net", NULL);
}

/* Runs through UCX. */
static void
expose_ucx(worker_t *worker, expose_t *e)
{
    ucx_figures_t n, f;
    lender_gpu_figures_t gpu;

    lender_describe(worker->lender, &n, &f);
#define WAYS(name, type, help, field)                                                              \
    expose_ways(e, name, type, help, (double)n.field, (double)f.field)
    WAYS("attnd_ucx_clients", "gauge", "Clients that send q, k and v through UCX.", sessions);
    WAYS("attnd_ucx_slab_bytes", "gauge", "Memory for their slots.", slab_bytes);
    WAYS("attnd_ucx_slots", "gauge", "Open steps with a place in it.", slots);
    WAYS("attnd_ucx_runs_total", "counter", "Layers asked through UCX.", requests);
    WAYS("attnd_ucx_received_bytes_total", "counter", "q, k and v of them.", bytes_in);
    WAYS("attnd_ucx_sent_bytes_total", "counter", "Their answers.", bytes_out);
    WAYS("attnd_ucx_dropped_total", "counter",
         "Requests with a wrong secret, owner, size or number.", dropped);
    WAYS("attnd_ucx_sleeps_total", "counter", "Times that nothing came for spin-us.", sleeps);
#undef WAYS
    expose_counter(e, "attnd_ucx_rings_total", "Clients woken by a message for their answer.",
                   n.rings);
    lender_describe_gpu(worker->lender, &gpu);
    expose_gauge(e, "attnd_gpu_clients", "Clients that have memory of the GPU for their tensors.",
                 gpu.slabs);
    expose_gauge(e, "attnd_gpu_lent_bytes", "That memory.", (double)gpu.bytes);
    expose_counter(e, "attnd_gpu_runs_total", "Layers asked through UCX whose tensors were in it.",
                   gpu.runs);
}

/* Chunks between workers. */
static void
expose_copies(worker_t *worker, expose_t *e)
{
    copier_figures_t copies;

    copier_describe(worker->copier, &copies);
    expose_counter(e, "attnd_copied_chunks_total", "Chunks that came from other workers.",
                   copies.chunks_in);
    expose_counter(e, "attnd_copied_bytes_total", "k and v of them.", copies.bytes_in);
    expose_counter(e, "attnd_copied_ucx_bytes_total", "Of them, through UCX.", copies.bytes_in_ucx);
    expose_counter(e, "attnd_copies_failed_total", "Chunks that did not come.", copies.failed);
    expose_counter(e, "attnd_copies_corrupt_total",
                   "Chunks of which a part was not what had been sent.", copies.corrupt);
    expose_counter(e, "attnd_copied_away_bytes_total",
                   "k and v sent to workers and clients that read chunks.", copies.bytes_out);
}

static void
metrics(void *service, expose_t *e)
{
    worker_t *worker = service;
    engine_info_t engine;
    figures_t figures;

    gather(worker, &engine, &figures);
    figures_metrics(&figures, e);
    expose_gauge(e, "attnd_joined", "1 once a coordinator took this worker in.",
                 atomic_load(&worker->id) != 0);
    expose_gauge(e, "attnd_draining", "1 when it ends and takes no new steps.",
                 atomic_load(&worker->draining));
    expose_gauge(e, "attnd_coordinator_silence_seconds",
                 "Since the coordinator answered last; since the start if it never did.",
                 silence_s(worker));
    expose_counter(e, "attnd_heartbeats_total", "Joins and heartbeats that were answered.",
                   meter_read(&meter.heartbeats));
    expose_counter(e, "attnd_heartbeats_failed_total", "Joins and heartbeats that were not.",
                   meter_read(&meter.heartbeats_failed));
    expose_gauge(e, "attnd_slab_bytes", "Memory for KV.", (double)engine.slab_bytes);
    expose_gauge(e, "attnd_region_bytes", "Of the slab, taken by caches.",
                 (double)engine.region_bytes);
    expose_gauge(e, "attnd_used_bytes", "Of the regions, in pages that hold tokens.",
                 (double)engine.used_bytes);
    expose_gauge(e, "attnd_caches", "Caches open here.", (double)engine.caches);
    expose_gauge(e, "attnd_chunks", "Chunks of KV here.", (double)engine.chunks);
    expose_counter(e, "attnd_runs_total", "Layers answered.", engine.runs);
    expose_counter(e, "attnd_kv_read_bytes_total", "KV that attention read.", engine.kv_bytes);
    expose_gauge(e, "attnd_read_bandwidth_bytes_per_second",
                 "What this device reads, measured at the start.", engine.speed.read_bandwidth);
    expose_gauge(e, "attnd_kv_read_bytes_per_second",
                 "KV that attention read, a second, in the last ten.", engine.kv_rate);
    expose_gauge(e, "attnd_device_bytes", "Memory of the device.",
                 (double)engine.device.total_bytes);
    expose_gauge(e, "attnd_device_free_bytes", "Of that, free.", (double)engine.device.free_bytes);
    expose_ucx(worker, e);
    expose_copies(worker, e);
    expose_times(e, "attnd_compute_seconds", "Layers: storing k, v, and attention.",
                 engine.times.total_ns, engine.times.counts, ENGINE_TIMES, ENGINE_TIME_LEAST_NS);
}

static cJSON *
status(void *service)
{
    worker_t *worker = service;
    engine_info_t engine;
    figures_t figures;
    ucx_figures_t near, far;
    lender_gpu_figures_t gpu;

    gather(worker, &engine, &figures);
    cJSON *object = figures_status(&figures);
    if (object == NULL) {
        return NULL;
    }
    cJSON_AddStringToObject(object, "name", worker->name);
    cJSON_AddStringToObject(object, "address", worker->address);
    cJSON_AddStringToObject(object, "coordinator", worker->options.coordinator);
    cJSON_AddNumberToObject(object, "worker", atomic_load(&worker->id));
    cJSON_AddBoolToObject(object, "draining", atomic_load(&worker->draining));
    cJSON_AddNumberToObject(object, "silence_s", silence_s(worker));
    cJSON_AddNumberToObject(object, "slab_bytes", (double)engine.slab_bytes);
    cJSON_AddNumberToObject(object, "region_bytes", (double)engine.region_bytes);
    cJSON_AddNumberToObject(object, "used_bytes", (double)engine.used_bytes);
    cJSON_AddNumberToObject(object, "caches", (double)engine.caches);
    cJSON_AddNumberToObject(object, "chunks", (double)engine.chunks);
    cJSON_AddNumberToObject(object, "runs", (double)engine.runs);
    cJSON_AddNumberToObject(object, "kv_bytes", (double)engine.kv_bytes);
    cJSON_AddNumberToObject(object, "read_bandwidth", engine.speed.read_bandwidth);
    lender_describe(worker->lender, &near, &far);
    cJSON_AddNumberToObject(object, "ucx_clients", near.sessions + far.sessions);
    cJSON_AddNumberToObject(object, "ucx_runs", (double)(near.requests + far.requests));
    lender_describe_gpu(worker->lender, &gpu);
    cJSON_AddNumberToObject(object, "gpu_clients", gpu.slabs);
    cJSON_AddNumberToObject(object, "gpu_runs", (double)gpu.runs);
    cJSON_AddNumberToObject(object, "kv_bytes_per_s", engine.kv_rate);
    cJSON_AddStringToObject(object, "device", worker->device);
    cJSON_AddNumberToObject(object, "device_bytes", (double)engine.device.total_bytes);
    cJSON_AddNumberToObject(object, "device_free_bytes", (double)engine.device.free_bytes);
    figures_add_times(cJSON_GetObjectItem(object, "times"), "compute", engine.times.total_ns,
                      engine.times.counts, ENGINE_TIMES, ENGINE_TIME_LEAST_NS);
    return object;
}

static const char *
ailment(void *service)
{
    const worker_t *worker = service;

    if (atomic_load(&worker->draining)) {
        return "draining\n";
    }
    return atomic_load(&worker->id) == 0 ? "no coordinator has taken this worker in yet\n" : NULL;
}

attn_status_t
worker_monitor(worker_t *worker)
{
    const worker_options_t *o = &worker->options;

    return monitor_start(
        &(monitor_options_t){.listen           = o->metrics_listen,
                             .tls              = worker->certs.tls,
                             .clients_need_not = !o->tls.client_certs},
        &(monitor_source_t){
            .service = worker, .metrics = metrics, .status = status, .ailment = ailment},
        &worker->monitor);
}
