/*
 * Submitted runs whose tensors are in a GPU's memory, and whose worker is another process: their
 * copies are late here, both ways, and hold up nobody else. On the fake driver; the worker is
 * stopped for a moment where an answer is not to come too soon.
 */
#include "tests/integration/cluster.h"

#undef OK
#include "tests/integration/stream_runner.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static test_cluster_t cluster;

/* A completion that somebody waits for. */
typedef struct completion {
    attn_step_t *step;
    atomic_int calls;
    attn_status_t status;
    char sentence[512];
    const views_t *next; /* to be submitted then, as layer 1 */
} completion_t;

static void
done(void *arg, attn_status_t status, const char *error)
{
    completion_t *c = arg;

    if (status == ATTN_OK && c->next != NULL) {
        const views_t *t = c->next;
        c->next          = NULL;
        status           = attn_step_submit(c->step, 1, &t->q, &t->k, &t->v, &t->o, NULL, done, c);
        if (status == ATTN_OK) {
            return;
        }
    }
    c->status = status;
    snprintf(c->sentence, sizeof(c->sentence), "%s", error);
    atomic_fetch_add(&c->calls, 1);
}

static void
await(completion_t *c, uint32_t ms)
{
    uint64_t end = now_ms() + ms;

    while (atomic_load(&c->calls) == 0 && now_ms() < end) {
        sleep_ms(1);
    }
    assert_int_equal(atomic_load(&c->calls), 1);
}

static void
submit(completion_t *c, attn_step_t *step, runner_t *r, uint32_t l, const views_t *next)
{
    views_t t = gpu_views(r, l);

    *c = (completion_t){.step = step, .next = next};
    OK(attn_step_submit(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l], done, c));
}

typedef struct remote {
    runner_t *r; /* whose tensors they are */
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq, other;
    uint64_t length, other_length;
} remote_t;

static void
remote_open(remote_t *x)
{
    *x        = (remote_t){.r = runner_open(16)};
    x->client = open_client(cluster.coordinator.address, 5000);
    runner_open_cache(x->client, 16, &x->cache);
    OK(attn_seq_create(x->cache, NULL, &x->seq));
    OK(attn_seq_create(x->cache, NULL, &x->other));
}

static void
remote_close(remote_t *x)
{
    attn_cache_close(x->cache);
    attn_client_close(x->client);
    runner_close(x->r);
}

/* Steps of another sequence, from the host's memory, take no time. */
static void
others_go_on(remote_t *x)
{
    static float o[ROW_Q];
    uint64_t start = now_ms();

    for (uint32_t i = 0; i < 5; i++) {
        attn_step_t *step;
        OK(begin_with(x->cache, x->other, x->other_length, 1, 1, ATTN_MEMORY_HOST, 0, &step));
        for (uint32_t l = 0; l < LAYERS; l++) {
            views_t t      = views_of(x->r->host[l], o, ATTN_MEMORY_HOST);
            completion_t c = {.step = step};
            OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, NULL));
            OK(attn_step_submit(step, l, &t.q, &t.k, &t.v, &t.o, NULL, done, &c));
            await(&c, 4000);
            assert_int_equal(c.status, ATTN_OK);
        }
        OK(attn_step_commit(step, NULL));
        x->other_length++;
    }
    assert_true(now_ms() - start < 20000);
}

/* Submit while the worker is stopped, and hold the GPU before it answers. */
static void
submit_and_hold_the_answer(remote_t *x, completion_t *c, attn_step_t *step, uint32_t l)
{
    process_signal(&cluster.workers[0], SIGSTOP);
    submit(c, step, x->r, l, NULL);
    sleep_ms(20); /* the tensors come here, and are sent */
    fake.hold_all(1);
    process_signal(&cluster.workers[0], SIGCONT);
    sleep_ms(100); /* its answer comes */
    assert_int_equal(atomic_load(&c->calls), 0);
}

static void
test_submitted_runs(void **state)
{
    remote_t x;
    completion_t c;
    attn_step_t *step;
    sequence_t s;

    (void)state;
    remote_open(&x);
    s = sequence_new(x.r);
    for (uint32_t round = 0; round < 3; round++) {
        views_t next = gpu_views(x.r, 1);
        draw(x.r, 3);
        send(x.r);
        OK(begin_with(x.cache, x.seq, x.length, 3, 3, ATTN_MEMORY_CUDA, 0, &step));
        submit(&c, step, x.r, 0, NULL);
        await(&c, 5000);
        assert_int_equal(c.status, ATTN_OK);
        assert_string_equal(c.sentence, "");
        submit(&c, step, x.r, 0, round == 1 ? &next : NULL); /* which submits the other layer */
        await(&c, 5000);
        submit(&c, step, x.r, 1, NULL);
        await(&c, 5000);
        assert_int_equal(c.status, ATTN_OK);
        OK(attn_step_commit(step, NULL));
        compare(x.r, &s, 3);
        x.length += 3;
    }
    remote_close(&x);
}

