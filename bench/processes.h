/*
 * processes.h: the processes that a benchmark measures: a cluster of attnd, and bare echo
 * servers beside it. They end with the benchmark, however it ends.
 */
#ifndef ATTN_BENCH_PROCESSES_H
#define ATTN_BENCH_PROCESSES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PROCESSES_WORKERS_MAX 16u

typedef struct process {
    pid_t pid;
    char line[128]; /**< what it said when it was ready: its address, or its port */
} process_t;

typedef struct cluster {
    process_t coordinator, workers[PROCESSES_WORKERS_MAX];
    uint32_t n;
} cluster_t;

/** A coordinator and n workers of `threads` threads each, which poll for spin_us before they sleep.
 * All have joined when it returns. Ends the program if one does not come up. */
void cluster_start(cluster_t *cluster, uint32_t n, uint32_t threads, uint32_t spin_us);
void cluster_stop(cluster_t *cluster);

/** What workers may be told; what is 0 or NULL is as cluster_start() has it. */
typedef struct cluster_options {
    uint32_t threads, spin_us;
    uint32_t gpus; /**< worker i is on cuda:((gpu_first + i) modulo gpus); 0: on the CPU */
    uint32_t gpu_first;
    uint64_t slab;     /**< bytes of KV */
    uint64_t ucx_slab; /**< bytes of shared memory for a client, and of a GPU's */
    uint32_t clients;  /**< so many of which are lent at most */
    bool groups;       /**< they may be made */
    bool own_cores;    /**< worker i stays on core i, modulo those that there are */
    bool apart;        /**< cluster_start_apart() */
    bool grpc;         /**< they have no UCX */
} cluster_options_t;

/** The same. @return false: one did not come up, and has said why; all are stopped */
bool cluster_start_with(cluster_t *cluster, uint32_t n, const cluster_options_t *options);

/** The same, but each worker has an IPC namespace of its own, as if it were on another host, and
 * takes messages of UCX's over loopback. @return false: such namespaces are not allowed here */
bool cluster_start_apart(cluster_t *cluster, uint32_t n, uint32_t threads, uint32_t spin_us);

typedef struct echoes {
    process_t servers[PROCESSES_WORKERS_MAX];
    uint16_t ports[PROCESSES_WORKERS_MAX];
    uint32_t n;
} echoes_t;

/** n bare echo servers (echo.h). */
void echoes_start(echoes_t *echoes, uint32_t n, uint32_t spin_us);
void echoes_stop(echoes_t *echoes);

#endif
