/* Masks over the new tokens of an entry: kernels.h has the layout and the meaning. */
#include "kernels/kernels.h"

#include "base/status.h"

uint32_t
attn_mask_count(const uint8_t *row, uint32_t n_new)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < attn_mask_row_bytes(n_new); i++) {
        n += (uint32_t)__builtin_popcount(row[i]);
    }
    return n;
}

attn_status_t
attn_mask_check(const uint8_t *mask, uint32_t n_q, uint32_t n_new)
{
    uint64_t row_bytes = attn_mask_row_bytes(n_new);

    if (n_new > ATTN_MASK_TOKENS_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "n_new is %u: at most %u with a mask", n_new,
                         ATTN_MASK_TOKENS_MAX);
    }
    if (n_q == 0 || n_q > n_new) {
        return attn_fail(ATTN_ERR_INVALID, "n_q is %u: 1 to n_new, %u, with a mask", n_q, n_new);
    }
    for (uint32_t i = 0; i < n_q; i++) {
        const uint8_t *row = mask + i * row_bytes;
        if (n_new % 8 != 0 && row[row_bytes - 1] >> n_new % 8 != 0) {
            return attn_fail(ATTN_ERR_INVALID,
                             "mask: row %u has a bit set beyond its %u new tokens", i, n_new);
        }
        if (attn_mask_count(row, n_new) == 0) {
            return attn_fail(ATTN_ERR_INVALID,
                             "mask: row %u names none of the %u new tokens: a query stands at the "
                             "last token that it names",
                             i, n_new);
        }
    }
    return ATTN_OK;
}
