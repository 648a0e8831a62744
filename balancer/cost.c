/*
 * A layer of a batch, on parts p of count_p workers that are alike:
 *
 *     read(p)    = sequences_p * tokens_p * kv_token_bytes / read_bandwidth
 *     compute(p) = 2 * sequences_p * rows * q_heads * (dim_k + dim_v) * seen_p / flops
 *     attend     = the largest of attend_seconds + max(read(p), compute(p))
 *     hop        = the largest hop + 2 * send for each worker but one
 *     link       = (q, k, v and the answers of all workers) / bandwidth
 *     merge      = bytes of partials / merge_bandwidth
 *
 * Where workers merge among themselves the answers are o, each row's by one of them, and
 *
 *     merge      = seconds + others * peer_seconds
 *                  + bytes of partials that leave the worker that has most / bandwidth
 *
 * Memory is read while what was read before is computed with, so the longer of the two counts.
 * flops is that of requests with few or with many packed rows (rows * q_heads / kv_heads). A row of
 * several sees on average half of the step's rows less than all. A partial is a float per element
 * of o and its l and e. Workers are sent to and heard of by one core, one after the other, so each
 * beyond the first adds twice what sending takes it, there and back.
 *
 * A spread sequence is where placement puts it (balancer/lanes.h): on at most 64 workers, for the
 * tree has 64 lanes. Where their number is no power of two, some have twice the chunks of others:
 * of 3 chunks on 3 workers, one has 2 and one none.
 */
#include "balancer/cost.h"
#include "balancer/lanes.h"
#include "base/checked.h"

#include <assert.h>

#define CHUNK_SIZE_DEFAULT 2048u
#define FEW_ROWS 64u /* packed: as kernels count, ATTN_FEW_ROWS */

/* Partials of a worker whose lanes are no subtree of the merge tree: 1 to 5, on average. */
#define RAGGED_NODES 3u

void
cost_constants_init(cost_constants_t *constants)
{
    *constants = (cost_constants_t){
        .worker = {.read_bandwidth = 10e9,
                   .attend_seconds = 5e-6,
                   .few_flops      = {0, 20e9, 20e9, 20e9},
                   .many_flops     = {0, 50e9, 50e9, 50e9}},
        .link = {.hop_seconds = 200e-6, .send_seconds = 200e-6 / COST_SEND_SHARE, .bandwidth = 2e9},
        .merge_bandwidth = 4e9,
    };
}

static double
lower_rate(double a, double b)
{
    return a > 0 && (b > a || !(b > 0)) ? a : b;
}

void
cost_worker_slowest(cost_worker_t *into, const cost_worker_t *other)
{
    into->read_bandwidth = lower_rate(into->read_bandwidth, other->read_bandwidth);
    if (other->attend_seconds > into->attend_seconds) {
        into->attend_seconds = other->attend_seconds;
    }
    for (uint32_t d = 0; d < COST_DTYPES; d++) {
        into->few_flops[d]  = lower_rate(into->few_flops[d], other->few_flops[d]);
        into->many_flops[d] = lower_rate(into->many_flops[d], other->many_flops[d]);
    }
}

void
cost_link_slowest(cost_link_t *into, const cost_link_t *other)
{
    if (!(other->hop_seconds > 0)) {
        return;
    }
    if (other->hop_seconds > into->hop_seconds) {
        into->hop_seconds = other->hop_seconds;
    }
    if (other->send_seconds > into->send_seconds) {
        into->send_seconds = other->send_seconds;
    }
    into->bandwidth = lower_rate(into->bandwidth, other->bandwidth);
}

uint64_t
cost_kv_token_bytes(const attn_geometry_t *geometry)
{
    uint64_t dims = (uint64_t)geometry->head_dim_k + geometry->head_dim_v;
    return geometry->kv_heads * dims * attn_dtype_size(geometry->kv_dtype);
}

static uint64_t
chunk_size_of(const attn_geometry_t *geometry)
{
    return geometry->chunk_size ? geometry->chunk_size : CHUNK_SIZE_DEFAULT;
}

/* ---- one worker ---- */

/* Of what a row could see, the share that it does: the last row of a step sees all of it. */
static double
seen_share(const cost_batch_t *batch)
{
    double tokens = (double)batch->tokens, before = ((double)batch->rows - 1) / 2;

    return batch->rows > 1 && tokens > before ? (tokens - before) / tokens : 1;
}

double
cost_flops(const cost_batch_t *batch, const cost_worker_t *worker)
{
    const attn_geometry_t *g = batch->geometry;
    uint64_t packed          = (uint64_t)batch->rows * (g->q_heads / g->kv_heads);

    assert(g->kv_dtype < COST_DTYPES);
    return packed <= FEW_ROWS ? worker->few_flops[g->kv_dtype] : worker->many_flops[g->kv_dtype];
}

