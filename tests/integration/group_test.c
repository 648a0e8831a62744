/*
 * Groups of workers that merge partials among themselves, through real processes that share a GPU,
 * or have one each where there are several; and on those of fake_cuda.c, whose kernels are played,
 * and whose memory other processes map. A client that merges
 * in a group and one that merges by itself ask about the same sequences: their answers have the
 * same bits. Ranks are killed, stopped and left behind: every call ends, in time, and groups are
 * made anew of who is there.
 */
#include "tests/integration/cluster.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DIM 64u
#define KV_HEADS 2u
#define Q_HEADS 4u
#define LAYERS 2u
#define CHUNK 256u
#define ENTRIES 4u /* of a step at most */
#define ROWS 32u   /* queries of each */
#define O_MAX (ENTRIES * ROWS * Q_HEADS * DIM)

typedef struct side {
    attn_client_t *client;
    attn_cache_t *cache;
} side_t;

typedef struct world {
    test_cluster_t cluster;
    side_t alone, group; /* that merges here, and among the workers */
} world_t;

static uint32_t gpus = 1; /* that there are, or are played */

/* ---- making ---- */

static void
side_open(side_t *side, const test_cluster_t *cluster, attn_merging_t merging)
{
    attn_client_options_t options;
    attn_geometry_t geometry;

    attn_client_options_init(&options);
    options.timeout_ms = 5000;
    options.merging    = merging;
    OK(attn_client_open(cluster->coordinator.address, &options, &side->client));
    attn_geometry_init(&geometry);
    geometry.layers = LAYERS, geometry.q_heads = Q_HEADS, geometry.kv_heads = KV_HEADS;
    geometry.head_dim_k = geometry.head_dim_v = DIM;
    geometry.kv_dtype                         = ATTN_F16;
    geometry.chunk_size                       = CHUNK;
    geometry.placement                        = ATTN_PLACE_SPREAD;
    geometry.region_bytes                     = 8u << 20;
    OK(attn_cache_open(side->client, "group", &geometry, &side->cache));
}

static void
side_close(side_t *side)
{
    attn_cache_close(side->cache);
    attn_client_close(side->client);
}

static void
world_up(world_t *w, uint32_t workers, bool each, attn_merging_t merging)
{
    setenv("FAKE_CUDA_DEVICES", each ? "4" : "1", 1);
    cluster_up(&w->cluster, &(cluster_options_t){.workers     = workers,
                                                 .device      = each ? "cuda" : "cuda:0",
                                                 .groups      = true,
                                                 .device_each = each});
    side_open(&w->alone, &w->cluster, ATTN_MERGING_CLIENT);
    side_open(&w->group, &w->cluster, merging);
}

static void
world_down(world_t *w)
{
    side_close(&w->group);
    side_close(&w->alone);
    cluster_down(&w->cluster);
}

static uint64_t
grouped(const side_t *side)
{
    attn_links_info_t info;

    OK(attn_client_links(side->client, &info));
    uint64_t n = info.steps_grouped;
    attn_links_info_free(&info);
    return n;
}

/* ---- steps ---- */

static void
noise(_Float16 *at, uint64_t n, uint64_t seed)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;

    for (uint64_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        at[i] = (_Float16)((float)(int32_t)(x >> 40 & 0xffff) / 65536.0f - 0.5f);
    }
}

