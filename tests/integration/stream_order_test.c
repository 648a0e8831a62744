/*
 * Steps on a stream whose work comes late, in another order, or never: streams of the fake driver
 * are held, and its calls fail. A real one has no way to, and these tests are skipped there.
 */
#include "tests/integration/stream_runner.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#define NEEDS_FAKE()                                                                               \
    if (fake.hold == NULL) {                                                                       \
        skip();                                                                                    \
    }

/* ---- order ---- */

/* Nothing has written to the answer of a layer since send(). */
static bool
is_untouched(const runner_t *r, uint32_t l)
{
    unsigned char bytes[64];
    bool all = true;

    CU(cuMemcpyDtoH(bytes, r->o[l], sizeof(bytes)));
    for (size_t i = 0; i < sizeof(bytes); i++) {
        all = all && bytes[i] == 0x77;
    }
    return all;
}

/* A layer runs behind the one before it, whatever stream that is on, and commit behind all. */
static void
test_layers_follow_across_streams(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    CUstream other;

    (void)state;
    CU(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    draw(r, 3);
    send(r);
    attn_step_t *step = begin(r, &s, 3);
    fake.hold(r->stream, 1);
    OK(enqueue(r, step, 0, r->stream));
    OK(enqueue(r, step, 1, other));
    assert_true(is_untouched(r, 0) && is_untouched(r, 1));
    fake.hold(r->stream, 0);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 3);
    CU(cuStreamDestroy(other));
    runner_close(r);
}

/* And behind the tables that begin sends. */
static void
test_layers_follow_begin(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);

    (void)state;
    for (uint32_t round = 0; round < 2; round++) { /* what it needs is there in the second */
        draw(r, 1);
        send(r);
        fake.hold_all(round == 1);
        attn_step_t *step = begin(r, &s, 1);
        fake.hold(r->stream, 0);
        fake.hold(NULL, 0);
        enqueue_all(r, step, r->stream);
        assert_true(is_untouched(r, 1) == (round == 1));
        fake.hold_all(0);
        OK(attn_step_commit(step, NULL));
        compare(r, &s, 1);
    }
    runner_close(r);
}

/* A graph is behind what was enqueued on another stream, and what is enqueued behind the graph. */
static void
test_graphs_and_layers_follow(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    CUstream first, last;

    (void)state;
    CU(cuStreamCreate(&first, CU_STREAM_NON_BLOCKING));
    CU(cuStreamCreate(&last, CU_STREAM_NON_BLOCKING));
    draw(r, 2);
    send(r);
    attn_step_t *step = begin(r, &s, 2);
    CUgraphExec exec  = capture(r, step);
    fake.hold(first, 1);
    OK(enqueue(r, step, 0, first));
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    assert_says(enqueue(r, step, 1, last), ATTN_ERR_BUSY, "comes before further layers");
    assert_says(attn_step_replay(step, last), ATTN_ERR_BUSY, "on another stream");
    assert_says(attn_step_replayed(step, last), ATTN_ERR_INVALID, "is for the stream");
    OK(attn_step_replayed(step, r->stream));
    OK(enqueue(r, step, 1, last));
    assert_true(is_untouched(r, 0) && is_untouched(r, 1));
    fake.hold(r->stream, 1);
    fake.hold(first, 0);
    assert_true(!is_untouched(r, 0) && is_untouched(r, 1));
    fake.hold(r->stream, 0);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 2);
    CU(cuGraphExecDestroy(exec));
    CU(cuStreamDestroy(first));
    CU(cuStreamDestroy(last));
    runner_close(r);
}

static void *
let_go_soon(void *stream)
{
    usleep(300000);
    fake.hold(stream, 0);
    return NULL;
}

static void *
let_all_go_soon(void *unused)
{
    usleep(300000);
    fake.hold_all(0);
    return unused;
}

