/*
 * speed.c: attention over one made-up sequence, timed. Over a single page for what it costs to
 * begin at all; over as much as gives every thread some, few enough to lie in a cache, for what the
 * kernels compute: with one query of 4 packed rows, and with 32 of them, for kernels treat few and
 * many rows differently. The best of some rounds counts, as for read bandwidth: what disturbs only
 * makes it slower; but of beginning the median, for waking up is part of it.
 */
#include "engine/speed.h"

#include "balancer/plan.h"
#include "base/checked.h"
#include "base/clock.h"

#include <stdlib.h>

#define DIM 128u
#define GROUP 4u
#define PAGE 16u
#define TOKENS_LEAST 1024u
#define TOKENS_MOST 16384u
#define HEADS_LEAST 2u
#define HEADS_MOST 8u
#define MANY_QUERIES 32u
#define ROUNDS 9u
#define ROUNDS_LEAST 4u                   /* one that was disturbed is not to be the best of all */
#define BUDGET_NS (1500 * UINT64_C(1000)) /* of one figure, if that allows so many */

typedef struct bed {
    attn_backend_t *backend;
    uint32_t heads, tokens;
    attn_kv_t kv;
    uint64_t bytes; /* of k, and of v */
    uint32_t *pages, *offsets;
    void *rows; /* of any tensor: q, and k, v while they are stored */
    void *o;
} bed_t;

/* Enough for four leaves of 128 tokens a thread or CTA. */
static void
settle_size(bed_t *bed)
{
    uint32_t threads = bed->backend->ops->parallelism(bed->backend);

    bed->heads  = (uint32_t)attn_min(attn_max(threads, HEADS_LEAST), HEADS_MOST);
    bed->tokens = TOKENS_LEAST;
    while (bed->tokens < TOKENS_MOST &&
           (uint64_t)bed->tokens * bed->heads < (uint64_t)threads * 4 * 128) {
        bed->tokens *= 2;
    }
}

/* n elements of about the size that keys have. */
static void
fill(void *to, attn_dtype_t dtype, uint64_t n)
{
    uint64_t state = 1, size = attn_dtype_size(dtype);
    float block[DIM];

    for (uint64_t i = 0; i < n; i += DIM) {
        for (uint32_t j = 0; j < DIM; j++) {
            state    = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            block[j] = (float)(int32_t)(state >> 32) * (1.7f / 2147483648.0f);
        }
        attn_convert((char *)to + i * size, dtype, block, ATTN_F32, DIM);
    }
}

static attn_status_t
bed_open(bed_t *bed, attn_dtype_t dtype)
{
    const attn_backend_ops_t *ops = bed->backend->ops;
    uint64_t row                  = (uint64_t)bed->heads * DIM * attn_dtype_size(dtype);
    uint64_t per_page             = (uint64_t)bed->heads * PAGE * DIM;

    bed->bytes   = bed->tokens * row;
    bed->kv      = (attn_kv_t){.k_page_stride = per_page,
                               .v_page_stride = per_page,
                               .n_pages       = bed->tokens / PAGE,
                               .dtype         = dtype,
                               .kv_heads      = bed->heads,
                               .head_dim_k    = DIM,
                               .head_dim_v    = DIM,
                               .page_size     = PAGE,
                               .chunk_size    = bed->tokens};
    bed->pages   = calloc(bed->tokens, sizeof(*bed->pages));
    bed->offsets = calloc(bed->tokens, sizeof(*bed->offsets));
    bed->rows    = malloc(attn_max(bed->bytes, MANY_QUERIES * GROUP * row));
    bed->o       = malloc(MANY_QUERIES * GROUP * row);
    if (bed->pages == NULL || bed->offsets == NULL || bed->rows == NULL || bed->o == NULL ||
        ops->slab_alloc(bed->backend, bed->bytes, &bed->kv.k) != ATTN_OK ||
        ops->slab_alloc(bed->backend, bed->bytes, &bed->kv.v) != ATTN_OK) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t t = 0; t < bed->tokens; t++) {
        bed->pages[t]   = t / PAGE;
        bed->offsets[t] = t % PAGE;
    }
    fill(bed->rows, dtype, (uint64_t)bed->tokens * bed->heads * DIM);
    return ops->append(bed->backend, &bed->kv, bed->pages, bed->offsets, bed->tokens, bed->rows,
                       bed->rows);
}

static void
bed_close(bed_t *bed)
{
    const attn_backend_ops_t *ops = bed->backend->ops;

    if (bed->kv.k != NULL) {
        ops->slab_free(bed->backend, bed->kv.k, bed->bytes);
    }
    if (bed->kv.v != NULL) {
        ops->slab_free(bed->backend, bed->kv.v, bed->bytes);
    }
    free(bed->pages);
    free(bed->offsets);
    free(bed->rows);
    free(bed->o);
    bed->kv    = (attn_kv_t){0};
    bed->pages = bed->offsets = NULL;
    bed->rows = bed->o = NULL;
}

