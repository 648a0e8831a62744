/*
 * Sequences as lists of chunks. Every call that adds takes its memory first and changes the
 * table after, so a full heap leaves it as it was; calls that remove need none.
 */
#include "kvstore/sequence_int.h"

#include <stdlib.h>
#include <string.h>

#define WALK_LOOKS 65536u /* of one call of seq_walk_owned(): a millisecond at most */

/* The finisher of a hash: every bit of the seed reaches every bit of the result. */
uint64_t
seq_first_id(uint64_t seed, uint32_t which, uint32_t bits)
{
    if (seed == 0) {
        return 0;
    }
    uint64_t x = seed + which * UINT64_C(0x9e3779b97f4a7c15);
    x          = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x          = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return (x ^ x >> 31) >> (64 - bits);
}

attn_status_t
seq_table_create(uint64_t seed, seq_table_t **table_p)
{
    seq_table_t *table = calloc(1, sizeof(*table));
    if (table == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a table of sequences");
    }
    table->free_slot        = SEQ_NONE;
    table->free_record      = SEQ_NONE;
    table->next_chunk_id    = 1 + seq_first_id(seed, 1, 62);
    table->first_generation = 1 + (uint32_t)seq_first_id(seed, 2, 31);
    *table_p                = table;
    return ATTN_OK;
}

void
seq_table_destroy(seq_table_t *table)
{
    if (table == NULL) {
        return;
    }
    for (uint32_t i = 0; i < table->n_slots; i++) {
        if (table->slots[i].capacity > SEQ_INLINE) {
            free(table->slots[i].chunks.list);
        }
    }
    free(table->slots);
    free(table->chunks);
    free(table->fills);
    free(table);
}

/* ---- arrays that grow ---- */

/* By half, so that at most a third is room; *capacity is at least `need` on true. */
static bool
array_grow(void **array, uint32_t *capacity, uint64_t need, size_t item, uint64_t most)
{
    if (need <= *capacity) {
        return true;
    }
    uint64_t grown = attn_max(attn_max(need, 16), *capacity + (uint64_t)*capacity / 2);
    grown          = attn_min(grown, most);
    void *bigger   = realloc(*array, grown * item);
    if (bigger == NULL) {
        return false;
    }
    *array    = bigger;
    *capacity = (uint32_t)grown;
    return true;
}

static attn_status_t
no_memory(const char *what)
{
    return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %s", what);
}

/* ---- chunk records ---- */

/* After this record_take() succeeds once. */
static attn_status_t
record_room(seq_table_t *table)
{
    if (table->free_record != SEQ_NONE) {
        return ATTN_OK;
    }
    if (table->n_records == ATTN_SEQ_ALL_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "the table has %u chunks, the most", table->n_records);
    }
    void *chunks = table->chunks, *fills = table->fills;
    bool grown = array_grow(&fills, &table->fills_capacity, (uint64_t)table->n_records + 1,
                            sizeof(table->fills[0]), ATTN_SEQ_ALL_CHUNKS_MAX) &&
                 array_grow(&chunks, &table->records_capacity, (uint64_t)table->n_records + 1,
                            sizeof(seq_chunk_t), ATTN_SEQ_ALL_CHUNKS_MAX);
    table->fills  = fills; /* one may have moved where the other could not */
    table->chunks = chunks;
    return grown ? ATTN_OK : no_memory("one more chunk");
}

static uint32_t
record_take(seq_table_t *table, uint32_t worker)
{
    uint32_t record = table->free_record;

    if (record != SEQ_NONE) {
        table->free_record = table->chunks[record].worker;
    } else {
        assert(table->n_records < table->records_capacity);
        record = table->n_records++;
    }
    table->chunks[record] = (seq_chunk_t){
        .id         = table->next_chunk_id++,
        .worker     = worker,
        .references = 1,
    };
    table->fills[record] = 0;
    table->n_chunks++;
    return record;
}

