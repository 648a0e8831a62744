/*
 * step_group.c: a step whose partials are merged among the workers that have them. They are told at
 * begin who has which nodes of which entry; each answers a run with O of a share of the rows, and
 * nothing is merged here. The bits are those that the client would have made: so whether a step has
 * a group is decided step by step, and one that cannot have it does without.
 */
#include "client/step_int.h"

#include "base/checked.h"
#include "base/status.h"
#include "client/measure.h"

#include <stdlib.h>

/* Has the share partials of the step? */
static bool
has_partials(const split_share_t *split)
{
    bool has = false;

    for (uint32_t p = 0; p < split->n_parts && !has; p++) {
        has = split->parts[p].attends && split->parts[p].n_nodes > 0;
    }
    return has;
}

/* Shares that would be ranks. */
static uint32_t
number_ranks(const attn_step_t *step)
{
    uint32_t ranks = 0;

    for (uint32_t s = 0; s < step->split->n_shares; s++) {
        ranks += has_partials(&step->split->shares[s]);
    }
    return ranks;
}

/* Who would put its partials together for less? */
static cost_place_t
who_merges(const attn_step_t *step, const group_wish_t *wish)
{
    const attn_geometry_t *g = &step->cache->geometry;
    cost_merge_t merge       = {.workers    = wish->ranks,
                                .head_dim_v = g->head_dim_v,
                                .o_size     = (uint32_t)attn_dtype_size(step->o_dtype)};
    cost_constants_t constants;
    cost_exchange_t exchange;
    cost_link_t link;

    for (uint32_t s = 0; s < step->split->n_shares; s++) {
        const split_share_t *split = &step->split->shares[s];
        for (uint32_t p = 0; p < split->n_parts; p++) {
            const split_part_t *part = &split->parts[p];
            uint64_t rows            = (uint64_t)step->entries[part->entry].n_q * g->q_heads;
            merge.states += part->attends ? rows * part->n_nodes : 0;
        }
    }
    for (uint32_t i = 0; i < step->n; i++) { /* at most: some entries are whole */
        merge.rows += (uint64_t)step->entries[i].n_q * g->q_heads;
    }
    merge.rows = attn_min(merge.rows, merge.states);
    cost_constants_init(&constants);
    constants.merge_bandwidth = measure_merge();
    if (links_meter(step->client->links, &link)) {
        constants.link.hop_seconds = link.hop_seconds;
        constants.link.bandwidth   = link.bandwidth > 0 ? link.bandwidth : constants.link.bandwidth;
    }
    groups_exchange(step->client->groups, wish->links, wish->ranks, &exchange);
    return cost_merge_place(&constants, &exchange, &merge);
}

/* The entries that are merged, with what each rank has of them. */
static attn_status_t
list_entries(attn_step_t *step)
{
    attn_group_entry_t *of = calloc(step->n, sizeof(*of));
    uint32_t rank          = 0;

    if (of == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group's step");
    }
    for (uint32_t s = 0; s < step->split->n_shares; s++) {
        const split_share_t *split = &step->split->shares[s];
        for (uint32_t p = 0; p < split->n_parts; p++) {
            const split_part_t *part = &split->parts[p];
            if (part->attends && part->n_nodes > 0) {
                of[part->entry].n_q           = step->entries[part->entry].n_q;
                of[part->entry].n_nodes[rank] = part->n_nodes;
                of[part->entry].nodes[rank]   = part->nodes;
            }
        }
        rank += has_partials(split);
    }
    step->grouped      = of;
    step->grouped_rows = calloc(step->n, sizeof(*step->grouped_rows));
    if (step->grouped_rows == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group's step");
    }
    for (uint32_t i = 0; i < step->n; i++) { /* those that are not merged go */
        if (of[i].n_q > 0) {
            of[step->n_grouped]                   = of[i];
            step->grouped_rows[step->n_grouped++] = step->entries[i].q_row;
        }
    }
    return ATTN_OK;
}

/* Bytes of states that a rank gets in a run at most. */
static uint64_t
half_bytes(const attn_step_t *step, uint32_t ranks)
{
    uint64_t rows = 0, most = 0;

    for (uint32_t i = 0; i < step->n_grouped; i++) {
        uint64_t nodes = 0;
        for (uint32_t r = 0; r < ranks; r++) {
            nodes += step->grouped[i].n_nodes[r];
        }
        rows += (uint64_t)step->grouped[i].n_q * step->cache->geometry.q_heads;
        most = attn_max(most, nodes);
    }
    return (rows / ranks + 1) * most * attn_group_line_bytes(step->cache->geometry.head_dim_v);
}

