/*
 * Random histories against a plain model: pages are accounted exactly, reserving never fills
 * a worker above its region, spread chunks are where the formula says unless there was no
 * room, and every chunk of a live worker is released there once, when nobody lists it any
 * more. Looks inside (directory_int.h) for the pages counted. Also measures placement.
 */
#include "balancer/directory_int.h"
#include "balancer/test_directory.h"

#define ROUNDS 40
#define STEPS 400
#define SEQS_MAX 64
#define IDS_MAX 65536
#define WORKERS_MAX 128
#define CLIENTS 3
#define MOVES_MAX 8

static uint64_t random_state = 7;

static uint32_t
random_below(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % n);
}

typedef struct chunk_model {
    uint64_t cache;
    uint32_t worker;
    uint32_t released; /* effects */
    bool listed, listed_before;
    bool copy_of_none; /* of a move that failed: nobody ever lists it */
} chunk_model_t;

typedef struct model {
    fixture_t f;
    uint64_t caches[2];
    uint32_t clients[CLIENTS];
    bool alive[WORKERS_MAX];
    uint32_t n_workers;
    attn_seq_t seqs[SEQS_MAX];
    uint32_t owner[SEQS_MAX]; /* index of the client */
    uint32_t n_seqs;
    chunk_model_t chunks[IDS_MAX];
    uint64_t last_id;
    dir_move_t moves[MOVES_MAX]; /* begun */
    uint32_t n_moves;
    uint64_t moved;
} model_t;

static model_t model;

static void
add_worker(model_t *m, uint32_t room)
{
    uint32_t id = join(&m->f, m->n_workers + 1);

    assert_int_equal(id, ++m->n_workers);
    m->alive[id] = true;
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(directory_cache_on_worker(m->f.directory, m->caches[i], id,
                                                   room * CHUNK_PAGES + random_below(CHUNK_PAGES)),
                         ATTN_OK);
    }
}

static void
list_sequence(model_t *m, attn_seq_t seq)
{
    seq_info_t info;

    assert_int_equal(seq_describe(directory_sequences(m->f.directory), seq, &info), ATTN_OK);
    for (uint32_t c = 0; c < info.n_chunks; c++) {
        const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(m->f.directory), seq, c);
        assert_true(chunk->id < IDS_MAX);
        chunk_model_t *known = &m->chunks[chunk->id];
        known->cache         = info.cache;
        known->worker        = chunk->worker;
        known->listed        = true;
        m->last_id           = chunk->id > m->last_id ? chunk->id : m->last_id;
    }
}

/* Chunks on their way there. */
static uint32_t
coming(const model_t *m, uint64_t cache, uint32_t worker)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < m->n_moves; i++) {
        n += m->moves[i].cache == cache && m->moves[i].to == worker;
    }
    return n;
}

static void
check_pages(const model_t *m)
{
    static uint32_t count[2][WORKERS_MAX];

    memset(count, 0, sizeof(count));
    for (uint64_t id = 1; id <= m->last_id; id++) {
        if (m->chunks[id].listed) {
            count[m->chunks[id].cache == m->caches[1]][m->chunks[id].worker]++;
        }
    }
    for (uint32_t i = 0; i < 2; i++) {
        const dir_cache_entry_t *cache = dir_cache_find(m->f.directory, m->caches[i]);
        for (uint32_t w = 1; cache && w <= m->n_workers; w++) {
            const dir_spot_t *spot = dir_spot_find(cache, w);
            assert_int_equal(spot != NULL, m->alive[w]);
            if (spot) {
                assert_int_equal(spot->placed, (uint64_t)count[i][w] * CHUNK_PAGES);
                assert_int_equal(spot->coming, (uint64_t)coming(m, m->caches[i], w) * CHUNK_PAGES);
            }
        }
    }
}

