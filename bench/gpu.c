/*
 * gpu.c: the kernels of a GPU alone: attends of one layer, replayed from a CUDA graph over
 * rotating page tables that together exceed the L2, so that every byte comes from memory.
 *
 *     gpu [POINT...]       all points, or those whose name begins with one of the words
 *
 * A line a point: time of an attend (median of replays), bytes of K and V over it, the same with
 * the leaves of the tree dealt freely (a line "plan" tells what planning and tables cost).
 */
#include "balancer/plan.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/cuda_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 8192u
#define ROTATE_BYTES 200e6
#define ROTATIONS_MAX 24u
#define GRAPH_BYTES 4e9
#define REPLAYS 9

static attn_backend_t *device;
static const cuda_driver_t *cu;
static uint64_t seed = 1;

static void
must(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "gpu: %s\n", attn_last_error());
        exit(1);
    }
}

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

typedef struct point {
    char name[64];
    uint32_t q_heads, kv_heads, d, page;
    uint32_t n, *lengths, *queries;
    uint32_t shared; /* tokens of a common prefix */
} point_t;

/* ---- lengths ---- */

static uint32_t *
even(uint32_t n, uint32_t length)
{
    uint32_t *v = must_alloc(n * sizeof(*v));
    for (uint32_t i = 0; i < n; i++) {
        v[i] = length;
    }
    return v;
}

/* Lengths in proportion to 1 / rank, in random order. */
static uint32_t *
zipf(uint32_t n, uint32_t mean)
{
    uint32_t *v = must_alloc(n * sizeof(*v));
    double sum  = 0;

    for (uint32_t i = 0; i < n; i++) {
        sum += 1.0 / (i + 1);
    }
    for (uint32_t i = 0; i < n; i++) {
        double x   = n * (double)mean / (i + 1) / sum;
        uint32_t j = (uint32_t)(chance() % (i + 1));
        v[i]       = v[j];
        v[j]       = x < 1 ? 1 : (uint32_t)lround(x);
    }
    return v;
}

/* ---- memory ---- */

static void *slab;
static uint64_t slab_bytes = UINT64_C(24) << 30;

/* Random numbers of either type, of modest size: 64 MB from here, copied on there. */
static void
fill_slab(void)
{
    const uint64_t block = UINT64_C(64) << 20;
    uint16_t *host       = must_alloc(block);
    CUdeviceptr at;

    must(device->ops->slab_alloc(device, slab_bytes, &slab));
    at = (CUdeviceptr)(uintptr_t)slab;
    for (uint64_t i = 0; i < block / 2; i++) {
        float x = (float)((int64_t)(chance() % 4001) - 2000) / 1000.0f;
        attn_convert(&host[i], ATTN_BF16, &x, ATTN_F32, 1);
    }
    must(CUDA_CALL(cuMemcpyHtoD(at, host, block)));
    for (uint64_t done = block; done < slab_bytes; done += block) {
        must(CUDA_CALL(cuMemcpyDtoDAsync(at + done, at, attn_min(block, slab_bytes - done), NULL)));
    }
    must(CUDA_CALL(cuCtxSynchronize()));
    free(host);
}

/* ---- a point ---- */

/* One rotation: its own pages. */
typedef struct turn {
    attn_problem_entry_t *entries;
    attn_kv_run_t *runs;
    uint32_t *pages;
    attn_problem_t problem;
    attn_plan_t *plan;
    attn_workspace_t *space;
    cuda_args_t args;
} turn_t;

