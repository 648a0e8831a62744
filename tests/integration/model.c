#include "tests/integration/model.h"

#include "tests/integration/cluster.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define K_ROW (MODEL_KV_HEADS * MODEL_D_K)
#define V_ROW (MODEL_KV_HEADS * MODEL_D_V)
#define Q_ROW (MODEL_Q_HEADS * MODEL_D_K)
#define O_ROW (MODEL_Q_HEADS * MODEL_D_V)

static const attn_layer_t layers[MODEL_LAYERS] = {
    {.causal = true},
    {.causal = true, .window = 300, .softcap = 6, .scale = 0.25f},
};

void
model_geometry(attn_geometry_t *geometry)
{
    attn_geometry_init(geometry);
    geometry->layers       = MODEL_LAYERS;
    geometry->q_heads      = MODEL_Q_HEADS;
    geometry->kv_heads     = MODEL_KV_HEADS;
    geometry->head_dim_k   = MODEL_D_K;
    geometry->head_dim_v   = MODEL_D_V;
    geometry->kv_dtype     = ATTN_F32;
    geometry->page_size    = MODEL_PAGE;
    geometry->chunk_size   = MODEL_CHUNK;
    geometry->placement    = ATTN_PLACE_SPREAD;
    geometry->layer_table  = layers;
    geometry->region_bytes = 12 << 20;
}

/* ---- life ---- */

void
model_init(model_t *model, attn_cache_t *cache, uint64_t seed)
{
    memset(model, 0, sizeof(*model));
    model->cache  = cache;
    model->random = seed * 2654435761u + 1;
    model->check  = true;
}

static void
seq_clear(model_seq_t *seq)
{
    for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
        free(seq->k[l]);
        free(seq->v[l]);
    }
    memset(seq, 0, sizeof(*seq));
}

void
model_free(model_t *model)
{
    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        seq_clear(&model->seqs[s]);
    }
}

/* splitmix64 */
uint64_t
model_random(model_t *model, uint64_t below)
{
    uint64_t x = model->random += UINT64_C(0x9e3779b97f4a7c15);

    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (x ^ (x >> 31)) % below;
}

static float *
draw(model_t *model, uint64_t n)
{
    float *x = malloc((n + 1) * sizeof(*x));

    assert_non_null(x);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = (float)model_random(model, 1u << 20) / (1u << 19) - 1.0f;
    }
    return x;
}

static void
digest(model_t *model, const void *data, size_t size)
{
    const uint8_t *p = data;

    for (size_t i = 0; i < size; i++) { /* FNV-1a */
        model->digest = (model->digest ^ p[i]) * UINT64_C(1099511628211);
    }
}

/* ---- sequences ---- */

static void
seq_fill(model_seq_t *seq)
{
    seq->used = true;
    for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
        seq->k[l] = malloc(MODEL_TOKENS * K_ROW * sizeof(float));
        seq->v[l] = malloc(MODEL_TOKENS * V_ROW * sizeof(float));
        assert_true(seq->k[l] != NULL && seq->v[l] != NULL);
    }
}

void
model_create(model_t *model, uint32_t s)
{
    assert_false(model->seqs[s].used);
    seq_fill(&model->seqs[s]);
    OK(attn_seq_create(model->cache, NULL, &model->seqs[s].seq));
}

attn_status_t
model_fork(model_t *model, uint32_t s, uint64_t length, uint32_t to)
{
    attn_seq_t fork;
    attn_status_t status = attn_seq_fork(model->cache, model->seqs[s].seq, length, &fork);

    if (status != ATTN_OK) {
        return status;
    }
    assert_false(model->seqs[to].used);
    seq_fill(&model->seqs[to]);
    model->seqs[to].seq    = fork;
    model->seqs[to].length = length;
    for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
        memcpy(model->seqs[to].k[l], model->seqs[s].k[l], length * K_ROW * sizeof(float));
        memcpy(model->seqs[to].v[l], model->seqs[s].v[l], length * V_ROW * sizeof(float));
    }
    return ATTN_OK;
}

