/*
 * wire_test.c: structs to messages and back, and messages that no honest peer sends. What is
 * decoded went over the wire in between: packed and unpacked by protobuf-c. Enums pass through
 * as they are: who uses a dtype or a placement refuses the unknown ones, which is shown here.
 */
#include "client/wire.h"

#include "balancer/geometry.h"
#include "base/clock.h"
#include "base/status.h"
#include "engine/engine_int.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NOW UINT64_C(1000000000)

/* ---- allocations that fail (the linker sends wire.c's calloc here) ---- */

static long fail_in = -1; /* the allocation that fails, counted down; below 0: none */

void *__real_calloc(size_t n, size_t item);
void *__wrap_calloc(size_t n, size_t item);

void *
__wrap_calloc(size_t n, size_t item)
{
    return fail_in >= 0 && fail_in-- == 0 ? NULL : __real_calloc(n, item);
}

/* ---- what is sent ---- */

static const float slopes[] = {0.5f, 0.25f, 0.125f, 0.0625f};
static const float sinks[]  = {-1.0f, 0.0f, 1.0f, 2.5f};

static const attn_layer_t rows[] = {
    {.scale   = 0.25f,
     .softcap = 30.0f,
     .window  = 4096,
     .causal  = true,
     .slopes  = slopes,
     .sinks   = sinks},
    {.window = UINT64_MAX, .slopes = slopes},
    {.causal = true, .sinks = sinks},
};

static const attn_geometry_t geometry = {
    .size         = sizeof(geometry),
    .layers       = 3,
    .q_heads      = 4,
    .kv_heads     = 2,
    .head_dim_k   = 64,
    .head_dim_v   = 32,
    .kv_dtype     = ATTN_BF16,
    .page_size    = 16,
    .chunk_size   = 2048,
    .placement    = ATTN_PLACE_WHOLE,
    .layer_table  = rows,
    .region_bytes = UINT64_C(5) << 32,
};

static const kv_step_chunk_t chunks[] = {
    {.chunk = 7, .generation = 3, .length = 2048, .number = 0},
    {.chunk = UINT64_MAX, .generation = 1, .length = 5, .n_new = 9, .number = UINT32_MAX},
};
static const attn_node_t nodes[] = {{.level = 0, .index = 1}, {.level = 32, .index = 0}};
static const uint32_t indptr[]   = {0, 3, 3, 4};
static const uint32_t pages[]    = {0, 5, UINT32_MAX, 1};

static const engine_entry_t worker_entries[] = {
    {.seq           = UINT64_MAX,
     .base          = UINT64_C(1) << 40,
     .n_q           = 1,
     .n_new         = 9,
     .n_chunks      = 2,
     .chunks        = chunks,
     .n_nodes       = 2,
     .nodes         = nodes,
     .n_lists       = 3,
     .sparse_indptr = indptr,
     .sparse_pages  = pages},
    {.seq = 2},
};

static const engine_batch_t worker_batch = {.epoch       = 4,
                                            .cache       = 5,
                                            .step_id     = UINT64_MAX,
                                            .n           = 2,
                                            .entries     = worker_entries,
                                            .q_dtype     = ATTN_F16,
                                            .o_dtype     = ATTN_F32,
                                            .want_lse    = true,
                                            .deadline_ns = NOW + 1500 * ATTN_NS_PER_MS};

