/* truth.c: attention by its definition, in float64, and the tolerance that answers are held to:
 * O within (t + 2^-20 kappa) max|v|, t = 1e-5 (f32), 1e-3 (f16), 1e-2 (bf16); LSE within
 * 1e-5 max(1, |LSE|) + 2^-20 kappa; kappa is the largest scale * sum |q_i k_i| of the row. */
#include "tests/stress/truth.h"

#include <math.h>
#include <string.h>

/* The KV that an entry of one layer sees, as pointers to rows. */
typedef struct view {
    uint64_t n;
    const float *k[TRUTH_TOKENS_MAX], *v[TRUTH_TOKENS_MAX];
} view_t;

typedef struct row_truth {
    double o[TRUTH_ROW_MAX];
    double lse, kappa, v_max;
} row_truth_t;

static void
view_make(const question_t *qu, view_t *view)
{
    segment_t now = {0};

    view->n = qu->base + qu->n_new;
    for (uint64_t j = 0, next = 0, s = 0; j < view->n; j++) {
        if (j < qu->base && j == next) {
            now  = qu->seq->segments[s++];
            next = s < qu->seq->n ? qu->seq->segments[s].first : UINT64_MAX;
        } else if (j == qu->base) {
            now = (segment_t){.content = qu->content};
        }
        view->k[j] = truth_row(ROW_K, now.content, j + now.shift, qu->layer);
        view->v[j] = truth_row(ROW_V, now.content, j + now.shift, qu->layer);
    }
}

/* Does this query see the new token? */
static bool
is_named(const question_t *qu, uint32_t row, uint64_t token)
{
    return qu->mask[row * ((qu->n_new + 7) / 8) + token / 8] >> (token % 8) & 1;
}

/* Where the query stands: with a mask, at the last of the tokens that it names. */
static uint64_t
position_of(const question_t *qu, uint32_t row)
{
    uint64_t named = 0;

    if (qu->mask == NULL) {
        return qu->base + qu->n_new - qu->n_q + row;
    }
    for (uint32_t token = 0; token < qu->n_new; token++) {
        named += is_named(qu, row, token);
    }
    return qu->base + named - 1;
}

static bool
is_listed(const question_t *qu, uint32_t kv_head, uint64_t j)
{
    const attn_geometry_t *g = qu->geometry;
    uint64_t per_chunk       = (g->chunk_size + g->page_size - 1) / g->page_size;
    uint64_t page            = j / g->chunk_size * per_chunk + j % g->chunk_size / g->page_size;
    uint32_t list            = qu->n_lists == 1 ? 0 : kv_head;

    if (qu->n_lists == 0 || j >= qu->base) {
        return true;
    }
    for (uint32_t i = qu->indptr[list]; i < qu->indptr[list + 1]; i++) {
        if (qu->pages[i] == page) {
            return true;
        }
    }
    return false;
}

/* Logits of one query and head. */
static uint64_t
logits(const question_t *qu, const view_t *view, const float *q, uint32_t h, uint32_t row,
       double *x, uint32_t *at, double *kappa)
{
    uint64_t position         = position_of(qu, row);
    const attn_geometry_t *g  = qu->geometry;
    const attn_layer_t *layer = &g->layer_table[qu->layer];
    uint32_t kv_head          = h / (g->q_heads / g->kv_heads);
    double scale              = layer->scale > 0 ? layer->scale : 1 / sqrt(g->head_dim_k);
    uint64_t first =
        layer->window > 0 && position + 1 > layer->window ? position + 1 - layer->window : 0;
    uint64_t n = 0, where = 0;

    for (uint64_t j = 0; j < view->n; j++, where++) {
        const float *k = view->k[j] + kv_head * g->head_dim_k;
        double dot = 0, size = 0;
        if (qu->mask != NULL && j >= qu->base && !is_named(qu, row, j - qu->base)) {
            where--; /* the next that is named counts as standing here */
            continue;
        }
        if (where < first || (layer->causal && where > position) ||
            (qu->n_lists > 0 && !is_listed(qu, kv_head, j))) {
            continue;
        }
        for (uint32_t d = 0; d < g->head_dim_k; d++) {
            double product = (double)q[d] * k[d];
            dot += product;
            size += fabs(product);
        }
        double y = scale * dot;
        y        = layer->softcap > 0 ? layer->softcap * tanh(y / layer->softcap) : y;
        y += layer->slopes != NULL ? layer->slopes[h] * ((double)where - (double)position) : 0;
        *kappa = fmax(*kappa, scale * size);
        at[n]  = (uint32_t)j;
        x[n++] = y;
    }
    return n;
}

