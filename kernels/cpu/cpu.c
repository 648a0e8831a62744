/*
 * The backend for CPUs.
 *
 *     cpu.c       open, kind, limits, slabs, bandwidth: the row of the table
 *     pool.c      threads
 *     isa.c       choice of instruction set; isa_NAME.c compile leaf.inc, the arithmetic
 *     attend.c    the leaves of a work; tokens.c what they read; finish.c what they answer
 *     store.c     append, compare, copy
 *
 * Environment ATTN_CPU_ISA=baseline (avx2, avx512) sets the instruction set, for tests.
 */
#include "kernels/cpu/cpu.h"

#include "base/clock.h"
#include "base/status.h"
#include "kernels/cpu/attend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Grows with every change to the arithmetic that changes bits. */
#define KERNEL_VERSION 3

#define THREADS_MAX 1024u
#define DIM_MIN 32u
#define DIM_MAX CPU_DIM_MAX
#define DIM_STEP 8u
#define PAGE_MAX 256u
#define HEADS_MAX 1024u

#define HUGE_PAGE (UINT64_C(2) << 20)

static attn_status_t
cpu_open(uint32_t threads, uint32_t ordinal, attn_backend_t **backend_p)
{
    if (ordinal != 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "no device cpu:%u: there is one cpu", ordinal);
    }
    long cores             = sysconf(_SC_NPROCESSORS_ONLN);
    cpu_backend_t *backend = calloc(1, sizeof(*backend));

    if (backend == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the cpu backend");
    }
    if (threads == 0) {
        threads = cores < 1 ? 1 : cores > (long)THREADS_MAX ? THREADS_MAX : (uint32_t)cores;
    }
    backend->base.ops = &attn_cpu_backend_ops;
    attn_status_t status =
        threads > THREADS_MAX
            ? attn_fail(ATTN_ERR_INVALID, "%u threads: at most %u", threads, THREADS_MAX)
            : cpu_isa_choose(&backend->isa);
    if (status == ATTN_OK) {
        status = cpu_pool_create(threads, &backend->pool);
    }
    if (status != ATTN_OK) {
        free(backend);
        return status;
    }
    snprintf(backend->kind, sizeof(backend->kind), "cpu-%s/%d/%u-%u", backend->isa->kind,
             KERNEL_VERSION, CPU_LEAF, CPU_LEAF);
    *backend_p = &backend->base;
    return ATTN_OK;
}

static void
cpu_close(attn_backend_t *base)
{
    cpu_backend_t *backend = (cpu_backend_t *)base;
    if (backend != NULL) {
        cpu_pool_destroy(backend->pool);
        free(backend);
    }
}

static const char *
cpu_kind(const attn_backend_t *backend)
{
    return ((const cpu_backend_t *)backend)->kind;
}

void
attn_cpu_free_order(attn_backend_t *backend, bool on)
{
    ((cpu_backend_t *)backend)->free_order = on;
}

static void
cpu_leaf_sizes(const attn_backend_t *backend, uint32_t *few, uint32_t *many)
{
    (void)backend;
    *few  = CPU_LEAF;
    *many = CPU_LEAF;
}

static uint32_t
cpu_parallelism(const attn_backend_t *backend)
{
    return cpu_pool_threads(((const cpu_backend_t *)backend)->pool);
}

static attn_status_t
cpu_supports(const attn_backend_t *backend, const attn_geometry_t *g)
{
    bool dims = g->head_dim_k >= DIM_MIN && g->head_dim_k <= DIM_MAX &&
                g->head_dim_k % DIM_STEP == 0 && g->head_dim_v >= DIM_MIN &&
                g->head_dim_v <= DIM_MAX && g->head_dim_v % DIM_STEP == 0;
    bool heads = g->kv_heads >= 1 && g->kv_heads <= HEADS_MAX && g->q_heads >= g->kv_heads &&
                 g->q_heads <= HEADS_MAX && g->q_heads % g->kv_heads == 0;
    bool pages = g->page_size <= PAGE_MAX;
    bool chunk = g->chunk_size == 0 ||
                 (g->chunk_size >= CPU_LEAF && (g->chunk_size & (g->chunk_size - 1)) == 0);

    (void)backend;
    if (dims && heads && pages && chunk && attn_dtype_size(g->kv_dtype) != 0) {
        return ATTN_OK;
    }
    return attn_fail(
        ATTN_ERR_UNSUPPORTED,
        "head dims %u (k) and %u (v), %u query and %u KV heads, dtype %d, pages of %u, chunks "
        "of %u: the cpu backend has head dims %u to %u in steps of %u, up to %u heads, query "
        "heads a multiple of KV heads, f32, f16 and bf16, pages of 1 to %u tokens, chunks of a "
        "power of two from %u",
        g->head_dim_k, g->head_dim_v, g->q_heads, g->kv_heads, (int)g->kv_dtype, g->page_size,
        g->chunk_size, DIM_MIN, DIM_MAX, DIM_STEP, HEADS_MAX, PAGE_MAX, CPU_LEAF);
}

/* ---- memory ---- */

static attn_status_t
cpu_slab_alloc(attn_backend_t *backend, uint64_t bytes, void **slab_p)
{
    (void)backend;
    void *slab = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "the system gives no slab of %llu bytes: %m",
                         (unsigned long long)bytes);
    }
    /* Huge pages save most of the TLB misses of scattered pages; without them it works, too. */
    if (bytes >= HUGE_PAGE) {
        (void)madvise(slab, bytes, MADV_HUGEPAGE);
    }
    *slab_p = slab;
    return ATTN_OK;
}

