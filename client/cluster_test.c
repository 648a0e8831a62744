/* cluster_test.c: sequences of a cluster against a model, refusals, threads, and what is left
 * behind. */
#include "client/test_cluster.h"

/* ---- against a model ---- */

#define SEQS 6u

static void
random_operation(fixture_t *f, model_t *models, bool *there)
{
    uint32_t i = pick(SEQS), j = pick(SEQS);
    uint64_t cut = models[i].length > 0 ? pick((uint32_t)models[i].length + 1) : 0;

    cut = pick(4) == 0 ? cut / CHUNK * CHUNK : cut; /* full chunks, too */
    if (!there[i]) {
        create(f, &models[i], pick(2) ? 0 : pick(5000));
        there[i] = true;
        return;
    }
    switch (pick(8)) {
    case 0:
        OK(cluster_seq_truncate(f->cluster, f->cache, models[i].seq, cut));
        models[i].length = cut;
        break;
    case 1:
        OK(cluster_seq_free(f->cluster, f->cache, models[i].seq));
        there[i] = false;
        break;
    case 2:
    case 3:
        if (!there[j]) {
            OK(fork_model(f, &models[i], cut, &models[j]));
            there[j] = true;
        }
        break;
    case 4:
        assert_int_equal(fork_model(f, &models[i], models[i].length + 1, &models[j]),
                         ATTN_ERR_INVALID);
        assert_int_equal(
            cluster_seq_truncate(f->cluster, f->cache, models[i].seq, models[i].length + 1),
            ATTN_ERR_INVALID);
        break;
    default:
        if (models[i].length < TOKENS_MAX - 400) {
            append(f, &models[i], 1 + pick(400));
        }
    }
}

static void
run_model(uint32_t n, attn_placement_t placement)
{
    fixture_t f;
    model_t *models  = calloc(SEQS, sizeof(*models));
    bool there[SEQS] = {false};
    attn_cluster_info_t info;

    fixture_open(&f, n, placement, NOT_LOST);
    for (uint32_t op = 0; op < 250; op++) {
        random_operation(&f, models, there);
        for (uint32_t i = 0; i < SEQS && op % 5 == 0; i++) {
            if (there[i]) {
                check_model(&f, &models[i]);
            }
        }
        for (uint32_t i = 0; i < n && op % 25 == 0; i++) {
            OK(engine_check(f.engines[i]));
        }
    }
    for (uint32_t i = 0; i < SEQS; i++) {
        if (there[i]) {
            check_model(&f, &models[i]);
            OK(cluster_seq_free(f.cluster, f.cache, models[i].seq));
            assert_int_equal(cluster_seq_free(f.cluster, f.cache, models[i].seq),
                             ATTN_ERR_NOT_FOUND);
        }
    }
    expect_empty(&f, 0);
    OK(cluster_describe(f.cluster, &info));
    assert_true(info.sequences == 0 && info.n_workers == n && info.caches == 1);
    attn_cluster_info_free(&info);
    free(models);
    fixture_close(&f);
}

static void
test_sequences_are_as_in_a_model(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= WORKERS_MAX; n++) {
        run_model(n, ATTN_PLACE_SPREAD);
        run_model(n, n % 2 == 0 ? ATTN_PLACE_WHOLE : ATTN_PLACE_AUTO);
    }
}

/* ---- what is refused ---- */

static void
test_a_sequence_with_an_open_step_is_busy(void **state)
{
    fixture_t f;
    model_t m, fork;
    attn_seq_info_t info;
    uint64_t epoch;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 600);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    OK(begin_on_chunk(&f, &m, &info.chunks[2], 600, 0, 5));
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 10), ATTN_ERR_BUSY);
    assert_int_equal(cluster_seq_free(f.cluster, f.cache, m.seq), ATTN_ERR_BUSY);
    OK(fork_model(&f, &m, 600, &fork)); /* of what is committed */
    OK(engine_step_abort(f.engines[info.chunks[2].worker - 1], f.next_step, "enough"));
    check_model(&f, &m);
    check_model(&f, &fork);
    OK(cluster_seq_truncate(f.cluster, f.cache, m.seq, 10));
    m.length = 10;
    check_model(&f, &m);
    check_model(&f, &fork);
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    OK(cluster_seq_free(f.cluster, f.cache, fork.seq));
    expect_empty(&f, 0);
    attn_seq_info_free(&info);
    fixture_close(&f);
}

