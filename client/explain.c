/*
 * explain.c: the cost model's word on a batch. A way is a set of constants of the links: those that
 * this client's runs found, or what other clients told the coordinator, and what the coordinator's
 * pings found over gRPC. Over each of them every place of merging is priced, as if the batch were
 * still to be placed; what is placed already is priced as it lies.
 */
#include "client/client_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/measure.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASKS 5u /* the coordinator is asked so often, for the time it takes */

typedef struct explainer {
    attn_cache_t *cache;
    const attn_explain_t *asked;
    attn_explanation_t *out;
    attn_cluster_info_t cluster;
    cost_constants_t constants; /* all but the link */
    cost_batch_t batch;
    double front_seconds; /* there and back to the coordinator */
    split_t *split;       /* of a sequence that there is */
} explainer_t;

/* ---- constants ---- */

static cost_worker_t
speed_of(const attn_worker_info_t *info)
{
    cost_worker_t speed = {.read_bandwidth = info->read_bandwidth,
                           .attend_seconds = info->attend_seconds};

    memcpy(speed.few_flops, info->few_flops, sizeof(speed.few_flops));
    memcpy(speed.many_flops, info->many_flops, sizeof(speed.many_flops));
    return speed;
}

/* A worker that does not know how fast it reads is taken to be as the slowest that does. */
static cost_worker_t
worker_speed(const explainer_t *x, uint32_t id)
{
    for (uint32_t i = 0; i < x->cluster.n_workers; i++) {
        if (x->cluster.workers[i].id == id && x->cluster.workers[i].read_bandwidth > 0) {
            return speed_of(&x->cluster.workers[i]);
        }
    }
    return x->constants.worker;
}

static void
take_workers(explainer_t *x)
{
    cost_worker_t slowest = {0};

    cost_constants_init(&x->constants);
    for (uint32_t i = 0; i < x->cluster.n_workers; i++) {
        if (x->cluster.workers[i].alive) {
            cost_worker_t speed = speed_of(&x->cluster.workers[i]);
            cost_worker_slowest(&slowest, &speed);
            x->out->workers++;
        }
    }
    if (slowest.read_bandwidth > 0) {
        x->constants.worker = slowest;
    }
    x->constants.merge_bandwidth = measure_merge();
}

/* What the cluster tells, and how long it takes to: the median. */
static attn_status_t
ask_cluster(explainer_t *x)
{
    double seconds[ASKS];
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i < ASKS && status == ATTN_OK; i++) {
        uint64_t start = attn_now_ns();
        attn_cluster_info_free(&x->cluster);
        status        = attn_cluster_describe(x->cache->client, &x->cluster);
        double took   = (double)(attn_now_ns() - start) * 1e-9;
        uint32_t into = i; /* they stay sorted */
        for (; into > 0 && seconds[into - 1] > took; into--) {
            seconds[into] = seconds[into - 1];
        }
        seconds[into] = took;
    }
    x->front_seconds = seconds[ASKS / 2];
    return status;
}

/* ---- ways ---- */

static void
add_way(explainer_t *x, const char *transport, const char *source, const cost_link_t *link)
{
    const cost_link_t *assumed = &x->constants.link;
    attn_way_t *way            = &x->out->ways[x->out->n_ways++];

    *way =
        (attn_way_t){.hop_seconds    = link->hop_seconds,
                     .send_seconds   = link->send_seconds > 0 ? link->send_seconds
                                                              : link->hop_seconds / COST_SEND_SHARE,
                     .link_bandwidth = link->bandwidth > 0 ? link->bandwidth : assumed->bandwidth};
    snprintf(way->transport, sizeof(way->transport), "%s", transport);
    snprintf(way->source, sizeof(way->source), "%s", source);
}

/* The transport of this client's links. */
static const char *
own_transport(attn_client_t *client, char name[16])
{
    attn_links_info_t links;

    name[0] = '\0';
    if (client->n_engines > 0) {
        return "engine";
    }
    if (attn_client_links(client, &links) != ATTN_OK) {
        return "";
    }
    for (uint32_t i = 0; i < links.n_links; i++) {
        bool other = name[0] != '\0' && strcmp(name, links.links[i].transport) != 0;
        snprintf(name, 16, "%s", other ? "mixed" : links.links[i].transport);
    }
    attn_links_info_free(&links);
    return name;
}

