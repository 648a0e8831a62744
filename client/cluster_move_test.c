/*
 * cluster_move_test.c: chunks that change their worker while their sequences are used. The links to
 * the engines are watched: a test does something in the middle of a move, or has a call of it fail.
 */
#include "client/test_cluster.h"

#include <pthread.h>
#include <stdatomic.h>

/* ---- links that are watched ---- */

typedef enum stage { COPY, HOLD, GO, STAY, RELEASE, STAGES } stage_t;

static const link_ops_t *plain;
static link_ops_t watched;
static struct {
    uint32_t seen[STAGES];
    stage_t at; /* what comes before or after this ... */
    bool fail;  /* ... fails, having been done or not: ... */
    bool done;
    void (*meanwhile)(void *arg); /* ... or this is done before it, once */
    void *arg;
} watch;

static attn_status_t
pass(stage_t stage, attn_status_t (*call)(void *), void *arg)
{
    watch.seen[stage]++;
    if (watch.meanwhile != NULL && watch.at == stage) {
        void (*meanwhile)(void *) = watch.meanwhile;
        watch.meanwhile           = NULL;
        meanwhile(watch.arg);
    }
    if (!watch.fail || watch.at != stage) {
        return call(arg);
    }
    watch.fail = false;
    if (watch.done) {
        call(arg);
    }
    return attn_fail(ATTN_ERR_DEADLINE, "nobody knows whether it was done");
}

typedef struct copy_call {
    link_t *link, *source;
    uint64_t epoch;
    const engine_copy_t *copy;
} copy_call_t;

static attn_status_t
call_copy(void *arg)
{
    const copy_call_t *c = arg;
    return plain->chunk_copy(c->link, c->source, c->epoch, c->copy, UINT64_MAX);
}

static attn_status_t
watched_copy(link_t *link, link_t *source, uint64_t epoch, const engine_copy_t *copy,
             uint64_t deadline_ns)
{
    (void)deadline_ns;
    return pass(COPY, call_copy, &(copy_call_t){link, source, epoch, copy});
}

typedef struct leave_call {
    link_t *link;
    uint64_t epoch, cache;
    const kv_leaving_t *leaving;
    kv_chunk_info_t *info;
} leave_call_t;

static attn_status_t
call_leave(void *arg)
{
    const leave_call_t *c = arg;
    return plain->chunk_leave(c->link, c->epoch, c->cache, c->leaving, UINT64_MAX, c->info);
}

static attn_status_t
watched_leave(link_t *link, uint64_t epoch, uint64_t cache, const kv_leaving_t *leaving,
              uint64_t deadline_ns, kv_chunk_info_t *info)
{
    stage_t stage = leaving->what == KV_LEAVE_HOLD ? HOLD
                    : leaving->what == KV_LEAVE_GO ? GO
                                                   : STAY;
    (void)deadline_ns;
    return pass(stage, call_leave, &(leave_call_t){link, epoch, cache, leaving, info});
}

typedef struct release_call {
    link_t *link;
    uint64_t epoch, cache;
    const uint64_t *chunks;
    uint32_t n;
} release_call_t;

static attn_status_t
call_release(void *arg)
{
    const release_call_t *c = arg;
    return plain->chunks_release(c->link, c->epoch, c->cache, c->chunks, c->n, UINT64_MAX);
}

static attn_status_t
watched_release(link_t *link, uint64_t epoch, uint64_t cache, const uint64_t *chunks, uint32_t n,
                uint64_t deadline_ns)
{
    (void)deadline_ns;
    return pass(RELEASE, call_release, &(release_call_t){link, epoch, cache, chunks, n});
}

static void
watch_all(fixture_t *f)
{
    memset(&watch, 0, sizeof(watch));
    for (uint32_t i = 0; i < f->n; i++) {
        link_t *link;
        OK(links_get(f->links, f->hello[i].address, &link));
        plain                  = plain != NULL ? plain : link->ops;
        watched                = *plain;
        watched.chunk_copy     = watched_copy;
        watched.chunk_leave    = watched_leave;
        watched.chunks_release = watched_release;
        link->ops              = &watched;
    }
}

