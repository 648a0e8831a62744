/* cpu.h: the row of the backend table for CPUs. */
#ifndef ATTN_KERNELS_CPU_H
#define ATTN_KERNELS_CPU_H

#include "kernels/kernels.h"

extern const attn_backend_ops_t attn_cpu_backend_ops;

#endif
