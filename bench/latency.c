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
 * Rungs of GPUs are ladder_gpu.c's. What cannot be had here is told with the reason.
 */
#include "bench/bare.h"
#include "bench/bare_far.h"
#include "bench/ladder.h"
#include "bench/processes.h"

#include "base/clock.h"

#include <stdlib.h>
#include <string.h>

#define LENGTH 16u /* tokens before */
#define TARGET 3.0
#define BARE_TURNS 20u
#define SIDES 5 /* the last may not be there */
#define FAN 4u
#define FAN_TARGET 1.5
#define FAN_LENGTH 1024u /* a chunk on each */

static const shape_t shapes[] = {
    {"2 KiB", 9, 3, 64, ATTN_F32, 1},
    {"16 KiB", 32, 4, 128, ATTN_F32, 1},
};

static void
bare_turn(bare_t *bare, samples_t *samples)
{
    for (uint32_t l = 0; l < LADDER_LAYERS; l++) {
        uint64_t start = attn_now_ns();
        bare_round(bare);
        samples_take(samples, attn_now_ns() - start);
    }
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

    for (uint32_t i = 0; i < turns * LADDER_LAYERS; i++) {
        uint64_t start = attn_now_ns();
        bare_far_round(bare);
        samples_take(samples, attn_now_ns() - start);
    }
    bare_far_close(bare);
}

/* Bare ones, by UCX's shared memory and its messages. */
typedef struct bares {
    samples_t spins, yields, far;
} bares_t;

static void
bares_turn(bares_t *bares, const char *program, const ours_t *like, uint32_t turns)
{
    uint32_t in = (uint32_t)(like->q_bytes + 2 * like->kv_bytes), out = (uint32_t)like->q_bytes;

    bare_turns(program, in, out, false, turns, &bares->spins);
    bare_turns(program, in, out, true, turns, &bares->yields);
    bare_far_turns(program, in, out, turns, &bares->far);
}

static void
bares_tell(bares_t *bares, const result_options_t *options, const char *shape)
{
    rung_tell(options, shape, "bare trip, spins", &bares->spins, NULL);
    rung_tell(options, shape, "bare trip, yields", &bares->yields, NULL);
    rung_tell(options, shape, "bare message, TCP", &bares->far, NULL);
}

static void
bares_free(bares_t *bares)
{
    free(bares->spins.us);
    free(bares->yields.us);
    free(bares->far.us);
}

static void
open_sides(side_t *sides, const cluster_t *cluster, const cluster_t *apart, const shape_t *shape,
           uint32_t steps)
{
    attn_client_options_t any  = side_options(ATTN_TRANSPORT_AUTO);
    attn_client_options_t ucx  = side_options(ATTN_TRANSPORT_UCX);
    attn_client_options_t grpc = side_options(ATTN_TRANSPORT_GRPC);
    const char *at             = cluster->coordinator.line;

    side_open(&sides[0], "in this process", "inproc://cpu?threads=1", shape, LENGTH, &any, steps);
    side_open(&sides[1], "shared memory", at, shape, LENGTH, &ucx, steps);
    side_open(&sides[2], "gRPC, stream", at, shape, LENGTH, &grpc, steps);
    side_open(&sides[3], "gRPC, unary", at, shape, LENGTH, &grpc, steps);
    sides[3].direct = direct_open(sides[3].ours.client, cluster->workers[0].line);
    if (apart != NULL) {
        side_open(&sides[4], "messages, TCP", apart->coordinator.line, shape, LENGTH, &ucx, steps);
    }
}

