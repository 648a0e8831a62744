/*
 * kvstore.h: which pages hold which tokens, on one worker. Indices and lengths
 * only, no tensors: the engine moves the bytes. Used by one thread at a time (the
 * engine's lock).
 *
 *     slab     [ region of cache A | region of cache B | free ...            ]
 *     region   pages 0 .. n_pages-1, each all layers of page_size tokens
 *     chunk    id, generation, committed length, list of pages
 *     page     counted by the chunks (and open steps, and readers) that hold it; shared after a
 * fork step     an open transaction: pages reserved, nothing visible until commit
 *
 * A chunk is one run of at most chunk_size tokens of a sequence; which sequence and
 * where is the caller's business, but for the sequence id that opens steps: one open
 * step a sequence.
 */
#ifndef ATTN_KVSTORE_H
#define ATTN_KVSTORE_H

#include "base/attn_types.h"

#define ATTN_KV_REGIONS_MAX 1024u
#define ATTN_KV_PAGES_MAX (1u << 30)  /* of a region */
#define ATTN_KV_CHUNKS_MAX (1u << 24) /* of a region */
#define ATTN_KV_CHUNK_TOKENS_MAX (1u << 20)
#define ATTN_KV_STEPS_MAX 4096u
#define ATTN_KV_ENTRIES_MAX 4096u          /* of a step */
#define ATTN_KV_SPARE_MAX (1u << 16)       /* tokens, of an entry */
#define ATTN_KV_STEP_CHUNKS_MAX (1u << 20) /* named by a step, all entries together */

typedef struct kv_store kv_store_t;

/* Every call that changes the store may also return ATTN_ERR_NO_MEMORY, with nothing changed,
 * and every call that takes a cache ATTN_ERR_NOT_FOUND, where it has no region. Commit, abort,
 * truncate and release need no memory. Output arguments are written on ATTN_OK only. */

/** @param slab_bytes  at least 4,096; what is above a multiple of that is not used */
attn_status_t kv_store_create(uint64_t slab_bytes, kv_store_t **store_p);

/** Open steps and their pointers end with it; no read is open. NULL is fine. */
void kv_store_destroy(kv_store_t *store);

/* ---- regions ---- */

typedef struct kv_region_info {
    uint64_t offset; /**< of the region in the slab, bytes, a multiple of 4,096 */
    uint64_t bytes;  /**< a multiple of 4,096 */
    uint32_t n_pages, free_pages;
    uint32_t page_size, chunk_size;
    uint64_t chunks;       /**< those that an open step is making included */
    uint64_t shared_pages; /**< pages held by more than one chunk */
} kv_region_info_t;

/**
 * Take a region for a cache.
 *
 * @param cache       id, not 0, not open yet
 * @param page_bytes  K and V of one page over all layers
 * @param page_size   tokens, at least 1; need not divide chunk_size
 * @param chunk_size  tokens, 1 to ATTN_KV_CHUNK_TOKENS_MAX
 * @param bytes       wanted; rounded down to whole pages in whole multiples of 4,096, never up;
 *                    0: a quarter of what is free, or the largest free extent if that is less
 * @param info        as kv_region_describe(), or NULL
 * @return ATTN_ERR_INVALID    cache, page_bytes, page_size or chunk_size is 0, or the latter above
 *                             its limit
 * @return ATTN_ERR_EXISTS     cache is open
 * @return ATTN_ERR_EXHAUSTED  no such extent is free, or not one chunk fits in it, names both
 *                             sizes; or ATTN_KV_REGIONS_MAX are open
 * @return ATTN_ERR_TOO_LARGE  more than ATTN_KV_PAGES_MAX pages
 */
attn_status_t kv_region_open(kv_store_t *store, uint64_t cache, uint64_t page_bytes,
                             uint32_t page_size, uint32_t chunk_size, uint64_t bytes,
                             kv_region_info_t *info);

/** Return the region with all chunks in it; what was still to arrive is left in the air.
 * @return ATTN_ERR_BUSY a step of it is open, or a read, or tokens are being put there */
