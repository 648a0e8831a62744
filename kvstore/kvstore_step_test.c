/* Steps: begin's refusals, copy on write, partial commits, aborts. */
#include "kvstore/test_store.h"

#include <stdlib.h>
#include <string.h>

static attn_status_t
begin(kv_store_t *store, uint64_t step_id, const kv_step_entry_t *entries, uint32_t n,
      kv_step_t **step)
{
    return kv_step_begin(store, CACHE, step_id, entries, n, step);
}

/* The refusal leaves pages, step_p and step table as they were. */
static void
expect_refused(kv_store_t *store, const kv_step_entry_t *entries, uint32_t n, attn_status_t status,
               const char *names)
{
    kv_step_t *step = (kv_step_t *)&step, *untouched = step;
    uint32_t had = free_pages(store);

    EXPECT(store, begin(store, 99, entries, n, &step), status);
    if (strstr(attn_last_error(), names) == NULL) {
        print_error("\"%s\" does not name \"%s\"\n", attn_last_error(), names);
    }
    assert_non_null(strstr(attn_last_error(), names));
    assert_ptr_equal(step, untouched);
    assert_null(kv_step_find(store, 99));
    assert_int_equal(free_pages(store), had);
}

static void
expect_one_refused(kv_store_t *store, kv_step_chunk_t named, attn_status_t status,
                   const char *names)
{
    const kv_step_entry_t entry = {.seq = 99, .n_chunks = 1, .chunks = &named};
    expect_refused(store, &entry, 1, status, names);
}

static uint32_t
page_of(const kv_step_t *step, uint32_t entry, uint32_t chunk, uint32_t i)
{
    uint32_t n;
    const uint32_t *pages = kv_step_pages(step, entry, chunk, &n);
    assert_true(i < n);
    return pages[i];
}

static uint32_t
n_pages_of(const kv_step_t *step, uint32_t entry, uint32_t chunk)
{
    uint32_t n            = 12345;
    const uint32_t *pages = kv_step_pages(step, entry, chunk, &n);
    assert_true((pages == NULL) == (n == 0));
    return n;
}

/* ---- begin ---- */

static void
test_begin_of_one_new_chunk(void **state)
{
    kv_store_t *store = store_with_cache(3, 8, 9);
    kv_step_t *step;
    uint32_t n;
    (void)state;

    WORKS(store, begin_one(store, 5, 50, 1, 7, &step));
    assert_ptr_equal(kv_step_find(store, 5), step);
    assert_true(kv_seq_in_step(store, CACHE, 50));
    assert_false(kv_seq_in_step(store, CACHE, 51));
    assert_int_equal(n_pages_of(step, 0, 0), 3);
    assert_null(kv_step_copies(step, &n));
    assert_int_equal(n, 0);
    assert_int_equal(free_pages(store), 6);
    assert_chunk(store, 1, 0, 0, 0); /* nothing visible yet */
    assert_true(chunk_info(store, 1).in_step);
    EXPECT(store, kv_chunk_release(store, CACHE, 1), ATTN_ERR_BUSY);
    EXPECT(store, kv_chunk_truncate(store, CACHE, 1, 0, 0, NULL), ATTN_ERR_BUSY);
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 0, 2), ATTN_ERR_NOT_FOUND);

    WORKS(store, kv_step_commit(store, step, NULL));
    assert_null(kv_step_find(store, 5));
    assert_false(kv_seq_in_step(store, CACHE, 50));
    assert_chunk(store, 1, 1, 7, 3);
    assert_false(chunk_info(store, 1).in_step);
    WORKS(store, kv_chunk_release(store, CACHE, 1));
    kv_store_destroy(store);
}

static void
test_begin_of_sequences_without_chunks(void **state)
{
    kv_store_t *store               = store_with_cache(4, 16, 8);
    const kv_step_entry_t entries[] = {{.seq = 3}, {.seq = 1}, {.seq = 2}};
    const kv_step_entry_t twice[]   = {{.seq = 4}, {.seq = 5}, {.seq = 4}};
    const uint32_t accepted[] = {0, 0, 0}, too_many[] = {0, 1, 0};
    kv_step_t *step, *other;
    (void)state;

    WORKS(store, begin(store, 1, entries, 3, &step));
    expect_refused(store, &entries[1], 1, ATTN_ERR_BUSY, "sequence 1");
    expect_refused(store, twice, 3, ATTN_ERR_INVALID, "sequence 4");
    WORKS(store, begin(store, 2, twice, 2, &other));
    EXPECT(store, kv_step_commit(store, step, too_many), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "entry 1"));
    WORKS(store, kv_step_commit(store, step, accepted));
    kv_step_abort(store, other);
    WORKS(store, begin(store, 1, NULL, 0, &step));
    WORKS(store, kv_step_commit(store, step, NULL));
    kv_store_destroy(store);
}

