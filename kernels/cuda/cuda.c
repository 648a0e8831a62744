/*
 * The backend for NVIDIA GPUs.
 *
 *     cuda.c      open, kind, limits, slabs, memory for workspaces: the row of the table
 *     driver.c    libcuda at run time; module.c  the embedded kernels
 *     image.c     a plan as tables for the device; image_blocks.c  what lists leave of it
 *     attend.c    one layer of a step: upload, launches, answer
 *     attend.cu   of few rows, and of any on devices without wgmma; prefill.cu  of many
 *     store.c     append, compare, read, move, copy
 *     track.c     layers without the host, on streams of callers, for graphs
 *     track_drive.c  the same for a runner's device, whose half is lane.c (drive.h)
 *     group.c     partials between the GPUs of a host (exchange.h)
 *     groups.c    the same as workers use it
 *     *.cu        the kernels; image.h, store.h, exchange.h, device.cuh: what they share
 *
 * Tensors of attend are host memory: they travel through pinned memory of a workspace. A stream
 * a workspace; what stores KV ends before its call does, so streams need not wait for each other.
 * Tensors in the device's memory, and streams of callers, are a track's (track.c).
 */
#include "kernels/cuda/cuda.h"

#include "base/checked.h"
#include "kernels/cuda/cuda_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Grows with every change to the arithmetic that changes bits. */
#define KERNEL_VERSION 2

#define PAGE_MAX 256u

/* Blocks for workspaces are kept for the next ones, up to so many bytes, since the driver takes 25
 * ms for one with pinned memory; the least is so large. */
#define KEPT_BYTES (UINT64_C(1) << 30)
#define BLOCK_MIN (UINT64_C(1) << 20)

/* Above, answers and queries are copied from and to the caller's memory as it is. */
#define PINNED_MAX (UINT64_C(64) << 20)

#define PROBE_BYTES (UINT64_C(512) << 20)
#define PROBE_ROUNDS 5

cuda_visit_t
cuda_enter(cuda_backend_t *backend)
{
    cuda_visit_t visit = {.mode = CU_STREAM_CAPTURE_MODE_RELAXED};

    visit.status = cuda_check(backend->cu->cuCtxPushCurrent(backend->context), "cuCtxPushCurrent");
    if (visit.status == ATTN_OK) {
        backend->cu->cuThreadExchangeStreamCaptureMode(&visit.mode);
    }
    return visit;
}

void
cuda_leave(cuda_visit_t *visit)
{
    CUcontext ours;

    if (visit->status == ATTN_OK) {
        const cuda_driver_t *cu = cuda_driver();
        cu->cuThreadExchangeStreamCaptureMode(&visit->mode);
        cu->cuCtxPopCurrent(&ours);
    }
}

static int
attribute(const cuda_backend_t *backend, CUdevice_attribute which)
{
    int value = 0;
    backend->cu->cuDeviceGetAttribute(&value, which, backend->device);
    return value;
}

/* Tokens of a leaf of requests of many rows. */
static uint32_t
many_leaf(const cuda_backend_t *backend)
{
    return backend->wide ? CUDA_MANY_LEAF : CUDA_LEAF;
}

static attn_status_t
load_modules(cuda_backend_t *backend)
{
    CUDA_VISIT(backend);

    return visit.status == ATTN_OK ? cuda_modules_load(backend) : visit.status;
}

static attn_status_t
open_device(cuda_backend_t *backend, uint32_t ordinal)
{
    attn_status_t status;
    int n = 0;

    if ((status = CUDA_CALL(cuDeviceGetCount(&n))) != ATTN_OK) {
        return status;
    }
    if (ordinal >= (uint32_t)n) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "no device cuda:%u: there are %d", ordinal, n);
    }
    if ((status = CUDA_CALL(cuDeviceGet(&backend->device, (int)ordinal))) != ATTN_OK ||
        (status = CUDA_CALL(
             cuDeviceGetName(backend->name, sizeof(backend->name), backend->device))) != ATTN_OK) {
        return status;
    }
    backend->ordinal    = (int)ordinal;
    backend->major      = attribute(backend, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    backend->minor      = attribute(backend, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    backend->processors = attribute(backend, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    backend->cut_for    = backend->processors;
    backend->shared_bytes =
        attribute(backend, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) - 2048;
    if (backend->major < 8) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "cuda:%u (%s) has compute capability %d.%d: 8.0 is the least", ordinal,
                         backend->name, backend->major, backend->minor);
    }
    backend->wide = backend->major == 9;
    snprintf(backend->kind, sizeof(backend->kind), "cuda-sm%d%d/%d/%d-%u", backend->major,
             backend->minor, KERNEL_VERSION, CUDA_LEAF, many_leaf(backend));
    if ((status = CUDA_CALL(cuDevicePrimaryCtxRetain(&backend->context, backend->device))) !=
        ATTN_OK) {
        return status;
    }
    if ((status = load_modules(backend)) != ATTN_OK) {
        backend->cu->cuDevicePrimaryCtxRelease(backend->device);
    }
    return status;
}