/* Pack a message and unpack what was packed: what a peer would see. */
#define RESEND(type, message, got)                                                                 \
    do {                                                                                           \
        uint8_t *bytes_ = malloc(attn__v1__##type##__get_packed_size(message) + 1);                \
        size_t n_       = attn__v1__##type##__pack(message, bytes_);                               \
        (got)           = attn__v1__##type##__unpack(NULL, n_, bytes_);                            \
        free(bytes_);                                                                              \
        assert_non_null(got);                                                                      \
    } while (0)

/* ---- geometry ---- */

static void
check_row(const attn_layer_t *row, const attn_layer_t *sent)
{
    assert_true(row->scale == sent->scale && row->softcap == sent->softcap);
    assert_true(row->window == sent->window && row->causal == sent->causal);
    assert_int_equal(row->slopes != NULL, sent->slopes != NULL);
    assert_int_equal(row->sinks != NULL, sent->sinks != NULL);
    if (row->slopes != NULL) {
        assert_memory_equal(row->slopes, sent->slopes, sizeof(slopes));
    }
    if (row->sinks != NULL) {
        assert_memory_equal(row->sinks, sent->sinks, sizeof(sinks));
    }
}

static void
geometry_round_trip(const attn_geometry_t *sent)
{
    wire_block_t out = {0}, in = {0};
    Attn__V1__Geometry *message, *got;
    attn_geometry_t g;

    assert_int_equal(wire_geometry_encode(&out, sent, &message), ATTN_OK);
    RESEND(geometry, message, got);
    assert_int_equal(wire_geometry_decode(&in, got, &g), ATTN_OK);
    assert_int_equal(g.size, sizeof(g));
    assert_int_equal(g.layers, sent->layers);
    assert_int_equal(g.q_heads, sent->q_heads);
    assert_int_equal(g.kv_heads, sent->kv_heads);
    assert_int_equal(g.head_dim_k, sent->head_dim_k);
    assert_int_equal(g.head_dim_v, sent->head_dim_v);
    assert_int_equal(g.kv_dtype, sent->kv_dtype);
    assert_int_equal(g.page_size, sent->page_size);
    assert_int_equal(g.chunk_size, sent->chunk_size);
    assert_int_equal(g.placement, sent->placement);
    assert_int_equal(g.region_bytes, sent->region_bytes);
    assert_int_equal(g.layer_table != NULL, sent->layer_table != NULL);
    for (uint32_t l = 0; g.layer_table != NULL && l < g.layers; l++) {
        check_row(&g.layer_table[l], &sent->layer_table[l]);
    }
    attn__v1__geometry__free_unpacked(got, NULL);
    wire_free(&in);
    wire_free(&out);
}

static void
test_geometry_round_trip(void **state)
{
    attn_geometry_t plain = geometry, none = {.size = sizeof(none)};

    (void)state;
    geometry_round_trip(&geometry);
    plain.layer_table = NULL;
    geometry_round_trip(&plain);
    geometry_round_trip(&none);
}

/* A geometry as a message of `n_rows` rows whose last row has n_slopes and n_sinks values. */
static attn_status_t
decode_counts(uint32_t layers, size_t n_rows, size_t n_slopes, size_t n_sinks)
{
    wire_block_t block = {0};
    float values[8]    = {0};
    Attn__V1__Layer items[4], *list[4];
    Attn__V1__Geometry message = ATTN__V1__GEOMETRY__INIT;
    attn_geometry_t g;

    for (size_t i = 0; i < n_rows; i++) {
        attn__v1__layer__init(&items[i]);
        list[i] = &items[i];
    }
    if (n_rows > 0) {
        items[n_rows - 1].slopes   = values;
        items[n_rows - 1].n_slopes = n_slopes;
        items[n_rows - 1].sinks    = values;
        items[n_rows - 1].n_sinks  = n_sinks;
    }
    message.layers        = layers;
    message.q_heads       = 4;
    message.layer_table   = list;
    message.n_layer_table = n_rows;
    attn_status_t status  = wire_geometry_decode(&block, &message, &g);
    wire_free(&block);
    return status;
}

static void
test_wrong_counts_in_a_geometry_are_refused(void **state)
{
    wire_block_t block = {0};
    attn_geometry_t g;

    (void)state;
    assert_int_equal(wire_geometry_decode(&block, NULL, &g), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "geometry"));
    assert_int_equal(decode_counts(2, 2, 4, 4), ATTN_OK);
    assert_int_equal(decode_counts(2, 2, 0, 0), ATTN_OK);
    assert_int_equal(decode_counts(2, 0, 0, 0), ATTN_OK);
    assert_int_equal(decode_counts(2, 1, 0, 0), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "layer_table"));
    assert_int_equal(decode_counts(2, 3, 0, 0), ATTN_ERR_INVALID);
    assert_int_equal(decode_counts(0, 1, 0, 0), ATTN_ERR_INVALID);
    assert_int_equal(decode_counts(UINT32_MAX, 1, 0, 0), ATTN_ERR_INVALID);
    assert_int_equal(decode_counts(2, 2, 3, 0), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "layer_table[1]"));
    assert_non_null(strstr(attn_last_error(), "slopes"));
    assert_int_equal(decode_counts(2, 2, 0, 5), ATTN_ERR_INVALID);
    assert_int_equal(decode_counts(2, 2, 4, 1), ATTN_ERR_INVALID);
}

static void
test_unknown_enums_are_refused_by_who_uses_them(void **state)
{
    wire_block_t block         = {0};
    Attn__V1__Geometry message = ATTN__V1__GEOMETRY__INIT;
    attn_geometry_t g, complete;
    void *table;

    (void)state;
    message.layers = message.q_heads = message.kv_heads = 1;
    message.head_dim_k = message.head_dim_v = 32;
    message.kv_dtype                        = (Attn__V1__DType)77;
    message.placement                       = ATTN__V1__PLACEMENT__PLACEMENT_AUTO;
    assert_int_equal(wire_geometry_decode(&block, &message, &g), ATTN_OK);
    assert_int_equal(g.kv_dtype, 77);
    assert_int_equal(geometry_copy(&g, &complete, &table), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "kv_dtype"));
    message.kv_dtype  = ATTN__V1__DTYPE__DTYPE_F32;
    message.placement = (Attn__V1__Placement)-1;
    assert_int_equal(wire_geometry_decode(&block, &message, &g), ATTN_OK);
    assert_int_equal(geometry_copy(&g, &complete, &table), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "placement"));
    wire_free(&block);

    engine_cache_t cache = {.geometry = geometry};
    engine_batch_t batch = worker_batch;
    batch.q_dtype        = (attn_dtype_t)77;
    assert_int_equal(engine_step_check(&cache, &batch), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "q_dtype"));
}

