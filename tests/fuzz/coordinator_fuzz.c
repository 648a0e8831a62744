/*
 * attn.v1.Attention and attn.v1.Coordinator: calls and streams of a coordinator with two workers
 * inside the process, of anybody's making. After each input the workers' stores are checked.
 * Workers that join through the input answer nothing.
 */
#include "tests/fuzz/serve.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/coordinator/coordinator_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKERS 2u

static engine_t *engines[WORKERS];
static dir_worker_t hello[WORKERS];
static coordinator_t c;

static void
need(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "coordinator_fuzz: %s\n", attn_last_error());
        abort();
    }
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    engine_info_t info;

    (void)argc;
    (void)argv;
    attn_log_set_level(ATTN_LOG_ERROR);
    options_init(&coordinator_option_set, &c.options);
    need(rpc_client_create(0, &c.rpc));
    need(links_create(c.rpc, &c.links));
    for (uint32_t i = 0; i < WORKERS; i++) {
        need(engine_create(&(engine_options_t){.device     = "cpu",
                                               .threads    = 1,
                                               .slab_bytes = 2u << 20,
                                               .name       = i == 0 ? "worker 1" : "worker 2"},
                           &engines[i]));
        engine_describe(engines[i], &info);
        hello[i] = (dir_worker_t){
            .incarnation = 100 + i, .slab_bytes = info.slab_bytes, .speed.read_bandwidth = 1e10};
        snprintf(hello[i].address, sizeof(hello[i].address), "inproc:%u", i);
        snprintf(hello[i].kind, sizeof(hello[i].kind), "%s", info.kind);
        need(links_add_engine(c.links, hello[i].address, engines[i]));
    }
    return 0;
}

/* In place of process_random(): the ids of steps are 1, 2, ... for every input. */
uint64_t __wrap_process_random(void);

static uint64_t n_random;

uint64_t
__wrap_process_random(void)
{
    return ++n_random;
}

/* As coordinator.c starts one; with no seed all ids count from 1. */
static attn_status_t
start(void)
{
    directory_options_t directory;
    attn_client_options_t client;

    directory_options_init(&directory);
    directory.first_epoch = 1;
    n_random              = 0;
    attn_client_options_init(&client);
    client.timeout_ms      = 200;
    client.step_timeout_ms = 200;
    c.instance             = 7;
    atomic_store(&c.period, 1);
    attn_status_t status = cluster_create(&directory, c.links, &c.cluster);
    if (status == ATTN_OK) {
        status = client_open_on(c.rpc, c.cluster, c.links, &client, &c.door);
    }
    if (status == ATTN_OK) {
        status = thin_create(c.door, &c.thin);
    }
    if (status == ATTN_OK) {
        status = rpc_server_create(&(rpc_server_options_t){.address = "fake"}, &c.server);
    }
    if (status == ATTN_OK) {
        status = jobs_create(1, &c.jobs);
    }
    if (status == ATTN_OK) {
        status = coordinator_serve_attention(&c);
    }
    if (status == ATTN_OK) {
        status = coordinator_serve_members(&c);
    }
    for (uint32_t i = 0; i < WORKERS && status == ATTN_OK; i++) {
        status = cluster_worker_join(c.cluster, &hello[i], &hello[i].id);
    }
    return status;
}

static void
stop(void)
{
    jobs_destroy(c.jobs);
    rpc_server_destroy(c.server);
    steps_destroy(c.steps);
    unary_destroy(c.attention);
    unary_destroy(c.members);
    thin_destroy(c.thin);
    attn_client_close(c.door);
    cluster_destroy(c.cluster);
    c.jobs      = NULL;
    c.server    = NULL;
    c.steps     = NULL;
    c.attention = NULL;
    c.members   = NULL;
    c.thin      = NULL;
    c.door      = NULL;
    c.cluster   = NULL;
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static char ticket[TICKET_MAX]; /* of the client whose id is 1: the first to come */
    input_t in = {bytes, bytes + n};

    ticket_write(&(ticket_t){.role = TICKET_CLIENT, .client = 1, .period = 1}, c.ticket_secret,
                 ticket);
    fake_header(TICKET_HEADER, ticket);
    attn_status_t status = start();
    if (status == ATTN_OK) {
        serve_input(c.server, &in);
        cluster_tick(c.cluster);
        thin_tick(c.thin, attn_now_ns());
    } else if (status != ATTN_ERR_NO_MEMORY || !fake_short_of_memory) {
        need(status);
    }
    stop();
    fake_spared_begin();
    for (uint32_t i = 0; i < WORKERS; i++) {
        need(engine_check(engines[i]));
        serve_forget(engines[i]);
        need(engine_check(engines[i]));
    }
    fake_spared_end();
    return 0;
}
