/*
 * leaf.h: the arithmetic of one leaf, compiled once per instruction set from leaf.inc.
 *
 * A slot is a token's place in its leaf. A row's bits depend on nothing but its own q,
 * mask and the leaf's K and V: never on the rows beside it, nor on how many there are.
 */
#ifndef ATTN_KERNELS_CPU_LEAF_H
#define ATTN_KERNELS_CPU_LEAF_H

#include "kernels/kernels.h"

/** Tokens of a leaf, few rows and many: equal, so that decode, verification and prefill
 * have equal bits. Also the distance of rows in `s`. */
#define CPU_LEAF 128u

/** Tokens whose K or V is widened at a time when many rows read it. */
#define CPU_STAGE 16u

/** In `place`: the row does not see the slot. */
#define CPU_HIDDEN INT32_MIN

/** |x log2 e| above this is an error. */
#define CPU_LOGIT_MAX 1073741824.0f

typedef struct cpu_leaf {
    /* rows */
    uint32_t rows, d_k, d_v;
    const float *q;          /**< [rows][d_k] */
    const int32_t *lo, *hi;  /**< [rows]: the slots that a row sees */
    const int32_t *distance; /**< [rows]: position of slot 0 less that of the query, for ALiBi */
    const float *slope;      /**< [rows], or NULL */
    /** [rows][CPU_LEAF] of a leaf with tokens that a mask is about: position of the slot's key less
     * that of the query, in place of slot + distance, or CPU_HIDDEN; NULL: no such tokens */
    const int32_t *place;
    float scale, softcap;
    /* tokens, ascending in slot: masked for all rows are left out */
    uint32_t n;
    attn_dtype_t dtype;
    const void *const *k, *const *v; /**< [n] */
    const uint8_t *slot;             /**< [n] */
    const uint32_t *present; /**< [CPU_LEAF] all ones where a slot is in the list; NULL: no gaps */
    bool full;               /**< every row sees every token of the list */
    /* scratch, 64-byte aligned */
    float *s;     /**< [rows][CPU_LEAF] */
    float *stage; /**< [CPU_STAGE][max(d_k, d_v)] */
    float *w;     /**< [rows] */
    /* out: the leaf's states */
    float *a; /**< [rows][d_v] */
    float *l;
    int32_t *e;
} cpu_leaf_t;

/** An instruction set: how the arithmetic was compiled. */
typedef struct cpu_isa {
    const char *name;
    /** The states of a leaf. @return -1, or the first row with a logit or sum out of range */
    int (*leaf)(const cpu_leaf_t *leaf);
    /** Widen n elements, n a multiple of 8. */
    void (*widen)(float *to, const void *from, attn_dtype_t type, uint32_t n);
} cpu_isa_t;

extern const cpu_isa_t cpu_isa_baseline;
#if defined(__x86_64__)
extern const cpu_isa_t cpu_isa_avx2;
#endif

/** The best that this machine has; environment ATTN_CPU_ISA=baseline or =avx2 asks for one. */
attn_status_t cpu_isa_choose(const cpu_isa_t **isa_p);

#endif