/* After every step: effects are of chunks that just went out of use, each exactly once. */
static void
check_step(model_t *m)
{
    for (uint32_t i = 0; i < m->f.n_effects; i++) {
        const dir_effect_t *effect = &m->f.effects[i];
        if (effect->type == DIR_RELEASE_CHUNK && effect->chunk <= m->last_id &&
            m->chunks[effect->chunk].copy_of_none) {
            m->chunks[effect->chunk].released++; /* what came of a move that failed */
        } else if (effect->type == DIR_RELEASE_CHUNK) {
            assert_in_range(effect->chunk, 1, m->last_id);
            assert_int_equal(effect->cache, m->chunks[effect->chunk].cache);
            assert_int_equal(effect->worker, m->chunks[effect->chunk].worker);
            m->chunks[effect->chunk].released++;
        }
    }
    m->f.n_effects = 0;
    for (uint64_t id = 1; id <= m->last_id; id++) {
        m->chunks[id].listed_before = m->chunks[id].listed;
        m->chunks[id].listed        = false;
    }
    for (uint32_t i = 0; i < m->n_seqs; i++) {
        list_sequence(m, m->seqs[i]);
    }
    for (uint64_t id = 1; id <= m->last_id; id++) {
        const chunk_model_t *chunk = &m->chunks[id];
        assert_false(chunk->listed && chunk->copy_of_none);
        if (chunk->listed) {
            assert_int_equal(chunk->released, 0);
        } else if (chunk->listed_before) {
            assert_int_equal(chunk->released, m->alive[chunk->worker]);
        } else {
            assert_true(chunk->released <= 1);
        }
    }
    assert_int_equal(seq_count(directory_sequences(m->f.directory)), m->n_seqs);
    check_pages(m);
}

/* Where chunk c belongs by directory.h, as the sequence is now. */
static const dir_spot_t *
spot_by_formula(model_t *m, const dir_cache_entry_t *cache, attn_seq_t seq, uint32_t c)
{
    uint32_t n = cache->n_spots, first = (uint32_t)seq.id % n, reversed = 0;

    for (uint32_t bit = 0; bit < 6; bit++) {
        reversed |= (c >> bit & 1) << (5 - bit);
    }
    for (uint32_t i = 0; c > 0 && i < n; i++) {
        first = cache->spots[i].worker == owner_of(&m->f, seq, 0) ? i : first;
    }
    return &cache->spots[(reversed * n / 64 + first) % n];
}

/* Chunks placed by a reserve: live owner, inside its region, by the formula or for lack of room. */
static void
check_placed(model_t *m, attn_seq_t seq, uint32_t from)
{
    seq_info_t info;

    assert_int_equal(seq_describe(directory_sequences(m->f.directory), seq, &info), ATTN_OK);
    const dir_cache_entry_t *cache = dir_cache_find(m->f.directory, info.cache);
    for (uint32_t c = from; c < info.n_chunks; c++) {
        const dir_spot_t *spot = dir_spot_find(cache, owner_of(&m->f, seq, c));
        assert_non_null(spot);
        assert_true(spot->placed <= spot->n_pages);
        if (cache->cache.geometry.placement == ATTN_PLACE_SPREAD) {
            const dir_spot_t *by_formula = spot_by_formula(m, cache, seq, c);
            assert_true(spot == by_formula ||
                        by_formula->placed + by_formula->coming + CHUNK_PAGES >
                            by_formula->n_pages);
        }
    }
}

static void
step_reserve(model_t *m, uint32_t i)
{
    uint32_t before = n_chunks_of(&m->f, m->seqs[i]);
    uint64_t tokens = random_below(8) * CHUNK + random_below(CHUNK);

    attn_status_t status = directory_seq_reserve(m->f.directory, m->seqs[i], tokens);
    uint32_t after       = n_chunks_of(&m->f, m->seqs[i]);
    if (status == ATTN_OK) {
        assert_true((uint64_t)after * CHUNK >= tokens && after > 0);
        check_placed(m, m->seqs[i], before);
    } else {
        assert_true(status == ATTN_ERR_EXHAUSTED || status == ATTN_ERR_UNAVAILABLE);
        assert_int_equal(after, before);
    }
}

static void
forget(model_t *m, uint32_t i)
{
    m->n_seqs--;
    m->seqs[i]  = m->seqs[m->n_seqs];
    m->owner[i] = m->owner[m->n_seqs];
}

