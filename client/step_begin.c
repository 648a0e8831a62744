/* step_begin.c: check a batch, find out where its sequences are, and begin at all owners. */
#include "client/step_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#define BEGIN_ATTEMPTS 6
#define BEGIN_ATTEMPTS_MOVED 32 /* where chunks are moved faster than a layout comes */

/* The workers check the pages; where the lists begin and end is used here already. */
static attn_status_t
sparse_check(const attn_entry_t *e, uint32_t i)
{
    if (e->n_lists > 0 && (e->sparse_indptr == NULL || e->sparse_pages == NULL)) {
        return attn_fail(ATTN_ERR_INVALID, "entry %u: sparse_indptr or sparse_pages is NULL", i);
    }
    for (uint32_t l = 0; l < e->n_lists; l++) {
        if (e->sparse_indptr[0] != 0 || e->sparse_indptr[l + 1] < e->sparse_indptr[l]) {
            return attn_fail(ATTN_ERR_INVALID,
                             "entry %u: sparse_indptr[%u] is %u, [%u] is %u: from 0, ascending", i,
                             l, e->sparse_indptr[l], l + 1, e->sparse_indptr[l + 1]);
        }
    }
    return ATTN_OK;
}

static attn_status_t
batch_check(const attn_cache_t *cache, const attn_batch_t *batch)
{
    if (batch == NULL || batch->size < sizeof(*batch)) {
        return attn_fail(ATTN_ERR_INVALID, "batch.size must be sizeof(attn_batch_t)");
    }
    if (batch->n < 1 || batch->n > ATTN_KV_ENTRIES_MAX || batch->entries == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "the batch has %u entries: 1 to %u", batch->n,
                         ATTN_KV_ENTRIES_MAX);
    }
    if (attn_dtype_size(batch->q_dtype) == 0 ||
        (batch->o_dtype != ATTN_DTYPE_NONE && attn_dtype_size(batch->o_dtype) == 0)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "q_dtype %d or o_dtype %d is no dtype: 1 f32, 2 f16, 3 bf16",
                         (int)batch->q_dtype, (int)batch->o_dtype);
    }
    if ((unsigned)batch->memory > ATTN_MEMORY_CUDA) {
        return attn_fail(ATTN_ERR_INVALID, "memory is %d: 0 (auto), 1 (host) or 2 (CUDA)",
                         (int)batch->memory);
    }
    if (batch->timeout_ms > ENGINE_TIMEOUT_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "timeout_ms is %u: at most %u", batch->timeout_ms,
                         ENGINE_TIMEOUT_MS_MAX);
    }
    uint64_t rows = 0, new_rows = 0;
    for (uint32_t i = 0; i < batch->n; i++) {
        const attn_entry_t *e = &batch->entries[i];
        rows += e->n_q;
        new_rows += e->n_new;
        if (rows > ENGINE_ROWS_MAX || new_rows > ENGINE_ROWS_MAX) {
            return attn_fail(ATTN_ERR_TOO_LARGE,
                             "entry %u: n_q or n_new add up to more than %u query rows or new "
                             "tokens in the batch",
                             i, ENGINE_ROWS_MAX);
        }
        if (e->n_q > e->base && e->n_q - e->base > e->n_new) {
            return attn_fail(ATTN_ERR_INVALID, "entry %u: n_q is %u: at most base + n_new = %llu",
                             i, e->n_q, (unsigned long long)(e->base + e->n_new));
        }
        if (e->n_lists != 0 && e->n_lists != 1 && e->n_lists != cache->geometry.kv_heads) {
            return attn_fail(
                ATTN_ERR_INVALID,
                "entry %u: sparse has %u lists (n_lists): none, 1, or one per KV head (%u)", i,
                e->n_lists, cache->geometry.kv_heads);
        }
        attn_status_t status = sparse_check(e, i);
        if (status == ATTN_OK && e->mask != NULL &&
            (status = attn_mask_check(e->mask, e->n_q, e->n_new)) != ATTN_OK) {
            attn_fail_in(status, "entry %u: ", i);
        }
        if (status != ATTN_OK) {
            return status;
        }
    }
    return ATTN_OK;
}

