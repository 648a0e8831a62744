/* Tickets and the gate that they open. */
#include "daemon/worker/gate.h"

#include "base/clock.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static const uint8_t secret[TICKET_SECRET] = "the secret of this cluster: 32 B";
static const uint8_t other[TICKET_SECRET]  = "the secret of another one: 32 B.";

static void
write_ticket(ticket_role_t role, uint32_t client, uint64_t period, char text[TICKET_MAX])
{
    ticket_write(&(ticket_t){.role = role, .client = client, .period = period}, secret, text);
}

static void
refused(attn_status_t status, const char *says)
{
    assert_int_equal(status, ATTN_ERR_DENIED);
    if (strstr(attn_last_error(), says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), says);
    }
}

static void
test_a_ticket_is_as_documented(void **state)
{
    char text[TICKET_MAX];

    (void)state;
    write_ticket(TICKET_CLIENT, 17, 42, text);
    /* printf 1.c.17.42 | openssl dgst -sha256 -hmac "the secret of this cluster: 32 B" */
    assert_string_equal(text, "1.c.17.42."
                              "444676294cdca484897565bf6567b9cc"
                              "d6fb88ddd16b7309220e01a06711d956");
}

static void
test_what_was_written_is_read(void **state)
{
    static const ticket_t tickets[] = {
        {.role = TICKET_CLIENT, .client = 1, .period = 1},
        {.role = TICKET_CLIENT, .client = UINT32_MAX, .period = UINT64_MAX - 1},
        {.role = TICKET_COORDINATOR, .client = 0, .period = 7},
    };
    char text[TICKET_MAX];
    ticket_t read;

    (void)state;
    for (size_t i = 0; i < sizeof(tickets) / sizeof(tickets[0]); i++) {
        ticket_write(&tickets[i], secret, text);
        assert_int_equal(ticket_read(text, secret, tickets[i].period, &read), ATTN_OK);
        assert_int_equal(read.role, tickets[i].role);
        assert_int_equal(read.client, tickets[i].client);
        assert_int_equal(read.period, tickets[i].period);
        refused(ticket_read(text, other, tickets[i].period, &read), "not of the coordinator");
    }
}

static void
test_every_changed_byte_counts(void **state)
{
    char text[TICKET_MAX], changed[TICKET_MAX + 1];
    ticket_t read;

    (void)state;
    write_ticket(TICKET_CLIENT, 17, 42, text);
    for (size_t i = 0; text[i] != '\0'; i++) {
        memcpy(changed, text, sizeof(text));
        changed[i] = text[i] == '0' ? '1' : '0';
        assert_int_equal(ticket_read(changed, secret, 42, &read), ATTN_ERR_DENIED);
        changed[i] = '\0'; /* cut here */
        assert_int_equal(ticket_read(changed, secret, 42, &read), ATTN_ERR_DENIED);
    }
    snprintf(changed, sizeof(changed), "%s0", text);
    refused(ticket_read(changed, secret, 42, &read), "malformed");
    refused(ticket_read(NULL, secret, 42, &read), "no attn-ticket");
    refused(ticket_read("", secret, 42, &read), "malformed");
}

static void
test_age(void **state)
{
    char text[TICKET_MAX];
    ticket_t read;

    (void)state;
    write_ticket(TICKET_CLIENT, 17, 42, text);
    assert_int_equal(ticket_read(text, secret, 43, &read), ATTN_OK);
    refused(ticket_read(text, secret, 44, &read), "KeepAlive gives a new one");
    /* The coordinator was faster than its word to this worker. */
    assert_int_equal(ticket_read(text, secret, 41, &read), ATTN_OK);
}

static void
test_the_gate(void **state)
{
    char mine[TICKET_MAX], theirs[TICKET_MAX];
    gate_t gate;

    (void)state;
    write_ticket(TICKET_CLIENT, 17, 42, mine);
    write_ticket(TICKET_COORDINATOR, 0, 42, theirs);
    gate_init(&gate);
    refused(gate_admit(&gate, mine, false), "has not joined");
    refused(gate_admit(&gate, theirs, true), "has not joined");

    gate_joined(&gate, secret, 42);
    assert_int_equal(gate_admit(&gate, mine, false), ATTN_OK);
    assert_int_equal(gate_admit(&gate, theirs, false), ATTN_OK);
    assert_int_equal(gate_admit(&gate, theirs, true), ATTN_OK);
    refused(gate_admit(&gate, mine, true), "only the coordinator");
    refused(gate_admit(&gate, NULL, false), "no attn-ticket");

    gate_period(&gate, 43);
    assert_int_equal(gate_admit(&gate, mine, false), ATTN_OK);
    gate_period(&gate, 44);
    refused(gate_admit(&gate, mine, false), "period 42");
    refused(gate_admit(&gate, theirs, true), "period 42");

    gate_joined(&gate, other, 1); /* another coordinator */
    refused(gate_admit(&gate, mine, false), "not of the coordinator");
    gate_destroy(&gate);
}

static void *
join_later(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 100 * 1000000}, NULL);
    gate_joined(arg, secret, 42);
    return NULL;
}

