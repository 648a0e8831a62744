/*
 * leaf.h: the arithmetic of one leaf, compiled once per instruction set from leaf.inc.
 *
 * A slot is a token's place in its leaf. A row's bits depend on nothing but its own q,
 * mask, the leaf's K and V and whether its request has few rows or many: never on the rows beside
 * it, nor on how many there are.
 */
#ifndef ATTN_KERNELS_CPU_LEAF_H
#define ATTN_KERNELS_CPU_LEAF_H

#include "kernels/kernels.h"

/** Tokens of a leaf, few rows and many: equal, so that decode, verification and prefill
 * have equal bits where their arithmetic is the same, too. Also the distance of rows in `s`. */
#define CPU_LEAF 128u

/** Slots go through the arithmetic in blocks: of K, whose block is transposed; of V. */
#define CPU_K_BLOCK 64u
#define CPU_V_BLOCK 32u

/** A row of K or V has at most so many elements. */
#define CPU_DIM_MAX 256u

/** In `place`: the row does not see the slot. */
#define CPU_HIDDEN INT32_MIN

/** |x log2 e| above this is an error. */
#define CPU_LOGIT_MAX 1073741824.0f

/** Bytes of scratch for p, K and V in the form that an instruction set wants. */
#define CPU_STAGE_BYTES (192u << 10)

/** Rows of q that are attended to at once, and the parts that some instruction sets cut q into. */
#define CPU_ROWS_MAX 64u
#define CPU_Q_PARTS 3u
#define CPU_FORM_BYTES ((uint64_t)CPU_Q_PARTS * CPU_ROWS_MAX * CPU_DIM_MAX * 2)

/** q in the form that an instruction set wants, made once for all leaves of a work. */
typedef struct cpu_form {
    void *data; /**< CPU_FORM_BYTES, 64-byte aligned */
    uint32_t parts;
} cpu_form_t;

/**
 * What is read after a leaf, so that memory brings it meanwhile: stretches of K and V, of equal
 * length, that lie in different places. Memory is fastest when several of them are asked for
 * side by side, each in ascending order: then the core's own prefetching runs ahead in all.
 */
typedef struct cpu_ahead {
    const char **k, **v; /**< [n] where they begin */
    uint32_t n;
    uint32_t k_bytes, v_bytes; /**< of each */
} cpu_ahead_t;

/** What two states are multiplied by when they merge: a power of two, exactly 1 for one of them.
 * 0: of no weight, and what its A holds is not looked at. */
typedef struct cpu_scales {
    float into, from;
} cpu_scales_t;

typedef struct cpu_leaf {
    /* rows */
    uint32_t rows, d_k, d_v;
    const float *q;          /**< [rows][d_k] */
    cpu_form_t form;         /**< of q, where the instruction set has begin() */
    const int32_t *lo, *hi;  /**< [rows]: the slots that a row sees */
    const int32_t *distance; /**< [rows]: position of slot 0 less that of the query, for ALiBi */
    const float *slope;      /**< [rows], or NULL */
    /** [rows][CPU_LEAF] of a leaf with tokens that a mask is about: position of the slot's key less
     * that of the query, in place of slot + distance, or CPU_HIDDEN; NULL: no such tokens */
    const int32_t *place;
    float scale, softcap;
    /* tokens */
    uint32_t first, end; /**< slots that some row sees; first < end */
    attn_dtype_t dtype;
    /** [CPU_LEAF] by slot, from first down and from end up to the next multiple of 32: a row of
     * zeros where nothing is stored or listed. */
    const void *const *k, *const *v;
    cpu_ahead_t ahead;       /**< n = 0: nothing */
    const uint32_t *present; /**< [CPU_LEAF] all ones where a slot is in the list; NULL: no gaps */
    bool full;               /**< every row sees all of first to end - 1 */
    bool few;                /**< of requests of few rows: as in attn_plan_entry_t */
    /** Only to measure what the fixed order costs: [rows] maxima so far. A leaf then goes on
     * from the states of the one before it, at the scale of the maximum until `last`. */
    float *running;
    bool begin, last;
    /* scratch, 64-byte aligned */
    float *s;             /**< [rows][CPU_LEAF] */
    void *stage;          /**< CPU_STAGE_BYTES */
    float *w;             /**< [rows] */
    cpu_scales_t *merges; /**< [below][stride], if below > 0 */
    /** Out: the leaf's states, merged with those of a stack that the tree merges it with next,
     * `below` of them. These lie where the answer goes, [below][stride] rows, the topmost last. */
    uint32_t below, stride;
    float *a; /**< [rows][d_v] */
    float *l;
    int32_t *e;
} cpu_leaf_t;

/** An instruction set: how the arithmetic was compiled. */
typedef struct cpu_isa {
    const char *name;
    uint32_t lanes;   /**< floats in a vector */
    const char *kind; /**< instruction sets of one kind have the same bits */
    /** Both NULL, or: called before the first leaf of some rows of a request of many, on the
     * thread that computes them, and after the last one. No other rows in between. */
    void (*begin)(cpu_form_t *form, const float *q, uint32_t rows, uint32_t d, attn_dtype_t type);
    void (*end)(void);
    /** The states of a leaf, and the merges after it. @return -1, or the first row with a logit or
     * sum out of range */
    int (*leaf)(const cpu_leaf_t *leaf);
    /** Widen n elements, n a multiple of 8. */
    void (*widen)(float *to, const void *from, attn_dtype_t type, uint32_t n);
    /** attn_state_merge_row(): the same bits everywhere. */
    void (*merge)(float *a_into, float *l_into, int32_t *e_into, const float *a_from, float l_from,
                  int32_t e_from, uint32_t d);
} cpu_isa_t;

extern const cpu_isa_t cpu_isa_baseline;
#if defined(__x86_64__)
extern const cpu_isa_t cpu_isa_avx2;
extern const cpu_isa_t cpu_isa_avx512;
extern const cpu_isa_t cpu_isa_amx;
#endif

/** The best that this machine has; environment ATTN_CPU_ISA=NAME asks for one. */
attn_status_t cpu_isa_choose(const cpu_isa_t **isa_p);

#endif
