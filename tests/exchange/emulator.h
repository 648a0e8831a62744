/* emulator.h: runs launches of exchange.cu of all ranks on the host (primitives.h says how). */
#ifndef ATTN_TESTS_EXCHANGE_EMULATOR_H
#define ATTN_TESTS_EXCHANGE_EMULATOR_H

#include "kernels/cuda/exchange.h"

/** What a rank launches, one after the other. */
typedef struct emulated_rank {
    uint32_t n, grid; /**< launches; CTAs of each */
    const cuda_exchange_t *launches;
    uint32_t ended; /**< out: launches that came to their end */
} emulated_rank_t;

typedef struct emulation {
    uint64_t seed;
    uint32_t ranks, d;
    emulated_rank_t of[CUDA_RANKS];
    void (*meanwhile)(void *arg, uint64_t turn); /**< NULL, or called before each turn of a warp */
    void *arg;
} emulation_t;

#ifdef __cplusplus
extern "C"
#endif
    /** Until all launches have ended. Aborts the process if they do not. A turn of a warp takes
     * between 10 and 20 ns of the emulated clock. */
    void
    emulate_exchange(emulation_t *emulation);

#endif
