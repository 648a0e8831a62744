/* ucx_far_test.c: what messages alone can meet: strangers, forged and late answers, peers that
 * cannot be reached, are killed, or stop. What they have in common with shared memory is in
 * ucx_test.c. */
#include "ucx_fixture.h"

#include "rpc/ucx_crew_int.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define LARGE 400000u /* bytes that are fetched, not sent */

/* ---- what is dropped ---- */

static void
send_request(side_t *side, ucx_head_t *head, const uint8_t *data, uint64_t bytes)
{
    pthread_mutex_lock(&side->asks->lock);
    ucx_way_send(side->peer->way, head, data, bytes);
    for (int i = 0; i < 2000; i++) {
        ucx_asks_far_progress(side->asks);
    }
    pthread_mutex_unlock(&side->asks->lock);
}

static void
test_requests_that_are_none(void **state)
{
    static const uint8_t data[LARGE];
    fixture_t f;
    question_t q;
    uint64_t n = 0;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    question_round(&f.sides[0], &q, 1);
    question_round(&f.sides[0], &q, 2);
    const ucx_head_t good = {.secret   = f.sides[0].peer->secret,
                             .tag      = TAG,
                             .bytes    = 64,
                             .offset   = q.ask.place.offset,
                             .sequence = 100};
    ucx_head_t bad[8];
    for (unsigned i = 0; i < 8; i++) {
        memcpy(&bad[i], &good, sizeof(good));
    }
    bad[0].secret++;
    bad[1].secret = f.sides[1].peer->secret; /* of another session, which has no such slot */
    bad[2].tag++;
    bad[3].offset += 64;
    bad[4].bytes    = 63;
    bad[5].bytes    = UINT64_MAX;
    bad[6].sequence = 2; /* answered before */
    bad[7].sequence = 0;
    for (unsigned i = 0; i < 8; i++) {
        send_request(&f.sides[0], &bad[i], data, 64);
        await_dropped(&f, ++n);
    }
    bad[0].secret = good.secret;
    bad[0].bytes  = 65;
    send_request(&f.sides[0], &bad[0], data, 65); /* more than there is room for */
    await_dropped(&f, ++n);
    bad[0].bytes = LARGE;
    send_request(&f.sides[0], &bad[0], data, LARGE);
    await_dropped(&f, ++n);
    assert_int_equal(atomic_load(&f.handled), 2);
    question_round(&f.sides[0], &q, 3); /* nobody was harmed */
    question_close(&q);
    fixture_close(&f);
}

/* Somebody who knows the server's address and nothing else. */
static void
test_strangers(void **state)
{
    static uint8_t data[LARGE];
    bool gone                  = false;
    const ucx_port_user_t user = nobody(&gone);
    fixture_t f;
    question_t q;
    ucx_offer_t offer;
    ucx_port_t *port;
    ucx_way_t *way;
    ucx_head_t heads[40];
    uint64_t random = 88172645463325252u;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    ucx_session_offer(f.sides[0].session, &offer);
    assert_int_equal(ucx_port_create("lo", &user, &port), ATTN_OK);
    assert_int_equal(ucx_way_open(port, offer.address, offer.address_size, NULL, &way), ATTN_OK);
    for (unsigned i = 0; i < 40; i++) {
        for (unsigned w = 0; w < 8; w++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            memcpy((uint8_t *)&heads[i] + 8 * w, &random, 8);
        }
        if (i % 2 == 0) {
            heads[i].bytes = i % 3 == 0 ? LARGE : 64;
        }
        ucx_way_send(way, &heads[i], data, i % 3 == 0 ? LARGE : 64);
        ucx_port_progress(port);
    }
    for (int i = 0; i < 5000 && dropped(&f) < 40; i++) {
        ucx_port_progress(port);
        question_round(&f.sides[0], &q, (uint32_t)i);
    }
    assert_int_equal(dropped(&f), 40);
    ucx_way_close(way);
    for (int i = 0; i < 100000 && !gone; i++) {
        ucx_port_progress(port);
    }
    assert_true(gone);
    ucx_port_destroy(port);
    question_round(&f.sides[0], &q, 9);
    question_close(&q);
    fixture_close(&f);
}

