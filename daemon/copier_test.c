/*
 * copier_test.c: chunks between two workers in one process, over gRPC and through UCX's shared
 * memory: the same tokens, or an error that says why and nothing left behind. A proxy stands
 * between them where bytes are to change, or to stop, on their way over gRPC.
 */
#include "daemon/worker/copier.h"
#include "engine/test_engine.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define N 4000u /* tokens */
#define SHORT 250u
#define CHUNK 3u
#define COPY 9u
#define AMID 300000u /* bytes: less than two parts */

static const uint8_t secret[TICKET_SECRET] = {1, 2, 3};

/* ---- two workers ---- */

/* Of workers that are opened from now on. */
static bool takes_ucx; /* have chunks come through UCX, from where it can be */
static uint64_t lends; /* bytes of a slab; 0: they have no lender */

typedef struct worker {
    world_t w;
    gate_t gate;
    rpc_server_t *server;
    steps_t *steps;
    lender_t *lender;
    copier_t *copier;
    jobs_t *jobs;
    char address[64];
} worker_t;

static void
lender_open(worker_t *worker)
{
    static const steps_ops_t nothing = {.worker = true};
    steps_limits_t limits            = {.part_ms = 3000, .buffer_bytes = UINT64_C(1) << 30};

    worker->steps  = NULL;
    worker->lender = NULL;
    if (lends > 0) {
        OK(steps_create(worker->server, "/attn.v1.Worker", &nothing, NULL, NULL, &limits,
                        &worker->steps));
        OK(lender_create(worker->server, worker->steps,
                         &(lender_options_t){.memory = 4 * lends, .slab_bytes = lends},
                         &worker->lender));
        if (!lender_lends(worker->lender)) { /* no UCX here */
            skip();
        }
    }
}

static void
worker_open_with(worker_t *worker, const uint8_t *its_secret, uint64_t out_max)
{
    attn_geometry_t g = plain_geometry;

    g.page_size    = 16;
    g.layers       = 12; /* a part each: more than are asked for at a time */
    g.chunk_size   = 4096;
    g.region_bytes = 2 * (uint64_t)g.chunk_size * (k_row(&g) + v_row(&g)) * g.layers;
    world_open(&worker->w, &g, 1);
    gate_init(&worker->gate);
    gate_joined(&worker->gate, its_secret, 5);
    OK(jobs_create(2, &worker->jobs));
    OK(rpc_server_create(&(rpc_server_options_t){.address = "127.0.0.1:0"}, &worker->server));
    lender_open(worker);
    OK(copier_create(worker->server,
                     &(copier_options_t){.engine  = worker->w.engine,
                                         .gate    = &worker->gate,
                                         .jobs    = worker->jobs,
                                         .out_max = out_max,
                                         .lender  = worker->lender,
                                         .ucx     = takes_ucx,
                                         .network = ""},
                     &worker->copier));
    OK(rpc_server_start(worker->server));
    snprintf(worker->address, sizeof(worker->address), "127.0.0.1:%u",
             rpc_server_port(worker->server));
}

static void
worker_open(worker_t *worker, const uint8_t *its_secret)
{
    worker_open_with(worker, its_secret, 0);
}

static void
worker_close(worker_t *worker)
{
    rpc_server_stop(worker->server, 0);
    jobs_destroy(worker->jobs);
    rpc_server_destroy(worker->server);
    lender_destroy(worker->lender);
    copier_destroy(worker->copier);
    steps_destroy(worker->steps);
    gate_destroy(&worker->gate);
    world_close(&worker->w);
}

static void
assert_same(const worker_t *a, const worker_t *b, uint32_t length)
{
    uint64_t k = k_row(&a->w.g), v = v_row(&a->w.g);
    uint8_t *there = malloc(k + v), *here = malloc(k + v);

    for (uint32_t l = 0; l < a->w.g.layers; l++) {
        for (uint32_t t = 0; t < length; t++) {
            engine_export_t what = {.cache      = a->w.cache,
                                    .chunk      = CHUNK,
                                    .generation = 1,
                                    .layer      = l,
                                    .first      = t,
                                    .n          = 1};
            OK(engine_chunk_export(a->w.engine, &what, there, there + k, k, v));
            what.chunk = COPY;
            OK(engine_chunk_export(b->w.engine, &what, here, here + k, k, v));
            assert_memory_equal(there, here, k + v);
        }
    }
    free(there);
    free(here);
}

