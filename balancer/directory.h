/*
 * directory.h: what the coordinator knows: workers, clients, caches, sequences, who owns
 * which chunk, and the epoch. A single-threaded state machine with time passed in: no I/O,
 * no clock; what has to happen elsewhere comes out as effects. Used under its owner's lock
 * by the coordinator, and by libattn for engines inside the process.
 *
 * Committed lengths and generations are the workers' truth: control (client/) asks them.
 *
 * Placement: chunk c of a spread sequence goes to worker number
 *
 *     (bit_reverse_6(c % 64) * N / 64 + r) mod N
 *
 * of the N live workers in the order of their ids, numbers from 0, which gives every worker one
 * whole subtree of the merge tree when N is 1, 2, 4, 8 (at most 5 nodes otherwise). r turns the
 * order, so that sequences do not all begin on one worker, and which chunks lie together is the
 * same for every r. For chunk 0 it is the sequence's slot (the low 32 bits of its id) mod N; for
 * those after it, the number of chunk 0's owner, or the former again where that owner is lost.
 * So a fork goes on in the order of the chunks that it shares.
 *
 * Where workers are more than 16, chunk 0 goes to the best of 4 workers that the sequence draws
 * instead, by the room on all the workers that the sequence will reach from there.
 *
 * A whole sequence goes to the worker with the most room, of 16 that it draws where there are more.
 * Room is what the pages of a region are less what its chunks will hold, as far as reserving tells.
 * ATTN_PLACE_AUTO keeps a sequence whole up to the break-even length (or spreads it from the start
 * if expected_tokens is above it). A worker whose chunks, all counted as full, leave no place for
 * one more is passed over for the best of all; a whole sequence then goes on there. Live workers
 * are, for a cache, those with a region of it.
 *
 * Client 0 is nobody: what is opened or made for it has no lease and is not counted as a client.
 */
#ifndef ATTN_DIRECTORY_H
#define ATTN_DIRECTORY_H

#include "balancer/cost.h"
#include "kernels/groups.h"
#include "kvstore/sequence.h"

#define DIR_WORKERS_MAX 1024u
#define DIR_CACHES_MAX 1024u
#define DIR_CLIENTS_MAX 65536u

typedef struct directory directory_t;

typedef struct directory_options {
    uint64_t lost_ns;           /**< a worker silent for so long is lost; default 2 s */
    uint64_t lease_ns;          /**< a client silent for so long is gone; default 30 s */
    uint64_t break_even_tokens; /**< 0: from the cost model */
    uint64_t first_epoch;       /**< larger than any a former coordinator gave out; default 1 */
    uint64_t id_seed;           /**< random, so that ids of a former coordinator (sequences, chunks,
                                     caches, clients) are not taken for this one's; default 0: from 1 */
} directory_options_t;

/** What the owner of the directory must do elsewhere, in the order given. */
typedef enum dir_effect_type {
    DIR_RELEASE_CHUNK, /**< worker, cache, chunk: release it there, if it is there */
    DIR_CLOSE_CACHE,   /**< worker, cache: return the region there */
    DIR_KEEP_CHUNK,    /**< worker, cache, chunk, move: it stays, that move came to nothing */
} dir_effect_type_t;

typedef struct dir_effect {
    dir_effect_type_t type;
    uint32_t worker;
    uint64_t cache, chunk, move;
} dir_effect_t;

typedef void (*dir_effect_fn)(void *arg, const dir_effect_t *effect);

void directory_options_init(directory_options_t *options);

/** `effect` is called from inside the calls below; it must only note the effect. */
attn_status_t directory_create(const directory_options_t *options, dir_effect_fn effect, void *arg,
                               directory_t **directory_p);
void directory_destroy(directory_t *directory);

/** Grows whenever ownership changes: a worker joins or is lost, or a chunk was moved. */
uint64_t directory_epoch(const directory_t *directory);

/* ---- workers ---- */

/** Where a worker may be a rank of groups that merge partials; empty: it is in none. */
typedef struct dir_place {
    char host[96];
    char device[ATTN_GROUP_DEVICE]; /**< its GPU's address there */
} dir_place_t;

