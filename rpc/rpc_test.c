/* Unary calls, the server's life, and health, over loopback TCP and a unix socket. */
#include "rpc/rpc.h"

#include "base/status.h"
#include "echo_client.h"
#include "echo_server.h"
#include "health.pb-c.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <unistd.h>

typedef struct fixture {
    echo_server_t echo;
    rpc_client_t *client;
    rpc_channel_t *channel;
} fixture_t;

static void
begin(fixture_t *f, const rpc_server_options_t *options, uint32_t spin_us)
{
    memset(f, 0, sizeof(*f));
    assert_int_equal(echo_server_start(&f->echo, options), ATTN_OK);
    assert_int_equal(rpc_client_create(spin_us, &f->client), ATTN_OK);
    assert_int_equal(rpc_channel_open(f->client, f->echo.address, &f->channel), ATTN_OK);
}

static int
setup(void **state)
{
    rpc_server_options_t options = {.address = "127.0.0.1:0", .threads = 4};
    fixture_t *f                 = malloc(sizeof(*f));

    begin(f, &options, 0);
    *state = f;
    return 0;
}

static void
end(fixture_t *f)
{
    rpc_channel_close(f->channel);
    rpc_client_destroy(f->client);
    echo_server_stop(&f->echo, 0);
}

static int
teardown(void **state)
{
    end(*state);
    free(*state);
    return 0;
}

static echo_answer_t
ask(fixture_t *f, const char *text, uint64_t number)
{
    return echo_call(f->channel, ECHO_UNARY, text, number, 0, NULL, 0, in_ms(5000));
}

static void
test_unary_gives_head_and_data_back(void **state)
{
    static const size_t sizes[] = {0, 1, 2048, 2049, 100000, 4 << 20, (16 << 20) - 64};
    fixture_t *f                = *state;

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint8_t *data = malloc(sizes[i] + 1), sum = 0;
        for (size_t j = 0; j < sizes[i]; j++) {
            data[j] = (uint8_t)(j * 7 + j / 251);
            sum     = (uint8_t)(sum + data[j]);
        }
        echo_answer_t a =
            echo_call(f->channel, ECHO_UNARY, "text", i, 0, data, sizes[i], in_ms(ECHO_WAIT_MS));
        assert_int_equal(a.status, ATTN_OK);
        assert_int_equal(a.number, i);
        assert_string_equal(a.text, "text");
        assert_int_equal(a.data_size, sizes[i]);
        assert_int_equal(a.data_sum, sum);
        free(data);
    }
}

static void
test_status_and_sentence_travel_exactly(void **state)
{
    static const attn_status_t all[] = {ATTN_ERR_INVALID,  ATTN_ERR_TOO_LARGE, ATTN_ERR_STALE,
                                        ATTN_ERR_CONFLICT, ATTN_ERR_LOST,      ATTN_ERR_NO_MEMORY,
                                        ATTN_ERR_INTERNAL, ATTN_ERR_BUSY};
    fixture_t *f                     = *state;

    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        echo_answer_t a = echo_call(f->channel, i % 2 ? ECHO_UNARY : ECHO_TRACKED, "fail", i,
                                    all[i], NULL, 0, in_ms(5000));
        char expected[64];
        snprintf(expected, sizeof(expected), "as asked: %zu", i);
        assert_int_equal(a.status, all[i]);
        assert_string_equal(a.sentence, expected);
    }
    assert_true(echo_wait_count(&f->echo.closed, 4));
}

static void
test_end_without_a_message_is_an_error(void **state)
{
    fixture_t *f    = *state;
    echo_answer_t a = echo_call(f->channel, ECHO_UNARY, "fail", 0, ATTN_OK, NULL, 0, in_ms(5000));
    assert_int_equal(a.status, ATTN_ERR_INTERNAL);
}

