/*
 * tile.h: where things lie in a tile of the prefill kernel, in shared memory, and how the matrix
 * unit of sm_90 is told. Shared by CUDA and C: the tests check it on the host.
 *
 * A tile is some rows (tokens of K or V, or rows of Q) of 64 x n elements of 16 bits. Blocks of 8
 * rows follow each other; in a block, the n parts of 128 bytes of these rows, 1,024 bytes a part;
 * in a part, row after row, the 16-byte pieces permuted by xor with the row's place. That is the
 * layout "128-byte swizzle" of the matrix unit, for operands whose rows are its rows (K, Q) and
 * for those whose rows run along the sum (V), and store.cu's order inside each 128 bytes, so that
 * pages come as they are.
 */
#ifndef ATTN_KERNELS_CUDA_TILE_H
#define ATTN_KERNELS_CUDA_TILE_H

#include <stdint.h>

#ifdef __CUDACC__
#define TILE_FUNCTION __host__ __device__ __forceinline__
#else
#define TILE_FUNCTION static inline
#endif

#define TILE_ROWS 8u       /* of a block */
#define TILE_PART 1024u    /* bytes of a block's part */
#define TILE_PART_ROW 128u /* bytes of a row in it: 64 elements */

/** Byte offset of 16-byte piece `c` of row `row`; `parts` is the row's elements / 64. */
TILE_FUNCTION uint32_t
tile_piece(uint32_t parts, uint32_t row, uint32_t c)
{
    return (row / TILE_ROWS * parts + c / 8) * TILE_PART + row % TILE_ROWS * TILE_PART_ROW +
           ((c ^ row) & 7) * 16;
}

/*
 * A descriptor: address in units of 16 bytes (bits 0 to 13), leading and stride offsets likewise
 * (16 to 29, 32 to 45), and the swizzle of 128 bytes (1 in bits 62 and 63).
 */
TILE_FUNCTION uint64_t
tile_descriptor(uint32_t at, uint32_t leading, uint32_t stride)
{
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | UINT64_C(1) << 62;
}

/**
 * The operand that begins at `at` and whose rows are the matrix's rows: 16 elements of each, the
 * k-th 16. Blocks of 8 rows are a stride apart.
 */
TILE_FUNCTION uint64_t
tile_rows_descriptor(uint32_t at, uint32_t parts, uint32_t k)
{
    return tile_descriptor(at + k / 4 * TILE_PART + k % 4 * 32, 16, parts * TILE_PART);
}

/** The same operand's k-th 16 elements, from the descriptor of the first: one addition of 32 bits.
 */
TILE_FUNCTION uint64_t
tile_rows_further(uint64_t first, uint32_t k)
{
    return (first & ~UINT64_C(0xffffffff)) |
           ((uint32_t)first + (k / 4 * TILE_PART + k % 4 * 32) / 16);
}

/**
 * The operand whose rows run along the sum: all elements of 16 rows, the k-th 16. Parts of 64
 * elements are a leading offset apart, the two blocks of 8 rows a stride.
 */
TILE_FUNCTION uint64_t
tile_sum_descriptor(uint32_t at, uint32_t parts, uint32_t k)
{
    return tile_descriptor(at + k * 2 * parts * TILE_PART, TILE_PART, parts * TILE_PART);
}

/** The same operand's k-th 16 rows, from the descriptor of the first. */
TILE_FUNCTION uint64_t
tile_sum_further(uint64_t first, uint32_t parts, uint32_t k)
{
    return (first & ~UINT64_C(0xffffffff)) | ((uint32_t)first + k * 2 * parts * TILE_PART / 16);
}

#endif
