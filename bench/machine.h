/* machine.h: what a machine can do, measured: the bounds that speeds are held against. */
#ifndef ATTN_BENCH_MACHINE_H
#define ATTN_BENCH_MACHINE_H

#include <stdint.h>

#define MACHINE_THREADS_MAX 256u

/** How wide the vectors are that kernels use. */
typedef enum machine_width { MACHINE_128 = 4, MACHINE_256 = 8, MACHINE_512 = 16 } machine_width_t;

/** Memory for the reads, 1 GiB in huge pages. @return 0, or -1 without memory */
int machine_open(void);

/** Bytes per second that `threads` threads read memory with, some 10 ms long. The widest loads
 * the CPU has, each thread its own part, ascending. */
double machine_read(uint32_t threads);

/** FLOP per second (two a multiply-add) of `threads` threads in f32 vectors of this width, some
 * ms long. Two roundings where the CPU has no fused multiply-add of that width. */
double machine_fma(uint32_t threads, machine_width_t width);

#endif
