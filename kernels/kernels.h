/*
 * kernels.h: attention, merge, append and copy over paged KV, as one table of
 * operations per backend. Knows nothing of networks, sequences or steps.
 *
 * The problem is given in lengths and page lists (attn_problem_t). From it alone
 * balancer/plan.h makes an attn_plan_t, which every layer with the same window and
 * causality reuses; a backend executes the plan. The plan decides who computes a
 * leaf, never what a leaf is: see docs/numerics.md.
 *
 * The words (leaf, chunk, partial, merge) are those of docs/numerics.md.
 */
#ifndef ATTN_KERNELS_H
#define ATTN_KERNELS_H

#include "base/attn_types.h"
#include "kernels/groups.h"

/* ---- the merge tree (docs/numerics.md) ---- */

/*
 * Chunk c belongs to lane c % 64. The tree is binary over c / 64 inside a lane, then
 * over the lanes in bit-reversed order. That is one binary trie over 32-bit keys:
 *     key(c) = bit_reverse_6(c % 64) << 26 | c / 64
 * A node is (level, key >> level): level 0 is a chunk, level 32 the root. Absent
 * nodes are empty states, and merging with empty copies, so the number of chunks
 * need not be known. Chunks are numbered below 2^32.
 */
typedef struct attn_node {
    uint32_t level; /**< 0 to 32 */
    uint32_t index; /**< key >> level */
} attn_node_t;

static inline uint32_t
attn_tree_key(uint32_t chunk)
{
    uint32_t lane = chunk % 64; /* its bits in pairs, then the three pairs */

    lane = (lane & 0x15) << 1 | (lane >> 1 & 0x15);
    lane = (lane & 0x03) << 4 | (lane & 0x0c) | lane >> 4;
    return lane << 26 | chunk / 64;
}
uint32_t attn_tree_chunk(uint32_t key);

/** Level of the lowest common ancestor of two different keys: 1 to 32. */
uint32_t attn_tree_lca(uint32_t key_a, uint32_t key_b);

/**
 * The maximal nodes all of whose present chunks are owned: what one owner sends.
 *
 * @param mine    [n_mine] chunk numbers owned, any order, no duplicates
 * @param others  [n_others] chunk numbers present elsewhere
 * @param nodes   [n_mine] room; filled in ascending key order
 * @return number of nodes: at most n_mine; 0 if n_mine is 0. With n_others = 0 it is 1 (the root).
 */
uint32_t attn_tree_frontier(const uint32_t *mine, uint32_t n_mine, const uint32_t *others,
                            uint32_t n_others, attn_node_t *nodes);

/* ---- states ---- */

/*
 * Strided view of partials of many rows, as kernels keep them: row r at
 * a + r * a_stride, l[r], e[r]. attn_state_t of attn.h is the packed case.
 * The exact operations are the same on every backend and in libattn.
 */

/** into = merge(into, from) for one row. No contraction, no flushing of subnormals. */
void attn_state_merge_row(float *a_into, float *l_into, int32_t *e_into, const float *a_from,
                          float l_from, int32_t e_from, uint32_t d);

/** 2^k exactly, for k <= 0; 0 below -126. */
float attn_exp2i(int32_t k);

/** log2 of a positive finite float by our own routine: the same operations everywhere. */
float attn_log2(float x);

/** e^x for finite float x in double, own routine, for sinks: returned as state (l, e) with l in [1,
 * 2). */
void attn_state_of_sink(float sink, float *l, int32_t *e);

/** o[d] = A / l, or zeros if empty. sink_or_null adds a sink before the division. */
void attn_state_finish_row(const float *a, float l, int32_t e, uint32_t d,
                           const float *sink_or_null, float *o, float *lse_or_null);

/** State of (o[d], lse): l in [1, 2), A = o * l. */
void attn_state_from_row(const float *o, float lse, uint32_t d, float *a, float *l, int32_t *e);

/* ---- element types ---- */

/** Convert n elements between dtypes: round to nearest even; NaN stays NaN; f16 overflow gives inf.
 */
void attn_convert(void *to, attn_dtype_t to_type, const void *from, attn_dtype_t from_type,
                  uint64_t n);

/* ---- masks over new tokens ---- */

/*
 * A mask has a row for each query of an entry and a bit for each of its n_new new tokens: token j
 * of row i is bit j % 8, least significant first, of byte i * attn_mask_row_bytes(n_new) + j / 8.
 *
 * A row names a path. Its query sees what it would see if the tokens named were the step's only
 * new ones, one behind the other from position base on, and if it stood at the last of them.
 */