static void
remember(model_t *m, attn_seq_t seq, uint32_t client)
{
    m->seqs[m->n_seqs]    = seq;
    m->owner[m->n_seqs++] = client;
}

static void
step_fork(model_t *m, uint32_t i, uint32_t client)
{
    uint32_t n = n_chunks_of(&m->f, m->seqs[i]), n_shared = random_below(n + 1);
    bool with_tail = random_below(2);
    attn_seq_t fork;
    uint64_t tail;

    attn_status_t status = directory_seq_fork(m->f.directory, m->seqs[i], m->clients[client],
                                              n_shared, with_tail, &fork, &tail);
    if (status == ATTN_OK) {
        remember(m, fork, client);
        assert_int_equal(n_chunks_of(&m->f, fork), n_shared + with_tail);
    } else {
        assert_true(with_tail);
        assert_int_equal(status, n_shared == n ? ATTN_ERR_INVALID : ATTN_ERR_LOST);
    }
}

static void
step_client_goes(model_t *m, uint32_t client)
{
    uint64_t cache;
    bool created;

    directory_client_close(m->f.directory, m->clients[client]);
    for (uint32_t i = m->n_seqs; i-- > 0;) {
        if (m->owner[i] == client) {
            forget(m, i);
        }
    }
    assert_int_equal(
        directory_client_open(m->f.directory, "again", m->f.now_ns, &m->clients[client]), ATTN_OK);
    for (uint32_t i = 0; i < 2; i++) {
        attn_geometry_t geometry = small_geometry(i ? ATTN_PLACE_AUTO : ATTN_PLACE_SPREAD);
        assert_int_equal(directory_cache_open(m->f.directory, m->clients[client],
                                              i ? "auto" : "spread", &geometry, &cache, &created),
                         ATTN_OK);
        assert_false(created);
        assert_int_equal(cache, m->caches[i]);
    }
}

static void
step_worker(model_t *m)
{
    uint32_t id = 1 + random_below(m->n_workers);

    if (m->alive[id]) {
        directory_worker_lose(m->f.directory, id);
        m->alive[id] = false;
    } else if (m->n_workers + 1 < WORKERS_MAX) {
        add_worker(m, 2 + random_below(30));
    }
}

/* A chunk of a lost worker gets a live one, with room, and another id; any other is refused. */
static void
step_renew(model_t *m, uint32_t i, uint32_t c)
{
    const seq_table_t *table = directory_sequences(m->f.directory);
    seq_chunk_t before       = *seq_chunk_at(table, m->seqs[i], c);
    bool sealed              = random_below(2);
    attn_status_t status     = directory_seq_renew(m->f.directory, m->seqs[i], c, sealed);
    const seq_chunk_t *after = seq_chunk_at(table, m->seqs[i], c);

    if (status != ATTN_OK) {
        assert_true(m->alive[before.worker]
                        ? status == ATTN_ERR_INVALID
                        : status == ATTN_ERR_EXHAUSTED || status == ATTN_ERR_UNAVAILABLE);
        assert_true(after->id == before.id && after->worker == before.worker);
        return;
    }
    assert_true(!m->alive[before.worker] && m->alive[after->worker]);
    assert_true(after->id > m->last_id && after->references == before.references);
    m->last_id = after->id;
    assert_int_equal(after->sealed, before.sealed || sealed);
}

