/*
 * unicode.h: as much of Unicode as a byte-level tokenizer and a terminal need:
 * UTF-8 in and out, and the three classes that the pre-tokenizer tells apart.
 * Exact for ASCII and for every character that Unicode 14 assigns.
 */
#ifndef RUNNER_UNICODE_H
#define RUNNER_UNICODE_H

#include <stddef.h>
#include <stdint.h>

typedef enum char_class {
    CHAR_LETTER,
    CHAR_NUMBER,
    CHAR_SPACE,
    CHAR_OTHER,
} char_class_t;

char_class_t char_class(uint32_t code);

/**
 * Decode the character at text[0]; length >= 1. Returns its bytes, 1 to 4; a byte
 * that begins no well-formed character is taken alone, as U+FFFD.
 */
size_t utf8_decode(const char *text, size_t length, uint32_t *code);

/** Bytes at the end of text, 0 to 3, that may yet become a character when more bytes come. */
size_t utf8_unfinished(const char *text, size_t length);

#endif
