/*
 * latency.c: what a layer of one small sequence costs on its way, rung by rung.
 *
 *     bench_latency [--quick] [--json FILE] [STEPS]
 *
 * A decode step over a short sequence, in this process, through shared memory, over gRPC, and as
 * messages of UCX's over loopback TCP to a worker with an IPC namespace of its own; of each run
 * what the worker computed is taken off, so that what is left is the way. Beside them a bare round
 * trip of the same bytes through a slab of UCX's, and one of its messages. And the same step on
 * four workers, against the local one and a bare fan-out. Both sides are measured in turns.
 *
 * Where there is a GPU: a layer in this process on it, from a graph on the runner's stream, less
 * attention alone from a graph, and what queueing a layer without a graph takes of the host.
 */
#include "bench/bare.h"
#include "bench/bare_far.h"
#include "bench/on_stream.h"
#include "bench/ours.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define LAYERS 30u
#define LENGTH 16u /* tokens before */
#define SPIN_US 50u
#define CHUNK 256u
#define TARGET 3.0
#define BARE_TURNS 20u
#define SIDES 4 /* the last may not be there */
#define FAN 4u
#define FAN_TARGET 1.5
#define FAN_LENGTH 1024u /* a chunk on each */

static const shape_t shapes[] = {
    {"2 KiB", 9, 3, 64, ATTN_F32, 1},
    {"16 KiB", 32, 4, 128, ATTN_F32, 1},
};

typedef struct samples {
    double *us;
    uint64_t n;
} samples_t;

static void
take(samples_t *s, uint64_t ns)
{
    s->us[s->n++] = (double)ns / 1e3;
}

static samples_t
samples_of(uint32_t steps)
{
    return (samples_t){.us = calloc((uint64_t)steps * LAYERS, sizeof(double))};
}

static void
open_side(ours_t *ours, const char *target, const shape_t *shape, attn_transport_t transport,
          uint32_t length)
{
    attn_client_options_t options;
    shape_t prompt = *shape;

    prompt.rows = length;
    attn_client_options_init(&options);
    options.spin_us   = SPIN_US;
    options.transport = transport;
    ours_open(ours, target, &prompt, LAYERS, &options, CHUNK, ATTN_PLACE_SPREAD);
    ours_append(ours);
    ours_reshape(ours, 1);
}

/* A step that is not kept: all are of the same length. */
static void
turn(ours_t *ours, samples_t *net, samples_t *computed)
{
    attn_step_t *step = ours_begin(ours);

    for (uint32_t l = 0; l < LAYERS; l++) {
        uint64_t start   = attn_now_ns();
        uint64_t compute = ours_run(ours, step, l, NULL);
        uint64_t all     = attn_now_ns() - start;
        take(net, all - compute);
        take(computed, compute);
    }
    attn_step_abort(step);
}

static void
bare_turn(bare_t *bare, samples_t *samples)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        uint64_t start = attn_now_ns();
        bare_round(bare);
        take(samples, attn_now_ns() - start);
    }
}

static void
rung(const result_options_t *options, const char *shape, const char *name, samples_t *s,
     samples_t *computed, double bound, double target)
{
    double p50   = result_quantile(s->us, s->n, 0.5);
    double ratio = bound > 0 ? p50 / bound : 0;

    printf("%-7s %-22s | %8.2f %8.2f %8.2f |", shape, name, p50, result_quantile(s->us, s->n, 0.99),
           result_quantile(s->us, s->n, 0.999));
    if (computed != NULL) {
        printf(" %8.2f", result_quantile(computed->us, computed->n, 0.5));
    }
    if (target > 0) {
        printf("   %.2fx the bare one, target %.1f: %s", ratio, target,
               ratio <= target ? "met" : "MISSED");
    }
    printf("\n");
    result_json(options, "latency",
                "\"case\":\"%s %s\",\"value\":%.3f,\"unit\":\"us\",\"p99\":%.3f,\"p999\":%.3f,"
                "\"bound\":%.3f,\"ratio\":%.3f,\"target\":%.2f",
                shape, name, p50, result_quantile(s->us, s->n, 0.99),
                result_quantile(s->us, s->n, 0.999), bound, ratio, target);
}

/* Turns of bare servers. They never sleep, so they are there for their turns alone. */
static void
bare_turns(const char *program, uint32_t in, uint32_t out, bool yields, uint32_t turns,
           samples_t *samples)
{
    bare_t *bare = bare_open(program, 1, in, out, yields);

    bare_round(bare);
    for (uint32_t i = 0; i < turns; i++) {
        bare_turn(bare, samples);
    }
    bare_close(bare);
}

