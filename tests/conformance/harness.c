#include "tests/conformance/harness.h"

#include "base/checked.h"
#include "base/clock.h"
#include "kernels/cuda/cuda.h"
#include "kernels/oracle.h"

#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The group that runs. A GPU's backends cost some 100 ms each to open: worlds share one. */
static const char *backend_name;
static attn_backend_t *shared_device, *shared_host;
static int groups_run;

/* ---- chance ---- */

static uint64_t chance_state;

uint64_t
chance(void)
{
    chance_state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    uint64_t z = chance_state;
    z          = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z          = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t
chance_below(uint32_t n)
{
    return (uint32_t)(chance() % n);
}

uint32_t
chance_in(uint32_t low, uint32_t high)
{
    return low + chance_below(high - low + 1);
}

float
chance_normal(void)
{
    uint64_t bits = chance();
    int32_t sum   = 0;
    for (int i = 0; i < 4; i++) {
        sum += (int32_t)(bits >> 16 * i & 0xffff) - 0x8000;
    }
    return (float)sum * (1.0f / 37837.0f); /* four uniforms: deviation 0x8000 * sqrt(4/3) */
}

/* malloc fills what it gives with the low byte of PERTURB ^ 0xff: NaN in every type, so that a
 * workspace of the cpu's holds that before it is written. */
#define PERTURB 0x100

static bool
open_group(const char *backend, const char *name)
{
    const attn_backend_ops_t *ops = attn_backend_find(backend);
    const char *wanted            = getenv("ATTN_BACKEND");

    if (wanted != NULL && strcmp(wanted, backend) != 0) {
        return false;
    }
    attn_status_t status = ops != NULL ? ops->open(1, 0, &shared_device) : ATTN_ERR_UNSUPPORTED;
    if (status == ATTN_ERR_UNSUPPORTED) {
        printf("%s: skipped, %s\n", name, ops != NULL ? attn_last_error() : "no such backend");
        return false;
    }
    if (status != ATTN_OK || attn_backend_find("cpu")->open(1, 0, &shared_host) != ATTN_OK) {
        printf("%s: %s\n", name, attn_last_error());
        exit(1);
    }
    return true;
}

int
conformance_run(const char *backend, const char *name, const struct CMUnitTest *tests, size_t n)
{
    const char *seed = getenv("ATTN_SEED");

    backend_name = backend;
    if (!open_group(backend, name)) {
        return 0;
    }
    mallopt(M_PERTURB, PERTURB);
    setvbuf(stdout, NULL, _IOLBF, 0); /* a test that hangs is named in the log */
    cmocka_set_test_filter(getenv("ATTN_TEST"));
    chance_state = seed != NULL ? strtoull(seed, NULL, 0) : attn_now_ns() % 1000000007u;
    printf("%s on %s: ATTN_SEED=%llu\n", name, shared_device->ops->kind(shared_device),
           (unsigned long long)chance_state);
    groups_run++;
    int failed = _cmocka_run_group_tests(name, tests, n, NULL, NULL);
    shared_device->ops->close(shared_device);
    shared_host->ops->close(shared_host);
    return failed;
}

int
conformance_end(int failed)
{
    return failed > 0 ? 1 : groups_run > 0 ? 0 : 77;
}

bool
conformance_on(const char *backend)
{
    return strcmp(backend_name, backend) == 0;
}

/* ---- shapes ---- */

static uint32_t
distance(uint32_t a, uint32_t b)
{
    return a > b ? a - b : b - a;
}

shape_t
conformance_fit(shape_t shape)
{
    static const uint32_t dims[][2] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};
    uint32_t best = 0, least = UINT32_MAX;

    if (!conformance_on("cuda")) {
        return shape;
    }
    for (uint32_t i = 0; i < sizeof(dims) / sizeof(dims[0]); i++) {
        uint32_t far = distance(shape.d_k, dims[i][0]) + distance(shape.d_v, dims[i][1]);
        if (far < least) {
            best  = i;
            least = far;
        }
    }
    shape.d_k        = dims[best][0];
    shape.d_v        = dims[best][1];
    shape.kv_dtype   = shape.kv_dtype == ATTN_F32 ? ATTN_BF16 : shape.kv_dtype;
    shape.chunk_size = shape.chunk_size < 64 ? 64 : shape.chunk_size;
    return shape;
}