/* ---- a worker's begin ---- */

static void
check_worker_entry(const engine_entry_t *e, const engine_entry_t *sent)
{
    assert_int_equal(e->seq, sent->seq);
    assert_int_equal(e->base, sent->base);
    assert_int_equal(e->n_q, sent->n_q);
    assert_int_equal(e->n_new, sent->n_new);
    assert_int_equal(e->n_chunks, sent->n_chunks);
    assert_int_equal(e->n_nodes, sent->n_nodes);
    assert_int_equal(e->n_lists, sent->n_lists);
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        assert_memory_equal(&e->chunks[c], &sent->chunks[c], sizeof(e->chunks[c]));
    }
    for (uint32_t k = 0; k < e->n_nodes; k++) {
        assert_memory_equal(&e->nodes[k], &sent->nodes[k], sizeof(e->nodes[k]));
    }
    if (e->n_lists > 0) {
        assert_memory_equal(e->sparse_indptr, sent->sparse_indptr,
                            (e->n_lists + 1) * sizeof(uint32_t));
        assert_memory_equal(e->sparse_pages, sent->sparse_pages,
                            e->sparse_indptr[e->n_lists] * sizeof(uint32_t));
    }
}

static void
test_worker_begin_round_trip(void **state)
{
    wire_block_t out = {0}, in = {0};
    Attn__V1__WorkerBeginRequest *message, *got;
    engine_batch_t batch;

    (void)state;
    assert_int_equal(wire_worker_begin_encode(&out, &worker_batch, NOW, &message), ATTN_OK);
    RESEND(worker_begin_request, message, got);
    assert_int_equal(wire_worker_begin_decode(&in, got, NOW + 7, &batch), ATTN_OK);
    assert_int_equal(batch.epoch, 4);
    assert_int_equal(batch.cache, 5);
    assert_int_equal(batch.step_id, UINT64_MAX);
    assert_int_equal(batch.q_dtype, ATTN_F16);
    assert_int_equal(batch.o_dtype, ATTN_F32);
    assert_true(batch.want_lse);
    assert_int_equal(batch.deadline_ns, NOW + 7 + 1500 * ATTN_NS_PER_MS);
    assert_int_equal(batch.n, 2);
    for (uint32_t i = 0; i < batch.n; i++) {
        check_worker_entry(&batch.entries[i], &worker_entries[i]);
    }
    assert_int_equal(engine_batch_fingerprint(&batch), engine_batch_fingerprint(&worker_batch));
    attn__v1__worker_begin_request__free_unpacked(got, NULL);
    wire_free(&in);
    wire_free(&out);
}

/* Two entries, the second of which two of the ranks have nothing of. */
static engine_batch_t
grouped_batch(attn_group_entry_t entries[2])
{
    static const attn_node_t some[] = {{26, 3}, {0, 9}, {32, 0}};
    engine_batch_t batch            = worker_batch;

    memset(entries, 0, 2 * sizeof(*entries));
    entries[0].n_q = 5, entries[1].n_q = 1;
    entries[0].n_nodes[0] = 2, entries[0].nodes[0] = some;
    entries[0].n_nodes[2] = 1, entries[0].nodes[2] = some + 2;
    entries[1].n_nodes[1] = 1, entries[1].nodes[1] = some + 1;
    batch.group = UINT64_MAX - 1, batch.n_grouped = 2, batch.grouped = entries;
    return batch;
}

