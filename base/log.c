#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 1024

static atomic_int level_now = ATTN_LOG_WARN;
static char who_now[64];
static atomic_uint_fast64_t dropped;

void
attn_log_set_level(attn_log_level_t level)
{
    atomic_store(&level_now, (int)level);
}

void
attn_log_set_who(const char *who)
{
    snprintf(who_now, sizeof(who_now), "%s", who);
}

/* "2026-11-23T10:00:00.123Z" */
static int
put_time(char *at, size_t room)
{
    struct timespec now;
    struct tm utc;

    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t n = strftime(at, room, "%Y-%m-%dT%H:%M:%S", &utc);
    return (int)n + snprintf(at + n, room - n, ".%03ldZ", now.tv_nsec / 1000000);
}

void
attn_log(attn_log_level_t level, const char *event, const char *format, ...)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    char line[LINE_MAX_BYTES];
    va_list args;

    if ((int)level < atomic_load(&level_now)) {
        return;
    }

    size_t n = (size_t)put_time(line, sizeof(line));
    n += (size_t)snprintf(line + n, sizeof(line) - n, " level=%s event=%s %s%s", names[level],
                          event, who_now, who_now[0] ? " " : "");
    va_start(args, format);
    int rest = vsnprintf(line + n, sizeof(line) - n, format, args);
    va_end(args);
    n += rest > 0 ? (size_t)rest : 0;
    n = n < sizeof(line) - 1 ? n : sizeof(line) - 2;
    /* One event is one line, whatever bytes a peer put in. */
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)line[i] < 0x20) {
            line[i] = '?';
        }
    }
    line[n++] = '\n';
    if (write(STDERR_FILENO, line, n) != (ssize_t)n) {
        atomic_fetch_add(&dropped, 1);
    }
}
