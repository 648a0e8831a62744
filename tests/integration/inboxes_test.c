/*
 * Inboxes of groups, by two processes with a device each, or one that they share: a rank that is
 * told of an inbox which is another group's by now maps nothing; ranks that end tell those that
 * wait; and memory that was lent once stays, up to a limit.
 */
#include "base/clock.h"
#include "base/status.h"
#include "engine/engine.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define DIM 64u
#define SKIPPED 77
#define WAIT_NS (10000 * ATTN_NS_PER_MS)

/* Something that the other process is to do, and what came of it. */
typedef struct errand {
    enum { OPEN, CONNECT, PROVE, CLOSE } what;
    engine_group_options_t options;
    uint8_t handles[2][ATTN_INBOX_HANDLE];
    attn_status_t status;
} errand_t;

static int to_other, from_other;
static engine_t *engine;

static attn_status_t
prove(uint64_t id)
{
    double seconds[2];
    uint32_t many;

    return engine_group_prove(engine, id, attn_now_ns() + WAIT_NS, seconds, &many);
}

static attn_status_t
do_errand(errand_t *e)
{
    char device[ATTN_GROUP_DEVICE];

    switch (e->what) {
    case OPEN:
        return engine_group_open(engine, &e->options, e->handles[e->options.me], device);
    case CONNECT:
        return engine_group_connect(
            engine,
            &(engine_inboxes_t){.group      = e->options.id,
                                .ranks      = 2,
                                .half_bytes = e->options.half_bytes,
                                .handles    = (const uint8_t(*)[ATTN_INBOX_HANDLE])e->handles});
    case PROVE:
        return prove(e->options.id);
    case CLOSE:
        return engine_group_close(engine, e->options.id);
    }
    return ATTN_ERR_INVALID;
}

static void
send_errand(const errand_t *e)
{
    assert_int_equal(write(to_other, e, sizeof(*e)), sizeof(*e));
}

static attn_status_t
await_errand(errand_t *e)
{
    assert_int_equal(read(from_other, e, sizeof(*e)), sizeof(*e));
    return e->status;
}

/* Here, or by the other process. */
static attn_status_t
does(bool here, errand_t *e, int what)
{
    e->what       = what;
    e->options.me = here ? 0 : 1;
    if (here) {
        return do_errand(e);
    }
    send_errand(e);
    return await_errand(e);
}

static errand_t
group_of(uint64_t id, uint64_t half)
{
    return (errand_t){.options = {.id = id, .ranks = 2, .head_dim_v = DIM, .half_bytes = half}};
}

/* A group that both are in. */
static errand_t
connected(uint64_t id)
{
    errand_t e = group_of(id, ENGINE_HALF_MIN);

    assert_int_equal(does(true, &e, OPEN), ATTN_OK);
    assert_int_equal(does(false, &e, OPEN), ATTN_OK);
    assert_int_equal(does(false, &e, CONNECT), ATTN_OK);
    assert_int_equal(does(true, &e, CONNECT), ATTN_OK);
    return e;
}

static void
prove_both(errand_t *e)
{
    e->what = PROVE;
    send_errand(e);
    assert_int_equal(prove(e->options.id), ATTN_OK);
    assert_int_equal(await_errand(e), ATTN_OK);
}

static void
close_both(errand_t *e)
{
    assert_int_equal(does(true, e, CLOSE), ATTN_OK);
    assert_int_equal(does(false, e, CLOSE), ATTN_OK);
}

/* ---- tests ---- */

/* The other rank's inbox is used again, by other groups in turn: who has an offer of before, signed
 * as it may be, maps it and finds another card. */
static void
test_an_old_offer(void **state)
{
    uint8_t old[ATTN_INBOX_HANDLE];
    uint32_t same = 0;
    errand_t e    = connected(1);

    (void)state;
    prove_both(&e);
    memcpy(old, e.handles[1], sizeof(old));
    close_both(&e);
    for (uint64_t id = 2; id < 2 + 3 * ATTN_GROUPS_MAX; id++) {
        e = group_of(id, ENGINE_HALF_MIN);
        assert_int_equal(does(false, &e, OPEN), ATTN_OK);
        assert_memory_not_equal(e.handles[1], old, sizeof(old));
        same += memcmp(e.handles[1], old, 64) == 0; /* the driver's part: the same memory */
        assert_int_equal(does(false, &e, CLOSE), ATTN_OK);
    }
    assert_in_range(same, 1, 2); /* not before there are others, and then in turns */

    e = group_of(100, ENGINE_HALF_MIN);
    assert_int_equal(does(true, &e, OPEN), ATTN_OK);
    memcpy(e.handles[1], old, sizeof(old));
    assert_int_equal(does(true, &e, CONNECT), ATTN_ERR_STALE);
    assert_non_null(strstr(attn_last_error(), "not the inbox that was offered"));
    assert_int_equal(does(true, &e, CONNECT), ATTN_ERR_STALE); /* it is over */
    assert_int_equal(does(true, &e, CLOSE), ATTN_OK);

    e = connected(101); /* in memory that others had before */
    prove_both(&e);
    prove_both(&e);
    close_both(&e);
}

