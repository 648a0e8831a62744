/*
 * test_world.h: the model of a cache that kvstore_model_test.c compares the store with. It
 * knows the tokens of every chunk, and pages only as serial numbers; who holds one is found
 * by looking at all chunks, so that nothing is counted the way the store counts.
 */
#ifndef ATTN_KVSTORE_TEST_WORLD_H
#define ATTN_KVSTORE_TEST_WORLD_H

#include "kvstore/kvstore.h"

#include <stdbool.h>
#include <stdint.h>

#define CHUNKS 24 /* ids 1 .. CHUNKS of each cache */
#define TOKENS_MAX 300
#define PAGES_MAX 12 /* of a chunk */
#define STEPS 5      /* open at once, of each cache */
#define SEQUENCES 8
#define ENTRIES_MAX 3
#define PARTS_MAX 4 /* of an entry */
#define WORLDS 4

typedef struct model_chunk {
    bool live; /* committed */
    uint32_t generation, length;
    uint32_t tokens[TOKENS_MAX];
    uint32_t n_pages, pages[PAGES_MAX]; /* serials */
    uint32_t named;
    bool appended;
    uint32_t n_seen, seen[PAGES_MAX]; /* serials as the appending step sees them */
} model_chunk_t;

typedef struct model_part {
    kv_step_chunk_t named;
    uint32_t values[TOKENS_MAX]; /* of the new tokens */
} model_part_t;

typedef struct model_entry {
    uint64_t seq;
    uint32_t n_parts, n_spare;
    model_part_t parts[PARTS_MAX];
} model_entry_t;

typedef struct model_step {
    kv_step_t *step; /* NULL: not open */
    uint32_t n_entries, n_copies;
    model_entry_t entries[ENTRIES_MAX];
    enum { BEGUN, COPIED, WRITTEN } progress;
} model_step_t;

/* A cache: what is told to the store, the model of it, and the pages' content. */
typedef struct world {
    uint64_t cache;
    uint32_t page_size, chunk_size, n_pages;
    uint32_t *memory; /* [n_pages][page_size] */
    model_chunk_t chunks[CHUNKS];
    model_step_t steps[STEPS];
    uint32_t next_serial, next_value;
} world_t;

static inline uint32_t
pages_for(const world_t *world, uint32_t tokens)
{
    return (tokens + world->page_size - 1) / world->page_size;
}

static inline model_chunk_t *
chunk_of(world_t *world, uint64_t id)
{
    return &world->chunks[id - 1];
}

/* ---- who holds a page ---- */

static inline bool
holds(const model_chunk_t *chunk, uint32_t serial)
{
    for (uint32_t i = 0; chunk->live && i < chunk->n_pages; i++) {
        if (chunk->pages[i] == serial) {
            return true;
        }
    }
    for (uint32_t i = 0; chunk->appended && i < chunk->n_seen; i++) {
        if (chunk->seen[i] == serial) {
            return true;
        }
    }
    return false;
}

static inline uint32_t
holders(const world_t *world, uint32_t serial)
{
    uint32_t n = 0;
    for (uint32_t c = 0; c < CHUNKS; c++) {
        n += holds(&world->chunks[c], serial);
    }
    return n;
}

/* Is chunk c the first that holds it? Then it is counted there. */
static inline bool
is_first_holder(const world_t *world, uint32_t c, uint32_t serial)
{
    for (uint32_t before = 0; before < c; before++) {
        if (holds(&world->chunks[before], serial)) {
            return false;
        }
    }
    return true;
}

static inline void
count_pages(const world_t *world, uint32_t *held, uint32_t *shared)
{
    *held = *shared = 0;
    for (uint32_t c = 0; c < CHUNKS; c++) {
        const model_chunk_t *chunk = &world->chunks[c];
        uint32_t n_committed       = chunk->live ? chunk->n_pages : 0;
        uint32_t n_seen            = chunk->appended ? chunk->n_seen : 0;
        for (uint32_t i = 0; i < n_committed + n_seen; i++) {
            bool in_seen    = i >= n_committed;
            uint32_t at     = in_seen ? i - n_committed : i;
            uint32_t serial = in_seen ? chunk->seen[at] : chunk->pages[at];
            bool again      = in_seen && at < n_committed && chunk->pages[at] == serial;
            if (!again && is_first_holder(world, c, serial)) {
                (*held)++;
                *shared += holders(world, serial) > 1;
            }
        }
    }
}

/* Pages that open steps hold themselves. */
static inline uint32_t
spare_pages(const world_t *world)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < STEPS; s++) {
        const model_step_t *step = &world->steps[s];
        for (uint32_t e = 0; step->step != NULL && e < step->n_entries; e++) {
            n += pages_for(world, step->entries[e].n_spare);
        }
    }
    return n;
}

static inline bool
tail_is_shared(const world_t *world, const model_chunk_t *chunk)
{
    return chunk->live && chunk->length % world->page_size != 0 &&
           holders(world, chunk->pages[chunk->n_pages - 1]) > 1;
}

#endif
