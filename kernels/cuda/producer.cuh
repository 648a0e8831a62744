/*
 * producer.cuh: how leaves come to a team: the ring of stages in shared memory, and the warp that
 * fills it. Whole pages come by bulk copies where their rows keep the order that the stage wants
 * (pages of a multiple of 8 tokens, on devices that have bulk copies), others in pieces of 16
 * bytes. The page numbers of the next leaf are on their way while this one's copies are queued.
 */
#ifndef ATTN_KERNELS_CUDA_PRODUCER_CUH
#define ATTN_KERNELS_CUDA_PRODUCER_CUH

#include "kernels/cuda/device.cuh"

#define LEAF CUDA_LEAF
#define BLOCKS (LEAF / 16)

/* Tokens of a stage: what fits, in whole blocks of 16. */
__host__ __device__ constexpr int
stage_tokens(int d)
{
    return CUDA_STAGE / (2 * d) >= LEAF ? LEAF : CUDA_STAGE / (2 * d) / 16 * 16;
}

/* ---- the ring ---- */

struct ring {
    uint32_t data, full, empty; /* shared addresses */
    uint32_t stages, at, phase;

    __device__ __forceinline__ void
    next()
    {
        if (++at == stages) {
            at = 0;
            phase ^= 1;
        }
    }
};

/* The tokens of leaf i of a piece that exist, and that its head's list has. */
__device__ __forceinline__ uint64_t
present_of(const cuda_args_t &x, const cuda_piece_t &piece, uint32_t i, uint32_t tokens)
{
    if (piece.present_at == CUDA_NONE) {
        return ~0ull >> (LEAF - tokens);
    }
    return x.present[piece.present_at + (uint64_t)i * piece.n_lists +
                     (piece.n_lists > 1 ? piece.kv_head : 0)];
}

/* ---- producer ---- */

