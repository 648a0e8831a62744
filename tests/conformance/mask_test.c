/*
 * Masks over new tokens, as drafts of trees have them: what a query sees and where it stands is
 * held against the oracle; bits against the steps without a mask that see the same.
 */
#include "tests/conformance/harness.h"

#include "base/checked.h"

#include <stdlib.h>
#include <string.h>

static const attn_layer_t plain = {.causal = true};

/* ---- masks ---- */

static void
name_token(uint8_t *mask, uint32_t n_new, uint32_t row, uint32_t token)
{
    mask[row * attn_mask_row_bytes(n_new) + token / 8] |= (uint8_t)(1u << token % 8);
}

static uint8_t *
mask_new(uint32_t n_q, uint32_t n_new)
{
    return calloc(n_q, attn_mask_row_bytes(n_new));
}

/* Of a random tree in which parents come before their children, the paths to its last n_q tokens:
 * `wide` is the odds against being the child of the token before. */
static uint8_t *
tree_mask(uint32_t n_q, uint32_t n_new, uint32_t wide)
{
    uint8_t *mask    = mask_new(n_q, n_new);
    uint32_t *parent = malloc(n_new * sizeof(*parent));

    for (uint32_t t = 0; t < n_new; t++) {
        parent[t] = t == 0 ? UINT32_MAX : chance_below(wide) == 0 ? t - 1 : chance_below(t + 1);
        parent[t] = parent[t] == t ? UINT32_MAX : parent[t]; /* one more root */
    }
    for (uint32_t i = 0; i < n_q; i++) {
        for (uint32_t t = n_new - n_q + i; t != UINT32_MAX; t = parent[t]) {
            name_token(mask, n_new, i, t);
        }
    }
    free(parent);
    return mask;
}

/* Any tokens at all, at least one a row. */
static uint8_t *
any_mask(uint32_t n_q, uint32_t n_new)
{
    uint8_t *mask = mask_new(n_q, n_new);

    for (uint32_t i = 0; i < n_q; i++) {
        name_token(mask, n_new, i, chance_below(n_new));
        for (uint32_t t = 0; t < n_new; t++) {
            if (chance_below(3) == 0) {
                name_token(mask, n_new, i, t);
            }
        }
    }
    return mask;
}

/* What is causal, as a mask. */
static uint8_t *
chain_mask(uint32_t n_q, uint32_t n_new)
{
    uint8_t *mask = mask_new(n_q, n_new);

    for (uint32_t i = 0; i < n_q; i++) {
        for (uint32_t t = 0; t <= n_new - n_q + i; t++) {
            name_token(mask, n_new, i, t);
        }
    }
    return mask;
}

static void
put_mask(attn_problem_entry_t *entry, const uint8_t *mask, uint32_t n_new)
{
    entry->mask        = mask;
    entry->mask_tokens = n_new;
}

/* ---- against the oracle ---- */

#define BATCH 3u

static void
random_layer(const shape_t *shape, attn_problem_t *problem, attn_layer_t *layer, float *slopes)
{
    problem->causal = chance_below(4) != 0;
    problem->window = CHANCE_OF(((uint64_t[]){0, 0, 1, 2, 7, 40, 300}));
    for (uint32_t h = 0; h < shape->q_heads; h++) {
        slopes[h] = (float)(h + 1) / 16.0f;
    }
    *layer = (attn_layer_t){.causal  = problem->causal,
                            .window  = problem->window,
                            .softcap = chance_below(3) == 0 ? 5.0f : 0.0f,
                            .slopes  = chance_below(2) ? slopes : NULL};
}

/* A list of every other page or so, of all pages below the step's own tokens. */
static void
random_list(const shape_t *shape, attn_problem_entry_t *entry, uint64_t base, uint32_t *indptr,
            uint32_t *pages)
{
    uint64_t n =
        attn_div_up(base, shape->chunk_size) * attn_div_up(shape->chunk_size, shape->page_size);

    indptr[0] = indptr[1] = 0;
    for (uint32_t p = 0; p < n && indptr[1] < 600; p++) {
        if (chance_below(2)) {
            pages[indptr[1]++] = p;
        }
    }
    entry->n_lists       = 1;
    entry->sparse_indptr = indptr;
    entry->sparse_pages  = pages;
    entry->dense_from    = base;
}