static attn_status_t
cuda_open(uint32_t threads, uint32_t ordinal, attn_backend_t **backend_p)
{
    (void)threads;
    const cuda_driver_t *cu = cuda_driver();
    if (cu == NULL) {
        return ATTN_ERR_UNSUPPORTED;
    }
    cuda_backend_t *backend = calloc(1, sizeof(*backend));
    if (backend == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the cuda backend");
    }
    backend->base.ops = &attn_cuda_backend_ops;
    backend->cu       = cu;
    pthread_mutex_init(&backend->lock, NULL);
    attn_status_t status = open_device(backend, ordinal);
    if (status != ATTN_OK) {
        pthread_mutex_destroy(&backend->lock);
        free(backend);
        return status;
    }
    *backend_p = &backend->base;
    return ATTN_OK;
}

static const char *
cuda_kind(const attn_backend_t *backend)
{
    return ((const cuda_backend_t *)backend)->kind;
}

static void
cuda_leaf_sizes(const attn_backend_t *backend, uint32_t *few, uint32_t *many)
{
    *few  = CUDA_LEAF;
    *many = many_leaf((const cuda_backend_t *)backend);
}

/* Plans come uncut: image.c cuts them for the device. */
static uint32_t
cuda_parallelism(const attn_backend_t *backend)
{
    (void)backend;
    return 1;
}

static attn_status_t
cuda_supports(const attn_backend_t *backend, const attn_geometry_t *g)
{
    bool heads = g->kv_heads >= 1 && g->kv_heads <= CUDA_HEADS_MAX && g->q_heads >= g->kv_heads &&
                 g->q_heads <= CUDA_HEADS_MAX && g->q_heads % g->kv_heads == 0;
    bool chunk = g->chunk_size == 0 ||
                 (g->chunk_size >= CUDA_LEAF && (g->chunk_size & (g->chunk_size - 1)) == 0);

    (void)backend;
    if (cuda_shape_exists(g->kv_dtype, g->head_dim_k, g->head_dim_v) && heads && chunk &&
        g->page_size <= PAGE_MAX) {
        return ATTN_OK;
    }
    return attn_fail(
        ATTN_ERR_UNSUPPORTED,
        "head dims %u (k) and %u (v), %u query and %u KV heads, dtype %d, pages of %u, chunks of "
        "%u: the cuda backend has head dims 64, 128 and 256 (k and v equal) and 192 with 128, up "
        "to %u heads, query heads a multiple of KV heads, f16 and bf16, pages of 1 to %u tokens, "
        "chunks of a power of two from %u",
        g->head_dim_k, g->head_dim_v, g->q_heads, g->kv_heads, (int)g->kv_dtype, g->page_size,
        g->chunk_size, CUDA_HEADS_MAX, PAGE_MAX, CUDA_LEAF);
}

/* ---- memory ---- */

/* On a stream that waits for no others, as all here: the legacy one cannot be used while somebody
 * captures a stream that waits for it, and waits for all such streams. */
static attn_status_t
fill(cuda_backend_t *backend, CUdeviceptr at, uint8_t byte, uint64_t bytes)
{
    CUstream stream;
    attn_status_t status = CUDA_CALL(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));

    if (status != ATTN_OK) {
        return status;
    }
    status = CUDA_CALL(cuMemsetD8Async(at, byte, bytes, stream));
    if (status == ATTN_OK) {
        status = CUDA_CALL(cuStreamSynchronize(stream));
    }
    backend->cu->cuStreamDestroy(stream);
    return status;
}

static attn_status_t
cuda_slab_alloc(attn_backend_t *base, uint64_t bytes, void **slab_p)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    CUdeviceptr slab        = 0;
    CUDA_VISIT(backend);
    attn_status_t status = visit.status;

    if (status == ATTN_OK) {
        status = CUDA_CALL(cuMemAlloc(&slab, bytes));
    }
    if (status == ATTN_OK) {
        status = fill(backend, slab, 0, bytes);
    }
    if (status != ATTN_OK) {
        if (slab != 0) {
            backend->cu->cuMemFree(slab);
        }
        return attn_fail_in(status, "a slab of %llu bytes on cuda:%d: ", (unsigned long long)bytes,
                            backend->ordinal);
    }
    *slab_p = (void *)(uintptr_t)slab;
    return ATTN_OK;
}

static void
cuda_slab_free(attn_backend_t *base, void *slab, uint64_t bytes)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    CUDA_VISIT(backend);

    (void)bytes;
    if (slab != NULL && visit.status == ATTN_OK) {
        backend->cu->cuMemFree((CUdeviceptr)(uintptr_t)slab);
    }
}

