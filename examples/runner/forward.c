/*
 * One layer, for n tokens at once:
 *
 *   h = norm(x)              every token by itself, here
 *   q, k, v = W h, rotated   here
 *   o = attention(q, k, v)   over all tokens so far: where the KV lives
 *   x = x + W o              here
 *   x = x + ffn(norm(x))     here
 *
 * Attention is the only line that needs other tokens, so it is the only one
 * that leaves this process, and no KV is kept here.
 */
#include "forward.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "half.h"
#include "multiply.h"

volatile sig_atomic_t forward_stop;

/* ---- buffers ---- */

static void *
allocate(uint64_t rows, uint64_t columns)
{
    return aligned_alloc(64, (rows * columns * sizeof(float) + 63) / 64 * 64);
}

bool
forward_create(forward_t *f, const llama_t *model, uint32_t batch, attn_dtype_t kv_dtype)
{
    const llama_config_t *c = &model->config;

    *f = (forward_t){.model = model, .batch = batch, .kv_dtype = kv_dtype, .digest = DIGEST_START};
    f->pool    = pool_create(0);
    f->x       = allocate(batch, c->width);
    f->h       = allocate(batch, c->width);
    f->qkv     = allocate(batch, llama_qkv_width(c));
    f->k       = allocate(batch, (uint64_t)c->kv_heads * c->head_dim);
    f->v       = allocate(batch, (uint64_t)c->kv_heads * c->head_dim);
    f->o       = allocate(batch, (uint64_t)c->heads * c->head_dim);
    f->gate_up = allocate(batch, 2 * (uint64_t)c->ffn);
    f->rope    = allocate(batch, c->head_dim);
    if (f->pool && f->x && f->h && f->qkv && f->k && f->v && f->o && f->gate_up && f->rope) {
        return true;
    }
    forward_destroy(f);
    return failure("no memory for pieces of %" PRIu32 " tokens", batch);
}

void
forward_destroy(forward_t *f)
{
    pool_destroy(f->pool);
    free(f->x);
    free(f->h);
    free(f->qkv);
    free(f->k);
    free(f->v);
    free(f->o);
    free(f->gate_up);
    free(f->rope);
    memset(f, 0, sizeof(*f));
}

/* ---- arithmetic ---- */

static void
rms_norm(const float *x, const float *weight, uint32_t n, uint32_t width, float epsilon, float *to)
{
    for (uint32_t t = 0; t < n; t++, x += width, to += width) {
        double sum = 0;
        for (uint32_t i = 0; i < width; i++) {
            sum += (double)x[i] * (double)x[i];
        }
        float scale = (float)(1 / sqrt(sum / width + (double)epsilon));
        for (uint32_t i = 0; i < width; i++) {
            to[i] = x[i] * scale * weight[i];
        }
    }
}

/** Angle of pair i at position p: p / base^(2i / head_dim). */
static void
fill_rope(const llama_config_t *c, uint64_t first, uint32_t n, float *rope)
{
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        double frequency = pow((double)c->rope_base, -2.0 * i / c->head_dim);
        for (uint32_t t = 0; t < n; t++) {
            double angle = (double)(first + t) * frequency;
            float *pair  = &rope[(uint64_t)t * c->head_dim + 2 * i];
            pair[0]      = (float)cos(angle);
            pair[1]      = (float)sin(angle);
        }
    }
}

/** Turn each pair of neighbours: GGUF orders the rows of q and k so that they are the pairs. */
static void
rotate(float *x, uint32_t heads, uint32_t head_dim, const float *rope)
{
    for (uint32_t h = 0; h < heads; h++, x += head_dim) {
        for (uint32_t i = 0; i < head_dim; i += 2) {
            float a = x[i], b = x[i + 1];
            x[i]     = a * rope[i] - b * rope[i + 1];
            x[i + 1] = a * rope[i + 1] + b * rope[i];
        }
    }
}

/** From [n][2 * ffn], gate and up, to [n][ffn], silu(gate) * up, in place: a row that is written
 * lies before all that are yet to be read. */
static void
swiglu(float *gate_up, uint32_t n, uint32_t ffn)
{
    float *to = gate_up;

    for (uint32_t t = 0; t < n; t++, gate_up += 2 * (uint64_t)ffn, to += ffn) {
        for (uint32_t i = 0; i < ffn; i++) {
            float gate = gate_up[i];
            to[i]      = gate / (1 + expf(-gate)) * gate_up[ffn + i];
        }
    }
}

/* ---- attention ---- */

