/*
 * link.h: the way to one worker: the transport table. A row for engines inside the process, one
 * for gRPC, and one for UCX, which is the gRPC one with another way for runs.
 *
 * Control calls block until their deadline. A step's calls are asynchronous: `done` is
 * called exactly once, on a progress thread or inside the call itself, with no lock held.
 */
#ifndef ATTN_LINK_H
#define ATTN_LINK_H

#include "client/attn.h"
#include "client/way_meter.h"
#include "engine/engine.h"
#include "kernels/lane.h"
#include "kernels/memory.h"
#include "rpc/ucx.h"

typedef struct link link_t;
typedef struct link_step link_step_t; /* one worker's part of one open step */

typedef void (*link_done_fn)(void *arg, attn_status_t status, const char *sentence);

/** Tensors of one run, as pieces: nothing of them is touched after done. */
typedef struct link_run {
    uint32_t layer;
    const struct iovec *q, *k,
        *v;                     /**< pieces that follow each other; together engine_sizes_t bytes */
    uint32_t n_q, n_k, n_v;     /**< pieces; n_q = 0: no q; n_k = 0: no k, v */
    const struct iovec *answer; /**< room for the answer, in the wire's order, as pieces */
    uint32_t n_answer;
    const engine_lists_t *lists; /**< for this run; what they point to stays until done, too */
    uint32_t n_lists;
    uint64_t *compute_ns; /**< set before done: how long it took there, without the way */
    bool waits;           /**< the caller goes on to wait for the rpc client */
    /** NULL, or the run's tensors in the memory of the link's GPU, in place of all pieces. */
    const engine_call_t *device;
    /** q, k and v are where map() said, and the answer is to be there: of pieces only the lengths
     * count. */
    bool mapped;
} link_run_t;

/** An inbox of a rank, as its worker offered it and others take it: proto, Inbox. */
typedef struct link_inbox {
    engine_group_options_t of;
    char host[96], device[ATTN_GROUP_DEVICE];
    uint8_t handle[ATTN_INBOX_HANDLE], mac[32];
} link_inbox_t;

/** How long exchanges of a group took. */
typedef struct link_proof {
    double few_seconds, many_seconds; /**< of ENGINE_PROOF_FEW rows, and of: */
    uint32_t many;
} link_proof_t;

/** A step whose layers the GPU of its runner is to bring to the worker's. */
typedef struct link_drive {
    attn_lane_t *lane; /**< the runner's half */
    int gpu;
    bool shared; /**< also where both processes have one GPU */
    uint32_t layers;
    attn_lane_sizes_t sizes; /**< of a layer */
} link_drive_t;

/** Where it does, of a step that has begun. */
typedef struct link_driven {
    attn_shared_t *memory; /**< a reference */
    uint8_t *at;
    uint32_t first;
} link_driven_t;

/** The most that a run of a step takes there and back. Bytes. */
typedef struct link_room {
    uint64_t in; /**< q, k and v together */
    uint64_t out;
    bool gpu;     /**< its tensors may be in a GPU's memory: map() is called, if the link has it */
    bool insists; /**< and are to go there from GPU to GPU: begin may wait for what that takes */
    const link_drive_t *drive; /**< NULL, or to be driven: driven() is called, if the link has it */
} link_room_t;

/** Where the tensors of a step's runs are to be in memory of the worker's GPU that this process has
 * mapped: q, k and v side by side, as many of them as a run has, and the answer. */
typedef struct link_mapped {
    attn_shared_t *memory; /**< a reference */
    uint8_t *in, *out;
    uint64_t in_bytes, out_bytes;
} link_mapped_t;

/* What a head in shared memory says of its run, in ucx_head_t.flags: its data is q, k, v but for
 * ... */
#define LINK_NO_Q UINT32_C(1)
#define LINK_NO_KV UINT32_C(2)
/* ... and it, and its answer, are in the memory of the worker's GPU that goes with the slab */
#define LINK_ON_GPU UINT32_C(4)

#define LINK_PING_MAX (1u << 20)

