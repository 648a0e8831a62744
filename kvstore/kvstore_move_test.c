/* kvstore_move_test.c: a chunk leaves one store and arrives in another; every call is followed by
 * the store's own check. */
#include "kvstore/test_store.h"

#define CHUNK UINT64_C(5)
#define COPY UINT64_C(9)
#define MOVE UINT64_C(77)

static attn_status_t
leave(kv_store_t *store, kv_leave_t what, uint64_t move, uint32_t generation, uint32_t length)
{
    const kv_leaving_t leaving = {.what       = what,
                                  .chunk      = CHUNK,
                                  .move       = move,
                                  .generation = generation,
                                  .length     = length,
                                  .until_ns   = 1000};
    return kv_chunk_leave(store, CACHE, &leaving, NULL);
}

static attn_status_t
arrive(kv_store_t *store, uint64_t chunk, uint32_t first, uint32_t length)
{
    kv_arrival_t *arrival = NULL;
    attn_status_t status  = kv_arrival_begin(store, CACHE, chunk, first, length, &arrival);

    return status == ATTN_OK ? kv_arrival_publish(arrival) : status;
}

/* ---- leaving ---- */

static void
test_what_is_held_is_named_by_no_step(void **state)
{
    kv_store_t *store = store_with_cache(16, 256, 32);
    kv_step_t *step   = NULL;
    uint32_t generation;

    (void)state;
    grow_chunk(store, CHUNK, 40);
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 1, &step), ATTN_ERR_STALE);
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 0, &step), ATTN_ERR_STALE);
    EXPECT(store, kv_chunk_truncate(store, CACHE, CHUNK, 1, 8, &generation), ATTN_ERR_BUSY);
    WORKS(store, begin_one(store, 1, 1, CHUNK + 1, 5, &step)); /* others may be */
    kv_step_abort(store, step);

    /* Another attempt's word does not count, its own does. */
    WORKS(store, leave(store, KV_LEAVE_STAY, MOVE + 1, 0, 0));
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 1, &step), ATTN_ERR_STALE);
    WORKS(store, leave(store, KV_LEAVE_STAY, MOVE, 0, 0));
    WORKS(store, begin_one(store, 1, 1, CHUNK, 1, &step));
    kv_step_abort(store, step);
    kv_store_destroy(store);
}

static void
test_a_hold_ends_by_itself_and_going_does_not(void **state)
{
    kv_store_t *store = store_with_cache(16, 256, 32);
    kv_step_t *step   = NULL;

    (void)state;
    grow_chunk(store, CHUNK, 40);
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    kv_leaving_tick(store, 999);
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 1, &step), ATTN_ERR_STALE);
    kv_leaving_tick(store, 1000);
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE, 1, 40), ATTN_ERR_STALE); /* too late */
    WORKS(store, begin_one(store, 1, 1, CHUNK, 1, &step));
    kv_step_abort(store, step);

    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    WORKS(store, leave(store, KV_LEAVE_GO, MOVE, 1, 40));
    WORKS(store, leave(store, KV_LEAVE_GO, MOVE, 1, 40)); /* said twice */
    kv_leaving_tick(store, UINT64_MAX - 1);
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 1, &step), ATTN_ERR_STALE);
    WORKS(store, kv_chunk_release(store, CACHE, CHUNK));
    assert_int_equal(free_pages(store), 32);
    WORKS(store, begin_one(store, 1, 1, CHUNK, 1, &step)); /* the name alone is free again */
    kv_step_abort(store, step);
    kv_store_destroy(store);
}

