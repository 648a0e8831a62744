/* test_gguf.h: write small GGUF files in memory, for the tests. */
#ifndef RUNNER_TEST_GGUF_H
#define RUNNER_TEST_GGUF_H

#include <assert.h>
#include <stdint.h>
#include <string.h>

typedef struct builder {
    uint8_t bytes[1 << 16];
    size_t n;
} builder_t;

static inline void
put(builder_t *b, const void *from, size_t n)
{
    assert(n <= sizeof(b->bytes) - b->n);
    memcpy(b->bytes + b->n, from, n);
    b->n += n;
}

static inline void
put_u32(builder_t *b, uint32_t value)
{
    put(b, &value, sizeof(value));
}

static inline void
put_u64(builder_t *b, uint64_t value)
{
    put(b, &value, sizeof(value));
}

static inline void
put_text(builder_t *b, const char *text)
{
    put_u64(b, strlen(text));
    put(b, text, strlen(text));
}

static inline void
put_start(builder_t *b, uint64_t tensors, uint64_t keys)
{
    b->n = 0;
    put(b, "GGUF", 4);
    put_u32(b, 3);
    put_u64(b, tensors);
    put_u64(b, keys);
}

static inline void
put_key(builder_t *b, const char *key, uint32_t type)
{
    put_text(b, key);
    put_u32(b, type);
}

static inline void
put_key_u32(builder_t *b, const char *key, uint32_t value)
{
    put_key(b, key, 4);
    put_u32(b, value);
}

static inline void
put_key_float(builder_t *b, const char *key, float value)
{
    put_key(b, key, 6);
    put(b, &value, sizeof(value));
}

static inline void
put_key_text(builder_t *b, const char *key, const char *text)
{
    put_key(b, key, 8);
    put_text(b, text);
}

static inline void
put_key_list(builder_t *b, const char *key, uint32_t type, uint64_t n)
{
    put_key(b, key, 9);
    put_u32(b, type);
    put_u64(b, n);
}

/** Head of a matrix of rows x columns; a vector if rows is 0. */
static inline void
put_tensor(builder_t *b, const char *name, uint64_t columns, uint64_t rows, uint32_t type,
           uint64_t offset)
{
    put_text(b, name);
    put_u32(b, rows ? 2 : 1);
    put_u64(b, columns);
    if (rows) {
        put_u64(b, rows);
    }
    put_u32(b, type);
    put_u64(b, offset);
}

static inline void
put_padding(builder_t *b)
{
    while (b->n % 32 != 0) {
        put(b, "", 1);
    }
}

#endif
