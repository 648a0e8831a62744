/*
 * Batches over random layouts, each split checked against a plain reading of the header: who
 * has which chunk, who stores which token, who holds, and nodes as attn_tree_frontier() has
 * them.
 */
#include "balancer/holes.h"
#include "balancer/split.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 256u
#define ENTRIES_MAX 16u
#define CHUNKS_MAX 300u

static uint64_t random_state = 1;

static uint32_t
random_below(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % n);
}

typedef struct batch {
    uint32_t n;
    split_entry_t entries[ENTRIES_MAX];
    split_layout_t layouts[ENTRIES_MAX];
    split_chunk_t chunks[ENTRIES_MAX][CHUNKS_MAX];
} batch_t;

/* A sequence with `committed` tokens in n_chunks chunks whose workers are set by the caller. */
static void
set_entry(batch_t *batch, uint32_t i, uint64_t committed, uint32_t n_chunks, uint64_t base,
          uint32_t n_q, uint32_t n_new)
{
    batch->entries[i] = (split_entry_t){.base = base, .n_q = n_q, .n_new = n_new};
    batch->layouts[i] =
        (split_layout_t){.seq = 100 + i, .n_chunks = n_chunks, .chunks = batch->chunks[i]};
    for (uint32_t c = 0; c < n_chunks; c++) {
        uint64_t first                 = (uint64_t)c * CHUNK;
        uint64_t held                  = committed > first ? committed - first : 0;
        batch->chunks[i][c].length     = held < CHUNK ? (uint32_t)held : CHUNK;
        batch->chunks[i][c].generation = held > 0;
        batch->chunks[i][c].id         = 1000 * (i + 1) + c;
    }
}

static uint32_t
spread_worker(uint32_t chunk, uint32_t workers)
{
    return 1 + (uint32_t)((uint64_t)(attn_tree_key(chunk) >> 26) * workers / 64);
}

static const split_part_t *
find_part(const split_t *split, uint32_t worker, uint32_t entry)
{
    for (uint32_t s = 0; s < split->n_shares; s++) {
        for (uint32_t p = 0; split->shares[s].worker == worker && p < split->shares[s].n_parts;
             p++) {
            if (split->shares[s].parts[p].entry == entry) {
                return &split->shares[s].parts[p];
            }
        }
    }
    return NULL;
}

/* ---- the model: one part from the header's words ---- */

typedef struct expected {
    uint32_t mine[CHUNKS_MAX], others[CHUNKS_MAX];
    uint32_t n_mine, n_others, n_new;
    bool holds;
} expected_t;

static uint32_t
new_tokens_in(const split_entry_t *entry, uint32_t c)
{
    uint32_t n = 0;
    for (uint32_t t = 0; t < entry->n_new; t++) {
        n += (entry->base + t) / CHUNK == c;
    }
    return n;
}

static void
expect(const batch_t *batch, uint32_t i, uint32_t worker, expected_t *expected)
{
    const split_entry_t *entry   = &batch->entries[i];
    const split_layout_t *layout = &batch->layouts[i];
    uint32_t next                = (uint32_t)(entry->base / CHUNK);

    memset(expected, 0, sizeof(*expected));
    for (uint32_t c = 0; c < layout->n_chunks; c++) {
        uint32_t n_new = new_tokens_in(entry, c);
        if ((uint64_t)c * CHUNK >= entry->base && n_new == 0) {
            continue;
        }
        if (layout->chunks[c].worker != worker) {
            expected->others[expected->n_others++] = c;
            continue;
        }
        expected->mine[expected->n_mine++] = c;
        expected->n_new += n_new;
    }
    next            = next < layout->n_chunks ? next : layout->n_chunks - 1;
    expected->holds = layout->chunks[next].worker == worker;
}

