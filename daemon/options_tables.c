#include "daemon/options_tables.h"

#include "base/status.h"
#include "client/slab_card.h"
#include "kernels/kernels.h"
#include "kernels/memory.h"

#include <stdlib.h>
#include <string.h>

#define TIB (UINT64_C(1) << 40)

/* In the order of attn_log_level_t. */
static const char *const transports[] = {"auto", "grpc", "ucx", NULL};
static const char *const log_levels[] = {"debug", "info", "warn", "error", NULL};

static const char *const sections[] = {"coordinator", "worker", "dev", NULL};

/* All three files, or none; without them, leaving the machine takes a word. */
static attn_status_t
check_tls(const tls_options_t *tls, const char *option, const char *address)
{
    unsigned files = (tls->cert[0] != 0) + (tls->key[0] != 0) + (tls->ca[0] != 0);

    if (files != 0 && files != 3) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%s is missing: TLS takes --tls-cert, --tls-key and --tls-ca together",
                         tls->cert[0] == 0  ? "--tls-cert"
                         : tls->key[0] == 0 ? "--tls-key"
                                            : "--tls-ca");
    }
    if (files == 3 || tls->allow_plaintext || options_address_is_loopback(address)) {
        return ATTN_OK;
    }
    return attn_fail(ATTN_ERR_INVALID,
                     "%s %s reaches beyond this machine, and there are no certificates: name them "
                     "with --tls-cert, --tls-key and --tls-ca, or stay on 127.0.0.1, or say "
                     "--allow-plaintext",
                     option, address);
}

static attn_status_t
check_metrics(const tls_options_t *tls, const char *address)
{
    return address[0] == '\0' ? ATTN_OK : check_tls(tls, "--metrics-listen", address);
}

#define METRICS_ROW(type, text)                                                                    \
    {                                                                                              \
        .name = "metrics-listen", .kind = OPTION_ADDRESS, OPTION_FIELD(type, metrics_listen),      \
        .initial = "", .help = text                                                                \
    }

#define METRICS_TEXT                                                                               \
    "Where to serve, over HTTP, /metrics for Prometheus, /healthz, and a status page. With "       \
    "certificates it is HTTPS. Port 0 takes a free port, which the log tells. Empty: nowhere."

#define LOG_LEVEL_ROW(type)                                                                        \
    {                                                                                              \
        .name = "log-level", .kind = OPTION_CHOICE, OPTION_FIELD(type, log_level),                 \
        .initial = "info", .choices = log_levels, .value_name = "LEVEL",                           \
        .help = "Events below this level are not logged. Logs go to stderr, one line an event, "   \
                "as key=value pairs.",                                                             \
    }

/* Certificates: the same of all commands. */
#define TLS_ROWS(type)                                                                              \
    {                                                                                               \
        .name = "tls-cert",                                                                         \
        .kind = OPTION_TEXT,                                                                        \
        OPTION_FIELD(type, tls.cert),                                                               \
        .initial    = "",                                                                           \
        .value_name = "FILE",                                                                       \
        .help = "This daemon's certificate, in PEM, with what leads up to the CA. Its names are "   \
                "those that others reach it by. With it goes TLS on every port. Files that "        \
                "change are read again, and on SIGHUP. Empty: plaintext.",                          \
    },                                                                                              \
        {                                                                                           \
            .name = "tls-key",                                                                      \
            .kind = OPTION_TEXT,                                                                    \
            OPTION_FIELD(type, tls.key),                                                            \
            .initial    = "",                                                                       \
            .value_name = "FILE",                                                                   \
            .help       = "The key of tls-cert, in PEM, without a passphrase.",                     \
        },                                                                                          \
        {                                                                                           \
            .name = "tls-ca",                                                                       \
            .kind = OPTION_TEXT,                                                                    \
            OPTION_FIELD(type, tls.ca),                                                             \
            .initial    = "",                                                                       \
            .value_name = "FILE",                                                                   \
            .help       = "The CA certificates, in PEM, that the certificates of others must come " \
                          "from: of the daemons that this one connects to, and of its clients.",    \
        },                                                                                          \
        {                                                                                           \
            .name = "tls-client-certs",                                                             \
            .kind = OPTION_SWITCH,                                                                  \
            OPTION_FIELD(type, tls.client_certs),                                                   \
            .initial = "yes",                                                                       \
            .help = "Clients must present a certificate of tls-ca (mutual TLS). Without, whoever "  \
                    "reaches the port is a client.",                                                \
        },                                                                                          \
    {                                                                                               \
        .name = "allow-plaintext", .kind = OPTION_SWITCH, OPTION_FIELD(type, tls.allow_plaintext),  \
        .initial = "no",                                                                            \
        .help    = "Without certificates, allow addresses that other machines reach. Nothing is "   \
                   "encrypted then, and whoever reaches a port can read and change everything.",    \
    }

