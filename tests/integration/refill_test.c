/*
 * Holes: a worker is killed, and what it had is given to the service again. Afterwards every answer
 * has the bits that it had before; until then what needs a lost token says so, and names it.
 */
#include "tests/integration/fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { LONG = 0, FORK = 1, EMPTY = 2, FULL = 3, NEW = 4 }; /* sequences of the model */

#define TOKENS 1500u /* six chunks of 256, the last of 220 */
#define C MODEL_CHUNK

static void
fixture_up(fixture_t *f, uint32_t workers)
{
    fixture_open(f, &(cluster_options_t){.workers = workers}, 4000, 11);
    model_create(&f->model, LONG);
    OK(model_append(&f->model, LONG, TOKENS));
}

static attn_seq_info_t
describe(fixture_t *f, uint32_t s)
{
    attn_seq_info_t info;

    OK(attn_seq_describe(f->cache, f->model.seqs[s].seq, &info));
    return info;
}

static uint64_t
ask(fixture_t *f, uint32_t s)
{
    uint64_t bits;

    OK(model_ask(&f->model, s, f->model.seqs[s].length, 5, &bits));
    return bits;
}

/* kill -9 the owner of chunk i, and wait until the coordinator counts it as lost. */
static void
kill_owner(fixture_t *f, uint32_t s, uint32_t i)
{
    process_t *owner = fixture_owner(f, s, i);

    process_kill(owner);
    fixture_await_lost(f, owner->address);
}

static void
expect_hole(fixture_t *f, uint32_t s, uint32_t i, uint64_t first, uint64_t end, bool lost,
            bool open)
{
    attn_seq_info_t info = describe(f, s);

    assert_true(i < info.n_holes);
    assert_int_equal(info.holes[i].first, first);
    assert_int_equal(info.holes[i].end, end);
    assert_int_equal(info.holes[i].worker != 0, lost);
    assert_int_equal(info.holes[i].open, open);
    attn_seq_info_free(&info);
}

static void
expect_length(fixture_t *f, uint32_t s, uint64_t length, uint32_t n_holes)
{
    attn_seq_info_t info = describe(f, s);

    assert_int_equal(info.length, length);
    assert_int_equal(info.n_holes, n_holes);
    attn_seq_info_free(&info);
}

#define REFUSED(call, wanted, words)                                                               \
    do {                                                                                           \
        assert_int_equal(call, wanted);                                                            \
        if (strstr(attn_last_error(), words) == NULL) {                                            \
            fail_msg("no \"%s\" in: %s", words, attn_last_error());                                \
        }                                                                                          \
    } while (0)

/* What a sequence with the holes 256-511 and from 1280 on does not do. */
static void
expect_refusals(fixture_t *f)
{
    model_t *m = &f->model;
    attn_seq_t fork;
    uint64_t bits;

    REFUSED(model_append(m, LONG, 1), ATTN_ERR_LOST, "tokens 256-511 (worker ");
    REFUSED(model_ask(m, LONG, 257, 1, &bits), ATTN_ERR_LOST, "tokens 1280-1535 (worker ");
    REFUSED(attn_seq_fork(f->cache, m->seqs[LONG].seq, 300, &fork), ATTN_ERR_LOST,
            "tokens 256-299 (worker ");
    REFUSED(attn_seq_truncate(f->cache, m->seqs[LONG].seq, 1290), ATTN_ERR_LOST, "1280-1289");
    REFUSED(model_refill(m, LONG, 300, 10, 0), ATTN_ERR_LOST, "256-511"); /* not where it begins */
    REFUSED(model_refill(m, LONG, 1280, 10, 10), ATTN_ERR_LOST, "256-511"); /* asks over a hole */
    REFUSED(model_refill(m, LONG, 1290, 10, 0), ATTN_ERR_LOST, "1280-1535");
    REFUSED(model_refill(m, LONG, 600, 10, 10), ATTN_ERR_LOST, "256-511");
    REFUSED(model_refill(m, LONG, 100, 10, 10), ATTN_ERR_STALE,
            "base 100"); /* nothing is lost there */
    REFUSED(model_refill(m, LONG, 256, 257, 257), ATTN_ERR_INVALID, "beyond the hole");
    OK(model_ask(m, LONG, 256, 9, &bits)); /* below the hole all is well */
    OK(model_ask(m, LONG, 77, 9, &bits));
}

