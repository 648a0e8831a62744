/* Streams, callbacks and waiting: order, back-pressure, ends of all kinds, many threads. */
#include "rpc/rpc.h"

#include "base/status.h"
#include "echo_client.h"
#include "echo_server.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB (1u << 20)

typedef struct fixture {
    echo_server_t echo;
    rpc_client_t *client;
    rpc_channel_t *channel;
    rpc_stream_t *stream;
    echo_log_t log;
    atomic_int sent;
} fixture_t;

static uint8_t block[4 * MIB];

static int
setup_spin(void **state, uint32_t spin_us)
{
    rpc_server_options_t options = {.address = "127.0.0.1:0", .threads = 4, .spin_us = spin_us};
    fixture_t *f                 = calloc(1, sizeof(*f));

    if (echo_server_start(&f->echo, &options) != ATTN_OK ||
        rpc_client_create(spin_us, &f->client) != ATTN_OK ||
        rpc_channel_open(f->client, f->echo.address, &f->channel) != ATTN_OK) {
        return -1;
    }
    f->log.client = f->client;
    *state        = f;
    return rpc_stream_open(f->channel, ECHO_STREAM, UINT64_MAX, echo_received, &f->log, &f->stream);
}

static int
setup(void **state)
{
    return setup_spin(state, 0);
}

static int
setup_spinning(void **state)
{
    return setup_spin(state, 50);
}

static int
teardown(void **state)
{
    fixture_t *f = *state;

    rpc_stream_close(f->stream);
    rpc_channel_close(f->channel);
    rpc_client_destroy(f->client);
    echo_server_stop(&f->echo, 0);
    assert_int_equal(atomic_load(&f->log.ends), 1); /* told once, at the latest by the destroy */
    free(f);
    return 0;
}