/* A sequence with so many tokens, committed. */
static attn_seq_t
make_sequence(side_t *side, uint32_t tokens, uint64_t seed)
{
    uint64_t n  = (uint64_t)tokens * KV_HEADS * DIM;
    _Float16 *k = malloc(2 * n * sizeof(*k));
    attn_step_t *step;
    attn_seq_t seq;

    OK(attn_seq_create(side->cache, NULL, &seq));
    noise(k, 2 * n, seed);
    attn_entry_t entry = {.seq = seq, .n_new = tokens};
    OK(attn_step_begin(side->cache,
                       &(attn_batch_t){.size    = sizeof(attn_batch_t),
                                       .n       = 1,
                                       .entries = &entry,
                                       .q_dtype = ATTN_F16,
                                       .o_dtype = ATTN_F32},
                       &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        OK(attn_step_run(step, l, NULL, &(attn_tensor_t){.data = k, .dtype = ATTN_F16},
                         &(attn_tensor_t){.data = k + n, .dtype = ATTN_F16}, NULL, NULL));
    }
    OK(attn_step_commit(step, NULL));
    free(k);
    return seq;
}

typedef struct answer {
    float o[LAYERS][O_MAX], lse[LAYERS][O_MAX / DIM];
} answer_t;

/* A question about sequences, with new tokens for all of them or none. */
typedef struct question {
    const attn_seq_t *seqs;
    const uint64_t *bases;
    uint32_t n, n_q, n_new;
    uint64_t seed;
    uint32_t timeout_ms;
    bool commits;
} question_t;

static attn_status_t
begin(side_t *side, const question_t *q, attn_step_t **step)
{
    attn_entry_t entries[ENTRIES] = {0};

    for (uint32_t i = 0; i < q->n; i++) {
        entries[i] = (attn_entry_t){
            .seq = q->seqs[i], .base = q->bases[i], .n_q = q->n_q, .n_new = q->n_new};
    }
    attn_batch_t batch = {.size       = sizeof(batch),
                          .n          = q->n,
                          .entries    = entries,
                          .q_dtype    = ATTN_F16,
                          .o_dtype    = ATTN_F32,
                          .want_lse   = true,
                          .timeout_ms = q->timeout_ms};
    return attn_step_begin(side->cache, &batch, step);
}

static attn_status_t
run(attn_step_t *step, const question_t *q, uint32_t layer, answer_t *answer)
{
    static _Thread_local _Float16 rows[O_MAX], k[O_MAX], v[O_MAX];

    noise(rows, (uint64_t)q->n * q->n_q * Q_HEADS * DIM, q->seed + layer);
    noise(k, (uint64_t)q->n * q->n_new * KV_HEADS * DIM, q->seed + 10 + layer);
    noise(v, (uint64_t)q->n * q->n_new * KV_HEADS * DIM, q->seed + 20 + layer);
    attn_tensor_t kt = {.data = k, .dtype = ATTN_F16}, vt = {.data = v, .dtype = ATTN_F16};
    return attn_step_run(step, layer, &(attn_tensor_t){.data = rows, .dtype = ATTN_F16},
                         q->n_new > 0 ? &kt : NULL, q->n_new > 0 ? &vt : NULL,
                         &(attn_tensor_t){.data = answer->o[layer], .dtype = ATTN_F32},
                         answer->lse[layer]);
}

static attn_status_t
ask(side_t *side, const question_t *q, answer_t *answer)
{
    attn_step_t *step;
    attn_status_t status = begin(side, q, &step);

    if (status != ATTN_OK) {
        return status;
    }
    memset(answer, 0xff, sizeof(*answer));
    for (uint32_t l = 0; l < LAYERS && status == ATTN_OK; l++) {
        status = run(step, q, l, answer);
    }
    if (status == ATTN_OK && q->commits) {
        status = attn_step_commit(step, NULL);
    } else {
        attn_step_abort(step);
    }
    return status;
}

static void
assert_same(const question_t *q, const answer_t *a, const answer_t *b)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        uint64_t rows = (uint64_t)q->n * q->n_q * Q_HEADS;
        for (uint64_t i = 0; i < rows * DIM; i++) {
            assert_true(isfinite(a->o[l][i]));
        }
        assert_memory_equal(a->o[l], b->o[l], rows * DIM * sizeof(float));
        assert_memory_equal(a->lse[l], b->lse[l], rows * sizeof(float));
    }
}

/* Both are asked, and say the same; the group was one, unless it cannot be. */
static void
assert_agreed(world_t *w, const question_t *q)
{
    static answer_t a, b;
    uint64_t before    = grouped(&w->group);
    question_t aborted = *q;

    aborted.commits = q->n_new == 0;
    OK(ask(&w->alone, &aborted, &a));
    OK(ask(&w->group, q, &b));
    assert_same(q, &a, &b);
    assert_int_equal(grouped(&w->group), before + 1);
    assert_int_equal(grouped(&w->alone), 0);
}

/* ---- the bits ---- */

