/* exchange_plan_test.c: what one rank writes where, others read there, and nothing else. */
#include "base/status.h"
#include "tests/exchange/batches.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define HALF (UINT64_C(64) << 20)

static uint64_t
symbol(uint32_t rank, uint64_t state)
{
    return (uint64_t)(rank + 1) << 40 | state;
}

/* All ranks' sends to the lines of all. */
static void
play_sends(const cuda_exchange_plan_t *plans, const batch_t *b, uint64_t (*lines)[65536])
{
    for (uint32_t r = 0; r < b->ranks; r++) {
        for (uint64_t i = 0; i < plans[r].n_sends; i++) {
            cuda_send_t send = plans[r].sends[i];
            assert_true(send.rank != r && send.rank < b->ranks);
            assert_in_range(send.line, 0, HALF / CUDA_LINE_BYTES(b->d) - 1);
            assert_true(lines[send.rank][send.line] == 0);
            assert_in_range(send.state, 0, b->states[r] - 1);
            lines[send.rank][send.line] = symbol(r, send.state);
        }
    }
}

/* A rank's rows have the states that the tree says, in its order. Returns the lines they read. */
static uint64_t
check_rows(const cuda_exchange_plan_t *plan, const batch_t *b, uint32_t me, uint64_t *lines)
{
    uint64_t read = 0;

    for (uint64_t i = 0; i < plan->n_rows; i++) {
        const cuda_exchange_row_t *row = &plan->rows[i];
        leaf_t leaves[CHUNKS_MAX];
        uint32_t n = leaves_of(b, plan->row_first + i, leaves);
        assert_int_equal(row->n_parts, n);
        assert_int_equal(row->head, (plan->row_first + i) % b->q_heads);
        for (uint32_t p = 0; p < n; p++) {
            cuda_exchange_part_t part = plan->parts[row->part_first + p];
            uint32_t level =
                p == 0 ? 64 : 64 - (uint32_t)__builtin_clzll(leaves[p - 1].key ^ leaves[p].key);
            assert_int_equal(part.from, leaves[p].rank | level << 8);
            if (leaves[p].rank == me) {
                assert_int_equal(part.at, leaves[p].state);
            } else {
                assert_true(lines[part.at] == symbol(leaves[p].rank, leaves[p].state));
                read++;
            }
        }
    }
    return read;
}

static void
test_lines_are_written_for_who_reads_them(void **state)
{
    static cuda_exchange_plan_t plans[CUDA_RANKS];
    static uint64_t lines[CUDA_RANKS][65536];
    (void)state;

    for (int round = 0; round < 200; round++) {
        batch_t b;
        attn_group_entry_t entries[ENTRIES_MAX];
        cuda_exchange_batch_t batch;
        uint64_t rows = 0, sends = 0, read = 0;
        make_batch(&b, chance_in(1, CUDA_RANKS), chance_in(1, chance_in(1, 40)),
                   64u << chance_in(0, 2));
        memset(lines, 0, sizeof(lines));
        for (uint32_t r = 0; r < b.ranks; r++) {
            batch_of(&b, r, HALF, entries, &batch);
            assert_int_equal(cuda_exchange_plan(&batch, &plans[r]), ATTN_OK);
            assert_int_equal(plans[r].row_first, rows);
            rows += plans[r].n_rows;
            sends += plans[r].n_sends;
        }
        assert_int_equal(rows, b.rows);
        play_sends(plans, &b, lines);
        for (uint32_t r = 0; r < b.ranks; r++) {
            read += check_rows(&plans[r], &b, r, lines[r]);
        }
        assert_int_equal(read, sends);
    }
    for (uint32_t r = 0; r < CUDA_RANKS; r++) {
        cuda_exchange_plan_free(&plans[r]);
    }
}

/* Shares differ by a row at most, whatever the numbers of heads and ranks are. */
static void
test_shares_are_even(void **state)
{
    cuda_exchange_plan_t plan = {0};
    (void)state;

    for (uint32_t ranks = 1; ranks <= CUDA_RANKS; ranks++) {
        attn_group_entry_t entry = {.n_q = 3};
        for (uint32_t me = 0; me < ranks; me++) {
            cuda_exchange_batch_t batch = {.ranks      = ranks,
                                           .me         = me,
                                           .q_heads    = 7,
                                           .head_dim_v = 64,
                                           .n          = 1,
                                           .entries    = &entry};
            assert_int_equal(cuda_exchange_plan(&batch, &plan), ATTN_OK);
            assert_in_range(plan.n_rows, 21 / ranks, (21 + ranks - 1) / ranks);
        }
    }
    cuda_exchange_plan_free(&plan);
}

static void
expect(const cuda_exchange_batch_t *batch, attn_status_t status, const char *word)
{
    cuda_exchange_plan_t plan = {0};

    assert_int_equal(cuda_exchange_plan(batch, &plan), status);
    assert_non_null(strstr(attn_last_error(), word));
    assert_true(status != ATTN_ERR_TOO_LARGE || plan.room[0] + plan.room[1] + plan.room[2] == 0);
    cuda_exchange_plan_free(&plan);
}

static void
test_bad_batches_are_refused(void **state)
{
    attn_node_t whole = {.level = 32, .index = 0}, chunk = {.level = 0, .index = 5};
    attn_group_entry_t entry   = {.n_q = 1, .n_nodes = {1, 1}, .nodes = {&whole, &chunk}};
    cuda_exchange_batch_t good = {
        .ranks = 2, .q_heads = 4, .head_dim_v = 128, .n = 1, .entries = &entry, .half = HALF};
    (void)state;

    expect(&good, ATTN_ERR_INVALID, "the same leaves");
    whole                   = (attn_node_t){.level = 0, .index = 4};
    cuda_exchange_batch_t b = good;
    b.ranks                 = CUDA_RANKS + 1;
    expect(&b, ATTN_ERR_INVALID, "8 ranks");
    b    = good;
    b.me = 2;
    expect(&b, ATTN_ERR_INVALID, "rank 2 of 2");
    b            = good;
    b.head_dim_v = 96;
    expect(&b, ATTN_ERR_INVALID, "96 columns");
    b         = good;
    b.q_heads = 0;
    expect(&b, ATTN_ERR_INVALID, "0 heads");
    b      = good; /* of 4 rows each rank finishes 2, and gets a state of each */
    b.half = 2 * CUDA_LINE_BYTES(128) - 1;
    for (b.me = 0; b.me < 2; b.me++) {
        expect(&b, ATTN_ERR_TOO_LARGE, "room for 1");
    }
    b           = good;
    entry.state = UINT32_MAX;
    expect(&b, ATTN_ERR_TOO_LARGE, "32 bits");
    entry.state      = 0;
    entry.n_q        = 1u << 24; /* nobody makes tables of that to see that they are too large */
    entry.n_nodes[0] = 1000;
    expect(&b, ATTN_ERR_TOO_LARGE, "room for");
    entry.n_q        = 1;
    entry.n_nodes[0] = 1024;
    expect(&b, ATTN_ERR_TOO_LARGE, "more than 1024");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lines_are_written_for_who_reads_them),
        cmocka_unit_test(test_shares_are_even),
        cmocka_unit_test(test_bad_batches_are_refused),
    };
    return cmocka_run_group_tests_name("exchange.plan", tests, NULL, NULL);
}
