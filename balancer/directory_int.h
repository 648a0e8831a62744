/*
 * directory_int.h: the directory's state, shared by the files directory*.c and by nobody else.
 *
 *     directory.c            life, tick
 *     directory_cost.c       constants of the cost model, and the break-even that follows
 *     directory_workers.c    join, heartbeat, lose
 *     directory_clients.c    leases, and the sweep that frees what a client or cache leaves
 *     directory_caches.c     open, join, close; regions on workers
 *     directory_sequences.c  placement, and the operations on sequences
 *     directory_moves.c      chunks that change their owner
 */
#ifndef ATTN_BALANCER_DIRECTORY_INT_H
#define ATTN_BALANCER_DIRECTORY_INT_H

#include "balancer/directory.h"

#include "base/table.h"

/** What a full chunk counts in dir_spot_t.fill. */
#define DIR_FULL 255u

/** A live worker's region of one cache; small, for placement looks at many of them. */
typedef struct dir_spot {
    uint32_t worker;
    uint32_t n_pages;
    uint64_t placed; /**< pages of the chunks placed there, each counted as if it were full */
    uint64_t fill;   /**< how full they are as far as is known: in DIR_FULLths of a chunk */
    uint64_t coming; /**< pages kept for chunks that are being moved there */
    bool leaving;    /**< nothing new is placed there */
} dir_spot_t;

typedef struct dir_cache_entry {
    dir_cache_t cache;
    void *table;          /**< behind cache.geometry.layer_table */
    uint32_t chunk_pages; /**< pages of a full chunk */
    uint32_t n_spots, room_spots;
    dir_spot_t *spots; /**< [n_spots] ascending in worker */
    uint64_t n_sequences;
    bool leaving; /**< the running sweep closes it */
    struct dir_break_even {
        uint64_t tokens;  /**< its length, for ... */
        uint64_t version; /**< ... directory->cost_version, ... */
        uint32_t client;  /**< ... sequences of this client, ... */
        uint32_t n_spots; /**< ... on so many workers */
    } break_even;         /**< what was last computed */
    UT_hash_handle hh_id, hh_name;
} dir_cache_entry_t;

/** How often a client has a cache open. */
typedef struct dir_open {
    uint64_t cache;
    uint32_t times;
} dir_open_t;

typedef struct dir_client {
    uint32_t id; /**< 0: nobody, whose lease never ends */
    char name[64];
    uint64_t seen_ns;
    uint32_t n_opens, room_opens;
    dir_open_t *opens;
    uint64_t n_sequences;
    cost_link_t link; /**< its way to workers; hop_seconds 0: it did not say */
    bool leaving;     /**< the running sweep closes it */
    UT_hash_handle hh;
} dir_client_t;

struct directory {
    directory_options_t options;
    dir_effect_fn effect;
    void *effect_arg;
    uint64_t epoch;

    dir_worker_t *workers; /* [n_workers] ascending in id; room for DIR_WORKERS_MAX */
    uint32_t n_workers, next_worker;

    dir_client_t *clients; /* by id */
    dir_client_t nobody;
    uint32_t n_clients, next_client;

    dir_cache_entry_t *by_id, *by_name;
    uint32_t n_caches;
    uint64_t next_cache;

    seq_table_t *sequences;
    cost_constants_t cost;
    uint64_t cost_version; /* grows with every change of cost, and of a client's link */
    dir_counts_t counts;
};

/* directory_workers.c */
dir_worker_t *dir_worker_find(const directory_t *directory, uint32_t id);

/* directory_cost.c */
/** From the workers that live now. */
void dir_cost_update(directory_t *directory);
/** Tokens above which a sequence of this client is spread. */
uint64_t dir_break_even(const directory_t *directory, dir_cache_entry_t *cache, uint32_t client);

/* directory_clients.c */
/** @return ATTN_ERR_NOT_FOUND */
attn_status_t dir_client_get(const directory_t *directory, uint32_t id, dir_client_t **client_p);
/** Count one more opening of the cache. @return ATTN_ERR_NO_MEMORY */
attn_status_t dir_client_note_open(dir_client_t *client, uint64_t cache);
/** Count one less. @return ATTN_ERR_NOT_FOUND  not open by this client */
attn_status_t dir_client_note_close(dir_client_t *client, uint64_t cache);
/** Free the sequences of all clients and caches that are leaving, then those caches and clients. */
void dir_sweep(directory_t *directory);

/* directory_caches.c */
dir_cache_entry_t *dir_cache_find(const directory_t *directory, uint64_t id);
/** @return ATTN_ERR_NOT_FOUND */
attn_status_t dir_cache_get(const directory_t *directory, uint64_t id, dir_cache_entry_t **cache_p);
dir_spot_t *dir_spot_find(const dir_cache_entry_t *cache, uint32_t worker); /* NULL: none */
void dir_spot_remove(dir_cache_entry_t *cache, uint32_t worker);
/** One opening less; at none the cache is leaving. */
void dir_cache_leave(dir_cache_entry_t *cache, uint32_t times);
/** Close the regions (effects) and forget the cache; its sequences are gone already. */
void dir_cache_drop(directory_t *directory, dir_cache_entry_t *cache);

/* directory_sequences.c */
attn_status_t dir_seq_free(directory_t *directory, attn_seq_t seq, const seq_info_t *info);
/** The sequence, and the cache that it is of. @return ATTN_ERR_NOT_FOUND */
attn_status_t dir_seq_get(const directory_t *directory, attn_seq_t seq, seq_info_t *info,
                          dir_cache_entry_t **cache_p);
/** Pages that may be given out. */
uint64_t dir_spot_room(const dir_spot_t *spot);
/** The one with most room but for that of a worker (0: of all); NULL: there is no other. */
dir_spot_t *dir_spot_best(const dir_cache_entry_t *cache, uint32_t except);

static inline void
dir_emit(const directory_t *directory, dir_effect_type_t type, uint32_t worker, uint64_t cache,
         uint64_t chunk)
{
    dir_effect_t effect = {.type = type, .worker = worker, .cache = cache, .chunk = chunk};
    directory->effect(directory->effect_arg, &effect);
}

#endif
