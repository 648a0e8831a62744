/*
 * core.c: the library's own life and its clock: the small things that server and client
 * share.
 */
#include "rpc/rpc_int.h"

#include "base/clock.h"
#include "base/log.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <string.h>

/* What C core calls an error is mostly an operating condition that its caller gets as a
 * status too (an address in use, a peer gone), so it is told at a lower level here. */
static void
log_of_core(gpr_log_func_args *args)
{
    attn_log_level_t level =
        args->severity == GPR_LOG_SEVERITY_ERROR ? ATTN_LOG_INFO : ATTN_LOG_DEBUG;
    attn_log(level, "rpc.core", "file=%s line=%d message=\"%s\"", args->file, args->line,
             args->message);
}

/*
 * C core's locks are Abseil's. As Debian builds these, each one that is taken while another is held
 * goes into one graph of all locks of the process, under one lock of its own, to find cycles: a
 * sixth of a small round trip. Abseil has a function to leave it. It is C++, with the
 * distribution's mark in its name, so it is called where it is found; without it nothing but time
 * is lost.
 */
static void
stop_looking_for_lock_cycles(void)
{
    enum { IGNORE = 0 }; /* absl::OnDeadlockCycle::kIgnore */
    void *set = dlsym(RTLD_DEFAULT,
                      "_ZN4absl7debian329SetMutexDeadlockDetectionModeENS0_15OnDeadlockCycleE");

    if (set != NULL) {
        ((void (*)(int))(uintptr_t)set)(IGNORE);
    }
}

static void
set_up_once(void)
{
    gpr_set_log_function(log_of_core);
    stop_looking_for_lock_cycles();
}

void
rpc_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, set_up_once);
    grpc_init();
}

void
rpc_shutdown(void)
{
    grpc_shutdown();
}

gpr_timespec
rpc_timespec(uint64_t deadline_ns)
{
    if (deadline_ns == UINT64_MAX) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    return (gpr_timespec){
        .tv_sec     = (int64_t)(deadline_ns / UINT64_C(1000000000)),
        .tv_nsec    = (int32_t)(deadline_ns % UINT64_C(1000000000)),
        .clock_type = GPR_CLOCK_MONOTONIC, /* CLOCK_MONOTONIC, as attn_now_ns() */
    };
}

uint64_t
rpc_deadline_from(gpr_timespec deadline)
{
    gpr_timespec t = gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC);

    if (gpr_time_cmp(t, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0) {
        return UINT64_MAX;
    }
    if (t.tv_sec < 0) {
        return 0;
    }
    if ((uint64_t)t.tv_sec >= UINT64_MAX / UINT64_C(1000000000)) {
        return UINT64_MAX; /* a peer may say 99,999,999 hours, beyond what nanoseconds count */
    }
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

void
rpc_start(grpc_call *call, const grpc_op *ops, size_t n, rpc_op_t *op)
{
    RPC_OP_RELEASE(op);
    grpc_call_error error = grpc_call_start_batch(call, ops, n, op, NULL);
    assert(error == GRPC_CALL_OK);
    (void)error;
}

bool
rpc_dispatch(grpc_event event)
{
    if (event.type != GRPC_OP_COMPLETE) {
        return false;
    }
    rpc_op_t *op = event.tag;
    RPC_OP_ACQUIRE(op);
    op->done(op, event.success != 0);
    return true;
}

grpc_slice
rpc_sentence_slice(const char *sentence)
{
    size_t size = sentence == NULL ? 0 : strnlen(sentence, RPC_SENTENCE_MAX + 1);

    if (size > RPC_SENTENCE_MAX) {
        size = RPC_SENTENCE_MAX;
        while (size > 0 && ((unsigned char)sentence[size] & 0xc0) == 0x80) {
            size--; /* a UTF-8 character is kept whole or not at all */
        }
    }
    return grpc_slice_from_copied_buffer(sentence, size);
}

void
rpc_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

bool
rpc_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline_ns)
{
    if (deadline_ns == UINT64_MAX) {
        pthread_cond_wait(cond, lock);
        return true;
    }
    struct timespec until = {
        .tv_sec  = (time_t)(deadline_ns / UINT64_C(1000000000)),
        .tv_nsec = (long)(deadline_ns % UINT64_C(1000000000)),
    };
    return pthread_cond_timedwait(cond, lock, &until) != ETIMEDOUT;
}
