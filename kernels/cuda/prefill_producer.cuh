/*
 * prefill_producer.cuh: how Q, K and V come into shared memory for prefill.cu (tile.h says where in
 * a tile everything lies).
 *
 * A warp brings K and V: where pages are of whole blocks of 8 tokens, by the copy engine, a box of
 * tokens of one page after the other, a lane a box. For other pages three warps fetch rows in
 * pieces of 16 bytes. A warp brings the rows of Q. Warps run ahead of the consumers, into the next
 * works, as far as the rings let them.
 *
 * Every row of a tile of V is either copied or zeroed, for 0 * NaN is NaN. A row of K that is not
 * copied may hold anything: its logits are masked.
 */
#ifndef ATTN_KERNELS_CUDA_PREFILL_PRODUCER_CUH
#define ATTN_KERNELS_CUDA_PREFILL_PRODUCER_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/tile.h"

#define GATHER_WARPS 3 /* that fetch pieces of 16 bytes, 4 rows at once each */
#define GATHER_STEP (4u * GATHER_WARPS)

/* ---- rings ---- */

template <int STAGES, int BYTES> struct tile_ring {
    uint32_t data, bars; /* shared addresses: stages; barriers, of the full and of the empty */
    uint32_t at, phase;

    __device__ __forceinline__ uint32_t
    stage() const
    {
        return data + at * BYTES;
    }

    __device__ __forceinline__ uint32_t
    full(uint32_t i) const
    {
        return bars + 8 * i;
    }

    __device__ __forceinline__ uint32_t
    empty(uint32_t i) const
    {
        return bars + 8 * STAGES + 8 * i;
    }

    __device__ __forceinline__ void
    wait_full() const
    {
        barrier_wait(full(at), phase);
    }

    __device__ __forceinline__ void
    wait_empty() const
    {
        barrier_wait(empty(at), phase ^ 1);
    }

    __device__ __forceinline__ void
    next()
    {
        if (++at == STAGES) {
            at = 0;
            phase ^= 1;
        }
    }
};

/* ---- the tiles of a leaf ---- */

/* Bits [from, to) of 64, as far as they are among them. */
__device__ __forceinline__ uint64_t
bits_between(int from, int to)
{
    from = max(from, 0);
    to   = min(to, 64);
    return from >= to ? 0 : ~0ull >> (64 - (to - from)) << from;
}

/* A set of the columns of a tile. Words are named, not numbered: they are to be in registers. */
template <int N> struct columns {
    uint64_t low, high; /* of N = 64 the latter is 0 */

    static __device__ __forceinline__ columns
    between(int from, int to)
    {
        return {bits_between(from, to), N > 64 ? bits_between(from - 64, to - 64) : 0};
    }

    __device__ __forceinline__ columns
    both(const columns &other) const
    {
        return {low & other.low, N > 64 ? high & other.high : 0};
    }

    __device__ __forceinline__ bool
    any() const
    {
        return N > 64 ? (low | high) != 0 : low != 0;
    }

    __device__ __forceinline__ uint64_t
    word_of(uint32_t column) const
    {
        return N > 64 && column >= 64 ? high : low;
    }

    __device__ __forceinline__ bool
    has(uint32_t column) const
    {
        return word_of(column) >> (column % 64) & 1;
    }

    __device__ __forceinline__ void
    add(uint32_t column)
    {
        uint64_t bit = 1ull << (column % 64);
        low |= N > 64 && column >= 64 ? 0 : bit;
        high |= N > 64 && column >= 64 ? bit : 0;
    }

    __device__ __forceinline__ int
    count() const
    {
        return __popcll(low) + (N > 64 ? __popcll(high) : 0);
    }
};

/* Goes over the tiles of a leaf that some row of the work can see, ascending. Producers and
 * consumers take the same way. */
