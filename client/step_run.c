/* step_run.c: one layer: the caller's tensors out to the owners, the answers in and merged. */
#include "client/step_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

attn_status_t
step_tensor_check(const attn_tensor_t *tensor, const char *name, attn_dtype_t dtype, uint32_t heads,
                  uint32_t dim, attn_tensor_t *complete)
{
    *complete = *tensor;
    if (tensor->data == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "%s.data is NULL", name);
    }
    if (tensor->dtype != dtype) {
        return attn_fail(ATTN_ERR_INVALID, "%s.dtype is %d: the step has %d (1 f32, 2 f16, 3 bf16)",
                         name, (int)tensor->dtype, (int)dtype);
    }
    complete->head_stride = tensor->head_stride != 0 ? tensor->head_stride : dim;
    complete->token_stride =
        tensor->token_stride != 0 ? tensor->token_stride : heads * complete->head_stride;
    if (complete->head_stride < dim || complete->token_stride < dim) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%s has strides %llu (token) and %llu (head): at least %u", name,
                         (unsigned long long)complete->token_stride,
                         (unsigned long long)complete->head_stride, dim);
    }
    return ATTN_OK;
}

/* Copy between a strided tensor and packed rows. */
static void
rows_copy(const attn_tensor_t *t, uint8_t *packed, uint64_t rows, uint32_t heads, uint32_t dim,
          bool pack)
{
    uint64_t size = attn_dtype_size(t->dtype), head = dim * size;

    for (uint64_t r = 0; r < rows; r++) {
        for (uint32_t h = 0; h < heads; h++) {
            uint8_t *strided =
                (uint8_t *)t->data + (r * t->token_stride + h * t->head_stride) * size;
            uint8_t *at = packed + (r * heads + h) * head;
            memcpy(pack ? at : strided, pack ? strided : at, head);
        }
    }
}

/* The tensor's rows, packed: where they are if they are packed already, else in the step's own
 * buffer `which`, filled if `fill`. NULL when out of memory. */
static void *
packed_rows(attn_step_t *step, uint32_t which, const attn_tensor_t *t, uint64_t rows,
            uint32_t heads, uint32_t dim, bool fill)
{
    uint64_t bytes = rows * heads * dim * attn_dtype_size(t->dtype);

    if (rows <= 1 ? t->head_stride == dim
                  : t->head_stride == dim && t->token_stride == (uint64_t)heads * dim) {
        return t->data;
    }
    if (step->packed_bytes[which] < bytes) {
        free(step->packed[which]);
        step->packed[which]       = malloc(bytes);
        step->packed_bytes[which] = step->packed[which] != NULL ? bytes : 0;
    }
    if (step->packed[which] != NULL && fill) {
        rows_copy(t, step->packed[which], rows, heads, dim, true);
    }
    return step->packed[which];
}

static void *
take(attn_step_t *step, uint32_t which, const attn_tensor_t *tensor, const char *name,
     attn_dtype_t dtype, uint64_t rows, uint32_t heads, uint32_t dim, attn_status_t *status)
{
    attn_tensor_t complete;

    if (*status != ATTN_OK || tensor == NULL || rows == 0) {
        return NULL;
    }
    *status = step_tensor_check(tensor, name, dtype, heads, dim, &complete);
    if (*status != ATTN_OK) {
        return NULL;
    }
    void *data = packed_rows(step, which, &complete, rows, heads, dim, which != 3);
    if (data == NULL) {
        *status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory to pack %s", name);
    }
    if (which == 3 && data != complete.data) {
        step->o_to = complete;
    }
    return data;
}

