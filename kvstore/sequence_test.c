/* Sequences: each documented answer, the limits, and what the check finds. */
#include "kvstore/sequence_int.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define EXPECT(table, call, status)                                                                \
    do {                                                                                           \
        attn_status_t got_ = (call);                                                               \
        if (got_ != (status)) {                                                                    \
            print_error("%s: %s, \"%s\"\n", #call, attn_strerror(got_), attn_last_error());        \
        }                                                                                          \
        assert_int_equal(got_, (status));                                                          \
        assert_int_equal(seq_table_check(table), ATTN_OK);                                         \
    } while (0)

#define WORKS(table, call) EXPECT(table, call, ATTN_OK)

static seq_table_t *
make_table(void)
{
    seq_table_t *table = NULL;
    assert_int_equal(seq_table_create(0, &table), ATTN_OK);
    assert_int_equal(seq_table_check(table), ATTN_OK);
    return table;
}

static attn_seq_t
make_seq(seq_table_t *table, uint32_t n_chunks)
{
    attn_seq_t seq = {0};
    uint64_t chunk;

    WORKS(table, seq_create(table, 3, 4, 1000, &seq));
    for (uint32_t i = 0; i < n_chunks; i++) {
        WORKS(table, seq_chunk_append(table, seq, 10 + i, &chunk));
    }
    return seq;
}

/* What release() was told. */
typedef struct released {
    uint32_t n;
    seq_released_t list[64];
} released_t;

static void
on_release(void *arg, const seq_released_t *one)
{
    released_t *released = arg;
    assert_true(released->n < 64);
    released->list[released->n++] = *one;
}

static void
test_create_and_describe(void **state)
{
    seq_table_t *table = make_table();
    seq_info_t info;
    attn_seq_t a, b;
    (void)state;

    WORKS(table, seq_create(table, 3, 4, 1000, &a));
    WORKS(table, seq_create(table, 5, 0, 0, &b));
    assert_int_equal(a.id, (UINT64_C(1) << 32) | 0);
    assert_int_equal(b.id, (UINT64_C(1) << 32) | 1);
    WORKS(table, seq_describe(table, a, &info));
    assert_int_equal(info.cache, 3);
    assert_int_equal(info.client, 4);
    assert_int_equal(info.expected_tokens, 1000);
    assert_int_equal(info.n_chunks, 0);
    assert_int_equal(seq_count(table), 2);
    seq_table_destroy(table);
    seq_table_destroy(NULL);
}

static void
test_ids_that_are_not(void **state)
{
    seq_table_t *table       = make_table();
    attn_seq_t a             = make_seq(table, 1), b;
    const attn_seq_t wrong[] = {{0}, {1}, {a.id + 1}, {a.id + (UINT64_C(1) << 32)}, {UINT64_MAX}};
    seq_info_t info;
    uint64_t chunk;
    (void)state;

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        EXPECT(table, seq_describe(table, wrong[i], &info), ATTN_ERR_NOT_FOUND);
        EXPECT(table, seq_chunk_append(table, wrong[i], 0, &chunk), ATTN_ERR_NOT_FOUND);
        EXPECT(table, seq_fork(table, wrong[i], 0, 0, 1, &b, &chunk), ATTN_ERR_NOT_FOUND);
        EXPECT(table, seq_chunk_replace(table, wrong[i], 0, 9, NULL, NULL), ATTN_ERR_NOT_FOUND);
        EXPECT(table, seq_cut(table, wrong[i], 0, NULL, NULL), ATTN_ERR_NOT_FOUND);
        EXPECT(table, seq_free(table, wrong[i], NULL, NULL), ATTN_ERR_NOT_FOUND);
        assert_null(seq_chunk_at(table, wrong[i], 0));
    }
    WORKS(table, seq_free(table, a, NULL, NULL));
    EXPECT(table, seq_free(table, a, NULL, NULL), ATTN_ERR_NOT_FOUND);
    EXPECT(table, seq_describe(table, a, &info), ATTN_ERR_NOT_FOUND);
    WORKS(table, seq_create(table, 3, 4, 1000, &b)); /* the same slot */
    assert_int_equal((uint32_t)b.id, (uint32_t)a.id);
    assert_int_equal(b.id >> 32, 2);
    EXPECT(table, seq_describe(table, a, &info), ATTN_ERR_NOT_FOUND);
    assert_int_equal(seq_count(table), 1);
    seq_table_destroy(table);
}

