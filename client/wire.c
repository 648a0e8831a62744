/* wire.c: see wire.h. Lists from a peer are bounded by the message's size (16 MiB). */
#include "client/wire.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define STEP_TIMEOUT_MS_DEFAULT 60000u

#if defined(__has_feature)
#if __has_feature(address_sanitizer) /* clang's word for it */
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
/* Under AddressSanitizer a piece for each array, so that reading beyond one is seen. */
#if defined(__SANITIZE_ADDRESS__)
#define PIECE_BYTES_MAX UINT64_C(0)
#else
#define PIECE_BYTES_MAX (UINT64_C(256) << 10)
#endif
#define PIECE_BYTES_MIN 1024u

/* A message has many small arrays: they are cut from pieces that double in size. */
struct wire_piece {
    struct wire_piece *next;
    uint64_t size, used; /* of bytes */
    _Alignas(16) uint8_t bytes[];
};

static struct wire_piece *
piece_new(wire_block_t *block, uint64_t least)
{
    uint64_t size = block->pieces == NULL ? PIECE_BYTES_MIN
                                          : attn_min(2 * block->pieces->size, PIECE_BYTES_MAX);

    size                     = attn_max(size, least);
    struct wire_piece *piece = calloc(1, sizeof(*piece) + size);
    if (piece != NULL) {
        piece->size   = size;
        piece->next   = block->pieces;
        block->pieces = piece;
    }
    return piece;
}

void *
wire_alloc(wire_block_t *block, uint64_t n, uint64_t size)
{
    struct wire_piece *piece = block->pieces;
    uint64_t bytes;

    if (attn_mul(n, size, &bytes) && bytes < SIZE_MAX / 2) {
        bytes = attn_max(attn_div_up(bytes, 16), 1) * 16; /* no two arrays share an address */
        if (piece == NULL || bytes > piece->size - piece->used) {
            piece = piece_new(block, bytes);
        }
    } else {
        piece = NULL;
    }
    if (piece == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a message");
        return NULL;
    }
    void *at = piece->bytes + piece->used;
    piece->used += bytes;
    return at;
}

void
wire_free(wire_block_t *block)
{
    while (block->pieces != NULL) {
        struct wire_piece *next = block->pieces->next;
        free(block->pieces);
        block->pieces = next;
    }
}

/* ---- geometry ---- */

static attn_status_t
layer_decode(const Attn__V1__Layer *message, uint32_t q_heads, attn_layer_t *layer)
{
    if ((message->n_slopes != 0 && message->n_slopes != q_heads) ||
        (message->n_sinks != 0 && message->n_sinks != q_heads)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "slopes has %zu and sinks %zu values: none, or q_heads (%u)",
                         message->n_slopes, message->n_sinks, q_heads);
    }
    *layer = (attn_layer_t){.scale   = message->scale,
                            .softcap = message->softcap,
                            .window  = message->window,
                            .causal  = !message->non_causal,
                            .slopes  = message->n_slopes > 0 ? message->slopes : NULL,
                            .sinks   = message->n_sinks > 0 ? message->sinks : NULL};
    return ATTN_OK;
}

attn_status_t
wire_geometry_decode(wire_block_t *block, const Attn__V1__Geometry *message,
                     attn_geometry_t *geometry)
{
    if (message == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "geometry is missing");
    }
    if (message->n_layer_table != 0 && message->n_layer_table != message->layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer_table has %zu rows: none, or one per layer (%u)",
                         message->n_layer_table, message->layers);
    }
    attn_layer_t *table = NULL;
    if (message->n_layer_table > 0) {
        table = wire_alloc(block, message->n_layer_table, sizeof(*table));
        if (table == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
    }
    for (size_t l = 0; l < message->n_layer_table; l++) {
        attn_status_t status = layer_decode(message->layer_table[l], message->q_heads, &table[l]);
        if (status != ATTN_OK) {
            return attn_fail_in(status, "layer_table[%zu]: ", l);
        }
    }
    *geometry = (attn_geometry_t){
        .size         = sizeof(*geometry),
        .layers       = message->layers,
        .q_heads      = message->q_heads,
        .kv_heads     = message->kv_heads,
        .head_dim_k   = message->head_dim_k,
        .head_dim_v   = message->head_dim_v,
        .kv_dtype     = (attn_dtype_t)message->kv_dtype,
        .page_size    = message->page_size,
        .chunk_size   = message->chunk_size,
        .placement    = (attn_placement_t)message->placement,
        .layer_table  = table,
        .region_bytes = message->region_bytes,
    };
    return ATTN_OK;
}

