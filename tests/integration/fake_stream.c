/*
 * fake_stream.c: streams, events and graphs of fake_cuda.c. What is queued runs in whichever thread
 * calls next, as soon as nothing keeps it back: what stands before it on its stream, an event, the
 * legacy stream or those that wait for it, or a test, which can hold streams. What ends late is
 * queued work that a test holds: then a driver's answers of "not yet" are ours, too.
 *
 * Of a stream that was destroyed the work goes on, and calls with it are refused.
 */
#include "tests/integration/fake_cuda.h"

#include "base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct ops {
    op_t *first, **end;
} ops_t;

struct CUevent_st {
    unsigned long long recorded, done; /* the last ticket given out, and reached */
    bool captured;                     /* it was last recorded on a stream that was captured */
};

struct CUgraph_st {
    ops_t ops;
};

typedef enum held { AS_ALL, LET_GO, HELD } held_t;

struct CUstream_st {
    ops_t ops;
    bool alone; /* CU_STREAM_NON_BLOCKING */
    bool gone;
    held_t held;
    CUgraph capture; /* NULL: it is not captured */
    CUstreamCaptureMode mode;
    bool spoilt; /* what is captured was broken off */
    struct CUstream_st *next;
};

pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
int fake_alive;

static struct CUstream_st legacy   = {.ops = {.end = &legacy.ops.first}};
static struct CUstream_st *streams = &legacy; /* also those that are gone */
static bool all_held, idle; /* idle: kernels do nothing, whatever the environment says */
static unsigned long long numbers;
static struct count {
    const char *name;
    int n;
    CUresult fails; /* the next ... */
    int n_fails;    /* ... calls */
} counts[64];

static _Thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

/* ---- calls ---- */

static struct count *
count_of(const char *name)
{
    struct count *c = counts;

    while (c->name != NULL && strcmp(c->name, name) != 0) {
        c++;
    }
    c->name = name;
    return c;
}

