/*
 * The arithmetic for machines with AMX: bf16 K and V of requests of many rows go through its tiles;
 * f32 and f16, and requests of few rows, which wait for memory and leave most of a tile empty, go
 * through AVX-512 as ever. TDPBF16PS multiplies bf16 exactly and adds in f32, to nearest,
 * subnormals taken and left as zero, in an order that is the same for every row and column of a
 * tile. So a row's bits do not depend on its place.
 *
 *     S = K q     A: 16 tokens x 32 dims, bf16 as it lies in memory;  B: q, 16 rows a tile
 *     O = p V     A: p, 16 rows x 32 tokens;  B: V, pairs of tokens side by side
 *
 * Nothing that matters is rounded to bf16: q is the sum of three bf16, exactly; p is rounded to
 * the sum of two, 17 bits, since answers may be asked for in f32. A part of q that is zero for
 * all rows is skipped, which is as good as adding it.
 *
 * Order of operations: dims in blocks of 32, in each the parts of q; slots in blocks of 32, in
 * each the parts of p. s, y, m, p and l are as in leaf.inc, from which the rest comes.
 *
 * f16 was tried as the sum of two bf16, cut in vectors: prefill gained half, decode, which
 * waits for the cutting, lost a third (docs/performance.md).
 */
#include "kernels/cpu/leaf.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/leaf.inc"

#define TILE 1024u /* bytes: 16 rows of 64 */
#define BLOCK 32u  /* bf16 in a row of a tile: dims, or tokens */
#define P_PARTS 2u

/* ---- tiles ---- */

typedef struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_config_t;

/* Eight tiles of 16 rows of 64 bytes. A constant, for some compilers believe that only the
 * first 8 bytes are read. */
static const tile_config_t tile_config = {
    .palette = 1,
    .bytes   = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows    = {16, 16, 16, 16, 16, 16, 16, 16},
};

static void
configure(void)
{
    _tile_loadconfig(&tile_config);
}

static void
release(void)
{
    _tile_release();
}

/* Begin: C is 0, and what the code before has written is in memory, for compilers do not know
 * that tiles are loaded from it. A macro: the instructions name tiles by constants. */
#define ZERO_ALL()                                                                                 \
    do {                                                                                           \
        __asm__ volatile("" ::: "memory");                                                         \
        _tile_zero(0);                                                                             \
        _tile_zero(1);                                                                             \
        _tile_zero(2);                                                                             \
        _tile_zero(3);                                                                             \
    } while (0)

/* Four tiles of C in a row, 1 KiB each. */
INLINE void
store_all(float *c)
{
    _tile_stored(0, c, 64);
    _tile_stored(1, c + TILE / 4, 64);
    _tile_stored(2, c + 2 * TILE / 4, 64);
    _tile_stored(3, c + 3 * TILE / 4, 64);
}

/* n of 32 bf16, the rest 0. */
INLINE __m512i
words(const uint16_t *p, uint32_t n)
{
    return n >= 32 ? _mm512_loadu_si512(p)
                   : _mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << n) - 1), p);
}

/* ---- q ---- */

/* A block of 32 dims of a row as bf16, cut off. Takes away from q what the part holds. */
INLINE __m512i
take_part(float *q)
{
    __m512 a = _mm512_loadu_ps(q), b = _mm512_loadu_ps(q + 16);
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512i a_high      = _mm512_and_si512(_mm512_castps_si512(a), upper);
    __m512i b_high      = _mm512_and_si512(_mm512_castps_si512(b), upper);

    _mm512_storeu_ps(q, _mm512_sub_ps(a, _mm512_castsi512_ps(a_high)));
    _mm512_storeu_ps(q + 16, _mm512_sub_ps(b, _mm512_castsi512_ps(b_high)));
    __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a_high, 16));
    __m256i top = _mm512_cvtepi32_epi16(_mm512_srli_epi32(b_high, 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), top, 1);
}

