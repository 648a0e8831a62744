/*
 * engine.h: one worker without a network: the store, the plans, the kernels and the steps
 * of one device. The worker daemon puts it behind rpc; libattn links it for inproc://.
 *
 * A step here is the worker's part of a step: begin checks and reserves,
 * run stores k, v of one layer and attends, commit publishes, abort returns everything. A
 * run may be repeated: the same k, v are compared with what is stored.
 *
 * Threads: all functions may be called from any thread. The store is under one lock, never
 * held while kernels run. Runs of different steps go in parallel; the runs, commit and abort
 * of one step are taken one at a time.
 */
#ifndef ATTN_ENGINE_H
#define ATTN_ENGINE_H

#include "balancer/cost.h"
#include "base/attn_types.h"
#include "kernels/kernels.h"
#include "kvstore/kvstore.h"

#include <sys/uio.h>

#define ENGINE_LAYERS_MAX 1024u
#define ENGINE_ROWS_MAX (1u << 20) /* query rows, and new tokens, of a step */
#define ENGINE_TIMEOUT_MS_MAX 600000u
#define ENGINE_HOLD_MS_MAX 60000u       /* of a chunk, for a move */
#define ENGINE_LIST_ROOM_MAX (1u << 21) /* pages of the lists of a run */

typedef struct engine engine_t;

typedef struct engine_options {
    const char *device; /**< "cpu", "cuda:1": as attn_backend_parse() takes it */
    uint32_t threads;   /**< 0: one per core */
    /** KV memory, at least 4,096; rounded down to a multiple of that. 0: of a device with memory of
     * its own, what is free there less reserve_bytes; of others ENGINE_SLAB_BYTES. */
    uint64_t slab_bytes;
    uint64_t reserve_bytes;
    const char *name; /**< of the worker, in error sentences */
} engine_options_t;

#define ENGINE_SLAB_BYTES (UINT64_C(1) << 30)
#define ENGINE_RESERVE_BYTES (UINT64_C(2) << 30) /* enough for most */

/** @return ATTN_ERR_UNSUPPORTED device, ATTN_ERR_INVALID slab_bytes below 4,096 or too many
 * threads, ATTN_ERR_NO_MEMORY slab, or less than 1 MiB free beyond the reserve */
attn_status_t engine_create(const engine_options_t *options, engine_t **engine_p);
void engine_destroy(
    engine_t *engine); /* open steps abort, and the device is waited for; NULL is allowed */

#define ENGINE_TIMES 20u
#define ENGINE_TIME_LEAST_NS UINT64_C(2000)

/** How long layers took, to be shown as a histogram: counts[i] of them more than
 * ENGINE_TIME_LEAST_NS << (i - 1) and at most ENGINE_TIME_LEAST_NS << i; the last has no end. */
typedef struct engine_times {
    uint64_t total_ns;
    uint64_t counts[ENGINE_TIMES];
} engine_times_t;

/** Why a step was aborted, as far as it is counted: engine_abort_names[] has a word for each. */
typedef enum engine_abort {
    ENGINE_ABORT_CLIENT,   /**< its client said so */
    ENGINE_ABORT_STREAM,   /**< the stream that it was begun on ended */
    ENGINE_ABORT_DEADLINE, /**< its deadline passed */
    ENGINE_ABORT_CACHE,    /**< its cache was closed */
    ENGINE_ABORT_OTHER,
} engine_abort_t;

#define ENGINE_ABORTS 5u
extern const char *const engine_abort_names[ENGINE_ABORTS]; /* "client", "stream", ... */

/* The sentences that go with some of them. */
#define ENGINE_BY_CLIENT "its client aborted it"
#define ENGINE_BY_STREAM "its stream ended"
#define ENGINE_BY_DEADLINE "its deadline passed"

/** Which of them a sentence stands for. */
engine_abort_t engine_abort_of(const char *reason);

