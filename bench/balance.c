/*
 * balance.c: the coordinator's directory with many workers and many sequences, simulated: how
 * evenly KV and reading fall on the workers, how long a placement takes, and what a chunk costs
 * in memory. Only the directory's own interface is used, with no I/O; everything but the times
 * follows from the seed.
 *
 *     bench_balance [--workers N] [--sequences N]... [--seed N] [--check] [--json FILE] [--quick]
 *
 * Lengths are skewed: a third of the sequences log-normal (median 4,096 tokens, sigma 1.5), the
 * others Zipf (512 tokens times a rank up to 2,048, exponent 1.5). Half of the clients tell the
 * length beforehand; of the others half bring the prompt at once and half in pieces of a chunk.
 * After the fill comes churn, half as many operations as sequences: sequences are freed and made
 * anew, grow, are cut and forked, and one worker in a hundred is lost and another one joins: who
 * had chunks there prefills again. --check fails unless the bounds that do not depend on the
 * machine hold.
 */
#include "balancer/directory.h"
#include "base/clock.h"
#include "bench/result.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 8192u
#define PAGE 64u
#define CACHE_FILL 0.6 /* of all regions, by the sequences' tokens alone */
#define BATCH 4096u    /* sequences of a decode step */
#define BATCHES 20u    /* whose balance is averaged */
#define RANKS 2048u    /* of the Zipf lengths */
#define LENGTH_MAX (1u << 20)
#define WORKER_IDS (DIR_WORKERS_MAX * 2u)

/* The bounds: see docs/performance.md. */
#define BYTES_PER_CHUNK_MAX 100.0
#define PLACEMENT_P99_US_MAX 100.0
#define EVEN_FILLED 1.02
#define EVEN_CHURNED 1.5

/* Times of one kind of call, in microseconds. */
typedef struct times {
    const char *name;
    double *at;
    uint64_t n, room;
} times_t;

typedef enum kind {
    T_CREATE,
    T_PLACE,
    T_FORK,
    T_CUT,
    T_FREE,
    T_KINDS,
} kind_t;

typedef struct sim {
    uint64_t seed;
    directory_t *directory;
    uint32_t workers, client;
    uint64_t cache;
    uint32_t region_pages;
    uint64_t n, target; /* sequences: now and wanted */
    attn_seq_t *seqs;
    uint32_t *tokens;
    times_t times[T_KINDS];
    uint64_t joined, effects, refused;
    uint64_t *arrivals; /* [WORKER_IDS] first chunks since the last join */
    double zipf[RANKS];
} sim_t;

static uint64_t
next_random(sim_t *s)
{
    s->seed ^= s->seed << 13;
    s->seed ^= s->seed >> 7;
    s->seed ^= s->seed << 17;
    return s->seed * UINT64_C(0x2545f4914f6cdd1d);
}

static double
next_unit(sim_t *s)
{
    return (double)(next_random(s) >> 11) * 0x1p-53;
}

/* ---- lengths ---- */

static void
zipf_init(sim_t *s)
{
    double sum = 0;

    for (uint32_t r = 0; r < RANKS; r++) {
        sum += pow(r + 1, -1.5);
        s->zipf[r] = sum;
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        s->zipf[r] /= sum;
    }
}

static uint32_t
next_length(sim_t *s)
{
    double length;

    if (next_random(s) % 3 == 0) {
        double u = 1.0 - next_unit(s), v = next_unit(s);
        length = 4096 * exp(1.5 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
    } else {
        double u     = next_unit(s);
        uint32_t low = 0, high = RANKS - 1;
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            if (s->zipf[middle] < u) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        length = 512.0 * (low + next_unit(s));
    }
    return length < 1 ? 1 : length > LENGTH_MAX ? LENGTH_MAX : (uint32_t)length;
}

/* ---- timed calls ---- */

static void
note_time(sim_t *s, kind_t kind, uint64_t start)
{
    times_t *t = &s->times[kind];
    double us  = (double)(attn_now_ns() - start) / 1e3;

    if (t->n == t->room) {
        t->room = t->room ? 2 * t->room : 4096;
        t->at   = realloc(t->at, t->room * sizeof(*t->at));
        if (t->at == NULL) {
            fprintf(stderr, "no memory for times\n");
            exit(1);
        }
    }
    t->at[t->n++] = us;
}

static void
on_effect(void *arg, const dir_effect_t *effect)
{
    sim_t *s = arg;

    (void)effect;
    s->effects++;
}

static void
place(sim_t *s, attn_seq_t seq, uint64_t tokens)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = directory_seq_reserve(s->directory, seq, tokens);

    note_time(s, T_PLACE, start);
    if (status == ATTN_ERR_EXHAUSTED) {
        s->refused++;
        return;
    }
    result_must(status);
}