/* Begin a move of any chunk to any worker; with room for it, unless it was refused. */
static void
step_move_begin(model_t *m, uint32_t i, uint32_t c)
{
    dir_move_t *move = &m->moves[m->n_moves];
    uint32_t to      = random_below(m->n_workers + 1);

    if (m->n_moves == MOVES_MAX) {
        return;
    }
    const seq_chunk_t before = *seq_chunk_at(directory_sequences(m->f.directory), m->seqs[i], c);
    attn_status_t status     = directory_move_begin(m->f.directory, m->seqs[i], c, to, move);
    if (status != ATTN_OK) {
        assert_true(status == ATTN_ERR_EXHAUSTED || status == ATTN_ERR_UNAVAILABLE ||
                    (status == ATTN_ERR_LOST && !m->alive[before.worker]) ||
                    (status == ATTN_ERR_INVALID && before.worker == to));
        return;
    }
    assert_true(m->alive[move->from] && m->alive[move->to] && move->from != move->to);
    assert_int_equal(move->from, before.worker);
    assert_true(to == 0 || move->to == to);
    assert_true(move->copy > m->last_id && move->copy < IDS_MAX);
    m->last_id                   = move->copy;
    m->chunks[move->copy].cache  = move->cache;
    m->chunks[move->copy].worker = move->to;
    m->n_moves++;
    const dir_spot_t *spot = dir_spot_find(dir_cache_find(m->f.directory, move->cache), move->to);
    assert_true(spot->placed + spot->coming <= spot->n_pages || spot->placed > spot->n_pages);
}

/* End one, well if that is possible. */
static void
step_move_end(model_t *m, bool well)
{
    uint32_t k               = random_below(m->n_moves);
    dir_move_t move          = m->moves[k];
    const seq_table_t *table = directory_sequences(m->f.directory);
    const seq_chunk_t *now   = seq_chunk_at(table, move.seq, move.i);
    bool there               = now && now->id == move.chunk;

    attn_status_t status = well ? directory_move_done(m->f.directory, &move) : ATTN_ERR_CANCELLED;
    if (status == ATTN_OK) {
        assert_true(there && m->alive[move.to]);
        assert_int_equal(now->worker, move.to);
        assert_int_equal(now->id, move.copy);
        m->moved++;
    } else {
        assert_true(!well || !there || !m->alive[move.to]);
        directory_move_failed(m->f.directory, &move, random_below(2), random_below(2));
        m->chunks[move.copy].copy_of_none = true;
    }
    m->moves[k] = m->moves[--m->n_moves];
}

static void
step_sequence(model_t *m, uint32_t i)
{
    uint32_t n = n_chunks_of(&m->f, m->seqs[i]);

    switch (random_below(10)) {
    case 8:
        if (n > 0) {
            step_move_begin(m, i, random_below(n));
        }
        break;
    case 0:
        assert_int_equal(directory_seq_free(m->f.directory, m->seqs[i]), ATTN_OK);
        forget(m, i);
        break;
    case 1:
        assert_int_equal(directory_seq_cut(m->f.directory, m->seqs[i], random_below(n + 1)),
                         ATTN_OK);
        break;
    case 2:
        if (n > 0) {
            attn_status_t status = directory_seq_replace(
                m->f.directory, m->seqs[i], random_below(n), directory_chunk_id(m->f.directory));
            assert_true(status == ATTN_OK || status == ATTN_ERR_LOST);
        }
        break;
    case 3:
    case 4:
        for (uint32_t c = 0; c < n; c++) {
            step_renew(m, i, c);
        }
        break;
    default:
        step_reserve(m, i);
    }
}

static void
step(model_t *m)
{
    uint32_t client = random_below(CLIENTS), what = random_below(100);

    if (m->n_moves > 0 && random_below(8) == 0) {
        step_move_end(m, random_below(4) > 0);
    } else if (what < 2) {
        step_client_goes(m, client);
    } else if (what < 5) {
        step_worker(m);
    } else if (m->n_seqs == 0 || (what < 20 && m->n_seqs < SEQS_MAX)) {
        remember(m,
                 make_seq(&m->f, m->caches[random_below(2)], m->clients[client],
                          random_below(3) * 4 * CHUNK),
                 client);
    } else if (what < 30 && m->n_seqs < SEQS_MAX) {
        step_fork(m, random_below(m->n_seqs), client);
    } else {
        step_sequence(m, random_below(m->n_seqs));
    }
}

static void
model_open(model_t *m)
{
    memset(m, 0, sizeof(*m));
    fixture_open(&m->f, 3 * CHUNK);
    for (uint32_t c = 0; c < CLIENTS; c++) {
        assert_int_equal(directory_client_open(m->f.directory, "c", m->f.now_ns, &m->clients[c]),
                         ATTN_OK);
        m->caches[0] = open_cache(&m->f, m->clients[c], "spread", ATTN_PLACE_SPREAD);
        m->caches[1] = open_cache(&m->f, m->clients[c], "auto", ATTN_PLACE_AUTO);
    }
    for (uint32_t n = 1 + random_below(9); n > 0; n--) {
        add_worker(m, 2 + random_below(30));
    }
}

