/*
 * image.h: a plan as the GPU reads it. Host code (image.c) writes these records into one block,
 * uploaded in one copy; kernels (attend.cu, prefill.cu, merge.cu) only read them. Shared by C and
 * CUDA.
 *
 *     leaf    positions of a work, 64 or up to a chunk: where its first page is listed, its length
 *     block   16 positions of a leaf of 64, with a list of pages; four of them are a bundle
 *     query   a query of a work: its row of q, where it stands, where its answer goes
 *     piece   a contiguous range of leaves or bundles of a work, for one KV head: what one team
 *             computes
 *     tile    the same of a request of many rows, for the prefill kernel: up to 128 rows
 *     queue   of a class: pieces that no team has from the beginning
 *     item    a row tile of one reduction and KV head whose states are folded by the merge kernel
 */
#ifndef ATTN_KERNELS_CUDA_IMAGE_H
#define ATTN_KERNELS_CUDA_IMAGE_H

#include <stdint.h>

/** Tokens of a leaf: of requests of few rows, and on devices without wgmma of any. */
#define CUDA_LEAF 64
#define CUDA_NONE 0xffffffffu

/** Consumer warps of a team; two producer warps fill its ring. */
#define CUDA_WARPS 4

/** Tokens of a block: what one warp has of a leaf, and a matrix instruction takes. */
#define CUDA_BLOCK (CUDA_LEAF / CUDA_WARPS)

/** Teams of a CTA of attend.cu, for so many rows: as many as registers suffice for. */
#define CUDA_TEAMS(rows, d_k, d_v)                                                                 \
    ((rows) == 8 && (d_k) + (d_v) <= 128                     ? 3                                   \
     : (rows) == 8 || ((rows) <= 32 && (d_k) + (d_v) <= 256) ? 2                                   \
                                                             : 1)
#define CUDA_THREADS(rows, d_k, d_v) (CUDA_TEAMS(rows, d_k, d_v) * (CUDA_WARPS + 2) * 32)

/** The rings that leaves come through: bytes of a stage, K or V of a leaf, and stages at most of
 * all rings of a CTA. */
#define CUDA_STAGE(d_k, d_v) (CUDA_LEAF * 2 * ((d_k) > (d_v) ? (d_k) : (d_v)))
#define CUDA_STAGES_MAX 32

/** A state of a warp with so many columns of A, 8 n rows of which two each of so many pairs are
 * used (stack.cuh). */
#define CUDA_STATE_BYTES(columns, n, pairs) ((n) * (pairs) * (8 * (columns) + 16))

/** Shared memory of a team for so many rows beside ring and stacks (rows.cuh). */
#define CUDA_NEAR_BYTES(rows, d_k)                                                                 \
    ((rows) * (((rows) > 16 ? 2 * (d_k) : 0) + 2 * CUDA_LEAF + 8 + 3 * 4 * CUDA_WARPS + 5 * 4))

/*
 * The prefill kernel (sm_90a), for requests of many rows. A CTA has a producer warpgroup and
 * CUDA_MANY_GROUPS consumer warpgroups of 64 rows each; K and V come in tiles of so many tokens
 * through rings of so many stages. The numbers may be set for measuring variants: the tokens of a
 * tile and of a leaf are part of the arithmetic, the others are not.
 */
#ifndef CUDA_MANY_LEAF
#define CUDA_MANY_LEAF 8192u
#endif
#ifndef CUDA_MANY_GROUPS
#define CUDA_MANY_GROUPS 2u
#endif
#ifndef CUDA_MANY_TILE
#define CUDA_MANY_TILE 128u
#endif
#define CUDA_MANY_ROWS (64u * CUDA_MANY_GROUPS)
#define CUDA_MANY_THREADS (128u * (CUDA_MANY_GROUPS + 1))

/** Shared memory of a CTA, beside barriers and what is said of works. */
#define CUDA_MANY_SHARED_MOST (227u * 1024u - 256u - 3u * (96u + 4u * CUDA_MANY_ROWS))

/** Tokens of a tile: with 256 columns the sums leave no registers for 128. */
#define CUDA_MANY_TOKENS(d_v) ((d_v) > 128 ? 64u : CUDA_MANY_TILE)

/** Bytes of a tile of Q, and of K and V together. */
#define CUDA_MANY_Q(d_k) (CUDA_MANY_ROWS * (d_k)*2u)
#define CUDA_MANY_KV(d_k, d_v) (CUDA_MANY_TOKENS(d_v) * ((d_k) + (d_v)) * 2u)