/* One reference less; the last one's chunk leaves the table and is told. */
static void
record_drop(seq_table_t *table, uint32_t record, uint64_t cache, seq_release_fn release, void *arg)
{
    seq_chunk_t *chunk = &table->chunks[record];

    assert(chunk->references > 0);
    if (--chunk->references > 0) {
        return;
    }
    const seq_released_t released = {
        .cache  = cache,
        .chunk  = chunk->id,
        .worker = chunk->worker,
        .fill   = table->fills[record],
    };
    *chunk             = (seq_chunk_t){.worker = table->free_record};
    table->free_record = record;
    table->n_chunks--;
    if (release != NULL) {
        release(arg, &released);
    }
}

/* ---- lists ---- */

static bool
list_grow(seq_table_t *table, seq_t *seq, uint32_t need)
{
    uint32_t capacity = seq->capacity;
    void *list        = capacity > SEQ_INLINE ? seq->chunks.list : NULL;

    if (need <= capacity) {
        return true;
    }
    /* The least list outside is small: a sequence of three chunks should not pay for 16. */
    uint64_t grown = attn_max(need, capacity + (uint64_t)capacity / 2);
    grown          = attn_min(grown + grown % 2, ATTN_SEQ_CHUNKS_MAX);
    list           = realloc(list, grown * sizeof(uint32_t));
    if (list == NULL) {
        return false;
    }
    if (capacity == SEQ_INLINE) {
        memcpy(list, seq->chunks.within, sizeof(seq->chunks.within));
        capacity = 0;
    }
    seq->chunks.list = list;
    seq->capacity    = (uint32_t)grown;
    table->list_bytes += (grown - capacity) * sizeof(uint32_t);
    return true;
}

/* Give back room after a cut: a list that is less than a quarter full. */
static void
list_shrink(seq_table_t *table, seq_t *seq)
{
    uint32_t *list    = seq->chunks.list;
    uint32_t capacity = seq->capacity;

    if (capacity <= SEQ_INLINE || seq->n_chunks > capacity / 4) {
        return;
    }
    if (seq->n_chunks <= SEQ_INLINE) {
        memcpy(seq->chunks.within, list, seq->n_chunks * sizeof(*list));
        free(list);
        seq->capacity = SEQ_INLINE;
        table->list_bytes -= capacity * sizeof(*list);
        return;
    }
    uint32_t *smaller = realloc(list, seq->n_chunks * sizeof(*list));
    if (smaller != NULL) {
        seq->chunks.list = smaller;
        seq->capacity    = seq->n_chunks;
        table->list_bytes -= (capacity - seq->n_chunks) * sizeof(*list);
    }
}

/* ---- sequences ---- */

static seq_t *
seq_find(const seq_table_t *table, attn_seq_t id)
{
    uint32_t slot = (uint32_t)id.id, generation = (uint32_t)(id.id >> 32);

    if (slot >= table->n_slots) {
        return NULL;
    }
    seq_t *seq = &table->slots[slot];
    return seq->capacity > 0 && seq->generation == generation ? seq : NULL;
}

static attn_status_t
seq_need(const seq_table_t *table, attn_seq_t id, seq_t **seq_p)
{
    *seq_p = seq_find(table, id);
    if (*seq_p == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND,
                         "sequence %" PRIu64 " is not here: freed, or never was", id.id);
    }
    return ATTN_OK;
}

/* After this slot_take() succeeds once. Moves the slots. */
static attn_status_t
slot_room(seq_table_t *table)
{
    if (table->n_seqs == ATTN_SEQUENCES_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "%u sequences are here, the most", table->n_seqs);
    }
    if (table->free_slot != SEQ_NONE) {
        return ATTN_OK;
    }
    void *slots = table->slots;
    if (!array_grow(&slots, &table->slots_capacity, (uint64_t)table->n_slots + 1, sizeof(seq_t),
                    SEQ_NONE)) {
        return no_memory("one more sequence");
    }
    table->slots = slots;
    return ATTN_OK;
}

