/*
 * server.c: the server: its address, its methods, the calls that come in, its end. Its
 * threads are in crew.c, the calls in call.c.
 *
 * The end goes in steps, since a call may start batches for as long as it is open: C core
 * is told to take no more calls; those open have the grace to end, then are cancelled;
 * when the last one is over, which includes its handler, and C core says that its
 * connections are gone, the queue is shut down, and the threads end.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <grpc/grpc_security.h>
#include <grpc/support/string_util.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define THREADS_DEFAULT 16
#define THREADS_MAX 1024
#define CALLS_DEFAULT 4096
#define CALLS_MAX 1000000
#define REQUESTS 64      /* calls that C core may have ready for us at once */
#define REFUSALS_MAX 256 /* calls of a connection that wait to be told that there are too many */
#define METHODS_MAX 256
#define UNARY_SHARE 8 /* one call in so many is kept for unary calls */
#define PEER_SHARE 2  /* by default one connection has at most one call in so many */
#define MEMORY_DEFAULT (UINT64_C(1) << 30)
#define RECEIVE_STALLS 3 /* a message has so many times the limit of a stall to come whole */

#define HANDSHAKE_MS 10000 /* for a new connection to speak HTTP/2 */
#define KEEPALIVE_MS 10000
#define KEEPALIVE_TIMEOUT_MS 5000

/* A place for a call that C core may give us. */
typedef struct slot {
    rpc_op_t op;
    rpc_server_t *server;
    rpc_accepted_t accepted;
} slot_t;

struct rpc_server {
    grpc_server *grpc;
    grpc_completion_queue *queue;
    rpc_crew_t *crew;
    rpc_health_t *health;
    rpc_tls_use_t tls;
    char *address;
    uint16_t port;
    uint32_t calls_max, peer_calls_max, stall_ms;
    rpc_watch_t *watch;
    atomic_uint refs;
    slot_t slots[REQUESTS];
    rpc_entry_t entries[METHODS_MAX];
    uint32_t n_entries;
    rpc_op_t op_shutdown;

    pthread_mutex_t lock;
    pthread_cond_t cond; /* of what rpc_server_stop() waits for */
    uint32_t calls_open;
    rpc_peers_t *peers; /* their calls */
    rpc_server_figures_t figures;
    bool started, stopping, stopped;
    bool shut; /* C core has shut down */
};

/* ---- accepting calls ---- */

static void
request_call(slot_t *slot)
{
    rpc_server_t *server = slot->server;

    grpc_call_details_init(&slot->accepted.details);
    grpc_metadata_array_init(&slot->accepted.metadata);
    RPC_OP_RELEASE(&slot->op);
    grpc_call_error error =
        grpc_server_request_call(server->grpc, &slot->accepted.grpc, &slot->accepted.details,
                                 &slot->accepted.metadata, server->queue, server->queue, &slot->op);
    assert(error == GRPC_CALL_OK || server->stopping);
    (void)error;
}

static rpc_entry_t *
find_entry(rpc_server_t *server, grpc_slice path)
{
    for (uint32_t i = 0; i < server->n_entries; i++) {
        rpc_entry_t *entry = &server->entries[i];
        if (entry->path_size == GRPC_SLICE_LENGTH(path) &&
            memcmp(entry->path, GRPC_SLICE_START_PTR(path), entry->path_size) == 0) {
            return entry;
        }
    }
    return NULL;
}

static bool
is_unix(const char *address)
{
    return strncmp(address, "unix:", 5) == 0;
}

