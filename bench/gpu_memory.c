/* gpu_memory.c: see gpu_memory.h. */
#include "bench/gpu_memory.h"

#include "bench/result.h"
#include "kernels/cuda/driver.h"

#define CU(call) result_must(CUDA_CALL(call))

uint32_t
gpu_count(void)
{
    int n = 0;

    if (cuda_driver() == NULL || CUDA_CALL(cuDeviceGetCount(&n)) != ATTN_OK) {
        return 0;
    }
    return (uint32_t)n;
}

/* The calling thread is on GPU 0 from the first call on. */
static void
be_on_gpu(void)
{
    static CUcontext context;
    CUdevice device;

    if (context == NULL) {
        CU(cuDeviceGet(&device, 0));
        CU(cuDevicePrimaryCtxRetain(&context, device));
        CU(cuCtxPushCurrent(context));
    }
}

void *
gpu_alloc(uint64_t bytes)
{
    CUdeviceptr at;

    be_on_gpu();
    CU(cuMemAlloc(&at, bytes));
    return (void *)at;
}

void
gpu_free(void *at)
{
    if (at != NULL) {
        CU(cuMemFree((CUdeviceptr)at));
    }
}

void
gpu_put(void *to, const void *from, uint64_t bytes)
{
    CU(cuMemcpyHtoD((CUdeviceptr)to, from, bytes));
    CU(cuCtxSynchronize());
}

void
gpu_get(void *to, const void *from, uint64_t bytes)
{
    CU(cuMemcpyDtoH(to, (CUdeviceptr)from, bytes));
}

void *
gpu_stream(void)
{
    static CUstream stream;

    be_on_gpu();
    if (stream == NULL) {
        CU(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    }
    return stream;
}

void
gpu_wait(void *stream)
{
    CU(cuStreamSynchronize(stream));
}
