/*
 * pipe.h: streams of a worker's Steps method. A step has a pipe for itself from begin to its
 * end; then the pipe waits for the next step. If the stream breaks, the worker aborts the step.
 * One operation is outstanding on a pipe, and its done is called exactly once.
 */
#ifndef ATTN_PIPE_H
#define ATTN_PIPE_H

#include "attn/v1/attn.pb-c.h"
#include "client/link.h"

#include <pthread.h>

typedef struct pipe pipe_t;

typedef enum pipe_op {
    PIPE_NONE,
    PIPE_BEGIN,
    PIPE_RUN,
    PIPE_COMMIT,
    PIPE_ABORT,
} pipe_op_t;

/** The pipes to one worker. Their fields are pipe.c's. */
typedef struct pipes {
    char address[128];
    rpc_client_t *rpc;
    rpc_channel_t *channel;
    pthread_mutex_t lock;
    pipe_t *idle; /* under the lock */
} pipes_t;

attn_status_t pipes_init(pipes_t *pipes, rpc_client_t *rpc, const char *address);
void pipes_fini(pipes_t *pipes); /* no pipe is taken any more */

/** An idle pipe that still stands, or a new one. A worker goes by the ticket that a stream was
 * opened with; so one of a former ticket is not taken again. */
attn_status_t pipe_take(pipes_t *pipes, pipe_t **pipe_p);

/** Give it up: to the idle list if its step ended in order (clean). Nothing is outstanding.
 * @return whether the worker said that the step ended, or never began */
bool pipe_give(pipe_t *pipe, bool clean);

/** An operation of one message without tensors. */
void pipe_call(pipe_t *pipe, pipe_op_t op, const Attn__V1__StepRequest *request, link_done_fn done,
               void *arg);

/** A run: its tensors out in parts, its answer into run->answer. Tensors, and lists[run->n_lists],
 * are read until done. */
void pipe_run(pipe_t *pipe, uint64_t step_id, const link_run_t *run, Attn__V1__EntryLists **lists,
              link_done_fn done, void *arg);

/**
 * A run whose tensors and answer go another way than the stream: this starts the operation, which
 * ends by pipe_run_answered(), or as any other if the stream ends first. The caller then sends what
 * it has to, and says pipe_run_asked().
 * @return the run's number
 */
uint64_t pipe_run_aside(pipe_t *pipe, const link_run_t *run, link_done_fn done, void *arg);
void pipe_run_asked(pipe_t *pipe);

/** What came of it: an answer of `bytes`, read before this returns, or a failure. Any thread; if
 * the run is over already nothing happens. */
void pipe_run_answered(pipe_t *pipe, uint64_t number, attn_status_t status, const char *sentence,
                       const uint8_t *data, uint64_t bytes, uint64_t compute_ns);

/** Keep a pipe's memory while another thread may give it up. */
void pipe_ref(pipe_t *pipe);
void pipe_unref(pipe_t *pipe);

/** After begin: did the worker open the slot that was asked for? If not, why.
 * @param gpu_p  and is memory of its GPU with it? If that was asked for, and is not, why */
bool pipe_has_slot(pipe_t *pipe, bool *gpu_p, char *reason, size_t room);

/** After begin: do all layers wait on the worker's GPU, as was asked? If not, why. */
bool pipe_is_driven(pipe_t *pipe, char *reason, size_t room);

/** As link_ops_t.cancel. */
void pipe_cancel(pipe_t *pipe);

#endif
