/* The edges of the merge and of attention, one by one, and what is refused. */
#include "tests/conformance/harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const attn_layer_t plain = {.causal = true};

static shape_t
small_shape(attn_dtype_t dtype)
{
    return conformance_fit((shape_t){.q_heads    = 4,
                                     .kv_heads   = 2,
                                     .d_k        = 64,
                                     .d_v        = 48,
                                     .page_size  = 16,
                                     .chunk_size = 256,
                                     .kv_dtype   = dtype,
                                     .q_dtype    = dtype,
                                     .o_dtype    = dtype});
}

static void
set_q(const world_t *world, void *q, uint64_t at, float value)
{
    attn_convert((uint8_t *)q + at * attn_dtype_size(world->shape.q_dtype), world->shape.q_dtype,
                 &value, ATTN_F32, 1);
}

/* ---- results ---- */

static void
test_one_token_returns_v_exactly(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F16, ATTN_BF16};
    (void)state;

    for (int round = 0; round < 40; round++) {
        shape_t shape = small_shape(types[round % 2]);
        seq_t seq     = {.k_scale = 3, .v_scale = 10};
        world_t world;
        result_t result;

        world_open(&world, shape, 64, 1);
        seq_grow(&world, &seq, 1);
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        void *q                    = random_q(&world, 1, 2);
        run(&world, &problem, &plain, q, 1, &result);
        for (uint32_t h = 0; h < shape.q_heads; h++) {
            for (uint32_t i = 0; i < shape.d_v; i++) {
                uint64_t at = ((uint64_t)seq.pages[0][0] * world.mirror.v_page_stride +
                               h / 2 * shape.page_size * shape.d_v + i) *
                              2;
                float v;
                attn_convert(&v, ATTN_F32, (uint8_t *)world.mirror.v + at, shape.kv_dtype, 1);
                assert_true(result.o[h * shape.d_v + i] == v);
            }
        }
        result_free(&result);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

/* A leaf leaves the scale of its maximum m for that of e = ceil m: then l is in (1/2, 1] for one
 * token. */
static void
test_exponents_are_those_of_the_maximum(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++) {
        seq_t seq = {.k_scale = (float)round};
        world_t world;
        result_t result;

        world_open(&world, small_shape(ATTN_F32), 64, 1);
        seq_grow(&world, &seq, 1);
        attn_node_t root           = {32, 0};
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        entry.nodes                = &root;
        entry.n_nodes              = 1;
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        void *q                    = random_q(&world, 1, 1);
        run(&world, &problem, &plain, q, 1, &result);
        for (uint32_t h = 0; h < 4; h++) {
            assert_true(result.l[h] > 0.5f && result.l[h] <= 1);
        }
        result_free(&result);
        free(q);
        seq_free(&seq);
        world_close(&world);
    }
}

static void
test_nothing_seen_is_empty(void **state)
{
    float sinks[4]          = {0, 5, -INFINITY, -3};
    attn_layer_t with_sinks = {.causal = true, .sinks = sinks};
    seq_t seq               = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    seq_grow(&world, &seq, 300);
    attn_problem_entry_t entries[3] = {seq_entry(&seq, 1), seq_entry(&seq, 2), seq_entry(&seq, 1)};
    attn_node_t nodes[2]            = {{26, 0}, {26, 32}}; /* chunks 0 and 1 */
    uint32_t indptr[2]              = {0, 0};
    entries[0].n_runs               = 0; /* holds nothing of it */
    entries[1].n_runs               = 1;
    entries[1].n_nodes              = 2;
    entries[1].nodes                = nodes;
    entries[2].n_lists              = 1; /* no page listed, nothing dense */
    entries[2].sparse_indptr        = indptr;
    entries[2].sparse_pages         = indptr;
    entries[2].dense_from           = 300;
    attn_problem_t problem          = world_problem(&world, entries, 3);
    void *q                         = random_q(&world, 4, 1);
    for (int round = 0; round < 2; round++) {
        run(&world, &problem, round ? &with_sinks : &plain, q, 2, &result);
        assert_int_equal(result.o_rows, 2);
        assert_int_equal(result.states, 2 * 2 * 4);
        for (uint32_t i = 0; i < 2 * 4 * world.shape.d_v; i++) {
            assert_true(result.o[i] == 0 && !signbit(result.o[i]));
        }
        for (uint32_t i = 0; i < 8; i++) {
            assert_true(result.lse[i] == -INFINITY);
            assert_true(result.l[i] > 0); /* node of chunk 0 */
            assert_true(result.l[8 + i] == 0 &&
                        result.e[8 + i] == INT32_MIN); /* of chunk 1, held elsewhere */
        }
        result_free(&result);
    }
    free(q);
    seq_free(&seq);
    world_close(&world);
}