static inline uint64_t
attn_mask_row_bytes(uint32_t n_new)
{
    return ((uint64_t)n_new + 7) / 8;
}

static inline bool
attn_mask_bit(const uint8_t *row, uint32_t token)
{
    return row[token / 8] >> token % 8 & 1;
}

/** Tokens that a row names. */
uint32_t attn_mask_count(const uint8_t *row, uint32_t n_new);

/**
 * Is the mask one? Reads n_q * attn_mask_row_bytes(n_new) bytes, once the numbers are in bounds.
 * @return ATTN_ERR_TOO_LARGE  n_new is above ATTN_MASK_TOKENS_MAX
 * @return ATTN_ERR_INVALID    n_q is 0 or above n_new, a row names no token, or has a bit set
 *                             beyond n_new
 */
attn_status_t attn_mask_check(const uint8_t *mask, uint32_t n_q, uint32_t n_new);

/* ---- the problem ---- */

/** KV of one layer of one cache in a slab: what kernels read and write. */
typedef struct attn_kv {
    void *k;                /**< [pages][kv_heads][page_size][head_dim_k], 16-byte aligned */
    void *v;                /**< [pages][kv_heads][page_size][head_dim_v], 16-byte aligned */
    uint64_t k_page_stride; /**< elements from page to page */
    uint64_t v_page_stride;
    uint64_t n_pages; /**< page indices are below this */
    attn_dtype_t dtype;
    uint32_t kv_heads, head_dim_k, head_dim_v;
    uint32_t page_size;  /**< tokens */
    uint32_t chunk_size; /**< tokens */
} attn_kv_t;

/** The part of a sequence in one chunk that this worker holds: one BSR row. */
typedef struct attn_kv_run {
    uint32_t chunk;        /**< number c of the chunk in its sequence: its first token stands at c *
                              chunk_size */
    uint32_t length;       /**< tokens, 1 to chunk_size: committed and the step's own */
    const uint32_t *pages; /**< [ceil(length / page_size)] page indices */
} attn_kv_run_t;

/** One sequence of the batch, as far as this worker holds it. */
typedef struct attn_problem_entry {
    uint64_t kv_length; /**< tokens of the whole sequence, the step's own included */
    uint32_t n_q;       /**< query i stands at position kv_length - n_q + i, unless masked */
    uint32_t n_runs;
    const attn_kv_run_t *runs; /**< [n_runs] ascending in chunk; chunks held elsewhere are absent */
    /** Nodes to answer with, ascending in key; n_nodes = 0 answers with O (all KV is here). */
    uint32_t n_nodes;
    const attn_node_t *nodes;
    /** Block-sparse: as attn_entry_t, page numbers of the sequence; n_lists = 0 is dense.
     * Positions from dense_from on (the step's own tokens) are attended to in any case. */
    uint32_t n_lists;
    const uint32_t *sparse_indptr;
    const uint32_t *sparse_pages;
    uint64_t dense_from;
    /** The lists may be put in place of others, of n_lists 0 to kv_heads, between two attends of
     * one plan: it is made for any. */
    bool lists_change;
    /** NULL, or the mask of the n_q queries over the last mask_tokens tokens: which of those a
     * query sees, whether or not the layer is causal, and where it stands. */
    const uint8_t *mask;
    uint32_t mask_tokens;
} attn_problem_entry_t;

typedef struct attn_problem {
    uint32_t n;
    const attn_problem_entry_t *entries;
    uint32_t q_heads, kv_heads, head_dim_k, head_dim_v;
    uint32_t page_size, chunk_size;
    /* Of the layers that share this plan: */
    uint64_t window; /**< 0: none */
    bool causal;
} attn_problem_t;

/* ---- the plan ---- */

typedef struct attn_plan attn_plan_t; /* kernels/plan_types.h; made by balancer/plan.h */

/* ---- the backend table ---- */

/**
 * Where the answer of one attend goes. Rows of o and lse are packed over those entries,
 * in order, that answer with O: an entry with nodes takes no room in them. Counts are in
 * attn_plan_describe().
 */
typedef struct attn_answer {
    void *o; /**< [o_rows][q_heads][head_dim_v] of o_dtype; NULL if there are none, or not wanted */
    attn_dtype_t o_dtype;
    float *lse; /**< [o_rows][q_heads]; or NULL */
    /** Partials: for each entry with nodes, in order, for each node, for each query, for each head.
     */
    float *a;   /**< [states][head_dim_v] */
    float *l;   /**< [states] */
    int32_t *e; /**< [states] */
} attn_answer_t;