static void
test_nothing_goes_that_is_in_use_or_not_what_was_copied(void **state)
{
    kv_store_t *store = store_with_cache(16, 256, 32);
    kv_step_t *step   = NULL;

    (void)state;
    grow_chunk(store, CHUNK, 40);
    WORKS(store, begin_one(store, 1, 1, CHUNK, 3, &step));
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE, 1, 40), ATTN_ERR_BUSY);
    WORKS(store, kv_step_commit(store, step, NULL));
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE, 1, 40), ATTN_ERR_STALE); /* it grew */
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE, 2, 43), ATTN_ERR_STALE);
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE + 1, 1, 43), ATTN_ERR_STALE);
    WORKS(store, leave(store, KV_LEAVE_GO, MOVE, 1, 43));
    WORKS(store, leave(store, KV_LEAVE_STAY, MOVE, 0, 0)); /* its word may be taken back */
    grow_chunk(store, CHUNK, 1);
    kv_store_destroy(store);
}

/* An attempt that was given up may still be on its way here. */
static void
test_a_hold_that_comes_late_holds_nothing(void **state)
{
    kv_store_t *store = store_with_cache(16, 256, 32);
    kv_step_t *step   = NULL;

    (void)state;
    grow_chunk(store, CHUNK, 40);
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE + 1, 0, 0)); /* the next attempt takes over */
    EXPECT(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0), ATTN_ERR_STALE);
    WORKS(store, leave(store, KV_LEAVE_GO, MOVE + 1, 1, 40));
    EXPECT(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0), ATTN_ERR_STALE);
    EXPECT(store, leave(store, KV_LEAVE_HOLD, MOVE + 1, 0, 0), ATTN_ERR_STALE);
    EXPECT(store, leave(store, KV_LEAVE_HOLD, MOVE + 2, 0, 0), ATTN_ERR_STALE);
    WORKS(store, leave(store, KV_LEAVE_STAY, MOVE, 0, 0));
    kv_leaving_tick(store, UINT64_MAX - 1);
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 1, &step), ATTN_ERR_STALE); /* it is gone still */
    WORKS(store, leave(store, KV_LEAVE_STAY, MOVE + 1, 0, 0));
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE + 2, 0, 0));
    kv_store_destroy(store);
}

/* A chunk that was placed in advance, and that nobody has stored into yet. */
static void
test_what_is_not_here_cannot_be_made_meanwhile(void **state)
{
    kv_store_t *store = store_with_cache(16, 256, 32);
    kv_step_t *step   = NULL;

    (void)state;
    WORKS(store, begin_one(store, 1, 1, CHUNK, 3, &step));
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    EXPECT(store, leave(store, KV_LEAVE_GO, MOVE, 0, 0), ATTN_ERR_BUSY);
    kv_step_abort(store, step);
    EXPECT(store, begin_one(store, 1, 1, CHUNK, 3, &step), ATTN_ERR_STALE);
    WORKS(store, leave(store, KV_LEAVE_GO, MOVE, 0, 0));
    EXPECT(store, kv_chunk_release(store, CACHE, CHUNK), ATTN_ERR_NOT_FOUND);
    WORKS(store, begin_one(store, 1, 1, CHUNK, 3, &step)); /* the engine remembers released ones */
    kv_step_abort(store, step);
    EXPECT(store, kv_chunk_leave(store, 8, &(kv_leaving_t){.chunk = 1, .move = 1}, NULL),
           ATTN_ERR_NOT_FOUND);
    kv_store_destroy(store);
}

/* ---- arriving ---- */

static void
test_an_arrival_is_seen_when_it_is_whole(void **state)
{
    kv_store_t *store = store_with_cache(16, 128, 8);
    kv_arrival_t *arrival;
    kv_chunk_info_t info;
    uint32_t pages[40], offsets[40];

    (void)state;
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 0, 40, &arrival));
    assert_int_equal(free_pages(store), 5);
    EXPECT(store, kv_chunk_describe(store, CACHE, COPY, &info), ATTN_ERR_NOT_FOUND);
    WORKS(store, kv_arrival_enter(arrival, 10, 30, pages, offsets));
    assert_int_equal(offsets[5], 15);
    assert_int_equal(offsets[6], 0);
    assert_int_not_equal(pages[5], pages[6]);
    EXPECT(store, kv_region_close(store, CACHE), ATTN_ERR_BUSY);
    kv_arrival_leave(arrival);
    EXPECT(store, kv_arrival_enter(arrival, 30, 11, pages, offsets), ATTN_ERR_INVALID);
    EXPECT(store, kv_arrival_enter(arrival, UINT32_MAX, 2, pages, offsets), ATTN_ERR_INVALID);
    WORKS(store, kv_arrival_publish(arrival));
    assert_chunk(store, COPY, 1, 40, 3);
    assert_int_equal(free_pages(store), 5);
    kv_store_destroy(store);
}

