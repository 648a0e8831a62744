/* cluster_workers_test.c: workers that are lost, join late, or cannot serve a cache. */
#include "client/test_cluster.h"

/* All workers but one tell that they live, until that one is taken for lost. */
static void
lose(fixture_t *f, uint32_t worker)
{
    char address[64];
    bool alive     = true;
    uint64_t epoch = cluster_epoch(f->cluster), until = attn_now_ns() + 10000 * ATTN_NS_PER_MS;

    while (alive && attn_now_ns() < until) {
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        for (uint32_t i = 0; i < f->n; i++) {
            if (f->hello[i].id != worker) {
                OK(cluster_worker_heartbeat(f->cluster, &f->hello[i]));
            }
        }
        cluster_tick(f->cluster);
        OK(cluster_worker_address(f->cluster, worker, address, &alive));
    }
    assert_false(alive);
    assert_true(cluster_epoch(f->cluster) > epoch);
}

static void
test_a_lost_worker_takes_its_chunks_along(void **state)
{
    fixture_t f;
    model_t m, fork;
    attn_seq_info_t info;
    uint64_t epoch;
    char range[64];

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, 500 * ATTN_NS_PER_MS);
    create(&f, &m, 0);
    append(&f, &m, 1000); /* chunks 0 and 2 on one worker, 1 and 3 on the other */
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    uint32_t gone = info.chunks[1].worker;
    assert_true(gone != info.chunks[0].worker && info.chunks[3].worker == gone);
    attn_seq_info_free(&info);
    lose(&f, gone);

    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    assert_int_equal(epoch, cluster_epoch(f.cluster));
    for (uint32_t c = 0; c < 4; c++) {
        assert_int_equal(info.chunks[c].lost, c % 2);
    }
    assert_int_equal(info.length, 768); /* chunk 1 was full; how much chunk 3 had nobody knows */
    attn_seq_info_free(&info);

    OK(fork_model(&f, &m, 256, &fork));
    check_model(&f, &fork);
    append(&f, &fork, 300); /* on who is left */
    check_model(&f, &fork);
    OK(cluster_seq_free(f.cluster, f.cache, fork.seq));
    OK(fork_model(&f, &m, 200, &fork));
    check_model(&f, &fork);
    snprintf(range, sizeof(range), "tokens 256-299 (worker %u)", gone);
    assert_int_equal(fork_model(&f, &m, 300, &fork), ATTN_ERR_LOST);
    assert_non_null(strstr(attn_last_error(), range));
    snprintf(range, sizeof(range), "tokens 256-511 (worker %u)", gone);
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 700), ATTN_ERR_LOST);
    assert_non_null(strstr(attn_last_error(), range));
    OK(cluster_seq_truncate(f.cluster, f.cache, m.seq, 250)); /* below the hole */
    m.length = 250;
    append(&f, &m, 300);
    check_model(&f, &m);
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    OK(cluster_seq_free(f.cluster, f.cache, fork.seq));
    expect_empty(&f, gone);
    fixture_close(&f);
}

/* ---- a worker that is lost while it is asked, and answers when it is back, and empty ---- */

static struct asked {
    fixture_t *f;
    uint32_t worker;
} asked;

static attn_status_t
answer_when_back(void)
{
    lose(asked.f, asked.worker);
    return attn_fail(ATTN_ERR_NOT_FOUND, "cache 1 has no region here");
}

static attn_status_t
describe_when_back(link_t *link, uint64_t cache, const uint64_t *chunks, uint32_t n,
                   kv_chunk_info_t *infos, const uint64_t *seqs, uint32_t n_seqs, bool *in_step,
                   uint64_t deadline_ns)
{
    (void)link, (void)cache, (void)chunks, (void)n, (void)infos;
    (void)seqs, (void)n_seqs, (void)in_step, (void)deadline_ns;
    return answer_when_back();
}

static attn_status_t
fork_when_back(link_t *link, uint64_t epoch, uint64_t cache, uint64_t from, uint32_t length,
               uint64_t to, uint64_t deadline_ns)
{
    (void)link, (void)epoch, (void)cache, (void)from, (void)length, (void)to, (void)deadline_ns;
    return answer_when_back();
}

static attn_status_t
truncate_when_back(link_t *link, uint64_t epoch, uint64_t cache, uint64_t chunk,
                   uint32_t generation, uint32_t length, uint32_t *generation_p,
                   uint64_t deadline_ns)
{
    (void)link, (void)epoch, (void)cache, (void)chunk;
    (void)generation, (void)length, (void)generation_p, (void)deadline_ns;
    return answer_when_back();
}

enum { DESCRIBE, FORK, TRUNCATE };

