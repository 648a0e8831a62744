/* ucx_test.c: sessions, slots and asks, both sides in one process; the peer that is killed is
 * another one, this program with an argument. All of it over shared memory, and with the argument
 * "messages" over those. */
#include "ucx_fixture.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- tests ---- */

/* Of each size so many, or at least 20 and as many as there are seconds for: with a sanitizer,
 * where cores are busy, a sleeper that wakes takes a hundred times as long. */
static void
rounds(uint32_t server_spin_us, uint32_t client_spin_us, uint32_t n, bool dawdle)
{
    static const uint64_t sizes[][2] = {{0, 1},         {1, 0},          {64, 64},
                                        {16384, 16384}, {100000, 60001}, {400000, 300000}};
    fixture_t f;
    question_t q;

    fixture_open(&f, server_spin_us, client_spin_us);
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        question_open(&f, &f.sides[0], &q, sizes[s][0], sizes[s][1]);
        uint64_t end = attn_now_ns() + 1000 * ATTN_NS_PER_MS;
        for (uint32_t i = 0; i < n && (i < 20 || attn_now_ns() < end); i++) {
            if (dawdle) {
                usleep((unsigned)(rand() % 120));
            }
            question_round(&f.sides[0], &q, i);
        }
        question_close(&q);
    }
    fixture_close(&f);
}

static void
test_requests_are_answered(void **state)
{
    (void)state;
    rounds(50, 50, 300, false);
}

/* Everybody sleeps at once, or may just be about to: no wake-up is lost. */
static void
test_sleepers_wake(void **state)
{
    (void)state;
    rounds(0, 0, 200, false);
    rounds(0, 50, 200, false);
    rounds(50, 0, 200, false);
    rounds(30, 30, 200, true);
}

/* Nobody waits: the server rings, and the background thread of the client looks. */
static void
test_answers_without_a_waiter(void **state)
{
    fixture_t f;
    question_t q;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, 100, 100);
    question_ask(&q, 4, 0, false);
    for (int i = 0; i < 1000 && atomic_load(&f.handled) == 0; i++) {
        usleep(1000);
    }
    /* What a ring's message would have called. */
    for (int i = 0; i < 1000 && !atomic_load(&q.answered); i++) {
        ucx_asks_look(f.sides[0].asks);
        usleep(1000);
    }
    question_check(&q, 4);
    ucx_figures_t figures;
    ucx_crew_describe(f.crew, &figures);
    assert_int_equal(figures.rings, messages ? 0 : 1); /* a client of messages wakes itself */
    question_close(&q);
    fixture_close(&f);
}

static void
test_failures_bring_their_sentence(void **state)
{
    fixture_t f;
    question_t q;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, 8, 8);
    question_ask(&q, 9, FLAG_FAIL, true);
    assert_true(rpc_client_wait(f.sides[0].rpc, is_done, &q, attn_now_ns() + WAIT_NS));
    assert_int_equal(q.reply.status, ATTN_ERR_CONFLICT);
    assert_string_equal(q.sentence, "number 9 is not wanted");
    question_round(&f.sides[0], &q, 10);
    question_close(&q);
    fixture_close(&f);
}

/* Write a request into a slot as a peer would that keeps to nothing. */
static void
forge(question_t *q, ucx_head_t head, uint64_t sequence)
{
    uint8_t *slab       = ucx_place_data(q->peer, &q->ask.place) - UCX_LINE - q->ask.place.offset;
    ucx_head_t *request = ucx_request_at(slab, &q->ask.place);
    ucx_card_t *card    = (ucx_card_t *)(void *)slab;

    memcpy(request, &head, offsetof(ucx_head_t, sequence));
    atomic_store(&request->sequence, sequence);
    atomic_fetch_add(&card->bell, 1);
    ucx_futex_wake(&card->bell);
}

