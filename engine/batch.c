/* batch.c: a batch from outside is checked, copied, and turned into the kernels' problem. */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- check ---- */

static attn_status_t
check_sparse(const attn_geometry_t *g, const engine_entry_t *e, uint64_t kv_length)
{
    uint64_t pages_per_chunk = attn_div_up(g->chunk_size, g->page_size);
    uint64_t n_pages         = attn_div_up(kv_length, g->chunk_size) * pages_per_chunk;

    if (e->n_lists == 0) {
        return ATTN_OK;
    }
    if (e->n_lists != 1 && e->n_lists != g->kv_heads) {
        return attn_fail(ATTN_ERR_INVALID, "sparse has %u lists: none, 1, or one per KV head (%u)",
                         e->n_lists, g->kv_heads);
    }
    for (uint32_t i = 0; i < e->n_lists; i++) {
        if (e->sparse_indptr[0] != 0 || e->sparse_indptr[i + 1] < e->sparse_indptr[i]) {
            return attn_fail(ATTN_ERR_INVALID, "sparse list %u has a negative length", i);
        }
        for (uint32_t j = e->sparse_indptr[i]; j < e->sparse_indptr[i + 1]; j++) {
            bool ascends = j == e->sparse_indptr[i] || e->sparse_pages[j] > e->sparse_pages[j - 1];
            if (!ascends || e->sparse_pages[j] >= n_pages) {
                return attn_fail(
                    ATTN_ERR_INVALID,
                    "sparse list %u: page %u must be above the one before and below %llu", i,
                    e->sparse_pages[j], (unsigned long long)n_pages);
            }
        }
    }
    return ATTN_OK;
}

/* Tokens of a chunk that the entry sees: committed ones below base, and the step's own. */
static uint32_t
visible(const attn_geometry_t *g, const engine_entry_t *e, const kv_step_chunk_t *c)
{
    uint64_t first = (uint64_t)c->number * g->chunk_size;

    if (c->n_new > 0) {
        return c->length + c->n_new;
    }
    return first >= e->base ? 0 : (uint32_t)attn_min(c->length, e->base - first);
}

/*
 * New tokens of a chunk fill it, or go to the end of the entry's: whoever else stores some of the
 * entry's tokens, none is forgotten between two chunks.
 */
static attn_status_t
check_chunk(const attn_geometry_t *g, const engine_entry_t *e, const kv_step_chunk_t *c)
{
    uint64_t first = (uint64_t)c->number * g->chunk_size;
    uint64_t start = first + c->length; /* where its new tokens go */
    uint64_t end   = attn_min(first + g->chunk_size, e->base + e->n_new);

    if (c->length > g->chunk_size || c->n_new > g->chunk_size - c->length) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %llu: length %u and n_new %u exceed chunk_size %u",
                         (unsigned long long)c->chunk, c->length, c->n_new, g->chunk_size);
    }
    if (c->n_new > 0 &&
        (start < e->base || start + c->n_new != end || (c->length > 0 && start != e->base))) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "chunk %llu: its new tokens %llu-%llu are not those of the entry's %llu-%llu there",
            (unsigned long long)c->chunk, (unsigned long long)start,
            (unsigned long long)(start + c->n_new - 1), (unsigned long long)e->base,
            (unsigned long long)(e->base + e->n_new - 1));
    }
    return ATTN_OK;
}

static uint64_t
node_first_key(attn_node_t node)
{
    return (uint64_t)node.index << node.level;
}

attn_status_t
engine_nodes_check(const attn_node_t *nodes, uint32_t n)
{
    uint64_t end = 0; /* keys below this are covered */

    for (uint32_t i = 0; i < n; i++) {
        attn_node_t node = nodes[i];
        if (node.level > 32 || (uint64_t)node.index >= UINT64_C(1) << (32 - node.level) ||
            node_first_key(node) < end) {
            return attn_fail(ATTN_ERR_INVALID,
                             "node %u (level %u, index %u) is no node, or out of order", i,
                             node.level, node.index);
        }
        end = node_first_key(node) + (UINT64_C(1) << node.level);
    }
    return ATTN_OK;
}

