/* steps_int.h: what steps.c (steps, unary calls) and stream.c share. */
#ifndef ATTN_DAEMON_STEPS_INT_H
#define ATTN_DAEMON_STEPS_INT_H

#include "daemon/steps.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct stream stream_t;

struct steps {
    const steps_ops_t *ops;
    void *service;
    jobs_t *jobs;
    tensors_t *tensors;
    unary_t *unary;
    lender_t *lender; /* NULL: no shared memory */
    uint32_t part_ms; /* for the next part of a run to come */
    char *paths;      /* of the methods, one behind the other */
    atomic_bool draining;
    pthread_mutex_t lock;
    stream_t *streams; /* open ones, under the lock */
};

/** A run whose data is coming in. */
typedef struct steps_run {
    uint64_t step_id;
    uint32_t layer;
    bool no_kv, no_q;
    uint64_t total, got; /* bytes of data */
    steps_sizes_t sizes;
    tensor_t *data; /* q, k, v as far as they came; NULL: no run */
    engine_lists_t *lists;
    uint32_t n_lists;
    wire_block_t block;  /* of the lists */
    uint64_t compute_ns; /* set by steps_run_do() */
    uint64_t start_ns;   /* when its head had come */
} steps_run_t;

/** May who showed this take steps? */
attn_status_t steps_admit(steps_t *steps, const char *ticket);

attn_status_t steps_begin(steps_t *steps, const ProtobufCMessage *request, steps_begun_t *begun);

/** Check the head of a run against its step, and take a buffer for its `total` bytes. */
attn_status_t steps_run_open(steps_t *steps, const Attn__V1__RunRequest *head, uint64_t total,
                             steps_run_t *run);

/** Do the run when all its data is there. *answer_p is NULL if it has no answer. */
attn_status_t steps_run_do(steps_t *steps, steps_run_t *run, tensor_t **answer_p);

/** Commit as the message asks. */
attn_status_t steps_commit(steps_t *steps, const Attn__V1__CommitRequest *request);

/** Give the run's data back. */
void steps_run_close(steps_run_t *run);

/* stream.c */
void stream_handle(void *service, rpc_call_t *call, rpc_message_t *message);
void stream_closed(void *service, rpc_call_t *call);
void streams_tick(steps_t *steps);

#endif