/** A token's row on its way to another place. */
typedef struct attn_move {
    uint32_t from_page, from_offset;
    uint32_t to_page, to_offset;
} attn_move_t;

typedef struct attn_backend attn_backend_t;
typedef struct attn_workspace attn_workspace_t; /* the backend's own */

/** The device behind a backend. */
typedef struct attn_device {
    char name[96]; /**< as its maker calls it; empty if it has none */
    uint64_t total_bytes, free_bytes;
    bool dedicated; /**< its memory is its own: a slab may take what is free of it */
} attn_device_t;

/* ---- steps on a caller's stream ---- */

/** Rows of a tensor in the device's memory: row r of head h is r * row_stride + h * head_stride
 * elements on. */
typedef struct attn_rows {
    void *at;
    uint64_t row_stride, head_stride;
} attn_rows_t;

/**
 * A track: the tables of an open step, in the device's memory. What is queued of the step reads
 * them and names nothing else of it. They stay where they are when the step ends, for another step
 * of the same shape; so what was captured of one step as a graph serves any that is on the same
 * track. While no step is on it, what its graphs do is nothing.
 */
typedef struct attn_track attn_track_t;

/** A step as its track is to have it. */
typedef struct attn_track_step {
    uint64_t cache; /**< steps of one cache share tracks */
    const attn_geometry_t *geometry;
    const attn_plan_t *const *plans; /**< they stay until the step is over */
    uint32_t n_plans;
    attn_dtype_t q_dtype, o_dtype;
    uint64_t n_rows;                 /**< of k, v */
    const uint32_t *pages, *offsets; /**< [n_rows] where they go */
} attn_track_step_t;

/** One layer of it. */
typedef struct attn_track_call {
    uint32_t layer, plan; /**< with which of the step's plans */
    const attn_kv_t *kv;
    const attn_layer_t *params;
    const attn_rows_t *q;     /**< NULL: only stored */
    const attn_rows_t *k, *v; /**< NULL: nothing is new, or the layer is stored already */
    void *o;                  /**< [rows][q_heads][head_dim_v], packed; NULL with q */
    float *lse;               /**< [rows][q_heads], or NULL */
    void *stream;             /**< of the driver's type; NULL: the legacy default stream */
    bool own_stream;          /**< `stream` is not looked at: the track's own */
} attn_track_call_t;

/** Where the layers of a step come from that a runner's device drives (lane.h), and their answers
 * go to: memory that both devices have. */
typedef struct attn_track_lane {
    uint8_t *at;
    uint64_t bytes;
    uint32_t first;    /**< the number of layer 0; those of others follow; not 0 */
    bool lse;          /**< answers have the LSE behind O */
    uint64_t limit_ns; /**< for waits, from now on */
} attn_track_lane_t;

