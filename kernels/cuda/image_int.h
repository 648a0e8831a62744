/* image_int.h: between image.c, which makes tables, image_blocks.c, which makes those of lists,
 * image_cut.c, which cuts works into pieces, and image_tiles.c, which deals works of many rows to
 * CTAs. */
#ifndef ATTN_KERNELS_CUDA_IMAGE_INT_H
#define ATTN_KERNELS_CUDA_IMAGE_INT_H

#include "kernels/cuda/image_host.h"

/** A vector that keeps its memory from image to image. */
#define VECTOR(type)                                                                               \
    struct {                                                                                       \
        type *at;                                                                                  \
        uint64_t n, room;                                                                          \
    }

/** Room for m more at the end of a vector; false without memory. */
#define RESERVE(b, v, m)                                                                           \
    ((v).room - (v).n >= (m) ||                                                                    \
     ((v).at = image_room((b), (v).at, &(v).room, (v).n + (m), sizeof(*(v).at)),                   \
      (v).room - (v).n >= (m)))

#define PUSH(b, v, ...)                                                                            \
    do {                                                                                           \
        if (RESERVE(b, v, 1)) {                                                                    \
            (v).at[(v).n++] = (__VA_ARGS__);                                                       \
        }                                                                                          \
    } while (0)

/** Leaves of a work, side by side in one run. */
typedef struct span {
    uint64_t key;                  /**< of leaf 0 of the run */
    uint32_t leaf_first, leaf_end; /**< in the run */
    uint32_t at;                   /**< leaves of the work before these */
    uint32_t level;                /**< of the first one, as in cuda_leaf_t */
} span_t;

/** The class of works for the prefill kernel, behind those of image_host.h. */
#define CUDA_MANY CUDA_CLASSES

/** A place between two leaves of a work: before leaf `at` of it, which lies in a span. */
typedef struct place {
    const span_t *span; /**< of bundles none */
    uint32_t at;
} place_t;

/** What a work, or one of its lists, reads: leaves, or bundles. */
typedef struct extent {
    uint32_t leaf_first, n_leaves;
    uint64_t first_key, last_key; /**< of its first and last leaf */
} extent_t;

/** A work on its way into pieces. */
typedef struct work {
    uint32_t query_first;
    uint32_t extent_first, n_extents; /**< 1, or one a head */
    uint32_t span_first;
    uint32_t present_at, n_lists;
    uint32_t unit_first; /**< of its heads in the first block of them */
    uint32_t sequence;   /**< of many rows */
    uint32_t class;
    uint32_t sets; /**< token sets of a leaf, of one list */
    bool listed;   /**< bundles */
} work_t;

/** States that a piece leaves in memory: of each the level of the lowest node with it and what is
 * before it. */
typedef struct left_states {
    uint32_t n, levels[ATTN_FOLD_DEPTH];
} left_states_t;

/** A state that a piece of the first block leaves in memory. */
typedef struct left {
    uint32_t slot;  /**< of row 0 of the work */
    uint32_t level; /**< as in cuda_ref_t, within the unit */
} left_t;

/** What one head of a work comes to. */
typedef struct unit {
    uint32_t left_first, n_left; /**< none: it answers itself */
} unit_t;

/**
 * The pieces of a class. Its heads fall into blocks of equal numbers, and so do its teams: all
 * blocks are cut alike, so that the pieces of the first one stand for those of all. Those behind
 * the teams' first ones follow these, or are queued: then those of all blocks take turns.
 */
typedef struct cut {
    uint32_t blocks, heads; /**< heads of a block */
    uint64_t teams;         /**< of a block; 0: no work is of this class */
    uint64_t first;         /**< the first block's pieces: one a team, in image pieces ... */
    uint64_t n_more;        /**< ... and others */
    bool queued;            /**< they are for whoever comes */
    uint64_t slots;         /**< of a block */
} cut_t;

/** A tile before it is dealt. */
typedef struct many {
    cuda_tile_t tile;
    uint64_t cost;
    uint32_t part; /**< of the K and V that all tiles read (image_tiles.c) */
} many_t;

/** Works of many rows, one after the other, that read the same K and V. */
typedef struct sequence {
    uint64_t tokens; /**< most that one of them reads ... */
    uint64_t all;    /**< ... and all together */
    uint32_t page;   /**< index into the page table, of their first leaf */
    uint32_t number; /**< among the sequences, in the order of works */
} sequence_t;

/** A CTA that tiles are dealt to. */
typedef struct load {
    uint64_t cost;
    uint32_t last; /**< its last tile */
} load_t;