static int
by_id(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static attn_status_t
no_sequence_twice(const attn_batch_t *batch)
{
    uint64_t *ids = malloc(batch->n * sizeof(*ids));
    attn_status_t status =
        ids != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a batch");

    for (uint32_t i = 0; ids != NULL && i < batch->n; i++) {
        ids[i] = batch->entries[i].seq.id;
    }
    if (ids != NULL) {
        qsort(ids, batch->n, sizeof(*ids), by_id);
    }
    for (uint32_t i = 1; status == ATTN_OK && i < batch->n; i++) {
        if (ids[i] == ids[i - 1]) {
            status = attn_fail(ATTN_ERR_INVALID, "sequence %llx is in the batch twice",
                               (unsigned long long)ids[i]);
        }
    }
    free(ids);
    return status;
}

static attn_status_t
step_new(attn_cache_t *cache, const attn_batch_t *batch, uint64_t deadline_ns, attn_step_t **step_p)
{
    attn_step_t *step = calloc(1, sizeof(*step));

    if (step == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    pthread_mutex_init(&step->lock, NULL);
    step->cache       = cache;
    step->client      = cache->client;
    step->deadline_ns = deadline_ns;
    step->q_dtype     = batch->q_dtype;
    step->o_dtype     = batch->o_dtype != ATTN_DTYPE_NONE ? batch->o_dtype : batch->q_dtype;
    step->want_lse    = batch->want_lse;
    step->memory      = batch->memory;
    step->on_stream   = batch->on_stream;
    step->stream_gpu  = batch->gpu;
    step->n           = batch->n;
    step->entries     = calloc(batch->n, sizeof(*step->entries));
    step->stored      = calloc(cache->geometry.layers, 1);
    atomic_init(&step->idle, true);
    if (step->entries == NULL || step->stored == NULL) {
        step_free(step);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step of %u entries", batch->n);
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        const attn_entry_t *e = &batch->entries[i];
        step->entries[i]      = (step_entry_t){.seq       = e->seq,
                                               .base      = e->base,
                                               .n_q       = e->n_q,
                                               .n_new     = e->n_new,
                                               .masked    = e->mask != NULL,
                                               .list_room = e->list_room,
                                               .q_row     = step->q_rows,
                                               .new_row   = step->new_rows};
        step->q_rows += e->n_q;
        step->new_rows += e->n_new;
        step->list_room += e->list_room;
    }
    while (step->id == 0) {
        if (getrandom(&step->id, sizeof(step->id), 0) != sizeof(step->id)) {
            step->id = attn_now_ns() ^ (uint64_t)(uintptr_t)step << 16;
        }
    }
    *step_p = step;
    return ATTN_OK;
}

/* Fetch the layouts that are missing, too short, or all of them if fresh. */
static attn_status_t
begin_layouts(attn_cache_t *cache, const attn_batch_t *batch, uint64_t deadline_ns, bool fresh)
{
    attn_seq_t *seqs     = malloc(batch->n * sizeof(*seqs));
    uint64_t *tokens     = malloc(batch->n * sizeof(*tokens));
    uint64_t *bases      = malloc(batch->n * sizeof(*bases));
    attn_status_t status = ATTN_OK;
    uint32_t n           = 0;

    if (seqs == NULL || tokens == NULL || bases == NULL) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a batch of %u entries", batch->n);
    }
    pthread_mutex_lock(&cache->lock);
    for (uint32_t i = 0; status == ATTN_OK && i < batch->n; i++) {
        const attn_entry_t *e         = &batch->entries[i];
        const cached_layout_t *layout = layout_find(cache, e->seq);
        uint64_t need                 = 0;
        if (!attn_add(e->base, e->n_new, &need)) {
            status = attn_fail(ATTN_ERR_INVALID, "entry %u: base %llu + n_new exceeds 64 bits", i,
                               (unsigned long long)e->base);
        } else if (fresh || layout == NULL ||
                   attn_div_up(need, cache->geometry.chunk_size) > layout->n_chunks) {
            seqs[n]     = e->seq;
            bases[n]    = e->base;
            tokens[n++] = e->n_new > 0 ? need : 0;
        }
    }
    pthread_mutex_unlock(&cache->lock);
    if (status == ATTN_OK && n > 0) {
        status = layouts_fetch(cache, seqs, bases, tokens, n,
                               attn_min(deadline_ns, client_deadline(cache->client)));
    }
    free(seqs);
    free(tokens);
    free(bases);
    return status;
}

/* Split by the cached layouts. */
static attn_status_t
begin_split(attn_step_t *step, uint64_t *epoch_p)
{
    attn_cache_t *cache     = step->cache;
    split_layout_t *layouts = calloc(step->n, sizeof(*layouts));
    split_entry_t *entries  = calloc(step->n, sizeof(*entries));
    attn_status_t status    = layouts != NULL && entries != NULL
                                  ? ATTN_OK
                                  : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u layouts", step->n);

    *epoch_p = UINT64_MAX;
    pthread_mutex_lock(&cache->lock);
    for (uint32_t i = 0; status == ATTN_OK && i < step->n; i++) {
        const step_entry_t *e         = &step->entries[i];
        const cached_layout_t *layout = layout_find(cache, e->seq);
        if (layout == NULL) { /* another thread changed the sequence just now */
            status = attn_fail(ATTN_ERR_STALE, "sequence %llx was changed meanwhile",
                               (unsigned long long)e->seq.id);
        } else {
            entries[i] = (split_entry_t){
                .base = e->base, .n_q = e->n_q, .n_new = e->n_new, .path = e->masked};
            layouts[i] = (split_layout_t){
                .seq = layout->seq, .n_chunks = layout->n_chunks, .chunks = layout->chunks};
            *epoch_p = attn_min(*epoch_p, layout->epoch);
        }
    }
    if (status == ATTN_OK) {
        status = split_batch(entries, layouts, step->n, cache->geometry.chunk_size, &step->split);
    }
    pthread_mutex_unlock(&cache->lock);
    free(layouts);
    free(entries);
    return status;
}

static uint64_t
spans_bytes(const span_t *spans, uint32_t n)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < n; i++) {
        bytes += spans[i].bytes;
    }
    return bytes;
}