static void
count(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void
send_block(fixture_t *f, const char *text, uint64_t number, uint64_t size)
{
    echo_send(f->stream, text, number, block, size, count, &f->sent);
}

static void
finish_ok(fixture_t *f)
{
    rpc_stream_finish(f->stream);
    assert_true(echo_wait_end(&f->log));
    assert_int_equal(f->log.status, ATTN_OK);
    assert_false(atomic_load(&f->log.out_of_order));
}

static void
test_lock_step(void **state)
{
    fixture_t *f = *state;

    for (int i = 0; i < 500; i++) {
        send_block(f, "", (uint64_t)i, (uint64_t)i * 11);
        assert_true(echo_wait_messages(&f->log, i + 1));
        assert_int_equal(atomic_load(&f->log.messages), i + 1);
    }
    finish_ok(f);
    assert_int_equal(atomic_load(&f->log.messages), 500);
    assert_int_equal(atomic_load(&f->log.data_bytes), 11 * 500 * 499 / 2);
    assert_true(echo_wait_count(&f->echo.closed, 1));
    assert_true(echo_wait_count(&f->sent, 500));
}

static void
test_many_messages_keep_their_order(void **state)
{
    fixture_t *f = *state;

    for (int i = 0; i < 20000; i++) {
        echo_send(f->stream, "text", (uint64_t)i, block, 16, NULL, NULL);
    }
    finish_ok(f); /* the half-close waits for what is queued */
    assert_int_equal(atomic_load(&f->log.messages), 20000);
    assert_int_equal(atomic_load(&f->echo.in_one_call_max), 1);
}

static void
test_large_data_in_parts(void **state)
{
    fixture_t *f = *state;

    for (int i = 0; i < 24; i++) { /* 48 MiB each way */
        send_block(f, "", (uint64_t)i, RPC_DATA_PART_MAX);
    }
    finish_ok(f);
    assert_int_equal(atomic_load(&f->log.data_bytes), 24 * RPC_DATA_PART_MAX);
    assert_true(echo_wait_count(&f->sent, 24));
}

static void
test_closing_early_drops_what_is_in_flight(void **state)
{
    fixture_t *f = *state;

    for (int i = 0; i < 40; i++) {
        send_block(f, "", (uint64_t)i, MIB);
    }
    assert_true(echo_wait_messages(&f->log, 1));
    rpc_stream_close(f->stream);
    f->stream = NULL;
    int seen  = atomic_load(&f->log.messages);
    assert_true(echo_wait_end(&f->log));
    assert_int_equal(f->log.status, ATTN_ERR_CANCELLED);
    assert_in_range(atomic_load(&f->log.messages), 0, seen + 1); /* one may have been on its way */
    assert_true(echo_wait_count(&f->sent, 40));
    assert_true(echo_wait_count(&f->echo.closed, 1));
    usleep(20000);
    assert_int_equal(atomic_load(&f->sent), 40);
}

typedef struct closing {
    echo_log_t log;
    rpc_stream_t **stream;
    bool at_end;
} closing_t;

static void
close_inside(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    closing_t *closing = arg;

    if (*closing->stream != NULL && (message == NULL) == closing->at_end) {
        rpc_stream_close(*closing->stream);
        *closing->stream = NULL;
    }
    echo_received(&closing->log, status, sentence, message);
}

static void
test_close_inside_the_callback(void **state)
{
    fixture_t *f = *state;
    rpc_stream_t *streams[2];
    closing_t closing[2];

    for (int i = 0; i < 2; i++) {
        closing[i] = (closing_t){.log = {.client = f->client}, .stream = &streams[i], .at_end = i};
        rpc_stream_open(f->channel, ECHO_STREAM, UINT64_MAX, close_inside, &closing[i],
                        &streams[i]);
        echo_send(streams[i], "", 0, block, 10, NULL, NULL);
        if (i == 1) {
            rpc_stream_finish(streams[i]);
        }
        assert_true(echo_wait_end(&closing[i].log));
        assert_null(streams[i]);
        assert_int_equal(atomic_load(&closing[i].log.messages), 1);
        assert_int_equal(closing[i].log.status, i == 1 ? ATTN_OK : ATTN_ERR_CANCELLED);
    }
    assert_true(echo_wait_count(&f->echo.closed, 2));
}

static void
test_server_ends_early(void **state)
{
    fixture_t *f        = *state;
    Echo__Echo head     = ECHO__ECHO__INIT;
    rpc_outgoing_t fail = {.head = &head.base};
    head.text           = "fail";
    head.number         = 9;
    head.signed_        = ATTN_ERR_LOST;

    echo_send(f->stream, "", 0, block, 100, count, &f->sent);
    rpc_stream_send(f->stream, &fail);
    for (int i = 0; i < 30; i++) {
        send_block(f, "", 100, MIB);
    }
    assert_true(echo_wait_end(&f->log));
    assert_int_equal(f->log.status, ATTN_ERR_LOST);
    assert_string_equal(f->log.sentence, "as asked: 9");
    assert_int_equal(atomic_load(&f->log.messages), 1); /* the one before the end came through */
    send_block(f, "", 0, MIB);                          /* dropped, and sent is called */
    assert_true(echo_wait_count(&f->sent, 32));
    assert_true(echo_wait_count(&f->echo.closed, 1));
}

/* A server that sends faster than its client reads is told so at 64 MiB, and what it could
 * queue arrives. The client reads nothing more from the first message until the server is through,
 * however slow that is. */
static void
test_slow_reader_pushes_back(void **state)
{
    fixture_t *f = *state;

    f->log.holds = &f->echo.floods;
    atomic_store(&f->echo.floods, 1);
    echo_send(f->stream, "flood", 400, NULL, 0, NULL, NULL);
    assert_true(echo_wait_messages(&f->log, 1));
    assert_int_equal(atomic_load(&f->echo.floods), 0);
    finish_ok(f);
    assert_int_equal(atomic_load(&f->echo.flood_status), ATTN_ERR_EXHAUSTED);
    assert_in_range(atomic_load(&f->echo.flooded), 64, 300);
    assert_int_equal(atomic_load(&f->log.messages), atomic_load(&f->echo.flooded));
}

static void
test_deaf_server_breaks_the_stream(void **state)
{
    fixture_t *f = *state;

    send_block(f, "deaf", 0, 0);
    assert_true(echo_wait_messages(&f->log, 1));
    for (int i = 0; i < 60; i++) {
        send_block(f, "", 0, 2 * MIB);
    }
    assert_true(echo_wait_end(&f->log));
    assert_int_equal(f->log.status, ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(f->log.sentence, "wait for a peer"));
    assert_true(echo_wait_count(&f->sent, 61));
    assert_true(echo_wait_count(&f->echo.closed, 1));
}

/* Forty parts, one at a time: the next goes when one was taken. */
typedef struct paced {
    echo_log_t log; /* the stream's arg */
    rpc_stream_t *stream;
    atomic_int taken;
    int sent;
} paced_t;

static void
send_next(void *arg)
{
    paced_t *paced = arg;

    atomic_fetch_add(&paced->taken, 1);
    assert_int_equal(atomic_load(&paced->log.ends), 0);
    if (paced->sent < 40) {
        echo_send(paced->stream, "", (uint64_t)paced->sent++, block, 2 * MIB, NULL, NULL);
    }
}

static void
test_what_was_taken_is_told(void **state)
{
    fixture_t *f  = *state;
    paced_t paced = {.log = {.client = f->client}, .sent = 1};

    assert_int_equal(rpc_stream_open(f->channel, ECHO_STREAM, UINT64_MAX, echo_received, &paced.log,
                                     &paced.stream),
                     ATTN_OK);
    rpc_stream_on_taken(paced.stream, send_next);
    echo_send(paced.stream, "", 0, block, 2 * MIB, NULL, NULL);
    assert_true(echo_wait_messages(&paced.log, 40));
    assert_true(echo_wait_count(&paced.taken, 40));
    rpc_stream_finish(paced.stream);
    assert_true(echo_wait_end(&paced.log));
    assert_int_equal(paced.log.status, ATTN_OK);
    assert_false(atomic_load(&paced.log.out_of_order));
    assert_int_equal(atomic_load(&paced.log.messages), 40);
    assert_int_equal(atomic_load(&paced.taken), 40);
    rpc_stream_close(paced.stream);
}

typedef struct resting {
    echo_log_t log;
    rpc_stream_t *stream;
} resting_t;

/* As a user who has the answer to all it asked. */
static void
receive_and_rest(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    resting_t *r = arg;

    if (message != NULL) {
        rpc_stream_rest(r->stream);
    }
    echo_received(&r->log, status, sentence, message);
}

static void
open_resting(fixture_t *f, resting_t *r)
{
    *r = (resting_t){.log = {.client = f->client}};
    assert_int_equal(
        rpc_stream_open(f->channel, ECHO_STREAM, UINT64_MAX, receive_and_rest, r, &r->stream),
        ATTN_OK);
}

/* Nothing is read after a message before one is sent, and then everything, up to the end. */
static void
test_a_stream_rests(void **state)
{
    fixture_t *f = *state;
    resting_t r;

    open_resting(f, &r);
    for (uint64_t i = 0; i < 300; i++) {
        echo_send(r.stream, "", i, block, i * 11, NULL, NULL);
        assert_true(echo_wait_messages(&r.log, (int)i + 1));
    }
    echo_send(r.stream, "sleep", 300, block, 10, NULL, NULL); /* until both were sent */
    echo_send(r.stream, "", 301, block, 10, NULL, NULL);
    assert_true(echo_wait_count(&f->echo.handled, 302));
    assert_true(echo_wait_messages(&r.log, 301));
    usleep(50000);
    assert_int_equal(atomic_load(&r.log.messages), 301);
    echo_send(r.stream, "", 302, block, 10, NULL, NULL);
    assert_true(echo_wait_messages(&r.log, 302));
    rpc_stream_finish(r.stream);
    assert_true(echo_wait_end(&r.log));
    assert_int_equal(r.log.status, ATTN_OK);
    assert_int_equal(atomic_load(&r.log.messages), 303);
    assert_false(atomic_load(&r.log.out_of_order));
    rpc_stream_close(r.stream);
}

/* The end is told to those who rest, whoever ends it. */
static void
test_a_resting_stream_ends(void **state)
{
    fixture_t *f = *state;
    resting_t r[2];

    for (int i = 0; i < 2; i++) {
        open_resting(f, &r[i]);
        echo_send(r[i].stream, "", 0, block, 10, NULL, NULL);
    }
    for (int i = 0; i < 2; i++) {
        assert_true(echo_wait_messages(&r[i].log, 1));
    }
    rpc_stream_close(r[0].stream);
    assert_true(echo_wait_end(&r[0].log));
    assert_int_equal(r[0].log.status, ATTN_ERR_CANCELLED);
    assert_int_equal(atomic_load(&r[1].log.ends), 0);
    echo_server_stop(&f->echo, 0);
    assert_true(echo_wait_end(&r[1].log));
    assert_int_not_equal(r[1].log.status, ATTN_OK);
    rpc_stream_close(r[1].stream);
}

static void
test_too_large_breaks_the_stream(void **state)
{
    fixture_t *f           = *state;
    struct iovec pieces[5] = {{block, sizeof(block)},
                              {block, sizeof(block)},
                              {block, sizeof(block)},
                              {block, sizeof(block)},
                              {block, 1}};
    Echo__Echo head        = ECHO__ECHO__INIT;
    rpc_outgoing_t message = {
        .head = &head.base, .data = pieces, .n_data = 5, .sent = count, .arg = &f->sent};

    rpc_stream_send(f->stream, &message);
    assert_true(echo_wait_end(&f->log));
    assert_int_equal(f->log.status, ATTN_ERR_TOO_LARGE);
    assert_int_equal(atomic_load(&f->sent), 1);
}

static void
test_deadline_of_a_stream(void **state)
{
    fixture_t *f   = *state;
    echo_log_t log = {.client = f->client};
    rpc_stream_t *stream;

    rpc_stream_open(f->channel, ECHO_STREAM, in_ms(100), echo_received, &log, &stream);
    echo_send(stream, "", 0, NULL, 0, NULL, NULL);
    uint64_t start = attn_now_ns();
    assert_true(echo_wait_end(&log));
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 80, 350);
    assert_int_equal(log.status, ATTN_ERR_DEADLINE);
    assert_int_equal(atomic_load(&log.messages), 1);
    rpc_stream_close(stream);
}

