/* actor_data.c: k, v without queries: written in steps, and read back. */
#include "tests/stress/actor.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define PIECE 350u
#define EXPORT_MS 4000u

/* ---- writing ---- */

static attn_status_t
write_part(actor_t *a, target_t *target, attn_seq_t seq, const part_t *part)
{
    attn_entry_t entry = {.seq = seq, .base = part->base, .n_new = part->n_new};
    attn_batch_t batch = {.size       = sizeof(batch),
                          .n          = 1,
                          .entries    = &entry,
                          .q_dtype    = a->geometry->kv_dtype,
                          .timeout_ms = a->stress->options.step_timeout_ms};
    target_step_t step;
    attn_status_t status = target_begin(target, &batch, true, &step);

    if (status != ATTN_OK) {
        return status;
    }
    for (uint32_t l = 0; l < a->geometry->layers && status == ATTN_OK; l++) {
        actor_write_rows(a, part, l, false, true);
        status =
            target_run(target, &step, &batch, &(target_run_t){.layer = l, .k = a->k, .v = a->v});
    }
    status = status == ATTN_OK ? target_commit(&step, NULL) : status;
    if (status != ATTN_OK) {
        target_abort(&step);
    }
    return status;
}

attn_status_t
actor_ingest(actor_t *a, target_t *target, shadow_t *s, uint64_t n, uint64_t content)
{
    attn_status_t status = ATTN_OK;

    while (n > 0 && status == ATTN_OK) {
        part_t part = {.base    = s->length,
                       .n_new   = (uint32_t)attn_min(n, chance_in(&a->chance, 1, PIECE)),
                       .content = content};
        status      = write_part(a, target, s->seq, &part);
        if (status == ATTN_OK) {
            shadow_append(s, part.base, content);
            s->length = s->maybe = part.base + part.n_new;
            n -= part.n_new;
        }
    }
    return status;
}

attn_status_t
actor_write(actor_t *a, target_t *target, attn_seq_t seq, const shadow_t *from, uint64_t first,
            uint64_t end)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i < from->n && first < end && status == ATTN_OK; i++) {
        uint64_t next = i + 1 < from->n ? from->segments[i + 1].first : UINT64_MAX;
        while (first < attn_min(next, end) && status == ATTN_OK) {
            uint64_t most = attn_min(attn_min(next, end) - first, PIECE);
            part_t part   = {.base    = first,
                             .n_new   = (uint32_t)chance_in(&a->chance, (most + 1) / 2, most),
                             .content = from->segments[i].content,
                             .shift   = from->segments[i].shift};
            status        = write_part(a, target, seq, &part);
            first += part.n_new;
        }
    }
    return status;
}

/* ---- reading ---- */

/* Is row after row what the shadow says? */
static bool
rows_are_right(actor_t *a, uint32_t s, const attn_export_t *what, row_kind_t kind,
               const uint8_t *data)
{
    const attn_geometry_t *g = a->geometry;
    uint32_t n               = g->kv_heads * (kind == ROW_K ? g->head_dim_k : g->head_dim_v);
    size_t size              = n * attn_dtype_size(g->kv_dtype);
    uint8_t row[TRUTH_ROW_MAX * sizeof(float)];

    for (uint32_t l = 0; l < what->n_layers; l++) {
        for (uint64_t i = 0; i < what->n; i++, data += size) {
            segment_t from = shadow_segment(&a->seqs[s], what->first + i);
            truth_write(kind, from.content, what->first + i + from.shift, what->first_layer + l, n,
                        g->kv_dtype, row);
            if (memcmp(row, data, size) != 0) {
                actor_fail(a, "WRONG EXPORT: sequence %llx, %s of token %llu, layer %u",
                           (unsigned long long)a->seqs[s].seq.id, kind == ROW_K ? "k" : "v",
                           (unsigned long long)(what->first + i), what->first_layer + l);
                return false;
            }
        }
    }
    return true;
}

void
actor_export(actor_t *a, uint32_t s)
{
    const attn_geometry_t *g = a->geometry;
    const shadow_t *shadow   = &a->seqs[s];
    attn_export_t what       = {.size       = sizeof(what),
                                .first      = chance_below(&a->chance, shadow->length),
                                .timeout_ms = EXPORT_MS};

    what.n           = chance_in(&a->chance, 1, shadow->length - what.first);
    what.first_layer = (uint32_t)chance_below(&a->chance, g->layers);
    what.n_layers    = (uint32_t)chance_in(&a->chance, 1, g->layers - what.first_layer);
    uint64_t rows    = what.n * what.n_layers * g->kv_heads * attn_dtype_size(g->kv_dtype);
    uint8_t *k = malloc(rows * g->head_dim_k), *v = malloc(rows * g->head_dim_v);
    if (k == NULL || v == NULL) {
        abort();
    }
    actor_call(a, "export", attn_now_ns() + EXPORT_MS * ATTN_NS_PER_MS);
    attn_status_t status =
        actor_called(a, target_export(&a->connection->target, shadow->seq, &what, k, v));
    actor_log(a, "export %llx, %llu tokens from %llu on, %u layers: %s",
              (unsigned long long)shadow->seq.id, (unsigned long long)what.n,
              (unsigned long long)what.first, what.n_layers, attn_strerror(status));
    if (status == ATTN_OK) {
        if (rows_are_right(a, s, &what, ROW_K, k) && rows_are_right(a, s, &what, ROW_V, v)) {
            atomic_fetch_add(&a->figures->exports, 1);
        }
    } else if (actor_accepts(a, "export", status) && status == ATTN_ERR_LOST) {
        actor_resolve(a, s);
    }
    free(k);
    free(v);
}