/* The first is what counts for runs of this client. */
static void
take_ways(explainer_t *x)
{
    attn_client_t *client = x->cache->client;
    cost_link_t own, pinged = {0};
    cost_link_t told = {.hop_seconds  = x->cluster.clients_hop_seconds,
                        .send_seconds = x->cluster.clients_send_seconds,
                        .bandwidth    = x->cluster.clients_link_bandwidth};
    char name[16];

    for (uint32_t i = 0; i < x->cluster.n_workers; i++) {
        const attn_worker_info_t *w = &x->cluster.workers[i];
        if (w->alive) {
            cost_link_slowest(&pinged, &(cost_link_t){.hop_seconds = w->hop_seconds,
                                                      .bandwidth   = w->link_bandwidth});
        }
    }
    if (links_meter(client->links, &own)) {
        own.bandwidth = own.bandwidth > 0 ? own.bandwidth : pinged.bandwidth;
        add_way(x, own_transport(client, name), "this client's runs", &own);
    }
    if (told.hop_seconds > 0) {
        told.bandwidth = told.bandwidth > 0 ? told.bandwidth : pinged.bandwidth;
        add_way(x, "", "runs of the slowest client", &told);
    }
    if (pinged.hop_seconds > 0) {
        add_way(x, client->n_engines > 0 ? "engine" : "grpc",
                client->n_engines > 0 ? "calls" : "the coordinator's pings", &pinged);
    }
    if (x->out->n_ways == 0) {
        add_way(x, "", "nobody: assumed", &x->constants.link);
    }
}

static cost_link_t
link_of(const attn_way_t *way)
{
    return (cost_link_t){.hop_seconds  = way->hop_seconds,
                         .send_seconds = way->send_seconds,
                         .bandwidth    = way->link_bandwidth};
}

/* ---- costs ---- */

static attn_cost_t *
add_cost(explainer_t *x, attn_merge_place_t place, uint32_t way, uint32_t workers,
         const cost_seconds_t *s)
{
    attn_cost_t *cost = &x->out->costs[x->out->n_costs++];

    *cost = (attn_cost_t){.place = place, .way = way, .workers = workers};
    if (s != NULL) {
        cost->available = true;
        cost->attend    = s->attend;
        cost->read      = s->read;
        cost->compute   = s->compute;
        cost->hop       = s->hop;
        cost->link      = s->link;
        cost->merge     = s->merge;
        cost->total     = s->total;
    }
    return cost;
}

/* The sequence as it lies. @return false: out of memory */
static bool
as_it_lies(const explainer_t *x, const cost_constants_t *constants, cost_seconds_t *seconds)
{
    const split_t *split = x->split;
    cost_part_t *parts   = calloc(split->n_shares + (size_t)1, sizeof(*parts));
    uint32_t n           = 0;

    for (uint32_t s = 0; parts != NULL && s < split->n_shares; s++) {
        const split_part_t *part = &split->shares[s].parts[0]; /* of one entry */
        uint64_t tokens          = 0;
        for (uint32_t r = 0; r < part->n_refs; r++) {
            tokens += part->refs[r].length;
        }
        if (part->attends) {
            parts[n++] = (cost_part_t){.worker    = worker_speed(x, split->shares[s].worker),
                                       .link      = constants->link,
                                       .tokens    = tokens,
                                       .sequences = 1,
                                       .nodes     = part->n_nodes,
                                       .count     = 1};
        }
    }
    if (parts != NULL && n > 0) {
        *seconds = cost_layer(&x->batch, parts, n, constants->merge_bandwidth, NULL);
    }
    free(parts);
    return parts != NULL && n > 0;
}

/* Workers that attend to the sequence. */
static uint32_t
owners(const split_t *split)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < split->n_shares; s++) {
        n += split->shares[s].parts[0].attends;
    }
    return n;
}

/* Would the batch be spread, were it placed now? Says why. */
static bool
would_spread(const explainer_t *x, const attn_way_t *way, char reason[128])
{
    attn_placement_t placement = x->cache->geometry.placement;
    uint64_t even              = way->break_even_tokens;
    bool spread                = x->batch.tokens > even;

    if (placement != ATTN_PLACE_AUTO) {
        snprintf(reason, 128, "the cache's placement is %s",
                 placement == ATTN_PLACE_SPREAD ? "spread" : "whole");
        return placement == ATTN_PLACE_SPREAD && x->batch.tokens > x->cache->geometry.chunk_size &&
               x->out->workers > 1;
    }
    if (x->out->workers < 2) {
        snprintf(reason, 128, "there is one worker");
    } else if (even == UINT64_MAX) {
        snprintf(reason, 128, "no sequence is faster spread");
    } else {
        snprintf(reason, 128, "%" PRIu64 " tokens are %s the break-even of %" PRIu64,
                 x->batch.tokens, spread ? "above" : "within", even);
    }
    return spread;
}

