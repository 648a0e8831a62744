/*
 * attn.h: libattn, the client of attnd, attention as a network service.
 *
 * A runner opens a client, opens a cache, creates sequences, and for every
 * forward pass begins a step over a batch of them, calls attn_step_run() once a
 * layer, and commits. It holds no KV. The workers that own the KV store the new
 * k, v and answer with attention outputs; the answer's bits do not depend on
 * how many workers there are, nor on where the KV lies.
 *
 *     attn_client_open("127.0.0.1:7070", NULL, &client);
 *     attn_cache_open(client, "chat", &geometry, &cache);
 *     attn_seq_create(cache, NULL, &seq);
 *     attn_entry_t entry = {.seq = seq, .base = 0, .n_q = n, .n_new = n};
 *     attn_step_begin(cache, &(attn_batch_t){.size = sizeof(attn_batch_t),
 *                     .n = 1, .entries = &entry, .q_dtype = ATTN_F32}, &step);
 *     for (l = 0; l < layers; l++)
 *         attn_step_run(step, l, &q, &k, &v, &o, NULL);
 *     attn_step_commit(step, NULL);
 *
 * Threads: every function may be called from any thread; calls on one step are
 * made one at a time. Objects are closed after what was made from them.
 * Blocking calls end by their deadline plus 250 ms. Every function that returns
 * attn_status_t sets attn_last_error() of its thread on failure, and sets its
 * outputs only on ATTN_OK.
 */
#ifndef ATTN_H
#define ATTN_H

#include "attn_types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ATTN_VERSION_MAJOR 0
#define ATTN_VERSION_MINOR 1
#define ATTN_VERSION_PATCH 0

typedef struct attn_client attn_client_t;
typedef struct attn_cache attn_cache_t;
typedef struct attn_step attn_step_t;

/** "0.1.0"; static. */
ATTN_API const char *attn_version(void);

/** Name of a status, such as "ATTN_ERR_STALE"; static. */
ATTN_API const char *attn_strerror(attn_status_t status);

/**
 * What the last failed call of this thread has to say: one sentence that names
 * the object, the field and the limit. Valid until the thread's next call.
 * Empty if nothing failed yet.
 */
ATTN_API const char *attn_last_error(void);

/* ---- client ---- */

/**
 * Which way the tensors of a run go to a worker, and its answer from there. Everything else goes
 * over gRPC, and so do, whatever is chosen, the runs of a step that found no room in its slab, and
 * runs with lists of pages of their own: attn_client_links() counts both.
 */
typedef enum attn_transport {
    ATTN_TRANSPORT_DEFAULT, /**< as $ATTN_TRANSPORT says (auto, grpc, ucx), or else auto */
    ATTN_TRANSPORT_AUTO,    /**< through the worker's shared memory (UCX) if it lends some that this
                               process can map; else as messages of UCX's, if the worker takes
                               them (`attnd worker --ucx-net`) and they come through; else gRPC */
    ATTN_TRANSPORT_GRPC,    /**< over gRPC */
    ATTN_TRANSPORT_UCX, /**< as auto, but attn_step_begin() fails, with the reason, if one of the
                           step's workers is reached through UCX in neither way */
} attn_transport_t;

/** How tensors in a GPU's memory go to a worker that is in another process: attn_step_run(). */
typedef enum attn_gpu_way {
    ATTN_GPU_DEFAULT, /**< as $ATTN_GPU_WAY says (auto, staged, mapped), or else auto */
    ATTN_GPU_AUTO,    /**< from GPU to GPU, if the worker lends memory of its GPU that this process
                         can map (`attnd worker --gpu-lend`) and has all KV of the step; else
                         through pinned memory of the host, and so while that memory is asked for
                         and mapped, and where both share a GPU and a run has less than 1 MiB */
    ATTN_GPU_STAGED,  /**< through pinned memory */
    ATTN_GPU_MAPPED,  /**< as auto, but the worker's memory is waited for, 2 s at most in
                         attn_step_begin(), and a run that would go through pinned memory fails,
                         with the reason */
} attn_gpu_way_t;

/**
 * Where the partial answers of a sequence that lies on several workers are put together. The answer
 * has the same bits in any case.
 */
typedef enum attn_merging {
    ATTN_MERGING_AUTO,   /**< where it costs least, step by step: among workers that are started
                          with --groups, and have a GPU each. Not run on two GPUs yet */
    ATTN_MERGING_CLIENT, /**< in this process: the default */
    ATTN_MERGING_GROUP,  /**< among the workers, also where they share a GPU and take turns on it;
                          attn_step_begin() fails, with the reason, where they cannot */
} attn_merging_t;

typedef struct attn_client_options {
    size_t size;              /**< sizeof(attn_client_options_t) */
    uint32_t timeout_ms;      /**< of every call but steps': default 10,000, at most 60,000 */
    uint32_t step_timeout_ms; /**< of a step, to its commit: default 60,000, at most 600,000 */
    uint32_t spin_us; /**< busy-wait for an answer so long before sleeping: default 50, 0 never */
    const char *name; /**< shown in logs and `attnctl status`; NULL: "libattn" */

    /* TLS, to the coordinator and to workers: paths of PEM files, read by attn_client_open() and
     * again when they change. NULL: the environment variable counts; "": none, whatever it says.
     * Without a CA all is plaintext. */
    const char *tls_ca;          /**< servers' certificates come from these; ATTN_TLS_CA */
    const char *tls_cert;        /**< ours, where servers ask for one; ATTN_TLS_CERT */
    const char *tls_key;         /**< of tls_cert, without a passphrase; ATTN_TLS_KEY */
    const char *tls_server_name; /**< in the servers' certificates, in place of the host that they
                                    are reached by; ATTN_TLS_SERVER_NAME */

    attn_transport_t transport; /**< of runs */
    attn_gpu_way_t gpu_way;     /**< of tensors in a GPU's memory */
    attn_merging_t merging;
} attn_client_options_t;