static void
test_deadline_ends_the_call_on_time(void **state)
{
    fixture_t *f    = *state;
    uint64_t start  = attn_now_ns();
    echo_answer_t a = echo_call(f->channel, ECHO_UNARY, "sleep", 3000, 0, NULL, 0, in_ms(100));
    uint64_t took   = (attn_now_ns() - start) / ATTN_NS_PER_MS;

    assert_int_equal(a.status, ATTN_ERR_DEADLINE);
    assert_non_null(strstr(a.sentence, f->echo.address));
    assert_in_range(took, 95, 350);
    assert_true(echo_wait_count(&f->echo.cancelled, 1)); /* the handler saw it, and gave up */
}

static void
test_handler_sees_deadline_peer_and_metadata(void **state)
{
    fixture_t *f    = *state;
    echo_answer_t a = echo_call(f->channel, ECHO_UNARY, "deadline", 0, 0, NULL, 0, in_ms(4000));
    assert_in_range(a.number, 3000, 4100); /* C core rounds what it sends, upwards */
    a = echo_call(f->channel, ECHO_UNARY, "deadline", 0, 0, NULL, 0, UINT64_MAX);
    assert_true(a.number == UINT64_MAX);
    a = ask(f, "who", 0);
    assert_int_equal(strncmp(a.text, "ipv4:127.0.0.1:", 15), 0);
    assert_non_null(strstr(a.blob, "grpc"));
}

static void
test_closing_the_channel_cancels(void **state)
{
    fixture_t *f = *state;
    rpc_channel_t *channel;
    echo_log_t log         = {.client = f->client};
    Echo__Echo head        = ECHO__ECHO__INIT;
    head.text              = "sleep";
    head.number            = 5000;
    rpc_outgoing_t request = {.head = &head.base};

    assert_int_equal(rpc_channel_open(f->client, f->echo.address, &channel), ATTN_OK);
    rpc_call_unary(channel, ECHO_UNARY, &request, UINT64_MAX, echo_received, &log);
    assert_true(echo_wait_count(&f->echo.handling, 1));
    rpc_channel_close(channel);
    assert_true(echo_wait_end(&log));
    assert_int_equal(log.status, ATTN_ERR_CANCELLED);
    assert_true(echo_wait_count(&f->echo.cancelled, 1));
}

static void
count(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void
test_sizes_are_capped_both_ways(void **state)
{
    fixture_t *f       = *state;
    uint8_t *data      = calloc(1, 17 << 20);
    struct iovec piece = {.iov_base = data, .iov_len = 17 << 20};
    atomic_int sent    = 0;
    Echo__Echo head    = ECHO__ECHO__INIT;
    rpc_message_t *message;
    rpc_outgoing_t request = {
        .head = &head.base, .data = &piece, .n_data = 1, .sent = count, .arg = &sent};

    assert_int_equal(rpc_call_unary_wait(f->channel, ECHO_UNARY, &request, in_ms(5000), &message),
                     ATTN_ERR_TOO_LARGE);
    assert_non_null(strstr(attn_last_error(), "16777216"));
    assert_int_equal(sent, 1);
    assert_int_equal(atomic_load(&f->echo.handled), 0); /* it did not travel */

    echo_answer_t a = ask(f, "big", 17 << 20);
    assert_int_equal(a.status, ATTN_ERR_TOO_LARGE);
    assert_non_null(strstr(a.sentence, "16777216"));
    assert_int_equal(ask(f, "", 1).status, ATTN_OK); /* and the connection lives on */
    free(data);
}

static void
test_sent_is_called_once_whatever_happens(void **state)
{
    static uint8_t data[1 << 20];
    struct iovec pieces[2] = {{data, 1000}, {data, sizeof(data)}};
    fixture_t *f           = *state;
    atomic_int sent        = 0;
    Echo__Echo head        = ECHO__ECHO__INIT;
    rpc_channel_t *nobody;

    assert_int_equal(rpc_channel_open(f->client, "127.0.0.1:1", &nobody), ATTN_OK);
    for (int i = 0; i < 8; i++) {
        rpc_channel_t *to      = i & 1 ? nobody : f->channel;
        uint64_t until         = i & 2 ? 1 : in_ms(5000); /* 1: over before it starts */
        rpc_message_t *message = NULL;
        head.text              = i & 4 ? "fail" : "";
        head.signed_           = ATTN_ERR_BUSY;
        rpc_outgoing_t request = {
            .head = &head.base, .data = pieces, .n_data = 2, .sent = count, .arg = &sent};
        attn_status_t status = rpc_call_unary_wait(to, ECHO_UNARY, &request, until, &message);
        assert_int_equal(status == ATTN_OK, i == 0);
        rpc_message_free(message);
        assert_true(echo_wait_count(&sent, i + 1));
    }
    rpc_channel_close(nobody);
    usleep(20000);
    assert_int_equal(sent, 8);
}

static void
test_unknown_method(void **state)
{
    fixture_t *f    = *state;
    echo_answer_t a = echo_call(f->channel, "/echo.Echo/None", "", 0, 0, NULL, 0, in_ms(5000));
    assert_int_equal(a.status, ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(a.sentence, "/echo.Echo/None"));
}

static void
test_not_this_message(void **state)
{
    Echo__Plain head       = ECHO__PLAIN__INIT;
    rpc_outgoing_t request = {.head = &head.base};
    rpc_message_t *message;
    fixture_t *f = *state;
    head.other   = 9;
    assert_int_equal(rpc_call_unary_wait(f->channel, ECHO_UNARY, &request, in_ms(5000), &message),
                     ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "echo.Echo"));
}

