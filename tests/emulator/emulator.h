/* emulator.h: runs the prefill kernel on the host (primitives.h says how). */
#ifndef ATTN_TESTS_EMULATOR_H
#define ATTN_TESTS_EMULATOR_H

#include "kernels/cuda/image.h"

#ifdef __cplusplus
extern "C"
#endif
    /**
     * @param maps  of K and of V: base, strides of dimensions 1 to 4 in bytes, box of 1 to 3
     * @param mode  0 plain, 1 general, 2 queries of parts
     */
    void
    emulate_prefill(const cuda_args_t *args, const cuda_map_t maps[2], uint32_t grid, int mode,
                    uint64_t seed);

#endif
