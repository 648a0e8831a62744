/*
 * cost.h: the cost model: what a layer of a batch takes, by where its partial answers are put
 * together, and so how long a sequence stays whole. Pure functions of constants, which workers,
 * coordinator and clients measure (docs/architecture.md tells who measures what, and the formulas).
 */
#ifndef ATTN_COST_H
#define ATTN_COST_H

#include "base/attn_types.h"

/** Rates by attn_dtype_t; that of ATTN_DTYPE_NONE is not used. */
#define COST_DTYPES 4u

/** What a worker does, as it measured at its start. */
typedef struct cost_worker {
    double read_bandwidth; /**< bytes/s that its device reads memory with; above 0 */
    double attend_seconds; /**< of attention over next to nothing: launch, wake-up; at least 0 */
    double few_flops[COST_DTYPES];  /**< FLOP/s over KV of this dtype that lies in a cache, for
                                         requests of up to 64 packed rows; 0: not known */
    double many_flops[COST_DTYPES]; /**< and for larger ones */
} cost_worker_t;

/** The way between who merges and one worker, or between a thin client and the coordinator. */
typedef struct cost_link {
    double hop_seconds;  /**< there and back, of a small message, median */
    double send_seconds; /**< of it, the sender's core: workers are sent to one after the other */
    double bandwidth;    /**< bytes/s, both ways together; above 0 */
} cost_link_t;

typedef struct cost_constants {
    cost_worker_t worker;   /**< the slowest */
    cost_link_t link;       /**< from who merges to a worker */
    double merge_bandwidth; /**< bytes/s of partials that one thread merges; above 0 */
} cost_constants_t;

/** What is assumed until something was measured: a CPU core and loopback gRPC. */
void cost_constants_init(cost_constants_t *constants);

/** A link of which only the hop is known: the sender's core takes a quarter of it. */
#define COST_SEND_SHARE 4.0

/** The slower of both in everything; a rate that one of them does not know is the other's. */
void cost_worker_slowest(cost_worker_t *into, const cost_worker_t *other);

/** The slower of both in everything; a link without hop_seconds, or a bandwidth that is 0, is not
 * known. */
void cost_link_slowest(cost_link_t *into, const cost_link_t *other);

/** Bytes of K and V of one token in one layer. */
uint64_t cost_kv_token_bytes(const attn_geometry_t *geometry);

/** Some sequences of a step that are alike. q and o are taken to be of the dtype of k and v. */
typedef struct cost_batch {
    const attn_geometry_t *geometry;
    uint64_t tokens;    /**< of each sequence, those of the step included */
    uint32_t rows;      /**< query rows of each, n_q */
    uint32_t new_rows;  /**< new tokens of each, n_new: their k, v are sent to one worker each */
    uint32_t sequences; /**< at least 1 */
} cost_batch_t;

/** What `count` workers that are alike do of a batch. */
typedef struct cost_part {
    cost_worker_t worker;
    cost_link_t link;
    uint64_t tokens;    /**< of each of its sequences, on each worker: the one that has most */
    uint32_t sequences; /**< of the batch, on each worker */
    uint32_t nodes;     /**< partials of each row and head; 0: it answers with O */
    uint32_t count;
} cost_part_t;

/** Seconds of one layer: total = attend + max(read, compute) + hop + link + merge. */
typedef struct cost_seconds {
    double attend, read, compute; /**< on the worker that takes longest */
    double hop;                   /**< for the answer of the last worker */
    double link;                  /**< for all bytes at the port of who merges */
    double merge;
    double total;
} cost_seconds_t;

/** Partials of a layer that are put together: the same bits by whom ever. */
typedef struct cost_merge {
    uint32_t workers;    /**< that have some, at least 1 */
    uint64_t rows;       /**< query rows times heads */
    uint64_t states;     /**< of all rows, on all workers */
    uint32_t head_dim_v; /**< of a state */
    uint32_t o_size;     /**< bytes of an element of O */
} cost_merge_t;

/** How GPUs of one host exchange partials, and merge them. */
typedef struct cost_exchange {
    double seconds;      /**< of nothing, with nobody: a launch beside attention's; above 0 */
    double peer_seconds; /**< more for each other rank */
    double bandwidth;    /**< bytes/s of partials, from each to the others; above 0 */
} cost_exchange_t;

/** What is assumed until something was measured: PCIe. */
void cost_exchange_init(cost_exchange_t *exchange);

/** How long exchanges of a group took, of few rows and of many: of each, every rank has a state. */
typedef struct cost_proof {
    uint32_t ranks, head_dim_v;
    uint32_t few, many; /**< rows; few < many */
    double few_seconds, many_seconds;
} cost_proof_t;