CUresult
fake_call(const char *name)
{
    struct count *c = count_of(name);

    c->n++;
    if (c->n_fails > 0) {
        c->n_fails--;
        return c->fails;
    }
    return fake_context() != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult
fake_unsafe(const char *name)
{
    CUresult result = fake_call(name);

    for (CUstream s = streams; s != NULL && mode != CU_STREAM_CAPTURE_MODE_RELAXED; s = s->next) {
        if (s->capture != NULL && s->mode == CU_STREAM_CAPTURE_MODE_GLOBAL) {
            s->spoilt = true;
            result    = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return result;
}

/* Under the lock. */
static CUstream
stream_new(unsigned flags)
{
    CUstream made = calloc(1, sizeof(*made));

    made->alone   = (flags & CU_STREAM_NON_BLOCKING) != 0;
    made->ops.end = &made->ops.first;
    made->next    = streams;
    streams       = made;
    return made;
}

/* Of a handle: two stand for streams that nobody made, one of them for another on each thread.
 * Under the lock. */
static CUstream
stream_at(CUstream handle)
{
    static _Thread_local CUstream own;

    if (handle == CU_STREAM_PER_THREAD && own == NULL) {
        own = stream_new(CU_STREAM_DEFAULT);
    }
    return handle == CU_STREAM_PER_THREAD                 ? own
           : handle == NULL || handle == CU_STREAM_LEGACY ? &legacy
                                                          : handle;
}

/* What a call with a stream comes to. The legacy stream cannot be used while a stream that waits
 * for it is captured, and that capture is over. */
static CUresult
stream_call(const char *name, CUstream *stream)
{
    CUresult result = fake_call(name);

    *stream = stream_at(*stream);
    for (CUstream s = streams; s != NULL && *stream == &legacy; s = s->next) {
        if (s->capture != NULL && !s->alone) {
            s->spoilt = true;
            result    = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        }
    }
    return (*stream)->gone ? CUDA_ERROR_INVALID_HANDLE : result;
}

/* ---- what is queued ---- */

static void
push(ops_t *ops, const op_t *op)
{
    op_t *copy = malloc(sizeof(*copy));

    *copy      = *op;
    copy->next = NULL;
    *ops->end  = copy;
    ops->end   = &copy->next;
}

/* What the environment says, as it was when something was first queued: a thread of ours looks. */
static struct {
    bool known, play;
    char idle[256], hold[256];
} said;

static void
read_environment(void)
{
    const char *idle_file = getenv("FAKE_CUDA_IDLE"), *hold_file = getenv("FAKE_CUDA_HOLD");

    if (!said.known) {
        snprintf(said.idle, sizeof(said.idle), "%s", idle_file != NULL ? idle_file : "");
        snprintf(said.hold, sizeof(said.hold), "%s", hold_file != NULL ? hold_file : "");
        said.play  = getenv("FAKE_CUDA_PLAY") != NULL;
        said.known = true;
    }
}

static bool
is_file(const char *path)
{
    return path[0] != '\0' && access(path, F_OK) == 0;
}

bool
fake_is_file(const char *variable)
{
    const char *path = getenv(variable);

    return path != NULL && is_file(path);
}

static void
do_op(const op_t *op)
{
    if (op->kind == OP_KERNEL && op->kernel->play != NULL && !idle && said.play &&
        !is_file(said.idle)) {
        op->kernel->play(op->kernel, op->grid,
                         (void *[]){(void *)op->args[0], (void *)op->args[1]});
    } else if (op->kind == OP_COPY) {
        memcpy(op->to, op->from, op->bytes);
    } else if (op->kind == OP_FILL) {
        memset(op->to, op->byte, op->bytes);
    } else if (op->kind == OP_RECORD && op->ticket > op->event->done) {
        op->event->done = op->ticket;
    }
}

/* May the first of a stream run? The legacy stream and those that wait for it keep the order in
 * which they were queued on. */
static bool
may_run(const struct CUstream_st *s, op_t *op)
{
    if (s->held == HELD || (s->held == AS_ALL && all_held) ||
        (op->kind == OP_WAIT && op->event->done < op->ticket)) {
        return false;
    }
    for (CUstream other = streams; other != NULL && !s->alone; other = other->next) {
        if (!other->alone && (other == &legacy || s == &legacy) && other->ops.first != NULL &&
            other->ops.first->number < op->number) {
            return false;
        }
    }
    if (op->kind != OP_KERNEL || op->kernel->ready == NULL || idle || !said.play) {
        return true;
    }
    op->begun_ns = op->begun_ns == 0 ? attn_now_ns() : op->begun_ns;
    return op->kernel->ready(op->begun_ns, (void *[]){op->args[0], op->args[1]});
}

/* Everything that may go on goes on. */
static void
pump(void)
{
    bool moved = !is_file(said.hold);

    while (moved) {
        moved = false;
        for (CUstream s = streams; s != NULL; s = s->next) {
            op_t *op;
            while ((op = s->ops.first) != NULL && may_run(s, op)) {
                do_op(op);
                s->ops.first = op->next;
                s->ops.end   = op->next == NULL ? &s->ops.first : s->ops.end;
                free(op);
                moved = true;
            }
        }
    }
}

/* The device goes on by itself. */
static void *
go_on(void *arg)
{
    (void)arg;
    for (;;) {
        pthread_mutex_lock(&fake_lock);
        pump();
        pthread_mutex_unlock(&fake_lock);
        usleep(50);
    }
    return NULL;
}

static void
start_going_on(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, go_on, NULL) == 0) {
        pthread_detach(thread);
    }
}

static CUresult
queue(const char *name, CUstream stream, const op_t *op)
{
    static pthread_once_t started = PTHREAD_ONCE_INIT;
    op_t numbered                 = *op;
    CUresult result               = stream_call(name, &stream);

    if (op->kind == OP_KERNEL &&
        (op->kernel->ready == fake_take_ready || op->kernel->ready == fake_ask_ready)) {
        pthread_once(&started, start_going_on);
    }

    if (result != CUDA_SUCCESS) {
        return result;
    }
    if (stream->spoilt) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    read_environment();
    numbered.number = ++numbers;
    push(stream->capture != NULL ? &stream->capture->ops : &stream->ops, &numbered);
    pump();
    return CUDA_SUCCESS;
}

CUresult
fake_queue(CUstream stream, const op_t *op)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = queue("queue", stream, op);
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* ---- for tests ---- */

static void
drop(ops_t *ops)
{
    op_t *op;

    while ((op = ops->first) != NULL) {
        ops->first = op->next;
        free(op);
    }
    ops->end = &ops->first;
}

/** Nothing goes on on the stream until it is let go; -1: what it has never runs. */
VISIBLE void
fake_cuda_hold(CUstream stream, int held)
{
    pthread_mutex_lock(&fake_lock);
    CUstream on = stream_at(stream);
    if (held < 0) {
        drop(&on->ops);
    }
    on->held = held > 0 ? HELD : LET_GO;
    pump();
    pthread_mutex_unlock(&fake_lock);
}

/** Nothing goes on on any stream, also of those to come, that is not let go after this; or all. */
VISIBLE void
fake_cuda_hold_all(int held)
{
    pthread_mutex_lock(&fake_lock);
    all_held = held != 0;
    for (CUstream s = streams; s != NULL; s = s->next) {
        s->held = AS_ALL;
    }
    pump();
    pthread_mutex_unlock(&fake_lock);
}

/** Kernels do nothing for a while: an engine that opens measures itself with large ones. */
VISIBLE void
fake_cuda_idle(int now)
{
    pthread_mutex_lock(&fake_lock);
    idle = now != 0;
    pthread_mutex_unlock(&fake_lock);
}

/** The next n calls of a function that is counted fail so. */
VISIBLE void
fake_cuda_spoil(const char *name, CUresult with, int n)
{
    pthread_mutex_lock(&fake_lock);
    struct count *c = count_of(name);
    c->fails        = with;
    c->n_fails      = n;
    pthread_mutex_unlock(&fake_lock);
}

/** How often a function was called: of those that take or free memory, wait, query, record or
 * launch, and "queue" for those that copy or fill. */
VISIBLE int
fake_cuda_count(const char *name)
{
    pthread_mutex_lock(&fake_lock);
    int n = count_of(name)->n;
    pthread_mutex_unlock(&fake_lock);
    return n;
}

/* ---- capture modes ---- */

VISIBLE CUresult
cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *with)
{
    CUstreamCaptureMode before = mode;

    mode  = *with;
    *with = before;
    return CUDA_SUCCESS;
}

