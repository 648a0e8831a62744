/*
 * link_ucx.c: the row over UCX: the gRPC link with another way for runs, through shared memory or
 * as messages, which rpc/ucx.h makes one. Begin says on the stream, besides, where in the slab
 * (slab.h) the step's runs will be; a run is then copied there, and its answer from there, and
 * nothing of it goes over the stream. Everything else does: so a step ends by its deadline, is
 * cancelled and breaks off as over gRPC, and a run that is over by then is one whose answer nobody
 * takes.
 *
 * Where the tensors are in a GPU's memory, and so is the worker's KV, they can be in neither: the
 * worker lends memory of its GPU that goes with the slab (slab_gpu.h), who runs a layer has copied
 * them there, and the slot holds heads alone.
 *
 * Over gRPC go the runs of a step that the slab has no room for, and those with lists of their own,
 * for a slot holds nothing whose size changes.
 */
#include "client/slab.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Runs of less than this are not mapped where both processes share a GPU, which a copy from one
 * place of it to another waits its turn for (docs/performance.md). Bytes there and back. */
#define SAME_GPU_LEAST (UINT64_C(1) << 20)

#define NO_SLOT_LOG_NS (10000 * ATTN_NS_PER_MS) /* between two lines that say so */

typedef struct ucx_link {
    grpc_link_t grpc;
    bool strict;
    atomic_uint_fast64_t runs, runs_mapped, steps_no_slot;
    atomic_uint_fast64_t quiet_until_ns; /* about slots that the worker did not open */
    atomic_uint unsaid;                  /* of them, since the last line */
} ucx_link_t;

static ucx_link_t *
ucx_of(grpc_link_t *link)
{
    return (ucx_link_t *)(void *)link;
}

/* ---- lanes ---- */

/* Memory of the worker's GPU, mapped, and a lane there. */
static attn_status_t
take_lane(link_step_t *step, const link_drive_t *drive, uint64_t until_ns)
{
    static const char same[] = "the worker is on the same GPU, which takes turns: two kernels that "
                               "wait for each other there take milliseconds";
    slab_gpu_t *gpu          = slab_gpu(step->slab);
    char reason[256];
    uint32_t lane;

    if (!step->gpu) {
        slab_gpu_reason(gpu, reason, sizeof(reason));
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s", reason);
    }
    if (attn_lane_takes(&drive->sizes) > SLAB_LANE_BYTES) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "a layer takes %llu bytes of lines there and back: a lane has %llu",
                         (unsigned long long)attn_lane_takes(&drive->sizes),
                         (unsigned long long)SLAB_LANE_BYTES);
    }
    if (!drive->shared && slab_gpu_is_same(gpu, drive->gpu)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s", same);
    }
    attn_status_t status = slab_gpu_map(gpu, drive->gpu, until_ns, &step->lane_memory);
    if (status == ATTN_OK) {
        status =
            slab_lane_take(slab_lanes(step->slab), drive->lane, drive->layers, &lane, &step->first);
        step->lane = status == ATTN_OK ? lane + 1 : 0;
    }
    return status;
}

static void
give_lane(link_step_t *step, bool adrift)
{
    if (step->lane > 0) {
        slab_lane_give(slab_lanes(step->slab), step->lane - 1, adrift);
        step->lane = 0;
    }
    attn_shared_unref(step->lane_memory);
    step->lane_memory = NULL;
}

/* ---- begin ---- */

static void
answered(void *arg, const ucx_head_t *reply, const char *sentence, const uint8_t *data)
{
    link_step_t *step    = arg;
    attn_status_t status = reply->status == ATTN_OK              ? ATTN_OK
                           : attn_status_is_known(reply->status) ? (attn_status_t)reply->status
                                                                 : ATTN_ERR_INTERNAL;

    slab_await_no_more(step);
    pipe_run_answered(step->pipe, step->number, status, sentence, data, reply->bytes,
                      reply->took_ns);
}

/* Shared memory for this step, if there is some. Half of its time at most goes to what two GPUs
 * need to drive it. @return a failure where shared memory is insisted on */
