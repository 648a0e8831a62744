/*
 * sockets.c: in place of libc's, for C core 1.51, as this program's own of the same name come
 * first.
 *
 * accept4(): C core stops listening for good when it fails for want of descriptors, and peers that
 * hold connections open would shut out everybody from then on. The last descriptors are ours, so a
 * connection that would get one of those is closed at once, and want of anything is to C core as if
 * nobody had called.
 *
 * recvmsg(), and epoll_ctl() for its sake: C core reads from a connection until there is nothing
 * more to read. A peer that sends frames faster than they are read, of a kind that no window holds
 * back, has it stay there, on the one thread that polls, for as long as the peer likes: heartbeats
 * and everybody else wait. And C core takes what it read in one go for the size of the next buffer,
 * so that the peer has it allocate gigabytes, or, beyond 2 GiB, nothing, which an assertion notices
 * (tcp_posix.cc:894). So a connection has turns: when it had one, C core is told that there is
 * nothing more, and the epoll set to report the connection again if there is. Others come between.
 * A turn has as many bytes as take half a millisecond, by the turns before: tensors take a
 * hundredth of the time of frames without content, or of calls that are reset as they are made.
 */
#include "daemon/sockets.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <errno.h>
#include <limits.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KEPT 64               /* descriptors for ourselves: connections to others, files */
#define SOURCES_MAX (1 << 20) /* descriptors that have turns: all of most systems */
#define TURN_NS (ATTN_NS_PER_MS / 2)
#define TURN_LEAST (16u << 10) /* bytes; also before it is known how long they take */
#define TURN_MOST (1u << 20)

/* A read that ends a turn may be one that follows others before C core looks at what came; only the
 * second one is sure to have it leave the connection. */
#define REFUSALS 2

/* What is known of a descriptor that is read from. One thread at a time reads from it, and begins
 * after it was put into the set. */
typedef struct source {
    atomic_int set; /* its epoll set, counted from 1; 0: none */
    atomic_uint events;
    _Atomic uint64_t data;     /* what the set says for it */
    _Atomic uint64_t since_ns; /* this turn */
    atomic_uint turn;          /* bytes of one */
    atomic_uint taken;         /* of this one */
    atomic_uint refusals;      /* reads since the turn was over */
} source_t;

static int connections_end = INT_MAX; /* descriptors from here on are not for who connects to us */
static source_t *sources;             /* by descriptor */

static source_t *
source_of(int fd)
{
    return sources != NULL && fd >= 0 && fd < SOURCES_MAX ? &sources[fd] : NULL;
}

/* ---- connections come ---- */

/* Say now and then how many were turned away. */
static void
note_turned_away(void)
{
    static atomic_ulong turned_away;
    static _Atomic uint64_t told_ns;
    unsigned long n = atomic_fetch_add(&turned_away, 1) + 1;
    uint64_t now = attn_now_ns(), before = atomic_load(&told_ns);

    if ((before == 0 || now - before > 1000 * ATTN_NS_PER_MS) &&
        atomic_compare_exchange_strong(&told_ns, &before, now)) {
        attn_log(ATTN_LOG_WARN, "process.connections_full", "limit=%d turned_away=%lu",
                 connections_end, n);
    }
}

__attribute__((visibility("default"))) int
accept4(int listener, struct sockaddr *address, socklen_t *size, int flags)
{
    for (socklen_t room = size != NULL ? *size : 0;;) {
        if (size != NULL) {
            *size = room;
        }
        int fd = (int)syscall(SYS_accept4, listener, address, size, flags);
        if (fd >= 0 && fd < connections_end) {
            return fd;
        }
        bool none = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
        if (fd < 0) {
            errno = none ? EAGAIN : errno;
            return fd;
        }
        close(fd);
        note_turned_away();
    }
}

/* ---- connections have turns ---- */