attn_status_t
model_truncate(model_t *model, uint32_t s, uint64_t length)
{
    attn_status_t status = attn_seq_truncate(model->cache, model->seqs[s].seq, length);

    if (status == ATTN_OK) {
        model->seqs[s].length = length;
    }
    return status;
}

attn_status_t
model_drop(model_t *model, uint32_t s)
{
    attn_status_t status = attn_seq_free(model->cache, model->seqs[s].seq);

    if (status == ATTN_OK) {
        seq_clear(&model->seqs[s]);
    }
    return status;
}

/* ---- the reference ---- */

/* One query of one head over n keys; rows are kv heads apart. */
static void
attend(const attn_layer_t *layer, const float *q, const float *k, const float *v, uint64_t n,
       uint64_t position, double o[MODEL_D_V], double *lse, double *kappa, double *v_max)
{
    double scale = layer->scale > 0 ? layer->scale : 1 / sqrt(MODEL_D_K);
    double x[MODEL_TOKENS], top = -INFINITY, sum = 0;
    uint64_t first =
        layer->window > 0 && position + 1 > layer->window ? position + 1 - layer->window : 0;

    for (uint64_t j = first; j < n; j++) {
        double dot = 0, size = 0;
        for (uint32_t d = 0; d < MODEL_D_K; d++) {
            dot += (double)q[d] * k[j * K_ROW + d];
            size += fabs((double)q[d] * k[j * K_ROW + d]);
        }
        x[j] =
            layer->softcap > 0 ? layer->softcap * tanh(scale * dot / layer->softcap) : scale * dot;
        top    = fmax(top, x[j]);
        *kappa = fmax(*kappa, scale * size);
    }
    memset(o, 0, MODEL_D_V * sizeof(*o));
    for (uint64_t j = first; j < n; j++) {
        double p = exp(x[j] - top);
        sum += p;
        for (uint32_t d = 0; d < MODEL_D_V; d++) {
            o[d] += p * v[j * V_ROW + d];
            *v_max = fmax(*v_max, fabs(v[j * V_ROW + d]));
        }
    }
    for (uint32_t d = 0; d < MODEL_D_V; d++) {
        o[d] /= sum;
    }
    *lse = top + log(sum);
}

/* Check the rows of one entry. keys, values: of the sequence, the step's own tokens included. */
static void
check_rows(uint32_t l, const float *q, const float *keys, const float *values, uint64_t end,
           uint32_t n_q, const float *o, const float *lse)
{
    for (uint32_t i = 0; i < n_q; i++) {
        uint64_t position = end - n_q + i;
        for (uint32_t h = 0; h < MODEL_Q_HEADS; h++) {
            uint32_t g = h / (MODEL_Q_HEADS / MODEL_KV_HEADS);
            double want[MODEL_D_V], want_lse, kappa = 0, v_max = 0;
            attend(&layers[l], q + i * Q_ROW + h * MODEL_D_K, keys + g * MODEL_D_K,
                   values + g * MODEL_D_V, position + 1, position, want, &want_lse, &kappa, &v_max);
            double allowed = (1e-5 + kappa / (1 << 20)) * v_max;
            for (uint32_t d = 0; d < MODEL_D_V; d++) {
                double got = o[i * O_ROW + h * MODEL_D_V + d];
                if (!(fabs(got - want[d]) <= allowed)) {
                    fail_msg("layer %u, position %llu, head %u: o[%u] is %.9g, not %.9g", l,
                             (unsigned long long)position, h, d, got, want[d]);
                }
            }
            double got = lse[i * MODEL_Q_HEADS + h];
            if (!(fabs(got - want_lse) <= 1e-5 * fmax(1, fabs(want_lse)) + kappa / (1 << 20))) {
                fail_msg("layer %u, position %llu, head %u: lse is %.9g, not %.9g", l,
                         (unsigned long long)position, h, got, want_lse);
            }
        }
    }
}