/* Count a call. @return false, with a sentence, if there are too many */
static bool
admit(rpc_server_t *server, const char *peer, bool stream, char sentence[RPC_SENTENCE_MAX])
{
    /* A stream stays for as long as its peer likes. However many are left open, there is room for
     * unary calls, which end by themselves: heartbeats, say. */
    uint32_t most   = server->calls_max - (stream ? server->calls_max / UNARY_SHARE : 0);
    uint32_t own    = server->peer_calls_max;
    bool connection = !is_unix(peer); /* those have no names to tell them apart */

    pthread_mutex_lock(&server->lock);
    bool full       = server->calls_open >= most;
    bool too_greedy = rpc_peers_began(&server->peers, peer) > own && connection;
    server->calls_open++;
    server->figures.calls++;
    server->figures.refused_full += full;
    server->figures.refused_peer += !full && too_greedy;
    pthread_mutex_unlock(&server->lock);
    if (full) {
        snprintf(sentence, RPC_SENTENCE_MAX,
                 "%s has %u calls open, as many as it allows%s: retry later", server->address, most,
                 stream ? " when a stream comes" : "");
    } else if (too_greedy) {
        snprintf(sentence, RPC_SENTENCE_MAX,
                 "%s has %u calls of this connection open, as many as it allows one: end some",
                 server->address, own);
    }
    return !full && !too_greedy;
}

/* As HTTP/2 counts them. C core 1.51 has a limit of its own, which lets single large ones pass. */
static uint64_t
headers_size(const grpc_metadata_array *metadata)
{
    uint64_t size = 0;

    for (size_t i = 0; i < metadata->count; i++) {
        size += 32 + GRPC_SLICE_LENGTH(metadata->metadata[i].key) +
                GRPC_SLICE_LENGTH(metadata->metadata[i].value);
    }
    return size;
}

static void
begin(rpc_server_t *server, rpc_accepted_t *accepted)
{
    uint64_t headers                = headers_size(&accepted->metadata);
    rpc_entry_t *entry              = find_entry(server, accepted->details.method);
    attn_status_t status            = ATTN_OK;
    char sentence[RPC_SENTENCE_MAX] = "";

    accepted->peer = grpc_call_get_peer(accepted->grpc);
    if (!admit(server, accepted->peer, entry != NULL && entry->streaming, sentence)) {
        entry  = NULL;
        status = ATTN_ERR_EXHAUSTED;
    } else if (headers > RPC_METADATA_MAX) {
        entry  = NULL;
        status = ATTN_ERR_TOO_LARGE;
        snprintf(sentence, sizeof(sentence), "the call's headers have %llu bytes: at most %u",
                 (unsigned long long)headers, RPC_METADATA_MAX);
    } else if (entry == NULL) {
        status = ATTN_ERR_UNSUPPORTED;
        pthread_mutex_lock(&server->lock);
        server->figures.refused_unknown++;
        pthread_mutex_unlock(&server->lock);
        snprintf(sentence, sizeof(sentence), "%s has no method %.*s", server->address,
                 (int)attn_min(GRPC_SLICE_LENGTH(accepted->details.method), 256),
                 (const char *)GRPC_SLICE_START_PTR(accepted->details.method));
    }
    atomic_fetch_add(&server->refs, 1);
    rpc_call_begin(server, accepted, entry, status, sentence);
}

static void
on_request(rpc_op_t *op, bool ok)
{
    slot_t *slot            = RPC_OF(slot_t, op, op);
    rpc_accepted_t accepted = slot->accepted;

    if (!ok) { /* the server stops: the slot stays empty */
        grpc_metadata_array_destroy(&accepted.metadata);
        grpc_call_details_destroy(&accepted.details);
        return;
    }
    request_call(slot);
    begin(slot->server, &accepted);
    grpc_call_details_destroy(&accepted.details);
}

void
rpc_server_ready(rpc_server_t *server, rpc_call_t *call)
{
    rpc_crew_ready(server->crew, call);
}

void
rpc_server_call_began(rpc_server_t *server, rpc_call_t *call)
{
    rpc_watch_add(server->watch, call);
}

void
rpc_server_call_ended(rpc_server_t *server, rpc_call_t *call)
{
    rpc_watch_remove(server->watch, call);
    pthread_mutex_lock(&server->lock);
    assert(server->calls_open > 0);
    server->calls_open--;
    rpc_peers_ended(&server->peers, rpc_call_peer(call));
    if (server->calls_open == 0 && server->stopping) {
        pthread_cond_broadcast(&server->cond);
    }
    pthread_mutex_unlock(&server->lock);
}

