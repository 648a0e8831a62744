/*
 * ladder_gpu.c: the rungs of bench_latency on GPUs: a layer in this process, from a graph on the
 * runner's stream and by calls; to a worker in another process, with tensors in the host's memory
 * and in that of the runner's GPU, which is GPU 0; and among groups of workers. The worker has the
 * last GPU, so that with one GPU both share it, and take turns on it.
 *
 * On a stream all layers of a step are one sample, and attention alone, from a graph, is taken off.
 */
#include "bench/gpu_memory.h"
#include "bench/ladder.h"
#include "bench/on_stream.h"
#include "bench/processes.h"

#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LENGTH 16u
#define LIMIT_NS (UINT64_C(6) * 1000000000) /* of a cluster's turns */

static const shape_t shapes[] = {
    /* bf16, for GPUs have no kernels for f32 */
    {"1 KiB", 9, 3, 64, ATTN_BF16, 1},
    {"8 KiB", 32, 8, 128, ATTN_BF16, 1},
};

/* ---- on a stream of this process ---- */

static void
on_stream(const result_options_t *options, const shape_t *shape, uint32_t steps)
{
    on_stream_t s;
    attn_status_t status = on_stream_measure(LADDER_LAYERS, LENGTH, shape->q_heads, shape->kv_heads,
                                             shape->dim, steps, &s);

    if (status != ATTN_OK) {
        rung_absent(options, shape->name, "GPU, enqueued", attn_last_error());
        return;
    }
    samples_t calls = {.us = s.calls, .n = s.n}, way = {.us = s.enqueued, .n = s.n};
    samples_t kernels = {.us = s.kernels, .n = s.n};
    double alone      = samples_p50(&kernels);
    for (uint32_t i = 0; i < s.n; i++) {
        s.enqueued[i] -= alone;
    }
    rung_tell(options, shape->name, "GPU, attention alone", &kernels, NULL);
    rung_tell(options, shape->name, "GPU, enqueued", &way, &kernels);
    rung_tell(options, shape->name, "GPU, a call's host time", &calls, NULL);
    on_stream_free(&s);
}

/* ---- by calls ---- */

/* Turns of all that can be had, until there are enough. */
static void
take_turns(side_t *sides, uint32_t n, uint32_t steps)
{
    uint64_t end = attn_now_ns() + LIMIT_NS;

    for (uint32_t i = 0; i < n; i++) {
        ours_try(&sides[i].ours, sides[i].why);
    }
    for (uint32_t s = 0; s < steps && attn_now_ns() < end; s++) {
        for (uint32_t i = 0; i < n; i++) {
            if (sides[i].why[0] == '\0') {
                side_turn(&sides[i]);
            }
        }
    }
}

static void
tell_sides(const result_options_t *options, const char *shape, side_t *sides, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        side_tell(options, shape, &sides[i], 0, 0);
        side_close(&sides[i]);
    }
}

/* Attempt to enqueue a layer at a worker elsewhere. */
static void
driven(const result_options_t *options, const char *shape, side_t *side)
{
    ours_t *ours    = &side->ours;
    attn_tensor_t q = {ours->q, ATTN_BF16, ATTN_MEMORY_CUDA, 0, 0}, k = q, v = q, o = q;
    samples_t way = samples_of(1);
    attn_step_t *step;
    char why[256] = "";

    k.data = ours->k, v.data = ours->v, o.data = ours->o;
    for (uint32_t i = 0; i < LADDER_LAYERS && why[0] == '\0'; i++) {
        step           = ours_begin(ours);
        uint64_t start = attn_now_ns();
        for (uint32_t l = 0; l < LADDER_LAYERS && why[0] == '\0'; l++) {
            if (attn_step_enqueue(step, l, &q, &k, &v, &o, NULL, gpu_stream()) != ATTN_OK) {
                snprintf(why, sizeof(why), "%s", attn_last_error());
            }
        }
        gpu_wait(gpu_stream());
        samples_take(&way, (attn_now_ns() - start) / LADDER_LAYERS);
        attn_step_abort(step);
    }
    if (why[0] != '\0') {
        rung_absent(options, shape, "GPU worker, enqueued", why);
    } else {
        rung_tell(options, shape, "GPU worker, enqueued", &way, NULL);
    }
    free(way.us);
}