cost_seconds_t
cost_attend(const cost_batch_t *batch, const cost_part_t *part)
{
    const attn_geometry_t *g = batch->geometry;
    const cost_worker_t *w   = &part->worker;
    double flops             = cost_flops(batch, w);
    double tokens            = (double)part->sequences * (double)part->tokens;

    assert(w->read_bandwidth > 0);
    cost_seconds_t s = {
        .attend  = w->attend_seconds,
        .read    = tokens * (double)cost_kv_token_bytes(g) / w->read_bandwidth,
        .compute = !(flops > 0) ? 0
                                : 2 * tokens * seen_share(batch) * batch->rows * g->q_heads *
                                      ((double)g->head_dim_k + g->head_dim_v) / flops,
    };
    s.total = s.attend + (s.read > s.compute ? s.read : s.compute);
    return s;
}

/* ---- a layer ---- */

typedef struct sizes {
    double q, kv, o, partial; /* bytes of a layer, of one sequence; partial: of one node */
} sizes_t;

static sizes_t
sizes_of(const cost_batch_t *batch)
{
    const attn_geometry_t *g = batch->geometry;
    double size = (double)attn_dtype_size(g->kv_dtype), heads = (double)batch->rows * g->q_heads;

    return (sizes_t){.q       = heads * g->head_dim_k * size,
                     .kv      = (double)batch->new_rows * (double)cost_kv_token_bytes(g),
                     .o       = heads * g->head_dim_v * size,
                     .partial = heads * (g->head_dim_v + 2.0) * sizeof(float)};
}

/* Seconds in which ranks exchange partials, with so many bytes of them on the one that has most. */
static double
exchange_seconds(const cost_exchange_t *exchange, uint32_t ranks, double bytes)
{
    double others = (double)ranks - 1;

    return exchange->seconds + others * exchange->peer_seconds +
           bytes * others / ranks / exchange->bandwidth;
}

/* Workers that have partials. */
static uint32_t
count_ranks(const cost_part_t *parts, uint32_t n_parts)
{
    uint32_t ranks = 0;

    for (uint32_t i = 0; i < n_parts; i++) {
        ranks += parts[i].nodes > 0 ? parts[i].count : 0;
    }
    return ranks;
}

/* A layer but for its merge, and the bytes of partials: of all workers, and of the one that has
 * most. ranks: of workers that each answer with O of a share of the rows; 0: with partials. */
static cost_seconds_t
layer(const cost_batch_t *batch, const cost_part_t *parts, uint32_t n_parts, uint32_t ranks,
      double *all, double *most)
{
    sizes_t bytes    = sizes_of(batch);
    cost_seconds_t s = {.total = -1};
    double hop = 0, sends = 0, link = 0, last_send = 0, kv = 0;

    assert(n_parts > 0);
    *all = *most = 0;
    for (uint32_t i = 0; i < n_parts; i++) {
        const cost_part_t *p  = &parts[i];
        cost_seconds_t attend = cost_attend(batch, p);
        double partials       = (double)p->nodes * bytes.partial * p->sequences;
        double answer         = p->nodes == 0 ? bytes.o * p->sequences
                                : ranks > 0   ? bytes.o * p->sequences / ranks
                                              : partials;

        assert(p->count > 0 && p->link.bandwidth > 0);
        s = attend.total > s.total ? attend : s;
        link += p->count * (bytes.q * p->sequences + answer) / p->link.bandwidth;
        sends += p->count * p->link.send_seconds;
        *all += p->count * partials;
        *most     = partials > *most ? partials : *most;
        hop       = p->link.hop_seconds > hop ? p->link.hop_seconds : hop;
        last_send = p->link.send_seconds > last_send ? p->link.send_seconds : last_send;
        kv        = bytes.kv * batch->sequences / p->link.bandwidth;
    }
    s.hop  = hop + 2 * (sends - last_send);
    s.link = link + kv;
    s.total += s.hop + s.link;
    return s;
}

cost_seconds_t
cost_layer(const cost_batch_t *batch, const cost_part_t *parts, uint32_t n_parts,
           double merge_bandwidth, const cost_link_t *front)
{
    double all, most;
    cost_seconds_t s = layer(batch, parts, n_parts, 0, &all, &most);

    assert(merge_bandwidth > 0);
    s.merge = all / merge_bandwidth;
    s.total += s.merge;
    if (front != NULL) {
        sizes_t bytes = sizes_of(batch);
        double way    = batch->sequences * (bytes.q + bytes.kv + bytes.o) / front->bandwidth;
        s.hop += front->hop_seconds;
        s.link += way;
        s.total += front->hop_seconds + way;
    }
    return s;
}

