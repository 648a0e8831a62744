/*
 * exchange.h: partials between the GPUs of one host: what the kernel (exchange.cu) is told. Written
 * by exchange_plan.c, read by the device. Shared by C and CUDA.
 *
 * Ranks 0 to `ranks` - 1 have a GPU each. A batch's rows are the pairs (query, head) of its
 * entries, one after the other; each rank has states of some nodes of the merge tree for each row,
 * and a contiguous share of the rows to finish. In one launch a rank
 *
 *     sends    its states of others' rows straight into their inboxes, as lines
 *     merges   for each row of its share the states of all ranks, in the order of the tree, as
 *              they come
 *     answers  with O and LSE of its share
 *
 * A line is a state in packets of 16 bytes, three words of it and the number of the exchange, the
 * epoch, in one store: whoever reads the epoch has the words, no fence, no flag beside the data.
 * Inboxes have two halves, which epochs take in turn, and are never cleared: what an earlier epoch
 * left has another number.
 *
 * A half is written again two epochs later. So that nobody overtakes who still reads, each rank
 * begins an epoch by telling all others its number (a beat), and writes to a rank that has begun
 * the epoch before: that one has finished the one before that. Where ranks keep step this was long
 * said. It also ends an epoch only when all others have begun the one before, so nobody goes on for
 * long without the others: between two that are exchanging there are two epochs at most.
 *
 * Inboxes are used again, by other groups, while ranks of an earlier one may have them mapped
 * still, and one that was held up may write there yet. So a group's epochs begin behind a number
 * that is its own, `first`, and what it says to all is that number: packets, beats and abort words
 * of another group are none. They may take the place of what was on its way, and a launch end late
 * for that, but nothing is taken for what it is not.
 *
 * What must hold:
 *   - All ranks launch the same exchanges in the same order, with tables made from the same batch,
 *     also ranks that own nothing; and one launch begins when the one before has ended.
 *   - All CTAs of a launch are resident at once (at most one a multiprocessor is asked for).
 *   - Before the first epoch, first + 1, an inbox is zero but for its card and its beats, which are
 *     `first`, and so is a control but for its epoch, `first`. Epochs do not come to 2^32: a group
 *     is over after CUDA_EPOCHS and some.
 *
 * No wait is without end: the rank's abort word, which other ranks write, the word of its host, or
 * limit_ns of the device's clock end all of a launch's waits, and the launch. It says why in its
 * control, and tells all ranks; later launches end at once, and answers of a launch that failed are
 * undefined.
 */
#ifndef ATTN_KERNELS_CUDA_EXCHANGE_H
#define ATTN_KERNELS_CUDA_EXCHANGE_H

#include <stdint.h>

#define CUDA_RANKS 8u

/** The epoch before a group's first is of 1 to FIRST_MAX. After so many no step begins in it, and
 * 2^30 are left for the one that is open. */
#define CUDA_FIRST_MAX 0x3fffffffu
#define CUDA_EPOCHS 0x80000000u

#define CUDA_CARD 16u

/** Warps of a CTA: each takes sends, then rows, in turn. */
#ifndef CUDA_EXCHANGE_WARPS
#define CUDA_EXCHANGE_WARPS 8u
#endif

/** Words of a state's line, its packets of three, and their bytes: head dims 64, 128, 256. */
#define CUDA_LINE_WORDS(d) ((d) + 2u)
#define CUDA_LINE_PACKETS(d) ((CUDA_LINE_WORDS(d) + 2u) / 3u)
#define CUDA_LINE_BYTES(d) (CUDA_LINE_PACKETS(d) * 16u)

/** The head of an inbox; halves follow, a multiple of 16 bytes each. */
typedef struct cuda_inbox {
    struct {
        uint32_t epoch, pad[7]; /**< the latest that a rank began: a sector each */
    } beats[CUDA_RANKS];
    uint32_t abort; /**< the group's `first`: everybody ends */
    uint32_t pad[7];
    uint8_t card[CUDA_CARD]; /**< by which who maps it knows it */
    uint32_t more[52];
} cuda_inbox_t;

/** Why a launch failed: kind, and the rank that was waited for << 8. */
enum { CUDA_EXCHANGE_ABORTED = 1, CUDA_EXCHANGE_LATE = 2 };

/** A rank's own, in its device memory. */
typedef struct cuda_exchange_control {
    uint32_t epoch;  /**< of the next launch, less one */
    uint32_t done;   /**< CTAs of this one that ended */
    uint32_t failed; /**< the first failure; 0: none */
    uint32_t pad;
} cuda_exchange_control_t;

typedef struct cuda_send {
    uint32_t state; /**< among the rank's own */
    uint32_t rank;  /**< who finishes its row */
    uint32_t line;  /**< there */
    uint32_t pad;
} cuda_send_t;

/** A state of a row, in ascending key. */
typedef struct cuda_exchange_part {
    uint32_t at;   /**< own state, or a line of the inbox */
    uint32_t from; /**< rank | level of the lowest node with it and the part before << 8 */
} cuda_exchange_part_t;

/** A row of the share. Row i answers at place i. */
typedef struct cuda_exchange_row {
    uint32_t part_first, n_parts;
    uint32_t head;         /**< for sinks */
    uint32_t entry, query; /**< for errors */
    uint32_t pad[3];
} cuda_exchange_row_t;

/** What a launch gets, by value. Pointers are the device's. */
typedef struct cuda_exchange {
    const cuda_send_t *sends;
    const cuda_exchange_row_t *rows;
    const cuda_exchange_part_t *parts;
    uint32_t n_sends, n_rows;
    uint32_t me, ranks;

    const float *a, *l; /**< own states: [states][d] */
    const int32_t *e;
    uint8_t *inboxes[CUDA_RANKS]; /**< as this GPU has them mapped; its own, too */
    uint64_t half;                /**< bytes of a half of each */
    const uint32_t *stop;         /**< of the host, in its memory: not 0: the launch ends */
    uint32_t first;               /**< what the group's epochs begin behind */
    cuda_exchange_control_t *control;
    uint64_t limit_ns; /**< from the launch's begin */
    uint32_t depth;    /**< states that a row's stack holds */

    uint32_t o_type; /**< attn_dtype_t */
    void *o;         /**< [n_rows][d] */
    float *lse;      /**< [n_rows], or NULL */
    const float *sink_l;
    const int32_t *sink_e;     /**< [heads], or NULL */
    unsigned long long *error; /**< as cuda_args_t.error */
} cuda_exchange_t;

/** Shared memory of a launch: a stack a warp. */
#define CUDA_EXCHANGE_SHARED(d, depth)                                                             \
    (CUDA_EXCHANGE_WARPS * (depth) * (((CUDA_LINE_PACKETS(d) + 31u) / 32u) * 3u + 2u) * 128u)

#endif
