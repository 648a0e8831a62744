/*
 * exchange_test.c: exchange.cu on the emulator, all ranks' launches at once, at any pace, against
 * the host's merge of all states along the tree: bit by bit. And how launches end when a rank does
 * not come, or somebody says so.
 */
#include "base/status.h"
#include "tests/exchange/batches.h"
#include "tests/exchange/emulator.h"

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define HALF (UINT64_C(16) << 20) /* most of it is never touched */
#define LAUNCHES 6u
#define HEADS_MAX 24u
#define FOREVER UINT64_C(1000000000000)

/* What a rank has of a launch. */
typedef struct rank {
    cuda_exchange_plan_t plan;
    float *a, *l, *lse;
    int32_t *e;
    void *o;
} rank_t;

typedef struct world {
    uint32_t ranks, d, launches;
    attn_dtype_t o_type;
    batch_t batches[LAUNCHES];
    rank_t of[CUDA_RANKS][LAUNCHES];
    cuda_exchange_t args[CUDA_RANKS][LAUNCHES];
    uint8_t *inboxes[CUDA_RANKS];
    cuda_exchange_control_t controls[CUDA_RANKS];
    uint32_t first, stops[CUDA_RANKS];
    float sinks[HEADS_MAX], sink_l[HEADS_MAX];
    int32_t sink_e[HEADS_MAX];
    bool has_sinks, has_lse;
    unsigned long long error;
} world_t;

static cuda_inbox_t *
inbox_of(const world_t *w, uint32_t rank)
{
    return (cuda_inbox_t *)(void *)w->inboxes[rank];
}

static float
chance_float(void)
{
    static const float odd[] = {0.0f, -0.0f, 1e-40f, 3e37f, -1e-30f, 1.0f};
    return chance_in(0, 20) == 0 ? odd[chance_in(0, 5)]
                                 : (float)((int)chance_in(0, 20000) - 10000) / 4096.0f;
}

/* States as leaves leave them: of any size, some of them empty, with noise in their A. */
static void
make_states(rank_t *rank, uint64_t n, uint32_t d)
{
    uint32_t spread = chance_in(0, 2) == 0 ? 300 : 6;

    rank->a = malloc((n * d + 1) * sizeof(float));
    rank->l = malloc((n + 1) * sizeof(float));
    rank->e = malloc((n + 1) * sizeof(int32_t));
    for (uint64_t i = 0; i < n; i++) {
        bool empty = chance_in(0, 6) == 0;
        rank->l[i] = empty ? 0.0f : (float)chance_in(1, 100000) / 1024.0f;
        rank->e[i] = empty ? INT32_MIN : (int32_t)chance_in(0, spread) - (int32_t)spread / 2;
        for (uint32_t j = 0; j < d; j++) {
            rank->a[i * d + j] = empty ? NAN : chance_float();
        }
    }
}

static void
fill_args(world_t *w, uint32_t r, uint32_t i, uint64_t limit_ns)
{
    rank_t *rank = &w->of[r][i];

    w->args[r][i] = (cuda_exchange_t){.sends    = rank->plan.sends,
                                      .rows     = rank->plan.rows,
                                      .parts    = rank->plan.parts,
                                      .n_sends  = (uint32_t)rank->plan.n_sends,
                                      .n_rows   = (uint32_t)rank->plan.n_rows,
                                      .me       = r,
                                      .ranks    = w->ranks,
                                      .a        = rank->a,
                                      .l        = rank->l,
                                      .e        = rank->e,
                                      .half     = HALF,
                                      .first    = w->first,
                                      .stop     = &w->stops[r],
                                      .control  = &w->controls[r],
                                      .limit_ns = limit_ns,
                                      .depth    = rank->plan.depth,
                                      .o_type   = w->o_type,
                                      .o        = rank->o,
                                      .lse      = w->has_lse ? rank->lse : NULL,
                                      .sink_l   = w->has_sinks ? w->sink_l : NULL,
                                      .sink_e   = w->has_sinks ? w->sink_e : NULL,
                                      .error    = &w->error};
    memcpy(w->args[r][i].inboxes, w->inboxes, sizeof(w->inboxes));
}