/* Is the key below one of the nodes (ascending, disjoint)? */
static bool
node_covers(const engine_entry_t *e, uint32_t key)
{
    uint32_t low = 0, high = e->n_nodes;

    while (low < high) {
        uint32_t mid     = (low + high) / 2;
        attn_node_t node = e->nodes[mid];
        if (key < node_first_key(node)) {
            high = mid;
        } else if (key >= node_first_key(node) + (UINT64_C(1) << node.level)) {
            low = mid + 1;
        } else {
            return true;
        }
    }
    return false;
}

/* Right or an error: a chunk that is attended to has every token that the queries could see there.
 */
static attn_status_t
check_whole(const attn_geometry_t *g, const engine_entry_t *e, const kv_step_chunk_t *c)
{
    uint64_t first = (uint64_t)c->number * g->chunk_size, end = e->base + e->n_new;
    uint64_t needed = first < end ? attn_min(end - first, g->chunk_size) : 0;

    if (visible(g, e, c) != needed) {
        return attn_fail(ATTN_ERR_INVALID,
                         "chunk %llu holds %u of the %llu tokens that the entry sees there: the "
                         "others are missing",
                         (unsigned long long)c->chunk, visible(g, e, c),
                         (unsigned long long)needed);
    }
    return ATTN_OK;
}

static attn_status_t
check_attends(const attn_geometry_t *g, const engine_entry_t *e)
{
    uint64_t seen = 0;

    for (uint32_t i = 0; i < e->n_chunks; i++) {
        uint32_t tokens      = visible(g, e, &e->chunks[i]);
        attn_status_t status = check_whole(g, e, &e->chunks[i]);
        if (status != ATTN_OK) {
            return status;
        }
        seen += tokens;
        if (tokens > 0 && e->n_nodes > 0 && !node_covers(e, attn_tree_key(e->chunks[i].number))) {
            return attn_fail(ATTN_ERR_INVALID,
                             "chunk number %u is below none of the nodes asked for",
                             e->chunks[i].number);
        }
    }
    if (seen == 0) {
        return attn_fail(ATTN_ERR_INVALID, "n_q is %u, but no chunk named here holds a token",
                         e->n_q);
    }
    if (e->n_nodes == 0 && seen != e->base + e->n_new) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "asks for O over %llu tokens, but the chunks named hold %llu: ask for nodes",
            (unsigned long long)(e->base + e->n_new), (unsigned long long)seen);
    }
    return ATTN_OK;
}

/* Where the new tokens of a chunk are among those of the entry: [*first_p, *first_p + n_new). */
static void
new_tokens_of(const attn_geometry_t *g, const engine_entry_t *e, const kv_step_chunk_t *c,
              uint32_t *first_p)
{
    *first_p = (uint32_t)((uint64_t)c->number * g->chunk_size + c->length - e->base);
}

uint32_t
engine_entry_rows(const attn_geometry_t *g, const engine_entry_t *e, uint32_t *first_p)
{
    uint32_t n = 0;

    *first_p = 0;
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        if (e->mask != NULL && e->chunks[c].n_new > 0) {
            new_tokens_of(g, e, &e->chunks[c], first_p);
            return e->n_new - *first_p;
        }
        n += e->chunks[c].n_new;
    }
    return n;
}

bool
engine_entry_owns(const attn_geometry_t *g, const engine_entry_t *e, uint32_t token)
{
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        uint32_t first;
        new_tokens_of(g, e, &e->chunks[c], &first);
        if (e->chunks[c].n_new > 0 && token >= first && token - first < e->chunks[c].n_new) {
            return true;
        }
    }
    return false;
}

