/* step_int.h: a step of libattn, and its shares: what each worker does of it. */
#ifndef ATTN_STEP_INT_H
#define ATTN_STEP_INT_H

#include "client/client_int.h"

/** A piece of a tensor, in bytes from its start. */
typedef struct span {
    uint64_t offset, bytes;
} span_t;

/** One worker's share of the step. */
typedef struct share {
    attn_step_t *step;
    const split_share_t *split;
    link_t *link;
    link_step_t *remote; /* NULL until begun */
    bool outstanding;    /* a call of ours is on its way; under step->lock */
    bool ranked;         /* it is a rank of the step's group */
    uint32_t rank;

    span_t *q, *k, *v, *o, *lse; /* of the caller's packed tensors */
    uint32_t n_q, n_k, n_v, n_o, n_lse;
    struct iovec *pieces;  /* the same as pointers, rebuilt each run */
    engine_lists_t *lists; /* [parts] of the run in progress, if any entry has list_room */
    uint64_t n_states;
    uint8_t *states;     /* partials as they come: all e, all l, all A */
    uint32_t *accepted;  /* [parts] at commit */
    uint32_t *path;      /* of its parts with a mask, at commit: room for all their new tokens */
    uint64_t compute_ns; /* of the last run */
    uint64_t run_ns;     /* when it was sent */
    uint64_t run_bytes;  /* of it, there and back; 0: it is not to be measured */
} share_t;

/** One partial of an entry: a node of the merge tree, and where its states are. */
typedef struct partial {
    uint32_t key; /* first key below the node */
    share_t *share;
    uint64_t state; /* index of its first state in the share's */
} partial_t;

/** How one entry's answer comes together. */
typedef struct gather {
    uint32_t entry;
    uint64_t row; /* its first query row in the batch */
    uint32_t n_partials;
    partial_t *partials; /* ascending in key */
} gather_t;

typedef struct step_entry {
    attn_seq_t seq;
    uint64_t base;
    uint32_t n_q, n_new;
    uint64_t q_row, new_row; /* first row in the batch */
    bool masked;
    uint32_t list_room;
} step_entry_t;

/** Tensors of a run: q, k, v, o and the LSE, and their number. */
enum { TENSOR_Q, TENSOR_K, TENSOR_V, TENSOR_O, TENSORS, TENSOR_LSE = TENSORS, STAGES };

struct attn_step {
    attn_cache_t *cache;
    attn_client_t *client; /* the cache may be closed while the housekeeper still holds the step */
    uint64_t id;
    _Atomic uint64_t deadline_ns; /* the housekeeper looks at it */
    attn_dtype_t q_dtype, o_dtype;
    bool want_lse;

    uint32_t n;
    step_entry_t *entries;
    uint64_t q_rows, new_rows;
    split_t *split;
    uint32_t n_shares;
    share_t *shares;
    uint32_t n_gathers;
    gather_t *gathers;    /* entries answered with partials */
    uint8_t *stored;      /* [layers] */
    uint64_t list_room;   /* of all entries */
    attn_memory_t memory; /* as begin said */
    bool on_device;       /* begun so at its one worker: layers are enqueued */
    bool on_stream;       /* they are to be, as begin said, from ... */
    uint32_t stream_gpu;  /* ... this GPU */
    link_drive_t drive;   /* what was asked of a worker elsewhere; no lane: nothing */
    link_driven_t driven; /* and where its lane is */
    bool is_driven;       /* the worker waits for its layers there; under client->lock */
    char not_driven[256]; /* why not */
    bool dead;            /* a share failed for good */
    group_t *group;       /* NULL: what comes as partials is merged here */
    group_wish_t wish;    /* that it was taken for */
    bool group_whole;     /* it is fit for the next step */
    bool rank_failed;     /* a rank's run did, and the others' were cancelled; under lock */
    uint32_t n_grouped;   /* entries that it merges */
    attn_group_entry_t *grouped;
    uint64_t *grouped_rows; /* the first query row of each in the batch */
    atomic_bool aborting;
    bool given_up;      /* the keeper is to abort it; under client->lock */
    uint32_t looked_at; /* the housekeeper's round; under client->lock */

