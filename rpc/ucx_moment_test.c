/* ucx_moment_test.c: messages that come at a bad moment: before the last one was taken, while
 * nobody looks, when the way is gone, from who reads nothing. */
#include "ucx_fixture.h"

#include "rpc/ucx_crew_int.h"

#include <arpa/inet.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define LARGE 400000u /* bytes that are fetched, not sent */

/* ---- who looks ---- */

static void
ended(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    (void)arg, (void)status, (void)sentence;
    assert_null(message);
}

/* A stream that does not end: while it is open the client's background thread takes events off its
 * queue, as in a program that has links. It looks for no answers by itself. */
typedef struct attendant {
    int fd;
    rpc_channel_t *channel;
    rpc_stream_t *stream;
} attendant_t;

static void
attendant_open(attendant_t *a, rpc_client_t *rpc)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size        = sizeof(at);
    char address[32];

    a->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(a->fd, (struct sockaddr *)&at, sizeof(at)), 0);
    assert_int_equal(listen(a->fd, 4), 0);
    assert_int_equal(getsockname(a->fd, (struct sockaddr *)&at, &size), 0);
    snprintf(address, sizeof(address), "127.0.0.1:%u", ntohs(at.sin_port));
    assert_int_equal(rpc_channel_open(rpc, address, &a->channel), ATTN_OK);
    assert_int_equal(rpc_stream_open(a->channel, "/none", UINT64_MAX, ended, NULL, &a->stream),
                     ATTN_OK);
}

static void
attendant_close(attendant_t *a)
{
    rpc_stream_close(a->stream);
    rpc_channel_close(a->channel);
    close(a->fd);
}

static bool
await(const question_t *q)
{
    for (int i = 0; i < 10000 && !atomic_load(&q->answered); i++) {
        usleep(1000);
    }
    return atomic_load(&q->answered);
}

/* Nobody waits: the watchman and the background thread see to it. */
static void
test_unattended_asks(void **state)
{
    fixture_t f;
    question_t q;
    attendant_t a;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 100, 100);
    attendant_open(&a, f.sides[0].rpc);
    for (uint32_t i = 0; i < 50; i++) {
        question_ask(&q, i, 0, false);
        assert_true(await(&q));
        question_check(&q, i);
    }
    attendant_close(&a);
    question_close(&q);
    fixture_close(&f);
}

/* Nothing will come of it that wakes anybody. */
static void
test_an_unattended_ask_of_a_broken_way(void **state)
{
    fixture_t f;
    question_t q;
    attendant_t a;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 100, 100);
    question_round(&f.sides[0], &q, 1);
    attendant_open(&a, f.sides[0].rpc);
    usleep(20000); /* the background thread has begun to sleep in the queue */
    pthread_mutex_lock(&f.sides[0].asks->lock);
    q.peer->broken = true;
    pthread_mutex_unlock(&f.sides[0].asks->lock);
    atomic_store(&f.hold, true); /* no answer comes that would wake somebody */
    question_ask(&q, 3, FLAG_SLOW, false);
    assert_true(await(&q));
    atomic_store(&f.hold, false);
    assert_int_equal(q.reply.status, ATTN_ERR_UNAVAILABLE);
    attendant_close(&a);
    question_close(&q);
    fixture_close(&f);
}

static bool
count_looks(void *arg)
{
    ++*(unsigned *)arg;
    return false;
}

/* An answer comes that nobody waits for any more, while somebody waits for gRPC alone: it is taken
 * off the port, or who waits would be woken for it for ever. */
static void
test_what_nobody_waits_for_wakes_once(void **state)
{
    fixture_t f;
    question_t q;
    unsigned looks = 0;

    (void)state;
    fixture_open(&f, 0, 0);
    question_open(&f, &f.sides[0], &q, 64, 64);
    atomic_store(&f.hold, true);
    question_ask(&q, 1, FLAG_SLOW, true);
    await_held(&f);
    ucx_forget(&q.ask);
    atomic_store(&f.hold, false);
    rpc_client_wait(f.sides[0].rpc, count_looks, &looks, attn_now_ns() + 300 * ATTN_NS_PER_MS);
    assert_in_range(looks, 1, 50); /* thousands otherwise */
    question_close(&q);
    fixture_close(&f);
}

/* ---- what comes too soon, or too often ---- */

/* From the client, as one that keeps to nothing sends it; nothing is received meanwhile. */
static void
send_aside(side_t *side, ucx_head_t *head, const uint8_t *data, uint64_t bytes)
{
    pthread_mutex_lock(&side->asks->lock);
    ucx_way_send(side->peer->way, head, data, bytes);
    pthread_mutex_unlock(&side->asks->lock);
}

static ucx_head_t
request_to(const side_t *side, const question_t *q, uint64_t bytes, uint64_t sequence)
{
    return (ucx_head_t){.secret   = side->peer->secret,
                        .tag      = TAG,
                        .bytes    = bytes,
                        .number   = (uint32_t)sequence,
                        .offset   = q->ask.place.offset,
                        .sequence = sequence};
}

