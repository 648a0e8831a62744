/*
 * kvstore_int.h: what the files of the store share; nobody else includes it.
 *
 * A page's owner count is the number of chunk records, readers and arrivals that hold it; a spare page of an
 * open step has that step as its one owner. A record holds its committed pages, and while a step
 * appends to it also the pages reserved for that:
 *
 *     pages[]   0 .. n_pages-1 committed | n_pages .. n_pages+n_reserved-1 reserved
 *
 * Where the committed tail page is shared it must not be written, so a copy stands in for
 * it at pages[n_pages-1], and `replaced` keeps the committed one, still counted, until the
 * step ends. So pages[] is always what the step sees, and a fork in the meantime, which
 * sees committed tokens only, takes kv_chunk_page().
 */
#ifndef ATTN_KVSTORE_INT_H
#define ATTN_KVSTORE_INT_H

#include "kvstore/kvstore.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>

/* All keys here are 64-bit ids: one multiplication mixes them, in place of a hash of bytes. */
#define HASH_FUNCTION(key, bytes, hashv) ((hashv) = kv_hash_id(key))

static inline uint32_t
kv_hash_id(const void *key)
{
    uint64_t id;
    __builtin_memcpy(&id, key, sizeof(id));
    return (uint32_t)(id * UINT64_C(0x9e3779b97f4a7c15) >> 32);
}

#include "base/table.h"

#define KV_EXTENT_BYTES UINT64_C(4096)
#define KV_NO_PAGE UINT32_MAX

/* What begin looks at lies together: two cache lines, the first with the key. */
typedef struct kv_chunk {
    UT_hash_handle hh;
    uint64_t id;
    uint32_t generation;  /* 0 while the step that makes it is open */
    uint32_t length;      /* committed tokens */
    uint32_t n_pages;     /* that hold them */
    uint32_t n_reserved;  /* pages behind those, of the step that appends */
    uint32_t capacity;    /* of pages[] */
    uint32_t replaced;    /* the committed tail while pages[] has its copy, or KV_NO_PAGE */
    uint32_t named;       /* times that entries of open steps name it */
    bool appended;        /* the one step that names it appends */
    bool stamp_new;       /* what the begin of `stamp` wants of it, and */
    uint32_t stamp_entry; /* in which entry: this is how twice in one step is found */
    uint64_t stamp;
    uint32_t *pages;
    uint32_t counted, counted_new; /* kv_store_check's own counts of the steps that name it */
} kv_chunk_t;

typedef struct kv_hold {
    uint64_t seq;
    uint32_t first_chunk, n_chunks; /* of the step's chunks */
    uint32_t first_spare, n_spares; /* of its spare pages */
    UT_hash_handle hh;              /* in the region's holds */
} kv_hold_t;

/* Pages held for somebody who reads them without the lock. */
struct kv_read {
    struct kv_region *region;
    struct kv_read *next, **link; /* in the region's list */
    uint32_t n;
    uint32_t pages[];
};

/* Pages for tokens that come from another store. */
struct kv_arrival {
    struct kv_region *region; /* NULL: it was closed */
    struct kv_arrival *next, **link;
    uint64_t chunk;
    uint32_t generation; /* of the chunk when this began; 0: it was not here */
    uint32_t first, length;
    bool busy;       /* tokens are being put into them without the lock */
    uint32_t n, old; /* pages; the first `old` of them (0 or 1) is the chunk's own, counted here too */
    uint32_t pages[];
};

/* A chunk that no step may name. */
typedef struct kv_left {
    uint64_t chunk, move;
    uint64_t until_ns; /* UINT64_MAX: for ever */
    UT_hash_handle hh;
} kv_left_t;

typedef struct kv_region {
    uint64_t cache, offset, bytes, page_bytes;
    uint32_t page_size, chunk_size;
    uint32_t n_pages, n_free;
    uint32_t n_shared;    /* pages with more than one owner */
    uint32_t n_steps;     /* open */
    uint32_t *owners;     /* [n_pages]; 0: the page is on the free stack */
    uint32_t *free_stack; /* [n_pages], the first n_free are valid */
    kv_chunk_t *chunks;   /* by id */
    kv_hold_t *holds;     /* by sequence */
    kv_read_t *reads;     /* open */
    kv_arrival_t *arrivals;
    kv_left_t *left; /* chunks that are being moved away, by id */
    UT_hash_handle hh;
} kv_region_t;

typedef struct kv_named {
    kv_chunk_t *chunk; /* NULL: not here, and the step appends nothing to it */
    uint32_t n_new;
} kv_named_t;

