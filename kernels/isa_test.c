/*
 * Instruction sets of one kind have the same bits. Random leaves, computed by each that this
 * machine has, are compared with the first of their kind; and every row of a leaf with the
 * same row computed alone. What is right, tests/conformance checks.
 */
#include "base/status.h"
#include "kernels/cpu/leaf.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ROWS 37u
#define LEAVES 120
#define BELOW 3u

static const char *const names[] = {"baseline", "avx2", "avx512", "amx"};
#define N_NAMES (sizeof(names) / sizeof(names[0]))

static uint64_t state = 1;

static uint32_t
chance(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

/* NULL if the machine has it not. */
static const cpu_isa_t *
isa_named(const char *name)
{
    const cpu_isa_t *isa = NULL;

    setenv("ATTN_CPU_ISA", name, 1);
    attn_status_t status = cpu_isa_choose(&isa);
    assert_true(status == ATTN_OK || status == ATTN_ERR_UNSUPPORTED);
    unsetenv("ATTN_CPU_ISA");
    return status == ATTN_OK ? isa : NULL;
}

/* A leaf with memory of its own. */
typedef struct world {
    cpu_leaf_t leaf;
    float q[ROWS][CPU_DIM_MAX], slope[ROWS];
    int32_t lo[ROWS], hi[ROWS], distance[ROWS];
    _Alignas(64) float k[CPU_LEAF][CPU_DIM_MAX], v[CPU_LEAF][CPU_DIM_MAX]; /* or less wide */
    const void *k_rows[CPU_LEAF], *v_rows[CPU_LEAF];
    uint32_t present[CPU_LEAF];
} world_t;

typedef struct states {
    float a[ROWS][CPU_DIM_MAX];
    float l[ROWS];
    int32_t e[ROWS];
} states_t;

static void
fill(void *to, attn_dtype_t dtype, uint32_t n)
{
    float x[CPU_DIM_MAX];
    for (uint32_t i = 0; i < n; i++) {
        x[i] = ((float)chance(1 << 20) - (1 << 19)) * (4.0f / (1 << 20));
    }
    attn_convert(to, dtype, x, ATTN_F32, n);
}

static void
draw_tokens(world_t *w)
{
    static const float zeros[CPU_DIM_MAX];
    cpu_leaf_t *x = &w->leaf;
    bool sparse   = chance(3) == 0;

    x->first   = chance(3) == 0 ? chance(CPU_LEAF) : 0;
    x->end     = chance(2) == 0 ? CPU_LEAF : x->first + 1 + chance(CPU_LEAF - x->first);
    x->present = sparse ? w->present : NULL;
    x->k       = w->k_rows;
    x->v       = w->v_rows;
    for (uint32_t t = 0; t < CPU_LEAF; t++) {
        bool in       = t >= x->first && t < x->end;
        w->present[t] = in && (!sparse || t == x->first || chance(4) > 0) ? UINT32_MAX : 0;
        w->k_rows[t]  = w->present[t] ? (const void *)w->k[t] : zeros;
        w->v_rows[t]  = w->present[t] ? (const void *)w->v[t] : zeros;
        fill(w->k[t], x->dtype, x->d_k);
        fill(w->v[t], x->dtype, x->d_v);
    }
}

static void
draw(world_t *w)
{
    static const attn_dtype_t types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    cpu_leaf_t *x                     = &w->leaf;

    *x = (cpu_leaf_t){.rows     = 1 + chance(ROWS),
                      .d_k      = 32 + 8 * chance(29),
                      .d_v      = 32 + 8 * chance(29),
                      .dtype    = types[chance(3)],
                      .scale    = 0.1f,
                      .softcap  = chance(3) == 0 ? 5.0f : 0.0f,
                      .q        = &w->q[0][0],
                      .lo       = w->lo,
                      .hi       = w->hi,
                      .distance = w->distance,
                      .slope    = chance(3) == 0 ? w->slope : NULL};
    draw_tokens(w);
    x->full = chance(2) == 0;
    x->few  = chance(2) == 0;
    for (uint32_t r = 0; r < x->rows; r++) {
        w->lo[r]       = x->full ? 0 : (int32_t)chance(x->end);
        w->hi[r]       = x->full ? (int32_t)x->end : (int32_t)chance(CPU_LEAF + 1);
        w->distance[r] = -(int32_t)chance(1000);
        w->slope[r]    = 0.01f * (float)(1 + chance(8));
        fill((float *)w->q + (size_t)r * x->d_k, ATTN_F32, x->d_k);
    }
}

/* Rows [row, row + rows) of the leaf, onto `below` states in out. */
static void
compute_rows(const cpu_isa_t *isa, const world_t *w, uint32_t row, uint32_t rows, uint32_t below,
             float *a, float *l, int32_t *e)
{
    static _Alignas(64) float s[ROWS][CPU_LEAF];
    static _Alignas(64) char stage[CPU_STAGE_BYTES];
    static _Alignas(64) char form[CPU_FORM_BYTES];
    static float weights[ROWS];
    static cpu_scales_t merges[BELOW * ROWS];
    cpu_leaf_t x = w->leaf;

    memset(s, 0xff, sizeof(s)); /* NaN: nothing may be taken from before */
    memset(stage, 0xff, sizeof(stage));
    x.rows = rows;
    x.q += (size_t)row * x.d_k;
    x.lo += row;
    x.hi += row;
    x.distance += row;
    x.slope  = x.slope == NULL ? NULL : x.slope + row;
    x.s      = &s[0][0];
    x.stage  = stage;
    x.w      = weights;
    x.merges = merges;
    x.below  = below;
    x.stride = ROWS;
    x.a      = a;
    x.l      = l;
    x.e      = e;
    x.form   = (cpu_form_t){.data = form};
    if (isa->begin != NULL && !x.few) {
        isa->begin(&x.form, x.q, rows, x.d_k, x.dtype);
    }
    assert_int_equal(isa->leaf(&x), -1);
    if (isa->end != NULL && !x.few) {
        isa->end();
    }
}

/* Rows [row, row + rows) of the leaf, into the same rows of *out. */
static void
compute(const cpu_isa_t *isa, const world_t *w, uint32_t row, uint32_t rows, states_t *out)
{
    static float a[ROWS * CPU_DIM_MAX];

    compute_rows(isa, w, row, rows, 0, a, out->l + row, out->e + row);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(out->a[row + r], a + (size_t)r * w->leaf.d_v, w->leaf.d_v * sizeof(*a));
    }
}