/* ---- short words ---- */

static attn_seq_info_t
layout(fixture_t *f, const model_t *m)
{
    attn_seq_info_t info;
    uint64_t epoch;

    OK(cluster_layout(f->cluster, f->cache, &m->seq, NULL, NULL, 1, &info, &epoch));
    return info;
}

static uint32_t
owner(fixture_t *f, const model_t *m, uint32_t i)
{
    attn_seq_info_t info = layout(f, m);
    uint32_t worker      = info.chunks[i].worker;

    attn_seq_info_free(&info);
    return worker;
}

static cluster_moved_t
move(fixture_t *f, const model_t *m, uint32_t from, uint32_t to)
{
    cluster_moved_t moved;

    OK(cluster_seq_move(f->cluster, f->cache, m->seq, from, to, &moved));
    return moved;
}

static uint32_t
count(fixture_t *f, const model_t *m)
{
    attn_seq_info_t info = layout(f, m);
    uint32_t n           = info.n_chunks;

    attn_seq_info_free(&info);
    return n;
}

/* Steps of this test are open on a chunk as its layout has it. */
static uint64_t
open_step(fixture_t *f, const model_t *m, uint32_t i, uint32_t n_new, engine_t **engine_p)
{
    attn_seq_info_t info = layout(f, m);

    OK(begin_on_chunk(f, m, &info.chunks[i], info.chunks[i].first + info.chunks[i].length, 0,
                      n_new));
    *engine_p = f->engines[info.chunks[i].worker - 1];
    attn_seq_info_free(&info);
    return f->next_step;
}

static void
end(fixture_t *f, model_t *m)
{
    check_model(f, m);
    OK(cluster_seq_free(f->cluster, f->cache, m->seq));
    cluster_tick(f->cluster);
    expect_empty(f, 0);
    fixture_close(f);
}

/* ---- tests ---- */

static void
test_a_sequence_moves(void **state)
{
    fixture_t f;
    model_t m;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_SPREAD, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 700); /* and one chunk in advance: four in all, two each */
    uint64_t epoch        = cluster_epoch(f.cluster);
    cluster_moved_t moved = move(&f, &m, 0, 1);
    assert_int_equal(moved.chunks, 2);
    assert_int_equal(moved.left + moved.failed, 0);
    assert_true(moved.bytes > 0 && moved.bytes % (2 * DIM * sizeof(float)) == 0);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(owner(&f, &m, i), 1);
    }
    assert_int_equal(cluster_epoch(f.cluster), epoch + 2);
    check_model(&f, &m);
    append(&f, &m, 300); /* it goes on there, in the chunk in advance, too */
    assert_int_equal(move(&f, &m, 1, 2).chunks, count(&f, &m));
    append(&f, &m, 5);
    assert_int_equal(move(&f, &m, 1, 0).chunks, 0);
    end(&f, &m);
}

static void
test_an_old_layout_is_refused(void **state)
{
    fixture_t f;
    model_t m;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 300);
    attn_seq_info_t old = layout(&f, &m);
    move(&f, &m, old.chunks[0].worker, 0);
    for (uint32_t i = 0; i < old.n_chunks; i++) { /* full, growing, and not made yet */
        attn_status_t status = begin_on_chunk(&f, &m, &old.chunks[i],
                                              old.chunks[i].first + old.chunks[i].length, 0, i > 0);
        assert_true(status == ATTN_ERR_STALE || status == ATTN_ERR_NOT_FOUND);
    }
    attn_seq_info_free(&old);
    end(&f, &m);
}

