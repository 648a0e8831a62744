/*
 * device.c: steps whose tensors are in the device's memory. They are on a track of the backend
 * (kernels.h): begin sends their tables there, layers are queued on streams of the caller, or come
 * with a graph that was captured of another step, and commit waits and reads what became of them.
 *
 * Pages go to nobody else while anything that was queued may run. So a step that is to abort waits
 * a little, and if that is not enough it stays, refused to everybody, until a tick finds the device
 * through with it.
 */
#include "engine/engine_int.h"

#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>

static const attn_track_ops_t *
tracks_of(const engine_t *engine)
{
    return engine->backend->ops->tracks;
}

int
engine_gpu(const engine_t *engine)
{
    return tracks_of(engine) != NULL ? (int)engine->ordinal : -1;
}

attn_status_t
engine_track_take(engine_t *engine, engine_step_t *step)
{
    attn_track_step_t what = {
        .cache    = step->cache->id,
        .geometry = &step->cache->geometry,
        .plans    = (const attn_plan_t *const *)step->plans,
        .n_plans  = step->cache->n_variants,
        .q_dtype  = step->q_dtype,
        .o_dtype  = step->o_dtype,
        .n_rows   = step->n_new_rows,
        .pages    = step->slot_pages,
        .offsets  = step->slot_offsets,
    };

    if (tracks_of(engine) == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "%s computes on %s: tensors and streams of a GPU are for a worker on that "
                         "GPU, in this process",
                         engine->name, engine->backend->ops->name);
    }
    return tracks_of(engine)->take(engine->backend, &what, &step->track);
}

void
engine_track_interrupt(engine_t *engine, const engine_step_t *step)
{
    if (step->driven) {
        tracks_of(engine)->interrupt(step->track);
    }
}

bool
engine_track_settle(engine_t *engine, engine_step_t *step, uint64_t until_ns)
{
    engine_track_interrupt(engine, step);
    return step->track == NULL || (tracks_of(engine)->wait(step->track, until_ns) &&
                                   tracks_of(engine)->clear(step->track, until_ns));
}

void
engine_track_give(engine_t *engine, engine_step_t *step)
{
    if (step->track == NULL) {
        return;
    }
    engine_track_settle(engine, step, UINT64_MAX);
    bool driven = step->driven;
    pthread_mutex_lock(&engine->lock);
    step->driven = false;
    pthread_mutex_unlock(&engine->lock);
    tracks_of(engine)->give(step->track);
    step->track = NULL;
    if (driven) {
        step->lane.gone(step->lane.arg);
    }
}

static attn_status_t
results(engine_t *engine, engine_step_t *step)
{
    engine_track_interrupt(engine, step); /* what the runner wants is answered by now */
    if (!tracks_of(engine)->wait(step->track, step->deadline_ns)) {
        return attn_fail(ATTN_ERR_DEADLINE,
                         "step %016llx: what was queued for it did not end before its deadline",
                         (unsigned long long)step->id);
    }
    attn_status_t status = tracks_of(engine)->results(step->track, step->stored);
    return status == ATTN_OK
               ? ATTN_OK
               : attn_fail_in(status, "step %016llx on %s: ", (unsigned long long)step->id,
                              engine->name);
}

attn_status_t
engine_track_finish(engine_t *engine, engine_step_t *step)
{
    return step->on_device || step->off_host ? results(engine, step) : ATTN_OK;
}

/* Layers of a graph are known from here on only: they count, and took no time of anybody. Of a step
 * that stores nothing no layer says that it ran: something was queued, so all did. */
void
engine_track_count(engine_t *engine, const engine_step_t *step)
{
    bool asked = (step->on_device || step->driven) && step->queued && step->sizes.q > 0;

    for (uint32_t l = 0; asked && l < step->cache->geometry.layers; l++) {
        if (step->n_new_rows == 0 || step->stored[l]) {
            engine_count_run(engine, step, 0);
        }
    }
}

/* ---- layers ---- */

static attn_status_t
check_call(const engine_step_t *step, const engine_call_t *call)
{
    const char *missing = NULL;

    if (call->layer >= step->cache->geometry.layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", call->layer,
                         step->cache->geometry.layers);
    }
    if (step->n_new_rows > 0 && (call->k == NULL) != (call->v == NULL)) {
        missing = call->k == NULL ? "k" : "v";
    } else if (call->q != NULL && step->sizes.q > 0 && call->o == NULL) {
        missing = "o";
    }
    return missing == NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "layer %u: %s is missing", call->layer, missing);
}

