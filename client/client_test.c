/*
 * client_test.c: libattn over engines inside the process: steps, layouts, forks and errors. The
 * judge is a float64 attention of its own over plain arrays. Bits are compared between cuts.
 */
#include "base/clock.h"
#include "client/attn.h"
#include "client/client_int.h"
#include "kernels/kernels.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS 2
#define Q_HEADS 6
#define KV_HEADS 2
#define DIM 64
#define CHUNK 256
#define TOKENS_MAX 4096

/* A sequence as the test knows it: k, v of every token and layer. */
typedef struct model {
    float *k[LAYERS], *v[LAYERS];
    uint64_t length;
} model_t;

static uint64_t seed = 1;

static float
uniform(void)
{
    seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (float)((double)(seed >> 33) / (double)(1u << 30) - 1.0);
}

static void
model_init(model_t *model)
{
    for (int l = 0; l < LAYERS; l++) {
        model->k[l] = calloc((size_t)TOKENS_MAX * KV_HEADS * DIM, sizeof(float));
        model->v[l] = calloc((size_t)TOKENS_MAX * KV_HEADS * DIM, sizeof(float));
    }
    model->length = 0;
}

static void
model_free(model_t *model)
{
    for (int l = 0; l < LAYERS; l++) {
        free(model->k[l]);
        free(model->v[l]);
    }
}

static void
model_copy(model_t *to, const model_t *from, uint64_t length)
{
    for (int l = 0; l < LAYERS; l++) {
        memcpy(to->k[l], from->k[l], length * KV_HEADS * DIM * sizeof(float));
        memcpy(to->v[l], from->v[l], length * KV_HEADS * DIM * sizeof(float));
    }
    to->length = length;
}

/* Causal attention of one query row at position pos, in float64. */
static void
reference(const model_t *model, int layer, const float *q, int head, uint64_t pos, double *o,
          double *lse)
{
    int kv_head = head / (Q_HEADS / KV_HEADS);
    double best = -INFINITY, sum = 0, *x = malloc((pos + 1) * sizeof(*x));

    for (uint64_t t = 0; t <= pos; t++) {
        const float *k = model->k[layer] + (t * KV_HEADS + (uint64_t)kv_head) * DIM;
        x[t]           = 0;
        for (int d = 0; d < DIM; d++) {
            x[t] += (double)q[d] * (double)k[d];
        }
        x[t] /= sqrt(DIM);
        best = fmax(best, x[t]);
    }
    for (int d = 0; d < DIM; d++) {
        o[d] = 0;
    }
    for (uint64_t t = 0; t <= pos; t++) {
        const float *v = model->v[layer] + (t * KV_HEADS + (uint64_t)kv_head) * DIM;
        double p       = exp(x[t] - best);
        sum += p;
        for (int d = 0; d < DIM; d++) {
            o[d] += p * (double)v[d];
        }
    }
    for (int d = 0; d < DIM; d++) {
        o[d] /= sum;
    }
    *lse = best + log(sum);
    free(x);
}

typedef struct fixture {
    attn_client_t *client;
    attn_cache_t *cache;
    uint64_t digest; /* over the bits of every output */
} fixture_t;

static void
open_fixture(fixture_t *f, const char *target)
{
    attn_geometry_t g;

    memset(f, 0, sizeof(*f));
    attn_geometry_init(&g);
    g.layers       = LAYERS;
    g.q_heads      = Q_HEADS;
    g.kv_heads     = KV_HEADS;
    g.head_dim_k   = DIM;
    g.head_dim_v   = DIM;
    g.kv_dtype     = ATTN_F32;
    g.chunk_size   = CHUNK;
    g.page_size    = 16;
    g.placement    = ATTN_PLACE_SPREAD;
    g.region_bytes = 32u << 20;
    assert_int_equal(attn_client_open(target, NULL, &f->client), ATTN_OK);
    assert_int_equal(attn_cache_open(f->client, "test", &g, &f->cache), ATTN_OK);
}

static void
close_fixture(fixture_t *f)
{
    for (uint32_t i = 0; i < f->client->n_engines; i++) {
        assert_int_equal(engine_check(f->client->engines[i]), ATTN_OK);
    }
    attn_cache_close(f->cache);
    attn_client_close(f->client);
}

