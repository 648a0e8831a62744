/* attnctl_bench.h: what the files of attnctl bench share. */
#ifndef ATTN_CLIENT_ATTNCTL_BENCH_H
#define ATTN_CLIENT_ATTNCTL_BENCH_H

#include "client/door.h"

#include <stdatomic.h>
#include <stdio.h>

#define BENCH_CLIENTS_MAX 64u
#define BENCH_OUTSTANDING_MAX 1024u

typedef struct bench_options {
    const char *target, *attnd; /* attnd NULL: the one beside attnctl */
    const char *json;           /* a file, or NULL */
    uint32_t dev;               /* start attnd dev with so many workers; 0: target runs */
    uint32_t heads, kv_heads, head_dim, layers, chunk;
    attn_dtype_t dtype;
    attn_placement_t placement;
    uint32_t context, batch, clients, outstanding;
    uint32_t steps;   /* of each call outstanding; 0: as many as seconds take */
    uint32_t seconds; /* with steps = 0; in ms for a point of the sweep */
    uint32_t verify;  /* one step in so many is verified */
    uint32_t spin_us;
    bool thin, sweep, quick;
    const attn_client_options_t *client; /* TLS, for direct clients */
} bench_options_t;

/** Latencies in microseconds, one after the other. */
typedef struct bench_samples {
    uint64_t n, room;
    float *us;
} bench_samples_t;

void bench_sample(bench_samples_t *samples, uint64_t ns);
double bench_quantile(bench_samples_t *samples, double q); /* sorts */

/** What a load did. */
typedef struct bench_result {
    bench_samples_t begin, run, commit;
    uint64_t steps, tokens, verified, wrong;
    double seconds;
} bench_result_t;

void bench_result_free(bench_result_t *result);

/**
 * Clients, sequences filled with context, and threads that step: the load. Opened once, and
 * driven for as long and as broadly as wanted.
 */
typedef struct bench_load bench_load_t;

attn_status_t bench_load_open(const bench_options_t *options, const char *target,
                              bench_load_t **load_p);
void bench_load_close(bench_load_t *load);

/** `outstanding` calls at any time, spread over the clients, for ms milliseconds (0: for
 * options.steps steps each). @return the first failure of the service */
attn_status_t bench_load_drive(bench_load_t *load, uint32_t outstanding, uint32_t ms,
                               bench_result_t *result);

/** Of any client of the load: for figures of the cluster; NULL if all are thin. */
attn_client_t *bench_load_client(bench_load_t *load);

/* ---- data ---- */

void bench_data_init(void);

/** Write a row of n elements; sequence, position, layer and kind ('q', 'k', 'v') tell which. */
void bench_row(char kind, uint64_t sequence, uint64_t position, uint32_t layer, uint32_t n,
               attn_dtype_t dtype, void *to);

/** Is this the answer of one head of a query at the end of `length` tokens, by its definition in
 * float64? @param o  [head_dim] f32 */
bool bench_check(const bench_options_t *options, uint64_t sequence, uint64_t length, uint32_t layer,
                 uint32_t head, const float *o);

/* ---- a cluster of its own ---- */

/** Start attnd dev; address gets where. @return its pid, or -1 after a sentence on stderr */
int bench_dev_start(const bench_options_t *options, char address[64]);
void bench_dev_stop(int pid);

/** argv[0] is "bench". @param options  of all connections: TLS. @return the code to exit with */
int attnctl_bench(int argc, char **argv, const char *target, const attn_client_options_t *options);

#endif
