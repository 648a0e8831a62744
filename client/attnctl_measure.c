/*
 * attnctl_measure.c: `attnctl explain --measure`: the model held against steps. Two sequences are
 * filled, one whole and one spread; two clients ask them, one over gRPC and one through shared
 * memory where that is to be had. Each first learns its way from runs over next to nothing, and
 * every figure is said before it is measured. Answers are not looked at: `attnctl bench` does.
 */
#include "client/attnctl_explain.h"

#include "client/attnctl.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PIECE 1024u    /* tokens stored in one step */
#define SMALL_RUNS 64u /* to learn what a hop takes ... */
#define LARGE_RUNS 12u /* ... and what bytes take: */
#define LARGE_BYTES (UINT64_C(1) << 20)
#define RUNS_LEAST 9u
#define RUNS_MOST 2000u

enum { WHOLE, SPREAD, LAYOUTS };
enum { OVER_GRPC, OVER_BEST, CLIENTS };

static const attn_placement_t placements[LAYOUTS] = {ATTN_PLACE_WHOLE, ATTN_PLACE_SPREAD};

typedef struct bed {
    const explain_options_t *o;
    attn_geometry_t shape;
    uint32_t workers, n_clients;
    uint32_t most_rows;
    char names[LAYOUTS][64];
    attn_client_t *clients[CLIENTS];
    attn_cache_t *caches[CLIENTS][LAYOUTS];
    attn_seq_t seqs[LAYOUTS];
    uint8_t *q, *k, *v, *o_rows;
    double us[RUNS_MOST];
} bed_t;

static double
now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

static uint64_t
row_bytes(const bed_t *b, uint32_t heads, uint32_t dim)
{
    return (uint64_t)heads * dim * (b->shape.kv_dtype == ATTN_F32 ? 4 : 2);
}

/* ---- steps ---- */

static attn_status_t
begin(attn_cache_t *cache, const attn_entry_t *entry, attn_dtype_t dtype, attn_step_t **step)
{
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = entry, .q_dtype = dtype};

    return attn_step_begin(cache, &batch, step);
}

/* Append tokens, the same in every layer. */
static attn_status_t
fill(bed_t *b, attn_cache_t *cache, attn_seq_t seq, uint64_t tokens)
{
    const attn_geometry_t *g = &b->shape;
    attn_tensor_t k          = {.data = b->k, .dtype = g->kv_dtype};
    attn_tensor_t v          = {.data = b->v, .dtype = g->kv_dtype};
    attn_status_t status     = ATTN_OK;
    attn_step_t *step;

    for (uint64_t from = 0; from < tokens && status == ATTN_OK; from += PIECE) {
        uint32_t n         = (uint32_t)(tokens - from < PIECE ? tokens - from : PIECE);
        attn_entry_t entry = {.seq = seq, .base = from, .n_new = n};
        for (uint32_t i = 0; i < n; i++) {
            bench_row('k', 1, from + i, 0, g->kv_heads * g->head_dim_k, g->kv_dtype,
                      b->k + i * row_bytes(b, g->kv_heads, g->head_dim_k));
            bench_row('v', 1, from + i, 0, g->kv_heads * g->head_dim_v, g->kv_dtype,
                      b->v + i * row_bytes(b, g->kv_heads, g->head_dim_v));
        }
        status = begin(cache, &entry, g->kv_dtype, &step);
        if (status != ATTN_OK) {
            return status;
        }
        for (uint32_t l = 0; l < g->layers && status == ATTN_OK; l++) {
            status = attn_step_run(step, l, NULL, &k, &v, NULL, NULL);
        }
        if (status == ATTN_OK) {
            status = attn_step_commit(step, NULL);
        }
        if (status != ATTN_OK) {
            attn_step_abort(step);
        }
    }
    return status;
}

static int
by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Ask layer after layer, for ms milliseconds, `least` to RUNS_MOST times: the median, in us. */
static attn_status_t
ask(bed_t *b, attn_cache_t *cache, attn_seq_t seq, uint64_t tokens, uint32_t rows, uint32_t least,
    uint32_t ms, double *median)
{
    attn_entry_t entry = {.seq = seq, .base = tokens, .n_q = rows};
    attn_tensor_t q    = {.data = b->q, .dtype = b->shape.kv_dtype};
    attn_tensor_t o    = {.data = b->o_rows, .dtype = b->shape.kv_dtype};
    attn_step_t *step;
    uint32_t n = 0;

    attn_status_t status = begin(cache, &entry, b->shape.kv_dtype, &step);
    if (status != ATTN_OK) {
        return status;
    }
    status     = attn_step_run(step, 0, &q, NULL, NULL, &o, NULL); /* everything is touched once */
    double end = now_us() + 1e3 * ms;
    while (status == ATTN_OK && n < RUNS_MOST && (n < least || now_us() < end)) {
        double start = now_us();
        status       = attn_step_run(step, (n + 1) % b->shape.layers, &q, NULL, NULL, &o, NULL);
        b->us[n++]   = now_us() - start;
    }
    attn_step_abort(step);
    qsort(b->us, n, sizeof(*b->us), by_value);
    *median = n > 0 ? b->us[n / 2] : 0;
    return status;
}

