/*
 * Reproducible by construction: a row's bits depend on its own q and KV, and on nothing
 * that scheduling, batching or placement decide. Every comparison here is of bytes.
 */
#include "kernels/cuda/cuda.h"
#include "tests/conformance/harness.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static const attn_layer_t plain = {.causal = true};

/* Rows [row, row + n) of o and lse of both results are the same bytes. */
static void
assert_same_rows(const world_t *world, const result_t *x, uint64_t x_row, const result_t *y,
                 uint64_t y_row, uint64_t n)
{
    uint64_t heads = world->shape.q_heads, d = world->shape.d_v;
    assert_memory_equal(x->o + x_row * heads * d, y->o + y_row * heads * d,
                        n * heads * d * sizeof(float));
    assert_memory_equal(x->lse + x_row * heads, y->lse + y_row * heads, n * heads * sizeof(float));
}

/* ---- batches and threads ---- */

#define BATCH 9u

typedef struct batch {
    world_t world;
    seq_t seqs[BATCH];
    attn_problem_entry_t entries[BATCH];
    attn_problem_t problem;
    uint64_t queries;
    void *q;
} batch_t;

static void
batch_open(batch_t *b, shape_t shape, uint32_t threads)
{
    *b = (batch_t){0};
    world_open(&b->world, shape, BATCH * 10000, threads);
    for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t n_q = CHANCE_OF(((uint32_t[]){1, 1, 1, 1, 1, 4, 9, 70, 130}));
        if (i > 0 && chance_below(2)) { /* half of them share a prefix with the first */
            seq_fork(&b->world, &b->seqs[i], &b->seqs[0],
                     chance_in(1, (uint32_t)b->seqs[0].length));
        }
        seq_grow(&b->world, &b->seqs[i], chance_in(n_q, 200 + chance_below(4000)));
        b->entries[i] = seq_entry(&b->seqs[i], n_q);
        b->queries += n_q;
    }
    b->problem = world_problem(&b->world, b->entries, BATCH);
    b->q       = random_q(&b->world, b->queries, 1);
}

static void
batch_close(batch_t *b)
{
    for (uint32_t i = 0; i < BATCH; i++) {
        seq_free(&b->seqs[i]);
    }
    free(b->q);
    world_close(&b->world);
}

static void
test_any_parallelism_has_the_same_bits(void **state)
{
    uint32_t split = 0;
    (void)state;

    for (int round = 0; round < 4; round++) {
        batch_t b;
        result_t whole, cut;

        batch_open(&b, random_shape(), chance_in(1, 4));
        run(&b.world, &b.problem, &plain, b.q, 1, &whole);
        for (uint32_t parallelism = 2; parallelism <= 16; parallelism++) {
            run(&b.world, &b.problem, &plain, b.q, parallelism, &cut);
            assert_same_rows(&b.world, &whole, 0, &cut, 0, b.queries);
            split += cut.info.split;
            result_free(&cut);
        }
        result_free(&whole);
        batch_close(&b);
    }
    assert_true(split > 0); /* there was something to see */
}

static void
test_alone_has_the_same_bits_as_in_a_batch(void **state)
{
    (void)state;
    for (int round = 0; round < 12; round++) {
        batch_t b;
        shape_t shape = random_shape();
        result_t whole, alone;
        uint64_t row = 0;

        shape.chunk_size =
            round % 2 ? 256 : shape.chunk_size; /* many chunks, the tree's upper part */
        batch_open(&b, shape, chance_in(1, 4));
        attn_layer_t layer = {.causal  = true,
                              .window  = chance_below(2) ? 0 : chance_in(1, 900),
                              .softcap = chance_below(2) ? 0 : 30};
        b.problem.window   = layer.window;
        run(&b.world, &b.problem, &layer, b.q, 3, &whole);
        for (uint32_t i = 0; i < BATCH; i++) {
            attn_problem_t one = b.problem;
            one.entries += i;
            one.n       = 1;
            uint64_t at = row * b.world.shape.q_heads * b.world.shape.d_k *
                          attn_dtype_size(b.world.shape.q_dtype);
            run(&b.world, &one, &layer, (uint8_t *)b.q + at, chance_in(1, 16), &alone);
            assert_same_rows(&b.world, &whole, row, &alone, 0, b.entries[i].n_q);
            result_free(&alone);
            row += b.entries[i].n_q;
        }
        result_free(&whole);
        batch_close(&b);
    }
}

