/*
 * Backends against the oracle over the grids that FlashInfer's own tests run, thinned out:
 * a grid's main dimensions are walked, the others drawn by chance.
 */
#include "tests/conformance/harness.h"

#include <stdlib.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const attn_layer_t plain = {.causal = true};

static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
static const uint32_t chunks[]    = {256, 512, 1024, 2048};

static shape_t
shape_of(uint32_t q_heads, uint32_t kv_heads, uint32_t d, uint32_t page_size)
{
    return conformance_fit((shape_t){.q_heads    = q_heads,
                                     .kv_heads   = kv_heads,
                                     .d_k        = d,
                                     .d_v        = d,
                                     .page_size  = page_size,
                                     .chunk_size = CHANCE_OF(chunks),
                                     .kv_dtype   = CHANCE_OF(types),
                                     .q_dtype    = CHANCE_OF(types),
                                     .o_dtype    = CHANCE_OF(types)});
}

/* One problem over `n` sequences of these lengths with these queries. */
static void
check_batch(shape_t shape, const uint32_t *kv, const uint32_t *qo, uint32_t n,
            const attn_layer_t *layer)
{
    attn_problem_entry_t *entries = calloc(n, sizeof(*entries));
    seq_t *seqs                   = calloc(n, sizeof(*seqs));
    uint64_t tokens               = 0;
    world_t world;

    for (uint32_t i = 0; i < n; i++) {
        tokens += kv[i] + (kv[i] / shape.chunk_size + 1) * shape.page_size;
    }
    world_open(&world, shape, tokens, chance_in(1, 3));
    for (uint32_t i = 0; i < n; i++) {
        seq_grow(&world, &seqs[i], kv[i]);
        entries[i] = seq_entry(&seqs[i], qo[i]);
    }
    attn_problem_t problem = world_problem(&world, entries, n);
    problem.causal         = layer->causal;
    problem.window         = layer->window;
    check(&world, &problem, layer);
    for (uint32_t i = 0; i < n; i++) {
        seq_free(&seqs[i]);
    }
    world_close(&world);
    free(seqs);
    free(entries);
}

/* n equal sequences. */
static void
check_even(shape_t shape, uint32_t n, uint32_t kv, uint32_t qo, const attn_layer_t *layer)
{
    uint32_t *kvs = malloc(n * sizeof(*kvs)), *qos = malloc(n * sizeof(*qos));
    for (uint32_t i = 0; i < n; i++) {
        kvs[i] = kv;
        qos[i] = qo;
    }
    check_batch(shape, kvs, qos, n, layer);
    free(kvs);
    free(qos);
}

static void
test_decode(void **state)
{
    static const uint32_t pages[] = {1, 8, 16}, lengths[] = {54, 97, 512, 2048},
                          dims[]   = {64, 128, 256};
    static const uint32_t groups[] = {1, 8};
    (void)state;

    for (size_t p = 0; p < COUNT(pages); p++) {
        for (size_t l = 0; l < COUNT(lengths); l++) {
            for (size_t g = 0; g < COUNT(groups); g++) {
                uint32_t n = lengths[l] > 1000 ? 3 : CHANCE_OF(((uint32_t[]){12, 17}));
                check_even(shape_of(4 * groups[g], 4, CHANCE_OF(dims), pages[p]), n, lengths[l], 1,
                           &plain);
            }
        }
    }
    check_even(shape_of(4, 4, 128, 16), 1, 16384, 1, &plain);
    check_even(shape_of(4, 1, 64, 16), 1, 32789, 1, &plain);
    check_even(shape_of(2, 2, 64, 1), 128, 97, 1, &plain);
}

static void
test_groups_and_dims(void **state)
{
    (void)state;
    for (uint32_t group = 1; group <= 8; group++) {
        check_even(shape_of(2 * group, 2, 8 * chance_in(4, 32), 16), 2, chance_in(1, 700),
                   chance_in(1, 5), &plain);
    }
    check_even(shape_of(9, 3, 96, 16), 3, 333, 2, &plain);
    check_even(shape_of(100, 1, 40, 16), 1, 300, 2, &plain); /* a group that no tile holds */
    for (uint32_t d = 32; d <= 256; d += 8) {
        shape_t shape = shape_of(2, 1, d, chance_in(1, 40));
        shape.d_v     = 8 * chance_in(4, 32);
        check_even(shape, 2, chance_in(1, 300), chance_in(1, 3), &plain);
    }
    shape_t latent = shape_of(4, 4, 192, 16); /* as in ragged MLA prefill */
    latent.d_v     = 128;
    check_even(latent, 2, 400, 37, &plain);
    shape_t least    = shape_of(4, 2, 64, 5); /* chunks of one leaf */
    least.chunk_size = conformance_on("cuda") ? 64 : 128;
    check_even(least, 3, 1500, 3, &plain);
}