static void
test_a_slot_ends_with_its_generations(void **state)
{
    seq_table_t *table = make_table();
    attn_seq_t a       = make_seq(table, 3), b;
    seq_info_t info;
    (void)state;

    table->slots[0].generation = UINT32_MAX;
    a.id |= UINT64_C(0xffffffff) << 32;
    WORKS(table, seq_describe(table, a, &info));
    WORKS(table, seq_free(table, a, NULL, NULL));
    EXPECT(table, seq_describe(table, a, &info), ATTN_ERR_NOT_FOUND);
    EXPECT(table, seq_describe(table, (attn_seq_t){0}, &info), ATTN_ERR_NOT_FOUND);
    WORKS(table, seq_create(table, 1, 0, 0, &b));
    assert_int_equal(b.id, (UINT64_C(1) << 32) | 1);
    seq_table_destroy(table);
}

static void
test_chunks_of_a_sequence(void **state)
{
    seq_table_t *table = make_table();
    attn_seq_t seq     = make_seq(table, 9);
    (void)state;

    for (uint32_t i = 0; i < 9; i++) {
        const seq_chunk_t *chunk = seq_chunk_at(table, seq, i);
        assert_int_equal(chunk->id, i + 1);
        assert_int_equal(chunk->worker, 10 + i);
        assert_int_equal(chunk->references, 1);
    }
    assert_null(seq_chunk_at(table, seq, 9));
    assert_int_equal(seq_chunk_count(table), 9);
    seq_table_destroy(table);
}

static void
test_fork_shares_records(void **state)
{
    seq_table_t *table = make_table();
    attn_seq_t seq     = make_seq(table, 5), fork, copy;
    seq_info_t info;
    uint64_t tail = 99;
    (void)state;

    EXPECT(table, seq_fork(table, seq, 8, 6, UINT32_MAX, &fork, NULL), ATTN_ERR_INVALID);
    WORKS(table, seq_fork(table, seq, 8, 4, 77, &fork, &tail));
    assert_int_equal(tail, 6);
    WORKS(table, seq_fork(table, fork, 9, 0, UINT32_MAX, &copy, NULL));
    WORKS(table, seq_describe(table, fork, &info));
    assert_int_equal(info.n_chunks, 5);
    assert_int_equal(info.cache, 3);
    assert_int_equal(info.client, 8);
    assert_int_equal(info.expected_tokens, 1000);
    assert_ptr_equal(seq_chunk_at(table, seq, 3), seq_chunk_at(table, fork, 3));
    assert_int_equal(seq_chunk_at(table, seq, 3)->references, 2);
    assert_int_equal(seq_chunk_at(table, seq, 4)->references, 1);
    assert_int_equal(seq_chunk_at(table, fork, 4)->worker, 77);
    assert_int_equal(seq_chunk_count(table), 6);
    seq_table_destroy(table);
}

static void
test_release_is_told_once_and_in_order(void **state)
{
    seq_table_t *table  = make_table();
    attn_seq_t seq      = make_seq(table, 5), fork;
    released_t released = {0};
    (void)state;

    WORKS(table, seq_fork(table, seq, 0, 3, UINT32_MAX, &fork, NULL));
    EXPECT(table, seq_cut(table, seq, 6, on_release, &released), ATTN_ERR_INVALID);
    WORKS(table, seq_cut(table, seq, 5, on_release, &released));
    assert_int_equal(released.n, 0);
    WORKS(table, seq_cut(table, seq, 2, on_release, &released));
    assert_int_equal(released.n, 2); /* the third is the fork's still */
    assert_int_equal(released.list[0].chunk, 4);
    assert_int_equal(released.list[0].worker, 13);
    assert_int_equal(released.list[1].chunk, 5);
    assert_int_equal(released.list[1].worker, 14);
    assert_int_equal(released.list[1].cache, 3);
    WORKS(table, seq_free(table, seq, on_release, &released));
    assert_int_equal(released.n, 2);
    WORKS(table, seq_free(table, fork, on_release, &released));
    assert_int_equal(released.n, 5);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(released.list[2 + i].chunk, i + 1);
    }
    assert_int_equal(seq_count(table), 0);
    assert_int_equal(seq_chunk_count(table), 0);
    seq_table_destroy(table);
}

