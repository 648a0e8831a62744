/*
 * Steps whose tensors are in a GPU's memory, and steps on a stream of the runner: what they answer,
 * and what is wrong with what they are given. stream_order_test.c has those that come late.
 */
#include "tests/integration/stream_runner.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- runs that wait ---- */

static void
test_runs_with_cuda_pointers(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_links_info_t info;

    (void)state;
    for (uint32_t round = 0; round < 4; round++) {
        uint32_t n             = round % 2 ? 1 : 30;
        attn_memory_t memory[] = {ATTN_MEMORY_AUTO, ATTN_MEMORY_CUDA};
        attn_step_t *step;
        draw(r, n);
        send(r);
        OK(begin_with(r->on_gpu, s.gpu, s.length, n, n, memory[round / 2], 0, &step));
        int first = fake.count != NULL ? fake.count("cuStreamSynchronize") : 0;
        for (uint32_t l = LAYERS; l-- > 0;) {
            views_t t = gpu_views(r, l);
            OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l]));
            OK(attn_step_run(step, l, &t.q, NULL, NULL, &t.o, NULL)); /* asked again */
            int now = fake.count != NULL ? fake.count("cuStreamSynchronize") : 0;
            first   = memory[round / 2] != ATTN_MEMORY_CUDA && l + 1 == LAYERS ? now : first;
            assert_int_equal(now, first); /* a run waits once: with its event */
        }
        OK(attn_step_commit(step, NULL));
        compare(r, &s, n);
    }
    OK(attn_client_links(r->gpu, &info));
    assert_int_equal(info.runs_cuda, 4 * LAYERS * 2);
    assert_int_equal(info.runs_staged, 0);
    attn_links_info_free(&info);
    runner_close(r);
}

/* A worker on the CPU takes copies, and gives them back where the caller has room for them. */
static void
test_tensors_of_a_gpu_for_a_cpu(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_seq_t other;
    attn_links_info_t info;
    attn_step_t *step;

    (void)state;
    OK(attn_seq_create(r->on_cpu, NULL, &other));
    draw(r, 5);
    send(r);
    OK(begin_with(r->on_cpu, other, 0, 5, 5, ATTN_MEMORY_CUDA, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = gpu_views(r, l);
        OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l]));
    }
    assert_says(enqueue(r, step, 0, r->stream), ATTN_ERR_UNSUPPORTED,
                "the worker (engine) does not compute on a GPU in this process");
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 5);
    OK(attn_client_links(r->cpu, &info));
    assert_int_equal(info.runs_staged, LAYERS);
    attn_links_info_free(&info);
    runner_close(r);
}

/* ---- enqueued ---- */

static void
test_layers_on_a_stream(void **state)
{
    runner_t *r  = runner_open(7);
    sequence_t s = sequence_new(r);

    (void)state;
    for (uint32_t round = 0; round < 6; round++) {
        uint32_t n = round == 0 ? 50 : round == 3 ? 20 : 1;
        draw(r, n);
        send(r);
        attn_step_t *step                = begin(r, &s, n);
        static const char *const never[] = {"cuMemAlloc",          "cuMemFree",
                                            "cuMemHostAlloc",      "cuMemFreeHost",
                                            "cuStreamSynchronize", "cuEventQuery"};
        int before[6];
        for (int i = 0; i < 6; i++) {
            before[i] = fake.count != NULL ? fake.count(never[i]) : 0;
        }
        enqueue_all(r, step, round % 2 ? r->stream : NULL);
        for (int i = 0; i < 6 && fake.count != NULL; i++) {
            assert_int_equal(fake.count(never[i]), before[i]);
        }
        OK(attn_step_commit(step, NULL));
        compare(r, &s, n);
    }
    runner_close(r);
}

static void
launch(runner_t *r, attn_step_t *step, CUgraphExec exec)
{
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    OK(attn_step_replayed(step, r->stream));
}

