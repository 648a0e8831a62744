/* begin.h: between begin.c, the worker's side, begin_plan.c, the planner alone, and begin_client.c,
 * the client's. */
#ifndef ATTN_BENCH_BEGIN_H
#define ATTN_BENCH_BEGIN_H

#include "bench/result.h"

#define SAMPLES_MAX 4096u
#define BEGIN_PAGE 16u /* tokens of a page */

typedef struct begin_options {
    result_options_t result;
    const char *target; /* NULL: none */
    bool cold;
    uint32_t rounds;
} begin_options_t;

typedef struct begin_case {
    uint32_t sequences, context;
    uint32_t shared; /* tokens that all have in common */
} begin_case_t;

typedef struct samples {
    uint64_t start, unused;
    uint32_t n;
    double us[SAMPLES_MAX];
} samples_t;

/** One sample: from start to stop, less what is told. */
void samples_start(samples_t *samples, const begin_options_t *options);
void samples_stop(samples_t *samples, uint64_t less_ns);
/** A column and a JSON line; empties the samples. target: of 256 sequences, 0 none. */
void samples_report(samples_t *samples, const begin_options_t *options, const begin_case_t *c,
                    const char *side, double target);

/** What the engines' begins, and kv_step_begin(), took last: calls are wrapped by the linker. */
extern uint64_t begin_engine_ns, begin_store_ns;

/** The planner alone, for chunks of so many tokens. */
void begin_plan_time(const begin_options_t *options, const begin_case_t *c, uint32_t chunk,
                     const char *side);

/** Planner and tables for a GPU: three columns. */
void begin_image_time(const begin_options_t *options, const begin_case_t *c);

typedef struct begin_client begin_client_t;

/** A cluster inside the process, and the target if there is one, with a sequence of the context. */
begin_client_t *begin_client_open(const begin_options_t *options, uint32_t context);
void begin_client_time(begin_client_t *client, const begin_case_t *c);
void begin_client_close(begin_client_t *client);

#endif
