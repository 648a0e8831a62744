/*
 * session.h: the runner's side of libattn: a client, a cache with the model's
 * geometry, one sequence in it, and a step for every pass. This file and
 * attend() in forward.c are all there is to it.
 */
#ifndef RUNNER_SESSION_H
#define RUNNER_SESSION_H

#include <attn.h>

#include "forward.h"
#include "llama.h"

typedef struct session {
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
    uint64_t length; /**< tokens committed */
} session_t;

/** What of the cache is for the user to choose; 0 is libattn's default. */
typedef struct session_shape {
    attn_dtype_t kv_dtype;
    uint32_t page, chunk; /**< tokens */
    bool spread;          /**< every chunk on another worker */
} session_shape_t;

/** @param expected_tokens  How long the sequence may grow; a hint for its placement. */
bool session_open(session_t *s, const char *target, const session_shape_t *shape,
                  const llama_config_t *model, uint64_t expected_tokens);
void session_close(session_t *s);

/** One pass is one step: begin, every layer, commit. On failure nothing of it is kept. */
bool session_pass(session_t *s, forward_t *f, const uint32_t *ids, uint32_t n, meter_t *meter);

#endif