static float *
random_floats(uint64_t n)
{
    float *x = malloc((n + 1) * sizeof(*x));

    for (uint64_t i = 0; i < n; i++) {
        x[i] = uniform();
    }
    return x;
}

/* Compare the answers of one layer with the reference, and add their bits to the digest. */
static void
check_answers(fixture_t *f, model_t **models, const attn_entry_t *entries, uint32_t n, int layer,
              const float *q, const float *o, const float *lse)
{
    uint64_t row = 0;
    double want[DIM], want_lse;

    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t r = 0; r < entries[i].n_q; r++, row++) {
            uint64_t pos = entries[i].base + entries[i].n_new - entries[i].n_q + r;
            /* Of long entries one head a row: the bits of all are compared between cuts. */
            for (int h = entries[i].n_q > 8 ? (int)(r % Q_HEADS) : 0;
                 h<Q_HEADS; h += entries[i].n_q> 8 ? Q_HEADS : 1) {
                uint64_t at = row * Q_HEADS + (uint64_t)h;
                reference(models[i], layer, q + at * DIM, h, pos, want, &want_lse);
                assert_true(fabs(want_lse - (double)lse[at]) < 2e-5 * fmax(1, fabs(want_lse)));
                for (int d = 0; d < DIM; d++) {
                    assert_true(fabs(want[d] - (double)o[at * DIM + (uint64_t)d]) < 3e-5);
                }
            }
        }
    }
    const uint8_t *bytes = (const uint8_t *)o;
    for (uint64_t b = 0; b < row * Q_HEADS * DIM * sizeof(float); b++) {
        f->digest = (f->digest ^ bytes[b]) * UINT64_C(1099511628211);
    }
}

/* A step over entries: every layer, checked; then commit of accepted (NULL: all) or abort. */
static void
do_step(fixture_t *f, model_t **models, attn_entry_t *entries, uint32_t n, const uint32_t *accepted,
        bool commit)
{
    attn_step_t *step;
    uint64_t rows = 0, new_rows = 0;
    attn_batch_t batch = {
        .size = sizeof(batch), .n = n, .entries = entries, .q_dtype = ATTN_F32, .want_lse = true};

    for (uint32_t i = 0; i < n; i++) {
        rows += entries[i].n_q;
        new_rows += entries[i].n_new;
    }
    if (attn_step_begin(f->cache, &batch, &step) != ATTN_OK) {
        fail_msg("begin: %s", attn_last_error());
    }
    for (int layer = LAYERS - 1; layer >= 0; layer--) {
        float *q    = random_floats(rows * Q_HEADS * DIM),
              *k    = random_floats(new_rows * KV_HEADS * DIM);
        float *v    = random_floats(new_rows * KV_HEADS * DIM),
              *o    = random_floats(rows * Q_HEADS * DIM);
        float *lse  = random_floats(rows * Q_HEADS);
        uint64_t at = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint64_t size = (uint64_t)entries[i].n_new * KV_HEADS * DIM;
            memcpy(models[i]->k[layer] + entries[i].base * KV_HEADS * DIM, k + at,
                   size * sizeof(float));
            memcpy(models[i]->v[layer] + entries[i].base * KV_HEADS * DIM, v + at,
                   size * sizeof(float));
            at += size;
        }
        attn_tensor_t tq = {.data = q, .dtype = ATTN_F32}, tk = {.data = k, .dtype = ATTN_F32};
        attn_tensor_t tv = {.data = v, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
        uint64_t start = attn_now_ns();
        if (attn_step_run(step, (uint32_t)layer, &tq, &tk, &tv, &to, lse) != ATTN_OK) {
            fail_msg("run: %s", attn_last_error());
        }
        assert_in_range(attn_step_compute_ns(step), 1, attn_now_ns() - start);
        check_answers(f, models, entries, n, layer, q, o, lse);
        memset(o, 0xff, rows * Q_HEADS * DIM * sizeof(float));
        assert_int_equal(attn_step_run(step, (uint32_t)layer, &tq, NULL, NULL, &to, NULL), ATTN_OK);
        check_answers(f, models, entries, n, layer, q, o, lse);
        free(q), free(k), free(v), free(o), free(lse);
    }
    if (!commit) {
        attn_step_abort(step);
        return;
    }
    if (attn_step_commit(step, accepted) != ATTN_OK) {
        fail_msg("commit: %s", attn_last_error());
    }
    for (uint32_t i = 0; i < n; i++) {
        models[i]->length = entries[i].base + (accepted != NULL ? accepted[i] : entries[i].n_new);
    }
}

