/*
 * gguf.h: read a GGUF model file: its metadata (key, typed value) and its
 * tensors. The file is mapped and read where it lies; every view handed out
 * points into the mapping and lives until gguf_close().
 *
 *   "GGUF"  u32 version  u64 tensors  u64 keys
 *   keys    text key, u32 type, value          a text is u64 length and bytes
 *   tensors text name, u32 n_dims, u64 dims[], u32 type, u64 offset
 *   padding to the alignment, then the tensors' data
 *
 * A file may come from anywhere. gguf_open() checks every length, count, type
 * and offset once, so that later reads need no check; a truncated or garbage
 * file gives a sentence (failure_text()), never a read outside of the mapping.
 */
#ifndef RUNNER_GGUF_H
#define RUNNER_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "quant.h"

#define GGUF_DIMS_MAX 4

typedef struct gguf gguf_t;

/** Bytes inside the file; no terminating 0. */
typedef struct gguf_text {
    const char *data;
    uint64_t length;
} gguf_text_t;

/** Row-major with the row's length first: a matrix of R rows and C columns has dims {C, R}. */
typedef struct gguf_tensor {
    gguf_text_t name;
    quant_type_t type;
    uint32_t n_dims;
    uint64_t dims[GGUF_DIMS_MAX]; /**< 1 beyond n_dims */
    uint64_t values;              /**< product of dims */
    const uint8_t *data;          /**< of quant_bytes(type, values) bytes */
} gguf_tensor_t;

/** NULL on failure. */
gguf_t *gguf_open(const char *path);

/** The same over bytes in memory, which stay the caller's and outlive the gguf_t. */
gguf_t *gguf_parse(const void *data, size_t size);

/** NULL is allowed. */
void gguf_close(gguf_t *gguf);

bool gguf_has(const gguf_t *gguf, const char *key);

/* Each fails with a sentence that names the key if it is missing, of another
 * type, or outside of its limits. Lists are allocated: free() them. */
bool gguf_get_uint(const gguf_t *gguf, const char *key, uint32_t min, uint32_t max,
                   uint32_t *value);
bool gguf_get_float(const gguf_t *gguf, const char *key, float *value);
bool gguf_get_text(const gguf_t *gguf, const char *key, gguf_text_t *text);
bool gguf_get_texts(const gguf_t *gguf, const char *key, gguf_text_t **texts, uint32_t *n);
bool gguf_get_ints(const gguf_t *gguf, const char *key, int32_t **ints, uint32_t *n);

/** NULL, without a sentence, if the file has no tensor of that name. */
const gguf_tensor_t *gguf_tensor(const gguf_t *gguf, const char *name);

static inline bool
gguf_text_is(gguf_text_t text, const char *string)
{
    uint64_t i = 0;
    while (i < text.length && string[i] != 0 && text.data[i] == string[i]) {
        i++;
    }
    return i == text.length && string[i] == 0;
}

#endif
