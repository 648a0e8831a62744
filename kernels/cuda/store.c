/*
 * New k and v into pages of the device and back. Rows travel through pinned memory, a slice at a
 * time; each call ends when the device has done what it asks, so that whoever reads next, on
 * whatever stream, finds it.
 */
#include "kernels/cuda/store.h"

#include "base/checked.h"
#include "kernels/cuda/cuda_int.h"
#include "kernels/rows.h"

#include <string.h>

#define SLICE_BYTES (UINT64_C(16) << 20)
#define THREADS 256u

enum mode { STORE, READ, COMPARE };

typedef struct job {
    cuda_backend_t *backend;
    const attn_kv_t *kv;
    const uint32_t *pages, *offsets;
    uint8_t *k, *v; /* read, but written by READ */
    enum mode mode;
    cuda_block_t *block;
} job_t;

/* Where things of a slice of n rows lie in the block: pages, offsets, k, v, note. */
typedef struct slice {
    uint64_t pages, offsets, k, v, note, end;
    uint64_t k_bytes, v_bytes;
} slice_t;

static slice_t
slice_of(const attn_kv_t *kv, uint64_t n)
{
    uint64_t size = attn_dtype_size(kv->dtype);
    slice_t s     = {.k_bytes = n * kv->kv_heads * kv->head_dim_k * size,
                     .v_bytes = n * kv->kv_heads * kv->head_dim_v * size};

    s.offsets = attn_div_up(n * sizeof(uint32_t), 16) * 16;
    s.k       = 2 * s.offsets;
    s.v       = s.k + s.k_bytes;
    s.note    = s.v + s.v_bytes;
    s.end     = s.note + 16;
    return s;
}

static attn_status_t
launch_rows(const job_t *job, const slice_t *s, uint64_t n, bool of_v)
{
    const attn_kv_t *kv = job->kv;
    uint32_t size       = (uint32_t)attn_dtype_size(kv->dtype),
             d          = of_v ? kv->head_dim_v : kv->head_dim_k;
    uint8_t *base       = (uint8_t *)(uintptr_t)job->block->device;
    cuda_rows_t rows    = {
           .store       = of_v ? kv->v : kv->k,
           .page_stride = (of_v ? kv->v_page_stride : kv->k_page_stride) * size,
           .page_size   = kv->page_size,
           .kv_heads    = kv->kv_heads,
           .row_bytes   = d * size,
           .n           = n,
           .pages       = (const uint32_t *)(const void *)(base + s->pages),
           .offsets     = (const uint32_t *)(const void *)(base + s->offsets),
           .rows        = base + (of_v ? s->v : s->k),
           .note        = (uint32_t *)(void *)(base + s->note),
    };
    uint32_t mode    = (uint32_t)job->mode;
    uint64_t threads = n * kv->kv_heads * (rows.row_bytes / 16);

    return cuda_launch(job->backend->move_rows, (uint32_t)attn_div_up(threads, THREADS), 1, THREADS,
                       0, false, job->block->stream, (void *[]){&rows, &mode});
}

/* Rows [first, first + n). *note_p: not 0 if a comparison found a difference. */
static attn_status_t
run_slice(const job_t *job, uint64_t first, uint64_t n, uint32_t *note_p)
{
    slice_t s          = slice_of(job->kv, n);
    uint8_t *host      = job->block->host;
    CUdeviceptr device = job->block->device;
    CUstream stream    = job->block->stream;
    uint64_t k_row = s.k_bytes / n, v_row = s.v_bytes / n;
    attn_status_t status;

    memcpy(host + s.pages, job->pages + first, n * sizeof(uint32_t));
    memcpy(host + s.offsets, job->offsets + first, n * sizeof(uint32_t));
    if (job->mode != READ) {
        memcpy(host + s.k, job->k + first * k_row, s.k_bytes);
        memcpy(host + s.v, job->v + first * v_row, s.v_bytes);
    }
    memset(host + s.note, 0, sizeof(uint32_t));
    uint64_t up = job->mode == READ ? s.k : s.end;
    if ((status = CUDA_CALL(cuMemcpyHtoDAsync(device, host, up, stream))) != ATTN_OK ||
        (status = launch_rows(job, &s, n, false)) != ATTN_OK ||
        (status = launch_rows(job, &s, n, true)) != ATTN_OK) {
        return status;
    }
    if (job->mode == READ) {
        status =
            CUDA_CALL(cuMemcpyDtoHAsync(host + s.k, device + s.k, s.k_bytes + s.v_bytes, stream));
    } else if (job->mode == COMPARE) {
        status = CUDA_CALL(cuMemcpyDtoHAsync(host + s.note, device + s.note, 4, stream));
    }
    if (status == ATTN_OK) {
        status = CUDA_CALL(cuStreamSynchronize(stream));
    }
    if (status == ATTN_OK && job->mode == READ) {
        memcpy(job->k + first * k_row, host + s.k, s.k_bytes);
        memcpy(job->v + first * v_row, host + s.v, s.v_bytes);
    } else if (status == ATTN_OK && job->mode == COMPARE) {
        memcpy(note_p, host + s.note, sizeof(*note_p));
    }
    return status;
}

