/* Regions of the slab, and chunks outside steps. */
#include "kvstore/test_random.h"
#include "kvstore/test_store.h"

#include <string.h>

#define MIB (UINT64_C(1) << 20)

static kv_store_t *
make_store(uint64_t bytes)
{
    kv_store_t *store = NULL;
    assert_int_equal(kv_store_create(bytes, &store), ATTN_OK);
    assert_int_equal(kv_store_check(store), ATTN_OK);
    return store;
}

static void
assert_free(const kv_store_t *store, uint64_t total, uint64_t largest)
{
    uint64_t total_now, largest_now;
    kv_store_free_bytes(store, &total_now, &largest_now);
    assert_int_equal(total_now, total);
    assert_int_equal(largest_now, largest);
}

/* ---- regions ---- */

static void
test_store_too_small_is_invalid(void **state)
{
    kv_store_t *store = NULL;
    (void)state;

    assert_int_equal(kv_store_create(0, &store), ATTN_ERR_INVALID);
    assert_int_equal(kv_store_create(4095, &store), ATTN_ERR_INVALID);
    assert_null(store);
    store = make_store(3 * 4096 + 4095);
    assert_free(store, 3 * 4096, 3 * 4096);
    kv_store_destroy(store);
    kv_store_destroy(NULL);
}

static void
test_open_rounds_down_to_whole_pages(void **state)
{
    kv_store_t *store = make_store(MIB);
    kv_region_info_t info;
    (void)state;

    WORKS(store, kv_region_open(store, 1, 5000, 16, 64, 100000, &info));
    /* 100,000 is 24 extents, 98,304 bytes: 19 pages of 5,000, in 95,000 -> 24 extents */
    assert_int_equal(info.n_pages, 19);
    assert_int_equal(info.free_pages, 19);
    assert_int_equal(info.bytes, 24 * 4096);
    assert_int_equal(info.offset, 0);
    assert_int_equal(info.page_size, 16);
    assert_int_equal(info.chunk_size, 64);
    assert_int_equal(info.chunks, 0);
    assert_int_equal(info.shared_pages, 0);

    /* 41 KiB: 10 extents are 40,960 bytes, 2 pages of 20,000, in 40,000 -> 10 extents */
    WORKS(store, kv_region_open(store, 2, 20000, 16, 17, 41 * 1024, &info));
    assert_int_equal(info.n_pages, 2);
    assert_int_equal(info.bytes, 10 * 4096);
    assert_int_equal(info.offset, 24 * 4096);
    assert_free(store, MIB - 34 * 4096, MIB - 34 * 4096);
    kv_store_destroy(store);
}

static void
test_open_of_no_size_takes_a_quarter(void **state)
{
    kv_store_t *store = make_store(32 * 4096);
    kv_region_info_t info;
    (void)state;

    WORKS(store, kv_region_open(store, 1, 1024, 1, 1, 0, &info));
    assert_int_equal(info.bytes, 8 * 4096);
    WORKS(store, kv_region_open(store, 2, 4096, 1, 1, 0, &info));
    assert_int_equal(info.bytes, 6 * 4096);

    /* where the free bytes are in pieces, no more than the largest */
    for (uint64_t cache = 3; cache < 21; cache++) {
        WORKS(store, kv_region_open(store, cache, 4096, 1, 1, 4096, &info));
    }
    assert_free(store, 0, 0);
    for (uint64_t cache = 3; cache < 21; cache += 2) {
        WORKS(store, kv_region_close(store, cache));
    }
    assert_free(store, 9 * 4096, 4096);
    WORKS(store, kv_region_open(store, 30, 4096, 1, 1, 0, &info));
    assert_int_equal(info.bytes, 4096);
    kv_store_destroy(store);
}