static void
note_arrival(sim_t *s, attn_seq_t seq)
{
    const seq_chunk_t *first = seq_chunk_at(directory_sequences(s->directory), seq, 0);

    if (first != NULL && first->worker < WORKER_IDS) {
        s->arrivals[first->worker]++;
    }
}

static void
make(sim_t *s, uint64_t at, uint32_t tokens)
{
    uint64_t way   = next_random(s) % 4;
    uint64_t start = attn_now_ns();

    result_must(directory_seq_create(s->directory, s->cache, s->client, way < 2 ? tokens : 0,
                                     &s->seqs[at]));
    note_time(s, T_CREATE, start);
    for (uint32_t done = CHUNK; way == 3 && done < tokens; done += CHUNK) {
        place(s, s->seqs[at], done);
    }
    place(s, s->seqs[at], tokens);
    s->tokens[at] = tokens;
    note_arrival(s, s->seqs[at]);
}

static void
remake(sim_t *s, uint64_t at, uint32_t tokens)
{
    uint64_t start = attn_now_ns();

    result_must(directory_seq_free(s->directory, s->seqs[at]));
    note_time(s, T_FREE, start);
    make(s, at, tokens);
}

/* ---- workers ---- */

static void
join(sim_t *s)
{
    dir_worker_t hello = {.slab_bytes = UINT64_C(100) << 30, .speed.read_bandwidth = 4e12};
    uint32_t id;

    hello.incarnation = ++s->joined;
    snprintf(hello.address, sizeof(hello.address), "worker-%llu:1", (unsigned long long)s->joined);
    snprintf(hello.kind, sizeof(hello.kind), "simulated");
    result_must(directory_worker_join(s->directory, &hello, 1, &id));
    result_must(directory_cache_on_worker(s->directory, s->cache, id, s->region_pages));
    memset(s->arrivals, 0, WORKER_IDS * sizeof(*s->arrivals));
}

/* A worker is lost; whoever had chunks there prefills again. */
static void
lose(sim_t *s)
{
    static uint32_t ids[DIR_WORKERS_MAX];
    const seq_table_t *table = directory_sequences(s->directory);
    uint32_t n               = directory_workers_alive(s->directory, ids, DIR_WORKERS_MAX);
    uint32_t lost            = ids[next_random(s) % n];

    directory_worker_lose(s->directory, lost);
    for (uint64_t i = 0; i < s->n; i++) {
        const seq_chunk_t *chunk;
        for (uint32_t c = 0; (chunk = seq_chunk_at(table, s->seqs[i], c)) != NULL; c++) {
            if (chunk->worker == lost) {
                remake(s, i, s->tokens[i]);
                break;
            }
        }
    }
}

/* ---- churn ---- */

static void
grow(sim_t *s, uint64_t at)
{
    uint64_t tokens = s->tokens[at] + next_random(s) % CHUNK;

    if (tokens < LENGTH_MAX) {
        s->tokens[at] = (uint32_t)tokens;
        place(s, s->seqs[at], tokens);
    }
}

static void
cut(sim_t *s, uint64_t at)
{
    uint32_t tokens = 1 + (uint32_t)(next_random(s) % s->tokens[at]);
    uint64_t start  = attn_now_ns();

    result_must(directory_seq_cut(s->directory, s->seqs[at], (tokens + CHUNK - 1) / CHUNK));
    note_time(s, T_CUT, start);
    s->tokens[at] = tokens;
}

