/*
 * engine_partials_test.c: sequences cut over several engines, which answer with partials; merged
 * by the caller they are what one engine with all chunks answers with, bit for bit. The merge
 * here walks the tree down from its root, and shares no code with the engine's folds.
 */
#include "engine/test_engine.h"

#define WORKERS_MAX 4u
#define CHUNKS_ALL 8u

typedef struct cluster {
    uint32_t n;
    world_t one; /* has all chunks: what the others must agree with */
    world_t w[WORKERS_MAX];
    uint32_t mine[WORKERS_MAX]; /* mask of chunk numbers, of every sequence */
    sequence_t a, b;
} cluster_t;

static attn_geometry_t
geometry_of_rows(void)
{
    attn_geometry_t g = plain_geometry;

    g.layers      = 4;
    g.layer_table = test_rows;
    g.page_size   = 24;
    return g;
}

/* Chunk c belongs to worker owners[c]. */
static void
cluster_open(cluster_t *c, uint32_t n, const uint32_t *owners)
{
    attn_geometry_t g = geometry_of_rows();

    memset(c, 0, sizeof(*c));
    c->n = n;
    world_open(&c->one, &g, 2);
    for (uint32_t i = 0; i < n; i++) {
        world_open(&c->w[i], &g, 1 + i % 2);
    }
    for (uint32_t i = 0; i < CHUNKS_ALL; i++) {
        c->mine[owners[i]] |= 1u << i;
    }
    sequence_init(&c->one, &c->a);
    sequence_init(&c->one, &c->b);
}

static void
cluster_close(cluster_t *c)
{
    sequence_free(&c->a);
    sequence_free(&c->b);
    world_close(&c->one);
    for (uint32_t i = 0; i < c->n; i++) {
        world_close(&c->w[i]);
    }
}

/* ---- states ---- */

/* Partials of one entry from all workers: node i of rows x heads states. */
typedef struct states {
    uint32_t n;
    attn_node_t node[WORKERS_MAX * CHUNKS_MAX];
    const float *a[WORKERS_MAX * CHUNKS_MAX], *l[WORKERS_MAX * CHUNKS_MAX];
    const int32_t *e[WORKERS_MAX * CHUNKS_MAX];
} states_t;

static bool
is_below(attn_node_t node, attn_node_t top)
{
    return node.level <= top.level && (uint64_t)node.index >> (top.level - node.level) == top.index;
}

/* The state of row r at a node, merged from what lies below it. False: nothing does. */
static bool
state_at(const states_t *s, attn_node_t top, uint64_t r, uint32_t d, float *a, float *l, int32_t *e)
{
    float right_a[256], right_l;
    int32_t right_e;
    bool any = false;

    for (uint32_t i = 0; i < s->n; i++) {
        if (s->node[i].level == top.level && s->node[i].index == top.index) {
            memcpy(a, s->a[i] + r * d, d * sizeof(float));
            *l = s->l[i][r];
            *e = s->e[i][r];
            return true;
        }
        any = any || is_below(s->node[i], top);
    }
    if (!any) {
        return false;
    }
    bool left  = state_at(s, (attn_node_t){top.level - 1, 2 * top.index}, r, d, a, l, e);
    bool right = state_at(s, (attn_node_t){top.level - 1, 2 * top.index + 1}, r, d, right_a,
                          &right_l, &right_e);
    if (left && right) {
        attn_state_merge_row(a, l, e, right_a, right_l, right_e, d);
    } else if (right) {
        memcpy(a, right_a, d * sizeof(float));
        *l = right_l;
        *e = right_e;
    }
    return true;
}

/* ---- one step on all engines ---- */

typedef struct step {
    cluster_t *c;
    ask_t asks[2];
    uint32_t n;
    built_t one, parts[WORKERS_MAX];
} step_t;

