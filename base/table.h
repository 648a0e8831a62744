/*
 * table.h: uthash, in which a full heap is no end of the process: an element that could not be
 * added is not in the table, which table_has() tells after HASH_ADD. Include it in place of
 * <uthash.h>.
 */
#ifndef ATTN_BASE_TABLE_H
#define ATTN_BASE_TABLE_H

#define HASH_NONFATAL_OOM 1
#include <uthash.h>

/** Was the element added? To be asked after HASH_ADD of the handle of that name. */
#define table_has(handle, element) ((element)->handle.tbl != NULL)

#endif
