/*
 * result.h: how the programs of bench/ report: a line for people on standard output and, with
 * --json FILE, one JSON object a line in FILE, so that figures of several runs can be joined.
 */
#ifndef ATTN_BENCH_RESULT_H
#define ATTN_BENCH_RESULT_H

#include "base/attn_types.h"

#include <stdio.h>

/** What the arguments say; `file` is NULL without --json. */
typedef struct result_options {
    FILE *file;
    bool quick; /**< --quick: a few seconds, enough to see that it works */
} result_options_t;

/**
 * Take --json FILE and --quick out of the arguments.
 * @return how many arguments are left, moved to the front; exits where FILE cannot be written
 */
int result_options(result_options_t *options, int argc, char **argv);

/** One JSON line: {"bench": bench, and what `format` makes: "\"sequences\":256,...". */
void result_json(const result_options_t *options, const char *bench, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** A sentence as JSON and a table have it: no quotes in it, and no lines. */
void result_text(const char *sentence, char text[256]);

/** Ends the program with the sentence if the status is not ATTN_OK. */
void result_must(attn_status_t status);

/** Sorts the n samples; q is 0 to 1. */
double result_quantile(double *samples, uint64_t n, double q);

#endif