/** Steps since start. A begin or commit that was repeated counts once. */
typedef struct engine_steps {
    uint64_t begun, committed;
    uint64_t aborted[ENGINE_ABORTS];
} engine_steps_t;

typedef struct engine_info {
    const char *kind;
    cost_worker_t speed; /**< measured at its start */
    uint64_t slab_bytes, region_bytes, used_bytes;
    uint64_t chunks, open_steps, caches;
    uint64_t runs, kv_bytes; /**< since start */
    engine_times_t times;    /**< of `runs`: storing k, v and attention */
    engine_steps_t steps;    /**< since start */
    uint64_t epoch;
    uint32_t groups;      /**< that the device is in, and connected */
    attn_device_t device; /**< as it is now; zeros if it does not say */
    double kv_rate;       /**< KV bytes per second of the last ten: engine_tick() samples them */
} engine_info_t;

void engine_describe(engine_t *engine, engine_info_t *info);

/** What the device failed with so that it cannot be used any more in this process, which must be
 * started again: its first failure's sentence, static. NULL: it works. Any thread. */
const char *engine_failed(const engine_t *engine);

/* ---- caches and chunks: the coordinator's calls ---- */

/** The epoch known here grows to `epoch`; a request with an older one is refused: ATTN_ERR_STALE.
 * 0 is not checked. */
attn_status_t engine_check_epoch(engine_t *engine, uint64_t epoch);
void engine_set_epoch(engine_t *engine, uint64_t epoch);

/**
 * Take a region for a cache. Opening it again with the same geometry is ATTN_OK.
 * @param geometry  complete (directory_geometry_check); copied
 * @return ATTN_ERR_UNSUPPORTED, ATTN_ERR_EXHAUSTED, ATTN_ERR_EXISTS
 * @return ATTN_ERR_BUSY  one of this id was closed, and is not gone yet
 */
attn_status_t engine_cache_open(engine_t *engine, uint64_t cache, const attn_geometry_t *geometry,
                                kv_region_info_t *info);
/** Open steps on it abort; waits for parts that are being read or stored, and for the device, a
 * second in all. What is not over then keeps the cache's memory until engine_tick() finds it so;
 * for everybody else it is gone. @return ATTN_ERR_NOT_FOUND */
attn_status_t engine_cache_close(engine_t *engine, uint64_t cache);
/** Close every cache: the coordinator that made them is gone. */
void engine_caches_close(engine_t *engine);

attn_status_t engine_chunk_fork(engine_t *engine, uint64_t cache, uint64_t from, uint32_t length,
                                uint64_t to);
attn_status_t engine_chunk_truncate(engine_t *engine, uint64_t cache, uint64_t chunk,
                                    uint32_t generation, uint32_t length, uint32_t *generation_p);
/** Missing chunks count as released: no step and no arrival can make them any more (the last few
 * thousand are remembered). @return ATTN_ERR_BUSY: others are released all the same */
attn_status_t engine_chunks_release(engine_t *engine, uint64_t cache, const uint64_t *chunks,
                                    uint32_t n);
/** infos[n]; generation 0: not here. in_step[n_seqs]: is a step open on seqs[i]. */
attn_status_t engine_chunks_describe(engine_t *engine, uint64_t cache, const uint64_t *chunks,
                                     uint32_t n, kv_chunk_info_t *infos, const uint64_t *seqs,
                                     uint32_t n_seqs, bool *in_step);

#define ENGINE_EXPORT_BYTES_MAX (2u << 20) /* of k and v of one part, unless one token has more */

/** Tokens [first, first + n) of a chunk, of one layer. */
typedef struct engine_export {
    uint64_t cache, chunk;
    uint32_t generation; /**< as the caller believes */
    uint32_t layer, first, n;
} engine_export_t;

/** Bytes of k and v of one token in one layer. */
static inline uint64_t
engine_kv_row_bytes(const attn_geometry_t *g)
{
    return (uint64_t)g->kv_heads * (g->head_dim_k + g->head_dim_v) * attn_dtype_size(g->kv_dtype);
}