static Attn__V1__Layer *
layer_encode(wire_block_t *block, const attn_layer_t *layer, uint32_t q_heads)
{
    Attn__V1__Layer *message = wire_alloc(block, 1, sizeof(*message));

    if (message != NULL) {
        attn__v1__layer__init(message);
        message->scale      = layer->scale;
        message->softcap    = layer->softcap;
        message->window     = layer->window;
        message->non_causal = !layer->causal;
        message->slopes     = (float *)layer->slopes;
        message->n_slopes   = layer->slopes != NULL ? q_heads : 0;
        message->sinks      = (float *)layer->sinks;
        message->n_sinks    = layer->sinks != NULL ? q_heads : 0;
    }
    return message;
}

attn_status_t
wire_geometry_encode(wire_block_t *block, const attn_geometry_t *g, Attn__V1__Geometry **message_p)
{
    Attn__V1__Geometry *message = wire_alloc(block, 1, sizeof(*message));
    uint32_t n                  = g->layer_table != NULL ? g->layers : 0;

    if (message == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    attn__v1__geometry__init(message);
    message->layers        = g->layers;
    message->q_heads       = g->q_heads;
    message->kv_heads      = g->kv_heads;
    message->head_dim_k    = g->head_dim_k;
    message->head_dim_v    = g->head_dim_v;
    message->kv_dtype      = (Attn__V1__DType)g->kv_dtype;
    message->page_size     = g->page_size;
    message->chunk_size    = g->chunk_size;
    message->placement     = (Attn__V1__Placement)g->placement;
    message->region_bytes  = g->region_bytes;
    message->layer_table   = wire_alloc(block, n, sizeof(*message->layer_table));
    message->n_layer_table = n;
    for (uint32_t l = 0; message->layer_table != NULL && l < n; l++) {
        message->layer_table[l] = layer_encode(block, &g->layer_table[l], g->q_heads);
        if (message->layer_table[l] == NULL) {
            return ATTN_ERR_NO_MEMORY;
        }
    }
    *message_p = message;
    return message->layer_table != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
}

/* ---- batches ---- */

/* repeated PageList to one array of pages with an index. */
static attn_status_t
sparse_decode(wire_block_t *block, Attn__V1__PageList **lists, size_t n, const uint32_t **indptr_p,
              const uint32_t **pages_p)
{
    uint64_t total = 0;

    if (n == 0) {
        return ATTN_OK;
    }
    for (size_t i = 0; i < n; i++) {
        total += lists[i]->n_pages;
    }
    uint32_t *indptr = wire_alloc(block, n + 1, sizeof(uint32_t));
    uint32_t *pages  = wire_alloc(block, total, sizeof(uint32_t));
    if (indptr == NULL || pages == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < n; i++) {
        if (lists[i]->n_pages > 0) {
            memcpy(pages + indptr[i], lists[i]->pages, lists[i]->n_pages * sizeof(uint32_t));
        }
        indptr[i + 1] = indptr[i] + (uint32_t)lists[i]->n_pages;
    }
    *indptr_p = indptr;
    *pages_p  = pages;
    return ATTN_OK;
}

static attn_status_t
sparse_encode(wire_block_t *block, const uint32_t *indptr, const uint32_t *pages, uint32_t n,
              Attn__V1__PageList ***lists_p)
{
    Attn__V1__PageList **lists = wire_alloc(block, n, sizeof(*lists));
    Attn__V1__PageList *items  = wire_alloc(block, n, sizeof(*items));

    if (lists == NULL || items == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        attn__v1__page_list__init(&items[i]);
        items[i].pages   = (uint32_t *)pages + indptr[i];
        items[i].n_pages = indptr[i + 1] - indptr[i];
        lists[i]         = &items[i];
    }
    *lists_p = lists;
    return ATTN_OK;
}

attn_status_t
wire_lists_decode(wire_block_t *block, Attn__V1__EntryLists *const *messages, size_t n,
                  engine_lists_t **lists_p)
{
    engine_lists_t *lists = wire_alloc(block, n, sizeof(*lists));

    if (lists == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < n; i++) {
        lists[i].entry       = messages[i]->entry;
        lists[i].n_lists     = (uint32_t)messages[i]->n_sparse;
        attn_status_t status = sparse_decode(block, messages[i]->sparse, messages[i]->n_sparse,
                                             &lists[i].indptr, &lists[i].pages);
        if (status != ATTN_OK) {
            return status;
        }
    }
    *lists_p = lists;
    return ATTN_OK;
}

attn_status_t
wire_lists_encode(wire_block_t *block, const engine_lists_t *lists, uint32_t n,
                  Attn__V1__EntryLists ***messages_p)
{
    Attn__V1__EntryLists **messages = wire_alloc(block, n, sizeof(*messages));
    Attn__V1__EntryLists *items     = wire_alloc(block, n, sizeof(*items));

    if (messages == NULL || items == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        attn__v1__entry_lists__init(&items[i]);
        items[i].entry       = lists[i].entry;
        items[i].n_sparse    = lists[i].n_lists;
        messages[i]          = &items[i];
        attn_status_t status = sparse_encode(block, lists[i].indptr, lists[i].pages,
                                             lists[i].n_lists, &items[i].sparse);
        if (status != ATTN_OK) {
            return status;
        }
    }
    *messages_p = messages;
    return ATTN_OK;
}

/* No bytes are no mask. What the bits say is checked by who uses them. */
static attn_status_t
mask_decode(const ProtobufCBinaryData *mask, uint32_t n_q, uint32_t n_new, const uint8_t **mask_p)
{
    uint64_t row_bytes = attn_mask_row_bytes(n_new);

    if (mask->len > 0 && mask->len != n_q * row_bytes) {
        return attn_fail(ATTN_ERR_INVALID,
                         "mask has %zu bytes: none, or %u rows (n_q) of %llu for %u new tokens",
                         mask->len, n_q, (unsigned long long)row_bytes, n_new);
    }
    *mask_p = mask->len > 0 ? mask->data : NULL;
    return ATTN_OK;
}

static ProtobufCBinaryData
mask_encode(const uint8_t *mask, uint32_t n_q, uint32_t n_new)
{
    return (ProtobufCBinaryData){.data = (uint8_t *)mask,
                                 .len  = mask != NULL ? n_q * attn_mask_row_bytes(n_new) : 0};
}

static attn_status_t
nodes_decode(wire_block_t *block, Attn__V1__Node *const *messages, size_t n, attn_node_t **nodes_p)
{
    attn_node_t *nodes = wire_alloc(block, n, sizeof(*nodes));

    for (size_t k = 0; nodes != NULL && k < n; k++) {
        nodes[k] = (attn_node_t){.level = messages[k]->level, .index = messages[k]->index};
    }
    *nodes_p = nodes;
    return nodes != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
}

static attn_status_t
nodes_encode(wire_block_t *block, const attn_node_t *nodes, uint32_t n,
             Attn__V1__Node ***messages_p)
{
    Attn__V1__Node *items     = wire_alloc(block, n, sizeof(*items));
    Attn__V1__Node **messages = wire_alloc(block, n, sizeof(*messages));

    if (items == NULL || messages == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t k = 0; k < n; k++) {
        attn__v1__node__init(&items[k]);
        items[k].level = nodes[k].level;
        items[k].index = nodes[k].index;
        messages[k]    = &items[k];
    }
    *messages_p = messages;
    return ATTN_OK;
}

static attn_status_t
worker_entry_decode(wire_block_t *block, const Attn__V1__WorkerEntry *message,
                    engine_entry_t *entry)
{
    kv_step_chunk_t *chunks = wire_alloc(block, message->n_chunks, sizeof(*chunks));
    attn_node_t *nodes;

    if (chunks == NULL ||
        nodes_decode(block, message->nodes, message->n_nodes, &nodes) != ATTN_OK) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (size_t c = 0; c < message->n_chunks; c++) {
        const Attn__V1__ChunkRef *ref = message->chunks[c];
        chunks[c]                     = (kv_step_chunk_t){.chunk      = ref->chunk,
                                                          .generation = ref->generation,
                                                          .length     = ref->length,
                                                          .n_new      = ref->n_new,
                                                          .number     = ref->number};
    }
    *entry               = (engine_entry_t){.seq      = message->seq,
                                            .base     = message->base_position,
                                            .n_q      = message->n_q,
                                            .n_new    = message->n_new,
                                            .n_chunks = (uint32_t)message->n_chunks,
                                            .chunks   = chunks,
                                            .n_nodes  = (uint32_t)message->n_nodes,
                                            .nodes    = nodes,
                                            .n_lists  = (uint32_t)message->n_sparse};
    attn_status_t status = mask_decode(&message->mask, message->n_q, message->n_new, &entry->mask);
    entry->list_room     = message->list_room;
    if (status != ATTN_OK) {
        return status;
    }
    return sparse_decode(block, message->sparse, message->n_sparse, &entry->sparse_indptr,
                         &entry->sparse_pages);
}

static attn_status_t
timeout_check(uint32_t timeout_ms)
{
    if (timeout_ms > ENGINE_TIMEOUT_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "timeout_ms is %u: at most %u", timeout_ms,
                         ENGINE_TIMEOUT_MS_MAX);
    }
    return ATTN_OK;
}