typedef struct link_ops {
    const char *name;       /**< "engine", "grpc", "ucx" */
    uint64_t run_bytes_max; /**< of q, k and v of one run together; 0: no limit */
    void (*close)(link_t *link);

    /** There and back with so many bytes each way, at most LINK_PING_MAX, for its time. */
    attn_status_t (*ping)(link_t *link, uint32_t bytes, uint64_t deadline_ns);

    attn_status_t (*cache_open)(link_t *link, uint64_t epoch, uint64_t cache, const char *name,
                                const attn_geometry_t *geometry, uint64_t deadline_ns,
                                kv_region_info_t *info);
    attn_status_t (*cache_close)(link_t *link, uint64_t epoch, uint64_t cache,
                                 uint64_t deadline_ns);
    attn_status_t (*chunk_fork)(link_t *link, uint64_t epoch, uint64_t cache, uint64_t from,
                                uint32_t length, uint64_t to, uint64_t deadline_ns);
    attn_status_t (*chunk_truncate)(link_t *link, uint64_t epoch, uint64_t cache, uint64_t chunk,
                                    uint32_t generation, uint32_t length, uint32_t *generation_p,
                                    uint64_t deadline_ns);
    attn_status_t (*chunks_release)(link_t *link, uint64_t epoch, uint64_t cache,
                                    const uint64_t *chunks, uint32_t n, uint64_t deadline_ns);
    attn_status_t (*chunks_describe)(link_t *link, uint64_t cache, const uint64_t *chunks,
                                     uint32_t n, kv_chunk_info_t *infos, const uint64_t *seqs,
                                     uint32_t n_seqs, bool *in_step, uint64_t deadline_ns);

    /** As engine_chunk_export(). */
    attn_status_t (*chunk_export)(link_t *link, const engine_export_t *what, void *k, void *v,
                                  uint64_t k_bytes, uint64_t v_bytes, uint64_t deadline_ns);

    /** Have tokens of a chunk there, from another worker, to which `source` is a link of the same
     * row: as engine_copy_between(). */
    attn_status_t (*chunk_copy)(link_t *link, link_t *source, uint64_t epoch,
                                const engine_copy_t *copy, uint64_t deadline_ns);

    /** As engine_chunk_leave(), but for HOLD: until_ns is for how long, ENGINE_HOLD_MS_MAX at most;
     * and info's n_pages may be 0. */
    attn_status_t (*chunk_leave)(link_t *link, uint64_t epoch, uint64_t cache,
                                 const kv_leaving_t *leaving, uint64_t deadline_ns,
                                 kv_chunk_info_t *info);

    /**
     * Begin a step there. On ATTN_OK *step_p is set, and done tells, or has told, how begin
     * went; step_free it in any case. The batch may go when the call returns.
     */
    attn_status_t (*begin)(link_t *link, const engine_batch_t *batch, const link_room_t *room,
                           link_done_fn done, void *arg, link_step_t **step_p);

    /** One at a time. The pieces' arrays are the caller's until done. */
    void (*run)(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg);
    /** What `commit` points to may go when the call returns. */
    void (*commit)(link_step_t *step, const engine_commit_t *commit, link_done_fn done, void *arg);

    void (*abort)(link_step_t *step, link_done_fn done, void *arg);

    /** Give up what is outstanding: its done is called soon, with ATTN_ERR_DEADLINE or what came
     * first. */
    void (*cancel)(link_step_t *step);

    /** Free. Nothing may be outstanding. A step neither committed nor aborted is aborted by the
     * worker when it notices. NULL is allowed. */
    void (*step_free)(link_step_t *step);

    /**
     * Where tensors of a GPU of this process may be copied to, and the answer from, of a step that
     * has begun. NULL: no such link.
     * @param insists   also where the host's memory is likely to be faster
     * @param until_ns  it may wait so long; 0: not at all
     * @return ATTN_ERR_UNSUPPORTED and such, with the reason why they go through the host's memory;
     *         ATTN_ERR_DEADLINE  it is not mapped yet
     */
    attn_status_t (*map)(link_step_t *step, int gpu, bool insists, uint64_t until_ns,
                         link_mapped_t *mapped);
    /** Copies to there, or from there, go on: before step_free(). */
    void (*adrift)(link_step_t *step);

    /**
     * Was it agreed with the worker that the step is driven, when it began? Then layers come no
     * other way. NULL: no such link.
     * @return ATTN_ERR_UNSUPPORTED and such, with the reason why not
     */
    attn_status_t (*driven)(link_step_t *step, link_driven_t *driven);
    /** The runner's half is not the step's any more: before step_free(). */
    void (*undrive)(link_step_t *step);

    /* Of links whose worker shares this process' GPU; NULL: no such link. */

    /** As engine_gpu(). */
    int (*gpu)(link_t *link);
    /** As the engine's calls of these names, of a step that was begun on_device. */
    attn_status_t (*enqueue)(link_step_t *step, const engine_call_t *call);
    attn_status_t (*replay)(link_step_t *step, void *stream, bool launched);
    attn_status_t (*graph)(link_step_t *step, uint64_t *graph_p);

    /* Groups of workers that merge among themselves; NULL: not over such links. */

    /** As engine_group_open() and so on. */
    attn_status_t (*group_open)(link_t *link, const engine_group_options_t *options,
                                uint64_t deadline_ns, link_inbox_t *inbox);
    attn_status_t (*group_connect)(link_t *link, const link_inbox_t *inboxes, uint32_t ranks,
                                   uint64_t deadline_ns);
    attn_status_t (*group_prove)(link_t *link, uint64_t group, uint64_t deadline_ns,
                                 link_proof_t *proof);
    attn_status_t (*group_close)(link_t *link, uint64_t group, uint64_t deadline_ns);

    /** Which way runs go, and went. */
    void (*describe)(link_t *link, attn_link_info_t *info);
} link_ops_t;

