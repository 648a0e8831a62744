/* client.h: what others in the tree need of libattn beside attn.h: the coordinator daemon a client
 * over a cluster and links of the same process, the thin client TLS. */
#ifndef ATTN_CLIENT_H
#define ATTN_CLIENT_H

#include "client/attn.h"
#include "client/cluster.h"

/** As attn_client_open(); rpc, cluster and links stay the caller's and outlive the client. */
attn_status_t client_open_on(rpc_client_t *rpc, cluster_t *cluster, links_t *links,
                             const attn_client_options_t *options, attn_client_t **client_p);

/** Join a cache that is open in the cluster by its id (the front door's clients name ids). */
attn_status_t client_cache_by_id(attn_client_t *client, uint64_t cache, attn_cache_t **cache_p);

/** Bytes that a run of this step takes and gives: q, k, v; o and lse. */
void client_step_sizes(const attn_step_t *step, uint64_t *q, uint64_t *k, uint64_t *v, uint64_t *o,
                       uint64_t *lse);

/** Have rpc use TLS, if the options or the environment name a CA; else *tls_p stays as
 * it is. Close *tls_p after rpc. */
attn_status_t client_tls_open(rpc_client_t *rpc, const attn_client_options_t *options,
                              rpc_tls_t **tls_p);

#endif
