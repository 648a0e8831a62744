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

static inline __attribute__((always_inline)) vf
v_max(vf a, vf b)
{
    vi more = a > b;
    return (vf)(((vi)a & more) | ((vi)b & ~more));
}

static inline __attribute__((always_inline)) vi
v_imax(vi a, vi b)
{
    vi more = a > b;
    return (a & more) | (b & ~more);
}

static inline __attribute__((always_inline)) float
v_top(vf x)
{
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

static inline __attribute__((always_inline)) int
v_any(vi mask)
{
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}

static inline __attribute__((always_inline)) void
v_transpose(vf *r)
{
    vf a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    vf b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    vf c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    vf d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

static inline __attribute__((always_inline)) float
v_halves(const vf *x)
{
    vf four = (x[0] + x[2]) + (x[1] + x[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

#define TILE_ROWS 4
#define DOT_VECS 2
#define SUM_VECS 2
#define EIGHT_VECS 1

#include "kernels/cpu/leaf.inc"

const cpu_isa_t cpu_isa_baseline = {.name  = "baseline",
                                    .lanes = 4,
                                    .kind  = "baseline",
                                    .leaf  = leaf,
                                    .widen = widen,
                                    .merge = merge};
