/* plan_int.h: between the files of the planner (plan.c lists them); nobody else includes it. */
#ifndef ATTN_BALANCER_PLAN_INT_H
#define ATTN_BALANCER_PLAN_INT_H

#include "balancer/plan.h"
#include "kernels/plan_types.h"

#include <stdlib.h>

/** A span that is not shared. */
#define SET_NONE UINT32_MAX

/** A vector: PUSH takes room as it needs; a failure shows in builder.no_memory. */
#define VECTOR(type)                                                                               \
    struct {                                                                                       \
        type *at;                                                                                  \
        uint32_t n, room;                                                                          \
    }

#define PUSH(builder, vector, ...)                                                                 \
    do {                                                                                           \
        if ((vector).n == (vector).room) {                                                         \
            (vector).at = plan_room((builder), (vector).at, &(vector).room, sizeof(*(vector).at)); \
        }                                                                                          \
        if ((vector).n < (vector).room) {                                                          \
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

/** Work before it is cut into pieces. */
typedef struct range {
    attn_work_t work;
    uint32_t piece_first, n_pieces;
} range_t;

/** A range's share in a reduction. */
typedef struct range_ref {
    uint32_t range, row_first;
} range_ref_t;

typedef struct builder {
    const attn_problem_t *problem;
    attn_plan_t *plan;
    uint32_t parallelism;
    bool no_memory;
    VECTOR(attn_span_t) spans;
    VECTOR(attn_member_t) members;
    VECTOR(range_t) ranges;
    VECTOR(range_ref_t) refs; /* a reduction's part_first, n_parts count these until plan_cut() */
    VECTOR(attn_reduction_t) reductions;
    VECTOR(attn_work_t) works;
    VECTOR(attn_part_t) parts;
    VECTOR(uint64_t) keys;
    /* sharing */
    uint32_t *ids;                          /* [n] entries, those of a set side by side */
    uint32_t *segment_first, *segment_last; /* [n] of the entry's segments, index + 1 */
    VECTOR(segment_t) segments;
    VECTOR(share_set_t) sets;
    VECTOR(link_t) links;
    uint32_t *span_first; /* [n + 1] of the entry */
} builder_t;

/** More room for a vector that is full. */
void *plan_room(builder_t *b, void *at, uint32_t *room, size_t size);

/** Is the problem well formed? */
attn_status_t plan_check(const attn_problem_t *problem, uint32_t parallelism, uint32_t few,
                         uint32_t many);

/** Positions that queries first to first + n - 1 of an entry can see. */
void plan_see(const attn_problem_t *p, const attn_problem_entry_t *entry, uint32_t first,
              uint32_t n, int64_t *see_first, int64_t *see_end);

/** Spans of all entries. order, segments: room for the largest number of runs of an entry. */
void plan_add_spans(builder_t *b, uint32_t *order, uint32_t *segments);

/** Find entries with the same pages: fills segments and sets. */
void plan_find_shared(builder_t *b);

/** After the spans: fills links, and makes a range of each stretch that a set reads at once. */
void plan_link_shared(builder_t *b);

/** Cut ranges into works, number the states between them, and set the order. */
void plan_cut(builder_t *b);

/** Key of the first leaf of a span of an entry. */
static inline uint64_t
plan_first_key(const builder_t *b, uint32_t entry, const attn_span_t *span)
{
    return attn_leaf_key(&b->plan->entries[entry], b->problem->entries[entry].runs[span->run].chunk,
                         span->leaf_first);
}

/** And of the last one. */
static inline uint64_t
plan_last_key(const builder_t *b, uint32_t entry, const attn_span_t *span)
{
    return attn_leaf_key(&b->plan->entries[entry], b->problem->entries[entry].runs[span->run].chunk,
                         span->leaf_end - 1);
}

/** Index of the entry's node that holds a key; 0 if it has none. */
uint32_t plan_node_of(const attn_problem_entry_t *entry, uint32_t chunk_key);

/** Planner's cost of one token for a number of rows: reading it, and a bit of arithmetic a row. */
static inline uint64_t
plan_token_cost(uint32_t rows)
{
    return 4 + (uint64_t)rows;
}

#endif
