/*
 * holes.c: what a sequence lost with its workers, from its chunks as a client knows them.
 *
 *     chunk   0 full | 1 lost | 2 full | 3 sealed, 100 tokens | 4 full | 5 lost
 *     holes            all of it         what is not filled             perhaps some: open
 *
 * A lost chunk behind which tokens are, or one that is sealed, was full. Of lost chunks at the end
 * nobody knows how much they held: clients write to owners without telling anybody else.
 */
#include "balancer/holes.h"
#include "base/checked.h"

#include <inttypes.h>
#include <stdio.h>

static bool
holds(const split_chunk_t *chunk)
{
    return chunk->sealed || (!chunk->lost && chunk->length > 0);
}

/* Chunks up to the last one that is known to have held tokens. */
static uint32_t
known_chunks(const split_chunk_t *chunks, uint32_t n)
{
    while (n > 0 && !holds(&chunks[n - 1])) {
        n--;
    }
    return n;
}

uint64_t
holes_length(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size)
{
    uint32_t known = known_chunks(chunks, n), c = 0;

    while (c < known && (chunks[c].lost || chunks[c].sealed || chunks[c].length == chunk_size)) {
        c++;
    }
    return (uint64_t)c * chunk_size + (c < known ? chunks[c].length : 0);
}

/* May chunk c, behind all that are known, have held tokens? Not if one before it had room. */
static bool
may_have_held(const split_chunk_t *chunks, uint32_t known, uint32_t c, uint32_t chunk_size)
{
    uint32_t before = c;

    while (before > known && chunks[before - 1].lost) {
        before--;
    }
    const split_chunk_t *last = before > 0 ? &chunks[before - 1] : NULL;
    return last == NULL || last->lost || last->sealed || last->length == chunk_size;
}

static bool
hole_at(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size, uint32_t c, hole_t *hole)
{
    const split_chunk_t *chunk = &chunks[c];
    uint32_t known             = known_chunks(chunks, n);

    if (!(chunk->lost || (chunk->sealed && chunk->length < chunk_size)) ||
        (c >= known && !may_have_held(chunks, known, c, chunk_size))) {
        return false;
    }
    *hole = (hole_t){.first  = (uint64_t)c * chunk_size + (chunk->lost ? 0 : chunk->length),
                     .end    = (uint64_t)(c + 1) * chunk_size,
                     .worker = chunk->lost ? chunk->worker : 0,
                     .open   = c >= known};
    return true;
}

bool
holes_next(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size, uint32_t *c, hole_t *hole)
{
    hole_t more;

    while (*c < n && !hole_at(chunks, n, chunk_size, *c, hole)) {
        (*c)++;
    }
    if (*c >= n) {
        return false;
    }
    while (++*c < n && hole->worker != 0 && hole_at(chunks, n, chunk_size, *c, &more) &&
           more.worker == hole->worker && more.open == hole->open) {
        hole->end = more.end;
    }
    return true;
}

bool
holes_text(const split_chunk_t *chunks, uint32_t n, uint32_t chunk_size, uint64_t below, char *text,
           size_t room)
{
    size_t used = 0;
    hole_t hole;

    text[0] = 0;
    for (uint32_t c = 0; holes_next(chunks, n, chunk_size, &c, &hole) && hole.first < below;) {
        const char *comma = used > 0 ? ", " : "";
        uint64_t last     = attn_min(hole.end, below) - 1;
        int wrote         = 0;
        if (used < room && hole.worker != 0) {
            wrote =
                snprintf(text + used, room - used, "%stokens %" PRIu64 "-%" PRIu64 " (worker %u)",
                         comma, hole.first, last, hole.worker);
        } else if (used < room) {
            wrote =
                snprintf(text + used, room - used, "%stokens %" PRIu64 "-%" PRIu64 " (placed anew)",
                         comma, hole.first, last);
        }
        used += (size_t)wrote; /* at or above room: cut there, and nothing follows */
    }
    return used > 0;
}