attn_status_t kv_region_close(kv_store_t *store, uint64_t cache);
attn_status_t kv_region_describe(const kv_store_t *store, uint64_t cache, kv_region_info_t *info);

/** Bytes of the slab in no region, and of its largest free extent. */
void kv_store_free_bytes(const kv_store_t *store, uint64_t *total, uint64_t *largest);

/* ---- chunks ---- */

typedef struct kv_chunk_info {
    uint32_t generation; /**< 1 at creation; grows on truncate; 0: an open step is making it */
    uint32_t length;     /**< committed tokens */
    uint32_t n_pages;    /**< that hold them */
    bool in_step;        /**< an open step names it */
} kv_chunk_info_t;

/**
 * Make chunk `to` of the first `length` tokens of chunk `from`: generation 1, even at length 0.
 * Pages are shared; the unfilled last one is copied when a step first appends to either side.
 * Steps that are open on `from` do not matter: the fork has its committed tokens.
 * @return ATTN_ERR_NOT_FOUND from (or a step is only making it), ATTN_ERR_EXISTS to,
 *         ATTN_ERR_INVALID length above the committed one, ATTN_ERR_EXHAUSTED ATTN_KV_CHUNKS_MAX
 */
attn_status_t kv_chunk_fork(kv_store_t *store, uint64_t cache, uint64_t from, uint32_t length,
                            uint64_t to);

/**
 * Drop the tokens from `length` on, and grow the generation (also where no token is dropped).
 * A chunk cut to 0 stays. generation_p may be NULL.
 * @return ATTN_ERR_NOT_FOUND, ATTN_ERR_BUSY a step names it, or it is being moved, ATTN_ERR_STALE
 *         generation differs, ATTN_ERR_INVALID length above the committed one, ATTN_ERR_EXHAUSTED
 * no generation is left
 */
attn_status_t kv_chunk_truncate(kv_store_t *store, uint64_t cache, uint64_t chunk,
                                uint32_t generation, uint32_t length, uint32_t *generation_p);

/** Give the chunk's pages back. @return ATTN_ERR_BUSY, ATTN_ERR_NOT_FOUND */
attn_status_t kv_chunk_release(kv_store_t *store, uint64_t cache, uint64_t chunk);

/** @return ATTN_ERR_NOT_FOUND; a chunk that an open step is making is described, as generation 0 */
attn_status_t kv_chunk_describe(const kv_store_t *store, uint64_t cache, uint64_t chunk,
                                kv_chunk_info_t *info);

/** Tokens that are being read; ends with kv_read_end(). */
typedef struct kv_read kv_read_t;

/**
 * Where the committed tokens [first, first + n) of a chunk lie: token i in page pages[i], at
 * offsets[i]. The first *n_held of them stay there until kv_read_end(), whatever becomes of the
 * chunk. The others, fewer than a page's, are in the page that the chunk's next token goes to,
 * which is held for no reader, lest a step has to copy it: they are there until the store is next
 * changed.
 * @return ATTN_ERR_NOT_FOUND (or a step is only making it), ATTN_ERR_STALE generation differs,
 *         ATTN_ERR_INVALID the range ends above the committed length
 */
attn_status_t kv_read_begin(kv_store_t *store, uint64_t cache, uint64_t chunk, uint32_t generation,
                            uint32_t first, uint32_t n, uint32_t *pages, uint32_t *offsets,
                            uint32_t *n_held, kv_read_t **read_p);
void kv_read_end(kv_read_t *read);

/* ---- moving a chunk from one store to another ---- */

/**
 * What becomes of a chunk that another worker is to own (kv_chunk_leave()). The chunk need not be
 * here: one that nobody has stored into yet is moved, too, and must not be made meanwhile.
 */
typedef enum kv_leave {
    KV_LEAVE_HOLD, /**< no step may name it until `until_ns`, or until this is said otherwise */
    KV_LEAVE_GO,   /**< nor ever again: it was held by this move, and is what it was copied as */
    KV_LEAVE_STAY, /**< the move came to nothing: all is as before, if this move holds it */
} kv_leave_t;

