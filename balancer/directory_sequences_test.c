/* Placement and sequences: the formula, the refusals, what is released, what a loss leaves. */
#include "balancer/test_directory.h"

/* A cache of client 0 with a region of n_pages on each of n workers, ids 1 to n. */
static uint64_t
cache_on_workers(fixture_t *f, uint32_t n, attn_placement_t placement, uint32_t n_pages)
{
    uint64_t cache = open_cache(f, 0, "chat", placement);

    for (uint32_t i = 1; i <= n; i++) {
        assert_int_equal(directory_cache_on_worker(f->directory, cache, join(f, i), n_pages),
                         ATTN_OK);
    }
    return cache;
}

/* ---- placement ---- */

static uint32_t
bit_reverse_6(uint32_t lane)
{
    uint32_t reversed = 0;

    for (uint32_t bit = 0; bit < 6; bit++) {
        reversed |= (lane >> bit & 1) << (5 - bit);
    }
    return reversed;
}

static void
test_spread_follows_the_formula(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 9; n++) {
        fixture_t f;
        fixture_open(&f, 0);
        uint64_t cache = cache_on_workers(&f, n, ATTN_PLACE_SPREAD, 100000);
        for (uint32_t s = 0; s < 2 * n; s++) { /* each begins one worker further than the last */
            attn_seq_t seq = make_seq(&f, cache, 0, 0);
            assert_int_equal(directory_seq_reserve(f.directory, seq, 199 * CHUNK), ATTN_OK);
            assert_int_equal(n_chunks_of(&f, seq), 200);
            for (uint32_t c = 0; c < 200; c++) {
                assert_int_equal(owner_of(&f, seq, c),
                                 1 + (bit_reverse_6(c % 64) * n / 64 + s) % n);
            }
        }
        fixture_close(&f);
    }
}

static void
test_a_fork_keeps_the_turn_of_its_first_chunk(void **state)
{
    fixture_t f;
    attn_seq_t fork, apart;
    uint64_t tail = 0;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 4, ATTN_PLACE_SPREAD, 1000);
    (void)make_seq(&f, cache, 0, 0);
    attn_seq_t seq = make_seq(&f, cache, 0, 0); /* slot 1 */
    assert_int_equal(directory_seq_reserve(f.directory, seq, 3 * CHUNK), ATTN_OK);
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 2, true, &fork, &tail), ATTN_OK);
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 0, false, &apart, NULL), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, fork, 7 * CHUNK), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, apart, 7 * CHUNK), ATTN_OK);
    static const uint32_t of_slot_1[] = {2, 4, 3, 1, 2, 4, 3, 1};
    static const uint32_t of_slot_3[] = {4, 2, 1, 3, 4, 2, 1, 3};
    for (uint32_t c = 0; c < 8; c++) {
        assert_int_equal(owner_of(&f, fork, c), of_slot_1[c]);
        assert_int_equal(owner_of(&f, apart, c), of_slot_3[c]);
    }

    /* Of workers 1, 3, 4: chunk 0 of `fork` is lost, so its slot counts again, 2 mod 3; that of
     * `apart` is on the third of them. */
    directory_worker_lose(f.directory, 2);
    assert_int_equal(directory_seq_reserve(f.directory, fork, 11 * CHUNK), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, apart, 11 * CHUNK), ATTN_OK);
    static const uint32_t live[] = {1, 3, 4};
    for (uint32_t c = 8; c < 12; c++) {
        assert_int_equal(owner_of(&f, fork, c), live[(bit_reverse_6(c) * 3 / 64 + 2) % 3]);
        assert_int_equal(owner_of(&f, apart, c), live[(bit_reverse_6(c) * 3 / 64 + 2) % 3]);
    }
    fixture_close(&f);
}

