/* Groups of made-up workers: when they are made, of whom, and when nobody is asked. */
#include "client/groups.h"

#include "base/clock.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define WORKERS 12u
#define S (UINT64_C(1000) * ATTN_NS_PER_MS)

static uint64_t now_ns;

int __wrap_clock_gettime(clockid_t clock, struct timespec *t);

int
__wrap_clock_gettime(clockid_t clock, struct timespec *t)
{
    (void)clock;
    *t = (struct timespec){.tv_sec  = (time_t)(now_ns / 1000000000),
                           .tv_nsec = (long)(now_ns % 1000000000)};
    return 0;
}

/* ---- workers ---- */

typedef struct fake {
    link_t link;
    attn_status_t opens, connects; /* how these go */
    bool silent;                   /* it does not say that it closed */
    double few_seconds;            /* that a proof takes */
    uint32_t opened, connected, closed;
} fake_t;

static fake_t fakes[WORKERS];

static fake_t *
fake(link_t *link)
{
    return (fake_t *)(void *)link;
}

static attn_status_t
fake_open(link_t *link, const engine_group_options_t *options, uint64_t deadline_ns,
          link_inbox_t *inbox)
{
    fake_t *f = fake(link);

    assert_true(deadline_ns > now_ns && options->half_bytes >= ENGINE_HALF_MIN);
    f->opened++;
    *inbox = (link_inbox_t){.of = *options};
    return f->opens == ATTN_OK ? ATTN_OK : attn_fail(f->opens, "worker %u is full", options->me);
}

static attn_status_t
fake_connect(link_t *link, const link_inbox_t *inboxes, uint32_t ranks, uint64_t deadline_ns)
{
    (void)deadline_ns;
    for (uint32_t r = 0; r < ranks; r++) {
        assert_true(inboxes[r].of.me == r && inboxes[r].of.ranks == ranks);
    }
    fake(link)->connected++;
    return fake(link)->connects == ATTN_OK ? ATTN_OK
                                           : attn_fail(fake(link)->connects, "nothing is mapped");
}

static attn_status_t
fake_prove(link_t *link, uint64_t group, uint64_t deadline_ns, link_proof_t *proof)
{
    (void)group;
    (void)deadline_ns;
    *proof = (link_proof_t){.few_seconds  = fake(link)->few_seconds,
                            .many_seconds = fake(link)->few_seconds + 1e-3,
                            .many         = 1024};
    return ATTN_OK;
}

static attn_status_t
fake_close(link_t *link, uint64_t group, uint64_t deadline_ns)
{
    (void)group;
    (void)deadline_ns;
    fake(link)->closed++;
    return fake(link)->silent ? attn_fail(ATTN_ERR_UNAVAILABLE, "gone") : ATTN_OK;
}

static const link_ops_t fake_ops = {.name          = "fake",
                                    .group_open    = fake_open,
                                    .group_connect = fake_connect,
                                    .group_prove   = fake_prove,
                                    .group_close   = fake_close};

static groups_t *
make_groups(void)
{
    groups_t *groups;

    memset(fakes, 0, sizeof(fakes));
    for (uint32_t i = 0; i < WORKERS; i++) {
        fakes[i] = (fake_t){.link = {.ops = &fake_ops}, .few_seconds = 50e-6};
    }
    now_ns = 1000 * S;
    assert_int_equal(groups_create(&groups), ATTN_OK);
    return groups;
}

/* Of two workers. */
static group_wish_t
wish_of(uint32_t a, uint32_t b)
{
    return (group_wish_t){.ranks       = 2,
                          .links       = {&fakes[a].link, &fakes[b].link},
                          .head_dim_v  = 64,
                          .half_bytes  = 1u << 20,
                          .deadline_ns = UINT64_MAX};
}

static attn_status_t
take(groups_t *groups, group_wish_t wish, group_t **group)
{
    *group = NULL;
    return groups_take(groups, &wish, group);
}