/* ---- streams ---- */

VISIBLE CUresult
cuStreamCreate(CUstream *stream, unsigned flags)
{
    pthread_mutex_lock(&fake_lock);
    *stream = stream_new(flags);
    fake_alive++;
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    return priority == 0 || priority == -5 ? cuStreamCreate(stream, flags)
                                           : CUDA_ERROR_INVALID_VALUE;
}

VISIBLE CUresult
cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    *least    = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamDestroy(CUstream stream)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = stream->gone ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
    fake_alive -= !stream->gone;
    stream->gone = true;
    pthread_mutex_unlock(&fake_lock);
    return result;
}

static CUresult
drain(const char *name, CUstream stream, bool all)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe(name), called = stream_call("drain", &stream);
    bool busy = result == CUDA_SUCCESS && called == CUDA_SUCCESS;
    while (busy) {
        pump();
        busy = stream->ops.first != NULL;
        for (CUstream s = streams; s != NULL && all; s = s->next) {
            busy = busy || s->ops.first != NULL;
        }
        if (busy) {
            pthread_mutex_unlock(&fake_lock);
            usleep(100);
            pthread_mutex_lock(&fake_lock);
        }
    }
    pthread_mutex_unlock(&fake_lock);
    return result == CUDA_SUCCESS ? called : result;
}

VISIBLE CUresult
cuStreamSynchronize(CUstream stream)
{
    return drain("cuStreamSynchronize", stream, false);
}

VISIBLE CUresult
cuCtxSynchronize(void)
{
    return drain("cuCtxSynchronize", NULL, true);
}

VISIBLE CUresult
cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    CUresult result;

    (void)flags;
    pthread_mutex_lock(&fake_lock);
    CUstream on = stream_at(stream);
    if ((on->capture != NULL) != event->captured) { /* none of ours has a part in captures */
        on->spoilt = on->capture != NULL;
        result     = CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    } else {
        result = queue("cuStreamWaitEvent", stream,
                       &(op_t){.kind = OP_WAIT, .event = event, .ticket = event->recorded});
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* ---- events ---- */

VISIBLE CUresult
cuEventCreate(CUevent *event, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&fake_lock);
    fake_alive++;
    pthread_mutex_unlock(&fake_lock);
    *event = calloc(1, sizeof(**event));
    return CUDA_SUCCESS;
}

