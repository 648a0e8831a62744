/*
 * log.h: one line per event on stderr, in logfmt: time, level, event, then key=value
 * pairs with the ids of the objects concerned. Who first knows of an error logs it.
 */
#ifndef ATTN_BASE_LOG_H
#define ATTN_BASE_LOG_H

#include "base/attn_types.h"

typedef enum attn_log_level {
    ATTN_LOG_DEBUG = 0,
    ATTN_LOG_INFO  = 1,
    ATTN_LOG_WARN  = 2,
    ATTN_LOG_ERROR = 3,
} attn_log_level_t;

/** Lines below `level` are dropped. Default: warn (a library is quiet); daemons set info. */
void attn_log_set_level(attn_log_level_t level);

/** "name=worker-2" or "role=dev": put on every line of this process. At most 63 bytes are kept. */
void attn_log_set_who(const char *who);

/**
 * Log an event: attn_log(ATTN_LOG_WARN, "worker.lost", "worker=%u address=%s", ...).
 * Values that may hold spaces go in quotes by the caller: reason=\"%s\". Any thread;
 * one write(2) a line; a failed write (a full disk) is dropped and counted.
 */
void attn_log(attn_log_level_t level, const char *event, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
