/*
 * scaling.c: what a layer of one long sequence, of many, and of a prefill takes on 1, 2, 4 and 8
 * workers, as the client sees it.
 *
 *     bench_scaling [--quick] [--json FILE] [--cpu] [--small] [--workers 1,2,4,8]
 *                   [--merging client,group,auto] [--ways host,cuda,enqueued]
 *                   [--points NAME,...] [--share] [--seconds S]
 *
 * For each number of workers a cluster is started, a GPU each, and filled with noise; then each
 * point is asked for, by a client that merges partials and by one whose workers do, with tensors in
 * the host's memory, in that of GPU 0, and on a stream of it. A row's answers are hashed: they are
 * those of the first row of the point, bit by bit, or the row says so. Before a row is measured the
 * cost model tells what it will take (attn_explain()).
 *
 * --small: a grid that is measured in seconds. --cpu: that, on workers of one thread. --share: more
 * workers than there are GPUs; they take turns, so that times say nothing, and bits all the same.
 */
#include "bench/gpu_memory.h"
#include "bench/result.h"
#include "bench/scaling.h"

#include "base/clock.h"
#include "base/status.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define K UINT64_C(1024)
#define SPREAD ATTN_PLACE_SPREAD
#define WHOLE ATTN_PLACE_WHOLE

static const point_t all_points[] = {
    {"decode 1 x 128k", SPREAD, 1, 128 * K, 0, true},
    {"decode 1 x 512k", SPREAD, 1, 512 * K, 0, false},
    {"decode 1 x 1M", SPREAD, 1, K *K, 0, true},
    {"decode 1 x 4M", SPREAD, 1, 4 * K *K, 0, false},
    {"decode 64 x 32k", WHOLE, 64, 32 * K, 0, true},
    {"decode 64 x 32k spread", SPREAD, 64, 32 * K, 0, false},
    {"prefill 128k", SPREAD, 1, 128 * K, 8 * K, true},
};

static const point_t small_points[] = {
    {"decode 1 x 4k", SPREAD, 1, 4 * K, 0, true}, {"decode 1 x 16k", SPREAD, 1, 16 * K, 0, true},
    {"decode 8 x 1k", WHOLE, 8, K, 0, true},      {"decode 8 x 1k spread", SPREAD, 8, K, 0, true},
    {"prefill 1k", SPREAD, 1, K, 256, true},
};

static const char *const merging_names[] = {"auto", "client", "group"};
static const char *const way_names[]     = {"host", "cuda", "enqueued"};

typedef struct bench {
    result_options_t result;
    setup_t setup;
    bool cpu, small, share;
    uint32_t workers[8], n_workers;
    bool merging[3], ways[WAYS];
    bool chosen; /* merging or ways were */
    uint32_t gpus;
    uint64_t end_ns;
    struct {
        bool there;
        uint64_t bits;
        double us[3][WAYS]; /* of one worker */
    } first[16];
} bench_t;

/* ---- arguments ---- */

static int
usage(void)
{
    fprintf(stderr, "bench_scaling [--quick] [--json FILE] [--cpu] [--workers 1,2,4,8]\n"
                    "              [--merging client,group,auto] [--ways host,cuda,enqueued]\n"
                    "              [--points NAME,...] [--share] [--seconds S]\n"
                    "  --cpu      workers of one thread each, and a small grid\n"
                    "  --points   those whose names begin so: 'decode 1 x 1M', prefill\n"
                    "  --share    let workers share GPUs: for bits, not for times\n"
                    "  --seconds  begin nothing after so many (540)\n");
    return 2;
}

/* Words with commas between them. @return false: one is none of the names */
static bool
take_words(char *text, const char *const *names, uint32_t n, bool *into)
{
    memset(into, 0, n * sizeof(*into));
    for (char *word = strtok(text, ","); word != NULL; word = strtok(NULL, ",")) {
        uint32_t i = 0;
        while (i < n && strcmp(word, names[i]) != 0) {
            i++;
        }
        if (i == n) {
            return false;
        }
        into[i] = true;
    }
    return true;
}

static bool
take_workers(bench_t *b, char *text)
{
    b->n_workers = 0;
    for (char *word = strtok(text, ","); word != NULL; word = strtok(NULL, ",")) {
        long n = atol(word);
        if (n < 1 || n > (long)PROCESSES_WORKERS_MAX || b->n_workers == 8) {
            return false;
        }
        b->workers[b->n_workers++] = (uint32_t)n;
    }
    return b->n_workers > 0;
}

