/* prompt.h: from the user's words to the tokens that the model was trained on, and back. */
#ifndef RUNNER_PROMPT_H
#define RUNNER_PROMPT_H

#include "tokenizer.h"

/** The file's bytes, and a 0 behind them; NULL on failure. free() it. */
char *read_text(const char *path);

/**
 * The tokens of a conversation in which the user said `document` and `question`
 * (either may be NULL) and it is the assistant's turn; without a template, of
 * the two texts and nothing else.
 */
bool make_prompt(const tokenizer_t *tokenizer, const char *document, const char *question,
                 bool use_template, tokens_t *tokens);

/** Writes tokens to a stream so that only whole characters ever go out. Begin with {0}. */
typedef struct printer {
    char held[8]; /* the first bytes of a character whose rest is yet to come */
    size_t n;
} printer_t;

void printer_put(printer_t *printer, const tokenizer_t *tokenizer, uint32_t id);

/** Write what is held, be it whole or not. */
void printer_end(printer_t *printer);

#endif
