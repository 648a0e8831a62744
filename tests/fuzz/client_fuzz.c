/*
 * libattn against a coordinator and workers that answer with anything. The script of calls is
 * fixed but for byte 0; every answer is taken from the input. Outputs have guards behind them.
 */
#include "tests/fuzz/fake_rpc.h"

#include "base/log.h"
#include "base/status.h"
#include "client/attn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROOM (1u << 20) /* bytes of one tensor: a stranger's geometry may ask for any size */

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    attn_log_set_level(ATTN_LOG_ERROR);
    return 0;
}

/* Run one layer, if its tensors are of a size that anybody would allocate here. */
static void
run(attn_step_t *step, const attn_geometry_t *g, uint32_t rows)
{
    uint64_t most = (uint64_t)rows * (g->q_heads > g->kv_heads ? g->q_heads : g->kv_heads) *
                    (g->head_dim_k > g->head_dim_v ? g->head_dim_k : g->head_dim_v) * 4;

    if (most > ROOM) {
        return;
    }
    fake_spared_begin(); /* the runner's own memory */
    uint64_t o_bytes = (uint64_t)rows * g->q_heads * g->head_dim_v * 4;
    void *in         = calloc(1, most);
    void *out        = malloc(o_bytes); /* exactly: a byte beyond is seen */
    float *lse       = malloc((uint64_t)rows * g->q_heads * sizeof(float));
    attn_tensor_t q  = {.data = in, .dtype = ATTN_F32};
    attn_tensor_t k  = {.data = in, .dtype = g->kv_dtype};
    attn_tensor_t v  = {.data = in, .dtype = g->kv_dtype};
    attn_tensor_t o  = {.data = out, .dtype = ATTN_F32};

    fake_spared_end();
    if (in != NULL && out != NULL && lse != NULL) {
        attn_step_run(step, 0, &q, &k, &v, &o, lse);
    }
    free(in);
    free(out);
    free(lse);
}

static void
step(attn_cache_t *cache, attn_seq_t seq, uint64_t base, uint8_t flags)
{
    uint32_t rows      = 1 + (flags >> 4 & 3);
    attn_entry_t entry = {.seq = seq, .base = base, .n_q = rows, .n_new = rows};
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32, .want_lse = true};
    attn_step_t *step;

    if (attn_step_begin(cache, &batch, &step) != ATTN_OK) {
        return;
    }
    run(step, attn_cache_geometry(cache), rows);
    if ((flags & 2) != 0 || attn_step_commit(step, NULL) != ATTN_OK) {
        attn_step_abort(step);
    }
}

static void
use(attn_client_t *client, uint8_t flags)
{
    attn_geometry_t geometry;
    attn_cluster_info_t cluster;
    attn_seq_info_t info;
    attn_cache_t *cache;
    attn_seq_t seq, fork;

    attn_geometry_init(&geometry);
    geometry.layers     = 1;
    geometry.q_heads    = 2;
    geometry.kv_heads   = 1;
    geometry.head_dim_k = geometry.head_dim_v = 32;
    geometry.chunk_size                       = 256;
    if ((flags & 4) != 0 && attn_cluster_describe(client, &cluster) == ATTN_OK) {
        attn_cluster_info_free(&cluster);
    }
    if (attn_cache_open(client, "c", flags & 1 ? NULL : &geometry, &cache) != ATTN_OK) {
        return;
    }
    if (attn_seq_create(cache, NULL, &seq) == ATTN_OK) {
        step(cache, seq, flags & 8 ? 300 : 0, flags);
        if (attn_seq_describe(cache, seq, &info) == ATTN_OK) {
            attn_seq_info_free(&info);
        }
        if (attn_seq_fork(cache, seq, 1, &fork) == ATTN_OK) {
            step(cache, fork, 1, flags);
        }
        attn_seq_truncate(cache, seq, 0);
        attn_seq_free(cache, seq);
    }
    attn_cache_close(cache);
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    input_t in = {bytes, bytes + n};
    attn_client_options_t options;
    attn_client_t *client;
    uint8_t flags = input_byte(&in);

    attn_client_options_init(&options);
    options.timeout_ms      = 50;
    options.step_timeout_ms = 50;
    options.spin_us         = 0;
    options.transport       = ATTN_TRANSPORT_GRPC; /* the seeds are answers of its streams */
    fake_answers(&in);
    if (attn_client_open("127.0.0.1:1", &options, &client) == ATTN_OK) {
        use(client, flags);
        attn_client_close(client);
    } else if (*attn_last_error() == 0) {
        abort();
    }
    fake_answers(NULL);
    return 0;
}
