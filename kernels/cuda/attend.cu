/*
 * attend.cu: paged attention of requests of up to 64 packed rows a work, on matrix units.
 *
 * A team is four consumer warps and two producer warps with a ring of stages in shared memory; a
 * CTA has one team, or two or three that hide each other's latency. A team walks the pieces that
 * the plan gives it, and then those of a queue that are left; none ever waits for another.
 *
 *     S^T = K Q^T     tokens are M, rows (queries x heads of a group) are N
 *     O^T = V^T P^T   P is turned in registers
 *
 * so that 8 rows fill the unit, and a row's bits are the same in any column. The consumers make a
 * leaf together: each has 16 of its tokens in the first product and a quarter of V's columns in the
 * second, and in between they exchange maxima, sums and weights through shared memory. A leaf is
 * over soon, so that few stages of the ring are in use, and the rest of it is on the way from
 * memory.
 *
 * Where a work has lists of pages a stage is a bundle of four blocks of 16 tokens, of those alone
 * that are listed. Each warp has one of them in the first product, and all four a quarter of V's
 * columns in the second, leaf by leaf: a leaf of one block costs its product and its merge.
 *
 * Each leaf is computed into registers as one state; states of leaves merge along the tree, on a
 * stack in shared memory whose deeper part lies in global memory. A piece that is a whole request
 * answers; the states of others go to memory, for merge.cu.
 *
 * In memory and in a stage a token's row is 64 x n elements, its 16-byte pieces permuted within
 * each 128 bytes by the token's place (xor of the lowest three bits), which is the order that
 * keeps ldmatrix off the same banks. store.cu stores them so.
 *
 * Compiled for one type (ATTN_T), and head dims of K and V (ATTN_DK, ATTN_DV).
 */
#include "kernels/cuda/producer.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/stack.cuh"

/* Blocks of a stage that are those of one leaf: [first, end). */
struct stretch {
    int first, end;
};

/* How the blocks of a bundle fall into leaves, as sets of bits. */
struct outline {
    uint32_t begins; /* the first ones of leaves */
    uint32_t high;   /* of the second half of theirs */
    int n;           /* blocks that have tokens */

    /* The leaf of a block; behind the last block, some. */
    __device__ __forceinline__ stretch
    leaf_of(int i) const
    {
        return {31 - __clz(begins & ((2u << i) - 1)), end_of(i)};
    }

    __device__ __forceinline__ int
    end_of(int i) const
    {
        uint32_t after = begins >> (i + 1);
        return after != 0 ? i + __ffs(after) : n;
    }
};

/* LISTED: pieces may have bundles, and a leaf is one of a single leaf; GENERAL: logits are whatever
 * a layer or a mask makes them, and pieces as with LISTED. */
