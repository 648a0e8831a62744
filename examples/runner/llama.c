#include "llama.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "failure.h"

/* ---- configuration ---- */

/** What some models of this architecture have and this runner does not do. */
static bool
refuse_extras(const gguf_t *gguf)
{
    static const char *const keys[]    = {"llama.rope.scaling.type", "llama.expert_count"};
    static const char *const tensors[] = {"rope_freqs.weight", "blk.0.attn_q.bias"};
    gguf_text_t name;

    if (!gguf_get_text(gguf, "general.architecture", &name)) {
        return false;
    }
    if (!gguf_text_is(name, "llama")) {
        return failure("the architecture is '%.*s'; this runner knows 'llama'",
                       (int)(name.length < 64 ? name.length : 64), name.data);
    }
    for (int i = 0; i < 2; i++) {
        if (gguf_has(gguf, keys[i]) || gguf_tensor(gguf, tensors[i])) {
            return failure("the model has '%s' or '%s', which this runner does not apply", keys[i],
                           tensors[i]);
        }
    }
    return true;
}

/** The value of a key that may be missing. */
static bool
get_uint_or(const gguf_t *gguf, const char *key, uint32_t min, uint32_t max, uint32_t otherwise,
            uint32_t *value)
{
    *value = otherwise;
    return !gguf_has(gguf, key) || gguf_get_uint(gguf, key, min, max, value);
}

static bool
read_heads(const gguf_t *gguf, llama_config_t *c)
{
    uint32_t rope;

    if (!gguf_get_uint(gguf, "llama.attention.head_count", 1, 1024, &c->heads) ||
        !get_uint_or(gguf, "llama.attention.head_count_kv", 1, 1024, c->heads, &c->kv_heads) ||
        !get_uint_or(gguf, "llama.attention.key_length", 1, 256, c->width / c->heads,
                     &c->head_dim) ||
        !get_uint_or(gguf, "llama.rope.dimension_count", 1, 256, c->head_dim, &rope)) {
        return false;
    }
    if (c->heads % c->kv_heads != 0) {
        return failure("%" PRIu32 " query heads are no multiple of %" PRIu32 " KV heads", c->heads,
                       c->kv_heads);
    }
    if (c->head_dim == 0 || c->head_dim % 2 != 0 || rope != c->head_dim) {
        return failure("heads of %" PRIu32 " with %" PRIu32
                       " rotated; this runner rotates all of an "
                       "even number",
                       c->head_dim, rope);
    }
    return true;
}

static bool
read_config(const gguf_t *gguf, llama_config_t *c)
{
    const gguf_tensor_t *embedding = gguf_tensor(gguf, "token_embd.weight");

    if (!refuse_extras(gguf) || !gguf_get_uint(gguf, "llama.block_count", 1, 1024, &c->layers) ||
        !gguf_get_uint(gguf, "llama.embedding_length", 1, 65536, &c->width) ||
        !gguf_get_uint(gguf, "llama.feed_forward_length", 1, 1u << 20, &c->ffn) ||
        !gguf_get_uint(gguf, "llama.context_length", 1, 1u << 24, &c->context) ||
        !gguf_get_float(gguf, "llama.rope.freq_base", &c->rope_base) ||
        !gguf_get_float(gguf, "llama.attention.layer_norm_rms_epsilon", &c->norm_epsilon) ||
        !read_heads(gguf, c)) {
        return false;
    }
    if (!embedding || embedding->dims[1] > 1u << 20) {
        return failure("the file has no tensor 'token_embd.weight' of at most 2^20 rows");
    }
    if (!(c->rope_base >= 1 && c->rope_base <= 1e12f && c->norm_epsilon >= 0)) {
        return failure("llama.rope.freq_base is %g and the norm's epsilon %g; at least 1 and at "
                       "least 0 are allowed",
                       (double)c->rope_base, (double)c->norm_epsilon);
    }
    c->vocab = (uint32_t)embedding->dims[1];
    return true;
}

/* ---- weights ---- */

typedef struct part {
    const char *name;
    uint32_t rows;
} part_t;

static const gguf_tensor_t *
want_tensor(const gguf_t *gguf, const char *name, uint32_t rows, uint32_t columns)
{
    const gguf_tensor_t *tensor = gguf_tensor(gguf, name);

    if (!tensor) {
        failure("the file has no tensor '%s'", name);
    } else if (tensor->dims[0] != columns || tensor->values != (uint64_t)rows * columns) {
        failure("tensor '%s' is %" PRIu64 " x %" PRIu64 "; the metadata ask for %" PRIu32
                " x %" PRIu32,
                name, tensor->dims[1], tensor->dims[0], rows, columns);
        tensor = NULL;
    }
    return tensor;
}