/* Part by part a tile of 16 rows x 32 dims. Returns how many parts are not all zero. */
static uint32_t
form_tiles(float (*q)[BLOCK], char *to, size_t part_bytes)
{
    uint32_t used = 1;

    for (uint32_t part = 0; part < CPU_Q_PARTS; part++) {
        vf row[16];
        __m512i any = _mm512_setzero_si512();
        for (int r = 0; r < 16; r++) {
            __m512i x = take_part(q[r]);
            any       = _mm512_or_si512(any, x);
            row[r]    = (vf)x;
        }
        used = _mm512_test_epi32_mask(any, any) != 0 ? part + 1 : used;
        v_transpose(row);
        for (int i = 0; i < 16; i++) {
            v_store((float *)(void *)(to + part * part_bytes + i * 64), row[i]);
        }
    }
    return used;
}

/* form: [part][16 rows][32 dims] tiles. */
static void
begin(cpu_form_t *form, const float *q, uint32_t rows, uint32_t d, attn_dtype_t type)
{
    uint32_t blocks = (d + BLOCK - 1) / BLOCK, row_tiles = (rows + 15) / 16;
    size_t part_bytes = (size_t)row_tiles * blocks * TILE;

    form->parts = 1;
    configure();
    if (type != ATTN_BF16) {
        return;
    }
    for (uint32_t r = 0; r < row_tiles; r++) {
        for (uint32_t b = 0; b < blocks; b++) {
            float x[16][BLOCK] = {0};
            char *to           = (char *)form->data + (r * blocks + b) * TILE;
            uint32_t n         = d - b * BLOCK < BLOCK ? d - b * BLOCK : BLOCK;
            for (uint32_t i = 0; i < 16 && r * 16 + i < rows; i++) {
                memcpy(x[i], q + (size_t)(r * 16 + i) * d + b * BLOCK, n * sizeof(float));
            }
            uint32_t used = form_tiles(x, to, part_bytes);
            form->parts   = used > form->parts ? used : form->parts;
        }
    }
}

/* ---- s = q k ---- */

/* 16 tokens as tiles of A: where their rows lie. */
typedef struct keys {
    const char *at;
    size_t stride; /* from row to row */
} keys_t;

/* Take the 16 rows as they lie, if they do so evenly, or copied into `to`. */
INLINE keys_t
keys_of(const cpu_leaf_t *x, uint32_t slot, char *to)
{
    const void *const *k = x->k + slot;
    const size_t wide    = (size_t)(x->d_k + BLOCK - 1) / BLOCK * BLOCK * 2;
    bool even            = wide == (size_t)x->d_k * 2;

    for (int t = 1; even && t < 16; t++) {
        even = (const char *)k[t] == (const char *)k[t - 1] + wide;
    }
    if (even) {
        return (keys_t){.at = k[0], .stride = wide};
    }
    for (uint32_t t = 0; t < 16; t++) {
        const uint16_t *row = k[t];
        char *out           = to + t * wide;
        for (uint32_t i = 0; i < x->d_k; i += BLOCK, out += 64) {
            _mm512_store_si512(out, words(row + i, x->d_k - i));
        }
    }
    return (keys_t){.at = to, .stride = wide};
}

/* A tile of S, 16 tokens x 16 rows, into s. */
INLINE void
put_scores(const cpu_leaf_t *x, const float *c, uint32_t slot, uint32_t row)
{
    uint32_t rows = x->rows - row < 16 ? x->rows - row : 16;
    vf s[16];

#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        s[i] = v_load(c + i * 16);
    }
    v_transpose(s);
    for (uint32_t i = 0; i < rows; i++) {
        v_store(x->s + (size_t)(row + i) * CPU_LEAF + slot, s[i]);
    }
}

/* What q is to K in the products of a leaf. */
typedef struct dots {
    const cpu_leaf_t *x;
    uint32_t blocks, row_tiles;
    size_t q_part; /* bytes from part to part */
} dots_t;

INLINE const char *
q_tile(const dots_t *d, uint32_t row_tile, uint32_t block, uint32_t part)
{
    return (const char *)d->x->form.data + part * d->q_part + (row_tile * d->blocks + block) * TILE;
}