/** What a proof tells. A peer's share of it is as assumed, for that takes groups of several sizes;
 * so is the bandwidth where many rows took no longer than few. */
void cost_exchange_measured(const cost_proof_t *proof, cost_exchange_t *exchange);

/** The slower of both in everything; one whose seconds are 0 is not known. */
void cost_exchange_slowest(cost_exchange_t *into, const cost_exchange_t *other);

/** What comes behind attention, but for the hop, which is the same: partials to the client and
 * their merge there; or the exchange, and O to the client. Seconds. */
double cost_merge_client(const cost_link_t *link, double merge_bandwidth,
                         const cost_merge_t *merge);
double cost_merge_group(const cost_link_t *link, const cost_exchange_t *exchange,
                        const cost_merge_t *merge);

/** FLOP/s that the worker does for rows of this batch; 0: not known. */
double cost_flops(const cost_batch_t *batch, const cost_worker_t *worker);

/** A worker's own: attend, read, compute, and their total. */
cost_seconds_t cost_attend(const cost_batch_t *batch, const cost_part_t *part);

/**
 * A layer on these parts, merged by who sends to them.
 * @param front  NULL, or the way of a thin client to the coordinator, which then is who merges
 */
cost_seconds_t cost_layer(const cost_batch_t *batch, const cost_part_t *parts, uint32_t n_parts,
                          double merge_bandwidth, const cost_link_t *front);

/** The same, merged by those of the parts that have partials, of which there are two at least. */
cost_seconds_t cost_layer_group(const cost_batch_t *batch, const cost_part_t *parts,
                                uint32_t n_parts, const cost_exchange_t *exchange);

/** A sequence is whole, or spread, over workers that are as the constants say. */
typedef struct cost_layout {
    uint32_t workers; /**< that have some of the batch */
    uint32_t n_parts;
    cost_part_t parts[2];
} cost_layout_t;

/** A spread sequence is on so many workers at most: the merge tree's lanes. */
#define COST_SPREAD_MAX 64u

/** The batch on `workers` workers, at least 1, each of its sequences whole on one of them. */
void cost_layout_whole(const cost_constants_t *constants, const cost_batch_t *batch,
                       uint32_t workers, cost_layout_t *layout);

/** The batch with each sequence's chunks spread over `workers` workers, at least 1, as placement
 * does it: over no more than there are chunks, nor than COST_SPREAD_MAX. */
void cost_layout_spread(const cost_constants_t *constants, const cost_batch_t *batch,
                        uint32_t workers, cost_layout_t *layout);

/** Where partial answers are put together. */
typedef enum cost_place {
    COST_LOCAL,       /**< nowhere: each sequence is whole on one worker */
    COST_GROUP,       /**< among workers that share a host */
    COST_CLIENT,      /**< in libattn */
    COST_COORDINATOR, /**< in the coordinator, for a thin client; or nowhere, if that is cheaper */
    COST_PLACES,
} cost_place_t;

typedef struct cost_choice {
    cost_place_t best; /**< the cheapest that is available; COST_PLACES: none is */
    bool available[COST_PLACES];
    uint32_t workers[COST_PLACES];
    cost_seconds_t seconds[COST_PLACES]; /**< of those that are available */
} cost_choice_t;

/**
 * What each place would cost, where `workers` workers have a region of the cache.
 * With less than two workers, or one chunk, nothing can be spread, and with none nothing is
 * available.
 * @param front     a thin client's way to the coordinator; NULL: there is none
 * @param exchange  of these workers; NULL: they do not merge among themselves
 */
void cost_choose(const cost_constants_t *constants, const cost_link_t *front,
                 const cost_exchange_t *exchange, const cost_batch_t *batch, uint32_t workers,
                 cost_choice_t *choice);

/** Of workers that may be a group, which is cheaper: COST_GROUP or COST_CLIENT? Of partials that
 * are where they are, of any entries of a step. */
cost_place_t cost_merge_place(const cost_constants_t *constants, const cost_exchange_t *exchange,
                              const cost_merge_t *merge);

/**
 * Tokens above which a decode step (one row) of one sequence is faster with it spread
 * (COST_CLIENT) than whole (COST_LOCAL), where there are `workers` workers. UINT64_MAX if workers
 * < 2, or where it never is. Whole chunks, at least one.
 */
uint64_t cost_break_even_tokens(const cost_constants_t *constants, const attn_geometry_t *geometry,
                                uint32_t workers);

#endif