/* Entries that are merged in a group. */
static attn_status_t
grouped_decode(wire_block_t *block, Attn__V1__GroupEntry *const *messages, size_t n,
               attn_group_entry_t **entries_p)
{
    attn_group_entry_t *entries = wire_alloc(block, n, sizeof(*entries));
    attn_status_t status        = entries != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;

    if (n > ATTN_KV_ENTRIES_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "grouped has %zu entries: at most %u", n,
                         ATTN_KV_ENTRIES_MAX);
    }
    for (size_t i = 0; status == ATTN_OK && i < n; i++) {
        const Attn__V1__GroupEntry *from = messages[i];
        if (from->n_ranks > ATTN_RANKS_MAX || from->n_q == 0 || from->n_q > ENGINE_ROWS_MAX) {
            return attn_fail(ATTN_ERR_INVALID,
                             "grouped[%zu] has %zu ranks and n_q %u: at most %u ranks, and 1 to %u",
                             i, from->n_ranks, from->n_q, ATTN_RANKS_MAX, ENGINE_ROWS_MAX);
        }
        entries[i].n_q = from->n_q;
        for (size_t r = 0; status == ATTN_OK && r < from->n_ranks; r++) {
            attn_node_t *nodes;
            status = nodes_decode(block, from->ranks[r]->nodes, from->ranks[r]->n_nodes, &nodes);
            entries[i].n_nodes[r] = (uint32_t)from->ranks[r]->n_nodes;
            entries[i].nodes[r]   = nodes;
        }
    }
    *entries_p = entries;
    return status;
}

