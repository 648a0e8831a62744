/* prefill_consumer.cuh: what a consumer warpgroup of prefill.cu does. */
#ifndef ATTN_KERNELS_CUDA_PREFILL_CONSUMER_CUH
#define ATTN_KERNELS_CUDA_PREFILL_CONSUMER_CUH

#include "kernels/cuda/prefill_producer.cuh"
#include "kernels/cuda/prefill_rows.cuh"

#ifndef ATTN_EMULATED
#include "kernels/cuda/wgmma.cuh"
#endif

#define TURN_BARRIER 1 /* and the ones after it: named barriers of the turns */

template <class T, int DK, int DV, mode MODE> struct prefill_consumer {
    static constexpr int N        = CUDA_MANY_TOKENS(DV);
    static constexpr int STAGES   = CUDA_MANY_STAGES(DK, DV);
    static constexpr bool GENERAL = MODE != mode::PLAIN;
    /* Weights of the next leaf, and of the next work, begin before this one is over. */
    static constexpr bool OVER_LEAVES = MODE != mode::PARTS && DV <= 128;
    static constexpr bool OVER_WORKS  = OVER_LEAVES && CUDA_MANY_PLACES(DK, DV) > 1;
    using walk_t                      = tile_walk<N, GENERAL>;
    using rows_t                      = prefill_rows<DK, DV, N, MODE>;

    const cuda_args_t &x;
    tile_ring<STAGES, N * DK * 2> k;
    tile_ring<STAGES, N * DV * 2> v;
    q_ring<DK, DV> q;
    const near_work *works;
    const uint32_t group;
    const int lane;

    uint32_t work_at;
    const near_work *work; /* read again when needed: registers are few */
    rows_t rows;           /* of the walk's work */

    /* Of the leaf whose weights are computed: rows lane / 4 (+ 8) of the warp's 16. */
    float m[2], sum[2], most[2];
    bool begun;        /* there are already the first */
    uint32_t p[N / 4]; /* the last, whose V is still to come */

    /* Of the leaf that is summed, then of a state. */
    float o[DV / 2];
    float top[2], l[2];
    int e[2];

    __device__ __forceinline__
    prefill_consumer(const cuda_args_t &args, const near_work *of_cta, uint32_t number)
        : x(args), works(of_cta), group(number), lane((int)(threadIdx.x % 32)), rows(args)
    {
    }

    /* ---- products ---- */

    __device__ __forceinline__ void
    issue_k(float (&s)[N / 2])
    {
        const uint64_t rows_of_q =
            tile_rows_descriptor(q.stage() + group * (64 * DK * 2), DK / 64, 0);
        const uint64_t rows_of_k = tile_rows_descriptor(k.stage(), DK / 64, 0);
#pragma unroll
        for (int i = 0; i < DK / 16; i++) {
            wgmma<T, N>::rows(s, tile_rows_further(rows_of_q, i), tile_rows_further(rows_of_k, i),
                              i > 0);
        }
    }

    /* The same for Q of several parts, from global memory; waits for it. */
    __device__ __forceinline__ void
    issue_parts(float (&s)[N / 2])
    {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            s[i] = 0.0f;
        }
#pragma unroll 1
        for (uint32_t part = 0; part < x.q_parts; part++) {
#pragma unroll
            for (int i = 0; i < DK / 16; i++) {
                uint32_t q[4];
                rows.load_q(*work, part, i, lane, q);
                wgmma_hold(s);
                wgmma_hold(q);
                wgmma_begin();
                wgmma<T, N>::template mixed<0>(s, q, tile_rows_descriptor(k.stage(), DK / 64, i),
                                               1);
                wgmma_commit();
                wgmma_wait<0>();
                wgmma_hold(s);
                wgmma_hold(q);
            }
        }
    }

    __device__ __forceinline__ void
    issue_v()
    {
        const uint64_t rows_of_v = tile_sum_descriptor(v.stage(), DV / 64, 0);
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            wgmma<T, DV>::template mixed<1>(o, p + 4 * i, tile_sum_further(rows_of_v, DV / 64, i),
                                            1);
        }
    }

    /* Until a stage of K or V is full. Pieces were written by other means than products read by. */
    template <class R>
    __device__ __forceinline__ void
    await(const R &r)
    {
        r.wait_full();
        if (!x.bulk) {
            order_before_copies();
        }
    }

    template <class R>
    __device__ __forceinline__ void
    release(R &r)
    {
        if (lane == 0) {
            barrier_arrive(r.empty(r.at));
        }
        r.next();
    }

    /* The warpgroups take turns at issuing products. */
    __device__ __forceinline__ void
    take_turn()
    {
        named_wait(TURN_BARRIER + group, 256);
    }

    __device__ __forceinline__ void
    pass_turn()
    {
        named_arrive(TURN_BARRIER + (group + 1 == CUDA_MANY_GROUPS ? 0 : group + 1), 256);
    }

    /* ---- weights ---- */

    /* Weights in place of logits; m and sum. What was summed before is to be multiplied by factor.
     */
    __device__ __forceinline__ void
    weigh(float (&s)[N / 2], float (&factor)[2])
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float high[2] = {m[h], -INFINITY}, add[2] = {0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                high[0] = fmaxf(high[0], s[4 * j + 2 * h]);
                high[1] = fmaxf(high[1], s[4 * j + 2 * h + 1]);
            }
            high[0]    = fmaxf(high[0], high[1]);
            high[0]    = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 1));
            high[0]    = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 2));
            float base = high[0] == -INFINITY ? 0.0f : high[0];
            factor[h]  = exp2_of(m[h] - base);
            m[h]       = high[0];
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    s[4 * j + 2 * h + i] = exp2_of(s[4 * j + 2 * h + i] - base);
                    add[i] += s[4 * j + 2 * h + i];
                }
            }
            sum[h] = __fmaf_rn(sum[h], factor[h], add[0] + add[1]);
        }
    }

    __device__ __forceinline__ void
    pack(const float (&s)[N / 2])
    {
        constexpr float raise = type_of<T>::shift == 0 ? 1.0f : (float)(1 << type_of<T>::shift);

#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            p[i] = type_of<T>::pack(s[2 * i] * raise, s[2 * i + 1] * raise);
        }
    }

    /* Multiplying by 1 changes nothing, and m seldom grows. */
    __device__ __forceinline__ void
    rescale(const float (&factor)[2])
    {
        if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < DV / 8; j++) {
                o[4 * j]     = __fmul_rn(o[4 * j], factor[0]);
                o[4 * j + 1] = __fmul_rn(o[4 * j + 1], factor[0]);
                o[4 * j + 2] = __fmul_rn(o[4 * j + 2], factor[1]);
                o[4 * j + 3] = __fmul_rn(o[4 * j + 3], factor[1]);
            }
        }
    }

    /* ---- a leaf ---- */

    __device__ __forceinline__ void
    clear_sums()
    {
#pragma unroll
        for (int i = 0; i < DV / 2; i++) {
            o[i] = 0.0f;
        }
        wgmma_hold(o); /* or constants are kept beside o, and registers are few */
    }

    __device__ __forceinline__ void
    begin_weights()
    {
        m[0] = m[1] = -INFINITY;
        sum[0] = sum[1] = most[0] = most[1] = 0.0f;
    }

    /* All weights of the leaf are there. A sum that is not a number is reported with it. */
    __device__ __forceinline__ void
    end_weights()
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = m[h];
            l[h]   = most[h] > Y_MAX ? NAN : sum[h];
        }
    }

    /* The walk to the next leaf, of this work or of the next one. All products with Q are done
     * where that was the last: it may be overwritten. */
    __device__ __forceinline__ void
    go_on(walk_t &w, bool last)
    {
        if (!last) {
            w.go_on();
            return;
        }
        release(q);
        if (OVER_WORKS && work->next != CUDA_NONE) {
            q.wait_full();
            w.begin(works + (work_at + 1 == NEAR_WORKS ? 0 : work_at + 1));
        } else {
            w.stop();
        }
    }

    /* Sums over the tiles of a leaf, one product after the other: Q of several parts needs the
     * registers. */
    __device__ __forceinline__ void
    sum_leaf_of_parts(walk_t &w, bool last)
    {
        float s[N / 2], factor[2];

        begin_weights();
        while (w.next()) {
            await(k);
            issue_parts(s);
            release(k);
            rows.logits(w, lane, s, most);
            weigh(s, factor);
            rescale(factor);
            pack(s);
            sum_v();
        }
        end_weights();
        go_on(w, last);
    }

    /* The first weights of a leaf. */
    __device__ __forceinline__ void
    begin_leaf(walk_t &w)
    {
        float s[N / 2], factor[2];

        await(k);
        wgmma_begin();
        issue_k(s);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(s);
        release(k);
        rows.logits(w, lane, s, most);
        weigh(s, factor);
        pack(s);
    }

    /* Sums over the tiles of a leaf, and the first weights of what follows it. */
    __device__ __forceinline__ void
    sum_leaf(walk_t &w, bool last)
    {
        float s[N / 2], factor[2];

        if (!begun) {
            begin_weights();
            if (!w.next()) {
                end_weights();
                go_on(w, last);
                return;
            }
            begin_leaf(w);
        }
        for (begun = false; !begun;) {
            if (!w.next()) {
                end_weights();
                go_on(w, last);
                if (!(last ? OVER_WORKS : OVER_LEAVES) || !w.next()) {
                    sum_v();
                    return;
                }
                begun = true;
                begin_weights();
            }
            await(k);
            take_turn();
            wgmma_hold(o);
            wgmma_hold(p);
            wgmma_begin();
            issue_k(s);
            wgmma_commit();
            await(v);
            wgmma_begin();
            issue_v();
            wgmma_commit();
            pass_turn();
            if (begun && last) {
                begin_rows(*w.work);
            }
            wgmma_wait<1>();
            wgmma_hold(s);
            release(k);
            rows.logits(w, lane, s, most);
            weigh(s, factor);
            wgmma_wait<0>();
            wgmma_hold(o);
            wgmma_hold(p);
            release(v);
            if (!begun) {
                rescale(factor);
            }
            pack(s);
        }
    }

    /* Adds the products of weights and V, and waits for them. */
    __device__ __forceinline__ void
    sum_v()
    {
        await(v);
        wgmma_hold(o);
        wgmma_hold(p);
        wgmma_begin();
        issue_v();
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(o);
        release(v);
    }

    /* The sums become a state. */
    __device__ __forceinline__ void
    leave_leaf()
    {
        constexpr float raise = type_of<T>::shift == 0 ? 1.0f : (float)(1 << type_of<T>::shift);
        float factor[2];

#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = l[h];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            if (all != all) {
                rows.report_row(*work, h);
            }
            if (top[h] == -INFINITY) {
                e[h]      = EMPTY_E;
                l[h]      = 0.0f;
                factor[h] = 0.0f;
            } else {
                float up  = ceilf(fminf(fmaxf(top[h], -Y_MAX), Y_MAX));
                float w   = exp2_of(top[h] - up);
                e[h]      = (int)up;
                l[h]      = __fmul_rn(all, w);
                factor[h] = __fmul_rn(w, 1.0f / raise);
            }
        }
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                o[4 * j + i] = __fmul_rn(o[4 * j + i], factor[i / 2]);
            }
        }
    }

    /* ---- the stack, in global memory ---- */

    __device__ __forceinline__ float4 *
    entry(uint32_t i) const
    {
        uint64_t stack = (uint64_t)blockIdx.x * CUDA_MANY_GROUPS + group;
        return (float4 *)(x.deep + (stack * x.deep_levels + i) * CUDA_MANY_STATE(DV)) +
               threadIdx.x % 128;
    }

    __device__ __forceinline__ void
    put(uint32_t i) const
    {
        float4 *at = entry(i);
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
            at[j * 128] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
        }
        at[DV / 8 * 128] = make_float4(l[0], l[1], __int_as_float(e[0]), __int_as_float(e[1]));
    }

    /* The state becomes merge(state i of the stack, it). */
    __device__ __forceinline__ void
    merge_below(uint32_t i)
    {
        const float4 *at = entry(i);
        float4 le        = at[DV / 8 * 128];
        float into_l[2]  = {le.x, le.y};
        int into_e[2]    = {__float_as_int(le.z), __float_as_int(le.w)};
        merge_scales scales[2];

#pragma unroll
        for (int h = 0; h < 2; h++) {
            scales[h] = merge_le(into_l[h], into_e[h], l[h], e[h]);
            l[h]      = into_l[h];
            e[h]      = into_e[h];
        }
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
            float4 from  = at[j * 128];
            o[4 * j]     = merge_a(scales[0], from.x, o[4 * j]);
            o[4 * j + 1] = merge_a(scales[0], from.y, o[4 * j + 1]);
            o[4 * j + 2] = merge_a(scales[1], from.z, o[4 * j + 2]);
            o[4 * j + 3] = merge_a(scales[1], from.w, o[4 * j + 3]);
        }
    }

    __device__ __forceinline__ void
    load(uint32_t i)
    {
        const float4 *at = entry(i);
        float4 le        = at[DV / 8 * 128];
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
            float4 from  = at[j * 128];
            o[4 * j]     = from.x;
            o[4 * j + 1] = from.y;
            o[4 * j + 2] = from.z;
            o[4 * j + 3] = from.w;
        }
        l[0] = le.x;
        l[1] = le.y;
        e[0] = __float_as_int(le.z);
        e[1] = __float_as_int(le.w);
    }

    /* Nodes below `level` end here. */
    __device__ __forceinline__ void
    merge_nodes(waiting &waits, uint32_t level)
    {
        while (waits.newest_below(level)) {
            waits.take();
            merge_below(waits.count());
        }
    }

    /* ---- works ---- */

    /* The thread's rows of a work. */
    __device__ __forceinline__ void
    begin_rows(const cuda_tile_t &of)
    {
        rows.begin(of, group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4);
    }

    /* All leaves of the work. Leaves the walk where the next work begins. */
    __device__ __forceinline__ void
    run_work(walk_t &w)
    {
        uint32_t left = work->levels & 255, written = 0;
        waiting waits = {0};

        for (uint32_t i = 0; i < work->n_leaves; i++) {
            bool last = i + 1 == work->n_leaves;
            if (i > 0) {
                merge_nodes(waits, w.leaf.level);
                if (waits.none() && w.leaf.level >= left) {
                    rows.write_part(*work, written++, lane, o, l, e);
                    left = w.leaf.level;
                } else {
                    put(waits.count());
                    waits.add(w.leaf.level);
                }
            }
            clear_sums();
            if constexpr (MODE == mode::PARTS) {
                sum_leaf_of_parts(w, last);
            } else {
                sum_leaf(w, last);
            }
            leave_leaf();
        }
        if (work->n_leaves == 0) {
            clear_sums();
            l[0] = l[1] = 0.0f;
            e[0] = e[1] = EMPTY_E;
            go_on(w, true);
        }
        merge_nodes(waits, work->levels >> 8);
        if (work->slot == CUDA_NONE) {
            rows.write_answer(*work, lane, o, l, e, entry(0));
        } else if (work->n_leaves > 0) {
            rows.write_part(*work, written + waits.count(), lane, o, l, e);
            while (!waits.none()) {
                waits.take();
                load(waits.count());
                rows.write_part(*work, written + waits.count(), lane, o, l, e);
            }
        }
    }

    __device__ __forceinline__ void
    run()
    {
        walk_t w(x);

        if (group + 1 == CUDA_MANY_GROUPS) {
            pass_turn(); /* the first warpgroup begins */
        }
        begun   = false;
        work_at = 0;
        for (;;) {
            work = works + work_at;
            if (!begun) {
                q.wait_full();
                w.begin(work);
                begin_rows(*work);
            }
            run_work(w);
            if (work->next == CUDA_NONE) {
                break;
            }
            work_at = work_at + 1 == NEAR_WORKS ? 0 : work_at + 1;
        }
    }
};

#endif
