/* processes.c: see processes.h. A process says that it is ready by a line on a pipe, whose number
 * it finds in ATTND_READY_FD, as attnd's children do. */
#include "bench/processes.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
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

static void
process_start(process_t *process, bool apart, const char *const *argv)
{
    int ends[2];
    char text[16];
    size_t size = 0;

    if (pipe(ends) != 0 || (process->pid = fork()) < 0) {
        give_up(argv[0], "cannot be started");
    }
    if (process->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (apart && unshare(CLONE_NEWIPC) != 0) {
            _exit(126);
        }
        close(ends[0]);
        snprintf(text, sizeof(text), "%d", ends[1]);
        setenv("ATTND_READY_FD", text, 1);
        execv(argv[0], (char *const *)argv);
        _exit(127);
    }
    close(ends[1]);
    memset(process->line, 0, sizeof(process->line));
    while (strchr(process->line, '\n') == NULL) {
        ssize_t n = read(ends[0], process->line + size, sizeof(process->line) - 1 - size);
        if (n <= 0) {
            give_up(argv[0], "did not come up");
        }
        size += (size_t)n;
    }
    *strchr(process->line, '\n') = '\0';
    close(ends[0]);
}

static void
process_stop(process_t *process, int signo)
{
    kill(process->pid, signo);
    waitpid(process->pid, NULL, 0);
}

static void
start(cluster_t *cluster, bool apart, uint32_t n, uint32_t threads, uint32_t spin_us)
{
    const char *const coordinator[] = {ATTND_PATH,    "coordinator", "--listen", "127.0.0.1:0",
                                       "--log-level", "warn",        NULL};
    char threads_text[16], spin_text[16];

    snprintf(threads_text, sizeof(threads_text), "%u", threads);
    snprintf(spin_text, sizeof(spin_text), "%uus", spin_us);
    process_start(&cluster->coordinator, false, coordinator);
    for (cluster->n = 0; cluster->n < n; cluster->n++) {
        char name[32];
        const char *const worker[] = {ATTND_PATH,
                                      "worker",
                                      "--listen",
                                      "127.0.0.1:0",
                                      "--coordinator",
                                      cluster->coordinator.line,
                                      "--slab",
                                      "2GiB",
                                      "--threads",
                                      threads_text,
                                      "--spin-us",
                                      spin_text,
                                      "--name",
                                      name,
                                      "--log-level",
                                      "warn",
                                      "--ucx-net",
                                      apart ? "lo" : "",
                                      n > 1 ? "--batch" : NULL, /* as `attnd dev` does */
                                      NULL};
        snprintf(name, sizeof(name), "worker-%u", cluster->n + 1);
        process_start(&cluster->workers[cluster->n], apart, worker);
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
        process_start(&echoes->servers[echoes->n], false, argv);
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
