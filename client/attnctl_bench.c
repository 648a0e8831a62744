/*
 * attnctl_bench.c: `attnctl bench`: drive a cluster as runners would, measure, and verify.
 *
 * One load: how long begin, a layer and commit take, tokens a second, what each worker read.
 * --sweep: steps a second from few calls outstanding to many and from one client to 16; its ratio
 * is to the best of any point with no more clients and no more calls, so a service that
 * gets slower as load grows is below 1.
 */
#include "client/attnctl_bench.h"

#include "client/attnctl.h"
#include "client/attnctl_words.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SWEEP_TARGET 0.9
#define HEARTBEATS_MS 1200u /* the workers have told their figures by then */

static const char usage[] =
    "usage: attnctl [--target HOST:PORT] [--tls-... FILE] bench [options]\n"
    "\n"
    "Fills sequences, takes decode steps, measures them, and verifies answers against float64.\n"
    "\n"
    "  --heads N --kv-heads N --head-dim N --layers N   shape of the cache (8, 2, 64, 4)\n"
    "  --dtype f32|f16|bf16    of q, k and v (bf16)\n"
    "  --chunk N               tokens of a chunk; 0: the backend's default (0; of a sweep: 512)\n"
    "  --placement auto|spread|whole                    (spread)\n"
    "  --context N             tokens of a sequence (1024)\n"
    "  --batch N               sequences of a step (1)\n"
    "  --clients N             clients (1; at most 64)\n"
    "  --outstanding N         calls outstanding, over all clients (1; at most 1024)\n"
    "  --steps N               of each call outstanding; 0: as many as --seconds takes (0)\n"
    "  --seconds N             (5)\n"
    "  --verify N              one step in N is verified (1; of a sweep: 16)\n"
    "  --spin-us N             of the clients (50)\n"
    "  --thin                  through the coordinator's front door, not to the workers\n"
    "  --sweep                 1 to 64 calls outstanding, from 1 to 16 clients\n"
    "  --quick                 a second or so, enough to see that it works\n"
    "  --dev N                 start `attnd dev --workers N` for it, and end it\n"
    "  --attnd PATH            for --dev; default: beside attnctl\n"
    "  --json FILE             append the figures, one JSON object a line\n"
    "\n"
    "Exit codes: 0 fine; 1 a wrong answer, or the cluster failed; 2 wrong arguments.\n";

/* ---- options ---- */

enum {
    HEADS = 1,
    KV_HEADS,
    HEAD_DIM,
    LAYERS,
    DTYPE,
    CHUNK,
    PLACEMENT,
    CONTEXT,
    BATCH,
    CLIENTS,
    OUTSTANDING,
    STEPS,
    SECONDS,
    VERIFY,
    SPIN,
    THIN,
    SWEEP,
    QUICK,
    DEV,
    ATTND,
    JSON,
    TARGET,
    HELP
};

