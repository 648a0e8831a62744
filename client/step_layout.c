/*
 * step_layout.c: which bytes of the caller's tensors go to which worker, and how partials are
 * merged: everything a run needs to know that does not change from layer to layer.
 */
#include "client/step_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

void
span_add(span_t *spans, uint32_t *n, uint64_t offset, uint64_t bytes)
{
    if (bytes == 0) {
        return;
    }
    if (*n > 0 && spans[*n - 1].offset + spans[*n - 1].bytes == offset) {
        spans[*n - 1].bytes += bytes;
    } else {
        spans[(*n)++] = (span_t){.offset = offset, .bytes = bytes};
    }
}

/* Bytes of one row of each tensor. */
typedef struct row_bytes {
    uint64_t q, k, v, o, lse;
} row_bytes_t;

static row_bytes_t
row_bytes(const attn_step_t *step)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint64_t element         = attn_dtype_size(g->kv_dtype);

    return (row_bytes_t){
        .q   = (uint64_t)g->q_heads * g->head_dim_k * attn_dtype_size(step->q_dtype),
        .k   = (uint64_t)g->kv_heads * g->head_dim_k * element,
        .v   = (uint64_t)g->kv_heads * g->head_dim_v * element,
        .o   = (uint64_t)g->q_heads * g->head_dim_v * attn_dtype_size(step->o_dtype),
        .lse = g->q_heads * sizeof(float),
    };
}

static void
part_spans(attn_step_t *step, share_t *share, const split_part_t *part, const row_bytes_t *row)
{
    const step_entry_t *e = &step->entries[part->entry];

    if (part->attends) {
        span_add(share->q, &share->n_q, e->q_row * row->q, e->n_q * row->q);
    }
    if (part->attends && part->n_nodes == 0) {
        span_add(share->o, &share->n_o, e->q_row * row->o, e->n_q * row->o);
        span_add(share->lse, &share->n_lse, e->q_row * row->lse,
                 step->want_lse ? e->n_q * row->lse : 0);
    }
    for (uint32_t r = 0; r < part->n_rows; r++) {
        uint64_t first = e->new_row + part->rows[r].first;
        span_add(share->k, &share->n_k, first * row->k, part->rows[r].n * row->k);
        span_add(share->v, &share->n_v, first * row->v, part->rows[r].n * row->v);
    }
    if (part->attends && step->group == NULL) {
        share->n_states += (uint64_t)part->n_nodes * e->n_q * step->cache->geometry.q_heads;
    }
}

static attn_status_t
share_layout(attn_step_t *step, share_t *share)
{
    const split_share_t *split = share->split;
    row_bytes_t row            = row_bytes(step);
    uint64_t runs = 0, path = 0;

    for (uint32_t p = 0; p < split->n_parts; p++) {
        const step_entry_t *e = &step->entries[split->parts[p].entry];
        runs += split->parts[p].n_rows;
        path += e->masked ? e->n_new : 0;
    }
    uint64_t parts = split->n_parts, answers = parts + step->n_grouped;
    span_t *spans   = calloc(parts + 2 * answers + 2 * runs + 1, sizeof(*spans));
    share->q        = spans;
    share->accepted = calloc(parts + 1, sizeof(*share->accepted));
    share->path     = calloc(path + 1, sizeof(*share->path));
    share->lists    = step->list_room > 0 ? calloc(parts + 1, sizeof(*share->lists)) : NULL;
    share->pieces   = calloc(parts + 2 * answers + 2 * runs + 2, sizeof(*share->pieces));
    if (spans == NULL || share->accepted == NULL || share->path == NULL ||
        (share->lists == NULL && step->list_room > 0) || share->pieces == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step's layout");
    }
    share->o   = spans + parts;
    share->lse = spans + parts + answers;
    share->k   = spans + parts + 2 * answers;
    share->v   = share->k + runs;
    for (uint32_t p = 0; p < split->n_parts; p++) {
        part_spans(step, share, &split->parts[p], &row);
    }
    if (share->ranked) {
        step_group_spans(step, share, row.o / step->cache->geometry.q_heads, sizeof(float));
    }
    share->states =
        malloc(share->n_states * (8 + 4 * (uint64_t)step->cache->geometry.head_dim_v) + 1);
    return share->states != NULL ? ATTN_OK
                                 : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for partials");
}

/* ---- gathers ---- */

static int
by_key(const void *a, const void *b)
{
    const partial_t *x = a, *y = b;

    return (x->key > y->key) - (x->key < y->key);
}

static uint32_t
count_nodes(const attn_step_t *step, uint32_t *per_entry)
{
    uint32_t total = 0;

    for (uint32_t s = 0; s < step->n_shares; s++) {
        const split_share_t *split = step->shares[s].split;
        for (uint32_t p = 0; p < split->n_parts; p++) {
            const split_part_t *part = &split->parts[p];
            uint32_t nodes           = part->attends ? part->n_nodes : 0;
            per_entry[part->entry] += nodes;
            total += nodes;
        }
    }
    return total;
}

