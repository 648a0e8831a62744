#include "gguf_int.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "failure.h"

/* A file that states more than this is garbage, whatever its size says. */
#define KEYS_MAX 65536
#define TENSORS_MAX 65536
#define NAME_MAX_ 65535 /* bytes of a key or of a tensor's name */
#define ALIGNMENT_MAX (1u << 20)

/* ---- reading forward, never past the end ---- */

typedef struct cursor {
    const uint8_t *data;
    uint64_t size, at; /* at <= size, always */
} cursor_t;

static const uint8_t *
take(cursor_t *c, uint64_t bytes, const char *what)
{
    const uint8_t *here = c->data + c->at;

    if (bytes > c->size - c->at) {
        failure("the file ends inside of %s: %" PRIu64 " bytes wanted at byte %" PRIu64
                ", but its size is %" PRIu64,
                what, bytes, c->at, c->size);
        return NULL;
    }
    c->at += bytes;
    return here;
}

static bool
take_u32(cursor_t *c, uint32_t *value, const char *what)
{
    const uint8_t *here = take(c, sizeof(*value), what);
    return here && memcpy(value, here, sizeof(*value));
}

static bool
take_u64(cursor_t *c, uint64_t *value, const char *what)
{
    const uint8_t *here = take(c, sizeof(*value), what);
    return here && memcpy(value, here, sizeof(*value));
}

static bool
take_text(cursor_t *c, gguf_text_t *text, const char *what)
{
    if (!take_u64(c, &text->length, what)) {
        return false;
    }
    text->data = (const char *)take(c, text->length, what);
    return text->data != NULL;
}

static bool
take_name(cursor_t *c, gguf_text_t *name, const char *what)
{
    if (!take_text(c, name, what)) {
        return false;
    }
    return name->length <= NAME_MAX_ ||
           failure("%s has %" PRIu64 " bytes; the limit is %d", what, name->length, NAME_MAX_);
}

/* ---- metadata ---- */

static bool
read_items(cursor_t *c, value_t *value)
{
    gguf_text_t ignored;
    uint64_t bytes;

    value->items = c->data + c->at;
    if (value->type != TYPE_TEXT) {
        return (!__builtin_mul_overflow(value->n, (uint64_t)gguf_type_bytes[value->type], &bytes) ||
                failure("a list of %" PRIu64 " items is longer than any file", value->n)) &&
               take(c, bytes, "a value") != NULL;
    }
    for (uint64_t i = 0; i < value->n; i++) {
        if (!take_text(c, &ignored, "a text value")) {
            return false;
        }
    }
    return true;
}

static bool
read_value(cursor_t *c, value_t *value)
{
    if (!take_name(c, &value->key, "a key") || !take_u32(c, &value->type, "a value's type")) {
        return false;
    }
    value->is_list = value->type == TYPE_LIST;
    value->n       = 1;
    if (value->is_list && (!take_u32(c, &value->type, "a list's type") ||
                           !take_u64(c, &value->n, "a list's length"))) {
        return false;
    }
    if (value->type >= TYPES || value->type == TYPE_LIST) {
        return failure("key '%.*s' has type %" PRIu32 "%s, which this reader does not know",
                       (int)value->key.length, value->key.data, value->type,
                       value->is_list ? " inside of a list" : "");
    }
    return read_items(c, value);
}

/* ---- tensors ---- */

static bool
read_shape(cursor_t *c, gguf_tensor_t *tensor)
{
    if (!take_u32(c, &tensor->n_dims, "a tensor's dimensions")) {
        return false;
    }
    if (tensor->n_dims < 1 || tensor->n_dims > GGUF_DIMS_MAX) {
        return failure("tensor '%.*s' has %" PRIu32 " dimensions; 1 to %d are allowed",
                       (int)tensor->name.length, tensor->name.data, tensor->n_dims, GGUF_DIMS_MAX);
    }
    tensor->values = 1;
    for (uint32_t i = 0; i < GGUF_DIMS_MAX; i++) {
        tensor->dims[i] = 1;
        if (i < tensor->n_dims && !take_u64(c, &tensor->dims[i], "a tensor's dimensions")) {
            return false;
        }
        if (tensor->dims[i] == 0 ||
            __builtin_mul_overflow(tensor->values, tensor->dims[i], &tensor->values)) {
            return failure("dimension %" PRIu32 " of tensor '%.*s' is %" PRIu64
                           ", which no tensor can have",
                           i, (int)tensor->name.length, tensor->name.data, tensor->dims[i]);
        }
    }
    return true;
}

/** Leaves the offset in *offset: where data begin is known only behind the last tensor's head. */
static bool
read_tensor(cursor_t *c, gguf_tensor_t *tensor, uint64_t *offset)
{
    uint32_t type;
    uint64_t bytes;

    if (!take_name(c, &tensor->name, "a tensor's name") || !read_shape(c, tensor) ||
        !take_u32(c, &type, "a tensor's type") || !take_u64(c, offset, "a tensor's offset")) {
        return false;
    }
    if (!quant_name(type)) {
        return failure("tensor '%.*s' has type %" PRIu32
                       "; this reader knows F32, F16, Q4_1 and Q8_0",
                       (int)tensor->name.length, tensor->name.data, type);
    }
    if (!quant_bytes(type, tensor->dims[0], &bytes)) {
        return failure("a row of tensor '%.*s' has %" PRIu64 " values, not whole blocks of %s",
                       (int)tensor->name.length, tensor->name.data, tensor->dims[0],
                       quant_name(type));
    }
    tensor->type = (quant_type_t)type;
    return true;
}