/* Logits far apart and far out: one key outweighs all others to the last bit. */
static void
test_extreme_logits(void **state)
{
    static const float sizes[] = {64, 1000, 3e4f};
    (void)state;

    for (size_t s = 0; s < 3; s++) {
        for (int sign = -1; sign <= 1; sign += 2) {
            seq_t seq = {0};
            float k[64], v[64];
            world_t world;
            result_t result;

            world_open(&world, small_shape(ATTN_F32), 600, 1);
            for (uint32_t t = 0; t < 400; t++) {
                for (uint32_t i = 0; i < world.shape.d_k; i++) {
                    k[i] = (float)sign * sizes[s] * (t == 137 && sign < 0 ? 0.5f : 1.0f);
                }
                for (uint32_t i = 0; i < world.shape.d_v; i++) {
                    v[i] = t == 137 && sign < 0 ? 3 : 1;
                }
                seq_put(&world, &seq, k, v);
            }
            attn_problem_entry_t entry = seq_entry(&seq, 1);
            attn_problem_t problem     = world_problem(&world, &entry, 1);
            float *q                   = random_q(&world, 1, 0);
            for (uint32_t i = 0; i < 4 * world.shape.d_k; i++) {
                q[i] = 64;
            }
            run(&world, &problem, &plain, q, 3, &result);
            for (uint32_t i = 0; i < 4 * world.shape.d_v; i++) {
                assert_true(result.o[i] == (sign < 0 ? 3 : 1));
            }
            check_result(&world, &problem, &plain, q, &result);
            result_free(&result);
            free(q);
            seq_free(&seq);
            world_close(&world);
        }
    }
}

/* Sinks are merged last: far above, far below, and equal to the rest. */
static void
test_sinks_of_any_size(void **state)
{
    float sinks[4];
    (void)state;

    for (float size = -200; size <= 200; size += 12.5f) {
        attn_layer_t layer = {.causal = true, .sinks = sinks};
        seq_t seq          = {0};
        world_t world;
        for (int h = 0; h < 4; h++) {
            sinks[h] = size + (float)h;
        }
        world_open(&world, small_shape(ATTN_F32), 600, 1);
        seq_grow(&world, &seq, 300);
        attn_problem_entry_t entry = seq_entry(&seq, 2);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        check(&world, &problem, &layer);
        seq_free(&seq);
        world_close(&world);
    }
}

/* Values of V that overflow an f16 and that lose all their digits against 1. */
static void
test_values_of_any_size(void **state)
{
    (void)state;
    for (float size = 1e-38f; size < 1e37f; size *= 1000) {
        seq_t seq = {.v_scale = size};
        world_t world;
        world_open(&world, small_shape(ATTN_F32), 800, 1);
        seq_grow(&world, &seq, 600);
        attn_problem_entry_t entry = seq_entry(&seq, 1);
        attn_problem_t problem     = world_problem(&world, &entry, 1);
        check(&world, &problem, &plain);
        seq_free(&seq);
        world_close(&world);
    }
}

/* More queries than tokens: the first ones stand before the sequence and see nothing. */
static void
test_more_queries_than_tokens(void **state)
{
    seq_t seq = {0};
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 100, 1);
    seq_grow(&world, &seq, 5);
    attn_problem_entry_t entry = seq_entry(&seq, 9);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    check(&world, &problem, &plain);
    seq_free(&seq);
    world_close(&world);
}

/* ---- errors ---- */

static void
expect_numeric(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
               const void *q, const char *where)
{
    result_t result;
    assert_int_equal(try_run(world, problem, layer, q, 4, &result), ATTN_ERR_NUMERIC);
    assert_non_null(strstr(attn_last_error(), where));
    result_free(&result);
}

