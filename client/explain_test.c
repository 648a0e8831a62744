/* What attn_explain() says of batches whose answer is known, over engines in this process. */
#include "client/attn.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define WORKERS 4
#define CHUNK 256u
#define OK(call) assert_int_equal(call, ATTN_OK)

typedef struct bed {
    attn_cache_t *cache;
} bed_t;

static attn_client_t *client; /* of all tests: engines measure themselves when they are made */

static int
open_client(void **state)
{
    (void)state;
    OK(attn_client_open("inproc://cpu?workers=4&threads=1&slab=4MiB", NULL, &client));
    return 0;
}

static int
close_client(void **state)
{
    (void)state;
    attn_client_close(client);
    return 0;
}

static void
bed_open_of(bed_t *b, attn_placement_t placement, uint64_t region_bytes)
{
    attn_geometry_t g;

    attn_geometry_init(&g);
    g.layers     = 1;
    g.q_heads    = 4;
    g.kv_heads   = 2;
    g.head_dim_k = g.head_dim_v = 32;
    g.kv_dtype                  = ATTN_F32;
    g.chunk_size                = CHUNK;
    g.placement                 = placement;
    g.region_bytes              = region_bytes;
    OK(attn_cache_open(client, "explained", &g, &b->cache));
}

static void
bed_open(bed_t *b, attn_placement_t placement)
{
    bed_open_of(b, placement, 0);
}

static void
bed_close(bed_t *b)
{
    attn_cache_close(b->cache);
}

static attn_seq_t
filled(bed_t *b, uint32_t tokens)
{
    float *kv          = calloc((size_t)tokens * 64, sizeof(*kv));
    attn_tensor_t rows = {.data = kv, .dtype = ATTN_F32};
    attn_seq_t seq;
    attn_step_t *step;

    OK(attn_seq_create(b->cache, NULL, &seq));
    attn_entry_t entry = {.seq = seq, .n_new = tokens};
    attn_batch_t batch = {.size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F32};
    OK(attn_step_begin(b->cache, &batch, &step));
    OK(attn_step_run(step, 0, NULL, &rows, &rows, NULL, NULL));
    OK(attn_step_commit(step, NULL));
    free(kv);
    return seq;
}

static attn_explanation_t
explained(bed_t *b, const attn_explain_t *asked)
{
    attn_explanation_t x;

    OK(attn_explain(b->cache, asked, &x));
    assert_true(x.workers == WORKERS && x.n_ways >= 1 && x.n_costs >= 4);
    assert_true(x.read_bandwidth > 0 && x.merge_bandwidth > 0 && x.flops > 0);
    for (uint32_t i = 0; i < x.n_costs; i++) {
        const attn_cost_t *c = &x.costs[i];
        double sum           = c->attend + fmax(c->read, c->compute) + c->hop + c->link + c->merge;
        assert_true(fabs(c->total - sum) <= 1e-9 * sum);
        assert_int_equal(c->available, c->total > 0);
        assert_true(c->available || c->reason[0] != '\0');
        assert_true(!c->taken || (c->available && c->way == 0 && c->reason[0] != '\0'));
    }
    return x;
}

/* The only one of this place over the first way. */
static attn_cost_t
cost_of(const attn_explanation_t *x, attn_merge_place_t place)
{
    const attn_cost_t *found = NULL;

    for (uint32_t i = 0; i < x->n_costs; i++) {
        if (x->costs[i].place == place && x->costs[i].way == 0) {
            assert_null(found);
            found = &x->costs[i];
        }
    }
    assert_non_null(found);
    return *found;
}

static void
assert_taken(const attn_explanation_t *x, attn_merge_place_t place, uint32_t workers,
             const char *words)
{
    attn_cost_t cost = cost_of(x, place);

    for (uint32_t i = 0; i < x->n_costs; i++) {
        assert_true(!x->costs[i].taken || x->costs[i].place == place);
    }
    assert_true(cost.taken);
    assert_int_equal(cost.workers, workers);
    if (strstr(cost.reason, words) == NULL) {
        fail_msg("no \"%s\" in \"%s\"", words, cost.reason);
    }
}

static void
test_one_chunk_is_on_one_worker(void **state)
{
    attn_explain_t asked = {.size = sizeof(asked), .tokens = CHUNK};
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_PLACE_SPREAD);
    attn_explanation_t x = explained(&b, &asked);
    assert_taken(&x, ATTN_MERGE_LOCAL, 1, "placement is spread");
    assert_true(cost_of(&x, ATTN_MERGE_LOCAL).cheapest);
    assert_string_equal(cost_of(&x, ATTN_MERGE_CLIENT).reason,
                        "it needs two workers, and two chunks");
    assert_string_equal(cost_of(&x, ATTN_MERGE_GROUP).reason, "groups are of workers of a cluster");
    assert_string_equal(cost_of(&x, ATTN_MERGE_COORDINATOR).reason, "there is no coordinator");
    bed_close(&b);
}

