/*
 * fake_cuda.c: a libcuda.so.1 for machines without a GPU. Its devices have memory, which is the
 * process' own; streams, events and graphs are what they are (fake_stream.c), and calls that a
 * driver refuses are refused: without a context, or while a stream is captured by someone who
 * forbids them. Kernels do nothing, or what fake_kernels.c has, or fail as a test wants:
 *
 *     FAKE_CUDA_DEVICES    how many there are (1)
 *     FAKE_CUDA_FREE_MIB   memory of each that is free (256), of as much again
 *     FAKE_CUDA_FAIL       a file: while it is there, kernels fail with the CUresult that it holds
 *     FAKE_CUDA_PLAY       if it is set kernels are played
 *     FAKE_CUDA_IDLE       a file: while it is there they are not
 *     FAKE_CUDA_HOLD       a file: while it is there nothing goes on on any stream
 *     FAKE_CUDA_UUID       a number: GPUs are others than those of processes with another one
 *     FAKE_CUDA_IPC        what becomes of memory that processes share: "none" lends none, "other"
 *                          hands out keys of other memory
 *     FAKE_CUDA_STALL      a file: while it is there calls that lend memory, map another process'
 *                          or give either back do not return, as a driver's may wait for a device
 *
 * Processes share memory by its file, which whoever has the key opens at the one that made it: as
 * with a driver it is there for as long as anybody has it, and cannot be mapped any more when its
 * maker is gone.
 *
 * Tests in the same process look up the functions that begin with fake_cuda_.
 */
#include "tests/integration/fake_cuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)

static size_t taken;
static struct range {
    CUdeviceptr at;
    size_t bytes;
    unsigned type;
    int ordinal;
} ranges[1024]; /* memory of devices, and pinned memory */

static _Thread_local CUcontext contexts[16];
static _Thread_local int depth; /* of those */

CUcontext
fake_context(void)
{
    return depth > 0 ? contexts[depth - 1] : NULL;
}