static void
test_strangers_requests_are_dropped(void **state)
{
    fixture_t f;
    question_t q;
    ucx_offer_t offer;

    (void)state;
    fixture_open(&f, 0, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    ucx_session_offer(f.sides[0].session, &offer);
    ucx_head_t good = {.secret = offer.secret, .tag = TAG, .bytes = 64};
    ucx_head_t bad  = good;

    question_round(&f.sides[0], &q, 1);
    bad.secret++;
    forge(&q, bad, 100);
    await_dropped(&f, 1);
    bad     = good;
    bad.tag = TAG + 1;
    forge(&q, bad, 101);
    await_dropped(&f, 2);
    bad       = good;
    bad.bytes = 65;
    forge(&q, bad, 102);
    await_dropped(&f, 3);
    bad.bytes = UINT64_MAX;
    forge(&q, bad, 103);
    await_dropped(&f, 4);
    forge(&q, good, 102); /* late: 103 was looked at */
    await_dropped(&f, 5);
    assert_int_equal(atomic_load(&f.handled), 1);
    question_close(&q);
    fixture_close(&f);
}

static void
test_places_are_checked(void **state)
{
    static const ucx_place_t wrong[] = {
        {.offset = 0, .in = 64, .out = 64},
        {.offset = UCX_SLOTS_FROM - 64, .in = 64, .out = 64},
        {.offset = UCX_SLOTS_FROM + 1, .in = 64, .out = 64},
        {.offset = SLAB, .in = 0, .out = 0},
        {.offset = SLAB - 64, .in = 64, .out = 0},
        {.offset = UINT64_MAX - 63, .in = 64, .out = 64},
        {.offset = UCX_SLOTS_FROM, .in = UINT64_MAX, .out = 64},
        {.offset = UCX_SLOTS_FROM, .in = UINT64_MAX - 700, .out = 64},
        {.offset = UCX_SLOTS_FROM, .in = 64, .out = UINT64_MAX / 2},
        {.offset = UCX_SLOTS_FROM, .in = SLAB, .out = 64},
    };
    fixture_t f;
    question_t q;
    ucx_slot_t *slot;

    (void)state;
    fixture_open(&f, 0, 50);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(ucx_slot_open(f.sides[0].session, &wrong[i], 1, echo, NULL, &f, &slot),
                         ATTN_ERR_INVALID);
    }
    question_open(&f, &f.sides[0], &q, 1000, 1000);
    ucx_place_t inside = q.ask.place;
    inside.offset += 128;
    assert_int_equal(ucx_slot_open(f.sides[0].session, &inside, 1, echo, NULL, &f, &slot),
                     ATTN_ERR_INVALID);
    inside.offset = q.ask.place.offset + ucx_place_bytes(&q.ask.place);
    assert_int_equal(ucx_slot_open(f.sides[0].session, &inside, 1, echo, NULL, &f, &slot), ATTN_OK);
    ucx_slot_close(slot);
    question_close(&q);
    fixture_close(&f);
}

/* The client's room: first fit, given back, and full. */
static void
test_places_are_taken_and_given(void **state)
{
    fixture_t f;
    ucx_place_t places[UCX_SESSION_SLOTS_MAX], more;
    ucx_peer_t *peer;

    (void)state;
    fixture_open(&f, 0, 50);
    peer = f.sides[0].peer;
    assert_false(ucx_place_take(peer, SLAB, 0, &more));
    assert_false(ucx_place_take(peer, UINT64_MAX, 0, &more));
    for (unsigned i = 0; i < UCX_SESSION_SLOTS_MAX; i++) {
        assert_true(ucx_place_take(peer, 1000, 1000, &places[i]));
        for (unsigned j = 0; j < i; j++) {
            assert_true(places[i].offset >= places[j].offset + ucx_place_bytes(&places[j]) ||
                        places[j].offset >= places[i].offset + ucx_place_bytes(&places[i]));
        }
    }
    assert_false(ucx_place_take(peer, 1, 1, &more));
    ucx_place_give(peer, &places[20]);
    ucx_place_give(peer, &places[21]);
    assert_true(ucx_place_take(peer, 3000, 1000, &more));
    assert_int_equal(more.offset, places[20].offset);
    ucx_place_give(peer, &more);
    for (unsigned i = 0; i < UCX_SESSION_SLOTS_MAX; i++) {
        ucx_place_give(peer, &places[i]);
    }
    assert_true(ucx_place_take(peer, SLAB / 2, SLAB / 4, &more));
    assert_false(ucx_place_take(peer, SLAB / 4, 0, &places[0]));
    ucx_place_give(peer, &more);
    fixture_close(&f);
}