static void
ladder(const result_options_t *options, const char *program, const shape_t *shape, uint32_t steps)
{
    bares_t bares = {samples_of(steps), samples_of(steps), samples_of(steps)};
    cluster_t cluster, apart;
    side_t sides[SIDES];

    cluster_start(&cluster, 1, 1, LADDER_SPIN_US);
    int n = cluster_start_apart(&apart, 1, 1, LADDER_SPIN_US) ? SIDES : SIDES - 1;
    open_sides(sides, &cluster, n == SIDES ? &apart : NULL, shape, steps);
    for (uint32_t s = 0; s < steps; s++) {
        if (s % BARE_TURNS == 0) {
            uint32_t turns = steps - s < BARE_TURNS ? steps - s : BARE_TURNS;
            bares_turn(&bares, program, &sides[1].ours, turns);
        }
        for (int i = 0; i < n; i++) {
            side_turn(&sides[i]);
        }
    }
    rung_tell(options, shape->name, "bare kernel", &sides[0].computed, NULL);
    bares_tell(&bares, options, shape->name);
    double spins = samples_p50(&bares.spins), yields = samples_p50(&bares.yields);
    for (int i = 0; i < n; i++) { /* of both bare trips the faster one counts */
        double bound = i == 4 ? samples_p50(&bares.far) : spins < yields ? spins : yields;
        side_tell(options, shape->name, &sides[i], bound, i == 1 || i == 4 ? TARGET : 0);
        side_close(&sides[i]);
    }
    if (n < SIDES) {
        rung_absent(options, shape->name, "messages, TCP",
                    "a worker here may have no IPC namespace of its own");
    }
    bares_free(&bares);
    cluster_stop(&cluster);
    if (n == SIDES) {
        cluster_stop(&apart);
    }
}

/* The time of whole tokens, a run for each layer. */
static void
token(side_t *side, samples_t *samples)
{
    attn_step_t *step = ours_begin(&side->ours);
    uint64_t start    = attn_now_ns();

    for (uint32_t l = 0; l < LADDER_LAYERS; l++) {
        ours_run(&side->ours, step, l, NULL);
    }
    samples_take(samples, attn_now_ns() - start);
    attn_step_abort(step);
}

static void
fan(const result_options_t *options, const char *program, uint32_t steps)
{
    const shape_t *shape = &shapes[0];
    samples_t local = samples_of(steps), spread = samples_of(steps), bare = samples_of(steps);
    uint32_t partials         = shape->q_heads * (8 + 4 * shape->dim);
    attn_client_options_t any = side_options(ATTN_TRANSPORT_AUTO);
    attn_client_options_t ucx = side_options(ATTN_TRANSPORT_UCX);
    cluster_t cluster;
    side_t here, there;

    cluster_start(&cluster, FAN, 1, LADDER_SPIN_US);
    side_open(&here, "", "inproc://cpu", shape, FAN_LENGTH, &any, 1);
    side_open(&there, "", cluster.coordinator.line, shape, FAN_LENGTH, &ucx, 1);
    uint32_t in = (uint32_t)there.ours.q_bytes;
    for (uint32_t s = 0; s < steps; s++) {
        token(&here, &local);
        token(&there, &spread);
        if (s % 20 == 0) {
            bare_t *b = bare_open(program, FAN, in, partials, true);
            bare_round(b);
            for (uint32_t i = 0; i < 20; i++) {
                uint64_t start = attn_now_ns();
                for (uint32_t l = 0; l < LADDER_LAYERS; l++) {
                    bare_round(b);
                }
                samples_take(&bare, attn_now_ns() - start);
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
           FAN, all, result_quantile(spread.us, spread.n, 0.99), alone, LADDER_LAYERS, echo, ratio,
           FAN_TARGET, ratio <= FAN_TARGET ? "met" : "MISSED");
    result_json(options, "latency",
                "\"case\":\"token on %u workers, over local\",\"value\":%.2f,\"unit\":\"us\","
                "\"bound\":%.2f,\"ratio\":%.3f,\"target\":%.2f,\"run\":%.2f,\"local\":%.2f",
                FAN, all - alone, echo, ratio, FAN_TARGET, all, alone);
    side_close(&here);
    side_close(&there);
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
           "%-7s %-24s | %8s %8s %8s | %8s | %6s %6s\n",
           LENGTH + 1, "q", "way", "p50", "p99", "p99.9", "computed", "hop", "send");
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        ladder(&options, argv[0], &shapes[s], steps);
    }
    ladder_gpu(&options, steps);
    fan(&options, argv[0], steps);
    return 0;
}