static void
cpu_slab_free(attn_backend_t *backend, void *slab, uint64_t bytes)
{
    (void)backend;
    if (slab != NULL) {
        munmap(slab, bytes);
    }
}

static attn_status_t
cpu_slab_fill(attn_backend_t *backend, void *slab, uint8_t byte, uint64_t bytes)
{
    (void)backend;
    memset(slab, byte, bytes);
    return ATTN_OK;
}

static pthread_once_t name_once = PTHREAD_ONCE_INIT;
static char cpu_name[sizeof(((attn_device_t *)0)->name)];

/* As Linux has it of the first core: "model name : NAME". Elsewhere than on x86 there is none. */
static void
find_name(void)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");

    while (file != NULL && cpu_name[0] == '\0' && fgets(line, sizeof(line), file) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            snprintf(cpu_name, sizeof(cpu_name), "%.*s", (int)strcspn(colon + 1, "\n"), colon + 1);
            memmove(cpu_name, cpu_name + strspn(cpu_name, " "),
                    strlen(cpu_name + strspn(cpu_name, " ")) + 1);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

static attn_status_t
cpu_device(attn_backend_t *backend, attn_device_t *device)
{
    long pages = sysconf(_SC_PHYS_PAGES), free_pages = sysconf(_SC_AVPHYS_PAGES);
    long size = sysconf(_SC_PAGESIZE);

    (void)backend;
    *device = (attn_device_t){.total_bytes = (uint64_t)pages * (uint64_t)size,
                              .free_bytes  = (uint64_t)free_pages * (uint64_t)size};
    pthread_once(&name_once, find_name);
    memcpy(device->name, cpu_name, sizeof(device->name));
    return ATTN_OK;
}

/* ---- bandwidth ---- */

#define PROBE_BYTES (UINT64_C(32) << 20)
#define PROBE_TASKS 64u
#define PROBE_ROUNDS 3
#define LINE_BYTES 64u

typedef struct probe {
    const uint64_t *words;
    atomic_uint_fast64_t sum; /* keeps the reads alive */
} probe_t;

static void
probe_read(void *arg, uint32_t task, uint32_t participant)
{
    probe_t *probe        = arg;
    const uint64_t n      = PROBE_BYTES / PROBE_TASKS / sizeof(uint64_t);
    const uint64_t *words = probe->words + task * n;
    uint64_t sum          = 0;

    (void)participant;
    for (uint64_t i = 0; i < n; i++) {
        sum += words[i];
    }
    atomic_fetch_add_explicit(&probe->sum, sum, memory_order_relaxed);
}

/*
 * Put the probe's bytes out of every cache: KV is larger than they are, and where the last one has
 * hundreds of megabytes, reading enough to overflow it would take a second. Elsewhere than on x86
 * user code cannot do that everywhere, and what is measured may be a cache.
 */
static void
probe_evict(void *arg, uint32_t task, uint32_t participant)
{
#if defined(__x86_64__)
    const probe_t *probe = arg;
    const uint64_t bytes = PROBE_BYTES / PROBE_TASKS;
    const char *first    = (const char *)probe->words + task * bytes;

    for (uint64_t i = 0; i < bytes; i += LINE_BYTES) {
        __builtin_ia32_clflush(first + i);
    }
    __builtin_ia32_mfence();
#else
    (void)arg;
    (void)task;
#endif
    (void)participant;
}

static double
cpu_read_bandwidth(const attn_backend_t *base)
{
    const cpu_backend_t *backend = (const cpu_backend_t *)base;
    probe_t probe                = {0};
    uint64_t best                = UINT64_MAX;
    void *words                  = NULL;

    if (cpu_slab_alloc(NULL, PROBE_BYTES, &words) != ATTN_OK) {
        return 1e9; /* a guess, for a machine that has no 32 MiB left */
    }
    memset(words, 1, PROBE_BYTES);
    probe.words = words;
    for (int i = 0; i < PROBE_ROUNDS; i++) {
        cpu_pool_run(backend->pool, PROBE_TASKS, probe_evict, &probe);
        uint64_t start = attn_now_ns();
        cpu_pool_run(backend->pool, PROBE_TASKS, probe_read, &probe);
        uint64_t took = attn_now_ns() - start;
        best          = took < best ? took : best;
    }
    cpu_slab_free(NULL, words, PROBE_BYTES);
    return (double)PROBE_BYTES * 1e9 / (double)(best > 0 ? best : 1);
}

const attn_backend_ops_t attn_cpu_backend_ops = {
    .name              = "cpu",
    .open              = cpu_open,
    .close             = cpu_close,
    .kind              = cpu_kind,
    .leaf_sizes        = cpu_leaf_sizes,
    .parallelism       = cpu_parallelism,
    .read_bandwidth    = cpu_read_bandwidth,
    .supports          = cpu_supports,
    .device            = cpu_device,
    .slab_alloc        = cpu_slab_alloc,
    .slab_free         = cpu_slab_free,
    .slab_fill         = cpu_slab_fill,
    .append            = cpu_append,
    .compare           = cpu_compare,
    .read              = cpu_read,
    .move              = cpu_move,
    .copy_page         = cpu_copy_page,
    .workspace_create  = cpu_workspace_create,
    .workspace_destroy = cpu_workspace_destroy,
    .attend            = cpu_attend,
};
