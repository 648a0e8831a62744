/*
 * gguf_get.c: look up what gguf_parse() found. Whatever is read here lies inside
 * of the file: that was checked there, and is not again.
 */
#include "gguf_int.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"

static const value_t *
find_value(const gguf_t *gguf, const char *key)
{
    for (uint64_t i = 0; i < gguf->n_values; i++) {
        if (gguf_text_is(gguf->values[i].key, key)) {
            return &gguf->values[i];
        }
    }
    return NULL;
}

bool
gguf_has(const gguf_t *gguf, const char *key)
{
    return find_value(gguf, key) != NULL;
}

static const value_t *
want_value(const gguf_t *gguf, const char *key, bool is_list, const char *kind)
{
    const value_t *value = find_value(gguf, key);

    if (!value) {
        failure("the file has no key '%s'", key);
    } else if (value->is_list != is_list) {
        failure("key '%s' is %s, not %s", key, value->is_list ? "a list" : "no list", kind);
        value = NULL;
    }
    return value;
}

/** Any integer type; false for others. A negative number becomes one above every limit. */
static bool
load_integer(const value_t *value, uint64_t *integer)
{
    union {
        uint64_t u64;
        int64_t i64;
        uint8_t u8;
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
    } u = {0};

    memcpy(&u, value->items, gguf_type_bytes[value->type]);
    switch (value->type) {
    case TYPE_U8:
        *integer = u.u8;
        return true;
    case TYPE_I8:
        *integer = (uint64_t)u.i8;
        return true;
    case TYPE_U16:
        *integer = u.u16;
        return true;
    case TYPE_I16:
        *integer = (uint64_t)u.i16;
        return true;
    case TYPE_U32:
        *integer = u.u32;
        return true;
    case TYPE_I32:
        *integer = (uint64_t)u.i32;
        return true;
    case TYPE_U64:
        *integer = u.u64;
        return true;
    case TYPE_I64:
        *integer = (uint64_t)u.i64;
        return true;
    default:
        return false;
    }
}

bool
gguf_get_uint(const gguf_t *gguf, const char *key, uint32_t min, uint32_t max, uint32_t *value)
{
    const value_t *found = want_value(gguf, key, false, "an integer");
    uint64_t integer;

    if (!found) {
        return false;
    }
    if (!load_integer(found, &integer)) {
        return failure("key '%s' is no integer", key);
    }
    if (integer < min || integer > max) {
        return failure("key '%s' is %" PRId64 "; %" PRIu32 " to %" PRIu32 " is allowed", key,
                       (int64_t)integer, min, max);
    }
    *value = (uint32_t)integer;
    return true;
}

bool
gguf_get_float(const gguf_t *gguf, const char *key, float *value)
{
    const value_t *found = want_value(gguf, key, false, "a float");

    if (!found) {
        return false;
    }
    if (found->type != TYPE_F32) {
        return failure("key '%s' is no 32-bit float", key);
    }
    memcpy(value, found->items, sizeof(*value));
    return true;
}

bool
gguf_get_text(const gguf_t *gguf, const char *key, gguf_text_t *text)
{
    const value_t *found = want_value(gguf, key, false, "a text");

    if (!found) {
        return false;
    }
    if (found->type != TYPE_TEXT) {
        return failure("key '%s' is no text", key);
    }
    memcpy(&text->length, found->items, sizeof(text->length));
    text->data = (const char *)found->items + sizeof(text->length);
    return true;
}

/** The list, if it has items of that type and a number of them that fits. */
static const value_t *
want_list(const gguf_t *gguf, const char *key, uint32_t type, const char *kind)
{
    const value_t *found = want_value(gguf, key, true, kind);

    if (found && (found->type != type || found->n > INT32_MAX)) {
        failure("key '%s' is not %s of at most 2^31 - 1 items", key, kind);
        found = NULL;
    }
    return found;
}

bool
gguf_get_texts(const gguf_t *gguf, const char *key, gguf_text_t **texts, uint32_t *n)
{
    const value_t *found = want_list(gguf, key, TYPE_TEXT, "a list of texts");

    if (!found) {
        return false;
    }
    gguf_text_t *list = calloc(found->n + 1, sizeof(*list));
    if (!list) {
        return failure("out of memory");
    }
    const uint8_t *at = found->items;
    for (uint64_t i = 0; i < found->n; i++) {
        memcpy(&list[i].length, at, sizeof(list[i].length));
        list[i].data = (const char *)at + sizeof(list[i].length);
        at += sizeof(list[i].length) + list[i].length;
    }
    *texts = list;
    *n     = (uint32_t)found->n;
    return true;
}

bool
gguf_get_ints(const gguf_t *gguf, const char *key, int32_t **ints, uint32_t *n)
{
    const value_t *found = want_list(gguf, key, TYPE_I32, "a list of 32-bit integers");

    if (!found) {
        return false;
    }
    int32_t *list = calloc(found->n + 1, sizeof(*list));
    if (!list) {
        return failure("out of memory");
    }
    memcpy(list, found->items, found->n * sizeof(*list));
    *ints = list;
    *n    = (uint32_t)found->n;
    return true;
}

const gguf_tensor_t *
gguf_tensor(const gguf_t *gguf, const char *name)
{
    for (uint64_t i = 0; i < gguf->n_tensors; i++) {
        if (gguf_text_is(gguf->tensors[i].name, name)) {
            return &gguf->tensors[i];
        }
    }
    return NULL;
}