/* The fork takes the place of another sequence, so that their number stays. */
static void
fork_from(sim_t *s, uint64_t at, uint64_t instead)
{
    uint32_t tokens = 1 + (uint32_t)(next_random(s) % s->tokens[at]);
    uint64_t tail, start;

    if (at == instead) {
        return;
    }
    result_must(directory_seq_free(s->directory, s->seqs[instead]));
    start = attn_now_ns();
    result_must(directory_seq_fork(s->directory, s->seqs[at], s->client, tokens / CHUNK,
                                   tokens % CHUNK != 0, &s->seqs[instead], &tail));
    note_time(s, T_FORK, start);
    s->tokens[instead] = tokens;
}

static void
churn(sim_t *s)
{
    uint64_t ops = s->n / 2, losses = s->workers / 100;

    for (uint64_t i = 0; i < ops; i++) {
        uint64_t at = next_random(s) % s->n, what = next_random(s) % 100;
        if (losses > 0 && i % (ops / losses + 1) == ops / losses / 2) {
            lose(s);
            join(s);
        }
        if (what < 35) {
            remake(s, at, next_length(s));
        } else if (what < 70) {
            grow(s, at);
        } else if (what < 85) {
            cut(s, at);
        } else {
            fork_from(s, at, next_random(s) % s->n);
        }
    }
}

/* ---- what came of it ---- */

typedef struct loads {
    double bytes[WORKER_IDS]; /* tokens held: chunks that several list count once */
    double reads[WORKER_IDS]; /* tokens read, if every sequence asks once */
} loads_t;

static void
add_loads(const sim_t *s, uint64_t at, loads_t *loads)
{
    const seq_table_t *table = directory_sequences(s->directory);
    const seq_chunk_t *chunk;

    for (uint32_t c = 0; (chunk = seq_chunk_at(table, s->seqs[at], c)) != NULL; c++) {
        uint64_t first = (uint64_t)c * CHUNK;
        if (first >= s->tokens[at]) {
            break;
        }
        double held = s->tokens[at] - first < CHUNK ? (double)(s->tokens[at] - first) : CHUNK;
        loads->bytes[chunk->worker % WORKER_IDS] += held / chunk->references;
        loads->reads[chunk->worker % WORKER_IDS] += held;
    }
}

static double
max_over_mean(const sim_t *s, const double *load)
{
    static uint32_t ids[DIR_WORKERS_MAX];
    uint32_t n = directory_workers_alive(s->directory, ids, DIR_WORKERS_MAX);
    double sum = 0, most = 0;

    for (uint32_t i = 0; i < n; i++) {
        sum += load[ids[i]];
        most = load[ids[i]] > most ? load[ids[i]] : most;
    }
    return sum > 0 ? most * n / sum : 0;
}

typedef struct figures {
    double bytes, reads, batch; /* max over mean */
    double arrivals;            /* the busiest worker's part of the sequences since the last join */
    double bytes_per_chunk;
    uint64_t chunks;
} figures_t;

static figures_t
look(sim_t *s)
{
    static loads_t loads;
    const seq_table_t *table = directory_sequences(s->directory);
    figures_t f              = {.chunks = seq_chunk_count(table)};
    uint64_t sum = 0, most = 0;

    memset(&loads, 0, sizeof(loads));
    for (uint64_t i = 0; i < s->n; i++) {
        add_loads(s, i, &loads);
    }
    f.bytes           = max_over_mean(s, loads.bytes);
    f.reads           = max_over_mean(s, loads.reads);
    f.bytes_per_chunk = (double)seq_table_bytes(table) / (double)f.chunks;
    for (uint32_t b = 0; b < BATCHES; b++) {
        memset(&loads, 0, sizeof(loads));
        for (uint32_t i = 0; i < BATCH; i++) {
            add_loads(s, next_random(s) % s->n, &loads);
        }
        f.batch += max_over_mean(s, loads.reads) / BATCHES;
    }
    for (uint32_t w = 0; w < WORKER_IDS; w++) {
        sum += s->arrivals[w];
        most = s->arrivals[w] > most ? s->arrivals[w] : most;
    }
    f.arrivals = sum > 0 ? (double)most / (double)sum : 0;
    return f;
}

