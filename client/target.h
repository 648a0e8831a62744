/* target.h: what attn_client_open() takes: "HOST:PORT" or
 * "inproc://BACKEND?workers=..&threads=..&slab=..". */
#ifndef ATTN_TARGET_H
#define ATTN_TARGET_H

#include "base/attn_types.h"

typedef struct target {
    bool inproc;
    char backend[16];
    uint32_t workers;    /**< 1 to 64 */
    uint32_t threads;    /**< of each; 0: one per core */
    uint64_t slab_bytes; /**< of each; default 1 GiB */
} target_t;

/** @return ATTN_ERR_INVALID with what is wrong */
attn_status_t target_parse(const char *text, target_t *target);

#endif