struct kv_step {
    uint64_t id;
    kv_region_t *region;
    uint32_t n_entries, n_chunks, n_copies, n_spares;
    kv_hold_t *entries; /* [n_entries] */
    kv_named_t *chunks; /* [n_chunks], entry after entry */
    kv_copy_t *copies;  /* [n_copies] */
    uint32_t *spares;   /* [n_spares] pages that the step holds itself, once reserved */
    UT_hash_handle hh;
};

struct kv_store {
    uint64_t slab_bytes;
    uint64_t stamp;                              /* of the latest begin */
    kv_region_t *by_offset[ATTN_KV_REGIONS_MAX]; /* ascending: the gaps are the free extents */
    uint32_t n_regions;
    kv_region_t *by_cache;
    kv_step_t *steps; /* by id */
};

/* ---- kvstore.c ---- */

kv_region_t *kv_region_find(const kv_store_t *store, uint64_t cache);
attn_status_t kv_region_need(const kv_store_t *store, uint64_t cache, kv_region_t **region_p);

/* A free page, owned once. There must be one. */
uint32_t kv_page_take(kv_region_t *region);
void kv_page_share(kv_region_t *region, uint32_t page);
/* One owner less; the last one's page is free. */
void kv_page_drop(kv_region_t *region, uint32_t page);

static inline uint32_t
kv_pages_for(const kv_region_t *region, uint32_t tokens)
{
    return (uint32_t)attn_div_up(tokens, region->page_size);
}

/* ---- chunk.c ---- */

/* Also finds a chunk that an open step is making. */
kv_chunk_t *kv_chunk_find(const kv_region_t *region, uint64_t id);

/* Bring what kv_chunk_find() will touch into the cache: first the table's part, and a while later
 * the chunk's. */
void kv_chunk_prefetch_table(const kv_region_t *region, uint64_t id);
void kv_chunk_prefetch(const kv_region_t *region, uint64_t id);

/* A record without pages, of generation 0, in the region's table; NULL: out of memory. */
kv_chunk_t *kv_chunk_make(kv_region_t *region, uint64_t id);

/* Make room for n_pages in pages[]. */
bool kv_chunk_grow(const kv_region_t *region, kv_chunk_t *chunk, uint32_t n_pages);

/* Drop all pages and the record. */
void kv_chunk_drop(kv_region_t *region, kv_chunk_t *chunk);

/* Page i of the committed ones. */
static inline uint32_t
kv_chunk_page(const kv_chunk_t *chunk, uint32_t i)
{
    bool stands_in = chunk->replaced != KV_NO_PAGE && i + 1 == chunk->n_pages;
    return stands_in ? chunk->replaced : chunk->pages[i];
}

/* Must an append copy the tail page first, because others hold it too? */
static inline bool
kv_chunk_tail_is_shared(const kv_region_t *region, const kv_chunk_t *chunk)
{
    return chunk->length % region->page_size != 0 &&
           region->owners[chunk->pages[chunk->n_pages - 1]] > 1;
}

/* ---- move.c ---- */

/* May steps name the chunk? @return ATTN_ERR_STALE if it is being moved away */
attn_status_t kv_left_check(const kv_region_t *region, uint64_t chunk);

/* The chunk was released: nothing is to be remembered of its move. */
void kv_left_forget(kv_region_t *region, uint64_t chunk);

/* Of a region that is closed: are tokens being put there? Else its arrivals are left in the air. */
bool kv_arrivals_busy(const kv_region_t *region);
void kv_arrivals_detach(kv_region_t *region);

/* ---- step_begin.c, step.c ---- */

/* A place in the chunks of all entries, one after the other. */
typedef struct kv_cursor {
    uint32_t entry, chunk;
} kv_cursor_t;

/* What begin has found out, before it changes anything. */
typedef struct kv_begin {
    kv_store_t *store;
    kv_region_t *region;
    const kv_step_entry_t *entries;
    kv_step_t *step;                      /* filled, but not yet known to anybody */
    uint64_t n_pages;                     /* that it needs */
    uint32_t n_missing;                   /* chunks named that are not here */
    uint32_t n_made;                      /* of these, appended to */
    kv_cursor_t ahead_table, ahead_chunk; /* what is fetched into the cache next */
} kv_begin_t;

/* Free the memory of a step that is in no table. */
void kv_step_free(kv_step_t *step);

/* All of begin's checks but those of its own arguments; finds the chunks. */
attn_status_t kv_begin_check(kv_begin_t *begin);

#endif