static void
step_begin(step_t *s, cluster_t *c, const ask_t *asks, uint32_t n)
{
    s->c = c;
    s->n = n;
    memcpy(s->asks, asks, n * sizeof(*asks));
    dream(&c->one, s->asks, n);
    build(&s->one, &c->one, s->asks, n, ALL_CHUNKS);
    begin(&s->one);
    for (uint32_t i = 0; i < c->n; i++) {
        build(&s->parts[i], &c->w[i], s->asks, n, c->mine[i]);
        begin(&s->parts[i]);
    }
}

/* The rows of q that go to a worker. */
static float *
q_of(const step_t *s, const built_t *b, const float *q)
{
    uint64_t row = (uint64_t)b->w->g.q_heads * b->w->g.head_dim_k;
    float *all = malloc(b->sizes.q + 4), *at = all;

    for (uint32_t i = 0; i < s->n; i++) {
        uint64_t size = s->asks[i].n_q * row;
        if (b->entries[i].n_q > 0) {
            memcpy(at, q, size * sizeof(float));
            at += size;
        }
        q += size;
    }
    return all;
}

/* Note the states of entry i in a worker's answer, and the o and lse of it if it has them. */
static void
take_answer(const built_t *b, const uint8_t *answer, uint32_t entry, states_t *states,
            const float **o_p, const float **lse_p)
{
    const attn_geometry_t *g = &b->w->g;
    const float *o = (const float *)(const void *)answer, *lse = o + b->sizes.o / 4;
    const int32_t *e = (const int32_t *)(const void *)(lse + b->sizes.lse / 4);
    const float *l = (const float *)(const void *)(e + b->sizes.states), *a = l + b->sizes.states;

    for (uint32_t i = 0; i <= entry; i++) {
        uint64_t rows = (uint64_t)b->entries[i].n_q * g->q_heads;
        if (i == entry && b->entries[i].n_nodes == 0 && rows > 0) {
            *o_p   = o;
            *lse_p = lse;
        }
        for (uint32_t k = 0; k < b->entries[i].n_nodes;
             k++, a += rows * g->head_dim_v, l += rows, e += rows) {
            if (i == entry) {
                states->node[states->n] = b->nodes[i][k];
                states->a[states->n]    = a;
                states->l[states->n]    = l;
                states->e[states->n++]  = e;
            }
        }
        if (b->entries[i].n_nodes == 0) {
            o += rows * g->head_dim_v;
            lse += rows;
        }
    }
}

static void
check_entry(const step_t *s, uint32_t layer, uint32_t entry, uint8_t *const *answers,
            const float *want_o, const float *want_lse)
{
    const attn_geometry_t *g = &s->c->one.g;
    const attn_layer_t *row  = &s->c->one.engine->caches->geometry.layer_table[layer];
    uint32_t d               = g->head_dim_v;
    states_t states          = {0};
    const float *o = NULL, *lse = NULL;

    for (uint32_t i = 0; i < s->c->n; i++) {
        take_answer(&s->parts[i], answers[i], entry, &states, &o, &lse);
    }
    for (uint64_t r = 0; r < (uint64_t)s->asks[entry].n_q * g->q_heads; r++) {
        float a[256] = {0}, l = 0, got[256], got_lse;
        int32_t e = INT32_MIN;
        if (o != NULL) { /* one worker has it all */
            assert_int_equal(states.n, 0);
            memcpy(got, o + r * d, d * sizeof(float));
            got_lse = lse[r];
        } else {
            assert_true(state_at(&states, (attn_node_t){32, 0}, r, d, a, &l, &e));
            attn_state_finish_row(
                a, l, e, d, row->sinks != NULL ? &row->sinks[r % g->q_heads] : NULL, got, &got_lse);
        }
        assert_memory_equal(got, want_o + r * d, d * sizeof(float));
        assert_memory_equal(&got_lse, &want_lse[r], sizeof(float));
    }
}