static attn_status_t
take_place(ucx_link_t *link, const link_room_t *room, uint64_t deadline_ns, link_step_t *step)
{
    uint64_t now = attn_now_ns(), until_ns = now + (deadline_ns - attn_min(now, deadline_ns)) / 2;
    attn_status_t status = slabs_take(link->grpc.slabs, deadline_ns, &step->slab);

    if (status != ATTN_OK) {
        step->slab = NULL;
        return link->strict
                   ? attn_fail_in(status,
                                  "transport is ucx, but worker %s is not reached through it: ",
                                  link->grpc.pipes.address)
                   : ATTN_OK;
    }
    if (!ucx_place_take(slab_peer(step->slab), room->in, room->out, &step->ask.place)) {
        atomic_fetch_add(&link->steps_no_slot, 1);
        slab_release(step->slab);
        step->slab    = NULL;
        step->no_room = true;
    }
    if (step->slab != NULL && room->gpu) {
        step->gpu = slab_ask_gpu(step->slab, room->insists         ? deadline_ns
                                             : room->drive != NULL ? until_ns
                                                                   : 0);
    }
    if (room->drive != NULL &&
        (step->slab == NULL
             ? attn_fail(ATTN_ERR_UNSUPPORTED, "the step has no shared memory of the worker's")
             : take_lane(step, room->drive, until_ns)) != ATTN_OK) {
        snprintf(step->not_driven, sizeof(step->not_driven), "%s", attn_last_error());
    }
    step->ask.answered = answered;
    step->ask.arg      = step;
    return ATTN_OK;
}

static attn_status_t
ucx_link_begin(link_t *base, const engine_batch_t *batch, const link_room_t *room,
               link_done_fn done, void *arg, link_step_t **step_p)
{
    ucx_link_t *link  = ucx_of(grpc_of(base));
    link_step_t *step = calloc(1, sizeof(*step));
    Attn__V1__Slot slot;

    if (step == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    *step_p              = step;
    attn_status_t status = take_place(link, room, batch->deadline_ns, step);
    if (status == ATTN_OK && step->slab != NULL) {
        slab_slot(step->slab, &step->ask.place, &slot);
        slot.gpu   = step->gpu;
        slot.lane  = step->lane;
        slot.first = step->first;
    }
    if (status == ATTN_OK) {
        status =
            link_grpc_begin_with(base, batch, step->slab != NULL ? &slot : NULL, done, arg, step);
    }
    if (status != ATTN_OK) {
        if (step->slab != NULL) {
            give_lane(step, false);
            ucx_place_give(slab_peer(step->slab), &step->ask.place);
            slab_release(step->slab);
        }
        *step_p = NULL;
        free(step);
    }
    return status;
}

/* ---- run ---- */

/* A worker that refuses one step's slot may refuse every step's: one line now and then says it. */
static void
log_no_slot(ucx_link_t *link, const char *reason)
{
    uint64_t now = attn_now_ns(), until = atomic_load(&link->quiet_until_ns);

    atomic_fetch_add(&link->unsaid, 1);
    if (now >= until &&
        atomic_compare_exchange_strong(&link->quiet_until_ns, &until, now + NO_SLOT_LOG_NS)) {
        attn_log(ATTN_LOG_WARN, "client.no_slot", "worker=%s steps=%u reason=\"%s\"",
                 link->grpc.pipes.address, atomic_exchange(&link->unsaid, 0), reason);
    }
}

/* Has the worker opened the step's slot? If not, its runs go over gRPC. */
static bool
has_slot(ucx_link_t *link, link_step_t *step)
{
    char reason[256];
    bool gpu;

    if (step->slab == NULL || step->slot) {
        return step->slot;
    }
    step->slot = pipe_has_slot(step->pipe, &gpu, reason, sizeof(reason));
    if (!step->slot) {
        log_no_slot(link, reason);
        atomic_fetch_add(&link->steps_no_slot, 1);
        give_lane(step, false);
        ucx_place_give(slab_peer(step->slab), &step->ask.place);
        slab_release(step->slab);
        step->slab = NULL;
    }
    return step->slot;
}

/* Why its runs go over gRPC. */
static attn_status_t
fail_without_slot(const link_step_t *step)
{
    attn_link_info_t info = {0};
    char reason[256];
    bool gpu;

    pipe_has_slot(step->pipe, &gpu, reason, sizeof(reason));
    if (step->no_room) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the step found no room in the shared memory of the worker");
    }
    if (reason[0] != '\0') {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker opened no slot for the step: %s",
                         reason);
    }
    slabs_describe(step->link->slabs, &info);
    return attn_fail(ATTN_ERR_UNSUPPORTED, "there is no shared memory of the worker's: %s",
                     info.reason);
}

