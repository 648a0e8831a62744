/*
 * Drafts of trees: steps with masks and commits of paths, over engines in this process and over
 * real workers. A committed path is held, bit for bit, against a sequence to which a plain step
 * appended the path's tokens alone; answers against attention by its definition.
 */
#include "client/attn.h"
#include "tests/integration/cluster.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS 2u
#define Q_HEADS 4u
#define KV_HEADS 2u
#define D 32u
#define TOKENS 1600u
#define NEW_MAX 620u
#define WINDOW 90u

#define KV_ROW (KV_HEADS * D)
#define Q_ROW (Q_HEADS * D)

static const float slopes[Q_HEADS] = {0.5f, 0.25f, 0.125f, 0.0625f};

static uint64_t random_state;
static uint64_t digest; /* of all answers of a play */

static uint32_t
pick(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % n);
}

static void
fill(float *to, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        to[i] = (float)pick(1u << 20) / (float)(1u << 19) - 1.0f;
    }
}

static void
digest_add(const void *bytes, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        digest = (digest ^ ((const uint8_t *)bytes)[i]) * UINT64_C(0x100000001b3);
    }
}

/* ---- sequences and steps ---- */

typedef struct known {
    attn_seq_t seq;
    uint64_t length;
    float k[LAYERS][TOKENS * KV_ROW], v[LAYERS][TOKENS * KV_ROW];
} known_t;

typedef struct answer {
    float o[LAYERS][NEW_MAX * Q_ROW], lse[LAYERS][NEW_MAX * Q_HEADS];
} answer_t;

static attn_cache_t *cache;

static attn_tensor_t
tensor(const float *data)
{
    return (attn_tensor_t){.data = (void *)data, .dtype = ATTN_F32};
}

static attn_status_t
begin(const attn_entry_t *entry, attn_step_t **step)
{
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 1, .entries = entry, .q_dtype = ATTN_F32, .want_lse = true};

    return attn_step_begin(cache, &batch, step);
}

/* All layers of an open step; k, v of its new tokens are at k[l], v[l]. */
static void
run_layers(attn_step_t *step, const attn_entry_t *e, const float *q, float *const *k,
           float *const *v, answer_t *answer)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        attn_tensor_t tq = tensor(q + l * NEW_MAX * Q_ROW), tk = tensor(k != NULL ? k[l] : NULL),
                      tv = tensor(v != NULL ? v[l] : NULL);
        attn_tensor_t to = tensor(answer != NULL ? answer->o[l] : NULL);
        OK(attn_step_run(step, l, e->n_q > 0 ? &tq : NULL, e->n_new > 0 ? &tk : NULL,
                         e->n_new > 0 ? &tv : NULL, e->n_q > 0 ? &to : NULL,
                         e->n_q > 0 ? answer->lse[l] : NULL));
    }
}

/* Append n tokens, dreamt up, or those given. */
static void
append(known_t *s, uint32_t n, const float *const *k, const float *const *v)
{
    attn_entry_t e = {.seq = s->seq, .base = s->length, .n_new = n};
    float *to_k[LAYERS], *to_v[LAYERS];
    attn_step_t *step;

    if (n == 0) {
        return;
    }
    for (uint32_t l = 0; l < LAYERS; l++) {
        to_k[l] = s->k[l] + s->length * KV_ROW;
        to_v[l] = s->v[l] + s->length * KV_ROW;
        if (k != NULL) {
            memcpy(to_k[l], k[l], n * KV_ROW * sizeof(float));
            memcpy(to_v[l], v[l], n * KV_ROW * sizeof(float));
        } else {
            fill(to_k[l], n * KV_ROW);
            fill(to_v[l], n * KV_ROW);
        }
    }
    OK(begin(&e, &step));
    run_layers(step, &e, NULL, to_k, to_v, NULL);
    OK(attn_step_commit(step, NULL));
    s->length += n;
}

/* The answers of n_q queries over all that is committed. */
static void
ask(const known_t *s, uint32_t n_q, const float *q, answer_t *answer)
{
    attn_entry_t e = {.seq = s->seq, .base = s->length, .n_q = n_q};
    attn_step_t *step;

    memset(answer, 0, sizeof(*answer));
    OK(begin(&e, &step));
    run_layers(step, &e, q, NULL, NULL, answer);
    OK(attn_step_commit(step, NULL));
}

