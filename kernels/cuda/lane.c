/*
 * lane.c: see kernels/lane.h. A graph holds the addresses of the lane's account and of the tensors;
 * where the worker's memory is mapped stands in the account, and is the step's. So graphs outlive
 * that memory, and do nothing while no step has the lane.
 */
#include "kernels/lane.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/cuda_int.h"
#include "kernels/cuda/drive.h"
#include "kernels/cuda/order.h"

#include <stdlib.h>

#define GPUS 64
#define CLEAR_NS ATTN_NS_PER_MS /* how long end() waits at least */

struct attn_lane {
    cuda_backend_t *backend;
    int gpu;
    uint64_t id;
    cuda_order_t order;
    CUdeviceptr drive; /* a cuda_drive_t */
    struct lane_host { /* pinned */
        cuda_drive_word_t word;
        cuda_drive_t sent;
    } * host;
    attn_lane_sizes_t sizes;
    uint32_t next, next_captured; /* layers */
    bool replayed;                /* nobody knows which is next */
    bool clearing;
};

/* ---- the devices ---- */

/* One for all lanes of a GPU, as long as there are any. */
static struct {
    pthread_mutex_t lock;
    attn_backend_t *of[GPUS];
    uint32_t users[GPUS];
    uint64_t last_id;
} devices = {.lock = PTHREAD_MUTEX_INITIALIZER};

static attn_status_t
device_take(int gpu, cuda_backend_t **backend_p, uint64_t *id_p)
{
    attn_status_t status = ATTN_OK;

    if (gpu < 0 || gpu >= GPUS) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "GPU %d of this process: 0 to %d", gpu, GPUS - 1);
    }
    pthread_mutex_lock(&devices.lock);
    if (devices.users[gpu] == 0) {
        status = attn_cuda_backend_ops.open(0, (uint32_t)gpu, &devices.of[gpu]);
    }
    if (status == ATTN_OK) {
        devices.users[gpu]++;
        *backend_p = (cuda_backend_t *)devices.of[gpu];
        *id_p      = ++devices.last_id;
    }
    pthread_mutex_unlock(&devices.lock);
    return status;
}

static void
device_give(int gpu)
{
    pthread_mutex_lock(&devices.lock);
    if (--devices.users[gpu] == 0) {
        attn_cuda_backend_ops.close(devices.of[gpu]);
    }
    pthread_mutex_unlock(&devices.lock);
}

/* ---- life ---- */

uint64_t
attn_lane_takes(const attn_lane_sizes_t *s)
{
    return CUDA_LANE_HEAD +
           16 * (CUDA_LINES((s->q + s->k + s->v) / 4) + CUDA_LINES((s->o + s->lse) / 4));
}

void
attn_lane_close(attn_lane_t *lane)
{
    if (lane == NULL) {
        return;
    }
    {
        CUDA_VISIT(lane->backend);
        if (visit.status == ATTN_OK) {
            cuda_order_close(&lane->order);
            if (lane->drive != 0) {
                lane->backend->cu->cuMemFree(lane->drive);
            }
            if (lane->host != NULL) {
                lane->backend->cu->cuMemFreeHost(lane->host);
            }
        }
    }
    device_give(lane->gpu);
    free(lane);
}

/* Its account says that there is no step. */
static attn_status_t
clear(attn_lane_t *lane)
{
    attn_status_t status =
        CUDA_CALL(cuMemsetD8Async(lane->drive, 0, sizeof(cuda_drive_t), lane->order.stream));

    return status == ATTN_OK ? cuda_order_ready(&lane->order) : status;
}

static attn_status_t
take_memory(attn_lane_t *lane)
{
    attn_status_t status;
    CUDA_VISIT(lane->backend);

    if ((status = visit.status) != ATTN_OK || (status = cuda_order_open(&lane->order)) != ATTN_OK ||
        (status = CUDA_CALL(cuMemAlloc(&lane->drive, sizeof(cuda_drive_t)))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemHostAlloc((void **)&lane->host, sizeof(*lane->host), 0))) !=
            ATTN_OK) {
        return status;
    }
    return clear(lane);
}

attn_status_t
attn_lane_open(int gpu, attn_lane_t **lane_p)
{
    attn_lane_t *lane = calloc(1, sizeof(*lane));

    if (lane == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a lane");
    }
    lane->gpu            = gpu;
    attn_status_t status = device_take(gpu, &lane->backend, &lane->id);
    if (status != ATTN_OK) {
        free(lane);
        return status;
    }
    if ((status = take_memory(lane)) != ATTN_OK) {
        attn_lane_close(lane);
        return attn_fail_in(status, "a lane of GPU %d: ", gpu);
    }
    *lane_p = lane;
    return ATTN_OK;
}