uint32_t
rpc_server_receive_ms(const rpc_server_t *server)
{
    return RECEIVE_STALLS * server->stall_ms;
}

/* ---- making one ---- */

/* C core unlinks a socket file before it binds, and so would take over the address of a
 * server that runs: a connection that succeeds tells. */
static bool
unix_address_in_use(const char *address)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};

    if (!is_unix(address)) {
        return false;
    }
    const char *path = address + 5;
    if (strncmp(path, "//", 2) == 0) {
        path += 2; /* unix:///absolute */
    }
    if (strlen(path) >= sizeof(to.sun_path)) {
        return false; /* which C core refuses */
    }
    memcpy(to.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return false;
    }
    bool used = connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0;
    close(fd);
    return used;
}

static attn_status_t
bind_address(rpc_server_t *server)
{
    int port = 0;

    if (!unix_address_in_use(server->address)) {
        grpc_server_credentials *credentials = rpc_server_credentials(&server->tls);
        port = grpc_server_add_http2_port(server->grpc, server->address, credentials);
        grpc_server_credentials_release(credentials);
    }
    if (port <= 0) {
        return attn_fail(ATTN_ERR_UNAVAILABLE,
                         "cannot bind %s: it is in use, not allowed, or no address of this machine",
                         server->address);
    }
    server->port = strncmp(server->address, "unix", 4) == 0 ? 0 : (uint16_t)port;
    return ATTN_OK;
}

/*
 * What C core limits for us. Its quota is of all memory for connections and for messages on their
 * way, in particular of those that have come in part, which nobody else sees. Beyond it C core
 * first closes connections without calls, which their clients open again when they need them, and
 * then breaks streams, one of each connection in turn, with RESOURCE_EXHAUSTED.
 */
static grpc_server *
make_core_server(const rpc_server_t *own, uint64_t memory_max)
{
    /* Of a connection. Those of a unix socket are not told apart here, so C core's limit is the one
     * that holds: what is over it waits, while on TCP a few more come to be told. */
    uint32_t streams           = own->peer_calls_max + (is_unix(own->address) ? 0 : REFUSALS_MAX);
    grpc_resource_quota *quota = grpc_resource_quota_create("attn.rpc.server");
    grpc_resource_quota_resize(quota, memory_max);
    grpc_arg memory = {.type          = GRPC_ARG_POINTER,
                       .key           = GRPC_ARG_RESOURCE_QUOTA,
                       .value.pointer = {quota, grpc_resource_quota_arg_vtable()}};
    grpc_arg args[] = {
        memory,
        rpc_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RPC_MESSAGE_MAX),
        rpc_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, RPC_MESSAGE_MAX),
        rpc_arg(GRPC_ARG_MAX_METADATA_SIZE, RPC_METADATA_MAX),
        rpc_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)streams),
        rpc_arg(GRPC_ARG_ALLOW_REUSEPORT, 0), /* a second server on a port is an error */
        rpc_arg(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, HANDSHAKE_MS),
        rpc_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        rpc_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
        rpc_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        rpc_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        /* As many pings as a peer likes. Those that come after C core decided to hang up on their
         * sender, in what was read already, each cost memory with the number of those before them:
         * 1 MiB of them cost gigabytes. */
        rpc_arg(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0),
        /* No compression: tensors do not shrink, and a small message must not grow large. */
        rpc_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1 << GRPC_COMPRESS_NONE),
    };
    grpc_channel_args all = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};

    grpc_server *server = grpc_server_create(&all, NULL);
    grpc_resource_quota_unref(quota);
    return server;
}

