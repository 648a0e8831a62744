#include "daemon/coordinator/coordinator.h"

#include "daemon/coordinator/coordinator_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/monitor/figures.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define TICK_MS 100u
#define TRIM_TICKS 20u
#define LOOK_MS 10u       /* how often a draining coordinator looks for open steps */
#define GRACE_MS 500u     /* for replies that are on their way at the end */
#define SPARE_MS 1000u    /* to put things away after that */
#define SERVER_THREADS 4u /* they never block: what may block is a job */
#define SPIN_US 50u

/* ---- tickets ---- */

void
coordinator_ticket(const coordinator_t *c, ticket_role_t role, uint32_t client,
                   char text[TICKET_MAX])
{
    ticket_t ticket = {.role = role, .client = client, .period = atomic_load(&c->period)};

    ticket_write(&ticket, c->ticket_secret, text);
}

/* A new period, in which our own calls have a new ticket too. Periods are counted here and not
 * taken from the clock: after a pause of our own, when nobody could renew his ticket, all that
 * were good are good for a lease still. */
static void
next_period(coordinator_t *c)
{
    char text[TICKET_MAX];

    atomic_fetch_add(&c->period, 1);
    coordinator_ticket(c, TICKET_COORDINATOR, 0, text);
    rpc_client_set_header(c->rpc, TICKET_HEADER, text);
}

/* ---- the ticker ---- */

/* Log who joined and who was lost since. alive: of the workers by number, as last seen. */
static void
log_members(coordinator_t *c, bool alive[DIR_WORKERS_MAX])
{
    attn_cluster_info_t info;

    if (cluster_describe(c->cluster, &info) != ATTN_OK) {
        return;
    }
    for (uint32_t i = 0; i < info.n_workers && i < DIR_WORKERS_MAX; i++) {
        const attn_worker_info_t *w = &info.workers[i];
        if (w->alive && !alive[i]) {
            attn_log(ATTN_LOG_INFO, "member.joined",
                     "worker=%u address=%s kind=%s slab=%llu epoch=%llu", w->id, w->address,
                     w->kind, (unsigned long long)w->slab_bytes, (unsigned long long)info.epoch);
        } else if (!w->alive && alive[i]) {
            attn_log(ATTN_LOG_WARN, "member.lost", "worker=%u address=%s epoch=%llu", w->id,
                     w->address, (unsigned long long)info.epoch);
        }
        alive[i] = w->alive;
    }
    attn_cluster_info_free(&info);
}

/*
 * A coordinator that did not run for a while (stopped, suspended, starved) heard no heartbeat
 * either, which is nobody else's fault: it listens for as long as it allows others to be silent
 * before it judges.
 */
static void
forgive_own_pause(coordinator_t *c, uint64_t *last_ns)
{
    uint64_t now    = attn_now_ns();
    uint64_t paused = *last_ns != 0 ? now - *last_ns : 0;

    if (paused > (c->options.lost_ms / 2) * ATTN_NS_PER_MS) {
        attn_log(ATTN_LOG_WARN, "coordinator.was_paused", "ms=%llu",
                 (unsigned long long)(paused / ATTN_NS_PER_MS));
        uint64_t until = now + c->options.lost_ms * ATTN_NS_PER_MS;
        while (attn_now_ns() < until && !atomic_load(&c->stop_ticking)) {
            nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000}, NULL);
        }
    }
}

static void *
ticker_thread(void *arg)
{
    static bool alive[DIR_WORKERS_MAX];
    coordinator_t *c = arg;
    uint64_t epoch   = 0;
    uint64_t slept   = 0; /* when we went to sleep */
    uint64_t lease   = c->options.lease_ms * ATTN_NS_PER_MS;
    uint64_t next    = attn_now_ns() + lease; /* period */

    while (!atomic_load(&c->stop_ticking)) {
        forgive_own_pause(c, &slept);
        if (attn_now_ns() >= next) {
            next_period(c);
            next = attn_now_ns() + lease;
        }
        cluster_tick(c->cluster);
        thin_tick(c->thin, attn_now_ns());
        if (cluster_epoch(c->cluster) != epoch) {
            epoch = cluster_epoch(c->cluster);
            log_members(c, alive);
        }
        slept = attn_now_ns();
        nanosleep(&(struct timespec){.tv_nsec = TICK_MS * 1000000}, NULL);
    }
    return NULL;
}