uint64_t
attn_lane_id(const attn_lane_t *lane)
{
    return lane->id;
}

int
attn_lane_gpu(const attn_lane_t *lane)
{
    return lane->gpu;
}

/* ---- steps ---- */

attn_status_t
attn_lane_begin(attn_lane_t *lane, const attn_lane_step_t *step)
{
    const attn_lane_sizes_t *s = &step->sizes;
    attn_status_t status;
    CUDA_VISIT(lane->backend);

    if ((status = visit.status) != ATTN_OK) {
        return status;
    }
    cuda_order_anew(&lane->order);
    lane->clearing   = false;
    lane->replayed   = false;
    lane->next       = 0;
    lane->sizes      = *s;
    lane->host->sent = (cuda_drive_t){
        .first    = step->first,
        .limit_ns = step->limit_ns,
        .lane     = step->at,
        .answers  = CUDA_LANE_HEAD + 16 * (uint64_t)CUDA_LINES((s->q + s->k + s->v) / 4),
    };
    lane->host->word = (cuda_drive_word_t){0};
    status = CUDA_CALL(cuMemcpyHtoDAsync(lane->drive, &lane->host->sent, sizeof(cuda_drive_t),
                                         lane->order.stream));
    return status == ATTN_OK ? cuda_order_ready(&lane->order) : status;
}

static attn_status_t
check_word(const void *at, uint64_t row, uint64_t head, uint32_t size, const char *name)
{
    if ((uintptr_t)at % 4 != 0 || row * size % 4 != 0 || head * size % 4 != 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%s is at %p, with strides %llu (token) and %llu (head) of %u bytes: in "
                         "the device's memory tokens and heads begin at multiples of 4 bytes",
                         name, at, (unsigned long long)row, (unsigned long long)head, size);
    }
    return ATTN_OK;
}

static cuda_tensor_t
tensor_of(const attn_rows_t *rows, uint32_t heads, uint32_t head_bytes, uint32_t size,
          uint64_t bytes)
{
    if (rows == NULL || bytes == 0) {
        return (cuda_tensor_t){.heads = 1, .head_words = 1};
    }
    return (cuda_tensor_t){.at          = rows->at,
                           .row_stride  = rows->row_stride * size / 4,
                           .head_stride = rows->head_stride * size / 4,
                           .heads       = heads,
                           .head_words  = head_bytes / 4,
                           .words       = (uint32_t)(bytes / 4)};
}

static attn_status_t
check_call(const attn_lane_t *lane, const attn_lane_call_t *c)
{
    const attn_lane_sizes_t *s = &lane->sizes;
    const struct {
        const attn_rows_t *rows;
        uint64_t bytes;
        uint32_t size;
        const char *name;
    } tensors[] = {
        {c->q, s->q, c->q_size, "q"}, {c->k, s->k, c->kv_size, "k"}, {c->v, s->v, c->kv_size, "v"}};

    for (int i = 0; i < 3; i++) {
        const attn_rows_t *r = tensors[i].rows;
        if ((r == NULL) != (tensors[i].bytes == 0)) {
            return attn_fail(ATTN_ERR_INVALID,
                             "layer %u: %s is missing: a layer that devices drive comes with all "
                             "its tensors",
                             c->layer, tensors[i].name);
        }
        attn_status_t status = r == NULL ? ATTN_OK
                                         : check_word(r->at, r->row_stride, r->head_stride,
                                                      tensors[i].size, tensors[i].name);
        if (status != ATTN_OK) {
            return status;
        }
    }
    attn_status_t status = check_word(c->o, 0, 0, 4, "o");
    return status == ATTN_OK ? check_word(c->lse, 0, 0, 4, "lse") : status;
}