static void
turn_open(turn_t *t, const point_t *p, const uint32_t *perm, uint64_t *next, uint64_t n_perm)
{
    uint64_t n_runs = 0, n_pages = 0;
    uint32_t few, many;

    for (uint32_t i = 0; i < p->n; i++) {
        n_runs += attn_div_up(p->lengths[i], CHUNK);
        n_pages += attn_div_up(p->lengths[i], CHUNK) * attn_div_up(CHUNK, p->page);
    }
    t->entries = must_alloc(p->n * sizeof(*t->entries));
    t->runs    = must_alloc(n_runs * sizeof(*t->runs));
    t->pages   = must_alloc(n_pages * sizeof(*t->pages));
    uint64_t r = 0, at = 0;
    uint32_t *first = NULL;
    for (uint32_t i = 0; i < p->n; i++) {
        t->entries[i] =
            (attn_problem_entry_t){.kv_length = p->lengths[i],
                                   .n_q       = p->queries[i],
                                   .n_runs    = (uint32_t)attn_div_up(p->lengths[i], CHUNK),
                                   .runs      = t->runs + r};
        for (uint32_t c = 0; c * CHUNK < p->lengths[i]; c++, r++) {
            uint32_t length = (uint32_t)attn_min(CHUNK, p->lengths[i] - c * CHUNK);
            t->runs[r]      = (attn_kv_run_t){.chunk = c, .length = length, .pages = t->pages + at};
            for (uint32_t k = 0; k < attn_div_up(length, p->page); k++) {
                bool common = first != NULL && (uint64_t)c * CHUNK + (k + 1) * p->page <= p->shared;
                t->pages[at + k] =
                    common ? first[c * attn_div_up(CHUNK, p->page) + k] : perm[(*next)++ % n_perm];
            }
            at += attn_div_up(CHUNK, p->page);
        }
        first = t->pages;
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
    device->ops->leaf_sizes(device, &few, &many);
    must(attn_plan_build(&t->problem, device->ops->parallelism(device), few, many, &t->plan));
    must(device->ops->workspace_create(device, t->plan, ATTN_BF16, ATTN_BF16, &t->space));
}

static void
turn_close(turn_t *t)
{
    device->ops->workspace_destroy(device, t->space);
    attn_plan_free(t->plan);
    free(t->entries);
    free(t->runs);
    free(t->pages);
}

static int
by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Median microseconds of an attend, from a graph of `reps` times all turns. */
static double
replay(turn_t *turns, uint32_t n, uint32_t reps, const attn_kv_t *kv)
{
    CUstream stream = turns[0].space->block->stream;
    CUgraph graph;
    CUgraphExec exec;
    CUevent start, stop;
    float ms[REPLAYS];

    must(CUDA_CALL(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)));
    for (uint32_t r = 0; r < reps; r++) {
        for (uint32_t t = 0; t < n; t++) {
            must(cuda_attend_enqueue(turns[t].space, kv, &turns[t].args, stream));
        }
    }
    must(CUDA_CALL(cuStreamEndCapture(stream, &graph)));
    must(CUDA_CALL(cuGraphInstantiateWithFlags(&exec, graph, 0)));
    must(CUDA_CALL(cuEventCreate(&start, 0)));
    must(CUDA_CALL(cuEventCreate(&stop, 0)));
    for (int i = -2; i < REPLAYS; i++) {
        must(CUDA_CALL(cuEventRecord(start, stream)));
        must(CUDA_CALL(cuGraphLaunch(exec, stream)));
        must(CUDA_CALL(cuEventRecord(stop, stream)));
        must(CUDA_CALL(cuStreamSynchronize(stream)));
        must(CUDA_CALL(cuEventElapsedTime(&ms[i < 0 ? 0 : i], start, stop)));
    }
    must(CUDA_CALL(cuGraphExecDestroy(exec)));
    must(CUDA_CALL(cuGraphDestroy(graph)));
    must(CUDA_CALL(cuEventDestroy(start)));
    must(CUDA_CALL(cuEventDestroy(stop)));
    qsort(ms, REPLAYS, sizeof(ms[0]), by_value);
    return ms[REPLAYS / 2] * 1e3 / (reps * n);
}

/* The last query of the last entry, first and last head, against a plain sum in double: a guard
 * against measuring nonsense (the conformance suite is the judge). */
static double
error_of(const point_t *p, const turn_t *t, const attn_kv_t *kv, const uint16_t *q,
         const uint16_t *o, uint64_t queries)
{
    const attn_problem_entry_t *entry = &t->entries[p->n - 1];
    uint64_t n = entry->kv_length, row = (uint64_t)p->kv_heads * p->d;
    double worst = 0;

    if (n > 20000) {
        return -1;
    }
    uint32_t *pages = must_alloc(n * 4), *offsets = must_alloc(n * 4);
    uint16_t *k = must_alloc(n * row * 2), *v = must_alloc(n * row * 2);
    double *weights = must_alloc(n * 8);
    for (uint64_t i = 0; i < n; i++) {
        pages[i]   = entry->runs[i / CHUNK].pages[i % CHUNK / p->page];
        offsets[i] = (uint32_t)(i % CHUNK % p->page);
    }
    must(device->ops->read(device, kv, pages, offsets, n, k, v));
    for (uint32_t head = 0; head < p->q_heads; head += p->q_heads - 1) {
        uint64_t at   = ((queries - 1) * p->q_heads + head) * p->d;
        uint32_t from = head / (p->q_heads / p->kv_heads) * p->d;
        double sum = 0, top = -1e300;
        float a, b;
        for (uint64_t i = 0; i < n; i++) {
            double x = 0;
            for (uint32_t j = 0; j < p->d; j++) {
                attn_convert(&a, ATTN_F32, &q[at + j], ATTN_BF16, 1);
                attn_convert(&b, ATTN_F32, &k[i * row + from + j], ATTN_BF16, 1);
                x += (double)a * b;
            }
            weights[i] = x / sqrt(p->d);
            top        = weights[i] > top ? weights[i] : top;
        }
        for (uint64_t i = 0; i < n; i++) {
            sum += weights[i] = exp(weights[i] - top);
        }
        for (uint32_t j = 0; j < p->d; j++) {
            double want = 0;
            for (uint64_t i = 0; i < n; i++) {
                attn_convert(&b, ATTN_F32, &v[i * row + from + j], ATTN_BF16, 1);
                want += weights[i] / sum * b;
            }
            attn_convert(&a, ATTN_F32, &o[at + j], ATTN_BF16, 1);
            double off = fabs(a - want);
            worst      = off > worst || !(off == off) ? off : worst;
        }
        if (p->q_heads == 1) {
            break;
        }
    }
    free(pages);
    free(offsets);
    free(k);
    free(v);
    free(weights);
    return worst;
}

