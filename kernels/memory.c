/*
 * Calls of the driver by their names in its library, whose types are those of its stable binary
 * interface: so this needs no CUDA toolkit, and a client without GPU kernels has it, too.
 */
#include "kernels/memory_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* How long a wait looks without a pause, and how long its pauses are. */
#define SPIN_NS (100 * ATTN_NS_PER_US)
#define PAUSE_NS 20000

enum { ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_ORDINAL = 9, TYPE_HOST = 1, TYPE_DEVICE = 2 };
enum { STREAM_NON_BLOCKING = 1, EVENT_WITHOUT_TIMES = 2, HOST_PORTABLE = 1 };
enum { MODE_RELAXED = 2, NOT_READY = 600 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what is found, once */
static atomic_bool found;
static atomic_ullong looked; /* libraries that had been loaded when it was not found */
memory_calls_t memory_calls;
static void *contexts[MEMORY_GPUS]; /* primary ones, which live as long as the process */

static bool
look_up(void *library)
{
    const struct {
        void *call;
        const char *name;
        bool shares; /* needed only where processes share memory: older drivers may lack it */
    } wanted[] = {
        {&memory_calls.attributes, "cuPointerGetAttributes", false},
        {&memory_calls.device, "cuDeviceGet", false},
        {&memory_calls.uuid, "cuDeviceGetUuid_v2", true},
        {&memory_calls.retain, "cuDevicePrimaryCtxRetain", false},
        {&memory_calls.push, "cuCtxPushCurrent_v2", false},
        {&memory_calls.pop, "cuCtxPopCurrent_v2", false},
        {&memory_calls.exchange_mode, "cuThreadExchangeStreamCaptureMode", false},
        {&memory_calls.copy, "cuMemcpy2DAsync_v2", false},
        {&memory_calls.copy_there, "cuMemcpyDtoDAsync_v2", true},
        {&memory_calls.fill, "cuMemsetD8Async", true},
        {&memory_calls.stream, "cuStreamCreate", false},
        {&memory_calls.stream_end, "cuStreamDestroy_v2", false},
        {&memory_calls.event, "cuEventCreate", false},
        {&memory_calls.event_end, "cuEventDestroy_v2", false},
        {&memory_calls.record, "cuEventRecord", false},
        {&memory_calls.query, "cuEventQuery", false},
        {&memory_calls.pin, "cuMemHostAlloc", false},
        {&memory_calls.unpin, "cuMemFreeHost", false},
        {&memory_calls.take, "cuMemAlloc_v2", true},
        {&memory_calls.give, "cuMemFree_v2", true},
        {&memory_calls.range, "cuMemGetAddressRange_v2", true},
        {&memory_calls.key, "cuIpcGetMemHandle", true},
        {&memory_calls.map, "cuIpcOpenMemHandle_v2", true},
        {&memory_calls.unmap, "cuIpcCloseMemHandle", true},
    };
    bool all = true;

    memory_calls.shares = true;
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        void *symbol = dlsym(library, wanted[i].name);
        memcpy(wanted[i].call, &symbol, sizeof(symbol));
        all                 = all && (symbol != NULL || wanted[i].shares);
        memory_calls.shares = memory_calls.shares && (symbol != NULL || !wanted[i].shares);
    }
    return all;
}

static int
take_count(struct dl_phdr_info *info, size_t size, void *count)
{
    (void)size;
    *(unsigned long long *)count = info->dlpi_adds;
    return 1; /* each has the same */
}

/* Asked for every tensor of every layer, and a search for a library takes 13 us: so it is made
 * again only when some library was loaded since. */
bool
attn_memory_has_cuda(void)
{
    unsigned long long loaded = 0;

    if (atomic_load(&found)) {
        return true;
    }
    dl_iterate_phdr(take_count, &loaded);
    if (loaded == atomic_load(&looked)) {
        return false;
    }
    pthread_mutex_lock(&lock);
    void *library = atomic_load(&found) ? NULL : dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (library != NULL && look_up(library)) { /* and is kept: it never goes */
        atomic_store(&found, true);
    } else if (library != NULL) {
        dlclose(library);
    }
    atomic_store(&looked, loaded); /* one that came since makes the count another */
    pthread_mutex_unlock(&lock);
    return atomic_load(&found);
}

/* One call for both: it has zeros for what is nobody's. */
int
attn_memory_gpu(const void *at)
{
    static const int which[] = {ATTRIBUTE_MEMORY_TYPE, ATTRIBUTE_ORDINAL};
    unsigned type            = 0;
    int ordinal              = -1;
    void *values[]           = {&type, &ordinal};

    return attn_memory_has_cuda() &&
                   memory_calls.attributes(2, which, values, (uint64_t)(uintptr_t)at) == 0 &&
                   type == TYPE_DEVICE
               ? ordinal
               : -1;
}

