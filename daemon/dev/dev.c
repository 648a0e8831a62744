/*
 * dev.c: one coordinator and some workers as processes of this machine, and one that watches.
 *
 *     start coordinator --address--> start workers --joined--> say so --> watch --> stop all
 *
 * A worker that dies is logged and not replaced, so that its absence can be studied; without
 * the coordinator the whole ends. A cluster that is not complete in time is a failure too.
 */
#include "daemon/dev/dev.h"

#include "daemon/dev/dev_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORKERS_MAX 64u /* as the option's limit */
#define ARGS_MAX 32u
#define START_MS 60000u
#define STOP_MS 8000u /* then children are killed: above the time that they drain for */

typedef struct group {
    dev_options_t options;
    uint32_t n; /* children; the coordinator is the first */
    child_t children[1 + WORKERS_MAX];
    int signals; /* a signalfd */
    uint64_t started_ns;
    bool told; /* that it is up */
    bool stopping;
    uint64_t kill_at_ns; /* when stopping */
    int code;            /* to exit with */
} group_t;

/* ---- starting ---- */

static const char *
level_name(const dev_options_t *options)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};

    return names[options->log_level < 4 ? options->log_level : 1];
}

/* What the children are told alike. argv has room for it. */
static uint32_t
add_tls(const dev_options_t *o, uint32_t n, char *argv[ARGS_MAX])
{
    const tls_options_t *tls = &o->tls;

    if (tls->cert[0] != '\0') {
        char *const all[] = {"--tls-cert",
                             (char *)tls->cert,
                             "--tls-key",
                             (char *)tls->key,
                             "--tls-ca",
                             (char *)tls->ca,
                             tls->client_certs ? "--tls-client-certs=yes"
                                               : "--tls-client-certs=no"};
        memcpy(&argv[n], all, sizeof(all));
        n += sizeof(all) / sizeof(all[0]);
    }
    if (tls->allow_plaintext) {
        argv[n++] = "--allow-plaintext";
    }
    argv[n] = NULL;
    return n;
}

/* Where child number i serves its metrics: the coordinator where we were told, workers behind it.
 */
static uint32_t
add_metrics(const dev_options_t *o, uint32_t i, char text[OPTIONS_TEXT_MAX], uint32_t n,
            char *argv[ARGS_MAX])
{
    const char *at = o->metrics_listen;

    if (at[0] == '\0') {
        return n;
    }
    unsigned long port = strtoul(strrchr(at, ':') + 1, NULL, 10);
    if (i == 0) {
        snprintf(text, OPTIONS_TEXT_MAX, "%s", at);
    } else {
        snprintf(text, OPTIONS_TEXT_MAX, "127.0.0.1:%lu", port == 0 ? 0 : port + i);
    }
    argv[n++] = "--metrics-listen";
    argv[n++] = text;
    return n;
}

static attn_status_t
start_coordinator(group_t *dev)
{
    const dev_options_t *o = &dev->options;
    char *argv[ARGS_MAX]   = {"attnd",           "coordinator", "--listen",
                              (char *)o->listen, "--log-level", (char *)level_name(o)};

    char metrics[OPTIONS_TEXT_MAX];
    uint32_t n = add_metrics(o, 0, metrics, 6, argv);
    add_tls(o, n, argv);
    attn_status_t status = child_start(&dev->children[0], "coordinator", argv);
    dev->n               = status == ATTN_OK;
    return status;
}

