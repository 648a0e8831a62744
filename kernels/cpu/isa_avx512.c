/* The arithmetic for AVX-512 (F, BW, DQ, VL): 16 lanes. Compiled with these switched on. */
#include "kernels/cpu/leaf.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/leaf.inc"

const cpu_isa_t cpu_isa_avx512 = {
    .name = "avx512", .lanes = 16, .kind = "fma", .leaf = leaf, .widen = widen, .merge = merge};