/* A graph without a step writes nothing. */
static void
leaves_all_as_it_is(runner_t *r, CUgraphExec exec)
{
    unsigned char bytes[64];

    CU(cuMemsetD8Async(r->o[0], 0x11, sizeof(bytes), NULL));
    CU(cuStreamSynchronize(NULL));
    CU(cuGraphLaunch(exec, r->stream));
    CU(cuStreamSynchronize(r->stream));
    CU(cuMemcpyDtoH(bytes, r->o[0], sizeof(bytes)));
    for (size_t i = 0; i < sizeof(bytes); i++) {
        assert_int_equal(bytes[i], 0x11);
    }
}

/* One graph for token after token, until what was planned outgrows its room: then another. */
static void
test_a_graph_serves_later_steps(void **state)
{
    runner_t *r      = runner_open(1); /* room for 1,024 pages is outgrown soon */
    sequence_t s     = sequence_new(r);
    uint64_t last    = 0;
    uint32_t changes = 0;
    CUgraphExec exec = NULL;

    (void)state;
    prompt(r, &s, 1010);
    for (uint32_t token = 0; token < 40; token++) {
        uint64_t id = 0;
        draw(r, 1);
        send(r);
        attn_step_t *step = begin(r, &s, 1);
        OK(attn_step_graph(step, &id));
        assert_true(id != 0);
        if (id != last) {
            if (exec != NULL) {
                CU(cuGraphExecDestroy(exec));
            }
            exec = capture(r, step);
            changes++;
            /* Nothing ran yet. */
            assert_says(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE, "layer 0 has no k, v");
        }
        last = id;
        launch(r, step, exec);
        OK(attn_step_commit(step, NULL));
        compare(r, &s, 1);
    }
    assert_int_equal(changes, 2);

    leaves_all_as_it_is(r, exec);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* The same of requests of many rows, which have a kernel of their own on some devices. */
static void
test_a_graph_of_many_rows(void **state)
{
    runner_t *r      = runner_open(8);
    sequence_t s     = sequence_new(r);
    uint64_t last    = 0;
    uint32_t n       = ROWS_MAX - 3;
    CUgraphExec exec = NULL;

    (void)state;
    for (uint32_t round = 0; round < 5; round++) {
        uint64_t id = 0;
        draw(r, n);
        send(r);
        attn_step_t *step = begin(r, &s, n);
        OK(attn_step_graph(step, &id));
        assert_true(round == 0 || id == last);
        exec = round == 0 ? capture(r, step) : exec;
        last = id;
        launch(r, step, exec);
        OK(attn_step_commit(step, NULL));
        compare(r, &s, n);
    }

    leaves_all_as_it_is(r, exec);
    CU(cuGraphExecDestroy(exec));
    runner_close(r);
}

/* While one stream is captured, with the mode that forbids most calls, other steps go on. */
static void
test_steps_beside_a_capture(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r), t = sequence_new(r);
    CUgraph graph;

    (void)state;
    draw(r, 3);
    send(r);
    attn_step_t *step = begin(r, &s, 3);
    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(enqueue(r, step, 0, r->stream));
    attn_step_t *other = begin(r, &t, 3); /* of the same shape: another track */
    uint64_t id[2];
    OK(attn_step_graph(step, &id[0]));
    OK(attn_step_graph(other, &id[1]));
    assert_true(id[0] != id[1]);
    OK(enqueue(r, other, 0, NULL));
    OK(enqueue(r, step, 1, r->stream));
    OK(enqueue(r, other, 1, NULL));
    OK(attn_step_commit(other, NULL));
    CU(cuStreamEndCapture(r->stream, &graph));
    CU(cuGraphDestroy(graph));
    compare(r, &t, 3);
    attn_step_abort(step);
    runner_close(r);
}

/* Of another thread, which captures nothing, while this one does. */
typedef struct beside {
    runner_t *r;
    attn_seq_t seq;
    bool ok;
} beside_t;

