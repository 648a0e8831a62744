/*
 * expose.h: figures as Prometheus reads them, in its text format: a family names what is counted,
 * the samples behind it say how much of it there is.
 *
 *     # HELP attnd_runs_total Layers answered.
 *     # TYPE attnd_runs_total counter
 *     attnd_runs_total 4711
 */
#ifndef ATTN_DAEMON_EXPOSE_H
#define ATTN_DAEMON_EXPOSE_H

#include "base/attn_types.h"

#include <stdio.h>

#define EXPOSE_TYPE "text/plain; version=0.0.4; charset=utf-8"

typedef struct expose {
    FILE *out;
    char *text; /* after expose_close() */
    size_t size;
} expose_t;

/** @return false: no memory */
bool expose_open(expose_t *expose);

/** Complete the text, which is the caller's to free(), also on failure. @return false: no memory */
bool expose_close(expose_t *expose);

/** type: "counter", "gauge", "histogram". help: a sentence without its end of line. */
void expose_family(expose_t *expose, const char *name, const char *type, const char *help);

/** A sample of the family begun last, of that name. Labels are pairs of a name and a value, NULL at
 * the end; values may hold anything. */
void expose_sample(expose_t *expose, const char *name, double value, ...) __attribute__((sentinel));

/** A family of one sample without labels. */
void expose_counter(expose_t *expose, const char *name, const char *help, uint64_t value);
void expose_gauge(expose_t *expose, const char *name, const char *help, double value);

/** A histogram in seconds: counts[i] of at most least_ns << i, each in one count only; the last has
 * no end. */
void expose_times(expose_t *expose, const char *name, const char *help, uint64_t total_ns,
                  const uint64_t *counts, uint32_t n, uint64_t least_ns);

#endif
