/* process.h: what the daemons share as processes: signals, addresses, random numbers, readiness. */
#ifndef ATTN_DAEMON_PROCESS_H
#define ATTN_DAEMON_PROCESS_H

#include "base/attn_types.h"

#define PROCESS_ADDRESS_MAX 64 /* bytes of HOST:PORT with its end, as layouts carry it */

/** In the environment of a child of `attnd dev`: the descriptor to write a line to when ready. */
#define PROCESS_READY_FD "ATTND_READY_FD"

/**
 * Take SIGTERM, SIGINT and SIGHUP by a thread of their own, ignore SIGPIPE, and allow as many
 * descriptors as the system lets us have, of which the last few are kept from whoever connects.
 * Call before any other thread exists. The first of SIGTERM and SIGINT is told by
 * process_stopping(); the second one ends the process at once, as the signal would have.
 */
attn_status_t process_start(void);

/**
 * Give memory back to the system when much of it is free: malloc keeps what a burst of messages
 * left behind. Every few seconds: it takes up to some ms, if there is much.
 */
void process_trim(void);

/** Wait up to ms for the first signal, or for a SIGHUP. @return true once we are to stop */
bool process_stopping(uint32_t ms);

/** Whether SIGHUP came since this was asked the last time. */
bool process_reload(void);

/** Have the process end with exit code 0 after ms at the latest, whatever its peers keep it waiting
 * for: called when all that was promised is done. */
void process_end_within(uint32_t ms);

/** HOST of listen with this port. @return ATTN_ERR_INVALID if it does not fit */
attn_status_t process_address(const char *listen, uint16_t port, char address[PROCESS_ADDRESS_MAX]);

/** Does HOST of HOST:PORT mean every address of the machine, so that nobody can connect to it? */
bool process_address_is_wildcard(const char *address);

/** Bytes that nobody can guess. */
void process_random_bytes(void *bytes, size_t n); /* at most 256 */

/** 64 random bits, not 0. */
uint64_t process_random(void);

/**
 * Tell the service manager, if one started us (NOTIFY_SOCKET, as sd_notify(3) has it): lines of
 * NAME=value, such as READY=1, at most 511 bytes. From any thread; what cannot be sent is not.
 */
void process_notify(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** Tell `attnd dev`, if it started us, that we are ready; once. */
void process_ready(const char *line);

#endif