static void *
stage_beside(void *arg)
{
    beside_t *b = arg;
    attn_client_t *client;
    attn_step_t *step;

    b->ok = begin_with(b->r->on_cpu, b->seq, 0, 5, 5, ATTN_MEMORY_CUDA, 0, &step) == ATTN_OK;
    for (uint32_t l = 0; l < LAYERS && b->ok; l++) {
        views_t t = gpu_views(b->r, l);
        b->ok = attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)b->r->lse[l]) == ATTN_OK;
    }
    b->ok = b->ok && attn_step_commit(step, NULL) == ATTN_OK;
    b->ok = b->ok && attn_client_open("inproc://cuda:0?slab=1MiB", NULL, &client) == ATTN_OK;
    if (b->ok) {
        attn_client_close(client);
    } else {
        print_error("%s\n", attn_last_error());
    }
    return NULL;
}

/* Copies through the host, and a client that opens and closes, leave a capture as it is, also of a
 * stream that waits for the legacy one. */
static void
test_staging_beside_a_capture(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    beside_t b   = {.r = r};
    CUstream stream;
    CUgraph graph = NULL;
    CUgraphExec exec;
    pthread_t thread;

    (void)state;
    OK(attn_seq_create(r->on_cpu, NULL, &b.seq));
    draw(r, 5);
    send(r);
    CU(cuStreamCreate(&stream, CU_STREAM_DEFAULT));
    attn_step_t *step = begin(r, &s, 5);
    CU(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(enqueue(r, step, 0, stream));
    pthread_create(&thread, NULL, stage_beside, &b);
    pthread_join(thread, NULL);
    OK(enqueue(r, step, 1, stream));
    CU(cuStreamEndCapture(stream, &graph));
    assert_true(b.ok);
    CU(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(attn_step_replay(step, stream));
    CU(cuGraphLaunch(exec, stream));
    OK(attn_step_replayed(step, stream));
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 5);
    CU(cuGraphExecDestroy(exec));
    CU(cuGraphDestroy(graph));
    CU(cuStreamDestroy(stream));
    runner_close(r);
}

/* A layer of a step that is committed counts once, however often commit was asked for, and of one
 * that only asks, too. */
static void
test_layers_are_counted(void **state)
{
    runner_t *r   = runner_open(16);
    sequence_t s  = sequence_new(r);
    uint64_t runs = 0;

    (void)state;
    draw(r, 3);
    send(r);
    for (uint32_t round = 0; round < 3; round++) { /* brings and asks, asks, brings */
        uint32_t n_q = round == 2 ? 0 : 3, n_new = round == 1 ? 0 : 3;
        attn_cluster_info_t info;
        attn_step_t *step;
        OK(begin_with(r->on_gpu, s.gpu, s.length, n_q, n_new, ATTN_MEMORY_CUDA, 0, &step));
        for (uint32_t l = 0; l < LAYERS; l++) {
            views_t t = gpu_views(r, l);
            OK(attn_step_enqueue(step, l, n_q > 0 ? &t.q : NULL, n_new > 0 ? &t.k : NULL,
                                 n_new > 0 ? &t.v : NULL, n_q > 0 ? &t.o : NULL, NULL, NULL));
            if (round == 0 && l == 0) {
                assert_int_equal(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE);
            }
        }
        assert_int_equal(attn_step_commit(step, (uint32_t[]){n_new + 1}), ATTN_ERR_INVALID);
        OK(attn_step_commit(step, NULL));
        s.length += n_new;
        runs += n_q > 0 ? LAYERS : 0;
        uint64_t told = 0, until = attn_now_ns() + 10000 * ATTN_NS_PER_MS;
        usleep(600000); /* the figures are told twice a second */
        do {
            OK(attn_cluster_describe(r->gpu, &info));
            told = info.workers[0].runs;
            attn_cluster_info_free(&info);
            usleep(10000);
        } while (told < runs && attn_now_ns() < until);
        assert_int_equal(told, runs);
    }
    runner_close(r);
}

/* Two steps, layer by layer in turns, each on a stream of its own, and one on two streams. */
static void
test_two_steps_in_turns(void **state)
{
    runner_t *a = runner_open(16), *b = runner_open(16);
    sequence_t s = sequence_new(a), t = sequence_new(a);
    CUstream more;

    (void)state;
    CU(cuStreamCreate(&more, CU_STREAM_NON_BLOCKING));
    for (uint32_t round = 0; round < 3; round++) {
        draw(a, 4);
        send(a);
        draw(b, 4);
        send(b);
        attn_step_t *of_s = begin(a, &s, 4), *of_t = begin(a, &t, 4);
        for (uint32_t l = 0; l < LAYERS; l++) {
            OK(enqueue(a, of_s, l, l == 0 ? a->stream : more));
            OK(enqueue(b, of_t, l, b->stream));
        }
        OK(attn_step_commit(of_t, NULL));
        OK(attn_step_commit(of_s, NULL));
        compare(a, &s, 4);
        attn_cache_t *own = b->on_cpu; /* b's numbers, in a's cache */
        b->on_cpu         = a->on_cpu;
        compare(b, &t, 4);
        b->on_cpu = own;
    }
    CU(cuStreamDestroy(more));
    runner_close(a);
    runner_close(b);
}

/* ---- what goes wrong ---- */

static void
test_what_the_device_finds(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);

    (void)state;
    draw(r, 2);
    _Float16 good               = r->host[1][ROW + ROW_Q + 5];
    r->host[1][ROW + ROW_Q + 5] = (_Float16)NAN; /* in k of layer 1 */
    send(r);
    attn_step_t *step = begin(r, &s, 2);
    enqueue_all(r, step, r->stream);
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_NUMERIC, "layer 1: a NaN or an infinity");
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE, "layer 1 has no k, v");
    r->host[1][ROW + ROW_Q + 5] = good;
    send(r);
    OK(enqueue(r, step, 0, r->stream)); /* the same again */
    OK(enqueue(r, step, 1, r->stream));
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 2);

    /* The same layer with others. */
    draw(r, 2);
    send(r);
    step = begin(r, &s, 2);
    enqueue_all(r, step, r->stream);
    CU(cuStreamSynchronize(r->stream));
    draw(r, 2);
    send(r);
    OK(enqueue(r, step, 1, r->stream));
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_CONFLICT, "layer 1: k, v differ");
    attn_step_abort(step);

    /* Asked about before there is something, which only the device can know. */
    step      = begin(r, &s, 2);
    views_t t = gpu_views(r, 0);
    OK(attn_step_enqueue(step, 0, &t.q, NULL, NULL, &t.o, NULL, r->stream));
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE, "layer 0 was asked about");
    enqueue_all(r, step, r->stream);
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 2);
    runner_close(r);
}

