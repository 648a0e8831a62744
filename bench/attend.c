/*
 * attend.c: how far the cpu backend is from what the machine can do, both sides measured
 * in one run: between any two timings of attention, read bandwidth and the rate of fused
 * multiply-adds are measured again, and the best of each counts.
 *
 *     decode   KV bytes per second, of the roofline min(bandwidth, FMA rate / FLOP per KV byte)
 *     prefill  FLOP per second, causal, of the FMA rate
 *     order    time in the fixed order of merges, over that of the freest order: each thread
 *              carries one running maximum, sum and A through its leaves and merges nothing
 *
 * The FMA rate is that of f32 vectors of the width the kernels use. Kernels on a matrix unit
 * are held against it, too, and may exceed it.
 */
#include "balancer/plan.h"
#include "base/clock.h"
#include "base/status.h"
#include "bench/machine.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/leaf.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HEAD_DIM 128u
#define PAGE 16u
#define CHUNK 2048u
#define LENGTH_MAX 131072u
#define DECODE_HEADS 8u
#define PREFILL_HEADS 1u
#define PREFILL_GROUP 4u
#define LIST_MAX 16u

#define DECODE_TARGET 0.65
#define PREFILL_TARGET 0.60
#define ORDER_TARGET 1.03

static const struct {
    attn_dtype_t dtype;
    const char *name;
} types[] = {{ATTN_F32, "f32"}, {ATTN_F16, "f16"}, {ATTN_BF16, "bf16"}};

typedef struct list {
    uint32_t at[LIST_MAX], n;
    bool given; /* by an option */
} list_t;

static struct {
    const char *only; /* case */
    const char *dtype;
    list_t threads, groups, decode, prefill;
    uint64_t budget_ns; /* of one point */
    bool quick;
    FILE *json;
    const char *isa;
    machine_width_t width;
} opt = {.groups    = {.at = {1, 4, 8}, .n = 3},
         .decode    = {.at = {4096, 32768, 131072}, .n = 3},
         .prefill   = {.at = {2048, 4096, 16384}, .n = 3},
         .budget_ns = 500 * ATTN_NS_PER_MS};

