/*
 * status.h: how a failure travels. The function that first knows what is wrong
 * calls attn_fail() once, with a sentence; everybody above returns the status.
 * The sentence is thread-local; whoever hands a status to another thread or
 * process hands attn_last_error() along and sets it there again.
 */
#ifndef ATTN_BASE_STATUS_H
#define ATTN_BASE_STATUS_H

#include "base/attn_types.h"

/** Set this thread's error sentence (at most 511 bytes are kept) and return status. */
attn_status_t attn_fail(attn_status_t status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/** Put words before the sentence already set ("entry 3: " + ...); returns status. */
attn_status_t attn_fail_in(attn_status_t status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

ATTN_API const char *attn_last_error(void);
ATTN_API const char *attn_strerror(attn_status_t status);

/** gRPC status code (0 to 16) of a status, and the nearest status of a code. */
int attn_status_to_grpc(attn_status_t status);
attn_status_t attn_status_from_grpc(int code);

/** True for a value that attn_status_t defines: check what comes from a peer. */
bool attn_status_is_known(int value);

#endif
