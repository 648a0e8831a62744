/*
 * copier.h: chunks of KV between workers, both ends. The worker that a chunk goes to asks the one
 * that has it for parts, several at a time on one stream (Worker.ExportChunks), or in slots of
 * UCX's that the source opens over it, checks each (engine.h) and stores it; the coordinator asks
 * for all that by Worker.CopyChunk.
 *
 * Workers let each other in by tickets of their own: the coordinator gave both what those are made
 * with when they joined.
 */
#ifndef ATTN_DAEMON_COPIER_H
#define ATTN_DAEMON_COPIER_H

#include "attn/v1/attn.pb-c.h"
#include "daemon/jobs.h"
#include "daemon/lender.h"
#include "daemon/worker/gate.h"
#include "engine/engine.h"
#include "rpc/rpc.h"

/* At once, to here; more are refused. */
#define COPIER_COPIES_MAX 4u
/* Bytes of parts on their way from here, where more wait, and of those that came, while they are
 * stored. */
#define COPIER_OUT_MAX (UINT64_C(256) << 20)
#define COPIER_IN_MAX (UINT64_C(256) << 20)
/* A source that sends no part for so long is given up. */
#define COPIER_STALL_MS 4000u

typedef struct copier copier_t;

typedef struct copier_options {
    engine_t *engine;
    gate_t *gate;
    rpc_tls_t *tls;   /**< NULL: plaintext */
    jobs_t *jobs;     /**< for parts that wait for room */
    uint64_t out_max; /**< 0: COPIER_OUT_MAX */
    lender_t *lender; /**< whose slots parts may be asked for in; NULL: none. Destroyed before */
    bool ucx;         /**< have chunks come through UCX, from where it can be */
    const char
        *network; /**< with ucx: devices that messages may come by; empty: none. Not copied */
} copier_options_t;

/** Who asks for a copy. */
typedef struct copier_asker {
    uint64_t deadline_ns;
    bool (*gone)(const void *arg); /**< given up? Looked at for each part; NULL: it never is */
    const void *arg;
} copier_asker_t;

/** Since the start. */
typedef struct copier_figures {
    uint64_t chunks_in, bytes_in; /**< that came, and were found right */
    uint64_t bytes_in_ucx;        /**< of copies that came through UCX */
    uint64_t failed;              /**< copies to here that came to nothing */
    uint64_t corrupt;             /**< of them: what came was not what was sent */
    uint64_t parts_out, bytes_out;
} copier_figures_t;

/** Add Worker.ExportChunks to the server. The copier goes after it. */
attn_status_t copier_create(rpc_server_t *server, const copier_options_t *options,
                            copier_t **copier_p);
void copier_destroy(copier_t *copier); /* NULL is allowed */

/** Take in no more chunks, give up those that are coming, and refuse new streams. Any thread. */
void copier_drain(copier_t *copier);
/** End the streams over which others read; after copier_drain(). */
void copier_end_streams(copier_t *copier);

/** The part that a request asks for; not checked. */
engine_export_t copier_part(const Attn__V1__ExportChunkRequest *request);

/** Free buffers that nobody asked for in a while. */
void copier_tick(copier_t *copier, uint64_t now_ns);

void copier_describe(copier_t *copier, copier_figures_t *figures);

/**
 * Copy from the worker at this address. Blocks; any thread.
 * @param worker   our id, for the ticket
 * @param bytes_p  of k and v that came
 * @return as engine_arrival_begin, _store, _publish and what the source answers;
 *         ATTN_ERR_EXHAUSTED COPIER_COPIES_MAX are under way; ATTN_ERR_UNAVAILABLE,
 *         ATTN_ERR_DEADLINE the source; ATTN_ERR_UNAVAILABLE draining; ATTN_ERR_CANCELLED whoever
 *         asked is gone
 */
attn_status_t copier_copy(copier_t *copier, uint32_t worker, const char *source,
                          const engine_copy_t *copy, const copier_asker_t *asker,
                          uint64_t *bytes_p);

#endif