template <class T, int DK, int DV, int NB, bool LISTED, bool GENERAL> struct consumer {
    static_assert(LISTED || !GENERAL, "one kernel for all there is");
    static constexpr int COLUMNS  = DV / CUDA_WARPS; /* of V and A, of a warp */
    static constexpr int STAGE    = CUDA_STAGE(DK, DV);
    static constexpr bool KEPT    = NB <= 2; /* q is in registers, else in shared memory */
    static constexpr uint32_t ALL = (1u << CUDA_BLOCK) - 1; /* tokens of a block */
    static constexpr float RAISE  = type_of<T>::shift == 0 ? 1.0f : (float)(1 << type_of<T>::shift);

    using state_t = state<COLUMNS, NB>;

    const cuda_args_t &x;
    ring<STAGE> r;
    errands follow;
    int lane, warp;
    uint32_t team;
    uint32_t k_at, v_at; /* in a stage: what this lane fetches first of either product */
    rows<NB, DK> near;
    stack<COLUMNS, NB> states;

    /* Of the piece: */
    cuda_piece_t piece;
    uint32_t q[KEPT ? DK / 16 : 1][KEPT ? NB : 1][2];
    int least;              /* position of its rows */
    uint32_t left, written; /* level of what is before it; states that are in memory */

    __device__ __forceinline__
    consumer(const cuda_args_t &args, const ring<STAGE> &on, const errands &pieces, uint32_t t,
             int w, int l)
        : x(args), r(on), follow(pieces), lane(l), warp(w), team(t)
    {
        const int mi = lane / 8, row = lane % 8, first = warp * (COLUMNS / 8) + (mi & 1);

        k_at = kept((16 * warp + (mi & 1) * 8 + row) * (DK * 2) + (((mi >> 1) ^ row) << 4));
        v_at = kept(((mi >> 1) * 8 + row) * (DV * 2) + ((first ^ row) << 4));
    }

    /* All consumers of the team are here, and see what the others wrote to shared memory. */
    __device__ __forceinline__ void
    meet()
    {
        named_wait(1 + team, CUDA_WARPS * 32);
    }

    /* 4 bytes of a row of q as an operand: elements 2 (lane % 4) and the next of 8 from `at` on. */
    __device__ __forceinline__ uint32_t
    of_q(const uint8_t *row, uint32_t part, int at) const
    {
        return row != nullptr
                   ? *(const uint32_t *)(row + part * x.q_part_stride + 2 * at + 4 * (lane % 4))
                   : 0;
    }

    __device__ __forceinline__ void
    load_rows()
    {
        meet(); /* all are done with those before */
        near.fill(x, piece, warp * 32 + lane);
        meet();
        least = near.least(lane);
        if constexpr (KEPT) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
                const uint8_t *row = near.q_at(8 * n + lane / 4);
#pragma unroll
                for (int k = 0; k < DK / 16; k++) {
                    q[k][n][0] = of_q(row, 0, 16 * k);
                    q[k][n][1] = of_q(row, 0, 16 * k + 8);
                }
            }
        } else if (x.near_q) {
            for (int row = warp; row < 8 * NB; row += CUDA_WARPS) {
                const uint8_t *from = near.q_at(row);
                for (int i = lane; i < DK / 2; i += 32) {
                    uint32_t two = from != nullptr ? *(const uint32_t *)(from + 4 * i) : 0;
                    store_near(near.at + near.Q + row * (DK * 2) + ((i / 4 ^ row % 8) << 4) +
                                   i % 4 * 4,
                               two);
                }
            }
            meet();
        }
    }

    /* This warp is done with the stage. */
    __device__ __forceinline__ void
    release()
    {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(r.empty + 8 * r.at);
        }
        r.next();
    }

    /* ---- the first product ---- */

    /* This warp's tokens of K in the stage by all rows. */
    __device__ __forceinline__ void
    multiply_tokens(uint32_t part, float (&s)[NB][4])
    {
        const int mi = lane / 8, row = lane % 8;
        const uint32_t at = r.stage() + k_at;
        const uint32_t q_row =
            near.at + near.Q + (8 * (mi >> 1) + row) * (DK * 2) + (((mi & 1) ^ row) << 4);

#pragma unroll
        for (int k = 0; k < DK / 16; k++) {
            const uint32_t turned = 32 * (k % 4), on = 128 * (k / 4);
            uint32_t a[4], b[4];
            load_matrix(a, (at ^ turned) + on);
#pragma unroll
            for (int n = 0; n < NB; n++) {
                if (GENERAL && (part > 0 || (!KEPT && !x.near_q))) {
                    const uint8_t *from = near.q_at(8 * n + lane / 4);
                    type_of<T>::multiply(s[n], a, of_q(from, part, 16 * k),
                                         of_q(from, part, 16 * k + 8));
                } else if constexpr (KEPT) {
                    type_of<T>::multiply(s[n], a, q[k][n][0], q[k][n][1]);
                } else {
                    if (n % 2 == 0) {
                        load_matrix(b, (q_row ^ turned) + on + n / 2 * (16 * DK * 2));
                    }
                    type_of<T>::multiply(s[n], a, b[2 * (n % 2)], b[2 * (n % 2) + 1]);
                }
            }
        }
    }

    /* S^T of this warp's 16 tokens, as logits times log2 e. */
    __device__ __forceinline__ void
    multiply_k(int position, uint32_t present, float (&s)[NB][4])
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
        }
        if (present != 0) {
            r.await_full();
            for (uint32_t part = 0; part < (GENERAL ? x.q_parts : 1); part++) {
                multiply_tokens(part, s);
            }
        }
        release();
        if (!GENERAL && present == ALL &&
            (!x.causal || position + CUDA_BLOCK - 1 <= least)) { /* each row sees all */
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[n][i] *= x.scale;
                }
            }
        } else {
            mask(position, present, s);
        }
    }

    /* Sums of products become logits times log2 e; -inf where a row does not see a token. */
    __device__ __forceinline__ void
    mask(int position, uint32_t present, float (&s)[NB][4])
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = lane / 4 + i / 2 * 8;
                s[n][i]   = present >> token & 1
                                ? near.template logit<GENERAL>(
                                    x, s[n][i], 8 * n + 2 * (lane % 4) + i % 2, position + token)
                                : -INFINITY;
            }
        }
    }

    /* ---- weights ---- */

    /* The largest logit of each row, over the warps that have a leaf's blocks; a logit beyond the
     * limit is reported. */
    __device__ __forceinline__ void
    find_tops(const float (&s)[NB][4], stretch leaf, float (&top)[NB][2])
    {
        bool beyond = false;

#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                beyond = beyond || (fabsf(s[n][i]) > Y_MAX && s[n][i] != -INFINITY);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                top[n][j] = fmaxf(s[n][j], s[n][2 + j]);
#pragma unroll
                for (int o = 4; o < 32; o <<= 1) {
                    top[n][j] = fmaxf(top[n][j], __shfl_xor_sync(~0u, top[n][j], o));
                }
            }
            if (lane < 4) {
                store_near(near.pair(near.TOPS, warp, n, lane), make_float2(top[n][0], top[n][1]));
            }
        }
        if (beyond) {
            report_beyond(s);
        }
        meet();
