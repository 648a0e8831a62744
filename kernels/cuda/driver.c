/* The driver's functions by name from libcuda, and its errors as sentences. */
#include "kernels/cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static cuda_driver_t driver;
static bool opened;
static char why[256];

#define SYMBOL_OF_EXPANDED(f) #f
#define SYMBOL_OF(f) SYMBOL_OF_EXPANDED(f)

static void
open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);

    if (library == NULL) {
        snprintf(why, sizeof(why), "no CUDA driver here: %s", dlerror());
        return;
    }
    const char *missing = NULL;
#define LOAD(f)                                                                                    \
    do {                                                                                           \
        void *symbol = dlsym(library, SYMBOL_OF(f));                                               \
        missing      = symbol == NULL ? SYMBOL_OF(f) : missing;                                    \
        memcpy(&driver.f, &symbol, sizeof(symbol));                                                \
    } while (0);
    CUDA_DRIVER_FUNCTIONS(LOAD)
#undef LOAD
    if (missing != NULL) {
        snprintf(why, sizeof(why), "the CUDA driver has no %s: it is too old", missing);
        return;
    }
    CUresult result = driver.cuInit(0);
    int n           = 0;
    if (result == CUDA_SUCCESS) {
        result = driver.cuDeviceGetCount(&n);
    }
    if (result != CUDA_SUCCESS || n == 0) {
        const char *name = "CUDA_ERROR_NO_DEVICE";
        if (result != CUDA_SUCCESS && driver.cuGetErrorName(result, &name) != CUDA_SUCCESS) {
            name = "an unknown error";
        }
        snprintf(why, sizeof(why), "the CUDA driver finds no GPU: %s", name);
        return;
    }
    opened = true;
}

const cuda_driver_t *
cuda_driver(void)
{
    pthread_once(&once, open_driver);
    if (!opened) {
        attn_fail(ATTN_ERR_UNSUPPORTED, "%s", why);
        return NULL;
    }
    return &driver;
}

/*
 * Errors that stay: every later call on the context fails, too, and only a new process has a new
 * one. What is not known is not among them: a step that fails is better than a worker that ends.
 */
static bool
breaks(CUresult result)
{
    switch (result) {
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_UNKNOWN:
        return true;
    default:
        return false;
    }
}

static pthread_mutex_t broken_lock = PTHREAD_MUTEX_INITIALIZER;
static char broken_by[256];
static atomic_bool broken; /* broken_by stands from then on */

const char *
cuda_broken(void)
{
    return atomic_load(&broken) ? broken_by : NULL;
}

/* Keep the sentence, if it is the first. */
static void
note_broken(void)
{
    pthread_mutex_lock(&broken_lock);
    if (!atomic_load(&broken)) {
        snprintf(broken_by, sizeof(broken_by), "%s", attn_last_error());
        atomic_store(&broken, true);
    }
    pthread_mutex_unlock(&broken_lock);
}

attn_status_t
cuda_check(CUresult result, const char *call)
{
    const char *name = NULL, *text = NULL;
    size_t function = strcspn(call, "(");

    if (result == CUDA_SUCCESS) {
        return ATTN_OK;
    }
    if (driver.cuGetErrorName(result, &name) != CUDA_SUCCESS ||
        driver.cuGetErrorString(result, &text) != CUDA_SUCCESS) {
        name = "unknown error";
        text = "";
    }
    attn_fail(result == CUDA_ERROR_OUT_OF_MEMORY ? ATTN_ERR_NO_MEMORY : ATTN_ERR_INTERNAL,
              "%.*s: %s (%d), %s", (int)function, call, name, (int)result, text);
    if (breaks(result)) {
        note_broken();
    }
    return result == CUDA_ERROR_OUT_OF_MEMORY ? ATTN_ERR_NO_MEMORY : ATTN_ERR_INTERNAL;
}
