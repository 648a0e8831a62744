/*
 * bare.h: the least that a round trip through shared memory costs: processes that wait for a number
 * in a slab of UCX's, write so many bytes and a number back, and do nothing else. No heads, no
 * sleep, no threads; the slab is mapped through UCX (ucp_rkey_ptr) by both sides.
 */
#ifndef ATTN_BENCH_BARE_H
#define ATTN_BENCH_BARE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct bare bare_t;

/** n processes, started as `program bare FD`: main() hands over to bare_serve(). yields: who waits
 * lets others have the core now and then, as there are fewer cores than processes. */
bare_t *bare_open(const char *program, uint32_t n, uint32_t in, uint32_t out, bool yields);
void bare_close(bare_t *bare);

/** Write `in` bytes to each, and copy `out` bytes from each when they have answered. */
void bare_round(bare_t *bare);

int bare_serve(int fd);

#endif