static void
test_a_slow_request_holds_up_nobody(void **state)
{
    fixture_t f;
    question_t slow, quick;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &slow, 64, 64);
    question_open(&f, &f.sides[1], &quick, 64, 64);
    for (uint32_t i = 0; i < 20; i++) { /* what it takes is taken to be short */
        question_round(&f.sides[0], &slow, i);
    }
    atomic_store(&f.hold, true);
    question_ask(&slow, 5, FLAG_SLOW, false);
    while (!atomic_load(&f.held)) {
        usleep(100);
    }
    uint64_t start = attn_now_ns();
    for (uint32_t i = 0; i < 50; i++) {
        question_round(&f.sides[1], &quick, i);
    }
    assert_true(attn_now_ns() - start < 2000 * ATTN_NS_PER_MS);
    assert_false(atomic_load(&slow.answered));
    atomic_store(&f.hold, false);
    assert_true(rpc_client_wait(f.sides[0].rpc, is_done, &slow, attn_now_ns() + WAIT_NS));
    question_check(&slow, 5);
    question_close(&slow);
    question_close(&quick);
    fixture_close(&f);
}

/* A slot that is closed amid a request goes after it, and its place is taken until then; so with
 * its session. */
static void
test_closing_amid_a_request(void **state)
{
    fixture_t f;
    question_t q;
    ucx_slot_t *slot;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, 64, 64);
    atomic_store(&f.hold, true);
    question_ask(&q, 5, FLAG_SLOW, true);
    while (!atomic_load(&f.held)) {
        usleep(100);
    }
    ucx_slot_close(q.slot);
    assert_int_equal(atomic_load(&f.gone), 0);
    assert_int_equal(ucx_slot_open(f.sides[0].session, &q.ask.place, 1, echo, NULL, &f, &slot),
                     ATTN_ERR_INVALID);
    ucx_session_close(f.sides[0].session);
    f.sides[0].session = NULL;
    ucx_forget(&q.ask);
    ucx_peer_close(f.sides[0].peer);
    f.sides[0].peer = NULL;

    ucx_figures_t figures;
    ucx_crew_describe(f.crew, &figures);
    assert_int_equal(figures.slab_bytes, 2 * SLAB);
    atomic_store(&f.hold, false);
    for (int i = 0; i < 2000 && figures.slab_bytes > SLAB; i++) {
        usleep(1000);
        ucx_crew_describe(f.crew, &figures);
    }
    assert_int_equal(atomic_load(&f.gone), 1);
    assert_int_equal(figures.slab_bytes, SLAB);
    assert_int_equal(figures.sessions, 1);
    assert_int_equal(figures.slots, 0);
    assert_false(atomic_load(&q.answered));
    free(q.data);
    fixture_close(&f);
}

/* A slot is closed amid a request, and another opened in its place as soon as that is allowed: from
 * then on nothing of the former one is written there. */
static void
test_a_place_is_taken_anew(void **state)
{
    fixture_t f;
    question_t q;
    ucx_slot_t *slot;

    (void)state;
    fixture_open(&f, 50, 50);
    for (unsigned i = 0; i < 300; i++) {
        question_open(&f, &f.sides[0], &q, 64, 64);
        unsigned before = atomic_load(&f.handled);
        question_ask(&q, i, 0, true);
        while (atomic_load(&f.handled) == before) {
            sched_yield();
        }
        ucx_forget(&q.ask);
        ucx_slot_close(q.slot);
        uint8_t *slab  = ucx_place_data(q.peer, &q.ask.place) - UCX_LINE - q.ask.place.offset;
        uint8_t *place = slab + q.ask.place.offset;
        while (ucx_slot_open(f.sides[0].session, &q.ask.place, 1, echo, NULL, &f, &slot) !=
               ATTN_OK) {
            sched_yield();
        }
        uint8_t was[2 * UCX_LINE + UCX_SENTENCE_ROOM + 64 + 64];
        memcpy(was, place, sizeof(was));
        usleep(100);
        assert_memory_equal(was, place, sizeof(was));
        ucx_slot_close(slot);
        ucx_place_give(q.peer, &q.ask.place);
        free(q.data);
    }
    fixture_close(&f);
}

