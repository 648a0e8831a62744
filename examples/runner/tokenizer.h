/*
 * tokenizer.h: text to token ids and back, from the vocabulary and the merges
 * inside of the GGUF file: byte-level BPE as GPT-2 has it.
 *
 * Encoding goes in three stages. The pre-tokenizer cuts the text into words:
 * every digit by itself, then 's 't 're 've 'm 'll 'd, letters, numbers or
 * other signs, each with at most one space before it, and white space. Every
 * byte of a word becomes one printable character of GPT-2's byte alphabet.
 * Then the pair of neighbours that stands first in the list of merges becomes
 * one token, again and again, until no neighbours are in the list.
 *
 * Control tokens such as <|im_start|> are never made from text: ask for them by
 * name, and put text between. So a document cannot end its own message.
 */
#ifndef RUNNER_TOKENIZER_H
#define RUNNER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gguf.h"

typedef struct tokenizer tokenizer_t;

/** A growing list of token ids; begin with {0}, free() the ids. */
typedef struct tokens {
    uint32_t *ids;
    size_t n, room;
} tokens_t;

/** NULL on failure: the file has no "gpt2" vocabulary with the "smollm" pre-tokenizer. */
tokenizer_t *tokenizer_create(const gguf_t *gguf);
void tokenizer_destroy(tokenizer_t *tokenizer);

/** Number of tokens in the vocabulary. */
uint32_t tokenizer_size(const tokenizer_t *tokenizer);

/** Append one id. */
bool tokens_add(tokens_t *tokens, uint32_t id);

/** Append the tokens of a text. A byte for which the vocabulary has no token is left out. */
bool tokenizer_encode(const tokenizer_t *tokenizer, const char *text, size_t length,
                      tokens_t *tokens);

/** Append the control token of that name. */
bool tokenizer_control(const tokenizer_t *tokenizer, const char *name, tokens_t *tokens);

/** Whether this token is for control: it has no text, and a model that says it is done. */
bool tokenizer_is_control(const tokenizer_t *tokenizer, uint32_t id);

/** The bytes of a token, of which at most `room` are written; returns their number. Several
 * tokens may share one UTF-8 character. */
size_t tokenizer_decode(const tokenizer_t *tokenizer, uint32_t id, char *bytes, size_t room);

#endif