/* Those whose names begin with a word, or without one those of the run. @return how many */
static uint32_t
choose_points(bench_t *b, char *text)
{
    uint32_t n = 0;

    for (uint32_t p = 0; p < b->setup.n_points; p++) {
        const point_t *point = &b->setup.points[p];
        b->setup.wanted[p]   = text == NULL && (point->quick || !b->result.quick);
    }
    for (char *word = text != NULL ? strtok(text, ",") : NULL; word != NULL;
         word       = strtok(NULL, ",")) {
        bool whole = false; /* a name itself does not mean those that it begins */
        for (uint32_t p = 0; p < b->setup.n_points; p++) {
            whole = whole || strcmp(b->setup.points[p].name, word) == 0;
        }
        for (uint32_t p = 0; p < b->setup.n_points; p++) {
            const char *name = b->setup.points[p].name;
            b->setup.wanted[p] =
                b->setup.wanted[p] ||
                (whole ? strcmp(name, word) == 0 : strncmp(name, word, strlen(word)) == 0);
        }
    }
    for (uint32_t p = 0; p < b->setup.n_points; p++) {
        n += b->setup.wanted[p];
    }
    return n;
}

static bool
take_option(bench_t *b, const char *name, char *value, char **names, double *seconds)
{
    if (strcmp(name, "--workers") == 0) {
        return take_workers(b, value);
    }
    if (strcmp(name, "--merging") == 0) {
        b->chosen = true;
        return take_words(value, merging_names, 3, b->merging);
    }
    if (strcmp(name, "--ways") == 0) {
        b->chosen = true;
        return take_words(value, way_names, WAYS, b->ways);
    }
    if (strcmp(name, "--seconds") == 0) {
        *seconds = atof(value);
        return *seconds > 0;
    }
    *names = value;
    return strcmp(name, "--points") == 0;
}

static bool
take_arguments(bench_t *b, int argc, char **argv)
{
    char *names    = NULL;
    double seconds = 540;
    bool fine      = true;

    *b                              = (bench_t){.workers = {1, 2, 4, 8}, .n_workers = 4};
    argc                            = result_options(&b->result, argc, argv);
    b->merging[ATTN_MERGING_CLIENT] = b->merging[ATTN_MERGING_GROUP] = true;
    b->ways[WAY_HOST] = b->ways[WAY_CUDA] = b->ways[WAY_ENQUEUED] = true;
    for (int i = 1; i < argc && fine; i++) {
        if (strcmp(argv[i], "--cpu") == 0) {
            b->cpu = b->small = true;
        } else if (strcmp(argv[i], "--small") == 0) {
            b->small = true;
        } else if (strcmp(argv[i], "--share") == 0) {
            b->share = true;
        } else {
            fine = i + 1 < argc && take_option(b, argv[i], argv[i + 1], &names, &seconds);
            i++;
        }
    }
    b->end_ns         = attn_now_ns() + (uint64_t)(seconds * 1e9);
    b->setup          = b->small ? (setup_t){.q_heads = 8, .kv_heads = 2, .dim = 64, .chunk = 256}
                                 : (setup_t){.q_heads  = 32,
                                             .kv_heads = 8,
                                             .dim      = 128,
                                             .chunk    = 8192,
                                             .ucx_slab = UINT64_C(512) << 20};
    b->setup.threads  = 1;
    b->setup.points   = b->small ? small_points : all_points;
    b->setup.n_points = b->small ? sizeof(small_points) / sizeof(small_points[0])
                                 : sizeof(all_points) / sizeof(all_points[0]);
    b->setup.runs     = 16;
    b->setup.seconds  = b->result.quick ? 0.2 : 1.0;
    return fine && choose_points(b, names) > 0;
}

/* ---- rows ---- */

/* 1 GPU (or none of that size) has no other's partials: one way of merging is as good as another.
 */
static bool
is_meant(const bench_t *b, const row_t *row)
{
    bool alone = row->workers == 1 || row->point->placement == WHOLE;

    return b->merging[row->merging] && b->ways[row->way] &&
           (row->merging == ATTN_MERGING_CLIENT || !alone) && (!b->cpu || row->way == WAY_HOST) &&
           (!b->cpu || row->merging == ATTN_MERGING_CLIENT || b->chosen) &&
           (row->way != WAY_ENQUEUED || row->point->piece == 0);
}

static void
write_row(const bench_t *b, const row_t *row, const char *bits, double speedup)
{
    bool shared = b->setup.gpus > 0 && row->workers > b->gpus;
    char head[256];

    snprintf(head, sizeof(head),
             "\"case\":\"%s\",\"kind\":\"%s\",\"lies\":\"%s\",\"workers\":%u,\"merging\":\"%s\","
             "\"way\":\"%s\"",
             row->point->name, row->point->piece > 0 ? "prefill" : "decode",
             row->point->placement == WHOLE ? "whole" : "spread", row->workers,
             merging_names[row->merging], way_names[row->way]);
    if (row->absent[0] != '\0') {
        char text[256];
        result_text(row->absent, text);
        result_json(&b->result, "scaling", "%s,\"absent\":\"%s\"", head, text);
        return;
    }
    result_json(&b->result, "scaling",
                "%s,\"value\":%.3f,\"unit\":\"us\",\"p90\":%.3f,\"p99\":%.3f,\"samples\":%u,"
                "\"computed\":%.3f,\"begin\":%.3f,\"commit\":%.3f,\"hop\":%.3f,\"send\":%.3f,"
                "\"predicted\":%.3f,\"predicted_parts\":{\"attend\":%.3f,\"hop\":%.3f,"
                "\"link\":%.3f,\"merge\":%.3f},\"speedup\":%.4f,\"bits\":\"%s\","
                "\"hash\":\"%016" PRIx64 "\",\"grouped\":%s,\"shared\":%s,\"transport\":\"%s\"",
                head, row->us, row->p90, row->p99, row->samples, row->computed, row->begin,
                row->commit, row->hop, row->send, row->predicted, row->predicted_attend,
                row->predicted_hop, row->predicted_link, row->predicted_merge, speedup, bits,
                row->bits, row->grouped ? "true" : "false", shared ? "true" : "false",
                row->transport);
}