/* ---- learning the way ---- */

/* As many sequences as workers, so that each, by its room, gets one. */
static attn_status_t
learn(bed_t *b)
{
    uint32_t large       = b->most_rows;
    attn_status_t status = ATTN_OK;
    double ignored;

    for (uint32_t w = 0; w < b->workers && status == ATTN_OK; w++) {
        attn_cache_t *cache = b->caches[OVER_GRPC][WHOLE];
        attn_seq_t seq;
        status = attn_seq_create(cache, NULL, &seq);
        if (status == ATTN_OK) {
            status = fill(b, cache, seq, large);
        }
        for (uint32_t c = 0; c < b->n_clients && status == ATTN_OK; c++) {
            cache  = b->caches[c][WHOLE];
            status = ask(b, cache, seq, 1, 1, SMALL_RUNS, 0, &ignored);
            status = status == ATTN_OK ? ask(b, cache, seq, large, large, LARGE_RUNS, 0, &ignored)
                                       : status;
        }
    }
    return status;
}

/* ---- a point ---- */

/* Of a layout as it is done: a spread one is merged by the client, or by its workers. */
static attn_status_t
say(attn_cache_t *cache, uint64_t tokens, uint32_t rows, attn_cost_t *cost, attn_way_t *way)
{
    attn_explain_t asked = {.size = sizeof(asked), .tokens = tokens, .n_q = rows};
    attn_explanation_t x;
    attn_status_t status = attn_explain(cache, &asked, &x);

    *cost = (attn_cost_t){0};
    for (uint32_t i = 0; status == ATTN_OK && i < x.n_costs; i++) {
        if (x.costs[i].taken) {
            *cost = x.costs[i];
            *way  = x.ways[0];
        }
    }
    return status;
}

static void
tell(const bed_t *b, uint64_t tokens, uint32_t rows, const attn_cost_t *c, const attn_way_t *way,
     double us)
{
    double said = 1e6 * c->total;

    if (!b->o->json) {
        printf("%8" PRIu64 " %5u %-7s %7u %-8s %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %10.1f %10.1f "
               "%8.2f\n",
               tokens, rows, explain_place(c->place), c->workers, explain_over(way),
               1e6 * c->attend, 1e6 * c->read, 1e6 * c->compute, 1e6 * c->hop, 1e6 * c->link,
               1e6 * c->merge, said, us, us / said);
        fflush(stdout);
        return;
    }
    cJSON *object = cJSON_CreateObject();
    attnctl_json_u64(object, "tokens", tokens);
    cJSON_AddNumberToObject(object, "rows", rows);
    cJSON_AddStringToObject(object, "place", explain_place(c->place));
    cJSON_AddNumberToObject(object, "workers", c->workers);
    cJSON_AddStringToObject(object, "transport", way->transport);
    cJSON_AddNumberToObject(object, "predicted", c->total);
    cJSON_AddNumberToObject(object, "measured", 1e-6 * us);
    cJSON_AddNumberToObject(object, "ratio", us / said);
    attnctl_json_print(object);
}

static attn_status_t
point(bed_t *b, uint64_t tokens, uint32_t rows)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t l = 0; l < LAYOUTS; l++) {
        for (uint32_t c = 0; c < b->n_clients && status == ATTN_OK; c++) {
            attn_cost_t cost;
            attn_way_t way;
            double us;
            status = say(b->caches[c][l], tokens, rows, &cost, &way);
            if (status != ATTN_OK || !cost.available ||
                (cost.place == ATTN_MERGE_LOCAL) != (l == WHOLE)) {
                continue;
            }
            status = ask(b, b->caches[c][l], b->seqs[l], tokens, rows, RUNS_LEAST, b->o->ms, &us);
            if (status == ATTN_OK) {
                tell(b, tokens, rows, &cost, &way, us);
            }
        }
    }
    return status;
}

static attn_status_t
make_memory(bed_t *b)
{
    const attn_geometry_t *g = &b->shape;
    uint64_t q_row           = row_bytes(b, g->q_heads, g->head_dim_k), o_row;
    uint64_t asked           = 0;

    o_row        = row_bytes(b, g->q_heads, g->head_dim_v);
    b->most_rows = (uint32_t)(LARGE_BYTES / (q_row + o_row) + 1);
    for (uint32_t r = 0; r < b->o->rows.n; r++) {
        asked = b->o->rows.at[r] > asked ? b->o->rows.at[r] : asked;
    }
    asked     = asked > b->most_rows ? asked : b->most_rows;
    b->q      = malloc(asked * q_row);
    b->o_rows = malloc(asked * o_row);
    b->k      = malloc(PIECE * row_bytes(b, g->kv_heads, g->head_dim_k));
    b->v      = malloc(PIECE * row_bytes(b, g->kv_heads, g->head_dim_v));
    if (b->q == NULL || b->o_rows == NULL || b->k == NULL || b->v == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint64_t i = 0; i < asked; i++) {
        bench_row('q', 1, i, 0, g->q_heads * g->head_dim_k, g->kv_dtype, b->q + i * q_row);
    }
    return ATTN_OK;
}

