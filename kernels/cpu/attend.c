/*
 * The leaves of a work, in ascending key: each is computed into the top of a stack of
 * states, and the stack folds along the merge tree. Nothing is rescaled between leaves.
 */
#include "kernels/cpu/attend.h"

#include "base/status.h"

#include <assert.h>
#include <math.h>

/* Below this cost an attend ends before a second thread has woken up. */
#define INLINE_COST 4096u

/* With more rows another tile of them has most likely just read the leaf. */
#define AHEAD_ROWS 32u

/* Sinks beyond this overflow the range of exponents. */
#define SINK_MAX 5e8f

cpu_row_t
cpu_row_of(const attn_plan_t *plan, const attn_work_t *work, uint32_t kv_head, uint32_t row)
{
    const attn_member_t *member = &plan->members[work->member_first];
    while (member + 1 < &plan->members[work->member_first + work->n_members] &&
           member[1].row_first <= row) {
        member++;
    }
    row -= member->row_first;
    return (cpu_row_t){.entry = member->entry,
                       .query = work->q_first + row / work->n_heads,
                       .head  = kv_head * plan->group + work->head_first + row % work->n_heads};
}

/* Where a query stands: with a mask, at the last of the tokens that it names. */
static int64_t
position_of(const attn_problem_entry_t *entry, uint32_t query)
{
    if (entry->mask == NULL) {
        return (int64_t)entry->kv_length - entry->n_q + query;
    }
    const uint8_t *row = entry->mask + query * attn_mask_row_bytes(entry->mask_tokens);
    return (int64_t)entry->kv_length - entry->mask_tokens - 1 +
           attn_mask_count(row, entry->mask_tokens);
}

/* Widen the rows' q, and note where each stands. */
static void
load_rows(const cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
          uint32_t kv_head)
{
    const attn_problem_t *problem = &x->plan->problem;
    uint32_t d                    = problem->head_dim_k;
    uint32_t row                  = 0;

    for (uint32_t m = 0; m < work->n_members; m++) {
        uint32_t e                        = x->plan->members[work->member_first + m].entry;
        const attn_problem_entry_t *entry = &problem->entries[e];
        uint32_t n_q                      = work->n_members == 1 ? work->n_q : entry->n_q;
        for (uint32_t i = 0; i < n_q; i++) {
            uint32_t query   = work->q_first + i;
            uint32_t head    = kv_head * x->plan->group + work->head_first;
            uint64_t at      = ((x->plan->entries[e].q_row + query) * problem->q_heads + head) * d;
            int64_t position = position_of(entry, query);
            x->backend->isa->widen(scratch->q + (size_t)row * d,
                                   x->q + at * attn_dtype_size(x->q_dtype), x->q_dtype,
                                   work->n_heads * d);
            for (uint32_t h = 0; h < work->n_heads; h++, row++) {
                scratch->position[row] = (int32_t)position;
                scratch->slope[row] = x->layer->slopes != NULL ? x->layer->slopes[head + h] : 0.0f;
            }
        }
    }
    assert(row == work->rows);
}

/* Merge the topmost states of the stack into those below. */
static void
merge_top(const cpu_attend_t *x, const cpu_scratch_t *scratch, uint32_t below, uint32_t rows)
{
    uint32_t d                = x->kv->head_dim_v;
    size_t stride             = x->layout.rows;
    const cpu_states_t *stack = &scratch->stack;

    for (uint32_t r = 0; r < rows; r++) {
        size_t into = below * stride + r, from = into + stride;
        x->backend->isa->merge(stack->a + into * d, &stack->l[into], &stack->e[into],
                               stack->a + from * d, stack->l[from], stack->e[from], d);
    }
}

/* Of the first member. Whether few or many rows ask is the same for all. */
static const attn_plan_entry_t *
entry_of(const cpu_attend_t *x, const attn_work_t *work)
{
    return &x->plan->entries[x->plan->members[work->member_first].entry];
}

/* A leaf that is to be computed, and what comes after it. */
typedef struct step {
    attn_leaf_t leaf;
    const attn_leaf_t *next; /* NULL: it is the last */
    uint32_t top;            /* states on the stack before it ... */
    uint32_t below;          /* ... so many of which it merges with at once */
    bool begin;
} step_t;

/* The leaf has no tokens that are read: an empty state, and its merges. */
static void
empty_leaf(const cpu_attend_t *x, const cpu_scratch_t *scratch, const step_t *step, uint32_t rows)
{
    size_t first = (size_t)step->top * x->layout.rows;

    for (uint32_t r = 0; r < rows; r++) {
        scratch->stack.l[first + r] = 0.0f;
        scratch->stack.e[first + r] = INT32_MIN;
    }
    for (uint32_t i = 0; i < step->below; i++) {
        merge_top(x, scratch, step->top - 1 - i, rows);
    }
}

