/* ladder.h: rungs of bench_latency: how a layer is asked for, how long it took, and how that is
 * told. */
#ifndef ATTN_BENCH_LADDER_H
#define ATTN_BENCH_LADDER_H

#include "bench/ours.h"
#include "bench/result.h"

#define LADDER_LAYERS 30u
#define LADDER_SPIN_US 50u
#define LADDER_CHUNK 256u

typedef struct samples {
    double *us;
    uint64_t n;
} samples_t;

samples_t samples_of(uint32_t steps);
void samples_take(samples_t *s, uint64_t ns);
double samples_p50(samples_t *s);

/** A way to ask for a layer. */
typedef struct side {
    const char *name;
    ours_t ours;
    direct_t *direct;        /**< not NULL: by unary calls */
    samples_t net, computed; /**< without what the worker computed, and that */
    char why[256];           /**< it cannot be had */
} side_t;

/** A client of target, with a sequence of so many tokens. */
void side_open(side_t *side, const char *name, const char *target, const shape_t *shape,
               uint32_t length, const attn_client_options_t *options, uint32_t steps);
void side_close(side_t *side);

/** The options that sides have if nothing else is said. */
attn_client_options_t side_options(attn_transport_t transport);

/** A step that is not kept, so that all are of the same length: a sample for each of its layers. */
void side_turn(side_t *side);

/** A line, and its JSON: medians and what is rare, what the worker computed, and what the client's
 * own meter says of a run's way. target: of the ratio to bound; 0: there is none. */
void side_tell(const result_options_t *options, const char *shape, side_t *side, double bound,
               double target);

/** The same of samples of something else; computed may be NULL. */
void rung_tell(const result_options_t *options, const char *shape, const char *name, samples_t *s,
               samples_t *computed);
void rung_absent(const result_options_t *options, const char *shape, const char *name,
                 const char *why);

/** Rungs of GPUs, or why they are not there. */
void ladder_gpu(const result_options_t *options, uint32_t steps);

#endif