shape_t
random_shape(void)
{
    static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    uint32_t kv_heads                 = chance_in(1, 3);
    uint32_t most                     = chance_below(6) == 0 ? 32 : 17;
    return conformance_fit((shape_t){.q_heads    = kv_heads * chance_in(1, 8),
                                     .kv_heads   = kv_heads,
                                     .d_k        = 8 * chance_in(4, most),
                                     .d_v        = 8 * chance_in(4, most),
                                     .page_size  = CHANCE_OF(((uint32_t[]){1, 5, 16, 24, 128})),
                                     .chunk_size = CHANCE_OF(((uint32_t[]){256, 512, 2048})),
                                     .kv_dtype   = CHANCE_OF(types),
                                     .q_dtype    = CHANCE_OF(types),
                                     .o_dtype    = ATTN_F32});
}

/* ---- the world ---- */

/* KV of the shape's geometry; pages are further apart than they are long, and K not as far as V:
 * strides are strides. */
static attn_kv_t
kv_of(const shape_t *shape, uint64_t n_pages, uint64_t stride)
{
    uint64_t rows = (uint64_t)shape->kv_heads * shape->page_size;

    return (attn_kv_t){.k_page_stride = attn_max(rows * shape->d_k + 32, stride),
                       .v_page_stride = attn_max(rows * shape->d_v + 64, stride),
                       .n_pages       = n_pages,
                       .dtype         = shape->kv_dtype,
                       .kv_heads      = shape->kv_heads,
                       .head_dim_k    = shape->d_k,
                       .head_dim_v    = shape->d_v,
                       .page_size     = shape->page_size,
                       .chunk_size    = shape->chunk_size};
}

static uint64_t
slab_bytes(const attn_kv_t *kv, uint64_t stride)
{
    return kv->n_pages * stride * attn_dtype_size(kv->dtype);
}

/* Slabs of K and V, NaN in every type. */
static void
slabs_open(attn_backend_t *backend, attn_kv_t *kv)
{
    uint64_t bytes[2] = {slab_bytes(kv, kv->k_page_stride), slab_bytes(kv, kv->v_page_stride)};
    void **slabs[2]   = {&kv->k, &kv->v};

    for (int i = 0; i < 2; i++) {
        if (backend->ops->slab_alloc(backend, bytes[i], slabs[i]) != ATTN_OK ||
            backend->ops->slab_fill(backend, *slabs[i], 0xff, bytes[i]) != ATTN_OK) {
            fail_msg("%s", attn_last_error());
        }
    }
}

static void
slabs_close(attn_backend_t *backend, const attn_kv_t *kv)
{
    backend->ops->slab_free(backend, kv->k, slab_bytes(kv, kv->k_page_stride));
    backend->ops->slab_free(backend, kv->v, slab_bytes(kv, kv->v_page_stride));
}

void
world_open_wide(world_t *world, shape_t shape, uint64_t tokens, uint32_t threads, uint64_t stride)
{
    shape            = conformance_fit(shape);
    uint32_t n_pages = (uint32_t)attn_div_up(tokens, shape.page_size);

    *world = (world_t){.shape = shape, .shared = !conformance_on("cpu")};
    if (world->shared) {
        world->backend = shared_device;
        world->host    = shared_host;
    } else {
        const attn_backend_ops_t *ops = attn_backend_find(backend_name);
        assert_int_equal(ops->open(threads, 0, &world->backend), ATTN_OK);
        world->host = world->backend;
    }
    world->backend->ops->leaf_sizes(world->backend, &world->few, &world->many);
    world->kv = kv_of(&shape, n_pages, stride);
    slabs_open(world->backend, &world->kv);
    world->mirror = world->kv;
    if (world->host != world->backend) {
        world->mirror = kv_of(&shape, n_pages, 0);
        slabs_open(world->host, &world->mirror);
    }
    world->k_bytes    = slab_bytes(&world->kv, world->kv.k_page_stride);
    world->v_bytes    = slab_bytes(&world->kv, world->kv.v_page_stride);
    world->free_pages = malloc(n_pages * sizeof(uint32_t));
    for (uint32_t i = 0; i < n_pages; i++) {
        uint32_t j           = chance_below(i + 1);
        world->free_pages[i] = world->free_pages[j];
        world->free_pages[j] = i;
    }
    world->n_free = n_pages;
}