static world_t *
make_world(uint32_t ranks, uint32_t d, uint32_t launches, uint64_t limit_ns)
{
    static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    world_t *w                        = calloc(1, sizeof(*w));
    uint32_t heads                    = chance_in(1, chance_in(1, HEADS_MAX));

    w->ranks     = ranks;
    w->d         = d;
    w->launches  = launches;
    w->o_type    = types[chance_in(0, 2)];
    w->has_sinks = chance_in(0, 2) == 0;
    w->has_lse   = chance_in(0, 3) > 0;
    w->error     = UINT64_MAX;
    w->first     = chance_in(1, CUDA_FIRST_MAX);
    for (uint32_t h = 0; h < heads; h++) {
        w->sinks[h] = (float)((int)chance_in(0, 400) - 200);
        attn_state_of_sink(w->sinks[h], &w->sink_l[h], &w->sink_e[h]);
    }
    for (uint32_t r = 0; r < ranks; r++) {
        w->inboxes[r]        = calloc(1, sizeof(cuda_inbox_t) + 2 * HALF);
        w->controls[r].epoch = w->first;
        for (uint32_t from = 0; from < CUDA_RANKS; from++) {
            inbox_of(w, r)->beats[from].epoch = w->first;
        }
    }
    for (uint32_t i = 0; i < launches; i++) {
        make_batch(&w->batches[i], ranks, heads, d);
        for (uint32_t r = 0; r < ranks; r++) {
            attn_group_entry_t entries[ENTRIES_MAX];
            cuda_exchange_batch_t batch;
            rank_t *rank = &w->of[r][i];
            batch_of(&w->batches[i], r, HALF, entries, &batch);
            assert_int_equal(cuda_exchange_plan(&batch, &rank->plan), ATTN_OK);
            make_states(rank, w->batches[i].states[r], d);
            rank->o   = malloc((rank->plan.n_rows * d + 1) * sizeof(float));
            rank->lse = malloc((rank->plan.n_rows + 1) * sizeof(float));
            memset(rank->o, 0xff, (rank->plan.n_rows * d + 1) * sizeof(float));
            memset(rank->lse, 0xff, (rank->plan.n_rows + 1) * sizeof(float));
            fill_args(w, r, i, limit_ns);
        }
    }
    return w;
}

static void
free_world(world_t *w)
{
    for (uint32_t r = 0; r < w->ranks; r++) {
        free(w->inboxes[r]);
        for (uint32_t i = 0; i < w->launches; i++) {
            cuda_exchange_plan_free(&w->of[r][i].plan);
            free(w->of[r][i].a);
            free(w->of[r][i].l);
            free(w->of[r][i].e);
            free(w->of[r][i].o);
            free(w->of[r][i].lse);
        }
    }
    free(w);
}

/* ---- what the tree says ---- */

typedef struct state {
    float a[256], l;
    int32_t e;
} state_t;

static void
merge_trie(const world_t *w, uint32_t i, const leaf_t *leaves, uint32_t n, state_t *into)
{
    uint32_t cut = 1;
    state_t right;

    if (n == 1) {
        const rank_t *rank = &w->of[leaves[0].rank][i];
        memcpy(into->a, rank->a + leaves[0].state * w->d, w->d * sizeof(float));
        into->l = rank->l[leaves[0].state];
        into->e = rank->e[leaves[0].state];
        return;
    }
    uint32_t bit = 63u - (uint32_t)__builtin_clzll(leaves[0].key ^ leaves[n - 1].key);
    while (!(leaves[cut].key >> bit & 1)) {
        cut++;
    }
    merge_trie(w, i, leaves, cut, into);
    merge_trie(w, i, leaves + cut, n - cut, &right);
    attn_state_merge_row(into->a, &into->l, &into->e, right.a, right.l, right.e, w->d);
}

static void
check_row(const world_t *w, uint32_t i, uint32_t r, uint64_t at)
{
    const rank_t *rank = &w->of[r][i];
    uint64_t row       = rank->plan.row_first + at;
    uint32_t head      = (uint32_t)(row % w->batches[i].q_heads);
    uint64_t size      = attn_dtype_size(w->o_type);
    leaf_t leaves[CHUNKS_MAX];
    state_t state = {.e = INT32_MIN};
    float o[256], lse;
    uint8_t rounded[256 * 4];

    uint32_t n = leaves_of(&w->batches[i], row, leaves);
    if (n > 0) {
        merge_trie(w, i, leaves, n, &state);
    }
    attn_state_finish_row(state.a, state.l, state.e, w->d, w->has_sinks ? &w->sinks[head] : NULL, o,
                          &lse);
    attn_convert(rounded, w->o_type, o, ATTN_F32, w->d);
    assert_memory_equal((uint8_t *)rank->o + at * w->d * size, rounded, w->d * size);
    if (w->has_lse) {
        assert_memory_equal(&rank->lse[at], &lse, sizeof(lse));
    }
}

