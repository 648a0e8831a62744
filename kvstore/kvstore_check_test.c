/* kv_store_check() finds damage of each kind: otherwise the other tests would prove little.
 * And the limits that only a look inside can reach. */
#include "kvstore/kvstore_int.h"
#include "kvstore/test_store.h"

#define DAMAGE(place, value)                                                                       \
    do {                                                                                           \
        __typeof__(place) was_ = (place);                                                          \
        (place)                = (value);                                                          \
        assert_true((place) != was_);                                                              \
        assert_int_equal(kv_store_check(store), ATTN_ERR_INTERNAL);                                \
        (place) = was_;                                                                            \
        assert_int_equal(kv_store_check(store), ATTN_OK);                                          \
    } while (0)

static void
test_regions(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    (void)state;

    WORKS(store, kv_region_open(store, 8, 4096, 4, 16, 4096 * 8, NULL));
    kv_region_t *region = kv_region_find(store, 8);
    DAMAGE(region->offset, region->offset - 4096);
    DAMAGE(region->offset, region->offset + 1);
    DAMAGE(region->offset, (1 << 24) - 4096);
    DAMAGE(region->bytes, 7 * UINT64_C(4096));
    DAMAGE(region->cache, 9);
    DAMAGE(store->n_regions, 1);
    kv_store_destroy(store);
}

static void
test_pages(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 8);
    kv_region_t *region = kv_region_find(store, CACHE);
    (void)state;

    grow_chunk(store, 1, 10);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 7, 2));
    kv_chunk_t *chunk = kv_chunk_find(region, 2);
    DAMAGE(region->owners[chunk->pages[0]], 1);
    DAMAGE(region->owners[chunk->pages[0]], 3);
    DAMAGE(region->n_free, 4);
    DAMAGE(region->n_shared, 1);
    DAMAGE(region->free_stack[0], region->free_stack[1]);
    DAMAGE(region->free_stack[0], 8);
    DAMAGE(region->free_stack[0], chunk->pages[0]);
    DAMAGE(chunk->pages[1], chunk->pages[0]);
    DAMAGE(chunk->pages[1], 8);
    DAMAGE(chunk->length, 4);
    DAMAGE(chunk->n_pages, 1);
    DAMAGE(chunk->capacity, 1);
    DAMAGE(chunk->generation, 0);
    DAMAGE(chunk->n_reserved, 1);
    DAMAGE(chunk->replaced, chunk->pages[1]);
    DAMAGE(chunk->named, 1);
    DAMAGE(chunk->appended, true);
    kv_store_destroy(store);
}

static void
test_steps(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 8);
    kv_region_t *region = kv_region_find(store, CACHE);
    kv_step_t *step, *reader;
    (void)state;

    grow_chunk(store, 1, 6);
    WORKS(store, kv_chunk_fork(store, CACHE, 1, 6, 2));
    WORKS(store, begin_one(store, 1, 1, 2, 4, &step));
    WORKS(store, begin_one(store, 2, 2, 1, 0, &reader));
    kv_chunk_t *chunk = kv_chunk_find(region, 2);
    DAMAGE(chunk->named, 2);
    DAMAGE(chunk->named, 0);
    DAMAGE(chunk->appended, false);
    DAMAGE(chunk->replaced, KV_NO_PAGE);
    DAMAGE(chunk->replaced, chunk->pages[0]);
    DAMAGE(chunk->n_reserved, 0);
    DAMAGE(step->chunks[0].n_new, 7);
    DAMAGE(step->chunks[0].n_new, 0);
    DAMAGE(step->chunks[0].chunk, NULL);
    DAMAGE(step->copies[0].to, 0);
    DAMAGE(step->copies[0].from, 0);
    DAMAGE(step->copies[0].tokens, 3);
    DAMAGE(step->n_copies, 0);
    DAMAGE(step->entries[0].seq, 9);
    DAMAGE(step->entries[0].n_chunks, 0);
    DAMAGE(step->entries[0].first_chunk, 1);
    DAMAGE(reader->chunks[0].chunk, chunk);
    DAMAGE(region->n_steps, 1);
    kv_store_destroy(store);
}

static void
test_reads(void **state)
{
    kv_store_t *store = store_with_cache(4, 16, 8);
    uint32_t pages[8], offsets[8], held;
    kv_read_t *read;
    (void)state;

    grow_chunk(store, 1, 8);
    WORKS(store, kv_read_begin(store, CACHE, 1, 1, 0, 8, pages, offsets, &held, &read));
    DAMAGE(read->pages[1], pages[0]);
    DAMAGE(read->pages[0], 8);
    DAMAGE(read->n, 1);
    kv_read_end(read);
    kv_store_destroy(store);
}

/* A chunk whose generations are used up is not truncated into an old one. */
static void
test_generations_end(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 8);
    kv_region_t *region = kv_region_find(store, CACHE);
    (void)state;

    grow_chunk(store, 1, 6);
    kv_chunk_find(region, 1)->generation = UINT32_MAX - 1;
    WORKS(store, kv_chunk_truncate(store, CACHE, 1, UINT32_MAX - 1, 5, NULL));
    EXPECT(store, kv_chunk_truncate(store, CACHE, 1, UINT32_MAX, 4, NULL), ATTN_ERR_EXHAUSTED);
    assert_chunk(store, 1, UINT32_MAX, 5, 2);
    kv_store_destroy(store);
}

/* 16 million chunks would take gigabytes, so the table is told a lie about their number. */
static void
test_chunks_have_a_most(void **state)
{
    kv_store_t *store   = store_with_cache(4, 16, 8);
    kv_region_t *region = kv_region_find(store, CACHE);
    kv_step_t *step;
    (void)state;

    grow_chunk(store, 1, 6);
    unsigned *count = &region->chunks->hh.tbl->num_items;
    *count          = ATTN_KV_CHUNKS_MAX;
    assert_int_equal(kv_chunk_fork(store, CACHE, 1, 6, 2), ATTN_ERR_EXHAUSTED);
    assert_int_equal(begin_one(store, 1, 1, 2, 1, &step), ATTN_ERR_EXHAUSTED);
    assert_int_equal(begin_one(store, 1, 1, 1, 1, &step), ATTN_OK);
    kv_step_abort(store, step);
    *count = ATTN_KV_CHUNKS_MAX - 1;
    assert_int_equal(kv_chunk_fork(store, CACHE, 1, 6, 2), ATTN_OK);
    *count = 2;
    assert_int_equal(kv_store_check(store), ATTN_OK);
    kv_store_destroy(store);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_regions),         cmocka_unit_test(test_pages),
        cmocka_unit_test(test_steps),           cmocka_unit_test(test_reads),
        cmocka_unit_test(test_generations_end), cmocka_unit_test(test_chunks_have_a_most),
    };
    return cmocka_run_group_tests_name("kvstore.kvstore_check", tests, NULL, NULL);
}