static attn_status_t
ucx_link_map(link_step_t *step, int gpu, bool insists, uint64_t until_ns, link_mapped_t *mapped)
{
    char reason[256];

    if (!has_slot(ucx_of(step->link), step)) {
        return fail_without_slot(step);
    }
    if (!step->gpu) {
        slab_gpu_reason(slab_gpu(step->slab), reason, sizeof(reason));
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s", reason);
    }
    bool opened;
    pipe_has_slot(step->pipe, &opened, reason, sizeof(reason));
    if (!opened) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker: %s", reason);
    }
    if (!insists && step->ask.place.in + step->ask.place.out < SAME_GPU_LEAST &&
        slab_gpu_is_same(slab_gpu(step->slab), gpu)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the worker is on the same GPU, where runs of less than 1 MiB go faster "
                         "through the host");
    }
    attn_status_t status = slab_gpu_map(slab_gpu(step->slab), gpu, until_ns, &mapped->memory);
    if (status == ATTN_OK) {
        mapped->in        = attn_shared_at(mapped->memory) + ucx_place_in(&step->ask.place);
        mapped->out       = attn_shared_at(mapped->memory) + ucx_place_out(&step->ask.place);
        mapped->in_bytes  = step->ask.place.in;
        mapped->out_bytes = step->ask.place.out;
    }
    return status;
}

static attn_status_t
ucx_link_driven(link_step_t *step, link_driven_t *driven)
{
    char reason[256];

    if (step->lane == 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s", step->not_driven);
    }
    if (!has_slot(ucx_of(step->link), step)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker opened no slot for the step");
    }
    if (!pipe_is_driven(step->pipe, reason, sizeof(reason))) {
        give_lane(step, false);
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker: %s", reason);
    }
    attn_shared_ref(step->lane_memory);
    *driven = (link_driven_t){.memory = step->lane_memory,
                              .at     = attn_shared_at(step->lane_memory) +
                                    slab_lane_at(slab_gpu(step->slab)->card.bytes, step->lane - 1),
                              .first = step->first};
    return ATTN_OK;
}

static void
ucx_link_undrive(link_step_t *step)
{
    if (step->lane >
        0) { /* the worker may have its half still: the lane is the step's to its end */
        slab_lane_give(slab_lanes(step->slab), step->lane - 1, true);
    }
}

static void
ucx_link_adrift(link_step_t *step)
{
    if (step->slab != NULL) {
        slab_spoil(step->slab);
        step->spoilt = true;
    }
}

/* Bytes of q, k and v of a run: of one that is not mapped they are put into the slot. */
static uint64_t
put_all(link_step_t *step, const link_run_t *run)
{
    const struct iovec *pieces[] = {run->q, run->k, run->v};
    const uint32_t counts[]      = {run->n_q, run->n_k, run->n_v};
    uint8_t *data                = ucx_place_data(slab_peer(step->slab), &step->ask.place);
    uint64_t bytes               = 0;

    for (uint32_t t = 0; t < 3; t++) {
        for (uint32_t i = 0; i < counts[t]; i++) {
            if (!run->mapped) {
                ucx_copy(data + bytes, pieces[t][i].iov_base, pieces[t][i].iov_len);
            }
            bytes += pieces[t][i].iov_len;
        }
    }
    return bytes;
}

