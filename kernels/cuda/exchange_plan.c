/*
 * Who sends what where. The parts of a row, the states of all ranks in the order of the tree, are
 * the same for all rows of an entry; what rows of a rank's share have in common with their entry is
 * a stretch. Lines of a rank's inbox are numbered stretch by stretch, row by row, in the order of
 * the parts, those of the rank itself left out. How many there are is known from numbers of nodes
 * alone: what does not fit is refused before there are any tables.
 */
#include "kernels/cuda/exchange_plan.h"

#include "base/checked.h"
#include "base/status.h"
#include "kernels/plan_types.h"

#include <stdlib.h>
#include <string.h>

/* Parts of an entry: more come of no placement, and chips have no stack for them. */
#define PARTS_MAX 1024u

/* A state of each row of an entry. */
typedef struct part {
    uint64_t key, end; /* of the node: its first, and the one behind its last */
    uint32_t rank, node, level;
} part_t;

typedef struct planner {
    const cuda_exchange_batch_t *batch;
    cuda_exchange_plan_t *plan;
    part_t parts[PARTS_MAX]; /* of the entry */
    uint32_t n_parts;
    uint64_t lines[CUDA_RANKS]; /* numbered so far, first to know how many */
} planner_t;

static attn_status_t
check(const cuda_exchange_batch_t *b)
{
    if (b->ranks == 0 || b->ranks > CUDA_RANKS || b->me >= b->ranks) {
        return attn_fail(ATTN_ERR_INVALID, "rank %u of %u: at most %u ranks", b->me, b->ranks,
                         CUDA_RANKS);
    }
    if (b->q_heads == 0 || (b->head_dim_v != 64 && b->head_dim_v != 128 && b->head_dim_v != 256)) {
        return attn_fail(ATTN_ERR_INVALID, "%u heads of %u columns: one or more, of 64, 128 or 256",
                         b->q_heads, b->head_dim_v);
    }
    return ATTN_OK;
}

/* ---- parts ---- */

/* The next part in ascending key of those that `at` points to, a node a rank; false: there is none.
 */
static bool
next_part(const attn_group_entry_t *entry, uint32_t ranks, uint32_t *at, part_t *part)
{
    bool found = false;

    for (uint32_t r = 0; r < ranks; r++) {
        if (at[r] < entry->n_nodes[r]) {
            attn_node_t node = entry->nodes[r][at[r]];
            uint64_t key     = (uint64_t)node.index << node.level;
            if (!found || key < part->key) {
                *part = (part_t){
                    .key = key, .end = key + (UINT64_C(1) << node.level), .rank = r, .node = at[r]};
                found = true;
            }
        }
    }
    if (found) {
        at[part->rank]++;
    }
    return found;
}

/* All ranks' states of an entry in the order of the tree, and how deep a stack they need. */
static attn_status_t
order_parts(planner_t *p, uint32_t e)
{
    const attn_group_entry_t *entry = &p->batch->entries[e];
    uint32_t at[CUDA_RANKS] = {0}, stack[PARTS_MAX], n = 0;
    part_t part;

    p->n_parts = 0;
    while (next_part(entry, p->batch->ranks, at, &part)) {
        const part_t *before = p->n_parts > 0 ? &p->parts[p->n_parts - 1] : NULL;
        if (before != NULL && part.key < before->end) {
            return attn_fail(ATTN_ERR_INVALID,
                             "entry %u: node %u of rank %u and node %u of rank %u hold the same "
                             "leaves",
                             e, before->node, before->rank, part.node, part.rank);
        }
        part.level = before == NULL ? ATTN_LEVEL_NONE : attn_key_lca(before->key, part.key);
        while (n >= 2 && stack[n - 1] < part.level) {
            n--;
        }
        stack[n++]             = part.level;
        p->parts[p->n_parts++] = part;
        p->plan->depth         = n > p->plan->depth ? n : p->plan->depth;
    }
    return ATTN_OK;
}

/* ---- tables ---- */

static bool
reserve(void *table_p, uint64_t *room, uint64_t n, size_t size)
{
    void **table = table_p;

    if (n > *room) {
        uint64_t more = attn_max(n, *room * 2);
        void *grown   = realloc(*table, more * size);
        if (grown == NULL) {
            return false;
        }
        *table = grown;
        *room  = more;
    }
    return true;
}

