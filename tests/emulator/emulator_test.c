/*
 * The prefill kernel on the emulator, from a plan's tables to rows of O, against sums in float64:
 * what it computes, whom it waits for, and what it reads. Speed, and whether the device is as the
 * manual says, are for devices to show.
 */
#include "balancer/plan.h"
#include "base/status.h"
#include "kernels/cuda/image_host.h"
#include "tests/emulator/emulator.h"

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <cmocka.h>

#ifndef D_K
#define D_K 64u
#define D_V 64u
#endif
#ifndef DTYPE
#define DTYPE ATTN_BF16
#endif
#define ENTRIES 3u
#define RUNS 16u
#define HEADS_MAX 8u

static uint64_t chance_state = 88172645463325252u;

static uint32_t
chance_below(uint32_t n)
{
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return (uint32_t)((chance_state >> 20) % n);
}

static float
chance_value(void)
{
    return (float)((int)chance_below(4001) - 2000) / 1000.0f;
}

static float
value(uint16_t x)
{
    float y;
    attn_convert(&y, ATTN_F32, &x, DTYPE, 1);
    return y;
}

typedef struct options {
    uint32_t page_size, chunk_size, group, kv_heads, ctas;
    uint32_t window, lists, mask, parts;
    int grow; /* values of V times 2^grow */
    float softcap;
    bool causal, slopes, bulk;
    bool apart;  /* rows and heads of q lie apart, as where a caller has them */
    bool steady; /* tables are in a room that is larger, as for a graph */
} options_t;

typedef struct world {
    options_t o;
    uint32_t n_pages, next_page, *perm;
    uint16_t *k, *v; /* [pages][kv_heads][page_size][d], as store.cu has them */
    attn_problem_entry_t entries[ENTRIES];
    attn_kv_run_t runs[ENTRIES][RUNS];
    uint32_t *pages[ENTRIES][RUNS];
    uint32_t sparse[ENTRIES][HEADS_MAX * 4096], indptr[ENTRIES][HEADS_MAX + 1];
    uint8_t masks[ENTRIES][4096];
    attn_problem_t problem;
    uint64_t queries;
    uint16_t *q; /* [parts][queries][q_heads][D_K], with strides in elements: */
    uint64_t q_part, q_row, q_head;
    float *o_f32, *lse;
    float slopes[64], q_scale[4096 * 64];
} world_t;

static uint16_t *
element(const world_t *w, bool values, uint32_t page, uint32_t head, uint32_t place, uint32_t i)
{
    uint32_t d   = values ? D_V : D_K;
    uint64_t row = (((uint64_t)page * w->o.kv_heads + head) * w->o.page_size + place) * d;
    uint32_t c   = (i / 8) ^ (place & 7);
    return (values ? w->v : w->k) + row + c * 8 + i % 8;
}

static void
add_entry(world_t *w, uint32_t e, uint32_t length, uint32_t n_q)
{
    uint32_t chunk = w->o.chunk_size, size = w->o.page_size, n = 0;
    attn_problem_entry_t *entry = &w->entries[e];

    for (uint32_t c = 0; c * chunk < length; c++, n++) {
        uint32_t tokens = length - c * chunk < chunk ? length - c * chunk : chunk;
        uint32_t pages  = (tokens + size - 1) / size;
        w->pages[e][n]  = malloc(pages * sizeof(uint32_t));
        for (uint32_t i = 0; i < pages; i++) {
            w->pages[e][n][i] = w->perm[w->next_page++];
            for (uint32_t t = 0; t < size && i * size + t < tokens; t++) {
                for (uint32_t h = 0; h < w->o.kv_heads; h++) {
                    for (uint32_t j = 0; j < D_K + D_V; j++) {
                        bool of_v = j >= D_K;
                        float x   = ldexpf(chance_value(), of_v ? w->o.grow : 0);
                        attn_convert(element(w, of_v, w->pages[e][n][i], h, t, of_v ? j - D_K : j),
                                     DTYPE, &x, ATTN_F32, 1);
                    }
                }
            }
        }
        w->runs[e][n] = (attn_kv_run_t){.chunk = c, .length = tokens, .pages = w->pages[e][n]};
    }
    *entry =
        (attn_problem_entry_t){.kv_length = length, .n_q = n_q, .n_runs = n, .runs = w->runs[e]};
    if (w->o.mask > 0) {
        uint32_t bytes = (n_q + 7) / 8;
        for (uint32_t i = 0; i < n_q; i++) { /* itself, and some before */
            for (uint32_t j = 0; j <= i; j++) {
                if (j == i || chance_below(2)) {
                    w->masks[e][i * bytes + j / 8] |= (uint8_t)(1 << j % 8);
                }
            }
        }
        entry->mask        = w->masks[e];
        entry->mask_tokens = n_q;
    }
    if (w->o.lists > 0) {
        uint32_t per_chunk = (chunk + size - 1) / size, at = 0;
        for (uint32_t h = 0; h < w->o.lists; h++) {
            w->indptr[e][h] = at;
            for (uint32_t c = 0; c < n; c++) {
                for (uint32_t i = 0; i * size < w->runs[e][c].length; i++) {
                    if (chance_below(3) == 0) {
                        w->sparse[e][at++] = c * per_chunk + i;
                    }
                }
            }
        }
        w->indptr[e][w->o.lists] = at;
        entry->n_lists           = w->o.lists;
        entry->sparse_indptr     = w->indptr[e];
        entry->sparse_pages      = w->sparse[e];
        entry->dense_from        = length - n_q;
    }
    w->queries += n_q;
}