ATTN_API void attn_client_options_init(attn_client_options_t *options);

/**
 * Open a client.
 *
 * @param target   "HOST:PORT" of a coordinator, or "inproc://cpu" (or "inproc://cuda:0", a GPU),
 * the engine inside this process with no daemon ("local attention"). inproc takes options:
 * "inproc://cpu?workers=4&threads=2&slab=1GiB" (engines, threads of each, KV bytes of each).
 * @param options  NULL for the defaults.
 *
 * The environment: unless target is inproc:// or the transport is ATTN_TRANSPORT_GRPC, this puts
 * UCX_HANDLE_ERRORS=none, UCX_MEM_EVENTS=n and UCX_LOG_LEVEL=fatal into it, each if it is not
 * there, so that UCX, which the first step loads, installs no signal handlers, patches no functions
 * and logs nothing. libattn writes nothing else there. As with any setenv(), no other thread may
 * be reading the environment: open the first client before there are such threads, or set the three
 * yourself, or choose ATTN_TRANSPORT_GRPC.
 *
 * @return ATTN_ERR_INVALID      target or options are malformed, or a TLS file is not what it
 * should be
 * @return ATTN_ERR_UNAVAILABLE  no coordinator answers there within timeout_ms
 */
ATTN_API attn_status_t attn_client_open(const char *target, const attn_client_options_t *options,
                                        attn_client_t **client_p);

/** Close: open steps abort (their submitted runs complete first), sequences made through this
 * client are freed. With inproc://cuda:N this waits until the GPU is through with all that was
 * enqueued, however long that takes: a stream that only the closing thread would let go on is let
 * go before. Not to be called inside a completion. NULL is allowed. */
ATTN_API void attn_client_close(attn_client_t *client);

/** One worker as the coordinator sees it. */
typedef struct attn_worker_info {
    uint32_t id;
    bool alive;
    char address[64];
    char kind[64]; /**< the kind of arithmetic: "cpu-fma/3/128-128", say */
    uint64_t slab_bytes, region_bytes, used_bytes;
    uint64_t chunks, open_steps;
    uint64_t runs;     /**< layers answered since start */
    uint64_t kv_bytes; /**< KV bytes read by attention since start */
    char device[96];   /**< what its maker calls the device; empty: it has no name */
    uint64_t device_bytes, device_free_bytes; /**< memory of the device; 0: not known */
    double kv_bytes_per_s;                    /**< read by attention in the last ten seconds */
    double read_bandwidth; /**< bytes/s that the device reads, as measured at its start */
    bool ucx;              /**< tensors may come through UCX ... */
    uint32_t ucx_clients;  /**< ... as those of so many clients do now */
    uint64_t ucx_runs;     /**< layers asked so since start */
    char ucx_ways[32];     /**< how: "shm" (shared memory of its host), and "net" or, once a client
                              came by it, the transport that UCX chose: "tcp", "rc_mlx5", ... */
    uint32_t groups;       /**< that its GPU is in: attn_merging_t */
    char group_host[96];   /**< where it may be in some: they are of workers of one host; empty: it
                              has no GPU for that, or was started without --groups */
    char group_device[32]; /**< its GPU there */
    uint32_t gpu_clients;  /**< that have memory of its GPU for tensors of theirs ... */
    uint64_t gpu_runs;     /**< ... and of ucx_runs, layers asked so: from GPU to GPU */
    /* Constants of the cost model, as measured at its start; 0: not known. */
    double attend_seconds; /**< of attention over next to nothing */
    double few_flops[4];   /**< FLOP/s over KV of each attn_dtype_t, for up to 64 packed rows (n_q *
                              q_heads / kv_heads) ... */
    double many_flops[4];  /**< ... and for more */
    double hop_seconds;    /**< from the coordinator to it and back, of a small message */
    double link_bandwidth; /**< bytes/s of that way, there and back together */
    bool leaving;          /**< nothing new is placed there: attn_worker_drain() */
} attn_worker_info_t;

/** The cluster as the coordinator sees it. */
typedef struct attn_cluster_info {
    uint64_t epoch;
    uint64_t sequences;
    uint64_t uptime_ms;
    uint32_t clients;
    uint32_t caches;
    /** How runs of direct clients reach workers, by the slowest that told the coordinator; 0: none
     * did. As attn_link_info_t. */
    double clients_hop_seconds, clients_send_seconds, clients_link_bandwidth;
    uint32_t n_workers;
    attn_worker_info_t *workers; /**< [n_workers]; free with attn_cluster_info_free() */
} attn_cluster_info_t;

/** @return ATTN_ERR_UNAVAILABLE  the coordinator does not answer */
ATTN_API attn_status_t attn_cluster_describe(attn_client_t *client, attn_cluster_info_t *info);

/** What a call that moves chunks came to. */
typedef struct attn_moved {
    uint64_t chunks, bytes; /**< moved, and k and v of them */
    uint64_t left;          /**< chunks that are to be moved still: call again */
    uint64_t failed;   /**< attempts; those chunks are where they were, and among the ones left */
    attn_status_t why; /**< the last of them failed */
    char reason[256];  /**< as a sentence */
} attn_moved_t;

