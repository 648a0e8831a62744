/*
 * slab.h: the shared memory that one worker lends this client, or where messages to it are written
 * and its answers come; which of them is nothing to steps. A slab is opened when a step first wants
 * one, by asking on a stream of the worker's Slab method, and lives as long as that. Steps hold
 * references to it. One that broke off spoils its slab: the worker may still write into it, so it
 * is given up with its last step, and later steps get another.
 */
#ifndef ATTN_SLAB_H
#define ATTN_SLAB_H

#include "client/link_grpc_int.h"
#include "client/slab_gpu.h"
#include "client/slab_lanes.h"

typedef struct slabs_options {
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    rpc_channel_t *channel; /**< to the worker; stays the caller's, outlives slabs */
    const char *address;    /**< of it, as gRPC has it; copied */
    uint64_t bytes;         /**< of a slab, at most; the worker may lend less */
    /** Messages go by these devices, as UCX names them; "": none go; NULL: by those that lead to
     * the worker. Not copied. */
    const char *network;
} slabs_options_t;

attn_status_t slabs_create(const slabs_options_t *options, slabs_t **slabs_p);
void slabs_destroy(slabs_t *slabs); /* no step has one any more; NULL is allowed */

/** Nobody needs a slab for now: the one that is goes with its last user. */
void slabs_rest(slabs_t *slabs);

/**
 * The slab that now is, with a reference; opened if there is none, which blocks. After a failure
 * nothing is tried for a while, and the same is said again.
 * @return ATTN_ERR_UNSUPPORTED, ATTN_ERR_EXHAUSTED, ATTN_ERR_UNAVAILABLE, ATTN_ERR_DEADLINE and
 * such
 */
attn_status_t slabs_take(slabs_t *slabs, uint64_t deadline_ns, slab_t **slab_p);

void slab_release(slab_t *slab);
void slab_spoil(slab_t *slab); /* not for later steps */

ucx_peer_t *slab_peer(slab_t *slab);

/**
 * Ask for memory of the worker's GPU, unless somebody has, or it was refused just now, and wait for
 * the answer until until_ns, 2 s at most; 0 does not wait. @return whether it is lent
 */
bool slab_ask_gpu(slab_t *slab, uint64_t until_ns);

slab_gpu_t *slab_gpu(slab_t *slab);

slab_lanes_t *slab_lanes(slab_t *slab);

/** What begin is to say of a place. */
void slab_slot(const slab_t *slab, const ucx_place_t *place, Attn__V1__Slot *slot);

/** The step's run of this number is to wait for its answer: if the worker gives the slab up, its
 * pipe is told. It may be told already when this returns. */
void slab_await(slab_t *slab, link_step_t *step, uint64_t number);
void slab_await_no_more(link_step_t *step);

/** Does the next step get a slab, as far as is known, and of which kind? Why not, if it was tried.
 * Slabs given up with steps, or by the worker: transport, reason, slabs_lost. */
void slabs_describe(slabs_t *slabs, attn_link_info_t *info);

#endif
