/* Workers, clients and caches: every transition and refusal, with the effects exactly. */
#include "balancer/test_directory.h"

#define SECOND (1000 * ATTN_NS_PER_MS)

/* ---- workers ---- */

static void
test_options_have_defaults(void **state)
{
    directory_options_t options;
    (void)state;
    directory_options_init(&options);
    assert_int_equal(options.lost_ns, 2 * SECOND);
    assert_int_equal(options.lease_ns, 30 * SECOND);
    assert_int_equal(options.first_epoch, 1);
    assert_int_equal(options.break_even_tokens, 0);
    directory_destroy(NULL);
}

static void
test_worker_joins_and_returns(void **state)
{
    fixture_t f;
    uint32_t id;
    (void)state;
    fixture_open(&f, 0);
    assert_int_equal(directory_epoch(f.directory), 1);
    assert_int_equal(join(&f, 1), 1);
    assert_int_equal(join(&f, 2), 2);
    assert_int_equal(directory_epoch(f.directory), 3);
    assert_int_equal(join(&f, 1), 1); /* again: nothing moves */
    assert_int_equal(directory_epoch(f.directory), 3);
    assert_string_equal(directory_worker(f.directory, 2)->address, "10.0.0.1:2");
    assert_null(directory_worker(f.directory, 0));
    assert_null(directory_worker(f.directory, 3));

    dir_worker_t anew = hello_of(1, 77);
    assert_int_equal(directory_worker_join(f.directory, &anew, f.now_ns, &id), ATTN_OK);
    assert_int_equal(id, 3);
    assert_int_equal(directory_epoch(f.directory), 5); /* one lost, one joined */
    assert_false(directory_worker(f.directory, 1)->alive);

    const dir_worker_t *all;
    uint32_t ids[1] = {0};
    assert_int_equal(directory_workers(f.directory, &all), 3);
    assert_int_equal(all[0].id, 1);
    assert_int_equal(directory_workers_alive(f.directory, ids, 1), 2); /* cut to the room */
    assert_int_equal(ids[0], 2);

    dir_worker_t old = hello_of(1, 1001);
    assert_int_equal(directory_worker_join(f.directory, &old, f.now_ns, &id), ATTN_ERR_STALE);
    assert_sentence("worker 1 at 10.0.0.1:1 was lost");
    assert_true(directory_worker(f.directory, 3)->alive);
    fixture_close(&f);
}

static void
test_worker_hello_is_checked(void **state)
{
    fixture_t f;
    uint32_t id        = 9;
    dir_worker_t hello = hello_of(1, 1);
    (void)state;
    fixture_open(&f, 0);
    hello.address[0] = 0;
    assert_int_equal(directory_worker_join(f.directory, &hello, 1, &id), ATTN_ERR_INVALID);
    assert_sentence("address is empty");
    hello = hello_of(1, 1);
    memset(hello.kind, 'x', sizeof(hello.kind));
    assert_int_equal(directory_worker_join(f.directory, &hello, 1, &id), ATTN_ERR_INVALID);
    assert_sentence("kind is too long: it must have 1 to 63 bytes");
    assert_int_equal(id, 9);
    assert_int_equal(directory_epoch(f.directory), 1);
    fixture_close(&f);
}

static void
test_a_full_table_forgets_lost_workers_only(void **state)
{
    fixture_t f;
    uint32_t id;
    dir_worker_t hello = hello_of(5000, 1);
    (void)state;
    fixture_open(&f, 0);
    for (uint32_t i = 1; i <= DIR_WORKERS_MAX; i++) {
        join(&f, i);
    }
    assert_int_equal(directory_worker_join(f.directory, &hello, 1, &id), ATTN_ERR_EXHAUSTED);
    assert_sentence("1024 workers are here already");
    directory_worker_lose(f.directory, 500);
    directory_worker_lose(f.directory, 600);
    assert_int_equal(directory_worker_join(f.directory, &hello, 1, &id), ATTN_OK);
    assert_int_equal(id, 1025);
    assert_null(directory_worker(f.directory, 500));
    assert_false(directory_worker(f.directory, 600)->alive);
    assert_int_equal(directory_worker(f.directory, 501)->id, 501);
    assert_int_equal(directory_workers_alive(f.directory, NULL, 0), 1023);
    fixture_close(&f);
}