static attn_status_t
copy_for(worker_t *to, const char *source, uint32_t first, uint32_t length,
         const copier_asker_t *asker)
{
    uint64_t bytes;
    engine_copy_t what   = {.cache      = to->w.cache,
                            .chunk      = CHUNK,
                            .generation = 1,
                            .copy       = COPY,
                            .first      = first,
                            .length     = length};
    attn_status_t status = copier_copy(to->copier, 2, source, &what, asker, &bytes);

    if (status == ATTN_OK) {
        assert_int_equal(bytes, (length - first) * engine_kv_row_bytes(&to->w.g) * to->w.g.layers);
    }
    OK(engine_check(to->w.engine));
    return status;
}

static attn_status_t
copy(worker_t *to, const char *source, uint32_t first, uint32_t length, uint64_t within_ms)
{
    return copy_for(to, source, first, length,
                    &(copier_asker_t){.deadline_ns = attn_now_ns() + within_ms * ATTN_NS_PER_MS});
}

static void
assert_empty(worker_t *worker)
{
    engine_info_t info;

    engine_describe(worker->w.engine, &info);
    assert_int_equal(info.chunks, 0);
    assert_int_equal(info.used_bytes, 0);
}

/* ---- a proxy ---- */

typedef struct proxy {
    pthread_t thread;
    int listener;
    uint16_t to;
    char address[64];
    uint64_t flip;                  /* this byte of what the source sends is changed; 0: none */
    uint64_t stop;                  /* nothing is passed on after so many; 0: all is */
    void (*amid)(worker_t *worker); /* called once, after a first part, and NULL then */
    worker_t *worker;
    atomic_bool over;
} proxy_t;

/* @return bytes passed on, or 0: one side is gone */
static size_t
pass(int from, int to, proxy_t *p, uint64_t *sent)
{
    uint8_t bytes[65536];
    ssize_t n = recv(from, bytes, sizeof(bytes), 0);

    if (n <= 0) {
        return 0;
    }
    if (sent != NULL) {
        if (p->flip >= *sent && p->flip < *sent + (uint64_t)n && p->flip > 0) {
            bytes[p->flip - *sent] ^= 0x10;
        }
        *sent += (uint64_t)n;
        if (*sent > AMID && p->amid != NULL) {
            void (*amid)(worker_t *) = p->amid;
            p->amid                  = NULL;
            amid(p->worker);
        }
        if (p->stop > 0 && *sent > p->stop) {
            return 1; /* swallowed */
        }
    }
    for (ssize_t done = 0, m; done < n; done += m) {
        m = send(to, bytes + done, (size_t)(n - done), MSG_NOSIGNAL);
        if (m <= 0) {
            return 0;
        }
    }
    return (size_t)n;
}

static void *
proxy_thread(void *arg)
{
    proxy_t *p                = arg;
    struct sockaddr_in target = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(p->to)};
    struct pollfd wait = {.fd = p->listener, .events = POLLIN};

    while (!atomic_load(&p->over)) {
        if (poll(&wait, 1, 20) <= 0) {
            continue;
        }
        uint64_t sent = 0;
        bool good     = true;
        int client = accept(p->listener, NULL, NULL), source = socket(AF_INET, SOCK_STREAM, 0);
        connect(source, (struct sockaddr *)&target, sizeof(target));
        while (good && !atomic_load(&p->over)) {
            struct pollfd both[2] = {{.fd = client, .events = POLLIN},
                                     {.fd = source, .events = POLLIN}};
            if (poll(both, 2, 20) > 0) {
                good = (both[0].revents == 0 || pass(client, source, p, NULL) > 0) &&
                       (both[1].revents == 0 || pass(source, client, p, &sent) > 0);
            }
        }
        close(client);
        close(source);
    }
    return NULL;
}