/* Rows [first, end) of an entry, which this rank finishes. */
static void
add_rows(planner_t *p, uint32_t e, uint64_t first, uint64_t end, uint64_t line)
{
    cuda_exchange_plan_t *plan = p->plan;
    uint32_t heads = p->batch->q_heads, me = p->batch->me;
    uint64_t per_node = (uint64_t)p->batch->entries[e].n_q * heads;

    for (uint64_t r = first; r < end; r++) {
        plan->rows[plan->n_rows++] = (cuda_exchange_row_t){.part_first = (uint32_t)plan->n_parts,
                                                           .n_parts    = p->n_parts,
                                                           .head       = (uint32_t)(r % heads),
                                                           .entry      = e,
                                                           .query      = (uint32_t)(r / heads)};
        for (uint32_t i = 0; i < p->n_parts; i++) {
            const part_t *part = &p->parts[i];
            uint64_t at =
                part->rank == me ? p->batch->entries[e].state + part->node * per_node + r : line++;
            plan->parts[plan->n_parts++] =
                (cuda_exchange_part_t){(uint32_t)at, part->rank | part->level << 8};
        }
    }
}

/* This rank's states of rows [first, end) of an entry, which another one finishes. */
static void
add_sends(planner_t *p, uint32_t e, uint32_t rank, uint64_t first, uint64_t end, uint64_t line)
{
    cuda_exchange_plan_t *plan = p->plan;
    uint32_t me                = p->batch->me;
    uint64_t mine = p->batch->entries[e].n_nodes[me], of_rank = p->batch->entries[e].n_nodes[rank];
    uint64_t per_node = (uint64_t)p->batch->entries[e].n_q * p->batch->q_heads;

    for (uint64_t r = first; r < end && mine > 0; r++) {
        uint64_t of_row = line + (r - first) * (p->n_parts - of_rank);
        for (uint32_t i = 0; i < p->n_parts; i++) {
            const part_t *part = &p->parts[i];
            if (part->rank == me) {
                uint64_t state = p->batch->entries[e].state + part->node * per_node + r;
                plan->sends[plan->n_sends++] =
                    (cuda_send_t){.state = (uint32_t)state, .rank = rank, .line = (uint32_t)of_row};
            }
            of_row += part->rank != rank;
        }
    }
}

/* Call `of` with what each rank finishes of an entry that begins at row `at` of all. */
static void
each_stretch(planner_t *p, uint32_t e, uint64_t at,
             void (*of)(planner_t *p, uint32_t e, uint32_t rank, uint64_t first, uint64_t end))
{
    const cuda_exchange_batch_t *b = p->batch;
    uint64_t rows                  = (uint64_t)b->entries[e].n_q * b->q_heads;

    for (uint32_t rank = 0; rank < b->ranks; rank++) {
        attn_group_share_t share = attn_group_share(p->plan->rows_all, rank, b->ranks);
        uint64_t first           = attn_max(share.first, at);
        uint64_t end             = attn_min(share.first + share.n, at + rows);
        if (first < end) {
            of(p, e, rank, first - at, end - at);
            p->lines[rank] += (end - first) * (p->n_parts - b->entries[e].n_nodes[rank]);
        }
    }
}

static void
add_stretch(planner_t *p, uint32_t e, uint32_t rank, uint64_t first, uint64_t end)
{
    if (rank == p->batch->me) {
        add_rows(p, e, first, end, p->lines[rank]);
    } else {
        add_sends(p, e, rank, first, end, p->lines[rank]);
    }
}

static void
count_stretch(planner_t *p, uint32_t e, uint32_t rank, uint64_t first, uint64_t end)
{
    if (rank == p->batch->me) {
        p->plan->n_rows += end - first;
        p->plan->n_parts += (end - first) * p->n_parts;
    } else {
        p->plan->n_sends += (end - first) * p->batch->entries[e].n_nodes[p->batch->me];
    }
}