static bool
listed(const world_t *w, uint32_t e, uint32_t head, uint32_t t)
{
    const attn_problem_entry_t *entry = &w->entries[e];
    uint32_t size = w->o.page_size, chunk = w->o.chunk_size;
    uint32_t page = t / chunk * ((chunk + size - 1) / size) + t % chunk / size;
    uint32_t list = entry->n_lists > 1 ? head : 0;

    if (entry->n_lists == 0 || t >= entry->dense_from) {
        return true;
    }
    for (uint32_t i = w->indptr[e][list]; i < w->indptr[e][list + 1]; i++) {
        if (w->sparse[e][i] == page) {
            return true;
        }
    }
    return false;
}

/* One row in float64: O, and LSE. */
static double
reference(const world_t *w, uint32_t e, uint64_t q_row, uint32_t i, uint32_t head, double *o,
          double *kappa)
{
    const attn_problem_entry_t *entry = &w->entries[e];
    uint32_t length = (uint32_t)entry->kv_length, n_q = entry->n_q, base = length - n_q;
    uint32_t q_heads = w->o.group * w->o.kv_heads, kv = head / w->o.group;
    const uint8_t *mask = entry->mask != NULL ? entry->mask + i * ((n_q + 7) / 8) : NULL;
    double *x = malloc(length * sizeof(double)), top = -INFINITY, sum = 0, scale = 1 / sqrt(D_K);
    int64_t p = base + i;

    if (mask != NULL) {
        p = (int64_t)base - 1;
        for (uint32_t j = 0; j < n_q; j++) {
            p += mask[j / 8] >> (j % 8) & 1;
        }
    }
    *kappa = 0;
    memset(o, 0, D_V * sizeof(double));
    for (uint32_t t = 0; t < length; t++) {
        uint32_t c = t / w->o.chunk_size, in = t % w->o.chunk_size;
        uint32_t page  = w->pages[e][c][in / w->o.page_size];
        int64_t stands = t;
        bool seen      = listed(w, e, kv, t);
        double s = 0, size = 0;
        if (mask != NULL && t >= base) {
            seen   = seen && (mask[(t - base) / 8] >> ((t - base) % 8) & 1);
            stands = base;
            for (uint32_t j = 0; j < t - base; j++) {
                stands += mask[j / 8] >> (j % 8) & 1;
            }
        } else if (mask == NULL && w->o.causal) {
            seen = seen && t <= p;
        }
        seen = seen && (w->o.window == 0 || p - stands < w->o.window);
        for (uint32_t j = 0; seen && j < D_K; j++) {
            double q = 0;
            for (uint32_t part = 0; part < w->o.parts; part++) {
                q += value(w->q[part * w->q_part + q_row * w->q_row + head * w->q_head + j]);
            }
            q *= w->o.parts > 1 ? w->q_scale[q_row * q_heads + head] : 1;
            double y = q * value(*element(w, false, page, kv, in % w->o.page_size, j));
            s += y;
            size += fabs(y);
        }
        x[t]   = s * scale;
        *kappa = fmax(*kappa, size * scale);
        if (w->o.softcap > 0) {
            x[t] = w->o.softcap * tanh(x[t] / w->o.softcap);
        }
        if (w->o.slopes) {
            x[t] += w->slopes[head] * (double)(stands - p);
        }
        x[t] = seen ? x[t] : -INFINITY;
        top  = fmax(top, x[t]);
    }
    for (uint32_t t = 0; t < length && top > -INFINITY; t++) {
        double weight = exp(x[t] - top);
        uint32_t in   = t % w->o.chunk_size;
        uint32_t page = w->pages[e][t / w->o.chunk_size][in / w->o.page_size];
        sum += weight;
        for (uint32_t j = 0; weight > 0 && j < D_V; j++) {
            o[j] += weight * value(*element(w, true, page, kv, in % w->o.page_size, j));
        }
    }
    for (uint32_t j = 0; j < D_V && sum > 0; j++) {
        o[j] /= sum;
    }
    free(x);
    return sum > 0 ? top + log(sum) : -INFINITY;
}

