#include "client/attnctl_sample.h"

#include <errno.h>
#include <time.h>

attn_status_t
sample_take(const attnctl_t *ctl, sample_t *sample)
{
    struct timespec now;
    attn_status_t status = attn_cluster_describe(ctl->client, &sample->info);

    clock_gettime(CLOCK_MONOTONIC, &now);
    sample->at_ns = (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
    return status;
}

/* Sleep, or less after a signal. */
void
sample_wait(uint32_t ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

    while (!attnctl_stop && nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

static const attn_worker_info_t *
worker_of(const attn_cluster_info_t *info, uint32_t id)
{
    for (uint32_t i = 0; i < info->n_workers; i++) {
        if (info->workers[i].id == id) {
            return &info->workers[i];
        }
    }
    return NULL;
}

/* A worker that the first sample lacks began at 0. first NULL: means since start. */
rates_t
sample_rates(const attn_worker_info_t *worker, const sample_t *first, const sample_t *last)
{
    const attn_worker_info_t *before = first != NULL ? worker_of(&first->info, worker->id) : NULL;
    double seconds                   = first != NULL ? (double)(last->at_ns - first->at_ns) / 1e9
                                                     : (double)last->info.uptime_ms / 1e3;
    uint64_t runs = worker->runs, kv_bytes = worker->kv_bytes;

    if (before != NULL) {
        runs     = runs > before->runs ? runs - before->runs : 0;
        kv_bytes = kv_bytes > before->kv_bytes ? kv_bytes - before->kv_bytes : 0;
    }
    if (seconds <= 0) {
        return (rates_t){0};
    }
    return (rates_t){.runs = (double)runs / seconds, .kv_bytes = (double)kv_bytes / seconds};
}

uint32_t
sample_alive(const attn_cluster_info_t *info)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < info->n_workers; i++) {
        n += info->workers[i].alive;
    }
    return n;
}