static void
test_bits(void **state)
{
    world_t w;

    (void)state;
    world_up(&w, 3, false, ATTN_MERGING_GROUP);
    attn_seq_t seqs[3] = {make_sequence(&w.group, 5 * CHUNK + 100, 1),
                          make_sequence(&w.group, 100, 2), /* on one worker */
                          make_sequence(&w.group, 3 * CHUNK, 3)};
    uint64_t bases[3]  = {5 * CHUNK + 100, 100, 3 * CHUNK};
    for (uint32_t n_q = 1; n_q <= 8; n_q += 3) {
        assert_agreed(&w, &(question_t){seqs, bases, 1, n_q, 0, n_q, 0, true});
    }
    assert_agreed(&w, &(question_t){seqs, bases, 2, 1, 0, 7, 0, true}); /* fewer rows than ranks */
    assert_agreed(&w, &(question_t){seqs, bases, 3, 3, 0, 8, 0, true});
    /* New tokens are seen, and stay: both clients then know of them. */
    for (uint32_t i = 0; i < 3; i++) {
        question_t q = {seqs, bases, 3, 1, 1, 50 + i, 0, true};
        assert_agreed(&w, &q);
        for (uint32_t s = 0; s < 3; s++) {
            bases[s]++;
        }
        side_close(&w.alone); /* its layouts are of before */
        side_open(&w.alone, &w.cluster, ATTN_MERGING_CLIENT);
    }
    assert_agreed(&w, &(question_t){seqs, bases, 3, 2, 0, 9, 0, true});
    world_down(&w);
}

/* A failure of one rank is no reason for the others to wait: it ends the step, also where a step
 * without a group would go on. */
static void
test_a_rank_refuses(void **state)
{
    static answer_t a, b;
    world_t w;
    attn_step_t *step;

    (void)state;
    world_up(&w, 2, false, ATTN_MERGING_GROUP);
    attn_seq_t seq  = make_sequence(&w.alone, 4 * CHUNK + 9, 4);
    uint64_t base   = 4 * CHUNK + 9;
    question_t q    = {&seq, &base, 1, 1, 1, 60, 3000, true};
    question_t wild = q;
    wild.seed       = 61;
    OK(ask(&w.alone, &(question_t){&seq, &base, 1, 1, 1, 60, 0, false}, &a));
    OK(begin(&w.group, &q, &step));
    OK(run(step, &q, 0, &b));
    uint64_t start = now_ms();
    assert_int_not_equal(run(step, &wild, 0, &b), ATTN_OK); /* other k, v: its owner says so */
    assert_true(now_ms() - start < 1500);
    assert_int_equal(run(step, &q, 0, &b), ATTN_ERR_ABORTED);
    attn_step_abort(step);
    attn_status_t status;
    do { /* the rank whose run was cancelled hears of the end by that alone, in its own time */
        status = ask(&w.group, &q, &b);
        assert_true(now_ms() - start < 5000);
    } while (status == ATTN_ERR_BUSY);
    OK(status);
    assert_same(&q, &a, &b);
    assert_true(grouped(&w.group) >= 2);
    world_down(&w);
}

/* ---- who is chosen ---- */

/* What attn_explain() says of the workers that have the sequence. */
static attn_cost_t
explained(const side_t *side, attn_seq_t seq, attn_explanation_t *x)
{
    attn_explain_t asked = {.size = sizeof(asked), .seq = seq, .n_q = 8};
    uint32_t taken       = 0;
    attn_cost_t cost     = {0};

    OK(attn_explain(side->cache, &asked, x));
    for (uint32_t i = 0; i < x->n_costs; i++) {
        const attn_cost_t *c = &x->costs[i];
        double sum           = c->attend + fmax(c->read, c->compute) + c->hop + c->link + c->merge;
        assert_true(fabs(c->total - sum) <= 1e-9 * sum);
        taken += c->taken;
        cost = c->place == ATTN_MERGE_GROUP ? *c : cost;
    }
    assert_int_equal(taken, 1);
    return cost;
}

static void
assert_words(const char *text, const char *words)
{
    if (strstr(text, words) == NULL) {
        fail_msg("no \"%s\" in \"%s\"", words, text);
    }
}