cost_seconds_t
cost_layer_group(const cost_batch_t *batch, const cost_part_t *parts, uint32_t n_parts,
                 const cost_exchange_t *exchange)
{
    uint32_t ranks = count_ranks(parts, n_parts);
    double all, most;
    cost_seconds_t s = layer(batch, parts, n_parts, ranks, &all, &most);

    assert(ranks > 1 && exchange->bandwidth > 0);
    s.merge = exchange_seconds(exchange, ranks, most);
    s.total += s.merge;
    return s;
}

/* ---- layouts ---- */

void
cost_layout_whole(const cost_constants_t *constants, const cost_batch_t *batch, uint32_t workers,
                  cost_layout_t *layout)
{
    uint32_t n    = (uint32_t)attn_min(batch->sequences, workers);
    uint32_t each = batch->sequences / n, more = batch->sequences % n;
    cost_part_t part = {
        .worker = constants->worker, .link = constants->link, .tokens = batch->tokens};

    *layout = (cost_layout_t){.workers = n};
    if (more > 0) { /* these have one more */
        part.sequences                   = each + 1;
        part.count                       = more;
        layout->parts[layout->n_parts++] = part;
    }
    part.sequences                   = each;
    part.count                       = n - more;
    layout->parts[layout->n_parts++] = part;
}

/* How a sequence lies on workers. */
typedef struct deal {
    uint32_t workers, lanes; /* that have chunks; the most lanes of one of them */
    uint64_t chunks;         /* the most of one of them */
} deal_t;

static deal_t
deal_out(uint64_t chunks, uint32_t workers)
{
    uint64_t dealt[LANES] = {0};
    uint32_t lanes[LANES] = {0};
    deal_t deal           = {0};

    for (uint32_t lane = 0; lane < attn_min(chunks, LANES); lane++) {
        /* With more workers than lanes each lane has its own, as with 64. */
        uint32_t spot = lanes_spot(lane, (uint32_t)attn_min(workers, LANES));
        deal.workers += lanes[spot]++ == 0;
        dealt[spot] += chunks / LANES + (lane < chunks % LANES);
        deal.lanes  = (uint32_t)attn_max(deal.lanes, lanes[spot]);
        deal.chunks = attn_max(deal.chunks, dealt[spot]);
    }
    return deal;
}

void
cost_layout_spread(const cost_constants_t *constants, const cost_batch_t *batch, uint32_t workers,
                   cost_layout_t *layout)
{
    uint64_t chunk = chunk_size_of(batch->geometry);
    deal_t deal    = deal_out(attn_max(attn_div_up(batch->tokens, chunk), 1), workers);
    bool whole     = workers >= LANES || (workers & (workers - 1)) == 0; /* lanes are one subtree */
    cost_part_t part = {.worker    = constants->worker,
                        .link      = constants->link,
                        .tokens    = attn_min(deal.chunks * chunk, batch->tokens),
                        .sequences = batch->sequences,
                        .nodes     = whole ? 1 : (uint32_t)attn_min(RAGGED_NODES, deal.lanes),
                        .count     = deal.workers};

    if (deal.workers == 1) {
        part.tokens = batch->tokens;
        part.nodes  = 0;
    }
    *layout = (cost_layout_t){.workers = deal.workers, .n_parts = 1, .parts = {part}};
}

/* ---- the choice ---- */

static void
place_at(cost_place_t place, const cost_layout_t *layout, cost_seconds_t seconds,
         cost_choice_t *choice)
{
    choice->available[place] = true;
    choice->workers[place]   = layout->workers;
    choice->seconds[place]   = seconds;
    if (choice->best == COST_PLACES || seconds.total < choice->seconds[choice->best].total) {
        choice->best = place;
    }
}

void
cost_choose(const cost_constants_t *constants, const cost_link_t *front,
            const cost_exchange_t *exchange, const cost_batch_t *batch, uint32_t workers,
            cost_choice_t *choice)
{
    double merges = constants->merge_bandwidth;
    cost_layout_t whole, spread, *for_front = &whole;

    *choice = (cost_choice_t){.best = COST_PLACES};
    if (workers == 0) {
        return;
    }
    cost_layout_whole(constants, batch, workers, &whole);
    place_at(COST_LOCAL, &whole, cost_layer(batch, whole.parts, whole.n_parts, merges, NULL),
             choice);
    cost_layout_spread(constants, batch, workers, &spread);
    if (spread.workers > 1) {
        place_at(COST_CLIENT, &spread,
                 cost_layer(batch, spread.parts, spread.n_parts, merges, NULL), choice);
        for_front = choice->best == COST_CLIENT ? &spread : &whole;
    }
    if (spread.workers > 1 && exchange != NULL) {
        place_at(COST_GROUP, &spread,
                 cost_layer_group(batch, spread.parts, spread.n_parts, exchange), choice);
    }
    if (front != NULL) {
        place_at(COST_COORDINATOR, for_front,
                 cost_layer(batch, for_front->parts, for_front->n_parts, merges, front), choice);
    }
}

