/*
 * model.h: what the service should answer: sequences with their k, v in plain arrays, and
 * attention by its definition in float64. Steps are taken through libattn and checked here.
 *
 * Everything random comes from the model's own generator, so equal seeds make equal calls
 * on any target, whose answers can then be compared bit by bit (digest).
 */
#ifndef ATTN_TESTS_MODEL_H
#define ATTN_TESTS_MODEL_H

#include "client/attn.h"

#define MODEL_LAYERS 2u
#define MODEL_Q_HEADS 4u
#define MODEL_KV_HEADS 2u
#define MODEL_D_K 32u
#define MODEL_D_V 40u
#define MODEL_CHUNK 256u
#define MODEL_PAGE 24u     /* does not divide a chunk: its last page is partly used */
#define MODEL_TOKENS 2048u /* a sequence has at most */
#define MODEL_SEQS 12u

typedef struct model_seq {
    bool used;
    attn_seq_t seq;
    uint64_t length;
    float *k[MODEL_LAYERS], *v[MODEL_LAYERS]; /* [MODEL_TOKENS][heads][dim] */
} model_seq_t;

typedef struct model {
    attn_cache_t *cache;
    uint64_t random;
    uint64_t digest; /* of all answers so far */
    bool check;      /* compare with the reference, too */
    model_seq_t seqs[MODEL_SEQS];
} model_t;

/** One entry of a batch: sequence s of the model. */
typedef struct model_entry {
    uint32_t s;
    uint32_t n_q, n_new;
    uint32_t accepted; /* of n_new, at commit */
} model_entry_t;

/** The cache's shape: f32, spread, the second layer with a window and a soft cap. */
void model_geometry(attn_geometry_t *geometry);

void model_init(model_t *model, attn_cache_t *cache, uint64_t seed);
void model_free(model_t *model); /* leaves the service's sequences alone */

uint64_t model_random(model_t *model, uint64_t below);

void model_create(model_t *model, uint32_t s);
attn_status_t model_fork(model_t *model, uint32_t s, uint64_t length, uint32_t to);
attn_status_t model_truncate(model_t *model, uint32_t s, uint64_t length);
attn_status_t model_drop(model_t *model, uint32_t s);

/**
 * A whole step: begin, every layer, commit (or abort, if abort is set). Answers are checked;
 * a wrong one fails the test. @return the first failure of the service
 */
attn_status_t model_step(model_t *model, const model_entry_t *entries, uint32_t n,
                         uint32_t timeout_ms, bool abort);

/** A step of n new tokens with as many queries, all accepted. */
attn_status_t model_append(model_t *model, uint32_t s, uint32_t n);

/** Give the service tokens [first, first + n) of a sequence again, which a hole has, and ask n_q
 * queries, which end there; answers are checked. @return the first failure of the service */
attn_status_t model_refill(model_t *model, uint32_t s, uint64_t first, uint32_t n, uint32_t n_q);

/** Ask n queries at the end of the first `length` tokens, always the same ones: *digest_p is of the
 * answers, which are checked. */
attn_status_t model_ask(model_t *model, uint32_t s, uint64_t length, uint32_t n,
                        uint64_t *digest_p);

/** A story of `acts` random acts on random sequences: every kind of call. Fails the test if one
 * fails. */
void model_story(model_t *model, uint32_t acts);

#endif