/* As a step that wants one, and the next one, which has it. */
static group_t *
taken(groups_t *groups, group_wish_t wish)
{
    group_t *group;

    if (take(groups, wish, &group) == ATTN_ERR_BUSY) {
        groups_sweep(groups);
        assert_int_equal(take(groups, wish, &group), ATTN_OK);
    }
    assert_non_null(group);
    return group;
}

static uint32_t
opened(void)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < WORKERS; i++) {
        n += fakes[i].opened;
    }
    return n;
}

/* ---- who ---- */

static void
refuses(const group_member_t *members, uint32_t n, bool shared, const char *words)
{
    assert_int_equal(groups_check(members, n, shared), ATTN_ERR_UNSUPPORTED);
    if (strstr(attn_last_error(), words) == NULL) {
        fail_msg("no \"%s\" in \"%s\"", words, attn_last_error());
    }
}

static void
test_who_may_be_a_group(void **state)
{
    group_member_t m[ATTN_RANKS_MAX + 1];

    (void)state;
    for (uint32_t i = 0; i <= ATTN_RANKS_MAX; i++) {
        m[i] = (group_member_t){.worker = i + 1, .place = {.host = "here"}};
        snprintf(m[i].place.device, sizeof(m[i].place.device), "0000:%02u:00.0", i);
    }
    assert_int_equal(groups_check(m, 2, false), ATTN_OK);
    assert_int_equal(groups_check(m, ATTN_RANKS_MAX, false), ATTN_OK);
    refuses(m, 1, true, "on 1 workers");
    refuses(m, ATTN_RANKS_MAX + 1, true, "on 9 workers");
    m[2].place.host[0] = '\0';
    refuses(m, 3, true, "worker 3 is in no groups");
    strcpy(m[2].place.host, "there");
    refuses(m, 3, true, "workers 1 and 3 are on different hosts");
    assert_int_equal(groups_check(m, 2, false), ATTN_OK);
    strcpy(m[1].place.device, m[0].place.device);
    refuses(m, 2, false, "workers 1 and 2 share a GPU");
    assert_int_equal(groups_check(m, 2, true), ATTN_OK);
}

/* ---- making ---- */

static void
test_a_step_does_not_wait(void **state)
{
    groups_t *groups = make_groups();
    group_t *group, *other;

    (void)state;
    assert_false(groups_due(groups));
    for (uint32_t i = 0; i < 3; i++) { /* wanted once, however often it is asked for */
        assert_int_equal(take(groups, wish_of(0, 1), &group), ATTN_ERR_BUSY);
    }
    assert_int_equal(opened(), 0);
    assert_true(groups_due(groups));
    groups_sweep(groups);
    assert_false(groups_due(groups));
    assert_true(fakes[0].opened == 1 && fakes[1].opened == 1 && opened() == 2);
    assert_int_equal(take(groups, wish_of(0, 1), &group), ATTN_OK);
    /* It takes one step at a time; the next step wants another, and takes it, or the first again.
     */
    assert_int_equal(take(groups, wish_of(0, 1), &other), ATTN_ERR_BUSY);
    groups_give(groups, group, false);
    assert_int_equal(take(groups, wish_of(0, 1), &other), ATTN_OK);
    assert_ptr_equal(other, group);
    groups_give(groups, group, false);
    groups_sweep(groups);
    assert_int_equal(groups_count(groups), 2);
    now_ns += 11 * S; /* unused, both go */
    groups_sweep(groups);
    assert_int_equal(groups_count(groups), 0);
    assert_true(fakes[0].closed == 2 && fakes[1].closed == 2);
    groups_destroy(groups, now_ns);
}