static void
test_whole_takes_the_emptiest_worker_and_stays(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache                 = open_cache(&f, 0, "chat", ATTN_PLACE_WHOLE);
    static const uint32_t chunks[] = {5, 7, 4}; /* room of workers 1, 2, 3 */
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(
            directory_cache_on_worker(f.directory, cache, join(&f, i + 1), chunks[i] * CHUNK_PAGES),
            ATTN_OK);
    }
    attn_seq_t a = make_seq(&f, cache, 0, UINT64_MAX);
    assert_int_equal(directory_seq_reserve(f.directory, a, 4 * CHUNK), ATTN_OK);
    for (uint32_t c = 0; c < 5; c++) {
        assert_int_equal(owner_of(&f, a, c), 2);
    }
    attn_seq_t b = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, b, CHUNK + 1), ATTN_OK);
    assert_int_equal(owner_of(&f, b, 0), 1);
    assert_int_equal(owner_of(&f, b, 2), 1); /* in advance */

    /* Worker 2 has room for two more; then the emptiest, 3, and there it stays. */
    assert_int_equal(directory_seq_reserve(f.directory, a, 9 * CHUNK), ATTN_OK);
    static const uint32_t owners[] = {2, 2, 2, 2, 2, 2, 2, 3, 3, 3};
    for (uint32_t c = 0; c < 10; c++) {
        assert_int_equal(owner_of(&f, a, c), owners[c]);
    }
    /* Until there is room again where it began. */
    assert_int_equal(directory_cache_on_worker(f.directory, cache, 2, 100 * CHUNK_PAGES), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, a, 10 * CHUNK), ATTN_OK);
    assert_int_equal(owner_of(&f, a, 10), 2);
    fixture_close(&f);
}

/* Not by chunks, which may be nearly empty, but by the tokens that were reserved. */
static void
test_whole_takes_the_worker_with_least_tokens(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = open_cache(&f, 0, "chat", ATTN_PLACE_WHOLE);
    for (uint32_t i = 1; i <= 3; i++) {
        assert_int_equal(
            directory_cache_on_worker(f.directory, cache, join(&f, i), 20 * CHUNK_PAGES), ATTN_OK);
    }
    static const struct {
        uint64_t tokens;
        uint32_t owner;
    } seqs[] = {{1, 1}, {CHUNK, 2}, {CHUNK / 2, 3}, {CHUNK, 1}, {CHUNK, 3}, {CHUNK, 2}};
    attn_seq_t made[6];
    for (uint32_t i = 0; i < 6; i++) {
        made[i] = make_seq(&f, cache, 0, 0);
        assert_int_equal(directory_seq_reserve(f.directory, made[i], seqs[i].tokens), ATTN_OK);
        assert_int_equal(owner_of(&f, made[i], 0), seqs[i].owner);
    }
    /* Workers 1, 2 and 3 hold 1, 2 and 1.5 chunks; growing counts, and so does freeing. */
    assert_int_equal(directory_seq_reserve(f.directory, made[0], CHUNK), ATTN_OK);
    assert_int_equal(directory_seq_free(f.directory, made[5]), ATTN_OK);
    attn_seq_t next = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, next, 1), ATTN_OK);
    assert_int_equal(owner_of(&f, next, 0), 2);
    fixture_close(&f);
}