/* A thin client has its layer over gRPC twice, as the coordinator has it. */
static void
price_coordinator(explainer_t *x, uint32_t way)
{
    cost_constants_t constants = x->constants;
    cost_choice_t choice;
    bool there = x->cache->client->n_engines == 0;

    constants.link    = link_of(&x->out->ways[way]);
    cost_link_t front = constants.link;
    front.hop_seconds = x->front_seconds;
    cost_choose(&constants, &front, NULL, &x->batch, x->out->workers, &choice);
    attn_cost_t *cost = add_cost(x, ATTN_MERGE_COORDINATOR, way, choice.workers[COST_COORDINATOR],
                                 there ? &choice.seconds[COST_COORDINATOR] : NULL);
    snprintf(cost->reason, sizeof(cost->reason), "%s",
             there ? "for thin clients" : "there is no coordinator");
}

/* Local and client over one way: as if the batch were to be placed, but for what it lies as. */
static void
price(explainer_t *x, uint32_t way)
{
    cost_constants_t constants = x->constants;
    cost_choice_t choice;
    cost_seconds_t lies;
    char reason[128];
    uint32_t n = x->split != NULL ? owners(x->split) : 0;

    constants.link = link_of(&x->out->ways[way]);
    cost_choose(&constants, NULL, NULL, &x->batch, x->out->workers, &choice);
    bool spread = n > 0 ? n > 1 : would_spread(x, &x->out->ways[way], reason);
    bool real   = n > 0 && as_it_lies(x, &constants, &lies);
    if (n > 0) {
        snprintf(reason, sizeof(reason),
                 n > 1 ? "the only way for chunks on %u workers" : "one worker has all of it", n);
    }
    for (cost_place_t p = COST_LOCAL; p <= COST_CLIENT; p += COST_CLIENT - COST_LOCAL) {
        bool taken              = (p == COST_CLIENT) == spread;
        const cost_seconds_t *s = taken && real         ? &lies
                                  : choice.available[p] ? &choice.seconds[p]
                                                        : NULL;
        attn_cost_t *cost = add_cost(x, p == COST_LOCAL ? ATTN_MERGE_LOCAL : ATTN_MERGE_CLIENT, way,
                                     taken && real ? n : choice.workers[p], s);
        cost->taken       = taken && way == 0;
        cost->cheapest    = p == choice.best;
        if (taken || s == NULL) {
            snprintf(cost->reason, sizeof(cost->reason), "%s",
                     s != NULL ? reason : "it needs two workers, and two chunks");
        }
    }
}

/* As the client's, over this client's way, but that the workers merge: where they are known to. */
static void
price_group(explainer_t *x)
{
    const attn_client_t *client = x->cache->client;
    const attn_geometry_t *g    = &x->cache->geometry;
    attn_cost_t *client_cost = NULL, *cost = add_cost(x, ATTN_MERGE_GROUP, 0, 0, NULL);
    cost_link_t link = link_of(&x->out->ways[0]);
    cost_exchange_t exchange;

    for (uint32_t i = 0; i < x->out->n_costs; i++) {
        attn_cost_t *c = &x->out->costs[i];
        client_cost =
            c->place == ATTN_MERGE_CLIENT && c->way == 0 && c->available ? c : client_cost;
    }
    if (client_cost == NULL || client->groups == NULL ||
        !groups_exchange(client->groups, NULL, 0, &exchange)) {
        snprintf(cost->reason, sizeof(cost->reason), "no group of workers is formed");
        return;
    }
    cost_merge_t merge = {.workers    = client_cost->workers,
                          .rows       = (uint64_t)x->batch.sequences * x->batch.rows * g->q_heads,
                          .head_dim_v = g->head_dim_v,
                          .o_size     = (uint32_t)attn_dtype_size(g->kv_dtype)};
    merge.states       = merge.rows * merge.workers;
    double theirs      = cost_merge_group(&link, &exchange, &merge);
    double ours        = cost_merge_client(&link, x->constants.merge_bandwidth, &merge);
    double o           = (double)merge.rows * merge.head_dim_v * merge.o_size / link.bandwidth;
    uint32_t index     = x->out->n_costs - 1;
    *cost              = *client_cost;
    cost->place        = ATTN_MERGE_GROUP;
    cost->merge        = theirs - o;
    cost->total        = client_cost->total - ours + theirs;
    cost->link         = cost->total - cost->attend -
                 (cost->read > cost->compute ? cost->read : cost->compute) - cost->hop -
                 cost->merge;
    cost->taken = client_cost->taken && client->options.merging != ATTN_MERGING_CLIENT &&
                  (client->options.merging == ATTN_MERGING_GROUP || theirs < ours);
    client_cost->taken = client_cost->taken && !cost->taken;
    cost->cheapest     = true;
    for (uint32_t i = 0; i < index; i++) {
        cost->cheapest =
            cost->cheapest && !(x->out->costs[i].way == 0 && x->out->costs[i].available &&
                                x->out->costs[i].place != ATTN_MERGE_COORDINATOR &&
                                x->out->costs[i].total <= cost->total);
    }
    for (uint32_t i = 0; cost->cheapest && i < index; i++) {
        x->out->costs[i].cheapest = x->out->costs[i].cheapest && x->out->costs[i].way != 0;
    }
}