attn_status_t
step_link(const attn_step_t *step, uint32_t worker, link_t **link_p)
{
    attn_client_t *client = step->client;
    char address[64];
    bool alive;
    attn_status_t status = client->control->ops->worker(client->control, worker, address, &alive);

    return status == ATTN_OK ? links_get(client->links, address, link_p) : status;
}

/* The way to the share's worker, if a run fits through it. */
static attn_status_t
share_link(share_t *share)
{
    attn_status_t status = step_link(share->step, share->split->worker, &share->link);

    if (status != ATTN_OK || share->link->ops->run_bytes_max == 0) {
        return status;
    }
    uint64_t bytes = spans_bytes(share->q, share->n_q) + spans_bytes(share->k, share->n_k) +
                     spans_bytes(share->v, share->n_v);
    return bytes <= share->link->ops->run_bytes_max
               ? ATTN_OK
               : attn_fail(ATTN_ERR_TOO_LARGE,
                           "q, k and v of a layer are %llu bytes, at most %llu to one worker over "
                           "%s: cut the "
                           "batch into several steps",
                           (unsigned long long)bytes,
                           (unsigned long long)share->link->ops->run_bytes_max,
                           share->link->ops->name);
}

/* The worker's words for its share: freed with free(). All refs are in one array. */
static attn_status_t
share_batch(share_t *share, const attn_batch_t *batch, uint64_t epoch, engine_batch_t *out)
{
    attn_step_t *step          = share->step;
    const split_share_t *split = share->split;
    uint64_t refs              = 0;

    for (uint32_t p = 0; p < split->n_parts; p++) {
        refs += split->parts[p].n_refs;
    }
    engine_entry_t *entries =
        calloc(1, split->n_parts * sizeof(engine_entry_t) + refs * sizeof(kv_step_chunk_t));
    if (entries == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a share of %u entries", split->n_parts);
    }
    kv_step_chunk_t *chunk = (kv_step_chunk_t *)(void *)(entries + split->n_parts);
    for (uint32_t p = 0; p < split->n_parts; p++) {
        const split_part_t *part = &split->parts[p];
        const attn_entry_t *e    = &batch->entries[part->entry];
        entries[p]               = (engine_entry_t){.seq           = e->seq.id,
                                                    .base          = e->base,
                                                    .n_q           = part->attends ? e->n_q : 0,
                                                    .n_new         = e->n_new,
                                                    .n_chunks      = part->n_refs,
                                                    .chunks        = chunk,
                                                    .n_nodes       = part->attends ? part->n_nodes : 0,
                                                    .nodes         = part->nodes,
                                                    .n_lists       = e->n_lists,
                                                    .sparse_indptr = e->sparse_indptr,
                                                    .sparse_pages  = e->sparse_pages,
                                                    .mask          = part->attends ? e->mask : NULL,
                                                    .list_room     = e->list_room};
        for (uint32_t r = 0; r < part->n_refs; r++) {
            const split_ref_t *ref = &part->refs[r];
            *chunk++               = (kv_step_chunk_t){.chunk      = ref->id,
                                                       .generation = ref->generation,
                                                       .length     = ref->length,
                                                       .n_new      = ref->n_new,
                                                       .number     = ref->number};
        }
    }
    *out = (engine_batch_t){.epoch       = epoch,
                            .cache       = step->cache->id,
                            .step_id     = step->id,
                            .n           = split->n_parts,
                            .entries     = entries,
                            .q_dtype     = step->q_dtype,
                            .o_dtype     = step->o_dtype,
                            .want_lse    = step->want_lse,
                            .deadline_ns = step->deadline_ns};
    if (share->ranked) {
        out->group     = step->group->id;
        out->grouped   = step->grouped;
        out->n_grouped = step->n_grouped;
    }
    return ATTN_OK;
}