template <int N, bool GENERAL> struct tile_walk {
    const cuda_args_t &x;
    const cuda_tile_t *work; /* read again when needed: registers are few */
    cuda_leaf_t leaf;
    uint32_t leaf_at; /* its number in the work */
    uint32_t at, end; /* in N tokens */

    /* Of the tile: */
    uint32_t first, tokens; /* in the leaf; those that exist */
    int position;           /* of its first token */
    columns<N> here;        /* GENERAL: those of them that the head's list has */

    __device__ __forceinline__
    tile_walk(const cuda_args_t &args)
        : x(args)
    {
    }

    /* To a work's first leaf; if it has none, to the end. */
    __device__ __forceinline__ void
    begin(const cuda_tile_t *of)
    {
        work = of;
        begin(of->leaf, 0);
    }

    /* To the next leaf of the work, of which there is one. */
    __device__ __forceinline__ void
    go_on()
    {
        begin(x.leaves[work->leaf_first + leaf_at + 1], leaf_at + 1);
    }

    __device__ __forceinline__ void
    begin(const cuda_leaf_t &of, uint32_t number)
    {
        leaf     = of;
        leaf_at  = number;
        int from = max(work->see_first - leaf.position, 0);
        int to   = min(work->see_end - leaf.position, (int)leaf.tokens);
        at       = (uint32_t)from / N;
        end      = to > 0 ? ((uint32_t)to + N - 1) / N : 0;
    }

    __device__ __forceinline__ void
    stop()
    {
        at = end = 0;
    }

    /* The next tile that has a token; false at the end. */
    __device__ __forceinline__ bool
    next()
    {
        while (at < end) {
            first    = at * N;
            tokens   = min((uint32_t)N, leaf.tokens - first);
            position = leaf.position + (int)first;
            at++;
            if (!GENERAL) {
                return true;
            }
            here = columns<N>::between(0, (int)tokens);
            if (work->present_at != CUDA_NONE) {
                here.low &= listed(0);
                if (N > 64 && tokens > 64) {
                    here.high &= listed(1);
                }
            }
            if (here.any()) {
                return true;
            }
        }
        return false;
    }

    /* What the head's list has of the tile's i-th 64 tokens. */
    __device__ __forceinline__ uint64_t
    listed(uint32_t i) const
    {
        uint64_t set = (uint64_t)leaf_at * x.leaf_sets + first / 64 + i;
        return x.present[work->present_at + set * work->n_lists +
                         (work->n_lists > 1 ? work->kv_head : 0)];
    }

    __device__ __forceinline__ bool
    has(uint32_t token) const
    {
        return GENERAL ? here.has(token) : token < tokens;
    }

    /* How many of n tokens (a divisor of 64) from `token` on there are. */
    __device__ __forceinline__ uint32_t
    count(uint32_t token, uint32_t n) const
    {
        if (!GENERAL) {
            return token >= tokens ? 0 : min(n, tokens - token);
        }
        return __popcll(here.word_of(token) >> (token % 64) & (~0ull >> (64 - n)));
    }
};

/* ---- K and V ---- */

/* Where a row lies. */
struct spot {
    uint32_t id, place; /* of its page; in it, or CUDA_NONE: there is no such row */
};

