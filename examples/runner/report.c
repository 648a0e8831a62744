#include "report.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "failure.h"

#define BAR_WIDTH 40

void
report_progress(uint64_t done, uint64_t total)
{
    if (!isatty(STDERR_FILENO)) {
        fprintf(stderr, "prompt: %" PRIu64 " of %" PRIu64 " tokens\n", done, total);
        return;
    }
    int full = (int)(done * BAR_WIDTH / total);
    fprintf(stderr, "\rprompt [");
    for (int i = 0; i < BAR_WIDTH; i++) {
        fputc(i < full ? '#' : '.', stderr);
    }
    fprintf(stderr, "] %" PRIu64 " of %" PRIu64 " tokens%s", done, total,
            done == total ? "\n" : "");
}

/** The worker's address as the coordinator knows it; "" if it knows none. */
static const char *
address_of(const attn_cluster_info_t *cluster, uint32_t worker)
{
    for (uint32_t i = 0; i < cluster->n_workers; i++) {
        if (cluster->workers[i].id == worker) {
            return cluster->workers[i].address;
        }
    }
    return "";
}

static bool
report_chunks(session_t *s)
{
    attn_cluster_info_t cluster;
    attn_seq_info_t seq;

    if (attn_seq_describe(s->cache, s->seq, &seq) != ATTN_OK) {
        return failure("sequence: %s", attn_last_error());
    }
    if (attn_cluster_describe(s->client, &cluster) != ATTN_OK) {
        attn_seq_info_free(&seq);
        return failure("cluster: %s", attn_last_error());
    }
    printf("  %5s  %10s  %8s  %6s  %s\n", "chunk", "from token", "tokens", "worker", "address");
    for (uint32_t i = 0; i < seq.n_chunks; i++) {
        const attn_chunk_info_t *chunk = &seq.chunks[i];
        if (chunk->length == 0 && !chunk->lost) {
            continue; /* placed in advance */
        }
        printf("  %5" PRIu32 "  %10" PRIu64 "  %8" PRIu32 "  %6" PRIu32 "  %s\n", i, chunk->first,
               chunk->length, chunk->worker,
               chunk->lost ? "lost" : address_of(&cluster, chunk->worker));
    }
    attn_cluster_info_free(&cluster);
    attn_seq_info_free(&seq);
    return true;
}

static void
report_phase(const char *name, phase_t *phase)
{
    double seconds  = (double)phase->ns / 1e9;
    meter_t *runs   = &phase->runs;
    double computed = runs->n > 0 ? (double)runs->computed_ns / (double)runs->n / 1e3 : 0;

    printf("  %-10s  %7" PRIu64 "  %8.2f  %9.1f  %9.0f  %9.0f  %9.0f  %9.0f  %9.1f\n", name,
           phase->tokens, seconds, seconds > 0 ? (double)phase->tokens / seconds : 0,
           meter_percentile(runs, 50), meter_percentile(runs, 99), meter_mean(runs), computed,
           (double)runs->edges_ns / 1e6);
}

bool
report_table(session_t *s, const char *target, phase_t *prompt, phase_t *generation)
{
    printf("\nKV of %" PRIu64 " tokens at %s\n", s->length, target);
    if (!report_chunks(s)) {
        return false;
    }
    printf("\n  %-10s  %7s  %8s  %9s  %9s  %9s  %9s  %9s  %9s\n", "", "tokens", "seconds",
           "tokens/s", "run p50", "run p99", "run mean", "computed", "edges ms");
    report_phase("prompt", prompt);
    report_phase("generation", generation);
    printf("  (run: microseconds of one attn_step_run(), which is one layer of one pass; computed: "
           "of those,\n   by the slowest worker; edges: begin and commit of all passes, in "
           "milliseconds)\n");
    return true;
}