static attn_status_t
grouped_encode(wire_block_t *block, const engine_batch_t *batch,
               Attn__V1__WorkerBeginRequest *message)
{
    Attn__V1__GroupEntry *entries  = wire_alloc(block, batch->n_grouped, sizeof(*entries));
    Attn__V1__GroupEntry **grouped = wire_alloc(block, batch->n_grouped, sizeof(*grouped));
    attn_status_t status = entries != NULL && grouped != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;

    for (uint32_t i = 0; status == ATTN_OK && i < batch->n_grouped; i++) {
        const attn_group_entry_t *from = &batch->grouped[i];
        Attn__V1__GroupNodes *of       = wire_alloc(block, ATTN_RANKS_MAX, sizeof(*of));
        Attn__V1__GroupNodes **ranks   = wire_alloc(block, ATTN_RANKS_MAX, sizeof(*ranks));
        attn__v1__group_entry__init(&entries[i]);
        grouped[i] = &entries[i];
        status     = of != NULL && ranks != NULL ? ATTN_OK : ATTN_ERR_NO_MEMORY;
        for (uint32_t r = 0; status == ATTN_OK && r < ATTN_RANKS_MAX; r++) {
            attn__v1__group_nodes__init(&of[r]);
            ranks[r]      = &of[r];
            of[r].n_nodes = from->n_nodes[r];
            status        = nodes_encode(block, from->nodes[r], from->n_nodes[r], &of[r].nodes);
        }
        entries[i].n_q     = from->n_q;
        entries[i].n_ranks = ATTN_RANKS_MAX;
        entries[i].ranks   = ranks;
    }
    message->group     = batch->group;
    message->n_grouped = batch->n_grouped;
    message->grouped   = grouped;
    return status;
}

