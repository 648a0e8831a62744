/*
 * Out of memory: each call is repeated with the first, second, ... allocation failing,
 * until it works. Until then it must say so and leave everything as it was. The linker
 * sends the library's allocations here (--wrap).
 */
#include "kvstore/sequence.h"
#include "kvstore/test_store.h"

#include <stdlib.h>
#include <string.h>

static long fail_in = -1; /* the allocation that fails, counted down; below 0: none */

static bool
fails_now(void)
{
    return fail_in >= 0 && fail_in-- == 0;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t item);
void *__real_realloc(void *at, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t item);
void *__wrap_realloc(void *at, size_t n);

void *
__wrap_malloc(size_t n)
{
    return fails_now() ? NULL : __real_malloc(n);
}

void *
__wrap_calloc(size_t n, size_t item)
{
    return fails_now() ? NULL : __real_calloc(n, item);
}

void *
__wrap_realloc(void *at, size_t n)
{
    return fails_now() ? NULL : __real_realloc(at, n);
}

/* Run `call` with ever later failures; `sound` is evaluated after each. n_p: how many failed. */
#define SWEEP(call, sound, n_p)                                                                    \
    do {                                                                                           \
        attn_status_t swept_ = ATTN_ERR_NO_MEMORY;                                                 \
        for (long nth_ = 0; swept_ == ATTN_ERR_NO_MEMORY; nth_++) {                                \
            fail_in = nth_;                                                                        \
            swept_  = (call);                                                                      \
            fail_in = -1;                                                                          \
            *(n_p)  = nth_;                                                                        \
            assert_true(sound);                                                                    \
        }                                                                                          \
        if (swept_ != ATTN_OK) {                                                                   \
            print_error("%s: %s\n", #call, attn_last_error());                                     \
        }                                                                                          \
        assert_int_equal(swept_, ATTN_OK);                                                         \
    } while (0)

/* ---- the store ---- */

static bool
store_is(const kv_store_t *store, uint32_t n_chunks, uint32_t n_free)
{
    kv_region_info_t info;
    return kv_store_check(store) == ATTN_OK && kv_region_describe(store, CACHE, &info) == ATTN_OK &&
           info.chunks == n_chunks && info.free_pages == n_free;
}

static void
test_store_and_regions(void **state)
{
    kv_store_t *store = NULL;
    kv_region_info_t info;
    long n;
    (void)state;

    SWEEP(kv_store_create(1 << 20, &store), true, &n);
    assert_int_equal(n, 1);
    SWEEP(kv_region_open(store, 1, 4096, 4, 16, 16 * 4096, &info), kv_store_check(store) == ATTN_OK,
          &n);
    assert_true(n >= 4);
    SWEEP(kv_region_open(store, 2, 4096, 4, 16, 16 * 4096, &info), kv_store_check(store) == ATTN_OK,
          &n);
    assert_int_equal(info.offset, 16 * 4096);
    fail_in = 0;
    assert_int_equal(kv_store_check(store), ATTN_ERR_NO_MEMORY);
    fail_in = -1;
    kv_store_destroy(store);
}

static void
test_forks(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    long n, most = 0;
    (void)state;

    grow_chunk(store, 1, 9);
    /* Many, so that the table of chunks grows on the way. */
    for (uint64_t to = 2; to < 800; to++) {
        kv_chunk_info_t info;
        SWEEP(kv_chunk_fork(store, CACHE, 1, 9, to),
              store_is(store,
                       (uint32_t)to - (kv_chunk_describe(store, CACHE, to, &info) != ATTN_OK), 5),
              &n);
        assert_true(n >= 2);
        most = n > most ? n : most;
    }
    assert_int_equal(most, 3);
    uint32_t pages[9], offsets[9], held;
    kv_read_t *read;
    SWEEP(kv_read_begin(store, CACHE, 1, 1, 0, 9, pages, offsets, &held, &read),
          kv_store_check(store) == ATTN_OK, &n);
    assert_int_equal(n, 1);
    kv_read_end(read);
    kv_store_destroy(store);
}

static void
test_begin(void **state)
{
    enum { ENTRIES = 400 };
    kv_store_t *store           = store_with_cache(4, 16, 2000);
    kv_step_chunk_t(*chunks)[2] = calloc(ENTRIES, sizeof(*chunks));
    kv_step_entry_t *entries    = calloc(ENTRIES, sizeof(*entries));
    kv_step_t *step             = NULL;
    long n;
    (void)state;

    /* Each entry: a chunk with a shared tail to be appended to, and a new one. */
    grow_chunk(store, 1, 9);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        WORKS(store, kv_chunk_fork(store, CACHE, 1, 9, 1000 + i));
        chunks[i][0] = (kv_step_chunk_t){1000 + i, 1, 9, 7, 0};
        chunks[i][1] = (kv_step_chunk_t){2000 + i, 0, 0, 5, 1};
        entries[i]   = (kv_step_entry_t){(i * 7) % ENTRIES, 2, chunks[i], i % 3};
    }
    SWEEP(kv_step_begin(store, CACHE, 1, entries, ENTRIES, &step),
          step != NULL || (store_is(store, ENTRIES + 1, 1997) && kv_step_find(store, 1) == NULL &&
                           !kv_seq_in_step(store, CACHE, 0) && !kv_seq_in_step(store, CACHE, 7)),
          &n);
    assert_true(n > 2 * ENTRIES);
    assert_int_equal(kv_store_check(store), ATTN_OK);

    fail_in = 0; /* ending a step needs no memory */
    assert_int_equal(kv_step_commit(store, step, NULL), ATTN_OK);
    fail_in = -1;
    assert_true(store_is(store, 2 * ENTRIES + 1, 1997 - 4 * ENTRIES));
    kv_store_destroy(store);
    free(entries);
    free(chunks);
}