/* Whoever shares the chunk finds it where it went; the rest of both stays. */
static void
test_a_shared_chunk_moves_for_all(void **state)
{
    fixture_t f;
    model_t m, fork;

    (void)state;
    fixture_open(&f, 3, ATTN_PLACE_WHOLE, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 600);
    OK(fork_model(&f, &m, 520, &fork)); /* its tail shares a page */
    append(&f, &fork, 10);
    uint32_t from = owner(&f, &m, 0), to = from % 3 + 1;
    move(&f, &m, from, to);
    assert_int_equal(owner(&f, &fork, 1), to);
    assert_int_equal(owner(&f, &fork, 2), from); /* its own */
    check_model(&f, &fork);
    append(&f, &m, 50);
    OK(cluster_seq_truncate(f.cluster, f.cache, m.seq, 300)); /* the shared chunk, by a copy */
    m.length = 300;
    append(&f, &m, 10);
    check_model(&f, &fork);
    OK(cluster_seq_free(f.cluster, f.cache, fork.seq));
    end(&f, &m);
}

/* Any call of a move fails, done or not: all is as before, nothing is left, and the next succeeds.
 */
static void
test_a_move_fails_at_any_stage(void **state)
{
    static const bool moves[STAGES] = {[RELEASE] =
                                           true}; /* what fails after the switch is done later */

    (void)state;
    for (uint32_t round = 0; round < 2 * STAGES; round++) {
        fixture_t f;
        model_t m;
        fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
        create(&f, &m, 0);
        append(&f, &m, 100);
        uint32_t from = owner(&f, &m, 0);
        watch_all(&f);
        watch.at   = (stage_t)(round / 2);
        watch.fail = true;
        watch.done = round % 2;
        if (watch.at == STAY) { /* which follows another failure */
            watch.at        = GO;
            watch.done      = true;
            watch.meanwhile = NULL;
        }
        cluster_moved_t moved = move(&f, &m, from, 0);
        assert_int_equal(moved.failed, moves[round / 2] ? 0 : 1);
        if (!moves[round / 2]) {
            assert_int_equal(owner(&f, &m, 0), from);
            assert_int_equal(moved.why, ATTN_ERR_DEADLINE);
        }
        watch.fail = false;
        cluster_tick(f.cluster); /* releases again what it could not */
        check_model(&f, &m);
        append(&f, &m, 50);
        assert_int_equal(owner(&f, &m, 0), moves[round / 2] ? 3 - from : from);
        move(&f, &m, from, 0);
        assert_int_equal(owner(&f, &m, 0), 3 - from);
        append(&f, &m, 200);
        end(&f, &m);
    }
}

/* The old owner cannot be told to keep the chunk: it is, again and again. */
static void
test_a_word_is_taken_back_later(void **state)
{
    fixture_t f;
    model_t m;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 100);
    uint32_t from = owner(&f, &m, 0);
    watch_all(&f);
    watch.at   = STAY;
    watch.fail = true;
    engine_t *e;
    uint64_t step         = open_step(&f, &m, 0, 1, &e); /* so the move is given up, in a second */
    cluster_moved_t moved = move(&f, &m, from, 0);
    assert_true(moved.failed >= 1);
    assert_int_equal(moved.why, ATTN_ERR_BUSY);
    OK(engine_step_abort(e, step, ENGINE_BY_CLIENT));
    assert_int_equal(watch.seen[GO], 0);
    cluster_tick(f.cluster);
    append(&f, &m, 10);
    assert_int_equal(owner(&f, &m, 0), from);
    end(&f, &m);
}

typedef struct others {
    fixture_t *f;
    model_t *m;
    uint32_t what;
    attn_status_t status;
} others_t;

static void
do_meanwhile(void *arg)
{
    others_t *o = arg;
    model_t fork;

    if (o->what == 0) {
        append(o->f, o->m, 20);
    } else if (o->what == 1) {
        OK(cluster_seq_truncate(o->f->cluster, o->f->cache, o->m->seq, 40));
        o->m->length = 40;
    } else if (o->what == 2) {
        OK(fork_model(o->f, o->m, 90, &fork));
        append(o->f, &fork, 20);
        check_model(o->f, &fork);
        OK(cluster_seq_free(o->f->cluster, o->f->cache, fork.seq));
    } else if (o->what == 3) {
        OK(cluster_seq_free(o->f->cluster, o->f->cache, o->m->seq));
        create(o->f, o->m, 0);
    } else {
        cluster_moved_t moved;
        OK(cluster_seq_move(o->f->cluster, o->f->cache, o->m->seq, 0, 2, &moved));
        OK(cluster_seq_move(o->f->cluster, o->f->cache, o->m->seq, 0, 1, &moved));
    }
}