/**
 * Have a worker emptied, before it is stopped: nothing new is placed there from now on, and its
 * chunks are moved to others. Takes a second and the chunk at hand, up to a minute in all: call
 * again while some are left. Sequences stay in use: steps that are open on a chunk are waited for,
 * a second at most, and then that chunk is tried again by the next call.
 *
 * @param to    where to; 0: each chunk to the worker with most room
 * @param stay  true: instead, the worker is as any other again
 * @return ATTN_ERR_NOT_FOUND    the worker is not alive
 * @return ATTN_ERR_EXHAUSTED    others have no room, and none was moved
 * @return ATTN_ERR_UNAVAILABLE  no other worker has the cache, or one does not answer; likewise
 */
ATTN_API attn_status_t attn_worker_drain(attn_client_t *client, uint32_t worker, uint32_t to,
                                         bool stay, attn_moved_t *moved);
ATTN_API void attn_cluster_info_free(attn_cluster_info_t *info);

/** How this client reaches a worker that it has begun a step on. */
typedef struct attn_link_info {
    char address[64];       /**< the worker's */
    char transport[16];     /**< of runs, now: "ucx shm" (shared memory); "ucx " and what UCX sends
                               messages by: "ucx tcp", "ucx rc_mlx5", ...; or "grpc" */
    char reason[256];       /**< why "grpc", if UCX was tried */
    uint64_t runs_ucx;      /**< layers asked through UCX */
    uint64_t runs_grpc;     /**< and over gRPC ... */
    uint64_t steps_no_slot; /**< steps of which all were, since they found no room in the slab */
    uint64_t slabs_lost;    /**< slabs given up with a step that broke off, or by the worker */
    /* What the last runs took beside what the worker computed; 0 before there were nine. */
    double hop_seconds;    /**< of a small one, there and back, median */
    double send_seconds;   /**< of it, the caller's thread until it was sent */
    double link_bandwidth; /**< bytes/s, there and back together, of those of 512 KiB and more */
    uint64_t runs_mapped;  /**< of runs_ucx: layers whose tensors went from GPU to GPU, by memory
                              that the worker lends */
    char gpu_reason[256]; /**< why the last step with tensors of a GPU had them go through the host's
                             memory; empty: it had them go from GPU to GPU, or there was none */
} attn_link_info_t;

/** How a client reaches its workers. */
typedef struct attn_links_info {
    uint32_t n_links;
    attn_link_info_t *links; /**< [n_links]; free with attn_links_info_free() */
    uint64_t dropped;        /**< messages of UCX's that answered nothing that was waited for: late
                                ones, and strangers' */
    uint64_t runs_cuda;      /**< runs whose tensors were used in a GPU's memory, where they were;
                                what is enqueued or replayed is no run */
    uint64_t runs_staged;    /**< and those that were copied through the host's */
    uint64_t runs_mapped;    /**< and those that were copied to the worker's GPU, and from there */
    uint64_t steps_grouped;  /**< steps whose workers merged among themselves */
    uint64_t steps_driven;   /**< steps whose layers this process' GPU brought to the worker's */
} attn_links_info_t;

/** Workers are listed from the first step on that involves them; inproc:// has none.
 * @return ATTN_ERR_NO_MEMORY */
ATTN_API attn_status_t attn_client_links(attn_client_t *client, attn_links_info_t *info);
ATTN_API void attn_links_info_free(attn_links_info_t *info);

/* ---- cache ---- */

ATTN_API void attn_geometry_init(attn_geometry_t *geometry);

/**
 * Open a cache, or join the one of that name if its geometry is equal.
 *
 * @param name      1 to 128 bytes of letters, digits, '-', '_', '.', '/'.
 * @param geometry  NULL: join the open cache of that name, whatever its geometry.
 *
 * @return ATTN_ERR_NOT_FOUND    geometry is NULL and no cache of that name is open
 * @return ATTN_ERR_INVALID      a field of the geometry; the sentence names it and its limits
 * @return ATTN_ERR_UNSUPPORTED  a shape that no kernel serves; the sentence lists what exists
 * @return ATTN_ERR_EXISTS       the name is in use with another geometry
 * @return ATTN_ERR_EXHAUSTED    a worker has no room for region_bytes
 */
ATTN_API attn_status_t attn_cache_open(attn_client_t *client, const char *name,
                                       const attn_geometry_t *geometry, attn_cache_t **cache_p);

/** Leave the cache. The last to leave returns its region to the workers, those of inproc://cuda:N
 * when the GPU is through with what was enqueued for it: that is waited for a second and no longer.
 * NULL is allowed. */
ATTN_API void attn_cache_close(attn_cache_t *cache);

/** The cache's geometry with every default filled in. Valid while the cache is open. */
ATTN_API const attn_geometry_t *attn_cache_geometry(const attn_cache_t *cache);

/* ---- sequences ---- */

typedef struct attn_seq_options {
    size_t size;
    uint64_t expected_tokens; /**< a hint for placement: 0 unknown */
} attn_seq_options_t;

/** Make an empty sequence. options may be NULL. @return ATTN_ERR_EXHAUSTED too many sequences */
ATTN_API attn_status_t attn_seq_create(attn_cache_t *cache, const attn_seq_options_t *options,
                                       attn_seq_t *seq_p);

/**
 * Make a sequence that begins with the first `length` committed tokens of another.
 * Full chunks are shared; the growing one shares its pages until a side writes.
 *
 * @return ATTN_ERR_INVALID    length is above the committed length
 * @return ATTN_ERR_NOT_FOUND  seq was freed
 * @return ATTN_ERR_LOST       some of those tokens were lost with a worker
 */
ATTN_API attn_status_t attn_seq_fork(attn_cache_t *cache, attn_seq_t seq, uint64_t length,
                                     attn_seq_t *fork_p);

/** Drop all tokens from `length` on. @return ATTN_ERR_BUSY  a step is open on it */
ATTN_API attn_status_t attn_seq_truncate(attn_cache_t *cache, attn_seq_t seq, uint64_t length);

