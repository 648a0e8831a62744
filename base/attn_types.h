/*
 * attn_types.h: the vocabulary that every layer and every caller shares:
 * statuses, dtypes, tensors, the layer table and the geometry of a cache.
 * Plain data; include <attn.h> instead when you write a runner.
 */
#ifndef ATTN_TYPES_H
#define ATTN_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ATTN_API __attribute__((visibility("default")))
#else
#define ATTN_API
#endif

/**
 * Outcome of a call. 0 is success; failures are negative and grouped by the
 * smallest thing that the caller has to do again. attn_last_error() tells the
 * same in a sentence with the ids of the objects. One table (base/status.c)
 * maps them to names and to gRPC codes; the exact value travels in the trailing
 * metadata `attn-status`.
 */
typedef enum attn_status {
    ATTN_OK = 0,

    /* The request: change the arguments, or wait, and call again. */
    ATTN_ERR_INVALID     = -1, /**< a wrong argument; the sentence names field and limit */
    ATTN_ERR_UNSUPPORTED = -2, /**< well formed, but no build or backend here offers it */
    ATTN_ERR_TOO_LARGE   = -3, /**< over a stated cap; the sentence names it */
    ATTN_ERR_EXHAUSTED   = -4, /**< pool, queue or quota full; nothing was changed: retry later */
    ATTN_ERR_DEADLINE    = -5, /**< the deadline passed; the work was given up */
    ATTN_ERR_CANCELLED   = -6, /**< cancelled by the caller, or the daemon is draining */
    ATTN_ERR_NO_MEMORY   = -7, /**< the process is out of memory; nothing was changed */

    /* The step: abort it, then begin it again. */
    ATTN_ERR_STALE      = -20, /**< the owner has another epoch, generation or length */
    ATTN_ERR_ABORTED    = -21, /**< the step was aborted (deadline, lost worker) */
    ATTN_ERR_CONFLICT   = -22, /**< k, v differ from those stored for this step and layer */
    ATTN_ERR_INCOMPLETE = -23, /**< a layer has no k, v; the sentence names layer and range */
    ATTN_ERR_BUSY       = -24, /**< another step is open on the sequence: end that one first */
    ATTN_ERR_NUMERIC    = -25, /**< a NaN, or a logit or sum out of range; names the worker */

    /* The object: it is not what the caller thinks. */
    ATTN_ERR_NOT_FOUND = -40, /**< no such cache, sequence or step (freed, ended, or never was) */
    ATTN_ERR_EXISTS    = -41, /**< the name is taken by a cache of another geometry */
    ATTN_ERR_LOST      = -42, /**< KV is gone with its worker; the sentence names the tokens */

    /* The connection or the service. */
    ATTN_ERR_UNAVAILABLE = -60, /**< no route to the daemon now: retry, it reconnects by itself */
    ATTN_ERR_DENIED      = -61, /**< not allowed: the coordinator did not introduce the caller */
    ATTN_ERR_INTERNAL    = -62, /**< a defect of attnd; the sentence says where */
    ATTN_ERR_CORRUPT     = -63, /**< KV changed on its way between workers, and was dropped: retry;
                                     the sentence names worker, chunk, layer and tokens */
} attn_status_t;

/** Element type of a tensor. The values are those of the wire. */
typedef enum attn_dtype {
    ATTN_DTYPE_NONE = 0,
    ATTN_F32        = 1,
    ATTN_F16        = 2, /**< IEEE binary16 */
    ATTN_BF16       = 3,
} attn_dtype_t;

/** Bytes of one element; 0 for a value that is no dtype. */
static inline size_t
attn_dtype_size(attn_dtype_t dtype)
{
    return dtype == ATTN_F32 ? 4 : (dtype == ATTN_F16 || dtype == ATTN_BF16) ? 2 : 0;
}

/** Whose memory a tensor lies in. */
typedef enum attn_memory {
    ATTN_MEMORY_AUTO = 0, /**< the library finds out; a driver call a tensor, where there is CUDA */
    ATTN_MEMORY_HOST = 1, /**< the host's; pinned memory is that, too; believed */
    ATTN_MEMORY_CUDA = 2, /**< a GPU's; looked at as AUTO is, and refused if it is none */
} attn_memory_t;

/**
 * A tensor [tokens][heads][head_dim]. The innermost dimension is contiguous. A
 * stride of 0 means "packed".
 */
typedef struct attn_tensor {
    void *data;
    attn_dtype_t dtype;
    attn_memory_t memory;
    uint64_t token_stride; /**< elements from one token to the next; 0: heads * head_dim */
    uint64_t head_stride;  /**< elements from one head to the next; 0: head_dim */
} attn_tensor_t;

/**
 * One row of the layer table: how the logits of this layer are made.
 *
 *   x = scale * (q . k)
 *   x = softcap * tanh(x / softcap)        if softcap > 0
 *   x = x + slopes[head] * (kv_pos - q_pos)  if slopes (ALiBi)
 *   x = -inf                               where masked
 *
 * A query at position p sees keys at positions <= p if causal, all keys of the
 * sequence if not, and in either case only positions > p - window if window > 0.
 * A sink adds exp(sinks[head]) to the softmax denominator and nothing to the sum.
 */
typedef struct attn_layer {
    float scale;     /**< 0: 1 / sqrt(head_dim_k) */
    float softcap;   /**< 0: none */
    uint64_t window; /**< positions seen, the query's own included; 0: all */
    bool causal;
    const float *slopes; /**< [q_heads], or NULL; not owned */
    const float *sinks;  /**< [q_heads], or NULL; not owned */
} attn_layer_t;

/** Where the chunks of a cache's sequences are put. The values are those of the wire. */
typedef enum attn_placement {
    ATTN_PLACE_AUTO   = 0, /**< whole up to the break-even length of the cost model, then spread */
    ATTN_PLACE_SPREAD = 1, /**< every chunk in turn on another worker */
    ATTN_PLACE_WHOLE  = 2, /**< all chunks of a sequence on one worker while it has room */
} attn_placement_t;

/** Shape of a cache. Fill with attn_geometry_init(), then set what you need. */
typedef struct attn_geometry {
    size_t size;           /**< sizeof(attn_geometry_t) of the caller's header */
    uint32_t layers;       /**< 1 to 1,024 */
    uint32_t q_heads;      /**< 1 to 1,024, a multiple of kv_heads */
    uint32_t kv_heads;     /**< 1 to 1,024 */
    uint32_t head_dim_k;   /**< of q and k: 32 to 256, a multiple of 8 */
    uint32_t head_dim_v;   /**< of v and o: 32 to 256, a multiple of 8 */
    attn_dtype_t kv_dtype; /**< of k and v, stored and sent */
    uint32_t page_size;    /**< tokens: 1 to 256; 0: 16 */
    uint32_t chunk_size;   /**< tokens: a power of two, 256 to 1,048,576; 0: the backend's default
                              (2,048 on CPUs) */
    attn_placement_t placement;
    /** layers rows (an array that attn_cache_open copies), or NULL: every
     * layer causal with the default scale and nothing else. */
    const attn_layer_t *layer_table;
    uint64_t region_bytes; /**< KV bytes to take on each worker; 0: a quarter of what the worker has
                              free */
} attn_geometry_t;

/** New tokens of a batch entry with a mask (attn_entry_t), at most. */
#define ATTN_MASK_TOKENS_MAX 1024u

/** A sequence: slot and generation in one number, so that a freed id is refused. 0 is none. */
typedef struct attn_seq {
    uint64_t id;
} attn_seq_t;

#ifdef __cplusplus
}
#endif

#endif