static void
test_begin_refuses_ids_and_sizes(void **state)
{
    kv_store_t *store                = store_with_cache(4, 16, 8);
    kv_step_entry_t *many            = calloc(ATTN_KV_ENTRIES_MAX + 1, sizeof(*many));
    const kv_step_chunk_t down[]     = {{.chunk = 1, .number = 4}, {.chunk = 2, .number = 4}};
    const kv_step_entry_t descending = {.seq = 1, .n_chunks = 2, .chunks = down};
    kv_step_t *step, *open;
    (void)state;

    for (uint32_t i = 0; i <= ATTN_KV_ENTRIES_MAX; i++) {
        many[i].seq = i;
    }
    expect_refused(store, many, ATTN_KV_ENTRIES_MAX + 1, ATTN_ERR_INVALID, "4097");
    WORKS(store, begin(store, 1, many, ATTN_KV_ENTRIES_MAX, &open));
    EXPECT(store, begin(store, 1, many, 0, &step), ATTN_ERR_EXISTS);
    EXPECT(store, begin(store, 0, many, 0, &step), ATTN_ERR_INVALID);
    EXPECT(store, kv_step_begin(store, 8, 2, many, 0, &step), ATTN_ERR_NOT_FOUND);
    kv_step_abort(store, open);
    many[0].n_chunks = ATTN_KV_STEP_CHUNKS_MAX;
    many[1].n_chunks = 1;
    expect_refused(store, many, 2, ATTN_ERR_INVALID, "1048577");
    expect_refused(store, &descending, 1, ATTN_ERR_INVALID, "4 comes after 4");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 1, .n_new = 17}, ATTN_ERR_INVALID,
                       "chunk_size 16");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 1, .n_new = UINT32_MAX}, ATTN_ERR_INVALID,
                       "chunk 1");
    free(many);
    kv_store_destroy(store);
}

static void
test_begin_refuses_another_truth(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    (void)state;

    grow_chunk(store, 1, 5);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 1, 4, NULL));
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 1, .generation = 1, .length = 4},
                       ATTN_ERR_STALE, "generation 2, length 4, the caller believes generation 1");
    expect_one_refused(store,
                       (kv_step_chunk_t){.chunk = 1, .generation = 2, .length = 5, .n_new = 1},
                       ATTN_ERR_STALE, "length 5");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 1, .n_new = 1}, ATTN_ERR_STALE,
                       "generation 0");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 1}, ATTN_ERR_STALE, "chunk 1");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 2, .generation = 1}, ATTN_ERR_NOT_FOUND,
                       "chunk 2");
    expect_one_refused(store, (kv_step_chunk_t){.chunk = 2, .length = 3}, ATTN_ERR_STALE,
                       "length 3");
    kv_store_destroy(store);
}

