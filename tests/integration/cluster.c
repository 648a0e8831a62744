#include "tests/integration/cluster.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define STOP_MS 12000u

/* ---- small things ---- */

uint64_t
now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void
sleep_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
}

void
must(attn_status_t status, const char *what, const char *file, int line)
{
    if (status != ATTN_OK) {
        print_error("%s:%d: %s: %s: %s\n", file, line, what, attn_strerror(status),
                    attn_last_error());
        _fail(file, line);
    }
}

attn_client_t *
open_client(const char *address, uint32_t timeout_ms)
{
    attn_client_options_t options;
    attn_client_t *client = NULL;

    attn_client_options_init(&options);
    options.timeout_ms = timeout_ms;
    options.name       = "integration";
    OK(attn_client_open(address, &options, &client));
    return client;
}

/* ---- processes ---- */

/* In the child: never returns. */
static void
child_exec(const char *log, int ready_fd, bool apart, const char *const *argv)
{
    char text[16];
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (apart && unshare(CLONE_NEWIPC) != 0) {
        _exit(126);
    }
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    snprintf(text, sizeof(text), "%d", ready_fd);
    setenv("ATTND_READY_FD", text, 1);
    execv(argv[0], (char *const *)argv);
    _exit(127);
}

static void
start(process_t *process, bool apart, const char *const *argv)
{
    static unsigned number;
    const char *folder = getenv("TMPDIR");
    int ends[2];

    memset(process, 0, sizeof(*process));
    snprintf(process->log, sizeof(process->log), "%s/attn-test-%d-%u.log",
             folder != NULL ? folder : "/tmp", (int)getpid(), number++);
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        fcntl(ends[1], F_SETFD, 0);
        child_exec(process->log, ends[1], apart, argv);
    }
    close(ends[1]);
    process->pid      = pid;
    process->ready_fd = ends[0];
}

void
process_start(process_t *process, const char *const *argv)
{
    start(process, false, argv);
}

void
process_start_apart(process_t *process, const char *const *argv)
{
    start(process, true, argv);
}

static void
print_log(const process_t *process)
{
    char line[1024];
    FILE *file = process->log[0] != '\0' ? fopen(process->log, "r") : NULL;

    print_error("---- %s (pid %d)\n", process->log, (int)process->pid);
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        print_error("%s", line);
    }
    if (file != NULL) {
        fclose(file);
    }
}

void
process_wait_ready(process_t *process)
{
    uint64_t end = now_ms() + CLUSTER_START_MS;
    size_t size  = 0;

    while (strchr(process->address, '\n') == NULL) {
        struct pollfd fd = {.fd = process->ready_fd, .events = POLLIN};
        uint64_t now     = now_ms();
        ssize_t n        = now < end && poll(&fd, 1, (int)(end - now)) == 1
                               ? read(process->ready_fd, process->address + size,
                                      sizeof(process->address) - 1 - size)
                               : -1;
        if (n <= 0) {
            print_log(process);
            fail_msg("pid %d is not ready", (int)process->pid);
        }
        size += (size_t)n;
    }
    *strchr(process->address, '\n') = '\0';
    close(process->ready_fd);
    process->ready_fd = -1;
}

void
process_signal(process_t *process, int signo)
{
    siginfo_t info;

    assert_true(process->pid > 0);
    assert_int_equal(kill(process->pid, signo), 0);
    if (signo == SIGSTOP) { /* the signal takes a moment: the process may answer meanwhile */
        assert_int_equal(waitid(P_PID, (id_t)process->pid, &info, WSTOPPED | WNOWAIT), 0);
    }
}