static void
test_prefill(void **state)
{
    static const uint32_t pages[] = {1, 5, 16}, lengths[] = {54, 97, 512, 2048},
                          queries[] = {37, 17, 127, 577};
    static const uint32_t dims[]    = {64, 128, 256};
    (void)state;

    for (size_t p = 0; p < COUNT(pages); p++) {
        for (size_t l = 0; l < COUNT(lengths); l++) {
            uint32_t qo        = CHANCE_OF(queries);
            attn_layer_t layer = {.causal = chance_below(4) > 0};
            qo                 = qo > lengths[l] && layer.causal ? lengths[l] : qo;
            check_even(shape_of(4, chance_below(2) ? 4 : 1, CHANCE_OF(dims), pages[p]),
                       lengths[l] > 600 ? 1 : 3, lengths[l], qo, &layer);
        }
    }
    check_even(shape_of(4, 1, 64, 16), 1, 2042, 577, &plain);
    check_even(shape_of(7, 1, 64, 16), 1, 501, 37, &plain);
    check_even(shape_of(2, 1, 128, 8), 1, 1500, 1500, &plain);
}

static void
test_mixed_batches(void **state)
{
    uint32_t kv[64], qo[64];
    (void)state;

    for (int round = 0; round < 4; round++) { /* decodes beside a few prefills */
        for (int i = 0; i < 40; i++) {
            kv[i] = chance_in(1, 600);
            qo[i] = 1;
        }
        for (int i = 40; i < 43; i++) {
            kv[i] = chance_in(1000, 1500);
            qo[i] = chance_in(2, 129);
        }
        check_batch(shape_of(7, 1, 64, CHANCE_OF(((uint32_t[]){1, 8, 16}))), kv, qo, 43, &plain);
    }
    kv[0] = 8190, qo[0] = 63;
    check_batch(shape_of(4, 4, 64, 16), kv, qo, 1, &plain);
    kv[0] = 235, qo[0] = 2, kv[1] = 13353, qo[1] = 1;
    check_batch(shape_of(8, 1, 128, 16), kv, qo, 2, &plain);
    kv[0] = 146, qo[0] = 146, kv[1] = 67, qo[1] = 67;
    check_batch(shape_of(4, 1, 256, 8), kv, qo, 2, &plain);
    for (int i = 0; i < 64; i++) { /* sparse in queries: some only append */
        kv[i] = chance_in(1, 200);
        qo[i] = chance_below(3);
        qo[i] = qo[i] < kv[i] ? qo[i] : kv[i];
    }
    check_batch(shape_of(4, 2, 64, 16), kv, qo, 64, &plain);
}

static void
test_sliding_window(void **state)
{
    static const uint32_t lengths[] = {1, 3, 19, 99, 199, 1177, 1999};
    static const uint32_t windows[] = {1, 3, 13, 23, 37, 43, 128, 533, 4096};
    (void)state;

    for (size_t l = 0; l < COUNT(lengths); l++) {
        for (int round = 0; round < 3; round++) {
            attn_layer_t layer = {.causal = true, .window = CHANCE_OF(windows)};
            check_even(shape_of(8, chance_below(2) ? 1 : 4, 64, CHANCE_OF(((uint32_t[]){1, 16}))),
                       3, lengths[l], 1, &layer);
        }
    }
    for (int round = 0; round < 6; round++) {
        uint32_t kv        = CHANCE_OF(((uint32_t[]){54, 397, 1177}));
        attn_layer_t layer = {.causal = chance_below(3) > 0, .window = CHANCE_OF(windows)};
        check_even(shape_of(4, 2, 64, CHANCE_OF(((uint32_t[]){1, 16, 100}))), 2, kv,
                   chance_in(1, 47), &layer);
    }
}

static void
test_softcap_alibi_sinks(void **state)
{
    float slopes[32], sinks[32];
    (void)state;

    for (int round = 0; round < 24; round++) {
        uint32_t kv = CHANCE_OF(((uint32_t[]){1, 4, 9, 16, 81, 128, 729, 1500}));
        uint32_t qo = chance_below(2) ? 1 : chance_in(1, kv < 40 ? kv : 40);
        for (int h = 0; h < 32; h++) {
            slopes[h] = 1.0f / (float)(1 << h % 9);
            sinks[h]  = 4 * chance_normal();
        }
        attn_layer_t layer = {.causal  = chance_below(4) > 0,
                              .softcap = CHANCE_OF(((float[]){0, 1, 30, 50})),
                              .scale   = CHANCE_OF(((float[]){0, 0.02f, 1})),
                              .window  = chance_below(3) == 0 ? 128 : 0,
                              .slopes  = chance_below(2) ? slopes : NULL,
                              .sinks   = chance_below(2) ? sinks : NULL};
        uint32_t kv_heads  = CHANCE_OF(((uint32_t[]){1, 4, 8}));
        check_even(shape_of(8, kv_heads, CHANCE_OF(((uint32_t[]){64, 128})), 16), 2, kv, qo,
                   &layer);
    }
}

