/*
 * bare_far.h: the least that a round trip of UCX's messages costs, over loopback TCP: two processes
 * with a port and a way each (rpc/ucx_port.c, a thin coat over ucp_am_send_nbx()), which make
 * progress until a message came and send one back. No slots, no checks, no threads, no sleep; who
 * waits lets others have the core now and then.
 */
#ifndef ATTN_BENCH_BARE_FAR_H
#define ATTN_BENCH_BARE_FAR_H

#include <stdint.h>

typedef struct bare_far bare_far_t;

/** A process, started as `program bare-far FD`: main() hands over to bare_far_serve(). */
bare_far_t *bare_far_open(const char *program, uint32_t in, uint32_t out);
void bare_far_close(bare_far_t *bare);

/** Send `in` bytes, and have `out` bytes back. */
void bare_far_round(bare_far_t *bare);

int bare_far_serve(int fd);

#endif