static uint32_t
slot_take(seq_table_t *table, uint64_t cache, uint32_t client, uint64_t expected_tokens)
{
    uint32_t slot = table->free_slot, generation = table->first_generation;

    if (slot != SEQ_NONE) {
        generation       = table->slots[slot].generation;
        table->free_slot = table->slots[slot].chunks.next_free;
    } else {
        assert(table->n_slots < table->slots_capacity);
        slot = table->n_slots++;
    }
    table->slots[slot] = (seq_t){
        .cache           = cache,
        .expected_tokens = expected_tokens,
        .client          = client,
        .generation      = generation,
        .capacity        = SEQ_INLINE,
    };
    table->n_seqs++;
    return slot;
}

/* The id is refused from now on, also when the slot is taken again. */
static void
slot_give_back(seq_table_t *table, uint32_t slot)
{
    seq_t *seq = &table->slots[slot];

    if (seq->capacity > SEQ_INLINE) {
        table->list_bytes -= seq->capacity * sizeof(uint32_t);
        free(seq->chunks.list);
    }
    *seq = (seq_t){.generation = seq->generation + 1};
    table->n_seqs--;
    /* A slot that has had all its generations is left alone, lest an old id names a new one. */
    if (seq->generation != 0) {
        seq->chunks.next_free = table->free_slot;
        table->free_slot      = slot;
    }
}

attn_status_t
seq_create(seq_table_t *table, uint64_t cache, uint32_t client, uint64_t expected_tokens,
           attn_seq_t *seq_p)
{
    attn_status_t status = slot_room(table);
    if (status != ATTN_OK) {
        return status;
    }
    uint32_t slot = slot_take(table, cache, client, expected_tokens);
    *seq_p        = seq_id(slot, table->slots[slot].generation);
    return ATTN_OK;
}

static seq_info_t
seq_info(const seq_t *seq)
{
    return (seq_info_t){
        .cache           = seq->cache,
        .expected_tokens = seq->expected_tokens,
        .client          = seq->client,
        .n_chunks        = seq->n_chunks,
    };
}

attn_status_t
seq_describe(const seq_table_t *table, attn_seq_t id, seq_info_t *info)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status == ATTN_OK) {
        *info = seq_info(seq);
    }
    return status;
}

const seq_chunk_t *
seq_chunk_at(const seq_table_t *table, attn_seq_t id, uint32_t i)
{
    const seq_t *seq = seq_find(table, id);

    return seq != NULL && i < seq->n_chunks ? &table->chunks[seq_list_const(seq)[i]] : NULL;
}

static uint8_t *
fill_at(const seq_table_t *table, attn_seq_t id, uint32_t i)
{
    const seq_t *seq = seq_find(table, id);

    assert(seq != NULL && i < seq->n_chunks);
    return &table->fills[seq_list_const(seq)[i]];
}

uint8_t
seq_chunk_fill(const seq_table_t *table, attn_seq_t id, uint32_t i)
{
    return *fill_at(table, id, i);
}

void
seq_chunk_set_fill(seq_table_t *table, attn_seq_t id, uint32_t i, uint8_t fill)
{
    *fill_at(table, id, i) = fill;
}

attn_status_t
seq_chunk_append(seq_table_t *table, attn_seq_t id, uint32_t worker, uint64_t *chunk_p)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status != ATTN_OK) {
        return status;
    }
    if (seq->n_chunks == ATTN_SEQ_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "sequence %" PRIu64 " has %u chunks, the most", id.id,
                         seq->n_chunks);
    }
    status = record_room(table);
    if (status != ATTN_OK) {
        return status;
    }
    if (!list_grow(table, seq, seq->n_chunks + 1)) {
        return no_memory("one more chunk of a sequence");
    }
    uint32_t record                = record_take(table, worker);
    seq_list(seq)[seq->n_chunks++] = record;
    *chunk_p                       = table->chunks[record].id;
    return ATTN_OK;
}

/* ---- fork ---- */