static void
test_unreachable_and_unknown(void **state)
{
    fixture_t *f = *state;
    rpc_channel_t *channel;
    echo_log_t log[2] = {{.client = f->client}, {.client = f->client}};
    rpc_stream_t *stream[2];

    assert_int_equal(rpc_channel_open(f->client, "127.0.0.1:1", &channel), ATTN_OK);
    rpc_stream_open(channel, ECHO_STREAM, UINT64_MAX, echo_received, &log[0], &stream[0]);
    rpc_stream_open(f->channel, "/echo.Echo/None", UINT64_MAX, echo_received, &log[1], &stream[1]);
    for (int i = 0; i < 2; i++) {
        echo_send(stream[i], "", 0, block, MIB, count, &f->sent);
        assert_true(echo_wait_end(&log[i]));
        rpc_stream_close(stream[i]);
    }
    assert_int_equal(log[0].status, ATTN_ERR_UNAVAILABLE);
    assert_non_null(strstr(log[0].sentence, "127.0.0.1:1"));
    assert_int_equal(log[1].status, ATTN_ERR_UNSUPPORTED);
    assert_true(echo_wait_count(&f->sent, 2));
    rpc_channel_close(channel);
}

static void
test_server_stops_under_a_stream(void **state)
{
    fixture_t *f = *state;

    send_block(f, "", 0, 100);
    assert_true(echo_wait_messages(&f->log, 1));
    echo_server_stop(&f->echo, 50);
    assert_int_equal(atomic_load(&f->echo.closed), 1);
    assert_true(echo_wait_end(&f->log));
    assert_true(f->log.status == ATTN_ERR_UNAVAILABLE || f->log.status == ATTN_ERR_CANCELLED);
}

