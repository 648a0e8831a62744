/* Of a build without the CUDA toolkit. */
#include "bench/on_stream.h"

#include "base/status.h"

attn_status_t
on_stream_measure(uint32_t layers, uint32_t length, uint32_t q_heads, uint32_t kv_heads,
                  uint32_t dim, uint32_t steps, on_stream_t *samples)
{
    (void)layers, (void)length, (void)q_heads, (void)kv_heads, (void)dim, (void)steps;
    (void)samples;
    return attn_fail(ATTN_ERR_UNSUPPORTED, "this build has no GPU kernels");
}

void
on_stream_free(on_stream_t *samples)
{
    (void)samples;
}