static void
check_random_batch(void)
{
    shape_t shape = random_shape();
    seq_t seqs[BATCH];
    attn_problem_entry_t entries[BATCH];
    uint8_t *masks[BATCH] = {NULL};
    uint32_t indptr[2], pages[600];
    float slopes[64];
    attn_layer_t layer;
    world_t world;

    memset(seqs, 0, sizeof(seqs));
    world_open(&world, shape, BATCH * 3000, chance_in(1, 4));
    for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t n_new = chance_in(1, chance_below(4) == 0 ? 500 : 40);
        uint32_t n_q   = chance_below(3) == 0 ? chance_in(1, n_new) : n_new;
        if (i > 0 && chance_below(2)) { /* committed tokens in common */
            seq_fork(&world, &seqs[i], &seqs[0], chance_in(1, (uint32_t)seqs[0].length));
        } else {
            seq_grow(&world, &seqs[i], chance_below(1200));
        }
        uint64_t base = seqs[i].length;
        seq_grow(&world, &seqs[i], n_new);
        entries[i] = seq_entry(&seqs[i], n_q);
        if (chance_below(4) != 0) {
            masks[i] = chance_below(3) == 0 ? any_mask(n_q, n_new)
                                            : tree_mask(n_q, n_new, chance_in(2, 5));
            put_mask(&entries[i], masks[i], n_new);
        }
        if (i == 2 && chance_below(2)) {
            random_list(&shape, &entries[i], base, indptr, pages);
        }
    }
    attn_problem_t problem = world_problem(&world, entries, BATCH);
    random_layer(&shape, &problem, &layer, slopes);
    check(&world, &problem, &layer);
    for (uint32_t i = 0; i < BATCH; i++) {
        free(masks[i]);
        seq_free(&seqs[i]);
    }
    world_close(&world);
}

static void
test_answers_are_those_of_the_oracle(void **state)
{
    (void)state;
    for (int round = 0; round < 24; round++) {
        check_random_batch();
    }
}

/* ---- bits ---- */

static void
assert_same_rows(const world_t *world, const result_t *x, uint64_t x_row, const result_t *y,
                 uint64_t y_row, uint64_t n)
{
    uint64_t heads = world->shape.q_heads, d = world->shape.d_v;
    assert_memory_equal(x->o + x_row * heads * d, y->o + y_row * heads * d,
                        n * heads * d * sizeof(float));
    assert_memory_equal(x->lse + x_row * heads, y->lse + y_row * heads, n * heads * sizeof(float));
}