static void
test_who_insists_waits(void **state)
{
    groups_t *groups  = make_groups();
    group_wish_t wish = wish_of(0, 1);
    group_t *group;

    (void)state;
    wish.insists = true;
    assert_int_equal(take(groups, wish, &group), ATTN_OK);
    groups_give(groups, group, true);
    groups_refuse(groups, &wish, ATTN_ERR_BUSY, "for others");
    assert_int_equal(take(groups, wish, &group), ATTN_OK);
    assert_int_equal(fakes[0].opened, 2);
    groups_give(groups, group, true);
    fakes[1].opens = ATTN_ERR_EXHAUSTED;
    for (uint32_t i = 0; i < 2; i++) { /* each time */
        assert_int_equal(take(groups, wish, &group), ATTN_ERR_EXHAUSTED);
        assert_null(group);
        assert_int_equal(fakes[1].opened, 3 + i);
    }
    /* One that does not answer is not asked again. */
    fakes[1].silent = true;
    groups_sweep(groups);
    assert_true(fakes[0].closed == 4 && fakes[1].closed == 4);
    groups_destroy(groups, now_ns);
}

/* ---- refusals ---- */

static void
test_a_worker_that_refuses_is_left_alone(void **state)
{
    groups_t *groups   = make_groups();
    group_wish_t small = wish_of(0, 1);
    char sentence[256];
    group_t *group;

    (void)state;
    fakes[1].opens = ATTN_ERR_EXHAUSTED;
    assert_int_equal(take(groups, wish_of(0, 1), &group), ATTN_ERR_BUSY);
    groups_sweep(groups);
    uint32_t asked = opened();
    for (uint32_t i = 0; i < WORKERS; i++) { /* with whomever */
        if (i != 1) {
            assert_int_equal(take(groups, wish_of(1, i), &group), ATTN_ERR_EXHAUSTED);
            assert_string_equal(attn_last_error(), "worker 1 is full");
        }
    }
    assert_false(groups_due(groups) && opened() != asked);
    group_wish_t both = wish_of(0, 1);
    assert_true(groups_refused(groups, &both, sentence));
    small.half_bytes /= 2; /* that may fit */
    assert_false(groups_refused(groups, &small, sentence));
    group_t *without = taken(groups, wish_of(0, 2)); /* and so may who had no part in it */
    groups_give(groups, without, false);
    fakes[1].opens = ATTN_OK;
    now_ns += 10 * S;
    groups_give(groups, taken(groups, wish_of(0, 1)), false);
    groups_destroy(groups, now_ns);
}

/* How long the wish is refused from now on, in seconds. */
static uint64_t
refused_for(groups_t *groups, group_wish_t wish)
{
    char sentence[256];
    uint64_t s = 0;

    for (; groups_refused(groups, &wish, sentence); s++) {
        now_ns += S;
    }
    return s;
}

static void
test_refusals_double(void **state)
{
    groups_t *groups  = make_groups();
    group_wish_t wish = wish_of(3, 4);

    (void)state;
    for (uint64_t s = 1; s < 600; s *= 2) {
        groups_refuse(groups, &wish, ATTN_ERR_BUSY, "it ended");
        groups_refuse(groups, &wish, ATTN_ERR_BUSY, "it ended twice"); /* the same time */
        assert_int_equal(refused_for(groups, wish), s);
    }
    groups_refuse(groups, &wish, ATTN_ERR_BUSY, "it ended");
    assert_int_equal(refused_for(groups, wish), 600); /* and no longer */
    now_ns += 600 * S;                                /* good for as long: from the beginning */
    groups_refuse(groups, &wish, ATTN_ERR_TOO_LARGE, "a batch");
    assert_int_equal(refused_for(groups, wish), 10);
    groups_refuse(groups, &wish, ATTN_ERR_UNSUPPORTED, "never");
    assert_int_equal(refused_for(groups, wish), 600);
    groups_destroy(groups, now_ns);
}

/* What several have a part in is no one's fault. */
static void
test_workers_that_cannot_map_each_other(void **state)
{
    groups_t *groups = make_groups();
    group_t *group;

    (void)state;
    fakes[1].connects = ATTN_ERR_UNSUPPORTED;
    assert_int_equal(take(groups, wish_of(0, 1), &group), ATTN_ERR_BUSY);
    groups_sweep(groups);
    group_wish_t wish = wish_of(0, 1), others = wish_of(1, 2);
    char sentence[256];
    assert_false(groups_refused(groups, &others, sentence));
    assert_int_equal(refused_for(groups, wish), 600);
    groups_destroy(groups, now_ns);
}

