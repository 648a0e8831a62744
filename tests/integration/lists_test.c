/*
 * Block-sparse lists that come with a run, over engines in this process and over real workers:
 * bit for bit what a step answers whose begin had the same lists.
 */
#include "client/attn.h"
#include "tests/integration/cluster.h"

#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS 3u
#define Q_HEADS 4u
#define KV_HEADS 2u
#define D 32u
#define BASE 1300u
#define N_NEW 3u
#define CHUNK 256u
#define PAGE 24u
#define CHUNK_PAGES 11u /* of a chunk */
#define PAGES (6u * CHUNK_PAGES)
#define ROOM 130u

#define KV_ROW (KV_HEADS * D)
#define Q_ROW (Q_HEADS * D)
#define ROWS (2u * N_NEW)

static uint64_t random_state;

static uint32_t
pick(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) % n);
}

static void
fill(float *to, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        to[i] = (float)pick(1u << 20) / (float)(1u << 19) - 1.0f;
    }
}

/* Two sequences of BASE tokens. */
typedef struct scene {
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seqs[2];
    float q[ROWS * Q_ROW], k[ROWS * KV_ROW], v[ROWS * KV_ROW];
} scene_t;

typedef struct answer {
    float o[LAYERS][ROWS * Q_ROW], lse[LAYERS][ROWS * Q_HEADS];
} answer_t;

typedef struct lists {
    uint32_t n, indptr[KV_HEADS + 1], pages[ROOM];
} lists_t;

static attn_tensor_t
tensor(const float *data)
{
    return (attn_tensor_t){.data = (void *)data, .dtype = ATTN_F32};
}

static void
scene_open(scene_t *s, const char *target)
{
    static float k[BASE * KV_ROW], v[BASE * KV_ROW];
    attn_tensor_t tk = tensor(k), tv = tensor(v);
    attn_geometry_t g;

    memset(s, 0, sizeof(*s));
    random_state = 5;
    s->client    = open_client(target, 20000);
    attn_geometry_init(&g);
    g.layers = LAYERS, g.q_heads = Q_HEADS, g.kv_heads = KV_HEADS;
    g.head_dim_k = g.head_dim_v = D;
    g.kv_dtype                  = ATTN_F32;
    g.page_size = PAGE, g.chunk_size = CHUNK;
    g.placement    = ATTN_PLACE_SPREAD;
    g.region_bytes = 6 << 20;
    OK(attn_cache_open(s->client, "lists", &g, &s->cache));
    for (int i = 0; i < 2; i++) {
        attn_step_t *step;
        OK(attn_seq_create(s->cache, NULL, &s->seqs[i]));
        attn_entry_t e     = {.seq = s->seqs[i], .n_new = BASE};
        attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &e, .q_dtype = ATTN_F32};
        OK(attn_step_begin(s->cache, &batch, &step));
        for (uint32_t l = 0; l < LAYERS; l++) {
            fill(k, BASE * KV_ROW);
            fill(v, BASE * KV_ROW);
            OK(attn_step_run(step, l, NULL, &tk, &tv, NULL, NULL));
        }
        OK(attn_step_commit(step, NULL));
    }
    fill(s->q, ROWS * Q_ROW);
    fill(s->k, ROWS * KV_ROW);
    fill(s->v, ROWS * KV_ROW);
}

static void
scene_close(scene_t *s)
{
    attn_cache_close(s->cache);
    attn_client_close(s->client);
}

/* One list or one a KV head: dense, thin, in one place, or empty. */
static void
lists_make(lists_t *lists)
{
    lists->n         = pick(2) ? 1 : KV_HEADS;
    lists->indptr[0] = 0;
    for (uint32_t i = 0; i < lists->n; i++) {
        uint32_t at = lists->indptr[i], how = pick(4), first = pick(PAGES);
        for (uint32_t p = 0; p < PAGES && at < ROOM; p++) {
            if (how == 0 ? pick(2) == 0 : how == 1 ? pick(12) == 0 : how == 2 && p - first < 6) {
                lists->pages[at++] = p;
            }
        }
        lists->indptr[i + 1] = at;
    }
}

