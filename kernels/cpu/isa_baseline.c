/*
 * The arithmetic for any machine: 4 lanes in the compiler's vector types (SSE2 on x86-64),
 * products and sums rounded one by one.
 */
#include "kernels/cpu/leaf.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline __attribute__((always_inline)) vf
v_fma(vf a, vf b, vf c)
{
    return a * b + c; /* two roundings: the project is compiled without contraction */
}

static inline __attribute__((always_inline)) vf
v_f16(const uint16_t *p)
{
    vf x;
    attn_convert(&x, ATTN_F32, p, ATTN_F16, VL);
    return x;
}

static inline __attribute__((always_inline)) vf
v_bf16(const uint16_t *p)
{
    vi wide = {p[0], p[1], p[2], p[3]};
    return (vf)(wide << 16);
}

/* Each sum is (0 + 1) + (2 + 3) over its lanes. */
static inline __attribute__((always_inline)) void
v_sum8(const vf *acc, float *out)
{
    for (int i = 0; i < 8; i++) {
        out[i] = (acc[i][0] + acc[i][1]) + (acc[i][2] + acc[i][3]);
    }
}

#include "kernels/cpu/leaf.inc"

const cpu_isa_t cpu_isa_baseline = {.name = "baseline", .leaf = leaf, .widen = widen};