static void
check_rows(const world_t *w)
{
    uint32_t q_heads = w->o.group * w->o.kv_heads;
    uint64_t row     = 0;
    double o[D_V], kappa, worst = 0;

    for (uint32_t e = 0; e < w->problem.n; e++) {
        for (uint32_t i = 0; i < w->entries[e].n_q; i++, row++) {
            for (uint32_t h = 0; h < q_heads; h++) {
                double lse = reference(w, e, row, i, h, o, &kappa);
                float got  = w->lse[row * q_heads + h];
                if (lse == -INFINITY
                        ? got != -INFINITY
                        : !(fabs(got - lse) <= 1e-5 * fmax(1, fabs(lse)) + kappa * 0x1p-20)) {
                    fail_msg("entry %u query %u head %u: LSE %g, should be %g", e, i, h,
                             (double)got, lse);
                }
                for (uint32_t j = 0; j < D_V; j++) {
                    double off = fabs(w->o_f32[(row * q_heads + h) * D_V + j] - o[j]);
                    double may = ldexp(((DTYPE == ATTN_BF16 ? 1e-2 : 1e-3) + kappa * 0x1p-20) * 2,
                                       w->o.grow);
                    worst      = fmax(worst, off);
                    if (!(off <= may)) {
                        fail_msg("entry %u query %u head %u column %u: %g, should be %g", e, i, h,
                                 j, (double)w->o_f32[(row * q_heads + h) * D_V + j], o[j]);
                    }
                }
            }
        }
    }
    print_message("    largest error %.1e\n", ldexp(worst, -w->o.grow));
}

/* ---- what merge.cu does with works that were cut, on the host ---- */

/* A state on a stack; the level of the node with it and the one below, and the highest up to it. */
typedef struct held {
    float a[D_V], l;
    int32_t e;
    uint32_t level, highest;
} held_t;

/* attn_fold_pops() by levels. Returns how many are left. */
static uint32_t
fold(held_t *held, uint32_t n, uint32_t next)
{
    while (n >= 2) {
        held_t *below = &held[n - 2], *top = &held[n - 1];
        uint32_t most = below->highest > 64 ? below->highest : 64;
        if (top->level >= next || top->level >= most) {
            break;
        }
        attn_state_merge_row(below->a, &below->l, &below->e, top->a, top->l, top->e, D_V);
        n--;
    }
    return n;
}

static void
finish_items(const cuda_args_t *x, uint32_t n_items)
{
    static held_t held[64];

    for (uint32_t i = 0; i < n_items; i++) {
        const cuda_item_t *item = &x->items[i];
        for (uint32_t row = 0; row < item->rows; row++) {
            uint32_t n = 0;
            for (uint32_t r = 0; r < item->n_refs; r++) {
                cuda_ref_t ref   = x->refs[item->ref_first + r];
                uint64_t slot    = ref.slot + row;
                n                = fold(held, n, ref.level);
                uint32_t highest = n == 0 ? 0 : held[n - 1].highest;
                held[n].l        = x->slot_l[slot];
                held[n].e        = x->slot_e[slot];
                held[n].level    = ref.level;
                held[n].highest  = n > 0 && ref.level > highest ? ref.level : highest;
                memcpy(held[n++].a, x->slot_a + slot * D_V, sizeof(held[0].a));
            }
            assert_int_equal(fold(held, n, 65), 1);
            uint64_t at = (uint64_t)(item->answer + row / item->n_heads) * x->q_heads + item->head +
                          row % item->n_heads;
            attn_state_finish_row(held[0].a, held[0].l, held[0].e, D_V, NULL,
                                  (float *)x->o + at * D_V, &x->lse[at]);
        }
    }
}