attn_status_t
rpc_server_create(const rpc_server_options_t *options, rpc_server_t **server_p)
{
    if (options->address == NULL || options->address[0] == 0) {
        return attn_fail(ATTN_ERR_INVALID, "a server needs an address");
    }
    if (options->threads > THREADS_MAX || options->calls_max > CALLS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "a server of %u threads and %u calls: at most %u and %u",
                         options->threads, options->calls_max, THREADS_MAX, CALLS_MAX);
    }
    if (options->tls != NULL && !rpc_tls_has_own(options->tls)) {
        return attn_fail(ATTN_ERR_INVALID, "a server with TLS needs a certificate and its key");
    }
    rpc_init();
    rpc_server_t *server = gpr_zalloc(sizeof(*server));
    server->address      = gpr_strdup(options->address);
    server->tls.tls      = rpc_tls_ref(options->tls);
    server->calls_max    = options->calls_max == 0 ? CALLS_DEFAULT : options->calls_max;
    server->stall_ms     = options->stall_ms == 0 ? RPC_STALL_MS : options->stall_ms;
    server->peer_calls_max =
        options->peer_calls_max == 0 ? server->calls_max / PEER_SHARE : options->peer_calls_max;
    server->watch = rpc_watch_create(server->stall_ms);
    atomic_init(&server->refs, 1);
    pthread_mutex_init(&server->lock, NULL);
    rpc_cond_init(&server->cond);
    server->grpc =
        make_core_server(server, options->memory_max == 0 ? MEMORY_DEFAULT : options->memory_max);
    server->queue = grpc_completion_queue_create_for_next(NULL);
    server->crew =
        rpc_crew_create(server->queue, options->threads == 0 ? THREADS_DEFAULT : options->threads,
                        options->side_by_side, options->spin_us);
    grpc_server_register_completion_queue(server->grpc, server->queue, NULL);

    attn_status_t status = bind_address(server);
    if (status == ATTN_OK) {
        status = rpc_health_create(server, &server->health);
    }
    if (status != ATTN_OK) {
        rpc_server_destroy(server);
        return status;
    }
    *server_p = server;
    return ATTN_OK;
}

static attn_status_t
check_method(rpc_server_t *server, const rpc_method_t *method)
{
    const char *path = method->path;

    if (path == NULL || path[0] != '/' || strchr(path + 1, '/') == NULL || method->handle == NULL) {
        return attn_fail(ATTN_ERR_INVALID,
                         "method %s: it takes a path /service/Method and a handle",
                         path == NULL ? "(no path)" : path);
    }
    if (method->streaming && method->closed == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "method %s: a stream needs `closed`", path);
    }
    if (find_entry(server, grpc_slice_from_static_string(path)) != NULL) {
        return attn_fail(ATTN_ERR_INVALID, "method %s is there already", path);
    }
    if (server->n_entries == METHODS_MAX || server->started) {
        return attn_fail(ATTN_ERR_INVALID, "method %s: added after the start, or over %u methods",
                         path, METHODS_MAX);
    }
    return ATTN_OK;
}

attn_status_t
rpc_server_add(rpc_server_t *server, const rpc_method_t *methods, uint32_t n, void *service)
{
    for (uint32_t i = 0; i < n; i++) {
        attn_status_t status = check_method(server, &methods[i]);
        if (status != ATTN_OK) {
            return status;
        }
        server->entries[server->n_entries++] = (rpc_entry_t){
            .path      = gpr_strdup(methods[i].path),
            .path_size = (uint32_t)strlen(methods[i].path),
            .streaming = methods[i].streaming,
            .handle    = methods[i].handle,
            .closed    = methods[i].closed,
            .service   = service,
        };
    }
    return ATTN_OK;
}

bool
rpc_server_has_service(const rpc_server_t *server, const char *name, size_t size)
{
    for (uint32_t i = 0; i < server->n_entries; i++) {
        const rpc_entry_t *entry = &server->entries[i];
        if (entry->path_size > size + 1 && memcmp(entry->path + 1, name, size) == 0 &&
            entry->path[size + 1] == '/') {
            return true;
        }
    }
    return false;
}

attn_status_t
rpc_server_start(rpc_server_t *server)
{
    assert(!server->started);
    server->started = true;
    grpc_server_start(server->grpc);
    for (uint32_t i = 0; i < REQUESTS; i++) {
        server->slots[i].op     = (rpc_op_t){on_request};
        server->slots[i].server = server;
        request_call(&server->slots[i]);
    }
    attn_status_t status = rpc_crew_start(server->crew);
    if (status == ATTN_OK) {
        status = rpc_watch_start(server->watch);
    }
    return status == ATTN_OK ? status : attn_fail_in(status, "server %s: ", server->address);
}