static void
test_a_group_round_trip(void **state)
{
    wire_block_t out = {0}, in = {0};
    Attn__V1__WorkerBeginRequest *message, *got;
    attn_group_entry_t entries[2];
    engine_batch_t sent = grouped_batch(entries), batch;

    (void)state;
    assert_int_equal(wire_worker_begin_encode(&out, &sent, NOW, &message), ATTN_OK);
    RESEND(worker_begin_request, message, got);
    assert_int_equal(wire_worker_begin_decode(&in, got, NOW, &batch), ATTN_OK);
    assert_true(batch.group == UINT64_MAX - 1 && batch.n_grouped == 2);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(batch.grouped[i].n_q, entries[i].n_q);
        for (uint32_t r = 0; r < ATTN_RANKS_MAX; r++) {
            assert_int_equal(batch.grouped[i].n_nodes[r], entries[i].n_nodes[r]);
            for (uint32_t k = 0; k < entries[i].n_nodes[r]; k++) {
                assert_memory_equal(&batch.grouped[i].nodes[r][k], &entries[i].nodes[r][k],
                                    sizeof(attn_node_t));
            }
        }
    }
    /* What others have of an entry is of the batch, too: a repeated begin is not to name others. */
    uint64_t as_sent = engine_batch_fingerprint(&sent);
    assert_int_equal(engine_batch_fingerprint(&batch), as_sent);
    assert_int_not_equal(as_sent, engine_batch_fingerprint(&worker_batch));
    entries[1].n_q++;
    assert_int_not_equal(engine_batch_fingerprint(&sent), as_sent);
    entries[1].n_q--;
    entries[1].n_nodes[1]--;
    assert_int_not_equal(engine_batch_fingerprint(&sent), as_sent);
    entries[1].n_nodes[1]++;
    sent.n_grouped--;
    assert_int_not_equal(engine_batch_fingerprint(&sent), as_sent);

    got->grouped[1]->n_q = 0;
    assert_int_equal(wire_worker_begin_decode(&in, got, NOW, &batch), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "grouped[1]"));
    attn__v1__worker_begin_request__free_unpacked(got, NULL);
    wire_free(&in);
    wire_free(&out);
}

static uint32_t
encoded_timeout(uint64_t deadline_ns)
{
    wire_block_t block = {0};
    Attn__V1__WorkerBeginRequest *message;
    engine_batch_t batch = {.deadline_ns = deadline_ns};

    assert_int_equal(wire_worker_begin_encode(&block, &batch, NOW, &message), ATTN_OK);
    uint32_t timeout = message->timeout_ms;
    wire_free(&block);
    return timeout;
}

static void
test_timeouts_of_a_worker_begin(void **state)
{
    wire_block_t block                   = {0};
    Attn__V1__WorkerBeginRequest message = ATTN__V1__WORKER_BEGIN_REQUEST__INIT;
    engine_batch_t batch;

    (void)state;
    assert_int_equal(encoded_timeout(0), 1); /* 0 would mean the default */
    assert_int_equal(encoded_timeout(NOW), 1);
    assert_int_equal(encoded_timeout(NOW + 2 * ATTN_NS_PER_MS), 2);
    assert_int_equal(encoded_timeout(UINT64_MAX), ENGINE_TIMEOUT_MS_MAX);

    /* No entries: well formed here, and the engine's to refuse. NONE as o_dtype: as q. */
    message.q_dtype = ATTN__V1__DTYPE__DTYPE_BF16;
    assert_int_equal(wire_worker_begin_decode(&block, &message, NOW, &batch), ATTN_OK);
    assert_int_equal(batch.n, 0);
    assert_int_equal(batch.o_dtype, ATTN_BF16);
    assert_int_equal(batch.deadline_ns, NOW + 60000 * ATTN_NS_PER_MS);
    message.timeout_ms = ENGINE_TIMEOUT_MS_MAX;
    assert_int_equal(wire_worker_begin_decode(&block, &message, NOW, &batch), ATTN_OK);
    message.timeout_ms++;
    assert_int_equal(wire_worker_begin_decode(&block, &message, NOW, &batch), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "timeout_ms"));
    wire_free(&block);
}

/* ---- a thin client's begin ---- */

/* The batch, with a mask and room for lists besides, comes through as it is. */
static void
expect_begin_again(const attn_batch_t *batch)
{
    Attn__V1__BeginStepRequest message = ATTN__V1__BEGIN_STEP_REQUEST__INIT, *got;
    wire_block_t block                 = {0};
    uint8_t mask[]                     = {1, 3, 2};
    attn_entry_t sent[]                = {batch->entries[0], batch->entries[1]};
    attn_batch_t there, here = *batch;

    sent[0].list_room = 9, sent[1].mask = mask;
    here.entries = sent;
    assert_int_equal(wire_begin_encode(&block, &here, &message), ATTN_OK);
    RESEND(begin_step_request, &message, got);
    assert_int_equal(wire_begin_decode(&block, got, &there), ATTN_OK);
    assert_true(there.n == 2 && there.q_dtype == batch->q_dtype && there.want_lse &&
                there.o_dtype == batch->o_dtype && there.timeout_ms == batch->timeout_ms);
    const attn_entry_t *a = &there.entries[0], *e = &there.entries[1];
    assert_true(a->list_room == 9 && a->mask == NULL && a->n_lists == 0 && e->list_room == 0);
    assert_true(e->seq.id == 8 && e->base == 77 && e->n_q == 3 && e->n_new == 2 && e->n_lists == 3);
    assert_memory_equal(e->sparse_indptr, sent[1].sparse_indptr, 4 * sizeof(uint32_t));
    assert_memory_equal(e->sparse_pages, sent[1].sparse_pages, 4 * sizeof(uint32_t));
    assert_memory_equal(e->mask, mask, sizeof(mask));
    attn__v1__begin_step_request__free_unpacked(got, NULL);
    wire_free(&block);
}

