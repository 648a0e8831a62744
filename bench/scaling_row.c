/*
 * scaling_row.c: a row of scaling.c: a point, on the workers that there are, asked for in one way.
 * Rows fork what was filled, so that each begins with the same sequences. A decode step asks for
 * its one layer several times, with the same k and v; prefill makes its sequence from nothing.
 */
#include "bench/gpu_memory.h"
#include "bench/result.h"
#include "bench/scaling.h"

#include "base/clock.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAMPLES_MAX 4096u
#define STEPS_MAX 512u
#define WARM_RUNS 12u /* so many that the client's meter has a word on its links */

typedef struct measure {
    world_t *world;
    row_t *row;
    side_t *side;
    attn_cache_t *cache;
    attn_seq_t *seqs; /* of this row alone */
    uint64_t tokens;  /* of each */
    uint32_t rows;    /* queries, and new tokens, of each in a step */
    uint32_t layers;  /* runs of a step */
    uint64_t q_bytes, kv_bytes;
    void *q, *k, *v, *o; /* o, and on a GPU all, of our own */
    void *answer;        /* o in the host's memory */
    double us[SAMPLES_MAX], computed[SAMPLES_MAX], begin[STEPS_MAX], commit[STEPS_MAX];
    uint32_t n, steps;
    uint64_t grouped; /* steps of this client that were, before */
} measure_t;

static bool
on_gpu(const measure_t *m)
{
    return m->row->way != WAY_HOST;
}

/* ---- tensors ---- */

static void
make_tensors(measure_t *m)
{
    const setup_t *setup = m->world->setup;
    uint64_t tokens      = (uint64_t)m->row->point->sequences * m->rows;

    m->q_bytes  = tokens * setup->q_heads * setup->dim * 2;
    m->kv_bytes = tokens * setup->kv_heads * setup->dim * 2;
    m->answer   = calloc(1, m->q_bytes);
    result_must(m->answer != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for o"));
    if (on_gpu(m)) {
        m->q = gpu_alloc(m->q_bytes);
        m->k = gpu_alloc(m->kv_bytes);
        m->v = gpu_alloc(m->kv_bytes);
        m->o = gpu_alloc(m->q_bytes);
    } else {
        m->o = m->answer;
    }
}

static void
free_tensors(measure_t *m)
{
    if (on_gpu(m)) {
        gpu_free(m->q);
        gpu_free(m->k);
        gpu_free(m->v);
        gpu_free(m->o);
    }
    free(m->answer);
}

/* Those of step i. */
static void
set_tensors(measure_t *m, uint64_t at)
{
    const setup_t *setup = m->world->setup;
    void *q = noise_q(setup, at / m->rows), *k = noise_k(setup, 0, at), *v = noise_v(setup, 0, at);

    if (on_gpu(m)) {
        gpu_put(m->q, q, m->q_bytes);
        gpu_put(m->k, k, m->kv_bytes);
        gpu_put(m->v, v, m->kv_bytes);
    } else {
        m->q = q, m->k = k, m->v = v;
    }
}

/* The answers so far, hashed: what a worker more must not change. */
static void
hash_answer(measure_t *m)
{
    if (on_gpu(m)) {
        gpu_get(m->answer, m->o, m->q_bytes);
    }
    const uint64_t *word = m->answer;
    uint64_t h           = m->row->bits;
    for (uint64_t i = 0; i < m->q_bytes / sizeof(*word); i++) {
        h = (h ^ word[i]) * 0x9e3779b97f4a7c15u;
        h ^= h >> 32;
    }
    m->row->bits = h;
}

/* ---- steps ---- */

static attn_status_t
begin(measure_t *m, uint64_t base, attn_step_t **step_p)
{
    uint32_t n            = m->row->point->sequences;
    attn_entry_t *entries = calloc(n, sizeof(*entries));
    attn_batch_t batch    = {.size    = sizeof(batch),
                             .n       = n,
                             .entries = entries,
                             .q_dtype = ATTN_BF16,
                             .memory  = on_gpu(m) ? ATTN_MEMORY_CUDA : ATTN_MEMORY_HOST};

    for (uint32_t i = 0; i < n; i++) {
        entries[i] =
            (attn_entry_t){.seq = m->seqs[i], .base = base, .n_q = m->rows, .n_new = m->rows};
    }
    uint64_t start       = attn_now_ns();
    attn_status_t status = attn_step_begin(m->cache, &batch, step_p);
    if (m->steps < STEPS_MAX) {
        m->begin[m->steps] = (double)(attn_now_ns() - start) / 1e3;
    }
    free(entries);
    return status;
}

static attn_status_t
commit(measure_t *m, attn_step_t *step)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = attn_step_commit(step, NULL);

    if (m->steps < STEPS_MAX) {
        m->commit[m->steps++] = (double)(attn_now_ns() - start) / 1e3;
    }
    return status;
}

