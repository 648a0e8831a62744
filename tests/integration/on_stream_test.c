/*
 * Steps whose tensors are in a GPU's memory, and steps on a stream of the runner: in this process,
 * on a GPU, or on what fake_cuda.c makes of one, where kernels are played by the host. What is
 * answered is held against the same steps on the CPU, from the host's memory.
 */
#include "base/clock.h"
#include "client/attn.h"
#include "kernels/cuda/driver.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OK(call) assert_int_equal_or_tell(call, __LINE__)
#define LAYERS 2u
#define Q_HEADS 4u
#define KV_HEADS 2u
#define DIM 64u
#define ROW_Q (Q_HEADS * DIM)
#define ROW_KV (KV_HEADS * DIM)
#define ROW                                                                                        \
    (ROW_Q + 2 * ROW_KV) /* q, k and v of a token side by side, as a projection leaves them */
#define ROWS_MAX 64u
#define TOLERANCE 4e-3f

static const cuda_driver_t *cu;
static CUcontext context;
static void (*fake_hold)(CUstream, int); /* NULL: a real driver */
static int (*fake_count)(const char *);
static int (*fake_alive)(int *);

static void
assert_int_equal_or_tell(attn_status_t status, int line)
{
    if (status != ATTN_OK) {
        print_error("line %d: %s: %s\n", line, attn_strerror(status), attn_last_error());
    }
    assert_int_equal(status, ATTN_OK);
}

#define CU(call) assert_int_equal(cu->call, CUDA_SUCCESS)

/* ---- a runner ---- */

/* The same steps on two sides: the GPU, and the CPU to compare with. */
typedef struct runner {
    attn_client_t *gpu, *cpu;
    attn_cache_t *on_gpu, *on_cpu;
    CUstream stream;
    CUdeviceptr rows[LAYERS], o[LAYERS], lse[LAYERS];
    _Float16 host[LAYERS][ROWS_MAX * ROW];
    float cpu_o[LAYERS][ROWS_MAX * ROW_Q], cpu_lse[LAYERS][ROWS_MAX * Q_HEADS];
} runner_t;

typedef struct sequence {
    attn_seq_t gpu, cpu;
    uint64_t length;
} sequence_t;

static void
open_cache(attn_client_t *client, uint32_t page_size, attn_cache_t **cache_p)
{
    attn_layer_t layers[LAYERS] = {{.causal = true}, {.causal = true, .window = 20}};
    attn_geometry_t g;

    attn_geometry_init(&g);
    g.layers = LAYERS, g.q_heads = Q_HEADS, g.kv_heads = KV_HEADS;
    g.head_dim_k = g.head_dim_v = DIM;
    g.kv_dtype                  = ATTN_F16;
    g.page_size                 = page_size;
    g.chunk_size                = 2048;
    g.layer_table               = layers;
    g.region_bytes              = UINT64_C(8) << 20;
    OK(attn_cache_open(client, "stream", &g, cache_p));
}

static runner_t *
runner_open(uint32_t page_size)
{
    runner_t *r = calloc(1, sizeof(*r));

    OK(attn_client_open("inproc://cuda:0?slab=16MiB", NULL, &r->gpu));
    OK(attn_client_open("inproc://cpu?threads=1&slab=16MiB", NULL, &r->cpu));
    open_cache(r->gpu, page_size, &r->on_gpu);
    open_cache(r->cpu, page_size, &r->on_cpu);
    CU(cuStreamCreate(&r->stream, CU_STREAM_NON_BLOCKING));
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemAlloc(&r->rows[l], sizeof(r->host[l])));
        CU(cuMemAlloc(&r->o[l], sizeof(r->cpu_o[l])));
        CU(cuMemAlloc(&r->lse[l], sizeof(r->cpu_lse[l])));
    }
    return r;
}

static void
runner_close(runner_t *r)
{
    attn_cache_close(r->on_gpu);
    attn_cache_close(r->on_cpu);
    attn_client_close(r->gpu);
    attn_client_close(r->cpu);
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemFree(r->rows[l]));
        CU(cuMemFree(r->o[l]));
        CU(cuMemFree(r->lse[l]));
    }
    CU(cuStreamDestroy(r->stream));
    free(r);
}

