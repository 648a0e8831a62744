/*
 * step_driven.c: steps whose layers the runner's GPU brings to the worker's, in another process:
 * what attn_step_enqueue() and its kin do of them. The worker has queued all of it when begin
 * returns; here a layer is one kernel on the caller's stream.
 *
 * Before begin the step takes a lane of the client's (lanes.h) and one of the slab's; if one is not
 * to be had, or the worker refuses, the step is as any other, and attn_step_enqueue() says why.
 */
#include "client/step_int.h"

#include "base/clock.h"
#include "base/status.h"
#include "client/lanes.h"

#include <stdio.h>
#include <string.h>

#define ABORT_WAIT_NS (1000 * ATTN_NS_PER_MS)

/* That it is not driven, and why. */
static void
say_why_not(attn_step_t *step, const char *reason)
{
    snprintf(step->not_driven, sizeof(step->not_driven), "%s", reason);
}

static attn_status_t
may_drive(attn_step_t *step)
{
    const share_t *share = &step->shares[0];

    if (step->client->driven == DRIVEN_OFF) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "$ATTN_DRIVEN is off");
    }
    if (!step_is_whole(step)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the step's KV is on %u workers, or an entry has list_room: what is "
                         "enqueued is all on one",
                         step->n_shares);
    }
    return share->link->ops->driven != NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED, "the worker is reached by way of %s",
                           share->link->ops->name);
}

void
step_driven_ask(attn_step_t *step, link_room_t *room)
{
    if (!step->on_stream || step->on_device) {
        return;
    }
    if (may_drive(step) != ATTN_OK ||
        lanes_take(step->client, (int)step->stream_gpu, &step->drive.lane) != ATTN_OK) {
        say_why_not(step, attn_last_error());
        return;
    }
    room->gpu          = true;
    step->drive.gpu    = (int)step->stream_gpu;
    step->drive.shared = step->client->driven == DRIVEN_SHARED;
    step->drive.layers = step->cache->geometry.layers;
    client_step_sizes(step, &step->drive.sizes.q, &step->drive.sizes.k, &step->drive.sizes.v,
                      &step->drive.sizes.o, &step->drive.sizes.lse);
    room->drive = &step->drive;
}

attn_status_t
step_driven_begin(attn_step_t *step)
{
    uint64_t now = attn_now_ns();

    if (step->drive.lane == NULL) {
        return ATTN_OK;
    }
    const share_t *share = &step->shares[0];
    if (share->link->ops->driven(share->remote, &step->driven) != ATTN_OK) {
        say_why_not(step, attn_last_error());
        lanes_give(step->client, step->drive.lane, NULL);
        step->drive.lane = NULL;
        return ATTN_OK;
    }
    attn_status_t status = attn_lane_begin(
        step->drive.lane,
        &(attn_lane_step_t){.at       = step->driven.at,
                            .first    = step->driven.first,
                            .sizes    = step->drive.sizes,
                            .limit_ns = step->deadline_ns > now ? step->deadline_ns - now : 0});
    pthread_mutex_lock(&step->client->lock); /* the housekeeper looks */
    step->is_driven = true;
    pthread_mutex_unlock(&step->client->lock);
    atomic_fetch_add(&step->client->steps_driven, 1);
    return status;
}

void
step_driven_abort(attn_step_t *step)
{
    attn_lane_abort(step->drive.lane, step->driven.first);
}

void
step_driven_free(attn_step_t *step)
{
    if (step->drive.lane == NULL) { /* it may have no shares yet */
        return;
    }
    share_t *share = &step->shares[0];
    if (step->is_driven && !attn_lane_wait(step->drive.lane, 0)) {
        share->link->ops->adrift(share->remote);
    }
    if (share->remote != NULL) {
        share->link->ops->undrive(share->remote); /* it may go to another step from here on */
    }
    lanes_give(step->client, step->drive.lane, step->driven.memory);
    step->drive.lane = NULL;
}

/* ---- layers ---- */

attn_status_t
step_driven_enqueue(attn_step_t *step, const attn_run_t *run, void *stream)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint32_t q_size          = (uint32_t)attn_dtype_size(step->q_dtype);
    uint32_t kv_size         = (uint32_t)attn_dtype_size(g->kv_dtype);

    return attn_lane_enqueue(step->drive.lane, &(attn_lane_call_t){
                                                   .layer        = run->layer,
                                                   .q            = step->call.q,
                                                   .k            = step->call.k,
                                                   .v            = step->call.v,
                                                   .q_heads      = g->q_heads,
                                                   .kv_heads     = g->kv_heads,
                                                   .q_head_bytes = g->head_dim_k * q_size,
                                                   .k_head_bytes = g->head_dim_k * kv_size,
                                                   .v_head_bytes = g->head_dim_v * kv_size,
                                                   .q_size       = q_size,
                                                   .kv_size      = kv_size,
                                                   .o            = step->call.o,
                                                   .lse          = step->call.lse,
                                                   .stream       = stream,
                                               });
}

/* What a kernel of a graph has been told of besides the lane, and of a cache's geometry. */
uint64_t
step_driven_graph(const attn_step_t *step)
{
    const attn_lane_sizes_t *s = &step->drive.sizes;
    const uint64_t told[]      = {attn_lane_id(step->drive.lane),
                                  step->cache->id,
                                  s->q,
                                  s->k,
                                  s->o,
                                  s->lse,
                                  (uint64_t)step->q_dtype << 8 | (uint64_t)step->o_dtype};
    uint64_t id                = UINT64_C(0xcbf29ce484222325);

    for (size_t i = 0; i < sizeof(told) / sizeof(told[0]); i++) {
        for (uint32_t byte = 0; byte < 8; byte++) {
            id = (id ^ (told[i] >> (8 * byte) & 0xff)) * UINT64_C(0x100000001b3);
        }
    }
    return id | UINT64_C(1) << 63; /* tracks are counted from 1 on */
}

attn_status_t
step_driven_replay(attn_step_t *step, void *stream, bool launched)
{
    return (launched ? attn_lane_after : attn_lane_before)(step->drive.lane, stream);
}

attn_status_t
step_driven_finish(attn_step_t *step)
{
    if (!attn_lane_wait(step->drive.lane, step->deadline_ns)) {
        step_driven_abort(step);
        attn_lane_wait(step->drive.lane, attn_now_ns() + ABORT_WAIT_NS / 10);
        return attn_fail(ATTN_ERR_DEADLINE, "what was enqueued did not end before the deadline");
    }
    return attn_lane_fate(step->drive.lane);
}
