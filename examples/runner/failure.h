/*
 * failure.h: how the runner reports what went wrong. The function that first knows
 * calls failure() with one sentence and returns its false; everybody above just
 * returns false; main() prints failure_text(). The sentence is the thread's own.
 */
#ifndef RUNNER_FAILURE_H
#define RUNNER_FAILURE_H

#include <stdbool.h>

/** Keep the sentence (cut at 511 bytes); always false, so that `return failure(...)` reads well. */
bool failure(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** The last sentence of this thread; empty if nothing failed. */
const char *failure_text(void);

#endif