/* Begin over both sequences; of each the lists, NULL: none, and the room. */
static attn_step_t *
begin(const scene_t *s, lists_t *const lists[2], uint32_t room)
{
    attn_entry_t e[2];
    attn_step_t *step;

    for (int i = 0; i < 2; i++) {
        e[i] = (attn_entry_t){
            .seq = s->seqs[i], .base = BASE, .n_q = N_NEW, .n_new = N_NEW, .list_room = room};
        if (lists[i] != NULL) {
            e[i].n_lists       = lists[i]->n;
            e[i].sparse_indptr = lists[i]->indptr;
            e[i].sparse_pages  = lists[i]->pages;
        }
    }
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 2, .entries = e, .q_dtype = ATTN_F32, .want_lse = true};
    OK(attn_step_begin(s->cache, &batch, &step));
    return step;
}

static void
on_done(void *arg, attn_status_t status, const char *error)
{
    assert_int_equal(status, ATTN_OK);
    assert_non_null(error);
    sem_post(arg);
}

/* A layer, waiting or submitted; lists[i] NULL: those of begin. */
static void
run(const scene_t *s, attn_step_t *step, uint32_t layer, lists_t *const lists[2], bool submit,
    answer_t *answer)
{
    attn_tensor_t q = tensor(s->q), k = tensor(s->k), v = tensor(s->v);
    attn_tensor_t o = tensor(answer->o[layer]);
    attn_lists_t given[2];

    memset(given, 0, sizeof(given));
    for (int i = 0; i < 2; i++) {
        if (lists[i] != NULL) {
            given[i] = (attn_lists_t){lists[i]->n, lists[i]->indptr, lists[i]->pages};
        }
    }
    attn_run_t what = {.size  = sizeof(what),
                       .layer = layer,
                       .q     = &q,
                       .k     = &k,
                       .v     = &v,
                       .o     = &o,
                       .lse   = answer->lse[layer],
                       .lists = given};
    if (submit) {
        sem_t done;
        sem_init(&done, 0, 0);
        OK(attn_step_submit_with(step, &what, on_done, &done));
        while (sem_wait(&done) != 0) {
        }
        sem_destroy(&done);
    } else {
        OK(attn_step_run_with(step, &what));
    }
}

/* Every layer with lists of its own, against a step for each whose begin has them. */
static void
play(const char *target, answer_t *all)
{
    lists_t lists[LAYERS][2], at_begin;
    answer_t *with = calloc(1, sizeof(*with)), *again = calloc(1, sizeof(*again));
    scene_t *s = malloc(sizeof(*s));

    scene_open(s, target);
    at_begin = (lists_t){.n = 1, .indptr = {0, 1}, .pages = {3}}; /* what is planned is not this */
    for (uint32_t l = 0; l < LAYERS; l++) {
        lists_make(&lists[l][0]);
        lists_make(&lists[l][1]);
    }
    /* The second sequence keeps the lists of begin in layer 1. */
    attn_step_t *step = begin(s, (lists_t *[]){NULL, &at_begin}, ROOM);
    for (uint32_t l = LAYERS; l-- > 0;) {
        run(s, step, l, (lists_t *[]){&lists[l][0], l == 1 ? NULL : &lists[l][1]}, l == 2, with);
    }
    /* Asked again without, the answer is begin's; and again with, the same. */
    run(s, step, 0, (lists_t *[]){NULL, NULL}, false, again);
    assert_memory_not_equal(again->o[0], with->o[0], sizeof(with->o[0]));
    run(s, step, 0, (lists_t *[]){&lists[0][0], &lists[0][1]}, false, again);
    assert_memory_equal(again->o[0], with->o[0], sizeof(with->o[0]));
    attn_step_abort(step);

    for (uint32_t l = 0; l < LAYERS; l++) {
        step = begin(s, (lists_t *[]){&lists[l][0], l == 1 ? &at_begin : &lists[l][1]}, 0);
        run(s, step, l, (lists_t *[]){NULL, NULL}, false, again);
        assert_memory_equal(again->o[l], with->o[l], sizeof(with->o[l]));
        assert_memory_equal(again->lse[l], with->lse[l], sizeof(with->lse[l]));
        attn_step_abort(step);
    }
    *all = *with;
    scene_close(s);
    free(s);
    free(with);
    free(again);
}