static void
test_the_choice(void **state)
{
    static answer_t a, b;
    attn_explanation_t x;
    world_t w;

    (void)state;
    world_up(&w, 2, false, ATTN_MERGING_AUTO); /* on one GPU: they could, and it does not pay */
    attn_seq_t seq = make_sequence(&w.alone, 4 * CHUNK, 5);
    uint64_t base  = 4 * CHUNK;
    question_t q   = {&seq, &base, 1, ROWS, 0, 70, 0, true};
    OK(ask(&w.alone, &q, &a));
    OK(ask(&w.group, &q, &b));
    assert_same(&q, &a, &b);
    assert_int_equal(grouped(&w.group), 0);
    attn_cost_t cost = explained(&w.group, seq, &x);
    assert_false(cost.available || x.exchange_measured);
    assert_words(cost.reason, "share a GPU");
    world_down(&w);

    if (gpus > 1) {
        world_up(&w, 2, true, ATTN_MERGING_GROUP);
        seq = make_sequence(&w.alone, 4 * CHUNK, 5);
        assert_agreed(&w, &q);
        cost = explained(&w.group, seq, &x);
        assert_true(cost.taken && cost.workers == 2 && x.exchange_measured);
        assert_words(cost.reason, "merging is group");
        OK(ask(&w.alone, &q, &a));
        cost = explained(&w.alone, seq, &x);
        assert_true(cost.available && !cost.taken && !x.exchange_measured);
        assert_words(cost.reason, "merging is client");
        world_down(&w);
    }

    /* Workers without GPUs, and those whose operator did not say that they may. */
    for (uint32_t gpu = 0; gpu < 2; gpu++) {
        cluster_up(&w.cluster, &(cluster_options_t){
                                   .workers = 2, .device = gpu ? "cuda:0" : "cpu", .groups = !gpu});
        side_open(&w.group, &w.cluster, ATTN_MERGING_GROUP);
        seq = make_sequence(&w.group, 4 * CHUNK, 5);
        assert_int_equal(ask(&w.group, &q, &b), ATTN_ERR_UNSUPPORTED);
        assert_words(attn_last_error(), "merging is group, but there is none");
        assert_words(attn_last_error(), "is in no groups");
        OK(attn_explain(w.group.cache,
                        &(attn_explain_t){.size = sizeof(attn_explain_t), .seq = seq}, &x));
        for (uint32_t i = 0; i < x.n_costs; i++) { /* begin fails, and nothing else is done */
            assert_false(x.costs[i].taken);
        }
        side_close(&w.group);
        cluster_down(&w.cluster);
    }
}

/* Where it may pay, a group is made, beside steps that do without meanwhile, and measured. */
static void
test_groups_are_made_beside_steps(void **state)
{
    static answer_t a, b;
    attn_seq_t seqs[ENTRIES];
    uint64_t bases[ENTRIES], end;
    attn_explanation_t x;
    world_t w;

    (void)state;
    if (gpus < 2) {
        return;
    }
    world_up(&w, 2, true, ATTN_MERGING_AUTO);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        seqs[i]  = make_sequence(&w.group, 4 * CHUNK, 30 + i);
        bases[i] = 4 * CHUNK;
    }
    question_t q = {seqs, bases, ENTRIES, ROWS, 0, 31, 0, true};
    OK(ask(&w.alone, &q, &a));
    OK(ask(&w.group, &q, &b)); /* by what is assumed of links and exchanges it pays */
    assert_int_equal(grouped(&w.group), 0);
    for (end = now_ms() + 10000, x.exchange_measured = false; !x.exchange_measured;) {
        assert_true(now_ms() < end);
        assert_same(&q, &a, &b);
        OK(ask(&w.group, &q, &b));
        attn_cost_t cost = explained(&w.group, seqs[0], &x);
        assert_true(cost.available);
        assert_words(cost.reason, "merge");
    }
    print_message("an exchange takes %.0f us, %.1f GB/s; %llu steps had a group\n",
                  1e6 * x.exchange_seconds, 1e-9 * x.exchange_bandwidth,
                  (unsigned long long)grouped(&w.group));
    world_down(&w);
}

/* ---- several at once ---- */

typedef struct asker {
    side_t side;
    attn_seq_t seq;
    uint64_t base;
    const answer_t *right;
    uint32_t wrong;
} asker_t;