/** Stages of each ring: what fits, two to four. */
#define CUDA_MANY_FIT(d_k, d_v) ((204800u - CUDA_MANY_Q(d_k)) / CUDA_MANY_KV(d_k, d_v))
#define CUDA_MANY_STAGES(d_k, d_v)                                                                 \
    (CUDA_MANY_FIT(d_k, d_v) < 2 ? 2u : CUDA_MANY_FIT(d_k, d_v) > 4 ? 4u : CUDA_MANY_FIT(d_k, d_v))

/** Places for Q: two where they fit, so that the next work's comes during this one. */
#define CUDA_MANY_RINGS(d_k, d_v) (1024u + CUDA_MANY_STAGES(d_k, d_v) * CUDA_MANY_KV(d_k, d_v))
#define CUDA_MANY_PLACES(d_k, d_v)                                                                 \
    (CUDA_MANY_RINGS(d_k, d_v) + 2 * CUDA_MANY_Q(d_k) <= CUDA_MANY_SHARED_MOST ? 2u : 1u)

/** Shared memory that a launch asks for; its first tile begins at a multiple of 1,024. */
#define CUDA_MANY_SHARED(d_k, d_v)                                                                 \
    (CUDA_MANY_RINGS(d_k, d_v) + CUDA_MANY_PLACES(d_k, d_v) * CUDA_MANY_Q(d_k))

/** Bytes of a state of 64 rows, on a consumer warpgroup's stack. */
#define CUDA_MANY_STATE(d_v) (((d_v) / 8 + 1) * 2048u)

typedef struct cuda_leaf {
    uint32_t page;    /**< index into the page table, of the leaf's first page */
    int32_t position; /**< of its first token */
    uint16_t tokens;  /**< those that exist: 1 to CUDA_LEAF, or to CUDA_MANY_LEAF */
    uint16_t offset;  /**< of its first token in that page */
    uint32_t level;   /**< of the lowest node with this leaf and the one before it in its work */
} cuda_leaf_t;

/**
 * Of works with lists of pages: blocks of which the list has something, ascending in key, and no
 * others. A team computes a bundle of CUDA_WARPS of them at once. Those of a leaf are in one
 * bundle; whatever of one is left over has no tokens.
 */
typedef struct cuda_listed {
    uint32_t page;    /**< index into the page table, of the page with its first token */
    int32_t position; /**< of its first token: a multiple of CUDA_BLOCK */
    uint16_t present; /**< its tokens that exist and that the list has, as a set of bits */
    uint16_t offset;  /**< of its first token in that page */
    uint32_t level; /**< 0: of the leaf of the block before it; else as cuda_leaf_t, of its leaf */
} cuda_listed_t;

typedef struct cuda_query {
    uint32_t q_row;  /**< among all queries of the batch */
    uint32_t answer; /**< row of O, or of the partials, in units of q_heads */
    int32_t position;
    uint32_t mask;     /**< byte offset of its row of the mask, or CUDA_NONE */
    int32_t mask_base; /**< position of the first token that the mask is about */
    uint32_t mask_tokens;
    uint32_t entry, query; /**< for errors */
} cuda_query_t;

/**
 * 64 bytes, so that whoever gets a piece needs one round trip to memory to begin. The first piece
 * of team t of the grid is number t; `next` leads on, and behind the last one the queue.
 */
typedef struct cuda_piece {
    uint32_t next;                 /**< the team's next piece, or CUDA_NONE */
    uint32_t kv_head;              /**< CUDA_NONE: there is nothing to do */
    uint32_t leaf_first, n_leaves; /**< leaves, or bundles of blocks */
    uint32_t page, tokens;         /**< as in the first leaf ... */
    uint32_t offset;               /**< ... and its offset */
    uint32_t levels;               /**< left level | right level << 8 */
    uint32_t slot;   /**< its first state: [states][rows]; CUDA_NONE: it answers itself */
    uint32_t states; /**< it answers with partials */
    uint32_t query_first;
    uint32_t rows;       /**< queries x n_heads */
    uint32_t head_first; /**< in the group */
    uint32_t n_heads;
    uint32_t listed; /**< its work has lists: bundles */
} __attribute__((aligned(16))) cuda_piece_t;

/**
 * Pieces that teams take one after the other when they are done with their own. Each team that has
 * any draws until it gets nothing, and whoever draws the last number puts it back to 0.
 */
typedef struct cuda_queue {
    uint32_t drawn;    /**< the next number: 0 before a launch, and after it */
    uint32_t first, n; /**< pieces */
    uint32_t teams;    /**< those that draw */
} __attribute__((aligned(16))) cuda_queue_t;