static void
one_worker(const result_options_t *options, const shape_t *shape, uint32_t gpus, uint32_t steps)
{
    attn_client_options_t any    = side_options(ATTN_TRANSPORT_AUTO);
    attn_client_options_t grpc   = side_options(ATTN_TRANSPORT_GRPC);
    attn_client_options_t staged = any, mapped = any;
    cluster_options_t worker = {
        .threads = 1, .spin_us = LADDER_SPIN_US, .gpus = gpus, .gpu_first = gpus - 1};
    cluster_t cluster;
    side_t sides[7];

    if (!cluster_start_with(&cluster, 1, &worker)) {
        rung_absent(options, shape->name, "GPU worker", "it did not come up");
        return;
    }
    const char *at = cluster.coordinator.line, *here = "inproc://cuda:0?slab=1GiB";
    staged.gpu_way = ATTN_GPU_STAGED, mapped.gpu_way = ATTN_GPU_MAPPED;
    side_open(&sides[0], "GPU here, tensors of it", here, shape, LENGTH, &any, steps);
    side_open(&sides[1], "GPU here, host's", here, shape, LENGTH, &any, steps);
    side_open(&sides[2], "GPU worker, shared memory", at, shape, LENGTH, &any, steps);
    side_open(&sides[3], "GPU worker, staged", at, shape, LENGTH, &staged, steps);
    side_open(&sides[4], "GPU worker, GPU to GPU", at, shape, LENGTH, &mapped, steps);
    side_open(&sides[5], "GPU worker, gRPC stream", at, shape, LENGTH, &grpc, steps);
    side_open(&sides[6], "GPU worker, gRPC unary", at, shape, LENGTH, &grpc, steps);
    sides[6].direct = direct_open(sides[6].ours.client, cluster.workers[0].line);
    ours_on_gpu(&sides[0].ours);
    ours_on_gpu(&sides[3].ours);
    ours_on_gpu(&sides[4].ours);
    take_turns(sides, 7, steps);
    driven(options, shape->name, &sides[4]);
    tell_sides(options, shape->name, sides, 7);
    cluster_stop(&cluster);
}

/* A sequence over so many workers, which merge among themselves, or whose client does. */
static void
group(const result_options_t *options, const shape_t *shape, uint32_t gpus, uint32_t n,
      uint32_t steps)
{
    attn_client_options_t alone = side_options(ATTN_TRANSPORT_AUTO), among = alone;
    cluster_options_t workers = {
        .threads = 1, .spin_us = LADDER_SPIN_US, .gpus = gpus, .groups = true};
    char names[2][32], why[64];
    cluster_t cluster;
    side_t sides[2];

    snprintf(names[0], sizeof(names[0]), "group of %u, client merges", n);
    snprintf(names[1], sizeof(names[1]), "group of %u", n);
    snprintf(why, sizeof(why), "%u GPU%s here", gpus, gpus > 1 ? "s" : "");
    if (gpus < n || !cluster_start_with(&cluster, n, &workers)) {
        rung_absent(options, shape->name, names[1], gpus < n ? why : "workers did not come up");
        return;
    }
    among.merging = ATTN_MERGING_GROUP;
    side_open(&sides[0], names[0], cluster.coordinator.line, shape, n * LADDER_CHUNK, &alone,
              steps);
    side_open(&sides[1], names[1], cluster.coordinator.line, shape, n * LADDER_CHUNK, &among,
              steps);
    take_turns(sides, 2, steps);
    tell_sides(options, shape->name, sides, 2);
    cluster_stop(&cluster);
}

void
ladder_gpu(const result_options_t *options, uint32_t steps)
{
    uint32_t gpus = gpu_count();

    if (gpus == 0) {
        rung_absent(options, "GPU", "all its rungs", attn_last_error());
        return;
    }
    if (gpus == 1) {
        printf("one GPU: a worker in another process shares it, and takes turns on it\n");
    }
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        on_stream(options, &shapes[s], steps);
        one_worker(options, &shapes[s], gpus, steps);
        group(options, &shapes[s], gpus, 2, steps);
        group(options, &shapes[s], gpus, 4, steps);
    }
}