static void
test_begin_is_decoded(void **state)
{
    wire_block_t block = {0};
    uint32_t first[] = {1, 2, 9}, last[] = {4};
    Attn__V1__PageList lists[]         = {ATTN__V1__PAGE_LIST__INIT, ATTN__V1__PAGE_LIST__INIT,
                                          ATTN__V1__PAGE_LIST__INIT};
    Attn__V1__PageList *list_p[]       = {&lists[0], &lists[1], &lists[2]};
    Attn__V1__BatchEntry items[]       = {ATTN__V1__BATCH_ENTRY__INIT, ATTN__V1__BATCH_ENTRY__INIT};
    Attn__V1__BatchEntry *entries[]    = {&items[0], &items[1]};
    Attn__V1__BeginStepRequest message = ATTN__V1__BEGIN_STEP_REQUEST__INIT, *got;
    attn_batch_t batch;

    (void)state;
    lists[0].pages = first, lists[0].n_pages = 3;
    lists[2].pages = last, lists[2].n_pages = 1;
    items[1]        = (Attn__V1__BatchEntry){.base          = items[1].base,
                                             .seq           = 8,
                                             .base_position = 77,
                                             .n_q           = 3,
                                             .n_new         = 2,
                                             .n_sparse      = 3,
                                             .sparse        = list_p};
    message.entries = entries, message.n_entries = 2;
    message.q_dtype = ATTN__V1__DTYPE__DTYPE_F16, message.o_dtype = ATTN__V1__DTYPE__DTYPE_BF16;
    message.timeout_ms = 5, message.want_lse = true;
    RESEND(begin_step_request, &message, got);
    assert_int_equal(wire_begin_decode(&block, got, &batch), ATTN_OK);
    attn__v1__begin_step_request__free_unpacked(got, NULL); /* what was decoded is a copy */

    assert_int_equal(batch.size, sizeof(batch));
    assert_int_equal(batch.n, 2);
    assert_int_equal(batch.q_dtype, ATTN_F16);
    assert_int_equal(batch.o_dtype, ATTN_BF16);
    assert_true(batch.want_lse);
    assert_int_equal(batch.timeout_ms, 5);
    assert_int_equal(batch.entries[0].n_lists, 0);
    const attn_entry_t *e = &batch.entries[1];
    assert_true(e->seq.id == 8 && e->base == 77 && e->n_q == 3 && e->n_new == 2 && e->n_lists == 3);
    static const uint32_t want_indptr[] = {0, 3, 3, 4}, want_pages[] = {1, 2, 9, 4};
    assert_memory_equal(e->sparse_indptr, want_indptr, sizeof(want_indptr));
    assert_memory_equal(e->sparse_pages, want_pages, sizeof(want_pages));

    expect_begin_again(&batch);

    message.timeout_ms = ENGINE_TIMEOUT_MS_MAX + 1;
    assert_int_equal(wire_begin_decode(&block, &message, &batch), ATTN_ERR_INVALID);
    message = (Attn__V1__BeginStepRequest)ATTN__V1__BEGIN_STEP_REQUEST__INIT;
    assert_int_equal(wire_begin_decode(&block, &message, &batch), ATTN_OK);
    assert_int_equal(batch.n, 0);
    assert_int_equal(batch.o_dtype, ATTN_DTYPE_NONE); /* libattn makes q's of it */
    wire_free(&block);
}

/* ---- layouts and workers ---- */

static void
test_layout_round_trip(void **state)
{
    attn_chunk_info_t infos[] = {
        {.chunk = 3, .first = 0, .length = 2048, .generation = 9, .worker = 2},
        {.chunk = UINT64_MAX, .first = 2048, .worker = UINT32_MAX, .lost = true},
    };
    attn_seq_info_t sent             = {.n_chunks = 2, .chunks = infos}, info;
    wire_block_t block               = {0};
    Attn__V1__SequenceLayout message = ATTN__V1__SEQUENCE_LAYOUT__INIT, *got;

    (void)state;
    assert_int_equal(wire_chunks_encode(&block, &sent, &message.chunks), ATTN_OK);
    message.n_chunks = sent.n_chunks;
    RESEND(sequence_layout, &message, got);
    assert_int_equal(wire_layout_decode(got, &info), ATTN_OK);
    attn__v1__sequence_layout__free_unpacked(got, NULL);
    assert_int_equal(info.n_chunks, 2);
    for (int c = 0; c < 2; c++) {
        assert_int_equal(info.chunks[c].chunk, infos[c].chunk);
        assert_int_equal(info.chunks[c].first, infos[c].first);
        assert_int_equal(info.chunks[c].length, infos[c].length);
        assert_int_equal(info.chunks[c].generation, infos[c].generation);
        assert_int_equal(info.chunks[c].worker, infos[c].worker);
        assert_int_equal(info.chunks[c].lost, infos[c].lost);
    }
    free(info.chunks);
    wire_free(&block);

    Attn__V1__SequenceLayout empty = ATTN__V1__SEQUENCE_LAYOUT__INIT;
    assert_int_equal(wire_layout_decode(&empty, &info), ATTN_OK);
    assert_int_equal(info.n_chunks, 0);
    free(info.chunks);
}

