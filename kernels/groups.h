/*
 * groups.h: several devices of one host that put partial answers together among themselves: part of
 * the table of backends (kernels.h).
 *
 * Ranks 0 to n - 1 are devices, each of a process of its own. A rank has an inbox, memory that the
 * other ranks map and write to. Of a batch each rank has the states of some nodes of the merge tree
 * for each row, a pair of a query and a head; it sends them where their row is finished and
 * finishes its share: rank g of G rows [R g / G, R (g + 1) / G) of all R, which follow each other
 * entry by entry, query by query, head by head.
 *
 * All ranks make the same exchanges, in the same order, one at a time. Whoever stays away is waited
 * for, until the others' limit or until they are told to give up.
 */
#ifndef ATTN_KERNELS_GROUPS_H
#define ATTN_KERNELS_GROUPS_H

#include "base/attn_types.h"

#define ATTN_RANKS_MAX 8u
#define ATTN_GROUPS_MAX 8u    /* that a device is in at a time */
#define ATTN_INBOX_HANDLE 80u /* bytes that stand for an inbox, for other processes of its host */
#define ATTN_GROUP_DEVICE 32u /* bytes of a device's address on its host, the end included */

struct attn_backend;
struct attn_plan;
struct attn_kv;
struct attn_workspace;
struct attn_answer;
struct attn_node;

typedef struct attn_group attn_group_t;

/** Bytes of all inboxes of a device together, which stay for other groups; of half of one. */
#define ATTN_INBOXES_MAX (UINT64_C(1) << 30)
#define ATTN_HALF_MAX (ATTN_INBOXES_MAX / ATTN_GROUPS_MAX / 2)

typedef struct attn_group_options {
    uint64_t id; /**< the same on all ranks, and of no other group */
    uint32_t ranks, me;
    uint32_t head_dim_v;
    uint64_t half_bytes; /**< room for the states that come in an exchange: attn_group_lines() */
} attn_group_options_t;

/** Bytes of so many states of so many columns in half an inbox. */
static inline uint64_t
attn_group_line_bytes(uint32_t head_dim_v)
{
    return ((uint64_t)head_dim_v + 4) / 3 * 16;
}

/** An entry of a batch whose states lie on several ranks. */
typedef struct attn_group_entry {
    uint32_t n_q;
    uint32_t n_nodes[ATTN_RANKS_MAX];
    const struct attn_node *nodes[ATTN_RANKS_MAX]; /**< ascending, as attn_tree_frontier() gives */
    uint64_t state; /**< of this rank's states of it the first: [node][query][head] */
} attn_group_entry_t;

/** Rows that a rank finishes. */
typedef struct attn_group_share {
    uint64_t first, n; /**< among all of the batch */
} attn_group_share_t;

static inline attn_group_share_t
attn_group_share(uint64_t rows, uint32_t rank, uint32_t ranks)
{
    uint64_t first = rows * rank / ranks;

    return (attn_group_share_t){.first = first, .n = rows * (rank + 1) / ranks - first};
}

/** One layer, up to the share's O: as the arguments of attend(). */
typedef struct attn_group_run {
    const struct attn_plan *plan;
    const struct attn_kv *kv;
    const attn_layer_t *layer;
    struct attn_workspace *workspace;
    attn_dtype_t q_dtype, o_dtype;
    const void *q;
    const struct attn_answer
        *answer;       /**< O and LSE of entries without nodes; its states are NULL */
    void *o;           /**< [rows of the share][head_dim_v] of o_dtype */
    float *lse;        /**< [rows of the share], or NULL */
    uint64_t until_ns; /**< other ranks are waited for until then */
} attn_group_run_t;

/** A backend's groups. Calls for one group are made one at a time, but for abort(). */
typedef struct attn_group_ops {
    /**
     * An empty inbox: a new one, or one that was another group's, for inboxes are kept as long as
     * the backend is there.
     * @return ATTN_ERR_INVALID, ATTN_ERR_NO_MEMORY, ATTN_ERR_UNSUPPORTED
     * @return ATTN_ERR_EXHAUSTED  no inbox that is free is so large, and there is room for no other
     */
    attn_status_t (*open)(struct attn_backend *backend, const attn_group_options_t *options,
                          attn_group_t **group_p);

    /** What other processes map it by, and know it by when they have. */
    attn_status_t (*handle)(attn_group_t *group, uint8_t handle[ATTN_INBOX_HANDLE]);

    /** Which device of the host it is on. */
    void (*device)(struct attn_backend *backend, char device[ATTN_GROUP_DEVICE]);

    /** Map the inboxes of all ranks but this one.
     * @return ATTN_ERR_UNSUPPORTED  the driver cannot
     * @return ATTN_ERR_STALE        what is there is not the inbox that the handle was given for */
    attn_status_t (*connect)(attn_group_t *group, const uint8_t (*handles)[ATTN_INBOX_HANDLE]);

    /** A batch for the exchanges that follow.
     * @return ATTN_ERR_TOO_LARGE  a rank gets more states than its inbox holds: all ranks say so
     * @return ATTN_ERR_STALE      it has made so many exchanges that it is to be made anew */
    attn_status_t (*load)(attn_group_t *group, uint32_t q_heads, const attn_group_entry_t *entries,
                          uint32_t n);

    /**
     * Attend, and exchange. When it fails the group is over: others wait for this rank in vain,
     * until they are told.
     * @return ATTN_ERR_DEADLINE  a rank did not come in time
     * @return ATTN_ERR_ABORTED   somebody said so
     */
    attn_status_t (*run)(attn_group_t *group, const attn_group_run_t *run);

    /**
     * Exchanges of made-up states, all ranks at once: are the answers those of the host's merge,
     * and how long does one take? Of each of `sizes` numbers of rows, as the inbox has room for at
     * most.
     * @param seconds  [sizes]
     * @return ATTN_ERR_INTERNAL  an answer is wrong; otherwise as run(): the group is over
     */
    attn_status_t (*prove)(attn_group_t *group, const uint32_t *rows, uint32_t sizes,
                           uint64_t until_ns, double *seconds);

    /** Have all exchanges of this rank end, the one that is being made and those to come. One that
     * is being made, or comes, tells the other ranks; else they learn it when the group is closed
     * or reach their limit. Any thread; waits for nobody. */
    void (*abort)(attn_group_t *group);

    /** Others are told that this rank comes no more, and what it has mapped of them goes. May wait
     * for the device, which may be in an exchange of another group. */
    void (*close)(attn_group_t *group);
} attn_group_ops_t;

#endif