/* A step is over when its tables say so: a graph that is launched right after it does nothing. */
static void
test_a_graph_right_after_its_step(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    pthread_t thread;

    (void)state;
    draw(r, 1);
    send(r);
    attn_step_t *step = begin(r, &s, 1);
    CUgraphExec exec  = capture(r, step);
    OK(attn_step_replay(step, r->stream));
    OK(attn_step_replayed(step, r->stream));
    fake.hold_all(1);
    fake.hold(r->stream, 0);
    pthread_create(&thread, NULL, let_all_go_soon, NULL);
    attn_step_abort(step);
    CU(cuGraphLaunch(exec, r->stream));
    pthread_join(thread, NULL);
    assert_true(is_untouched(r, 0) && is_untouched(r, 1));

    /* An abort does not wait for that without an end: then the pages wait. */
    step = begin(r, &s, 1);
    fake.hold_all(1);
    fake.hold(r->stream, 0);
    uint64_t start = attn_now_ns();
    attn_step_abort(step);
    assert_in_range(attn_now_ns() - start, 900 * ATTN_NS_PER_MS, 6000 * ATTN_NS_PER_MS);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &step),
                     ATTN_ERR_BUSY);
    fake.hold_all(0);
    await_free(r, &s);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* ---- work that does not end ---- */

static void
test_an_abort_amid_work(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step, *next;

    (void)state;
    draw(r, 1);
    send(r);

    /* What is queued ends while the abort waits, or the stream has it still when it does not. */
    step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    attn_step_abort(step);
    fake.hold(r->stream, 1);
    step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    uint64_t start = attn_now_ns();
    attn_step_abort(step);
    assert_in_range(attn_now_ns() - start, 900 * ATTN_NS_PER_MS, 6000 * ATTN_NS_PER_MS);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &next),
                     ATTN_ERR_BUSY);
    fake.hold(r->stream, 0);
    await_free(r, &s);

    /* A graph between replay and replayed counts, too. */
    step             = begin(r, &s, 1);
    CUgraphExec exec = capture(r, step);
    fake.hold(r->stream, 1);
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    attn_step_abort(step);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &next),
                     ATTN_ERR_BUSY);
    fake.hold(r->stream, 0);
    await_free(r, &s);
    CU(cuGraphExecDestroy(exec));

    /* And the step after it is as any other. */
    step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 1);
    runner_close(r);
}

static void
test_a_deadline_amid_work(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step;

    (void)state;
    draw(r, 1);
    send(r);
    fake.hold(r->stream, 1);
    uint64_t start = attn_now_ns();
    OK(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 200, &step));
    enqueue_all(r, step, r->stream);
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_DEADLINE, "did not end before its deadline");
    assert_true(attn_now_ns() - start < 6000 * ATTN_NS_PER_MS);
    assert_int_equal(enqueue(r, step, 0, r->stream), ATTN_ERR_ABORTED);
    attn_step_abort(step);
    fake.hold(r->stream, 0);
    await_free(r, &s);

    /* Nobody asks: the tick ends it, when the stream is through. */
    fake.hold(r->stream, 1);
    OK(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 100, &step));
    OK(enqueue(r, step, 0, r->stream));
    usleep(300000);
    assert_int_equal(enqueue(r, step, 1, r->stream), ATTN_ERR_ABORTED);
    fake.hold(r->stream, 0);
    await_free(r, &s);
    attn_step_abort(step);
    runner_close(r);
}

/* A graph is not launched, nor told of, while its stream is captured; and a step that ends in
 * between waits for the end of that, and adds nothing to it. */
static void
test_replays_beside_a_capture(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *next;
    CUgraph graph;

    (void)state;
    draw(r, 1);
    send(r);
    attn_step_t *step = begin(r, &s, 1);
    CUgraphExec exec  = capture(r, step);
    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    assert_says(attn_step_replay(step, r->stream), ATTN_ERR_INVALID,
                "the stream is being captured");
    CU(cuStreamEndCapture(r->stream, &graph));
    CU(cuGraphDestroy(graph));
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    assert_says(attn_step_replayed(step, r->stream), ATTN_ERR_INVALID, "being captured");
    CU(cuStreamEndCapture(r->stream, &graph));
    CU(cuGraphDestroy(graph));
    OK(attn_step_replayed(step, r->stream));
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 1);

    step = begin(r, &s, 1);
    fake.hold(r->stream, 1);
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    int recorded = fake.count("cuEventRecord");
    attn_step_abort(step);
    fake.hold(r->stream, 0);
    usleep(200000);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 1, 1, 1, ATTN_MEMORY_CUDA, 0, &next),
                     ATTN_ERR_BUSY);
    assert_int_equal(fake.count("cuEventRecord"), recorded);
    CU(cuStreamEndCapture(r->stream, &graph));
    CU(cuGraphDestroy(graph));
    await_free(r, &s);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* What no event tells of is waited for all the same, be it that one cannot be asked, or could not
 * be recorded, or that its stream is gone. */