/* ---- start ---- */

/* Larger than any epoch of a former coordinator, unless that one changed its layout more than
 * a thousand times a second: the time in milliseconds. */
static uint64_t
first_epoch(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* The cluster, and libattn over it. */
static attn_status_t
start_cluster(coordinator_t *c)
{
    directory_options_t directory;
    attn_client_options_t client;

    directory_options_init(&directory);
    directory.lost_ns           = c->options.lost_ms * ATTN_NS_PER_MS;
    directory.lease_ns          = c->options.lease_ms * ATTN_NS_PER_MS;
    directory.break_even_tokens = c->options.break_even_tokens;
    directory.first_epoch       = first_epoch();
    directory.id_seed           = c->instance;
    attn_client_options_init(&client);
    client.name = "front door";

    attn_status_t status = rpc_client_create(SPIN_US, &c->rpc);
    if (status == ATTN_OK) {
        rpc_client_set_tls(c->rpc, c->certs.tls, NULL);
        next_period(c);
        status = links_create(c->rpc, &c->links);
    }
    if (status == ATTN_OK) {
        status = links_set_transport(
            c->links, (attn_transport_t)(c->options.transport + ATTN_TRANSPORT_AUTO));
    }
    if (status == ATTN_OK) {
        status = cluster_create(&directory, c->links, &c->cluster);
    }
    if (status == ATTN_OK) {
        status = client_open_on(c->rpc, c->cluster, c->links, &client, &c->door);
    }
    if (status == ATTN_OK) {
        status = thin_create(c->door, &c->thin);
    }
    return status;
}

static attn_status_t
start(coordinator_t *c)
{
    attn_status_t status = certs_open(&c->certs, &c->options.tls);

    process_random_bytes(c->ticket_secret, sizeof(c->ticket_secret));
    if (status == ATTN_OK) {
        status = join_secret_read(c->options.join_secret_file, c->join_secret);
    }
    if (status == ATTN_OK) {
        status =
            rpc_server_create(&(rpc_server_options_t){.address    = c->options.listen,
                                                      .threads    = SERVER_THREADS,
                                                      .spin_us    = SPIN_US,
                                                      .tls        = c->certs.tls,
                                                      .stall_ms   = (uint32_t)c->options.stall_ms,
                                                      .memory_max = c->options.message_memory},
                              &c->server);
    }

    if (status == ATTN_OK) {
        status = process_address(c->options.listen, rpc_server_port(c->server), c->address);
    }
    if (status == ATTN_OK) {
        status = start_cluster(c);
    }
    if (status == ATTN_OK) {
        status = jobs_create((uint32_t)c->options.handler_threads, &c->jobs);
    }
    if (status == ATTN_OK) {
        status = coordinator_serve_attention(c);
    }
    if (status == ATTN_OK) {
        status = coordinator_serve_members(c);
    }
    if (status == ATTN_OK && pthread_create(&c->ticker, NULL, ticker_thread, c) != 0) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "no thread for the ticker");
    }
    if (status != ATTN_OK) {
        return status;
    }
    c->ticking = true;
    if (c->options.metrics_listen[0] != '\0' && (status = coordinator_monitor(c)) != ATTN_OK) {
        return status;
    }
    status = rpc_server_start(c->server);
    if (status == ATTN_OK) {
        rpc_server_set_serving(c->server, true);
        attn_log(ATTN_LOG_INFO, "coordinator.serving",
                 "address=%s tls=%s instance=%016llx epoch=%llu", c->address,
                 c->certs.tls != NULL ? "yes" : "no", (unsigned long long)c->instance,
                 (unsigned long long)cluster_epoch(c->cluster));
        if (c->join_secret[0] == '\0' && !options_address_is_loopback(c->options.listen)) {
            attn_log(ATTN_LOG_WARN, "coordinator.anybody_joins",
                     "reason=\"no --join-secret-file: who may connect may be a worker\"");
        }
        process_ready(c->address);
        process_notify("READY=1\nSTATUS=serving on %s", c->address);
    }
    return status;
}

