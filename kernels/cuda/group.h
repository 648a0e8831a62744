/*
 * group.h: a rank of a group of GPUs on one host that exchange partials (exchange.h has the rules):
 * its inbox, its tables, its launches. Interior: how processes come to map each other's inboxes is
 * the caller's, groups.c, by CUDA IPC.
 *
 * CUDA IPC first, not NCCL: it needs no library at run time, no communicator and no promise about a
 * device-side ABI; a mapped pointer is all that the kernel wants. NCCL's windows would be another
 * way to the same pointers. What becomes of an inbox whose process is killed while others have it
 * mapped CUDA leaves open: docs/rationale.md has what was seen, and the other way there would be.
 *
 * Device pointers are uint64_t here, streams CUstream. One thread at a time, but for abort.
 */
#ifndef ATTN_KERNELS_CUDA_GROUP_H
#define ATTN_KERNELS_CUDA_GROUP_H

#include "kernels/cuda/exchange_plan.h"

#include <cuda.h>

typedef struct cuda_group cuda_group_t;

typedef struct cuda_group_options {
    uint64_t id; /**< the group's, by which ranks tell its exchanges from those of others */
    uint32_t ranks, me;
    uint32_t head_dim_v; /**< 64, 128 or 256 */
    uint64_t half;       /**< bytes of a half of an inbox: CUDA_LINE_BYTES() a state */
    uint32_t ctas_max;   /**< of a launch, all of which are resident while it waits; 0: any */
} cuda_group_options_t;

/** What a launch reads and writes, all in memory of the device. */
typedef struct cuda_group_call {
    uint64_t a, l, e; /**< own states, as cuda_exchange_entry_t numbers them: [n][d], [n], [n] */
    uint64_t o;       /**< [rows of the share][d] */
    attn_dtype_t o_type;
    uint64_t lse;            /**< [rows of the share] f32, or 0 */
    uint64_t sink_l, sink_e; /**< [heads], sinks as states; or 0 */
    uint64_t error;          /**< 64 bits, all ones before: the first row that was not finite */
    uint64_t limit_ns;       /**< of the launch's waits */
} cuda_group_call_t;

/**
 * A rank with an empty inbox. The backend outlives it.
 *
 * @return ATTN_ERR_INVALID      ranks, head dim or half out of range
 * @return ATTN_ERR_UNSUPPORTED  the device is older than sm_80
 * @return ATTN_ERR_NO_MEMORY, ATTN_ERR_INTERNAL  of the device
 */
attn_status_t cuda_group_open(attn_backend_t *backend, const cuda_group_options_t *options,
                              cuda_group_t **group_p);

/**
 * A rank of another group, in the memory of one that is not connected any more. Others may have its
 * inbox mapped still.
 * @return as cuda_group_open(), and ATTN_ERR_TOO_LARGE  the half is beyond cuda_group_half_max()
 */
attn_status_t cuda_group_again(cuda_group_t *group, const cuda_group_options_t *options);

/** Bytes of a half that its inbox has room for; bytes of an inbox with such halves. */
uint64_t cuda_group_half_max(const cuda_group_t *group);
uint64_t cuda_inbox_bytes(uint64_t half);

/** Where the inbox lies, an allocation of its own: for exporting it. */
uint64_t cuda_group_inbox(const cuda_group_t *group);

/** Its card, random, by which others know that what they mapped is this inbox, for this group. */
const uint8_t *cuda_group_card(const cuda_group_t *group);

/** Has what is mapped at `inbox` this card? @return ATTN_ERR_STALE  no: it is another one's */
attn_status_t cuda_group_check_card(cuda_group_t *group, uint64_t inbox,
                                    const uint8_t card[CUDA_CARD]);

/** Where all ranks' inboxes are mapped here; [me] is not looked at. Before the first launch. */
void cuda_group_connect(cuda_group_t *group, const uint64_t inboxes[CUDA_RANKS]);

/** This rank makes no exchange any more: others are told, if they do not know, and what is mapped
 * of theirs is not used after it. No launch is under way. Connected or not. */
void cuda_group_leave(cuda_group_t *group);

/**
 * Tables for the launches that are queued from here on. Launches queued before have ended, and
 * graphs captured before are not launched any more.
 *
 * @return ATTN_ERR_TOO_LARGE  a row's stack does not fit in shared memory
 * @return ATTN_ERR_STALE      the group's numbers are used up: make it anew
 * @return ATTN_ERR_NO_MEMORY, ATTN_ERR_INTERNAL  of the device
 */
attn_status_t cuda_group_load(cuda_group_t *group, const cuda_exchange_plan_t *plan);

/** Queue a launch; may be captured in a graph. All ranks do, the same number of times. */
attn_status_t cuda_group_enqueue(cuda_group_t *group, const cuda_group_call_t *call,
                                 CUstream stream);

/** End this rank's launches, and with them, through their inboxes, those of others. Any thread: it
 * waits for nobody and calls no driver. */
void cuda_group_abort(cuda_group_t *group);

/**
 * How launches that have ended went. After anything but ATTN_OK the group is closed and made anew.
 *
 * @return ATTN_ERR_DEADLINE   a rank did not come in time; the sentence names it
 * @return ATTN_ERR_ABORTED    somebody said so
 * @return ATTN_ERR_INTERNAL   of the device
 */
attn_status_t cuda_group_check(cuda_group_t *group);

/** The control, in the device's memory, and how launches went by a copy of it: as above. */
uint64_t cuda_group_control(const cuda_group_t *group);
attn_status_t cuda_group_verdict(cuda_group_t *group, const cuda_exchange_control_t *seen);

/** NULL is allowed. No launch is under way, and no rank has its inbox mapped. */
void cuda_group_close(cuda_group_t *group);

#endif
