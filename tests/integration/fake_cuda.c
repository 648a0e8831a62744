/*
 * fake_cuda.c: a libcuda.so.1 for machines without a GPU. Its devices have memory, which is the
 * process' own, and copies copy; kernels do nothing, or fail as a test wants:
 *
 *     FAKE_CUDA_DEVICES    how many there are (1)
 *     FAKE_CUDA_FREE_MIB   memory of each that is free (256), of as much again
 *     FAKE_CUDA_FAIL       a file: while it is there, kernels fail with the CUresult that it holds
 */
#include <cuda.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define VISIBLE __attribute__((visibility("default")))
#define MIB ((size_t)1 << 20)

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

static size_t taken; /* one thread allocates at a time: the backend's start, or its lock's holder */

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

VISIBLE CUresult
cuCtxSetCurrent(CUcontext context)
{
    (void)context;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuCtxSynchronize(void)
{
    return CUDA_SUCCESS;
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
VISIBLE CUresult
cuMemAlloc(CUdeviceptr *at, size_t bytes)
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
    *(size_t *)page = bytes;
    *at             = (CUdeviceptr)(page + 4096);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemFree(CUdeviceptr at)
{
    char *page = (char *)at - 4096;

    taken -= *(size_t *)page;
    munmap(page, *(size_t *)page + 4096);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemHostAlloc(void **at, size_t bytes, unsigned flags)
{
    (void)flags;
    *at = calloc(1, bytes);
    return *at != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

VISIBLE CUresult
cuMemFreeHost(void *at)
{
    free(at);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes)
{
    memcpy((void *)to, from, bytes);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes)
{
    memcpy(to, (const void *)from, bytes);
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    (void)stream;
    return cuMemcpyHtoD(to, from, bytes);
}

VISIBLE CUresult
cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    (void)stream;
    return cuMemcpyDtoH(to, from, bytes);
}

VISIBLE CUresult
cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    (void)stream;
    return cuMemcpyHtoD(to, (const void *)from, bytes);
}

VISIBLE CUresult
cuMemcpy2DAsync(const CUDA_MEMCPY2D *copy, CUstream stream)
{
    (void)copy;
    (void)stream;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuMemsetD8Async(CUdeviceptr at, unsigned char byte, size_t bytes, CUstream stream)
{
    (void)stream;
    memset((void *)at, byte, bytes);
    return CUDA_SUCCESS;
}

/* ---- streams, events, kernels ---- */

VISIBLE CUresult
cuStreamCreate(CUstream *stream, unsigned flags)
{
    (void)flags;
    *stream = (CUstream)1;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamDestroy(CUstream stream)
{
    (void)stream;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamSynchronize(CUstream stream)
{
    (void)stream;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventCreate(CUevent *event, unsigned flags)
{
    (void)flags;
    *event = (CUevent)1;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventDestroy(CUevent event)
{
    (void)event;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventRecord(CUevent event, CUstream stream)
{
    (void)event;
    (void)stream;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventSynchronize(CUevent event)
{
    (void)event;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuEventElapsedTime(float *ms, CUevent start, CUevent end)
{
    (void)start;
    (void)end;
    *ms = 1;
    return CUDA_SUCCESS;
}

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
    (void)name;
    *function = (CUfunction)1;
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

    (void)config;
    (void)function;
    (void)args;
    (void)extra;
    if (file != NULL) {
        if (fscanf(file, "%u", &result) != 1) {
            result = CUDA_SUCCESS;
        }
        fclose(file);
    }
    return (CUresult)result;
}

/* ---- graphs: of nothing, like kernels ---- */

VISIBLE CUresult
cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode)
{
    (void)stream;
    (void)mode;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    (void)stream;
    *graph = (CUgraph)1;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags)
{
    (void)graph;
    (void)flags;
    *exec = (CUgraphExec)1;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphLaunch(CUgraphExec exec, CUstream stream)
{
    (void)exec;
    (void)stream;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphExecDestroy(CUgraphExec exec)
{
    (void)exec;
    return CUDA_SUCCESS;
}

VISIBLE CUresult
cuGraphDestroy(CUgraph graph)
{
    (void)graph;
    return CUDA_SUCCESS;
}