static void
test_heartbeats_keep_a_worker_alive(void **state)
{
    fixture_t f;
    dir_worker_t figures = {.region_bytes = 1,
                            .used_bytes   = 2,
                            .chunks       = 3,
                            .open_steps   = 4,
                            .runs         = 5,
                            .kv_bytes     = 6,
                            .device_free  = 7,
                            .kv_rate      = 8,
                            .ucx          = true,
                            .ucx_clients  = 9,
                            .ucx_runs     = 10,
                            .gpu_clients  = 11,
                            .groups       = 13,
                            .gpu_runs     = 12,
                            .ucx_ways     = "shm net",
                            .place        = {"host", "device"},
                            .slab_bytes   = 7};
    (void)state;
    fixture_open(&f, 0);
    uint32_t id = join(&f, 1), other = join(&f, 2);

    assert_int_equal(directory_worker_heartbeat(f.directory, id, 1001, &figures, f.now_ns + SECOND),
                     ATTN_OK);
    const dir_worker_t *worker = directory_worker(f.directory, id);
    assert_int_equal(worker->region_bytes, 1);
    assert_int_equal(worker->used_bytes, 2);
    assert_int_equal(worker->chunks, 3);
    assert_int_equal(worker->open_steps, 4);
    assert_int_equal(worker->runs, 5);
    assert_int_equal(worker->kv_bytes, 6);
    assert_int_equal(worker->device_free, 7);
    assert_true(worker->kv_rate == 8);
    assert_true(worker->ucx && worker->ucx_clients == 9 && worker->ucx_runs == 10);
    assert_true(worker->gpu_clients == 11 && worker->gpu_runs == 12);
    assert_int_equal(worker->groups, 13);
    assert_string_equal(worker->ucx_ways, "shm net");
    assert_int_equal(worker->slab_bytes, 1 << 20); /* told by hello alone */
    assert_string_equal(worker->place.host, "");

    directory_tick(f.directory, f.now_ns + 2 * SECOND - 1);
    assert_true(directory_worker(f.directory, other)->alive);
    directory_tick(f.directory, f.now_ns + 2 * SECOND);
    assert_false(directory_worker(f.directory, other)->alive);
    assert_true(directory_worker(f.directory, id)->alive);
    uint64_t epoch = directory_epoch(f.directory);
    directory_tick(f.directory, f.now_ns + 3 * SECOND);
    assert_false(directory_worker(f.directory, id)->alive);
    assert_int_equal(directory_epoch(f.directory), epoch + 1);
    directory_tick(f.directory, f.now_ns + 9 * SECOND); /* lost once */
    directory_worker_lose(f.directory, id);
    directory_worker_lose(f.directory, 99);
    assert_int_equal(directory_epoch(f.directory), epoch + 1);

    assert_int_equal(directory_worker_heartbeat(f.directory, id, 1001, &figures, 1),
                     ATTN_ERR_NOT_FOUND);
    assert_sentence("worker 1 is lost: join anew");
    assert_int_equal(directory_worker_heartbeat(f.directory, 9, 1, &figures, 1),
                     ATTN_ERR_NOT_FOUND);
    id = join(&f, 3);
    assert_int_equal(directory_worker_heartbeat(f.directory, id, 1004, &figures, 1),
                     ATTN_ERR_NOT_FOUND);
    assert_sentence("has incarnation 1003, not 1004");
    fixture_close(&f);
}

static double
read_bandwidth_of(const fixture_t *f)
{
    return directory_cost(f->directory, 0).worker.read_bandwidth;
}

static void
test_cost_follows_the_slowest_live_worker(void **state)
{
    fixture_t f;
    cost_constants_t assumed;
    uint32_t id;
    (void)state;
    fixture_open(&f, 0);
    cost_constants_init(&assumed);
    assert_true(read_bandwidth_of(&f) == assumed.worker.read_bandwidth);
    for (uint32_t i = 1; i <= 3; i++) {
        dir_worker_t hello = hello_of(i, i);
        hello.speed        = (cost_worker_t){0}; /* 2 says nothing */
        if (i != 2) {
            hello.speed = (cost_worker_t){.read_bandwidth = i * 1e9, .attend_seconds = i * 1e-6};
        }
        assert_int_equal(directory_worker_join(f.directory, &hello, 1, &id), ATTN_OK);
    }
    assert_true(read_bandwidth_of(&f) == 1e9);
    assert_true(directory_cost(f.directory, 0).worker.attend_seconds == 3e-6);
    directory_worker_lose(f.directory, 1);
    assert_true(read_bandwidth_of(&f) == 3e9);
    directory_worker_lose(f.directory, 3);
    assert_true(read_bandwidth_of(&f) == assumed.worker.read_bandwidth);
    assert_true(directory_cost(f.directory, 0).link.hop_seconds == assumed.link.hop_seconds);
    fixture_close(&f);
}

