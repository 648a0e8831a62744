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

/** What a step on a caller's stream has to say of itself, in the device's memory. */
typedef struct cuda_head {
    unsigned long long serial; /**< of the step; 0: none is open, and nothing is to be done */
    unsigned long long n_rows; /**< of k, v */
} cuda_head_t;

/** What kernels have to say of a layer of it. */
typedef struct cuda_mark {
    unsigned long long error;  /**< as cuda_args_t.error */
    unsigned long long stored; /**< serial of the step that stored its k, v */
    uint32_t trouble;          /**< CUDA_NOT_FINITE ... */
    uint32_t ended;            /**< CTAs of the kernel that stores which have ended */
} cuda_mark_t;

#define CUDA_NOT_FINITE 1u /* NaN or infinity in k or v */
#define CUDA_DIFFERS 2u    /* k, v of a layer that was stored are others now */
#define CUDA_NOT_STORED 4u /* asked about, without k, v */
#define CUDA_NOT_COME 8u   /* waited for, in vain (drive.h) */

/** Rows of K and V of a layer, from a caller's tensors to their pages. Elements have 16 bits. */
typedef struct cuda_bring {
    const cuda_head_t *head;
    cuda_mark_t *mark;
    const uint32_t *pages, *offsets; /**< [head->n_rows] */
    const uint8_t *k, *v;            /**< NULL: the layer is to be stored already */
    uint64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride; /**< bytes, of 16 n */
    uint8_t *k_store, *v_store;
    uint64_t k_page_stride, v_page_stride; /**< bytes */
    uint32_t page_size, kv_heads;
    uint32_t k_row_bytes, v_row_bytes; /**< of one head: a multiple of 128 */
    uint32_t exponent;                 /**< its bits in an element, twice */
} cuda_bring_t;

typedef struct cuda_split {
    const void *from;
    uint64_t from_row_stride, from_head_stride; /**< elements */
    void *to;
    uint32_t from_type, to_type; /**< attn_dtype_t */
    uint32_t heads, d, parts;
    uint64_t part_stride; /**< elements */
    float *scale;         /**< [rows][heads] */
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