static void
test_open_refuses_wrong_shapes(void **state)
{
    kv_store_t *store = make_store(MIB);
    kv_region_info_t info;
    (void)state;

    memset(&info, 0x5a, sizeof(info));
    EXPECT(store, kv_region_open(store, 0, 4096, 16, 64, MIB, &info), ATTN_ERR_INVALID);
    EXPECT(store, kv_region_open(store, 1, 0, 16, 64, MIB, &info), ATTN_ERR_INVALID);
    EXPECT(store, kv_region_open(store, 1, 4096, 0, 64, MIB, &info), ATTN_ERR_INVALID);
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 0, MIB, &info), ATTN_ERR_INVALID);
    EXPECT(store, kv_region_open(store, 1, 4096, 16, (1u << 20) + 1, MIB, &info), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "1048577"));
    /* one chunk is 4 pages */
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 64, 4 * 4096 - 1, &info), ATTN_ERR_EXHAUSTED);
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 49, 3 * 4096, &info), ATTN_ERR_EXHAUSTED);
    EXPECT(store, kv_region_open(store, 1, UINT64_MAX, 16, 64, MIB, &info), ATTN_ERR_EXHAUSTED);
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 64, UINT64_MAX, &info), ATTN_ERR_EXHAUSTED);
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 64, MIB + 4096, &info), ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(attn_last_error(), "1052672")); /* wanted */
    assert_non_null(strstr(attn_last_error(), "1048576")); /* largest */
    assert_int_equal(info.n_pages, 0x5a5a5a5a);
    assert_free(store, MIB, MIB);

    WORKS(store, kv_region_open(store, 1, 4096, 16, 48, 3 * 4096, &info));
    EXPECT(store, kv_region_open(store, 1, 4096, 16, 48, 3 * 4096, &info), ATTN_ERR_EXISTS);
    kv_store_destroy(store);

    store = make_store(UINT64_C(1) << 32);
    EXPECT(store, kv_region_open(store, 1, 2, 16, 48, UINT64_C(1) << 32, &info),
           ATTN_ERR_TOO_LARGE);
    kv_store_destroy(store);
}

static void
test_extents_are_first_fit_and_coalesce(void **state)
{
    kv_store_t *store = make_store(10 * 4096);
    kv_region_info_t info;
    (void)state;

    for (uint64_t cache = 1; cache <= 5; cache++) {
        WORKS(store, kv_region_open(store, cache, 4096, 1, 1, 2 * 4096, &info));
        assert_int_equal(info.offset, (cache - 1) * 2 * 4096);
    }
    assert_free(store, 0, 0);
    WORKS(store, kv_region_close(store, 2));
    WORKS(store, kv_region_close(store, 4));
    assert_free(store, 4 * 4096, 2 * 4096);
    EXPECT(store, kv_region_open(store, 6, 4096, 1, 1, 3 * 4096, &info), ATTN_ERR_EXHAUSTED);

    WORKS(store, kv_region_open(store, 6, 4096, 1, 1, 4096, &info));
    assert_int_equal(info.offset, 2 * 4096);
    WORKS(store, kv_region_close(store, 3)); /* joins the rest of 2, itself, and 4 */
    assert_free(store, 5 * 4096, 5 * 4096);
    WORKS(store, kv_region_open(store, 7, 4096, 1, 1, 5 * 4096, &info));
    assert_int_equal(info.offset, 3 * 4096);
    for (uint64_t cache = 1; cache <= 7; cache++) {
        (void)kv_region_close(store, cache);
    }
    assert_free(store, 10 * 4096, 10 * 4096);
    EXPECT(store, kv_region_close(store, 7), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_region_describe(store, 7, &info), ATTN_ERR_NOT_FOUND);
    kv_store_destroy(store);
}

/* Against a map of the slab with one mark per extent unit. */
static void
test_random_regions_agree_with_a_map(void **state)
{
    enum { UNITS = 64, CACHES = 16 };
    uint8_t map[UNITS] = {0};
    kv_store_t *store  = make_store(UNITS * 4096);
    (void)state;

    random_start(1);
    for (test_op = 0; test_op < 20000; test_op++) {
        uint32_t cache = 1 + pick(CACHES), want = 1 + pick(12), at = 0, run = 0;
        kv_region_info_t info;
        bool open = memchr(map, (int)cache, UNITS) != NULL;

        if (open && chance(50)) {
            CHECK(kv_region_close(store, cache) == ATTN_OK);
            for (uint32_t i = 0; i < UNITS; i++) {
                map[i] = map[i] == cache ? 0 : map[i];
            }
            continue;
        }
        while (at < UNITS && run < want) {
            run = map[at++] == 0 ? run + 1 : 0;
        }
        attn_status_t status = kv_region_open(store, cache, 4096, 1, 1, want * 4096, &info);
        CHECK(status == (open ? ATTN_ERR_EXISTS : run < want ? ATTN_ERR_EXHAUSTED : ATTN_OK));
        if (status == ATTN_OK) {
            CHECK(info.offset == (at - want) * 4096);
            memset(map + at - want, (int)cache, want);
        }
        CHECK(kv_store_check(store) == ATTN_OK);
    }
    kv_store_destroy(store);
}

