/*
 * attn.v1.Worker: calls and streams of a worker, of anybody's making. Callers show the ticket of
 * its coordinator or, where byte 0 is odd, one that the input brings. Where bit 1 of it is set, the
 * input brings what other workers answer that chunks are copied from. After each input the store is
 * checked, and with its caches closed nothing of it is left.
 */
#include "tests/fuzz/serve.h"

#include "base/log.h"
#include "base/status.h"
#include "daemon/worker/worker_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static worker_t worker;
static const uint8_t secret[TICKET_SECRET];
static char ticket[TICKET_MAX];

static void
need(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "worker_fuzz: %s\n", attn_last_error());
        abort();
    }
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    attn_log_set_level(ATTN_LOG_ERROR);
    options_init(&worker_option_set, &worker.options);
    strcpy(worker.name, "worker");
    strcpy(worker.address, "127.0.0.1:1");
    need(engine_create(
        &(engine_options_t){
            .device = "cpu", .threads = 1, .slab_bytes = 2u << 20, .name = worker.name},
        &worker.engine));
    gate_init(&worker.gate);
    gate_joined(&worker.gate, secret, 1);
    ticket_write(&(ticket_t){.role = TICKET_COORDINATOR, .period = 1}, secret, ticket);
    need(rpc_server_create(&(rpc_server_options_t){.address = "fake"}, &worker.server));
    need(worker_serve(&worker));
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    input_t in                 = {bytes, bytes + n};
    input_t answers            = {0};
    char shown[2 * TICKET_MAX] = {0};
    engine_info_t info;
    size_t size;

    uint8_t how = input_byte(&in);
    bool own    = how & 1;
    if (how & 2) {
        const uint8_t *told = input_bytes(&in, &size);
        answers             = (input_t){told, told + size};
    }
    fake_answers(&answers);
    if (own) {
        const uint8_t *text = input_bytes(&in, &size);
        memcpy(shown, text, size < sizeof(shown) - 1 ? size : sizeof(shown) - 1);
    }
    fake_header(TICKET_HEADER, own ? shown : ticket);
    serve_input(worker.server, &in);
    fake_answers(NULL);
    fake_spared_begin();
    need(engine_check(worker.engine));
    serve_forget(worker.engine);
    need(engine_check(worker.engine));
    engine_describe(worker.engine, &info);
    if (info.region_bytes != 0 || info.chunks != 0 || info.open_steps != 0 || info.caches != 0) {
        fprintf(stderr, "worker_fuzz: something is left of closed caches\n");
        abort();
    }
    fake_spared_end();
    return 0;
}
