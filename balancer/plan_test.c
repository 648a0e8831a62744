#include "balancer/plan.h"

#include "base/clock.h"
#include "base/status.h"
#include "kernels/plan_types.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 2048u
#define PAGE 16u
#define LEAF 128u
#define ENTRIES_MAX 300u

static uint64_t chance_state = 20261122;

static uint32_t
chance_in(uint32_t low, uint32_t high)
{
    chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
    return low + (uint32_t)((chance_state >> 33) % (high - low + 1));
}

/* Sequences with pages of their own, in order. */
typedef struct batch {
    attn_problem_entry_t entries[ENTRIES_MAX];
    attn_kv_run_t *runs[ENTRIES_MAX];
    uint32_t *pages[ENTRIES_MAX];
    uint32_t next_page;
    attn_problem_t problem;
} batch_t;

static void
batch_init(batch_t *b, uint32_t kv_heads, uint32_t group)
{
    *b                 = (batch_t){.problem = {.q_heads    = kv_heads * group,
                                               .kv_heads   = kv_heads,
                                               .head_dim_k = 128,
                                               .head_dim_v = 128,
                                               .page_size  = PAGE,
                                               .chunk_size = CHUNK,
                                               .causal     = true}};
    b->problem.entries = b->entries;
}

static void
add(batch_t *b, uint32_t length, uint32_t n_q)
{
    uint32_t i = b->problem.n++, n_runs = (length + CHUNK - 1) / CHUNK,
             n = (length + PAGE - 1) / PAGE;

    b->runs[i]  = calloc(n_runs + 1, sizeof(attn_kv_run_t));
    b->pages[i] = calloc(n + 1, sizeof(uint32_t));
    for (uint32_t p = 0; p < n; p++) {
        b->pages[i][p] = b->next_page++;
    }
    for (uint32_t c = 0; c < n_runs; c++) {
        b->runs[i][c] = (attn_kv_run_t){.chunk  = c,
                                        .pages  = b->pages[i] + c * (CHUNK / PAGE),
                                        .length = c + 1 < n_runs ? CHUNK : length - c * CHUNK};
    }
    b->entries[i] = (attn_problem_entry_t){
        .kv_length = length, .n_q = n_q, .n_runs = n_runs, .runs = b->runs[i]};
}

static void
batch_free(batch_t *b)
{
    for (uint32_t i = 0; i < b->problem.n; i++) {
        free(b->runs[i]);
        free(b->pages[i]);
    }
}