static void
share_begin(share_t *share, const attn_batch_t *batch, uint64_t epoch)
{
    uint64_t state   = 8 + 4 * (uint64_t)share->step->cache->geometry.head_dim_v;
    link_room_t room = {.in = spans_bytes(share->q, share->n_q) +
                              spans_bytes(share->k, share->n_k) + spans_bytes(share->v, share->n_v),
                        .out = spans_bytes(share->o, share->n_o) +
                               spans_bytes(share->lse, share->n_lse) + share->n_states * state};
    engine_batch_t words;
    link_step_t *remote  = NULL;
    attn_status_t status = share_link(share);

    step_share_start(share);
    if (status == ATTN_OK && (status = share_batch(share, batch, epoch, &words)) == ATTN_OK) {
        share->step->on_device =
            (share->step->memory == ATTN_MEMORY_CUDA || share->step->on_stream) &&
            step_gpu(share->step) >= 0;
        words.on_device = share->step->on_device;
        room.gpu        = step_may_map(share->step);
        room.insists    = share->step->client->gpu_way == ATTN_GPU_MAPPED;
        step_driven_ask(share->step, &room);
        status =
            share->link->ops->begin(share->link, &words, &room, step_share_done, share, &remote);
        free((void *)words.entries);
    }
    pthread_mutex_lock(&share->step->lock);
    share->remote = remote;
    pthread_mutex_unlock(&share->step->lock);
    if (status != ATTN_OK) {
        step_share_done(share, status, attn_last_error());
    }
}

/* A begin, over several attempts. */
typedef struct beginning {
    attn_cache_t *cache;
    const attn_batch_t *batch;
    uint64_t deadline_ns;
    bool asked;        /* were workers, by layouts as the coordinator has them? */
    bool alone;        /* without a group */
    group_wish_t wish; /* of the last attempt's group; ranks 0: it had none */
} beginning_t;