__attribute__((visibility("default"))) int
epoll_ctl(int set, int op, int fd, struct epoll_event *event)
{
    source_t *source = source_of(fd);

    if (source != NULL) {
        /* Only one who is told of a change, and not of a state, would miss what is left to read. */
        bool turns = op != EPOLL_CTL_DEL && event != NULL && (event->events & EPOLLET) != 0;
        atomic_store(&source->events, turns ? event->events : 0);
        atomic_store(&source->data, turns ? event->data.u64 : 0);
        atomic_store(&source->turn, TURN_LEAST);
        atomic_store(&source->taken, 0);
        atomic_store(&source->refusals, 0);
        atomic_store(&source->set, turns ? set + 1 : 0);
    }
    int result = (int)syscall(SYS_epoll_ctl, set, op, fd, event);
    if (source != NULL && result != 0) {
        atomic_store(&source->set, 0);
    }
    return result;
}

/* Have the set report the descriptor again, if it can be read from. */
static bool
report_again(int fd, source_t *source)
{
    struct epoll_event event = {.events = atomic_load(&source->events),
                                .data   = {.u64 = atomic_load(&source->data)}};

    return syscall(SYS_epoll_ctl, atomic_load(&source->set) - 1, EPOLL_CTL_MOD, fd, &event) == 0;
}

/* What the next turn has, by the time that this one took, which may have been the scheduler's. */
static unsigned
next_turn(source_t *source)
{
    uint64_t took = attn_max(attn_now_ns() - atomic_load(&source->since_ns), 1);
    uint64_t turn = atomic_load(&source->turn);

    turn = attn_min(turn * TURN_NS / took, 2 * turn);
    return (unsigned)attn_max(attn_min(turn, TURN_MOST), TURN_LEAST);
}

/* @return whether the connection's turn is over and others are to come */
static bool
turn_is_over(int fd, source_t *source)
{
    if (atomic_load(&source->taken) < atomic_load(&source->turn) || !report_again(fd, source)) {
        return false;
    }
    unsigned refusals = atomic_fetch_add(&source->refusals, 1) + 1;
    if (refusals == REFUSALS) {
        atomic_store(&source->turn, next_turn(source));
        atomic_store(&source->taken, 0);
        atomic_store(&source->refusals, 0);
    }
    return true;
}

/* Whether C core will see that it read all there was, and leave the connection by itself. */
static bool
was_all(struct msghdr *message)
{
    int left = 1;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level == IPPROTO_TCP && c->cmsg_type == TCP_CM_INQ) {
            memcpy(&left, CMSG_DATA(c), sizeof(left));
        }
    }
    return left == 0;
}

/* Read no more than what is left of a turn, as near as whole buffers come to it. */
static ssize_t
take(int fd, source_t *source, struct msghdr *message, int flags)
{
    size_t all = message->msg_iovlen, n = 0, bytes = 0;
    unsigned taken = atomic_load(&source->taken), turn = atomic_load(&source->turn);
    size_t room = turn - attn_min(taken, turn - 1);

    if (taken == 0) {
        atomic_store(&source->since_ns, attn_now_ns());
    }
    while (n < all && (n == 0 || bytes < room)) {
        bytes += message->msg_iov[n++].iov_len;
    }
    message->msg_iovlen = n;
    ssize_t got         = syscall(SYS_recvmsg, fd, message, flags);
    message->msg_iovlen = all;
    bool over           = got <= 0 || was_all(message);
    atomic_store(&source->taken, over ? 0 : taken + (unsigned)attn_min((uint64_t)got, TURN_MOST));
    return got;
}

__attribute__((visibility("default"))) ssize_t
recvmsg(int fd, struct msghdr *message, int flags)
{
    source_t *source = source_of(fd);

    if (source == NULL || atomic_load(&source->set) == 0 || flags != 0) {
        return syscall(SYS_recvmsg, fd, message, flags);
    }
    if (turn_is_over(fd, source)) {
        errno = EAGAIN;
        return -1;
    }
    return take(fd, source, message, flags);
}

/* ---- the start ---- */

attn_status_t
sockets_start(void)
{
    struct rlimit limit;
    void *memory = mmap(NULL, SOURCES_MAX * sizeof(source_t), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED || getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no table of descriptors: %s", strerror(errno));
    }
    sources = memory;
    if (limit.rlim_cur < limit.rlim_max) { /* the usual limit of 1,024 is few */
        rlim_t before  = limit.rlim_cur;
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
            limit.rlim_cur = before;
        }
    }
    int all         = (int)attn_min(limit.rlim_cur, SOURCES_MAX);
    connections_end = all > 4 * KEPT ? all - KEPT : all * 3 / 4;
    return ATTN_OK;
}