/* How long the tables will be, and how many lines each rank gets. */
static attn_status_t
count(planner_t *p)
{
    const cuda_exchange_batch_t *b = p->batch;
    uint64_t at                    = 0;

    for (uint32_t e = 0; e < b->n; e++) {
        uint64_t parts = 0;
        for (uint32_t rank = 0; rank < b->ranks; rank++) {
            parts += b->entries[e].n_nodes[rank];
        }
        if (parts > PARTS_MAX) {
            return attn_fail(ATTN_ERR_TOO_LARGE, "entry %u: %llu states a row, more than %u", e,
                             (unsigned long long)parts, PARTS_MAX);
        }
        p->n_parts = (uint32_t)parts;
        each_stretch(p, e, at, count_stretch);
        at += (uint64_t)b->entries[e].n_q * b->q_heads;
    }
    return ATTN_OK;
}

/* What all ranks must agree on, and what 32 bits number. */
static attn_status_t
check_sizes(const planner_t *p)
{
    const cuda_exchange_batch_t *b = p->batch;
    uint64_t room                  = b->half / CUDA_LINE_BYTES(b->head_dim_v);

    for (uint32_t rank = 0; rank < b->ranks; rank++) {
        if (p->lines[rank] > room) {
            return attn_fail(ATTN_ERR_TOO_LARGE,
                             "rank %u gets %llu states in an exchange: its inbox has room for %llu",
                             rank, (unsigned long long)p->lines[rank], (unsigned long long)room);
        }
    }
    if (p->plan->n_parts > UINT32_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "%llu states to merge in an exchange: at most 2^32",
                         (unsigned long long)p->plan->n_parts);
    }
    for (uint32_t e = 0; e < b->n; e++) {
        uint64_t rows = (uint64_t)b->entries[e].n_q * b->q_heads;
        if (b->entries[e].state + rows * b->entries[e].n_nodes[b->me] > UINT32_MAX) {
            return attn_fail(ATTN_ERR_TOO_LARGE, "entry %u: more states than 32 bits number", e);
        }
    }
    return ATTN_OK;
}

static attn_status_t
take_tables(cuda_exchange_plan_t *plan)
{
    return reserve(&plan->sends, &plan->room[0], plan->n_sends, sizeof(*plan->sends)) &&
                   reserve(&plan->rows, &plan->room[1], plan->n_rows, sizeof(*plan->rows)) &&
                   reserve(&plan->parts, &plan->room[2], plan->n_parts, sizeof(*plan->parts))
               ? ATTN_OK
               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for an exchange's tables");
}

static attn_status_t
make_tables(planner_t *p)
{
    attn_status_t status = ATTN_OK;
    uint64_t at          = 0;

    memset(p->lines, 0, sizeof(p->lines));
    p->plan->n_sends = p->plan->n_rows = p->plan->n_parts = 0;
    for (uint32_t e = 0; e < p->batch->n && status == ATTN_OK; e++) {
        if ((status = order_parts(p, e)) == ATTN_OK) {
            each_stretch(p, e, at, add_stretch);
        }
        at += (uint64_t)p->batch->entries[e].n_q * p->batch->q_heads;
    }
    return status;
}

attn_status_t
cuda_exchange_plan(const cuda_exchange_batch_t *batch, cuda_exchange_plan_t *plan)
{
    attn_status_t status = check(batch);
    planner_t *p;

    if (status != ATTN_OK) {
        return status;
    }
    if ((p = calloc(1, sizeof(*p))) == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for an exchange's tables");
    }
    p->batch      = batch;
    p->plan       = plan;
    plan->n_sends = plan->n_rows = plan->n_parts = plan->rows_all = 0;
    plan->depth                                                   = 1;
    for (uint32_t e = 0; e < batch->n; e++) {
        plan->rows_all += (uint64_t)batch->entries[e].n_q * batch->q_heads;
    }
    plan->row_first = attn_group_share(plan->rows_all, batch->me, batch->ranks).first;
    if (plan->rows_all > UINT32_MAX) {
        status = attn_fail(ATTN_ERR_TOO_LARGE, "%llu rows in an exchange: at most 2^32",
                           (unsigned long long)plan->rows_all);
    }
    if (status == ATTN_OK && (status = count(p)) == ATTN_OK &&
        (status = check_sizes(p)) == ATTN_OK && (status = take_tables(plan)) == ATTN_OK) {
        status = make_tables(p);
    }
    free(p);
    return status;
}

void
cuda_exchange_plan_free(cuda_exchange_plan_t *plan)
{
    free(plan->sends);
    free(plan->rows);
    free(plan->parts);
    *plan = (cuda_exchange_plan_t){0};
}