/* While a chunk is copied, its sequence grows, is cut, forked, freed, or moved by another call. */
static void
test_others_go_on_while_a_chunk_is_copied(void **state)
{
    (void)state;
    for (uint32_t what = 0; what < 5; what++) {
        fixture_t f;
        model_t m;
        fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
        create(&f, &m, 0);
        append(&f, &m, 100);
        watch_all(&f);
        others_t o      = {.f = &f, .m = &m, .what = what};
        watch.at        = COPY;
        watch.meanwhile = do_meanwhile;
        watch.arg       = &o;
        cluster_moved_t moved;
        cluster_seq_move(f.cluster, f.cache, m.seq, owner(&f, &m, 0), 0, &moved);
        assert_null(watch.meanwhile); /* it was done */
        if (what == 0) {
            assert_int_equal(moved.failed, 0);
            assert_int_equal(watch.seen[COPY], 2); /* what was added came later */
        }
        append(&f, &m, 10);
        end(&f, &m);
    }
}

/* From hold to go others wait, and find the new owner. */
typedef struct asker {
    pthread_t thread;
    fixture_t *f;
    model_t *m;
    uint32_t found;
    atomic_bool is_back;
} asker_t;

static void *
ask(void *arg)
{
    asker_t *a = arg;

    a->found = owner(a->f, a->m, 0);
    atomic_store(&a->is_back, true);
    return NULL;
}

static void
ask_meanwhile(void *arg)
{
    asker_t *a = arg;

    assert_int_equal(pthread_create(&a->thread, NULL, ask, a), 0);
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    assert_false(atomic_load(&a->is_back));
}

static void
test_whoever_asks_meanwhile_is_told_of_the_new_owner(void **state)
{
    fixture_t f;
    model_t m;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 100);
    uint32_t from = owner(&f, &m, 0);
    watch_all(&f);
    asker_t a       = {.f = &f, .m = &m};
    watch.at        = GO;
    watch.meanwhile = ask_meanwhile;
    watch.arg       = &a;
    move(&f, &m, from, 0);
    pthread_join(a.thread, NULL);
    assert_int_equal(a.found, 3 - from);
    end(&f, &m);
}

/* An open step is waited for. */
typedef struct closer {
    pthread_t thread;
    engine_t *engine;
    uint64_t step;
    bool commit;
} closer_t;

static void *
close_step(void *arg)
{
    closer_t *c      = arg;
    float zeros[DIM] = {0};

    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    if (c->commit) {
        OK(engine_step_run(c->engine, c->step, 0, NULL, zeros, zeros, NULL, NULL));
        OK(engine_step_commit(c->engine, c->step, NULL, 0));
    } else {
        OK(engine_step_abort(c->engine, c->step, ENGINE_BY_CLIENT));
    }
    return NULL;
}

static void
test_an_open_step_is_waited_for(void **state)
{
    (void)state;
    for (uint32_t commit = 0; commit < 2; commit++) {
        fixture_t f;
        model_t m;
        closer_t c = {.commit = commit};
        fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
        create(&f, &m, 0);
        append(&f, &m, 100);
        uint32_t from = owner(&f, &m, 0);
        c.step        = open_step(&f, &m, 0, 1, &c.engine);
        assert_int_equal(pthread_create(&c.thread, NULL, close_step, &c), 0);
        cluster_moved_t moved = move(&f, &m, from, 0);
        pthread_join(c.thread, NULL);
        assert_int_equal(moved.failed, 0);
        assert_int_equal(owner(&f, &m, 0), 3 - from);
        if (commit) {
            m.value[m.length++] = 0; /* it is there, too */
        }
        end(&f, &m);
    }
}