static attn_status_t
run_rows(job_t *job, uint64_t n, bool *equal_p)
{
    uint64_t row = slice_of(job->kv, 1).end, most = attn_max(1, SLICE_BYTES / row);
    uint32_t note = 0;
    CUDA_VISIT(job->backend);
    attn_status_t status = visit.status;

    if (n == 0 || status != ATTN_OK) {
        return status;
    }
    status = cuda_block_take(job->backend, slice_of(job->kv, attn_min(n, most)).end, &job->block);
    if (status != ATTN_OK) {
        return status;
    }
    for (uint64_t i = 0; i < n && status == ATTN_OK && note == 0; i += most) {
        status = run_slice(job, i, attn_min(n - i, most), &note);
    }
    cuda_block_give(job->backend, job->block);
    if (equal_p != NULL) {
        *equal_p = note == 0;
    }
    return status;
}

attn_status_t
cuda_append(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
            const uint32_t *offsets, uint64_t n, const void *k, const void *v)
{
    job_t job = {.backend = (cuda_backend_t *)backend,
                 .kv      = kv,
                 .pages   = pages,
                 .offsets = offsets,
                 .k       = (uint8_t *)(uintptr_t)k,
                 .v       = (uint8_t *)(uintptr_t)v,
                 .mode    = STORE};
    attn_status_t status;

    /* All is looked at before anything is stored. */
    if ((status = attn_rows_check_places(kv, pages, offsets, n)) != ATTN_OK ||
        (status = attn_rows_check_finite(kv, k, v, n)) != ATTN_OK) {
        return status;
    }
    return run_rows(&job, n, NULL);
}

attn_status_t
cuda_compare(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
             const uint32_t *offsets, uint64_t n, const void *k, const void *v, bool *equal_p)
{
    job_t job            = {.backend = (cuda_backend_t *)backend,
                            .kv      = kv,
                            .pages   = pages,
                            .offsets = offsets,
                            .k       = (uint8_t *)(uintptr_t)k,
                            .v       = (uint8_t *)(uintptr_t)v,
                            .mode    = COMPARE};
    attn_status_t status = attn_rows_check_places(kv, pages, offsets, n);

    *equal_p = true;
    return status == ATTN_OK ? run_rows(&job, n, equal_p) : status;
}

attn_status_t
cuda_read_rows(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
               const uint32_t *offsets, uint64_t n, void *k, void *v)
{
    job_t job            = {.backend = (cuda_backend_t *)backend,
                            .kv      = kv,
                            .pages   = pages,
                            .offsets = offsets,
                            .k       = k,
                            .v       = v,
                            .mode    = READ};
    attn_status_t status = attn_rows_check_places(kv, pages, offsets, n);

    return status == ATTN_OK ? run_rows(&job, n, NULL) : status;
}