static void
ucx_link_run(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg)
{
    ucx_link_t *link = ucx_of(step->link);

    if (!has_slot(link, step) || run->n_lists > 0) {
        link_grpc_run(step, run, done, arg);
        return;
    }
    atomic_fetch_add_explicit(&link->runs, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&link->runs_mapped, run->mapped, memory_order_relaxed);
    uint64_t number = pipe_run_aside(step->pipe, run, done, arg);
    ucx_head_t head = {.tag    = step->id,
                       .bytes  = put_all(step, run),
                       .number = run->layer,
                       .flags = (run->n_q == 0 ? LINK_NO_Q : 0) | (run->n_k == 0 ? LINK_NO_KV : 0) |
                                (run->mapped ? LINK_ON_GPU : 0) | (run->waits ? 0 : UCX_RING)};
    slab_await(step->slab, step, number);
    ucx_ask(&step->ask, slab_peer(step->slab), &head);
    pipe_run_asked(step->pipe);
}

/* ---- the end ---- */

static void
ucx_link_step_free(link_step_t *step)
{
    if (step == NULL) {
        return;
    }
    slab_t *slab = step->slab;
    if (slab != NULL) {
        slab_await_no_more(step);
        ucx_forget(&step->ask);
    }
    bool over = pipe_give(step->pipe, step->ended);
    give_lane(step, !over || step->spoilt);
    if (slab != NULL && over && !step->spoilt) {
        ucx_place_give(slab_peer(slab), &step->ask.place);
    } else if (slab != NULL) { /* the worker may write there still */
        slab_spoil(slab);
    }
    if (slab != NULL) {
        slab_release(slab);
    }
    wire_free(&step->lists);
    free(step);
}

static void
ucx_link_describe(link_t *base, attn_link_info_t *info)
{
    ucx_link_t *link = ucx_of(grpc_of(base));

    link_grpc_ops.describe(base, info);
    slabs_describe(link->grpc.slabs, info);
    info->runs_ucx      = atomic_load(&link->runs);
    info->runs_mapped   = atomic_load(&link->runs_mapped);
    info->steps_no_slot = atomic_load(&link->steps_no_slot);
}

static void
ucx_link_close(link_t *base)
{
    slabs_destroy(grpc_of(base)->slabs);
    link_grpc_fini(grpc_of(base));
    free(base);
}

/* The gRPC row's functions, but for those above: filled when the first link is made. */
static link_ops_t ucx_ops;
static pthread_once_t ucx_ops_once = PTHREAD_ONCE_INIT;

static void
fill_ops(void)
{
    ucx_ops           = link_grpc_ops;
    ucx_ops.name      = "ucx";
    ucx_ops.close     = ucx_link_close;
    ucx_ops.begin     = ucx_link_begin;
    ucx_ops.run       = ucx_link_run;
    ucx_ops.step_free = ucx_link_step_free;
    ucx_ops.map       = ucx_link_map;
    ucx_ops.adrift    = ucx_link_adrift;
    ucx_ops.driven    = ucx_link_driven;
    ucx_ops.undrive   = ucx_link_undrive;
    ucx_ops.describe  = ucx_link_describe;
}

attn_status_t
link_ucx_open(rpc_client_t *rpc, ucx_asks_t *asks, const char *address, bool strict,
              link_t **link_p)
{
    ucx_link_t *link = calloc(1, sizeof(*link));

    if (link == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    pthread_once(&ucx_ops_once, fill_ops);
    link->strict         = strict;
    link->grpc.link.ops  = &ucx_ops;
    attn_status_t status = link_grpc_init(&link->grpc, rpc, address);
    if (status != ATTN_OK) {
        free(link);
        return status;
    }
    slabs_options_t options = {.rpc     = rpc,
                               .asks    = asks,
                               .channel = link->grpc.control,
                               .address = address,
                               .bytes   = UCX_SLAB_MAX}; /* as much as the worker says */
    status                  = slabs_create(&options, &link->grpc.slabs);
    if (status != ATTN_OK) {
        link_grpc_fini(&link->grpc);
        free(link);
        return status;
    }
    *link_p = &link->grpc.link;
    return ATTN_OK;
}