attn_status_t
memory_check(int result, const char *call)
{
    return result == 0 ? ATTN_OK : attn_fail(ATTN_ERR_INTERNAL, "%s: CUDA error %d", call, result);
}

attn_status_t
memory_can_share(void)
{
    return !attn_memory_has_cuda() || memory_calls.shares
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "the driver of CUDA is too old to share memory between processes");
}

attn_status_t
memory_enter(int gpu, int *mode)
{
    attn_status_t status = ATTN_OK;
    int device           = 0;

    if (!attn_memory_has_cuda() || gpu < 0 || gpu >= MEMORY_GPUS) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "a tensor is in the memory of GPU %d, and this process has opened no CUDA "
                         "driver for it",
                         gpu);
    }
    *mode = MODE_RELAXED;
    memory_calls.exchange_mode(mode);
    pthread_mutex_lock(&lock);
    if (contexts[gpu] == NULL) {
        status = memory_check(memory_calls.device(&device, gpu), "cuDeviceGet");
        if (status == ATTN_OK) {
            status = memory_check(memory_calls.retain(&contexts[gpu], device),
                                  "cuDevicePrimaryCtxRetain");
        }
    }
    pthread_mutex_unlock(&lock);
    if (status == ATTN_OK) {
        status = memory_check(memory_calls.push(contexts[gpu]), "cuCtxPushCurrent");
    }
    if (status != ATTN_OK) {
        memory_calls.exchange_mode(mode);
    }
    return status;
}

void
memory_leave(int *mode)
{
    void *context;

    memory_calls.pop(&context);
    memory_calls.exchange_mode(mode);
}

attn_status_t
attn_memory_uuid(int gpu, uint8_t uuid[ATTN_UUID])
{
    int device = 0, mode;
    attn_status_t status;

    if ((status = memory_can_share()) != ATTN_OK ||
        (status = memory_enter(gpu, &mode)) != ATTN_OK) {
        return status;
    }
    status = memory_check(memory_calls.device(&device, gpu), "cuDeviceGet");
    if (status == ATTN_OK) {
        status = memory_check(memory_calls.uuid(uuid, device), "cuDeviceGetUuid");
    }
    memory_leave(&mode);
    return status;
}

/* ---- copies ---- */

attn_status_t
attn_copies_open(int gpu, attn_copies_t **copies_p)
{
    attn_copies_t *c = calloc(1, sizeof(*c));
    int mode;

    if (c == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to copy tensors of GPU %d", gpu);
    }
    c->gpu               = gpu;
    c->ended             = true;
    attn_status_t status = memory_enter(gpu, &mode);
    if (status != ATTN_OK) {
        free(c);
        return status;
    }
    if ((status = memory_check(memory_calls.stream(&c->stream, STREAM_NON_BLOCKING),
                               "cuStreamCreate")) == ATTN_OK) {
        status = memory_check(memory_calls.event(&c->event, EVENT_WITHOUT_TIMES), "cuEventCreate");
    }
    memory_leave(&mode);
    if (status != ATTN_OK) {
        attn_copies_close(c);
        return status;
    }
    *copies_p = c;
    return ATTN_OK;
}

void
attn_copies_close(attn_copies_t *c)
{
    int mode;

    if (c == NULL) {
        return;
    }
    if (memory_enter(c->gpu, &mode) == ATTN_OK) {
        if (c->event != NULL) {
            memory_calls.event_end(c->event);
        }
        if (c->stream != NULL) {
            memory_calls.stream_end(c->stream);
        }
        memory_leave(&mode);
    }
    free(c);
}

/* Pieces that lie side by side on both sides are one. */
static attn_strided_t
joined(const attn_strided_t *t)
{
    attn_strided_t whole = *t;

    if (whole.heads > 1 && whole.head_stride == whole.head_bytes) {
        whole.head_bytes *= whole.heads;
        whole.heads = 1;
    }
    if (whole.heads == 1 && whole.row_stride == whole.head_bytes) {
        whole.head_bytes *= whole.rows;
        whole.rows = 1;
    }
    return whole;
}

/* One call for all rows, or for those of a head, or for the heads of a row, whichever are fewer: a
 * stream holds so many and no more before a call for one waits. */