/* ---- the end ---- */

/* Let open steps of thin clients end, take no new ones. */
static void
drain(coordinator_t *c)
{
    uint64_t end = attn_now_ns() + c->options.drain_ms * ATTN_NS_PER_MS;

    attn_log(ATTN_LOG_INFO, "coordinator.draining", "open_steps=%u drain_ms=%llu",
             thin_open_steps(c->thin), (unsigned long long)c->options.drain_ms);
    atomic_store(&c->draining, true);
    process_notify("STOPPING=1\nSTATUS=draining");
    rpc_server_set_serving(c->server, false);
    steps_drain(c->steps);
    while (thin_open_steps(c->thin) > 0 && attn_now_ns() < end) {
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000}, NULL);
    }
    uint32_t left = thin_open_steps(c->thin);
    if (left > 0) {
        attn_log(ATTN_LOG_WARN, "coordinator.drain_over", "aborted_steps=%u", left);
    }
    process_end_within(GRACE_MS + SPARE_MS);
    steps_end_streams(c->steps);
    rpc_server_stop(c->server, GRACE_MS);
}

static void
destroy(coordinator_t *c)
{
    monitor_stop(c->monitor);
    atomic_store(&c->stop_ticking, true);
    if (c->ticking) {
        pthread_join(c->ticker, NULL);
    }
    if (c->server != NULL) {
        rpc_server_stop(c->server, 0);
    }
    jobs_destroy(c->jobs);
    rpc_server_destroy(c->server);
    steps_destroy(c->steps);
    unary_destroy(c->attention);
    unary_destroy(c->members);
    thin_destroy(c->thin);
    attn_client_close(c->door);
    cluster_destroy(c->cluster);
    ucx_asks_t *asks = c->links != NULL ? links_asks(c->links) : NULL;
    links_destroy(c->links);
    rpc_client_destroy(c->rpc);
    ucx_asks_destroy(asks);
    certs_close(&c->certs);
}

int
coordinator_main(int argc, char **argv)
{
    static coordinator_t c;

    int code = options_start(&coordinator_option_set, &c.options, argc, argv);
    if (code >= 0) {
        return code;
    }
    attn_log_set_level((attn_log_level_t)c.options.log_level);
    attn_log_set_who("role=coordinator");
    attn_status_t status = process_start();
    rpc_init();
    c.instance = process_random();
    figures_start();
    if (status == ATTN_OK) {
        status = start(&c);
    }
    if (status == ATTN_OK) {
        for (uint32_t ticks = 1; !process_stopping(TICK_MS); ticks++) {
            certs_tick(&c.certs);
            monitor_tick(c.monitor);
            steps_tick(c.steps, attn_now_ns());
            if (ticks % TRIM_TICKS == 0) {
                process_trim();
            }
        }
        drain(&c);
    } else {
        attn_log(ATTN_LOG_ERROR, "coordinator.failed", "status=%s reason=\"%s\"",
                 attn_strerror(status), attn_last_error());
    }
    destroy(&c);
    rpc_shutdown();
    if (status == ATTN_OK) {
        attn_log(ATTN_LOG_INFO, "coordinator.ended", "address=%s", c.address);
    }
    return status == ATTN_OK ? 0 : 1;
}