/* ---- the reference ---- */

/* Token t of the draft's row, of the layer's keys at `of`. */
typedef struct draft {
    uint32_t n;
    uint8_t mask[NEW_MAX * (NEW_MAX + 7) / 8];
    float q[LAYERS * NEW_MAX * Q_ROW], k[LAYERS][NEW_MAX * KV_ROW], v[LAYERS][NEW_MAX * KV_ROW];
    uint32_t parent[NEW_MAX];
} draft_t;

static bool
names(const draft_t *d, uint32_t query, uint32_t token)
{
    return d->mask[query * ((d->n + 7) / 8) + token / 8] >> token % 8 & 1;
}

/* One query and head by the definition: the path as if it were all that is new. */
static void
reference(const known_t *s, const draft_t *d, uint32_t layer, uint32_t query, uint32_t head,
          double *o, double *lse)
{
    const float *q = d->q + (layer * NEW_MAX + query) * Q_ROW + head * D;
    uint64_t at    = head / (Q_HEADS / KV_HEADS) * D;
    const float *k[TOKENS], *v[TOKENS];
    uint64_t n = s->length;
    double sum = 0;

    for (uint64_t t = 0; t < n; t++) {
        k[t] = s->k[layer] + t * KV_ROW + at;
        v[t] = s->v[layer] + t * KV_ROW + at;
    }
    for (uint32_t t = 0; t < d->n; t++) {
        if (names(d, query, t)) {
            k[n]   = d->k[layer] + t * KV_ROW + at;
            v[n++] = d->v[layer] + t * KV_ROW + at;
        }
    }
    memset(o, 0, D * sizeof(*o));
    for (uint64_t t = layer == 1 && n > WINDOW ? n - WINDOW : 0; t < n; t++) {
        double x = 0;
        for (uint32_t i = 0; i < D; i++) {
            x += (double)q[i] * (double)k[t][i];
        }
        x = exp(x / sqrt(D) +
                (layer == 1 ? (double)slopes[head] * ((double)t - (double)(n - 1)) : 0));
        sum += x;
        for (uint32_t i = 0; i < D; i++) {
            o[i] += x * (double)v[t][i];
        }
    }
    for (uint32_t i = 0; i < D; i++) {
        o[i] /= sum;
    }
    *lse = log(sum);
}

static void
judge(const known_t *s, const draft_t *d, const answer_t *answer)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t i = 0; i < d->n; i += 1 + d->n / 12) {
            for (uint32_t h = 0; h < Q_HEADS; h++) {
                double o[D], lse;
                reference(s, d, l, i, h, o, &lse);
                assert_true(fabs(lse - (double)answer->lse[l][i * Q_HEADS + h]) <
                            2e-5 * fmax(1, fabs(lse)));
                for (uint32_t j = 0; j < D; j++) {
                    double got = (double)answer->o[l][i * Q_ROW + h * D + j];
                    if (!(fabs(o[j] - got) < 2e-5)) {
                        fail_msg("layer %u, query %u: o is %g, must be %g", l, i, got, o[j]);
                    }
                }
            }
        }
    }
}

/* ---- drafts ---- */

static void
draft_make(draft_t *d, uint32_t n)
{
    d->n = n;
    memset(d->mask, 0, sizeof(d->mask));
    for (uint32_t t = 0; t < n; t++) {
        uint32_t near = pick(t + 1) < 3 ? t : pick(t + 1); /* t: a root of its own */
        d->parent[t]  = t > 0 && pick(3) ? t - 1 : near;
        for (uint32_t a = t;; a = d->parent[a]) {
            d->mask[t * ((n + 7) / 8) + a / 8] |= (uint8_t)(1u << a % 8);
            if (d->parent[a] == a) {
                break;
            }
        }
    }
    for (uint32_t l = 0; l < LAYERS; l++) {
        fill(d->q + l * NEW_MAX * Q_ROW, n * Q_ROW);
        fill(d->k[l], n * KV_ROW);
        fill(d->v[l], n * KV_ROW);
    }
}