/* Which workers it is. */
static attn_status_t
wish_links(attn_step_t *step, group_wish_t *wish)
{
    group_member_t members[ATTN_RANKS_MAX];
    control_t *control   = step->client->control;
    attn_status_t status = ATTN_OK;
    uint32_t ranks = number_ranks(step), rank = 0;

    if (step->client->groups == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "groups are of workers of a cluster");
    }
    for (uint32_t s = 0; s < step->split->n_shares && ranks <= ATTN_RANKS_MAX; s++) {
        uint32_t worker = step->split->shares[s].worker;
        if (!has_partials(&step->split->shares[s])) {
            continue;
        }
        members[rank].worker = worker;
        status               = control->ops->place(control, worker, &members[rank].place);
        if (status == ATTN_OK) {
            status = step_link(step, worker, &wish->links[rank++]);
        }
        if (status != ATTN_OK) {
            return status;
        }
    }
    wish->ranks = ranks;
    return groups_check(members, ranks, wish->insists);
}

static attn_status_t
take_group(attn_step_t *step, group_wish_t *wish)
{
    attn_status_t status = list_entries(step);

    if (status == ATTN_OK) {
        wish->half_bytes = half_bytes(step, wish->ranks);
        status           = groups_take(step->client->groups, wish, &step->group);
    }
    if (status == ATTN_ERR_BUSY) {
        client_wake(step->client); /* its keeper makes one */
    }
    return status;
}

attn_status_t
step_group(attn_step_t *step)
{
    attn_merging_t merging = step->client->options.merging;
    group_wish_t *wish     = &step->wish;

    if (merging == ATTN_MERGING_CLIENT || number_ranks(step) < 2) {
        return ATTN_OK;
    }
    *wish                = (group_wish_t){.head_dim_v  = step->cache->geometry.head_dim_v,
                                          .insists     = merging == ATTN_MERGING_GROUP,
                                          .deadline_ns = step->deadline_ns};
    attn_status_t status = wish_links(step, wish);
    if (status == ATTN_OK && (wish->insists || who_merges(step, wish) == COST_GROUP)) {
        status = take_group(step, wish);
    }
    if (step->group != NULL) {
        atomic_fetch_add(&step->client->steps_grouped, 1);
        return ATTN_OK;
    }
    step->n_grouped = 0;
    return wish->insists ? attn_fail_in(status, "merging is group, but there is none: ") : ATTN_OK;
}

void
step_group_ranks(attn_step_t *step)
{
    uint32_t rank = 0;

    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_t *share = &step->shares[s];
        share->ranked  = step->group != NULL && has_partials(share->split);
        share->rank    = share->ranked ? rank++ : 0;
    }
}

void
step_group_spans(const attn_step_t *step, share_t *share, uint64_t o_row, uint64_t lse_row)
{
    uint64_t heads = step->cache->geometry.q_heads, rows = 0, at = 0;

    for (uint32_t i = 0; i < step->n_grouped; i++) {
        rows += step->grouped[i].n_q * heads;
    }
    attn_group_share_t mine = attn_group_share(rows, share->rank, step->group->of.ranks);
    for (uint32_t i = 0; i < step->n_grouped; i++) {
        uint64_t n     = step->grouped[i].n_q * heads;
        uint64_t first = attn_max(mine.first, at), end = attn_min(mine.first + mine.n, at + n);
        if (first < end) {
            uint64_t row = step->grouped_rows[i] * heads + first - at;
            span_add(share->o, &share->n_o, row * o_row, (end - first) * o_row);
            span_add(share->lse, &share->n_lse, row * lse_row,
                     step->want_lse ? (end - first) * lse_row : 0);
        }
        at += n;
    }
}

void
step_group_give(attn_step_t *step)
{
    if (step->group != NULL) {
        groups_give(step->client->groups, step->group, !step->group_whole);
        step->group = NULL;
        if (!step->group_whole) {
            groups_refuse(step->client->groups, &step->wish, ATTN_ERR_BUSY,
                          "their last group ended with its step");
        }
    }
    free(step->grouped);
    free(step->grouped_rows);
}