static void
test_figures_and_long_texts_of_a_worker(void **state)
{
    char address[200], kind[64], device[200];
    Attn__V1__WorkerInfo message = ATTN__V1__WORKER_INFO__INIT;
    attn_worker_info_t info;

    (void)state;
    memset(address, 'a', sizeof(address) - 1);
    address[sizeof(address) - 1] = 0;
    memset(kind, 'k', 63);
    kind[63] = 0;
    memset(device, 'd', sizeof(device) - 1);
    device[sizeof(device) - 1] = 0;
    message.id                 = 3;
    message.alive              = true;
    message.address            = address;
    message.kind               = kind;
    message.slab_bytes = 1, message.region_bytes = 2, message.used_bytes = 3,
    message.chunks     = UINT64_MAX;
    message.open_steps = 5, message.runs = 6, message.kv_bytes = 7;
    message.device       = device;
    message.device_bytes = 8, message.device_free_bytes = 9;
    message.kv_bytes_per_s = 10, message.read_bandwidth = 11;
    message.ucx = true, message.ucx_clients = 12, message.ucx_runs = 13;
    message.gpu_clients = 14, message.gpu_runs = 15, message.groups = 17;
    double few[] = {1e9, 2e9}, many[] = {3e9, 4e9, 5e9, 6e9}; /* too few, and too many */
    message.few_flops = few, message.n_few_flops = 2;
    message.many_flops = many, message.n_many_flops = 4;
    message.attend_seconds = 14, message.hop_seconds = 15, message.link_bandwidth = 16;
    message.ucx_ways   = "shm tcp";
    message.group_host = address, message.group_device = "0000:01:00.0";
    wire_worker_decode(&message, &info);
    assert_true(strlen(info.group_host) == 95);
    assert_string_equal(info.group_device, "0000:01:00.0");
    assert_int_equal(info.id, 3);
    assert_true(info.alive && info.chunks == UINT64_MAX);
    assert_true(info.slab_bytes == 1 && info.region_bytes == 2 && info.used_bytes == 3);
    assert_true(info.open_steps == 5 && info.runs == 6 && info.kv_bytes == 7);
    assert_true(info.device_bytes == 8 && info.device_free_bytes == 9);
    assert_true(info.kv_bytes_per_s == 10 && info.read_bandwidth == 11);
    assert_true(info.ucx && info.ucx_clients == 12 && info.ucx_runs == 13);
    assert_true(info.gpu_clients == 14 && info.gpu_runs == 15 && info.groups == 17);
    assert_true(info.attend_seconds == 14 && info.hop_seconds == 15 && info.link_bandwidth == 16);
    assert_true(info.few_flops[ATTN_F32] == 1e9 && info.few_flops[ATTN_F16] == 2e9);
    assert_true(info.few_flops[ATTN_BF16] == 0 && info.few_flops[ATTN_DTYPE_NONE] == 0);
    assert_true(info.many_flops[ATTN_F32] == 3e9 && info.many_flops[ATTN_BF16] == 5e9);
    assert_string_equal(info.ucx_ways, "shm tcp");
    assert_int_equal(strlen(info.device), 95); /* cut to what there is room for */
    assert_int_equal(strlen(info.address), 63);
    assert_string_equal(info.kind, kind);
}

/* ---- no memory ---- */

/* Each call again with the first, second, ... allocation failing, until it works. */
#define SWEEP(block, call)                                                                         \
    do {                                                                                           \
        attn_status_t status_ = ATTN_ERR_NO_MEMORY;                                                \
        long nth_             = 0;                                                                 \
        for (; status_ == ATTN_ERR_NO_MEMORY; nth_++) {                                            \
            fail_in = nth_;                                                                        \
            status_ = (call);                                                                      \
            assert_true((status_ == ATTN_OK) == (fail_in >= 0));                                   \
            fail_in = -1;                                                                          \
            wire_free(block);                                                                      \
        }                                                                                          \
        assert_int_equal(status_, ATTN_OK);                                                        \
        assert_true(nth_ > 1); /* some allocation did fail */                                      \
    } while (0)

