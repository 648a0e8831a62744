/*
 * gpu_grid.c: see gpu_grid.h. The grid is a star, not a product: everything of heads, batch and
 * context at head dim 128 and pages of 16, and from there one thing at a time.
 */
#include "bench/gpu_grid.h"

#include "base/checked.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define POINTS_MAX 512u
#define ROTATE_BYTES 200e6
#define TURNS_MAX 24u

/* Tokens of a batch at most: of K and V of 64 GiB at 8 heads of 128. */
#define TOKENS_MAX (UINT64_C(16) << 20)
#define POINT_BYTES_MAX 70e9

typedef struct grid {
    gpu_point_t *points;
    uint32_t n;
    uint64_t seed;
} grid_t;

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

const char *
gpu_kind_name(gpu_kind_t kind)
{
    static const char *const names[] = {"decode", "skewed", "shared", "sparse", "prefill"};

    return names[kind];
}

/* ---- lengths ---- */

static uint64_t
chance(grid_t *grid)
{
    grid->seed ^= grid->seed << 13;
    grid->seed ^= grid->seed >> 7;
    grid->seed ^= grid->seed << 17;
    return grid->seed;
}

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
zipf(grid_t *grid, uint32_t n, uint32_t mean)
{
    uint32_t *v = must_alloc(n * sizeof(*v));
    double sum  = 0;

    for (uint32_t i = 0; i < n; i++) {
        sum += 1.0 / (i + 1);
    }
    for (uint32_t i = 0; i < n; i++) {
        double x   = n * (double)mean / (i + 1) / sum;
        uint32_t j = (uint32_t)(chance(grid) % (i + 1));
        v[i]       = v[j];
        v[j]       = x < 1 ? 1 : (uint32_t)lround(x);
    }
    return v;
}

/* Any length from 1 to twice the mean is as likely as any other. */
static uint32_t *
uniform(grid_t *grid, uint32_t n, uint32_t mean)
{
    uint32_t *v = must_alloc(n * sizeof(*v));

    for (uint32_t i = 0; i < n; i++) {
        v[i] = 1 + (uint32_t)(chance(grid) % (2 * mean - 1));
    }
    return v;
}

/* ---- points ---- */

static const char *
short_number(uint32_t x, char text[16])
{
    if (x % (1u << 20) == 0) {
        snprintf(text, 16, "%uM", x >> 20);
    } else if (x % 1024 == 0) {
        snprintf(text, 16, "%uk", x >> 10);
    } else {
        snprintf(text, 16, "%u", x);
    }
    return text;
}

/* Add a copy of `shape` with these lengths and a name: what `format` makes, and how the shape
 * differs from the usual one. What is there already, or too large, is passed over. */
static void __attribute__((format(printf, 5, 6)))
add(grid_t *grid, gpu_point_t shape, uint32_t *lengths, uint32_t *queries, const char *format, ...)
{
    gpu_point_t *p = &grid->points[grid->n];
    va_list args;
    size_t at;

    *p         = shape;
    p->lengths = lengths;
    p->queries = queries;
    va_start(args, format);
    vsnprintf(p->name, sizeof(p->name), format, args);
    va_end(args);
    if (p->q_heads != 32 || p->kv_heads != 8) {
        at = strlen(p->name);
        snprintf(p->name + at, sizeof(p->name) - at, " %u/%u", p->q_heads, p->kv_heads);
    }
    if (p->d != 128) {
        at = strlen(p->name);
        snprintf(p->name + at, sizeof(p->name) - at, " hd %u", p->d);
    }
    if (p->page != 16) {
        at = strlen(p->name);
        snprintf(p->name + at, sizeof(p->name) - at, " page %u", p->page);
    }
    bool wanted = grid->n + 1 < POINTS_MAX && gpu_point_bytes(p) <= POINT_BYTES_MAX;
    for (uint32_t i = 0; i < grid->n && wanted; i++) {
        wanted = strcmp(grid->points[i].name, p->name) != 0;
    }
    if (wanted) {
        grid->n++;
    } else {
        free(lengths);
        free(queries);
    }
}