static void
test_sessions_have_limits_and_secrets(void **state)
{
    fixture_t f;
    ucx_session_t *sessions[16], *found;
    ucx_offer_t offer;
    unsigned n = 0;

    (void)state;
    fixture_open(&f, 0, 50);
    assert_int_equal(ucx_session_open(f.crew, 100, NULL, NULL, &found), ATTN_ERR_INVALID);
    assert_int_equal(ucx_session_open(f.crew, UCX_SLAB_MAX + 1, NULL, NULL, &found),
                     ATTN_ERR_INVALID);
    while (n < 16 && ucx_session_open(f.crew, SLAB, NULL, NULL, &sessions[n]) == ATTN_OK) {
        n++;
    }
    assert_int_equal(n, 14); /* of 16 slabs two are those of the sides */
    assert_non_null(strstr(attn_last_error(), "limit"));
    ucx_session_offer(sessions[3], &offer);
    assert_int_equal(ucx_session_find(f.crew, offer.session, offer.secret + 1, &found),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(ucx_session_find(f.crew, offer.session, offer.secret, &found), ATTN_OK);
    assert_ptr_equal(found, sessions[3]);
    while (n > 0) {
        ucx_session_close(sessions[--n]);
    }
    assert_int_equal(ucx_session_find(f.crew, offer.session, offer.secret, &sessions[0]),
                     ATTN_ERR_NOT_FOUND);
    ucx_session_release(found);
    fixture_close(&f);
}

static void
test_offers_are_checked(void **state)
{
    fixture_t f;
    ucx_offer_t offer, bad;
    ucx_peer_t *peer;

    (void)state;
    fixture_open(&f, 0, 50);
    ucx_session_offer(f.sides[1].session, &offer);
    bad         = offer;
    bad.host[3] = bad.host[3] == 'a' ? 'b' : 'a';
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), "another host"));
    bad = offer;
    memset(bad.host, 'x', sizeof(bad.host));
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    bad = offer;
    bad.secret++;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    bad = offer;
    bad.bytes *= 2;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    bad          = offer;
    bad.key_size = 0;
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_ERR_UNSUPPORTED);
    for (int i = 0; i < 300; i++) { /* nobody makes progress, and nothing piles up */
        assert_int_equal(ucx_peer_open(f.sides[0].asks, &offer, &peer), ATTN_OK);
        ucx_peer_close(peer);
    }
    fixture_close(&f);
}

/* Open what was offered, which is wrong, and say what it is refused with. */
static void
offer_refused(fixture_t *f, const ucx_offer_t *offer, const char *words)
{
    ucx_peer_t *peer;

    assert_int_equal(ucx_peer_open(f->sides[0].asks, offer, &peer), ATTN_ERR_UNSUPPORTED);
    if (strstr(attn_last_error(), words) == NULL) {
        fail_msg("\"%s\" in place of \"%s\"", attn_last_error(), words);
    }
}

/* Keys that say more than they have, and slabs that lie elsewhere than in what a key maps. */
static void
test_offers_are_not_trusted(void **state)
{
    fixture_t f;
    ucx_offer_t offer, bad;
    ucx_peer_t *peer;
    uint8_t key[4096];

    (void)state;
    fixture_open(&f, 0, 50);
    ucx_session_offer(f.sides[1].session, &offer);
    assert_true(offer.key_size < sizeof(key));
    bad         = offer;
    bad.address = key; /* is not read */
    memset(key, 0xff, sizeof(key));
    assert_int_equal(ucx_peer_open(f.sides[0].asks, &bad, &peer), ATTN_OK);
    ucx_peer_close(peer);

    static const int64_t shifts[] = {SLAB / 2,        4096, -4096, 1, -(INT64_C(1) << 40),
                                     INT64_C(1) << 40};
    for (size_t i = 0; i < sizeof(shifts) / sizeof(shifts[0]); i++) {
        bad = offer;
        bad.base += (uint64_t)shifts[i];
        offer_refused(&f, &bad, "is not 1048576 bytes of shared memory");
    }
    bad     = offer;
    bad.key = key;
    for (bad.key_size = 1; bad.key_size <= sizeof(key); bad.key_size *= 2) {
        offer_refused(&f, &bad, "UCX cannot map"); /* 64 domains, of 255 bytes each */
    }
    memset(key, 0, sizeof(key));
    bad.key_size = sizeof(key);
    offer_refused(&f, &bad, "UCX cannot map"); /* none */
    uint64_t ends = offer.key_size; /* what it lacks is zeros, as its last bytes may be */
    while (offer.key[ends - 1] == 0) {
        ends--;
    }
    for (uint64_t n = 1; n < ends; n++) {
        bad.key      = offer.key;
        bad.key_size = n;
        offer_refused(&f, &bad, "");
    }
    fixture_close(&f);
}

