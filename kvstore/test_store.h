/* test_store.h: what the tests of the store share: short calls that verify the store after. */
#ifndef ATTN_KVSTORE_TEST_STORE_H
#define ATTN_KVSTORE_TEST_STORE_H

#include "base/status.h"
#include "kvstore/kvstore.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

/* The call gives the status, with a sentence on failure, and the store is sound after it. */
#define EXPECT(store, call, status)                                                                \
    do {                                                                                           \
        attn_status_t got_ = (call);                                                               \
        if (got_ != (status)) {                                                                    \
            print_error("%s: %s, \"%s\"\n", #call, attn_strerror(got_), attn_last_error());        \
        }                                                                                          \
        assert_int_equal(got_, (status));                                                          \
        assert_int_equal(kv_store_check(store), ATTN_OK);                                          \
    } while (0)

#define WORKS(store, call) EXPECT(store, call, ATTN_OK)

#define CACHE UINT64_C(7)

/* A store with one cache: n_pages of page_size tokens. */
static inline kv_store_t *
store_with_cache(uint32_t page_size, uint32_t chunk_size, uint32_t n_pages)
{
    kv_store_t *store = NULL;

    assert_int_equal(kv_store_create(1 << 24, &store), ATTN_OK);
    WORKS(store, kv_region_open(store, CACHE, 4096, page_size, chunk_size, UINT64_C(4096) * n_pages,
                                NULL));
    return store;
}

static inline uint32_t
free_pages(const kv_store_t *store)
{
    kv_region_info_t info;
    assert_int_equal(kv_region_describe(store, CACHE, &info), ATTN_OK);
    return info.free_pages;
}

static inline kv_chunk_info_t
chunk_info(const kv_store_t *store, uint64_t chunk)
{
    kv_chunk_info_t info;
    assert_int_equal(kv_chunk_describe(store, CACHE, chunk, &info), ATTN_OK);
    return info;
}

#define assert_chunk(store, chunk, generation_, length_, n_pages_)                                 \
    do {                                                                                           \
        kv_chunk_info_t info_ = chunk_info(store, chunk);                                          \
        assert_int_equal(info_.generation, generation_);                                           \
        assert_int_equal(info_.length, length_);                                                   \
        assert_int_equal(info_.n_pages, n_pages_);                                                 \
    } while (0)

/* Begin a step of one entry that names one chunk, as it is now, and appends n_new to it. */
static inline attn_status_t
begin_one(kv_store_t *store, uint64_t step_id, uint64_t seq, uint64_t chunk, uint32_t n_new,
          kv_step_t **step)
{
    kv_chunk_info_t info = {0};
    (void)kv_chunk_describe(store, CACHE, chunk, &info);
    const kv_step_chunk_t named = {
        .chunk = chunk, .generation = info.generation, .length = info.length, .n_new = n_new};
    const kv_step_entry_t entry = {.seq = seq, .n_chunks = 1, .chunks = &named};
    return kv_step_begin(store, CACHE, step_id, &entry, 1, step);
}

/* Bring the chunk to `length` more tokens. */
static inline void
grow_chunk(kv_store_t *store, uint64_t chunk, uint32_t n_new)
{
    kv_step_t *step = NULL;
    WORKS(store, begin_one(store, UINT64_MAX, UINT64_MAX, chunk, n_new, &step));
    WORKS(store, kv_step_commit(store, step, NULL));
}

#endif