attn_status_t
wire_worker_begin_decode(wire_block_t *block, const Attn__V1__WorkerBeginRequest *message,
                         uint64_t now_ns, engine_batch_t *batch)
{
    engine_entry_t *entries = wire_alloc(block, message->n_entries, sizeof(*entries));
    attn_status_t status =
        entries != NULL ? timeout_check(message->timeout_ms) : ATTN_ERR_NO_MEMORY;
    uint32_t timeout = message->timeout_ms != 0 ? message->timeout_ms : STEP_TIMEOUT_MS_DEFAULT;

    for (size_t i = 0; status == ATTN_OK && i < message->n_entries; i++) {
        status = worker_entry_decode(block, message->entries[i], &entries[i]);
    }
    *batch = (engine_batch_t){
        .epoch       = message->epoch,
        .cache       = message->cache_id,
        .step_id     = message->step_id,
        .n           = (uint32_t)message->n_entries,
        .entries     = entries,
        .q_dtype     = (attn_dtype_t)message->q_dtype,
        .o_dtype     = (attn_dtype_t)(message->o_dtype != 0 ? message->o_dtype : message->q_dtype),
        .want_lse    = message->want_lse,
        .deadline_ns = now_ns + timeout * ATTN_NS_PER_MS,
    };
    if (status == ATTN_OK && message->group != 0) {
        attn_group_entry_t *grouped = NULL;
        status           = grouped_decode(block, message->grouped, message->n_grouped, &grouped);
        batch->group     = message->group;
        batch->grouped   = grouped;
        batch->n_grouped = (uint32_t)message->n_grouped;
    }
    return status;
}

static attn_status_t
worker_entry_encode(wire_block_t *block, const engine_entry_t *e, Attn__V1__WorkerEntry *message)
{
    Attn__V1__ChunkRef *refs    = wire_alloc(block, e->n_chunks, sizeof(*refs));
    Attn__V1__ChunkRef **chunks = wire_alloc(block, e->n_chunks, sizeof(*chunks));
    Attn__V1__Node **nodes;

    if (refs == NULL || chunks == NULL ||
        nodes_encode(block, e->nodes, e->n_nodes, &nodes) != ATTN_OK) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        attn__v1__chunk_ref__init(&refs[c]);
        refs[c].number     = e->chunks[c].number;
        refs[c].chunk      = e->chunks[c].chunk;
        refs[c].generation = e->chunks[c].generation;
        refs[c].length     = e->chunks[c].length;
        refs[c].n_new      = e->chunks[c].n_new;
        chunks[c]          = &refs[c];
    }
    attn__v1__worker_entry__init(message);
    message->seq           = e->seq;
    message->base_position = e->base;
    message->n_q           = e->n_q;
    message->n_new         = e->n_new;
    message->n_chunks      = e->n_chunks;
    message->chunks        = chunks;
    message->n_nodes       = e->n_nodes;
    message->nodes         = nodes;
    message->n_sparse      = e->n_lists;
    message->list_room     = e->list_room;
    message->mask          = mask_encode(e->mask, e->n_q, e->n_new);
    return sparse_encode(block, e->sparse_indptr, e->sparse_pages, e->n_lists, &message->sparse);
}

attn_status_t
wire_worker_begin_encode(wire_block_t *block, const engine_batch_t *batch, uint64_t now_ns,
                         Attn__V1__WorkerBeginRequest **message_p)
{
    Attn__V1__WorkerBeginRequest *message = wire_alloc(block, 1, sizeof(*message));
    Attn__V1__WorkerEntry *items          = wire_alloc(block, batch->n, sizeof(*items));
    Attn__V1__WorkerEntry **entries       = wire_alloc(block, batch->n, sizeof(*entries));
    uint64_t left =
        batch->deadline_ns > now_ns ? (batch->deadline_ns - now_ns) / ATTN_NS_PER_MS : 0;

    if (message == NULL || items == NULL || entries == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        attn_status_t status = worker_entry_encode(block, &batch->entries[i], &items[i]);
        if (status != ATTN_OK) {
            return status;
        }
        entries[i] = &items[i];
    }
    attn__v1__worker_begin_request__init(message);
    message->epoch      = batch->epoch;
    message->cache_id   = batch->cache;
    message->step_id    = batch->step_id;
    message->n_entries  = batch->n;
    message->entries    = entries;
    message->q_dtype    = (Attn__V1__DType)batch->q_dtype;
    message->o_dtype    = (Attn__V1__DType)batch->o_dtype;
    message->want_lse   = batch->want_lse;
    message->timeout_ms = (uint32_t)attn_min(attn_max(left, 1), ENGINE_TIMEOUT_MS_MAX);
    *message_p          = message;
    return batch->group != 0 ? grouped_encode(block, batch, message) : ATTN_OK;
}

