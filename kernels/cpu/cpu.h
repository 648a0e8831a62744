/* cpu.h: the row of the backend table for CPUs. */
#ifndef ATTN_KERNELS_CPU_H
#define ATTN_KERNELS_CPU_H

#include "kernels/kernels.h"

extern const attn_backend_ops_t attn_cpu_backend_ops;

/**
 * For bench/attend.c alone: what would attention take if sums might go in any order? Each
 * thread then carries one state through its leaves, on the same inner kernels, and answers
 * lose the promise of equal bits. Not while an attend runs.
 */
void attn_cpu_free_order(attn_backend_t *backend, bool on);

#endif
