/*
 * Chunks go from worker to worker while clients use them: every answer is the same, bit by bit;
 * whoever dies in the middle of it takes along what was his and no more; and nothing is left
 * anywhere of what did not succeed.
 */
#include "tests/integration/fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { ONE = 0, TWO = 1 };

/* Nobody is taken for lost who is only slow. */
#define STEADY(n) ((cluster_options_t){.workers = (n), .lost_ms = "4000", .check_store = true})

/* ---- somebody who moves things all the time ---- */

typedef struct mover {
    pthread_t thread;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq; /* 0: workers are emptied in turn */
    uint32_t workers;
    atomic_bool stop;
    atomic_uint moved, failed;
    attn_status_t odd; /* a failure that nobody can explain */
    char sentence[512];
} mover_t;

static bool
is_fault(attn_status_t status)
{
    return status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_DEADLINE ||
           status == ATTN_ERR_LOST || status == ATTN_ERR_NOT_FOUND || status == ATTN_ERR_BUSY ||
           status == ATTN_ERR_STALE || status == ATTN_ERR_EXHAUSTED || status == ATTN_ERR_ABORTED ||
           status == ATTN_ERR_CANCELLED;
}

static void
note(mover_t *m, attn_status_t status, const attn_moved_t *moved)
{
    atomic_fetch_add(&m->moved, (unsigned)moved->chunks);
    atomic_fetch_add(&m->failed, (unsigned)moved->failed);
    if (status == ATTN_OK && moved->failed > 0 && !is_fault(moved->why)) {
        m->odd = moved->why;
        snprintf(m->sentence, sizeof(m->sentence), "%s", moved->reason);
    }
    if (status != ATTN_OK && !is_fault(status)) {
        m->odd = status;
        snprintf(m->sentence, sizeof(m->sentence), "%s", attn_last_error());
    }
}

static void *
move_on(void *arg)
{
    mover_t *m = arg;
    attn_moved_t moved;

    for (uint32_t turn = 0; !atomic_load(&m->stop); turn++) {
        uint32_t worker = turn % m->workers + 1;
        if (m->seq.id != 0) {
            note(m, attn_seq_move(m->cache, m->seq, 0, worker, &moved), &moved);
            continue;
        }
        do {
            attn_status_t status = attn_worker_drain(m->client, worker, 0, false, &moved);
            note(m, status, &moved);
            moved.left = status == ATTN_OK ? moved.left : 0;
        } while (moved.left > 0 && !atomic_load(&m->stop));
        note(m, attn_worker_drain(m->client, worker, 0, true, &moved), &moved);
    }
    return NULL;
}

static void
mover_start(mover_t *m, const fixture_t *f, attn_seq_t seq, uint32_t workers)
{
    *m        = (mover_t){.seq = seq, .workers = workers};
    m->client = open_client(f->cluster.coordinator.address, 2000);
    OK(attn_cache_open(m->client, "cache", NULL, &m->cache));
    assert_int_equal(pthread_create(&m->thread, NULL, move_on, m), 0);
}

static void
mover_stop(mover_t *m)
{
    atomic_store(&m->stop, true);
    pthread_join(m->thread, NULL);
    attn_cache_close(m->cache);
    attn_client_close(m->client);
    if (m->odd != ATTN_OK) {
        fail_msg("a move failed: %s: %s", attn_strerror(m->odd), m->sentence);
    }
}

/* Wait for moves, while doing something. */
static void
until_moved(fixture_t *f, mover_t *m, uint32_t n, void (*act)(fixture_t *f))
{
    uint64_t end    = now_ms() + 30000;
    uint32_t before = atomic_load(&m->moved);

    while (atomic_load(&m->moved) < before + n && now_ms() < end) {
        act(f);
    }
    assert_true(atomic_load(&m->moved) >= before + n);
}

/* ---- nothing is left ---- */

