/* rows.c: chance, the tables that rows are slices of, and the contents of sequences. */
#include "tests/stress/truth.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TABLE (1u << 18)

static float table_f32[2][TABLE]; /* k and v; q */
static uint16_t table_f16[2][TABLE], table_bf16[2][TABLE];

static uint64_t
mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

uint64_t
chance(chance_t *c)
{
    return mix(c->state += UINT64_C(0x9e3779b97f4a7c15)); /* splitmix64 */
}

uint64_t
chance_below(chance_t *c, uint64_t n)
{
    return chance(c) % n;
}

uint64_t
chance_in(chance_t *c, uint64_t low, uint64_t high)
{
    return low + chance_below(c, high - low + 1);
}

/* Exact: the value has at most 7 significant bits and is normal, or 0. */
static uint16_t
to_f16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    if (x == 0) {
        return 0;
    }
    return (uint16_t)((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 |
                      (bits >> 13 & 1023));
}

static uint16_t
to_bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)(bits >> 16);
}

void
truth_init(void)
{
    chance_t c = {.state = 20240229};

    for (uint32_t t = 0; t < 2; t++) {
        for (uint32_t i = 0; i < TABLE; i++) {
            float x          = ((float)chance_below(&c, 256) - 128) / (t == 0 ? 128 : 32);
            table_f32[t][i]  = x;
            table_f16[t][i]  = to_f16(x);
            table_bf16[t][i] = to_bf16(x);
        }
    }
}

static uint64_t
row_at(row_kind_t kind, uint64_t content, uint64_t position, uint32_t layer)
{
    uint64_t key = content ^ mix(position * 8191 + layer * 4 + kind + 1);

    return mix(key) % (TABLE - TRUTH_ROW_MAX);
}

const float *
truth_row(row_kind_t kind, uint64_t content, uint64_t position, uint32_t layer)
{
    return table_f32[kind == ROW_Q] + row_at(kind, content, position, layer);
}

void
truth_write(row_kind_t kind, uint64_t content, uint64_t position, uint32_t layer, uint32_t n,
            attn_dtype_t dtype, void *to)
{
    uint64_t at = row_at(kind, content, position, layer);
    uint32_t t  = kind == ROW_Q;

    if (dtype == ATTN_F32) {
        memcpy(to, table_f32[t] + at, n * sizeof(float));
    } else {
        memcpy(to, (dtype == ATTN_F16 ? table_f16[t] : table_bf16[t]) + at, n * sizeof(uint16_t));
    }
}

/* ---- geometries ---- */

static const float slopes[6] = {0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f};
static const float sinks[6]  = {0.5f, -1, 2, 0, 1.5f, -0.25f};

static const attn_layer_t layers_f32[2] = {
    {.causal = true},
    {.causal = true, .window = 300, .softcap = 6, .scale = 0.25f},
};
static const attn_layer_t layers_bf16[3] = {
    {.causal = true, .slopes = slopes},
    {.causal = false},
    {.causal = true, .window = 70, .sinks = sinks},
};
static const attn_layer_t layers_f16[2] = {
    {.causal = true, .sinks = sinks},
    {.causal = true, .softcap = 20},
};

static const attn_geometry_t geometries[TRUTH_GEOMETRIES] = {
    {.size         = sizeof(attn_geometry_t),
     .layers       = 2,
     .q_heads      = 4,
     .kv_heads     = 2,
     .head_dim_k   = 32,
     .head_dim_v   = 40,
     .kv_dtype     = ATTN_F32,
     .page_size    = 24,
     .chunk_size   = 256,
     .placement    = ATTN_PLACE_SPREAD,
     .layer_table  = layers_f32,
     .region_bytes = 24 << 20},
    {.size         = sizeof(attn_geometry_t),
     .layers       = 3,
     .q_heads      = 6,
     .kv_heads     = 6,
     .head_dim_k   = 64,
     .head_dim_v   = 32,
     .kv_dtype     = ATTN_BF16,
     .page_size    = 16,
     .chunk_size   = 256,
     .placement    = ATTN_PLACE_WHOLE,
     .layer_table  = layers_bf16,
     .region_bytes = 32 << 20},
    {.size         = sizeof(attn_geometry_t),
     .layers       = 2,
     .q_heads      = 4,
     .kv_heads     = 1,
     .head_dim_k   = 40,
     .head_dim_v   = 32,
     .kv_dtype     = ATTN_F16,
     .page_size    = 7,
     .chunk_size   = 512,
     .placement    = ATTN_PLACE_SPREAD,
     .layer_table  = layers_f16,
     .region_bytes = 8 << 20},
};

const attn_geometry_t *
truth_geometry(uint32_t i)
{
    return &geometries[i % TRUTH_GEOMETRIES];
}

/* ---- shadows ---- */

void
shadow_clear(shadow_t *s)
{
    free(s->segments);
    memset(s, 0, sizeof(*s));
}

void
shadow_append(shadow_t *s, uint64_t first, uint64_t content)
{
    while (s->n > 0 && s->segments[s->n - 1].first >= first) {
        s->n--;
    }
    if (s->n == s->room) {
        s->room     = s->room > 0 ? 2 * s->room : 16;
        s->segments = realloc(s->segments, s->room * sizeof(*s->segments));
        if (s->segments == NULL) {
            abort();
        }
    }
    s->segments[s->n++] = (segment_t){.first = first, .content = content};
}

void
shadow_append_path(shadow_t *s, uint64_t first, uint64_t content, const uint32_t *path, uint32_t n)
{
    for (uint32_t j = 0; j < n; j++) {
        if (j == 0 || path[j] != path[j - 1] + 1) {
            shadow_append(s, first + j, content);
            s->segments[s->n - 1].shift = path[j] - j;
        }
    }
}

void
shadow_cut(shadow_t *s, uint64_t length)
{
    while (s->n > 0 && s->segments[s->n - 1].first >= length) {
        s->n--;
    }
    s->length = length;
    s->maybe  = length;
}

void
shadow_copy(shadow_t *to, const shadow_t *from, uint64_t length)
{
    for (uint32_t i = 0; i < from->n; i++) {
        shadow_append(to, from->segments[i].first, from->segments[i].content);
        to->segments[to->n - 1].shift = from->segments[i].shift;
    }
    shadow_cut(to, length);
}

segment_t
shadow_segment(const shadow_t *s, uint64_t position)
{
    uint32_t low = 0, high = s->n;

    while (high - low > 1) {
        uint32_t middle                                         = (low + high) / 2;
        *(s->segments[middle].first <= position ? &low : &high) = middle;
    }
    return s->segments[low];
}