int
process_wait(process_t *process, uint32_t ms)
{
    uint64_t end = now_ms() + ms;
    int status;

    while (waitpid(process->pid, &status, WNOHANG) != process->pid) {
        if (now_ms() >= end) {
            return -1;
        }
        sleep_ms(5);
    }
    process->pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void
process_kill(process_t *process)
{
    if (process->pid > 0) {
        kill(process->pid, SIGKILL);
        assert_int_equal(process_wait(process, STOP_MS), 128 + SIGKILL);
    }
}

bool
process_logged(const process_t *process, const char *words)
{
    char line[1024];
    bool found = false;
    FILE *file = fopen(process->log, "r");

    assert_non_null(file);
    while (!found && fgets(line, sizeof(line), file) != NULL) {
        found = strstr(line, words) != NULL;
    }
    fclose(file);
    return found;
}

bool
process_await_logged(const process_t *process, const char *words, uint32_t ms)
{
    uint64_t end = now_ms() + ms;

    while (!process_logged(process, words) && now_ms() < end) {
        sleep_ms(10);
    }
    return process_logged(process, words);
}

#define TEXT_(number) #number
#define TEXT(number) TEXT_(number)

/* ---- a cluster ---- */

/* What both kinds of daemon are told, behind argv's n words. paths is room for them. */
static void
add_certs(const cluster_options_t *o, const char **argv, uint32_t n, char paths[3][128])
{
    static const char *const options[] = {"--tls-cert", "--tls-key", "--tls-ca"};
    static const char *const files[]   = {"server.pem", "server.key", "ca.pem"};

    for (uint32_t i = 0; o->certs != NULL && i < 3; i++) {
        snprintf(paths[i], 128, "%s/%s", o->certs, files[i]);
        argv[n++] = options[i];
        argv[n++] = paths[i];
    }
    argv[n] = NULL;
}

/* The daemon to test: the one built beside, unless the environment names another. */
static const char *
attnd(void)
{
    const char *path = getenv("ATTN_TEST_ATTND");

    return path != NULL ? path : ATTND_PATH;
}

void
cluster_start_coordinator(test_cluster_t *cluster, const char *listen)
{
    const cluster_options_t *o = &cluster->options;
    const char *lost           = o->lost_ms != NULL ? o->lost_ms : TEXT(CLUSTER_LOST_MS);
    const char *lease          = o->lease_ms != NULL ? o->lease_ms : "30000";
    const char *argv[24]       = {attnd(), "coordinator",    "--listen", listen,       "--lost-ms",
                                  lost,    "--heartbeat-ms", "100",      "--lease-ms", lease};
    char paths[3][128];

    add_certs(o, argv, 10, paths);
    process_start(&cluster->coordinator, argv);
    process_wait_ready(&cluster->coordinator);
}

static void
worker_launch(test_cluster_t *cluster, uint32_t i)
{
    const cluster_options_t *o = &cluster->options;
    const char *slab           = o->slab != NULL ? o->slab : "32MiB";
    const char *drain          = o->drain_ms != NULL ? o->drain_ms : "5000";
    char name[16], device[32], paths[3][128];
    const char *argv[32] = {attnd(),      "worker", "--coordinator", cluster->coordinator.address,
                            "--slab",     slab,     "--threads",     "1",
                            "--drain-ms", drain,    "--name",        name,
                            "--device",   device};

    unsigned n = 14;

    snprintf(name, sizeof(name), "w%u", i);
    snprintf(device, sizeof(device), "%.16s", o->device != NULL ? o->device : "cpu");
    if (o->device_each) {
        snprintf(device + strlen(device), 8, ":%u", i);
    }
    if (o->groups) {
        argv[n++] = "--groups";
    }
    if (o->check_store) {
        argv[n++] = "--check-store";
    }
    if (o->ucx_slab != NULL) {
        argv[n++] = "--ucx-slab";
        argv[n++] = o->ucx_slab;
    }
    if (o->gpu_lend != NULL) {
        argv[n++] = "--gpu-lend";
        argv[n++] = o->gpu_lend;
    }
    if (getenv("ATTN_TEST_NO_UCX") != NULL) {
        argv[n++] = "--ucx-memory";
        argv[n++] = "0";
    }
    if (o->ucx_net) {
        argv[n++] = "--ucx-net";
        argv[n++] = "lo";
    }
    add_certs(o, argv, n, paths);
    start(&cluster->workers[i], o->apart, argv);
}

/* May processes have IPC namespaces of their own here? */
static void
need_apart(void)
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        _exit(unshare(CLONE_NEWIPC) != 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (status != 0) {
        print_message("skipped: unshare(CLONE_NEWIPC) is not allowed here\n");
        _exit(77);
    }
}

void
cluster_start_worker(test_cluster_t *cluster, uint32_t i)
{
    unlink(cluster->workers[i].log); /* of its predecessor */
    worker_launch(cluster, i);
    process_wait_ready(&cluster->workers[i]);
}

void
cluster_up(test_cluster_t *cluster, const cluster_options_t *options)
{
    memset(cluster, 0, sizeof(*cluster));
    cluster->options = *options;
    if (options->apart || getenv("ATTN_TEST_APART") != NULL) {
        need_apart();
        setenv("UCX_NET_DEVICES", "lo", 0); /* of clients and coordinators */
        cluster->options.apart = cluster->options.ucx_net = true;
    }
    cluster_start_coordinator(cluster, "127.0.0.1:0");
    for (uint32_t i = 0; i < options->workers; i++) {
        worker_launch(cluster, i);
    }
    for (uint32_t i = 0; i < options->workers; i++) {
        process_wait_ready(&cluster->workers[i]);
    }
}

void
cluster_print_logs(const test_cluster_t *cluster)
{
    print_log(&cluster->coordinator);
    for (uint32_t i = 0; i < cluster->options.workers; i++) {
        print_log(&cluster->workers[i]);
    }
}

/* One process: SIGTERM was sent. @return whether it ended well */
static bool
down(process_t *process)
{
    int code = process->pid > 0 ? process_wait(process, STOP_MS) : 0;

    if (code != 0) {
        print_error("pid %d ended with %d\n", (int)process->pid, code);
        if (process->pid > 0) {
            process_kill(process);
        }
    }
    return code == 0;
}

void
cluster_down(test_cluster_t *cluster)
{
    uint32_t n = cluster->options.workers;
    bool well  = true;

    for (uint32_t i = 0; i <= n; i++) {
        process_t *process = i == 0 ? &cluster->coordinator : &cluster->workers[i - 1];
        if (process->pid > 0) {
            kill(process->pid, SIGCONT);
            kill(process->pid, SIGTERM);
        }
    }
    well = down(&cluster->coordinator);
    for (uint32_t i = 0; i < n; i++) {
        well = down(&cluster->workers[i]) && well;
    }
    if (!well) {
        cluster_print_logs(cluster);
    }
    for (uint32_t i = 0; i <= n; i++) {
        unlink(i == 0 ? cluster->coordinator.log : cluster->workers[i - 1].log);
    }
    assert_true(well);
}

void
cluster_kill(test_cluster_t *cluster)
{
    process_kill(&cluster->coordinator);
    for (uint32_t i = 0; i < cluster->options.workers; i++) {
        process_kill(&cluster->workers[i]);
    }
}

process_t *
cluster_worker_at(test_cluster_t *cluster, const char *address)
{
    for (uint32_t i = 0; i < cluster->options.workers; i++) {
        if (strcmp(cluster->workers[i].address, address) == 0) {
            return &cluster->workers[i];
        }
    }
    fail_msg("no worker at %s", address);
    return NULL;
}
