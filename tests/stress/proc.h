/* proc.h: what a process has, from /proc. */
#ifndef ATTN_TESTS_STRESS_PROC_H
#define ATTN_TESTS_STRESS_PROC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct proc_counts {
    uint32_t threads;      /* but for those of C core's pools */
    uint32_t core_threads; /* which load makes grow, and which C core keeps, or ends when idle */
    uint32_t descriptors;
    uint64_t rss_bytes;
    uint64_t heap_bytes; /* of rss_bytes, what is in mappings smaller than a worker's slab */
} proc_counts_t;

/** Mappings of this size and above are slabs (and a sanitizer's shadow), not what may grow. */
#define PROC_SLAB_BYTES (UINT64_C(96) << 20)

/** @return false if there is no such process */
bool proc_count(pid_t pid, proc_counts_t *counts);

/**
 * More threads or descriptors than before? Threads of ours, and any that are not known to be of a
 * pool of C core, count exactly. Of its pools each may have grown to what C core itself
 * limits its executors to, two threads a core.
 */
bool proc_grew(const proc_counts_t *before, const proc_counts_t *now);

/** "3 attnd, 2 event_engine": names of threads, with how many have them. */
void proc_thread_names(pid_t pid, char *text, size_t size);

#endif
