/*
 * attnctl_bench_load.c: the load. A slot is a thread with sequences of its own that takes one
 * decode step after the other, so as many calls are outstanding as slots step. Slots belong to
 * clients in turn, so a drive of the first few spreads over all clients. In a sweep those that step
 * take turns with the sequences of those that do not, so that each point reads as much memory: a
 * few sequences alone would stay in the caches.
 */
#include "client/attnctl_bench.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PIECE 256u /* tokens that one step ingests */
#define GROW 64u   /* tokens behind the context; then the sequences are cut back */
#define TIMEOUT_MS 30000u
#define CHUNK_DEFAULT 2048u /* of CPUs */

typedef struct bench_client {
    attn_client_t *client;
    attn_cache_t *cache;
    door_t *door;
    door_cache_t *door_cache;
} bench_client_t;

/* The sequences that one slot steps at a time. */
typedef struct set {
    uint32_t number;
    attn_seq_t *seqs; /* [batch] */
    uint64_t length;  /* of all */
} set_t;

typedef struct slot {
    bench_load_t *load;
    bench_client_t *client;
    set_t *set; /* of the same client */
    uint8_t *q, *k, *v;
    float *o;
    attn_step_t *step;
    door_step_t *door_step;
    bench_result_t result;
    attn_status_t status;
    char sentence[512];
    pthread_t thread;
} slot_t;

struct bench_load {
    const bench_options_t *options;
    bench_client_t clients[BENCH_CLIENTS_MAX];
    uint32_t n_slots;
    slot_t *slots;
    set_t *sets;    /* [n_slots] */
    uint32_t every; /* of the sets is one slot's */
    uint32_t ms;
    atomic_bool stop;
};

/* ---- the two kinds of client ---- */

static attn_status_t
client_open(const bench_options_t *b, const char *target, bench_client_t *c)
{
    attn_client_options_t options;
    uint64_t token =
        (uint64_t)b->layers * b->kv_heads * b->head_dim * 2 * attn_dtype_size(b->dtype);
    uint64_t chunk  = b->chunk > 0 ? b->chunk : CHUNK_DEFAULT;
    uint64_t chunks = (b->context + GROW) / chunk + 2; /* one more is placed in advance */
    attn_geometry_t shape;
    char name[64];

    attn_geometry_init(&shape);
    shape.layers     = b->layers;
    shape.q_heads    = b->heads;
    shape.kv_heads   = b->kv_heads;
    shape.head_dim_k = shape.head_dim_v = b->head_dim;
    shape.kv_dtype                      = b->dtype;
    shape.chunk_size                    = b->chunk;
    shape.placement                     = b->placement;
    /* Room for all of it on one worker: a small cluster is a good one to measure. */
    shape.region_bytes = token * chunk * chunks * b->batch * b->outstanding;
    snprintf(name, sizeof(name), "attnctl-bench-%d", (int)getpid());
    options            = *b->client;
    options.name       = "attnctl bench";
    options.timeout_ms = TIMEOUT_MS;
    options.spin_us    = b->spin_us;
    if (b->thin) {
        attn_status_t status = door_open(target, &options, &c->door);
        return status == ATTN_OK ? door_cache_open(c->door, name, &shape, &c->door_cache) : status;
    }
    attn_status_t status = attn_client_open(target, &options, &c->client);
    return status == ATTN_OK ? attn_cache_open(c->client, name, &shape, &c->cache) : status;
}

static void
client_close(bench_client_t *c)
{
    door_cache_close(c->door_cache);
    door_close(c->door);
    attn_cache_close(c->cache);
    attn_client_close(c->client);
}

static attn_status_t
step_begin(slot_t *s, const attn_batch_t *batch)
{
    return s->client->door != NULL
               ? door_step_begin(s->client->door_cache, batch, true, &s->door_step)
               : attn_step_begin(s->client->cache, batch, &s->step);
}

static attn_status_t
step_run(slot_t *s, uint32_t layer, bool asks)
{
    attn_dtype_t dtype = s->load->options->dtype;
    attn_tensor_t q = {.data = s->q, .dtype = dtype}, k = {.data = s->k, .dtype = dtype},
                  v = {.data = s->v, .dtype = dtype}, o = {.data = s->o, .dtype = ATTN_F32};

    if (s->client->door != NULL) {
        return door_step_run(s->door_step, layer, asks ? s->q : NULL, s->k, s->v,
                             asks ? s->o : NULL, NULL, NULL);
    }
    return attn_step_run(s->step, layer, asks ? &q : NULL, &k, &v, asks ? &o : NULL, NULL);
}

