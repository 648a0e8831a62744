/*
 * producer.cuh: how leaves come to a team: the ring of stages in shared memory, and the two warps
 * that fill it, one with K and one with V in turns. Whole pages come by bulk copies where their
 * rows keep the order that a stage wants (pages of a multiple of 8 tokens, on devices that have
 * bulk copies), others in pieces of 16 bytes. The page numbers of the next two stages are on their
 * way while this one's copies are queued.
 *
 * The producer of K finds the team's next piece, while the last stages of this one are queued, and
 * tells all warps of the team (errands).
 *
 * A stage is a leaf, or, where there are lists, a bundle of blocks of one leaf or of several: of
 * these only what is listed is read.
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

/* ---- the ring of pieces ---- */

#define ERRANDS 2
#define ERRAND_TAKERS (CUDA_WARPS + 2) /* all warps of a team */

/* The pieces of a team behind its first one, as its warps get to know them: one behind the last is
 * for KV head CUDA_NONE. */
struct errands {
    uint32_t pieces, full, empty; /* shared addresses: [ERRANDS] each */
    uint32_t n;                   /* taken by this warp */

    /* By the producer of K: lanes 0 to 3 have the piece's quarters. What it did not take itself,
     * nobody did. */
    __device__ __forceinline__ void
    give(const uint4 &quarter, int lane) const
    {
        const uint32_t at = n % ERRANDS;

        barrier_wait(empty + 8 * at, n / ERRANDS % 2 ^ 1);
        if (lane < 4) {
            store_near(pieces + at * sizeof(cuda_piece_t) + 16 * lane, quarter);
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(full + 8 * at);
        }
    }

    __device__ __forceinline__ cuda_piece_t
    take(int lane)
    {
        const uint32_t at = n % ERRANDS, from = pieces + at * sizeof(cuda_piece_t);

        barrier_wait(full + 8 * at, n / ERRANDS % 2);
        uint4 a = load_near<uint4>(from), b = load_near<uint4>(from + 16),
              c = load_near<uint4>(from + 32), d = load_near<uint4>(from + 48);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(empty + 8 * at);
        }
        n++;
        return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x, d.y, d.z};
    }
};

/* What is behind a piece: asked for, fetched and given, one after the other, for each is an answer
 * of memory. */
struct finder {
    const cuda_args_t &x;
    cuda_queue_t queue;
    uint32_t index, step;
    uint4 quarter;

    __device__ __forceinline__
    finder(const cuda_args_t &args)
        : x(args), queue(*args.queue), index(CUDA_NONE), step(0), quarter{}
    {
    }

    __device__ __forceinline__ void
    ask(uint32_t next, int lane)
    {
        index = next;
        if (next == CUDA_NONE && queue.n > 0 && lane == 0) {
            index = atomicAdd(&x.queue->drawn, 1);
        }
    }

    __device__ __forceinline__ void
    fetch(uint32_t next, int lane)
    {
        if (next == CUDA_NONE && queue.n > 0) {
            if (lane == 0 && index == queue.n + queue.teams - 1) {
                x.queue->drawn = 0; /* nobody draws any more */
            }
            index = __shfl_sync(~0u, index, 0);
            index = index < queue.n ? queue.first + index : CUDA_NONE;
        }
        quarter = make_uint4(CUDA_NONE, CUDA_NONE, 0, 0);
        if (index != CUDA_NONE && lane < 4) {
            quarter = ((const uint4 *)&x.pieces[index])[lane];
        }
    }

    /* `rest` stages of a piece are still to be queued, this one included. */
    __device__ __forceinline__ void
    on(uint32_t next, uint32_t rest, const errands &to, int lane)
    {
        if (step == 0 && rest <= 5) {
            ask(next, lane);
            step = 1;
        }
        if (step == 1 && rest <= 4) {
            fetch(next, lane);
            step = 2;
        }
        if (step == 2 && rest <= 3) {
            uint32_t query = __shfl_sync(~0u, quarter.z, 2);
            if (index != CUDA_NONE) {
                fetch_ahead(x.queries + query);
            }
            to.give(quarter, lane);
            step = 3;
        }
    }
};

/* ---- what comes in a stage ---- */

