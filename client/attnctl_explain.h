/* attnctl_explain.h: what the files of attnctl explain share. */
#ifndef ATTN_CLIENT_ATTNCTL_EXPLAIN_H
#define ATTN_CLIENT_ATTNCTL_EXPLAIN_H

#include "client/attnctl_bench.h"

#define EXPLAIN_VALUES_MAX 16u

/** Numbers of one option, separated by commas. */
typedef struct explain_list {
    uint32_t n;
    uint32_t at[EXPLAIN_VALUES_MAX];
} explain_list_t;

typedef struct explain_options {
    const char *target, *attnd, *cache;
    uint64_t seq; /* 0: none */
    explain_list_t tokens, rows;
    uint32_t n_new, sequences;
    uint32_t heads, kv_heads, head_dim, chunk; /* without a cache, as is dtype */
    attn_dtype_t dtype;
    uint32_t dev, ms;
    bool json, measure;
    attn_merging_t merging; /* of the client that is explained */
    const attn_client_options_t *client;
} explain_options_t;

/** The shape that was asked for, or that of the cache that was; of one layer. */
attn_status_t explain_shape(const explain_options_t *o, attn_client_t *client, attn_geometry_t *g);

/** A cache of the shape asked for, under a name of its own.
 * @param tokens  of a sequence that is to fit on each worker, in as many layers as keep it from
 *                lying in a cache of the processor; 0: nothing will be stored, in one layer */
attn_status_t explain_cache(const explain_options_t *o, attn_client_t *client,
                            attn_placement_t placement, uint64_t tokens, char name[64],
                            attn_cache_t **cache_p);

/** "local", "group", "client", "coordinator". */
const char *explain_place(attn_merge_place_t place);

/** "auto", "client", "group". */
bool explain_merging(const char *name, attn_merging_t *merging);

/** Whatever is on the way: "ucx", or who measured it. */
const char *explain_over(const attn_way_t *way);

/** Take steps as those explained, whole and spread, over each transport, and print what they took
 * beside what was said. */
attn_status_t explain_measure(const explain_options_t *o);

/** argv[0] is "explain". @param options  of all connections: TLS. @return the code to exit with */
int attnctl_explain(int argc, char **argv, const char *target,
                    const attn_client_options_t *options);

#endif
