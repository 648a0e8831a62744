/*
 * split.h: cut a batch into per-worker work from the layouts of its sequences: who stores
 * which new tokens, who attends to what, and how the answer comes back. Pure.
 */
#ifndef ATTN_SPLIT_H
#define ATTN_SPLIT_H

#include "kernels/kernels.h"

/** Where a sequence's chunks are, as a client caches it: chunk i covers tokens from
 * i * chunk_size on. */
typedef struct split_chunk {
    uint64_t id;
    uint32_t worker;
    uint32_t generation; /**< 0: not made yet */
    uint32_t length;     /**< committed tokens */
    bool lost;           /**< its owner is gone, and its tokens with it */
    bool sealed;         /**< it was full once: short of that, it is a hole to be filled */
} split_chunk_t;

typedef struct split_layout {
    uint64_t seq;
    uint32_t n_chunks;
    const split_chunk_t *chunks;
} split_layout_t;

/** An entry of the batch: as attn_entry_t of the public header. */
typedef struct split_entry {
    uint64_t base;
    uint32_t n_q, n_new;
    bool path; /**< commit takes a path: whoever stores a new token stores all that follow it, too,
                    for each may be moved to where that token is */
} split_entry_t;

/** A chunk in one worker's share. */
typedef struct split_ref {
    uint32_t number; /**< its number in the sequence */
    uint32_t n_new;  /**< tokens of this step that go into it */
    uint64_t id;
    uint32_t generation, length;
} split_ref_t;

/** One entry of the batch, on one worker. */
typedef struct split_part {
    uint32_t entry; /**< index in the batch */
    bool whole;     /**< attends to all that the entry sees: answers with O, not partials */
    bool attends;   /**< has committed or new tokens here and n_q > 0 */
    bool holds;     /**< owns the chunk where the next token goes: one step a sequence there */
    uint32_t n_refs;
    split_ref_t *refs; /**< ascending in number */
    /** New tokens stored here, as runs of the entry's n_new: [first, first + n). */
    uint32_t n_rows; /**< runs */
    struct split_rows {
        uint32_t first, n;
    } * rows;
    uint32_t n_nodes;   /**< partials that come back, per query row and head; 0 if whole */
    attn_node_t *nodes; /**< ascending in key */
} split_part_t;

typedef struct split_share {
    uint32_t worker;
    uint32_t n_parts;
    split_part_t *parts; /**< ascending in entry */
} split_share_t;

typedef struct split {
    uint32_t n_shares;
    split_share_t *shares; /**< ascending in worker */
} split_t;

/**
 * @param layouts  [batch n], entry i's sequence; chunks cover base + n_new tokens
 *                 (tokens at and above base, other than the new ones, are not seen)
 * @param chunk_size tokens
 *
 * New tokens go behind all others, or into a hole: into chunks that are sealed, from where the
 * first of them ends. Then what is behind them does not matter, nor, if nothing is asked, what is
 * before.
 *
 * A worker is in the split if it stores new tokens, owns KV that is seen, or holds. The
 * chunk where the next token goes is number base / chunk_size, or the last one if that is
 * not placed; a layout has at least one chunk. Refs list every chunk of the worker with tokens
 * below base and those written. An entry that sees nothing (base and n_new are 0) is held and
 * answered by nobody: its outputs are empty states. Where the holder is lost the next one before it
 * that is not holds, or nobody.
 *
 * @return ATTN_ERR_INVALID    base or n_new do not fit the layout (or, with n_new 0, base is above
 *                             the committed length); names entry, field, limit
 * @return ATTN_ERR_STALE      committed lengths of the layout are not those of base tokens when
 *                             n_new > 0: full below, base's remainder, then none
 * @return ATTN_ERR_LOST       what is asked needs tokens that were lost, or what is new goes into a
 *                             chunk that was; names all ranges
 * @return ATTN_ERR_NO_MEMORY
 */
attn_status_t split_batch(const split_entry_t *entries, const split_layout_t *layouts, uint32_t n,
                          uint32_t chunk_size, split_t **split_p);
void split_free(split_t *split); /* NULL is allowed */

#endif
