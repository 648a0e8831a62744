/*
 * copy.c: chunks of KV from one worker to another.
 *
 *     bench_copy [--quick] [--json FILE] [MIB]        default: 1,024
 *
 * A sequence of so many MiB goes to and fro between two workers, chunk by chunk, as `attnctl move`
 * does it: through shared memory, as messages of UCX's between workers that are different hosts as
 * far as memory goes, and over gRPC. Beside each, in turns: the same bytes copied in memory, their
 * checksum made, and the same bytes as bare gRPC answers of 2 MiB, one after the other (echo.h).
 *
 * Each byte is read out of pages, checked twice, and stored in pages. Between hosts a copy should
 * reach half of what bare gRPC does; through shared memory, where nothing else is done to a byte, a
 * quarter of one thread's memcpy. Where others use the machine, the CPU time of both workers says
 * more than the rate does.
 */
#include "bench/echo.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"
#include "client/attn.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LAYERS 16u
#define KV_HEADS 8u
#define DIM 128u
#define ROW (KV_HEADS * DIM * 2u) /* bytes of k, or of v, of a token of a layer */
#define CHUNK 2048u               /* tokens: 128 MiB of all layers */
#define STEP 1024u                /* tokens appended by one step */
#define TARGET 0.5                /* of bare gRPC */
#define TARGET_SHARED 0.25        /* of memcpy */
#define PART (2u << 20)           /* bytes of a bare answer, and of a part */
#define MIB (UINT64_C(1) << 20)

#define TURNS_MAX 16u

typedef struct side {
    const char *name;
    double gbps[TURNS_MAX];
} side_t;

enum { MEMCPY, CHECKSUM, BARE, COPY, SIDES };
enum { SHARED, MESSAGES, GRPC, WAYS };

typedef struct bench {
    result_options_t options;
    attn_client_options_t client;
    echo_t *echo;
    uint64_t bytes, tokens;
    uint32_t turns;
    uint8_t *from, *to;
} bench_t;

static attn_cache_t *
open_cache(attn_client_t *client, uint64_t bytes)
{
    attn_geometry_t g;
    attn_cache_t *cache;

    attn_geometry_init(&g);
    g.layers       = LAYERS;
    g.q_heads      = KV_HEADS;
    g.kv_heads     = KV_HEADS;
    g.head_dim_k   = DIM;
    g.head_dim_v   = DIM;
    g.kv_dtype     = ATTN_BF16;
    g.chunk_size   = CHUNK;
    g.placement    = ATTN_PLACE_WHOLE;
    g.region_bytes = bytes + 2 * (uint64_t)CHUNK * 2 * ROW * LAYERS;
    result_must(attn_cache_open(client, "copy", &g, &cache));
    return cache;
}

/* So many tokens, of numbers that are no two alike. */
static attn_seq_t
fill(attn_cache_t *cache, uint64_t tokens)
{
    uint16_t *rows = malloc((uint64_t)STEP * ROW);
    uint32_t x     = 1;
    attn_seq_t seq;

    for (uint64_t i = 0; i < (uint64_t)STEP * ROW / 2; i++) {
        x       = x * 1664525u + 1013904223u;
        rows[i] = (uint16_t)(x >> 16 & 0xbfff); /* finite */
    }
    result_must(attn_seq_create(cache, NULL, &seq));
    for (uint64_t base = 0; base < tokens; base += STEP) {
        attn_entry_t entry = {.seq = seq, .base = base, .n_new = STEP};
        attn_batch_t batch = {
            .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_BF16};
        attn_tensor_t kv = {.data = rows, .dtype = ATTN_BF16};
        attn_step_t *step;
        result_must(attn_step_begin(cache, &batch, &step));
        for (uint32_t l = 0; l < LAYERS; l++) {
            result_must(attn_step_run(step, l, NULL, &kv, &kv, NULL, NULL));
        }
        result_must(attn_step_commit(step, NULL));
    }
    free(rows);
    return seq;
}

/* Seconds to move all of it. */
static double
move(attn_cache_t *cache, attn_seq_t seq, uint32_t to, uint64_t bytes)
{
    uint64_t start = attn_now_ns(), moved_bytes = 0;
    attn_moved_t moved;

    do {
        result_must(attn_seq_move(cache, seq, 0, to, &moved));
        moved_bytes += moved.bytes;
    } while (moved.left > 0);
    if (moved_bytes != bytes) {
        fprintf(stderr, "%llu bytes moved, not %llu: %s\n", (unsigned long long)moved_bytes,
                (unsigned long long)bytes, moved.reason);
        exit(1);
    }
    return (double)(attn_now_ns() - start) * 1e-9;
}