static void
report(const result_options_t *options, const sim_t *s, const char *name, double value,
       const char *unit, double target)
{
    char judged[64] = "";

    if (target > 0) {
        snprintf(judged, sizeof(judged), ",\"target\":%g,\"sense\":\"most\"", target);
    }
    result_json(options, "balance",
                "\"case\":\"%s, %llu sequences\",\"of\":\"%s\",\"sequences\":%llu,\"workers\":%u,"
                "\"value\":%.6g,\"unit\":\"%s\"%s",
                name, (unsigned long long)s->n, name, (unsigned long long)s->n, s->workers, value,
                unit, judged);
}

static void
report_loads(const result_options_t *options, const sim_t *s, const char *when, const figures_t *f)
{
    char name[64];
    const struct {
        const char *name;
        double value;
        const char *unit;
        double target;
    } rows[] = {{"bytes_max_mean", f->bytes, "ratio", 0},
                {"reads_max_mean", f->reads, "ratio", 0},
                {"batch_reads_max_mean", f->batch, "ratio", 0},
                {"bytes_per_chunk", f->bytes_per_chunk, "B", BYTES_PER_CHUNK_MAX}};

    printf("  %-6s %9llu chunks, %5.1f B each; max/mean: KV %.3f, reads %.3f, reads of a batch "
           "%.2f\n",
           when, (unsigned long long)f->chunks, f->bytes_per_chunk, f->bytes, f->reads, f->batch);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        snprintf(name, sizeof(name), "%s_%s", when, rows[i].name);
        report(options, s, name, rows[i].value, rows[i].unit, rows[i].target);
    }
}

static void
report_times(const result_options_t *options, sim_t *s)
{
    static const char *const names[T_KINDS] = {"create", "placement", "fork", "cut", "free"};
    char name[64];

    for (int k = 0; k < T_KINDS; k++) {
        times_t *t = &s->times[k];
        double p50 = result_quantile(t->at, t->n, 0.5), p99 = result_quantile(t->at, t->n, 0.99);
        double most = result_quantile(t->at, t->n, 1);
        printf("  %-9s %9llu calls: p50 %7.2f us, p99 %7.2f us, max %9.2f us\n", names[k],
               (unsigned long long)t->n, p50, p99, most);
        snprintf(name, sizeof(name), "%s_p50", names[k]);
        report(options, s, name, p50, "us", 0);
        snprintf(name, sizeof(name), "%s_p99", names[k]);
        report(options, s, name, p99, "us", k == T_PLACE ? PLACEMENT_P99_US_MAX : 0);
        snprintf(name, sizeof(name), "%s_max", names[k]);
        report(options, s, name, most, "us", 0);
    }
}

/* ---- a run ---- */

static void
sim_open(sim_t *s, uint32_t workers, uint64_t sequences, uint64_t seed)
{
    directory_options_t options;
    attn_geometry_t geometry = {.size       = sizeof(geometry),
                                .layers     = 32,
                                .q_heads    = 32,
                                .kv_heads   = 8,
                                .head_dim_k = 128,
                                .head_dim_v = 128,
                                .kv_dtype   = ATTN_F16,
                                .page_size  = PAGE,
                                .chunk_size = CHUNK};
    double chunks            = 0;
    bool created;

    *s = (sim_t){.seed = seed, .workers = workers, .target = sequences};
    zipf_init(s);
    for (int i = 0; i < 10000; i++) { /* what a sequence takes on average, and a chunk in advance */
        chunks += (next_length(s) + CHUNK - 1) / CHUNK + 1;
    }
    s->region_pages =
        (uint32_t)ceil(chunks / 10000 * (double)sequences / workers / CACHE_FILL + 8) *
        (CHUNK / PAGE);
    s->seqs     = calloc(sequences, sizeof(*s->seqs));
    s->tokens   = calloc(sequences, sizeof(*s->tokens));
    s->arrivals = calloc(WORKER_IDS, sizeof(*s->arrivals));
    if (s->seqs == NULL || s->tokens == NULL || s->arrivals == NULL) {
        fprintf(stderr, "no memory for %llu sequences\n", (unsigned long long)sequences);
        exit(1);
    }
    directory_options_init(&options);
    result_must(directory_create(&options, on_effect, s, &s->directory));
    result_must(directory_client_open(s->directory, "bench", 1, &s->client));
    directory_client_link(
        s->directory, s->client,
        &(cost_link_t){.hop_seconds = 20e-6, .send_seconds = 1e-6, .bandwidth = 25e9});
    result_must(
        directory_cache_open(s->directory, s->client, "kv", &geometry, &s->cache, &created));
    for (uint32_t w = 0; w < workers; w++) {
        join(s);
    }
}