static void
test_replace(void **state)
{
    seq_table_t *table  = make_table();
    attn_seq_t seq      = make_seq(table, 3), fork;
    released_t released = {0};
    uint64_t chunk      = 0;
    (void)state;

    WORKS(table, seq_fork(table, seq, 0, 3, UINT32_MAX, &fork, NULL));
    EXPECT(table, seq_chunk_replace(table, seq, 3, 9, on_release, &released), ATTN_ERR_INVALID);
    chunk = seq_chunk_id(table);
    WORKS(table, seq_chunk_replace(table, seq, 1, chunk, on_release, &released));
    assert_int_equal(released.n, 0);
    assert_int_equal(chunk, 4);
    assert_int_equal(seq_chunk_at(table, seq, 1)->id, 4);
    assert_int_equal(seq_chunk_at(table, seq, 1)->worker, 11);
    assert_int_equal(seq_chunk_at(table, fork, 1)->id, 2);
    assert_int_equal(seq_chunk_at(table, fork, 1)->references, 1);
    WORKS(table, seq_chunk_replace(table, fork, 1, seq_chunk_id(table), on_release, &released));
    assert_int_equal(released.n, 1);
    assert_int_equal(released.list[0].chunk, 2);
    assert_int_equal(released.list[0].worker, 11);
    seq_table_destroy(table);
}

static void
test_limits(void **state)
{
    seq_table_t *table = make_table();
    attn_seq_t seq     = make_seq(table, 0), fork;
    uint64_t chunk;
    (void)state;

    for (uint32_t i = 0; i < ATTN_SEQ_CHUNKS_MAX; i++) {
        assert_int_equal(seq_chunk_append(table, seq, 0, &chunk), ATTN_OK);
    }
    EXPECT(table, seq_chunk_append(table, seq, 0, &chunk), ATTN_ERR_TOO_LARGE);
    EXPECT(table, seq_fork(table, seq, 0, ATTN_SEQ_CHUNKS_MAX, 1, &fork, &chunk),
           ATTN_ERR_TOO_LARGE);
    WORKS(table, seq_fork(table, seq, 0, ATTN_SEQ_CHUNKS_MAX, UINT32_MAX, &fork, NULL));
    uint64_t bytes = seq_table_bytes(table);
    WORKS(table, seq_cut(table, seq, 3, NULL, NULL));
    assert_int_equal(seq_table_bytes(table), bytes - 4 * (ATTN_SEQ_CHUNKS_MAX - 3));
    assert_int_equal(seq_chunk_at(table, seq, 2)->id, 3);
    WORKS(table, seq_cut(table, seq, 2, NULL, NULL)); /* back into the sequence itself */
    assert_int_equal(seq_chunk_at(table, seq, 1)->id, 2);

    uint32_t n_seqs = table->n_seqs, n_records = table->n_records;
    table->n_seqs = ATTN_SEQUENCES_MAX;
    assert_int_equal(seq_create(table, 1, 0, 0, &fork), ATTN_ERR_EXHAUSTED);
    assert_int_equal(seq_fork(table, seq, 0, 1, 1, &fork, &chunk), ATTN_ERR_EXHAUSTED);
    table->n_seqs    = n_seqs;
    table->n_records = ATTN_SEQ_ALL_CHUNKS_MAX;
    assert_int_equal(seq_chunk_append(table, seq, 1, &chunk), ATTN_ERR_EXHAUSTED);
    assert_int_equal(seq_chunk_replace(table, seq, 1, 9, NULL, NULL), ATTN_ERR_EXHAUSTED);
    assert_int_equal(seq_fork(table, seq, 0, 1, 1, &fork, &chunk), ATTN_ERR_EXHAUSTED);
    table->n_records = n_records;
    assert_int_equal(seq_table_check(table), ATTN_OK);
    seq_table_destroy(table);
}

static void
test_a_million_sequences(void **state)
{
    enum { N = 1000000 };
    seq_table_t *table = make_table();
    attn_seq_t seq     = {0};
    uint64_t chunk;
    (void)state;

    uint64_t empty = seq_table_bytes(table);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(seq_create(table, 1, 0, 0, &seq), ATTN_OK);
        assert_int_equal(seq_chunk_append(table, seq, i % 8, &chunk), ATTN_OK);
    }
    uint64_t one = seq_table_bytes(table) - empty;
    print_message("1M sequences of one chunk: %.1f bytes each\n", (double)one / N);
    assert_true(one <= 84ull * N); /* 40 + 16, and room for half as many again */
    assert_int_equal(seq_table_check(table), ATTN_OK);

    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(seq_chunk_append(table, seq, i % 8, &chunk), ATTN_OK);
    }
    uint64_t more = seq_table_bytes(table) - empty - one;
    print_message("1M further chunks of one sequence: %.1f bytes each\n", (double)more / N);
    assert_true(more <= 24ull * N);
    assert_int_equal(seq_table_check(table), ATTN_OK);
    assert_int_equal(seq_count(table), N);
    assert_int_equal(seq_chunk_count(table), 2 * N);
    seq_table_destroy(table);
}

