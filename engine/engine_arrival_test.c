/*
 * engine_arrival_test.c: chunks from one engine to another: the same tokens, or nothing. What came
 * is read back and compared; that answers are the same bits is seen from outside, by clients.
 */
#include "engine/test_engine.h"

#define N 200u /* tokens: 12 pages of 16, and a half */
#define CHUNK 3u
#define COPY 9u

typedef struct pair {
    world_t from, to;
} pair_t;

static void
pair_open(pair_t *p)
{
    attn_geometry_t g = plain_geometry;

    g.page_size    = 16;
    g.region_bytes = 4 * 256 * (k_row(&g) + v_row(&g)) * g.layers;
    world_open(&p->from, &g, 1);
    world_open(&p->to, &g, 1);
}

static void
pair_close(pair_t *p)
{
    OK(engine_check(p->from.engine));
    OK(engine_check(p->to.engine));
    world_close(&p->from);
    world_close(&p->to);
}

static uint8_t *
content(world_t *w, uint64_t chunk, uint32_t layer, uint64_t *bytes_p)
{
    engine_export_t what = {
        .cache = w->cache, .chunk = chunk, .generation = 1, .layer = layer, .n = N};
    uint64_t k = N * k_row(&w->g), v = N * v_row(&w->g);
    uint8_t *data = malloc(k + v);

    OK(engine_chunk_export(w->engine, &what, data, data + k, k, v));
    *bytes_p = k + v;
    return data;
}

static void
assert_same(pair_t *p)
{
    for (uint32_t l = 0; l < p->from.g.layers; l++) {
        uint64_t n;
        uint8_t *there = content(&p->from, CHUNK, l, &n), *here = content(&p->to, COPY, l, &n);
        assert_memory_equal(there, here, n);
        free(there);
        free(here);
    }
}

static engine_copy_t
copy_of(const pair_t *p, uint32_t first, uint32_t length)
{
    return (engine_copy_t){.cache      = p->from.cache,
                           .chunk      = CHUNK,
                           .generation = 1,
                           .copy       = COPY,
                           .first      = first,
                           .length     = length};
}

static void
assert_empty(world_t *w)
{
    engine_info_t info;

    engine_describe(w->engine, &info);
    assert_int_equal(info.chunks, 0);
    assert_int_equal(info.used_bytes, 0);
}

/* ---- tests ---- */

static void
test_a_copy_has_the_same_tokens(void **state)
{
    pair_t p;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    OK(engine_copy_between(
        p.from.engine, p.to.engine,
        &(engine_copy_t){
            .cache = p.from.cache, .chunk = CHUNK, .generation = 1, .copy = COPY, .length = N},
        UINT64_MAX));
    assert_same(&p);
    pair_close(&p);
}

static void
test_a_copy_is_brought_up_to_date(void **state)
{
    pair_t p;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, 150));
    engine_copy_t first = copy_of(&p, 0, 150), rest = copy_of(&p, 150, N);
    OK(engine_copy_between(p.from.engine, p.to.engine, &first, UINT64_MAX));
    OK(grow(&p.from, CHUNK, 1, 150, N - 150));
    OK(engine_copy_between(p.from.engine, p.to.engine, &rest, UINT64_MAX));
    assert_same(&p);
    pair_close(&p);
}

static void
test_what_cannot_be_read_is_not_copied(void **state)
{
    pair_t p;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    engine_copy_t copy = copy_of(&p, 0, N);
    copy.generation    = 2;
    assert_int_equal(engine_copy_between(p.from.engine, p.to.engine, &copy, UINT64_MAX),
                     ATTN_ERR_STALE);
    copy = copy_of(&p, 0, N + 1);
    assert_int_equal(engine_copy_between(p.from.engine, p.to.engine, &copy, UINT64_MAX),
                     ATTN_ERR_INVALID);
    copy       = copy_of(&p, 0, N);
    copy.chunk = 77;
    assert_int_equal(engine_copy_between(p.from.engine, p.to.engine, &copy, UINT64_MAX),
                     ATTN_ERR_NOT_FOUND);
    copy = copy_of(&p, 0, N);
    assert_int_equal(engine_copy_between(p.from.engine, p.to.engine, &copy, 1), ATTN_ERR_DEADLINE);
    copy.cache = 99;
    assert_int_equal(engine_copy_between(p.from.engine, p.to.engine, &copy, UINT64_MAX),
                     ATTN_ERR_NOT_FOUND);
    assert_empty(&p.to);
    pair_close(&p);
}