static const struct option options[] = {
    {"heads", required_argument, NULL, HEADS},
    {"kv-heads", required_argument, NULL, KV_HEADS},
    {"head-dim", required_argument, NULL, HEAD_DIM},
    {"layers", required_argument, NULL, LAYERS},
    {"dtype", required_argument, NULL, DTYPE},
    {"chunk", required_argument, NULL, CHUNK},
    {"placement", required_argument, NULL, PLACEMENT},
    {"context", required_argument, NULL, CONTEXT},
    {"batch", required_argument, NULL, BATCH},
    {"clients", required_argument, NULL, CLIENTS},
    {"outstanding", required_argument, NULL, OUTSTANDING},
    {"steps", required_argument, NULL, STEPS},
    {"seconds", required_argument, NULL, SECONDS},
    {"verify", required_argument, NULL, VERIFY},
    {"spin-us", required_argument, NULL, SPIN},
    {"thin", no_argument, NULL, THIN},
    {"sweep", no_argument, NULL, SWEEP},
    {"quick", no_argument, NULL, QUICK},
    {"dev", required_argument, NULL, DEV},
    {"attnd", required_argument, NULL, ATTND},
    {"json", required_argument, NULL, JSON},
    {"target", required_argument, NULL, TARGET},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

/* Options that are numbers: where they go, and their limits. */
static bool
take_number(bench_options_t *b, int option, const char *text)
{
    const attnctl_limits_t numbers[] = {
        {HEADS, &b->heads, 1, 256},        {KV_HEADS, &b->kv_heads, 1, 256},
        {HEAD_DIM, &b->head_dim, 32, 256}, {LAYERS, &b->layers, 1, 1024},
        {CHUNK, &b->chunk, 0, 1u << 20},   {CONTEXT, &b->context, 1, 1u << 24},
        {BATCH, &b->batch, 1, 1024},       {CLIENTS, &b->clients, 1, BENCH_CLIENTS_MAX},
        {STEPS, &b->steps, 0, 1u << 30},   {OUTSTANDING, &b->outstanding, 1, BENCH_OUTSTANDING_MAX},
        {SECONDS, &b->seconds, 1, 100000}, {VERIFY, &b->verify, 1, 1u << 30},
        {SPIN, &b->spin_us, 0, 1000000},   {DEV, &b->dev, 1, 64},
    };

    return attnctl_take_number(numbers, sizeof(numbers) / sizeof(numbers[0]), option, text);
}

/* The place of text among the words, which are one after the other; -1: not there. */
static int
word_of(const char *text, const char *words)
{
    for (int i = 0; *words != '\0'; i++, words += strlen(words) + 1) {
        if (strcmp(text, words) == 0) {
            return i;
        }
    }
    return -1;
}

static bool
take_option(bench_options_t *b, int option)
{
    int word;

    switch (option) {
    case DTYPE:
        return attnctl_dtype(optarg, &b->dtype);
    case PLACEMENT:
        word         = word_of(optarg, "auto\0spread\0whole\0");
        b->placement = (attn_placement_t)word;
        return word >= 0;
    case THIN:
        b->thin = true;
        return true;
    case SWEEP:
        b->sweep = true;
        return true;
    case QUICK:
        b->quick = true;
        return true;
    case ATTND:
        b->attnd = optarg;
        return true;
    case JSON:
        b->json = optarg;
        return true;
    case TARGET:
        b->target = optarg;
        return true;
    default:
        return take_number(b, option, optarg);
    }
}

/* @return -1, or the code to exit with */
static int
take_options(int argc, char **argv, bench_options_t *b)
{
    int option;

    optind = 0; /* attnctl has looked at these already */
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == HELP || option == 'h') {
            fputs(usage, stdout);
            return ATTNCTL_OK;
        }
        if (!take_option(b, option)) {
            fprintf(stderr,
                    "attnctl: bench: wrong option or value%s%s (see attnctl bench --help)\n",
                    optarg != NULL ? ": " : "", optarg != NULL ? optarg : "");
            return ATTNCTL_USAGE;
        }
    }
    const char *mistake = optind < argc                 ? "takes options only"
                          : b->heads % b->kv_heads != 0 ? "--heads is a multiple of --kv-heads"
                          : b->heads * b->head_dim > 1u << 15
                              ? "--heads times --head-dim: at most 32768"
                          : b->outstanding < b->clients && !b->sweep
                              ? "--outstanding is at least --clients: each has one call"
                              : NULL;
    if (mistake != NULL) {
        fprintf(stderr, "attnctl: bench: %s (see attnctl bench --help)\n", mistake);
        return ATTNCTL_USAGE;
    }
    if (b->verify == 0) {
        b->verify = b->sweep ? 16 : 1;
    }
    if (b->sweep && b->chunk == 0) {
        b->chunk = 512; /* chunks have room whole: 64 sequences are to fit a small worker */
    }
    return -1;
}

/* ---- JSON lines ---- */

static bool
append_json(const bench_options_t *b, cJSON *object)
{
    char *text = cJSON_PrintUnformatted(object);
    FILE *file = b->json != NULL ? fopen(b->json, "a") : NULL;
    bool fine  = b->json == NULL || (file != NULL && text != NULL);

    if (file != NULL) {
        fine = fine && fprintf(file, "%s\n", text) > 0;
        fine = fclose(file) == 0 && fine;
    }
    cJSON_free(text);
    cJSON_Delete(object);
    if (!fine) {
        fprintf(stderr, "attnctl: --json %s: %s\n", b->json, strerror(errno));
    }
    return fine;
}