/* Whichever way copies are late, others' runs go on. */
static void
test_late_copies_hold_up_nobody(void **state)
{
    remote_t x;
    completion_t c;
    attn_step_t *step;
    sequence_t s;

    (void)state;
    remote_open(&x);
    s = sequence_new(x.r);
    draw(x.r, 2);
    send(x.r);
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    fake.hold_all(1);
    uint64_t start = now_ms();
    submit(&c, step, x.r, 0, NULL);
    assert_true(now_ms() - start < 4000);
    others_go_on(&x);
    assert_int_equal(atomic_load(&c.calls), 0);
    assert_int_equal(attn_step_commit(step, NULL), ATTN_ERR_BUSY);
    fake.hold_all(0);
    await(&c, 5000);
    assert_int_equal(c.status, ATTN_OK);
    assert_string_equal(c.sentence, "");

    submit_and_hold_the_answer(&x, &c, step, 1);
    others_go_on(&x);
    assert_int_equal(atomic_load(&c.calls), 0);
    fake.hold_all(0);
    await(&c, 5000);
    assert_int_equal(c.status, ATTN_OK);
    assert_string_equal(c.sentence, "");
    OK(attn_step_commit(step, NULL));
    compare(x.r, &s, 2);
    remote_close(&x);
}

/* And they end with the step: by its deadline, or when it is aborted. */
static void
test_late_copies_end(void **state)
{
    remote_t x;
    completion_t c;
    attn_step_t *step;

    (void)state;
    remote_open(&x);
    draw(x.r, 2);
    send(x.r);
    for (uint32_t round = 0; round < 4; round++) {
        bool back = round % 2, aborts = round / 2;
        OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, aborts ? 0 : 400, &step));
        if (back) {
            submit_and_hold_the_answer(&x, &c, step, 0);
        } else {
            fake.hold_all(1);
            submit(&c, step, x.r, 0, NULL);
        }
        uint64_t start = now_ms();
        if (!aborts) {
            await(&c, 5000);
            assert_int_equal(attn_step_commit(step, NULL), ATTN_ERR_ABORTED);
        }
        attn_step_abort(step);
        assert_true(now_ms() - start < 8000);
        assert_int_equal(atomic_load(&c.calls), 1);
        assert_int_equal(c.status, ATTN_ERR_DEADLINE);
        assert_non_null(strstr(c.sentence, "did not end before the deadline"));
        fake.hold_all(0);
    }

    /* The client may close while copies are late: it leaves them after a second, to the next. */
    int contexts, alive = fake.alive(&contexts);
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    fake.hold_all(1);
    submit(&c, step, x.r, 0, NULL);
    attn_step_abort(step);
    attn_cache_close(x.cache);
    uint64_t start = now_ms();
    attn_client_close(x.client);
    assert_in_range(now_ms() - start, 900, 8000);
    fake.hold_all(0);
    x.client = open_client(cluster.coordinator.address, 5000);
    runner_open_cache(x.client, 16, &x.cache);
    OK(attn_seq_create(x.cache, NULL, &x.seq));
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    submit(&c, step, x.r, 0, NULL);
    await(&c, 5000);
    attn_step_abort(step);
    assert_int_equal(fake.alive(&contexts), alive);
    remote_close(&x);
    assert_int_equal(fake.alive(&contexts), 0);
}

static int
start_cluster(void **state)
{
    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .lost_ms = "10000"});
    return 0;
}

static int
end_cluster(void **state)
{
    (void)state;
    cluster_down(&cluster);
    return 0;
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_submitted_runs),
        cmocka_unit_test(test_late_copies_hold_up_nobody),
        cmocka_unit_test(test_late_copies_end),
    };
    int skipped = runner_driver();

    if (skipped == 0 && fake.hold == NULL) {
        printf("skipped: streams of a real driver cannot be held\n");
        skipped = 77;
    }
    return skipped != 0 ? skipped
                        : cmocka_run_group_tests_name("integration.stream_copies", tests,
                                                      start_cluster, end_cluster);
}
