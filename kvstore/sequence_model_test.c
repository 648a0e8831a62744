/*
 * Random operations on a table of sequences, against a model: lists of chunk ids, and of
 * every chunk ever given out whether it was released. References are counted by looking at
 * all lists.
 */
#include "kvstore/sequence.h"
#include "kvstore/test_random.h"

#include <string.h>

enum { MODEL_SEQS = 24, MODEL_CHUNKS = 40, MODEL_IDS = 60000, OPERATIONS = 25000, SEEDS = 8 };

typedef struct model_seq {
    attn_seq_t id; /* 0: none */
    uint64_t cache;
    uint32_t client, n;
    uint64_t chunks[MODEL_CHUNKS];
} model_seq_t;

static struct model {
    model_seq_t seqs[MODEL_SEQS];
    uint64_t dead[64]; /* ids of freed sequences */
    struct {
        uint32_t worker;
        bool given, released;
        uint64_t cache;
    } chunks[MODEL_IDS]; /* by id */
    uint32_t released_now;
} model;

static uint32_t
model_references(uint64_t chunk)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        for (uint32_t c = 0; model.seqs[s].id.id != 0 && c < model.seqs[s].n; c++) {
            n += model.seqs[s].chunks[c] == chunk;
        }
    }
    return n;
}

static void
model_new_chunk(uint64_t id, uint32_t worker, uint64_t cache)
{
    CHECK(id > 0 && id < MODEL_IDS && !model.chunks[id].given);
    model.chunks[id].given  = true;
    model.chunks[id].worker = worker;
    model.chunks[id].cache  = cache;
}

/* The model's lists are cut already when this is called. */
static void
model_on_release(void *arg, const seq_released_t *released)
{
    CHECK(arg == &model);
    CHECK(released->chunk > 0 && released->chunk < MODEL_IDS);
    CHECK(model.chunks[released->chunk].given && !model.chunks[released->chunk].released);
    CHECK(model_references(released->chunk) == 0);
    CHECK(model.chunks[released->chunk].worker == released->worker);
    CHECK(model.chunks[released->chunk].cache == released->cache);
    model.chunks[released->chunk].released = true;
    model.released_now++;
}

static uint32_t
model_orphans(void)
{
    uint32_t n = 0;
    for (uint32_t id = 1; id < MODEL_IDS && model.chunks[id].given; id++) {
        n += !model.chunks[id].released && model_references(id) == 0;
    }
    return n;
}

static void
op_add(seq_table_t *table, model_seq_t *seq)
{
    if (seq->id.id == 0) {
        *seq = (model_seq_t){.cache = pick(5), .client = pick(3)};
        CHECK(seq_create(table, seq->cache, seq->client, 9, &seq->id) == ATTN_OK);
    } else if (seq->n < MODEL_CHUNKS) {
        uint32_t worker = pick(8);
        uint64_t chunk  = 0;
        CHECK(seq_chunk_append(table, seq->id, worker, &chunk) == ATTN_OK);
        model_new_chunk(chunk, worker, seq->cache);
        seq->chunks[seq->n++] = chunk;
    }
}

static void
op_fork(seq_table_t *table, model_seq_t *seq, model_seq_t *fork)
{
    uint32_t n_shared = pick(seq->n + 1), worker = chance(50) ? UINT32_MAX : pick(8);
    uint64_t tail = 0;
    attn_seq_t id;

    if (seq->id.id == 0 || fork->id.id != 0 || n_shared == MODEL_CHUNKS) {
        return;
    }
    CHECK(seq_fork(table, seq->id, 7, n_shared, worker, &id, &tail) == ATTN_OK);
    *fork        = *seq;
    fork->id     = id;
    fork->client = 7;
    fork->n      = n_shared;
    if (worker != UINT32_MAX) {
        model_new_chunk(tail, worker, seq->cache);
        fork->chunks[fork->n++] = tail;
    }
}

