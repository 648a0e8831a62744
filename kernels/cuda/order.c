/*
 * order.c: what a step has queued on streams of a caller, known by events: what comes next follows
 * it, and who ends the step waits for it. Every call is made during a visit.
 */
#include "kernels/cuda/order.h"

#include "base/clock.h"
#include "base/status.h"

#include <sched.h>
#include <time.h>

/* How long wait() looks without a pause, and how long its pauses are. */
#define SPIN_NS (100 * ATTN_NS_PER_US)
#define PAUSE_NS 20000

/* What comes next on the stream finds the tables, and what was queued before is over: also where it
 * was on a stream of this handle, which may be another's by now, or another one on each thread. */
attn_status_t
cuda_order_follow(cuda_order_t *t, CUstream stream)
{
    attn_status_t status = CUDA_CALL(cuStreamWaitEvent(stream, t->ready, 0));

    if (status == ATTN_OK && t->queued) {
        status = CUDA_CALL(cuStreamWaitEvent(stream, t->done, 0));
    }
    return status;
}

/* All that the stream has now is the step's. Where that cannot be noted nobody knows of it. */
attn_status_t
cuda_order_note(cuda_order_t *t, CUstream stream)
{
    attn_status_t status = CUDA_CALL(cuEventRecord(t->done, stream));

    t->queued = true;
    t->last   = stream;
    t->lost   = t->lost || status != ATTN_OK;
    return status;
}

attn_status_t
cuda_is_captured(CUstream stream, bool *captured_p)
{
    CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
    attn_status_t status            = CUDA_CALL(cuStreamIsCapturing(stream, &capturing));

    *captured_p = capturing != CU_STREAM_CAPTURE_STATUS_NONE;
    return status;
}

/* What is lost has no place in any order. */
attn_status_t
cuda_order_check(const cuda_order_t *t)
{
    return !t->lost ? ATTN_OK
                    : attn_fail(ATTN_ERR_INTERNAL,
                                "the driver recorded no event behind what was queued before: only "
                                "commit and abort can wait for it");
}

/* Around the launch of a graph nothing is captured: an event recorded there would be the graph's,
 * and say nothing of the stream; one waited for would end the capture. */
static attn_status_t
check_launch(const cuda_order_t *t, CUstream stream, const char *call)
{
    bool captured;
    attn_status_t status = cuda_order_check(t);

    if (status != ATTN_OK || (status = cuda_is_captured(stream, &captured)) != ATTN_OK) {
        return status;
    }
    return !captured ? ATTN_OK
                     : attn_fail(ATTN_ERR_INVALID, "%s: the stream is being captured", call);
}

attn_status_t
cuda_order_before(cuda_order_t *t, CUstream stream)
{
    attn_status_t status;

    if (t->replaying && t->last != stream) {
        return attn_fail(ATTN_ERR_BUSY, "a graph of this step is launched on another stream: "
                                        "attn_step_replayed() comes first");
    }
    if ((status = check_launch(t, stream, "attn_step_replay()")) == ATTN_OK &&
        (status = cuda_order_follow(t, stream)) == ATTN_OK) {
        t->replaying = true;
        t->last      = stream;
    }
    return status;
}

attn_status_t
cuda_order_after(cuda_order_t *t, CUstream stream)
{
    attn_status_t status;

    if (!t->replaying || t->last != stream) {
        return attn_fail(ATTN_ERR_INVALID,
                         "attn_step_replayed() is for the stream of the attn_step_replay() before");
    }
    if ((status = check_launch(t, stream, "attn_step_replayed()")) != ATTN_OK) {
        return status;
    }
    t->replaying = false;
    return cuda_order_note(t, stream);
}

/* An error says that nothing runs on only if it is one that stays. After any other nobody knows. */
static bool
is_over(cuda_order_t *t, CUevent event)
{
    CUresult result = cuda_driver()->cuEventQuery(event);

    if (result != CUDA_ERROR_NOT_READY && cuda_check(result, "cuEventQuery") != ATTN_OK) {
        t->lost = true;
    }
    return result == CUDA_SUCCESS;
}

/* after() was never called: what the stream has now is waited for, when it is not captured. */
static bool
end_replay(cuda_order_t *t)
{
    bool captured        = false;
    attn_status_t status = cuda_is_captured(t->last, &captured);

    if (status == ATTN_OK && captured) {
        return false;
    }
    t->replaying = false;
    if (status == ATTN_OK && t->last != CU_STREAM_PER_THREAD) {
        cuda_order_note(t, t->last);
    } else {
        t->lost = true; /* it may be gone, or another thread's */
    }
    return true;
}

/* Has all ended? What events do not tell of is waited for, with everything else that the device
 * has: a last resort, without a bound, after a driver that failed or a stream that went too soon.
 */
static bool
look(cuda_order_t *t)
{
    if (t->replaying && !end_replay(t)) {
        return false;
    }
    if (!t->lost && is_over(t, t->ready) && (!t->queued || is_over(t, t->done))) {
        return true;
    }
    if (t->lost && CUDA_CALL(cuCtxSynchronize()) == ATTN_OK) {
        t->lost   = false;
        t->queued = false;
        return true;
    }
    return cuda_broken() != NULL;
}

bool
cuda_order_wait(cuda_order_t *t, uint64_t until_ns)
{
    uint64_t start = attn_now_ns();

    while (!look(t)) {
        uint64_t now = attn_now_ns();
        if (now >= until_ns) {
            return false;
        }
        if (now - start < SPIN_NS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
        }
    }
    return true;
}

/* ---- life ---- */

attn_status_t
cuda_order_open(cuda_order_t *t)
{
    attn_status_t status;

    if ((status = CUDA_CALL(cuStreamCreate(&t->stream, CU_STREAM_NON_BLOCKING))) != ATTN_OK ||
        (status = CUDA_CALL(cuEventCreate(&t->ready, CU_EVENT_DISABLE_TIMING))) != ATTN_OK) {
        return status;
    }
    return CUDA_CALL(cuEventCreate(&t->done, CU_EVENT_DISABLE_TIMING));
}

void
cuda_order_close(cuda_order_t *t)
{
    const cuda_driver_t *cu = cuda_driver();

    if (t->ready != NULL) {
        cu->cuEventDestroy(t->ready);
    }
    if (t->done != NULL) {
        cu->cuEventDestroy(t->done);
    }
    if (t->stream != NULL) {
        cu->cuStreamDestroy(t->stream);
    }
}

attn_status_t
cuda_order_ready(cuda_order_t *t)
{
    return CUDA_CALL(cuEventRecord(t->ready, t->stream));
}

void
cuda_order_anew(cuda_order_t *t)
{
    t->queued    = false;
    t->replaying = false;
    t->lost      = false;
}