static void
test_many_steps(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 2000);
    kv_step_t *step;
    long n;
    (void)state;

    for (uint64_t id = 1; id <= 500; id++) {
        SWEEP(begin_one(store, id, id, id, 1, &step), kv_store_check(store) == ATTN_OK, &n);
        assert_true(n >= 3);
    }
    assert_true(store_is(store, 500, 1500));
    fail_in = 0;
    for (uint64_t id = 1; id <= 500; id++) {
        kv_step_abort(store, kv_step_find(store, id));
    }
    fail_in = -1;
    assert_true(store_is(store, 0, 2000));
    kv_store_destroy(store);
}

/* ---- sequences ---- */

static bool
table_is(const seq_table_t *table, uint64_t n_seqs, uint64_t n_chunks)
{
    return seq_table_check(table) == ATTN_OK && seq_count(table) == n_seqs &&
           seq_chunk_count(table) == n_chunks;
}

static void
test_sequences(void **state)
{
    seq_table_t *table = NULL;
    attn_seq_t seq     = {0}, fork;
    uint64_t chunk, tail;
    long n, total = 0;
    (void)state;

    SWEEP(seq_table_create(0, &table), true, &n);
    SWEEP(seq_create(table, 1, 0, 0, &seq), seq.id != 0 || table_is(table, 0, 0), &n);
    assert_int_equal(n, 1);
    for (uint32_t i = 0; i < 100; i++) {
        chunk = 0;
        SWEEP(seq_chunk_append(table, seq, 0, &chunk), table_is(table, 1, i + (chunk != 0)), &n);
        total += n;
    }
    assert_in_range(total, 4, 40);
    for (uint32_t i = 0; i < 100; i++) {
        fork.id = 0;
        SWEEP(seq_fork(table, seq, 0, 50, 3, &fork, &tail),
              table_is(table, i + 1 + (fork.id != 0), 100 + i + (fork.id != 0)), &n);
        assert_true(n >= 1);
        chunk = seq_chunk_id(table);
        SWEEP(seq_chunk_replace(table, fork, 7, chunk, NULL, NULL),
              table_is(table, i + 2, 101 + i + (seq_chunk_at(table, fork, 7)->id == chunk)), &n);
        assert_int_equal(seq_cut(table, fork, 8, NULL, NULL), ATTN_OK); /* keeps its own one */
    }
    fail_in = 0;
    assert_int_equal(seq_table_check(table), ATTN_ERR_NO_MEMORY);
    fail_in = 0; /* a list that cannot be made smaller stays as it is */
    assert_int_equal(seq_cut(table, seq, 10, NULL, NULL), ATTN_OK);
    assert_int_equal(fail_in, -1);
    assert_int_equal(seq_table_check(table), ATTN_OK);
    seq_table_destroy(table);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_store_and_regions),
        cmocka_unit_test(test_forks),
        cmocka_unit_test(test_begin),
        cmocka_unit_test(test_many_steps),
        cmocka_unit_test(test_sequences),
    };
    return cmocka_run_group_tests_name("kvstore.kvstore_memory", tests, NULL, NULL);
}