/* What a server allows its peers. */
#define PEER_ROWS(type)                                                                             \
    {                                                                                               \
        .name = "stall-ms",                                                                         \
        .kind = OPTION_MS,                                                                          \
        OPTION_FIELD(type, stall_ms),                                                               \
        .initial = "10000",                                                                         \
        .least   = 50,                                                                              \
        .most    = 600000,                                                                          \
        .help    = "A peer that takes none of what it was answered for so long, or three times as " \
                   "long to send the rest of a message, is cut off.",                               \
    },                                                                                              \
        {                                                                                           \
            .name = "message-memory",                                                               \
            .kind = OPTION_BYTES,                                                                   \
            OPTION_FIELD(type, message_memory),                                                     \
            .initial = "1GiB",                                                                      \
            .least   = 32 << 20,                                                                    \
            .most    = 64 * TIB,                                                                    \
            .help =                                                                                 \
                "Memory for connections and for messages that have come in part. Beyond it idle "   \
                "connections are closed, and then calls broken with RESOURCE_EXHAUSTED.",           \
        },                                                                                          \
    {                                                                                               \
        .name = "run-memory", .kind = OPTION_BYTES, OPTION_FIELD(type, run_memory),                 \
        .initial = "4GiB", .least = 1 << 20, .most = 64 * TIB,                                      \
        .help = "Memory for the tensors of runs, in and out. Beyond it runs are refused: retry "    \
                "later.",                                                                           \
    }

#define DEVICE_ROW(type, text)                                                                     \
    {                                                                                              \
        .name = "device", .kind = OPTION_TEXT, OPTION_FIELD(type, device), .initial = "cpu",       \
        .value_name = "DEVICE", .help = text                                                       \
    }

#define SLAB_LEAST (UINT64_C(1) << 20)

/* Is it the name of a device, whether or not this machine has it? And 0 or enough of a slab? */
static attn_status_t
check_device(const char *device, uint64_t slab)
{
    const attn_backend_ops_t *ops;
    uint32_t ordinal;
    attn_status_t status = attn_backend_parse(device, &ops, &ordinal);

    if (status != ATTN_OK) {
        return attn_fail_in(ATTN_ERR_INVALID, "--device: ");
    }
    return slab == 0 || slab >= SLAB_LEAST
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "--slab is %llu bytes: 0, or from 1MiB",
                           (unsigned long long)slab);
}

#define JOIN_ROW(type, text)                                                                       \
    {                                                                                              \
        .name = "join-secret-file", .kind = OPTION_TEXT, OPTION_FIELD(type, join_secret_file),     \
        .initial = "", .value_name = "FILE", .help = text,                                         \
    }

/* ---- worker ---- */

/* A worker whose slabs are larger than all of its memory for them would lend none, and not say so.
 */