/* The slowest way to a worker that lives; of one client's sequences, what that client found. */
static void
test_links_are_the_owners_or_a_clients(void **state)
{
    fixture_t f;
    cost_constants_t assumed;
    uint32_t a, b;
    (void)state;
    fixture_open(&f, 0);
    cost_constants_init(&assumed);
    assert_int_equal(directory_client_open(f.directory, "a", f.now_ns, &a), ATTN_OK);
    assert_int_equal(directory_client_open(f.directory, "b", f.now_ns, &b), ATTN_OK);
    uint32_t near = join(&f, 1), far = join(&f, 2);
    directory_worker_link(f.directory, near, &(cost_link_t){.hop_seconds = 1e-4, .bandwidth = 9e9});
    directory_worker_link(f.directory, far, &(cost_link_t){.hop_seconds = 4e-4, .bandwidth = 1e9});
    directory_worker_link(f.directory, far, &(cost_link_t){.bandwidth = 1});  /* says nothing */
    directory_worker_link(f.directory, 99, &(cost_link_t){.hop_seconds = 1}); /* nobody */
    cost_link_t link = directory_cost(f.directory, a).link;
    assert_true(link.hop_seconds == 4e-4 && link.send_seconds == 1e-4 && link.bandwidth == 1e9);
    directory_worker_lose(f.directory, far);
    link = directory_cost(f.directory, a).link;
    assert_true(link.hop_seconds == 1e-4 && link.bandwidth == 9e9);
    assert_true(directory_clients_link(f.directory).hop_seconds == 0);
    directory_client_link(f.directory, b, &(cost_link_t){.hop_seconds = 3e-6});
    link = directory_cost(f.directory, b).link;
    assert_true(link.hop_seconds == 3e-6 && link.bandwidth == 9e9);
    assert_true(directory_cost(f.directory, a).link.hop_seconds == 1e-4);
    assert_true(directory_cost(f.directory, 0).link.hop_seconds == 1e-4);
    assert_true(directory_clients_link(f.directory).hop_seconds == 3e-6);
    directory_set_merge(f.directory, 0);
    assert_true(directory_cost(f.directory, 0).merge_bandwidth == assumed.merge_bandwidth);
    directory_set_merge(f.directory, 5e9);
    assert_true(directory_cost(f.directory, 0).merge_bandwidth == 5e9);
    fixture_close(&f);
}

/* ---- clients ---- */