void
world_open(world_t *world, shape_t shape, uint64_t tokens, uint32_t threads)
{
    world_open_wide(world, shape, tokens, threads, 0);
}

void
world_close(world_t *world)
{
    slabs_close(world->backend, &world->kv);
    if (world->host != world->backend) {
        slabs_close(world->host, &world->mirror);
    }
    if (!world->shared) {
        world->backend->ops->close(world->backend);
    }
    free(world->free_pages);
}

attn_status_t
world_append(world_t *world, const uint32_t *pages, const uint32_t *offsets, uint64_t n,
             const void *k, const void *v)
{
    attn_status_t status =
        world->backend->ops->append(world->backend, &world->kv, pages, offsets, n, k, v);

    if (status == ATTN_OK && world->host != world->backend) {
        assert_int_equal(
            world->host->ops->append(world->host, &world->mirror, pages, offsets, n, k, v),
            ATTN_OK);
    }
    return status;
}

attn_status_t
world_copy_page(world_t *world, uint32_t from, uint32_t to, uint32_t tokens)
{
    attn_status_t status =
        world->backend->ops->copy_page(world->backend, &world->kv, from, to, tokens);

    if (status == ATTN_OK && world->host != world->backend) {
        assert_int_equal(world->host->ops->copy_page(world->host, &world->mirror, from, to, tokens),
                         ATTN_OK);
    }
    return status;
}

void
world_read_all(const world_t *world, uint8_t **k_p, uint8_t **v_p)
{
    const attn_kv_t *kv = &world->kv;
    uint64_t n          = kv->n_pages * kv->page_size;
    uint64_t row        = kv->kv_heads * attn_dtype_size(kv->dtype);
    uint32_t *pages = malloc(n * sizeof(*pages)), *offsets = malloc(n * sizeof(*offsets));

    for (uint64_t i = 0; i < n; i++) {
        pages[i]   = (uint32_t)(i / kv->page_size);
        offsets[i] = (uint32_t)(i % kv->page_size);
    }
    *k_p = malloc(n * row * kv->head_dim_k);
    *v_p = malloc(n * row * kv->head_dim_v);
    assert_int_equal(world->backend->ops->read(world->backend, kv, pages, offsets, n, *k_p, *v_p),
                     ATTN_OK);
    free(pages);
    free(offsets);
}

/* ---- sequences ---- */

/* Room for one more token; its page and offset. */
static void
seq_next(world_t *world, seq_t *seq, uint32_t *page, uint32_t *offset)
{
    uint32_t chunk = (uint32_t)(seq->length / world->shape.chunk_size);
    uint32_t at    = (uint32_t)(seq->length % world->shape.chunk_size);
    uint32_t size  = world->shape.page_size;

    if (at == 0) {
        assert_true(chunk < SEQ_CHUNKS_MAX);
        seq->pages[chunk] = calloc(attn_div_up(world->shape.chunk_size, size), sizeof(uint32_t));
        seq->runs[chunk]  = (attn_kv_run_t){.chunk = chunk, .pages = seq->pages[chunk]};
        seq->n_chunks     = chunk + 1;
    }
    if (at % size == 0) {
        assert_true(world->n_free > 0);
        seq->pages[chunk][at / size] = world->free_pages[--world->n_free];
    }
    *page                   = seq->pages[chunk][at / size];
    *offset                 = at % size;
    seq->runs[chunk].length = at + 1;
    seq->length++;
}