/* A peer that fills its slab with noise harms itself alone. */
static void *
vandal(void *arg)
{
    question_t *q   = arg;
    uint8_t *slab   = ucx_place_data(q->peer, &q->ask.place) - UCX_LINE - q->ask.place.offset;
    uint64_t random = 88172645463325252u;

    for (uint64_t n = 0; !atomic_load(&q->answered); n++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        uint64_t at = random % (SLAB / 8);
        if (n % 4 == 0) { /* the request's head, with a secret that is right */
            at = q->ask.place.offset / 8 + 1 + random % 7;
        }
        atomic_store((_Atomic uint64_t *)(void *)(slab + at * 8), random);
    }
    return NULL;
}

static void
test_noise_harms_nobody_else(void **state)
{
    fixture_t f;
    question_t noise, good;
    pthread_t thread;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &noise, 4096, 4096);
    question_open(&f, &f.sides[1], &good, 4096, 4096);
    assert_int_equal(pthread_create(&thread, NULL, vandal, &noise), 0);
    for (uint32_t i = 0; i < 2000; i++) {
        question_round(&f.sides[1], &good, i);
    }
    atomic_store(&noise.answered, true);
    pthread_join(thread, NULL);
    question_close(&noise);
    question_close(&good);
    fixture_close(&f);
}

typedef struct asker {
    fixture_t *f;
    side_t *side;
    uint32_t seed;
    bool failed;
} asker_t;

static void *
ask_many(void *arg)
{
    asker_t *a = arg;
    question_t q;

    for (uint32_t i = 0; i < 20; i++) {
        question_open(a->f, a->side, &q, 512 + a->seed, 256 + i);
        for (uint32_t j = 0; j < 50; j++) {
            question_ask(&q, a->seed + j, 0, true);
            if (!rpc_client_wait(a->side->rpc, is_done, &q, attn_now_ns() + WAIT_NS) ||
                q.times != 1 || q.data[0] != answer_byte(0, (uint8_t)(a->seed + j), a->seed + j)) {
                a->failed = true;
            }
        }
        question_close(&q);
    }
    return NULL;
}

static void
test_many_threads(void **state)
{
    fixture_t f;
    pthread_t threads[6];
    asker_t askers[6];

    (void)state;
    fixture_open(&f, 20, 20);
    for (uint32_t i = 0; i < 6; i++) {
        askers[i] = (asker_t){.f = &f, .side = &f.sides[i % 2], .seed = 100 * i};
        assert_int_equal(pthread_create(&threads[i], NULL, ask_many, &askers[i]), 0);
    }
    for (uint32_t i = 0; i < 6; i++) {
        pthread_join(threads[i], NULL);
        assert_false(askers[i].failed);
    }
    fixture_close(&f);
}

/* The environment belongs to the program: it is changed when a client is made, not by its first
 * step, and only where it says nothing. Runs first, while there is no client. */
static void
test_the_environment_is_left_alone(void **state)
{
    fixture_t f;
    ucx_offer_t offer;
    ucx_peer_t *peer;
    char *was[256];
    size_t n = 0;

    (void)state;
    unsetenv("UCX_HANDLE_ERRORS");
    unsetenv("UCX_MEM_EVENTS");
    setenv("UCX_LOG_LEVEL", "error", 1);
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    assert_int_equal(rpc_client_create(0, &rpc), ATTN_OK);
    assert_int_equal(ucx_asks_create(rpc, &asks), ATTN_OK);
    assert_string_equal(getenv("UCX_HANDLE_ERRORS"), "none");
    assert_string_equal(getenv("UCX_MEM_EVENTS"), "n");
    assert_string_equal(getenv("UCX_LOG_LEVEL"), "error");
    setenv("UCX_LOG_LEVEL", "fatal", 1);
    for (; environ[n] != NULL && n < 256; n++) {
        was[n] = environ[n];
    }
    char **at = environ;
    fixture_open(&f, 0, 0);
    ucx_session_offer(f.sides[0].session, &offer);
    assert_int_equal(ucx_peer_open(asks, &offer, &peer), ATTN_OK);
    ucx_peer_close(peer);
    fixture_close(&f);
    assert_ptr_equal(environ, at);
    assert_memory_equal(environ, was, n * sizeof(was[0]));
    assert_null(environ[n]);
    rpc_client_destroy(rpc);
    ucx_asks_destroy(asks);
}

/* ---- peers that are killed ---- */

/* Segments that this process made and that still are. */
static unsigned
segments(void)
{
    char line[512];
    unsigned n = 0;
    int maker;
    FILE *file = fopen("/proc/sysvipc/shm", "r");

    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        n += sscanf(line, "%*d %*d %*o %*u %d", &maker) == 1 && maker == getpid();
    }
    if (file != NULL) {
        fclose(file);
    }
    return n;
}

