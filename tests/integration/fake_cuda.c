/*
 * fake_cuda.c: a libcuda.so.1 for machines without a GPU. Its devices have memory, which is the
 * process' own; streams keep order, events and graphs are what they are, and calls that a driver
 * refuses are refused: without a context, or while a stream is captured by someone who forbids
 * them. Kernels do nothing, or what fake_kernels.c has, or fail as a test wants:
 *
 *     FAKE_CUDA_DEVICES    how many there are (1)
 *     FAKE_CUDA_FREE_MIB   memory of each that is free (256), of as much again
 *     FAKE_CUDA_FAIL       a file: while it is there, kernels fail with the CUresult that it holds
 *     FAKE_CUDA_PLAY       if it is set kernels are played
 *
 * Tests in the same process look up fake_cuda_hold(), _count() and _alive().
 */
#include "tests/integration/fake_kernels.h"

#include <cuda.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define VISIBLE __attribute__((visibility("default")))
#define MIB ((size_t)1 << 20)

/* ---- what is queued ---- */

typedef enum op_kind { OP_KERNEL, OP_COPY, OP_FILL, OP_RECORD, OP_WAIT } op_kind_t;

typedef struct op {
    op_kind_t kind;
    const fake_kernel_t *kernel;
    uint32_t grid;
    unsigned char args[2][FAKE_ARGS_MAX];
    void *to;
    const void *from;
    size_t bytes;
    int byte;
    struct CUevent_st *event;
    unsigned long long ticket;
    struct op *next;
} op_t;

typedef struct ops {
    op_t *first, **end;
} ops_t;

struct CUevent_st {
    unsigned long long recorded, done; /* the last ticket given out, and reached */
};

struct CUgraph_st {
    ops_t ops;
};

struct CUstream_st {
    ops_t ops;
    bool held;
    CUgraph capture; /* NULL: it is not captured */
    CUstreamCaptureMode mode;
    struct CUstream_st *next;
};

static pthread_mutex_t lock        = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static struct CUstream_st legacy   = {.ops = {.end = &legacy.ops.first}};
static struct CUstream_st *streams = &legacy;
static int alive; /* streams, events, memory that were made, less those that are gone */
static size_t taken;
static struct count {
    const char *name;
    int n;
} counts[64];

static _Thread_local CUcontext contexts[16];
static _Thread_local int depth; /* of those */
static _Thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

static void
count(const char *name)
{
    struct count *c = counts;

    while (c->name != NULL && strcmp(c->name, name) != 0) {
        c++;
    }
    c->name = name;
    c->n++;
}

static CUstream
stream_of(CUstream stream)
{
    return stream == NULL ? &legacy : stream;
}