static int
verdict(uint64_t verified, uint64_t wrong)
{
    printf("verified %" PRIu64 " answers, %" PRIu64 " wrong\n", verified, wrong);
    fflush(stdout);
    return wrong > 0 ? ATTNCTL_PROBLEM : ATTNCTL_OK;
}

static int
failed(const char *target, attn_status_t status)
{
    fprintf(stderr, "attnctl: bench: %s: %s (%s)\n", target, attn_last_error(),
            attn_strerror(status));
    return status == ATTN_ERR_INVALID || status == ATTN_ERR_UNSUPPORTED ? ATTNCTL_USAGE
                                                                        : ATTNCTL_PROBLEM;
}

/* ---- one load ---- */

static void
wait_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
}

static bool
print_call(const bench_options_t *b, const char *call, bench_samples_t *samples)
{
    cJSON *object = cJSON_CreateObject();
    double p50 = bench_quantile(samples, 0.5), p90 = bench_quantile(samples, 0.9),
           p99 = bench_quantile(samples, 0.99);

    printf("%-8s %12" PRIu64 " %10.1f %10.1f %10.1f\n", call, samples->n, p50, p90, p99);
    cJSON_AddStringToObject(object, "bench", "cluster");
    cJSON_AddStringToObject(object, "case", call);
    cJSON_AddNumberToObject(object, "value", p50);
    cJSON_AddStringToObject(object, "unit", "us");
    cJSON_AddNumberToObject(object, "p90", p90);
    cJSON_AddNumberToObject(object, "p99", p99);
    cJSON_AddNumberToObject(object, "calls", (double)samples->n);
    return append_json(b, object);
}

/* KV bytes that each worker read between two views, a second. */
static void
print_workers(const attn_cluster_info_t *before, const attn_cluster_info_t *after, double seconds)
{
    for (uint32_t i = 0; i < after->n_workers; i++) {
        uint64_t bytes = after->workers[i].kv_bytes;
        char text[16];
        for (uint32_t j = 0; j < before->n_workers; j++) {
            bytes -=
                before->workers[j].id == after->workers[i].id ? before->workers[j].kv_bytes : 0;
        }
        if (after->workers[i].alive) {
            printf("worker %u at %s read %s of KV a second\n", after->workers[i].id,
                   after->workers[i].address,
                   attnctl_bytes((uint64_t)((double)bytes / seconds), text));
        }
    }
}

static int
report(const bench_options_t *b, bench_result_t *r)
{
    cJSON *object = cJSON_CreateObject();
    bool written  = true;

    printf("%.1f tokens/s, %.1f steps/s: %" PRIu64 " steps of %u sequences of %u tokens and more, "
           "%u layers\n\n",
           (double)r->tokens / r->seconds, (double)r->steps / r->seconds, r->steps, b->batch,
           b->context, b->layers);
    printf("%-8s %12s %10s %10s %10s\n", "us", "calls", "p50", "p90", "p99");
    written = print_call(b, "begin", &r->begin) && written;
    written = print_call(b, "layer", &r->run) && written;
    written = print_call(b, "commit", &r->commit) && written;
    cJSON_AddStringToObject(object, "bench", "cluster");
    cJSON_AddStringToObject(object, "case", "tokens");
    cJSON_AddNumberToObject(object, "value", (double)r->tokens / r->seconds);
    cJSON_AddStringToObject(object, "unit", "tokens/s");
    cJSON_AddNumberToObject(object, "verified", (double)r->verified);
    cJSON_AddNumberToObject(object, "wrong", (double)r->wrong);
    written  = append_json(b, object) && written;
    int code = verdict(r->verified, r->wrong);
    return written ? code : ATTNCTL_PROBLEM;
}