static void
convert(const float *from, uint32_t n, attn_dtype_t dtype, void *to)
{
    for (uint32_t i = 0; i < n; i++) {
        if (dtype == ATTN_F32) {
            ((float *)to)[i] = from[i];
        } else {
            ((uint16_t *)to)[i] =
                dtype == ATTN_F16 ? f16_from_float(from[i]) : bf16_from_float(from[i]);
        }
    }
}

/** Rotate q and k where they are, and copy k and v as the cache wants them. */
static void
prepare_qkv(forward_t *f, uint32_t n)
{
    const llama_config_t *c = &f->model->config;
    uint32_t kv             = c->kv_heads * c->head_dim;
    size_t size             = kv * attn_dtype_size(f->kv_dtype);

    for (uint32_t t = 0; t < n; t++) {
        float *q = f->qkv + (uint64_t)t * llama_qkv_width(c), *k = q + c->heads * c->head_dim;
        rotate(q, c->heads + c->kv_heads, c->head_dim, f->rope + (uint64_t)t * c->head_dim);
        convert(k, kv, f->kv_dtype, (char *)f->k + t * size);
        convert(k + kv, kv, f->kv_dtype, (char *)f->v + t * size);
    }
}

/** The one call that a runner adds: hand over q, k and v of the new tokens, get o. */
static bool
attend(forward_t *f, attn_step_t *step, uint32_t layer, uint32_t n, meter_t *meter)
{
    const llama_config_t *c = &f->model->config;
    attn_tensor_t q = {.data = f->qkv, .dtype = ATTN_F32, .token_stride = llama_qkv_width(c)};
    attn_tensor_t k = {.data = f->k, .dtype = f->kv_dtype};
    attn_tensor_t v = {.data = f->v, .dtype = f->kv_dtype};
    attn_tensor_t o = {.data = f->o, .dtype = ATTN_F32};

    uint64_t start = now_ns();
    if (attn_step_run(step, layer, &q, &k, &v, &o, NULL) != ATTN_OK) {
        return failure("layer %" PRIu32 ": %s", layer, attn_last_error());
    }
    if (!meter_add(meter, now_ns() - start)) {
        return false;
    }
    meter->computed_ns += attn_step_compute_ns(step);
    if (f->digesting) {
        f->digest = digest_add(f->digest, f->o, (size_t)n * c->heads * c->head_dim);
    }
    return true;
}

/* ---- the pass ---- */

static bool
run_layer(forward_t *f, attn_step_t *step, uint32_t l, uint32_t n, meter_t *meter)
{
    const llama_config_t *c    = &f->model->config;
    const llama_layer_t *layer = &f->model->layers[l];
    uint32_t width = c->width, q = c->heads * c->head_dim, qkv = llama_qkv_width(c);

    rms_norm(f->x, layer->attn_norm, n, width, c->norm_epsilon, f->h);
    multiply(f->pool, layer->qkv, qkv, width, f->h, n, false, f->qkv);
    prepare_qkv(f, n);
    if (!attend(f, step, l, n, meter)) {
        return false;
    }
    multiply(f->pool, layer->attn_out, width, q, f->o, n, true, f->x);

    rms_norm(f->x, layer->ffn_norm, n, width, c->norm_epsilon, f->h);
    multiply(f->pool, layer->gate_up, 2 * c->ffn, width, f->h, n, false, f->gate_up);
    swiglu(f->gate_up, n, c->ffn);
    multiply(f->pool, layer->down, width, c->ffn, f->gate_up, n, true, f->x);
    return true;
}

bool
forward_tokens(forward_t *f, attn_step_t *step, const uint32_t *ids, uint32_t n, uint64_t first,
               meter_t *meter)
{
    const llama_config_t *c = &f->model->config;

    assert(n >= 1 && n <= f->batch);
    for (uint32_t t = 0; t < n; t++) {
        assert(ids[t] < c->vocab);
        memcpy(f->x + (uint64_t)t * c->width, f->model->embedding + (uint64_t)ids[t] * c->width,
               c->width * sizeof(float));
    }
    fill_rope(c, first, n, f->rope);
    for (uint32_t l = 0; l < c->layers; l++) {
        if (forward_stop) {
            return failure("interrupted");
        }
        if (!run_layer(f, step, l, n, meter)) {
            return false;
        }
    }
    return true;
}

void
forward_logits(const forward_t *f, uint32_t row, float *logits)
{
    const llama_t *m        = f->model;
    const llama_config_t *c = &m->config;
    const float *x          = f->x + (uint64_t)row * c->width;

    assert(row < f->batch);
    rms_norm(x, m->output_norm, 1, c->width, c->norm_epsilon, f->h);
    multiply(f->pool, m->output, c->vocab, c->width, f->h, 1, false, logits);
}

uint32_t
greedy(const float *logits, uint32_t vocab)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < vocab; i++) {
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    return best;
}
