/* The Slab method over real rpc: what it lends, what it refuses, and when. Runs through slabs are
 * tests/integration/transport_test.c's. */
#include "daemon/lender.h"

#include "base/clock.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_NS (UINT64_C(60000) * ATTN_NS_PER_MS) /* for what must come */
#define SLAB (UINT64_C(1) << 20)

typedef struct fixture {
    rpc_server_t *server;
    steps_t *steps;
    lender_t *lender;
    rpc_client_t *rpc;
    rpc_channel_t *channel;
} fixture_t;

/* A stream, and what came on it. Written by one callback after the other; read after `came`. */
typedef struct talk {
    rpc_client_t *rpc;
    rpc_stream_t *stream;
    Attn__V1__SlabReply offer; /* its numbers */
    attn_status_t status;
    char sentence[256];
    atomic_bool offered, ended;
} talk_t;

static int
setup(void **state)
{
    static const steps_ops_t nothing = {.worker = true};
    lender_options_t options         = {.memory = 4 * SLAB, .slab_bytes = SLAB};
    fixture_t *f                     = calloc(1, sizeof(*f));
    char address[32];

    assert_non_null(f);
    rpc_init();
    assert_int_equal(
        rpc_server_create(&(rpc_server_options_t){.address = "127.0.0.1:0"}, &f->server), ATTN_OK);
    assert_int_equal(
        steps_create(f->server, "/attn.v1.Worker", &nothing, NULL, NULL,
                     &(steps_limits_t){.part_ms = 3000, .buffer_bytes = UINT64_C(1) << 30},
                     &f->steps),
        ATTN_OK);
    assert_int_equal(lender_create(f->server, f->steps, &options, &f->lender), ATTN_OK);
    if (!lender_lends(f->lender)) {
        print_message("skipped: there is no UCX here\n");
        _exit(77);
    }
    assert_int_equal(rpc_server_start(f->server), ATTN_OK);
    assert_int_equal(rpc_client_create(0, &f->rpc), ATTN_OK);
    snprintf(address, sizeof(address), "127.0.0.1:%u", rpc_server_port(f->server));
    assert_int_equal(rpc_channel_open(f->rpc, address, &f->channel), ATTN_OK);
    *state = f;
    return 0;
}

static int
teardown(void **state)
{
    fixture_t *f = *state;

    rpc_channel_close(f->channel);
    rpc_client_destroy(f->rpc);
    rpc_server_stop(f->server, 1000);
    rpc_server_destroy(f->server);
    lender_destroy(f->lender);
    steps_destroy(f->steps);
    free(f);
    rpc_shutdown();
    return 0;
}

static void
received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    talk_t *talk = arg;
    ProtobufCMessage *head;

    if (message == NULL) {
        talk->status = status;
        snprintf(talk->sentence, sizeof(talk->sentence), "%s", sentence);
        atomic_store(&talk->ended, true);
        return;
    }
    if (rpc_message_unpack(message, &attn__v1__slab_reply__descriptor, &head) == ATTN_OK) {
        const Attn__V1__SlabReply *reply = (const Attn__V1__SlabReply *)head;
        talk->offer.session              = reply->session;
        talk->offer.secret               = reply->secret;
        talk->offer.bytes                = reply->bytes;
        talk->offer.gpu                  = reply->gpu;
        atomic_store(&talk->offered, true);
    }
    rpc_message_free(message);
}

static bool
has_come(void *arg)
{
    talk_t *talk = arg;

    return atomic_load(&talk->offered) || atomic_load(&talk->ended);
}

static bool
has_ended(void *arg)
{
    return atomic_load(&((talk_t *)arg)->ended);
}

/* Ask for a slab, and wait for what comes. */
static talk_t *
ask(fixture_t *f, uint64_t bytes, const char *host)
{
    Attn__V1__SlabRequest request = ATTN__V1__SLAB_REQUEST__INIT;
    talk_t *talk                  = calloc(1, sizeof(*talk));

    assert_non_null(talk);
    talk->rpc     = f->rpc;
    request.bytes = bytes;
    request.host  = (char *)host;
    assert_int_equal(rpc_stream_open(f->channel, "/attn.v1.Worker/Slab", UINT64_MAX, received, talk,
                                     &talk->stream),
                     ATTN_OK);
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
    assert_true(rpc_client_wait(talk->rpc, has_come, talk, attn_now_ns() + WAIT_NS));
    return talk;
}