static uint64_t
answers_dropped(side_t *side)
{
    ucx_asks_look(side->asks);
    return ucx_asks_dropped(side->asks);
}

static void
send_answer(fixture_t *f, side_t *side, ucx_head_t *head, const uint8_t *data, uint64_t bytes)
{
    ucx_crew_lock(f->crew);
    ucx_way_send(side->session->way, head, data, bytes);
    pthread_mutex_unlock(&f->crew->lock);
    ucx_crew_kick(f->crew);
}

/* A server that answers what was not asked, or twice, or more than there is room for. */
static void
test_answers_that_are_none(void **state)
{
    static const uint8_t data[1024];
    fixture_t f;
    question_t q;
    uint64_t n = 0;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    question_round(&f.sides[0], &q, 1);
    atomic_store(&f.hold, true);
    question_ask(&q, 2, FLAG_SLOW, true); /* an answer is waited for: number 2 */
    await_held(&f);
    const ucx_head_t good = {.secret   = f.sides[0].peer->secret,
                             .tag      = TAG,
                             .bytes    = 64,
                             .number   = 7,
                             .offset   = q.ask.place.offset,
                             .sequence = 2};
    ucx_head_t bad[7];
    for (unsigned i = 0; i < 7; i++) {
        memcpy(&bad[i], &good, sizeof(good));
    }
    bad[0].secret++;
    bad[1].sequence = 1; /* late: it was answered */
    bad[2].sequence = 3;
    bad[3].offset += 64;
    bad[4].bytes = 65;
    bad[5].bytes = 63;
    for (unsigned i = 0; i < 6; i++) {
        send_answer(&f, &f.sides[0], &bad[i], data, bad[i].bytes == 65 ? 65 : 64);
        n++;
        for (int w = 0; w < 5000 && answers_dropped(&f.sides[0]) < n; w++) {
            usleep(1000);
        }
        assert_int_equal(answers_dropped(&f.sides[0]), n);
        assert_false(atomic_load(&q.answered));
    }
    bad[6].status = ATTN_ERR_CONFLICT;
    bad[6].bytes  = 1024; /* a sentence that is too long */
    send_answer(&f, &f.sides[0], &bad[6], data, 1024);
    for (int w = 0; w < 5000 && answers_dropped(&f.sides[0]) < 7; w++) {
        usleep(1000);
    }
    assert_int_equal(answers_dropped(&f.sides[0]), 7);
    atomic_store(&f.hold, false);
    assert_true(rpc_client_wait(f.sides[0].rpc, is_done, &q, attn_now_ns() + WAIT_NS));
    question_check(&q, 2);
    question_close(&q);
    fixture_close(&f);
}

/* Asked, and no longer waited for when the answer comes; its place is asked again. */
static void
test_answers_that_are_late(void **state)
{
    fixture_t f;
    question_t q;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    atomic_store(&f.hold, true);
    question_ask(&q, 1, FLAG_SLOW, true);
    await_held(&f);
    ucx_forget(&q.ask);
    atomic_store(&f.hold, false);
    for (int i = 0; i < 5000 && q.times == 0; i++) { /* a slot that is busy drops it */
        question_ask(&q, 2, 0, true);
        rpc_client_wait(f.sides[0].rpc, is_done, &q, attn_now_ns() + 20 * ATTN_NS_PER_MS);
    }
    question_check(&q, 2);
    question_close(&q);
    fixture_close(&f);
}

/* ---- who cannot be reached ---- */

static void
test_offers_of_messages(void **state)
{
    fixture_t f;
    ucx_offer_t offer, bad;
    ucx_peer_t *peer;

    (void)state;
    fixture_open(&f, 0, 50);
    ucx_session_offer(f.sides[1].session, &offer);
    bad = offer;
    snprintf(bad.version, sizeof(bad.version), "9.1");
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), "9.1"));
    bad              = offer;
    bad.address_size = 0;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    bad.address_size = UCX_ADDRESS_MAX + 1;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    bad       = offer;
    bad.bytes = UCX_SLAB_MAX + 1;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    for (int i = 0; i < 30; i++) { /* the last peer takes the watchman along, and one more comes */
        assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
        ucx_peer_close(peer);
    }
    assert_int_equal(
        ucx_session_answer(f.sides[0].session, offer.address, offer.address_size, NULL),
        ATTN_ERR_INVALID); /* it was told one */
    fixture_close(&f);
}