/* Channel, client and stream go in an order that is not the usual one. */
static void
test_stream_outlives_channel_and_client(void **state)
{
    fixture_t *f = *state;
    rpc_client_t *client;
    rpc_channel_t *channel;
    rpc_stream_t *stream[2];
    echo_log_t log[2] = {{0}};

    assert_int_equal(rpc_client_create(0, &client), ATTN_OK);
    assert_int_equal(rpc_channel_open(client, f->echo.address, &channel), ATTN_OK);
    for (int i = 0; i < 2; i++) {
        log[i].client = client;
        rpc_stream_open(channel, ECHO_STREAM, UINT64_MAX, echo_received, &log[i], &stream[i]);
        echo_send(stream[i], "", 0, block, MIB, count, &f->sent);
    }
    rpc_channel_close(channel);
    echo_send(stream[0], "", 0, block, MIB, count, &f->sent);
    rpc_stream_close(stream[0]);
    rpc_client_destroy(client);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(atomic_load(&log[i].ends), 1);
        assert_int_equal(log[i].status, ATTN_ERR_CANCELLED);
    }
    echo_send(stream[1], "", 0, block, MIB, count, &f->sent);
    rpc_stream_finish(stream[1]);
    rpc_stream_close(stream[1]);
    rpc_stream_close(NULL);
    rpc_channel_close(NULL);
    rpc_client_destroy(NULL);
    assert_true(echo_wait_count(&f->sent, 4));
}