/* 64 tokens x 16 rows. */
INLINE void
dot_4x1(const dots_t *d, const keys_t *k, uint32_t slot, uint32_t row_tile, fetch_t *fetch)
{
    _Alignas(64) float c[4 * TILE / 4];

    ZERO_ALL();
    for (uint32_t b = 0; b < d->blocks; b++) {
        for (uint32_t qp = 0; qp < d->x->form.parts; qp++) {
            _tile_loadd(4, q_tile(d, row_tile, b, qp), 64);
            _tile_loadd(5, k[0].at + b * 64, k[0].stride);
            _tile_dpbf16ps(0, 5, 4);
            fetch_some(fetch);
            _tile_loadd(6, k[1].at + b * 64, k[1].stride);
            _tile_dpbf16ps(1, 6, 4);
            fetch_some(fetch);
            _tile_loadd(7, k[2].at + b * 64, k[2].stride);
            _tile_dpbf16ps(2, 7, 4);
            fetch_some(fetch);
            _tile_loadd(5, k[3].at + b * 64, k[3].stride);
            _tile_dpbf16ps(3, 5, 4);
            fetch_some(fetch);
        }
    }
    store_all(c);
    for (uint32_t i = 0; i < 4; i++) {
        put_scores(d->x, c + i * TILE / 4, slot + 16 * i, row_tile * 16);
    }
}