static attn_status_t
fork_check(const seq_t *seq, attn_seq_t id, uint32_t n_shared, bool tail)
{
    if (n_shared > seq->n_chunks) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": fork of %u chunks, it has %u",
                         id.id, n_shared, seq->n_chunks);
    }
    if (n_shared + tail > ATTN_SEQ_CHUNKS_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "sequence %" PRIu64 ": fork of %u chunks and one more, the most is %u",
                         id.id, n_shared, ATTN_SEQ_CHUNKS_MAX);
    }
    return ATTN_OK;
}

attn_status_t
seq_fork(seq_table_t *table, attn_seq_t id, uint32_t client, uint32_t n_shared,
         uint32_t tail_worker, attn_seq_t *fork_p, uint64_t *tail_p)
{
    bool tail = tail_worker != UINT32_MAX;
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status == ATTN_OK) {
        status = fork_check(seq, id, n_shared, tail);
    }
    if (status == ATTN_OK && tail) {
        status = record_room(table);
    }
    if (status == ATTN_OK) {
        status = slot_room(table);
    }
    if (status != ATTN_OK) {
        return status;
    }

    seq           = seq_find(table, id); /* the slots may have moved */
    uint32_t slot = slot_take(table, seq->cache, client, seq->expected_tokens);
    seq_t *fork   = &table->slots[slot];
    if (!list_grow(table, fork, n_shared + tail)) {
        slot_give_back(table, slot);
        return no_memory("the chunks of a fork");
    }
    uint32_t *list = seq_list(fork);
    memcpy(list, seq_list(seq), n_shared * sizeof(*list));
    for (uint32_t i = 0; i < n_shared; i++) {
        table->chunks[list[i]].references++;
    }
    if (tail) {
        list[n_shared] = record_take(table, tail_worker);
        *tail_p        = table->chunks[list[n_shared]].id;
    }
    fork->n_chunks = n_shared + tail;
    *fork_p        = seq_id(slot, fork->generation);
    return ATTN_OK;
}

/* ---- replace, cut, free ---- */

uint64_t
seq_chunk_id(seq_table_t *table)
{
    return table->next_chunk_id++;
}

attn_status_t
seq_chunk_replace(seq_table_t *table, attn_seq_t id, uint32_t i, uint64_t chunk,
                  seq_release_fn release, void *arg)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status != ATTN_OK) {
        return status;
    }
    if (i >= seq->n_chunks) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": chunk %u of %u", id.id, i,
                         seq->n_chunks);
    }
    status = record_room(table);
    if (status != ATTN_OK) {
        return status;
    }
    uint32_t *entry = &seq_list(seq)[i];
    uint32_t old    = *entry;
    *entry          = record_take(table, table->chunks[old].worker);

    table->chunks[*entry].id = chunk;
    record_drop(table, old, seq->cache, release, arg);
    return ATTN_OK;
}

/* The record of chunk i. */
static attn_status_t
chunk_need(seq_table_t *table, attn_seq_t id, uint32_t i, seq_chunk_t **chunk_p)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status != ATTN_OK) {
        return status;
    }
    if (i >= seq->n_chunks) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": chunk %u of %u", id.id, i,
                         seq->n_chunks);
    }
    *chunk_p = &table->chunks[seq_list(seq)[i]];
    return ATTN_OK;
}

attn_status_t
seq_chunk_renew(seq_table_t *table, attn_seq_t id, uint32_t i, uint32_t worker, bool sealed)
{
    seq_chunk_t *chunk = NULL;

    attn_status_t status = chunk_need(table, id, i, &chunk);
    if (status == ATTN_OK) {
        chunk->id     = table->next_chunk_id++;
        chunk->worker = worker;
        chunk->sealed = chunk->sealed || sealed;
    }
    return status;
}

attn_status_t
seq_chunk_move(seq_table_t *table, attn_seq_t id, uint32_t i, uint32_t worker, uint64_t chunk)
{
    seq_chunk_t *record = NULL;

    attn_status_t status = chunk_need(table, id, i, &record);
    if (status == ATTN_OK) {
        record->id     = chunk;
        record->worker = worker;
    }
    return status;
}