static sequence_t
sequence_new(runner_t *r)
{
    sequence_t s = {0};

    OK(attn_seq_create(r->on_gpu, NULL, &s.gpu));
    OK(attn_seq_create(r->on_cpu, NULL, &s.cpu));
    return s;
}

/* Numbers for n rows of each layer, to be uploaded by send(). */
static void
draw(runner_t *r, uint32_t n)
{
    static uint64_t chance = 88172645463325252u;

    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t i = 0; i < n * ROW; i++) {
            chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
            r->host[l][i] = (_Float16)((float)(chance % 2001) / 1000.0f - 1.0f);
        }
    }
}

static void
send(runner_t *r)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemcpyHtoD(r->rows[l], r->host[l], sizeof(r->host[l])));
        CU(cuMemsetD8Async(r->o[l], 0x77, sizeof(r->cpu_o[l]), NULL));
    }
    CU(cuStreamSynchronize(NULL));
}

/* The tensors of a layer: views of rows. o is packed. */
typedef struct views {
    attn_tensor_t q, k, v, o;
} views_t;

static views_t
views_of(void *rows, void *o, attn_memory_t memory)
{
    _Float16 *at = rows;

    return (views_t){
        .q = {.data = at, .dtype = ATTN_F16, .memory = memory, .token_stride = ROW},
        .k = {.data = at + ROW_Q, .dtype = ATTN_F16, .memory = memory, .token_stride = ROW},
        .v = {.data         = at + ROW_Q + ROW_KV,
              .dtype        = ATTN_F16,
              .memory       = memory,
              .token_stride = ROW},
        .o = {.data = o, .dtype = ATTN_F32, .memory = memory},
    };
}

static views_t
gpu_views(const runner_t *r, uint32_t l)
{
    return views_of((void *)r->rows[l], (void *)r->o[l],
                    l == 0 ? ATTN_MEMORY_AUTO : ATTN_MEMORY_CUDA);
}

static attn_status_t
begin_with(attn_cache_t *cache, attn_seq_t seq, uint64_t base, uint32_t n_q, uint32_t n,
           attn_memory_t memory, uint32_t timeout_ms, attn_step_t **step_p)
{
    attn_entry_t entry = {.seq = seq, .base = base, .n_q = n_q, .n_new = n};
    attn_batch_t batch = {.size       = sizeof(batch),
                          .n          = 1,
                          .entries    = &entry,
                          .q_dtype    = ATTN_F16,
                          .o_dtype    = ATTN_F32,
                          .want_lse   = true,
                          .timeout_ms = timeout_ms,
                          .memory     = memory};

    return attn_step_begin(cache, &batch, step_p);
}

static attn_step_t *
begin(runner_t *r, const sequence_t *s, uint32_t n)
{
    attn_step_t *step;

    OK(begin_with(r->on_gpu, s->gpu, s->length, n, n, ATTN_MEMORY_CUDA, 0, &step));
    return step;
}

static attn_status_t
enqueue(runner_t *r, attn_step_t *step, uint32_t l, CUstream stream)
{
    views_t t = gpu_views(r, l);

    return attn_step_enqueue(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l], stream);
}

static void
enqueue_all(runner_t *r, attn_step_t *step, CUstream stream)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        OK(enqueue(r, step, l, stream));
    }
}

/* The step of these rows on the CPU; what was answered on the GPU is that. */
static void
compare(runner_t *r, sequence_t *s, uint32_t n)
{
    float o[ROWS_MAX * ROW_Q], lse[ROWS_MAX * Q_HEADS];
    attn_step_t *step;

    OK(begin_with(r->on_cpu, s->cpu, s->length, n, n, ATTN_MEMORY_HOST, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = views_of(r->host[l], r->cpu_o[l], ATTN_MEMORY_AUTO);
        OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, r->cpu_lse[l]));
        CU(cuMemcpyDtoH(o, r->o[l], sizeof(o)));
        CU(cuMemcpyDtoH(lse, r->lse[l], sizeof(lse)));
        for (uint32_t i = 0; i < n * ROW_Q; i++) {
            assert_true(fabsf(o[i] - r->cpu_o[l][i]) < TOLERANCE);
        }
        for (uint32_t i = 0; i < n * Q_HEADS; i++) {
            assert_true(fabsf(lse[i] - r->cpu_lse[l][i]) < TOLERANCE);
        }
    }
    OK(attn_step_commit(step, NULL));
    s->length += n;
}

