#include "balancer/cost.h"

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>

/* 3,072 bytes of KV a token; q of a row is 8,192 bytes, o 4,096, a partial 32 * 66 floats. */
static const attn_geometry_t geometry = {
    .size       = sizeof(attn_geometry_t),
    .layers     = 32,
    .q_heads    = 32,
    .kv_heads   = 8,
    .head_dim_k = 128,
    .head_dim_v = 64,
    .kv_dtype   = ATTN_BF16,
    .page_size  = 16,
    .chunk_size = 2048,
};

#define Q 8192.0
#define O 4096.0
#define KV 3072.0
#define PARTIAL (32 * 66 * 4.0)

/* Round numbers: what they make can be told by hand. */
static const cost_constants_t plain = {
    .worker          = {.read_bandwidth = 1e9,
                        .attend_seconds = 1e-5,
                        .few_flops      = {0, 0, 0, 1e10},
                        .many_flops     = {0, 0, 0, 1e11}},
    .link            = {.hop_seconds = 1e-3, .send_seconds = 1e-4, .bandwidth = 1e8},
    .merge_bandwidth = 1e9,
};

static const cost_exchange_t wide = {.seconds = 2e-5, .peer_seconds = 1e-6, .bandwidth = 1e10};

static const cost_link_t front = {.hop_seconds = 2e-3, .send_seconds = 5e-4, .bandwidth = 1e7};

static void
assert_near(double got, double wanted)
{
    if (!(fabs(got - wanted) <= 1e-12 * fabs(wanted))) {
        fail_msg("%.15g is not %.15g", got, wanted);
    }
}

static cost_batch_t
batch_of(uint64_t tokens, uint32_t rows, uint32_t sequences)
{
    return (cost_batch_t){
        .geometry = &geometry, .tokens = tokens, .rows = rows, .sequences = sequences};
}

static cost_part_t
part_of(uint64_t tokens, uint32_t nodes, uint32_t count)
{
    return (cost_part_t){.worker    = plain.worker,
                         .link      = plain.link,
                         .tokens    = tokens,
                         .sequences = 1,
                         .nodes     = nodes,
                         .count     = count};
}

static void
test_token_bytes_are_those_of_one_layer(void **state)
{
    attn_geometry_t f32 = geometry;
    (void)state;
    assert_int_equal(cost_kv_token_bytes(&geometry), 8 * (128 + 64) * 2);
    f32.kv_dtype = ATTN_F32;
    assert_int_equal(cost_kv_token_bytes(&f32), 8 * (128 + 64) * 4);
}

/* ---- a worker ---- */

static void
test_a_decode_row_is_bound_by_reading(void **state)
{
    cost_batch_t batch = batch_of(1000000, 1, 1);
    cost_part_t part   = part_of(1000000, 0, 1);
    (void)state;
    cost_seconds_t s = cost_attend(&batch, &part);
    assert_near(s.read, 3.072);
    assert_near(s.compute, 2.0 * 32 * 192 * 1e6 / 1e10); /* 1.2288 s, while KV is read */
    assert_near(s.total, 3.072 + 1e-5);
}

static void
test_many_rows_are_bound_by_what_is_computed(void **state)
{
    cost_batch_t batch = batch_of(1000000, 2001, 1);
    cost_part_t part   = part_of(1000000, 0, 1);
    (void)state;
    cost_seconds_t s = cost_attend(&batch, &part);
    assert_near(s.read, 3.072);
    /* A row sees 1,000 tokens less than all, on average. */
    assert_near(s.compute, 2.0 * 2001 * 32 * 192 * 999000 / 1e11);
    assert_near(s.total, s.compute + 1e-5);
}

/* 4 heads a group: 16 rows are 64 packed ones, the last of the few. */
static void
test_few_rows_end_at_64_packed_ones(void **state)
{
    cost_batch_t batch = batch_of(1u << 30, 16, 1);
    cost_part_t part   = part_of(1u << 30, 0, 1);
    (void)state;
    double few  = cost_attend(&batch, &part).compute;
    batch.rows  = 17;
    double many = cost_attend(&batch, &part).compute;
    assert_true(fabs(few / 16 / (many / 17) - 10) < 1e-6);
}