static void
measure(const point_t *p)
{
    uint64_t per_page = (uint64_t)p->kv_heads * p->page * p->d;
    uint64_t n_pages = slab_bytes / (2 * per_page * 2), next = 0, queries = 0;
    double bytes = 0, flops = 0;
    attn_kv_t kv       = {.k             = slab,
                          .v             = (uint16_t *)slab + per_page,
                          .k_page_stride = 2 * per_page,
                          .v_page_stride = 2 * per_page,
                          .n_pages       = n_pages,
                          .dtype         = ATTN_BF16,
                          .kv_heads      = p->kv_heads,
                          .head_dim_k    = p->d,
                          .head_dim_v    = p->d,
                          .page_size     = p->page,
                          .chunk_size    = CHUNK};
    attn_layer_t layer = {.causal = true};

    for (uint32_t i = 0; i < p->n; i++) {
        double seen = p->lengths[i] - (p->queries[i] - 1) / 2.0;
        bytes += (i == 0 || p->shared == 0 ? p->lengths[i] : p->lengths[i] - p->shared) * 4.0 *
                 p->kv_heads * p->d;
        flops += 4.0 * p->queries[i] * seen * p->q_heads * p->d;
        queries += p->queries[i];
    }
    uint32_t *perm = must_alloc(n_pages * sizeof(*perm));
    for (uint64_t i = 0; i < n_pages; i++) {
        uint64_t j = chance() % (i + 1);
        perm[i]    = perm[j];
        perm[j]    = (uint32_t)i;
    }
    double want   = ceil(ROTATE_BYTES / bytes);
    uint32_t n    = want > ROTATIONS_MAX ? ROTATIONS_MAX : want < 1 ? 1 : (uint32_t)want;
    double work   = bytes > flops / 100 ? bytes : flops / 100;
    double many   = GRAPH_BYTES / (work * n);
    uint32_t reps = many < 1 ? 1 : many > 8 ? 8 : (uint32_t)many;
    turn_t *turns = must_alloc(n * sizeof(*turns));
    uint16_t *q   = must_alloc(queries * p->q_heads * p->d * 2);
    uint16_t *o   = must_alloc(queries * p->q_heads * p->d * 2);
    for (uint64_t i = 0; i < queries * p->q_heads * p->d; i++) {
        float x = (float)((int64_t)(chance() % 4001) - 2000) / 1000.0f;
        attn_convert(&q[i], ATTN_BF16, &x, ATTN_F32, 1);
    }
    attn_answer_t answer = {.o = o, .o_dtype = ATTN_BF16};
    uint64_t planned     = UINT64_MAX;
    for (uint32_t t = 0; t < n; t++) {
        uint64_t start = attn_now_ns();
        turn_open(&turns[t], p, perm, &next, n_pages);
        planned = attn_min(planned, attn_now_ns() - start);
        must(device->ops->attend(device, turns[t].plan, &kv, &layer, q, ATTN_BF16, turns[t].space,
                                 &answer));
        must(cuda_attend_prepare(turns[t].space, &kv, &layer, q, &answer, &turns[t].args));
        must(CUDA_CALL(cuCtxSynchronize()));
    }
    double off                = error_of(p, &turns[n - 1], &kv, q, o, queries);
    double us                 = replay(turns, n, reps, &kv);
    const cuda_image_t *image = &turns[0].space->image;
    printf("%-24s %9.2f us  %6.3f TB/s  %7.1f TFLOP/s  items %u states %llu plan+tables "
           "%.0f us, %llu KB, error %.1e\n",
           p->name, us, bytes / us / 1e6, flops / us / 1e6, image->n_items,
           (unsigned long long)image->slots, (double)planned / 1e3,
           (unsigned long long)image->bytes / 1024, off);
    fflush(stdout);
    for (uint32_t t = 0; t < n; t++) {
        turn_close(&turns[t]);
    }
    free(turns);
    free(perm);
    free(q);
    free(o);
}