static attn_status_t
take_batch(explainer_t *x)
{
    const attn_explain_t *asked = x->asked;
    attn_seq_info_t info        = {0};
    attn_status_t status        = ATTN_OK;

    x->batch = (cost_batch_t){.geometry  = &x->cache->geometry,
                              .tokens    = asked->tokens,
                              .rows      = asked->n_q > 0 ? asked->n_q : 1,
                              .new_rows  = asked->n_new,
                              .sequences = asked->sequences > 0 ? asked->sequences : 1};
    if (asked->seq.id != 0) {
        x->batch.sequences = 1;
        status             = attn_seq_describe(x->cache, asked->seq, &info);
        x->batch.tokens    = info.length;
    }
    if (status == ATTN_OK && (x->batch.tokens < 1 || x->batch.rows > x->batch.tokens)) {
        status = attn_fail(ATTN_ERR_INVALID,
                           "%u query rows over %" PRIu64 " tokens: at least 1 token, and no more "
                           "rows than tokens",
                           x->batch.rows, x->batch.tokens);
    }
    if (status == ATTN_OK && asked->seq.id != 0) {
        split_entry_t entry   = {.base = info.length, .n_q = x->batch.rows};
        split_chunk_t *chunks = calloc(info.n_chunks + (size_t)1, sizeof(*chunks));
        for (uint32_t c = 0; chunks != NULL && c < info.n_chunks; c++) {
            chunks[c] = cluster_split_chunk(&info.chunks[c]);
        }
        split_layout_t layout = {.seq = asked->seq.id, .n_chunks = info.n_chunks, .chunks = chunks};
        status                = chunks != NULL
                                    ? split_batch(&entry, &layout, 1, x->cache->geometry.chunk_size, &x->split)
                                    : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layout");
        free(chunks);
    }
    attn_seq_info_free(&info);
    return status;
}

static void
explain_all(explainer_t *x)
{
    attn_explanation_t *out = x->out;
    const cost_worker_t *w  = &x->constants.worker;

    out->tokens          = x->batch.tokens;
    out->read_bandwidth  = w->read_bandwidth;
    out->attend_seconds  = w->attend_seconds;
    out->flops           = cost_flops(&x->batch, w);
    out->merge_bandwidth = x->constants.merge_bandwidth;
    take_ways(x);
    for (uint32_t i = 0; i < out->n_ways; i++) {
        cost_constants_t constants = x->constants;
        constants.link             = link_of(&out->ways[i]);
        out->ways[i].break_even_tokens =
            cost_break_even_tokens(&constants, &x->cache->geometry, out->workers);
        price(x, i);
    }
    price_coordinator(x, out->n_ways - 1); /* pings: thin clients and the coordinator speak gRPC */
    price_group(x);
}

attn_status_t
attn_explain(attn_cache_t *cache, const attn_explain_t *batch, attn_explanation_t *explanation)
{
    explainer_t x = {.cache = cache, .asked = batch, .out = explanation};

    if (batch == NULL || batch->size < sizeof(*batch)) {
        return attn_fail(ATTN_ERR_INVALID, "batch.size must be sizeof(attn_explain_t)");
    }
    *explanation         = (attn_explanation_t){0};
    attn_status_t status = take_batch(&x);
    if (status == ATTN_OK && (status = ask_cluster(&x)) == ATTN_OK) {
        take_workers(&x);
        if (explanation->workers == 0) {
            status = attn_fail(ATTN_ERR_UNAVAILABLE, "no worker is alive");
        } else {
            explain_all(&x);
        }
    }
    split_free(x.split);
    attn_cluster_info_free(&x.cluster);
    return status;
}
