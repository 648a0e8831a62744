/* directory_moves_test.c: chunks that change their owner, and workers that are to be empty. */
#include "balancer/directory_int.h"
#include "balancer/test_directory.h"

#define OK(call) assert_int_equal((call), ATTN_OK)

typedef struct world {
    fixture_t f;
    uint64_t cache;
    attn_seq_t seq; /* of three chunks, and one in advance */
} world_t;

static void
world_open(world_t *w, uint32_t workers, uint32_t chunks_each)
{
    fixture_open(&w->f, 0);
    w->cache = open_cache(&w->f, 0, "chat", ATTN_PLACE_SPREAD);
    for (uint32_t i = 1; i <= workers; i++) {
        OK(directory_cache_on_worker(w->f.directory, w->cache, join(&w->f, i),
                                     chunks_each * CHUNK_PAGES));
    }
    w->seq = make_seq(&w->f, w->cache, 0, 0);
    OK(directory_seq_reserve(w->f.directory, w->seq, 3 * CHUNK));
    assert_int_equal(n_chunks_of(&w->f, w->seq), 4);
    w->f.n_effects = 0;
}

static const dir_spot_t *
spot(world_t *w, uint32_t worker)
{
    return dir_spot_find(dir_cache_find(w->f.directory, w->cache), worker);
}

static void
test_a_move_has_two_ends(void **state)
{
    static world_t w;
    dir_move_t move;

    (void)state;
    world_open(&w, 3, 10);
    uint32_t from = owner_of(&w.f, w.seq, 1), to = from % 3 + 1;
    uint64_t chunk = chunk_of(&w.f, w.seq, 1), epoch = directory_epoch(w.f.directory);
    uint64_t there = spot(&w, to)->placed, here = spot(&w, from)->placed;
    uint64_t fill = spot(&w, from)->fill + spot(&w, to)->fill;

    OK(directory_move_begin(w.f.directory, w.seq, 1, to, &move));
    assert_int_equal(move.from, from);
    assert_int_equal(move.chunk, chunk);
    assert_int_not_equal(move.copy, chunk);
    assert_int_equal(spot(&w, to)->coming, CHUNK_PAGES);
    assert_int_equal(owner_of(&w.f, w.seq, 1), from); /* still */
    directory_move_failed(w.f.directory, &move, true, true);
    assert_int_equal(spot(&w, to)->coming, 0);
    assert_int_equal(w.f.n_effects, 2);
    assert_effect(&w.f, 0, DIR_KEEP_CHUNK, from, w.cache, chunk);
    assert_int_equal(w.f.effects[0].move, move.copy);
    assert_effect(&w.f, 1, DIR_RELEASE_CHUNK, to, w.cache, move.copy);
    assert_int_equal(directory_epoch(w.f.directory), epoch);
    assert_int_equal(chunk_of(&w.f, w.seq, 1), chunk);

    uint64_t former = move.copy;
    w.f.n_effects   = 0;
    OK(directory_move_begin(w.f.directory, w.seq, 1, to, &move));
    assert_int_not_equal(move.copy, former); /* what is left of one attempt is not the next one's */
    OK(directory_move_done(w.f.directory, &move));
    assert_int_equal(owner_of(&w.f, w.seq, 1), to);
    assert_int_equal(chunk_of(&w.f, w.seq, 1), move.copy);
    assert_int_equal(directory_epoch(w.f.directory), epoch + 1);
    assert_int_equal(w.f.n_effects, 1);
    assert_effect(&w.f, 0, DIR_RELEASE_CHUNK, from, w.cache, chunk);
    assert_int_equal(spot(&w, to)->placed, there + CHUNK_PAGES);
    assert_int_equal(spot(&w, from)->placed, here - CHUNK_PAGES);
    assert_int_equal(spot(&w, from)->fill + spot(&w, to)->fill, fill);
    assert_int_equal(directory_counts(w.f.directory)->chunks_moved, 1);
    assert_int_equal(directory_counts(w.f.directory)->moves_failed, 1);
    OK(directory_seq_free(w.f.directory, w.seq));
    fixture_close(&w.f);
}

