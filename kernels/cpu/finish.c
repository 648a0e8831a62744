/* States into answers: the layout of a workspace, parts of reductions, O and LSE. */
#include "kernels/cpu/attend.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ALIGN 64u

/* Take `bytes` at the next multiple of a cache line. */
static uint64_t
take(uint64_t *end, uint64_t bytes)
{
    uint64_t at = *end;
    *end        = (at + bytes + ALIGN - 1) / ALIGN * ALIGN;
    return at;
}

void
cpu_layout_of(const attn_plan_t *plan, uint32_t threads, cpu_layout_t *layout)
{
    const attn_problem_t *problem = &plan->problem;
    uint64_t d_k = problem->head_dim_k, d_v = problem->head_dim_v;
    uint64_t end = 0, in = 0;

    *layout = (cpu_layout_t){.rows = attn_div_up(plan->max_rows, 16) * 16};
    layout->counters =
        take(&end, (uint64_t)plan->n_counters * problem->kv_heads * sizeof(uint32_t));
    layout->slot_a = take(&end, plan->slots * d_v * sizeof(float));
    layout->slot_l = take(&end, plan->slots * sizeof(float));
    layout->slot_e = take(&end, plan->slots * sizeof(int32_t));

    uint64_t rows = layout->rows, states = rows * plan->max_depth;
    layout->q        = take(&in, rows * d_k * sizeof(float));
    layout->form     = take(&in, CPU_FORM_BYTES);
    layout->s        = take(&in, rows * CPU_LEAF * sizeof(float));
    layout->stage    = take(&in, CPU_STAGE_BYTES);
    layout->row_ints = take(&in, 7 * rows * sizeof(float));
    layout->tokens =
        take(&in, 2 * (CPU_LEAF + CPU_AHEAD_MAX) * sizeof(void *) + CPU_LEAF * sizeof(uint32_t));
    layout->place        = take(&in, plan->masked ? rows * CPU_LEAF * sizeof(int32_t) : 0);
    layout->stack_a      = take(&in, states * d_v * sizeof(float));
    layout->stack_l      = take(&in, states * sizeof(float));
    layout->stack_e      = take(&in, states * sizeof(int32_t));
    layout->merges       = take(&in, states * sizeof(cpu_scales_t));
    layout->scratch_size = in;
    layout->scratch      = take(&end, in * threads);
    layout->bytes        = end;
}

void
cpu_scratch_of(const cpu_attend_t *x, uint32_t participant, cpu_scratch_t *scratch)
{
    const cpu_layout_t *layout = &x->layout;
    uint8_t *base = x->workspace + layout->scratch + participant * layout->scratch_size;
    float *rows   = (float *)(base + layout->row_ints);

    *scratch = (cpu_scratch_t){
        .q        = (float *)(base + layout->q),
        .s        = (float *)(base + layout->s),
        .form     = {.data = base + layout->form},
        .stage    = base + layout->stage,
        .w        = rows,
        .slope    = rows + layout->rows,
        .lo       = (int32_t *)rows + 2 * layout->rows,
        .hi       = (int32_t *)rows + 3 * layout->rows,
        .distance = (int32_t *)rows + 4 * layout->rows,
        .position = (int32_t *)rows + 5 * layout->rows,
        .place    = (int32_t *)(base + layout->place),
        .running  = rows + 6 * layout->rows,
        .tokens   = {.k = (const void **)(base + layout->tokens)},
        .stack    = {.a = (float *)(base + layout->stack_a),
                     .l = (float *)(base + layout->stack_l),
                     .e = (int32_t *)(base + layout->stack_e)},
        .merges   = (cpu_scales_t *)(base + layout->merges),
    };
    scratch->tokens.v       = scratch->tokens.k + CPU_LEAF;
    scratch->tokens.k_ahead = (const char **)(scratch->tokens.v + CPU_LEAF);
    scratch->tokens.v_ahead = scratch->tokens.k_ahead + CPU_AHEAD_MAX;
    scratch->present        = (uint32_t *)(scratch->tokens.v_ahead + CPU_AHEAD_MAX);
}

/* A workspace is bare memory: an attend lays it out. */
attn_status_t
cpu_workspace_create(attn_backend_t *backend, const attn_plan_t *plan, attn_dtype_t q_dtype,
                     attn_dtype_t o_dtype, attn_workspace_t **workspace_p)
{
    cpu_layout_t layout;

    (void)q_dtype;
    (void)o_dtype;
    cpu_layout_of(plan, cpu_pool_threads(((const cpu_backend_t *)backend)->pool), &layout);
    *workspace_p = aligned_alloc(ALIGN, attn_div_up(layout.bytes + 1, ALIGN) * ALIGN);
    return *workspace_p != NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a workspace of %llu bytes",
                           (unsigned long long)layout.bytes);
}

void
cpu_workspace_destroy(attn_backend_t *backend, attn_workspace_t *workspace)
{
    (void)backend;
    free(workspace);
}

void
cpu_fail(cpu_attend_t *x, cpu_row_t row)
{
    pthread_mutex_lock(&x->lock);
    bool first = !atomic_load(&x->failed) || row.entry < x->entry ||
                 (row.entry == x->entry &&
                  (row.query < x->query || (row.query == x->query && row.head < x->head)));
    if (first) {
        x->entry = row.entry;
        x->query = row.query;
        x->head  = row.head;
    }
    atomic_store(&x->failed, true);
    pthread_mutex_unlock(&x->lock);
}