#pragma unroll
        for (int n = 0; n < NB; n++) {
            float2 of[CUDA_WARPS];
#pragma unroll
            for (int w = 0; w < CUDA_WARPS; w++) {
                int from = LISTED ? min(leaf.first + w, leaf.end - 1) : w;
                of[w]    = load_near<float2>(near.pair(near.TOPS, from, n, lane));
            }
            top[n][0] = fmaxf(fmaxf(of[0].x, of[1].x), fmaxf(of[2].x, of[3].x));
            top[n][1] = fmaxf(fmaxf(of[0].y, of[1].y), fmaxf(of[2].y, of[3].y));
            if (LISTED && lane < 4) {
                store_near(near.pair(near.LEAVES, warp, n, lane),
                           make_float2(top[n][0], top[n][1]));
            }
        }
    }

    /* The largest logits of the leaf that a block is of. They are not looked up among the TOPS: a
     * warp that is done may have put its next ones there. */
    __device__ __forceinline__ void
    load_tops(int block, float (&top)[NB][2]) const
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            float2 of = load_near<float2>(near.pair(near.LEAVES, block, n, lane));
            top[n][0] = of.x;
            top[n][1] = of.y;
        }
    }

    /* The sum over a leaf's blocks, each in its place: (0 + 1) + (2 + 3), where those that are not
     * there are 0. */
    __device__ __forceinline__ void
    load_sum(const outline &bundle, stretch leaf, int n, float (&sum)[2]) const
    {
        float2 of[CUDA_WARPS];

#pragma unroll
        for (int w = 0; w < CUDA_WARPS; w++) {
            int from = LISTED ? min(leaf.first + w, leaf.end - 1) : w;
            of[w]    = load_near<float2>(near.pair(near.SUMS, from, n, lane));
        }
        if (!LISTED) {
            sum[0] = (of[0].x + of[1].x) + (of[2].x + of[3].x);
            sum[1] = (of[0].y + of[1].y) + (of[2].y + of[3].y);
            return;
        }
        float2 low = make_float2(0.0f, 0.0f), high = low;
#pragma unroll
        for (int w = 0; w < CUDA_WARPS; w++) {
            bool in = leaf.first + w < leaf.end, up = bundle.high >> (leaf.first + w) & 1;
            low.x += in && !up ? of[w].x : 0.0f;
            low.y += in && !up ? of[w].y : 0.0f;
            high.x += in && up ? of[w].x : 0.0f;
            high.y += in && up ? of[w].y : 0.0f;
        }
        sum[0] = low.x + high.x;
        sum[1] = low.y + high.y;
    }

    __device__ __forceinline__ void
    report_beyond(const float (&s)[NB][4])
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (s[n][i] != -INFINITY && fabsf(s[n][i]) > Y_MAX) {
                    near.report(x, 8 * n + 2 * (lane % 4) + i % 2);
                }
            }
        }
    }

    /* What weights are relative to: the top, or some number where a row sees nothing. */
    __device__ __forceinline__ static float
    base_of(float top)
    {
        return fminf(fmaxf(top, -Y_MAX), Y_MAX);
    }

    /* Weights of S^T, packed and turned for the second product, and their sums, to all warps. */
    __device__ __forceinline__ void
    give_weights(const float (&s)[NB][4], const float (&top)[NB][2])
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            float p[4], sum[2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[i] = exp2_of(s[n][i] - base_of(top[n][i % 2]));
            }
            store_near(near.weights(warp, n, lane),
                       make_uint2(turn(type_of<T>::pack(p[0] * RAISE, p[1] * RAISE)),
                                  turn(type_of<T>::pack(p[2] * RAISE, p[3] * RAISE))));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                sum[j] = p[j] + p[2 + j];
