/*
 * blocks.c: memory of large messages on their way out. The C library gives what is large back to
 * the system as soon as it is free, and then each 4 KiB of the next one cost a page fault, which
 * for 192 KiB took as long as half the round trip. So a few blocks are kept, by powers of two.
 */
#include "rpc/rpc_int.h"

#define LEAST_SHIFT 16 /* below 64 KiB the C library keeps memory itself */
#define CLASSES 9      /* up to 16 MiB */
#define KEPT_MAX (UINT64_C(16) << 20)

typedef struct block {
    struct block *next;
    uint32_t shelf;
    _Alignas(64) uint8_t data[];
} block_t;

static struct {
    pthread_mutex_t lock;
    uint64_t kept; /* bytes */
    block_t *shelves[CLASSES];
} blocks = {.lock = PTHREAD_MUTEX_INITIALIZER};

static uint64_t
bytes_of(uint32_t shelf)
{
    return UINT64_C(1) << (LEAST_SHIFT + shelf);
}

static void
block_give(void *arg)
{
    block_t *block = arg;

    RPC_OP_ACQUIRE(block->data); /* whoever wrote it let go of the slice before */
    pthread_mutex_lock(&blocks.lock);
    bool keep = blocks.kept + bytes_of(block->shelf) <= KEPT_MAX;
    if (keep) {
        blocks.kept += bytes_of(block->shelf);
        block->next                  = blocks.shelves[block->shelf];
        blocks.shelves[block->shelf] = block;
    }
    pthread_mutex_unlock(&blocks.lock);
    if (!keep) {
        gpr_free_aligned(block);
    }
}

static block_t *
block_take(uint32_t shelf)
{
    pthread_mutex_lock(&blocks.lock);
    block_t *block = blocks.shelves[shelf];
    if (block != NULL) {
        blocks.shelves[shelf] = block->next;
        blocks.kept -= bytes_of(shelf);
    }
    pthread_mutex_unlock(&blocks.lock);
    if (block == NULL) {
        block        = gpr_malloc_aligned(sizeof(*block) + bytes_of(shelf), 64);
        block->shelf = shelf;
    }
    return block;
}

grpc_slice
rpc_slice_malloc(size_t size)
{
    uint32_t shelf = 0;

    if (size <= bytes_of(0) / 2) {
        return grpc_slice_malloc(size);
    }
    while (shelf < CLASSES && bytes_of(shelf) < size) {
        shelf++;
    }
    if (shelf == CLASSES) {
        return grpc_slice_malloc(size);
    }
    block_t *block = block_take(shelf);
    return grpc_slice_new_with_user_data(block->data, size, block_give, block);
}