/* No worker that lives has a page in use once all sequences are freed. */
static void
expect_empty(fixture_t *f)
{
    uint64_t used = 1, end = now_ms() + 10000;

    while (used > 0 && now_ms() < end) {
        attn_cluster_info_t info;
        sleep_ms(50); /* figures come with heartbeats */
        OK(attn_cluster_describe(f->client, &info));
        used = 0;
        for (uint32_t w = 0; w < info.n_workers; w++) {
            used += info.workers[w].alive ? info.workers[w].used_bytes + info.workers[w].chunks : 0;
        }
        attn_cluster_info_free(&info);
    }
    assert_int_equal(used, 0);
}

static void
drop_all(fixture_t *f)
{
    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        if (f->model.seqs[s].used) {
            OK(attn_seq_free(f->cache, f->model.seqs[s].seq));
            f->model.seqs[s].used = false;
        }
    }
    expect_empty(f);
    for (uint32_t i = 0; i < f->cluster.options.workers; i++) {
        assert_false(process_logged(&f->cluster.workers[i], "store.broken"));
    }
}

/* ---- all is well ---- */

/* Chunks went the way that this run of the test is about. */
static void
expect_way(fixture_t *f)
{
    const char *way = getenv("ATTN_TEST_COPIES");
    char words[64];
    bool any = false, went = false;

    snprintf(words, sizeof(words), "transport=ucx-%s", way != NULL ? way : "");
    for (uint32_t i = 0; i < f->cluster.options.workers; i++) {
        went = went || process_logged(&f->cluster.workers[i], words);
        any  = any || process_logged(&f->cluster.workers[i], "transport=ucx");
    }
    assert_true(way == NULL || went);
    assert_false(any && getenv("ATTN_TEST_NO_UCX") != NULL);
}

/* The same story with nobody moving anything, and with workers emptied in turn all the while. */
static void
test_answers_are_the_same(void **state)
{
    static fixture_t f;
    static mover_t m;
    uint64_t digests[2];

    (void)state;
    for (uint32_t moves = 0; moves < 2; moves++) {
        fixture_open(&f, &STEADY(3), 5000, 11);
        f.model.check = true;
        if (moves) {
            mover_start(&m, &f, (attn_seq_t){0}, 3);
        }
        model_story(&f.model, 80);
        if (moves) {
            mover_stop(&m);
            assert_true(atomic_load(&m.moved) > 10);
            expect_way(&f);
        }
        digests[moves] = f.model.digest;
        drop_all(&f);
        fixture_down(&f);
    }
    assert_true(digests[0] == digests[1]);
}

static void
append_one(fixture_t *f)
{
    if (f->model.seqs[ONE].length >= MODEL_TOKENS - 4) {
        OK(model_truncate(&f->model, ONE, 700));
    }
    OK(model_append(&f->model, ONE, 1));
}

/* One sequence goes round while it grows by a token at a time: all waits, nothing fails. */
static void
test_a_growing_sequence_goes_round(void **state)
{
    static fixture_t f;
    static mover_t m;

    (void)state;
    fixture_open(&f, &STEADY(3), 5000, 12);
    model_create(&f.model, ONE);
    OK(model_append(&f.model, ONE, 600));
    mover_start(&m, &f, f.model.seqs[ONE].seq, 3);
    until_moved(&f, &m, 15, append_one);
    mover_stop(&m);
    OK(model_append(&f.model, ONE, 100));
    drop_all(&f);
    fixture_down(&f);
}

/* ---- processes die ---- */

static void
append_or_fault(fixture_t *f)
{
    uint64_t digest;
    attn_status_t status = f->model.seqs[ONE].length < MODEL_TOKENS - 4
                               ? model_append(&f->model, ONE, 1)
                               : model_ask(&f->model, ONE, f->model.seqs[ONE].length, 4, &digest);

    if (status != ATTN_OK && !is_fault(status)) {
        fail_msg("%s: %s", attn_strerror(status), attn_last_error());
    }
}

/* What is left of a sequence after a worker went: right answers, or LOST where its chunks were. */
static void
expect_right_or_lost(fixture_t *f)
{
    uint64_t digest, end = now_ms() + 10000;
    attn_status_t status;

    do {
        status = model_ask(&f->model, ONE, 600, 8, &digest);
    } while (status != ATTN_OK && status != ATTN_ERR_LOST && now_ms() < end);
    if (status != ATTN_OK && status != ATTN_ERR_LOST) {
        fail_msg("%s: %s", attn_strerror(status), attn_last_error());
    }
}