/* A rank waits, and the other one ends without having come. */
static void
test_who_ends_tells(void **state)
{
    errand_t e     = connected(200);
    uint64_t start = attn_now_ns();

    (void)state;
    e.what = PROVE;
    send_errand(&e);
    usleep(100000);
    assert_int_equal(does(true, &e, CLOSE), ATTN_OK);
    assert_int_equal(await_errand(&e), ATTN_ERR_ABORTED);
    assert_true(attn_now_ns() - start < WAIT_NS / 3);
    assert_int_equal(does(false, &e, CLOSE), ATTN_OK);
}

static void *
close_soon(void *arg)
{
    errand_t *e = arg;

    usleep(100000);
    engine_group_close(engine, e->options.id);
    return NULL;
}

/* A rank that waits is told by its own host, while another thread is in the wait. */
static void
test_who_waits_is_told(void **state)
{
    errand_t e     = connected(300);
    uint64_t start = attn_now_ns();
    pthread_t thread;

    (void)state;
    pthread_create(&thread, NULL, close_soon, &e);
    assert_int_equal(prove(300), ATTN_ERR_ABORTED);
    assert_true(attn_now_ns() - start < WAIT_NS / 3);
    pthread_join(thread, NULL);
    engine_groups_sweep(engine, attn_now_ns()); /* it was in use when it was closed */
    assert_int_equal(does(true, &e, CONNECT), ATTN_ERR_STALE);
    assert_int_equal(does(false, &e, CLOSE), ATTN_OK);
}

/* Inboxes do not go back to the driver: there is an end to them. */
static void
test_the_limit(void **state)
{
    errand_t e[ATTN_GROUPS_MAX + 1];
    attn_status_t status = ATTN_OK;
    uint32_t n           = 0;

    (void)state;
    e[0] = group_of(400, ATTN_HALF_MAX + 16);
    assert_int_equal(does(true, &e[0], OPEN), ATTN_ERR_INVALID);
    for (; n <= ATTN_GROUPS_MAX && status == ATTN_OK; n++) {
        e[n]   = group_of(401 + n, ATTN_HALF_MAX / 2);
        status = does(true, &e[n], OPEN);
    }
    assert_int_equal(status, ATTN_ERR_EXHAUSTED);
    assert_int_equal(n, ATTN_GROUPS_MAX + 1);
    assert_non_null(strstr(attn_last_error(), "groups"));
    for (uint32_t i = 0; i < n - 1; i++) {
        assert_int_equal(does(true, &e[i], CLOSE), ATTN_OK);
    }
    for (n = 0, status = ATTN_OK; n <= ATTN_GROUPS_MAX && status == ATTN_OK; n++) {
        e[n]   = group_of(501 + n, ATTN_HALF_MAX);
        status = does(true, &e[n], OPEN);
    }
    assert_int_equal(status, ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(attn_last_error(), "no inbox"));
    assert_int_equal(does(true, &e[0], CLOSE), ATTN_OK);
    e[n - 1] = group_of(600, ATTN_HALF_MAX);
    assert_int_equal(does(true, &e[n - 1], OPEN), ATTN_OK); /* in the memory of that one */
    for (uint32_t i = 1; i < n; i++) {
        assert_int_equal(does(true, &e[i], CLOSE), ATTN_OK);
    }
}

/* ---- the processes ---- */

static attn_status_t
open_engine(uint32_t ordinal)
{
    char device[16];

    snprintf(device, sizeof(device), "cuda:%u", ordinal);
    return engine_create(
        &(engine_options_t){.device = device, .threads = 1, .slab_bytes = 16u << 20}, &engine);
}

/* The other one: until the first goes. */
static int
serve(int in, int out)
{
    attn_status_t status = open_engine(1);
    errand_t e           = {0};

    e.status = status == ATTN_OK ? ATTN_OK : open_engine(0);
    while (write(out, &e, sizeof(e)) == sizeof(e) && read(in, &e, sizeof(e)) == sizeof(e)) {
        e.status = do_errand(&e);
    }
    engine_destroy(engine);
    return 0;
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_old_offer),
        cmocka_unit_test(test_who_ends_tells),
        cmocka_unit_test(test_who_waits_is_told),
        cmocka_unit_test(test_the_limit),
    };
    int there[2], back[2];
    errand_t e;

    assert_int_equal(pipe(there), 0);
    assert_int_equal(pipe(back), 0);
    pid_t child = fork(); /* before either has opened the driver */
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        _exit(serve(there[0], back[1]));
    }
    close(there[0]);
    close(back[1]);
    to_other   = there[1];
    from_other = back[0];
    if (await_errand(&e) != ATTN_OK || open_engine(0) != ATTN_OK) {
        printf("skipped: no GPU here\n");
        return SKIPPED;
    }
    int failed = cmocka_run_group_tests_name("integration.inboxes", tests, NULL, NULL);
    engine_destroy(engine);
    close(to_other);
    waitpid(child, NULL, 0);
    return failed;
}