/* Where workers are many, one that joined empty gets some of what is new and not all of it. */
static void
test_a_new_worker_is_not_flooded(void **state)
{
    enum { WORKERS = 200, SEQS = 2000 };
    static const attn_placement_t placements[] = {ATTN_PLACE_WHOLE, ATTN_PLACE_SPREAD};
    (void)state;
    for (int p = 0; p < 2; p++) {
        fixture_t f;
        uint32_t there = 0, most = 0, of[WORKERS + 2] = {0};
        fixture_open(&f, 0);
        uint64_t cache = open_cache(&f, 0, "chat", placements[p]);
        for (uint32_t i = 1; i <= WORKERS + 1; i++) {
            if (i == WORKERS + 1) {
                for (uint32_t n = 0; n < SEQS; n++) {
                    attn_seq_t seq = make_seq(&f, cache, 0, 0);
                    assert_int_equal(directory_seq_reserve(f.directory, seq, CHUNK), ATTN_OK);
                    of[owner_of(&f, seq, 0)]++;
                }
            }
            assert_int_equal(
                directory_cache_on_worker(f.directory, cache, join(&f, i), 1000 * CHUNK_PAGES),
                ATTN_OK);
        }
        for (uint32_t i = 1; i <= WORKERS; i++) {
            most = of[i] > most ? of[i] : most;
        }
        assert_in_range(most, SEQS / WORKERS, 2 * SEQS / WORKERS); /* evenly so far */
        for (uint32_t n = 0; n < 8; n++) {
            attn_seq_t seq = make_seq(&f, cache, 0, 0);
            assert_int_equal(directory_seq_reserve(f.directory, seq, CHUNK), ATTN_OK);
            there += owner_of(&f, seq, 0) == WORKERS + 1;
        }
        assert_in_range(there, 0, 4); /* it is by far the emptiest */
        fixture_close(&f);
    }
}

static void
test_auto_spreads_above_the_break_even(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 4 * CHUNK);
    uint64_t cache                 = cache_on_workers(&f, 4, ATTN_PLACE_AUTO, 100000);
    static const uint32_t spread[] = {1, 3, 2, 4, 1, 3, 2, 4}; /* of slot 0 */

    attn_seq_t expected = make_seq(&f, cache, 0, 4 * CHUNK + 1);
    assert_int_equal(directory_seq_reserve(f.directory, expected, 1), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, expected, 7 * CHUNK), ATTN_OK);
    attn_seq_t at_once = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, at_once, 7 * CHUNK), ATTN_OK);
    for (uint32_t c = 0; c < 8; c++) {
        assert_int_equal(owner_of(&f, expected, c), spread[c]);
        assert_int_equal(owner_of(&f, at_once, c), spread[c] % 4 + 1); /* slot 1: one further */
    }
    /* One that grows stays whole up to there, on the emptiest, and is spread with that first. */
    assert_int_equal(directory_cache_on_worker(f.directory, cache, 4, 200000), ATTN_OK);
    attn_seq_t grows = make_seq(&f, cache, 0, 4 * CHUNK);
    for (uint32_t c = 1; c <= 7; c++) {
        assert_int_equal(directory_seq_reserve(f.directory, grows, c * CHUNK), ATTN_OK);
        assert_int_equal(n_chunks_of(&f, grows), c + 1);
    }
    for (uint32_t c = 0; c < 8; c++) {
        assert_int_equal(owner_of(&f, grows, c), c < 4 ? 4 : (spread[c] + 2) % 4 + 1);
    }
    fixture_close(&f);
}

static void
test_auto_takes_the_break_even_of_the_cost_model(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache                  = cache_on_workers(&f, 4, ATTN_PLACE_AUTO, 100000);
    const attn_geometry_t *geometry = &directory_cache(f.directory, cache)->geometry;
    cost_constants_t constants      = directory_cost(f.directory, 0);
    uint64_t tokens                 = cost_break_even_tokens(&constants, geometry, 4);
    assert_true(tokens < 1000 * CHUNK);
    attn_seq_t below = make_seq(&f, cache, 0, tokens), above = make_seq(&f, cache, 0, tokens + 1);
    assert_int_equal(directory_seq_reserve(f.directory, below, 1), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, above, 1), ATTN_OK);
    assert_int_equal(owner_of(&f, below, 1), owner_of(&f, below, 0));
    assert_int_equal(owner_of(&f, above, 0), 2); /* slot 1 */
    assert_int_equal(owner_of(&f, above, 1), 4);
    fixture_close(&f);
}

