/*
 * producer.cuh: how leaves come to a team: the ring of stages in shared memory, and the two warps
 * that fill it, one with K and one with V in turns. Whole pages come by bulk copies where their
 * rows keep the order that a stage wants (pages of a multiple of 8 tokens, on devices that have
 * bulk copies), others in pieces of 16 bytes. The page numbers of the next two leaves are on their
 * way while this one's copies are queued, and so is the next piece.
 */
#ifndef ATTN_KERNELS_CUDA_PRODUCER_CUH
#define ATTN_KERNELS_CUDA_PRODUCER_CUH

#include "kernels/cuda/device.cuh"

#define LEAF CUDA_LEAF
#define BLOCKS (LEAF / 16)

/* ---- the ring: K of a leaf, V of it, K of the next ... ---- */

template <int STAGE> struct ring {
    uint32_t data, full, empty; /* shared addresses */
    uint32_t stages, at, phase;

    __device__ __forceinline__ void
    next()
    {
        at++;
        if (at == stages) {
            at = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ uint32_t
    stage() const
    {
        return data + at * STAGE;
    }

    __device__ __forceinline__ void
    await_full() const
    {
        barrier_wait(full + 8 * at, phase);
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

/* Where a leaf lies. Lane i has page numbers i and 32 + i. */
struct place {
    uint32_t tokens, offset, low, high;
};

/* Of the K of leaves, or of the V: D is its head dim. */
template <int D, int STAGE> struct producer {
    const cuda_args_t &x;
    ring<STAGE> r;
    const uint8_t *pool;
    uint64_t stride; /* of its pages */
    int lane;

    __device__
    producer(const cuda_args_t &args, const ring<STAGE> &on, const uint8_t *of, uint64_t pages_by,
             int l)
        : x(args), r(on), pool(of), stride(pages_by), lane(l)
    {
    }

    __device__ __forceinline__ uint32_t
    page_of(uint32_t token) const
    {
        return x.page_shift != CUDA_NONE ? token >> x.page_shift : token / x.page_size;
    }

    /* The leaf's rows to the stage, whole pages at a time. */
    __device__ __forceinline__ void
    bulk(const uint8_t *head, const place &leaf, uint64_t present)
    {
        constexpr uint32_t row = D * 2;
        uint32_t page = page_of(leaf.offset) + lane, first = page * x.page_size;
        uint32_t begin = max(first, leaf.offset),
                 end   = min(first + x.page_size, leaf.offset + leaf.tokens);
        uint32_t bytes = 0;
        uint32_t mine  = __shfl_sync(~0u, leaf.low, page & 31);

        if (begin < end) {
            uint64_t part = present >> (begin - leaf.offset) << (64 - (end - begin));
            bytes         = part != 0 ? (end - begin) * row : 0;
        }
        uint32_t total = present == ~0ull >> (LEAF - leaf.tokens) ? leaf.tokens * row
                                                                  : __reduce_add_sync(~0u, bytes);
        uint32_t bar   = r.full + 8 * r.at;
        if (lane == 0) {
            barrier_expect(bar, total);
        }
        __syncwarp();
        if (bytes > 0) {
            copy_bulk(r.stage() + (begin - leaf.offset) * row,
                      head + mine * stride + (uint64_t)(begin - first) * row, bytes, bar);
        }
    }

    /* The same in pieces of 16 bytes, for pages of any size. Lane i finds row i, and that of 32 +
     * i; to copy, a lane has the same piece of every row. */
    __device__ __forceinline__ void
    gather(const uint8_t *head, const place &leaf, uint64_t present)
    {
        constexpr uint32_t pieces = D / 8, rows = 32 / pieces; /* of a row; at once */
        const uint32_t c = lane % pieces, mine = lane / pieces;

        for (uint32_t half = 0; half < leaf.tokens; half += 32) {
            uint32_t at = half + lane, token = leaf.offset + min(at, leaf.tokens - 1);
            uint32_t page = page_of(token), within = token - page * x.page_size;
            uint32_t id   = __shfl_sync(~0u, leaf.low, page & 31);
            uint32_t more = __shfl_sync(~0u, leaf.high, page & 31);
            uint64_t from = (uint64_t)head + (page < 32 ? id : more) * stride + within * (D * 2);
            uint32_t low = (uint32_t)from, high = (uint32_t)(from >> 32);

            /* Rows begin at multiples of 16: there is room for how this one is swizzled, and
             * whether it is to be copied. */
            low |= (within & 7) | (at < leaf.tokens && (present >> at & 1) ? 8 : 0);
#pragma unroll 8
            for (uint32_t i = 0; i < 32; i += rows) {
                uint32_t row = i + mine, to = half + row;
                uint32_t of = __shfl_sync(~0u, low, row), over = __shfl_sync(~0u, high, row);
                if ((of & 8) != 0 && mine < rows) {
                    copy_16(r.stage() + to * (D * 2) + ((c ^ (to & 7)) << 4),
                            (const uint8_t *)((uint64_t)over << 32 | (of & ~15u)) +
                                ((c ^ (of & 7)) << 4));
                }
            }
        }
        copies_arrive(r.full + 8 * r.at);
    }

    __device__ __forceinline__ place
    place_of(uint32_t first_page, uint32_t tokens, uint32_t offset) const
    {
        uint32_t n = page_of(offset + tokens - 1) + 1;
        return {tokens, offset, x.pages[first_page + min((uint32_t)lane, n - 1)],
                n > 32 ? x.pages[first_page + min((uint32_t)lane + 32, n - 1)] : 0};
    }

    __device__ __forceinline__ place
    place_of(const cuda_leaf_t &leaf) const
    {
        return place_of(leaf.page, leaf.tokens, leaf.offset);
    }

    __device__ __forceinline__ place
    begin_of(const cuda_piece_t &piece) const
    {
        return piece.n_leaves > 0 ? place_of(piece.page, piece.tokens, piece.offset) : place{};
    }

    /* All leaves of a piece; where the first one lies is known. Returns the next piece's. */
    __device__ __forceinline__ place
    run(const cuda_piece_t &piece, place now, const cuda_piece_t &follows)
    {
        const uint32_t n          = piece.n_leaves;
        const cuda_leaf_t *leaves = x.leaves + piece.leaf_first;
        const uint8_t *head       = pool + (uint64_t)piece.kv_head * x.page_size * (D * 2);

        if (n == 0) {
            return begin_of(follows);
        }
        cuda_leaf_t second = leaves[min(2u, n - 1)], third = leaves[min(3u, n - 1)];
        place next = place_of(leaves[min(1u, n - 1)]), begins = {};
        for (uint32_t i = 0; i < n; i++) {
            place after = place_of(second);
            second      = third;
            third       = leaves[min(i + 4, n - 1)];
            if (i + 2 == n || n == 1) {
                begins = begin_of(follows);
            }
            uint64_t present = present_of(x, piece, i, now.tokens);
            if (present != 0) {
                barrier_wait(r.empty + 8 * r.at, r.phase ^ 1);
                if (x.bulk) {
                    bulk(head, now, present);
                } else {
                    gather(head, now, present);
                }
                r.next(); /* the other's */
                r.next();
            }
            now  = next;
            next = after;
        }
        return begins;
    }

    __device__ void
    walk(const cuda_piece_t &first)
    {
        cuda_piece_t at = first;
        place begins    = begin_of(at);

        for (;;) {
            bool last         = at.next == CUDA_NONE;
            cuda_piece_t next = x.pieces[last ? 0 : at.next];
            next.n_leaves     = last ? 0 : next.n_leaves;
            begins            = run(at, begins, next);
            if (last) {
                break;
            }
            at = next;
        }
        if (!x.bulk) {
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
    }
};

#endif