/* A prompt that nothing is asked of. */
static void
prompt(runner_t *r, sequence_t *s, uint32_t n)
{
    for (uint32_t done = 0; done < n; done += ROWS_MAX) {
        uint32_t some = n - done < ROWS_MAX ? n - done : ROWS_MAX;
        attn_step_t *step[2];
        draw(r, some);
        OK(begin_with(r->on_gpu, s->gpu, s->length, 0, some, ATTN_MEMORY_HOST, 0, &step[0]));
        OK(begin_with(r->on_cpu, s->cpu, s->length, 0, some, ATTN_MEMORY_HOST, 0, &step[1]));
        for (uint32_t l = 0; l < LAYERS; l++) {
            views_t t = views_of(r->host[l], NULL, ATTN_MEMORY_HOST);
            OK(attn_step_run(step[0], l, NULL, &t.k, &t.v, NULL, NULL));
            OK(attn_step_run(step[1], l, NULL, &t.k, &t.v, NULL, NULL));
        }
        OK(attn_step_commit(step[0], NULL));
        OK(attn_step_commit(step[1], NULL));
        s->length += some;
    }
}

static void
assert_says(attn_status_t status, attn_status_t expected, const char *words)
{
    if (status != expected || strstr(attn_last_error(), words) == NULL) {
        print_error("%s: %s; expected %s\n", attn_strerror(status), attn_last_error(), words);
    }
    assert_int_equal(status, expected);
    assert_non_null(strstr(attn_last_error(), words));
}

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
        for (uint32_t l = LAYERS; l-- > 0;) {
            views_t t = gpu_views(r, l);
            OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l]));
            OK(attn_step_run(step, l, &t.q, NULL, NULL, &t.o, NULL)); /* asked again */
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
            before[i] = fake_count != NULL ? fake_count(never[i]) : 0;
        }
        enqueue_all(r, step, round % 2 ? r->stream : NULL);
        for (int i = 0; i < 6 && fake_count != NULL; i++) {
            assert_int_equal(fake_count(never[i]), before[i]);
        }
        OK(attn_step_commit(step, NULL));
        compare(r, &s, n);
    }
    runner_close(r);
}

static CUgraphExec
capture(runner_t *r, attn_step_t *step)
{
    CUgraph graph;
    CUgraphExec exec;

    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    enqueue_all(r, step, r->stream);
    CU(cuStreamEndCapture(r->stream, &graph));
    CU(cuGraphInstantiateWithFlags(&exec, graph, 0));
    CU(cuGraphDestroy(graph));
    return exec;
}

static void
launch(runner_t *r, attn_step_t *step, CUgraphExec exec)
{
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    OK(attn_step_replayed(step, r->stream));
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

    /* Without a step it leaves everything as it is. */
    CU(cuMemsetD8Async(r->o[0], 0x11, 64, NULL));
    CU(cuStreamSynchronize(NULL));
    CU(cuGraphLaunch(exec, r->stream));
    CU(cuStreamSynchronize(r->stream));
    unsigned char bytes[64];
    CU(cuMemcpyDtoH(bytes, r->o[0], 64));
    for (int i = 0; i < 64; i++) {
        assert_int_equal(bytes[i], 0x11);
    }
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
    attn_step_abort(step);
    free(host);
    runner_close(r);
}

/* ---- work that does not end ---- */

static void
await_free(runner_t *r, const sequence_t *s)
{
    uint64_t end = attn_now_ns() + 10000 * ATTN_NS_PER_MS;
    attn_step_t *step;
    attn_status_t status;

    while ((status = begin_with(r->on_gpu, s->gpu, s->length, 1, 1, ATTN_MEMORY_CUDA, 0, &step)) ==
           ATTN_ERR_BUSY) {
        assert_true(attn_now_ns() < end);
        usleep(1000);
    }
    OK(status);
    attn_step_abort(step);
}

