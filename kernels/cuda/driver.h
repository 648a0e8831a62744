/*
 * driver.h: the CUDA driver, opened at run time, so that one binary starts on a machine without
 * a GPU and says so. Only host code of kernels/cuda includes it.
 */
#ifndef ATTN_KERNELS_CUDA_DRIVER_H
#define ATTN_KERNELS_CUDA_DRIVER_H

#include "base/status.h"

#include <cuda.h>

/* cuda.h names newer versions of some functions by macros: the expanded name is the symbol's. */
#define CUDA_DRIVER_FUNCTIONS(X)                                                                   \
    X(cuInit)                                                                                      \
    X(cuGetErrorName)                                                                              \
    X(cuGetErrorString)                                                                            \
    X(cuDeviceGetCount)                                                                            \
    X(cuDeviceGet)                                                                                 \
    X(cuDeviceGetName)                                                                             \
    X(cuDeviceGetPCIBusId)                                                                         \
    X(cuDeviceGetAttribute)                                                                        \
    X(cuDevicePrimaryCtxRetain)                                                                    \
    X(cuDevicePrimaryCtxRelease)                                                                   \
    X(cuCtxPushCurrent)                                                                            \
    X(cuCtxPopCurrent)                                                                             \
    X(cuThreadExchangeStreamCaptureMode)                                                           \
    X(cuCtxSynchronize)                                                                            \
    X(cuMemGetInfo)                                                                                \
    X(cuMemAlloc)                                                                                  \
    X(cuMemFree)                                                                                   \
    X(cuMemHostAlloc)                                                                              \
    X(cuMemFreeHost)                                                                               \
    X(cuMemcpyHtoD)                                                                                \
    X(cuMemcpyDtoH)                                                                                \
    X(cuMemcpyHtoDAsync)                                                                           \
    X(cuMemcpyDtoHAsync)                                                                           \
    X(cuMemcpyDtoDAsync)                                                                           \
    X(cuMemcpy2DAsync)                                                                             \
    X(cuMemsetD8Async)                                                                             \
    X(cuStreamCreate)                                                                              \
    X(cuStreamCreateWithPriority)                                                                  \
    X(cuCtxGetStreamPriorityRange)                                                                 \
    X(cuStreamDestroy)                                                                             \
    X(cuStreamSynchronize)                                                                         \
    X(cuStreamWaitEvent)                                                                           \
    X(cuStreamIsCapturing)                                                                         \
    X(cuEventCreate)                                                                               \
    X(cuEventDestroy)                                                                              \
    X(cuEventRecord)                                                                               \
    X(cuEventSynchronize)                                                                          \
    X(cuEventQuery)                                                                                \
    X(cuEventElapsedTime)                                                                          \
    X(cuIpcGetMemHandle)                                                                           \
    X(cuIpcOpenMemHandle)                                                                          \
    X(cuIpcCloseMemHandle)                                                                         \
    X(cuTensorMapEncodeTiled)                                                                      \
    X(cuModuleLoadData)                                                                            \
    X(cuModuleUnload)                                                                              \
    X(cuModuleGetFunction)                                                                         \
    X(cuFuncSetAttribute)                                                                          \
    X(cuLaunchKernelEx)                                                                            \
    X(cuStreamBeginCapture)                                                                        \
    X(cuStreamEndCapture)                                                                          \
    X(cuGraphInstantiateWithFlags)                                                                 \
    X(cuGraphLaunch)                                                                               \
    X(cuGraphExecDestroy)                                                                          \
    X(cuGraphDestroy)

typedef struct cuda_driver {
#define CUDA_DRIVER_MEMBER(f) __typeof__(&f) f;
    CUDA_DRIVER_FUNCTIONS(CUDA_DRIVER_MEMBER)
#undef CUDA_DRIVER_MEMBER
} cuda_driver_t;

/**
 * The driver, opened and initialised once for the process; never closed. Any thread.
 * @return NULL: there is none, or no device; attn_last_error() says which, ATTN_ERR_UNSUPPORTED
 */
const cuda_driver_t *cuda_driver(void);

/** The status for a driver call's result: ATTN_OK, or a failure that names the call. */
attn_status_t cuda_check(CUresult result, const char *call);

/** The sentence of the first failure of this process after which its device, or the driver, cannot
 * be used any more; NULL: there was none. Any thread. */
const char *cuda_broken(void);

/** Evaluates to the status of cu->CALL. */
#define CUDA_CALL(call) cuda_check(cuda_driver()->call, #call)

#endif
