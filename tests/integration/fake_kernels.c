/*
 * fake_kernels.c: what kernels of attnd do, on the host and slowly: from the same tables, with the
 * same layout of pages, in double. Sums are not cut and merged: every piece adds to its rows, or to
 * its states, and what it came to is written after each launch. Of what makes logits: scale, causal
 * and window.
 */
#include "tests/integration/fake_kernels.h"

#include "base/attn_types.h"
#include "kernels/cuda/drive.h"
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/image.h"
#include "kernels/cuda/store.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_MAX 4096u
#define DIM_MAX 256u

static uint32_t type = ATTN_F16; /* of K and V: as rows last came on a stream */

void
fake_kernels_are_of(uint32_t exponent)
{
    type = exponent == 0x7c007c00u ? ATTN_F16 : ATTN_BF16;
}

/* Rows of the answer that is being made, and its states: what pieces added to them. */
static struct {
    double l[ROWS_MAX], a[ROWS_MAX][DIM_MAX];
} sums[2];

/* ---- elements ---- */

static double halves[65536]; /* what each f16 is: the compiler's own way takes long */

static void __attribute__((constructor)) fill_halves(void)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint16_t narrow = (uint16_t)bits;
        _Float16 h;
        memcpy(&h, &narrow, sizeof(h));
        halves[bits] = (double)h;
    }
}

static double
element(const void *at, uint32_t of, uint64_t i)
{
    if (of == ATTN_F32) {
        return (double)((const float *)at)[i];
    }
    uint16_t bits = ((const uint16_t *)at)[i];
    if (of == ATTN_F16) {
        return halves[bits];
    }
    uint32_t wide = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &wide, sizeof(f));
    return (double)f;
}

