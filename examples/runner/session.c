#include "session.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "failure.h"

static const char *
dtype_name(attn_dtype_t dtype)
{
    return dtype == ATTN_F32 ? "f32" : dtype == ATTN_F16 ? "f16" : "bf16";
}

/** Caches are joined by name, and only with an equal geometry: so the name tells the geometry. */
static attn_status_t
open_cache(session_t *s, const session_shape_t *shape, const llama_config_t *model)
{
    attn_geometry_t geometry;
    char name[128];

    attn_geometry_init(&geometry);
    geometry.layers     = model->layers;
    geometry.q_heads    = model->heads;
    geometry.kv_heads   = model->kv_heads;
    geometry.head_dim_k = model->head_dim;
    geometry.head_dim_v = model->head_dim;
    geometry.kv_dtype   = shape->kv_dtype;
    geometry.page_size  = shape->page;
    geometry.chunk_size = shape->chunk;
    geometry.placement  = shape->spread ? ATTN_PLACE_SPREAD : ATTN_PLACE_AUTO;
    snprintf(name, sizeof(name),
             "runner/%" PRIu32 "x%" PRIu32 "-%" PRIu32 "x%" PRIu32 "-%s-page%" PRIu32
             "-chunk%" PRIu32 "-%s",
             model->layers, model->heads, model->kv_heads, model->head_dim,
             dtype_name(shape->kv_dtype), shape->page, shape->chunk,
             shape->spread ? "spread" : "auto");
    return attn_cache_open(s->client, name, &geometry, &s->cache);
}

bool
session_open(session_t *s, const char *target, const session_shape_t *shape,
             const llama_config_t *model, uint64_t expected_tokens)
{
    attn_client_options_t options;
    attn_seq_options_t seq = {.size = sizeof(seq), .expected_tokens = expected_tokens};

    memset(s, 0, sizeof(*s));
    attn_client_options_init(&options);
    options.name = "runner";
    if (attn_client_open(target, &options, &s->client) == ATTN_OK &&
        open_cache(s, shape, model) == ATTN_OK &&
        attn_seq_create(s->cache, &seq, &s->seq) == ATTN_OK) {
        return true;
    }
    failure("%s: %s", target, attn_last_error());
    session_close(s);
    return false;
}

void
session_close(session_t *s)
{
    if (s->seq.id != 0) {
        attn_seq_free(s->cache, s->seq);
    }
    attn_cache_close(s->cache);
    attn_client_close(s->client);
    memset(s, 0, sizeof(*s));
}

bool
session_pass(session_t *s, forward_t *f, const uint32_t *ids, uint32_t n, meter_t *meter)
{
    attn_entry_t entry = {.seq = s->seq, .base = s->length, .n_q = n, .n_new = n};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32};
    attn_step_t *step;
    uint64_t start = now_ns();

    if (attn_step_begin(s->cache, &batch, &step) != ATTN_OK) {
        return failure("tokens %" PRIu64 " to %" PRIu64 ": %s", s->length, s->length + n - 1,
                       attn_last_error());
    }
    meter->edges_ns += now_ns() - start;
    if (!forward_tokens(f, step, ids, n, s->length, meter)) {
        attn_step_abort(step);
        return false;
    }
    start = now_ns();
    if (attn_step_commit(step, NULL) != ATTN_OK) {
        failure("tokens %" PRIu64 " to %" PRIu64 ": %s", s->length, s->length + n - 1,
                attn_last_error());
        attn_step_abort(step);
        return false;
    }
    meter->edges_ns += now_ns() - start;
    s->length += n;
    return true;
}
