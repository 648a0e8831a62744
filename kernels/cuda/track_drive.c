/*
 * track_drive.c: a step whose layers a runner's device brings (drive.h): all of it is queued when
 * it begins. A layer is what it is on a track, but that its first kernel waits for the runner's
 * lines and stores k and v from them, and that one more sends the answer.
 *
 * What waits must not keep others from the device. So such steps are few, a wait is one CTA, and
 * they have streams of their own, of another priority: the driver has queues to the device by
 * priority, and streams that share one wait for each other. They are the first, for what they do is
 * short and somebody waits for it.
 */
#include "kernels/cuda/drive.h"
#include "kernels/cuda/track_int.h"

#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>

/* The driver queues about a thousand launches, and then lets its caller wait. */
#define LAYERS_MAX 128u

typedef struct track_driven {
    CUdeviceptr device; /* account, q, o and LSE of a layer */
    uint64_t q, o, lse; /* where they are */
    uint64_t q_bytes, o_bytes, lse_bytes;
    struct driven_host { /* pinned */
        cuda_drive_word_t word;
        cuda_drive_t sent;
    } * host;
    int slot; /* of the backend's streams; -1: none */
} track_driven_t;

/* ---- memory, and streams ---- */

void
track_driven_free(attn_track_t *t)
{
    track_driven_t *d = t->driven;

    if (d == NULL) {
        return;
    }
    if (d->host != NULL) {
        t->backend->cu->cuMemFreeHost(d->host);
    }
    if (d->device != 0) {
        t->backend->cu->cuMemFree(d->device);
    }
    free(d);
    t->driven = NULL;
}

/* Once a track, for all its steps have the same shape. */
static attn_status_t
take_memory(attn_track_t *t)
{
    const attn_problem_t *p = &t->views[0].plan->problem;
    uint64_t rows           = t->shape.n_queries * p->q_heads;
    uint64_t end            = 0;
    attn_status_t status;

    if (t->driven != NULL) {
        return ATTN_OK;
    }
    track_driven_t *d = t->driven = calloc(1, sizeof(*d));
    if (d == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step that devices drive");
    }
    d->slot      = -1;
    d->q_bytes   = rows * p->head_dim_k * attn_dtype_size(t->shape.q_dtype);
    d->o_bytes   = rows * p->head_dim_v * attn_dtype_size(t->shape.o_dtype);
    d->lse_bytes = rows * sizeof(float);
    cuda_take(&end, sizeof(cuda_drive_t));
    d->q   = cuda_take(&end, d->q_bytes);
    d->o   = cuda_take(&end, d->o_bytes);
    d->lse = cuda_take(&end, d->lse_bytes);
    if ((status = CUDA_CALL(cuMemAlloc(&d->device, end))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemHostAlloc((void **)&d->host, sizeof(*d->host), 0))) != ATTN_OK) {
        track_driven_free(t);
        return attn_fail_in(status, "a step that devices drive: ");
    }
    return ATTN_OK;
}

static attn_status_t
open_stream(CUstream *stream_p)
{
    int least = 0, greatest = 0;
    attn_status_t status = CUDA_CALL(cuCtxGetStreamPriorityRange(&least, &greatest));

    return status == ATTN_OK
               ? CUDA_CALL(cuStreamCreateWithPriority(stream_p, CU_STREAM_NON_BLOCKING, greatest))
               : status;
}

static attn_status_t
take_stream(attn_track_t *t)
{
    cuda_backend_t *b    = t->backend;
    attn_status_t status = ATTN_OK;
    int slot             = 0;

    pthread_mutex_lock(&b->lock);
    while (slot < (int)CUDA_DRIVES && b->driving[slot]) {
        slot++;
    }
    if (slot == (int)CUDA_DRIVES) {
        status = attn_fail(ATTN_ERR_EXHAUSTED,
                           "%u steps are driven by devices here, as many as may be", CUDA_DRIVES);
    } else if (b->drives[slot] == NULL) {
        status = open_stream(&b->drives[slot]);
    }
    if (status == ATTN_OK) {
        b->driving[slot] = true;
        t->driven->slot  = slot;
    }
    pthread_mutex_unlock(&b->lock);
    return status;
}