/* The states of a leaf onto the stack, merged with those below. False after an error. */
static bool
compute_leaf(cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
             uint32_t kv_head, const step_t *step)
{
    size_t first    = (size_t)(step->top - step->below) * x->layout.rows;
    cpu_leaf_t leaf = {.rows     = work->rows,
                       .d_k      = x->kv->head_dim_k,
                       .d_v      = x->kv->head_dim_v,
                       .q        = scratch->q,
                       .form     = scratch->form,
                       .lo       = scratch->lo,
                       .hi       = scratch->hi,
                       .distance = scratch->distance,
                       .slope    = x->layer->slopes != NULL ? scratch->slope : NULL,
                       .scale    = x->scale,
                       .softcap  = x->layer->softcap,
                       .dtype    = x->kv->dtype,
                       .running  = x->backend->free_order ? scratch->running : NULL,
                       .begin    = step->begin,
                       .few      = entry_of(x, work)->few,
                       .last     = step->next == NULL,
                       .s        = scratch->s,
                       .stage    = scratch->stage,
                       .w        = scratch->w,
                       .merges   = scratch->merges,
                       .below    = step->below,
                       .stride   = (uint32_t)x->layout.rows,
                       .a        = scratch->stack.a + first * x->kv->head_dim_v,
                       .l        = scratch->stack.l + first,
                       .e        = scratch->stack.e + first};

    cpu_tokens_of(x, scratch, work, kv_head, &step->leaf, &leaf);
    if (leaf.first >= leaf.end) {
        empty_leaf(x, scratch, step, leaf.rows);
        return true;
    }
    if (step->next != NULL && work->rows <= AHEAD_ROWS) {
        leaf.ahead = cpu_tokens_ahead(x, scratch, kv_head, step->next);
    }
    int failed = x->backend->isa->leaf(&leaf);
    if (failed >= 0) {
        cpu_fail(x, cpu_row_of(x->plan, work, kv_head, (uint32_t)failed));
    }
    return failed < 0;
}

/* All leaves of a work. Returns the states left on the stack. */
static uint32_t
fold_leaves(cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
            uint32_t kv_head)
{
    attn_fold_t fold;
    attn_walk_t walk;
    attn_leaf_t next;

    attn_fold_init(&fold, work->left_level);
    attn_walk_init(&walk, x->plan, work);
    for (bool more = attn_walk_next(&walk, &next); more;) {
        step_t step = {.leaf = next, .top = fold.n};
        assert(fold.n < x->plan->max_depth);
        attn_fold_push(&fold, next.key);
        more           = attn_walk_next(&walk, &next);
        step.next      = more ? &next : NULL;
        uint32_t level = more ? attn_fold_level(&fold, next.key) : work->right_level;
        while (attn_fold_pops(&fold, level)) {
            step.below++;
        }
        if (!compute_leaf(x, scratch, work, kv_head, &step)) {
            return 0;
        }
    }
    return fold.n;
}

/* The same without a tree, to measure what it costs: one state, carried from leaf to leaf. */
static uint32_t
carry_leaves(cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
             uint32_t kv_head)
{
    attn_walk_t walk;
    attn_leaf_t next;
    bool begin = true;

    attn_walk_init(&walk, x->plan, work);
    for (bool more = attn_walk_next(&walk, &next); more; begin = false) {
        step_t step = {.leaf = next, .begin = begin};
        more        = attn_walk_next(&walk, &next);
        step.next   = more ? &next : NULL;
        if (!compute_leaf(x, scratch, work, kv_head, &step)) {
            return 0;
        }
    }
    for (uint32_t i = 1; i < work->n_out; i++) { /* all is in the first of its states */
        for (uint32_t r = 0; r < work->rows; r++) {
            scratch->stack.l[i * x->layout.rows + r] = 0.0f;
            scratch->stack.e[i * x->layout.rows + r] = INT32_MIN;
        }
    }
    return work->n_out > 0 ? work->n_out : !begin;
}

