/*
 * harness.h: a small world for conformance tests: pages in random order with NaN in every
 * byte that nobody wrote, sequences, forks, problems, runs of a backend, and the oracle's
 * judgement. Every test takes any backend of the table; ATTN_BACKEND_TESTS stamps them out.
 *
 * A device's slab is not the host's to read: whatever is stored in it is also stored in a mirror,
 * pages of a cpu backend with the same numbers. Oracle and tests read that. The cpu backend's own
 * slab is its mirror.
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
 * number of failures to `failed`. A backend that this machine has no device for is skipped, and
 * so are all but the one that the environment names in ATTN_BACKEND; ATTN_TEST is a pattern that
 * the names of tests must match. */
#define ATTN_BACKEND_TESTS(backend, suite, tests)                                                  \
    failed += conformance_run(#backend, suite "." #backend, tests, sizeof(tests) / sizeof(tests[0]))

int conformance_run(const char *backend, const char *name, const struct CMUnitTest *tests,
                    size_t n);

/** The exit status: of failure, of success, or 77 if no group ran. */
int conformance_end(int failed);

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

/** Is the backend under test the one of that name? */
bool conformance_on(const char *backend);

/** The nearest shape that the backend under test has: the same, for the cpu. */
shape_t conformance_fit(shape_t shape);

/** Heads, dims and types by chance, answers of f32: fitted. */
shape_t random_shape(void);

typedef struct world {
    shape_t shape; /**< fitted: may not be what world_open() was given */
    attn_backend_t *backend;
    attn_kv_t kv;
    attn_backend_t *host; /**< of the mirror: the cpu's, which may be the same as backend */
    attn_kv_t mirror;     /**< what kv holds, in memory that the host reads */
    bool shared;          /**< the backends are the group's, not the world's */
    uint64_t k_bytes, v_bytes;
    uint32_t *free_pages; /* in random order */
    uint32_t n_free;
    uint32_t few, many; /* leaf sizes of the backend */
} world_t;

/** A world with room for `tokens` tokens in whole pages, on a backend with `threads` threads. */
void world_open(world_t *world, shape_t shape, uint64_t tokens, uint32_t threads);

/** The same; pages of the backend are at least `stride` elements apart. */
void world_open_wide(world_t *world, shape_t shape, uint64_t tokens, uint32_t threads,
                     uint64_t stride);
void world_close(world_t *world);

/** Append to backend and mirror. The status is the backend's; the mirror agrees, or has nothing. */
attn_status_t world_append(world_t *world, const uint32_t *pages, const uint32_t *offsets,
                           uint64_t n, const void *k, const void *v);
attn_status_t world_copy_page(world_t *world, uint32_t from, uint32_t to, uint32_t tokens);

/** All rows of all pages, as the backend reads them: [n_pages * page_size][kv_heads][d]. */
void world_read_all(const world_t *world, uint8_t **k_p, uint8_t **v_p);

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

/** Random lists for an entry: each page is listed with probability `density` in 256. indptr has
 * room for lists + 1, pages for all pages so often. */
void draw_lists(attn_problem_entry_t *entry, const world_t *world, uint32_t lists, uint32_t density,
                uint32_t *indptr, uint32_t *pages);

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