static void
bare_far_turns(const char *program, uint32_t in, uint32_t out, uint32_t turns, samples_t *samples)
{
    bare_far_t *bare = bare_far_open(program, in, out);

    for (uint32_t i = 0; i < turns * LAYERS; i++) {
        uint64_t start = attn_now_ns();
        bare_far_round(bare);
        take(samples, attn_now_ns() - start);
    }
    bare_far_close(bare);
}

static void
ladder(const result_options_t *options, const char *program, const shape_t *shape, uint32_t steps)
{
    static const char *const names[] = {"in this process", "shared memory", "gRPC",
                                        "messages, TCP"};
    samples_t net[SIDES], computed[SIDES], spins = samples_of(steps), yields = samples_of(steps);
    samples_t far = samples_of(steps);
    cluster_t cluster, apart;
    ours_t sides[SIDES];

    cluster_start(&cluster, 1, 1, SPIN_US);
    int n = cluster_start_apart(&apart, 1, 1, SPIN_US) ? SIDES : SIDES - 1;
    open_side(&sides[0], "inproc://cpu?threads=1", shape, ATTN_TRANSPORT_AUTO, LENGTH);
    open_side(&sides[1], cluster.coordinator.line, shape, ATTN_TRANSPORT_UCX, LENGTH);
    open_side(&sides[2], cluster.coordinator.line, shape, ATTN_TRANSPORT_GRPC, LENGTH);
    if (n == SIDES) {
        open_side(&sides[3], apart.coordinator.line, shape, ATTN_TRANSPORT_UCX, LENGTH);
    }
    for (int i = 0; i < n; i++) {
        net[i]      = samples_of(steps);
        computed[i] = samples_of(steps);
    }
    uint32_t in  = (uint32_t)(sides[1].q_bytes + 2 * sides[1].kv_bytes);
    uint32_t out = (uint32_t)sides[1].q_bytes;
    for (uint32_t s = 0; s < steps; s++) {
        if (s % BARE_TURNS == 0) {
            uint32_t turns = steps - s < BARE_TURNS ? steps - s : BARE_TURNS;
            bare_turns(program, in, out, false, turns, &spins);
            bare_turns(program, in, out, true, turns, &yields);
            bare_far_turns(program, in, out, turns, &far);
        }
        for (int i = 0; i < n; i++) {
            turn(&sides[i], &net[i], &computed[i]);
        }
    }
    rung(options, shape->name, "bare kernel", &computed[0], NULL, 0, 0);
    rung(options, shape->name, "bare trip, spins", &spins, NULL, 0, 0);
    rung(options, shape->name, "bare trip, yields", &yields, NULL, 0, 0);
    rung(options, shape->name, "bare message, TCP", &far, NULL, 0, 0);
    double bound = result_quantile(spins.us, spins.n, 0.5);
    double other = result_quantile(yields.us, yields.n, 0.5);
    bound        = other < bound ? other : bound; /* the faster one */
    for (int i = 0; i < n; i++) {
        if (i == 3) {
            bound = result_quantile(far.us, far.n, 0.5);
        }
        rung(options, shape->name, names[i], &net[i], &computed[i], bound,
             i == 1 || i == 3 ? TARGET : 0);
        free(net[i].us);
        free(computed[i].us);
        ours_close(&sides[i]);
    }
    free(spins.us);
    free(yields.us);
    free(far.us);
    cluster_stop(&cluster);
    if (n == SIDES) {
        cluster_stop(&apart);
    }
}

/* bf16, for GPUs have no kernels for f32. */
static void
on_stream(const result_options_t *options, const shape_t *shape, uint32_t steps)
{
    on_stream_t s;
    attn_status_t status =
        on_stream_measure(LAYERS, LENGTH, shape->q_heads, shape->kv_heads, shape->dim, steps, &s);

    if (status != ATTN_OK) {
        printf("%-7s on a stream: %s\n", shape->name, attn_last_error());
        result_json(options, "latency", "\"case\":\"%s enqueued\",\"absent\":\"%s\"", shape->name,
                    attn_strerror(status));
        return;
    }
    samples_t calls = {.us = s.calls, .n = s.n}, way = {.us = s.enqueued, .n = s.n};
    samples_t kernels = {.us = s.kernels, .n = s.n};
    double alone      = result_quantile(s.kernels, s.n, 0.5);
    for (uint32_t i = 0; i < s.n; i++) {
        s.enqueued[i] -= alone;
    }
    rung(options, shape->name, "GPU, attention alone", &kernels, NULL, 0, 0);
    rung(options, shape->name, "GPU, enqueued", &way, &kernels, 0, 0);
    rung(options, shape->name, "GPU, a call's host time", &calls, NULL, 0, 0);
    on_stream_free(&s);
}