static void
lose_in(int call)
{
    fixture_t f;
    model_t m, fork;
    attn_seq_info_t info;
    uint64_t epoch;
    link_ops_t ops;
    link_t *link;

    fixture_open(&f, 2, ATTN_PLACE_SPREAD, 300 * ATTN_NS_PER_MS);
    create(&f, &m, 0);
    append(&f, &m, 600);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    uint32_t gone = info.chunks[1].worker;
    attn_seq_info_free(&info);
    asked = (struct asked){.f = &f, .worker = gone};
    OK(links_get(f.links, f.hello[gone - 1].address, &link));
    const link_ops_t *before = link->ops;
    ops                      = *before;
    ops.chunks_describe      = call == DESCRIBE ? describe_when_back : ops.chunks_describe;
    ops.chunk_fork           = call == FORK ? fork_when_back : ops.chunk_fork;
    ops.chunk_truncate       = call == TRUNCATE ? truncate_when_back : ops.chunk_truncate;
    link->ops                = &ops;
    if (call == DESCRIBE) {
        OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
        assert_true(!info.chunks[0].lost && info.chunks[1].lost && info.chunks[0].length == 256);
        attn_seq_info_free(&info);
    } else if (call == FORK) {
        assert_int_equal(fork_model(&f, &m, 300, &fork), ATTN_ERR_LOST);
    } else {
        assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 300), ATTN_ERR_LOST);
    }
    link->ops = before;
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    expect_empty(&f, gone);
    fixture_close(&f);
}

static void
test_what_a_worker_says_that_was_lost_meanwhile_is_no_answer(void **state)
{
    (void)state;
    lose_in(DESCRIBE);
    lose_in(FORK);
    lose_in(TRUNCATE);
}

static attn_status_t
truncate_busy(link_t *link, uint64_t epoch, uint64_t cache, uint64_t chunk, uint32_t generation,
              uint32_t length, uint32_t *generation_p, uint64_t deadline_ns)
{
    (void)link, (void)epoch, (void)cache, (void)chunk;
    (void)generation, (void)length, (void)generation_p, (void)deadline_ns;
    return attn_fail(ATTN_ERR_BUSY, "a chunk is named by open steps");
}

/* What is behind a hole stays there if the cut at it is refused. */
static void
test_a_cut_that_fails_leaves_the_hole_a_hole(void **state)
{
    fixture_t f;
    model_t m;
    attn_seq_info_t info;
    uint64_t epoch, base = CHUNK, tokens = CHUNK + 44;
    static float rows[44 * DIM];
    link_ops_t ops;
    link_t *link;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, 300 * ATTN_NS_PER_MS);
    create(&f, &m, 0);
    append(&f, &m, 600);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    uint32_t gone = info.chunks[1].worker, here = info.chunks[0].worker;
    attn_seq_info_free(&info);
    lose(&f, gone);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, &base, &tokens, 1, &info, &epoch));
    assert_true(info.chunks[1].sealed && info.chunks[1].worker == here);
    OK(begin_on_chunk(&f, &m, &info.chunks[1], base, 0, 44));
    attn_seq_info_free(&info);
    OK(engine_step_run(f.engines[here - 1], f.next_step, 0, NULL, rows, rows, NULL, NULL));
    OK(engine_step_commit(f.engines[here - 1], f.next_step, NULL, 0));

    OK(links_get(f.links, f.hello[here - 1].address, &link));
    const link_ops_t *before = link->ops;
    ops                      = *before;
    ops.chunk_truncate       = truncate_busy;
    link->ops                = &ops;
    assert_int_equal(cluster_seq_truncate(f.cluster, f.cache, m.seq, 280), ATTN_ERR_BUSY);
    link->ops = before;
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    assert_int_equal(info.length, 600);
    assert_true(info.n_holes == 1 && info.holes[0].first == 300 && info.holes[0].end == 512);
    attn_seq_info_free(&info);
    OK(cluster_seq_truncate(f.cluster, f.cache, m.seq, 280));
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info, &epoch));
    assert_true(info.length == 280 && info.n_holes == 0 && !info.chunks[1].sealed);
    attn_seq_info_free(&info);
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    expect_empty(&f, gone);
    fixture_close(&f);
}