/* ---- more workers than groups ---- */

static void
test_turns_do_not_thrash(void **state)
{
    groups_t *groups = make_groups();
    group_t *group;

    (void)state;
    for (uint32_t i = 0; i < 4; i++) {
        groups_give(groups, taken(groups, wish_of(2 * i, 2 * i + 1)), false);
    }
    uint32_t asked = opened();
    for (uint32_t turn = 0; turn < 20; turn++) { /* five sets, in turns */
        for (uint32_t i = 0; i < 5; i++) {
            attn_status_t status = take(groups, wish_of(2 * i, 2 * i + 1), &group);
            assert_int_equal(status, i < 4 ? ATTN_OK : ATTN_ERR_EXHAUSTED);
            if (group != NULL) {
                groups_give(groups, group, false);
            }
            now_ns += S / 10;
        }
        groups_sweep(groups);
    }
    assert_int_equal(opened(), asked);
    now_ns += 3 * S; /* but for one that others leave: */
    for (uint32_t i = 1; i < 4; i++) {
        groups_give(groups, taken(groups, wish_of(2 * i, 2 * i + 1)), false);
    }
    groups_give(groups, taken(groups, wish_of(8, 9)), false);
    assert_int_equal(fakes[0].closed, 1);
    assert_int_equal(groups_count(groups), 4);
    groups_destroy(groups, now_ns);
}

/* ---- what exchanges take ---- */

static void
test_what_exchanges_take(void **state)
{
    groups_t *groups = make_groups();
    link_t *pair[] = {&fakes[0].link, &fakes[1].link}, *slow[] = {&fakes[2].link, &fakes[3].link};
    cost_exchange_t assumed, exchange;

    (void)state;
    cost_exchange_init(&assumed);
    assert_false(groups_exchange(groups, pair, 2, &exchange));
    assert_true(exchange.seconds == assumed.seconds && exchange.bandwidth == assumed.bandwidth);
    fakes[1].few_seconds = 70e-6; /* the slower rank counts */
    fakes[2].few_seconds = 900e-6;
    groups_give(groups, taken(groups, wish_of(0, 1)), true);
    groups_give(groups, taken(groups, wish_of(2, 3)), true);
    groups_sweep(groups); /* they are gone, and remembered */
    assert_true(groups_exchange(groups, pair, 2, &exchange));
    assert_true(exchange.seconds + exchange.peer_seconds > 69.9e-6 &&
                exchange.seconds + exchange.peer_seconds < 70.1e-6);
    double bytes = (1024.0 - ENGINE_PROOF_FEW) * (8 + 4 * 64) / 2;
    assert_true(exchange.bandwidth > 0.99 * bytes / 1e-3 &&
                exchange.bandwidth < 1.01 * bytes / 1e-3);
    assert_true(groups_exchange(groups, slow, 2, &exchange) && exchange.seconds > 800e-6);
    assert_true(groups_exchange(groups, slow + 1, 1, &exchange) && exchange.seconds > 800e-6);
    assert_true(groups_exchange(groups, NULL, 0, &exchange) && exchange.seconds > 800e-6);
    groups_destroy(groups, now_ns);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_who_may_be_a_group),
        cmocka_unit_test(test_a_step_does_not_wait),
        cmocka_unit_test(test_who_insists_waits),
        cmocka_unit_test(test_a_worker_that_refuses_is_left_alone),
        cmocka_unit_test(test_refusals_double),
        cmocka_unit_test(test_workers_that_cannot_map_each_other),
        cmocka_unit_test(test_turns_do_not_thrash),
        cmocka_unit_test(test_what_exchanges_take),
    };
    return cmocka_run_group_tests_name("client.groups", tests, NULL, NULL);
}