static attn_status_t
begin_once(beginning_t *b, bool fresh, attn_step_t **step_p)
{
    const attn_batch_t *batch = b->batch;
    attn_step_t *step         = NULL;
    uint64_t epoch;
    char sentence[512];
    attn_status_t status = begin_layouts(b->cache, batch, b->deadline_ns, fresh);

    b->asked      = status == ATTN_OK;
    b->wish.ranks = 0;
    if (status != ATTN_OK ||
        (status = step_new(b->cache, batch, b->deadline_ns, &step)) != ATTN_OK) {
        return status;
    }
    if ((status = begin_split(step, &epoch)) != ATTN_OK ||
        (!b->alone && (status = step_group(step)) != ATTN_OK) ||
        (status = step_layout(step)) != ATTN_OK) {
        step_free(step);
        return status;
    }
    step_publish(step);
    step_call_start(step);
    for (uint32_t s = 0; s < step->n_shares; s++) {
        share_begin(&step->shares[s], batch, epoch);
    }
    step_call_started(step);
    status = step_call_wait(step, step->deadline_ns);
    if (status == ATTN_OK && (status = step_driven_begin(step)) != ATTN_OK) {
        snprintf(step->sentence, sizeof(step->sentence), "%s", attn_last_error());
    }
    if (status != ATTN_OK) {
        snprintf(sentence, sizeof(sentence), "%s", step->sentence);
        b->wish       = step->wish;
        b->wish.ranks = step->group != NULL ? step->wish.ranks : 0;
        step_abort_shares(step);
        step_retire(step);
        return attn_fail(status, "%s", sentence);
    }
    *step_p = step;
    return ATTN_OK;
}

/* May a fresh layout cure this, or a fresh ticket? */
static bool
is_about_age(attn_status_t status)
{
    return status == ATTN_ERR_STALE || status == ATTN_ERR_NOT_FOUND ||
           status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_LOST || status == ATTN_ERR_DENIED;
}

/* Where a group may be done without, a rank that refuses is no reason not to begin. */
static attn_status_t
begin_somehow(beginning_t *b, bool fresh, attn_step_t **step_p)
{
    char sentence[512];
    attn_status_t status = begin_once(b, fresh, step_p);

    if (status == ATTN_OK || is_about_age(status) || b->wish.ranks == 0 || b->wish.insists ||
        attn_now_ns() >= b->deadline_ns) {
        return status;
    }
    snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
    group_wish_t refused  = b->wish;
    attn_status_t because = status;
    b->alone              = true;
    status                = begin_once(b, false, step_p);
    if (status == ATTN_OK) { /* it was the group's fault */
        groups_refuse(b->cache->client->groups, &refused, because, sentence);
    }
    return status;
}

attn_status_t
attn_step_begin(attn_cache_t *cache, const attn_batch_t *batch, attn_step_t **step_p)
{
    attn_status_t status = step_may_wait("attn_step_begin");

    if (status == ATTN_OK) {
        status = batch_check(cache, batch);
    }
    if (status == ATTN_OK) {
        status = no_sequence_twice(batch);
    }
    if (status != ATTN_OK) {
        return status;
    }
    /* The layouts we keep may be old: what they cause is tried again with fresh ones, and the
     * last word is what holds with those. */
    uint32_t timeout =
        batch->timeout_ms != 0 ? batch->timeout_ms : cache->client->options.step_timeout_ms;
    uint64_t deadline = attn_now_ns() + timeout * ATTN_NS_PER_MS;
    beginning_t b     = {.cache = cache, .batch = batch, .deadline_ns = deadline};
    uint32_t attempts = BEGIN_ATTEMPTS;
    status            = begin_somehow(&b, false, step_p);
    for (uint32_t attempt = 1; is_about_age(status) && attempt < attempts; attempt++) {
        if (status == ATTN_ERR_DENIED) { /* what the next attempt meets tells more than this */
            client_renew(cache->client, deadline);
        }
        attn_status_t again = begin_somehow(&b, true, step_p);
        bool same           = again == status;
        bool moved          = b.asked && (again == ATTN_ERR_STALE || again == ATTN_ERR_NOT_FOUND);
        status              = again;
        attempts            = moved ? BEGIN_ATTEMPTS_MOVED : BEGIN_ATTEMPTS;
        if (same && !moved) { /* chunks may be moved time and again */
            break;
        }
    }
    return status;
}