/* ---- the check itself ---- */

static void
test_check_sees_damage(void **state)
{
    seq_table_t *table = make_table();
    attn_seq_t a = make_seq(table, 3), b = make_seq(table, 4);
    (void)state;

    WORKS(table, seq_cut(table, b, 2, NULL, NULL));
    WORKS(table, seq_free(table, a, NULL, NULL));
    seq_table_t saved  = *table;
    seq_chunk_t *chunk = &table->chunks[seq_list(&table->slots[1])[0]]; /* of b */

#define DAMAGE(place, value)                                                                       \
    do {                                                                                           \
        __typeof__(place) was_ = (place);                                                          \
        (place)                = (value);                                                          \
        assert_int_equal(seq_table_check(table), ATTN_ERR_INTERNAL);                               \
        (place) = was_;                                                                            \
        assert_int_equal(seq_table_check(table), ATTN_OK);                                         \
    } while (0)
    for (uint32_t references = 0; references < 3; references += 2) {
        chunk->references = references & 3; /* a field of bits has no type for DAMAGE */
        assert_int_equal(seq_table_check(table), ATTN_ERR_INTERNAL);
        chunk->references = 1;
        assert_int_equal(seq_table_check(table), ATTN_OK);
    }
    DAMAGE(chunk->id, 0);
    DAMAGE(chunk->id, chunk[1].id);
    DAMAGE(chunk->id, table->next_chunk_id);
    DAMAGE(table->n_seqs, 2);
    DAMAGE(table->n_chunks, 1);
    DAMAGE(table->free_slot, SEQ_NONE);
    DAMAGE(table->free_slot, 1);
    DAMAGE(table->free_record, SEQ_NONE);
    DAMAGE(table->list_bytes, 4);
    DAMAGE(table->slots[1].n_chunks, 1000);
    DAMAGE(seq_list(&table->slots[1])[1], 1000);
#undef DAMAGE
    assert_memory_equal(&saved, table, sizeof(saved));
    seq_table_destroy(table);
}

/* Two tables with different seeds give out different ids, and know none of the other's. */
static void
test_ids_follow_from_the_seed(void **state)
{
    seq_table_t *one, *other;
    attn_seq_t a, b;
    uint64_t chunk_a, chunk_b;
    seq_info_t info;

    (void)state;
    assert_int_equal(seq_table_create(1, &one), ATTN_OK);
    assert_int_equal(seq_table_create(2, &other), ATTN_OK);
    assert_int_equal(seq_create(one, 1, 0, 0, &a), ATTN_OK);
    assert_int_equal(seq_create(other, 1, 0, 0, &b), ATTN_OK);
    assert_int_equal(seq_chunk_append(one, a, 1, &chunk_a), ATTN_OK);
    assert_int_equal(seq_chunk_append(other, b, 1, &chunk_b), ATTN_OK);
    assert_int_not_equal(a.id, b.id);
    assert_int_not_equal(chunk_a, chunk_b);
    assert_int_equal(seq_describe(other, a, &info), ATTN_ERR_NOT_FOUND);
    assert_int_equal(seq_free(one, a, NULL, NULL), ATTN_OK);
    assert_int_equal(seq_describe(one, a, &info), ATTN_ERR_NOT_FOUND);
    assert_int_equal(seq_table_check(one), ATTN_OK);
    assert_int_equal(seq_first_id(0, 1, 62), 0);
    assert_in_range(seq_first_id(7, 2, 31), 0, (1u << 31) - 1);
    seq_table_destroy(one);
    seq_table_destroy(other);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ids_follow_from_the_seed),
        cmocka_unit_test(test_create_and_describe),
        cmocka_unit_test(test_ids_that_are_not),
        cmocka_unit_test(test_a_slot_ends_with_its_generations),
        cmocka_unit_test(test_chunks_of_a_sequence),
        cmocka_unit_test(test_fork_shares_records),
        cmocka_unit_test(test_release_is_told_once_and_in_order),
        cmocka_unit_test(test_replace),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_a_million_sequences),
        cmocka_unit_test(test_check_sees_damage),
    };
    return cmocka_run_group_tests_name("kvstore.sequence", tests, NULL, NULL);
}