/* What one client's runs found counts for its sequences, and for no others. */
static void
test_auto_goes_by_the_clients_own_link(void **state)
{
    fixture_t f;
    uint32_t near, far;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 4, ATTN_PLACE_AUTO, 100000);
    assert_int_equal(directory_client_open(f.directory, "near", f.now_ns, &near), ATTN_OK);
    assert_int_equal(directory_client_open(f.directory, "far", f.now_ns, &far), ATTN_OK);
    directory_client_link(f.directory, near,
                          &(cost_link_t){.hop_seconds = 1e-9, .bandwidth = 1e12});
    directory_client_link(f.directory, far, &(cost_link_t){.hop_seconds = 10});
    attn_seq_t whole, spread;
    assert_int_equal(directory_seq_create(f.directory, cache, near, 8 * CHUNK, &spread), ATTN_OK);
    assert_int_equal(directory_seq_create(f.directory, cache, far, 8 * CHUNK, &whole), ATTN_OK);
    for (int turn = 0; turn < 2; turn++) { /* in turns: each time the other's was computed last */
        assert_int_equal(directory_seq_reserve(f.directory, spread, 1 + 4 * turn * CHUNK), ATTN_OK);
        assert_int_equal(directory_seq_reserve(f.directory, whole, 1 + 4 * turn * CHUNK), ATTN_OK);
    }
    for (uint32_t c = 1; c < 4; c++) {
        assert_int_not_equal(owner_of(&f, spread, c), owner_of(&f, spread, 0));
        assert_int_equal(owner_of(&f, whole, c), owner_of(&f, whole, 0));
    }
    fixture_close(&f);
}

static void
test_reserve_refuses_and_changes_nothing(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = open_cache(&f, 0, "chat", ATTN_PLACE_SPREAD);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 1), ATTN_ERR_UNAVAILABLE);
    assert_sentence("cache \"chat\": no live worker has a region of it");
    for (uint32_t i = 1; i <= 2;
         i++) { /* room for two chunks each, and a page too few for a third */
        directory_cache_on_worker(f.directory, cache, join(&f, i), 3 * CHUNK_PAGES - 1);
    }
    assert_int_equal(directory_seq_reserve(f.directory, seq, 4 * CHUNK + 1), ATTN_ERR_EXHAUSTED);
    assert_sentence("chunk 4 of sequence");
    assert_sentence("takes 16 pages; of 2 workers the emptiest has 15 free");
    assert_int_equal(n_chunks_of(&f, seq), 0);
    assert_int_equal(
        directory_seq_reserve(f.directory, seq, ATTN_SEQ_CHUNKS_MAX * (uint64_t)CHUNK + 1),
        ATTN_ERR_TOO_LARGE);
    assert_sentence("the limit is 1048576 chunks");
    assert_int_equal(directory_seq_reserve(f.directory, seq, UINT64_MAX), ATTN_ERR_TOO_LARGE);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 4 * CHUNK),
                     ATTN_OK); /* but none in advance */
    assert_int_equal(n_chunks_of(&f, seq), 4);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 0), ATTN_OK); /* never takes away */
    assert_int_equal(n_chunks_of(&f, seq), 4);
    assert_int_equal(f.n_effects, 0);

    assert_int_equal(directory_seq_cut(f.directory, seq, 1), ATTN_OK);
    assert_int_equal(f.n_effects, 3); /* whether or not their owners ever saw them */
    attn_seq_t next = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, next, 3 * CHUNK), ATTN_OK);
    assert_int_equal(directory_seq_free(f.directory, next), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, next, 1), ATTN_ERR_NOT_FOUND);
    fixture_close(&f);
}

static void
test_reserve_passes_over_a_full_worker(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = open_cache(&f, 0, "chat", ATTN_PLACE_SPREAD);
    for (uint32_t i = 1; i <= 4; i++) {
        uint32_t chunks = i == 3 ? 0 : i == 2 ? 50 : 10;
        directory_cache_on_worker(f.directory, cache, join(&f, i), chunks * CHUNK_PAGES);
    }
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 7 * CHUNK), ATTN_OK);
    static const uint32_t owners[] = {1, 2, 2, 4, 1, 2, 2, 4}; /* 3 would have 1 and 5 */
    for (uint32_t c = 0; c < 8; c++) {
        assert_int_equal(owner_of(&f, seq, c), owners[c]);
    }
    fixture_close(&f);
}