/* The workers check the pages; how many there are is used here already. */
static attn_status_t
lists_check(const attn_step_t *step, const attn_lists_t *lists)
{
    for (uint32_t i = 0; lists != NULL && i < step->n; i++) {
        const attn_lists_t *l = &lists[i];
        uint32_t room         = step->entries[i].list_room;
        if (l->n_lists == 0) {
            continue;
        }
        if (room == 0 || (l->n_lists != 1 && l->n_lists != step->cache->geometry.kv_heads) ||
            l->indptr == NULL || l->indptr[0] != 0) {
            return attn_fail(
                ATTN_ERR_INVALID,
                "lists[%u] has %u lists, and its entry list_room %u: 1 list or one per "
                "KV head (%u), from indptr[0] = 0 on, where there is room",
                i, l->n_lists, room, step->cache->geometry.kv_heads);
        }
        for (uint32_t j = 0; j < l->n_lists; j++) {
            if (l->indptr[j + 1] < l->indptr[j]) {
                return attn_fail(ATTN_ERR_INVALID, "lists[%u]: indptr[%u] is below the one before",
                                 i, j + 1);
            }
        }
        if (l->indptr[l->n_lists] > 0 && l->pages == NULL) {
            return attn_fail(ATTN_ERR_INVALID, "lists[%u] has %u pages, but pages is NULL", i,
                             l->indptr[l->n_lists]);
        }
        if (l->indptr[l->n_lists] > room) {
            return attn_fail(ATTN_ERR_TOO_LARGE, "lists[%u] has %u pages: its list_room is %u", i,
                             l->indptr[l->n_lists], room);
        }
    }
    return ATTN_OK;
}

static attn_status_t
run_check(const attn_step_t *step, uint32_t layer, const attn_tensor_t *q, const attn_tensor_t *k,
          const attn_tensor_t *v, const attn_tensor_t *o, const float *lse)
{
    if (!atomic_load(&step->idle)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "a run of the step is outstanding: wait for its completion");
    }
    if (atomic_load(&step->aborting)) {
        return attn_fail(ATTN_ERR_ABORTED, "the step is being aborted");
    }
    if (step->dead) {
        return attn_fail(ATTN_ERR_ABORTED, "the step was aborted: %s", step->sentence);
    }
    if (step->is_driven) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the step was begun with on_stream, and its worker waits for the stream: "
                         "attn_step_enqueue() takes its layers");
    }
    if (layer >= step->cache->geometry.layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", layer,
                         step->cache->geometry.layers);
    }
    if (step->q_rows > 0 && q != NULL && o == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "q is given, but o is NULL");
    }
    if ((k == NULL) != (v == NULL)) {
        return attn_fail(ATTN_ERR_INVALID, "%s is NULL, but the other is not",
                         k == NULL ? "k" : "v");
    }
    if (k == NULL && step->new_rows > 0 && !step->stored[layer] && !step->on_device) {
        return attn_fail(ATTN_ERR_INCOMPLETE, "layer %u has no k, v yet: send them with this run",
                         layer);
    }
    if (lse != NULL && !step->want_lse) {
        return attn_fail(ATTN_ERR_INVALID, "lse is given, but the batch has want_lse = false");
    }
    return ATTN_OK;
}

/* Spans of a tensor as pointers. */
static struct iovec *
pieces_put(struct iovec *at, const span_t *spans, uint32_t n, void *base)
{
    for (uint32_t i = 0; i < n; i++) {
        *at++ = (struct iovec){.iov_base = (uint8_t *)base + spans[i].offset,
                               .iov_len  = spans[i].bytes};
    }
    return at;
}

/* The lists of a run, in the words of a share's batch; returns how many. */
static uint32_t
share_lists(share_t *share, const attn_lists_t *lists)
{
    uint32_t n = 0;

    for (uint32_t p = 0; lists != NULL && share->lists != NULL && p < share->split->n_parts; p++) {
        const attn_lists_t *from = &lists[share->split->parts[p].entry];
        if (from->n_lists > 0) {
            share->lists[n++] = (engine_lists_t){
                .entry = p, .n_lists = from->n_lists, .indptr = from->indptr, .pages = from->pages};
        }
    }
    return n;
}

static uint64_t
pieces_bytes(const struct iovec *pieces, const struct iovec *end)
{
    uint64_t bytes = 0;

    for (const struct iovec *p = pieces; p < end; p++) {
        bytes += p->iov_len;
    }
    return bytes;
}

/* Of the shares of a step the last one that is sent: the others also wait for those sent after
 * them. An engine of this process is no way to speak of. */
static bool
is_measured(const share_t *share)
{
    const attn_step_t *step = share->step;

    return share == &step->shares[step->n_shares - 1] && step->client->rpc != NULL;
}

static void
run_done(void *arg, attn_status_t status, const char *sentence)
{
    share_t *share = arg;

    if (status == ATTN_OK && share->run_bytes > 0) {
        uint64_t now = attn_now_ns(), took = now - share->run_ns;
        way_meter_run(&share->link->meter, share->run_bytes,
                      took > share->compute_ns ? took - share->compute_ns : 0, now);
    }
    if (status != ATTN_OK && share->ranked && share->step->o != NULL) {
        step_rank_failed(share, status, sentence);
    }
    step_share_done(share, status, sentence);
}