/* The client goes while messages and the end of a stream are on their way to it. */
static void
test_client_goes_while_the_server_sends(void **state)
{
    fixture_t *f = *state;

    for (int i = 0; i < 30; i++) {
        rpc_client_t *client;
        rpc_channel_t *channel;
        rpc_stream_t *stream;
        echo_log_t log = {0};

        assert_int_equal(rpc_client_create(0, &client), ATTN_OK);
        assert_int_equal(rpc_channel_open(client, f->echo.address, &channel), ATTN_OK);
        rpc_stream_open(channel, ECHO_STREAM, UINT64_MAX, echo_received, &log, &stream);
        for (int j = 0; j < 20; j++) {
            echo_send(stream, "", (uint64_t)j, block, 1000, NULL, NULL);
        }
        rpc_stream_finish(stream);
        usleep((useconds_t)(i % 10) * 300);
        rpc_channel_close(channel);
        if (i % 2 == 0) {
            rpc_stream_close(stream);
        }
        rpc_client_destroy(client);
        assert_int_equal(atomic_load(&log.ends), 1);
        if (i % 2 != 0) {
            rpc_stream_close(stream);
        }
    }
}

static void
test_callbacks_come_without_a_waiter(void **state)
{
    fixture_t *f = *state;

    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 10; i++) {
            send_block(f, "", (uint64_t)(round * 10 + i), 5000);
        }
        assert_true(echo_wait_count(&f->log.messages, round * 10 + 10)); /* no waiter */
        usleep(30000); /* the background goes to sleep, and wakes again */
    }
    /* Then a waiter takes over from the background. */
    for (int i = 30; i < 60; i++) {
        send_block(f, "", (uint64_t)i, 5000);
        assert_true(echo_wait_messages(&f->log, i + 1));
        usleep(2000);
    }
    finish_ok(f);
}

/* ---- threads ---- */

#define THREADS 6

typedef struct worker {
    fixture_t *f;
    int index;
    int wrong;
} worker_t;

static void *
call_and_stream(void *arg)
{
    worker_t *w    = arg;
    echo_log_t log = {.client = w->f->client};
    rpc_stream_t *stream;

    rpc_stream_open(w->f->channel, ECHO_STREAM, in_ms(20000), echo_received, &log, &stream);
    for (int i = 0; i < 150; i++) {
        uint64_t number = (uint64_t)(w->index * 1000 + i);
        echo_answer_t a =
            echo_call(w->f->channel, ECHO_UNARY, "", number, 0, block, 100, in_ms(ECHO_WAIT_MS));
        w->wrong += a.status != ATTN_OK || a.number != number;
        echo_send(stream, "", (uint64_t)i, block, 3000, count, &w->f->sent);
        w->wrong += !echo_wait_messages(&log, i + 1);
    }
    rpc_stream_finish(stream);
    w->wrong += !echo_wait_end(&log) || log.status != ATTN_OK || atomic_load(&log.out_of_order);
    rpc_stream_close(stream);
    return NULL;
}