static void
test_regions_have_a_most(void **state)
{
    kv_store_t *store = make_store(2000 * 4096);
    uint64_t cache    = 1;
    (void)state;

    while (kv_region_open(store, cache, 4096, 1, 1, 4096, NULL) == ATTN_OK) {
        cache++;
    }
    assert_int_equal(cache - 1, ATTN_KV_REGIONS_MAX);
    EXPECT(store, kv_region_open(store, cache, 4096, 1, 1, 4096, NULL), ATTN_ERR_EXHAUSTED);
    WORKS(store, kv_region_close(store, 500));
    WORKS(store, kv_region_open(store, cache, 4096, 1, 1, 4096, NULL));
    kv_store_destroy(store);
}

static void
test_close_waits_for_steps_and_drops_chunks(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_step_t *step;
    uint64_t total, largest;
    (void)state;

    grow_chunk(store, 1, 9);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 9, 2));
    WORKS(store, begin_one(store, 1, 1, 1, 0, &step));
    EXPECT(store, kv_region_close(store, CACHE), ATTN_ERR_BUSY);
    kv_step_abort(store, step);
    WORKS(store, kv_region_close(store, CACHE));
    kv_store_free_bytes(store, &total, &largest);
    assert_int_equal(total, 1 << 24);
    EXPECT(store, kv_chunk_release(store, CACHE, 1), ATTN_ERR_NOT_FOUND);
    WORKS(store, kv_region_open(store, CACHE, 4096, 4, 16, 4096 * 8, NULL));
    assert_int_equal(free_pages(store), 8);
    kv_store_destroy(store);
}

/* ---- chunks ---- */

static void
test_unknown_chunks_and_caches(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_chunk_info_t info;
    (void)state;

    EXPECT(store, kv_chunk_describe(store, CACHE, 1, &info), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_release(store, CACHE, 1), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_truncate(store, CACHE, 1, 1, 0, NULL), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 0, 2), ATTN_ERR_NOT_FOUND);
    grow_chunk(store, 1, 3);
    EXPECT(store, kv_chunk_describe(store, 99, 1, &info), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_release(store, 99, 1), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_truncate(store, 99, 1, 1, 0, NULL), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_chunk_fork(store, 99, 1, 0, 2), ATTN_ERR_NOT_FOUND);
    assert_false(kv_seq_in_step(store, 99, 1));
    kv_store_destroy(store);
}

static void
test_truncate(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 8);
    uint32_t generation = 77;
    (void)state;

    grow_chunk(store, 1, 13);
    assert_chunk(store, 1, 1, 13, 4);
    EXPECT(store, kv_chunk_truncate(store, CACHE, 1, 2, 0, &generation), ATTN_ERR_STALE);
    assert_non_null(strstr(attn_last_error(), "generation 1"));
    EXPECT(store, kv_chunk_truncate(store, CACHE, 1, 1, 14, &generation), ATTN_ERR_INVALID);
    assert_int_equal(generation, 77);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 1, 13, &generation));
    assert_int_equal(generation, 2);
    assert_chunk(store, 1, 2, 13, 4);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 2, 8, NULL));
    assert_chunk(store, 1, 3, 8, 2);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 3, 5, NULL));
    assert_chunk(store, 1, 4, 5, 2);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 4, 0, &generation));
    assert_chunk(store, 1, 5, 0, 0);
    assert_int_equal(free_pages(store), 8);
    grow_chunk(store, 1, 1);
    assert_chunk(store, 1, 5, 1, 1);
    kv_store_destroy(store);
}