/** A piece for the prefill kernel. The first tile of CTA b is number b; one for KV head CUDA_NONE
 * has nothing to do, and is the only one. */
typedef struct cuda_tile {
    cuda_leaf_t leaf; /**< the first */
    uint32_t next;    /**< the CTA's next tile, or CUDA_NONE */
    uint32_t kv_head; /**< of all that follows see cuda_piece_t */
    uint32_t leaf_first, n_leaves;
    uint32_t levels;
    uint32_t slot;
    uint32_t states;
    uint32_t query_first;
    uint32_t rows;
    uint32_t head_first, n_heads;
    uint32_t present_at; /**< in the token sets: [leaves][x.leaf_sets][n_lists]; or CUDA_NONE */
    uint32_t n_lists;
    int32_t see_first, see_end; /**< positions that its rows can see */
    int32_t position;           /**< of its first query; without masks they follow each other */
} __attribute__((aligned(16))) cuda_tile_t;

/** A tensor map of the driver: pages as boxes of tokens, in the order of tile.h. */
typedef struct cuda_map {
    uint64_t words[16];
} __attribute__((aligned(64))) cuda_map_t;

/** A state of an item, in ascending key. */
typedef struct cuda_ref {
    uint32_t slot;  /**< of the item's row 0 */
    uint32_t level; /**< of the lowest node with it and the state before it */
} cuda_ref_t;

typedef struct cuda_item {
    uint32_t ref_first, n_refs;
    uint32_t rows, n_heads;
    uint32_t head;   /**< query head of row 0 */
    uint32_t answer; /**< of its first query */
    uint32_t states;
    uint32_t entry, query;
} cuda_item_t;

/** What a launch gets, by value. Pointers are the device's. */
typedef struct cuda_args {
    const cuda_leaf_t *leaves;
    const cuda_listed_t *blocks;
    const cuda_query_t *queries;
    const cuda_piece_t *pieces;
    const cuda_tile_t *tiles;
    const cuda_item_t *items;
    const cuda_ref_t *refs;
    const uint32_t *pages;
    const uint64_t *present;
    const uint8_t *masks;

    const uint8_t *k, *v;
    uint64_t k_page_stride, v_page_stride; /**< bytes */
    uint32_t page_size;
    uint32_t page_shift; /**< log2, or CUDA_NONE */
    uint32_t kv_heads, q_heads, group, head_dim_v;

    const uint8_t *q;       /**< [q_parts][rows][q_heads][head_dim_k] of the KV's type */
    uint64_t q_part_stride; /**< bytes */
    uint64_t q_row_stride, q_head_stride; /**< bytes */
    uint32_t q_parts;
    const float *q_scale; /**< [rows][q_heads] powers of two, or NULL */
    float scale;          /**< times log2 e, but with a soft cap or slopes */
    float softcap;
    int32_t window; /**< in positions, or 0 */
    uint32_t causal;
    const float *slopes, *sink_l; /**< [q_heads], or NULL */
    const int32_t *sink_e;

    void *o;
    uint32_t o_type; /**< attn_dtype_t */
    float *lse;
    float *a, *l; /**< partials of the answer */
    int32_t *e;

    float *slot_a, *slot_l; /**< states between the kernels: [slots][head_dim_v] */
    int32_t *slot_e;
    uint8_t *deep; /**< [consumer warps of the grid][deep_levels]: stacks beyond shared memory */
    uint32_t deep_levels; /**< of it: states that a warp has room for there */

    uint32_t beside;           /**< the kernel before is another class of the same attend */
    uint32_t teams;            /**< of a CTA */
    uint32_t near_q;           /**< q of many rows is copied to shared memory */
    uint32_t stages;           /**< of a team's ring */
    uint32_t pairs;            /**< of rows that a state has room for */
    uint32_t levels;           /**< of a warp's stack in shared memory */
    uint32_t bulk;             /**< pages are copied whole; otherwise in pieces of 16 bytes */
    uint32_t box;              /**< tokens of a copy of the prefill kernel: 8 to 64 */
    uint32_t leaf_sets;        /**< token sets of a leaf of many rows, of one list: each of 64 */
    uint32_t depth;            /**< of the merge kernel's stacks */
    uint32_t segment_depth;    /**< of those of its segments */
    uint32_t segments;         /**< that it folds side by side */
    unsigned long long *error; /**< the first row that failed, or all ones */
    cuda_queue_t *queue;       /**< of the class */
} cuda_args_t;

#endif