static void
test_work_that_no_event_tells_of(void **state)
{
    NEEDS_FAKE();
    runner_t *r      = runner_open(16);
    sequence_t s     = sequence_new(r);
    CUgraphExec exec = NULL;

    (void)state;
    draw(r, 1);
    send(r);
    for (uint32_t way = 0; way < 3; way++) {
        attn_step_t *step = begin(r, &s, 1);
        CUstream stream;
        pthread_t thread;
        if (way == 2) {
            exec = capture(r, step);
        }
        CU(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        fake.hold(stream, 1);
        if (way == 0) {
            enqueue_all(r, step, stream);
            fake.spoil("cuEventQuery", CUDA_ERROR_INVALID_VALUE, 9); /* both events */
        } else if (way == 1) {
            fake.spoil("cuEventRecord", CUDA_ERROR_INVALID_VALUE, 1);
            assert_says(enqueue(r, step, 0, stream), ATTN_ERR_INTERNAL, "cuEventRecord");
            assert_says(enqueue(r, step, 1, r->stream), ATTN_ERR_INTERNAL, "recorded no event");
        } else {
            OK(attn_step_replay(step, stream));
            CU(cuGraphLaunch(exec, stream));
            CU(cuStreamDestroy(stream));
        }
        pthread_create(&thread, NULL, let_go_soon, stream);
        uint64_t start = attn_now_ns();
        attn_step_abort(step);
        assert_in_range(attn_now_ns() - start, 250 * ATTN_NS_PER_MS, 10000 * ATTN_NS_PER_MS);
        pthread_join(thread, NULL);
        fake.spoil("cuEventQuery", CUDA_SUCCESS, 0);
        if (way < 2) {
            CU(cuStreamDestroy(stream));
        }
    }

    /* One that cannot be asked once ends well. */
    attn_step_t *step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    fake.spoil("cuEventQuery", CUDA_ERROR_INVALID_VALUE, 1);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 1);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* A run that fails after a part of it was queued returns when that has ended: the buffers are the
 * caller's then. */
static void
test_a_run_that_fails_half_way(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    views_t t    = gpu_views(r, 1);
    attn_step_t *step;
    pthread_t thread;

    (void)state;
    draw(r, 1);
    send(r);
    OK(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_AUTO, 0, &step));
    OK(attn_step_run(step, 1, &t.q, &t.k, &t.v, &t.o, NULL));
    fake.hold_all(1);
    fake.spoil("cuEventRecord", CUDA_ERROR_INVALID_VALUE, 1);
    pthread_create(&thread, NULL, let_all_go_soon, NULL);
    uint64_t start = attn_now_ns();
    assert_says(attn_step_run(step, 1, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INTERNAL,
                "cuEventRecord");
    assert_in_range(attn_now_ns() - start, 250 * ATTN_NS_PER_MS, 10000 * ATTN_NS_PER_MS);
    pthread_join(thread, NULL);
    attn_step_abort(step);
    runner_close(r);
}

static void *
abort_step(void *step)
{
    uint64_t start = attn_now_ns();

    attn_step_abort(step);
    return (void *)(uintptr_t)((attn_now_ns() - start) / ATTN_NS_PER_MS);
}

/* One handle is another stream on each thread: what a graph has there is waited for by whichever
 * thread ends the step. */
static void
test_a_step_that_another_thread_ends(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    pthread_t thread;
    void *ms;

    (void)state;
    draw(r, 1);
    send(r);
    attn_step_t *step = begin(r, &s, 1);
    CUgraphExec exec  = capture(r, step);
    fake.hold(CU_STREAM_PER_THREAD, 1);
    OK(attn_step_replay(step, CU_STREAM_PER_THREAD));
    CU(cuGraphLaunch(exec, CU_STREAM_PER_THREAD));
    pthread_create(&thread, NULL, abort_step, step);
    usleep(300000);
    fake.hold(CU_STREAM_PER_THREAD, 0);
    pthread_join(thread, &ms);
    assert_in_range((uintptr_t)ms, 200, 10000);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* After an error that stays nothing runs on, and nothing waits. It stays for this process, too. */
static void
test_a_device_that_fails_for_good(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);

    (void)state;
    draw(r, 1);
    send(r);
    fake.hold(r->stream, 1);
    attn_step_t *step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    fake.spoil("cuEventQuery", CUDA_ERROR_ILLEGAL_ADDRESS, 1000);
    fake.spoil("cuStreamSynchronize", CUDA_ERROR_ILLEGAL_ADDRESS, 1000);
    fake.spoil("cuCtxSynchronize", CUDA_ERROR_ILLEGAL_ADDRESS, 1000);
    fake.spoil("queue", CUDA_ERROR_ILLEGAL_ADDRESS, 1000);
    uint64_t start = attn_now_ns();
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_INTERNAL, "CUDA_ERROR_ILLEGAL_ADDRESS");
    attn_step_abort(step);
    fake.hold(r->stream, -1);
    attn_cache_close(r->on_gpu);
    assert_true(attn_now_ns() - start < 4000 * ATTN_NS_PER_MS);
    r->on_gpu = NULL;
    fake.spoil("cuEventQuery", CUDA_SUCCESS, 0);
    fake.spoil("cuStreamSynchronize", CUDA_SUCCESS, 0);
    fake.spoil("cuCtxSynchronize", CUDA_SUCCESS, 0);
    fake.spoil("queue", CUDA_SUCCESS, 0);
    runner_close(r);
}