static int
run_one(const bench_options_t *b, const char *target)
{
    attn_cluster_info_t before = {0}, after = {0};
    bench_load_t *load;
    bench_result_t result = {0};
    uint32_t ms           = b->steps > 0 ? 0 : b->quick ? 1000 : b->seconds * 1000;
    attn_status_t status  = bench_load_open(b, target, &load);

    if (status != ATTN_OK) {
        return failed(target, status);
    }
    attn_client_t *client = bench_load_client(load);
    if (client != NULL) {
        wait_ms(HEARTBEATS_MS);
        status = attn_cluster_describe(client, &before);
    }
    if (status == ATTN_OK) {
        status = bench_load_drive(load, b->outstanding, ms, &result);
    }
    if (status == ATTN_OK && client != NULL) {
        wait_ms(HEARTBEATS_MS);
        status = attn_cluster_describe(client, &after);
    }
    int code = status == ATTN_OK ? report(b, &result) : failed(target, status);
    if (status == ATTN_OK && client != NULL) {
        print_workers(&before, &after, result.seconds);
    }
    attn_cluster_info_free(&before);
    attn_cluster_info_free(&after);
    bench_result_free(&result);
    bench_load_close(load);
    return code;
}

/* ---- the sweep ---- */

static const uint32_t sweep_clients[]     = {1, 2, 4, 8, 16};
static const uint32_t sweep_outstanding[] = {1, 2, 4, 8, 16, 32, 64};
#define SWEEP_C (sizeof(sweep_clients) / sizeof(sweep_clients[0]))
#define SWEEP_O (sizeof(sweep_outstanding) / sizeof(sweep_outstanding[0]))
#define SWEEP_PASSES 5u /* the median counts */

typedef struct sweep {
    double value[SWEEP_C][SWEEP_O]; /* steps a second; 0: not measured */
    double worst;
    uint64_t verified, wrong;
} sweep_t;

typedef struct row {
    bench_result_t passes[SWEEP_O][SWEEP_PASSES]; /* zeros: not measured */
} row_t;

/* The best of any point of no more clients and no more calls. */
static double
best_below(const sweep_t *sweep, size_t c, size_t o)
{
    double best = 0;

    for (size_t i = 0; i <= c; i++) {
        for (size_t j = 0; j <= o; j++) {
            best = sweep->value[i][j] > best ? sweep->value[i][j] : best;
        }
    }
    return best;
}

static bool
tell_point(const bench_options_t *b, sweep_t *sweep, size_t c, size_t o, bench_result_t *r)
{
    double ratio  = sweep->value[c][o] / best_below(sweep, c, o);
    cJSON *object = cJSON_CreateObject();
    char name[64];

    sweep->worst = ratio < sweep->worst ? ratio : sweep->worst;
    printf("%8u %12u %12.0f %8.2f %10.1f %10.1f %10.1f\n", sweep_clients[c], sweep_outstanding[o],
           sweep->value[c][o], ratio, bench_quantile(&r->run, 0.5), bench_quantile(&r->run, 0.9),
           bench_quantile(&r->run, 0.99));
    fflush(stdout);
    snprintf(name, sizeof(name), "%u clients, %u outstanding%s", sweep_clients[c],
             sweep_outstanding[o], b->thin ? ", thin" : "");
    cJSON_AddStringToObject(object, "bench", "throughput");
    cJSON_AddStringToObject(object, "case", name);
    cJSON_AddNumberToObject(object, "clients", sweep_clients[c]);
    cJSON_AddNumberToObject(object, "outstanding", sweep_outstanding[o]);
    cJSON_AddNumberToObject(object, "value", sweep->value[c][o]);
    cJSON_AddStringToObject(object, "unit", "steps/s");
    cJSON_AddNumberToObject(object, "ratio", ratio);
    cJSON_AddNumberToObject(object, "target", SWEEP_TARGET);
    return append_json(b, object);
}

static double
rate(const bench_result_t *r)
{
    return (double)r->steps / r->seconds;
}

static int
by_rate(const void *a, const void *b)
{
    double x = rate(a), y = rate(b);

    return (x > y) - (x < y);
}

/* Drive all points of a row, so many times as SWEEP_PASSES: what disturbs for a moment, or for a
 * while, is in one pass of every point and in no median. */
static attn_status_t
drive_row(bench_load_t *load, uint32_t clients, uint32_t ms, row_t *row)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t pass = 0; pass < SWEEP_PASSES && status == ATTN_OK; pass++) {
        for (size_t o = 0; o < SWEEP_O && status == ATTN_OK; o++) {
            bench_result_t warm = {0};
            if (sweep_outstanding[o] < clients) {
                continue;
            }
            status = bench_load_drive(load, sweep_outstanding[o], ms / 4 + 1, &warm);
            bench_result_free(&warm);
            if (status == ATTN_OK) {
                status = bench_load_drive(load, sweep_outstanding[o], ms, &row->passes[o][pass]);
            }
        }
    }
    return status;
}

