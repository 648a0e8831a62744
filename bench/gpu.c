/*
 * gpu.c: the kernels of a GPU alone: attends of one layer, replayed from a CUDA graph over
 * rotating page tables that together exceed the L2, so that every byte comes from memory.
 *
 *     bench_gpu [--quick] [--json FILE] [POINT...]   all points, or those whose name begins so
 *     bench_gpu --list                               the points as JSON; needs no GPU
 *     bench_gpu --serve                              a point a line from standard input, exactly as
 *                                                    it is called, or "limit": JSON a line back
 *
 * Each answer is held against sums in double before it is timed. bench/gpu runs this beside others.
 */
#include "balancer/plan.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "bench/gpu_check.h"
#include "bench/gpu_grid.h"
#include "bench/gpu_limit.h"
#include "bench/result.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/cuda_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 8192u
#define FILL_BYTES (UINT64_C(64) << 20)
#define RESERVE_BYTES (UINT64_C(1) << 30)
#define GRAPH_BYTES 4e9
#define REPLAYS 9
#define PLANS 5
#define VALUES 4096u

static attn_backend_t *device;
static const cuda_driver_t *cu;
static uint64_t seed = 1;
static result_options_t options;

static void *
must_alloc(uint64_t n)
{
    void *p = calloc(1, n + 1);
    if (p == NULL) {
        fprintf(stderr, "gpu: no memory for %llu bytes\n", (unsigned long long)n);
        exit(1);
    }
    return p;
}