/** Free the sequence; its id is refused from now on. @return ATTN_ERR_BUSY  a step is open on it */
ATTN_API attn_status_t attn_seq_free(attn_cache_t *cache, attn_seq_t seq);

/**
 * Move chunks of a sequence to another worker, for all that share them: those that are not there,
 * or with `from` only those of one worker. Answers stay the same, bit by bit. As
 * attn_worker_drain() it takes a second and the chunk at hand, and leaves what fails where it was.
 *
 * @param from  0: of any worker
 * @param to    0: each to the worker with most room; then from is not 0
 * @return ATTN_ERR_NOT_FOUND  the sequence; otherwise as attn_worker_drain()
 */
ATTN_API attn_status_t attn_seq_move(attn_cache_t *cache, attn_seq_t seq, uint32_t from,
                                     uint32_t to, attn_moved_t *moved);

typedef struct attn_chunk_info {
    uint64_t chunk;      /**< its id; sequences that share it show the same */
    uint64_t first;      /**< position of its first token */
    uint32_t length;     /**< committed tokens */
    uint32_t generation; /**< grows when the chunk is truncated; 0: empty */
    uint32_t worker;     /**< its owner, attn_worker_info_t.id */
    bool lost;           /**< its owner is gone, and the tokens with it */
    bool sealed; /**< placed anew where a full one was lost: a hole until it is full again */
} attn_chunk_info_t;

/** Tokens [first, end) that were lost with a worker. */
typedef struct attn_hole {
    uint64_t first, end;
    uint32_t
        worker; /**< that had them; 0: their chunk was placed anew, and they are to be filled */
    bool open;  /**< the sequence ends in this hole: how many of its tokens were committed, if any,
                   was lost as well, and the sequence's length ends where the hole begins */
} attn_hole_t;

typedef struct attn_seq_info {
    uint64_t length;   /**< committed tokens: the longest prefix committed at all its owners */
    uint32_t n_chunks; /**< chunks that hold tokens or are placed in advance */
    attn_chunk_info_t *chunks; /**< [n_chunks]; free with attn_seq_info_free() */
    uint32_t n_holes;
    attn_hole_t *holes; /**< [n_holes] ascending; counted in length but for an open one */
} attn_seq_info_t;

ATTN_API attn_status_t attn_seq_describe(attn_cache_t *cache, attn_seq_t seq,
                                         attn_seq_info_t *info);
ATTN_API void attn_seq_info_free(attn_seq_info_t *info);

typedef struct attn_export {
    size_t size;          /**< sizeof(attn_export_t) */
    uint64_t first, n;    /**< tokens, all committed */
    uint32_t first_layer; /**< and */
    uint32_t n_layers;    /**< 0: all from first_layer on */
    uint32_t timeout_ms;  /**< 0: the client's step_timeout_ms; at most 600,000 */
} attn_export_t;

/**
 * Read committed k, v back, from all their owners: to move them elsewhere, where steps with n_q = 0
 * store them again, for instance. Reads what was committed before the call, whatever is committed
 * meanwhile; a truncate, free or refill meanwhile is ATTN_ERR_STALE, never a mixture.
 *
 * @param k  [n_layers][n][kv_heads][head_dim_k] of kv_dtype, packed; written, anything on failure
 * @param v  [n_layers][n][kv_heads][head_dim_v]
 *
 * @return ATTN_ERR_INVALID    layers that the cache does not have; tokens above the committed
 * length
 * @return ATTN_ERR_NOT_FOUND  seq was freed
 * @return ATTN_ERR_LOST       a hole is in the range; the sentence names all
 * @return ATTN_ERR_STALE      the sequence was changed meanwhile: call again
 * @return ATTN_ERR_DEADLINE, ATTN_ERR_UNAVAILABLE  a worker did not answer in time, or at all
 */
ATTN_API attn_status_t attn_seq_export(attn_cache_t *cache, attn_seq_t seq,
                                       const attn_export_t *what, void *k, void *v);

/* ---- steps ---- */

/*
 * Holes. A worker that dies takes its chunks along. attn_seq_describe() names the token ranges, and
 * what needs them answers ATTN_ERR_LOST; a query below a hole is served. To refill a hole, append
 * to it: a step whose base is where the hole begins, and whose new tokens end within it. One step
 * may fill it, or several, each from where the one before ended. Chunks are placed anew on workers
 * that live. A step that asks queries sees, as ever, the positions before them, so these must be
 * there; one with n_q = 0 may fill any hole. When all holes are filled the sequence serves as
 * before, and with the k, v that it had, with the same bits.
 *
 * Sequences that share a lost chunk (forks) share the one that takes its place: refilled through
 * one of them it is there for all, so give it the k, v that it had.
 *
 * Behind a hole at the end (open) no token is known. A step at its first position is what was to
 * come there, be it the tokens that were lost or, had there been none, new ones.
 */

/**
 * One sequence of a batch. The step appends n_new tokens at positions base to
 * base + n_new - 1, and asks n_q queries, the last of which stands at position
 * base + n_new - 1: causality is bottom-right aligned. So n_q = n_new is prefill
 * or decode, n_q = 0 only appends, and n_new = 0 asks over the first base tokens.
 */