static void
check_refs_and_rows(const batch_t *batch, const split_part_t *part, uint32_t worker,
                    const expected_t *expected)
{
    const split_entry_t *entry  = &batch->entries[part->entry];
    const split_chunk_t *chunks = batch->layouts[part->entry].chunks;
    uint32_t run = 0, stored = 0;

    assert_int_equal(part->n_refs, expected->n_mine);
    for (uint32_t r = 0; r < part->n_refs; r++) {
        const split_ref_t *ref = &part->refs[r];
        assert_int_equal(ref->number, expected->mine[r]);
        assert_int_equal(ref->id, chunks[ref->number].id);
        assert_int_equal(ref->generation, chunks[ref->number].generation);
        assert_int_equal(ref->length, chunks[ref->number].length);
        assert_int_equal(ref->n_new, new_tokens_in(entry, ref->number));
    }
    /* Every new token, in order, is in a run if and only if it is this worker's. */
    for (uint32_t t = 0; t < entry->n_new; t++) {
        if (run < part->n_rows && t == part->rows[run].first + part->rows[run].n) {
            run++;
        }
        bool in_run = run < part->n_rows && t >= part->rows[run].first;
        assert_int_equal(in_run, chunks[(entry->base + t) / CHUNK].worker == worker);
        stored += in_run;
    }
    assert_int_equal(stored, expected->n_new);
    for (uint32_t r = 0; r < part->n_rows; r++) {
        assert_true(part->rows[r].n > 0);
        assert_true(r == 0 || part->rows[r].first > part->rows[r - 1].first + part->rows[r - 1].n);
    }
}

static void
check_part(const batch_t *batch, const split_part_t *part, uint32_t worker,
           const expected_t *expected)
{
    attn_node_t nodes[CHUNKS_MAX];
    bool attends = batch->entries[part->entry].n_q > 0 && expected->n_mine > 0;

    check_refs_and_rows(batch, part, worker, expected);
    assert_int_equal(part->holds, expected->holds);
    assert_int_equal(part->attends, attends);
    assert_int_equal(part->whole, attends && expected->n_others == 0);
    if (!attends || part->whole) {
        assert_int_equal(part->n_nodes, 0);
        return;
    }
    uint32_t n = attn_tree_frontier(expected->mine, expected->n_mine, expected->others,
                                    expected->n_others, nodes);
    assert_int_equal(part->n_nodes, n);
    assert_memory_equal(part->nodes, nodes, n * sizeof(nodes[0]));
}

/* The whole split against the model; returns the largest number of nodes of a part. */
static uint32_t
check_split(const batch_t *batch, const split_t *split, uint32_t workers)
{
    uint32_t most = 0, n_parts = 0, n_found = 0;
    uint32_t holders[ENTRIES_MAX] = {0};

    for (uint32_t s = 0; s < split->n_shares; s++) {
        assert_true(s == 0 || split->shares[s].worker > split->shares[s - 1].worker);
        assert_true(split->shares[s].n_parts > 0);
        for (uint32_t p = 1; p < split->shares[s].n_parts; p++) {
            assert_true(split->shares[s].parts[p].entry > split->shares[s].parts[p - 1].entry);
        }
        n_parts += split->shares[s].n_parts;
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        for (uint32_t worker = 1; worker <= workers; worker++) {
            const split_part_t *part = find_part(split, worker, i);
            expected_t expected;
            expect(batch, i, worker, &expected);
            bool seen = batch->entries[i].n_q > 0 && expected.n_mine > 0;
            assert_int_equal(part != NULL, seen || expected.n_new > 0 || expected.holds);
            if (part) {
                check_part(batch, part, worker, &expected);
                most = part->n_nodes > most ? part->n_nodes : most;
                holders[i] += part->holds;
                n_found++;
            }
        }
        assert_int_equal(holders[i], 1);
    }
    assert_int_equal(n_found, n_parts);
    return most;
}

static void
random_entry(batch_t *batch, uint32_t i, uint32_t workers)
{
    uint32_t committed =
        random_below(8) == 0 ? 0 : random_below(random_below(4) == 0 ? 40 * CHUNK : 5 * CHUNK);
    uint32_t n_new    = random_below(3) == 0 ? 0 : random_below(random_below(2) ? 3 : 4 * CHUNK);
    uint32_t base     = n_new == 0 ? random_below(committed + 1) : committed;
    uint32_t n_q      = random_below(4) == 0 ? 0 : random_below(n_new + 2);
    uint32_t end      = committed > base + n_new ? committed : base + n_new;
    uint32_t n_chunks = (end + CHUNK - 1) / CHUNK + random_below(3);
    uint32_t style = random_below(3), alone = 1 + random_below(workers);

    set_entry(batch, i, committed, n_chunks ? n_chunks : 1, base, n_q, n_new);
    for (uint32_t c = 0; c < batch->layouts[i].n_chunks; c++) {
        batch->chunks[i][c].worker = style == 0   ? alone
                                     : style == 1 ? spread_worker(c, workers)
                                                  : 1 + random_below(workers);
    }
}

