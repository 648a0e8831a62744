#include "daemon/worker/worker.h"

#include "daemon/worker/worker_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/monitor/figures.h"
#include "kernels/memory.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXIT_DEVICE_FAILED 3
#define TICK_MS 100u
#define TRIM_TICKS 20u
#define DRAIN_LOOK_MS 10u                   /* how often a draining worker looks for open steps */
#define GRACE_MS 500u                       /* for replies that are on their way at the end */
#define SPARE_MS 500u                       /* to put things away after that */
#define GPU_WAIT_NS (5000 * ATTN_NS_PER_MS) /* for what a GPU has still to do, at the end */

/* The address that clients are told: --advertise, or the one that we listen on; with our port in
 * place of 0. */
static attn_status_t
settle_address(worker_t *worker)
{
    const worker_options_t *o = &worker->options;
    const char *said          = o->advertise[0] != '\0' ? o->advertise : o->listen;
    const char *colon         = strrchr(said, ':');
    unsigned long port        = colon != NULL ? strtoul(colon + 1, NULL, 10) : 0;

    attn_status_t status = process_address(
        said, port != 0 ? (uint16_t)port : rpc_server_port(worker->server), worker->address);
    if (status == ATTN_OK && process_address_is_wildcard(worker->address)) {
        status = attn_fail(
            ATTN_ERR_INVALID,
            "%s is no address that clients could connect to: say --advertise HOST:PORT", said);
    }
    snprintf(worker->name, sizeof(worker->name), "%s",
             o->name[0] != '\0' ? o->name : worker->address);
    return status;
}

static attn_status_t
start(worker_t *worker)
{
    const worker_options_t *o = &worker->options;
    bool computes             = strncmp(o->device, "cpu", 3) == 0; /* in handlers: others wait */
    char who[64];

    attn_status_t status = certs_open(&worker->certs, &o->tls);
    if (status == ATTN_OK) {
        status = join_secret_read(o->join_secret_file, worker->join_secret);
    }
    if (status == ATTN_OK) {
        status = rpc_server_create(
            &(rpc_server_options_t){.address      = o->listen,
                                    .side_by_side = computes ? (uint32_t)o->threads : 0,
                                    .spin_us      = (uint32_t)o->spin_us,
                                    .tls          = worker->certs.tls,
                                    .stall_ms     = (uint32_t)o->stall_ms,
                                    .memory_max   = o->message_memory},
            &worker->server);
    }
    if (status == ATTN_OK) {
        status = settle_address(worker);
    }
    if (status != ATTN_OK) {
        return status;
    }
    snprintf(who, sizeof(who), "name=%.50s", worker->name);
    attn_log_set_who(who);

    status = engine_create(&(engine_options_t){.device        = o->device,
                                               .threads       = (uint32_t)o->threads,
                                               .slab_bytes    = o->slab,
                                               .reserve_bytes = o->reserve,
                                               .name          = worker->name},
                           &worker->engine);
    if (status == ATTN_OK) {
        engine_info_t info;
        engine_describe(worker->engine, &info);
        worker->speed = info.speed;
        snprintf(worker->device, sizeof(worker->device), "%s", info.device.name);
        if (o->groups && engine_group_device(worker->engine, worker->place.device)) {
            ucx_host(worker->place.host);
        }
        status = jobs_create(COPIER_COPIES_MAX + 2, &worker->jobs); /* one refuses, one waits */
    }
    if (status == ATTN_OK) {
        status = worker_serve(worker);
    }
    if (status == ATTN_OK) {
        status = rpc_server_start(worker->server);
    }
    if (status != ATTN_OK) {
        return status;
    }
    if (o->metrics_listen[0] != '\0' && (status = worker_monitor(worker)) != ATTN_OK) {
        return status;
    }
    rpc_server_set_serving(worker->server, true);
    engine_info_t info;
    engine_describe(worker->engine, &info);
    attn_log(ATTN_LOG_INFO, "worker.serving",
             "address=%s tls=%s kind=%s device=\"%s\" slab=%llu read_bandwidth=%.3g",
             worker->address, worker->certs.tls != NULL ? "yes" : "no", info.kind, worker->device,
             (unsigned long long)info.slab_bytes, info.speed.read_bandwidth);
    /* Ready without a coordinator, too: it is waited for as long as it takes. */
    process_notify("READY=1\nSTATUS=waiting for the coordinator at %s", o->coordinator);
    return registrar_start(worker, &worker->registrar);
}

static void
check_store(worker_t *worker)
{
    if (worker->options.check_store && engine_check(worker->engine) != ATTN_OK) {
        attn_log(ATTN_LOG_ERROR, "store.broken", "reason=\"%s\"", attn_last_error());
    }
}

/*
 * A device that does not come back in this process is left to the next one: whoever started us
 * starts us again (Restart=on-failure), and everybody else sees what they see when a worker is
 * killed. Nothing is put away, since calls to such a device may not return.
 */