/* A block of 16 tokens as cuda_listed_t has it. */
struct block {
    uint32_t page, present, offset, level;
    int position;
};

/* Block `i` of a leaf: in a piece without lists a bundle is a leaf. */
__device__ __forceinline__ block
block_of(const cuda_leaf_t &leaf, int i)
{
    const int first = CUDA_BLOCK * i, n = min(leaf.tokens - first, CUDA_BLOCK);

    return {leaf.page, n > 0 ? (1u << n) - 1 : 0, leaf.offset + (uint32_t)first,
            i == 0 ? leaf.level : 0, leaf.position + first};
}

/* Block `i` of a piece's stage. */
__device__ __forceinline__ block
block_at(const cuda_args_t &x, const cuda_piece_t &piece, uint32_t stage, int i)
{
    if (!piece.listed) {
        return block_of(x.leaves[piece.leaf_first + stage], i);
    }
    uint4 b = ((const uint4 *)x.blocks)[(uint64_t)(piece.leaf_first + stage) * CUDA_WARPS + i];
    return {b.x, b.z & 0xffff, b.z >> 16, b.w, (int)b.y};
}

__device__ __forceinline__ uint32_t
page_of(const cuda_args_t &x, uint32_t token)
{
    return x.page_shift != CUDA_NONE ? token >> x.page_shift : token / x.page_size;
}

/* Rows to a stage in pieces of 16 bytes: all lanes copy the same piece of several rows at a time.
 * Lane i knows row i: its address, in whose lowest bits there is room for how it is swizzled, and
 * 8 if it is to be copied. */
template <int D>
__device__ __forceinline__ void
copy_rows(uint32_t stage, uint32_t first, uint64_t from, int lane)
{
    constexpr uint32_t pieces = D / 8, rows = 32 / pieces; /* of a row; at once */
    const uint32_t c = lane % pieces, mine = lane / pieces;
    const uint32_t low = (uint32_t)from, high = (uint32_t)(from >> 32);

#pragma unroll 8
    for (uint32_t i = 0; i < 32; i += rows) {
        uint32_t row = i + mine, to = first + row;
        uint32_t of = __shfl_sync(~0u, low, row), over = __shfl_sync(~0u, high, row);
        if ((of & 8) != 0 && mine < rows) {
            copy_16(stage + to * (D * 2) + ((c ^ (to & 7)) << 4),
                    (const uint8_t *)((uint64_t)over << 32 | (of & ~15u)) + ((c ^ (of & 7)) << 4));
        }
    }
}

/* Stages that are leaves. */
template <int D, int STAGE> struct leaf_stages {
    using record = cuda_leaf_t;

    /* Where a leaf lies. Lane i has page numbers i and 32 + i. */
    struct place {
        uint32_t tokens, offset, low, high;
    };

    const cuda_args_t &x;
    int lane;

    __device__ __forceinline__ record
    at(const cuda_piece_t &piece, uint32_t i) const
    {
        return x.leaves[piece.leaf_first + i];
    }

    __device__ __forceinline__ place
    place_of(uint32_t first_page, uint32_t tokens, uint32_t offset) const
    {
        uint32_t n = page_of(x, offset + tokens - 1) + 1;
        return {tokens, offset, x.pages[first_page + min((uint32_t)lane, n - 1)],
                n > 32 ? x.pages[first_page + min((uint32_t)lane + 32, n - 1)] : 0};
    }

    __device__ __forceinline__ place
    place_of(const record &leaf) const
    {
        return place_of(leaf.page, leaf.tokens, leaf.offset);
    }

    __device__ __forceinline__ place
    first_of(const cuda_piece_t &piece) const
    {
        return place_of(piece.page, piece.tokens, piece.offset);
    }

    /* The leaf's rows to the stage, whole pages at a time. */
    __device__ __forceinline__ void
    bulk(const ring<STAGE> &r, const uint8_t *head, uint64_t stride, const place &leaf) const
    {
        constexpr uint32_t row = D * 2;
        uint32_t page = page_of(x, leaf.offset) + lane, first = page * x.page_size;
        uint32_t begin = max(first, leaf.offset),
                 end   = min(first + x.page_size, leaf.offset + leaf.tokens);
        uint32_t mine  = __shfl_sync(~0u, leaf.low, page & 31);
        uint32_t bar   = r.full + 8 * r.at;

        if (lane == 0) {
            barrier_expect(bar, leaf.tokens * row);
        }
        __syncwarp();
        if (begin < end) {
            copy_bulk(r.stage() + (begin - leaf.offset) * row,
                      head + mine * stride + (uint64_t)(begin - first) * row, (end - begin) * row,
                      bar);
        }
    }

    /* The same, for pages of any size. Lane i finds row i, and that of 32 + i. */
    __device__ __forceinline__ void
    gather(const ring<STAGE> &r, const uint8_t *head, uint64_t stride, const place &leaf) const
    {
        for (uint32_t half = 0; half < leaf.tokens; half += 32) {
            uint32_t at = half + lane, token = leaf.offset + min(at, leaf.tokens - 1);
            uint32_t page = page_of(x, token), within = token - page * x.page_size;
            uint32_t id   = __shfl_sync(~0u, leaf.low, page & 31);
            uint32_t more = __shfl_sync(~0u, leaf.high, page & 31);
            uint64_t from = (uint64_t)head + (page < 32 ? id : more) * stride + within * (D * 2);

            copy_rows<D>(r.stage(), half, from | (within & 7) | (at < leaf.tokens ? 8 : 0), lane);
        }
        copies_arrive(r.full + 8 * r.at);
    }
};