typedef struct dir_worker {
    uint32_t id; /**< 1, 2, ...; never used twice */
    bool alive;
    uint64_t incarnation; /**< of the daemon's process */
    char address[64];
    char kind[64];
    uint64_t slab_bytes;
    cost_worker_t speed; /**< as it measured; zeros: it did not say */
    cost_link_t link;    /**< directory_worker_link() */
    char device[96];
    uint64_t device_bytes;
    dir_place_t place;
    uint64_t seen_ns;
    /* As last told by heartbeat: */
    uint64_t region_bytes, used_bytes, chunks, open_steps, runs, kv_bytes;
    uint64_t device_free;
    double kv_rate; /**< KV bytes per second */
    bool ucx;       /**< tensors may come through UCX, as those of ucx_clients do now */
    char ucx_ways[32];
    uint32_t ucx_clients;
    uint64_t ucx_runs;
    uint32_t gpu_clients; /**< that have memory of its GPU, as the layers in gpu_runs were asked */
    uint64_t gpu_runs;
    uint32_t groups; /**< that its GPU is in, and merges partials in */
    bool leaving;    /**< nothing new is placed there: directory_worker_leave() */
} dir_worker_t;

/**
 * A worker says hello. The same incarnation again at the same address is the same worker (id
 * kept). A new incarnation at the address of an old worker makes that one lost. The table
 * holds DIR_WORKERS_MAX workers; when it is full, the lost one with the lowest id is forgotten.
 * @return ATTN_ERR_EXHAUSTED    DIR_WORKERS_MAX are alive
 * @return ATTN_ERR_INVALID      address or kind is empty or too long
 * @return ATTN_ERR_STALE        this incarnation was lost: join with a new one
 */
attn_status_t directory_worker_join(directory_t *directory, const dir_worker_t *hello,
                                    uint64_t now_ns, uint32_t *id_p);

/** @return ATTN_ERR_NOT_FOUND  unknown or lost: the worker must join anew, as a new incarnation */
attn_status_t directory_worker_heartbeat(directory_t *directory, uint32_t id, uint64_t incarnation,
                                         const dir_worker_t *figures, uint64_t now_ns);

/** The worker's chunks are gone from now on; grows the epoch. */
void directory_worker_lose(directory_t *directory, uint32_t id);

/** NULL: never was, or forgotten. */
const dir_worker_t *directory_worker(const directory_t *directory, uint32_t id);
/** Ids of live workers, ascending, at most `room`; returns how many there are. */
uint32_t directory_workers_alive(const directory_t *directory, uint32_t *ids, uint32_t room);
/** All workers, lost ones too, by ascending id. */
uint32_t directory_workers(const directory_t *directory, const dir_worker_t **workers_p);

/* ---- clients ---- */

/** A client with a lease; id never 0. name may be NULL; 63 bytes are kept.
 * @return ATTN_ERR_EXHAUSTED  DIR_CLIENTS_MAX */
attn_status_t directory_client_open(directory_t *directory, const char *name, uint64_t now_ns,
                                    uint32_t *client_p);
/** @return ATTN_ERR_NOT_FOUND  the lease ran out; its sequences are gone */
attn_status_t directory_client_renew(directory_t *directory, uint32_t client, uint64_t now_ns);
/** Free its sequences and leave its caches. */
void directory_client_close(directory_t *directory, uint32_t client);
uint32_t directory_clients(const directory_t *directory);

/** How many since the start. */
typedef struct dir_counts {
    uint64_t workers_lost, leases_expired;
    uint64_t chunks_moved, moves_failed;
} dir_counts_t;

const dir_counts_t *directory_counts(const directory_t *directory);

/** Silent workers become lost, silent clients are closed. Call every 100 ms or so. */
void directory_tick(directory_t *directory, uint64_t now_ns);

/* ---- caches ---- */

typedef struct dir_cache {
    uint64_t id;
    char name[129];
    attn_geometry_t geometry; /**< complete, layer table owned by the directory */
    char kind[64];            /**< of arithmetic: all its workers are of this kind */
    uint32_t opens;           /**< how often it is open */
} dir_cache_t;

/**
 * Fill in the defaults of page_size and chunk_size and check every field against its limits,
 * the rows of the layer table too. (The defaults of rows are filled in by opening a cache.)
 * @return ATTN_ERR_INVALID with field, value and limit
 */
attn_status_t directory_geometry_check(attn_geometry_t *geometry);