static attn_status_t
entry_encode(wire_block_t *block, const attn_entry_t *e, Attn__V1__BatchEntry *message)
{
    attn__v1__batch_entry__init(message);
    message->seq           = e->seq.id;
    message->base_position = e->base;
    message->n_q           = e->n_q;
    message->n_new         = e->n_new;
    message->n_sparse      = e->n_lists;
    message->list_room     = e->list_room;
    message->mask          = mask_encode(e->mask, e->n_q, e->n_new);
    return sparse_encode(block, e->sparse_indptr, e->sparse_pages, e->n_lists, &message->sparse);
}

attn_status_t
wire_begin_encode(wire_block_t *block, const attn_batch_t *batch,
                  Attn__V1__BeginStepRequest *message)
{
    Attn__V1__BatchEntry *items = wire_alloc(block, batch->n, sizeof(*items));
    attn_status_t status        = ATTN_OK;

    message->entries = wire_alloc(block, batch->n, sizeof(*message->entries));
    if (items == NULL || message->entries == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < batch->n && status == ATTN_OK; i++) {
        status              = entry_encode(block, &batch->entries[i], &items[i]);
        message->entries[i] = &items[i];
    }
    message->n_entries  = batch->n;
    message->q_dtype    = (Attn__V1__DType)batch->q_dtype;
    message->o_dtype    = (Attn__V1__DType)batch->o_dtype;
    message->want_lse   = batch->want_lse;
    message->timeout_ms = batch->timeout_ms;
    return status;
}

attn_status_t
wire_begin_decode(wire_block_t *block, const Attn__V1__BeginStepRequest *message,
                  attn_batch_t *batch)
{
    attn_entry_t *entries = wire_alloc(block, message->n_entries, sizeof(*entries));
    attn_status_t status =
        entries != NULL ? timeout_check(message->timeout_ms) : ATTN_ERR_NO_MEMORY;

    for (size_t i = 0; status == ATTN_OK && i < message->n_entries; i++) {
        const Attn__V1__BatchEntry *from = message->entries[i];
        entries[i]                       = (attn_entry_t){.seq     = {from->seq},
                                                          .base    = from->base_position,
                                                          .n_q     = from->n_q,
                                                          .n_new   = from->n_new,
                                                          .n_lists = (uint32_t)from->n_sparse};
        status = sparse_decode(block, from->sparse, from->n_sparse, &entries[i].sparse_indptr,
                               &entries[i].sparse_pages);
        entries[i].list_room = from->list_room;
        if (status == ATTN_OK) {
            status = mask_decode(&from->mask, from->n_q, from->n_new, &entries[i].mask);
        }
    }
    *batch = (attn_batch_t){
        .size       = sizeof(*batch),
        .n          = (uint32_t)message->n_entries,
        .entries    = entries,
        .q_dtype    = (attn_dtype_t)message->q_dtype,
        .o_dtype    = (attn_dtype_t)message->o_dtype,
        .want_lse   = message->want_lse,
        .timeout_ms = message->timeout_ms,
    };
    return status;
}

/* ---- layouts and status ---- */

attn_status_t
wire_layout_decode(const Attn__V1__SequenceLayout *message, attn_seq_info_t *info)
{
    attn_chunk_info_t *chunks = calloc(message->n_chunks + 1, sizeof(*chunks));

    if (chunks == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a layout of %zu chunks",
                         message->n_chunks);
    }
    for (size_t c = 0; c < message->n_chunks; c++) {
        const Attn__V1__ChunkInfo *from = message->chunks[c];
        chunks[c]                       = (attn_chunk_info_t){.chunk      = from->chunk,
                                                              .first      = from->first,
                                                              .length     = from->length,
                                                              .generation = from->generation,
                                                              .worker     = from->worker,
                                                              .lost       = from->lost,
                                                              .sealed     = from->sealed};
    }
    *info = (attn_seq_info_t){.n_chunks = (uint32_t)message->n_chunks, .chunks = chunks};
    return ATTN_OK;
}

