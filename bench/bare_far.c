/* bare_far.c: see bare_far.h. */
#include "bench/bare_far.h"

#include "bench/result.h"
#include "rpc/ucx_int.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEVICE "lo"
#define LOOKS 16u /* before others may have the core */

struct bare_far {
    pid_t pid;
    ucx_port_t *port;
    ucx_way_t *way;
    ucx_head_t head;
    uint8_t *from, *to;
    uint32_t in, out;
    uint64_t came; /* messages */
    bool closed;
};

/* What a side is told of the other; its address follows. */
typedef struct order {
    uint32_t in, out;
    uint64_t address_size;
} order_t;

static void
pass(int fd, void *bytes, size_t n, bool out)
{
    if ((out ? write(fd, bytes, n) : read(fd, bytes, n)) != (ssize_t)n) {
        exit(1);
    }
}

static bool
arrive(void *arg, const ucx_head_t *head, uint64_t bytes, ucx_coming_t *coming)
{
    bare_far_t *bare = arg;

    (void)head;
    if (bytes > bare->out) {
        exit(1);
    }
    *coming = (ucx_coming_t){.way = bare->way, .to = bare->to, .what = bare};
    return true;
}

static void
arrived(void *arg, void *what, bool whole)
{
    (void)what;
    if (!whole) {
        exit(1);
    }
    ((bare_far_t *)arg)->came++;
}

static void
broken(void *arg, void *whose, const char *why)
{
    (void)arg, (void)whose, (void)why;
    exit(1);
}

static void
closed(void *arg, void *whose)
{
    (void)whose;
    ((bare_far_t *)arg)->closed = true;
}

/* Tell the other side where this one is, and hear where it is. in is what goes there. */
static void
meet(bare_far_t *bare, int fd)
{
    const ucx_port_user_t user = {
        .arrive = arrive, .arrived = arrived, .broken = broken, .closed = closed, .arg = bare};
    uint8_t address[UCX_ADDRESS_MAX];
    ucx_offer_t offer;

    result_must(ucx_port_create(DEVICE, &user, &bare->port));
    ucx_port_offer(bare->port, &offer);
    order_t order = {.in = bare->in, .out = bare->out, .address_size = offer.address_size};
    pass(fd, &order, sizeof(order), true);
    pass(fd, (void *)offer.address, offer.address_size, true);
    pass(fd, &order, sizeof(order), false);
    pass(fd, address, order.address_size, false);
    if (bare->in == 0) { /* the server */
        bare->in  = order.out;
        bare->out = order.in;
    }
    bare->from = calloc(1, bare->in + 1);
    bare->to   = calloc(1, bare->out + 1);
    result_must(ucx_way_open(bare->port, address, order.address_size, bare, &bare->way));
}

static void
await(bare_far_t *bare, uint64_t n)
{
    for (unsigned looks = 0; bare->came < n; looks++) {
        ucx_port_progress(bare->port);
        if (looks % LOOKS == LOOKS - 1) {
            sched_yield();
        }
    }
}

static void
send_one(bare_far_t *bare)
{
    ucx_way_send(bare->way, &bare->head, bare->from, bare->in);
}

int
bare_far_serve(int fd)
{
    static bare_far_t bare;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    meet(&bare, fd);
    for (uint64_t n = 1;; n++) {
        await(&bare, n);
        if (n == 1) {
            ucx_way_settle(bare.way);
        }
        send_one(&bare);
    }
}

bare_far_t *
bare_far_open(const char *program, uint32_t in, uint32_t out)
{
    bare_far_t *bare = calloc(1, sizeof(*bare));
    char text[16];
    int fds[2];

    bare->in  = in;
    bare->out = out;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) {
        exit(1);
    }
    bare->pid = fork();
    if (bare->pid == 0) {
        snprintf(text, sizeof(text), "%d", fds[1]);
        execl("/proc/self/exe", program, "bare-far", text, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    meet(bare, fds[0]);
    close(fds[0]);
    bare_far_round(bare);
    ucx_way_settle(bare->way);
    return bare;
}

void
bare_far_round(bare_far_t *bare)
{
    uint64_t n = bare->came + 1;

    send_one(bare);
    await(bare, n);
}

void
bare_far_close(bare_far_t *bare)
{
    ucx_way_close(bare->way);
    ucx_port_destroy(bare->port);
    kill(bare->pid, SIGKILL);
    waitpid(bare->pid, NULL, 0);
    free(bare->from);
    free(bare->to);
    free(bare);
}