static void
share_run(share_t *share, void *q, void *k, void *v, const attn_lists_t *lists)
{
    attn_step_t *step = share->step;
    link_run_t run    = {.layer      = step->layer,
                         .q          = share->pieces,
                         .compute_ns = &share->compute_ns,
                         .waits      = step->done == NULL,
                         .device     = step->direct ? &step->call : NULL,
                         .mapped     = step->mapped_run};

    if (step->direct) {
        step_share_start(share);
        share->link->ops->run(share->remote, &run, step_share_done, share);
        return;
    }

    run.n_q    = q != NULL ? share->n_q : 0;
    run.k      = pieces_put(share->pieces, share->q, run.n_q, q);
    run.n_k    = k != NULL ? share->n_k : 0;
    run.v      = pieces_put((struct iovec *)run.k, share->k, run.n_k, k);
    run.n_v    = k != NULL ? share->n_v : 0;
    run.answer = pieces_put((struct iovec *)run.v, share->v, run.n_v, v);
    struct iovec *end =
        pieces_put((struct iovec *)run.answer, share->o, run.n_q > 0 ? share->n_o : 0, step->o);
    end = pieces_put(end, share->lse, run.n_q > 0 ? share->n_lse : 0, step->lse);
    if (run.n_q > 0 && share->n_states > 0) {
        uint64_t bytes = share->n_states * (8 + 4 * (uint64_t)step->cache->geometry.head_dim_v);
        *end++         = (struct iovec){.iov_base = share->states, .iov_len = bytes};
    }
    run.n_answer = (uint32_t)(end - run.answer);
    run.lists    = share->lists;
    run.n_lists  = run.n_q > 0 ? share_lists(share, lists) : 0;
    if (run.n_q + run.n_k == 0) {
        return; /* nothing of this layer is this worker's */
    }
    share->run_bytes = is_measured(share) ? pieces_bytes(share->pieces, end) : 0;
    share->run_ns    = share->run_bytes > 0 ? attn_now_ns() : 0;
    link_t *link     = share->link;
    uint64_t sent_at = share->run_ns, bytes = share->run_bytes; /* done may start the next run */
    step_share_start(share);
    link->ops->run(share->remote, &run, run_done, share);
    if (sent_at > 0) {
        way_meter_sent(&link->meter, bytes, attn_now_ns() - sent_at);
    }
}

/* Every share answered: merge, unpack; or what is wrong. */
static attn_status_t
run_merge(attn_step_t *step)
{
    attn_status_t status = step->status;

    if (status == ATTN_OK) {
        step->stored[step->layer] |= step->runs_kv;
        if (step->o != NULL) {
            step_gather(step);
        }
        if (step->o_to.data != NULL) {
            rows_copy(&step->o_to, step->o, step->q_rows, step->cache->geometry.q_heads,
                      step->cache->geometry.head_dim_v, false);
        }
        return status;
    }
    /* Wrong arguments leave the step as it was; anything else ended it at some worker. */
    step->dead = step->rank_failed || !step_survives(status);
    if (step->rank_failed && status == ATTN_ERR_EXHAUSTED) { /* there is no layer to try again */
        status = ATTN_ERR_ABORTED;
    }
    return status;
}

/* Copies of tensors between a GPU and here that fail, or do not end in time, end the step. */
static attn_status_t
copies_fail(attn_step_t *step, attn_status_t status)
{
    step->dead = step->dead || status == ATTN_ERR_DEADLINE || status == ATTN_ERR_INTERNAL;
    snprintf(step->sentence, sizeof(step->sentence), "%s", attn_last_error());
    return status;
}

/* The same for a caller who waits, to the end. */
static attn_status_t
run_complete(attn_step_t *step)
{
    attn_status_t status = run_merge(step);

    if (status != ATTN_OK || !step->staged) {
        return status;
    }
    if ((status = step_tensors_return(step)) == ATTN_OK) {
        status = step_tensors_wait(step, step->deadline_ns);
    }
    return status == ATTN_OK ? status : copies_fail(step, status);
}

static void
run_ends(attn_step_t *step, attn_status_t status)
{
    attn_done_fn done = step->done;
    void *arg         = step->done_arg;
    char sentence[512];

    snprintf(sentence, sizeof(sentence), "%s", status == ATTN_OK ? "" : step->sentence);
    step->done = NULL;
    atomic_fetch_add(&step->calling, 1);
    atomic_store(&step->idle, true); /* before done: it may start the next run */
    step_complete(step, done, arg, status, sentence);
}

