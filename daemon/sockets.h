/*
 * sockets.h: calls of libc that C core 1.51 makes, answered here, since a stranger could end or
 * stop a daemon by what C core makes of libc's own answers.
 */
#ifndef ATTN_DAEMON_SOCKETS_H
#define ATTN_DAEMON_SOCKETS_H

#include "base/attn_types.h"

/**
 * From now on the calls are answered as sockets.c says. As many descriptors are allowed as the
 * system lets us have, of which the last few are kept from whoever connects. Call once, before any
 * other thread exists.
 * @return ATTN_ERR_NO_MEMORY
 */
attn_status_t sockets_start(void);

#endif
