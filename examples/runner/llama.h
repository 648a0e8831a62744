/*
 * llama.h: a model of the Llama architecture, as floats in memory. Loading
 * dequantises every weight once: a decode step reads all of them, and floats are
 * what BLAS multiplies. Nothing here knows of attention; forward.h does.
 */
#ifndef RUNNER_LLAMA_H
#define RUNNER_LLAMA_H

#include <stdint.h>

#include "gguf.h"

typedef struct llama_config {
    uint32_t layers;
    uint32_t width; /**< of the residual stream */
    uint32_t heads, kv_heads, head_dim;
    uint32_t ffn; /**< width inside of the feed-forward network */
    uint32_t vocab;
    uint32_t context; /**< tokens that the model was made for */
    float rope_base;
    float norm_epsilon;
} llama_config_t;

/** Matrices are row-major [outputs][inputs]; what is read together lies together. */
typedef struct llama_layer {
    float *attn_norm; /**< [width] */
    float *qkv;       /**< [heads + 2 * kv_heads][head_dim][width]: all of q, of k, of v */
    float *attn_out;  /**< [width][heads * head_dim] */
    float *ffn_norm;  /**< [width] */
    float *gate_up;   /**< [2 * ffn][width]: gate, then up */
    float *down;      /**< [width][ffn] */
} llama_layer_t;

typedef struct llama {
    llama_config_t config;
    float *embedding;      /**< [vocab][width] */
    float *output_norm;    /**< [width] */
    float *output;         /**< [vocab][width]; the embedding itself if the file has none */
    llama_layer_t *layers; /**< [layers] */
} llama_t;

/** NULL on failure: another architecture, or tensors that do not fit what the metadata says. */
llama_t *llama_load(const gguf_t *gguf);
void llama_destroy(llama_t *llama);

/** Rows of llama_layer_t.qkv. */
static inline uint32_t
llama_qkv_width(const llama_config_t *config)
{
    return (config->heads + 2 * config->kv_heads) * config->head_dim;
}

#endif
