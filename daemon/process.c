#include "daemon/process.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/sockets.h"

#include <assert.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

/* ---- signals ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t came; /* on the monotonic clock */
static bool stopping, reload;

static void *
signals_thread(void *arg)
{
    sigset_t set;
    int signo;

    (void)arg;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    for (;;) {
        if (sigwait(&set, &signo) != 0) {
            continue;
        }
        pthread_mutex_lock(&lock);
        bool second = stopping && signo != SIGHUP;
        stopping    = stopping || signo != SIGHUP;
        reload      = reload || signo == SIGHUP;
        pthread_cond_broadcast(&came);
        pthread_mutex_unlock(&lock);
        if (second) {
            _exit(128 + signo);
        }
    }
    return NULL;
}

/* ---- memory ---- */

#define TRIM_BYTES (UINT64_C(8) << 20) /* of free memory that is worth giving back */
#define KEPT_BYTES (1 << 20)           /* that free() keeps of an arena's end */

/* malloc_trim() leaves the last free chunk of every arena but the first one alone; free() gives it
 * back when it is larger than a threshold. By itself that grows to 64 MiB with the largest block
 * that was freed, in each of eight arenas a core: what one peer sent would be kept for good. */
static void
bound_what_free_keeps(void)
{
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES);
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES);
}

void
process_trim(void)
{
    if (mallinfo2().fordblks >
        TRIM_BYTES) { /* how much of it was given back already is not known */
        malloc_trim(0);
    }
}

/* ---- start ---- */

attn_status_t
process_start(void)
{
    pthread_condattr_t monotonic;
    pthread_t thread;
    sigset_t set;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&came, &monotonic);
    pthread_condattr_destroy(&monotonic);

    bound_what_free_keeps();
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&thread, NULL, signals_thread, NULL) != 0) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "no thread for signals");
    }
    pthread_detach(thread);
    return sockets_start();
}

bool
process_stopping(uint32_t ms)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&lock);
    while (!stopping && !reload && pthread_cond_timedwait(&came, &lock, &until) == 0) {
    }
    bool stop = stopping;
    pthread_mutex_unlock(&lock);
    return stop;
}

bool
process_reload(void)
{
    pthread_mutex_lock(&lock);
    bool asked = reload;
    reload     = false;
    pthread_mutex_unlock(&lock);
    return asked;
}

static void *
end_thread(void *arg)
{
    uint32_t ms = *(uint32_t *)arg;

    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
    attn_log(ATTN_LOG_WARN, "process.cut_short",
             "reason=\"a peer holds a call or connection open\"");
    _exit(0);
}

void
process_end_within(uint32_t ms)
{
    static uint32_t limit;
    pthread_t thread;

    limit = ms;
    if (pthread_create(&thread, NULL, end_thread, &limit) == 0) {
        pthread_detach(thread);
    }
}

/* ---- addresses ---- */

attn_status_t
process_address(const char *listen, uint16_t port, char address[PROCESS_ADDRESS_MAX])
{
    const char *colon = strrchr(listen, ':');
    int host          = colon != NULL ? (int)(colon - listen) : (int)strlen(listen);

    if (snprintf(address, PROCESS_ADDRESS_MAX, "%.*s:%u", host, listen, port) >=
        PROCESS_ADDRESS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "address %s is longer than %d bytes", listen,
                         PROCESS_ADDRESS_MAX - 1);
    }
    return ATTN_OK;
}

bool
process_address_is_wildcard(const char *address)
{
    static const char *const hosts[] = {"0.0.0.0:", "[::]:", "*:"};

    for (size_t i = 0; i < sizeof(hosts) / sizeof(hosts[0]); i++) {
        if (strncmp(address, hosts[i], strlen(hosts[i])) == 0) {
            return true;
        }
    }
    return false;
}

/* ---- the rest ---- */

void
process_random_bytes(void *bytes, size_t n)
{
    assert(n <= 256);                              /* such a request is served whole ... */
    while (getrandom(bytes, n, 0) != (ssize_t)n) { /* ... unless it is interrupted */
    }
}

uint64_t
process_random(void)
{
    uint64_t bits = 0;

    while (bits == 0) {
        process_random_bytes(&bits, sizeof(bits));
    }
    return bits;
}

void
process_ready(const char *line)
{
    const char *text = getenv(PROCESS_READY_FD);
    char out[PROCESS_ADDRESS_MAX + 2];

    if (text == NULL) {
        return;
    }
    int fd = atoi(text);
    int n  = snprintf(out, sizeof(out), "%.*s\n", PROCESS_ADDRESS_MAX, line);
    if (fd > STDERR_FILENO) {
        /* Whoever started us may be gone; that is for its death signal to tell. */
        ssize_t written = write(fd, out, (size_t)n);
        (void)written;
        close(fd);
    }
    unsetenv(PROCESS_READY_FD);
}
