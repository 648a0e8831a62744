/* gguf_int.h: what gguf.c, which checks a file, and gguf_get.c, which looks things up, share. */
#ifndef RUNNER_GGUF_INT_H
#define RUNNER_GGUF_INT_H

#include "gguf.h"

enum { /* types of a value, as the file numbers them */
       TYPE_U8,
       TYPE_I8,
       TYPE_U16,
       TYPE_I16,
       TYPE_U32,
       TYPE_I32,
       TYPE_F32,
       TYPE_BOOL,
       TYPE_TEXT,
       TYPE_LIST,
       TYPE_U64,
       TYPE_I64,
       TYPE_F64,
       TYPES
};

/** Bytes of one item; 0 for texts and lists, whose size the file tells. */
static const uint8_t gguf_type_bytes[TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* A scalar or a text is a list of one. */
typedef struct value {
    gguf_text_t key;
    uint32_t type; /* of an item */
    bool is_list;
    uint64_t n;
    const uint8_t *items; /* texts lie with their lengths before them */
} value_t;

struct gguf {
    const uint8_t *data;
    uint64_t size;
    void *mapping; /* NULL if the bytes are the caller's */
    value_t *values;
    gguf_tensor_t *tensors;
    uint64_t n_values, n_tensors;
};

#endif