/* The offer, its blobs and a place, from one process to the other. */
static void
pass_offer(int fd, ucx_offer_t *offer, ucx_place_t *place, bool out)
{
    static uint8_t address[4096], key[4096];

    pass(fd, offer, sizeof(*offer), out);
    pass(fd, out ? (void *)offer->address : address, offer->address_size, out);
    pass(fd, out ? (void *)offer->key : key, offer->key_size, out);
    pass(fd, place, sizeof(*place), out);
    offer->address = out ? offer->address : address;
    offer->key     = out ? offer->key : key;
}

/* What the other process does: ask until it is killed, telling after a while. */
static int
be_other(int fd)
{
    side_t side  = {0};
    question_t q = {.ask = {.answered = answered, .arg = &q}};
    ucx_offer_t offer;
    char ready = 'r';

    pass_offer(fd, &offer, &q.ask.place, false);
    q.data = malloc(q.ask.place.out);
    if (rpc_client_create(50, &side.rpc) != ATTN_OK ||
        ucx_asks_create(side.rpc, &side.asks) != ATTN_OK ||
        ucx_peer_open(side.asks, &offer, &q.peer) != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        return 4;
    }
    for (uint32_t i = 0;; i++) {
        question_ask(&q, i, 0, true);
        uint64_t end = attn_now_ns() + WAIT_NS; /* nobody rings across processes in this test */
        while (!rpc_client_wait(side.rpc, is_done, &q, attn_now_ns() + 20 * ATTN_NS_PER_MS)) {
            if (attn_now_ns() >= end) {
                return 5;
            }
        }
        if (i == 200) {
            pass(fd, &ready, 1, true);
        }
    }
}

static pid_t
start_other(int *fd)
{
    int fds[2];
    char text[16];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    pid_t pid = fork();
    if (pid == 0) {
        snprintf(text, sizeof(text), "%d", fds[1]);
        execl("/proc/self/exe", "ucx_test", "other", text, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    *fd = fds[0];
    return pid;
}

static void
test_a_client_that_is_killed(void **state)
{
    unsigned before = segments();
    fixture_t f;
    question_t q, good;
    ucx_offer_t offer;
    char ready;
    int fd;

    (void)state;
    fixture_open(&f, 50, 50);
    question_open(&f, &f.sides[0], &q, 4096, 4096);
    question_open(&f, &f.sides[1], &good, 64, 64);
    assert_true(segments() > before);
    ucx_session_offer(f.sides[0].session, &offer);
    pid_t pid = start_other(&fd);
    pass_offer(fd, &offer, &q.ask.place, true);
    pass(fd, &ready, 1, false);
    question_round(&f.sides[1], &good, 1);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    question_round(&f.sides[1], &good, 2);
    question_close(&q);
    question_close(&good);
    close(fd);
    fixture_close(&f);
    assert_int_equal(segments(), before);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_environment_is_left_alone),
        cmocka_unit_test(test_requests_are_answered),
        cmocka_unit_test(test_sleepers_wake),
        cmocka_unit_test(test_answers_without_a_waiter),
        cmocka_unit_test(test_failures_bring_their_sentence),
        cmocka_unit_test(test_places_are_checked),
        cmocka_unit_test(test_places_are_taken_and_given),
        cmocka_unit_test(test_a_slow_request_holds_up_nobody),
        cmocka_unit_test(test_closing_amid_a_request),
        cmocka_unit_test(test_a_place_is_taken_anew),
        cmocka_unit_test(test_sessions_have_limits_and_secrets),
        cmocka_unit_test(test_many_threads),
    };
    const struct CMUnitTest of_memory[] = {
        cmocka_unit_test(test_strangers_requests_are_dropped),
        cmocka_unit_test(test_offers_are_checked),
        cmocka_unit_test(test_offers_are_not_trusted),
        cmocka_unit_test(test_noise_harms_nobody_else),
        cmocka_unit_test(test_a_client_that_is_killed),
    };

    messages = argc == 2 && strcmp(argv[1], "messages") == 0;
    if (messages) { /* loopback alone */
        setenv("UCX_NET_DEVICES", "lo", 1);
    }
    if (argc == 3 && strcmp(argv[1], "other") == 0) {
        return be_other(atoi(argv[2]));
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return messages ? failed : failed + cmocka_run_group_tests(of_memory, NULL, NULL);
}