static attn_status_t
check_ucx(const worker_options_t *options)
{
    bool gpu = strncmp(options->device, "cpu", 3) != 0;

    if (options->ucx_memory == 0) {
        return ATTN_OK;
    }
    if (options->ucx_slab > options->ucx_memory) {
        return attn_fail(ATTN_ERR_INVALID,
                         "--ucx-slab is %llu bytes, for one client, and --ucx-memory %llu, for all "
                         "of them: make it as much at least, or 0 to lend none",
                         (unsigned long long)options->ucx_slab,
                         (unsigned long long)options->ucx_memory);
    }
    uint64_t lent = attn_shared_takes(slab_lane_at(options->ucx_slab, SLAB_LANES));
    if (gpu && options->gpu_lend > 0 && lent > options->gpu_lend) {
        return attn_fail(ATTN_ERR_INVALID,
                         "--ucx-slab is %llu bytes, for one client, of which a GPU lends %llu, and "
                         "--gpu-lend %llu, for all of them: make it as much at least, or 0 to lend "
                         "none",
                         (unsigned long long)options->ucx_slab, (unsigned long long)lent,
                         (unsigned long long)options->gpu_lend);
    }
    return ATTN_OK;
}

/* Messages of UCX's are not encrypted, and its ports take them from anybody. */
static attn_status_t
check_ucx_net(const worker_options_t *options)
{
    bool secured = options->tls.cert[0] != '\0';

    if (options->ucx_net[0] == '\0' || strcmp(options->ucx_net, "lo") == 0) {
        return ATTN_OK;
    }
    if (secured && !options->ucx_net_plaintext) {
        return attn_fail(ATTN_ERR_INVALID,
                         "--ucx-net %s would send q, k, v and answers in clear beside the "
                         "encrypted ports: say --ucx-net-plaintext if that network is trusted, or "
                         "leave it out",
                         options->ucx_net);
    }
    return secured || options->ucx_net_plaintext || options->tls.allow_plaintext
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "--ucx-net %s reaches beyond this machine, and is not encrypted: say "
                           "--ucx-net-plaintext if that network is trusted, or leave it out",
                           options->ucx_net);
}

static attn_status_t
worker_check(const void *values)
{
    const worker_options_t *options = values;

    attn_status_t status = check_device(options->device, options->slab);
    if (status == ATTN_OK) {
        status = check_ucx(options);
    }
    if (status == ATTN_OK) {
        status = check_ucx_net(options);
    }
    if (status == ATTN_OK) {
        status = check_tls(&options->tls, "--listen", options->listen);
    }
    if (status == ATTN_OK) {
        status = check_tls(&options->tls, "--coordinator", options->coordinator);
    }
    return status == ATTN_OK ? check_metrics(&options->tls, options->metrics_listen) : status;
}