/* What is queued may name it still: it stays in memory, and is lost only to this process. */
VISIBLE CUresult
cuEventDestroy(CUevent event)
{
    static CUevent graves[4096];
    static unsigned n;

    pthread_mutex_lock(&fake_lock);
    fake_alive--;
    graves[n++ % 4096] = event;
    pthread_mutex_unlock(&fake_lock);
    return graves[0] != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Of a stream that is captured the event is the graph's, and no more of what was recorded before.
 */
VISIBLE CUresult
cuEventRecord(CUevent event, CUstream stream)
{
    pthread_mutex_lock(&fake_lock);
    CUstream on = stream_at(stream);
    CUresult result =
        queue("cuEventRecord", stream,
              &(op_t){.kind = OP_RECORD, .event = event, .ticket = event->recorded + 1});
    if (result == CUDA_SUCCESS) {
        event->recorded++;
        event->captured = on->capture != NULL;
    }
    pump();
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuEventQuery(CUevent event)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuEventQuery");
    pump();
    if (result == CUDA_SUCCESS && event->captured) {
        result = CUDA_ERROR_CAPTURED_EVENT;
    } else if (result == CUDA_SUCCESS && event->done < event->recorded) {
        result = CUDA_ERROR_NOT_READY;
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuEventSynchronize(CUevent event)
{
    CUresult result;

    while ((result = cuEventQuery(event)) == CUDA_ERROR_NOT_READY) {
        usleep(100);
    }
    return result;
}

VISIBLE CUresult
cuEventElapsedTime(float *ms, CUevent start, CUevent end)
{
    (void)start;
    (void)end;
    *ms = 1;
    return CUDA_SUCCESS;
}

/* ---- graphs ---- */

static CUgraph
graph_new(void)
{
    CUgraph graph  = calloc(1, sizeof(*graph));
    graph->ops.end = &graph->ops.first;
    return graph;
}

static void
graph_free(CUgraph graph)
{
    drop(&graph->ops);
    free(graph);
}

VISIBLE CUresult
cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode with)
{
    pthread_mutex_lock(&fake_lock);
    stream->capture = graph_new();
    stream->mode    = with;
    stream->spoilt  = false;
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    pthread_mutex_lock(&fake_lock);
    bool spoilt     = stream->spoilt;
    *graph          = stream->capture;
    stream->capture = NULL;
    stream->spoilt  = false;
    if (spoilt) {
        graph_free(*graph);
        *graph = NULL;
    }
    pthread_mutex_unlock(&fake_lock);
    return spoilt ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    CUresult result = CUDA_SUCCESS;

    pthread_mutex_lock(&fake_lock);
    CUstream on = stream_at(stream);
    for (CUstream s = streams; s != NULL && on == &legacy; s = s->next) {
        if (s->capture != NULL && !s->alone) {
            result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        }
    }
    *status = on->capture == NULL ? CU_STREAM_CAPTURE_STATUS_NONE
              : on->spoilt        ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                  : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    result  = on->gone ? CUDA_ERROR_INVALID_HANDLE : result;
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags)
{
    CUgraph copy = graph_new();

    (void)flags;
    for (const op_t *op = graph->ops.first; op != NULL; op = op->next) {
        push(&copy->ops, op);
    }
    *exec = (CUgraphExec)copy;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphLaunch(CUgraphExec exec, CUstream stream)
{
    CUresult result = CUDA_SUCCESS;

    for (op_t *op = ((CUgraph)exec)->ops.first; op != NULL && result == CUDA_SUCCESS;
         op       = op->next) {
        result = fake_queue(stream, op);
    }
    return result;
}

VISIBLE CUresult
cuGraphExecDestroy(CUgraphExec exec)
{
    graph_free((CUgraph)exec);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphDestroy(CUgraph graph)
{
    graph_free(graph);
    return CUDA_SUCCESS;
}
