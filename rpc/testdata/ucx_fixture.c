/* ucx_fixture.c: see ucx_fixture.h. */
#include "ucx_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

bool messages;

uint8_t
answer_byte(uint64_t i, uint8_t asked, uint32_t number)
{
    return (uint8_t)(asked + 3 * i + number);
}

attn_status_t
echo(void *arg, const ucx_head_t *head, const uint8_t *data, uint8_t *answer, ucx_head_t *reply)
{
    echo_t *e = arg;

    atomic_fetch_add(&e->f->handled, 1);
    if ((head->flags & FLAG_SLOW) != 0) {
        atomic_store(&e->f->held, true);
        while (atomic_load(&e->f->hold)) {
            usleep(200);
        }
    }
    if ((head->flags & FLAG_FAIL) != 0) {
        return attn_fail(ATTN_ERR_CONFLICT, "number %u is not wanted", head->number);
    }
    for (uint64_t i = 0; i < e->out; i++) {
        answer[i] = answer_byte(i, head->bytes > 0 ? data[i % head->bytes] : 0, head->number);
    }
    reply->bytes   = e->out;
    reply->number  = head->number;
    reply->took_ns = 5;
    return ATTN_OK;
}

void
gone(void *arg)
{
    echo_t *e = arg;

    atomic_fetch_add(&e->f->gone, 1);
    free(e);
}

static void
ring(void *arg)
{
    rpc_client_wake(arg);
}

atomic_uint n_broken;

void
broken(void *arg, const char *why)
{
    (void)arg;
    assert_true(why[0] != '\0');
    atomic_fetch_add(&n_broken, 1);
}

/* Tell the server where answers go. */
void
side_greet(side_t *side)
{
    const uint8_t *address;
    uint64_t size;

    assert_true(ucx_peer_address(side->peer, &address, &size) == messages);
    if (messages) {
        assert_int_equal(ucx_session_answer(side->session, address, size, broken), ATTN_OK);
    }
    assert_int_equal(ucx_peer_greet(side->peer, attn_now_ns() + WAIT_NS), ATTN_OK);
    assert_string_equal(ucx_peer_way(side->peer), messages ? "tcp" : "shm");
    assert_false(ucx_peer_is_broken(side->peer));
}

void
side_open(fixture_t *f, side_t *side, uint32_t spin_us)
{
    ucx_offer_t offer;

    assert_int_equal(rpc_client_create(spin_us, &side->rpc), ATTN_OK);
    assert_int_equal(ucx_asks_create(side->rpc, &side->asks), ATTN_OK);
    assert_int_equal(ucx_session_open(f->crew, SLAB, ring, side->rpc, &side->session), ATTN_OK);
    ucx_session_offer(side->session, &offer);
    assert_true(offer.messages == messages);
    assert_int_equal(ucx_peer_open(side->asks, &offer, &side->peer), ATTN_OK);
    side_greet(side);
}

void
side_close(side_t *side)
{
    if (side->peer != NULL) {
        ucx_peer_close(side->peer);
    }
    if (side->session != NULL) {
        ucx_session_close(side->session);
    }
    rpc_client_destroy(side->rpc);
    ucx_asks_destroy(side->asks);
    *side = (side_t){0};
}

void
fixture_open(fixture_t *f, uint32_t server_spin_us, uint32_t client_spin_us)
{
    ucx_crew_options_t options = {.network    = messages ? "lo" : NULL,
                                  .spin_us    = server_spin_us,
                                  .threads    = 3,
                                  .memory_max = 16 * SLAB};

    memset(f, 0, sizeof(*f));
    attn_status_t status = ucx_crew_create(&options, &f->crew);
    if (status != ATTN_OK) {
        print_message("skipped: %s\n", attn_last_error());
        _exit(77);
    }
    side_open(f, &f->sides[0], client_spin_us);
    side_open(f, &f->sides[1], client_spin_us);
}

void
fixture_close(fixture_t *f)
{
    side_close(&f->sides[0]);
    side_close(&f->sides[1]);
    ucx_crew_destroy(f->crew);
}

/* ---- questions ---- */

