/*
 * geometry.h: checking, completing, copying and comparing the geometry of a cache. Inside
 * the balancer; others use directory_geometry_check().
 */
#ifndef ATTN_BALANCER_GEOMETRY_H
#define ATTN_BALANCER_GEOMETRY_H

#include "base/attn_types.h"

/**
 * Check `from` and make a complete copy: every default filled in, one explicit row per layer,
 * slopes and sinks copied. `from` may be of an older header, with fewer bytes.
 *
 * @param table_p  the memory behind copy->layer_table; the caller frees it
 * @return ATTN_ERR_INVALID, ATTN_ERR_NO_MEMORY
 */
attn_status_t geometry_copy(const attn_geometry_t *from, attn_geometry_t *copy, void **table_p);

/**
 * Are two complete geometries those of one cache? Floats are compared by their bits.
 * region_bytes 0 in `asked` takes what there is.
 *
 * @return ATTN_ERR_EXISTS  names the first field that differs, with both values
 */
attn_status_t geometry_compare(const attn_geometry_t *there, const attn_geometry_t *asked);

#endif