static void
proxy_open(proxy_t *p, const worker_t *to, uint64_t flip, uint64_t stop)
{
    struct sockaddr_in self = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size          = sizeof(self);

    *p = (proxy_t){.listener = socket(AF_INET, SOCK_STREAM, 0),
                   .to       = rpc_server_port(to->server),
                   .flip     = flip,
                   .stop     = stop};
    assert_int_equal(bind(p->listener, (struct sockaddr *)&self, sizeof(self)), 0);
    assert_int_equal(listen(p->listener, 16), 0);
    getsockname(p->listener, (struct sockaddr *)&self, &size);
    snprintf(p->address, sizeof(p->address), "127.0.0.1:%u", ntohs(self.sin_port));
    assert_int_equal(pthread_create(&p->thread, NULL, proxy_thread, p), 0);
}

static void
proxy_close(proxy_t *p)
{
    atomic_store(&p->over, true);
    pthread_join(p->thread, NULL);
    close(p->listener);
}

/* ---- tests ---- */

static void
test_a_chunk_comes_as_it_is(void **state)
{
    static worker_t a, b;
    copier_figures_t in, out;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    OK(copy(&b, a.address, 0, N - 100, 20000));
    OK(copy(&b, a.address, N - 100, N, 20000)); /* and what was added meanwhile */
    assert_same(&a, &b, N);
    copier_describe(b.copier, &in);
    copier_describe(a.copier, &out);
    assert_int_equal(in.chunks_in, 2);
    assert_int_equal(in.bytes_in, N * engine_kv_row_bytes(&a.w.g) * a.w.g.layers);
    assert_int_equal(out.bytes_out, in.bytes_in);
    assert_int_equal(in.failed + in.corrupt, 0);
    assert_int_equal(in.bytes_in_ucx, takes_ucx ? in.bytes_in : 0);
    worker_close(&a);
    worker_close(&b);
}

static void
test_what_the_source_refuses_is_told(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_NOT_FOUND);
    assert_non_null(strstr(attn_last_error(), a.address));
    OK(grow(&a.w, CHUNK, 0, 0, N));
    assert_int_equal(copy(&b, a.address, 0, N + 1, 20000), ATTN_ERR_INVALID);
    assert_int_equal(copy(&b, "127.0.0.1:1", 0, N, 20000), ATTN_ERR_UNAVAILABLE);
    assert_int_equal(copy(&b, "", 0, N, 20000), ATTN_ERR_INVALID);
    assert_int_equal(
        copy(&b, "123456789012345678901234567890123456789012345678901234567890:7071", 0, N, 20000),
        ATTN_ERR_INVALID);
    assert_empty(&b);
    worker_close(&a);
    worker_close(&b);
}

/* Workers of two coordinators have nothing to say to each other. */
static void
test_strangers_are_let_in_nowhere(void **state)
{
    static const uint8_t other[TICKET_SECRET] = {4};
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, other);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_DENIED);
    assert_empty(&b);
    gate_destroy(&b.gate);
    gate_init(&b.gate); /* one that has not joined has no ticket to show */
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_UNAVAILABLE);
    worker_close(&a);
    worker_close(&b);
}

/*
 * A byte in the middle of what the source sends. It is one of k or v but for the few of HTTP/2's
 * own, where the connection breaks instead: so some tries, of which none may succeed.
 */
static void
test_a_byte_that_changes_on_its_way_is_found(void **state)
{
    static worker_t a, b;
    attn_status_t status = ATTN_ERR_UNAVAILABLE;
    copier_figures_t figures;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    for (uint32_t i = 0; i < 20 && status != ATTN_ERR_CORRUPT; i++) {
        proxy_t proxy;
        proxy_open(&proxy, &a, 300000 + 12347 * i, 0);
        status = copy(&b, proxy.address, 0, N, 20000);
        assert_int_not_equal(status, ATTN_OK);
        assert_empty(&b);
        if (status == ATTN_ERR_CORRUPT) {
            assert_non_null(strstr(attn_last_error(), proxy.address));
            assert_non_null(strstr(attn_last_error(), "chunk 3, layer "));
        }
        proxy_close(&proxy);
    }
    assert_int_equal(status, ATTN_ERR_CORRUPT);
    copier_describe(b.copier, &figures);
    assert_int_equal(figures.corrupt, 1);
    assert_true(figures.failed >= 1);
    OK(copy(&b, a.address, 0, N, 20000));
    assert_same(&a, &b, N);
    worker_close(&a);
    worker_close(&b);
}