/* Returns how many items were put together. */
static uint32_t
emulate(world_t *w, uint32_t few, uint32_t many)
{
    attn_plan_t *plan;
    cuda_image_t image = {0};
    uint32_t q_heads = w->o.group * w->o.kv_heads, size = w->o.page_size;
    unsigned long long error = UINT64_MAX;

    assert_int_equal(attn_plan_build(&w->problem, 1, few, many, &plan), ATTN_OK);
    assert_int_equal(
        (w->o.steady ? cuda_image_build_steady : cuda_image_build)(plan, w->o.ctas, &image),
        ATTN_OK);
    uint32_t items = image.n_items;
    if (w->o.steady) {
        cuda_room_t room = cuda_room_above(&image.room);
        cuda_image_place(&image, &room, w->o.ctas);
        assert_int_equal(image.many_grid, w->o.ctas);
    }
    uint8_t *tables = malloc(image.bytes);
    memset(tables, 0x5a, image.bytes);
    cuda_image_write(&image, tables);
    float *slots = malloc((image.slots + 1) * (D_V + 2) * sizeof(float));
    memset(slots, 0xff, (image.slots + 1) * (D_V + 2) * sizeof(float));
    assert_true(image.many_grid > 0);
    uint64_t deep_bytes =
        (uint64_t)image.many_grid * CUDA_MANY_GROUPS * image.many_depth * CUDA_MANY_STATE(D_V);
    uint8_t *deep = malloc(deep_bytes);
    memset(deep, 0xff, deep_bytes);
    uint64_t k_stride = (uint64_t)w->o.kv_heads * size * D_K * 2;
    uint64_t v_stride = (uint64_t)w->o.kv_heads * size * D_V * 2;
    float scale       = 1 / sqrtf(D_K);
#define AT(offset) ((void *)(tables + (offset)))
    cuda_args_t x      = {.leaves        = AT(image.leaves),
                          .queries       = AT(image.queries),
                          .pages         = AT(image.pages),
                          .present       = AT(image.present),
                          .masks         = AT(image.masks),
                          .tiles         = AT(image.many_tiles),
                          .items         = AT(image.items),
                          .refs          = AT(image.refs),
                          .slot_a        = slots,
                          .slot_l        = slots + image.slots * D_V,
                          .slot_e        = (int32_t *)slots + image.slots * (D_V + 1),
                          .k             = (uint8_t *)w->k,
                          .v             = (uint8_t *)w->v,
                          .k_page_stride = k_stride,
                          .v_page_stride = v_stride,
                          .page_size     = size,
                          .page_shift =
                         (size & (size - 1)) == 0 ? (uint32_t)__builtin_ctz(size) : CUDA_NONE,
                          .kv_heads      = w->o.kv_heads,
                          .q_heads       = q_heads,
                          .group         = w->o.group,
                          .head_dim_v    = D_V,
                          .q             = (uint8_t *)w->q,
                          .q_parts       = w->o.parts,
                          .q_part_stride = w->q_part * 2,
                          .q_row_stride  = w->q_row * 2,
                          .q_head_stride = w->q_head * 2,
                          .q_scale       = w->o.parts > 1 ? w->q_scale : NULL,
                          .scale         = w->o.softcap > 0 || w->o.slopes ? scale : scale * 1.44269504f,
                          .softcap       = w->o.softcap,
                          .window        = (int32_t)w->o.window,
                          .causal        = w->o.causal,
                          .slopes        = w->o.slopes ? w->slopes : NULL,
                          .o             = w->o_f32,
                          .o_type        = ATTN_F32,
                          .lse           = w->lse,
                          .deep          = deep,
                          .deep_levels   = image.many_depth,
                          .bulk          = w->o.bulk,
                          .box           = (size & (0u - size)) < 64 ? size & (0u - size) : 64,
                          .leaf_sets     = image.leaf_sets,
                          .error         = &error};
    cuda_map_t maps[2] = {
        {{(uintptr_t)w->k, D_K * 2, 128, D_K * 16, k_stride, 8, D_K / 64, x.box / 8}},
        {{(uintptr_t)w->v, D_V * 2, 128, D_V * 16, v_stride, 8, D_V / 64, x.box / 8}}};
    bool general =
        w->o.window > 0 || w->o.lists > 0 || w->o.mask > 0 || w->o.slopes || w->o.softcap > 0;
    emulate_prefill(&x, maps, image.many_grid, w->o.parts > 1 ? 2 : general, chance_state);
    assert_true(error == UINT64_MAX);
    finish_items(&x, image.n_items);
    cuda_image_free(&image);
    attn_plan_free(plan);
    free(deep);
    free(tables);
    free(slots);
    return items;
}

