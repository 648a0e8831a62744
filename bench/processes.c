/* processes.c: see processes.h. A process says that it is ready by a line on a pipe, whose number
 * it finds in ATTND_READY_FD, as attnd's children do. */
#include "bench/processes.h"

#include "client/slab_card.h"
#include "kernels/memory.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void
give_up(const char *program, const char *what)
{
    fprintf(stderr, "%s %s\n", program, what);
    exit(1);
}

/* attnd of the same build; or, where that was packed for another machine (deploy/bundle -b), the
 * one that came along. */
static const char *
attnd_path(void)
{
    static char packed[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", packed, sizeof(packed) - sizeof("../bin/attnd"));

    packed[n > 0 ? n : 0] = '\0';
    char *slash           = strrchr(packed, '/');
    if (access(ATTND_PATH, X_OK) == 0 || slash == NULL) {
        return ATTND_PATH;
    }
    strcpy(slash + 1, "../bin/attnd");
    return packed;
}

static void
be_on_core(int core)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(core % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof(set), &set);
}

/* core: -1 any. @return the end of the pipe that it will say on that it is ready */
static int
process_launch(process_t *process, bool apart, int core, const char *const *argv)
{
    int ends[2];
    char text[16];

    if (pipe2(ends, O_CLOEXEC) != 0 || (process->pid = fork()) < 0) {
        give_up(argv[0], "cannot be started");
    }
    if (process->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (apart && unshare(CLONE_NEWIPC) != 0) {
            _exit(126);
        }
        if (core >= 0) {
            be_on_core(core);
        }
        snprintf(text, sizeof(text), "%d", ends[1]);
        fcntl(ends[1], F_SETFD, 0);
        setenv("ATTND_READY_FD", text, 1);
        execv(argv[0], (char *const *)argv);
        _exit(127);
    }
    close(ends[1]);
    return ends[0];
}

/* @return false: it ended before */
static bool
process_wait(process_t *process, int end)
{
    size_t size = 0;

    memset(process->line, 0, sizeof(process->line));
    while (strchr(process->line, '\n') == NULL) {
        ssize_t n = read(end, process->line + size, sizeof(process->line) - 1 - size);
        if (n <= 0) {
            break;
        }
        size += (size_t)n;
    }
    close(end);
    char *eol = strchr(process->line, '\n');
    if (eol != NULL) {
        *eol = '\0';
    }
    return eol != NULL;
}

static void
process_start(process_t *process, const char *const *argv)
{
    if (!process_wait(process, process_launch(process, false, -1, argv))) {
        give_up(argv[0], "did not come up");
    }
}

static void
process_stop(process_t *process, int signo)
{
    kill(process->pid, signo);
    waitpid(process->pid, NULL, 0);
}

#define WORDS 40u
#define WORD_BYTES 64u

/* A command's words, one after the other. */
typedef struct command {
    const char *argv[WORDS + 1];
    char made[WORDS][WORD_BYTES];
    uint32_t n;
} command_t;

static void
say(command_t *command, const char *word)
{
    command->argv[command->n++] = word;
}

static void __attribute__((format(printf, 3, 4)))
say_that(command_t *command, const char *word, const char *format, ...)
{
    va_list args;

    say(command, word);
    va_start(args, format);
    vsnprintf(command->made[command->n], WORD_BYTES, format, args);
    va_end(args);
    say(command, command->made[command->n]);
}