static void
test_unreachable_fails_at_once_and_names_the_address(void **state)
{
    fixture_t *f = *state;
    rpc_channel_t *channel;
    for (int i = 0; i < 2; i++) {
        const char *address = i == 0 ? "127.0.0.1:1" : "unix:/nowhere/at/all";
        assert_int_equal(rpc_channel_open(f->client, address, &channel), ATTN_OK);
        uint64_t start = attn_now_ns();
        for (int j = 0; j < 3; j++) {
            echo_answer_t a = echo_call(channel, ECHO_UNARY, "", 0, 0, NULL, 0, in_ms(5000));
            assert_int_equal(a.status, ATTN_ERR_UNAVAILABLE);
            assert_non_null(strstr(a.sentence, address));
        }
        assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, 500);
        rpc_channel_close(channel);
    }
}

static void
test_restarted_server_is_found_again(void **state)
{
    fixture_t *f = *state;
    char address[128];
    rpc_server_options_t options = {.address = address, .threads = 4};

    snprintf(address, sizeof(address), "%s", f->echo.address);
    assert_int_equal(ask(f, "", 1).status, ATTN_OK);
    echo_server_stop(&f->echo, 0);
    assert_int_equal(ask(f, "", 2).status, ATTN_ERR_UNAVAILABLE);
    usleep(300000);
    assert_int_equal(ask(f, "", 3).status, ATTN_ERR_UNAVAILABLE);
    assert_int_equal(echo_server_start(&f->echo, &options), ATTN_OK);

    uint64_t start = attn_now_ns();
    attn_status_t status;
    while ((status = ask(f, "", 4).status) == ATTN_ERR_UNAVAILABLE &&
           attn_now_ns() < start + 4000 * ATTN_NS_PER_MS) {
        usleep(10000);
    }
    assert_int_equal(status, ATTN_OK);
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, 2600);
}

static void *
stop_gracefully(void *arg)
{
    fixture_t *f = arg;
    rpc_server_stop(f->echo.server, 5000);
    return NULL;
}

