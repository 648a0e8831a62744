/*
 * message.c: a message as it came from the wire.
 *
 *     | head: all fields but data | 0x7a | size (varint) | data ... |
 *     |-- slice --|------ slice ------|---- slice ----|-- slice --|
 *
 * C core hands a message over as slices, up to a hundred for a large one. Going through
 * the top-level tags, which costs a tenth of a microsecond, finds where data lies; only
 * the head goes through protobuf-c, which would copy data once more.
 *
 * protobuf-c has no limit of nesting. It needs none here: it descends only where the
 * schema names a message, and ours name none inside itself; a field that the schema does
 * not know is skipped by its length however its bytes are nested, and groups, which
 * would need a descent to be skipped, are refused by the scan.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define DATA_FIELD 15

#define ARENA_PER_BYTE 32 /* of head: a field of two bytes costs protobuf-c about 60 */
#define ARENA_BASE (64u << 10)
#define ARENA_MAX (64u << 20)
#define ARENA_FIRST 1024 /* inside the message: most heads need no more */

typedef struct block {
    struct block *next;
} block_t;

struct rpc_message {
    grpc_byte_buffer *buffer;
    const grpc_slice_buffer *slices;
    uint64_t *starts; /* of each slice, if there are several */
    uint64_t data_offset, data_size;
    ProtobufCMessage *head;

    /* The arena. */
    block_t *blocks;
    uint8_t *next, *end;
    size_t used, budget, block_size;
    bool over_budget, no_memory;
    _Alignas(16) uint8_t first[ARENA_FIRST];
};

/* ---- arena ---- */

static void *
arena_alloc(void *arg, size_t size)
{
    rpc_message_t *m = arg;

    if (size > m->budget - m->used) {
        m->over_budget = true;
        return NULL;
    }
    size_t rounded = (size + 15) & ~(size_t)15;
    if (rounded > (size_t)(m->end - m->next)) {
        size_t bytes   = rounded > m->block_size ? rounded : m->block_size;
        block_t *block = malloc(16 + bytes);
        if (block == NULL) {
            m->no_memory = true;
            return NULL;
        }
        block->next = m->blocks;
        m->blocks   = block;
        m->next     = (uint8_t *)block + 16;
        m->end      = m->next + bytes;
        m->block_size *= m->block_size < (1u << 20) ? 2 : 1;
    }
    void *p = m->next;
    m->next += rounded;
    m->used += attn_min(rounded, m->budget - m->used);
    return p;
}

static void
arena_free(void *arg, void *p)
{
    (void)arg; /* all goes at once, with the message */
    (void)p;
}

static void
arena_reset(rpc_message_t *m, uint64_t head_bytes)
{
    while (m->blocks != NULL) {
        block_t *block = m->blocks;
        m->blocks      = block->next;
        free(block);
    }
    m->next        = m->first;
    m->end         = m->first + ARENA_FIRST;
    m->used        = 0;
    m->budget      = attn_min(head_bytes * ARENA_PER_BYTE + ARENA_BASE, ARENA_MAX);
    m->block_size  = 8192;
    m->over_budget = m->no_memory = false;
}

/* ---- reading over slices ---- */

typedef struct cursor {
    const grpc_slice_buffer *slices;
    size_t slice; /* the next one to enter */
    const uint8_t *p, *end;
    uint64_t left; /* bytes up to the message's end */
} cursor_t;

static cursor_t
cursor_make(const grpc_slice_buffer *slices)
{
    return (cursor_t){.slices = slices, .left = slices->length};
}

/* Make at least one byte readable at p; call only with bytes left. */
static void
cursor_fill(cursor_t *c)
{
    while (c->p == c->end) {
        assert(c->slice < c->slices->count);
        const grpc_slice *slice = &c->slices->slices[c->slice++];
        c->p                    = GRPC_SLICE_START_PTR(*slice);
        c->end                  = GRPC_SLICE_END_PTR(*slice);
    }
}

/* Pass n bytes, copying them if `to` is given; n is at most what is left. */
static void
cursor_pass(cursor_t *c, uint64_t n, uint8_t *to)
{
    assert(n <= c->left);
    c->left -= n;
    while (n > 0) {
        cursor_fill(c);
        size_t piece = (size_t)attn_min(n, (uint64_t)(c->end - c->p));
        if (to != NULL) {
            memcpy(to, c->p, piece);
            to += piece;
        }
        c->p += piece;
        n -= piece;
    }
}