/* All points of one number of clients. */
static int
sweep_row(const bench_options_t *b, const char *target, sweep_t *sweep, size_t c)
{
    bench_options_t own = *b;
    row_t row           = {0};
    int code            = ATTNCTL_OK;
    uint32_t ms         = (b->quick ? 150 : b->seconds * 200) / SWEEP_PASSES; /* 25 points */
    bench_load_t *load;

    own.clients          = sweep_clients[c];
    own.outstanding      = sweep_outstanding[SWEEP_O - 1];
    attn_status_t status = bench_load_open(&own, target, &load);
    if (status != ATTN_OK) {
        return failed(target, status);
    }
    status = drive_row(load, sweep_clients[c], ms > 0 ? ms : 1, &row);
    for (size_t o = 0; o < SWEEP_O; o++) {
        bench_result_t *passes = row.passes[o];
        for (uint32_t i = 0; i < SWEEP_PASSES; i++) {
            sweep->verified += passes[i].verified;
            sweep->wrong += passes[i].wrong;
        }
        if (status == ATTN_OK && sweep_outstanding[o] >= sweep_clients[c]) {
            qsort(passes, SWEEP_PASSES, sizeof(*passes), by_rate);
            sweep->value[c][o] = rate(&passes[SWEEP_PASSES / 2]);
            code = tell_point(b, sweep, c, o, &passes[SWEEP_PASSES / 2]) ? code : ATTNCTL_PROBLEM;
        }
        for (uint32_t i = 0; i < SWEEP_PASSES; i++) {
            bench_result_free(&passes[i]);
        }
    }
    code = status != ATTN_OK ? failed(target, status) : code;
    bench_load_close(load);
    return code;
}

static int
run_sweep(const bench_options_t *b, const char *target)
{
    sweep_t sweep = {.worst = 1};
    int code      = ATTNCTL_OK;

    printf("%8s %12s %12s %8s %10s %10s %10s\n", "clients", "outstanding", "steps/s", "ratio",
           "layer p50", "p90", "p99 us");
    for (size_t c = 0; c < SWEEP_C && code == ATTNCTL_OK; c++) {
        code = sweep_row(b, target, &sweep, c);
    }
    if (code != ATTNCTL_OK) {
        return code;
    }
    printf("the worst point has %.2f of the best with no more load (target: %.1f)\n", sweep.worst,
           SWEEP_TARGET);
    return verdict(sweep.verified, sweep.wrong);
}

/*
 * Clients of one process share an epoll set in C core: one of their threads waits there for all
 * and wakes the others, which clients in processes of their own never do. With poll() each waits
 * for itself. Before C core starts, and after the daemons were started, which have one queue each.
 */
static void
poll_apart(void)
{
    setenv("GRPC_POLL_STRATEGY", "poll", 0);
}

int
attnctl_bench(int argc, char **argv, const char *target, const attn_client_options_t *options_all)
{
    bench_options_t b = {.heads       = 8,
                         .kv_heads    = 2,
                         .head_dim    = 64,
                         .layers      = 4,
                         .dtype       = ATTN_BF16,
                         .placement   = ATTN_PLACE_SPREAD,
                         .context     = 1024,
                         .batch       = 1,
                         .clients     = 1,
                         .outstanding = 1,
                         .seconds     = 5,
                         .spin_us     = 50,
                         .target      = target,
                         .client      = options_all};
    char address[64];
    int pid = -1;

    int code = take_options(argc, argv, &b);
    if (code >= 0) {
        return code;
    }
    bench_data_init();
    if (b.dev > 0) {
        pid = bench_dev_start(&b, address);
        if (pid < 0) {
            return ATTNCTL_PROBLEM;
        }
        b.target = address;
    }
    poll_apart();
    code = b.sweep ? run_sweep(&b, b.target) : run_one(&b, b.target);
    if (pid >= 0) {
        bench_dev_stop(pid);
    }
    return code;
}
