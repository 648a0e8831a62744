/*
 * Workers that die or stop. What was theirs answers with a typed error, in time, and naming
 * the tokens; what was not goes on rightly; and there is room for what comes new.
 */
#include "tests/integration/fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { LONG = 0, SHORT = 1, NEW = 2 }; /* sequences of the model: over all workers; in one chunk */

#define LONG_TOKENS 1500u
#define SHORT_TOKENS 40u

static void
fixture_up(fixture_t *f, uint32_t workers)
{
    fixture_open(f, &(cluster_options_t){.workers = workers}, 2000, 7);
    model_create(&f->model, LONG);
    model_create(&f->model, SHORT);
    OK(model_append(&f->model, LONG, LONG_TOKENS));
    OK(model_append(&f->model, SHORT, SHORT_TOKENS));
}

/* An owner of the long sequence that holds none of the short one's tokens. */
static process_t *
victim(fixture_t *f)
{
    process_t *keep = fixture_owner(f, SHORT, 0);

    for (uint32_t i = 0; i * MODEL_CHUNK < LONG_TOKENS; i++) {
        process_t *candidate = fixture_owner(f, LONG, i);
        if (candidate != keep) {
            return candidate;
        }
    }
    fail_msg("the long sequence is on one worker");
    return NULL;
}

static bool
is_fault(attn_status_t status)
{
    return status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_ABORTED ||
           status == ATTN_ERR_LOST || status == ATTN_ERR_DEADLINE;
}

/* ---- kill -9 ---- */

/* Steps on the long sequence until one fails. */
typedef struct stepper {
    pthread_t thread;
    attn_cache_t *cache;
    attn_seq_t seq;
    uint64_t base;
    atomic_uint steps;
    attn_status_t status;
    char sentence[512];
    uint64_t ended_ms;
} stepper_t;

static attn_status_t
step_once(stepper_t *s)
{
    static float k[MODEL_KV_HEADS * MODEL_D_K], v[MODEL_KV_HEADS * MODEL_D_V];
    float q[MODEL_Q_HEADS * MODEL_D_K] = {0}, o[MODEL_Q_HEADS * MODEL_D_V];
    attn_entry_t entry                 = {.seq = s->seq, .base = s->base, .n_q = 1, .n_new = 1};
    attn_step_t *step;

    attn_status_t status = attn_step_begin(
        s->cache,
        &(attn_batch_t){
            .size = sizeof(attn_batch_t), .n = 1, .entries = &entry, .q_dtype = ATTN_F32},
        &step);
    if (status != ATTN_OK) {
        return status;
    }
    for (uint32_t l = 0; l < MODEL_LAYERS && status == ATTN_OK; l++) {
        status = attn_step_run(step, l, &(attn_tensor_t){.data = q, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = k, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = v, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = o, .dtype = ATTN_F32}, NULL);
    }
    if (status == ATTN_OK) {
        status = attn_step_commit(step, NULL);
    }
    if (status == ATTN_OK) {
        s->base++;
    } else {
        snprintf(s->sentence, sizeof(s->sentence), "%s", attn_last_error());
        attn_step_abort(step);
    }
    return status;
}

static void *
stepper_thread(void *arg)
{
    stepper_t *s = arg;

    while ((s->status = step_once(s)) == ATTN_OK) {
        atomic_fetch_add(&s->steps, 1);
    }
    if (s->sentence[0] == '\0') {
        snprintf(s->sentence, sizeof(s->sentence), "%s", attn_last_error());
    }
    s->ended_ms = now_ms();
    return NULL;
}

/* Begin on the long sequence is refused, with the ranges that were on the dead one. */
static void
check_long_is_lost(fixture_t *f, const attn_seq_info_t *before, uint32_t worker)
{
    attn_seq_info_t info;
    char range[64];

    assert_int_equal(model_append(&f->model, LONG, 1), ATTN_ERR_LOST);
    for (uint32_t c = 0; c * MODEL_CHUNK < LONG_TOKENS; c++) {
        snprintf(range, sizeof(range), "%u-", c * MODEL_CHUNK);
        if (before->chunks[c].worker == worker && strstr(attn_last_error(), range) == NULL) {
            fail_msg("no range from %u in: %s", c * MODEL_CHUNK, attn_last_error());
        }
    }
    OK(attn_seq_describe(f->cache, f->model.seqs[LONG].seq, &info));
    for (uint32_t c = 0; c * MODEL_CHUNK < LONG_TOKENS; c++) {
        assert_int_equal(info.chunks[c].lost, before->chunks[c].worker == worker);
    }
    attn_seq_info_free(&info);
}

/* A killed worker's successor joins, and new chunks are placed on it. */
static void
check_a_successor(fixture_t *f, process_t *dead)
{
    char address[64];
    attn_cluster_info_t info;

    cluster_start_worker(&f->cluster, (uint32_t)(dead - f->cluster.workers));
    snprintf(address, sizeof(address), "%s", dead->address);
    uint64_t end = now_ms() + 3000;
    bool used    = false;
    for (uint32_t s = NEW + 1; !used && now_ms() < end && s < MODEL_SEQS; s++) {
        sleep_ms(150); /* its region is opened by the next tick */
        model_create(&f->model, s);
        OK(model_append(&f->model, s, 1100));
        for (uint32_t i = 0; i * MODEL_CHUNK < 1100; i++) {
            used = used || fixture_owner(f, s, i) == dead;
        }
    }
    assert_true(used);
    OK(attn_cluster_describe(f->client, &info));
    assert_int_equal(info.n_workers, f->cluster.options.workers + 1);
    attn_cluster_info_free(&info);
}