/* One bit, anywhere in any part. */
static void
test_what_changed_on_its_way_is_not_stored(void **state)
{
    pair_t p;
    engine_arrival_t *arrival;
    engine_export_t part;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    for (uint32_t round = 0; round < 64; round++) {
        engine_copy_t copy   = copy_of(&p, 0, N);
        attn_status_t status = ATTN_OK;
        uint32_t broken      = pick(p.from.g.layers);
        OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
        while (status == ATTN_OK && engine_arrival_ask(arrival, &part)) {
            uint64_t n;
            uint8_t *data     = content(&p.from, CHUNK, part.layer, &n);
            uint64_t checksum = engine_checksum(&part, data, n);
            assert_int_equal(part.n, N);
            if (part.layer == broken) {
                data[random_bits() % n] ^= (uint8_t)(1u << pick(8));
            }
            status = engine_arrival_store(arrival, data, n, checksum);
            free(data);
        }
        assert_int_equal(status, ATTN_ERR_CORRUPT);
        assert_int_equal(part.layer, broken);
        assert_non_null(strstr(attn_last_error(), "tokens 0 to 200"));
        assert_int_equal(engine_arrival_publish(arrival), ATTN_ERR_INCOMPLETE);
        OK(engine_check(p.to.engine));
    }
    assert_empty(&p.to);
    pair_close(&p);
}

static void
test_what_is_no_part_is_not_stored(void **state)
{
    pair_t p;
    engine_arrival_t *arrival;
    engine_export_t part;
    uint64_t n;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    engine_copy_t copy = copy_of(&p, 0, N);
    OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
    uint8_t *data = content(&p.from, CHUNK, 0, &n);
    assert_true(engine_arrival_ask(arrival, &part));
    assert_int_equal(
        engine_arrival_store(arrival, data, n - 1, engine_checksum(&part, data, n - 1)),
        ATTN_ERR_INVALID);
    free(data);
    engine_arrival_drop(arrival);

    OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
    while (engine_arrival_ask(arrival, &part)) {
        data = content(&p.from, CHUNK, part.layer, &n);
        OK(engine_arrival_store(arrival, data, n, engine_checksum(&part, data, n)));
        free(data);
    }
    data = content(&p.from, CHUNK, 0, &n);
    assert_int_equal(engine_arrival_store(arrival, data, n, engine_checksum(&part, data, n)),
                     ATTN_ERR_INVALID); /* one too many */
    free(data);
    OK(engine_arrival_publish(arrival));
    assert_same(&p);
    pair_close(&p);
}

/* Parts of one size, in another order than they were asked for. */
static void
test_a_part_of_another_layer_is_not_stored(void **state)
{
    pair_t p;
    engine_arrival_t *arrival;
    engine_export_t parts[2];
    uint64_t n;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    engine_copy_t copy = copy_of(&p, 0, N);
    OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
    assert_true(engine_arrival_ask(arrival, &parts[0]));
    assert_true(engine_arrival_ask(arrival, &parts[1]));
    assert_int_equal(parts[0].n, parts[1].n);
    uint8_t *data = content(&p.from, CHUNK, 1, &n);
    assert_int_equal(engine_arrival_store(arrival, data, n, engine_checksum(&parts[1], data, n)),
                     ATTN_ERR_CORRUPT);
    free(data);
    engine_arrival_drop(arrival);
    pair_close(&p);
}

