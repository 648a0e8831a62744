/*
 * attnctl_doctor_trip.c: a step there and back. A cache of its own, one sequence spread over all
 * workers, every key zero: so each token weighs the same, and the answer is the mean of the values,
 * which whole numbers give exactly.
 */
#include "client/attnctl_doctor.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define HEAD 32u
#define CHUNK 256u
#define WORKERS_MAX 64u /* a sequence's chunks go round among so many */
#define REGION (UINT64_C(4) << 20)

static void
geometry(attn_geometry_t *g)
{
    attn_geometry_init(g);
    g->layers = g->q_heads = g->kv_heads = 1;
    g->head_dim_k = g->head_dim_v = HEAD;
    g->kv_dtype                   = ATTN_F32;
    g->chunk_size                 = CHUNK;
    g->placement                  = ATTN_PLACE_SPREAD;
    g->region_bytes               = REGION;
}

/* Value number d of a token. */
static float
value(uint32_t token, uint32_t d)
{
    return (float)((token + d) % 64);
}

static attn_status_t
judge(const float *o, uint32_t n)
{
    for (uint32_t d = 0; d < HEAD; d++) {
        double sum = 0;
        for (uint32_t t = 0; t < n; t++) {
            sum += (double)value(t, d);
        }
        if (!(fabs((double)o[d] - sum / n) <= 1e-5 * 64)) {
            fprintf(stderr, "attnctl: o[%u] is %.9g, and %.9g is right\n", d, (double)o[d],
                    sum / n);
            return ATTN_ERR_INTERNAL;
        }
    }
    return ATTN_OK;
}

/* n tokens, and the last one asks. */
static attn_status_t
step(attn_cache_t *cache, attn_seq_t seq, uint32_t n, float *q, float *k, float *v, float *o)
{
    attn_entry_t entry = {.seq = seq, .n_q = 1, .n_new = n};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32};
    attn_tensor_t tq = {.data = q, .dtype = ATTN_F32}, tk = {.data = k, .dtype = ATTN_F32};
    attn_tensor_t tv = {.data = v, .dtype = ATTN_F32}, to = {.data = o, .dtype = ATTN_F32};
    attn_step_t *open    = NULL;
    attn_status_t status = attn_step_begin(cache, &batch, &open);

    if (status != ATTN_OK) {
        return status;
    }
    status = attn_step_run(open, 0, &tq, &tk, &tv, &to, NULL);
    if (status == ATTN_OK) {
        status = attn_step_commit(open, NULL);
    }
    if (status != ATTN_OK) {
        attn_step_abort(open);
    }
    return status;
}

static uint32_t
owners(attn_cache_t *cache, attn_seq_t seq)
{
    attn_seq_info_t info;
    uint32_t n = 0;

    if (attn_seq_describe(cache, seq, &info) != ATTN_OK) {
        return 0;
    }
    for (uint32_t i = 0; i < info.n_chunks; i++) {
        bool seen = info.chunks[i].length == 0;
        for (uint32_t j = 0; j < i && !seen; j++) {
            seen = info.chunks[j].worker == info.chunks[i].worker;
        }
        n += !seen;
    }
    attn_seq_info_free(&info);
    return n;
}

static attn_status_t
trip_on(attn_cache_t *cache, uint32_t n, uint32_t *reached_p)
{
    float q[HEAD] = {0}, o[HEAD];
    float *k      = calloc((size_t)n * HEAD, sizeof(*k));
    float *v      = calloc((size_t)n * HEAD, sizeof(*v));
    attn_seq_t seq;

    attn_status_t status =
        k != NULL && v != NULL ? attn_seq_create(cache, NULL, &seq) : ATTN_ERR_NO_MEMORY;
    for (uint32_t i = 0; status == ATTN_OK && i < n * HEAD; i++) {
        v[i] = value(i / HEAD, i % HEAD);
    }
    if (status == ATTN_OK && (status = step(cache, seq, n, q, k, v, o)) == ATTN_OK &&
        (status = judge(o, n)) == ATTN_OK) {
        *reached_p = owners(cache, seq);
    }
    free(k);
    free(v);
    return status;
}

attn_status_t
doctor_trip(attn_client_t *client, uint32_t workers, uint32_t *reached_p)
{
    uint32_t chunks = 1; /* every worker has one when their number is a power of two */
    struct timespec now;
    attn_geometry_t g;
    attn_cache_t *cache;
    char name[64];

    while (chunks < workers && chunks < WORKERS_MAX) {
        chunks *= 2;
    }
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(name, sizeof(name), "doctor/%d-%lld-%ld", (int)getpid(), (long long)now.tv_sec,
             now.tv_nsec);
    geometry(&g);
    attn_status_t status = attn_cache_open(client, name, &g, &cache);
    if (status != ATTN_OK) {
        return status;
    }
    status = trip_on(cache, chunks * CHUNK, reached_p);
    attn_cache_close(cache); /* its sequence goes with the client */
    return status;
}
