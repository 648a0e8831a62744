/*
 * groups.h: the groups of workers that a client has made, which merge partials among themselves.
 * Each takes one step at a time; the next step over the same workers takes it again. What cannot be
 * had, for whatever reason, a step does without: the client merges, to the same bits.
 *
 * Making one takes milliseconds, or seconds where a worker hangs. So steps do not wait for that:
 * they say what they would have, and groups_sweep() makes it. Only a step that insists makes its
 * own. What failed is not tried again for a while, which doubles each time that it fails again.
 */
#ifndef ATTN_CLIENT_GROUPS_H
#define ATTN_CLIENT_GROUPS_H

#include "balancer/directory.h"
#include "client/link.h"

typedef struct groups groups_t;

/** A worker that would be a rank. */
typedef struct group_member {
    uint32_t worker;
    dir_place_t place; /**< as it told */
} group_member_t;

/**
 * May these be a group, by what they told?
 * @param shared  also where they share a GPU
 * @return ATTN_ERR_UNSUPPORTED  no: the sentence says why not
 */
attn_status_t groups_check(const group_member_t *members, uint32_t n, bool shared);

/** What a step wants. */
typedef struct group_wish {
    uint32_t ranks; /**< 2 to ATTN_RANKS_MAX */
    link_t *links[ATTN_RANKS_MAX];
    uint32_t head_dim_v;
    uint64_t half_bytes;  /**< at least */
    bool insists;         /**< it waits for one to be made */
    uint64_t deadline_ns; /**< of that */
} group_wish_t;

/** A group that a step has. */
typedef struct group {
    uint64_t id;
    group_wish_t of; /**< half_bytes as it has them */
    /* under the lock of groups */
    bool taken, over;
    uint64_t used_ns;
    struct group *next;
} group_t;

attn_status_t groups_create(groups_t **groups_p);

/** No group is taken. Those that are there are closed, until deadline_ns. NULL is allowed. */
void groups_destroy(groups_t *groups, uint64_t deadline_ns);

/**
 * One that is free; or, for who insists, a new one.
 * @return ATTN_ERR_BUSY       groups_sweep() will make one, and is due
 * @return ATTN_ERR_EXHAUSTED  all that this client may have are in use, or were a moment ago, or
 *                             workers have no room
 * @return otherwise what making it failed with, now or a while ago
 */
attn_status_t groups_take(groups_t *groups, const group_wish_t *wish, group_t **group_p);

/** The step is over. over: and so is the group. Never blocks. */
void groups_give(groups_t *groups, group_t *group, bool over);

/** Steps that want this, or more of the same workers, do without for a while. ATTN_ERR_BUSY: for a
 * second at first; ATTN_ERR_UNSUPPORTED: for ten minutes; else for ten seconds. */
void groups_refuse(groups_t *groups, const group_wish_t *wish, attn_status_t status,
                   const char *sentence);

/** Do they, and why? */
bool groups_refused(groups_t *groups, const group_wish_t *wish, char sentence[256]);

/** Is there something for groups_sweep(), which closes groups that are over or were not used for
 * long, and makes one that a step wanted? That waits for workers, for two seconds at most each. */
bool groups_due(groups_t *groups);
void groups_sweep(groups_t *groups);

/** Groups that are there. */
uint32_t groups_count(groups_t *groups);

/**
 * What exchanges of these workers take, as they were measured when they last became a group; else
 * as the slowest others were; else as it is assumed.
 * @return false: it is assumed
 */
bool groups_exchange(groups_t *groups, link_t *const *links, uint32_t n, cost_exchange_t *exchange);

#endif