/* own_stream: on one of the track's. */
static attn_status_t
enqueue(engine_t *engine, engine_step_t *step, const engine_call_t *call, bool own_stream)
{
    uint32_t variant       = step->cache->variant_of[call->layer];
    attn_track_call_t what = {.layer      = call->layer,
                              .plan       = variant,
                              .params     = &step->cache->geometry.layer_table[call->layer],
                              .q          = step->sizes.q > 0 ? call->q : NULL,
                              .k          = step->n_new_rows > 0 ? call->k : NULL,
                              .v          = step->n_new_rows > 0 ? call->v : NULL,
                              .o          = call->o,
                              .lse        = step->sizes.lse > 0 ? call->lse : NULL,
                              .stream     = call->stream,
                              .own_stream = own_stream};
    attn_kv_t kv;

    engine_kv_view(engine, step->cache, call->layer, &kv);
    what.kv              = &kv;
    attn_status_t status = tracks_of(engine)->enqueue(step->track, &what);
    step->queued         = step->queued || what.q != NULL;
    return status == ATTN_OK
               ? ATTN_OK
               : attn_fail_in(status,
                              "step %016llx, layer %u on %s: ", (unsigned long long)step->id,
                              call->layer, engine->name);
}

static attn_status_t
check_on_device(const engine_step_t *step)
{
    return step->on_device
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "step %016llx was not begun to be enqueued: say so with begin",
                           (unsigned long long)step->id);
}

attn_status_t
engine_step_enqueue(engine_t *engine, uint64_t step_id, const engine_call_t *call)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = check_on_device(step)) == ATTN_OK &&
        (status = check_call(step, call)) == ATTN_OK) {
        status = enqueue(engine, step, call, false);
    }
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_replay(engine_t *engine, uint64_t step_id, void *stream, bool launched)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = check_on_device(step)) == ATTN_OK) {
        const attn_track_ops_t *ops = tracks_of(engine);
        status                      = (launched ? ops->after : ops->before)(step->track, stream);
        step->queued                = step->queued || status == ATTN_OK;
    }
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_graph(engine_t *engine, uint64_t step_id, uint64_t *graph_p)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = check_on_device(step)) == ATTN_OK) {
        *graph_p = tracks_of(engine)->id(step->track);
    }
    engine_step_leave(engine, step);
    return status;
}

static attn_status_t
check_not_driven(const engine_step_t *step)
{
    return !step->driven
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "the layers of step %016llx come from the runner's device: no others do",
                           (unsigned long long)step->id);
}

/* A track for a step that was begun without one. */
static attn_status_t
ensure_track(engine_t *engine, engine_step_t *step)
{
    if (step->on_host) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the tensors of step %016llx were in the host's memory: all, or none",
                         (unsigned long long)step->id);
    }
    if (step->track != NULL) {
        return ATTN_OK;
    }
    for (uint32_t i = 0; i < step->n; i++) {
        if (step->entries[i].n_nodes > 0 || step->entries[i].list_room > 0) {
            return attn_fail(ATTN_ERR_UNSUPPORTED,
                             "entry %u has nodes or list_room: not with tensors in the device's "
                             "memory",
                             i);
        }
    }
    return engine_track_take(engine, step);
}

static attn_status_t
run_device(engine_t *engine, engine_step_t *step, const engine_call_t *call)
{
    uint64_t start = attn_now_ns();
    attn_status_t status;

    if ((status = check_not_driven(step)) != ATTN_OK ||
        (status = check_call(step, call)) != ATTN_OK ||
        (status = ensure_track(engine, step)) != ATTN_OK) {
        return status;
    }
    step->off_host = true;
    if ((status = enqueue(engine, step, call, true)) == ATTN_OK &&
        (status = results(engine, step)) == ATTN_OK && call->q != NULL && !step->on_device) {
        engine_count_run(engine, step, attn_now_ns() - start);
    }
    return status;
}

attn_status_t
engine_step_run_device(engine_t *engine, uint64_t step_id, const engine_call_t *call)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    status = run_device(engine, step, call);
    if (status == ATTN_ERR_INTERNAL && step->track != NULL) { /* a part may have been queued */
        tracks_of(engine)->wait(step->track, step->deadline_ns);
    }
    engine_step_leave(engine, step);
    return status;
}

attn_status_t
engine_step_lend(engine_t *engine, uint64_t step_id)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status == ATTN_OK) {
        status = ensure_track(engine, step);
        engine_step_leave(engine, step);
    }
    return status;
}

