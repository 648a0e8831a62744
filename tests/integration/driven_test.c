/*
 * Steps whose layers the runner's GPU brings to its worker's, in another process: what is answered,
 * graphs, steps beside each other, and what becomes of those whose runner or worker stops, or is
 * killed. On a GPU, which both then share, and take turns on (ATTN_DRIVEN is shared); and on the
 * fake one.
 */
#include "tests/integration/cluster.h"

#undef OK
#include "tests/integration/stream_runner.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SOON_MS 1500u /* what ends at once, also on a busy machine */

static test_cluster_t cluster;
static const char *self; /* this program */
static char idle_file[64];
static bool same_gpu;

/* ---- a cluster of a worker with a GPU, and a client ---- */

typedef struct remote {
    runner_t *r; /* whose tensors they are */
    sequence_t s;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
} remote_t;

static void
idle(bool on)
{
    int fd = on ? open(idle_file, O_CREAT | O_WRONLY | O_CLOEXEC, 0600) : -1;

    if (fd >= 0) {
        close(fd);
    } else if (!on) {
        unlink(idle_file);
    }
}

static void
cluster_with(const char *device)
{
    cluster_options_t o = {.workers = 1, .device = device, .slab = "64MiB", .lost_ms = "20000"};

    idle(true); /* a worker that starts measures itself */
    setenv("FAKE_CUDA_UUID", same_gpu ? "0" : "1", 1);
    cluster_up(&cluster, &o);
    unsetenv("FAKE_CUDA_UUID");
    idle(false);
}

static void
remote_open(remote_t *x)
{
    attn_cache_t *small;

    *x   = (remote_t){.r = runner_open(16)};
    x->s = sequence_new(x->r);
    OK(attn_client_open(cluster.coordinator.address, NULL, &x->client));
    runner_open_cache(x->client, 16, &small);
    attn_geometry_t g = *attn_cache_geometry(small);
    g.region_bytes    = UINT64_C(32) << 20;
    OK(attn_cache_open(x->client, "driven", &g, &x->cache));
    attn_cache_close(small);
    OK(attn_seq_create(x->cache, NULL, &x->seq));
}

static void
remote_close(remote_t *x)
{
    int contexts = 0;

    attn_cache_close(x->cache);
    attn_client_close(x->client);
    runner_close(x->r);
    if (fake.alive != NULL) {
        assert_int_equal(fake.alive(&contexts), 0);
    }
}

static attn_status_t
begin_on(remote_t *x, attn_seq_t seq, uint64_t base, uint32_t n_q, uint32_t n, uint32_t timeout_ms,
         attn_step_t **step_p)
{
    attn_entry_t entry = {.seq = seq, .base = base, .n_q = n_q, .n_new = n};
    attn_batch_t batch = {.size       = sizeof(batch),
                          .n          = 1,
                          .entries    = &entry,
                          .q_dtype    = ATTN_F16,
                          .o_dtype    = ATTN_F32,
                          .want_lse   = true,
                          .timeout_ms = timeout_ms,
                          .memory     = ATTN_MEMORY_CUDA,
                          .on_stream  = true};

    return attn_step_begin(x->cache, &batch, step_p);
}

static attn_step_t *
begun(remote_t *x, uint32_t n)
{
    attn_step_t *step;

    OK(begin_on(x, x->seq, x->s.length, n, n, 0, &step));
    return step;
}

/* A step of n tokens that all goes well, and answers what the CPU does. */
static void
good_step(remote_t *x, uint32_t n)
{
    draw(x->r, n);
    send(x->r);
    attn_step_t *step = begun(x, n);
    enqueue_all(x->r, step, x->r->stream);
    OK(attn_step_commit(step, NULL));
    compare(x->r, &x->s, n);
}

static uint64_t
driven(const remote_t *x)
{
    attn_links_info_t info;

    OK(attn_client_links(x->client, &info));
    uint64_t n = info.steps_driven;
    attn_links_info_free(&info);
    return n;
}