static void
leave_broken_device(const worker_t *worker)
{
    const char *failure = engine_failed(worker->engine);

    if (failure != NULL) {
        attn_log(ATTN_LOG_ERROR, "worker.device_failed", "device=%s exit=%d reason=\"%s\"",
                 worker->options.device, EXIT_DEVICE_FAILED, failure);
        process_notify("STATUS=the device failed: %s", failure);
        _exit(EXIT_DEVICE_FAILED);
    }
}

static void
tick(worker_t *worker)
{
    static uint32_t ticks;

    leave_broken_device(worker);
    certs_tick(&worker->certs);
    monitor_tick(worker->monitor);
    engine_tick(worker->engine, attn_now_ns());
    steps_tick(worker->steps, attn_now_ns());
    worker_groups_tick(worker);
    copier_tick(worker->copier, attn_now_ns());
    check_store(worker);
    if (++ticks % TRIM_TICKS == 0) {
        process_trim();
    }
}

static uint64_t
open_steps(worker_t *worker)
{
    engine_info_t info;

    engine_describe(worker->engine, &info);
    return info.open_steps;
}

/* Let open steps end, take no new ones. Heartbeats go on meanwhile. */
static void
drain(worker_t *worker)
{
    uint64_t end = attn_now_ns() + worker->options.drain_ms * ATTN_NS_PER_MS;

    attn_log(ATTN_LOG_INFO, "worker.draining", "open_steps=%llu drain_ms=%llu",
             (unsigned long long)open_steps(worker), (unsigned long long)worker->options.drain_ms);
    atomic_store(&worker->draining, true);
    process_notify("STOPPING=1\nSTATUS=draining");
    rpc_server_set_serving(worker->server, false);
    steps_drain(worker->steps);
    copier_drain(worker->copier);
    while (open_steps(worker) > 0 && attn_now_ns() < end) {
        leave_broken_device(worker);
        engine_tick(worker->engine, attn_now_ns());
        steps_tick(worker->steps, attn_now_ns());
        nanosleep(&(struct timespec){.tv_nsec = DRAIN_LOOK_MS * 1000000}, NULL);
    }
    uint64_t left = open_steps(worker);
    if (left > 0) {
        attn_log(ATTN_LOG_WARN, "worker.drain_over", "aborted_steps=%llu",
                 (unsigned long long)left);
    }
    process_end_within(GRACE_MS + SPARE_MS);
    steps_end_streams(worker->steps);
    lender_end_streams(worker->lender);
    copier_end_streams(worker->copier);
    rpc_server_stop(worker->server, GRACE_MS);
}

static void
destroy(worker_t *worker)
{
    monitor_stop(worker->monitor);
    registrar_stop(worker->registrar);
    if (worker->server != NULL) {
        rpc_server_stop(worker->server, 0);
    }
    jobs_destroy(worker->jobs);
    jobs_destroy(worker->group_jobs);
    rpc_server_destroy(worker->server);
    unary_destroy(worker->unary);
    unary_destroy(worker->group_unary);
    lender_destroy(worker->lender);
    copier_destroy(worker->copier);
    steps_destroy(worker->steps);
    engine_destroy(worker->engine);
    attn_errands_settle(attn_now_ns() + GPU_WAIT_NS); /* lanes of steps that it ended */
    certs_close(&worker->certs);
    gate_destroy(&worker->gate);
}

/* All threads inherit it, so it comes before any. */
static void
be_batch(bool batch)
{
    struct sched_param none = {0};

    if (batch && sched_setscheduler(0, SCHED_BATCH, &none) != 0) {
        attn_log(ATTN_LOG_WARN, "worker.not_batch", "reason=\"%s\"", strerror(errno));
    }
}

int
worker_main(int argc, char **argv)
{
    static worker_t worker;

    int code = options_start(&worker_option_set, &worker.options, argc, argv);
    if (code >= 0) {
        return code;
    }
    attn_log_set_level((attn_log_level_t)worker.options.log_level);
    attn_log_set_who("role=worker");
    attn_status_t status = process_start();
    be_batch(worker.options.batch);
    rpc_init();
    gate_init(&worker.gate);
    atomic_store(&worker.incarnation, process_random());
    atomic_store(&worker.heard_ns, attn_now_ns());
    figures_start();
    if (status == ATTN_OK) {
        status = start(&worker);
    }
    if (status == ATTN_OK) {
        while (!process_stopping(TICK_MS)) {
            tick(&worker);
        }
        drain(&worker);
        check_store(&worker);
    } else {
        attn_log(ATTN_LOG_ERROR, "worker.failed", "status=%s reason=\"%s\"", attn_strerror(status),
                 attn_last_error());
    }
    destroy(&worker);
    rpc_shutdown();
    if (status == ATTN_OK) {
        attn_log(ATTN_LOG_INFO, "worker.ended", "address=%s", worker.address);
    }
    return status == ATTN_OK ? 0 : 1;
}
