/* gpu_check.c: see gpu_check.h. */
#include "bench/gpu_check.h"

#include "base/checked.h"
#include "bench/result.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Tokens that are read at a time, and of a first request that is checked, too. */
#define BLOCK 8192u
#define SOON 65536u

/* One row of the answer on its way: a softmax that is carried from block to block. */
typedef struct row {
    uint32_t head;
    float *q;
    double top, sum, *acc;
} row_t;

typedef struct reading {
    attn_backend_t *backend;
    const attn_kv_t *kv;
    uint32_t *pages, *offsets;
    uint16_t *k, *v;
    float *wide; /* a row of K or V of one head */
} reading_t;

static void *
must_alloc(uint64_t n)
{
    void *p = calloc(1, n + 1);

    if (p == NULL) {
        fprintf(stderr, "gpu: no memory for %llu bytes\n", (unsigned long long)n);
        exit(1);
    }
    return p;
}

static bool
is_kept(const attn_problem_entry_t *entry, uint64_t token, uint32_t page_size, uint32_t *cursor)
{
    if (entry->n_lists == 0 || token >= entry->dense_from) {
        return true;
    }
    while (*cursor < entry->sparse_indptr[1] && entry->sparse_pages[*cursor] < token / page_size) {
        ++*cursor;
    }
    return *cursor < entry->sparse_indptr[1] && entry->sparse_pages[*cursor] == token / page_size;
}

static void
take_token(row_t *row, const float *k, const uint16_t *v, uint32_t d, float *wide)
{
    double logit = 0;

    for (uint32_t j = 0; j < d; j++) {
        logit += (double)row->q[j] * k[j];
    }
    logit /= sqrt(d);
    if (logit > row->top) {
        double shrink = exp(row->top - logit);
        row->sum *= shrink;
        for (uint32_t j = 0; j < d; j++) {
            row->acc[j] *= shrink;
        }
        row->top = logit;
    }
    double weight = exp(logit - row->top);
    row->sum += weight;
    attn_convert(wide, ATTN_F32, v, ATTN_BF16, d);
    for (uint32_t j = 0; j < d; j++) {
        row->acc[j] += weight * wide[j];
    }
}

/* The n tokens of the block have been read: into the sums. */
static void
take_block(const reading_t *r, const gpu_point_t *p, uint64_t n, row_t *rows, uint32_t n_rows)
{
    uint64_t stride = (uint64_t)p->kv_heads * p->d;

    for (uint32_t i = 0; i < n_rows; i++) {
        uint64_t column = (uint64_t)(rows[i].head / (p->q_heads / p->kv_heads)) * p->d;
        for (uint64_t t = 0; t < n; t++) {
            attn_convert(r->wide, ATTN_F32, r->k + t * stride + column, ATTN_BF16, p->d);
            take_token(&rows[i], r->wide, r->v + t * stride + column, p->d, r->wide + p->d);
        }
    }
}

/* All tokens that a query sees at the end of `seen` of them. */
static void
read_rows(const reading_t *r, const gpu_point_t *p, const attn_problem_entry_t *entry,
          uint64_t seen, row_t *rows, uint32_t n_rows)
{
    uint32_t chunk = r->kv->chunk_size, page = p->page, cursor = 0;
    uint64_t n = 0;

    for (uint64_t t = 0; t < seen; t++) {
        if (is_kept(entry, t, page, &cursor)) {
            r->pages[n]     = entry->runs[t / chunk].pages[t % chunk / page];
            r->offsets[n++] = (uint32_t)(t % chunk % page);
        }
        if (n > 0 && (n == BLOCK || t + 1 == seen)) {
            result_must(
                r->backend->ops->read(r->backend, r->kv, r->pages, r->offsets, n, r->k, r->v));
            take_block(r, p, n, rows, n_rows);
            n = 0;
        }
    }
}

static double
error_of(const row_t *row, const uint16_t *o, uint32_t d, float *wide)
{
    double off = 0, size = 0;

    attn_convert(wide, ATTN_F32, o, ATTN_BF16, d);
    for (uint32_t j = 0; j < d; j++) {
        double want = row->acc[j] / row->sum;
        off += (wide[j] - want) * (wide[j] - want);
        size += want * want;
    }
    double error = sqrt(off / size);
    return isnan(error) ? INFINITY : error;
}

/* Query `query` of request i in two heads; `at` is its number among all queries. */
static double
check_query(const reading_t *r, const gpu_point_t *p, const attn_problem_entry_t *entry,
            uint32_t query, uint64_t at, const uint16_t *q, const uint16_t *o)
{
    uint32_t heads[2] = {0, p->q_heads - 1}, n = p->q_heads > 1 ? 2 : 1;
    uint64_t seen = entry->kv_length - entry->n_q + query + 1;
    double worst  = 0;
    row_t rows[2];

    for (uint32_t i = 0; i < n; i++) {
        rows[i] = (row_t){.head = heads[i],
                          .q    = must_alloc(p->d * sizeof(float)),
                          .top  = -INFINITY,
                          .acc  = must_alloc(p->d * sizeof(double))};
        attn_convert(rows[i].q, ATTN_F32, q + (at * p->q_heads + heads[i]) * p->d, ATTN_BF16, p->d);
    }
    read_rows(r, p, entry, seen, rows, n);
    for (uint32_t i = 0; i < n; i++) {
        double error = error_of(&rows[i], o + (at * p->q_heads + heads[i]) * p->d, p->d, r->wide);
        worst        = error > worst ? error : worst;
        free(rows[i].q);
        free(rows[i].acc);
    }
    return worst;
}

double
gpu_check(attn_backend_t *backend, const gpu_point_t *p, const attn_problem_t *problem,
          const attn_kv_t *kv, const uint16_t *q, const uint16_t *o)
{
    const attn_problem_entry_t *last = &problem->entries[p->n - 1];
    uint64_t row = (uint64_t)p->kv_heads * p->d * sizeof(uint16_t), queries = 0;
    reading_t r = {.backend = backend,
                   .kv      = kv,
                   .pages   = must_alloc(BLOCK * sizeof(uint32_t)),
                   .offsets = must_alloc(BLOCK * sizeof(uint32_t)),
                   .k       = must_alloc(BLOCK * row),
                   .v       = must_alloc(BLOCK * row),
                   .wide    = must_alloc(2 * p->d * sizeof(float))};

    for (uint32_t i = 0; i < p->n; i++) {
        queries += p->queries[i];
    }
    double worst = check_query(&r, p, last, last->n_q - 1, queries - 1, q, o);
    if (problem->entries[0].kv_length <= SOON) {
        double first = check_query(&r, p, &problem->entries[0], 0, 0, q, o);
        worst        = first > worst ? first : worst;
    }
    free(r.pages);
    free(r.offsets);
    free(r.k);
    free(r.v);
    free(r.wide);
    return worst;
}