static void
test_a_rate_that_is_not_known_costs_nothing(void **state)
{
    cost_batch_t batch = batch_of(1000, 1, 1);
    cost_part_t part   = part_of(1000, 0, 1);
    (void)state;
    part.worker.few_flops[ATTN_BF16] = 0;
    cost_seconds_t s                 = cost_attend(&batch, &part);
    assert_true(s.compute == 0 && s.read > 0);
    assert_near(s.total, s.attend + s.read);
}

static void
test_the_slowest_of_each(void **state)
{
    cost_worker_t a    = {.read_bandwidth = 3, .attend_seconds = 1, .few_flops = {0, 5, 0, 0}};
    cost_worker_t b    = {.read_bandwidth = 2, .attend_seconds = 2, .few_flops = {0, 6, 7, 0}};
    cost_worker_t none = {0};
    (void)state;
    cost_worker_slowest(&a, &b);
    cost_worker_slowest(&a, &none);
    assert_true(a.read_bandwidth == 2 && a.attend_seconds == 2);
    assert_true(a.few_flops[1] == 5 && a.few_flops[2] == 7 && a.few_flops[3] == 0);
}

/* ---- a layer ---- */

static void
test_one_worker_answers_with_o(void **state)
{
    cost_batch_t batch = batch_of(1000, 1, 1);
    cost_part_t part   = part_of(1000, 0, 1);
    (void)state;
    batch.new_rows   = 1;
    cost_seconds_t s = cost_layer(&batch, &part, 1, 1e9, NULL);
    assert_near(s.hop, 1e-3);
    assert_near(s.link, (Q + O + KV) / 1e8);
    assert_true(s.merge == 0);
    assert_near(s.total, 1e-5 + 1000 * KV / 1e9 + 1e-3 + (Q + O + KV) / 1e8);
}

static void
test_three_workers_answer_with_partials(void **state)
{
    cost_batch_t batch   = batch_of(5000, 1, 1);
    cost_part_t parts[2] = {part_of(2000, 1, 2), part_of(1000, 2, 1)};
    (void)state;
    batch.new_rows   = 1;
    cost_seconds_t s = cost_layer(&batch, parts, 2, 1e9, NULL);
    assert_near(s.read, 2000 * KV / 1e9);    /* of the one that has most */
    assert_near(s.hop, 1e-3 + 2 * 2 * 1e-4); /* two more are sent to and heard of */
    assert_near(s.link, (3 * Q + 4 * PARTIAL + KV) / 1e8);
    assert_near(s.merge, 4 * PARTIAL / 1e9);
    assert_near(s.total, s.attend + s.read + s.hop + s.link + s.merge);
}

/* Each of three answers with a third of O, and the exchange waits for the one that sends most. */
static void
test_three_workers_merge_among_themselves(void **state)
{
    cost_batch_t batch   = batch_of(5000, 1, 1);
    cost_part_t parts[2] = {part_of(2000, 1, 2), part_of(1000, 2, 1)};
    (void)state;
    batch.new_rows   = 1;
    cost_seconds_t s = cost_layer_group(&batch, parts, 2, &wide);
    cost_seconds_t c = cost_layer(&batch, parts, 2, 1e9, NULL);
    assert_true(s.read == c.read && s.attend == c.attend && s.hop == c.hop);
    assert_near(s.link, (3 * Q + O + KV) / 1e8);
    assert_near(s.merge, 2e-5 + 2 * 1e-6 + 2 * PARTIAL * 2 / 3 / 1e10);
    assert_near(s.total, s.attend + s.read + s.hop + s.link + s.merge);
}

static void
test_a_slow_worker_or_link_is_what_is_waited_for(void **state)
{
    cost_batch_t batch   = batch_of(4000, 1, 1);
    cost_part_t parts[2] = {part_of(2000, 1, 1), part_of(2000, 1, 1)};
    (void)state;
    parts[1].worker.read_bandwidth = 1e8;
    parts[0].link.hop_seconds      = 5e-3;
    cost_seconds_t s               = cost_layer(&batch, parts, 2, 1e9, NULL);
    assert_near(s.read, 2000 * KV / 1e8);
    assert_near(s.hop, 5e-3 + 2 * 1e-4);
}