static uint64_t
region_bytes(attn_client_t *client)
{
    attn_cluster_info_t info;

    OK(attn_cluster_describe(client, &info));
    uint64_t bytes = info.workers[0].region_bytes;
    attn_cluster_info_free(&info);
    return bytes;
}

/* The figures are told twice a second. */
static void
await_region_bytes(attn_client_t *client, uint64_t bytes)
{
    uint64_t end = attn_now_ns() + 10000 * ATTN_NS_PER_MS;

    while (region_bytes(client) != bytes && attn_now_ns() < end) {
        usleep(10000);
    }
    assert_int_equal(region_bytes(client), bytes);
}

/* Closing a cache ends, though the device does not: its memory is nobody's until it is through.
 * Closing the client waits for it. */
static void
test_a_cache_closes_amid_work(void **state)
{
    NEEDS_FAKE();
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    CUstream stuck[2];
    pthread_t thread;

    (void)state;
    draw(r, 1);
    send(r);
    for (uint32_t i = 0; i < 2;
         i++) { /* two steps of the cache, and one thing that they wrote to */
        sequence_t t      = sequence_new(r);
        attn_step_t *step = begin(r, &t, 1);
        CU(cuStreamCreate(&stuck[i], CU_STREAM_NON_BLOCKING));
        fake.hold(stuck[i], 1);
        enqueue_all(r, step, stuck[i]);
        attn_step_abort(step);
    }
    uint64_t start = attn_now_ns(), one = UINT64_C(8) << 20; /* of a cache */
    attn_cache_close(r->on_gpu);
    assert_true(attn_now_ns() - start < 6000 * ATTN_NS_PER_MS);

    /* Another of that name has other memory, and serves. */
    runner_open_cache(r->gpu, 16, &r->on_gpu);
    OK(attn_seq_create(r->on_gpu, NULL, &s.gpu));
    attn_step_t *step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 1);
    await_region_bytes(r->gpu, 2 * one);
    fake.hold(stuck[0], 0);
    usleep(700000);
    assert_int_equal(region_bytes(r->gpu), 2 * one);
    fake.hold(stuck[1], 0);
    await_region_bytes(r->gpu, one);

    step = begin(r, &s, 1);
    fake.hold(stuck[0], 1);
    enqueue_all(r, step, stuck[0]);
    attn_step_abort(step);
    attn_cache_close(r->on_gpu);
    pthread_create(&thread, NULL, let_go_soon, stuck[0]);
    start = attn_now_ns();
    attn_client_close(r->gpu);
    assert_in_range(attn_now_ns() - start, 250 * ATTN_NS_PER_MS, 10000 * ATTN_NS_PER_MS);
    pthread_join(thread, NULL);
    r->gpu    = NULL;
    r->on_gpu = NULL;
    CU(cuStreamDestroy(stuck[0]));
    CU(cuStreamDestroy(stuck[1]));
    runner_close(r);
}