/* Some requests with these options, at random places. Returns how many items their works, cut, were
 * put together from. */
static uint32_t
try_options(options_t o, uint32_t n_q, uint32_t length)
{
    world_t *w                = calloc(1, sizeof(*w));
    uint32_t lengths[ENTRIES] = {length, n_q + 3, length / 2 + n_q};
    uint32_t q_heads          = o.group * o.kv_heads;

    w->o       = o;
    w->o.parts = o.parts == 0 ? 1 : o.parts;
    for (uint32_t e = 0; e < ENTRIES; e++) {
        w->n_pages += (lengths[e] / o.chunk_size + 1) * (o.chunk_size / o.page_size + 1);
    }
    uint64_t rows = (uint64_t)w->n_pages * o.kv_heads * o.page_size;
    w->k          = malloc(rows * D_K * 2);
    w->v          = malloc(rows * D_V * 2);
    w->perm       = malloc(w->n_pages * sizeof(uint32_t));
    memset(w->k, 0xff, rows * D_K * 2);
    memset(w->v, 0xff, rows * D_V * 2);
    for (uint32_t i = 0; i < w->n_pages; i++) {
        uint32_t j = chance_below(i + 1);
        w->perm[i] = w->perm[j];
        w->perm[j] = i;
    }
    for (uint32_t e = 0; e < ENTRIES; e++) {
        add_entry(w, e, lengths[e], n_q);
    }
    w->q_head = D_K + (o.apart ? 8 : 0);
    w->q_row  = q_heads * w->q_head + (o.apart ? 16 : 0);
    w->q_part = w->queries * w->q_row;
    w->q      = malloc(w->o.parts * w->q_part * 2);
    w->o_f32  = malloc(w->queries * q_heads * D_V * sizeof(float));
    w->lse    = malloc(w->queries * q_heads * sizeof(float));
    memset(w->o_f32, 0xff, w->queries * q_heads * D_V * sizeof(float));
    memset(w->lse, 0xff, w->queries * q_heads * sizeof(float));
    for (uint64_t i = 0; i < w->o.parts * w->q_part; i++) {
        bool gap = i % w->q_row >= q_heads * w->q_head || i % w->q_row % w->q_head >= D_K;
        float x  = gap ? NAN : chance_value();
        attn_convert(&w->q[i], DTYPE, &x, ATTN_F32, 1);
    }
    for (uint32_t i = 0; i < 64; i++) {
        w->slopes[i] = 0.01f * (float)(i + 1);
    }
    for (uint64_t i = 0; i < w->queries * q_heads; i++) {
        w->q_scale[i] = chance_below(2) ? 0.5f : 1.0f;
    }
    w->problem     = (attn_problem_t){.n          = ENTRIES,
                                      .entries    = w->entries,
                                      .q_heads    = q_heads,
                                      .kv_heads   = o.kv_heads,
                                      .head_dim_k = D_K,
                                      .head_dim_v = D_V,
                                      .page_size  = o.page_size,
                                      .chunk_size = o.chunk_size,
                                      .window     = o.window,
                                      .causal     = o.causal};
    uint32_t items = emulate(w, CUDA_LEAF, CUDA_MANY_LEAF);
    check_rows(w);
    for (uint32_t e = 0; e < ENTRIES; e++) {
        for (uint32_t i = 0; i < w->entries[e].n_runs; i++) {
            free(w->pages[e][i]);
        }
    }
    free(w->perm);
    free(w->k);
    free(w->v);
    free(w->q);
    free(w->o_f32);
    free(w->lse);
    free(w);
    return items;
}

#define BASE                                                                                       \
    .page_size = 16, .chunk_size = 512, .group = 4, .kv_heads = 1, .ctas = 1, .causal = true,      \
    .bulk = true

