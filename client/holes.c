/* holes.c: a sequence's length and holes, from its chunks as the owners told them. */
#include "balancer/holes.h"
#include "client/cluster.h"

#include "base/status.h"

#include <stdlib.h>

static split_chunk_t *
chunks_of(const attn_seq_info_t *info)
{
    split_chunk_t *chunks = calloc(info->n_chunks + (size_t)1, sizeof(*chunks));

    for (uint32_t c = 0; chunks != NULL && c < info->n_chunks; c++) {
        chunks[c] = cluster_split_chunk(&info->chunks[c]);
    }
    if (chunks == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the holes of %u chunks", info->n_chunks);
    }
    return chunks;
}

attn_status_t
cluster_holes(attn_seq_info_t *info, uint32_t chunk_size)
{
    split_chunk_t *chunks = chunks_of(info);
    hole_t hole;

    if (chunks == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    info->length  = holes_length(chunks, info->n_chunks, chunk_size);
    info->n_holes = 0;
    for (uint32_t c = 0; holes_next(chunks, info->n_chunks, chunk_size, &c, &hole);) {
        info->n_holes++;
    }
    info->holes = calloc(info->n_holes + (size_t)1, sizeof(*info->holes));
    for (uint32_t c = 0, i = 0;
         info->holes != NULL && holes_next(chunks, info->n_chunks, chunk_size, &c, &hole);) {
        info->holes[i++] = (attn_hole_t){
            .first = hole.first, .end = hole.end, .worker = hole.worker, .open = hole.open};
    }
    free(chunks);
    return info->holes != NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u holes", info->n_holes);
}

attn_status_t
cluster_check_whole(const attn_seq_info_t *info, uint32_t chunk_size, attn_seq_t seq,
                    uint64_t below)
{
    char ranges[256];
    split_chunk_t *chunks = chunks_of(info);

    if (chunks == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    bool lost = holes_text(chunks, info->n_chunks, chunk_size, below, ranges, sizeof(ranges));
    free(chunks);
    return lost ? attn_fail(ATTN_ERR_LOST, "sequence %llx lost %s", (unsigned long long)seq.id,
                            ranges)
                : ATTN_OK;
}