static attn_status_t
start_worker(group_t *dev, uint32_t i)
{
    const dev_options_t *o = &dev->options;
    long cores             = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t share         = cores > 0 ? (uint64_t)cores / o->workers : 1;
    uint64_t threads       = o->threads > 0 ? o->threads : share > 0 ? share : 1;
    char slab[32], count[32], name[16];
    char *argv[ARGS_MAX] = {"attnd",         "worker",
                            "--listen",      "127.0.0.1:0",
                            "--coordinator", dev->children[0].line,
                            "--slab",        slab,
                            "--threads",     count,
                            "--log-level",   (char *)level_name(o),
                            "--name",        name,
                            "--device",      (char *)o->device,
                            "--batch"}; /* the runner is on this machine, too */

    char metrics[OPTIONS_TEXT_MAX];
    add_tls(o, add_metrics(o, 1 + i, metrics, 17, argv), argv);
    snprintf(slab, sizeof(slab), "%llu", (unsigned long long)o->slab);
    snprintf(count, sizeof(count), "%llu", (unsigned long long)threads);
    snprintf(name, sizeof(name), "worker-%u", i + 1);
    attn_status_t status = child_start(&dev->children[1 + i], name, argv);
    dev->n += status == ATTN_OK;
    return status;
}

/* Write the address where the user asked for it: complete or not at all. */
static attn_status_t
write_ready_file(const char *path, const char *address)
{
    char draft[OPTIONS_TEXT_MAX + 16];
    FILE *file;

    snprintf(draft, sizeof(draft), "%s.%d", path, (int)getpid());
    bool written = (file = fopen(draft, "w")) != NULL && fprintf(file, "%s\n", address) > 0;
    if (file != NULL && fclose(file) != 0) {
        written = false;
    }
    if (!written || rename(draft, path) != 0) {
        attn_status_t status =
            attn_fail(ATTN_ERR_INVALID, "--ready-file %s: %s", path, strerror(errno));
        unlink(draft);
        return status;
    }
    return ATTN_OK;
}

/* ---- stopping ---- */

static void
stop(group_t *dev, int code)
{
    if (dev->stopping) {
        return;
    }
    dev->stopping   = true;
    dev->code       = code;
    dev->kill_at_ns = attn_now_ns() + STOP_MS * ATTN_NS_PER_MS;
    for (uint32_t i = 0; i < dev->n; i++) {
        if (dev->children[i].pid > 0) {
            kill(dev->children[i].pid, SIGTERM);
        }
    }
}

static void
fail(group_t *dev, const char *event)
{
    attn_log(ATTN_LOG_ERROR, event, "reason=\"%s\"", attn_last_error());
    stop(dev, 1);
}

static void
kill_all(group_t *dev)
{
    for (uint32_t i = 0; i < dev->n; i++) {
        if (dev->children[i].pid > 0) {
            attn_log(ATTN_LOG_WARN, "dev.killed", "name=%s pid=%d", dev->children[i].name,
                     (int)dev->children[i].pid);
            kill(dev->children[i].pid, SIGKILL);
        }
    }
    dev->kill_at_ns = UINT64_MAX;
}

/* ---- events ---- */

/* Everybody who should be is ready: once. */
static void
tell(group_t *dev)
{
    const char *address = dev->children[0].line;

    dev->told = true;
    if (dev->options.ready_file[0] != '\0' &&
        write_ready_file(dev->options.ready_file, address) != ATTN_OK) {
        fail(dev, "dev.ready_file");
        return;
    }
    printf("attnd dev: %llu worker%s ready; open \"%s\" with attn_client_open(), or see "
           "`attnctl --target %s status`. Ctrl-C ends it.\n",
           (unsigned long long)dev->options.workers, dev->options.workers == 1 ? " is" : "s are",
           address, address);
    fflush(stdout);
}

static void
on_line(group_t *dev, child_t *child)
{
    bool was_ready = child->ready;

    child_read(child);
    if (!child->ready || was_ready || dev->stopping) {
        return;
    }
    for (uint32_t i = 0; child == &dev->children[0] && i < dev->options.workers && !dev->stopping;
         i++) {
        if (start_worker(dev, i) != ATTN_OK) {
            fail(dev, "dev.start");
        }
    }
    uint32_t ready = 0;
    for (uint32_t i = 0; i < dev->n; i++) {
        ready += dev->children[i].ready;
    }
    if (ready == 1 + dev->options.workers && !dev->told) {
        tell(dev);
    }
}