static void
row_compute(const question_t *qu, const view_t *view, const float *q, uint32_t h, uint32_t row,
            row_truth_t *out)
{
    const attn_geometry_t *g = qu->geometry;
    const float *sinks       = g->layer_table[qu->layer].sinks;
    uint32_t kv_head = h / (g->q_heads / g->kv_heads), dim = g->head_dim_v;
    double x[TRUTH_TOKENS_MAX], top = -INFINITY, sum = 0;
    uint32_t at[TRUTH_TOKENS_MAX];

    out->kappa = out->v_max = 0;
    uint64_t n              = logits(qu, view, q, h, row, x, at, &out->kappa);
    for (uint64_t i = 0; i < n; i++) {
        top = fmax(top, x[i]);
    }
    memset(out->o, 0, dim * sizeof(*out->o));
    for (uint64_t i = 0; i < n; i++) {
        const float *v = view->v[at[i]] + kv_head * dim;
        double p       = exp(x[i] - top);
        sum += p;
        for (uint32_t d = 0; d < dim; d++) {
            out->o[d] += p * v[d];
            out->v_max = fmax(out->v_max, fabs((double)v[d]));
        }
    }
    out->lse = n > 0 ? top + log(sum) : -INFINITY;
    sum += sinks != NULL && n > 0 ? exp(sinks[h] - top) : 0;
    for (uint32_t d = 0; d < dim && n > 0; d++) {
        out->o[d] /= sum;
    }
}

static double
element(const void *data, attn_dtype_t dtype, uint64_t i)
{
    uint32_t wide;
    float x;

    if (dtype == ATTN_F32) {
        return ((const float *)data)[i];
    }
    uint16_t half = ((const uint16_t *)data)[i];
    if (dtype == ATTN_F16) {
        int exponent = half >> 10 & 31, fraction = half & 1023;
        double size = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                      : exponent > 0 ? ldexp(1024 + fraction, exponent - 25)
                                     : ldexp(fraction, -24);
        return half & 0x8000 ? -size : size;
    }
    wide = (uint32_t)half << 16;
    memcpy(&x, &wide, sizeof(x));
    return x;
}

static double
tolerance(attn_dtype_t a, attn_dtype_t b)
{
    return a == ATTN_BF16 || b == ATTN_BF16 ? 1e-2 : a == ATTN_F16 || b == ATTN_F16 ? 1e-3 : 1e-5;
}

static bool
row_check(const question_t *qu, const row_truth_t *truth, uint32_t row, uint32_t h, const void *o,
          const float *lse, verdict_t *wrong)
{
    const attn_geometry_t *g = qu->geometry;
    double slack             = truth->kappa / (1 << 20);
    double allowed           = (tolerance(g->kv_dtype, qu->o_dtype) + slack) * truth->v_max;
    uint64_t at              = ((uint64_t)row * g->q_heads + h) * g->head_dim_v;

    *wrong = (verdict_t){.row = row, .head = h};
    for (uint32_t d = 0; d < g->head_dim_v; d++) {
        double got = element(o, qu->o_dtype, at + d);
        if (!(fabs(got - truth->o[d]) <= allowed)) {
            wrong->element  = (int32_t)d;
            wrong->got      = got;
            wrong->expected = truth->o[d];
            wrong->allowed  = allowed;
            return false;
        }
    }
    if (lse != NULL) {
        double got = lse[(uint64_t)row * g->q_heads + h];
        allowed    = 1e-5 * fmax(1, fabs(truth->lse)) + slack;
        if (!(got == truth->lse || fabs(got - truth->lse) <= allowed)) {
            wrong->element  = -1;
            wrong->got      = got;
            wrong->expected = truth->lse;
            wrong->allowed  = allowed;
            return false;
        }
    }
    return true;
}

int
truth_judge(const question_t *qu, const void *o, const float *lse, uint32_t rows, chance_t *c,
            verdict_t *wrong)
{
    const attn_geometry_t *g = qu->geometry;
    uint32_t n               = qu->n_q < rows ? qu->n_q : rows;
    view_t view;
    row_truth_t truth;

    if (n == 0) {
        return 0;
    }
    view_make(qu, &view);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t row   = qu->n_q <= rows ? i : (uint32_t)chance_below(c, qu->n_q);
        const float *q = truth_row(ROW_Q, qu->q_content, row, qu->layer);
        for (uint32_t h = 0; h < g->q_heads; h++) {
            row_compute(qu, &view, q + h * g->head_dim_k, h, row, &truth);
            if (!row_check(qu, &truth, row, h, o, lse, wrong)) {
                return -1;
            }
        }
    }
    return (int)n;
}