static gpu_point_t
usual(gpu_kind_t kind, bool quick, uint32_t n)
{
    return (gpu_point_t){
        .kind = kind, .quick = quick, .q_heads = 32, .kv_heads = 8, .d = 128, .page = 16, .n = n};
}

static void
add_decode(grid_t *grid, gpu_point_t shape, uint32_t n, uint32_t length)
{
    char text[16];

    shape.n = n;
    if ((uint64_t)n * length <= TOKENS_MAX) {
        add(grid, shape, even(n, length), even(n, 1), "decode b%u %s", n,
            short_number(length, text));
    }
}

static void
add_skewed(grid_t *grid, bool quick, uint32_t n, uint32_t mean, bool is_zipf)
{
    char text[16];

    add(grid, usual(GPU_SKEWED, quick, n), is_zipf ? zipf(grid, n, mean) : uniform(grid, n, mean),
        even(n, 1), "decode b%u %s %s", n, is_zipf ? "zipf" : "uniform", short_number(mean, text));
}

static void
add_shared(grid_t *grid, bool quick, uint32_t n, uint32_t prefix)
{
    gpu_point_t shape = usual(GPU_SHARED, quick, n);
    char text[16];

    shape.shared = prefix;
    add(grid, shape, even(n, prefix + 128), even(n, 1), "shared %u x %s", n,
        short_number(prefix, text));
}

/* One page of `of`. */
static void
add_sparse(grid_t *grid, bool quick, uint32_t n, uint32_t length, uint32_t page, uint32_t of)
{
    gpu_point_t shape = usual(GPU_SPARSE, quick, n);
    char text[16];

    shape.page = page;
    shape.kept = length / page / of;
    add(grid, shape, even(n, length), even(n, 1), "sparse b%u %s 1/%u", n,
        short_number(length, text), of);
}

/* `queries` of them at the end of `length` tokens. */
static void
add_prefill(grid_t *grid, gpu_point_t shape, uint32_t n, uint32_t queries, uint32_t length)
{
    char a[16], b[16];

    shape.n = n;
    if (queries == length) {
        add(grid, shape, even(n, length), even(n, queries), "prefill %u x %s", n,
            short_number(length, a));
    } else {
        add(grid, shape, even(n, length), even(n, queries), "prefill %u x %s on %s", n,
            short_number(queries, a), short_number(length, b));
    }
}

/* ---- the grids ---- */

static void
make_quick(grid_t *grid)
{
    static const uint32_t even_points[][2] = {{1, 1024},   {1, 4096},    {1, 16384},
                                              {1, 131072}, {1, 1048576}, {16, 1024},
                                              {16, 32768}, {64, 8192},   {256, 1024}};
    static const gpu_point_t shapes[]      = {
             {.q_heads = 32, .kv_heads = 8, .d = 128, .page = 1},
             {.q_heads = 32, .kv_heads = 8, .d = 128, .page = 64},
             {.q_heads = 64, .kv_heads = 8, .d = 128, .page = 16},
             {.q_heads = 32, .kv_heads = 4, .d = 128, .page = 16},
             {.q_heads = 32, .kv_heads = 8, .d = 64, .page = 16},
             {.q_heads = 32, .kv_heads = 8, .d = 256, .page = 16},
    };
    gpu_point_t plain = usual(GPU_DECODE, true, 0), prefill = usual(GPU_PREFILL, true, 0);

    for (size_t i = 0; i < sizeof(even_points) / sizeof(even_points[0]); i++) {
        add_decode(grid, plain, even_points[i][0], even_points[i][1]);
    }
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        gpu_point_t shape = shapes[i];
        shape.kind        = GPU_DECODE;
        shape.quick       = true;
        add_decode(grid, shape, 64, 8192);
    }
    gpu_point_t heads = plain;
    heads.kv_heads    = 32;
    add_decode(grid, heads, 16, 8192);
    add_skewed(grid, true, 16, 1024, true);
    add_skewed(grid, true, 16, 8192, true);
    add_skewed(grid, true, 64, 4096, true);
    add_skewed(grid, true, 64, 4096, false);
    add_shared(grid, true, 16, 8192);
    add_shared(grid, true, 16, 32768);
    add_shared(grid, true, 64, 8192);
    add_shared(grid, true, 64, 32768);
    add_sparse(grid, true, 16, 32768, 16, 8);
    add_prefill(grid, prefill, 1, 4096, 4096);
    add_prefill(grid, prefill, 8, 2048, 2048);
    add_prefill(grid, prefill, 32, 1024, 1024);
    add_prefill(grid, prefill, 1, 1024, 32768);
    prefill.page = 64;
    add_prefill(grid, prefill, 1, 4096, 4096);
    add_prefill(grid, prefill, 1, 16384, 16384);
    prefill.page = 1;
    add_prefill(grid, prefill, 1, 4096, 4096);
}