static void
test_a_lease_runs_out(void **state)
{
    fixture_t f;
    uint32_t a, b;
    (void)state;
    fixture_open(&f, 0);
    uint32_t worker = join(&f, 1);
    assert_int_equal(directory_client_open(f.directory, "a", f.now_ns, &a), ATTN_OK);
    assert_int_equal(directory_client_open(f.directory, NULL, f.now_ns, &b), ATTN_OK);
    assert_true(a != 0 && b != 0 && a != b);
    assert_int_equal(directory_clients(f.directory), 2);

    uint64_t cache = open_cache(&f, a, "chat", ATTN_PLACE_WHOLE);
    assert_int_equal(open_cache(&f, b, "chat", ATTN_PLACE_WHOLE), cache);
    assert_int_equal(directory_cache_on_worker(f.directory, cache, worker, 100), ATTN_OK);
    attn_seq_t of_a = make_seq(&f, cache, a, 0), of_b = make_seq(&f, cache, b, 0);
    attn_seq_t of_nobody = make_seq(&f, cache, 0, 0);
    assert_int_equal(directory_seq_reserve(f.directory, of_a, 1), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, of_b, 1), ATTN_OK);
    assert_int_equal(directory_seq_reserve(f.directory, of_nobody, 1), ATTN_OK);
    uint64_t ids[3][2]; /* each with one in advance */
    for (uint32_t c = 0; c < 2; c++) {
        ids[0][c] = chunk_of(&f, of_a, c);
        ids[1][c] = chunk_of(&f, of_b, c);
        ids[2][c] = chunk_of(&f, of_nobody, c);
    }

    assert_int_equal(directory_client_renew(f.directory, b, f.now_ns + SECOND), ATTN_OK);
    for (uint64_t at = 1; at < 30; at++) { /* the worker lives on */
        dir_worker_t figures = {0};
        directory_worker_heartbeat(f.directory, worker, 1001, &figures, f.now_ns + at * SECOND);
        directory_tick(f.directory, f.now_ns + at * SECOND);
    }
    assert_int_equal(directory_clients(f.directory), 2);
    assert_int_equal(f.n_effects, 0);
    directory_tick(f.directory, f.now_ns + 30 * SECOND);
    assert_int_equal(directory_clients(f.directory), 1);
    assert_int_equal(f.n_effects, 2);
    assert_effect(&f, 0, DIR_RELEASE_CHUNK, worker, cache, ids[0][0]);
    assert_effect(&f, 1, DIR_RELEASE_CHUNK, worker, cache, ids[0][1]);
    assert_int_equal(directory_client_renew(f.directory, a, f.now_ns), ATTN_ERR_NOT_FOUND);
    assert_sentence("its lease ran out");
    assert_int_equal(directory_seq_check(f.directory, cache, of_a), ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_seq_check(f.directory, cache, of_b), ATTN_OK);

    /* b was the last to leave: the cache goes, and what nobody's lease held with it. */
    directory_client_close(f.directory, b);
    assert_int_equal(f.n_effects, 7);
    for (uint32_t i = 0; i < 4; i++) {
        assert_effect(&f, 2 + i, DIR_RELEASE_CHUNK, worker, cache, ids[1 + i / 2][i % 2]);
    }
    assert_effect(&f, 6, DIR_CLOSE_CACHE, worker, cache, 0);
    assert_int_equal(directory_clients(f.directory), 0);
    assert_int_equal(seq_count(directory_sequences(f.directory)), 0);
    directory_client_close(f.directory, b); /* again: nothing */
    directory_client_close(f.directory, 0);
    fixture_close(&f);
}

static void
test_clients_have_a_limit(void **state)
{
    fixture_t f;
    uint32_t id;
    (void)state;
    fixture_open(&f, 0);
    for (uint32_t i = 0; i < DIR_CLIENTS_MAX; i++) {
        assert_int_equal(directory_client_open(f.directory, "c", f.now_ns, &id), ATTN_OK);
    }
    assert_int_equal(directory_client_open(f.directory, "c", f.now_ns, &id), ATTN_ERR_EXHAUSTED);
    assert_sentence("65536 clients");
    directory_tick(f.directory, f.now_ns + 30 * SECOND);
    assert_int_equal(directory_clients(f.directory), 0);
    fixture_close(&f);
}

/* ---- caches ---- */

static void
test_caches_are_joined_by_name_and_geometry(void **state)
{
    fixture_t f;
    uint32_t client;
    uint64_t cache = 0, again = 0, ids[2];
    bool created             = false;
    attn_geometry_t geometry = small_geometry(ATTN_PLACE_AUTO);
    (void)state;
    fixture_open(&f, 0);
    assert_int_equal(directory_client_open(f.directory, "runner", 1, &client), ATTN_OK);
    assert_int_equal(directory_cache_open(f.directory, client, "a", &geometry, &cache, &created),
                     ATTN_OK);
    assert_true(created);
    assert_int_equal(directory_cache_open(f.directory, client, "a", &geometry, &again, &created),
                     ATTN_OK);
    assert_false(created);
    assert_int_equal(cache, again);
    assert_int_equal(directory_cache(f.directory, cache)->opens, 2);
    assert_string_equal(directory_cache(f.directory, cache)->name, "a");
    assert_non_null(directory_cache(f.directory, cache)->geometry.layer_table);

    geometry.layers = 3;
    assert_int_equal(directory_cache_open(f.directory, client, "a", &geometry, &again, &created),
                     ATTN_ERR_EXISTS);
    assert_sentence("cache \"a\" is open with another geometry: layers is 2 there, 3 here");
    assert_int_equal(directory_cache_open(f.directory, client, "b", &geometry, &again, &created),
                     ATTN_OK);
    assert_true(created && again != cache);
    assert_int_equal(directory_caches(f.directory, ids, 1), 2);
    assert_int_equal(ids[0], cache);

    assert_int_equal(directory_cache_close(f.directory, 0, cache), ATTN_ERR_NOT_FOUND);
    assert_sentence("has not opened cache");
    assert_int_equal(directory_cache_close(f.directory, client, cache), ATTN_OK);
    assert_non_null(directory_cache(f.directory, cache));
    assert_int_equal(directory_cache_close(f.directory, client, cache), ATTN_OK);
    assert_null(directory_cache(f.directory, cache));
    assert_int_equal(directory_cache_close(f.directory, client, cache), ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_caches(f.directory, ids, 2), 1);

    /* The name is free again, for any geometry; the id is not used again. */
    assert_int_equal(directory_cache_open(f.directory, client, "a", &geometry, &again, &created),
                     ATTN_OK);
    assert_true(created && again > cache);
    fixture_close(&f);
}