/* A thread's call that a capture with the mode "global" of any thread does not bear. */
static CUresult
unsafe(const char *name)
{
    CUresult result = depth > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;

    count(name);
    for (CUstream s = streams; s != NULL && mode != CU_STREAM_CAPTURE_MODE_RELAXED; s = s->next) {
        if (s->capture != NULL && s->mode == CU_STREAM_CAPTURE_MODE_GLOBAL) {
            result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return result;
}

static void
push(ops_t *ops, const op_t *op)
{
    op_t *copy = malloc(sizeof(*copy));

    *copy      = *op;
    copy->next = NULL;
    *ops->end  = copy;
    ops->end   = &copy->next;
}

static void
do_op(const op_t *op)
{
    if (op->kind == OP_KERNEL && op->kernel->play != NULL && getenv("FAKE_CUDA_PLAY") != NULL) {
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

/* Everything that may go on goes on. */
static void
pump(void)
{
    bool moved = true;

    while (moved) {
        moved = false;
        for (CUstream s = streams; s != NULL; s = s->next) {
            op_t *op;
            while ((op = s->ops.first) != NULL && !s->held &&
                   (op->kind != OP_WAIT || op->event->done >= op->ticket)) {
                do_op(op);
                s->ops.first = op->next;
                s->ops.end   = op->next == NULL ? &s->ops.first : s->ops.end;
                free(op);
                moved = true;
            }
        }
    }
}

static CUresult
queue(CUstream on, const op_t *op)
{
    CUstream stream = stream_of(on);

    if (depth == 0) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    pthread_mutex_lock(&lock);
    if (stream->capture != NULL && (op->kind == OP_WAIT || op->kind == OP_RECORD)) {
        pthread_mutex_unlock(&lock);
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION; /* none of ours has a part in captures */
    }
    push(stream->capture != NULL ? &stream->capture->ops : &stream->ops, op);
    pump();
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

/* ---- for tests ---- */

/** Nothing goes on on the stream until it is let go. */
VISIBLE void
fake_cuda_hold(CUstream stream, int held)
{
    pthread_mutex_lock(&lock);
    stream_of(stream)->held = held != 0;
    pump();
    pthread_mutex_unlock(&lock);
}

/** How often a function was called; of those that take or free memory, wait, query or launch. */
VISIBLE int
fake_cuda_count(const char *name)
{
    int n = 0;

    pthread_mutex_lock(&lock);
    for (struct count *c = counts; c->name != NULL; c++) {
        n = strcmp(c->name, name) == 0 ? c->n : n;
    }
    pthread_mutex_unlock(&lock);
    return n;
}

/** Streams, events and pieces of memory that are there; contexts that the thread has. */
VISIBLE int
fake_cuda_alive(int *of_contexts)
{
    *of_contexts = depth;
    return alive;
}

static unsigned
from_environment(const char *name, unsigned otherwise)
{
    const char *text = getenv(name);

    return text != NULL ? (unsigned)strtoul(text, NULL, 10) : otherwise;
}

static size_t
device_bytes(void)
{
    return 2 * from_environment("FAKE_CUDA_FREE_MIB", 256) * MIB;
}

VISIBLE CUresult
cuInit(unsigned flags)
{
    (void)flags;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGetErrorName(CUresult error, const char **name)
{
    *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGetErrorString(CUresult error, const char **text)
{
    (void)error;
    *text = "as the test wants it";
    return CUDA_SUCCESS;
}

/* ---- devices ---- */

VISIBLE CUresult
cuDeviceGetCount(int *count)
{
    *count = (int)from_environment("FAKE_CUDA_DEVICES", 1);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDeviceGetName(char *name, int room, CUdevice device)
{
    snprintf(name, (size_t)room, "Fake GPU %d", device);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    (void)device;
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
             : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? 4
                                                                         : 232448;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)(size_t)(device + 1);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDevicePrimaryCtxRelease(CUdevice device)
{
    (void)device;
    return CUDA_SUCCESS;
}

static struct {
    CUdeviceptr at;
    size_t bytes;
} ranges[1024]; /* memory of the device */

VISIBLE CUresult
cuCtxPushCurrent(CUcontext context)
{
    contexts[depth++] = context;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuCtxPopCurrent(CUcontext *context)
{
    if (depth == 0) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *context = contexts[--depth];
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *with)
{
    CUstreamCaptureMode before = mode;

    mode  = *with;
    *with = before;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuCtxSynchronize(void)
{
    return cuStreamSynchronize(NULL);
}

/* ---- memory ---- */

VISIBLE CUresult
cuMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total      = device_bytes();
    *free_bytes = device_bytes() / 2 - taken;
    return CUDA_SUCCESS;
}

/* Its size stands in the page before. */
static CUresult
memory_take(CUdeviceptr *at, size_t bytes)
{
    if (bytes > device_bytes() / 2 - taken) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    char *page = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (page == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    taken += bytes;
    alive++;
    *(size_t *)page = bytes;
    *at             = (CUdeviceptr)(page + 4096);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        if (ranges[i].bytes == 0) {
            ranges[i].at    = *at;
            ranges[i].bytes = bytes;
            break;
        }
    }
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemAlloc(CUdeviceptr *at, size_t bytes)
{
    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuMemAlloc");
    if (result == CUDA_SUCCESS) {
        result = memory_take(at, bytes);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

VISIBLE CUresult
cuMemFree(CUdeviceptr at)
{
    char *page = (char *)at - 4096;

    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuMemFree");
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]) && result == CUDA_SUCCESS; i++) {
        if (ranges[i].bytes > 0 && ranges[i].at == at) {
            ranges[i].bytes = 0;
        }
    }
    if (result == CUDA_SUCCESS) {
        taken -= *(size_t *)page;
        alive--;
        munmap(page, *(size_t *)page + 4096);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

VISIBLE CUresult
cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at)
{
    CUresult result = CUDA_ERROR_INVALID_VALUE;

    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        if (ranges[i].bytes > 0 && at >= ranges[i].at && at < ranges[i].at + ranges[i].bytes) {
            *(unsigned *)value =
                attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
            result = CUDA_SUCCESS;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

VISIBLE CUresult
cuMemHostAlloc(void **at, size_t bytes, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuMemHostAlloc");
    *at             = result == CUDA_SUCCESS ? calloc(1, bytes) : NULL;
    alive += *at != NULL;
    pthread_mutex_unlock(&lock);
    return *at != NULL || result != CUDA_SUCCESS ? result : CUDA_ERROR_OUT_OF_MEMORY;
}

VISIBLE CUresult
cuMemFreeHost(void *at)
{
    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuMemFreeHost");
    if (result == CUDA_SUCCESS) {
        free(at);
        alive--;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

VISIBLE CUresult
cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    return queue(stream, &(op_t){.kind = OP_COPY, .to = (void *)to, .from = from, .bytes = bytes});
}

VISIBLE CUresult
cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return queue(stream,
                 &(op_t){.kind = OP_COPY, .to = to, .from = (const void *)from, .bytes = bytes});
}

VISIBLE CUresult
cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return cuMemcpyHtoDAsync(to, (const void *)from, bytes, stream);
}

/* Calls that wait, as a whole: on the legacy stream. */
VISIBLE CUresult
cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes)
{
    CUresult result = cuMemcpyHtoDAsync(to, from, bytes, NULL);

    return result == CUDA_SUCCESS ? cuStreamSynchronize(NULL) : result;
}

VISIBLE CUresult
cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes)
{
    CUresult result = cuMemcpyDtoHAsync(to, from, bytes, NULL);

    return result == CUDA_SUCCESS ? cuStreamSynchronize(NULL) : result;
}

VISIBLE CUresult
cuMemcpy2DAsync(const CUDA_MEMCPY2D *copy, CUstream stream)
{
    CUresult result = CUDA_SUCCESS;

    for (size_t r = 0; r < copy->Height && result == CUDA_SUCCESS; r++) {
        result =
            cuMemcpyDtoDAsync(copy->dstDevice + r * copy->dstPitch,
                              copy->srcDevice + r * copy->srcPitch, copy->WidthInBytes, stream);
    }
    return result;
}

VISIBLE CUresult
cuMemsetD8Async(CUdeviceptr at, unsigned char byte, size_t bytes, CUstream stream)
{
    return queue(stream, &(op_t){.kind = OP_FILL, .to = (void *)at, .byte = byte, .bytes = bytes});
}

/* ---- streams and events ---- */

VISIBLE CUresult
cuStreamCreate(CUstream *stream, unsigned flags)
{
    CUstream made = calloc(1, sizeof(*made));

    (void)flags;
    pthread_mutex_lock(&lock);
    made->ops.end = &made->ops.first;
    made->next    = streams;
    streams       = made;
    *stream       = made;
    alive++;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamDestroy(CUstream stream)
{
    pthread_mutex_lock(&lock);
    for (CUstream *at = &streams; *at != NULL; at = *at != NULL ? &(*at)->next : at) {
        if (*at == stream) {
            *at = stream->next;
            free(stream);
            alive--;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamSynchronize(CUstream stream)
{
    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuStreamSynchronize");
    while (result == CUDA_SUCCESS && stream_of(stream)->ops.first != NULL) {
        pthread_mutex_unlock(&lock);
        usleep(100);
        pthread_mutex_lock(&lock);
        pump();
    }
    pthread_mutex_unlock(&lock);
    return result;
}

VISIBLE CUresult
cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    (void)flags;
    return queue(stream, &(op_t){.kind = OP_WAIT, .event = event, .ticket = event->recorded});
}

VISIBLE CUresult
cuEventCreate(CUevent *event, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    alive++;
    pthread_mutex_unlock(&lock);
    *event = calloc(1, sizeof(**event));
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventDestroy(CUevent event)
{
    pthread_mutex_lock(&lock);
    alive--;
    pthread_mutex_unlock(&lock);
    free(event);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventRecord(CUevent event, CUstream stream)
{
    return queue(stream, &(op_t){.kind = OP_RECORD, .event = event, .ticket = ++event->recorded});
}

VISIBLE CUresult
cuEventQuery(CUevent event)
{
    pthread_mutex_lock(&lock);
    CUresult result = unsafe("cuEventQuery");
    pump();
    if (result == CUDA_SUCCESS && event->done < event->recorded) {
        result = CUDA_ERROR_NOT_READY;
    }
    pthread_mutex_unlock(&lock);
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

/* ---- kernels ---- */

VISIBLE CUresult
cuModuleLoadData(CUmodule *module, const void *image)
{
    (void)image;
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuModuleUnload(CUmodule module)
{
    (void)module;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    (void)module;
    *function = (CUfunction)(size_t)fake_kernel_find(name);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    (void)function;
    (void)attribute;
    (void)value;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **args, void **extra)
{
    const char *path = getenv("FAKE_CUDA_FAIL");
    FILE *file       = path != NULL ? fopen(path, "r") : NULL;
    unsigned result  = CUDA_SUCCESS;
    op_t op          = {.kind   = OP_KERNEL,
                        .kernel = (const fake_kernel_t *)(size_t)function,
                        .grid   = config->gridDimX};

    (void)extra;
    pthread_mutex_lock(&lock);
    count("cuLaunchKernelEx");
    pthread_mutex_unlock(&lock);
    if (file != NULL) {
        if (fscanf(file, "%u", &result) != 1) {
            result = CUDA_SUCCESS;
        }
        fclose(file);
    }
    for (int i = 0; i < 2 && op.kernel->bytes[i] > 0; i++) {
        memcpy(op.args[i], args[i], op.kernel->bytes[i]);
    }
    return result == CUDA_SUCCESS ? queue(config->hStream, &op) : (CUresult)result;
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
    op_t *op;

    while ((op = graph->ops.first) != NULL) {
        graph->ops.first = op->next;
        free(op);
    }
    free(graph);
}

VISIBLE CUresult
cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode with)
{
    pthread_mutex_lock(&lock);
    stream->capture = graph_new();
    stream->mode    = with;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    pthread_mutex_lock(&lock);
    *graph          = stream->capture;
    stream->capture = NULL;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    *status = stream_of(stream)->capture != NULL ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                                 : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
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
        result = queue(stream, op);
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