static void
append(fixture_t *f, model_t *model, attn_seq_t seq, uint32_t n)
{
    attn_entry_t entry = {.seq = seq, .base = model->length, .n_q = n, .n_new = n};

    do_step(f, &model, &entry, 1, NULL, true);
}

/* Prefill in odd pieces, decode, mixed batches, partial commits, aborts, forks and truncates. */
static uint64_t
scenario(const char *target)
{
    fixture_t f;
    model_t models[3];
    attn_seq_t seqs[3];

    seed = 42;
    open_fixture(&f, target);
    for (int i = 0; i < 3; i++) {
        model_init(&models[i]);
    }
    assert_int_equal(attn_seq_create(f.cache, NULL, &seqs[0]), ATTN_OK);
    assert_int_equal(attn_seq_create(f.cache, NULL, &seqs[1]), ATTN_OK);
    append(&f, &models[0], seqs[0], 100);
    append(&f, &models[0], seqs[0], 700);
    append(&f, &models[0], seqs[0], 1);
    append(&f, &models[1], seqs[1], 30);

    model_t *both[]      = {&models[0], &models[1]};
    attn_entry_t mixed[] = {{.seq = seqs[0], .base = 801, .n_q = 1, .n_new = 1},
                            {.seq = seqs[1], .base = 30, .n_q = 300, .n_new = 300}};
    uint32_t accepted[]  = {1, 280};
    do_step(&f, both, mixed, 2, NULL, false);
    do_step(&f, both, mixed, 2, accepted, true);
    assert_int_equal(models[1].length, 310);

    assert_int_equal(attn_seq_fork(f.cache, seqs[0], 777, &seqs[2]), ATTN_OK);
    model_copy(&models[2], &models[0], 777);
    append(&f, &models[2], seqs[2], 5);
    append(&f, &models[0], seqs[0], 3);
    assert_int_equal(attn_seq_truncate(f.cache, seqs[0], 513), ATTN_OK);
    models[0].length = 513;
    append(&f, &models[0], seqs[0], 2);
    append(&f, &models[2], seqs[2], 300);

    model_t *all[]     = {&models[0], &models[1], &models[2]};
    attn_entry_t ask[] = {{.seq = seqs[0], .base = 515, .n_q = 3},
                          {.seq = seqs[1], .base = 200, .n_q = 1},
                          {.seq = seqs[2], .base = models[2].length, .n_q = 1, .n_new = 1}};
    do_step(&f, all, ask, 3, NULL, true);
    models[1].length = 310; /* asking over a prefix commits nothing */

    attn_seq_info_t info;
    for (int i = 0; i < 3; i++) {
        assert_int_equal(attn_seq_describe(f.cache, seqs[i], &info), ATTN_OK);
        assert_int_equal(info.length, models[i].length);
        attn_seq_info_free(&info);
        assert_int_equal(attn_seq_free(f.cache, seqs[i]), ATTN_OK);
        assert_int_equal(attn_seq_free(f.cache, seqs[i]), ATTN_ERR_NOT_FOUND);
        /* A failure neither reads nor writes what there is for the answer. */
        attn_seq_info_t untouched;
        memset(&info, 0x5a, sizeof(info));
        memset(&untouched, 0x5a, sizeof(untouched));
        assert_int_equal(attn_seq_describe(f.cache, seqs[i], &info), ATTN_ERR_NOT_FOUND);
        assert_memory_equal(&info, &untouched, sizeof(info));
        model_free(&models[i]);
    }
    for (uint32_t e = 0; e < f.client->n_engines; e++) {
        engine_info_t figures;
        engine_describe(f.client->engines[e], &figures);
        assert_int_equal(figures.chunks, 0);
        assert_int_equal(figures.used_bytes, 0);
    }
    uint64_t digest = f.digest;
    close_fixture(&f);
    return digest;
}

