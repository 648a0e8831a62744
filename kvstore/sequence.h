/*
 * sequence.h: sequences as lists of chunks with owners: what the coordinator (or libattn
 * with local engines) knows of them. Ids with generations, reference counts of chunks,
 * fork and truncate as list operations. No I/O; used under its owner's lock.
 *
 * A sequence of length L has chunks 0 .. ceil(L / chunk_size) - 1, and may have chunks
 * placed in advance. Committed lengths and generations are the workers' truth and are not
 * kept here, nor whether an owner ever saw a chunk.
 */
#ifndef ATTN_SEQUENCE_H
#define ATTN_SEQUENCE_H

#include "base/attn_types.h"

#define ATTN_SEQUENCES_MAX (1u << 24)
#define ATTN_SEQ_CHUNKS_MAX (1u << 20)     /* of one sequence */
#define ATTN_SEQ_ALL_CHUNKS_MAX (1u << 28) /* of the table */

/** A chunk as the table knows it; 16 bytes. */
typedef struct seq_chunk {
    uint64_t id;              /**< never used twice */
    uint32_t worker;          /**< its owner */
    uint32_t references : 31; /**< sequences that list it */
    uint32_t sealed : 1;      /**< it was full when an owner was lost: seq_chunk_renew() */
} seq_chunk_t;

typedef struct seq_table seq_table_t;

/**
 * @param seed  where ids begin: 0 at 1; otherwise at places that follow from it, so that the ids of
 *              a table made with another random seed are not taken for this one's.
 */
attn_status_t seq_table_create(uint64_t seed, seq_table_t **table_p);

/** A number of `bits` bits from a seed, other ones for other `which`; 0 if the seed is 0. */
uint64_t seq_first_id(uint64_t seed, uint32_t which, uint32_t bits);
void seq_table_destroy(seq_table_t *table);

/* Every call that takes a sequence may return ATTN_ERR_NOT_FOUND: it never was, or was freed (the
 * id's generation is old). Every call that adds may return ATTN_ERR_NO_MEMORY, and one that adds a
 * chunk ATTN_ERR_EXHAUSTED (ATTN_SEQ_ALL_CHUNKS_MAX), with nothing changed. Output arguments are
 * written on ATTN_OK only. */

/**
 * A new, empty sequence of `cache`, of `client` (0: nobody's lease). Its id is its slot (low 32
 * bits) and the slot's generation (high 32 bits).
 * @return ATTN_ERR_EXHAUSTED  ATTN_SEQUENCES_MAX of them are there
 */
attn_status_t seq_create(seq_table_t *table, uint64_t cache, uint32_t client,
                         uint64_t expected_tokens, attn_seq_t *seq_p);

typedef struct seq_info {
    uint64_t cache;
    uint64_t expected_tokens;
    uint32_t client;
    uint32_t n_chunks;
} seq_info_t;

attn_status_t seq_describe(const seq_table_t *table, attn_seq_t seq, seq_info_t *info);

/** Chunk i of the sequence, or NULL: no such sequence or chunk. One record for all sequences that
 * list the chunk. Valid until the table is next changed. */
const seq_chunk_t *seq_chunk_at(const seq_table_t *table, attn_seq_t seq, uint32_t i);

/** Append a new chunk owned by `worker`. @return ATTN_ERR_TOO_LARGE  ATTN_SEQ_CHUNKS_MAX */
attn_status_t seq_chunk_append(seq_table_t *table, attn_seq_t seq, uint32_t worker,
                               uint64_t *chunk_p);

/**
 * How full the chunk is, as its placer believes: 0 to 255, for the placer's own use. A new chunk
 * has 0. i must be below the sequence's chunks.
 */
uint8_t seq_chunk_fill(const seq_table_t *table, attn_seq_t seq, uint32_t i);
void seq_chunk_set_fill(seq_table_t *table, attn_seq_t seq, uint32_t i, uint8_t fill);

/** A chunk that no sequence lists any more: its owner can release it, if it ever saw it. */
typedef struct seq_released {
    uint64_t cache, chunk;
    uint32_t worker;
    uint8_t fill;
} seq_released_t;

/** Called exactly once for each chunk whose last reference went, in the order of the list. The
 * chunk has left the table by then; must not change the table. */
typedef void (*seq_release_fn)(void *arg, const seq_released_t *released);

