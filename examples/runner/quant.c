#include "quant.h"

#include <assert.h>
#include <stddef.h>
#include <string.h>

#include "half.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF is read as it lies: little-endian");

#define BLOCK 32 /* values of a quantised block */

static const struct format {
    const char *name;
    uint32_t values, bytes; /* of one block */
    quant_type_t type;
} formats[] = {
    {"F32", 1, 4, QUANT_F32},
    {"F16", 1, 2, QUANT_F16},
    {"Q4_1", BLOCK, 20, QUANT_Q4_1},
    {"Q8_0", BLOCK, 34, QUANT_Q8_0},
};

static const struct format *
find_format(uint32_t type)
{
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if ((uint32_t)formats[i].type == type) {
            return &formats[i];
        }
    }
    return NULL;
}

const char *
quant_name(uint32_t type)
{
    const struct format *format = find_format(type);
    return format ? format->name : NULL;
}

bool
quant_bytes(uint32_t type, uint64_t values, uint64_t *bytes)
{
    const struct format *format = find_format(type);

    if (!format || values % format->values != 0) {
        return false;
    }
    return !__builtin_mul_overflow(values / format->values, (uint64_t)format->bytes, bytes);
}

static float
load_f16(const uint8_t *from)
{
    uint16_t h;
    memcpy(&h, from, sizeof(h));
    return f16_to_float(h);
}

static void
q4_1_to_float(const uint8_t *from, uint64_t blocks, float *to)
{
    for (uint64_t b = 0; b < blocks; b++, from += 20, to += BLOCK) {
        float d = load_f16(from), m = load_f16(from + 2);
        for (int j = 0; j < BLOCK / 2; j++) {
            to[j]             = d * (float)(from[4 + j] & 15) + m;
            to[j + BLOCK / 2] = d * (float)(from[4 + j] >> 4) + m;
        }
    }
}

static void
q8_0_to_float(const uint8_t *from, uint64_t blocks, float *to)
{
    for (uint64_t b = 0; b < blocks; b++, from += 34, to += BLOCK) {
        float d = load_f16(from);
        for (int j = 0; j < BLOCK; j++) {
            to[j] = d * (float)(int8_t)from[2 + j];
        }
    }
}

void
quant_to_float(quant_type_t type, const void *from, uint64_t values, float *to)
{
    switch (type) {
    case QUANT_F32:
        memcpy(to, from, values * sizeof(float));
        return;
    case QUANT_F16:
        for (uint64_t i = 0; i < values; i++) {
            to[i] = load_f16((const uint8_t *)from + 2 * i);
        }
        return;
    case QUANT_Q4_1:
        assert(values % BLOCK == 0);
        q4_1_to_float(from, values / BLOCK, to);
        return;
    case QUANT_Q8_0:
        assert(values % BLOCK == 0);
        q8_0_to_float(from, values / BLOCK, to);
        return;
    }
    assert(!"a type that quant_bytes() refuses");
}