template <int DK, int DV> struct producer {
    const cuda_args_t &x;
    ring r;
    int lane;

    __device__
    producer(const cuda_args_t &args, const ring &on, int l)
        : x(args), r(on), lane(l)
    {
    }

    __device__ __forceinline__ uint32_t
    page_of(uint32_t token) const
    {
        return x.page_shift != CUDA_NONE ? token >> x.page_shift : token / x.page_size;
    }

    /* Rows [first, first + n) of the leaf to a stage, whole pages at a time. */
    template <int D>
    __device__ __forceinline__ void
    bulk(const uint8_t *head, uint64_t stride, const cuda_leaf_t &leaf, uint64_t present,
         uint32_t id, uint32_t first, uint32_t n)
    {
        const uint32_t row = D * 2, from = leaf.offset + first;
        uint32_t page  = page_of(from) + lane;
        uint32_t begin = max(page * x.page_size, from),
                 end   = min((page + 1) * x.page_size, from + n);
        uint32_t bytes = 0;
        uint32_t mine  = __shfl_sync(~0u, id, page & 31);

        if (begin < end) {
            uint64_t part = present >> (begin - leaf.offset) << (64 - (end - begin));
            bytes         = part != 0 ? (end - begin) * row : 0;
        }
        uint32_t total = __reduce_add_sync(~0u, bytes);
        uint32_t bar   = r.full + 8 * r.at;
        if (lane == 0) {
            barrier_expect(bar, total);
        }
        __syncwarp();
        if (bytes > 0) {
            copy_bulk(r.data + r.at * CUDA_STAGE + (begin - from) * row,
                      head + mine * stride + (uint64_t)(begin - page * x.page_size) * row, bytes,
                      bar);
        }
    }

    /* The same in pieces of 16 bytes, for pages of any size; ALL: each row is present. */
    template <int D, bool SHIFT, bool ALL>
    __device__ __forceinline__ void
    gather_rows(const uint8_t *head, uint32_t stride, const cuda_leaf_t &leaf, uint64_t present,
                uint32_t low, uint32_t high, uint32_t first, uint32_t n)
    {
        constexpr uint32_t pieces = D / 8; /* of a row */
        const uint32_t base = r.data + r.at * CUDA_STAGE, total = n * pieces;

#pragma unroll 8
        for (uint32_t i = lane; i < (total + 31) / 32 * 32; i += 32) {
            uint32_t at = min(i, total - 1) / pieces, c = i % pieces;
            uint32_t token = leaf.offset + first + at;
            uint32_t page  = SHIFT ? token >> x.page_shift : token / x.page_size;
            uint32_t place = SHIFT ? token & (x.page_size - 1) : token - page * x.page_size;
            uint32_t id    = __shfl_sync(~0u, low, page & 31);
            if (leaf.tokens > 32) { /* pages beyond the first 32: only with small ones */
                uint32_t more = __shfl_sync(~0u, high, page & 31);
                id            = page < 32 ? id : more;
            }
            if (i < total && (ALL || (present >> (first + at) & 1))) {
                copy_16(base + at * (D * 2) + ((c ^ ((first + at) & 7)) << 4),
                        head + (uint64_t)id * stride + place * (D * 2) + ((c ^ (place & 7)) << 4));
            }
        }
    }

    template <int D>
    __device__ __forceinline__ void
    gather(const uint8_t *head, uint64_t stride, const cuda_leaf_t &leaf, uint64_t present,
           uint32_t low, uint32_t high, uint32_t first, uint32_t n)
    {
        if (present != ~0ull >> (LEAF - leaf.tokens)) {
            gather_rows<D, false, false>(head, stride, leaf, present, low, high, first, n);
        } else if (x.page_shift != CUDA_NONE) {
            gather_rows<D, true, true>(head, stride, leaf, present, low, high, first, n);
        } else {
            gather_rows<D, false, true>(head, stride, leaf, present, low, high, first, n);
        }
        copies_arrive(r.full + 8 * r.at);
    }

    template <int D>
    __device__ __forceinline__ void
    rows(const uint8_t *head, uint64_t stride, const cuda_leaf_t &leaf, uint64_t present,
         uint32_t low, uint32_t high)
    {
        constexpr uint32_t most = stage_tokens(D);
        for (uint32_t first = 0; first < leaf.tokens; first += most) {
            uint32_t n = min(most, leaf.tokens - first);
            barrier_wait(r.empty + 8 * r.at, r.phase ^ 1);
            if (x.bulk) {
                bulk<D>(head, stride, leaf, present, low, first, n);
            } else {
                gather<D>(head, stride, leaf, present, low, high, first, n);
            }
            r.next();
        }
    }

    __device__ __forceinline__ void
    ids_of(const cuda_leaf_t &leaf, uint32_t &low, uint32_t &high) const
    {
        uint32_t n = page_of(leaf.offset + leaf.tokens - 1) + 1;
        low        = x.pages[leaf.page + min((uint32_t)lane, n - 1)];
        high       = n > 32 ? x.pages[leaf.page + min((uint32_t)lane + 32, n - 1)] : 0;
    }

    __device__ void
    run(const cuda_piece_t &piece)
    {
        if (piece.n_leaves == 0) {
            return;
        }
        const cuda_leaf_t *leaves = x.leaves + piece.leaf_first;
        const uint8_t *k          = x.k + (uint64_t)piece.kv_head * x.page_size * (DK * 2);
        const uint8_t *v          = x.v + (uint64_t)piece.kv_head * x.page_size * (DV * 2);
        cuda_leaf_t leaf          = {}, next;
        uint32_t low, high;

        leaf.page   = piece.page;
        leaf.tokens = (uint16_t)piece.tokens;
        leaf.offset = (uint16_t)piece.offset;
        ids_of(leaf, low, high);
        next = leaves[min(1u, piece.n_leaves - 1)];
        for (uint32_t i = 0; i < piece.n_leaves; i++) {
            cuda_leaf_t after = leaves[min(i + 2, piece.n_leaves - 1)];
            uint32_t next_low = 0, next_high = 0;
            if (i + 1 < piece.n_leaves) {
                ids_of(next, next_low, next_high);
            }
            uint64_t present = present_of(x, piece, i, leaf.tokens);
            if (present != 0) {
                rows<DK>(k, x.k_page_stride, leaf, present, low, high);
                rows<DV>(v, x.v_page_stride, leaf, present, low, high);
            }
            leaf = next;
            next = after;
            low  = next_low;
            high = next_high;
        }
    }
};

#endif
