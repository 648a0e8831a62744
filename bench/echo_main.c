/*
 * echo_main.c: the bare echo as a program.
 *
 *     bench_echo serve SPIN_US
 *     bench_echo fan SERVERS ROUNDS REQUEST REPLY SPIN_US [PAUSE_US]
 *
 * `fan` starts the servers, sends REQUEST bytes to all of them at once and waits for REPLY bytes
 * from each, ROUNDS times on streams, and prints the median and the 99th percentile in us. With
 * PAUSE_US, all cores compute for so long between two rounds, as those of a model do between two
 * layers: servers then have gone to sleep and caches have been used otherwise.
 */
#include "bench/echo.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WARM_UP 50u
#define HELPERS_MAX 63u
#define SCRATCH (1u << 20) /* bytes that a thread goes through while it computes */

/* Threads that compute beside the client, each time the round number grows. */
typedef struct load {
    atomic_uint round, busy;
    uint64_t pause_ns;
    uint32_t helpers;
} load_t;

static void
compute(uint64_t until_ns)
{
    static _Thread_local volatile uint64_t scratch[SCRATCH / 8];
    uint64_t sum = 0;

    while (attn_now_ns() < until_ns) {
        for (uint32_t i = 0; i < SCRATCH / 8 / 16; i++) {
            sum += scratch[i * 16 + sum % 2];
        }
    }
}

static void *
helper(void *arg)
{
    load_t *load  = arg;
    unsigned seen = 0;

    for (;;) {
        while (atomic_load(&load->round) == seen) {
            usleep(20);
        }
        seen = atomic_load(&load->round);
        compute(attn_now_ns() + load->pause_ns);
        atomic_fetch_sub(&load->busy, 1);
    }
    return NULL;
}

static void
load_pause(load_t *load)
{
    if (load->pause_ns == 0) {
        return;
    }
    atomic_store(&load->busy, load->helpers);
    atomic_fetch_add(&load->round, 1);
    compute(attn_now_ns() + load->pause_ns);
    while (atomic_load(&load->busy) > 0) {
    }
}

static void
load_start(load_t *load, uint64_t pause_us)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t thread;

    load->pause_ns = pause_us * 1000;
    while (pause_us > 0 && load->helpers + 1 < cores && load->helpers < HELPERS_MAX &&
           pthread_create(&thread, NULL, helper, load) == 0) {
        load->helpers++;
    }
}

static int
fan(uint32_t servers, uint32_t rounds, uint32_t request, uint32_t reply, uint32_t spin_us,
    uint64_t pause_us)
{
    static load_t load;
    echoes_t echoes;
    double *samples = calloc(rounds, sizeof(*samples));

    echoes_start(&echoes, servers, spin_us);
    echo_t *echo = echo_open(echoes.ports, servers, true, spin_us);
    load_start(&load, pause_us);
    for (uint32_t i = 0; i < WARM_UP + rounds && samples != NULL; i++) {
        load_pause(&load);
        uint64_t start = attn_now_ns();
        echo_round(echo, request, reply);
        if (i >= WARM_UP) {
            samples[i - WARM_UP] = (double)(attn_now_ns() - start) / 1e3;
        }
    }
    printf("fan-out to %u, %u bytes there, %u back: p50 %.1f us, p99 %.1f us\n", servers, request,
           reply, result_quantile(samples, rounds, 0.5), result_quantile(samples, rounds, 0.99));
    echo_close(echo);
    echoes_stop(&echoes);
    free(samples);
    return 0;
}

static uint32_t
number(const char *text)
{
    return (uint32_t)strtoul(text, NULL, 10);
}

int
main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "serve") == 0) {
        const char *fd = getenv("ATTND_READY_FD");
        echo_serve(fd != NULL ? atoi(fd) : STDOUT_FILENO, number(argv[2]));
    }
    if (argc >= 7 && strcmp(argv[1], "fan") == 0 && number(argv[2]) >= 1 &&
        number(argv[2]) <= PROCESSES_WORKERS_MAX) {
        return fan(number(argv[2]), number(argv[3]), number(argv[4]), number(argv[5]),
                   number(argv[6]), argc > 7 ? number(argv[7]) : 0);
    }
    fprintf(stderr, "bench_echo serve SPIN_US\n"
                    "bench_echo fan SERVERS ROUNDS REQUEST REPLY SPIN_US [PAUSE_US]\n");
    return 2;
}