/* Stages that are bundles of blocks. */
template <int D, int STAGE> struct bundle_stages {
    using record = block;

    /* What of a stage a lane sees to: by bulk copies a block, or half of one if a page may end in
     * between; otherwise rows i and 32 + i. Their page, and the token in it, or CUDA_NONE. */
    struct place {
        uint32_t page[2], token[2];
    };

    const cuda_args_t &x;
    int lane;

    /* Tokens of a bulk copy. */
    __device__ __forceinline__ uint32_t
    unit() const
    {
        return x.page_size % CUDA_BLOCK == 0 ? CUDA_BLOCK : CUDA_BLOCK / 2;
    }

    /* The block that a lane knows: of bulk copies its own. */
    __device__ __forceinline__ int
    block_here() const
    {
        return (x.bulk ? lane * (int)unit() / CUDA_BLOCK : lane) % CUDA_WARPS;
    }

    __device__ __forceinline__ record
    at(const cuda_piece_t &piece, uint32_t i) const
    {
        return block_at(x, piece, i, block_here());
    }

    /* The page of a token that is `on` behind the first one of a block, if it is to come. */
    __device__ __forceinline__ void
    find(const block &b, uint32_t on, bool comes, uint32_t &page, uint32_t &token) const
    {
        uint32_t from = b.offset + on, in = page_of(x, from);

        page  = comes ? x.pages[b.page + in] : 0;
        token = comes ? from - in * x.page_size : CUDA_NONE;
    }

    __device__ __forceinline__ place
    place_of(const record &b) const
    {
        place p;

        if (x.bulk) {
            const uint32_t on = lane * unit() % CUDA_BLOCK, some = (1u << unit()) - 1;
            find(b, on, lane * unit() < LEAF && (b.present >> on & some) != 0, p.page[0],
                 p.token[0]);
            p.page[1] = p.token[1] = 0;
            return p;
        }
        for (int h = 0; h < 2; h++) {
            const int from = 2 * h + lane / CUDA_BLOCK, on = lane % CUDA_BLOCK;
            block of = {__shfl_sync(~0u, b.page, from), __shfl_sync(~0u, b.present, from),
                        __shfl_sync(~0u, b.offset, from), 0, 0};
            find(of, on, of.present >> on & 1, p.page[h], p.token[h]);
        }
        return p;
    }

    __device__ __forceinline__ place
    first_of(const cuda_piece_t &piece) const
    {
        if (piece.listed) {
            return place_of(at(piece, 0));
        }
        cuda_leaf_t leaf = {piece.page, 0, (uint16_t)piece.tokens, (uint16_t)piece.offset, 0};
        return place_of(block_of(leaf, block_here()));
    }

    __device__ __forceinline__ void
    bulk(const ring<STAGE> &r, const uint8_t *head, uint64_t stride, const place &p) const
    {
        const uint32_t bytes = unit() * (D * 2), bar = r.full + 8 * r.at;
        const bool comes   = p.token[0] != CUDA_NONE;
        const uint32_t all = __popc(__ballot_sync(~0u, comes)) * bytes;

        if (lane == 0) {
            barrier_expect(bar, all);
        }
        __syncwarp();
        if (comes) {
            copy_bulk(r.stage() + lane * bytes,
                      head + p.page[0] * stride + (uint64_t)p.token[0] * (D * 2), bytes, bar);
        }
    }

    __device__ __forceinline__ void
    gather(const ring<STAGE> &r, const uint8_t *head, uint64_t stride, const place &p) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool comes = p.token[h] != CUDA_NONE;
            uint64_t from    = (uint64_t)head + p.page[h] * stride + (uint64_t)p.token[h] * (D * 2);
            copy_rows<D>(r.stage(), 32 * h, comes ? from | (p.token[h] & 7) | 8 : 0, lane);
        }
        copies_arrive(r.full + 8 * r.at);
    }
};

