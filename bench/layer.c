/*
 * layer.c: what a remote layer costs beyond its kernel, beside a bare gRPC echo.
 *
 *     bench_layer [--quick] [--json FILE] [CASE [ROUNDS]]     only those with CASE in their name:
 * "sleeps"
 *
 * One worker process and one echo server; libattn and the echo's client take turns in this
 * process, so that both meet the same machine. Who sleeps is on one core with its server in some
 * rows and on another in others: the system's choice would be one of the two, another for each
 * side, and makes a factor of five, since an idle core takes its time to wake up. Of every run the
 * time that the worker computed (RunReply.compute_ns) is taken off; what is left is held against a
 * round trip of the same number of bytes, of the same call type, with the same waiting.
 */
#include "bench/echo.h"
#include "bench/ours.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LAYERS 64u       /* runs of a step */
#define SKIP 4u          /* of a turn: until both sides are awake again */
#define REQUEST_HEAD 24u /* bytes of a StepRequest beside its tensors */
#define REPLY_HEAD 26u   /* and of a StepReply */
#define LAYER_TARGET 1.5

static const shape_t shapes[] = {
    {"128 B", 1, 1, 32, ATTN_F32, 1},
    {"4 KiB", 9, 3, 64, ATTN_F32, 1},
    {"16 KiB", 32, 8, 128, ATTN_BF16, 1},
    {"256 KiB", 32, 8, 128, ATTN_BF16, 16},
};
#define SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static struct {
    result_options_t result;
    uint32_t rounds;  /* turns of each side */
    const char *only; /* part of the names of the cases to measure */
} bench;

/* ---- samples ---- */

typedef struct samples {
    double *us;
    uint64_t n;
} samples_t;

static void
samples_add(samples_t *samples, double ns)
{
    if (samples->us == NULL) {
        samples->us = malloc((uint64_t)bench.rounds * LAYERS * sizeof(*samples->us));
    }
    samples->us[samples->n++] = ns / 1e3;
}

static double
p50(samples_t *samples)
{
    return result_quantile(samples->us, samples->n, 0.5);
}

static double
p99(samples_t *samples)
{
    return result_quantile(samples->us, samples->n, 0.99);
}

/* One step of ours: its runs, less what was computed, and what was. */
static void
ours_turn(ours_t *ours, direct_t *direct, samples_t *net, samples_t *computed)
{
    attn_step_t *step = ours_begin(ours);

    for (uint32_t l = 0; l < LAYERS; l++) {
        uint64_t start   = attn_now_ns();
        uint64_t compute = ours_run(ours, step, l, direct);
        uint64_t took    = attn_now_ns() - start;
        if (l >= SKIP) {
            samples_add(net, (double)took - (double)compute);
            samples_add(computed, (double)compute);
        }
    }
    if (direct != NULL) {
        attn_step_abort(step); /* libattn does not know of its layers */
    } else {
        ours_commit(ours, step);
    }
}

static void
echo_turn(echo_t *echo, uint32_t request, uint32_t reply, samples_t *samples)
{
    for (uint32_t i = 0; i < LAYERS; i++) {
        uint64_t start = attn_now_ns();
        echo_round(echo, request, reply);
        if (i >= SKIP) {
            samples_add(samples, (double)(attn_now_ns() - start));
        }
    }
}

/* ---- one worker ---- */

static void
report_layer(const char *type, const char *waiting, const shape_t *shape, samples_t *net,
             samples_t *computed, samples_t *echo)
{
    double ours = p50(net), bare = p50(echo), ratio = ours / bare;

    printf("%-6s %-6s %8s | %7.1f %7.1f | %7.1f %7.1f | %7.1f | %5.2f  %s\n", type, waiting,
           shape->name, bare, p99(echo), ours, p99(net), p50(computed), ratio,
           ratio <= LAYER_TARGET ? "met" : "MISSED");
    fflush(stdout);
    result_json(&bench.result, "layer",
                "\"case\":\"%s %s %s\",\"value\":%.2f,\"unit\":\"us\",\"bound\":%.2f,"
                "\"ratio\":%.3f,\"target\":%.2f,\"p99\":%.2f,\"bound_p99\":%.2f,\"kernel\":%.2f",
                type, waiting, shape->name, ours, bare, ratio, LAYER_TARGET, p99(net), p99(echo),
                p50(computed));
    free(net->us);
    free(computed->us);
    free(echo->us);
}

