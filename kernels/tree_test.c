#include "kernels/kernels.h"
#include "kernels/plan_types.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t chance_state = 20261122;

static uint32_t
chance_below(uint32_t n)
{
    chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((chance_state >> 33) % n);
}

static void
test_keys_are_a_bijection(void **state)
{
    (void)state;
    assert_int_equal(attn_tree_key(0), 0);
    assert_int_equal(attn_tree_key(1), 32u << 26);
    assert_int_equal(attn_tree_key(32), 1u << 26);
    assert_int_equal(attn_tree_key(64), 1);
    assert_int_equal(attn_tree_key(63), 63u << 26);
    assert_int_equal(attn_tree_key(UINT32_MAX), UINT32_MAX);
    for (int i = 0; i < 100000; i++) {
        uint32_t chunk = chance_below(UINT32_MAX);
        assert_int_equal(attn_tree_chunk(attn_tree_key(chunk)), chunk);
    }
}

static void
test_lca(void **state)
{
    (void)state;
    assert_int_equal(attn_tree_lca(0, 1), 1);
    assert_int_equal(attn_tree_lca(6, 7), 1);
    assert_int_equal(attn_tree_lca(5, 6), 2);
    assert_int_equal(attn_tree_lca(0, UINT32_MAX), 32);
    /* Chunks 0 and 64 meet in their lane, 0 and 32 right above, 0 and 1 at the root. */
    assert_int_equal(attn_tree_lca(attn_tree_key(0), attn_tree_key(64)), 1);
    assert_int_equal(attn_tree_lca(attn_tree_key(0), attn_tree_key(32)), 27);
    assert_int_equal(attn_tree_lca(attn_tree_key(0), attn_tree_key(1)), 32);
}

/* The frontier by its definition: of every key the largest node without a foreign one. */
static uint32_t
frontier_by_definition(const uint32_t *mine, uint32_t n_mine, const uint32_t *others,
                       uint32_t n_others, attn_node_t *nodes)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_mine; i++) {
        uint32_t level = 32;
        for (uint32_t j = 0; j < n_others; j++) {
            uint32_t lca = attn_tree_lca(attn_tree_key(mine[i]), attn_tree_key(others[j]));
            level        = lca - 1 < level ? lca - 1 : level;
        }
        attn_node_t node = {level, (uint32_t)((uint64_t)attn_tree_key(mine[i]) >> level)};
        bool known       = false;
        for (uint32_t j = 0; j < n; j++) {
            known = known || memcmp(&nodes[j], &node, sizeof(node)) == 0;
        }
        if (!known) {
            nodes[n++] = node;
        }
    }
    return n;
}

static void
test_frontier_is_the_definition(void **state)
{
    uint32_t mine[200], others[200];
    attn_node_t nodes[200], expected[200];
    (void)state;

    for (int round = 0; round < 3000; round++) {
        uint32_t n_mine = 0, n_others = 0;
        uint32_t n = 1 + chance_below(200), owners = 1 + chance_below(6),
                 range = n + chance_below(3000);
        for (uint32_t c = 0; c < range && n_mine + n_others < n; c++) {
            if (chance_below(range) < n) {
                if (chance_below(owners) == 0) {
                    mine[n_mine++] = c;
                } else {
                    others[n_others++] = c;
                }
            }
        }
        for (uint32_t i = n_mine; i > 1; i--) { /* any order */
            uint32_t j = chance_below(i), swap = mine[j];
            mine[j]     = mine[i - 1];
            mine[i - 1] = swap;
        }
        uint32_t got  = attn_tree_frontier(mine, n_mine, others, n_others, nodes);
        uint32_t want = frontier_by_definition(mine, n_mine, others, n_others, expected);
        assert_int_equal(got, want);
        for (uint32_t i = 0; i < got; i++) {
            if (i > 0) { /* ascending and apart */
                assert_true((uint64_t)nodes[i].index << nodes[i].level >=
                            ((uint64_t)nodes[i - 1].index + 1) << nodes[i - 1].level);
            }
            bool known = false;
            for (uint32_t j = 0; j < want; j++) {
                known = known || memcmp(&nodes[i], &expected[j], sizeof(nodes[i])) == 0;
            }
            assert_true(known);
        }
    }
}

static void
test_frontier_of_one_owner_is_the_root(void **state)
{
    uint32_t mine[] = {5, 0, 77};
    attn_node_t node[3];
    (void)state;

    assert_int_equal(attn_tree_frontier(mine, 0, mine, 3, node), 0);
    assert_int_equal(attn_tree_frontier(mine, 3, NULL, 0, node), 1);
    assert_int_equal(node[0].level, 32);
    assert_int_equal(node[0].index, 0);
}

/* Largest number of partials that any of `owners` sends for `chunks` chunks. */
static uint32_t
most_partials(uint32_t chunks, uint32_t owners, bool bit_reversed)
{
    uint32_t *mine = malloc(chunks * sizeof(*mine)), *others = malloc(chunks * sizeof(*others));
    attn_node_t *nodes = malloc(chunks * sizeof(*nodes));
    uint32_t most      = 0;

    for (uint32_t owner = 0; owner < owners; owner++) {
        uint32_t n_mine = 0, n_others = 0;
        for (uint32_t c = 0; c < chunks; c++) {
            uint32_t lane  = attn_tree_key(c % 64) >> 26;
            uint32_t whose = bit_reversed ? lane * owners / 64 : c % owners;
            if (whose == owner) {
                mine[n_mine++] = c;
            } else {
                others[n_others++] = c;
            }
        }
        uint32_t n = attn_tree_frontier(mine, n_mine, others, n_others, nodes);
        most       = n > most ? n : most;
    }
    free(mine);
    free(others);
    free(nodes);
    return most;
}

