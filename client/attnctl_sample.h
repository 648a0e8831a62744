/* attnctl_sample.h: the cluster's figures at a moment, and rates between two. */
#ifndef ATTN_CLIENT_ATTNCTL_SAMPLE_H
#define ATTN_CLIENT_ATTNCTL_SAMPLE_H

#include "client/attnctl.h"

typedef struct sample {
    attn_cluster_info_t info;
    uint64_t at_ns;
} sample_t;

typedef struct rates {
    double runs, kv_bytes; /* per second */
} rates_t;

/** Free info with attn_cluster_info_free(). */
attn_status_t sample_take(const attnctl_t *ctl, sample_t *sample);

/** Sleep, or less after a signal. */
void sample_wait(uint32_t ms);

/** Of a worker of the last sample. first NULL: means since the start. */
rates_t sample_rates(const attn_worker_info_t *worker, const sample_t *first, const sample_t *last);

uint32_t sample_alive(const attn_cluster_info_t *info);

#endif