static void
test_block_sparse(void **state)
{
    (void)state;
    for (int round = 0; round < 30; round++) {
        shape_t shape = shape_of(4, CHANCE_OF(((uint32_t[]){1, 4})), 64,
                                 CHANCE_OF(((uint32_t[]){1, 4, 8, 16, 24, 48, 64})));
        uint32_t indptr[2][8], *pages[2] = {malloc(40000), malloc(40000)};
        attn_problem_entry_t entries[2];
        seq_t seqs[2] = {0};
        world_t world;

        world_open(&world, shape, 8000, chance_in(1, 3));
        for (int i = 0; i < 2; i++) {
            uint32_t n_q = chance_below(2) ? 1 : chance_in(1, 30);
            seq_grow(&world, &seqs[i], chance_in(n_q, 2000));
            entries[i] = seq_entry(&seqs[i], n_q);
            draw_lists(&entries[i], &world, chance_below(2) ? 1 : shape.kv_heads,
                       CHANCE_OF(((uint32_t[]){0, 25, 64, 180, 256})), indptr[i], pages[i]);
            entries[i].dense_from = chance_below(3) ? seqs[i].length - n_q : seqs[i].length;
        }
        attn_problem_t problem = world_problem(&world, entries, 2);
        attn_layer_t layer     = {.causal = true, .window = chance_below(3) ? 0 : 333};
        problem.window         = layer.window;
        check(&world, &problem, &layer);
        for (int i = 0; i < 2; i++) {
            seq_free(&seqs[i]);
            free(pages[i]);
        }
        world_close(&world);
    }
}

static void
test_shared_prefix(void **state)
{
    static const uint32_t shared[] = {128, 512, 2048}, unique[] = {0, 17, 37, 150};
    (void)state;

    for (size_t s = 0; s < COUNT(shared); s++) {
        for (int round = 0; round < 2; round++) {
            shape_t shape = shape_of(8, CHANCE_OF(((uint32_t[]){1, 8})), 64,
                                     CHANCE_OF(((uint32_t[]){1, 16, 24})));
            attn_problem_entry_t entries[17];
            seq_t base = {0}, seqs[17];
            uint32_t n = CHANCE_OF(((uint32_t[]){12, 17}));
            world_t world;

            world_open(&world, shape, shared[s] + n * (CHANCE_OF(unique) + 2000), chance_in(1, 3));
            seq_grow(&world, &base, shared[s] + chance_below(20));
            for (uint32_t i = 0; i < n; i++) {
                uint32_t n_q = CHANCE_OF(((uint32_t[]){1, 1, 3, 40}));
                seq_fork(&world, &seqs[i], &base,
                         chance_below(5) ? base.length : chance_in(40, shared[s]));
                seq_grow(&world, &seqs[i], CHANCE_OF(unique));
                entries[i] = seq_entry(&seqs[i], n_q < seqs[i].length ? n_q : 1);
            }
            attn_problem_t problem = world_problem(&world, entries, n);
            check(&world, &problem, &plain);
            for (uint32_t i = 0; i < n; i++) {
                seq_free(&seqs[i]);
            }
            seq_free(&base);
            world_close(&world);
        }
    }
}

static void
test_random_shapes(void **state)
{
    float slopes[64], sinks[64];
    (void)state;

    for (int round = 0; round < 60; round++) {
        uint32_t kv_heads = chance_in(1, 4), group = chance_in(1, 9);
        shape_t shape =
            shape_of(kv_heads * group, kv_heads, 8 * chance_in(4, 32), chance_in(1, 256));
        uint32_t kv[6], qo[6], n = chance_in(1, 6);
        shape.d_v = 8 * chance_in(4, 32);
        for (uint32_t h = 0; h < shape.q_heads; h++) {
            slopes[h] = chance_normal() * 0.1f;
            sinks[h]  = chance_normal() * 3;
        }
        for (uint32_t i = 0; i < n; i++) {
            kv[i] = chance_in(1, 1 + chance_below(700));
            qo[i] = chance_in(0, kv[i] < 50 ? kv[i] : chance_in(1, 50));
        }
        attn_layer_t layer = {.causal  = chance_below(4) > 0,
                              .window  = chance_below(3) ? 0 : chance_in(1, 300),
                              .softcap = chance_below(3) ? 0 : 20.0f,
                              .slopes  = chance_below(4) ? NULL : slopes,
                              .sinks   = chance_below(4) ? NULL : sinks};
        check_batch(shape, kv, qo, n, &layer);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode),         cmocka_unit_test(test_groups_and_dims),
        cmocka_unit_test(test_prefill),        cmocka_unit_test(test_mixed_batches),
        cmocka_unit_test(test_sliding_window), cmocka_unit_test(test_softcap_alibi_sinks),
        cmocka_unit_test(test_block_sparse),   cmocka_unit_test(test_shared_prefix),
        cmocka_unit_test(test_random_shapes),
    };
    int failed = 0;

    ATTN_BACKEND_TESTS(cpu, "grid", tests);
    ATTN_BACKEND_TESTS(cuda, "grid", tests);
    return conformance_end(failed);
}