static void
test_graceful_stop_lets_a_call_end(void **state)
{
    fixture_t *f    = *state;
    echo_log_t log  = {.client = f->client};
    Echo__Echo head = ECHO__ECHO__INIT;
    pthread_t thread;
    head.text              = "sleep";
    head.number            = 300;
    rpc_outgoing_t request = {.head = &head.base};
    rpc_channel_t *late;

    rpc_call_unary(f->channel, ECHO_UNARY, &request, in_ms(5000), echo_received, &log);
    assert_true(echo_wait_count(&f->echo.handling, 1));
    uint64_t start = attn_now_ns();
    pthread_create(&thread, NULL, stop_gracefully, f);
    usleep(100000);
    assert_int_equal(rpc_channel_open(f->client, f->echo.address, &late), ATTN_OK);
    assert_int_equal(echo_call(late, ECHO_UNARY, "", 0, 0, NULL, 0, in_ms(1000)).status,
                     ATTN_ERR_UNAVAILABLE); /* new ones are refused */
    rpc_channel_close(late);
    pthread_join(thread, NULL);
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 200, 2000);
    assert_int_equal(atomic_load(&f->echo.cancelled), 0);
    assert_true(echo_wait_count(&log.messages, 1)); /* nobody waits: the background polls */
    assert_int_equal(atomic_load(&log.ends), 0);
}

static void
test_stop_cancels_after_the_grace(void **state)
{
    fixture_t *f           = *state;
    echo_log_t log         = {.client = f->client};
    Echo__Echo head        = ECHO__ECHO__INIT;
    head.text              = "sleep";
    head.number            = 20000;
    rpc_outgoing_t request = {.head = &head.base};

    rpc_call_unary(f->channel, ECHO_UNARY, &request, UINT64_MAX, echo_received, &log);
    assert_true(echo_wait_count(&f->echo.handling, 1));
    uint64_t start = attn_now_ns();
    rpc_server_stop(f->echo.server, 100);
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 95, 2000);
    assert_int_equal(atomic_load(&f->echo.handling), 0); /* no handler runs any more */
    assert_int_equal(atomic_load(&f->echo.cancelled), 1);
    assert_true(echo_wait_end(&log));
    assert_true(log.status == ATTN_ERR_CANCELLED || log.status == ATTN_ERR_UNAVAILABLE);
}

static void
test_reply_from_another_thread_and_after_the_end(void **state)
{
    fixture_t *f    = *state;
    echo_answer_t a = echo_call(f->channel, ECHO_UNARY, "later", 30, 0, NULL, 3000, in_ms(5000));

    assert_int_equal(a.data_size, 3000);
    /* The client gives up, and the server stops, before the answer is ready. */
    a = echo_call(f->channel, ECHO_UNARY, "later", 400, 0, NULL, 0, in_ms(50));
    assert_int_equal(a.status, ATTN_ERR_DEADLINE);
    assert_true(echo_wait_count(&f->echo.cancelled, 1));
}

/* The server learns that its peer is gone while other threads are about to end the calls: of the
 * two, whoever comes last frees a call. AddressSanitizer tells if it is the first. */
static void
test_calls_ended_while_they_are_cancelled(void **state)
{
    enum { ROUNDS = 40, CALLS = 32 };
    fixture_t *f           = *state;
    Echo__Echo head        = ECHO__ECHO__INIT;
    rpc_outgoing_t request = {.head = &head.base};
    head.text              = "later";
    head.number            = 60000;

    for (int round = 1; round <= ROUNDS; round++) {
        echo_log_t log[CALLS] = {{0}};
        rpc_channel_t *channel;
        assert_int_equal(rpc_channel_open(f->client, f->echo.address, &channel), ATTN_OK);
        for (int i = 0; i < CALLS; i++) {
            log[i].client = f->client;
            rpc_call_unary(channel, ECHO_UNARY, &request, UINT64_MAX, echo_received, &log[i]);
        }
        assert_true(echo_wait_count(&f->echo.handled, round * CALLS));
        rpc_channel_close(channel);
        for (int i = 0; i < CALLS; i++) {
            assert_true(echo_wait_end(&log[i]));
        }
        assert_true(echo_wait_count(&f->echo.cancelled, round * CALLS));
    }
}

