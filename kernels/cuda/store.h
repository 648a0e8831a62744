/* store.h: arguments of the kernels of store.cu. Shared by C and CUDA. */
#ifndef ATTN_KERNELS_CUDA_STORE_H
#define ATTN_KERNELS_CUDA_STORE_H

#include <stdint.h>

/** Rows of K or of V, and the pages that they lie in. */
typedef struct cuda_rows {
    uint8_t *store;
    uint64_t page_stride; /**< bytes */
    uint32_t page_size, kv_heads;
    uint32_t row_bytes; /**< of one head: a multiple of 128 */
    uint64_t n;
    const uint32_t *pages, *offsets; /**< [n] */
#ifdef __CUDACC__
    uint4 *rows; /**< [n][kv_heads][row_bytes] */
#else
    void *rows;
#endif
    uint32_t *note;
} cuda_rows_t;

typedef struct cuda_split {
    const void *from;
    void *to;
    uint32_t from_type, to_type; /**< attn_dtype_t */
    uint32_t d, parts;
    uint64_t part_stride; /**< elements */
    float *scale;         /**< [rows] */
} cuda_split_t;

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ float
cuda_read(const void *from, uint32_t type, uint64_t i)
{
    return type == 1   ? ((const float *)from)[i]
           : type == 2 ? __half2float(((const __half *)from)[i])
                       : __bfloat162float(((const __nv_bfloat16 *)from)[i]);
}

/* Rounds towards zero, and returns what was written. */
__device__ __forceinline__ float
cuda_write(void *to, uint32_t type, uint64_t i, float v)
{
    if (type == 2) {
        __half h          = __float2half_rz(v);
        ((__half *)to)[i] = h;
        return __half2float(h);
    }
    __nv_bfloat16 b          = __float2bfloat16_rz(v);
    ((__nv_bfloat16 *)to)[i] = b;
    return __bfloat162float(b);
}
#endif

#endif