/**
 * Read committed tokens back, without holding anybody up: their pages are held meanwhile. Parts are
 * small, for a transport has a part in memory.
 *
 * @param k  [n][kv_heads][head_dim_k] of the cache's dtype, k_bytes; @param v likewise
 * @return ATTN_ERR_NOT_FOUND cache, chunk; ATTN_ERR_STALE generation differs; ATTN_ERR_INVALID
 *         layer, k_bytes or v_bytes, or the range ends above the committed length;
 *         ATTN_ERR_TOO_LARGE above ENGINE_EXPORT_BYTES_MAX
 */
attn_status_t engine_chunk_export(engine_t *engine, const engine_export_t *what, void *k, void *v,
                                  uint64_t k_bytes, uint64_t v_bytes);

/** Bytes of k and of v that a part has. @return as engine_chunk_export() */
attn_status_t engine_export_bytes(engine_t *engine, const engine_export_t *what, uint64_t *k_bytes,
                                  uint64_t *v_bytes);

/** Tokens of a part: as many as ENGINE_EXPORT_BYTES_MAX has room for, or one. */
static inline uint32_t
engine_part_rows(const attn_geometry_t *g)
{
    uint64_t row = engine_kv_row_bytes(g);

    return row < ENGINE_EXPORT_BYTES_MAX ? (uint32_t)(ENGINE_EXPORT_BYTES_MAX / row) : 1;
}

/**
 * Of a part, and of which part it is: XXH3, 64 bits, of k and v, one behind the other, whose seed
 * is that of chunk (8 bytes), generation, layer, first, n (4 each), little endian, with seed 0.
 */
uint64_t engine_checksum(const engine_export_t *part, const void *data, uint64_t bytes);

/* ---- chunks from one worker to another: arrival.c ---- */

/** As kv_chunk_leave(); of HOLD, until_ns is as attn_now_ns(). @return ATTN_ERR_NOT_FOUND cache */
attn_status_t engine_chunk_leave(engine_t *engine, uint64_t cache, const kv_leaving_t *leaving,
                                 kv_chunk_info_t *info);

/** Committed tokens of a chunk of another worker that are to be here. */
typedef struct engine_copy {
    uint64_t cache, chunk; /**< there */
    uint32_t generation;   /**< there */
    uint64_t copy;         /**< its id here */
    uint32_t first;        /**< so many tokens of it came before; 0: none, it is new here */
    uint32_t length;       /**< of it when this is done */
} engine_copy_t;

typedef struct engine_arrival engine_arrival_t;

/**
 * Reserve pages. All calls for one arrival come one after the other.
 * @return as kv_arrival_begin(), and ATTN_ERR_NOT_FOUND cache, or the copy was released
 */
attn_status_t engine_arrival_begin(engine_t *engine, const engine_copy_t *copy,
                                   engine_arrival_t **arrival_p);

/** Bytes of the largest part. */
uint64_t engine_arrival_part_bytes(const engine_arrival_t *arrival);

/** The part to ask for next, of the chunk there: layer after layer. False: all were asked for. */
bool engine_arrival_ask(engine_arrival_t *arrival, engine_export_t *part);

/**
 * Check a part, and put it where it belongs. Parts come in the order in which they were asked for.
 * @return ATTN_ERR_CORRUPT    it is not what the checksum was made of
 * @return ATTN_ERR_INVALID    bytes are not k and v of the part, or no part is due
 * @return ATTN_ERR_NOT_FOUND  the cache was closed meanwhile
 */
attn_status_t engine_arrival_store(engine_arrival_t *arrival, const void *data, uint64_t bytes,
                                   uint64_t checksum);

/** All is there: the chunk may be named. The arrival is gone in any case, and on failure nothing of
 * it is left. @return as kv_arrival_publish(); ATTN_ERR_INCOMPLETE parts are missing */
