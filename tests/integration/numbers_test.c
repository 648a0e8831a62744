/* Numbers through real processes: right, and the same bits from any number of workers. */
#include "tests/integration/cluster.h"
#include "tests/integration/model.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define ACTS 40u

/* Tell the story of a seed on a target; returns the digest of all answers. */
static uint64_t
tell(const char *target, const char *name, uint64_t seed, bool check)
{
    attn_client_t *client = open_client(target, 10000);
    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;

    model_geometry(&geometry);
    geometry.region_bytes = 24 << 20;
    OK(attn_cache_open(client, name, &geometry, &cache));
    model_init(&model, cache, seed);
    model.check = check;
    model_story(&model, ACTS);
    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    return model.digest;
}

static void
test_the_bits_do_not_depend_on_the_workers(void **state)
{
    static const uint64_t seeds[] = {1, 2};
    uint64_t digests[2];

    (void)state;
    for (uint32_t i = 0; i < 2; i++) {
        digests[i] = tell("inproc://cpu?workers=1&threads=1&slab=32MiB", "story", seeds[i], true);
    }
    assert_true(tell("inproc://cpu?workers=3&threads=1&slab=32MiB", "story", seeds[0], false) ==
                digests[0]);
    for (uint32_t workers = 1; workers <= 4; workers++) {
        test_cluster_t cluster;
        cluster_up(&cluster, &(cluster_options_t){.workers = workers});
        for (uint32_t i = 0; i < 2; i++) {
            uint64_t digest = tell(cluster.coordinator.address, "story", seeds[i], workers == 3);
            assert_true(digest == digests[i]);
        }
        cluster_down(&cluster);
    }
}

/* ---- two clients at once ---- */

typedef struct teller {
    pthread_t thread;
    const char *address;
    const char *name;
    uint64_t seed;
    uint64_t digest;
} teller_t;

/* Nothing is checked on this thread, for a failed check must leave by the test's own: equal
 * digests say that all was right. */
static void *
teller_thread(void *arg)
{
    teller_t *teller = arg;

    teller->digest = tell(teller->address, teller->name, teller->seed, false);
    return NULL;
}

static void
test_two_clients_at_once(void **state)
{
    test_cluster_t cluster;
    teller_t tellers[4];

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 2, .slab = "96MiB"});
    for (uint32_t i = 0; i < 4; i++) {
        tellers[i] = (teller_t){.address = cluster.coordinator.address,
                                .name    = i < 2    ? "shared"
                                           : i == 2 ? "own-2"
                                                    : "own-3",
                                .seed    = 10 + i / 2};
        assert_int_equal(pthread_create(&tellers[i].thread, NULL, teller_thread, &tellers[i]), 0);
    }
    for (uint32_t i = 0; i < 4; i++) {
        pthread_join(tellers[i].thread, NULL);
    }
    for (uint32_t i = 0; i < 4; i += 2) {
        assert_true(tellers[i].digest == tellers[i + 1].digest);
        assert_true(tellers[i].digest ==
                    tell("inproc://cpu?threads=1&slab=32MiB", "alone", 10 + i / 2, true));
    }
    attn_client_t *client = open_client(cluster.coordinator.address, 3000);
    attn_cluster_info_t info;
    OK(attn_cluster_describe(client, &info));
    assert_int_equal(info.sequences, 0); /* all went with their clients */
    assert_int_equal(info.caches, 0);
    attn_cluster_info_free(&info);
    attn_client_close(client);
    cluster_down(&cluster);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_bits_do_not_depend_on_the_workers),
        cmocka_unit_test(test_two_clients_at_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