/**
 * A new sequence that shares the first n_shared chunks of seq (their references grow). If
 * tail_worker is not UINT32_MAX, one more new chunk, owned by it, is appended (the fork of
 * the growing chunk) and its id returned in tail_p, which may be NULL otherwise. The fork has the
 * cache and the expected tokens of seq.
 * @return ATTN_ERR_INVALID    n_shared is above the chunks of seq
 * @return ATTN_ERR_TOO_LARGE  ATTN_SEQ_CHUNKS_MAX
 * @return ATTN_ERR_EXHAUSTED  ATTN_SEQUENCES_MAX
 */
attn_status_t seq_fork(seq_table_t *table, attn_seq_t seq, uint32_t client, uint32_t n_shared,
                       uint32_t tail_worker, attn_seq_t *fork_p, uint64_t *tail_p);

/** An id that no chunk has or will have but the one that it is given to. */
uint64_t seq_chunk_id(seq_table_t *table);

/** Replace chunk i by a new one of the same owner (its own copy, before a shared chunk is cut).
 * chunk is from seq_chunk_id(), so that the owner can have it before the table lists it.
 * @return ATTN_ERR_INVALID  there is no chunk i */
attn_status_t seq_chunk_replace(seq_table_t *table, attn_seq_t seq, uint32_t i, uint64_t chunk,
                                seq_release_fn release, void *arg);

/**
 * Chunk i was lost with its owner: from now on it is a new one, of another id, owned by `worker`,
 * for every sequence that lists it. sealed: it was full, so that it is a hole as far as it is not
 * filled again; a chunk that was sealed before stays so. Its fill stays what it was.
 * @return ATTN_ERR_INVALID  there is no chunk i
 */
attn_status_t seq_chunk_renew(seq_table_t *table, attn_seq_t seq, uint32_t i, uint32_t worker,
                              bool sealed);

/** Chunk i has another owner from now on, where its id is `chunk`, from seq_chunk_id(): for every
 * sequence that lists it. Its fill and seal stay. @return ATTN_ERR_INVALID  there is no chunk i */
attn_status_t seq_chunk_move(seq_table_t *table, attn_seq_t seq, uint32_t i, uint32_t worker,
                             uint64_t chunk);

/** Chunk i, which seq alone lists, was cut, and may grow again. @return ATTN_ERR_INVALID  there is
 * no chunk i, or others list it */
attn_status_t seq_chunk_unseal(seq_table_t *table, attn_seq_t seq, uint32_t i);

/** Keep the first n_chunks chunks; what nobody lists any more goes to release (which may be NULL).
 * Needs no memory. @return ATTN_ERR_INVALID  n_chunks is above those of seq */
attn_status_t seq_cut(seq_table_t *table, attn_seq_t seq, uint32_t n_chunks, seq_release_fn release,
                      void *arg);

/** Free the sequence: as seq_cut to 0, and the id is refused from now on. */
attn_status_t seq_free(seq_table_t *table, attn_seq_t seq, seq_release_fn release, void *arg);

/** Call visit for every sequence, in the order of slots; visit must not change the table. */
void seq_for_each(const seq_table_t *table,
                  void (*visit)(void *arg, attn_seq_t seq, const seq_info_t *info), void *arg);

/** Where a walk over all chunks is: {0} at first. */
typedef struct seq_walk {
    uint32_t slot, i;
    bool over;
} seq_walk_t;

typedef struct seq_place {
    attn_seq_t seq;
    uint32_t i;
} seq_place_t;

/** Chunks that `worker` owns, each by a sequence that lists it, from where the walk is: at most
 * room, and it looks at a few ten thousand chunks at most. What changes behind it is not seen.
 * @return how many; the walk is over when it says so */
uint32_t seq_walk_owned(const seq_table_t *table, uint32_t worker, seq_walk_t *walk,
                        seq_place_t *places, uint32_t room);

uint64_t seq_count(const seq_table_t *table);
uint64_t seq_chunk_count(const seq_table_t *table);

/** Bytes held, for accounting: asked of malloc, room for growth included. */
uint64_t seq_table_bytes(const seq_table_t *table);

/** Verify reference counts, ids and free lists, in time and memory in proportion to the table.
 * @return ATTN_ERR_INTERNAL with what is wrong, ATTN_ERR_NO_MEMORY */
attn_status_t seq_table_check(const seq_table_t *table);

#endif
