/* control_cluster.c: the control plane of a cluster inside the process. */
#include "client/control.h"

#include "base/status.h"

#include <stdlib.h>

typedef struct cluster_control {
    control_t control;
    cluster_t *cluster;
    uint32_t client;
} cluster_control_t;

static cluster_control_t *
of(control_t *control)
{
    return (cluster_control_t *)(void *)control;
}

static void
local_close(control_t *control)
{
    cluster_client_close(of(control)->cluster, of(control)->client);
    free(control);
}

static attn_status_t
local_renew(control_t *control, const cost_link_t *told, uint64_t deadline_ns)
{
    (void)deadline_ns;
    return cluster_client_renew(of(control)->cluster, of(control)->client, told);
}

static attn_status_t
local_cache_open(control_t *control, const char *name, const attn_geometry_t *geometry,
                 uint64_t deadline_ns, uint64_t *cache_p, attn_geometry_t *complete, void **table_p)
{
    char kind[64];
    cluster_t *cluster = of(control)->cluster;
    attn_status_t status =
        cluster_cache_open(cluster, of(control)->client, name, geometry, cache_p, kind);

    (void)deadline_ns;
    if (status == ATTN_OK &&
        (status = cluster_cache_geometry(cluster, *cache_p, complete, table_p)) != ATTN_OK) {
        cluster_cache_close(cluster, of(control)->client, *cache_p);
    }
    return status;
}

static attn_status_t
local_cache_close(control_t *control, uint64_t cache, uint64_t deadline_ns)
{
    (void)deadline_ns;
    return cluster_cache_close(of(control)->cluster, of(control)->client, cache);
}

static attn_status_t
local_seq_create(control_t *control, uint64_t cache, uint64_t expected_tokens, uint64_t deadline_ns,
                 attn_seq_t *seq_p)
{
    (void)deadline_ns;
    return cluster_seq_create(of(control)->cluster, cache, of(control)->client, expected_tokens,
                              seq_p);
}

static attn_status_t
local_seq_fork(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t length,
               uint64_t deadline_ns, attn_seq_t *fork_p)
{
    (void)deadline_ns;
    return cluster_seq_fork(of(control)->cluster, cache, of(control)->client, seq, length, fork_p);
}

static attn_status_t
local_seq_truncate(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t length,
                   uint64_t deadline_ns)
{
    (void)deadline_ns;
    return cluster_seq_truncate(of(control)->cluster, cache, seq, length);
}

static attn_status_t
local_seq_free(control_t *control, uint64_t cache, attn_seq_t seq, uint64_t deadline_ns)
{
    (void)deadline_ns;
    return cluster_seq_free(of(control)->cluster, cache, seq);
}

static attn_status_t
local_layout(control_t *control, uint64_t cache, const attn_seq_t *seqs, const uint64_t *bases,
             const uint64_t *tokens, uint32_t n, uint64_t deadline_ns, attn_seq_info_t *infos,
             uint64_t *epoch_p)
{
    (void)deadline_ns;
    return cluster_layout(of(control)->cluster, cache, seqs, bases, tokens, n, infos, epoch_p);
}

static attn_status_t
local_worker(control_t *control, uint32_t worker, char address[64], bool *alive_p)
{
    return cluster_worker_address(of(control)->cluster, worker, address, alive_p);
}

static attn_status_t
local_place(control_t *control, uint32_t worker, dir_place_t *place)
{
    return cluster_worker_place(of(control)->cluster, worker, place);
}

static attn_status_t
local_describe(control_t *control, uint64_t deadline_ns, attn_cluster_info_t *info)
{
    (void)deadline_ns;
    return cluster_describe(of(control)->cluster, info);
}

static attn_status_t
local_seq_move(control_t *control, uint64_t cache, attn_seq_t seq, uint32_t from, uint32_t to,
               uint64_t deadline_ns, cluster_moved_t *moved)
{
    (void)deadline_ns;
    return cluster_seq_move(of(control)->cluster, cache, seq, from, to, moved);
}

static attn_status_t
local_worker_drain(control_t *control, uint32_t worker, uint32_t to, bool stay,
                   uint64_t deadline_ns, cluster_moved_t *moved)
{
    (void)deadline_ns;
    return cluster_worker_drain(of(control)->cluster, worker, to, stay, moved);
}

static const control_ops_t cluster_control_ops = {
    .close        = local_close,
    .renew        = local_renew,
    .cache_open   = local_cache_open,
    .cache_close  = local_cache_close,
    .seq_create   = local_seq_create,
    .seq_fork     = local_seq_fork,
    .seq_truncate = local_seq_truncate,
    .seq_free     = local_seq_free,
    .layout       = local_layout,
    .worker       = local_worker,
    .place        = local_place,
    .describe     = local_describe,
    .seq_move     = local_seq_move,
    .worker_drain = local_worker_drain,
};

attn_status_t
control_cluster_open(cluster_t *cluster, const char *name, control_t **control_p)
{
    cluster_control_t *control = calloc(1, sizeof(*control));

    if (control == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a client");
    }
    control->control.ops      = &cluster_control_ops;
    control->control.lease_ms = cluster_lease_ms(cluster);
    control->cluster          = cluster;
    attn_status_t status      = cluster_client_open(cluster, name, &control->client);
    if (status != ATTN_OK) {
        free(control);
        return status;
    }
    *control_p = &control->control;
    return ATTN_OK;
}
