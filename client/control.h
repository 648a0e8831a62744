/*
 * control.h: the control plane as libattn sees it: a table with a row for a cluster inside
 * the process (inproc://, and the coordinator's own client) and one for a coordinator over gRPC.
 */
#ifndef ATTN_CONTROL_H
#define ATTN_CONTROL_H

#include "client/cluster.h"

typedef struct control control_t;

typedef struct control_ops {
    void (*close)(control_t *control); /**< leaves: what the client made is freed */
    /** The lease. told: how runs reach workers, for where sequences are placed; hop_seconds 0: not
     * known. */
    attn_status_t (*renew)(control_t *control, const cost_link_t *told, uint64_t deadline_ns);
    /** *complete gets every default; its layer table is *table_p, the caller's to free(). */
    attn_status_t (*cache_open)(control_t *control, const char *name,
                                const attn_geometry_t *geometry, uint64_t deadline_ns,
                                uint64_t *cache_p, attn_geometry_t *complete, void **table_p);
    attn_status_t (*cache_close)(control_t *control, uint64_t cache, uint64_t deadline_ns);
    attn_status_t (*seq_create)(control_t *control, uint64_t cache, uint64_t expected_tokens,
                                uint64_t deadline_ns, attn_seq_t *seq_p);
    attn_status_t (*seq_fork)(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t length,
                              uint64_t deadline_ns, attn_seq_t *fork_p);
    attn_status_t (*seq_truncate)(control_t *control, uint64_t cache, attn_seq_t seq,
                                  uint64_t length, uint64_t deadline_ns);
    attn_status_t (*seq_free)(control_t *control, uint64_t cache, attn_seq_t seq,
                              uint64_t deadline_ns);
    attn_status_t (*layout)(control_t *control, uint64_t cache, const attn_seq_t *seqs,
                            const uint64_t *bases, const uint64_t *tokens, uint32_t n,
                            uint64_t deadline_ns, attn_seq_info_t *infos, uint64_t *epoch_p);
    /** Address of a worker that a layout named. */
    attn_status_t (*worker)(control_t *control, uint32_t worker, char address[64], bool *alive_p);
    /** And where it is for groups. */
    attn_status_t (*place)(control_t *control, uint32_t worker, dir_place_t *place);
    attn_status_t (*describe)(control_t *control, uint64_t deadline_ns, attn_cluster_info_t *info);
    /** As cluster_seq_move() and cluster_worker_drain(). */
    attn_status_t (*seq_move)(control_t *control, uint64_t cache, attn_seq_t seq, uint32_t from,
                              uint32_t to, uint64_t deadline_ns, cluster_moved_t *moved);
    attn_status_t (*worker_drain)(control_t *control, uint32_t worker, uint32_t to, bool stay,
                                  uint64_t deadline_ns, cluster_moved_t *moved);
} control_ops_t;

struct control {
    const control_ops_t *ops; /* first member of every row's own struct */
    uint32_t lease_ms;        /* 0: none to renew */
};

/** cluster is the caller's, outlives control. */
attn_status_t control_cluster_open(cluster_t *cluster, const char *name, control_t **control_p);
attn_status_t control_grpc_open(rpc_client_t *rpc, const char *address, const char *name,
                                uint64_t deadline_ns, control_t **control_p);

#endif
