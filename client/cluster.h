/*
 * cluster.h: the control plane, over any links: the directory decides, the links act. The
 * coordinator daemon puts it behind rpc; libattn has one of its own for inproc://.
 *
 * Threads: all functions may be called from any thread. The directory is under one lock,
 * never held while a worker is asked. An operation on a sequence (fork, truncate, free) holds
 * that sequence meanwhile: another one is refused with ATTN_ERR_BUSY, but any number of forks go
 * at once.
 */
#ifndef ATTN_CLUSTER_H
#define ATTN_CLUSTER_H

#include "balancer/directory.h"
#include "balancer/split.h"
#include "client/attn.h"
#include "client/link.h"

typedef struct cluster cluster_t;

/** links is the caller's, outlives the cluster. */
attn_status_t cluster_create(const directory_options_t *options, links_t *links,
                             cluster_t **cluster_p);
void cluster_destroy(cluster_t *cluster);

/** Lose silent workers and clients, open caches on workers that joined, repeat what failed.
 * Call every 100 ms or so from a thread that may block. */
void cluster_tick(cluster_t *cluster);

uint64_t cluster_epoch(cluster_t *cluster);
uint32_t cluster_lease_ms(const cluster_t *cluster); /* of a client */

/* Workers. As directory_worker_join / heartbeat / lose. */
attn_status_t cluster_worker_join(cluster_t *cluster, const dir_worker_t *hello, uint32_t *id_p);
attn_status_t cluster_worker_heartbeat(cluster_t *cluster, const dir_worker_t *figures);

/* Clients. */
attn_status_t cluster_client_open(cluster_t *cluster, const char *name, uint32_t *client_p);
/** told: as the client says its runs reach workers; hop_seconds 0: it does not say. */
attn_status_t cluster_client_renew(cluster_t *cluster, uint32_t client, const cost_link_t *told);
void cluster_client_close(cluster_t *cluster, uint32_t client);

/** Open or join, with a region on every live worker; geometry NULL only joins. kind: of its
 * arithmetic. */
attn_status_t cluster_cache_open(cluster_t *cluster, uint32_t client, const char *name,
                                 const attn_geometry_t *geometry, uint64_t *cache_p, char kind[64]);
attn_status_t cluster_cache_close(cluster_t *cluster, uint32_t client, uint64_t cache);

/** A complete copy of an open cache's geometry; its layer table is *table_p: free() it. */
attn_status_t cluster_cache_geometry(cluster_t *cluster, uint64_t cache, attn_geometry_t *geometry,
                                     void **table_p);

/* Sequences: as in attn.h. */
attn_status_t cluster_seq_create(cluster_t *cluster, uint64_t cache, uint32_t client,
                                 uint64_t expected_tokens, attn_seq_t *seq_p);
attn_status_t cluster_seq_fork(cluster_t *cluster, uint64_t cache, uint32_t client, attn_seq_t seq,
                               uint64_t length, attn_seq_t *fork_p);
attn_status_t cluster_seq_truncate(cluster_t *cluster, uint64_t cache, attn_seq_t seq,
                                   uint64_t length);
attn_status_t cluster_seq_free(cluster_t *cluster, uint64_t cache, attn_seq_t seq);

/**
 * Chunks and owners of n sequences with lengths and generations as the owners tell now;
 * tokens (NULL: none) places chunks to hold so many tokens first. infos[n] are freed with
 * attn_seq_info_free(). With tokens, a chunk in advance on a lost worker is placed anew, and
 * what a half-done commit left behind the committed length is dropped (unless a step is open).
 * With bases (NULL: none) as well, lost chunks all of whose new tokens are in [base, tokens) are
 * placed anew.
 */
attn_status_t cluster_layout(cluster_t *cluster, uint64_t cache, const attn_seq_t *seqs,
                             const uint64_t *bases, const uint64_t *tokens, uint32_t n,
                             attn_seq_info_t *infos, uint64_t *epoch_p);

/** What came of moving chunks. */
typedef struct cluster_moved {
    uint64_t chunks, bytes; /**< moved, and k and v of them */
    uint64_t left;          /**< that are to be moved still: call again */
    uint64_t failed;        /**< attempts; they count as left */
    attn_status_t why;      /**< of the last one that failed */
    char reason[256];
} cluster_moved_t;

/**
 * Move chunks of a sequence to another worker: those that are not there, or only those of one
 * worker. Steps go on; what a chunk has is copied, then its old owner refuses new steps while those
 * that are open end, for a second at most, and the new owner takes over. Whatever fails leaves a
 * chunk where it was. Ends after CLUSTER_MOVE_MS and the chunk at hand.
 * @param from  0: of any worker
 * @param to    0: each to the worker with most room; from is not 0 then
 * @return as directory_move_begin() if none could be moved for that reason; failures of single
 *         chunks are counted
 */
attn_status_t cluster_seq_move(cluster_t *cluster, uint64_t cache, attn_seq_t seq, uint32_t from,
                               uint32_t to, cluster_moved_t *moved);

/**
 * Have a worker emptied: nothing new is placed there from now on, and its chunks are moved.
 * @param stay  instead, it is as any other again
 */
attn_status_t cluster_worker_drain(cluster_t *cluster, uint32_t worker, uint32_t to, bool stay,
                                   cluster_moved_t *moved);

#define CLUSTER_MOVE_MS 1000u

/** From the chunks: the committed length, and the holes. Sets length, n_holes and holes of info. */
attn_status_t cluster_holes(attn_seq_info_t *info, uint32_t chunk_size);

/** @return ATTN_ERR_LOST  there are holes below that position: names them */
attn_status_t cluster_check_whole(const attn_seq_info_t *info, uint32_t chunk_size, attn_seq_t seq,
                                  uint64_t below);

static inline split_chunk_t
cluster_split_chunk(const attn_chunk_info_t *chunk)
{
    return (split_chunk_t){.id         = chunk->chunk,
                           .worker     = chunk->worker,
                           .generation = chunk->generation,
                           .length     = chunk->length,
                           .lost       = chunk->lost,
                           .sealed     = chunk->sealed};
}

/** A part of a sequence, read back. */
typedef struct cluster_export {
    uint32_t layer;
    uint64_t first, end; /**< tokens wanted */
    uint64_t version;    /**< of the part before; 0: none. Set */
    uint32_t n;          /**< set: tokens that are here, from first on */
    uint8_t *data;       /**< set: k, then v of them; free() it in any case; NULL at first */
    uint64_t bytes;
} cluster_export_t;

/** As attn_seq_export(), a part at a time. */
attn_status_t cluster_export(cluster_t *cluster, uint64_t cache, attn_seq_t seq,
                             cluster_export_t *part);

/** All workers: address of one, where it is for groups, and all of them with figures. */
attn_status_t cluster_worker_address(cluster_t *cluster, uint32_t worker, char address[64],
                                     bool *alive_p);
attn_status_t cluster_worker_place(cluster_t *cluster, uint32_t worker, dir_place_t *place);
attn_status_t cluster_describe(cluster_t *cluster, attn_cluster_info_t *info);

/** The same and more, for who watches the cluster. */
typedef struct cluster_figures {
    uint64_t epoch, sequences, uptime_ms, now_ns;
    uint32_t clients, caches, n_workers;
    dir_counts_t counts;
    dir_worker_t *workers; /**< [n_workers] by id, lost ones too; free() */
} cluster_figures_t;

attn_status_t cluster_figures(cluster_t *cluster, cluster_figures_t *figures);

#endif