/* ---- sequences ---- */

static void
test_sequences_belong_to_a_cache(void **state)
{
    fixture_t f;
    attn_seq_t seq;
    (void)state;
    fixture_open(&f, 0);
    uint64_t a = open_cache(&f, 0, "a", ATTN_PLACE_AUTO),
             b = open_cache(&f, 0, "b", ATTN_PLACE_AUTO);
    assert_int_equal(directory_seq_create(f.directory, 99, 0, 0, &seq), ATTN_ERR_NOT_FOUND);
    assert_sentence("cache 99 is not open");
    assert_int_equal(directory_seq_create(f.directory, a, 7, 0, &seq), ATTN_ERR_NOT_FOUND);
    assert_sentence("client 7");
    seq = make_seq(&f, a, 0, 0);
    assert_int_equal(directory_seq_check(f.directory, a, seq), ATTN_OK);
    assert_int_equal(directory_seq_check(f.directory, b, seq), ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_cache_close(f.directory, 0, a), ATTN_OK);
    assert_int_equal(directory_seq_check(f.directory, a, seq), ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_seq_free(f.directory, seq), ATTN_ERR_NOT_FOUND);
    fixture_close(&f);
}

static void
test_shared_chunks_are_released_once(void **state)
{
    fixture_t f;
    attn_seq_t fork;
    uint64_t tail = 0, copy = 0, ids[4];
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 2, ATTN_PLACE_SPREAD, 1000);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 3 * CHUNK),
                     ATTN_OK); /* 1 2 1, and 2 in advance */
    for (uint32_t c = 0; c < 4; c++) {
        ids[c] = chunk_of(&f, seq, c);
    }
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 4, true, &fork, &tail),
                     ATTN_ERR_INVALID);
    assert_sentence("has no chunk 4: its chunks are 4");
    assert_int_equal(directory_seq_fork(f.directory, seq, 9, 2, true, &fork, &tail),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 2, true, &fork, &tail), ATTN_OK);
    assert_int_equal(n_chunks_of(&f, fork), 3);
    assert_int_equal(owner_of(&f, fork, 2), 1); /* with the chunk that it shares pages with */
    assert_int_equal(chunk_of(&f, fork, 2), tail);

    assert_int_equal(directory_seq_replace(f.directory, fork, 4, 99), ATTN_ERR_INVALID);
    copy = directory_chunk_id(f.directory);
    assert_int_equal(directory_seq_replace(f.directory, fork, 1, copy), ATTN_OK);
    assert_int_equal(chunk_of(&f, fork, 1), copy);
    assert_int_equal(owner_of(&f, fork, 1), 2);
    assert_true(copy > tail);
    assert_int_equal(f.n_effects, 0);
    assert_int_equal(directory_seq_cut(f.directory, fork, 2), ATTN_OK);
    assert_int_equal(f.n_effects, 1);
    assert_effect(&f, 0, DIR_RELEASE_CHUNK, 1, cache, tail);
    assert_int_equal(directory_seq_free(f.directory, seq), ATTN_OK);
    assert_int_equal(f.n_effects, 4); /* chunk 0 is the fork's too */
    assert_effect(&f, 1, DIR_RELEASE_CHUNK, 2, cache, ids[1]);
    assert_effect(&f, 2, DIR_RELEASE_CHUNK, 1, cache, ids[2]);
    assert_effect(&f, 3, DIR_RELEASE_CHUNK, 2, cache, ids[3]);
    assert_int_equal(directory_cache_close(f.directory, 0, cache), ATTN_OK);
    assert_int_equal(f.n_effects, 8);
    assert_effect(&f, 4, DIR_RELEASE_CHUNK, 1, cache, ids[0]);
    assert_effect(&f, 5, DIR_RELEASE_CHUNK, 2, cache, copy);
    assert_effect(&f, 6, DIR_CLOSE_CACHE, 1, cache, 0);
    assert_effect(&f, 7, DIR_CLOSE_CACHE, 2, cache, 0);
    fixture_close(&f);
}