static void
fill_random(void *to, attn_dtype_t dtype, uint64_t n, float scale)
{
    float block[256];
    for (uint64_t i = 0; i < n; i += 256) {
        uint64_t m = n - i < 256 ? n - i : 256;
        for (uint64_t j = 0; j < m; j++) {
            block[j] = chance_normal() * scale;
        }
        attn_convert((uint8_t *)to + i * attn_dtype_size(dtype), dtype, block, ATTN_F32, m);
    }
}

void
seq_grow(world_t *world, seq_t *seq, uint64_t n)
{
    const shape_t *s = &world->shape;
    uint64_t size    = attn_dtype_size(s->kv_dtype);
    uint64_t k_row = (uint64_t)s->kv_heads * s->d_k, v_row = (uint64_t)s->kv_heads * s->d_v;
    uint32_t *pages   = malloc((n + 1) * sizeof(*pages)),
             *offsets = malloc((n + 1) * sizeof(*offsets));
    void *k = malloc((n * k_row + 1) * size), *v = malloc((n * v_row + 1) * size);

    for (uint64_t i = 0; i < n; i++) {
        seq_next(world, seq, &pages[i], &offsets[i]);
    }
    fill_random(k, s->kv_dtype, n * k_row, seq->k_scale != 0 ? seq->k_scale : 1);
    fill_random(v, s->kv_dtype, n * v_row, seq->v_scale != 0 ? seq->v_scale : 1);
    assert_int_equal(world_append(world, pages, offsets, n, k, v), ATTN_OK);
    free(k);
    free(v);
    free(pages);
    free(offsets);
}

void
seq_put(world_t *world, seq_t *seq, const float *k, const float *v)
{
    const shape_t *s = &world->shape;
    uint64_t size    = attn_dtype_size(s->kv_dtype);
    void *k_row = malloc(s->kv_heads * s->d_k * size), *v_row = malloc(s->kv_heads * s->d_v * size);
    uint32_t page, offset;

    for (uint32_t h = 0; h < s->kv_heads; h++) {
        attn_convert((uint8_t *)k_row + h * s->d_k * size, s->kv_dtype, k, ATTN_F32, s->d_k);
        attn_convert((uint8_t *)v_row + h * s->d_v * size, s->kv_dtype, v, ATTN_F32, s->d_v);
    }
    seq_next(world, seq, &page, &offset);
    assert_int_equal(world_append(world, &page, &offset, 1, k_row, v_row), ATTN_OK);
    free(k_row);
    free(v_row);
}

void
seq_fork(world_t *world, seq_t *seq, const seq_t *from, uint64_t length)
{
    uint32_t chunk_size = world->shape.chunk_size, page_size = world->shape.page_size;
    uint32_t table = (uint32_t)attn_div_up(chunk_size, page_size);

    *seq = (seq_t){.length   = length,
                   .n_chunks = (uint32_t)attn_div_up(length, chunk_size),
                   .k_scale  = from->k_scale,
                   .v_scale  = from->v_scale};
    for (uint32_t c = 0; c < seq->n_chunks; c++) {
        uint32_t held = (uint32_t)attn_min(length - (uint64_t)c * chunk_size, chunk_size);
        seq->pages[c] = malloc(table * sizeof(uint32_t));
        memcpy(seq->pages[c], from->pages[c], table * sizeof(uint32_t));
        seq->runs[c] = (attn_kv_run_t){.chunk = c, .length = held, .pages = seq->pages[c]};
        if (held < chunk_size && held % page_size != 0) {
            uint32_t page = world->free_pages[--world->n_free];
            assert_int_equal(
                world_copy_page(world, seq->pages[c][held / page_size], page, held % page_size),
                ATTN_OK);
            seq->pages[c][held / page_size] = page;
        }
    }
}

void
seq_free(seq_t *seq)
{
    for (uint32_t c = 0; c < seq->n_chunks; c++) {
        free(seq->pages[c]);
    }
    *seq = (seq_t){0};
}