static void
test_partials_per_worker_are_bounded(void **state)
{
    static const uint32_t chunks[] = {1, 3, 8, 16, 64, 65, 128, 500, 4096};
    (void)state;

    for (size_t i = 0; i < sizeof(chunks) / sizeof(chunks[0]); i++) {
        for (uint32_t owners = 1; owners <= 8; owners++) {
            bool power = (owners & (owners - 1)) == 0;
            assert_in_range(most_partials(chunks[i], owners, true), 1, power ? 1 : 5);
            if (power) {
                assert_int_equal(most_partials(chunks[i], owners, false), 1);
            }
        }
    }
}

/* The order in which a fold merges leaves, as text, against the trie walked from its root. */
typedef struct text {
    char at[4096];
} text_t;

static void
trie_text(const uint64_t *keys, uint32_t n, uint32_t level, text_t *out)
{
    uint32_t split = 0;

    if (n == 1) {
        snprintf(out->at, sizeof(out->at), "%llu", (unsigned long long)keys[0]);
        return;
    }
    while (split < n && (keys[split] >> (level - 1) & 1) == 0) {
        split++;
    }
    if (split == 0 || split == n) {
        trie_text(keys, n, level - 1, out);
        return;
    }
    text_t *sides = malloc(2 * sizeof(*sides));
    trie_text(keys, split, level - 1, &sides[0]);
    trie_text(keys + split, n - split, level - 1, &sides[1]);
    snprintf(out->at, sizeof(out->at), "(%.2000s %.2000s)", sides[0].at, sides[1].at);
    free(sides);
}

static void
join(text_t *into, const text_t *from)
{
    text_t *left = malloc(sizeof(*left));
    *left        = *into;
    snprintf(into->at, sizeof(into->at), "(%.2000s %.2000s)", left->at, from->at);
    free(left);
}

/* Fold keys [first, end) as a piece of [0, n): leaves `stack` and its keys. */
static uint32_t
fold_piece(const uint64_t *keys, uint32_t n, uint32_t first, uint32_t end, text_t *stack,
           uint64_t *out)
{
    attn_fold_t fold;

    attn_fold_init(&fold, first > 0 ? attn_key_lca(keys[first - 1], keys[first]) : ATTN_LEVEL_NONE);
    for (uint32_t i = first; i <= end; i++) {
        uint32_t level = i < end ? attn_fold_level(&fold, keys[i])
                         : i < n ? attn_key_lca(keys[i - 1], keys[i])
                                 : ATTN_LEVEL_NONE;
        while (attn_fold_pops(&fold, level)) {
            join(&stack[fold.n - 1], &stack[fold.n]);
        }
        if (i < end) {
            snprintf(stack[fold.n].at, sizeof(stack[0].at), "%llu", (unsigned long long)keys[i]);
            attn_fold_push(&fold, keys[i]);
        }
    }
    memcpy(out, fold.keys, fold.n * sizeof(*out));
    return fold.n;
}

static void
test_a_fold_in_pieces_is_the_trie(void **state)
{
    text_t *stack = calloc(ATTN_FOLD_DEPTH, sizeof(*stack)),
           *all   = calloc(ATTN_FOLD_DEPTH, sizeof(*all));
    text_t *want  = malloc(sizeof(*want));
    uint64_t keys[24], out[ATTN_FOLD_DEPTH];
    (void)state;

    for (int round = 0; round < 2000; round++) {
        uint32_t n = 0, bits = 5 + chance_below(4);
        for (uint64_t key = 0; key < 1u << bits && n < 24; key++) {
            if (chance_below(1u << bits) < 16) {
                keys[n++] = key;
            }
        }
        if (n == 0) {
            continue;
        }
        attn_fold_t fold;
        attn_fold_init(&fold, ATTN_LEVEL_NONE);
        for (uint32_t first = 0, end; first < n; first = end) {
            end           = first + 1 + chance_below(n - first);
            uint32_t left = fold_piece(keys, n, first, end, stack, out);
            for (uint32_t i = 0; i < left; i++) {
                uint32_t level = attn_fold_level(&fold, out[i]);
                while (attn_fold_pops(&fold, level)) {
                    join(&all[fold.n - 1], &all[fold.n]);
                }
                all[fold.n] = stack[i];
                attn_fold_push(&fold, out[i]);
            }
        }
        while (attn_fold_pops(&fold, ATTN_LEVEL_NONE)) {
            join(&all[fold.n - 1], &all[fold.n]);
        }
        assert_int_equal(fold.n, 1);
        trie_text(keys, n, bits, want);
        assert_string_equal(all[0].at, want->at);
    }
    free(want);
    free(all);
    free(stack);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys_are_a_bijection),
        cmocka_unit_test(test_lca),
        cmocka_unit_test(test_frontier_is_the_definition),
        cmocka_unit_test(test_frontier_of_one_owner_is_the_root),
        cmocka_unit_test(test_partials_per_worker_are_bounded),
        cmocka_unit_test(test_a_fold_in_pieces_is_the_trie),
    };
    return cmocka_run_group_tests_name("kernels.tree", tests, NULL, NULL);
}