static attn_plan_t *
plan_of(const batch_t *b, uint32_t parallelism)
{
    attn_plan_t *plan;
    if (attn_plan_build(&b->problem, parallelism, LEAF, LEAF, &plan) != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
    return plan;
}

/* ---- every leaf once ---- */

/* Count, for each query and head of an entry, the works that compute each of its leaves. */
static void
count_leaves(const batch_t *b, const attn_plan_t *plan, uint32_t entry, uint8_t *counts,
             uint32_t leaves)
{
    for (uint32_t w = 0; w < plan->n_works; w++) {
        const attn_work_t *work = &plan->works[w];
        for (uint32_t m = 0; m < work->n_members; m++) {
            const attn_member_t *member = &plan->members[work->member_first + m];
            attn_walk_t walk;
            attn_leaf_t leaf;
            if (member->entry != entry) {
                continue;
            }
            uint32_t n_q = work->n_members == 1 ? work->n_q : b->entries[entry].n_q;
            attn_walk_init(&walk, plan, work);
            while (attn_walk_next(&walk, &leaf)) {
                for (uint32_t q = work->q_first; q < work->q_first + n_q; q++) {
                    for (uint32_t h = work->head_first; h < work->head_first + work->n_heads; h++) {
                        counts[((uint64_t)q * plan->group + h) * leaves +
                               (uint64_t)leaf.position / LEAF]++;
                    }
                }
            }
        }
    }
}

static void
assert_every_leaf_once(const batch_t *b, const attn_plan_t *plan)
{
    for (uint32_t i = 0; i < b->problem.n; i++) {
        const attn_problem_entry_t *entry = &b->entries[i];
        uint32_t leaves                   = (uint32_t)(entry->kv_length / LEAF) + 1;
        uint8_t *counts = calloc((uint64_t)entry->n_q * plan->group * leaves + 1, 1);
        count_leaves(b, plan, i, counts, leaves);
        for (uint64_t q = 0; q < entry->n_q; q++) {
            int64_t position = (int64_t)(entry->kv_length - entry->n_q + q);
            for (uint64_t h = 0; h < plan->group; h++) {
                for (uint32_t leaf = 0; leaf < leaves; leaf++) {
                    int64_t first = (int64_t)leaf * LEAF, last = first + LEAF - 1;
                    uint8_t n = counts[(q * plan->group + h) * leaves + leaf];
                    bool behind =
                        b->problem.window > 0 && last <= position - (int64_t)b->problem.window;
                    bool seen = first <= position && !behind;
                    assert_true(seen ? n == 1 : n <= 1);
                }
            }
        }
        free(counts);
    }
}

/* The leaves of a reduction's works lie below its node. */
static void
assert_leaves_below_nodes(const batch_t *b, const attn_plan_t *plan)
{
    for (uint32_t r = 0; r < plan->n_reductions; r++) {
        const attn_reduction_t *reduction = &plan->reductions[r];
        const attn_problem_entry_t *entry = &b->entries[reduction->entry];
        for (uint32_t p = 0; entry->n_nodes > 0 && p < reduction->n_parts; p++) {
            attn_node_t node = entry->nodes[reduction->node];
            attn_walk_t walk;
            attn_leaf_t leaf;
            attn_walk_init(&walk, plan, &plan->works[plan->parts[reduction->part_first + p].work]);
            while (attn_walk_next(&walk, &leaf)) {
                assert_int_equal(attn_tree_key(leaf.run->chunk) >> node.level, node.index);
            }
        }
    }
}

static void
test_every_leaf_is_computed_once(void **state)
{
    static const attn_node_t halves[] = {{31, 0}, {31, 1}};
    (void)state;
    for (int round = 0; round < 200; round++) {
        batch_t b;
        batch_init(&b, chance_in(1, 4), chance_in(1, 100));
        for (uint32_t n = chance_in(1, 12); n > 0; n--) {
            uint32_t length = chance_in(1, chance_in(1, 9000));
            add(&b, length, chance_in(0, length < 60 ? length : chance_in(1, 60)));
        }
        for (uint32_t i = 1; i < b.problem.n;
             i++) { /* some share what they have in common with the first */
            uint32_t common = (uint32_t)(b.entries[i].kv_length < b.entries[0].kv_length
                                             ? b.entries[i].kv_length
                                             : b.entries[0].kv_length) /
                              PAGE;
            if (chance_in(0, 1) && common > 0) {
                memcpy(b.pages[i], b.pages[0], chance_in(1, common) * sizeof(uint32_t));
            }
            if (chance_in(0, 3) == 0) {
                b.entries[i].nodes   = halves;
                b.entries[i].n_nodes = 2;
            }
        }
        b.problem.window  = chance_in(0, 2) ? 0 : chance_in(1, 3000);
        attn_plan_t *plan = plan_of(&b, chance_in(1, 16));
        assert_every_leaf_once(&b, plan);
        assert_leaves_below_nodes(&b, plan);
        attn_plan_free(plan);
        batch_free(&b);
    }
}

/* ---- memory ---- */

/* All that two plans of one problem say. */
static void
assert_same_plan(const attn_plan_t *x, const attn_plan_t *y)
{
    assert_int_equal(x->n_works, y->n_works);
    assert_int_equal(x->n_reductions, y->n_reductions);
    assert_int_equal(x->n_counters, y->n_counters);
    assert_int_equal(x->max_rows, y->max_rows);
    assert_int_equal(x->max_depth, y->max_depth);
    assert_int_equal(x->max_leaf, y->max_leaf);
    assert_int_equal(x->slots, y->slots);
    assert_int_equal(x->cost, y->cost);
    assert_int_equal(x->states, y->states);
    assert_int_equal(x->shared_leaves, y->shared_leaves);
    for (uint32_t i = 0; i < x->n_works; i++) {
        const attn_work_t *w = &x->works[i];
        assert_memory_equal(w, &y->works[i], offsetof(attn_work_t, n_out) + sizeof(w->n_out));
        assert_int_equal(w->slot, y->works[i].slot);
        assert_int_equal(w->see_first, y->works[i].see_first);
        assert_int_equal(w->see_end, y->works[i].see_end);
        assert_int_equal(w->cost, y->works[i].cost);
        assert_memory_equal(&x->members[w->member_first], &y->members[w->member_first],
                            w->n_members * sizeof(x->members[0]));
        assert_memory_equal(&x->spans[w->span_first], &y->spans[w->span_first],
                            w->n_spans * sizeof(x->spans[0]));
        assert_int_equal(x->order[i], y->order[i]);
        for (uint32_t k = 0; k < w->n_out; k++) {
            assert_int_equal(x->keys[w->key_first + k], y->keys[w->key_first + k]);
        }
    }
    for (uint32_t i = 0; i < x->n_reductions; i++) {
        const attn_reduction_t *r = &x->reductions[i];
        assert_memory_equal(r, &y->reductions[i], sizeof(*r));
        assert_memory_equal(&x->parts[r->part_first], &y->parts[r->part_first],
                            r->n_parts * sizeof(x->parts[0]));
    }
}

static void
test_a_plan_in_the_memory_of_another_is_the_same(void **state)
{
    attn_plan_t *kept = NULL;
    (void)state;

    for (int round = 0; round < 100; round++) {
        uint32_t threads = chance_in(1, 16);
        batch_t b;
        batch_init(&b, chance_in(1, 4), chance_in(1, 20));
        for (uint32_t n = chance_in(1, chance_in(1, 60)), i = 0; i < n; i++) {
            add(&b, chance_in(CHUNK, 12 * CHUNK), chance_in(0, 5) > 0 ? 1 : chance_in(0, 100));
            if (i > 0 && chance_in(0, 1)) {
                memcpy(b.pages[i], b.pages[0], chance_in(1, CHUNK / PAGE) * sizeof(uint32_t));
            }
        }
        attn_plan_t *plan = plan_of(&b, threads);
        assert_int_equal(attn_plan_renew(&b.problem, threads, LEAF, LEAF, &kept), ATTN_OK);
        assert_same_plan(plan, kept);
        assert_true(attn_plan_bytes(kept) >= plan->n_works * sizeof(attn_work_t));
        attn_plan_free(plan);

        uint32_t wrong      = b.runs[0][0].length; /* a refusal between two plans does no harm */
        b.runs[0][0].length = 0;
        assert_int_equal(attn_plan_renew(&b.problem, threads, LEAF, LEAF, &kept), ATTN_ERR_INVALID);
        b.runs[0][0].length = wrong;
        batch_free(&b);
    }
    attn_plan_free(kept);
}

/* ---- cutting ---- */

/* When threads take tasks in the plan's order: the end of the last over the mean. */
static double
imbalance(const attn_plan_t *plan, uint32_t threads)
{
    double ends[64] = {0}, total = 0, last = 0;

    for (uint32_t task = 0; task < plan->n_works * plan->problem.kv_heads; task++) {
        double cost    = (double)plan->works[plan->order[task / plan->problem.kv_heads]].cost;
        uint32_t first = 0;
        for (uint32_t t = 1; t < threads; t++) {
            first = ends[t] < ends[first] ? t : first;
        }
        ends[first] += cost;
        total += cost;
        last = ends[first] > last ? ends[first] : last;
    }
    return total > 0 ? last * threads / total : 1;
}

static void
test_threads_finish_together(void **state)
{
    static const uint32_t threads[] = {2, 3, 8, 16};
    (void)state;

    for (int round = 0; round < 100; round++) {
        batch_t b;
        batch_init(&b, chance_in(1, 8), chance_in(1, 8));
        for (uint32_t n = chance_in(1, 20); n > 0; n--) {
            add(&b, chance_in(1, 4) == 1 ? chance_in(20000, 100000) : chance_in(1000, 8000),
                chance_in(1, 8) == 1 ? chance_in(100, 1000) : 1);
        }
        add(&b, 64000, 1);
        for (size_t i = 0; i < 4; i++) {
            attn_plan_t *plan = plan_of(&b, threads[i]);
            assert_true(imbalance(plan, threads[i]) < 1.13);
            attn_plan_free(plan);
        }
        batch_free(&b);
    }
}

/* Leaves may have more tokens than a piece needs to have. */
static void
test_a_leaf_is_not_cut(void **state)
{
    static const uint32_t threads[] = {2, 16, 132};
    (void)state;

    for (size_t i = 0; i < 3; i++) {
        attn_plan_t *plan;
        batch_t b;
        batch_init(&b, 8, 4);
        add(&b, 2 * CHUNK, 600); /* leaves of a chunk */
        assert_int_equal(attn_plan_build(&b.problem, threads[i], LEAF, CHUNK, &plan), ATTN_OK);
        for (uint32_t w = 0; w < plan->n_works; w++) {
            attn_walk_t walk;
            attn_leaf_t leaf;
            attn_walk_init(&walk, plan, &plan->works[w]);
            assert_true(attn_walk_next(&walk, &leaf));
        }
        attn_plan_free(plan);
        batch_free(&b);
    }
}

static void
test_nothing_is_cut_that_need_not_be(void **state)
{
    attn_plan_info_t info;
    batch_t b;
    (void)state;

    batch_init(&b, 8, 4);
    for (int i = 0; i < 256; i++) {
        add(&b, 4096, 1);
    }
    attn_plan_t *plan = plan_of(&b, 16);
    attn_plan_describe(plan, &info);
    assert_int_equal(info.works, 256);
    assert_int_equal(info.split, 0);
    assert_int_equal(plan->slots, 0); /* all write through */
    attn_plan_free(plan);

    b.problem.n = 1; /* 8 heads on 8 threads come out even, on 5 they do not */
    plan        = plan_of(&b, 8);
    assert_int_equal(plan->n_works, 1);
    attn_plan_free(plan);
    plan = plan_of(&b, 5);
    assert_true(plan->n_works > 1);
    attn_plan_free(plan);
    b.problem.n = 256;
    batch_free(&b);

    batch_init(&b, 1, 1); /* too short to be worth it */
    add(&b, 900, 1);
    plan = plan_of(&b, 16);
    assert_int_equal(plan->n_works, 1);
    attn_plan_free(plan);
    batch_free(&b);
}

/* A long sequence's states in the workspace: few, whatever the number of threads. */
static void
test_states_in_between_are_bounded(void **state)
{
    batch_t b;
    (void)state;

    batch_init(&b, 1, 1);
    add(&b, 1000000, 1);
    for (uint32_t threads = 2; threads <= 64; threads *= 2) {
        attn_plan_t *plan = plan_of(&b, threads);
        assert_in_range(plan->n_works, threads, 8 * threads + 1);
        assert_in_range(plan->slots, plan->n_works, 12 * plan->n_works);
        assert_in_range(plan->max_depth, 1, 32);
        attn_plan_free(plan);
    }
    batch_free(&b);
}

/* ---- sharing ---- */

static uint64_t
shared_leaves(const batch_t *b)
{
    attn_plan_info_t info;
    attn_plan_t *plan = plan_of(b, 4);
    attn_plan_describe(plan, &info);
    assert_every_leaf_once(b, plan);
    attn_plan_free(plan);
    return info.shared_leaves;
}

static void
share(batch_t *b, uint32_t to, uint32_t from, uint32_t tokens)
{
    memcpy(b->pages[to], b->pages[from], tokens / PAGE * sizeof(uint32_t));
}

static void
test_shared_prefixes_are_found(void **state)
{
    batch_t b;
    (void)state;

    batch_init(&b, 2, 4);
    for (int i = 0; i < 16; i++) {
        add(&b, 8192 + 200 + (uint32_t)i, 1);
        share(&b, (uint32_t)i, 0, 8192);
    }
    assert_int_equal(shared_leaves(&b), 15 * 64);

    b.pages[5][0] = 1000000; /* another first page: not a fork of the others */
    assert_int_equal(shared_leaves(&b), 14 * 64);
    b.pages[6][100] = 1000001; /* parts at token 1,600, in leaf 12 */
    assert_int_equal(shared_leaves(&b), 13 * 64 + 12);
    b.pages[7][100] = 1000001; /* with a companion until its end */
    b.pages[7][101] = 1000002;
    assert_int_equal(shared_leaves(&b), 12 * 64 + 12 * 2);

    b.problem.window = 1000;
    assert_int_equal(shared_leaves(&b), 0);
    b.problem.window = 0;
    batch_free(&b);
}

static void
test_only_whole_leaves_are_shared(void **state)
{
    batch_t b;
    (void)state;

    batch_init(&b, 1, 1);
    add(&b, 1000, 1);
    add(&b, 1000, 1);
    share(&b, 1, 0, 992); /* 62 pages: 7 whole leaves and a bit */
    assert_int_equal(shared_leaves(&b), 7);
    share(&b, 1, 0, 992 + PAGE);
    assert_int_equal(shared_leaves(&b), 7); /* the last leaf is not full */
    b.pages[1][20] = 77777;                 /* token 320: leaf 2 */
    assert_int_equal(shared_leaves(&b), 2);
    b.pages[1][9] = 77778; /* leaf 1: one shared leaf is not worth it */
    assert_int_equal(shared_leaves(&b), 0);
    batch_free(&b);
}

static void
test_a_group_has_no_more_rows_than_a_work(void **state)
{
    batch_t b;
    (void)state;

    batch_init(&b, 1, 5);
    for (uint32_t i = 0; i < 40; i++) {
        add(&b, 4096, 1 + i % 3);
        share(&b, i, 0, 4096);
    }
    attn_plan_t *plan = plan_of(&b, 4);
    assert_in_range(plan->max_rows, 50, ATTN_WORK_ROWS);
    assert_true(plan->shared_leaves > 30 * 32);
    assert_every_leaf_once(&b, plan);
    attn_plan_free(plan);
    batch_free(&b);
}

/* ---- refusals ---- */

static void
expect_refusal(const batch_t *b, attn_status_t status, const char *words)
{
    attn_plan_t *plan = NULL;
    assert_int_equal(attn_plan_build(&b->problem, 2, LEAF, LEAF, &plan), status);
    assert_null(plan);
    if (strstr(attn_last_error(), words) == NULL) {
        fail_msg("\"%s\" is not in: %s", words, attn_last_error());
    }
}

static void
test_bad_problems_are_refused(void **state)
{
    uint32_t indptr[] = {0, 3, 2}, pages[] = {4, 7, 7};
    attn_node_t nodes[] = {{26, 0}, {26, 0}};
    batch_t b;
    (void)state;

    batch_init(&b, 2, 2);
    add(&b, 100, 1);
    add(&b, 5000, 1);
    attn_problem_entry_t good = b.entries[1], *entry = &b.entries[1];
    attn_kv_run_t run = b.runs[1][2];

    b.runs[1][2].length = 5000 - 2 * CHUNK + 1;
    expect_refusal(&b, ATTN_ERR_INVALID, "entry 1: chunk 2");
    b.runs[1][2].length = 0;
    expect_refusal(&b, ATTN_ERR_INVALID, "entry 1: chunk 2");
    b.runs[1][2]       = run;
    b.runs[1][2].chunk = 1;
    expect_refusal(&b, ATTN_ERR_INVALID, "ascend");
    b.runs[1][2] = run;

    entry->kv_length = UINT64_C(1) << 31;
    expect_refusal(&b, ATTN_ERR_TOO_LARGE, "kv_length");
    *entry     = good;
    entry->n_q = 1u << 29;
    expect_refusal(&b, ATTN_ERR_TOO_LARGE, "queries");
    *entry = good;

    entry->nodes   = nodes;
    entry->n_nodes = 1;
    expect_refusal(&b, ATTN_ERR_INVALID, "chunk 1 is below none");
    entry->n_nodes = 2;
    expect_refusal(&b, ATTN_ERR_INVALID, "node 1");
    nodes[0].level = 33;
    expect_refusal(&b, ATTN_ERR_INVALID, "node 0");
    *entry = good;

    entry->n_lists = 3;
    expect_refusal(&b, ATTN_ERR_INVALID, "n_lists");
    entry->n_lists       = 2;
    entry->sparse_indptr = indptr;
    entry->sparse_pages  = pages;
    expect_refusal(&b, ATTN_ERR_INVALID, "sparse_pages[2]");
    pages[2] = 9;
    expect_refusal(&b, ATTN_ERR_INVALID, "sparse_indptr[2]");
    *entry = good;

    b.problem.q_heads = 5;
    expect_refusal(&b, ATTN_ERR_INVALID, "q_heads");
    b.problem.q_heads   = 4;
    b.problem.page_size = 0;
    expect_refusal(&b, ATTN_ERR_INVALID, "page_size");
    batch_free(&b);
}

static void
test_counts_and_nothing_to_do(void **state)
{
    attn_node_t nodes[] = {{31, 0}, {31, 1}};
    attn_plan_info_t info;
    batch_t b;
    (void)state;

    batch_init(&b, 2, 3);
    attn_plan_t *plan = plan_of(&b, 4);
    attn_plan_describe(plan, &info);
    assert_int_equal(info.works, 0);
    attn_plan_free(plan);
    attn_plan_free(NULL);

    add(&b, 100, 5);
    add(&b, 5000, 2);
    add(&b, 700, 0);
    add(&b, 9000, 1);
    b.entries[1].nodes   = nodes;
    b.entries[1].n_nodes = 2;
    plan                 = plan_of(&b, 4);
    attn_plan_describe(plan, &info);
    assert_int_equal(info.queries, 8);
    assert_int_equal(info.o_rows, 6);
    assert_int_equal(info.states, 2 * 2 * 6);
    assert_true(info.largest_cost <= info.cost);
    attn_plan_free(plan);
    batch_free(&b);
}

/* ---- speed ---- */

/* The time of a plan for 256 decodes; far below the bound, which allows for slow machines. */
static void
test_planning_is_quick(void **state)
{
    static const struct {
        const char *name;
        uint32_t length, shared;
    } cases[] = {{"4k each", 4096, 0}, {"32k each", 32768, 0}, {"8k shared + 1k each", 9216, 8192}};
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint64_t best = UINT64_MAX;
        batch_t b;
        batch_init(&b, 8, 4);
        for (uint32_t e = 0; e < 256; e++) {
            add(&b, cases[i].length - e, 1);
            share(&b, e, 0, cases[i].shared);
        }
        attn_plan_t *plan = NULL;
        for (int round = 0; round < 50; round++) {
            uint64_t start = attn_now_ns();
            assert_int_equal(attn_plan_renew(&b.problem, 16, LEAF, LEAF, &plan), ATTN_OK);
            uint64_t took = attn_now_ns() - start;
            best          = took < best ? took : best;
        }
        printf("plan of 256 decodes, %s: %.1f us\n", cases[i].name, (double)best / 1e3);
        assert_in_range(best, 0, 20 * ATTN_NS_PER_MS);
        attn_plan_free(plan);
        batch_free(&b);
    }
}