static void
make_decode(grid_t *grid)
{
    static const uint32_t batches[]  = {1, 16, 64, 256};
    static const uint32_t contexts[] = {1024, 4096, 8192, 16384, 32768, 131072, 1048576};
    static const uint32_t few[]      = {1024, 8192, 32768, 131072};
    static const uint32_t heads[][2] = {{64, 8}, {32, 32}, {32, 4}};
    gpu_point_t plain                = usual(GPU_DECODE, false, 0);

    for (int b = 0; b < 4; b++) {
        for (int c = 0; c < 7; c++) {
            add_decode(grid, plain, batches[b], contexts[c]);
        }
        for (int h = 0; h < 3; h++) {
            gpu_point_t shape = plain;
            shape.q_heads     = heads[h][0];
            shape.kv_heads    = heads[h][1];
            for (int c = 0; c < 4; c++) {
                add_decode(grid, shape, batches[b], few[c]);
            }
        }
        for (int c = 0; c < 3; c++) {
            for (uint32_t d = 64; d <= 256; d *= 4) {
                gpu_point_t shape = plain;
                shape.d           = d;
                add_decode(grid, shape, batches[b], few[c]);
            }
            for (uint32_t page = 1; page <= 64; page *= 64) {
                gpu_point_t shape = plain;
                shape.page        = page;
                add_decode(grid, shape, batches[b], few[c]);
            }
        }
    }
}

static void
make_prefill(grid_t *grid)
{
    static const uint32_t points[][2] = {{1, 1024},  {1, 2048},  {1, 4096},  {1, 8192},
                                         {1, 16384}, {1, 32768}, {4, 4096},  {8, 1024},
                                         {8, 2048},  {8, 8192},  {32, 1024}, {32, 2048}};
    gpu_point_t plain                 = usual(GPU_PREFILL, false, 0), shape;

    for (size_t i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
        add_prefill(grid, plain, points[i][0], points[i][1], points[i][1]);
    }
    for (uint32_t page = 1; page <= 64; page *= 64) {
        shape      = plain;
        shape.page = page;
        add_prefill(grid, shape, 8, 2048, 2048);
        add_prefill(grid, shape, 1, 16384, 16384);
        add_prefill(grid, shape, 1, 1024, 32768);
    }
    for (uint32_t d = 64; d <= 256; d *= 4) {
        shape   = plain;
        shape.d = d;
        add_prefill(grid, shape, 1, 4096, 4096);
        add_prefill(grid, shape, 8, 2048, 2048);
    }
    for (uint32_t heads = 4; heads <= 32; heads *= 8) {
        shape          = plain;
        shape.kv_heads = heads;
        add_prefill(grid, shape, 1, 4096, 4096);
    }
    shape         = plain;
    shape.q_heads = 64;
    add_prefill(grid, shape, 1, 4096, 4096);
    add_prefill(grid, plain, 8, 1024, 32768);
    plain.n           = 16;
    uint32_t *lengths = zipf(grid, 16, 2048), *queries = must_alloc(16 * sizeof(*queries));
    memcpy(queries, lengths, 16 * sizeof(*queries));
    add(grid, plain, lengths, queries, "prefill 16 of zipf 2k");
}