/** A backend's tracks. Calls for one track are made one at a time. */
typedef struct attn_track_ops {
    /**
     * A track for a step, whose tables are on their way to it when the call returns. Plans have no
     * nodes and no lists that change.
     * @return ATTN_ERR_NO_MEMORY
     * @return ATTN_ERR_EXHAUSTED  graphs were captured of as many tracks as there may be
     * @return ATTN_ERR_INVALID    the parameters of a layer, as attend
     */
    attn_status_t (*take)(attn_backend_t *backend, const attn_track_step_t *step,
                          attn_track_t **track_p);

    /** Of the track, for as long as its cache is open; not 0. */
    uint64_t (*id)(const attn_track_t *track);

    /**
     * Queue a layer: store k, v, or compare them with what is stored, then attend. Allocates
     * nothing, copies nothing, waits for nothing. On a stream that is being captured it becomes
     * part of the graph, and nothing is stored by that. All that is queued for a step follows one
     * another, whatever streams it is on.
     * @return ATTN_ERR_INVALID  a pointer or stride that the device cannot work with
     */
    attn_status_t (*enqueue)(attn_track_t *track, const attn_track_call_t *call);

    /**
     * Queue the whole step, all its layers in order, on a stream of the backend's: each waits for a
     * runner's device, stores, attends and answers. Of a track that nothing was queued on; nothing
     * else is then. Of calls layer, plan, kv and params count.
     * @return ATTN_ERR_EXHAUSTED    as many are driven as there may be
     * @return ATTN_ERR_TOO_LARGE    a layer, for the lane
     * @return ATTN_ERR_UNSUPPORTED  more layers than can be queued
     */
    attn_status_t (*drive)(attn_track_t *track, const attn_track_lane_t *lane,
                           const attn_track_call_t *calls, uint32_t n);

    /** What waits for a runner's device, of a step that is driven, ends; what was not stored by
     * then is not. Any thread; never blocks. */
    void (*interrupt)(attn_track_t *track);

    /** Around the launch of a graph that was captured of the track. What comes behind before() on
     * the stream finds the step's tables; what lies between the two, the step waits for.
     * @return ATTN_ERR_INVALID  the stream is being captured, or after() is for another one
     * @return ATTN_ERR_BUSY     before() was called for another stream, and after() was not yet */
    attn_status_t (*before)(attn_track_t *track, void *stream);
    attn_status_t (*after)(attn_track_t *track, void *stream);

    /** Wait until nothing that was queued for the step runs any more. False: until_ns came first.
     * 0 looks, and does not wait. Where the driver failed to say what a stream has, all that the
     * device has is waited for, as long as it takes. */
    bool (*wait)(attn_track_t *track, uint64_t until_ns);

    /**
     * What became of the step, after wait(). Sets stored[layers] of those whose k, v are stored.
     * What it tells of is told once: a layer that is queued again begins anew.
     * @return ATTN_ERR_NUMERIC     as append and attend, naming the layer, the lowest
     * @return ATTN_ERR_CONFLICT    k, v of a layer came twice, and differ
     * @return ATTN_ERR_INCOMPLETE  a layer was asked about before it was stored
     */
    attn_status_t (*results)(attn_track_t *track, uint8_t *stored);

    /** After wait(), the step is over: have the track say so to graphs of it that are launched all
     * the same. False: it does not say so yet at until_ns, or a millisecond from now; call again.
     */
    bool (*clear)(attn_track_t *track, uint64_t until_ns);

    /** The track is for others: after clear() was true. */
    void (*give)(attn_track_t *track);

    /** The cache is closed, and no step of it is open: its tracks go, and their graphs with them.
     */
    void (*forget)(attn_backend_t *backend, uint64_t cache);
} attn_track_ops_t;