static void
share_partials(attn_step_t *step, share_t *share, gather_t **of_entry)
{
    uint64_t state = 0, heads = step->cache->geometry.q_heads;

    for (uint32_t p = 0; p < share->split->n_parts; p++) {
        const split_part_t *part = &share->split->parts[p];
        gather_t *g              = of_entry[part->entry];
        for (uint32_t k = 0; part->attends && k < part->n_nodes; k++) {
            uint64_t first = (uint64_t)part->nodes[k].index << part->nodes[k].level;
            g->partials[g->n_partials++] =
                (partial_t){.key = (uint32_t)first, .share = share, .state = state};
            state += step->entries[part->entry].n_q * heads;
        }
    }
}

static attn_status_t
gathers_layout(attn_step_t *step)
{
    uint32_t *nodes     = calloc(step->n, sizeof(*nodes));
    gather_t **of_entry = calloc(step->n, sizeof(gather_t *));
    uint32_t total      = nodes != NULL ? count_nodes(step, nodes) : 0;

    step->gathers       = calloc(step->n, sizeof(*step->gathers));
    partial_t *partials = calloc(total + 1, sizeof(*partials));
    bool allocated = nodes != NULL && of_entry != NULL && step->gathers != NULL && partials != NULL;
    partial_t *at  = partials;
    for (uint32_t i = 0; allocated && i < step->n; i++) {
        if (nodes[i] > 0) {
            gather_t *g = &step->gathers[step->n_gathers++];
            *g          = (gather_t){.entry = i, .row = step->entries[i].q_row, .partials = at};
            of_entry[i] = g;
            at += nodes[i];
        }
    }
    for (uint32_t s = 0; allocated && s < step->n_shares; s++) {
        share_partials(step, &step->shares[s], of_entry);
    }
    for (uint32_t g = 0; allocated && g < step->n_gathers; g++) {
        qsort(step->gathers[g].partials, step->gathers[g].n_partials, sizeof(partial_t), by_key);
    }
    if (!allocated || step->n_gathers == 0) {
        free(partials); /* else the first gather's partials are the block */
    }
    free(nodes);
    free(of_entry);
    return allocated ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step's merges");
}

attn_status_t
step_layout(attn_step_t *step)
{
    step->n_shares = step->split->n_shares;
    step->shares   = calloc(step->n_shares + 1, sizeof(*step->shares));
    if (step->shares == NULL) {
        step->n_shares = 0;
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step's shares");
    }
    for (uint32_t s = 0; s < step->n_shares; s++) {
        step->shares[s].step  = step;
        step->shares[s].split = &step->split->shares[s];
    }
    step_group_ranks(step);
    for (uint32_t s = 0; s < step->n_shares; s++) {
        attn_status_t status = share_layout(step, &step->shares[s]);
        if (status != ATTN_OK) {
            return status;
        }
    }
    return step->group == NULL ? gathers_layout(step) : ATTN_OK;
}

/* ---- the merge ---- */

/* The states of one partial, as a block of rows * heads. */
static attn_state_t
partial_states(const attn_step_t *step, const partial_t *partial)
{
    const share_t *share = partial->share;
    uint8_t *l           = share->states + share->n_states * sizeof(int32_t);
    uint8_t *a           = l + share->n_states * sizeof(float);

    return (attn_state_t){
        .e = (int32_t *)(void *)share->states + partial->state,
        .l = (float *)(void *)l + partial->state,
        .a = (float *)(void *)a + partial->state * step->cache->geometry.head_dim_v,
    };
}

/*
 * Merge an entry's partials in the fixed tree, into the first: the stack holds nodes in
 * ascending key order, and two neighbours merge once their common ancestor is below the one
 * they have with what comes next.
 */
static attn_state_t
merge_partials(const attn_step_t *step, const gather_t *g, uint64_t rows)
{
    const partial_t *stack[64]; /* ancestors' levels strictly decrease: at most 33 */
    uint32_t depth = 0, d = step->cache->geometry.head_dim_v;

    for (uint32_t i = 0; i <= g->n_partials; i++) {
        while (depth >= 2 && (i == g->n_partials ||
                              attn_tree_lca(stack[depth - 2]->key, stack[depth - 1]->key) <
                                  attn_tree_lca(stack[depth - 1]->key, g->partials[i].key))) {
            attn_state_merge(partial_states(step, stack[depth - 2]),
                             partial_states(step, stack[depth - 1]), rows, d);
            depth--;
        }
        if (i < g->n_partials) {
            stack[depth++] = &g->partials[i];
        }
    }
    return partial_states(step, stack[0]);
}

void
step_gather(attn_step_t *step)
{
    const attn_geometry_t *geometry = &step->cache->geometry;
    const float *sinks              = geometry->layer_table[step->layer].sinks;
    uint32_t d = geometry->head_dim_v, heads = geometry->q_heads;
    uint64_t o_row = d * attn_dtype_size(step->o_dtype);
    float o[256];

    for (uint32_t i = 0; i < step->n_gathers; i++) {
        const gather_t *g = &step->gathers[i];
        uint64_t rows     = (uint64_t)step->entries[g->entry].n_q * heads;
        attn_state_t s    = merge_partials(step, g, rows);
        for (uint64_t r = 0; r < rows; r++) {
            uint64_t at = g->row * heads + r;
            attn_state_finish_row(s.a + r * d, s.l[r], s.e[r], d,
                                  sinks != NULL ? &sinks[r % heads] : NULL, o,
                                  step->lse != NULL ? step->lse + at : NULL);
            attn_convert((uint8_t *)step->o + at * o_row, step->o_dtype, o, ATTN_F32, d);
        }
    }
}