static void
test_random_batches(void **state)
{
    static batch_t batch;
    (void)state;
    for (uint32_t round = 0; round < 3000; round++) {
        uint32_t workers = 1 + random_below(9);
        split_t *split   = NULL;
        batch.n          = random_below(ENTRIES_MAX + 1);
        for (uint32_t i = 0; i < batch.n; i++) {
            random_entry(&batch, i, workers);
        }
        assert_int_equal(split_batch(batch.entries, batch.layouts, batch.n, CHUNK, &split),
                         ATTN_OK);
        check_split(&batch, split, workers);
        split_free(split);
    }
    split_free(NULL);
}

/* The formula of directory.h keeps the number of partials bounded at every length. */
static void
test_spread_sequences_have_few_nodes(void **state)
{
    static batch_t batch;
    uint32_t most[9] = {0};
    (void)state;
    batch.n = 1;
    for (uint32_t workers = 1; workers <= 8; workers++) {
        for (uint32_t n_chunks = 1; n_chunks < CHUNKS_MAX; n_chunks += n_chunks < 140 ? 1 : 37) {
            split_t *split = NULL;
            set_entry(&batch, 0, n_chunks * CHUNK - 1, n_chunks, n_chunks * CHUNK - 1, 1, 1);
            for (uint32_t c = 0; c < n_chunks; c++) {
                batch.chunks[0][c].worker = spread_worker(c, workers);
            }
            assert_int_equal(split_batch(batch.entries, batch.layouts, 1, CHUNK, &split), ATTN_OK);
            uint32_t nodes = check_split(&batch, split, workers);
            most[workers]  = nodes > most[workers] ? nodes : most[workers];
            split_free(split);
        }
    }
    assert_int_equal(most[1], 0); /* whole */
    assert_int_equal(most[2], 1);
    assert_int_equal(most[4], 1);
    assert_int_equal(most[8], 1);
    assert_in_range(most[3], 2, 5);
    assert_in_range(most[5], 2, 5);
    assert_in_range(most[6], 2, 5);
    assert_in_range(most[7], 2, 5);
}

static void
test_prefill_over_two_workers(void **state)
{
    static batch_t batch;
    split_t *split = NULL;
    (void)state;
    batch.n = 1;
    set_entry(&batch, 0, 100, 5, 100, 900, 900); /* tokens 100 to 999: chunks 0 to 3 */
    static const uint32_t workers[] = {7, 3, 3, 7, 9};
    for (uint32_t c = 0; c < 5; c++) {
        batch.chunks[0][c].worker = workers[c];
    }
    assert_int_equal(split_batch(batch.entries, batch.layouts, 1, CHUNK, &split), ATTN_OK);
    assert_int_equal(split->n_shares, 2); /* worker 9 has nothing to do yet */
    assert_int_equal(split->shares[0].worker, 3);
    const split_part_t *three = &split->shares[0].parts[0], *seven = &split->shares[1].parts[0];
    assert_int_equal(three->n_rows, 1); /* chunks 1 and 2 are neighbours: one run */
    assert_int_equal(three->rows[0].first, 156);
    assert_int_equal(three->rows[0].n, 512);
    assert_false(three->holds);
    assert_int_equal(seven->n_rows, 2);
    assert_int_equal(seven->rows[0].first, 0);
    assert_int_equal(seven->rows[0].n, 156);
    assert_int_equal(seven->rows[1].first, 668);
    assert_int_equal(seven->rows[1].n, 232);
    assert_true(seven->holds);
    assert_false(seven->whole);
    split_free(split);
}

static void
assert_refused(const batch_t *batch, attn_status_t status, const char *words)
{
    split_t *split = NULL;

    assert_int_equal(split_batch(batch->entries, batch->layouts, batch->n, CHUNK, &split), status);
    assert_null(split);
    if (!strstr(attn_last_error(), words)) {
        fail_msg("\"%s\" lacks \"%s\"", attn_last_error(), words);
    }
}