static const option_t worker_table[] = {
    {.name = "listen",
     .kind = OPTION_ADDRESS,
     OPTION_FIELD(worker_options_t, listen),
     .initial = "127.0.0.1:0",
     .help = "Where to serve the Worker service. Port 0 takes a free port, which the worker tells "
             "the coordinator."},
    {.name = "coordinator",
     .kind = OPTION_ADDRESS,
     OPTION_FIELD(worker_options_t, coordinator),
     .initial = "127.0.0.1:7070",
     .help    = "The coordinator to join. The worker waits for it, and joins again when it comes "
                "back."},
    {.name = "advertise",
     .kind = OPTION_ADDRESS,
     OPTION_FIELD(worker_options_t, advertise),
     .initial = "",
     .help    = "The address that clients are told to reach this worker at. Empty: the one that it "
                "listens on."},
    {.name = "name",
     .kind = OPTION_TEXT,
     OPTION_FIELD(worker_options_t, name),
     .initial = "",
     .help    = "What the worker calls itself in logs and errors. Empty: its address."},
    DEVICE_ROW(worker_options_t,
               "The device that holds the KV and computes attention: cpu, or cuda:N for a GPU, "
               "counted from 0; cuda is cuda:0."),
    {.name = "threads",
     .kind = OPTION_COUNT,
     OPTION_FIELD(worker_options_t, threads),
     .initial = "0",
     .most    = 1024,
     .help = "Threads that compute attention. 0: one per core. The answer's bits do not depend on "
             "it."},
    {.name = "slab",
     .kind = OPTION_BYTES,
     OPTION_FIELD(worker_options_t, slab),
     .initial = "0",
     .most    = 64 * TIB,
     .help    = "Memory for KV, at least 1MiB. Caches take their regions from it; it is never "
                "exceeded. 0: of a GPU, what is free there at the start less reserve; with cpu, "
                "1GiB."},
    {.name = "reserve",
     .kind = OPTION_BYTES,
     OPTION_FIELD(worker_options_t, reserve),
     .initial = "2GiB",
     .most    = 64 * TIB,
     .help    = "Memory of a GPU that a slab of 0 leaves: for workspaces of steps, kernels, the "
                "driver and, with groups, up to 1 GiB of inboxes. Not used with cpu."},
    {.name = "spin-us",
     .kind = OPTION_US,
     OPTION_FIELD(worker_options_t, spin_us),
     .initial = "50",
     .most    = 1000000,
     .help    = "Busy-wait so long for the next message before sleeping. More is faster when cores "
                "are idle, and slower when they are not. 0: never."},
    {.name = "batch",
     .kind = OPTION_SWITCH,
     OPTION_FIELD(worker_options_t, batch),
     .initial = "no",
     .help =
         "Run as a batch process: a message that comes does not take the core from whoever runs "
         "there, but waits for one. For machines whose cores are shared with a runner."},
    {.name = "drain-ms",
     .kind = OPTION_MS,
     OPTION_FIELD(worker_options_t, drain_ms),
     .initial = "5000",
     .most    = 600000,
     .help    = "After SIGTERM, open steps get so long to end before they are aborted."},
    PEER_ROWS(worker_options_t),
    {.name = "ucx-memory",
     .kind = OPTION_BYTES,
     OPTION_FIELD(worker_options_t, ucx_memory),
     .initial = "1GiB",
     .most    = 64 * TIB,
     .help =
         "Shared memory to lend to clients of this host, of all of them together: their runs "
         "go through it in place of gRPC. Each client counts with its whole slab. 0: lend none."},
    {.name = "ucx-slab",
     .kind = OPTION_BYTES,
     OPTION_FIELD(worker_options_t, ucx_slab),
     .initial = "32MiB",
     .least   = WORKER_UCX_SLAB_LEAST,
     .most    = WORKER_UCX_SLAB_MOST,
     .help    = "Of ucx-memory, for one client at most. Steps whose runs do not fit go over gRPC."},
    {.name = "gpu-lend",
     .kind = OPTION_BYTES,
     OPTION_FIELD(worker_options_t, gpu_lend),
     .initial = "512MiB",
     .most    = 64 * TIB,
     .help =
         "Memory of the worker's GPU to lend to clients of this host whose tensors are in a GPU's "
         "memory, of all of them together: with each slab of ucx-memory as much, and 4 MiB. "
         "They copy there from GPU to GPU. It is taken as clients come, beside slab and within "
         "reserve. 0: none."},
    {.name = "ucx-net",
     .kind = OPTION_TEXT,
     OPTION_FIELD(worker_options_t, ucx_net),
     .initial    = "",
     .value_name = "DEVICES",
     .help = "Take runs of clients that can map no memory of this host as messages of UCX's, over "
             "these devices, as ucx_info -d names them, with commas (mlx5_0:1, eth1), or all. "
             "They may use as much memory again as ucx-memory says. UCX listens on them, "
             "encrypts nothing and believes what it reads: name networks that are trusted. "
             "Empty: none."},
    {.name = "ucx-net-plaintext",
     .kind = OPTION_SWITCH,
     OPTION_FIELD(worker_options_t, ucx_net_plaintext),
     .initial = "no",
     .help    = "Allow ucx-net beyond this machine, though what goes there is not encrypted, also "
                "where certificates encrypt everything else."},
    {.name = "groups",
     .kind = OPTION_SWITCH,
     OPTION_FIELD(worker_options_t, groups),
     .initial = "no",
     .help    = "Let clients make groups of this worker and others of its host, whose GPUs merge "
                "partials among themselves. For tests: not run on two GPUs yet, where a worker that is "
                "killed may take those of its groups along."},
    {.name = "check-store",
     .kind = OPTION_SWITCH,
     OPTION_FIELD(worker_options_t, check_store),
     .initial = "no",
     .help = "For tests: count every page of the KV store again ten times a second and at the end, "
             "and log an error if a number is wrong."},
    METRICS_ROW(worker_options_t, METRICS_TEXT),
    LOG_LEVEL_ROW(worker_options_t),
    TLS_ROWS(worker_options_t),
    JOIN_ROW(worker_options_t,
             "A file whose first line (16 to 256 printable characters) this worker shows the "
             "coordinator to be let in. Empty: it shows nothing."),
};