    /* The call in progress: one share's done after the other, then finish. */
    pthread_mutex_t lock;
    uint32_t pending;
    attn_status_t status; /* first failure */
    char sentence[512];
    atomic_bool idle;    /* nothing is pending */
    atomic_uint calling; /* completions that have not returned */

    /* The run in progress. */
    uint32_t layer;
    bool runs_kv;
    attn_tensor_t o_to; /* where the caller wants o, if it is not packed; else data is NULL */
    void *o;
    float *lse;
    uint8_t *packed[4]; /* q, k, v, o of strided tensors */
    uint64_t packed_bytes[4];
    float *lse_unwanted; /* want_lse, but this run does not */
    attn_done_fn done;
    void *done_arg;

    /* Tensors of a GPU: of the run in progress, unless they are enqueued. */
    engine_call_t call; /* what the worker gets of them where they are ... */
    attn_rows_t rows[TENSORS];
    bool direct;  /* ... if it does; else they are copied: through stages, or to the worker's GPU */
    bool staging; /* they are on their way there */
    bool staged;  /* o and LSE are to go back from there */
    bool mapped_run;                               /* there is the worker's GPU */
    enum { WAY_OPEN, WAY_STAGED, WAY_MAPPED } way; /* as the step's first run went */
    int mapped_gpu;                                /* whose tensors it had; -1: the host's */
    link_mapped_t mapped;                          /* where they go */
    uint64_t mapped_in, mapped_out;                /* bytes of it that the run has taken */
    attn_packed_t packed_at[STAGES];               /* the copies of its tensors */
    attn_run_t staged_run;
    attn_step_t *carried; /* the next; under the carrier's lock */
    attn_tensor_t staged_tensors[TENSORS], o_on_gpu;
    float *lse_on_gpu;
    struct stages *stages; /* NULL: none were needed yet */

    uint32_t references; /* under client->lock */
    attn_step_t *next, **link;
};

/* ---- one call to all shares: start, a share_start for each with step_share_done as its done, then
 * started; the call is over when all are done ---- */

void step_call_start(attn_step_t *step);
void step_share_start(share_t *share);
void step_share_done(void *share, attn_status_t status, const char *sentence); /* a link_done_fn */
void step_call_started(attn_step_t *step);

/** A rank's run failed: before it is done. The others', which wait for it, are cancelled: who
 * cannot tell whether it failed before its exchange must not have them wait. That ends the step. */
void step_rank_failed(share_t *share, attn_status_t status, const char *sentence);

/** The same for those that were not asked yet when a rank failed: when all are. */
void step_cancel_ranks(attn_step_t *step);

/** Does a step go on after a run that failed so? Wrong arguments leave it as it was. */
bool step_survives(attn_status_t status);

/** Wait for the end of the call; overdue parts are cancelled. Sets the sentence. */
attn_status_t step_call_wait(attn_step_t *step, uint64_t deadline_ns);

/** Call done; step->calling counts it already. The step may be gone afterwards. */
void step_complete(attn_step_t *step, attn_done_fn done, void *arg, attn_status_t status,
                   const char *sentence);

/** @return ATTN_ERR_INVALID  `call` waits, and this is a completion: nobody else would make
 * progress */
attn_status_t step_may_wait(const char *call);

/** The end of a run without a waiter: completes it and calls its done. */
void step_run_finish(attn_step_t *step);

/** Abort at every worker that began, and wait a while for it. */
void step_abort_shares(attn_step_t *step);

/* ---- step_device.c: tensors of a GPU ---- */

/** Check a tensor, and fill in its strides. */
attn_status_t step_tensor_check(const attn_tensor_t *tensor, const char *name, attn_dtype_t dtype,
                                uint32_t heads, uint32_t dim, attn_tensor_t *complete);

/** May the tensors of the step's runs lie in the memory of its worker's GPU? -1: no. */
int step_gpu(const attn_step_t *step);