static void
test_caches_are_joined_without_a_geometry(void **state)
{
    fixture_t f;
    uint32_t client;
    uint64_t cache = 0, again = 77;
    bool created = true;
    (void)state;
    fixture_open(&f, 0);
    assert_int_equal(directory_client_open(f.directory, "tool", 1, &client), ATTN_OK);
    assert_int_equal(directory_cache_open(f.directory, client, "a", NULL, &again, &created),
                     ATTN_ERR_NOT_FOUND);
    assert_sentence("no cache \"a\" is open");
    assert_int_equal(directory_caches(f.directory, NULL, 0), 0);
    assert_int_equal(again, 77);

    cache = open_cache(&f, 0, "a", ATTN_PLACE_SPREAD);
    assert_int_equal(directory_cache_open(f.directory, client, "a", NULL, &again, &created),
                     ATTN_OK);
    assert_false(created);
    assert_int_equal(again, cache);
    assert_int_equal(directory_cache(f.directory, cache)->geometry.placement, ATTN_PLACE_SPREAD);
    assert_int_equal(directory_cache(f.directory, cache)->opens, 2);
    assert_int_equal(directory_cache_open(f.directory, client, "a b", NULL, &again, &created),
                     ATTN_ERR_INVALID);
    assert_int_equal(directory_cache_open(f.directory, 99, "a", NULL, &again, &created),
                     ATTN_ERR_NOT_FOUND);
    assert_sentence("client 99");

    /* It counts as an opening: the cache stays until this one leaves too. */
    assert_int_equal(directory_cache_close(f.directory, 0, cache), ATTN_OK);
    assert_non_null(directory_cache(f.directory, cache));
    directory_client_close(f.directory, client);
    assert_null(directory_cache(f.directory, cache));
    assert_int_equal(directory_cache_open(f.directory, 0, "a", NULL, &again, &created),
                     ATTN_ERR_NOT_FOUND);
    fixture_close(&f);
}

static void
test_cache_names_and_geometry_are_checked(void **state)
{
    fixture_t f;
    char name[130];
    uint64_t cache;
    bool created;
    attn_geometry_t geometry = small_geometry(ATTN_PLACE_AUTO);
    (void)state;
    fixture_open(&f, 0);
    memset(name, 'n', sizeof(name));
    name[128] = 0;
    assert_int_equal(directory_cache_open(f.directory, 0, name, &geometry, &cache, &created),
                     ATTN_OK);
    name[128] = 'n';
    name[129] = 0;
    assert_int_equal(directory_cache_open(f.directory, 0, name, &geometry, &cache, &created),
                     ATTN_ERR_INVALID);
    assert_sentence("too long: it must have 1 to 128 bytes");
    assert_int_equal(directory_cache_open(f.directory, 0, "", &geometry, &cache, &created),
                     ATTN_ERR_INVALID);
    assert_int_equal(directory_cache_open(f.directory, 0, NULL, &geometry, &cache, &created),
                     ATTN_ERR_INVALID);
    assert_sentence("empty");
    assert_int_equal(directory_cache_open(f.directory, 0, "a-Z_0./", &geometry, &cache, &created),
                     ATTN_OK);
    assert_int_equal(directory_cache_open(f.directory, 0, "a b", &geometry, &cache, &created),
                     ATTN_ERR_INVALID);
    assert_sentence("byte 0x20 at 1");
    assert_int_equal(directory_cache_open(f.directory, 5, "a", &geometry, &cache, &created),
                     ATTN_ERR_NOT_FOUND);
    geometry.head_dim_k = 0;
    assert_int_equal(directory_cache_open(f.directory, 0, "a", &geometry, &cache, &created),
                     ATTN_ERR_INVALID);
    assert_sentence("cache \"a\": geometry.head_dim_k is 0");
    for (uint32_t i = 2; i < DIR_CACHES_MAX; i++) {
        snprintf(name, sizeof(name), "c%u", i);
        open_cache(&f, 0, name, ATTN_PLACE_AUTO);
    }
    geometry = small_geometry(ATTN_PLACE_AUTO);
    assert_int_equal(directory_cache_open(f.directory, 0, "last", &geometry, &cache, &created),
                     ATTN_ERR_EXHAUSTED);
    assert_sentence("1024 caches");
    fixture_close(&f);
}

