/* link_grpc_int.h: what the rows over gRPC (link_grpc.c) and over UCX (link_ucx.c), which is the
 * same with another way for runs, share. */
#ifndef ATTN_LINK_GRPC_INT_H
#define ATTN_LINK_GRPC_INT_H

#include "client/pipe.h"
#include "client/wire.h"

#include <stdatomic.h>

typedef struct slab slab_t;
typedef struct slabs slabs_t;

typedef struct grpc_link {
    link_t link;
    rpc_channel_t *control;
    pipes_t pipes;
    atomic_uint_fast64_t runs; /* over gRPC */
    slabs_t *slabs;            /* NULL: a link over gRPC alone */
} grpc_link_t;

struct link_step {
    const link_ops_t *ops;
    grpc_link_t *link;
    pipe_t *pipe;
    uint64_t id;
    link_done_fn begin_done;
    void *begin_arg;
    wire_block_t lists; /* of the run in progress */
    bool ended;         /* nothing of the step is open on the stream: the pipe is clean */

    /* Of link_ucx.c. */
    slab_t *slab;                /* a reference; NULL: runs go over gRPC */
    bool no_room;                /* since it had none for the step */
    bool slot;                   /* the worker opened it */
    bool gpu;                    /* and memory of its GPU goes with it, or may */
    uint32_t lane;               /* 1 + the slab's that it asked for; 0: none */
    uint32_t first;              /* number of its lines */
    attn_shared_t *lane_memory;  /* mapped, with that lane; a reference */
    char not_driven[256];        /* why there is none */
    bool spoilt;                 /* something may be written to the slot still */
    uint64_t number;             /* of the run in progress: pipe_run_aside() */
    ucx_ask_t ask;               /* and what it asked */
    link_step_t *next, **listed; /* among those of the slab that wait; under its lock */
};

static inline grpc_link_t *
grpc_of(link_t *link)
{
    return (grpc_link_t *)(void *)link;
}

extern const link_ops_t link_grpc_ops;

/** Fill a link whose memory is the caller's; its ops stay to be set. */
attn_status_t link_grpc_init(grpc_link_t *link, rpc_client_t *rpc, const char *address);
void link_grpc_fini(grpc_link_t *link);

/** As link_ops_t.begin, with a step that is zeroed but for what link_ucx.c has set, and the slot to
 * ask for or NULL. The step is the caller's to free if this fails. */
attn_status_t link_grpc_begin_with(link_t *link, const engine_batch_t *batch, Attn__V1__Slot *slot,
                                   link_done_fn done, void *arg, link_step_t *step);

/** As link_ops_t.run. */
void link_grpc_run(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg);

#endif