static void
await_gpu_clients(remote_t *x, uint32_t n)
{
    uint64_t end = now_ms() + 10000;
    attn_cluster_info_t info;
    uint32_t now;

    do {
        OK(attn_cluster_describe(x->client, &info));
        now = (uint32_t)info.workers[0].gpu_clients;
        attn_cluster_info_free(&info);
        sleep_ms(20);
    } while (now != n && now_ms() < end);
    assert_int_equal(now, n);
}

/* ---- what is answered ---- */

static void
test_the_same_answers(void **state)
{
    remote_t x;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 1);
    good_step(&x, 3);
    good_step(&x, 1);
    good_step(&x, 17);
    good_step(&x, 1);
    assert_int_equal(driven(&x), 5);
    remote_close(&x);
    cluster_down(&cluster);
}

static void
test_graphs(void **state)
{
    remote_t x;
    uint64_t id, again;
    CUgraphExec exec;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 5);
    draw(x.r, 1);
    send(x.r);
    attn_step_t *step = begun(&x, 1);
    OK(attn_step_graph(step, &id));
    exec = capture(x.r, step);
    for (uint32_t i = 0; i < 4; i++) {
        if (i > 0) {
            draw(x.r, 1);
            send(x.r);
            step = begun(&x, 1);
            OK(attn_step_graph(step, &again));
            assert_true(again == id);
        }
        OK(attn_step_replay(step, x.r->stream));
        CU(cuGraphLaunch(exec, x.r->stream));
        OK(attn_step_replayed(step, x.r->stream));
        OK(attn_step_commit(step, NULL));
        compare(x.r, &x.s, 1);
    }
    CU(cuGraphLaunch(exec, x.r->stream)); /* of no step: it does nothing */
    CU(cuStreamSynchronize(x.r->stream));
    good_step(&x, 1);
    step = begun(&x, 2); /* of another shape */
    OK(attn_step_graph(step, &again));
    assert_true(again != id);
    attn_step_abort(step);
    CU(cuGraphExecDestroy(exec));
    remote_close(&x);
    cluster_down(&cluster);
}

/* Layers of two steps in turn, on one stream; the second ends first. */
static void
test_two_steps_interleaved(void **state)
{
    remote_t x, y;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    y   = x;
    y.r = runner_open(16);
    y.s = sequence_new(y.r);
    OK(attn_seq_create(x.cache, NULL, &y.seq));
    for (uint32_t i = 0; i < 3; i++) {
        draw(x.r, 2);
        draw(y.r, 1);
        send(x.r);
        send(y.r);
        attn_step_t *a = begun(&x, 2), *b = begun(&y, 1);
        for (uint32_t l = 0; l < LAYERS; l++) {
            OK(enqueue(x.r, a, l, x.r->stream));
            OK(enqueue(y.r, b, l, x.r->stream));
        }
        OK(attn_step_commit(b, NULL));
        OK(attn_step_commit(a, NULL));
        compare(x.r, &x.s, 2);
        compare(y.r, &y.s, 1);
    }
    assert_int_equal(driven(&x), 6);
    runner_close(y.r);
    remote_close(&x);
    cluster_down(&cluster);
}