/** Streams, events and pieces of memory that are there; contexts that the thread has. */
VISIBLE int
fake_cuda_alive(int *of_contexts)
{
    *of_contexts = depth;
    return fake_alive;
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
cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
    memset(uuid, 0x40 + device, sizeof(*uuid));
    uuid->bytes[0] = (char)from_environment("FAKE_CUDA_UUID", 0);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuDeviceGetPCIBusId(char *id, int room, CUdevice device)
{
    snprintf(id, (size_t)room, "0000:%02x:00.0", (unsigned)device);
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

/* ---- memory ---- */

VISIBLE CUresult
cuMemGetInfo(size_t *free_bytes, size_t *total)
{
    pthread_mutex_lock(&fake_lock);
    *total      = device_bytes();
    *free_bytes = device_bytes() / 2 - taken;
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

static void
range_add(CUdeviceptr at, size_t bytes, unsigned type)
{
    struct range *r = ranges;

    while (r->bytes > 0 && r + 1 < ranges + sizeof(ranges) / sizeof(ranges[0])) {
        r++;
    }
    *r = (struct range){
        .at = at, .bytes = bytes, .type = type, .ordinal = (int)(size_t)fake_context() - 1};
}

static void
range_remove(CUdeviceptr at)
{
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        if (ranges[i].bytes > 0 && ranges[i].at == at) {
            ranges[i].bytes = 0;
        }
    }
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
    fake_alive++;
    *(size_t *)page = bytes;
    *at             = (CUdeviceptr)(page + 4096);
    range_add(*at, bytes, CU_MEMORYTYPE_DEVICE);
    return CUDA_SUCCESS;
}

static struct lent {
    CUdeviceptr at;
    size_t bytes;
    int fd; /* of this process' own */
} lent[64], maps[64];

static struct lent *
lent_at(struct lent *table, CUdeviceptr at)
{
    for (int i = 0; i < 64; i++) {
        if (table[i].at == at) {
            return &table[i];
        }
    }
    return NULL;
}

/* Without the lock: other calls go on. */
static void
stall(void)
{
    while (fake_is_file("FAKE_CUDA_STALL")) {
        usleep(1000);
    }
}

VISIBLE CUresult
cuMemAlloc(CUdeviceptr *at, size_t bytes)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuMemAlloc");
    if (result == CUDA_SUCCESS) {
        result = memory_take(at, bytes);
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuMemFree(CUdeviceptr at)
{
    char *page = (char *)at - 4096;

    pthread_mutex_lock(&fake_lock);
    bool is_lent = lent_at(lent, at) != NULL;
    pthread_mutex_unlock(&fake_lock);
    if (is_lent) {
        stall();
    }
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuMemFree");
    if (result == CUDA_SUCCESS) {
        range_remove(at);
        struct lent *entry = lent_at(lent, at);
        if (entry != NULL) {
            close(entry->fd);
            entry->at = 0;
        }
        taken -= *(size_t *)page;
        fake_alive--;
        munmap(page, *(size_t *)page + 4096);
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* ---- memory of two processes ---- */

/* What a CUipcMemHandle holds. */
typedef struct ipc_key {
    char magic[8];
    int pid, fd;
    size_t bytes;
} ipc_key_t;

/* Put a file where the memory is, with what it holds. */
static CUresult
lend(CUdeviceptr at, size_t bytes, struct lent *entry)
{
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);

    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0 ||
        pwrite(fd, (void *)at, bytes, 0) != (ssize_t)bytes ||
        mmap((void *)at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
            MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *entry = (struct lent){.at = at, .bytes = bytes, .fd = fd};
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr at)
{
    const char *said = getenv("FAKE_CUDA_IPC");
    size_t bytes     = *(size_t *)((char *)at - 4096);
    ipc_key_t key    = {.magic = "fakeipc", .pid = getpid(), .bytes = bytes};

    stall();
    pthread_mutex_lock(&fake_lock);
    CUresult result     = fake_unsafe("cuIpcGetMemHandle");
    struct lent *before = lent_at(lent, at), *entry = before != NULL ? before : lent_at(lent, 0);
    if (result == CUDA_SUCCESS && said != NULL && strcmp(said, "none") == 0) {
        result = CUDA_ERROR_NOT_SUPPORTED;
    }
    if (result == CUDA_SUCCESS && bytes % (2 * MIB) != 0) { /* a driver would lend what is beside */
        result = CUDA_ERROR_INVALID_VALUE;
    }
    if (result == CUDA_SUCCESS && before == NULL) {
        result = entry != NULL ? lend(at, bytes, entry) : CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (result == CUDA_SUCCESS) {
        key.fd = entry->fd;
        if (said != NULL && strcmp(said, "other") == 0) {
            key.fd = memfd_create("fake-other", MFD_CLOEXEC);
            result = ftruncate(key.fd, (off_t)bytes) == 0 ? result : CUDA_ERROR_OUT_OF_MEMORY;
        }
        memset(handle, 0, sizeof(*handle));
        memcpy(handle, &key, sizeof(key));
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* Under the lock. */
static CUresult
map_key(const ipc_key_t *key, CUdeviceptr *at)
{
    struct lent *entry = lent_at(maps, 0);
    char path[64];

    if (memcmp(key->magic, "fakeipc", 8) != 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (key->pid == getpid()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", key->pid, key->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || entry == NULL) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    void *memory = mmap(NULL, key->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *at    = (CUdeviceptr)memory;
    *entry = (struct lent){.at = *at, .bytes = key->bytes};
    range_add(*at, key->bytes, CU_MEMORYTYPE_DEVICE);
    fake_alive++;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuIpcOpenMemHandle(CUdeviceptr *at, CUipcMemHandle handle, unsigned flags)
{
    ipc_key_t key;

    memcpy(&key, &handle, sizeof(key));
    stall();
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuIpcOpenMemHandle");
    if (result == CUDA_SUCCESS) {
        result = flags == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS ? map_key(&key, at)
                                                             : CUDA_ERROR_INVALID_VALUE;
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuIpcCloseMemHandle(CUdeviceptr at)
{
    stall();
    pthread_mutex_lock(&fake_lock);
    CUresult result    = fake_unsafe("cuIpcCloseMemHandle");
    struct lent *entry = lent_at(maps, at);
    if (result == CUDA_SUCCESS && entry != NULL) {
        munmap((void *)at, entry->bytes);
        range_remove(at);
        entry->at = 0;
        fake_alive--;
    }
    pthread_mutex_unlock(&fake_lock);
    return entry != NULL ? result : CUDA_ERROR_INVALID_VALUE;
}

VISIBLE CUresult
cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr at)
{
    CUresult result = CUDA_ERROR_NOT_FOUND;

    pthread_mutex_lock(&fake_lock);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        if (ranges[i].bytes > 0 && at >= ranges[i].at && at < ranges[i].at + ranges[i].bytes) {
            *base  = ranges[i].at;
            *bytes = ranges[i].bytes;
            result = CUDA_SUCCESS;
        }
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* Zeros for what is nobody's; no context is needed. */
VISIBLE CUresult
cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **values, CUdeviceptr at)
{
    struct range found = {0};

    pthread_mutex_lock(&fake_lock);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        if (ranges[i].bytes > 0 && at >= ranges[i].at && at < ranges[i].at + ranges[i].bytes) {
            found = ranges[i];
        }
    }
    pthread_mutex_unlock(&fake_lock);
    for (unsigned i = 0; i < n; i++) {
        if (which[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
            *(unsigned *)values[i] = found.type;
        } else if (which[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
            *(int *)values[i] = found.ordinal;
        } else {
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at)
{
    unsigned type                = 0;
    CUpointer_attribute which[2] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, attribute};
    CUresult result              = cuPointerGetAttributes(2, which, (void *[]){&type, value}, at);

    return result == CUDA_SUCCESS && type == 0 ? CUDA_ERROR_INVALID_VALUE : result;
}

VISIBLE CUresult
cuMemHostAlloc(void **at, size_t bytes, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuMemHostAlloc");
    *at             = result == CUDA_SUCCESS ? calloc(1, bytes) : NULL;
    if (*at != NULL) {
        fake_alive++;
        range_add((CUdeviceptr)*at, bytes, CU_MEMORYTYPE_HOST);
    }
    pthread_mutex_unlock(&fake_lock);
    return *at != NULL || result != CUDA_SUCCESS ? result : CUDA_ERROR_OUT_OF_MEMORY;
}

VISIBLE CUresult
cuMemFreeHost(void *at)
{
    pthread_mutex_lock(&fake_lock);
    CUresult result = fake_unsafe("cuMemFreeHost");
    if (result == CUDA_SUCCESS) {
        range_remove((CUdeviceptr)at);
        free(at);
        fake_alive--;
    }
    pthread_mutex_unlock(&fake_lock);
    return result;
}

VISIBLE CUresult
cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    return fake_queue(stream,
                      &(op_t){.kind = OP_COPY, .to = (void *)to, .from = from, .bytes = bytes});
}

VISIBLE CUresult
cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return fake_queue(
        stream, &(op_t){.kind = OP_COPY, .to = to, .from = (const void *)from, .bytes = bytes});
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
    const char *from =
        copy->srcMemoryType == CU_MEMORYTYPE_HOST ? copy->srcHost : (const char *)copy->srcDevice;
    char *to = copy->dstMemoryType == CU_MEMORYTYPE_HOST ? copy->dstHost : (char *)copy->dstDevice;
    CUresult result = copy->srcPitch < copy->WidthInBytes || copy->dstPitch < copy->WidthInBytes
                          ? CUDA_ERROR_INVALID_VALUE
                          : CUDA_SUCCESS;

    for (size_t r = 0; r < copy->Height && result == CUDA_SUCCESS; r++) {
        result = fake_queue(stream, &(op_t){.kind  = OP_COPY,
                                            .to    = to + r * copy->dstPitch,
                                            .from  = from + r * copy->srcPitch,
                                            .bytes = copy->WidthInBytes});
    }
    return result;
}

VISIBLE CUresult
cuMemsetD8Async(CUdeviceptr at, unsigned char byte, size_t bytes, CUstream stream)
{
    return fake_queue(stream,
                      &(op_t){.kind = OP_FILL, .to = (void *)at, .byte = byte, .bytes = bytes});
}

/* ---- maps of tensors ---- */

/* What the driver's manual asks of one without interleaving. */
VISIBLE CUresult
cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill)
{
    (void)promotion;
    (void)fill;
    bool fine = rank > 0 && rank <= 5 && ((uintptr_t)map & 63) == 0 &&
                ((uintptr_t)address & 15) == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && box[0] * 2 % 16 == 0 &&
                (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);

    for (cuuint32_t i = 0; fine && i < rank; i++) {
        fine = sizes[i] > 0 && sizes[i] <= UINT64_C(1) << 32 && box[i] > 0 && box[i] <= 256 &&
               steps[i] > 0 && steps[i] <= 8 &&
               (i == 0 || (strides[i - 1] % 16 == 0 && strides[i - 1] < UINT64_C(1) << 40));
    }
    memset(map, 0, sizeof(*map));
    return fine ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
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
    unsigned result;
    op_t op = {.kind   = OP_KERNEL,
               .kernel = (const fake_kernel_t *)(size_t)function,
               .grid   = config->gridDimX};

    (void)extra;
    pthread_mutex_lock(&fake_lock);
    CUresult called = fake_call("cuLaunchKernelEx");
    pthread_mutex_unlock(&fake_lock);
    result = called;
    if (file != NULL) {
        if (fscanf(file, "%u", &result) != 1) {
            result = called;
        }
        fclose(file);
    }
    for (int i = 0; i < 2 && op.kernel->bytes[i] > 0; i++) {
        memcpy(op.args[i], args[i], op.kernel->bytes[i]);
    }
    return result == CUDA_SUCCESS ? fake_queue(config->hStream, &op) : (CUresult)result;
}