attn_status_t engine_arrival_publish(engine_arrival_t *arrival);
void engine_arrival_drop(engine_arrival_t *arrival); /* NULL is allowed */

/** All of that between two engines of this process. @return ATTN_ERR_DEADLINE also */
attn_status_t engine_copy_between(engine_t *from, engine_t *to, const engine_copy_t *copy,
                                  uint64_t deadline_ns);

/* ---- steps ---- */

/** One sequence of a batch as far as this worker owns it. */
typedef struct engine_entry {
    uint64_t seq;
    uint64_t base;
    uint32_t n_q;   /**< queries sent here: the entry's, or 0 */
    uint32_t n_new; /**< new tokens of the whole entry */
    uint32_t n_chunks;
    const kv_step_chunk_t *chunks; /**< ascending in number; n_new of each is what is stored here */
    uint32_t n_nodes;              /**< partials wanted; 0: answers with O */
    const attn_node_t *nodes;
    uint32_t n_lists; /**< block-sparse, as attn_entry_t */
    const uint32_t *sparse_indptr;
    const uint32_t *sparse_pages;
    /** NULL, or the entry's mask, as attn_entry_t; with n_q 0 there is none. What is stored here is
     * then every new token from the first in the chunks named to the entry's last. */
    const uint8_t *mask;
    uint32_t list_room; /**< pages of the lists that a run may bring; 0: none */
} engine_entry_t;

typedef struct engine_batch {
    uint64_t epoch; /**< 0: not checked */
    uint64_t cache;
    uint64_t step_id; /**< not 0 */
    uint32_t n;
    const engine_entry_t *entries;
    attn_dtype_t q_dtype, o_dtype;
    bool want_lse;
    /** Its tensors lie in the device's memory: for engine_step_enqueue(), not for
     * engine_step_run(). It has no nodes and no list_room. */
    bool on_device;
    /** 0, or a group that is connected here: then it merges all entries with nodes, and the answer
     * has O and LSE of this rank's share of their rows (attn_group_share()), behind those of
     * entries without. grouped: all such entries of all ranks, in the same order for each. */
    uint64_t group;
    uint32_t n_grouped;
    const attn_group_entry_t *grouped; /**< `state` is not looked at */
    uint64_t deadline_ns;              /**< the step aborts then */
} engine_batch_t;

/** Sizes of every run's tensors: what a transport must move. Bytes. */
typedef struct engine_sizes {
    uint64_t q, k, v; /**< q rows sent here; k, v rows stored here */
    uint64_t o, lse;  /**< of the entries that answer with O; lse 0 unless wanted */
    uint64_t states;  /**< partials: e, l of 4 bytes each, A of 4 * head_dim_v */
    uint64_t answer;  /**< o + lse + states * (8 + 4 * head_dim_v): the wire's order */
    bool grouped;     /**< runs wait for other ranks */
} engine_sizes_t;

/**
 * Begin. Everything is copied. The same step_id with the same batch again is ATTN_OK.
 * @return as kv_step_begin, and ATTN_ERR_STALE epoch or group, ATTN_ERR_BUSY group,
 * ATTN_ERR_NOT_FOUND cache, ATTN_ERR_INVALID rows above ENGINE_ROWS_MAX, pages, nodes,
 * ATTN_ERR_UNSUPPORTED on_device on a device that has no memory for tensors, ATTN_ERR_EXHAUSTED
 * graphs of too many shapes
 */
attn_status_t engine_step_begin(engine_t *engine, const engine_batch_t *batch,
                                engine_sizes_t *sizes);

/** @return ATTN_ERR_NOT_FOUND, or ATTN_ERR_ABORTED if it was aborted a short while ago and says why
 */
attn_status_t engine_step_sizes(engine_t *engine, uint64_t step_id, engine_sizes_t *sizes);

