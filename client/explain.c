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
#define TWO_OF_BOTH "it needs two workers, and two chunks"

typedef struct explainer {
    attn_cache_t *cache;
    const attn_explain_t *asked;
    attn_explanation_t *out;
    attn_cluster_info_t cluster;
    cost_constants_t constants; /* all but the link */
    cost_batch_t batch;
    double front_seconds; /* there and back to the coordinator */
    split_t *split;       /* of a sequence that there is */
    uint32_t owners;      /* of it: workers that attend to it; 0: there is no such sequence */
    cost_exchange_t exchange;
    bool may_group;     /* the workers may merge among themselves */
    char no_group[128]; /* why not */
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

/* The sequence as it lies, and merged by the client or, likewise, by its owners. @return false: out
 * of memory */
static bool
as_it_lies(const explainer_t *x, const cost_constants_t *constants, cost_seconds_t *client,
           cost_seconds_t *group)
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
        *client = cost_layer(&x->batch, parts, n, constants->merge_bandwidth, NULL);
    }
    if (parts != NULL && n > 1 && x->may_group) {
        *group = cost_layer_group(&x->batch, parts, n, &x->exchange);
    }
    free(parts);
    return parts != NULL && n > 0;
}

static uint32_t
count_owners(const split_t *split)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < split->n_shares; s++) {
        n += split->shares[s].parts[0].attends;
    }
    return n;
}

/* ---- groups ---- */

/* Does the worker have some of the sequence? Of one to come any may. */
static bool
owns(const explainer_t *x, const attn_worker_info_t *info)
{
    bool found = x->owners == 0 && info->alive;

    for (uint32_t s = 0; x->owners > 0 && s < x->split->n_shares; s++) {
        const split_share_t *share = &x->split->shares[s];
        found = found || (share->worker == info->id && share->parts[0].attends);
    }
    return found;
}

/* Bytes of partials that one of n gets at most, about. */
static uint64_t
half_bytes(const explainer_t *x, uint32_t n)
{
    uint64_t rows = (uint64_t)x->batch.sequences * x->batch.rows * x->cache->geometry.q_heads;

    return (rows / n + 1) * n * attn_group_line_bytes(x->cache->geometry.head_dim_v);
}

/* May those that have it, or would, merge among themselves, and what do their exchanges take? */
static attn_status_t
ask_group(explainer_t *x)
{
    attn_client_t *client = x->cache->client;
    group_wish_t wish     = {.head_dim_v = x->cache->geometry.head_dim_v};
    group_member_t members[ATTN_RANKS_MAX];
    char refused[256];
    uint32_t n = 0, linked = 0;

    cost_exchange_init(&x->exchange);
    if (client->groups == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "groups are of workers of a cluster");
    }
    if (x->owners == 1 || x->batch.tokens <= x->cache->geometry.chunk_size || x->out->workers < 2) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s", TWO_OF_BOTH);
    }
    for (uint32_t i = 0; i < x->cluster.n_workers; i++) {
        const attn_worker_info_t *w = &x->cluster.workers[i];
        if (!owns(x, w) || ++n > ATTN_RANKS_MAX) {
            continue;
        }
        group_member_t *m = &members[n - 1];
        *m                = (group_member_t){.worker = w->id};
        memcpy(m->place.host, w->group_host, sizeof(m->place.host));
        memcpy(m->place.device, w->group_device, sizeof(m->place.device));
        link_t *link = links_find(client->links, w->address);
        if (link != NULL) {
            wish.links[linked++] = link;
        }
    }
    attn_status_t status = groups_check(members, n, client->options.merging == ATTN_MERGING_GROUP);
    if (status != ATTN_OK) {
        return status;
    }
    if (linked == n) { /* who was never asked has refused nothing, and was not measured */
        wish.ranks      = n;
        wish.half_bytes = half_bytes(x, n);
    }
    x->out->exchange_measured =
        groups_exchange(client->groups, wish.links, wish.ranks, &x->exchange);
    return client->options.merging == ATTN_MERGING_AUTO &&
                   groups_refused(client->groups, &wish, refused)
               ? attn_fail(ATTN_ERR_UNSUPPORTED, "refused of late: %s", refused)
               : ATTN_OK;
}

static void
take_group(explainer_t *x)
{
    x->may_group = ask_group(x) == ATTN_OK;
    if (!x->may_group) {
        snprintf(x->no_group, sizeof(x->no_group), "%s", attn_last_error());
    }
    x->out->exchange_seconds      = x->exchange.seconds;
    x->out->exchange_peer_seconds = x->exchange.peer_seconds;
    x->out->exchange_bandwidth    = x->exchange.bandwidth;
}

/* ---- places ---- */

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