static void
test_bad_logits_are_errors(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 1e37f};
    (void)state;

    for (size_t i = 0; i < 4; i++) {
        seq_t seqs[2] = {{0}, {0}};
        world_t world;
        result_t result;

        world_open(&world, small_shape(ATTN_F32), 4000, 2);
        seq_grow(&world, &seqs[0], 50);
        seq_grow(&world, &seqs[1], 3000);
        attn_problem_entry_t entries[2] = {seq_entry(&seqs[0], 3), seq_entry(&seqs[1], 2)};
        attn_problem_t problem          = world_problem(&world, entries, 2);
        void *q                         = random_q(&world, 5, 1);
        run(&world, &problem, &plain, q, 4, &result);
        result_free(&result);
        set_q(&world, q, (4 * 4 + 2) * world.shape.d_k + 5, bad[i]);
        expect_numeric(&world, &problem, &plain, q, "entry 1, query 1, head 2");
        set_q(&world, q, (1 * 4 + 3) * world.shape.d_k + 63, bad[i]);
        expect_numeric(&world, &problem, &plain, q, "entry 0, query 1, head 3");
        if (i == 0) { /* a cap makes a number of an infinity, but not of a NaN */
            attn_layer_t capped = plain;
            capped.softcap      = 30.0f;
            expect_numeric(&world, &problem, &capped, q, "entry 0, query 1, head 3");
        }
        free(q);
        seq_free(&seqs[0]);
        seq_free(&seqs[1]);
        world_close(&world);
    }
}

/* A bad logit counts only where it is seen. */
static void
test_masked_logits_do_not_count(void **state)
{
    seq_t seq = {0};
    float k[64], v[64] = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    seq_grow(&world, &seq, 299);
    for (uint32_t i = 0; i < 64; i++) {
        k[i] = 3e38f;
    }
    seq_put(&world, &seq, k, v);
    attn_problem_entry_t entry = seq_entry(&seq, 2);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    void *q                    = random_q(&world, 2, 1);
    uint32_t row               = 4 * world.shape.d_k;
    for (uint32_t i = 0; i < row; i++) {
        set_q(&world, q, row + i, 0); /* the query that sees it makes nothing of it */
    }
    run(&world, &problem, &plain, q, 1, &result);
    check_result(&world, &problem, &plain, q, &result);
    result_free(&result);
    for (uint32_t i = 0; i < row; i++) {
        set_q(&world, q, row + i, 1);
    }
    expect_numeric(&world, &problem, &plain, q, "query 1, head 0");
    free(q);
    seq_free(&seq);
    world_close(&world);
}

static void
test_sums_beyond_f32_are_errors(void **state)
{
    seq_t seq   = {0};
    float k[64] = {0}, v[64];
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 600, 1);
    for (uint32_t i = 0; i < 64; i++) {
        v[i] = 3e38f;
    }
    for (int t = 0; t < 300; t++) {
        seq_put(&world, &seq, k, v);
    }
    attn_problem_entry_t entry = seq_entry(&seq, 1);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    void *q                    = random_q(&world, 1, 1);
    expect_numeric(&world, &problem, &plain, q, "entry 0, query 0, head 0");
    free(q);
    seq_free(&seq);
    world_close(&world);
}

static void
test_bad_layers_are_refused(void **state)
{
    float bad[4] = {0, 0, NAN, 0};
    seq_t seq    = {0};
    world_t world;
    result_t result;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 100, 1);
    seq_grow(&world, &seq, 10);
    attn_problem_entry_t entry = seq_entry(&seq, 1);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    attn_layer_t layers[]      = {{.causal = true, .slopes = bad},
                                  {.causal = true, .sinks = bad},
                                  {.causal = true, .softcap = -1},
                                  {.causal = true, .scale = INFINITY}};
    void *q                    = random_q(&world, 1, 1);
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(try_run(&world, &problem, &layers[i], q, 1, &result), ATTN_ERR_INVALID);
        result_free(&result);
    }
    free(q);
    seq_free(&seq);
    world_close(&world);
}

/* ---- append, compare, copy ---- */

/* Rows that nobody wrote are as world_open() left them. */
static void
assert_nothing_stored(const world_t *world)
{
    uint64_t n = world->kv.n_pages * world->kv.page_size * world->kv.kv_heads *
                 attn_dtype_size(world->kv.dtype);
    uint8_t *k, *v;

    world_read_all(world, &k, &v);
    for (uint64_t i = 0; i < n * world->kv.head_dim_k; i++) {
        assert_int_equal(k[i], 0xff);
    }
    for (uint64_t i = 0; i < n * world->kv.head_dim_v; i++) {
        assert_int_equal(v[i], 0xff);
    }
    free(k);
    free(v);
}

