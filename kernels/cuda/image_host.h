/* image_host.h: from a plan to what the GPU reads of it. Host code; no driver calls. */
#ifndef ATTN_KERNELS_CUDA_IMAGE_HOST_H
#define ATTN_KERNELS_CUDA_IMAGE_HOST_H

#include "kernels/cuda/image.h"
#include "kernels/plan_types.h"

/** Works by their rows: each class is a launch. */
#define CUDA_CLASSES 4

typedef struct cuda_class {
    uint32_t rows;   /**< of a piece at most */
    uint32_t pairs;  /**< of rows that a piece has at most, of those of 8; of others 4 */
    uint32_t teams;  /**< of a CTA */
    uint32_t grid;   /**< CTAs; 0: no work of this class */
    uint64_t pieces; /**< offset in the block */
} cuda_class_t;

/** What each table has room for, in its records, and what kernels are launched for. */
typedef struct cuda_room {
    uint64_t leaves, queries, items, refs, masks, pages;
    uint64_t blocks, present;      /**< 0: no lists in requests of few rows, and of many */
    uint64_t pieces[CUDA_CLASSES]; /**< 0: no launch of that class */
    uint32_t pairs[CUDA_CLASSES];
    uint64_t tiles; /**< 0: no launch of the prefill kernel */
    uint64_t slots;
    uint32_t item_rows, item_refs, depth, many_depth;
    bool masked;
} cuda_room_t;

/** Offsets in the block, and sizes. */
typedef struct cuda_image {
    struct cuda_image_memory *memory; /**< what it is made in */
    uint64_t bytes;
    uint64_t leaves, blocks, queries, items, refs, pages, present, masks, queues;
    cuda_class_t classes[CUDA_CLASSES];
    uint32_t many_grid;          /**< CTAs of the prefill kernel; 0: nothing for it */
    uint64_t many_tiles;         /**< offset in the block */
    uint32_t leaf_sets;          /**< token sets of a leaf of many rows, of one list */
    uint32_t n_items, item_rows; /**< rows of the largest item */
    uint32_t item_refs;          /**< states of the largest */
    uint64_t slots;              /**< states between the kernels */
    uint32_t depth;              /**< of a stack */
    uint32_t many_depth;         /**< of a stack of the prefill kernel */
    bool masked;                 /**< has masks */
    bool changes; /**< lists may be put in place of others: made anew for each attend */
    cuda_room_t room;
} cuda_image_t;

/**
 * The tables of a plan, in the memory of those before: *image is one that was built, or zeros. From
 * one step of a batch to the next it allocates nothing.
 *
 * @param plan  made for a parallelism of 1: this cuts it anew, for `ctas` CTAs. It, its page lists
 *              and its sparse lists stay as they are until the image is written
 * @return ATTN_ERR_NO_MEMORY
 * @return ATTN_ERR_TOO_LARGE  more leaves, states or rows than 32 bits number
 */
attn_status_t cuda_image_build(const attn_plan_t *plan, uint32_t ctas, cuda_image_t *image);

/*
 * A graph holds launches as they were captured: sizes and addresses of tables that later plans are
 * to use, too. So these are built steady, and placed in a room that holds them all.
 */

/** As cuda_image_build(), but a class that has works gets all CTAs, however few its leaves are. */
attn_status_t cuda_image_build_steady(const attn_plan_t *plan, uint32_t ctas, cuda_image_t *image);

bool cuda_room_holds(const cuda_room_t *room, const cuda_room_t *needed);

/** Room for what is needed and for more of the same kind: most numbers up to a power of two. */
cuda_room_t cuda_room_above(const cuda_room_t *needed);

/** Lay a steady image out in a room that holds image->room: offsets and sizes of launches follow
 * from the room and `ctas` alone. Before it is written. */
void cuda_image_place(cuda_image_t *image, const cuda_room_t *room, uint32_t ctas);

/** All tables to one block of image->bytes, aligned to 16 bytes, which is what goes to the device:
 * those that follow from lengths alone, and the page lists behind them. */
void cuda_image_write_tables(const cuda_image_t *image, uint8_t *to);
void cuda_image_write_pages(const cuda_image_t *image, uint8_t *to);

static inline void
cuda_image_write(const cuda_image_t *image, uint8_t *to)
{
    cuda_image_write_tables(image, to);
    cuda_image_write_pages(image, to);
}

/** Zeros, and an image that was freed, are allowed. */
void cuda_image_free(cuda_image_t *image);

#endif