attn_problem_entry_t
seq_entry(const seq_t *seq, uint32_t n_q)
{
    return (attn_problem_entry_t){
        .kv_length = seq->length, .n_q = n_q, .n_runs = seq->n_chunks, .runs = seq->runs};
}

void
draw_lists(attn_problem_entry_t *entry, const world_t *world, uint32_t lists, uint32_t density,
           uint32_t *indptr, uint32_t *pages)
{
    uint32_t per_chunk =
        (world->shape.chunk_size + world->shape.page_size - 1) / world->shape.page_size;
    uint32_t n = 0;

    indptr[0] = 0;
    for (uint32_t list = 0; list < lists; list++) {
        for (uint32_t r = 0; r < entry->n_runs; r++) {
            uint32_t held =
                (entry->runs[r].length + world->shape.page_size - 1) / world->shape.page_size;
            for (uint32_t p = 0; p < held; p++) {
                if (chance_below(256) < density) {
                    pages[n++] = entry->runs[r].chunk * per_chunk + p;
                }
            }
        }
        indptr[list + 1] = n;
    }
    entry->n_lists       = lists;
    entry->sparse_indptr = indptr;
    entry->sparse_pages  = pages;
}

attn_problem_t
world_problem(const world_t *world, const attn_problem_entry_t *entries, uint32_t n)
{
    const shape_t *s = &world->shape;
    return (attn_problem_t){.n          = n,
                            .entries    = entries,
                            .q_heads    = s->q_heads,
                            .kv_heads   = s->kv_heads,
                            .head_dim_k = s->d_k,
                            .head_dim_v = s->d_v,
                            .page_size  = s->page_size,
                            .chunk_size = s->chunk_size,
                            .causal     = true};
}

/* ---- running ---- */

void *
random_q(const world_t *world, uint64_t queries, float scale)
{
    uint64_t n = queries * world->shape.q_heads * world->shape.d_k;
    void *q    = malloc((n + 1) * attn_dtype_size(world->shape.q_dtype));
    fill_random(q, world->shape.q_dtype, n, scale);
    return q;
}

static void *
poisoned(uint64_t bytes)
{
    void *p = aligned_alloc(64, attn_div_up(bytes + 1, 64) * 64);
    assert_non_null(p);
    memset(p, 0xff, bytes);
    return p;
}

static attn_status_t
attend(const world_t *world, const attn_plan_t *plan, const attn_layer_t *layer, const void *q,
       result_t *result)
{
    const shape_t *s     = &world->shape;
    uint64_t o_n         = result->o_rows * s->q_heads * s->d_v;
    void *o              = poisoned(o_n * attn_dtype_size(s->o_dtype));
    attn_answer_t answer = {.o       = o,
                            .o_dtype = s->o_dtype,
                            .lse     = result->lse,
                            .a       = result->a,
                            .l       = result->l,
                            .e       = result->e};
    attn_workspace_t *space;
    assert_int_equal(
        world->backend->ops->workspace_create(world->backend, plan, s->q_dtype, s->o_dtype, &space),
        ATTN_OK);
    attn_status_t status = world->backend->ops->attend(world->backend, plan, &world->kv, layer, q,
                                                       s->q_dtype, space, &answer);
    world->backend->ops->workspace_destroy(world->backend, space);
    attn_convert(result->o, ATTN_F32, o, s->o_dtype, o_n);
    free(o);
    return status;
}

