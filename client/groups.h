/*
 * groups.h: the groups of workers that a client has made, which merge partials among themselves.
 * Each takes one step at a time; the next step over the same workers takes it again. What cannot be
 * had, for whatever reason, a step does without: the client merges, to the same bits.
 */
#ifndef ATTN_CLIENT_GROUPS_H
#define ATTN_CLIENT_GROUPS_H

#include "client/link.h"

typedef struct groups groups_t;

/** A group that a step has. */
typedef struct group {
    uint64_t id;
    uint32_t ranks;
    link_t *links[ATTN_RANKS_MAX]; /**< rank by rank */
    uint32_t head_dim_v;
    uint64_t half_bytes;
    bool apart;               /**< each rank has a GPU of its own */
    cost_exchange_t measured; /**< as it was made, by the slowest rank */
    /* under the lock of groups */
    bool taken, over;
    uint64_t used_ns;
    struct group *next;
} group_t;

attn_status_t groups_create(groups_t **groups_p);

/** No group is taken. Those that are there are closed, until deadline_ns. NULL is allowed. */
void groups_destroy(groups_t *groups, uint64_t deadline_ns);

/** What a step wants. */
typedef struct group_wish {
    uint32_t ranks; /**< 2 to ATTN_RANKS_MAX */
    link_t *links[ATTN_RANKS_MAX];
    uint32_t head_dim_v;
    uint64_t half_bytes; /**< at least */
    bool shared;         /**< also of ranks that share a GPU */
    uint64_t deadline_ns;
} group_wish_t;

/**
 * One that is free, or a new one, which takes some milliseconds. Workers that could not be made a
 * group are not asked again for a while.
 * @return ATTN_ERR_UNSUPPORTED  these workers cannot: other hosts, no GPUs, one GPU for two
 * @return ATTN_ERR_EXHAUSTED    all that this client may have are in use, or workers have no room
 * @return otherwise what making it failed with
 */
attn_status_t groups_take(groups_t *groups, const group_wish_t *wish, group_t **group_p);

/** The step is over. over: and so is the group. Never blocks. */
void groups_give(groups_t *groups, group_t *group, bool over);

/** Is there something for groups_sweep(), which closes groups that are over or were not used for
 * long? That waits for workers. */
bool groups_due(groups_t *groups);
void groups_sweep(groups_t *groups);

/** Groups that are there. */
uint32_t groups_count(groups_t *groups);

/** What exchanges take: as the slowest of the groups that are there, whose ranks have a GPU each,
 * was measured, or as it is assumed. @return false: it is assumed */
bool groups_exchange(groups_t *groups, cost_exchange_t *exchange);

#endif
