/*
 * lender.h: the worker's side of UCX (rpc/ucx.h): the Slab method, on whose streams slabs of shared
 * memory are lent, or messages agreed on, and the slots of steps. A slab lives as long as its
 * stream, a slot as long as its step is open on the stream that began it.
 */
#ifndef ATTN_DAEMON_LENDER_H
#define ATTN_DAEMON_LENDER_H

#include "daemon/lender_gpu.h"
#include "daemon/steps.h"
#include "rpc/ucx.h"

typedef struct lender_options {
    uint64_t memory;     /**< bytes of all slabs, of either kind; 0: none are lent */
    uint64_t slab_bytes; /**< of one, at most */
    uint32_t spin_us;    /**< look for runs so long in vain before sleeping */
    uint32_t waiting; /**< runs at most that wait for others at a time: threads beside the usual */
    const char *network; /**< devices that messages come by; empty: none */
    int gpu;             /**< whose memory goes with slabs; -1: none */
    uint64_t gpu_memory; /**< bytes of it, in all; 0: none */
} lender_options_t;

/** Add Slab to the server, whose other methods are those of steps. Without UCX here streams are
 * refused with the reason, and so is every one if the options say so; that is no failure. */
attn_status_t lender_create(rpc_server_t *server, steps_t *steps, const lender_options_t *options,
                            lender_t **lender_p);

/** End every stream that a slab is lent on, as cancelled: after steps_end_streams(). */
void lender_end_streams(lender_t *lender);

/** After the server, before its steps. Waits for runs. NULL is allowed. */
void lender_destroy(lender_t *lender);

/** Is shared memory lent, or are messages taken? */
bool lender_lends(const lender_t *lender);

/** Of shared memory, and of messages; zeros where there are none. */
void lender_describe(lender_t *lender, ucx_figures_t *near, ucx_figures_t *far);

void lender_describe_gpu(lender_t *lender, lender_gpu_figures_t *figures);

/* ---- for stream_ops.c ---- */

/**
 * Open the slot that begin asked for.
 * @param gpu_p  set: its runs may have their tensors in the memory of the GPU that goes with the
 *               slab; if that was asked for and is not so, the sentence says why
 * @return ATTN_ERR_NOT_FOUND session, ATTN_ERR_INVALID place, or its room is not what the step's
 * runs take; ATTN_ERR_EXHAUSTED too many, ATTN_ERR_UNSUPPORTED no slabs here
 */
attn_status_t lender_slot_open(lender_t *lender, uint64_t step_id, const Attn__V1__Slot *slot,
                               ucx_slot_t **slot_p, bool *gpu_p);

/**
 * And have the step wait for its layers in the lane that begin asked for, when its slot is open, in
 * the GPU's memory, too.
 * @return ATTN_ERR_NOT_FOUND session, ATTN_ERR_INVALID lane, and as engine_step_drive()
 */
attn_status_t lender_drive(lender_t *lender, uint64_t step_id, const Attn__V1__Slot *slot);

/* ---- for worker/copier.c ---- */

/** Open a slot for parts of a chunk, as ucx_slot_open() has it. On failure `gone` is not called.
 * @param lender  NULL: as one that lends nothing
 * @return as there; ATTN_ERR_NOT_FOUND session, ATTN_ERR_UNSUPPORTED no slabs here */
attn_status_t lender_part_slot_open(lender_t *lender, const Attn__V1__Slot *slot, uint64_t tag,
                                    ucx_handle_fn handle, void (*gone)(void *arg), void *arg,
                                    ucx_slot_t **slot_p);

#endif