static void
test_refusals_name_entry_field_and_limit(void **state)
{
    static batch_t batch;
    split_t *split = NULL;
    (void)state;
    batch.n = 2;
    set_entry(&batch, 0, 10, 1, 10, 1, 1);
    set_entry(&batch, 1, 500, 2, 500, 1, 12);
    assert_int_equal(split_batch(batch.entries, batch.layouts, 2, CHUNK, &split), ATTN_OK);
    split_free(split);

    batch.entries[1].n_new = 13; /* 513 tokens in two chunks of 256 */
    assert_refused(&batch, ATTN_ERR_INVALID,
                   "entry 1: base 500 and n_new 13 of sequence 101 end above its 2 chunks");
    batch.entries[1] = (split_entry_t){.base = UINT64_MAX, .n_q = 1, .n_new = 2};
    assert_refused(&batch, ATTN_ERR_INVALID, "entry 1: base 18446744073709551615");
    batch.entries[1] = (split_entry_t){.base = 501, .n_q = 1};
    assert_refused(&batch, ATTN_ERR_INVALID,
                   "entry 1: base is 501, the committed length of sequence 101 is 500");
    batch.entries[1] = (split_entry_t){.base = 501, .n_q = 1, .n_new = 1};
    assert_refused(&batch, ATTN_ERR_STALE,
                   "entry 1: sequence 101 with base 501 has 245 committed tokens in chunk 1 where "
                   "the layout says 244");
    batch.entries[1] = (split_entry_t){.base = 499, .n_q = 1, .n_new = 1};
    assert_refused(&batch, ATTN_ERR_STALE, "entry 1: sequence 101 with base 499");
    /* The sum is right, but a chunk has a gap. */
    batch.entries[1]          = (split_entry_t){.base = 500, .n_q = 1, .n_new = 1};
    batch.chunks[1][0].length = 250;
    batch.chunks[1][1].length = 250;
    assert_refused(&batch, ATTN_ERR_STALE, "in chunk 0");
    set_entry(&batch, 1, 0, 0, 0, 1, 0);
    assert_refused(&batch, ATTN_ERR_INVALID, "entry 1: the layout of sequence 101 has no chunks");
}

/* Chunks of 256: 0 full | 1 lost | 2 full | 3 sealed, 100 | 4 full | 5 lost | 6 lost. */
static void
make_holes(batch_t *batch, split_entry_t entry)
{
    static const uint32_t lengths[] = {CHUNK, 0, CHUNK, 100, CHUNK, 0, 0};

    batch->n          = 1;
    batch->entries[0] = entry;
    batch->layouts[0] = (split_layout_t){.seq = 100, .n_chunks = 7, .chunks = batch->chunks[0]};
    for (uint32_t c = 0; c < 7; c++) {
        batch->chunks[0][c] = (split_chunk_t){.id         = c + 1,
                                              .worker     = 1 + c % 4,
                                              .generation = lengths[c] > 0,
                                              .length     = lengths[c],
                                              .lost       = c == 1 || c >= 5,
                                              .sealed     = c == 3};
    }
}

static void
expect_split(batch_t *batch, split_entry_t entry, attn_status_t wanted, const char *words)
{
    split_t *split = NULL;

    make_holes(batch, entry);
    if (wanted != ATTN_OK) {
        assert_refused(batch, wanted, words);
        return;
    }
    assert_int_equal(split_batch(batch->entries, batch->layouts, 1, CHUNK, &split), ATTN_OK);
    for (uint32_t s = 0; s < split->n_shares; s++) {
        for (uint32_t r = 0; r < split->shares[s].parts[0].n_refs; r++) {
            assert_false(batch->chunks[0][split->shares[s].parts[0].refs[r].number].lost);
        }
    }
    split_free(split);
}

static void
test_holes(void **state)
{
    static batch_t batch;
    char text[200];
    hole_t hole;
    uint32_t n = 0;
    (void)state;
    make_holes(&batch, (split_entry_t){0});
    const split_chunk_t *chunks = batch.chunks[0];
    assert_int_equal(holes_length(chunks, 7, CHUNK), 5 * CHUNK);
    assert_true(holes_text(chunks, 7, CHUNK, UINT64_MAX, text, sizeof(text)));
    assert_string_equal(text, "tokens 256-511 (worker 2), tokens 868-1023 (placed anew), "
                              "tokens 1280-1535 (worker 2), tokens 1536-1791 (worker 3)");
    assert_true(holes_text(chunks, 7, CHUNK, 300, text, sizeof(text)));
    assert_string_equal(text, "tokens 256-299 (worker 2)");
    assert_true(holes_text(chunks, 7, CHUNK, 300, text, 10));
    assert_string_equal(text, "tokens 25");
    assert_false(holes_text(chunks, 7, CHUNK, 256, text, sizeof(text)));
    for (uint32_t c = 0; holes_next(chunks, 7, CHUNK, &c, &hole); n++) {
        assert_int_equal(hole.open, n >= 2);
    }
    assert_int_equal(n, 4);
    batch.chunks[0][4].length = 10; /* the last one grows: nothing is behind it */
    assert_int_equal(holes_length(chunks, 7, CHUNK), 4 * CHUNK + 10);
    assert_true(holes_text(chunks, 7, CHUNK, UINT64_MAX, text, sizeof(text)));
    assert_string_equal(text, "tokens 256-511 (worker 2), tokens 868-1023 (placed anew)");
    assert_int_equal(holes_length(chunks, 2, CHUNK), CHUNK);
    assert_int_equal(holes_length(chunks + 5, 2, CHUNK), 0);
}