const option_set_t worker_option_set = {
    .program  = "attnd worker",
    .section  = "worker",
    .summary  = "holds KV on one device and computes attention there",
    .sections = sections,
    .table    = worker_table,
    .n        = sizeof(worker_table) / sizeof(worker_table[0]),
    .check    = worker_check,
};

/* ---- coordinator ---- */

static attn_status_t
coordinator_check(const void *values)
{
    const coordinator_options_t *options = values;

    if (options->lost_ms < 2 * options->heartbeat_ms) {
        return attn_fail(ATTN_ERR_INVALID,
                         "--lost-ms %llu is below twice --heartbeat-ms %llu; one late heartbeat "
                         "would lose a worker",
                         (unsigned long long)options->lost_ms,
                         (unsigned long long)options->heartbeat_ms);
    }
    attn_status_t status = check_tls(&options->tls, "--listen", options->listen);
    return status == ATTN_OK ? check_metrics(&options->tls, options->metrics_listen) : status;
}

static const option_t coordinator_table[] = {
    {.name = "listen",
     .kind = OPTION_ADDRESS,
     OPTION_FIELD(coordinator_options_t, listen),
     .initial = "127.0.0.1:7070",
     .help    = "Where to serve clients (Attention) and workers (Coordinator). Port 0 takes a free "
                "port."},
    {.name = "lost-ms",
     .kind = OPTION_MS,
     OPTION_FIELD(coordinator_options_t, lost_ms),
     .initial = "2000",
     .least   = 100,
     .most    = 600000,
     .help    = "A worker that was silent for so long is lost, and the KV on it: its sequences "
                "answer with an error that names the token ranges. At least twice heartbeat-ms."},
    {.name = "lease-ms",
     .kind = OPTION_MS,
     OPTION_FIELD(coordinator_options_t, lease_ms),
     .initial = "30000",
     .least   = 1000,
     .most    = 3600000,
     .help    = "A client that was silent for so long is gone: its sequences are freed and its "
                "caches left."},
    {.name = "heartbeat-ms",
     .kind = OPTION_MS,
     OPTION_FIELD(coordinator_options_t, heartbeat_ms),
     .initial = "500",
     .least   = 10,
     .most    = 60000,
     .help    = "How often workers are told to report."},
    {.name = "break-even-tokens",
     .kind = OPTION_COUNT,
     OPTION_FIELD(coordinator_options_t, break_even_tokens),
     .initial = "0",
     .most    = TIB,
     .help    = "Sequences up to this length stay whole on one worker where a cache leaves the "
                "choice to the service; longer ones are spread. 0: from the cost model, with "
                "constants measured at start."},
    {.name = "handler-threads",
     .kind = OPTION_COUNT,
     OPTION_FIELD(coordinator_options_t, handler_threads),
     .initial = "256",
     .least   = 1,
     .most    = 4096,
     .help    = "Calls that are worked on at once; further ones wait. Threads are started as calls "
                "need them, most of which wait for a worker."},
    {.name = "drain-ms",
     .kind = OPTION_MS,
     OPTION_FIELD(coordinator_options_t, drain_ms),
     .initial = "5000",
     .most    = 600000,
     .help =
         "After SIGTERM, open steps of thin clients get so long to end before they are aborted."},
    PEER_ROWS(coordinator_options_t),
    {.name = "transport",
     .kind = OPTION_CHOICE,
     OPTION_FIELD(coordinator_options_t, transport),
     .initial    = "auto",
     .choices    = transports,
     .value_name = "TRANSPORT",
     .help = "Which way runs of thin clients go on to workers: ucx is shared memory or messages of "
             "UCX's, and steps on workers that offer neither fail; auto is ucx where it can be, "
             "else grpc."},
    METRICS_ROW(coordinator_options_t, METRICS_TEXT),
    LOG_LEVEL_ROW(coordinator_options_t),
    TLS_ROWS(coordinator_options_t),
    JOIN_ROW(coordinator_options_t,
             "Workers are let in if they show the first line of this file (16 to 256 printable "
             "characters). Empty: whoever may connect may join as a worker, and is given KV."),
};