/**
 * Open or join. A new cache has no workers yet: the caller opens its region on each live
 * worker and tells directory_cache_on_worker(); with none told it cannot place chunks.
 * Geometries are compared field by field after defaults are filled in, floats by their bits;
 * region_bytes 0 joins any. geometry NULL joins the open cache of that name whatever its geometry
 * (directory_cache() has it), and never makes one.
 *
 * @param created_p  true: new, go and open regions; false: joined
 * @return ATTN_ERR_EXISTS     same name, other geometry; names the field that differs
 * @return ATTN_ERR_INVALID    name or geometry
 * @return ATTN_ERR_EXHAUSTED  DIR_CACHES_MAX
 * @return ATTN_ERR_NOT_FOUND  client, or geometry is NULL and no cache of that name is open
 */
attn_status_t directory_cache_open(directory_t *directory, uint32_t client, const char *name,
                                   const attn_geometry_t *geometry, uint64_t *cache_p,
                                   bool *created_p);

/**
 * The cache has a region of n_pages pages on the worker.
 * @return ATTN_ERR_UNSUPPORTED  its kind of arithmetic is not the cache's (the first worker told
 *                               sets it); names both
 * @return ATTN_ERR_NOT_FOUND    cache, or worker (never was, or lost)
 */
attn_status_t directory_cache_on_worker(directory_t *directory, uint64_t cache, uint32_t worker,
                                        uint32_t n_pages);

/** Leave; the last to leave closes it: its sequences are freed, then effects close the regions.
 * @return ATTN_ERR_NOT_FOUND  client or cache, or the client has not opened it */
attn_status_t directory_cache_close(directory_t *directory, uint32_t client, uint64_t cache);

/** NULL: not open. */
const dir_cache_t *directory_cache(const directory_t *directory, uint64_t cache);
uint32_t directory_caches(const directory_t *directory, uint64_t *ids, uint32_t room);

/** Does the worker have a region of the cache? */
bool directory_cache_is_on(const directory_t *directory, uint64_t cache, uint32_t worker);

/* ---- sequences ---- */

/** The sequences' table, for reading. */
const seq_table_t *directory_sequences(const directory_t *directory);

/** Checked: the sequence exists and is of this cache. @return ATTN_ERR_NOT_FOUND */
attn_status_t directory_seq_check(const directory_t *directory, uint64_t cache, attn_seq_t seq);

/** @return ATTN_ERR_NOT_FOUND  cache or client; ATTN_ERR_EXHAUSTED, ATTN_ERR_NO_MEMORY */
attn_status_t directory_seq_create(directory_t *directory, uint64_t cache, uint32_t client,
                                   uint64_t expected_tokens, attn_seq_t *seq_p);

/**
 * Place chunks so that the sequence can hold `tokens` tokens (chunk 0 in any case), and one
 * chunk more in advance if there is room for it. On failure nothing was changed, and nothing is
 * released. Chunks that are there stay with their owners, lost ones too, or tokens could vanish
 * without a word: who knows that a lost chunk holds none (one placed in advance) cuts it off and
 * reserves again.
 * @return ATTN_ERR_UNAVAILABLE  no live worker has a region of the cache
 * @return ATTN_ERR_EXHAUSTED    no worker has room (by pages placed so far, as if none were shared)
 * @return ATTN_ERR_TOO_LARGE    above ATTN_SEQ_CHUNKS_MAX chunks
 */
attn_status_t directory_seq_reserve(directory_t *directory, attn_seq_t seq, uint64_t tokens);

/**
 * As seq_fork, seq_chunk_replace, seq_cut, seq_free of kvstore/sequence.h. Every released chunk
 * comes out as an effect unless its owner is lost, also one that its owner never saw: clients
 * write to owners without the directory being told, so it cannot know. The tail of a fork is on
 * the owner of chunk n_shared, a copy on the owner of chunk i.
 * @return ATTN_ERR_LOST  that owner is lost
 */
attn_status_t directory_seq_fork(directory_t *directory, attn_seq_t seq, uint32_t client,
                                 uint32_t n_shared, bool with_tail, attn_seq_t *fork_p,
                                 uint64_t *tail_p);
attn_status_t directory_seq_replace(directory_t *directory, attn_seq_t seq, uint32_t i,
                                    uint64_t chunk);
