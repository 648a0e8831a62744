/* places.cuh: where a row of K or V lies in its page, and what may not be stored there: for
 * store.cu and drive.cu. */
#ifndef ATTN_KERNELS_CUDA_PLACES_CUH
#define ATTN_KERNELS_CUDA_PLACES_CUH

#include <stdint.h>

/* Where piece c of the row at an offset in a page of a head lies. */
__device__ __forceinline__ uint4 *
piece_at(uint8_t *page, uint32_t page_size, uint32_t row_bytes, uint32_t offset, uint32_t head,
         uint32_t c)
{
    return (uint4 *)(page + ((uint64_t)head * page_size + offset) * row_bytes) + (c ^ (offset & 7));
}

/* Is one of two elements a NaN or an infinity? */
__device__ __forceinline__ bool
has_special(uint32_t word, uint32_t exponent)
{
    uint32_t bits = word & exponent;
    return (bits & 0xffffu) == (exponent & 0xffffu) || bits >> 16 == exponent >> 16;
}

#endif
