/* seq_table_check(): counts references, lists and free places again. */
#include "kvstore/sequence_int.h"

#include <stdlib.h>

#define WRONG(...) attn_fail(ATTN_ERR_INTERNAL, __VA_ARGS__)

/* Counts each list entry in references[record]. */
static attn_status_t
check_sequences(const seq_table_t *table, uint32_t *references)
{
    uint64_t n_seqs = 0, list_bytes = 0;

    for (uint32_t i = 0; i < table->n_slots; i++) {
        const seq_t *seq = &table->slots[i];
        if (seq->capacity == 0) {
            continue;
        }
        if (seq->generation == 0 || seq->capacity < SEQ_INLINE || seq->n_chunks > seq->capacity) {
            return WRONG("slot %u: generation %u, %u chunks in a list of %u", i, seq->generation,
                         seq->n_chunks, seq->capacity);
        }
        for (uint32_t c = 0; c < seq->n_chunks; c++) {
            uint32_t record = seq_list_const(seq)[c];
            if (record >= table->n_records) {
                return WRONG("slot %u: chunk %u is record %u of %u", i, c, record,
                             table->n_records);
            }
            references[record]++;
        }
        n_seqs++;
        list_bytes += seq->capacity > SEQ_INLINE ? seq->capacity * sizeof(uint32_t) : 0;
    }
    if (n_seqs != table->n_seqs || list_bytes != table->list_bytes) {
        return WRONG("%u sequences with %" PRIu64 " bytes of lists, found %" PRIu64
                     " with %" PRIu64,
                     table->n_seqs, table->list_bytes, n_seqs, list_bytes);
    }
    return ATTN_OK;
}

static int
compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static attn_status_t
check_ids_differ(const seq_table_t *table, uint64_t *ids, uint32_t n)
{
    qsort(ids, n, sizeof(*ids), compare_ids);
    for (uint32_t i = 0; i < n; i++) {
        if (ids[i] == 0 || ids[i] >= table->next_chunk_id || (i > 0 && ids[i] == ids[i - 1])) {
            return WRONG("chunk id %" PRIu64 " is there twice, or was never given out", ids[i]);
        }
    }
    return ATTN_OK;
}

static attn_status_t
check_records(const seq_table_t *table, const uint32_t *references, uint64_t *ids)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < table->n_records; i++) {
        const seq_chunk_t *chunk = &table->chunks[i];
        if (chunk->references != references[i]) {
            return WRONG("chunk %" PRIu64 ": %u references, listed %u times", chunk->id,
                         (uint32_t)chunk->references, references[i]);
        }
        if (chunk->references > 0) {
            ids[n++] = chunk->id;
        }
    }
    if (n != table->n_chunks) {
        return WRONG("%u chunks, found %u", table->n_chunks, n);
    }
    return check_ids_differ(table, ids, n);
}

/* Each free list reaches exactly the places that are not in use; a loop would reach more. */
static attn_status_t
check_free(const seq_table_t *table)
{
    uint32_t n = 0, used_up = 0;

    for (uint32_t i = table->free_record; i != SEQ_NONE; i = table->chunks[i].worker) {
        if (i >= table->n_records || table->chunks[i].references > 0 || n++ > table->n_records) {
            return WRONG("record %u on the free list is in use, or is there twice", i);
        }
    }
    if (n != table->n_records - table->n_chunks) {
        return WRONG("%u free records of %u with %u in use", n, table->n_records, table->n_chunks);
    }

    for (uint32_t i = 0; i < table->n_slots; i++) {
        used_up += table->slots[i].capacity == 0 && table->slots[i].generation == 0;
    }
    n = 0;
    for (uint32_t i = table->free_slot; i != SEQ_NONE; i = table->slots[i].chunks.next_free) {
        if (i >= table->n_slots || table->slots[i].capacity > 0 || n++ > table->n_slots) {
            return WRONG("slot %u on the free list is in use, or is there twice", i);
        }
    }
    if (n != table->n_slots - table->n_seqs - used_up) {
        return WRONG("%u free slots of %u with %u in use", n, table->n_slots, table->n_seqs);
    }
    return ATTN_OK;
}

attn_status_t
seq_table_check(const seq_table_t *table)
{
    attn_status_t status = ATTN_OK;
    uint32_t *references = calloc((size_t)table->n_records + 1, sizeof(*references));
    uint64_t *ids        = calloc((size_t)table->n_chunks + 1, sizeof(*ids));

    if (references == NULL || ids == NULL) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory to count %u chunks", table->n_records);
    }
    if (status == ATTN_OK) {
        status = check_sequences(table, references);
    }
    if (status == ATTN_OK) {
        status = check_records(table, references, ids);
    }
    if (status == ATTN_OK) {
        status = check_free(table);
    }
    free(references);
    free(ids);
    return status;
}