const option_set_t coordinator_option_set = {
    .program  = "attnd coordinator",
    .section  = "coordinator",
    .summary  = "knows the workers, places chunks, and serves thin clients",
    .sections = sections,
    .table    = coordinator_table,
    .n        = sizeof(coordinator_table) / sizeof(coordinator_table[0]),
    .check    = coordinator_check,
};

/* ---- dev ---- */

static attn_status_t
dev_check(const void *values)
{
    const dev_options_t *options = values;
    const char *metrics          = options->metrics_listen;

    attn_status_t status = check_device(options->device, options->slab);
    if (status != ATTN_OK) {
        return status;
    }
    if (metrics[0] != '\0' &&
        strtoul(strrchr(metrics, ':') + 1, NULL, 10) + options->workers > 65535) {
        return attn_fail(ATTN_ERR_INVALID,
                         "--metrics-listen %s leaves no ports behind it for %llu workers", metrics,
                         (unsigned long long)options->workers);
    }
    status = check_tls(&options->tls, "--listen", options->listen);
    return status == ATTN_OK ? check_metrics(&options->tls, options->metrics_listen) : status;
}

static const option_t dev_table[] = {
    {.name = "workers",
     .kind = OPTION_COUNT,
     OPTION_FIELD(dev_options_t, workers),
     .initial = "4",
     .least   = 1,
     .most    = 64,
     .help    = "Worker processes to start, beside one coordinator."},
    {.name = "listen",
     .kind = OPTION_ADDRESS,
     OPTION_FIELD(dev_options_t, listen),
     .initial = "127.0.0.1:7070",
     .help = "Where the coordinator serves. Port 0 takes a free port. Workers take free ports of "
             "127.0.0.1."},
    {.name = "slab",
     .kind = OPTION_BYTES,
     OPTION_FIELD(dev_options_t, slab),
     .initial = "1GiB",
     .least   = 1 << 20,
     .most    = 64 * TIB,
     .help    = "Memory for KV of each worker."},
    DEVICE_ROW(dev_options_t,
               "The device of every worker: cpu, or cuda:N for a GPU, which they share then."),
    {.name = "threads",
     .kind = OPTION_COUNT,
     OPTION_FIELD(dev_options_t, threads),
     .initial = "0",
     .most    = 1024,
     .help    = "Threads of each worker. 0: the machine's cores shared evenly, at least one each."},
    {.name = "ready-file",
     .kind = OPTION_TEXT,
     OPTION_FIELD(dev_options_t, ready_file),
     .initial    = "",
     .value_name = "FILE",
     .help       = "Write the coordinator's HOST:PORT into this file once every worker has joined. "
                   "Empty: no file."},
    METRICS_ROW(
        dev_options_t,
        "As of the coordinator, which gets it: /metrics, /healthz and a status page over "
        "HTTP. Workers serve theirs on 127.0.0.1, at the ports that follow, or free ones if "
        "it is 0. Empty: nobody does."),
    LOG_LEVEL_ROW(dev_options_t),
    TLS_ROWS(dev_options_t),
};

const option_set_t dev_option_set = {
    .program  = "attnd dev",
    .section  = "dev",
    .summary  = "runs a cluster on this machine: one coordinator and some workers, as processes",
    .sections = sections,
    .table    = dev_table,
    .n        = sizeof(dev_table) / sizeof(dev_table[0]),
    .check    = dev_check,
};