static void
test_answers_are_right_and_do_not_depend_on_the_cut(void **state)
{
    static const char *const targets[] = {"inproc://cpu?workers=1&threads=1&slab=64MiB",
                                          "inproc://cpu?workers=1&threads=3&slab=64MiB",
                                          "inproc://cpu?workers=2&threads=1&slab=64MiB",
                                          "inproc://cpu?workers=3&threads=2&slab=64MiB",
                                          "inproc://cpu?workers=4&threads=1&slab=64MiB",
                                          "inproc://cpu?workers=8&threads=1&slab=64MiB"};
    uint64_t first                     = scenario(targets[0]);

    (void)state;
    for (size_t i = 1; i < sizeof(targets) / sizeof(targets[0]); i++) {
        assert_int_equal(scenario(targets[i]), first);
    }
}

static attn_status_t
begin_one(fixture_t *f, attn_entry_t entry, attn_step_t **step)
{
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32};

    return attn_step_begin(f->cache, &batch, step);
}

static void
test_wrong_calls_get_typed_errors(void **state)
{
    fixture_t f;
    attn_seq_t seq, other;
    attn_step_t *step, *second;
    float data[4 * Q_HEADS * DIM] = {0}, o[4 * Q_HEADS * DIM];
    attn_tensor_t t = {.data = data, .dtype = ATTN_F32}, half = {.data = data, .dtype = ATTN_F16};
    attn_tensor_t to  = {.data = o, .dtype = ATTN_F32};
    uint32_t too_many = 5;

    (void)state;
    open_fixture(&f, "inproc://cpu?workers=2&threads=1&slab=64MiB");
    assert_int_equal(attn_seq_create(f.cache, NULL, &seq), ATTN_OK);
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 4, .n_new = 4};

    attn_entry_t wrong = entry;
    wrong.seq.id += UINT64_C(1) << 32;
    assert_int_equal(begin_one(&f, wrong, &step), ATTN_ERR_NOT_FOUND);
    wrong = entry, wrong.base = 7;
    assert_int_equal(begin_one(&f, wrong, &step), ATTN_ERR_STALE);
    wrong = entry, wrong.n_q = 9;
    assert_int_equal(begin_one(&f, wrong, &step), ATTN_ERR_INVALID);
    wrong = entry, wrong.n_new = UINT32_MAX;
    assert_int_equal(begin_one(&f, wrong, &step), ATTN_ERR_TOO_LARGE);
    wrong = entry, wrong.base = UINT64_MAX;
    assert_int_equal(begin_one(&f, wrong, &step), ATTN_ERR_INVALID);

    assert_int_equal(begin_one(&f, entry, &step), ATTN_OK);
    assert_int_equal(begin_one(&f, entry, &second), ATTN_ERR_BUSY);
    assert_int_equal(attn_seq_free(f.cache, seq), ATTN_ERR_BUSY);
    assert_int_equal(attn_seq_truncate(f.cache, seq, 0), ATTN_ERR_BUSY);
    assert_int_equal(attn_step_run(step, LAYERS, &t, &t, &t, &to, NULL), ATTN_ERR_INVALID);
    assert_int_equal(attn_step_run(step, 0, &half, &t, &t, &to, NULL), ATTN_ERR_INVALID);
    assert_int_equal(attn_step_run(step, 0, &t, &t, NULL, &to, NULL), ATTN_ERR_INVALID);
    assert_int_equal(attn_step_run(step, 0, &t, NULL, NULL, &to, NULL), ATTN_ERR_INCOMPLETE);
    assert_int_equal(attn_step_run(step, 0, &t, &t, &t, &to, o),
                     ATTN_ERR_INVALID); /* no want_lse */
    assert_int_equal(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE);
    assert_int_equal(attn_step_run(step, 0, &t, &t, &t, &to, NULL), ATTN_OK);
    assert_int_equal(attn_step_commit(step, NULL), ATTN_ERR_INCOMPLETE);
    assert_non_null(strstr(attn_last_error(), "layer 1"));
    data[0] = 1;
    assert_int_equal(attn_step_run(step, 0, &t, &t, &t, &to, NULL), ATTN_ERR_CONFLICT);
    data[0] = NAN;
    assert_int_equal(attn_step_run(step, 1, &t, &t, &t, &to, NULL), ATTN_ERR_NUMERIC);
    data[0] = 0;
    assert_int_equal(attn_step_run(step, 1, &t, &t, &t, &to, NULL), ATTN_OK);
    assert_int_equal(attn_step_commit(step, &too_many), ATTN_ERR_INVALID);
    assert_int_equal(attn_step_commit(step, NULL), ATTN_OK);

    assert_int_equal(attn_seq_fork(f.cache, seq, 5, &other), ATTN_ERR_INVALID);
    assert_int_equal(attn_seq_truncate(f.cache, seq, 5), ATTN_ERR_INVALID);
    assert_int_equal(attn_seq_free(f.cache, seq), ATTN_OK);
    entry.base = 4;
    assert_int_equal(begin_one(&f, entry, &step), ATTN_ERR_NOT_FOUND);
    close_fixture(&f);
}

