/*
 * attend.c: how far the cpu backend is from what the machine can do, measured in one run:
 * read bandwidth and rate of fused multiply-adds first, then decode and prefill as ratios
 * to the roofline min(bandwidth, FMA rate / work per KV byte).
 *
 *     bench_attend [threads...]      default: 1 and all cores
 */
#include "balancer/plan.h"
#include "base/clock.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define READ_BYTES (UINT64_C(1) << 30)
#define HEAD_DIM 128u
#define KV_HEADS 8u
#define PAGE 16u
#define CHUNK 2048u
#define THREADS_MAX 256u
#define DECODE_ROUNDS 20
#define PREFILL_ROUNDS 3

static const struct {
    attn_dtype_t dtype;
    const char *name;
} types[] = {{ATTN_F32, "f32"}, {ATTN_F16, "f16"}, {ATTN_BF16, "bf16"}};

static void
must(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

/* ---- what the machine can do ---- */

typedef struct probe {
    const uint64_t *words;
    uint64_t n;
    uint64_t sum;
} probe_t;

#if defined(__x86_64__)
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#else
#define FOR_AVX2
#endif

typedef uint64_t words_t __attribute__((vector_size(32)));
typedef float floats_t __attribute__((vector_size(32)));

FOR_AVX2 static void *
read_words(void *arg)
{
    probe_t *probe = arg;
    words_t sum[8] = {0};

    for (uint64_t i = 0; i + 32 <= probe->n; i += 32) {
        const words_t *at = (const words_t *)(probe->words + i);
        for (int j = 0; j < 8; j++) {
            sum[j] ^= at[j];
        }
    }
    for (int j = 0; j < 8; j++) {
        probe->sum += sum[j][0] ^ sum[j][1] ^ sum[j][2] ^ sum[j][3];
    }
    return NULL;
}

#define FMA_ROUNDS UINT64_C(40000000)
#define FMA_CHAINS 10 /* more than latency times ports */

FOR_AVX2 static inline floats_t
fma8(floats_t x, floats_t a, floats_t b)
{
#if defined(__x86_64__)
    return __builtin_ia32_vfmaddps256(x, a, b);
#else
    return x * a + b;
#endif
}

FOR_AVX2 static void *
multiply_add(void *arg)
{
    probe_t *probe = arg;
    floats_t x[FMA_CHAINS], a, b;

    for (int i = 0; i < 8; i++) {
        a[i] = 0.5f;
        b[i] = (float)probe->n;
    }
    for (int j = 0; j < FMA_CHAINS; j++) { /* all different, or the compiler makes them one */
        x[j] = b + (float)j;
    }
    for (uint64_t i = 0; i < FMA_ROUNDS; i++) {
#pragma GCC unroll 10
        for (int j = 0; j < FMA_CHAINS; j++) {
            x[j] = fma8(x[j], a, b);
        }
    }
    for (int j = 0; j < FMA_CHAINS; j++) {
        probe->sum += (uint64_t)x[j][0];
    }
    return NULL;
}

static double
seconds_on(uint32_t threads, void *(*work)(void *), probe_t *probes)
{
    pthread_t ids[THREADS_MAX];
    uint64_t start = attn_now_ns();

    for (uint32_t t = 1; t < threads; t++) {
        pthread_create(&ids[t], NULL, work, &probes[t]);
    }
    work(&probes[0]);
    for (uint32_t t = 1; t < threads; t++) {
        pthread_join(ids[t], NULL);
    }
    return (double)(attn_now_ns() - start) / 1e9;
}

/* Bytes per second and FLOP per second of this many threads; the best of some rounds. */
static void
measure_machine(uint32_t threads, double *bandwidth, double *flops)
{
    static uint64_t *words;
    probe_t probes[THREADS_MAX];

    if (words == NULL) {
        words = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (words == MAP_FAILED) {
            fprintf(stderr, "no memory to read\n");
            exit(1);
        }
        (void)madvise(words, READ_BYTES, MADV_HUGEPAGE);
        memset(words, 1, READ_BYTES);
    }
    *bandwidth = 0;
    *flops     = 0;
    for (int round = 0; round < 5; round++) {
        uint64_t share = READ_BYTES / 8 / threads / 32 * 32;
        for (uint32_t t = 0; t < threads; t++) {
            probes[t] = (probe_t){.words = words + t * share, .n = share};
        }
        double b = (double)(threads * share * 8) / seconds_on(threads, read_words, probes);
        double f = (double)(FMA_ROUNDS * FMA_CHAINS * 16 * threads) /
                   seconds_on(threads, multiply_add, probes);
        *bandwidth = b > *bandwidth ? b : *bandwidth;
        *flops     = f > *flops ? f : *flops;
    }
}

/* ---- attention ---- */

typedef struct bench {
    attn_backend_t *backend;
    attn_kv_t kv;
    uint64_t slab_bytes;
    attn_kv_run_t *runs;
    uint32_t *pages;
    attn_problem_entry_t entry;
    attn_problem_t problem;
    void *q, *o;
    attn_dtype_t dtype;
} bench_t;

/* n random elements of about N(0, 1). */
static void
fill(void *to, attn_dtype_t dtype, uint64_t n)
{
    uint64_t state = 1;
    float block[1024];

    for (uint64_t i = 0; i < n; i += 1024) {
        uint64_t m = n - i < 1024 ? n - i : 1024;
        for (uint64_t j = 0; j < m; j++) {
            state    = state * 6364136223846793005u + 1442695040888963407u;
            block[j] = (float)(int32_t)(state >> 32) * (1.7f / 2147483648.0f);
        }
        attn_convert((char *)to + i * attn_dtype_size(dtype), dtype, block, ATTN_F32, m);
    }
}

static void
bench_open(bench_t *b, uint32_t threads, attn_dtype_t dtype, uint32_t group, uint32_t length,
           uint32_t n_q)
{
    uint32_t n_pages = (length + PAGE - 1) / PAGE, n_runs = (length + CHUNK - 1) / CHUNK;
    uint64_t size = attn_dtype_size(dtype), per_page = (uint64_t)KV_HEADS * PAGE * HEAD_DIM;

    *b = (bench_t){.dtype = dtype, .slab_bytes = n_pages * per_page * size};
    must(attn_backend_find("cpu")->open(threads, &b->backend));
    b->kv = (attn_kv_t){.k_page_stride = per_page,
                        .v_page_stride = per_page,
                        .n_pages       = n_pages,
                        .dtype         = dtype,
                        .kv_heads      = KV_HEADS,
                        .head_dim_k    = HEAD_DIM,
                        .head_dim_v    = HEAD_DIM,
                        .page_size     = PAGE,
                        .chunk_size    = CHUNK};
    must(b->backend->ops->slab_alloc(b->backend, b->slab_bytes, &b->kv.k));
    must(b->backend->ops->slab_alloc(b->backend, b->slab_bytes, &b->kv.v));
    fill(b->kv.k, dtype, n_pages * per_page);
    fill(b->kv.v, dtype, n_pages * per_page);

    b->pages = malloc(n_pages * sizeof(*b->pages));
    b->runs  = malloc(n_runs * sizeof(*b->runs));
    for (uint32_t i = 0; i < n_pages; i++) { /* in random order */
        uint32_t j  = (uint32_t)rand() % (i + 1);
        b->pages[i] = b->pages[j];
        b->pages[j] = i;
    }
    for (uint32_t c = 0; c < n_runs; c++) {
        b->runs[c] = (attn_kv_run_t){.chunk  = c,
                                     .length = c + 1 < n_runs ? CHUNK : length - c * CHUNK,
                                     .pages  = b->pages + c * (CHUNK / PAGE)};
    }
    b->entry =
        (attn_problem_entry_t){.kv_length = length, .n_q = n_q, .n_runs = n_runs, .runs = b->runs};
    b->problem = (attn_problem_t){.n          = 1,
                                  .entries    = &b->entry,
                                  .q_heads    = KV_HEADS * group,
                                  .kv_heads   = KV_HEADS,
                                  .head_dim_k = HEAD_DIM,
                                  .head_dim_v = HEAD_DIM,
                                  .page_size  = PAGE,
                                  .chunk_size = CHUNK,
                                  .causal     = true};
    uint64_t n = (uint64_t)n_q * KV_HEADS * group * HEAD_DIM;
    b->q       = malloc(n * size);
    b->o       = malloc(n * size);
    fill(b->q, dtype, n);
}

static void
bench_close(bench_t *b)
{
    b->backend->ops->slab_free(b->backend, b->kv.k, b->slab_bytes);
    b->backend->ops->slab_free(b->backend, b->kv.v, b->slab_bytes);
    b->backend->ops->close(b->backend);
    free(b->pages);
    free(b->runs);
    free(b->q);
    free(b->o);
}

/* Seconds of one attend: the best of `rounds`, as for the machine. */
static double
attend_seconds(bench_t *b, int rounds)
{
    const attn_backend_ops_t *ops = b->backend->ops;
    uint32_t few, many;
    attn_plan_t *plan;
    double best        = 1e9;
    attn_layer_t layer = {.causal = true};

    ops->leaf_sizes(b->backend, &few, &many);
    must(attn_plan_build(&b->problem, ops->parallelism(b->backend), few, many, &plan));
    uint64_t bytes = (ops->workspace_bytes(b->backend, plan) + 64) / 64 * 64;
    void *space    = aligned_alloc(64, bytes);
    memset(space, 0, bytes);
    attn_answer_t answer = {.o = b->o, .o_dtype = b->dtype};
    for (int i = -1; i < rounds; i++) {
        uint64_t start = attn_now_ns();
        must(ops->attend(b->backend, plan, &b->kv, &layer, b->q, b->dtype, space, &answer));
        double took = (double)(attn_now_ns() - start) / 1e9;
        best        = i >= 0 && took < best ? took : best;
    }
    free(space);
    attn_plan_free(plan);
    return best;
}

static void
decode(uint32_t threads, double bandwidth, double flops)
{
    static const uint32_t groups[] = {1, 4, 8};

    for (size_t t = 0; t < 3; t++) {
        for (size_t g = 0; g < 3; g++) {
            bench_t b;
            bench_open(&b, threads, types[t].dtype, groups[g], 32768, 1);
            double per_byte = 2.0 * groups[g] / (double)attn_dtype_size(types[t].dtype);
            double roof     = flops / per_byte < bandwidth ? flops / per_byte : bandwidth;
            double rate     = 2.0 * (double)b.slab_bytes / attend_seconds(&b, DECODE_ROUNDS);
            printf("decode  32k, %-4s group %u: %6.2f GB/s of KV, %5.1f %% of the roofline, %.2f\n",
                   types[t].name, groups[g], rate / 1e9, 100 * rate / roof, roof / 1e9);
            fflush(stdout);
            bench_close(&b);
        }
    }
}

static void
prefill(uint32_t threads, double flops)
{
    const uint32_t n = 4096, group = 4;

    for (size_t t = 0; t < 3; t++) {
        bench_t b;
        bench_open(&b, threads, types[t].dtype, group, n, n);
        double work = 4.0 * HEAD_DIM * KV_HEADS * group * ((double)n * (n + 1) / 2);
        double rate = work / attend_seconds(&b, PREFILL_ROUNDS);
        printf("prefill 4k,  %-4s group %u: %6.1f GFLOP/s, %5.1f %% of the FMA rate\n",
               types[t].name, group, rate / 1e9, 100 * rate / flops);
        fflush(stdout);
        bench_close(&b);
    }
}

static void
measure(uint32_t threads)
{
    double bandwidth, flops;

    measure_machine(threads, &bandwidth, &flops);
    printf("threads %u: reads %.1f GB/s, %.1f GFLOP/s of 8-lane FMA\n", threads, bandwidth / 1e9,
           flops / 1e9);
    decode(threads, bandwidth, flops);
    prefill(threads, flops);
}

int
main(int argc, char **argv)
{
    uint32_t cores = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);

    for (int i = 1; i < argc; i++) {
        uint32_t threads = (uint32_t)atoi(argv[i]);
        measure(threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads);
    }
    if (argc == 1) {
        measure(1);
        if (cores > 1) {
            measure(cores < THREADS_MAX ? cores : THREADS_MAX);
        }
    }
    return 0;
}