static void
assert_same(const world_t *w, const states_t *a, const states_t *b)
{
    for (uint32_t r = 0; r < w->leaf.rows; r++) {
        assert_memory_equal(&a->l[r], &b->l[r], sizeof(a->l[r]));
        assert_int_equal(a->e[r], b->e[r]);
        if (a->l[r] != 0.0f) {
            assert_memory_equal(a->a[r], b->a[r], w->leaf.d_v * sizeof(a->a[r][0]));
        }
    }
}

static void
test_kinds_agree(void **unused)
{
    static world_t w;
    static states_t first, other;

    (void)unused;
    for (int i = 0; i < LEAVES; i++) {
        draw(&w);
        for (size_t n = 0; n < N_NAMES; n++) {
            const cpu_isa_t *isa = isa_named(names[n]);
            for (size_t m = 0; isa != NULL && m < n; m++) {
                const cpu_isa_t *peer = isa_named(names[m]);
                if (peer != NULL && strcmp(peer->kind, isa->kind) == 0) {
                    compute(isa, &w, 0, w.leaf.rows, &first);
                    compute(peer, &w, 0, w.leaf.rows, &other);
                    assert_same(&w, &first, &other);
                }
            }
        }
    }
}

static void
test_rows_stand_alone(void **unused)
{
    static world_t w;
    static states_t together, alone;

    (void)unused;
    for (int i = 0; i < LEAVES; i++) {
        draw(&w);
        for (size_t n = 0; n < N_NAMES; n++) {
            const cpu_isa_t *isa = isa_named(names[n]);
            if (isa == NULL) {
                continue;
            }
            compute(isa, &w, 0, w.leaf.rows, &together);
            for (uint32_t r = 0; r < w.leaf.rows; r++) {
                compute(isa, &w, r, 1, &alone);
            }
            assert_same(&w, &together, &alone);
        }
    }
}

/* States of a stack, some empty, some far from the others, some of them negative zeros. */
static void
draw_stack(uint32_t d, float *a, float *l, int32_t *e)
{
    for (uint32_t i = 0; i < BELOW * ROWS; i++) {
        bool empty = chance(4) == 0;
        l[i]       = empty ? 0.0f : 1.0f + (float)chance(100);
        e[i]       = empty ? INT32_MIN : (int32_t)chance(chance(3) == 0 ? 400 : 8) - 4;
        fill(a + (size_t)i * d, ATTN_F32, d);
        a[(size_t)i * d + chance(d)] = -0.0f;
    }
}

/* A leaf that merges with states below it has the bits of the leaf alone, merged one by one. */
static void
test_merges(void **unused)
{
    static world_t w;
    static states_t alone, merged;
    static float into[CPU_DIM_MAX];
    static float a[BELOW * ROWS * CPU_DIM_MAX], a_out[BELOW * ROWS * CPU_DIM_MAX];
    static float l[BELOW * ROWS], l_out[BELOW * ROWS];
    static int32_t e[BELOW * ROWS], e_out[BELOW * ROWS];

    (void)unused;
    for (int i = 0; i < LEAVES; i++) {
        draw(&w);
        uint32_t d = w.leaf.d_v, below = 1 + chance(BELOW);
        draw_stack(d, a, l, e);
        for (size_t n = 0; n < N_NAMES; n++) {
            const cpu_isa_t *isa = isa_named(names[n]);
            if (isa == NULL) {
                continue;
            }
            compute(isa, &w, 0, w.leaf.rows, &alone);
            memcpy(a_out, a, sizeof(a));
            memcpy(l_out, l, sizeof(l));
            memcpy(e_out, e, sizeof(e));
            compute_rows(isa, &w, 0, w.leaf.rows, below, a_out, l_out, e_out);
            for (uint32_t r = 0; r < w.leaf.rows; r++) {
                for (uint32_t b = below; b-- > 0;) {
                    uint32_t at = b * ROWS + r;
                    memcpy(into, a + (size_t)at * d, d * sizeof(*a));
                    float l_into   = l[at];
                    int32_t e_into = e[at];
                    attn_state_merge_row(into, &l_into, &e_into, alone.a[r], alone.l[r], alone.e[r],
                                         d);
                    memcpy(alone.a[r], into, d * sizeof(*a));
                    alone.l[r] = l_into;
                    alone.e[r] = e_into;
                }
                memcpy(merged.a[r], a_out + (size_t)r * d, d * sizeof(*a));
                merged.l[r] = l_out[r];
                merged.e[r] = e_out[r];
            }
            assert_same(&w, &alone, &merged);
        }
    }
}

static void
test_unknown_name(void **unused)
{
    const cpu_isa_t *isa;

    (void)unused;
    setenv("ATTN_CPU_ISA", "abacus", 1);
    assert_int_equal(cpu_isa_choose(&isa), ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), "abacus"));
    unsetenv("ATTN_CPU_ISA");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kinds_agree), cmocka_unit_test(test_rows_stand_alone),
        cmocka_unit_test(test_merges), cmocka_unit_test(test_unknown_name)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