/* ---- states ---- */

/* The states of a work are those of a fold over its leaves, one by one; and between two works of
 * one reduction their levels say how their leaves part. */
static void
check_states(const attn_plan_t *plan, const attn_work_t *work)
{
    attn_fold_t fold;
    attn_walk_t walk;
    attn_leaf_t leaf;

    attn_fold_init(&fold, work->left_level);
    attn_walk_init(&walk, plan, work);
    while (attn_walk_next(&walk, &leaf)) {
        uint32_t level = attn_fold_level(&fold, leaf.key);
        while (attn_fold_pops(&fold, level)) {
        }
        attn_fold_push(&fold, leaf.key);
        assert_in_range(fold.n, 1, plan->max_depth);
    }
    while (attn_fold_pops(&fold, work->right_level)) {
    }
    assert_int_equal(work->n_out, fold.n);
    assert_memory_equal(&plan->keys[work->key_first], fold.keys, fold.n * sizeof(fold.keys[0]));
}

static void
check_levels(const attn_plan_t *plan, const attn_reduction_t *reduction)
{
    uint64_t last = 0;

    for (uint32_t p = 0; p < reduction->n_parts; p++) {
        const attn_work_t *work = &plan->works[plan->parts[reduction->part_first + p].work];
        attn_walk_t walk;
        attn_leaf_t leaf;
        attn_walk_init(&walk, plan, work);
        for (bool first = true; attn_walk_next(&walk, &leaf); first = false) {
            if (first && p > 0 && work->n_members == 1) {
                assert_int_equal(work->left_level, attn_key_lca(last, leaf.key));
            }
            last = leaf.key;
        }
    }
}

