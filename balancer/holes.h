/*
 * holes.h: the token ranges that a sequence lost with its workers and that were not filled again.
 * Pure.
 */
#ifndef ATTN_HOLES_H
#define ATTN_HOLES_H

#include "balancer/split.h"

/** Tokens [first, end). */
typedef struct hole {
    uint64_t first, end;
    uint32_t worker; /**< that they were lost with; 0: placed anew, and to be filled */
    bool open; /**< at the end of the sequence: how many of them were committed, if any, is lost too
                */
} hole_t;

/** Committed tokens: the longest prefix, holes that are not open counted as there. */
uint64_t holes_length(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size);

/** The first hole that begins in chunk *c or later; *c is then the first chunk behind it. Lost
 * neighbours of one worker are one hole. @return false: there is none */
bool holes_next(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size, uint32_t *c,
                hole_t *hole);

/** The holes below a position, cut to it, as "tokens 2048-4095 (worker 3), tokens 5000-5119 (placed
 * anew)", cut to room bytes, at least 1. @return whether there are any */
bool holes_text(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size, uint64_t below,
                char *text, size_t room);

#endif