typedef struct attn_entry {
    attn_seq_t seq;
    /** If n_new > 0 the committed length, or where a hole begins (below); else at most the
     * committed length. */
    uint64_t base;
    uint32_t n_q;
    uint32_t n_new;
    /** Block-sparse attention: only these pages are attended to, besides the
     * step's own tokens, which always are. Page numbers of the sequence:
     * chunk * ceil(chunk_size / page_size) + page within the chunk, ascending.
     * sparse_indptr[n_lists + 1] cuts sparse_pages into lists; n_lists is 0
     * (dense), 1 (one list for all heads) or kv_heads. */
    uint32_t n_lists;
    const uint32_t *sparse_indptr;
    const uint32_t *sparse_pages;
    /**
     * Tree drafts: NULL, or which of the step's own tokens each query sees, committed ones aside:
     * n_q rows (1 to n_new) of ceil(n_new / 8) bytes, token j being bit j % 8, least significant
     * first, of byte j / 8. Bits beyond n_new are 0, a row has at least one bit, n_new is at most
     * ATTN_MASK_TOKENS_MAX. Causality and sparse lists have no say among the new tokens then.
     *
     * A row names a path: the r-th token that it names counts as position base + r, and its query
     * stands at the last of them, for windows and slopes. So name a token's ancestors and the token
     * itself, list parents before children, and give RoPE the position base + depth.
     * attn_step_commit_with() keeps a path. */
    const uint8_t *mask;
    /** Lists that differ from layer to layer: pages that those given with a run
     * (attn_step_run_with()) may have, all lists of the entry together; 0: none are given. At most
     * 2,097,152 in a batch. An entry with room is planned as a dense one, and what its lists leave
     * out is looked at and passed over: lists that are the same in every layer are faster with
     * begin (docs/performance.md). */
    uint32_t list_room;
} attn_entry_t;

typedef struct attn_batch {
    size_t size; /**< sizeof(attn_batch_t) */
    uint32_t n;  /**< 1 to 4,096 entries, no sequence twice */
    const attn_entry_t *entries;
    attn_dtype_t q_dtype; /**< of q in every run of the step */
    attn_dtype_t o_dtype; /**< of o; ATTN_DTYPE_NONE: as q */
    bool want_lse;        /**< runs may ask for the LSE */
    uint32_t timeout_ms;  /**< begin to commit; 0: the client's step_timeout_ms */
    /** CUDA: the tensors of all runs are in the memory of the GPU that the worker computes on, in
     * this process (inproc://cuda:N), so that attn_step_enqueue() may be used. Where the worker is
     * another, attn_step_run() works all the same. */
    attn_memory_t memory;
    /** The layers are to be enqueued: the tensors are in the memory of a GPU of this process,
     * `gpu`, as CUDA counts them here. A worker in another process then has its GPU wait for them
     * (below, "two processes"), where that can be; else attn_step_enqueue() says why it cannot, and
     * attn_step_run() takes them. */
    bool on_stream;
    uint32_t gpu;
} attn_batch_t;

/**
 * Begin a step: reserve pages for all new tokens at all owners, or at none, and
 * plan. Everything in `batch` is copied. The step's deadline counts from here,
 * and this call ends by it, too.
 *
 * @return ATTN_ERR_INVALID    names the entry and the field
 * @return ATTN_ERR_EXHAUSTED  a worker has too few free pages; nothing was changed
 * @return ATTN_ERR_TOO_LARGE  too many rows, or, over gRPC, more than 1 GiB of q, k
 *                             and v a layer for one worker: cut it into several steps
 * @return ATTN_ERR_BUSY       a sequence has an open step
 * @return ATTN_ERR_NOT_FOUND  a sequence was freed
 * @return ATTN_ERR_LOST       a sequence lost tokens; the sentence names the ranges
 * @return ATTN_ERR_STALE      another client changed the sequence: describe it and adapt base
 */
ATTN_API attn_status_t attn_step_begin(attn_cache_t *cache, const attn_batch_t *batch,
                                       attn_step_t **step_p);

/**
 * One layer: store k, v of the new tokens with their owners, then attend.
 * Tensors are packed over the batch in the order of its entries.
 *
 * @param layer  0 to layers - 1, in any order; again with the same k, v is allowed.
 * @param q      [sum of n_q][q_heads][head_dim_k] of q_dtype; NULL if no entry asks
 * @param k      [sum of n_new][kv_heads][head_dim_k] of kv_dtype; NULL if nothing is
 *               new, or to ask again about a layer that was stored
 * @param v      [sum of n_new][kv_heads][head_dim_v]; NULL as k
 * @param o      [sum of n_q][q_heads][head_dim_v] of o_dtype, written; anything on failure
 * @param lse    [sum of n_q][q_heads] natural log of the sum of exp of the logits,
 *               sinks excluded, -inf where nothing was seen; NULL if not wanted; as o on failure
 *
 * Buffers belong to the caller and are not touched after the return; but those in a GPU's memory,
 * after ATTN_ERR_DEADLINE, for as long as that GPU does not get to the end of what was queued.
 *
 * Tensors are all in the host's memory, or all in one GPU's, the LSE where o is; all runs of a step
 * alike. Where each begins is looked at, unless its memory is told to be the host's. Of a GPU they
 * are to be there when the call is made (synchronise with what makes them), and the answer is there
 * when it returns. A worker in this process on that GPU (inproc://cuda:N) that has all KV of the
 * step works with them where they are: tokens and heads of k and v begin at multiples of 16 bytes
 * then, those of q of 4, and o and the LSE are packed, at multiples of an element. In steps with
 * more than 64 rows of an entry for a KV head (n_q x q_heads / kv_heads), q and o are at multiples
 * of 16, too. To a worker in another process of this host they are copied from GPU to GPU, where it
 * lends memory for that and has all KV of the step, and to any other through pinned memory
 * (attn_gpu_way_t), either way on a stream of the library's that waits for no other;
 * attn_client_links() counts both.
 *
 * After the first six below the step is as it was, and the layer may be run again; after any
 * other the step is over, and attn_step_abort() frees it. Where its workers merge among themselves
 * (attn_merging_t) they wait for one another: a run that one of them fails ends the step, whatever
 * it says, and a full queue is ATTN_ERR_ABORTED: begin anew.
 *
 * @return ATTN_ERR_INVALID     a tensor, the layer; the sentence names field and limit
 * @return ATTN_ERR_BUSY        a submitted run of the step is outstanding
 * @return ATTN_ERR_INCOMPLETE  k and v are NULL, and the layer is not stored
 * @return ATTN_ERR_CONFLICT    k, v differ from those stored for the layer
 * @return ATTN_ERR_NUMERIC     a NaN or out-of-range logit, with the worker's name
 * @return ATTN_ERR_EXHAUSTED   a queue is full: retry
 * @return ATTN_ERR_ABORTED     the step ended (deadline, lost worker)
 * @return ATTN_ERR_DEADLINE, ATTN_ERR_UNAVAILABLE  a worker did not answer in time, or at all
 */