/**
 * One layer.
 *
 * @param q       sizes.q bytes, packed, aligned to its elements; NULL: store only
 * @param k, v    sizes.k, sizes.v bytes, likewise; both NULL: ask again about a stored layer
 * @param answer  sizes.answer bytes, 16-byte aligned, written in the wire's order: o, lse, all
 *                e, all l, all A; may be NULL with q
 * @param sizes   what the tensors were made for: their q, k, v and answer are compared with the
 *                step's; NULL: the caller knows that this is the step that it began
 *
 * @return ATTN_ERR_INVALID layer, or one of k, v alone; ATTN_ERR_CONFLICT, ATTN_ERR_NUMERIC,
 * ATTN_ERR_ABORTED, ATTN_ERR_INCOMPLETE q without k, v for a layer that was not stored
 */
attn_status_t engine_step_run(engine_t *engine, uint64_t step_id, uint32_t layer, const void *q,
                              const void *k, const void *v, void *answer,
                              const engine_sizes_t *sizes);

/** Lists of one entry for one run, in place of those of begin. */
typedef struct engine_lists {
    uint32_t entry;   /**< index in the batch */
    uint32_t n_lists; /**< 1 or kv_heads */
    const uint32_t *indptr, *pages;
} engine_lists_t;

/**
 * As engine_step_run(), with lists for this run: n of them, ascending in entry. They are not kept.
 * @return ATTN_ERR_INVALID also for a list, or one of an entry without list_room;
 *         ATTN_ERR_TOO_LARGE for more pages than that
 */
attn_status_t engine_step_run_lists(engine_t *engine, uint64_t step_id, uint32_t layer,
                                    const void *q, const void *k, const void *v, void *answer,
                                    const engine_sizes_t *sizes, const engine_lists_t *lists,
                                    uint32_t n);

/**
 * Publish the first accepted[i] new tokens of each entry (of the whole entry: tokens that other
 * workers store count); NULL: all. Committing a step that was committed is ATTN_OK (remembered
 * for a while); so idempotent.
 * Of a step on_device this waits for the device, to the step's deadline at most.
 * @return ATTN_ERR_INVALID, ATTN_ERR_INCOMPLETE with layer and token range, ATTN_ERR_ABORTED; of a
 *         step on_device also what came of its layers, ATTN_ERR_NUMERIC, ATTN_ERR_CONFLICT (such
 *         a layer may be queued anew), or ATTN_ERR_DEADLINE
 */
attn_status_t engine_step_commit(engine_t *engine, uint64_t step_id, const uint32_t *accepted,
                                 uint32_t n_accepted);

/** What to keep of a step. */
typedef struct engine_commit {
    const uint32_t *accepted; /**< [n] as engine_step_commit(): of an entry with a mask the length
                                 of its path */
    uint32_t n;
    /** The paths of the entries with a mask, one behind the other: indices of the new tokens to
     * keep, ascending. They come to stand one behind the other from the entry's base on. */
    const uint32_t *path;
    uint64_t n_path;
} engine_commit_t;

/** As engine_step_commit(), with paths. @return ATTN_ERR_INVALID also for a path */
attn_status_t engine_step_commit_paths(engine_t *engine, uint64_t step_id,
                                       const engine_commit_t *commit);

/** Are these n indices of n_new tokens, ascending? @return ATTN_ERR_INVALID */
attn_status_t engine_path_check(const uint32_t *path, uint32_t n, uint32_t n_new);

/** Abort: idempotent, unknown ids are ATTN_OK. reason goes to whoever asks for the step later. Of a
 * step that the device works for this waits a second at most; then the step is refused to
 * everybody, and a tick returns what it has when the device is through. */
attn_status_t engine_step_abort(engine_t *engine, uint64_t step_id, const char *reason);

/** The step's exchange, if it is in one, ends soon, as the step is to, and so does what waits for a
 * runner's device: before an abort that waits for its lock. Never blocks. */
