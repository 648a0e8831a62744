/*
 * In the language of regular expressions: first every \p{N} is split off, so
 * that no word reaches over a digit, and then, in what lies between, the first
 * of these that matches is a word:
 *
 *   's|'t|'re|'ve|'m|'ll|'d   | ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 */
#include "words.h"

#include <string.h>

#include "unicode.h"

/** Class of the character at text[at], and its bytes; the end of the text reads as a number. */
static char_class_t
class_at(const char *text, size_t length, size_t at, size_t *bytes)
{
    uint32_t code;

    if (at == length) {
        *bytes = 0;
        return CHAR_NUMBER;
    }
    *bytes = utf8_decode(text + at, length - at, &code);
    return char_class(code);
}

/** Where the run of this class that begins at text[at] ends. */
static size_t
run_end(const char *text, size_t length, size_t at, char_class_t class)
{
    size_t bytes;

    while (at < length && class_at(text, length, at, &bytes) == class) {
        at += bytes;
    }
    return at;
}

static size_t
contraction(const char *text, size_t length)
{
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};

    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t n = strlen(endings[i]);
        if (n <= length && memcmp(text, endings[i], n) == 0) {
            return n;
        }
    }
    return 0;
}

/** White space leaves its last character to a word that follows; to a number or the end, none. */
static size_t
space_word(const char *text, size_t length)
{
    size_t end = run_end(text, length, 0, CHAR_SPACE), bytes = 0, last = 0;

    for (size_t at = 0; at < end; at += bytes) {
        last = at;
        class_at(text, length, at, &bytes);
    }
    if (last == 0 || class_at(text, length, end, &bytes) == CHAR_NUMBER) {
        return end;
    }
    return last;
}

size_t
next_word(const char *text, size_t length)
{
    size_t bytes, after_space, n = contraction(text, length);
    char_class_t class = class_at(text, length, 0, &bytes);

    if (n > 0) {
        return n;
    }
    if (class == CHAR_NUMBER) {
        return bytes;
    }
    if (class != CHAR_SPACE) {
        return run_end(text, length, 0, class);
    }
    if (text[0] == ' ') {
        class = class_at(text, length, 1, &after_space);
        if (class == CHAR_LETTER || class == CHAR_OTHER) {
            return run_end(text, length, 1, class);
        }
    }
    return space_word(text, length);
}