static attn_status_t
step_commit(slot_t *s)
{
    return s->client->door != NULL ? door_step_commit(s->door_step, NULL)
                                   : attn_step_commit(s->step, NULL);
}

static void
step_abort(slot_t *s)
{
    door_step_abort(s->door_step);
    attn_step_abort(s->step);
}

/* ---- steps ---- */

static uint64_t
sequence_of(const slot_t *s, uint32_t i)
{
    return (uint64_t)s->set->number * 4096 + i + 1;
}

static void
write_rows(slot_t *s, uint32_t layer, uint32_t n_new, bool asks)
{
    const bench_options_t *b = s->load->options;
    size_t size              = attn_dtype_size(b->dtype);
    uint32_t kv = b->kv_heads * b->head_dim, all = b->heads * b->head_dim;

    for (uint32_t i = 0; i < b->batch; i++) {
        uint64_t sequence = sequence_of(s, i);
        for (uint32_t t = 0; t < n_new; t++) {
            uint64_t at = ((uint64_t)i * n_new + t) * kv * size;
            bench_row('k', sequence, s->set->length + t, layer, kv, b->dtype, s->k + at);
            bench_row('v', sequence, s->set->length + t, layer, kv, b->dtype, s->v + at);
        }
        if (asks) {
            bench_row('q', sequence, s->set->length, layer, all, b->dtype,
                      s->q + (uint64_t)i * all * size);
        }
    }
}

/* One head of one entry, another each time. */
static void
verify(slot_t *s, uint32_t layer)
{
    const bench_options_t *b = s->load->options;
    uint64_t turn            = s->result.verified * 7919 + s->set->number;
    uint32_t i = (uint32_t)(turn % b->batch), head = (uint32_t)(turn / b->batch % b->heads);

    s->result.verified++;
    if (!bench_check(b, sequence_of(s, i), s->set->length + 1, layer, head,
                     s->o + ((uint64_t)i * b->heads + head) * b->head_dim)) {
        s->result.wrong++;
    }
}

/* A step of n_new tokens in every sequence of the slot. */
static attn_status_t
step(slot_t *s, uint32_t n_new, bool asks)
{
    const bench_options_t *b = s->load->options;
    bool verifies            = asks && s->result.steps % b->verify == 0;
    uint32_t layer           = (uint32_t)(s->result.steps / b->verify % b->layers);
    attn_entry_t *entries    = calloc(b->batch, sizeof(*entries));
    attn_batch_t batch       = {.size       = sizeof(batch),
                                .n          = b->batch,
                                .entries    = entries,
                                .q_dtype    = b->dtype,
                                .o_dtype    = ATTN_F32,
                                .timeout_ms = TIMEOUT_MS};

    if (entries == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a batch");
    }
    for (uint32_t i = 0; i < b->batch; i++) {
        entries[i] = (attn_entry_t){
            .seq = s->set->seqs[i], .base = s->set->length, .n_q = asks ? 1 : 0, .n_new = n_new};
    }
    s->step              = NULL;
    s->door_step         = NULL;
    uint64_t at          = attn_now_ns(), now;
    attn_status_t status = step_begin(s, &batch);
    free(entries);
    if (status != ATTN_OK) {
        return status;
    }
    bench_sample(&s->result.begin, (now = attn_now_ns()) - at);
    for (uint32_t l = 0; l < b->layers && status == ATTN_OK; l++) {
        write_rows(s, l, n_new, asks);
        at     = attn_now_ns();
        status = step_run(s, l, asks);
        bench_sample(&s->result.run, attn_now_ns() - at);
        if (status == ATTN_OK && verifies && l == layer) {
            verify(s, l);
        }
    }
    at     = attn_now_ns();
    status = status == ATTN_OK ? step_commit(s) : status;
    if (status != ATTN_OK) {
        step_abort(s);
        return status;
    }
    bench_sample(&s->result.commit, attn_now_ns() - at);
    s->set->length += n_new;
    s->result.steps++;
    s->result.tokens += (uint64_t)n_new * b->batch;
    return ATTN_OK;
}

/* Back to the context: what is measured stays the same. */
static attn_status_t
cut_back(slot_t *s)
{
    const bench_options_t *b = s->load->options;
    attn_status_t status     = ATTN_OK;

    for (uint32_t i = 0; i < b->batch && status == ATTN_OK; i++) {
        status = s->client->door != NULL
                     ? door_seq_truncate(s->client->door_cache, s->set->seqs[i], b->context)
                     : attn_seq_truncate(s->client->cache, s->set->seqs[i], b->context);
    }
    s->set->length = b->context;
    return status;
}