/* However many are to run side by side. */
static void
blocked_handlers_leave_the_rest_alive(fixture_t *f)
{
    echo_log_t log[6]      = {{0}};
    Echo__Echo head        = ECHO__ECHO__INIT;
    rpc_outgoing_t request = {.head = &head.base};
    head.text              = "sleep";
    head.number            = 400;

    for (int i = 0; i < 50; i++) { /* the server learns that this handler is short */
        assert_int_equal(ask(f, "", 1).status, ATTN_OK);
    }
    uint64_t start = attn_now_ns();
    for (int i = 0; i < 3; i++) { /* of four threads; one after the other */
        log[i].client = f->client;
        rpc_call_unary(f->channel, ECHO_UNARY, &request, in_ms(5000), echo_received, &log[i]);
        assert_true(echo_wait_count(&f->echo.handling, i + 1));
    }
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, 150);
    for (int i = 0; i < 20; i++) {
        assert_int_equal(ask(f, "", 1).status, ATTN_OK);
    }
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, 250);

    /* All threads busy: a call waits its turn, and a cancellation is still seen. */
    for (int i = 3; i < 6; i++) {
        log[i].client = f->client;
        rpc_call_unary(f->channel, ECHO_UNARY, &request, in_ms(5000), echo_received, &log[i]);
    }
    assert_true(echo_wait_count(&f->echo.handling, 4));
    assert_int_equal(atomic_load(&f->echo.handling), 4);
    for (int i = 0; i < 6; i++) {
        assert_true(echo_wait_count(&log[i].messages, 1)); /* nobody waits: the background polls */
    }
}

static void
test_blocked_handlers_leave_the_rest_alive(void **state)
{
    blocked_handlers_leave_the_rest_alive(*state);
}

static void
test_blocked_handlers_of_a_single_core_do_too(void **state)
{
    rpc_server_options_t options = {.address = "127.0.0.1:0", .threads = 4, .side_by_side = 1};
    fixture_t f;

    (void)state;
    begin(&f, &options, 0);
    blocked_handlers_leave_the_rest_alive(&f);
    end(&f);
}

static void
test_calls_over_the_maximum_are_refused(void **state)
{
    fixture_t f;
    rpc_server_options_t options = {
        .address = "127.0.0.1:0", .threads = 4, .calls_max = 2, .peer_calls_max = 2};
    echo_log_t log[2]      = {{0}};
    Echo__Echo head        = ECHO__ECHO__INIT;
    rpc_outgoing_t request = {.head = &head.base};
    (void)state;
    head.text   = "sleep";
    head.number = 200;

    begin(&f, &options, 0);
    for (int i = 0; i < 2; i++) {
        log[i].client = f.client;
        rpc_call_unary(f.channel, ECHO_UNARY, &request, in_ms(5000), echo_received, &log[i]);
    }
    assert_true(echo_wait_count(&f.echo.handling, 2));
    echo_answer_t a = ask(&f, "", 1);
    assert_int_equal(a.status, ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(a.sentence, "2 calls"));
    while (atomic_load(&f.echo.handling) > 0) {
        usleep(1000);
    }
    usleep(50000);
    assert_int_equal(ask(&f, "", 1).status, ATTN_OK);
    end(&f);
}