static attn_status_t
cuda_slab_fill(attn_backend_t *base, void *slab, uint8_t byte, uint64_t bytes)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    CUDA_VISIT(backend);

    return visit.status == ATTN_OK ? fill(backend, (CUdeviceptr)(uintptr_t)slab, byte, bytes)
                                   : visit.status;
}

static attn_status_t
cuda_device(attn_backend_t *base, attn_device_t *device)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    size_t free_bytes = 0, total = 0;
    CUDA_VISIT(backend);
    attn_status_t status = visit.status;

    if (status == ATTN_OK) {
        status = CUDA_CALL(cuMemGetInfo(&free_bytes, &total));
    }
    if (status == ATTN_OK) {
        snprintf(device->name, sizeof(device->name), "%s", backend->name);
        device->total_bytes = total;
        device->free_bytes  = free_bytes;
        device->dedicated   = true;
    }
    return status;
}

static void
block_free(cuda_backend_t *backend, cuda_block_t *block)
{
    if (block->stream != NULL) {
        backend->cu->cuStreamDestroy(block->stream);
    }
    if (block->host != NULL) {
        backend->cu->cuMemFreeHost(block->host);
    }
    if (block->device != 0) {
        backend->cu->cuMemFree(block->device);
    }
    free(block);
}

static const char *
cuda_failed(const attn_backend_t *backend)
{
    (void)backend;
    return cuda_broken();
}

static attn_status_t
block_new(cuda_backend_t *backend, uint64_t bytes, cuda_block_t **block_p)
{
    cuda_block_t *block = calloc(1, sizeof(*block));
    attn_status_t status;

    if (block == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a workspace");
    }
    block->bytes      = bytes;
    block->host_bytes = attn_min(bytes, PINNED_MAX);
    if ((status = CUDA_CALL(cuMemAlloc(&block->device, bytes))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemHostAlloc((void **)&block->host, block->host_bytes, 0))) !=
            ATTN_OK ||
        (status = CUDA_CALL(cuStreamCreate(&block->stream, CU_STREAM_NON_BLOCKING))) != ATTN_OK) {
        block_free(backend, block);
        return attn_fail_in(status,
                            "a workspace of %llu bytes on cuda:%d: ", (unsigned long long)bytes,
                            backend->ordinal);
    }
    *block_p = block;
    return ATTN_OK;
}

/* The smallest block that is kept and holds so many bytes, or NULL. */
static cuda_block_t *
take_kept(cuda_backend_t *backend, uint64_t bytes)
{
    cuda_block_t **best = NULL, *block = NULL;

    pthread_mutex_lock(&backend->lock);
    for (cuda_block_t **at = &backend->free_blocks; *at != NULL; at = &(*at)->next) {
        if ((*at)->bytes >= bytes && (best == NULL || (*at)->bytes < (*best)->bytes)) {
            best = at;
        }
    }
    if (best != NULL) {
        block = *best;
        *best = block->next;
    }
    pthread_mutex_unlock(&backend->lock);
    return block;
}

/* Give all that is kept back to the device. */
static void
free_kept(cuda_backend_t *backend)
{
    cuda_block_t *block;
    while ((block = take_kept(backend, 0)) != NULL) {
        block_free(backend, block);
    }
}

attn_status_t
cuda_block_take(cuda_backend_t *backend, uint64_t bytes, cuda_block_t **block_p)
{
    *block_p = take_kept(backend, bytes);
    if (*block_p != NULL) {
        return ATTN_OK;
    }
    uint64_t size = BLOCK_MIN;
    while (size < bytes) {
        size += size / 2;
    }
    size                 = size / 4096 * 4096;
    attn_status_t status = block_new(backend, size, block_p);
    if (status == ATTN_ERR_NO_MEMORY) { /* what is kept may be in the way */
        free_kept(backend);
        status = block_new(backend, size, block_p);
    }
    return status;
}

/* Those given back last stay, as far as KEPT_BYTES hold them: the next step is like the last. */
void
cuda_block_give(cuda_backend_t *backend, cuda_block_t *block)
{
    cuda_block_t *gone = NULL;
    uint64_t bytes     = 0;

    pthread_mutex_lock(&backend->lock);
    block->next          = backend->free_blocks;
    backend->free_blocks = block;
    for (cuda_block_t **at = &backend->free_blocks, *each; (each = *at) != NULL;) {
        if (bytes + each->bytes <= KEPT_BYTES) {
            bytes += each->bytes;
            at = &each->next;
        } else {
            *at        = each->next;
            each->next = gone;
            gone       = each;
        }
    }
    pthread_mutex_unlock(&backend->lock);
    if (gone != NULL) {
        CUDA_VISIT(backend);
        for (cuda_block_t *next; gone != NULL && visit.status == ATTN_OK; gone = next) {
            next = gone->next;
            block_free(backend, gone);
        }
    }
}