template <bool LISTED, int D, int STAGE> struct stages_of {
    using type = leaf_stages<D, STAGE>;
};
template <int D, int STAGE> struct stages_of<true, D, STAGE> {
    using type = bundle_stages<D, STAGE>;
};

/* ---- producer ---- */

/* Of the K of leaves, or of the V: D is its head dim. */
template <int D, int STAGE, bool LISTED> struct producer {
    using stages_t = typename stages_of<LISTED, D, STAGE>::type;
    using place    = typename stages_t::place;

    const cuda_args_t &x;
    ring<STAGE> r;
    errands follow;
    finder finds;
    bool leads; /* it finds what is next */
    const uint8_t *pool;
    uint64_t stride; /* of its pages */
    stages_t stages;

    __device__
    producer(const cuda_args_t &args, const ring<STAGE> &on, const errands &pieces, bool of_v,
             int lane)
        : x(args), r(on), follow(pieces), finds(args), leads(!of_v), pool(of_v ? x.v : x.k),
          stride(of_v ? x.v_page_stride : x.k_page_stride), stages{args, lane}
    {
    }

    __device__ __forceinline__ void
    find(uint32_t next, uint32_t rest)
    {
        if (leads) {
            finds.on(next, rest, follow, stages.lane);
        }
    }

    __device__ __forceinline__ place
    begin_of(const cuda_piece_t &piece) const
    {
        return piece.n_leaves > 0 ? stages.first_of(piece) : place{};
    }

    /* All stages of a piece; where the first one lies is known. The piece becomes the next one,
     * and where that one's lies is returned. */
    __device__ __forceinline__ place
    run(cuda_piece_t &piece, place now)
    {
        const uint32_t n    = piece.n_leaves;
        const uint8_t *head = pool + (uint64_t)piece.kv_head * x.page_size * (D * 2);
        cuda_piece_t follows;

        finds.step = 0;
        if (n == 0) {
            find(piece.next, 0);
            piece = follow.take(stages.lane);
            return begin_of(piece);
        }
        typename stages_t::record first  = stages.at(piece, min(1u, n - 1)),
                                  second = stages.at(piece, min(2u, n - 1)),
                                  third  = stages.at(piece, min(3u, n - 1));
        place next, begins = {};
        for (uint32_t i = 0; i < n; i++) {
            barrier_wait(r.empty + 8 * r.at, r.phase ^ 1);
            if (x.bulk) {
                stages.bulk(r, head, stride, now);
            } else {
                stages.gather(r, head, stride, now);
            }
            r.next(); /* the other's */
            r.next();
            if (i == 0) { /* nothing is waited for before the first copies */
                next = stages.place_of(first);
            }
            now    = next;
            next   = stages.place_of(second);
            second = third;
            third  = stages.at(piece, min(i + 4, n - 1));
            find(piece.next, n - i);
            if (i + 2 == n || n == 1) {
                follows = follow.take(stages.lane);
                begins  = begin_of(follows);
            }
        }
        piece = follows;
        return begins;
    }

    __device__ void
    walk(const cuda_piece_t &first)
    {
        cuda_piece_t at = first;
        place begins    = begin_of(at);

        while (at.kv_head != CUDA_NONE) {
            begins = run(at, begins);
        }
        if (!x.bulk) {
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
    }
};

#endif