attn_status_t
seq_chunk_unseal(seq_table_t *table, attn_seq_t id, uint32_t i)
{
    seq_chunk_t *chunk = NULL;

    attn_status_t status = chunk_need(table, id, i, &chunk);
    if (status == ATTN_OK && chunk->references > 1) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": chunk %u is of %u sequences",
                         id.id, i, (uint32_t)chunk->references);
    }
    if (status == ATTN_OK) {
        chunk->sealed = false;
    }
    return status;
}

static void
cut_to(seq_table_t *table, seq_t *seq, uint32_t n_chunks, seq_release_fn release, void *arg)
{
    const uint32_t *list = seq_list(seq);
    uint32_t had         = seq->n_chunks;

    seq->n_chunks = n_chunks; /* before release() can look */
    for (uint32_t i = n_chunks; i < had; i++) {
        record_drop(table, list[i], seq->cache, release, arg);
    }
    list_shrink(table, seq);
}

attn_status_t
seq_cut(seq_table_t *table, attn_seq_t id, uint32_t n_chunks, seq_release_fn release, void *arg)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status != ATTN_OK) {
        return status;
    }
    if (n_chunks > seq->n_chunks) {
        return attn_fail(ATTN_ERR_INVALID, "sequence %" PRIu64 ": cut to %u chunks, it has %u",
                         id.id, n_chunks, seq->n_chunks);
    }
    cut_to(table, seq, n_chunks, release, arg);
    return ATTN_OK;
}

attn_status_t
seq_free(seq_table_t *table, attn_seq_t id, seq_release_fn release, void *arg)
{
    seq_t *seq;

    attn_status_t status = seq_need(table, id, &seq);
    if (status != ATTN_OK) {
        return status;
    }
    cut_to(table, seq, 0, release, arg);
    slot_give_back(table, (uint32_t)id.id);
    return ATTN_OK;
}

/* ---- the whole table ---- */

void
seq_for_each(const seq_table_t *table,
             void (*visit)(void *arg, attn_seq_t seq, const seq_info_t *info), void *arg)
{
    for (uint32_t i = 0; i < table->n_slots; i++) {
        const seq_t *seq = &table->slots[i];
        if (seq->capacity > 0) {
            const seq_info_t info = seq_info(seq);
            visit(arg, seq_id(i, seq->generation), &info);
        }
    }
}

uint32_t
seq_walk_owned(const seq_table_t *table, uint32_t worker, seq_walk_t *walk, seq_place_t *places,
               uint32_t room)
{
    uint32_t n = 0, looks = WALK_LOOKS;

    for (; walk->slot < table->n_slots && looks > 0; walk->slot++, walk->i = 0, looks--) {
        const seq_t *seq    = &table->slots[walk->slot];
        uint32_t n_chunks   = seq->capacity > 0 ? seq->n_chunks : 0;
        const attn_seq_t id = seq_id(walk->slot, seq->generation);
        for (; walk->i < n_chunks && looks > 1; walk->i++, looks--) {
            if (table->chunks[seq_list_const(seq)[walk->i]].worker != worker) {
                continue;
            }
            if (n == room) {
                return n;
            }
            places[n++] = (seq_place_t){.seq = id, .i = walk->i};
        }
        if (walk->i < n_chunks) {
            return n; /* the rest of a long one the next time */
        }
    }
    walk->over = walk->slot == table->n_slots;
    return n;
}

uint64_t
seq_count(const seq_table_t *table)
{
    return table->n_seqs;
}

uint64_t
seq_chunk_count(const seq_table_t *table)
{
    return table->n_chunks;
}

uint64_t
seq_table_bytes(const seq_table_t *table)
{
    return sizeof(*table) + (uint64_t)table->slots_capacity * sizeof(seq_t) +
           (uint64_t)table->records_capacity * sizeof(seq_chunk_t) + table->fills_capacity +
           table->list_bytes;
}