static attn_status_t
read_begin(kv_store_t *store, uint32_t generation, uint32_t first, uint32_t n, uint32_t *pages,
           uint32_t *held, kv_read_t **read)
{
    uint32_t offsets[16];
    attn_status_t status =
        kv_read_begin(store, CACHE, 1, generation, first, n, pages, offsets, held, read);

    for (uint32_t i = 0; status == ATTN_OK && i < n; i++) {
        assert_int_equal(offsets[i], (first + i) % 4);
    }
    return status;
}

static void
test_places_of_committed_tokens(void **state)
{
    kv_store_t *store     = store_with_cache(4, 16, 8);
    kv_step_chunk_t chunk = {.chunk = 1, .generation = 1, .length = 10, .n_new = 4};
    kv_step_entry_t entry = {.seq = 5, .n_chunks = 1, .chunks = &chunk};
    uint32_t pages[16], shared[16], held;
    kv_read_t *read;
    kv_step_t *step;
    (void)state;

    EXPECT(store, read_begin(store, 1, 0, 0, pages, &held, &read), ATTN_ERR_NOT_FOUND);
    grow_chunk(store, 1, 10);
    EXPECT(store, kv_read_begin(store, 99, 1, 1, 0, 1, pages, shared, &held, &read),
           ATTN_ERR_NOT_FOUND);
    EXPECT(store, read_begin(store, 2, 0, 1, pages, &held, &read), ATTN_ERR_STALE);
    EXPECT(store, read_begin(store, 1, 7, 4, pages, &held, &read), ATTN_ERR_INVALID);
    EXPECT(store, read_begin(store, 1, UINT32_MAX, 2, pages, &held, &read), ATTN_ERR_INVALID);
    WORKS(store, read_begin(store, 1, 6, 4, pages, &held, &read));
    assert_int_equal(held, 2);
    kv_read_end(read);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(pages[i] == pages[0], i < 2); /* tokens 6 and 7, then 8 and 9 */
    }
    /* Of a shared tail that a step copies, what is committed is the page of before. */
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 10, 2));
    WORKS(store, kv_step_begin(store, CACHE, 7, &entry, 1, &step));
    WORKS(store, read_begin(store, 1, 6, 4, shared, &held, &read));
    assert_memory_equal(shared, pages, 4 * sizeof(*pages));
    kv_step_abort(store, step);
    kv_read_end(read);
    kv_store_destroy(store);
}

/* Whatever becomes of the chunk, its pages are not given out again while they are read. */
static void
test_pages_stay_while_they_are_read(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    uint32_t pages[16], others[16], n, held;
    kv_read_t *read, *second;
    kv_step_t *step;
    (void)state;

    grow_chunk(store, 1, 10);
    WORKS(store, read_begin(store, 1, 0, 10, pages, &held, &read));
    assert_int_equal(held, 8); /* the page of the other two takes tokens yet */
    assert_int_equal(free_pages(store), 5);
    WORKS(store, begin_one(store, 3, 3, 1, 1, &step));
    assert_null(kv_step_copies(step, &n)); /* it is not copied for the reader */
    kv_step_abort(store, step);
    EXPECT(store, kv_region_close(store, CACHE), ATTN_ERR_BUSY);
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, 1, 2, NULL));
    EXPECT(store, read_begin(store, 1, 0, 1, pages, &held, &second), ATTN_ERR_STALE);
    WORKS(store, read_begin(store, 2, 0, 2, others, &held, &second));
    assert_int_equal(held, 0);
    kv_read_end(second);
    assert_int_equal(free_pages(store), 6);
    WORKS(store, kv_chunk_release(store, CACHE, 1));
    assert_int_equal(free_pages(store), 6);
    EXPECT(store, begin_one(store, 1, 1, 5, 16, &step), ATTN_OK);
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t page = kv_step_pages(step, 0, 0, &n)[i];
        assert_true(page != pages[0] && page != pages[4]);
    }
    kv_step_abort(store, step);
    kv_read_end(read);
    assert_int_equal(kv_store_check(store), ATTN_OK);
    assert_int_equal(free_pages(store), 8);
    grow_chunk(store, 1, 16);
    WORKS(store, read_begin(store, 1, 5, 0, pages, &held, &read)); /* nothing is fine */
    assert_int_equal(held, 0);
    WORKS(store, read_begin(store, 1, 13, 3, pages, &held, &second));
    assert_int_equal(held, 3);
    kv_read_end(read);
    kv_read_end(second);
    WORKS(store, kv_region_close(store, CACHE));
    kv_store_destroy(store);
}