static attn_status_t
copy_rows(attn_copies_t *c, const attn_strided_t *tensor, const attn_packed_t *packed, bool fetches)
{
    attn_strided_t t = *tensor;
    bool by_head     = t.heads <= t.rows;
    uint64_t row = t.heads * t.head_bytes, n = by_head ? t.heads : t.rows;
    memory_copy_t x      = {.width = t.head_bytes, .height = by_head ? t.rows : t.heads};
    attn_status_t status = ATTN_OK;

    for (uint64_t i = 0; i < n && status == ATTN_OK; i++) {
        uint64_t at    = (uint64_t)(uintptr_t)t.at + i * (by_head ? t.head_stride : t.row_stride);
        uint8_t *here  = packed->at + i * (by_head ? t.head_bytes : row);
        uint64_t there = by_head ? t.row_stride : t.head_stride;
        __typeof__(x.from) strided = {.type = TYPE_DEVICE, .device = at, .pitch = there};
        __typeof__(x.from) side_by = {.type   = packed->on_gpu ? TYPE_DEVICE : TYPE_HOST,
                                      .host   = here,
                                      .device = (uint64_t)(uintptr_t)here,
                                      .pitch  = by_head ? row : t.head_bytes};
        if (x.height == 1) { /* of one row a stride says nothing, and may be anything */
            strided.pitch = side_by.pitch = x.width;
        }
        x.from = fetches ? strided : side_by;
        x.to   = fetches ? side_by : strided;
        status = memory_check(memory_calls.copy(&x, c->stream), "cuMemcpy2DAsync");
    }
    return status;
}

/* One piece in the memory of GPUs: the plainest of copies. */
static attn_status_t
copy_piece(attn_copies_t *c, const attn_strided_t *t, const attn_packed_t *packed, bool fetches)
{
    uint64_t tensor = (uint64_t)(uintptr_t)t->at, there = (uint64_t)(uintptr_t)packed->at;

    return memory_check(memory_calls.copy_there(fetches ? there : tensor, fetches ? tensor : there,
                                                t->head_bytes, c->stream),
                        "cuMemcpyDtoDAsync");
}

static attn_status_t
copy(attn_copies_t *c, const attn_strided_t *tensor, const attn_packed_t *packed, bool fetches)
{
    attn_strided_t t = joined(tensor);
    bool piece       = packed->on_gpu && t.rows == 1 && t.heads == 1;
    int mode;
    attn_status_t status = memory_enter(c->gpu, &mode);

    if (status == ATTN_OK) {
        c->queued = true;
        status    = (piece ? copy_piece : copy_rows)(c, &t, packed, fetches);
        memory_leave(&mode);
    }
    return status;
}

attn_status_t
attn_copies_fetch(attn_copies_t *copies, const attn_strided_t *from, const attn_packed_t *to)
{
    return copy(copies, from, to, true);
}

attn_status_t
attn_copies_send(attn_copies_t *copies, const attn_packed_t *from, const attn_strided_t *to)
{
    return copy(copies, to, from, false);
}

/* ATTN_ERR_DEADLINE: they are under way. */
static attn_status_t
look(attn_copies_t *c)
{
    if (c->queued) {
        attn_status_t status =
            memory_check(memory_calls.record(c->event, c->stream), "cuEventRecord");
        if (status != ATTN_OK) {
            return status;
        }
        c->queued = false;
        c->ended  = false;
    }
    int result = c->ended ? 0 : memory_calls.query(c->event);
    c->ended   = result == 0;
    return result == NOT_READY ? ATTN_ERR_DEADLINE : memory_check(result, "cuEventQuery");
}

attn_status_t
attn_copies_wait(attn_copies_t *c, uint64_t until_ns)
{
    uint64_t start = attn_now_ns(), now = start;
    int mode;
    attn_status_t status = memory_enter(c->gpu, &mode);

    if (status != ATTN_OK) {
        return status;
    }
    while ((status = look(c)) == ATTN_ERR_DEADLINE && now < until_ns) {
        if (now - start < SPIN_NS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
        }
        now = attn_now_ns();
    }
    memory_leave(&mode);
    return status == ATTN_ERR_DEADLINE
               ? attn_fail(ATTN_ERR_DEADLINE,
                           "copies of tensors of GPU %d did not end before the deadline", c->gpu)
               : status;
}

/* ---- pinned memory ---- */

void *
attn_memory_pin(int gpu, uint64_t bytes)
{
    void *at = NULL;
    int mode;

    if (memory_enter(gpu, &mode) != ATTN_OK) {
        return NULL;
    }
    int result = memory_calls.pin(&at, bytes, HOST_PORTABLE);
    memory_leave(&mode);
    return result == 0 ? at : NULL;
}

void
attn_memory_unpin(int gpu, void *pinned)
{
    int mode;

    if (pinned != NULL && memory_enter(gpu, &mode) == ATTN_OK) {
        memory_calls.unpin(pinned);
        memory_leave(&mode);
    }
}