static void
test_append_refuses_what_is_not_finite(void **state)
{
    static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    static const float bad[]          = {NAN, INFINITY, -INFINITY};
    (void)state;

    for (int round = 0; round < 18; round++) {
        shape_t shape     = small_shape(types[round % 3]);
        uint32_t pages[4] = {0, 0, 1, 2}, offsets[4] = {3, 4, 0, 15};
        uint32_t d = round / 9 ? shape.d_v : shape.d_k, kv_heads = shape.kv_heads;
        uint64_t size = attn_dtype_size(shape.kv_dtype);
        world_t world;

        world_open(&world, shape, 64, 1);
        void *rows[2] = {calloc(4 * kv_heads * shape.d_k, size),
                         calloc(4 * kv_heads * shape.d_v, size)};
        uint32_t at   = chance_below(4 * kv_heads * d);
        attn_convert((uint8_t *)rows[round / 9] + at * size, shape.kv_dtype, &bad[round / 3 % 3],
                     ATTN_F32, 1);
        assert_int_equal(world.backend->ops->append(world.backend, &world.kv, pages, offsets, 4,
                                                    rows[0], rows[1]),
                         ATTN_ERR_NUMERIC);
        assert_nothing_stored(&world);
        offsets[2] = shape.page_size;
        assert_int_equal(world.backend->ops->append(world.backend, &world.kv, pages, offsets, 4,
                                                    rows[0], rows[1]),
                         ATTN_ERR_INVALID);
        free(rows[0]);
        free(rows[1]);
        world_close(&world);
    }
}

/* Rows of k and v for n tokens, random, in the cache's type. */
static uint8_t *
random_rows(const world_t *world, uint32_t n, uint32_t d)
{
    uint64_t count = (uint64_t)n * world->kv.kv_heads * d;
    uint64_t size  = attn_dtype_size(world->kv.dtype);
    uint8_t *rows  = malloc(count * size);

    for (uint64_t i = 0; i < count; i++) {
        float x = chance_normal();
        attn_convert(rows + i * size, world->kv.dtype, &x, ATTN_F32, 1);
    }
    return rows;
}

/* Token t of `all` is row `of[t]` of `rows`, or as world_open() left it. */
static void
assert_stored(const uint8_t *all, uint64_t n, uint64_t row_bytes, const uint8_t *rows,
              const uint32_t *of)
{
    for (uint64_t t = 0; t < n; t++) {
        if (of[t] != UINT32_MAX) {
            assert_memory_equal(all + t * row_bytes, rows + of[t] * row_bytes, row_bytes);
            continue;
        }
        for (uint64_t i = 0; i < row_bytes; i++) {
            assert_int_equal(all[t * row_bytes + i], 0xff);
        }
    }
}

/* Where the cpu's layout has it, and nothing between. */
static void
assert_layout(const world_t *world, const uint32_t *pages, const uint32_t *offsets, uint32_t n,
              const float *k, const float *v)
{
    const attn_kv_t *kv = &world->mirror;
    uint64_t written    = 0;
    uint32_t d_k = kv->head_dim_k, d_v = kv->head_dim_v;

    for (uint64_t i = 0; i < kv->n_pages * kv->k_page_stride; i++) {
        written += !isnan(((float *)kv->k)[i]);
    }
    assert_int_equal(written, n * 2 * d_k);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t h = 0; h < 2; h++) {
            assert_memory_equal((float *)kv->k + pages[i] * kv->k_page_stride +
                                    (h * 16 + offsets[i]) * d_k,
                                k + (i * 2 + h) * d_k, d_k * sizeof(float));
            assert_memory_equal((float *)kv->v + pages[i] * kv->v_page_stride +
                                    (h * 16 + offsets[i]) * d_v,
                                v + (i * 2 + h) * d_v, d_v * sizeof(float));
        }
    }
}