/* The caches, of this client's and for the other to join. */
static attn_status_t
open_caches(bed_t *b, uint32_t tokens)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t l = 0; l < LAYOUTS && status == ATTN_OK; l++) {
        status = explain_cache(b->o, b->clients[OVER_GRPC], placements[l], tokens, b->names[l],
                               &b->caches[OVER_GRPC][l]);
        if (status == ATTN_OK) {
            b->shape                 = *attn_cache_geometry(b->caches[OVER_GRPC][l]);
            attn_seq_options_t about = {.size = sizeof(about), .expected_tokens = tokens};
            status = attn_seq_create(b->caches[OVER_GRPC][l], &about, &b->seqs[l]);
        }
        if (status == ATTN_OK && b->n_clients > 1) {
            status =
                attn_cache_open(b->clients[OVER_BEST], b->names[l], NULL, &b->caches[OVER_BEST][l]);
        }
    }
    return status;
}

static void
close_caches(bed_t *b)
{
    for (uint32_t c = CLIENTS; c-- > 0;) {
        for (uint32_t l = 0; l < LAYOUTS; l++) {
            attn_cache_close(b->caches[c][l]);
            b->caches[c][l] = NULL;
        }
    }
}

static attn_status_t
points(bed_t *b)
{
    const explain_options_t *o = b->o;
    attn_status_t status       = ATTN_OK;

    if (!o->json) {
        printf("%8s %5s %-7s %7s %-8s %9s %9s %9s %9s %9s %9s %10s %10s %8s\n", "tokens", "rows",
               "place", "workers", "over", "attend", "read", "compute", "hop", "link", "merge",
               "said us", "took us", "ratio");
    }
    for (uint32_t t = 0; t < o->tokens.n && status == ATTN_OK; t++) {
        uint32_t tokens = o->tokens.at[t];
        status          = open_caches(b, tokens);
        for (uint32_t l = 0; l < LAYOUTS && status == ATTN_OK; l++) {
            status = fill(b, b->caches[OVER_GRPC][l], b->seqs[l], tokens);
        }
        for (uint32_t r = 0; r < o->rows.n && status == ATTN_OK; r++) {
            status = o->rows.at[r] <= tokens ? point(b, tokens, o->rows.at[r]) : ATTN_OK;
        }
        close_caches(b);
    }
    return status;
}

/* ---- life ---- */

/* A second client only where it has another way. */
static bool
lends_memory(attn_client_t *client)
{
    attn_cluster_info_t info;
    bool ucx = false;

    if (attn_cluster_describe(client, &info) == ATTN_OK) {
        for (uint32_t i = 0; i < info.n_workers; i++) {
            ucx = ucx || (info.workers[i].alive && info.workers[i].ucx);
        }
        attn_cluster_info_free(&info);
    }
    return ucx;
}

static uint32_t
workers_alive(attn_client_t *client)
{
    attn_cluster_info_t info;
    uint32_t n = 0;

    if (attn_cluster_describe(client, &info) == ATTN_OK) {
        for (uint32_t i = 0; i < info.n_workers; i++) {
            n += info.workers[i].alive;
        }
        attn_cluster_info_free(&info);
    }
    return n;
}

static attn_status_t
open_clients(bed_t *b)
{
    attn_client_options_t options = *b->o->client;

    options.transport    = ATTN_TRANSPORT_GRPC;
    attn_status_t status = attn_client_open(b->o->target, &options, &b->clients[OVER_GRPC]);
    b->n_clients         = status == ATTN_OK;
    if (status == ATTN_OK && lends_memory(b->clients[OVER_GRPC])) {
        options.transport = ATTN_TRANSPORT_AUTO;
        status            = attn_client_open(b->o->target, &options, &b->clients[OVER_BEST]);
        b->n_clients      = status == ATTN_OK ? CLIENTS : 1;
    }
    if (status == ATTN_OK) {
        b->workers = workers_alive(b->clients[OVER_GRPC]);
    }
    return status;
}

attn_status_t
explain_measure(const explain_options_t *o)
{
    bed_t *b = calloc(1, sizeof(*b));

    if (b == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    b->o = o;
    bench_data_init();
    attn_status_t status = open_clients(b);
    if (status == ATTN_OK) {
        status = explain_shape(o, b->clients[OVER_GRPC], &b->shape);
    }
    if (status == ATTN_OK && (status = make_memory(b)) == ATTN_OK &&
        (status = open_caches(b, 2 * b->most_rows)) == ATTN_OK) {
        status = learn(b);
    }
    close_caches(b);
    if (status == ATTN_OK) {
        status = points(b);
    }
    for (uint32_t c = CLIENTS; c-- > 0;) {
        attn_client_close(b->clients[c]);
    }
    free(b->q);
    free(b->k);
    free(b->v);
    free(b->o_rows);
    free(b);
    return status;
}