static void
test_fork_shares_pages(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_region_info_t info;
    (void)state;

    grow_chunk(store, 1, 10);
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 11, 2), ATTN_ERR_INVALID);
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 5, 1), ATTN_ERR_EXISTS);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 5, 2));
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 10, 3));
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 0, 4));
    EXPECT(store, kv_chunk_fork(store, CACHE, 1, 5, 2), ATTN_ERR_EXISTS);
    assert_chunk(store, 2, 1, 5, 2);
    assert_chunk(store, 3, 1, 10, 3);
    assert_chunk(store, 4, 1, 0, 0);
    assert_int_equal(free_pages(store), 5);
    assert_int_equal(kv_region_describe(store, CACHE, &info), ATTN_OK);
    assert_int_equal(info.shared_pages, 3);
    assert_int_equal(info.chunks, 4);

    WORKS(store, kv_chunk_release(store, CACHE, 1));
    assert_int_equal(free_pages(store), 5);
    WORKS(store, kv_chunk_truncate(store, CACHE, 3, 1, 8, NULL));
    assert_int_equal(free_pages(store), 6);
    WORKS(store, kv_chunk_release(store, CACHE, 3));
    WORKS(store, kv_chunk_release(store, CACHE, 4));
    assert_int_equal(kv_region_describe(store, CACHE, &info), ATTN_OK);
    assert_int_equal(info.shared_pages, 0);
    assert_int_equal(info.free_pages, 6);
    WORKS(store, kv_chunk_release(store, CACHE, 2));
    assert_int_equal(free_pages(store), 8);
    kv_store_destroy(store);
}

static void
test_same_ids_in_two_caches_are_two_chunks(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    kv_chunk_info_t info;
    kv_step_t *step;
    const kv_step_chunk_t named = {.chunk = 1, .n_new = 2};
    const kv_step_entry_t entry = {.seq = 1, .n_chunks = 1, .chunks = &named};
    (void)state;

    grow_chunk(store, 1, 7);
    WORKS(store, kv_region_open(store, 8, 4096, 4, 16, 4 * 4096, NULL));
    WORKS(store, kv_step_begin(store, 8, 1, &entry, 1, &step));
    assert_true(kv_seq_in_step(store, 8, 1));
    assert_false(kv_seq_in_step(store, CACHE, 1));
    WORKS(store, kv_step_commit(store, step, NULL));
    assert_int_equal(kv_chunk_describe(store, 8, 1, &info), ATTN_OK);
    assert_int_equal(info.length, 2);
    assert_chunk(store, 1, 1, 7, 2);
    WORKS(store, kv_region_close(store, CACHE));
    assert_int_equal(kv_chunk_describe(store, 8, 1, &info), ATTN_OK);
    kv_store_destroy(store);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_store_too_small_is_invalid),
        cmocka_unit_test(test_open_rounds_down_to_whole_pages),
        cmocka_unit_test(test_open_of_no_size_takes_a_quarter),
        cmocka_unit_test(test_open_refuses_wrong_shapes),
        cmocka_unit_test(test_extents_are_first_fit_and_coalesce),
        cmocka_unit_test(test_random_regions_agree_with_a_map),
        cmocka_unit_test(test_regions_have_a_most),
        cmocka_unit_test(test_close_waits_for_steps_and_drops_chunks),
        cmocka_unit_test(test_unknown_chunks_and_caches),
        cmocka_unit_test(test_truncate),
        cmocka_unit_test(test_places_of_committed_tokens),
        cmocka_unit_test(test_pages_stay_while_they_are_read),
        cmocka_unit_test(test_fork_shares_pages),
        cmocka_unit_test(test_same_ids_in_two_caches_are_two_chunks),
    };
    return cmocka_run_group_tests_name("kvstore.kvstore", tests, NULL, NULL);
}
