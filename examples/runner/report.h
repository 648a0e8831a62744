/* report.h: what the runner prints besides the text: progress, and a table at the end. */
#ifndef RUNNER_REPORT_H
#define RUNNER_REPORT_H

#include "session.h"

/** One phase of a run: the prompt, or the generation. */
typedef struct phase {
    uint64_t tokens;
    uint64_t ns;
    meter_t runs;
} phase_t;

/** How much of the prompt has passed: a bar if stderr is a terminal, else a line. */
void report_progress(uint64_t done, uint64_t total);

/** Where each chunk lives, the speed of both phases, and the time of an attn_step_run(). */
bool report_table(session_t *s, const char *target, phase_t *prompt, phase_t *generation);

#endif