static void
sim_close(sim_t *s)
{
    directory_destroy(s->directory);
    for (int k = 0; k < T_KINDS; k++) {
        free(s->times[k].at);
    }
    free(s->seqs);
    free(s->tokens);
    free(s->arrivals);
}

/* The bounds that hold on any machine: see docs/performance.md for what is usual. With few
 * sequences a worker there is no even way to place them. */
static bool
check(const sim_t *s, const figures_t *f, double evenness)
{
    double per_worker = (double)s->n / s->workers;
    double most       = evenness + 3 / per_worker;
    bool good = f->bytes_per_chunk <= BYTES_PER_CHUNK_MAX && s->refused == 0 && f->bytes <= most &&
                f->arrivals <= 0.1;

    if (!good) {
        printf("  FAILED: at most %.0f B a chunk, KV max/mean %.2f, 10 %% of what is new on one "
               "worker, and nothing refused\n",
               BYTES_PER_CHUNK_MAX, most);
    }
    return good;
}

static bool
simulate(const result_options_t *options, uint32_t workers, uint64_t sequences, uint64_t seed)
{
    static sim_t s;
    uint64_t start = attn_now_ns();
    figures_t f;

    sim_open(&s, workers, sequences, seed);
    while (s.n < sequences) {
        make(&s, s.n, next_length(&s));
        s.n++;
    }
    printf("%llu sequences on %u workers\n", (unsigned long long)sequences, workers);
    f = look(&s);
    report_loads(options, &s, "filled", &f);
    bool good = check(&s, &f, EVEN_FILLED);
    churn(&s);
    f = look(&s);
    report_loads(options, &s, "churned", &f);
    good = check(&s, &f, EVEN_CHURNED) && good;
    printf("  busiest worker since the last join: %.1f %% of new sequences; %llu placements "
           "refused\n",
           100 * f.arrivals, (unsigned long long)s.refused);
    report(options, &s, "arrivals_busiest", f.arrivals, "part", 0);
    report_times(options, &s);
    printf("  took %.1f s\n", (double)(attn_now_ns() - start) / 1e9);
    sim_close(&s);
    return good;
}

int
main(int argc, char **argv)
{
    result_options_t options;
    uint64_t sizes[16] = {10000, 100000, 1000000}, seed = 1;
    uint32_t workers = 1000, n = 0;
    bool checked = false, good = true;

    argc = result_options(&options, argc, argv);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0) {
            checked = true;
        } else if (strcmp(argv[i], "--workers") == 0 && i + 1 < argc) {
            workers = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--sequences") == 0 && i + 1 < argc && n < 16) {
            sizes[n++] = strtoull(argv[++i], NULL, 10);
        } else {
            fprintf(stderr, "usage: bench_balance [--workers N] [--sequences N]... [--seed N] "
                            "[--check] [--json FILE] [--quick]\n");
            return 2;
        }
    }
    if (workers < 1 || workers > DIR_WORKERS_MAX || seed == 0 || (n > 0 && sizes[0] == 0)) {
        fprintf(stderr, "1 to %u workers, a seed and at least one sequence\n", DIR_WORKERS_MAX);
        return 2;
    }
    n = n > 0 ? n : options.quick ? 2 : 3;
    for (uint32_t i = 0; i < n; i++) {
        good = simulate(&options, workers, sizes[i], seed * UINT64_C(0x9e3779b97f4a7c15)) && good;
    }
    return checked && !good;
}