static void
test_an_abort_amid_work(void **state)
{
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step, *next;

    (void)state;
    if (fake_hold == NULL) {
        skip();
    }
    draw(r, 1);
    send(r);

    /* What is queued ends while the abort waits, or the stream has it still when it does not. */
    step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    attn_step_abort(step);
    fake_hold(r->stream, 1);
    step = begin(r, &s, 1);
    enqueue_all(r, step, r->stream);
    uint64_t start = attn_now_ns();
    attn_step_abort(step);
    assert_in_range(attn_now_ns() - start, 900 * ATTN_NS_PER_MS, 2500 * ATTN_NS_PER_MS);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &next),
                     ATTN_ERR_BUSY);
    fake_hold(r->stream, 0);
    await_free(r, &s);

    /* A graph between replay and replayed counts, too. */
    step             = begin(r, &s, 1);
    CUgraphExec exec = capture(r, step);
    fake_hold(r->stream, 1);
    OK(attn_step_replay(step, r->stream));
    CU(cuGraphLaunch(exec, r->stream));
    attn_step_abort(step);
    assert_int_equal(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &next),
                     ATTN_ERR_BUSY);
    fake_hold(r->stream, 0);
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
    runner_t *r  = runner_open(16);
    sequence_t s = sequence_new(r);
    attn_step_t *step;

    (void)state;
    if (fake_hold == NULL) {
        skip();
    }
    draw(r, 1);
    send(r);
    fake_hold(r->stream, 1);
    uint64_t start = attn_now_ns();
    OK(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 200, &step));
    enqueue_all(r, step, r->stream);
    assert_says(attn_step_commit(step, NULL), ATTN_ERR_DEADLINE, "did not end before its deadline");
    assert_true(attn_now_ns() - start < 2000 * ATTN_NS_PER_MS);
    assert_int_equal(enqueue(r, step, 0, r->stream), ATTN_ERR_ABORTED);
    attn_step_abort(step);
    fake_hold(r->stream, 0);
    await_free(r, &s);

    /* Nobody asks: the tick ends it, when the stream is through. */
    fake_hold(r->stream, 1);
    OK(begin_with(r->on_gpu, s.gpu, 0, 1, 1, ATTN_MEMORY_CUDA, 100, &step));
    OK(enqueue(r, step, 0, r->stream));
    usleep(300000);
    assert_int_equal(enqueue(r, step, 1, r->stream), ATTN_ERR_ABORTED);
    fake_hold(r->stream, 0);
    await_free(r, &s);
    attn_step_abort(step);
    runner_close(r);
}

/* Everything was given back, and the thread's context is what it was. */
static void
test_nothing_is_left(void **state)
{
    int contexts = 0;

    (void)state;
    if (fake_alive == NULL) {
        skip();
    }
    assert_int_equal(fake_alive(&contexts), 0);
    assert_int_equal(contexts, 1);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_runs_with_cuda_pointers),
        cmocka_unit_test(test_tensors_of_a_gpu_for_a_cpu),
        cmocka_unit_test(test_layers_on_a_stream),
        cmocka_unit_test(test_a_graph_serves_later_steps),
        cmocka_unit_test(test_steps_beside_a_capture),
        cmocka_unit_test(test_two_steps_in_turns),
        cmocka_unit_test(test_what_the_device_finds),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_an_abort_amid_work),
        cmocka_unit_test(test_a_deadline_amid_work),
        cmocka_unit_test(test_nothing_is_left),
    };
    CUdevice device;
    attn_client_t *client;

    cu = cuda_driver();
    if (cu == NULL || attn_client_open("inproc://cuda:0?slab=1MiB", NULL, &client) != ATTN_OK) {
        printf("skipped: %s\n", attn_last_error());
        return 77;
    }
    attn_client_close(client);
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *symbol  = dlsym(library, "fake_cuda_hold");
    memcpy(&fake_hold, &symbol, sizeof(symbol));
    symbol = dlsym(library, "fake_cuda_count");
    memcpy(&fake_count, &symbol, sizeof(symbol));
    symbol = dlsym(library, "fake_cuda_alive");
    memcpy(&fake_alive, &symbol, sizeof(symbol));
    CU(cuDeviceGet(&device, 0));
    CU(cuDevicePrimaryCtxRetain(&context, device));
    CU(cuCtxPushCurrent(context));
    return cmocka_run_group_tests_name("integration.on_stream", tests, NULL, NULL);
}