/* A step that asks nothing, one that brings nothing, and what is wrong with a layer. */
static void
test_all_kinds_of_steps(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    draw(x.r, 4);
    send(x.r);
    OK(begin_on(&x, x.seq, 0, 0, 4, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = gpu_views(x.r, l);
        OK(attn_step_enqueue(step, l, NULL, &t.k, &t.v, NULL, NULL, x.r->stream));
    }
    OK(attn_step_commit(step, NULL));
    OK(begin_on(&x, x.seq, 4, 4, 0, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = gpu_views(x.r, l);
        OK(attn_step_enqueue(step, l, &t.q, NULL, NULL, &t.o, (float *)x.r->lse[l], x.r->stream));
    }
    OK(attn_step_commit(step, NULL));
    compare(x.r, &x.s, 4);

    step      = begun(&x, 1);
    views_t t = gpu_views(x.r, 0);
    assert_says(enqueue(x.r, step, 1, x.r->stream), ATTN_ERR_INVALID, "0 is next");
    assert_says(attn_step_enqueue(step, 0, &t.q, NULL, NULL, &t.o, NULL, x.r->stream),
                ATTN_ERR_INVALID, "k is missing");
    assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INVALID,
                "on_stream");
    OK(enqueue(x.r, step, 0, x.r->stream));
    assert_says(enqueue(x.r, step, 0, x.r->stream), ATTN_ERR_INVALID, "1 is next");
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE, "layer 1 did not come");
    attn_step_abort(step);

    x.r->host[1][ROW_Q] = (_Float16)(0.0f / 0.0f);
    send(x.r);
    step = begun(&x, 1);
    enqueue_all(x.r, step, x.r->stream);
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_NUMERIC, "layer 1");
    attn_step_abort(step);
    good_step(&x, 2);

    step = begun(&x, 1); /* the LSE, which a layer need not want */
    draw(x.r, 1);
    send(x.r);
    for (uint32_t l = 0; l < LAYERS; l++) {
        t = gpu_views(x.r, l);
        OK(attn_step_enqueue(step, l, &t.q, &t.k, &t.v, &t.o, l == 0 ? (float *)x.r->lse[0] : NULL,
                             x.r->stream));
    }
    OK(attn_step_commit(step, NULL));
    remote_close(&x);
    cluster_down(&cluster);
}

/* ---- where it cannot be ---- */

/* A step that says so, and takes runs. */
static void
not_driven(remote_t *x, uint32_t n, const char *reason)
{
    uint64_t before = driven(x), id;
    attn_step_t *step;

    draw(x->r, n);
    send(x->r);
    OK(begin_on(x, x->seq, x->s.length, n, n, 0, &step));
    assert_says(attn_step_graph(step, &id), ATTN_ERR_UNSUPPORTED, reason);
    assert_says(enqueue(x->r, step, 0, x->r->stream), ATTN_ERR_UNSUPPORTED, reason);
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = gpu_views(x->r, l);
        OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)x->r->lse[l]));
    }
    OK(attn_step_commit(step, NULL));
    compare(x->r, &x->s, n);
    assert_int_equal(driven(x), before);
}

static void
test_where_it_cannot_be(void **state)
{
    remote_t x;
    attn_seq_t seq;
    attn_step_t *steps[4];

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    for (uint32_t i = 0; i < 4; i++) {
        OK(attn_seq_create(x.cache, NULL, &seq));
        OK(begin_on(&x, seq, 0, 1, 1, 0, &steps[i]));
    }
    not_driven(&x, 2, "as many as may be");
    for (uint32_t i = 0; i < 4; i++) {
        attn_step_abort(steps[i]);
    }
    good_step(&x, 2);
    remote_close(&x);
    setenv("ATTN_DRIVEN", "off", 1);
    remote_open(&x);
    not_driven(&x, 1, "is off");
    remote_close(&x);
    setenv("ATTN_DRIVEN", "pigeon", 1);
    assert_says(attn_client_open("inproc://cpu", NULL, &x.client), ATTN_ERR_INVALID, "pigeon");
    setenv("ATTN_DRIVEN", "shared", 1);
    setenv("ATTN_TRANSPORT", "grpc", 1);
    remote_open(&x);
    not_driven(&x, 1, "by way of grpc");
    remote_close(&x);
    setenv("ATTN_TRANSPORT", "ucx", 1);
    cluster_down(&cluster);

    same_gpu = true;
    cluster_with("cuda:0");
    same_gpu = false;
    unsetenv("ATTN_DRIVEN");
    remote_open(&x);
    not_driven(&x, 1, "on the same GPU");
    remote_close(&x);
    setenv("ATTN_DRIVEN", "shared", 1);
    cluster_down(&cluster);

    cluster_with("cpu");
    remote_open(&x);
    not_driven(&x, 1, "lends no memory of a GPU");
    remote_close(&x);
    cluster_down(&cluster);
}