static void
test_a_sequence_that_another_call_changes_is_busy(void **state)
{
    fixture_t f;
    model_t m, fork;
    held_seq_t held = {0};

    (void)state;
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 20);
    held.id = m.seq.id; /* as if another thread were at it */
    HASH_ADD(hh, f.cluster->held, id, sizeof(held.id), &held);
    held_seq_t *mine = &held;
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 10), ATTN_ERR_BUSY);
    assert_int_equal(cluster_seq_free(f.cluster, f.cache, m.seq), ATTN_ERR_BUSY);
    assert_int_equal(fork_model(&f, &m, 10, &fork), ATTN_ERR_BUSY);
    /* Another one that forks it is no hindrance to a fork, but to a change. */
    held.forks = 1;
    OK(fork_model(&f, &m, 10, &fork));
    check_model(&f, &fork);
    assert_int_equal(held.forks, 1);
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 10), ATTN_ERR_BUSY);
    assert_int_equal(cluster_seq_free(f.cluster, f.cache, m.seq), ATTN_ERR_BUSY);
    HASH_DEL(f.cluster->held, mine);
    check_model(&f, &m);
    OK(fork_model(&f, &m, 10, &fork));
    fixture_close(&f);
}

static void
test_unknown_objects_are_not_found(void **state)
{
    fixture_t f;
    model_t m, fork;
    attn_seq_info_t info;
    uint64_t epoch, cache;
    attn_seq_t seq;
    char kind[64], address[64];
    bool alive;

    (void)state;
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m, 0);
    model_t wrong = m;
    wrong.seq.id += UINT64_C(1) << 32; /* another generation of the slot */
    assert_int_equal(fork_model(&f, &wrong, 0, &fork), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, wrong.seq, 0), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_seq_free(f.cluster, f.cache, wrong.seq), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_seq_free(f.cluster, f.cache + 1, m.seq), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_layout(f.cluster, f.cache, &wrong.seq, NULL, NULL, 1, &info, &epoch),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_layout(f.cluster, f.cache + 1, &m.seq, NULL, NULL, 1, &info, &epoch),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_seq_create(f.cluster, f.cache + 1, f.client, 0, &seq),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_seq_create(f.cluster, f.cache, f.client + 1, 0, &seq),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_cache_open(f.cluster, f.client, "other", NULL, &cache, kind),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_cache_close(f.cluster, f.client, f.cache + 1), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_client_renew(f.cluster, f.client + 1, &(cost_link_t){0}), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_worker_address(f.cluster, 9, address, &alive), ATTN_ERR_NOT_FOUND);
    OK(cluster_cache_open(f.cluster, f.client, "cache", NULL, &cache, kind)); /* joins */
    assert_int_equal(cache, f.cache);
    assert_true(strncmp(kind, "cpu", 3) == 0);
    fixture_close(&f);
}

static void
test_a_cache_that_no_worker_has_room_for_leaves_nothing(void **state)
{
    fixture_t f;
    engine_info_t info;
    kv_region_info_t region;
    uint64_t cache;
    char kind[64];

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, NOT_LOST);
    attn_geometry_t g = f.geometry;
    g.region_bytes    = 4u << 20;
    OK(engine_cache_open(f.engines[1], 4711, &g, &region));
    g.region_bytes = 6u << 20; /* the first worker has 8 MiB left, the second one 4 */
    assert_int_equal(cluster_cache_open(f.cluster, f.client, "large", &g, &cache, kind),
                     ATTN_ERR_EXHAUSTED);
    assert_non_null(strstr(attn_last_error(), "free"));
    for (int i = 0; i < 2; i++) {
        engine_describe(f.engines[i], &info);
        assert_int_equal(info.region_bytes, i == 0 ? 8u << 20 : 12u << 20);
    }
    g.region_bytes = 3u << 20;
    OK(cluster_cache_open(f.cluster, f.client, "large", &g, &cache,
                          kind)); /* the name was not kept */
    OK(cluster_cache_close(f.cluster, f.client, cache));
    for (int i = 0; i < 2; i++) {
        engine_describe(f.engines[i], &info);
        assert_int_equal(info.region_bytes, i == 0 ? 8u << 20 : 12u << 20);
    }
    fixture_close(&f);
}