void
answered(void *arg, const ucx_head_t *reply, const char *sentence, const uint8_t *data)
{
    question_t *q = arg;

    memcpy(&q->reply, reply, offsetof(ucx_head_t, sequence));
    snprintf(q->sentence, sizeof(q->sentence), "%s", sentence);
    if (reply->status == ATTN_OK && reply->bytes > 0) {
        memcpy(q->data, data, reply->bytes);
    }
    q->times++;
    atomic_store(&q->answered, true);
}

bool
is_done(void *arg)
{
    return atomic_load(&((question_t *)arg)->answered);
}

void
question_open(fixture_t *f, side_t *side, question_t *q, uint64_t in, uint64_t out)
{
    echo_t *e = malloc(sizeof(*e));

    *e = (echo_t){.f = f, .out = out};
    memset(q, 0, sizeof(*q));
    q->peer         = side->peer;
    q->data         = malloc(out + 1);
    q->ask.answered = answered;
    q->ask.arg      = q;
    assert_true(ucx_place_take(side->peer, in, out, &q->ask.place));
    attn_status_t status =
        ucx_slot_open(side->session, &q->ask.place, TAG, echo, gone, e, &q->slot);
    assert_int_equal(status, ATTN_OK);
}

void
question_close(question_t *q)
{
    ucx_forget(&q->ask);
    ucx_slot_close(q->slot);
    ucx_place_give(q->peer, &q->ask.place);
    free(q->data);
}

void
question_ask(question_t *q, uint32_t number, uint32_t flags, bool waits)
{
    ucx_head_t head = {.tag    = TAG,
                       .bytes  = q->ask.place.in,
                       .number = number,
                       .flags  = flags | (waits ? 0 : UCX_RING)};
    uint8_t *data   = ucx_place_data(q->peer, &q->ask.place);

    for (uint64_t i = 0; i < q->ask.place.in; i++) {
        data[i] = (uint8_t)(7 * i + number);
    }
    atomic_store(&q->answered, false);
    q->times = 0;
    ucx_ask(&q->ask, q->peer, &head);
}

void
question_check(const question_t *q, uint32_t number)
{
    assert_int_equal(q->times, 1);
    assert_int_equal(q->reply.status, ATTN_OK);
    assert_int_equal(q->reply.bytes, q->ask.place.out);
    assert_int_equal(q->reply.number, number);
    for (uint64_t i = 0; i < q->ask.place.out; i++) {
        uint8_t asked = q->ask.place.in > 0 ? (uint8_t)(7 * (i % q->ask.place.in) + number) : 0;
        if (q->data[i] != answer_byte(i, asked, number)) {
            fail_msg("byte %llu of the answer to %u", (unsigned long long)i, number);
        }
    }
}

void
question_round(side_t *side, question_t *q, uint32_t number)
{
    question_ask(q, number, 0, true);
    assert_true(rpc_client_wait(side->rpc, is_done, q, attn_now_ns() + WAIT_NS));
    question_check(q, number);
}

uint64_t
dropped(fixture_t *f)
{
    ucx_figures_t figures;

    ucx_crew_describe(f->crew, &figures);
    return figures.dropped;
}

void
await_dropped(fixture_t *f, uint64_t n)
{
    for (int i = 0; i < 2000 && dropped(f) < n; i++) {
        usleep(1000);
    }
    assert_int_equal(dropped(f), n);
}

void
pass(int fd, void *bytes, size_t n, bool out)
{
    for (size_t at = 0; at < n;) {
        ssize_t moved = out ? write(fd, (uint8_t *)bytes + at, n - at)
                            : read(fd, (uint8_t *)bytes + at, n - at);
        if (moved <= 0) {
            _exit(3);
        }
        at += (size_t)moved;
    }
}

void
await_held(fixture_t *f)
{
    while (!atomic_load(&f->held)) {
        ucx_asks_look(f->sides[0].asks);
    }
}

/* ---- nobody ---- */

static bool
refuse(void *arg, const ucx_head_t *head, uint64_t bytes, ucx_coming_t *coming)
{
    (void)arg, (void)head, (void)bytes, (void)coming;
    return false;
}

static void
note_closed(void *arg, void *whose)
{
    (void)whose;
    *(bool *)arg = true;
}

static void
shrug(void *arg, void *whose, const char *why)
{
    (void)arg, (void)whose, (void)why;
}

ucx_port_user_t
nobody(bool *closed)
{
    return (ucx_port_user_t){
        .arrive = refuse, .broken = shrug, .closed = note_closed, .arg = closed};
}