ATTN_API attn_status_t attn_step_run(attn_step_t *step, uint32_t layer, const attn_tensor_t *q,
                                     const attn_tensor_t *k, const attn_tensor_t *v,
                                     const attn_tensor_t *o, float *lse);

/** Of the last run that ended with ATTN_OK: the nanoseconds that the slowest of its workers
 * computed, storing k, v and attending. What the run took beyond is transport, waiting and
 * merging. Not to be called while a run is outstanding. */
ATTN_API uint64_t attn_step_compute_ns(const attn_step_t *step);

/** Block-sparse lists of one entry for one layer, as those of attn_entry_t. */
typedef struct attn_lists {
    uint32_t n_lists;       /**< 0: the entry's of begin, or none; 1; or kv_heads */
    const uint32_t *indptr; /**< [n_lists + 1], from 0 on */
    const uint32_t *pages;  /**< [indptr[n_lists]], at most the entry's list_room */
} attn_lists_t;

typedef struct attn_run {
    size_t size; /**< sizeof(attn_run_t) */
    uint32_t layer;
    const attn_tensor_t *q, *k, *v, *o;
    float *lse;
    /** [n] one per entry, for this run in place of those of begin; NULL: those of begin. Answers
     * are, bit for bit, those of a step whose begin had these lists. They are not remembered: give
     * them again to ask again. */
    const attn_lists_t *lists;
} attn_run_t;

/** attn_step_run() with all that a run may have.
 * @return ATTN_ERR_INVALID   also for a list, or one of an entry whose list_room is 0
 * @return ATTN_ERR_TOO_LARGE more pages than the entry's list_room */
ATTN_API attn_status_t attn_step_run_with(attn_step_t *step, const attn_run_t *run);

/** Called exactly once per submitted run, on a thread of the library or inside
 * attn_step_submit itself, with no lock held. error is the sentence of
 * attn_last_error() (empty on ATTN_OK), valid during the call. It must not block:
 * of this library it may call attn_step_submit, for the next run, and
 * attn_step_abort, which then takes effect soon after. attn_step_begin, _run and
 * _commit are refused there (ATTN_ERR_INVALID); other calls would wait in vain. */
typedef void (*attn_done_fn)(void *arg, attn_status_t status, const char *error);

/**
 * attn_step_run() without waiting. Tensor structs are copied; the memory they
 * point to stays untouched by the caller until `done` was called. One run of a
 * step is outstanding at a time.
 * What is copied from and to a GPU is not waited for either, and holds up no
 * other step; a run that it does not end for in time is ATTN_ERR_DEADLINE.
 *
 * @return ATTN_OK  `done` is or will be called; on failure it never is
 */
ATTN_API attn_status_t attn_step_submit(attn_step_t *step, uint32_t layer, const attn_tensor_t *q,
                                        const attn_tensor_t *k, const attn_tensor_t *v,
                                        const attn_tensor_t *o, float *lse, attn_done_fn done,
                                        void *arg);

/** attn_step_submit() of such a run. `run` and its tensor structs are copied, the lists are not:
 * they stay as they are until `done` was called. */
ATTN_API attn_status_t attn_step_submit_with(attn_step_t *step, const attn_run_t *run,
                                             attn_done_fn done, void *arg);

/* ---- steps on a stream ---- */

/*
 * With inproc://cuda:N a step begun with memory = ATTN_MEMORY_CUDA can leave its layers to a CUDA
 * stream: in the runner's own order, with no host work in between, and in CUDA graphs.
 *
 *     attn_step_begin(cache, &batch, &step);
 *     for (l = 0; l < layers; l++) {
 *         ...                                      the runner's kernels make q, k, v on `stream`
 *         attn_step_enqueue(step, l, &q, &k, &v, &o, NULL, stream);
 *         ...                                      and read o
 *     }
 *     attn_step_commit(step, NULL);                waits for the stream's work of this step
 *
 * Graphs. A stream that is being captured records what is enqueued, and nothing is stored by that.
 * attn_step_graph() names what a graph captured of a step is good for: it serves every later step
 * of the cache with the same number. So capture once, and launch it again for each token:
 *
 *     attn_step_begin(cache, &batch, &step);
 *     attn_step_graph(step, &id);
 *     if (no graph is known for id)
 *         capture: the loop above, with q, k, v and o in the same places each time
 *     attn_step_replay(step, stream);
 *     cuGraphLaunch(graph of id, stream);
 *     attn_step_replayed(step, stream);
 *     attn_step_commit(step, NULL);
 *
 * The number follows from how many queries and new tokens the batch has and from its dtypes, and it
 * changes when what begin plans outgrows the room that was made for it: about when lengths double.
 * Two steps that are open at once have different ones. Graphs are good until their cache is closed;
 * launched while no step with their number is open they leave tensors and KV as they are, if they
 * have run before such a step begins: nothing orders them behind its begin.
 */

