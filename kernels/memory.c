/*
 * Calls of the driver by their names in its library, whose types are those of its stable binary
 * interface: so this needs no CUDA toolkit, and a client without GPU kernels has it, too.
 */
#include "kernels/memory.h"

#include "base/status.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define GPUS_MAX 64

enum { ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_ORDINAL = 9, TYPE_DEVICE = 2 };

/* Devices are numbers, contexts and streams pointers, device memory an address of 64 bits. */
typedef struct calls {
    int (*attributes)(unsigned n, const int *which, void **values, uint64_t at);
    int (*device)(int *device, int ordinal);
    int (*retain)(void **context, int device);
    int (*push)(void *context);
    int (*pop)(void **context);
    int (*fetch)(void *to, uint64_t from, size_t bytes, void *stream);
    int (*send)(uint64_t to, const void *from, size_t bytes, void *stream);
    int (*wait)(void *stream);
    int (*pin)(void **at, size_t bytes, unsigned flags);
    int (*unpin)(void *at);
} calls_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what is found, once */
static atomic_bool found;
static atomic_ullong looked; /* libraries that had been loaded when it was not found */
static calls_t calls;
static void *contexts[GPUS_MAX]; /* primary ones, which live as long as the process */

static bool
look_up(void *library)
{
    const struct {
        void *call;
        const char *name;
    } wanted[] = {
        {&calls.attributes, "cuPointerGetAttributes"},
        {&calls.device, "cuDeviceGet"},
        {&calls.retain, "cuDevicePrimaryCtxRetain"},
        {&calls.push, "cuCtxPushCurrent_v2"},
        {&calls.pop, "cuCtxPopCurrent_v2"},
        {&calls.fetch, "cuMemcpyDtoHAsync_v2"},
        {&calls.send, "cuMemcpyHtoDAsync_v2"},
        {&calls.wait, "cuStreamSynchronize"},
        {&calls.pin, "cuMemHostAlloc"},
        {&calls.unpin, "cuMemFreeHost"},
    };
    bool all = true;

    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        void *symbol = dlsym(library, wanted[i].name);
        memcpy(wanted[i].call, &symbol, sizeof(symbol));
        all = all && symbol != NULL;
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
                   calls.attributes(2, which, values, (uint64_t)(uintptr_t)at) == 0 &&
                   type == TYPE_DEVICE
               ? ordinal
               : -1;
}

static attn_status_t
check(int result, const char *call)
{
    return result == 0 ? ATTN_OK : attn_fail(ATTN_ERR_INTERNAL, "%s: CUDA error %d", call, result);
}

/* The context of a GPU, this thread's until leave(). */
static attn_status_t
enter(int gpu)
{
    attn_status_t status = ATTN_OK;
    int device           = 0;

    if (!attn_memory_has_cuda() || gpu < 0 || gpu >= GPUS_MAX) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "a tensor is in the memory of GPU %d, and this process has opened no CUDA "
                         "driver for it",
                         gpu);
    }
    pthread_mutex_lock(&lock);
    if (contexts[gpu] == NULL) {
        status = check(calls.device(&device, gpu), "cuDeviceGet");
        if (status == ATTN_OK) {
            status = check(calls.retain(&contexts[gpu], device), "cuDevicePrimaryCtxRetain");
        }
    }
    pthread_mutex_unlock(&lock);
    return status == ATTN_OK ? check(calls.push(contexts[gpu]), "cuCtxPushCurrent") : status;
}

static void
leave(void)
{
    void *context;

    calls.pop(&context);
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

static attn_status_t
copy(int gpu, const attn_strided_t *tensor, uint8_t *host, bool fetches)
{
    attn_strided_t t     = joined(tensor);
    attn_status_t status = enter(gpu);

    if (status != ATTN_OK) {
        return status;
    }
    for (uint64_t r = 0; r < t.rows; r++) {
        for (uint64_t h = 0; h < t.heads && status == ATTN_OK; h++) {
            uint64_t at = (uint64_t)(uintptr_t)t.at + r * t.row_stride + h * t.head_stride;
            status = fetches ? check(calls.fetch(host, at, t.head_bytes, NULL), "cuMemcpyDtoHAsync")
                             : check(calls.send(at, host, t.head_bytes, NULL), "cuMemcpyHtoDAsync");
            host += t.head_bytes;
        }
    }
    attn_status_t waited = check(calls.wait(NULL), "cuStreamSynchronize");
    leave();
    return status == ATTN_OK ? waited : status;
}

attn_status_t
attn_memory_fetch(int gpu, const attn_strided_t *from, void *to)
{
    return copy(gpu, from, to, true);
}

attn_status_t
attn_memory_send(int gpu, const void *from, const attn_strided_t *to)
{
    return copy(gpu, to, (uint8_t *)(uintptr_t)from, false);
}

void *
attn_memory_pin(int gpu, uint64_t bytes)
{
    void *at = NULL;

    if (enter(gpu) != ATTN_OK) {
        return NULL;
    }
    int result = calls.pin(&at, bytes, 1); /* portable: for every GPU */
    leave();
    return result == 0 ? at : NULL;
}

void
attn_memory_unpin(int gpu, void *pinned)
{
    if (pinned != NULL && enter(gpu) == ATTN_OK) {
        calls.unpin(pinned);
        leave();
    }
}
