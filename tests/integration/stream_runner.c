/* stream_runner.c: see stream_runner.h. */
#include "tests/integration/stream_runner.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TOLERANCE 4e-3f

const cuda_driver_t *cu;
fake_t fake;

/* ---- the driver ---- */

static void
look_up_fake(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    const struct {
        void *at;
        const char *name;
    } wanted[] = {
        {&fake.hold, "fake_cuda_hold"},   {&fake.hold_all, "fake_cuda_hold_all"},
        {&fake.idle, "fake_cuda_idle"},   {&fake.spoil, "fake_cuda_spoil"},
        {&fake.count, "fake_cuda_count"}, {&fake.alive, "fake_cuda_alive"},
    };

    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        void *symbol = dlsym(library, wanted[i].name);
        memcpy(wanted[i].at, &symbol, sizeof(symbol));
    }
}

int
runner_driver(void)
{
    CUdevice device;
    CUcontext context;
    attn_client_t *client;

    cu = cuda_driver();
    if (cu == NULL || attn_client_open("inproc://cuda:0?slab=1MiB", NULL, &client) != ATTN_OK) {
        printf("skipped: %s\n", attn_last_error());
        return 77;
    }
    attn_client_close(client);
    look_up_fake();
    if (cu->cuDeviceGet(&device, 0) != CUDA_SUCCESS ||
        cu->cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS ||
        cu->cuCtxPushCurrent(context) != CUDA_SUCCESS) {
        printf("GPU 0 has no context\n");
        return 1;
    }
    return 0;
}

void
assert_ok_or_tell(attn_status_t status, int line)
{
    if (status != ATTN_OK) {
        print_error("line %d: %s: %s\n", line, attn_strerror(status), attn_last_error());
    }
    assert_int_equal(status, ATTN_OK);
}

/* ---- a runner ---- */

void
runner_open_cache(attn_client_t *client, uint32_t page_size, attn_cache_t **cache_p)
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

runner_t *
runner_open(uint32_t page_size)
{
    runner_t *r = calloc(1, sizeof(*r));

    if (fake.idle != NULL) {
        fake.idle(1);
    }
    OK(attn_client_open("inproc://cuda:0?slab=16MiB", NULL, &r->gpu));
    if (fake.idle != NULL) {
        fake.idle(0);
    }
    OK(attn_client_open("inproc://cpu?threads=1&slab=16MiB", NULL, &r->cpu));
    runner_open_cache(r->gpu, page_size, &r->on_gpu);
    runner_open_cache(r->cpu, page_size, &r->on_cpu);
    CU(cuStreamCreate(&r->stream, CU_STREAM_NON_BLOCKING));
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemAlloc(&r->rows[l], sizeof(r->host[l])));
        CU(cuMemAlloc(&r->o[l], sizeof(r->cpu_o[l])));
        CU(cuMemAlloc(&r->lse[l], sizeof(r->cpu_lse[l])));
    }
    return r;
}

void
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

sequence_t
sequence_new(runner_t *r)
{
    sequence_t s = {0};

    OK(attn_seq_create(r->on_gpu, NULL, &s.gpu));
    OK(attn_seq_create(r->on_cpu, NULL, &s.cpu));
    return s;
}

/* Numbers for n rows of each layer, to be uploaded by send(). */
void
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

void
send(runner_t *r)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        CU(cuMemcpyHtoD(r->rows[l], r->host[l], sizeof(r->host[l])));
        CU(cuMemsetD8Async(r->o[l], 0x77, sizeof(r->cpu_o[l]), NULL));
    }
    CU(cuStreamSynchronize(NULL));
}

views_t
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

views_t
gpu_views(const runner_t *r, uint32_t l)
{
    return views_of((void *)r->rows[l], (void *)r->o[l],
                    l == 0 ? ATTN_MEMORY_AUTO : ATTN_MEMORY_CUDA);
}

attn_status_t
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

attn_step_t *
begin(runner_t *r, const sequence_t *s, uint32_t n)
{
    attn_step_t *step;

    OK(begin_with(r->on_gpu, s->gpu, s->length, n, n, ATTN_MEMORY_CUDA, 0, &step));
    return step;
}

attn_status_t
enqueue(runner_t *r, attn_step_t *step, uint32_t l, CUstream stream)
{
    views_t t = gpu_views(r, l);

    return attn_step_enqueue(step, l, &t.q, &t.k, &t.v, &t.o, (float *)r->lse[l], stream);
}

void
enqueue_all(runner_t *r, attn_step_t *step, CUstream stream)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        OK(enqueue(r, step, l, stream));
    }
}

/* The step of these rows on the CPU; what was answered on the GPU is that. */
void
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
void
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

void
assert_says(attn_status_t status, attn_status_t expected, const char *words)
{
    if (status != expected || strstr(attn_last_error(), words) == NULL) {
        print_error("%s: %s; expected %s\n", attn_strerror(status), attn_last_error(), words);
    }
    assert_int_equal(status, expected);
    assert_non_null(strstr(attn_last_error(), words));
}

CUgraphExec
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

void
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

void
assert_nothing_is_left(void)
{
    int contexts = 0;

    assert_int_equal(fake.alive(&contexts), 0);
    assert_int_equal(contexts, 1);
}
