/* export.h: what libattn and the front door share of reading k, v back. */
#ifndef ATTN_EXPORT_H
#define ATTN_EXPORT_H

#include "client/client_int.h"

/** @return ATTN_ERR_INVALID layer, range or its end, ATTN_ERR_LOST a hole is in the range */
attn_status_t export_check(const attn_seq_info_t *info, const attn_geometry_t *g, attn_seq_t seq,
                           uint32_t layer, uint64_t first, uint64_t end);

#endif