static void
test_forks_are_let_through_and_counted(void **state)
{
    fixture_t f;
    attn_seq_t fork;
    uint64_t tail;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 1, ATTN_PLACE_WHOLE, 2 * CHUNK_PAGES);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, CHUNK), ATTN_OK); /* full now */
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 0, true, &fork, &tail), ATTN_OK);
    assert_int_equal(directory_seq_free(f.directory, seq), ATTN_OK);
    attn_seq_t next = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, next, CHUNK),
                     ATTN_OK); /* beside the tail */
    assert_int_equal(n_chunks_of(&f, next), 1);
    assert_int_equal(directory_seq_fork(f.directory, next, 0, 1, false, &fork, NULL), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, fork, 2 * CHUNK), ATTN_ERR_EXHAUSTED);
    assert_sentence("the emptiest has 0 free");
    fixture_close(&f);
}

static void
test_a_lost_worker_leaves_holes(void **state)
{
    fixture_t f;
    attn_seq_t fork;
    uint64_t id;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 4, ATTN_PLACE_SPREAD, 1000);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 8 * CHUNK),
                     ATTN_OK); /* 1 3 2 4 1 3 2 4 1 */
    directory_worker_lose(f.directory, 3);
    directory_worker_lose(f.directory, 2);
    assert_int_equal(n_chunks_of(&f, seq), 9);
    assert_int_equal(f.n_effects, 0);

    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 1, true, &fork, &id), ATTN_ERR_LOST);
    assert_sentence("chunk 1 was lost with worker 3");
    assert_int_equal(directory_seq_replace(f.directory, seq, 2, 99), ATTN_ERR_LOST);
    uint64_t ids[] = {chunk_of(&f, seq, 7), chunk_of(&f, seq, 8)};
    assert_int_equal(directory_seq_cut(f.directory, seq, 5),
                     ATTN_OK); /* 5 and 6 have no owner to tell */
    assert_int_equal(f.n_effects, 2);
    assert_effect(&f, 0, DIR_RELEASE_CHUNK, 4, cache, ids[0]);
    assert_effect(&f, 1, DIR_RELEASE_CHUNK, 1, cache, ids[1]);
    fixture_close(&f);
}

static const seq_chunk_t *
chunk_at(fixture_t *f, attn_seq_t seq, uint32_t i)
{
    return seq_chunk_at(directory_sequences(f->directory), seq, i);
}