#pragma unroll
                for (int o = 4; o < 32; o <<= 1) {
                    sum[j] += __shfl_xor_sync(~0u, sum[j], o);
                }
            }
            if (lane < 4) {
                store_near(near.pair(near.SUMS, warp, n, lane), make_float2(sum[0], sum[1]));
            }
        }
    }

    /* l and e of the leaf, and what its A is multiplied by. */
    __device__ __forceinline__ void
    take_sums(const outline &bundle, stretch leaf, const float (&top)[NB][2], state_t &c,
              float (&factor)[NB][2])
    {
        bool bad = false;

#pragma unroll
        for (int n = 0; n < NB; n++) {
            float sum[2];
            load_sum(bundle, leaf, n, sum);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float base = base_of(top[n][j]), e = ceilf(base);
                float w      = exp2_of(base - e);
                c.e[n][j]    = top[n][j] == -INFINITY ? EMPTY_E : (int)e;
                c.l[n][j]    = __fmul_rn(sum[j], w);
                factor[n][j] = __fmul_rn(w, 1.0f / RAISE);
                bad          = bad || sum[j] != sum[j];
            }
        }
        if (bad) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (c.l[n][j] != c.l[n][j]) {
                        near.report(x, 8 * n + 2 * (lane % 4) + j);
                    }
                }
            }
        }
    }

    /* ---- the second product ---- */

    /* Rows of V in this warp's block that are nothing are cleared: 0 * NaN is NaN. */
    __device__ __forceinline__ void
    clear_absent(uint32_t present)
    {
        constexpr int pieces = DV / 8; /* of a row */

        r.await_full();
        for (int i = lane; i < CUDA_BLOCK * pieces; i += 32) {
            if (!(present >> i / pieces & 1)) {
                store_near(r.stage() + warp * (CUDA_BLOCK * DV * 2) + i * 16,
                           make_uint4(0, 0, 0, 0));
            }
        }
        order_before_copies();
    }

    /* 16 tokens of V in the stage by the weights of all rows. */
    __device__ __forceinline__ void
    multiply_block(int b, uint32_t at, state_t &c)
    {
        uint2 p[NB];

#pragma unroll
        for (int n = 0; n < NB; n++) {
            p[n] = load_near<uint2>(near.weights(b, n, lane));
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++) {
            uint32_t a[4];
            load_matrix_turned(a, (at ^ (32 * (i % 4))) + 128 * (i / 4) + b * (16 * DV * 2));
#pragma unroll
            for (int n = 0; n < NB; n++) {
                type_of<T>::multiply(c.a[i][n], a, p[n].x, p[n].y);
            }
        }
    }

    /* A of a leaf. */
    __device__ __forceinline__ void
    multiply_v(stretch leaf, const float (&factor)[NB][2], state_t &c)
    {
        const uint32_t at = r.stage() + v_at;

#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
                c.a[i][n][0] = c.a[i][n][1] = c.a[i][n][2] = c.a[i][n][3] = 0.0f;
            }
        }
        if (leaf.end - leaf.first == BLOCKS) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                multiply_block(b, at, c);
            }
        } else {
            for (int b = leaf.first; b < leaf.end; b++) {
                multiply_block(b, at, c);
            }
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    c.a[i][n][j] = __fmul_rn(c.a[i][n][j], factor[n][j & 1]);
                }
            }
        }
    }

    /* ---- stages ---- */

    /* This warp's block becomes weights and sums: of a leaf that has all these blocks. */
    __device__ __forceinline__ void
    weigh(int position, uint32_t present, stretch leaf, float (&top)[NB][2])
    {
        float s[NB][4];

        multiply_k(position, present, s);
        find_tops(s, leaf, top);
        give_weights(s, top);
        if (present != 0 && present != ALL) {
            clear_absent(present);
        }
        meet();
    }

    __device__ __forceinline__ void
    compute_leaf(const cuda_leaf_t &leaf, state_t &c)
    {
        const int rest = leaf.tokens - CUDA_BLOCK * warp, n = (leaf.tokens + 15) / 16;
        const uint32_t present = rest >= CUDA_BLOCK ? ALL : rest > 0 ? (1u << rest) - 1 : 0;
        float top[NB][2], factor[NB][2];

        weigh(leaf.position + CUDA_BLOCK * warp, present, {0, n}, top);
        take_sums({}, {0, n}, top, c, factor);
        r.await_full();
        multiply_v({0, n}, factor, c);
        release();
    }

    /* All leaves of a bundle; c is the last one's state. */
    __device__ __forceinline__ void
    compute_bundle(const block &b, state_t &c)
    {
        const outline bundle = {__ballot_sync(~0u, b.level != 0) & 15,
                                __ballot_sync(~0u, (b.position & (LEAF / 2)) != 0) & 15,
                                __popc(__ballot_sync(~0u, b.present != 0) & 15)};
        const int position   = __shfl_sync(~0u, b.position, warp);
        float top[NB][2], factor[NB][2];

        weigh(position, __shfl_sync(~0u, b.present, warp), bundle.leaf_of(warp), top);
        r.await_full();
        for (stretch leaf = {0, bundle.end_of(0)};; leaf = {leaf.end, bundle.end_of(leaf.end)}) {
            if (leaf.first > 0) {
                set_aside(__shfl_sync(~0u, b.level, leaf.first), c);
            }
            load_tops(leaf.first, top);
            take_sums(bundle, leaf, top, c, factor);
            multiply_v(leaf, factor, c);
            if (leaf.end == bundle.n) {
                break;
            }
        }
        release();
    }

    /* ---- answers ---- */

    /* State i of a piece, for the merge kernel. */
    __device__ __forceinline__ void
    write_state(uint32_t i, const state_t &c)
    {
#pragma unroll
        for (int b = 0; b < NB; b++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t row = 8 * b + 2 * (lane % 4) + j;
                if (row >= piece.rows) {
                    continue;
                }
                uint64_t slot = piece.slot + (uint64_t)i * piece.rows + row;
                float *a      = x.slot_a + slot * DV + warp * COLUMNS + lane / 4;
#pragma unroll
                for (int k = 0; k < COLUMNS / 16; k++) {
                    a[16 * k]     = c.a[k][b][j];
                    a[16 * k + 8] = c.a[k][b][2 + j];
                }
                if (lane < 4 && warp == 0) {
                    x.slot_l[slot] = c.l[b][j];
                    x.slot_e[slot] = c.e[b][j];
                }
            }
        }
    }

    __device__ __forceinline__ void
    write_answer(const state_t &c)
    {
#pragma unroll
        for (int b = 0; b < NB; b++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t own = 8 * b + 2 * (lane % 4) + j;
                if (own >= piece.rows) {
                    continue;
                }
                const cuda_query_t &query = x.queries[near.template of<uint32_t>(near.QUERY, own)];
                uint32_t head             = near.template of<uint32_t>(near.HEAD, own);
                uint64_t row              = (uint64_t)query.answer * x.q_heads + head;
                bool bad                  = !is_finite(c.l[b][j]);
                finish_scales f           = finish_le(x, head, c.l[b][j], c.e[b][j]);
#pragma unroll
                for (int k = 0; k < COLUMNS / 16; k++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint64_t at = row * DV + warp * COLUMNS + 16 * k + 8 * h + lane / 4;
                        float a     = c.l[b][j] == 0.0f ? 0.0f : c.a[k][b][2 * h + j];
                        bad         = bad || !is_finite(a);
                        if (piece.states) {
                            x.a[at] = a;
                        } else if (x.o != nullptr) {
                            store_o(x, at, finish_a(f, a));
                        }
                    }
                }
                bool first = lane < 4 && warp == 0;
                if (first && piece.states) {
                    x.l[row] = c.l[b][j];
                    x.e[row] = c.e[b][j];
                } else if (first && x.lse != nullptr) {
                    x.lse[row] = f.lse;
                }
                if (bad) {
                    near.report(x, own);
                }
            }
        }
    }

    /* What waits on the stack, and c on top of it, as states `from` and on of the piece. */
    __device__ __forceinline__ void
    write_stack(uint32_t from, state_t &c)
    {
        uint32_t i = from + states.waits.count();

        write_state(i, c);
        while (!states.waits.none()) {
            states.take_top(c);
            write_state(--i, c);
        }
    }

    /* The next leaf comes at `level`, and c has to wait for it, or is over. */
    __device__ __forceinline__ void
    set_aside(uint32_t level, state_t &c)
    {
        states.merge_below(level, c);
        if (states.waits.none() && level >= left) {
            write_state(written++, c); /* no node of this piece has it and what follows */
            left = level;
        } else {
            states.push(level, c);
        }
    }

    __device__ __forceinline__ void
    run_leaves(state_t &c)
    {
        const cuda_leaf_t *at = x.leaves + piece.leaf_first, *last = at + piece.n_leaves - 1;
        cuda_leaf_t next = *at;

        for (uint32_t i = 0;; i++) {
            cuda_leaf_t leaf = next;
            at += at < last;
            next = *at;
            if (i > 0) {
                set_aside(leaf.level, c);
            }
            compute_leaf(leaf, c);
            if (i + 1 == piece.n_leaves) {
                return;
            }
        }
    }

    __device__ __forceinline__ void
    run_bundles(state_t &c)
    {
        block next = block_at(x, piece, 0, lane % CUDA_WARPS);

        for (uint32_t i = 0;; i++) {
            block b = next;
            next    = block_at(x, piece, min(i + 1, piece.n_leaves - 1), lane % CUDA_WARPS);
            if (i > 0) {
                set_aside(__shfl_sync(~0u, b.level, 0), c);
            }
            compute_bundle(b, c);
            if (i + 1 == piece.n_leaves) {
                return;
            }
        }
    }

    __device__ __forceinline__ void
    run(const cuda_piece_t &given)
    {
        state_t c;

        piece        = given;
        left         = piece.levels & 255;
        written      = 0;
        states.waits = {0};
        load_rows();
        if (piece.n_leaves == 0) {
            set_empty(c);
            if (piece.slot == CUDA_NONE) {
                write_answer(c);
            }
            return;
        }
        if constexpr (LISTED) {
            run_bundles(c);
        } else {
            run_leaves(c);
        }
        states.merge_below(piece.levels >> 8, c);
        if (piece.slot != CUDA_NONE) {
            write_stack(written, c);
        } else {
            write_answer(c);
        }
    }

    __device__ void
    walk(const cuda_piece_t &first)
    {
        for (cuda_piece_t at = first; at.kv_head != CUDA_NONE; at = follow.take(lane)) {
            run(at);
        }
    }
};

