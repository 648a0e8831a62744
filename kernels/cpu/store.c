/* New k and v into pages: scatter, compare, read back, copy. */
#include "kernels/cpu/attend.h"

#include "kernels/rows.h"

#include <string.h>

/* Rows of a task, and the bytes from which more than one thread pays. */
#define TASK_ROWS 64u
#define PARALLEL_BYTES (256u << 10)

typedef struct store_job {
    const attn_kv_t *kv;
    const uint32_t *pages, *offsets;
    const uint8_t *k, *v;
    uint64_t n;
    bool compare;
    atomic_bool differ;
} store_job_t;

/* One row of K or V: to or against its place, head by head. False if compared and different. */
static bool
move_row(const store_job_t *job, void *store, uint64_t page_stride, uint32_t d, const uint8_t *row,
         uint64_t i)
{
    const attn_kv_t *kv = job->kv;
    size_t size = attn_dtype_size(kv->dtype), bytes = d * size;
    uint8_t *to = (uint8_t *)store + job->pages[i] * page_stride * size + job->offsets[i] * bytes;

    for (uint32_t h = 0; h < kv->kv_heads; h++, row += bytes, to += kv->page_size * bytes) {
        if (!job->compare) {
            memcpy(to, row, bytes);
        } else if (memcmp(to, row, bytes) != 0) {
            return false;
        }
    }
    return true;
}

static void
move_rows(void *arg, uint32_t task, uint32_t participant)
{
    store_job_t *job    = arg;
    const attn_kv_t *kv = job->kv;
    uint64_t size       = attn_dtype_size(kv->dtype);
    uint64_t first      = (uint64_t)task * TASK_ROWS;
    uint64_t end        = first + TASK_ROWS < job->n ? first + TASK_ROWS : job->n;

    (void)participant;
    for (uint64_t i = first; i < end; i++) {
        if (!move_row(job, kv->k, kv->k_page_stride, kv->head_dim_k,
                      job->k + i * kv->kv_heads * kv->head_dim_k * size, i) ||
            !move_row(job, kv->v, kv->v_page_stride, kv->head_dim_v,
                      job->v + i * kv->kv_heads * kv->head_dim_v * size, i)) {
            atomic_store_explicit(&job->differ, true, memory_order_relaxed);
            return;
        }
    }
}

static void
run_store(attn_backend_t *backend, store_job_t *job)
{
    const attn_kv_t *kv = job->kv;
    uint64_t bytes =
        job->n * kv->kv_heads * (kv->head_dim_k + kv->head_dim_v) * attn_dtype_size(kv->dtype);
    uint32_t n_tasks = (uint32_t)((job->n + TASK_ROWS - 1) / TASK_ROWS);

    if (bytes < PARALLEL_BYTES) {
        cpu_pool_run_inline(n_tasks, move_rows, job);
    } else {
        cpu_pool_run(((cpu_backend_t *)backend)->pool, n_tasks, move_rows, job);
    }
}

attn_status_t
cpu_append(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
           const uint32_t *offsets, uint64_t n, const void *k, const void *v)
{
    store_job_t job = {.kv = kv, .pages = pages, .offsets = offsets, .k = k, .v = v, .n = n};
    attn_status_t status;

    /* All is looked at before anything is stored. */
    if ((status = attn_rows_check_places(kv, pages, offsets, n)) != ATTN_OK ||
        (status = attn_rows_check_finite(kv, k, v, n)) != ATTN_OK) {
        return status;
    }
    run_store(backend, &job);
    return ATTN_OK;
}

static void
read_row(const attn_kv_t *kv, const void *store, uint64_t page_stride, uint32_t d, uint32_t page,
         uint32_t offset, uint8_t *row)
{
    size_t size = attn_dtype_size(kv->dtype), bytes = d * size;
    const uint8_t *from = (const uint8_t *)store + page * page_stride * size + offset * bytes;

    for (uint32_t h = 0; h < kv->kv_heads; h++) {
        memcpy(row + h * bytes, from + h * kv->page_size * bytes, bytes);
    }
}

attn_status_t
cpu_read(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
         const uint32_t *offsets, uint64_t n, void *k, void *v)
{
    uint64_t size        = attn_dtype_size(kv->dtype);
    attn_status_t status = attn_rows_check_places(kv, pages, offsets, n);

    (void)backend;
    for (uint64_t i = 0; status == ATTN_OK && i < n; i++) {
        read_row(kv, kv->k, kv->k_page_stride, kv->head_dim_k, pages[i], offsets[i],
                 (uint8_t *)k + i * kv->kv_heads * kv->head_dim_k * size);
        read_row(kv, kv->v, kv->v_page_stride, kv->head_dim_v, pages[i], offsets[i],
                 (uint8_t *)v + i * kv->kv_heads * kv->head_dim_v * size);
    }
    return status;
}

attn_status_t
cpu_compare(attn_backend_t *backend, const attn_kv_t *kv, const uint32_t *pages,
            const uint32_t *offsets, uint64_t n, const void *k, const void *v, bool *equal_p)
{
    store_job_t job = {
        .kv = kv, .pages = pages, .offsets = offsets, .k = k, .v = v, .n = n, .compare = true};
    attn_status_t status = attn_rows_check_places(kv, pages, offsets, n);

    if (status == ATTN_OK) {
        run_store(backend, &job);
        *equal_p = !atomic_load(&job.differ);
    }
    return status;
}

static void
copy_tokens(const attn_kv_t *kv, void *store, uint64_t page_stride, uint32_t d, uint32_t from,
            uint32_t to, uint32_t tokens)
{
    size_t size = attn_dtype_size(kv->dtype), head = (size_t)kv->page_size * d * size;
    uint8_t *base = store;

    for (uint32_t h = 0; h < kv->kv_heads; h++) {
        memcpy(base + to * page_stride * size + h * head,
               base + from * page_stride * size + h * head, tokens * d * size);
    }
}

/* One row, head by head. The places may be the same. */
static void
copy_row(const attn_kv_t *kv, void *store, uint64_t page_stride, uint32_t d,
         const attn_move_t *move)
{
    size_t size = attn_dtype_size(kv->dtype), head = (size_t)kv->page_size * d * size;
    const uint8_t *from =
        (uint8_t *)store + move->from_page * page_stride * size + move->from_offset * d * size;
    uint8_t *to =
        (uint8_t *)store + move->to_page * page_stride * size + move->to_offset * d * size;

    for (uint32_t h = 0; h < kv->kv_heads; h++, from += head, to += head) {
        memmove(to, from, d * size);
    }
}

attn_status_t
cpu_move(attn_backend_t *backend, const attn_kv_t *kv, const attn_move_t *moves, uint64_t n)
{
    attn_status_t status = attn_rows_check_moves(kv, moves, n);

    (void)backend;
    for (uint64_t i = 0; status == ATTN_OK && i < n; i++) {
        copy_row(kv, kv->k, kv->k_page_stride, kv->head_dim_k, &moves[i]);
        copy_row(kv, kv->v, kv->v_page_stride, kv->head_dim_v, &moves[i]);
    }
    return status;
}

attn_status_t
cpu_copy_page(attn_backend_t *backend, const attn_kv_t *kv, uint32_t from, uint32_t to,
              uint32_t tokens)
{
    attn_status_t status = attn_rows_check_page(kv, from, to, tokens);

    (void)backend;
    if (status == ATTN_OK && from != to) {
        copy_tokens(kv, kv->k, kv->k_page_stride, kv->head_dim_k, from, to, tokens);
        copy_tokens(kv, kv->v, kv->v_page_stride, kv->head_dim_v, from, to, tokens);
    }
    return status;
}
