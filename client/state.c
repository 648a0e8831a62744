/* state.c: the public operations on attention states, row by row over kernels/. */
#include "client/attn.h"
#include "kernels/kernels.h"

void
attn_state_merge(attn_state_t into, attn_state_t from, uint64_t rows, uint32_t d)
{
    for (uint64_t r = 0; r < rows; r++) {
        attn_state_merge_row(into.a + r * d, into.l + r, into.e + r, from.a + r * d, from.l[r],
                             from.e[r], d);
    }
}

void
attn_state_finish(attn_state_t state, uint64_t rows, uint32_t d, float *o, float *lse)
{
    for (uint64_t r = 0; r < rows; r++) {
        attn_state_finish_row(state.a + r * d, state.l[r], state.e[r], d, NULL, o + r * d,
                              lse != NULL ? lse + r : NULL);
    }
}

void
attn_state_from_o_lse(const float *o, const float *lse, uint64_t rows, uint32_t d,
                      attn_state_t state)
{
    for (uint64_t r = 0; r < rows; r++) {
        attn_state_from_row(o + r * d, lse[r], d, state.a + r * d, state.l + r, state.e + r);
    }
}