template <int DK, int DV, bool GENERAL> struct kv_producer {
    static constexpr int N      = CUDA_MANY_TOKENS(DV);
    static constexpr int STAGES = CUDA_MANY_STAGES(DK, DV);
    using k_ring                = tile_ring<STAGES, N * DK * 2>;
    using v_ring                = tile_ring<STAGES, N * DV * 2>;
    using walk_t                = tile_walk<N, GENERAL>;

    /* Rows of a tile are looked up before those of the tile before are fetched: where registers
     * suffice. */
    static constexpr bool AHEAD     = !GENERAL && DK <= 128;
    static constexpr uint32_t LOOKS = ((N + GATHER_STEP - 1) / GATHER_STEP * 4 + 31) / 32;

    const cuda_args_t &x;
    const cuda_map_t *k_map, *v_map;
    k_ring k;
    v_ring v;
    int lane, warp;
    spot spots[LOOKS];   /* of the tile that is to be fetched in pieces next */
    uint32_t spots_head; /* its KV head; CUDA_NONE: there is none */

    __device__ __forceinline__
    kv_producer(const cuda_args_t &args, const cuda_map_t *k_as, const cuda_map_t *v_as)
        : x(args), k_map(k_as), v_map(v_as), spots_head(CUDA_NONE)
    {
    }

    /* The page of a token of the leaf, and its place there. */
    __device__ __forceinline__ uint32_t
    page_of(const walk_t &w, uint32_t token, uint32_t &place) const
    {
        uint32_t at   = w.leaf.offset + w.first + token;
        uint32_t page = x.page_shift != CUDA_NONE ? at >> x.page_shift : at / x.page_size;
        place         = at - page * x.page_size;
        return x.pages[w.leaf.page + page];
    }

    /* Where the row of a token lies in a store of pages. */
    __device__ __forceinline__ const uint8_t *
    row_of(const uint8_t *store, uint64_t stride, uint32_t row_bytes, uint32_t id,
           uint32_t place) const
    {
        return store + id * stride + place * row_bytes;
    }

    /* Rows of V in boxes that were not copied, by hand: few and seldom. */
    __device__ __forceinline__ void
    fill_rows(const walk_t &w, const uint8_t *store, uint32_t boxes)
    {
        for (uint32_t row = 0; row < N; row++) {
            if (boxes >> (row / x.box) & 1) {
                continue;
            }
            bool has       = w.has(row);
            uint32_t place = 0, id = has ? page_of(w, row, place) : 0;
            const uint8_t *from = row_of(store, x.v_page_stride, DV * 2, id, place);
            for (uint32_t c = lane; c < DV / 8; c += 32) {
                uint4 piece = make_uint4(0, 0, 0, 0);
                if (has) {
                    piece = *(const uint4 *)(from + ((c ^ (place & 7)) << 4));
                }
                store_near(v.stage() + tile_piece(DV / 64, row, c), piece);
            }
        }
        order_before_copies();
        __syncwarp();
    }

    /* A tile by the copy engine. */
    template <int D, bool SUM, class R>
    __device__ __forceinline__ void
    boxes(const walk_t &w, R &r, const cuda_map_t *map, const uint8_t *store)
    {
        uint32_t first = lane * x.box, place = 0, id = 0;
        uint32_t n  = first < N ? w.count(first, x.box) : 0;
        bool copied = SUM ? n == x.box : n > 0;

        if (copied) {
            id = page_of(w, first, place);
        }
        uint32_t mine = __ballot_sync(~0u, copied);
        r.wait_empty();
        if (SUM && __popc(mine) * x.box < N) {
            fill_rows(w, store, mine);
        }
        if (lane == 0) {
            barrier_expect(r.full(r.at), __popc(mine) * x.box * (D * 2));
        }
        __syncwarp();
        if (copied) {
            copy_box(r.stage() + tile_piece(D / 64, first, 0), map,
                     (w.work->kv_head * x.page_size + place) / TILE_ROWS, id, r.full(r.at));
        }
        r.next();
    }

    /*
     * Where the rows of a tile lie that this warp fetches in pieces: it has 4 of every 4
     * GATHER_WARPS rows, and asks for 32 of them at once, a lane each.
     */
    __device__ __forceinline__ void
    look_up(const walk_t &w, spot (&spots)[LOOKS]) const
    {
#pragma unroll
        for (uint32_t i = 0; i < LOOKS; i++) {
            uint32_t row   = warp * 4 + (32 * i + lane) / 4 * GATHER_STEP + lane % 4;
            spots[i].place = CUDA_NONE;
            if (row < N && w.has(row)) {
                spots[i].id = page_of(w, row, spots[i].place);
            }
        }
    }

    /*
     * A tile in pieces, 8 lanes a row, 4 rows at once: every other block of 4 of this warp lies in
     * the same half of a block of 8. Addresses are multiples of 16, so that there is room for how a
     * row is swizzled, and whether it is there; otherwise it becomes zero.
     */
    template <int D, class R>
    __device__ __forceinline__ void
    pieces(const spot (&spots)[LOOKS], R &r, const uint8_t *store, uint64_t stride)
    {
        constexpr uint32_t STEP = 2 * GATHER_STEP / TILE_ROWS * (D / 64) * TILE_PART;
        const uint32_t of       = (uint32_t)lane;
        const uint8_t *head     = store + (uint64_t)spots_head * x.page_size * (D * 2);
        uint32_t to[2];

        r.wait_empty();
        for (uint32_t i = 0; i < 2; i++) {
            to[i] = r.stage() + tile_piece(D / 64, warp * 4 + i * GATHER_STEP + of / 8, of % 8);
        }
#pragma unroll
        for (uint32_t k = 0; k < LOOKS; k++) {
            uint64_t lies = (uint64_t)head;
            if (spots[k].place != CUDA_NONE) {
                lies = (uint64_t)row_of(head, stride, D * 2, spots[k].id, spots[k].place) |
                       (spots[k].place & 7) | 8;
            }
            uint32_t left = (N / 4 - (uint32_t)warp + GATHER_WARPS - 1) / GATHER_WARPS - 8 * k;
#pragma unroll 1
            for (uint32_t i = 0; i < min(left, 8u); i++) {
                const uint64_t at = __shfl_sync(~0u, lies, (int)(4 * i + of / 8));
                const uint8_t *from =
                    (const uint8_t *)(at & ~(uint64_t)15) + (((of ^ (uint32_t)at) & 7) << 4);
#pragma unroll
                for (uint32_t j = 0; j < D / 64; j++) {
                    copy_16_or_zero(to[i % 2] + j * TILE_PART, from + j * TILE_PART_ROW,
                                    (at & 8) != 0);
                }
                to[i % 2] += STEP;
            }
        }
        copies_arrive(r.full(r.at));
        r.next();
    }

    /* The tile whose rows were looked up. */
    __device__ __forceinline__ void
    fetch_looked_up()
    {
        if (spots_head != CUDA_NONE) {
            pieces<DK>(spots, k, x.k, x.k_page_stride);
            pieces<DV>(spots, v, x.v, x.v_page_stride);
        }
    }

    __device__ __forceinline__ void
    run(const cuda_tile_t &work)
    {
        const uint8_t *v_store = x.v + (uint64_t)work.kv_head * x.page_size * (DV * 2);
        walk_t w(x);

        w.begin(&work);
        for (uint32_t i = 0; i < work.n_leaves; i++) {
            if (i > 0) {
                w.go_on();
            }
            if (i + 1 < work.n_leaves) {
                fetch_ahead(x.leaves + work.leaf_first + i + 1);
            }
            while (w.next()) {
                if (x.bulk) {
                    boxes<DK, false>(w, k, k_map, nullptr);
                    boxes<DV, true>(w, v, v_map, v_store);
                } else {
                    spot next[LOOKS];
                    look_up(w, next);
                    if (AHEAD) {
                        fetch_looked_up();
                    }
#pragma unroll
                    for (uint32_t j = 0; j < LOOKS; j++) {
                        spots[j] = next[j];
                    }
                    spots_head = work.kv_head;
                    if (!AHEAD) {
                        fetch_looked_up();
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void
    end()
    {
        if (!x.bulk) {
            if (AHEAD) {
                fetch_looked_up();
            }
            copies_commit();
            copies_wait<0>();
        }
    }
};

/* ---- Q ---- */

template <int DK, int DV> using q_ring = tile_ring<CUDA_MANY_PLACES(DK, DV), CUDA_MANY_Q(DK)>;

/* What consumers ask of a work, in shared memory, and where the answers of its rows go. There is
 * room for three: the one that ends, the one that goes on, and the one that comes. */
#define NEAR_WORKS 3

struct near_work : cuda_tile_t {
    uint32_t answer[CUDA_MANY_ROWS]; /* of cuda_query_t */
};

/* A work comes near, by one warp, with the rows of Q if they are fetched (FETCH); those that there
 * are not are zero. Where they lie is asked for all of them first, before there is room: a lane
 * has every 32nd row. */
template <int DK, bool FETCH, class R>
__device__ __forceinline__ void
bring_work(const cuda_args_t &x, const cuda_tile_t &work, near_work &near, R &ring, int lane)
{
    const uint32_t c = lane % 8, rows = work.rows, heads = work.n_heads, first = work.query_first;
    const uint8_t *q = x.q + (work.kv_head * x.group + work.head_first) * x.q_head_stride + c * 16;
    uint64_t from[CUDA_MANY_ROWS / 32];
    uint32_t answer[CUDA_MANY_ROWS / 32];
    uint4 part = ((const uint4 *)&work)[min(lane, (int)sizeof(work) / 16 - 1)];

#pragma unroll
    for (uint32_t k = 0; k < CUDA_MANY_ROWS / 32; k++) {
        uint32_t row   = min(32 * k + lane, rows - 1);
        uint32_t query = row / heads, head = row - query * heads;
        const cuda_query_t &of = x.queries[first + query];
        from[k]                = of.q_row * x.q_row_stride + head * x.q_head_stride;
        answer[k]              = of.answer;
    }
    ring.wait_empty();
    if (lane < (int)sizeof(work) / 16) {
        ((uint4 *)&near)[lane] = part;
    }
#pragma unroll
    for (uint32_t k = 0; k < CUDA_MANY_ROWS / 32; k++) {
        near.answer[32 * k + lane] = answer[k];
    }
    const uint32_t to = ring.stage();
#pragma unroll
    for (uint32_t k = 0; FETCH && k < CUDA_MANY_ROWS / 32; k++) {
#pragma unroll 2
        for (uint32_t i = 0; i < 32; i += 4) {
            const uint32_t row = 32 * k + i + lane / 8;
            const uint8_t *at  = q + __shfl_sync(~0u, from[k], (int)i + lane / 8);
#pragma unroll
            for (uint32_t j = 0; j < DK / 64; j++) {
                uint32_t piece = to + tile_piece(DK / 64, row, c + 8 * j);
                if (row < rows) {
                    copy_16(piece, at + 128 * j);
                } else {
                    store_near(piece, make_uint4(0, 0, 0, 0));
                }
            }
        }
    }
    copies_commit();
    copies_wait<0>();
    order_before_copies();
    barrier_arrive(ring.full(ring.at));
    ring.next();
}

#endif