/* Of chunks on several workers: is it the workers who merge? Says why, or why not. */
static bool
in_group(const explainer_t *x, const cost_choice_t *choice, char reason[128])
{
    attn_merging_t merging = x->cache->client->options.merging;
    double theirs = choice->seconds[COST_GROUP].total, ours = choice->seconds[COST_CLIENT].total;

    if (!x->may_group) {
        return false;
    }
    snprintf(reason, 128, "%s",
             merging == ATTN_MERGING_CLIENT  ? "merging is client: this client's options"
             : merging == ATTN_MERGING_GROUP ? "merging is group: this client's options"
             : theirs < ours                 ? "workers merge for less than this client"
                                             : "this client merges for less");
    return merging == ATTN_MERGING_GROUP || (merging == ATTN_MERGING_AUTO && theirs < ours);
}

/* The line of a place. */
static void
price_place(explainer_t *x, uint32_t way, cost_place_t place, const cost_choice_t *choice,
            const char *reason)
{
    static const attn_merge_place_t places[] = {[COST_LOCAL]  = ATTN_MERGE_LOCAL,
                                                [COST_GROUP]  = ATTN_MERGE_GROUP,
                                                [COST_CLIENT] = ATTN_MERGE_CLIENT};
    bool there                               = choice->available[place];
    attn_cost_t *cost = add_cost(x, places[place], way, choice->workers[place],
                                 there ? &choice->seconds[place] : NULL);

    cost->cheapest = place == choice->best;
    snprintf(cost->reason, sizeof(cost->reason), "%s",
             there                 ? reason
             : place == COST_GROUP ? x->no_group
                                   : TWO_OF_BOTH);
}

/* The cheapest of what there is now. */
static void
choose_again(cost_choice_t *choice)
{
    choice->best = COST_PLACES;
    for (cost_place_t p = COST_LOCAL; p <= COST_CLIENT; p++) {
        if (choice->available[p] &&
            (choice->best == COST_PLACES ||
             choice->seconds[p].total < choice->seconds[choice->best].total)) {
            choice->best = p;
        }
    }
}

/* Local, group and client over one way: as if the batch were to be placed, but for what it lies as.
 * Who is in groups is known of this client alone. */
static void
price(explainer_t *x, uint32_t way)
{
    cost_constants_t constants = x->constants;
    bool own                   = way == 0;
    cost_choice_t choice;
    char spread_for[128], merged_for[128] = "";

    constants.link = link_of(&x->out->ways[way]);
    cost_choose(&constants, NULL, x->may_group && own ? &x->exchange : NULL, &x->batch,
                x->out->workers, &choice);
    bool spread = x->owners > 0 ? x->owners > 1 : would_spread(x, &x->out->ways[way], spread_for);
    if (x->owners > 0) {
        cost_place_t lies = spread ? COST_CLIENT : COST_LOCAL;
        snprintf(spread_for, sizeof(spread_for),
                 spread ? "the only way for chunks on %u workers" : "one worker has all of it",
                 x->owners);
        if (as_it_lies(x, &constants, &choice.seconds[lies], &choice.seconds[COST_GROUP])) {
            choice.available[lies]       = true;
            choice.workers[lies]         = x->owners;
            choice.available[COST_GROUP] = x->may_group && own;
            choice.workers[COST_GROUP]   = x->owners;
            choose_again(&choice);
        }
    }
    bool group         = in_group(x, &choice, merged_for) && spread && own;
    bool fails         = x->cache->client->options.merging == ATTN_MERGING_GROUP && !group && own;
    cost_place_t taken = !spread ? COST_LOCAL
                         : group ? COST_GROUP
                         : fails ? COST_PLACES
                                 : COST_CLIENT;
    if (group) { /* and it is this line that is read */
        snprintf(merged_for + strlen(merged_for), sizeof(merged_for) - strlen(merged_for),
                 "; %.64s", spread_for);
    }
    for (cost_place_t p = COST_LOCAL; p <= COST_CLIENT; p++) {
        if (p != COST_GROUP || own) {
            price_place(x, way, p, &choice,
                        p == COST_GROUP ? merged_for
                        : p == taken    ? spread_for
                                        : "");
            x->out->costs[x->out->n_costs - 1].taken = own && p == taken;
        }
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
        x->owners             = status == ATTN_OK ? count_owners(x->split) : 0;
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
    take_group(x);
    for (uint32_t i = 0; i < out->n_ways; i++) {
        cost_constants_t constants = x->constants;
        constants.link             = link_of(&out->ways[i]);
        out->ways[i].break_even_tokens =
            cost_break_even_tokens(&constants, &x->cache->geometry, out->workers);
        price(x, i);
    }
    price_coordinator(x, out->n_ways - 1); /* pings: thin clients and the coordinator speak gRPC */
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