/* ---- sides that stop, or are killed ---- */

/* A runner that does not go on: others do; an abort ends it at once, its deadline later. */
static void
test_a_runner_that_stops(void **state)
{
    remote_t x;
    attn_seq_t seq;
    attn_step_t *stuck[2];
    views_t t;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    draw(x.r, 1);
    send(x.r);
    for (uint32_t i = 0; i < 2; i++) {
        OK(attn_seq_create(x.cache, NULL, &seq));
        OK(begin_on(&x, seq, 0, 1, 1, i == 0 ? 60000 : 4000, &stuck[i]));
        OK(enqueue(x.r, stuck[i], 0, x.r->stream));
    }
    for (uint32_t i = 0; i < 6; i++) { /* of all kinds */
        good_step(&x, i + 1);
        draw(x.r, 1);
        send(x.r);
        attn_step_t *step;
        OK(begin_with(x.cache, x.seq, x.s.length, 1, 1, ATTN_MEMORY_CUDA, 0, &step));
        for (uint32_t l = 0; l < LAYERS; l++) {
            t = gpu_views(x.r, l);
            OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)x.r->lse[l]));
        }
        OK(attn_step_commit(step, NULL));
        compare(x.r, &x.s, 1);
    }
    uint64_t start = now_ms();
    attn_step_abort(stuck[0]);
    assert_true(now_ms() - start < SOON_MS);
    sleep_ms(4200); /* the other's deadline has passed by then */
    assert_true(attn_step_commit(stuck[1], NULL) != ATTN_OK);
    attn_step_abort(stuck[1]);
    attn_step_t *step; /* it is no other step's in the sequence */
    OK(begin_on(&x, seq, 0, 1, 1, 0, &step));
    attn_step_abort(step);
    good_step(&x, 1);
    remote_close(&x);
    cluster_down(&cluster);
}

/* A step that is aborted when its layers are on the way, and one that nothing was enqueued of. */
static void
test_aborts(void **state)
{
    remote_t x;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 3);
    for (uint32_t i = 0; i < 3; i++) {
        attn_step_t *step = begun(&x, 1);
        for (uint32_t l = 0; l < i; l++) {
            OK(enqueue(x.r, step, l, x.r->stream));
        }
        uint64_t start = now_ms();
        attn_step_abort(step);
        assert_true(now_ms() - start < SOON_MS);
    }
    if (fake.hold !=
        NULL) { /* whose stream is held up: it ends when that goes on, and not before */
        attn_step_t *step = begun(&x, 1);
        fake.hold(x.r->stream, 1);
        OK(enqueue(x.r, step, 0, x.r->stream));
        attn_step_abort(step);
        fake.hold(x.r->stream, 0);
        CU(cuStreamSynchronize(x.r->stream));
    }
    good_step(&x, 1);
    remote_close(&x);
    cluster_down(&cluster);
}

static void
test_a_worker_that_stops(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 2);
    draw(x.r, 1);
    send(x.r);
    OK(begin_on(&x, x.seq, x.s.length, 1, 1, 1000, &step));
    process_signal(&cluster.workers[0], SIGSTOP);
    enqueue_all(x.r, step, x.r->stream);
    uint64_t start       = now_ms();
    attn_status_t status = attn_step_commit(step, NULL);
    /* A real device goes on without its process, and the answer is there; the commit is not. */
    assert_true(status == ATTN_ERR_DEADLINE || status == ATTN_ERR_ABORTED);
    assert_true(now_ms() - start <= 1000 + SOON_MS);
    process_signal(&cluster.workers[0], SIGCONT);
    attn_step_abort(step);
    CU(cuStreamSynchronize(x.r->stream)); /* nothing waits there */
    sleep_ms(300);
    good_step(&x, 2);
    remote_close(&x);
    cluster_down(&cluster);
}

