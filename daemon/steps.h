/*
 * steps.h: steps as calls: Begin, Run, Commit and Abort, one at a time or on a stream. The same
 * on a worker and at the coordinator's front door, but for what a step is: a table says that.
 *
 * Tensors come in once, from the message into a buffer that the run reads, and go out without
 * a copy, from the buffer that the run wrote. What a peer says of sizes is compared with the
 * step's own before anything is allocated.
 *
 *     unary   Run -----------------------------------> sizes, run --> reply
 *     stream  run part, part, ... (offset, total) ---> sizes, run --> part, part, ...
 */
#ifndef ATTN_DAEMON_STEPS_H
#define ATTN_DAEMON_STEPS_H

#include "daemon/jobs.h"
#include "daemon/tensors.h"
#include "daemon/unary.h"

/** Bytes of one run of a step. */
typedef struct steps_sizes {
    uint64_t q, k, v, answer;
    bool grouped; /**< runs wait for other workers: they come on the step's stream, whose end ends
                     them */
} steps_sizes_t;

/** What begin replies, in either of its forms. */
typedef struct steps_begun {
    uint64_t step_id;
    union {
        ProtobufCMessage base;
        Attn__V1__BeginStepReply thin;
        Attn__V1__WorkerBeginReply worker;
    } reply;
} steps_begun_t;

/** One layer, with its tensors in place; q, or k and v, and answer may be NULL. */
typedef struct steps_layer {
    uint64_t step_id;
    uint32_t layer;
    const void *q, *k, *v;
    void *answer;
    bool on_gpu; /**< they are in the memory of the worker's GPU, and lent for the call alone: of a
                    step that lend() was called of */
    const engine_lists_t *lists;
    uint32_t n_lists;
    const steps_sizes_t
        *sizes;           /**< what the tensors were made for: while data came in, the step may have
                               ended and its id, a client's choice, become another step's */
    uint64_t *compute_ns; /**< set by run: RunReply.compute_ns */
} steps_layer_t;

/** What a step is. Functions may block, and are called from many threads. */
typedef struct steps_ops {
    /** May who showed this ticket (NULL: none) take steps? NULL: everybody may. Asked for every
     * unary call, and on a stream when it opens and for every begin. */
    attn_status_t (*admit)(void *service, const char *ticket);
    bool worker; /**< its begin is WorkerBeginRequest; otherwise BeginStepRequest */
    attn_status_t (*begin)(void *service, const ProtobufCMessage *request, steps_begun_t *begun);
    attn_status_t (*sizes)(void *service, uint64_t step_id, steps_sizes_t *sizes);
    attn_status_t (*run)(void *service, const steps_layer_t *layer);
    /** As engine_step_lend(); NULL where tensors are never on a GPU. */
    attn_status_t (*lend)(void *service, uint64_t step_id);
    /** As engine_step_drive(), of a step that lend() was called of; NULL with lend. */
    attn_status_t (*drive)(void *service, uint64_t step_id, const engine_lane_t *lane);
    attn_status_t (*commit)(void *service, uint64_t step_id, const engine_commit_t *commit);
    attn_status_t (*abort)(void *service, uint64_t step_id, const char *reason);
    /** An abort of it is to follow, which may have to wait for a run of it that waits for others:
     * that is to end. Does not block. NULL: runs wait for nobody. */
    void (*interrupt)(void *service, uint64_t step_id);
} steps_ops_t;

typedef struct steps_limits {
    uint32_t part_ms;      /**< for the next part of a run to come, on a stream */
    uint64_t buffer_bytes; /**< of all runs at once, beyond which runs are refused */
} steps_limits_t;

typedef struct steps steps_t;
typedef struct lender lender_t; /* lender.h */

/** Add the five methods of `prefix` ("/attn.v1.Worker") to the server. jobs may be NULL. */
attn_status_t steps_create(rpc_server_t *server, const char *prefix, const steps_ops_t *ops,
                           void *service, jobs_t *jobs, const steps_limits_t *limits,
                           steps_t **steps_p);

/** Where the slots of steps are opened: before the server starts. */
void steps_set_lender(steps_t *steps, lender_t *lender);

/** Give memory back that was kept for runs which did not come, and interrupt steps whose streams
 * have ended. Every 100 ms or so. */
void steps_tick(steps_t *steps, uint64_t now_ns);

/** From now on begin is refused, and so are new streams. */
void steps_drain(steps_t *steps);

/** End every stream that is open, as cancelled: after steps_drain(), when its steps have ended. */
void steps_end_streams(steps_t *steps);

void steps_destroy(steps_t *steps); /* after the server; NULL is allowed */

#endif