static void
test_causal(void **state)
{
    (void)state;
    try_options((options_t){BASE}, 45, 700);
    try_options((options_t){BASE, .kv_heads = 2, .group = 3}, 30, 300);
    try_options((options_t){BASE, .chunk_size = 64}, 20, 260); /* a tree of leaves */
    try_options((options_t){BASE, .causal = false}, 20, 200);
}

static void
test_pages_of_any_size(void **state)
{
    (void)state;
    try_options((options_t){BASE, .page_size = 24}, 20, 300);
    try_options((options_t){BASE, .page_size = 8}, 20, 300);
    try_options((options_t){BASE, .page_size = 256}, 20, 300);
    try_options((options_t){BASE, .page_size = 1, .bulk = false}, 20, 300);
    try_options((options_t){BASE, .page_size = 5, .bulk = false}, 20, 300);
    try_options((options_t){BASE, .page_size = 16, .bulk = false}, 20, 300);
}

static void
test_general(void **state)
{
    (void)state;
    try_options((options_t){BASE, .window = 70}, 20, 400);
    try_options((options_t){BASE, .window = 7, .chunk_size = 64}, 40, 400);
    try_options((options_t){BASE, .softcap = 5}, 20, 200);
    try_options((options_t){BASE, .slopes = true, .window = 100}, 20, 300);
    try_options((options_t){BASE, .lists = 1}, 20, 500);
    try_options((options_t){BASE, .lists = 2, .kv_heads = 2, .page_size = 3, .bulk = false}, 20,
                500);
    try_options((options_t){BASE, .lists = 2, .kv_heads = 2, .page_size = 64}, 20, 700);
    try_options((options_t){BASE, .mask = 1}, 21, 300);
    try_options((options_t){BASE, .mask = 1, .window = 30, .slopes = true}, 33, 300);
}

/* Works of many leaves on more CTAs than there are works: states meet in memory. */
static void
test_cut(void **state)
{
    (void)state;
    assert_true(try_options((options_t){BASE, .chunk_size = 64, .ctas = 7}, 20, 700) > 0);
    assert_true(try_options((options_t){BASE, .chunk_size = 128, .ctas = 9}, 33, 500) > 0);
    assert_true(
        try_options((options_t){BASE, .chunk_size = 64, .ctas = 25, .lists = 1, .page_size = 8}, 20,
                    400) > 0);
    assert_true(try_options((options_t){BASE, .chunk_size = 64, .ctas = 25, .parts = 3}, 20, 300) >
                0);
}

/* Sums for which the quick division is not made. */
static void
test_large_and_small_values(void **state)
{
    (void)state;
    if (DTYPE == ATTN_BF16) {
        try_options((options_t){BASE, .grow = 80}, 20, 200);
        try_options((options_t){BASE, .grow = -80, .window = 50}, 20, 200);
    }
}

/* As steps on a stream have them: q with the caller's strides, more CTAs than there are tiles, and
 * room for more of everything. */
static void
test_steps_on_a_stream(void **state)
{
    (void)state;
    try_options((options_t){BASE, .apart = true}, 20, 300);
    try_options((options_t){BASE, .apart = true, .kv_heads = 2, .group = 3, .window = 60}, 30, 300);
    try_options((options_t){BASE, .steady = true, .ctas = 9}, 20, 300);
    try_options((options_t){BASE, .steady = true, .apart = true, .kv_heads = 2, .group = 3}, 30,
                300);
    assert_true(
        try_options((options_t){BASE, .steady = true, .chunk_size = 64, .ctas = 40}, 20, 400) > 0);
    try_options((options_t){BASE, .steady = true, .parts = 3, .ctas = 5}, 20, 200);
}

static void
test_queries_of_parts(void **state)
{
    (void)state;
    try_options((options_t){BASE, .parts = 3}, 20, 300);
    try_options((options_t){BASE, .parts = 3, .window = 50, .chunk_size = 64}, 20, 300);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_causal),
        cmocka_unit_test(test_pages_of_any_size),
        cmocka_unit_test(test_general),
        cmocka_unit_test(test_cut),
        cmocka_unit_test(test_large_and_small_values),
        cmocka_unit_test(test_queries_of_parts),
        cmocka_unit_test(test_steps_on_a_stream),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