static void
put(void *at, uint32_t of, uint64_t i, double v)
{
    if (of == ATTN_F32) {
        ((float *)at)[i] = (float)v;
    } else if (of == ATTN_F16) {
        ((_Float16 *)at)[i] = (_Float16)v;
    } else {
        float f = (float)v;
        uint32_t bits;
        memcpy(&bits, &f, sizeof(bits));
        ((uint16_t *)at)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/* A piece of 16 bytes of the row at an offset in a page. */
static uint8_t *
piece_at(uint8_t *page, uint32_t page_size, uint32_t row_bytes, uint32_t offset, uint32_t head,
         uint32_t c)
{
    return page + ((uint64_t)head * page_size + offset) * row_bytes + 16 * (c ^ (offset & 7));
}

/* ---- store.cu ---- */

static void
move_rows(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_rows_t *x = args[0];
    uint32_t mode = *(const uint32_t *)args[1], pieces = x->row_bytes / 16;

    (void)kernel;
    (void)grid;
    for (uint64_t i = 0; i < x->n * x->kv_heads * pieces; i++) {
        uint32_t head = (uint32_t)(i / pieces % x->kv_heads);
        uint64_t row  = i / pieces / x->kv_heads;
        uint8_t *at   = piece_at(x->store + x->pages[row] * x->page_stride, x->page_size,
                                 x->row_bytes, x->offsets[row], head, (uint32_t)(i % pieces));
        uint8_t *rows = (uint8_t *)x->rows + 16 * i;
        if (mode == 0) {
            memcpy(at, rows, 16);
        } else if (mode == 1) {
            memcpy(rows, at, 16);
        } else if (memcmp(at, rows, 16) != 0) {
            *x->note = 1;
        }
    }
}

static bool
has_special(const uint8_t *piece, uint32_t exponent)
{
    bool special = false;

    for (int i = 0; i < 8; i++) {
        uint16_t bits;
        memcpy(&bits, piece + 2 * i, sizeof(bits));
        special = special || (bits & exponent & 0xffff) == (exponent & 0xffff);
    }
    return special;
}

static void
bring_rows(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_bring_t *x = args[0];
    uint32_t of_k = x->k_row_bytes / 16, both = of_k + x->v_row_bytes / 16;
    bool again = x->mark->stored == x->head->serial;

    (void)kernel;
    (void)grid;
    fake_kernels_are_of(x->exponent);
    if (x->head->serial == 0) {
        return;
    }
    if (x->k == NULL) {
        x->mark->trouble |= again ? 0 : CUDA_NOT_STORED;
        return;
    }
    for (uint64_t i = 0; i < x->head->n_rows * x->kv_heads * both; i++) {
        uint32_t c = (uint32_t)(i % both), head = (uint32_t)(i / both % x->kv_heads);
        uint64_t row = i / both / x->kv_heads;
        bool of_v    = c >= of_k;
        c -= of_v ? of_k : 0;
        const uint8_t *from = of_v ? x->v + row * x->v_row_stride + head * x->v_head_stride
                                   : x->k + row * x->k_row_stride + head * x->k_head_stride;
        uint8_t *page       = of_v ? x->v_store + x->pages[row] * x->v_page_stride
                                   : x->k_store + x->pages[row] * x->k_page_stride;
        uint8_t *at         = piece_at(page, x->page_size, of_v ? x->v_row_bytes : x->k_row_bytes,
                                       x->offsets[row], head, c);
        from += 16 * c;
        if (again && memcmp(at, from, 16) != 0) {
            x->mark->trouble |= CUDA_DIFFERS;
        } else if (!again && has_special(from, x->exponent)) {
            x->mark->trouble |= CUDA_NOT_FINITE;
        } else if (!again) {
            memcpy(at, from, 16);
        }
    }
    x->mark->stored = x->head->serial;
}

static void
split_queries(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    const cuda_split_t *x = args[0];

    (void)kernel;
    for (uint64_t row = 0; row < grid; row++) {
        uint64_t from = row / x->heads * x->from_row_stride + row % x->heads * x->from_head_stride;
        x->scale[row] = 1;
        for (uint32_t i = 0; i < x->d; i++) {
            double v = element(x->from, x->from_type, from + i);
            for (uint32_t p = 0; p < x->parts; p++) {
                uint64_t to = p * x->part_stride + row * x->d + i;
                put(x->to, x->to_type, to, v);
                v -= element(x->to, x->to_type, to);
            }
        }
    }
}

/* ---- attend.cu ---- */

static double
logit(const cuda_args_t *x, uint32_t d, const cuda_query_t *query, uint32_t head, uint32_t kv_head,
      uint32_t page, uint32_t offset)
{
    uint8_t *k   = (uint8_t *)(uintptr_t)x->k + page * x->k_page_stride;
    double sum   = 0;
    uint64_t at  = query->q_row * x->q_row_stride + head * x->q_head_stride;
    double times = x->q_scale != NULL ? (double)x->q_scale[query->q_row * x->q_heads + head] : 1;

    for (uint32_t i = 0; i < d; i++) {
        const uint8_t *piece = piece_at(k, x->page_size, d * 2, offset, kv_head, i / 8);
        double q             = 0;
        for (uint32_t p = 0; p < x->q_parts; p++) {
            q += element(x->q + p * x->q_part_stride + at, type, i);
        }
        sum += q * element(piece, type, i % 8);
    }
    return sum * times * (double)x->scale * 0.69314718055994530942;
}

/* A token adds to a row, if that sees it. */
static void
add_token(const cuda_args_t *x, uint32_t d_k, uint32_t d_v, const cuda_piece_t *piece,
          const cuda_query_t *query, uint32_t head, int32_t position, uint32_t page,
          uint32_t offset)
{
    uint64_t at = (uint64_t)query->answer * x->q_heads + head;
    double *l = &sums[piece->states].l[at], *a = sums[piece->states].a[at];

    if ((x->causal && position > query->position) ||
        (x->window > 0 && query->position - position >= x->window)) {
        return;
    }
    double w = exp(logit(x, d_k, query, head, piece->kv_head, page, offset));
    if (!(fabs(w) < 1e300)) {
        *x->error =
            (unsigned long long)query->entry << 40 | (unsigned long long)query->query << 12 | head;
    }
    uint8_t *v = (uint8_t *)(uintptr_t)x->v + page * x->v_page_stride;
    *l += w;
    for (uint32_t c = 0; c < d_v; c++) {
        const uint8_t *p = piece_at(v, x->page_size, d_v * 2, offset, piece->kv_head, c / 8);
        a[c] += w * element(p, type, c % 8);
    }
}

static void
play_row(const cuda_args_t *x, uint32_t d_k, uint32_t d_v, const cuda_piece_t *piece, uint32_t row)
{
    const cuda_query_t *query = &x->queries[piece->query_first + row / piece->n_heads];
    uint32_t head  = piece->kv_head * x->group + piece->head_first + row % piece->n_heads;
    uint64_t at    = (uint64_t)query->answer * x->q_heads + head;
    uint32_t parts = piece->listed ? CUDA_WARPS : 1;
    double *l = &sums[piece->states].l[at], *a = sums[piece->states].a[at];

    for (uint32_t i = piece->leaf_first * parts; i < (piece->leaf_first + piece->n_leaves) * parts;
         i++) {
        cuda_leaf_t leaf = {.tokens = CUDA_BLOCK};
        uint32_t has     = UINT32_MAX;
        if (piece->listed) {
            leaf.page     = x->blocks[i].page;
            leaf.offset   = x->blocks[i].offset;
            leaf.position = x->blocks[i].position;
            has           = x->blocks[i].present;
        } else {
            leaf = x->leaves[i];
        }
        for (uint32_t t = 0; t < leaf.tokens; t++) {
            uint32_t token = leaf.offset + t;
            if (!piece->listed || (has >> t & 1)) {
                add_token(x, d_k, d_v, piece, query, head, leaf.position + (int32_t)t,
                          x->pages[leaf.page + token / x->page_size], token % x->page_size);
            }
        }
    }
    for (uint32_t c = 0; c < d_v && piece->states; c++) {
        x->a[at * d_v + c] = (float)a[c];
    }
    if (piece->states) {
        x->l[at] = (float)*l;
        x->e[at] = *l > 0 ? 0 : INT32_MIN;
        return;
    }
    for (uint32_t c = 0; c < d_v && x->o != NULL && *l > 0; c++) {
        put(x->o, x->o_type, at * d_v + c, a[c] / *l);
    }
    if (x->lse != NULL) {
        x->lse[at] = (float)log(*l);
    }
}

/* A launch beside others of its attend goes on with what those added. */
static void
begin_launch(const cuda_args_t *x)
{
    if (!x->beside) {
        memset(sums, 0, sizeof(sums));
    }
}

static void
attend(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    (void)kernel;
    const cuda_args_t *x = args[0];
    uint32_t d_v         = x->head_dim_v;

    begin_launch(x);
    for (uint32_t team = 0; team < grid * x->teams; team++) {
        const cuda_piece_t *piece = &x->pieces[team];
        while (piece->kv_head != CUDA_NONE) {
            for (uint32_t row = 0; row < piece->rows; row++) {
                play_row(x, d_v, d_v, piece, row);
            }
            if (piece->next == CUDA_NONE) {
                break;
            }
            piece = &x->pieces[piece->next];
        }
    }
}

/* ---- prefill.cu ---- */

static void
prefill(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    (void)kernel;
    const cuda_args_t *x = args[0];

    begin_launch(x);
    for (uint32_t cta = 0; cta < grid; cta++) {
        uint32_t at = x->tiles[cta].kv_head == CUDA_NONE ? CUDA_NONE : cta;
        for (; at != CUDA_NONE; at = x->tiles[at].next) {
            const cuda_tile_t *tile = &x->tiles[at];
            cuda_piece_t piece      = {.kv_head     = tile->kv_head,
                                       .leaf_first  = tile->leaf_first,
                                       .n_leaves    = tile->n_leaves,
                                       .query_first = tile->query_first,
                                       .rows        = tile->rows,
                                       .states      = tile->states,
                                       .head_first  = tile->head_first,
                                       .n_heads     = tile->n_heads};
            for (uint32_t row = 0; row < tile->rows; row++) {
                play_row(x, x->head_dim_v, x->head_dim_v, &piece, row);
            }
        }
    }
}

/* What pieces added is written already. */
static void
merge(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    (void)kernel;
    (void)grid;
    (void)args;
}

const fake_kernel_t *
fake_kernel_find(const char *name)
{
    static const fake_kernel_t kernels[] = {
        {"move_rows", {sizeof(cuda_rows_t), sizeof(uint32_t)}, move_rows, NULL},
        {"bring_rows", {sizeof(cuda_bring_t)}, bring_rows, NULL},
        {"split_queries", {sizeof(cuda_split_t)}, split_queries, NULL},
        {"attend_8", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_16", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_32", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_64", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_8_listed", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_16_listed", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_32_listed", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_64_listed", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_8_general", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_16_general", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_32_general", {sizeof(cuda_args_t)}, attend, NULL},
        {"attend_64_general", {sizeof(cuda_args_t)}, attend, NULL},
        {"prefill_plain", {sizeof(cuda_args_t)}, prefill, NULL},
        {"prefill_general", {sizeof(cuda_args_t)}, prefill, NULL},
        {"prefill_parts", {sizeof(cuda_args_t)}, prefill, NULL},
        {"exchange_64", {sizeof(cuda_exchange_t)}, fake_exchange_play, fake_exchange_ready},
        {"ask_layer", {sizeof(cuda_ask_t)}, fake_ask_play, fake_ask_ready},
        {"take_layer", {sizeof(cuda_take_t)}, fake_take_play, fake_take_ready},
        {"answer_layer", {sizeof(cuda_give_t)}, fake_answer_play, NULL},
        {"merge_64", {sizeof(cuda_args_t)}, merge, NULL},
        {"merge_128", {sizeof(cuda_args_t)}, merge, NULL},
        {"merge_256", {sizeof(cuda_args_t)}, merge, NULL},
        {NULL, {0}, NULL, NULL},
    };
    const fake_kernel_t *kernel = kernels;

    _Static_assert(sizeof(cuda_args_t) <= FAKE_ARGS_MAX && sizeof(cuda_bring_t) <= FAKE_ARGS_MAX &&
                       sizeof(cuda_exchange_t) <= FAKE_ARGS_MAX &&
                       sizeof(cuda_take_t) <= FAKE_ARGS_MAX && sizeof(cuda_ask_t) <= FAKE_ARGS_MAX,
                   "arguments are kept with what is queued");
    while (kernel->name != NULL && strcmp(kernel->name, name) != 0) {
        kernel++;
    }
    return kernel;
}
