/* bare.c: see bare.h. */
#include "bench/bare.h"

#include "bench/result.h"
#include "rpc/ucx.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SERVERS_MAX 16u
#define SLAB (UINT64_C(4) << 20)
#define LOOKS 32u /* before others may have the core */

typedef struct server {
    pid_t pid;
    ucx_session_t *session;
    ucx_peer_t *peer;
    uint8_t *at; /* of the slab, from the first slot on */
} server_t;

struct bare {
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    ucx_crew_t *crew;
    server_t servers[SERVERS_MAX];
    uint32_t n, in, out;
    bool yields;
    uint64_t round;
    uint8_t *from, *to;
};

/* What a server is told, and the offer's address and key behind it. */
typedef struct order {
    uint32_t in, out;
    bool yields;
    ucx_offer_t offer;
} order_t;

/* Of a slab: two lines with numbers, then what is asked, then what is answered. */
static _Atomic uint64_t *
number_at(uint8_t *at, bool answer)
{
    return (_Atomic uint64_t *)(void *)(at + (answer ? UCX_LINE : 0));
}

static void
await(_Atomic uint64_t *number, uint64_t value, bool yields)
{
    for (unsigned looks = 0; atomic_load_explicit(number, memory_order_acquire) != value; looks++) {
        __builtin_ia32_pause();
        if (yields && looks % LOOKS == LOOKS - 1) {
            sched_yield();
        }
    }
}

static void
pass(int fd, void *bytes, size_t n, bool out)
{
    if ((out ? write(fd, bytes, n) : read(fd, bytes, n)) != (ssize_t)n) {
        exit(1);
    }
}

/* ---- servers ---- */

static uint8_t *
map(ucx_asks_t *asks, const ucx_offer_t *offer, ucx_peer_t **peer_p)
{
    ucx_place_t place = {.offset = UCX_SLOTS_FROM};

    result_must(ucx_peer_open(asks, offer, peer_p));
    return ucx_place_data(*peer_p, &place);
}

int
bare_serve(int fd)
{
    uint8_t address[4096], key[4096];
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    ucx_peer_t *peer;
    order_t order;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pass(fd, &order, sizeof(order), false);
    pass(fd, address, order.offer.address_size, false);
    pass(fd, key, order.offer.key_size, false);
    order.offer.address = address;
    order.offer.key     = key;
    result_must(rpc_client_create(0, &rpc));
    result_must(ucx_asks_create(rpc, &asks));
    uint8_t *at     = map(asks, &order.offer, &peer);
    uint8_t *answer = calloc(1, order.out);
    uint64_t out_at = 2 * UCX_LINE + (order.in + UCX_LINE - 1) / UCX_LINE * UCX_LINE;
    pass(fd, at, 1, true); /* ready */
    for (uint64_t round = 1;; round++) {
        await(number_at(at, false), round, order.yields);
        ucx_copy(at + out_at, answer, order.out);
        atomic_store_explicit(number_at(at, true), round, memory_order_release);
    }
}

/* ---- the client ---- */

static void
server_start(bare_t *bare, const char *program, server_t *server)
{
    order_t order = {.in = bare->in, .out = bare->out, .yields = bare->yields};
    char text[16];
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) {
        exit(1);
    }
    result_must(ucx_session_open(bare->crew, SLAB, NULL, NULL, &server->session));
    ucx_session_offer(server->session, &order.offer);
    server->at  = map(bare->asks, &order.offer, &server->peer);
    server->pid = fork();
    if (server->pid == 0) {
        snprintf(text, sizeof(text), "%d", fds[1]);
        execl("/proc/self/exe", program, "bare", text, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    pass(fds[0], &order, sizeof(order), true);
    pass(fds[0], (void *)order.offer.address, order.offer.address_size, true);
    pass(fds[0], (void *)order.offer.key, order.offer.key_size, true);
    pass(fds[0], text, 1, false);
    close(fds[0]);
}

bare_t *
bare_open(const char *program, uint32_t n, uint32_t in, uint32_t out, bool yields)
{
    bare_t *bare               = calloc(1, sizeof(*bare));
    ucx_crew_options_t options = {.threads = 1, .memory_max = SERVERS_MAX * SLAB};

    bare->in     = in;
    bare->out    = out;
    bare->yields = yields;
    bare->from   = calloc(1, in);
    bare->to     = calloc(1, out);
    result_must(rpc_client_create(0, &bare->rpc));
    result_must(ucx_asks_create(bare->rpc, &bare->asks));
    result_must(ucx_crew_create(&options, &bare->crew));
    for (; bare->n < n; bare->n++) {
        server_start(bare, program, &bare->servers[bare->n]);
    }
    return bare;
}

void
bare_round(bare_t *bare)
{
    uint64_t out_at = 2 * UCX_LINE + (bare->in + UCX_LINE - 1) / UCX_LINE * UCX_LINE;

    bare->round++;
    for (uint32_t i = 0; i < bare->n; i++) {
        uint8_t *at = bare->servers[i].at;
        ucx_copy(at + 2 * UCX_LINE, bare->from, bare->in);
        atomic_store_explicit(number_at(at, false), bare->round, memory_order_release);
    }
    for (uint32_t i = 0; i < bare->n; i++) {
        uint8_t *at = bare->servers[i].at;
        await(number_at(at, true), bare->round, bare->yields);
        ucx_copy(bare->to, at + out_at, bare->out);
    }
}

void
bare_close(bare_t *bare)
{
    for (uint32_t i = 0; i < bare->n; i++) {
        kill(bare->servers[i].pid, SIGKILL);
        waitpid(bare->servers[i].pid, NULL, 0);
        ucx_peer_close(bare->servers[i].peer);
        ucx_session_close(bare->servers[i].session);
    }
    ucx_crew_destroy(bare->crew);
    rpc_client_destroy(bare->rpc);
    ucx_asks_destroy(bare->asks);
    free(bare->from);
    free(bare->to);
    free(bare);
}
