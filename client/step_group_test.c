/*
 * Steps in groups, over workers that are engines inside the process but for their part in groups,
 * which is played: nothing is exchanged. What is looked at is when a step has a group, what becomes
 * of it where a rank refuses, and that nobody waits for a rank that failed.
 */
#include "client/client_int.h"
#include "client/test_cluster.h"

#define RANKS 2u
#define TOKENS (2 * CHUNK)
#define ROWS 256u
#define HEADS 4u

/* ---- workers ---- */

typedef struct player player_t;

/* A rank's part of a step. */
typedef struct part {
    player_t *player;
    link_done_fn done; /* of a run that waits for the other ranks */
    void *arg;
} part_t;

struct player {
    link_t *link;
    const link_ops_t *engine; /* what the link was */
    uint32_t opened, begun, ran, cancelled;
    part_t part;
};

static player_t players[RANKS];
static bool refuses; /* ranks do, at begin */
static int fails;    /* whose run does; -1: nobody's */
static attn_status_t failure;

static player_t *
player_of(const link_t *link)
{
    return link == players[0].link ? &players[0] : &players[1];
}

/* NULL: it is the engine's. */
static part_t *
part_of(link_step_t *step)
{
    for (uint32_t i = 0; i < RANKS; i++) {
        if ((part_t *)(void *)step == &players[i].part) {
            return &players[i].part;
        }
    }
    return NULL;
}

static attn_status_t
play_open(link_t *link, const engine_group_options_t *options, uint64_t deadline_ns,
          link_inbox_t *inbox)
{
    (void)deadline_ns;
    player_of(link)->opened++;
    *inbox = (link_inbox_t){.of = *options};
    return ATTN_OK;
}

static attn_status_t
play_connect(link_t *link, const link_inbox_t *inboxes, uint32_t ranks, uint64_t deadline_ns)
{
    (void)link, (void)inboxes, (void)ranks, (void)deadline_ns;
    return ATTN_OK;
}

static attn_status_t
play_prove(link_t *link, uint64_t group, uint64_t deadline_ns, link_proof_t *proof)
{
    (void)link, (void)group, (void)deadline_ns;
    *proof = (link_proof_t){.few_seconds = 5e-6, .many_seconds = 9e-6, .many = 1024};
    return ATTN_OK;
}

static attn_status_t
play_close(link_t *link, uint64_t group, uint64_t deadline_ns)
{
    (void)link, (void)group, (void)deadline_ns;
    return ATTN_OK;
}

static attn_status_t
play_begin(link_t *link, const engine_batch_t *batch, const link_room_t *room, link_done_fn done,
           void *arg, link_step_t **step_p)
{
    player_t *p = player_of(link);

    if (batch->group == 0) {
        return p->engine->begin(link, batch, room, done, arg, step_p);
    }
    p->begun++;
    p->part = (part_t){.player = p};
    *step_p = (link_step_t *)(void *)&p->part;
    done(arg, refuses && p == &players[1] ? ATTN_ERR_TOO_LARGE : ATTN_OK, "too much for it");
    return ATTN_OK;
}

static void
play_run(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg)
{
    part_t *part = part_of(step);

    if (part == NULL) {
        players[0].engine->run(step, run, done, arg);
        return;
    }
    part->player->ran++;
    if (fails >= 0 && part->player == &players[fails]) {
        done(arg, failure, "it would not");
        return;
    }
    part->done = done; /* until the other ones come, or it is cancelled */
    part->arg  = arg;
}

static void
play_cancel(link_step_t *step)
{
    part_t *part = part_of(step);

    if (part != NULL && part->done != NULL) {
        link_done_fn done = part->done;
        part->done        = NULL;
        part->player->cancelled++;
        done(part->arg, ATTN_ERR_DEADLINE, "given up");
    }
}

static void
play_abort(link_step_t *step, link_done_fn done, void *arg)
{
    if (part_of(step) == NULL) {
        players[0].engine->abort(step, done, arg);
    } else {
        done(arg, ATTN_OK, "");
    }
}

static void
play_free(link_step_t *step)
{
    if (part_of(step) == NULL) {
        players[0].engine->step_free(step);
    }
}

/* ---- the bed ---- */

typedef struct bed {
    fixture_t f;
    link_ops_t ops;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
} bed_t;

static void
fill(bed_t *b)
{
    attn_step_t *step;
    float *kv          = calloc(TOKENS, DIM * sizeof(float));
    attn_entry_t entry = {.seq = b->seq, .n_new = TOKENS};
    attn_tensor_t rows = {.data = kv, .dtype = ATTN_F32};

    for (uint32_t i = 0; i < TOKENS * DIM; i++) {
        kv[i] = (float)pick(1000) / 1000;
    }
    OK(attn_step_begin(
        b->cache,
        &(attn_batch_t){
            .size = sizeof(attn_batch_t), .n = 1, .entries = &entry, .q_dtype = ATTN_F32},
        &step));
    OK(attn_step_run(step, 0, NULL, &rows, &rows, NULL, NULL));
    OK(attn_step_commit(step, NULL));
    free(kv);
}

