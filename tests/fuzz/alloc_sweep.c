/*
 * alloc_sweep.c: memory runs out at every single allocation, one after the other. The seeds of a
 * fuzzer are run again and again; in run n the nth allocation of the code under test fails, first
 * that one alone, then all from it on. Constructors, requests and libattn's calls go through
 * this: each must answer, nothing may crash, be lost or stay behind, and the next run, with memory
 * enough, is as ever. What a fuzzer checks after each input is checked after each run.
 *
 *     alloc_sweep FILE ...      built once for each fuzzer that has a fake rpc below it
 */
#include "tests/fuzz/fake_rpc.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);
char *__wrap_strdup(const char *text);

static atomic_bool armed, for_good;
static atomic_llong left; /* allocations before the first that fails */
static atomic_llong made;

static bool
refuse(void)
{
    if (!atomic_load(&armed) || fake_spared()) {
        return false;
    }
    atomic_fetch_add(&made, 1);
    long long n = atomic_fetch_sub(&left, 1);
    return atomic_load(&for_good) ? n <= 0 : n == 0;
}

void *
__wrap_malloc(size_t n)
{
    return refuse() ? NULL : __real_malloc(n);
}

void *
__wrap_calloc(size_t n, size_t size)
{
    return refuse() ? NULL : __real_calloc(n, size);
}

void *
__wrap_realloc(void *p, size_t n)
{
    return refuse() ? NULL : __real_realloc(p, n);
}

void *
__wrap_aligned_alloc(size_t alignment, size_t n)
{
    return refuse() ? NULL : __real_aligned_alloc(alignment, n);
}

char *
__wrap_strdup(const char *text)
{
    return refuse() ? NULL : __real_strdup(text);
}

/* @return allocations of the code under test */
static long long
run(const uint8_t *bytes, size_t n, long long fails, bool and_all_after)
{
    atomic_store(&made, 0);
    atomic_store(&left, fails);
    atomic_store(&for_good, and_all_after);
    fake_short_of_memory = true;
    atomic_store(&armed, true);
    LLVMFuzzerTestOneInput(bytes, n);
    atomic_store(&armed, false);
    fake_short_of_memory = false;
    return atomic_load(&made);
}

static void
sweep(const char *path)
{
    static uint8_t bytes[1 << 16];
    FILE *file = fopen(path, "rb");

    if (file == NULL) {
        perror(path);
        exit(1);
    }
    size_t n = fread(bytes, 1, sizeof(bytes), file);
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, n); /* what is allocated once is there */
    long long all = run(bytes, n, 1LL << 40, false);
    for (long long i = 0; i < all; i++) {
        run(bytes, n, i, false);
        run(bytes, n, i, true);
    }
    LLVMFuzzerTestOneInput(bytes, n);
    printf("%s: %lld allocations, each refused\n", path, all);
    fflush(stdout);
}

int
main(int argc, char **argv)
{
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        sweep(argv[i]);
    }
    return 0;
}
