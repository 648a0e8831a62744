/*
 * forward.h: the forward pass. Everything of a transformer is here except for
 * attention, which libattn does: see attend() in forward.c.
 */
#ifndef RUNNER_FORWARD_H
#define RUNNER_FORWARD_H

#include <attn.h>
#include <signal.h>

#include "llama.h"
#include "meter.h"
#include "pool.h"

/** Buffers for a pass of up to `batch` tokens. */
typedef struct forward {
    const llama_t *model;
    uint32_t batch;
    attn_dtype_t kv_dtype;
    pool_t *pool;
    float *x;       /* [batch][width] the residual stream */
    float *h;       /* [batch][width] what a sublayer reads or adds */
    float *qkv;     /* [batch][heads + 2 * kv_heads][head_dim] */
    void *k, *v;    /* [batch][kv_heads][head_dim] of kv_dtype */
    float *o;       /* [batch][heads][head_dim] what attention answers */
    float *gate_up; /* [batch][2 * ffn], then [batch][ffn] */
    float *rope;    /* [batch][head_dim / 2][2] cos, sin */
    bool digesting;
    uint64_t digest; /* over every o, if digesting */
} forward_t;

/** Set by a signal handler: a pass fails before its next layer. */
extern volatile sig_atomic_t forward_stop;

bool forward_create(forward_t *f, const llama_t *model, uint32_t batch, attn_dtype_t kv_dtype);
void forward_destroy(forward_t *f);

/**
 * Pass n tokens, the first of which stands at position `first`, through all
 * layers of an open step, whose one entry appends and asks n tokens.
 *
 * @param ids    1 to batch tokens, each below the vocabulary's size.
 * @param meter  Gets the time of each attn_step_run().
 */
bool forward_tokens(forward_t *f, attn_step_t *step, const uint32_t *ids, uint32_t n,
                    uint64_t first, meter_t *meter);

/** logits[vocab] after the row-th token of the last pass. */
void forward_logits(const forward_t *f, uint32_t row, float *logits);

/** The token with the largest logit; of equals the first. */
uint32_t greedy(const float *logits, uint32_t vocab);

#endif
