/*
 * lender_gpu.h: memory of the worker's GPU that goes with slabs of shared memory. A client in
 * another process of the host maps it and copies q, k and v there, GPU to GPU; kernels read them
 * and write the answer beside, where the client copies it from. Heads, numbers and bells stay in
 * the slab.
 *
 * It is taken and given back by errands of its GPU (kernels/memory.h): a device that stands still
 * holds up neither streams nor steps. It is given back when its stream has ended and no run works
 * with it. A client that is gone has it
 * no longer; one that is not, and has it still, keeps memory that nothing of this worker is in.
 */
#ifndef ATTN_DAEMON_LENDER_GPU_H
#define ATTN_DAEMON_LENDER_GPU_H

#include "daemon/steps.h"
#include "rpc/ucx.h"

typedef struct lender_gpu lender_gpu_t; /* what is lent of it, and how much may be */
typedef struct gpu_slab gpu_slab_t;

/** @param gpu  -1: none, and nothing is lent */
attn_status_t lender_gpu_create(int gpu, uint64_t memory, lender_gpu_t **gpu_p);
void lender_gpu_destroy(lender_gpu_t *gpu); /* its slabs may be there still; NULL is allowed */

/** May it be asked for at all? */
bool lender_gpu_lends(const lender_gpu_t *gpu);
int lender_gpu_ordinal(const lender_gpu_t *gpu);

typedef struct lender_gpu_figures {
    uint64_t bytes, runs;
    uint32_t slabs;
} lender_gpu_figures_t;

void lender_gpu_describe(lender_gpu_t *gpu, lender_gpu_figures_t *figures);

/** As much as the session's slab has, as it was offered, and the lanes. Waits for the GPU: for
 * errands.
 * @return ATTN_ERR_EXHAUSTED, ATTN_ERR_NO_MEMORY and others
 * @return ATTN_ERR_UNSUPPORTED  never */
attn_status_t gpu_slab_open(lender_gpu_t *gpu, const ucx_offer_t *offer, gpu_slab_t **slab_p);

/** What its client is told: ATTN_SHARED_KEY bytes; and of which GPU it is: ATTN_UUID bytes. */
const uint8_t *gpu_slab_key(const gpu_slab_t *slab);
const uint8_t *gpu_slab_uuid(const gpu_slab_t *slab);

void gpu_slab_ref(gpu_slab_t *slab);
void gpu_slab_unref(gpu_slab_t *slab); /* NULL is allowed */

/** Where data of a place's requests and answers is, in the device's memory. */
uint8_t *gpu_slab_in(const gpu_slab_t *slab, const ucx_place_t *place);
uint8_t *gpu_slab_out(const gpu_slab_t *slab, const ucx_place_t *place);

/** Lane i of SLAB_LANES, SLAB_LANE_BYTES of it. */
uint8_t *gpu_slab_lane(const gpu_slab_t *slab, uint32_t i);

void gpu_slab_count(gpu_slab_t *slab); /* a run */

#endif