static uint64_t
chance(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* ---- memory ---- */

/* n values from -2 to 2, each as likely as any other: zeros would take less power, and less time.
 */
static void
fill(uint16_t *to, uint64_t n)
{
    static uint16_t values[VALUES];

    if (values[0] == 0) {
        for (uint32_t i = 0; i < VALUES; i++) {
            float x = ((float)i + 0.5f) / (VALUES / 4) - 2.0f;
            attn_convert(&values[i], ATTN_BF16, &x, ATTN_F32, 1);
        }
    }
    for (uint64_t i = 0; i < n; i++) {
        to[i] = values[chance() % VALUES];
    }
}

/* Memory for K and V, full of numbers: some from here, copied on there. */
static void *
slab_open(uint64_t bytes)
{
    uint64_t block = attn_min(FILL_BYTES, bytes);
    uint16_t *host = must_alloc(block);
    void *slab;

    result_must(device->ops->slab_alloc(device, bytes, &slab));
    CUdeviceptr at = (CUdeviceptr)(uintptr_t)slab;
    fill(host, block / 2);
    result_must(CUDA_CALL(cuMemcpyHtoD(at, host, block)));
    for (uint64_t done = block; done < bytes; done += block) {
        result_must(
            CUDA_CALL(cuMemcpyDtoDAsync(at + done, at, attn_min(block, bytes - done), NULL)));
    }
    result_must(CUDA_CALL(cuCtxSynchronize()));
    free(host);
    return slab;
}

/* ---- a point ---- */

/* One rotation: its own pages. */
typedef struct turn {
    attn_problem_entry_t *entries;
    attn_kv_run_t *runs;
    uint32_t *pages;
    uint32_t *lists; /* of each request, one behind the other */
    uint32_t indptr[2];
    attn_problem_t problem;
    attn_plan_t *plan;
    attn_workspace_t *space;
    cuda_args_t args;
} turn_t;

/* Pages of a request whose list names `kept` of n: the last, and others drawn from the rest. */
static void
draw_list(uint32_t *list, uint32_t kept, uint32_t n)
{
    uint32_t left = kept - 1, at = 0;

    for (uint32_t i = 0; i + 1 < n; i++) {
        if (chance() % (n - 1 - i) < left) {
            list[at++] = i;
            left--;
        }
    }
    list[at] = n - 1;
}

/* The runs of entry i, with pages from perm, but for the shared ones, which are the first's. */
static void
lay_entry(turn_t *t, const gpu_point_t *p, uint32_t i, const uint32_t *perm, uint64_t *next,
          uint64_t *run, uint64_t *at)
{
    uint32_t of_chunk = (uint32_t)attn_div_up(CHUNK, p->page), length = p->lengths[i];

    t->entries[i] = (attn_problem_entry_t){.kv_length  = length,
                                           .n_q        = p->queries[i],
                                           .n_runs     = (uint32_t)attn_div_up(length, CHUNK),
                                           .runs       = t->runs + *run,
                                           .dense_from = length - p->queries[i]};
    for (uint32_t c = 0; c * CHUNK < length; c++, ++*run, *at += of_chunk) {
        uint32_t here = (uint32_t)attn_min(CHUNK, length - c * CHUNK);
        t->runs[*run] = (attn_kv_run_t){.chunk = c, .length = here, .pages = t->pages + *at};
        for (uint32_t k = 0; k < attn_div_up(here, p->page); k++) {
            bool common       = i > 0 && (uint64_t)c * CHUNK + (k + 1) * p->page <= p->shared;
            t->pages[*at + k] = common ? t->pages[c * of_chunk + k] : perm[(*next)++];
        }
    }
    if (p->kept > 0) {
        uint32_t *list = t->lists + (uint64_t)i * p->kept;
        draw_list(list, p->kept, (uint32_t)attn_div_up(length, p->page));
        t->entries[i].n_lists       = 1;
        t->entries[i].sparse_indptr = t->indptr;
        t->entries[i].sparse_pages  = list;
    }
}

static void
turn_lay(turn_t *t, const gpu_point_t *p, const uint32_t *perm, uint64_t *next)
{
    uint64_t n_runs = 0, run = 0, at = 0;

    for (uint32_t i = 0; i < p->n; i++) {
        n_runs += attn_div_up(p->lengths[i], CHUNK);
    }
    t->entries   = must_alloc(p->n * sizeof(*t->entries));
    t->runs      = must_alloc(n_runs * sizeof(*t->runs));
    t->pages     = must_alloc(n_runs * attn_div_up(CHUNK, p->page) * sizeof(*t->pages));
    t->lists     = must_alloc((uint64_t)p->n * p->kept * sizeof(*t->lists));
    t->indptr[1] = p->kept;
    for (uint32_t i = 0; i < p->n; i++) {
        lay_entry(t, p, i, perm, next, &run, &at);
    }
    t->problem = (attn_problem_t){.n          = p->n,
                                  .entries    = t->entries,
                                  .q_heads    = p->q_heads,
                                  .kv_heads   = p->kv_heads,
                                  .head_dim_k = p->d,
                                  .head_dim_v = p->d,
                                  .page_size  = p->page,
                                  .chunk_size = CHUNK,
                                  .causal     = true};
}

/* The plan, in the memory of the one before if there is one, and its tables. Microseconds of each,
 * where asked. */
static void
turn_plan(turn_t *t, double *plan_us, double *tables_us)
{
    uint64_t start = attn_now_ns(), middle;
    uint32_t few, many;

    device->ops->leaf_sizes(device, &few, &many);
    result_must(
        attn_plan_renew(&t->problem, device->ops->parallelism(device), few, many, &t->plan));
    middle = attn_now_ns();
    result_must(device->ops->workspace_create(device, t->plan, ATTN_BF16, ATTN_BF16, &t->space));
    if (plan_us != NULL) {
        *plan_us   = (double)(middle - start) / 1e3;
        *tables_us = (double)(attn_now_ns() - middle) / 1e3;
    }
}

static void
turn_close(turn_t *t)
{
    device->ops->workspace_destroy(device, t->space);
    attn_plan_free(t->plan);
    free(t->entries);
    free(t->runs);
    free(t->pages);
    free(t->lists);
}

/* What a point's rotations have in common, and what came of them. */
typedef struct trial {
    const gpu_point_t *point;
    attn_kv_t kv;
    uint64_t queries, slab_bytes;
    uint16_t *q, *o;
    turn_t *turns;
    uint32_t n, reps;
    double us, least_us, most_us, plan_us, tables_us, error;
} trial_t;

/* Microseconds of an attend, from a graph of `reps` times all turns. */
static void
replay(trial_t *t)
{
    CUstream stream = t->turns[0].space->block->stream;
    CUgraph graph;
    CUgraphExec exec;
    CUevent start, stop;
    double us[REPLAYS];

    result_must(CUDA_CALL(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)));
    for (uint32_t i = 0; i < t->reps * t->n; i++) {
        turn_t *turn = &t->turns[i % t->n];
        result_must(cuda_attend_enqueue(turn->space, &t->kv, &turn->args, stream));
    }
    result_must(CUDA_CALL(cuStreamEndCapture(stream, &graph)));
    result_must(CUDA_CALL(cuGraphInstantiateWithFlags(&exec, graph, 0)));
    result_must(CUDA_CALL(cuEventCreate(&start, 0)));
    result_must(CUDA_CALL(cuEventCreate(&stop, 0)));
    for (int i = -2; i < REPLAYS; i++) {
        float ms;
        result_must(CUDA_CALL(cuEventRecord(start, stream)));
        result_must(CUDA_CALL(cuGraphLaunch(exec, stream)));
        result_must(CUDA_CALL(cuEventRecord(stop, stream)));
        result_must(CUDA_CALL(cuStreamSynchronize(stream)));
        result_must(CUDA_CALL(cuEventElapsedTime(&ms, start, stop)));
        us[i < 0 ? 0 : i] = ms * 1e3 / (t->reps * t->n);
    }
    result_must(CUDA_CALL(cuGraphExecDestroy(exec)));
    result_must(CUDA_CALL(cuGraphDestroy(graph)));
    result_must(CUDA_CALL(cuEventDestroy(start)));
    result_must(CUDA_CALL(cuEventDestroy(stop)));
    t->us       = result_quantile(us, REPLAYS, 0.5);
    t->least_us = us[0];
    t->most_us  = us[REPLAYS - 1];
}