uint16_t
rpc_server_port(const rpc_server_t *server)
{
    return server->port;
}

void
rpc_server_describe(rpc_server_t *server, rpc_server_figures_t *figures)
{
    pthread_mutex_lock(&server->lock);
    *figures             = server->figures;
    figures->calls_open  = server->calls_open;
    figures->connections = rpc_peers_count(server->peers);
    pthread_mutex_unlock(&server->lock);
}

void
rpc_server_set_serving(rpc_server_t *server, bool serving)
{
    rpc_health_set(server->health, serving);
}

/* ---- the end ---- */

static void
on_shutdown(rpc_op_t *op, bool ok)
{
    rpc_server_t *server = RPC_OF(rpc_server_t, op_shutdown, op);

    (void)ok;
    pthread_mutex_lock(&server->lock);
    server->shut = true;
    pthread_cond_broadcast(&server->cond);
    pthread_mutex_unlock(&server->lock);
}

/* Wait until no call is open and, if `shut`, C core has shut down. */
static void
wait_ended(rpc_server_t *server, bool shut, uint64_t deadline_ns)
{
    bool in_time = true;

    pthread_mutex_lock(&server->lock);
    while (in_time && (server->calls_open > 0 || (shut && !server->shut))) {
        in_time = rpc_cond_wait(&server->cond, &server->lock, deadline_ns);
    }
    pthread_mutex_unlock(&server->lock);
}

void
rpc_server_stop(rpc_server_t *server, uint32_t grace_ms)
{
    pthread_mutex_lock(&server->lock);
    bool first       = !server->stopping;
    server->stopping = true;
    while (!first && !server->stopped) { /* somebody else is at it */
        rpc_cond_wait(&server->cond, &server->lock, UINT64_MAX);
    }
    pthread_mutex_unlock(&server->lock);
    if (!first) {
        return;
    }
    server->op_shutdown = (rpc_op_t){on_shutdown};
    RPC_OP_RELEASE(&server->op_shutdown);
    grpc_server_shutdown_and_notify(server->grpc, server->queue, &server->op_shutdown);
    if (rpc_crew_at_work(server->crew)) {
        rpc_health_stop(server->health);
        wait_ended(server, false, attn_now_ns() + grace_ms * ATTN_NS_PER_MS);
        grpc_server_cancel_all_calls(server->grpc); /* also one that came in just before */
        wait_ended(server, true, UINT64_MAX);
    } else { /* never started: nobody polls but us */
        grpc_server_cancel_all_calls(server->grpc);
        while (!server->shut && rpc_crew_poll(server->crew)) {
        }
    }
    grpc_completion_queue_shutdown(server->queue);
    rpc_crew_join(server->crew);
    pthread_mutex_lock(&server->lock);
    server->stopped = true;
    pthread_cond_broadcast(&server->cond);
    pthread_mutex_unlock(&server->lock);
}

void
rpc_server_unref(rpc_server_t *server)
{
    if (atomic_fetch_sub(&server->refs, 1) != 1) {
        return;
    }
    rpc_health_destroy(server->health);
    for (uint32_t i = 0; i < server->n_entries; i++) {
        gpr_free(server->entries[i].path);
    }
    pthread_cond_destroy(&server->cond);
    pthread_mutex_destroy(&server->lock);
    rpc_tls_close(server->tls.tls);
    gpr_free(server->address);
    gpr_free(server);
    rpc_shutdown();
}

void
rpc_server_destroy(rpc_server_t *server)
{
    if (server == NULL) {
        return;
    }
    rpc_server_stop(server, 0);
    rpc_watch_destroy(server->watch);
    grpc_server_destroy(server->grpc);
    rpc_crew_destroy(server->crew);
    grpc_completion_queue_destroy(server->queue);
    rpc_server_unref(server);
}