attn_status_t
try_run(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
        const void *q, uint32_t parallelism, result_t *result)
{
    const shape_t *s = &world->shape;
    attn_plan_t *plan;

    *result = (result_t){0};
    if (conformance_on("cuda")) { /* which cuts the plan itself */
        attn_cuda_cut_for(world->backend, parallelism == 16 ? 0 : parallelism * 9 - 8);
        parallelism = 1;
    }
    attn_status_t status = attn_plan_build(problem, parallelism, world->few, world->many, &plan);
    if (status != ATTN_OK) {
        return status;
    }
    attn_plan_describe(plan, &result->info);
    result->o_rows = result->info.o_rows;
    result->states = result->info.states;
    result->o      = poisoned(result->o_rows * s->q_heads * s->d_v * sizeof(float));
    result->lse    = poisoned(result->o_rows * s->q_heads * sizeof(float));
    result->a      = poisoned(result->states * s->d_v * sizeof(float));
    result->l      = poisoned(result->states * sizeof(float));
    result->e      = poisoned(result->states * sizeof(int32_t));
    status         = attend(world, plan, layer, q, result);
    attn_plan_free(plan);
    return status;
}

void
run(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer, const void *q,
    uint32_t parallelism, result_t *result)
{
    if (try_run(world, problem, layer, q, parallelism, result) != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
}

void
result_free(result_t *result)
{
    free(result->o);
    free(result->lse);
    free(result->a);
    free(result->l);
    free(result->e);
    *result = (result_t){0};
}

/* ---- judgement ---- */

static double
tolerance_of_type(attn_dtype_t dtype)
{
    return dtype == ATTN_F32 ? 1e-5 : dtype == ATTN_F16 ? 1e-3 : 1e-2;
}

/* Matrix units take weights of the type of KV. */
static double
tolerance_of(const shape_t *shape)
{
    double t = tolerance_of_type(shape->o_dtype);

    return conformance_on("cuda") ? fmax(t, tolerance_of_type(shape->kv_dtype)) : t;
}

static void
check_row(const world_t *world, uint64_t row, const float *o, float lse,
          const attn_oracle_t *oracle)
{
    uint32_t d   = world->shape.d_v;
    double slack = 0x1p-20 * oracle->kappa[row];
    double bound = (tolerance_of(&world->shape) + slack) * oracle->v_max[row];

    for (uint32_t i = 0; i < d; i++) {
        double want = oracle->o[row * d + i];
        if (!(fabs(o[i] - want) <= bound)) {
            fail_msg("row %llu, head %llu: o[%u] is %.9g, must be %.9g within %.3g",
                     (unsigned long long)(row / world->shape.q_heads),
                     (unsigned long long)(row % world->shape.q_heads), i, (double)o[i], want,
                     bound);
        }
    }
    double want = oracle->lse[row];
    bool same   = want == -INFINITY ? lse == -INFINITY
                                    : fabs(lse - want) <= 1e-5 * fmax(1, fabs(want)) + slack;
    if (!same) {
        fail_msg("row %llu: lse is %.9g, must be %.9g", (unsigned long long)row, (double)lse, want);
    }
}

void
check_result(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer,
             const void *q, const result_t *result)
{
    uint32_t d           = world->shape.d_v;
    uint64_t rows        = result->info.queries * world->shape.q_heads;
    attn_oracle_t oracle = {.o     = malloc((rows * d + 1) * sizeof(double)),
                            .lse   = malloc((rows + 1) * sizeof(double)),
                            .kappa = malloc((rows + 1) * sizeof(double)),
                            .v_max = malloc((rows + 1) * sizeof(double))};

    assert_int_equal(result->o_rows, result->info.queries);
    assert_int_equal(
        attn_oracle_attend(problem, &world->mirror, layer, q, world->shape.q_dtype, &oracle),
        ATTN_OK);
    for (uint64_t row = 0; row < rows; row++) {
        check_row(world, row, result->o + row * d, result->lse[row], &oracle);
    }
    free(oracle.o);
    free(oracle.lse);
    free(oracle.kappa);
    free(oracle.v_max);
}

void
check(const world_t *world, const attn_problem_t *problem, const attn_layer_t *layer)
{
    uint64_t queries = 0;
    result_t result;

    for (uint32_t i = 0; i < problem->n; i++) {
        queries += problem->entries[i].n_q;
    }
    void *q = random_q(world, queries, 1);
    run(world, problem, layer, q, chance_in(1, 16), &result);
    check_result(world, problem, layer, q, &result);
    result_free(&result);
    free(q);
}