static bool
place_tensor(const cursor_t *c, gguf_tensor_t *tensor, uint64_t data_at, uint64_t alignment,
             uint64_t offset)
{
    uint64_t bytes, start, end;

    if (offset % alignment != 0 || !quant_bytes(tensor->type, tensor->values, &bytes) ||
        __builtin_add_overflow(data_at, offset, &start) ||
        __builtin_add_overflow(start, bytes, &end) || end > c->size) {
        return failure("tensor '%.*s' lies at offset %" PRIu64
                       ", which is not a multiple of %" PRIu64 " or ends behind the file's %" PRIu64
                       " bytes",
                       (int)tensor->name.length, tensor->name.data, offset, alignment, c->size);
    }
    tensor->data = c->data + start;
    return true;
}

static bool
read_tensors(gguf_t *gguf, cursor_t *c)
{
    uint32_t alignment = 32;
    uint64_t *offsets  = calloc(gguf->n_tensors + 1, sizeof(*offsets));
    bool ok            = offsets != NULL || failure("out of memory");

    for (uint64_t i = 0; ok && i < gguf->n_tensors; i++) {
        ok = read_tensor(c, &gguf->tensors[i], &offsets[i]);
    }
    if (ok && gguf_has(gguf, "general.alignment")) {
        ok = gguf_get_uint(gguf, "general.alignment", 8, ALIGNMENT_MAX, &alignment) &&
             ((alignment & (alignment - 1)) == 0 ||
              failure("general.alignment is %" PRIu32 ", which is not a power of two", alignment));
    }
    uint64_t data_at = (c->at + alignment - 1) / alignment * alignment;
    for (uint64_t i = 0; ok && i < gguf->n_tensors; i++) {
        ok = place_tensor(c, &gguf->tensors[i], data_at, alignment, offsets[i]);
    }
    free(offsets);
    return ok;
}

/* ---- the file ---- */

static bool
read_file(gguf_t *gguf)
{
    cursor_t c           = {.data = gguf->data, .size = gguf->size};
    const uint8_t *magic = take(&c, 4, "the magic bytes");
    uint32_t version;

    if (!magic || memcmp(magic, "GGUF", 4) != 0) {
        return magic ? failure("the file does not begin with 'GGUF'") : false;
    }
    if (!take_u32(&c, &version, "the version") ||
        !take_u64(&c, &gguf->n_tensors, "the number of tensors") ||
        !take_u64(&c, &gguf->n_values, "the number of keys")) {
        return false;
    }
    if (version != 2 && version != 3) {
        return failure("GGUF version %" PRIu32 "; this reader knows 2 and 3", version);
    }
    if (gguf->n_tensors > TENSORS_MAX || gguf->n_values > KEYS_MAX) {
        return failure("%" PRIu64 " tensors and %" PRIu64 " keys; the limits are %d and %d",
                       gguf->n_tensors, gguf->n_values, TENSORS_MAX, KEYS_MAX);
    }
    gguf->values  = calloc(gguf->n_values + 1, sizeof(*gguf->values));
    gguf->tensors = calloc(gguf->n_tensors + 1, sizeof(*gguf->tensors));
    if (!gguf->values || !gguf->tensors) {
        return failure("out of memory");
    }
    for (uint64_t i = 0; i < gguf->n_values; i++) {
        if (!read_value(&c, &gguf->values[i])) {
            return false;
        }
    }
    return read_tensors(gguf, &c);
}

gguf_t *
gguf_parse(const void *data, size_t size)
{
    gguf_t *gguf = calloc(1, sizeof(*gguf));

    if (!gguf) {
        failure("out of memory");
        return NULL;
    }
    gguf->data = data;
    gguf->size = size;
    if (!read_file(gguf)) {
        gguf_close(gguf);
        return NULL;
    }
    return gguf;
}

static void *
map_file(const char *path, size_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    void *mapping = MAP_FAILED;

    if (fd < 0 || fstat(fd, &info) != 0) {
        failure("%s: %s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode) || info.st_size == 0) {
        failure("%s is empty or no regular file", path);
    } else {
        *size   = (size_t)info.st_size;
        mapping = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (mapping == MAP_FAILED) {
            failure("%s: %s", path, strerror(errno));
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    return mapping;
}

gguf_t *
gguf_open(const char *path)
{
    size_t size   = 0;
    void *mapping = map_file(path, &size);

    if (mapping == MAP_FAILED) {
        return NULL;
    }
    gguf_t *gguf = gguf_parse(mapping, size);
    if (!gguf) {
        failure("%s: %s", path, failure_text());
        munmap(mapping, size);
        return NULL;
    }
    gguf->mapping = mapping;
    return gguf;
}

void
gguf_close(gguf_t *gguf)
{
    if (!gguf) {
        return;
    }
    if (gguf->mapping) {
        munmap(gguf->mapping, gguf->size);
    }
    free(gguf->values);
    free(gguf->tensors);
    free(gguf);
}
