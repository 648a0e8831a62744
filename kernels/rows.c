/* Rows of k and v on their way into pages: what is wrong with them, in a sentence. */
#include "kernels/rows.h"

#include "base/status.h"

/* Is any of n elements a NaN or infinite: its exponent all ones? */
static bool
any_not_finite(const void *data, attn_dtype_t dtype, uint64_t n)
{
    uint32_t bad = 0;

    if (dtype == ATTN_F32) {
        const uint32_t *x = data;
        for (uint64_t i = 0; i < n; i++) {
            bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
        }
    } else {
        const uint16_t *x       = data;
        const uint16_t exponent = dtype == ATTN_F16 ? 0x7c00u : 0x7f80u;
        for (uint64_t i = 0; i < n; i++) {
            bad |= (x[i] & exponent) == exponent;
        }
    }
    return bad != 0;
}

static attn_status_t
check_tensor(const attn_kv_t *kv, const char *name, const void *data, uint64_t n, uint32_t d)
{
    uint64_t row = (uint64_t)kv->kv_heads * d;
    size_t bytes = row * attn_dtype_size(kv->dtype);

    for (uint64_t i = 0; i < n; i++) {
        if (any_not_finite((const uint8_t *)data + i * bytes, kv->dtype, row)) {
            return attn_fail(ATTN_ERR_NUMERIC, "%s of new token %llu holds a NaN or an infinity",
                             name, (unsigned long long)i);
        }
    }
    return ATTN_OK;
}

attn_status_t
attn_rows_check_finite(const attn_kv_t *kv, const void *k, const void *v, uint64_t n)
{
    attn_status_t status = check_tensor(kv, "k", k, n, kv->head_dim_k);
    return status == ATTN_OK ? check_tensor(kv, "v", v, n, kv->head_dim_v) : status;
}

attn_status_t
attn_rows_check_places(const attn_kv_t *kv, const uint32_t *pages, const uint32_t *offsets,
                       uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        if (pages[i] >= kv->n_pages || offsets[i] >= kv->page_size) {
            return attn_fail(
                ATTN_ERR_INVALID,
                "new token %llu goes to page %u, offset %u: the cache has %llu pages of %u",
                (unsigned long long)i, pages[i], offsets[i], (unsigned long long)kv->n_pages,
                kv->page_size);
        }
    }
    return ATTN_OK;
}

attn_status_t
attn_rows_check_moves(const attn_kv_t *kv, const attn_move_t *moves, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        const attn_move_t *m = &moves[i];
        if (m->from_page >= kv->n_pages || m->to_page >= kv->n_pages ||
            m->from_offset >= kv->page_size || m->to_offset >= kv->page_size) {
            return attn_fail(ATTN_ERR_INVALID,
                             "move %llu from page %u, offset %u to page %u, offset %u: the cache "
                             "has %llu pages of %u",
                             (unsigned long long)i, m->from_page, m->from_offset, m->to_page,
                             m->to_offset, (unsigned long long)kv->n_pages, kv->page_size);
        }
    }
    return ATTN_OK;
}

attn_status_t
attn_rows_check_page(const attn_kv_t *kv, uint32_t from, uint32_t to, uint32_t tokens)
{
    if (from >= kv->n_pages || to >= kv->n_pages || tokens > kv->page_size) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%u tokens of page %u to page %u: the cache has %llu pages of %u", tokens,
                         from, to, (unsigned long long)kv->n_pages, kv->page_size);
    }
    return ATTN_OK;
}
