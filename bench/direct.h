/*
 * direct.h: layers of an open step as unary calls to one worker, as a client in another language
 * would make them. libattn itself uses streams.
 */
#ifndef ATTN_BENCH_DIRECT_H
#define ATTN_BENCH_DIRECT_H

#include "client/attn.h"

#include <sys/uio.h>

typedef struct direct direct_t;

/** A connection of its own to the worker at HOST:PORT, on which the client is who calls: with its
 * ticket and its way of waiting. The client outlives it. */
direct_t *direct_open(const attn_client_t *client, const char *address);
void direct_close(direct_t *direct);

/** One layer of a step that libattn began, all of it owned by this worker: q, k, v there, and
 * the answer copied to `answer`, of answer_bytes. @return nanoseconds that the worker computed */
uint64_t direct_run(direct_t *direct, const attn_step_t *step, uint32_t layer,
                    const struct iovec tensors[3], void *answer, uint64_t answer_bytes);

#endif