static attn_status_t
launch(attn_lane_t *lane, const attn_lane_call_t *c)
{
    const attn_lane_sizes_t *s = &lane->sizes;
    uint32_t lse               = (uint32_t)(s->lse / 4);
    cuda_ask_t x               = {
                      .layer     = {.drive  = (cuda_drive_t *)(uintptr_t)lane->drive,
                                    .word   = &lane->host->word,
                                    .number = c->layer,
                                    .runner = 1},
                      .q         = tensor_of(c->q, c->q_heads, c->q_head_bytes, c->q_size, s->q),
                      .k         = tensor_of(c->k, c->kv_heads, c->k_head_bytes, c->kv_size, s->k),
                      .v         = tensor_of(c->v, c->kv_heads, c->v_head_bytes, c->kv_size, s->v),
                      .o         = c->o,
                      .lse       = (uint32_t *)(void *)c->lse,
                      .o_words   = (uint32_t)(s->o / 4),
                      .lse_words = c->lse != NULL ? lse : 0,
                      .lse_skip  = c->lse != NULL ? 0 : lse,
    };

    return cuda_launch(lane->backend->ask_layer, 1, 1, CUDA_DRIVE_THREADS, 0, false,
                       (CUstream)c->stream, (void *[]){&x});
}

/* The worker waits for layers in their order. A graph may be of some of them. */
static attn_status_t
check_next(const attn_lane_t *lane, uint32_t layer, bool captures)
{
    uint32_t next = captures ? lane->next_captured : lane->next;
    bool fine     = layer == next || (captures && layer == 0) || (!captures && lane->replayed);

    return fine ? ATTN_OK
                : attn_fail(ATTN_ERR_INVALID,
                            "layer is %u: %u is next, for layers that devices drive come in order, "
                            "each once",
                            layer, next);
}

attn_status_t
attn_lane_enqueue(attn_lane_t *lane, const attn_lane_call_t *call)
{
    CUstream stream      = (CUstream)call->stream;
    bool captures        = false;
    attn_status_t status = check_call(lane, call);
    CUDA_VISIT(lane->backend);

    if (status != ATTN_OK || (status = visit.status) != ATTN_OK ||
        (status = cuda_order_check(&lane->order)) != ATTN_OK ||
        (status = cuda_is_captured(stream, &captures)) != ATTN_OK) {
        return status;
    }
    if ((status = check_next(lane, call->layer, captures)) != ATTN_OK) {
        return status;
    }
    if (captures) {
        lane->next_captured = call->layer + 1;
        return launch(lane, call);
    }
    if (lane->order.replaying) {
        return attn_fail(ATTN_ERR_BUSY, "a graph of this step is being launched: "
                                        "attn_step_replayed() comes before further layers");
    }
    if ((status = cuda_order_follow(&lane->order, stream)) != ATTN_OK) {
        return status;
    }
    lane->next          = call->layer + 1;
    status              = launch(lane, call);
    attn_status_t noted = cuda_order_note(&lane->order, stream); /* of what failed a part may run */
    return status == ATTN_OK ? noted : status;
}

attn_status_t
attn_lane_before(attn_lane_t *lane, void *stream)
{
    CUDA_VISIT(lane->backend);

    lane->replayed = true;
    return visit.status == ATTN_OK ? cuda_order_before(&lane->order, stream) : visit.status;
}

attn_status_t
attn_lane_after(attn_lane_t *lane, void *stream)
{
    CUDA_VISIT(lane->backend);

    return visit.status == ATTN_OK ? cuda_order_after(&lane->order, stream) : visit.status;
}

/* ---- the end ---- */

void
attn_lane_abort(attn_lane_t *lane, uint32_t first)
{
    __atomic_store_n(&lane->host->word.abort, first, __ATOMIC_RELEASE);
}

bool
attn_lane_wait(attn_lane_t *lane, uint64_t until_ns)
{
    CUDA_VISIT(lane->backend);

    return visit.status != ATTN_OK || cuda_order_wait(&lane->order, until_ns);
}

attn_status_t
attn_lane_fate(const attn_lane_t *lane)
{
    switch (__atomic_load_n(&lane->host->word.failed, __ATOMIC_ACQUIRE)) {
    case 0:
        return ATTN_OK;
    case CUDA_DRIVE_LATE:
        return attn_fail(ATTN_ERR_DEADLINE,
                         "an answer of the worker's device did not come in time");
    case CUDA_DRIVE_LEFT:
        return attn_fail(ATTN_ERR_ABORTED, "the worker gave the step up");
    default:
        return attn_fail(ATTN_ERR_ABORTED, "the step was given up, or its worker is lost");
    }
}

bool
attn_lane_end(attn_lane_t *lane, uint64_t until_ns)
{
    uint64_t soon = attn_now_ns() + CLEAR_NS;
    CUDA_VISIT(lane->backend);

    if (!lane->clearing && visit.status == ATTN_OK) {
        lane->order.lost = clear(lane) != ATTN_OK;
    }
    lane->clearing = true;
    return visit.status != ATTN_OK || cuda_order_wait(&lane->order, attn_max(until_ns, soon));
}
