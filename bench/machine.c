/*
 * The two probes. Reads go over 128 MiB a round, each round elsewhere, so that no cache
 * helps: once in plain ascending order, once over eight pages of 4 KiB side by side, which some
 * cores read faster, and the better of both counts. Multiply-adds run in 12 independent chains,
 * more than latency times ports.
 */
#include "bench/machine.h"

#include "base/clock.h"

#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#define READ_BYTES (UINT64_C(1) << 30)
#define ROUND_BYTES (UINT64_C(1) << 27)
#define PAGES (UINT64_C(8) * 4096)
#define FMA_ROUNDS UINT64_C(1500000)
#define FMA_CHAINS 12

typedef struct probe {
    const char *bytes;
    uint64_t n;
    uint64_t sum; /* keeps the work alive */
} probe_t;

static char *memory;
static uint64_t place;

int
machine_open(void)
{
    memory = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return -1;
    }
    (void)madvise(memory, READ_BYTES, MADV_HUGEPAGE);
    memset(memory, 1, READ_BYTES);
    return 0;
}

#if defined(__x86_64__)
#define FOR(isa) __attribute__((target(isa)))
#else
#define FOR(isa)
#endif

/* Eight vectors a step, `apart` bytes from each other; a stretch of 8 x apart is read before the
 * next begins. */
#define READER(name, isa, lanes, apart)                                                            \
    FOR(isa) static void *name(void *arg)                                                          \
    {                                                                                              \
        typedef uint64_t words_t __attribute__((vector_size(lanes * 8)));                          \
        probe_t *probe = arg;                                                                      \
        words_t sum[8] = {0};                                                                      \
        for (uint64_t i = 0; i + 8 * (apart) <= probe->n; i += 8 * (apart)) {                      \
            for (uint64_t in = 0; in < (apart); in += sizeof(words_t)) {                           \
                for (int j = 0; j < 8; j++) {                                                      \
                    sum[j] ^=                                                                      \
                        *(const words_t *)(const void *)(probe->bytes + i + j * (apart) + in);     \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        for (int j = 0; j < 8; j++) {                                                              \
            for (int k = 0; k < lanes; k++) {                                                      \
                probe->sum ^= sum[j][k];                                                           \
            }                                                                                      \
        }                                                                                          \
        return NULL;                                                                               \
    }

/* x = x / 2 + b: stays finite. All chains differ, or the compiler makes them one. */
#define ADDER(name, isa, lanes, FMA)                                                               \
    FOR(isa) static void *name(void *arg)                                                          \
    {                                                                                              \
        typedef float floats_t __attribute__((vector_size(lanes * 4)));                            \
        probe_t *probe = arg;                                                                      \
        floats_t x[FMA_CHAINS], a = (floats_t){0} + 0.5f, b = a * (float)probe->n;                 \
        for (int j = 0; j < FMA_CHAINS; j++) {                                                     \
            x[j] = b + (float)j;                                                                   \
        }                                                                                          \
        for (uint64_t i = 0; i < FMA_ROUNDS; i++) {                                                \
            _Pragma("GCC unroll 12") for (int j = 0; j < FMA_CHAINS; j++)                          \
            {                                                                                      \
                x[j] = FMA(x[j], a, b);                                                            \
            }                                                                                      \
        }                                                                                          \
        for (int j = 0; j < FMA_CHAINS; j++) {                                                     \
            probe->sum += (uint64_t)x[j][0];                                                       \
        }                                                                                          \
        return NULL;                                                                               \
    }

#define PLAIN(x, a, b) ((x) * (a) + (b))
ADDER(add_128, "sse2", 4, PLAIN)
#if defined(__x86_64__)
#define FMA_512(x, a, b) __builtin_ia32_vfmaddps512_mask(x, a, b, (unsigned short)-1, 4)
READER(read_256, "avx2", 4, 32)
READER(read_512, "avx512f", 8, 64)
READER(pages_256, "avx2", 4, 4096)
READER(pages_512, "avx512f", 8, 4096)
ADDER(add_256, "avx2,fma", 8, __builtin_ia32_vfmaddps256)
ADDER(add_512, "avx512f", 16, FMA_512)
#endif
READER(read_128, "sse2", 2, 16)
READER(pages_128, "sse2", 2, 4096)

static double
seconds_on(uint32_t threads, void *(*work)(void *), probe_t *probes)
{
    pthread_t ids[MACHINE_THREADS_MAX];
    uint64_t start = attn_now_ns();

    for (uint32_t t = 1; t < threads; t++) {
        pthread_create(&ids[t], NULL, work, &probes[t]);
    }
    work(&probes[0]);
    for (uint32_t t = 1; t < threads; t++) {
        pthread_join(ids[t], NULL);
    }
    return (double)(attn_now_ns() - start) / 1e9;
}

/* Bytes per second of all threads over the next 128 MiB. */
static double
read_with(uint32_t threads, void *(*read)(void *))
{
    uint64_t share = ROUND_BYTES / threads / PAGES * PAGES;
    probe_t probes[MACHINE_THREADS_MAX];

    for (uint32_t t = 0; t < threads; t++) {
        probes[t] = (probe_t){.bytes = memory + place + t * share, .n = share};
    }
    place = (place + ROUND_BYTES) % READ_BYTES;
    return (double)(threads * share) / seconds_on(threads, read, probes);
}

double
machine_read(uint32_t threads)
{
    void *(*read)(void *) = read_128, *(*pages)(void *) = pages_128;

#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        read  = read_512;
        pages = pages_512;
    } else if (__builtin_cpu_supports("avx2")) {
        read  = read_256;
        pages = pages_256;
    }
#endif
    double plain = read_with(threads, read), side_by_side = read_with(threads, pages);
    return plain > side_by_side ? plain : side_by_side;
}

double
machine_fma(uint32_t threads, machine_width_t width)
{
    void *(*work)(void *) = add_128;
    probe_t probes[MACHINE_THREADS_MAX];

#if defined(__x86_64__)
    work = width == MACHINE_512 ? add_512 : width == MACHINE_256 ? add_256 : add_128;
#endif
    for (uint32_t t = 0; t < threads; t++) {
        probes[t] = (probe_t){.n = t + 1};
    }
    return (double)(FMA_ROUNDS * FMA_CHAINS * 2 * (uint64_t)width * threads) /
           seconds_on(threads, work, probes);
}