/* A mask that says what causality says changes no bit, whatever the layer. */
static void
test_a_chain_has_the_bits_of_no_mask(void **state)
{
    (void)state;
    for (int round = 0; round < 16; round++) {
        shape_t shape = random_shape();
        seq_t seq     = {0};
        float slopes[64];
        uint32_t n_new = chance_in(1, 300), n_q = chance_in(1, n_new);
        uint8_t *mask = chain_mask(n_q, n_new);
        attn_layer_t layer;
        result_t with, without;
        world_t world;

        world_open(&world, shape, 3000, chance_in(1, 4));
        seq_grow(&world, &seq, chance_below(1500));
        seq_grow(&world, &seq, n_new);
        attn_problem_entry_t entry = seq_entry(&seq, n_q);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        random_layer(&shape, &problem, &layer, slopes);
        problem.causal = layer.causal = true;
        void *q                       = random_q(&world, n_q, 1);
        run(&world, &problem, &layer, q, chance_in(1, 8), &without);
        put_mask(&entry, mask, n_new);
        run(&world, &problem, &layer, q, chance_in(1, 8), &with);
        assert_same_rows(&world, &with, 0, &without, 0, n_q);
        result_free(&with);
        result_free(&without);
        free(q);
        free(mask);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Row r names tokens 0 to m(r): its bits are those of a step that ends with token m(r). */
static void
test_a_prefix_has_the_bits_of_a_shorter_step(void **state)
{
    (void)state;
    for (int round = 0; round < 12; round++) {
        shape_t shape = random_shape();
        seq_t seq     = {0};
        float slopes[64];
        uint32_t n_new = chance_in(2, 200), base = chance_below(700);
        uint32_t ends[8];
        uint8_t *mask = mask_new(8, n_new = n_new < 8 ? 8 : n_new);
        attn_layer_t layer;
        result_t tree, alone;
        world_t world;

        world_open(&world, shape, 3000, 2);
        seq_grow(&world, &seq, base + n_new);
        attn_problem_entry_t entry = seq_entry(&seq, 8);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        random_layer(&shape, &problem, &layer, slopes);
        for (uint32_t i = 0; i < 8; i++) {
            ends[i] = chance_below(n_new);
            for (uint32_t t = 0; t <= ends[i]; t++) {
                name_token(mask, n_new, i, t);
            }
        }
        put_mask(&entry, mask, n_new);
        uint8_t *q     = random_q(&world, 8, 1);
        uint64_t q_row = (uint64_t)shape.q_heads * shape.d_k * attn_dtype_size(shape.q_dtype);
        run(&world, &problem, &layer, q, chance_in(1, 8), &tree);
        for (uint32_t i = 0; i < 8; i++) {
            seq_t cut;
            seq_fork(&world, &cut, &seq, base + ends[i] + 1);
            attn_problem_entry_t shorter = seq_entry(&cut, 1);
            attn_problem_t one           = world_problem(&world, &shorter, 1);
            one.window                   = problem.window;
            one.causal                   = problem.causal;
            run(&world, &one, &layer, q + i * q_row, 1, &alone);
            assert_same_rows(&world, &tree, i, &alone, 0, 1);
            result_free(&alone);
            seq_free(&cut);
        }
        result_free(&tree);
        free(q);
        free(mask);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Tokens that no row names may hold anything that can be stored. */
static void
test_hidden_tokens_have_no_influence(void **state)
{
    (void)state;
    for (int round = 0; round < 12; round++) {
        shape_t shape  = random_shape();
        seq_t seq      = {0};
        uint32_t n_new = chance_in(20, 200), base = chance_below(600);
        uint8_t *mask = mask_new(n_new, n_new);
        result_t before, after;
        world_t world;

        world_open(&world, shape, 2000, 2);
        seq_grow(&world, &seq, base + n_new);
        attn_problem_entry_t entry = seq_entry(&seq, n_new);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        for (uint32_t i = 0; i < n_new; i++) { /* odd tokens are named by nobody */
            for (uint32_t t = 0; t <= i; t += 2) {
                name_token(mask, n_new, i, t);
            }
        }
        put_mask(&entry, mask, n_new);
        void *q = random_q(&world, n_new, 1);
        run(&world, &problem, &plain, q, 2, &before);
        uint64_t row = (uint64_t)shape.kv_heads * 256;
        void *huge   = malloc(row * 4);
        float value  = 6e4f;
        for (uint64_t i = 0; i < row; i++) {
            attn_convert((uint8_t *)huge + i * attn_dtype_size(shape.kv_dtype), shape.kv_dtype,
                         &value, ATTN_F32, 1);
        }
        for (uint32_t t = base + 1; t < base + n_new; t += 2) {
            uint32_t at = t % shape.chunk_size, offset = at % shape.page_size;
            uint32_t *page = &seq.pages[t / shape.chunk_size][at / shape.page_size];
            assert_int_equal(world_append(&world, page, &offset, 1, huge, huge), ATTN_OK);
        }
        run(&world, &problem, &plain, q, 3, &after);
        assert_same_rows(&world, &before, 0, &after, 0, n_new);
        result_free(&before);
        result_free(&after);
        free(huge);
        free(q);
        free(mask);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Batch mates, threads and the cut of the work change no bit. */
static void
test_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    for (int round = 0; round < 10; round++) {
        shape_t shape = random_shape();
        seq_t seqs[2] = {{0}, {0}};
        float slopes[64];
        uint32_t n_new = chance_in(1, 120);
        uint8_t *mask  = tree_mask(n_new, n_new, 3);
        attn_layer_t layer;
        result_t alone, batch;
        world_t world;

        world_open(&world, shape, 6000, 3);
        seq_grow(&world, &seqs[0], chance_in(1, 2000));
        seq_fork(&world, &seqs[1], &seqs[0], seqs[0].length);
        seq_grow(&world, &seqs[0], n_new);
        seq_grow(&world, &seqs[1], 1);
        attn_problem_entry_t entries[2] = {seq_entry(&seqs[0], n_new), seq_entry(&seqs[1], 1)};
        attn_problem_t problem          = world_problem(&world, entries, 1);
        random_layer(&shape, &problem, &layer, slopes);
        put_mask(&entries[0], mask, n_new);
        void *q = random_q(&world, n_new + 1, 1);
        run(&world, &problem, &layer, q, 1, &alone);
        problem.n = 2;
        run(&world, &problem, &layer, q, chance_in(2, 16), &batch);
        assert_same_rows(&world, &alone, 0, &batch, 0, n_new);
        result_free(&alone);
        result_free(&batch);
        free(q);
        free(mask);
        seq_free(&seqs[0]);
        seq_free(&seqs[1]);
        world_close(&world);
    }
}

/* ---- what is refused ---- */

static void
assert_refused(const world_t *world, const attn_problem_entry_t *entry, attn_status_t status,
               const char *text)
{
    attn_problem_t problem = world_problem(world, entry, 1);
    result_t result;

    assert_int_equal(try_run(world, &problem, &plain, NULL, 1, &result), status);
    if (strstr(attn_last_error(), text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), text);
    }
}

static void
test_bad_masks_are_refused(void **state)
{
    uint8_t mask[2048 / 8 * 4];
    seq_t seq = {0};
    world_t world;
    (void)state;

    world_open(&world, (shape_t){4, 2, 64, 64, 16, 256, ATTN_F32, ATTN_F32, ATTN_F32}, 2048, 1);
    seq_grow(&world, &seq, 1200);
    attn_problem_entry_t entry = seq_entry(&seq, 3);

    memset(mask, 1, sizeof(mask));
    put_mask(&entry, mask, 1025);
    assert_refused(&world, &entry, ATTN_ERR_TOO_LARGE, "at most 1024");
    put_mask(&entry, mask, 2);
    assert_refused(&world, &entry, ATTN_ERR_INVALID, "n_q is 3: 1 to n_new, 2");
    put_mask(&entry, mask, 5);
    mask[1] = 0x21;
    assert_refused(&world, &entry, ATTN_ERR_INVALID, "row 1 has a bit set beyond its 5");
    mask[1] = 0;
    assert_refused(&world, &entry, ATTN_ERR_INVALID, "row 1 names none");
    entry.n_q = 0;
    assert_refused(&world, &entry, ATTN_ERR_INVALID, "n_q is 0");
    entry.kv_length = 4;
    entry.n_runs    = 0;
    assert_refused(&world, &entry, ATTN_ERR_INVALID, "mask_tokens is 5");
    seq_free(&seq);
    world_close(&world);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_are_those_of_the_oracle),
        cmocka_unit_test(test_a_chain_has_the_bits_of_no_mask),
        cmocka_unit_test(test_a_prefix_has_the_bits_of_a_shorter_step),
        cmocka_unit_test(test_hidden_tokens_have_no_influence),
        cmocka_unit_test(test_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_bad_masks_are_refused),
    };
    int failed = 0;

    ATTN_BACKEND_TESTS(cpu, "mask", tests);
    ATTN_BACKEND_TESTS(cuda, "mask", tests);
    return conformance_end(failed);
}