/* May a run go on without its caller? An engine in this process answers inside the call. */
static bool
goes_on_alone(const attn_step_t *step, attn_done_fn done)
{
    return done != NULL && step->client->rpc != NULL;
}

void
step_run_finish(attn_step_t *step)
{
    bool alone           = goes_on_alone(step, step->done);
    attn_status_t status = alone ? run_merge(step) : run_complete(step);

    if (alone && status == ATTN_OK && step->staged) {
        status = step_tensors_return(step);
        status = status == ATTN_OK ? step_carry(step) : status;
        if (status == ATTN_OK) {
            return;
        }
        copies_fail(step, status);
    }
    run_ends(step, status);
}

static attn_status_t
run_size_check(const attn_run_t *run)
{
    return run != NULL && run->size >= sizeof(*run)
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "run.size must be sizeof(attn_run_t)");
}

/* The tensors of a run, packed, in the host's memory. */
typedef struct packed_run {
    void *q, *k, *v, *o;
    float *lse;
} packed_run_t;

static attn_status_t
pack_run(attn_step_t *step, const attn_run_t *run, packed_run_t *p)
{
    const attn_geometry_t *g = &step->cache->geometry;
    attn_status_t status     = ATTN_OK;

    p->q =
        take(step, 0, run->q, "q", step->q_dtype, step->q_rows, g->q_heads, g->head_dim_k, &status);
    p->k   = take(step, 1, run->k, "k", g->kv_dtype, step->new_rows, g->kv_heads, g->head_dim_k,
                  &status);
    p->v   = take(step, 2, run->v, "v", g->kv_dtype, step->new_rows, g->kv_heads, g->head_dim_v,
                  &status);
    p->o   = take(step, 3, run->q != NULL ? run->o : NULL, "o", step->o_dtype, step->q_rows,
                  g->q_heads, g->head_dim_v, &status);
    p->lse = run->lse;
    if (status == ATTN_OK && step->want_lse && p->lse == NULL && p->q != NULL) {
        if (step->lse_unwanted == NULL) {
            step->lse_unwanted = malloc(step->q_rows * g->q_heads * sizeof(float));
        }
        p->lse = step->lse_unwanted;
        status = p->lse != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the LSE");
    }
    return status;
}

/* The tensors are here: out to all shares. The call has begun. */
static void
run_go(attn_step_t *step, const packed_run_t *p, const attn_lists_t *lists)
{
    step->o   = p->o;
    step->lse = p->lse;
    for (uint32_t s = 0; s < step->n_shares; s++) {
        step->shares[s].compute_ns = 0; /* unless something of this layer is this worker's */
        share_run(&step->shares[s], p->q, p->k, p->v, lists);
    }
    step_cancel_ranks(step);
    step_call_started(step);
}

/* The tensors of a run came from the GPU. */
static void
count_staged(attn_step_t *step)
{
    step->staging = false;
    atomic_fetch_add(step->mapped_run ? &step->client->runs_mapped : &step->client->runs_staged, 1);
}

void
step_run_carried(attn_step_t *step, attn_status_t status)
{
    packed_run_t p = {0};

    if (!step->staging) { /* they were on the way back */
        run_ends(step, status == ATTN_OK ? status : copies_fail(step, status));
        return;
    }
    if (status == ATTN_OK) {
        count_staged(step);
        status = pack_run(step, &step->staged_run, &p);
    }
    if (status == ATTN_OK) {
        run_go(step, &p, step->staged_run.lists);
    } else {
        step->status = copies_fail(step, status);
        step_call_started(step);
    }
}

/* The tensors, here or on their way. What was queued of those that fail is waited for: they are the
 * caller's again. */
static attn_status_t
run_take(attn_step_t *step, const attn_run_t *run, bool waits, attn_run_t *here)
{
    attn_status_t status = step_tensors_take(step, run, waits, here);

    if (status == ATTN_OK && step->staging && waits &&
        (status = step_tensors_wait(step, step->deadline_ns)) == ATTN_OK) {
        count_staged(step);
    }
    if (status != ATTN_OK) {
        copies_fail(step, status);
        if (step->staging) {
            step_tensors_wait(step, step->deadline_ns);
        }
        return attn_fail(status, "%s", step->sentence);
    }
    return ATTN_OK;
}