/* A source that stops in the middle of a part: within the deadline, and before it. */
static void
test_a_source_that_stops_is_given_up(void **state)
{
    static worker_t a, b;
    proxy_t proxy;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    proxy_open(&proxy, &a, 0, 500000);
    uint64_t start = attn_now_ns();
    assert_int_equal(copy(&b, proxy.address, 0, N, 300), ATTN_ERR_DEADLINE);
    assert_true(attn_now_ns() - start >= 300 * ATTN_NS_PER_MS);
    assert_empty(&b);
    proxy_close(&proxy);

    proxy_open(&proxy, &a, 0, 500000);
    start = attn_now_ns();
    assert_int_equal(copy(&b, proxy.address, 0, N, 600000), ATTN_ERR_DEADLINE);
    assert_true(attn_now_ns() - start >= COPIER_STALL_MS * ATTN_NS_PER_MS);
    assert_empty(&b);
    proxy_close(&proxy);
    worker_close(&a);
    worker_close(&b);
}

/* Have this done when some parts have come. */
static attn_status_t
copy_and(worker_t *from, worker_t *to, void (*amid)(worker_t *), worker_t *whom, uint64_t stop)
{
    proxy_t proxy;

    proxy_open(&proxy, from, 0, stop);
    proxy.worker         = whom;
    proxy.amid           = amid; /* nothing is passed on before the copy */
    attn_status_t status = copy(to, proxy.address, 0, N, 600000);
    assert_null(proxy.amid);
    proxy_close(&proxy);
    return status;
}

static void
end_streams(worker_t *worker)
{
    copier_drain(worker->copier);
    copier_end_streams(worker->copier);
}

static void
test_a_source_that_ends_amid_leaves_nothing(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    assert_int_equal(copy_and(&a, &b, end_streams, &a, 0), ATTN_ERR_CANCELLED);
    assert_non_null(strstr(attn_last_error(), "draining"));
    assert_empty(&b);
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_CANCELLED); /* no new one either */
    worker_close(&a);
    worker_close(&b);
}

static void
drain(worker_t *worker)
{
    copier_drain(worker->copier);
}

/* One that goes down takes no chunks with it, and does not wait for those that were coming. */
static void
test_who_drains_gives_its_copies_up(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    uint64_t start = attn_now_ns();
    assert_int_equal(copy_and(&a, &b, drain, &b, AMID), ATTN_ERR_UNAVAILABLE);
    assert_true(attn_now_ns() - start < COPIER_STALL_MS * ATTN_NS_PER_MS); /* it is woken */
    assert_empty(&b);
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_UNAVAILABLE);
    assert_non_null(strstr(attn_last_error(), "draining"));
    worker_close(&a);
    worker_close(&b);
}

static void
let_time_pass(worker_t *worker)
{
    gate_period(&worker->gate, 8);
}

/* The ticket that a copy was begun with is too old before its last part. */
static void
test_a_copy_may_take_longer_than_its_ticket(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    OK(copy_and(&a, &b, let_time_pass, &a, 0));
    assert_same(&a, &b, N);
    worker_close(&b);
    worker_open(&b, secret); /* a stream that is opened only now is refused */
    assert_int_equal(copy(&b, a.address, 0, N, 20000), ATTN_ERR_DENIED);
    gate_period(&b.gate, 8);
    OK(copy(&b, a.address, 0, N, 20000));
    worker_close(&a);
    worker_close(&b);
}

static bool
is_gone(const void *arg)
{
    copier_figures_t figures;

    copier_describe(((const worker_t *)arg)->copier, &figures);
    return figures.parts_out > 0;
}

static void
test_a_copy_that_nobody_wants_any_more_ends(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    assert_int_equal(
        copy_for(&b, a.address, 0, N,
                 &(copier_asker_t){.deadline_ns = UINT64_MAX, .gone = is_gone, .arg = &a}),
        ATTN_ERR_CANCELLED);
    assert_empty(&b);
    worker_close(&a);
    worker_close(&b);
}

