/*
 * on_stream.c: steps of a runner on a GPU with the worker in its process. All layers of a step are
 * captured once and launched for each step; the device's own clock says how long that took. The
 * graph of a step that has nothing new is attention alone, with the same tables.
 */
#include "bench/on_stream.h"

#include "base/clock.h"
#include "base/status.h"
#include "bench/result.h"
#include "client/attn.h"
#include "kernels/cuda/driver.h"

#include <stdio.h>
#include <stdlib.h>

#define CU(call) result_must(cuda_check(cu->call, #call))

typedef struct runner {
    const cuda_driver_t *cu;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
    uint32_t layers, length;
    CUstream stream;
    CUevent start, stop;
    CUdeviceptr q, k, v, o;
    CUgraphExec exec[2]; /* [nothing new, a token] */
    uint64_t id[2];
} runner_t;

static attn_step_t *
begin(runner_t *r, uint32_t n_new)
{
    attn_entry_t entry = {.seq = r->seq, .base = r->length, .n_q = 1, .n_new = n_new};
    attn_batch_t batch = {.size    = sizeof(batch),
                          .n       = 1,
                          .entries = &entry,
                          .q_dtype = ATTN_BF16,
                          .memory  = ATTN_MEMORY_CUDA};
    attn_step_t *step;

    result_must(attn_step_begin(r->cache, &batch, &step));
    return step;
}

static void
enqueue(runner_t *r, attn_step_t *step, uint32_t n_new)
{
    attn_tensor_t q = {.data = (void *)r->q, .dtype = ATTN_BF16, .memory = ATTN_MEMORY_CUDA};
    attn_tensor_t k = q, v = q, o = q;

    k.data = (void *)r->k, v.data = (void *)r->v, o.data = (void *)r->o;
    for (uint32_t l = 0; l < r->layers; l++) {
        result_must(attn_step_enqueue(step, l, &q, n_new > 0 ? &k : NULL, n_new > 0 ? &v : NULL, &o,
                                      NULL, r->stream));
    }
}

static void
capture(runner_t *r, attn_step_t *step, uint32_t n_new)
{
    const cuda_driver_t *cu = r->cu;
    CUgraph graph;

    CU(cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    enqueue(r, step, n_new);
    CU(cuStreamEndCapture(r->stream, &graph));
    if (r->exec[n_new] != NULL) {
        CU(cuGraphExecDestroy(r->exec[n_new]));
    }
    CU(cuGraphInstantiateWithFlags(&r->exec[n_new], graph, 0));
    CU(cuGraphDestroy(graph));
}

/* A step that is not kept, from its graph; microseconds a layer. */
static double
replay(runner_t *r, uint32_t n_new)
{
    const cuda_driver_t *cu = r->cu;
    attn_step_t *step       = begin(r, n_new);
    uint64_t id             = 0;
    float ms                = 0;

    result_must(attn_step_graph(step, &id));
    if (id != r->id[n_new]) {
        capture(r, step, n_new);
        r->id[n_new] = id;
    }
    result_must(attn_step_replay(step, r->stream));
    CU(cuEventRecord(r->start, r->stream));
    CU(cuGraphLaunch(r->exec[n_new], r->stream));
    CU(cuEventRecord(r->stop, r->stream));
    result_must(attn_step_replayed(step, r->stream));
    CU(cuEventSynchronize(r->stop));
    CU(cuEventElapsedTime(&ms, r->start, r->stop));
    attn_step_abort(step);
    return (double)ms * 1e3 / r->layers;
}

/* The same without a graph: what the calls take of the host. */
static double
by_calls(runner_t *r)
{
    attn_step_t *step = begin(r, 1);
    uint64_t start    = attn_now_ns();

    enqueue(r, step, 1);
    double us = (double)(attn_now_ns() - start) / 1e3 / r->layers;
    attn_step_abort(step);
    return us;
}

/* Tokens before the measured one: zeros. */
static void
prompt(runner_t *r, uint64_t row_bytes)
{
    attn_entry_t entry = {.seq = r->seq, .n_new = r->length};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_BF16};
    attn_tensor_t rows = {.data = calloc(r->length, row_bytes), .dtype = ATTN_BF16};
    attn_step_t *step;

    result_must(attn_step_begin(r->cache, &batch, &step));
    for (uint32_t l = 0; l < r->layers; l++) {
        result_must(attn_step_run(step, l, NULL, &rows, &rows, NULL, NULL));
    }
    result_must(attn_step_commit(step, NULL));
    free(rows.data);
}