static void
test_a_killed_worker_is_refilled(void **state)
{
    fixture_t f;
    model_t *m = &f.model;
    uint64_t fork_bits, bits, below;

    (void)state;
    fixture_up(&f, 4);
    OK(model_fork(m, LONG, 700, FORK)); /* shares chunks 0 and 1 */
    OK(model_append(m, FORK, 50));
    bits      = ask(&f, LONG);
    fork_bits = ask(&f, FORK);
    kill_owner(&f, LONG, 1);
    expect_length(&f, LONG, 1280, 2);
    expect_hole(&f, LONG, 0, C, 2 * C, true, false);
    expect_hole(&f, LONG, 1, 5 * C, 6 * C, true, true);
    expect_refusals(&f);

    /* In pieces, one of them with queries: they see what is before them. */
    OK(model_refill(m, LONG, 256, 100, 100));
    expect_hole(&f, LONG, 0, C + 100, 2 * C, false, false);
    expect_length(&f, LONG, 1280, 2);
    REFUSED(model_ask(m, LONG, 400, 1, &below), ATTN_ERR_LOST, "tokens 356-511 (placed anew)");
    REFUSED(model_refill(m, LONG, 256, 100, 0), ATTN_ERR_STALE, "base 256");
    REFUSED(model_refill(m, LONG, 356, 157, 0), ATTN_ERR_INVALID, "beyond the hole");
    OK(model_ask(m, LONG, 356, 3, &below));
    OK(model_refill(m, FORK, 356, 1, 1)); /* through the fork: it is there for both */
    OK(model_refill(m, LONG, 357, 155, 0));
    expect_length(&f, FORK, 750, 0);
    assert_int_equal(ask(&f, FORK), fork_bits);
    expect_length(&f, LONG, 1280, 1);
    OK(model_refill(m, LONG, 1280, 220, 7));
    expect_length(&f, LONG, TOKENS, 0);
    assert_int_equal(ask(&f, LONG), bits);

    OK(model_append(m, LONG, 40));
    OK(model_append(m, FORK, 300));
    OK(model_truncate(m, LONG, 400)); /* in the chunk that both share */
    OK(model_append(m, LONG, 200));
    ask(&f, LONG);
    ask(&f, FORK);
    OK(model_drop(m, LONG));
    OK(model_drop(m, FORK));
    fixture_down(&f);
}

/* Cut, or forked, within a hole that is half full: the chunk grows as any other from there. */
static void
test_a_hole_may_be_left_half_full(void **state)
{
    fixture_t f;
    model_t *m = &f.model;
    uint64_t bits;

    (void)state;
    fixture_up(&f, 4);
    kill_owner(&f, LONG, 1);
    OK(model_refill(m, LONG, 256, 100, 0));
    OK(model_fork(m, LONG, 330, FORK));
    OK(model_append(m, FORK, 300));
    ask(&f, FORK);
    OK(model_truncate(m, LONG, 356));
    expect_length(&f, LONG, 356, 0);
    OK(model_append(m, LONG, 500));
    ask(&f, LONG);
    OK(model_truncate(m, LONG, 100));
    OK(model_append(m, LONG, 10));
    bits = ask(&f, LONG);
    assert_int_equal(ask(&f, LONG), bits);
    fixture_down(&f);
}

/* ---- a hole refilled by a draft ---- */

#define DRAFT 8u

/* Of the draft's tokens these are the lost ones; the others are strangers. */
static const uint32_t path[]        = {0, 2, 3, 6};
static const uint32_t parent[DRAFT] = {0, 0, 0, 2, 1, 3, 3, 6}; /* of 0: itself */

/* Begin a draft of 8 at `first`, store all its layers, and ask a query at each token. */
static attn_status_t
draft_begin(fixture_t *f, uint64_t first, attn_step_t **step)
{
    static float q[DRAFT * MODEL_Q_HEADS * MODEL_D_K], o[DRAFT * MODEL_Q_HEADS * MODEL_D_V];
    static float k[DRAFT * MODEL_KV_HEADS * MODEL_D_K], v[DRAFT * MODEL_KV_HEADS * MODEL_D_V];
    const uint64_t k_row = MODEL_KV_HEADS * MODEL_D_K, v_row = MODEL_KV_HEADS * MODEL_D_V;
    const model_seq_t *seq = &f->model.seqs[LONG];
    attn_tensor_t tq = {.data = q, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
    attn_tensor_t tk = {.data = k, .dtype = ATTN_F32}, tv = {.data = v, .dtype = ATTN_F32};
    uint8_t mask[DRAFT] = {0};
    attn_entry_t e = {.seq = seq->seq, .base = first, .n_q = DRAFT, .n_new = DRAFT, .mask = mask};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &e, .q_dtype = ATTN_F32};

    for (uint32_t t = 0; t < DRAFT; t++) {
        mask[t] = (uint8_t)(1u << t | (t > 0 ? mask[parent[t]] : 0));
    }
    attn_status_t status = attn_step_begin(f->cache, &batch, step);
    for (uint32_t l = 0; status == ATTN_OK && l < MODEL_LAYERS; l++) {
        for (uint32_t t = 0, r = 0; t < DRAFT; t++) {
            bool lost     = r < 4 && path[r] == t;
            uint64_t from = lost ? first + r++ : t; /* a stranger: some other token's rows */
            memcpy(k + t * k_row, seq->k[l] + from * k_row, k_row * sizeof(float));
            memcpy(v + t * v_row, seq->v[l] + from * v_row, v_row * sizeof(float));
        }
        status = attn_step_run(*step, l, &tq, &tk, &tv, &to, NULL);
    }
    return status;
}