struct link {
    const link_ops_t *ops; /* first member of every row's own struct */
    way_meter_t meter;     /* what runs take there; zeroed at first */
    char gpu_reason[256];  /* link_note_gpu() */
};

/** Which way the last step there with tensors of a GPU had them go: through the host's memory, and
 * why; or, if that is empty, to the worker's GPU. Any thread. */
void link_note_gpu(link_t *link, const char *reason);

/** The engine's link; the engine stays the caller's. */
attn_status_t link_engine_open(engine_t *engine, link_t **link_p);

/** A link over gRPC to a worker's address; connects when first used. */
attn_status_t link_grpc_open(rpc_client_t *rpc, const char *address, link_t **link_p);

/**
 * A link over gRPC whose runs go through shared memory, where the worker lends some.
 * @param strict  begin fails where it does not; else runs go over gRPC then
 */
attn_status_t link_ucx_open(rpc_client_t *rpc, ucx_asks_t *asks, const char *address, bool strict,
                            link_t **link_p);

/* ---- the links of a process, by the worker's address ---- */

typedef struct links links_t;

/** @param rpc  for gRPC links; the caller's, outlives links */
attn_status_t links_create(rpc_client_t *rpc, links_t **links_p);
void links_destroy(links_t *links);

/**
 * Which way runs go, over links that are made from now on: before the first of them.
 * @param transport  ATTN_TRANSPORT_DEFAULT: as $ATTN_TRANSPORT says (auto, grpc, ucx), or auto
 * @return ATTN_ERR_INVALID  it is none, or $ATTN_TRANSPORT is
 */
attn_status_t links_set_transport(links_t *links, attn_transport_t transport);

/** What was made of asks: NULL, or to be destroyed after the rpc client. */
ucx_asks_t *links_asks(const links_t *links);

/** All links that are not to engines; infos[room]. @return how many there are */
uint32_t links_describe(links_t *links, attn_link_info_t *infos, uint32_t room);

/** The slowest of those that had runs of late (way_meter.h), by what these took; engines are left
 * out. @return false: not known */
bool links_meter(links_t *links, cost_link_t *link);

/** The worker at this address ("inproc:0") is the engine; takes the engine over. */
attn_status_t links_add_engine(links_t *links, const char *address, engine_t *engine);

/** NULL: it was never asked for. */
link_t *links_find(links_t *links, const char *address);

/** The link to a worker, made when first asked for; lives as long as links. */
attn_status_t links_get(links_t *links, const char *address, link_t **link_p);

#endif