static void
test_threads_share_a_client(void **state)
{
    fixture_t *f = *state;
    pthread_t threads[THREADS];
    worker_t workers[THREADS];

    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker_t){.f = f, .index = i};
        pthread_create(&threads[i], NULL, call_and_stream, &workers[i]);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(workers[i].wrong, 0);
    }
    assert_true(echo_wait_count(&f->sent, THREADS * 150));
    assert_int_equal(atomic_load(&f->echo.in_one_call_max), 1);
}

static void *
send_some(void *arg)
{
    fixture_t *f = arg;

    for (int i = 0; i < 500; i++) {
        echo_send(f->stream, "", 0, block, 3000, count, &f->sent);
    }
    return NULL;
}

static void
test_threads_share_a_stream(void **state)
{
    fixture_t *f = *state;
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        pthread_create(&threads[i], NULL, send_some, f);
    }
    assert_true(echo_wait_messages(&f->log, 2000));
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    assert_true(echo_wait_count(&f->sent, 2000));
}

static void
test_many_streams_at_once(void **state)
{
    enum { STREAMS = 40, MESSAGES = 50 };
    fixture_t *f = *state;
    rpc_stream_t *stream[STREAMS];
    echo_log_t log[STREAMS];

    for (int i = 0; i < STREAMS; i++) {
        log[i] = (echo_log_t){.client = f->client};
        rpc_stream_open(f->channel, ECHO_STREAM, UINT64_MAX, echo_received, &log[i], &stream[i]);
    }
    for (int j = 0; j < MESSAGES; j++) {
        for (int i = 0; i < STREAMS; i++) {
            echo_send(stream[i], "", (uint64_t)j, block, 1000, NULL, NULL);
        }
    }
    for (int i = 0; i < STREAMS; i++) {
        rpc_stream_finish(stream[i]);
        assert_true(echo_wait_end(&log[i]));
        assert_int_equal(log[i].status, ATTN_OK);
        assert_int_equal(atomic_load(&log[i].messages), MESSAGES);
        assert_false(atomic_load(&log[i].out_of_order));
        rpc_stream_close(stream[i]);
    }
    assert_true(echo_wait_count(&f->echo.closed, STREAMS));
}

/* ---- waiting ---- */

static bool
is_set(void *arg)
{
    return atomic_load((atomic_int *)arg) != 0;
}

static void *
set_and_wake(void *arg)
{
    fixture_t *f = arg;

    usleep(50000);
    atomic_store(&f->sent, 1);
    rpc_client_wake(f->client);
    return NULL;
}

typedef struct waiting {
    fixture_t *f;
    atomic_int *flag;
    bool seen;
} waiting_t;

static void *
wait_for_flag(void *arg)
{
    waiting_t *w = arg;

    w->seen = rpc_client_wait(w->f->client, is_set, w->flag, in_ms(5000));
    return NULL;
}

static void
test_waits_end_by_deadline_and_by_wake(void **state)
{
    fixture_t *f     = *state;
    atomic_int never = 0;
    pthread_t waker, threads[3];
    waiting_t waiting[3];

    uint64_t start = attn_now_ns();
    assert_false(rpc_client_wait(f->client, is_set, &never, in_ms(50)));
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 49, 200);
    assert_false(rpc_client_wait(f->client, is_set, &never, 0));

    /* A leader and followers, woken by a condition that no event brings. */
    start = attn_now_ns();
    pthread_create(&waker, NULL, set_and_wake, f);
    for (int i = 0; i < 3; i++) {
        waiting[i] = (waiting_t){.f = f, .flag = &f->sent};
        pthread_create(&threads[i], NULL, wait_for_flag, &waiting[i]);
    }
    assert_true(rpc_client_wait(f->client, is_set, &f->sent, in_ms(5000)));
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_true(waiting[i].seen);
    }
    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 40, 1000);
    pthread_join(waker, NULL);
}