static void
test_a_full_pool_changes_nothing(void **state)
{
    fixture_t f;
    attn_seq_t seq;
    attn_step_t *step;
    attn_geometry_t g;

    (void)state;
    open_fixture(&f, "inproc://cpu?workers=2&threads=1&slab=64MiB");
    g             = *attn_cache_geometry(f.cache);
    g.layer_table = NULL; /* the cache's, and it is closed next */
    g.region_bytes =
        (uint64_t)LAYERS * 2 * KV_HEADS * DIM * sizeof(float) * CHUNK; /* one chunk a worker */
    attn_cache_close(f.cache);
    assert_int_equal(attn_cache_open(f.client, "small", &g, &f.cache), ATTN_OK);
    assert_int_equal(attn_seq_create(f.cache, NULL, &seq), ATTN_OK);
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 1, .n_new = 3 * CHUNK};
    assert_int_equal(begin_one(&f, entry, &step), ATTN_ERR_EXHAUSTED);
    entry.n_new = 2 * CHUNK;
    assert_int_equal(begin_one(&f, entry, &step), ATTN_OK);
    attn_step_abort(step);
    assert_int_equal(attn_seq_free(f.cache, seq), ATTN_OK);
    close_fixture(&f);
}

static void
test_overdue_steps_abort(void **state)
{
    fixture_t f;
    attn_seq_t seq;
    attn_step_t *step;

    (void)state;
    open_fixture(&f, "inproc://cpu?workers=2&threads=1&slab=64MiB");
    assert_int_equal(attn_seq_create(f.cache, NULL, &seq), ATTN_OK);
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 1, .n_new = 1};
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32, .timeout_ms = 1};
    assert_int_equal(attn_step_begin(f.cache, &batch, &step), ATTN_OK);
    struct timespec moment = {.tv_nsec = 250000000};
    nanosleep(&moment, NULL);
    float data[Q_HEADS * DIM] = {0};
    attn_tensor_t t           = {.data = data, .dtype = ATTN_F32};
    assert_int_equal(attn_step_run(step, 0, &t, &t, &t, &t, NULL), ATTN_ERR_ABORTED);
    attn_step_abort(step);
    batch.timeout_ms = 0;
    assert_int_equal(attn_step_begin(f.cache, &batch, &step), ATTN_OK);
    attn_step_abort(step);
    close_fixture(&f);
}