void engine_step_interrupt(engine_t *engine, uint64_t step_id);

/* ---- groups of devices that merge among themselves: groups.c ---- */

#define ENGINE_HALF_MIN (1u << 20) /* bytes of half an inbox at least; at most ATTN_HALF_MAX */
#define ENGINE_PROOF_FEW 32u       /* rows */
#define ENGINE_EXCHANGE_MS 2000u   /* that a run waits for other ranks, once it has its own states \
                                    */

typedef struct engine_group_options {
    uint64_t id; /**< chosen by who makes it, the same on all ranks; not 0 */
    uint32_t ranks, me;
    uint32_t head_dim_v;
    uint64_t half_bytes; /**< of every rank's inbox; at least ENGINE_HALF_MIN */
} engine_group_options_t;

/**
 * An inbox here, for a group. That ends when a run in it fails, or a step in it aborts, or none
 * used it for 30 s.
 * @param handle  what other processes of this host map it by
 * @param device  which of the host's devices it is on; empty: not known
 * @return ATTN_ERR_UNSUPPORTED  the device is not of a kind that has groups
 * @return ATTN_ERR_EXISTS       there is one of this id
 * @return ATTN_ERR_EXHAUSTED    it is in ATTN_GROUPS_MAX groups, or has no room for such an inbox
 */
attn_status_t engine_group_open(engine_t *engine, const engine_group_options_t *options,
                                uint8_t handle[ATTN_INBOX_HANDLE], char device[ATTN_GROUP_DEVICE]);

/** All ranks' inboxes, in their order. */
typedef struct engine_inboxes {
    uint64_t group;
    uint32_t ranks;
    uint64_t half_bytes; /**< of each */
    const uint8_t (*handles)[ATTN_INBOX_HANDLE];
} engine_inboxes_t;

/**
 * Map them. That a rank of the group offered them is the caller's to be sure of. If it fails the
 * group is over.
 * @return ATTN_ERR_STALE        no such group, or what was offered is not there any more
 * @return ATTN_ERR_INVALID      the group was opened with other numbers
 * @return ATTN_ERR_EXISTS       it is connected
 * @return ATTN_ERR_UNSUPPORTED  they cannot be mapped here
 */
attn_status_t engine_group_connect(engine_t *engine, const engine_inboxes_t *inboxes);

/** Exchanges with made-up states, all ranks at once, until until_ns at most: right, and how long
 * one takes, of ENGINE_PROOF_FEW rows and of as many as fit, *many_p.
 * @return ATTN_ERR_STALE, ATTN_ERR_BUSY; otherwise as attn_group_ops_t.prove(), and it is over */
attn_status_t engine_group_prove(engine_t *engine, uint64_t id, uint64_t until_ns,
                                 double seconds[2], uint32_t *many_p);

/** It is over: its exchanges end, here and at the other ranks, and when no step is in it any more
 * it goes. Missing groups count as closed. May wait for the device. */
attn_status_t engine_group_close(engine_t *engine, uint64_t id);

/** Are there groups that are over, or that nobody used for too long? Those go, which may wait for
 * the device: not where steps are looked after. */
bool engine_groups_due(engine_t *engine, uint64_t now_ns);
void engine_groups_sweep(engine_t *engine, uint64_t now_ns);

/** Which of the host's devices it is. @return false: of none that has groups */
bool engine_group_device(const engine_t *engine, char device[ATTN_GROUP_DEVICE]);

/** Groups that are connected. */
uint32_t engine_groups_count(engine_t *engine);

/* ---- steps whose tensors are in the device's memory ---- */

/*
 * What such a step does is queued on streams of the caller, and its marks are read when it commits:
 * only then is it known which layers were stored, and whether all went well. A graph that was
 * captured of one step may be launched for any other with the same engine_step_graph().
 * All tensors of a step are in the host's memory or all in the device's. See attn_track_ops_t.
 */

