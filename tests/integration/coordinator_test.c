/*
 * A coordinator that dies or stops, and clients that do. Clients with a layout keep stepping
 * without a coordinator; workers come back to its successor; what a dead client made is freed
 * when its lease runs out.
 */
#include "tests/integration/fixture.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void
fixture_up(fixture_t *f, const cluster_options_t *options)
{
    fixture_open(f, options, 2000, 21);
    model_create(&f->model, 0);
    OK(model_append(&f->model, 0, 600));
    OK(model_append(&f->model, 0, 1));
}

static uint32_t
workers_alive(attn_client_t *client)
{
    attn_cluster_info_t info;
    uint32_t n = 0;

    OK(attn_cluster_describe(client, &info));
    for (uint32_t w = 0; w < info.n_workers; w++) {
        n += info.workers[w].alive;
    }
    attn_cluster_info_free(&info);
    return n;
}

/* How long steps take that append a token each. */
static uint64_t
append_ms(fixture_t *f, int steps)
{
    uint64_t start = now_ms();

    for (int i = 0; i < steps; i++) {
        OK(model_append(&f->model, 0, 1));
    }
    return now_ms() - start;
}

/* ---- the coordinator ---- */

static void
test_steps_go_on_while_the_coordinator_is_stopped(void **state)
{
    fixture_t f;

    (void)state;
    fixture_up(&f, &(cluster_options_t){.workers = 3});
    uint64_t with = append_ms(&f, 20);
    process_signal(&f.cluster.coordinator, SIGSTOP);
    uint64_t start   = now_ms();
    uint64_t without = append_ms(&f, 20);
    assert_true(without < 500 + 5 * with); /* nor does one wait for it in vain */
    while (now_ms() - start < 2 * CLUSTER_LOST_MS) {
        sleep_ms(10);
    }
    process_signal(&f.cluster.coordinator, SIGCONT);

    /* It was its own silence that it heard: nobody is lost. */
    assert_true(process_await_logged(&f.cluster.coordinator, "coordinator.was_paused", 10000));
    sleep_ms(CLUSTER_LOST_MS + 400); /* by then it would have judged */
    assert_int_equal(workers_alive(f.client), 3);
    model_create(&f.model, 1);
    OK(model_append(&f.model, 1, 700));
    OK(model_append(&f.model, 0, 700));
    fixture_down(&f);
}

static void
test_a_successor_finds_the_workers_again(void **state)
{
    fixture_t f;
    char address[64];

    (void)state;
    fixture_up(&f, &(cluster_options_t){.workers = 2, .slab = "16MiB"}); /* room for one region */
    snprintf(address, sizeof(address), "%s", f.cluster.coordinator.address);
    process_kill(&f.cluster.coordinator);
    for (int i = 0; i < 20; i++) {
        OK(model_append(&f.model, 0, 1));
    }
    unlink(f.cluster.coordinator.log);
    cluster_start_coordinator(&f.cluster, address);

    uint64_t end          = now_ms() + 5000;
    attn_client_t *client = open_client(address, 2000);
    while (workers_alive(client) < 2 && now_ms() < end) {
        sleep_ms(20);
    }
    assert_int_equal(workers_alive(client), 2);
    assert_true(process_logged(&f.cluster.workers[0], "worker.start_over"));

    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;
    model_geometry(&geometry);
    OK(attn_cache_open(client, "cache", &geometry, &cache)); /* the regions were given back */
    model_init(&model, cache, 22);
    model_create(&model, 0); /* in all that is counted like the old one's */
    OK(model_append(&model, 0, 600));
    for (int i = 0; i < 21; i++) {
        OK(model_append(&model, 0, 1));
    }
    /* The old one's sequences are gone, and that is told: no id of theirs means another's. */
    assert_int_equal(f.model.seqs[0].length, model.seqs[0].length);
    attn_status_t status = model_append(&f.model, 0, 1);
    if (status != ATTN_ERR_NOT_FOUND) {
        fail_msg("%s: %s", attn_strerror(status), attn_last_error());
    }
    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    fixture_down(&f);
}

/* ---- clients ---- */

/* What the child does: sequences, tokens, an open step, and then nothing. */
static int
be_a_client(const char *address)
{
    attn_geometry_t geometry;
    attn_cache_t *cache;
    attn_step_t *step;
    static model_t model;
    attn_client_t *client = open_client(address, 2000);

    model_geometry(&geometry);
    OK(attn_cache_open(client, "leased", &geometry, &cache));
    model_init(&model, cache, 5);
    for (uint32_t s = 0; s < 3; s++) {
        model_create(&model, s);
        OK(model_append(&model, s, 300));
    }
    attn_entry_t entry = {.seq = model.seqs[2].seq, .base = 300, .n_q = 1, .n_new = 1};
    OK(attn_step_begin(
        cache,
        &(attn_batch_t){
            .size = sizeof(attn_batch_t), .n = 1, .entries = &entry, .q_dtype = ATTN_F32},
        &step));
    int fd = atoi(getenv("ATTND_READY_FD"));
    if (write(fd, "ready\n", 6) != 6) {
        return 1;
    }
    pause();
    return 0;
}

static bool
wait_for(attn_client_t *client, uint64_t sequences, uint32_t caches, uint32_t ms)
{
    uint64_t end = now_ms() + ms;
    attn_cluster_info_t info;

    for (;;) {
        OK(attn_cluster_describe(client, &info));
        attn_cluster_info_free(&info);
        if (info.sequences == sequences && info.caches == caches) {
            return true;
        }
        if (now_ms() >= end) {
            return false;
        }
        sleep_ms(20);
    }
}

static uint64_t
used_bytes(attn_client_t *client)
{
    attn_cluster_info_t info;
    uint64_t used = 0;

    OK(attn_cluster_describe(client, &info));
    for (uint32_t w = 0; w < info.n_workers; w++) {
        used += info.workers[w].region_bytes;
    }
    attn_cluster_info_free(&info);
    return used;
}

static void
test_a_killed_client_frees_its_sequences(void **state)
{
    test_cluster_t cluster;
    process_t child;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 2, .lease_ms = "1000"});
    attn_client_t *client = open_client(cluster.coordinator.address, 2000);
    process_start(
        &child, (const char *[]){"/proc/self/exe", "--client", cluster.coordinator.address, NULL});
    process_wait_ready(&child);
    assert_true(wait_for(client, 3, 1, 0));
    sleep_ms(1500); /* alive, it keeps its lease */
    assert_true(wait_for(client, 3, 1, 0));

    process_kill(&child);
    sleep_ms(300);
    assert_true(wait_for(client, 3, 1, 0)); /* the lease still runs */
    assert_true(wait_for(client, 0, 0, 2000));
    uint64_t end = now_ms() + 2000;
    while (used_bytes(client) > 0 && now_ms() < end) {
        sleep_ms(20);
    }
    assert_int_equal(used_bytes(client), 0); /* and the workers have their memory back */
    unlink(child.log);
    attn_client_close(client);
    cluster_down(&cluster);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steps_go_on_while_the_coordinator_is_stopped),
        cmocka_unit_test(test_a_successor_finds_the_workers_again),
        cmocka_unit_test(test_a_killed_client_frees_its_sequences),
    };

    if (argc == 3 && strcmp(argv[1], "--client") == 0) {
        return be_a_client(argv[2]);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