/* What was let in is known, and known only for what it was. */
static void
test_known_tickets(void **state)
{
    enum { TICKETS = 3 * GATE_KNOWN };
    static char texts[TICKETS][TICKET_MAX];
    char changed[TICKET_MAX];
    gate_t gate;

    (void)state;
    gate_init(&gate);
    gate_joined(&gate, secret, 5);
    for (int round = 0; round < 2; round++) { /* more than there are places for */
        for (uint32_t i = 0; i < TICKETS; i++) {
            write_ticket(TICKET_CLIENT, i, 5, texts[i]);
            for (int again = 0; again < 2; again++) {
                assert_int_equal(gate_admit(&gate, texts[i], false), ATTN_OK);
                refused(gate_admit(&gate, texts[i], true), "only the coordinator");
            }
        }
    }
    const char *last = texts[TICKETS - 1];
    for (size_t i = 0; last[i] != '\0'; i++) { /* its place is found by its end */
        memcpy(changed, last, sizeof(changed));
        changed[i] = last[i] == '0' ? '1' : '0';
        assert_int_equal(gate_admit(&gate, changed, false), ATTN_ERR_DENIED);
    }
    gate_period(&gate, 6);
    assert_int_equal(gate_admit(&gate, last, false), ATTN_OK);
    gate_period(&gate, 7);
    refused(gate_admit(&gate, last, false), "of period 5");
    gate_period(&gate, 5);
    assert_int_equal(gate_admit(&gate, last, false), ATTN_OK);
    gate_joined(&gate, other, 5);
    refused(gate_admit(&gate, last, false), "not of the coordinator");
    gate_destroy(&gate);
}

static void
test_a_coordinator_may_be_faster_than_its_answer(void **state)
{
    char text[TICKET_MAX];
    pthread_t thread;
    gate_t gate;

    (void)state;
    write_ticket(TICKET_COORDINATOR, 0, 42, text);
    gate_init(&gate);
    gate_joining(&gate);
    assert_int_equal(pthread_create(&thread, NULL, join_later, &gate), 0);
    assert_int_equal(gate_admit(&gate, text, true), ATTN_OK);
    pthread_join(thread, NULL);

    /* What joining does not cure waits a second at most, and without a ticket not at all. */
    gate_joining(&gate);
    uint64_t start = attn_now_ns();
    refused(gate_admit(&gate, NULL, true), "no attn-ticket");
    assert_true(attn_now_ns() - start < 500 * ATTN_NS_PER_MS);
    refused(gate_admit(&gate, "none", true), "malformed");
    assert_true(attn_now_ns() - start < 500 * ATTN_NS_PER_MS);
    text[strlen(text) - 1] ^= 1; /* no ticket, as will turn out */
    refused(gate_admit(&gate, text, true), "not of the coordinator");
    assert_true(attn_now_ns() - start >= 900 * ATTN_NS_PER_MS);
    assert_true(attn_now_ns() - start < 1500 * ATTN_NS_PER_MS);
    text[strlen(text) - 1] ^= 1;
    gate_joined(&gate, NULL, 0); /* it failed: the secret of before counts on */
    assert_int_equal(gate_admit(&gate, text, true), ATTN_OK);
    gate_destroy(&gate);
}

typedef struct stranger {
    gate_t *gate;
    const char *text;
    attn_status_t status;
    uint64_t took_ns;
} stranger_t;

static void *
knock(void *arg)
{
    stranger_t *s  = arg;
    uint64_t start = attn_now_ns();

    s->status  = gate_admit(s->gate, s->text, false);
    s->took_ns = attn_now_ns() - start;
    return NULL;
}

static void
test_a_few_wait(void **state)
{
    enum { N = 12 };
    stranger_t strangers[N];
    pthread_t threads[N];
    char text[TICKET_MAX];
    uint32_t denied = 0, unavailable = 0;
    gate_t gate;

    (void)state;
    write_ticket(TICKET_CLIENT, 17, 42, text);
    gate_init(&gate);
    gate_joined(&gate, other, 42); /* of the coordinator before */
    gate_joining(&gate);
    for (int i = 0; i < N; i++) {
        strangers[i] = (stranger_t){.gate = &gate, .text = text};
        assert_int_equal(pthread_create(&threads[i], NULL, knock, &strangers[i]), 0);
    }
    for (int i = 0; i < N; i++) {
        pthread_join(threads[i], NULL);
        if (strangers[i].status == ATTN_ERR_UNAVAILABLE) {
            assert_true(strangers[i].took_ns < 500 * ATTN_NS_PER_MS);
            unavailable++;
        } else {
            assert_int_equal(strangers[i].status, ATTN_ERR_DENIED);
            denied++;
        }
    }
    assert_int_equal(denied, GATE_WAITING_MAX);
    assert_int_equal(unavailable, N - GATE_WAITING_MAX);
    assert_int_equal(gate.waiting, 0);

    gate_joined(&gate, secret, 42); /* nobody waits any more */
    assert_int_equal(gate_admit(&gate, text, false), ATTN_OK);
    gate_destroy(&gate);
}

static void
test_equal_texts(void **state)
{
    (void)state;
    assert_true(ticket_texts_equal("sesame", "sesame"));
    assert_false(ticket_texts_equal("sesame", "sesamE"));
    assert_false(ticket_texts_equal("sesame", "sesame "));
    assert_false(ticket_texts_equal("sesame", ""));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_ticket_is_as_documented),
        cmocka_unit_test(test_what_was_written_is_read),
        cmocka_unit_test(test_every_changed_byte_counts),
        cmocka_unit_test(test_age),
        cmocka_unit_test(test_the_gate),
        cmocka_unit_test(test_known_tickets),
        cmocka_unit_test(test_a_coordinator_may_be_faster_than_its_answer),
        cmocka_unit_test(test_a_few_wait),
        cmocka_unit_test(test_equal_texts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