static void
test_kill_a_worker_amid_steps(void **state)
{
    fixture_t f;
    stepper_t stepper = {0};
    attn_seq_info_t before;

    (void)state;
    fixture_up(&f, 3);
    OK(attn_seq_describe(f.cache, f.model.seqs[LONG].seq, &before));
    process_t *dead = victim(&f);
    uint32_t id     = fixture_worker_id(&f, dead->address);

    stepper.cache = f.cache;
    stepper.seq   = f.model.seqs[LONG].seq;
    stepper.base  = LONG_TOKENS;
    assert_int_equal(pthread_create(&stepper.thread, NULL, stepper_thread, &stepper), 0);
    while (atomic_load(&stepper.steps) < 5) {
        sleep_ms(5);
    }
    uint64_t killed_ms = now_ms();
    process_kill(dead);
    for (int i = 0; i < 10; i++) {
        OK(model_append(&f.model, SHORT, 1));
    }
    pthread_join(stepper.thread, NULL);
    if (!is_fault(stepper.status)) {
        fail_msg("%s: %s", attn_strerror(stepper.status), stepper.sentence);
    }
    assert_true(stepper.ended_ms - killed_ms < 2000);

    fixture_await_lost(&f, dead->address);
    f.model.seqs[LONG].length = stepper.base;
    check_long_is_lost(&f, &before, id);
    for (int i = 0; i < 10; i++) {
        OK(model_append(&f.model, SHORT, 3));
    }
    model_create(&f.model, NEW);
    OK(model_append(&f.model, NEW, 700));
    OK(model_append(&f.model, NEW, 1));
    OK(model_drop(&f.model, LONG));
    check_a_successor(&f, dead);
    OK(model_append(&f.model, SHORT, 3));
    attn_seq_info_free(&before);
    fixture_down(&f);
}

/* ---- SIGSTOP ---- */

/* Calls on a stopped worker's chunks end by their deadline and a quarter of a second. */
static void
test_a_stopped_worker_holds_nobody_beyond_the_deadline(void **state)
{
    fixture_t f;
    model_entry_t entry = {.s = LONG, .n_q = 1, .n_new = 1, .accepted = 1};
    attn_seq_t fork;

    (void)state;
    fixture_up(&f, 2);
    process_t *stopped = victim(&f);
    process_signal(stopped, SIGSTOP);

    uint64_t start       = now_ms();
    attn_status_t status = model_step(&f.model, &entry, 1, 500, false);
    uint64_t took        = now_ms() - start;
    assert_true(is_fault(status));
    assert_true(took <= 500 + 250);

    start  = now_ms(); /* control calls have the client's timeout, 2 s */
    status = attn_seq_fork(f.cache, f.model.seqs[LONG].seq, 300, &fork);
    took   = now_ms() - start;
    assert_true(is_fault(status));
    assert_true(took <= 2000 + 250);
    for (int i = 0; i < 5; i++) {
        OK(model_append(&f.model, SHORT, 1)); /* elsewhere all goes on */
    }
    process_signal(stopped, SIGCONT);
    fixture_down(&f);
}

/* A run in flight when its worker stops. */
static void
test_a_run_in_flight_ends_by_its_deadline(void **state)
{
    fixture_t f;
    attn_step_t *step;
    static float q[MODEL_Q_HEADS * MODEL_D_K], k[MODEL_KV_HEADS * MODEL_D_K],
        v[MODEL_KV_HEADS * MODEL_D_V], o[MODEL_Q_HEADS * MODEL_D_V];

    (void)state;
    fixture_up(&f, 2);
    attn_entry_t entry = {.seq = f.model.seqs[LONG].seq, .base = LONG_TOKENS, .n_q = 1, .n_new = 1};
    uint64_t start     = now_ms();
    OK(attn_step_begin(f.cache,
                       &(attn_batch_t){.size       = sizeof(attn_batch_t),
                                       .n          = 1,
                                       .entries    = &entry,
                                       .q_dtype    = ATTN_F32,
                                       .timeout_ms = 600},
                       &step));
    process_t *stopped = victim(&f);
    process_signal(stopped, SIGSTOP);
    attn_status_t status = attn_step_run(step, 0, &(attn_tensor_t){.data = q, .dtype = ATTN_F32},
                                         &(attn_tensor_t){.data = k, .dtype = ATTN_F32},
                                         &(attn_tensor_t){.data = v, .dtype = ATTN_F32},
                                         &(attn_tensor_t){.data = o, .dtype = ATTN_F32}, NULL);
    uint64_t took        = now_ms() - start;
    if (!is_fault(status)) {
        fail_msg("%s: %s", attn_strerror(status), attn_last_error());
    }
    assert_true(took <= 600 + 250);
    start = now_ms();
    attn_step_abort(step);
    assert_true(now_ms() - start <= 1250); /* a call of its own, of 1 s */
    process_signal(stopped, SIGCONT);
    fixture_down(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kill_a_worker_amid_steps),
        cmocka_unit_test(test_a_stopped_worker_holds_nobody_beyond_the_deadline),
        cmocka_unit_test(test_a_run_in_flight_ends_by_its_deadline),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