static int
by_length(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Rounds of a plan: of ns[n], ascending, how long each took. @return how many, 0 if one failed */
static uint32_t
time_rounds(bed_t *bed, const attn_plan_t *plan, uint64_t ns[ROUNDS])
{
    const attn_backend_ops_t *ops = bed->backend->ops;
    attn_layer_t layer            = {.causal = true};
    attn_answer_t answer          = {.o = bed->o, .o_dtype = bed->kv.dtype};
    attn_workspace_t *space;
    uint64_t spent = 0;
    uint32_t n     = 0;
    bool warm      = false;

    if (ops->workspace_create(bed->backend, plan, bed->kv.dtype, bed->kv.dtype, &space) !=
        ATTN_OK) {
        return 0;
    }
    while (n < ROUNDS && (n < ROUNDS_LEAST || spent < BUDGET_NS)) {
        uint64_t start = attn_now_ns();
        if (ops->attend(bed->backend, plan, &bed->kv, &layer, bed->rows, bed->kv.dtype, space,
                        &answer) != ATTN_OK) {
            n = 0;
            break;
        }
        ns[n] = attn_now_ns() - start;
        spent += ns[n];
        n += warm; /* the first brings KV into the cache */
        warm = true;
    }
    ops->workspace_destroy(bed->backend, space);
    qsort(ns, n, sizeof(*ns), by_length);
    return n;
}

/* The page numbers of a run are one a page: bed->pages has one a token. */
static uint32_t
time_attend(bed_t *bed, uint32_t tokens, uint32_t queries, uint64_t ns[ROUNDS])
{
    const attn_backend_ops_t *ops = bed->backend->ops;
    uint32_t few, many;
    attn_plan_t *plan = NULL;

    for (uint32_t p = 0; p < bed->tokens / PAGE; p++) {
        bed->pages[p] = p;
    }
    attn_kv_run_t run          = {.length = tokens, .pages = bed->pages};
    attn_problem_entry_t entry = {.kv_length = tokens, .n_q = queries, .n_runs = 1, .runs = &run};
    attn_problem_t problem     = {.n          = 1,
                                  .entries    = &entry,
                                  .q_heads    = bed->heads * GROUP,
                                  .kv_heads   = bed->heads,
                                  .head_dim_k = DIM,
                                  .head_dim_v = DIM,
                                  .page_size  = PAGE,
                                  .chunk_size = bed->tokens,
                                  .causal     = true};

    ops->leaf_sizes(bed->backend, &few, &many);
    attn_status_t status =
        attn_plan_build(&problem, ops->parallelism(bed->backend), few, many, &plan);
    uint32_t n = status == ATTN_OK ? time_rounds(bed, plan, ns) : 0;
    attn_plan_free(plan);
    return n;
}

/* FLOP/s beyond what it takes to begin; 0: not known. */
static double
flops_of(bed_t *bed, uint32_t queries, double attend_seconds)
{
    uint64_t ns[ROUNDS];

    if (time_attend(bed, bed->tokens, queries, ns) == 0) {
        return 0;
    }
    double seen    = bed->tokens - (queries - 1) / 2.0;
    double seconds = (double)ns[0] * 1e-9;
    seconds        = seconds > 2 * attend_seconds ? seconds - attend_seconds : seconds / 2;
    return seconds > 0 ? 2 * seen * queries * bed->heads * GROUP * (DIM + DIM) / seconds : 0;
}

void
engine_speed_measure(attn_backend_t *backend, cost_worker_t *speed)
{
    bed_t bed         = {.backend = backend};
    attn_geometry_t g = {.layers = 1, .head_dim_k = DIM, .head_dim_v = DIM, .page_size = PAGE};
    uint64_t ns[ROUNDS];

    *speed = (cost_worker_t){.read_bandwidth = backend->ops->read_bandwidth(backend)};
    settle_size(&bed);
    g.size       = sizeof(g);
    g.kv_heads   = bed.heads;
    g.q_heads    = bed.heads * GROUP;
    g.chunk_size = bed.tokens;
    for (attn_dtype_t d = ATTN_F32; d < COST_DTYPES; d++) {
        g.kv_dtype = d;
        if (backend->ops->supports(backend, &g) == ATTN_OK && bed_open(&bed, d) == ATTN_OK) {
            uint32_t n    = time_attend(&bed, PAGE, 1, ns);
            double attend = n > 0 ? (double)ns[n / 2] * 1e-9 : 0;

            speed->few_flops[d]   = flops_of(&bed, 1, attend);
            speed->many_flops[d]  = flops_of(&bed, MANY_QUERIES, attend);
            speed->attend_seconds = attend > speed->attend_seconds ? attend : speed->attend_seconds;
        }
        bed_close(&bed);
    }
}
