/* begin_plan.c: planning alone, for CPUs and for GPUs, on lengths and page lists. */
#include "bench/begin.h"

#include "balancer/plan.h"
#include "kernels/cuda/image_host.h"

#include <stdlib.h>

#define PAGE BEGIN_PAGE
#define CPU_LEAF 128u
#define CPU_THREADS 16u
#define GPU_CHUNK 8192u
#define GPU_CTAS 132u

typedef struct batch {
    attn_problem_t problem;
    attn_problem_entry_t *entries;
    attn_kv_run_t *runs;
    uint32_t *pages;
} batch_t;

/* Decodes with the page lists of sequences, of which the first tokens may be those of all. */
static void
make_batch(batch_t *b, const begin_case_t *c, uint32_t chunk)
{
    uint32_t runs = (c->context + chunk - 1) / chunk, pages = chunk / PAGE, next = 0;

    *b         = (batch_t){.problem = {.n          = c->sequences,
                                       .q_heads    = 32,
                                       .kv_heads   = 8,
                                       .head_dim_k = 128,
                                       .head_dim_v = 128,
                                       .page_size  = PAGE,
                                       .chunk_size = chunk,
                                       .causal     = true}};
    b->entries = calloc(c->sequences, sizeof(*b->entries));
    b->runs    = calloc((size_t)c->sequences * runs, sizeof(*b->runs));
    b->pages   = calloc((size_t)c->sequences * runs * pages, sizeof(*b->pages));

    b->problem.entries = b->entries;
    for (uint32_t e = 0; e < c->sequences; e++) {
        uint32_t length    = c->context - e % 64; /* decode loops have no equal lengths */
        attn_kv_run_t *run = b->runs + (size_t)e * runs;
        b->entries[e] =
            (attn_problem_entry_t){.kv_length = length, .n_q = 1, .n_runs = runs, .runs = run};
        for (uint32_t r = 0; r < runs; r++) {
            uint32_t *list = b->pages + ((size_t)e * runs + r) * pages;
            run[r] =
                (attn_kv_run_t){.chunk  = r,
                                .length = length - r * chunk < chunk ? length - r * chunk : chunk,
                                .pages  = list};
            for (uint32_t p = 0; p < pages; p++) {
                bool common = e > 0 && r * chunk + (p + 1) * PAGE <= c->shared;
                list[p]     = common ? b->pages[r * pages + p] : next++;
            }
            if ((r + 1) * chunk <= c->shared) { /* forks share the chunk, and so its list */
                run[r].pages = b->pages + r * pages;
            }
        }
    }
}

static void
free_batch(batch_t *b)
{
    free(b->entries);
    free(b->runs);
    free(b->pages);
}

void
begin_plan_time(const begin_options_t *options, const begin_case_t *c, uint32_t chunk,
                const char *side)
{
    static samples_t samples;
    attn_plan_t *plan = NULL;
    batch_t b;

    make_batch(&b, c, chunk);
    for (uint32_t i = 0; i < options->rounds;
         i++) { /* in the last one's memory, as an engine does */
        samples_start(&samples, options);
        result_must(attn_plan_renew(&b.problem, CPU_THREADS, CPU_LEAF, CPU_LEAF, &plan));
        samples_stop(&samples, 0);
    }
    attn_plan_free(plan);
    samples_report(&samples, options, c, side, 50);
    free_batch(&b);
}

void
begin_image_time(const begin_options_t *options, const begin_case_t *c)
{
    static samples_t planned, tables, whole;
    attn_plan_t *plan  = NULL;
    cuda_image_t image = {0};
    uint8_t *block     = NULL; /* stands for pinned memory */
    batch_t b;

    make_batch(&b, c, GPU_CHUNK);
    for (uint32_t i = 0; i < options->rounds; i++) {
        samples_start(&planned, options);
        result_must(attn_plan_renew(&b.problem, 1, CUDA_LEAF, CUDA_LEAF, &plan));
        samples_stop(&planned, 0);
        tables.start = whole.start = planned.start;
        result_must(cuda_image_build(plan, GPU_CTAS, &image));
        if (block == NULL) {
            block = calloc(1, image.bytes);
        }
        cuda_image_write_tables(&image, block);
        samples_stop(&tables, 0);
        cuda_image_write_pages(&image, block);
        samples_stop(&whole, 0);
    }
    samples_report(&planned, options, c, "gpu_plan", 0);
    samples_report(&tables, options, c, "gpu_tables", 20);
    samples_report(&whole, options, c, "gpu_pages", 0);
    attn_plan_free(plan);
    cuda_image_free(&image);
    free(block);
    free_batch(&b);
}