/* ---- the break-even ---- */

/* Is one sequence of so many chunks faster spread? */
static bool
pays(const cost_constants_t *constants, const attn_geometry_t *geometry, uint32_t workers,
     uint64_t chunks)
{
    cost_batch_t batch = {.geometry  = geometry,
                          .tokens    = chunks * chunk_size_of(geometry),
                          .rows      = 1,
                          .sequences = 1};
    cost_layout_t whole, spread;

    cost_layout_whole(constants, &batch, 1, &whole);
    cost_layout_spread(constants, &batch, workers, &spread);
    double alone = cost_layer(&batch, whole.parts, 1, constants->merge_bandwidth, NULL).total;
    return cost_layer(&batch, spread.parts, 1, constants->merge_bandwidth, NULL).total < alone;
}

/* The first number of chunks in [low, high] with which spreading pays, if all after it do; high + 1
 * if none does. */
static uint64_t
first_that_pays(const cost_constants_t *constants, const attn_geometry_t *geometry,
                uint32_t workers, uint64_t low, uint64_t high)
{
    while (low <= high) {
        uint64_t middle = low + (high - low) / 2;
        if (pays(constants, geometry, workers, middle)) {
            high = middle - 1;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

#define CHUNKS_MAX (UINT64_C(1) << 40)

uint64_t
cost_break_even_tokens(const cost_constants_t *constants, const attn_geometry_t *geometry,
                       uint32_t workers)
{
    if (workers < 2 || !pays(constants, geometry, workers, CHUNKS_MAX)) {
        return UINT64_MAX;
    }
    /* Once every lane has a chunk, no more workers come in with further ones, and what is saved
     * never falls: there is one place from which on it pays. Before, each may bring a worker in. */
    uint64_t first = first_that_pays(constants, geometry, workers, LANES, CHUNKS_MAX);
    while (first <= LANES && first > 2 && pays(constants, geometry, workers, first - 1)) {
        first--;
    }
    return (first - 1) * chunk_size_of(geometry);
}

/* ---- who merges, of partials that are where they are ---- */

void
cost_exchange_init(cost_exchange_t *exchange)
{
    *exchange = (cost_exchange_t){.seconds = 30e-6, .peer_seconds = 1e-6, .bandwidth = 10e9};
}

#define AT_LEAST 1e-9 /* seconds: what a clock would not show */

void
cost_exchange_measured(const cost_proof_t *proof, cost_exchange_t *exchange)
{
    double others = (double)proof->ranks - 1;
    double bytes  = ((double)proof->many - proof->few) * (8.0 + 4.0 * proof->head_dim_v) * others /
                   proof->ranks;
    double took = proof->many_seconds - proof->few_seconds;

    cost_exchange_init(exchange);
    exchange->seconds   = proof->few_seconds - others * exchange->peer_seconds;
    exchange->seconds   = exchange->seconds > AT_LEAST ? exchange->seconds : AT_LEAST;
    exchange->bandwidth = took > AT_LEAST ? bytes / took : exchange->bandwidth;
}

void
cost_exchange_slowest(cost_exchange_t *into, const cost_exchange_t *other)
{
    if (!(other->seconds > 0)) {
        return;
    }
    if (other->seconds > into->seconds) {
        into->seconds = other->seconds;
    }
    if (other->peer_seconds > into->peer_seconds) {
        into->peer_seconds = other->peer_seconds;
    }
    into->bandwidth = lower_rate(into->bandwidth, other->bandwidth);
}

static double
states_bytes(const cost_merge_t *merge)
{
    return (double)merge->states * (8.0 + 4.0 * merge->head_dim_v);
}

double
cost_merge_client(const cost_link_t *link, double merge_bandwidth, const cost_merge_t *merge)
{
    return states_bytes(merge) / link->bandwidth + states_bytes(merge) / merge_bandwidth;
}

double
cost_merge_group(const cost_link_t *link, const cost_exchange_t *exchange,
                 const cost_merge_t *merge)
{
    double o = (double)merge->rows * merge->head_dim_v * merge->o_size;

    return exchange_seconds(exchange, merge->workers, states_bytes(merge) / merge->workers) +
           o / link->bandwidth;
}

cost_place_t
cost_merge_place(const cost_constants_t *constants, const cost_exchange_t *exchange,
                 const cost_merge_t *merge)
{
    return cost_merge_group(&constants->link, exchange, merge) <
                   cost_merge_client(&constants->link, constants->merge_bandwidth, merge)
               ? COST_GROUP
               : COST_CLIENT;
}