void
track_driven_give(attn_track_t *t)
{
    cuda_backend_t *b = t->backend;

    if (t->driven != NULL && t->driven->slot >= 0) {
        pthread_mutex_lock(&b->lock);
        b->driving[t->driven->slot] = false;
        pthread_mutex_unlock(&b->lock);
        t->driven->slot = -1;
    }
}

bool
cuda_is_driving(cuda_backend_t *backend)
{
    bool driving = false;

    pthread_mutex_lock(&backend->lock);
    for (uint32_t i = 0; i < CUDA_DRIVES; i++) {
        driving = driving || backend->driving[i];
    }
    pthread_mutex_unlock(&backend->lock);
    return driving;
}

void
cuda_drives_free(cuda_backend_t *backend)
{
    for (uint32_t i = 0; i < CUDA_DRIVES; i++) {
        if (backend->drives[i] != NULL) {
            backend->cu->cuStreamDestroy(backend->drives[i]);
        }
    }
}

/* ---- a step ---- */

typedef struct sizes {
    uint32_t q, k, v, o, lse; /* words */
} sizes_t;

static attn_status_t
check_sizes(const attn_track_t *t, const attn_track_lane_t *lane, sizes_t *words)
{
    const track_driven_t *d = t->driven;
    const attn_problem_t *p = &t->views[0].plan->problem;
    uint64_t k              = t->shape.n_rows * t->kv_heads * p->head_dim_k * 2;
    uint64_t v              = t->shape.n_rows * t->kv_heads * p->head_dim_v * 2;
    uint64_t lse            = lane->lse ? d->lse_bytes : 0;
    uint64_t in = d->q_bytes + k + v, out = d->o_bytes + lse;

    if (in > lane->bytes || out > lane->bytes ||
        CUDA_LANE_HEAD + 16 * ((uint64_t)CUDA_LINES(in / 4) + CUDA_LINES(out / 4)) > lane->bytes) {
        return attn_fail(
            ATTN_ERR_TOO_LARGE,
            "a layer has %llu bytes of q, k and v and %llu of its answer: a lane of %llu "
            "bytes, of which each 12 take 16, has no room for them",
            (unsigned long long)in, (unsigned long long)out, (unsigned long long)lane->bytes);
    }
    *words = (sizes_t){.q   = (uint32_t)(d->q_bytes / 4),
                       .k   = (uint32_t)(k / 4),
                       .v   = (uint32_t)(v / 4),
                       .o   = (uint32_t)(d->o_bytes / 4),
                       .lse = (uint32_t)(lse / 4)};
    return ATTN_OK;
}

/* The account of the step, behind its tables. */
static attn_status_t
send_account(attn_track_t *t, const attn_track_lane_t *lane, const sizes_t *words)
{
    track_driven_t *d = t->driven;

    d->host->word = (cuda_drive_word_t){0};
    d->host->sent = (cuda_drive_t){
        .first    = lane->first,
        .limit_ns = lane->limit_ns,
        .lane     = lane->at,
        .answers  = CUDA_LANE_HEAD + 16 * (uint64_t)CUDA_LINES(words->q + words->k + words->v)};
    attn_status_t status = CUDA_CALL(
        cuMemcpyHtoDAsync(d->device, &d->host->sent, sizeof(cuda_drive_t), t->order.stream));
    return status == ATTN_OK ? cuda_order_ready(&t->order) : status;
}

/* The same for all devices that may come up before the kernel before them ends. */
static bool
follows(const attn_track_t *t)
{
    return t->backend->major >= 9;
}