static void
check_launch(const world_t *w, uint32_t r, uint32_t i)
{
    for (uint64_t at = 0; at < w->of[r][i].plan.n_rows; at++) {
        check_row(w, i, r, at);
    }
}

static emulation_t
emulation_of(const world_t *w)
{
    emulation_t e = {.seed = chance_in(0, 1u << 30), .ranks = w->ranks, .d = w->d};

    for (uint32_t r = 0; r < w->ranks; r++) {
        e.of[r] =
            (emulated_rank_t){.n = w->launches, .grid = chance_in(1, 2), .launches = w->args[r]};
    }
    return e;
}

/* ---- tests ---- */

static void
run_rounds(uint32_t d, int rounds)
{
    for (int round = 0; round < rounds; round++) {
        world_t *w    = make_world(chance_in(1, CUDA_RANKS), d, LAUNCHES, FOREVER);
        emulation_t e = emulation_of(w);
        emulate_exchange(&e);
        for (uint32_t r = 0; r < w->ranks; r++) {
            assert_int_equal(w->controls[r].failed, 0);
            assert_int_equal(w->controls[r].epoch, w->first + LAUNCHES);
            assert_int_equal(w->controls[r].done, 0);
            for (uint32_t i = 0; i < LAUNCHES; i++) {
                check_launch(w, r, i);
            }
        }
        assert_true(w->error == UINT64_MAX);
        free_world(w);
    }
}

static void
test_rows_have_the_hosts_bits(void **state)
{
    (void)state;
    run_rounds(64, 20);
    run_rounds(128, 10);
    run_rounds(256, 5);
}

/* A sum that is not finite is reported with its row. */
static void
test_bad_sums_are_reported(void **state)
{
    (void)state;
    world_t *w = make_world(3, 64, 1, FOREVER);
    for (uint32_t r = 0; r < 3; r++) {
        for (uint64_t i = 0; i < w->batches[0].states[r]; i++) {
            w->of[r][0].l[i]           = 1.0f;
            w->of[r][0].e[i]           = 0;
            w->of[r][0].a[i * 64 + 63] = INFINITY;
        }
    }
    emulation_t e = emulation_of(w);
    emulate_exchange(&e);
    leaf_t leaves[CHUNKS_MAX];
    uint64_t first = 0;
    while (first < w->batches[0].rows && leaves_of(&w->batches[0], first, leaves) == 0) {
        first++;
    }
    if (first < w->batches[0].rows) {
        assert_true(w->error != UINT64_MAX);
        assert_int_equal(w->error & 0xfff, first % w->batches[0].q_heads);
    }
    free_world(w);
}

/* A rank that comes to some launches and then no more: those after end by their limit, and nobody
 * has a wrong row and thinks it right. */
static void
test_a_rank_that_does_not_come(void **state)
{
    uint32_t late = 0;
    (void)state;

    for (int round = 0; round < 12; round++) {
        world_t *w       = make_world(chance_in(2, CUDA_RANKS), 64, LAUNCHES, 100000);
        emulation_t e    = emulation_of(w);
        uint32_t missing = chance_in(0, w->ranks - 1);
        e.of[missing].n  = chance_in(0, LAUNCHES - 1);
        emulate_exchange(&e);
        for (uint32_t r = 0; r < w->ranks; r++) {
            assert_int_equal(e.of[r].ended, e.of[r].n);
            uint32_t failed = w->controls[r].failed;
            if (failed == 0) {
                for (uint32_t i = 0; i < e.of[r].n; i++) {
                    check_launch(w, r, i);
                }
            } else if ((failed & 255) == CUDA_EXCHANGE_LATE) {
                late++;
                assert_int_not_equal(failed >> 8, r);
            }
        }
        free_world(w);
    }
    assert_true(late > 6);
}

/* What somebody writes at a turn. */
typedef struct word {
    uint64_t turn;
    uint32_t *at, is;
} word_t;

static void
write_word(void *arg, uint64_t turn)
{
    const word_t *word = arg;

    if (turn == word->turn) {
        *word->at = word->is;
    }
}

/* The abort word of a rank, or its host's, ends its launches, whatever they wait for, and those of
 * others. */