static void *
ask_often(void *arg)
{
    asker_t *a   = arg;
    answer_t *b  = malloc(sizeof(*b));
    question_t q = {&a->seq, &a->base, 1, 4, 0, 80, 0, true};

    for (uint32_t i = 0; i < 20; i++) {
        attn_status_t status = ask(&a->side, &q, b);
        a->wrong +=
            status != ATTN_OK || memcmp(b->o[0], a->right->o[0], 4 * Q_HEADS * DIM * 4) != 0;
        if (status != ATTN_OK) {
            print_error("%s\n", attn_last_error());
        }
    }
    free(b);
    return NULL;
}

static void
test_several_at_once(void **state)
{
    static answer_t right[3];
    asker_t askers[3];
    pthread_t threads[3];
    world_t w;

    (void)state;
    world_up(&w, 3, false, ATTN_MERGING_GROUP);
    for (uint32_t i = 0; i < 3; i++) {
        askers[i] = (asker_t){.base = 4 * CHUNK, .right = &right[i]};
        side_open(&askers[i].side, &w.cluster, ATTN_MERGING_GROUP);
        askers[i].seq = make_sequence(&askers[i].side, 4 * CHUNK, 90 + i);
        OK(ask(&w.alone, &(question_t){&askers[i].seq, &askers[i].base, 1, 4, 0, 80, 0, true},
               &right[i]));
    }
    for (uint32_t i = 0; i < 3; i++) {
        pthread_create(&threads[i], NULL, ask_often, &askers[i]);
    }
    for (uint32_t i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(askers[i].wrong, 0);
        assert_true(grouped(&askers[i].side) >= 20);
        side_close(&askers[i].side);
    }
    world_down(&w);
}

/* ---- ranks that do not come ---- */

static void
ran(void *arg, attn_status_t status, const char *sentence)
{
    (void)sentence;
    __atomic_store_n((int *)arg, (int)status, __ATOMIC_RELEASE);
}

#define PENDING 12345

/* A run that is on its way: one rank is stopped, and the others wait for it. */
static attn_step_t *
submit(side_t *side, const question_t *q, process_t *stopped, int *outcome)
{
    static _Float16 rows[O_MAX];
    static answer_t answer;
    attn_step_t *step;

    OK(begin(side, q, &step));
    process_signal(stopped, SIGSTOP);
    noise(rows, O_MAX, 1);
    *outcome = PENDING;
    OK(attn_step_submit(step, 0, &(attn_tensor_t){.data = rows, .dtype = ATTN_F16}, NULL, NULL,
                        &(attn_tensor_t){.data = answer.o[0], .dtype = ATTN_F32}, answer.lse[0],
                        ran, outcome));
    sleep_ms(200);
    assert_int_equal(__atomic_load_n(outcome, __ATOMIC_ACQUIRE), PENDING);
    return step;
}

static uint64_t
await_outcome(const int *outcome, uint64_t start_ms, uint64_t most_ms)
{
    while (__atomic_load_n(outcome, __ATOMIC_ACQUIRE) == PENDING) {
        assert_true(now_ms() - start_ms < most_ms);
        sleep_ms(1);
    }
    return now_ms() - start_ms;
}

#define OLD 9u /* sequences on a worker each */
#define OLD_TOKENS 90u

/* Sequences that were there before somebody was killed: those of who lives answer as ever. */
static void
ask_the_old(side_t *side, const attn_seq_t *seqs, const answer_t *before)
{
    static answer_t now;
    uint64_t base = OLD_TOKENS;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < OLD; i++) {
        question_t q         = {&seqs[i], &base, 1, 2, 0, 80 + i, 0, true};
        attn_status_t status = ask(side, &q, &now);
        if (status == ATTN_OK) {
            assert_same(&q, &now, &before[i]);
            kept++;
        } else {
            assert_int_equal(status, ATTN_ERR_LOST);
        }
    }
    assert_in_range(kept, OLD / 3, OLD - 1);
}

static void
assert_runs(process_t *process)
{
    assert_int_equal(process_wait(process, 0), -1);
}