static void
test_entries_over_holes(void **state)
{
    static batch_t batch;
    (void)state;
    expect_split(&batch, (split_entry_t){.base = 256, .n_q = 9}, ATTN_OK, NULL);
    expect_split(&batch, (split_entry_t){.base = 257, .n_q = 1}, ATTN_ERR_LOST, "tokens 256-511");
    expect_split(&batch, (split_entry_t){.base = 868, .n_new = 156}, ATTN_OK, NULL);
    expect_split(&batch, (split_entry_t){.base = 868, .n_new = 9, .n_q = 9}, ATTN_ERR_LOST, "256-");
    expect_split(&batch, (split_entry_t){.base = 868, .n_new = 157}, ATTN_ERR_INVALID,
                 "tokens 868-1024 of sequence 100 go beyond the hole that they begin in: it ends "
                 "at 1024");
    expect_split(&batch, (split_entry_t){.base = 867, .n_new = 1}, ATTN_ERR_STALE, "base 867");
    expect_split(&batch, (split_entry_t){.base = 869, .n_new = 1}, ATTN_ERR_STALE, "base 869");
    expect_split(&batch, (split_entry_t){.base = 256, .n_new = 1}, ATTN_ERR_LOST, "tokens 256-511");
    expect_split(&batch, (split_entry_t){.base = 1280, .n_new = 1}, ATTN_ERR_LOST, "tokens 256-");
    expect_split(&batch, (split_entry_t){.base = 100, .n_new = 1}, ATTN_ERR_STALE, "base 100");
    expect_split(&batch, (split_entry_t){.base = 0, .n_q = 0}, ATTN_OK, NULL);
}

static int
compare_ns(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static void
test_a_large_batch_is_split_fast(void **state)
{
    enum { N = 256, CHUNKS = 8, ROUNDS = 200 };
    static split_chunk_t chunks[N][CHUNKS];
    split_entry_t entries[N];
    split_layout_t layouts[N];
    uint64_t ns[ROUNDS];
    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        entries[i] = (split_entry_t){.base = (CHUNKS - 1) * 2048 + i, .n_q = 1, .n_new = 1};
        layouts[i] = (split_layout_t){.seq = i + 1, .n_chunks = CHUNKS, .chunks = chunks[i]};
        for (uint32_t c = 0; c < CHUNKS; c++) {
            chunks[i][c] = (split_chunk_t){.id         = i * CHUNKS + c + 1,
                                           .worker     = spread_worker(c, 8),
                                           .generation = 1,
                                           .length     = c < CHUNKS - 1 ? 2048 : i};
        }
    }
    for (uint32_t round = 0; round < ROUNDS; round++) {
        split_t *split = NULL;
        uint64_t start = attn_now_ns();
        assert_int_equal(split_batch(entries, layouts, N, 2048, &split), ATTN_OK);
        ns[round] = attn_now_ns() - start;
        assert_int_equal(split->n_shares, 8);
        split_free(split);
    }
    qsort(ns, ROUNDS, sizeof(ns[0]), compare_ns);
    printf("split of %d entries of %d chunks on 8 workers: p50 %.1f us, p99 %.1f us\n", N, CHUNKS,
           (double)ns[ROUNDS / 2] / 1e3, (double)ns[ROUNDS * 99 / 100] / 1e3);
    assert_true(ns[ROUNDS / 2] < 5 * ATTN_NS_PER_MS); /* wide: sanitizers and busy machines */
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_batches),
        cmocka_unit_test(test_spread_sequences_have_few_nodes),
        cmocka_unit_test(test_prefill_over_two_workers),
        cmocka_unit_test(test_refusals_name_entry_field_and_limit),
        cmocka_unit_test(test_holes),
        cmocka_unit_test(test_entries_over_holes),
        cmocka_unit_test(test_a_large_batch_is_split_fast),
    };
    return cmocka_run_group_tests_name("balancer.split", tests, NULL, NULL);
}