static attn_status_t
check_entry(const attn_geometry_t *g, const engine_entry_t *e)
{
    uint64_t kv_length, previous = 0;
    attn_status_t status;

    if (!attn_add(e->base, e->n_new, &kv_length) ||
        kv_length > (uint64_t)UINT32_MAX * g->chunk_size) {
        return attn_fail(ATTN_ERR_INVALID, "base %llu + n_new %u exceeds the longest sequence",
                         (unsigned long long)e->base, e->n_new);
    }
    if (e->n_q > kv_length) {
        return attn_fail(ATTN_ERR_INVALID, "n_q is %u: at most base + n_new = %llu", e->n_q,
                         (unsigned long long)kv_length);
    }
    for (uint32_t i = 0; i < e->n_chunks; i++) {
        if (i > 0 && e->chunks[i].number <= previous) {
            return attn_fail(ATTN_ERR_INVALID, "chunk numbers must ascend: %u after %llu",
                             e->chunks[i].number, (unsigned long long)previous);
        }
        previous = e->chunks[i].number;
        status   = check_chunk(g, e, &e->chunks[i]);
        if (status != ATTN_OK) {
            return status;
        }
    }
    if (e->mask != NULL && (status = attn_mask_check(e->mask, e->n_q, e->n_new)) != ATTN_OK) {
        return status;
    }
    if ((status = engine_nodes_check(e->nodes, e->n_nodes)) != ATTN_OK ||
        (status = check_sparse(g, e, kv_length)) != ATTN_OK) {
        return status;
    }
    return e->n_q > 0 ? check_attends(g, e) : ATTN_OK;
}

/* A new chunk must not be one that was released: the caller's layout is of before its sequence was
 * freed or truncated, and nobody would ever release the chunk again. */
static attn_status_t
check_not_released(const engine_cache_t *cache, const engine_entry_t *e)
{
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        if (e->chunks[c].generation == 0 && engine_was_released(cache, e->chunks[c].chunk)) {
            return attn_fail(ATTN_ERR_NOT_FOUND,
                             "chunk %llu was released: sequence %llx was freed or truncated",
                             (unsigned long long)e->chunks[c].chunk, (unsigned long long)e->seq);
        }
    }
    return ATTN_OK;
}

attn_status_t
engine_lists_check(const engine_step_t *step, const engine_lists_t *lists, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const engine_lists_t *l = &lists[i];
        if (l->entry >= step->n || (i > 0 && l->entry <= lists[i - 1].entry) || l->n_lists == 0) {
            return attn_fail(
                ATTN_ERR_INVALID,
                "lists[%u] is of entry %u, with %u lists: entries ascend, are below %u, "
                "and have lists",
                i, l->entry, l->n_lists, step->n);
        }
        engine_entry_t e = step->entries[l->entry];
        e.n_lists        = l->n_lists;
        e.sparse_indptr  = l->indptr;
        e.sparse_pages   = l->pages;
        if (e.list_room == 0) {
            return attn_fail(ATTN_ERR_INVALID,
                             "lists of entry %u: its list_room is 0, so none come with a run",
                             l->entry);
        }
        attn_status_t status = check_sparse(&step->cache->geometry, &e, e.base + e.n_new);
        if (status == ATTN_OK && l->indptr[l->n_lists] > e.list_room) {
            status = attn_fail(ATTN_ERR_TOO_LARGE, "%u pages, more than list_room, %u",
                               l->indptr[l->n_lists], e.list_room);
        }
        if (status != ATTN_OK) {
            return attn_fail_in(status, "lists of entry %u: ", l->entry);
        }
    }
    return ATTN_OK;
}