typedef struct kv_leaving {
    kv_leave_t what;
    uint64_t chunk, move; /**< move: a number of the attempt, not 0; a greater one takes over */
    uint32_t generation, length; /**< of GO: as it was copied; both 0: it was not here */
    uint64_t until_ns;           /**< of HOLD: kv_leaving_tick() lets it go then */
} kv_leaving_t;

/**
 * Hold a chunk for a move, let it go, or keep it. A begin that names a chunk which is held or gone
 * is ATTN_ERR_STALE: a fresh layout tells where it is. Truncating it is ATTN_ERR_BUSY. Steps that
 * have named it before go on; info->in_step tells of them. Releasing the chunk ends all this.
 * @param info  the chunk as it is now, generation 0 if it is not here; may be NULL
 * @return ATTN_ERR_BUSY   GO while a step names it
 * @return ATTN_ERR_STALE  HOLD: a later move holds it, or it is gone
 * @return ATTN_ERR_STALE  GO: it is not held by this move (any more), or is another than was copied
 */
attn_status_t kv_chunk_leave(kv_store_t *store, uint64_t cache, const kv_leaving_t *leaving,
                             kv_chunk_info_t *info);

/** Chunks whose hold is over may be named again. */
void kv_leaving_tick(kv_store_t *store, uint64_t now_ns);

/** Tokens on their way into a chunk that nobody sees until they are all there. */
typedef struct kv_arrival kv_arrival_t;

/**
 * Reserve pages for tokens [first, length) of a chunk that comes from elsewhere. first 0: the chunk
 * is new here. Otherwise it has come before, and has `first` tokens.
 * @return ATTN_ERR_EXISTS     first is 0, and the chunk is here
 * @return ATTN_ERR_STALE      first is not its length
 * @return ATTN_ERR_NOT_FOUND  first is not 0, and it is not here
 * @return ATTN_ERR_BUSY       a step names it, another arrival is open for it, or a fork shares the
 *                             page that it goes on in
 * @return ATTN_ERR_EXHAUSTED  too few free pages, names how many; or too many chunks
 * @return ATTN_ERR_INVALID    first < length <= chunk_size does not hold
 */
attn_status_t kv_arrival_begin(kv_store_t *store, uint64_t cache, uint64_t chunk, uint32_t first,
                               uint32_t length, kv_arrival_t **arrival_p);

/**
 * Where tokens [first, first + n) of it go, and hold the region open until kv_arrival_leave().
 * @return ATTN_ERR_NOT_FOUND  the cache was closed meanwhile
 * @return ATTN_ERR_INVALID    other tokens than are to come
 */
attn_status_t kv_arrival_enter(kv_arrival_t *arrival, uint32_t first, uint32_t n, uint32_t *pages,
                               uint32_t *offsets);
void kv_arrival_leave(kv_arrival_t *arrival);

/** All tokens are there: the chunk has them, a new one with generation 1. The arrival is gone in any case,
 * and on failure its pages are back. @return ATTN_ERR_NOT_FOUND the cache, or the chunk that was to
 * grow, is gone; ATTN_ERR_EXISTS a step has made it meanwhile; ATTN_ERR_BUSY, _STALE it changed,
 * even if it is as long as before */
attn_status_t kv_arrival_publish(kv_arrival_t *arrival);

/** Give its pages back. */
void kv_arrival_drop(kv_arrival_t *arrival);

/** Is a step open on the sequence? */
bool kv_seq_in_step(const kv_store_t *store, uint64_t cache, uint64_t seq);

/* ---- steps ---- */

/**
 * One chunk that a step names. A chunk that does not exist yet has generation 0 and length 0:
 * begin makes it if n_new > 0, and commit with at least one accepted token of it makes it
 * visible, with generation 1; otherwise it is gone, so that generation 0 stays true.
 */
typedef struct kv_step_chunk {
    uint64_t chunk;
    uint32_t generation; /**< as the caller believes */
    uint32_t length;     /**< committed tokens, as the caller believes */
    uint32_t n_new;      /**< tokens that the step appends to it */
    uint32_t number;     /**< position of the chunk in its sequence; only checked to ascend */
} kv_step_chunk_t;