/* Kill -9, or stop, a worker amid moves to and from it; the sequences go on, and of those that were
 * not on it nothing is lost. */
static void
test_a_worker_goes_amid_moves(void **state)
{
    static fixture_t f;
    static mover_t m;

    (void)state;
    for (uint32_t round = 0; round < 2; round++) {
        process_t *gone = NULL;
        fixture_open(&f, &(cluster_options_t){.workers = 3, .check_store = true}, 2000, 13 + round);
        model_create(&f.model, ONE);
        OK(model_append(&f.model, ONE, 600));
        mover_start(&m, &f, f.model.seqs[ONE].seq, 3);
        until_moved(&f, &m, 3 + round, append_or_fault);
        gone = &f.cluster.workers[round % 3];
        char address[64];
        snprintf(address, sizeof(address), "%s", gone->address);
        if (round % 2) {
            process_signal(gone, SIGSTOP);
        } else {
            process_kill(gone);
        }
        fixture_await_lost(&f, address);
        for (uint32_t i = 0; i < 20; i++) {
            append_or_fault(&f);
        }
        if (round % 2) { /* it comes back as somebody new */
            process_signal(gone, SIGCONT);
        }
        mover_stop(&m);
        expect_right_or_lost(&f);
        model_create(&f.model, TWO);
        OK(model_append(&f.model, TWO, 300));
        drop_all(&f);
        fixture_down(&f);
    }
}

/* The coordinator is killed amid moves: nobody is answered wrongly, and the next one finds workers
 * with nothing of the former's. */
static void
test_the_coordinator_goes_amid_moves(void **state)
{
    static fixture_t f;
    static mover_t m;
    char address[64];

    (void)state;
    fixture_open(&f, &STEADY(2), 1000, 17);
    model_create(&f.model, ONE);
    model_create(&f.model, TWO);
    OK(model_append(&f.model, ONE, 600));
    OK(model_append(&f.model, TWO, 600));
    mover_start(&m, &f, f.model.seqs[ONE].seq, 2);
    until_moved(&f, &m, 5, append_or_fault);
    OK(model_append(&f.model, TWO, 1)); /* its layout is known here */
    snprintf(address, sizeof(address), "%s", f.cluster.coordinator.address);
    process_kill(&f.cluster.coordinator);
    uint64_t digest;
    for (uint32_t i = 0; i < 5; i++) {
        /* Right, or refused: workers may have heard of an epoch that no layout here is of. */
        attn_status_t other = model_ask(&f.model, TWO, 600, 4, &digest);
        assert_true(other == ATTN_OK || is_fault(other));
        append_or_fault(&f);
    }
    mover_stop(&m);
    fixture_close(&f);
    cluster_start_coordinator(&f.cluster, address);
    attn_geometry_t geometry;
    f.client     = open_client(address, 5000);
    uint64_t end = now_ms() + 20000;
    attn_status_t status;
    model_geometry(&geometry);
    while ((status = attn_cache_open(f.client, "cache", &geometry, &f.cache)) != ATTN_OK &&
           now_ms() < end) {
        sleep_ms(50);
    }
    OK(status);
    model_init(&f.model, f.cache, 18);
    expect_empty(&f);
    fixture_down(&f);
}

/* A worker that takes nothing any more: what was to go there stays where it is, and is used
 * meanwhile as ever. */
static void *
move_once(void *arg)
{
    mover_t *m = arg;
    attn_moved_t moved;

    note(m, attn_seq_move(m->cache, m->seq, m->workers, 0, &moved), &moved);
    atomic_store(&m->stop, true);
    return NULL;
}

