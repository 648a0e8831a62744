/*
 * words.h: the pre-tokenizer "smollm": cuts text into the words inside of which
 * BPE merges. See tokenizer.h for the rule.
 */
#ifndef RUNNER_WORDS_H
#define RUNNER_WORDS_H

#include <stddef.h>

/** Bytes of the word at the start of text; 1 to length. length >= 1. */
size_t next_word(const char *text, size_t length);

#endif
