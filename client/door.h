/*
 * door.h: a thin client: everything goes through the coordinator's front door, the service
 * attn.v1.Attention, as a client in any language would do it. It knows sequences and steps and
 * never a chunk or a worker. For tests and for attnctl bench, which put it beside libattn; it is
 * not part of libattn.
 *
 * Threads: all functions may be called from any thread; calls on one step are made one at a time.
 * All of them block, and end by their deadline: the door's timeout_ms, or the step's.
 */
#ifndef ATTN_CLIENT_DOOR_H
#define ATTN_CLIENT_DOOR_H

#include "client/attn.h"

typedef struct door door_t;
typedef struct door_cache door_cache_t;
typedef struct door_step door_step_t;

/** Connect, and keep the client's lease alive from a thread of its own. Of the options timeout_ms,
 * spin_us, name and those for TLS count. */
attn_status_t door_open(const char *address, const attn_client_options_t *options, door_t **door_p);
void door_close(door_t *door); /* after its caches; its sequences are freed. NULL is allowed */

/** As attn_cache_open() and attn_cache_close(). */
attn_status_t door_cache_open(door_t *door, const char *name, const attn_geometry_t *geometry,
                              door_cache_t **cache_p);
void door_cache_close(door_cache_t *cache); /* NULL is allowed */
const attn_geometry_t *door_cache_geometry(const door_cache_t *cache);

attn_status_t door_seq_create(door_cache_t *cache, attn_seq_t *seq_p);
attn_status_t door_seq_fork(door_cache_t *cache, attn_seq_t seq, uint64_t length,
                            attn_seq_t *fork_p);
attn_status_t door_seq_truncate(door_cache_t *cache, attn_seq_t seq, uint64_t length);
attn_status_t door_seq_free(door_cache_t *cache, attn_seq_t seq);
attn_status_t door_seq_describe(door_cache_t *cache, attn_seq_t seq,
                                attn_seq_info_t *info); /* attn_seq_info_free() */

/** As attn_seq_export(), a part of one layer after the other. */
attn_status_t door_seq_export(door_cache_t *cache, attn_seq_t seq, const attn_export_t *what,
                              void *k, void *v);

/**
 * Begin a step. `batch` as in attn_step_begin().
 * @param stream  its operations go over a stream (streams are kept and used again); otherwise each
 *                is a unary call, whose tensors must fit one message
 */
attn_status_t door_step_begin(door_cache_t *cache, const attn_batch_t *batch, bool stream,
                              door_step_t **step_p);

/** One layer, as attn_step_run(), with packed tensors: q of q_dtype, k and v of kv_dtype, o of
 * o_dtype; lse, where the batch wants it, must be given with o. lists as those of attn_run_t. NULL
 * as there. */
attn_status_t door_step_run(door_step_t *step, uint32_t layer, const void *q, const void *k,
                            const void *v, void *o, float *lse, const attn_lists_t *lists);

/** As attn_step_commit_with(); NULL accepts all. On ATTN_OK the step is freed. */
attn_status_t door_step_commit(door_step_t *step, const attn_commit_t *what);
void door_step_abort(door_step_t *step); /* frees it; NULL is allowed */

#endif