/* ---- steps ---- */

/* The tensors of one layer of a step, packed over its entries. */
typedef struct tensors {
    float *q, *k, *v, *o, *lse;
} tensors_t;

static void
tensors_free(tensors_t *t)
{
    free(t->q);
    free(t->k);
    free(t->v);
    free(t->o);
    free(t->lse);
}

/* Put the step's rows of layer l behind what the sequences have, where check and commit want them.
 */
static void
store(model_t *model, uint32_t l, const model_entry_t *entries, uint32_t n, const tensors_t *t)
{
    uint64_t at = 0;

    for (uint32_t i = 0; i < n; i++) {
        model_seq_t *seq = &model->seqs[entries[i].s];
        assert_true(seq->length + entries[i].n_new <= MODEL_TOKENS);
        memcpy(seq->k[l] + seq->length * K_ROW, t->k + at * K_ROW,
               entries[i].n_new * K_ROW * sizeof(float));
        memcpy(seq->v[l] + seq->length * V_ROW, t->v + at * V_ROW,
               entries[i].n_new * V_ROW * sizeof(float));
        at += entries[i].n_new;
    }
}

static void
check(const model_t *model, uint32_t l, const model_entry_t *entries, uint32_t n,
      const tensors_t *t)
{
    uint64_t row = 0;

    for (uint32_t i = 0; i < n; i++) {
        const model_seq_t *seq = &model->seqs[entries[i].s];
        check_rows(l, t->q + row * Q_ROW, seq->k[l], seq->v[l], seq->length + entries[i].n_new,
                   entries[i].n_q, t->o + row * O_ROW, t->lse + row * MODEL_Q_HEADS);
        row += entries[i].n_q;
    }
}

