/*
 * copy.c: chunks of KV from one worker to another.
 *
 *     bench_copy [--quick] [--json FILE] [MIB]        default: 1,024
 *
 * A sequence of so many MiB goes to and fro between two workers, chunk by chunk, as `attnctl move`
 * does it. Beside it, in turns: the same bytes copied in memory, their checksum made, and the same
 * bytes as bare gRPC answers of 2 MiB, one after the other (echo.h). A copy should reach half of
 * what bare gRPC does: each byte is read out of pages, checked twice, and stored in pages as well.
 */
#include "bench/echo.h"
#include "bench/processes.h"
#include "bench/result.h"

#include "base/clock.h"
#include "client/attn.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#define LAYERS 16u
#define KV_HEADS 8u
#define DIM 128u
#define ROW (KV_HEADS * DIM * 2u) /* bytes of k, or of v, of a token of a layer */
#define CHUNK 2048u               /* tokens: 128 MiB of all layers */
#define STEP 1024u                /* tokens appended by one step */
#define TARGET 0.5
#define PART (2u << 20) /* bytes of a bare answer, and of a part */
#define MIB (UINT64_C(1) << 20)

typedef struct side {
    const char *name;
    double gbps[16];
} side_t;

enum { MEMCPY, CHECKSUM, BARE, COPY, SIDES };

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

static void
report(const result_options_t *options, side_t sides[SIDES], uint32_t turns)
{
    double bound = 0;

    for (uint32_t s = 0; s < SIDES; s++) {
        double p50 = result_quantile(sides[s].gbps, turns, 0.5);
        printf("%-28s %7.2f GB/s", sides[s].name, p50);
        if (s == COPY) {
            printf("   %.2f of bare gRPC, to reach %.2f\n", p50 / bound, TARGET);
            result_json(options, "copy",
                        "\"case\":\"%s\",\"value\":%.4f,\"unit\":\"GB/s\",\"bound\":%.4f,"
                        "\"ratio\":%.4f,\"target\":%.2f",
                        sides[s].name, p50, bound, p50 / bound, TARGET);
        } else {
            printf("\n");
            result_json(options, "copy", "\"case\":\"%s\",\"value\":%.4f,\"unit\":\"GB/s\"",
                        sides[s].name, p50);
        }
        bound = p50;
    }
}

int
main(int argc, char **argv)
{
    result_options_t options;
    cluster_t cluster;
    echoes_t echoes;
    attn_client_t *client;
    attn_client_options_t client_options;
    side_t sides[SIDES] = {[MEMCPY]   = {"memcpy, one thread", {0}},
                           [CHECKSUM] = {"checksum, one thread", {0}},
                           [BARE]     = {"bare gRPC, answers of 2 MiB", {0}},
                           [COPY]     = {"chunks, worker to worker", {0}}};

    argc            = result_options(&options, argc, argv);
    uint64_t token  = (uint64_t)2 * ROW * LAYERS;
    uint64_t wanted = (argc > 1 ? (uint64_t)atoi(argv[1]) : options.quick ? 256 : 1024) * MIB;
    uint64_t tokens = (wanted / token + CHUNK - 1) / CHUNK * CHUNK, bytes = tokens * token;
    uint32_t turns = options.quick ? 3 : 5;
    uint8_t *from = malloc(bytes), *to = malloc(bytes);
    if (from == NULL || to == NULL || bytes > 1536 * MIB) {
        fprintf(stderr, "bench_copy: 1 to 1,536 MiB\n");
        return 2;
    }
    memset(from, 1, bytes);
    memset(to, 1, bytes);
    cluster_start(&cluster, 2, 1, 0);
    echoes_start(&echoes, 1, 50);
    attn_client_options_init(&client_options);
    result_must(attn_client_open(cluster.coordinator.line, &client_options, &client));
    attn_cache_t *cache = open_cache(client, bytes);
    attn_seq_t seq      = fill(cache, tokens);
    echo_t *echo        = echo_open(echoes.ports, 1, true, 50);

    attn_moved_t moved;
    do { /* wherever it is; the first way round touches all pages */
        result_must(attn_seq_move(cache, seq, 0, 1, &moved));
    } while (moved.left > 0);
    move(cache, seq, 2, bytes);
    for (uint32_t t = 0; t < turns; t++) {
        double gb               = (double)bytes * 1e-9;
        sides[MEMCPY].gbps[t]   = gb / in_memory(to, from, bytes);
        sides[CHECKSUM].gbps[t] = gb / checksums(from, bytes);
        sides[BARE].gbps[t]     = gb / bare(echo, bytes);
        sides[COPY].gbps[t]     = gb / move(cache, seq, 1 + t % 2, bytes);
    }
    report(&options, sides, turns);
    echo_close(echo);
    attn_cache_close(cache);
    attn_client_close(client);
    echoes_stop(&echoes);
    cluster_stop(&cluster);
    free(from);
    free(to);
    return 0;
}