/* Which tokens to keep: of a branch, or any, or all; returns how many. */
static uint32_t
choose_path(const draft_t *d, uint32_t *path)
{
    uint32_t n = 0, how = pick(6), leaf = pick(d->n);

    for (uint32_t t = 0; t < d->n; t++) {
        bool keep = how == 0   ? true
                    : how == 1 ? pick(2) == 0
                    : how == 2 ? t + 1 == d->n
                    : how == 3 ? false
                               : names(d, leaf, t);
        if (keep) {
            path[n++] = t;
        }
    }
    return n;
}

static void
draft_run(const known_t *s, draft_t *d, attn_step_t **step, answer_t *answer)
{
    attn_entry_t e = {
        .seq = s->seq, .base = s->length, .n_q = d->n, .n_new = d->n, .mask = d->mask};
    float *k[LAYERS] = {d->k[0], d->k[1]}, *v[LAYERS] = {d->v[0], d->v[1]};

    OK(begin(&e, step));
    run_layers(*step, &e, d->q, k, v, answer);
}

/* The rows of the path, to append them to another sequence in a plain step. */
static void
append_path(known_t *s, const draft_t *d, const uint32_t *path, uint32_t n)
{
    float *k[LAYERS], *v[LAYERS];

    for (uint32_t l = 0; l < LAYERS; l++) {
        k[l] = malloc((n + 1) * KV_ROW * sizeof(float));
        v[l] = malloc((n + 1) * KV_ROW * sizeof(float));
        for (uint32_t r = 0; r < n; r++) {
            memcpy(k[l] + r * KV_ROW, d->k[l] + path[r] * KV_ROW, KV_ROW * sizeof(float));
            memcpy(v[l] + r * KV_ROW, d->v[l] + path[r] * KV_ROW, KV_ROW * sizeof(float));
        }
    }
    append(s, n, (const float *const *)k, (const float *const *)v);
    for (uint32_t l = 0; l < LAYERS; l++) {
        free(k[l]);
        free(v[l]);
    }
}

static void
assert_same(const known_t *a, const known_t *b, const float *q, answer_t *x, answer_t *y)
{
    uint32_t n = a->length < 5 ? (uint32_t)a->length : 5;
    attn_seq_info_t info;

    OK(attn_seq_describe(cache, a->seq, &info));
    assert_int_equal(info.length, b->length);
    attn_seq_info_free(&info);
    if (n == 0) {
        return;
    }
    ask(a, n, q, x);
    ask(b, n, q, y);
    assert_memory_equal(x, y, sizeof(*x));
    digest_add(x->o, sizeof(x->o));
}

/* Draft on a fork, abort it, draft again, commit a path; the twin gets the path alone. */
static void
play_draft(known_t *drafted, known_t *twin, uint32_t base, uint32_t n)
{
    draft_t *d  = calloc(1, sizeof(*d));
    answer_t *x = calloc(1, sizeof(*x)), *y = calloc(1, sizeof(*y));
    uint32_t path[NEW_MAX], lengths[1];
    attn_step_t *step;
    known_t *origin = calloc(1, sizeof(*origin));

    OK(attn_seq_create(cache, NULL, &origin->seq));
    append(origin, base, NULL, NULL);
    memcpy(drafted, origin, sizeof(*origin));
    memcpy(twin, origin, sizeof(*origin));
    OK(attn_seq_fork(cache, origin->seq, base, &drafted->seq));
    OK(attn_seq_fork(cache, origin->seq, base, &twin->seq));

    draft_make(d, n);
    draft_run(drafted, d, &step, x);
    attn_step_abort(step);
    assert_same(drafted, twin, d->q, x, y);

    draft_run(drafted, d, &step, x);
    judge(drafted, d, x);
    digest_add(x->o, sizeof(x->o));
    digest_add(x->lse, sizeof(x->lse));
    lengths[0] = choose_path(d, path);
    OK(attn_step_commit_with(step, &(attn_commit_t){.size     = sizeof(attn_commit_t),
                                                    .accepted = lengths,
                                                    .path     = path,
                                                    .n_path   = lengths[0]}));
    append_path(twin, d, path, lengths[0]);
    drafted->length += lengths[0];
    assert_same(drafted, twin, d->q, x, y);
    for (uint32_t l = 0; l < LAYERS; l++) { /* what follows follows */
        memcpy(drafted->k[l], twin->k[l], sizeof(twin->k[l]));
        memcpy(drafted->v[l], twin->v[l], sizeof(twin->v[l]));
    }
    append(twin, 9, NULL, NULL);
    append(drafted, 9,
           (const float *const[]){twin->k[0] + drafted->length * KV_ROW,
                                  twin->k[1] + drafted->length * KV_ROW},
           (const float *const[]){twin->v[0] + drafted->length * KV_ROW,
                                  twin->v[1] + drafted->length * KV_ROW});
    assert_same(drafted, twin, d->q, x, y);
    assert_same(origin, origin, d->q, x, y); /* its tail was shared */
    OK(attn_seq_free(cache, origin->seq));
    OK(attn_seq_free(cache, drafted->seq));
    OK(attn_seq_free(cache, twin->seq));
    free(origin);
    free(d);
    free(x);
    free(y);
}

