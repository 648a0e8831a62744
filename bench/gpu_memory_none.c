/* Of a build without the CUDA toolkit. */
#include "bench/gpu_memory.h"

#include "base/status.h"
#include "bench/result.h"

#include <stddef.h>

static attn_status_t
none(void)
{
    return attn_fail(ATTN_ERR_UNSUPPORTED, "this build has no GPU kernels");
}

uint32_t
gpu_count(void)
{
    none();
    return 0;
}

void *
gpu_alloc(uint64_t bytes)
{
    (void)bytes;
    result_must(none());
    return NULL;
}

void
gpu_free(void *at)
{
    (void)at;
}

void
gpu_put(void *to, const void *from, uint64_t bytes)
{
    (void)to, (void)from, (void)bytes;
    result_must(none());
}

void
gpu_get(void *to, const void *from, uint64_t bytes)
{
    gpu_put(to, from, bytes);
}

void *
gpu_stream(void)
{
    return gpu_alloc(0);
}

void
gpu_wait(void *stream)
{
    gpu_put(stream, NULL, 0);
}
