#include "kernels/oracle.h"

#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The KV of one sequence and KV head, as one dense matrix of doubles each. */
typedef struct dense {
    uint64_t n;         /* tokens held */
    uint64_t *position; /* [n] */
    bool *listed;       /* [n] */
    double *k, *v;      /* [n][head_dim_k], [n][head_dim_v] */
    double *x;          /* [n] logits of the row at hand */
} dense_t;

static double
half_to_double(uint16_t bits)
{
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                 : ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

static double
element(const void *data, attn_dtype_t dtype, uint64_t i)
{
    if (dtype == ATTN_F32) {
        return ((const float *)data)[i];
    }
    uint16_t half = ((const uint16_t *)data)[i];
    if (dtype == ATTN_F16) {
        return half_to_double(half);
    }
    uint32_t wide = (uint32_t)half << 16;
    float x;
    memcpy(&x, &wide, sizeof(x));
    return x;
}

static bool
is_listed(const attn_problem_t *p, const attn_problem_entry_t *entry, uint32_t kv_head,
          uint64_t position)
{
    uint64_t pages_per_chunk = (p->chunk_size + p->page_size - 1) / p->page_size;
    uint64_t page =
        position / p->chunk_size * pages_per_chunk + position % p->chunk_size / p->page_size;
    uint32_t list = entry->n_lists == 1 ? 0 : kv_head;

    if (entry->n_lists == 0 || position >= entry->dense_from) {
        return true;
    }
    for (uint32_t i = entry->sparse_indptr[list]; i < entry->sparse_indptr[list + 1]; i++) {
        if (entry->sparse_pages[i] == page) {
            return true;
        }
    }
    return false;
}

static void
dense_free(dense_t *dense)
{
    free(dense->position);
    free(dense->listed);
    free(dense->k);
    free(dense->v);
    free(dense->x);
}

static bool
dense_alloc(dense_t *dense, const attn_problem_t *p, const attn_problem_entry_t *entry)
{
    size_t n = 1;
    for (uint32_t r = 0; r < entry->n_runs; r++) {
        n += entry->runs[r].length;
    }
    *dense = (dense_t){.position = malloc(n * sizeof(*dense->position)),
                       .listed   = malloc(n * sizeof(*dense->listed)),
                       .k        = malloc(n * p->head_dim_k * sizeof(*dense->k)),
                       .v        = malloc(n * p->head_dim_v * sizeof(*dense->v)),
                       .x        = malloc(n * sizeof(*dense->x))};
    return dense->position != NULL && dense->listed != NULL && dense->k != NULL &&
           dense->v != NULL && dense->x != NULL;
}

static void
gather(dense_t *dense, const attn_problem_t *p, const attn_problem_entry_t *entry,
       const attn_kv_t *kv, uint32_t kv_head)
{
    uint64_t n = 0;

    for (uint32_t r = 0; r < entry->n_runs; r++) {
        for (uint32_t t = 0; t < entry->runs[r].length; t++, n++) {
            uint64_t page      = entry->runs[r].pages[t / p->page_size];
            uint64_t token     = (uint64_t)kv_head * p->page_size + t % p->page_size;
            dense->position[n] = (uint64_t)entry->runs[r].chunk * p->chunk_size + t;
            dense->listed[n]   = is_listed(p, entry, kv_head, dense->position[n]);
            for (uint32_t i = 0; i < p->head_dim_k; i++) {
                dense->k[n * p->head_dim_k + i] =
                    element(kv->k, kv->dtype, page * kv->k_page_stride + token * p->head_dim_k + i);
            }
            for (uint32_t i = 0; i < p->head_dim_v; i++) {
                dense->v[n * p->head_dim_v + i] =
                    element(kv->v, kv->dtype, page * kv->v_page_stride + token * p->head_dim_v + i);
            }
        }
    }
    dense->n = n;
}

/* One query, and where the tokens lie that it is asked about. */
typedef struct query {
    int64_t position;
    const uint8_t *mask; /* its row, or NULL */
    uint64_t mask_from;  /* position of the first token that the mask is about */
} query_t;

static bool
is_named(const query_t *query, uint64_t position)
{
    uint64_t j = position - query->mask_from;

    return query->mask[j / 8] >> j % 8 & 1;
}

static query_t
query_of(const attn_problem_entry_t *entry, uint32_t i)
{
    query_t query = {.position = (int64_t)entry->kv_length - entry->n_q + i};

    if (entry->mask != NULL) {
        query.mask      = entry->mask + (uint64_t)i * ((entry->mask_tokens + 7u) / 8u);
        query.mask_from = entry->kv_length - entry->mask_tokens;
        query.position  = (int64_t)query.mask_from - 1;
        for (uint64_t t = query.mask_from; t < entry->kv_length; t++) {
            query.position += is_named(&query, t);
        }
    }
    return query;
}

/* Position of a token to a query: on the path that its mask names, those named count alone. */
static int64_t
position_to(const query_t *query, uint64_t token)
{
    if (query->mask == NULL || token < query->mask_from) {
        return (int64_t)token;
    }
    int64_t position = (int64_t)query->mask_from;
    for (uint64_t t = query->mask_from; t < token; t++) {
        position += is_named(query, t);
    }
    return position;
}

static bool
sees(const attn_problem_t *p, const dense_t *dense, uint64_t t, const query_t *query)
{
    int64_t position = position_to(query, dense->position[t]);
    bool masked      = query->mask != NULL && dense->position[t] >= query->mask_from;

    if (!dense->listed[t] || (masked && !is_named(query, dense->position[t])) ||
        (!masked && p->causal && position > query->position)) {
        return false;
    }
    return p->window == 0 || position > query->position - (int64_t)p->window;
}

/* sum q k and sum |q k|; n is a multiple of 4. */
static void
dot_product(const double *q, const double *k, uint32_t n, double *dot, double *size)
{
    double d[4] = {0}, s[4] = {0};

    for (uint32_t i = 0; i < n; i += 4) {
        for (int j = 0; j < 4; j++) {
            double product = q[i + j] * k[i + j];
            d[j] += product;
            s[j] += fabs(product);
        }
    }
    *dot  = d[0] + d[1] + d[2] + d[3];
    *size = s[0] + s[1] + s[2] + s[3];
}

/* ALiBi: what a key's place adds to its logit. */
static double
bias_of(const dense_t *dense, const attn_layer_t *layer, const query_t *query, uint32_t head,
        uint64_t t)
{
    if (layer->slopes == NULL) {
        return 0;
    }
    return layer->slopes[head] * (double)(position_to(query, dense->position[t]) - query->position);
}

/* One query and head: logits, then the two sums. */
static void
attend_row(const attn_problem_t *p, const attn_layer_t *layer, const dense_t *dense,
           const double *q, const query_t *query, uint32_t head, uint64_t row,
           const attn_oracle_t *out)
{
    double scale = layer->scale != 0 ? (double)layer->scale : 1 / sqrt(p->head_dim_k);
    double top = -INFINITY, kappa = 0, v_max = 0, sum = 0, bias = 0;
    double o[256] = {0};

    for (uint64_t t = 0; t < dense->n; t++) {
        double dot, size;
        dense->x[t] = -INFINITY;
        if (!sees(p, dense, t, query)) {
            continue;
        }
        dot_product(q, dense->k + t * p->head_dim_k, p->head_dim_k, &dot, &size);
        double x = dot * scale;
        x        = layer->softcap > 0 ? layer->softcap * tanh(x / layer->softcap) : x;
        x += bias_of(dense, layer, query, head, t);
        dense->x[t] = x;
        top         = fmax(top, x);
        kappa       = fmax(kappa, fabs(scale) * size);
    }
    for (uint64_t t = 0; t < dense->n; t++) {
        if (dense->x[t] == -INFINITY) {
            continue;
        }
        double weight = exp(dense->x[t] - top);
        sum += weight;
        if (weight > 1e-12) { /* whose logit is far from 0 for its bias, and has its last place */
            bias = fmax(bias, fabs(bias_of(dense, layer, query, head, t)));
        }
        for (uint32_t i = 0; i < p->head_dim_v; i++) {
            o[i] += weight * dense->v[t * p->head_dim_v + i];
            double v = fabs(dense->v[t * p->head_dim_v + i]);
            v_max    = v > v_max ? v : v_max;
        }
    }
    double over = sum + (layer->sinks != NULL && sum > 0 ? exp(layer->sinks[head] - top) : 0);
    for (uint32_t i = 0; i < p->head_dim_v && out->o != NULL; i++) {
        out->o[row * p->head_dim_v + i] = sum > 0 ? o[i] / over : 0;
    }
    if (out->lse != NULL) {
        out->lse[row] = sum > 0 ? top + log(sum) : -INFINITY;
    }
    if (out->kappa != NULL) {
        out->kappa[row] = kappa + bias;
    }
    if (out->v_max != NULL) {
        out->v_max[row] = v_max;
    }
}

static attn_status_t
attend_entry(const attn_problem_t *p, const attn_problem_entry_t *entry, uint64_t first_query,
             const attn_kv_t *kv, const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype,
             const attn_oracle_t *out)
{
    uint32_t group = p->q_heads / p->kv_heads;
    double row_q[256];
    dense_t dense;

    if (!dense_alloc(&dense, p, entry)) {
        dense_free(&dense);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the oracle");
    }
    for (uint32_t head = 0; head < p->q_heads; head++) {
        if (head % group == 0) {
            gather(&dense, p, entry, kv, head / group);
        }
        for (uint32_t i = 0; i < entry->n_q; i++) {
            uint64_t row = (first_query + i) * p->q_heads + head;
            for (uint32_t j = 0; j < p->head_dim_k; j++) {
                row_q[j] = element(q, q_dtype, row * p->head_dim_k + j);
            }
            query_t query = query_of(entry, i);
            attend_row(p, layer, &dense, row_q, &query, head, row, out);
        }
    }
    dense_free(&dense);
    return ATTN_OK;
}

attn_status_t
attn_oracle_attend(const attn_problem_t *problem, const attn_kv_t *kv, const attn_layer_t *layer,
                   const void *q, attn_dtype_t q_dtype, const attn_oracle_t *out)
{
    uint64_t first_query = 0;

    for (uint32_t e = 0; e < problem->n; e++) {
        attn_status_t status =
            attend_entry(problem, &problem->entries[e], first_query, kv, layer, q, q_dtype, out);
        if (status != ATTN_OK) {
            return status;
        }
        first_query += problem->entries[e].n_q;
    }
    return ATTN_OK;
}