static void *
slot_thread(void *arg)
{
    slot_t *s                = arg;
    bench_load_t *load       = s->load;
    const bench_options_t *b = load->options;

    while (s->status == ATTN_OK && !atomic_load(&load->stop) &&
           (load->ms > 0 || s->result.steps < b->steps)) {
        s->status = step(s, 1, true);
        if (s->status == ATTN_OK && s->set->length >= b->context + GROW) {
            s->status = cut_back(s);
        }
        s->set = &load->sets[(s->set->number + load->every) % load->n_slots];
    }
    if (s->status != ATTN_OK) {
        snprintf(s->sentence, sizeof(s->sentence), "%s", attn_last_error());
        atomic_store(&load->stop, true);
    }
    return NULL;
}

/* ---- filling ---- */

static attn_status_t
fill(slot_t *s)
{
    const bench_options_t *b = s->load->options;
    attn_status_t status     = ATTN_OK;

    for (uint32_t i = 0; i < b->batch && status == ATTN_OK; i++) {
        status = s->client->door != NULL
                     ? door_seq_create(s->client->door_cache, &s->set->seqs[i])
                     : attn_seq_create(s->client->cache, NULL, &s->set->seqs[i]);
    }
    while (s->set->length < b->context && status == ATTN_OK) {
        uint64_t left = b->context - s->set->length;
        status        = step(s, left < PIECE ? (uint32_t)left : PIECE, false);
    }
    bench_result_free(&s->result);
    return status;
}

static void *
fill_thread(void *arg)
{
    slot_t *s = arg;

    s->status = fill(s);
    if (s->status != ATTN_OK) {
        snprintf(s->sentence, sizeof(s->sentence), "%s", attn_last_error());
    }
    return NULL;
}

static attn_status_t
slot_init(bench_load_t *load, uint32_t i)
{
    const bench_options_t *b = load->options;
    slot_t *s                = &load->slots[i];
    uint64_t size            = attn_dtype_size(b->dtype);

    s->load        = load;
    s->set         = &load->sets[i];
    s->client      = &load->clients[i % b->clients];
    s->set->number = i;
    s->set->seqs   = calloc(b->batch, sizeof(*s->set->seqs));
    s->q           = malloc((uint64_t)b->batch * b->heads * b->head_dim * size);
    s->k           = malloc((uint64_t)b->batch * PIECE * b->kv_heads * b->head_dim * size);
    s->v           = malloc((uint64_t)b->batch * PIECE * b->kv_heads * b->head_dim * size);
    s->o           = malloc((uint64_t)b->batch * b->heads * b->head_dim * sizeof(float));
    return s->set->seqs && s->q && s->k && s->v && s->o
               ? ATTN_OK
               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tensors of %u calls",
                           b->outstanding);
}

/* Run these slots' threads to their end. */
static attn_status_t
run_slots(bench_load_t *load, slot_t **slots, uint32_t n, void *(*thread)(void *))
{
    attn_status_t status = ATTN_OK;
    uint32_t started     = 0;
    uint64_t end         = attn_now_ns() + load->ms * ATTN_NS_PER_MS;

    atomic_store(&load->stop, false);
    for (; started < n && status == ATTN_OK; started++) {
        if (pthread_create(&slots[started]->thread, NULL, thread, slots[started]) != 0) {
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no thread for call %u", started);
            atomic_store(&load->stop, true);
            break;
        }
    }
    while (load->ms > 0 && attn_now_ns() < end && !atomic_load(&load->stop)) {
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    if (load->ms > 0) {
        atomic_store(&load->stop, true);
    }
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(slots[i]->thread, NULL);
        if (slots[i]->status != ATTN_OK && status == ATTN_OK) {
            status = attn_fail(slots[i]->status, "%s", slots[i]->sentence);
        }
    }
    return status;
}

/* ---- the load ---- */