/* A source that has room for two parts at a time. */
static void
test_parts_wait_for_room(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open_with(&a, secret, 2 * N * engine_kv_row_bytes(&plain_geometry));
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    for (uint32_t i = 0; i < 3; i++) {
        OK(copy(&b, a.address, 0, N, 20000));
        assert_same(&a, &b, N);
        worker_close(&b);
        worker_open(&b, secret);
    }
    worker_close(&a);
    worker_close(&b);
}

/* Workers come back with other addresses for as long as this one lives. */
static void
test_addresses_do_not_add_up(void **state)
{
    static worker_t a, b;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    for (uint32_t i = 0; i < 1100; i++) {
        char address[64];
        snprintf(address, sizeof(address), "127.1.%u.%u:1", i / 200, 1 + i % 200);
        assert_int_equal(copy(&b, address, 0, N, 20000), ATTN_ERR_UNAVAILABLE);
    }
    OK(copy(&b, a.address, 0, N, 20000));
    worker_close(&a);
    worker_close(&b);
}

/* ---- through UCX ---- */

static int
with_ucx(void **state)
{
    (void)state;
    takes_ucx = true;
    lends     = UINT64_C(32) << 20;
    return 0;
}

static int
without_ucx(void **state)
{
    (void)state;
    takes_ucx = false;
    lends     = 0;
    return 0;
}

static uint64_t
came_through_ucx(worker_t *worker)
{
    copier_figures_t figures;

    copier_describe(worker->copier, &figures);
    return figures.bytes_in_ucx;
}

/* Whoever lacks it, and where a part has no room: parts come over the stream. */
static void
test_without_ucx_on_one_side_chunks_come_over_grpc(void **state)
{
    static worker_t a, b;

    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        lends     = i == 0 ? 0 : i == 1 ? UCX_SLAB_MIN : UINT64_C(32) << 20;
        takes_ucx = true;
        worker_open(&a, secret);
        takes_ucx = i != 2;
        worker_open(&b, secret);
        OK(grow(&a.w, CHUNK, 0, 0, N));
        OK(copy(&b, a.address, 0, N, 20000));
        assert_same(&a, &b, N);
        assert_int_equal(came_through_ucx(&b), 0);
        worker_close(&a);
        worker_close(&b);
    }
}

typedef struct amid {
    worker_t *source;
    void (*act)(worker_t *);
    worker_t *whom;
} amid_t;

/* It is asked about for each part. */
static bool
act_amid(const void *arg)
{
    amid_t *amid = (amid_t *)(uintptr_t)arg;
    copier_figures_t figures;

    copier_describe(amid->source->copier, &figures);
    if (figures.parts_out > 4 && amid->act != NULL) {
        amid->act(amid->whom);
        amid->act = NULL;
    }
    return false;
}

/* Either side gives up amid, and nothing is left; and whoever stays copies again. */
static void
test_copies_in_slots_end_with_either_side(void **state)
{
    static worker_t a, b;

    (void)state;
    for (uint32_t i = 0; i < 2; i++) {
        worker_open(&a, secret);
        worker_open(&b, secret);
        OK(grow(&a.w, CHUNK, 0, 0, N));
        amid_t amid = {.source = &a, .act = i == 0 ? end_streams : drain, .whom = i == 0 ? &a : &b};
        copier_asker_t asker = {
            .deadline_ns = attn_now_ns() + 20000 * ATTN_NS_PER_MS, .gone = act_amid, .arg = &amid};
        uint64_t start = attn_now_ns();
        assert_int_equal(copy_for(&b, a.address, 0, N, &asker),
                         i == 0 ? ATTN_ERR_CANCELLED : ATTN_ERR_UNAVAILABLE);
        assert_non_null(strstr(attn_last_error(), "draining"));
        assert_true(attn_now_ns() - start < COPIER_STALL_MS * ATTN_NS_PER_MS);
        assert_empty(&b);
        worker_t *gone = i == 0 ? &a : &b;
        worker_close(gone);
        worker_open(gone, secret);
        if (i == 0) {
            OK(grow(&a.w, CHUNK, 0, 0, N));
        }
        OK(copy(&b, a.address, 0, N, 20000));
        assert_same(&a, &b, N);
        assert_true(came_through_ucx(&b) > 0);
        worker_close(&a);
        worker_close(&b);
    }
}

