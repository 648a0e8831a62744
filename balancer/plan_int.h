/* plan_int.h: between the files of the planner (plan.c lists them); nobody else includes it. */
#ifndef ATTN_BALANCER_PLAN_INT_H
#define ATTN_BALANCER_PLAN_INT_H

#include "balancer/plan.h"
#include "kernels/plan_types.h"

#include <stdlib.h>

/** A span that is not shared. */
#define SET_NONE UINT32_MAX

/** A vector that keeps its memory from plan to plan. */
#define VECTOR(type)                                                                               \
    struct {                                                                                       \
        type *at;                                                                                  \
        uint32_t n, room;                                                                          \
    }

/** Room for `more` behind the end of a vector: false, and builder.no_memory, without memory. */
#define RESERVE(builder, vector, more)                                                             \
    ((vector).room - (vector).n >= (more) ||                                                       \
     ((vector).at = plan_room((builder), (vector).at, &(vector).room,                              \
                              (uint64_t)(vector).n + (more), sizeof(*(vector).at)),                \
      (vector).room - (vector).n >= (more)))

#define PUSH(builder, vector, ...)                                                                 \
    do {                                                                                           \
        if (RESERVE((builder), (vector), 1)) {                                                     \
            (vector).at[(vector).n++] = (__VA_ARGS__);                                             \
        }                                                                                          \
    } while (0)

/** Leaves that a set of entries has in common, in one of their runs. */
typedef struct segment {
    uint32_t run;
    uint32_t leaf_first, leaf_end;
    uint32_t set;
    uint32_t next; /* of the same entry; 0: none, else index + 1 */
} segment_t;

/** Entries with the same pages: ids[first] to ids[first + n - 1] of the builder. */
typedef struct share_set {
    uint32_t first, n;
    uint32_t rows;
    uint32_t leaves;
    uint32_t n_spans; /* of each of the entries */
    uint32_t link_first;
} share_set_t;

/** How a set's k-th span lies among all spans of its entries. */
typedef struct link {
    bool cut;             /* some entry has something else before it */
    uint32_t left, right; /* levels, as in attn_work_t: the least of all entries */
    uint32_t range;       /* that it lies in */
} link_t;

/** Spans of an entry, one after the other, all of one set and below one of its nodes. */
typedef struct stretch {
    uint32_t span_first, span_end;
    uint32_t set, node;
    uint64_t key, last_key; /* of its first and last leaf */
    uint64_t tokens;        /* of whole leaves, but for what no query of the entry sees */
} stretch_t;

/** A plan, and the memory that it and the next one are made in. */
typedef struct builder {
    attn_plan_t plan; /* first: whoever has the plan has the builder */
    const attn_problem_t *problem;
    uint32_t parallelism;
    bool no_memory;
    VECTOR(attn_plan_entry_t) entries;
    VECTOR(attn_span_t) spans;
    VECTOR(attn_member_t) members;
    VECTOR(attn_work_t) ranges, works; /* ranges are works before some are cut into pieces */
    VECTOR(attn_part_t) refs, parts;   /* a reduction's parts count refs, in ranges, until then */
    VECTOR(attn_reduction_t) reductions;
    VECTOR(uint64_t) keys;
    VECTOR(uint32_t) order;
    VECTOR(uint32_t) piece_first; /* [ranges + 1], if any was cut */
    VECTOR(stretch_t) stretches;
    VECTOR(uint32_t) stretch_first; /* [n + 1] of the entry */
    /* sharing */
    VECTOR(uint32_t) table;                 /* of first pages */
    VECTOR(uint32_t) scratch;               /* what the following point to */
    uint32_t *ids, *place;                  /* [n] entries, those of a set side by side; where */
    uint32_t *segment_first, *segment_last; /* [n] of the entry's segments, index + 1 */
    uint32_t *run_segment;                  /* [runs of the longest entry] */
    uint32_t *run_order, *whole_order;      /* likewise; the latter is of `whole` runs, if not 0 */
    uint32_t whole;
    VECTOR(segment_t) segments;
    VECTOR(share_set_t) sets;
    VECTOR(link_t) links;
    VECTOR(uint32_t) at_set; /* [sets] a count for each, 0 between uses */
} builder_t;

/** Memory for at least `wanted` of a vector. */
void *plan_room(builder_t *b, void *at, uint32_t *room, uint64_t wanted, size_t size);

/** Is the problem well formed? */
attn_status_t plan_check(const attn_problem_t *problem, uint32_t parallelism, uint32_t few,
                         uint32_t many);

/** Positions that queries first to first + n - 1 of an entry can see. */
static inline void
plan_see(const attn_problem_t *p, const attn_problem_entry_t *entry, uint32_t first, uint32_t n,
         int64_t *see_first, int64_t *see_end)
{
    int64_t position = (int64_t)entry->kv_length - entry->n_q + first;
    int64_t window   = p->window < INT32_MAX ? (int64_t)p->window : INT32_MAX;

    *see_end = p->causal ? position + n : (int64_t)entry->kv_length;
    if (entry->mask != NULL) {
        /* Any of the tokens may be named, and a query that names one stands lowest. */
        position = (int64_t)entry->kv_length - entry->mask_tokens;
        *see_end = (int64_t)entry->kv_length;
    }
    *see_first = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
}

/** Spans of all entries. */
void plan_add_spans(builder_t *b);

/** Find entries with the same pages: fills segments and sets. */
void plan_find_shared(builder_t *b);

/** After the spans: fills links, and makes a range of each stretch that a set reads at once. */
void plan_link_shared(builder_t *b);

/** at_set is 0 again for the sets that the entry's spans are of. */
void plan_forget_counts(builder_t *b, uint32_t entry);

/** Cut ranges into works, number the states between them, and set the order. */
void plan_cut(builder_t *b);

/** Index of the entry's node that holds a key; 0 if it has none. */
uint32_t plan_node_of(const attn_problem_entry_t *entry, uint32_t chunk_key);

/** Planner's cost of one token for a number of rows: reading it, and a bit of arithmetic a row. */
static inline uint64_t
plan_token_cost(uint32_t rows)
{
    return 4 + (uint64_t)rows;
}

#endif