static void
test_states_are_those_of_leaf_by_leaf(void **state)
{
    (void)state;
    for (int round = 0; round < 300; round++) {
        batch_t b;
        batch_init(&b, 2, 4);
        for (uint32_t n = chance_in(1, 8), i = 0; i < n; i++) {
            uint32_t length = chance_in(1, 20 * CHUNK);
            add(&b, length, chance_in(0, 3) > 0 || length < 40 ? 1 : 40);
            uint32_t common = chance_in(0, 10 * CHUNK / PAGE), all = (length + PAGE - 1) / PAGE;
            uint32_t first = (b.entries[0].kv_length + PAGE - 1) / PAGE;
            for (uint32_t p = 0; round % 2 == 0 && p < common && p < all && p < first; p++) {
                b.pages[i][p] = b.pages[0][p];
            }
        }
        attn_plan_t *plan = plan_of(&b, chance_in(1, 16));
        for (uint32_t w = 0; w < plan->n_works; w++) {
            if (plan->works[w].n_out > 0) {
                check_states(plan, &plan->works[w]);
            }
        }
        for (uint32_t r = 0; r < plan->n_reductions; r++) {
            check_levels(plan, &plan->reductions[r]);
        }
        attn_plan_free(plan);
        batch_free(&b);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_leaf_is_computed_once),
        cmocka_unit_test(test_a_plan_in_the_memory_of_another_is_the_same),
        cmocka_unit_test(test_threads_finish_together),
        cmocka_unit_test(test_a_leaf_is_not_cut),
        cmocka_unit_test(test_nothing_is_cut_that_need_not_be),
        cmocka_unit_test(test_states_in_between_are_bounded),
        cmocka_unit_test(test_states_are_those_of_leaf_by_leaf),
        cmocka_unit_test(test_shared_prefixes_are_found),
        cmocka_unit_test(test_only_whole_leaves_are_shared),
        cmocka_unit_test(test_a_group_has_no_more_rows_than_a_work),
        cmocka_unit_test(test_bad_problems_are_refused),
        cmocka_unit_test(test_counts_and_nothing_to_do),
        cmocka_unit_test(test_planning_is_quick),
    };
    return cmocka_run_group_tests_name("balancer.plan", tests, NULL, NULL);
}