attn_status_t
engine_step_check(const engine_cache_t *cache, const engine_batch_t *batch)
{
    const attn_geometry_t *g = &cache->geometry;
    uint64_t rows = 0, new_rows = 0, states = 0, list_room = 0;

    if (batch->step_id == 0) {
        return attn_fail(ATTN_ERR_INVALID, "step_id is 0: choose a random one");
    }
    if (batch->n < 1 || batch->n > ATTN_KV_ENTRIES_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "the batch has %u entries: 1 to %u", batch->n,
                         ATTN_KV_ENTRIES_MAX);
    }
    if (attn_dtype_size(batch->q_dtype) == 0 || attn_dtype_size(batch->o_dtype) == 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "q_dtype %d or o_dtype %d is no dtype: 1 f32, 2 f16, 3 bf16",
                         (int)batch->q_dtype, (int)batch->o_dtype);
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        const engine_entry_t *e = &batch->entries[i];
        attn_status_t status    = check_entry(g, e);
        if (status == ATTN_OK) {
            status = check_not_released(cache, e);
        }
        if (status == ATTN_OK && batch->on_device && (e->n_nodes > 0 || e->list_room > 0)) {
            status = attn_fail(ATTN_ERR_UNSUPPORTED, "%s: not with tensors in the device's memory",
                               e->n_nodes > 0 ? "partials are asked for" : "list_room is not 0");
        }
        if (status != ATTN_OK) {
            return attn_fail_in(status, "entry %u: ", i);
        }
        list_room += e->list_room;
        if (list_room > ENGINE_LIST_ROOM_MAX) {
            return attn_fail(ATTN_ERR_TOO_LARGE,
                             "entry %u: list_room adds up to %llu pages: at most %u in a batch", i,
                             (unsigned long long)list_room, ENGINE_LIST_ROOM_MAX);
        }
        rows += e->n_q;
        states += (uint64_t)e->n_q * e->n_nodes * g->q_heads; /* < 2^20 * 2^20 * 2^10 an entry */
        uint32_t first;
        new_rows += engine_entry_rows(g, e, &first);
        if (rows > ENGINE_ROWS_MAX || new_rows > ENGINE_ROWS_MAX ||
            states > ENGINE_ANSWER_MAX / (8 + 4 * g->head_dim_v) ||
            rows * g->q_heads * g->head_dim_v > ENGINE_ANSWER_MAX / 8) {
            return attn_fail(ATTN_ERR_TOO_LARGE,
                             "n_q or n_new add up to more than %u query rows or new tokens, or the "
                             "answer to more than "
                             "1 GiB: cut it into several steps",
                             ENGINE_ROWS_MAX);
        }
    }
    return ATTN_OK;
}

/* ---- copy ---- */

/* Hand out pieces of one block; with at = NULL only add up what is needed. */
typedef struct bump {
    uint8_t *at;
    uint64_t used;
} bump_t;

static void *
bump_take(bump_t *bump, uint64_t bytes)
{
    void *piece = bump->at != NULL ? bump->at + bump->used : NULL;
    bump->used += attn_div_up(bytes, 16) * 16;
    return piece;
}

static void *
bump_copy(bump_t *bump, const void *from, uint64_t bytes)
{
    void *piece = bump_take(bump, bytes);
    if (piece != NULL && bytes > 0) {
        memcpy(piece, from, bytes);
    }
    return piece;
}

/* Everything that a step keeps, cut from one block. */
static void
carve(engine_step_t *step, const engine_batch_t *batch, bump_t *bump)
{
    uint64_t n_chunks = 0, n_new = 0;

    step->entries = bump_copy(bump, batch->entries, batch->n * sizeof(*batch->entries));
    for (uint32_t i = 0; i < batch->n; i++) {
        const engine_entry_t *from = &batch->entries[i];
        uint64_t pages             = from->n_lists > 0 ? from->sparse_indptr[from->n_lists] : 0;
        uint64_t lists             = from->n_lists > 0 ? from->n_lists + 1u : 0;
        engine_entry_t e           = *from;
        e.chunks        = bump_copy(bump, from->chunks, from->n_chunks * sizeof(*from->chunks));
        e.nodes         = bump_copy(bump, from->nodes, from->n_nodes * sizeof(*from->nodes));
        e.sparse_indptr = bump_copy(bump, from->sparse_indptr, lists * sizeof(uint32_t));
        e.sparse_pages  = bump_copy(bump, from->sparse_pages, pages * sizeof(uint32_t));
        if (from->mask != NULL) {
            e.mask = bump_copy(bump, from->mask, from->n_q * attn_mask_row_bytes(from->n_new));
        }
        if (step->entries != NULL) {
            step->entries[i] = e;
        }
        n_chunks += from->n_chunks;
        uint32_t first;
        n_new += engine_entry_rows(&step->cache->geometry, from, &first);
    }
    step->n            = batch->n;
    step->n_new_rows   = n_new;
    step->problem      = bump_take(bump, batch->n * sizeof(*step->problem));
    step->runs         = bump_take(bump, n_chunks * sizeof(*step->runs));
    step->slot_pages   = bump_take(bump, n_new * sizeof(uint32_t));
    step->slot_offsets = bump_take(bump, n_new * sizeof(uint32_t));
    step->slot_first   = bump_take(bump, batch->n * sizeof(uint64_t));
    step->stored       = bump_take(bump, step->cache->geometry.layers);
    step->plans        = bump_take(bump, step->cache->n_variants * sizeof(*step->plans));
    step->workspaces   = bump_take(bump, step->cache->n_variants * sizeof(*step->workspaces));
}