/* The rest of a chunk that grew while it was copied. */
static void
test_more_tokens_arrive_behind_those_that_came(void **state)
{
    kv_store_t *store = store_with_cache(16, 128, 8);
    kv_arrival_t *arrival;
    uint32_t pages[40], offsets[40];

    (void)state;
    WORKS(store, arrive(store, COPY, 0, 40));
    EXPECT(store, arrive(store, COPY, 0, 41), ATTN_ERR_EXISTS);
    EXPECT(store, arrive(store, COPY, 39, 41), ATTN_ERR_STALE);
    EXPECT(store, arrive(store, COPY, 40, 40), ATTN_ERR_INVALID);
    EXPECT(store, arrive(store, COPY, 40, 129), ATTN_ERR_INVALID);
    EXPECT(store, arrive(store, CHUNK, 40, 50), ATTN_ERR_NOT_FOUND);
    EXPECT(store, arrive(store, CHUNK, 0, 128), ATTN_ERR_EXHAUSTED);

    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 40, 60, &arrival)); /* one more page */
    EXPECT(store, kv_arrival_enter(arrival, 39, 2, pages, offsets), ATTN_ERR_INVALID);
    WORKS(store, kv_arrival_enter(arrival, 40, 20, pages, offsets));
    assert_int_equal(offsets[0], 8);
    kv_arrival_leave(arrival);
    EXPECT(store, arrive(store, COPY, 40, 60), ATTN_ERR_BUSY); /* two at once */
    assert_int_equal(free_pages(store), 4);
    WORKS(store, kv_arrival_publish(arrival));
    assert_chunk(store, COPY, 1, 60, 4);
    WORKS(store, arrive(store, COPY, 60, 64));
    WORKS(store, arrive(store, COPY, 64, 80)); /* at a page's start */
    assert_chunk(store, COPY, 1, 80, 5);
    grow_chunk(store, COPY, 16);
    WORKS(store, kv_chunk_release(store, CACHE, COPY));
    assert_int_equal(free_pages(store), 8);
    kv_store_destroy(store);
}

static void
test_what_does_not_arrive_leaves_nothing(void **state)
{
    kv_store_t *store = store_with_cache(16, 128, 8);
    kv_arrival_t *arrival, *other;
    kv_step_t *step = NULL;

    (void)state;
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 0, 40, &arrival));
    EXPECT(store, kv_arrival_begin(store, CACHE, CHUNK, 0, 100, &other), ATTN_ERR_EXHAUSTED);
    kv_arrival_drop(arrival);
    assert_int_equal(free_pages(store), 8);

    /* Somebody else made it meanwhile. */
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 0, 40, &arrival));
    grow_chunk(store, COPY, 5);
    EXPECT(store, kv_arrival_publish(arrival), ATTN_ERR_EXISTS);
    assert_int_equal(free_pages(store), 7);

    /* It is in use, and then gone, before the rest is there. */
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 5, 40, &arrival));
    WORKS(store, begin_one(store, 1, 1, COPY, 0, &step));
    EXPECT(store, arrive(store, COPY, 5, 40), ATTN_ERR_BUSY);
    kv_step_abort(store, step);
    WORKS(store, kv_chunk_release(store, CACHE, COPY));
    assert_int_equal(free_pages(store),
                     5); /* the page that tokens are put into is not used again */
    EXPECT(store, kv_arrival_publish(arrival), ATTN_ERR_NOT_FOUND);
    assert_int_equal(free_pages(store), 8);
    kv_store_destroy(store);
}