/*
 * Two processes. A step begun with on_stream is the same to its caller where the worker is another
 * process of this host with a GPU of its own: the GPUs bring layers there and back between them.
 * Layers come from 0 on then, each once, with all its tensors, q, k, v and o at multiples of 4
 * bytes; attn_step_run() takes none of them. A kernel waits on the stream for each answer, until
 * the step's deadline at most; if it does not come, o is undefined, what is enqueued later does
 * nothing, and commit tells. After a commit that failed the step is over. Graphs are good until the
 * client is closed.
 */

/**
 * As attn_step_run(), on a stream: tensors are read and written in its order, and nothing waits, is
 * allocated or copied here. The buffers stay the step's until the stream is through with it. Layers
 * that are enqueued on several streams follow one another all the same, but in a capture, where the
 * caller sees to that. Errors of the arguments are told here; those that the device finds, by
 * attn_step_commit().
 *
 * @param q, k, v  as attn_step_run(), in the worker's GPU; k and v NULL to ask again about a layer
 *                 that was stored before, on the device, when this comes to run
 * @param o, lse   packed; where q is
 * @param stream   a CUstream or cudaStream_t of the worker's GPU; NULL: the legacy default stream
 *
 * @return ATTN_ERR_UNSUPPORTED  the worker is none on a GPU in this process, or the step's KV is on
 *                               several, or an entry has list_room; or, with on_stream, what keeps
 *                               two processes from it; the sentence says which
 * @return ATTN_ERR_INVALID      a tensor, the layer, or a step begun without ATTN_MEMORY_CUDA
 * @return ATTN_ERR_BUSY         between attn_step_replay() and attn_step_replayed(), but in a
 *                               capture; and while a submitted run of the step is outstanding
 * @return ATTN_ERR_ABORTED, ATTN_ERR_NOT_FOUND  the step ended (deadline)
 * @return ATTN_ERR_INTERNAL     the driver refused; the sentence names the call
 */
ATTN_API attn_status_t attn_step_enqueue(attn_step_t *step, uint32_t layer, const attn_tensor_t *q,
                                         const attn_tensor_t *k, const attn_tensor_t *v,
                                         const attn_tensor_t *o, float *lse, void *stream);

/** The number of the graphs that serve this step; not 0. @return as attn_step_enqueue() */
ATTN_API attn_status_t attn_step_graph(attn_step_t *step, uint64_t *graph_p);

/** To be called before the launch of a graph on a stream, and after it: the stream finds the step's
 * tables, and the step waits for what the stream has by then. Several graphs may be launched in
 * between, on this stream, before the step's deadline. The stream is there until replayed is
 * called, or the step is over. Of one that is destroyed before, nobody knows what it has, and the
 * end of the step waits for all that the GPU has to do; so it does for CU_STREAM_PER_THREAD,
 * another stream on each thread, unless replayed was called, on replay's thread.
 * @return as attn_step_enqueue(); ATTN_ERR_BUSY from a second replay on another stream before
 * replayed, ATTN_ERR_INVALID from replayed on another stream than replay's, and from both while
 * the stream is being captured */
ATTN_API attn_status_t attn_step_replay(attn_step_t *step, void *stream);
ATTN_API attn_status_t attn_step_replayed(attn_step_t *step, void *stream);

/**
 * Commit the first accepted[i] new tokens of every entry, and end the step: on ATTN_OK it
 * is freed. NULL accepts all. After the first three failures below the step is as it was; after
 * any other it is over, some owners may have committed (attn_seq_describe() tells the length that
 * all have), and attn_step_abort() frees it.
 *
 * @return ATTN_ERR_INVALID     accepted[i] is above n_new of the entry, or the entry has a mask and
 *                              keeps any: attn_step_commit_with() takes its path
 * @return ATTN_ERR_INCOMPLETE  a layer has no k, v; the sentence names layer and range
 * @return ATTN_ERR_BUSY        a submitted run is outstanding
 * @return ATTN_ERR_ABORTED, ATTN_ERR_DEADLINE, ATTN_ERR_UNAVAILABLE  a worker failed
 *
 * Of a step on a stream this waits for what was enqueued, until the step's deadline, and tells what
 * came of it. After these, too, the step is as it was, and the layer may be enqueued again:
 *
 * @return ATTN_ERR_NUMERIC   of a layer's tensors or attention, as attn_step_run(); the sentence
 *                            names the layer
 * @return ATTN_ERR_CONFLICT  k, v of a layer came twice, and differ
 */
ATTN_API attn_status_t attn_step_commit(attn_step_t *step, const uint32_t *accepted);

typedef struct attn_commit {
    size_t size;              /**< sizeof(attn_commit_t) */
    const uint32_t *accepted; /**< [n] tokens to keep of each entry; of one with a mask, the length
                                   of its path. NULL accepts all; not with masks */
    /** The paths of the entries with a mask, in the order of the batch, one behind the other:
     * ascending indices of the new tokens to keep. Their k and v come to stand one behind the other
     * from base on, in every layer, as they were given (RoPE is the caller's: what was encoded for
     * base + depth is right there). The sequence is then as if a plain step had appended them. */
    const uint32_t *path;
    uint64_t n_path; /**< of all paths together */
} attn_commit_t;

/** As attn_step_commit(), with paths. @return ATTN_ERR_INVALID also where path does not ascend,
 * goes beyond the entry's new tokens, or is longer or shorter than the entries with a mask accept
 */