static void
test_append_stores_rows_and_nothing_else(void **state)
{
    enum { N = 1500, TOKENS = 4096 };
    uint32_t pages[N], offsets[N], *of = malloc(TOKENS * sizeof(*of));
    uint8_t *k_all, *v_all;
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), TOKENS, 3);
    const attn_backend_ops_t *ops = world.backend->ops;
    uint64_t size                 = attn_dtype_size(world.kv.dtype);
    uint64_t k_row = 2 * world.shape.d_k * size, v_row = 2 * world.shape.d_v * size;
    uint8_t *k = random_rows(&world, N, world.shape.d_k);
    uint8_t *v = random_rows(&world, N, world.shape.d_v);

    memset(of, 0xff, TOKENS * sizeof(*of));
    for (uint32_t i = 0; i < N; i++) { /* every other token of the slab */
        pages[i]                       = world.free_pages[i * 2 / 16];
        offsets[i]                     = i * 2 % 16;
        of[pages[i] * 16 + offsets[i]] = i;
    }
    assert_int_equal(world_append(&world, pages, offsets, N, k, v), ATTN_OK);
    world_read_all(&world, &k_all, &v_all);
    assert_stored(k_all, TOKENS, k_row, k, of);
    assert_stored(v_all, TOKENS, v_row, v, of);
    if (world.shape.kv_dtype == ATTN_F32) {
        assert_layout(&world, pages, offsets, N, (float *)(void *)k, (float *)(void *)v);
    }

    bool equal = false;
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, N, k, v, &equal),
                     ATTN_OK);
    assert_true(equal);
    uint8_t *last = v + 1234 * v_row + v_row - size; /* its lowest bit */
    *last ^= 1;
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, N, k, v, &equal),
                     ATTN_OK);
    assert_false(equal);
    *last ^= 1;
    k[size - 1] ^= 0x80; /* a sign */
    assert_int_equal(ops->compare(world.backend, &world.kv, pages, offsets, 1, k, v, &equal),
                     ATTN_OK);
    assert_false(equal);
    free(k);
    free(v);
    free(k_all);
    free(v_all);
    free(of);
    world_close(&world);
}

static void
test_copy_page_copies_its_first_tokens(void **state)
{
    seq_t seq = {0};
    uint8_t *all[2];
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_BF16), 64, 1);
    seq_grow(&world, &seq, 16);
    uint32_t from = seq.pages[0][0], to = world.free_pages[0];
    assert_int_equal(world_copy_page(&world, from, to, 11), ATTN_OK);
    world_read_all(&world, &all[0], &all[1]);
    for (int v = 0; v < 2; v++) {
        uint32_t row = 2 * (v ? world.shape.d_v : world.shape.d_k) * 2;
        for (uint32_t t = 0; t < 16; t++) {
            const uint8_t *copy = all[v] + (to * 16 + t) * row;
            if (t < 11) {
                assert_memory_equal(copy, all[v] + (from * 16 + t) * row, row);
            } else {
                assert_true(copy[0] == 0xff && copy[row - 1] == 0xff);
            }
        }
        free(all[v]);
    }
    assert_int_equal(world_copy_page(&world, from, 1000000, 11), ATTN_ERR_INVALID);
    assert_int_equal(world_copy_page(&world, from, to, 17), ATTN_ERR_INVALID);
    seq_free(&seq);
    world_close(&world);
}

/* A row moves from place to place in the order of the moves: one may be read that was written. */
static void
test_moves_happen_one_after_the_other(void **state)
{
    (void)state;
    for (int round = 0; round < 6; round++) {
        seq_t seq = {0};
        uint8_t *device[2], *host[2];
        attn_move_t moves[40];
        world_t world;

        world_open(&world, random_shape(), 400, 1);
        seq_grow(&world, &seq, 200);
        for (uint32_t i = 0; i < 40; i++) {
            uint32_t from = chance_below(200), to = chance_below(200), p = world.shape.page_size;
            moves[i] =
                (attn_move_t){seq.pages[0][from / p], from % p, seq.pages[0][to / p], to % p};
        }
        assert_int_equal(world.backend->ops->move(world.backend, &world.kv, moves, 40), ATTN_OK);
        world_t mirror = world;
        mirror.backend = world.host;
        mirror.kv      = world.mirror;
        if (world.host != world.backend) {
            assert_int_equal(world.host->ops->move(world.host, &world.mirror, moves, 40), ATTN_OK);
        }
        world_read_all(&world, &device[0], &device[1]);
        world_read_all(&mirror, &host[0], &host[1]);
        uint64_t rows = world.kv.n_pages * world.kv.page_size * world.kv.kv_heads *
                        attn_dtype_size(world.kv.dtype);
        for (int v = 0; v < 2; v++) {
            assert_memory_equal(device[v], host[v],
                                rows * (v ? world.kv.head_dim_v : world.kv.head_dim_k));
            free(device[v]);
            free(host[v]);
        }
        moves[39].to_page = 1000000;
        assert_int_equal(world.backend->ops->move(world.backend, &world.kv, moves, 40),
                         ATTN_ERR_INVALID);
        seq_free(&seq);
        world_close(&world);
    }
}