/* ---- copies for workers elsewhere ---- */

/* They wait for nobody's streams, and no longer than the step's deadline; memory that they are in
 * is used again when they ended. */
static void
test_copies_end_by_the_deadline(void **state)
{
    NEEDS_FAKE();
    runner_t *r = runner_open(16);
    views_t t   = gpu_views(r, 0);
    attn_seq_t seq;
    attn_step_t *step;

    (void)state;
    OK(attn_seq_create(r->on_cpu, NULL, &seq));
    draw(r, 2);
    send(r);
    fake.hold(NULL, 1);
    CU(cuMemsetD8Async(r->lse[1], 0, 4, NULL)); /* the legacy stream has something to do */
    OK(begin_with(r->on_cpu, seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    OK(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL));
    attn_step_abort(step);
    fake.hold(NULL, 0);

    int pieces = fake.count("cuMemHostAlloc");
    for (uint32_t round = 0; round < 2; round++) {
        fake.hold_all(1);
        OK(begin_with(r->on_cpu, seq, 0, 2, 2, ATTN_MEMORY_CUDA, 200, &step));
        uint64_t start = attn_now_ns();
        assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_DEADLINE,
                    "did not end before the deadline");
        assert_in_range(attn_now_ns() - start, 150 * ATTN_NS_PER_MS, 3000 * ATTN_NS_PER_MS);
        assert_says(attn_step_commit(step, NULL), ATTN_ERR_ABORTED, "did not end before");
        attn_step_abort(step);
        fake.hold_all(0);
    }

    /* One that fails ends the step, too. */
    OK(begin_with(r->on_cpu, seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    OK(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL));
    assert_int_equal(fake.count("cuMemHostAlloc"), pieces);
    fake.spoil("cuEventQuery", CUDA_ERROR_UNKNOWN, 1);
    assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INTERNAL,
                "cuEventQuery: CUDA error 999");
    assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_ABORTED,
                "cuEventQuery");
    attn_step_abort(step);

    runner_close(r);
}

/* ---- all of it ---- */

static void
test_nothing_is_left(void **state)
{
    (void)state;
    NEEDS_FAKE();
    assert_nothing_is_left();
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers_follow_across_streams),
        cmocka_unit_test(test_layers_follow_begin),
        cmocka_unit_test(test_graphs_and_layers_follow),
        cmocka_unit_test(test_a_graph_right_after_its_step),
        cmocka_unit_test(test_an_abort_amid_work),
        cmocka_unit_test(test_a_deadline_amid_work),
        cmocka_unit_test(test_replays_beside_a_capture),
        cmocka_unit_test(test_work_that_no_event_tells_of),
        cmocka_unit_test(test_a_run_that_fails_half_way),
        cmocka_unit_test(test_a_step_that_another_thread_ends),
        cmocka_unit_test(test_a_cache_closes_amid_work),
        cmocka_unit_test(test_copies_end_by_the_deadline),
        cmocka_unit_test(test_a_device_that_fails_for_good),
        cmocka_unit_test(test_nothing_is_left),
    };
    int skipped = runner_driver();

    return skipped != 0
               ? skipped
               : cmocka_run_group_tests_name("integration.stream_order", tests, NULL, NULL);
}