/* A fork has the chunk, too, and finds it where it is. */
static void
test_all_that_share_a_chunk_see_it_move(void **state)
{
    static world_t w;
    dir_move_t move;
    attn_seq_t fork;

    (void)state;
    world_open(&w, 2, 10);
    OK(directory_seq_fork(w.f.directory, w.seq, 0, 2, false, &fork, NULL));
    uint32_t to = 3 - owner_of(&w.f, fork, 0);
    OK(directory_move_begin(w.f.directory, fork, 0, 0, &move)); /* there is one other */
    assert_int_equal(move.to, to);
    OK(directory_seq_free(w.f.directory, w.seq)); /* it lives on in the fork */
    w.f.n_effects = 0;
    OK(directory_move_done(w.f.directory, &move));
    assert_int_equal(owner_of(&w.f, fork, 0), to);
    OK(directory_seq_free(w.f.directory, fork));
    assert_effect(&w.f, 1, DIR_RELEASE_CHUNK, to, w.cache, move.copy);
    fixture_close(&w.f);
}

static void
test_what_cannot_be_moved(void **state)
{
    static world_t w;
    dir_move_t move;

    (void)state;
    world_open(&w, 2, 4);
    uint32_t owner = owner_of(&w.f, w.seq, 0);
    assert_int_equal(directory_move_begin(w.f.directory, w.seq, 9, 1, &move), ATTN_ERR_INVALID);
    assert_int_equal(directory_move_begin(w.f.directory, w.seq, 0, owner, &move), ATTN_ERR_INVALID);
    assert_int_equal(directory_move_begin(w.f.directory, w.seq, 0, 77, &move),
                     ATTN_ERR_UNAVAILABLE);
    assert_int_equal(directory_move_begin(w.f.directory, (attn_seq_t){99}, 0, 1, &move),
                     ATTN_ERR_NOT_FOUND);

    /* Two have room there; a third has not while those are on their way. */
    dir_move_t others[2];
    uint32_t other = 3 - owner, n = 0;
    for (uint32_t i = 0; i < 4; i++) {
        if (owner_of(&w.f, w.seq, i) == owner) {
            OK(directory_move_begin(w.f.directory, w.seq, i, 0, &others[n++]));
        }
    }
    assert_int_equal(n, 2);
    attn_seq_t more = make_seq(&w.f, w.cache, 0, 0);
    OK(directory_seq_reserve(w.f.directory, more, 1));
    uint32_t i = owner_of(&w.f, more, 0) == owner ? 0 : 1;
    assert_int_equal(owner_of(&w.f, more, i), owner);
    assert_int_equal(directory_move_begin(w.f.directory, more, i, other, &move),
                     ATTN_ERR_EXHAUSTED);
    directory_move_failed(w.f.directory, &others[0], false, false);
    OK(directory_move_begin(w.f.directory, more, i, other, &move));
    directory_move_failed(w.f.directory, &move, false, false);
    directory_move_failed(w.f.directory, &others[1], false, false);
    assert_int_equal(w.f.n_effects, 0);

    directory_worker_lose(w.f.directory, other);
    assert_int_equal(directory_move_begin(w.f.directory, w.seq, 0, 0, &move),
                     owner == owner_of(&w.f, w.seq, 0) ? ATTN_ERR_UNAVAILABLE : ATTN_ERR_LOST);
    directory_worker_lose(w.f.directory, owner);
    assert_int_equal(directory_move_begin(w.f.directory, w.seq, 0, 0, &move), ATTN_ERR_LOST);
    OK(directory_seq_free(w.f.directory, w.seq));
    OK(directory_seq_free(w.f.directory, more));
    fixture_close(&w.f);
}