/* Both come at once, and the second, which is fetched, must not be put where the first lies. */
static void
test_a_second_request_before_the_first_was_taken(void **state)
{
    static const uint8_t data[LARGE];
    fixture_t f;
    question_t q;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, LARGE, 64);
    question_round(&f.sides[0], &q, 1);
    for (uint64_t i = 1; i <= 5; i++) {
        ucx_head_t first  = request_to(&f.sides[0], &q, 64, 10 * i);
        ucx_head_t second = request_to(&f.sides[0], &q, LARGE, 10 * i + 1);
        ucx_crew_lock(f.crew); /* so that the server finds both */
        send_aside(&f.sides[0], &first, data, 64);
        send_aside(&f.sides[0], &second, data, LARGE);
        pthread_mutex_unlock(&f.crew->lock);
        await_dropped(&f, i);
        for (int w = 0; w < 5000 && atomic_load(&f.handled) < i + 1; w++) {
            ucx_asks_look(f.sides[0].asks);
            usleep(1000);
        }
        assert_int_equal(atomic_load(&f.handled), i + 1);
    }
    question_close(&q);
    fixture_close(&f);
}

static void
test_a_hello_is_answered_once(void **state)
{
    fixture_t f;
    question_t q;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    for (unsigned i = 0; i < 100; i++) {
        send_aside(&f.sides[0], &f.sides[0].peer->hello, NULL, 0);
    }
    await_dropped(&f, 100);
    question_round(&f.sides[0], &q, 1);
    question_close(&q);
    fixture_close(&f);
}

static bool
was_answered(fixture_t *f, const question_t *q, uint64_t sequence)
{
    ucx_crew_lock(f->crew);
    bool answered_now = q->slot->sequence == sequence && !q->slot->running;
    pthread_mutex_unlock(&f->crew->lock);
    return answered_now;
}

/* A client that asks and takes no answers: not more than so many wait for it. */
static void
test_a_client_that_takes_nothing(void **state)
{
    static const uint8_t data[64];
    static ucx_head_t heads[1000];
    fixture_t f;
    question_t q;
    unsigned before = atomic_load(&n_broken), n = 0;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, LARGE); /* an answer waits until it is fetched */
    question_round(&f.sides[0], &q, 1);
    while (n < 1000 && atomic_load(&n_broken) == before) {
        heads[n] = request_to(&f.sides[0], &q, 64, n + 2);
        send_aside(&f.sides[0], &heads[n], data, 64);
        n++;
        for (int i = 0;
             i < 5000 && !was_answered(&f, &q, n + 1) && atomic_load(&n_broken) == before; i++) {
            usleep(200);
        }
    }
    assert_int_equal(atomic_load(&n_broken), before + 1);
    assert_in_range(n, UCX_SESSION_SLOTS_MAX, 300);
    question_close(&q);
    fixture_close(&f);
}

/* ---- ends ---- */

/* The crew ends while a closed slot's data is on its way. */
static void
test_the_end_amid_a_message(void **state)
{
    static const uint8_t data[LARGE];
    fixture_t f;
    question_t q;
    bool receives = false;

    (void)state;
    fixture_open(&f, 0, 50);
    side_close(&f.sides[1]);
    question_open(&f, &f.sides[0], &q, LARGE, 64);
    question_round(&f.sides[0], &q, 1);
    ucx_head_t head = request_to(&f.sides[0], &q, LARGE, 2);
    send_aside(&f.sides[0], &head, data, LARGE);
    for (int i = 0; i < 5000 && !receives; i++) {
        usleep(1000);
        ucx_crew_lock(f.crew);
        receives = q.slot->receiving;
        pthread_mutex_unlock(&f.crew->lock);
    }
    assert_true(receives);
    ucx_crew_lock(f.crew); /* nobody leads, so nobody tidies */
    f.crew->stopping = true;
    pthread_mutex_unlock(&f.crew->lock);
    ucx_slot_close(q.slot);
    ucx_session_close(f.sides[0].session);
    f.sides[0].session = NULL;
    assert_int_equal(atomic_load(&f.gone), 0);
    ucx_crew_destroy(f.crew);
    assert_int_equal(atomic_load(&f.gone), 1);
    ucx_forget(&q.ask);
    ucx_place_give(q.peer, &q.ask.place);
    free(q.data);
    side_close(&f.sides[0]);
}

static void
test_a_refused_address_changes_nothing(void **state)
{
    fixture_t f;
    ucx_offer_t offer;

    (void)state;
    fixture_open(&f, 0, 50);
    ucx_session_offer(f.sides[0].session, &offer);
    assert_int_equal(
        ucx_session_answer(f.sides[0].session, offer.address, offer.address_size, NULL),
        ATTN_ERR_INVALID);
    assert_ptr_equal(f.sides[0].session->on_broken, broken);
    fixture_close(&f);
}

/* A way that is closed leaves nothing behind. */
static void
test_ways_are_freed(void **state)
{
    fixture_t f;
    ucx_offer_t offer;
    ucx_peer_t *peer;
    size_t before = 0;

    (void)state;
    fixture_open(&f, 0, 50);
    ucx_session_offer(f.sides[1].session, &offer);
    for (unsigned i = 0; i < 90; i++) {
        if (i == 30) {
            before = mallinfo2().uordblks;
        }
        assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
        ucx_peer_close(peer);
    }
    assert_true(mallinfo2().uordblks < before + 60 * 16384);
    fixture_close(&f);
}

