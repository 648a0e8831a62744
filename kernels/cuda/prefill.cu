/*
 * prefill.cu: paged attention of requests of many packed rows on the matrix units of warpgroups
 * (sm_90a).
 *
 * A CTA has a producer warpgroup and consumer warpgroups of 64 rows (queries x heads of a group)
 * each. It goes over the works that the host dealt to it, longest first, and in each over the tiles
 * of K and V that some row of the work sees, ascending in position:
 *
 *     S = Q K^T     both from shared memory, 64 x 128 tokens (64 with 256 columns of V)
 *     O += P V      P from registers, V as it was stored: its rows run along the sum
 *
 * A tile's S is issued together with the O of the tile before, also where that is the last of a
 * leaf or of a work, so that the matrix unit works while weights are computed; and the warpgroups
 * take turns at issuing, so that one computes weights while the other's products run. What becomes
 * of a leaf or a work comes after the first weights of what follows it, while the other warpgroup's
 * products run.
 *
 * A leaf (up to a chunk of positions) keeps the running maximum m of each row: weights are
 * 2^(y - m), and when m grows, what was summed is multiplied by 2^(m_old - m). On leaving the leaf
 * A and l are multiplied once by 2^(m - e), and states of leaves merge along the tree, on a stack
 * in global memory. Tiles begin at multiples of their length in the leaf and a masked weight is
 * exactly 0, which changes neither m nor a sum: a row's bits do not depend on which tiles the other
 * rows of its work made it pass.
 *
 * Compiled for one type (ATTN_T), and head dims of K and V (ATTN_DK, ATTN_DV), in three modes:
 * plain; general, with windows, soft caps, slopes, masks and sparse lists; and general for queries
 * of several parts, which come from global memory to registers.
 */
#include "kernels/cuda/prefill_consumer.cuh"

template <class T, int DK, int DV, mode MODE>
__device__ __forceinline__ void
produce(const cuda_args_t &x, const cuda_map_t *k_map, const cuda_map_t *v_map,
        const typename kv_producer<DK, DV, MODE != mode::PLAIN>::k_ring &k,
        const typename kv_producer<DK, DV, MODE != mode::PLAIN>::v_ring &v, q_ring<DK, DV> q,
        near_work *works)
{
    const uint32_t warp = threadIdx.x / 32;
    const int lane      = threadIdx.x % 32;

    if (warp == GATHER_WARPS) {
        for (uint32_t at = blockIdx.x, i = 0; at != CUDA_NONE;
             i = i + 1 == NEAR_WORKS ? 0 : i + 1) {
            const cuda_tile_t &work = x.tiles[at]; /* read again when needed: registers are few */
            bring_work<DK, MODE != mode::PARTS>(x, work, works[i], q, lane);
            at = work.next;
        }
    } else if (warp == 0 || !x.bulk) {
        kv_producer<DK, DV, MODE != mode::PLAIN> p(x, k_map, v_map);
        p.k    = k;
        p.v    = v;
        p.lane = lane;
        p.warp = warp;
        for (uint32_t at = blockIdx.x; at != CUDA_NONE;) {
            const cuda_tile_t &work = x.tiles[at]; /* read again when needed: registers are few */
            p.run(work);
            at = work.next;
        }
        p.end();
    }
}

template <class T, int DK, int DV, mode MODE>
__device__ __forceinline__ void
prefill(const cuda_args_t &x, const cuda_map_t *k_map, const cuda_map_t *v_map)
{
    constexpr int STAGES = CUDA_MANY_STAGES(DK, DV), PLACES = CUDA_MANY_PLACES(DK, DV);
    constexpr int N = CUDA_MANY_TOKENS(DV);
    /* Registers: what a thread of each warpgroup has before, 168 or 128, is dealt anew. */
    constexpr int FEW  = MODE == mode::PLAIN && DK <= 128 ? 216 : DV > 128 ? 232 : 224;
    constexpr int TAKE = CUDA_MANY_GROUPS == 2 ? FEW : 160;
    constexpr int GIVE = CUDA_MANY_GROUPS == 2 ? 3 * 168 - 2 * TAKE : 4 * 128 - 3 * TAKE;
    SHARED_MEMORY(shared);
    __shared__ near_work works[NEAR_WORKS];
    __shared__ __align__(8) uint64_t barriers[4 * STAGES + 2 * PLACES];
    const uint32_t bars  = shared_of(barriers);
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / 128, 0); /* known as one of the warp */
    q_ring<DK, DV> q     = {(shared_of(shared) + 1023) & ~1023u, bars + 32 * STAGES, 0, 0};
    tile_ring<STAGES, N *DK * 2> k = {q.data + PLACES * CUDA_MANY_Q(DK), bars, 0, 0};
    tile_ring<STAGES, N *DV * 2> v = {k.data + STAGES * N * DK * 2, bars + 16 * STAGES, 0, 0};

    let_next_kernel_begin();
    if (x.tiles[blockIdx.x].kv_head == CUDA_NONE) { /* more CTAs were launched than have work */
        return;
    }
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(k.full(i), x.bulk ? 1 : 32 * GATHER_WARPS);
            barrier_init(v.full(i), x.bulk ? 1 : 32 * GATHER_WARPS);
            barrier_init(k.empty(i), 4 * CUDA_MANY_GROUPS);
            barrier_init(v.empty(i), 4 * CUDA_MANY_GROUPS);
        }
        for (uint32_t i = 0; i < PLACES; i++) {
            barrier_init(q.full(i), 32);
            barrier_init(q.empty(i), 4 * CUDA_MANY_GROUPS);
        }
        barriers_for_copies();
    }
    __syncthreads();
    if (group == 0) {
        registers_give<GIVE>();
        produce<T, DK, DV, MODE>(x, k_map, v_map, k, v, q, works);
    } else {
        registers_take<TAKE>();
        prefill_consumer<T, DK, DV, MODE> c(x, works, group - 1);
        c.k = k;
        c.v = v;
        c.q = q;
        c.run();
    }
}

#define KERNEL(name, MODE)                                                                         \
    extern "C" __global__ void __launch_bounds__(CUDA_MANY_THREADS, 1)                             \
        name(const __grid_constant__ cuda_args_t x, const __grid_constant__ cuda_map_t k_map,      \
             const __grid_constant__ cuda_map_t v_map)                                             \
    {                                                                                              \
        prefill<ATTN_T, ATTN_DK, ATTN_DV, MODE>(x, &k_map, &v_map);                                \
    }

KERNEL(prefill_plain, mode::PLAIN)
KERNEL(prefill_general, mode::GENERAL)
KERNEL(prefill_parts, mode::PARTS)
