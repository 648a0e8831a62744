/*
 * rows.cuh: what the consumers of a team share beside the ring: who the rows of a piece are, and
 * what the warps exchange for each leaf. And the hooks: what a logit becomes, and who sees it.
 */
#ifndef ATTN_KERNELS_CUDA_ROWS_CUH
#define ATTN_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/device.cuh"

#include <climits>

/* CUDA_NEAR_BYTES() of shared memory, at `at`. */
template <int NB, int DK> struct rows {
    static constexpr int ROWS = 8 * NB;

    enum {
        WEIGHTS  = 0,                              /* [warps][NB][32 lanes] of 8 bytes */
        Q_AT     = WEIGHTS + ROWS * CUDA_LEAF * 2, /* [ROWS] of 8 bytes: of q in memory, or 0 */
        TOPS     = Q_AT + ROWS * 8,                /* [warps][ROWS] floats */
        SUMS     = TOPS + ROWS * 4 * CUDA_WARPS,   /* [warps][ROWS] floats */
        LEAVES   = SUMS + ROWS * 4 * CUDA_WARPS,   /* [warps][ROWS] floats: tops of leaves */
        QUERY    = LEAVES + ROWS * 4 * CUDA_WARPS, /* [ROWS]: index into x.queries */
        HEAD     = QUERY + ROWS * 4,               /* [ROWS]: query head */
        POSITION = HEAD + ROWS * 4,
        SCALE    = POSITION + ROWS * 4, /* [ROWS] floats: of q */
        SLOPE    = SCALE + ROWS * 4,
        Q        = SLOPE + ROWS * 4, /* [ROWS][DK], swizzled as in a stage */
        END      = Q + (ROWS > 16 ? ROWS * DK * 2 : 0)
    };
    static_assert(END == CUDA_NEAR_BYTES(ROWS, DK), "the host gives as much");
    static_assert(ROWS <= 16 || Q % 128 == 0, "rows of q are turned within 128 bytes");

    uint32_t at;

    __device__ __forceinline__ const uint8_t *
    q_at(int row) const
    {
        uint2 p = load_near<uint2>(at + Q_AT + row * 8);
        return (const uint8_t *)((uint64_t)p.y << 32 | p.x);
    }

    template <class V>
    __device__ __forceinline__ V
    of(int what, int row) const
    {
        return load_near<V>(at + what + row * 4);
    }

    /* Where a lane's two rows 8 n + 2 (lane % 4) of a warp's tops and sums are. */
    __device__ __forceinline__ uint32_t
    pair(int what, int warp, int n, int lane) const
    {
        return at + what + (warp * ROWS + 8 * n + 2 * (lane % 4)) * 4;
    }

    __device__ __forceinline__ uint32_t
    weights(int warp, int n, int lane) const
    {
        return at + WEIGHTS + ((warp * NB + n) * 32 + lane) * 8;
    }

    /* By all threads of the consumers. */
    __device__ __forceinline__ void
    fill(const cuda_args_t &x, const cuda_piece_t &piece, int row)
    {
        if (row >= ROWS) {
            return;
        }
        if (row >= piece.rows) {
            store_near(at + Q_AT + row * 8, make_uint2(0, 0));
            store_near(at + POSITION + row * 4, INT_MAX);
            return;
        }
        uint32_t of   = piece.query_first + row / piece.n_heads;
        uint32_t head = piece.kv_head * x.group + piece.head_first + row % piece.n_heads;
        const cuda_query_t &query = x.queries[of];
        uint64_t from     = (uint64_t)(x.q + query.q_row * x.q_row_stride + head * x.q_head_stride);
        uint64_t scale_at = (uint64_t)query.q_row * x.q_heads + head;

        store_near(at + Q_AT + row * 8, make_uint2((uint32_t)from, (uint32_t)(from >> 32)));
        store_near(at + QUERY + row * 4, of);
        store_near(at + HEAD + row * 4, head);
        store_near(at + POSITION + row * 4, query.position);
        store_near(at + SCALE + row * 4, x.q_scale != nullptr ? x.q_scale[scale_at] : 1.0f);
        store_near(at + SLOPE + row * 4, x.slopes != nullptr ? x.slopes[head] : 0.0f);
    }

    /* The lowest position of a row. */
    __device__ __forceinline__ int
    least(int lane) const
    {
        int low = of<int>(POSITION, lane % ROWS);

        if (ROWS > 32) {
            low = min(low, of<int>(POSITION, (32 + lane) % ROWS));
        }
        return __reduce_min_sync(~0u, low);
    }

    __device__ __forceinline__ void
    report(const cuda_args_t &x, int row) const
    {
        if (q_at(row) != nullptr) {
            report_query(x, of<uint32_t>(QUERY, row), of<uint32_t>(HEAD, row));
        }
    }

    __device__ __noinline__ static void
    report_query(const cuda_args_t &x, uint32_t of, uint32_t head)
    {
        const cuda_query_t &query = x.queries[of];
        ::report(x, query.entry, query.query, head);
    }

    /* ---- hooks ---- */

    /* Does a query with a mask see the token at `t`, and as standing where? */
    __device__ __noinline__ static bool
    by_mask(const cuda_args_t &x, const cuda_query_t &query, int t, int &stands)
    {
        const uint8_t *mask = x.masks + query.mask;
        int j               = t - query.mask_base;
        if (!(mask[j / 8] >> (j % 8) & 1)) {
            return false;
        }
        int before = __popc(mask[j / 8] & ((1 << j % 8) - 1));
        for (int i = 0; i < j / 8; i++) {
            before += __popc(mask[i]);
        }
        stands = query.mask_base + before;
        return true;
    }

    /* A product of a row with the token at `t` becomes a logit times log2 e. */
    template <bool GENERAL>
    __device__ __forceinline__ float
    logit(const cuda_args_t &x, float s, int row, int t) const
    {
        const int position = of<int>(POSITION, row);

        if (!GENERAL) {
            return x.causal && t > position ? -INFINITY : s * x.scale;
        }
        int stands = t;
        if (q_at(row) == nullptr) {
            return -INFINITY;
        }
        const cuda_query_t &query = x.queries[of<uint32_t>(QUERY, row)];
        if (query.mask != CUDA_NONE && t >= query.mask_base) {
            if (!by_mask(x, query, t, stands)) {
                return -INFINITY;
            }
        } else if (x.causal && query.mask == CUDA_NONE && t > position) {
            return -INFINITY;
        }
        int behind = position - stands;
        if (x.window > 0 && behind >= x.window) {
            return -INFINITY;
        }
        s *= of<float>(SCALE, row);
        if (x.softcap == 0 && x.slopes == nullptr) {
            return s * x.scale;
        }
        s *= x.scale;
        if (x.softcap > 0) {
            s = x.softcap * tanhf(s / x.softcap);
        }
        if (x.slopes != nullptr) {
            s += of<float>(SLOPE, row) * (float)-behind;
        }
        return s * LOG2_E;
    }
};

#endif