/* One layer everywhere; what the workers answer, merged, is what the one answers. */
static void
step_run(const step_t *s, uint32_t layer)
{
    float *q        = random_tensor(ATTN_F32, s->one.sizes.q / 4);
    uint8_t *answer = answer_room(&s->one), *answers[WORKERS_MAX];

    OK(run_layer(&s->one, layer, q, answer));
    const float *o = (const float *)(void *)answer, *lse = o + s->one.sizes.o / 4;
    judge(&s->c->one, s->asks, s->n, layer, q, ATTN_F32, o, ATTN_F32, lse);
    for (uint32_t i = 0; i < s->c->n; i++) {
        float *mine = q_of(s, &s->parts[i], q);
        answers[i]  = answer_room(&s->parts[i]);
        OK(run_layer(&s->parts[i], layer, mine, answers[i]));
        free(mine);
    }
    for (uint32_t i = 0; i < s->n; i++) {
        check_entry(s, layer, i, answers, o, lse);
        o += (uint64_t)s->asks[i].n_q * s->c->one.g.q_heads * s->c->one.g.head_dim_v;
        lse += (uint64_t)s->asks[i].n_q * s->c->one.g.q_heads;
    }
    for (uint32_t i = 0; i < s->c->n; i++) {
        free(answers[i]);
    }
    free(answer);
    free(q);
}

static void
step_commit(const step_t *s, const uint32_t *accepted)
{
    for (uint32_t i = 0; i < s->c->n; i++) {
        OK(engine_step_commit(s->c->w[i].engine, s->parts[i].batch.step_id, accepted,
                              accepted ? s->n : 0));
        OK(engine_check(s->c->w[i].engine));
    }
    commit(&s->one, accepted);
}

static void
whole_step(cluster_t *c, const ask_t *asks, uint32_t n, const uint32_t *accepted)
{
    step_t s;

    step_begin(&s, c, asks, n);
    for (uint32_t l = 0; l < c->one.g.layers; l++) {
        step_run(&s, l);
    }
    step_commit(&s, accepted);
}

/* ---- tests ---- */

/* Prefill and decode over chunks of several owners, some tokens of a commit left over. */
static void
try_owners(uint32_t n, const uint32_t *owners)
{
    static const uint32_t pages[] = {1, 10, 12, 21, 30, 44}, indptr[] = {0, 6};
    cluster_t c;
    uint32_t accepted[] = {290, 1};

    cluster_open(&c, n, owners);
    ask_t prefill = {.seq = &c.a, .n_q = 20, .n_new = 700};
    whole_step(&c, &prefill, 1, NULL);
    ask_t mixed[] = {{.seq = &c.a, .base = 700, .n_q = 3, .n_new = 330}, /* over chunks 2 to 4 */
                     {.seq = &c.b, .n_q = 1, .n_new = 1}};
    whole_step(&c, mixed, 2, accepted);
    assert_int_equal(c.a.length, 990);
    ask_t decode[] = {{.seq = &c.a, .base = 990, .n_q = 40, .n_new = 40}, /* from here to chunk 4 */
                      {.seq = &c.b, .base = 1, .n_q = 2, .n_new = 3}};
    whole_step(&c, decode, 2, NULL);
    ask_t sparse = {.seq     = &c.a,
                    .base    = 1030,
                    .n_q     = 2,
                    .n_new   = 1,
                    .n_lists = 1,
                    .indptr  = indptr,
                    .pages   = pages};
    whole_step(&c, &sparse, 1, NULL);
    ask_t inside = {.seq = &c.a, .base = 600, .n_q = 4};
    whole_step(&c, &inside, 1, NULL);
    cluster_close(&c);
}

static void
test_merged_partials_are_the_answer_of_one_engine(void **state)
{
    static const uint32_t striped2[] = {0, 1, 0, 1, 0, 1, 0, 1},
                          striped4[] = {0, 1, 2, 3, 0, 1, 2, 3};
    static const uint32_t halves[] = {0, 0, 0, 1, 1, 1, 1, 1}, any[] = {2, 2, 0, 1, 0, 2, 1, 0};

    (void)state;
    try_owners(2, striped2);
    try_owners(4, striped4);
    try_owners(2, halves);
    try_owners(3, any);
}

static void
test_random_owners(void **state)
{
    uint32_t owners[CHUNKS_ALL];

    (void)state;
    for (int round = 0; round < 4; round++) {
        uint32_t n = 2 + pick(3);
        for (uint32_t c = 0; c < CHUNKS_ALL; c++) {
            owners[c] = pick(n);
        }
        try_owners(n, owners);
    }
}