/* The median of some plans of the first turn, its memory warm; the last one stays. */
static void
time_plans(trial_t *t)
{
    double plan[PLANS], tables[PLANS];

    turn_plan(&t->turns[0], NULL, NULL);
    for (int i = 0; i < PLANS; i++) {
        device->ops->workspace_destroy(device, t->turns[0].space);
        turn_plan(&t->turns[0], &plan[i], &tables[i]);
    }
    t->plan_us   = result_quantile(plan, PLANS, 0.5);
    t->tables_us = result_quantile(tables, PLANS, 0.5);
}

/* Everything on the device: pages of all turns in random order, plans, queries, one attend each. */
static void
trial_open(trial_t *t)
{
    const gpu_point_t *p = t->point;
    uint64_t per_page = (uint64_t)p->kv_heads * p->page * p->d, next = 0;
    uint64_t n_pages     = gpu_point_pages(p) * t->n;
    attn_layer_t layer   = {.causal = true};
    attn_answer_t answer = {.o_dtype = ATTN_BF16};
    uint32_t *perm       = must_alloc(n_pages * sizeof(*perm));

    t->kv   = (attn_kv_t){.k             = slab_open(t->slab_bytes),
                          .k_page_stride = 2 * per_page,
                          .v_page_stride = 2 * per_page,
                          .n_pages       = n_pages,
                          .dtype         = ATTN_BF16,
                          .kv_heads      = p->kv_heads,
                          .head_dim_k    = p->d,
                          .head_dim_v    = p->d,
                          .page_size     = p->page,
                          .chunk_size    = CHUNK};
    t->kv.v = (uint16_t *)t->kv.k + per_page;
    t->q    = must_alloc(t->queries * p->q_heads * p->d * 2);
    t->o    = must_alloc(t->queries * p->q_heads * p->d * 2);
    fill(t->q, t->queries * p->q_heads * p->d);
    answer.o = t->o;
    for (uint64_t i = 0; i < n_pages; i++) {
        uint64_t j = chance() % (i + 1);
        perm[i]    = perm[j];
        perm[j]    = (uint32_t)i;
    }
    for (uint32_t i = 0; i < t->n; i++) {
        turn_t *turn = &t->turns[i];
        turn_lay(turn, p, perm, &next);
        if (i == 0) {
            time_plans(t);
        } else {
            turn_plan(turn, NULL, NULL);
        }
        memset(t->o, 0xff, t->queries * p->q_heads * p->d * 2);
        result_must(device->ops->attend(device, turn->plan, &t->kv, &layer, t->q, ATTN_BF16,
                                        turn->space, &answer));
        result_must(cuda_attend_prepare(turn->space, &t->kv, &layer, t->q, &answer, &turn->args));
        result_must(CUDA_CALL(cuCtxSynchronize()));
    }
    free(perm);
}