/** Pages of a run, to be copied. */
typedef struct page_list {
    const uint32_t *from;
    uint64_t n;
} page_list_t;

struct cuda_image_memory {
    const attn_plan_t *plan;
    cuda_image_t *image;
    bool no_memory;
    bool steady; /**< all CTAs for each class that has works */
    VECTOR(span_t) spans;
    VECTOR(cuda_leaf_t) leaves;
    VECTOR(cuda_listed_t) blocks; /**< whole bundles */
    VECTOR(extent_t) extents;
    VECTOR(cuda_query_t) queries;
    VECTOR(work_t) works;
    VECTOR(unit_t) units;
    VECTOR(left_t) left;
    VECTOR(cuda_piece_t) pieces; /**< of first blocks */
    cut_t cuts[CUDA_CLASSES + 1];
    VECTOR(many_t) many;
    VECTOR(sequence_t) sequences;
    VECTOR(uint32_t) parts; /**< [sequences][heads]: of a head's K and V */
    VECTOR(load_t) loads;
    VECTOR(cuda_tile_t) tiles;
    VECTOR(cuda_item_t) items;
    VECTOR(cuda_ref_t) refs;
    VECTOR(page_list_t) lists; /**< of pages */
    VECTOR(uint32_t) page_at; /**< of the plan's spans: where their run's pages are, or CUDA_NONE */
    uint64_t n_pages;
    VECTOR(uint64_t) present;
    VECTOR(uint8_t) masks;
    VECTOR(uint32_t) mask_at; /**< [entries] */
};

typedef struct cuda_image_memory builder_t;

/** Memory for at least `wanted` of a vector. */
void *image_room(builder_t *b, void *at, uint64_t *room, uint64_t wanted, size_t size);

/** What a head of a work reads. */
static inline const extent_t *
image_extent(const builder_t *b, const work_t *work, uint32_t head)
{
    return &b->extents.at[work->extent_first + (work->n_extents > 1 ? head : 0)];
}

/** Where a work begins. */
static inline place_t
image_begin(const builder_t *b, const work_t *work)
{
    return (place_t){.span = work->listed ? NULL : b->spans.at + work->span_first};
}

/** A place one leaf on, and past the spans that end there. */
static inline void
image_move(place_t *place, uint32_t to, uint32_t n_leaves)
{
    place->at = to;
    while (place->span != NULL && to < n_leaves &&
           place->span->at + (place->span->leaf_end - place->span->leaf_first) <= to) {
        place->span++;
    }
}

/** Where the pages of one of the plan's spans are in the page table: those of its whole run. */
uint32_t image_place_pages(builder_t *b, uint32_t span, const attn_kv_run_t *run);

/** The blocks of a list, 0 if it is for all heads, of a work of few rows. */
void image_add_blocks(builder_t *b, const attn_work_t *work, uint32_t list, extent_t *to);

/** As the kernel folds bundles [from, end), of which there are some, between what is to the left
 * and right of them: the states that are left. Returns how deep its stack becomes. */
uint32_t image_fold_blocks(const builder_t *b, const extent_t *extent, uint32_t from, uint32_t end,
                           uint32_t left, uint32_t right, left_states_t *states);

/** Leaves [from, end) of a head of a work as a piece, with room for the states it leaves if it is
 * not all of the work. */
cuda_piece_t image_make_piece(builder_t *b, cut_t *cut, uint32_t w, uint32_t head,
                              const place_t *from, uint32_t end);

/** Deal the works of many rows to so many CTAs: fills tiles, units, left, and what the image says
 * of tiles. */
void image_deal_tiles(builder_t *b, uint32_t ctas);

/** Cut all works of a class for so many CTAs: fills cuts, pieces, units and left. */
void image_cut_class(builder_t *b, uint32_t class, uint32_t ctas);

/** The pieces of all blocks of a class to memory: image_pieces() of them. */
void image_write_pieces(const builder_t *b, uint32_t class, cuda_piece_t *to);

static inline uint64_t
image_pieces(const cut_t *cut)
{
    return cut->blocks * (cut->teams + cut->n_more);
}

/** The queue of a class, as it is before a launch. */
static inline cuda_queue_t
image_queue(const cut_t *cut)
{
    uint32_t teams = (uint32_t)(cut->blocks * cut->teams);

    /* Where one has something all teams have a piece before, and draw. */
    return (cuda_queue_t){.first = teams,
                          .n     = cut->queued ? (uint32_t)(cut->blocks * cut->n_more) : 0,
                          .teams = teams};
}

#endif