/**
 * Where a run's tensors are. In the host's memory *out is the run; those of a GPU become
 * step->call if its worker can work there (step->direct), else *out names copies of them, which are
 * on their way (step->staging): step_tensors_wait() comes before anything reads them. Without
 * `waits` they may not have set out yet: then step_tensors_look() sends them.
 * @return ATTN_ERR_INVALID   some are here and some there
 * @return ATTN_ERR_INTERNAL  the driver refused: the step is over; likewise below
 */
attn_status_t step_tensors_take(attn_step_t *step, const attn_run_t *run, bool waits,
                                attn_run_t *out);

/** What a run answered goes back where the caller has it: is on its way, too. */
attn_status_t step_tensors_return(attn_step_t *step);

/** Wait until the tensors are there; 0 looks. @return ATTN_ERR_DEADLINE  they are not */
attn_status_t step_tensors_wait(attn_step_t *step, uint64_t until_ns);

/** Are they? Those of step->staged_run that were put off set out as soon as they can. */
attn_status_t step_tensors_look(attn_step_t *step);

/** Is all of it on one worker, and needs nothing but its tensors? */
bool step_is_whole(const attn_step_t *step);

/* ---- step_driven.c: layers that the runner's GPU brings to the worker's ---- */

/** Before begin there: what to ask for, if the step is to be driven. */
void step_driven_ask(attn_step_t *step, link_room_t *room);

/** It has begun there: so it is driven, or it is known why not. @return ATTN_ERR_INTERNAL */
attn_status_t step_driven_begin(attn_step_t *step);

/** step->call has the tensors; as attn_step_enqueue() and so on. */
attn_status_t step_driven_enqueue(attn_step_t *step, const attn_run_t *run, void *stream);
uint64_t step_driven_graph(const attn_step_t *step);
attn_status_t step_driven_replay(attn_step_t *step, void *stream, bool launched);

/** Wait for what was enqueued. @return ATTN_ERR_ABORTED, ATTN_ERR_DEADLINE: it is over */
attn_status_t step_driven_finish(attn_step_t *step);

/** Its waits end. Any thread. */
void step_driven_abort(attn_step_t *step);

/** Before its remotes are freed. */
void step_driven_free(attn_step_t *step);

/* ---- carrier.c: copies that nobody waits for ---- */

/** A submitted run whose copies are on their way: when they are there, or its deadline is, it goes
 * on with step_run_carried(), on a thread of the client's. @return ATTN_ERR_NO_MEMORY */
attn_status_t step_carry(attn_step_t *step);

/** Its copies ended so. The step may be gone afterwards. */
void step_run_carried(attn_step_t *step, attn_status_t status);

/** May its runs' tensors be copied to the GPU of its worker? Before begin there. */
bool step_may_map(const attn_step_t *step);

/** No run of it is in progress: what it has of stages, and of the worker's GPU. Before its remotes
 * are freed. */
void step_stages_free(attn_step_t *step);

/** Into the client's list of open steps, and out of it: freed when nobody looks at it any more. */
void step_publish(attn_step_t *step);
void step_retire(attn_step_t *step);
void step_free(attn_step_t *step); /* one that was never published */

/** The step's part of begin that needs no network: spans, gathers, buffers. */
attn_status_t step_layout(attn_step_t *step);

/** Append a span, joined to the one before if it follows it. */
void span_add(span_t *spans, uint32_t *n, uint64_t offset, uint64_t bytes);

/** The link to a worker. */
attn_status_t step_link(const attn_step_t *step, uint32_t worker, link_t **link_p);

/* ---- step_group.c: partials that workers merge among themselves ---- */

/** When it is split: a group for it, if there is to be one. @return what was wrong with that, where
 * the client's options say that there must be one */
attn_status_t step_group(attn_step_t *step);

/** Its shares are there: those that are ranks, and what of the answer comes from them. */
void step_group_ranks(attn_step_t *step);
void step_group_spans(const attn_step_t *step, share_t *share, uint64_t o_row, uint64_t lse_row);

/** The step is over. */
void step_group_give(attn_step_t *step);

/** Merge and finish the entries that came as partials. */
void step_gather(attn_step_t *step);

#endif
