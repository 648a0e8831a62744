/* hello: one layer of attention over two tokens, in this process or in a cluster. */
#include <attn.h>
#include <stdio.h>
int main(int argc, char **argv)
{
    static float q[32], k[2][32], v[2][32] = {{1, 10}, {3, 30}}, o[32];
    attn_client_t *client;
    attn_cache_t *cache;
    attn_step_t *step;
    attn_geometry_t shape;
    attn_geometry_init(&shape);
    shape.layers = shape.q_heads = shape.kv_heads = 1, shape.kv_dtype = ATTN_F32;
    shape.head_dim_k = shape.head_dim_v = 32;
    /* Append two tokens; ask once, as the second: it sees both, and their k are equal. */
    attn_entry_t entry = {.base = 0, .n_q = 1, .n_new = 2};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32};
    attn_tensor_t tq = {.data = q, .dtype = ATTN_F32}, tk = {.data = k, .dtype = ATTN_F32};
    attn_tensor_t tv = {.data = v, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
    if (attn_client_open(argc > 1 ? argv[1] : "inproc://cpu", NULL, &client) ||
        attn_cache_open(client, "hello", &shape, &cache) ||
        attn_seq_create(cache, NULL, &entry.seq) || attn_step_begin(cache, &batch, &step) ||
        attn_step_run(step, 0, &tq, &tk, &tv, &to, NULL) || attn_step_commit(step, NULL))
        return fprintf(stderr, "%s\n", attn_last_error()), 1;
    printf("o = %g %g ...\n", (double)o[0], (double)o[1]); /* o = 2 20 ..., the mean of both v */
    attn_cache_close(cache);
    attn_client_close(client);
}