static void
test_begin_refuses_a_chunk_twice(void **state)
{
    kv_store_t *store         = store_with_cache(4, 16, 8);
    kv_step_chunk_t a[]       = {{1, 1, 5, 0, 0}, {2, 0, 0, 0, 1}, {1, 1, 5, 0, 2}};
    kv_step_chunk_t b[]       = {{1, 1, 5, 0, 0}, {2, 0, 0, 0, 1}};
    kv_step_entry_t entries[] = {{1, 2, a, 0}, {2, 2, b, 0}};
    kv_step_t *step;
    (void)state;

    grow_chunk(store, 1, 5);
    WORKS(store, begin(store, 1, entries, 2, &step)); /* read by two entries */
    assert_int_equal(n_pages_of(step, 0, 0), 2);
    assert_int_equal(n_pages_of(step, 0, 1), 0);
    assert_int_equal(page_of(step, 0, 0, 1), page_of(step, 1, 0, 1));
    kv_step_abort(store, step);

    entries[0].n_chunks = 3;
    expect_refused(store, entries, 1, ATTN_ERR_INVALID, "chunk 1 is named twice");
    entries[0].n_chunks = 2;
    a[0].n_new          = 1;
    expect_refused(store, entries, 2, ATTN_ERR_INVALID, "chunk 1 is named twice");
    a[0].n_new = 0;
    b[0].n_new = 1;
    expect_refused(store, entries, 2, ATTN_ERR_INVALID, "chunk 1 is named twice");
    b[0].n_new = 0;
    a[1].n_new = 1;
    expect_refused(store, entries, 2, ATTN_ERR_INVALID, "chunk 2 is named twice");
    b[1].n_new = 1;
    a[1].n_new = 0;
    expect_refused(store, entries, 2, ATTN_ERR_INVALID, "chunk 2 is named twice");
    b[0] = b[1] = (kv_step_chunk_t){2, 0, 0, 0, 0};
    b[1].number = 1;
    expect_refused(store, entries, 2, ATTN_ERR_INVALID, "chunk 2 is named twice");
    kv_store_destroy(store);
}

static void
test_begin_busy(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_step_t *reader, *second, *writer, *maker;
    (void)state;

    grow_chunk(store, 1, 5);
    grow_chunk(store, 2, 5);
    WORKS(store, begin_one(store, 1, 11, 1, 0, &reader));
    WORKS(store, begin_one(store, 2, 12, 1, 0, &second)); /* shared prefix */
    expect_one_refused(store, (kv_step_chunk_t){1, 1, 5, 1, 0}, ATTN_ERR_BUSY, "chunk 1");
    WORKS(store, begin_one(store, 3, 13, 2, 1, &writer));
    expect_one_refused(store, (kv_step_chunk_t){2, 1, 5, 1, 0}, ATTN_ERR_BUSY, "chunk 2");
    expect_one_refused(store, (kv_step_chunk_t){2, 1, 5, 0, 0}, ATTN_ERR_BUSY, "chunk 2");
    WORKS(store, begin_one(store, 4, 14, 3, 1, &maker));
    expect_one_refused(store, (kv_step_chunk_t){3, 0, 0, 1, 0}, ATTN_ERR_BUSY, "chunk 3");
    expect_one_refused(store, (kv_step_chunk_t){3, 0, 0, 0, 0}, ATTN_ERR_BUSY, "chunk 3");
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 5, 3), ATTN_ERR_EXISTS);
    for (uint64_t chunk = 1; chunk <= 2; chunk++) {
        EXPECT(store, kv_chunk_truncate(store, CACHE, chunk, 1, 0, NULL), ATTN_ERR_BUSY);
        EXPECT(store, kv_chunk_release(store, CACHE, chunk), ATTN_ERR_BUSY);
    }
    kv_step_abort(store, reader);
    EXPECT(store, kv_chunk_release(store, CACHE, 1), ATTN_ERR_BUSY);
    WORKS(store, kv_step_commit(store, second, NULL));
    WORKS(store, kv_chunk_release(store, CACHE, 1));
    WORKS(store, kv_step_commit(store, writer, NULL));
    WORKS(store, kv_step_commit(store, maker, NULL));
    kv_store_destroy(store);
}

static void
test_begin_is_all_or_nothing(void **state)
{
    kv_store_t *store               = store_with_cache(4, 16, 8);
    kv_step_chunk_t a[]             = {{1, 1, 5, 3, 0}, {10, 0, 0, 16, 1}};
    kv_step_chunk_t b[]             = {{2, 1, 5, 4, 0}};
    const kv_step_entry_t entries[] = {{1, 2, a, 0}, {2, 1, b, 0}};
    kv_step_t *step;
    (void)state;

    grow_chunk(store, 1, 5);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 5, 2));
    assert_int_equal(free_pages(store), 6);
    /* two copies, four pages, one page */
    expect_refused(store, entries, 2, ATTN_ERR_EXHAUSTED, "needs 7 pages");
    assert_int_equal(chunk_info(store, 1).in_step, false);
    kv_chunk_info_t info;
    assert_int_equal(kv_chunk_describe(store, CACHE, 10, &info), ATTN_ERR_NOT_FOUND);
    b[0].n_new = 3;
    WORKS(store, begin(store, 1, entries, 2, &step)); /* exactly all */
    assert_int_equal(free_pages(store), 0);
    kv_step_abort(store, step);
    assert_int_equal(free_pages(store), 6);
    b[0].generation = 9; /* the last check refuses: what came before it is untouched */
    expect_refused(store, entries, 2, ATTN_ERR_STALE, "chunk 2");
    kv_store_destroy(store);
}