/* A server that never hears where its answers go. */
static void
test_a_greeting_without_an_answer(void **state)
{
    fixture_t f;
    ucx_session_t *session;
    ucx_offer_t offer;
    ucx_peer_t *peer;

    (void)state;
    fixture_open(&f, 0, 50);
    assert_int_equal(ucx_session_open(f.crew, SLAB, NULL, NULL, &session), ATTN_OK);
    ucx_session_offer(session, &offer);
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
    uint64_t start = attn_now_ns();
    assert_int_equal(ucx_peer_greet(peer, start + 200 * ATTN_NS_PER_MS), ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), "no message"));
    assert_true(attn_now_ns() - start >= 200 * ATTN_NS_PER_MS);
    ucx_peer_close(peer);
    ucx_session_close(session);
    fixture_close(&f);
}

static void
test_devices_that_are_none(void **state)
{
    ucx_crew_options_t options = {.network = "eth9", .memory_max = SLAB};
    ucx_crew_t *crew;

    (void)state;
    assert_int_equal(ucx_crew_create(&options, &crew), ATTN_ERR_UNSUPPORTED);
}

/* ---- peers that are killed, or stop ---- */

/* This program as a server, or as a client: it tells its address, and is told the other's. */
typedef struct other {
    pid_t pid;
    int fd;
} other_t;