/* ---- the kernel ---- */

template <class T, int DK, int DV, int NB, bool LISTED, bool GENERAL>
__device__ __forceinline__ void
attend(const cuda_args_t &x)
{
    constexpr int TEAMS = CUDA_TEAMS(8 * NB, DK, DV), CONSUMERS = TEAMS * CUDA_WARPS;
    using consumer_t = consumer<T, DK, DV, NB, LISTED, GENERAL>;
    using ring_t     = ring<consumer_t::STAGE>;

    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t full[CUDA_STAGES_MAX], empty[CUDA_STAGES_MAX];
    __shared__ __align__(8) uint64_t told[TEAMS][ERRANDS], heard[TEAMS][ERRANDS];
    __shared__ cuda_piece_t pieces[TEAMS][ERRANDS];

    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool consumes = warp < CONSUMERS;
    const uint32_t team = consumes ? warp / CUDA_WARPS : (warp - CONSUMERS) / 2;
    cuda_piece_t piece  = x.pieces[blockIdx.x * TEAMS + team];

    if (threadIdx.x < TEAMS * x.stages) {
        barrier_init(shared_of(&full[threadIdx.x]), x.bulk ? 1 : 32);
        barrier_init(shared_of(&empty[threadIdx.x]), CUDA_WARPS);
        barriers_for_copies();
    }
    if (threadIdx.x < TEAMS * ERRANDS) {
        barrier_init(shared_of(&told[0][threadIdx.x]), 1);
        barrier_init(shared_of(&heard[0][threadIdx.x]), ERRAND_TAKERS);
    }
    if (!x.beside) {
        wait_for_kernel_before(); /* which wrote q, K and V */
    }
    let_next_kernel_begin();
    __syncthreads();
    const uint32_t data = kept(shared_of(shared)), ring_bytes = x.stages * consumer_t::STAGE;
    ring_t r = {data + team * ring_bytes,
                kept(shared_of(full) + team * x.stages * 8),
                kept(shared_of(empty) + team * x.stages * 8),
                x.stages,
                0,
                0};

    const errands follow = {shared_of(pieces[team]), shared_of(told[team]), shared_of(heard[team]),
                            0};
    if (piece.kv_head == CUDA_NONE) {
        /* no work for this team */
    } else if (consumes) {
        const uint32_t state_bytes = CUDA_STATE_BYTES(consumer_t::COLUMNS, NB, x.pairs);
        const uint32_t stack_bytes = x.levels * state_bytes;
        const uint32_t stacks      = data + TEAMS * ring_bytes;
        consumer_t c(x, r, follow, team, warp % CUDA_WARPS, lane);
        c.near.at = kept(stacks + CONSUMERS * stack_bytes + team * CUDA_NEAR_BYTES(8 * NB, DK));
        c.states.levels  = x.levels;
        c.states.near_at = kept(stacks + warp * stack_bytes);
        c.states.deep =
            x.deep + ((uint64_t)blockIdx.x * CONSUMERS + warp) * x.deep_levels * state_bytes;
        c.states.pairs = x.pairs;
        c.states.lane  = lane;
        c.walk(piece);
    } else {
        const bool of_v = (warp - CONSUMERS) % 2 != 0;
        if (of_v) {
            r.next();
        }
        if (DK == DV || !of_v) { /* the same code for both, where it can be */
            producer<DK, consumer_t::STAGE, LISTED>(x, r, follow, of_v, lane).walk(piece);
        } else {
            producer<DV, consumer_t::STAGE, LISTED>(x, r, follow, of_v, lane).walk(piece);
        }
    }
    if (x.beside) {
        wait_for_kernel_before(); /* whoever waits for this one waits for that, too */
    }
}

#define KERNEL(rows, name, listed, general)                                                        \
    extern "C" __global__ void __launch_bounds__(CUDA_THREADS(rows, ATTN_DK, ATTN_DV), 1)          \
        name(const __grid_constant__ cuda_args_t x)                                                \
    {                                                                                              \
        attend<ATTN_T, ATTN_DK, ATTN_DV, rows / 8, listed, general>(x);                            \
    }
#define KERNELS(rows)                                                                              \
    KERNEL(rows, attend_##rows, false, false)                                                      \
    KERNEL(rows, attend_##rows##_listed, true, false)                                              \
    KERNEL(rows, attend_##rows##_general, true, true)

/* The classes of image.c. */
KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