/* The time of whole tokens, LAYERS runs each. */
static void
token(ours_t *ours, samples_t *samples)
{
    attn_step_t *step = ours_begin(ours);
    uint64_t start    = attn_now_ns();

    for (uint32_t l = 0; l < LAYERS; l++) {
        ours_run(ours, step, l, NULL);
    }
    take(samples, attn_now_ns() - start);
    attn_step_abort(step);
}

static void
fan(const result_options_t *options, const char *program, uint32_t steps)
{
    const shape_t *shape = &shapes[0];
    samples_t local = samples_of(steps), spread = samples_of(steps), bare = samples_of(steps);
    uint32_t partials = shape->q_heads * (8 + 4 * shape->dim);
    cluster_t cluster;
    ours_t here, there;

    cluster_start(&cluster, FAN, 1, SPIN_US);
    open_side(&here, "inproc://cpu", shape, ATTN_TRANSPORT_AUTO, FAN_LENGTH);
    open_side(&there, cluster.coordinator.line, shape, ATTN_TRANSPORT_UCX, FAN_LENGTH);
    uint32_t in = (uint32_t)there.q_bytes;
    for (uint32_t s = 0; s < steps; s++) {
        token(&here, &local);
        token(&there, &spread);
        if (s % 20 == 0) {
            bare_t *b = bare_open(program, FAN, in, partials, true);
            bare_round(b);
            for (uint32_t i = 0; i < 20; i++) {
                uint64_t start = attn_now_ns();
                for (uint32_t l = 0; l < LAYERS; l++) {
                    bare_round(b);
                }
                take(&bare, attn_now_ns() - start);
            }
            bare_close(b);
        }
    }
    double alone = result_quantile(local.us, local.n, 0.5);
    double all   = result_quantile(spread.us, spread.n, 0.5);
    double echo  = result_quantile(bare.us, bare.n, 0.5);
    double ratio = (all - alone) / echo;
    printf("a token on %u workers: %.0f us (p99 %.0f); here %.0f; %u bare fan-outs %.0f\n"
           "  (workers - here) / bare: %.2f, target %.1f: %s\n",
           FAN, all, result_quantile(spread.us, spread.n, 0.99), alone, LAYERS, echo, ratio,
           FAN_TARGET, ratio <= FAN_TARGET ? "met" : "MISSED");
    result_json(options, "latency",
                "\"case\":\"token on %u workers, over local\",\"value\":%.2f,\"unit\":\"us\","
                "\"bound\":%.2f,\"ratio\":%.3f,\"target\":%.2f,\"run\":%.2f,\"local\":%.2f",
                FAN, all - alone, echo, ratio, FAN_TARGET, all, alone);
    ours_close(&here);
    ours_close(&there);
    cluster_stop(&cluster);
    free(local.us);
    free(spread.us);
    free(bare.us);
}

int
main(int argc, char **argv)
{
    result_options_t options;

    if (argc == 3 && strcmp(argv[1], "bare") == 0) {
        return bare_serve(atoi(argv[2]));
    }
    if (argc == 3 && strcmp(argv[1], "bare-far") == 0) {
        return bare_far_serve(atoi(argv[2]));
    }
    setenv("UCX_NET_DEVICES", "lo", 1);
    argc = result_options(&options, argc, argv);
    if (argc > 2) {
        fprintf(stderr, "bench_latency [--quick] [--json FILE] [STEPS]\n");
        return 2;
    }
    uint32_t steps = argc > 1 ? (uint32_t)atoi(argv[1]) : options.quick ? 40 : 200;
    printf("a layer of a sequence of %u tokens, microseconds, without what was computed\n"
           "%-7s %-22s | %8s %8s %8s | %8s\n",
           LENGTH + 1, "q", "way", "p50", "p99", "p99.9", "computed");
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        ladder(&options, argv[0], &shapes[s], steps);
        on_stream(&options, &shapes[s], steps);
    }
    fan(&options, argv[0], steps);
    return 0;
}