/* A layer that is stored stays so, whatever comes for it again: a NaN is another value, as in runs
 * from the host's memory. */
static void
test_a_nan_after_a_layer_was_stored(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step;

    (void)state;
    for (uint32_t run = 0; run < 2; run++) {
        draw(r, 2);
        send(r);
        OK(begin_with(r->on_gpu, s.gpu, s.length, 2, 2, run ? ATTN_MEMORY_AUTO : ATTN_MEMORY_CUDA,
                      0, &step));
        views_t t = gpu_views(r, 0);
        OK(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[0]));
        _Float16 good         = r->host[0][ROW_Q + 5];
        r->host[0][ROW_Q + 5] = (_Float16)NAN;
        send(r);
        if (run) {
            assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_CONFLICT,
                        "layer 0: k, v differ");
        } else {
            OK(enqueue(r, step, 0, r->stream));
            assert_says(attn_step_commit(step, NULL), ATTN_ERR_CONFLICT, "layer 0: k, v differ");
        }
        r->host[0][ROW_Q + 5] = good;
        send(r);
        OK(attn_step_run(step, 0, &t.q, NULL, NULL, &t.o, (float *)r->lse[0])); /* it is there */
        t = gpu_views(r, 1);
        OK(attn_step_run(step, 1, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[1]));
        OK(attn_step_commit(step, NULL));
        compare(r, &s, 2);
    }
    runner_close(r);
}

