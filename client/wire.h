/*
 * wire.h: between the engine's structs and the wire's messages, both ways. Everything that
 * comes from a peer is checked here for shape (counts, list lengths); the engine
 * checks what it means. Decoded structs live in one block that wire_free() frees.
 */
#ifndef ATTN_WIRE_H
#define ATTN_WIRE_H

#include "attn/v1/attn.pb-c.h"
#include "client/attn.h"
#include "engine/engine.h"

#define WIRE_SEQS_MAX 4096u
#define WIRE_CHUNKS_MAX (1u << 20)
#define WIRE_TICKET_ROOM 512u /* bytes of a ticket, its end included */

/** Memory of one decoded or encoded message; zero-initialise. */
typedef struct wire_block {
    struct wire_piece *pieces;
} wire_block_t;

/** Zeroed memory that lives until wire_free(); NULL when out of memory (sets the sentence). */
void *wire_alloc(wire_block_t *block, uint64_t n, uint64_t size);
void wire_free(wire_block_t *block);

/* Decoding: @return ATTN_ERR_INVALID naming the field, ATTN_ERR_NO_MEMORY. */
attn_status_t wire_geometry_decode(wire_block_t *block, const Attn__V1__Geometry *message,
                                   attn_geometry_t *geometry);
attn_status_t wire_worker_begin_decode(wire_block_t *block,
                                       const Attn__V1__WorkerBeginRequest *message, uint64_t now_ns,
                                       engine_batch_t *batch);
attn_status_t wire_begin_decode(wire_block_t *block, const Attn__V1__BeginStepRequest *message,
                                attn_batch_t *batch);
attn_status_t wire_layout_decode(const Attn__V1__SequenceLayout *message,
                                 attn_seq_info_t *info); /* attn_seq_info_free() */

/** Lists of a run; copied, for the message may go before they are used. */
attn_status_t wire_lists_decode(wire_block_t *block, Attn__V1__EntryLists *const *messages,
                                size_t n, engine_lists_t **lists_p);

/* Encoding: the messages point into block and into what they were made of. */
attn_status_t wire_geometry_encode(wire_block_t *block, const attn_geometry_t *geometry,
                                   Attn__V1__Geometry **message_p);
attn_status_t wire_worker_begin_encode(wire_block_t *block, const engine_batch_t *batch,
                                       uint64_t now_ns, Attn__V1__WorkerBeginRequest **message_p);
/** The message's cache_id is the caller's to set. */
attn_status_t wire_begin_encode(wire_block_t *block, const attn_batch_t *batch,
                                Attn__V1__BeginStepRequest *message);
attn_status_t wire_lists_encode(wire_block_t *block, const engine_lists_t *lists, uint32_t n,
                                Attn__V1__EntryLists ***messages_p);
attn_status_t wire_chunks_encode(wire_block_t *block, const attn_seq_info_t *info,
                                 Attn__V1__ChunkInfo ***chunks_p);
attn_status_t wire_holes_encode(wire_block_t *block, const attn_seq_info_t *info,
                                Attn__V1__Hole ***holes_p);
void wire_worker_decode(const Attn__V1__WorkerInfo *message, attn_worker_info_t *info);

/** May a ticket go into a call's metadata? @return ATTN_ERR_INTERNAL if it is no line of ASCII, or
 * has WIRE_TICKET_ROOM bytes or more. */
attn_status_t wire_ticket_check(const char *ticket);

#endif