static void
op_drop(seq_table_t *table, model_seq_t *seq)
{
    attn_seq_t id  = seq->id;
    uint64_t chunk = 0;

    if (id.id == 0) {
        return;
    }
    model.released_now = 0;
    if (chance(40) && seq->n > 0) {
        uint32_t i = pick(seq->n), old = (uint32_t)seq->chunks[i];
        seq->chunks[i] = 0;
        chunk          = seq_chunk_id(table);
        CHECK(seq_chunk_replace(table, id, i, chunk, model_on_release, &model) == ATTN_OK);
        model_new_chunk(chunk, model.chunks[old].worker, seq->cache);
        seq->chunks[i] = chunk;
    } else if (chance(70)) {
        seq->n = pick(seq->n + 1);
        CHECK(seq_cut(table, id, seq->n, model_on_release, &model) == ATTN_OK);
    } else {
        seq->id.id = 0;
        CHECK(seq_free(table, id, model_on_release, &model) == ATTN_OK);
        model.dead[pick(64)] = id.id;
    }
}

static void
check_seq(seq_table_t *table, const model_seq_t *seq)
{
    seq_info_t info;

    CHECK(seq_describe(table, seq->id, &info) == ATTN_OK);
    CHECK(info.cache == seq->cache && info.client == seq->client && info.n_chunks == seq->n);
    CHECK(seq_chunk_at(table, seq->id, seq->n) == NULL);
    for (uint32_t c = 0; c < seq->n; c++) {
        const seq_chunk_t *chunk = seq_chunk_at(table, seq->id, c);
        CHECK(chunk->id == seq->chunks[c]);
        CHECK(chunk->worker == model.chunks[chunk->id].worker);
        CHECK(chunk->references == model_references(chunk->id));
    }
}

static void
count_visit(void *arg, attn_seq_t seq, const seq_info_t *info)
{
    uint32_t *n = arg;
    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        *n += model.seqs[s].id.id == seq.id && model.seqs[s].n == info->n_chunks;
    }
}

static void
check_table(seq_table_t *table)
{
    uint32_t n = 0, visited = 0;
    seq_info_t info;

    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        if (model.seqs[s].id.id != 0) {
            n++;
            check_seq(table, &model.seqs[s]);
        }
    }
    seq_for_each(table, count_visit, &visited);
    CHECK(seq_count(table) == n && visited == n);
    for (uint32_t i = 0; i < 64; i++) {
        CHECK(seq_describe(table, (attn_seq_t){model.dead[i]}, &info) == ATTN_ERR_NOT_FOUND);
    }
}

static void
run(void)
{
    seq_table_t *table = NULL;

    CHECK(seq_table_create(0, &table) == ATTN_OK);
    memset(&model, 0, sizeof(model));
    for (; test_op < OPERATIONS; test_op++) {
        model_seq_t *seq = &model.seqs[pick(MODEL_SEQS)];
        uint32_t what    = pick(100);
        if (what < 70) {
            op_add(table, seq);
        } else if (what < 85) {
            op_fork(table, seq, &model.seqs[pick(MODEL_SEQS)]);
        } else {
            op_drop(table, seq);
        }
        CHECK(seq_table_check(table) == ATTN_OK);
        if (test_op % 64 == 0) {
            check_table(table);
        }
        if (test_op % 1024 == 0) {
            CHECK(model_orphans() == 0);
        }
    }
    for (uint32_t s = 0; s < MODEL_SEQS; s++) {
        attn_seq_t id       = model.seqs[s].id;
        model.seqs[s].id.id = 0;
        CHECK(id.id == 0 || seq_free(table, id, model_on_release, &model) == ATTN_OK);
    }
    CHECK(model_orphans() == 0);
    CHECK(seq_count(table) == 0 && seq_chunk_count(table) == 0);
    CHECK(seq_table_check(table) == ATTN_OK);
    seq_table_destroy(table);
}

static void
test_random_operations_agree_with_a_model(void **state)
{
    (void)state;
    for_each_seed(SEEDS, run);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations_agree_with_a_model),
    };
    return cmocka_run_group_tests_name("kvstore.sequence_model", tests, NULL, NULL);
}