/* Either worker, the sequence, or the cache goes while the chunk is on its way. */
static void
test_what_goes_meanwhile(void **state)
{
    static world_t w;
    dir_move_t move;

    (void)state;
    for (uint32_t what = 0; what < 5; what++) {
        world_open(&w, 2, 10);
        uint32_t from = owner_of(&w.f, w.seq, 0), to = 3 - from;
        OK(directory_move_begin(w.f.directory, w.seq, 0, to, &move));
        w.f.n_effects = 0;
        if (what == 0) { /* the old owner: what it had is at the new one */
            directory_worker_lose(w.f.directory, from);
            OK(directory_move_done(w.f.directory, &move));
            assert_int_equal(w.f.n_effects, 0);
            assert_int_equal(owner_of(&w.f, w.seq, 0), to);
        } else if (what == 1) {
            directory_worker_lose(w.f.directory, to);
            assert_int_equal(directory_move_done(w.f.directory, &move), ATTN_ERR_UNAVAILABLE);
        } else if (what == 2) {
            OK(directory_seq_cut(w.f.directory, w.seq, 0));
            OK(directory_seq_reserve(w.f.directory, w.seq, 1)); /* another chunk 0 */
            assert_int_equal(directory_move_done(w.f.directory, &move), ATTN_ERR_NOT_FOUND);
        } else if (what == 3) {
            OK(directory_seq_free(w.f.directory, w.seq));
            assert_int_equal(directory_move_done(w.f.directory, &move), ATTN_ERR_NOT_FOUND);
        } else {
            OK(directory_cache_close(w.f.directory, 0, w.cache));
            assert_int_equal(directory_move_done(w.f.directory, &move), ATTN_ERR_NOT_FOUND);
        }
        if (what > 0) {
            directory_move_failed(w.f.directory, &move, true, true);
        }
        if (what < 3) {
            OK(directory_seq_free(w.f.directory, w.seq));
        }
        fixture_close(&w.f);
    }
}

static void
test_nothing_is_placed_where_all_leaves(void **state)
{
    static world_t w;
    dir_move_t move;
    seq_walk_t walk = {0};
    seq_place_t places[2];

    (void)state;
    world_open(&w, 3, 20);
    uint32_t leaving = owner_of(&w.f, w.seq, 0);
    uint64_t n       = directory_worker_chunks(w.f.directory, leaving);
    OK(directory_worker_leave(w.f.directory, leaving, true));
    assert_int_equal(directory_worker_leave(w.f.directory, 9, true), ATTN_ERR_NOT_FOUND);
    attn_seq_t more = make_seq(&w.f, w.cache, 0, 0);
    OK(directory_seq_reserve(w.f.directory, more, 9 * CHUNK));
    assert_int_equal(directory_worker_chunks(w.f.directory, leaving), n);
    uint64_t late = open_cache(&w.f, 0, "late", ATTN_PLACE_SPREAD); /* nor of a later cache */
    for (uint32_t i = 1; i <= 3; i++) {
        OK(directory_cache_on_worker(w.f.directory, late, i, 20 * CHUNK_PAGES));
    }
    attn_seq_t other = make_seq(&w.f, late, 0, 0);
    OK(directory_seq_reserve(w.f.directory, other, 9 * CHUNK));
    assert_int_equal(directory_worker_chunks(w.f.directory, leaving), n);
    OK(directory_move_begin(w.f.directory, w.seq, owner_of(&w.f, w.seq, 1) == leaving ? 2 : 1, 0,
                            &move));
    assert_int_not_equal(move.to, leaving);
    directory_move_failed(w.f.directory, &move, false, false);
    assert_int_equal(directory_move_begin(w.f.directory, more, 0, leaving, &move),
                     ATTN_ERR_EXHAUSTED);

    /* All that is there, found by a walk in pieces. */
    uint64_t moved = 0;
    while (!walk.over) {
        uint32_t found = seq_walk_owned(directory_sequences(w.f.directory), leaving, &walk, places,
                                        1 + moved % 2);
        for (uint32_t p = 0; p < found; p++) {
            OK(directory_move_begin(w.f.directory, places[p].seq, places[p].i, 0, &move));
            OK(directory_move_done(w.f.directory, &move));
            moved++;
        }
    }
    assert_int_equal(moved, n);
    assert_int_equal(directory_worker_chunks(w.f.directory, leaving), 0);
    OK(directory_worker_leave(w.f.directory, leaving, false));
    OK(directory_move_begin(w.f.directory, more, 0, leaving, &move));
    directory_move_failed(w.f.directory, &move, false, false);
    OK(directory_seq_free(w.f.directory, w.seq));
    OK(directory_seq_free(w.f.directory, more));
    OK(directory_seq_free(w.f.directory, other));
    fixture_close(&w.f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_move_has_two_ends),
        cmocka_unit_test(test_all_that_share_a_chunk_see_it_move),
        cmocka_unit_test(test_what_cannot_be_moved),
        cmocka_unit_test(test_what_goes_meanwhile),
        cmocka_unit_test(test_nothing_is_placed_where_all_leaves),
    };
    return cmocka_run_group_tests_name("balancer.directory_moves", tests, NULL, NULL);
}
