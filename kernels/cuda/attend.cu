/*
 * attend.cu: paged attention of requests of up to 64 packed rows a work, on matrix units.
 *
 * A CTA has four consumer warps and up to four producer warps. A team is one producer and one, two
 * or four consumers that share a ring of stages in shared memory: all its consumers read the same
 * leaves, each for 8 or 16 rows of its own. A team walks the pieces that the plan gives it; no team
 * ever waits for another.
 *
 *     S^T = K Q^T     tokens are M, rows (queries x heads of a group) are N
 *     O^T = V^T P^T   P is turned in registers
 *
 * so that 8 rows fill the unit, and a row's bits are the same in any column. Each leaf is computed
 * into registers as one state; states of leaves merge along the tree, on a stack in shared memory
 * whose deeper part lies in global memory. A piece that is a whole request answers; the states of
 * others go to memory, for merge.cu.
 *
 * In memory and in a stage a token's row is 64 x n elements, its 16-byte pieces permuted within
 * each 128 bytes by the token's place (xor of the lowest three bits), which is the order that
 * keeps ldmatrix off the same banks. store.cu stores them so.
 *
 * Compiled for one type (ATTN_T), and head dims of K and V (ATTN_DK, ATTN_DV).
 */
#include "kernels/cuda/producer.cuh"
#include "kernels/cuda/stack.cuh"

