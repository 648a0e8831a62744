/* ours.c: see ours.h. */
#include "bench/ours.h"

#include "bench/gpu_memory.h"
#include "bench/result.h"

#include <stdio.h>
#include <stdlib.h>

static void
fill(void *to, attn_dtype_t dtype, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        if (dtype == ATTN_F32) {
            ((float *)to)[i] = (float)(i % 17) / 16.0f;
        } else {
            ((uint16_t *)to)[i] = (uint16_t)(0x3f00 + i % 17); /* bf16, 0.5 to 0.56 */
        }
    }
}

void
ours_open(ours_t *ours, const char *target, const shape_t *shape, uint32_t layers,
          const attn_client_options_t *options, uint32_t chunk, attn_placement_t placement)
{
    attn_geometry_t geometry;
    uint64_t element = attn_dtype_size(shape->dtype);

    *ours          = (ours_t){.shape = *shape, .memory = ATTN_MEMORY_HOST};
    ours->q_bytes  = element * shape->rows * shape->q_heads * shape->dim;
    ours->kv_bytes = element * shape->rows * shape->kv_heads * shape->dim;
    ours->layers   = layers;
    ours->q        = malloc(ours->q_bytes);
    ours->k        = malloc(ours->kv_bytes);
    ours->v        = malloc(ours->kv_bytes);
    ours->o        = malloc(ours->q_bytes);
    fill(ours->q, shape->dtype, ours->q_bytes / element);
    fill(ours->k, shape->dtype, ours->kv_bytes / element);
    fill(ours->v, shape->dtype, ours->kv_bytes / element);

    attn_geometry_init(&geometry);
    geometry.layers     = layers;
    geometry.q_heads    = shape->q_heads;
    geometry.kv_heads   = shape->kv_heads;
    geometry.head_dim_k = geometry.head_dim_v = shape->dim;
    geometry.kv_dtype                         = shape->dtype;
    geometry.chunk_size                       = chunk;
    geometry.placement                        = placement;
    result_must(attn_client_open(target, options, &ours->client));
    result_must(attn_cache_open(ours->client, "bench", &geometry, &ours->cache));
    result_must(attn_seq_create(ours->cache, NULL, &ours->seq));
}

void
ours_close(ours_t *ours)
{
    attn_cache_close(ours->cache);
    attn_client_close(ours->client);
    void (*give)(void *) = ours->memory == ATTN_MEMORY_CUDA ? gpu_free : free;
    give(ours->q);
    give(ours->k);
    give(ours->v);
    give(ours->o);
}

static void
to_gpu(void **at, uint64_t bytes)
{
    void *there = gpu_alloc(bytes);

    gpu_put(there, *at, bytes);
    free(*at);
    *at = there;
}

void
ours_on_gpu(ours_t *ours)
{
    to_gpu(&ours->q, ours->q_bytes);
    to_gpu(&ours->k, ours->kv_bytes);
    to_gpu(&ours->v, ours->kv_bytes);
    to_gpu(&ours->o, ours->q_bytes);
    ours->memory = ATTN_MEMORY_CUDA;
}

static attn_status_t
begin(ours_t *ours, bool ask, attn_step_t **step_p)
{
    uint32_t rows      = ours->shape.rows;
    attn_entry_t entry = {
        .seq = ours->seq, .base = ours->length, .n_q = ask ? rows : 0, .n_new = rows};
    attn_batch_t batch = {.size    = sizeof(batch),
                          .n       = 1,
                          .entries = &entry,
                          .q_dtype = ours->shape.dtype,
                          .memory  = ours->memory};

    return attn_step_begin(ours->cache, &batch, step_p);
}

static attn_tensor_t
tensor(const ours_t *ours, void *at)
{
    return (attn_tensor_t){.data = at, .dtype = ours->shape.dtype, .memory = ours->memory};
}

attn_step_t *
ours_begin(ours_t *ours)
{
    attn_step_t *step;

    result_must(begin(ours, true, &step));
    return step;
}

bool
ours_try(ours_t *ours, char why[256])
{
    attn_tensor_t q = tensor(ours, ours->q), k = tensor(ours, ours->k), v = tensor(ours, ours->v),
                  o      = tensor(ours, ours->o);
    attn_step_t *step    = NULL;
    attn_status_t status = begin(ours, true, &step);

    status = status == ATTN_OK ? attn_step_run(step, 0, &q, &k, &v, &o, NULL) : status;
    if (status != ATTN_OK) {
        snprintf(why, 256, "%s", attn_last_error());
    }
    attn_step_abort(step);
    return status == ATTN_OK;
}

void
ours_append(ours_t *ours)
{
    attn_tensor_t k = tensor(ours, ours->k), v = tensor(ours, ours->v);
    attn_step_t *step;

    result_must(begin(ours, false, &step));
    for (uint32_t l = 0; l < ours->layers; l++) {
        result_must(attn_step_run(step, l, NULL, &k, &v, NULL, NULL));
    }
    ours_commit(ours, step);
}

uint64_t
ours_run(ours_t *ours, attn_step_t *step, uint32_t layer, direct_t *direct)
{
    if (direct != NULL) {
        struct iovec tensors[3] = {
            {ours->q, ours->q_bytes}, {ours->k, ours->kv_bytes}, {ours->v, ours->kv_bytes}};
        return direct_run(direct, step, layer, tensors, ours->o, ours->q_bytes);
    }
    attn_tensor_t q = tensor(ours, ours->q), k = tensor(ours, ours->k), v = tensor(ours, ours->v),
                  o = tensor(ours, ours->o);
    result_must(attn_step_run(step, layer, &q, &k, &v, &o, NULL));
    return attn_step_compute_ns(step);
}

void
ours_commit(ours_t *ours, attn_step_t *step)
{
    result_must(attn_step_commit(step, NULL));
    ours->length += ours->shape.rows;
}

void
ours_reshape(ours_t *ours, uint32_t rows)
{
    ours->q_bytes    = ours->q_bytes / ours->shape.rows * rows;
    ours->kv_bytes   = ours->kv_bytes / ours->shape.rows * rows;
    ours->shape.rows = rows;
}