/* Streams that are left open do not shut out unary calls. */
static void
test_streams_leave_room_for_unary_calls(void **state)
{
    fixture_t f;
    rpc_server_options_t options = {
        .address = "127.0.0.1:0", .threads = 4, .calls_max = 8, .peer_calls_max = 8};
    echo_log_t log[8]       = {{0}};
    rpc_stream_t *stream[8] = {0};
    Echo__Echo head         = ECHO__ECHO__INIT;
    (void)state;

    begin(&f, &options, 0);
    for (int i = 0; i < 8; i++) {
        log[i].client = f.client;
        rpc_stream_open(f.channel, ECHO_STREAM, UINT64_MAX, echo_received, &log[i], &stream[i]);
        rpc_stream_send(stream[i], &(rpc_outgoing_t){.head = &head.base});
        assert_true(echo_wait_count(i < 7 ? &log[i].messages : &log[i].ends, 1));
    }
    assert_int_equal(log[7].status, ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(log[7].sentence, "7 calls"));
    assert_int_equal(ask(&f, "", 1).status, ATTN_OK);
    for (int i = 0; i < 8; i++) {
        rpc_stream_close(stream[i]);
    }
    end(&f);
}

static void
test_bind_errors_are_typed(void **state)
{
    fixture_t *f = *state;
    echo_server_t second;
    rpc_server_options_t options = {.address = f->echo.address};

    assert_int_equal(echo_server_start(&second, &options), ATTN_ERR_UNAVAILABLE);
    assert_non_null(strstr(attn_last_error(), f->echo.address));
    options.address = "203.0.113.1:9";
    assert_int_equal(echo_server_start(&second, &options), ATTN_ERR_UNAVAILABLE);
    assert_non_null(strstr(attn_last_error(), "203.0.113.1:9"));
    options.address = "";
    assert_int_equal(echo_server_start(&second, &options), ATTN_ERR_INVALID);
}

static void
test_unix_socket(void **state)
{
    fixture_t f;
    echo_server_t second;
    char address[64];
    rpc_server_options_t options = {.address = address, .spin_us = 20};
    (void)state;

    snprintf(address, sizeof(address), "unix:/tmp/attn_rpc_test.%d", (int)getpid());
    begin(&f, &options, 20);
    assert_int_equal(rpc_server_port(f.echo.server), 0);
    assert_int_equal(ask(&f, "", 5).number, 5);
    /* A second server must not take the socket of one that runs. */
    assert_int_equal(echo_server_start(&second, &options), ATTN_ERR_UNAVAILABLE);
    assert_int_equal(ask(&f, "", 6).number, 6);
    end(&f);
    unlink(address + 5);
}

/* Connections of a unix socket have one name. Each still has its share: the rest of its calls wait,
 * and come as others end. */
static void
test_calls_of_a_unix_connection(void **state)
{
    enum { N = 40, SHARE = 16 };
    fixture_t f;
    char address[64];
    rpc_server_options_t options = {.address = address, .calls_max = 64, .peer_calls_max = SHARE};
    rpc_stream_t *streams[N];
    echo_log_t logs[N]           = {0};
    rpc_server_figures_t figures = {0};

    (void)state;
    snprintf(address, sizeof(address), "unix:/tmp/attn_rpc_share.%d", (int)getpid());
    begin(&f, &options, 0);
    assert_int_equal(ask(&f, "", 1).number, 1); /* the client has heard how many it may open */
    for (int i = 0; i < N; i++) {
        logs[i].client = f.client;
        assert_int_equal(rpc_stream_open(f.channel, ECHO_STREAM, in_ms(20000), echo_received,
                                         &logs[i], &streams[i]),
                         ATTN_OK);
        echo_send(streams[i], "", 0, NULL, 0, NULL, NULL);
    }
    for (int i = 0; i < N; i++) { /* all are served, never more than SHARE of them at once */
        assert_true(echo_wait_messages(&logs[i], 1));
        rpc_server_describe(f.echo.server, &figures);
        assert_in_range(figures.calls_open, 1, SHARE + 2); /* with those just over */
        rpc_stream_finish(streams[i]);
        assert_true(echo_wait_end(&logs[i]));
        rpc_stream_close(streams[i]);
    }
    assert_int_equal(figures.refused_full + figures.refused_peer, 0);
    end(&f);
    unlink(address + 5);
}