static void
test_a_target_that_hangs_changes_nothing(void **state)
{
    static fixture_t f;
    mover_t m = {0};
    attn_moved_t all;
    uint32_t steps;

    (void)state;
    fixture_open(&f, &(cluster_options_t){.workers = 2, .lost_ms = "60000", .check_store = true},
                 2000, 19);
    model_create(&f.model, ONE);
    OK(model_append(&f.model, ONE, 200));
    process_t *owner = fixture_owner(&f, ONE, 0);
    process_t *other = &f.cluster.workers[owner == &f.cluster.workers[0]];
    m.cache          = f.cache;
    m.seq            = f.model.seqs[ONE].seq;
    m.workers        = fixture_worker_id(&f, owner->address); /* that it is to leave */
    OK(attn_seq_move(f.cache, m.seq, 0, m.workers, &all));    /* its chunk in advance, too */
    process_signal(other, SIGSTOP);
    assert_int_equal(pthread_create(&m.thread, NULL, move_once, &m), 0);
    for (steps = 0; steps < 50 || !atomic_load(&m.stop); steps++) {
        if (steps < 50) {
            OK(model_append(&f.model, ONE, 1));
        } else {
            sleep_ms(20);
        }
    }
    pthread_join(m.thread, NULL);
    assert_int_equal(m.odd, ATTN_OK);
    assert_int_equal(m.moved, 0);
    assert_true(fixture_owner(&f, ONE, 0) == owner);
    process_signal(other, SIGCONT);
    model_create(&f.model, TWO); /* and it may come back */
    OK(model_append(&f.model, TWO, 700));
    m.stop = false;
    move_once(&m);
    assert_true(m.moved > 0);
    OK(model_append(&f.model, ONE, 10));
    drop_all(&f);
    fixture_down(&f);
}

/* ---- by attnctl ---- */

static int
attnctl(const char *arguments, const char *target)
{
    char command[512];

    snprintf(command, sizeof(command), "%s --target %s %s > /dev/null", ATTNCTL_PATH, target,
             arguments);
    int code = system(command);
    return WIFEXITED(code) ? WEXITSTATUS(code) : -1;
}

/* Empty a worker, stop it, and nothing is lost: as for an upgrade. */
static void
test_a_drained_worker_may_go(void **state)
{
    static fixture_t f;
    char command[128];
    uint64_t before, after;

    (void)state;
    fixture_open(&f, &STEADY(2), 5000, 21);
    model_create(&f.model, ONE);
    OK(model_append(&f.model, ONE, 1200));
    OK(model_ask(&f.model, ONE, 1200, 8, &before));
    snprintf(command, sizeof(command), "move %llu --cache cache --to 1",
             (unsigned long long)f.model.seqs[ONE].seq.id);
    assert_int_equal(attnctl(command, f.cluster.coordinator.address), 0);
    assert_int_equal(attnctl("drain 1", f.cluster.coordinator.address), 0);
    assert_int_equal(attnctl("drain 9", f.cluster.coordinator.address), 1);
    assert_int_equal(attnctl("drain", f.cluster.coordinator.address), 2);
    assert_int_equal(attnctl("move 5 --cache cache", f.cluster.coordinator.address), 2);
    assert_int_equal(attnctl("drain 2", f.cluster.coordinator.address), 1); /* where to? */
    assert_int_equal(attnctl("drain 2 --undo", f.cluster.coordinator.address), 0);

    attn_cluster_info_t info;
    OK(attn_cluster_describe(f.client, &info));
    assert_true(info.workers[0].leaving && !info.workers[1].leaving);
    char address[64];
    snprintf(address, sizeof(address), "%s", info.workers[0].address);
    attn_cluster_info_free(&info);
    process_t *gone = cluster_worker_at(&f.cluster, address);
    process_signal(gone, SIGTERM);
    assert_int_equal(process_wait(gone, 10000), 0);
    fixture_await_lost(&f, address);
    OK(model_append(&f.model, ONE, 100));
    OK(model_ask(&f.model, ONE, 1200, 8, &after));
    assert_true(before == after);
    drop_all(&f);
    fixture_down(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_are_the_same),
        cmocka_unit_test(test_a_growing_sequence_goes_round),
        cmocka_unit_test(test_a_worker_goes_amid_moves),
        cmocka_unit_test(test_the_coordinator_goes_amid_moves),
        cmocka_unit_test(test_a_target_that_hangs_changes_nothing),
        cmocka_unit_test(test_a_drained_worker_may_go),
    };
    return cmocka_run_group_tests_name("move", tests, NULL, NULL);
}
