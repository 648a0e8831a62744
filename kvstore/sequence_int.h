/*
 * sequence_int.h: the table's records, for sequence.c and sequence_check.c only.
 *
 *     slots    [ seq | seq | free | seq ... ]      a seq lists indices into
 *     chunks   [ chunk | chunk | free | ... ]      16 bytes each, shared by its listers
 *
 * Both are arrays that grow, with a list of free places threaded through them. A chunk of
 * a sequence costs its record, a byte, and 4 bytes in the list of each sequence that shares it. The
 * first two entries of a list lie in the sequence itself, for most sequences are short.
 */
#ifndef ATTN_SEQUENCE_INT_H
#define ATTN_SEQUENCE_INT_H

#include "kvstore/sequence.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <inttypes.h>

#define SEQ_NONE UINT32_MAX /* end of a free list */
#define SEQ_INLINE 2u

typedef struct seq {
    uint64_t cache;
    uint64_t expected_tokens;
    uint32_t client;
    uint32_t generation; /* of the slot; 0: used up, never to be taken again */
    uint32_t n_chunks;
    uint32_t capacity; /* of the list; SEQ_INLINE: within; 0: the slot is free */
    union {
        uint32_t within[SEQ_INLINE];
        uint32_t *list;
        uint32_t next_free;
    } chunks;
} seq_t;

/* A free chunk record has references 0 and id 0, and the next free one in `worker`. */

struct seq_table {
    seq_t *slots;
    uint32_t n_slots, slots_capacity; /* n_slots: ever used */
    uint32_t free_slot;
    uint32_t n_seqs;
    seq_chunk_t *chunks;
    uint32_t n_records, records_capacity; /* n_records: ever used */
    uint8_t *fills;                       /* [fills_capacity] of the records: seq_chunk_fill() */
    uint32_t fills_capacity;
    uint32_t free_record;
    uint32_t n_chunks;
    uint64_t next_chunk_id;
    uint32_t first_generation; /* of every slot */
    uint64_t list_bytes;       /* of lists outside their sequence */
};

_Static_assert(sizeof(seq_chunk_t) == 16, "a million chunks should not cost more");
_Static_assert(sizeof(seq_t) == 40, "nor a million sequences");

static inline uint32_t *
seq_list(seq_t *seq)
{
    return seq->capacity > SEQ_INLINE ? seq->chunks.list : seq->chunks.within;
}

static inline const uint32_t *
seq_list_const(const seq_t *seq)
{
    return seq->capacity > SEQ_INLINE ? seq->chunks.list : seq->chunks.within;
}

static inline attn_seq_t
seq_id(uint32_t slot, uint32_t generation)
{
    return (attn_seq_t){(uint64_t)generation << 32 | slot};
}

#endif