static void
test_arguments(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step;
    float *host = malloc(4 * ROW_Q * sizeof(float));

    (void)state;
    OK(begin_with(r->on_gpu, s.gpu, 0, 2, 2, ATTN_MEMORY_AUTO, 0, &step));
    assert_says(enqueue(r, step, 0, NULL), ATTN_ERR_INVALID, "memory = ATTN_MEMORY_CUDA");
    views_t t = gpu_views(r, 0);
    t.o.data  = host;
    assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INVALID,
                "q is in the memory of GPU 0, o of GPU -1");
    t = views_of(r->host[0], host, ATTN_MEMORY_HOST);
    OK(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL));
    t = gpu_views(r, 1);
    assert_says(attn_step_run(step, 1, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INVALID,
                "were in the host's memory");
    attn_step_abort(step);

    step = begin(r, &s, 2);
    t    = views_of(r->host[0], host, ATTN_MEMORY_AUTO);
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "GPU -1");
    assert_says(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL), ATTN_ERR_INVALID,
                "are in the device's memory");
    t        = gpu_views(r, 0);
    t.k.data = (char *)t.k.data + 8;
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "multiples of 16 bytes");
    t                = gpu_views(r, 0);
    t.o.token_stride = ROW_Q + 4;
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "it is packed, 256 and 64");
    t = gpu_views(r, 0);
    assert_says(attn_step_enqueue(step, 2, &t.q, &t.k, &t.v, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "layer is 2");
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, NULL, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "v is NULL");
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, NULL, NULL, NULL), ATTN_ERR_INVALID,
                "o is NULL");
    t        = gpu_views(r, 0);
    t.o.data = (char *)t.o.data + 2;
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL), ATTN_ERR_INVALID,
                "o is at");
    t = gpu_views(r, 0);
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o,
                                  (float *)(void *)((char *)r->lse[0] + 1), NULL),
                ATTN_ERR_INVALID, "lse is at");
    attn_step_abort(step);

    /* q is at any 4 bytes, o at any element, but for the kernel of requests of many rows. */
    if (fake.count != NULL) { /* a device of capability 9.0, which has one */
        step     = begin(r, &s, ROWS_MAX);
        t        = gpu_views(r, 0);
        t.q.data = (char *)t.q.data + 8;
        assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL),
                    ATTN_ERR_INVALID, "q is at");
        assert_non_null(strstr(attn_last_error(), "multiples of 16 bytes"));
        t        = gpu_views(r, 0);
        t.o.data = (char *)t.o.data + 8;
        assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL),
                    ATTN_ERR_INVALID, "o is at");
        assert_non_null(strstr(attn_last_error(), "a multiple of 16 bytes"));
        attn_step_abort(step);
    }
    step     = begin(r, &s, 2);
    t        = gpu_views(r, 0);
    t.q.data = (char *)t.q.data + 8;
    t.o.data = (char *)t.o.data + 8;
    OK(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, NULL));
    attn_step_abort(step);
    free(host);
    runner_close(r);
}

/* What is told to be in a GPU's memory is there, or nothing is queued: kernels that read elsewhere
 * would end the context of the whole process. */
static void
test_what_is_told_is_looked_at(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    float *host  = malloc(4 * ROW_Q * sizeof(float));
    attn_step_t *step;

    (void)state;
    for (uint32_t run = 0; run < 2; run++) {
        step = begin(r, &s, 2);
        for (uint32_t i = 0; i < 4; i++) {
            static const char *const at[] = {"q is at", "k is at", "v is at", "o is at"};
            views_t t                     = gpu_views(r, 1); /* told */
            attn_tensor_t *tensors[]      = {&t.q, &t.k, &t.v, &t.o};
            tensors[i]->data              = host;
            assert_says(run ? attn_step_run(step, 1, &t.q, &t.k, &t.v, &t.o, NULL)
                            : attn_step_enqueue(step, 1, &t.q, &t.k, &t.v, &t.o, NULL, r->stream),
                        ATTN_ERR_INVALID, at[i]);
        }
        for (uint32_t l = 0; l < LAYERS; l++) { /* found out, and told */
            views_t t = gpu_views(r, l);
            assert_says(run ? attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, host)
                            : attn_step_enqueue(step, l, &t.q, &t.k, &t.v, &t.o, host, r->stream),
                        ATTN_ERR_INVALID,
                        l == 0 ? "q is in the memory of GPU 0, lse of GPU -1" : "lse is at");
        }
        attn_step_abort(step);
    }
    free(host);
    runner_close(r);
}