typedef struct patience {
    worker_t *source;
    uint64_t parts;
} patience_t;

static bool
is_enough(const void *arg)
{
    const patience_t *patience = arg;
    copier_figures_t figures;

    copier_describe(patience->source->copier, &figures);
    return figures.parts_out >= patience->parts;
}

/* A copy that is given up may be answered still: its memory is nobody's after it. */
static void
test_a_copy_given_up_amid_spoils_no_other(void **state)
{
    static worker_t a, b;
    copier_figures_t out;

    (void)state;
#ifdef __SANITIZE_THREAD__
    skip(); /* it knows nothing of shmdt(), and so takes one slab for another at its address */
#endif
    worker_open(&a, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    for (uint32_t i = 0; i < 8; i++) {
        worker_open(&b, secret);
        copier_describe(a.copier, &out);
        patience_t patience  = {.source = &a, .parts = out.parts_out + 1 + i};
        copier_asker_t asker = {.deadline_ns = UINT64_MAX, .gone = is_enough, .arg = &patience};
        assert_int_equal(copy_for(&b, a.address, 0, N, &asker), ATTN_ERR_CANCELLED);
        assert_empty(&b);
        OK(copy(&b, a.address, 0, N, 20000));
        assert_same(&a, &b, N);
        assert_int_equal(came_through_ucx(&b), N * engine_kv_row_bytes(&a.w.g) * a.w.g.layers);
        worker_close(&b);
    }
    worker_close(&a);
}

/* The slab as somebody here has it mapped. */
static uint8_t *
find_slab(void)
{
    FILE *maps      = fopen("/proc/self/maps", "re");
    uint8_t *found  = NULL;
    uintptr_t start = 0;
    char line[512], name[8];

    assert_non_null(maps);
    while (found == NULL && fgets(line, sizeof(line), maps) != NULL) {
        if (sscanf(line, "%" SCNxPTR "-%*x rw%*s %*s %*s %*s %5s", &start, name) == 2 &&
            strcmp(name, "/SYSV") == 0 && memcmp((const void *)start, "attxsl01", 8) == 0) {
            found = (uint8_t *)start;
        }
    }
    fclose(maps);
    return found;
}

/* Called when the first part is there, and is not looked at yet: it changes a byte of it. */
static bool
flip(const void *arg)
{
    uint32_t *calls   = (uint32_t *)(uintptr_t)arg;
    ucx_place_t place = {.offset = UCX_SLOTS_FROM, .in = 16};

    if (++*calls == 3) { /* before the copy, and when the slots were open */
        uint8_t *slab = find_slab();
        assert_non_null(slab);
        slab[ucx_place_out(&place) + UCX_LINE + 1000] ^= 0x10;
    }
    return false;
}

static void
test_a_byte_that_changes_in_a_slot_is_found(void **state)
{
    static worker_t a, b;
    uint32_t calls       = 0;
    copier_asker_t asker = {.deadline_ns = UINT64_MAX, .gone = flip, .arg = &calls};

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    assert_int_equal(copy_for(&b, a.address, 0, N, &asker), ATTN_ERR_CORRUPT);
    assert_non_null(strstr(attn_last_error(), "chunk 3, layer 0, "));
    assert_empty(&b);
    OK(copy(&b, a.address, 0, N, 20000));
    assert_same(&a, &b, N);
    worker_close(&a);
    worker_close(&b);
}

/* ---- several, and none ---- */

typedef struct copying {
    pthread_t thread;
    worker_t *from, *to;
    uint64_t copy;
    attn_status_t status;
} copying_t;

static void *
copy_one(void *arg)
{
    copying_t *one       = arg;
    engine_copy_t what   = {.cache      = one->to->w.cache,
                            .chunk      = CHUNK,
                            .generation = 1,
                            .copy       = one->copy,
                            .length     = SHORT};
    copier_asker_t asker = {.deadline_ns = attn_now_ns() + 20000 * ATTN_NS_PER_MS};
    uint64_t bytes;

    one->status = copier_copy(one->to->copier, 2, one->from->address, &what, &asker, &bytes);
    return NULL;
}

/* They share a slab, and each has places of its own in it. */
static void
test_copies_at_once_have_slots_each(void **state)
{
    static worker_t a, b;
    copying_t all[COPIER_COPIES_MAX];

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t i = 0; i < COPIER_COPIES_MAX; i++) {
            bool last = round == 3 && i == 0;
            all[i]    = (copying_t){
                   .from = &a, .to = &b, .copy = last ? COPY : 100 + COPIER_COPIES_MAX * round + i};
            assert_int_equal(pthread_create(&all[i].thread, NULL, copy_one, &all[i]), 0);
        }
        for (uint32_t i = 0; i < COPIER_COPIES_MAX; i++) {
            pthread_join(all[i].thread, NULL);
            OK(all[i].status);
        }
    }
    assert_same(&a, &b, SHORT);
    assert_int_equal(came_through_ucx(&b), 16 * SHORT * engine_kv_row_bytes(&a.w.g) * a.w.g.layers);
    worker_close(&a);
    worker_close(&b);
}