static attn_rows_t
packed(void *at, uint64_t heads, uint64_t dim)
{
    return (attn_rows_t){.at = at, .row_stride = heads * dim, .head_stride = dim};
}

attn_status_t
engine_step_run_lent(engine_t *engine, uint64_t step_id, uint32_t layer, void *q, void *k, void *v,
                     void *answer, const engine_sizes_t *sizes)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = engine_sizes_check(step, layer, sizes)) == ATTN_OK) {
        const attn_geometry_t *g = &step->cache->geometry;
        attn_rows_t rows[]       = {packed(q, g->q_heads, g->head_dim_k),
                                    packed(k, g->kv_heads, g->head_dim_k),
                                    packed(v, g->kv_heads, g->head_dim_v)};
        engine_call_t call       = {.layer = layer,
                                    .q     = q != NULL ? &rows[0] : NULL,
                                    .k     = k != NULL ? &rows[1] : NULL,
                                    .v     = v != NULL ? &rows[2] : NULL,
                                    .o     = answer};
        if (answer != NULL && step->sizes.lse > 0) {
            call.lse = (float *)(void *)((uint8_t *)answer + step->sizes.o);
        }
        status = run_device(engine, step, &call);
    }
    if (status != ATTN_OK && step->track != NULL && !step->driven) {
        tracks_of(engine)->wait(step->track, UINT64_MAX);
    }
    engine_step_leave(engine, step);
    return status;
}

/* ---- layers that a runner's device brings ---- */

/* Everything that a call of attn_track_ops_t.drive takes. */
static attn_status_t
drive(engine_t *engine, engine_step_t *step, const engine_lane_t *lane)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint64_t now             = attn_now_ns();
    attn_track_call_t *calls = calloc(g->layers, sizeof(*calls));
    attn_kv_t *kv            = calloc(g->layers, sizeof(*kv));
    attn_status_t status     = ATTN_ERR_NO_MEMORY;

    if (calls == NULL || kv == NULL) {
        attn_fail(status, "no memory for a step of %u layers", g->layers);
    } else {
        for (uint32_t l = 0; l < g->layers; l++) {
            engine_kv_view(engine, step->cache, l, &kv[l]);
            calls[l] = (attn_track_call_t){.layer  = l,
                                           .plan   = step->cache->variant_of[l],
                                           .params = &g->layer_table[l],
                                           .kv     = &kv[l]};
        }
        attn_track_lane_t at = {.at       = lane->at,
                                .bytes    = lane->bytes,
                                .first    = lane->first,
                                .lse      = step->sizes.lse > 0,
                                .limit_ns = step->deadline_ns > now ? step->deadline_ns - now : 0};
        status               = tracks_of(engine)->drive(step->track, &at, calls, g->layers);
    }
    free(calls);
    free(kv);
    return status;
}

static attn_status_t
check_drive(const engine_step_t *step, const engine_lane_t *lane)
{
    if (step->on_device || step->on_host || step->off_host || step->driven) {
        return attn_fail(ATTN_ERR_INVALID, "layers of step %016llx came before",
                         (unsigned long long)step->id);
    }
    return lane->first > 0 && lane->first <= UINT32_MAX - step->cache->geometry.layers
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "the first number of a lane's lines is %u: 1 to %u",
                           lane->first, UINT32_MAX - step->cache->geometry.layers);
}

attn_status_t
engine_step_drive(engine_t *engine, uint64_t step_id, const engine_lane_t *lane)
{
    engine_step_t *step;
    attn_status_t status = engine_step_enter(engine, step_id, &step);

    if (status != ATTN_OK) {
        return status;
    }
    if ((status = check_drive(step, lane)) != ATTN_OK ||
        (status = ensure_track(engine, step)) != ATTN_OK) {
        engine_step_leave(engine, step);
        return status;
    }
    status = drive(engine, step, lane);
    if (status == ATTN_OK || status == ATTN_ERR_INTERNAL) {
        pthread_mutex_lock(&engine->lock);
        step->driven = step->off_host = true;
        step->queued                  = step->sizes.q > 0;
        step->lane                    = *lane;
        pthread_mutex_unlock(&engine->lock);
    }
    engine_step_leave(engine, step);
    if (status == ATTN_ERR_INTERNAL) { /* a part may have been queued */
        char sentence[256];
        snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        engine_step_abort(engine, step_id, "the driver failed");
        return attn_fail(status, "%s", sentence);
    }
    return status;
}