static void
test_a_lost_chunk_is_placed_anew_for_all_who_list_it(void **state)
{
    fixture_t f;
    attn_seq_t fork;
    uint64_t id;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 2, ATTN_PLACE_SPREAD, 4 * CHUNK_PAGES);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 2 * CHUNK), ATTN_OK); /* 1 2 1 */
    assert_int_equal(directory_seq_fork(f.directory, seq, 0, 2, false, &fork, &id), ATTN_OK);
    assert_int_equal(directory_seq_renew(f.directory, seq, 1, true), ATTN_ERR_INVALID);
    assert_sentence("chunk 1 of 3 was not lost");
    uint64_t old = chunk_of(&f, seq, 1);
    directory_worker_lose(f.directory, 2);

    assert_int_equal(directory_seq_renew(f.directory, seq, 3, true), ATTN_ERR_INVALID);
    assert_int_equal(directory_seq_renew(f.directory, (attn_seq_t){99}, 1, true),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_seq_renew(f.directory, seq, 1, true), ATTN_OK);
    uint64_t new = chunk_of(&f, seq, 1);
    assert_true(new > old &&new == chunk_of(&f, fork, 1));
    assert_int_equal(chunk_at(&f, fork, 1)->worker, 1);
    assert_true(chunk_at(&f, fork, 1)->sealed && !chunk_at(&f, fork, 0)->sealed);
    assert_int_equal(directory_seq_unseal(f.directory, fork, 1), ATTN_ERR_INVALID);
    assert_int_equal(directory_seq_free(f.directory, fork), ATTN_OK);
    assert_int_equal(directory_seq_unseal(f.directory, seq, 1), ATTN_OK);
    assert_false(chunk_at(&f, seq, 1)->sealed);

    /* Three chunks are on worker 1: there is room for one. */
    attn_seq_t other = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, other, CHUNK), ATTN_OK);
    assert_int_equal(join(&f, 3), 3);
    assert_int_equal(directory_cache_on_worker(f.directory, cache, 3, CHUNK_PAGES), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, other, 2 * CHUNK), ATTN_OK);
    directory_worker_lose(f.directory, 3);
    assert_int_equal(directory_seq_renew(f.directory, other, 1, false), ATTN_ERR_EXHAUSTED);
    assert_int_equal(chunk_at(&f, other, 1)->worker, 3);
    directory_worker_lose(f.directory, 1);
    assert_int_equal(directory_seq_renew(f.directory, other, 1, false), ATTN_ERR_UNAVAILABLE);
    fixture_close(&f);
}

static void
test_a_lost_chunk_in_advance_is_cut_and_reserved_again(void **state)
{
    fixture_t f;
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache = cache_on_workers(&f, 2, ATTN_PLACE_SPREAD, 1000);
    attn_seq_t seq = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 3 * CHUNK), ATTN_OK); /* 1 2 1 2 */
    uint64_t lost = chunk_of(&f, seq, 3);
    directory_worker_lose(f.directory, 2);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 4 * CHUNK), ATTN_OK);
    assert_int_equal(owner_of(&f, seq, 3), 2); /* reserving moves nothing */
    assert_int_equal(chunk_of(&f, seq, 3), lost);
    assert_int_equal(directory_seq_cut(f.directory, seq, 3), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, seq, 4 * CHUNK), ATTN_OK);
    assert_int_equal(owner_of(&f, seq, 1), 2);
    assert_int_equal(owner_of(&f, seq, 3), 1);
    assert_true(chunk_of(&f, seq, 3) > lost);
    assert_int_equal(f.n_effects, 1); /* chunk 4, which was in advance on worker 1 */
    fixture_close(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spread_follows_the_formula),
        cmocka_unit_test(test_a_fork_keeps_the_turn_of_its_first_chunk),
        cmocka_unit_test(test_whole_takes_the_emptiest_worker_and_stays),
        cmocka_unit_test(test_whole_takes_the_worker_with_least_tokens),
        cmocka_unit_test(test_a_new_worker_is_not_flooded),
        cmocka_unit_test(test_auto_spreads_above_the_break_even),
        cmocka_unit_test(test_auto_takes_the_break_even_of_the_cost_model),
        cmocka_unit_test(test_auto_goes_by_the_clients_own_link),
        cmocka_unit_test(test_reserve_refuses_and_changes_nothing),
        cmocka_unit_test(test_reserve_passes_over_a_full_worker),
        cmocka_unit_test(test_sequences_belong_to_a_cache),
        cmocka_unit_test(test_shared_chunks_are_released_once),
        cmocka_unit_test(test_forks_are_let_through_and_counted),
        cmocka_unit_test(test_a_lost_worker_leaves_holes),
        cmocka_unit_test(test_a_lost_chunk_is_placed_anew_for_all_who_list_it),
        cmocka_unit_test(test_a_lost_chunk_in_advance_is_cut_and_reserved_again),
    };
    return cmocka_run_group_tests_name("balancer.directory_sequences", tests, NULL, NULL);
}