/** The matrices `prefix name .weight` as floats, one below the other. */
static bool
load(const gguf_t *gguf, const char *prefix, const part_t *parts, int n, uint32_t columns,
     float **to)
{
    const gguf_tensor_t *tensors[3];
    uint64_t values = 0;

    for (int i = 0; i < n; i++) {
        char name[64];
        snprintf(name, sizeof(name), "%s%s.weight", prefix, parts[i].name);
        tensors[i] = want_tensor(gguf, name, parts[i].rows, columns);
        if (!tensors[i]) {
            return false;
        }
        values += tensors[i]->values;
    }
    /* Aligned for the vector units, in whole cache lines. */
    float *at = *to = aligned_alloc(64, (values * sizeof(float) + 63) / 64 * 64);
    if (!at) {
        return failure("no memory for %" PRIu64 " weights", values);
    }
    for (int i = 0; i < n; i++) {
        quant_to_float(tensors[i]->type, tensors[i]->data, tensors[i]->values, at);
        at += tensors[i]->values;
    }
    return true;
}

static bool
load_layer(const gguf_t *gguf, const llama_config_t *c, uint32_t l, llama_layer_t *layer)
{
    uint32_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const part_t attn_norm = {"attn_norm", 1}, ffn_norm = {"ffn_norm", 1};
    const part_t qkv[]    = {{"attn_q", q}, {"attn_k", kv}, {"attn_v", kv}};
    const part_t attn_out = {"attn_output", c->width}, down = {"ffn_down", c->width};
    const part_t gate_up[] = {{"ffn_gate", c->ffn}, {"ffn_up", c->ffn}};
    char block[32];

    snprintf(block, sizeof(block), "blk.%" PRIu32 ".", l);
    return load(gguf, block, &attn_norm, 1, c->width, &layer->attn_norm) &&
           load(gguf, block, qkv, 3, c->width, &layer->qkv) &&
           load(gguf, block, &attn_out, 1, q, &layer->attn_out) &&
           load(gguf, block, &ffn_norm, 1, c->width, &layer->ffn_norm) &&
           load(gguf, block, gate_up, 2, c->width, &layer->gate_up) &&
           load(gguf, block, &down, 1, c->ffn, &layer->down);
}

static bool
load_weights(const gguf_t *gguf, llama_t *m)
{
    const llama_config_t *c  = &m->config;
    const part_t embedding   = {"token_embd", c->vocab};
    const part_t output_norm = {"output_norm", 1};
    const part_t output      = {"output", c->vocab};

    m->layers = calloc(c->layers, sizeof(*m->layers));
    if (!m->layers) {
        return failure("out of memory");
    }
    for (uint32_t l = 0; l < c->layers; l++) {
        if (!load_layer(gguf, c, l, &m->layers[l])) {
            return false;
        }
    }
    if (!load(gguf, "", &embedding, 1, c->width, &m->embedding) ||
        !load(gguf, "", &output_norm, 1, c->width, &m->output_norm)) {
        return false;
    }
    if (!gguf_tensor(gguf, "output.weight")) {
        m->output = m->embedding; /* tied: the embedding reads both ways */
        return true;
    }
    return load(gguf, "", &output, 1, c->width, &m->output);
}

llama_t *
llama_load(const gguf_t *gguf)
{
    llama_t *m = calloc(1, sizeof(*m));

    if (!m) {
        failure("out of memory");
        return NULL;
    }
    if (!read_config(gguf, &m->config) || !load_weights(gguf, m)) {
        llama_destroy(m);
        return NULL;
    }
    return m;
}

void
llama_destroy(llama_t *m)
{
    if (!m) {
        return;
    }
    for (uint32_t l = 0; m->layers && l < m->config.layers; l++) {
        llama_layer_t *layer = &m->layers[l];
        free(layer->attn_norm);
        free(layer->qkv);
        free(layer->attn_out);
        free(layer->ffn_norm);
        free(layer->gate_up);
        free(layer->down);
    }
    if (m->output != m->embedding) {
        free(m->output);
    }
    free(m->layers);
    free(m->embedding);
    free(m->output_norm);
    free(m);
}
