/* attnctl_words.h: what the words of attnctl's command line mean, for all its commands. */
#ifndef ATTN_CLIENT_ATTNCTL_WORDS_H
#define ATTN_CLIENT_ATTNCTL_WORDS_H

#include <attn.h>
#include <stdbool.h>

/** Decimal, or hexadecimal behind 0x; all of the text. @return false: it is none, or too large */
bool attnctl_number(const char *text, uint64_t most, uint64_t *number);

/** A decimal number at the start of text; *end_p: behind it. @return false: none within limits */
bool attnctl_number_at(const char *text, const char **end_p, uint64_t least, uint64_t most,
                       uint64_t *number);

/** An option that is a decimal number: where it goes, and its limits. */
typedef struct attnctl_limits {
    int option;
    uint32_t *to;
    uint32_t least, most;
} attnctl_limits_t;

/** @return false: the option is none of these, or its value is wrong */
bool attnctl_take_number(const attnctl_limits_t *numbers, size_t n, int option, const char *text);

/** "f32", "f16" or "bf16". @return false: it is none of them */
bool attnctl_dtype(const char *text, attn_dtype_t *dtype);
const char *attnctl_dtype_name(attn_dtype_t dtype);

#endif