template <class T, int DK, int DV, int NB, bool GENERAL> struct consumer {
    const cuda_args_t &x;
    ring r;
    int lane, row_block;
    uint32_t team_bar; /* named barrier of the team's consumers */
    stack<DV, NB> kept;

    /* Of the piece: */
    cuda_piece_t piece;
    uint32_t q[DK / 16][NB][2];
    int position[NB][2];
    uint32_t query_of[NB][2]; /* index into x.queries, or CUDA_NONE: no such row */
    uint32_t head_of[NB][2];
    const uint8_t *q_at[NB];
    float q_scale[NB][2], slope[NB][2];

    __device__
    consumer(const cuda_args_t &args)
        : x(args)
    {
    }

    /* The row of a column of this warp's block: false if there is none. */
    __device__ __forceinline__ bool
    row_of(int column, uint32_t kv_head, uint32_t &query, uint32_t &head) const
    {
        uint32_t row = row_block * (8 * NB) + column;
        if (row >= piece.rows) {
            return false;
        }
        query = piece.query_first + row / piece.n_heads;
        head  = kv_head * x.group + piece.head_first + row % piece.n_heads;
        return true;
    }

    __device__ __forceinline__ void
    load_rows(uint32_t kv_head)
    {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            uint32_t query, head;
            q_at[n] = nullptr;
            if (row_of(8 * n + lane / 4, kv_head, query, head)) {
                q_at[n] = x.q + x.queries[query].q_row * x.q_row_stride + head * x.q_head_stride +
                          (lane % 4) * 4;
            }
#pragma unroll
            for (int k = 0; k < DK / 16; k++) {
                q[k][n][0] = q_at[n] ? *(const uint32_t *)(q_at[n] + 32 * k) : 0;
                q[k][n][1] = q_at[n] ? *(const uint32_t *)(q_at[n] + 32 * k + 16) : 0;
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                query_of[n][j] = CUDA_NONE;
                position[n][j] = 0;
                q_scale[n][j]  = 1.0f;
                slope[n][j]    = 0.0f;
                if (row_of(8 * n + 2 * (lane % 4) + j, kv_head, query, head)) {
                    query_of[n][j] = query;
                    head_of[n][j]  = head;
                    position[n][j] = x.queries[query].position;
                    if (GENERAL && x.q_scale != nullptr) {
                        q_scale[n][j] =
                            x.q_scale[(uint64_t)x.queries[query].q_row * x.q_heads + head];
                    }
                    if (GENERAL && x.slopes != nullptr) {
                        slope[n][j] = x.slopes[head];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void
    release()
    {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(r.empty + 8 * r.at);
        }
        r.next();
    }

    /* ---- hooks: what a logit becomes, and who sees it ---- */

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

    __device__ __forceinline__ float
    logit(float s, int n, int j, int t, bool present) const
    {
        if (!GENERAL) {
            return s * x.scale;
        }
        int stands = t;
        if (query_of[n][j] == CUDA_NONE || !present) {
            return -INFINITY;
        }
        const cuda_query_t &query = x.queries[query_of[n][j]];
        if (query.mask != CUDA_NONE && t >= query.mask_base) {
            if (!by_mask(x, query, t, stands)) {
                return -INFINITY;
            }
        } else if (x.causal && query.mask == CUDA_NONE && t > position[n][j]) {
            return -INFINITY;
        }
        int behind = position[n][j] - stands;
        if (x.window > 0 && behind >= x.window) {
            return -INFINITY;
        }
        s *= q_scale[n][j];
        if (x.softcap == 0 && x.slopes == nullptr) {
            return s * x.scale;
        }
        s *= x.scale;
        if (x.softcap > 0) {
            s = x.softcap * tanhf(s / x.softcap);
        }
        if (x.slopes != nullptr) {
            s += slope[n][j] * (float)-behind;
        }
        return s * LOG2_E;
    }

    /* ---- a leaf ---- */

    /* S^T of a leaf: all blocks a step of the head dim at a time. */
    __device__ __forceinline__ void
    multiply_blocks(const uint32_t (&at)[BLOCKS], uint32_t part, float (&s)[BLOCKS][NB][4])
    {
        const int mi = lane / 8, row = lane % 8;

#pragma unroll
        for (int k = 0; k < DK / 16; k++) {
            uint32_t more[NB][2];
#pragma unroll
            for (int n = 0; n < NB; n++) {
                more[n][0] = q[k][n][0];
                more[n][1] = q[k][n][1];
                if (GENERAL && part > 0) {
                    const uint8_t *from = q_at[n] + part * x.q_part_stride + 32 * k;
                    more[n][0]          = q_at[n] ? *(const uint32_t *)from : 0;
                    more[n][1]          = q_at[n] ? *(const uint32_t *)(from + 16) : 0;
                }
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                uint32_t a[4];
                load_matrix(a, at[b] + (((2 * k + (mi >> 1)) ^ row) << 4));
#pragma unroll
                for (int n = 0; n < NB; n++) {
                    type_of<T>::multiply(s[b][n], a, more[n][0], more[n][1]);
                }
            }
        }
    }

    /* S^T of the leaf, as logits times log2 e. All of its K is awaited first: then the blocks'
     * products, each a chain of its own, hide each other's latency. */
    __device__ __forceinline__ void
    multiply_k(const cuda_leaf_t &leaf, uint64_t present, float (&s)[BLOCKS][NB][4])
    {
        constexpr int per_stage = stage_tokens(DK) / 16, stages = BLOCKS / per_stage;
        const int mi = lane / 8, row = lane % 8;
        const int blocks = (leaf.tokens + 15) / 16;
        uint32_t at[BLOCKS];
        ring ahead = r;

#pragma unroll
        for (int i = 0; i < stages; i++) {
            if (i * per_stage < blocks) {
                barrier_wait(ahead.full + 8 * ahead.at, ahead.phase);
            }
#pragma unroll
            for (int j = 0; j < per_stage; j++) { /* a block that is not there is the first */
                bool there            = i * per_stage + j < blocks;
                at[i * per_stage + j] = r.data + (there ? ahead.at : r.at) * CUDA_STAGE +
                                        (16 * (there ? j : 0) + (mi & 1) * 8 + row) * (DK * 2);
            }
            if (i * per_stage < blocks) {
                ahead.next();
            }
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
                s[b][n][0] = s[b][n][1] = s[b][n][2] = s[b][n][3] = 0.0f;
            }
        }
        for (uint32_t part = 0; part < (GENERAL ? x.q_parts : 1); part++) {
            multiply_blocks(at, part, s);
        }
        for (int b = 0; b < blocks; b += per_stage) {
            release();
        }
        mask(leaf, present, s);
    }

    /* Sums of products become logits times log2 e; -inf where a row does not see a token. */
    __device__ __forceinline__ void
    mask(const cuda_leaf_t &leaf, uint64_t present, float (&s)[BLOCKS][NB][4])
    {
        const int g = lane / 4;
        int seen[NB][2];
        bool all = !GENERAL;

#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                seen[n][j] = (int)leaf.tokens;
                if (!GENERAL && x.causal) {
                    seen[n][j] = min(seen[n][j], position[n][j] - leaf.position + 1);
                }
                all        = all && (seen[n][j] == LEAF || query_of[n][j] == CUDA_NONE);
                seen[n][j] = query_of[n][j] == CUDA_NONE ? 0 : seen[n][j];
            }
        }
        if (!GENERAL && __all_sync(~0u, all)) {
            scale_all(s);
            return;
        }
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        int token          = 16 * b + g + 8 * h;
                        float y            = logit(s[b][n][2 * h + j], n, j, leaf.position + token,
                                                   present >> token & 1);
                        s[b][n][2 * h + j] = token < seen[n][j] ? y : -INFINITY;
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void
    scale_all(float (&s)[BLOCKS][NB][4])
    {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[b][n][i] *= x.scale;
                }
            }
        }
    }

    /* Weights of S^T in place of logits, packed and turned for the second product; l and e. */
    __device__ __forceinline__ void
    weigh(float (&s)[BLOCKS][NB][4], uint32_t (&p)[BLOCKS][NB][2], state<DV, NB> &c,
          float (&factor)[NB][2])
    {
        constexpr float raise = type_of<T>::shift == 0 ? 1.0f : (float)(1 << type_of<T>::shift);

#pragma unroll
        for (int n = 0; n < NB; n++) {
            float m[2], sum[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float top = -INFINITY, most = 0.0f;
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float y = s[b][n][2 * h + j];
                        top     = fmaxf(top, y);
                        most    = fmaxf(most, y == -INFINITY ? 0.0f : fabsf(y));
                    }
                }
#pragma unroll
                for (int o = 4; o < 32; o <<= 1) {
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
                }
                m[j] = top;
                if (most > Y_MAX && query_of[n][j] != CUDA_NONE) {
                    const cuda_query_t &query = x.queries[query_of[n][j]];
                    report(x, query.entry, query.query, head_of[n][j]);
                }
                float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float y            = exp2_of(s[b][n][2 * h + j] - base);
                        s[b][n][2 * h + j] = y;
                    }
                    sum[j] += s[b][n][j] + s[b][n][2 + j];
                }