static void
on_death(group_t *dev, child_t *child, int status)
{
    int code   = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    bool well  = dev->stopping && code == 0 && signal == 0;

    attn_log(well ? ATTN_LOG_INFO : ATTN_LOG_ERROR, "dev.child_ended",
             "name=%s pid=%d exit=%d signal=%d", child->name, (int)child->pid, code, signal);
    child->pid = 0;
    if (dev->stopping) {
        dev->code = well ? dev->code : 1;
    } else if (child == &dev->children[0] || !dev->told) {
        stop(dev, 1); /* no cluster without a coordinator, nor before it is complete */
    }
}

static void
reap(group_t *dev)
{
    pid_t pid;
    int status;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (uint32_t i = 0; i < dev->n; i++) {
            if (dev->children[i].pid == pid) {
                on_death(dev, &dev->children[i], status);
            }
        }
    }
}

static void
on_signals(group_t *dev)
{
    struct signalfd_siginfo info;

    while (read(dev->signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        if (info.ssi_signo == SIGCHLD) {
            reap(dev);
        } else if (!dev->stopping) {
            stop(dev, 0);
        } else {
            kill_all(dev); /* asked twice */
        }
    }
}

static void
on_time(group_t *dev)
{
    uint64_t now = attn_now_ns();

    if (dev->stopping && now >= dev->kill_at_ns) {
        kill_all(dev);
    }
    if (!dev->told && !dev->stopping && now > dev->started_ns + START_MS * ATTN_NS_PER_MS) {
        attn_fail(ATTN_ERR_DEADLINE, "not all of %llu workers joined within %u ms",
                  (unsigned long long)dev->options.workers, START_MS);
        fail(dev, "dev.start");
    }
}

static bool
any_running(const group_t *dev)
{
    for (uint32_t i = 0; i < dev->n; i++) {
        if (dev->children[i].pid > 0) {
            return true;
        }
    }
    return false;
}

static void
watch(group_t *dev)
{
    while (any_running(dev)) {
        struct pollfd fds[2 + WORKERS_MAX];
        child_t *whose[2 + WORKERS_MAX];
        nfds_t n = 0;

        fds[n++] = (struct pollfd){.fd = dev->signals, .events = POLLIN};
        for (uint32_t i = 0; i < dev->n; i++) {
            if (dev->children[i].ready_fd >= 0) {
                whose[n] = &dev->children[i];
                fds[n++] = (struct pollfd){.fd = dev->children[i].ready_fd, .events = POLLIN};
            }
        }
        poll(fds, n, 100);
        for (nfds_t i = 1; i < n; i++) {
            if (fds[i].revents != 0) {
                on_line(dev, whose[i]);
            }
        }
        on_signals(dev);
        on_time(dev);
    }
}

static attn_status_t
take_signals(group_t *dev)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    dev->signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return dev->signals >= 0 ? ATTN_OK
                             : attn_fail(ATTN_ERR_EXHAUSTED, "no signalfd: %s", strerror(errno));
}

int
dev_main(int argc, char **argv)
{
    static group_t dev;

    int code = options_start(&dev_option_set, &dev.options, argc, argv);
    if (code >= 0) {
        return code;
    }
    attn_log_set_level((attn_log_level_t)dev.options.log_level);
    attn_log_set_who("role=dev");
    dev.started_ns       = attn_now_ns();
    attn_status_t status = take_signals(&dev);
    if (status == ATTN_OK) {
        status = start_coordinator(&dev);
    }
    if (status != ATTN_OK) {
        fail(&dev, "dev.start");
    }
    watch(&dev);
    if (dev.options.ready_file[0] != '\0' && dev.told) {
        unlink(dev.options.ready_file);
    }
    return dev.code;
}