static void
test_steps_have_a_most(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_step_t *step;
    (void)state;

    for (uint64_t id = 1; id <= ATTN_KV_STEPS_MAX; id++) {
        assert_int_equal(begin(store, id, NULL, 0, &step), ATTN_OK);
    }
    EXPECT(store, begin(store, 5000, NULL, 0, &step), ATTN_ERR_EXHAUSTED);
    kv_step_abort(store, kv_step_find(store, 17));
    WORKS(store, begin(store, 5000, NULL, 0, &step));
    kv_store_destroy(store); /* with the steps open */
}

/* ---- commit and abort ---- */

static void
test_commit_fills_the_first_chunk_first(void **state)
{
    kv_store_t *store           = store_with_cache(4, 8, 12);
    const kv_step_chunk_t a[]   = {{1, 1, 6, 2, 0}, {2, 0, 0, 8, 1}, {3, 0, 0, 5, 2}};
    const kv_step_entry_t entry = {1, 3, a, 0};
    const struct {
        uint32_t accepted, lengths[3], free_pages;
    } cases[] = {{0, {6, 0, 0}, 10}, {1, {7, 0, 0}, 10}, {2, {8, 0, 0}, 10}, {3, {8, 1, 0}, 9},
                 {7, {8, 5, 0}, 8},  {10, {8, 8, 0}, 8}, {11, {8, 8, 1}, 7}, {15, {8, 8, 5}, 6}};
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        kv_step_t *step;
        const uint32_t too_many = 16;
        kv_chunk_info_t info;

        grow_chunk(store, 1, 6);
        WORKS(store, begin(store, 1, &entry, 1, &step));
        assert_int_equal(free_pages(store), 6);
        EXPECT(store, kv_step_commit(store, step, &too_many), ATTN_ERR_INVALID);
        assert_ptr_equal(kv_step_find(store, 1), step);
        WORKS(store, kv_step_commit(store, step, &cases[i].accepted));
        assert_int_equal(free_pages(store), cases[i].free_pages);
        for (uint32_t c = 0; c < 3; c++) {
            attn_status_t status = kv_chunk_describe(store, CACHE, c + 1, &info);
            assert_int_equal(status, cases[i].lengths[c] > 0 ? ATTN_OK : ATTN_ERR_NOT_FOUND);
            if (status == ATTN_OK) {
                assert_int_equal(info.length, cases[i].lengths[c]);
                assert_int_equal(info.generation, 1);
                WORKS(store, kv_chunk_release(store, CACHE, c + 1));
            }
        }
        assert_int_equal(free_pages(store), 12);
    }
    kv_store_destroy(store);
}

static void
test_abort_undoes(void **state)
{
    kv_store_t *store           = store_with_cache(4, 8, 12);
    const kv_step_chunk_t a[]   = {{1, 1, 6, 2, 0}, {2, 0, 0, 8, 1}};
    const kv_step_entry_t entry = {1, 2, a, 0};
    kv_chunk_info_t info;
    kv_step_t *step;
    (void)state;

    grow_chunk(store, 1, 6);
    WORKS(store, begin(store, 1, &entry, 1, &step));
    kv_step_abort(store, step);
    assert_int_equal(kv_store_check(store), ATTN_OK);
    assert_null(kv_step_find(store, 1));
    assert_int_equal(free_pages(store), 10);
    assert_chunk(store, 1, 1, 6, 2);
    assert_int_equal(kv_chunk_describe(store, CACHE, 2, &info), ATTN_ERR_NOT_FOUND);
    kv_store_destroy(store);
}