static void
test_steps_that_end_early_leave_each_worker_as_it_was(void **state)
{
    static const uint32_t owners[] = {0, 1, 0, 1, 0, 1, 0, 1};
    cluster_t c;
    step_t s;
    figures_t before[2];

    (void)state;
    cluster_open(&c, 2, owners);
    ask_t prefill = {.seq = &c.a, .n_q = 1, .n_new = 500};
    whole_step(&c, &prefill, 1, NULL);
    for (uint32_t i = 0; i < 2; i++) {
        before[i] = figures_of(&c.w[i], &c.a, NULL);
    }
    ask_t grow = {.seq = &c.a, .base = 500, .n_q = 1, .n_new = 600};
    step_begin(&s, &c, &grow, 1);
    step_run(&s, 0);
    for (uint32_t i = 0; i < 2; i++) {
        FAILS(engine_step_commit(c.w[i].engine, s.parts[i].batch.step_id, NULL, 0),
              ATTN_ERR_INCOMPLETE, "layer 1");
        OK(engine_step_abort(c.w[i].engine, s.parts[i].batch.step_id, "the other one is gone"));
        figures_t after = figures_of(&c.w[i], &c.a, NULL);
        assert_memory_equal(&after, &before[i], sizeof(after));
        OK(engine_check(c.w[i].engine));
    }
    OK(engine_step_abort(c.one.engine, s.one.batch.step_id, "neither here"));

    /* Of tokens that others store, a worker needs no layer to commit. */
    uint32_t few = 12; /* all in chunk 1 */
    step_begin(&s, &c, &grow, 1);
    OK(engine_step_commit(c.w[0].engine, s.parts[0].batch.step_id, &few, 1));
    FAILS(engine_step_commit(c.w[1].engine, s.parts[1].batch.step_id, &few, 1), ATTN_ERR_INCOMPLETE,
          "500-511");
    cluster_close(&c);
}

/* A worker is lost, and its chunks are made again elsewhere: the bits of answers come back. */
static void
test_holes_are_refilled(void **state)
{
    static const uint32_t owners[] = {0, 1, 0, 1, 0, 1, 0, 1};
    cluster_t c;
    attn_geometry_t g = geometry_of_rows();

    (void)state;
    cluster_open(&c, 2, owners);
    ask_t prefill = {.seq = &c.a, .n_q = 1, .n_new = 900};
    whole_step(&c, &prefill, 1, NULL);
    world_close(&c.w[1]);
    world_open(&c.w[1], &g, 1);

    for (uint32_t hole = 1; hole < 4; hole += 2) { /* chunks 1 and 3 */
        ask_t refill = {.seq = &c.a, .base = hole * 256, .n_new = hole == 1 ? 256 : 132};
        built_t b;
        build(&b, &c.w[1], &refill, 1, 1u << hole);
        b.chunks[0][0] =
            (kv_step_chunk_t){.chunk = c.a.chunk[hole], .n_new = refill.n_new, .number = hole};
        begin(&b);
        for (uint32_t l = 0; l < g.layers; l++) {
            uint64_t at = refill.base;
            OK(engine_step_run(c.w[1].engine, b.batch.step_id, l, NULL, c.a.k[l] + at * k_row(&g),
                               c.a.v[l] + at * v_row(&g), NULL, NULL));
        }
        OK(engine_step_commit(c.w[1].engine, b.batch.step_id, NULL, 0));
    }
    ask_t after = {.seq = &c.a, .base = 900, .n_q = 4, .n_new = 4};
    whole_step(&c, &after, 1, NULL);
    cluster_close(&c);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merged_partials_are_the_answer_of_one_engine),
        cmocka_unit_test(test_random_owners),
        cmocka_unit_test(test_steps_that_end_early_leave_each_worker_as_it_was),
        cmocka_unit_test(test_holes_are_refilled),
    };
    return cmocka_run_group_tests_name("engine_partials", tests, NULL, NULL);
}
