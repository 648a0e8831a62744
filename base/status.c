#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define SENTENCE_MAX 512

static _Thread_local char sentence[SENTENCE_MAX];

/* The one table: name and gRPC code of each status. */
static const struct {
    attn_status_t status;
    int grpc;
    const char *name;
} table[] = {
    {ATTN_OK, 0, "ATTN_OK"},
    {ATTN_ERR_INVALID, 3, "ATTN_ERR_INVALID"},
    {ATTN_ERR_UNSUPPORTED, 12, "ATTN_ERR_UNSUPPORTED"},
    {ATTN_ERR_TOO_LARGE, 11, "ATTN_ERR_TOO_LARGE"},
    {ATTN_ERR_EXHAUSTED, 8, "ATTN_ERR_EXHAUSTED"},
    {ATTN_ERR_DEADLINE, 4, "ATTN_ERR_DEADLINE"},
    {ATTN_ERR_CANCELLED, 1, "ATTN_ERR_CANCELLED"},
    {ATTN_ERR_NO_MEMORY, 8, "ATTN_ERR_NO_MEMORY"},
    {ATTN_ERR_STALE, 10, "ATTN_ERR_STALE"},
    {ATTN_ERR_ABORTED, 10, "ATTN_ERR_ABORTED"},
    {ATTN_ERR_CONFLICT, 9, "ATTN_ERR_CONFLICT"},
    {ATTN_ERR_INCOMPLETE, 9, "ATTN_ERR_INCOMPLETE"},
    {ATTN_ERR_BUSY, 9, "ATTN_ERR_BUSY"},
    {ATTN_ERR_NUMERIC, 3, "ATTN_ERR_NUMERIC"},
    {ATTN_ERR_NOT_FOUND, 5, "ATTN_ERR_NOT_FOUND"},
    {ATTN_ERR_EXISTS, 6, "ATTN_ERR_EXISTS"},
    {ATTN_ERR_LOST, 15, "ATTN_ERR_LOST"},
    {ATTN_ERR_UNAVAILABLE, 14, "ATTN_ERR_UNAVAILABLE"},
    {ATTN_ERR_DENIED, 7, "ATTN_ERR_DENIED"},
    {ATTN_ERR_INTERNAL, 13, "ATTN_ERR_INTERNAL"},
    {ATTN_ERR_CORRUPT, 15, "ATTN_ERR_CORRUPT"},
};

#define TABLE_N (sizeof(table) / sizeof(table[0]))

attn_status_t
attn_fail(attn_status_t status, const char *format, ...)
{
    /* By way of a copy: an argument may be the sentence itself. */
    char text[SENTENCE_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    memcpy(sentence, text, strlen(text) + 1);
    return status;
}

attn_status_t
attn_fail_in(attn_status_t status, const char *format, ...)
{
    char text[SENTENCE_MAX];
    va_list args;

    va_start(args, format);
    int n = vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (n >= 0 && n < SENTENCE_MAX) {
        snprintf(text + n, sizeof(text) - (size_t)n, "%s", sentence);
    }
    memcpy(sentence, text, strlen(text) + 1);
    return status;
}

const char *
attn_last_error(void)
{
    return sentence;
}

const char *
attn_strerror(attn_status_t status)
{
    for (size_t i = 0; i < TABLE_N; i++) {
        if (table[i].status == status) {
            return table[i].name;
        }
    }
    return "unknown attn_status_t";
}

bool
attn_status_is_known(int value)
{
    for (size_t i = 0; i < TABLE_N; i++) {
        if ((int)table[i].status == value) {
            return true;
        }
    }
    return false;
}

int
attn_status_to_grpc(attn_status_t status)
{
    for (size_t i = 0; i < TABLE_N; i++) {
        if (table[i].status == status) {
            return table[i].grpc;
        }
    }
    return 2; /* UNKNOWN */
}

attn_status_t
attn_status_from_grpc(int code)
{
    for (size_t i = 0; i < TABLE_N; i++) {
        if (table[i].grpc == code) {
            return table[i].status; /* the first row of a code is its nearest status */
        }
    }
    return ATTN_ERR_INTERNAL;
}