attn_status_t
bench_load_open(const bench_options_t *b, const char *target, bench_load_t **load_p)
{
    bench_load_t *load   = calloc(1, sizeof(*load));
    slot_t **all         = calloc(b->outstanding, sizeof(slot_t *));
    attn_status_t status = load != NULL && all != NULL
                               ? ATTN_OK
                               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the load");

    if (status == ATTN_OK) {
        load->options = b;
        load->n_slots = b->outstanding;
        load->slots   = calloc(b->outstanding, sizeof(slot_t));
        load->sets    = calloc(b->outstanding, sizeof(set_t));
        status        = load->slots != NULL && load->sets != NULL
                            ? ATTN_OK
                            : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u calls", b->outstanding);
    }
    for (uint32_t c = 0; status == ATTN_OK && c < b->clients; c++) {
        status = client_open(b, target, &load->clients[c]);
    }
    for (uint32_t i = 0; status == ATTN_OK && i < b->outstanding; i++) {
        status = slot_init(load, i);
        all[i] = &load->slots[i];
    }
    if (status == ATTN_OK) {
        status = run_slots(load, all, b->outstanding, fill_thread);
    }
    free(all);
    if (status != ATTN_OK) {
        char sentence[512];
        snprintf(sentence, sizeof(sentence), "%s", attn_last_error());
        bench_load_close(load);
        return attn_fail(status, "%s", sentence);
    }
    *load_p = load;
    return ATTN_OK;
}

void
bench_load_close(bench_load_t *load)
{
    if (load == NULL) {
        return;
    }
    for (uint32_t i = 0; load->sets != NULL && i < load->n_slots; i++) {
        free(load->sets[i].seqs); /* not by the slots: two may have stopped at the same set */
    }
    for (uint32_t i = 0; load->slots != NULL && i < load->n_slots; i++) {
        slot_t *s = &load->slots[i];
        bench_result_free(&s->result);
        free(s->q);
        free(s->k);
        free(s->v);
        free(s->o);
    }
    for (uint32_t c = 0; c < BENCH_CLIENTS_MAX; c++) {
        client_close(&load->clients[c]); /* and its sequences go */
    }
    free(load->slots);
    free(load->sets);
    free(load);
}

static void
samples_add(bench_samples_t *to, const bench_samples_t *from)
{
    for (uint64_t i = 0; i < from->n; i++) {
        bench_sample(to, (uint64_t)((double)from->us[i] * 1e3));
    }
}

attn_status_t
bench_load_drive(bench_load_t *load, uint32_t outstanding, uint32_t ms, bench_result_t *result)
{
    uint32_t n     = outstanding < load->n_slots ? outstanding : load->n_slots;
    slot_t **slots = calloc(n + 1, sizeof(slot_t *));

    if (slots == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u calls", outstanding);
    }
    for (uint32_t i = 0; i < n; i++) {
        slots[i]      = &load->slots[i];
        slots[i]->set = &load->sets[i];
    }
    /* Where n does not divide them each keeps its own. */
    load->every          = load->options->sweep && load->n_slots % n == 0 ? n : load->n_slots;
    load->ms             = ms;
    uint64_t began       = attn_now_ns();
    attn_status_t status = run_slots(load, slots, n, slot_thread);
    *result              = (bench_result_t){.seconds = (double)(attn_now_ns() - began) / 1e9};
    for (uint32_t i = 0; i < n; i++) {
        bench_result_t *one = &slots[i]->result;
        samples_add(&result->begin, &one->begin);
        samples_add(&result->run, &one->run);
        samples_add(&result->commit, &one->commit);
        result->steps += one->steps;
        result->tokens += one->tokens;
        result->verified += one->verified;
        result->wrong += one->wrong;
        bench_result_free(one);
    }
    free(slots);
    return status;
}

attn_client_t *
bench_load_client(bench_load_t *load)
{
    return load->clients[0].client;
}

/* ---- results ---- */

void
bench_sample(bench_samples_t *samples, uint64_t ns)
{
    if (samples->n == samples->room) {
        uint64_t room = samples->room > 0 ? 2 * samples->room : 1024;
        float *us     = realloc(samples->us, room * sizeof(*us));
        if (us == NULL) {
            return; /* quantiles of those before */
        }
        samples->us   = us;
        samples->room = room;
    }
    samples->us[samples->n++] = (float)ns / 1e3f;
}

static int
ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

double
bench_quantile(bench_samples_t *samples, double q)
{
    if (samples->n == 0) {
        return 0;
    }
    qsort(samples->us, samples->n, sizeof(*samples->us), ascending);
    return (double)samples->us[(uint64_t)(q * (double)(samples->n - 1))];
}

void
bench_result_free(bench_result_t *result)
{
    free(result->begin.us);
    free(result->run.us);
    free(result->commit.us);
    memset(result, 0, sizeof(*result));
}