/* The housekeeper may still look at a step that was committed when the caller closes the cache. */
static void
test_a_step_outlives_its_cache(void **state)
{
    fixture_t f;
    attn_seq_t seq;
    attn_step_t *step;

    (void)state;
    open_fixture(&f, "inproc://cpu?workers=1&threads=1&slab=64MiB");
    assert_int_equal(attn_seq_create(f.cache, NULL, &seq), ATTN_OK);
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 0, .n_new = 0};
    assert_int_equal(begin_one(&f, entry, &step), ATTN_OK);
    pthread_mutex_lock(&f.client->lock);
    step_reference(step);
    pthread_mutex_unlock(&f.client->lock);
    assert_int_equal(attn_step_commit(step, NULL), ATTN_OK);
    attn_cache_close(f.cache);
    f.cache = NULL;
    assert_null(f.client->steps);
    step_unreference(step);
    close_fixture(&f);
}

static void
note_done(void *arg, attn_status_t status, const char *error)
{
    assert_string_equal(error, "");
    *(attn_status_t *)arg = status;
}

static void
test_submit_and_strides(void **state)
{
    fixture_t f;
    attn_seq_t seq;
    attn_step_t *step;
    float wide[2 * Q_HEADS * 2 * DIM], packed[2 * Q_HEADS * DIM], o[2 * Q_HEADS * DIM];
    float o_wide[2 * Q_HEADS * 2 * DIM];
    attn_status_t status = ATTN_ERR_INTERNAL;

    (void)state;
    open_fixture(&f, "inproc://cpu?workers=1&threads=1&slab=64MiB");
    assert_int_equal(attn_seq_create(f.cache, NULL, &seq), ATTN_OK);
    for (int i = 0; i < 2 * Q_HEADS; i++) {
        for (int d = 0; d < DIM; d++) {
            wide[i * 2 * DIM + d] = packed[i * DIM + d] = uniform();
            wide[i * 2 * DIM + DIM + d]                 = NAN;
        }
    }
    attn_entry_t entry = {.seq = seq, .base = 0, .n_q = 2, .n_new = 2};
    attn_tensor_t kv   = {.data = packed, .dtype = ATTN_F32};
    attn_tensor_t q = {.data = packed, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
    attn_tensor_t q_wide = {
        .data = wide, .dtype = ATTN_F32, .token_stride = 2 * Q_HEADS * DIM, .head_stride = 2 * DIM};
    attn_tensor_t to_wide = q_wide;
    to_wide.data          = o_wide;
    assert_int_equal(begin_one(&f, entry, &step), ATTN_OK);
    assert_int_equal(attn_step_submit(step, 0, &q, &kv, &kv, &to, NULL, note_done, &status),
                     ATTN_OK);
    assert_int_equal(status, ATTN_OK);
    assert_int_equal(attn_step_run(step, 0, &q_wide, NULL, NULL, &to_wide, NULL), ATTN_OK);
    for (int i = 0; i < 2 * Q_HEADS; i++) {
        assert_memory_equal(o + i * DIM, o_wide + i * 2 * DIM, DIM * sizeof(float));
    }
    attn_step_abort(step);
    close_fixture(&f);
}

static void
test_states_convert_and_merge(void **state)
{
    float o[8], lse = 3.5f, a[8], l, a2[8] = {0}, l2 = 0, back[8], lse_back;
    int32_t e, e2 = INT32_MIN;
    attn_state_t s = {a, &l, &e}, empty = {a2, &l2, &e2};

    (void)state;
    for (int d = 0; d < 8; d++) {
        o[d] = uniform();
    }
    attn_state_from_o_lse(o, &lse, 1, 8, s);
    assert_true(l >= 1 && l < 2);
    attn_state_merge(empty, s, 1, 8);
    attn_state_finish(empty, 1, 8, back, &lse_back);
    assert_true(fabsf(lse_back - lse) < 1e-6f);
    for (int d = 0; d < 8; d++) {
        assert_true(fabsf(back[d] - o[d]) < 1e-6f);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_are_right_and_do_not_depend_on_the_cut),
        cmocka_unit_test(test_wrong_calls_get_typed_errors),
        cmocka_unit_test(test_a_full_pool_changes_nothing),
        cmocka_unit_test(test_overdue_steps_abort),
        cmocka_unit_test(test_a_step_outlives_its_cache),
        cmocka_unit_test(test_submit_and_strides),
        cmocka_unit_test(test_states_convert_and_merge),
    };
    return cmocka_run_group_tests_name("client", tests, NULL, NULL);
}