static void
must(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

static void *
must_alloc(uint64_t bytes)
{
    void *space = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (space == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    memset(space, 0, bytes);
    return space;
}

/* ---- a world to attend in ---- */

/* KV of one dtype, for all lengths and groups. */
typedef struct store {
    attn_backend_t *backend;
    attn_dtype_t dtype;
    const char *dtype_name;
    uint32_t threads;
    void *k, *v;
    uint64_t bytes; /* of each */
} store_t;

typedef struct point {
    const store_t *store;
    attn_kv_t kv;
    attn_kv_run_t *runs;
    uint32_t *pages;
    attn_problem_entry_t entry;
    attn_problem_t problem;
    attn_plan_t *plan;
    void *q, *o;
    attn_workspace_t *space;
} point_t;

/* n random elements of about N(0, 1) / 2: a million, over and over. */
static void
fill(void *to, attn_dtype_t dtype, uint64_t n)
{
    static float block[1 << 20];
    uint64_t state = 1, size = attn_dtype_size(dtype);
    uint64_t first = n < 1 << 20 ? n : 1 << 20;

    for (uint64_t j = 0; j < first; j++) {
        state    = state * 6364136223846793005u + 1442695040888963407u;
        block[j] = (float)(int32_t)(state >> 32) * (1.7f / 2147483648.0f);
    }
    attn_convert(to, dtype, block, ATTN_F32, first);
    for (uint64_t i = first; i < n; i += first) {
        uint64_t m = n - i < first ? n - i : first;
        memcpy((char *)to + i * size, to, m * size);
    }
}

static void
store_open(store_t *s, size_t type, uint32_t threads)
{
    uint64_t n = (uint64_t)LENGTH_MAX * DECODE_HEADS * HEAD_DIM;

    *s = (store_t){.dtype = types[type].dtype, .dtype_name = types[type].name, .threads = threads};
    s->bytes = n * attn_dtype_size(s->dtype);
    must(attn_backend_find("cpu")->open(threads, 0, &s->backend));
    must(s->backend->ops->slab_alloc(s->backend, s->bytes, &s->k));
    must(s->backend->ops->slab_alloc(s->backend, s->bytes, &s->v));
    fill(s->k, s->dtype, n);
    fill(s->v, s->dtype, n);
}

static void
store_close(store_t *s)
{
    s->backend->ops->slab_free(s->backend, s->k, s->bytes);
    s->backend->ops->slab_free(s->backend, s->v, s->bytes);
    s->backend->ops->close(s->backend);
}

/* Pages in random order, chunks of full length. */
static void
lay_pages(point_t *p, uint32_t length)
{
    uint32_t n_pages = (length + PAGE - 1) / PAGE, n_runs = (length + CHUNK - 1) / CHUNK;

    p->pages = must_alloc((uint64_t)n_pages * sizeof(*p->pages));
    p->runs  = must_alloc((uint64_t)n_runs * sizeof(*p->runs));
    for (uint32_t i = 0; i < n_pages; i++) {
        uint32_t j  = (uint32_t)rand() % (i + 1);
        p->pages[i] = p->pages[j];
        p->pages[j] = i;
    }
    for (uint32_t c = 0; c < n_runs; c++) {
        p->runs[c] = (attn_kv_run_t){.chunk  = c,
                                     .length = c + 1 < n_runs ? CHUNK : length - c * CHUNK,
                                     .pages  = p->pages + c * (CHUNK / PAGE)};
    }
    p->entry.n_runs = n_runs;
    p->entry.runs   = p->runs;
}

static void
point_open(point_t *p, const store_t *s, uint32_t kv_heads, uint32_t group, uint32_t length,
           uint32_t n_q)
{
    const attn_backend_ops_t *ops = s->backend->ops;
    uint64_t per_page             = (uint64_t)kv_heads * PAGE * HEAD_DIM;
    uint64_t size                 = attn_dtype_size(s->dtype);
    uint32_t few, many;

    *p       = (point_t){.store = s};
    p->kv    = (attn_kv_t){.k             = s->k,
                           .v             = s->v,
                           .k_page_stride = per_page,
                           .v_page_stride = per_page,
                           .n_pages       = s->bytes / size / per_page,
                           .dtype         = s->dtype,
                           .kv_heads      = kv_heads,
                           .head_dim_k    = HEAD_DIM,
                           .head_dim_v    = HEAD_DIM,
                           .page_size     = PAGE,
                           .chunk_size    = CHUNK};
    p->entry = (attn_problem_entry_t){.kv_length = length, .n_q = n_q};
    lay_pages(p, length);
    p->problem = (attn_problem_t){.n          = 1,
                                  .entries    = &p->entry,
                                  .q_heads    = kv_heads * group,
                                  .kv_heads   = kv_heads,
                                  .head_dim_k = HEAD_DIM,
                                  .head_dim_v = HEAD_DIM,
                                  .page_size  = PAGE,
                                  .chunk_size = CHUNK,
                                  .causal     = true};
    uint64_t n = (uint64_t)n_q * kv_heads * group * HEAD_DIM;
    p->q       = must_alloc(n * size);
    p->o       = must_alloc(n * size);
    fill(p->q, s->dtype, n);
    ops->leaf_sizes(s->backend, &few, &many);
    must(attn_plan_build(&p->problem, ops->parallelism(s->backend), few, many, &p->plan));
    must(ops->workspace_create(s->backend, p->plan, s->dtype, s->dtype, &p->space));
}

static void
point_close(point_t *p)
{
    attn_plan_free(p->plan);
    free(p->pages);
    free(p->runs);
    free(p->q);
    free(p->o);
    p->store->backend->ops->workspace_destroy(p->store->backend, p->space);
}

static double
attend_seconds(const point_t *p)
{
    attn_backend_t *backend = p->store->backend;
    attn_layer_t layer      = {.causal = true};
    attn_answer_t answer    = {.o = p->o, .o_dtype = p->store->dtype};
    uint64_t start          = attn_now_ns();

    must(backend->ops->attend(backend, p->plan, &p->kv, &layer, p->q, p->store->dtype, p->space,
                              &answer));
    return (double)(attn_now_ns() - start) / 1e9;
}

/* ---- measuring ---- */

typedef struct timing {
    double seconds; /* of one attend: the best */
    double bandwidth, fma;
} timing_t;

/* Rounds of (bandwidth, FMA rate, attends) until the time is used up, at least two. */
static timing_t
measure(const point_t *p)
{
    timing_t t     = {.seconds = 1e9};
    uint64_t start = attn_now_ns();

    attend_seconds(p); /* pages of the answer, and caches */
    for (int round = 0; round < 2 || attn_now_ns() - start < opt.budget_ns; round++) {
        double b       = machine_read(p->store->threads);
        double f       = machine_fma(p->store->threads, opt.width);
        uint64_t begun = attn_now_ns();
        t.bandwidth    = b > t.bandwidth ? b : t.bandwidth;
        t.fma          = f > t.fma ? f : t.fma;
        do {
            double s  = attend_seconds(p);
            t.seconds = s < t.seconds ? s : t.seconds;
        } while (attn_now_ns() - begun < 20 * ATTN_NS_PER_MS);
    }
    return t;
}

/* Time in the fixed order over time in the freest, taken in turns. */
static double
measure_order(const point_t *p)
{
    double best[2] = {1e9, 1e9};
    uint64_t start = attn_now_ns();

    attend_seconds(p);
    for (int round = 0; round < 5 || attn_now_ns() - start < 2 * opt.budget_ns; round++) {
        for (int free_order = 0; free_order < 2; free_order++) {
            attn_cpu_free_order(p->store->backend, free_order == 1);
            double s         = attend_seconds(p);
            best[free_order] = s < best[free_order] ? s : best[free_order];
        }
    }
    attn_cpu_free_order(p->store->backend, false);
    return best[0] / best[1];
}

static void
report(const store_t *s, const char *name, const char *of, uint32_t group, uint32_t context,
       double value, const char *unit, double bound, double ratio, double target)
{
    bool reached = target > 1 ? ratio <= target : ratio >= target;

    printf(
        "%-7s %-7s %-4s group %u, %6u tokens, %u threads: %8.2f %-8s of %8.2f: %6.3f (%s %.2f)%s\n",
        name, of, s->dtype_name, group, context, s->threads, value, unit, bound, ratio,
        target > 1 ? "at most" : "target", target, reached ? "" : "  MISSED");
    fflush(stdout);
    if (opt.json != NULL) {
        fprintf(
            opt.json,
            "{\"bench\":\"attend\",\"case\":\"%s%s%s %s, group %u, %uk, %u thr\",\"kind\":\"%s\","
            "\"of\":\"%s\",\"dtype\":\"%s\",\"group\":%u,\"context\":%u,\"threads\":%u,"
            "\"isa\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"bound\":%.4g,\"ratio\":%.4f,"
            "\"target\":%.2f,\"sense\":\"%s\"}\n",
            name, strcmp(of, "run") == 0 ? "" : " of ", strcmp(of, "run") == 0 ? "" : of,
            s->dtype_name, group, context / 1024, s->threads, name, of, s->dtype_name, group,
            context, s->threads, opt.isa, value, unit, bound, ratio, target,
            target > 1 ? "most" : "least");
        fflush(opt.json);
    }
}

static void
decode(const store_t *s, uint32_t group, uint32_t length)
{
    point_t p;

    point_open(&p, s, DECODE_HEADS, group, length, 1);
    timing_t t   = measure(&p);
    double size  = (double)attn_dtype_size(s->dtype);
    double bytes = 2.0 * DECODE_HEADS * HEAD_DIM * size * length;
    double roof  = t.fma / (2.0 * group / size);
    roof         = roof < t.bandwidth ? roof : t.bandwidth;
    report(s, "decode", "run", group, length, bytes / t.seconds / 1e9, "GB/s", roof / 1e9,
           bytes / t.seconds / roof, DECODE_TARGET);
    point_close(&p);
}

static void
prefill(const store_t *s, uint32_t length)
{
    point_t p;

    point_open(&p, s, PREFILL_HEADS, PREFILL_GROUP, length, length);
    timing_t t  = measure(&p);
    double work = 4.0 * HEAD_DIM * PREFILL_HEADS * PREFILL_GROUP;
    work *= (double)length * (length + 1) / 2;
    report(s, "prefill", "run", PREFILL_GROUP, length, work / t.seconds / 1e9, "GFLOP/s",
           t.fma / 1e9, work / t.seconds / t.fma, PREFILL_TARGET);
    point_close(&p);
}

static void
order(const store_t *s, uint32_t group, uint32_t length, bool prompt)
{
    point_t p;

    point_open(&p, s, prompt ? PREFILL_HEADS : DECODE_HEADS, group, length, prompt ? length : 1);
    double ratio = measure_order(&p);
    report(s, "order", prompt ? "prefill" : "decode", group, length, ratio, "ratio", 1.0, ratio,
           ORDER_TARGET);
    point_close(&p);
}

static bool
wanted(const char *name)
{
    return opt.only == NULL || strcmp(opt.only, name) == 0;
}

static void
bench_store(const store_t *s)
{
    for (uint32_t i = 0; wanted("decode") && i < opt.decode.n; i++) {
        for (uint32_t g = 0; g < opt.groups.n; g++) {
            decode(s, opt.groups.at[g], opt.decode.at[i]);
        }
    }
    for (uint32_t i = 0; wanted("prefill") && i < opt.prefill.n; i++) {
        prefill(s, opt.prefill.at[i]);
    }
    if (wanted("order")) {
        for (uint32_t g = 0; g < opt.groups.n; g++) {
            order(s, opt.groups.at[g], 32768, false);
        }
        order(s, PREFILL_GROUP, 2048, true);
    }
}

/* ---- options ---- */

static const char usage[] =
    "bench_attend [option...]\n"
    "  --threads LIST  default: 1 and all cores\n"
    "  --case NAME     decode, prefill or order; default: all\n"
    "  --dtype NAME    f32, f16 or bf16; default: all\n"
    "  --group LIST    query heads per KV head of decode; default 1,4,8\n"
    "  --context LIST  tokens of decode (at most 131072); default 4096,32768,131072\n"
    "  --prompt LIST   tokens of prefill; default 2048,4096,16384\n"
    "  --quick         fewer points and less time for each\n"
    "  --json FILE     append one JSON object per measurement\n"
    "The instruction set is the machine's best, or that of environment ATTN_CPU_ISA.\n";

static void
parse_list(const char *text, list_t *list, uint32_t most)
{
    char *end;

    list->n     = 0;
    list->given = true;
    for (const char *at = text; *at != 0 && list->n < LIST_MAX; at = end + (*end == ',')) {
        unsigned long x = strtoul(at, &end, 10);
        if (end == at || x < 1 || x > most) {
            fprintf(stderr, "%s: numbers from 1 to %u, with commas\n", text, most);
            exit(2);
        }
        list->at[list->n++] = (uint32_t)x;
    }
}

static void
quick(void)
{
    opt.decode    = opt.decode.given ? opt.decode : (list_t){.at = {32768}, .n = 1};
    opt.prefill   = opt.prefill.given ? opt.prefill : (list_t){.at = {2048}, .n = 1};
    opt.budget_ns = 150 * ATTN_NS_PER_MS;
}

static void
parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"threads", 1, NULL, 't'}, {"case", 1, NULL, 'c'},    {"dtype", 1, NULL, 'd'},
        {"group", 1, NULL, 'g'},   {"context", 1, NULL, 'x'}, {"prompt", 1, NULL, 'p'},
        {"quick", 0, NULL, 'q'},   {"json", 1, NULL, 'j'},    {NULL, 0, NULL, 0}};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 't':
            parse_list(optarg, &opt.threads, MACHINE_THREADS_MAX);
            break;
        case 'c':
            opt.only = optarg;
            break;
        case 'd':
            opt.dtype = optarg;
            break;
        case 'g':
            parse_list(optarg, &opt.groups, 64);
            break;
        case 'x':
            parse_list(optarg, &opt.decode, LENGTH_MAX);
            break;
        case 'p':
            parse_list(optarg, &opt.prefill, LENGTH_MAX);
            break;
        case 'q':
            quick();
            break;
        case 'j':
            opt.json = fopen(optarg, "a");
            if (opt.json == NULL) {
                perror(optarg);
                exit(2);
            }
            break;
        default:
            fputs(usage, stderr);
            exit(2);
        }
    }
    if (opt.quick) {
        quick();
    }
    if (opt.threads.n == 0) {
        long cores   = sysconf(_SC_NPROCESSORS_ONLN);
        uint32_t all = cores < 1                     ? 1
                       : cores > MACHINE_THREADS_MAX ? MACHINE_THREADS_MAX
                                                     : (uint32_t)cores;
        opt.threads  = (list_t){.at = {1, all}, .n = all > 1 ? 2 : 1};
    }
}

int
main(int argc, char **argv)
{
    const cpu_isa_t *isa;

    parse(argc, argv);
    must(cpu_isa_choose(&isa));
    opt.isa   = isa->name;
    opt.width = (machine_width_t)isa->lanes;
    if (machine_open() != 0) {
        fprintf(stderr, "no memory to read\n");
        return 1;
    }
    for (uint32_t i = 0; i < opt.threads.n; i++) {
        uint32_t threads = opt.threads.at[i];
        printf("%s on %u threads: reads %.1f GB/s, %.0f GFLOP/s of f32 FMA in %u lanes\n", opt.isa,
               threads, machine_read(threads) / 1e9, machine_fma(threads, opt.width) / 1e9,
               (uint32_t)opt.width);
        for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); t++) {
            if (opt.dtype == NULL || strcmp(opt.dtype, types[t].name) == 0) {
                store_t s;
                store_open(&s, t, threads);
                bench_store(&s);
                store_close(&s);
            }
        }
    }
    return 0;
}