static void
test_placement_decides_what_is_not_placed_yet(void **state)
{
    attn_explain_t asked = {.size = sizeof(asked), .tokens = 3 * CHUNK, .n_q = 2};
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_PLACE_SPREAD);
    attn_explanation_t x = explained(&b, &asked);
    assert_taken(&x, ATTN_MERGE_CLIENT, 3, "placement is spread");
    assert_true(cost_of(&x, ATTN_MERGE_CLIENT).merge > 0);
    bed_close(&b);

    bed_open(&b, ATTN_PLACE_WHOLE);
    asked.sequences = 11;
    x               = explained(&b, &asked);
    assert_taken(&x, ATTN_MERGE_LOCAL, WORKERS, "placement is whole");
    assert_true(cost_of(&x, ATTN_MERGE_LOCAL).merge == 0);
    bed_close(&b);

    bed_open(&b, ATTN_PLACE_AUTO);
    asked = (attn_explain_t){.size = sizeof(asked), .tokens = 1 << 24};
    x     = explained(&b, &asked);
    assert_true(x.ways[0].break_even_tokens < 1 << 24);
    assert_taken(&x, ATTN_MERGE_CLIENT, WORKERS, "16777216 tokens are above the break-even of ");
    asked.tokens = x.ways[0].break_even_tokens;
    for (int above = 0; above < 2; above++, asked.tokens++) { /* the ways are measured anew */
        x = explained(&b, &asked);
        assert_int_equal(cost_of(&x, ATTN_MERGE_CLIENT).taken,
                         asked.tokens > x.ways[0].break_even_tokens);
    }
    bed_close(&b);
}

static void
test_a_sequence_is_as_it_lies(void **state)
{
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_PLACE_SPREAD);
    attn_explain_t asked = {.size = sizeof(asked), .seq = filled(&b, 2 * CHUNK + 1), .tokens = 9};
    attn_explanation_t x = explained(&b, &asked);
    assert_int_equal(x.tokens, 2 * CHUNK + 1);
    assert_taken(&x, ATTN_MERGE_CLIENT, 3, "the only way for chunks on 3 workers");
    assert_true(cost_of(&x, ATTN_MERGE_LOCAL).available); /* what it would be, whole */
    asked.seq = filled(&b, CHUNK);
    x         = explained(&b, &asked);
    assert_taken(&x, ATTN_MERGE_LOCAL, 1, "one worker has all of it");
    bed_close(&b);
}

/* Placement says one worker, and its region has room for two chunks of the three. */
static void
test_where_chunks_are_counts_not_where_they_should_be(void **state)
{
    bed_t b;

    (void)state;
    bed_open_of(&b, ATTN_PLACE_WHOLE, 2 * CHUNK * 2 * 64 * sizeof(float));
    attn_explain_t asked = {.size = sizeof(asked), .seq = filled(&b, 3 * CHUNK)};
    attn_explanation_t x = explained(&b, &asked);
    assert_taken(&x, ATTN_MERGE_CLIENT, 2, "the only way for chunks on 2 workers");
    bed_close(&b);
}

static void
test_what_cannot_be_explained(void **state)
{
    attn_explanation_t x;
    bed_t b;

    (void)state;
    bed_open(&b, ATTN_PLACE_AUTO);
    attn_explain_t asked = {.size = sizeof(asked)};
    assert_int_equal(attn_explain(b.cache, &asked, &x), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "1 query rows over 0 tokens"));
    asked = (attn_explain_t){.size = sizeof(asked), .tokens = 3, .n_q = 4};
    assert_int_equal(attn_explain(b.cache, &asked, &x), ATTN_ERR_INVALID);
    asked.size = 1;
    assert_int_equal(attn_explain(b.cache, &asked, &x), ATTN_ERR_INVALID);
    asked = (attn_explain_t){.size = sizeof(asked), .seq = filled(&b, 3)};
    OK(attn_seq_free(b.cache, asked.seq));
    assert_int_equal(attn_explain(b.cache, &asked, &x), ATTN_ERR_NOT_FOUND);
    bed_close(&b);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_chunk_is_on_one_worker),
        cmocka_unit_test(test_placement_decides_what_is_not_placed_yet),
        cmocka_unit_test(test_a_sequence_is_as_it_lies),
        cmocka_unit_test(test_where_chunks_are_counts_not_where_they_should_be),
        cmocka_unit_test(test_what_cannot_be_explained),
    };
    return cmocka_run_group_tests_name("client.explain", tests, open_client, close_client);
}