/* CPU seconds that both workers have taken so far. */
static double
cpu_seconds(const cluster_t *cluster)
{
    double seconds = 0;

    for (uint32_t i = 0; i < cluster->n; i++) {
        unsigned long long user, system;
        char path[64];
        snprintf(path, sizeof(path), "/proc/%d/stat", (int)cluster->workers[i].pid);
        FILE *file = fopen(path, "r");
        if (file == NULL ||
            fscanf(file, "%*d %*s %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user,
                   &system) != 2) {
            fprintf(stderr, "%s cannot be read\n", path);
            exit(1);
        }
        fclose(file);
        seconds += (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
    }
    return seconds;
}

static double
bare(echo_t *echo, uint64_t bytes)
{
    uint64_t start = attn_now_ns();

    for (uint64_t done = 0; done < bytes; done += PART) {
        echo_round(echo, 64, PART);
    }
    return (double)(attn_now_ns() - start) * 1e-9;
}

static double
in_memory(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint64_t start = attn_now_ns();

    memcpy(to, from, bytes);
    return (double)(attn_now_ns() - start) * 1e-9;
}

/* In parts as they are sent. */
static double
checksums(const uint8_t *from, uint64_t bytes)
{
    volatile uint64_t sum = 0;
    uint64_t start        = attn_now_ns();

    for (uint64_t done = 0; done < bytes; done += ENGINE_EXPORT_BYTES_MAX) {
        sum += engine_checksum(&(engine_export_t){.chunk = done}, from + done,
                               ENGINE_EXPORT_BYTES_MAX);
    }
    return (double)(attn_now_ns() - start) * 1e-9;
}

/* In turns. @param cpu  [turns] CPU seconds of both workers, for each GB */
static void
measure(const bench_t *b, const cluster_t *cluster, side_t sides[SIDES], double *cpu)
{
    double gb = (double)b->bytes * 1e-9;
    attn_client_t *client;
    attn_moved_t moved;

    result_must(attn_client_open(cluster->coordinator.line, &b->client, &client));
    attn_cache_t *cache = open_cache(client, b->bytes);
    attn_seq_t seq      = fill(cache, b->tokens);
    do { /* wherever it is; the first way round touches all pages */
        result_must(attn_seq_move(cache, seq, 0, 1, &moved));
    } while (moved.left > 0);
    move(cache, seq, 2, b->bytes);
    for (uint32_t t = 0; t < b->turns; t++) {
        sides[MEMCPY].gbps[t]   = gb / in_memory(b->to, b->from, b->bytes);
        sides[CHECKSUM].gbps[t] = gb / checksums(b->from, b->bytes);
        sides[BARE].gbps[t]     = gb / bare(b->echo, b->bytes);
        double before           = cpu_seconds(cluster);
        sides[COPY].gbps[t]     = gb / move(cache, seq, 1 + t % 2, b->bytes);
        cpu[t]                  = (cpu_seconds(cluster) - before) / gb;
    }
    attn_cache_close(cache);
    attn_client_close(client);
}

static void
report(const bench_t *b, side_t sides[SIDES], double *cpu, bool shared)
{
    double p50[SIDES];

    for (uint32_t s = 0; s < SIDES; s++) {
        p50[s] = result_quantile(sides[s].gbps, b->turns, 0.5);
        printf("%-44s %7.2f GB/s", sides[s].name, p50[s]);
        if (s == COPY) {
            double bound = p50[shared ? MEMCPY : BARE], target = shared ? TARGET_SHARED : TARGET;
            double seconds = result_quantile(cpu, b->turns, 0.5);
            printf("   %.2f of %s, to reach %.2f; %.2f s of CPU for a GB\n", p50[s] / bound,
                   shared ? "memcpy" : "bare gRPC", target, seconds);
            result_json(&b->options, "copy",
                        "\"case\":\"%s\",\"value\":%.4f,\"unit\":\"GB/s\",\"bound\":%.4f,"
                        "\"ratio\":%.4f,\"target\":%.2f,\"cpu_s_per_gb\":%.3f",
                        sides[s].name, p50[s], bound, p50[s] / bound, target, seconds);
        } else {
            printf("\n");
            result_json(&b->options, "copy", "\"case\":\"%s\",\"value\":%.4f,\"unit\":\"GB/s\"",
                        sides[s].name, p50[s]);
        }
    }
}

static void
run(const bench_t *b, uint32_t way)
{
    static const char *const names[WAYS] = {[SHARED] = "chunks, through shared memory",
                                            [MESSAGES] =
                                                "chunks, as messages of UCX's over loopback",
                                            [GRPC] = "chunks, over gRPC"};
    side_t sides[SIDES]                  = {[MEMCPY]   = {"memcpy, one thread", {0}},
                                            [CHECKSUM] = {"checksum, one thread", {0}},
                                            [BARE]     = {"bare gRPC, answers of 2 MiB", {0}},
                                            [COPY]     = {names[way], {0}}};
    double cpu[TURNS_MAX];
    cluster_t cluster;

    if (way != MESSAGES) {
        cluster_options_t options = {.threads = 1, .grpc = way == GRPC};
        if (!cluster_start_with(&cluster, 2, &options)) {
            exit(1);
        }
    } else if (!cluster_start_apart(&cluster, 2, 1, 0)) {
        printf("%-44s skipped: IPC namespaces are not allowed here\n", names[way]);
        return;
    }
    measure(b, &cluster, sides, cpu);
    report(b, sides, cpu, way == SHARED);
    cluster_stop(&cluster);
}

int
main(int argc, char **argv)
{
    bench_t b = {.turns = 5};
    echoes_t echoes;

    argc            = result_options(&b.options, argc, argv);
    uint64_t token  = (uint64_t)2 * ROW * LAYERS;
    uint64_t wanted = (argc > 1 ? (uint64_t)atoi(argv[1]) : b.options.quick ? 256 : 1024) * MIB;
    b.tokens        = (wanted / token + CHUNK - 1) / CHUNK * CHUNK;
    b.bytes         = b.tokens * token;
    b.turns         = b.options.quick ? 3 : 5;
    b.from          = malloc(b.bytes);
    b.to            = malloc(b.bytes);
    if (b.from == NULL || b.to == NULL || b.bytes > 1536 * MIB) {
        fprintf(stderr, "bench_copy: 1 to 1,536 MiB\n");
        return 2;
    }
    memset(b.from, 1, b.bytes);
    memset(b.to, 1, b.bytes);
    attn_client_options_init(&b.client);
    echoes_start(&echoes, 1, 50);
    b.echo = echo_open(echoes.ports, 1, true, 50);
    for (uint32_t way = 0; way < WAYS; way++) {
        run(&b, way);
    }
    echo_close(b.echo);
    echoes_stop(&echoes);
    free(b.from);
    free(b.to);
    return 0;
}