uint64_t directory_chunk_id(directory_t *directory); /* for directory_seq_replace() */

/**
 * Place chunk i, whose owner is lost, anew, for all sequences that list it: it has another id and a
 * live owner, where it is placed as if it were new, and nothing is in it yet. sealed: as
 * seq_chunk_renew().
 * @return ATTN_ERR_INVALID      its owner lives, or there is no chunk i
 * @return ATTN_ERR_EXHAUSTED, ATTN_ERR_UNAVAILABLE  as directory_seq_reserve()
 */
attn_status_t directory_seq_renew(directory_t *directory, attn_seq_t seq, uint32_t i, bool sealed);
attn_status_t directory_seq_unseal(directory_t *directory, attn_seq_t seq, uint32_t i);
attn_status_t directory_seq_cut(directory_t *directory, attn_seq_t seq, uint32_t n_chunks);
attn_status_t directory_seq_free(directory_t *directory, attn_seq_t seq);

/* ---- moving chunks ---- */

/**
 * A chunk on its way to another owner. The directory keeps room for it there, and goes on naming
 * the old owner until directory_move_done(). There it has another id, so that what is left of an
 * attempt that failed is never taken for the chunk itself.
 */
typedef struct dir_move {
    uint64_t cache;
    attn_seq_t seq; /**< one that lists it, as number i */
    uint32_t i;
    uint32_t from, to;    /**< workers */
    uint64_t chunk, copy; /**< its id there and there; copy also stands for the attempt */
} dir_move_t;

/**
 * Move chunk i of a sequence, for all that list it. Whoever begins ends it: done or failed.
 * @param to  0: the worker with most room
 * @return ATTN_ERR_INVALID      no chunk i, or it is there already
 * @return ATTN_ERR_LOST         its owner is lost
 * @return ATTN_ERR_UNAVAILABLE  `to` is not alive, or has no region of the cache; or nobody else
 * has
 * @return ATTN_ERR_EXHAUSTED    `to`, or every other worker, has no room, or is leaving
 */
attn_status_t directory_move_begin(directory_t *directory, attn_seq_t seq, uint32_t i, uint32_t to,
                                   dir_move_t *move);

/**
 * All of it is at `to`, and the old owner lets no step name it any more: from now on `to` owns it,
 * and the epoch grows. Effect: the old owner releases it.
 * @return ATTN_ERR_NOT_FOUND    the sequence, or the cache, is gone, or has another chunk there
 * @return ATTN_ERR_UNAVAILABLE  `to` is lost; in either case the move goes on to be failed
 */
attn_status_t directory_move_done(directory_t *directory, const dir_move_t *move);

/** It came to nothing, and all is as before. Effects: if held, the old owner keeps it; if copied,
 * the other one releases what it has. */
void directory_move_failed(directory_t *directory, const dir_move_t *move, bool held, bool copied);

/** Place nothing new on the worker; or do again. Forks and cuts of what is there still may add to
 * it. @return ATTN_ERR_NOT_FOUND  it is lost, or never was */
attn_status_t directory_worker_leave(directory_t *directory, uint32_t id, bool leave);

/** Chunks that it owns, whether or not it ever saw them. */
uint64_t directory_worker_chunks(const directory_t *directory, uint32_t id);

/* ---- constants for the cost model ---- */

/**
 * The way to a worker, as the directory's owner measured it; the slowest to any that lives counts.
 * Without hop_seconds above 0 this changes nothing, without a bandwidth above 0 that stays as it
 * was, and send_seconds of 0 is taken to be the usual share of the hop.
 */
void directory_worker_link(directory_t *directory, uint32_t worker, const cost_link_t *link);

/** The way to workers, as this client's runs found it: it counts in place of the owner's where
 * that client's sequences are placed. As above. */
void directory_client_link(directory_t *directory, uint32_t client, const cost_link_t *link);

/** The slowest link that a client told of: hop_seconds is 0 if none did. */
cost_link_t directory_clients_link(const directory_t *directory);

/** How fast one thread of a client merges. */
void directory_set_merge(directory_t *directory, double bytes_per_second);

/** What counts for placing sequences of this client; 0: of no client that told of its link. */
cost_constants_t directory_cost(const directory_t *directory, uint32_t client);

#endif