/* The path that is kept of a draft fills a hole as a plain step does. */
static void
test_a_hole_is_filled_by_a_draft(void **state)
{
    fixture_t f;
    model_t *m          = &f.model;
    uint32_t accepted[] = {4};
    attn_step_t *step;

    (void)state;
    fixture_up(&f, 4);
    uint64_t bits = ask(&f, LONG);
    kill_owner(&f, LONG, 1);
    OK(draft_begin(&f, 256, &step));
    attn_step_abort(step);
    expect_hole(&f, LONG, 0, C, 2 * C, false, false); /* its chunk has a place by now */
    OK(draft_begin(&f, 256, &step));
    OK(attn_step_commit_with(
        step, &(attn_commit_t){
                  .size = sizeof(attn_commit_t), .accepted = accepted, .path = path, .n_path = 4}));
    expect_hole(&f, LONG, 0, C + 4, 2 * C, false, false);
    OK(model_refill(m, LONG, 260, 248, 0));
    REFUSED(draft_begin(&f, 508, &step), ATTN_ERR_INVALID, "beyond the hole");
    OK(model_refill(m, LONG, 508, 4, 4));
    OK(model_refill(m, LONG, 1280, 216, 0));
    OK(draft_begin(&f, 1496, &step)); /* at the end, it may go beyond what was there */
    OK(attn_step_commit_with(
        step, &(attn_commit_t){
                  .size = sizeof(attn_commit_t), .accepted = accepted, .path = path, .n_path = 4}));
    expect_length(&f, LONG, TOKENS, 0);
    assert_int_equal(ask(&f, LONG), bits);
    fixture_down(&f);
}

/* Of two holes the later one may be filled first, if nothing is asked. */
static void
test_holes_in_any_order_and_lost_again(void **state)
{
    fixture_t f;
    model_t *m = &f.model;
    uint64_t bits;

    (void)state;
    fixture_up(&f, 3);
    bits                 = ask(&f, LONG);
    attn_seq_info_t info = describe(&f, LONG);
    uint32_t first = 6, last = 0; /* two chunks of one owner, not the last chunk */
    for (uint32_t c = 0; c < 5; c++) {
        for (uint32_t d = c + 1; d < 5; d++) {
            if (info.chunks[c].worker == info.chunks[d].worker && first > c) {
                first = c;
                last  = d;
            }
        }
    }
    attn_seq_info_free(&info);
    assert_true(last > first);
    kill_owner(&f, LONG, first);
    OK(model_refill(m, LONG, last * C, 10, 0));
    kill_owner(&f, LONG, last);          /* what was filled is lost again, and more with it */
    for (uint32_t rest = 1; rest > 0;) { /* from the back, but for what is behind all others */
        info = describe(&f, LONG);
        rest = info.n_holes;
        if (rest > 0) {
            uint32_t i = rest - 1;
            while (i > 0 && info.holes[i].open) {
                i--;
            }
            attn_hole_t hole = info.holes[i];
            hole.end         = hole.end < TOKENS ? hole.end : TOKENS;
            OK(model_refill(m, LONG, hole.first, (uint32_t)(hole.end - hole.first), 0));
        }
        attn_seq_info_free(&info);
    }
    expect_length(&f, LONG, TOKENS, 0);
    assert_int_equal(ask(&f, LONG), bits);
    fixture_down(&f);
}

/* Nothing is lost with a worker that had a chunk in advance: the next token goes elsewhere. */
static void
test_chunks_without_a_token_are_placed_anew(void **state)
{
    fixture_t f;
    model_t *m = &f.model;

    (void)state;
    fixture_up(&f, 2);
    model_create(m, FULL);
    OK(model_append(m, FULL, 2 * C)); /* chunk 2 is in advance, or will be */
    model_create(m, EMPTY);
    model_entry_t none = {.s = EMPTY, .n_q = 1, .n_new = 1, .accepted = 0};
    OK(model_step(m, &none, 1, 0, false)); /* its first chunk has a place */
    kill_owner(&f, EMPTY, 0);
    OK(model_append(m, EMPTY, 10));
    ask(&f, EMPTY);
    attn_seq_info_t info = describe(&f, FULL);
    bool whole           = !info.chunks[0].lost && !info.chunks[1].lost;
    attn_seq_info_free(&info);
    if (!whole) {
        for (uint32_t c = 0; c < 2; c++) {
            info = describe(&f, FULL);
            if (info.chunks[c].lost) {
                OK(model_refill(m, FULL, c * C, C, 0));
            }
            attn_seq_info_free(&info);
        }
    }
    OK(model_append(m, FULL, 100));
    ask(&f, FULL);
    fixture_down(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_killed_worker_is_refilled),
        cmocka_unit_test(test_a_hole_may_be_left_half_full),
        cmocka_unit_test(test_a_hole_is_filled_by_a_draft),
        cmocka_unit_test(test_holes_in_any_order_and_lost_again),
        cmocka_unit_test(test_chunks_without_a_token_are_placed_anew),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