/* Drafts inside a page, over pages, over a chunk's end, over several chunks. */
static uint64_t
play(const char *target, uint32_t cases)
{
    static const uint32_t sizes[][2] = {{250, 20}, {0, 30},    {256, 7},  {500, 620}, {255, 1},
                                        {77, 40},  {480, 100}, {511, 13}, {3, 253},   {765, 300}};
    const attn_layer_t table[LAYERS] = {{.causal = true},
                                        {.causal = true, .window = WINDOW, .slopes = slopes}};
    attn_client_t *client            = open_client(target, 20000);
    known_t *a = calloc(1, sizeof(*a)), *b = calloc(1, sizeof(*b));
    attn_geometry_t geometry;

    attn_geometry_init(&geometry);
    geometry.layers = LAYERS, geometry.q_heads = Q_HEADS, geometry.kv_heads = KV_HEADS;
    geometry.head_dim_k = geometry.head_dim_v = D;
    geometry.kv_dtype                         = ATTN_F32;
    geometry.page_size = 24, geometry.chunk_size = 256;
    geometry.placement    = ATTN_PLACE_SPREAD;
    geometry.layer_table  = table;
    geometry.region_bytes = 6 << 20;
    OK(attn_cache_open(client, "drafts", &geometry, &cache));
    digest       = UINT64_C(0xcbf29ce484222325);
    random_state = 99;
    for (uint32_t i = 0; i < cases; i++) {
        play_draft(a, b, sizes[i % 10][0], sizes[i % 10][1]);
    }
    attn_cache_close(cache);
    attn_client_close(client);
    free(a);
    free(b);
    return digest;
}

static void
test_a_path_is_a_plain_step_on_any_number_of_engines(void **state)
{
    uint64_t one = play("inproc://cpu?workers=1&threads=1&slab=32MiB", 20);

    (void)state;
    assert_true(play("inproc://cpu?workers=2&threads=1&slab=32MiB", 20) == one);
    assert_true(play("inproc://cpu?workers=3&threads=2&slab=32MiB", 20) == one);
    assert_true(play("inproc://cpu?workers=5&threads=1&slab=32MiB", 20) == one);
}

static void
test_a_path_is_a_plain_step_over_the_network(void **state)
{
    uint64_t one = play("inproc://cpu?workers=1&threads=1&slab=32MiB", 10);
    test_cluster_t cluster;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 3});
    assert_true(play(cluster.coordinator.address, 10) == one);
    cluster_down(&cluster);
}

/* ---- what is refused ---- */

#define REFUSED(call, status, text)                                                                \
    do {                                                                                           \
        assert_int_equal(call, status);                                                            \
        if (strstr(attn_last_error(), text) == NULL) {                                             \
            fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), text);                       \
        }                                                                                          \
    } while (0)

static attn_status_t
commit(attn_step_t *step, const uint32_t *accepted, const uint32_t *path, uint64_t n_path)
{
    return attn_step_commit_with(step, &(attn_commit_t){.size     = sizeof(attn_commit_t),
                                                        .accepted = accepted,
                                                        .path     = path,
                                                        .n_path   = n_path});
}

