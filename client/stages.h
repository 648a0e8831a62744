/* stages.h: what tensors of a GPU are copied with on their way to a worker elsewhere: pinned memory
 * of the host, and a stream for the copies. A step takes them when its first run needs them, and
 * the client keeps them for the next. */
#ifndef ATTN_STAGES_H
#define ATTN_STAGES_H

#include "client/client.h"
#include "kernels/memory.h"

#define STAGES_MAX 5u

typedef struct stages {
    int gpu;
    attn_copies_t *copies;
    struct {
        void *at; /**< NULL: none yet */
        uint64_t bytes;
    } pieces[STAGES_MAX];
    attn_shared_t *mapped; /**< a reference, when they are given back: what copies work with */
    struct stages *next;
} stages_t;

/** Those of a GPU: kept ones, or new ones without memory. Any thread; likewise below.
 * @return as attn_copies_open() */
attn_status_t stages_take(attn_client_t *client, int gpu, stages_t **stages_p);

/** Have a piece of so many bytes; no copy is under way. @return ATTN_ERR_NO_MEMORY */
attn_status_t stages_room(stages_t *stages, uint32_t piece, uint64_t bytes);

/** Back to the client. Copies may be under way: nobody gets them before these ended. NULL is
 * allowed. */
void stages_give(attn_client_t *client, stages_t *stages);

/** All go. Copies that are under way are waited for, a second at most, and then left alone: whoever
 * takes stages later frees what has ended. */
void client_stages_free(attn_client_t *client);

#endif