static void
run_task(void *arg, uint32_t task, uint32_t participant)
{
    cpu_attend_t *x         = arg;
    uint32_t kv_head        = task % x->plan->problem.kv_heads;
    const attn_work_t *work = &x->plan->works[x->plan->order[task / x->plan->problem.kv_heads]];
    const cpu_isa_t *isa    = x->backend->isa;
    cpu_scratch_t scratch;

    cpu_scratch_of(x, participant, &scratch);
    load_rows(x, &scratch, work, kv_head);
    bool begins = isa->begin != NULL && !entry_of(x, work)->few;
    if (begins) {
        isa->begin(&scratch.form, scratch.q, work->rows, x->kv->head_dim_k, x->kv->dtype);
    }
    uint32_t n = x->backend->free_order ? carry_leaves(x, &scratch, work, kv_head)
                                        : fold_leaves(x, &scratch, work, kv_head);
    if (begins) {
        isa->end();
    }
    if (work->n_out > 0) {
        cpu_bring_parts(x, work, kv_head, &scratch, n);
        return;
    }
    if (atomic_load_explicit(&x->failed, memory_order_relaxed)) {
        return;
    }
    assert(work->n_members == 1 && n <= 1);
    uint32_t node = x->plan->reductions[x->plan->members[work->member_first].reduction].node;
    for (uint32_t r = 0; r < work->rows; r++) {
        cpu_row_t row = cpu_row_of(x->plan, work, kv_head, r);
        cpu_finish_row(x, row, node, scratch.stack.a + (size_t)r * x->kv->head_dim_v,
                       n == 0 ? 0.0f : scratch.stack.l[r], n == 0 ? INT32_MIN : scratch.stack.e[r]);
    }
}

static attn_status_t
check_layer(const cpu_attend_t *x)
{
    const attn_layer_t *layer = x->layer;

    if (!isfinite(x->scale) || !isfinite(layer->softcap) || layer->softcap < 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "scale is %g and softcap %g: both must be finite, softcap not negative",
                         (double)layer->scale, (double)layer->softcap);
    }
    for (uint32_t h = 0; h < x->plan->problem.q_heads; h++) {
        if (layer->slopes != NULL && !isfinite(layer->slopes[h])) {
            return attn_fail(ATTN_ERR_INVALID, "slopes[%u] is not finite", h);
        }
        if (layer->sinks != NULL && !(layer->sinks[h] <= SINK_MAX)) {
            return attn_fail(ATTN_ERR_INVALID, "sinks[%u] is %g: at most %g", h,
                             (double)layer->sinks[h], (double)SINK_MAX);
        }
    }
    return ATTN_OK;
}

attn_status_t
cpu_attend(attn_backend_t *backend, const attn_plan_t *plan, const attn_kv_t *kv,
           const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype,
           attn_workspace_t *workspace, const attn_answer_t *answer)
{
    const attn_problem_t *problem = &plan->problem;
    cpu_attend_t x                = {.backend   = (cpu_backend_t *)backend,
                                     .plan      = plan,
                                     .kv        = kv,
                                     .layer     = layer,
                                     .answer    = answer,
                                     .q         = q,
                                     .q_dtype   = q_dtype,
                                     .workspace = (uint8_t *)workspace};

    assert(kv->kv_heads == problem->kv_heads && kv->head_dim_k == problem->head_dim_k &&
           kv->head_dim_v == problem->head_dim_v && kv->page_size == problem->page_size &&
           kv->chunk_size == problem->chunk_size && plan->max_leaf <= CPU_LEAF &&
           plan->max_rows <= CPU_ROWS_MAX);
    x.scale = layer->scale != 0.0f ? layer->scale : 1.0f / sqrtf((float)problem->head_dim_k);
    attn_status_t status = check_layer(&x);
    if (status != ATTN_OK) {
        return status;
    }

    cpu_layout_of(plan, cpu_pool_threads(x.backend->pool), &x.layout);
    x.counters = (atomic_uint *)(x.workspace + x.layout.counters);
    x.slots    = (cpu_states_t){.a = (float *)(x.workspace + x.layout.slot_a),
                                .l = (float *)(x.workspace + x.layout.slot_l),
                                .e = (int32_t *)(x.workspace + x.layout.slot_e)};
    for (uint64_t i = 0; i < (uint64_t)plan->n_counters * problem->kv_heads; i++) {
        atomic_init(&x.counters[i], 0);
    }
    pthread_mutex_init(&x.lock, NULL);
    uint32_t n_tasks = plan->n_works * problem->kv_heads;
    if (plan->cost * problem->kv_heads < INLINE_COST) {
        cpu_pool_run_inline(n_tasks, run_task, &x);
    } else {
        cpu_pool_run(x.backend->pool, n_tasks, run_task, &x);
    }
    pthread_mutex_destroy(&x.lock);
    if (atomic_load(&x.failed)) {
        return attn_fail(
            ATTN_ERR_NUMERIC,
            "entry %u, query %u, head %u: a NaN, a logit beyond 2^30 or a sum that is not finite",
            x.entry, x.query, x.head);
    }
    return ATTN_OK;
}
