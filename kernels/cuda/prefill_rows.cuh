/*
 * prefill_rows.cuh: the two rows that a thread of prefill.cu has a part of: what their logits
 * become, which tokens they see, and where their answers go.
 */
#ifndef ATTN_KERNELS_CUDA_PREFILL_ROWS_CUH
#define ATTN_KERNELS_CUDA_PREFILL_ROWS_CUH

#include "kernels/cuda/prefill_producer.cuh"

enum class mode { PLAIN, GENERAL, PARTS };

template <int DK, int DV, int N, mode MODE> struct prefill_rows {
    static constexpr bool GENERAL = MODE != mode::PLAIN;
    using walk_t                  = tile_walk<N, GENERAL>;

    const cuda_args_t &x;
    uint32_t row[2]; /* of the work; x.queries has what is not kept here */
    int position[2]; /* of its query */
    int lowest;      /* no row of the warp stands before */

    __device__ __forceinline__
    prefill_rows(const cuda_args_t &args)
        : x(args)
    {
    }

    __device__ __forceinline__ uint32_t
    head_of(const cuda_tile_t &work, uint32_t r) const
    {
        return work.kv_head * x.group + work.head_first + r % work.n_heads;
    }

    __device__ __forceinline__ const cuda_query_t &
    query_of(const cuda_tile_t &work, uint32_t r) const
    {
        return x.queries[work.query_first + r / work.n_heads];
    }

    /* The thread's rows are `first`, a multiple of 16 and its lane / 4, and the 8th after it. */
    __device__ __forceinline__ void
    begin(const cuda_tile_t &work, uint32_t first)
    {
        lowest = work.position + (int)(first / 16 * 16 / work.n_heads);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[h]      = first + 8 * h;
            position[h] = work.position + (int)(row[h] / work.n_heads);
            if (GENERAL && row[h] < work.rows) {
                position[h] = query_of(work, row[h]).position;
            }
        }
    }

    /* PARTS: the i-th 16 elements of the rows' q. */
    __device__ __forceinline__ void
    load_q(const cuda_tile_t &work, uint32_t part, int i, int lane, uint32_t (&q)[4]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            bool there          = row[h] < work.rows;
            uint32_t r          = there ? row[h] : 0;
            const uint8_t *from = x.q + part * x.q_part_stride +
                                  query_of(work, r).q_row * x.q_row_stride +
                                  head_of(work, r) * x.q_head_stride + lane % 4 * 4;
            q[h]     = there ? *(const uint32_t *)(from + 32 * i) : 0;
            q[2 + h] = there ? *(const uint32_t *)(from + 32 * i + 16) : 0;
        }
    }

    /* ---- hooks: who sees a token, and what a logit becomes ---- */

    /* Of a row with a mask: new tokens of the tile that it names, and how many it names before. */
    __device__ __forceinline__ columns<N>
    named_in(const walk_t &w, const cuda_query_t &query, int &before) const
    {
        const uint8_t *bits = x.masks + query.mask;
        int j               = max(w.position - query.mask_base, 0);
        int end             = w.position + (int)w.tokens - query.mask_base;
        columns<N> named    = {0, 0};

        before = 0;
#pragma unroll 1
        for (int i = 0; i < j; i++) {
            before += bits[i / 8] >> (i % 8) & 1;
        }
#pragma unroll 1
        for (; j < end; j++) {
            if (bits[j / 8] >> (j % 8) & 1) {
                named.add(query.mask_base + j - w.position);
            }
        }
        return named;
    }

    /* Where the token of a column stands for a row with a mask. */
    __device__ __forceinline__ int
    stands(const walk_t &w, int mask_base, int column, const columns<N> &named, int before) const
    {
        if (w.position + column < mask_base) {
            return w.position + column;
        }
        return mask_base + before + named.both(columns<N>::between(0, column)).count();
    }

    /* The columns that a row sees. If it has a mask and the tile new tokens: those that it names,
     * and how many it names before. */
    __device__ __forceinline__ columns<N>
    seen_by(const walk_t &w, int h, const cuda_query_t *query, columns<N> &named, int &before) const
    {
        bool has_mask = query != nullptr && query->mask != CUDA_NONE;
        bool masked   = has_mask && w.position + (int)w.tokens > query->mask_base;
        int from = 0, to = (int)w.tokens;

        named  = {0, 0};
        before = 0;
        if (x.window > 0) {
            from = position[h] - x.window + 1 - w.position;
        }
        if (masked) {
            to = query->mask_base - w.position;
        } else if (x.causal && !has_mask) {
            to = min(to, position[h] - w.position + 1);
        }
        columns<N> seen = columns<N>::between(from, to);
        if (masked) {
            named = named_in(w, *query, before);
#pragma unroll 1
            for (int i = max(to, 0); i < (int)w.tokens; i++) {
                int t = stands(w, query->mask_base, i, named, before);
                if (named.has(i) && (x.window <= 0 || position[h] - t < x.window)) {
                    seen.add(i);
                }
            }
        }
        return seen.both(w.here);
    }

    /* Sums of products of a row as logits times log2 e. */
    __device__ __forceinline__ void
    scale_row(const walk_t &w, int h, int lane, const cuda_query_t *query, const columns<N> &named,
              int before, float (&s)[N / 2]) const
    {
        const uint32_t head = head_of(*w.work, row[h]);
        float by = 1.0f, slope = 0.0f;

        if (MODE == mode::PARTS && query != nullptr && x.q_scale != nullptr) {
            by = x.q_scale[(uint64_t)query->q_row * x.q_heads + head];
        }
        if (x.softcap == 0 && x.slopes == nullptr) {
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                s[4 * j + 2 * h]     = s[4 * j + 2 * h] * by * x.scale;
                s[4 * j + 2 * h + 1] = s[4 * j + 2 * h + 1] * by * x.scale;
            }
            return;
        }
        if (x.slopes != nullptr && query != nullptr) {
            slope = x.slopes[head];
        }
        const int behind = position[h] - w.position - 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float y = s[4 * j + 2 * h + i] * by * x.scale;
                if (x.softcap > 0) {
                    y = x.softcap * tanhf(y / x.softcap);
                }
                int distance = behind - 8 * j - i;
                if (named.any()) {
                    distance = position[h] - stands(w, query->mask_base, 8 * j + 2 * (lane % 4) + i,
                                                    named, before);
                }
                y += slope * (float)-distance;
                s[4 * j + 2 * h + i] = y * LOG2_E;
            }
        }
    }

    /* Sums of products become logits; -inf where a row does not see a token. most: the largest
     * magnitudes so far. */
    __device__ __forceinline__ void
    logits(const walk_t &w, int lane, float (&s)[N / 2], float (&most)[2]) const
    {
        if constexpr (GENERAL) {
            logits_general(w, lane, s, most);
            return;
        }
        bool all = w.tokens == N && (!x.causal || w.position + N - 1 <= lowest);
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            s[i] *= x.scale;
        }
        if (!all) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int seen = (int)w.tokens;
                if (x.causal) {
                    seen = min(seen, position[h] - w.position + 1);
                }
                seen -= 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float y              = s[4 * j + 2 * h + i];
                        bool in              = 8 * j + i < seen;
                        most[h]              = fmaxf(most[h], in ? fabsf(y) : 0.0f);
                        s[4 * j + 2 * h + i] = in ? y : -INFINITY;
                    }
                }
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(s[i]));
        }
    }

    __device__ __forceinline__ void
    logits_general(const walk_t &w, int lane, float (&s)[N / 2], float (&most)[2]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const cuda_query_t *query =
                row[h] < w.work->rows ? &query_of(*w.work, row[h]) : nullptr;
            columns<N> named;
            int before;
            columns<N> seen = seen_by(w, h, query, named, before);

            scale_row(w, h, lane, query, named, before, s);
            seen.low >>= 2 * (lane % 4); /* no column of this lane is lost */
            seen.high >>= 2 * (lane % 4);
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float y = s[4 * j + 2 * h + i];
                    bool in = (8 * j >= 64 ? seen.high : seen.low) >> (8 * j % 64 + i) & 1;
                    most[h] = fmaxf(most[h], in ? fabsf(y) : 0.0f);
                    s[4 * j + 2 * h + i] = in ? y : -INFINITY;
                }
            }
        }
    }

    /* ---- answers ---- */

    __device__ __forceinline__ void
    report_row(const cuda_tile_t &work, int h) const
    {
        if (row[h] < work.rows) {
            const cuda_query_t &query = query_of(work, row[h]);
            report(x, query.entry, query.query, head_of(work, row[h]));
        }
    }

    /* Columns 8 j + 2 (lane % 4) and the next of a row of f32. */
    __device__ __forceinline__ void
    store_f32(float *to, int h, int lane, const float (&o)[DV / 2]) const
    {
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
            *(float2 *)(to + 8 * j + 2 * (lane % 4)) =
                make_float2(o[4 * j + 2 * h], o[4 * j + 2 * h + 1]);
        }
    }

    /* State i of a work that was cut, for the merge kernel. */
    __device__ __forceinline__ void
    write_part(const cuda_tile_t &work, uint32_t i, int lane, const float (&o)[DV / 2],
               const float (&l)[2], const int (&e)[2]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (row[h] < work.rows) {
                uint64_t slot = work.slot + (uint64_t)i * work.rows + row[h];
                store_f32(x.slot_a + slot * DV, h, lane, o);
                if (lane % 4 == 0) {
                    x.slot_l[slot] = l[h];
                    x.slot_e[slot] = e[h];
                }
            }
        }
    }

    /*
     * A row of O of 16 bits: the four lanes that share it turn their words of four blocks of 8
     * columns, so that each stores 16 bytes.
     */
    template <class U>
    __device__ __forceinline__ void
    store_16(uint8_t *to, bool there, int h, int lane, const float (&o)[DV / 2]) const
    {
        const int t = lane % 4;
#pragma unroll
        for (int j = 0; j < DV / 8; j += 4) {
            uint32_t a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = type_of<U>::pack(o[4 * (j + i) + 2 * h], o[4 * (j + i) + 2 * h + 1]);
            }
            /* a[i] of lane t is word t of block i; wanted is word i of block t. */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t give = t & 2 ? a[i] : a[i + 2];
                uint32_t got  = __shfl_xor_sync(~0u, give, 2);
                b[i]          = t & 2 ? got : a[i];
                b[i + 2]      = t & 2 ? a[i + 2] : got;
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                uint32_t give = t & 1 ? b[i] : b[i + 1];
                uint32_t got  = __shfl_xor_sync(~0u, give, 1);
                a[i]          = t & 1 ? got : b[i];
                a[i + 1]      = t & 1 ? b[i + 1] : got;
            }
            if (there) {
                *(uint4 *)(to + 16 * (j + t)) = make_uint4(a[0], a[1], a[2], a[3]);
            }
        }
    }

    /* The largest magnitude of a row, not finite if one is not, and the smallest but 0. */
    struct magnitudes {
        float most, least;
    };

    __device__ __forceinline__ static magnitudes
    magnitudes_of(int h, const float (&o)[DV / 2])
    {
        float most     = 0.0f;
        uint32_t least = 0xfeffffff; /* twice the bits less 1: without the sign, and 0 last */

#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float a = o[4 * j + 2 * h + i];
                most    = larger(most, fabsf(a));
                least   = min(least, 2 * __float_as_uint(a) - 1);
            }
        }
        return {most, __uint_as_float(least / 2 + 1)};
    }

    __device__ __forceinline__ void
    write_answer(const near_work &work, int lane, float (&o)[DV / 2], const float (&l)[2],
                 const int (&e)[2], float4 *room) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            bool there    = row[h] < work.rows;
            uint32_t r    = there ? row[h] : 0;
            uint32_t head = head_of(work, r);
            uint64_t at   = (uint64_t)work.answer[r] * x.q_heads + head;

            if (l[h] == 0.0f) {
#pragma unroll
                for (int j = 0; j < DV / 8; j++) {
                    o[4 * j + 2 * h] = o[4 * j + 2 * h + 1] = 0.0f;
                }
            }
            magnitudes of = magnitudes_of(h, o);
            if (!is_finite(l[h]) || !is_finite(of.most)) {
                report_row(work, h);
            }
            if (work.states) {
                if (there) {
                    store_f32(x.a + at * DV, h, lane, o);
                    if (lane % 4 == 0) {
                        x.l[at] = l[h];
                        x.e[at] = e[h];
                    }
                }
                continue;
            }
            finish_scales f = finish_le(x, head, l[h], e[h]);
            finish_row(f, of, h, o, room);
            if (x.o == nullptr) {
            } else if (x.o_type == 1) { /* ATTN_F32 */
                if (there) {
                    store_f32((float *)x.o + at * DV, h, lane, o);
                }
            } else if (x.o_type == 2) { /* ATTN_F16 */
                store_16<__half>((uint8_t *)x.o + at * (DV * 2), there, h, lane, o);
            } else {
                store_16<__nv_bfloat16>((uint8_t *)x.o + at * (DV * 2), there, h, lane, o);
            }
            if (there && lane % 4 == 0 && x.lse != nullptr) {
                x.lse[at] = f.lse;
            }
        }
    }

    /*
     * finish_a() of a row. Where nothing is very large or small the quotient comes from the
     * divisor's reciprocal and two corrections, each by the exact rest: the same bits, for what
     * remains after the first is far below half a place. Otherwise by division, in the thread's
     * place on the stack (prefill_consumer::entry()): in registers it would be a copy of its code
     * for each element.
     */
    __device__ __forceinline__ void
    finish_row(const finish_scales &f, const magnitudes &of, int h, float (&o)[DV / 2],
               float4 *room) const
    {
        bool tame = f.l > 0x1p-40f && f.l < 0x1p40f && !f.zero && of.most * f.scale < 0x1p60f &&
                    of.least * f.scale > 0x1p-60f;
        if (!__all_sync(~0u, tame)) {
            float2 *at = (float2 *)room;
#pragma unroll
            for (int j = 0; j < DV / 8; j++) {
                at[j * 256] = make_float2(o[4 * j + 2 * h], o[4 * j + 2 * h + 1]);
            }
#pragma unroll 1
            for (int j = 0; j < DV / 8; j++) {
                at[j * 256] = make_float2(finish_a(f, at[j * 256].x), finish_a(f, at[j * 256].y));
            }
#pragma unroll
            for (int j = 0; j < DV / 8; j++) {
                o[4 * j + 2 * h]     = at[j * 256].x;
                o[4 * j + 2 * h + 1] = at[j * 256].y;
            }
            return;
        }
        float r = __fdiv_rn(1.0f, f.l);
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float a              = __fmul_rn(o[4 * j + 2 * h + i], f.scale);
                o[4 * j + 2 * h + i] = divide_near(a, f.l, r);
            }
        }
    }
};

#endif