#pragma unroll
                for (int o = 4; o < 32; o <<= 1) {
                    sum[j] += __shfl_xor_sync(~0u, sum[j], o);
                }
                if (top == -INFINITY) {
                    c.e[n][j]    = EMPTY_E;
                    c.l[n][j]    = 0.0f;
                    factor[n][j] = 0.0f;
                } else {
                    float e      = ceilf(fminf(fmaxf(top, -Y_MAX), Y_MAX));
                    float w      = exp2_of(top - e);
                    c.e[n][j]    = (int)e;
                    c.l[n][j]    = __fmul_rn(sum[j], w);
                    factor[n][j] = __fmul_rn(w, 1.0f / raise);
                }
                if (sum[j] != sum[j] && query_of[n][j] != CUDA_NONE) {
                    const cuda_query_t &query = x.queries[query_of[n][j]];
                    report(x, query.entry, query.query, head_of[n][j]);
                }
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                p[b][n][0] = turn(type_of<T>::pack(s[b][n][0] * raise, s[b][n][1] * raise));
                p[b][n][1] = turn(type_of<T>::pack(s[b][n][2] * raise, s[b][n][3] * raise));
            }
        }
    }

    /* Rows of V that no copy wrote are cleared, as far as the product reads: 0 * NaN is NaN. */
    __device__ __forceinline__ void
    clear_absent(uint32_t first, uint32_t tokens, uint64_t present)
    {
        constexpr int most = stage_tokens(DV);
        uint32_t base      = r.data + r.at * CUDA_STAGE;

        if (row_block == 0) {
            uint32_t end = min((uint32_t)most, (tokens - first + 15) / 16 * 16);
            for (uint32_t row = 0; row < end; row++) {
                if (present >> (first + row) & 1) {
                    continue;
                }
                for (int i = lane; i < DV / 8; i += 32) {
                    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                                     base + row * (DV * 2) + i * 16),
                                 "r"(0)
                                 : "memory");
                }
            }
            order_before_copies();
        }
        if (x.row_blocks > 1) {
            asm volatile("bar.sync %0, %1;" ::"r"(team_bar), "r"(x.row_blocks * 32) : "memory");
        }
        __syncwarp();
    }

    __device__ __forceinline__ void
    multiply_v(const cuda_leaf_t &leaf, uint64_t present, const uint32_t (&p)[BLOCKS][NB][2],
               state<DV, NB> &c)
    {
        constexpr int per_stage = stage_tokens(DV) / 16;
        const int mi = lane / 8, row = lane % 8;
        bool full = present == ~0ull >> (LEAF - leaf.tokens) && leaf.tokens % 16 == 0;

#pragma unroll
        for (int i = 0; i < DV / 16; i++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
                c.a[i][n][0] = c.a[i][n][1] = c.a[i][n][2] = c.a[i][n][3] = 0.0f;
            }
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            if (b * 16 >= leaf.tokens) {
                continue;
            }
            if (b % per_stage == 0) {
                barrier_wait(r.full + 8 * r.at, r.phase);
                if (!full) {
                    clear_absent(16 * b, leaf.tokens, present);
                }
            }
            uint32_t at = r.data + r.at * CUDA_STAGE +
                          (16 * (b % per_stage) + (mi >> 1) * 8 + row) * (DV * 2);
#pragma unroll
            for (int i = 0; i < DV / 16; i++) {
                uint32_t a[4];
                load_matrix_turned(a, at + (((2 * i + (mi & 1)) ^ row) << 4));
#pragma unroll
                for (int n = 0; n < NB; n++) {
                    type_of<T>::multiply(c.a[i][n], a, p[b][n][0], p[b][n][1]);
                }
            }
            if (b % per_stage == per_stage - 1 || (b + 1) * 16 >= leaf.tokens) {
                release();
            }
        }
    }

    __device__ __forceinline__ void
    compute_leaf(const cuda_leaf_t &leaf, uint64_t present, state<DV, NB> &c)
    {
        float s[BLOCKS][NB][4], factor[NB][2];
        uint32_t p[BLOCKS][NB][2];

        multiply_k(leaf, present, s);
        weigh(s, p, c, factor);
        multiply_v(leaf, present, p, c);
#pragma unroll
        for (int i = 0; i < DV / 16; i++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    c.a[i][n][j] = __fmul_rn(c.a[i][n][j], factor[n][j & 1]);
                }
            }
        }
    }

    /* ---- answers ---- */

    /* The states of a piece, for the merge kernel: c is the topmost of n. */
    __device__ void
    write_parts(uint32_t n, state<DV, NB> &c)
    {
        for (uint32_t i = n; i-- > 0;) {
            if (i + 1 < n) {
                kept.load(i, c);
            }
#pragma unroll
            for (int b = 0; b < NB; b++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    uint32_t row = row_block * (8 * NB) + 8 * b + 2 * (lane % 4) + j;
                    if (row >= piece.rows) {
                        continue;
                    }
                    uint64_t slot = piece.slot + (uint64_t)i * piece.rows + row;
                    float *a      = x.slot_a + slot * DV + lane / 4;
#pragma unroll
                    for (int k = 0; k < DV / 16; k++) {
                        a[16 * k]     = c.a[k][b][j];
                        a[16 * k + 8] = c.a[k][b][2 + j];
                    }
                    if (lane < 4) {
                        x.slot_l[slot] = c.l[b][j];
                        x.slot_e[slot] = c.e[b][j];
                    }
                }
            }
        }
    }

    __device__ void
    write_answer(const state<DV, NB> &c)
    {
#pragma unroll
        for (int b = 0; b < NB; b++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (query_of[b][j] == CUDA_NONE) {
                    continue;
                }
                const cuda_query_t &query = x.queries[query_of[b][j]];
                uint32_t head             = head_of[b][j];
                uint64_t row              = (uint64_t)query.answer * x.q_heads + head;
                bool bad                  = !is_finite(c.l[b][j]);
                finish_scales f           = finish_le(x, head, c.l[b][j], c.e[b][j]);
#pragma unroll
                for (int k = 0; k < DV / 16; k++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint64_t at = row * DV + 16 * k + 8 * h + lane / 4;
                        float a     = c.l[b][j] == 0.0f ? 0.0f : c.a[k][b][2 * h + j];
                        bad         = bad || !is_finite(a);
                        if (piece.states) {
                            x.a[at] = a;
                        } else if (x.o != nullptr) {
                            store_o(x, at, finish_a(f, a));
                        }
                    }
                }
                if (lane < 4 && piece.states) {
                    x.l[row] = c.l[b][j];
                    x.e[row] = c.e[b][j];
                } else if (lane < 4 && x.lse != nullptr) {
                    x.lse[row] = f.lse;
                }
                if (bad) {
                    report(x, query.entry, query.query, head);
                }
            }
        }
    }

    __device__ void
    run(const cuda_piece_t &given)
    {
        state<DV, NB> c;
        uint32_t n = 0;

        kept.busy                 = 0;
        piece                     = given;
        const cuda_leaf_t *leaves = x.leaves + piece.leaf_first;
        const uint32_t left = piece.levels & 255, right = piece.levels >> 8;
        cuda_leaf_t next = piece.n_leaves > 0 ? leaves[0] : cuda_leaf_t{};

        load_rows(piece.kv_head);
        set_empty(c);
        for (uint32_t i = 0; i < piece.n_leaves; i++) {
            cuda_leaf_t leaf = next;
            next             = leaves[min(i + 1, piece.n_leaves - 1)];
            uint64_t present =
                GENERAL ? present_of(x, piece, i, leaf.tokens) : ~0ull >> (LEAF - leaf.tokens);
            if (n > 0) {
                kept.fold(n, left, leaf.level, c);
                kept.push(n - 1, leaf.level, c);
            }
            kept.begin(n, leaf.level);
            n++;
            if (GENERAL && present == 0) {
                set_empty(c);
            } else {
                compute_leaf(leaf, present, c);
            }
        }
        kept.fold(n, left, right, c);
        if (piece.slot != CUDA_NONE) {
            write_parts(n, c);
        } else {
            write_answer(c);
        }
    }
};