static void
make_rest(grid_t *grid)
{
    static const uint32_t sizes[] = {16, 64, 256}, means[] = {1024, 4096, 8192};
    static const uint32_t prefixes[] = {1024, 4096, 8192, 32768};

    for (int n = 0; n < 3; n++) {
        for (int m = 0; m < 3; m++) {
            add_skewed(grid, false, sizes[n], means[m], true);
            add_skewed(grid, false, sizes[n], means[m], false);
        }
    }
    for (int i = 0; i < 4; i++) {
        add_shared(grid, false, 16, prefixes[i]);
        add_shared(grid, false, 64, prefixes[i]);
    }
    add_sparse(grid, false, 1, 131072, 16, 8);
    add_sparse(grid, false, 64, 8192, 16, 8);
    add_sparse(grid, false, 16, 32768, 64, 8);
    add_sparse(grid, false, 16, 32768, 1, 8);
    add_sparse(grid, false, 16, 131072, 64, 32);
}

gpu_point_t *
gpu_grid_make(uint32_t *n_p)
{
    grid_t grid = {.points = must_alloc(POINTS_MAX * sizeof(gpu_point_t)), .seed = 1};

    make_quick(&grid);
    make_prefill(&grid);
    make_rest(&grid);
    make_decode(&grid);
    *n_p = grid.n;
    return grid.points;
}

void
gpu_grid_free(gpu_point_t *points, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        free(points[i].lengths);
        free(points[i].queries);
    }
    free(points);
}

/* ---- what a point is ---- */

/* Tokens of a request that are read for it alone. */
static double
own_tokens(const gpu_point_t *p, uint32_t i)
{
    if (p->kept > 0) {
        uint64_t last = (p->lengths[i] - 1) % p->page + 1;
        return (double)((uint64_t)(p->kept - 1) * p->page + last);
    }
    return i == 0 ? p->lengths[i] : (double)p->lengths[i] - p->shared;
}

double
gpu_point_bytes(const gpu_point_t *p)
{
    double tokens = 0;

    for (uint32_t i = 0; i < p->n; i++) {
        tokens += own_tokens(p, i);
    }
    return tokens * 4.0 * p->kv_heads * p->d;
}

double
gpu_point_flops(const gpu_point_t *p)
{
    double pairs = 0;

    for (uint32_t i = 0; i < p->n; i++) {
        double seen = p->kept > 0 ? own_tokens(p, i) : p->lengths[i] - (p->queries[i] - 1) / 2.0;
        pairs += p->queries[i] * seen;
    }
    return 4.0 * pairs * p->q_heads * p->d;
}

uint64_t
gpu_point_pages(const gpu_point_t *p)
{
    uint64_t n = p->shared / p->page;

    for (uint32_t i = 0; i < p->n; i++) {
        n += attn_div_up(p->lengths[i], p->page) - p->shared / p->page;
    }
    return n;
}

uint32_t
gpu_point_turns(const gpu_point_t *p)
{
    double bytes = gpu_point_bytes(p);

    for (uint32_t i = 0; i < p->n; i++) {
        bytes += 4.0 * p->queries[i] * p->q_heads * p->d;
    }
    double turns = ceil(ROTATE_BYTES / bytes);
    return turns > TURNS_MAX ? TURNS_MAX : (uint32_t)turns;
}

static void
write_list(FILE *file, const char *name, const uint32_t *v, uint32_t n)
{
    fprintf(file, ",\"%s\":[", name);
    for (uint32_t i = 0; i < n; i++) {
        fprintf(file, "%s%u", i > 0 ? "," : "", v[i]);
    }
    fprintf(file, "]");
}

void
gpu_point_write(FILE *file, const gpu_point_t *p)
{
    fprintf(file,
            "{\"case\":\"%s\",\"kind\":\"%s\",\"quick\":%s,\"q_heads\":%u,\"kv_heads\":%u,"
            "\"d\":%u,\"page\":%u,\"n\":%u,\"shared\":%u,\"kept\":%u,\"turns\":%u,"
            "\"bytes\":%.0f,\"flops\":%.0f",
            p->name, gpu_kind_name(p->kind), p->quick ? "true" : "false", p->q_heads, p->kv_heads,
            p->d, p->page, p->n, p->shared, p->kept, gpu_point_turns(p), gpu_point_bytes(p),
            gpu_point_flops(p));
    write_list(file, "lengths", p->lengths, p->n);
    write_list(file, "queries", p->queries, p->n);
    fprintf(file, "}\n");
}