static void
talk_close(talk_t *talk)
{
    rpc_stream_close(talk->stream);
    assert_true(rpc_client_wait(talk->rpc, has_ended, talk, attn_now_ns() + WAIT_NS));
    free(talk);
}

static void
assert_refused(fixture_t *f, uint64_t bytes, const char *host, attn_status_t status,
               const char *words)
{
    talk_t *talk = ask(f, bytes, host);

    assert_false(atomic_load(&talk->offered));
    assert_int_equal(talk->status, status);
    if (strstr(talk->sentence, words) == NULL) {
        fail_msg("\"%s\" lacks \"%s\"", talk->sentence, words);
    }
    talk_close(talk);
}

/* Sessions are closed by the thread that ends their streams. */
static void
await_sessions(fixture_t *f, uint32_t n)
{
    ucx_figures_t figures, far;
    uint64_t end = attn_now_ns() + WAIT_NS;

    do {
        lender_describe(f->lender, &figures, &far);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    } while (figures.sessions != n && attn_now_ns() < end);
    assert_int_equal(figures.sessions, n);
}

static void
test_slabs_are_lent(void **state)
{
    fixture_t *f = *state;
    talk_t *talks[4];
    char host[96];

    ucx_host(host);
    for (int i = 0; i < 4; i++) {
        talks[i] = ask(f, 8 * SLAB, host);
        assert_true(atomic_load(&talks[i]->offered));
        assert_int_equal(talks[i]->offer.bytes, SLAB); /* no more than one client gets */
        assert_int_not_equal(talks[i]->offer.secret, 0);
    }
    assert_refused(f, SLAB, host, ATTN_ERR_EXHAUSTED, "limit of 4194304");
    talk_close(talks[0]);
    await_sessions(f, 3);
    talks[0] = ask(f, SLAB, host);
    assert_true(atomic_load(&talks[0]->offered));
    for (int i = 0; i < 4; i++) {
        talk_close(talks[i]);
    }
    await_sessions(f, 0);
}

static void
test_who_is_refused(void **state)
{
    fixture_t *f = *state;
    char host[96];

    ucx_host(host);
    assert_refused(f, 100, host, ATTN_ERR_INVALID, "100 bytes");
    assert_refused(f, SLAB, "", ATTN_ERR_UNSUPPORTED, "another host");
    assert_refused(f, SLAB, "boot ipc", ATTN_ERR_UNSUPPORTED, "another host");
    await_sessions(f, 0);
}

/* Memory of a GPU goes with no slab here, and was not offered. */
static void
test_memory_of_a_gpu_that_was_not_offered(void **state)
{
    Attn__V1__SlabRequest request = ATTN__V1__SLAB_REQUEST__INIT;
    fixture_t *f                  = *state;
    char host[96];

    ucx_host(host);
    talk_t *talk = ask(f, SLAB, host);
    assert_true(atomic_load(&talk->offered));
    assert_false(talk->offer.gpu);
    request.gpu = true;
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
    assert_true(rpc_client_wait(f->rpc, has_ended, talk, attn_now_ns() + WAIT_NS));
    assert_int_equal(talk->status, ATTN_ERR_INVALID);
    assert_non_null(strstr(talk->sentence, "no memory of a GPU was offered"));
    talk_close(talk);
    await_sessions(f, 0);
}

/* A worker that goes down ends the streams that slabs are lent on, and lends no more. */
static void
test_draining(void **state)
{
    fixture_t *f = *state;
    char host[96];

    ucx_host(host);
    talk_t *before = ask(f, SLAB, host);
    assert_true(atomic_load(&before->offered));
    steps_drain(f->steps);
    assert_refused(f, SLAB, host, ATTN_ERR_CANCELLED, "draining");
    assert_false(atomic_load(&before->ended)); /* its steps may go on */
    lender_end_streams(f->lender);
    assert_true(rpc_client_wait(f->rpc, has_ended, before, attn_now_ns() + WAIT_NS));
    assert_int_equal(before->status, ATTN_ERR_CANCELLED);
    talk_close(before);
    await_sessions(f, 0);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_slabs_are_lent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_who_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory_of_a_gpu_that_was_not_offered, setup, teardown),
        cmocka_unit_test_setup_teardown(test_draining, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