static void
test_a_thin_client_pays_its_way_to_the_coordinator(void **state)
{
    cost_batch_t batch = batch_of(4096, 1, 3);
    cost_part_t part   = part_of(2048, 1, 2);
    (void)state;
    part.sequences   = 3;
    cost_seconds_t s = cost_layer(&batch, &part, 1, 1e9, NULL);
    cost_seconds_t t = cost_layer(&batch, &part, 1, 1e9, &front);
    assert_near(t.hop, s.hop + 2e-3);
    assert_near(t.link, s.link + 3 * (Q + O) / 1e7);
    assert_near(t.total, s.total + 2e-3 + 3 * (Q + O) / 1e7);
}

/* ---- layouts ---- */

static void
test_whole_sequences_are_dealt_out(void **state)
{
    cost_batch_t batch = batch_of(5000, 1, 11);
    cost_layout_t layout;
    (void)state;
    cost_layout_whole(&plain, &batch, 4, &layout);
    assert_int_equal(layout.workers, 4);
    assert_int_equal(layout.n_parts, 2);
    assert_true(layout.parts[0].sequences == 3 && layout.parts[0].count == 3);
    assert_true(layout.parts[1].sequences == 2 && layout.parts[1].count == 1);
    assert_true(layout.parts[0].nodes == 0 && layout.parts[0].tokens == 5000);
    batch.sequences = 2;
    cost_layout_whole(&plain, &batch, 4, &layout);
    assert_true(layout.workers == 2 && layout.n_parts == 1 && layout.parts[0].count == 2);
    assert_int_equal(layout.parts[0].sequences, 1);
}