static void
test_lists_of_a_run_have_the_bits_of_lists_of_begin(void **state)
{
    static answer_t one, other;
    test_cluster_t cluster;

    (void)state;
    play("inproc://cpu?workers=1&threads=1&slab=32MiB", &one);
    play("inproc://cpu?workers=2&threads=2&slab=32MiB", &other);
    assert_memory_equal(&one, &other, sizeof(one));
    play("inproc://cpu?workers=3&threads=1&slab=32MiB", &other);
    assert_memory_equal(&one, &other, sizeof(one));
    cluster_up(&cluster, &(cluster_options_t){.workers = 3});
    play(cluster.coordinator.address, &other);
    assert_memory_equal(&one, &other, sizeof(one));
    cluster_down(&cluster);
}

static void
refused(const scene_t *s, attn_step_t *step, const attn_lists_t *lists, attn_status_t status,
        const char *text)
{
    static answer_t answer;
    attn_tensor_t q = tensor(s->q), k = tensor(s->k), v = tensor(s->v), o = tensor(answer.o[0]);
    attn_run_t what = {.size = sizeof(what), .q = &q, .k = &k, .v = &v, .o = &o, .lists = lists};

    assert_int_equal(attn_step_run_with(step, &what), status);
    if (strstr(attn_last_error(), text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), text);
    }
}

static void
test_bad_lists_are_refused_and_the_step_goes_on(void **state)
{
    uint32_t pages[] = {1, 5, 9, 3, 70, 2}, whole[] = {0, 3}, four[] = {0, 4}, odd[] = {1, 3};
    uint32_t down[] = {0, 3, 2};
    static answer_t answer;
    scene_t *s = malloc(sizeof(*s));

    (void)state;
    scene_open(s, "inproc://cpu?workers=2&threads=1&slab=32MiB");
    attn_step_t *step = begin(s, (lists_t *[]){NULL, NULL}, 4);
    refused(s, step, (attn_lists_t[]){{1, four, pages}, {0}}, ATTN_ERR_INVALID,
            "page 3 must be above");
    refused(s, step, (attn_lists_t[]){{1, whole, pages + 2}, {0}}, ATTN_ERR_INVALID,
            "page 3 must be above");
    refused(s, step, (attn_lists_t[]){{0}, {1, whole, pages + 3}}, ATTN_ERR_INVALID,
            "page 70 must be above the one before and below 66");
    refused(s, step, (attn_lists_t[]){{3, whole, pages}, {0}}, ATTN_ERR_INVALID, "has 3 lists");
    refused(s, step, (attn_lists_t[]){{1, odd, pages}, {0}}, ATTN_ERR_INVALID, "indptr[0] = 0");
    refused(s, step, (attn_lists_t[]){{1, NULL, pages}, {0}}, ATTN_ERR_INVALID, "indptr[0] = 0");
    refused(s, step, (attn_lists_t[]){{2, down, pages}, {0}}, ATTN_ERR_INVALID,
            "indptr[2] is below");
    refused(s, step, (attn_lists_t[]){{1, (uint32_t[]){0, 5}, pages}, {0}}, ATTN_ERR_TOO_LARGE,
            "list_room is 4");
    refused(s, step, (attn_lists_t[]){{1, whole, NULL}, {0}}, ATTN_ERR_INVALID, "pages is NULL");
    assert_int_equal(attn_step_run_with(step, &(attn_run_t){.size = 16}), ATTN_ERR_INVALID);
    for (uint32_t l = 0; l < LAYERS; l++) {
        run(s, step, l, (lists_t *[]){NULL, NULL}, false, &answer);
    }
    OK(attn_step_commit(step, NULL));

    for (int i = 0; i < 2; i++) {
        OK(attn_seq_truncate(s->cache, s->seqs[i], BASE));
    }
    step = begin(s, (lists_t *[]){NULL, NULL}, 0);
    refused(s, step, (attn_lists_t[]){{0}, {1, whole, pages}}, ATTN_ERR_INVALID, "list_room 0");
    attn_step_abort(step);

    attn_entry_t e     = {.seq = s->seqs[0], .base = BASE, .n_q = 1, .list_room = 2097153};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &e, .q_dtype = ATTN_F32};
    assert_int_equal(attn_step_begin(s->cache, &batch, &step), ATTN_ERR_TOO_LARGE);
    assert_non_null(strstr(attn_last_error(), "list_room adds up to 2097153"));
    scene_close(s);
    free(s);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_lists_are_refused_and_the_step_goes_on),
        cmocka_unit_test(test_lists_of_a_run_have_the_bits_of_lists_of_begin),
    };

    return cmocka_run_group_tests_name("tests.integration.lists", tests, NULL, NULL);
}