static void
test_a_rank_is_killed(void **state)
{
    static answer_t before[OLD];
    attn_seq_t old[OLD];
    world_t w;
    int outcome;

    (void)state;
    world_up(&w, 3, false, ATTN_MERGING_GROUP);
    attn_seq_t seq = make_sequence(&w.group, 6 * CHUNK, 6);
    uint64_t base = 6 * CHUNK, old_base = OLD_TOKENS;
    question_t q = {&seq, &base, 1, 4, 0, 71, 0, true};
    assert_agreed(&w, &q);
    for (uint32_t i = 0; i < OLD; i++) {
        old[i] = make_sequence(&w.alone, OLD_TOKENS, 30 + i);
        OK(ask(&w.alone, &(question_t){&old[i], &old_base, 1, 2, 0, 80 + i, 0, true}, &before[i]));
    }

    attn_step_t *step = submit(&w.group, &q, &w.cluster.workers[1], &outcome);
    uint64_t start    = now_ms();
    process_kill(&w.cluster.workers[1]);
    uint64_t took = await_outcome(&outcome, start, 3000);
    print_message("a killed rank: over after %llu ms, status %d\n", (unsigned long long)took,
                  outcome);
    assert_int_not_equal(outcome, ATTN_OK);
    attn_step_abort(step);

    /* The survivors, who were in an exchange with it, are the processes that they were, with all
     * that they had. */
    sleep_ms(CLUSTER_LOST_MS + 300);
    assert_runs(&w.cluster.workers[0]);
    assert_runs(&w.cluster.workers[2]);
    ask_the_old(&w.alone, old, before);

    /* They are a group, of a sequence that is on them. */
    uint64_t end = now_ms() + 10000;
    static answer_t a, b;
    attn_seq_t after = {0};
    attn_status_t status;
    after        = make_sequence(&w.group, 4 * CHUNK, 7);
    uint64_t len = 4 * CHUNK;
    question_t r = {&after, &len, 1, 4, 0, 72, 0, true};
    while ((status = ask(&w.group, &r, &b)) != ATTN_OK) {
        assert_true(now_ms() < end);
        sleep_ms(50);
    }
    OK(ask(&w.alone, &r, &a));
    assert_same(&r, &a, &b);

    /* And with the one that is started anew all are. */
    cluster_start_worker(&w.cluster, 1);
    attn_seq_t again = make_sequence(&w.group, 6 * CHUNK, 8);
    assert_agreed(&w, &(question_t){&again, &base, 1, 4, 0, 73, 0, true});
    world_down(&w);
}

static void
test_a_rank_is_stopped(void **state)
{
    world_t w;
    int outcome;

    (void)state;
    world_up(&w, 2, false, ATTN_MERGING_GROUP);
    attn_seq_t seq = make_sequence(&w.group, 6 * CHUNK, 6);
    uint64_t base  = 6 * CHUNK;
    question_t q   = {&seq, &base, 1, 4, 0, 71, 0, true};
    assert_agreed(&w, &q);

    q.timeout_ms      = 1200;
    uint64_t start    = now_ms();
    attn_step_t *step = submit(&w.group, &q, &w.cluster.workers[0], &outcome);
    uint64_t took     = await_outcome(&outcome, start, 1200 + 250 + 300);
    print_message("a stopped rank: over after %llu ms, status %d\n", (unsigned long long)took,
                  outcome);
    assert_int_not_equal(outcome, ATTN_OK);
    process_signal(&w.cluster.workers[0], SIGCONT);
    attn_step_abort(step);

    /* Nor do those that wait wait for as long as a step may take. */
    sleep_ms(CLUSTER_LOST_MS + 500);
    attn_seq_t other = make_sequence(&w.group, 6 * CHUNK, 12);
    question_t slow  = {&other, &base, 1, 4, 0, 71, 30000, true};
    static answer_t first;
    OK(ask(&w.group, &slow, &first));
    start = now_ms();
    step  = submit(&w.group, &slow, &w.cluster.workers[0], &outcome);
    took  = await_outcome(&outcome, start, 8000);
    print_message("with a longer deadline: over after %llu ms, status %d\n",
                  (unsigned long long)took, outcome);
    assert_int_not_equal(outcome, ATTN_OK);
    process_signal(&w.cluster.workers[0], SIGCONT);
    attn_step_abort(step);

    /* It goes on, in another group: as another worker, if it was counted as lost. */
    uint64_t end = now_ms() + 10000;
    q.timeout_ms = 0;
    static answer_t a, b;
    attn_status_t status;
    for (;;) {
        attn_seq_t after = make_sequence(&w.group, 6 * CHUNK, 9);
        question_t r     = {&after, &base, 1, 4, 0, 74, 0, true};
        uint64_t before  = grouped(&w.group);
        status           = ask(&w.group, &r, &b);
        if (status == ATTN_OK && grouped(&w.group) > before) {
            OK(ask(&w.alone, &r, &a));
            assert_same(&r, &a, &b);
            break;
        }
        assert_true(now_ms() < end);
        sleep_ms(200);
    }
    world_down(&w);
}