static void
sample(measure_t *m, double us, double computed)
{
    if (m->n < SAMPLES_MAX) {
        m->us[m->n]         = us;
        m->computed[m->n++] = computed;
    }
}

/* So many runs of the layer, each a sample; on a stream all of them together are one. */
static attn_status_t
run(measure_t *m, attn_step_t *step, uint32_t runs)
{
    attn_memory_t memory = on_gpu(m) ? ATTN_MEMORY_CUDA : ATTN_MEMORY_HOST;
    attn_tensor_t q = {m->q, ATTN_BF16, memory, 0, 0}, k = {m->k, ATTN_BF16, memory, 0, 0};
    attn_tensor_t v = {m->v, ATTN_BF16, memory, 0, 0}, o = {m->o, ATTN_BF16, memory, 0, 0};
    attn_status_t status = ATTN_OK;
    uint64_t begun       = attn_now_ns();

    for (uint32_t i = 0; i < runs && status == ATTN_OK; i++) {
        uint64_t start = attn_now_ns();
        if (m->row->way == WAY_ENQUEUED) {
            status = attn_step_enqueue(step, 0, &q, &k, &v, &o, NULL, gpu_stream());
        } else if ((status = attn_step_run(step, 0, &q, &k, &v, &o, NULL)) == ATTN_OK) {
            double us = (double)(attn_now_ns() - start) / 1e3;
            sample(m, us, (double)attn_step_compute_ns(step) / 1e3);
        }
    }
    if (status == ATTN_OK && m->row->way == WAY_ENQUEUED) {
        gpu_wait(gpu_stream());
        sample(m, (double)(attn_now_ns() - begun) / 1e3 / runs, 0);
    }
    return status;
}

/* The sentence of what failed, before another call has one. */
static attn_status_t
note(row_t *row, attn_status_t status)
{
    if (status != ATTN_OK && row->absent[0] == '\0') {
        snprintf(row->absent, sizeof(row->absent), "%s", attn_last_error());
    }
    return status;
}

static attn_status_t
step_of(measure_t *m, uint64_t at, uint32_t runs, bool hash)
{
    attn_step_t *step;

    set_tensors(m, at);
    attn_status_t status = begin(m, at, &step);
    if (note(m->row, status) != ATTN_OK) {
        return status;
    }
    status = run(m, step, runs);
    if (status == ATTN_OK && hash) {
        hash_answer(m);
    }
    status = status == ATTN_OK ? commit(m, step) : status;
    if (note(m->row, status) != ATTN_OK) {
        attn_step_abort(step);
    }
    return status;
}

/* ---- what is told beside ---- */

static void
read_links(measure_t *m)
{
    row_t *row = m->row;
    attn_links_info_t info;

    if (attn_client_links(m->side->client, &info) != ATTN_OK) {
        return;
    }
    row->hop = row->send = 0;
    for (uint32_t i = 0; i < info.n_links; i++) { /* the slowest is waited for */
        const attn_link_info_t *link = &info.links[i];
        row->hop                     = fmax(row->hop, link->hop_seconds * 1e6);
        row->send                    = fmax(row->send, link->send_seconds * 1e6);
        snprintf(row->transport, sizeof(row->transport), "%s", link->transport);
        if (on_gpu(m) && link->gpu_reason[0] != '\0') {
            snprintf(row->gpu_reason, sizeof(row->gpu_reason), "%s", link->gpu_reason);
        }
    }
    row->grouped = info.steps_grouped > m->grouped;
    attn_links_info_free(&info);
}

/* The cost model's word on a layer, added up: of the merge that is taken. */
static void
add_prediction(measure_t *m, const attn_explain_t *batch)
{
    row_t *row = m->row;
    attn_explanation_t said;

    if (attn_explain(m->cache, batch, &said) != ATTN_OK) {
        return;
    }
    for (uint32_t i = 0; i < said.n_costs; i++) {
        const attn_cost_t *c = &said.costs[i];
        if (c->taken && c->available && c->way == 0) {
            row->predicted += c->total * 1e6;
            row->predicted_attend += (c->attend + fmax(c->read, c->compute)) * 1e6;
            row->predicted_hop += c->hop * 1e6;
            row->predicted_link += c->link * 1e6;
            row->predicted_merge += c->merge * 1e6;
            return;
        }
    }
}

static void
predict(measure_t *m)
{
    const point_t *point = m->row->point;
    attn_explain_t batch = {.size = sizeof(batch), .n_q = m->rows, .n_new = m->rows};

    if (point->piece > 0) {
        for (uint64_t at = 0; at < point->tokens; at += m->rows) {
            batch.tokens = at + m->rows;
            add_prediction(m, &batch);
        }
    } else if (point->sequences > 1) {
        batch.tokens    = point->tokens;
        batch.sequences = point->sequences;
        add_prediction(m, &batch);
    } else {
        batch.seq = m->seqs[0]; /* as it lies */
        add_prediction(m, &batch);
    }
}