/* A leader whose time is up leaves the queue to the one who still waits. */
static void
test_leader_hands_over(void **state)
{
    fixture_t *f     = *state;
    atomic_int never = 0;
    pthread_t thread;
    waiting_t waiting = {.f = f, .flag = &f->log.messages};

    for (int i = 0; i < 20; i++) {
        atomic_store(&f->log.messages, 0);
        pthread_create(&thread, NULL, wait_for_flag, &waiting);
        assert_false(rpc_client_wait(f->client, is_set, &never, in_ms((uint64_t)(i % 4))));
        send_block(f, "", 0, 3000);
        pthread_join(thread, NULL);
        assert_true(waiting.seen);
    }
}

/* Opening, using and dropping at random, to find an order that breaks. */
static void
test_churn(void **state)
{
    fixture_t *f  = *state;
    uint32_t seed = 7;

    for (int round = 0; round < 60; round++) {
        rpc_channel_t *channel;
        rpc_stream_t *stream[4];
        echo_log_t log[4];

        assert_int_equal(rpc_channel_open(f->client, f->echo.address, &channel), ATTN_OK);
        for (int i = 0; i < 4; i++) {
            log[i] = (echo_log_t){.client = f->client};
            rpc_stream_open(channel, ECHO_STREAM, UINT64_MAX, echo_received, &log[i], &stream[i]);
            seed       = seed * 1664525u + 1013904223u;
            uint32_t n = (seed >> 16) % 5;
            for (uint32_t j = 0; j < n; j++) {
                echo_send(stream[i], "", j, block, (seed >> 8) % 100000, count, &f->sent);
            }
            if (seed >> 31 != 0) {
                rpc_stream_finish(stream[i]);
            }
            if (n > 0 && (seed >> 30 & 1) != 0) {
                assert_true(echo_wait_messages(&log[i], 1));
            }
        }
        if (round % 3 == 0) {
            rpc_channel_close(channel);
        }
        for (int i = 0; i < 4; i++) {
            rpc_stream_close(stream[i]);
        }
        if (round % 3 != 0) {
            rpc_channel_close(channel);
        }
        for (int i = 0; i < 4; i++) {
            assert_true(echo_wait_end(&log[i]));
            assert_int_equal(atomic_load(&log[i].ends), 1);
        }
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
#define SPIN(name) cmocka_unit_test_setup_teardown(name, setup_spinning, teardown)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_lock_step),
        SPIN(test_lock_step),
        TEST(test_many_messages_keep_their_order),
        TEST(test_large_data_in_parts),
        TEST(test_closing_early_drops_what_is_in_flight),
        TEST(test_close_inside_the_callback),
        TEST(test_server_ends_early),
        TEST(test_slow_reader_pushes_back),
        TEST(test_deaf_server_breaks_the_stream),
        TEST(test_what_was_taken_is_told),
        TEST(test_a_stream_rests),
        SPIN(test_a_stream_rests),
        TEST(test_a_resting_stream_ends),
        TEST(test_too_large_breaks_the_stream),
        TEST(test_deadline_of_a_stream),
        TEST(test_unreachable_and_unknown),
        TEST(test_server_stops_under_a_stream),
        TEST(test_stream_outlives_channel_and_client),
        TEST(test_client_goes_while_the_server_sends),
        TEST(test_callbacks_come_without_a_waiter),
        TEST(test_threads_share_a_client),
        SPIN(test_threads_share_a_client),
        TEST(test_threads_share_a_stream),
        TEST(test_many_streams_at_once),
        TEST(test_waits_end_by_deadline_and_by_wake),
        TEST(test_leader_hands_over),
        TEST(test_churn),
        SPIN(test_churn),
    };
    return cmocka_run_group_tests_name("rpc.stream", tests, NULL, NULL);
}