/* Spare pages are the step's own, count against what is free, and go back with it. */
static void
test_spare_pages_go_with_their_step(void **state)
{
    kv_store_t *store         = store_with_cache(4, 8, 12);
    const kv_step_chunk_t a[] = {{1, 0, 0, 8, 0}};
    kv_step_entry_t entries[] = {{1, 1, a, 9}, {2, 0, NULL, 4}};
    uint32_t n;
    kv_step_t *step;
    (void)state;

    for (uint32_t commit = 0; commit < 2; commit++) {
        WORKS(store, begin(store, 1, entries, 2, &step));
        assert_int_equal(free_pages(store), 12 - 2 - 3 - 1);
        assert_non_null(kv_step_spares(step, 0, &n));
        assert_int_equal(n, 3);
        assert_ptr_equal(kv_step_spares(step, 1, &n), kv_step_spares(step, 0, &n) + 3);
        EXPECT(store, kv_region_close(store, CACHE), ATTN_ERR_BUSY);
        if (commit) {
            WORKS(store, kv_step_commit(store, step, NULL));
        } else {
            kv_step_abort(store, step);
        }
        assert_int_equal(kv_store_check(store), ATTN_OK);
        assert_int_equal(free_pages(store), commit ? 10 : 12);
    }
    entries[1].n_spare = 4 * 11; /* 10 are free */
    EXPECT(store, begin(store, 1, entries + 1, 1, &step), ATTN_ERR_EXHAUSTED);
    entries[1].n_spare = ATTN_KV_SPARE_MAX + 1;
    EXPECT(store, begin(store, 1, entries + 1, 1, &step), ATTN_ERR_INVALID);
    assert_int_equal(free_pages(store), 10);
    entries[0].n_chunks = 0;
    entries[1].n_spare  = 4;
    WORKS(store, begin(store, 1, entries, 2, &step));
    kv_store_destroy(store); /* an open step goes with its store, and its spares with it */
}

/* ---- copy on write ---- */

static void
test_shared_tail_is_copied_and_swapped_in(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 12);
    const uint32_t none = 0, one = 1;
    const uint32_t *accepted[] = {NULL, &none, &one};
    uint32_t n;
    (void)state;

    for (size_t i = 0; i < 3; i++) {
        kv_step_t *step;
        grow_chunk(store, 1, 6);
        WORKS(store, begin_one(store, 9, 9, 1, 0, &step));
        uint32_t tail = page_of(step, 0, 0, 1);
        kv_step_abort(store, step);
        WORKS(store, kv_chunk_fork(store, CACHE, 1, 5, 2));

        WORKS(store, begin_one(store, 1, 1, 2, 4, &step));
        const kv_copy_t *copies = kv_step_copies(step, &n);
        assert_int_equal(n, 1);
        assert_int_equal(copies[0].from, tail);
        assert_int_equal(copies[0].tokens, 1);
        assert_int_not_equal(copies[0].to, tail);
        assert_int_equal(page_of(step, 0, 0, 1), copies[0].to);
        assert_int_equal(n_pages_of(step, 0, 0), 3);
        assert_int_equal(free_pages(store), 8);
        WORKS(store, kv_step_commit(store, step, accepted[i]));
        /* nothing accepted: the shared page stays; one token: no third page */
        assert_int_equal(free_pages(store), i == 0 ? 8 : i == 1 ? 10 : 9);

        WORKS(store, kv_chunk_release(store, CACHE, 1));
        WORKS(store, kv_chunk_release(store, CACHE, 2));
        assert_int_equal(free_pages(store), 12);
    }
    kv_store_destroy(store);
}

static void
test_no_copy_where_the_tail_is_full_or_alone(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 12);
    kv_step_t *step;
    uint32_t n;
    (void)state;

    grow_chunk(store, 1, 8);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 8, 2)); /* all pages full */
    WORKS(store, begin_one(store, 1, 1, 2, 1, &step));
    assert_null(kv_step_copies(step, &n));
    WORKS(store, kv_step_commit(store, step, NULL));
    WORKS(store, begin_one(store, 1, 1, 2, 1, &step)); /* unfilled, its own */
    assert_null(kv_step_copies(step, &n));
    WORKS(store, kv_step_commit(store, step, NULL));
    WORKS(store, kv_chunk_fork(store, CACHE, 2, 9, 3));
    WORKS(store, begin_one(store, 1, 1, 2, 0, &step)); /* shared, but only read */
    assert_null(kv_step_copies(step, &n));
    kv_step_abort(store, step);
    WORKS(store, kv_chunk_release(store, CACHE, 3));
    WORKS(store, begin_one(store, 1, 1, 2, 1, &step)); /* its own again */
    assert_null(kv_step_copies(step, &n));
    kv_step_abort(store, step);
    kv_store_destroy(store);
}