static void
test_a_full_worker_is_refused(void **state)
{
    fixture_t f;
    model_t m, big;
    cluster_moved_t moved;

    (void)state;
    fixture_open(&f, 2, ATTN_PLACE_WHOLE, NOT_LOST);
    create(&f, &m, 0);
    append(&f, &m, 100);
    uint32_t from   = owner(&f, &m, 0);
    uint64_t tokens = (UINT64_C(8) << 20) / (2 * DIM * sizeof(float)) - CHUNK, epoch;
    attn_seq_info_t info;
    create(&f, &big, 0); /* all the room that there is on the other */
    OK(cluster_layout(f.cluster, f.cache, &big.seq, NULL, &tokens, 1, &info, &epoch));
    assert_int_equal(info.chunks[0].worker, 3 - from);
    attn_seq_info_free(&info);
    assert_int_equal(cluster_seq_move(f.cluster, f.cache, m.seq, from, 3 - from, &moved),
                     ATTN_ERR_EXHAUSTED);
    assert_int_equal(cluster_seq_move(f.cluster, f.cache, m.seq, 0, 99, &moved),
                     ATTN_ERR_UNAVAILABLE);
    assert_int_equal(cluster_seq_move(f.cluster, f.cache, m.seq, 0, 0, &moved), ATTN_ERR_INVALID);
    assert_int_equal(cluster_seq_move(f.cluster, 99, m.seq, from, 0, &moved), ATTN_ERR_NOT_FOUND);
    OK(cluster_seq_free(f.cluster, f.cache, big.seq));
    end(&f, &m);
}

static void
test_a_worker_is_emptied(void **state)
{
    fixture_t f;
    model_t m[3];
    cluster_moved_t moved;
    engine_info_t info;

    (void)state;
    fixture_open(&f, 3, ATTN_PLACE_SPREAD, NOT_LOST);
    for (uint32_t i = 0; i < 3; i++) {
        create(&f, &m[i], 0);
        append(&f, &m[i], 300 + 200 * i);
    }
    assert_int_equal(cluster_worker_drain(f.cluster, 99, 0, false, &moved), ATTN_ERR_NOT_FOUND);
    assert_int_equal(cluster_worker_drain(f.cluster, 2, 2, false, &moved), ATTN_ERR_INVALID);
    do {
        OK(cluster_worker_drain(f.cluster, 2, 0, false, &moved));
        assert_int_equal(moved.failed, 0);
    } while (moved.left > 0);
    engine_describe(f.engines[1], &info);
    assert_int_equal(info.chunks, 0);
    assert_int_equal(info.used_bytes, 0);
    for (uint32_t i = 0; i < 3; i++) {
        check_model(&f, &m[i]);
        append(&f, &m[i], 600);
    }
    engine_describe(f.engines[1], &info);
    assert_int_equal(info.chunks, 0); /* nothing new came */
    OK(cluster_worker_drain(f.cluster, 2, 0, true, &moved));
    append(&f, &m[0], 600);
    engine_describe(f.engines[1], &info);
    assert_true(info.chunks > 0);
    OK(cluster_seq_free(f.cluster, f.cache, m[1].seq));
    OK(cluster_seq_free(f.cluster, f.cache, m[2].seq));
    end(&f, &m[0]);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_sequence_moves),
        cmocka_unit_test(test_an_old_layout_is_refused),
        cmocka_unit_test(test_a_shared_chunk_moves_for_all),
        cmocka_unit_test(test_a_move_fails_at_any_stage),
        cmocka_unit_test(test_a_word_is_taken_back_later),
        cmocka_unit_test(test_others_go_on_while_a_chunk_is_copied),
        cmocka_unit_test(test_whoever_asks_meanwhile_is_told_of_the_new_owner),
        cmocka_unit_test(test_an_open_step_is_waited_for),
        cmocka_unit_test(test_a_full_worker_is_refused),
        cmocka_unit_test(test_a_worker_is_emptied),
    };
    attn_log_set_level(ATTN_LOG_ERROR);
    return cmocka_run_group_tests_name("cluster_move", tests, NULL, NULL);
}