static void
measure_layer(const cluster_t *cluster, const echoes_t *echoes, const shape_t *shape,
              bool streaming, uint32_t spin_us, const char *waiting)
{
    samples_t net = {0}, computed = {0}, bare = {0};
    attn_client_options_t options;
    ours_t ours;

    attn_client_options_init(&options);
    options.spin_us   = spin_us;
    options.transport = ATTN_TRANSPORT_GRPC;
    ours_open(&ours, cluster->coordinator.line, shape, LAYERS, &options, 512, ATTN_PLACE_WHOLE);
    echo_t *echo     = echo_open(echoes->ports, 1, streaming, spin_us);
    direct_t *direct = streaming ? NULL : direct_open(ours.client, cluster->workers[0].line);
    uint32_t request = (uint32_t)(ours.q_bytes + 2 * ours.kv_bytes) + REQUEST_HEAD;
    uint32_t reply   = (uint32_t)ours.q_bytes + REPLY_HEAD;
    for (uint32_t i = 0; i <= bench.rounds; i++) {
        ours_turn(&ours, direct, &net, &computed);
        echo_turn(echo, request, reply, &bare);
        if (i == 0) {
            net.n = computed.n = bare.n = 0; /* the first turn warms both up */
        }
    }
    report_layer(streaming ? "stream" : "unary", waiting, shape, &net, &computed, &bare);
    if (direct != NULL) {
        direct_close(direct);
    }
    echo_close(echo);
    ours_close(&ours);
}

/* Be on these cores, and so are processes started from now on. */
static void
be_on(int first, int n)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    for (int i = first; i < first + n; i++) {
        CPU_SET(i, &set);
    }
    sched_setaffinity(0, sizeof(set), &set);
}

static void
measure_layers(uint32_t spin_us, const char *waiting, bool one_core)
{
    cluster_t cluster;
    echoes_t echoes;
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);

    if (spin_us == 0) {
        be_on(0, 1);
    }
    cluster_start(&cluster, 1, 1, spin_us);
    echoes_start(&echoes, 1, spin_us);
    if (spin_us == 0 && !one_core && cores > 1) {
        be_on(1, 1);
    }
    for (int streaming = 1; streaming >= 0; streaming--) {
        for (size_t s = 0; s < SHAPES; s++) {
            char name[64];
            snprintf(name, sizeof(name), "%s %s %s", streaming == 1 ? "stream" : "unary", waiting,
                     shapes[s].name);
            if (strstr(name, bench.only) != NULL) {
                measure_layer(&cluster, &echoes, &shapes[s], streaming == 1, spin_us, waiting);
            }
        }
    }
    echoes_stop(&echoes);
    cluster_stop(&cluster);
    be_on(0, cores);
}

int
main(int argc, char **argv)
{
    argc = result_options(&bench.result, argc, argv);
    if (argc > 3) {
        fprintf(stderr, "bench_layer [--quick] [--json FILE] [CASE [ROUNDS]]\n");
        return 2;
    }
    bench.only   = argc > 1 ? argv[1] : "";
    bench.rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : bench.result.quick ? 10 : 40;
    printf("one layer of one worker, microseconds; net: without what the worker computed\n"
           "%-6s %-6s %8s | %7s %7s | %7s %7s | %7s | %s\n",
           "call", "waits", "bytes", "echo50", "echo99", "net50", "net99", "kernel", "ratio");
    measure_layers(50, "spins", false);
    measure_layers(0, "sleeps", false);
    measure_layers(0, "sleeps-1", true);
    return 0;
}