static void
tell_row(bench_t *b, const row_t *row)
{
    uint32_t p       = (uint32_t)(row->point - b->setup.points);
    const char *bits = "equal";

    printf("%-23s %2u %-6s %-8s |", row->point->name, row->workers, merging_names[row->merging],
           way_names[row->way]);
    if (row->absent[0] != '\0') {
        printf(" left out: %s\n", row->absent);
        fflush(stdout);
        write_row(b, row, "", 0);
        return;
    }
    if (!b->first[p].there) {
        b->first[p].there = true;
        b->first[p].bits  = row->bits;
        bits              = "first";
    } else if (b->first[p].bits != row->bits) {
        bits = "DIFFER";
    }
    double *one = b->first[p].us[ATTN_MERGING_CLIENT];
    if (row->workers == 1) {
        one[row->way] = row->us;
    }
    double speedup = one[row->way] > 0 ? one[row->way] / row->us : 0;
    printf(" %10.1f %10.1f | %10.1f %8.1f %8.1f | %10.1f | %6.2f %5.0f %% | %s%s%s\n", row->us,
           row->p99, row->computed, row->us - row->computed, row->begin + row->commit,
           row->predicted, speedup, 100 * speedup / row->workers, bits,
           row->gpu_reason[0] != '\0' ? "; staged: " : "", row->gpu_reason);
    fflush(stdout);
    write_row(b, row, bits, speedup);
}

/* A row that is not even tried. */
static void
leave_out(bench_t *b, uint32_t workers, const char *reason)
{
    for (uint32_t p = 0; p < b->setup.n_points; p++) {
        row_t row = {
            .point = &b->setup.points[p], .workers = workers, .merging = ATTN_MERGING_CLIENT};
        snprintf(row.absent, sizeof(row.absent), "%s", reason);
        if (b->setup.wanted[p]) {
            tell_row(b, &row);
        }
    }
}

static void
measure(bench_t *b, uint32_t workers)
{
    static const attn_merging_t merging[] = {ATTN_MERGING_CLIENT, ATTN_MERGING_GROUP,
                                             ATTN_MERGING_AUTO};
    world_t world;

    if (!world_open(&world, &b->setup, workers)) {
        leave_out(b, workers, "its workers did not come up");
        return;
    }
    printf("%u worker%s: %.2f GB of k and v filled in %.1f s\n", workers, workers > 1 ? "s" : "",
           (double)world.fill_bytes / 1e9, world.fill_seconds);
    for (uint32_t p = 0; p < b->setup.n_points; p++) {
        for (uint32_t i = 0; b->setup.wanted[p] && i < 3 * WAYS; i++) {
            row_t row = {.point   = &b->setup.points[p],
                         .workers = workers,
                         .merging = merging[i / WAYS],
                         .way     = (way_t)(i % WAYS)};
            if (!is_meant(b, &row)) {
                continue;
            }
            if (attn_now_ns() > b->end_ns) {
                snprintf(row.absent, sizeof(row.absent), "the time was over (--seconds)");
            } else {
                measure_row(&world, &row);
            }
            tell_row(b, &row);
        }
    }
    world_close(&world);
}

int
main(int argc, char **argv)
{
    static bench_t b;

    if (!take_arguments(&b, argc, argv)) {
        return usage();
    }
    if (!b.cpu) {
        b.gpus       = gpu_count();
        b.setup.gpus = b.gpus;
        if (b.gpus == 0) {
            fprintf(stderr, "bench_scaling: %s: --cpu measures without\n", attn_last_error());
            return 1;
        }
    }
    printf("a layer, microseconds: %u query heads, %u KV heads of %u, bf16; %s\n"
           "%-23s %2s %-6s %-8s | %10s %10s | %10s %8s %8s | %10s | %6s %7s | bits\n",
           b.setup.q_heads, b.setup.kv_heads, b.setup.dim,
           b.cpu ? "workers on this machine's CPU" : "a GPU for each worker", "", "n", "merged",
           "tensors", "p50", "p99", "computed", "beside", "begin +", "predicted", "x", "");
    for (uint32_t i = 0; i < b.n_workers; i++) {
        char reason[64];
        snprintf(reason, sizeof(reason), "%u GPU%s here", b.gpus, b.gpus > 1 ? "s" : "");
        if (b.cpu || b.workers[i] <= b.gpus || b.share) {
            measure(&b, b.workers[i]);
        } else {
            leave_out(&b, b.workers[i], reason);
        }
    }
    return 0;
}