/* ---- the kernel ---- */

template <class T, int DK, int DV, int NB, bool GENERAL>
__device__ __forceinline__ void
attend(const cuda_args_t &x)
{
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t full[32], empty[32];
    __shared__ uint8_t levels[CUDA_WARPS][3][64];
    using consumer_t = consumer<T, DK, DV, NB, GENERAL>;

    const uint32_t warp = threadIdx.x / 32, teams = CUDA_WARPS / x.row_blocks;
    const bool produces = warp >= CUDA_WARPS;
    const uint32_t team = produces ? warp - CUDA_WARPS : warp / x.row_blocks;

    let_next_kernel_begin();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < teams * x.stages; i++) {
            barrier_init(shared_of(&full[i]), x.bulk ? 1 : 32);
            barrier_init(shared_of(&empty[i]), x.row_blocks);
        }
        barriers_for_copies();
    }
    __syncthreads();
    if (team >= teams) {
        return;
    }
    ring r             = {shared_of(shared) + team * x.stages * CUDA_STAGE,
                          shared_of(&full[team * x.stages]),
                          shared_of(&empty[team * x.stages]),
                          x.stages,
                          0,
                          0};
    cuda_piece_t piece = x.pieces[blockIdx.x * teams + team];
    if (piece.kv_head == CUDA_NONE) {
        return;
    }
    if (produces) {
        producer<DK, DV> p(x, r, threadIdx.x % 32);
        for (;;) {
            p.run(piece);
            if (piece.next == CUDA_NONE) {
                break;
            }
            piece = x.pieces[piece.next];
        }
        if (!x.bulk) {
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
        return;
    }
    consumer_t c(x);
    c.r            = r;
    c.lane         = threadIdx.x % 32;
    c.row_block    = warp % x.row_blocks;
    c.team_bar     = 1 + team;
    c.kept.lane    = c.lane;
    c.kept.levels  = x.levels;
    c.kept.near_at = shared_of(shared) + teams * x.stages * CUDA_STAGE +
                     warp * x.levels * (stack<DV, NB>::WORDS * 4);
    c.kept.deep =
        x.deep + ((uint64_t)blockIdx.x * CUDA_WARPS + warp) * x.deep_levels * stack<DV, NB>::WORDS;
    c.kept.level_of = levels[warp][0];
    c.kept.highest  = levels[warp][1];
    c.kept.place_of = levels[warp][2];
    for (;;) {
        c.run(piece);
        if (piece.next == CUDA_NONE) {
            break;
        }
        piece = x.pieces[piece.next];
    }
}

#define KERNEL(name, NB, GENERAL)                                                                  \
    extern "C" __global__ void __launch_bounds__(CUDA_THREADS, 1)                                  \
        name(const __grid_constant__ cuda_args_t x)                                                \
    {                                                                                              \
        attend<ATTN_T, ATTN_DK, ATTN_DV, NB, GENERAL>(x);                                          \
    }

KERNEL(attend_8, 1, false)
KERNEL(attend_16, 2, false)
KERNEL(attend_8_general, 1, true)
KERNEL(attend_16_general, 2, true)
