/*
 * track_queue.c: what a step queues on streams of its caller, and what became of it. Two kernels or
 * three a layer: bring_rows stores k, v and marks the layer, attend and merge answer. The marks
 * come back once a step: only what ran on the device counts, whoever launched it.
 */
#include "kernels/cuda/track_int.h"

#include "base/checked.h"
#include "base/status.h"

#define THREADS 256u
#define CTAS_OF_PROCESSOR 4u

/* ---- order ---- */

/* The driver marks the legacy stream by NULL; events follow it as any other. */
static CUstream
stream_of(const attn_track_t *t, const attn_track_call_t *call)
{
    return call->own_stream ? t->order.stream : (CUstream)call->stream;
}

attn_status_t
track_before(attn_track_t *t, void *stream)
{
    CUDA_VISIT(t->backend);
    attn_status_t status = visit.status;

    if (status == ATTN_OK && (status = cuda_order_before(&t->order, stream)) == ATTN_OK) {
        t->marks_come = false;
    }
    return status;
}

attn_status_t
track_after(attn_track_t *t, void *stream)
{
    CUDA_VISIT(t->backend);

    return visit.status == ATTN_OK ? cuda_order_after(&t->order, stream) : visit.status;
}

bool
track_wait(attn_track_t *t, uint64_t until_ns)
{
    CUDA_VISIT(t->backend);

    return visit.status != ATTN_OK || cuda_order_wait(&t->order, until_ns);
}

/* ---- a layer ---- */

static attn_status_t
check_rows(const attn_rows_t *rows, const char *name, uint32_t unit, uint32_t size)
{
    if ((uintptr_t)rows->at % unit != 0 || rows->row_stride * size % unit != 0 ||
        rows->head_stride * size % unit != 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%s is at %p, with strides %llu (token) and %llu (head) of %u bytes: in "
                         "the device's memory tokens and heads begin at multiples of %u bytes",
                         name, rows->at, (unsigned long long)rows->row_stride,
                         (unsigned long long)rows->head_stride, size, unit);
    }
    return ATTN_OK;
}

static attn_status_t
check_packed(const void *at, const char *name, uint32_t unit)
{
    return (uintptr_t)at % unit == 0
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "%s is at %p: not at a multiple of %u bytes", name, at,
                           unit);
}

static attn_status_t
check_call(const attn_track_t *t, const attn_track_call_t *call)
{
    attn_status_t status = ATTN_OK;

    if (call->k != NULL) {
        status = check_rows(call->k, "k", 16, 2);
        status = status == ATTN_OK ? check_rows(call->v, "v", 16, 2) : status;
    }
    if (call->q != NULL && status == ATTN_OK) {
        /* prefill.cu takes and gives 16 bytes at a time; q of another type than the cache's is
         * split before. */
        bool many     = t->views[call->plan].image.many_grid > 0;
        bool split    = t->shape.q_dtype != call->kv->dtype;
        uint32_t size = (uint32_t)attn_dtype_size(t->shape.q_dtype);
        status        = check_rows(call->q, "q", many && !split ? 16 : 4, size);
        size          = many ? 16 : (uint32_t)attn_dtype_size(t->shape.o_dtype);
        status        = status == ATTN_OK ? check_packed(call->o, "o", size) : status;
        status        = status == ATTN_OK ? check_packed(call->lse, "lse", sizeof(float)) : status;
    }
    return status;
}

cuda_bring_t
track_bring(const attn_track_t *t, const attn_track_call_t *call)
{
    const attn_kv_t *kv = call->kv;
    uint8_t *base       = (uint8_t *)(uintptr_t)t->device;

    return (cuda_bring_t){
        .head          = (const cuda_head_t *)(const void *)base,
        .mark          = (cuda_mark_t *)(void *)(base + t->marks) + call->layer,
        .pages         = (const uint32_t *)(const void *)(base + t->pages),
        .offsets       = (const uint32_t *)(const void *)(base + t->offsets),
        .k_store       = kv->k,
        .v_store       = kv->v,
        .k_page_stride = kv->k_page_stride * 2,
        .v_page_stride = kv->v_page_stride * 2,
        .page_size     = kv->page_size,
        .kv_heads      = kv->kv_heads,
        .k_row_bytes   = kv->head_dim_k * 2,
        .v_row_bytes   = kv->head_dim_v * 2,
        .exponent      = kv->dtype == ATTN_F16 ? 0x7c007c00u : 0x7f807f80u,
    };
}