/** A backend: a row of the table. cpu now; cuda and fault take their place beside it. */
typedef struct attn_backend_ops {
    const char *name; /**< "cpu" */

    /**
     * Open the device.
     * @param threads  of the cpu backend, 0: one per core
     * @param ordinal  which device of that name: 0 is the first
     * @return ATTN_ERR_UNSUPPORTED  no such device here
     */
    attn_status_t (*open)(uint32_t threads, uint32_t ordinal, attn_backend_t **backend_p);
    void (*close)(attn_backend_t *backend);

    /** The kind of arithmetic: name, instruction set, kernel version, leaf sizes
     * for few and many rows ("cpu-avx2/1/128-128"). Equal kinds give equal bits. Static. */
    const char *(*kind)(const attn_backend_t *backend);

    /** Tokens of a leaf: of requests up to 64 packed rows, and of larger ones. Powers of two. The
     * latter may be more than a chunk: then a chunk is the leaf. */
    void (*leaf_sizes)(const attn_backend_t *backend, uint32_t *few, uint32_t *many);

    uint32_t (*parallelism)(
        const attn_backend_t *backend); /**< threads or CTAs that a plan is cut for */

    /** Bytes per second that all threads read memory with, for the cost model: measured by the
     * call, in some milliseconds. */
    double (*read_bandwidth)(const attn_backend_t *backend);

    /** Can the shape be served? @return ATTN_ERR_UNSUPPORTED with the list of what exists */
    attn_status_t (*supports)(const attn_backend_t *backend, const attn_geometry_t *geometry);

    /** Name and memory of the device. @return ATTN_ERR_INTERNAL  the device failed */
    attn_status_t (*device)(attn_backend_t *backend, attn_device_t *device);

    /**
     * Has the device failed so that nothing works any more until this process is started again? Any
     * thread. NULL: this backend's devices do not.
     * @return NULL while it works; then the sentence of the failure, which names the call: static
     */
    const char *(*failed)(const attn_backend_t *backend);

    /** Memory of the device for KV, zeroed, 4,096-byte aligned. @return ATTN_ERR_NO_MEMORY */
    attn_status_t (*slab_alloc)(attn_backend_t *backend, uint64_t bytes, void **slab_p);
    void (*slab_free)(attn_backend_t *backend, void *slab, uint64_t bytes);

    /** Set every byte: the memory may not be the caller's to write. */
    attn_status_t (*slab_fill)(attn_backend_t *backend, void *slab, uint8_t byte, uint64_t bytes);

    /**
     * Store n rows: k, v row i goes to token offsets[i] of page pages[i].
     *
     * @param k  [n][kv_heads][head_dim_k] of the cache's dtype, packed
     * @param v  [n][kv_heads][head_dim_v]
     * @return ATTN_ERR_NUMERIC  NaN or infinity in k or v; nothing was stored
     * @return ATTN_ERR_INVALID  a page or offset that the cache does not have
     */
    attn_status_t (*append)(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                            const uint32_t *offsets, uint64_t n, const void *k, const void *v);

    /** As append, but compares: *equal_p tells whether the rows stored are these, bit for bit. */
    attn_status_t (*compare)(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                             const uint32_t *offsets, uint64_t n, const void *k, const void *v,
                             bool *equal_p);

    /** The way back: rows that append stored, to k and v, packed, in the calling thread alone. */
    attn_status_t (*read)(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                          const uint32_t *offsets, uint64_t n, void *k, void *v);

    /**
     * Copy n rows of K and V, one layer, one row after the other: a row may be read that a later
     * one writes to.
     * @return ATTN_ERR_INVALID  a page or offset that the cache does not have; nothing was copied
     */
    attn_status_t (*move)(attn_backend_t *backend, const attn_kv_t *kv, const attn_move_t *moves,
                          uint64_t n);

    /** Copy the first `tokens` tokens of page `from` to page `to`, one layer. */
    attn_status_t (*copy_page)(attn_backend_t *backend, const attn_kv_t *kv, uint32_t from,
                               uint32_t to, uint32_t tokens);

    /**
     * Memory that attends of this plan work in, of the device's kind, and what else they need of
     * it there. One attend at a time uses a workspace.
     *
     * @param q_dtype, o_dtype  of all its attends
     * @return ATTN_ERR_NO_MEMORY
     * @return ATTN_ERR_TOO_LARGE  the plan is beyond what the device can number
     */
    attn_status_t (*workspace_create)(attn_backend_t *backend, const attn_plan_t *plan,
                                      attn_dtype_t q_dtype, attn_dtype_t o_dtype,
                                      attn_workspace_t **workspace_p);
    void (*workspace_destroy)(attn_backend_t *backend, attn_workspace_t *workspace);

    /**
     * Attend: one layer of one step, as the plan has it. Allocates nothing.
     *
     * Several attends may run at once, each with a workspace of its own.
     *
     * @param layer      scale (0: default), softcap, slopes, sinks; window and causal as planned
     * @param q          [rows][q_heads][head_dim_k] of q_dtype, packed
     * @param workspace  made for this plan and q_dtype, and for the answer's o_dtype
     * @return ATTN_ERR_NUMERIC  NaN in q, |logit * log2 e| above 2^30, or a non-finite sum: names
     *                           entry, query and head; answers are undefined
     * @return ATTN_ERR_INVALID  a scale, softcap, slope or sink that is out of range
     */
    attn_status_t (*attend)(attn_backend_t *backend, const attn_plan_t *plan, const attn_kv_t *kv,
                            const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype,
                            attn_workspace_t *workspace, const attn_answer_t *answer);

    /** Steps whose tensors are in the device's memory; NULL: this backend has none. */
    const attn_track_ops_t *tracks;

    /** Devices of a host that merge among themselves; NULL: those of this backend do not. */
    const attn_group_ops_t *groups;
} attn_backend_ops_t;

struct attn_backend {
    const attn_backend_ops_t *ops; /* first member of every backend's own struct */
};

/**
 * The row of a device and its number: "cpu", "cuda", "cuda:1".
 * @return ATTN_ERR_UNSUPPORTED  no such name, with the list of what exists
 * @return ATTN_ERR_INVALID      what follows the colon is no number
 */
attn_status_t attn_backend_parse(const char *device, const attn_backend_ops_t **ops_p,
                                 uint32_t *ordinal_p);

/** The row of that name, or NULL. Names: attn_backend_name(0), (1), ... until NULL. */
const attn_backend_ops_t *attn_backend_find(const char *name);
const char *attn_backend_name(uint32_t i);

#endif