static other_t
other_start(const char *role)
{
    other_t other;
    char text[16];
    int fds[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    other.pid = fork();
    if (other.pid == 0) {
        snprintf(text, sizeof(text), "%d", fds[1]);
        execl("/proc/self/exe", "ucx_far_test", role, text, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    other.fd = fds[0];
    return other;
}

static void
other_end(other_t *other)
{
    kill(other->pid, SIGKILL);
    assert_int_equal(waitpid(other->pid, NULL, 0), other->pid);
    close(other->fd);
}

static void
pass_offer(int fd, ucx_offer_t *offer, uint8_t address[UCX_ADDRESS_MAX], bool out)
{
    pass(fd, offer, sizeof(*offer), out);
    pass(fd, out ? (void *)offer->address : address, offer->address_size, out);
    offer->address = out ? offer->address : address;
}

static void
pass_address(int fd, const uint8_t **address, uint64_t *size, uint8_t room[UCX_ADDRESS_MAX],
             bool out)
{
    pass(fd, size, sizeof(*size), out);
    pass(fd, out ? (void *)*address : room, *size, out);
    *address = out ? *address : room;
}

/* Asks without end; `sized` bytes each way. */
static int
be_client(int fd, uint64_t size)
{
    static uint8_t room[UCX_ADDRESS_MAX];
    side_t side  = {0};
    question_t q = {.ask = {.answered = answered, .arg = &q}};
    const uint8_t *address;
    uint64_t address_size;
    ucx_offer_t offer;
    char ready = 'r';

    pass_offer(fd, &offer, room, false);
    q.data = malloc(size + 1);
    if (rpc_client_create(50, &side.rpc) != ATTN_OK ||
        ucx_asks_create(side.rpc, &side.asks) != ATTN_OK ||
        ucx_peer_open(side.asks, &offer, &q.peer) != ATTN_OK) {
        return 4;
    }
    ucx_peer_address(q.peer, &address, &address_size);
    pass_address(fd, &address, &address_size, NULL, true);
    if (ucx_peer_greet(q.peer, attn_now_ns() + WAIT_NS) != ATTN_OK ||
        !ucx_place_take(q.peer, size, size, &q.ask.place)) {
        return 5;
    }
    pass(fd, &q.ask.place, sizeof(q.ask.place), true);
    pass(fd, &ready, 1, false); /* the slot is open */
    for (uint32_t i = 0;; i++) {
        question_ask(&q, i, 0, true);
        if (!rpc_client_wait(side.rpc, is_done, &q, attn_now_ns() + WAIT_NS)) {
            return 6;
        }
        if (i == 20) {
            pass(fd, &ready, 1, true);
        }
    }
}

/* A session for the process, and a slot, in which it asks. */
static void
admit(fixture_t *f, other_t *other, ucx_session_t **session, ucx_slot_t **slot)
{
    static uint8_t room[UCX_ADDRESS_MAX];
    echo_t *e = malloc(sizeof(*e));
    const uint8_t *address;
    uint64_t size;
    ucx_offer_t offer;
    ucx_place_t place;
    char ready = 's';

    assert_int_equal(ucx_session_open(f->crew, SLAB, NULL, NULL, session), ATTN_OK);
    ucx_session_offer(*session, &offer);
    pass_offer(other->fd, &offer, NULL, true);
    pass_address(other->fd, &address, &size, room, false);
    assert_int_equal(ucx_session_answer(*session, address, size, broken), ATTN_OK);
    pass(other->fd, &place, sizeof(place), false);
    *e = (echo_t){.f = f, .out = place.out};
    assert_int_equal(ucx_slot_open(*session, &place, TAG, echo, gone, e, slot), ATTN_OK);
    pass(other->fd, &ready, 1, true);
    pass(other->fd, &ready, 1, false); /* it asks away */
}

static void
await_slab_bytes(fixture_t *f, uint64_t bytes)
{
    ucx_figures_t figures = {.slab_bytes = UINT64_MAX};

    for (int i = 0; i < 5000 && figures.slab_bytes > bytes; i++) {
        usleep(1000);
        ucx_crew_describe(f->crew, &figures);
    }
    assert_int_equal(figures.slab_bytes, bytes);
}

static void
client_dies(const char *role, bool stops)
{
    fixture_t f;
    question_t good;
    ucx_session_t *session;
    ucx_slot_t *slot;

    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[1], &good, 64, 64);
    for (uint32_t round = 0; round < 6; round++) { /* in whatever it is at */
        other_t other   = other_start(role);
        unsigned before = atomic_load(&n_broken);
        admit(&f, &other, &session, &slot);
        usleep(500 * round);
        kill(other.pid, stops ? SIGSTOP : SIGKILL);
        question_round(&f.sides[1], &good, 1);
        for (int i = 0; i < 5000 && !stops && atomic_load(&n_broken) == before; i++) {
            usleep(1000);
        }
        assert_int_equal(atomic_load(&n_broken), before + (stops ? 0 : 1));
        uint64_t start = attn_now_ns();
        ucx_slot_close(slot);
        ucx_session_close(session);
        assert_true(attn_now_ns() - start < 1000 * ATTN_NS_PER_MS);
        question_round(&f.sides[1], &good, 2);
        await_slab_bytes(&f, 2 * SLAB); /* also while it still is stopped */
        other_end(&other);
        question_round(&f.sides[1], &good, 3);
    }
    question_close(&good);
    fixture_close(&f);
}

static void
test_a_client_that_is_killed(void **state)
{
    (void)state;
    client_dies("client", false);
}

static void
test_a_client_that_is_killed_amid_large_messages(void **state)
{
    (void)state;
    client_dies("large-client", false);
}

static void
test_a_client_that_stops(void **state)
{
    (void)state;
    client_dies("client", true);
}

static void
test_a_client_that_stops_amid_large_messages(void **state)
{
    (void)state;
    client_dies("large-client", true);
}

/* Answers until it is killed; one session, one slot. */
static int
be_server(int fd)
{
    static uint8_t room[UCX_ADDRESS_MAX];
    static fixture_t f;
    ucx_crew_options_t options = {
        .network = "lo", .spin_us = 50, .threads = 2, .memory_max = 16 * SLAB};
    echo_t *e = malloc(sizeof(*e));
    const uint8_t *address;
    uint64_t size;
    ucx_session_t *session;
    ucx_slot_t *slot;
    ucx_offer_t offer;
    ucx_place_t place;

    if (ucx_crew_create(&options, &f.crew) != ATTN_OK ||
        ucx_session_open(f.crew, SLAB, NULL, NULL, &session) != ATTN_OK) {
        return 4;
    }
    ucx_session_offer(session, &offer);
    pass_offer(fd, &offer, NULL, true);
    pass_address(fd, &address, &size, room, false);
    if (ucx_session_answer(session, address, size, broken) != ATTN_OK) {
        return 5;
    }
    pass(fd, &place, sizeof(place), false);
    *e = (echo_t){.f = &f, .out = place.out};
    if (ucx_slot_open(session, &place, TAG, echo, gone, e, &slot) != ATTN_OK) {
        return 6;
    }
    pass(fd, &place, 1, true); /* it is open */
    for (;;) {
        pause();
    }
}

static void
server_dies(uint64_t size, bool stops)
{
    static uint8_t room[UCX_ADDRESS_MAX];
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    char ready;

    assert_int_equal(rpc_client_create(50, &rpc), ATTN_OK);
    assert_int_equal(ucx_asks_create(rpc, &asks), ATTN_OK);
    for (uint32_t round = 0; round < 4; round++) {
        question_t q  = {.ask = {.answered = answered, .arg = &q}, .data = malloc(size + 1)};
        other_t other = other_start("server");
        const uint8_t *address;
        uint64_t address_size;
        ucx_offer_t offer;
        pass_offer(other.fd, &offer, room, false);
        assert_int_equal(ucx_peer_open(asks, &offer, &q.peer), ATTN_OK);
        assert_true(ucx_peer_address(q.peer, &address, &address_size));
        pass_address(other.fd, &address, &address_size, NULL, true);
        assert_int_equal(ucx_peer_greet(q.peer, attn_now_ns() + WAIT_NS), ATTN_OK);
        assert_true(ucx_place_take(q.peer, size, size, &q.ask.place));
        pass(other.fd, &q.ask.place, sizeof(q.ask.place), true);
        pass(other.fd, &ready, 1, false);
        for (uint32_t i = 0; i < 10; i++) {
            question_ask(&q, i, 0, true);
            assert_true(rpc_client_wait(rpc, is_done, &q, attn_now_ns() + WAIT_NS));
            question_check(&q, i);
        }
        if (round % 2 == 0) {
            question_ask(&q, 11, 0, true);
        }
        kill(other.pid, stops ? SIGSTOP : SIGKILL);
        if (round % 2 == 1) {
            question_ask(&q, 11, 0, true);
        }
        rpc_client_wait(rpc, is_done, &q, attn_now_ns() + (stops ? 100 * ATTN_NS_PER_MS : WAIT_NS));
        assert_true(atomic_load(&q.answered) || stops);
        if (atomic_load(&q.answered) && q.reply.status != ATTN_OK) {
            assert_int_equal(q.reply.status, ATTN_ERR_UNAVAILABLE);
            assert_non_null(strstr(q.sentence, "broke"));
            assert_true(ucx_peer_is_broken(q.peer));
        } else if (atomic_load(&q.answered)) { /* it was faster */
            question_check(&q, 11);
        }
        uint64_t start = attn_now_ns();
        ucx_forget(&q.ask);
        ucx_peer_close(q.peer);
        assert_true(attn_now_ns() - start < 1000 * ATTN_NS_PER_MS);
        other_end(&other);
        free(q.data);
    }
    rpc_client_destroy(rpc);
    ucx_asks_destroy(asks);
}

static void
test_a_server_that_is_killed(void **state)
{
    (void)state;
    server_dies(4096, false);
    server_dies(LARGE, false);
}

static void
test_a_server_that_stops(void **state)
{
    (void)state;
    server_dies(4096, true);
    server_dies(LARGE, true);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests_that_are_none),
        cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_answers_that_are_none),
        cmocka_unit_test(test_answers_that_are_late),
        cmocka_unit_test(test_offers_of_messages),
        cmocka_unit_test(test_a_greeting_without_an_answer),
        cmocka_unit_test(test_devices_that_are_none),
        cmocka_unit_test(test_a_client_that_is_killed),
        cmocka_unit_test(test_a_client_that_is_killed_amid_large_messages),
        cmocka_unit_test(test_a_client_that_stops),
        cmocka_unit_test(test_a_client_that_stops_amid_large_messages),
        cmocka_unit_test(test_a_server_that_is_killed),
        cmocka_unit_test(test_a_server_that_stops),
    };

    messages = true;
    setenv("UCX_NET_DEVICES", "lo", 1);
    if (argc == 3) {
        int fd = atoi(argv[2]);
        return strcmp(argv[1], "server") == 0 ? be_server(fd)
                                              : be_client(fd, argv[1][0] == 'l' ? LARGE : 4096);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