/* Tensors of another GPU than the worker's are refused on a stream, and copied for a run. */
static void
test_tensors_of_another_gpu(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    CUdevice device;
    CUcontext context;
    CUdeviceptr at[3];
    attn_step_t *step;
    int n = 0;

    (void)state;
    CU(cuDeviceGetCount(&n));
    if (n < 2) {
        runner_close(r);
        skip();
    }
    CU(cuDeviceGet(&device, 1));
    CU(cuDevicePrimaryCtxRetain(&context, device));
    CU(cuCtxPushCurrent(context));
    CU(cuMemAlloc(&at[0], sizeof(r->host[0])));
    CU(cuMemAlloc(&at[1], sizeof(r->cpu_o[0])));
    CU(cuMemAlloc(&at[2], sizeof(r->cpu_lse[0])));
    draw(r, 2);
    send(r);

    step      = begin(r, &s, 2);
    views_t t = views_of((void *)at[0], (void *)at[1], ATTN_MEMORY_CUDA), ours = gpu_views(r, 1);
    assert_says(attn_step_enqueue(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, r->stream),
                ATTN_ERR_INVALID, "in the memory of GPU 1");
    assert_says(attn_step_enqueue(step, 0, &ours.q, &t.k, &ours.v, &ours.o, NULL, r->stream),
                ATTN_ERR_INVALID, "q is in the memory of GPU 0, k of GPU 1");
    assert_says(attn_step_run(step, 0, &ours.q, &ours.k, &ours.v, &ours.o, (float *)at[2]),
                ATTN_ERR_INVALID, "q is in the memory of GPU 0, lse of GPU 1");
    attn_step_abort(step);

    OK(begin_with(r->on_gpu, s.gpu, 0, 2, 2, ATTN_MEMORY_AUTO, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemcpyHtoD(at[0], r->host[l], sizeof(r->host[l])));
        OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)at[2]));
        CU(cuMemcpyDtoDAsync(r->o[l], at[1], sizeof(r->cpu_o[l]), NULL));
        CU(cuMemcpyDtoDAsync(r->lse[l], at[2], sizeof(r->cpu_lse[l]), NULL));
        CU(cuStreamSynchronize(NULL));
    }
    OK(attn_step_commit(step, NULL));
    compare(r, &s, 2);
    for (int i = 0; i < 3; i++) {
        CU(cuMemFree(at[i]));
    }
    CU(cuCtxPopCurrent(&context));
    CU(cuDevicePrimaryCtxRelease(device));
    runner_close(r);
}

/* ---- all of it ---- */

static void
test_nothing_is_left(void **state)
{
    (void)state;
    if (fake.alive == NULL) {
        skip();
    }
    assert_nothing_is_left();
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_runs_with_cuda_pointers),
        cmocka_unit_test(test_tensors_of_a_gpu_for_a_cpu),
        cmocka_unit_test(test_layers_on_a_stream),
        cmocka_unit_test(test_a_graph_serves_later_steps),
        cmocka_unit_test(test_a_graph_of_many_rows),
        cmocka_unit_test(test_steps_beside_a_capture),
        cmocka_unit_test(test_staging_beside_a_capture),
        cmocka_unit_test(test_layers_are_counted),
        cmocka_unit_test(test_two_steps_in_turns),
        cmocka_unit_test(test_what_the_device_finds),
        cmocka_unit_test(test_a_nan_after_a_layer_was_stored),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_what_is_told_is_looked_at),
        cmocka_unit_test(test_tensors_of_another_gpu),
        cmocka_unit_test(test_nothing_is_left),
    };
    int skipped = runner_driver();

    return skipped != 0 ? skipped
                        : cmocka_run_group_tests_name("integration.on_stream", tests, NULL, NULL);
}
