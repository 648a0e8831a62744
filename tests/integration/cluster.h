/*
 * cluster.h: real attnd processes for tests. A process that a test started dies with the test,
 * and its log is printed when the test fails. All addresses are of loopback, all ports free
 * ones. Times are in milliseconds.
 */
#ifndef ATTN_TESTS_CLUSTER_H
#define ATTN_TESTS_CLUSTER_H

#include "client/attn.h"

#include <sys/types.h>

#define CLUSTER_WORKERS_MAX 8u
#define CLUSTER_START_MS 20000u

typedef struct process {
    pid_t pid; /**< 0: not running */
    int ready_fd;
    char address[64]; /**< as it told */
    char log[96];     /**< path */
} process_t;

/** Start a program, argv ended by NULL; its stderr and stdout go to a log of its own. */
void process_start(process_t *process, const char *const *argv);
/** The same, in an IPC namespace of its own. */
void process_start_apart(process_t *process, const char *const *argv);

/** Wait until it wrote its line of readiness; fails the test if it does not in time. */
void process_wait_ready(process_t *process);

void process_signal(process_t *process, int signo);

/** Wait for its end: its exit code, 128 + the signal that ended it, or -1 if it still runs. */
int process_wait(process_t *process, uint32_t ms);

/** kill -9 and reap; fine if it does not run. */
void process_kill(process_t *process);

/** Does its log hold these words? */
bool process_logged(const process_t *process, const char *words);

/** As soon as it does. @return false: not within so long */
bool process_await_logged(const process_t *process, const char *words, uint32_t ms);

/* ---- a cluster ---- */

/* A worker of which nothing is heard for so long is lost. A sanitizer, on a busy machine, keeps one
 * from being heard for longer. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CLUSTER_LOST_MS 3000
#else
#define CLUSTER_LOST_MS 600
#endif

typedef struct cluster_options {
    uint32_t workers;
    const char *slab;     /**< of each; NULL: 32MiB */
    const char *device;   /**< of each; NULL: cpu */
    bool groups;          /**< workers may be made groups */
    bool device_each;     /**< a number of its own is put behind it: cuda:0, cuda:1, ... */
    const char *lost_ms;  /**< NULL: CLUSTER_LOST_MS; with a heartbeat of 100 */
    const char *lease_ms; /**< NULL: 30000 */
    const char *drain_ms; /**< NULL: 5000 */
    const char *gpu_lend; /**< NULL: the daemon's default; likewise below */
    const char *ucx_slab;
    const char *certs; /**< folder of server.pem, server.key and ca.pem: mTLS; NULL: plaintext */
    bool check_store;  /**< workers verify their stores all the time */
    bool ucx_net;      /**< workers take messages of UCX's, over loopback */
    /** Each worker has an IPC namespace of its own, which makes it another host's for shared
     * memory; then ucx_net is true, too. So with ATTN_TEST_APART in the environment. Where that is
     * not allowed the test is skipped. */
    bool apart;
} cluster_options_t;

typedef struct cluster {
    cluster_options_t options;
    process_t coordinator;
    process_t workers[CLUSTER_WORKERS_MAX];
} test_cluster_t;

/** A coordinator and its workers, all joined. With ATTN_TEST_NO_UCX in the environment workers have
 * no UCX. */
void cluster_up(test_cluster_t *cluster, const cluster_options_t *options);

/** SIGTERM to all that run: each must end well. Prints the logs if one does not. */
void cluster_down(test_cluster_t *cluster);

/** kill -9 to all that run; their logs stay. */
void cluster_kill(test_cluster_t *cluster);

void cluster_start_coordinator(test_cluster_t *cluster, const char *listen);
void cluster_start_worker(test_cluster_t *cluster, uint32_t i); /* and wait until it joined */

/** Print all logs, for a test that is about to fail. */
void cluster_print_logs(const test_cluster_t *cluster);

/** The process whose worker has this address. */
process_t *cluster_worker_at(test_cluster_t *cluster, const char *address);

/* ---- small things ---- */

uint64_t now_ms(void);
void sleep_ms(uint32_t ms);

/** An open client, or a failed test. */
attn_client_t *open_client(const char *address, uint32_t timeout_ms);

/** A call that must succeed: prints its sentence when it does not. */
#define OK(call) must(call, #call, __FILE__, __LINE__)
void must(attn_status_t status, const char *what, const char *file, int line);

#endif