static void
test_bad_masks_and_paths_are_refused(void **state)
{
    attn_client_t *client = open_client("inproc://cpu?workers=2&threads=1&slab=8MiB", 10000);
    static float zeros[2000 * Q_ROW];
    uint8_t mask[4] = {1, 3, 7, 9};
    attn_seq_t seqs[2];
    attn_geometry_t geometry;
    attn_step_t *step;
    (void)state;

    attn_geometry_init(&geometry);
    geometry.layers = 1, geometry.q_heads = Q_HEADS, geometry.kv_heads = KV_HEADS;
    geometry.head_dim_k = geometry.head_dim_v = D;
    geometry.kv_dtype                         = ATTN_F32;
    geometry.region_bytes                     = 2 << 20;
    OK(attn_cache_open(client, "refused", &geometry, &cache));
    OK(attn_seq_create(cache, NULL, &seqs[0]));
    OK(attn_seq_create(cache, NULL, &seqs[1]));

    attn_entry_t e[2]  = {{.seq = seqs[0], .n_q = 4, .n_new = 4, .mask = mask},
                          {.seq = seqs[1], .n_new = 3}};
    attn_batch_t batch = {.size = sizeof(batch), .n = 2, .entries = e, .q_dtype = ATTN_F32};
    e[0].n_new         = 1025;
    REFUSED(attn_step_begin(cache, &batch, &step), ATTN_ERR_TOO_LARGE, "entry 0: n_new is 1025");
    e[0].n_new = 4;
    mask[2]    = 0x17;
    REFUSED(attn_step_begin(cache, &batch, &step), ATTN_ERR_INVALID, "row 2 has a bit set beyond");
    mask[2] = 0;
    REFUSED(attn_step_begin(cache, &batch, &step), ATTN_ERR_INVALID, "row 2 names none");
    mask[2] = 7;

    OK(attn_step_begin(cache, &batch, &step));
    attn_tensor_t t     = tensor(zeros);
    uint32_t accepted[] = {2, 3}, path[] = {1, 3, 3, 0};
    REFUSED(commit(step, accepted, path, 2), ATTN_ERR_INCOMPLETE, "layer 0 has no k, v");
    OK(attn_step_run(step, 0, NULL, &t, &t, NULL, NULL));
    REFUSED(attn_step_commit(step, NULL), ATTN_ERR_INVALID, "entry 0 has a mask");
    REFUSED(attn_step_commit(step, accepted), ATTN_ERR_INVALID, "entry 0 has a mask");
    REFUSED(commit(step, accepted, path, 1), ATTN_ERR_INVALID, "path names 1");
    REFUSED(commit(step, accepted, path, 3), ATTN_ERR_INVALID, "path has 3 numbers");
    REFUSED(commit(step, accepted, path + 1, 2), ATTN_ERR_INVALID, "entry 0: path: number 1 is 3");
    REFUSED(commit(step, accepted, path + 2, 2), ATTN_ERR_INVALID, "number 1 is 0");
    path[1] = 4;
    REFUSED(commit(step, accepted, path, 2), ATTN_ERR_INVALID, "below 4");
    path[1]     = 3;
    accepted[0] = 5;
    REFUSED(commit(step, accepted, path, 2), ATTN_ERR_INVALID, "accepted[0] is 5");
    accepted[0] = 2;
    REFUSED(commit(step, accepted, NULL, 2), ATTN_ERR_INVALID, "path is NULL");
    REFUSED(attn_step_commit_with(step, &(attn_commit_t){.size = 8}), ATTN_ERR_INVALID, "size");
    OK(commit(step, accepted, path, 2));
    attn_cache_close(cache);
    attn_client_close(client);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_masks_and_paths_are_refused),
        cmocka_unit_test(test_a_path_is_a_plain_step_on_any_number_of_engines),
        cmocka_unit_test(test_a_path_is_a_plain_step_over_the_network),
    };

    return cmocka_run_group_tests_name("tests.integration.draft", tests, NULL, NULL);
}
