/* attnctl_top.c: `attnctl top`: workers by load, renewed in place on a terminal; into anything else
 * one table after the other, without escapes. */
#include "client/attnctl_sample.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BYTES(n) attnctl_bytes(n, (char[16]){0})
#define BAR 16

typedef struct line {
    const attn_worker_info_t *worker;
    rates_t rates;
} line_t;

/* Live ones first, then by KV read, layers, and number. */
static int
compare_lines(const void *a, const void *b)
{
    const line_t *x = a, *y = b;

    if (x->worker->alive != y->worker->alive) {
        return x->worker->alive ? -1 : 1;
    }
    if (x->rates.kv_bytes != y->rates.kv_bytes) {
        return x->rates.kv_bytes > y->rates.kv_bytes ? -1 : 1;
    }
    return (x->worker->id > y->worker->id) - (x->worker->id < y->worker->id);
}

/* "####----........": tokens, regions of caches, free. */
static void
draw_bar(const attn_worker_info_t *w, char bar[BAR + 1])
{
    double slab = w->slab_bytes > 0 ? (double)w->slab_bytes : 1;
    int used    = (int)((double)w->used_bytes / slab * BAR + 0.5);
    int region  = (int)((double)w->region_bytes / slab * BAR + 0.5);

    for (int i = 0; i < BAR; i++) {
        bar[i] = i < used ? '#' : i < region ? '-' : '.';
    }
    bar[BAR] = '\0';
}

static void
print_worker(const line_t *line, const char *end)
{
    const attn_worker_info_t *w = line->worker;
    char bar[BAR + 1];

    if (!w->alive) {
        printf("%6u  %-21s  LOST%s\n", w->id, w->address, end);
        return;
    }
    draw_bar(w, bar);
    printf("%6u  %-21s  %s %10s of %10s %8" PRIu64 " %6" PRIu64 " %9.1f %8.2f%s\n", w->id,
           w->address, bar, BYTES(w->used_bytes), BYTES(w->slab_bytes), w->chunks, w->open_steps,
           line->rates.runs, line->rates.kv_bytes / 1e9, end);
}

/* end: what stands before each end of line. */
static void
print_top(const attnctl_t *ctl, const sample_t *last, line_t *lines, const char *end)
{
    const attn_cluster_info_t *info = &last->info;
    rates_t all                     = {0};
    uint64_t steps                  = 0;

    for (uint32_t i = 0; i < info->n_workers; i++) {
        all.runs += lines[i].worker->alive ? lines[i].rates.runs : 0;
        all.kv_bytes += lines[i].worker->alive ? lines[i].rates.kv_bytes : 0;
        steps += lines[i].worker->alive ? lines[i].worker->open_steps : 0;
    }
    printf("%s  epoch %" PRIu64 "  workers %u of %u  sequences %" PRIu64
           "  clients %u  caches %u%s\n",
           ctl->target, info->epoch, sample_alive(info), info->n_workers, info->sequences,
           info->clients, info->caches, end);
    printf("%.1f layers/s  %.2f GB/s of KV read  %" PRIu64 " steps open%s\n%s\n", all.runs,
           all.kv_bytes / 1e9, steps, end, end);
    printf("%6s  %-21s  %-*s %10s    %10s %8s %6s %9s %8s%s\n", "worker", "address", BAR,
           "#tokens -caches", "in use", "slab", "chunks", "steps", "layers/s", "GB/s", end);
    for (uint32_t i = 0; i < info->n_workers; i++) {
        print_worker(&lines[i], end);
    }
}

static attn_status_t
show(const attnctl_t *ctl, const sample_t *first, const sample_t *last)
{
    uint32_t n    = last->info.n_workers;
    line_t *lines = calloc(n + 1, sizeof(*lines));
    bool terminal = isatty(STDOUT_FILENO) && !ctl->once;

    if (lines == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        const attn_worker_info_t *worker = &last->info.workers[i];
        lines[i] = (line_t){.worker = worker, .rates = sample_rates(worker, first, last)};
    }
    qsort(lines, n, sizeof(*lines), compare_lines);
    if (terminal) {
        fputs("\033[H", stdout); /* cursor home; each line clears its rest, the last one what is
                                    below: no flicker */
    }
    print_top(ctl, last, lines, terminal ? "\033[K" : "");
    fputs(terminal ? "\033[J" : ctl->once ? "" : "\n", stdout);
    fflush(stdout);
    free(lines);
    return ATTN_OK;
}

int
attnctl_top(const attnctl_t *ctl)
{
    sample_t first = {0}, last = {0};
    uint32_t interval    = ctl->interval_ms > 0 ? ctl->interval_ms : 1000;
    attn_status_t status = sample_take(ctl, &last);

    if (isatty(STDOUT_FILENO) && !ctl->once) {
        fputs("\033[2J", stdout);
    }
    while (status == ATTN_OK && !attnctl_stop) {
        attn_cluster_info_free(&first.info);
        first = last;
        memset(&last, 0, sizeof(last));
        sample_wait(interval);
        if (attnctl_stop || (status = sample_take(ctl, &last)) != ATTN_OK) {
            break;
        }
        status = show(ctl, &first, &last);
        if (ctl->once) {
            break;
        }
    }
    bool none = status == ATTN_OK && !attnctl_stop && sample_alive(&last.info) == 0;
    attn_cluster_info_free(&first.info);
    attn_cluster_info_free(&last.info);
    return status != ATTN_OK ? attnctl_failed(ctl, status) : none ? ATTNCTL_PROBLEM : ATTNCTL_OK;
}