static void
test_an_abort_ends_all_waits(void **state)
{
    uint32_t aborted = 0, whole = 0;
    (void)state;

    for (int round = 0; round < 15; round++) {
        world_t *w    = make_world(chance_in(2, CUDA_RANKS), 64, LAUNCHES, FOREVER);
        emulation_t e = emulation_of(w);
        uint32_t by   = chance_in(0, w->ranks - 1);
        word_t word   = {.turn = chance_in(1, 20000), .at = &w->stops[by], .is = 1};
        if (round % 2 > 0) {
            word.at = &inbox_of(w, by)->abort;
            word.is = w->first;
        }
        e.meanwhile = write_word;
        e.arg       = &word;
        if (chance_in(0, 1)) {
            e.of[(by + 1) % w->ranks].n = 1; /* somebody waits in any case */
        }
        emulate_exchange(&e);
        for (uint32_t r = 0; r < w->ranks; r++) {
            assert_int_equal(e.of[r].ended, e.of[r].n);
            if (w->controls[r].failed == 0) {
                whole++;
                for (uint32_t i = 0; i < e.of[r].n; i++) {
                    check_launch(w, r, i);
                }
            } else {
                aborted++;
                assert_int_equal(w->controls[r].failed & 255, CUDA_EXCHANGE_ABORTED);
            }
        }
        free_world(w);
    }
    assert_true(aborted > 10 && whole > 0);
}

/* Who was held up in another group writes to inboxes that are this one's now. */
static void
write_strays(void *arg, uint64_t turn)
{
    const world_t *w = arg;
    uint32_t by = chance_in(0, w->ranks - 1), to = chance_in(0, w->ranks - 1);
    uint32_t other     = w->first + (chance_in(0, 1) ? 1000 + chance_in(0, 99) : -1000u);
    const uint32_t p[] = {1, 2, 3, other};

    switch (turn % 4096 == 0 ? chance_in(0, 1) : turn % 64 == 0 ? 2 : 3) {
    case 0: /* its packets; where those of this group lie, as its ranks never come late */
        memcpy(w->inboxes[to] + sizeof(cuda_inbox_t) + chance_in(0, 1) * HALF +
                   chance_in(0, 200) * sizeof(p),
               p, sizeof(p));
        break;
    case 1:
        inbox_of(w, to)->beats[by].epoch = other;
        break;
    case 2:
        inbox_of(w, to)->abort = other;
        break;
    default:
        break;
    }
}

/* It may cost a launch its time, and nobody has a wrong row and thinks it right. An abort of
 * another group is none. */
static void
test_strays_of_another_group(void **state)
{
    uint32_t whole = 0, late_ranks = 0;
    (void)state;

    for (int round = 0; round < 20; round++) {
        world_t *w    = make_world(chance_in(2, 4), 64, LAUNCHES, 300000);
        emulation_t e = emulation_of(w);
        e.meanwhile   = write_strays;
        e.arg         = w;
        emulate_exchange(&e);
        for (uint32_t r = 0; r < w->ranks; r++) {
            for (uint32_t i = 0; i < LAUNCHES && w->controls[r].failed == 0; i++) {
                check_launch(w, r, i);
                whole++;
            }
            late_ranks += (w->controls[r].failed & 255) == CUDA_EXCHANGE_LATE;
        }
        free_world(w);
    }
    assert_true(whole > 0 && late_ranks > 0);
}

/* Nobody goes on without the others, though nothing of theirs is missing. */
static void
test_nobody_is_left_behind(void **state)
{
    (void)state;

    for (int round = 0; round < 5; round++) {
        world_t *w    = make_world(3, 64, LAUNCHES, 100000);
        emulation_t e = emulation_of(w);
        for (uint32_t r = 0; r < 3; r++) {
            for (uint32_t i = 0; i < LAUNCHES; i++) {
                w->args[r][i].n_sends = w->args[r][i].n_rows = 0;
            }
        }
        e.of[1].n = 1;
        emulate_exchange(&e);
        assert_int_equal(w->controls[1].failed, 0);
        assert_true(w->controls[0].failed != 0 && w->controls[2].failed != 0);
        assert_true(inbox_of(w, 1)->beats[0].epoch <= w->first + 3);
        free_world(w);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_have_the_hosts_bits),
        cmocka_unit_test(test_bad_sums_are_reported),
        cmocka_unit_test(test_a_rank_that_does_not_come),
        cmocka_unit_test(test_an_abort_ends_all_waits),
        cmocka_unit_test(test_strays_of_another_group),
        cmocka_unit_test(test_nobody_is_left_behind),
    };
    return cmocka_run_group_tests_name("exchange", tests, NULL, NULL);
}
