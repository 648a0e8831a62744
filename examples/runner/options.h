/* options.h: the command line. */
#ifndef RUNNER_OPTIONS_H
#define RUNNER_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "session.h"

#define TARGETS_MAX 8

typedef struct options {
    const char *model;
    const char *targets[TARGETS_MAX];
    uint32_t n_targets;
    const char *prompt_file; /* a document */
    const char *question;    /* --question or --prompt */
    bool alone;              /* it was --prompt */
    const char *logits;
    uint32_t max_tokens;
    uint32_t batch;
    session_shape_t shape;
    bool digest, quiet, no_template;
} options_t;

/** False with a sentence if the line is refused. *help is set for --help, and nothing else then. */
bool options_parse(int argc, char **argv, options_t *options, bool *help);

extern const char options_help[];

#endif