static void
test_chunks_in_advance_on_a_lost_worker_are_placed_anew(void **state)
{
    fixture_t f;
    model_t m;
    attn_seq_info_t info;
    uint64_t epoch, tokens = 100;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, 500 * ATTN_NS_PER_MS);
    create(&f, &m, 0);
    append(&f, &m, 100);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, &tokens, 1, &info, &epoch));
    assert_int_equal(info.n_chunks, 2);
    uint32_t here = info.chunks[0].worker, gone = info.chunks[1].worker;
    assert_int_not_equal(here, gone);
    attn_seq_info_free(&info);
    lose(&f, gone);

    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, NULL, 1, &info,
                      &epoch)); /* a look changes nothing */
    assert_true(info.n_chunks == 2 && info.chunks[1].lost && info.length == 100);
    attn_seq_info_free(&info);
    OK(cluster_layout(f.cluster, f.cache, &m.seq, NULL, &tokens, 1, &info, &epoch));
    assert_true(info.n_chunks == 2 && !info.chunks[1].lost && info.chunks[1].worker == here);
    attn_seq_info_free(&info);
    append(&f, &m, 400);
    check_model(&f, &m);
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    expect_empty(&f, 0);
    fixture_close(&f);
}

static void
test_a_sequence_without_living_owners_can_be_freed(void **state)
{
    fixture_t f;
    model_t m, fork;

    (void)state;
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, 500 * ATTN_NS_PER_MS);
    create(&f, &m, 0);
    append(&f, &m, 300);
    lose(&f, f.hello[0].id);
    assert_int_equal(fork_model(&f, &m, 10, &fork), ATTN_ERR_LOST);
    OK(fork_model(&f, &m, 0, &fork));
    OK(cluster_seq_free(f.cluster, f.cache, m.seq));
    OK(cluster_seq_free(f.cluster, f.cache, fork.seq));
    assert_int_equal(cluster_seq_free(f.cluster, f.cache, m.seq), ATTN_ERR_NOT_FOUND);
    fixture_close(&f);
}

static void
test_a_worker_that_joins_late_gets_its_regions(void **state)
{
    fixture_t f;
    model_t m[3];
    attn_seq_info_t info;
    engine_info_t late;
    uint64_t epoch, tokens = 700;
    uint32_t chunks_there = 0;

    (void)state;
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m[0], 0);
    append(&f, &m[0], 300);
    uint64_t before = cluster_epoch(f.cluster);
    add_worker(&f, NULL);
    assert_true(cluster_epoch(f.cluster) > before);
    engine_describe(f.engines[1], &late);
    assert_int_equal(late.caches, 0);
    cluster_tick(f.cluster);
    cluster_tick(f.cluster);
    engine_describe(f.engines[1], &late);
    assert_true(late.caches == 1 && late.region_bytes == 8u << 20);

    for (int i = 1; i < 3; i++) {
        create(&f, &m[i], 0);
        OK(cluster_layout(f.cluster, f.cache, &m[i].seq, NULL, &tokens, 1, &info, &epoch));
        for (uint32_t c = 0; c < info.n_chunks; c++) {
            chunks_there += info.chunks[c].worker == f.hello[1].id;
        }
        attn_seq_info_free(&info);
        append(&f, &m[i], 700);
        check_model(&f, &m[i]);
    }
    assert_true(chunks_there >= 3);
    append(&f, &m[0], 900);
    check_model(&f, &m[0]);
    for (int i = 0; i < 3; i++) {
        OK(cluster_seq_free(f.cluster, f.cache, m[i].seq));
    }
    expect_empty(&f, 0);
    OK(cluster_cache_close(f.cluster, f.client, f.cache));
    engine_describe(f.engines[1], &late);
    assert_int_equal(late.caches, 0);
    fixture_close(&f);
}

static void
test_a_worker_of_another_kind_keeps_no_region(void **state)
{
    fixture_t f;
    engine_info_t info;

    (void)state;
    attn_log_set_level(ATTN_LOG_ERROR); /* the warning is expected */
    fixture_open(&f, 1, ATTN_PLACE_SPREAD, NOT_LOST);
    add_worker(&f, "abacus/1/2-2");
    add_worker(&f, NULL);
    cluster_tick(f.cluster);
    engine_describe(f.engines[2], &info);
    assert_int_equal(info.caches, 1); /* whoever comes after it is not forgotten */
    engine_describe(f.engines[1], &info);
    assert_int_equal(info.caches, 0);
    assert_int_equal(info.region_bytes, 0);
    attn_log_set_level(ATTN_LOG_WARN);
    fixture_close(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_lost_worker_takes_its_chunks_along),
        cmocka_unit_test(test_what_a_worker_says_that_was_lost_meanwhile_is_no_answer),
        cmocka_unit_test(test_a_cut_that_fails_leaves_the_hole_a_hole),
        cmocka_unit_test(test_chunks_in_advance_on_a_lost_worker_are_placed_anew),
        cmocka_unit_test(test_a_sequence_without_living_owners_can_be_freed),
        cmocka_unit_test(test_a_worker_that_joins_late_gets_its_regions),
        cmocka_unit_test(test_a_worker_of_another_kind_keeps_no_region),
    };
    return cmocka_run_group_tests_name("cluster_workers", tests, NULL, NULL);
}