ATTN_API attn_status_t attn_step_commit_with(attn_step_t *step, const attn_commit_t *commit);

/** End and free the step, and return everything to where it was; ends within about 2 s. A
 * submitted run completes first, if need be as ATTN_ERR_DEADLINE after 1 s. What was enqueued is
 * waited for a second; if it runs longer, its pages come back, and its sequences are free for
 * another step, when the stream is through with it. NULL is allowed. */
ATTN_API void attn_step_abort(attn_step_t *step);

/* ---- what a batch costs ---- */

/** Where the partial answers of a sequence are put together. */
typedef enum attn_merge_place {
    ATTN_MERGE_LOCAL,       /**< nowhere: one worker has all of it */
    ATTN_MERGE_GROUP,       /**< among workers whose GPUs are in one host */
    ATTN_MERGE_CLIENT,      /**< in this library */
    ATTN_MERGE_COORDINATOR, /**< in the coordinator, for clients that speak to it alone */
} attn_merge_place_t;

/** How runs reach workers, and what follows for where sequences are placed. */
typedef struct attn_way {
    char transport[16]; /**< "ucx", "grpc", "mixed", "engine", or empty: not known */
    char source[48];    /**< who measured it */
    double hop_seconds, send_seconds, link_bandwidth; /**< as attn_link_info_t */
    uint64_t break_even_tokens; /**< a longer sequence is faster spread; UINT64_MAX: none is */
} attn_way_t;

/** Seconds of one layer: total = attend + max(read, compute) + hop + link + merge. */
typedef struct attn_cost {
    attn_merge_place_t place;
    bool available; /**< there are figures; if not, reason says why */
    bool taken;     /**< this is how it is, or would be, done; reason says why, and for
                       ATTN_MERGE_GROUP also why it is not */
    bool cheapest;  /**< of those over the same way */
    uint32_t workers;
    uint32_t way; /**< index into ways: over that */
    char reason[128];
    double attend, read, compute; /**< of the worker that takes longest: beginning, reading KV, and
                                       the products, which go on meanwhile */
    double hop;                   /**< until the last worker's answer is there */
    double link;                  /**< bytes of q, k, v and answers */
    double merge;
    double total;
} attn_cost_t;

#define ATTN_WAYS_MAX 3u
#define ATTN_COSTS_MAX 8u

typedef struct attn_explain {
    size_t size;        /**< sizeof(attn_explain_t) */
    attn_seq_t seq;     /**< id 0: of no sequence that there is */
    uint64_t tokens;    /**< of each sequence, if seq.id is 0 */
    uint32_t n_q;       /**< query rows of each; 0: 1 */
    uint32_t n_new;     /**< new tokens of each */
    uint32_t sequences; /**< alike, in one step, if seq.id is 0; 0: 1 */
} attn_explain_t;

typedef struct attn_explanation {
    uint64_t tokens;
    uint32_t workers; /**< that are alive */
    /* Of the slowest of them; 0: not known. */
    double read_bandwidth, attend_seconds;
    double flops;           /**< FLOP/s with so many query rows */
    double merge_bandwidth; /**< bytes/s of partials that this client merges */
    /* Exchanges of workers that merge among themselves: of nothing, for each other worker, and
     * bytes/s of partials that leave one. */
    double exchange_seconds, exchange_peer_seconds, exchange_bandwidth;
    bool exchange_measured; /**< as groups that this client made were; false: assumed */
    uint32_t n_ways;
    attn_way_t ways[ATTN_WAYS_MAX]; /**< the first is how runs of this client go */
    uint32_t n_costs;
    attn_cost_t costs[ATTN_COSTS_MAX];
} attn_explanation_t;

/**
 * What a layer of a batch would take, by where its answers are put together, and which is taken.
 * Nothing is run: figures are those of a model (docs/architecture.md), with constants that workers,
 * coordinator and clients measured. Where a sequence's chunks are is decided when they are placed,
 * and decides where it is merged.
 *
 * @return ATTN_ERR_INVALID    no tokens, or more query rows than tokens
 * @return ATTN_ERR_NOT_FOUND  seq was freed
 * @return ATTN_ERR_LOST       seq lost tokens
 * @return ATTN_ERR_UNAVAILABLE  no worker is alive, or the coordinator does not answer
 */
ATTN_API attn_status_t attn_explain(attn_cache_t *cache, const attn_explain_t *batch,
                                    attn_explanation_t *explanation);

/* ---- attention states, for callers with partials of their own ---- */

/**
 * Partial attention of `rows` query rows: sum exp(x) v = A * 2^e and
 * sum exp(x) = l * 2^e. Empty is l = 0, e = INT32_MIN, A ignored (design: docs/numerics.md).
 */
typedef struct attn_state {
    float *a;   /**< [rows][head_dim_v] */
    float *l;   /**< [rows] */
    int32_t *e; /**< [rows] */
} attn_state_t;

/** into = merge(into, from), row by row: one rounding per element, the same bits everywhere. */
ATTN_API void attn_state_merge(attn_state_t into, attn_state_t from, uint64_t rows,
                               uint32_t head_dim_v);

/** o[rows][head_dim_v] = A / l (0 if empty), lse[rows] = (e + log2 l) * ln 2 (-inf if empty); lse
 * may be NULL. */
ATTN_API void attn_state_finish(attn_state_t state, uint64_t rows, uint32_t head_dim_v, float *o,
                                float *lse);

/** The state equivalent to (o, lse): A = o * l, with l in [1, 2). -inf gives empty. */
ATTN_API void attn_state_from_o_lse(const float *o, const float *lse, uint64_t rows,
                                    uint32_t head_dim_v, attn_state_t state);

#ifdef __cplusplus
}
#endif

#endif
