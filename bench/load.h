/*
 * load.h: what a model does between two layers of attention, as far as servers on the same machine
 * feel it: all cores compute for a while, and go through memory of their own.
 */
#ifndef ATTN_BENCH_LOAD_H
#define ATTN_BENCH_LOAD_H

#include <stdint.h>

typedef struct load load_t;

/** One thread for each core but the caller's. For the rest of the program. */
load_t *load_start(uint64_t pause_us);

/** Compute on all cores for pause_us; returns at once if that is 0. */
void load_pause(load_t *load);

#endif
