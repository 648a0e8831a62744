/*
 * drive.h: layers between two processes with a GPU each, driven by the devices: what the kernels
 * (drive.cu) are told. Written by lane.c (the runner's half) and track_drive.c (the worker's), read
 * by the device. Shared by C and CUDA.
 *
 * Both have a lane, memory of the worker's GPU that the runner's has mapped. For each layer
 *
 *     the runner's device   sends q, k and v as lines      and waits for the answer's
 *     the worker's          waits for them, stores k and v; attends; answers with lines
 *
 * with no host between. A line is three words of 32 bits and a number, in one store of 16 bytes:
 * whoever reads the number has the words, no fence, no flag beside the data. Layer l of a step has
 * the number `first` + l, and numbers only grow while a lane's memory is there, so nothing is ever
 * cleared: what is left of other layers has other numbers. Word w of a message is the
 * (w / lines)-th of line w % lines, so that neighbours are read and written by neighbours.
 *
 * A layer's request is written when the answer of the one before has been read, and an answer when
 * its request has been: so neither overtakes a reader. A layer that asks nothing is answered with
 * one line of no words.
 *
 * No wait is without end: each side looks at a word of its own host's, at its device's clock, and
 * the runner's at a word in the lane, where the worker's device says that it gave the step up.
 * Whoever gives up notes why; what follows of the step does nothing. A wait is one CTA.
 */
#ifndef ATTN_KERNELS_CUDA_DRIVE_H
#define ATTN_KERNELS_CUDA_DRIVE_H

#include "kernels/cuda/store.h"

#include <stdint.h>

#define CUDA_DRIVE_THREADS 512u

#define CUDA_LANE_HEAD 128u /* bytes of a lane before the requests' lines */

typedef struct cuda_lane_head {
    uint32_t given_up; /**< `first` of the step that the worker's device gave up last */
    uint32_t pad[31];
} cuda_lane_head_t;

/** Lines of a message of so many words. */
#define CUDA_LINES(words) ((words) > 0 ? ((words) + 2u) / 3u : 1u)

enum { CUDA_DRIVE_ABORTED = 1, CUDA_DRIVE_LATE = 2, CUDA_DRIVE_LEFT = 3 };

/** A side's account of the step, in its own device's memory. */
typedef struct cuda_drive {
    uint32_t first;    /**< number of layer 0's lines; 0: there is no step, and nothing is done */
    uint32_t failed;   /**< why it was given up; 0: it was not */
    uint64_t limit_ns; /**< from the first wait on */
    uint64_t end_ns;   /**< of all waits, on the device's clock; 0: none began */
    uint8_t *lane;     /**< its head, requests, answers: as this device has it mapped */
    uint64_t answers;  /**< where those begin, in bytes from the lane's beginning */
} cuda_drive_t;

/** The same in pinned memory of its host. */
typedef struct cuda_drive_word {
    uint32_t abort;  /**< `first` of a step that is to be given up */
    uint32_t failed; /**< as cuda_drive_t.failed, of the step that now is */
} cuda_drive_word_t;

/** What every kernel of a layer gets. */
typedef struct cuda_layer {
    cuda_drive_t *drive;
    cuda_drive_word_t *word;
    uint32_t number; /**< of the layer */
    uint32_t runner; /**< this is the runner's side */
} cuda_layer_t;

/** Rows of a tensor, in words. */
typedef struct cuda_tensor {
    const uint32_t *at;
    uint64_t row_stride, head_stride;
    uint32_t heads, head_words;
    uint32_t words; /**< all of them; 0: it is none */
} cuda_tensor_t;

/** The runner's half: ask_layer. */
typedef struct cuda_ask {
    cuda_layer_t layer;
    cuda_tensor_t q, k, v;
    uint32_t *o, *lse; /**< packed */
    uint32_t o_words, lse_words;
    uint32_t lse_skip; /**< words of the answer that nobody wants, behind o */
} cuda_ask_t;

/** The worker's first kernel of a layer, in place of bring_rows: take_layer. */
typedef struct cuda_take {
    cuda_layer_t layer;
    cuda_bring_t bring; /**< k and v, and their strides, are not looked at */
    uint32_t *q;        /**< packed */
    uint32_t q_words, k_words, v_words;
} cuda_take_t;

/** And its last: answer_layer. */
typedef struct cuda_give {
    cuda_layer_t layer;
    const uint32_t *o, *lse; /**< packed */
    uint32_t o_words, lse_words;
} cuda_give_t;

#endif
