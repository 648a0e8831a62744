/* attnctl_bench_data.c: what is stored and asked, and what must come back. Rows are slices of a
 * table of random values, multiples of 1/128 (of 1/32 for q), which are the same in all dtypes. */
#include "client/attnctl_bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TABLE (1u << 18)
#define ROW_MAX (1u << 15)

static float table[TABLE + ROW_MAX];

static uint64_t
mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

void
bench_data_init(void)
{
    for (uint32_t i = 0; i < TABLE + ROW_MAX; i++) {
        table[i] = ((float)(mix(i + 1) % 256) - 128) / 128;
    }
}

static const float *
row_at(char kind, uint64_t sequence, uint64_t position, uint32_t layer)
{
    uint64_t key =
        mix(sequence * 3 + (uint64_t)kind) ^ mix((position * 1024 + layer) ^ UINT64_C(1) << 40);

    return table + mix(key) % TABLE;
}

/* Exact: at most 8 significant bits, and normal or 0. */
static uint16_t
narrow(float x, attn_dtype_t dtype)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    if (dtype == ATTN_BF16) {
        return (uint16_t)(bits >> 16);
    }
    return x == 0 ? 0
                  : (uint16_t)((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 |
                               (bits >> 13 & 1023));
}

void
bench_row(char kind, uint64_t sequence, uint64_t position, uint32_t layer, uint32_t n,
          attn_dtype_t dtype, void *to)
{
    const float *from = row_at(kind, sequence, position, layer);
    float scale       = kind == 'q' ? 4 : 1;

    for (uint32_t i = 0; i < n; i++) {
        if (dtype == ATTN_F32) {
            ((float *)to)[i] = scale * from[i];
        } else {
            ((uint16_t *)to)[i] = narrow(scale * from[i], dtype);
        }
    }
}

bool
bench_check(const bench_options_t *b, uint64_t sequence, uint64_t length, uint32_t layer,
            uint32_t head, const float *o)
{
    uint32_t dim = b->head_dim, group = head / (b->heads / b->kv_heads);
    const float *q = row_at('q', sequence, length - 1, layer) + head * dim;
    double *x = malloc(length * sizeof(*x)), *sums = calloc(dim, sizeof(*sums));
    double top = -INFINITY, sum = 0, kappa = 0, v_max = 0, scale = 4 / sqrt(dim);
    double t = b->dtype == ATTN_F32 ? 1e-5 : b->dtype == ATTN_F16 ? 1e-3 : 1e-2;

    if (x == NULL || sums == NULL) {
        free(x);
        free(sums);
        return false;
    }
    for (uint64_t j = 0; j < length; j++) {
        const float *k = row_at('k', sequence, j, layer) + group * dim;
        double dot = 0, size = 0;
        for (uint32_t d = 0; d < dim; d++) {
            dot += (double)q[d] * k[d];
            size += fabs((double)q[d] * k[d]);
        }
        x[j]  = scale * dot;
        top   = fmax(top, x[j]);
        kappa = fmax(kappa, scale * size);
    }
    for (uint64_t j = 0; j < length; j++) {
        const float *v = row_at('v', sequence, j, layer) + group * dim;
        double p       = exp(x[j] - top);
        sum += p;
        for (uint32_t d = 0; d < dim; d++) {
            sums[d] += p * v[d];
            v_max = fmax(v_max, fabs((double)v[d]));
        }
    }
    bool right = true;
    for (uint32_t d = 0; d < dim; d++) {
        right = right && fabs(o[d] - sums[d] / sum) <= (t + kappa / (1 << 20)) * v_max;
    }
    free(x);
    free(sums);
    return right;
}
