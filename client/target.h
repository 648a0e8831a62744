/* target.h: what attn_client_open() takes: "HOST:PORT" or
 * "inproc://DEVICE?workers=..&threads=..&slab=..". */
#ifndef ATTN_TARGET_H
#define ATTN_TARGET_H

#include "base/attn_types.h"

typedef struct target {
    bool inproc;
    char device[16];     /**< as attn_backend_parse() takes it */
    uint32_t workers;    /**< 1 to 64 */
    uint32_t threads;    /**< of each; 0: one per core */
    uint64_t slab_bytes; /**< of each; default 1 GiB; 0: of a GPU what is free, but for 2 GiB */
} target_t;

/** @return ATTN_ERR_INVALID with what is wrong */
attn_status_t target_parse(const char *text, target_t *target);

#endif