/* Workers that answer have no step any more: nothing of one waits for a rank that does not come. */
static void
await_no_steps(const side_t *side)
{
    uint64_t end = now_ms() + 5000, open = 1;

    while (open > 0) {
        attn_cluster_info_t info;
        assert_true(now_ms() < end);
        sleep_ms(CLUSTER_LOST_MS / 2);
        OK(attn_cluster_describe(side->client, &info));
        open = 0;
        for (uint32_t i = 0; i < info.n_workers; i++) {
            open += info.workers[i].alive ? info.workers[i].open_steps : 0;
        }
        attn_cluster_info_free(&info);
    }
}

/* A step that is aborted while its run is in an exchange ends at once, everywhere. */
static void
test_abort(void **state)
{
    world_t w;
    int outcome;

    (void)state;
    world_up(&w, 3, false, ATTN_MERGING_GROUP);
    attn_seq_t seq = make_sequence(&w.group, 6 * CHUNK, 6);
    uint64_t base  = 6 * CHUNK;
    question_t q   = {&seq, &base, 1, 4, 0, 71, 30000, true};
    assert_agreed(&w, &q);
    attn_step_t *step = submit(&w.group, &q, &w.cluster.workers[2], &outcome);
    uint64_t start    = now_ms();
    attn_step_abort(step);
    assert_true(now_ms() - start < 3000);
    assert_int_not_equal(outcome, PENDING);
    await_no_steps(&w.alone);
    process_signal(&w.cluster.workers[2], SIGCONT);

    /* And so where the client goes after it. */
    side_t other;
    side_open(&other, &w.cluster, ATTN_MERGING_GROUP);
    sleep_ms(CLUSTER_LOST_MS + 500);
    attn_seq_t mine = make_sequence(&other, 6 * CHUNK, 10);
    question_t r    = {&mine, &base, 1, 4, 0, 75, 30000, true};
    static answer_t a;
    OK(ask(&other, &r, &a));
    step = submit(&other, &r, &w.cluster.workers[2], &outcome);
    attn_step_abort(step);
    side_close(&other);
    await_no_steps(&w.alone);
    process_signal(&w.cluster.workers[2], SIGCONT);
    sleep_ms(CLUSTER_LOST_MS + 500);
    attn_seq_t last = make_sequence(&w.group, 6 * CHUNK, 11);
    assert_agreed(&w, &(question_t){&last, &base, 1, 4, 0, 76, 0, true});
    world_down(&w);
}

/* group_test [bits|faults]: half of the tests, or all. */
int
main(int argc, char **argv)
{
    const struct CMUnitTest bits[] = {
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_a_rank_refuses),
        cmocka_unit_test(test_the_choice),
        cmocka_unit_test(test_groups_are_made_beside_steps),
        cmocka_unit_test(test_several_at_once),
    };
    const struct CMUnitTest faults[] = {
        cmocka_unit_test(test_a_rank_is_killed),
        cmocka_unit_test(test_a_rank_is_stopped),
        cmocka_unit_test(test_abort),
    };

    attn_client_t *here;

    if (attn_client_open("inproc://cuda:0?slab=16MiB", NULL, &here) != ATTN_OK) {
        printf("skipped: %s\n", attn_last_error());
        return 77;
    }
    attn_client_close(here);
    if (attn_client_open("inproc://cuda:1?slab=16MiB", NULL, &here) == ATTN_OK) {
        gpus = 2;
        attn_client_close(here);
    }
    gpus       = getenv("FAKE_CUDA_PLAY") != NULL ? 4 : gpus;
    int failed = 0;
    if (argc < 2 || strcmp(argv[1], "bits") == 0) {
        failed += cmocka_run_group_tests_name("integration.group.bits", bits, NULL, NULL);
    }
    if (argc < 2 || strcmp(argv[1], "faults") == 0) {
        failed += cmocka_run_group_tests_name("integration.group.faults", faults, NULL, NULL);
    }
    return failed;
}
