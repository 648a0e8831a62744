/*
 * thin.h: steps of thin clients, each a step of libattn that the coordinator holds for them.
 * Ids are random, so that nobody meets another's step by counting.
 *
 * Threads: any. One operation of a step at a time: a second one waits. No lock is held while
 * libattn works.
 */
#ifndef ATTN_DAEMON_THIN_H
#define ATTN_DAEMON_THIN_H

#include "client/client.h"
#include "daemon/steps.h"

typedef struct thin thin_t;

/** Serves steps_create(); its service is the thin_t. */
extern const steps_ops_t thin_ops;

/** @param client  the coordinator's own; outlives the steps */
attn_status_t thin_create(attn_client_t *client, thin_t **thin_p);
void thin_destroy(thin_t *thin); /* open steps abort; NULL is allowed */

/** As attn_seq_truncate() and attn_seq_free(); the steps' layouts learn of it. */
attn_status_t thin_seq_truncate(thin_t *thin, uint64_t cache, attn_seq_t seq, uint64_t length);
attn_status_t thin_seq_free(thin_t *thin, uint64_t cache, attn_seq_t seq);

/** Leave the cache, at once or when its last step here ends: before somebody closes it. */
void thin_forget_cache(thin_t *thin, uint64_t cache);

/** Abort overdue steps, leave caches that no step uses. Every 100 ms or so; may block. */
void thin_tick(thin_t *thin, uint64_t now_ns);

uint32_t thin_open_steps(thin_t *thin);

/** Steps since start, and those open now. Aborted for ENGINE_ABORT_OTHER: a worker failed them. */
void thin_describe(thin_t *thin, engine_steps_t *steps, uint32_t *open_p);

#endif