static void
test_methods_are_checked(void **state)
{
    rpc_server_t *server;
    rpc_server_options_t options = {.address = "127.0.0.1:0"};
    void (*handle)(void *, rpc_call_t *, rpc_message_t *) =
        (void (*)(void *, rpc_call_t *, rpc_message_t *))abort;
    rpc_method_t bad[] = {
        {.path = "no/slash", .handle = handle},
        {.path = "/a.B/C"},
        {.path = "/a.B/C", .handle = handle, .streaming = true},
        {.path = "/grpc.health.v1.Health/Check", .handle = handle},
    };
    (void)state;
    assert_int_equal(rpc_server_create(&options, &server), ATTN_OK);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        assert_int_equal(rpc_server_add(server, &bad[i], 1, NULL), ATTN_ERR_INVALID);
    }
    rpc_server_destroy(server); /* which was never started */
    rpc_server_destroy(NULL);
}

/* ---- health ---- */

static int
check_health(rpc_channel_t *channel, const char *service)
{
    Grpc__Health__V1__HealthCheckRequest head = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    head.service                              = (char *)service;
    rpc_outgoing_t request                    = {.head = &head.base};
    rpc_message_t *message;
    ProtobufCMessage *back;

    attn_status_t status = rpc_call_unary_wait(channel, "/grpc.health.v1.Health/Check", &request,
                                               in_ms(5000), &message);
    if (status != ATTN_OK) {
        return status;
    }
    status =
        rpc_message_unpack(message, &grpc__health__v1__health_check_response__descriptor, &back);
    assert_int_equal(status, ATTN_OK);
    int serving = (int)((Grpc__Health__V1__HealthCheckResponse *)back)->status;
    rpc_message_free(message);
    return serving;
}

static void
test_health_check(void **state)
{
    fixture_t *f = *state;

    assert_int_equal(check_health(f->channel, ""), 1);
    assert_int_equal(check_health(f->channel, "echo.Echo"), 1);
    assert_int_equal(check_health(f->channel, "grpc.health.v1.Health"), 1);
    assert_int_equal(check_health(f->channel, "echo.Ech"), ATTN_ERR_NOT_FOUND);
    assert_int_equal(check_health(f->channel, "echo.Echo/"), ATTN_ERR_NOT_FOUND);
    rpc_server_set_serving(f->echo.server, false);
    assert_int_equal(check_health(f->channel, "echo.Echo"), 2);
    rpc_server_set_serving(f->echo.server, true);
    assert_int_equal(check_health(f->channel, ""), 1);
}

typedef struct watch {
    atomic_int n, ended;
    int seen[16];
    attn_status_t status;
} watch_t;

static void
watched(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    watch_t *watch = arg;
    ProtobufCMessage *head;
    (void)sentence;
    if (message == NULL) {
        watch->status = status;
        atomic_store(&watch->ended, 1);
        return;
    }
    status =
        rpc_message_unpack(message, &grpc__health__v1__health_check_response__descriptor, &head);
    if (status == ATTN_OK && atomic_load(&watch->n) < 16) {
        const Grpc__Health__V1__HealthCheckResponse *response = (const void *)head;
        watch->seen[atomic_load(&watch->n)]                   = (int)response->status;
        atomic_fetch_add(&watch->n, 1);
    }
    rpc_message_free(message);
}

static void
open_watch(fixture_t *f, const char *service, watch_t *watch, rpc_stream_t **stream_p)
{
    Grpc__Health__V1__HealthCheckRequest head = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    head.service                              = (char *)service;
    rpc_outgoing_t request                    = {.head = &head.base};

    rpc_stream_open(f->channel, "/grpc.health.v1.Health/Watch", UINT64_MAX, watched, watch,
                    stream_p);
    rpc_stream_send(*stream_p, &request);
    rpc_stream_finish(*stream_p); /* as the clients of others do: one request */
    assert_true(echo_wait_count(&watch->n, 1));
}