static void
test_a_worker_that_is_killed(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 2);
    draw(x.r, 1);
    send(x.r);
    OK(begin_on(&x, x.seq, x.s.length, 1, 1, 60000, &step));
    OK(enqueue(x.r, step, 0, x.r->stream));
    CU(cuStreamSynchronize(x.r->stream));
    process_kill(&cluster.workers[0]);
    uint64_t start = now_ms();
    OK(enqueue(x.r, step, 1, x.r->stream));
    CU(cuStreamSynchronize(x.r->stream)); /* long before the deadline */
    assert_true(now_ms() - start < 2 * SOON_MS);
    assert_true(attn_step_commit(step, NULL) != ATTN_OK);
    attn_step_abort(step);
    remote_close(&x); /* nothing is left mapped */
    cluster_down(&cluster);
}

/* In a process of its own: a step that stands still after a layer. */
static int
be_a_client(const char *coordinator)
{
    remote_t x;
    attn_step_t *step;

    snprintf(cluster.coordinator.address, sizeof(cluster.coordinator.address), "%s", coordinator);
    if (runner_driver() != 0) {
        return 1;
    }
    remote_open(&x);
    good_step(&x, 3);
    draw(x.r, 1);
    send(x.r);
    OK(begin_on(&x, x.seq, x.s.length, 1, 1, 60000, &step));
    OK(enqueue(x.r, step, 0, x.r->stream));
    CU(cuStreamSynchronize(x.r->stream));
    dprintf(atoi(getenv("ATTND_READY_FD")), "ready\n");
    for (;;) {
        sleep_ms(1000);
    }
}

static void
test_clients_that_are_killed(void **state)
{
    remote_t x;
    process_t other[2];
    const char *argv[4] = {self, "client", NULL};

    (void)state;
    cluster_with("cuda:0");
    remote_open(&x);
    good_step(&x, 2);
    argv[2] = cluster.coordinator.address;
    for (uint32_t round = 0; round < 3; round++) { /* more than steps may be driven at once */
        for (uint32_t i = 0; i < 2; i++) {
            process_start(&other[i], argv);
        }
        for (uint32_t i = 0; i < 2; i++) {
            process_wait_ready(&other[i]);
        }
        good_step(&x, 1);
        for (uint32_t i = 0; i < 2; i++) {
            process_kill(&other[i]);
            unlink(other[i].log);
        }
        await_gpu_clients(&x, 1); /* their memory is not in use any more */
        good_step(&x, 1);
    }
    assert_int_equal(driven(&x), 7);
    remote_close(&x);
    cluster_down(&cluster);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_same_answers),
        cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_two_steps_interleaved),
        cmocka_unit_test(test_all_kinds_of_steps),
        cmocka_unit_test(test_where_it_cannot_be),
        cmocka_unit_test(test_a_runner_that_stops),
        cmocka_unit_test(test_aborts),
        cmocka_unit_test(test_a_worker_that_stops),
        cmocka_unit_test(test_a_worker_that_is_killed),
        cmocka_unit_test(test_clients_that_are_killed),
    };

    self = argv[0];
    setenv("ATTN_TRANSPORT", "ucx", 1);
    setenv("ATTN_DRIVEN", "shared", 1);
    if (argc == 3 && strcmp(argv[1], "client") == 0) {
        return be_a_client(argv[2]);
    }
    if (argc == 2) {
        cmocka_set_test_filter(argv[1]);
    }
    snprintf(idle_file, sizeof(idle_file), "/tmp/attn-driven-idle-%d", (int)getpid());
    setenv("FAKE_CUDA_IDLE", idle_file, 1);
    int skipped = runner_driver();
    unlink(idle_file);
    return skipped != 0 ? skipped
                        : cmocka_run_group_tests_name("integration.driven", tests, NULL, NULL);
}