static bool
cursor_varint(cursor_t *c, unsigned bytes_max, uint64_t *value)
{
    uint64_t v = 0;

    for (unsigned i = 0; i < bytes_max && c->left > 0; i++) {
        cursor_fill(c);
        uint8_t byte = *c->p++;
        c->left--;
        v |= (uint64_t)(byte & 0x7f) << (7 * i); /* the tenth byte's high bits fall off */
        if (byte < 0x80) {
            *value = v;
            return true;
        }
    }
    return false;
}

/* ---- the scan ---- */

typedef struct scan {
    uint64_t head_bytes;
    uint64_t data_tag, data_offset, data_size; /* of the last data field */
    uint32_t n_data;
} scan_t;

/* Read one field's tag and go to its end; *body is the size behind tag and length. */
static attn_status_t
pass_field(cursor_t *c, uint64_t total, uint32_t *field, uint32_t *wire, uint64_t *body)
{
    uint64_t at = total - c->left;
    uint64_t tag, value;

    if (!cursor_varint(c, 5, &tag) || tag > UINT32_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "message: the tag at byte %llu is cut off or too long",
                         (unsigned long long)at);
    }
    *field = (uint32_t)tag >> 3;
    *wire  = (uint32_t)tag & 7;
    *body  = 0;
    if (*field == 0) {
        return attn_fail(ATTN_ERR_INVALID, "message: field number 0 at byte %llu",
                         (unsigned long long)at);
    }
    switch (*wire) {
    case 0:
        if (!cursor_varint(c, 10, &value)) {
            return attn_fail(ATTN_ERR_INVALID, "message: the number in field %u is cut off",
                             *field);
        }
        return ATTN_OK;
    case 1:
        *body = 8;
        break;
    case 5:
        *body = 4;
        break;
    case 2:
        if (!cursor_varint(c, 5, body)) { /* as many bytes as protobuf-c takes for a length */
            return attn_fail(ATTN_ERR_INVALID,
                             "message: the length of field %u is cut off or too long", *field);
        }
        break;
    default:
        return attn_fail(ATTN_ERR_INVALID, "message: field %u has wire type %u, not 0, 1, 2 or 5",
                         *field, *wire);
    }
    if (*body > c->left) {
        return attn_fail(ATTN_ERR_INVALID,
                         "message: field %u is to have %llu bytes, but %llu are left", *field,
                         (unsigned long long)*body, (unsigned long long)c->left);
    }
    cursor_pass(c, *body, NULL);
    return ATTN_OK;
}

/* Go through all fields. With `head`, a space of head_bytes, copy all but data there. */
static attn_status_t
scan_fields(const rpc_message_t *m, bool has_data, uint8_t *head, scan_t *scan)
{
    cursor_t c     = cursor_make(m->slices);
    cursor_t copy  = c;
    uint64_t total = c.left;

    *scan = (scan_t){0};
    while (c.left > 0) {
        uint64_t start = total - c.left;
        uint32_t field = 0, wire = 0;
        uint64_t body        = 0;
        attn_status_t status = pass_field(&c, total, &field, &wire, &body);
        if (status != ATTN_OK) {
            return status;
        }
        uint64_t size = total - c.left - start;
        bool data     = has_data && field == DATA_FIELD;
        if (data && wire != 2) {
            return attn_fail(ATTN_ERR_INVALID, "message: field data has wire type %u, not 2", wire);
        }
        if (head != NULL) {
            cursor_pass(&copy, size, data ? NULL : head + scan->head_bytes);
        }
        if (data) {
            scan->n_data++;
            scan->data_tag    = start;
            scan->data_size   = body;
            scan->data_offset = start + size - body;
        } else {
            scan->head_bytes += size;
        }
    }
    return ATTN_OK;
}

/* ---- the interface ---- */