static void
trial_close(trial_t *t)
{
    for (uint32_t i = 0; i < t->n; i++) {
        turn_close(&t->turns[i]);
    }
    device->ops->slab_free(device, t->kv.k, t->slab_bytes);
    free(t->turns);
    free(t->q);
    free(t->o);
}

static void
report(const trial_t *t)
{
    const gpu_point_t *p      = t->point;
    const cuda_image_t *image = &t->turns[0].space->image;
    double bytes = gpu_point_bytes(p), flops = gpu_point_flops(p);

    if (options.file != stdout) {
        printf("%-26s %9.2f us  %6.3f TB/s  %7.1f TFLOP/s  plan %.0f + tables %.0f us, %llu KB, "
               "items %u states %llu, error %.1e\n",
               p->name, t->us, bytes / t->us / 1e6, flops / t->us / 1e6, t->plan_us, t->tables_us,
               (unsigned long long)image->bytes / 1024, image->n_items,
               (unsigned long long)image->slots, t->error);
        fflush(stdout);
    }
    char error[32] = "null"; /* what JSON has for what is no number */
    if (isfinite(t->error)) {
        snprintf(error, sizeof(error), "%.3e", t->error);
    }
    result_json(&options, "gpu",
                "\"case\":\"%s\",\"us\":%.4f,\"least_us\":%.4f,\"most_us\":%.4f,\"plan_us\":%.2f,"
                "\"tables_us\":%.2f,\"table_bytes\":%llu,\"items\":%u,\"states\":%llu,"
                "\"turns\":%u,\"reps\":%u,\"error\":%s",
                p->name, t->us, t->least_us, t->most_us, t->plan_us, t->tables_us,
                (unsigned long long)image->bytes, image->n_items, (unsigned long long)image->slots,
                t->n, t->reps, error);
}

/* What it would need of the device's memory, and what is free. */
static bool
fits(const trial_t *t, uint64_t *need, uint64_t *free_bytes)
{
    attn_device_t info;
    uint64_t rows = t->queries * t->point->q_heads * t->point->d * 2;

    result_must(device->ops->device(device, &info));
    *need       = t->slab_bytes + RESERVE_BYTES + 4 * rows * t->n;
    *free_bytes = info.free_bytes;
    return *need <= *free_bytes;
}