attn_status_t
engine_step_copy(engine_step_t *step, const engine_batch_t *batch)
{
    bump_t bump = {0};

    carve(step, batch, &bump);
    step->copies = bump.at = calloc(1, bump.used);
    if (bump.at == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step of %u entries", batch->n);
    }
    bump.used = 0;
    carve(step, batch, &bump);
    step->on_device   = batch->on_device;
    step->q_dtype     = batch->q_dtype;
    step->o_dtype     = batch->o_dtype;
    step->deadline_ns = batch->deadline_ns;
    return ATTN_OK;
}

static void
mix(XXH3_state_t *hash, const void *bytes, size_t n)
{
    XXH3_64bits_update(hash, bytes, n);
}

static void
mix_nodes(XXH3_state_t *hash, const attn_node_t *nodes, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t node[] = {nodes[i].level, nodes[i].index};
        mix(hash, node, sizeof(node));
    }
}

uint64_t
engine_batch_fingerprint(const engine_batch_t *batch)
{
    XXH3_state_t hash;

    XXH3_64bits_reset(&hash);
    mix(&hash, &batch->cache, sizeof(batch->cache));
    for (uint32_t i = 0; i < batch->n; i++) {
        const engine_entry_t *e = &batch->entries[i];
        uint64_t numbers[]      = {e->seq,         e->base,          e->n_q,          e->n_new,
                                   e->n_chunks,    e->n_nodes,       e->n_lists,      batch->n,
                                   batch->q_dtype, batch->o_dtype,   batch->want_lse, e->mask != NULL,
                                   e->list_room,   batch->on_device, batch->group};
        mix(&hash, numbers, sizeof(numbers));
        for (uint32_t c = 0; c < e->n_chunks; c++) {
            uint64_t chunk[] = {e->chunks[c].chunk, e->chunks[c].generation, e->chunks[c].length,
                                e->chunks[c].n_new, e->chunks[c].number};
            mix(&hash, chunk, sizeof(chunk));
        }
        mix_nodes(&hash, e->nodes, e->n_nodes);
        if (e->n_lists > 0) {
            mix(&hash, e->sparse_indptr, (e->n_lists + 1u) * sizeof(uint32_t));
            mix(&hash, e->sparse_pages, e->sparse_indptr[e->n_lists] * sizeof(uint32_t));
        }
        if (e->mask != NULL) {
            mix(&hash, e->mask, e->n_q * attn_mask_row_bytes(e->n_new));
        }
    }
    for (uint32_t i = 0; i < batch->n_grouped; i++) {
        const attn_group_entry_t *e = &batch->grouped[i];
        mix(&hash, &e->n_q, sizeof(e->n_q));
        mix(&hash, e->n_nodes, sizeof(e->n_nodes));
        for (uint32_t r = 0; r < ATTN_RANKS_MAX; r++) {
            mix_nodes(&hash, e->nodes[r], e->n_nodes[r]);
        }
    }
    return XXH3_64bits_digest(&hash);
}

/* ---- the kernels' problem ---- */

/* Slots of the new tokens of one chunk: page and offset in the page. */
static uint64_t
layout_slots(engine_step_t *step, const kv_step_chunk_t *c, const uint32_t *pages, uint64_t at)
{
    uint32_t page_size = step->cache->geometry.page_size;

    for (uint32_t t = c->length; t < c->length + c->n_new; t++, at++) {
        step->slot_pages[at]   = pages[t / page_size];
        step->slot_offsets[at] = t % page_size;
    }
    return at;
}

/* Slots of the new tokens of entry i, in the order of its chunks. */
static void
layout_chunks(engine_step_t *step, uint32_t i)
{
    const engine_entry_t *e = &step->entries[i];
    uint64_t at             = step->slot_first[i];

    for (uint32_t c = 0; c < e->n_chunks; c++) {
        uint32_t n_pages;
        const uint32_t *pages = kv_step_pages(step->kv, i, c, &n_pages);
        at                    = layout_slots(step, &e->chunks[c], pages, at);
    }
}

