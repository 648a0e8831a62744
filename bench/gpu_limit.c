/* gpu_limit.c: see gpu_limit.h. */
#include "bench/gpu_limit.h"

#include "base/checked.h"
#include "bench/result.h"
#include "kernels/cuda/cuda_int.h"

#define BYTES_MAX (UINT64_C(4) << 30)
#define BYTES_MIN (UINT64_C(64) << 20)
#define ROUNDS 9
#define SHARED_MOST 220000u

/* The kernels, as the build compiled them. */
extern const unsigned char gpu_limit_image[];
__asm__(".section .rodata\n.balign 64\n.hidden gpu_limit_image\n.globl gpu_limit_image\n"
        "gpu_limit_image:\n.incbin \"" GPU_LIMIT_FATBIN "\"\n.previous");

typedef struct reader {
    CUmodule module;
    CUdeviceptr at, sink;
    CUevent start, stop;
    uint64_t bytes;
    int processors;
} reader_t;

static void
reader_close(reader_t *r)
{
    const cuda_driver_t *cu = cuda_driver();

    if (r->at != 0) {
        cu->cuMemFree(r->at);
    }
    if (r->start != NULL) {
        cu->cuEventDestroy(r->start);
    }
    if (r->stop != NULL) {
        cu->cuEventDestroy(r->stop);
    }
    if (r->module != NULL) {
        cu->cuModuleUnload(r->module);
    }
}

static attn_status_t
reader_open(reader_t *r, int device)
{
    size_t free_bytes, total;
    CUdevice handle;
    attn_status_t status;

    *r = (reader_t){0};
    if ((status = CUDA_CALL(cuMemGetInfo(&free_bytes, &total))) != ATTN_OK) {
        return status;
    }
    /* The sink is the last bytes of what is taken. */
    r->bytes = attn_min(BYTES_MAX, free_bytes / 4 * 3 / BYTES_MIN * BYTES_MIN);
    if (r->bytes == 0) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "%zu bytes of the GPU are free: too few to measure",
                         free_bytes);
    }
    if ((status = CUDA_CALL(cuDeviceGet(&handle, device))) != ATTN_OK ||
        (status = CUDA_CALL(cuDeviceGetAttribute(
             &r->processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle))) != ATTN_OK ||
        (status = CUDA_CALL(cuModuleLoadData(&r->module, gpu_limit_image))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemAlloc(&r->at, r->bytes + 256))) != ATTN_OK ||
        (status = CUDA_CALL(cuEventCreate(&r->start, 0))) != ATTN_OK) {
        return status;
    }
    r->sink = r->at + r->bytes;
    status  = CUDA_CALL(cuEventCreate(&r->stop, 0));
    return status == ATTN_OK ? CUDA_CALL(cuMemsetD8Async(r->at, 0x3a, r->bytes, NULL)) : status;
}

/* Median bytes per second of a launch. */
static attn_status_t
read_all(const reader_t *r, CUfunction kernel, uint32_t grid, uint32_t block, uint32_t shared,
         void **args, double *rate_p)
{
    double ms[ROUNDS];
    attn_status_t status = ATTN_OK;

    for (int i = -2; i < ROUNDS && status == ATTN_OK; i++) {
        float one = 0;
        if ((status = CUDA_CALL(cuEventRecord(r->start, NULL))) == ATTN_OK &&
            (status = cuda_launch(kernel, grid, 1, block, shared, false, NULL, args)) == ATTN_OK &&
            (status = CUDA_CALL(cuEventRecord(r->stop, NULL))) == ATTN_OK &&
            (status = CUDA_CALL(cuEventSynchronize(r->stop))) == ATTN_OK) {
            status = CUDA_CALL(cuEventElapsedTime(&one, r->start, r->stop));
        }
        ms[i < 0 ? 0 : i] = one;
    }
    if (status == ATTN_OK) {
        *rate_p = (double)r->bytes / result_quantile(ms, ROUNDS, 0.5) * 1e3;
    }
    return status;
}

static attn_status_t
measure_loads(const reader_t *r, gpu_limit_t *limit)
{
    CUdeviceptr from = r->at, sink = r->sink;
    uint64_t n = r->bytes / 16;
    CUfunction kernel;
    attn_status_t status = CUDA_CALL(cuModuleGetFunction(&kernel, r->module, "read_loads"));

    for (uint32_t each = 4; each <= 8 && status == ATTN_OK; each += 4) {
        double rate  = 0;
        status       = read_all(r, kernel, (uint32_t)r->processors * each, 256, 0,
                                (void *[]){&from, &n, &sink}, &rate);
        limit->loads = rate > limit->loads ? rate : limit->loads;
    }
    return status;
}

static attn_status_t
measure_bulk(const reader_t *r, gpu_limit_t *limit)
{
    static const uint32_t rings[][2] = {{8192, 8},   {8192, 16}, {16384, 4}, {16384, 8},
                                        {16384, 12}, {32768, 4}, {32768, 6}};
    CUdeviceptr from = r->at, sink = r->sink;
    uint64_t n = r->bytes;
    CUfunction kernel;
    attn_status_t status = CUDA_CALL(cuModuleGetFunction(&kernel, r->module, "read_bulk"));

    if (status == ATTN_OK) {
        status = CUDA_CALL(cuFuncSetAttribute(
            kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)SHARED_MOST));
    }
    for (size_t i = 0; i < sizeof(rings) / sizeof(rings[0]) && status == ATTN_OK; i++) {
        uint32_t tile = rings[i][0], slots = rings[i][1];
        double rate = 0;
        status      = read_all(r, kernel, (uint32_t)r->processors, 1, tile * slots,
                               (void *[]){&from, &n, &sink, &tile, &slots}, &rate);
        if (rate > limit->bulk) {
            limit->bulk  = rate;
            limit->tile  = tile;
            limit->slots = slots;
        }
    }
    return status;
}

attn_status_t
gpu_limit_measure(int device, gpu_limit_t *limit)
{
    reader_t r;
    int major = 0;
    CUdevice handle;
    attn_status_t status = reader_open(&r, device);

    *limit = (gpu_limit_t){0};
    if (status == ATTN_OK && (status = measure_loads(&r, limit)) == ATTN_OK &&
        (status = CUDA_CALL(cuDeviceGet(&handle, device))) == ATTN_OK &&
        (status = CUDA_CALL(cuDeviceGetAttribute(
             &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))) == ATTN_OK &&
        major >= 9) {
        status = measure_bulk(&r, limit);
    }
    reader_close(&r);
    limit->read = limit->bulk > limit->loads ? limit->bulk : limit->loads;
    return status;
}