/* A sequence's first `length` tokens, as they were. */
static attn_problem_entry_t
earlier(const seq_t *seq, uint32_t chunk_size, uint64_t length, uint32_t n_q, attn_kv_run_t *runs)
{
    uint32_t n = (uint32_t)((length + chunk_size - 1) / chunk_size);
    memcpy(runs, seq->runs, n * sizeof(*runs));
    runs[n - 1].length = (uint32_t)(length - (uint64_t)(n - 1) * chunk_size);
    return (attn_problem_entry_t){.kv_length = length, .n_q = n_q, .n_runs = n, .runs = runs};
}

/* Do requests of few rows and of many have the same bits? Not on tiles, which take bf16 of many. */
static bool
few_as_many(const world_t *world)
{
    bool tiles = strstr(world->backend->ops->kind(world->backend), "-amx/") != NULL;
    return world->few == world->many && !(tiles && world->shape.kv_dtype == ATTN_BF16);
}

/* Prefill in one piece, in pieces, and token by token, as far as few rows are like many. */
static void
test_prefill_in_pieces_has_the_same_bits(void **state)
{
    (void)state;
    for (int round = 0; round < 6; round++) {
        shape_t shape = random_shape();
        uint32_t n    = chance_in(300, 900);
        seq_t seq     = {0};
        world_t world;
        result_t whole, piece;

        world_open(&world, shape, n + 4096, 2);
        seq_grow(&world, &seq, n);
        attn_problem_entry_t entry = seq_entry(&seq, n);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        uint8_t *q                 = random_q(&world, n, 1);
        uint64_t q_row = (uint64_t)shape.q_heads * shape.d_k * attn_dtype_size(shape.q_dtype);
        run(&world, &problem, &plain, q, 2, &whole);
        for (uint32_t done = 0; done < n;) {
            uint32_t most = n - done < 200 ? n - done : 200;
            uint32_t n_q  = few_as_many(&world) ? (chance_below(3) ? 1 : chance_in(1, most)) : most;
            attn_kv_run_t runs[SEQ_CHUNKS_MAX];
            entry = earlier(&seq, shape.chunk_size, done + n_q, n_q, runs);
            if (few_as_many(&world) || n_q * shape.q_heads / shape.kv_heads > 64) {
                run(&world, &problem, &plain, q + done * q_row, chance_in(1, 8), &piece);
                assert_same_rows(&world, &whole, done, &piece, 0, n_q);
                result_free(&piece);
            }
            done += n_q + chance_below(40);
        }
        result_free(&whole);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Several queries of up to 64 packed rows, and each of them as a step of one token. */
static void
test_verification_has_the_bits_of_decode(void **state)
{
    (void)state;
    for (int round = 0; round < 8; round++) {
        shape_t shape  = random_shape();
        uint32_t group = shape.q_heads / shape.kv_heads;
        uint32_t n = chance_in(300, 900), n_q = chance_in(2, 64 / group);
        seq_t seq = {0};
        world_t world;
        result_t whole, one;

        shape.kv_dtype = round % 2 ? ATTN_BF16 : shape.kv_dtype;
        world_open(&world, shape, n + 4096, 2);
        seq_grow(&world, &seq, n);
        attn_problem_entry_t entry = seq_entry(&seq, n_q);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        uint8_t *q                 = random_q(&world, n_q, 1);
        uint64_t q_row = (uint64_t)shape.q_heads * shape.d_k * attn_dtype_size(shape.q_dtype);
        run(&world, &problem, &plain, q, 2, &whole);
        for (uint32_t i = 0; i < n_q; i++) {
            attn_kv_run_t runs[SEQ_CHUNKS_MAX];
            entry = earlier(&seq, shape.chunk_size, n - n_q + 1 + i, 1, runs);
            run(&world, &problem, &plain, q + i * q_row, chance_in(1, 8), &one);
            assert_same_rows(&world, &whole, i, &one, 0, 1);
            result_free(&one);
        }
        result_free(&whole);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Weights and values whose product rounds to -0: what is masked beside them does not show. */
static void
test_a_zero_has_no_sign(void **state)
{
    shape_t shape  = {.q_heads    = 1,
                      .kv_heads   = 1,
                      .d_k        = 32,
                      .d_v        = 32,
                      .page_size  = 16,
                      .chunk_size = 256,
                      .kv_dtype   = ATTN_F32,
                      .q_dtype    = ATTN_F32,
                      .o_dtype    = ATTN_F32};
    float k[3][64] = {{2}, {0}, {0}}, v[3][64], q[3 * 64] = {0};
    attn_kv_run_t runs[1];
    seq_t seq = {0};
    world_t world;
    result_t prefill, decode;
    (void)state;

    world_open(&world, shape, 64, 1);
    bool f32   = world.shape.kv_dtype == ATTN_F32; /* or bf16: its least number is larger */
    uint32_t d = world.shape.d_k;
    for (int i = 0; i < 64; i++) {
        v[0][i] = 0;
        v[1][i] = f32 ? -0x1p-149f : -0x1p-133f;
        v[2][i] = 1;
    }
    for (int t = 0; t < 3; t++) {
        q[(uint32_t)t * d] = f32 ? 5 : 80;
        seq_put(&world, &seq, k[t], v[t]);
    }
    attn_problem_entry_t entry = seq_entry(&seq, 3);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    run(&world, &problem, &plain, q, 1, &prefill);
    entry = earlier(&seq, shape.chunk_size, 2, 1, runs);
    run(&world, &problem, &plain, q + d, 1, &decode);
    assert_same_rows(&world, &prefill, 1, &decode, 0, 1);
    assert_false(signbit(decode.o[0]));
    result_free(&prefill);
    result_free(&decode);
    seq_free(&seq);
    world_close(&world);
}

static void
test_a_shared_prefix_has_the_same_bits(void **state)
{
    (void)state;
    for (int round = 0; round < 6; round++) {
        enum { N = 20 };
        shape_t shape = random_shape();
        seq_t base    = {0}, seqs[N];
        attn_problem_entry_t entries[N];
        uint32_t n_q = chance_in(1, 2), length = chance_in(300, 2500);
        world_t world;
        result_t together, alone;

        world_open(&world, shape, length + N * 4200, 2);
        seq_grow(&world, &base, length);
        for (uint32_t i = 0; i < N; i++) {
            const seq_t *from = i > 12 ? &seqs[i - 5] : &base; /* forks of forks, too */
            seq_fork(&world, &seqs[i], from,
                     chance_below(3) ? from->length : chance_in(100, (uint32_t)from->length));
            seq_grow(&world, &seqs[i], chance_below(4) ? chance_in(1, 700) : 0);
            entries[i] = seq_entry(&seqs[i], n_q);
        }
        attn_problem_t problem = world_problem(&world, entries, N);
        uint8_t *q             = random_q(&world, N * n_q, 1);
        uint64_t q_row = (uint64_t)shape.q_heads * shape.d_k * attn_dtype_size(shape.q_dtype);
        run(&world, &problem, &plain, q, chance_in(1, 16), &together);
        if (shape.q_heads / shape.kv_heads * n_q <= 16) {
            assert_true(together.info.shared_leaves > 0);
        }
        for (uint32_t i = 0; i < N; i++) {
            attn_problem_t one = problem;
            one.entries += i;
            one.n = 1;
            run(&world, &one, &plain, q + i * n_q * q_row, 1, &alone);
            assert_int_equal(alone.info.shared_leaves, 0);
            assert_same_rows(&world, &together, i * n_q, &alone, 0, n_q);
            result_free(&alone);
        }
        result_free(&together);
        free(q);
        for (uint32_t i = 0; i < N; i++) {
            seq_free(&seqs[i]);
        }
        seq_free(&base);
        world_close(&world);
    }
}

static void
test_what_changes_nothing_changes_no_bit(void **state)
{
    (void)state;
    for (int round = 0; round < 4; round++) {
        shape_t shape   = random_shape();
        uint32_t length = chance_in(100, 3000), indptr[2] = {0, 0}, n_q = chance_in(1, 20);
        uint32_t per_chunk = (shape.chunk_size + shape.page_size - 1) / shape.page_size;
        uint32_t *pages    = malloc(40000 * sizeof(*pages));
        seq_t seq          = {0};
        world_t world;
        result_t whole, same;

        world_open(&world, shape, length + 4096, 2);
        seq_grow(&world, &seq, length);
        attn_problem_entry_t entry = seq_entry(&seq, n_q);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        void *q                    = random_q(&world, n_q, 1);
        run(&world, &problem, &plain, q, 2, &whole);

        for (uint32_t c = 0; c < seq.n_chunks; c++) { /* every page listed is dense */
            for (uint32_t p = 0; p * shape.page_size < seq.runs[c].length; p++) {
                pages[indptr[1]++] = c * per_chunk + p;
            }
        }
        entry.n_lists       = 1;
        entry.sparse_indptr = indptr;
        entry.sparse_pages  = pages;
        entry.dense_from    = length;
        run(&world, &problem, &plain, q, 5, &same);
        assert_same_rows(&world, &whole, 0, &same, 0, n_q);
        result_free(&same);
        entry.n_lists = 0;

        attn_layer_t wide = {.causal = true, .window = length}; /* a window over all */
        problem.window    = length;
        run(&world, &problem, &wide, q, 5, &same);
        assert_same_rows(&world, &whole, 0, &same, 0, n_q);
        result_free(&same);

        result_free(&whole);
        free(q);
        free(pages);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Lists for some of a batch, of one for all heads also as one for each. */
static void
draw_batch_lists(batch_t *b, uint32_t (*indptr)[65], uint32_t **pages)
{
    const uint32_t kv_heads = b->world.shape.kv_heads;

    for (uint32_t i = 0; i < BATCH; i++) {
        attn_problem_entry_t *entry = &b->entries[i];
        pages[i] = malloc(kv_heads * (b->seqs[i].length + 4096) * sizeof(uint32_t));
        if (chance_below(3) > 0) {
            draw_lists(entry, &b->world, chance_below(2) ? 1 : kv_heads,
                       CHANCE_OF(((uint32_t[]){4, 32, 100, 256})), indptr[i], pages[i]);
            entry->dense_from = chance_below(2) ? entry->kv_length - entry->n_q : entry->kv_length;
        }
    }
}

/* A list for all heads becomes the same list of each head. */
static void
repeat_lists(batch_t *b, uint32_t (*indptr)[65], uint32_t **pages)
{
    for (uint32_t i = 0; i < BATCH; i++) {
        attn_problem_entry_t *entry = &b->entries[i];
        uint32_t n                  = entry->n_lists == 1 ? indptr[i][1] : 0;
        for (uint32_t h = 1; h < b->world.shape.kv_heads && entry->n_lists == 1; h++) {
            memcpy(pages[i] + h * n, pages[i], n * sizeof(uint32_t));
            indptr[i][h + 1] = (h + 1) * n;
        }
        entry->n_lists = entry->n_lists == 1 ? b->world.shape.kv_heads : entry->n_lists;
    }
}

static void
test_lists_have_the_same_bits_in_any_batch(void **state)
{
    (void)state;
    for (int round = 0; round < 12; round++) {
        uint32_t indptr[BATCH][65] = {{0}}, *pages[BATCH];
        batch_t b;
        result_t whole, other;
        uint64_t row = 0;

        batch_open(&b, random_shape(), chance_in(1, 4));
        draw_batch_lists(&b, indptr, pages);
        attn_layer_t layer = {.causal  = true,
                              .window  = chance_below(2) ? 0 : chance_in(1, 900),
                              .softcap = chance_below(2) ? 0 : 30};
        b.problem.window   = layer.window;
        run(&b.world, &b.problem, &layer, b.q, 3, &whole);
        for (uint32_t i = 0; i < BATCH; i++) {
            attn_problem_t one = b.problem;
            one.entries += i;
            one.n       = 1;
            uint64_t at = row * b.world.shape.q_heads * b.world.shape.d_k *
                          attn_dtype_size(b.world.shape.q_dtype);
            run(&b.world, &one, &layer, (uint8_t *)b.q + at, chance_in(1, 16), &other);
            assert_same_rows(&b.world, &whole, row, &other, 0, b.entries[i].n_q);
            result_free(&other);
            row += b.entries[i].n_q;
        }
        repeat_lists(&b, indptr, pages);
        run(&b.world, &b.problem, &layer, b.q, chance_in(1, 16), &other);
        assert_same_rows(&b.world, &whole, 0, &other, 0, b.queries);
        result_free(&other);
        result_free(&whole);
        for (uint32_t i = 0; i < BATCH; i++) {
            free(pages[i]);
        }
        batch_close(&b);
    }
}

/* ---- several attends at once ---- */

typedef struct caller {
    batch_t *batch;
    result_t result;
    attn_status_t status;
} caller_t;

static void *
attend_often(void *arg)
{
    caller_t *caller = arg;
    for (int i = 0; i < 5 && caller->status == ATTN_OK; i++) {
        result_free(&caller->result);
        caller->status = try_run(&caller->batch->world, &caller->batch->problem, &plain,
                                 caller->batch->q, 1 + (uint32_t)i * 3, &caller->result);
    }
    return NULL;
}

static void
test_concurrent_attends_have_the_same_bits(void **state)
{
    batch_t b;
    result_t whole;
    caller_t callers[4];
    pthread_t threads[4];
    (void)state;

    batch_open(&b, random_shape(), 3);
    run(&b.world, &b.problem, &plain, b.q, 1, &whole);
    for (int i = 0; i < 4; i++) {
        callers[i] = (caller_t){.batch = &b};
        pthread_create(&threads[i], NULL, attend_often, &callers[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(callers[i].status, ATTN_OK);
        assert_same_rows(&b.world, &whole, 0, &callers[i].result, 0, b.queries);
        result_free(&callers[i].result);
    }
    result_free(&whole);
    batch_close(&b);
}

/* ---- cuts over owners ---- */

#define CUTS 10000
#define OWNERS_MAX 8u
#define CHUNKS_MAX 90u

/* Partials of one row from all owners, ascending in key. */
typedef struct partial {
    attn_node_t node;
    float a[256];
    float l;
    int32_t e;
} partial_t;

static int
by_key(const void *x, const void *y)
{
    const attn_node_t *a = &((const partial_t *)x)->node, *b = &((const partial_t *)y)->node;
    uint64_t i = (uint64_t)a->index << a->level, j = (uint64_t)b->index << b->level;
    return i < j ? -1 : i > j;
}

/* Merge partials of d columns below a node along the tree, from its root: both halves, then the
 * two. */
static partial_t
merge_below(partial_t *p, uint32_t n, uint32_t level, uint32_t d)
{
    uint32_t split = 0;

    if (n == 1) {
        return p[0];
    }
    while (split < n &&
           ((uint64_t)p[split].node.index << p[split].node.level >> (level - 1) & 1) == 0) {
        split++;
    }
    if (split == 0 || split == n) {
        return merge_below(p, n, level - 1, d);
    }
    partial_t left  = merge_below(p, split, level - 1, d);
    partial_t right = merge_below(p + split, n - split, level - 1, d);
    attn_state_merge_row(left.a, &left.l, &left.e, right.a, right.l, right.e, d);
    return left;
}

/* One sequence over `chunks` chunks, some of them absent everywhere (holes), whole and cut. */
typedef struct cut {
    world_t world;
    seq_t seq;
    attn_kv_run_t runs[CHUNKS_MAX];
    uint32_t n_runs;
    void *q;
    result_t whole;
} cut_t;

static void
cut_open(cut_t *cut)
{
    shape_t shape   = {.q_heads    = 1,
                       .kv_heads   = 1,
                       .d_k        = 32,
                       .d_v        = 32,
                       .page_size  = 128,
                       .chunk_size = 128,
                       .kv_dtype   = ATTN_BF16,
                       .q_dtype    = ATTN_F32,
                       .o_dtype    = ATTN_F32};
    uint32_t chunks = chance_in(1, CHUNKS_MAX);

    *cut = (cut_t){.seq = {.k_scale = 4}};
    world_open(&cut->world, shape, CHUNKS_MAX * 128, 1);
    seq_grow(&cut->world, &cut->seq, (chunks - 1) * 128 + chance_in(1, 128));
    for (uint32_t c = 0; c < chunks; c++) {
        if (chance_below(10) > 0 || c == chunks - 1) {
            cut->runs[cut->n_runs++] = cut->seq.runs[c];
        }
    }
    attn_problem_entry_t entry = seq_entry(&cut->seq, 1);
    entry.runs                 = cut->runs;
    entry.n_runs               = cut->n_runs;
    attn_problem_t problem     = world_problem(&cut->world, &entry, 1);
    cut->q                     = random_q(&cut->world, 1, 1);
    run(&cut->world, &problem, &plain, cut->q, 1, &cut->whole);
}

static void
cut_close(cut_t *cut)
{
    result_free(&cut->whole);
    free(cut->q);
    seq_free(&cut->seq);
    world_close(&cut->world);
}

/* The partials of one owner's chunks are appended to p. */
static uint32_t
ask_owner(const cut_t *cut, const uint8_t *owners, uint32_t owner, partial_t *p)
{
    uint32_t mine[CHUNKS_MAX], others[CHUNKS_MAX], n_mine = 0, n_others = 0;
    uint32_t d = cut->world.shape.d_v;
    attn_kv_run_t runs[CHUNKS_MAX];
    attn_node_t nodes[CHUNKS_MAX];
    result_t result;

    for (uint32_t i = 0; i < cut->n_runs; i++) {
        if (owners[i] == owner) {
            runs[n_mine]   = cut->runs[i];
            mine[n_mine++] = cut->runs[i].chunk;
        } else {
            others[n_others++] = cut->runs[i].chunk;
        }
    }
    uint32_t n = attn_tree_frontier(mine, n_mine, others, n_others, nodes);
    if (n == 0) {
        return 0;
    }
    attn_problem_entry_t entry = seq_entry(&cut->seq, 1);
    entry.runs                 = runs;
    entry.n_runs               = n_mine;
    entry.nodes                = nodes;
    entry.n_nodes              = n;
    attn_problem_t problem     = world_problem(&cut->world, &entry, 1);
    run(&cut->world, &problem, &plain, cut->q, chance_in(1, 4), &result);
    assert_int_equal(result.states, n);
    for (uint32_t i = 0; i < n; i++) {
        p[i] = (partial_t){.node = nodes[i], .l = result.l[i], .e = result.e[i]};
        memcpy(p[i].a, result.a + i * d, d * sizeof(float));
    }
    result_free(&result);
    return n;
}

static void
test_random_cuts_have_the_same_bits(void **state)
{
    (void)state;
    for (int cuts = 0; cuts < CUTS;) {
        cut_t cut;
        cut_open(&cut);
        for (int round = 0; round < 50; round++, cuts++) {
            uint8_t owners[CHUNKS_MAX];
            partial_t partials[CHUNKS_MAX];
            uint32_t k = chance_in(2, OWNERS_MAX), way = chance_below(4), n = 0;
            uint32_t d = cut.world.shape.d_v;
            float o[256], lse;

            for (uint32_t i = 0; i < cut.n_runs; i++) {
                uint32_t c = cut.runs[i].chunk, lane = attn_tree_key(c % 64) >> 26;
                owners[i] = (uint8_t)(way == 0   ? chance_below(k)
                                      : way == 1 ? c % k
                                      : way == 2 ? lane * k / 64
                                                 : c * k / CHUNKS_MAX);
            }
            for (uint32_t owner = 0; owner < k; owner++) {
                n += ask_owner(&cut, owners, owner, partials + n);
            }
            qsort(partials, n, sizeof(*partials), by_key);
            partial_t root = merge_below(partials, n, 32, d);
            attn_state_finish_row(root.a, root.l, root.e, d, NULL, o, &lse);
            assert_memory_equal(o, cut.whole.o, d * sizeof(float));
            assert_memory_equal(&lse, cut.whole.lse, sizeof(lse));
        }
        cut_close(&cut);
    }
}

/* All nodes of a level that hold chunks of a sequence, ascending in key. */
static uint32_t
nodes_of_level(const seq_t *seq, uint32_t level, attn_node_t *nodes)
{
    uint32_t n = 0;

    for (uint32_t c = 0; c < seq->n_chunks; c++) {
        attn_node_t node = {level, (uint32_t)((uint64_t)attn_tree_key(c) >> level)};
        uint32_t at      = n;
        while (at > 0 && nodes[at - 1].index > node.index) {
            at--;
        }
        if (at > 0 && nodes[at - 1].index == node.index) {
            continue;
        }
        memmove(nodes + at + 1, nodes + at, (n - at) * sizeof(*nodes));
        nodes[at] = node;
        n++;
    }
    return n;
}

/* An entry's partials, from state `first` on, merged: the same bytes as its rows of `whole`. */
static void
assert_partials_merge_to(const batch_t *b, const attn_problem_entry_t *entry, const result_t *cut,
                         uint64_t first, const result_t *whole, uint64_t row)
{
    uint64_t heads = b->world.shape.q_heads, rows = entry->n_q * heads;
    uint32_t d = b->world.shape.d_v;

    for (uint64_t r = 0; r < rows; r++) {
        partial_t partials[SEQ_CHUNKS_MAX];
        float o[256], lse;
        for (uint32_t j = 0; j < entry->n_nodes; j++) {
            uint64_t s  = first + j * rows + r;
            partials[j] = (partial_t){.node = entry->nodes[j], .l = cut->l[s], .e = cut->e[s]};
            memcpy(partials[j].a, cut->a + s * d, d * sizeof(float));
        }
        partial_t root = merge_below(partials, entry->n_nodes, 32, d);
        attn_state_finish_row(root.a, root.l, root.e, d, NULL, o, &lse);
        assert_memory_equal(o, whole->o + (row * heads + r) * d, d * sizeof(float));
        assert_memory_equal(&lse, whole->lse + row * heads + r, sizeof(lse));
    }
}

/* Batches in which some entries answer with O and others with partials of several nodes. */
static void
test_partials_of_batches_have_the_same_bits(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++) {
        batch_t b;
        shape_t shape = random_shape();
        result_t whole, cut;
        attn_node_t nodes[BATCH][SEQ_CHUNKS_MAX];
        uint64_t row = 0, o_row = 0, states = 0;

        shape.chunk_size = 256;
        batch_open(&b, shape, 2);
        run(&b.world, &b.problem, &plain, b.q, 2, &whole);
        for (uint32_t i = 0; i < BATCH; i++) {
            if (chance_below(3) > 0) {
                uint32_t level       = CHANCE_OF(((uint32_t[]){0, 26, 28, 29, 30, 31, 32}));
                b.entries[i].n_nodes = nodes_of_level(&b.seqs[i], level, nodes[i]);
                b.entries[i].nodes   = nodes[i];
            }
        }
        run(&b.world, &b.problem, &plain, b.q, chance_in(1, 16), &cut);
        for (uint32_t i = 0; i < BATCH; i++) {
            if (b.entries[i].n_nodes == 0) {
                assert_same_rows(&b.world, &whole, row, &cut, o_row, b.entries[i].n_q);
                o_row += b.entries[i].n_q;
            } else {
                assert_partials_merge_to(&b, &b.entries[i], &cut, states, &whole, row);
                states += (uint64_t)b.entries[i].n_nodes * b.entries[i].n_q * shape.q_heads;
            }
            row += b.entries[i].n_q;
        }
        assert_int_equal(cut.o_rows, o_row);
        assert_int_equal(cut.states, states);
        result_free(&cut);
        result_free(&whole);
        batch_close(&b);
    }
}

/* In the order of the tree, chunks of one's own fall between shared ones, elsewhere in each entry.
 */
static void
test_shared_chunks_between_others_have_the_same_bits(void **state)
{
    shape_t shape = {.q_heads    = 2,
                     .kv_heads   = 1,
                     .d_k        = 32,
                     .d_v        = 32,
                     .page_size  = 128,
                     .chunk_size = 128,
                     .kv_dtype   = ATTN_F16,
                     .q_dtype    = ATTN_F32,
                     .o_dtype    = ATTN_F32};
    (void)state;

    for (int round = 0; round < 60; round++) {
        enum { N = 5 };
        batch_t b  = {.queries = N};
        seq_t base = {0};
        attn_node_t nodes[N][SEQ_CHUNKS_MAX];
        result_t together, alone;
        uint64_t o_row = 0, states = 0;

        world_open(&b.world, shape, (N + 1) * 50 * 128, 1);
        seq_grow(&b.world, &base, 128 * chance_in(2, 24));
        for (uint32_t i = 0; i < N; i++) {
            seq_fork(&b.world, &b.seqs[i], &base, base.length);
            seq_grow(&b.world, &b.seqs[i], chance_below(3) ? 128 * chance_below(24) : 0);
            b.entries[i] = seq_entry(&b.seqs[i], 1);
            if (round % 2) {
                b.entries[i].nodes   = nodes[i];
                b.entries[i].n_nodes = nodes_of_level(&b.seqs[i], chance_in(26, 32), nodes[i]);
            }
        }
        b.problem = world_problem(&b.world, b.entries, N);
        b.q       = random_q(&b.world, N, 1);
        run(&b.world, &b.problem, &plain, b.q, chance_in(1, 8), &together);
        assert_true(together.info.shared_leaves > 0);
        for (uint32_t i = 0; i < N; i++) {
            attn_problem_entry_t entry = seq_entry(&b.seqs[i], 1);
            attn_problem_t problem     = world_problem(&b.world, &entry, 1);
            run(&b.world, &problem, &plain, (float *)b.q + (uint64_t)i * 2 * b.world.shape.d_k, 1,
                &alone);
            if (b.entries[i].n_nodes == 0) {
                assert_same_rows(&b.world, &together, o_row++, &alone, 0, 1);
            } else {
                assert_partials_merge_to(&b, &b.entries[i], &together, states, &alone, 0);
                states += b.entries[i].n_nodes * 2;
            }
            result_free(&alone);
        }
        result_free(&together);
        seq_free(&base);
        for (uint32_t i = 0; i < N; i++) {
            seq_free(&b.seqs[i]);
        }
        free(b.q);
        world_close(&b.world);
    }
}

/* ---- the device's merge and finish against the host's ---- */

static float
random_bits(void)
{
    uint32_t bits = (uint32_t)chance();
    float x;

    switch (chance_below(6)) {
    case 0:
        bits &= 0x807fffffu; /* subnormals, and both zeros */
        break;
    case 1:
        bits = bits & 0x80000000u;
        break;
    case 2:
        bits = (bits & 0x807fffffu) | 0x7f000000u; /* large: sums of two are finite, or are not */
        break;
    default:
        bits = (bits & 0x807fffffu) | (0x3f800000u + (bits >> 16 & 0xf) * 0x800000u);
    }
    memcpy(&x, &bits, sizeof(x));
    return x;
}

/* States whose exponents differ by 0, a little, around 126, and by all that there is. */
static int32_t
exponent_beside(int32_t e)
{
    static const int64_t apart[] = {0, 1, 23, 24, 125, 126, 127, 128, 150, INT32_MAX, UINT32_MAX};
    int64_t other                = e + (chance_below(2) ? 1 : -1) * CHANCE_OF(apart);

    return (int32_t)(other < INT32_MIN ? INT32_MIN : other > INT32_MAX ? INT32_MAX : other);
}

static void
test_the_merge_is_the_hosts(void **state)
{
    enum { N = 4096, D = 128 };
    float *a = malloc(4 * N * D * sizeof(float)), *l = malloc(4 * N * sizeof(float));
    int32_t *e = malloc(4 * N * sizeof(int32_t));
    (void)state;

    if (!conformance_on("cuda")) {
        free(a);
        free(l);
        free(e);
        skip();
    }
    for (uint32_t i = 0; i < 2 * N; i++) { /* [0, N) into, [N, 2 N) from */
        for (uint32_t j = 0; j < D; j++) {
            a[i * D + j] = random_bits();
        }
        l[i] = chance_below(8) == 0 ? 0.0f : fabsf(random_bits());
        e[i] = l[i] == 0               ? INT32_MIN
               : i < N                 ? (int32_t)chance_in(0, 400) - 200
               : e[i - N] == INT32_MIN ? (int32_t)chance()
                                       : exponent_beside(e[i - N]);
    }
    memcpy(a + 2 * N * D, a, N * D * sizeof(float));
    memcpy(l + 2 * N, l, N * sizeof(float));
    memcpy(e + 2 * N, e, N * sizeof(int32_t));
    for (uint32_t i = 0; i < N; i++) {
        attn_state_merge_row(a + (2 * N + i) * D, l + 2 * N + i, e + 2 * N + i, a + (N + i) * D,
                             l[N + i], e[N + i], D);
    }
    world_t world;
    world_open(&world, random_shape(), 64, 1);
    assert_int_equal(attn_cuda_merge_rows(world.backend, N, D, a, l, e, a + N * D, l + N, e + N),
                     ATTN_OK);
    assert_memory_equal(l, l + 2 * N, N * sizeof(float));
    assert_memory_equal(e, e + 2 * N, N * sizeof(int32_t));
    for (uint32_t i = 0; i < N; i++) {
        if (l[i] != 0) { /* of an empty state, A is ignored */
            assert_memory_equal(a + i * D, a + (2 * N + i) * D, D * sizeof(float));
        }
    }
    world_close(&world);
    free(a);
    free(l);
    free(e);
}

/* O and LSE are what the host makes of the partials of the root, with and without sinks. */
static void
test_the_finish_is_the_hosts(void **state)
{
    (void)state;
    for (int round = 0; round < 12; round++) {
        batch_t b;
        result_t whole, parts;
        attn_node_t root = {32, 0};
        float sinks[64], o[256], lse;
        attn_layer_t layer = {.causal = true, .sinks = round % 3 ? sinks : NULL};

        for (uint32_t h = 0; h < 64; h++) {
            sinks[h] = chance_below(8) == 0 ? -INFINITY : chance_normal() * (round > 6 ? 90 : 3);
        }
        batch_open(&b, random_shape(), 2);
        uint32_t d = b.world.shape.d_v, heads = b.world.shape.q_heads;
        run(&b.world, &b.problem, &layer, b.q, chance_in(1, 16), &whole);
        for (uint32_t i = 0; i < BATCH; i++) {
            b.entries[i].nodes   = &root;
            b.entries[i].n_nodes = 1;
        }
        run(&b.world, &b.problem, &layer, b.q, chance_in(1, 16), &parts);
        assert_int_equal(parts.states, b.queries * heads);
        for (uint64_t s = 0; s < parts.states; s++) {
            attn_state_finish_row(parts.a + s * d, parts.l[s], parts.e[s], d,
                                  layer.sinks != NULL ? &sinks[s % heads] : NULL, o, &lse);
            assert_memory_equal(o, whole.o + s * d, d * sizeof(float));
            assert_memory_equal(&lse, whole.lse + s, sizeof(lse));
        }
        result_free(&whole);
        result_free(&parts);
        batch_close(&b);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_parallelism_has_the_same_bits),
        cmocka_unit_test(test_alone_has_the_same_bits_as_in_a_batch),
        cmocka_unit_test(test_prefill_in_pieces_has_the_same_bits),
        cmocka_unit_test(test_verification_has_the_bits_of_decode),
        cmocka_unit_test(test_a_zero_has_no_sign),
        cmocka_unit_test(test_a_shared_prefix_has_the_same_bits),
        cmocka_unit_test(test_what_changes_nothing_changes_no_bit),
        cmocka_unit_test(test_lists_have_the_same_bits_in_any_batch),
        cmocka_unit_test(test_concurrent_attends_have_the_same_bits),
        cmocka_unit_test(test_random_cuts_have_the_same_bits),
        cmocka_unit_test(test_partials_of_batches_have_the_same_bits),
        cmocka_unit_test(test_shared_chunks_between_others_have_the_same_bits),
        cmocka_unit_test(test_the_merge_is_the_hosts),
        cmocka_unit_test(test_the_finish_is_the_hosts),
    };
    int failed = 0;

    ATTN_BACKEND_TESTS(cpu, "bits", tests);
    ATTN_BACKEND_TESTS(cuda, "bits", tests);
    return conformance_end(failed);
}