static void
measure(const gpu_point_t *p)
{
    double bytes = gpu_point_bytes(p), flops = gpu_point_flops(p);
    trial_t t   = {.point = p, .n = gpu_point_turns(p)};
    double work = bytes > flops / 100 ? bytes : flops / 100;
    double many = GRAPH_BYTES / (work * t.n);
    uint64_t need, free_bytes;

    t.reps       = many < 1 ? 1 : many > 8 ? 8 : (uint32_t)many;
    t.slab_bytes = gpu_point_pages(p) * t.n * p->kv_heads * p->page * p->d * 4;
    for (uint32_t i = 0; i < p->n; i++) {
        t.queries += p->queries[i];
    }
    if (!fits(&t, &need, &free_bytes)) {
        if (options.file != stdout) {
            printf("%-26s needs %.1f GB, %.1f are free\n", p->name, (double)need / 1e9,
                   (double)free_bytes / 1e9);
        }
        result_json(&options, "gpu", "\"case\":\"%s\",\"absent\":\"needs %.1f GB, %.1f are free\"",
                    p->name, (double)need / 1e9, (double)free_bytes / 1e9);
        return;
    }
    t.turns = must_alloc(t.n * sizeof(*t.turns));
    trial_open(&t);
    t.error = gpu_check(device, p, &t.turns[t.n - 1].problem, &t.kv, t.q, t.o);
    replay(&t);
    report(&t);
    trial_close(&t);
}

/* ---- the program ---- */

static void
measure_limit(void)
{
    gpu_limit_t limit;
    attn_device_t info;

    result_must(device->ops->device(device, &info));
    result_must(gpu_limit_measure(0, &limit));
    if (options.file != stdout) {
        printf("%s, kind %s, %.0f GB, reads %.3f TB/s (loads %.3f, copies of %u B, %u at a time "
               "%.3f)\n",
               info.name, device->ops->kind(device), (double)info.total_bytes / 1e9,
               limit.read / 1e12, limit.loads / 1e12, limit.tile, limit.slots, limit.bulk / 1e12);
        fflush(stdout);
    }
    result_json(&options, "gpu",
                "\"case\":\"limit\",\"device\":\"%s\",\"kind\":\"%s\",\"memory\":%llu,"
                "\"read\":%.6g,\"loads\":%.6g,\"bulk\":%.6g,\"tile\":%u,\"slots\":%u",
                info.name, device->ops->kind(device), (unsigned long long)info.total_bytes,
                limit.read, limit.loads, limit.bulk, limit.tile, limit.slots);
}

static void
serve(const gpu_point_t *points, uint32_t n)
{
    char line[128];

    options.file = stdout;
    while (fgets(line, sizeof(line), stdin) != NULL) {
        const gpu_point_t *point  = NULL;
        line[strcspn(line, "\n")] = '\0';
        for (uint32_t i = 0; i < n; i++) {
            point = strcmp(points[i].name, line) == 0 ? &points[i] : point;
        }
        if (point != NULL) {
            measure(point);
        } else if (strcmp(line, "limit") == 0) {
            measure_limit();
        } else {
            result_json(&options, "gpu", "\"case\":\"?\",\"absent\":\"there is no such point\"");
        }
    }
}

static void
measure_all(const gpu_point_t *points, uint32_t n, int n_words, char **words)
{
    measure_limit();
    for (uint32_t i = 0; i < n; i++) {
        bool wanted = n_words == 0;
        for (int w = 0; w < n_words; w++) {
            wanted = wanted || strncmp(points[i].name, words[w], strlen(words[w])) == 0;
        }
        if (wanted && (points[i].quick || !options.quick)) {
            measure(&points[i]);
        }
    }
}

int
main(int argc, char **argv)
{
    int n_args = result_options(&options, argc, argv);
    uint32_t n;
    gpu_point_t *points = gpu_grid_make(&n);
    bool list           = n_args == 2 && strcmp(argv[1], "--list") == 0;

    for (uint32_t i = 0; i < n && list; i++) {
        gpu_point_write(stdout, &points[i]);
    }
    if (!list) {
        result_must(attn_cuda_backend_ops.open(0, 0, &device));
        cu                 = cuda_driver();
        cuda_visit_t visit = cuda_enter((cuda_backend_t *)device); /* driver calls of our own */
        result_must(visit.status);
        if (n_args == 2 && strcmp(argv[1], "--serve") == 0) {
            serve(points, n);
        } else {
            measure_all(points, n, n_args - 1, argv + 1);
        }
        cuda_leave(&visit);
        device->ops->close(device);
    }
    gpu_grid_free(points, n);
    return 0;
}