static double
p50(double *samples, uint32_t n)
{
    return result_quantile(samples, n, 0.5);
}

static void
sum_up(measure_t *m, double steps_of_one)
{
    row_t *row = m->row;

    row->samples  = m->n;
    row->us       = p50(m->us, m->n);
    row->p90      = result_quantile(m->us, m->n, 0.9);
    row->p99      = result_quantile(m->us, m->n, 0.99);
    row->computed = p50(m->computed, m->n);
    row->begin    = p50(m->begin, m->steps) * steps_of_one;
    row->commit   = p50(m->commit, m->steps) * steps_of_one;
    read_links(m);
}

/* ---- decode and prefill ---- */

static attn_status_t
decode(measure_t *m)
{
    const setup_t *setup = m->world->setup;
    const stock_t *stock = world_stock(m->world, m->row->point);
    uint64_t at          = m->tokens;
    attn_status_t status = ATTN_OK;

    for (uint32_t s = 0; s < stock->n && status == ATTN_OK; s++) {
        status = attn_seq_fork(m->cache, stock->seqs[s], m->tokens, &m->seqs[s]);
    }
    if (status == ATTN_OK) {
        status = step_of(m, at++, WARM_RUNS, true);
    }
    if (status == ATTN_OK) {
        predict(m);
        m->n = m->steps = 0;
    }
    uint64_t end = attn_now_ns() + (uint64_t)(setup->seconds * 1e9);
    do {
        status = status == ATTN_OK ? step_of(m, at++, setup->runs, false) : status;
    } while (status == ATTN_OK && attn_now_ns() < end && m->steps < STEPS_MAX);
    if (status == ATTN_OK) {
        sum_up(m, 1);
    }
    return status;
}

/* A whole sequence, piece by piece: a sample is all of them together. */
static attn_status_t
prefill_once(measure_t *m, bool first, double *us, double *computed)
{
    uint32_t of_one      = 0;
    attn_status_t status = attn_seq_create(
        m->cache,
        &(attn_seq_options_t){.size = sizeof(attn_seq_options_t), .expected_tokens = m->tokens},
        &m->seqs[0]);

    *us = *computed = 0;
    if (status != ATTN_OK) {
        return status;
    }
    m->n = 0;
    for (uint64_t at = 0; at < m->tokens && status == ATTN_OK; at += m->rows, of_one++) {
        status = step_of(m, at, 1, first);
    }
    for (uint32_t i = 0; i < of_one && status == ATTN_OK; i++) {
        *us += m->us[i];
        *computed += m->computed[i];
    }
    attn_seq_free(m->cache, m->seqs[0]);
    m->seqs[0].id = 0;
    return status;
}

static attn_status_t
prefill(measure_t *m)
{
    const setup_t *setup = m->world->setup;
    double all[16], computed[16];
    uint32_t passes = 0;
    uint64_t end;

    attn_status_t status = prefill_once(m, true, &all[0], &computed[0]);
    predict(m);
    m->steps = 0;
    end      = attn_now_ns() + (uint64_t)(setup->seconds * 1e9);
    while (status == ATTN_OK && passes < 16 && (passes < 2 || attn_now_ns() < end)) {
        status = prefill_once(m, false, &all[passes], &computed[passes]);
        passes += status == ATTN_OK;
    }
    if (status == ATTN_OK) {
        memcpy(m->us, all, passes * sizeof(*all));
        memcpy(m->computed, computed, passes * sizeof(*computed));
        m->n = passes;
        sum_up(m, (double)m->tokens / m->rows);
    }
    return status;
}

void
measure_row(world_t *world, row_t *row)
{
    const point_t *point = row->point;
    measure_t *m         = calloc(1, sizeof(*m));

    *m                      = (measure_t){.world  = world,
                                          .row    = row,
                                          .tokens = point->tokens,
                                          .rows   = point->piece > 0 ? point->piece : 1};
    attn_status_t status    = world_side(world, row->merging, point->placement, &m->side);
    m->seqs                 = calloc(point->sequences, sizeof(*m->seqs));
    attn_links_info_t links = {0};
    if (status == ATTN_OK && (status = attn_client_links(m->side->client, &links)) == ATTN_OK) {
        m->grouped = links.steps_grouped;
        attn_links_info_free(&links);
        m->cache = m->side->caches[point->placement];
        make_tensors(m);
        status = note(row, point->piece > 0 ? prefill(m) : decode(m));
        for (uint32_t s = 0; s < point->sequences; s++) {
            if (m->seqs[s].id != 0) {
                attn_seq_free(m->cache, m->seqs[s]);
            }
        }
        free_tensors(m);
    }
    note(row, status);
    free(m->seqs);
    free(m);
}