/* What a source lends, and nobody needs for a while, is its own again. */
static void
test_idle_copiers_hold_no_slab(void **state)
{
    static worker_t a, b;
    ucx_figures_t near, far;

    (void)state;
    worker_open(&a, secret);
    worker_open(&b, secret);
    OK(grow(&a.w, CHUNK, 0, 0, N));
    OK(copy(&b, a.address, 0, N - 100, 20000));
    copier_tick(b.copier, attn_now_ns());
    lender_describe(a.lender, &near, &far);
    assert_int_equal(near.sessions, 1);
    assert_int_equal(near.slots, 0);
    copier_tick(b.copier, attn_now_ns() + 60000 * ATTN_NS_PER_MS);
    for (uint32_t i = 0; i < 2000 && near.sessions > 0; i++) {
        usleep(5000);
        lender_describe(a.lender, &near, &far);
    }
    assert_int_equal(near.sessions, 0);
    assert_int_equal(near.slab_bytes, 0);
    OK(copy(&b, a.address, N - 100, N, 20000));
    assert_same(&a, &b, N);
    assert_int_equal(came_through_ucx(&b), N * engine_kv_row_bytes(&a.w.g) * a.w.g.layers);
    worker_close(&a);
    worker_close(&b);
}

#define UCX(test)                                                                                  \
    {                                                                                              \
        "ucx " #test, test, with_ucx, without_ucx, NULL                                            \
    }

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_chunk_comes_as_it_is),
        cmocka_unit_test(test_what_the_source_refuses_is_told),
        cmocka_unit_test(test_strangers_are_let_in_nowhere),
        cmocka_unit_test(test_a_byte_that_changes_on_its_way_is_found),
        cmocka_unit_test(test_a_source_that_stops_is_given_up),
        cmocka_unit_test(test_a_source_that_ends_amid_leaves_nothing),
        cmocka_unit_test(test_who_drains_gives_its_copies_up),
        cmocka_unit_test(test_a_copy_may_take_longer_than_its_ticket),
        cmocka_unit_test(test_a_copy_that_nobody_wants_any_more_ends),
        cmocka_unit_test(test_parts_wait_for_room),
        cmocka_unit_test(test_addresses_do_not_add_up),
        UCX(test_a_chunk_comes_as_it_is),
        UCX(test_what_the_source_refuses_is_told),
        UCX(test_strangers_are_let_in_nowhere),
        UCX(test_a_copy_that_nobody_wants_any_more_ends),
        UCX(test_without_ucx_on_one_side_chunks_come_over_grpc),
        UCX(test_copies_in_slots_end_with_either_side),
        UCX(test_a_copy_given_up_amid_spoils_no_other),
        UCX(test_a_byte_that_changes_in_a_slot_is_found),
        UCX(test_copies_at_once_have_slots_each),
        UCX(test_idle_copiers_hold_no_slab),
    };
    rpc_init();
    int failed = cmocka_run_group_tests_name("copier", tests, NULL, NULL);
    rpc_shutdown();
    return failed;
}