typedef struct kv_step_entry {
    uint64_t seq;
    uint32_t n_chunks;             /**< may be 0: only the sequence is held */
    const kv_step_chunk_t *chunks; /**< strictly ascending in number; an id once per entry; a
                                        chunk with n_new > 0 is in no other entry of the step */
    uint32_t n_spare; /**< up to ATTN_KV_SPARE_MAX tokens to make room for beside the chunks, until
                         the step ends */
} kv_step_entry_t;

/** A page that must be copied, all layers, before the step reads or writes: copy on write. */
typedef struct kv_copy {
    uint32_t from, to; /**< pages */
    uint32_t tokens;   /**< the first ones of the page, 1 to page_size - 1 */
} kv_copy_t;

typedef struct kv_step kv_step_t;

/**
 * Open a step: check every chunk against what the caller believes, hold the sequences,
 * reserve all pages or none. Any failure leaves everything as it was. Where several things
 * are wrong, any one of them is told.
 *
 * A chunk may be read (n_new = 0) by any number of open steps. One that a step appends to is
 * in no other open step, neither to be read nor to be appended to.
 *
 * @param step_id    not 0, not open for any cache of the store
 * @param entries    not kept; the caller's copy is not needed after the call
 * @param n_entries  0 to ATTN_KV_ENTRIES_MAX
 * @return ATTN_ERR_EXISTS     step_id is open
 * @return ATTN_ERR_BUSY       a sequence is in another open step; or a chunk is, and one of the two
 *                             steps appends to it
 * @return ATTN_ERR_STALE      names chunk, and both generations and lengths; or it is being moved
 * @return ATTN_ERR_NOT_FOUND  a chunk with generation > 0 that is not here
 * @return ATTN_ERR_EXHAUSTED  too few free pages, names how many; or too many steps or chunks
 * @return ATTN_ERR_INVALID    step 0, length + n_new above chunk_size, a chunk or sequence twice,
 *                             chunk numbers not ascending, too many entries or chunks
 */
attn_status_t kv_step_begin(kv_store_t *store, uint64_t cache, uint64_t step_id,
                            const kv_step_entry_t *entries, uint32_t n_entries, kv_step_t **step_p);

/** The open step of that id, or NULL. */
kv_step_t *kv_step_find(kv_store_t *store, uint64_t step_id);

/** Pages to copy before the first write; NULL where there are none. Owned by the step. */
const kv_copy_t *kv_step_copies(const kv_step_t *step, uint32_t *n);

/**
 * The pages of chunk `c` of entry `i` as the step sees them (copies and reserved ones in
 * place): [ceil((length + n_new) / page_size)], NULL where that is 0. Owned by the step; the
 * order of entries and chunks is that of begin.
 */
const uint32_t *kv_step_pages(const kv_step_t *step, uint32_t entry, uint32_t chunk, uint32_t *n);

/** The pages for the spare tokens of entry `i`: [ceil(n_spare / page_size)]. They belong to the
 * step and go back when it ends, however it ends. */
const uint32_t *kv_step_spares(const kv_step_t *step, uint32_t entry, uint32_t *n);

/**
 * Make the first accepted[i] new tokens of entry i (over its chunks in order) part of its
 * chunks, give back what is left over, close the step: `step` is gone. accepted NULL: all.
 * Of a chunk whose unfilled page was to be copied and none of whose tokens is accepted, the
 * copy is dropped and the shared page stays.
 * @return ATTN_ERR_INVALID  accepted[i] above the entry's new tokens; the step stays open
 */
attn_status_t kv_step_commit(kv_store_t *store, kv_step_t *step, const uint32_t *accepted);

/** Return everything to where it was and close the step: `step` is gone, and so are the chunks
 * that begin made. */
void kv_step_abort(kv_store_t *store, kv_step_t *step);

/**
 * Verify the whole store: every page is free once or counted exactly by its holders,
 * regions do not overlap, lengths fit pages, steps hold what they name. Takes time in
 * proportion to the pages of all regions.
 * @return ATTN_ERR_INTERNAL with the first thing that is wrong, ATTN_ERR_NO_MEMORY
 */
attn_status_t kv_store_check(const kv_store_t *store);

#endif