/* ---- a large pool ---- */

/* Pages whose elements are numbered beyond 2^32: those that are written first lie highest. */
static void
test_pools_beyond_32_bits(void **state)
{
    enum { STRIDE = 1 << 20, PAGES = 5120, PAGE = 16 };
    attn_device_t device = {.free_bytes = 0};
    seq_t seqs[2]        = {{0}, {0}};
    shape_t shape        = small_shape(ATTN_BF16);
    world_t world;
    (void)state;

    world_open(&world, shape, 64, 1);
    assert_int_equal(world.backend->ops->device(world.backend, &device), ATTN_OK);
    world_close(&world);
    if (conformance_on("cpu") || device.free_bytes < UINT64_C(24) << 30) {
        skip(); /* all of it is written before the test */
    }
    world_open_wide(&world, shape, (uint64_t)PAGES * PAGE, 1, STRIDE);
    assert_true((uint64_t)(PAGES - 1) * world.kv.k_page_stride > UINT32_MAX);
    for (uint32_t i = 0; i < PAGES; i++) {
        world.free_pages[i] = i;
    }
    seq_grow(&world, &seqs[0], 3000);
    for (uint32_t i = 0; i < world.n_free; i++) { /* the other from all over the pool */
        uint32_t j = chance_below(i + 1), page = world.free_pages[i];
        world.free_pages[i] = world.free_pages[j];
        world.free_pages[j] = page;
    }
    seq_fork(&world, &seqs[1], &seqs[0], 1003);
    seq_grow(&world, &seqs[1], 2000);
    attn_problem_entry_t entries[2] = {seq_entry(&seqs[0], 3), seq_entry(&seqs[1], 100)};
    attn_problem_t problem          = world_problem(&world, entries, 2);
    check(&world, &problem, &plain);
    seq_free(&seqs[0]);
    seq_free(&seqs[1]);
    world_close(&world);
}

/* ---- the table ---- */

static void
test_supports(void **state)
{
    attn_geometry_t good = {.layers     = 1,
                            .q_heads    = 8,
                            .kv_heads   = 2,
                            .head_dim_k = 128,
                            .head_dim_v = 128,
                            .kv_dtype   = ATTN_BF16,
                            .page_size  = 16,
                            .chunk_size = 2048};
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 64, 1);
    const attn_backend_ops_t *ops = world.backend->ops;
    assert_int_equal(ops->supports(world.backend, &good), ATTN_OK);
    attn_geometry_t bad[11];
    for (int i = 0; i < 11; i++) {
        bad[i] = good;
    }
    bad[0].head_dim_k  = 24;
    bad[1].head_dim_v  = 264;
    bad[2].head_dim_k  = 100;
    bad[3].q_heads     = 7;
    bad[4].kv_dtype    = ATTN_DTYPE_NONE;
    bad[5].page_size   = 257;
    bad[6].chunk_size  = 3000;
    bad[7].kv_heads    = 0;
    bad[8].chunk_size  = 32;
    bad[9].kv_dtype    = ATTN_F32; /* these two are the cpu's alone */
    bad[10].head_dim_k = 64;
    for (int i = 9; i < 11 && conformance_on("cpu"); i++) {
        assert_int_equal(ops->supports(world.backend, &bad[i]), ATTN_OK);
    }
    for (int i = 0; i < (conformance_on("cpu") ? 9 : 11); i++) {
        assert_int_equal(ops->supports(world.backend, &bad[i]), ATTN_ERR_UNSUPPORTED);
        assert_non_null(strstr(attn_last_error(), "bf16"));
    }
    assert_true(ops->read_bandwidth(world.backend) > 1e8);
    assert_true(ops->parallelism(world.backend) >= 1);
    assert_non_null(strstr(ops->kind(world.backend), ops->name));
    assert_null(attn_backend_find("none"));
    assert_string_equal(attn_backend_name(0), "cpu");
    assert_null(attn_backend_name(99));
    world_close(&world);
}

