#include "failure.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[512];

bool
failure(const char *format, ...)
{
    /* By way of a copy: an argument may be the sentence itself. */
    char text[sizeof(sentence)];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    memcpy(sentence, text, strlen(text) + 1);
    return false;
}

const char *
failure_text(void)
{
    return sentence;
}