/** Which GPU it is whose memory tensors may lie in; -1: none. */
int engine_gpu(const engine_t *engine);

/** A layer: q, k and v as attn_track_call_t; o and lse packed. */
typedef struct engine_call {
    uint32_t layer;
    const attn_rows_t *q, *k, *v; /**< NULL as in engine_step_run() */
    void *o;
    float *lse;
    void *stream;
} engine_call_t;

/**
 * Queue a layer of a step that was begun on_device; nothing waits, is allocated or copied.
 * @return ATTN_ERR_INVALID layer, pointers, one of k, v alone, or a step not begun so;
 *         ATTN_ERR_ABORTED, ATTN_ERR_NOT_FOUND
 */
attn_status_t engine_step_enqueue(engine_t *engine, uint64_t step_id, const engine_call_t *call);

/** Before and, with `launched`, after the launch of a graph that was captured of such a step. */
attn_status_t engine_step_replay(engine_t *engine, uint64_t step_id, void *stream, bool launched);

/** What graphs are known by: not 0. @return ATTN_ERR_INVALID  a step not begun so */
attn_status_t engine_step_graph(engine_t *engine, uint64_t step_id, uint64_t *graph_p);

/** As engine_step_run(), with tensors in the device's memory: queued on a stream of our own, and
 * waited for. call->stream is not looked at. Of any step without nodes and list_room.
 * @return ATTN_ERR_DEADLINE also if the device is not through by the step's */
attn_status_t engine_step_run_device(engine_t *engine, uint64_t step_id, const engine_call_t *call);

/** Have what a step needs so that engine_step_run_lent() may be called of it. Its runs may have
 * their tensors in the host's memory all the same: all of them, or none.
 * @return as engine_step_begin() of a step on_device; ATTN_ERR_UNSUPPORTED also if it has nodes or
 *         list_room */
attn_status_t engine_step_lend(engine_t *engine, uint64_t step_id);

/**
 * As engine_step_run(), with tensors in the device's memory, which are lent for the call alone: it
 * returns when nothing of them is read or written any more, however late that is. Everything is
 * packed, and begins at multiples of 16 bytes.
 * @return as both; ATTN_ERR_CONFLICT also if sizes are not the step's
 */
attn_status_t engine_step_run_lent(engine_t *engine, uint64_t step_id, uint32_t layer, void *q,
                                   void *k, void *v, void *answer, const engine_sizes_t *sizes);

/** Memory of this device that a runner's device has, too, and brings layers by: kernels/lane.h. */
typedef struct engine_lane {
    uint8_t *at;
    uint64_t bytes;
    uint32_t first;          /**< the number of layer 0; not 0 */
    void (*gone)(void *arg); /**< called once the device is through with it, however late */
    void *arg;
} engine_lane_t;

/**
 * Have a step that lend() was called of wait on the device for its layers: from 0 on, each once and
 * with all its tensors, from the lane, where their answers go. Its layers come no other way then;
 * it commits and aborts as ever, and what did not come by the commit is ATTN_ERR_INCOMPLETE. On
 * failure the step is as it was, and `gone` is not called, but for the last.
 * @return ATTN_ERR_INVALID      it had runs before
 * @return ATTN_ERR_EXHAUSTED, ATTN_ERR_TOO_LARGE, ATTN_ERR_UNSUPPORTED  as attn_track_ops_t.drive
 * @return ATTN_ERR_INTERNAL     the driver failed: the step is aborted
 */
attn_status_t engine_step_drive(engine_t *engine, uint64_t step_id, const engine_lane_t *lane);

/** Abort the steps whose deadline passed, let chunks go that a move held too long, and caches that
 * were closed while the device worked for them. Call every 100 ms or so. */
void engine_tick(engine_t *engine, uint64_t now_ns);

/** kv_store_check() under the lock: for tests. */
attn_status_t engine_check(engine_t *engine);

#endif