static void
test_slabs_are_zeroed_and_aligned(void **state)
{
    enum { BYTES = 5 << 20, ROW = 128 }; /* half of it K, half V, of pages of one row */
    uint32_t n = BYTES / 2 / ROW, *pages = malloc(n * sizeof(*pages));
    uint32_t *offsets = calloc(n, sizeof(*offsets));
    uint8_t *rows     = malloc(BYTES);
    world_t world;
    void *slab;
    (void)state;

    world_open(&world, small_shape(ATTN_F32), 64, 1);
    const attn_backend_ops_t *ops = world.backend->ops;
    for (int round = 0; round < 2; round++) { /* the second time from memory that was written */
        assert_int_equal(ops->slab_alloc(world.backend, BYTES, &slab), ATTN_OK);
        assert_int_equal((uintptr_t)slab % 4096, 0);
        attn_kv_t kv = {.k             = slab,
                        .v             = (uint8_t *)slab + BYTES / 2,
                        .k_page_stride = ROW / 2,
                        .v_page_stride = ROW / 2,
                        .n_pages       = n,
                        .dtype         = ATTN_BF16,
                        .kv_heads      = 1,
                        .head_dim_k    = ROW / 2,
                        .head_dim_v    = ROW / 2,
                        .page_size     = 1,
                        .chunk_size    = 256};
        for (uint32_t i = 0; i < n; i++) {
            pages[i] = i;
        }
        assert_int_equal(ops->read(world.backend, &kv, pages, offsets, n, rows, rows + BYTES / 2),
                         ATTN_OK);
        for (uint32_t i = 0; i < BYTES; i++) {
            assert_int_equal(rows[i], 0);
        }
        assert_int_equal(ops->slab_fill(world.backend, slab, 0x5a, BYTES), ATTN_OK);
        ops->slab_free(world.backend, slab, BYTES);
    }
    assert_int_equal(ops->slab_alloc(world.backend, UINT64_C(1) << 60, &slab), ATTN_ERR_NO_MEMORY);
    free(pages);
    free(offsets);
    free(rows);
    world_close(&world);
}

/* Backends beside each other, opened and closed again, do not disturb the others. */
static void
test_backends_beside_each_other(void **state)
{
    seq_t seq = {0};
    attn_backend_t *other;
    world_t world;
    (void)state;

    world_open(&world, small_shape(ATTN_BF16), 600, 1);
    seq_grow(&world, &seq, 500);
    attn_problem_entry_t entry = seq_entry(&seq, 2);
    attn_problem_t problem     = world_problem(&world, &entry, 1);
    for (int round = 0; round < 3; round++) {
        assert_int_equal(world.backend->ops->open(1, 0, &other), ATTN_OK);
        assert_string_equal(other->ops->kind(other), world.backend->ops->kind(world.backend));
        check(&world, &problem, &plain);
        other->ops->close(other);
        check(&world, &problem, &plain);
    }
    if (conformance_on("cuda")) {
        assert_int_equal(world.backend->ops->open(1, 4096, &other), ATTN_ERR_UNSUPPORTED);
    }
    seq_free(&seq);
    world_close(&world);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_token_returns_v_exactly),
        cmocka_unit_test(test_exponents_are_those_of_the_maximum),
        cmocka_unit_test(test_nothing_seen_is_empty),
        cmocka_unit_test(test_extreme_logits),
        cmocka_unit_test(test_sinks_of_any_size),
        cmocka_unit_test(test_values_of_any_size),
        cmocka_unit_test(test_more_queries_than_tokens),
        cmocka_unit_test(test_bad_logits_are_errors),
        cmocka_unit_test(test_masked_logits_do_not_count),
        cmocka_unit_test(test_sums_beyond_f32_are_errors),
        cmocka_unit_test(test_bad_layers_are_refused),
        cmocka_unit_test(test_append_refuses_what_is_not_finite),
        cmocka_unit_test(test_append_stores_rows_and_nothing_else),
        cmocka_unit_test(test_copy_page_copies_its_first_tokens),
        cmocka_unit_test(test_moves_happen_one_after_the_other),
        cmocka_unit_test(test_pools_beyond_32_bits),
        cmocka_unit_test(test_supports),
        cmocka_unit_test(test_slabs_are_zeroed_and_aligned),
        cmocka_unit_test(test_backends_beside_each_other),
    };
    int failed = 0;

    ATTN_BACKEND_TESTS(cpu, "edges", tests);
    ATTN_BACKEND_TESTS(cuda, "edges", tests);
    return conformance_end(failed);
}
