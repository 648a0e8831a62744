/* proc.h: what a process has, from /proc. */
#ifndef ATTN_TESTS_STRESS_PROC_H
#define ATTN_TESTS_STRESS_PROC_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct proc_counts {
    uint32_t threads, descriptors;
    uint64_t rss_bytes;
} proc_counts_t;

/** @return false if there is no such process */
bool proc_count(pid_t pid, proc_counts_t *counts);

#endif