/* Rows from place to place, K or V, after the moves have come to the device. */
static attn_status_t
launch_moves(cuda_backend_t *backend, const attn_kv_t *kv, cuda_block_t *block, uint64_t n,
             bool of_v)
{
    uint32_t size          = (uint32_t)attn_dtype_size(kv->dtype),
             d             = of_v ? kv->head_dim_v : kv->head_dim_k;
    cuda_rows_t rows       = {.store       = of_v ? kv->v : kv->k,
                              .page_stride = (of_v ? kv->v_page_stride : kv->k_page_stride) * size,
                              .page_size   = kv->page_size,
                              .kv_heads    = kv->kv_heads,
                              .row_bytes   = d * size,
                              .n           = n};
    const uint32_t *device = (const uint32_t *)(uintptr_t)block->device;
    uint32_t threads       = kv->kv_heads * (rows.row_bytes / 16);

    return cuda_launch(backend->move_places, (uint32_t)attn_div_up(threads, THREADS), 1, THREADS, 0,
                       false, block->stream, (void *[]){&rows, &device});
}

attn_status_t
cuda_move(attn_backend_t *base, const attn_kv_t *kv, const attn_move_t *moves, uint64_t n)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    cuda_block_t *block;
    attn_status_t status;
    CUDA_VISIT(backend);

    if ((status = attn_rows_check_moves(kv, moves, n)) != ATTN_OK || n == 0 ||
        (status = visit.status) != ATTN_OK) {
        return status;
    }
    const uint64_t most = SLICE_BYTES / sizeof(*moves);
    status              = cuda_block_take(backend, attn_min(n, most) * sizeof(*moves), &block);
    if (status != ATTN_OK) {
        return status;
    }
    for (uint64_t i = 0; i < n && status == ATTN_OK; i += most) {
        uint64_t some = attn_min(n - i, most);
        memcpy(block->host, moves + i, some * sizeof(*moves));
        if ((status = CUDA_CALL(cuMemcpyHtoDAsync(block->device, block->host, some * sizeof(*moves),
                                                  block->stream))) != ATTN_OK ||
            (status = launch_moves(backend, kv, block, some, false)) != ATTN_OK ||
            (status = launch_moves(backend, kv, block, some, true)) != ATTN_OK) {
            break;
        }
        status = CUDA_CALL(cuStreamSynchronize(block->stream));
    }
    cuda_block_give(backend, block);
    return status;
}

/* The first rows of every head of a page: one copy of as many stretches as there are heads. */
static attn_status_t
copy_heads(cuda_block_t *block, uint8_t *store, uint64_t stride, uint64_t head_bytes,
           uint64_t bytes, uint32_t heads, uint32_t from, uint32_t to)
{
    CUDA_MEMCPY2D copy = {
        .srcMemoryType = CU_MEMORYTYPE_DEVICE,
        .srcDevice     = (CUdeviceptr)(uintptr_t)(store + from * stride),
        .srcPitch      = head_bytes,
        .dstMemoryType = CU_MEMORYTYPE_DEVICE,
        .dstDevice     = (CUdeviceptr)(uintptr_t)(store + to * stride),
        .dstPitch      = head_bytes,
        .WidthInBytes  = bytes,
        .Height        = heads,
    };
    return CUDA_CALL(cuMemcpy2DAsync(&copy, block->stream));
}

attn_status_t
cuda_copy_page(attn_backend_t *base, const attn_kv_t *kv, uint32_t from, uint32_t to,
               uint32_t tokens)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    uint64_t size           = attn_dtype_size(kv->dtype);
    uint64_t k_row = kv->head_dim_k * size, v_row = kv->head_dim_v * size;
    cuda_block_t *block;
    attn_status_t status;
    CUDA_VISIT(backend);

    if ((status = attn_rows_check_page(kv, from, to, tokens)) != ATTN_OK || tokens == 0 ||
        (status = visit.status) != ATTN_OK ||
        (status = cuda_block_take(backend, 1, &block)) != ATTN_OK) {
        return status;
    }
    status = copy_heads(block, kv->k, kv->k_page_stride * size, kv->page_size * k_row,
                        tokens * k_row, kv->kv_heads, from, to);
    if (status == ATTN_OK) {
        status = copy_heads(block, kv->v, kv->v_page_stride * size, kv->page_size * v_row,
                            tokens * v_row, kv->kv_heads, from, to);
    }
    if (status == ATTN_OK) {
        status = CUDA_CALL(cuStreamSynchronize(block->stream));
    }
    cuda_block_give(backend, block);
    return status;
}