static void
bed_open(bed_t *b, attn_merging_t merging)
{
    attn_client_options_t options;
    attn_geometry_t g;

    fixture_open(&b->f, RANKS, ATTN_PLACE_SPREAD, NOT_LOST);
    attn_client_options_init(&options);
    options.merging = merging;
    OK(client_open_on(NULL, b->f.cluster, b->f.links, &options, &b->client));
    for (uint32_t i = 0; i < RANKS; i++) {
        player_t *p = &players[i];
        *p          = (player_t){0};
        OK(links_get(b->f.links, b->f.hello[i].address, &p->link));
        p->engine            = p->link->ops;
        b->ops               = *p->engine;
        b->ops.group_open    = play_open;
        b->ops.group_connect = play_connect;
        b->ops.group_prove   = play_prove;
        b->ops.group_close   = play_close;
        b->ops.begin         = play_begin;
        b->ops.run           = play_run;
        b->ops.cancel        = play_cancel;
        b->ops.abort         = play_abort;
        b->ops.step_free     = play_free;
        p->link->ops         = &b->ops;
    }
    refuses = false;
    fails   = -1;
    attn_geometry_init(&g);
    g.layers     = 1;
    g.q_heads    = HEADS;
    g.kv_heads   = 1;
    g.head_dim_k = g.head_dim_v = DIM;
    g.kv_dtype                  = ATTN_F32;
    g.chunk_size                = CHUNK;
    g.placement                 = ATTN_PLACE_SPREAD;
    g.region_bytes              = 1u << 20;
    OK(attn_cache_open(b->client, "grouped", &g, &b->cache));
    OK(attn_seq_create(b->cache, NULL, &b->seq));
    fill(b);
}

static void
bed_close(bed_t *b)
{
    attn_cache_close(b->cache);
    attn_client_close(b->client);
    fixture_close(&b->f);
}

static attn_status_t
begin(bed_t *b, attn_step_t **step)
{
    attn_entry_t entry = {.seq = b->seq, .base = TOKENS, .n_q = ROWS};
    attn_batch_t batch = {
        .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32, .timeout_ms = 5000};

    return attn_step_begin(b->cache, &batch, step);
}

static attn_status_t
run(attn_step_t *step, float *o)
{
    static float q[ROWS * HEADS * DIM];

    q[5] = 1;
    return attn_step_run(step, 0, &(attn_tensor_t){.data = q, .dtype = ATTN_F32}, NULL, NULL,
                         &(attn_tensor_t){.data = o, .dtype = ATTN_F32}, NULL);
}

/* A step begins, whether or not it has a group, and answers. */
static void
answer(bed_t *b, float *o)
{
    attn_step_t *step;

    OK(begin(b, &step));
    OK(run(step, o));
    attn_step_abort(step);
}

static uint64_t
grouped(const bed_t *b)
{
    return atomic_load(&b->client->steps_grouped);
}

/* The keeper makes what a step wanted. */
static void
await_group(const bed_t *b)
{
    uint64_t end = attn_now_ns() + 5000 * ATTN_NS_PER_MS;

    while (groups_due(b->client->groups) || groups_count(b->client->groups) == 0) {
        assert_true(attn_now_ns() < end);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

/* ---- tests ---- */

static void
test_a_rank_that_refuses_is_done_without(void **state)
{
    static float before[ROWS * HEADS * DIM], after[ROWS * HEADS * DIM];
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_MERGING_AUTO);
    answer(&b, before); /* nobody waits for a group to be made */
    assert_int_equal(grouped(&b), 0);
    await_group(&b);
    refuses = true;
    answer(&b, after);
    assert_int_equal(grouped(&b), 1);
    assert_true(players[0].begun == 1 && players[1].begun == 1);
    assert_memory_equal(before, after, sizeof(before));
    /* It would refuse the next one as well. */
    answer(&b, after);
    assert_true(players[0].begun == 1 && players[0].opened == 1 && grouped(&b) == 1);
    bed_close(&b);
}

static void
test_who_insists_is_told(void **state)
{
    attn_step_t *step;
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_MERGING_GROUP);
    refuses = true;
    for (uint32_t i = 1; i <= 2; i++) { /* and asked again */
        assert_int_equal(begin(&b, &step), ATTN_ERR_TOO_LARGE);
        assert_non_null(strstr(attn_last_error(), "too much for it"));
        assert_true(players[0].begun == i && players[0].opened == i);
    }
    refuses = false;
    OK(begin(&b, &step));
    attn_step_abort(step);
    bed_close(&b);
}

/* Whatever a rank says, also before the other one was asked, that one does not wait for it. */
static void
test_nobody_waits_for_a_rank_that_failed(void **state)
{
    static const struct {
        attn_status_t status, told;
    } rows[] = {{ATTN_ERR_EXHAUSTED, ATTN_ERR_ABORTED},
                {ATTN_ERR_INVALID, ATTN_ERR_INVALID},
                {ATTN_ERR_CONFLICT, ATTN_ERR_CONFLICT},
                {ATTN_ERR_UNAVAILABLE, ATTN_ERR_UNAVAILABLE}};
    static float o[ROWS * HEADS * DIM];
    attn_step_t *step;
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_MERGING_GROUP);
    for (uint32_t i = 0; i < 2 * sizeof(rows) / sizeof(rows[0]); i++) {
        uint64_t start = attn_now_ns();
        fails          = (int)(i % 2);
        failure        = rows[i / 2].status;
        OK(begin(&b, &step));
        assert_int_equal(run(step, o), rows[i / 2].told);
        assert_non_null(strstr(attn_last_error(), "it would not"));
        assert_true(attn_now_ns() - start < 2000 * ATTN_NS_PER_MS);
        assert_int_equal(players[!fails].cancelled, i / 2 + 1);
        assert_int_equal(run(step, o), ATTN_ERR_ABORTED);
        attn_step_abort(step);
    }
    bed_close(&b);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_rank_that_refuses_is_done_without),
        cmocka_unit_test(test_who_insists_is_told),
        cmocka_unit_test(test_nobody_waits_for_a_rank_that_failed),
    };
    return cmocka_run_group_tests_name("client.step_group", tests, NULL, NULL);
}
