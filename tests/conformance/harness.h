/*
 * harness.h: a small world for conformance tests: pages in random order with NaN in every
 * byte that nobody wrote, sequences, forks, problems, runs of a backend, and the oracle's
 * judgement. Every test takes any backend of the table; ATTN_BACKEND_TESTS stamps them out.
 */
#ifndef ATTN_TESTS_CONFORMANCE_HARNESS_H
#define ATTN_TESTS_CONFORMANCE_HARNESS_H

#include "balancer/plan.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

/** Run the tests of this file against a backend: one CMocka group, named by both. Adds the
 * number of failures to `failed`. A backend that this machine has no device for is skipped. */
#define ATTN_BACKEND_TESTS(backend, suite, tests)                                                  \
    failed += conformance_run(#backend, suite "." #backend, tests, sizeof(tests) / sizeof(tests[0]))

int conformance_run(const char *backend, const char *name, const struct CMUnitTest *tests,
                    size_t n);

/* ---- chance: environment ATTN_SEED=N repeats a run ---- */

uint64_t chance(void);
uint32_t chance_below(uint32_t n);               /* 0 to n - 1 */
uint32_t chance_in(uint32_t low, uint32_t high); /* both included */
float chance_normal(void);                       /* about N(0, 1) */
#define CHANCE_OF(array) ((array)[chance_below(sizeof(array) / sizeof((array)[0]))])

/* ---- the world ---- */

typedef struct shape {
    uint32_t q_heads, kv_heads, d_k, d_v;
    uint32_t page_size, chunk_size;
    attn_dtype_t kv_dtype, q_dtype, o_dtype;
} shape_t;

typedef struct world {
    shape_t shape;
    attn_backend_t *backend;
    attn_kv_t kv;
    uint64_t k_bytes, v_bytes;
    uint32_t *free_pages; /* in random order */
    uint32_t n_free;
    uint32_t few, many; /* leaf sizes of the backend */
} world_t;

/** A world with room for `tokens` tokens in whole pages, on a backend with `threads` threads. */
void world_open(world_t *world, shape_t shape, uint64_t tokens, uint32_t threads);
void world_close(world_t *world);

#define SEQ_CHUNKS_MAX 256u

typedef struct seq {
    uint64_t length;
    uint32_t n_chunks;
    attn_kv_run_t runs[SEQ_CHUNKS_MAX];
    uint32_t *pages[SEQ_CHUNKS_MAX]; /* owned */
    float k_scale, v_scale;          /* of random tokens: 0 is taken as 1 */
} seq_t;

/** Append n random tokens. */
void seq_grow(world_t *world, seq_t *seq, uint64_t n);

/** Append one token with these values (of f32), the same for all heads. */
void seq_put(world_t *world, seq_t *seq, const float *k, const float *v);

/** Share the first `length` tokens of `from`: full pages are shared, the unfilled one is copied. */
void seq_fork(world_t *world, seq_t *seq, const seq_t *from, uint64_t length);
void seq_free(seq_t *seq); /* pages of the world are not taken back */

/** An entry over all of the sequence with n_q queries at its end. */
attn_problem_entry_t seq_entry(const seq_t *seq, uint32_t n_q);

/** A causal problem over these entries. */
attn_problem_t world_problem(const world_t *world, const attn_problem_entry_t *entries, uint32_t n);

/* ---- running ---- */

typedef struct result {
    uint64_t o_rows, states;
    float *o;   /* [o_rows][q_heads][d_v], widened */
    float *lse; /* [o_rows][q_heads] */
    float *a, *l;
    int32_t *e;
    attn_plan_info_t info;
} result_t;

/** Random q of the world's dtype for `queries` queries; free() it. */
void *random_q(const world_t *world, uint64_t queries, float scale);

/** Plan for `parallelism` and attend. Outputs are poisoned before. */
attn_status_t try_run(const world_t *world, const attn_problem_t *problem,
                      const attn_layer_t *layer, const void *q, uint32_t parallelism,
                      result_t *result);

/** The same; fails the test on any status but ATTN_OK. */
void run(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
         const void *q, uint32_t parallelism, result_t *result);
void result_free(result_t *result);

/** Run with random q and hold O and LSE against the oracle. No entry may have nodes. */
void check(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer);

/** Hold a result for this q against the oracle. */
void check_result(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
                  const void *q, const result_t *result);

#endif
