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
#include "bench/load.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WARM_UP 50u

static int
fan(uint32_t servers, uint32_t rounds, uint32_t request, uint32_t reply, uint32_t spin_us,
    uint64_t pause_us)
{
    echoes_t echoes;
    double *samples = calloc(rounds, sizeof(*samples));

    echoes_start(&echoes, servers, spin_us);
    echo_t *echo = echo_open(echoes.ports, servers, true, spin_us);
    load_t *load = load_start(pause_us);
    for (uint32_t i = 0; i < WARM_UP + rounds && samples != NULL; i++) {
        load_pause(load);
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