static void
test_out_of_memory_is_told(void **state)
{
    wire_block_t kept = {0}, block = {0};
    Attn__V1__Geometry *g_message, *g_other;
    Attn__V1__WorkerBeginRequest *w_message, *w_other;
    Attn__V1__ChunkInfo **chunk_list;
    Attn__V1__SequenceLayout layout = ATTN__V1__SEQUENCE_LAYOUT__INIT;
    attn_chunk_info_t chunk         = {.chunk = 1};
    attn_seq_info_t info = {.n_chunks = 1, .chunks = &chunk}, decoded = {0};
    attn_geometry_t g;
    engine_batch_t batch;

    (void)state;
    assert_int_equal(wire_geometry_encode(&kept, &geometry, &g_message), ATTN_OK);
    assert_int_equal(wire_worker_begin_encode(&kept, &worker_batch, NOW, &w_message), ATTN_OK);
    assert_int_equal(wire_chunks_encode(&kept, &info, &layout.chunks), ATTN_OK);
    layout.n_chunks = 1;
    SWEEP(&block, wire_geometry_encode(&block, &geometry, &g_other));
    SWEEP(&block, wire_geometry_decode(&block, g_message, &g));
    SWEEP(&block, wire_worker_begin_encode(&block, &worker_batch, NOW, &w_other));
    SWEEP(&block, wire_worker_begin_decode(&block, w_message, NOW, &batch));
    attn_group_entry_t grouped[2];
    engine_batch_t with_group = grouped_batch(grouped);
    assert_int_equal(wire_worker_begin_encode(&kept, &with_group, NOW, &w_message), ATTN_OK);
    SWEEP(&block, wire_worker_begin_encode(&block, &with_group, NOW, &w_other));
    SWEEP(&block, wire_worker_begin_decode(&block, w_message, NOW, &batch));
    SWEEP(&block, wire_chunks_encode(&block, &info, &chunk_list));
    SWEEP(&block, wire_layout_decode(&layout, &decoded));
    free(decoded.chunks);
    wire_free(&kept);
}

static void
test_sizes_that_overflow_are_refused(void **state)
{
    wire_block_t block = {0};

    (void)state;
    assert_null(wire_alloc(&block, UINT64_MAX, 2));
    assert_null(wire_alloc(&block, UINT64_MAX / 2 + 1, 2));
    assert_null(wire_alloc(&block, UINT64_MAX, 1));
    assert_null(block.pieces);
    uint64_t *zeroed = wire_alloc(&block, 3, sizeof(*zeroed));
    assert_true(zeroed[0] == 0 && zeroed[2] == 0 && (uintptr_t)zeroed % 16 == 0);
    assert_non_null(wire_alloc(&block, 0, 8)); /* an empty list is no failure */
    wire_free(&block);
    assert_null(block.pieces);
}

/* ---- anything at all ---- */

static uint64_t random_state = 1;

static uint32_t
pick(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 33) % n;
}

/* Decode bytes as each message that has a decoder; everything decoded is read through once. */
static int
decode_all(const uint8_t *bytes, size_t n)
{
    wire_block_t block              = {0};
    Attn__V1__Geometry *g           = attn__v1__geometry__unpack(NULL, n, bytes);
    Attn__V1__WorkerBeginRequest *w = attn__v1__worker_begin_request__unpack(NULL, n, bytes);
    Attn__V1__BeginStepRequest *b   = attn__v1__begin_step_request__unpack(NULL, n, bytes);
    Attn__V1__SequenceLayout *l     = attn__v1__sequence_layout__unpack(NULL, n, bytes);
    attn_geometry_t geometry_out, complete;
    engine_batch_t worker_out;
    attn_batch_t batch_out;
    attn_seq_info_t info;
    engine_cache_t cache = {.geometry = geometry};
    void *table;
    int decoded = 0;

    if (g != NULL && wire_geometry_decode(&block, g, &geometry_out) == ATTN_OK) {
        decoded++;
        if (geometry_copy(&geometry_out, &complete, &table) == ATTN_OK) {
            free(table);
        }
    }
    if (w != NULL && wire_worker_begin_decode(&block, w, NOW, &worker_out) == ATTN_OK) {
        decoded++;
        if (engine_step_check(&cache, &worker_out) == ATTN_OK) {
            (void)engine_batch_fingerprint(&worker_out);
        }
    }
    decoded += b != NULL && wire_begin_decode(&block, b, &batch_out) == ATTN_OK;
    if (l != NULL && wire_layout_decode(l, &info) == ATTN_OK) {
        decoded++;
        free(info.chunks);
    }
    attn__v1__geometry__free_unpacked(g, NULL);
    attn__v1__worker_begin_request__free_unpacked(w, NULL);
    attn__v1__begin_step_request__free_unpacked(b, NULL);
    attn__v1__sequence_layout__free_unpacked(l, NULL);
    wire_free(&block);
    return decoded;
}