/* Cut and grown to what it was: as long as before, and not the same tokens. */
static void
test_what_was_cut_meanwhile_is_not_grown(void **state)
{
    static const uint32_t cuts[] = {40, 20}; /* in the page that tokens come to, and before it */

    (void)state;
    for (uint32_t i = 0; i < 2; i++) {
        kv_store_t *store = store_with_cache(16, 128, 16);
        kv_arrival_t *arrival;
        uint32_t generation;
        WORKS(store, arrive(store, COPY, 0, 40));
        WORKS(store, kv_arrival_begin(store, CACHE, COPY, 40, 60, &arrival));
        if (cuts[i] == 40) {
            grow_chunk(store, COPY, 10);
        }
        WORKS(store, kv_chunk_truncate(store, CACHE, COPY, 1, cuts[i], &generation));
        if (cuts[i] < 40) {
            grow_chunk(store, COPY, 40 - cuts[i]);
        }
        EXPECT(store, kv_arrival_publish(arrival), ATTN_ERR_STALE);
        assert_chunk(store, COPY, 2, 40, 3);
        assert_int_equal(free_pages(store), 13);
        kv_store_destroy(store);
    }
}

static void
test_one_chunk_arrives_once_at_a_time(void **state)
{
    kv_store_t *store = store_with_cache(16, 128, 16);
    kv_arrival_t *arrival, *other;

    (void)state;
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 0, 48, &arrival));
    EXPECT(store, kv_arrival_begin(store, CACHE, COPY, 0, 48, &other), ATTN_ERR_BUSY);
    WORKS(store, kv_arrival_publish(arrival));
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 48, 60, &arrival)); /* shares no page */
    EXPECT(store, kv_arrival_begin(store, CACHE, COPY, 48, 60, &other), ATTN_ERR_BUSY);
    WORKS(store, kv_arrival_begin(store, CACHE, CHUNK, 0, 48, &other));
    kv_arrival_drop(arrival);
    kv_arrival_drop(other);
    WORKS(store, arrive(store, COPY, 48, 60));
    kv_store_destroy(store);
}

static void
test_a_cache_closes_under_its_arrivals(void **state)
{
    kv_store_t *store = store_with_cache(16, 128, 8);
    kv_arrival_t *arrival, *other;
    uint32_t page, offset;

    (void)state;
    WORKS(store, kv_arrival_begin(store, CACHE, COPY, 0, 40, &arrival));
    WORKS(store, kv_arrival_begin(store, CACHE, CHUNK, 0, 40, &other));
    WORKS(store, leave(store, KV_LEAVE_HOLD, MOVE, 0, 0));
    WORKS(store, kv_region_close(store, CACHE));
    EXPECT(store, kv_arrival_enter(arrival, 0, 1, &page, &offset), ATTN_ERR_NOT_FOUND);
    EXPECT(store, kv_arrival_publish(arrival), ATTN_ERR_NOT_FOUND);
    kv_arrival_drop(other);
    kv_store_destroy(store);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_held_is_named_by_no_step),
        cmocka_unit_test(test_a_hold_ends_by_itself_and_going_does_not),
        cmocka_unit_test(test_nothing_goes_that_is_in_use_or_not_what_was_copied),
        cmocka_unit_test(test_a_hold_that_comes_late_holds_nothing),
        cmocka_unit_test(test_what_is_not_here_cannot_be_made_meanwhile),
        cmocka_unit_test(test_an_arrival_is_seen_when_it_is_whole),
        cmocka_unit_test(test_more_tokens_arrive_behind_those_that_came),
        cmocka_unit_test(test_what_does_not_arrive_leaves_nothing),
        cmocka_unit_test(test_what_was_cut_meanwhile_is_not_grown),
        cmocka_unit_test(test_one_chunk_arrives_once_at_a_time),
        cmocka_unit_test(test_a_cache_closes_under_its_arrivals),
    };
    return cmocka_run_group_tests_name("kvstore_move", tests, NULL, NULL);
}
