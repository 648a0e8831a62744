#include "llama.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "failure.h"
#include "test_gguf.h"

/* A model of one layer: 32 wide, two query heads and one KV head of 16, 8 tokens. */
enum { WIDTH = 32, KV = 16, FFN = 32, VOCAB = 8 };

typedef struct shape {
    const char *name;
    uint32_t rows; /* 0: a vector */
    uint32_t columns;
} shape_t;

static const shape_t shapes[] = {
    {"token_embd.weight", VOCAB, WIDTH},        {"output_norm.weight", 0, WIDTH},
    {"blk.0.attn_norm.weight", 0, WIDTH},       {"blk.0.attn_q.weight", WIDTH, WIDTH},
    {"blk.0.attn_k.weight", KV, WIDTH},         {"blk.0.attn_v.weight", KV, WIDTH},
    {"blk.0.attn_output.weight", WIDTH, WIDTH}, {"blk.0.ffn_norm.weight", 0, WIDTH},
    {"blk.0.ffn_gate.weight", FFN, WIDTH},      {"blk.0.ffn_up.weight", FFN, WIDTH},
    {"blk.0.ffn_down.weight", WIDTH, FFN},
};

#define SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static uint32_t
values_of(const shape_t *shape)
{
    return (shape->rows ? shape->rows : 1) * shape->columns;
}

/** Every value of tensor i is i; `skip` is left out, and `wrong` has a row too few. */
static void
build(builder_t *b, const char *architecture, const char *extra, size_t skip, size_t wrong)
{
    uint64_t offset = 0;

    put_start(b, SHAPES - (skip < SHAPES), extra ? 9 : 8);
    put_key_text(b, "general.architecture", architecture);
    put_key_u32(b, "llama.block_count", 1);
    put_key_u32(b, "llama.embedding_length", WIDTH);
    put_key_u32(b, "llama.feed_forward_length", FFN);
    put_key_u32(b, "llama.context_length", 64);
    put_key_u32(b, "llama.attention.head_count", 2);
    put_key_float(b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    put_key_float(b, "llama.rope.freq_base", 10000);
    if (extra) {
        put_key_u32(b, extra, 1);
    }
    for (size_t i = 0; i < SHAPES; i++) {
        if (i != skip) {
            put_tensor(b, shapes[i].name, shapes[i].columns, shapes[i].rows - (i == wrong),
                       QUANT_F32, offset);
            offset += values_of(&shapes[i]) * sizeof(float);
        }
    }
    put_padding(b);
    for (size_t i = 0; i < SHAPES; i++) {
        for (uint32_t j = 0; i != skip && j < values_of(&shapes[i]); j++) {
            put(b, &(float){(float)i}, sizeof(float));
        }
    }
}

static llama_t *
load(const builder_t *b)
{
    gguf_t *gguf = gguf_parse(b->bytes, b->n);
    assert_non_null(gguf);
    llama_t *model = llama_load(gguf);
    gguf_close(gguf); /* the weights are copies */
    return model;
}

static void
test_loads_what_belongs_together(void **state)
{
    static builder_t b;
    (void)state;

    build(&b, "llama", "llama.attention.head_count_kv", SHAPES, SHAPES);
    llama_t *model = load(&b);
    assert_non_null(model);
    assert_int_equal(model->config.kv_heads, 1);
    assert_int_equal(model->config.head_dim, 16);
    assert_int_equal(llama_qkv_width(&model->config), WIDTH + 2 * KV);
    assert_true(model->output == model->embedding); /* tied */
    const llama_layer_t *layer = &model->layers[0];
    assert_true(layer->qkv[WIDTH * WIDTH - 1] == 3 && layer->qkv[WIDTH * WIDTH] == 4 &&
                layer->qkv[(WIDTH + KV) * WIDTH] == 5);
    assert_true(layer->gate_up[FFN * WIDTH - 1] == 8 && layer->gate_up[FFN * WIDTH] == 9);
    assert_true(layer->attn_norm[0] == 2 && layer->attn_out[0] == 6 && layer->ffn_norm[0] == 7 &&
                layer->down[0] == 10 && model->output_norm[0] == 1);
    llama_destroy(model);
    llama_destroy(NULL);
}

static void
test_missing_and_wrong_tensors_are_named(void **state)
{
    static builder_t b;
    (void)state;

    for (size_t i = 0; i < SHAPES; i++) {
        build(&b, "llama", "llama.attention.head_count_kv", i, SHAPES);
        assert_null(load(&b));
        assert_non_null(strstr(failure_text(), shapes[i].name));
        if (i > 0 && shapes[i].rows > 0) {
            build(&b, "llama", "llama.attention.head_count_kv", SHAPES, i);
            assert_null(load(&b));
            assert_non_null(strstr(failure_text(), shapes[i].name));
        }
    }
}

static void
test_other_models_are_refused(void **state)
{
    static builder_t b;
    (void)state;

    build(&b, "mamba", NULL, SHAPES, SHAPES);
    assert_null(load(&b));
    assert_string_equal(failure_text(), "the architecture is 'mamba'; this runner knows 'llama'");
    build(&b, "llama", "llama.rope.scaling.type", SHAPES, SHAPES);
    assert_null(load(&b));
    assert_non_null(strstr(failure_text(), "llama.rope.scaling.type"));
    build(&b, "llama", "llama.expert_count", SHAPES, SHAPES);
    assert_null(load(&b));
    build(&b, "llama", NULL, SHAPES, SHAPES); /* as many KV heads as query heads: k is too small */
    assert_null(load(&b));
    assert_string_equal(failure_text(), "tensor 'blk.0.attn_k.weight' is 16 x 32; the metadata ask "
                                        "for 32 x 32");
    build(&b, "llama", "llama.rope.dimension_count", SHAPES, SHAPES); /* 1 of 16 */
    assert_null(load(&b));
    assert_string_equal(failure_text(), "heads of 16 with 1 rotated; this runner rotates all of an "
                                        "even number");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loads_what_belongs_together),
        cmocka_unit_test(test_missing_and_wrong_tensors_are_named),
        cmocka_unit_test(test_other_models_are_refused),
    };
    return cmocka_run_group_tests_name("examples.runner.llama", tests, NULL, NULL);
}
