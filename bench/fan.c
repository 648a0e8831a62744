/*
 * fan.c: a layer of a sequence that is spread over several workers.
 *
 *     bench_fan [--quick] [--json FILE] [WORKERS [PAUSE_US]]     default: 4 workers, 800 us
 *
 * The same decode step (9 query heads, 3 KV heads of 64, f32, 2,700 tokens) on WORKERS processes
 * of one thread each, and in this process with as many threads as there are cores, beside a bare
 * echo of the same bytes to as many processes at once. Between two layers all cores compute for
 * PAUSE_US, as a model's do. A layer should take at most the local one and 1.5 times the echo.
 */
#include "bench/echo.h"
#include "bench/load.h"
#include "bench/ours.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"

#include <stdlib.h>
#include <unistd.h>

#define LAYERS 30u
#define CONTEXT 2700u
#define CHUNK 256u
#define TARGET 1.5
#define SPIN_US 50u

/* The heads of the messages beside: StepRequest, StepReply. */
static const shape_t shape = {"decode", 9, 3, 64, ATTN_F32, 1};
#define REQUEST_BYTES (9u * 64 * 4 + 24)
#define REPLY_BYTES (9u * (8 + 64 * 4) + 26)

typedef struct samples {
    double *run, *compute; /* us */
    uint64_t n;
} samples_t;

static void
samples_add(samples_t *s, uint64_t ns, uint64_t compute_ns)
{
    s->run[s->n]       = (double)ns / 1e3;
    s->compute[s->n++] = (double)compute_ns / 1e3;
}

static samples_t
samples_of(uint32_t turns)
{
    return (samples_t){.run     = calloc((uint64_t)turns * LAYERS, sizeof(double)),
                       .compute = calloc((uint64_t)turns * LAYERS, sizeof(double))};
}

static void
open_side(ours_t *ours, const char *target)
{
    attn_client_options_t options;
    shape_t prompt = shape;

    prompt.rows = CONTEXT / 10;
    attn_client_options_init(&options);
    options.spin_us   = SPIN_US;
    options.transport = ATTN_TRANSPORT_GRPC;
    ours_open(ours, target, &prompt, LAYERS, &options, CHUNK, ATTN_PLACE_SPREAD);
    while (ours->length < CONTEXT) {
        ours_append(ours);
    }
    ours_reshape(ours, 1);
}

static void
ours_turn(ours_t *ours, load_t *load, samples_t *samples)
{
    attn_step_t *step = ours_begin(ours);

    for (uint32_t l = 0; l < LAYERS; l++) {
        load_pause(load);
        uint64_t start   = attn_now_ns();
        uint64_t compute = ours_run(ours, step, l, NULL);
        samples_add(samples, attn_now_ns() - start, compute);
    }
    ours_commit(ours, step);
}

static void
echo_turn(echo_t *echo, load_t *load, samples_t *samples)
{
    for (uint32_t i = 0; i < LAYERS; i++) {
        load_pause(load);
        uint64_t start = attn_now_ns();
        echo_round(echo, REQUEST_BYTES, REPLY_BYTES);
        samples_add(samples, attn_now_ns() - start, 0);
    }
}

static void
report(const result_options_t *options, uint32_t workers, samples_t *local, samples_t *spread,
       samples_t *bare)
{
    double alone = result_quantile(local->run, local->n, 0.5);
    double run   = result_quantile(spread->run, spread->n, 0.5);
    double echo  = result_quantile(bare->run, bare->n, 0.5);
    double ratio = (run - alone) / echo;

    printf("%u workers: run p50 %.0f us, p99 %.0f (the slowest computed %.0f); local %.0f; bare "
           "fan-out %.0f\n  (run - local) / echo: %.2f, target %.2f: %s\n",
           workers, run, result_quantile(spread->run, spread->n, 0.99),
           result_quantile(spread->compute, spread->n, 0.5), alone, echo, ratio, TARGET,
           ratio <= TARGET ? "met" : "MISSED");
    result_json(options, "fan",
                "\"case\":\"%u workers, over local\",\"value\":%.2f,\"unit\":\"us\",\"bound\":%.2f,"
                "\"ratio\":%.3f,\"target\":%.2f,\"run\":%.2f,\"local\":%.2f",
                workers, run - alone, echo, ratio, TARGET, run, alone);
}

int
main(int argc, char **argv)
{
    result_options_t options;
    cluster_t cluster;
    echoes_t echoes;
    ours_t local, spread;
    char target[64];

    argc         = result_options(&options, argc, argv);
    long workers = argc > 1 ? atol(argv[1]) : 4;
    long pause   = argc > 2 ? atol(argv[2]) : 800;
    if (argc > 3 || workers < 1 || workers > (long)PROCESSES_WORKERS_MAX || pause < 0) {
        fprintf(stderr, "bench_fan [--quick] [--json FILE] [WORKERS [PAUSE_US]]\n");
        return 2;
    }
    uint32_t n = (uint32_t)workers, turns = options.quick ? 10 : 40;
    cluster_start(&cluster, n, 1, SPIN_US);
    echoes_start(&echoes, n, SPIN_US);
    snprintf(target, sizeof(target), "inproc://cpu?threads=%ld&slab=1GiB",
             sysconf(_SC_NPROCESSORS_ONLN));
    open_side(&local, target);
    open_side(&spread, cluster.coordinator.line);
    echo_t *echo       = echo_open(echoes.ports, n, true, SPIN_US);
    load_t *load       = load_start((uint64_t)pause);
    samples_t on_local = samples_of(turns), on_spread = samples_of(turns), bare = samples_of(turns);
    for (uint32_t i = 0; i < turns; i++) {
        ours_turn(&local, load, &on_local);
        ours_turn(&spread, load, &on_spread);
        echo_turn(echo, load, &bare);
        if (i == 0) {
            on_local.n = on_spread.n = bare.n = 0; /* the first turn warms all up */
        }
    }
    report(&options, n, &on_local, &on_spread, &bare);
    echo_close(echo);
    ours_close(&spread);
    ours_close(&local);
    echoes_stop(&echoes);
    cluster_stop(&cluster);
    return 0;
}