static attn_status_t
queue_layer(attn_track_t *t, const attn_track_call_t *call, const sizes_t *words, CUstream stream)
{
    const track_driven_t *d = t->driven;
    const attn_problem_t *p = &t->views[call->plan].plan->problem;
    uint8_t *mine           = (uint8_t *)(uintptr_t)d->device;
    attn_rows_t q           = {.at          = mine + d->q,
                               .row_stride  = (uint64_t)p->q_heads * p->head_dim_k,
                               .head_stride = p->head_dim_k};
    attn_track_call_t asks  = *call;
    cuda_take_t take        = {.layer   = {.drive  = (cuda_drive_t *)(void *)mine,
                                           .word   = &d->host->word,
                                           .number = call->layer},
                               .bring   = track_bring(t, call),
                               .q       = (uint32_t *)(void *)q.at,
                               .q_words = words->q,
                               .k_words = words->k,
                               .v_words = words->v};
    cuda_give_t give        = {.layer     = take.layer,
                               .o         = (const uint32_t *)(void *)(mine + d->o),
                               .lse       = (const uint32_t *)(void *)(mine + d->lse),
                               .o_words   = words->o,
                               .lse_words = words->lse};
    attn_status_t status    = cuda_launch(t->backend->take_layer, 1, 1, CUDA_DRIVE_THREADS, 0,
                                          follows(t), stream, (void *[]){&take});

    if (status == ATTN_OK && t->shape.n_queries > 0) {
        asks.q   = &q;
        asks.o   = mine + d->o;
        asks.lse = words->lse > 0 ? (float *)(void *)(mine + d->lse) : NULL;
        status   = track_attend(t, &asks, stream);
    }
    return status == ATTN_OK ? cuda_launch(t->backend->answer_layer, 1, 1, CUDA_DRIVE_THREADS, 0,
                                           follows(t), stream, (void *[]){&give})
                             : status;
}

static attn_status_t
queue_all(attn_track_t *t, const attn_track_lane_t *lane, const attn_track_call_t *calls,
          uint32_t n, const sizes_t *words)
{
    CUstream stream = t->backend->drives[t->driven->slot];
    attn_status_t status;

    if ((status = send_account(t, lane, words)) != ATTN_OK ||
        (status = cuda_order_follow(&t->order, stream)) != ATTN_OK) {
        return status;
    }
    for (uint32_t l = 0; l < n && status == ATTN_OK; l++) {
        status = queue_layer(t, &calls[l], words, stream);
    }
    attn_status_t noted = cuda_order_note(&t->order, stream);
    status              = status == ATTN_OK ? noted : status;
    if (status != ATTN_OK) { /* a part may wait */
        track_interrupt(t);
    }
    return status;
}

attn_status_t
track_drive(attn_track_t *t, const attn_track_lane_t *lane, const attn_track_call_t *calls,
            uint32_t n)
{
    sizes_t words = {0};
    attn_status_t status;
    CUDA_VISIT(t->backend);

    if ((status = visit.status) != ATTN_OK) {
        return status;
    }
    if (n > LAYERS_MAX) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%u layers: devices drive steps of %u at most", n,
                         LAYERS_MAX);
    }
    if ((status = take_memory(t)) != ATTN_OK ||
        (status = check_sizes(t, lane, &words)) != ATTN_OK ||
        (status = take_stream(t)) != ATTN_OK) {
        return status;
    }
    t->marks_come = false;
    if ((status = queue_all(t, lane, calls, n, &words)) != ATTN_OK) {
        char sentence[256];
        snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        return attn_fail(ATTN_ERR_INTERNAL, "%s", sentence); /* a part may be queued */
    }
    return ATTN_OK;
}

void
track_interrupt(attn_track_t *t)
{
    track_driven_t *d = t->driven;

    if (d != NULL) { /* else its memory was not to be had */
        __atomic_store_n(&d->host->word.abort, d->host->sent.first, __ATOMIC_RELEASE);
    }
}