static void
test_a_cache_lives_on_one_kind(void **state)
{
    fixture_t f;
    uint32_t other;
    dir_worker_t hello = hello_of(2, 2);
    (void)state;
    fixture_open(&f, 0);
    uint64_t cache  = open_cache(&f, 0, "chat", ATTN_PLACE_AUTO);
    uint32_t worker = join(&f, 1);
    strcpy(hello.kind, "cpu-scalar/1/128");
    assert_int_equal(directory_worker_join(f.directory, &hello, 1, &other), ATTN_OK);
    assert_int_equal(directory_cache_on_worker(f.directory, cache, worker, 10), ATTN_OK);
    assert_string_equal(directory_cache(f.directory, cache)->kind, "cpu-avx2/1/128");
    assert_int_equal(directory_cache_on_worker(f.directory, cache, other, 10),
                     ATTN_ERR_UNSUPPORTED);
    assert_sentence("worker 2 computes as cpu-scalar/1/128, cache \"chat\" as cpu-avx2/1/128");
    assert_true(directory_cache_is_on(f.directory, cache, worker));
    assert_false(directory_cache_is_on(f.directory, cache, other));
    assert_int_equal(directory_cache_on_worker(f.directory, cache + 1, worker, 10),
                     ATTN_ERR_NOT_FOUND);
    assert_int_equal(directory_cache_on_worker(f.directory, cache, 9, 10), ATTN_ERR_NOT_FOUND);
    directory_worker_lose(f.directory, worker);
    assert_false(directory_cache_is_on(f.directory, cache, worker));
    assert_int_equal(directory_cache_on_worker(f.directory, cache, worker, 10), ATTN_ERR_NOT_FOUND);
    assert_sentence("worker 1 is lost");

    /* Regions of live workers alone are closed. */
    uint32_t third = join(&f, 3);
    assert_int_equal(directory_cache_on_worker(f.directory, cache, third, 10), ATTN_OK);
    assert_int_equal(directory_cache_close(f.directory, 0, cache), ATTN_OK);
    assert_int_equal(f.n_effects, 1);
    assert_effect(&f, 0, DIR_CLOSE_CACHE, third, cache, 0);
    fixture_close(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options_have_defaults),
        cmocka_unit_test(test_worker_joins_and_returns),
        cmocka_unit_test(test_worker_hello_is_checked),
        cmocka_unit_test(test_a_full_table_forgets_lost_workers_only),
        cmocka_unit_test(test_heartbeats_keep_a_worker_alive),
        cmocka_unit_test(test_cost_follows_the_slowest_live_worker),
        cmocka_unit_test(test_links_are_the_owners_or_a_clients),
        cmocka_unit_test(test_a_lease_runs_out),
        cmocka_unit_test(test_clients_have_a_limit),
        cmocka_unit_test(test_caches_are_joined_by_name_and_geometry),
        cmocka_unit_test(test_caches_are_joined_without_a_geometry),
        cmocka_unit_test(test_cache_names_and_geometry_are_checked),
        cmocka_unit_test(test_a_cache_lives_on_one_kind),
    };
    return cmocka_run_group_tests_name("balancer.directory", tests, NULL, NULL);
}