static attn_status_t
launch_bring(const attn_track_t *t, const attn_track_call_t *call, CUstream stream)
{
    const attn_kv_t *kv = call->kv;
    cuda_bring_t x      = track_bring(t, call);
    uint64_t pieces     = t->shape.n_rows * kv->kv_heads * ((x.k_row_bytes + x.v_row_bytes) / 16);
    uint64_t most       = (uint64_t)t->backend->processors * CTAS_OF_PROCESSOR;
    uint64_t grid       = attn_min(attn_div_up(pieces, THREADS), most);

    if (call->k == NULL) {
        grid = 1;
    } else {
        x.k             = call->k->at;
        x.v             = call->v->at;
        x.k_row_stride  = call->k->row_stride * 2;
        x.k_head_stride = call->k->head_stride * 2;
        x.v_row_stride  = call->v->row_stride * 2;
        x.v_head_stride = call->v->head_stride * 2;
    }
    return cuda_launch(t->backend->bring_rows, (uint32_t)grid, 1, THREADS, 0, false, stream,
                       (void *[]){&x});
}

attn_status_t
track_attend(const attn_track_t *t, const attn_track_call_t *call, CUstream stream)
{
    const attn_workspace_t *w = &t->views[call->plan];
    attn_answer_t answer      = {.o = call->o, .lse = call->lse};
    uint64_t heads            = w->plan->problem.q_heads;
    uint8_t *base             = (uint8_t *)(uintptr_t)t->device;
    float *params = (float *)(void *)(base + t->params) + (uint64_t)call->layer * 3 * heads;
    cuda_args_t x;

    cuda_attend_fill(w, call->kv, call->params, &answer, &x);
    x.o     = call->o;
    x.lse   = call->lse;
    x.error = &((cuda_mark_t *)(void *)(base + t->marks))[call->layer].error;
    if (x.q_parts == 1) {
        x.q             = call->q->at;
        x.q_row_stride  = call->q->row_stride * 2;
        x.q_head_stride = call->q->head_stride * 2;
    }
    if (call->params->slopes != NULL) {
        x.slopes = params;
    }
    if (call->params->sinks != NULL) {
        x.sink_l = params + heads;
        x.sink_e = (const int32_t *)(const void *)(params + 2 * heads);
    }
    return cuda_attend_launch(w, call->kv, call->q, &x, stream);
}

/* Behind the layer, where it is sure to be waited for: so that is the only time that results()
 * waits. */
static attn_status_t
bring_marks(attn_track_t *t)
{
    attn_status_t status =
        CUDA_CALL(cuMemcpyDtoHAsync(t->host + t->marks, t->device + t->marks,
                                    t->layers * sizeof(cuda_mark_t), t->order.stream));

    t->marks_come = status == ATTN_OK;
    return status;
}