attn_status_t
wire_chunks_encode(wire_block_t *block, const attn_seq_info_t *info,
                   Attn__V1__ChunkInfo ***chunks_p)
{
    Attn__V1__ChunkInfo **chunks = wire_alloc(block, info->n_chunks, sizeof(*chunks));
    Attn__V1__ChunkInfo *items   = wire_alloc(block, info->n_chunks, sizeof(*items));

    if (chunks == NULL || items == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t c = 0; c < info->n_chunks; c++) {
        attn__v1__chunk_info__init(&items[c]);
        items[c].chunk      = info->chunks[c].chunk;
        items[c].first      = info->chunks[c].first;
        items[c].length     = info->chunks[c].length;
        items[c].generation = info->chunks[c].generation;
        items[c].worker     = info->chunks[c].worker;
        items[c].lost       = info->chunks[c].lost;
        items[c].sealed     = info->chunks[c].sealed;
        chunks[c]           = &items[c];
    }
    *chunks_p = chunks;
    return ATTN_OK;
}

attn_status_t
wire_holes_encode(wire_block_t *block, const attn_seq_info_t *info, Attn__V1__Hole ***holes_p)
{
    Attn__V1__Hole **holes = wire_alloc(block, info->n_holes + (uint64_t)1, sizeof(*holes));
    Attn__V1__Hole *items  = wire_alloc(block, info->n_holes + (uint64_t)1, sizeof(*items));

    if (holes == NULL || items == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < info->n_holes; i++) {
        attn__v1__hole__init(&items[i]);
        items[i].first  = info->holes[i].first;
        items[i].end    = info->holes[i].end;
        items[i].worker = info->holes[i].worker;
        items[i].open   = info->holes[i].open;
        holes[i]        = &items[i];
    }
    *holes_p = holes;
    return ATTN_OK;
}

void
wire_worker_decode(const Attn__V1__WorkerInfo *message, attn_worker_info_t *info)
{
    *info = (attn_worker_info_t){
        .id                = message->id,
        .alive             = message->alive,
        .slab_bytes        = message->slab_bytes,
        .region_bytes      = message->region_bytes,
        .used_bytes        = message->used_bytes,
        .chunks            = message->chunks,
        .open_steps        = message->open_steps,
        .runs              = message->runs,
        .kv_bytes          = message->kv_bytes,
        .device_bytes      = message->device_bytes,
        .device_free_bytes = message->device_free_bytes,
        .kv_bytes_per_s    = message->kv_bytes_per_s,
        .read_bandwidth    = message->read_bandwidth,
        .ucx               = message->ucx,
        .ucx_clients       = message->ucx_clients,
        .ucx_runs          = message->ucx_runs,
        .gpu_clients       = message->gpu_clients,
        .groups            = message->groups,
        .gpu_runs          = message->gpu_runs,
        .leaving           = message->leaving,
        .attend_seconds    = message->attend_seconds,
        .hop_seconds       = message->hop_seconds,
        .link_bandwidth    = message->link_bandwidth,
    };
    for (size_t d = 0; d + ATTN_F32 <= ATTN_BF16; d++) {
        info->few_flops[ATTN_F32 + d]  = d < message->n_few_flops ? message->few_flops[d] : 0;
        info->many_flops[ATTN_F32 + d] = d < message->n_many_flops ? message->many_flops[d] : 0;
    }
    strncpy(info->address, message->address, sizeof(info->address) - 1);
    strncpy(info->kind, message->kind, sizeof(info->kind) - 1);
    strncpy(info->device, message->device, sizeof(info->device) - 1);
    strncpy(info->ucx_ways, message->ucx_ways, sizeof(info->ucx_ways) - 1);
    strncpy(info->group_host, message->group_host, sizeof(info->group_host) - 1);
    strncpy(info->group_device, message->group_device, sizeof(info->group_device) - 1);
}

attn_status_t
wire_ticket_check(const char *ticket)
{
    size_t n = 0;

    while (n < WIRE_TICKET_ROOM && ticket[n] >= ' ' && ticket[n] < 127) {
        n++;
    }
    if (n == WIRE_TICKET_ROOM || ticket[n] != 0) {
        return attn_fail(ATTN_ERR_INTERNAL,
                         "the coordinator gave a ticket that is no line of text, or has %u bytes "
                         "or more",
                         WIRE_TICKET_ROOM);
    }
    return ATTN_OK;
}