rpc_message_t *
rpc_message_new(grpc_byte_buffer *buffer)
{
    rpc_message_t *m = gpr_malloc(sizeof(*m));

    memset(m, 0, offsetof(rpc_message_t, first));
    assert(buffer->type == GRPC_BB_RAW);
    m->buffer = buffer;
    m->slices = &buffer->data.raw.slice_buffer;
    if (m->slices->count > 1) {
        uint64_t start = 0;
        m->starts      = gpr_malloc(m->slices->count * sizeof(*m->starts));
        for (size_t i = 0; i < m->slices->count; i++) {
            m->starts[i] = start;
            start += GRPC_SLICE_LENGTH(m->slices->slices[i]);
        }
    }
    return m;
}

/* protobuf-c's view of the head, which lies in one piece at `bytes`. */
static attn_status_t
unpack_head(rpc_message_t *m, const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
            size_t n)
{
    ProtobufCAllocator arena = {.alloc = arena_alloc, .free = arena_free, .allocator_data = m};

    m->head = protobuf_c_message_unpack(type, &arena, n, bytes);
    if (m->head != NULL) {
        return ATTN_OK;
    }
    if (m->no_memory) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to unpack %s", type->name);
    }
    if (m->over_budget) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "%s: unpacking %zu bytes takes more than %zu of memory", type->name, n,
                         m->budget);
    }
    return attn_fail(ATTN_ERR_INVALID, "these %zu bytes are no %s", n, type->name);
}

attn_status_t
rpc_message_unpack(rpc_message_t *m, const ProtobufCMessageDescriptor *type,
                   ProtobufCMessage **head_p)
{
    const ProtobufCFieldDescriptor *field =
        protobuf_c_message_descriptor_get_field(type, DATA_FIELD);
    bool has_data = field != NULL && field->type == PROTOBUF_C_TYPE_BYTES;
    scan_t scan;

    attn_status_t status = scan_fields(m, has_data, NULL, &scan);
    if (status != ATTN_OK) {
        return attn_fail_in(status, "%s: ", type->name);
    }
    arena_reset(m, scan.head_bytes);
    m->data_offset = scan.data_offset;
    m->data_size   = scan.data_size;

    /* The usual case: the head comes first, and within the first slice. */
    bool first = scan.n_data == 0 || (scan.n_data == 1 && scan.data_tag == scan.head_bytes);
    if (scan.head_bytes == 0) {
        status = unpack_head(m, type, (const uint8_t *)"", 0);
    } else if (first && GRPC_SLICE_LENGTH(m->slices->slices[0]) >= scan.head_bytes) {
        status = unpack_head(m, type, GRPC_SLICE_START_PTR(m->slices->slices[0]), scan.head_bytes);
    } else {
        uint8_t *head = malloc(scan.head_bytes);
        if (head == NULL) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the %llu bytes of a %s",
                             (unsigned long long)scan.head_bytes, type->name);
        }
        status = scan_fields(m, has_data, head, &scan);
        assert(status == ATTN_OK);
        status = unpack_head(m, type, head, scan.head_bytes);
        free(head); /* protobuf-c keeps no pointer into its input */
    }
    if (status == ATTN_OK) {
        *head_p = m->head;
    }
    return status;
}

uint64_t
rpc_message_data_size(const rpc_message_t *m)
{
    return m->data_size;
}

/* The last slice that starts at or before `at`. */
static size_t
slice_at(const rpc_message_t *m, uint64_t at)
{
    size_t low = 0, high = m->slices->count;

    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (m->starts[middle] <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

void
rpc_message_data_copy(const rpc_message_t *m, uint64_t offset, void *to, uint64_t size)
{
    assert(offset <= m->data_size && size <= m->data_size - offset);
    if (size == 0) {
        return;
    }
    uint64_t at   = m->data_offset + offset;
    size_t slice  = slice_at(m, at);
    uint64_t skip = at - (m->starts == NULL ? 0 : m->starts[slice]);
    uint8_t *out  = to;

    for (; size > 0; slice++, skip = 0) {
        const uint8_t *p = GRPC_SLICE_START_PTR(m->slices->slices[slice]) + skip;
        uint64_t n       = attn_min(size, GRPC_SLICE_LENGTH(m->slices->slices[slice]) - skip);
        size -= n;
        out = rpc_copy(out, p, n);
    }
}

void
rpc_message_free(rpc_message_t *m)
{
    if (m == NULL) {
        return;
    }
    arena_reset(m, 0);
    grpc_byte_buffer_destroy(m->buffer);
    gpr_free(m->starts);
    gpr_free(m);
}
