/*
 * attend.h: one attend of the cpu backend, between attend.c (the leaves of a work),
 * tokens.c (which tokens a leaf's rows see) and finish.c (states into answers).
 *
 *     workspace   counters of reductions | states of split works | scratch per participant
 *     scratch     q rows as f32, logits, masks and token lists of one leaf, stack of states
 */
#ifndef ATTN_KERNELS_CPU_ATTEND_H
#define ATTN_KERNELS_CPU_ATTEND_H

#include "kernels/cpu/leaf.h"
#include "kernels/cpu/pool.h"
#include "kernels/plan_types.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct cpu_backend {
    attn_backend_t base;
    cpu_pool_t *pool;
    const cpu_isa_t *isa;
    char kind[48];
    bool free_order;
} cpu_backend_t;

/** Where things lie in a workspace: byte offsets. */
typedef struct cpu_layout {
    uint64_t counters, slot_a, slot_l, slot_e;
    uint64_t scratch, scratch_size;
    /* within a scratch: */
    uint64_t q, form, s, stage, row_ints, tokens, place, stack_a, stack_l, stack_e, merges;
    uint64_t rows; /* rounded up: distance of arrays per row */
    uint64_t bytes;
} cpu_layout_t;

/** States of rows, as a stack or the workspace keep them. */
typedef struct cpu_states {
    float *a; /* [][d_v] */
    float *l;
    int32_t *e;
} cpu_states_t;

/** What all tasks of an attend share. */
typedef struct cpu_attend {
    cpu_backend_t *backend;
    const attn_plan_t *plan;
    const attn_kv_t *kv;
    const attn_layer_t *layer;
    const attn_answer_t *answer;
    const uint8_t *q;
    attn_dtype_t q_dtype;
    float scale;
    uint8_t *workspace;
    cpu_layout_t layout;
    cpu_states_t slots;
    atomic_uint *counters;
    /* The first error by (entry, query, head). */
    pthread_mutex_t lock;
    atomic_bool failed;
    uint32_t entry, query, head;
} cpu_attend_t;

/** Rows of K and V by slot of a leaf, and where the next leaf's stretches begin. */
typedef struct cpu_tokens {
    const void **k, **v;             /* [CPU_LEAF] */
    const char **k_ahead, **v_ahead; /* [CPU_AHEAD_MAX] */
} cpu_tokens_t;

/** A leaf is read in so many stretches at most: its pages, one of which it may begin in, or parts
 * of larger pages. */
#define CPU_AHEAD_MAX (CPU_LEAF + 16)
#define CPU_AHEAD_TOKENS 16u

/** What one participant keeps for a task. Points into its scratch. */
typedef struct cpu_scratch {
    float *q, *s, *w, *slope, *running;
    void *stage;
    cpu_form_t form;
    int32_t *lo, *hi, *distance, *position;
    int32_t *place; /* [rows][CPU_LEAF], if the plan is masked */
    cpu_tokens_t tokens;
    uint32_t *present;
    cpu_states_t stack; /* [depth][rows] */
    cpu_scales_t *merges;
} cpu_scratch_t;

/** A packed row of a work: which query and head it is. */
typedef struct cpu_row {
    uint32_t entry, query, head;
} cpu_row_t;

cpu_row_t cpu_row_of(const attn_plan_t *plan, const attn_work_t *work, uint32_t kv_head,
                     uint32_t row);

void cpu_layout_of(const attn_plan_t *plan, uint32_t threads, cpu_layout_t *layout);
void cpu_scratch_of(const cpu_attend_t *x, uint32_t participant, cpu_scratch_t *scratch);

/**
 * Which slots the rows see and which tokens of the leaf are read: fills the mask and
 * token fields of *leaf, but for ahead. first >= end: none. Masked K and V are not touched.
 */
void cpu_tokens_of(const cpu_attend_t *x, const cpu_scratch_t *scratch, const attn_work_t *work,
                   uint32_t kv_head, const attn_leaf_t *at, cpu_leaf_t *leaf);

/** The stretches of memory that the leaf, which is not the current one, will read. */
cpu_ahead_t cpu_tokens_ahead(const cpu_attend_t *x, const cpu_scratch_t *scratch, uint32_t kv_head,
                             const attn_leaf_t *at);

void cpu_fail(cpu_attend_t *x, cpu_row_t row);

/** A row's state over all its leaves becomes its answer. */
void cpu_finish_row(cpu_attend_t *x, cpu_row_t row, uint32_t node, const float *a, float l,
                    int32_t e);

/** Keep the states of a work that covers part of its reductions, and fold those that are complete.
 */
void cpu_bring_parts(cpu_attend_t *x, const attn_work_t *work, uint32_t kv_head,
                     const cpu_scratch_t *scratch, uint32_t n_states);

attn_status_t cpu_workspace_create(attn_backend_t *backend, const attn_plan_t *plan,
                                   attn_dtype_t q_dtype, attn_dtype_t o_dtype,
                                   attn_workspace_t **workspace_p);
void cpu_workspace_destroy(attn_backend_t *backend, attn_workspace_t *workspace);
attn_status_t cpu_attend(attn_backend_t *backend, const attn_plan_t *plan, const attn_kv_t *kv,
                         const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype,
                         attn_workspace_t *workspace, const attn_answer_t *answer);

/* store.c */
attn_status_t cpu_append(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                         const uint32_t *offsets, uint64_t n, const void *k, const void *v);
attn_status_t cpu_read(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                       const uint32_t *offsets, uint64_t n, void *k, void *v);
attn_status_t cpu_compare(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
                          const uint32_t *offsets, uint64_t n, const void *k, const void *v,
                          bool *equal_p);
attn_status_t cpu_move(attn_backend_t *backend, const attn_kv_t *kv, const attn_move_t *moves,
                       uint64_t n);
attn_status_t cpu_copy_page(attn_backend_t *backend, const attn_kv_t *kv, uint32_t from,
                            uint32_t to, uint32_t tokens);

#endif