/* ---- the grid ---- */

static int n_words;
static char **words;

static void
point(const char *name, uint32_t q_heads, uint32_t kv_heads, uint32_t d, uint32_t page, uint32_t n,
      uint32_t *lengths, uint32_t *queries, uint32_t shared)
{
    point_t p   = {.q_heads  = q_heads,
                   .kv_heads = kv_heads,
                   .d        = d,
                   .page     = page,
                   .n        = n,
                   .lengths  = lengths,
                   .queries  = queries,
                   .shared   = shared};
    bool wanted = n_words == 0;

    snprintf(p.name, sizeof(p.name), "%s", name);
    for (int i = 0; i < n_words; i++) {
        wanted = wanted || strncmp(name, words[i], strlen(words[i])) == 0;
    }
    if (wanted) {
        measure(&p);
    }
    free(lengths);
    free(queries);
}

int
main(int argc, char **argv)
{
    attn_device_t info;

    n_words = argc - 1;
    words   = argv + 1;
    must(attn_cuda_backend_ops.open(0, 0, &device));
    must(device->ops->device(device, &info));
    cu = cuda_driver();
    fill_slab();
    printf("%s, kind %s, copies read and write %.3f TB/s\n", info.name, device->ops->kind(device),
           device->ops->read_bandwidth(device) / 1e12);

#define DECODE(name, heads, kv, d, page, n, length)                                                \
    point("decode " name, heads, kv, d, page, n, even(n, length), even(n, 1), 0)
    DECODE("b1 1k", 32, 8, 128, 16, 1, 1024);
    DECODE("b1 4k", 32, 8, 128, 16, 1, 4096);
    DECODE("b1 16k", 32, 8, 128, 16, 1, 16384);
    DECODE("b1 128k", 32, 8, 128, 16, 1, 131072);
    DECODE("b1 1M", 32, 8, 128, 16, 1, 1048576);
    DECODE("b16 1k", 32, 8, 128, 16, 16, 1024);
    DECODE("b16 32k", 32, 8, 128, 16, 16, 32768);
    DECODE("b64 8k", 32, 8, 128, 16, 64, 8192);
    DECODE("b256 1k", 32, 8, 128, 16, 256, 1024);
    DECODE("b64 8k page 1", 32, 8, 128, 1, 64, 8192);
    DECODE("b64 8k page 64", 32, 8, 128, 64, 64, 8192);
    DECODE("b64 8k 64/8", 64, 8, 128, 16, 64, 8192);
    DECODE("b64 8k 32/32", 32, 32, 128, 16, 16, 8192);
    DECODE("b64 8k 32/4", 32, 4, 128, 16, 64, 8192);
    DECODE("b64 8k hd 64", 32, 8, 64, 16, 64, 8192);
    DECODE("b64 8k hd 256", 32, 8, 256, 16, 64, 8192);
    point("decode b16 zipf 1k", 32, 8, 128, 16, 16, zipf(16, 1024), even(16, 1), 0);
    point("decode b16 zipf 8k", 32, 8, 128, 16, 16, zipf(16, 8192), even(16, 1), 0);
    point("decode b64 zipf 4k", 32, 8, 128, 16, 64, zipf(64, 4096), even(64, 1), 0);
    point("shared 16 x 8k", 32, 8, 128, 16, 16, even(16, 8192 + 128), even(16, 1), 8192);
    point("shared 16 x 32k", 32, 8, 128, 16, 16, even(16, 32768 + 128), even(16, 1), 32768);
    point("shared 64 x 8k", 32, 8, 128, 16, 64, even(64, 8192 + 128), even(64, 1), 8192);
    point("shared 64 x 32k", 32, 8, 128, 16, 64, even(64, 32768 + 128), even(64, 1), 32768);
    point("prefill 1 x 4k", 32, 8, 128, 16, 1, even(1, 4096), even(1, 4096), 0);
    point("prefill 8 x 2k", 32, 8, 128, 16, 8, even(8, 2048), even(8, 2048), 0);
    point("prefill 1k on 32k", 32, 8, 128, 16, 1, even(1, 32768), even(1, 1024), 0);
    device->ops->slab_free(device, slab, slab_bytes);
    device->ops->close(device);
    return 0;
}