attn_status_t
cuda_launch(CUfunction function, uint32_t grid_x, uint32_t grid_y, uint32_t block, uint32_t shared,
            bool follows, CUstream stream, void **args)
{
    CUlaunchAttribute attribute = {.id    = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                   .value = {.programmaticStreamSerializationAllowed = 1}};
    CUlaunchConfig config       = {.gridDimX       = grid_x,
                                   .gridDimY       = grid_y,
                                   .gridDimZ       = 1,
                                   .blockDimX      = block,
                                   .blockDimY      = 1,
                                   .blockDimZ      = 1,
                                   .sharedMemBytes = shared,
                                   .hStream        = stream,
                                   .attrs          = &attribute,
                                   .numAttrs       = follows};

    return CUDA_CALL(cuLaunchKernelEx(&config, function, args, NULL));
}

static void
close_device(cuda_backend_t *backend)
{
    CUDA_VISIT(backend);

    if (visit.status == ATTN_OK) {
        cuda_tracks_free(backend);
        cuda_groups_free(backend);
        cuda_drives_free(backend);
        free_kept(backend);
        cuda_modules_unload(backend);
    }
}

static void
cuda_close(attn_backend_t *base)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;

    if (backend == NULL) {
        return;
    }
    close_device(backend);
    cuda_images_free(backend);
    backend->cu->cuDevicePrimaryCtxRelease(backend->device);
    pthread_mutex_destroy(&backend->lock);
    free(backend);
}

void
attn_cuda_cut_for(attn_backend_t *base, uint32_t processors)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    uint32_t most           = (uint32_t)backend->processors;

    backend->cut_for = (int)(processors == 0 ? most : attn_min(processors, most));
}

/* ---- bandwidth ---- */

/* By copies inside the device, which read and write: close to what reading alone reaches. */
static double
cuda_read_bandwidth(const attn_backend_t *base)
{
    cuda_backend_t *backend = (cuda_backend_t *)(uintptr_t)base;
    CUdeviceptr at          = 0;
    CUevent start = NULL, stop = NULL;
    CUstream stream = NULL;
    float best      = 0;
    CUDA_VISIT(backend);

    if (visit.status != ATTN_OK || CUDA_CALL(cuMemAlloc(&at, PROBE_BYTES)) != ATTN_OK) {
        return 1e12; /* a guess, for a device that has no memory left */
    }
    if (CUDA_CALL(cuEventCreate(&start, 0)) == ATTN_OK &&
        CUDA_CALL(cuEventCreate(&stop, 0)) == ATTN_OK &&
        CUDA_CALL(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING)) == ATTN_OK) {
        for (int i = 0; i < PROBE_ROUNDS; i++) {
            float ms = 0;
            backend->cu->cuEventRecord(start, stream);
            backend->cu->cuMemcpyDtoDAsync(at + PROBE_BYTES / 2, at, PROBE_BYTES / 2, stream);
            backend->cu->cuEventRecord(stop, stream);
            if (backend->cu->cuEventSynchronize(stop) == CUDA_SUCCESS &&
                backend->cu->cuEventElapsedTime(&ms, start, stop) == CUDA_SUCCESS && ms > 0) {
                best = best == 0 || ms < best ? ms : best;
            }
        }
    }
    if (stream != NULL) {
        backend->cu->cuStreamDestroy(stream);
    }
    if (start != NULL) {
        backend->cu->cuEventDestroy(start);
    }
    if (stop != NULL) {
        backend->cu->cuEventDestroy(stop);
    }
    backend->cu->cuMemFree(at);
    return best > 0 ? (double)PROBE_BYTES / best * 1e3 : 1e12;
}

const attn_backend_ops_t attn_cuda_backend_ops = {
    .name              = "cuda",
    .open              = cuda_open,
    .close             = cuda_close,
    .kind              = cuda_kind,
    .leaf_sizes        = cuda_leaf_sizes,
    .parallelism       = cuda_parallelism,
    .read_bandwidth    = cuda_read_bandwidth,
    .supports          = cuda_supports,
    .device            = cuda_device,
    .failed            = cuda_failed,
    .slab_alloc        = cuda_slab_alloc,
    .slab_free         = cuda_slab_free,
    .slab_fill         = cuda_slab_fill,
    .append            = cuda_append,
    .compare           = cuda_compare,
    .read              = cuda_read_rows,
    .move              = cuda_move,
    .copy_page         = cuda_copy_page,
    .workspace_create  = cuda_workspace_create,
    .workspace_destroy = cuda_workspace_destroy,
    .attend            = cuda_attend,
    .tracks            = &cuda_track_ops,
    .groups            = &cuda_group_ops,
};
