/*
 * store.cu: rows of K and V into pages and back, in the order in which attend.cu reads them: the
 * 16-byte pieces of each 128 bytes of a row permuted by xor with the row's place in its page.
 * A thread moves one piece of 16 bytes.
 */
#include "kernels/cuda/places.cuh"
#include "kernels/cuda/store.h"

#include <stdint.h>

__device__ __forceinline__ uint4 *
place(const cuda_rows_t &x, uint32_t page, uint32_t offset, uint32_t head, uint32_t c)
{
    return piece_at(x.store + page * x.page_stride, x.page_size, x.row_bytes, offset, head, c);
}

/* mode: 0 stores rows, 1 reads them back, 2 compares and notes a difference. */
extern "C" __global__ void
move_rows(const __grid_constant__ cuda_rows_t x, uint32_t mode)
{
    uint32_t pieces = x.row_bytes / 16;
    uint64_t i      = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i >= x.n * x.kv_heads * pieces) {
        return;
    }
    uint32_t c = i % pieces, head = i / pieces % x.kv_heads;
    uint64_t row = i / pieces / x.kv_heads;
    uint4 *at    = place(x, x.pages[row], x.offsets[row], head, c);

    if (mode == 0) {
        *at = x.rows[i];
    } else if (mode == 1) {
        x.rows[i] = *at;
    } else {
        uint4 a = *at, b = x.rows[i];
        if (a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w) {
            *x.note = 1;
        }
    }
}

/* Piece i of all that a step brings for a layer: K's and V's of a head side by side. Stored, or,
 * again, compared; returns what is wrong with it. */
__device__ __forceinline__ uint32_t
bring_piece(const cuda_bring_t &x, uint64_t i, bool again)
{
    uint32_t of_k = x.k_row_bytes / 16, both = of_k + x.v_row_bytes / 16, c = i % both;
    uint32_t head = i / both % x.kv_heads;
    uint64_t row  = i / both / x.kv_heads;
    uint32_t page = x.pages[row], offset = x.offsets[row];
    const uint4 *from;
    uint4 *at;

    if (c < of_k) {
        from = (const uint4 *)(x.k + row * x.k_row_stride + head * x.k_head_stride) + c;
        at = piece_at(x.k_store + page * x.k_page_stride, x.page_size, x.k_row_bytes, offset, head,
                      c);
    } else {
        c -= of_k;
        from = (const uint4 *)(x.v + row * x.v_row_stride + head * x.v_head_stride) + c;
        at = piece_at(x.v_store + page * x.v_page_stride, x.page_size, x.v_row_bytes, offset, head,
                      c);
    }
    uint4 a = *from;
    if (again) { /* a NaN differs, too: what is stored stays, and stays stored */
        uint4 b = *at;
        return a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w ? CUDA_DIFFERS : 0;
    }
    if (has_special(a.x, x.exponent) || has_special(a.y, x.exponent) ||
        has_special(a.z, x.exponent) || has_special(a.w, x.exponent)) {
        return CUDA_NOT_FINITE;
    }
    *at = a;
    return 0;
}

/*
 * The first kernel of a layer of a step on a caller's stream. A layer counts as stored when the
 * last CTA ends: until then every CTA of a launch sees that it was not, or, launched again in the
 * same step, that it was.
 */
extern "C" __global__ void
bring_rows(const __grid_constant__ cuda_bring_t x)
{
    const unsigned long long serial = x.head->serial;
    uint32_t trouble                = 0;

    if (serial == 0) {
        return;
    }
    const bool again = x.mark->stored == serial;
    if (x.k == nullptr) {
        trouble = again ? 0 : CUDA_NOT_STORED;
    } else {
        const uint64_t all = x.head->n_rows * x.kv_heads * ((x.k_row_bytes + x.v_row_bytes) / 16);
        for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all;
             i += (uint64_t)gridDim.x * blockDim.x) {
            trouble |= bring_piece(x, i, again);
        }
    }
    if (trouble != 0) {
        atomicOr(&x.mark->trouble, trouble);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&x.mark->ended, 1u) == gridDim.x - 1) {
        x.mark->ended = 0;
        if (x.k != nullptr) {
            x.mark->stored = serial;
        }
    }
}

/* One row after the other from place to place: a CTA moves all moves for its pieces, in order. */
extern "C" __global__ void
move_places(const __grid_constant__ cuda_rows_t x, const uint32_t *moves)
{
    uint32_t pieces = x.row_bytes / 16, i = blockIdx.x * blockDim.x + threadIdx.x;

    if (i >= x.kv_heads * pieces) {
        return;
    }
    for (uint64_t m = 0; m < x.n; m++) {
        const uint32_t *p = moves + 4 * m;
        *place(x, p[2], p[3], i / pieces, i % pieces) =
            *place(x, p[0], p[1], i / pieces, i % pieces);
    }
}

/* Queries of one type as sums of `parts` values of another, exactly as far as they go: rows of
 * `d`, each divided by a power of two that the scale of the row gives back. */
extern "C" __global__ void
split_queries(const __grid_constant__ cuda_split_t x)
{
    const uint64_t row  = blockIdx.x;
    const uint64_t from = row / x.heads * x.from_row_stride + row % x.heads * x.from_head_stride;
    float most          = 0;
    __shared__ float shared_most[8];

    for (uint32_t i = threadIdx.x; i < x.d; i += blockDim.x) {
        float v = cuda_read(x.from, x.from_type, from + i);
        most    = fmaxf(most, fabsf(v) < INFINITY ? fabsf(v) : 0.0f);
    }
    for (int o = 16; o > 0; o >>= 1) {
        most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    }
    if (threadIdx.x % 32 == 0) {
        shared_most[threadIdx.x / 32] = most;
    }
    __syncthreads();
    for (uint32_t i = 0; i < blockDim.x / 32; i++) {
        most = fmaxf(most, shared_most[i]);
    }
    /* f16 has 5 bits of exponent: the largest comes to lie below 2^15. bf16 has f32's. */
    int shift = 0;
    if (x.to_type == 2 && most > 0) {
        shift = 14 - ilogbf(most);
        shift = min(max(shift, -126), 126);
    }
    for (uint32_t i = threadIdx.x; i < x.d; i += blockDim.x) {
        float v = ldexpf(cuda_read(x.from, x.from_type, from + i), shift);
        for (uint32_t p = 0; p < x.parts; p++) {
            float part = cuda_write(x.to, x.to_type, p * x.part_stride + row * x.d + i, v);
            v          = fabsf(v) < INFINITY ? v - part : 0.0f;
        }
    }
    if (threadIdx.x == 0 && x.scale != nullptr) {
        x.scale[row] = ldexpf(1.0f, -shift);
    }
}