static bool
all_finite(const float *a, uint32_t d)
{
    uint32_t bad = 0;
    for (uint32_t i = 0; i < d; i++) {
        uint32_t bits;
        memcpy(&bits, &a[i], sizeof(bits));
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

static void
finish_o(cpu_attend_t *x, cpu_row_t row, const float *a, float l, int32_t e)
{
    const attn_answer_t *answer = x->answer;
    uint32_t d                  = x->kv->head_dim_v;
    uint64_t at =
        (x->plan->entries[row.entry].o_row + row.query) * x->plan->problem.q_heads + row.head;
    const float *sink = x->layer->sinks != NULL ? &x->layer->sinks[row.head] : NULL;
    float o[256];

    assert(d <= sizeof(o) / sizeof(o[0]));
    attn_state_finish_row(a, l, e, d, sink, o, answer->lse != NULL ? &answer->lse[at] : NULL);
    if (!isfinite(l) || !all_finite(o, d)) {
        cpu_fail(x, row);
    } else if (answer->o != NULL) {
        attn_convert((uint8_t *)answer->o + at * d * attn_dtype_size(answer->o_dtype),
                     answer->o_dtype, o, ATTN_F32, d);
    }
}

void
cpu_finish_row(cpu_attend_t *x, cpu_row_t row, uint32_t node, const float *a, float l, int32_t e)
{
    const attn_problem_entry_t *entry = &x->plan->problem.entries[row.entry];
    const attn_answer_t *answer       = x->answer;
    uint32_t d                        = x->kv->head_dim_v;

    if (entry->n_nodes == 0) {
        finish_o(x, row, a, l, e);
        return;
    }
    if (l != 0.0f && !(isfinite(l) && all_finite(a, d))) {
        cpu_fail(x, row);
        return;
    }
    uint64_t state = x->plan->entries[row.entry].state +
                     ((uint64_t)node * entry->n_q + row.query) * x->plan->problem.q_heads +
                     row.head;
    answer->l[state] = l;
    answer->e[state] = e;
    if (l == 0.0f) {
        memset(answer->a + state * d, 0, d * sizeof(float)); /* ignored, but not left to chance */
    } else {
        memcpy(answer->a + state * d, a, d * sizeof(float));
    }
}

/* Merge what folds before a state comes at `level` above the topmost. */
static void
merge_slots(const cpu_attend_t *x, attn_fold_t *fold, const uint64_t *stack, uint32_t level)
{
    const cpu_states_t *slots = &x->slots;
    uint32_t d                = x->kv->head_dim_v;

    while (attn_fold_pops(fold, level)) {
        uint64_t into = stack[fold->n - 1], from = stack[fold->n];
        x->backend->isa->merge(slots->a + into * d, &slots->l[into], &slots->e[into],
                               slots->a + from * d, slots->l[from], slots->e[from], d);
    }
}

/* Fold one row of a reduction over its parts, in place, and answer. */
static void
fold_row(cpu_attend_t *x, const attn_reduction_t *reduction, uint32_t kv_head, uint32_t row)
{
    uint64_t stack[ATTN_FOLD_DEPTH];
    attn_fold_t fold;

    attn_fold_init(&fold, ATTN_LEVEL_NONE);
    for (uint32_t p = 0; p < reduction->n_parts; p++) {
        const attn_part_t *part = &x->plan->parts[reduction->part_first + p];
        const attn_work_t *work = &x->plan->works[part->work];
        for (uint32_t i = 0; i < work->n_out; i++) {
            uint64_t key = x->plan->keys[work->key_first + i];
            merge_slots(x, &fold, stack, attn_fold_level(&fold, key));
            stack[fold.n] = work->slot + ((uint64_t)kv_head * work->n_out + i) * work->rows +
                            part->row_first + row;
            attn_fold_push(&fold, key);
        }
    }
    merge_slots(x, &fold, stack, ATTN_LEVEL_NONE);
    assert(fold.n == 1);
    cpu_row_t at = {.entry = reduction->entry,
                    .query = reduction->q_first + row / reduction->n_heads,
                    .head  = kv_head * x->plan->group + reduction->head_first +
                            row % reduction->n_heads};
    cpu_finish_row(x, at, reduction->node, x->slots.a + stack[0] * x->kv->head_dim_v,
                   x->slots.l[stack[0]], x->slots.e[stack[0]]);
}

void
cpu_bring_parts(cpu_attend_t *x, const attn_work_t *work, uint32_t kv_head,
                const cpu_scratch_t *scratch, uint32_t n_states)
{
    uint32_t d = x->kv->head_dim_v, rows = work->rows;
    bool failed = atomic_load_explicit(&x->failed, memory_order_relaxed);

    assert(failed || n_states == work->n_out);
    for (uint32_t i = 0; i < n_states; i++) {
        uint64_t to   = work->slot + ((uint64_t)kv_head * work->n_out + i) * rows;
        uint64_t from = i * x->layout.rows;
        memcpy(x->slots.a + to * d, scratch->stack.a + from * d, (size_t)rows * d * sizeof(float));
        memcpy(x->slots.l + to, scratch->stack.l + from, rows * sizeof(float));
        memcpy(x->slots.e + to, scratch->stack.e + from, rows * sizeof(int32_t));
    }
    for (uint32_t m = 0; m < work->n_members; m++) {
        const attn_reduction_t *reduction =
            &x->plan->reductions[x->plan->members[work->member_first + m].reduction];
        atomic_uint *counter =
            &x->counters[(uint64_t)reduction->counter * x->plan->problem.kv_heads + kv_head];
        if (atomic_fetch_add_explicit(counter, 1, memory_order_acq_rel) + 1 < reduction->n_parts ||
            atomic_load(&x->failed)) {
            continue;
        }
        for (uint32_t r = 0; r < reduction->n_q * reduction->n_heads; r++) {
            fold_row(x, reduction, kv_head, r);
        }
    }
}