static void
mutate(uint8_t *bytes, size_t n)
{
    for (uint32_t i = 0, changes = 1 + pick(4); i < changes; i++) {
        bytes[pick((uint32_t)n)] = pick(2) ? (uint8_t)pick(256) : (uint8_t)pick(20);
    }
}

static void
test_random_bytes_decode_or_are_refused(void **state)
{
    wire_block_t block = {0};
    Attn__V1__Geometry *g_message;
    Attn__V1__WorkerBeginRequest *w_message;
    uint8_t seeds[2][512], bytes[512];
    size_t size[2];
    uint64_t decoded = 0, refused = 0;

    (void)state;
    assert_int_equal(wire_geometry_encode(&block, &geometry, &g_message), ATTN_OK);
    assert_int_equal(wire_worker_begin_encode(&block, &worker_batch, NOW, &w_message), ATTN_OK);
    assert_true(attn__v1__geometry__get_packed_size(g_message) <= sizeof(bytes));
    assert_true(attn__v1__worker_begin_request__get_packed_size(w_message) <= sizeof(bytes));
    size[0] = attn__v1__geometry__pack(g_message, seeds[0]);
    size[1] = attn__v1__worker_begin_request__pack(w_message, seeds[1]);
    for (int i = 0; i < 100000; i++) {
        size_t n;
        if (i % 4 == 3) { /* noise; else a message with some bytes changed, perhaps cut */
            n = pick(64);
            for (size_t j = 0; j < n; j++) {
                bytes[j] = (uint8_t)pick(256);
            }
        } else {
            n = size[i % 2];
            memcpy(bytes, seeds[i % 2], n);
            mutate(bytes, n);
            n = pick(4) == 0 ? pick((uint32_t)n) : n;
        }
        int taken = decode_all(bytes, n);
        decoded += taken > 0;
        refused += taken == 0;
    }
    assert_true(decoded > 1000 && refused > 1000); /* both ways were gone */
    wire_free(&block);
}

/* ---- tickets ---- */

/* What follows a ticket is no memory: a byte beyond its end is a signal. */
static void
test_a_ticket_is_a_short_line_of_ascii(void **state)
{
    size_t page  = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static const struct {
        const char *ticket;
        attn_status_t status;
    } cases[] = {
        {"", ATTN_OK},
        {"1.c.1.1.~ !", ATTN_OK},
        {"\n", ATTN_ERR_INTERNAL},
        {"1.c\r\n", ATTN_ERR_INTERNAL},
        {"\x7f", ATTN_ERR_INTERNAL},
        {"1.c.\xc3\xa4", ATTN_ERR_INTERNAL},
    };
    (void)state;
    assert_ptr_not_equal(memory, MAP_FAILED);
    assert_int_equal(mprotect(memory + page, page, PROT_NONE), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        size_t n = strlen(cases[i].ticket) + 1;
        char *at = memcpy(memory + page - n, cases[i].ticket, n);
        assert_int_equal(wire_ticket_check(at), cases[i].status);
    }
    char *at             = memset(memory + page - WIRE_TICKET_ROOM - 1, 'x', WIRE_TICKET_ROOM + 1);
    at[WIRE_TICKET_ROOM] = 0;
    assert_int_equal(wire_ticket_check(at), ATTN_ERR_INTERNAL);
    assert_int_equal(wire_ticket_check(at + 1), ATTN_OK);
    munmap(memory, 2 * page);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_geometry_round_trip),
        cmocka_unit_test(test_wrong_counts_in_a_geometry_are_refused),
        cmocka_unit_test(test_unknown_enums_are_refused_by_who_uses_them),
        cmocka_unit_test(test_worker_begin_round_trip),
        cmocka_unit_test(test_a_group_round_trip),
        cmocka_unit_test(test_timeouts_of_a_worker_begin),
        cmocka_unit_test(test_begin_is_decoded),
        cmocka_unit_test(test_layout_round_trip),
        cmocka_unit_test(test_figures_and_long_texts_of_a_worker),
        cmocka_unit_test(test_out_of_memory_is_told),
        cmocka_unit_test(test_sizes_that_overflow_are_refused),
        cmocka_unit_test(test_random_bytes_decode_or_are_refused),
        cmocka_unit_test(test_a_ticket_is_a_short_line_of_ascii),
    };
    return cmocka_run_group_tests_name("wire", tests, NULL, NULL);
}
