/*
 * truth.h: what the service should answer. Every token of every sequence has a content, a random
 * number; its k and v rows are slices of one table of random values, found by hashing (content,
 * position, layer). So a sequence is a short list of segments, needs hardly any memory, and can be
 * written again anywhere; and a row that is out of place, stale or torn is another row.
 *
 * All values of the table are multiples of 1/128 below 1 (of 1/32 below 4 for q): the same in f32,
 * f16 and bf16. The judge computes attention by its definition in float64.
 */
#ifndef ATTN_TESTS_STRESS_TRUTH_H
#define ATTN_TESTS_STRESS_TRUTH_H

#include "client/attn.h"

#define TRUTH_TOKENS_MAX 4096u
#define TRUTH_ROW_MAX 1024u /* elements of a row: all heads of a token */

/* ---- chance ---- */

typedef struct chance {
    uint64_t state;
} chance_t;

uint64_t chance(chance_t *c);
uint64_t chance_below(chance_t *c, uint64_t n);               /* 0 to n - 1 */
uint64_t chance_in(chance_t *c, uint64_t low, uint64_t high); /* both included */
static inline bool
chance_one_in(chance_t *c, uint64_t n)
{
    return chance_below(c, n) == 0;
}

/* ---- rows ---- */

/** Fill the tables; once in a process, before threads. */
void truth_init(void);

typedef enum row_kind { ROW_K, ROW_V, ROW_Q } row_kind_t;

/** A row of at most TRUTH_ROW_MAX elements: where it lies, as f32. */
const float *truth_row(row_kind_t kind, uint64_t content, uint64_t position, uint32_t layer);

/** Write the row's first n elements in this dtype. */
void truth_write(row_kind_t kind, uint64_t content, uint64_t position, uint32_t layer, uint32_t n,
                 attn_dtype_t dtype, void *to);

/* ---- geometries ---- */

#define TRUTH_GEOMETRIES 3u

/** Small shapes that differ in everything: heads, dtypes, pages, chunks, placement, layers. */
const attn_geometry_t *truth_geometry(uint32_t i);

/* ---- the content of a sequence ---- */

typedef struct segment {
    uint64_t first; /* position; up to the next segment's */
    uint64_t content;
    uint64_t shift; /* the rows are those of content at position + shift: a path was committed */
} segment_t;

typedef struct shadow {
    bool used;
    attn_seq_t seq;
    uint64_t length; /* committed for sure */
    uint64_t maybe;  /* >= length: tokens up to here may be committed, for a commit failed */
    uint32_t n, room;
    segment_t *segments; /* of [0, maybe) */
} shadow_t;

void shadow_clear(shadow_t *s); /* frees; unused then */
void shadow_append(shadow_t *s, uint64_t first, uint64_t content);
void shadow_append_path(shadow_t *s, uint64_t first, uint64_t content, const uint32_t *path,
                        uint32_t n); /* token j is what was token path[j] of a step at first */
void shadow_cut(shadow_t *s, uint64_t length); /* length and maybe are that then */
void shadow_copy(shadow_t *to, const shadow_t *from, uint64_t length);
segment_t shadow_segment(const shadow_t *s, uint64_t position); /* that this position is in */

/* ---- the judge ---- */

/** One entry of a step, as the judge sees it. */
typedef struct question {
    const attn_geometry_t *geometry;
    uint32_t layer;
    const shadow_t *seq; /* tokens below base */
    uint64_t base;
    uint32_t n_q, n_new;
    uint64_t content;   /* of the new tokens */
    uint64_t q_content; /* of the queries: query i is at position i of it */
    uint32_t n_lists;
    const uint32_t *indptr, *pages;
    const uint8_t *mask; /* as attn_entry_t.mask, or NULL */
    attn_dtype_t o_dtype;
} question_t;

/** An answer that is wrong. */
typedef struct verdict {
    uint32_t row, head;
    int32_t element; /* -1: the LSE */
    double got, expected, allowed;
} verdict_t;

/**
 * Judge the answer to one entry: all heads of at most `rows` of its queries, drawn by chance if
 * there are more.
 * @param o    [n_q][q_heads][head_dim_v] of o_dtype
 * @param lse  [n_q][q_heads], or NULL
 * @return rows judged, or -1 with *wrong
 */
int truth_judge(const question_t *question, const void *o, const float *lse, uint32_t rows,
                chance_t *c, verdict_t *wrong);

#endif