/* The same with a mask: in the order of the tokens, those of other owners' chunks spare. */
static void
layout_masked(engine_step_t *step, uint32_t i)
{
    const attn_geometry_t *g = &step->cache->geometry;
    const engine_entry_t *e  = &step->entries[i];
    uint32_t first, n_pages, spare = 0;
    uint32_t n             = engine_entry_rows(g, e, &first);
    const uint32_t *spares = kv_step_spares(step->kv, i, &n_pages);
    uint64_t at            = step->slot_first[i];

    for (uint32_t t = first; t < first + n; t++, at++) {
        if (!engine_entry_owns(g, e, t)) {
            step->slot_pages[at]   = spares[spare / g->page_size];
            step->slot_offsets[at] = spare++ % g->page_size;
        }
    }
    for (uint32_t c = 0; c < e->n_chunks; c++) {
        uint32_t from;
        const uint32_t *pages = kv_step_pages(step->kv, i, c, &n_pages);
        new_tokens_of(g, e, &e->chunks[c], &from);
        if (e->chunks[c].n_new > 0) {
            layout_slots(step, &e->chunks[c], pages, step->slot_first[i] + from - first);
        }
    }
}

static void
layout_sizes(engine_step_t *step, bool want_lse)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint64_t element         = attn_dtype_size(g->kv_dtype);
    uint64_t rows = 0, o_rows = 0, states = 0;

    for (uint32_t i = 0; i < step->n; i++) {
        const engine_entry_t *e = &step->entries[i];
        rows += e->n_q;
        o_rows += e->n_nodes == 0 ? e->n_q : 0;
        states += (uint64_t)e->n_q * e->n_nodes;
    }
    step->sizes = (engine_sizes_t){
        .q      = rows * g->q_heads * g->head_dim_k * attn_dtype_size(step->q_dtype),
        .k      = step->n_new_rows * g->kv_heads * g->head_dim_k * element,
        .v      = step->n_new_rows * g->kv_heads * g->head_dim_v * element,
        .o      = o_rows * g->q_heads * g->head_dim_v * attn_dtype_size(step->o_dtype),
        .lse    = want_lse ? o_rows * g->q_heads * sizeof(float) : 0,
        .states = states * g->q_heads,
    };
    step->sizes.answer =
        step->sizes.o + step->sizes.lse + step->sizes.states * (8 + 4 * (uint64_t)g->head_dim_v);
}

void
engine_step_layout(engine_step_t *step)
{
    const attn_geometry_t *g = &step->cache->geometry;
    attn_kv_run_t *run       = step->runs;
    uint64_t slots           = 0;

    for (uint32_t i = 0; i < step->n; i++) {
        const engine_entry_t *e = &step->entries[i];
        attn_kv_run_t *first    = run;
        for (uint32_t c = 0; c < e->n_chunks; c++) {
            uint32_t n_pages;
            const uint32_t *pages = kv_step_pages(step->kv, i, c, &n_pages);
            uint32_t tokens       = visible(g, e, &e->chunks[c]);
            if (tokens > 0 && e->n_q > 0) {
                *run++ =
                    (attn_kv_run_t){.chunk = e->chunks[c].number, .length = tokens, .pages = pages};
                step->kv_bytes += (uint64_t)tokens * g->kv_heads * (g->head_dim_k + g->head_dim_v) *
                                  attn_dtype_size(g->kv_dtype);
            }
        }
        step->slot_first[i] = slots;
        uint32_t unused;
        slots += engine_entry_rows(g, e, &unused);
        if (e->mask != NULL) {
            layout_masked(step, i);
        } else {
            layout_chunks(step, i);
        }
        step->problem[i] = (attn_problem_entry_t){
            .kv_length     = e->base + e->n_new,
            .n_q           = e->n_q,
            .n_runs        = (uint32_t)(run - first),
            .runs          = first,
            .n_nodes       = e->n_nodes,
            .nodes         = e->nodes,
            .n_lists       = e->n_lists,
            .sparse_indptr = e->sparse_indptr,
            .sparse_pages  = e->sparse_pages,
            .dense_from    = e->base,
            .lists_change  = e->list_room > 0,
            .mask          = e->mask,
            .mask_tokens   = e->mask != NULL ? e->n_new : 0,
        };
    }
    layout_sizes(step, step->sizes.lse != 0);
}
