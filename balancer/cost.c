/*
 * One decode query over T tokens on N workers, merged by the client:
 *
 *     read(T, N)  = T * kv_token_bytes / N / read_bandwidth
 *     fan_out(N)  = hop + (N * (q + partial) - (q + o)) / link_bandwidth    for N > 1
 *     layer(T, N) = read(T, N) + fan_out(N)
 *
 * The first hop and the bytes of q and o are paid with one worker too and cancel; the hop in
 * fan_out is the wait for the slowest of several answers in place of one. A partial is a
 * float per element of o and its l and e.
 *
 * A spread sequence of C chunks is on n = min(C, N, 64) workers, for the tree has 64 lanes, and
 * the one with the most of it has ceil(C / n) chunks. It is faster than a whole one where
 *
 *     read(C chunks, 1) > read(ceil(C / n) chunks, 1) + fan_out(n)
 *
 * Both sides are linear in C up to min(N, 64), and C - ceil(C / n) never falls after that, so
 * there is one break-even.
 */
#include "balancer/cost.h"
#include "base/checked.h"

#include <assert.h>

#define CHUNK_SIZE_DEFAULT 2048u

void
cost_constants_init(cost_constants_t *constants)
{
    *constants = (cost_constants_t){
        .read_bandwidth = 10e9,
        .hop_seconds    = 200e-6,
        .link_bandwidth = 2e9,
    };
}

uint64_t
cost_kv_token_bytes(const attn_geometry_t *geometry)
{
    uint64_t dims = (uint64_t)geometry->head_dim_k + geometry->head_dim_v;
    return geometry->kv_heads * dims * attn_dtype_size(geometry->kv_dtype);
}

static double
fan_out_seconds(const cost_constants_t *constants, const attn_geometry_t *geometry,
                uint32_t workers)
{
    double size =
        (double)attn_dtype_size(geometry->kv_dtype); /* q and o are taken to be as k and v */
    double q       = (double)geometry->q_heads * geometry->head_dim_k * size;
    double o       = (double)geometry->q_heads * geometry->head_dim_v * size;
    double partial = (double)geometry->q_heads * (geometry->head_dim_v + 2.0) * sizeof(float);

    if (workers < 2) {
        return 0;
    }
    return constants->hop_seconds + (workers * (q + partial) - (q + o)) / constants->link_bandwidth;
}

double
cost_layer_seconds(const cost_constants_t *constants, const attn_geometry_t *geometry,
                   uint64_t tokens, uint32_t workers)
{
    assert(workers > 0 && constants->read_bandwidth > 0 && constants->link_bandwidth > 0);
    return (double)tokens * (double)cost_kv_token_bytes(geometry) / workers /
               constants->read_bandwidth +
           fan_out_seconds(constants, geometry, workers);
}

uint64_t
cost_break_even_tokens(const cost_constants_t *constants, const attn_geometry_t *geometry,
                       uint32_t workers)
{
    uint64_t chunk_size = geometry->chunk_size ? geometry->chunk_size : CHUNK_SIZE_DEFAULT;
    uint32_t most       = (uint32_t)attn_min(workers, COST_SPREAD_MAX);
    double read =
        (double)chunk_size * (double)cost_kv_token_bytes(geometry) / constants->read_bandwidth;

    if (workers < 2 || !(read > 0)) {
        return UINT64_MAX;
    }
    /* Up to `most` chunks: fan_out(C) is fixed + C * each. */
    double each = fan_out_seconds(constants, geometry, 3) - fan_out_seconds(constants, geometry, 2);
    double fixed = fan_out_seconds(constants, geometry, 2) - 2 * each;
    double below = (read + fixed) / (read - each); /* spreading pays with more chunks than this */
    if (read > each && below < most) {
        return (uint64_t)attn_max(below, 1) * chunk_size;
    }
    /* Above: what one worker does not have to read is C less a most-th of C, rounded up. */
    double saved = fan_out_seconds(constants, geometry, most) / read;

    /* A link so slow that the number leaves the integers: never spread. NaN too ends here. */
    if (!(saved < 0x1p40)) {
        return UINT64_MAX;
    }
    uint64_t k = (uint64_t)saved + 1;
    return (k + attn_div_up(k, most - 1) - 1) * chunk_size;
}