static void
test_both_sides_append_at_once(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 12);
    kv_step_chunk_t a = {1, 1, 6, 1, 0}, b = {2, 1, 6, 1, 0};
    const kv_step_entry_t both[] = {{1, 1, &a, 0}, {2, 1, &b, 0}};
    kv_step_t *step, *other;
    uint32_t n;
    (void)state;

    /* in one step */
    grow_chunk(store, 1, 6);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 6, 2));
    WORKS(store, begin(store, 1, both, 2, &step));
    assert_int_not_equal(page_of(step, 0, 0, 1), page_of(step, 1, 0, 1));
    assert_int_equal(page_of(step, 0, 0, 0), page_of(step, 1, 0, 0));
    (void)kv_step_copies(step, &n);
    assert_int_equal(n, 2);
    WORKS(store, kv_step_commit(store, step, NULL));
    assert_int_equal(free_pages(store), 9); /* the page both copied is gone */

    /* in two steps, the first of them aborted after the second committed */
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 7, 3));
    WORKS(store, begin_one(store, 1, 1, 1, 1, &step));
    WORKS(store, begin_one(store, 2, 2, 3, 1, &other));
    assert_int_not_equal(page_of(step, 0, 0, 1), page_of(other, 0, 0, 1));
    WORKS(store, kv_step_commit(store, other, NULL));
    kv_step_abort(store, step);
    assert_int_equal(kv_store_check(store), ATTN_OK);
    assert_int_equal(free_pages(store), 8);
    kv_store_destroy(store);
}

static void
test_fork_during_a_step_has_the_committed_state(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 12);
    kv_step_t *step, *reader;
    uint32_t n;
    (void)state;

    grow_chunk(store, 1, 6);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 6, 2));
    WORKS(store, begin_one(store, 1, 1, 1, 6, &step)); /* with a copy of the tail */
    uint32_t committed = kv_step_copies(step, &n)->from;
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 7, 3), ATTN_ERR_INVALID);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 6, 3));
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 4, 4));
    WORKS(store, begin_one(store, 2, 2, 3, 0, &reader));
    assert_int_equal(page_of(reader, 0, 0, 1), committed);
    kv_step_abort(store, reader);
    WORKS(store, kv_chunk_release(store, CACHE, 2));
    WORKS(store, kv_step_commit(store, step, NULL));
    assert_chunk(store, 1, 1, 12, 3);
    assert_chunk(store, 3, 1, 6, 2);

    /* in place: the tail was alone when the step began */
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 1, 10, NULL));
    WORKS(store, begin_one(store, 1, 1, 1, 1, &step));
    assert_null(kv_step_copies(step, &n));
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 10, 5));
    WORKS(store, begin_one(store, 2, 2, 5, 1, &reader));
    assert_int_equal(kv_step_copies(reader, &n)->from, page_of(step, 0, 0, 2));
    kv_step_abort(store, step);
    WORKS(store, kv_step_commit(store, reader, NULL));
    kv_store_destroy(store);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_begin_of_one_new_chunk),
        cmocka_unit_test(test_begin_of_sequences_without_chunks),
        cmocka_unit_test(test_begin_refuses_ids_and_sizes),
        cmocka_unit_test(test_begin_refuses_another_truth),
        cmocka_unit_test(test_begin_refuses_a_chunk_twice),
        cmocka_unit_test(test_begin_busy),
        cmocka_unit_test(test_begin_is_all_or_nothing),
        cmocka_unit_test(test_steps_have_a_most),
        cmocka_unit_test(test_commit_fills_the_first_chunk_first),
        cmocka_unit_test(test_abort_undoes),
        cmocka_unit_test(test_spare_pages_go_with_their_step),
        cmocka_unit_test(test_shared_tail_is_copied_and_swapped_in),
        cmocka_unit_test(test_no_copy_where_the_tail_is_full_or_alone),
        cmocka_unit_test(test_both_sides_append_at_once),
        cmocka_unit_test(test_fork_during_a_step_has_the_committed_state),
    };
    return cmocka_run_group_tests_name("kvstore.kvstore_step", tests, NULL, NULL);
}