/* ---- ways that UCX pairs with others ---- */

/* A way that the server never heard of, and later ones are each other's: they are refused as such,
 * and then there is a port anew. */
static void
test_a_way_of_one_side_alone(void **state)
{
    fixture_t f;
    question_t q;
    ucx_offer_t offer;
    ucx_session_t *session;
    ucx_peer_t *peer;
    const uint8_t *address;
    uint64_t size;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, LARGE, LARGE);
    ucx_session_offer(f.sides[1].session, &offer);
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
    ucx_peer_close(peer);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t start = attn_now_ns();
        assert_int_equal(ucx_session_open(f.crew, SLAB, NULL, NULL, &session), ATTN_OK);
        ucx_session_offer(session, &offer);
        assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
        assert_true(ucx_peer_address(peer, &address, &size));
        assert_int_equal(ucx_session_answer(session, address, size, broken), ATTN_OK);
        /* Mostly it is told at once; but what crosses may also be lost. */
        assert_int_equal(ucx_peer_greet(peer, start + (i == 0 ? WAIT_NS / 20 : WAIT_NS)),
                         i == 0 ? ATTN_ERR_UNSUPPORTED : ATTN_OK);
        question_round(&f.sides[0], &q, i); /* what was there goes on */
        ucx_peer_close(peer);
        ucx_session_close(session);
        question_round(&f.sides[0], &q, i + 10);
    }
    question_close(&q);
    fixture_close(&f);
}

/* All of it is right but the way: it cannot be told when that one's data will not come any more. */
static void
test_what_is_fetched_comes_by_its_own_way(void **state)
{
    static const uint8_t data[LARGE];
    bool gone                  = false;
    const ucx_port_user_t user = nobody(&gone);
    fixture_t f;
    question_t q;
    ucx_offer_t offer;
    ucx_port_t *port;
    ucx_way_t *way;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, LARGE, 64);
    question_round(&f.sides[0], &q, 1);
    ucx_session_offer(f.sides[0].session, &offer);
    assert_int_equal(ucx_port_create("lo", &user, &port), ATTN_OK);
    assert_int_equal(ucx_way_open(port, offer.address, offer.address_size, NULL, &way), ATTN_OK);
    ucx_head_t head = request_to(&f.sides[0], &q, LARGE, 2);
    ucx_way_send(way, &head, data, LARGE);
    for (int i = 0; i < 50000 && dropped(&f) < 1; i++) {
        ucx_port_progress(port);
        usleep(100);
    }
    assert_int_equal(dropped(&f), 1);
    assert_int_equal(atomic_load(&f.handled), 1);
    ucx_port_destroy(port);
    question_round(&f.sides[0], &q, 2);
    question_close(&q);
    fixture_close(&f);
}

static void
test_devices_that_lead_to_a_worker(void **state)
{
    char devices[512];

    (void)state;
    assert_int_equal(ucx_devices_to("127.0.0.1:9", devices, sizeof(devices)), ATTN_OK);
    assert_string_equal(devices, "all"); /* of UCX_NET_DEVICES */
    unsetenv("UCX_NET_DEVICES");
    assert_int_equal(ucx_devices_to("127.0.0.1:9", devices, sizeof(devices)), ATTN_OK);
    assert_int_equal(strncmp(devices, "lo", 2), 0);
    assert_true(devices[2] == '\0' || devices[2] == ',');
    assert_int_equal(ucx_devices_to("dns:///localhost:9", devices, sizeof(devices)), ATTN_OK);
    assert_int_equal(strncmp(devices, "lo", 2), 0);
    static const char *const none[] = {"", ":9", "[]:9", "unix:/a/b/", "256.1.1.1:9"};
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
        assert_int_equal(ucx_devices_to(none[i], devices, sizeof(devices)), ATTN_ERR_UNSUPPORTED);
    }
    assert_int_equal(ucx_devices_to(NULL, devices, sizeof(devices)), ATTN_ERR_UNSUPPORTED);
    setenv("UCX_NET_DEVICES", "lo", 1);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unattended_asks),
        cmocka_unit_test(test_an_unattended_ask_of_a_broken_way),
        cmocka_unit_test(test_what_nobody_waits_for_wakes_once),
        cmocka_unit_test(test_a_second_request_before_the_first_was_taken),
        cmocka_unit_test(test_a_hello_is_answered_once),
        cmocka_unit_test(test_a_client_that_takes_nothing),
        cmocka_unit_test(test_the_end_amid_a_message),
        cmocka_unit_test(test_a_refused_address_changes_nothing),
        cmocka_unit_test(test_ways_are_freed),
        cmocka_unit_test(test_a_way_of_one_side_alone),
        cmocka_unit_test(test_what_is_fetched_comes_by_its_own_way),
        cmocka_unit_test(test_devices_that_lead_to_a_worker),
    };

    messages = true;
    setenv("UCX_NET_DEVICES", "lo", 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