/* As if the call had not been made, where nobody can go on with it. */
static attn_status_t
run_carry(attn_step_t *step)
{
    attn_status_t status = step_carry(step);

    if (status != ATTN_OK) {
        copies_fail(step, status);
        step_tensors_wait(step, step->deadline_ns);
        step->done = NULL;
        atomic_store(&step->idle, true);
        return attn_fail(status, "%s", step->sentence);
    }
    return ATTN_OK;
}

/* Everything but waiting. done NULL: the caller waits. */
static attn_status_t
run_start(attn_step_t *step, const attn_run_t *run, attn_done_fn done, void *arg)
{
    attn_status_t status = run_check(step, run->layer, run->q, run->k, run->v, run->o, run->lse);
    packed_run_t p       = {0};
    attn_run_t here;

    if (status == ATTN_OK) {
        status = lists_check(step, run->lists);
    }
    if (status != ATTN_OK ||
        (status = run_take(step, run, !goes_on_alone(step, done), &here)) != ATTN_OK) {
        return status;
    }
    step->o_to.data = NULL;
    if (!step->direct && !step->staging && (status = pack_run(step, &here, &p)) != ATTN_OK) {
        return status;
    }
    step->layer    = run->layer;
    step->runs_kv  = here.k != NULL && step->new_rows > 0;
    step->done     = done;
    step->done_arg = arg;
    step_call_start(step);
    if (step->staging) {
        step->staged_run = here;
        return run_carry(step);
    }
    run_go(step, &p, run->lists);
    return ATTN_OK;
}

attn_status_t
attn_step_run_with(attn_step_t *step, const attn_run_t *run)
{
    attn_status_t status = step_may_wait("attn_step_run");

    if (status == ATTN_OK) {
        status = run_size_check(run);
    }
    if (status == ATTN_OK) {
        status = run_start(step, run, NULL, NULL);
    }
    if (status != ATTN_OK) {
        return status;
    }
    step_call_wait(step, step->deadline_ns);
    status = run_complete(step);
    return status == ATTN_OK ? ATTN_OK : attn_fail(status, "%s", step->sentence);
}

attn_status_t
attn_step_run(attn_step_t *step, uint32_t layer, const attn_tensor_t *q, const attn_tensor_t *k,
              const attn_tensor_t *v, const attn_tensor_t *o, float *lse)
{
    attn_run_t run = {
        .size = sizeof(run), .layer = layer, .q = q, .k = k, .v = v, .o = o, .lse = lse};

    return attn_step_run_with(step, &run);
}

uint64_t
attn_step_compute_ns(const attn_step_t *step)
{
    uint64_t longest = 0;

    for (uint32_t s = 0; s < step->n_shares; s++) {
        longest = attn_max(longest, step->shares[s].compute_ns);
    }
    return longest;
}

attn_status_t
attn_step_submit_with(attn_step_t *step, const attn_run_t *run, attn_done_fn done, void *arg)
{
    attn_status_t status = run_size_check(run);

    if (status != ATTN_OK) {
        return status;
    }
    if (done == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "done is NULL: attn_step_run() waits");
    }
    return run_start(step, run, done, arg);
}

attn_status_t
attn_step_submit(attn_step_t *step, uint32_t layer, const attn_tensor_t *q, const attn_tensor_t *k,
                 const attn_tensor_t *v, const attn_tensor_t *o, float *lse, attn_done_fn done,
                 void *arg)
{
    attn_run_t run = {
        .size = sizeof(run), .layer = layer, .q = q, .k = k, .v = v, .o = o, .lse = lse};

    return attn_step_submit_with(step, &run, done, arg);
}

void
client_step_sizes(const attn_step_t *step, uint64_t *q, uint64_t *k, uint64_t *v, uint64_t *o,
                  uint64_t *lse)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint64_t element         = attn_dtype_size(g->kv_dtype);

    *q   = step->q_rows * g->q_heads * g->head_dim_k * attn_dtype_size(step->q_dtype);
    *k   = step->new_rows * g->kv_heads * g->head_dim_k * element;
    *v   = step->new_rows * g->kv_heads * g->head_dim_v * element;
    *o   = step->q_rows * g->q_heads * g->head_dim_v * attn_dtype_size(step->o_dtype);
    *lse = step->want_lse ? step->q_rows * g->q_heads * sizeof(float) : 0;
}