/* ---- what is left behind ---- */

static void
test_a_client_that_leaves_leaves_nothing(void **state)
{
    fixture_t f;
    model_t m[3];
    engine_info_t info;

    (void)state;
    fixture_open(&f, 3, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m[0], 0);
    append(&f, &m[0], 1500);
    OK(fork_model(&f, &m[0], 1400, &m[1]));
    create(&f, &m[2], 0);
    append(&f, &m[2], 10);
    cluster_client_close(f.cluster, f.client);
    for (uint32_t i = 0; i < 3; i++) { /* nobody else had the cache open */
        engine_describe(f.engines[i], &info);
        assert_true(info.caches == 0 && info.region_bytes == 0);
    }
    fixture_close(&f);
}

static void
test_releases_wait_for_open_steps(void **state)
{
    fixture_t f;
    model_t m, other;
    attn_seq_info_t info;
    engine_info_t figures;
    uint64_t epoch, cache;
    uint32_t second;
    char kind[64];

    (void)state;
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, NOT_LOST);
    OK(cluster_client_open(f.cluster, "second", &second));
    OK(cluster_cache_open(f.cluster, second, "cache", NULL, &cache, kind));
    create(&f, &m, 0);
    append(&f, &m, 300);
    create(&f, &other, 0);
    append(&f, &other, 300);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    OK(begin_on_chunk(&f, &m, &info.chunks[1], 300, 0, 4));
    cluster_client_close(f.cluster, f.client); /* with a step open on one of its sequences */
    engine_describe(f.engines[0], &figures);
    assert_int_equal(figures.chunks, 1); /* all but the one in the step */
    cluster_tick(f.cluster);
    engine_describe(f.engines[0], &figures);
    assert_int_equal(figures.chunks, 1);
    OK(engine_step_abort(f.engines[0], f.next_step, "its client is gone"));
    cluster_tick(f.cluster);
    expect_empty(&f, 0);
    attn_seq_info_free(&info);
    fixture_close(&f);
}

/* ---- threads ---- */

typedef struct changer {
    pthread_t thread;
    fixture_t *f;
    attn_seq_t shared;
    uint64_t wrong;
} changer_t;

/* Fork what all fork, cut and free the fork; and get in each other's way at times. */
static void *
change(void *arg)
{
    changer_t *x = arg;

    for (int i = 0; i < 60; i++) {
        attn_seq_t fork;
        attn_status_t status = cluster_seq_fork(x->f->cluster, x->f->cache, x->f->client, x->shared,
                                                (uint64_t)i * 10, &fork);
        if (status == ATTN_ERR_BUSY) {
            continue;
        }
        x->wrong += status != ATTN_OK;
        x->wrong +=
            cluster_seq_truncate(x->f->cluster, x->f->cache, fork, (uint64_t)i * 5) != ATTN_OK;
        x->wrong += cluster_seq_free(x->f->cluster, x->f->cache, fork) != ATTN_OK;
        cluster_tick(x->f->cluster);
    }
    return NULL;
}

static void
test_calls_from_several_threads(void **state)
{
    fixture_t f;
    model_t m;
    changer_t x[4];

    (void)state;
    fixture_open(&f, 3, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 700);
    for (int i = 0; i < 4; i++) {
        x[i] = (changer_t){.f = &f, .shared = m.seq};
        pthread_create(&x[i].thread, NULL, change, &x[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(x[i].thread, NULL);
        assert_int_equal(x[i].wrong, 0);
    }
    check_model(&f, &m);
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    cluster_tick(f.cluster);
    expect_empty(&f, 0);
    fixture_close(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sequences_are_as_in_a_model),
        cmocka_unit_test(test_a_sequence_with_an_open_step_is_busy),
        cmocka_unit_test(test_a_sequence_that_another_call_changes_is_busy),
        cmocka_unit_test(test_unknown_objects_are_not_found),
        cmocka_unit_test(test_a_cache_that_no_worker_has_room_for_leaves_nothing),
        cmocka_unit_test(test_a_client_that_leaves_leaves_nothing),
        cmocka_unit_test(test_releases_wait_for_open_steps),
        cmocka_unit_test(test_calls_from_several_threads),
    };
    return cmocka_run_group_tests_name("cluster", tests, NULL, NULL);
}