/* Whoever asked for it has given it up meanwhile: nobody would release it again. */
static void
test_what_was_released_does_not_arrive(void **state)
{
    pair_t p;
    engine_arrival_t *arrival;
    engine_export_t part;
    uint64_t n, id = COPY;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    engine_copy_t copy = copy_of(&p, 0, N);
    OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
    while (engine_arrival_ask(arrival, &part)) {
        uint8_t *data = content(&p.from, CHUNK, part.layer, &n);
        OK(engine_arrival_store(arrival, data, n, engine_checksum(&part, data, n)));
        free(data);
    }
    OK(engine_chunks_release(p.to.engine, p.to.cache, &id, 1));
    assert_int_equal(engine_arrival_publish(arrival), ATTN_ERR_NOT_FOUND);
    assert_non_null(strstr(attn_last_error(), "was released"));
    assert_int_equal(engine_arrival_begin(p.to.engine, &copy, &arrival), ATTN_ERR_NOT_FOUND);
    assert_empty(&p.to);
    pair_close(&p);
}

static void
test_a_cache_is_closed_while_it_arrives(void **state)
{
    pair_t p;
    engine_arrival_t *arrival;
    engine_export_t part;
    kv_region_info_t region;
    uint64_t n;

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, N));
    engine_copy_t copy = copy_of(&p, 0, N);
    OK(engine_arrival_begin(p.to.engine, &copy, &arrival));
    uint8_t *data = content(&p.from, CHUNK, 0, &n);
    assert_true(engine_arrival_ask(arrival, &part));
    OK(engine_cache_close(p.to.engine, p.to.cache));
    OK(engine_cache_open(p.to.engine, p.to.cache, &p.to.g, &region)); /* and opened anew */
    assert_int_equal(engine_arrival_store(arrival, data, n, engine_checksum(&part, data, n)),
                     ATTN_ERR_NOT_FOUND);
    engine_arrival_drop(arrival);
    engine_arrival_drop(NULL);
    assert_empty(&p.to);
    free(data);
    pair_close(&p);
}

/* A hold that nobody ends is ended by the tick. */
static void
test_a_chunk_is_held_for_a_while(void **state)
{
    pair_t p;
    kv_chunk_info_t info;
    kv_leaving_t hold = {.what = KV_LEAVE_HOLD, .chunk = CHUNK, .move = 1, .until_ns = 5000};

    (void)state;
    pair_open(&p);
    OK(grow(&p.from, CHUNK, 0, 0, 150));
    OK(engine_chunk_leave(p.from.engine, p.from.cache, &hold, &info));
    assert_int_equal(info.length, 150);
    assert_false(info.in_step);
    assert_int_equal(grow(&p.from, CHUNK, 1, 150, 1), ATTN_ERR_STALE);
    engine_tick(p.from.engine, 4999);
    assert_int_equal(grow(&p.from, CHUNK, 1, 150, 1), ATTN_ERR_STALE);
    engine_tick(p.from.engine, 5000);
    OK(grow(&p.from, CHUNK, 1, 150, 1));
    pair_close(&p);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_copy_has_the_same_tokens),
        cmocka_unit_test(test_a_copy_is_brought_up_to_date),
        cmocka_unit_test(test_what_cannot_be_read_is_not_copied),
        cmocka_unit_test(test_what_changed_on_its_way_is_not_stored),
        cmocka_unit_test(test_what_is_no_part_is_not_stored),
        cmocka_unit_test(test_a_part_of_another_layer_is_not_stored),
        cmocka_unit_test(test_what_was_released_does_not_arrive),
        cmocka_unit_test(test_a_cache_is_closed_while_it_arrives),
        cmocka_unit_test(test_a_chunk_is_held_for_a_while),
    };
    return cmocka_run_group_tests_name("engine_arrival", tests, NULL, NULL);
}