static attn_status_t
run_layer(model_t *model, attn_step_t *step, uint32_t l, const model_entry_t *entries, uint32_t n,
          uint64_t rows, uint64_t new_rows)
{
    tensors_t t     = {.q   = draw(model, rows * Q_ROW),
                       .k   = draw(model, new_rows * K_ROW),
                       .v   = draw(model, new_rows * V_ROW),
                       .o   = draw(model, rows * O_ROW),
                       .lse = draw(model, rows * MODEL_Q_HEADS)};
    attn_tensor_t q = {.data = t.q, .dtype = ATTN_F32}, k = {.data = t.k, .dtype = ATTN_F32},
                  v = {.data = t.v, .dtype = ATTN_F32}, o = {.data = t.o, .dtype = ATTN_F32};

    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    attn_status_t status =
        attn_step_run(step, l, rows > 0 ? &q : NULL, new_rows > 0 ? &k : NULL,
                      new_rows > 0 ? &v : NULL, rows > 0 ? &o : NULL, rows > 0 ? t.lse : NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (status == ATTN_OK) {
        int64_t took = (end.tv_sec - start.tv_sec) * 1000000000 + end.tv_nsec - start.tv_nsec;
        assert_in_range(attn_step_compute_ns(step), 1, took);
        store(model, l, entries, n, &t);
        digest(model, t.o, rows * O_ROW * sizeof(float));
        digest(model, t.lse, rows * MODEL_Q_HEADS * sizeof(float));
        if (model->check) {
            check(model, l, entries, n, &t);
        }
    }
    tensors_free(&t);
    return status;
}

static attn_status_t
commit(model_t *model, attn_step_t *step, const model_entry_t *entries, uint32_t n)
{
    uint32_t accepted[MODEL_SEQS];

    for (uint32_t i = 0; i < n; i++) {
        accepted[i] = entries[i].accepted;
    }
    attn_status_t status = attn_step_commit(step, accepted);
    if (status != ATTN_OK) {
        attn_step_abort(step);
        return status;
    }
    for (uint32_t i = 0; i < n; i++) {
        model->seqs[entries[i].s].length += accepted[i];
    }
    return ATTN_OK;
}

attn_status_t
model_step(model_t *model, const model_entry_t *entries, uint32_t n, uint32_t timeout_ms,
           bool abort)
{
    attn_entry_t list[MODEL_SEQS] = {0};
    attn_batch_t batch            = {.size       = sizeof(batch),
                                     .n          = n,
                                     .entries    = list,
                                     .q_dtype    = ATTN_F32,
                                     .want_lse   = true,
                                     .timeout_ms = timeout_ms};
    uint64_t rows = 0, new_rows = 0;
    attn_step_t *step;

    for (uint32_t i = 0; i < n; i++) {
        model_seq_t *seq = &model->seqs[entries[i].s];
        list[i]          = (attn_entry_t){
                     .seq = seq->seq, .base = seq->length, .n_q = entries[i].n_q, .n_new = entries[i].n_new};
        rows += entries[i].n_q;
        new_rows += entries[i].n_new;
    }
    attn_status_t status = attn_step_begin(model->cache, &batch, &step);
    if (status != ATTN_OK) {
        return status;
    }
    uint32_t first = (uint32_t)model_random(model, MODEL_LAYERS); /* layers come in any order */
    for (uint32_t i = 0; i < MODEL_LAYERS && status == ATTN_OK; i++) {
        status = run_layer(model, step, (first + i) % MODEL_LAYERS, entries, n, rows, new_rows);
    }
    if (status != ATTN_OK || abort) {
        char sentence[512];
        snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        attn_step_abort(step);
        if (status != ATTN_OK) {
            print_message("step ended with %s: %s\n", attn_strerror(status), sentence);
        }
        return status;
    }
    return commit(model, step, entries, n);
}

attn_status_t
model_append(model_t *model, uint32_t s, uint32_t n)
{
    return model_step(model, &(model_entry_t){.s = s, .n_q = n, .n_new = n, .accepted = n}, 1, 0,
                      false);
}

/* ---- holes ---- */

/* A layer of a step over tokens that the model has: its k, v if n_new > 0, and n_q queries. */
static attn_status_t
run_again(model_t *model, attn_step_t *step, uint32_t l, uint32_t s, const attn_entry_t *entry)
{
    const model_seq_t *seq = &model->seqs[s];
    uint64_t end           = entry->base + entry->n_new;
    float *q = draw(model, entry->n_q * Q_ROW), *o = draw(model, entry->n_q * O_ROW);
    float *lse       = draw(model, entry->n_q * MODEL_Q_HEADS);
    attn_tensor_t tq = {.data = q, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
    attn_tensor_t tk = {.data = seq->k[l] + entry->base * K_ROW, .dtype = ATTN_F32};
    attn_tensor_t tv = {.data = seq->v[l] + entry->base * V_ROW, .dtype = ATTN_F32};
    bool asks = entry->n_q > 0, stores = entry->n_new > 0;

    attn_status_t status = attn_step_run(step, l, asks ? &tq : NULL, stores ? &tk : NULL,
                                         stores ? &tv : NULL, asks ? &to : NULL, asks ? lse : NULL);
    if (status == ATTN_OK) {
        digest(model, o, entry->n_q * O_ROW * sizeof(float));
        digest(model, lse, entry->n_q * MODEL_Q_HEADS * sizeof(float));
        check_rows(l, q, seq->k[l], seq->v[l], end, entry->n_q, o, lse);
    }
    free(q);
    free(o);
    free(lse);
    return status;
}

static attn_status_t
step_again(model_t *model, uint32_t s, uint64_t base, uint32_t n_new, uint32_t n_q)
{
    attn_entry_t entry = {.seq = model->seqs[s].seq, .base = base, .n_q = n_q, .n_new = n_new};
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32, .want_lse = true};
    attn_step_t *step;

    attn_status_t status = attn_step_begin(model->cache, &batch, &step);
    if (status != ATTN_OK) {
        return status;
    }
    for (uint32_t l = 0; l < MODEL_LAYERS && status == ATTN_OK; l++) {
        status = run_again(model, step, l, s, &entry);
    }
    if (status == ATTN_OK) {
        status = attn_step_commit(step, NULL);
    }
    if (status != ATTN_OK) {
        attn_step_abort(step);
    }
    return status;
}

attn_status_t
model_refill(model_t *model, uint32_t s, uint64_t first, uint32_t n, uint32_t n_q)
{
    return step_again(model, s, first, n, n_q);
}

attn_status_t
model_ask(model_t *model, uint32_t s, uint64_t length, uint32_t n, uint64_t *digest_p)
{
    uint64_t random = model->random, before = model->digest;

    model->random        = 4711;
    model->digest        = 0;
    attn_status_t status = step_again(model, s, length, 0, n);
    *digest_p            = model->digest;
    model->random        = random;
    model->digest        = before;
    return status;
}

/* ---- a story ---- */

/* A random entry for a sequence: prefill, decode, append-only or query-only. */
static model_entry_t
random_entry(model_t *model, uint32_t s)
{
    model_entry_t e = {.s = s};
    uint64_t length = model->seqs[s].length;

    switch (model_random(model, 6)) {
    case 0:
        e.n_new = 1 + (uint32_t)model_random(model, 400);
        e.n_q   = e.n_new;
        break;
    case 1:
        e.n_new = 1 + (uint32_t)model_random(model, 300);
        break;
    case 2:
        e.n_q = 1 + (uint32_t)model_random(model, length < 20 ? length + 1 : 20);
        e.n_q = e.n_q > length ? (uint32_t)length : e.n_q;
        break;
    case 3:
        e.n_new = 2 + (uint32_t)model_random(model, 8);
        e.n_q   = e.n_new;
        break;
    default:
        e.n_new = 1;
        e.n_q   = 1;
    }
    if (length + e.n_new > MODEL_TOKENS) {
        e.n_new = 0;
        e.n_q   = 1;
    }
    if (e.n_new == 0 && e.n_q == 0) {
        e.n_new = 1;
    }
    e.accepted = model_random(model, 4) > 0 ? e.n_new : (uint32_t)model_random(model, e.n_new + 1);
    return e;
}

static void
random_step(model_t *model)
{
    model_entry_t entries[MODEL_SEQS];
    uint32_t n = 0;

    for (uint32_t s = 0; s < MODEL_SEQS && n < 5; s++) {
        if (model->seqs[s].used && model_random(model, 2) == 0) {
            entries[n++] = random_entry(model, s);
        }
    }
    if (n > 0) {
        OK(model_step(model, entries, n, 0, model_random(model, 8) == 0));
    }
}

static void
check_length(model_t *model, uint32_t s)
{
    attn_seq_info_t info;

    OK(attn_seq_describe(model->cache, model->seqs[s].seq, &info));
    assert_int_equal(info.length, model->seqs[s].length);
    attn_seq_info_free(&info);
}

void
model_story(model_t *model, uint32_t acts)
{
    for (uint32_t act = 0; act < acts; act++) {
        uint32_t s       = (uint32_t)model_random(model, MODEL_SEQS);
        uint32_t to      = (uint32_t)model_random(model, MODEL_SEQS);
        uint64_t kind    = model_random(model, 12);
        model_seq_t *seq = &model->seqs[s];
        if (!seq->used && kind < 6) {
            model_create(model, s);
        } else if (seq->used && kind == 0) {
            OK(model_truncate(model, s, model_random(model, seq->length + 1)));
        } else if (seq->used && kind == 1 && !model->seqs[to].used) {
            OK(model_fork(model, s, model_random(model, seq->length + 1), to));
        } else if (seq->used && kind == 2) {
            OK(model_drop(model, s));
        } else {
            random_step(model);
        }
        if (seq->used && act % 4 == 0) {
            check_length(model, s);
        }
    }
}