static void
test_random_histories(void **state)
{
    model_t *m     = &model;
    uint64_t moved = 0;
    (void)state;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t n_alive = 0, n_closed = 0;
        model_open(m);
        for (uint32_t i = 0; i < STEPS; i++) {
            step(m);
            check_step(m);
        }
        while (m->n_moves > 0) {
            step_move_end(m, true);
            check_step(m);
        }
        moved += m->moved;
        assert_int_equal(seq_table_check(directory_sequences(m->f.directory)), ATTN_OK);

        /* Everybody goes: what is left is released, then the regions are closed. */
        for (uint32_t c = 0; c < CLIENTS; c++) {
            directory_client_close(m->f.directory, m->clients[c]);
        }
        for (uint32_t i = 0; i < m->f.n_effects; i++) {
            n_closed += m->f.effects[i].type == DIR_CLOSE_CACHE;
        }
        for (uint32_t w = 1; w <= m->n_workers; w++) {
            n_alive += m->alive[w];
        }
        assert_int_equal(n_closed, 2 * n_alive);
        m->n_seqs = 0;
        check_step(m);
        assert_null(directory_cache(m->f.directory, m->caches[0]));
        assert_int_equal(seq_chunk_count(directory_sequences(m->f.directory)), 0);
        fixture_close(&m->f);
    }
    assert_true(moved > 100);
}

/* ---- speed ---- */

static int
compare_ns(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static void
measure(attn_placement_t placement, const char *name)
{
    enum { WORKERS = 1000, SEQS = 100000 };
    static uint64_t ns[SEQS];
    static fixture_t f;

    fixture_open(&f, 0);
    uint64_t cache = open_cache(&f, 0, "chat", placement);
    for (uint32_t i = 1; i <= WORKERS; i++) {
        assert_int_equal(
            directory_cache_on_worker(f.directory, cache, join(&f, i), 1000 * CHUNK_PAGES),
            ATTN_OK);
    }
    for (uint32_t i = 0; i < SEQS; i++) {
        attn_seq_t seq;
        uint64_t start = attn_now_ns();
        assert_int_equal(directory_seq_create(f.directory, cache, 0, 0, &seq), ATTN_OK);
        assert_int_equal(directory_seq_reserve(f.directory, seq, 1), ATTN_OK);
        ns[i] = attn_now_ns() - start;
    }
    qsort(ns, SEQS, sizeof(ns[0]), compare_ns);
    const seq_table_t *table = directory_sequences(f.directory);
    uint64_t bytes           = seq_table_bytes(table) + DIR_WORKERS_MAX * sizeof(dir_worker_t) +
                     dir_cache_find(f.directory, cache)->room_spots * sizeof(dir_spot_t);
    printf(
        "%s, %u workers, %u sequences: create and reserve p50 %.2f us, p99 %.2f us, most %.0f us; "
        "%.1f bytes a chunk\n",
        name, WORKERS, SEQS, (double)ns[SEQS / 2] / 1e3, (double)ns[SEQS / 100 * 99] / 1e3,
        (double)ns[SEQS - 1] / 1e3, (double)bytes / (double)seq_chunk_count(table));
    assert_true(ns[SEQS / 100 * 99] < 100 * ATTN_NS_PER_US);
    assert_true(bytes <= 100 * seq_chunk_count(table));
    fixture_close(&f);
}

static void
test_placement_is_fast_and_small(void **state)
{
    (void)state;
    measure(ATTN_PLACE_WHOLE, "whole");
    measure(ATTN_PLACE_SPREAD, "spread");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_histories),
        cmocka_unit_test(test_placement_is_fast_and_small),
    };
    return cmocka_run_group_tests_name("balancer.directory_model", tests, NULL, NULL);
}