static int
launch_worker(cluster_t *cluster, uint32_t i, uint32_t n, const cluster_options_t *options)
{
    uint64_t slab     = options->slab > 0 ? options->slab : UINT64_C(2) << 30;
    command_t command = {.n = 0};

    say(&command, attnd_path());
    say(&command, "worker");
    say_that(&command, "--listen", "127.0.0.1:0");
    say_that(&command, "--coordinator", "%s", cluster->coordinator.line);
    say_that(&command, "--slab", "%" PRIu64, slab);
    say_that(&command, "--threads", "%u", options->threads);
    say_that(&command, "--spin-us", "%uus", options->spin_us);
    say_that(&command, "--name", "worker-%u", i + 1);
    say_that(&command, "--log-level", "warn");
    say_that(&command, "--ucx-net", "%s", options->apart ? "lo" : "");
    if (options->gpus > 0) {
        say_that(&command, "--device", "cuda:%u", (options->gpu_first + i) % options->gpus);
    }
    if (options->ucx_slab > 0) {
        say_that(&command, "--ucx-slab", "%" PRIu64, options->ucx_slab);
        say_that(&command, "--ucx-memory", "%" PRIu64, options->ucx_slab * options->clients);
        say_that(&command, "--gpu-lend", "%" PRIu64,
                 attn_shared_takes(slab_lane_at(options->ucx_slab, SLAB_LANES)) * options->clients);
    }
    if (options->grpc) {
        say_that(&command, "--ucx-memory", "0");
    }
    if (options->groups) {
        say(&command, "--groups");
    }
    if (n > 1 && options->gpus == 0) {
        say(&command, "--batch"); /* as `attnd dev` does */
    }
    return process_launch(&cluster->workers[i], options->apart, options->own_cores ? (int)i : -1,
                          command.argv);
}

bool
cluster_start_with(cluster_t *cluster, uint32_t n, const cluster_options_t *options)
{
    const char *const coordinator[] = {attnd_path(),  "coordinator", "--listen", "127.0.0.1:0",
                                       "--log-level", "warn",        NULL};
    int ends[PROCESSES_WORKERS_MAX];
    bool all = true;

    process_start(&cluster->coordinator, coordinator);
    for (uint32_t i = 0; i < n; i++) {
        ends[i] = launch_worker(cluster, i, n, options);
        /* Workers measure themselves as they start: on one CPU one after the other. */
        all = (options->gpus > 0 || process_wait(&cluster->workers[i], ends[i])) && all;
    }
    for (uint32_t i = 0; options->gpus > 0 && i < n; i++) {
        all = process_wait(&cluster->workers[i], ends[i]) && all;
    }
    cluster->n = n;
    if (!all) {
        cluster_stop(cluster);
    }
    return all;
}

static void
start(cluster_t *cluster, bool apart, uint32_t n, uint32_t threads, uint32_t spin_us)
{
    if (!cluster_start_with(
            cluster, n,
            &(cluster_options_t){.threads = threads, .spin_us = spin_us, .apart = apart})) {
        give_up(attnd_path(), "did not come up");
    }
}

void
cluster_start(cluster_t *cluster, uint32_t n, uint32_t threads, uint32_t spin_us)
{
    start(cluster, false, n, threads, spin_us);
}

bool
cluster_start_apart(cluster_t *cluster, uint32_t n, uint32_t threads, uint32_t spin_us)
{
    int status = 1;
    pid_t pid  = fork();

    if (pid == 0) {
        _exit(unshare(CLONE_NEWIPC) != 0);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0) {
        return false;
    }
    start(cluster, true, n, threads, spin_us);
    return true;
}

void
cluster_stop(cluster_t *cluster)
{
    for (uint32_t i = 0; i < cluster->n; i++) {
        process_stop(&cluster->workers[i], SIGKILL); /* nothing of theirs is to be kept */
    }
    process_stop(&cluster->coordinator, SIGKILL);
}

void
echoes_start(echoes_t *echoes, uint32_t n, uint32_t spin_us)
{
    char spin_text[16];
    const char *const argv[] = {BENCH_ECHO_PATH, "serve", spin_text, NULL};

    snprintf(spin_text, sizeof(spin_text), "%u", spin_us);
    for (echoes->n = 0; echoes->n < n; echoes->n++) {
        process_start(&echoes->servers[echoes->n], argv);
        echoes->ports[echoes->n] = (uint16_t)atoi(echoes->servers[echoes->n].line);
    }
}

void
echoes_stop(echoes_t *echoes)
{
    for (uint32_t i = 0; i < echoes->n; i++) {
        process_stop(&echoes->servers[i], SIGKILL);
    }
}