static void
open_runner(runner_t *r, uint32_t q_heads, uint32_t kv_heads, uint32_t dim)
{
    const cuda_driver_t *cu = r->cu;
    uint64_t row_bytes      = (uint64_t)q_heads * dim * 2;
    attn_geometry_t g;
    CUcontext context;
    CUdevice device;

    CU(cuDeviceGet(&device, 0));
    CU(cuDevicePrimaryCtxRetain(&context, device));
    CU(cuCtxPushCurrent(context));
    CU(cuStreamCreate(&r->stream, CU_STREAM_NON_BLOCKING));
    CU(cuEventCreate(&r->start, 0));
    CU(cuEventCreate(&r->stop, 0));
    CUdeviceptr *tensors[] = {&r->q, &r->k, &r->v, &r->o};
    for (int i = 0; i < 4; i++) {
        CU(cuMemAlloc(tensors[i], row_bytes));
        CU(cuMemsetD8Async(*tensors[i], 0, row_bytes, NULL));
    }
    CU(cuStreamSynchronize(NULL));
    attn_geometry_init(&g);
    g.layers = r->layers, g.q_heads = q_heads, g.kv_heads = kv_heads;
    g.head_dim_k = g.head_dim_v = dim;
    g.kv_dtype                  = ATTN_BF16;
    result_must(attn_cache_open(r->client, "bench", &g, &r->cache));
    result_must(attn_seq_create(r->cache, NULL, &r->seq));
    prompt(r, row_bytes);
}

static void
close_runner(runner_t *r)
{
    const cuda_driver_t *cu = r->cu;
    CUcontext context;

    for (int i = 0; i < 2; i++) {
        CU(cuGraphExecDestroy(r->exec[i]));
    }
    attn_cache_close(r->cache);
    CU(cuMemFree(r->q));
    CU(cuMemFree(r->k));
    CU(cuMemFree(r->v));
    CU(cuMemFree(r->o));
    CU(cuEventDestroy(r->start));
    CU(cuEventDestroy(r->stop));
    CU(cuStreamDestroy(r->stream));
    CU(cuCtxPopCurrent(&context));
    attn_client_close(r->client);
}

attn_status_t
on_stream_measure(uint32_t layers, uint32_t length, uint32_t q_heads, uint32_t kv_heads,
                  uint32_t dim, uint32_t steps, on_stream_t *samples)
{
    runner_t r           = {.cu = cuda_driver(), .layers = layers, .length = length};
    attn_status_t status = r.cu != NULL ? ATTN_OK : ATTN_ERR_UNSUPPORTED;

    if (status == ATTN_OK) {
        status = attn_client_open("inproc://cuda:0?slab=1GiB", NULL, &r.client);
    }
    if (status != ATTN_OK) {
        return status;
    }
    open_runner(&r, q_heads, kv_heads, dim);
    *samples = (on_stream_t){.kernels  = calloc(steps, sizeof(double)),
                             .enqueued = calloc(steps, sizeof(double)),
                             .calls    = calloc(steps, sizeof(double)),
                             .n        = steps};
    for (uint32_t i = 0; i < steps; i++) {
        samples->kernels[i]  = replay(&r, 0);
        samples->enqueued[i] = replay(&r, 1);
        samples->calls[i]    = by_calls(&r);
    }
    close_runner(&r);
    return ATTN_OK;
}

void
on_stream_free(on_stream_t *samples)
{
    free(samples->kernels);
    free(samples->enqueued);
    free(samples->calls);
}