static void
test_health_watch(void **state)
{
    fixture_t *f     = *state;
    watch_t watch[3] = {{0}};
    rpc_stream_t *stream[3];

    open_watch(f, "echo.Echo", &watch[0], &stream[0]);
    open_watch(f, "", &watch[1], &stream[1]);
    open_watch(f, "none", &watch[2], &stream[2]);
    assert_int_equal(watch[0].seen[0], 1);
    assert_int_equal(watch[1].seen[0], 1);
    assert_int_equal(watch[2].seen[0], 3); /* unknown, and the stream stays open */
    rpc_server_set_serving(f->echo.server, false);
    rpc_server_set_serving(f->echo.server, false); /* no change */
    assert_true(echo_wait_count(&watch[0].n, 2));
    assert_true(echo_wait_count(&watch[1].n, 2));
    assert_int_equal(watch[0].seen[1], 2);
    rpc_stream_close(stream[1]);
    assert_true(echo_wait_count(&watch[1].ended, 1));
    rpc_server_set_serving(f->echo.server, true);
    assert_true(echo_wait_count(&watch[0].n, 3));
    assert_int_equal(watch[0].seen[2], 1);
    uint64_t start = attn_now_ns();
    rpc_server_stop(f->echo.server, 5000); /* does not wait for watches */
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, 1000);
    assert_true(echo_wait_count(&watch[0].ended, 1));
    assert_true(echo_wait_count(&watch[2].ended, 1));
    assert_int_equal(watch[0].seen[3], 2);
    assert_int_equal(atomic_load(&watch[1].n), 2);
    assert_int_equal(atomic_load(&watch[2].n), 1);
    assert_int_equal(watch[2].status, ATTN_ERR_CANCELLED);
    rpc_stream_close(stream[0]);
    rpc_stream_close(stream[2]);
}

/* What does not speak HTTP/2 harms nobody. */
static void
test_garbage_on_the_port(void **state)
{
    fixture_t *f          = *state;
    struct sockaddr_in to = {.sin_family = AF_INET};
    char junk[4096];

    memset(junk, 'x', sizeof(junk));
    to.sin_port        = htons(rpc_server_port(f->echo.server));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 20; i++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
        assert_true(send(fd, junk, (size_t)(i * 200), MSG_NOSIGNAL) >= 0);
        close(fd);
    }
    assert_int_equal(ask(f, "", 1).status, ATTN_OK);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_unary_gives_head_and_data_back),
        TEST(test_status_and_sentence_travel_exactly),
        TEST(test_end_without_a_message_is_an_error),
        TEST(test_deadline_ends_the_call_on_time),
        TEST(test_handler_sees_deadline_peer_and_metadata),
        TEST(test_closing_the_channel_cancels),
        TEST(test_sizes_are_capped_both_ways),
        TEST(test_sent_is_called_once_whatever_happens),
        TEST(test_unknown_method),
        TEST(test_not_this_message),
        TEST(test_unreachable_fails_at_once_and_names_the_address),
        TEST(test_restarted_server_is_found_again),
        TEST(test_graceful_stop_lets_a_call_end),
        TEST(test_stop_cancels_after_the_grace),
        TEST(test_reply_from_another_thread_and_after_the_end),
        TEST(test_calls_ended_while_they_are_cancelled),
        TEST(test_blocked_handlers_leave_the_rest_alive),
        cmocka_unit_test(test_blocked_handlers_of_a_single_core_do_too),
        cmocka_unit_test(test_calls_over_the_maximum_are_refused),
        cmocka_unit_test(test_streams_leave_room_for_unary_calls),
        TEST(test_bind_errors_are_typed),
        cmocka_unit_test(test_unix_socket),
        cmocka_unit_test(test_calls_of_a_unix_connection),
        cmocka_unit_test(test_methods_are_checked),
        TEST(test_health_check),
        TEST(test_health_watch),
        TEST(test_garbage_on_the_port),
    };
    return cmocka_run_group_tests_name("rpc", tests, NULL, NULL);
}