static void
test_spread_is_as_chunks_are_placed(void **state)
{
    static const struct {
        uint64_t tokens;
        uint32_t workers, n, most, nodes;
    } rows[] = {
        {0, 4, 1, 0, 0},           {2048, 4, 1, 2048, 0},
        {2049, 4, 2, 2048, 1},     {5 * 2048, 4, 4, 4096, 1},
        {3 * 2048, 3, 2, 4096, 2}, /* lanes 0 and 2 are in the first third of the tree's order */
        {4 * 2048, 3, 3, 4096, 2}, {64 * 2048, 3, 3, 22 * 2048, 3},
        {6 * 2048, 6, 4, 4096, 2}, {12 * 2048, 12, 8, 4096, 2},
        {7 * 2048, 8, 7, 2048, 1}, {1000 * 2048, 1000, 64, 16 * 2048, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cost_batch_t batch = batch_of(rows[i].tokens, 1, 1);
        cost_layout_t layout;
        cost_layout_spread(&plain, &batch, rows[i].workers, &layout);
        assert_int_equal(layout.n_parts, 1);
        assert_int_equal(layout.workers, rows[i].n);
        assert_int_equal(layout.parts[0].count, rows[i].n);
        assert_int_equal(layout.parts[0].tokens, rows[i].most);
        assert_int_equal(layout.parts[0].nodes, rows[i].nodes);
    }
}

/* ---- the choice ---- */

static uint64_t random_state = 7;

static double
random_in(double low, double high) /* as many in each power of ten */
{
    random_state = random_state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return low * pow(high / low, (double)(random_state >> 11) / 9007199254740992.0);
}

static cost_constants_t
random_constants(void)
{
    cost_constants_t c = {
        .worker = {.read_bandwidth = random_in(1e8, 1e13), .attend_seconds = random_in(1e-7, 1e-3)},
        .link   = {.hop_seconds  = random_in(1e-7, 1e-2),
                   .send_seconds = random_in(1e-8, 1e-3),
                   .bandwidth    = random_in(1e7, 1e12)},
        .merge_bandwidth = random_in(1e8, 1e11),
    };
    c.worker.few_flops[ATTN_BF16]  = random_in(1e9, 1e15);
    c.worker.many_flops[ATTN_BF16] = random_in(1e9, 1e15);
    return c;
}

static void
test_the_choice_is_the_cheapest(void **state)
{
    uint32_t locals = 0, clients = 0, groups = 0;
    (void)state;
    for (int i = 0; i < 20000; i++) {
        cost_constants_t constants = random_constants();
        cost_batch_t batch = batch_of((uint64_t)random_in(1, 1e9), (uint32_t)random_in(1, 1e4),
                                      (uint32_t)random_in(1, 300));
        uint32_t workers   = (uint32_t)random_in(1, 200);
        cost_exchange_t exchange = {.seconds      = random_in(1e-6, 1e-2),
                                    .peer_seconds = random_in(1e-7, 1e-4),
                                    .bandwidth    = random_in(1e8, 1e12)};
        cost_choice_t choice;
        bool spread = workers > 1 && batch.tokens > 2048, may = i % 2 != 0;
        cost_choose(&constants, &front, may ? &exchange : NULL, &batch, workers, &choice);
        assert_true(choice.best < COST_PLACES && choice.available[choice.best]);
        assert_true(choice.available[COST_LOCAL]);
        assert_int_equal(choice.available[COST_CLIENT], spread);
        assert_int_equal(choice.available[COST_GROUP], spread && may);
        for (cost_place_t p = COST_LOCAL; p < COST_PLACES; p++) {
            const cost_seconds_t *s = &choice.seconds[p];
            if (choice.available[p]) {
                assert_true(s->total >= choice.seconds[choice.best].total);
                assert_near(s->total,
                            s->attend + fmax(s->read, s->compute) + s->hop + s->link + s->merge);
            }
        }
        assert_true(choice.available[COST_COORDINATOR] && choice.best != COST_COORDINATOR);
        /* Who is asked by thin clients merges by itself, whatever workers could. */
        cost_place_t theirs =
            spread && choice.seconds[COST_CLIENT].total < choice.seconds[COST_LOCAL].total
                ? COST_CLIENT
                : COST_LOCAL;
        assert_int_equal(choice.workers[COST_COORDINATOR], choice.workers[theirs]);
        assert_near(choice.seconds[COST_COORDINATOR].hop,
                    choice.seconds[theirs].hop + front.hop_seconds);
        locals += choice.best == COST_LOCAL;
        clients += choice.best == COST_CLIENT;
        groups += choice.best == COST_GROUP;
    }
    assert_true(locals > 1000 && clients > 1000 && groups > 1000); /* all sorts were there */
}

static void
test_without_workers_nothing_is_available(void **state)
{
    cost_batch_t batch = batch_of(1 << 20, 1, 1);
    cost_choice_t choice;
    (void)state;
    cost_choose(&plain, &front, NULL, &batch, 0, &choice);
    assert_int_equal(choice.best, COST_PLACES);
    for (cost_place_t p = COST_LOCAL; p < COST_PLACES; p++) {
        assert_false(choice.available[p]);
    }
    cost_choose(&plain, NULL, NULL, &batch, 1, &choice);
    assert_int_equal(choice.best, COST_LOCAL);
    assert_false(choice.available[COST_CLIENT] || choice.available[COST_COORDINATOR]);
}

static double
total_of(const cost_constants_t *constants, const cost_batch_t *batch, uint32_t workers,
         cost_place_t place)
{
    cost_choice_t choice;

    cost_choose(constants, &front, NULL, batch, workers, &choice);
    assert_true(choice.available[place]);
    return choice.seconds[place].total;
}

/* More to do never takes less, and slower parts make it dearer. */
static void
test_cost_is_monotone(void **state)
{
    (void)state;
    for (uint32_t workers = 2; workers <= 65; workers++) {
        for (int spread = 0; spread < 2; spread++) {
            cost_place_t place = spread ? COST_CLIENT : COST_LOCAL;
            double before      = -1;
            for (uint64_t tokens = 4096; tokens <= UINT64_C(1) << 40; tokens *= 2) {
                cost_batch_t batch = batch_of(tokens, 1, 1);
                double seconds     = total_of(&plain, &batch, workers, place);
                batch.rows         = 2;
                assert_true(seconds >= before &&
                            total_of(&plain, &batch, workers, place) > seconds);
                before = seconds;
            }
        }
    }
    cost_batch_t batch = batch_of(1 << 20, 1, 1);
    double usual       = total_of(&plain, &batch, 8, COST_CLIENT);
    for (int what = 0; what < 6; what++) {
        cost_constants_t slow = plain;
        double *parts[]       = {&slow.worker.read_bandwidth, &slow.link.bandwidth,
                                 &slow.merge_bandwidth,       &slow.worker.attend_seconds,
                                 &slow.link.hop_seconds,      &slow.link.send_seconds};
        *parts[what] *= what < 3 ? 0.5 : 2;
        assert_true(total_of(&slow, &batch, 8, COST_CLIENT) > usual);
    }
}

static void
test_huge_numbers_stay_numbers(void **state)
{
    attn_geometry_t huge  = {.q_heads    = 1024,
                             .kv_heads   = 1024,
                             .head_dim_k = 256,
                             .head_dim_v = 256,
                             .kv_dtype   = ATTN_F32,
                             .chunk_size = 1 << 20};
    cost_batch_t batch    = {.geometry  = &huge,
                             .tokens    = UINT64_MAX,
                             .rows      = UINT32_MAX,
                             .new_rows  = UINT32_MAX,
                             .sequences = UINT32_MAX};
    cost_constants_t slow = {.worker          = {.read_bandwidth = 1e-300},
                             .link            = {.hop_seconds = 1e300, .bandwidth = 1e-300},
                             .merge_bandwidth = 1e-300};
    cost_choice_t choice;
    (void)state;
    for (int i = 0; i < 2; i++) {
        cost_choose(i == 0 ? &plain : &slow, &front, &wide, &batch, UINT32_MAX, &choice);
        assert_int_equal(choice.workers[COST_CLIENT], 64);
        for (cost_place_t p = COST_LOCAL; p < COST_PLACES; p++) {
            assert_true(!choice.available[p] || choice.seconds[p].total > 0);
        }
    }
    assert_true(cost_break_even_tokens(&slow, &huge, UINT32_MAX) == UINT64_MAX);
}

/* ---- the break-even ---- */

static bool
spread_pays(const cost_constants_t *constants, uint64_t chunks, uint32_t workers)
{
    cost_batch_t batch = batch_of(chunks * geometry.chunk_size, 1, 1);
    cost_choice_t choice;

    cost_choose(constants, &front, NULL, &batch, workers, &choice);
    return choice.best == COST_CLIENT;
}

static void
test_break_even_is_where_the_costs_cross(void **state)
{
    static const uint32_t counts[] = {2, 3, 8, 9, 16, 63, 64, 65, 1000};
    uint32_t found                 = 0;
    (void)state;
    for (int i = 0; i < 300; i++) {
        cost_constants_t constants = random_constants();
        for (int w = 0; w < 9; w++) {
            uint64_t tokens = cost_break_even_tokens(&constants, &geometry, counts[w]);
            if (tokens == UINT64_MAX) {
                continue;
            }
            uint64_t chunks = tokens / geometry.chunk_size;
            found++;
            assert_int_equal(tokens % geometry.chunk_size, 0);
            assert_true(chunks >= 1 && !spread_pays(&constants, chunks, counts[w]));
            for (uint64_t c = chunks + 1; c <= chunks + 200; c++) {
                assert_true(spread_pays(&constants, c, counts[w]));
            }
        }
    }
    assert_true(found > 1000);
}

/* Reading a chunk takes 6.3 ms; on two workers spreading adds a hop's sends, 0.2 ms, and what a
 * second q and two partials in place of o take, 0.21 ms: two chunks are faster apart. Where a hop
 * takes its sender 4 ms it takes three chunks: 2 to read are 6.3 ms saved, and 3 are not more, but
 * 4 save 12.6. */
static void
test_break_even_by_hand(void **state)
{
    cost_constants_t constants = plain;
    (void)state;
    assert_int_equal(cost_break_even_tokens(&constants, &geometry, 2), 2048);
    constants.link.send_seconds = 4e-3;
    assert_int_equal(cost_break_even_tokens(&constants, &geometry, 2), 3 * 2048);
}

/* With many workers it is not all of them that a sequence goes to. */
static void
test_more_workers_than_lanes_change_nothing(void **state)
{
    cost_constants_t constants;
    (void)state;
    cost_constants_init(&constants);
    assert_int_equal(cost_break_even_tokens(&constants, &geometry, 1000),
                     cost_break_even_tokens(&constants, &geometry, 64));
}

static void
test_one_worker_never_spreads(void **state)
{
    cost_constants_t constants;
    (void)state;
    cost_constants_init(&constants);
    assert_true(cost_break_even_tokens(&constants, &geometry, 0) == UINT64_MAX);
    assert_true(cost_break_even_tokens(&constants, &geometry, 1) == UINT64_MAX);
    constants.link.bandwidth = 1e-30;
    assert_true(cost_break_even_tokens(&constants, &geometry, 8) == UINT64_MAX);
}

static void
test_who_merges(void **state)
{
    const cost_link_t link         = {.hop_seconds = 1, .bandwidth = 1000};
    const cost_exchange_t exchange = {.seconds = 0.2, .peer_seconds = 0.1, .bandwidth = 100};
    /* 10 rows of 4 columns, 24 bytes a state, on 4 workers. */
    const cost_merge_t merge = {
        .workers = 4, .rows = 10, .states = 40, .head_dim_v = 4, .o_size = 2};

    (void)state;
    assert_near(cost_merge_client(&link, 480, &merge), 960 / 1000.0 + 960 / 480.0);
    /* Three quarters of the states go to another worker, each sending a quarter of those. */
    assert_near(cost_merge_group(&link, &exchange, &merge),
                0.5 + 960 * 0.75 / 4 / 100 + 10 * 4 * 2 / 1000.0);

    cost_constants_t constants = {.link = link, .merge_bandwidth = 480};
    cost_exchange_t slow       = exchange;
    assert_int_equal(cost_merge_place(&constants, &exchange, &merge), COST_GROUP); /* 2.38, 2.96 */
    slow.seconds += 0.59;
    assert_int_equal(cost_merge_place(&constants, &slow, &merge), COST_CLIENT);
}

/* What is measured by a group prices a layer of that size as it was measured. */
static void
test_what_a_proof_tells(void **state)
{
    cost_proof_t proof = {.ranks        = 4,
                          .head_dim_v   = 4,
                          .few          = 10,
                          .many         = 110,
                          .few_seconds  = 1e-4,
                          .many_seconds = 3e-4};
    cost_exchange_t exchange, slowest = {0}, assumed;
    (void)state;
    cost_exchange_init(&assumed);
    cost_exchange_measured(&proof, &exchange);
    assert_near(exchange.seconds + 3 * exchange.peer_seconds, 1e-4);
    assert_near(exchange.bandwidth, 100 * 24 * 0.75 / 2e-4);
    /* Where many rows took no longer, nothing is known of bytes. */
    proof.few_seconds = proof.many_seconds = 0;
    cost_exchange_t odd;
    cost_exchange_measured(&proof, &odd);
    assert_true(odd.seconds > 0 && odd.bandwidth == assumed.bandwidth);
    cost_exchange_slowest(&slowest, &odd);
    cost_exchange_slowest(&slowest, &exchange);
    cost_exchange_slowest(&slowest, &(cost_exchange_t){0});
    assert_true(slowest.seconds == exchange.seconds && slowest.bandwidth == exchange.bandwidth);
    assert_true(slowest.peer_seconds == assumed.peer_seconds);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_token_bytes_are_those_of_one_layer),
        cmocka_unit_test(test_a_decode_row_is_bound_by_reading),
        cmocka_unit_test(test_many_rows_are_bound_by_what_is_computed),
        cmocka_unit_test(test_few_rows_end_at_64_packed_ones),
        cmocka_unit_test(test_a_rate_that_is_not_known_costs_nothing),
        cmocka_unit_test(test_the_slowest_of_each),
        cmocka_unit_test(test_one_worker_answers_with_o),
        cmocka_unit_test(test_three_workers_answer_with_partials),
        cmocka_unit_test(test_three_workers_merge_among_themselves),
        cmocka_unit_test(test_a_slow_worker_or_link_is_what_is_waited_for),
        cmocka_unit_test(test_a_thin_client_pays_its_way_to_the_coordinator),
        cmocka_unit_test(test_whole_sequences_are_dealt_out),
        cmocka_unit_test(test_spread_is_as_chunks_are_placed),
        cmocka_unit_test(test_the_choice_is_the_cheapest),
        cmocka_unit_test(test_without_workers_nothing_is_available),
        cmocka_unit_test(test_cost_is_monotone),
        cmocka_unit_test(test_huge_numbers_stay_numbers),
        cmocka_unit_test(test_break_even_is_where_the_costs_cross),
        cmocka_unit_test(test_break_even_by_hand),
        cmocka_unit_test(test_more_workers_than_lanes_change_nothing),
        cmocka_unit_test(test_one_worker_never_spreads),
        cmocka_unit_test(test_who_merges),
        cmocka_unit_test(test_what_a_proof_tells),
    };
    return cmocka_run_group_tests_name("balancer.cost", tests, NULL, NULL);
}