attn_status_t
track_enqueue(attn_track_t *t, const attn_track_call_t *call)
{
    CUstream stream      = stream_of(t, call);
    bool captures        = false;
    attn_status_t status = check_call(t, call);
    CUDA_VISIT(t->backend);

    if (status != ATTN_OK || (status = visit.status) != ATTN_OK ||
        (status = cuda_order_check(&t->order)) != ATTN_OK ||
        (status = cuda_is_captured(stream, &captures)) != ATTN_OK) {
        return status;
    }
    t->captured = t->captured || captures;
    if (!captures && t->order.replaying) {
        return attn_fail(ATTN_ERR_BUSY, "a graph of this step is being launched: "
                                        "attn_step_replayed() comes before further layers");
    }
    if (!captures && (status = cuda_order_follow(&t->order, stream)) != ATTN_OK) {
        return status;
    }
    if (t->shape.n_rows > 0) {
        status = launch_bring(t, call, stream);
    }
    if (status == ATTN_OK && call->q != NULL && t->shape.n_queries > 0) {
        status = track_attend(t, call, stream);
    }
    t->marks_come = false;
    if (status == ATTN_OK && call->own_stream) {
        status = bring_marks(t);
    }
    if (!captures) { /* of what failed a part may run */
        attn_status_t noted = cuda_order_note(&t->order, stream);
        status              = status == ATTN_OK ? noted : status;
    }
    return status;
}

/* ---- what became of it ---- */

attn_status_t
track_send(attn_track_t *t, uint64_t to, const void *from, uint64_t bytes)
{
    attn_status_t status =
        CUDA_CALL(cuMemcpyHtoDAsync(t->device + to, from, bytes, t->order.stream));

    return status == ATTN_OK ? CUDA_CALL(cuStreamSynchronize(t->order.stream)) : status;
}

/* A layer that went wrong: told, and as if nothing had been queued of it. */
static attn_status_t
report(attn_track_t *t, uint32_t layer, const cuda_mark_t *mark)
{
    uint64_t at          = t->marks + layer * sizeof(*mark);
    cuda_mark_t anew     = {.error = UINT64_MAX,
                            .stored =
                            mark->trouble & (CUDA_NOT_FINITE | CUDA_NOT_COME) ? 0 : mark->stored};
    attn_status_t status = track_send(t, at, &anew, sizeof(anew));

    if (status != ATTN_OK) {
        return status;
    }
    if (mark->trouble & CUDA_NOT_COME) {
        return attn_fail(ATTN_ERR_INCOMPLETE, "layer %u did not come: it was not enqueued", layer);
    }
    if (mark->trouble & CUDA_NOT_FINITE) {
        return attn_fail(ATTN_ERR_NUMERIC, "layer %u: a NaN or an infinity in k or v", layer);
    }
    if (mark->trouble & CUDA_DIFFERS) {
        return attn_fail(ATTN_ERR_CONFLICT,
                         "layer %u: k, v differ from those stored: abort the step to change them",
                         layer);
    }
    if (mark->trouble & CUDA_NOT_STORED) {
        return attn_fail(ATTN_ERR_INCOMPLETE,
                         "layer %u was asked about without k and v, before it had any", layer);
    }
    return attn_fail(ATTN_ERR_NUMERIC,
                     "layer %u: entry %llu, query %llu, head %llu: a NaN, a logit beyond 2^30 or a "
                     "sum that is not finite",
                     layer, mark->error >> 40, mark->error >> 12 & 0xfffffff, mark->error & 0xfff);
}

attn_status_t
track_results(attn_track_t *t, uint8_t *stored)
{
    attn_status_t status;
    CUDA_VISIT(t->backend);

    if ((status = visit.status) != ATTN_OK) {
        return status;
    }
    if (!t->marks_come && ((status = bring_marks(t)) != ATTN_OK ||
                           (status = CUDA_CALL(cuStreamSynchronize(t->order.stream))) != ATTN_OK)) {
        return status;
    }
    t->marks_come           = false;
    const cuda_mark_t *mark = (const cuda_mark_t *)(const void *)(t->host + t->marks);
    for (uint32_t l = 0; l < t->layers; l++) {
        bool wrong = mark[l].trouble != 0 || mark[l].error != UINT64_MAX;
        stored[l] =
            mark[l].stored == t->serial && !(mark[l].trouble & (CUDA_NOT_FINITE | CUDA_NOT_COME));
        if (wrong && status == ATTN_OK) {
            status = report(t, l, &mark[l]);
        }
    }
    return status;
}
