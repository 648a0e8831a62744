/*
 * direct.h: layers of an open step as unary calls to one worker, as a client in another language
 * would make them. libattn itself uses streams.
 */
#ifndef ATTN_BENCH_DIRECT_H
#define ATTN_BENCH_DIRECT_H

#include "client/attn.h"

#include <sys/uio.h>

typedef struct direct direct_t;

/** A connection to the worker at HOST:PORT; waits like a client with this spin_us. */
direct_t *direct_open(const char *address, uint32_t spin_us);
void direct_close(direct_t *direct);

/** One layer of a step that libattn began, all of it owned by this worker: q, k, v there, and
 * the answer copied to `answer`, of answer_bytes. @return nanoseconds that the worker computed */
uint64_t direct_run(direct_t *direct, const attn_step_t *step, uint32_t layer,
                    const struct iovec tensors[3], void *answer, uint64_t answer_bytes);

#endif