/* 32 tokens x 32 rows. */
INLINE void
dot_2x2(const dots_t *d, const keys_t *k, uint32_t slot, uint32_t row_tile)
{
    _Alignas(64) float c[4 * TILE / 4];

    ZERO_ALL();
    for (uint32_t b = 0; b < d->blocks; b++) {
        _tile_loadd(4, k[0].at + b * 64, k[0].stride);
        _tile_loadd(5, k[1].at + b * 64, k[1].stride);
        for (uint32_t qp = 0; qp < d->x->form.parts; qp++) {
            _tile_loadd(6, q_tile(d, row_tile, b, qp), 64);
            _tile_loadd(7, q_tile(d, row_tile + 1, b, qp), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_all(c);
    for (uint32_t i = 0; i < 4; i++) {
        put_scores(d->x, c + i * TILE / 4, slot + i % 2 * 16, (row_tile + i / 2) * 16);
    }
}

/* A block of 64 slots begins at `base`; those from `end` on do not count. */
static void
dots_tiles(const cpu_leaf_t *x)
{
    uint32_t row_tiles = (x->rows + 15) / 16;
    dots_t d           = {.x = x, .blocks = (x->d_k + BLOCK - 1) / BLOCK, .row_tiles = row_tiles};
    size_t room        = (size_t)16 * d.blocks * 64;
    fetch_t fetch;

    fetch_begin(&fetch, x->ahead.k, x->ahead.n, x->ahead.k_bytes,
                d.blocks * 4 * x->form.parts * ((x->end - x->first + 63) / 64));
    d.q_part = (size_t)row_tiles * d.blocks * TILE;
    for (uint32_t base = x->first / 32 * 32; base < x->end; base += CPU_K_BLOCK) {
        keys_t k[4];
        uint32_t tiles = (x->end - base + 15) / 16, row = 0;
        tiles = tiles < 4 ? tiles : 4;
        for (uint32_t i = 0; i < 4; i++) { /* the last stands in for none */
            k[i] = i < tiles ? keys_of(x, base + 16 * i, (char *)x->stage + i * room) : k[i - 1];
        }
        for (; row + 2 <= row_tiles; row += 2) {
            dot_2x2(&d, k, base, row);
            if (tiles > 2) {
                dot_2x2(&d, k + 2, base + 32, row);
            }
        }
        if (row < row_tiles) {
            dot_4x1(&d, k, base, row, &fetch);
        }
    }
}

/* ---- A = sum p v ---- */

/* p: [part][16 rows][32 slots] tiles; slots that no row sees are 0. */
static void
weight_tiles(const cpu_leaf_t *x, char *to, size_t part_bytes, uint32_t first_block,
             uint32_t blocks)
{
    uint32_t first = x->first / 16 * 16, end = (x->end + 15) / 16 * 16;

    for (uint32_t row = 0; row < (x->rows + 15) / 16 * 16; row++) {
        const float *s = x->s + (size_t)row * CPU_LEAF;
        char *out      = to + (size_t)(row / 16) * blocks * TILE + row % 16 * 64;
        for (uint32_t b = 0; b < blocks; b++, out += TILE) {
            uint32_t t = (first_block + b) * BLOCK;
            bool one   = row < x->rows && t >= first && t < end;
            bool two   = row < x->rows && t + 16 >= first && t + 16 < end;
            __m512 p0  = one ? _mm512_loadu_ps(s + t) : _mm512_setzero_ps();
            __m512 p1  = two ? _mm512_loadu_ps(s + t + 16) : _mm512_setzero_ps();
            __m512i p  = (__m512i)_mm512_cvtne2ps_pbh(p1, p0);
            __m512i w0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(p));
            __m512i w1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(p, 1));
            _mm512_store_si512(out, p);
            p0 = _mm512_sub_ps(p0, _mm512_castsi512_ps(_mm512_slli_epi32(w0, 16)));
            p1 = _mm512_sub_ps(p1, _mm512_castsi512_ps(_mm512_slli_epi32(w1, 16)));
            _mm512_store_si512(out + part_bytes, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
        }
    }
}

/*
 * V: [32 slots][column tile] tiles, whose rows are pairs of slots. Two tiles of bf16
 * hold 32 columns in the order that unpacking leaves: put_sums() sorts it out.
 */
INLINE void
value_tiles(const cpu_leaf_t *x, char *to, uint32_t first_block, uint32_t blocks, uint32_t columns)
{
    fetch_t fetch;

    fetch_begin(&fetch, x->ahead.v, x->ahead.n, x->ahead.v_bytes,
                blocks * 16 * ((x->d_v + BLOCK - 1) / BLOCK));
    for (uint32_t pair = 0; pair < blocks * 16; pair++) {
        uint32_t t         = first_block * BLOCK + 2 * pair;
        const uint16_t *v0 = x->v[t], *v1 = x->v[t + 1];
        char *out = to + (size_t)(pair / 16) * columns * TILE + pair % 16 * 64;
        for (uint32_t i = 0; i < x->d_v; i += BLOCK) {
            uint32_t n = x->d_v - i;
            fetch_some(&fetch);
            __m512i a = words(v0 + i, n), b = words(v1 + i, n);
            _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(out + TILE, _mm512_unpackhi_epi16(a, b));
            out += 2 * TILE;
        }
    }
}

/* Two tiles of O, 16 rows x 32 columns, into A. */
INLINE void
put_sums(closing_t *closing, const float *c, uint32_t row, uint32_t column)
{
    const cpu_leaf_t *x = closing->x;
    const __m512i low   = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high  = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    uint32_t rows       = x->rows - row < 16 ? x->rows - row : 16;
    uint32_t n          = x->d_v - column < 32 ? x->d_v - column : 32;
    bool go_on          = x->running != NULL && !x->begin;

    for (uint32_t r = 0; r < rows; r++) {
        const float *a  = x->a + (size_t)(row + r) * x->d_v + column;
        float lanes[32] = {0};
        __m512i c0 = _mm512_load_si512(c + r * 16), c1 = _mm512_load_si512(c + TILE / 4 + r * 16);
        vf sums[2] = {(vf)_mm512_permutex2var_epi64(c0, low, c1),
                      (vf)_mm512_permutex2var_epi64(c0, high, c1)};
        if (go_on && n == 32) {
            sums[0] = sums[0] + v_load(a);
            sums[1] = sums[1] + v_load(a + 16);
        } else if (go_on) {
            memcpy(lanes, a, n * sizeof(*a));
            sums[0] = sums[0] + v_load(lanes);
            sums[1] = sums[1] + v_load(lanes + 16);
        }
        if (n == 32) {
            close_row(closing, row + r, column, sums, 2);
        } else {
            memcpy(lanes, sums, sizeof(lanes));
            close_part(closing, row + r, column, lanes, n);
        }
    }
}

/* Where the tiles of p and V lie. */
typedef struct sums {
    const char *p, *v;
    size_t p_part;
    uint32_t blocks, columns; /* column tiles: an even number */
} sums_t;

INLINE const char *
p_tile(const sums_t *s, uint32_t row_tile, uint32_t block, uint32_t part)
{
    return s->p + part * s->p_part + (row_tile * s->blocks + block) * TILE;
}

INLINE const char *
v_tile(const sums_t *s, uint32_t block, uint32_t column)
{
    return s->v + (block * s->columns + column) * TILE;
}

/* 16 rows x 64 columns; only the first 32 of them count if the tiles end there. */
INLINE void
sum_1x4(closing_t *closing, const sums_t *s, uint32_t row_tile, uint32_t column)
{
    _Alignas(64) float c[4 * TILE / 4];
    uint32_t far = column + 2 < s->columns ? column + 2 : column;

    ZERO_ALL();
    for (uint32_t b = 0; b < s->blocks; b++) {
        for (uint32_t pp = 0; pp < P_PARTS; pp++) {
            _tile_loadd(4, p_tile(s, row_tile, b, pp), 64);
            _tile_loadd(5, v_tile(s, b, column), 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, v_tile(s, b, column + 1), 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, v_tile(s, b, far), 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, v_tile(s, b, far + 1), 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    store_all(c);
    put_sums(closing, c, row_tile * 16, column * 16);
    if (far != column) {
        put_sums(closing, c + 2 * TILE / 4, row_tile * 16, far * 16);
    }
}

/* 32 rows x 32 columns. */
INLINE void
sum_2x2(closing_t *closing, const sums_t *s, uint32_t row_tile, uint32_t column)
{
    _Alignas(64) float c[4 * TILE / 4];

    ZERO_ALL();
    for (uint32_t b = 0; b < s->blocks; b++) {
        _tile_loadd(6, v_tile(s, b, column), 64);
        _tile_loadd(7, v_tile(s, b, column + 1), 64);
        for (uint32_t pp = 0; pp < P_PARTS; pp++) {
            _tile_loadd(4, p_tile(s, row_tile, b, pp), 64);
            _tile_loadd(5, p_tile(s, row_tile + 1, b, pp), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_all(c);
    put_sums(closing, c, row_tile * 16, column * 16);
    put_sums(closing, c + 2 * TILE / 4, row_tile * 16 + 16, column * 16);
}

static int
sums_tiles(const cpu_leaf_t *x)
{
    closing_t closing  = {.x = x, .failed = UINT32_MAX};
    uint32_t first     = x->first / BLOCK;
    uint32_t row_tiles = (x->rows + 15) / 16, row = 0;
    sums_t s = {.blocks  = (x->end + BLOCK - 1) / BLOCK - first,
                .columns = (x->d_v + BLOCK - 1) / BLOCK * 2,
                .p       = x->stage};

    s.p_part = (size_t)row_tiles * s.blocks * TILE;
    s.v      = s.p + P_PARTS * s.p_part;
    weight_tiles(x, (char *)x->stage, s.p_part, first, s.blocks);
    value_tiles(x, (char *)x->stage + P_PARTS * s.p_part, first, s.blocks, s.columns);
    for (; row + 2 <= row_tiles; row += 2) {
        for (uint32_t column = 0; column < s.columns; column += 2) {
            sum_2x2(&closing, &s, row, column);
        }
    }
    for (uint32_t column = 0; row < row_tiles && column < s.columns; column += 4) {
        sum_1x4(&closing, &s, row, column);
    }
    return closing.failed == UINT32_MAX ? -1 : (int)closing.failed;
}

/* ---- the leaf ---- */

static int
leaf_amx(const cpu_leaf_t *x)
{
    return x->dtype == ATTN_BF16 && !x->few ? leaf_of(x, dots_tiles, sums_tiles) : leaf(x);
}

const cpu_isa_t cpu_isa_amx = {.name  = "amx",
                               .lanes = 16,
                               .kind  = "amx",
                               .begin = begin,
                               .end   = release,
                               .leaf  = leaf_amx,
                               .widen = widen,
                               .merge = merge};
