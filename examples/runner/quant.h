/*
 * quant.h: the number formats of a GGUF tensor that this runner reads, and how
 * to make floats of them. A quantised row is a run of blocks of 32 values:
 *
 *   Q4_1  f16 d, f16 m, 16 bytes: byte j holds value j in its low four bits and
 *         value j + 16 in its high four; a value is d * q + m
 *   Q8_0  f16 d, 32 signed bytes; a value is d * q
 */
#ifndef RUNNER_QUANT_H
#define RUNNER_QUANT_H

#include <stdbool.h>
#include <stdint.h>

/** The numbers are those of the file. */
typedef enum quant_type {
    QUANT_F32  = 0,
    QUANT_F16  = 1,
    QUANT_Q4_1 = 3,
    QUANT_Q8_0 = 8,
} quant_type_t;

/** "Q4_1"; NULL for a number that is none of the four. */
const char *quant_name(uint32_t type);

/** Bytes of `values` values. False: unknown type, not a whole number of blocks, or an overflow. */
bool quant_bytes(uint32_t type, uint64_t values, uint64_t *bytes);

/** Write `values` floats; `values` passed quant_bytes(), and `from` need not be aligned. */
void quant_to_float(quant_type_t type, const void *from, uint64_t values, float *to);

#endif
